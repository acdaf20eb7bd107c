"""Fused products and passes: the same numbers, the same names, and everything as before afterwards."""

import copy

import pytest
import torch
from helpers import assert_close, make_inputs, make_pair, max_difference, one_line, stock_forward, valid_positions
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.nn import functional as F

from qwen3_vl import DecodeLinear, FasterRotaryEmbeddings, KernelFusion
from qwen3_vl.optim.native import native_fused
from qwen3_vl.optim.native.native_fused import (
    fused_kernels,
    native_add_rms_norm,
    native_rms_norm,
    native_swiglu,
    supports_add_rms_norm,
    supports_rms_norm,
    supports_swiglu,
)
from qwen3_vl.optim.weights import kernel_fusion


needs_compiler = pytest.mark.skipif(fused_kernels() is None, reason="no C++ compiler")
KINDS_OF_INPUT = [["text:6"], ["text:2", "image:4x6", "image:4x4"], ["video:2x4x4", "text:3"]]


def attention(model, layer=0):
    return model.model.language_model.layers[layer].self_attn


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@needs_compiler
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 9),
    size=st.integers(1, 80),
    extra=st.integers(0, 20),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    scale=st.sampled_from([1e-3, 1.0, 40.0]),
)
def test_passes_match_their_definitions(rows, size, extra, dtype, scale):
    wide = (random(2, rows, 2 * size + extra, seed=size) * scale).to(dtype)
    gate, up = wide[..., :size], wide[..., size : 2 * size]
    weight = random(size, dtype=dtype, seed=1)
    assert supports_swiglu(gate, up) and supports_rms_norm(gate, weight)
    tolerance = 2e-6 if dtype == torch.float32 else 2**-6
    double = gate.double()
    normed = double / (double.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    for actual, expected in (
        (native_swiglu(gate, up), F.silu(double) * up.double()),
        (native_rms_norm(gate, weight, 1e-6), normed),
    ):
        assert actual.is_contiguous() and actual.dtype == dtype
        assert ((actual.double() - expected).abs() <= tolerance * (1e-3 + expected.abs())).all()


@needs_compiler
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 9),
    size=st.integers(1, 80),
    extra=st.integers(0, 20),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_norm_of_a_sum_rounds_where_the_two_steps_do(rows, size, extra, dtype):
    x = random(2, rows, size + extra, dtype=dtype, seed=size)[..., :size]
    residual, weight = random(2, rows, size, dtype=dtype, seed=1), random(size, dtype=dtype, seed=2)
    kept = x.clone(), residual.clone()
    assert supports_add_rms_norm(x, residual, weight)
    total, normed = native_add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, native_rms_norm(x + residual, weight, 1e-6))
    assert torch.equal(x, kept[0]) and torch.equal(residual, kept[1])


@needs_compiler
def test_passes_keep_nan_and_infinity():
    x = torch.tensor([[float("nan")] * 20, [float("inf")] * 20, [-200.0] * 20, [200.0] * 20])
    expected = F.silu(x) * 2.0
    assert torch.equal(native_swiglu(x, torch.full_like(x, 2.0)).isnan(), expected.isnan())
    assert torch.equal(native_swiglu(x, torch.full_like(x, 2.0))[[1, 3]], expected[[1, 3]])
    assert native_rms_norm(x, torch.ones(20), 1e-6)[0].isnan().all()
    assert native_rms_norm(torch.zeros(1, 20), torch.ones(20), 1e-6).eq(0).all()


@needs_compiler
def test_not_supported():
    x, weight = random(3, 4, 8), random(8)
    assert not supports_rms_norm(x.double(), weight.double())
    assert not supports_rms_norm(x, weight.bfloat16())
    assert not supports_rms_norm(x.transpose(0, 1), weight)
    assert not supports_rms_norm(x.transpose(1, 2), random(4))
    assert not supports_rms_norm(x, torch.nn.Parameter(weight))
    assert not supports_add_rms_norm(x, x.transpose(0, 1).contiguous().transpose(0, 1), weight)
    assert not supports_add_rms_norm(x, x[:1], weight) and not supports_add_rms_norm(x, x.bfloat16(), weight)
    assert not supports_swiglu(x, x[:, :3])
    assert not supports_swiglu(x[..., ::2], x[..., ::2])


@pytest.mark.parametrize("layout", KINDS_OF_INPUT, ids=str)
@pytest.mark.parametrize("kind", ["dense", "moe"])
@torch.no_grad()
def test_logits_and_names(kind, layout):
    pair, technique = make_pair(kind), KernelFusion()
    inputs = make_inputs(layout, ["text:4"])
    keep = valid_positions(inputs)
    before = pair.ours(**inputs).logits
    names = {name: value.clone() for name, value in pair.ours.state_dict().items()}
    technique.apply(pair.ours)
    assert_close(pair.ours(**inputs).logits[keep], stock_forward(pair.stock, **inputs).logits[keep], 2e-5, "logits")
    assert all(torch.equal(value, names.pop(name)) for name, value in pair.ours.state_dict().items()) and not names
    technique.revert(pair.ours)
    assert torch.equal(pair.ours(**inputs).logits, before)
    assert not any("forward" in vars(module) for module in pair.ours.modules())
    storages = {p.untyped_storage().data_ptr() for p in pair.ours.parameters()}
    assert len(storages) == len({p.data_ptr() for p in pair.ours.parameters()}), "parameters lie apart again"


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}],
    ids=["greedy", "beams", "sampling"],
)
@pytest.mark.parametrize("layout", KINDS_OF_INPUT, ids=str)
def test_same_tokens_as_stock(layout, options, monkeypatch):
    pair, used = make_pair("dense"), []
    spied = kernel_fusion.FusedProducts._part
    monkeypatch.setattr(kernel_fusion.FusedProducts, "_part", lambda *x: used.append(spied(*x)) or used[-1])
    inputs = make_inputs(layout, ["text:4"])
    options = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5, **options}
    for technique in (DecodeLinear(), KernelFusion(), FasterRotaryEmbeddings()):
        technique.apply(pair.ours)
    torch.manual_seed(0)
    ours = pair.ours.generate(**inputs, **options)
    torch.manual_seed(0)
    assert torch.equal(ours, pair.stock.generate(**inputs, **options))
    assert any(part is not None for part in used), "no product was fused"


@needs_compiler
@torch.no_grad()
def test_each_layer_sums_and_norms_at_once_unless_someone_hooks_the_norm(monkeypatch):
    model, inputs, calls = make_pair("dense").ours, make_inputs(["text:5"]), []
    layers = model.model.language_model.layers
    spied = kernel_fusion.native_add_rms_norm
    monkeypatch.setattr(kernel_fusion, "native_add_rms_norm", lambda *x: calls.append(x) or spied(*x))
    expected = model(**inputs, output_hidden_states=True)
    KernelFusion(products=False).apply(model)
    actual = model(**inputs, output_hidden_states=True)
    assert len(calls) == len(layers)
    for ours, theirs in zip(actual.hidden_states, expected.hidden_states, strict=True):
        assert_close(ours, theirs, 2e-5, "hidden states")
    seen = []
    handle = layers[0].post_attention_layernorm.register_forward_hook(lambda *x: seen.append(x))
    assert_close(model(**inputs).logits, expected.logits, 2e-5, "logits")
    assert len(seen) == 1 and len(calls) == 2 * len(layers) - 1
    handle.remove()


@torch.no_grad()
def test_memory_is_not_doubled():
    model = make_pair("dense").ours
    KernelFusion().apply(model)
    module = attention(model)
    storages = {getattr(module, name).weight.untyped_storage().data_ptr() for name in ("q_proj", "k_proj", "v_proj")}
    assert len(storages) == 1
    size = module.q_proj.weight.untyped_storage().nbytes()
    assert size == sum(getattr(module, name).weight.nbytes for name in ("q_proj", "k_proj", "v_proj"))


@torch.no_grad()
def test_a_written_parameter_counts():
    model, x = make_pair("dense", text={"attention_bias": True}).ours, random(1, 2, 48)
    KernelFusion().apply(model)
    module = attention(model)
    module.k_proj.weight.mul_(2.0)
    module.v_proj.bias.add_(1.0)
    module.q_proj(x)
    assert_close(module.k_proj(x), F.linear(x, module.k_proj.weight, module.k_proj.bias), what="keys")
    assert_close(module.v_proj(x), F.linear(x, module.v_proj.weight, module.v_proj.bias), what="values")


@torch.no_grad()
def test_parts_belong_to_their_input():
    model, first, second = make_pair("dense").ours, random(1, 2, 48), random(1, 2, 48, seed=1)
    KernelFusion().apply(model)
    module = attention(model)
    module.q_proj(first)
    assert_close(module.k_proj(second), F.linear(second, module.k_proj.weight), what="keys of another input")
    module.q_proj(first)
    first.mul_(3.0)
    assert_close(module.k_proj(first), F.linear(first, module.k_proj.weight), what="keys of a changed input")
    assert_close(module.v_proj(first), F.linear(first, module.v_proj.weight), what="values asked for alone")


@torch.no_grad()
def test_cast_copied_and_pickled_models_stay_right(tmp_path):
    model, inputs = make_pair("dense").ours, make_inputs(["text:1"])
    KernelFusion().apply(model)
    expected = model(**inputs).logits
    copied = copy.deepcopy(model)
    assert_close(copied(**inputs).logits, expected, what="logits of a copy")
    attention(copied).v_proj.weight.zero_()  # of one token, which sees itself alone, values are all that counts
    assert max_difference(copied(**inputs).logits, expected) > 1e-3
    assert_close(model(**inputs).logits, expected, what="logits of the original")
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert_close(loaded(**inputs).logits, expected, what="logits of a pickle")
    model.to(torch.bfloat16)
    assert max_difference(model(**inputs).logits.float(), expected) < 0.3
    assert model(**inputs).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_saving_while_fused_gives_the_official_checkpoint(kind, tmp_path):
    model, technique = make_pair(kind).ours, KernelFusion()
    model.save_pretrained(tmp_path / "plain")
    technique.apply(model)
    model.save_pretrained(tmp_path / "fused")
    plain, fused = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "fused"))
    assert plain.keys() == fused.keys()
    assert all(torch.equal(plain[name], fused[name]) for name in plain)
    assert (tmp_path / "fused/model.safetensors").stat().st_size == (
        tmp_path / "plain/model.safetensors"
    ).stat().st_size


@torch.no_grad()
def test_from_profile(tmp_path):
    pair = make_pair("dense")
    pair.ours.config.optim = {"kernel_fusion": {}}
    pair.ours.save_pretrained(tmp_path)
    loaded = type(pair.ours).from_pretrained(tmp_path)
    inputs = make_inputs(["text:2", "image:4x6"])
    assert "forward" in vars(attention(loaded).q_proj)
    assert_close(loaded(**inputs).logits, stock_forward(pair.stock, **inputs).logits, 2e-5, "logits")


def test_training_takes_the_plain_way():
    pair, inputs = make_pair("dense"), make_inputs(["text:7"])
    KernelFusion().apply(pair.ours)
    for model in (pair.ours, pair.stock):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    for name, parameter in pair.stock.named_parameters():
        if parameter.grad is not None:
            assert_close(pair.ours.get_parameter(name).grad, parameter.grad, 1e-4, f"gradients of {name}")


def test_adapters_work_on_fused_layers_and_refuse_before():
    peft = pytest.importorskip("peft")
    targets = peft.LoraConfig(target_modules=["q_proj", "v_proj", "gate_proj"], r=2)
    inputs = make_inputs(["text:1"])
    pair = make_pair("dense")
    KernelFusion().apply(pair.ours)
    adapted = peft.get_peft_model(pair.ours, targets)
    with torch.no_grad():
        assert_close(adapted(**inputs).logits, stock_forward(pair.stock, **inputs).logits, 2e-5, "logits")
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
        changed = adapted(**inputs).logits
        assert max_difference(changed, stock_forward(pair.stock, **inputs).logits) > 1e-2
        assert_close(adapted.merge_and_unload()(**inputs).logits, changed, 1e-4, "logits of merged adapters")
    wrapped = peft.get_peft_model(make_pair("dense").ours, targets)
    with pytest.raises(
        ValueError, match="q_proj is a Linear, no plain linear layer; apply it before adapters"
    ) as error:
        KernelFusion().apply(wrapped)
    one_line(error.value)


def test_bad_input():
    with pytest.raises(ValueError, match="kernel_fusion has no setting 'qkv'"):
        KernelFusion(qkv=True)
    with pytest.raises(ValueError, match="does nothing; leave it away"):
        KernelFusion(products=False, passes=False)
    with pytest.raises(ValueError, match="found nothing to fuse in Linear"):
        KernelFusion().apply(torch.nn.Linear(2, 2))
    model, technique = make_pair("dense").ours, KernelFusion()
    attention(model, 1).k_proj.to(torch.bfloat16)
    with pytest.raises(ValueError, match="weights differ in dtype") as error:
        technique.apply(model)
    one_line(error.value)
    assert not any("forward" in vars(module) for module in model.modules()), "nothing was changed"
    attention(model, 1).k_proj.to(torch.float32)
    technique.apply(model)
    with pytest.raises(ValueError, match="already applied"):
        technique.apply(model)
    technique.revert(model)


@torch.no_grad()
def test_without_a_compiler(monkeypatch):
    pair, inputs = make_pair("dense"), make_inputs(["text:1"])
    monkeypatch.setattr(native_fused, "fused_kernels", lambda: None)
    monkeypatch.setattr(kernel_fusion, "supports_linear", lambda *x: False)
    KernelFusion().apply(pair.ours)
    assert_close(pair.ours(**inputs).logits, stock_forward(pair.stock, **inputs).logits, what="logits")
