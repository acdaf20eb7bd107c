"""The native rotation and layout of the vision tower, bit for bit against the plain one."""

import pytest
import torch
from helpers import make_inputs, make_pair

from qwen3_vl import FasterRotaryEmbeddings
from qwen3_vl.modeling_qwen3_vl.modeling_vision import rotate_and_lay_out
from qwen3_vl.optim.attention import rotary_faster
from qwen3_vl.optim.native.native_layout import layout_kernel, native_layout, supports_layout


pytestmark = pytest.mark.skipif(layout_kernel() is None, reason="no C++ compiler")


def states(tokens=131, heads=3, dim=64, dtype=torch.float32):
    generator = torch.Generator().manual_seed(tokens + dim)
    qkv = torch.randn(tokens, 3, heads, dim, generator=generator).to(dtype)
    angles = torch.randn(tokens, dim // 2, generator=generator) * 10
    return qkv, angles.cos(), angles.sin()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [2, 16, 64, 72, 80])
@pytest.mark.parametrize("tokens", [1, 64, 131])
def test_bit_equal(tokens, dim, dtype):
    given = states(tokens, 3, dim, dtype)
    assert supports_layout(*given)
    for ours, plain in zip(native_layout(*given), rotate_and_lay_out(*given), strict=True):
        assert ours.dtype == dtype and torch.equal(ours, plain)


def test_nan_stays():
    qkv, cos, sin = states(dtype=torch.bfloat16)
    qkv[5, 0, 1, 7] = float("nan")
    query, key, value = native_layout(qkv, cos, sin)
    assert query[1, 5].isnan().sum() == 2 and not key.isnan().any() and not value.isnan().any()


def test_not_supported():
    qkv, cos, sin = states()
    assert not supports_layout(qkv.transpose(1, 2), cos, sin)
    assert not supports_layout(qkv.double(), cos, sin)
    assert not supports_layout(qkv, cos.bfloat16(), sin)
    assert not supports_layout(qkv.clone().requires_grad_(), cos, sin)


@pytest.mark.parametrize("native", [True, False])
def test_the_technique_leaves_the_tower_as_it_was(native, monkeypatch):
    model, inputs = make_pair("dense").ours, make_inputs(["text:3", "image:4x6", "text:2", "video:2x4x4"])
    used = []
    if native:
        monkeypatch.setattr(rotary_faster, "native_layout", lambda *x: used.append(1) or native_layout(*x))
    else:
        monkeypatch.setattr(rotary_faster, "supports_layout", lambda *_: False)
    technique = FasterRotaryEmbeddings()
    with torch.no_grad():
        before = model(**inputs).logits
        technique.apply(model)
        during = model(**inputs).logits
        technique.revert(model)
        assert torch.equal(before, during) and torch.equal(model(**inputs).logits, before)
    assert bool(used) == native
    assert not any("lay_out" in vars(module) for module in model.modules())


def test_gradients_take_the_plain_way():
    model, inputs = make_pair("dense").ours, make_inputs(["text:3", "image:4x6"])
    technique = FasterRotaryEmbeddings()
    technique.apply(model)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    technique.revert(model)
    assert model.model.visual.blocks[0].attn.qkv.weight.grad.abs().max() > 0
