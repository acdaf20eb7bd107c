"""Budgets, choices, scores and merging, each against its definition written out in loops."""

import math
from dataclasses import replace

import pytest
import torch
from helpers import one_line
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_vl.optim.cache import eviction_policies
from qwen3_vl.optim.cache.eviction_budget import (
    EvictionSettings,
    RowBudget,
    TokenCounts,
    choose_entries,
    packed_order,
    share_of,
    shrink,
)
from qwen3_vl.optim.cache.eviction_merging import merge_evicted
from qwen3_vl.optim.cache.eviction_policies import (
    POLICIES,
    Entries,
    attention_sums,
    latest_queries,
    pool_neighbours,
)


HEADS, GROUP, DIM = 2, 3, 8
SMALL = {"sink_tokens": 1, "window_tokens": 2, "observation_tokens": 2, "pool_tokens": 3}


def make_entries(pictures, padding=(0, 0), queries=3, budget=None, seed=0, **more):
    """Entries of two rows, in which each token of `pictures` (list) is one entry."""
    random = torch.Generator().manual_seed(seed)
    tokens = len(pictures)
    real = torch.arange(tokens) >= torch.tensor(padding)[:, None]
    of_tokens = torch.where(real, torch.tensor(pictures), 0)
    counts = TokenCounts(real, of_tokens)
    shape = (2, HEADS, tokens)
    return Entries(
        keys=torch.randn(*shape, DIM, generator=random),
        values=torch.randn(*shape, DIM, generator=random),
        positions=torch.arange(tokens).expand(shape),
        valid=real[:, None].expand(shape),
        ordinals=torch.where(real, counts.ordinals, -1)[:, None].expand(shape),
        pictures=of_tokens[:, None].expand(shape),
        seen=counts.total,
        budget=budget,
        queries=torch.randn(2, HEADS * GROUP, queries, DIM, generator=random),
        query_positions=torch.arange(tokens - queries, tokens).expand(2, -1),
        **more,
    )


def slow_weights(entries, row, head, query):
    """Attention of one query head to the entries of its KV head, by definition."""
    at = int(entries.query_positions[row, query])
    scores = []
    for index, position in enumerate(entries.positions[row, head // GROUP].tolist()):
        seen = at >= 0 and bool(entries.valid[row, head // GROUP, index]) and position <= at
        product = float(entries.queries[row, head, query] @ entries.keys[row, head // GROUP, index])
        scores.append(math.exp(product / DIM**0.5) if seen else 0.0)
    total = sum(scores)
    return torch.tensor([score / total if total else 0.0 for score in scores])


def slow_sums(entries, queries=None):
    sums = torch.zeros(entries.positions.shape)
    for row in range(2):
        for head in range(HEADS * GROUP):
            for query in range(entries.queries.shape[2]) if queries is None else queries:
                sums[row, head // GROUP] += slow_weights(entries, row, head, query)
    return sums


def ranking(scores, row, head, padding=0):
    """Real entries from the highest score down."""
    return sorted(range(padding, scores.shape[2]), key=lambda index: -float(scores[row, head, index]))


# --- Attention that entries got ---


@pytest.mark.parametrize("pieces", [2**24, 40])
def test_attention_is_causal_and_leaves_out_padding(monkeypatch, pieces):
    monkeypatch.setattr(eviction_policies, "PIECE_SCORES", pieces)
    entries = make_entries([0] * 9, padding=(0, 4), queries=6)
    assert torch.allclose(attention_sums(entries), slow_sums(entries), atol=1e-5)


def test_queries_that_do_not_count_and_those_that_see_nothing_pay_nothing():
    entries = make_entries([0] * 6, padding=(0, 5), queries=3)
    at = torch.tensor([[-1, 4, 5], [3, 4, 5]])  # of the second row the first two are before its only token
    sums = attention_sums(replace(entries, query_positions=at))
    assert sums[0].sum().item() == pytest.approx(2 * HEADS * GROUP, rel=1e-5)
    assert sums[1].sum().item() == pytest.approx(HEADS * GROUP, rel=1e-5)
    assert not sums[1, :, :5].any()


def test_the_latest_queries_that_count():
    queries = torch.arange(5.0)[None, None, :, None].expand(3, 2, 5, 4)
    positions = torch.tensor([[3, 4, -1, 6, -1], [-1, -1, -1, -1, 7], [1, 2, 3, 4, 5]])
    latest, at = latest_queries(queries, positions, 2)
    assert at.tolist() == [[4, 6], [-1, 7], [4, 5]]
    assert latest[0, 1, :, 0].tolist() == [1, 3] and latest[1, 0, 1, 3] == 4 and latest[2, 0, :, 0].tolist() == [3, 4]


def test_pooling_is_the_mean_of_neighbours():
    scores = torch.rand(1, 2, 7)
    expected = torch.stack([scores[..., max(i - 1, 0) : i + 2].sum(-1) / 3 for i in range(7)], dim=-1)
    assert torch.allclose(pool_neighbours(scores, 3), expected)
    assert torch.equal(pool_neighbours(scores, 1), scores)


# --- Policies ---


def test_streaming_keeps_the_first_and_the_latest():
    entries = make_entries([0] * 10, padding=(0, 3))
    scores = POLICIES["streaming"].score(entries, EvictionSettings(max_tokens=9, sink_tokens=2, window_tokens=2))
    assert ranking(scores, 0, 0)[:6] == [0, 1, 9, 8, 7, 6]
    assert ranking(scores, 1, 1, padding=3)[:5] == [3, 4, 9, 8, 7]


def test_random_differs_by_head_layer_and_seed_but_not_by_batch():
    entries = make_entries([0] * 40, padding=(0, 7))

    def scores(seed=0, **changed):
        chosen = EvictionSettings(max_tokens=30, seed=seed, sink_tokens=1, window_tokens=2)
        return POLICIES["random"].score(replace(entries, **changed), chosen)

    first = scores()
    # The second row's token at place 7 is its first.
    assert torch.equal(first[1, :, 7:38], first[0, :, :31])
    assert ranking(first, 0, 0)[:3] == [0, 39, 38]
    orders = {tuple(ranking(x, 0, head)) for x in (first, scores(seed=1), scores(layer=3)) for head in range(HEADS)}
    assert len(orders) == 6
    inner = torch.cat([scores(seed=seed)[0, :, 1:38].flatten() for seed in range(50)])
    assert abs(inner.mean() - 0.5) < 0.02 and abs(inner.var() - 1 / 12) < 0.01


def test_h2o_keeps_half_the_budget_of_latest_and_the_most_attended():
    budget = RowBudget(torch.tensor([6, 4]), torch.tensor([[6], [4]]))
    sums = torch.rand(2, HEADS, 10)
    scores = POLICIES["h2o"].score(make_entries([0] * 10, budget=budget, sums=sums), EvictionSettings(max_tokens=40))
    for row, count in ((0, 3), (1, 2)):
        for head in range(HEADS):
            order = ranking(scores, row, head)
            assert order[:count] == list(range(9, 9 - count, -1))
            assert order[count:] == sorted(range(10 - count), key=lambda i: -float(sums[row, head, i]))


def test_snapkv_keeps_the_window_and_what_it_attends_to_pooled():
    entries = make_entries([0] * 12, padding=(0, 4), queries=2)
    scores = POLICIES["snapkv"].score(entries, EvictionSettings(max_tokens=9, **SMALL))
    sums = slow_sums(entries)
    for row in range(2):
        for head in range(HEADS):
            before = sums[row, head, :10]
            pooled = [sum(float(before[j]) for j in (i - 1, i, i + 1) if 0 <= j < 10) for i in range(10)]
            order = ranking(scores, row, head, padding=4 * row)
            assert order[:2] == [11, 10]
            assert order[2:] == sorted(range(4 * row, 10), key=lambda i: -pooled[i])


def test_modality_ranks_by_attention_and_protects_text_at_both_ends():
    pictures = [0, 0, 1, 1, 1, 0, 2, 2, 0, 0, 0, 0]
    entries = make_entries(pictures, queries=3)
    scores = POLICIES["modality"].score(entries, EvictionSettings(**SMALL))
    sums = slow_sums(entries)
    for head in range(HEADS):
        order = ranking(scores, 0, head)
        assert order[:3] == [0, 11, 10]
        assert order[3:] == sorted(range(1, 10), key=lambda i: -float(sums[0, head, i]))


@pytest.mark.parametrize("policy", ["modality", "random"])
def test_the_window_protects_no_entry_of_a_picture(policy):
    """Else short prompts would keep the latest entries of every picture, whatever the policy."""
    pictures = [0, 0, 1, 1, 1, 1, 0, 0]
    scores = POLICIES[policy].score(make_entries(pictures), EvictionSettings(window_tokens=20, sink_tokens=4))
    assert scores[:, :, 2:6].max() < 50 < scores[:, :, [0, 1, 6, 7]].min()
    assert len({tuple(ranking(scores, row, head)[4:]) for row in range(2) for head in range(HEADS)}) > 1


def test_pyramid_budgets_fall_evenly_and_have_the_mean_of_all():
    factors = [POLICIES["pyramid"].layer_factor(layer, 6) for layer in range(6)]
    assert sum(factors) == pytest.approx(6) and factors[5] == pytest.approx(1 / 20)
    steps = torch.tensor(factors).diff()
    assert torch.allclose(steps, steps[:1].expand(5)) and steps[0] < 0
    assert POLICIES["snapkv"].layer_factor(3, 6) == 1 == POLICIES["pyramid"].layer_factor(0, 1)


# --- Budgets ---

PICTURES = [0, 0, 1, 1, 1, 1, 1, 0, 2, 2, 2, 0, 0, 0]  # 6 of text, 5 and 3 visual ones


def budget_of(by_modality=True, padding=0, factor=1.0, pictures=PICTURES, **limits):
    real = (torch.arange(len(pictures)) >= padding)[None]
    given = EvictionSettings(sink_tokens=0, window_tokens=0, **limits)
    counts = TokenCounts(real, torch.tensor([pictures]))
    return counts.budget(given, by_modality, given.visual_share_of(0), factor)


@pytest.mark.parametrize(
    ("limits", "total", "groups"),
    [
        ({"visual_share": 0.25}, 9, [6, 2, 1]),
        ({"visual_share": 0.4}, 10, [6, 2, 2]),
        ({"visual_share": 0.5, "text_share": 0.5}, 8, [3, 3, 2]),
        ({"visual_share": 1.0, "max_tokens": 9}, 9, [6, 1, 2]),
        ({"visual_share": 1.0, "max_tokens": 6}, 6, [6, 0, 0]),
        ({"visual_share": 1.0, "max_tokens": 4}, 4, [4, 0, 0]),
        ({"visual_share": 1.0, "max_tokens": 50}, 14, [6, 5, 3]),
        ({"layer_shares": (0.2, 1.0)}, 8, [6, 1, 1]),
    ],
)
def test_pictures_go_before_text(limits, total, groups):
    budget = budget_of(**limits)
    assert budget.total.tolist() == [total] and budget.groups.tolist() == [groups]
    assert budget_of(by_modality=False, **limits).groups.tolist() == [[total]]


def test_padding_has_no_budget_and_the_newest_picture_none_yet():
    assert budget_of(padding=2, visual_share=0.25).groups.tolist() == [[4, 2, 1]]
    assert budget_of(pictures=[*PICTURES, 3, 3, 3], visual_share=0.25).groups.tolist() == [[6, 2, 1, 3]]
    assert budget_of(pictures=[0] * 5, visual_share=0.25).groups.tolist() == [[5]]


def test_a_layer_that_gets_less_leaves_rows_alone_that_fit():
    assert budget_of(by_modality=False, visual_share=0.25, factor=0.5).total.tolist() == [5]
    assert budget_of(by_modality=False, visual_share=1.0, max_tokens=20, factor=0.5).total.tolist() == [14]
    assert budget_of(by_modality=False, visual_share=0.25, factor=1.9).total.tolist() == [14]


def test_shares_of_whole_numbers():
    counts = torch.tensor([0, 1, 10, 100, 1000])
    assert share_of(counts, 0.1).tolist() == [0, 1, 1, 10, 100]
    assert share_of(counts, 0.3).tolist() == [0, 1, 3, 30, 300]
    assert share_of(counts, 1.0).tolist() == counts.tolist()


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(0, 40))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_shrinking_is_even_and_exact(counts, total):
    found = shrink(torch.tensor([counts]), torch.tensor([total]))[0].tolist()
    assert sum(found) == min(total, sum(counts))
    assert all(0 <= one <= other for one, other in zip(found, counts, strict=True))
    assert all(
        abs(one - other * min(1, total / max(sum(counts), 1))) <= 1 for one, other in zip(found, counts, strict=True)
    )


# --- Choice ---


@given(
    st.integers(0, 10**6), st.lists(st.integers(-1, 3), min_size=1, max_size=12), st.tuples(*[st.integers(0, 5)] * 4)
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_of_each_group_the_best_stay(seed, groups, limits):
    scores = torch.randint(0, 5, (1, HEADS, len(groups)), generator=torch.Generator().manual_seed(seed)).float()
    given_groups = torch.tensor(groups).expand(1, HEADS, -1)
    kept = choose_entries(scores, given_groups, RowBudget(torch.tensor([0]), torch.tensor([limits])))
    for head in range(HEADS):
        expected = set()
        for group, limit in enumerate(limits):
            members = [i for i, own in enumerate(groups) if own == group]
            expected |= set(sorted(members, key=lambda i: -float(scores[0, head, i]))[:limit])
        assert set(kept[0, head].nonzero().flatten().tolist()) == expected


def test_kept_entries_are_packed_to_the_right_and_gaps_repeat_the_first():
    kept = torch.tensor([[[0, 1, 0, 1, 1], [1, 1, 0, 0, 1]], [[0, 0, 1, 0, 0], [0, 0, 0, 0, 1]]]).bool()
    places, gaps = packed_order(kept)
    assert places.tolist() == [[[1, 3, 4], [0, 1, 4]], [[2, 2, 2], [4, 4, 4]]]
    assert gaps.tolist() == [0, 2]
    places, gaps = packed_order(torch.zeros(2, 1, 4, dtype=torch.bool))
    assert places.shape == (2, 1, 1) and gaps.tolist() == [1, 1]


# --- Merging ---


def attend(query, keys, values):
    return (query @ keys.T * DIM**-0.5).softmax(-1) @ values


def test_for_a_single_query_nothing_is_lost():
    """The output of its attention is the same, and text stays what it was."""
    pictures = [0, 1, 1, 1, 1, 0, 2, 2, 2, 0]
    entries = make_entries(pictures, padding=(0, 1), queries=1)
    entries = replace(entries, queries=entries.queries[:, :HEADS])
    kept = torch.zeros(2, HEADS, 10, dtype=torch.bool)
    for row in range(2):
        for head in range(HEADS):
            kept[row, head, [0, 5, 9, 2 + head, 3 + head, 6 + row]] = True
    keys, values = merge_evicted(entries, kept)
    for row in range(2):
        for head in range(HEADS):
            own, first = kept[row, head], row  # without padding
            query = entries.queries[row, head, 0]
            full = attend(query, entries.keys[row, head, first:], entries.values[row, head, first:])
            mask = own & (torch.arange(10) >= first)
            assert torch.allclose(attend(query, keys[row, head, mask], values[row, head, mask]), full, atol=1e-5)
            text = torch.tensor(pictures) == 0
            assert torch.equal(keys[row, head, text], entries.keys[row, head, text])


def test_equal_entries_count_as_many_as_they_were():
    """For any number of queries, if they are alike in what they pay: four times the same key and value."""
    entries = make_entries([0, 1, 1, 1, 1, 0, 0], queries=2)
    entries.keys[:, :, 1:5] = entries.keys[:, :, 1:2].clone()
    entries.values[:, :, 1:5] = entries.values[:, :, 1:2].clone()
    entries.queries[:] = entries.queries[:, :, :1, :].clone()
    entries.queries[:, 1:] = entries.queries[:, :1].clone()
    kept = torch.tensor([1, 0, 0, 1, 0, 1, 1]).bool().expand(2, HEADS, -1)
    keys, values = merge_evicted(entries, kept)
    query = entries.queries[0, 0, 0]
    gained = (keys[0, 0, 3] - entries.keys[0, 0, 3]) @ query * DIM**-0.5
    assert gained.item() == pytest.approx(math.log(4), abs=1e-5)
    assert torch.allclose(values[0, 0, 3], entries.values[0, 0, 3], atol=1e-6)


def test_an_entry_joins_the_most_alike_of_its_own_picture():
    entries = make_entries([1, 1, 1, 0, 2, 2, 0], queries=1)
    entries.keys[0, 0] = torch.eye(8)[[0, 1, 0, 1, 0, 0, 3]] + 0.01 * entries.keys[0, 0]
    kept = torch.tensor([1, 1, 0, 1, 1, 1, 1]).bool().expand(2, HEADS, -1)
    _, values = merge_evicted(entries, kept)
    changed = [i for i in range(7) if not torch.equal(values[0, 0, i], entries.values[0, 0, i])]
    assert changed == [0]
    with_nothing_evicted = merge_evicted(entries, torch.ones(2, HEADS, 7).bool())
    assert with_nothing_evicted[0] is entries.keys


# --- Settings ---


@pytest.mark.parametrize(
    ("given_settings", "message"),
    [
        ({"visual_share": 0}, "visual_share must be over 0 and up to 1, got 0"),
        ({"text_share": 1.5}, "text_share must be over 0"),
        ({"layer_shares": (0.2, 0)}, "layer_shares must be over 0"),
        ({"max_tokens": 0}, "max_tokens must be a whole number of at least 1"),
        ({"max_tokens": 36}, "leaves no room beside 4 sink and 32 window tokens"),
        ({"window_tokens": -1}, "window_tokens must be a whole number of at least 0"),
        ({"slack_tokens": 1.5}, "slack_tokens must be a whole number"),
        ({"observation_tokens": 0}, "observation_tokens must be"),
        ({"pool_tokens": 4}, "pool_tokens must be odd"),
        ({"visual_share": 1.0}, "no entry would ever be evicted"),
    ],
)
def test_settings_that_make_no_sense(given_settings, message):
    with pytest.raises(ValueError, match=message) as error:
        EvictionSettings(**given_settings)
    one_line(error.value)
