"""The page pool: layout, reference counts, limits, growth with and without address space, threads."""

import copy
import gc
import pickle
import sys
import threading
from collections import Counter
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import one_line
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_vl.optim.cache import memory_pool
from qwen3_vl.optim.cache.memory_pool import MemoryPool, PagePools


def make_pool(**options):
    return MemoryPool(**{"kv_heads": 2, "head_dim": 3, "page_tokens": 4, **options})


@pytest.fixture
def no_address_space(monkeypatch):
    """As on a GPU, or where the system promises no more memory than it has."""

    def refuse(shape, dtype, huge=False):
        raise OSError("no address space")

    monkeypatch.setattr(memory_pool, "map_memory", refuse)


def test_layout():
    pool = make_pool(dtype=torch.bfloat16, max_pages=6)
    assert pool.keys.shape == pool.values.shape == (6, 2, 4, 3)
    assert pool.bounds.shape == (6, 2, 2, 3)
    for storage in (pool.keys, pool.values, pool.bounds):
        assert storage.dtype == torch.bfloat16
        assert storage.transpose(0, 1).is_contiguous()  # neighbouring pages of a head are one run
    assert pool.page_bytes == (2 * 4 + 2) * 2 * 3 * 2
    assert "2 KV heads of 3 in torch.bfloat16 on cpu" in repr(pool)


def test_statistics_follow_the_pages():
    pool = make_pool(max_pages=10)
    first, second = pool.allocate(3), pool.allocate(2)
    assert first.tolist() == [0, 1, 2] and second.tolist() == [3, 4]
    pool.release(first)
    seen = pool.statistics()
    assert (seen.pages_held, seen.pages_free) == (2, 8)
    assert (seen.bytes_held, seen.bytes_resident) == (2 * pool.page_bytes, 5 * pool.page_bytes)


def test_ranges_are_contiguous_where_possible_and_low_pages_come_again():
    pool = make_pool(max_pages=12)
    parts = [pool.allocate(2) for _ in range(6)]
    pool.release(np.concatenate((parts[0], parts[2], parts[3])))  # free: 0 1, 4 5 6 7
    assert pool.allocate(4).tolist() == [4, 5, 6, 7]
    pool.release(np.array([5, 7]))
    assert pool.allocate(3).tolist() == [0, 1, 5]  # no range of three is left
    assert pool.allocate(0).tolist() == []


@pytest.mark.parametrize("order", list(permutations((3, 4, 5))), ids=str)
def test_neighbours_that_come_back_one_by_one_are_a_range_again(order):
    pool = make_pool(max_pages=12)
    pool.allocate(12)
    pool.release(np.array([8, 9, 10]))
    for page in order:
        pool.release(np.array([page]))
    assert pool.allocate(3).tolist() == [3, 4, 5]


def test_reference_counts():
    pool = make_pool(max_pages=4)
    pages = pool.allocate(2)
    pool.retain(np.array([pages[0], pages[0], pages[1]]))
    assert pool.references(pages).tolist() == [3, 2]
    pool.release(np.array([pages[0], pages[1], pages[0]]))
    assert pool.references(pages).tolist() == [1, 1]
    pool.release(pages)
    assert pool.statistics().pages_held == 0


@pytest.mark.parametrize(
    ("pages", "message"),
    [([0, 0], "page 0 is released more often"), ([1, 3], "page 3"), ([9], "page 9"), ([-1], "-1")],
)
def test_a_release_too_many_changes_nothing(pages, message):
    pool = make_pool(max_pages=4)
    held = pool.allocate(2)
    with pytest.raises(ValueError, match=message) as error:
        pool.release(np.array(pages))
    assert "allocate()" in one_line(error.value)
    assert pool.references(held).tolist() == [1, 1]
    assert pool.statistics().pages_held == 2


def test_a_free_page_cannot_be_retained():
    pool = make_pool(max_pages=4)
    held = pool.allocate(1)
    with pytest.raises(ValueError, match="page 2 is retained"):
        pool.retain(np.array([0, 2]))
    assert pool.references(held).tolist() == [1]


def test_a_full_pool_says_what_was_asked_held_and_free():
    pool = make_pool(max_pages=5)
    held = pool.allocate(3)
    with pytest.raises(MemoryError, match="3 pages of 240 bytes were asked for, 3 are held and 2 free") as error:
        pool.allocate(3)
    one_line(error.value)
    assert pool.statistics().pages_held == 3
    pool.release(held)
    assert len(pool.allocate(5)) == 5


def test_limits():
    page = make_pool(max_pages=1).page_bytes
    assert make_pool(max_bytes=3 * page + page // 2).limit == 3
    assert make_pool(max_bytes=9 * page, max_pages=2).limit == 2
    machine = memory_pool.device_memory(torch.device("cpu"))
    assert make_pool().limit == machine // page


@pytest.mark.parametrize(
    "options", [{"max_bytes": 0}, {"max_bytes": 100}, {"max_pages": 0}, {"page_tokens": 0}, {"kv_heads": -1}]
)
def test_sizes_that_make_no_sense(options):
    with pytest.raises(ValueError, match=next(iter(options))) as error:
        make_pool(**options)
    assert "at least" in one_line(error.value)


@pytest.mark.parametrize("options", [{"max_bytes": 0}, {"page_tokens": 2.5}, {"page_tokens": True}])
def test_sizes_that_make_no_sense_for_pools(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be a whole number of at least 1"):
        PagePools(**options)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the resident size from /proc")
@pytest.mark.parametrize("deterministic", [False, True])
def test_what_is_not_written_takes_no_memory(deterministic):
    """Under deterministic algorithms torch fills what it allocates, which would take the whole machine."""

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    gc.collect()
    torch.use_deterministic_algorithms(deterministic)
    try:
        before = resident()
        pool = MemoryPool(8, 128, dtype=torch.bfloat16)
        assert pool.limit * pool.page_bytes > 2**30
        pages = pool.allocate(16)
        pool.keys[pages.tolist()] = 1
        assert resident() - before < 2**25
    finally:
        torch.use_deterministic_algorithms(False)


def test_growing_keeps_pages_where_they_are():
    pool = make_pool()
    before = pool.keys.data_ptr()
    pool.allocate(10_000)
    assert pool.keys.data_ptr() == before


def test_written_in_and_out_of_inference_mode():
    with torch.inference_mode():
        pool = make_pool(max_pages=2)
        pool.keys[0] = 1
    pool.keys[0, 0] = 2
    assert pool.keys[0].unique().tolist() == [1, 2]


@pytest.mark.usefixtures("no_address_space")
class TestWithoutAddressSpace:
    def test_grows_by_doubling_and_keeps_the_content(self):
        pool = make_pool()
        assert pool.capacity == 0
        for index in range(40):
            page = int(pool.allocate(1)[0])
            pool.keys[page], pool.values[page], pool.bounds[page] = index, index + 0.5, -index
        expected = torch.arange(40.0)
        assert torch.equal(pool.keys[:40, 1, 2, 0], expected)
        assert torch.equal(pool.values[:40, 0, 3, 2], expected + 0.5)
        assert torch.equal(pool.bounds[:40, 0, 1, 2], -expected)
        assert pool.capacity == 64
        assert pool.statistics().bytes_resident == 64 * pool.page_bytes

    def test_a_limit_is_taken_at_once(self):
        pool = make_pool(max_pages=7)
        assert pool.capacity == 7
        before = pool.keys.data_ptr()
        pool.allocate(7)
        assert pool.keys.data_ptr() == before
        with pytest.raises(MemoryError, match="1 pages of 240 bytes were asked for, 7 are held and 0 free"):
            pool.allocate(1)

    @pytest.mark.parametrize("failing", [0, 1, 2])
    def test_no_memory_for_growing_changes_nothing(self, monkeypatch, failing):
        pool = make_pool()
        held = pool.allocate(2)
        pool.keys[:2] = 5
        calls, empty = [], torch.empty

        def scarce(*args, **options):
            calls.append(args)
            if len(calls) == failing + 1:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
            return empty(*args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", scarce)
            with pytest.raises(MemoryError, match="no memory for 5 pages of 240 bytes on cpu, 2 are held") as error:
                pool.allocate(3)
        one_line(error.value)
        assert pool.statistics().pages_held == pool.capacity == 2
        assert pool.references(held).tolist() == [1, 1]
        assert pool.allocate(3).tolist() == [2, 3, 4]
        assert bool((pool.keys[:2] == 5).all())


def longest_run(pages):
    best = run = 0
    for page in range(max(pages, default=-1) + 1):
        run = run + 1 if page in pages else 0
        best = max(best, run)
    return best


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.sampled_from(["allocate", "retain", "release", "drop"]), st.integers(0, 7)), max_size=60))
def test_against_a_plain_model(steps):
    """Held pages as a `Counter`; what is asked for is one range whenever the free pages have one."""
    pool, held, limit = make_pool(max_pages=16), Counter(), 16
    for action, number in steps:
        free = set(range(limit)) - set(held)
        if action == "allocate" and number <= len(free):
            pages = pool.allocate(number).tolist()
            assert len(set(pages)) == number and set(pages) <= free
            if number and number <= longest_run(free):
                assert pages == list(range(pages[0], pages[0] + number))
            held.update(pages)
        elif action == "allocate":
            with pytest.raises(MemoryError):
                pool.allocate(number)
        elif held:
            pages = [sorted(held.elements())[(number * k) % held.total()] for k in range(1, number + 1)]
            if action == "retain":
                pool.retain(np.array(pages))
                held.update(pages)
            elif all(count <= held[page] for page, count in Counter(pages).items()):
                (pool.release if action == "release" else pool.release_later)(np.array(pages))
                held -= Counter(pages)
            else:
                with pytest.raises(ValueError, match="more often"):
                    pool.release(np.array(pages))
        assert pool.statistics().pages_held == len(held)
        assert pool.references(np.arange(limit)).tolist() == [held[page] for page in range(limit)]


def test_threads_never_get_the_same_page():
    pool, owners, errors = make_pool(max_pages=64), np.full(64, -1), []
    start, interval = threading.Barrier(4), sys.getswitchinterval()

    def work(name):
        start.wait()
        generator = np.random.default_rng(name)
        for _ in range(300):
            pages = pool.allocate(int(generator.integers(1, 8)))
            if (owners[pages] != -1).any():
                errors.append(pages)
            owners[pages] = name
            pool.retain(pages)
            owners[pages] = -1
            pool.release(pages)
            (pool.release if generator.random() < 0.5 else pool.release_later)(pages)

    threads = [threading.Thread(target=work, args=(name,)) for name in range(4)]
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not errors
    assert pool.statistics().pages_held == 0


def test_pools_by_shape_dtype_and_device():
    pools = PagePools(page_tokens=4, max_bytes=10_000)
    states = torch.zeros(1, 2, 5, 3)
    pool = pools.pool_for(states)
    assert pools.pool_for(torch.ones(7, 2, 1, 3)) is pool
    assert (pool.kv_heads, pool.head_dim, pool.page_tokens) == (2, 3, 4)
    assert pool.limit == 10_000 // pool.page_bytes
    others = [states.double(), torch.zeros(1, 1, 5, 3), torch.zeros(1, 2, 5, 6)]
    assert len({id(pools.pool_for(x)) for x in [states, *others]}) == 4


@pytest.mark.parametrize(
    ("states", "message"),
    [
        (torch.zeros(1, 4, 1, 3), "4 KV heads of 3 in torch.float32"),
        (torch.zeros(1, 2, 1, 8), "2 KV heads of 8"),
        (torch.zeros(1, 2, 1, 3, dtype=torch.float16), "torch.float16"),
        (torch.zeros(1, 2, 1, 3, device="meta"), "on meta"),
    ],
)
def test_a_pool_refuses_other_keys(states, message):
    pool = make_pool(max_pages=2)
    assert pool.pool_for(torch.zeros(5, 2, 1, 3)) is pool
    with pytest.raises(ValueError, match=message) as error:
        pool.pool_for(states)
    assert "2 KV heads of 3 in torch.float32 on cpu" in one_line(error.value)


@pytest.mark.parametrize("thing", [make_pool(max_pages=1), PagePools()])
def test_copied_by_reference_and_never_pickled(thing):
    assert copy.deepcopy(thing) is thing
    with pytest.raises(TypeError, match="cannot be pickled, since its pages live in a pool of this process"):
        pickle.dumps(thing)
