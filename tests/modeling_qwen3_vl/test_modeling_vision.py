"""The vision tower against its plain definition, and what its pictures may know of each other."""

import pytest
import torch
from helpers import (
    MERGE,
    PATCH_WIDTH,
    assert_close,
    make_pair,
    slow_position_table,
    slow_vision_tower,
)


# Smaller than, equal to, larger than the 6 x 6 table, long strips, and videos.
GRIDS = [
    [[1, 2, 2]],
    [[1, 4, 6]],
    [[1, 6, 6]],
    [[1, 14, 10]],
    [[1, 2, 24], [1, 24, 2]],
    [[3, 4, 4]],
    [[1, 4, 6], [2, 6, 4], [1, 2, 8], [1, 4, 6]],
]


def make_pixels(grids, seed=0):
    grids = torch.tensor(grids)
    rows = int(grids.prod(-1).sum())
    return torch.randn(rows, PATCH_WIDTH, generator=torch.Generator().manual_seed(seed)), grids


def tower_state(model):
    prefix = "model.visual."
    return {name[len(prefix) :]: value for name, value in model.state_dict().items() if name.startswith(prefix)}


def run_tower(model, pixels, grids, **options):
    return model.model.visual(pixels, grid_thw=grids, **options)


@pytest.mark.parametrize("grids", GRIDS, ids=str)
@torch.no_grad()
def test_against_stock(pair, grids):
    pixels, grids = make_pixels(grids)
    expected = run_tower(pair.stock, pixels, grids)
    actual = run_tower(pair.ours, pixels, grids)
    assert_close(actual.last_hidden_state, expected.last_hidden_state, what="last hidden state")
    assert_close(actual.pooler_output, expected.pooler_output, what="merged features")
    for ours, stock in zip(actual.deepstack_features, expected.deepstack_features, strict=True):
        assert_close(ours, stock, what="DeepStack features")


@pytest.mark.parametrize("grids", GRIDS, ids=str)
@torch.no_grad()
def test_against_the_plain_definition(grids):
    pair = make_pair("dense")
    pixels, grids = make_pixels(grids)
    hidden, merged, deep = slow_vision_tower(tower_state(pair.ours), pair.config_dict["vision_config"], pixels, grids)
    actual = run_tower(pair.ours, pixels, grids)
    # The definition runs in float64, so this holds the float32 error of a whole tower.
    assert_close(actual.last_hidden_state, hidden, 3e-5, "last hidden state")
    assert_close(actual.pooler_output, merged, 3e-5, "merged features")
    for ours, slow in zip(actual.deepstack_features, deep, strict=True):
        assert_close(ours, slow, 3e-5, "DeepStack features")


@pytest.mark.parametrize("height, width", [(2, 2), (2, 6), (6, 6), (8, 4), (12, 10), (30, 2), (40, 36)])
@torch.no_grad()
def test_position_table(height, width):
    """A tower without layers, fed with zeros, gives back the resampled table."""
    pair = make_pair("dense", vision={"depth": 0, "deepstack_visual_indexes": []})
    pixels, grids = torch.zeros(2 * height * width, PATCH_WIDTH), torch.tensor([[2, height, width]])
    tables = []
    for model in (pair.ours, pair.stock):
        model.model.visual.patch_embed.proj.bias.zero_()
        tables.append(run_tower(model, pixels, grids).last_hidden_state)
    slow = slow_position_table(pair.stock.model.visual.pos_embed.weight.double(), height, width)
    assert_close(tables[0], torch.cat([slow, slow]), 1e-5, "our table and its definition")
    assert_close(tables[0], tables[1], 1e-6, "our table and stock's")


@torch.no_grad()
def test_the_table_itself_at_its_own_size():
    pair = make_pair("dense", vision={"depth": 0, "deepstack_visual_indexes": []})
    visual = pair.ours.model.visual
    visual.patch_embed.proj.bias.zero_()
    states = run_tower(pair.ours, torch.zeros(36, PATCH_WIDTH), torch.tensor([[1, 6, 6]])).last_hidden_state
    blocks = visual.pos_embed.weight.view(3, MERGE, 3, MERGE, -1).transpose(1, 2).reshape(36, -1)
    assert_close(states, blocks, 1e-6, "the table and its resampling to its own size")


@pytest.mark.parametrize("seed", range(3))
@torch.no_grad()
def test_pictures_do_not_see_each_other(pair, seed):
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 5, (4, 3), generator=generator).tolist()
    grids = [[1 + t % 3, 2 * h, 2 * w] for t, h, w in sizes]
    pixels, grids = make_pixels(grids, seed)
    parts = pixels.split(grids.prod(-1).tolist())
    together = run_tower(pair.ours, pixels, grids)
    merged = together.pooler_output.split((grids.prod(-1) // MERGE**2).tolist())
    deep = together.deepstack_features[1].split((grids.prod(-1) // MERGE**2).tolist())
    for index, part in enumerate(parts):
        alone = run_tower(pair.ours, part, grids[index : index + 1])
        assert_close(merged[index], alone.pooler_output, 1e-5, "features in company and alone")
        assert_close(deep[index], alone.deepstack_features[1], 1e-5, "DeepStack features in company and alone")
    order = torch.randperm(4, generator=generator)
    permuted = run_tower(pair.ours, torch.cat([parts[i] for i in order]), grids[order])
    assert_close(permuted.pooler_output, torch.cat([merged[i] for i in order]), 1e-5, "features in another order")


@torch.no_grad()
def test_frames_do_not_see_each_other(pair):
    pixels, grids = make_pixels([[3, 4, 6]])
    changed = pixels.clone()
    changed[24:48] += 1.0
    first = run_tower(pair.ours, pixels, grids).pooler_output.view(3, 6, -1)
    second = run_tower(pair.ours, changed, grids).pooler_output.view(3, 6, -1)
    assert_close(first[[0, 2]], second[[0, 2]], 1e-5, "frames beside a changed one")
    assert (first[1] - second[1]).abs().max() > 1e-2


@torch.no_grad()
def test_a_picture_is_a_video_of_one_frame(pair):
    pixels, grids = make_pixels([[1, 4, 6]])
    image = pair.ours.get_image_features(pixels, grids, return_dict=True)
    video = pair.ours.get_video_features(pixels, grids, return_dict=True)
    assert torch.equal(torch.cat(image.pooler_output), torch.cat(video.pooler_output))


@torch.no_grad()
def test_states_and_weights_of_all_layers(kind):
    pair = make_pair(kind, attn="eager")
    pixels, grids = make_pixels([[1, 4, 6], [2, 2, 4]])
    options = {"output_hidden_states": True, "output_attentions": True}
    expected = run_tower(pair.stock, pixels, grids, **options)
    actual = run_tower(pair.ours, pixels, grids, **options)
    assert len(actual.hidden_states) == len(expected.hidden_states)
    for ours, stock in zip(actual.hidden_states, expected.hidden_states, strict=True):
        assert_close(ours, stock, what="hidden states")
    assert (actual.attentions is None) == (expected.attentions is None)


@torch.no_grad()
def test_tower_alone(kind):
    """`Qwen3VLVisionModel` on its own, from a vision config."""
    pair = make_pair(kind)
    tower = type(pair.ours.model.visual)(pair.ours.config.vision_config).eval()
    tower.load_state_dict(tower_state(pair.stock), strict=True)
    pixels, grids = make_pixels([[1, 4, 6]])
    expected = run_tower(pair.stock, pixels, grids)
    assert_close(tower(pixels, grid_thw=grids).pooler_output, expected.pooler_output, what="merged features")


@pytest.mark.parametrize("grid_dtype", [torch.int32, torch.int64])
@torch.no_grad()
def test_grid_dtypes(pair, grid_dtype):
    pixels, grids = make_pixels([[2, 4, 6]])
    expected = run_tower(pair.ours, pixels, grids).pooler_output
    assert_close(run_tower(pair.ours, pixels, grids.to(grid_dtype)).pooler_output, expected, 0.0)


@torch.no_grad()
def test_half_precision_pixels_are_cast(pair):
    pixels, grids = make_pixels([[1, 4, 6]])
    half = pixels.half()
    expected = pair.stock.get_image_features(half, grids, return_dict=True).pooler_output[0]
    actual = pair.ours.get_image_features(half, grids, return_dict=True).pooler_output[0]
    assert_close(actual, expected, what="features of half-precision pixels")
