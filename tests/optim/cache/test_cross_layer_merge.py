"""The arithmetic of shared keys and values, against its definition vector by vector in float64."""

import math

import pytest
import torch
from helpers import assert_close, one_line
from sharing_reference import slow_pair

from qwen3_vl.optim.cache.cross_layer_merge import SharedFormat, compare, restore_, share


TOKENS, DIM = 8, 16


def merge(lower, upper, kept=1, interpolation=0.5):
    form = SharedFormat(lower.shape[-2], lower.shape[-1], lower.dtype, kept)
    page, records = share(lower, upper, compare(lower, upper, "keys"), interpolation, form)
    assert page.dtype == lower.dtype and page.shape == lower.shape
    assert records.dtype == torch.uint8 and records.shape == (*lower.shape[:-2], form.record_bytes)
    return page, restore_(page.clone(), records, form), form


def alike(*shape, noise=0.4, dtype=torch.float32):
    lower = torch.randn(*shape, TOKENS, DIM)
    return lower.to(dtype), (1.7 * (lower + noise * torch.randn_like(lower))).to(dtype)


@pytest.mark.parametrize("kept", [0, 1, 3])
@pytest.mark.parametrize("interpolation", [0.0, 0.3, 0.5, 1.0])
def test_directions_lengths_and_kept_tokens(kept, interpolation):
    lower, upper = alike(2, 3)
    read = merge(lower, upper, kept, interpolation)
    for row in range(2):
        for head in range(3):
            expected = slow_pair(lower[row, head], upper[row, head], kept, interpolation)
            for ours, theirs in zip(read[:2], expected, strict=True):
                assert_close(ours[row, head].double(), theirs, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_lengths_stay_and_equal_layers_lose_nothing(dtype):
    lower, upper = alike(4, dtype=dtype)
    step = torch.finfo(dtype).eps
    for ours, theirs in zip(merge(lower, upper)[:2], (lower, upper), strict=True):
        lengths = [x.double().norm(dim=-1) for x in (ours, theirs)]
        assert bool(((lengths[0] / lengths[1] - 1).abs() <= 2 * max(step, 1e-7)).all())
    for ours in merge(lower, lower.clone())[:2]:
        assert bool(((ours - lower).abs() <= 2 * step * lower.abs() + step).all())


def test_one_layer_a_multiple_of_the_other_loses_nothing():
    lower, _ = alike(3)
    page, restored, _ = merge(lower, 3.5 * lower, kept=0)
    assert_close(page, lower, 1e-5)
    assert_close(restored, 3.5 * lower, 2e-5)


def test_opposite_and_zero_vectors():
    """No arc joins opposite vectors, and zeros have no direction; nothing becomes NaN and lengths stay."""
    lower, upper = alike(1)
    upper[0, 0], lower[0, 1], upper[0, 2] = -lower[0, 0], 0.0, 0.0
    lower[0, 3] = upper[0, 3] = 0.0
    distance = compare(lower, upper, "keys").distance[0]
    assert distance[0] == 1 and distance[1] == distance[2] == 0.5 and distance[3] == 0
    page, restored, _ = merge(lower, upper, kept=1)
    # No multiple of a zero has a length, so that token is kept before the opposite ones.
    assert torch.equal(page[0, 1], lower[0, 1]) and torch.equal(restored[0, 1], upper[0, 1])
    assert_close(page[0, 0], lower[0, 0], 1e-6)
    assert_close(restored[0, 0], lower[0, 0], 1e-5)
    assert_close(page[0, 2].norm(), lower[0, 2].norm(), 1e-5)
    for zeros in (restored[0, 2], page[0, 3], restored[0, 3]):
        assert bool((zeros == 0).all())


def test_small_angles_are_seen():
    """The arc cosine in float32 rounds everything below 2e-4 to nothing or worse."""
    lower = torch.zeros(1, 1, 2)
    lower[..., 0] = 1.0
    for angle in (1e-5, 1e-4, 1.0, 3.0):
        upper = torch.tensor([[[math.cos(angle), math.sin(angle)]]])
        assert compare(lower, upper, "keys").distance.item() == pytest.approx(angle / math.pi, rel=1e-2)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("side", [0, 1])
def test_what_is_not_finite_is_refused(wrong, side):
    states = alike(2)
    states[side][1, 4, 3] = wrong
    with pytest.raises(ValueError, match="values with NaN or infinite entries cannot be shared") as error:
        compare(*states, "values")
    assert "crop() or reset()" in one_line(error.value)


@pytest.mark.parametrize(("dtype", "kept"), [(torch.float32, 0), (torch.bfloat16, 4), (torch.float64, 3)])
def test_bytes_of_a_record(dtype, kept):
    form = SharedFormat(64, 128, dtype, kept)
    needed = 64 * 4 + kept * (4 + 128 * dtype.itemsize)
    assert needed <= form.record_bytes < needed + 64
    assert form.record_bytes == 64 * form.token_bytes
