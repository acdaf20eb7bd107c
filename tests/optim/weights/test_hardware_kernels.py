"""What is picked for a device, and the Triton kernels where a GPU or Triton's interpreter can run them."""

import os

import pytest
import torch
from helpers import assert_close, make_inputs, make_pair, max_difference, one_line, stock_forward
from torch.nn import functional as F

from qwen3_vl import HardwareSpecificKernels
from qwen3_vl.optim.native.native_linear import linear_kernel
from qwen3_vl.optim.weights import hardware_kernels
from qwen3_vl.optim.weights.hardware_triton import has_triton, triton_rms_norm, triton_rotation, triton_swiglu


GPU = torch.cuda.is_available()
interpreted = os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(
    not has_triton() or not (GPU or interpreted), reason="needs Triton, and a GPU or TRITON_INTERPRET=1"
)
DEVICE = "cuda" if GPU and not interpreted else "cpu"


@pytest.mark.parametrize("kind", ["dense", "moe"])
@torch.no_grad()
def test_on_this_machine(kind, capsys):
    pair, technique = make_pair(kind), HardwareSpecificKernels(verbose=True)
    inputs = make_inputs(["text:2", "image:4x6", "text:3"])
    before = pair.ours(**inputs).logits
    names = list(pair.ours.state_dict())
    technique.apply(pair.ours)
    assert technique.describe() in capsys.readouterr().out
    assert str(technique) == technique.describe() and "oneDNN" in str(technique)
    assert_close(pair.ours(**inputs).logits, stock_forward(pair.stock, **inputs).logits, 2e-5, "logits")
    if linear_kernel() is not None:
        assert {"RMSNorm, SwiGLU", "products of up to 8 rows"} <= {choice.part for choice in technique.choices}
        assert any(choice.part == "sparse experts" for choice in technique.choices) == (kind == "moe")
    assert list(pair.ours.state_dict()) == names
    with pytest.raises(ValueError, match="already applied"):
        technique.apply(pair.ours)
    technique.revert(pair.ours)
    assert torch.equal(pair.ours(**inputs).logits, before)
    assert technique.describe() == "hardware_kernels: not applied."
    assert not any({"forward", "rotate"} & set(vars(module)) for module in pair.ours.modules())


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True}], ids=["greedy", "beams", "sampling"])
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_same_tokens_as_stock(kind, options):
    pair, inputs = make_pair(kind), make_inputs(["text:2", "image:4x6", "video:2x4x4"], ["text:4"])
    options = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5, **options}
    HardwareSpecificKernels().apply(pair.ours)
    torch.manual_seed(0)
    ours = pair.ours.generate(**inputs, **options)
    torch.manual_seed(0)
    assert torch.equal(ours, pair.stock.generate(**inputs, **options))


@torch.no_grad()
def test_without_a_compiler(monkeypatch):
    model, technique = make_pair("dense").ours, HardwareSpecificKernels()
    monkeypatch.setattr(hardware_kernels, "linear_kernel", lambda: None)
    technique.apply(model)
    assert "no C++ compiler" in technique.describe()
    assert not any("forward" in vars(module) for module in model.modules())


def test_elsewhere_nothing_is_changed():
    with torch.device("meta"):
        model, technique = torch.nn.Linear(2, 2), HardwareSpecificKernels()
    technique.apply(model)
    assert technique.describe().endswith("all: PyTorch (nothing faster is known for meta)")


def test_from_profile(tmp_path):
    model = make_pair("dense").ours
    model.config.optim = {"hardware_kernels": {}}
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert "oneDNN" in loaded.active_techniques[0].describe()


def test_bad_input():
    with pytest.raises(ValueError, match="hardware_kernels has no setting 'amx'"):
        HardwareSpecificKernels(amx=True)
    model = make_pair("dense").ours
    with pytest.raises(ValueError, match="needs the package kernels and a CUDA device") as error:
        HardwareSpecificKernels(hub=True).apply(model)
    one_line(error.value)
    assert not any("forward" in vars(module) for module in model.modules())


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 7), (2, 3, 64), (5, 80), (1, 2, 1, 1500)])
def test_triton_norm_and_swiglu(shape, dtype):
    x, up = random(*shape, dtype=dtype), random(*shape, dtype=dtype, seed=1)
    weight, tolerance = random(shape[-1], dtype=dtype, seed=2), 1e-5 if dtype == torch.float32 else 2**-6
    wide = x.double()
    normed = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    for actual, expected in (
        (triton_rms_norm(x, weight, 1e-6), normed),
        (triton_swiglu(x, up), F.silu(wide) * up.double()),
    ):
        assert actual.shape == x.shape and actual.dtype == dtype
        assert ((actual.double() - expected).abs() <= tolerance * (1 + expected.abs())).all()


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [2, 16, 80])
def test_triton_rotation(dim, dtype):
    x = random(2, 5, 3, dim, dtype=dtype).transpose(1, 2)
    angles = random(2, 5, dim // 2, seed=1).repeat(1, 1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    first, second = x.double().chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    expected = x.double() * cos.double()[:, None] + turned * sin.double()[:, None]
    actual = triton_rotation(x, cos, sin)
    assert actual.dtype == dtype
    assert ((actual.double() - expected).abs() <= (1e-5 if dtype == torch.float32 else 0.05)).all()


@needs_triton
@torch.no_grad()
def test_triton_in_the_model():
    pair, technique = make_pair("dense"), hardware_kernels.TritonKernels()
    model, inputs = pair.ours.to(DEVICE), {k: v.to(DEVICE) for k, v in make_inputs(["text:5"], ["text:5"]).items()}
    before = model(**inputs).logits
    technique.apply(model)
    assert 0 < max_difference(model(**inputs).logits, before) <= 1e-4
    technique.revert(model)
    assert torch.equal(model(**inputs).logits, before)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@torch.no_grad()
def test_picks_on_a_gpu():
    pair, technique = make_pair("dense"), HardwareSpecificKernels()
    model, inputs = pair.ours.to("cuda"), {k: v.to("cuda") for k, v in make_inputs(["text:5"]).items()}
    before = model(**inputs).logits
    technique.apply(model)
    assert "compute capability" in technique.describe()
    assert max_difference(model(**inputs).logits, before) <= 1e-3
    technique.revert(model)
    assert torch.equal(model(**inputs).logits, before)
