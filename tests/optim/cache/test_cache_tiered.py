"""The tiered cache alone: against a plain list, tiers by age and use, budgets, attention, faults, copies."""

import copy
import gc
import logging
import os
import pickle
import threading
import weakref

import pytest
import torch
from helpers import make_pair, one_line
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from qwen3_vl.optim.attention.attention_layout import AttentionLayout
from qwen3_vl.optim.cache import tier_segments
from qwen3_vl.optim.cache.cache_tiered import HierarchicalMemoryCompression, TieredKVCache
from qwen3_vl.optim.cache.tier_segments import HOT, INT4, INT8, SLOW
from qwen3_vl.optim.cache.tier_settings import Tiers, TierSettings
from qwen3_vl.optim.cache.tier_storage import FileStorage, HostStorage, TierFileError
from qwen3_vl.optim.cache.tiered_layer import TieredLayer


HEADS, DIM, SIZE = 2, 16, 4
EXACT = {"hot_tokens": 3 * SIZE, "int8_tokens": 0, "int4_tokens": 0, "segment_tokens": SIZE}
ALL_TIERS = {"hot_tokens": 96, "int8_tokens": 64, "int4_tokens": 32, "segment_tokens": 32}


def make_layer(layers=1, **options):
    return TieredLayer(Tiers(TierSettings(**{**EXACT, **options}), layers), 0)


def make_cache(**options):
    """Three layers."""
    return TieredKVCache(make_pair("dense").ours.config, **{**EXACT, **options})


def stamped(rows, new, start=0):
    """Keys that say where they belong: `t + row / 8 + head / 64`; values are their negatives."""
    tokens = torch.arange(start, start + new)[None, None, :, None]
    row, head = torch.arange(rows)[:, None, None, None], torch.arange(HEADS)[None, :, None, None]
    keys = (tokens + row / 8 + head / 64).expand(rows, HEADS, new, DIM)
    return keys, -keys


def random_states(rows, new, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(rows, HEADS, new, DIM, generator=generator).to(dtype) for _ in range(2))


def plain_attention(query, keys, values, layout, scaling):
    """By the definition, in float64; zeros where nothing is seen."""
    group = query.shape[1] // keys.shape[1]
    query, keys, values = query.double(), *(x.double().repeat_interleave(group, 1) for x in (keys, values))
    scores = query @ keys.mT * scaling
    if layout is not None:
        scores = scores.masked_fill(~layout.dense(query.shape[2], keys.shape[2]), float("-inf"))
    return (scores.softmax(-1).nan_to_num(0.0) @ values).transpose(1, 2)


def assert_holds(layer, keys, values):
    assert layer.get_seq_length() == keys.shape[2]
    assert layer.get_mask_sizes(3) == (keys.shape[2] + 3, 0)
    for expected, actual in zip((keys, values), layer.dense(), strict=True):
        assert torch.equal(actual, expected)


# --- Tiers ---


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("chunks", [[1] * 23, [4], [8, 1], [3, 1, 1], [2, 9, 5], [29, 3, 4, 1], [5, 40]], ids=str)
def test_tokens_come_back_from_where_they_were_put(rows, chunks):
    layer, seen = make_layer(), 0
    for new in chunks:
        keys, values = layer.update(*stamped(rows, new, seen))
        seen += new
        expected = stamped(rows, seen)
        assert torch.equal(keys, expected[0]) and torch.equal(values, expected[1])
        assert_holds(layer, *expected)
    full = seen // SIZE
    assert layer.segment_tiers == tuple(HOT if i in (0, full - 1) else SLOW for i in range(full))


def test_segments_go_down_by_age():
    layer = make_layer(**ALL_TIERS)
    keys, values = random_states(1, 6 * 32 + 3)
    layer.update(keys, values, dense=False)
    assert layer.segment_tiers == (HOT, SLOW, INT4, INT8, INT8, HOT)
    before = layer.dense()
    more = random_states(1, 32, seed=1)
    layer.update(*more, dense=False)
    # Segment 1 was in the file already; 2 follows it, 3 and 5 go down a tier.
    assert layer.segment_tiers == (HOT, SLOW, SLOW, INT4, INT8, INT8, HOT)
    after = layer.dense()
    for given_, first, second in zip((keys, values), before, after, strict=True):
        for full in (slice(0, 32), slice(5 * 32, 6 * 32 + 3)):
            assert torch.equal(first[:, :, full], given_[:, :, full])
        for bits, segment in ((4, 1), (4, 2), (8, 3), (8, 4)):
            part = slice(32 * segment, 32 * segment + 32)
            error = (first - given_)[:, :, part].abs().max().item()
            assert 0 < error < 6 / 2**bits, (bits, error)
        assert torch.equal(second[:, :, :96], first[:, :, :96]), "what has been packed for the file is read as before"
        assert torch.equal(second[:, :, -35:-32], given_[:, :, -3:])


def attend_to(layer, token, count):
    """Decoding queries that look at one token alone."""
    keys, _ = layer.dense()
    query = (30 * keys[:, :, token : token + 1]).repeat_interleave(2, 1)
    for _ in range(count):
        layer.attend(query, None, 1.0)


def test_segments_stay_and_come_back_by_use():
    layer, (keys, values) = make_layer(), random_states(2, 80)
    layer.update(keys[:, :, :24], values[:, :, :24], dense=False)
    assert layer.segment_tiers == (HOT, SLOW, SLOW, SLOW, SLOW, HOT)
    layer = make_layer(hot_tokens=4 * SIZE)
    layer.update(keys[:, :, :24], values[:, :, :24], dense=False)
    assert layer.segment_tiers == (HOT, SLOW, SLOW, SLOW, HOT, HOT)
    attend_to(layer, 2 * SIZE + 1, 40)
    for start in range(24, 64, 4):
        layer.update(*(x[:, :, start : start + 4] for x in (keys, values)), dense=False)
        attend_to(layer, 2 * SIZE + 1, 4)
        assert layer.segment_tiers[2] == HOT, "used, and still below"
        assert layer.segment_tiers.count(HOT) == 3
    attend_to(layer, 8 * SIZE, 400)
    layer.update(*(x[:, :, 64:68] for x in (keys, values)), dense=False)
    assert (layer.segment_tiers[2], layer.segment_tiers[8]) == (SLOW, HOT)
    assert_holds(layer, *(x[:, :, :68] for x in (keys, values)))


def test_unused_quantized_segments_make_place_for_used_ones():
    layer, (keys, values) = make_layer(**ALL_TIERS), random_states(1, 300)
    layer.update(keys[:, :, :192], values[:, :, :192], dense=False)
    assert layer.segment_tiers == (HOT, SLOW, INT4, INT8, INT8, HOT)
    attend_to(layer, 40, 100)
    layer.update(*(x[:, :, 192:224] for x in (keys, values)), dense=False)
    assert layer.segment_tiers == (HOT, INT4, SLOW, SLOW, INT8, INT8, HOT)


@pytest.mark.parametrize("exact", [True, False])
def test_a_budget_in_bytes_holds(exact):
    options = EXACT if exact else {"segment_tokens": 32, "int8_tokens": None, "int4_tokens": None}
    size = options["segment_tokens"]
    whole = 2 * 2 * HEADS * size * DIM * 4  # keys and values of two rows of a segment
    cache = make_cache(**{**options, "hot_tokens": None, "max_bytes": 3 * 5 * whole})
    keys, values = random_states(2, 40 * size)
    for start, new in ((0, 7 * size + 3), *((at, 1) for at in range(7 * size + 3, 9 * size)), (9 * size, 31 * size)):
        for index in range(3):
            cache.update(*(x[:, :, start : start + new] for x in (keys, values)), index, dense=False)
            cache.layers[index].attend(keys[:, :, :1].repeat(1, 2, 1, 1), None, 0.25)
        assert cache.held_bytes <= 3 * 5 * whole
    tiers = cache.layers[0].segment_tiers
    if exact:
        assert tiers.count(HOT) == 2 and cache.held_bytes > 3 * 1 * whole
        assert_holds(cache.layers[2], keys, values)
    else:
        assert min(tiers.count(tier) for tier in (HOT, INT8, INT4, SLOW)) > 0
    with pytest.raises(ValueError, match=r"max_bytes=\d+ does not hold the newest \d+ tokens of 8 rows") as error:
        cache.batch_repeat_interleave(4)
    one_line(error.value)
    assert cache.get_seq_length() == 40 * size
    cache.reset()
    with pytest.raises(ValueError, match="does not hold the newest"):
        cache.update(*stamped(6, 1), 0)
    assert cache.get_seq_length() == 0 and not cache.layers[0].is_initialized


def test_host_memory_is_the_slow_tier_of_an_accelerator(tmp_path):
    tiers = Tiers(TierSettings(**EXACT), 1)
    assert isinstance(tiers.storage_for(torch.device("meta")), HostStorage)
    assert isinstance(Tiers(TierSettings(**EXACT), 1).storage_for(torch.device("cpu")), FileStorage)
    named = Tiers(TierSettings(**EXACT, folder=str(tmp_path)), 1).storage_for(torch.device("meta"))
    assert named.folder == str(tmp_path)
    layer = TieredLayer(tiers, 0)
    layer.update(*stamped(2, 30), dense=False)
    assert layer.segment_tiers.count(SLOW) == 5
    assert layer.stored_bytes == 5 * 2 * 2 * HEADS * SIZE * DIM * 4
    assert_holds(layer, *stamped(2, 30))


# --- Against a plain model ---


class PlainLayer:
    """The same in a tensor a side, copied at every step."""

    def __init__(self):
        self.keys = self.values = None

    def update(self, keys, values):
        old = (keys[:, :, :0], values[:, :, :0]) if self.keys is None else (self.keys, self.values)
        self.keys, self.values = torch.cat((old[0], keys), 2), torch.cat((old[1], values), 2)

    def take(self, rows):
        self.keys, self.values = self.keys[rows], self.values[rows]

    def crop(self, count):
        keep = max(self.keys.shape[2] - count, 0)
        self.keys, self.values = (self.keys[:, :, :keep], self.values[:, :, :keep]) if keep else (None, None)


ACTIONS = ["update", "update", "update", "attend", "demote", "crop", "reorder", "select", "repeat", "fork", "swap"]
STEPS = st.tuples(st.sampled_from([*ACTIONS, "reset"]), st.integers(1, 13), st.integers(0, 10**6))


@settings(max_examples=120, deadline=None, derandomize=True)
@given(st.lists(STEPS, min_size=1, max_size=14), st.sampled_from([8, 12, 20]))
def test_against_a_plain_layer(steps, hot_tokens):
    """Random calls on a layer and on copies of it; `demote` is a chunk that pushes others down."""
    pairs = [(make_layer(hot_tokens=hot_tokens), PlainLayer())]
    storage = None
    for action, size, seed in steps:
        random = torch.Generator().manual_seed(seed)
        layer, plain = pairs[-1]
        rows = 2 if plain.keys is None else len(plain.keys)
        chosen = torch.randint(rows, (rows if action == "reorder" else size % 3 + 1,), generator=random)
        if action in ("update", "demote"):
            states = random_states(rows, size + (20 if action == "demote" else 0), seed)
            layer.update(*states, dense=False)
            plain.update(*states)
        elif plain.keys is None:
            continue
        elif action == "attend":
            query = torch.randn(rows, 2 * HEADS, 1, DIM, generator=random)
            expected = plain_attention(query, plain.keys, plain.values, None, 0.25)
            assert torch.allclose(layer.attend(query, None, 0.25).double(), expected, atol=1e-5)
        elif action == "crop":
            layer.crop(-size)
            plain.crop(size)
        elif action in ("reorder", "select"):
            (layer.reorder_cache if action == "reorder" else layer.batch_select_indices)(chosen)
            plain.take(chosen)
        elif action == "repeat" and rows < 5:
            layer.batch_repeat_interleave(2)
            plain.take(torch.arange(rows).repeat_interleave(2))
        elif action == "fork":
            pairs.append((copy.deepcopy(layer), copy.copy(plain)))
        elif action == "swap":
            pairs.insert(0, pairs.pop())
        elif action == "reset":
            layer.reset()
            plain.keys = None
        for layer, plain in pairs:
            storage = layer.tiers.storage or storage
            assert layer.segment_tiers.count(HOT) * SIZE <= hot_tokens - SIZE
            if plain.keys is None:
                assert layer.get_seq_length() == 0
            else:
                assert_holds(layer, plain.keys, plain.values)
    while pairs:
        pairs.pop()[0].reset()
    assert storage is None or not storage.is_open, "space is held that nobody reads"


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.sampled_from(ACTIONS[:8]), st.integers(1, 70), st.integers(0, 99)), max_size=10))
def test_quantized_tiers_against_a_plain_layer(steps):
    """Entries are near what they were, those that nothing moved the same, and none is missing."""
    layer, plain = make_layer(**ALL_TIERS), PlainLayer()
    layer.update(*random_states(2, 100), dense=False)
    plain.update(*random_states(2, 100))
    for action, size, seed in steps:
        rows = len(plain.keys)
        if action in ("update", "demote"):
            states = random_states(rows, size, seed)
            layer.update(*states, dense=False)
            plain.update(*states)
        elif action == "attend":
            attend_to(layer, seed % layer.get_seq_length(), 3)
        elif action == "crop":
            count = min(size, layer.get_seq_length() - 40)
            before = [x[:, :, : x.shape[2] - count] for x in layer.dense()]
            layer.crop(-count)
            plain.crop(count)
            assert all(torch.equal(a, b) for a, b in zip(layer.dense(), before, strict=True))
        elif action == "reorder":
            chosen = torch.randint(rows, (rows,), generator=torch.Generator().manual_seed(seed))
            layer.reorder_cache(chosen)
            plain.take(chosen)
        assert layer.get_seq_length() == plain.keys.shape[2]
        tiers = layer.segment_tiers
        assert tiers.count(HOT) <= 2 and tiers.count(INT8) <= 2 and tiers.count(INT4) <= 1
        for actual, expected in zip(layer.dense(), (plain.keys, plain.values), strict=True):
            assert (actual - expected).abs().max() < 0.35


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 9, 20, 32, 33, 35])
def test_crop_rolls_back_exactly(keep):
    layer = make_layer()
    layer.update(*stamped(2, 35))
    layer.crop(0)
    layer.crop(keep - 35)
    assert layer.get_seq_length() == keep
    if keep:
        assert_holds(layer, *stamped(2, keep))
    layer.update(*stamped(2, 9, keep))
    assert_holds(layer, *stamped(2, keep + 9))


def test_rows_that_are_gone_give_their_memory_back():
    layer = make_layer(hot_tokens=40)
    layer.update(*stamped(4, 32))
    whole = layer.held_bytes
    layer.batch_repeat_interleave(2)
    assert layer.held_bytes == whole, "repeated rows share their segments"
    layer.batch_select_indices(torch.tensor([False, False, True, True] + [False] * 4))
    assert layer.held_bytes == whole // 4
    keys, values = (x[[1, 1]] for x in stamped(4, 32))
    assert_holds(layer, keys, values)
    layer.batch_select_indices([-1])
    assert_holds(layer, keys[:1], values[:1])
    layer.batch_select_indices(torch.tensor([], dtype=torch.long))
    assert layer.dense()[0].shape == (0, HEADS, 32, DIM)


# --- Attention ---


@pytest.mark.parametrize("options", [EXACT, ALL_TIERS], ids=["exact", "all_tiers"])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize(("queries", "group"), [(1, 1), (1, 4), (7, 2), (50, 2)])
def test_attention_against_the_definition(options, padding, queries, group):
    layer, rows, seen = make_layer(**options), 3, 150
    layer.update(*random_states(rows, seen), dense=False)
    layer.update(*(new := random_states(rows, queries, seed=1)), dense=False)
    query = torch.randn(rows, group * HEADS, queries, DIM)
    valid = None
    if padding != "none":
        valid = torch.ones(rows, seen + queries, dtype=torch.bool)
        pad = slice(0, 45) if padding == "left" else slice(seen - 20, seen)
        valid[1, pad] = False
    layout = AttentionLayout(seen, valid)
    held = copy.deepcopy(layer).dense()
    keys, values = (torch.cat((old[:, :, :seen], own), 2) for old, own in zip(held, new, strict=True))
    expected = plain_attention(query, keys, values, layout, 0.25)
    actual = layer.attend(query, layout, 0.25)
    assert actual.shape == (rows, queries, group * HEADS, DIM)
    assert (actual.double() - expected).abs().max() < 1e-5


def test_attention_in_bfloat16_and_of_rows_that_see_nothing():
    layer, states = make_layer(), random_states(2, 60, dtype=torch.bfloat16)
    layer.update(*(x[:, :, :57] for x in states), dense=False)
    layer.update(*(x[:, :, 57:] for x in states), dense=False)
    query, valid = torch.randn(2, 4, 3, DIM).bfloat16(), torch.ones(2, 60, dtype=torch.bool)
    valid[1] = False
    layout = AttentionLayout(57, valid)
    actual = layer.attend(query, layout, 0.25)
    assert actual.dtype == torch.bfloat16 and not actual[1].any()
    assert (actual.double() - plain_attention(query, *states, layout, 0.25)).abs().max() < 0.02
    with pytest.raises(ValueError, match="packed rows have no history"):
        layer.attend(query, AttentionLayout(57, segments=torch.zeros(2, 60)), 0.25)


def test_a_long_chunk_sees_itself_in_full_precision():
    layer = make_layer(**ALL_TIERS)
    layer.update(*random_states(1, 40), dense=False)
    new = random_states(1, 200, seed=1)
    keys, values = layer.update(*new)
    assert torch.equal(keys[:, :, 40:], new[0]) and torch.equal(values[:, :, 40:], new[1])
    assert not torch.equal(layer.dense()[0][:, :, 40:], new[0])


@pytest.mark.parametrize("how", ["attend", "dense"])
def test_one_segment_is_unpacked_at_a_time(monkeypatch, how):
    alive, most, unpack = weakref.WeakSet(), [0], tier_segments.dequantize_keys

    def counted(records, form, dtype):
        keys = unpack(records, form, dtype)
        storage = keys.untyped_storage()
        alive.add(keys)
        most[0] = max(most[0], len([x for x in alive if x is not None]))
        assert storage.nbytes() == HEADS * 32 * DIM * 4
        return keys

    layer = make_layer(**{**ALL_TIERS, "int4_tokens": 0})
    layer.update(*random_states(1, 1000), dense=False)
    assert layer.segment_tiers.count(SLOW) > 20
    monkeypatch.setattr(tier_segments, "dequantize_keys", counted)
    if how == "attend":
        layer.attend(torch.randn(1, 4, 1, DIM), None, 0.25)
    else:
        layer.dense()
    assert most[0] == 1


def test_the_next_layer_is_read_ahead(monkeypatch):
    cache, order = make_cache(), []
    for index in range(3):
        cache.update(*stamped(1, 24), index)
    monkeypatch.setattr(FileStorage, "prefetch", lambda self, offset, size: order.append(("ahead", offset)))
    read = FileStorage.read
    monkeypatch.setattr(
        FileStorage, "read", lambda self, offset, *rest: order.append(("read", offset)) or read(self, offset, *rest)
    )
    places = [[s.payload.ticket._offset for s in layer.state.segments[1:-1]] for layer in cache.layers]
    for index, layer in enumerate(cache.layers):
        order.clear()
        layer.attend(torch.randn(1, 2, 1, DIM), None, 0.25)
        ahead = [("ahead", place) for place in places[(index + 1) % 3]]
        assert order == ahead + [("read", place) for place in places[index]]


# --- Faults ---


def content(cache):
    return [layer.dense() for layer in cache.layers if layer.get_seq_length()]


def same_content(first, second):
    return len(first) == len(second) and all(
        torch.equal(x, y) for a, b in zip(first, second, strict=True) for x, y in zip(a, b, strict=True)
    )


def conversation(cache, forward):
    """`forward(rows, tokens, start)` gives all layers their new tokens."""
    forward(2, 13, 0)
    cache.batch_repeat_interleave(2)
    forward(4, 3, 13)
    cache.reorder_cache(torch.tensor([1, 1, 0, 3]))
    for start in range(16, 26):
        forward(4, 1, start)
    cache.crop(-3)
    forward(4, 22, 23)


@pytest.mark.parametrize("budget", [False, True])
@pytest.mark.parametrize("fault", ["write", "read"])
def test_a_disk_error_anywhere_loses_nothing(monkeypatch, caplog, fault, budget):
    """The n-th write or read fails, for every n up to many; the same forward then succeeds."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    whole = 2 * 4 * HEADS * SIZE * DIM * 4
    options = {**EXACT, "max_bytes": 3 * 3 * whole} if budget else EXACT
    expected, failures, warnings, read = None, 0, 0, FileStorage.read
    for failing in [-1, *range(0, 40, 8), 10**6]:
        cache, calls = make_cache(**options), []
        caplog.clear()

        def scarce(original, calls=calls, failing=failing):
            def call(*args):
                calls.append(0)
                if len(calls) - 1 == failing:
                    raise OSError(28, "No space left on device") if fault == "write" else TierFileError("it is gone")
                return original(*args)

            return call

        def forward(rows, new, start, cache=cache):
            nonlocal failures
            for attempt in range(2):
                with monkeypatch.context() as undisturbed:
                    undisturbed.setattr(FileStorage, "read", read)
                    before = content(cache)
                try:
                    for index in range(3):
                        states = stamped(rows, new, start + 100 * index)
                        cache.update(*states, index, dense=False)
                        cache.layers[index].attend(states[0][:, :, -1:], None, 0.25)
                    return
                except OSError as error:
                    assert attempt == 0 and (fault == "read" or budget)
                    assert ("No space left" if fault == "write" else "it is gone") in one_line(error)
                    failures += 1
                    with monkeypatch.context() as undisturbed:
                        undisturbed.setattr(FileStorage, "read", read)
                        assert same_content(content(cache), before)
                    assert [layer.get_seq_length() for layer in cache.layers] == [start] * 3

        with monkeypatch.context() as patch:
            if fault == "write":
                patch.setattr(FileStorage, "_write", scarce(FileStorage._write))
            else:
                patch.setattr(FileStorage, "read", scarce(FileStorage.read))
            try:
                conversation(cache, forward)
            except TierFileError:  # a crop that reads; the cache is then as it was
                assert fault == "read" and len({layer.get_seq_length() for layer in cache.layers}) == 1
                continue
        warned = [record for record in caplog.records if "no entry is lost" in record.getMessage()]
        warnings += len(warned)
        assert len(warned) <= 1
        expected = expected or content(cache)
        assert same_content(content(cache), expected)
        if budget:
            assert cache.held_bytes <= options["max_bytes"]
    assert failures >= 4 if fault == "read" or budget else warnings >= 4


def test_a_disk_that_stays_full_costs_one_warning_and_no_entry(monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)

    def full(self, offset, parts):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(FileStorage, "_write", full)
    cache = make_cache()
    for start in range(0, 60, 5):
        for index in range(3):
            cache.update(*stamped(2, 5, start), index)
    assert cache.stored_bytes == 0 and all(tier == HOT for tier in cache.layers[0].segment_tiers)
    for layer in cache.layers:
        assert_holds(layer, *stamped(2, 60))
    (record,) = [x for x in caplog.records if "no entry is lost" in x.getMessage()]
    assert "No space left on device" in record.getMessage() and cache.tiers.storage.folder in record.getMessage()
    monkeypatch.undo()
    for index in range(3):
        cache.update(*stamped(2, 4, 60), index)
    assert cache.layers[0].segment_tiers.count(SLOW) == 14
    assert_holds(cache.layers[2], *stamped(2, 64))


def test_a_lost_segment_is_named_and_the_rest_is_kept():
    cache = make_cache()
    for index in range(3):
        cache.update(*stamped(1, 40), index)
    ticket = cache.layers[1].state.segments[5].payload.ticket
    os.ftruncate(cache.tiers.storage._file.fileno(), ticket._offset + 1)
    cache.update(*stamped(1, 1, 40), 0, dense=False)
    cache.layers[0].attend(torch.randn(1, 2, 1, DIM), None, 0.25)
    cache.update(*stamped(1, 1, 40), 1, dense=False)
    message = (
        r"segment 5 of layer 1 \(tokens 20 to 23\) is lost: .* was cut short.*crop the cache to at most 20 tokens"
    )
    with pytest.raises(TierFileError, match=message) as error:
        cache.layers[1].attend(torch.randn(1, 2, 1, DIM), None, 0.25)
    one_line(error.value)
    assert [layer.get_seq_length() for layer in cache.layers] == [40] * 3
    with pytest.raises(TierFileError, match="segment 5 of layer 1"):
        cache.to_dynamic()
    with pytest.raises(TierFileError, match="segment 5 of layer 1"):
        cache.update(*stamped(1, 1, 40), 0) and cache.update(*stamped(1, 1, 40), 1)
    assert [layer.get_seq_length() for layer in cache.layers] == [40] * 3
    cache.crop(-20)
    for start in range(20, 40, 10):
        for index in range(2):
            cache.update(*stamped(1, 10, start), index)
    for layer in cache.layers[:2]:
        assert_holds(layer, *stamped(1, 40))


def wrong_updates():
    keys, values = stamped(2, 1)
    return {
        "holds 2 rows of .* but 3 rows of": stamped(3, 1),
        "holds 2 rows of .* but 1 rows of": stamped(1, 1),
        "float32 on cpu but .* torch.bfloat16 on cpu came": (keys.bfloat16(),) * 2,
        "but 2 rows of 4 KV heads of 16": (keys.repeat(1, 2, 1, 1),) * 2,
        "but 2 rows of 2 KV heads of 8": (keys[..., :8],) * 2,
        "in torch.float32 on meta came": (keys.to("meta"),) * 2,
        "in torch.float32 and .* in torch.float64": (keys, values.double()),
        r"got \(2, 2, 1, 16\) .* and \(2, 2, 1, 2\)": (keys, values[..., :2]),
        r"got \(2, 1, 16\)": (keys[0], values[0]),
    }


@pytest.mark.parametrize("message", wrong_updates())
def test_updates_that_do_not_fit(message):
    cache = make_cache()
    for index in range(3):
        cache.update(*stamped(2, 18), index)
    with pytest.raises(ValueError, match=message) as error:
        cache.update(*wrong_updates()[message], 0)
    one_line(error.value)
    for layer in cache.layers:
        assert_holds(layer, *stamped(2, 18))
        layer.update(*stamped(2, 7, 18))
        assert_holds(layer, *stamped(2, 25))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", [0, 1])
def test_entries_that_cannot_be_quantized(bad, where):
    """They are refused when their segment is full, while they can still be taken back in full precision."""
    cache, states = make_cache(**ALL_TIERS), random_states(2, 40)
    for index in range(3):
        cache.update(*(x[:, :, :20] for x in states), index, dense=False)
    for index in range(3):
        broken = [x[:, :, 20:25].clone() for x in states]
        broken[where][1, 0, 3, 7] = bad if index == 1 else 0.0
        cache.update(*broken, index, dense=False)
    cache.update(*(x[:, :, 25:40] for x in states), 0, dense=False)
    with pytest.raises(ValueError, match=r"token 23 in layer 1 are NaN or infinite .* drop them with crop") as error:
        cache.update(*(x[:, :, 25:40] for x in states), 1, dense=False)
    one_line(error.value)
    assert [layer.get_seq_length() for layer in cache.layers] == [25] * 3
    cache.crop(-5)
    for index in range(3):
        cache.update(*(x[:, :, 20:40] for x in states), index, dense=False)
        assert_holds(cache.layers[index], *states)


def test_an_exact_cache_holds_what_it_is_given():
    layer, (keys, values) = make_layer(), random_states(1, 40)
    keys[0, 0, 9, 1] = float("nan")
    layer.update(keys, values)
    layer.attend(torch.randn(1, 2, 1, DIM), None, 0.25)
    layer.update(*random_states(1, 8, seed=1))
    actual = layer.dense()[0][:, :, :40]
    assert torch.equal(actual.isnan(), keys.isnan()) and torch.equal(actual.nan_to_num(), keys.nan_to_num())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hot_tokens": 0}, "hot_tokens must be a whole number of at least 512 with segments of 256 tokens, got 0"),
        ({"hot_tokens": 300}, "hot_tokens must be .* at least 512"),
        ({"int8_tokens": -1}, "int8_tokens must be 0 or a whole number of at least 256"),
        ({"int4_tokens": 7.5}, "int4_tokens must be"),
        ({"int4_tokens": False}, "int4_tokens must be"),
        ({"max_bytes": 0}, "max_bytes must be a whole number of at least 1, got 0"),
        ({"segment_tokens": 0}, "segment_tokens must be"),
        ({"segment_tokens": 48}, "segment_tokens must be a multiple of 32 to be quantized, got 48"),
        ({"folder": "/no/such/folder"}, "no tier file can be made in /no/such/folder"),
        ({"page_tokens": 16}, "has no setting 'page_tokens'"),
    ],
)
def test_settings_that_cannot_be(options, message):
    config = make_pair("dense").ours.config
    makers = [lambda: TieredKVCache(config, **options)]
    if "folder" not in options:  # which may be another machine's when a profile is read
        makers.append(lambda: HierarchicalMemoryCompression(**options))
    for make in makers:
        with pytest.raises(ValueError, match=message) as error:
            make()
        one_line(error.value)


def test_other_mistakes():
    layer = make_layer()
    for read in (layer.dense, lambda: layer.attend(torch.randn(1, 2, 1, DIM), None, 1.0)):
        with pytest.raises(ValueError, match="holds no tokens yet"):
            read()
    layer.reset()
    layer.crop(-2)
    layer.reorder_cache(torch.tensor([0]))
    layer.batch_repeat_interleave(2)
    layer.update(*stamped(2, 6))
    with pytest.raises(ValueError, match="negative count of tokens to drop, got 3"):
        layer.crop(3)
    for rows in ([0, 2], [-3], [[0]], [0.5], [True, False, True]):
        with pytest.raises(IndexError, match="the cache has 2 rows, got indices"):
            layer.batch_select_indices(torch.tensor(rows))
    assert_holds(layer, *stamped(2, 6))
    with pytest.raises(ValueError, match="head_dim must be a multiple of 16 to be packed, got 6"):
        make_layer(**ALL_TIERS).update(*(x[..., :6] for x in stamped(1, 3)))
    make_layer().update(*(x[..., :6] for x in stamped(1, 30)))


# --- Life and copies ---


def test_files_are_gone_afterwards(tmp_path):
    made = []
    for end in ("reset", "delete", "copy"):
        cache = make_cache(folder=str(tmp_path))
        for index in range(3):
            cache.update(*stamped(2, 40), index)
        made.append(cache.stored_bytes)
        storage = cache.tiers.storage
        assert storage.is_open and storage.stored_bytes == cache.stored_bytes > 0
        copied = copy.deepcopy(cache)
        cache.reset()
        assert storage.is_open and cache.stored_bytes == 0
        assert_holds(copied.layers[1], *stamped(2, 40))
        if end == "reset":
            copied.reset()
            assert not storage.is_open
        del copied, cache
        gc.collect()
        storage.collect()
        assert not storage.is_open and os.listdir(tmp_path) == []
        del storage
    assert len(set(made)) == 1


def test_a_copy_shares_segments_and_goes_its_own_way():
    cache = make_cache()
    for index in range(3):
        cache.update(*stamped(2, 30), index)
    copied = copy.deepcopy(cache)
    assert copied.tiers is not cache.tiers and copied.tiers.storage is cache.tiers.storage
    assert copied.layers[0].tiers is copied.layers[2].tiers is copied.tiers
    assert cache.tiers.storage.stored_bytes == cache.stored_bytes == copied.stored_bytes
    for index in range(3):
        copied.update(*stamped(2, 13, 30), index)
        cache.update(*stamped(2, 2, 100), index)
    cache.crop(-1)
    assert_holds(copied.layers[1], *stamped(2, 43))
    expected = [torch.cat((a, b), 2) for a, b in zip(stamped(2, 30), stamped(2, 1, 100), strict=True)]
    assert_holds(cache.layers[1], *expected)


def test_threads_with_copies_of_one_cache():
    cache = make_cache()
    for index in range(3):
        cache.update(*stamped(1, 30), index)
    wrong = []

    def work(copied, seed):
        try:
            for start in range(30, 70, 5):
                for index in range(3):
                    copied.update(*stamped(1, 5, start + seed), index, dense=False)
                    copied.layers[index].attend(torch.randn(1, 2, 1, DIM), None, 0.25)
            parts = [stamped(1, 30), *(stamped(1, 5, start + seed) for start in range(30, 70, 5))]
            for layer in copied.layers:
                for side, actual in enumerate(layer.dense()):
                    assert torch.equal(actual, torch.cat([part[side] for part in parts], 2))
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(copy.deepcopy(cache), 1000 * i)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert_holds(cache.layers[0], *stamped(1, 30))


def test_conversion_both_ways():
    dynamic, config = DynamicCache(), make_pair("dense").ours.config
    for index in (0, 2):  # an empty layer between
        dynamic.update(*random_states(2, 37, seed=index), index)
    tiered = TieredKVCache.from_dynamic(dynamic, config, **EXACT)
    assert [layer.get_seq_length() for layer in tiered.layers] == [37, 0, 37]
    back = tiered.to_dynamic()
    tiered.update(*random_states(2, 1), 0)
    assert type(back) is DynamicCache and not back.layers[1].is_initialized and not hasattr(back, "tiers")
    for index in (0, 2):
        for name in ("keys", "values"):
            assert torch.equal(getattr(back.layers[index], name), getattr(dynamic.layers[index], name))


def test_what_layer_and_cache_say_of_themselves():
    (cache := make_cache()).update(*stamped(1, 2), 0)
    for one in (cache, cache.layers[0]):
        assert (one.is_croppable, one.is_compileable, one.get_max_length()) == (True, False, -1)
    with pytest.raises(TypeError, match="cannot be pickled, since a part of it may lie in a file") as error:
        pickle.dumps(cache)
    assert "to_dynamic" in one_line(error.value)


def test_prefill_in_inference_mode_and_steps_outside():
    layer = make_layer()
    with torch.inference_mode():
        layer.update(*stamped(1, 30))
        layer.attend(torch.randn(1, 2, 1, DIM), None, 0.25)
    layer.update(*stamped(1, 1, 30))
    keys, values = stamped(1, 14, 31)
    layer.update(keys.requires_grad_(), values, dense=False)
    layer.attend(torch.randn(1, 2, 1, DIM), None, 0.25)
    assert_holds(layer, *stamped(1, 45))


def test_gradients_never_silently_stop():
    layer = make_layer()
    keys, values = (x.clone().requires_grad_() for x in stamped(1, 6))
    seen = layer.update(keys, values)
    (seen[0].sum() + 2 * seen[1].sum()).backward()
    assert bool((keys.grad == 1).all()) and bool((values.grad == 2).all())
    for states in layer.update(*(x.clone().requires_grad_() for x in stamped(1, 1, 6))):
        with pytest.raises(RuntimeError, match="keeps no gradients of the history"):
            states.sum().backward()
