"""Every two techniques of the registry: they run together, in either order, or exclude each other by name."""

import functools
import itertools

import pytest
import torch
from helpers import make_inputs, make_pair

from qwen3_vl.optim.orchestrator_optim import UnifiedOptimizationManager
from qwen3_vl.optim.registry_optim import TECHNIQUES
from qwen3_vl.optim.technique_order import conflict


# So small that each technique has something to do on a prompt of some forty tokens.
SPARSE = {
    "query_block": 8,
    "key_block": 8,
    "stride": 4,
    "min_blocks": 1,
    "window_tokens": 4,
    "min_pages": 1,
    "page_tokens": 8,
    "dense_below_tokens": 0,
}
BUDGET = {"threshold": [0.5, 0.7, 0.9, 0.6], "decode_share": [0.5, 0.7]}
SETTINGS = {
    "adaptive_sparse": {"budgets": {str(layer): BUDGET for layer in range(3)}, **SPARSE},
    "adaptive_precision": {"bits": 4, "group_size": 32, "originals": "keep"},
    "chunked_vision": {"max_patches": 32},
    "compiled_decode": {"backend": "eager", "bucket_tokens": 64},
    "cross_layer_cache": {"residual_tokens": 4, "min_similarity": 0.0, "page_tokens": 8},
    "evicting_cache": {"window_tokens": 4, "observation_tokens": 4, "slack_tokens": 4, "page_tokens": 8},
    "kv_caching": {"cache": "paged"},
    "layer_recycling": {"groups": [[1, 2]], "rank": 4},
    "learned_routing": {"blocks": [1]},
    "paged_cache": {"page_tokens": 8},
    "power_management": {"cpu_share": 1.0},
    "prefix_cache": {"page_tokens": 8},
    "quantized_cache": {"group_size": 32, "residual_tokens": 32},
    "qwen3_vl_block_sparse": {"sink_tokens": 2, "window_tokens": 8, "query_block": 8, "key_block": 8},
    "qwen3_vl_dynamic_sparse": SPARSE,
    "tiered_cache": {"segment_tokens": 32, "hot_tokens": 64, "int8_tokens": 0},
    "token_merging": {"keep_ratio": 0.5},
}
GREEDY = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
PAIRS = list(itertools.combinations(sorted(TECHNIQUES), 2))
# Widths that packed weights and heads of our kernels fit.
TEXT = {"hidden_size": 64, "intermediate_size": 128}
VISION = {"hidden_size": 64, "intermediate_size": 96, "out_hidden_size": 64}


@functools.cache
def plain(kind):
    """A model, a prompt with a picture and a short video, and what the model makes of it."""
    # One sparse layer, so that layers of equal shape are there to share weights.
    text = TEXT | ({"mlp_only_layers": [1, 2]} if kind == "moe" else {})
    model = make_pair(kind, text=text, vision=VISION).ours
    inputs = make_inputs(["text:9", "image:12x12", "text:8", "video:2x4x4", "text:50"])
    inputs["pixel_values"][:64] = 0.5  # flat, as paper
    return model, inputs, answer(model, inputs)


def answer(model, inputs):
    """Greedy tokens, and the logits they were chosen by."""
    output = model.generate(**inputs, **GREEDY, return_dict_in_generate=True, output_logits=True)
    return output.sequences, torch.stack(output.logits)


def made(name):
    return TECHNIQUES[name](**SETTINGS.get(name, {}))


def run(model, inputs, *names):
    """The answers to a prompt and to the same once more, with techniques on that are new."""
    manager = UnifiedOptimizationManager(model, {name: SETTINGS.get(name, {}) for name in names})
    with manager:
        on = {technique.name: technique for technique in manager.techniques}
        assert sorted(on) == sorted(names)
        answers = answer(model, inputs), answer(model, inputs)
        if "compiled_decode" in on:
            assert on["compiled_decode"].step.steps and on["compiled_decode"].step.failure is None
    return answers


def same(first, second, tolerance=0.0):
    return torch.equal(first[0], second[0]) and (first[1] - second[1]).abs().max() <= tolerance


@pytest.fixture(autouse=True)
def _compiled_from_scratch(request):
    """Each model is a graph of its own, and few may be compiled of one function."""
    if "compiled_decode" in request.node.name:
        torch._dynamo.reset()


def cases(rows):
    """Test parameters; compiling takes seconds."""
    return [pytest.param(*row, marks=pytest.mark.slow if "compiled_decode" in row else ()) for row in rows]


@pytest.mark.parametrize("name", cases((name,) for name in sorted(TECHNIQUES)))
def test_alone(name):
    """Exact ones give the plain model's logits; lossy ones do something with the settings that they have here."""
    model, inputs, expected = plain("moe" if name == "grouped_experts" else "dense")
    answers, _ = run(model, inputs, name)
    assert answers[1].isfinite().all()
    # On this machine the best choice for prompts as short as that is exact.
    exact = made(name).exact or name == "qwen3_vl_adaptive"
    assert same(answers, expected, 1e-4) == exact
    assert same(answer(model, inputs), expected)


@pytest.mark.parametrize(("first", "second"), cases(PAIRS))
def test_pair(first, second):
    """Exact ones give the plain model's tokens; lossy ones what they give in the other order; nothing stays behind."""
    kind = "moe" if "grouped_experts" in (first, second) else "dense"
    model, inputs, expected = plain(kind)
    pair = made(first), made(second)
    if conflict(*pair) is not None:
        with pytest.raises(ValueError, match=f"{first} and {second} exclude each other"):
            UnifiedOptimizationManager(model, {name: SETTINGS.get(name, {}) for name in (first, second)})
        return
    exact = all(technique.exact for technique in pair)
    answers, again = run(model, inputs, first, second)
    reverse, _ = run(model, inputs, second, first)
    assert same(answers, reverse)
    # What a prefix was kept of is not computed again; lossy attention sees other blocks then.
    if exact or "prefix_cache" not in (first, second):
        assert same(answers, again, 1e-4)
    if exact:
        assert same(answers, expected, 1e-4)
    assert same(answer(model, inputs), expected)
