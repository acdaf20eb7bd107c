"""`qwen3_vl_exact`: the definition, the stock model's tokens, and everything around a plain `generate()`."""

import copy
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from helpers import assert_close, make_inputs, make_pair, max_difference, valid_positions
from reference import ALL_CASES, AttentionCase, assert_matches, dense_mask_of, dense_reference, inputs_of, layout_of
from transformers import DynamicCache, StaticCache

import qwen3_vl
from qwen3_vl.optim.attention import attention_kernels
from qwen3_vl.optim.attention.attention_exact import FlashAttention2, exact_attention_forward
from qwen3_vl.optim.attention.attention_kernels import attend_blocks, attend_decode


NAME = "qwen3_vl_exact"
LAYOUTS = {
    "text": [["text:9"]],
    "image": [["text:5", "image:4x6", "text:3"]],
    "images": [["text:2", "image:4x4", "text:2", "image:6x4", "text:3"]],
    "video": [["text:3", "video:2x4x4", "text:4"]],
    "left-padded": [["text:5", "image:4x6", "text:3"], ["text:4"], ["image:4x4", "text:12"]],
}


@pytest.fixture(params=["native", "plain"])
def kernels(request, monkeypatch):
    """Both sides of the door: our kernels, and PyTorch where there is no compiler."""
    if request.param == "plain":
        monkeypatch.setattr(attention_kernels, "supports", lambda *_: False)
    return request.param


@pytest.fixture(scope="module", params=["dense", "moe"])
def pair(request):
    return make_pair(request.param)


def inputs_for(name):
    return make_inputs(*LAYOUTS[name])


def call(case, tensors, mask, **kwargs):
    module = SimpleNamespace(is_causal=case.causal, config=None)
    return exact_attention_forward(module, *tensors, mask, scaling=case.scaling, **kwargs)[0]


@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_matches_float64(case, kernels):
    tensors = inputs_of(case)
    assert_matches(call(case, tensors, layout_of(case)), dense_reference(*tensors, layout_of(case)))


@pytest.mark.parametrize("case", [case for case in ALL_CASES if case.dtype == torch.float32], ids=str)
def test_gradients_match_float64(case):
    tensors = inputs_of(case, requires_grad=True)
    doubles = [x.detach().double().requires_grad_() for x in tensors]
    output, expected = call(case, tensors, layout_of(case)), dense_reference(*doubles, layout_of(case))
    weights = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    (output.double() * weights).sum().backward()
    (expected * weights).sum().backward()
    for ours, reference in zip(tensors, doubles, strict=True):
        assert_close(ours.grad.double(), reference.grad, 1e-4)


def test_dense_masks_are_taken():
    case = AttentionCase(batch=4, queries=7, past=20, padding="left")
    tensors, mask = inputs_of(case), dense_mask_of(AttentionCase(batch=4, queries=7, past=20, padding="left"))
    expected = dense_reference(*tensors, mask)
    assert_matches(call(case, tensors, mask), expected)
    additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    seen = mask.any(-1).transpose(1, 2)[..., None]
    assert_matches(call(case, tensors, additive) * seen, expected * seen)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_equal_stock(pair, layout, kernels):
    inputs = inputs_for(layout)
    pair.ours.set_attn_implementation(NAME)
    with torch.no_grad():
        ours, stock = pair.ours(**inputs).logits, pair.stock(**inputs).logits
    real = valid_positions(inputs)
    assert_close(ours[real], stock[real], 1e-5)


CACHES = {
    "dynamic": DynamicCache,
    "paged": qwen3_vl.PagedKVCache,
    "small pages": lambda: qwen3_vl.PagedKVCache(page_tokens=4),
}
MODES = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 1.5},
    "beams": {"do_sample": False, "num_beams": 3},
    "several": {"do_sample": True, "num_return_sequences": 2},
    "chunked prefill": {"do_sample": False, "prefill_chunk_size": 6},
}


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", ["image", "video", "left-padded"])
def test_generate_equals_stock(pair, layout, mode, cache, kernels):
    inputs, settings = inputs_for(layout), {"max_new_tokens": 9, "min_new_tokens": 9, **MODES[mode]}
    pair.ours.set_attn_implementation(NAME)
    torch.manual_seed(5)
    expected = pair.stock.generate(**inputs, **settings)
    torch.manual_seed(5)
    assert torch.equal(pair.ours.generate(**inputs, **settings, past_key_values=CACHES[cache]()), expected)


def test_static_cache(pair):
    inputs = inputs_for("left-padded")
    pair.ours.set_attn_implementation(NAME)
    settings = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False}
    expected = pair.stock.generate(**inputs, **settings)
    assert torch.equal(pair.ours.generate(**inputs, **settings, cache_implementation="static"), expected)
    cache = StaticCache(config=pair.ours.config.text_config, max_cache_len=64)
    assert torch.equal(pair.ours.generate(**inputs, **settings, past_key_values=cache), expected)


def test_assisted_decoding(pair):
    inputs = inputs_for("image")
    pair.ours.set_attn_implementation(NAME)
    settings = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False, "prompt_lookup_num_tokens": 3}
    assert torch.equal(pair.ours.generate(**inputs, **settings), pair.stock.generate(**inputs, **settings))


def test_packed_rows_equal_rows_alone(pair):
    pair.ours.set_attn_implementation(NAME)
    ids = torch.randint(3, 140, (1, 20), generator=torch.Generator().manual_seed(0))
    starts = (0, 7, 12, 20)
    plain = torch.cat([torch.arange(b - a) for a, b in pairwise(starts)])
    with torch.no_grad():
        packed = pair.ours(input_ids=ids, position_ids=plain.expand(4, 1, -1), use_cache=False).logits
        alone = [pair.stock(input_ids=ids[:, a:b]).logits for a, b in pairwise(starts)]
    assert_close(packed, torch.cat(alone, dim=1), 1e-5)


def test_dictionary_of_implementations(pair):
    pair.ours.set_attn_implementation({"text_config": NAME, "vision_config": "eager"})
    assert pair.ours.config.text_config._attn_implementation == NAME
    assert pair.ours.config.vision_config._attn_implementation == "eager"
    inputs = inputs_for("image")
    with torch.no_grad():
        assert_close(pair.ours(**inputs).logits, pair.stock(**inputs).logits, 1e-5)


def test_apply_and_revert_leave_the_logits_as_they_were(pair):
    pair.ours.set_attn_implementation({"text_config": "sdpa", "vision_config": "eager"})
    inputs, technique = inputs_for("image"), FlashAttention2()
    with torch.no_grad():
        before = pair.ours(**inputs).logits
        technique.apply(pair.ours)
        assert pair.ours.config.text_config._attn_implementation == NAME
        pair.ours(**inputs)
        technique.revert(pair.ours)
        assert pair.ours.config.vision_config._attn_implementation == "eager"
        assert torch.equal(pair.ours(**inputs).logits, before)
    assert not any(hasattr(module, "attention_settings") for module in pair.ours.modules())
    pair.ours.set_attn_implementation("sdpa")


def test_from_pretrained_by_name_and_by_profile(pair, tmp_path):
    pair.stock.save_pretrained(tmp_path)
    inputs = inputs_for("image")
    by_name = type(pair.ours).from_pretrained(tmp_path, attn_implementation=NAME).eval()
    by_profile = type(pair.ours).from_pretrained(tmp_path, optim={NAME: {}}).eval()
    assert {x.config.text_config._attn_implementation for x in (by_name, by_profile)} == {NAME}
    with torch.no_grad():
        assert torch.equal(by_name(**inputs).logits, by_profile(**inputs).logits)


def test_training_step_equals_stock(pair):
    inputs = inputs_for("left-padded")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    pair.ours.set_attn_implementation(NAME)
    for model in (pair.ours, pair.stock):
        model.zero_grad()
        model(**inputs, labels=labels, use_cache=False).loss.backward()
    stock = dict(pair.stock.named_parameters())
    worst = max(
        max_difference(p.grad, stock[name].grad) for name, p in pair.ours.named_parameters() if p.grad is not None
    )
    assert worst <= 1e-4
    pair.ours.zero_grad()
    pair.stock.zero_grad()


def test_gradient_checkpointing_equals_none(pair):
    model, inputs = copy.deepcopy(pair.ours).train(), inputs_for("left-padded")
    model.set_attn_implementation(NAME)
    losses = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
        losses.append(model.lm_head.weight.grad.clone())
    assert torch.equal(*losses)


def test_compiled_forward(pair):
    pair.ours.set_attn_implementation(NAME)
    inputs = make_inputs(["text:9"], ["text:5"])
    with torch.no_grad():
        expected = pair.stock(**inputs, use_cache=False).logits
        compiled = torch.compile(pair.ours, backend="eager")(**inputs, use_cache=False).logits
    real = valid_positions(inputs)
    assert_close(compiled[real], expected[real], 1e-5)


def test_attention_weights_are_refused(pair):
    pair.ours.set_attn_implementation(NAME)
    with pytest.raises(ValueError, match=r"output_attentions=True was asked of 'qwen3_vl_exact'.*'eager'"):
        pair.ours(**inputs_for("text"), output_attentions=True)


def test_dropout_is_applied():
    case = AttentionCase(queries=64)
    tensors = inputs_of(case)
    torch.manual_seed(0)
    dropped = call(case, tensors, layout_of(case), dropout=0.5)
    assert max_difference(dropped, call(case, tensors, layout_of(case))) > 0.1


@pytest.mark.parametrize("shape", [(4, 26), (1, 27), (4, 1, 5, 27), (4, 1, 7, 20)])
def test_a_mask_of_a_wrong_shape_is_refused(shape):
    case = AttentionCase(batch=4, queries=7, past=20)
    with pytest.raises(ValueError, match="does not fit 7 queries and 27 keys of 4 rows"):
        call(case, inputs_of(case), torch.ones(shape, dtype=torch.bool))


def test_maps_that_do_not_cover_the_keys_are_refused():
    from qwen3_vl.optim.attention.block_map import BlockMap, PageMap

    case = AttentionCase(queries=64, past=64)
    tensors, layout = inputs_of(case), layout_of(case)
    with pytest.raises(ValueError, match="does not cover"):
        attend_blocks(*tensors, layout, 1.0, BlockMap(torch.ones(1, 1, 1, 1, dtype=torch.bool), 64, 64))
    with pytest.raises(ValueError, match="does not cover"):
        attend_decode(*tensors, layout, 1.0, PageMap(torch.ones(1, 1, 1, dtype=torch.bool), 64))


def test_unknown_setting():
    with pytest.raises(ValueError, match="qwen3_vl_exact has no setting 'speed'"):
        FlashAttention2(speed=9)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", [case for case in ALL_CASES if case.dtype == torch.bfloat16], ids=str)
def test_matches_float64_on_a_gpu(case):
    tensors = inputs_of(case)
    layout = layout_of(case)
    output = call(case, [x.cuda() for x in tensors], None if layout is None else layout.to("cuda"))
    assert_matches(output.cpu(), dense_reference(*tensors, layout))
