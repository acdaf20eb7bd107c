"""Folders of packed models: loaded by ours, by stock with torchao, and refused by stock without."""

import json

import pytest
import torch
from helpers import make_inputs, make_pair, max_difference, stock_class

from qwen3_vl import AdaptivePrecision
from qwen3_vl.optim.weights import precision_saving
from qwen3_vl.optim.weights.precision_saving import PackedQuantizer, packed_weights
from qwen3_vl.optim.weights.quantized_linear import PackedEmbedding, PackedLinear


pytest.importorskip("torchao")
INPUTS = (["text:5", "image:4x6", "text:3"], ["text:4"])


@torch.no_grad()
def logits_of(model, inputs):
    return model(**inputs).logits


def packed_model(kind="dense", tied=False, **settings):
    model = make_pair(kind, tie_word_embeddings=tied).ours
    technique = AdaptivePrecision(**settings)
    technique.apply(model)
    return model, technique


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("tied, embedding", [(False, None), (False, 8), (True, None), (True, 16)])
def test_from_pretrained_gives_the_same_model(kind, tied, embedding, bits, tmp_path):
    model, technique = packed_model(kind, tied, bits=bits, embedding=embedding)
    inputs = make_inputs(*INPUTS)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(logits_of(loaded, inputs), logits_of(model, inputs))
    assert packed_weights(loaded).keys() == packed_weights(model).keys()
    shared = tied and embedding is None
    assert (getattr(loaded.get_input_embeddings(), "matrix", None) is loaded.lm_head.matrix) == shared
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "torchao"
    assert [path.suffix for path in tmp_path.glob("*.*") if path.name.startswith("model")] == [".safetensors"]
    technique.revert(model)
    assert "quantization_config" not in model.config.to_dict()


def test_several_files(tmp_path):
    model, _ = packed_model(tied=True, bits=4)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    loaded = type(model).from_pretrained(tmp_path)
    inputs = make_inputs(*INPUTS)
    assert torch.equal(logits_of(loaded, inputs), logits_of(model, inputs))


def test_saved_again_and_plain_weights_back(tmp_path):
    model, _ = packed_model(bits=4)
    inputs = make_inputs(*INPUTS)
    model.save_pretrained(tmp_path / "first")
    loaded = type(model).from_pretrained(tmp_path / "first")
    loaded.save_pretrained(tmp_path / "second")
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "second"))
    assert len(first) == len(second)
    again = type(model).from_pretrained(tmp_path / "second")
    assert torch.equal(logits_of(again, inputs), logits_of(model, inputs))
    with pytest.raises(ValueError, match=r"did not pack.*loaded packed, call model.dequantize\(\)"):
        AdaptivePrecision().revert(again)
    again.dequantize()
    assert not packed_weights(again) and type(again.lm_head) is torch.nn.Linear
    assert max_difference(logits_of(again, inputs), logits_of(model, inputs)) < 2e-3
    again.save_pretrained(tmp_path / "plain")
    stock = stock_class("dense", "ForConditionalGeneration").from_pretrained(tmp_path / "plain")
    assert max_difference(logits_of(stock, inputs), logits_of(again, inputs)) < 1e-4


@pytest.mark.parametrize("tied", [False, True])
def test_stock_with_torchao_reads_int8(tied, tmp_path):
    model, _ = packed_model(tied=tied, bits=8)
    model.save_pretrained(tmp_path)
    stock = stock_class("dense", "ForConditionalGeneration").from_pretrained(tmp_path)
    assert type(stock.lm_head.weight.data).__name__ == "Int8Tensor"
    inputs = make_inputs(*INPUTS)
    expected = logits_of(model, inputs)
    assert max_difference(logits_of(stock, inputs), expected) < 2e-3 * expected.abs().max()


@pytest.mark.parametrize("kind, bits", [("dense", 4), ("moe", 8)])
def test_stock_fails_where_torchao_has_no_cpu_kernel(kind, bits, tmp_path):
    """It raises; it never computes with weights that are not there."""
    model, _ = packed_model(kind, bits=bits)
    model.save_pretrained(tmp_path)
    stock = stock_class(kind, "ForConditionalGeneration").from_pretrained(tmp_path)
    with pytest.raises((NotImplementedError, AttributeError)):
        logits_of(stock, make_inputs(*INPUTS))


def test_profile(tmp_path):
    pair = make_pair("dense")
    pair.ours.save_pretrained(tmp_path / "plain")
    loaded = type(pair.ours).from_pretrained(tmp_path / "plain", optim={"adaptive_precision": {"bits": 4}})
    assert isinstance(loaded.lm_head, PackedLinear)
    loaded.save_pretrained(tmp_path / "packed")
    again = type(pair.ours).from_pretrained(tmp_path / "packed")  # the profile finds the weights packed
    inputs = make_inputs(*INPUTS)
    assert torch.equal(logits_of(again, inputs), logits_of(loaded, inputs))
    assert isinstance(again.hf_quantizer, PackedQuantizer) and again.hf_quantizer.from_folder
    assert again.config.optim == {"adaptive_precision": {"bits": 4}}
    loaded.active_techniques[0].revert(loaded)
    assert torch.equal(logits_of(loaded, inputs), logits_of(pair.ours, inputs))


def test_weights_that_torchao_quantized_are_adopted(tmp_path):
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    pair = make_pair("dense")
    pair.ours.save_pretrained(tmp_path)
    loaded = type(pair.ours).from_pretrained(
        tmp_path, quantization_config=TorchAoConfig(Int8WeightOnlyConfig(version=2))
    )
    assert isinstance(loaded.model.language_model.layers[0].self_attn.q_proj, PackedLinear)
    inputs = make_inputs(*INPUTS)
    expected = logits_of(pair.ours, inputs)
    assert max_difference(logits_of(loaded, inputs), expected) < 0.05 * expected.abs().max()


def test_without_torchao_saving_says_so(tmp_path, monkeypatch):
    model, _ = packed_model()
    monkeypatch.setattr(precision_saving, "is_torchao_available", lambda: False)
    with pytest.raises(ImportError, match=r"saving packed weights needs torchao.*qwen3-vl\[quant\]"):
        model.save_pretrained(tmp_path)


def test_the_embedding_alone(tmp_path):
    model, _ = packed_model(bits=16, vision=16, mergers=16, embedding=8)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert isinstance(loaded.get_input_embeddings(), PackedEmbedding) and list(packed_weights(loaded)) == [
        "model.language_model.embed_tokens.weight"
    ]


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_experts_become_plain_ones(bits, tmp_path):
    model, _ = packed_model("moe", bits=bits, originals="drop")
    inputs = make_inputs(*INPUTS)
    before = logits_of(model, inputs)
    model.save_pretrained(tmp_path / "packed")
    for one in (model, type(model).from_pretrained(tmp_path / "packed")):
        one.dequantize()
        assert not packed_weights(one)
        assert max_difference(logits_of(one, inputs), before) < 2e-3
    one.save_pretrained(tmp_path / "plain")
    stock = stock_class("moe", "ForConditionalGeneration").from_pretrained(tmp_path / "plain")
    assert max_difference(logits_of(stock, inputs), logits_of(one, inputs)) < 1e-4
