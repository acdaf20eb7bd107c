"""The evicting layer and cache alone: against a plain list model, faults, undoing, rows, bytes."""

import copy
import pickle

import pytest
import torch
from helpers import make_pair, one_line
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_vl import EvictingKVCache
from qwen3_vl.optim.cache.cache_paged import PagedLayer
from qwen3_vl.optim.cache.evicting_layer import EvictingLayer
from qwen3_vl.optim.cache.eviction_budget import EvictionSettings, TokenNotes
from qwen3_vl.optim.cache.eviction_policies import POLICIES
from qwen3_vl.optim.cache.memory_pool import MemoryPool, PagePools


HEADS, DIM, PAGE = 2, 4, 4
SMALL = {"sink_tokens": 1, "window_tokens": 2, "observation_tokens": 2, "slack_tokens": 2, "pool_tokens": 1}


def make_layer(policy="streaming", notes=None, pools=None, **limits):
    given = EvictionSettings(**{**SMALL, "max_tokens": 6, **limits})
    pools = PagePools(PAGE) if pools is None else pools
    return EvictingLayer(POLICIES[policy], given, lambda: PagedLayer(pools), notes)


def stamped(rows, new, start=0):
    """Keys that say where they belong: `t + row / 8 + head / 64`; values are their negatives."""
    tokens = torch.arange(start, start + new)[None, None, :, None]
    row, head = torch.arange(rows)[:, None, None, None], torch.arange(HEADS)[None, :, None, None]
    keys = (tokens + row / 8 + head / 64).expand(rows, HEADS, new, DIM)
    return keys, -keys


def extend(layer, rows, new, **options):
    """One forward of `new` tokens."""
    start = layer.get_seq_length()
    layer.notes.length = start + new
    layer.make_room()
    queries = torch.randn(rows, 2 * HEADS, new, DIM)
    return layer.update(*stamped(rows, new, start), query_states=queries, **options)


def assert_holds_stamps(layer):
    """That every entry is the token that `kept_positions` says, in order, with the same number in all heads."""
    if not layer.rows:
        return
    keys, values = layer.dense()
    positions = layer.kept_positions.expand(-1, HEADS, -1)
    assert keys.shape[:3] == positions.shape and layer.entries == keys.shape[2]
    held = positions >= 0
    assert torch.equal(keys.mean(-1).floor().long()[held], positions[held]) and torch.equal(values, -keys)
    assert bool(((positions.diff(dim=2) > 0) | ~held[..., :-1]).all())
    assert bool((held.sum(-1) == held[:, :1].sum(-1)).all())


# --- One layer ---


def test_a_long_forward_attends_to_all_and_leaves_the_selection():
    layer = make_layer()
    given = stamped(2, 11)
    layer.notes.length = 11
    keys, values = layer.update(*given)
    assert keys is given[0] and values is given[1]
    assert layer.get_seq_length() == 11 and layer.entries == 6 and layer.reader.get_seq_length() == 6
    assert layer.kept_positions.tolist() == [[[0, 6, 7, 8, 9, 10]] * HEADS] * 2
    assert_holds_stamps(layer)
    keys, _ = extend(layer, 2, 5, dense=False)
    assert keys[0, 0, :, 0].tolist() == [0, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]
    assert layer.kept_positions[1, 0].tolist() == [0, 11, 12, 13, 14, 15]
    assert layer.get_mask_sizes(3) == (9, 0)


def test_single_tokens_are_appended_in_place_until_the_slack_is_used_up():
    layer = make_layer()
    extend(layer, 1, 11)
    store, entries = layer.reader, []
    for _ in range(8):
        new = extend(layer, 1, 1, dense=False)
        assert new[0].shape[2] == 1
        entries.append(layer.entries)
    assert entries == [7, 8, 9, 7, 8, 9, 7, 8]
    assert layer.reader is not store and layer.get_seq_length() == 19
    assert_holds_stamps(layer)


def test_a_window_longer_than_the_history_evicts_nothing():
    layer = make_layer(max_tokens=50, window_tokens=40)
    for new in (9, 1, 1, 7):
        extend(layer, 2, new)
    assert not layer.evicted and layer.entries == 18
    assert layer.kept_positions.shape == (2, 1, 18)


def test_nothing_is_looked_at_while_nothing_can_have_changed(monkeypatch):
    layer, looks = make_layer(max_tokens=8, slack_tokens=10), []
    extend(layer, 1, 12)
    excess = EvictingLayer._excess
    monkeypatch.setattr(EvictingLayer, "_excess", lambda self, *held: looks.append(0) or excess(self, *held))
    for _ in range(10):
        extend(layer, 1, 1)
    assert not looks
    for _ in range(3):
        extend(layer, 1, 1)
    assert looks and layer.entries <= 8 + 2


def test_padding_goes_first_and_leaves_gaps():
    valid = torch.tensor([[0, 0, 0, 0, 0, 0, 0, 1, 1, 1], [1] * 10, [0] * 10]).bool()
    layer = make_layer(notes=TokenNotes(10, valid))
    layer.update(*stamped(3, 10))
    assert layer.kept_positions[:, 1].tolist() == [[-1] * 3 + [7, 8, 9], [0, 5, 6, 7, 8, 9], [-1] * 6]
    mask = torch.cat((valid, torch.ones(3, 2).bool()), dim=1)
    assert layer.by_entry(mask, 2).tolist() == [
        [False] * 3 + [True] * 5,
        [True] * 8,
        [False] * 6 + [True] * 2,
    ]
    assert layer.by_entry(None, 2).tolist() == layer.by_entry(mask, 2).tolist()


def test_rows_move_with_gaps_sums_and_queries():
    valid = torch.ones(3, 10).bool()
    valid[0, :8] = False
    layer = make_layer("h2o", notes=TokenNotes(10, valid))
    layer.update(*stamped(3, 10), query_states=torch.randn(3, 4, 10, DIM))
    layer.notes.describe(11, torch.nn.functional.pad(valid, (0, 1), value=True), None)
    layer.update(*stamped(3, 1, 10), query_states=torch.randn(3, 4, 1, DIM))
    before, positions = layer._holding, layer.kept_positions
    rows = torch.tensor([2, 0, 0])
    layer.reorder_cache(rows)
    assert torch.equal(layer.kept_positions, positions[rows]) and layer._holding.gaps == (0, 4, 4)
    assert torch.equal(layer._holding.sums, before.sums[rows])
    assert torch.equal(layer._holding.queries, before.queries[rows])
    layer.batch_repeat_interleave(2)
    assert layer.rows == 6 and torch.equal(layer.kept_positions, positions[rows].repeat_interleave(2, 0))
    layer.batch_select_indices(torch.tensor([True, False, False, False, True, False]))
    assert torch.equal(layer.kept_positions, positions[[2, 0]])
    assert torch.equal(layer.dense()[0][:, 0, :, 0].floor().long()[:, 4:], positions[[2, 0], 0, 4:])
    with pytest.raises(IndexError, match="2 rows"):
        layer.batch_select_indices(torch.tensor([5]))
    assert layer.rows == 2


def test_attention_is_counted_once_however_it_comes():
    """H2O's sums after one forward, and after the same tokens one by one, are equal."""
    queries = torch.randn(1, 4, 40, DIM)
    keys = torch.randn(1, HEADS, 40, DIM)
    sums = []
    for parts in ([40], [17, *[1] * 23], [1] * 40):
        layer, start = make_layer("h2o", max_tokens=60, window_tokens=3), 0
        for new in parts:
            layer.notes.length = start + new
            layer.make_room()
            end = start + new
            layer.update(keys[:, :, start:end], keys[:, :, start:end], query_states=queries[:, :, start:end])
            start = end
        layer._count_attention(*layer.dense())
        sums.append(layer._holding.sums)
    assert torch.allclose(sums[0], sums[1], atol=1e-4) and torch.allclose(sums[0], sums[2], atol=1e-4)
    assert sums[0].sum().item() == pytest.approx(4 * 40, rel=1e-4)


def test_bytes_fall_with_the_entries():
    layer = make_layer(max_tokens=16)
    page = MemoryPool(HEADS, DIM, page_tokens=PAGE, max_pages=1).page_bytes
    extend(layer, 2, 12)
    assert layer.held_bytes == 2 * 3 * page
    extend(layer, 2, 30)
    assert layer.held_bytes == 2 * 4 * page + 4 * 2 * HEADS * 16
    assert layer.reader.pool.statistics().pages_held == 2 * (4 + 3)  # until it is certain that all layers succeed
    layer.commit()
    assert layer.reader.pool.statistics().pages_held == 2 * 4
    layer.reset()
    assert layer.reader.pool is None and layer.held_bytes == 0 and layer.get_seq_length() == 0


def test_what_layer_and_cache_say_of_themselves():
    cache = EvictingKVCache(make_pair("dense").ours.config)
    for one in (cache, cache.layers[0]):
        assert (one.is_croppable, one.is_compileable, one.get_max_length()) == (False, False, -1)
    assert len(cache) == 3 and cache.get_seq_length() == 0 and cache.get_query_offset(1) == 0
    assert cache.layers[0].wants_queries and not make_layer("streaming").wants_queries


# --- Against a plain list ---


class PlainLayer:
    """The streaming layer as lists of token numbers, a row each."""

    def __init__(self, limit, slack):
        self.limit, self.slack, self.seen, self.kept = limit, slack, 0, None

    def extend(self, rows, new):
        self.kept = [[] for _ in range(rows)] if self.kept is None else self.kept
        if max(map(len, self.kept), default=0) > self.limit + self.slack:
            self.trim()
        for row in self.kept:
            row.extend(range(self.seen, self.seen + new))
        self.seen += new
        if new > 1:
            self.trim()

    def trim(self):
        self.kept = [row if len(row) <= self.limit else row[:1] + row[1 - self.limit :] for row in self.kept]

    def take(self, rows):
        self.kept = [list(self.kept[row]) for row in rows]


STEPS = st.tuples(
    st.sampled_from(["update", "update", "single", "single", "reorder", "select", "repeat", "fork", "swap", "reset"]),
    st.integers(1, 9),
    st.integers(0, 10**6),
)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(st.lists(STEPS, min_size=1, max_size=14), st.integers(4, 9), st.integers(0, 3))
def test_against_a_plain_layer(steps, limit, slack):
    pools = PagePools(PAGE)
    layer = make_layer(pools=pools, max_tokens=limit, slack_tokens=slack)
    pairs = [(layer, PlainLayer(limit, slack))]
    for action, size, seed in steps:
        random = torch.Generator().manual_seed(seed)
        layer, plain = pairs[-1]
        rows = 2 if plain.kept is None else len(plain.kept)
        chosen = torch.randint(rows, (rows if action == "reorder" else size % 3 + 1,), generator=random)
        if action in ("update", "single"):
            new = 1 if action == "single" else size
            start = layer.get_seq_length()
            layer.notes.length = start + new
            layer.make_room()
            keys = torch.arange(start, start + new).float()[None, None, :, None].expand(rows, HEADS, new, DIM)
            layer.update(keys, -keys, dense=bool(seed % 2))
            layer.commit()
            plain.extend(rows, new)
        elif plain.kept is None:
            continue
        elif action in ("reorder", "select"):
            (layer.reorder_cache if action == "reorder" else layer.batch_select_indices)(chosen)
            plain.take(chosen.tolist())
        elif action == "repeat" and rows < 5:
            layer.batch_repeat_interleave(2)
            plain.take([row for row in range(rows) for _ in range(2)])
        elif action == "fork":
            pairs.append((copy.deepcopy(layer), copy.deepcopy(plain)))
        elif action == "swap":
            pairs.insert(0, pairs.pop())
        elif action == "reset":
            layer.reset()
            plain.seen, plain.kept = 0, None
        for layer, plain in pairs:
            assert layer.get_seq_length() == plain.seen
            if plain.kept is not None:
                held = layer.kept_positions.expand(-1, HEADS, -1)
                assert held.tolist() == [[row] * HEADS for row in plain.kept]
                assert layer.dense()[0][..., 0].long().tolist() == held.tolist()
    for layer, _ in pairs:
        layer.reset()
    if pools.pools:
        (pool,) = pools.pools.values()
        assert pool.statistics().pages_held == 0, "a page is held that nobody reads"


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.sampled_from(sorted(POLICIES)), st.lists(st.integers(1, 9), min_size=1, max_size=10), st.integers(0, 10**6))
def test_every_policy_keeps_to_its_budget(policy, parts, seed):
    """Random padding, pictures and forwards: entries are what they say, equally many a head, never over the limit."""
    random = torch.Generator().manual_seed(seed)
    total = sum(parts)
    valid = torch.arange(total) >= torch.randint(0, parts[0], (3, 1), generator=random)
    runs = torch.randint(0, 3, (3, total), generator=random).cummax(1).values * (torch.arange(total) % 5 > 1)
    layer = make_layer(policy, visual_share=0.5, max_tokens=9, merge=False)
    start = 0
    for new in parts:
        layer.notes.describe(start + new, valid[:, : start + new], runs[:, : start + new])
        layer.make_room()
        queries = torch.randn(3, 2 * HEADS, new, DIM, generator=random)
        layer.update(*stamped(3, new, start), query_states=queries)
        start += new
        assert_holds_stamps(layer)
        held = layer.kept_positions
        real = (held >= 0) & valid[:, None].expand(-1, held.shape[1], -1).gather(2, held.clamp(min=0))
        # A picture that no text follows yet stays, and single tokens may exceed the limit by the slack and one more.
        assert int(real[:, 0].sum(-1).max()) <= 9 + 2 + 1
    assert layer.get_seq_length() == total


# --- Faults ---


class Filled:
    """A cache of three layers after a prompt of 12 tokens, with a way to go on."""

    def __init__(self, policy="snapkv", prompt=12, **options):
        config = make_pair("dense").ours.config
        self.cache = EvictingKVCache(config, policy, page_tokens=PAGE, **{**SMALL, "max_tokens": 9, **options})
        self.forward(prompt)

    def forward(self, new, rows=2, spoil=None):
        random = torch.Generator().manual_seed(self.cache.get_seq_length())
        self.cache.prepare_forward(rows, new)
        found = []
        for index in range(3):
            keys = torch.randn(rows, HEADS, new, DIM, generator=random)
            queries = torch.randn(rows, 2 * HEADS, new, DIM, generator=random)
            if spoil is not None and index == 1:
                keys = spoil(keys)
            found.append(self.cache.update(keys, -keys, index, query_states=queries))
        return found

    def content(self):
        return [(layer.get_seq_length(), layer.kept_positions, *layer.dense()) for layer in self.cache.layers]


def same_content(first, second):
    return all(
        one[0] == other[0] and all(torch.equal(x, y) for x, y in zip(one[1:], other[1:], strict=True))
        for one, other in zip(first, second, strict=True)
    )


def with_nan(keys):
    keys[1, 0, 0, 2] = torch.nan
    return keys


FAULTS = {
    "nan": (with_nan, ValueError, "the keys or queries of layer 1 hold NaN"),
    "dtype": (lambda keys: keys.bfloat16(), ValueError, "bfloat16"),
    "batch": (lambda keys: keys[:1], ValueError, "the cache holds 2 rows but the batch has 1"),
    "heads": (lambda keys: keys[:, :1], ValueError, "1 KV heads"),
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_fit_changes_nothing_in_any_layer(policy, fault):
    spoil, kind, message = FAULTS[fault]
    filled, expected = Filled(policy), Filled(policy)
    before = filled.content()
    with pytest.raises(kind, match=message) as error:
        filled.forward(7, spoil=spoil)
    one_line(error.value)
    assert same_content(filled.content(), before)
    for one, other in zip(filled.forward(7), expected.forward(7), strict=True):
        assert torch.equal(one[0], other[0])
    assert same_content(filled.content(), expected.content())


@pytest.mark.parametrize("policy", ["modality", "h2o", "streaming"])
def test_a_failed_allocation_anywhere_changes_nothing(monkeypatch, policy):
    """The n-th allocation fails, for every n in prompt, single tokens, evictions and a second prompt."""
    allocate, failures = MemoryPool.allocate, 0
    parts = [12, 1, 1, 1, 1, 5]
    expected = Filled(policy, prompt=parts[0])
    for new in parts[1:]:
        expected.forward(new)
    for failing in range(200):
        calls = []

        def scarce(pool, pages, calls=calls, failing=failing):
            calls.append(pages)
            if len(calls) - 1 == failing:
                raise MemoryError("injected")
            return allocate(pool, pages)

        filled = Filled.__new__(Filled)
        config = make_config()
        filled.cache = EvictingKVCache(config, policy, page_tokens=PAGE, **{**SMALL, "max_tokens": 9})
        monkeypatch.setattr(MemoryPool, "allocate", scarce)
        for new in parts:
            seen = filled.cache.get_seq_length()
            try:
                filled.forward(new)
            except MemoryError:
                failures += 1
                assert [layer.get_seq_length() for layer in filled.cache.layers] == [seen] * 3
                filled.forward(new)
        monkeypatch.setattr(MemoryPool, "allocate", allocate)
        assert same_content(filled.content(), expected.content())
        if len(calls) <= failing:
            break
    assert failures == 9  # in each layer the prompt, an eviction between single tokens, and the second prompt


def make_config():
    return make_pair("dense").ours.config


def test_a_pool_that_is_full_says_so_and_serves_again():
    pool = MemoryPool(HEADS, DIM, page_tokens=PAGE, max_pages=24)
    filled = Filled(pool=pool)
    with pytest.raises(MemoryError, match="the pool is full") as error:
        Filled(pool=pool)
    one_line(error.value)
    filled.cache.reset()
    assert pool.statistics().pages_held == 0
    filled.forward(12)


def test_missing_queries_are_asked_for():
    layer = make_layer("snapkv")
    with pytest.raises(ValueError, match="needs the queries of all 5 new tokens, got none") as error:
        layer.update(*stamped(1, 5))
    one_line(error.value)
    assert layer.get_seq_length() == 0 and not layer.is_initialized


def test_refusals_of_a_layer():
    layer = make_layer()
    extend(layer, 1, 9)
    layer.crop(0)
    for call, kind, message in (
        (lambda: layer.crop(-1), ValueError, "cannot go back to what it let go of"),
        (lambda: pickle.dumps(layer), TypeError, "EvictingLayer cannot be pickled"),
    ):
        with pytest.raises(kind, match=message) as error:
            call()
        one_line(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "modalities"}, "did you mean 'modality'"),
        ({"policy": 3}, "there are modality, streaming"),
        ({"budget": 5}, "EvictingKVCache has no setting 'budget'"),
        ({"store": "disk"}, "store must be one of paged, quantized"),
        ({"layer_shares": (0.5, 0.5)}, "layer_shares has 2 shares for 3 layers"),
    ],
)
def test_options_that_do_not_exist(options, message):
    with pytest.raises(ValueError, match=message) as error:
        EvictingKVCache(make_config(), **options)
    one_line(error.value)
