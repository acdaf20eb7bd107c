"""Repeated frames and flat areas taken out before the vision tower."""

import pytest
import torch
from helpers import PATCH_WIDTH, assert_close, make_inputs, make_pair
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_vl import RepeatedPatchRemoval
from qwen3_vl.optim.tokens.repeated_patches import flat_squares, unique_frames


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
    found = encode(tower, pixels, grid, depth=0)
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
    assert torch.equal(encode(tower, pixels, grid, depth=1).pooler_output, expected.pooler_output)
    assert torch.equal(encode(tower, pixels, grid).pooler_output, expected.pooler_output)


def test_without_places_the_sharing_is_exact(tower):
    """Flat squares differ to the tower by their places alone."""
    tower.pos_embed.weight.data.zero_()
    tower.rotary_pos_emb.inv_freq.zero_()
    pixels, grid = page(16, 16), torch.tensor([[1, 16, 16]])
    expected, found = encode(tower, pixels, grid), encode(tower, pixels, grid, depth=1)
    assert_close(found.pooler_output, expected.pooler_output, 1e-5)
    for mine, theirs in zip(found.deepstack_features, expected.deepstack_features, strict=True):
        assert_close(mine, theirs, 1e-5)


def test_updates_lie_between_those_beside(tower):
    """One block by hand: what is left out keeps its own state and takes an update from its neighbours'."""
    block, seen, states = tower.blocks[0], [], []
    pixels, grid = page(12, 16), torch.tensor([[1, 12, 16]])
    handles = [
        block.register_forward_pre_hook(lambda module, args: states.append(args[0])),
        block.register_forward_hook(lambda module, args, output: seen.append(output)),
    ]
    encode(tower, pixels, grid)
    encode(tower, pixels, grid, depth=1 / len(tower.blocks))
    for handle in handles:
        handle.remove()
    update = (seen[0] - states[0]).view(6, 8, 2, 2, -1).transpose(1, 2).flatten(2, 3).flatten(0, 1)  # (12, 16, C)
    expected = update.clone()
    numbers, _ = flat_squares(pixels.unflatten(0, (-1, 4)), 6, 8)
    inner = [divmod(number, 8) for number in numbers.tolist() if number % 8 not in (0, 7) and number < 40]
    assert len(numbers) == 12 and len(inner) == 6
    for top, left in ((2 * row, 2 * column) for row, column in inner):
        for y in (top, top + 1):
            for x in (left, left + 1):
                down, right = (y - top + 1) / 3, (x - left + 1) / 3
                vertical = (1 - down) * update[top - 1, x] + down * update[top + 2, x]
                horizontal = (1 - right) * update[y, left - 1] + right * update[y, left + 2]
                expected[y, x] = (vertical + horizontal) / 2
    found = (seen[1] - states[0]).view(6, 8, 2, 2, -1).transpose(1, 2).flatten(2, 3).flatten(0, 1)
    border = {(number // 8, number % 8) for number in numbers.tolist()} - set(inner)
    for row, column in border:  # at the border something like it
        square = found[2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        assert torch.isfinite(square).all() and float(square.abs().sum()) > 0
        expected[2 * row : 2 * row + 2, 2 * column : 2 * column + 2] = square
    assert_close(found, expected, 1e-5)


def test_what_is_written_is_hardly_touched(tower):
    pixels, grid = page(16, 16), torch.tensor([[1, 16, 16]])
    expected = encode(tower, pixels, grid).pooler_output
    errors = []
    for depth in (0.5, 1.0):
        found = encode(tower, pixels, grid, depth=depth).pooler_output
        errors.append((found[:16] - expected[:16]).norm() / expected[:16].norm())
    assert min(errors) > 0 and max(errors) < 0.1


@settings(max_examples=40, deadline=None, derandomize=True)
@given(height=st.integers(1, 9), width=st.integers(1, 9), seed=st.integers(0, 99))
def test_only_flat_squares_are_left_out(height, width, seed):
    generator = torch.Generator().manual_seed(seed)
    colour = (torch.rand(height, width, generator=generator) < 0.1).float()
    squares = colour.flatten()[:, None, None].expand(-1, 4, 3)
    numbers, beside = flat_squares(squares, height, width)
    left_out = set(numbers.tolist())
    assert beside.shape == (len(numbers), 4) and not left_out & set(beside.flatten().tolist())
    assert torch.equal(colour.flatten()[beside], colour.flatten()[numbers, None].expand(-1, 4))
    for row in range(height):
        for column in range(width):
            places = ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1))
            around = [(y, x) for y, x in places if 0 <= y < height and 0 <= x < width]
            is_flat = min(height, width) > 1 and all(colour[place] == colour[row, column] for place in around)
            number = row * width + column
            assert (number in left_out) == (is_flat and (row + column) % 2 == 1)
            if number in left_out:
                own = set(beside[numbers.tolist().index(number)].tolist())
                assert own == {y * width + x for y, x in around}


def test_a_picture_of_one_colour_and_one_square(tower):
    output = encode(tower, page(16, 16, text_rows=0), torch.tensor([[1, 16, 16]]), depth=1.0)
    assert output.pooler_output.shape[0] == 64 and torch.isfinite(output.pooler_output).all()
    for grid in ((2, 2), (2, 8)):
        pixels = page(*grid, text_rows=0)
        alone = encode(tower, pixels, torch.tensor([[1, *grid]]), depth=1.0)
        assert torch.equal(alone.pooler_output, encode(tower, pixels, torch.tensor([[1, *grid]])).pooler_output)


def test_pages_of_several_sizes_repeated_among_photographs(tower):
    """Each in a row is what it is alone."""
    photo = torch.randn(32, PATCH_WIDTH, generator=torch.Generator().manual_seed(3))
    parts = [(page(16, 16), (16, 16)), (photo, (4, 8)), (page(12, 8), (12, 8)), (page(16, 16), (16, 16))]
    parts.append((page(16, 16, seed=1), (16, 16)))
    together = encode(tower, torch.cat([x for x, _ in parts]), torch.tensor([[1, *g] for _, g in parts]), depth=0.5)
    alone = [encode(tower, x, torch.tensor([[1, *grid]]), depth=0.5) for x, grid in parts]
    assert_close(together.pooler_output, torch.cat([output.pooler_output for output in alone]), 1e-5)
    assert_close(together.last_hidden_state, torch.cat([output.last_hidden_state for output in alone]), 1e-5)
    for level, mine in enumerate(together.deepstack_features):
        assert_close(mine, torch.cat([output.deepstack_features[level] for output in alone]), 1e-5)


def test_gradients_flow(tower):
    pixels, technique = page(12, 16).requires_grad_(), RepeatedPatchRemoval(depth=1.0)
    technique.apply(tower)
    tower(pixels, torch.tensor([[1, 12, 16]])).pooler_output.sum().backward()
    assert bool((pixels.grad.abs().sum(1) > 0).all())


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
    for depth in (-0.1, 1.5, float("nan"), True, "half"):
        with pytest.raises(ValueError, match="depth must be from 0 to 1"):
            RepeatedPatchRemoval(depth=depth)
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
