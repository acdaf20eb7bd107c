"""Blocks by content: that what is computed is attention over what was chosen, when all is computed, and on models."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import transformers
from helpers import make_inputs, make_pair, one_line
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import ALL_CASES, AttentionCase, assert_matches, dense_reference, inputs_of, layout_of

from qwen3_vl.optim.attention.attention_block_sparse import NAME as BLOCK_SPARSE
from qwen3_vl.optim.attention.attention_dynamic_sparse import (
    DECODE_QUERIES,
    NAME,
    DynamicSparseAttention,
    DynamicSparseSettings,
    dynamic_sparse_attention,
)
from qwen3_vl.optim.attention.attention_layout import AttentionLayout
from qwen3_vl.optim.attention.block_map import BlockMap, PageMap
from qwen3_vl.optim.cache.cache_paged import PagedLayer
from qwen3_vl.optim.cache.memory_pool import PagePools


# Sparse at the lengths of the tests.
SMALL = DynamicSparseSettings(
    threshold=0.5,
    min_blocks=1,
    window_tokens=4,
    stride=4,
    query_block=16,
    key_block=8,
    decode_share=0.3,
    min_pages=2,
    page_tokens=4,
    dense_below_tokens=0,
)


def module_with(settings_given, causal=True):
    return SimpleNamespace(is_causal=causal, config=None, attention_settings={NAME: settings_given})


def run(settings_given, case, tensors, layout, **more):
    """Output of the attention function, and what it says it computed."""
    module = module_with(settings_given, case.causal)
    output, weights = dynamic_sparse_attention(module, *tensors, layout, case.scaling, **more)
    assert weights is None
    return output, getattr(module, "last_computed", None)


def computed_mask(computed, case):
    """(B or 1, H or 1, queries, keys): what the call says it computed."""
    if computed is None or computed.kept is None:
        return layout_of(case)
    mask = computed.kept.dense(computed.layout, computed.queries, computed.keys)
    return mask.repeat_interleave(case.groups, dim=1) if isinstance(computed.kept, PageMap) else mask


# --- Settings ---


@pytest.mark.parametrize(
    ("given_settings", "message"),
    [
        ({"threshold": 0}, "threshold must be a share over 0 and up to 1, got 0"),
        ({"threshold": 1.5}, "threshold must be"),
        ({"threshold": "high"}, "threshold must be"),
        ({"decode_share": True}, "decode_share must be"),
        ({"min_blocks": 0}, "min_blocks must be an integer >= 1"),
        ({"min_pages": 0}, "min_pages must be"),
        ({"window_tokens": 0}, "window_tokens must be"),
        ({"dense_below_tokens": -1}, "dense_below_tokens must be an integer >= 0"),
        ({"scoring": "random"}, r"scoring must be one of \('antidiagonal', 'pooled'\), got 'random'"),
        ({"stride": 24}, "stride 24 does not divide query_block 128 and key_block 64"),
        ({"treshold": 0.5}, "no setting 'treshold'"),
    ],
)
def test_settings_are_checked(given_settings, message):
    with pytest.raises(ValueError, match=message) as error:
        DynamicSparseAttention(None, **given_settings)
    one_line(error.value)


def test_a_stride_is_free_where_it_is_not_used():
    assert DynamicSparseSettings(scoring="pooled", stride=24, query_block=100).query_block == 100


# --- The attention function ---


@pytest.mark.parametrize("blocks", [(16, 8), (32, 32)])  # the compiled kernels take the second
@pytest.mark.parametrize("scoring", ["antidiagonal", "pooled"])
@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_output_is_attention_over_what_was_chosen(case, scoring, blocks):
    tensors, layout = inputs_of(case), layout_of(case)
    own = replace(SMALL, scoring=scoring, query_block=blocks[0], key_block=blocks[1])
    output, computed = run(own, case, tensors, layout)
    expected = dense_reference(*tensors, computed_mask(computed, case))
    if 1 < case.queries <= DECODE_QUERIES:
        # Each of a few queries has pages of its own; those of the last one are told.
        output, expected = output[:, -1:], expected[:, -1:]
    assert_matches(output, expected)


@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_a_threshold_of_one_is_exact(case):
    tensors, layout = inputs_of(case), layout_of(case)
    output, computed = run(replace(SMALL, threshold=1.0), case, tensors, layout)
    assert_matches(output, dense_reference(*tensors, layout))
    assert computed is None or computed.density() == 1


@pytest.mark.parametrize("queries", [1, 60])
def test_short_inputs_are_exact(queries):
    case = AttentionCase(queries=queries, past=100 - queries, head_dim=16)
    tensors, layout = inputs_of(case), layout_of(case)
    output, computed = run(replace(SMALL, dense_below_tokens=100), case, tensors, layout)
    assert computed.density() == 1
    assert_matches(output, dense_reference(*tensors, layout))
    _, computed = run(replace(SMALL, dense_below_tokens=99), case, tensors, layout)
    assert computed.density() < 1


@given(
    queries=st.integers(1, 90),
    past=st.integers(0, 60),
    batch=st.integers(1, 3),
    groups=st.integers(1, 3),
    padding=st.sampled_from(("none", "left", "right")),
    scoring=st.sampled_from(("antidiagonal", "pooled")),
    threshold=st.sampled_from((0.3, 0.8)),
    seed=st.integers(0, 99),
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_any_shape(queries, past, batch, groups, padding, scoring, threshold, seed):
    case = AttentionCase(batch, queries, past, groups=groups, head_dim=16, padding=padding, padding_step=5)
    tensors, layout = inputs_of(case, seed), layout_of(case)
    output, computed = run(replace(SMALL, scoring=scoring, threshold=threshold), case, tensors, layout)
    expected = dense_reference(*tensors, computed_mask(computed, case))
    if 1 < queries <= DECODE_QUERIES:
        output, expected = output[:, -1:], expected[:, -1:]
    assert_matches(output, expected)


@pytest.mark.parametrize("scoring", ["antidiagonal", "pooled"])
@pytest.mark.parametrize("past", [0, 48])
def test_later_blocks_change_nothing(scoring, past):
    case = AttentionCase(batch=2, queries=96, past=past, head_dim=16)
    tensors, layout = inputs_of(case), layout_of(case)
    own = replace(SMALL, scoring=scoring)
    before, _ = run(own, case, tensors, layout)
    changed = [x.clone() for x in tensors]
    changed[0][:, :, 48:], changed[1][:, :, past + 48 :], changed[2][:, :, past + 48 :] = 5.0, 5.0, -100.0
    after, _ = run(own, case, changed, layout)
    assert_matches(after[:, :48], before[:, :48].double(), 1e-5)
    assert not torch.allclose(after[:, 48:], before[:, 48:])


def test_few_queries_give_what_each_gives_alone():
    case = AttentionCase(batch=2, queries=7, past=70, padding="left", head_dim=16)
    (query, key, value), layout = inputs_of(case), layout_of(case)
    together, _ = run(SMALL, case, (query, key, value), layout)
    for index in range(7):
        seen = 71 + index
        alone, _ = run(
            SMALL,
            case,
            (query[:, :, index : index + 1], key[:, :, :seen], value[:, :, :seen]),
            AttentionLayout(seen - 1, layout.valid[:, :seen]),
        )
        assert_matches(together[:, index : index + 1], alone.double(), 1e-5)


@pytest.mark.parametrize("queries", [1, 5, 40])
def test_a_paged_history_gives_the_same(queries):
    case = AttentionCase(batch=2, queries=queries, past=70, padding="none", head_dim=16)
    query, key, value = inputs_of(case)
    layer = PagedLayer(PagePools(page_tokens=SMALL.page_tokens))
    layer.update(key[:, :, :70], value[:, :, :70])
    new = layer.update(key[:, :, 70:], value[:, :, 70:], dense=False)
    output, computed = run(SMALL, case, (query, *new), layout_of(case), kv_layer=layer)
    expected, wanted = run(SMALL, case, (query, key, value), layout_of(case))
    assert torch.equal(computed.kept.mask, wanted.kept.mask) and computed.density() < 1
    assert_matches(output, expected.double())


def test_pages_of_the_cache_count_and_not_those_of_the_settings():
    case = AttentionCase(queries=1, past=70, head_dim=16)
    query, key, value = inputs_of(case)
    layer = PagedLayer(PagePools(page_tokens=16))
    layer.update(key[:, :, :70], value[:, :, :70])
    new = layer.update(key[:, :, 70:], value[:, :, 70:], dense=False)
    _, computed = run(SMALL, case, (query, *new), layout_of(case), kv_layer=layer)
    assert computed.kept.page_tokens == 16


def test_what_is_kept_at_least():
    case = AttentionCase(queries=160, head_dim=16)
    tensors, layout = inputs_of(case), layout_of(case)
    _, computed = run(replace(SMALL, threshold=1e-6, window_tokens=20), case, tensors, layout)
    mask = computed.kept.dense(layout, 160, 160)[0]
    assert mask[:, :, 0].all(), "the first block"
    for query in range(160):
        assert mask[:, query, max(0, query - 19) : query + 1].all(), "the window"
    _, floor = run(replace(SMALL, threshold=1e-6, min_blocks=9), case, tensors, layout)
    assert (floor.kept.mask[..., -1, :].sum(-1) == 9).all()


def test_gradients_pass_through_what_was_chosen():
    case = AttentionCase(batch=2, queries=70, padding="left", head_dim=16)
    layout, tensors = layout_of(case), inputs_of(case, requires_grad=True)
    output, computed = run(SMALL, case, tensors, layout)
    assert isinstance(computed.kept, BlockMap) and not computed.kept.mask.requires_grad
    mask = computed_mask(computed, case)
    wanted = torch.autograd.grad(dense_reference(*tensors, mask).square().sum(), tensors)
    for gradient, expected in zip(torch.autograd.grad(output.square().sum(), tensors), wanted, strict=True):
        assert_matches(gradient, expected.double(), 1e-4)


@pytest.mark.parametrize(
    ("given_arguments", "message"),
    [
        ({"attention_mask": torch.ones(1, 1, 33, 33, dtype=torch.bool)}, "dense mask.*qwen3_vl_exact"),
        ({"attention_mask": AttentionLayout(0, torch.ones(1, 9, dtype=torch.bool))}, "valid of shape"),
        ({"dropout": 0.1}, "dropout"),
        ({"output_attentions": True}, "output_attentions"),
    ],
)
def test_what_is_refused(given_arguments, message):
    case = AttentionCase()
    arguments = {"attention_mask": layout_of(case), "scaling": case.scaling, **given_arguments}
    with pytest.raises(ValueError, match=message) as error:
        dynamic_sparse_attention(module_with(SMALL), *inputs_of(case), **arguments)
    one_line(error.value)


# --- On models ---

ON_MODELS = {"threshold": 0.4, "min_blocks": 1, "window_tokens": 4, "stride": 4, "query_block": 8, "key_block": 8}
ON_MODELS |= {"decode_share": 0.2, "min_pages": 2, "page_tokens": 4, "dense_below_tokens": 16}


@torch.no_grad()
def test_apply_and_revert_restore_the_logits(kind):
    model = make_pair(kind).ours
    inputs = make_inputs(["text:40", "image:4x6", "text:30"], ["text:9"])
    before = model(**inputs).logits
    technique = DynamicSparseAttention(**ON_MODELS)
    assert DynamicSparseAttention.last_density(model) == []
    technique.apply(model)
    assert not torch.equal(model(**inputs).logits, before)
    density = DynamicSparseAttention.last_density(model)
    assert len(density) == model.config.text_config.num_hidden_layers and all(0 < x < 1 for x in density)
    model(**make_inputs(["text:12"]))
    assert DynamicSparseAttention.last_density(model) == [1.0] * len(density)
    technique.revert(model)
    assert torch.equal(model(**inputs).logits, before)
    assert DynamicSparseAttention.last_density(model) == []
    assert not any(hasattr(module, "attention_settings") for module in model.modules())


def test_two_models_keep_their_own_settings_and_density():
    models = [make_pair("dense").ours for _ in range(2)]
    inputs = make_inputs(["text:70"])
    for model, threshold in zip(models, (1.0, 0.2), strict=True):
        DynamicSparseAttention(**{**ON_MODELS, "threshold": threshold}).apply(model)
    with torch.no_grad():
        for model in models:
            model(**inputs)
    full, sparse = map(DynamicSparseAttention.last_density, models)
    assert set(full) == {1.0} and max(sparse) < 1


@torch.no_grad()
def test_both_sparse_names_work_without_settings(kind):
    model = make_pair(kind).ours
    inputs = make_inputs(["text:20", "image:4x6", "text:9"], ["text:9"])
    expected = model(**inputs).logits[inputs["attention_mask"].bool()]
    for name in (NAME, BLOCK_SPARSE):
        model.set_attn_implementation(name)
        # Shorter than the defaults leave anything out.
        assert_matches(model(**inputs).logits[inputs["attention_mask"].bool()], expected.double(), 2e-4)


@pytest.mark.parametrize("scoring", ["antidiagonal", "pooled"])
def test_generates_with_pictures_and_padding(checkpoint, scoring):
    model, inputs = checkpoint
    greedy = {"max_new_tokens": 8, "do_sample": False}
    expected = model.generate(**inputs, **greedy)
    for threshold in (1.0, 0.5):
        technique = DynamicSparseAttention(**{**ON_MODELS, "scoring": scoring, "threshold": threshold})
        technique.apply(model)
        try:
            # Without pages of a cache, those of the settings count.
            tokens = model.generate(**inputs, **greedy, past_key_values=transformers.DynamicCache())
            density = DynamicSparseAttention.last_density(model)
        finally:
            technique.revert(model)
        if threshold == 1:
            assert torch.equal(tokens, expected)
        else:
            assert max(density) < 1 and tokens.shape[1] > inputs["input_ids"].shape[1]
    assert torch.equal(model.generate(**inputs, **greedy), expected)
