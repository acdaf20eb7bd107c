"""Scores of blocks and pages against their definitions, written token by token."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import AttentionCase, dense_mask_of, inputs_of, layout_of, valid_of

from qwen3_vl.optim.attention.attention_layout import AttentionLayout
from qwen3_vl.optim.attention.block_map import BlockMap, anchor_blocks, visible_pairs
from qwen3_vl.optim.attention.block_selection import (
    antidiagonal_mass,
    kept_mass,
    page_bounds,
    pooled_mass,
    select_blocks,
    select_pages,
)
from qwen3_vl.optim.attention.page_scores import page_scores


CASES = (
    AttentionCase(queries=64, head_dim=8),
    AttentionCase(batch=2, queries=53, past=30, groups=3, head_dim=8),
    AttentionCase(batch=2, queries=50, padding="left", padding_step=13, head_dim=8),
    AttentionCase(batch=2, queries=50, padding="right", padding_step=9, head_dim=8),
    AttentionCase(batch=2, queries=60, packed=(21, 9, 30), head_dim=8),
    AttentionCase(queries=40, past=17, spare=11, head_dim=8),
)
QUERY_BLOCK, KEY_BLOCK, STRIDE = 16, 8, 4


def is_seen(case, row, query_group, key_group):
    """Groups given as lists of positions; both have a real token, share a sequence, and no key is late."""
    valid = valid_of(case)
    if valid is not None and not (valid[row, key_group].any() and valid[row, query_group].any()):
        return False
    if key_group[-1] > query_group[-1]:
        return False
    if not case.packed:
        return True
    own = layout_of(case).segments[row]
    return bool((own[query_group][:, None] == own[key_group][None]).any())


def real(case, row, group):
    valid = valid_of(case)
    return group if valid is None else [t for t in group if valid[row, t]]


def groups_of(first, stop, size):
    return [list(range(a, min(a + size, stop))) for a in range(first, stop, size)]


def slow_softmax(scores):
    """Of rows where -inf is not seen; zeros for rows that see nothing."""
    return torch.nan_to_num(scores.softmax(-1), nan=0.0)


def slow_pooled(case, query, key):
    queries = groups_of(case.past, case.seen, QUERY_BLOCK)
    keys = groups_of(0, case.keys, KEY_BLOCK)
    scores = torch.full((case.batch, case.heads, len(queries), len(keys)), float("-inf"), dtype=torch.float64)
    for b in range(case.batch):
        for i, own in enumerate(queries):
            for j, other in enumerate(keys):
                if not is_seen(case, b, own, other):
                    continue
                for h in range(case.heads):
                    mean = query[b, h, [t - case.past for t in real(case, b, own)]].double().mean(0)
                    scores[b, h, i, j] = mean @ key[b, h // case.groups, real(case, b, other)].double().mean(0)
    return slow_softmax(scores * case.scaling)


def filled(x, tokens, group):
    """Vectors of a group of `STRIDE`, where the missing ones are the mean of the others."""
    mean = x[tokens].double().mean(0)
    return torch.stack([x[t].double() if t in tokens else mean for t in group])


def slow_antidiagonal(case, query, key):
    queries, keys = groups_of(case.past, case.seen, STRIDE), groups_of(0, case.keys, STRIDE)
    scores = torch.full((case.batch, case.heads, len(queries), len(keys)), float("-inf"), dtype=torch.float64)
    for b in range(case.batch):
        for i, own in enumerate(queries):
            for j, other in enumerate(keys):
                if not is_seen(case, b, own, other):
                    continue
                whole = (list(range(group[0], group[0] + STRIDE)) for group in (own, other))
                own_whole, other_whole = whole
                for h in range(case.heads):
                    shifted = [t - case.past for t in real(case, b, own)]
                    first = filled(query[b, h], shifted, [t - case.past for t in own_whole])
                    second = filled(key[b, h // case.groups], real(case, b, other), other_whole)
                    scores[b, h, i, j] = (first * second.flip(0)).sum() / STRIDE
    share = slow_softmax(scores * case.scaling)
    blocks = -(-case.queries // QUERY_BLOCK), -(-case.keys // KEY_BLOCK)
    mass = torch.zeros(case.batch, case.heads, *blocks, dtype=torch.float64)
    for i in range(len(queries)):
        for j in range(len(keys)):
            mass[..., i * STRIDE // QUERY_BLOCK, j * STRIDE // KEY_BLOCK] += share[..., i, j]
    return mass


@pytest.mark.parametrize("case", CASES, ids=str)
def test_pooled_mass(case):
    query, key, _ = inputs_of(case)
    mass = pooled_mass(query * 4, key, layout_of(case), case.scaling, QUERY_BLOCK, KEY_BLOCK)
    torch.testing.assert_close(mass.double(), slow_pooled(case, query * 4, key), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("at_once", [2**24, 1])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_antidiagonal_mass(case, at_once, monkeypatch):
    monkeypatch.setattr("qwen3_vl.optim.attention.block_selection.SCORES_AT_ONCE", at_once)
    query, key, _ = inputs_of(case)
    mass = antidiagonal_mass(query * 4, key, layout_of(case), case.scaling, QUERY_BLOCK, KEY_BLOCK, STRIDE)
    torch.testing.assert_close(mass.double(), slow_antidiagonal(case, query * 4, key), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("scored", [pooled_mass, antidiagonal_mass])
@pytest.mark.parametrize("case", [c for c in CASES if c.padding != "none"], ids=str)
def test_padding_counts_in_no_score(case, scored):
    stride = (STRIDE,) if scored is antidiagonal_mass else ()
    query, key, _ = inputs_of(case)
    mass = scored(query, key, layout_of(case), case.scaling, QUERY_BLOCK, KEY_BLOCK, *stride)
    changed_query, changed_key = query.clone(), key.clone()
    padding = ~valid_of(case)
    changed_key.transpose(1, 2)[padding] = 1e4
    changed_query.transpose(1, 2)[padding[:, case.past : case.seen]] = 1e4
    again = scored(changed_query, changed_key, layout_of(case), case.scaling, QUERY_BLOCK, KEY_BLOCK, *stride)
    assert torch.equal(mass, again)


@pytest.mark.parametrize("past", [0, 16, 13])
@pytest.mark.parametrize("scored", [pooled_mass, antidiagonal_mass])
def test_tokens_of_later_blocks_count_in_no_score(scored, past):
    stride = (STRIDE,) if scored is antidiagonal_mass else ()
    case = AttentionCase(queries=48, past=past, head_dim=8)
    query, key, _ = inputs_of(case)
    mass = scored(query, key, layout_of(case), case.scaling, QUERY_BLOCK, KEY_BLOCK, *stride)
    query, key = query.clone(), key.clone()
    query[:, :, 32:], key[:, :, past + 32 :] = 50.0, 50.0
    again = scored(query, key, layout_of(case), case.scaling, QUERY_BLOCK, KEY_BLOCK, *stride)
    torch.testing.assert_close(again[:, :, :2], mass[:, :, :2], atol=1e-6, rtol=1e-6)
    assert not torch.allclose(again[:, :, 2], mass[:, :, 2])


@pytest.mark.parametrize("past", [0, 13])
def test_bfloat16_scores_are_close(past):
    case = AttentionCase(batch=2, queries=200, past=past, groups=4)
    query, key, _ = inputs_of(case)
    for scored, stride in ((pooled_mass, ()), (antidiagonal_mass, (STRIDE,))):
        exact = scored(query, key, layout_of(case), case.scaling, QUERY_BLOCK, KEY_BLOCK, *stride)
        rounded = scored(
            query.bfloat16(), key.bfloat16(), layout_of(case), case.scaling, QUERY_BLOCK, KEY_BLOCK, *stride
        )
        # Probabilities of scores rounded to 8 bits.
        torch.testing.assert_close(rounded, exact, atol=2e-2, rtol=3e-2)


@pytest.mark.parametrize("scored", ["pooled", "antidiagonal"])
def test_blocks_that_matter_are_found(scored):
    """Every query looks for the keys of one block far back; it has to be among those kept."""
    case = AttentionCase(queries=256, kv_heads=2, groups=2, head_dim=32)
    query, key, _ = inputs_of(case)
    wanted = torch.tensor([3, 11])  # of each KV head
    for head, block in enumerate(wanted):
        direction = torch.randn(32)
        key[:, head, block * 8 : block * 8 + 8] = direction
        query[:, head * 2 : head * 2 + 2] += 2 * direction
    layout = layout_of(case)
    score = pooled_mass if scored == "pooled" else antidiagonal_mass
    mass = score(query, key, layout, case.scaling, QUERY_BLOCK, KEY_BLOCK, *(() if scored == "pooled" else (STRIDE,)))
    block_map = select_blocks(mass, layout, 256, 256, QUERY_BLOCK, KEY_BLOCK, 0.9, 1, 16)
    for head in range(4):
        assert block_map.mask[0, head, 8:, wanted[head // 2]].all()
    assert kept_mass(query, key, layout, case.scaling, block_map).min() > 0.85
    assert block_map.density(layout, 256, 256) < 0.5


@given(
    case=st.sampled_from(CASES),
    seed=st.integers(0, 100),
    threshold=st.sampled_from((0.2, 0.5, 0.9, 0.99)),
    min_blocks=st.integers(1, 5),
    window=st.integers(1, 30),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_the_smallest_set_that_covers_the_mass(case, seed, threshold, min_blocks, window):
    layout = layout_of(case)
    blocks = case.queries, case.keys, QUERY_BLOCK, KEY_BLOCK
    visible = (visible_pairs(layout, *blocks) > 0)[:, None].expand(case.batch, case.heads, -1, -1)
    mass = torch.rand(visible.shape, generator=torch.Generator().manual_seed(seed)) ** 8
    block_map = select_blocks(mass, layout, *blocks, threshold, min_blocks, window)
    anchors = anchor_blocks(layout, *blocks, 1, window)[:, None] & visible
    kept, mass = block_map.mask, (mass * visible).double()
    assert not (kept & ~visible).any()
    assert (kept | ~anchors).all(), "an anchor is missing"
    assert (kept.sum(-1) >= visible.sum(-1).clamp(max=min_blocks)).all()
    covered, total = (mass * kept).sum(-1), mass.sum(-1)
    assert (covered >= threshold * total - 1e-6).all()
    # Beyond anchors and floor, the lightest kept block is needed, and nothing heavier was left out.
    optional = kept & ~anchors
    lightest = mass.masked_fill(~optional, float("inf")).amin(-1)
    needed = covered - lightest < threshold * total + 1e-6
    assert (needed | (kept.sum(-1) <= min_blocks) | ~optional.any(-1)).all()
    left_out = mass.masked_fill(kept | ~visible, 0.0).amax(-1)
    assert (left_out <= lightest).all()


def test_more_of_the_mass_takes_more_blocks():
    case = AttentionCase(queries=128, head_dim=16)
    query, key, _ = inputs_of(case)
    layout = layout_of(case)
    mass = antidiagonal_mass(query * 3, key, layout, case.scaling, QUERY_BLOCK, KEY_BLOCK, STRIDE)
    maps = [
        select_blocks(mass, layout, 128, 128, QUERY_BLOCK, KEY_BLOCK, t, 1, 1).mask for t in (0.3, 0.6, 0.9, 0.999)
    ]
    for few, many in pairwise(maps):
        assert (many | ~few).all() and many.sum() > few.sum()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kept_mass_is_that_of_exact_attention(case):
    query, key, _ = inputs_of(case)
    shape = (case.batch, case.heads, -(-case.queries // QUERY_BLOCK), -(-case.keys // KEY_BLOCK))
    block_map = BlockMap(torch.rand(shape) < 0.5, QUERY_BLOCK, KEY_BLOCK)
    mask = dense_mask_of(case)
    scores = query.double() @ key.double().repeat_interleave(case.groups, 1).mT * case.scaling
    share = slow_softmax(scores.masked_fill(~mask, float("-inf")))
    flags = block_map.mask.repeat_interleave(QUERY_BLOCK, 2).repeat_interleave(KEY_BLOCK, 3)
    covered = (share * flags[:, :, : case.queries, : case.keys]).sum(-1)
    expected = covered.sum(-1) / mask.any(-1).sum(-1)
    result = kept_mass(query, key, layout_of(case), case.scaling, block_map, samples=case.queries)
    torch.testing.assert_close(result.double(), expected, atol=1e-5, rtol=1e-4)


# --- Pages ---


@pytest.mark.parametrize("page_tokens", [8, 5, 64])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_page_bounds(padding, page_tokens):
    case = AttentionCase(batch=2, queries=1, past=40, padding=padding, padding_step=11, head_dim=8)
    _, key, _ = inputs_of(case)
    low, high = page_bounds(key, layout_of(case), page_tokens)
    valid = torch.ones(2, 41, dtype=torch.bool) if padding == "none" else valid_of(case)
    for b in range(2):
        for page in range(low.shape[2]):
            tokens = [t for t in range(page * page_tokens, min((page + 1) * page_tokens, 41)) if valid[b, t]]
            if tokens:
                assert torch.equal(low[b, :, page], key[b, :, tokens].amin(1))
                assert torch.equal(high[b, :, page], key[b, :, tokens].amax(1))


@given(
    seed=st.integers(0, 100),
    past=st.integers(20, 90),
    padding=st.sampled_from(("none", "left", "right")),
    kept=st.integers(1, 12),
    window=st.integers(1, 12),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_pages_by_their_upper_bounds(seed, past, padding, kept, window):
    case = AttentionCase(batch=2, queries=1, past=past, groups=2, head_dim=8, padding=padding, padding_step=7)
    query, key, _ = inputs_of(case, seed)
    layout, page_tokens = layout_of(case), 4
    low, high = page_bounds(key, layout, page_tokens)
    page_map = select_pages(page_scores(query, low, high), 1, layout, case.keys, page_tokens, kept, window)
    seen = visible_pairs(layout, 1, case.keys, 1, page_tokens)[:, 0] > 0
    anchors = seen & anchor_blocks(layout, 1, case.keys, 1, page_tokens, 1, window)[:, 0]
    for b in range(2):
        row = b if len(seen) > 1 else 0
        for h in range(case.kv_heads):
            heads = query[b, h * 2 : h * 2 + 2, 0]
            bound = torch.maximum(heads[:, None] * low[b, h], heads[:, None] * high[b, h]).sum(-1).amax(0)
            flags = page_map.mask[b, h]
            assert not (flags & ~seen[row]).any() and (flags | ~anchors[row]).all()
            wanted = max(min(kept, int(seen[row].sum())), int(anchors[row].sum()))
            assert flags.sum() == wanted
            chosen, left = bound[flags & ~anchors[row]], bound[seen[row] & ~flags]
            if len(chosen) and len(left):
                assert chosen.min() >= left.max() - 1e-5
            # The bounds hold: no key of a page scores higher.
            scores = (heads @ key[b, h].T).amax(0)
            for page in seen[row].nonzero()[:, 0].tolist():
                tokens = range(page * 4, min(page * 4 + 4, case.keys))
                real_keys = [t for t in tokens if layout.valid is None or layout.valid[b, t]]
                assert bound[page] >= scores[real_keys].max() - 1e-4


def test_what_is_remembered_does_not_mix_windows():
    layout, mass = AttentionLayout(0), torch.zeros(1, 4, 4, 8)
    small, large = (select_blocks(mass, layout, 64, 64, QUERY_BLOCK, KEY_BLOCK, 0.5, 1, w) for w in (1, 40))
    assert large.mask.sum() > small.mask.sum()
