"""Two conversations on one model, stepped alternately or in two threads, with every cache: each as it is alone.

Stock keeps the M-RoPE delta of the last request on the model, so that there the second conversation moves the first
one's positions.
"""

import copy
import threading
from functools import partial

import pytest
import torch
from helpers import make_inputs, make_pair
from transformers import DynamicCache, StaticCache

from qwen3_vl.modeling_qwen3_vl.mrope_qwen3_vl import next_positions_seen
from qwen3_vl.optim.registry_optim import TECHNIQUES
from qwen3_vl.optim.technique_optim import Technique


# Small enough for the conversations below to be packed, merged, evicted from and moved. Others as they are by default.
SETTINGS = {
    "paged_cache": [{"page_tokens": 4}],
    "quantized_cache": [{"bits": 4, "group_size": 32, "residual_tokens": 8}],
    "cross_layer_cache": [{"page_tokens": 4, "residual_tokens": 3, "min_similarity": 0.0}],
    "evicting_cache": [
        {"visual_share": 0.25, "sink_tokens": 2, "window_tokens": 4},
        {"policy": "snapkv", "max_tokens": 40, "window_tokens": 8, "observation_tokens": 8, "slack_tokens": 4},
    ],
    "tiered_cache": [{"segment_tokens": 64, "hot_tokens": 128, "int8_tokens": 64, "int4_tokens": 64}],
    "kv_caching": [{"cache": "int8"}],
}
LAYOUTS = (
    (["text:3", "image:8x12", "text:60"], ["text:5", "image:4x6", "text:60"], ["text:70"]),
    (["text:80"], ["text:2", "video:2x4x8", "text:50"], ["image:8x8", "text:40"]),
)
STEPS = 4


def cache_makers():
    """Every cache there is: stock's, and what the techniques of the registry make."""
    makers = {
        "dynamic": lambda model: DynamicCache(config=model.config),
        "static": lambda model: StaticCache(config=model.config, max_cache_len=400),
    }
    for name, technique in TECHNIQUES.items():
        if technique.make_cache is Technique.make_cache:
            continue
        for number, settings in enumerate(SETTINGS.get(name, [{}])):
            makers[f"{name}_{number}"] = partial(make_with, technique, settings)
    return makers


def make_with(technique, settings, model):
    cache = technique(**settings).make_cache(model, 1, 400)
    return DynamicCache(config=model.config) if cache is None else cache


MAKERS = cache_makers()


@pytest.fixture(scope="module", params=["sdpa", "qwen3_vl_exact"])
def model(request):
    model = make_pair("dense", text={"num_hidden_layers": 4}).ours
    model.set_attn_implementation(request.param)
    return model


@torch.no_grad()
def talk(model, cache, number):
    """Yields the logits of every step: turns with text and pictures, and tokens that the model chooses between."""
    for turn, layout in enumerate(LAYOUTS[number]):
        inputs = make_inputs(layout, seed=10 * number + turn)
        logits = model(**inputs, past_key_values=cache).logits[:, -1]
        yield logits
        for _ in range(STEPS):
            logits = model(input_ids=logits.argmax(-1)[:, None], past_key_values=cache).logits[:, -1]
            yield logits


def alone(model, make):
    conversations = [list(talk(model, make(model), number)) for number in range(len(LAYOUTS))]
    assert len({len(steps) for steps in conversations}) == 1
    return conversations


def assert_same(found, expected):
    for number, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        for step, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            assert torch.equal(one, other), f"conversation {number} differs from its own at step {step}"


@pytest.mark.parametrize("name", MAKERS)
def test_stepped_alternately(model, name):
    expected = alone(model, MAKERS[name])
    talks = [talk(model, MAKERS[name](model), number) for number in range(len(LAYOUTS))]
    found = [list(steps) for steps in zip(*zip(*talks, strict=True), strict=True)]
    assert_same(found, expected)


@pytest.mark.parametrize("name", MAKERS)
def test_in_two_threads(model, name):
    expected = alone(model, MAKERS[name])
    together, found = threading.Barrier(len(LAYOUTS)), {}

    def work(number):
        found[number] = []
        try:
            for logits in talk(model, MAKERS[name](model), number):
                found[number].append(logits)
                together.wait(timeout=60)  # so that every step begins in both at once
        except BaseException:
            together.abort()
            raise

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(LAYOUTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_same([found[number] for number in range(len(LAYOUTS))], expected)


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "static"])
def test_a_copy_goes_its_own_way(model, name):
    """A conversation is copied in its middle; what the copy is told does not reach the original."""
    cache = MAKERS[name](model)
    with torch.no_grad():
        model(**make_inputs(LAYOUTS[0][0]), past_key_values=cache)
    expected = [*talk(model, copy.deepcopy(cache), 1)]
    other = copy.deepcopy(cache)
    mixed = zip(talk(model, cache, 1), talk(model, other, 0), strict=True)
    assert_same([[step for step, _ in mixed]], [expected])


@pytest.mark.parametrize("name", MAKERS)
def test_positions_move_with_the_rows_once(model, name):
    """The three rows come differently far, so that a note that stayed or moved twice is a wrong one."""
    if isinstance(MAKERS[name](model), StaticCache):
        pytest.skip("static caches do not move rows by number")
    inputs = make_inputs(["image:4x6", "text:9"], ["text:4", "image:8x8"], ["text:12"])
    order = torch.tensor([2, 0, 1])
    for move in ("reorder_cache", "batch_select_indices"):
        cache = MAKERS[name](model)
        with torch.no_grad():
            model(**inputs, past_key_values=cache)
        before = next_positions_seen(cache)
        assert len(before) == 3
        getattr(cache, move)(order)
        assert torch.equal(next_positions_seen(cache), before[order]), move
