"""The cache whose layers share: content against a plain model of it, refusals, bytes, faults, copies."""

import copy
import gc
import pickle

import pytest
import torch
from helpers import assert_close, max_difference, one_line, tiny_config_dict
from hypothesis import given, settings
from hypothesis import strategies as st
from sharing_reference import slow_pair
from transformers import DynamicCache

from qwen3_vl import CrossLayerKVCache, Qwen3VLConfig
from qwen3_vl.optim.attention.attention_layout import AttentionLayout
from qwen3_vl.optim.cache import cache_cross_layer
from qwen3_vl.optim.cache.cache_paged import PagedKVCache
from qwen3_vl.optim.cache.kv_quantization import ROLLBACK_TOKENS
from qwen3_vl.optim.cache.memory_pool import MemoryPool, PagePools
from qwen3_vl.optim.registry_optim import techniques_of


HEADS, DIM, PAGE, RESIDUAL, LAYERS = 2, 8, 4, 3, 4
PAIR = (1, 2)
SMALL = {"start_layer": 1, "page_tokens": PAGE, "residual_tokens": RESIDUAL, "min_similarity": 0.0}


def config_of(layers=LAYERS):
    return Qwen3VLConfig(**tiny_config_dict(text={"num_hidden_layers": layers}))


CONFIG = config_of()


def make_cache(**options):
    return CrossLayerKVCache(options.pop("config", CONFIG), **{**SMALL, **options})


def states_of(rows, new, seed=0, noise=0.4, layers=LAYERS, dim=DIM, dtype=torch.float32):
    """Keys and values of all layers, (rows, HEADS, new, dim): those of a pair alike up to `noise`."""
    generator = torch.Generator().manual_seed(seed)

    def draw():
        return torch.randn(rows, HEADS, new, dim, generator=generator)

    made = []
    for layer in range(layers):
        keys, values = draw(), draw()
        if layer == PAIR[1]:
            keys, values = (1.5 * below + noise * own for below, own in zip(made[-1], (keys, values), strict=True))
        made.append((keys, values))
    return [tuple(x.to(dtype) for x in states) for states in made]


def give(cache, states):
    for layer, (keys, values) in enumerate(states):
        cache.update(keys, values, layer, dense=False)


def filled(tokens=100, rows=2, **options):
    cache = make_cache(**options)
    give(cache, states_of(rows, tokens))
    return cache


def pages_held(cache):
    return [pool.statistics().pages_held for pool in cache.pools.pools.values()]


class PlainCache:
    """The same in plain tensors, merged page by page from the definition."""

    def __init__(self, kept=1):
        self.layers, self.pages, self.kept = None, 0, kept

    @property
    def length(self):
        return 0 if self.layers is None else self.layers[0][0].shape[2]

    def update(self, states):
        if self.layers is None:
            self.layers, self.pages = [tuple(x.clone() for x in layer) for layer in states], 0
            self.merge(self.length - RESIDUAL - ROLLBACK_TOKENS)
            return
        self.merge(self.length - RESIDUAL)
        both = [zip(old, new, strict=True) for old, new in zip(self.layers, states, strict=True)]
        self.layers = [tuple(torch.cat(sides, 2) for sides in layer) for layer in both]

    def merge(self, settled):
        while (self.pages + 1) * PAGE <= settled:
            span = slice(self.pages * PAGE, (self.pages + 1) * PAGE)
            for lower, upper in zip(self.layers[PAIR[0]], self.layers[PAIR[1]], strict=True):
                for row in range(len(lower)):
                    for head in range(HEADS):
                        read = slow_pair(lower[row, head, span], upper[row, head, span], self.kept, 0.5)
                        lower[row, head, span], upper[row, head, span] = (x.float() for x in read)
            self.pages += 1

    def take(self, rows):
        self.layers = [tuple(x[rows] for x in layer) for layer in self.layers]

    def crop(self, count):
        keep = max(self.length - count, 0)
        self.layers = [tuple(x[:, :, :keep].clone() for x in layer) for layer in self.layers] if keep else None
        self.pages = min(self.pages, keep // PAGE)


def assert_holds(cache, plain):
    assert cache.get_seq_length() == plain.length
    for layer, expected in zip(cache.layers, plain.layers or [], strict=False):
        assert layer.get_seq_length() == plain.length and layer.get_mask_sizes(2) == (plain.length + 2, 0)
        for ours, theirs in zip(layer.dense(), expected, strict=True):
            assert_close(ours, theirs, 2e-4)
    if plain.length:
        assert -(-cache.layers[PAIR[1]].shared_tokens // PAGE) * PAGE in (
            plain.pages * PAGE,
            plain.pages * PAGE + PAGE,
        )


# --- Content ---


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("chunks", [[90], [5] + [1] * 20, [70, 1, 30, 1, 1, 17], [3, 3, 80, 2]], ids=str)
def test_content_follows_the_definition(rows, chunks):
    cache, plain = make_cache(), PlainCache()
    for step, new in enumerate(chunks):
        states = states_of(rows, new, seed=step)
        give(cache, states)
        plain.update(states)
        assert_holds(cache, plain)
    assert cache.layers[PAIR[1]].shared_tokens == plain.pages * PAGE > 0


def test_the_first_prefill_gives_back_what_came():
    cache, states = make_cache(), states_of(2, 100)
    for layer, (keys, values) in enumerate(states):
        returned = cache.update(keys, values, layer)
        assert returned[0] is keys and returned[1] is values
    assert cache.layers[2].shared_tokens == 32  # 100 less the newest 3 and 64 that may be taken back, in whole pages
    assert max_difference(cache.layers[2].dense()[0], states[2][0]) > 0.05
    assert max_difference(cache.layers[1].dense()[0], states[1][0]) > 0.05
    assert torch.equal(cache.layers[3].dense()[0], states[3][0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_layers_lose_nothing(dtype):
    cache, step = make_cache(min_similarity=0.99, retained_share=0.0), torch.finfo(dtype).eps
    states = states_of(2, 120, dtype=dtype)
    states[2] = tuple(2 * x for x in states[1])
    give(cache, states)
    for layer, expected in zip(cache.layers, states, strict=True):
        for ours, theirs in zip(layer.dense(), expected, strict=True):
            assert ours.dtype == dtype
            assert bool(((ours - theirs).abs() <= 2 * step * theirs.abs() + step).all())
    assert cache.similarity[PAIR].keys > 0.999 and cache.similarity[PAIR].shared


@pytest.mark.parametrize("case", ["decode", "chunk", "padded", "whole", "refused_later"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_reads_what_dense_restores(case, dtype):
    """Piece by piece, with pieces smaller than the history."""
    queries = {"decode": 1, "padded": 2}.get(case, 37)
    cache, states = make_cache(config=config_of()), states_of(2, 700, dim=16, dtype=dtype)
    give(cache, states)
    upper = cache.layers[2]
    if case == "refused_later":
        upper.refused = True
    give(cache, states_of(2, queries, seed=1, dim=16, dtype=dtype))
    assert upper.shared_tokens in (632, 696) and not hasattr(upper.reader, "page_view")
    length = 700 + queries
    layout = None if case == "whole" else AttentionLayout(700)
    if case == "padded":
        layout = AttentionLayout(700, torch.arange(length)[None] >= torch.tensor([[5], [650]]))
    query = torch.randn(2, 2 * HEADS, queries, 16).to(dtype)
    keys, values = (x.double().repeat_interleave(2, 1) for x in upper.reader.dense())
    scores = query.double() @ keys.mT * 0.3
    if layout is not None:
        scores = scores.masked_fill(~layout.dense(queries, length), float("-inf"))
    expected = (scores.softmax(-1) @ values).transpose(1, 2)
    output = upper.reader.attend(query, layout, 0.3)
    assert output.dtype == dtype and upper.reader.get_seq_length() == length
    assert_close(output.double(), expected, 2e-5 if dtype == torch.float32 else 2.5e-2)


def distinct(tables):
    return len({page for table in tables for page in table.ravel().tolist()})


STEPS = st.tuples(
    st.sampled_from(["update", "update", "update", "crop", "reorder", "select", "repeat", "fork", "swap", "reset"]),
    st.integers(1, 9),
    st.integers(0, 10**6),
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 80), st.lists(STEPS, min_size=1, max_size=10))
def test_against_a_plain_cache(start, steps):
    """Random calls on a cache and on copies of it; pages and records are held by nobody else."""
    pools = PagePools(PAGE)
    pairs = [(make_cache(pool=pools), PlainCache())]
    for action, size, seed in [("update", start, 0), *steps]:
        random = torch.Generator().manual_seed(seed)
        cache, plain = pairs[-1]
        rows = len(plain.layers[0][0]) if plain.length else 2
        chosen = torch.randint(rows, (rows if action == "reorder" else size % 3 + 1,), generator=random)
        if action == "update":
            states = states_of(rows, size, seed)
            give(cache, states)
            plain.update(states)
        elif not plain.length:
            continue
        elif action == "crop":
            cache.crop(-size)
            plain.crop(size)
        elif action in ("reorder", "select"):
            (cache.reorder_cache if action == "reorder" else cache.batch_select_indices)(chosen)
            plain.take(chosen)
        elif action == "repeat" and rows < 4:
            cache.batch_repeat_interleave(2)
            plain.take(torch.arange(rows).repeat_interleave(2))
        elif action == "fork":
            pairs.append((copy.deepcopy(cache), copy.deepcopy(plain)))
        elif action == "swap":
            pairs.insert(0, pairs.pop())
        elif action == "reset":
            cache.reset()
            plain.crop(plain.length)
        for pair in pairs:
            assert_holds(*pair)
        tables = [layer._table for cache, _ in pairs for layer in cache.layers]
        records = [cache.layers[2]._records for cache, _ in pairs]
        expected = distinct(tables), distinct([one.table for one in records if one is not None])
        assert pages_held(cache) == list(expected)[: len(pages_held(cache))]
    for cache, _ in pairs:
        cache.reset()
    assert not any(pages_held(cache))


# --- Bytes ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_held_bytes_are_what_is_allocated_and_fewer(dtype):
    config = Qwen3VLConfig(**tiny_config_dict(text={"num_hidden_layers": 2}))
    shared = CrossLayerKVCache(config, start_layer=0, min_similarity=0.0)
    paged = PagedKVCache(config)
    shape, states = (1, HEADS, 4096 + 192, 64), []
    for _ in range(2):
        states.append(tuple(torch.randn(shape).to(dtype) for _ in range(2)))
    for cache in (shared, paged):
        for layer, (keys, values) in enumerate(states):
            cache.update(keys, values, layer, dense=False)
    assert shared.layers[1].shared_tokens == 4096
    held = sum(pool.statistics().bytes_held for pool in shared.pools.pools.values())
    whole = sum(pool.statistics().bytes_held for pool in paged.pools.pools.values())
    assert shared.held_bytes == held
    assert sum(layer.held_bytes for layer in paged.layers) == whole
    # Of 4 in 64 tokens both layers' are held, and a number of 4 bytes a token; 192 tokens are not merged.
    vector = 64 * dtype.itemsize
    merged = (1 + 4 / 64 + (4 + 4 * 4 / 64) / vector) / 2
    expected = (4096 * merged + 192) / (4096 + 192)
    assert held / whole == pytest.approx(expected, rel=0.02)
    assert held / whole < 0.62


def test_prefill_takes_less_memory_than_it_would_hold_unmerged():
    """A pair's pages are free again before the next pair's come."""
    layers, tokens = 10, 64 + RESIDUAL + 4096
    cache = make_cache(config=config_of(layers), start_layer=0, page_tokens=64)
    plain = PagedKVCache(config_of(layers))
    for layer in range(layers):
        keys, values = torch.randn(2, 1, HEADS, tokens, 64)
        for one in (cache, plain):
            one.update(keys, values, layer, dense=False)
    resident = [sum(p.statistics().bytes_resident for p in one.pools.pools.values()) for one in (cache, plain)]
    assert resident[0] < 0.72 * resident[1]


def test_rows_share_what_they_have_in_common():
    cache = filled(rows=1)
    before = cache.held_bytes
    cache.batch_repeat_interleave(3)
    assert cache.held_bytes == before
    give(cache, states_of(3, 1, seed=5))  # more of the prompt is merged, once for all rows
    assert cache.layers[2].shared_tokens == 96
    assert cache.held_bytes < before + 3 * LAYERS * 2 * 66 * HEADS * DIM * 4


def test_a_copy_keeps_what_it_has_while_the_other_merges():
    cache = make_cache()
    states = states_of(2, 40)
    give(cache, states)
    copied = copy.deepcopy(cache)
    give(cache, states_of(2, 1, seed=1))
    assert (cache.layers[2].shared_tokens, copied.layers[2].shared_tokens) == (36, 0)
    for layer, expected in zip(copied.layers, states, strict=True):
        assert torch.equal(layer.dense()[0], expected[0]) and torch.equal(layer.dense()[1], expected[1])
    give(copied, states_of(2, 1, seed=1))
    for one, other in zip(copied.layers, cache.layers, strict=True):
        assert torch.equal(one.dense()[0], other.dense()[0])
    assert copied.similarity == cache.similarity
    pools = list(cache.pools.pools.values())
    del cache, copied, layer, one, other  # all that holds a layer
    gc.collect()
    assert [pool.statistics().pages_held for pool in pools] == [0, 0]


# --- Similarity ---


def test_similarity_is_what_was_measured():
    cache = filled(tokens=100, rows=2, min_similarity=0.6)
    span = slice(0, 32)
    expected = []
    for lower, upper in zip(*(states_of(2, 100)[layer] for layer in PAIR), strict=True):
        cosine = torch.nn.functional.cosine_similarity(lower[:, :, span].double(), upper[:, :, span].double(), dim=-1)
        expected.append((1 - cosine.acos() / torch.pi).mean().item())
    found = cache.similarity
    assert list(found) == [PAIR]
    assert (found[PAIR].keys, found[PAIR].values) == pytest.approx(expected, abs=1e-5)
    assert (found[PAIR].tokens, found[PAIR].shared) == (64, True)
    cache.reset()
    assert cache.similarity == {}


@pytest.fixture
def warnings(monkeypatch):
    seen = []
    monkeypatch.setattr(cache_cross_layer.logger, "warning_once", seen.append)
    return seen


def test_a_pair_that_is_not_alike_is_refused_and_stays_exact(warnings):
    config = config_of(6)
    cache, dynamic = make_cache(config=config, start_layer=2, min_similarity=0.7), DynamicCache()
    for new in (100, 1, 1, 30, 1):
        for layer in range(6):
            keys, values = torch.randn(2, 2, HEADS, new, DIM)
            cache.update(keys, values, layer, dense=False)
            dynamic.update(keys, values, layer)
    (message,) = warnings
    assert "layers 2 and 3 do not share keys and values: their similarity is 0.5" in one_line(message)
    assert {pair: found.shared for pair, found in cache.similarity.items()} == {(2, 3): False, (4, 5): False}
    for found in cache.similarity.values():
        assert found.keys == pytest.approx(0.5, abs=0.02) and found.values == pytest.approx(0.5, abs=0.02)
        assert found.tokens == 64  # not measured again
    for ours, theirs in zip(cache.layers, dynamic.layers, strict=True):
        assert hasattr(ours.reader, "page_view")
        assert torch.equal(ours.dense()[0], theirs.keys) and torch.equal(ours.dense()[1], theirs.values)


@pytest.mark.parametrize("unlike", ["keys", "values"])
def test_keys_and_values_count_apart(warnings, unlike):
    cache, states = make_cache(min_similarity=0.7), states_of(2, 100, noise=0.1)
    keys, values = states[2]
    states[2] = (torch.randn_like(keys), values) if unlike == "keys" else (keys, torch.randn_like(values))
    give(cache, states)
    assert not cache.similarity[PAIR].shared and len(warnings) == 1
    assert cache.layers[2].shared_tokens == 0


def test_a_pair_that_grows_unlike_stops_sharing(warnings):
    cache, plain = make_cache(min_similarity=0.7), PlainCache()
    for step in range(12):
        states = states_of(1, 12, seed=step, noise=0.1 if step < 3 else 50.0)
        give(cache, states)
        if cache.layers[2].refused:
            plain.merge = lambda settled: None
        plain.update(states)
        assert_holds(cache, plain)
    assert 24 <= cache.layers[2].shared_tokens < 120 and len(warnings) == 1
    assert "is asked for" in warnings[0]


def test_layers_of_different_shape_do_not_share(warnings):
    cache = make_cache()
    for new in (100, 1):
        for layer in range(LAYERS):
            keys = torch.randn(1, HEADS if layer != 2 else 1, new, DIM)
            cache.update(keys, keys, layer, dense=False)
    assert cache.similarity == {} and cache.layers[2].shared_tokens == 0
    assert warnings == ["layers 1 and 2 do not share keys and values, since they differ in shape, dtype or device."]


# --- Taking back ---


@pytest.mark.parametrize("count", [1, 5, 64])
def test_taking_back_leaves_no_trace(count):
    """Of the first forward up to 64 tokens, of later ones all."""
    caches = make_cache(), make_cache()
    base, extra = states_of(2, 90), states_of(2, count, seed=1)
    both = [tuple(torch.cat(sides, 2) for sides in zip(*pair, strict=True)) for pair in zip(base, extra, strict=True)]
    give(caches[0], both)
    caches[0].crop(-count)
    give(caches[1], base)
    for round_ in range(3):
        more = states_of(2, 9, seed=7 + round_)
        give(caches[0], states_of(2, 20, seed=30 + round_))
        caches[0].crop(0)
        caches[0].crop(-20)
        for cache in caches:
            give(cache, more)
        for one, other in zip(*(cache.layers for cache in caches), strict=True):
            assert torch.equal(one.dense()[0], other.dense()[0]) and torch.equal(one.dense()[1], other.dense()[1])
    assert caches[0].layers[2].shared_tokens == caches[1].layers[2].shared_tokens > 90
    assert caches[0].is_croppable and not caches[0].is_compileable


@pytest.mark.parametrize("interrupted_after", range(LAYERS))
def test_an_interrupted_forward_is_taken_back(interrupted_after):
    """The model raised between two layers: those that were reached hold more than the others."""
    cache, plain = make_cache(), PlainCache()
    for seed in (0, 1):
        states = states_of(2, 41, seed)
        give(cache, states)
        plain.update(states)
    give(cache, states_of(2, 7, seed=2)[: interrupted_after + 1])
    cache.crop(-7)
    assert [layer.get_seq_length() for layer in cache.layers] == [82] * LAYERS
    states = states_of(2, 3, seed=3)
    give(cache, states)
    plain.update(states)
    assert_holds(cache, plain)


# --- Faults ---


def conversation(cache, forward):
    forward(90, 0)
    cache.batch_repeat_interleave(2)
    forward(1, 1)
    cache.reorder_cache(torch.tensor([1, 1, 0, 2]))
    forward(9, 2)
    cache.crop(-40)
    forward(50, 3)
    forward(1, 4)


@pytest.mark.parametrize("fault", ["allocate", "compare"])
def test_a_failure_anywhere_leaves_layers_alike_and_usable(monkeypatch, fault):
    """The n-th allocation or comparison fails, for every n; the same forward then succeeds."""
    from qwen3_vl.optim.cache import sharing_layer

    expected, failures = None, 0
    for failing in range(-1, 200):
        cache, calls = make_cache(), []

        def scarce(original, calls=calls, failing=failing):
            def call(*args, **options):
                calls.append(0)
                if len(calls) - 1 == failing:
                    raise MemoryError("injected")
                return original(*args, **options)

            return call

        def forward(new, seed, cache=cache):
            seen, rows = cache.get_seq_length(), 4 if seed else 2
            for attempt in range(2):
                try:
                    give(cache, states_of(rows, new, seed, noise=0.0))
                    return
                except MemoryError:
                    assert attempt == 0
                    assert [layer.get_seq_length() for layer in cache.layers] == [seen] * LAYERS
                    nonlocal failures
                    failures += 1

        with monkeypatch.context() as patch:
            if fault == "allocate":
                patch.setattr(MemoryPool, "allocate", scarce(MemoryPool.allocate))
            else:
                patch.setattr(sharing_layer, "compare", scarce(sharing_layer.compare))
            conversation(cache, forward)
        content = [layer.dense() for layer in cache.layers]
        expected = expected or content
        for ours, theirs in zip(content, expected, strict=True):
            assert_close(ours[0], theirs[0], 2e-5)
            assert_close(ours[1], theirs[1], 2e-5)
        assert cache.layers[2].shared_tokens > 90
        held = sum(pool.statistics().bytes_held for pool in cache.pools.pools.values())
        assert held == cache.held_bytes
        if failing >= len(calls):
            break
    assert failures == failing >= 8


def test_a_full_pool_names_itself_and_merging_needs_next_to_nothing():
    """Pages are written over, so merging makes room; only records are new."""
    page = 2 * (PAGE + 1) * HEADS * DIM * 4
    pools = PagePools(PAGE, max_bytes=page * (LAYERS * 25 + 2))
    cache, plain = make_cache(pool=pools), PlainCache()
    states = states_of(1, 100)
    give(cache, states)
    plain.update(states)
    with pytest.raises(MemoryError, match=r"the pool is full: .* were asked for") as error:
        give(cache, states_of(1, 400, seed=1))
    one_line(error.value)
    assert_holds(cache, plain)
    states = states_of(1, 4, seed=2)
    give(cache, states)
    plain.update(states)
    assert_holds(cache, plain)


@pytest.mark.parametrize("layer", PAIR)
def test_nan_is_refused_when_it_is_to_be_merged(layer):
    cache, states = make_cache(), states_of(2, 5)
    give(cache, states)
    bad = states_of(2, 12, seed=1)
    bad[layer][0][0, 1, 2, 3] = float("nan")
    give(cache, bad)
    before = [x.clone() for one in cache.layers for x in one.dense()]
    for _ in range(2):
        with pytest.raises(ValueError, match="keys with NaN or infinite entries cannot be shared") as error:
            give(cache, states_of(2, 1, seed=2))
        assert "crop() or reset()" in one_line(error.value)
        assert [one.get_seq_length() for one in cache.layers] == [17] * LAYERS
    for x, y in zip(before, (x for one in cache.layers for x in one.dense()), strict=True):
        assert torch.equal(x.nan_to_num(9.0), y.nan_to_num(9.0))
    cache.crop(-12)
    plain = PlainCache()
    plain.update(states)
    for seed in (3, 4):
        states = states_of(2, 11, seed)
        give(cache, states)
        plain.update(states)
    assert_holds(cache, plain)


def test_nan_in_the_first_prefill_leaves_an_empty_cache():
    cache, states = make_cache(), states_of(2, 100)
    states[2][1][1, 0, 0, 0] = float("inf")
    with pytest.raises(ValueError, match="values with NaN or infinite entries"):
        give(cache, states)
    assert [layer.get_seq_length() for layer in cache.layers] == [0] * LAYERS
    assert not any(pages_held(cache)) and cache.similarity == {}
    give(cache, states_of(3, 100))
    assert cache.layers[2].shared_tokens == 32


def wrong_updates():
    keys, values = states_of(2, 1)[0]
    return {
        "the cache holds 2 rows but the batch has 1": (keys[:1], values[:1]),
        "but the keys have 2 KV heads of 8 in torch.bfloat16": (keys.bfloat16(),) * 2,
        "in torch.float32 and .* in torch.float64": (keys, values.double()),
        "but the keys have 1 KV heads of 8": (keys[:, :1], values[:, :1]),
    }


@pytest.mark.parametrize("layer", PAIR)
@pytest.mark.parametrize("message", wrong_updates())
def test_updates_that_do_not_fit(message, layer):
    cache, plain = make_cache(), PlainCache()
    states = states_of(2, 90)
    give(cache, states)
    plain.update(states)
    give(cache, states_of(2, 1, seed=1)[:layer])
    with pytest.raises(ValueError, match=message) as error:
        cache.update(*wrong_updates()[message], layer)
    one_line(error.value)
    plain.merge(90 - RESIDUAL)
    assert_holds(cache, plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start_layer": 3}, "start_layer=3 leaves no two of the 4 layers to share; give 0 to 2"),
        ({"start_layer": -1}, "start_layer=-1 leaves no two"),
        ({"start_layer": 1.0}, "start_layer must be a layer's number or None for the middle, got 1.0"),
        ({"config": config_of(1), "start_layer": None}, "a model of 1 layers has no two that could share"),
        ({"retained_share": 0.7}, "retained_share=0.7 saves next to nothing"),
        ({"retained_share": -0.1}, "retained_share must be a number from 0 to 1, got -0.1"),
        ({"min_similarity": 1.5}, "min_similarity must be a number from 0 to 1, got 1.5"),
        ({"min_similarity": float("nan")}, "min_similarity must be a number from 0 to 1, got nan"),
        ({"interpolation": "half"}, "interpolation must be a number from 0 to 1, got 'half'"),
        ({"residual_tokens": 0}, "residual_tokens must be a whole number of at least 1, got 0"),
        ({"page_tokens": 0}, "page_tokens must be a whole number of at least 1, got 0"),
        ({"pool": MemoryPool(HEADS, DIM, max_pages=1)}, "pool must be PagePools, got MemoryPool"),
    ],
)
def test_settings_out_of_range(options, message):
    with pytest.raises(ValueError, match=message) as error:
        make_cache(**options)
    one_line(error.value)
    if not {"pool", "config"} & set(options) and "leaves no two" not in message:
        with pytest.raises(ValueError, match=message):
            techniques_of({"cross_layer_cache": options})


def test_other_mistakes():
    with pytest.raises(ValueError, match="cross_layer_cache has no setting 'layers'"):
        techniques_of({"cross_layer_cache": {"layers": 3}})
    cache = filled()
    upper = cache.layers[2]
    for read in (upper.page_view, upper.key_bounds, lambda: upper.page_scores(torch.randn(2, 4, 1, DIM))):
        with pytest.raises(ValueError, match=r"read it by dense\(\) or attend\(\)") as error:
            read()
        one_line(error.value)
    with pytest.raises(ValueError, match="negative count of tokens to drop, got 3"):
        cache.crop(3)
    with pytest.raises(IndexError, match="the cache has 2 rows, got indices"):
        cache.batch_select_indices(torch.tensor([2]))
    with pytest.raises(TypeError, match="cannot be pickled") as error:
        pickle.dumps(cache)
    one_line(error.value)


def test_default_pairs():
    assert CrossLayerKVCache(config_of(7)).pairs == ((3, 4), (5, 6))
    assert CrossLayerKVCache(config_of(8)).pairs == ((4, 5), (6, 7))
    assert CrossLayerKVCache(config_of(8), start_layer=1).pairs == ((1, 2), (3, 4), (5, 6))


# --- Conversion ---


def test_conversion_both_ways():
    dynamic, states = DynamicCache(), states_of(2, 120)
    for layer, (keys, values) in enumerate(states):
        dynamic.update(keys, values, layer)
    cache = CrossLayerKVCache.from_dynamic(dynamic, CONFIG, **SMALL)
    plain = PlainCache()
    plain.update(states)
    assert_holds(cache, plain)
    back = cache.to_dynamic()
    assert type(back) is DynamicCache and set(vars(back)) == set(vars(DynamicCache()))
    for layer, expected in zip(back.layers, plain.layers, strict=True):
        assert_close(layer.keys, expected[0], 1e-5)
    assert pickle.loads(pickle.dumps(back)).get_seq_length() == 120
