"""The upper layer of two that share pages of keys and values: what is its own lies beside them."""

import math
from dataclasses import dataclass

import numpy as np
import torch

from ..attention.attention_kernels import is_decoding
from .cache_paged import PagedLayer
from .cross_layer_merge import Comparison, SharedFormat, compare, restore_, share
from .memory_pool import MemoryPool, PagePools, require_positive
from .quantized_reading import attend_piece_by_piece


# Tokens that are restored at once when a history is read, and pages that are merged at once.
PIECE_TOKENS = 512
PAGES_AT_ONCE = 32


@dataclass(frozen=True)
class SharingSettings:
    """How layers share; see `CrossLayerKVCache`.

    Raises:
        ValueError: for settings out of range.
    """

    start_layer: int | None = None
    retained_share: float = 0.05
    min_similarity: float = 0.8
    residual_tokens: int = 128
    interpolation: float = 0.5

    def __post_init__(self):
        require_positive("residual_tokens", self.residual_tokens)
        for name in ("retained_share", "min_similarity", "interpolation"):
            share_given = getattr(self, name)
            if isinstance(share_given, bool) or not isinstance(share_given, int | float) or not 0 <= share_given <= 1:
                raise ValueError(f"{name} must be a number from 0 to 1, got {share_given!r}.")
        if self.retained_share > 0.5:
            raise ValueError(
                f"retained_share={self.retained_share} saves next to nothing; give 0.5 at most, or use PagedKVCache."
            )
        start = self.start_layer
        if start is not None and (isinstance(start, bool) or not isinstance(start, int)):
            raise ValueError(f"start_layer must be a layer's number or None for the middle, got {start!r}.")

    def pairs(self, layers: int) -> tuple[tuple[int, int], ...]:
        """The layers, lower and upper, that share with each other in a model of so many.

        Raises:
            ValueError: if there are no two from `start_layer` on.
        """
        start = layers // 2 if self.start_layer is None else self.start_layer
        if not 0 <= start <= layers - 2:
            raise ValueError(
                f"start_layer={start} leaves no two of the {layers} layers to share; give 0 to {layers - 2}, or use "
                "PagedKVCache."
                if layers > 1
                else f"a model of {layers} layers has no two that could share; use PagedKVCache."
            )
        return tuple((lower, lower + 1) for lower in range(start, layers - 1, 2))


@dataclass(frozen=True)
class PairSimilarity:
    """How alike the keys and the values of two layers were found.

    A similarity is 1 less the angle as a share of half a turn: 1 for equal directions, 0.5 for unrelated ones.

    Args:
        keys, values (`float`): means over rows, KV heads and tokens.
        tokens (`int`): tokens compared, of all rows.
        shared (`bool`): whether the pair shares, or was refused for being less alike than asked for.
    """

    keys: float
    values: float
    tokens: int
    shared: bool


class SharingLayer(PagedLayer):
    """Keys and values of one decoder layer, whose older pages are those of the layer below.

    A shared page holds what the lower layer reads, so that one is a [`PagedLayer`] that knows nothing of it. This
    layer keeps a record beside each, from which its own keys and values are restored, a piece at a time where an
    attention function reads the layer itself.

    Args:
        pools (`PagePools`): where pages and records come from.
        max_tokens (`int`, *optional*): the most tokens that a row may hold.
        settings (`SharingSettings`): how it shares.
    """

    def __init__(self, pools: PagePools, max_tokens: int | None = None, settings: SharingSettings = SharingSettings()):
        self.settings, self._records = settings, None
        super().__init__(pools, max_tokens)

    @property
    def shared_tokens(self) -> int:
        """Tokens of each row whose pages are shared."""
        return min(self._length, self._shared_pages * self.pool.page_tokens) if self._length else 0

    @property
    def reader(self):
        """What an attention function reads: pages in place as long as they are all this layer's own."""
        return _RestoringReader(self) if self._shared_pages else self

    @property
    def held_bytes(self) -> int:
        """Bytes of its pages, shared ones among them, and of its records."""
        return super().held_bytes + self.record_bytes

    @property
    def record_bytes(self) -> int:
        """Bytes of what the layer keeps beside shared pages."""
        return self._records.held_bytes if self._shared_pages else 0

    @torch.compiler.disable
    def share_with(self, lower: PagedLayer, tokens: int) -> None:
        """Shares the whole pages of the first `tokens` tokens that are not shared yet with the layer below.

        Stops where the two are not alike enough, from when on nothing more is shared; see `similarity`.
        Raises:
            ValueError: for keys or values that are NaN or infinite. What is not shared by then stays as it is.
            MemoryError: if there is no room for a record; likewise.
        """
        if self.refused or not len(self._table):
            return
        if lower.pool is not self.pool:
            self.refused = True
            return
        pages, step = tokens // self.pool.page_tokens, max(1, PAGES_AT_ONCE // len(self._table))
        while self._shared_pages < pages and not self.refused:
            with self.pool.lock:
                self._share_pages(lower, slice(self._shared_pages, min(self._shared_pages + step, pages)))

    @torch.compiler.disable
    def close_gaps(self) -> None:
        """Moves what is not shared to where pages became free, so that one range of free pages is left for others."""
        own = self._table[:, self._shared_pages :]
        if own.size > self._table.size - own.size or (self.pool.references(own) > 1).any():
            return
        with self.pool.lock:
            moved = self.pool.allocate(own.size)
            self.pool.copy_pages(own.ravel(), moved)
            self.pool.release(own)
        self._set_table(np.concatenate((self._table[:, : self._shared_pages], moved.reshape(own.shape)), axis=1))

    @torch.compiler.disable
    def dense(self) -> tuple[torch.Tensor, torch.Tensor]:
        self._require_content()
        if not self._shared_pages:
            return super().dense()
        return self._read(0, self._table.shape[1], self.dtype)

    @torch.compiler.disable
    def attend(self, query: torch.Tensor, layout, scaling: float) -> torch.Tensor:
        """Attention of queries (B, H, T, D) to the history: (B, T, H, D). See `attend_decode` for the rest."""
        self._require_content()
        seen_by_all = self._length - query.shape[2] if layout is None else layout.query_offset
        columns, page_tokens = self._table.shape[1], self.pool.page_tokens
        tail, step = min(seen_by_all // page_tokens, columns - 1), max(1, PIECE_TOKENS // page_tokens)
        # Few queries are compared in the dtype in which keys are restored.
        few = is_decoding(query, self.pool.kv_heads)
        dtype = torch.promote_types(query.dtype, torch.float32) if few else query.dtype
        pieces = (
            (first * page_tokens, self._read(first, min(first + step, tail), dtype)) for first in range(0, tail, step)
        )
        newest = (tail * page_tokens, self._read(tail, columns, dtype))
        return attend_piece_by_piece(query.to(dtype), pieces, newest, layout, scaling).to(query.dtype)

    def page_view(self):
        self._require_own_pages()
        return super().page_view()

    def key_bounds(self) -> tuple[torch.Tensor, torch.Tensor]:
        self._require_own_pages()
        return super().key_bounds()

    def __deepcopy__(self, memo):
        copied = super().__deepcopy__(memo)
        copied.settings, copied.refused, copied._sums = self.settings, self.refused, self._sums
        copied._records = None if self._records is None else self._records.copy()
        return copied

    @property
    def similarity(self) -> PairSimilarity | None:
        """What was measured so far; `None` before anything was."""
        compared, keys, values, tokens = self._sums
        return PairSimilarity(keys / compared, values / compared, tokens, not self.refused) if compared else None

    @property
    def _shared_pages(self) -> int:
        return 0 if self._records is None else self._records.table.shape[1]

    def _forget(self) -> None:
        super()._forget()
        # Vectors compared, sums of their similarities in keys and in values, tokens compared.
        self.refused, self._sums = False, (0, 0.0, 0.0, 0)
        if self._records is not None:
            self._records.drop_after(0)
        self._records = None

    def _require_own_pages(self) -> None:
        if self._shared_pages:
            raise ValueError(
                "the layer shares pages, which hold the keys of the layer below; read it by dense() or attend()."
            )

    def _share_pages(self, lower: PagedLayer, columns: slice) -> None:
        pool, own, below = self.pool, self._table[:, columns], lower._table[:, columns]
        # Rows that share pages of both layers are merged once.
        both = np.stack((below.ravel(), own.ravel()), axis=1)
        pages, inverse, holders = np.unique(both, axis=0, return_inverse=True, return_counts=True)
        inverse = inverse.reshape(own.shape)
        index = [self._on_device(numbers) for numbers in pages.T]
        states = [(storage[index[0]], storage[index[1]]) for storage in (pool.keys, pool.values)]
        compared = [compare(*two, what) for two, what in zip(states, ("keys", "values"), strict=True)]
        sums = self._add_similarity(compared)
        if min(sums[1:3]) < self.settings.min_similarity * sums[0]:
            self._sums, self.refused = sums, True
            return
        form, at = self._format(), self.settings.interpolation
        merged = [share(*two, one, at, form) for two, one in zip(states, compared, strict=True)]
        records = self._records or _Records(self._record_pool(form), len(own))
        # A page that nobody else reads is written over; another holder goes on with what it has.
        free = pool.references(pages[:, 0]) == holders
        fresh = pool.allocate(int((~free).sum()))
        try:
            records.append(merged[0][1], merged[1][1], inverse)
        except BaseException:
            pool.release(fresh)
            raise
        targets = pages[:, 0].copy()
        targets[~free] = fresh
        self._write_whole_pages(targets, merged[0][0], merged[1][0])
        shared = targets[inverse]
        pool.retain(np.concatenate((shared, shared)))
        pool.release(np.concatenate((below.ravel(), own.ravel(), fresh)))
        self._records, self._sums = records, sums
        for layer in (self, lower):
            table = layer._table.copy()
            table[:, columns] = shared
            layer._set_table(table)

    def _add_similarity(self, compared: list[Comparison]) -> tuple[int, float, float, int]:
        distances = [one.distance for one in compared]
        keys, values = (float((1 - distance).sum(dtype=torch.float64)) for distance in distances)
        pages, tokens = distances[0].shape[0], distances[0].shape[-1]
        added = distances[0].numel(), keys, values, pages * tokens
        return tuple(old + new for old, new in zip(self._sums, added, strict=True))

    def _format(self) -> SharedFormat:
        tokens = self.pool.page_tokens
        kept = math.ceil(self.settings.retained_share * tokens)
        return SharedFormat(tokens, self.pool.head_dim, self.pool.dtype, kept)

    def _record_pool(self, form: SharedFormat) -> MemoryPool:
        shape = (1, self.pool.kv_heads, 0, form.token_bytes)
        return self.pools.pool_for(torch.empty(shape, dtype=torch.uint8, device=self.device))

    def _write_whole_pages(self, pages: np.ndarray, keys: torch.Tensor, values: torch.Tensor) -> None:
        index = self._on_device(pages)
        self.pool.keys[index], self.pool.values[index] = keys, values
        self.pool.bounds[index] = torch.stack((keys.amin(2), keys.amax(2)), dim=2)

    def _read(self, first: int, last: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the pages from column `first` up to `last`: each (B, KV heads, tokens, D) in `dtype`."""
        border = min(max(self._shared_pages, first), last)
        tokens = min(last * self.pool.page_tokens, self._length) - first * self.pool.page_tokens
        read = []
        for side in ("keys", "values"):
            parts = []
            if border > first:
                shared = self._gather_pages(side, first, border)
                shared = shared.to(torch.float64 if shared.dtype == torch.float64 else torch.float32)
                parts.append(restore_(shared, self._records.read(side, slice(first, border)), self._format()))
            if border < last:
                parts.append(self._gather_pages(side, border, last))
            states = parts[0] if len(parts) == 1 else torch.cat([part.to(dtype) for part in parts], dim=2)
            read.append(states.to(dtype).flatten(2, 3)[:, :, :tokens])
        return tuple(read)

    def _gather_pages(self, side: str, first: int, last: int) -> torch.Tensor:
        return gather_pages(getattr(self.pool, side), self._table[:, first:last])

    def _make_room(self, rows: int, new: int) -> None:
        if self._length < self._shared_pages * self.pool.page_tokens:
            self._own_last_page()
        super()._make_room(rows, new)

    def _own_last_page(self) -> None:
        """Restores the newest page, which `crop` left shared and partly filled, into pages of its own."""
        last = self._table.shape[1] - 1
        keys, values = (
            torch.nn.functional.pad(x, (0, 0, 0, self.pool.page_tokens - x.shape[2]))
            for x in self._read(last, last + 1, self.dtype)
        )
        own = self.pool.allocate(len(self._table))
        self._write_whole_pages(own, keys, values)
        self.pool.release(self._table[:, last])
        self._set_table(np.concatenate((self._table[:, :last], own[:, None]), axis=1))
        self._records.drop_after(last)

    def _crop_to(self, length: int) -> None:
        if self._records is not None:
            self._records.drop_after(-(-length // self.pool.page_tokens))
        super()._crop_to(length)

    def _take_rows(self, rows: np.ndarray) -> None:
        super()._take_rows(rows)
        if self._records is not None:
            self._records.take_rows(rows)

    def _on_device(self, numbers: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(numbers.astype(np.int64)).to(self.device)


class _Records:
    """What an upper layer keeps beside shared pages: a page of bytes each, in a pool.

    Args:
        pool (`MemoryPool`): of bytes.
        rows (`int`): batch rows.
    """

    def __init__(self, pool: MemoryPool, rows: int):
        self.pool = pool
        self.table = np.empty((rows, 0), dtype=np.int32)  # (B, shared pages); never written to afterwards

    @property
    def held_bytes(self) -> int:
        return len(np.unique(self.table)) * self.pool.page_bytes

    def read(self, side: str, columns: slice) -> torch.Tensor:
        """Records (B, KV heads, columns, bytes) of `"keys"` or `"values"`."""
        return gather_pages(getattr(self.pool, side), self.table[:, columns]).flatten(3)

    def append(self, keys: torch.Tensor, values: torch.Tensor, inverse: np.ndarray) -> None:
        """Adds records (n, KV heads, bytes), of which row b takes number `inverse[b, c]` (B, columns) in column c."""
        with self.pool.lock:
            pages = self.pool.allocate(len(keys))
            index = torch.from_numpy(pages.astype(np.int64)).to(keys.device)
            for storage, records in ((self.pool.keys, keys), (self.pool.values, values)):
                storage[index] = records.unflatten(-1, (self.pool.page_tokens, -1))
            added = pages[inverse]
            self.pool.retain(added)
            self.pool.release(pages)
        self.table = np.concatenate((self.table, added), axis=1)

    def take_rows(self, rows: np.ndarray) -> None:
        moved = self.table[rows]
        self.pool.retain(moved)
        self.pool.release(self.table)
        self.table = moved

    def drop_after(self, columns: int) -> None:
        if columns < self.table.shape[1]:
            self.pool.release(self.table[:, columns:])
            self.table = self.table[:, :columns].copy()

    def copy(self) -> "_Records":
        copied = _Records(self.pool, 0)
        self.pool.retain(self.table)
        copied.table = self.table
        return copied

    def __del__(self):
        self.pool.release_later(self.table)


class _RestoringReader:
    """A layer as attention functions see it that read what pages alone do not hold."""

    def __init__(self, layer: SharingLayer):
        self.attend, self.dense, self.get_seq_length = layer.attend, layer.dense, layer.get_seq_length


def gather_pages(storage: torch.Tensor, table: np.ndarray) -> torch.Tensor:
    """Pages `table` (B, n) of a pool's storage (pool pages, KV heads, ...), copied: (B, KV heads, n, ...)."""
    heads, (rows, columns) = storage.shape[1], table.shape
    index = table[:, None, :].astype(np.int64) + np.arange(heads)[:, None] * len(storage)
    by_head = storage.transpose(0, 1).flatten(0, 1)  # of one head, one head after the other
    index = torch.from_numpy(index.reshape(-1)).to(storage.device)
    return by_head.index_select(0, index).view(rows, heads, columns, *storage.shape[2:])
