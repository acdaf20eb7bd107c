"""The planner: what it promises about budgets, and what it says when nothing fits."""

import json

import pytest
from helpers import make_pair, one_line, tiny_config_dict
from hypothesis import given, settings
from hypothesis import strategies as st

import qwen3_vl
from qwen3_vl import MemoryRequest, VideoClip, VisualRules, plan_memory
from qwen3_vl.configuration.official_sizes import NAMES, official_config
from qwen3_vl.optim.memory.memory_caches import CACHES
from qwen3_vl.optim.memory.memory_plan import PREFILL_CHUNKS, VISION_CHUNKS


OFFICIAL = official_config("Qwen/Qwen3-VL-2B-Instruct")
REQUESTS = st.builds(
    MemoryRequest,
    images=st.lists(st.tuples(st.integers(32, 4000), st.integers(200, 4000)), max_size=4),
    videos=st.lists(st.builds(VideoClip, st.integers(64, 1000), st.integers(64, 1000), st.floats(1, 900)), max_size=2),
    text_tokens=st.integers(1, 40000),
    new_tokens=st.integers(1, 4000),
    batch_size=st.integers(1, 4),
    num_beams=st.integers(1, 4),
)


def badness(plan):
    """A number that is larger for a worse plan: the cache first, then the steps."""
    order = list(CACHES)
    steps = [
        VISION_CHUNKS.index(plan.max_patches) if plan.max_patches in VISION_CHUNKS else len(VISION_CHUNKS),
        PREFILL_CHUNKS.index(plan.prefill_chunk),
    ]
    return order.index(plan.cache), steps


@given(REQUESTS, st.integers(5 * 10**9, 60 * 10**9), st.floats(1.0, 3.0))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_plans_fit_and_more_budget_is_never_worse(request, budget, factor):
    try:
        small = plan_memory(OFFICIAL, request, budget)
    except MemoryError as error:
        assert "nothing fits into" in one_line(error)
        return
    large = plan_memory(OFFICIAL, request, int(budget * factor))
    assert small.peak <= budget
    (cache, steps), (large_cache, large_steps) = badness(small), badness(large)
    assert large_cache <= cache
    if large_cache == cache:
        assert all(more <= less for more, less in zip(large_steps, steps, strict=True))


@given(REQUESTS)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_parts_add_up(request):
    plan = plan_memory(OFFICIAL, request)
    sizes = plan.sizes
    assert sizes.text + sizes.image + sizes.video == sizes.prompt
    choice = CACHES[plan.cache]
    shapes_bytes = choice.bytes_held(_shapes(), plan.request.rows, sizes.cached, 2)
    assert plan.kv_total == shapes_bytes
    held = plan.weights_total + sum(plan.inputs.values())
    assert plan.peaks["vision"] == held + plan.activations["vision"] + plan.slack["vision"]
    decode = held + sum(plan.features.values()) + plan.kv_total
    assert plan.peaks["decode"] == decode + plan.activations["decode"] + plan.slack["decode"]
    assert sum(plan.by_modality.values()) == plan.kv_total + sum(plan.inputs.values()) + sum(plan.features.values())
    assert (plan.kv["video"] > 0) == bool(plan.request.videos)
    assert json.loads(json.dumps(plan.to_dict()))["peak"] == plan.peak


def _shapes():
    from qwen3_vl.optim.memory.memory_shapes import ModelShapes

    return ModelShapes.of_config(OFFICIAL)


def test_steps_shrink_before_precision_falls():
    request = MemoryRequest(images=[(1024, 1024)] * 16, text_tokens=60000)
    free = plan_memory(OFFICIAL, request)
    assert free.max_patches is None and free.prefill_chunk is None and free.cache == "paged"
    tight = plan_memory(OFFICIAL, request, int(free.peak * 0.93))
    assert tight.cache == "paged" and (tight.max_patches or tight.prefill_chunk)
    tighter = plan_memory(OFFICIAL, request, tight.weights_total + tight.kv_total)
    assert tighter.cache in ("int8", "int4")
    with pytest.raises(MemoryError, match="at least"):
        plan_memory(OFFICIAL, request, tight.weights_total + tight.kv_total, lossy=False)


def test_what_does_not_fit_says_how_much_is_missing():
    with pytest.raises(MemoryError) as caught:
        plan_memory(OFFICIAL, MemoryRequest(), "1GB")
    message = one_line(caught.value)
    assert "nothing fits into 1.00 GB" in message and "at least" in message and "smaller model" in message
    least = float(message.split("at least ")[1].split(" GB")[0]) * 1e9
    plan_memory(OFFICIAL, MemoryRequest(), int(least * 1.01))


@pytest.mark.parametrize("budget", [0, -1, "0GB", "many", "8 apples", "", float("nan"), True, None.__class__, "1e999"])
def test_bad_budgets(budget):
    with pytest.raises(ValueError, match="budget must be bytes above 0"):
        plan_memory(OFFICIAL, MemoryRequest(), budget)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"images": [(0, 10)]}, "image height must be a whole number of at least 1, got 0"),
        ({"images": [(10, -4)]}, "image width"),
        ({"text_tokens": -1}, "text_tokens"),
        ({"new_tokens": 0}, "new_tokens"),
        ({"batch_size": 0}, "batch_size"),
        ({"num_beams": 1.5}, "num_beams"),
        ({"text_tokens": 0}, "the request is empty"),
    ],
)
def test_bad_requests(fields, words):
    with pytest.raises(ValueError, match=words):
        MemoryRequest(**fields)
    with pytest.raises(ValueError, match="aspect ratio"):
        plan_memory(OFFICIAL, MemoryRequest(images=[(10, 10000)]))


def test_unknown_names():
    with pytest.raises(ValueError, match="attention 'sdp' is not known; did you mean 'sdpa'"):
        plan_memory(OFFICIAL, MemoryRequest(), attention="sdp")
    with pytest.raises(ValueError, match="cache must be one of dynamic, paged, int8"):
        plan_memory(OFFICIAL, MemoryRequest(), cache="int3")


def test_float32_configurations_may_be_halved():
    values = tiny_config_dict(text={"dtype": "float32"})
    config = qwen3_vl.Qwen3VLConfig(**values)
    rules, request = VisualRules(4), MemoryRequest(text_tokens=4000)
    exact = plan_memory(config, request, rules=rules, lossy=False)
    assert exact.dtype == "float32"
    halved = plan_memory(config, request, exact.peak - 1000, rules=rules, cache="paged")
    assert halved.dtype == "float32" and halved.prefill_chunk is not None
    seen = []
    for percent in range(100, 1, -2):
        try:
            plan = plan_memory(config, request, exact.peak * percent // 100, rules=rules, cache="paged")
        except MemoryError:
            break
        seen.append((plan.dtype, plan.prefill_chunk is not None))
    # First smaller steps, then fewer bits; bfloat16 with the prefill at once would take more than those steps.
    assert list(dict.fromkeys(seen)) == [("float32", False), ("float32", True), ("bfloat16", True)]
    model = make_pair("dense").ours
    assert plan_memory(model, request, rules=rules).dtype == "float32"


def test_names_of_released_models(config_fixtures):
    from qwen3_vl.optim.memory.memory_shapes import ModelShapes

    assert len(NAMES) == 12
    for size, path in config_fixtures.items():
        values = json.loads(path.read_text())
        config_class = qwen3_vl.Qwen3VLMoeConfig if "moe" in values["model_type"] else qwen3_vl.Qwen3VLConfig
        published = config_class(**values)
        for edition in ("Instruct", "Thinking"):
            own = official_config(f"Qwen/Qwen3-VL-{size}-{edition}")
            assert ModelShapes.of_config(own) == ModelShapes.of_config(published)
    assert official_config("Qwen/Qwen3-VL-3B-Instruct") is None
    assert official_config("Qwen/Qwen2-VL-2B-Instruct") is None
