"""Layers of bitsandbytes: what is refused, and on a CPU, where the package computes too, that all else fits."""

import pytest
import torch
from helpers import make_inputs, make_pair, max_difference, one_line

from qwen3_vl import AdaptivePrecision
from qwen3_vl.optim.weights import adaptive_precision, precision_bitsandbytes


INPUTS = (["text:5", "image:4x6", "text:3"], ["text:4"])
# What its kernels for a CPU take, in blocks of 64.
SIZES = {
    "text": {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32},
    "vision": {"hidden_size": 64, "intermediate_size": 128, "out_hidden_size": 64},
}


@torch.no_grad()
def logits_of(model, inputs):
    return model(**inputs).logits


@pytest.fixture
def on_a_cpu(monkeypatch):
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(adaptive_precision, "require_bitsandbytes", lambda model: None)


@pytest.mark.parametrize("bits, allowed", [(8, 0.05), (4, 0.5)])
@pytest.mark.parametrize("tied", [False, True])
def test_applied_saved_and_reverted(bits, allowed, tied, on_a_cpu, tmp_path):
    model, inputs = make_pair("dense", tie_word_embeddings=tied, **SIZES).ours, make_inputs(*INPUTS)
    before = logits_of(model, inputs)
    technique = AdaptivePrecision(bits=bits, backend="bitsandbytes", vision=16)
    technique.apply(model)
    packed = logits_of(model, inputs)
    assert 0 < max_difference(packed, before) < allowed * before.abs().max()
    name = "Linear8bitLt" if bits == 8 else "Linear4bit"
    assert type(model.lm_head).__name__ == type(model.model.visual.merger.linear_fc1).__name__ == name
    assert type(model.model.visual.blocks[0].mlp.linear_fc1) is torch.nn.Linear
    assert "of bitsandbytes" in technique.describe(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert type(loaded.lm_head).__name__ == name
    # Its four-bit kernel for a CPU computes in bfloat16, and orders the codes anew at its first use.
    assert max_difference(logits_of(loaded, inputs), packed) < (1e-5 if bits == 8 else 0.03 * packed.abs().max())
    with pytest.raises(ValueError, match="packed or quantized already"):
        AdaptivePrecision().apply(loaded)
    technique.revert(model)
    assert torch.equal(logits_of(model, inputs), before)
    assert not {"hf_quantizer", f"is_loaded_in_{bits}bit"} & set(vars(model))
    assert "quantization_config" not in model.config.to_dict()


def test_trains_adapters_and_generates(on_a_cpu):
    peft = pytest.importorskip("peft")
    model, inputs = make_pair("dense", **SIZES).ours, make_inputs(["text:4"])
    AdaptivePrecision(bits=4, backend="bitsandbytes").apply(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2)).train()
    adapted(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(p.grad is not None for name, p in adapted.named_parameters() if "lora_B" in name)
    output = adapted.eval().generate(**inputs, do_sample=False, max_new_tokens=3, min_new_tokens=3)
    assert output.shape[1] == inputs["input_ids"].shape[1] + 3


def test_experts_are_not_left_silently(on_a_cpu):
    model, inputs = make_pair("moe").ours, make_inputs(["text:4"])
    with pytest.raises(ValueError, match="no layers for sparse experts; leave them by experts=16") as error:
        AdaptivePrecision(backend="bitsandbytes").apply(model)
    one_line(error.value)
    technique = AdaptivePrecision(backend="bitsandbytes", experts=16)
    technique.apply(model)
    assert logits_of(model, inputs).isfinite().all()
    technique.revert(model)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"bits": 16}, "bits must be 4 or 8"),
        ({"bits": 4, "vision": 8}, "vision must be 4 or 16, got 8"),
        ({"bits": 8, "embedding": 8}, "embedding must be 16, got 8"),
        ({"bits": 8, "layers": {"lm_head": 4}}, "lm_head must be 8 or 16, got 4"),
        ({"backend": "hqq"}, "backend must be one of 'packed', 'bitsandbytes'"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message) as error:
        AdaptivePrecision(**{"backend": "bitsandbytes", **settings})
    one_line(error.value)


def test_refused_without_the_package_and_without_a_gpu(monkeypatch):
    model, technique = make_pair("dense").ours, AdaptivePrecision(backend="bitsandbytes")
    with pytest.raises(ValueError, match="calibrate chooses among forms of backend='packed'"):
        technique.calibrate(model, [], 1)
    monkeypatch.setattr(precision_bitsandbytes, "is_bitsandbytes_available", lambda: True)
    with pytest.raises(ValueError, match="needs the model on a GPU and it lies on cpu") as error:
        technique.apply(model)
    one_line(error.value)
    monkeypatch.setattr(precision_bitsandbytes, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(ImportError, match="pip install bitsandbytes") as error:
        technique.apply(model)
    one_line(error.value)
    assert type(model.lm_head) is torch.nn.Linear
