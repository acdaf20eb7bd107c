"""Pages that finished and running requests share: what a prefix cache is made of."""

from collections.abc import Callable
from dataclasses import dataclass
from threading import RLock
from typing import Any

import numpy as np
import torch

from .cache_paged import PagedKVCache, PagedLayer
from .memory_pool import MemoryPool, PagePools
from .model_fingerprint import ModelFingerprint
from .prefix_request import PrefixRequest


class PrefixedLayer(PagedLayer):
    """A [`PagedLayer`] that can begin with pages of others."""

    def share(self, pool: MemoryPool, table: np.ndarray, length: int) -> None:
        """Holds the pages `table` (B, pages) too, of which the first `length` tokens count; for an empty layer."""
        pool.retain(table)
        self.pool, self.is_initialized = pool, True
        self.dtype, self.device = pool.dtype, pool.device
        self._length = length
        self._bounds_stale = length % pool.page_tokens != 0
        self._set_table(table)

    def pages_of(self, row: int) -> np.ndarray:
        """The pages (pages,) of a row."""
        return self._table[row]


class PrefixedKVCache(PagedKVCache):
    """The [`PagedKVCache`] of a request that a [`PrefixCache`] knows of."""

    def __init__(self, config, pool: "SharedPools"):
        super().__init__(config, pool=pool)
        self.layers = [PrefixedLayer(pool) for _ in self.layers]

    @property
    def rows(self) -> int:
        """Batch rows held; 0 of an empty cache."""
        return len(self.layers[0].page_view().table) if self.get_seq_length() else 0


@dataclass(frozen=True, eq=False)
class PrefixTicket:
    """Of whom a cache got its beginning, for what, and of which state of the model; by this it is stored later."""

    prefix: Any
    request: PrefixRequest
    fingerprint: ModelFingerprint

    def store(self, cache: PrefixedKVCache, sequences: torch.Tensor, prompts_alone: bool) -> None:
        """Stores a cache after `generate()` returned `sequences`; not if those lack what the cache began with."""
        if self.request.begins(sequences.cpu().numpy()):
            self.prefix.store(cache, None if prompts_alone else sequences)

    def __deepcopy__(self, memo):
        return self


@dataclass(eq=False)
class StoredRow:
    """One row of a finished request: its real tokens (tokens, 6), and for each layer a pool and pages (pages,).

    The first `padding` tokens in the pages mean nothing.
    """

    key: np.ndarray
    padding: int
    pools: list[MemoryPool]
    tables: list[np.ndarray]

    def retain(self) -> None:
        for pool, pages in zip(self.pools, self.tables, strict=True):
            pool.retain(pages)

    def release(self) -> None:
        for pool, pages in zip(self.pools, self.tables, strict=True):
            pool.release(pages)

    def read(self, layer: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the first real tokens in a layer, gathered: each (KV heads, tokens, head_dim)."""
        pool, end = self.pools[layer], self.padding + tokens
        pages = torch.from_numpy(self.tables[layer][: -(-end // pool.page_tokens)]).to(pool.device)
        return tuple(
            storage[pages].transpose(0, 1).flatten(1, 2)[:, self.padding : end] for storage in (pool.keys, pool.values)
        )


class _EvictingPool(MemoryPool):
    """Asks for room before it says that it is full."""

    def __init__(self, *args, lock: RLock, make_room: Callable[[], bool], **kwargs):
        super().__init__(*args, **kwargs)
        self.lock, self._make_room = lock, make_room

    def _grow(self, pages: int) -> None:
        while pages > self._free.count:
            try:
                super()._grow(pages)
            except MemoryError:
                if not self._make_room():
                    raise


class SharedPools(PagePools):
    """Pools under one lock, which ask for room before they say that they are full."""

    def __init__(self, lock: RLock, make_room: Callable[[], bool], page_tokens: int, max_bytes: int | None):
        super().__init__(page_tokens, max_bytes)
        self._room = {"lock": lock, "make_room": make_room}

    def make_pool(self, *shape_dtype_device, **options) -> MemoryPool:
        return _EvictingPool(*shape_dtype_device, **options, **self._room)
