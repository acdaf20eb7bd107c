"""The tower in groups of frames: equal to all at once, and with less memory."""

import pytest
import torch
from helpers import assert_close, make_inputs, make_pair, our_class, stock_forward
from live_tensors import LiveTensors

from qwen3_vl import ChunkedVision, VisionFeatureCache
from qwen3_vl.optim.orchestrator_optim import apply_profile
from qwen3_vl.optim.registry_optim import TECHNIQUES


LAYOUT = ["text:3", "image:4x6", "text:2", "image:8x4", "video:5x4x4", "text:4", "image:2x2"]


@pytest.fixture
def applied(pair):
    technique = ChunkedVision(max_patches=40)
    technique.apply(pair.ours)
    yield pair
    technique.revert(pair.ours)


@pytest.mark.parametrize("max_patches", [1, 16, 40, 100, 10**6])
def test_equal_to_all_at_once(pair, max_patches):
    tower, inputs = pair.ours.model.visual, make_inputs(LAYOUT)
    with torch.no_grad():
        expected = tower(inputs["pixel_values"], inputs["image_grid_thw"])
        video = tower(inputs["pixel_values_videos"], inputs["video_grid_thw"])
        technique = ChunkedVision(max_patches=max_patches)
        technique.apply(pair.ours)
        for given, wanted in (
            (tower(inputs["pixel_values"], inputs["image_grid_thw"]), expected),
            (tower(inputs["pixel_values_videos"], inputs["video_grid_thw"]), video),
        ):
            assert type(given) is type(wanted)
            assert_close(given.last_hidden_state, wanted.last_hidden_state, 1e-5)
            assert_close(given.pooler_output, wanted.pooler_output, 1e-5)
            for level, stock in zip(given.deepstack_features, wanted.deepstack_features, strict=True):
                assert_close(level, stock, 1e-5)
        technique.revert(pair.ours)
        again = tower(inputs["pixel_values"], inputs["image_grid_thw"])
    assert "forward" not in vars(tower)
    assert torch.equal(again.pooler_output, expected.pooler_output)


def test_whole_model_and_generation(applied):
    inputs = make_inputs(LAYOUT)
    with torch.no_grad():
        assert_close(applied.ours(**inputs).logits, stock_forward(applied.stock, **inputs).logits, 1e-5)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    ours = applied.ours.generate(**inputs, **options, prefill_chunk_size=7)
    assert torch.equal(ours, applied.stock.generate(**inputs, **options))


def test_beside_the_vision_feature_cache(applied):
    """What is encoded in groups is kept and found like what is encoded at once."""
    inputs, options = make_inputs(LAYOUT), {"max_new_tokens": 4, "do_sample": False}
    expected = applied.ours.generate(**inputs, **options)
    features = VisionFeatureCache()
    features.apply(applied.ours)
    try:
        answers = [applied.ours.generate(**make_inputs(LAYOUT), **options) for _ in range(2)]
    finally:
        features.revert(applied.ours)
    assert all(torch.equal(answer, expected) for answer in answers)
    assert (features.statistics().hits, features.statistics().misses) == (4, 4)


def test_gradients(applied):
    tower, inputs = applied.ours.model.visual, make_inputs(LAYOUT)
    pixels, grids = inputs["pixel_values"], inputs["image_grid_thw"]
    weight = tower.patch_embed.proj.weight
    (chunked,) = torch.autograd.grad(tower(pixels, grids).pooler_output.square().sum(), weight)
    del tower.forward
    (whole,) = torch.autograd.grad(tower(pixels, grids).pooler_output.square().sum(), weight)
    assert_close(chunked, whole, 1e-4 * whole.abs().max().item())


def test_tuples(applied):
    tower, inputs = applied.ours.model.visual, make_inputs(LAYOUT)
    given = tower(inputs["pixel_values"], inputs["image_grid_thw"], return_dict=False)
    assert isinstance(given, tuple) and len(given[0]) == len(inputs["pixel_values"])


def test_memory_inside_of_the_tower_falls():
    config = {"vision": {"hidden_size": 64, "intermediate_size": 256, "depth": 2, "deepstack_visual_indexes": [0]}}
    model = make_pair("dense", **config).ours
    inputs = make_inputs(["text:1", "video:24x8x8"])

    def peak():
        with LiveTensors([*model.parameters(), *model.buffers(), *inputs.values()]) as live, torch.no_grad():
            model.model.visual(inputs["pixel_values_videos"], inputs["video_grid_thw"])
        return live.peak

    whole = peak()
    ChunkedVision(max_patches=128).apply(model)
    assert peak() < 0.4 * whole


def test_errors_are_the_towers_own(applied):
    tower, inputs = applied.ours.model.visual, make_inputs(LAYOUT)
    with pytest.raises(ValueError, match="pass pixels and grids of the same processor call"):
        tower(inputs["pixel_values"][:-4], inputs["image_grid_thw"])
    for name in ("output_hidden_states", "output_attentions"):
        with pytest.raises(ValueError, match=f"{name}=True was asked of a vision tower"):
            tower(inputs["pixel_values"], inputs["image_grid_thw"], **{name: True})


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"max_patches": 0}, "at least 1, got 0"), ({"max_patches": 2.5}, "whole number"), ({"size": 3}, "no setting")],
)
def test_bad_settings(settings, words):
    with pytest.raises(ValueError, match=words):
        ChunkedVision(**settings)


def test_twice_and_without_a_tower(applied):
    with pytest.raises(ValueError, match="already replaced"):
        ChunkedVision().apply(applied.ours)
    with pytest.raises(ValueError, match="has no vision tower"):
        ChunkedVision().apply(torch.nn.Linear(2, 2))


def test_a_profile_names_it(kind):
    model = our_class(kind, "ForConditionalGeneration")(make_pair(kind).ours.config)
    model.config.optim = {"chunked_vision": {"max_patches": 64}}
    assert TECHNIQUES["chunked_vision"] is ChunkedVision
    (technique,) = apply_profile(model)
    assert technique.settings == {"max_patches": 64}
    assert "forward" in vars(model.model.visual)
