"""Repeated frames and flat areas taken out before the vision tower."""

import pytest
import torch
from helpers import PATCH_WIDTH, assert_close, make_inputs, make_pair, max_difference
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_vl import RepeatedPatchRemoval
from qwen3_vl.optim.tokens.repeated_patches import flat_blocks, unique_frames


@pytest.fixture
def tower():
    return make_pair().ours.model.visual


def page(height, width, text_rows=2, seed=0):
    """Pixels (patches, width) of a page: `text_rows` rows of squares are written on, the rest is one colour."""
    pixels = torch.full((height // 2, width // 2, 4, PATCH_WIDTH), 0.5)
    pixels[:text_rows] = torch.randn(
        text_rows, width // 2, 4, PATCH_WIDTH, generator=torch.Generator().manual_seed(seed)
    )
    return pixels.flatten(0, 2)


@torch.no_grad()
def encode(tower, pixels, grid, **settings):
    if not settings:
        return tower(pixels, grid)
    technique = RepeatedPatchRemoval(**settings)
    technique.apply(tower)
    try:
        return tower(pixels, grid)
    finally:
        technique.revert(tower)


def test_equal_frames_and_pictures_are_encoded_once_and_exactly(tower, monkeypatch):
    one, other = torch.randn(32, PATCH_WIDTH), torch.randn(32, PATCH_WIDTH)
    pixels, grid = torch.cat([one, one, other, one, other]), torch.tensor([[4, 4, 8], [1, 4, 8]])
    expected = encode(tower, pixels, grid)
    seen = []
    monkeypatch.setattr(
        tower.patch_embed,
        "forward",
        lambda x: seen.append(len(x)) or type(tower.patch_embed).forward(tower.patch_embed, x),
    )
    found = encode(tower, pixels, grid, area=1)
    assert seen == [64]
    assert_close(found.pooler_output, expected.pooler_output, 1e-5)
    assert_close(found.last_hidden_state, expected.last_hidden_state, 1e-5)
    for mine, theirs in zip(found.deepstack_features, expected.deepstack_features, strict=True):
        assert_close(mine, theirs, 1e-5)


def test_equal_pixels_of_another_shape_are_another_frame():
    pixels = torch.zeros(64, 4)
    assert unique_frames(pixels, [32, 32], [(2, 4), (4, 2)]) == ([0, 1], [0, 1])
    assert unique_frames(pixels, [32, 32], [(2, 4), (2, 4)]) == ([0], [0, 0])


def test_nothing_repeated_is_bit_identical(tower):
    pixels, grid = torch.randn(64, PATCH_WIDTH), torch.tensor([[1, 8, 8]])
    expected = encode(tower, pixels, grid)
    assert torch.equal(encode(tower, pixels, grid, area=4).pooler_output, expected.pooler_output)
    assert torch.equal(encode(tower, pixels, grid).pooler_output, expected.pooler_output)


def test_multiplicities_stand_for_the_squares_that_went(tower):
    """Without places in the tower, a block's middle counted as often as the block has squares is exact."""
    tower.pos_embed.weight.data.zero_()
    tower.rotary_pos_emb.inv_freq.zero_()
    pixels, grid = page(16, 16), torch.tensor([[1, 16, 16]])
    expected = encode(tower, pixels, grid)
    for area in (2, 4, 8):
        assert_close(encode(tower, pixels, grid, area=area).pooler_output, expected.pooler_output, 1e-4)


def test_features_of_what_stays_are_near(tower):
    pixels, grid = page(16, 16), torch.tensor([[1, 16, 16]])
    expected, found = encode(tower, pixels, grid), encode(tower, pixels, grid, area=2)
    written = slice(0, 16)
    error = (found.pooler_output[written] - expected.pooler_output[written]).norm()
    scale = expected.pooler_output[written].norm()
    assert 0 < error < 0.35 * scale


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    colours=st.integers(1, 3),
    area=st.sampled_from([1, 2, 4, 8]),
    seed=st.integers(0, 99),
)
def test_blocks_hold_equal_squares_alone(height, width, colours, area, seed):
    generator = torch.Generator().manual_seed(seed)
    colour = (torch.rand(height, width, generator=generator) < 0.15).long() * torch.randint(
        1, colours + 1, (height, width), generator=generator
    )
    squares = colour.flatten()[:, None, None].expand(-1, 4, 3).float()
    kept, owner = flat_blocks(squares, height, width, area)
    assert torch.equal(colour.flatten()[owner], colour.flatten())
    assert torch.equal(owner.unique(), kept) and torch.equal(owner[kept], kept)
    counts = torch.bincount(owner)[kept]
    assert int(counts.max()) <= area**2 and all(int(n) & (int(n) - 1) == 0 for n in counts)
    if area == 1:
        assert len(kept) == height * width


def test_a_picture_of_one_colour_and_one_square(tower):
    output = encode(tower, page(16, 16, text_rows=0), torch.tensor([[1, 16, 16]]), area=8)
    assert output.pooler_output.shape[0] == 64 and torch.isfinite(output.pooler_output).all()
    assert max_difference(output.pooler_output, output.pooler_output[:1].expand(64, -1)) == 0
    assert encode(tower, page(2, 2, text_rows=0), torch.tensor([[1, 2, 2]]), area=8).pooler_output.shape[0] == 1


@pytest.mark.parametrize("attention", ["eager", "sdpa", "qwen3_vl_exact"])
def test_generate_and_every_attention(attention):
    model = make_pair().ours
    model.set_attn_implementation(attention)
    inputs = make_inputs(["text:4", "image:8x8", "text:3"], ["text:2", "video:3x4x4", "text:3"])
    inputs["pixel_values"] = page(8, 8, text_rows=2)
    inputs["pixel_values_videos"] = inputs["pixel_values_videos"][:16].repeat(3, 1)
    technique = RepeatedPatchRemoval()
    with torch.no_grad():
        before = model(**inputs).logits
        technique.apply(model)
        assert torch.isfinite(model(**inputs).logits).all()
        assert model.generate(**inputs, max_new_tokens=3, do_sample=False).shape[0] == 2
        technique.revert(model)
        assert torch.equal(model(**inputs).logits, before)


def test_bad_input(tower):
    for area in (0, 3, 2.0, True):
        with pytest.raises(ValueError, match="area must be 1, 2, 4"):
            RepeatedPatchRemoval(area=area)
    with pytest.raises(ValueError, match="has no setting 'side'"):
        RepeatedPatchRemoval(side=2)
    technique = RepeatedPatchRemoval()
    technique.apply(tower)
    with pytest.raises(ValueError, match="already replaced"):
        RepeatedPatchRemoval().apply(tower)
    pixels, grid = page(8, 8), torch.tensor([[1, 8, 8]])
    with pytest.raises(ValueError, match="output_hidden_states=True"):
        tower(pixels, grid, output_hidden_states=True)
    with pytest.raises(ValueError, match="patches but the pixels hold"):
        tower(pixels[:-4], grid)
