"""Chosen pages of a packed history: scores from what is kept anyway, attention to them against float64, and models."""

import copy
from types import SimpleNamespace

import pytest
import torch
from helpers import clone_inputs, make_inputs, make_pair, one_line
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import AttentionCase, assert_matches, dense_reference, inputs_of, layout_of

from qwen3_vl import CrossLayerKVCache, EvictingKVCache, QuantizedKVCache, TieredKVCache
from qwen3_vl.optim.attention.attention_dynamic_sparse import (
    NAME,
    DynamicSparseAttention,
    DynamicSparseSettings,
    dynamic_sparse_attention,
)
from qwen3_vl.optim.attention.attention_layout import AttentionLayout
from qwen3_vl.optim.attention.block_map import PageMap, blocks_of
from qwen3_vl.optim.cache import packed_history
from qwen3_vl.optim.cache.kv_quantization import QuantizedSettings
from qwen3_vl.optim.cache.quantized_layer import QuantizedLayer


GROUP, WINDOW = 32, 40
SPARSE = DynamicSparseSettings(window_tokens=4, decode_share=0.2, min_pages=2, dense_below_tokens=0)


@pytest.fixture(params=["native", "plain"])
def way(request, monkeypatch):
    if request.param == "plain":
        monkeypatch.setattr(packed_history, "supports_quantized", lambda *args: False)
    return request.param


def filled(case, bits=4, rotate=False, group=GROUP, seed=0):
    """A layer that has seen all tokens of a case, the newest ones as a step, and the query."""
    query, key, value = inputs_of(case, seed)
    layer = QuantizedLayer(QuantizedSettings(bits, group, WINDOW, rotate))
    layer.update(key[:, :, : case.past], value[:, :, : case.past])
    new = layer.update(key[:, :, case.past :], value[:, :, case.past :], dense=False)
    return layer, query, new


def page_mask(case, flags, group, in_full):
    """(B, H, queries, keys): the keys of flagged pages and those that are read in full precision."""
    keys = flags.repeat_interleave(group, 2)[:, :, : case.keys].clone()
    keys[:, :, case.keys - in_full :] = True
    mask = keys.repeat_interleave(case.groups, 1)[:, :, None].expand(-1, -1, case.queries, -1)
    return mask & layout_of(case).dense(case.queries, case.keys)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    bits=st.sampled_from([2, 4, 8]),
    group=st.sampled_from([32, 64, 96]),
    head_dim=st.sampled_from([64, 80, 128]),
    groups=st.sampled_from([1, 2, 4, 8]),
    queries=st.sampled_from([1, 1, 3]),
    past=st.integers(45, 700),
    batch=st.integers(1, 3),
    bf16=st.booleans(),
    padding=st.sampled_from(["none", "left"]),
    rotate=st.booleans(),
    native=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_map_matches_float64(
    bits, group, head_dim, groups, queries, past, batch, bf16, padding, rotate, native, seed
):
    dtype = torch.bfloat16 if bf16 else torch.float32
    case = AttentionCase(batch, queries, past, groups=groups, head_dim=head_dim, dtype=dtype, padding=padding)
    layer, query, _ = filled(case, bits, rotate and head_dim != 80, group, seed)
    generator = torch.Generator().manual_seed(seed)
    flags = torch.rand(batch, case.kv_heads, blocks_of(case.keys, group), generator=generator) < 0.4
    # Queries that read other tokens packed would need masks of their own.
    in_full = {layer.tokens_in_full(past + index + 1) - index for index in range(queries)}
    if len(in_full) > 1:
        return
    layout, expected_mask = layout_of(case), page_mask(case, flags, group, in_full.pop() + queries - 1)
    with pytest.MonkeyPatch.context() as patch:
        if not native:
            patch.setattr(packed_history, "supports_quantized", lambda *args: False)
        out = layer.attend(query, layout, case.scaling, PageMap(flags, group))
    keys, values = layer.dense() if bf16 else (x.float() for x in layer.dense())
    assert_matches(out, dense_reference(query, keys, values, expected_mask), 2e-2 if bf16 else 5e-5)


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_no_key_of_a_page_scores_higher_than_its_bound(bits, rotate, way):
    case = AttentionCase(2, 2, 500, groups=3, head_dim=64)
    layer, query, _ = filled(case, bits, rotate)
    scores, keys = layer.page_scores(query), layer.dense()[0].float()
    packed = case.keys - layer.tokens_in_full(case.keys)
    assert scores.shape == (2, case.kv_heads, blocks_of(case.keys, GROUP)) and packed > 400
    rows = query.unflatten(1, (case.kv_heads, -1)).flatten(2, 3).double()
    highest = (rows @ keys.double().mT).amax(2)[..., :packed].unflatten(-1, (-1, GROUP)).amax(-1)
    bounds = scores[..., : packed // GROUP]
    assert (bounds >= highest - 1e-3).all()
    # From the keys themselves, with the same rotation: nothing is wider than rounding and coarseness make it.
    turned = packed_history.rotate_states(keys) if rotate else keys
    asked = packed_history.rotate_states(query) if rotate else query
    pages = turned[:, :, :packed].unflatten(2, (-1, GROUP)).double()
    asked = asked.unflatten(1, (case.kv_heads, -1)).flatten(2, 3).double()
    tight = asked.clamp(min=0) @ pages.amax(3).mT + asked.clamp(max=0) @ pages.amin(3).mT
    assert_matches(bounds, tight.amax(2), 0.02 * tight.abs().max().item())


def attend_sparsely(layer, query, new, case, chosen=SPARSE):
    module = SimpleNamespace(is_causal=True, config=None, attention_settings={NAME: chosen})
    out, _ = dynamic_sparse_attention(module, query, *new, layout_of(case), case.scaling, kv_layer=layer)
    return out, module.last_computed


@pytest.mark.parametrize("past", [150, 470])
@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize(("bits", "rotate"), [(2, False), (4, False), (4, True), (8, False)])
def test_dynamic_sparse_reads_what_it_says(bits, rotate, queries, past, way):
    case = AttentionCase(2, queries, past, groups=2, padding="left", padding_step=20)
    layer, query, new = filled(case, bits, rotate)
    out, computed = attend_sparsely(layer, query, new, case)
    mask = computed.kept.dense(computed.layout, 1, case.keys).repeat_interleave(2, 1)
    in_full = layer.tokens_in_full(case.keys)
    assert computed.density() < 1 and computed.kept.page_tokens == GROUP
    assert mask[..., -in_full:].all(), "what is not packed counts as read"
    expected = dense_reference(query[:, :, -1:], *(x.float() for x in layer.dense()), mask)
    assert_matches(out[:, -1:], expected, 1e-4)


def test_nothing_is_unpacked_or_gathered_to_decode(monkeypatch):
    case = AttentionCase(2, 1, 500)
    layer, query, new = filled(case)
    for name in ("dense", "_dense"):
        monkeypatch.setattr(QuantizedLayer, name, None)
    assert attend_sparsely(layer, query, new, case)[1].density() < 0.6


def test_few_queries_give_what_each_gives_alone(way):
    case = AttentionCase(2, 7, 240, padding="left", head_dim=64)
    layer, query, new = filled(case)
    together, _ = attend_sparsely(layer, query, new, case)
    for index in range(7):
        own = AttentionCase(2, 1, 240 + index, padding="left", head_dim=64)
        given_new = [x[:, :, index : index + 1] for x in new]
        alone = QuantizedLayer(layer.settings)
        _, key, value = inputs_of(case)
        alone.update(key[:, :, : 240 + index], value[:, :, : 240 + index])
        alone.update(*given_new, dense=False)
        step, _ = attend_sparsely(alone, query[:, :, index : index + 1], given_new, own)
        assert_matches(together[:, index : index + 1], step.double(), 1e-5)


def test_beams_copies_and_crops_read_their_own_pages(way):
    case = AttentionCase(3, 1, 400, head_dim=64)
    layer, query, new = filled(case)
    flags = torch.rand(3, case.kv_heads, blocks_of(401, GROUP), generator=torch.Generator().manual_seed(1)) < 0.4
    layout, order = AttentionLayout(400), torch.tensor([2, 0, 2])
    expected = layer.attend(query, layout, case.scaling, PageMap(flags, GROUP))
    scores = layer.page_scores(query)
    layer.reorder_cache(order)
    moved = layer.attend(query[order], layout, case.scaling, PageMap(flags[order], GROUP))
    assert torch.equal(moved, expected[order]) and torch.equal(layer.page_scores(query[order]), scores[order])
    layer.crop(-90)
    dropped = AttentionCase(3, 1, 310, head_dim=64)
    out, computed = attend_sparsely(layer, query[order], new, dropped)
    mask = computed.kept.dense(computed.layout, 1, 311).repeat_interleave(case.groups, 1)
    assert_matches(out, dense_reference(query[order], *layer.dense(), mask), 1e-4)


def test_a_map_of_other_pages_is_refused():
    case = AttentionCase(1, 1, 300)
    layer, query, _ = filled(case)
    for flags, tokens, message in (((1, 2, 19), 16, "page map of 16 tokens"), ((1, 2, 4), GROUP, "does not cover")):
        with pytest.raises(ValueError, match=message) as error:
            layer.attend(query, layout_of(case), 1.0, PageMap(torch.ones(flags, dtype=torch.bool), tokens))
        one_line(error.value)
    with pytest.raises(ValueError, match="holds no tokens"):
        QuantizedLayer().page_scores(query)


# --- Models ---

# Prompts are attended to as a whole; only what is decoded chooses pages.
ON_MODELS = {"window_tokens": 4, "decode_share": 0.2, "min_pages": 2, "dense_below_tokens": 0, "min_blocks": 999}
SMALL_CACHE = {"bits": 8, "group_size": 32, "residual_tokens": 8}
MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.3, "top_k": 30},
    "beams": {"num_beams": 3},
    "chunked_prefill": {"prefill_chunk_size": 70},
}


@pytest.fixture(scope="module")
def model():
    """A dense model that decodes sparsely."""
    model = make_pair("dense").ours
    DynamicSparseAttention(**ON_MODELS).apply(model)
    return model


def generate(model, inputs, cache, **options):
    torch.manual_seed(0)
    options = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False, **options}
    return model.generate(**clone_inputs(inputs), past_key_values=cache, **options)


def attend_to_all(layer, query, layout, scaling, page_map=None):
    """What a layer's `attend` is to give: attention to the unpacked history, of which some pages do not count."""
    queries, keys = query.shape[2], layer.get_seq_length()
    mask = layout.dense(queries, keys)
    if page_map is not None:
        chosen = page_map.dense(None, queries, keys).clone()
        chosen[..., -layer.tokens_in_full(layout.query_offset + 1) :] = True
        mask = mask & chosen.repeat_interleave(query.shape[1] // chosen.shape[1], 1)
    return dense_reference(query, *layer.dense(), mask, scaling).to(query.dtype)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("form", ["text", "pictures"])
def test_modes_of_generation(model, monkeypatch, form, mode):
    rows = {
        "text": [["text:150"]],
        "pictures": [["text:12", "image:8x12", "text:70"], ["text:16"], ["text:21", "video:2x8x4", "text:90"]],
    }
    inputs = make_inputs(*rows[form], mask=True)
    tokens = generate(model, inputs, QuantizedKVCache(**SMALL_CACHE), **MODES[mode])
    assert 0 < max(DynamicSparseAttention.last_density(model)) < 1
    monkeypatch.setattr(QuantizedLayer, "attend", attend_to_all)
    assert torch.equal(tokens, generate(model, inputs, QuantizedKVCache(**SMALL_CACHE), **MODES[mode]))


CACHES = {
    "tiered": lambda config: TieredKVCache(config, segment_tokens=32, hot_tokens=64, int8_tokens=64, int4_tokens=64),
    "evicting": lambda config: EvictingKVCache(config, max_tokens=96, store="quantized", store_options=SMALL_CACHE),
    "cross-layer": lambda config: CrossLayerKVCache(config, min_similarity=0.0, page_tokens=16),
}


@pytest.mark.parametrize("name", CACHES)
def test_other_caches_are_decoded_in_place(model, monkeypatch, name):
    """Exactly where they have no pages to choose from, and never by rebuilding the history."""
    inputs = make_inputs(["text:12", "image:8x12", "text:150"], ["text:80"], mask=True)
    cache = CACHES[name](model.config.get_text_config())
    with torch.no_grad():
        model(**clone_inputs(inputs), past_key_values=cache)
        copied = copy.deepcopy(cache)
        for kind in {type(layer) for layer in cache.layers} | {QuantizedLayer}:
            monkeypatch.setattr(kind, "dense", None)
        step = {"input_ids": torch.full((2, 1), 20)}
        step["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
        chosen = model(**step, past_key_values=cache).logits
        density = DynamicSparseAttention.last_density(model)
        if name == "evicting":
            assert max(density) < 1
            return
        model.set_attn_implementation("qwen3_vl_exact")
        try:
            exact = model(**step, past_key_values=copied).logits
        finally:
            model.set_attn_implementation(NAME)
    whole = [index for index, layer in enumerate(copied.layers) if not hasattr(layer.reader, "page_scores")]
    assert whole and all(density[index] == 1 for index in whole)
    if name == "tiered":
        assert torch.equal(chosen, exact)
