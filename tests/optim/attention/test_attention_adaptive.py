"""Adaptive attention: what is picked where, the timing run, and that the default changes nothing."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from helpers import make_inputs, make_pair, one_line, valid_positions
from reference import CASES, AttentionCase, assert_matches, dense_mask_of, dense_reference, inputs_of, layout_of

from qwen3_vl.optim.attention import attention_timing
from qwen3_vl.optim.attention.adaptive_settings import AdaptiveSettings
from qwen3_vl.optim.attention.attention_adaptive import (
    AdaptiveAttention,
    adaptive_attention_forward,
    choose_mechanism,
)
from qwen3_vl.optim.attention.attention_dynamic_sparse import DynamicSparseAttention, DynamicSparseSettings
from qwen3_vl.optim.attention.attention_layout import AttentionLayout
from qwen3_vl.optim.attention.attention_mechanisms import FORWARDS
from qwen3_vl.optim.attention.attention_timing import (
    AttentionShape,
    load_timing,
    measure_mechanisms,
    rules_from_timings,
    save_timing,
)
from qwen3_vl.optim.cache.cache_paged import PagedKVCache, PagedLayer


NAME = "qwen3_vl_adaptive"
EXACT, BLOCKS, DYNAMIC, CHUNKS = (
    "qwen3_vl_exact",
    "qwen3_vl_block_sparse",
    "qwen3_vl_dynamic_sparse",
    "qwen3_vl_memory_efficient",
)
GREEDY = {"max_new_tokens": 8, "do_sample": False}
SHAPES = {"decoder": AttentionShape(4, 2, 16), "vision": AttentionShape(2, 2, 16)}


@pytest.fixture
def calls(monkeypatch):
    """Every call to a mechanism, as (name, layer, queries, keywords); layers of the tower are `None`."""
    seen = []

    def recording(name, forward):
        def record(module, query, key, value, attention_mask, **kwargs):
            seen.append((name, getattr(module, "layer_idx", None), query.shape[2], kwargs))
            return forward(module, query, key, value, attention_mask, **kwargs)

        record.reads_cache_layer = getattr(forward, "reads_cache_layer", False)
        return record

    for name, forward in FORWARDS.items():
        monkeypatch.setitem(FORWARDS, name, recording(name, forward))
    return seen


def called(calls, layer):
    return [(name, queries) for name, of_layer, queries, _ in calls if of_layer == layer]


def module_with(causal=True, **settings):
    return SimpleNamespace(is_causal=causal, attention_settings={NAME: AdaptiveSettings(**settings)})


@pytest.mark.parametrize("mechanism", [EXACT, CHUNKS])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_float64(case, mechanism):
    module = module_with(case.causal, vision=mechanism, prefill=mechanism, decode=mechanism)
    tensors = inputs_of(case)
    output, weights = adaptive_attention_forward(module, *tensors, layout_of(case), scaling=case.scaling)
    assert weights is None
    assert_matches(output, dense_reference(*tensors, layout_of(case)))


@pytest.mark.parametrize(
    ("keys", "expected"), [(1, EXACT), (99, EXACT), (100, BLOCKS), (299, BLOCKS), (300, DYNAMIC), (5000, DYNAMIC)]
)
def test_the_last_rule_reached_counts(keys, expected):
    module = module_with(decode=[[0, "flash"], [100, "sparse"], [300, "dynamic_sparse"]])
    query, key = torch.empty(1, 4, 1, 8, device="meta"), torch.empty(1, 2, keys, 8, device="meta")
    assert choose_mechanism(module, query, key) == expected
    # Of a preallocated cache only the used places count.
    longer = torch.empty(1, 2, 9000, 8, device="meta")
    assert choose_mechanism(module, query, longer, AttentionLayout(keys - 1)) == expected


def test_phases():
    module = module_with(prefill=CHUNKS, decode=DYNAMIC)
    key = torch.empty(1, 2, 64, 8, device="meta")
    assert choose_mechanism(module, torch.empty(1, 4, 64, 8, device="meta"), key) == CHUNKS
    assert choose_mechanism(module, torch.empty(1, 4, 16, 8, device="meta"), key) == DYNAMIC
    assert choose_mechanism(module, torch.empty(1, 4, 17, 8, device="meta"), key) == CHUNKS
    module.is_causal = False
    assert choose_mechanism(module, torch.empty(1, 4, 1, 8, device="meta"), key) == EXACT


def test_picks_by_layer_phase_and_length_in_a_model(calls):
    model = make_pair("dense").ours
    technique = AdaptiveAttention(
        vision=[[0, "memory_efficient"], [20, "flash"]],
        prefill=[[0, "memory_efficient"], [24, "sparse"]],
        decode=[[0, "flash"], [25, "dynamic_sparse"]],
        layers={1: {"prefill": "flash"}, "2": {"decode": "memory_efficient", "vision": "memory_efficient"}},
    )
    technique.apply(model)
    inputs = make_inputs(["text:6", "image:4x6", "text:2", "image:4x4", "text:2"])
    assert inputs["input_ids"].shape[1] == 24
    model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert called(calls, 0) == [(BLOCKS, 24), (DYNAMIC, 1), (DYNAMIC, 1), (DYNAMIC, 1)]
    assert called(calls, 1) == [(EXACT, 24), (DYNAMIC, 1), (DYNAMIC, 1), (DYNAMIC, 1)]
    assert called(calls, 2) == [(BLOCKS, 24), (CHUNKS, 1), (CHUNKS, 1), (CHUNKS, 1)]
    # 24 and 16 patches, in three blocks.
    assert called(calls, None) == [(EXACT, 24), (CHUNKS, 16)] * 2 + [(CHUNKS, 24), (CHUNKS, 16)]
    runs = [kwargs["visual_runs"] for name, _, queries, kwargs in calls if name == BLOCKS and queries == 24]
    pictures = [*[0] * 7, *[1] * 6, *[0] * 4, *[2] * 4, *[0] * 3]
    assert [run.tolist() for run in runs] == [[pictures], [pictures]]


def test_a_shorter_prompt_takes_the_earlier_rules(calls):
    model = make_pair("dense").ours
    AdaptiveAttention(prefill=[[0, "memory_efficient"], [40, "flash"]], decode="memory_efficient").apply(model)
    model(**make_inputs(["text:39"]))
    model(**make_inputs(["text:40"]))
    assert called(calls, 0) == [(CHUNKS, 39), (EXACT, 40)]


def test_paged_cache_is_read_in_place_or_gathered(calls):
    case = AttentionCase(batch=2, queries=3, past=40, padding="left")
    query, key, value = inputs_of(case)
    expected = dense_reference(query, key, value, layout_of(case))
    for mechanism in (EXACT, CHUNKS):
        layer = PagedLayer()
        layer.update(key[:, :, :40], value[:, :, :40])
        new = layer.update(key[:, :, 40:], value[:, :, 40:], dense=False)
        output, _ = adaptive_attention_forward(
            module_with(decode=mechanism), query, *new, layout_of(case), scaling=case.scaling, kv_layer=layer
        )
        assert_matches(output, expected)
    assert [kwargs.get("kv_layer") is not None for *_, kwargs in calls] == [True, False]


def test_settings_of_the_mechanisms_arrive():
    model = make_pair("dense").ours
    technique = AdaptiveAttention(
        prefill="dynamic_sparse",
        mechanisms={
            "dynamic_sparse": {
                "threshold": 0.2, "min_blocks": 1, "window_tokens": 4, "query_block": 8, "key_block": 4, "stride": 4,
                "dense_below_tokens": 0,
            }
        },
    )  # fmt: skip
    technique.apply(model)
    model(**make_inputs(["text:90"]))
    assert max(DynamicSparseAttention.last_density(model)) < 1
    technique.revert(model)
    assert not any(hasattr(module, "attention_settings") for module in model.modules())


@pytest.mark.parametrize("paged", [False, True])
def test_the_default_gives_the_tokens_of_exact(checkpoint, paged):
    model, inputs = checkpoint

    def generate():
        cache = PagedKVCache() if paged else None
        return model.generate(**inputs, **GREEDY, past_key_values=cache)

    plain = generate()
    model.set_attn_implementation(EXACT)
    expected, logits = generate(), model(**inputs).logits
    model.set_attn_implementation(NAME)
    assert torch.equal(generate(), expected) and torch.equal(expected, plain)
    assert torch.equal(model(**inputs).logits, logits)
    model.set_attn_implementation("sdpa")


@pytest.mark.parametrize("attention_type", ["flash", "memory_efficient", "sparse", "dynamic_sparse"])
def test_every_type_generates_on_the_checkpoint(checkpoint, attention_type):
    model, inputs = checkpoint
    expected = model.generate(**inputs, **GREEDY)
    technique = AdaptiveAttention(config=model.config, attention_type=attention_type)
    technique.apply(model)
    try:
        # Shorter than the defaults of the sparse ones leave anything out.
        assert torch.equal(model.generate(**inputs, **GREEDY), expected)
    finally:
        technique.revert(model)
    assert technique.exact is (attention_type in ("flash", "memory_efficient"))


def test_apply_and_revert_are_bit_identical(kind):
    model = make_pair(kind).ours
    inputs = make_inputs(["text:5", "image:4x6", "text:3"], ["text:9"])
    before, dynamic = model(**inputs).logits, DynamicSparseAttention(min_blocks=3)
    technique = AdaptiveAttention(attention_type="dynamic_sparse", mechanisms={"dynamic_sparse": {"min_blocks": 9}})
    dynamic.apply(model)
    technique.apply(model)
    settings = [module.attention_settings for module in model.modules() if hasattr(module, "attention_settings")]
    assert all(own[DYNAMIC].min_blocks == 9 and NAME in own for own in settings)
    with pytest.raises(ValueError, match="already applied"):
        technique.apply(model)
    copied = copy.deepcopy(model)
    assert torch.equal(copied(**inputs).logits, model(**inputs).logits)
    technique.revert(model)
    settings = [module.attention_settings for module in model.modules() if hasattr(module, "attention_settings")]
    assert settings and all(own == {DYNAMIC: DynamicSparseSettings(min_blocks=3)} for own in settings)
    dynamic.revert(model)
    technique.revert(model)  # once more does nothing
    assert torch.equal(model(**inputs).logits, before)
    assert not any(hasattr(module, "attention_settings") for module in model.modules())


def test_a_failed_apply_changes_nothing():
    model = make_pair("dense").ours
    technique = AdaptiveAttention(layers={3: {"decode": "flash"}})
    with pytest.raises(ValueError, match="decode in layer 3, but the model has 3") as error:
        technique.apply(model)
    one_line(error.value)
    assert model.config._attn_implementation == "sdpa"
    assert not any(hasattr(module, "attention_settings") for module in model.modules())


def test_trains():
    pair = make_pair("dense")
    inputs = make_inputs(["text:5", "image:4x6", "text:3"])
    pair.ours.set_attn_implementation(NAME)
    gradients = []
    for model in (pair.stock, pair.ours):
        model.zero_grad()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        gradients.append(model.model.language_model.layers[0].self_attn.q_proj.weight.grad)
    assert_matches(gradients[1], gradients[0].double(), 1e-5)


def test_dense_masks_go_to_the_mechanism():
    case = AttentionCase(batch=2, padding="left")
    tensors, mask = inputs_of(case), dense_mask_of(AttentionCase(batch=2, padding="left"))
    output, _ = adaptive_attention_forward(module_with(), *tensors, mask, scaling=case.scaling)
    assert_matches(output, dense_reference(*tensors, mask))
    with pytest.raises(ValueError, match=r"qwen3_vl_dynamic_sparse.*dense mask"):
        adaptive_attention_forward(module_with(prefill=DYNAMIC), *tensors, mask, scaling=case.scaling)


def test_weights_are_refused():
    case = AttentionCase()
    with pytest.raises(ValueError, match="qwen3_vl_adaptive") as error:
        adaptive_attention_forward(module_with(), *inputs_of(case), layout_of(case), output_attentions=True)
    one_line(error.value)


def test_round_trip_through_json():
    settings = AdaptiveSettings(
        prefill=[[0, "flash"], [4096, "dynamic_sparse"]],
        layers={2: {"decode": "memory_efficient"}, 0: {"prefill": [[0, "flash"], [9, "sparse"]]}},
        mechanisms={"dynamic_sparse": {"threshold": 0.8}, "sparse": {"window_tokens": 64}},
    )
    again = AdaptiveSettings(**json.loads(json.dumps(settings.to_dict())))
    assert again == settings and again.rules("prefill", 0) == ((0, EXACT), (9, BLOCKS))
    assert again.rules("prefill", 1) == ((0, EXACT), (4096, DYNAMIC))
    assert again.mechanisms[DYNAMIC] == DynamicSparseSettings(threshold=0.8)
    technique = AdaptiveAttention(**settings.to_dict())
    assert technique.options == settings and not technique.exact
    assert AdaptiveAttention().options == AdaptiveSettings() and AdaptiveAttention().exact
    assert AdaptiveSettings(**technique.options.to_dict()) == settings


def test_rules_beat_the_type():
    options = AdaptiveAttention(attention_type="dynamic_sparse", decode="flash").options
    assert (options.vision, options.prefill, options.decode) == (((0, EXACT),), ((0, DYNAMIC),), ((0, EXACT),))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attention_type": "flsh"}, "did you mean 'flash'"),
        ({"attention_type": "adaptive"}, "cannot pick itself"),
        ({"decode": "dynamic_sprase"}, "did you mean 'dynamic_sparse'"),
        ({"vision": "sparse"}, "nothing of its own in vision"),
        ({"prefill": []}, "prefill takes rules"),
        ({"prefill": [[0]]}, "prefill takes rules"),
        ({"prefill": [["0", "flash"]]}, "prefill takes rules"),
        ({"prefill": 7}, "prefill takes rules"),
        ({"prefill": [[5, "flash"]]}, "must begin at 0"),
        ({"prefill": [[0, "flash"], [9, "sparse"], [9, "flash"]]}, "must begin at 0 keys and rise"),
        ({"layers": {-1: {"decode": "flash"}}}, "numbered from 0"),
        ({"layers": {"a": {"decode": "flash"}}}, "numbered from 0"),
        ({"layers": {0: {"decoding": "flash"}}}, "did you mean 'decode'"),
        ({"layers": {0: "flash"}}, "takes {phase: rules}"),
        ({"mechanisms": {"sparse": {"window": 3}}}, "no setting 'window'"),
        ({"mechanisms": {"sparse": {"window_tokens": 0}}}, "window_tokens"),
        ({"mechanisms": {"sparse": 3}}, "must be a dictionary"),
        ({"mechanisms": {"adaptive": {}}}, "no settings among"),
        ({"prefil": "flash"}, "no setting 'prefil'"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message) as error:
        AdaptiveAttention(**settings)
    one_line(error.value)


def test_describe():
    model = make_pair("dense").ours
    told = AdaptiveAttention(prefill=[[0, "flash"], [4096, "sparse"]], layers={1: {"decode": CHUNKS}}).describe(model)
    assert told.splitlines() == [
        "vision, blocks 0-2: qwen3_vl_exact",
        "prefill, layers 0-2: qwen3_vl_exact, from 4096 keys qwen3_vl_block_sparse (lossy)",
        "decode, layers 0-0: qwen3_vl_exact",
        "decode, layers 1-1: qwen3_vl_memory_efficient",
        "decode, layers 2-2: qwen3_vl_exact",
    ]


# --- The timing run. ---


def slow_by_keys(forward, milliseconds, clock):
    """A mechanism that takes `milliseconds(keys)` of a clock that stands still otherwise."""

    def run(module, query, key, value, attention_mask, **kwargs):
        clock.now += milliseconds(key.shape[2]) / 1e3
        return forward(module, query, key, value, attention_mask, **kwargs)

    return run


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    """Exact takes 1 ms a call, chunks 0.5 ms from 64 keys on and 2 ms below, dynamic sparse nearly nothing."""
    clock = Clock()
    times = {EXACT: lambda _: 1.0, CHUNKS: lambda keys: 0.5 if keys >= 64 else 2.0, DYNAMIC: lambda _: 0.01}
    for name, milliseconds in times.items():
        monkeypatch.setitem(FORWARDS, name, slow_by_keys(FORWARDS[name], milliseconds, clock))
    return clock


def test_rules_follow_the_medians(clock):
    run = measure_mechanisms(SHAPES, lengths=(16, 64, 32), seconds=0.5, clock=clock)
    rules = [[0, EXACT], [64, CHUNKS]]
    assert run["rules"] == {"vision": rules, "prefill": rules, "decode": rules}
    assert list(run["timings_ms"]["decode"]) == ["16", "32", "64"]
    assert run["timings_ms"]["prefill"]["64"] == pytest.approx({EXACT: 1.0, CHUNKS: 0.5})


def test_lossy_mechanisms_are_picked_only_if_named(clock):
    run = measure_mechanisms(SHAPES, mechanisms=["flash", "dynamic_sparse"], lengths=[16], seconds=0.1, clock=clock)
    assert run["rules"]["decode"] == [[0, DYNAMIC]] and run["rules"]["vision"] == [[0, EXACT]]
    assert DYNAMIC not in run["timings_ms"]["vision"]["16"]
    settings = AdaptiveSettings(**run["rules"], mechanisms=run["mechanisms"])
    assert settings.mechanisms[DYNAMIC] == DynamicSparseSettings()


def test_time_is_held(clock):
    run = measure_mechanisms(SHAPES, lengths=(16, 32, 64), seconds=0.02, clock=clock)
    assert all("16" in cells for cells in run["timings_ms"].values())
    assert sum(len(cells) for cells in run["timings_ms"].values()) < 9
    # The shortest lengths take 12 ms a phase, whatever time was given.
    assert clock.now < 0.06


def test_small_gains_change_nothing():
    cells = {16: {"a": 1.0, "b": 1.5}, 32: {"a": 1.0, "b": 0.97}, 64: {"a": 2.0, "b": 1.0}, 128: {"a": 3.9, "b": 4.0}}
    assert rules_from_timings(cells) == [[0, "a"], [64, "b"]]


@pytest.mark.parametrize("paged", [False, True])
def test_measures_writes_and_reads_back(tmp_path, monkeypatch, paged):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = make_pair("dense").ours
    every = ["flash", "memory_efficient", "sparse", "dynamic_sparse"]
    settings = AdaptiveAttention.measure(model, mechanisms=every, lengths=[32, 96], seconds=0.3, paged=paged)
    file = tmp_path / "qwen3_vl" / "attention_timing.json"
    (run,) = json.loads(file.read_text())["attention_timing"].values()
    assert run["shapes"]["vision"] == {
        "heads": 2, "kv_heads": 2, "head_dim": 16, "dtype": "float32", "device": "cpu",
    }  # fmt: skip
    assert set(run["timings_ms"]["prefill"]["32"]) == {EXACT, CHUNKS, BLOCKS, DYNAMIC}
    assert all(ms > 0 for cells in run["timings_ms"].values() for cell in cells.values() for ms in cell.values())
    assert AdaptiveSettings.from_timing() == AdaptiveSettings.from_timing(file, model) == settings
    technique = AdaptiveAttention(**settings.to_dict())
    technique.apply(model)
    model(**make_inputs(["text:9"]))


def test_one_file_for_several_shapes(tmp_path, clock):
    file = tmp_path / "deep" / "timing.json"
    small = {"decoder": AttentionShape(2, 1, 8, torch.bfloat16)}
    for shapes in (SHAPES, small, SHAPES):
        save_timing(measure_mechanisms(shapes, lengths=[16], seconds=0.01, clock=clock), file)
    assert len(json.loads(file.read_text())["attention_timing"]) == 2
    with pytest.raises(ValueError, match=r"holds 2 runs.*pass the model"):
        AdaptiveSettings.from_timing(file)
    assert AdaptiveSettings.from_timing(file, small).decode == ((0, EXACT),)
    assert load_timing(file, small)["shapes"]["decoder"]["dtype"] == "bfloat16"
    with pytest.raises(ValueError, match="none of this processor"):
        AdaptiveSettings.from_timing(file, {"decoder": AttentionShape(8, 1, 8)})
    assert [path.name for path in file.parent.iterdir()] == ["timing.json"]


def test_a_run_of_another_processor_is_refused(tmp_path, monkeypatch, clock):
    file = tmp_path / "timing.json"
    save_timing(measure_mechanisms(SHAPES, lengths=[16], seconds=0.01, clock=clock), file)
    monkeypatch.setattr(attention_timing, "processor_name", lambda: "another")
    with pytest.raises(ValueError, match="none of this processor") as error:
        AdaptiveSettings.from_timing(file)
    one_line(error.value)


def test_bad_timing_files(tmp_path, clock):
    with pytest.raises(FileNotFoundError, match="make one with"):
        AdaptiveSettings.from_timing(tmp_path / "nothing.json")
    run = measure_mechanisms(SHAPES, lengths=[16], seconds=0.01, clock=clock)
    for index, text in enumerate(("{", "[]", '{"attention_timing": {"a": 3}}', '{"mine": 1}')):
        file = tmp_path / f"{index}.json"
        file.write_text(text)
        with pytest.raises(ValueError, match="is no timing file") as error:
            AdaptiveSettings.from_timing(file)
        one_line(error.value)
        with pytest.raises(ValueError, match="is no timing file"):
            save_timing(run, file)
        assert file.read_text() == text  # what is not ours stays


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mechanisms": ["flush"]}, "no attention mechanism 'flush'"),
        ({"mechanisms": ["adaptive"]}, "picks among the others"),
        ({"mechanisms": {"sparse": {"windows": 1}}}, "no setting 'windows'"),
        ({"lengths": []}, "counts of tokens"),
        ({"lengths": [0]}, "counts of tokens"),
        ({"seconds": 0}, "seconds must be above 0"),
        ({"shapes_or_model": {"text": SHAPES["decoder"]}}, "under 'decoder' or 'vision'"),
        ({"shapes_or_model": {}}, "under 'decoder' or 'vision'"),
        ({"shapes_or_model": {"decoder": (4, 2, 16)}}, "must hold an AttentionShape"),
    ],
)
def test_bad_measurements(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        AdaptiveAttention.measure(**{"shapes_or_model": SHAPES, "path": tmp_path / "t.json", **arguments})
    one_line(error.value)


@pytest.mark.parametrize(
    ("shape", "message"),
    [((4, 3, 16), "no multiple"), ((0, 1, 16), "heads must be"), ((4, 2, 16, "float17"), "no dtype 'float17'")],
)
def test_bad_shapes(shape, message):
    with pytest.raises(ValueError, match=message):
        AttentionShape(*shape)


def test_default_of_valid_rows_equals_stock(kind):
    pair = make_pair(kind)
    inputs = make_inputs(["text:5", "image:4x6", "text:3"], ["text:4", "video:2x4x4"], ["text:11"])
    pair.ours.set_attn_implementation(NAME)
    keep = valid_positions(inputs)
    with torch.no_grad():
        assert_matches(pair.ours(**inputs).logits[keep], pair.stock(**inputs).logits[keep].double(), 1e-4)
