"""Packing and quantizing alone: error bounds, round trips, sizes, the rotation."""

import pytest
import torch
from helpers import one_line
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_vl.optim.cache.kv_quantization import (
    PackedFormat,
    dequantize_keys,
    dequantize_values,
    hadamard,
    quantize_keys,
    quantize_values,
    rotate_states,
)


def draw(form, seed, scale=1.0, shift=0.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 3, form.group_size, form.head_dim)
    channels = torch.randn(form.head_dim, generator=generator)
    return (torch.randn(shape, generator=generator) * scale * channels.exp() + shift * channels).to(dtype)


def step_bound(x, dim, levels):
    """Half a step of the widest range that the stored scale and zero may stand for."""
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    return ((high - low) + low.abs() * 2**-7) / levels * (1 + 2**-7) / 2 * (1 + 1e-3) + 1e-30


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    bits=st.sampled_from([2, 4, 8]),
    group_size=st.sampled_from([32, 64, 128]),
    head_dim=st.sampled_from([16, 64, 80, 128]),
    scale=st.sampled_from([1e-6, 1.0, 300.0]),
    shift=st.sampled_from([0.0, 1.0, 50.0]),
    bf16=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_the_error_is_half_a_step(bits, group_size, head_dim, scale, shift, bf16, seed):
    form = PackedFormat(bits, group_size, head_dim)
    x = draw(form, seed, scale, shift, torch.bfloat16 if bf16 else torch.float32)
    given_values = x.float()
    slack = given_values.abs() * 1e-6
    keys, values = quantize_keys(x, form), quantize_values(x, form)
    assert keys.shape == values.shape == (2, 3, form.record_bytes) and keys.dtype == torch.uint8
    bound = step_bound(given_values, -2, form.levels)
    assert bool(((dequantize_keys(keys, form) - given_values).abs() <= bound + slack).all())
    grouped = given_values.unflatten(-1, (form.value_groups, -1))
    bound = step_bound(grouped, -1, form.levels).expand_as(grouped).flatten(-2)
    assert bool(((dequantize_values(values, form) - given_values).abs() <= bound + slack).all())


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("head_dim", [16, 80, 128])
def test_what_lies_on_the_grid_comes_back_exactly(bits, head_dim):
    """Whole numbers that span all levels, in every channel and in every token: each code at its own place."""
    form = PackedFormat(bits, 64, head_dim)
    x = torch.randint(0, form.levels + 1, (4, 64, head_dim)).float()
    x[:, 0], x[:, 1] = 0, form.levels
    assert torch.equal(dequantize_keys(quantize_keys(x, form), form), x)
    x[..., ::16], x[..., 1::16] = 0, form.levels
    assert torch.equal(dequantize_values(quantize_values(x, form), form), x)


def test_constants_and_extremes():
    form = PackedFormat(4, 32, 16)
    for constant in (0.0, 1.1, -7.3, 65000.0, -3e38, 1e-40):
        x = torch.full((32, 16), constant)
        for back in (dequantize_keys(quantize_keys(x, form), form), dequantize_values(quantize_values(x, form), form)):
            assert torch.allclose(back, x, rtol=1e-3, atol=1e-38)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_refused(bad):
    form = PackedFormat(8, 32, 16)
    x = torch.randn(2, 32, 16)
    x[1, 5, 7] = bad
    for what, quantize in (("keys", quantize_keys), ("values", quantize_values)):
        with pytest.raises(ValueError, match=f"{what} with NaN or infinite entries cannot be quantized") as error:
            quantize(x, form)
        one_line(error.value)


def test_sizes():
    assert PackedFormat(4, 64, 128).record_bytes == 64 * 128 // 2 + 2 * 2 * 128
    assert PackedFormat(8, 64, 64).token_bytes == 64 + 4
    assert PackedFormat(2, 64, 80).value_groups == 1 and PackedFormat(2, 32, 128).value_groups == 4
    # Of bfloat16: codes, and scale and zero of two bytes each for 64 entries.
    assert PackedFormat(4, 64, 128).token_bytes / 256 == 0.25 + 4 / 128


def test_the_rotation_is_its_own_inverse_and_flattens_outliers():
    x = torch.randn(5, 128, dtype=torch.float64).float()
    assert torch.allclose(rotate_states(rotate_states(x)), x, atol=1e-5)
    assert torch.allclose(hadamard(128, x.device) @ hadamard(128, x.device), torch.eye(128), atol=1e-5)
    query = torch.randn(5, 128)
    assert torch.allclose((rotate_states(x) * rotate_states(query)).sum(-1), (x * query).sum(-1), atol=1e-4)
    spike = torch.zeros(128)
    spike[3] = 8.0
    assert rotate_states(spike).abs().max() < 0.71
    with pytest.raises(ValueError, match="power of two, got 80"):
        hadamard(80, x.device)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((3, 64, 128), "bits must be 8, 4 or 2, got 3"),
        ((True, 64, 128), "bits must be 8, 4 or 2, got True"),
        ((4, 48, 128), "group_size must be a multiple of 32, got 48"),
        ((4, 0, 128), "group_size must be a whole number of at least 1, got 0"),
        ((4, 64, 40), "head_dim must be a multiple of 16 to be packed, got 40"),
    ],
)
def test_formats_that_do_not_exist(numbers, message):
    with pytest.raises(ValueError, match=message) as error:
        PackedFormat(*numbers)
    one_line(error.value)
