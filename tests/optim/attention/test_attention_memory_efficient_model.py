"""Chunked attention in the model: prefill, decoding, training, adapters, and taking it off again."""

import copy

import pytest
import torch
from helpers import assert_close, make_inputs, make_pair, valid_positions, without
from transformers import DynamicCache, StaticCache

from qwen3_vl.optim.attention.attention_memory_efficient import (
    NAME,
    MemoryEfficientAttention,
    MemoryEfficientSettings,
)


LAYOUTS = (["text:3", "image:4x6", "text:9"], ["text:5", "video:2x4x4", "text:3"], ["text:30"])


@pytest.fixture
def models():
    """A model with sdpa and its copy with small chunks everywhere."""
    plain = make_pair("dense").ours
    chunked = copy.deepcopy(plain)
    MemoryEfficientAttention(query_chunk=4, key_chunk=6).apply(chunked)
    return plain, chunked


@pytest.mark.parametrize("padding", ["left", "right"])
@torch.no_grad()
def test_logits(models, padding):
    plain, chunked = models
    inputs = make_inputs(*LAYOUTS, padding=padding)
    keep = valid_positions(inputs)
    assert_close(chunked(**inputs).logits[keep], plain(**inputs).logits[keep], 5e-5, "logits")


@torch.no_grad()
def test_chunked_prefill_and_decoding(models):
    plain, chunked = models
    inputs = make_inputs(["text:9", "image:4x6", "text:11"])
    expected = plain(**inputs).logits
    cache, seen, parts = DynamicCache(config=chunked.config.text_config), 0, []
    for stop in (21, 26, 27, expected.shape[1]):
        part = {"input_ids": inputs["input_ids"][:, seen:stop], "past_key_values": cache}
        if seen == 0:
            part |= {name: inputs[name] for name in ("pixel_values", "image_grid_thw")}
        parts.append(chunked(**part).logits)
        seen = stop
    assert_close(torch.cat(parts, 1), expected, 5e-5, "logits")


def test_generate(models):
    """Greedy, padded, on a growing and on a preallocated cache."""
    plain, chunked = models
    inputs = make_inputs(*LAYOUTS)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    expected = plain.generate(**inputs, **options)
    assert torch.equal(chunked.generate(**inputs, **options), expected)
    cache = StaticCache(config=chunked.config.text_config, max_cache_len=64)
    assert torch.equal(chunked.generate(**inputs, **options, past_key_values=cache), expected)


def test_packed_rows_in_the_model(models):
    plain = models[0]
    ids = torch.randint(10, 140, (1, 20), generator=torch.Generator().manual_seed(0))
    starts = torch.cat([torch.arange(7), torch.arange(13)])[None]
    position_ids = starts.expand(4, -1, -1)
    with torch.no_grad():
        logits = [model(ids, position_ids=position_ids, use_cache=False).logits for model in models]
        alone = plain(ids[:, 7:], use_cache=False).logits
    assert_close(logits[1], logits[0], 5e-5, "logits")
    assert_close(logits[1][:, 7:], alone, 5e-5, "the second sequence's logits")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_step(models, checkpointing):
    inputs = make_inputs(*LAYOUTS[:2], padding="right")
    labels = inputs["input_ids"].masked_fill(~valid_positions(inputs), -100)
    gradients = []
    for model in models:
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(**inputs, labels=labels).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert_close(gradients[1][name], gradient, 1e-4, f"gradients of {name}")


def test_attention_weights_asked_of_the_model(models):
    inputs = make_inputs(["text:6"])
    with pytest.raises(ValueError, match="output_attentions"):
        models[1](**inputs, output_attentions=True)


@torch.no_grad()
def test_by_name_in_parts(models):
    plain, _ = models
    inputs = make_inputs(["text:3", "image:4x6", "text:9"])
    expected = plain(**inputs).logits
    for part in ("text_config", "vision_config"):
        plain.set_attn_implementation({part: NAME})
        assert getattr(plain.config, part)._attn_implementation == NAME
        assert_close(plain(**inputs).logits, expected, 5e-5, "logits")
        plain.set_attn_implementation("sdpa")


@torch.no_grad()
def test_autocast(models):
    plain, chunked = models
    inputs = without(make_inputs(["text:12"]), "mm_token_type_ids")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual, expected = chunked(**inputs).logits, plain(**inputs).logits
    assert_close(actual, expected, 0.1, "logits under autocast")


@torch.no_grad()
def test_apply_and_revert(pair):
    model = pair.ours
    inputs = make_inputs(["text:3", "image:4x6", "text:9"])
    model.set_attn_implementation({"vision_config": "eager"})
    before = model(**inputs).logits
    technique = MemoryEfficientAttention(config=model.config, query_chunk=8)
    technique.apply(model)
    attention = model.model.language_model.layers[0].self_attn
    assert attention.attention_settings[NAME] == MemoryEfficientSettings(query_chunk=8)
    assert model.config.text_config._attn_implementation == NAME
    assert_close(model(**inputs).logits, before, 5e-5, "logits")
    technique.revert(model)
    assert model.config.text_config._attn_implementation == "sdpa"
    assert model.config.vision_config._attn_implementation == "eager"
    assert not hasattr(attention, "attention_settings")
    assert torch.equal(model(**inputs).logits, before)


@torch.no_grad()
def test_under_an_adapter():
    """Applied to the wrapped model, as a user of PEFT holds it."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False)
    model = peft.get_peft_model(make_pair("dense").ours, config).eval()
    inputs = make_inputs(["text:3", "image:4x6", "text:9"], ["text:5"])
    keep = valid_positions(inputs)
    before = model(**inputs).logits
    technique = MemoryEfficientAttention(query_chunk=4, key_chunk=4)
    technique.apply(model)
    assert_close(model(**inputs).logits[keep], before[keep], 5e-5, "logits")
    assert not torch.equal(model(**inputs).logits[keep], before[keep])
    technique.revert(model)
    assert torch.equal(model(**inputs).logits, before)
