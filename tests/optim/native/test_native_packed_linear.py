"""Products with packed weights and unpacked rows, against float64 of the rounded weights."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from qwen3_vl.optim.native.native_packed_linear import native_packed_linear, packed_kernel, supports_packed
from qwen3_vl.optim.weights.packed_codes import pack, unpack_codes


pytestmark = pytest.mark.skipif(packed_kernel() is None, reason="no C++ compiler")


def states(rows, inputs, outputs, bits, group_size, dtype):
    generator = torch.Generator().manual_seed(rows + inputs)
    x, weight, bias = (
        torch.randn(shape, generator=generator) for shape in ((rows, inputs), (outputs, inputs), (outputs,))
    )
    packed = pack(weight, bits, group_size)
    return x.to(dtype), packed, unpack_codes(packed.codes, packed.scale, packed.zero), bias.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits, group_size", [(8, 64), (4, 16), (4, 32), (4, 64), (4, 128)])
@pytest.mark.parametrize("inputs", [128, 384, 48, 333])
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8])
def test_matches_float64(rows, inputs, bits, group_size, dtype):
    if bits == 4 and inputs % group_size:
        pytest.skip("no such groups")
    x, packed, weight, bias = states(rows, inputs, 13, bits, group_size, dtype)
    ours = native_packed_linear(x, packed, bias)
    expected = F.linear(x.double(), weight.double(), bias.double())
    assert ours.dtype == dtype and ours.shape == (rows, 13)
    # Inputs are split to fifteen bits of the largest of 128; bfloat16 rounds the result, and weights in tiles of rows.
    in_tiles = rows > 6
    relative = 2e-4 if dtype == torch.float32 else 2**-7 if in_tiles else 2**-8
    assert ((ours.double() - expected).abs() <= relative * (expected.abs() + inputs**0.5)).all()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    chunks=st.integers(1, 3), outputs=st.integers(1, 9), bits=st.sampled_from([4, 8]),
    power=st.integers(-20, 20), seed=st.integers(0, 99),
)  # fmt: skip
def test_one_hot_rows_read_single_weights(chunks, outputs, bits, power, seed):
    """A power of two at one input gives that column of the rounded weights."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, 128 * chunks, generator=generator)
    packed = pack(weight, bits, 32)
    plain = unpack_codes(packed.codes, packed.scale, packed.zero)
    at = torch.randint(128 * chunks, (4,), generator=generator)
    x = F.one_hot(at, 128 * chunks).float() * 2.0**power
    torch.testing.assert_close(native_packed_linear(x, packed) / 2.0**power, plain[:, at].t(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
def test_outlier_does_not_hide_other_chunks(bits):
    x, packed, weight, _ = states(1, 384, 9, bits, 64, torch.float32)
    x[0, 5] = 1e6
    weight_rest = weight[:, 128:].double()
    rest = native_packed_linear(x, packed) - native_packed_linear(torch.where(torch.arange(384) < 128, x, 0), packed)
    assert (rest.double() - x[:, 128:].double() @ weight_rest.t()).abs().max() <= 1.0  # of sums of a million


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("bits", [4, 8])
def test_what_is_no_number_stays_visible(bits, value):
    x, packed, _, _ = states(3, 256, 5, bits, 64, torch.bfloat16)
    x[1, 200] = value
    out = native_packed_linear(x, packed)
    assert not out[1].isfinite().any() and out[[0, 2]].isfinite().all()


@pytest.mark.parametrize("bits, group_size", [(8, 64), (4, 16), (4, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unpacks_as_plain_pytorch(bits, group_size, dtype):
    _, packed, weight, _ = states(1, 192, 40, bits, group_size, dtype)
    rounding = 2**-8 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(packed.unpack(dtype, 3, 20), weight[3:20].to(dtype), rtol=rounding, atol=1e-6)


def test_leading_dimensions_strides_and_what_is_not_supported():
    x, packed, _, _ = states(6, 128, 5, 8, 64, torch.float32)
    assert torch.equal(native_packed_linear(x.view(2, 3, 128), packed).view(6, 5), native_packed_linear(x, packed))
    wide = torch.randn(4, 256)
    assert torch.equal(native_packed_linear(wide[:, ::2], packed), native_packed_linear(wide[:, ::2].clone(), packed))
    assert supports_packed(x, packed)
    assert not supports_packed(x.double(), packed)
    assert not supports_packed(x[:0], packed)
    assert not supports_packed(x[:, :64], packed)
    assert not supports_packed(x.clone().requires_grad_(), packed)
    with torch.autocast("cpu", torch.bfloat16):
        assert not supports_packed(x, packed)
