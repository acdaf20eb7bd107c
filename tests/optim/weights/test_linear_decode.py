"""Products of few rows against float64, and a model that takes them."""

import copy

import pytest
import torch
from helpers import make_inputs, make_pair, max_difference
from torch.nn import functional as F

from qwen3_vl.optim.native.native_linear import linear_kernel, native_linear, supports_linear
from qwen3_vl.optim.weights import linear_decode
from qwen3_vl.optim.weights.linear_decode import DecodeLinear


pytestmark = pytest.mark.skipif(linear_kernel() is None, reason="no C++ compiler")


def states(rows, inputs, outputs, dtype, bias=True):
    generator = torch.Generator().manual_seed(rows + inputs)
    x, weight, added = (
        torch.randn(shape, generator=generator).to(dtype) for shape in ((rows, inputs), (outputs, inputs), (outputs,))
    )
    return x, weight, added if bias else None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("inputs", [1, 16, 40, 96, 333])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 8])
def test_matches_float64(rows, inputs, bias, dtype):
    x, weight, added = states(rows, inputs, 77, dtype, bias)
    assert supports_linear(x, weight, added)
    expected = F.linear(x.double(), weight.double(), None if added is None else added.double())
    ours = native_linear(x, weight, added)
    assert ours.dtype == dtype and ours.shape == (rows, 77)
    tolerance = 1e-6 * inputs**0.5 if dtype == torch.float32 else 2**-8
    assert ((ours.double() - expected).abs() <= tolerance * (1 + expected.abs())).all()


def test_leading_dimensions_and_nan():
    x, weight, _ = states(6, 64, 5, torch.bfloat16, False)
    assert torch.equal(native_linear(x.view(2, 3, 64), weight).view(6, 5), native_linear(x, weight))
    x[2, 3] = float("nan")
    assert native_linear(x, weight)[2].isnan().all() and not native_linear(x, weight)[[0, 1, 3, 4, 5]].isnan().any()


def test_not_supported():
    x, weight, bias = states(2, 32, 8, torch.float32)
    assert not supports_linear(states(9, 32, 8, torch.float32)[0], weight, bias)
    assert not supports_linear(x.bfloat16(), weight, bias)
    assert not supports_linear(x.double(), weight.double(), bias.double())
    assert not supports_linear(x, weight.t().contiguous().t(), bias)
    assert not supports_linear(x[:0], weight, bias)
    assert not supports_linear(x, torch.nn.Parameter(weight), bias)
    with torch.no_grad():
        assert supports_linear(x, torch.nn.Parameter(weight), bias)
    with torch.autocast("cpu", torch.bfloat16):
        assert not supports_linear(x, weight, bias)


@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}],
    ids=["greedy", "beams", "sampling"],
)
def test_same_tokens_as_stock(kind, settings, monkeypatch):
    pair, technique, used = make_pair(kind), DecodeLinear(), []
    monkeypatch.setattr(linear_decode, "native_linear", lambda *x: used.append(1) or native_linear(*x))
    inputs = make_inputs(["text:5", "image:4x6", "text:3"], ["text:4"])
    settings = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6, **settings}
    technique.apply(pair.ours)
    torch.manual_seed(0)
    ours = pair.ours.generate(**inputs, **settings)
    torch.manual_seed(0)
    assert torch.equal(ours, pair.stock.generate(**inputs, **settings))
    assert used


def test_apply_and_revert():
    model, inputs, technique = make_pair("dense").ours, make_inputs(["text:5"]), DecodeLinear()
    names = list(model.state_dict())
    with torch.no_grad():
        before = model(**inputs).logits
        technique.apply(model)
        assert max_difference(model(**inputs).logits, before) <= 1e-5
        assert list(model.state_dict()) == names
        copied = copy.deepcopy(model)
        assert copied.lm_head.forward.module is copied.lm_head
        technique.revert(model)
        assert torch.equal(model(**inputs).logits, before)
    assert not any("forward" in vars(module) for module in model.modules())


def test_training_takes_the_plain_way():
    model, inputs = make_pair("dense").ours, make_inputs(["text:5"])
    DecodeLinear().apply(model)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert model.lm_head.weight.grad.abs().max() > 0


def test_unknown_setting():
    with pytest.raises(ValueError, match="decode_linear has no setting 'rows'; it takes none"):
        DecodeLinear(rows=3)
