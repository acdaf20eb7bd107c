"""Block and page maps, and the plain executors, against masks written out and the float64 reference."""

import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import ALL_CASES, AttentionCase, assert_matches, dense_reference, inputs_of, layout_of, perturb_future

from qwen3_vl.optim.attention import block_map as maps
from qwen3_vl.optim.attention.attention_layout import AttentionLayout
from qwen3_vl.optim.attention.block_map import BlockMap, PageMap, anchor_blocks, causal_block_map, visible_pairs
from qwen3_vl.optim.attention.blocks_plain import plain_blocks, plain_decode


def random_block_map(case, query_block, key_block, share, by_head, by_row=True, seed=1):
    generator = torch.Generator().manual_seed(seed)
    shape = (
        case.batch if by_row else 1,
        case.heads if by_head else 1,
        -(-case.queries // query_block),
        -(-case.keys // key_block),
    )
    return BlockMap(torch.rand(shape, generator=generator) < share, query_block, key_block)


def random_page_map(case, page_tokens, share, seed=1):
    generator = torch.Generator().manual_seed(seed)
    shape = (case.batch, case.kv_heads, -(-case.keys // page_tokens))
    return PageMap(torch.rand(shape, generator=generator) < share, page_tokens)


def dense_of_pages(page_map, case):
    return page_map.dense(layout_of(case), case.queries, case.keys).repeat_interleave(case.groups, dim=1)


@st.composite
def cases(draw, most_queries=60):
    queries = draw(st.integers(1, most_queries))
    batch = draw(st.integers(1, 3))
    kind = draw(st.sampled_from(("none", "left", "right", "packed", "full")))
    past = 0 if kind == "packed" else draw(st.integers(0, 40))
    packed = ()
    if kind == "packed":
        cuts = sorted(draw(st.sets(st.integers(1, queries - 1), max_size=3))) if queries > 1 else []
        packed = tuple(b - a for a, b in zip([0, *cuts], [*cuts, queries], strict=True))
    return AttentionCase(
        batch=batch,
        queries=queries,
        past=past,
        spare=0 if kind in ("packed", "full") else draw(st.sampled_from((0, 0, 5))),
        kv_heads=draw(st.integers(1, 2)),
        groups=draw(st.integers(1, 3)),
        head_dim=8,
        padding=kind if kind in ("left", "right") else "none",
        padding_step=draw(st.integers(1, 9)),
        packed=packed,
        causal=kind != "full",
    )


blocks = st.sampled_from((1, 3, 8, 16, 64))


# --- The maps themselves ---


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BlockMap(torch.ones(2, 2, dtype=torch.bool), 8, 8), r"\(batch or 1, heads or 1, query blocks"),
        (lambda: BlockMap(torch.ones(1, 1, 2, 2), 8, 8), "boolean.*float32"),
        (lambda: BlockMap([[True]], 8, 8), "boolean.*list"),
        (
            lambda: BlockMap(torch.ones(1, 1, 2, 2, dtype=torch.bool), 0, 8),
            "query_block must be an integer >= 1, got 0",
        ),
        (lambda: BlockMap(torch.ones(1, 1, 2, 2, dtype=torch.bool), 8, 8.0), "key_block must be an integer >= 1"),
        (lambda: PageMap(torch.ones(1, 1, 2, 2, dtype=torch.bool), 8), r"\(batch or 1, KV heads or 1, pages\)"),
        (lambda: PageMap(torch.ones(1, 1, 2, dtype=torch.bool), True), "page_tokens must be an integer >= 1"),
    ],
)
def test_malformed_maps_are_refused(make, message):
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [(2, 1, 5, 5), (1, 3, 5, 5), (1, 1, 4, 5), (1, 1, 5, 6)])
def test_a_map_of_other_tensors_is_refused(shape):
    case = AttentionCase(queries=33)
    block_map = BlockMap(torch.ones(shape, dtype=torch.bool), 8, 8)
    with pytest.raises(ValueError, match=r"has to be \(1 or 1, 4 or 1, 5, 5\)") as caught:
        plain_blocks(*inputs_of(case), layout_of(case), case.scaling, block_map)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [(2, 1, 5), (1, 4, 5), (1, 2, 4)])
def test_a_page_map_of_other_keys_is_refused(shape):
    case = AttentionCase(queries=1, past=39)
    with pytest.raises(ValueError, match=r"has to be \(1 or 1, 2 or 1, 5\)"):
        page_map = PageMap(torch.ones(shape, dtype=torch.bool), 8)
        plain_decode(*inputs_of(case), layout_of(case), case.scaling, page_map)


@given(case=cases(), query_block=blocks, key_block=blocks)
@settings(max_examples=80, deadline=None, derandomize=True)
def test_visible_pairs_count_the_dense_mask(case, query_block, key_block):
    layout = layout_of(case)
    mask = torch.ones(1, 1, case.queries, case.keys, dtype=torch.bool)
    mask = mask if layout is None else layout.dense(case.queries, case.keys)
    pairs = visible_pairs(layout, case.queries, case.keys, query_block, key_block)
    for i in range(pairs.shape[1]):
        for j in range(pairs.shape[2]):
            window = mask[:, 0, i * query_block : (i + 1) * query_block, j * key_block : (j + 1) * key_block]
            assert torch.equal(pairs[:, i, j], window.sum((1, 2))), (i, j)


@given(case=cases(), query_block=blocks, key_block=blocks, share=st.floats(0, 1), by_head=st.booleans())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_density_is_the_share_of_the_dense_masks(case, query_block, key_block, share, by_head):
    layout = layout_of(case)
    block_map = random_block_map(case, query_block, key_block, share, by_head)
    everything = BlockMap(torch.ones_like(block_map.mask), query_block, key_block)
    computed, allowed = (x.dense(layout, case.queries, case.keys).sum().item() for x in (block_map, everything))
    density = block_map.density(layout, case.queries, case.keys).item()
    assert density == pytest.approx(computed / max(allowed, 1), abs=1e-6)
    page_map = random_page_map(case, key_block, share)
    every_page = PageMap(torch.ones_like(page_map.mask), key_block)
    computed, allowed = (x.dense(layout, case.queries, case.keys).sum().item() for x in (page_map, every_page))
    density = page_map.density(layout, case.queries, case.keys).item()
    assert density == pytest.approx(computed / max(allowed, 1), abs=1e-6)


def test_the_causal_map_leaves_nothing_out_and_computes_no_future_block():
    block_map = causal_block_map(queries=20, keys=50, query_block=8, key_block=16)
    layout = AttentionLayout(30)
    assert block_map.density(layout, 20, 50) == 1
    assert torch.equal(block_map.mask[0, 0], visible_pairs(layout, 20, 50, 8, 16)[0] > 0)


def test_packed_rows_that_are_not_in_order_are_refused():
    layout = AttentionLayout(0, segments=torch.tensor([[0, 0, 1, 1, 0, 0]], dtype=torch.int32))
    with pytest.raises(ValueError, match="segments decrease"):
        visible_pairs(layout, 6, 6, 2, 2)


def test_what_is_remembered_belongs_to_one_layout_object_and_goes_with_it():
    first, equal = AttentionLayout(3), AttentionLayout(3)
    known = len(maps._NOTES)
    assert maps.remembered(first, "plan", lambda: "first") == "first"
    assert maps.remembered(first, "plan", lambda: "again") == "first"
    assert maps.remembered(equal, "plan", lambda: "second") == "second", "equal layouts of two forwards were mixed up"
    del first, equal
    gc.collect()
    assert len(maps._NOTES) == known


@given(case=cases(), query_block=blocks, key_block=blocks, sink=st.integers(0, 20), window=st.integers(1, 40))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_anchor_blocks_hold_the_first_and_the_latest_tokens(case, query_block, key_block, sink, window):
    layout = layout_of(case)
    if layout is None:
        return
    kept = anchor_blocks(layout, case.queries, case.keys, query_block, key_block, sink, window)
    seen = layout.dense(case.queries, case.keys).expand(case.batch, 1, -1, -1)[:, 0]
    real = torch.ones(case.batch, case.keys, dtype=torch.bool) if layout.valid is None else layout.valid
    position = torch.arange(case.queries)[:, None] + case.past
    for row in range(case.batch):
        rank = torch.zeros(case.queries, case.keys)
        for query in range(case.queries):
            own = torch.ones(case.keys, dtype=torch.bool)
            if layout.segments is not None:
                own = layout.segments[row] == layout.segments[row, query]
            rank[query] = (own & real[row]).long().cumsum(0) - 1
        # A token is an anchor of a query, so its block has to be kept; only such blocks are.
        anchor = seen[row] & ((rank < sink) | (torch.arange(case.keys)[None] > position - window))
        flags = kept[row if len(kept) > 1 else 0]
        expected = torch.zeros_like(flags)
        for i in range(flags.shape[0]):
            for j in range(flags.shape[1]):
                expected[i, j] = anchor[
                    i * query_block : (i + 1) * query_block, j * key_block : (j + 1) * key_block
                ].any()
        visible = visible_pairs(layout, case.queries, case.keys, query_block, key_block)
        visible = visible[row if len(visible) > 1 else 0] > 0
        assert (flags & visible)[expected].all(), "an anchor is missing"
        if not case.packed and case.padding != "right":
            assert torch.equal(flags & visible, expected), "more is kept than anchors"


# --- The executors ---


@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_plain_attention_is_exact_without_a_map(case):
    tensors, layout = inputs_of(case), layout_of(case)
    expected = dense_reference(*tensors, layout)
    assert_matches(plain_blocks(*tensors, layout, case.scaling), expected)
    assert_matches(plain_decode(*tensors, layout, case.scaling), expected)


@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_blocks_match_the_reference(case, by_head):
    tensors, layout = inputs_of(case), layout_of(case)
    block_map = random_block_map(case, 16, 8, 0.5, by_head)
    expected = dense_reference(*tensors, block_map.dense(layout, case.queries, case.keys))
    assert_matches(plain_blocks(*tensors, layout, case.scaling, block_map), expected)


@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_pages_match_the_reference(case):
    tensors, layout = inputs_of(case), layout_of(case)
    page_map = random_page_map(case, 8, 0.5)
    expected = dense_reference(*tensors, dense_of_pages(page_map, case))
    assert_matches(plain_decode(*tensors, layout, case.scaling, page_map), expected)


@given(
    case=cases(),
    query_block=blocks,
    key_block=blocks,
    share=st.floats(0, 1),
    by_head=st.booleans(),
    by_row=st.booleans(),
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_any_blocks_of_any_layout(case, query_block, key_block, share, by_head, by_row):
    tensors, layout = inputs_of(case), layout_of(case)
    block_map = random_block_map(case, query_block, key_block, share, by_head, by_row)
    expected = dense_reference(*tensors, block_map.dense(layout, case.queries, case.keys))
    assert_matches(plain_blocks(*tensors, layout, case.scaling, block_map), expected)


@given(case=cases(most_queries=9), page_tokens=blocks, share=st.floats(0, 1))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_any_pages_of_any_layout(case, page_tokens, share):
    tensors, layout = inputs_of(case), layout_of(case)
    page_map = random_page_map(case, page_tokens, share)
    expected = dense_reference(*tensors, dense_of_pages(page_map, case))
    assert_matches(plain_decode(*tensors, layout, case.scaling, page_map), expected)


def test_one_flag_stands_for_all_rows_and_heads_of_a_page_map():
    case = AttentionCase(batch=3, queries=1, past=40)
    tensors, layout = inputs_of(case), layout_of(case)
    page_map = PageMap(torch.tensor([[[True, False, False, True, False, True]]]), 8)
    expected = dense_reference(*tensors, page_map.dense(layout, 1, 41))
    assert_matches(plain_decode(*tensors, layout, case.scaling, page_map), expected)


@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize(
    "case",
    [
        AttentionCase(batch=2, queries=45, padding="left", head_dim=8),
        AttentionCase(queries=40, packed=(11, 20, 9), head_dim=8),
        AttentionCase(queries=21, past=30, head_dim=8),
    ],
    ids=str,
)
def test_gradients_match_the_reference(case, by_head):
    layout, block_map = layout_of(case), random_block_map(case, 8, 16, 0.6, by_head)
    tensors = inputs_of(case, requires_grad=True)
    weights = torch.randn(case.batch, case.queries, case.heads, case.head_dim, dtype=torch.float64)
    expected = dense_reference(*tensors, block_map.dense(layout, case.queries, case.keys))
    expected_gradients = torch.autograd.grad((expected * weights).sum(), tensors)
    output = plain_blocks(*tensors, layout, case.scaling, block_map)
    assert_matches(output.detach(), expected.detach())
    gradients = torch.autograd.grad((output * weights).sum(), tensors)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        assert_matches(gradient, wanted.double(), 5e-5)


@pytest.mark.parametrize("case", [c for c in ALL_CASES if c.causal], ids=str)
def test_the_future_changes_nothing(case):
    token = case.queries // 2
    tensors, layout = inputs_of(case), layout_of(case)
    block_map, page_map = random_block_map(case, 16, 8, 0.7, True), random_page_map(case, 8, 0.7)
    changed = perturb_future(case, tensors, token)
    for attend, sparse in ((plain_blocks, block_map), (plain_decode, page_map), (plain_blocks, None)):
        before, after = (attend(*x, layout, case.scaling, sparse)[:, : token + 1] for x in (tensors, changed))
        assert_matches(after, before.double(), 1e-5 if case.dtype == torch.float32 else None)


def test_skipped_blocks_are_not_read():
    case = AttentionCase(queries=64, head_dim=16)
    query, key, value = inputs_of(case)
    block_map = BlockMap(torch.eye(4, dtype=torch.bool)[None, None].clone(), 16, 16)
    block_map.mask[0, 0, :, 0] = True
    expected = plain_blocks(query, key, value, layout_of(case), case.scaling, block_map)
    key, value = key.clone(), value.clone()
    key[:, :, 16:32], value[:, :, 16:32] = float("nan"), float("nan")
    output = plain_blocks(query, key, value, layout_of(case), case.scaling, block_map)
    assert torch.equal(output[:, 32:], expected[:, 32:])
    assert output[:, 16:32].isnan().all(), "the block at the diagonal has to be read"
