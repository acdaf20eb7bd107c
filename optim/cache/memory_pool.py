"""Memory for keys and values in pages of equal size, counted by reference and shared by layers and requests.

The page table follows PagedAttention (Kwon et al., arXiv 2309.06180, section 4); the key bounds of a page are those of
Quest (Tang et al., arXiv 2406.10774).
"""

import contextlib
import mmap
import os
from bisect import bisect_left
from collections import deque
from dataclasses import dataclass
from threading import RLock

import numpy as np
import torch

from .cache_common import NoPickle


HUGE_PAGE_BYTES = 2**21


@dataclass(frozen=True)
class PoolStatistics:
    """What a pool holds at one moment.

    Args:
        pages_held, pages_free (`int`): pages in use, and pages that may still be taken.
        bytes_held (`int`): keys, values and bounds of the pages in use.
        bytes_resident (`int`): of all pages that were ever in use; this memory stays with the pool until it goes.
            Where the system uses pages of 2 MiB, the keys and the values of each head are rounded up to those.
    """

    pages_held: int
    pages_free: int
    bytes_held: int
    bytes_resident: int


class MemoryPool(NoPickle):
    """Pages of keys and values for layers of one shape, dtype and device.

    A page holds `page_tokens` tokens of all KV heads: `keys` and `values` (pages, kv_heads, page_tokens, head_dim),
    and `bounds` (pages, kv_heads, 2, head_dim) with the smallest and largest key of each channel over the tokens
    written. In memory the heads are outermost, so that neighbouring pages of a head are one run: attention reads
    that at the speed of a dense history, and single pages a quarter slower. Whoever holds pages keeps their numbers;
    a page that several hold is copied by the one who writes to it.

    On a CPU the whole limit is reserved as address space at once and becomes memory page by page as it is written, so
    growing never copies. Where that is not possible (other devices, strict overcommit), a pool with a limit takes it
    at once and one without grows by doubling, which copies. Memory once written stays with the pool for later
    requests and goes back to the system with the pool.

    Args:
        kv_heads, head_dim (`int`): shape of a token's keys.
        dtype (`torch.dtype`), device: of keys and values.
        page_tokens (`int`): tokens a page, default 64.
        max_pages (`int`, *optional*), max_bytes (`int`, *optional*): limits, the smaller counts; by default the
            memory of the machine or device.
    Raises:
        ValueError: for a size below 1, or limits that do not hold a single page.
        MemoryError: if a limit was given that cannot be taken.
    """

    def __init__(
        self,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        page_tokens: int = 64,
        max_pages: int | None = None,
        max_bytes: int | None = None,
    ):
        for name, size in (("kv_heads", kv_heads), ("head_dim", head_dim), ("page_tokens", page_tokens)):
            require_positive(name, size)
        self.kv_heads, self.head_dim, self.page_tokens = kv_heads, head_dim, page_tokens
        self.dtype, self.device = dtype, torch.empty(0, device=device).device  # with the index that tensors name
        self.page_bytes = 2 * (page_tokens + 1) * kv_heads * head_dim * dtype.itemsize
        self.lock = RLock()
        self.limit = self._page_limit(max_pages, max_bytes)

        self._references = np.zeros(self.limit, dtype=np.int32)
        self._free = _FreeRanges()
        self._dropped: deque[np.ndarray] = deque()
        self._touched = 0
        self.capacity, self._lazy = 0, False
        self.keys = self.values = self.bounds = None
        if not self._reserve():
            self._resize(0 if max_pages is None and max_bytes is None else self.limit)

    def pool_for(self, states: torch.Tensor) -> "MemoryPool":
        """This pool, if it can hold `states` (batch, kv_heads, tokens, head_dim).

        Raises:
            ValueError: if shape, dtype or device differ.
        """
        own = (self.kv_heads, self.head_dim, self.dtype, self.device)
        given = (states.shape[1], states.shape[3], states.dtype, states.device)
        if own != given:
            raise ValueError(
                f"the pool holds {_describe(*own)} but the keys have {_describe(*given)}; "
                "make a MemoryPool for this model, or leave pool out."
            )
        return self

    def allocate(self, pages: int) -> np.ndarray:
        """Takes pages, one after the other in memory if such a range is free; all of them or none.

        Returns:
            their numbers (pages,) int32; each has one holder.
        Raises:
            MemoryError: if fewer are free, or the device has no memory left.
        """
        with self.lock:
            self._collect()
            if pages > self._free.count:
                self._grow(pages)
            taken = self._free.take(pages)
            self._references[taken] = 1
            self._touched = max(self._touched, int(taken.max(initial=-1)) + 1)
            return taken

    def retain(self, pages: np.ndarray) -> None:
        """Adds a holder to each of `pages`, or several where a number occurs several times.

        Raises:
            ValueError: if one of them is free; nothing changes then.
        """
        with self.lock:
            self._collect()
            numbers, times = np.unique(np.asarray(pages, dtype=np.int32), return_counts=True)
            self._require_held(numbers, 1, "retained")
            self._references[numbers] += times.astype(np.int32)

    def release(self, pages: np.ndarray) -> None:
        """Takes a holder from each of `pages`; those without any are free again.

        Raises:
            ValueError: if a page has fewer holders than it is released; nothing changes then.
        """
        with self.lock:
            self._collect()
            self._release(pages)

    def release_later(self, pages: np.ndarray) -> None:
        """As `release`, at the next call. Takes no lock, so that a finalizer may call it at any moment."""
        self._dropped.append(pages)

    def references(self, pages: np.ndarray) -> np.ndarray:
        """How many hold each of `pages`."""
        return self._references[pages]

    def copy_pages(self, sources: np.ndarray, targets: np.ndarray) -> None:
        """Copies keys, values and bounds of whole pages."""
        with self.lock:
            for source, target in zip(sources.tolist(), targets.tolist(), strict=True):
                for storage in (self.keys, self.values, self.bounds):
                    storage[target].copy_(storage[source])

    def statistics(self) -> PoolStatistics:
        with self.lock:
            self._collect()
            held = self.capacity - self._free.count
            resident = self._touched if self._lazy else self.capacity
            return PoolStatistics(
                held, self.limit - held, held * self.page_bytes, min(resident, self.limit) * self.page_bytes
            )

    def __deepcopy__(self, memo):
        return self  # copies of a cache share the pool and, until one of them writes, the pages

    def __repr__(self):
        shape = _describe(self.kv_heads, self.head_dim, self.dtype, self.device)
        return f"{type(self).__name__}({shape}, page_tokens={self.page_tokens}, {self.statistics()})"

    def _page_limit(self, max_pages: int | None, max_bytes: int | None) -> int:
        for name, value, least in (("max_pages", max_pages, 1), ("max_bytes", max_bytes, self.page_bytes)):
            if value is not None and value < least:
                raise ValueError(
                    f"{name}={value} does not hold one page of {self.page_bytes} bytes; give at least {least}, or "
                    "None for what the machine has."
                )
        if max_pages is None and max_bytes is None:
            max_bytes = max(device_memory(self.device), self.page_bytes)
        # Page numbers, also counted over heads, are int32.
        limits = [(2**31 - 1) // self.kv_heads, max_pages, None if max_bytes is None else max_bytes // self.page_bytes]
        return min(limit for limit in limits if limit is not None)

    def _shapes(self, pages: int) -> tuple[tuple[int, ...], ...]:
        """Of keys, values and bounds as they lie in memory."""
        states = (self.kv_heads, pages, self.page_tokens, self.head_dim)
        return states, states, (self.kv_heads, pages, 2, self.head_dim)

    def _reserve(self) -> bool:
        """Tries to reserve the whole limit as address space."""
        if self.device.type != "cpu" or not hasattr(mmap, "MAP_ANONYMOUS"):
            return False
        try:
            states, _, bounds = self._shapes(self.limit)
            self._use(*(map_memory(states, self.dtype, huge=True) for _ in range(2)), map_memory(bounds, self.dtype))
        except (OSError, OverflowError, ValueError):
            return False
        self._lazy = True
        return True

    def _resize(self, capacity: int) -> None:
        """Moves to new storage of `capacity` pages; unchanged if there is no memory for it."""
        # A tensor made in inference mode could not be written to outside of it.
        with torch.inference_mode(False), torch.no_grad():
            try:
                shapes = self._shapes(capacity)
                storages = [torch.empty(shape, dtype=self.dtype, device=self.device) for shape in shapes]
            except (RuntimeError, MemoryError):  # torch reports a lack of memory as the former
                raise MemoryError(
                    f"no memory for {capacity} pages of {self.page_bytes} bytes on {self.device}, "
                    f"{self.capacity - self._free.count} are held; drop a cache, or use shorter or fewer requests."
                ) from None
            for new, old in zip(storages, (self.keys, self.values, self.bounds), strict=True):
                if old is not None:
                    new[:, : self.capacity].copy_(old.transpose(0, 1))
        self._use(*storages)

    def _use(self, *storages: torch.Tensor) -> None:
        self.keys, self.values, self.bounds = (storage.transpose(0, 1) for storage in storages)
        if len(self.keys) > self.capacity:
            self._free.give(self.capacity, len(self.keys))
        self.capacity = len(self.keys)

    def _grow(self, pages: int) -> None:
        held = self.capacity - self._free.count
        if held + pages > self.limit:
            raise MemoryError(
                f"the pool is full: {pages} pages of {self.page_bytes} bytes were asked for, {held} are held and "
                f"{self.limit - held} free; drop a cache, use shorter or fewer requests, or raise the pool's limit."
            )
        self._resize(min(self.limit, max(2 * self.capacity, held + pages)))

    def _collect(self) -> None:
        while self._dropped:
            self._release(self._dropped.popleft())

    def _release(self, pages: np.ndarray) -> None:
        numbers, times = np.unique(np.asarray(pages, dtype=np.int32), return_counts=True)
        self._require_held(numbers, times, "released more often than it was allocated or retained")
        self._references[numbers] -= times.astype(np.int32)
        freed = numbers[self._references[numbers] == 0]
        for start, stop in page_runs(freed):
            self._free.give(int(freed[start]), int(freed[stop - 1]) + 1)

    def _require_held(self, numbers: np.ndarray, times, verb: str) -> None:
        known = (numbers >= 0) & (numbers < self.limit)
        wrong = ~known | (self._references[np.where(known, numbers, 0)] < times)
        if wrong.any():
            page = int(numbers[wrong][0])
            raise ValueError(
                f"page {page} is {verb}: it has {int(self._references[page]) if known[wrong][0] else 0} holders; "
                "pass pages that allocate() returned and that are still held."
            )


class PagePools(NoPickle):
    """Makes a `MemoryPool` for each shape, dtype and device of keys that comes up, and keeps it.

    Args:
        page_tokens (`int`): tokens a page.
        max_bytes (`int`, *optional*): limit of each pool.
    """

    def __init__(self, page_tokens: int = 64, max_bytes: int | None = None):
        for name, size in (("page_tokens", page_tokens), ("max_bytes", max_bytes)):
            if size is not None:
                require_positive(name, size)
        self.page_tokens, self.max_bytes = page_tokens, max_bytes
        self.pools: dict[tuple, MemoryPool] = {}
        self._lock = RLock()

    def pool_for(self, states: torch.Tensor) -> MemoryPool:
        """The pool that holds `states` (batch, kv_heads, tokens, head_dim)."""
        key = (states.shape[1], states.shape[3], states.dtype, states.device)
        with self._lock:
            if key not in self.pools:
                self.pools[key] = self.make_pool(*key, page_tokens=self.page_tokens, max_bytes=self.max_bytes)
            return self.pools[key]

    def make_pool(self, *shape_dtype_device, **options) -> MemoryPool:
        return MemoryPool(*shape_dtype_device, **options)

    def __deepcopy__(self, memo):
        return self


@dataclass(frozen=True)
class PageView:
    """Where a layer's history lies, for attention functions that read it in place.

    Token t of row b is at `[table[b, t // page_tokens], :, t % page_tokens]` of `keys` and `values`; what stands
    behind `length` tokens is undefined. Good until the layer changes.

    Args:
        keys, values (`torch.Tensor`): (pool pages, KV heads, page_tokens, head_dim), the pool's own storage; each
            page of a head is contiguous.
        table (`torch.Tensor`): (B, pages) int32.
        length (`int`): tokens in each row.
        page_tokens (`int`): tokens a page.
    """

    keys: torch.Tensor
    values: torch.Tensor
    table: torch.Tensor
    length: int
    page_tokens: int


class PageBlock:
    """One page of each of several batch rows, or any pages, as views that can be written to.

    Args:
        pool (`MemoryPool`): holds them; the views are good until its storage is replaced.
        rows (`slice`, *optional*): the rows; `None` for all.
        pages (`slice`): the pages.
    """

    def __init__(self, pool: MemoryPool, rows: slice | None, pages: slice):
        self.rows = rows
        self.keys, self.values = pool.keys[pages], pool.values[pages]  # (rows, heads, page_tokens, D)
        self.low, self.high = pool.bounds[pages].unbind(2)  # (rows, heads, D)

    def own(self, states: torch.Tensor) -> torch.Tensor:
        """The rows of this block out of those of the batch (B, ...)."""
        return states if self.rows is None else states[self.rows]

    def write(self, filled: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Writes (rows, heads, new, D) behind `filled` tokens and widens the bounds."""
        new = keys.shape[2]
        self.keys.narrow(2, filled, new).copy_(keys)
        self.values.narrow(2, filled, new).copy_(values)
        if not filled:
            self.measure(new)
            return
        low, high = (keys.squeeze(2),) * 2 if new == 1 else (keys.amin(2), keys.amax(2))
        torch.minimum(self.low, low, out=self.low)
        torch.maximum(self.high, high, out=self.high)

    def measure(self, filled: int) -> None:
        """Sets the bounds to those of the first `filled` tokens."""
        low, high = self.key_bounds(filled)
        self.low.copy_(low)
        self.high.copy_(high)

    def key_bounds(self, filled: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The smallest and largest keys of the first `filled` tokens, each (rows, heads, D)."""
        keys = self.keys[:, :, :filled]
        return keys.amin(2), keys.amax(2)  # `torch.aminmax` takes six times as long


class _FreeRanges:
    """Free page numbers as sorted ranges that do not touch. The lowest come first, so that memory is used again."""

    def __init__(self):
        self._starts: list[int] = []
        self._stops: list[int] = []
        self.count = 0

    def take(self, pages: int) -> np.ndarray:
        """Numbers (pages,) int32, of which at least as many must be free; one range if there is one."""
        fitting = next((i for i, start in enumerate(self._starts) if self._stops[i] - start >= pages), None)
        parts = []
        while pages:
            index = 0 if fitting is None else fitting
            start, stop = self._starts[index], min(self._stops[index], self._starts[index] + pages)
            parts.append(np.arange(start, stop, dtype=np.int32))
            pages -= stop - start
            self.count -= stop - start
            if stop == self._stops[index]:
                del self._starts[index], self._stops[index]
            else:
                self._starts[index] = stop
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int32)

    def give(self, start: int, stop: int) -> None:
        """Adds pages `start` up to `stop`, none of which may be free."""
        self.count += stop - start
        index = bisect_left(self._starts, start)
        if index < len(self._starts) and self._starts[index] == stop:
            stop = self._stops[index]
            del self._starts[index], self._stops[index]
        if index and self._stops[index - 1] == start:
            self._stops[index - 1] = stop
        else:
            self._starts.insert(index, start)
            self._stops.insert(index, stop)


def page_blocks(pool: MemoryPool, pages: np.ndarray) -> list[PageBlock]:
    """Blocks of one page a row, `pages` (B,): a single one if they are equally far apart."""
    if len(pages) == 1:
        first = int(pages[0])
        return [PageBlock(pool, None, slice(first, first + 1))]
    steps = np.diff(pages)
    if len(pages) and steps[0] > 0 and (steps == steps[0]).all():
        return [PageBlock(pool, None, slice(int(pages[0]), int(pages[-1]) + 1, int(steps[0])))]
    return [PageBlock(pool, slice(row, row + 1), slice(page, page + 1)) for row, page in enumerate(pages.tolist())]


def page_runs(pages: np.ndarray) -> list[tuple[int, int]]:
    """Where consecutive numbers stand in `pages` (n,): pairs of start and stop."""
    if not len(pages):
        return []
    edges = (np.flatnonzero(np.diff(pages) != 1) + 1).tolist()
    return list(zip([0, *edges], [*edges, len(pages)], strict=True))


def map_memory(shape: tuple[int, ...], dtype: torch.dtype, huge: bool = False) -> torch.Tensor:
    """Zeros on the CPU that take memory only where they are written, `huge`: by pages of 2 MiB if the system can.

    `torch.empty` would do for most, but fills what it returns under `torch.use_deterministic_algorithms`.
    Raises:
        OSError: if the system does not give away that much address space.
    """
    size = int(np.prod(shape, dtype=np.int64))
    space = mmap.mmap(-1, size * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if huge and size * dtype.itemsize >= HUGE_PAGE_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
        # The first write to a page of 4 KiB costs more than the write itself; of 2 MiB, a third of that.
        with contextlib.suppress(OSError):
            space.madvise(mmap.MADV_HUGEPAGE)
    with torch.inference_mode(False):
        return torch.frombuffer(space, dtype=dtype, count=size).view(shape)


def device_memory(device: torch.device) -> int:
    """Bytes of memory that the device has, in use or not."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if hasattr(os, "sysconf"):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 2**40  # unknown: an allocation that fails says so


def require_positive(name: str, size: int) -> None:
    """Raises a `ValueError` unless `size` is a whole number above 0."""
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {size!r}.")


def _describe(kv_heads, head_dim, dtype, device) -> str:
    return f"{kv_heads} KV heads of {head_dim} in {dtype} on {device}"
