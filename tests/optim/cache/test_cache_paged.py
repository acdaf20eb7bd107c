"""The paged cache alone: content by position stamps and against a plain list, faults, copies, conversions."""

import copy
import gc
import threading

import pytest
import torch
from helpers import one_line
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_vl.optim.attention.page_scores import plain_page_scores
from qwen3_vl.optim.cache import memory_pool
from qwen3_vl.optim.cache.cache_paged import PagedKVCache, PagedLayer
from qwen3_vl.optim.cache.memory_pool import MemoryPool, PageBlock, PagePools


HEADS, DIM, PAGE = 2, 3, 4


def make_layer(**options):
    return PagedLayer(PagePools(PAGE, **options))


def stamped(rows, new, start=0):
    """Keys that say where they belong: `t + row / 8 + head / 64`; values are their negatives."""
    tokens = torch.arange(start, start + new)[None, None, :, None]
    row, head = torch.arange(rows)[:, None, None, None], torch.arange(HEADS)[None, :, None, None]
    keys = (tokens + row / 8 + head / 64).expand(rows, HEADS, new, DIM)
    return keys, -keys


def read_pages(view):
    """(B, heads, tokens, D) keys and values, token by token as `PageView` describes them."""
    rows = []
    for numbers in view.table.tolist():
        places = [divmod(token, view.page_tokens) for token in range(view.length)]
        rows.append([torch.stack([s[numbers[c], :, t] for c, t in places], 1) for s in (view.keys, view.values)])
    return tuple(torch.stack(states) for states in zip(*rows, strict=True))


def plain_bounds(keys):
    pages = keys.split(PAGE, dim=2)
    return torch.stack([x.amin(2) for x in pages], 2), torch.stack([x.amax(2) for x in pages], 2)


def assert_holds(layer, keys, values):
    """That every way to read `layer` gives `keys` and `values` (B, heads, tokens, D)."""
    assert layer.get_seq_length() == keys.shape[2]
    assert layer.get_mask_sizes(3) == (keys.shape[2] + 3, 0)
    assert layer.page_view().table.dtype == torch.int32 and layer.page_view().table.is_contiguous()
    for name, expected, actual in (
        ("dense", (keys, values), layer.dense()),
        ("pages", (keys, values), read_pages(layer.page_view())),
        ("bounds", plain_bounds(keys), layer.key_bounds()),
    ):
        for one, other in zip(expected, actual, strict=True):
            assert torch.equal(one, other), name
    query = torch.linspace(-1, 1, keys.shape[3]).to(keys.dtype).expand(len(keys), 2 * keys.shape[1], 1, -1)
    assert torch.allclose(layer.page_scores(query), plain_page_scores(query, *plain_bounds(keys)), atol=1e-5)


# --- One layer ---


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("chunks", [[1] * 9, [4], [8, 1], [3, 1, 1], [2, 9, 5], [13, 3, 4, 1]], ids=str)
def test_tokens_come_back_from_where_they_were_put(rows, chunks):
    layer, seen = make_layer(), 0
    for new in chunks:
        given = stamped(rows, new, seen)
        keys, values = layer.update(*given)
        seen += new
        expected = stamped(rows, seen)
        assert torch.equal(keys, expected[0]) and torch.equal(values, expected[1])
        assert_holds(layer, *expected)
    assert layer.pool.statistics().pages_held == rows * -(-seen // PAGE)


def test_new_tokens_are_handed_back_untouched():
    layer = make_layer()
    for start in (0, 5):
        keys, values = stamped(2, 5, start)
        assert layer.update(keys, values, dense=False)[0] is keys
        assert layer.update(keys[:, :, :0], values[:, :, :0], dense=False)[1].shape == (2, HEADS, 0, DIM)
    assert_holds(layer, *stamped(2, 10))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_any_strides_and_dtypes(dtype):
    """Models hand over (B, T, heads, D) seen as (B, heads, T, D)."""
    layer, keys = make_layer(), torch.randn(2, 9, HEADS, DIM).to(dtype).transpose(1, 2)
    layer.update(keys[:, :, :6], -keys[:, :, :6])
    layer.update(keys[:, :, 6:], -keys[:, :, 6:])
    assert layer.dense()[0].dtype == dtype
    assert_holds(layer, keys, -keys)


def test_a_step_takes_pages_only_at_a_boundary_and_moves_nothing(monkeypatch):
    layer, asked = make_layer(), []
    layer.update(*stamped(2, 5))
    allocate = layer.pool.allocate
    monkeypatch.setattr(layer.pool, "allocate", lambda pages: asked.append((layer._length, pages)) or allocate(pages))
    before, first = layer.pool.keys.data_ptr(), layer.page_view().table.clone()
    for start in range(5, 17):
        layer.update(*stamped(2, 1, start), dense=False)
    assert asked == [(8, 2), (12, 2), (16, 2)]
    assert layer.pool.keys.data_ptr() == before
    assert torch.equal(layer.page_view().table[:, :2], first)


@pytest.mark.parametrize("keep", range(12))
def test_crop_rolls_back_exactly(keep):
    layer = make_layer()
    layer.update(*stamped(2, 11))
    layer.crop(0)
    layer.crop(keep - 11)
    assert layer.get_seq_length() == keep
    assert layer.pools.pool_for(stamped(1, 1)[0]).statistics().pages_held == 2 * -(-keep // PAGE)
    if keep:
        assert_holds(layer, *(x[:, :, :keep] for x in stamped(2, 11)))
    layer.update(*stamped(2, 6, keep))
    assert_holds(layer, *stamped(2, keep + 6))


def test_crop_of_more_than_there_is_empties():
    layer = make_layer()
    layer.update(*stamped(2, 5))
    layer.crop(-9)
    assert layer.get_seq_length() == 0
    layer.update(*stamped(3, 2))
    assert_holds(layer, *stamped(3, 2))


def test_rows_share_pages_until_they_append():
    layer = PagedLayer(pool := MemoryPool(HEADS, DIM, page_tokens=PAGE, max_pages=6))
    layer.update(*stamped(1, 6))
    layer.batch_repeat_interleave(3)
    assert pool.statistics().pages_held == 2
    assert layer.page_view().table.unique().numel() == 2
    keys = stamped(1, 6)[0].expand(3, -1, -1, -1)
    new = torch.randn(3, HEADS, 1, DIM)
    layer.update(new, new, dense=False)
    # The shared first page, and three last ones: two copies and the page that was there.
    assert pool.statistics().pages_held == 4
    assert_holds(layer, torch.cat((keys, new), 2), torch.cat((-keys, new), 2))
    layer.reorder_cache(torch.tensor([2, 2, 0]))
    assert pool.statistics().pages_held == 3


def test_rows_by_flags_numbers_and_none_left():
    layer = make_layer()
    layer.update(*stamped(3, 5))
    keys = stamped(3, 5)[0]
    layer.batch_select_indices(torch.tensor([True, False, True]))
    assert_holds(layer, keys[[0, 2]], -keys[[0, 2]])
    layer.batch_select_indices([-1])
    assert_holds(layer, keys[[2]], -keys[[2]])
    layer.batch_select_indices(torch.tensor([], dtype=torch.long))
    assert layer.pool.statistics().pages_held == 0
    assert layer.update(*(x[:0] for x in stamped(1, 7, 5)))[0].shape == (0, HEADS, 12, DIM)


def test_an_empty_layer_takes_every_call():
    layer = make_layer()
    layer.reset()
    layer.crop(-2)
    layer.reorder_cache(torch.tensor([0]))
    layer.batch_select_indices([0])
    layer.batch_repeat_interleave(2)
    assert layer.get_seq_length() == 0
    layer.update(*stamped(2, 3))
    assert_holds(layer, *stamped(2, 3))


def test_reset_takes_another_batch_and_dtype():
    layer = make_layer()
    layer.update(*stamped(2, 9))
    pool = layer.pool
    layer.reset()
    assert pool.statistics().pages_held == 0 and not layer.is_initialized
    keys = stamped(3, 5)[0].double()
    layer.update(keys, keys)
    assert_holds(layer, keys, keys)


def test_what_layer_and_cache_say_of_themselves():
    (cache := PagedKVCache(max_tokens=9)).update(*stamped(1, 2), 0)
    for one in (cache, cache.layers[0]):
        assert (one.is_croppable, one.is_compileable, one.get_max_length()) == (True, False, 9)
    assert PagedLayer().get_max_length() == -1


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


STEPS = st.tuples(
    st.sampled_from(["update", "update", "update", "crop", "reorder", "select", "repeat", "fork", "swap", "reset"]),
    st.integers(1, 11),
    st.integers(0, 10**6),
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(STEPS, min_size=1, max_size=14), st.booleans())
def test_against_a_plain_layer(steps, lazy):
    """Random calls on a layer and on copies of it, in a pool that grows in place or by copying."""
    pools = PagePools(PAGE)
    with pytest.MonkeyPatch.context() as patch:
        if not lazy:
            patch.setattr(memory_pool, "map_memory", refuse_address_space)
        pool = pools.pool_for(torch.zeros(1, HEADS, 1, DIM))
    pairs = [(PagedLayer(pools), PlainLayer())]
    for action, size, seed in steps:
        random = torch.Generator().manual_seed(seed)
        layer, plain = pairs[-1]
        rows = 2 if plain.keys is None else len(plain.keys)
        chosen = torch.randint(rows, (rows if action == "reorder" else size % 3 + 1,), generator=random)
        if action == "update":
            keys = torch.randn(rows, HEADS, size, DIM, generator=random)
            layer.update(keys, -keys, dense=False)
            plain.update(keys, -keys)
        elif plain.keys is None:
            continue
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
        held = set()
        for layer, plain in pairs:
            if plain.keys is None:
                assert layer.get_seq_length() == 0
            else:
                assert_holds(layer, plain.keys, plain.values)
                held.update(layer.page_view().table.flatten().tolist())
        assert pool.statistics().pages_held == len(held), "a page is held that nobody reads"
    for layer, _ in pairs:
        layer.reset()
    assert pool.statistics().pages_held == 0


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.permutations(range(3)) | st.lists(st.integers(0, 2), min_size=3, max_size=3), max_size=20))
def test_beams_never_need_more_than_a_table_of_own_pages(orders):
    """Three rows of `n` pages fit into `3 n` pages at every step, copies of shared pages included."""
    pool = MemoryPool(HEADS, DIM, page_tokens=PAGE, max_pages=3 * -(-(3 + len(orders)) // PAGE))
    layer, plain = PagedLayer(pool), PlainLayer()
    for step, rows in enumerate([None, *orders]):
        new = torch.randn(3, HEADS, 1 if step else 3, DIM)
        if step:
            layer.reorder_cache(torch.tensor(rows))
            plain.take(rows)
        layer.update(new, -new, dense=False)
        plain.update(new, -new)
    assert_holds(layer, plain.keys, plain.values)


# --- Faults ---


def refuse_address_space(shape, dtype, huge=False):
    raise OSError("no address space")


def content(cache):
    return [layer.dense() for layer in cache.layers if layer.get_seq_length()]


def same_content(first, second):
    return all(torch.equal(x, y) for a, b in zip(first, second, strict=True) for x, y in zip(a, b, strict=True))


def conversation(cache, forward):
    """A prefill, steps with beams and a rollback; `forward(tokens, start)` gives all layers their new tokens."""
    forward(5, 0)
    cache.batch_repeat_interleave(2)
    forward(1, 5)
    cache.reorder_cache(torch.tensor([1, 1, 0]))
    forward(3, 6)
    cache.crop(-2)
    forward(9, 7)


@pytest.mark.parametrize("fault", ["allocate", "measure", "growth"])
def test_a_failure_anywhere_changes_nothing(monkeypatch, fault):
    """The n-th allocation, write or growth fails, for every n; the same forward then succeeds."""
    expected, failures = None, 0
    if fault == "growth":
        monkeypatch.setattr(memory_pool, "map_memory", refuse_address_space)
    for failing in range(-1, 100):
        cache, calls = PagedKVCache(page_tokens=PAGE), []

        def scarce(original, calls=calls, failing=failing):
            def call(*args, **options):
                if fault != "growth" or isinstance(args[0], tuple):
                    calls.append(0)
                    if len(calls) - 1 == failing:
                        raise (RuntimeError if fault == "growth" else MemoryError)("injected")
                return original(*args, **options)

            return call

        def forward(new, start, cache=cache):
            rows = len(cache.layers[0].page_view().table) if start else 2
            for attempt in range(2):
                before = content(cache)
                try:
                    for index in range(3):
                        keys, values = stamped(rows, new, start + 100 * index)
                        cache.update(keys, values, index, dense=False)
                    return
                except MemoryError:
                    assert attempt == 0
                    assert same_content(content(cache), before)
                    assert cache.get_seq_length() == start
                    nonlocal failures
                    failures += 1

        with monkeypatch.context() as patch:
            if fault == "allocate":
                patch.setattr(MemoryPool, "allocate", scarce(MemoryPool.allocate))
            elif fault == "measure":
                patch.setattr(PageBlock, "measure", scarce(PageBlock.measure))
            else:
                patch.setattr(torch, "empty", scarce(torch.empty))
            conversation(cache, forward)
        expected = expected or content(cache)
        assert same_content(content(cache), expected)
        for layer in cache.layers:
            keys = layer.dense()[0]
            assert all(torch.equal(a, b) for a, b in zip(layer.key_bounds(), plain_bounds(keys), strict=True))
        pages = {page for layer in cache.layers for page in layer.page_view().table.flatten().tolist()}
        assert cache.layers[0].pool.statistics().pages_held == len(pages)
        if failing >= len(calls):
            break
    assert failures == failing >= 6


def test_a_full_pool_and_what_is_left_after_it():
    pool = MemoryPool(HEADS, DIM, page_tokens=PAGE, max_pages=4)
    first, second = PagedKVCache(pool=pool), PagedKVCache(pool=pool)
    first.update(*stamped(1, 5), 0)
    second.update(*stamped(1, 8), 0)
    with pytest.raises(MemoryError, match="2 pages of 240 bytes were asked for, 4 are held and 0 free") as error:
        first.update(*stamped(1, 8, 5), 0)
    one_line(error.value)
    second.reset()
    first.update(*stamped(1, 8, 5), 0)
    assert_holds(first.layers[0], *stamped(1, 13))


def test_a_pool_that_grows_meanwhile_misses_no_write(monkeypatch):
    """Another request's pages are asked for between a step's look-up and its write."""
    monkeypatch.setattr(memory_pool, "map_memory", refuse_address_space)
    layer, write = make_layer(), PageBlock.write
    layer.update(*stamped(1, 5))
    other = threading.Thread(target=layer.pool.allocate, args=(50,))

    def interrupted(*args):
        other.start()
        other.join(timeout=0.2)
        write(*args)

    with monkeypatch.context() as patch:
        patch.setattr(PageBlock, "write", interrupted)
        layer.update(*stamped(1, 1, 5))
    other.join()
    assert layer.pool.capacity >= 50
    assert_holds(layer, *stamped(1, 6))


def wrong_updates():
    keys, values = stamped(2, 1)
    return {
        "the cache holds 2 rows but the batch has 3": stamped(3, 1),
        "float32 on cpu but the keys have 2 KV heads of 3 in torch.bfloat16": (keys.bfloat16(),) * 2,
        "but the keys have 4 KV heads of 3": (keys.repeat(1, 2, 1, 1),) * 2,
        "but the keys have 2 KV heads of 5": (keys[..., :1].repeat(1, 1, 1, 5),) * 2,
        "but the keys have 2 KV heads of 3 in torch.float32 on meta": (keys.to("meta"),) * 2,
        "in torch.float32 and .* in torch.float64": (keys, values.double()),
        r"got \(2, 2, 1, 3\) .* and \(2, 2, 1, 2\)": (keys, values[..., :2]),
        r"got \(2, 1, 3\)": (keys[0], values[0]),
        "max_tokens=7 but the cache holds 6 tokens a row and 2 more came": stamped(2, 2),
    }


@pytest.mark.parametrize("message", wrong_updates())
def test_updates_that_do_not_fit(message):
    cache = PagedKVCache(page_tokens=PAGE, max_tokens=7)
    for index in range(2):
        cache.update(*stamped(2, 6), index)
    with pytest.raises(ValueError, match=message) as error:
        cache.update(*wrong_updates()[message], 0)
    one_line(error.value)
    for layer in cache.layers:
        assert_holds(layer, *stamped(2, 6))
        layer.update(*stamped(2, 1, 6))
        assert_holds(layer, *stamped(2, 7))


def test_other_mistakes():
    layer = make_layer()
    for read in (layer.page_view, layer.key_bounds, layer.dense):
        with pytest.raises(ValueError, match="holds no tokens yet"):
            read()
    layer.update(*stamped(2, 6))
    with pytest.raises(ValueError, match="negative count of tokens to drop, got 3"):
        layer.crop(3)
    for rows in ([0, 2], [-3], [[0]], [0.5], [True, False, True]):
        with pytest.raises(IndexError, match="the cache has 2 rows, got indices") as error:
            layer.batch_select_indices(torch.tensor(rows))
        one_line(error.value)
    assert_holds(layer, *stamped(2, 6))
    with pytest.raises(ValueError, match="max_tokens must be a whole number of at least 1, got 0"):
        PagedKVCache(max_tokens=0)
    with pytest.raises(ValueError, match="page_tokens must be a whole number of at least 1, got -4"):
        PagedKVCache(page_tokens=-4)


# --- Life and copies ---


def test_pages_come_back_when_a_cache_is_dropped():
    pool = MemoryPool(HEADS, DIM, page_tokens=PAGE, max_pages=30)
    cache = PagedKVCache(pool=pool)
    for index in range(3):
        cache.update(*stamped(2, 9), index)
    copied = copy.deepcopy(cache)
    assert pool.statistics().pages_held == 18
    del cache
    gc.collect()
    assert pool.statistics().pages_held == 18
    copied.myself = copied  # only the cycle collector finds it then
    del copied
    with pool.lock:  # a finalizer may run at any moment, in the middle of an allocation too
        gc.collect()
    assert pool.statistics().pages_held == 0


def test_a_copy_shares_pages_and_goes_its_own_way():
    cache = PagedKVCache(page_tokens=PAGE)
    cache.update(*stamped(2, 6), 0)
    copied = copy.deepcopy(cache)
    assert cache.layers[0].pool.statistics().pages_held == 4
    copied.update(*stamped(2, 3, 6), 0)
    cache.crop(-3)
    cache.update(*stamped(2, 2, 100), 0)
    assert_holds(copied.layers[0], *stamped(2, 9))
    expected = [torch.cat((a[:, :, :3], b), 2) for a, b in zip(stamped(2, 6), stamped(2, 2, 100), strict=True)]
    assert_holds(cache.layers[0], *expected)


def test_prefill_in_inference_mode_and_steps_outside():
    layer = make_layer()
    with torch.inference_mode():
        layer.update(*stamped(1, 6))
    layer.update(*stamped(1, 1, 6))
    keys, values = stamped(1, 4, 7)
    layer.update(keys.requires_grad_(), values, dense=False)
    assert_holds(layer, *stamped(1, 11))


def test_gradients_flow_in_one_forward_and_never_silently_stop():
    layer = make_layer()
    keys, values = (x.clone().requires_grad_() for x in stamped(1, 6))
    seen = layer.update(keys, values)
    (seen[0].sum() + 2 * seen[1].sum()).backward()
    assert bool((keys.grad == 1).all()) and bool((values.grad == 2).all())
    for states in layer.update(*(x.clone().requires_grad_() for x in stamped(1, 1, 6))):
        with pytest.raises(RuntimeError, match="keeps no gradients of the history; train in one forward"):
            states.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_page_scores_follow_append_crop_and_reorder(dtype):
    generator = torch.Generator().manual_seed(3)
    layer, keys = PagedLayer(PagePools(PAGE)), torch.empty(2, HEADS, 0, 16, dtype=dtype)
    query = torch.randn(2, 4 * HEADS, 1, 16, generator=generator).to(dtype)
    for new, dropped in ((9, 0), (1, 2), (6, 0), (1, 1)):
        states = torch.randn(2, HEADS, new, 16, generator=generator).to(dtype)
        layer.update(states, states)
        layer.crop(-dropped)
        layer.reorder_cache(torch.tensor([1, 0]))
        keys = torch.cat((keys, states), dim=2)[:, :, : keys.shape[2] + new - dropped].flip(0)
        expected = plain_page_scores(query, *plain_bounds(keys))
        assert torch.allclose(layer.page_scores(query), expected, atol=1e-4)
