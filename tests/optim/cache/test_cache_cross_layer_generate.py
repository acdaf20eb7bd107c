"""`generate()` on the cache whose layers share, against `DynamicCache`, where layers are equal, alike and random."""

import threading

import pytest
import torch
from helpers import assert_close, clone_inputs, concat_turns, make_inputs, make_pair, max_difference
from transformers import DynamicCache

from qwen3_vl import CrossLayerKVCache
from qwen3_vl.optim.cache import cache_cross_layer
from qwen3_vl.optim.cache.cache_cross_layer import CrossLayerCache


SMALL = {"page_tokens": 4, "residual_tokens": 3}
PROMPTS = {
    "text": [["text:90"]],
    "images_and_video": [["text:2", "image:8x12", "text:50", "video:2x4x4", "image:2x6", "text:2"]],
    "left_padded": [["text:2", "image:4x6", "text:74"], ["text:60"], ["text:1", "video:2x4x4", "text:9", "image:2x2"]],
}
MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.3, "top_k": 30},
    "several_sequences": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3},
    "chunked_prefill": {"prefill_chunk_size": 29},
    "chunked_prefill_and_beams": {"prefill_chunk_size": 13, "num_beams": 2},
}
OF_KEYS_AND_VALUES = ("self_attn.k_proj", "self_attn.v_proj", "self_attn.k_norm", "input_layernorm")


@torch.no_grad()
def make_alike(model, lower, noise=0.0, step=0.0):
    """Layer `lower + 1` gets the keys and values of the one below but for `noise`, which adds `step` of its own."""
    first, second = model.model.language_model.layers[lower : lower + 2]
    for name in OF_KEYS_AND_VALUES:
        source, target = (layer.get_submodule(name).weight for layer in (first, second))
        target.copy_(source + noise * source.std() * torch.randn_like(source))
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        first.get_submodule(name).weight.mul_(step)
    return model


def make_model(**alike):
    """Four layers, of which the upper two are a pair; pictures enter below them."""
    return make_alike(make_pair("dense", text={"num_hidden_layers": 4}).ours, 2, **alike)


@pytest.fixture(scope="module")
def equal_layers():
    """A model that loses nothing by sharing; no test changes it but for its attention."""
    return make_model()


def prompt(name, seed=0):
    return make_inputs(*PROMPTS[name], seed=seed, mask=True)


def generate(model, inputs, **options):
    torch.manual_seed(0)
    return model.generate(**clone_inputs(inputs), **{"max_new_tokens": 9, "do_sample": False, **options})


def caches_for(model, **options):
    return DynamicCache(config=model.config), CrossLayerKVCache(model.config, **{**SMALL, **options})


@pytest.mark.parametrize("attention", ["sdpa", "qwen3_vl_exact"])
@pytest.mark.parametrize("form", PROMPTS)
@pytest.mark.parametrize("mode", MODES)
def test_the_tokens_of_a_dynamic_cache_where_layers_are_equal(equal_layers, mode, form, attention):
    equal_layers.set_attn_implementation(attention)
    full = {"return_dict_in_generate": True, "output_logits": True, **MODES[mode]}
    dynamic, shared = caches_for(equal_layers, min_similarity=0.99)
    expected = generate(equal_layers, prompt(form), past_key_values=dynamic, **full)
    actual = generate(equal_layers, prompt(form), past_key_values=shared, **full)
    assert actual.sequences.tolist() == expected.sequences.tolist()
    for ours, theirs in zip(actual.logits, expected.logits, strict=True):
        assert max_difference(ours, theirs) < 2e-4
    # All but the newest 3 tokens before the last forward, in whole pages.
    settled = shared.get_seq_length() - 1 - 3
    assert shared.layers[3].shared_tokens == settled // 4 * 4
    assert shared.similarity[2, 3].shared and shared.similarity[2, 3].keys > 0.999


@pytest.mark.parametrize("name", ["dynamic_sparse", "block_sparse", "memory_efficient", "adaptive"])
def test_other_attention(equal_layers, name):
    """What reads pages alone gets an upper layer gathered."""
    equal_layers.set_attn_implementation(f"qwen3_vl_{name}")
    dynamic, shared = caches_for(equal_layers)
    expected = generate(equal_layers, prompt("left_padded"), past_key_values=dynamic)
    assert generate(equal_layers, prompt("left_padded"), past_key_values=shared).tolist() == expected.tolist()
    assert shared.layers[3].shared_tokens > 64


@pytest.mark.parametrize("attention", ["sdpa", "qwen3_vl_exact"])
@pytest.mark.parametrize("form", PROMPTS)
def test_layers_that_are_alike_give_nearly_the_same(form, attention):
    model, inputs = make_model(noise=0.1, step=0.1), prompt(form)
    model.set_attn_implementation(attention)
    dynamic, shared = caches_for(model, min_similarity=0.85)
    logits = []
    for cache in (dynamic, shared):
        with torch.no_grad():
            model(**clone_inputs(inputs), past_key_values=cache)
            mask, steps = inputs["attention_mask"], []
            for step in range(6):
                ids = torch.full((len(mask), 3), 20 + step)
                mask = torch.nn.functional.pad(mask, (0, 3), value=1)
                steps.append(model(input_ids=ids, attention_mask=mask, past_key_values=cache).logits)
        logits.append(torch.cat(steps, dim=1))
    found = shared.similarity[2, 3]
    assert found.shared and 0.85 < found.keys < 0.98
    difference = (logits[1] - logits[0]).abs()
    assert 0 < difference.mean() < 0.05 * logits[0].std()
    assert torch.nn.functional.cosine_similarity(*(x.flatten() for x in logits), dim=0) > 0.995


def test_random_layers_are_refused_and_answers_stay_exact(monkeypatch):
    warnings = []
    monkeypatch.setattr(cache_cross_layer.logger, "warning_once", warnings.append)
    model = make_pair("dense", text={"num_hidden_layers": 4}).ours
    for attention in ("sdpa", "qwen3_vl_exact"):
        model.set_attn_implementation(attention)
        dynamic, shared = caches_for(model)
        expected = generate(model, prompt("left_padded"), past_key_values=dynamic, num_beams=2)
        assert (
            generate(model, prompt("left_padded"), past_key_values=shared, num_beams=2).tolist() == expected.tolist()
        )
        found = shared.similarity[2, 3]
        assert not found.shared and found.keys < 0.75 and shared.layers[3].shared_tokens == 0
    assert len(warnings) == 2 and "their similarity is" in warnings[0]


@pytest.mark.parametrize("do_sample", [False, True])
def test_assisted_decoding(equal_layers, do_sample):
    equal_layers.set_attn_implementation("qwen3_vl_exact")
    inputs = prompt("text")
    inputs["input_ids"][0, 60:] = inputs["input_ids"][0, :30].clone()
    helper = make_pair("dense", seed=1, text={"num_hidden_layers": 2}).ours
    helper.load_state_dict(equal_layers.state_dict(), strict=False)
    for way in ({"prompt_lookup_num_tokens": 5}, {"assistant_model": helper}):
        dynamic, shared = caches_for(equal_layers)
        options = {"do_sample": do_sample, "max_new_tokens": 20, **way}
        expected = generate(equal_layers, inputs, past_key_values=dynamic, **options)
        assert generate(equal_layers, inputs, past_key_values=shared, **options).tolist() == expected.tolist()
        assert shared.layers[3].shared_tokens > 80


def test_a_conversation_goes_on_with_a_new_picture(equal_layers):
    equal_layers.set_attn_implementation("qwen3_vl_exact")
    first = prompt("images_and_video")
    whole = concat_turns(first, make_inputs(["text:2", "image:4x6", "text:3"], seed=4, mask=True))
    cache = caches_for(equal_layers)[1]
    with torch.no_grad():
        equal_layers(**first, past_key_values=cache)
    expected = generate(equal_layers, whole, past_key_values=DynamicCache())
    assert generate(equal_layers, whole, past_key_values=cache).tolist() == expected.tolist()
    cache.reset()
    assert generate(equal_layers, whole, past_key_values=cache).tolist() == expected.tolist()


@pytest.mark.parametrize("way", ["from_dynamic", "to_dynamic"])
def test_positions_survive_conversion(equal_layers, way):
    """Rows that pictures brought differently far go on after it."""
    equal_layers.set_attn_implementation("sdpa")
    inputs, logits = prompt("left_padded"), []
    for cache in caches_for(equal_layers):
        with torch.no_grad():
            equal_layers(**clone_inputs(inputs), past_key_values=cache)
            if way == "from_dynamic" and isinstance(cache, DynamicCache):
                cache = CrossLayerKVCache.from_dynamic(cache, equal_layers.config, **SMALL)
            elif way == "to_dynamic" and isinstance(cache, CrossLayerKVCache):
                cache = cache.to_dynamic()
            rows = torch.tensor([2, 0, 1])
            cache.reorder_cache(rows)
            mask = torch.nn.functional.pad(inputs["attention_mask"][rows], (0, 1), value=1)
            output = equal_layers(input_ids=torch.full((3, 1), 33), attention_mask=mask, past_key_values=cache)
            logits.append(output.logits)
    assert_close(logits[0], logits[1], 1e-4)


def test_the_technique_gives_every_request_a_cache(equal_layers):
    equal_layers.set_attn_implementation("sdpa")
    technique = CrossLayerCache(config=equal_layers.config, start_layer=1, **SMALL, min_similarity=0.3)
    assert (technique.name, technique.exact) == ("cross_layer_cache", False)
    before = generate(equal_layers, prompt("text"))
    technique.apply(equal_layers)
    equal_layers.active_techniques = [technique]
    try:
        cache = generate(equal_layers, prompt("text"), return_dict_in_generate=True).past_key_values
    finally:
        del equal_layers.active_techniques
    technique.revert(equal_layers)
    assert isinstance(cache, CrossLayerKVCache) and cache.pairs == ((1, 2),)
    assert (cache.pools.page_tokens, cache.settings.min_similarity) == (4, 0.3)
    assert generate(equal_layers, prompt("text")).tolist() == before.tolist()


def test_threads_share_pools(equal_layers):
    equal_layers.set_attn_implementation("qwen3_vl_exact")
    pools, found = caches_for(equal_layers)[1].pools, {}
    prompts = [make_inputs(["text:3", "image:4x4", f"text:{75 + seed}"], seed=seed, mask=True) for seed in range(3)]
    expected = [generate(equal_layers, inputs, past_key_values=DynamicCache()).tolist() for inputs in prompts]

    def work(index):
        cache = CrossLayerKVCache(equal_layers.config, pool=pools, residual_tokens=3)
        found[index] = equal_layers.generate(
            **prompts[index], past_key_values=cache, max_new_tokens=9, do_sample=False
        )

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[index].tolist() for index in range(3)] == expected
