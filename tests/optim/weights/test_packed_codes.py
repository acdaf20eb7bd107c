"""Rounding to codes, the numbers that they stand for, and products on every way."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from qwen3_vl.optim.native.native_packed_linear import native_packed_linear, packed_kernel
from qwen3_vl.optim.weights import packed_codes
from qwen3_vl.optim.weights.packed_codes import define_operator, group_size_for, pack, packed_linear, unpack_codes


def plain(packed):
    return unpack_codes(packed.codes, packed.scale, packed.zero)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    outputs=st.integers(1, 5), groups=st.integers(1, 4), group_size=st.sampled_from([16, 32, 64, 128]),
    scale=st.sampled_from([1e-3, 1.0, 50.0]), shift=st.sampled_from([0.0, 3.0]), seed=st.integers(0, 99),
)  # fmt: skip
def test_int4_is_within_half_a_step(outputs, groups, group_size, scale, shift, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = scale * (torch.randn(outputs, groups * group_size, generator=generator) + shift)
    packed = pack(weight, 4, group_size)
    assert packed.bits == 4 and packed.group_size == group_size and packed.inputs == weight.shape[1]
    steps = weight.unflatten(1, (groups, group_size))
    step = (steps.amax(2) - steps.amin(2)) / 15
    # Besides half a step, what bfloat16 rounds of scale and zero.
    allowed = 0.5 * step + 8 * step * 2**-8 + steps.abs().amax(2) * 2**-7 + 1e-6
    assert ((plain(packed) - weight).unflatten(1, (groups, group_size)).abs() <= allowed[..., None]).all()


@settings(max_examples=30, deadline=None, derandomize=True)
@given(outputs=st.integers(1, 5), inputs=st.integers(1, 70), seed=st.integers(0, 99))
def test_int8_is_within_half_a_step(outputs, inputs, seed):
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))
    step = weight.abs().amax(1, keepdim=True) / 127
    assert ((plain(pack(weight, 8, 64)) - weight).abs() <= 0.5001 * step).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_zeros_and_constants(bits):
    weight = torch.zeros(3, 64)
    weight[1] = 0.5
    assert torch.equal(plain(pack(weight, bits, 32))[0], weight[0])
    assert (plain(pack(weight, bits, 32)) - weight).abs().max() <= 1e-5


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_refuses_what_is_no_number(value):
    weight = torch.randn(3, 32)
    weight[2, 5] = value
    with pytest.raises(ValueError, match=r"weight of shape \(3, 32\) holds NaN or infinity"):
        pack(weight, 8, 32)


def test_groups_that_fit():
    assert [group_size_for(width, 128) for width in (256, 192, 48, 72, 4304)] == [128, 64, 16, None, 16]


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [1, 5, 24, 60])
def test_products_on_every_way(rows, bits, native, monkeypatch):
    if not native:
        monkeypatch.setenv("QWEN3_VL_NATIVE", "0")
        monkeypatch.setattr(packed_codes, "supports_packed", lambda *x: False)
        monkeypatch.setattr(packed_codes, "supports_unpack", lambda *x: False)
    monkeypatch.setattr(packed_codes, "UNPACKED_AT_ONCE", 128 * 7)  # several slices
    packed, x = pack(torch.randn(30, 128), bits, 64), torch.randn(2, rows, 128)
    bias = torch.randn(30, requires_grad=True)
    packed_linear(x, packed, bias).sum().backward()
    assert torch.allclose(bias.grad, torch.full((30,), 2.0 * rows))
    bias = bias.detach()
    with torch.inference_mode():  # what it keeps for the next call serves training too
        packed_linear(x, packed, bias)
    expected = F.linear(x.double(), plain(packed).double(), bias.double())
    assert (packed_linear(x, packed, bias).double() - expected).abs().max() <= 2e-3
    gradient_input = x.clone().requires_grad_()
    packed_linear(gradient_input, packed, bias).square().sum().backward()
    expected_gradient = 2 * expected @ plain(packed).double()
    assert (
        gradient_input.grad.double() - expected_gradient
    ).abs().max() <= 1e-4 * expected_gradient.abs().max() + 1e-3


@pytest.mark.skipif(packed_kernel() is None, reason="no C++ compiler")
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 20), outputs=st.integers(1, 11), inputs=st.sampled_from([16, 48, 128, 208, 256]),
    bits=st.sampled_from([4, 8]), dtype=st.sampled_from([torch.float32, torch.bfloat16]), biased=st.booleans(),
)  # fmt: skip
def test_native_products_of_any_shape(rows, outputs, inputs, bits, dtype, biased):
    generator = torch.Generator().manual_seed(rows * 100 + inputs)
    packed = pack(torch.randn(outputs, inputs, generator=generator), bits, group_size_for(inputs, 64))
    x = torch.randn(rows, inputs, generator=generator).to(dtype)
    bias = torch.randn(outputs, generator=generator).to(dtype) if biased else None
    expected = F.linear(x.double(), plain(packed).double(), None if bias is None else bias.double())
    # Each weight may be rounded to the rows' type, and the sum is.
    most = (x.double().abs() @ plain(packed).double().abs().T).max() + 3
    tolerance = (2**-9 if dtype == torch.bfloat16 else 1e-4) * most
    assert (native_packed_linear(x, packed, bias).double() - expected).abs().max() <= tolerance


@pytest.mark.parametrize("rows", [2, 120])
def test_compiled_graphs_are_whole(rows, monkeypatch):
    define_operator()
    packed, x, bias = pack(torch.randn(30, 128), 4, 64), torch.randn(rows, 128), torch.randn(30)
    used = []
    monkeypatch.setattr(packed_codes, "native_packed_linear", lambda *x: used.append(1) or native_packed_linear(*x))
    compiled = torch.compile(lambda y: packed_linear(y, packed, bias), backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert (compiled(x) - F.linear(x, plain(packed), bias)).abs().max() <= 2e-3
    assert bool(used) == (rows == 2 and packed_kernel() is not None)
