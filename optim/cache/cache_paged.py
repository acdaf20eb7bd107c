"""A KV cache in pages: appending a token costs the same however long the history is, and copies share their past.

Source: PagedAttention (Kwon et al., arXiv 2309.06180), sections 4.2 to 4.4, with the page bounds of Quest (Tang et
al., arXiv 2406.10774). Here a layer's batch rows all have the same length, as `transformers` pads them.
"""

from functools import partial

import numpy as np
import torch

from ..attention.page_scores import page_scores, pooled_page_scores
from ..technique_optim import refuse_unknown
from .cache_common import (
    CacheTechnique,
    CroppingCache,
    HistoryLayer,
    HistoryWithoutGradient,
    NoPickle,
    count_full_attention,
    require_alike,
    require_rows,
    row_numbers,
)
from .memory_pool import MemoryPool, PageBlock, PagePools, PageView, page_blocks, page_runs, require_positive


class PagedLayer(NoPickle, HistoryLayer):
    """Keys and values of one decoder layer in pages of a pool.

    Rows that were repeated or reordered share pages, and a page that is shared is copied when a row appends to it. An
    update that fails changes nothing. `keys` and `values` stay `None`: use `page_view` or `dense`.

    Args:
        pools (`MemoryPool` or `PagePools`, *optional*): where pages come from; by default pools of its own.
        max_tokens (`int`, *optional*): the most tokens that a row may hold.
    """

    def __init__(self, pools: MemoryPool | PagePools | None = None, max_tokens: int | None = None):
        super().__init__()
        self.pools = PagePools() if pools is None else pools
        self.max_tokens = max_tokens
        self._forget()

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.pool = self.pools.pool_for(key_states)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    # Tables, locks and reference counts are nothing to trace; the graph breaks here.
    @torch.compiler.disable
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, dense: bool = True, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends tokens in place.

        Args:
            key_states, value_states (`torch.Tensor`): (B, KV heads, new tokens, head_dim).
            dense (`bool`): whether to return the whole history, which is gathered from the pages, or what was given.
        Returns:
            keys and values, (B, KV heads, tokens, head_dim), of all tokens or, with `dense=False`, of the new ones.
        Raises:
            ValueError: if shape, dtype or device do not fit what the layer holds, or `max_tokens` would be exceeded.
            MemoryError: if the pool has no pages left.
        """
        self._require_fit(key_states, value_states)
        seen, new = self._length, key_states.shape[2]
        if new:
            keys, values = key_states, value_states
            if keys.requires_grad or values.requires_grad:
                keys, values = keys.detach(), values.detach()
            with self.pool.lock:  # a pool that has to grow by copying must not miss a write
                self._append(keys, values)
        if not dense or not seen:
            return key_states, value_states
        keys, values = self.dense()
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            keys = HistoryWithoutGradient.apply(keys, key_states)
            values = HistoryWithoutGradient.apply(values, value_states)
        return keys, values

    @torch.compiler.disable
    def dense(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the whole history, gathered: each (B, KV heads, tokens, head_dim)."""
        self._require_content()
        shape = (self.pool.page_tokens, self.pool.head_dim)
        gathered = (self._gather(storage, shape).flatten(2, 3) for storage in (self.pool.keys, self.pool.values))
        return tuple(states[:, :, : self._length] for states in gathered)

    @property
    def page_tokens(self) -> int:
        """Tokens in a page."""
        return self.pool.page_tokens

    @torch.compiler.disable
    def page_view(self) -> PageView:
        """Where the history lies; see [`PageView`].

        Raises:
            ValueError: if the layer holds nothing.
        """
        self._require_content()
        if self._device_table is None:
            self._device_table = torch.from_numpy(self._table).to(self.device)
        return PageView(self.pool.keys, self.pool.values, self._device_table, self._length, self.pool.page_tokens)

    @torch.compiler.disable
    def key_bounds(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The smallest and the largest key of each channel in every page, each (B, KV heads, pages, head_dim).

        The last page counts with its real tokens alone.
        Raises:
            ValueError: if the layer holds nothing.
        """
        self._require_content()
        bounds = self._gather(self.pool.bounds, (2, self.pool.head_dim))  # (B, KV heads, pages, 2, D)
        if self._bounds_stale:
            for block in self._tail_blocks(self._table.shape[1] - 1):
                newest = block.own(bounds)[:, :, -1]
                newest[:, :, 0], newest[:, :, 1] = block.key_bounds(self._length % self.pool.page_tokens)
        return bounds[..., 0, :], bounds[..., 1, :]

    @torch.compiler.disable
    def page_scores(self, query: torch.Tensor) -> torch.Tensor:
        """How high the keys of each page can score for `query` (B, H, T, D): (B, KV heads, pages), before scaling.

        Raises:
            ValueError: if the layer holds nothing.
        """
        scores = None
        if not self._bounds_stale:
            scores = pooled_page_scores(query, self.pool.bounds, self.page_view().table)
        return page_scores(query, *self.key_bounds()) if scores is None else scores

    @property
    def held_bytes(self) -> int:
        """Bytes of its pages; one that several rows share counts once."""
        return len(np.unique(self._table)) * self.pool.page_bytes if self._length else 0

    def get_seq_length(self) -> int:
        return self._length

    def get_max_length(self) -> int:
        return -1 if self.max_tokens is None else self.max_tokens

    def reset(self) -> None:
        """Drops everything and gives the pages back to the pool."""
        if self.pool is not None:
            self.pool.release(self._table)
        self._forget()

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the rows `indices` (rows,), as numbers or flags; a row may occur several times.

        Raises:
            IndexError: for a row that does not exist; nothing changes then.
        """
        if self._length:
            self._take_rows(row_numbers(indices, len(self._table)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row; the repetitions share its pages."""
        if self._length:
            self._take_rows(np.arange(len(self._table)).repeat(repeats))

    def __deepcopy__(self, memo):
        copied = memo[id(self)] = type(self)(self.pools, self.max_tokens)
        copied.pool, copied.is_initialized = self.pool, self.is_initialized
        if self.is_initialized:
            copied.dtype, copied.device = self.dtype, self.device
            self.pool.retain(self._table)
        copied._table, copied._length, copied._bounds_stale = self._table, self._length, self._bounds_stale
        return copied

    def __del__(self):
        pool = getattr(self, "pool", None)
        if pool is not None:
            pool.release_later(self._table)

    def _forget(self) -> None:
        self.pool, self.is_initialized, self._length = None, False, 0
        # Of the newest page's bounds: after `crop` they may cover tokens that are gone.
        self._bounds_stale = False
        self._set_table(np.empty((0, 0), dtype=np.int32))

    def _set_table(self, table: np.ndarray) -> None:
        """(B, pages) page numbers; never written to afterwards, since views and copies share it."""
        self._table = table
        self._device_table = self._gather_index = self._blocks = None

    def _require_fit(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        require_alike(keys, values)
        rows, heads, new, dim = keys.shape
        if self.max_tokens is not None and self._length + new > self.max_tokens:
            raise ValueError(
                f"max_tokens={self.max_tokens} but the cache holds {self._length} tokens a row and {new} more came; "
                "make the cache with a larger max_tokens, or None for no limit."
            )
        if not self._length:
            self.lazy_initialization(keys, values)
        pool = self.pool
        fits = heads == pool.kv_heads and dim == pool.head_dim and keys.dtype == pool.dtype
        if not fits or keys.device != pool.device:
            pool.pool_for(keys)  # raises, and says what differs
        if self._length:
            require_rows(rows, len(self._table))

    def _append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self._make_room(keys.shape[0], keys.shape[2])
        try:
            self._write(keys, values)
        except BaseException:
            self._crop_to(self._length)
            raise
        self._length += keys.shape[2]

    def _crop_to(self, length: int) -> None:
        self._length = length
        pages = -(-length // self.pool.page_tokens)
        if pages < self._table.shape[1]:
            self.pool.release(self._table[:, pages:])
            self._set_table(self._table[:, :pages].copy())
        # Put right at the next append, as the page may be shared with somebody who still has the dropped tokens.
        self._bounds_stale = length % self.pool.page_tokens != 0

    def _make_room(self, rows: int, new: int) -> None:
        """Gives every row pages of its own for `new` tokens, or raises with nothing changed."""
        table = self._table if self._length else np.empty((rows, 0), dtype=np.int32)
        columns = -(-(self._length + new) // self.pool.page_tokens) - table.shape[1]
        sharing = self._rows_to_copy() if self._length % self.pool.page_tokens else []
        if not columns and not sharing:
            return
        fresh = self.pool.allocate(rows * columns + len(sharing))
        copies, added = fresh[: len(sharing)], fresh[len(sharing) :].reshape(rows, columns)
        if sharing:
            shared = table[sharing, -1]
            self.pool.copy_pages(shared, copies)
            table = table.copy()
            table[sharing, -1] = copies
            self.pool.release(shared)
        self._set_table(np.concatenate((table, added), axis=1))

    def _rows_to_copy(self) -> list[int]:
        """Rows whose newest page others hold too; the last of the holders may go on in it."""
        tail = self._table[:, -1]
        holders = self.pool.references(tail)
        if holders.max(initial=1) == 1:
            return []
        left, rows = dict(zip(tail.tolist(), holders.tolist(), strict=True)), []
        for row, page in enumerate(tail.tolist()):
            left[page] -= 1
            if left[page]:
                rows.append(row)
        return rows

    def _write(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Writes (B, KV heads, new, D) behind the history, for which there is room."""
        page_tokens, new = self.pool.page_tokens, keys.shape[2]
        column, filled = divmod(self._length, page_tokens)
        if filled + new <= page_tokens:  # the usual step, without the slices
            self._write_tail(column, filled, keys, values)
            return
        done = 0
        if filled:
            done = min(new, page_tokens - filled)
            self._write_tail(column, filled, keys[:, :, :done], values[:, :, :done])
            column += 1
        whole, rest = divmod(new - done, page_tokens)
        if whole:
            end = done + whole * page_tokens
            self._write_pages(column, keys[:, :, done:end], values[:, :, done:end])
        if rest:
            self._write_tail(column + whole, 0, keys[:, :, -rest:], values[:, :, -rest:])

    def _write_tail(self, column: int, filled: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        for block in self._tail_blocks(column):
            if self._bounds_stale:
                block.measure(filled)
            block.write(filled, block.own(keys), block.own(values))
        self._bounds_stale = False

    def _write_pages(self, column: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Whole pages from `column` on; one copy for each run of pages that lie one behind the other."""
        pool = self.pool
        keys, values = (x.unflatten(2, (-1, pool.page_tokens)) for x in (keys, values))  # (B, heads, pages, tokens, D)
        for row, pages in enumerate(self._table[:, column : column + keys.shape[2]]):
            for start, stop in page_runs(pages):
                target = slice(int(pages[start]), int(pages[stop - 1]) + 1)
                pool.keys[target].copy_(keys[row, :, start:stop].transpose(0, 1))
                pool.values[target].copy_(values[row, :, start:stop].transpose(0, 1))
                PageBlock(pool, None, target).measure(pool.page_tokens)

    def _tail_blocks(self, column: int) -> list[PageBlock]:
        """Views of one column of pages, remembered for the newest, as they cost more to make than to write to."""
        if self._blocks is not None and self._blocks[0] == column and self._blocks[1] is self.pool.keys:
            return self._blocks[2]
        blocks = page_blocks(self.pool, self._table[:, column])
        if column == self._table.shape[1] - 1:
            self._blocks = (column, self.pool.keys, blocks)
        return blocks

    def _gather(self, storage: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
        """(B, KV heads, pages, *shape) of a storage (pool pages, KV heads, *shape)."""
        heads, (rows, columns), capacity = self.pool.kv_heads, self._table.shape, len(storage)
        if self._gather_index is None or self._gather_index[0] != capacity:
            index = self._table[:, None, :] + np.arange(heads, dtype=np.int32)[:, None] * capacity
            self._gather_index = capacity, torch.from_numpy(index.reshape(-1)).to(self.device)
        pages = storage.transpose(0, 1).view(-1, *shape)  # of one head, one head after the other
        return pages.index_select(0, self._gather_index[1]).view(rows, heads, columns, *shape)

    def _take_rows(self, rows: np.ndarray) -> None:
        old, new = self._table, self._table[rows]
        moved = slice(None)
        if old.shape == new.shape:
            moved = (old != new).any(0)
            if not moved.any():
                return
        self.pool.retain(new[:, moved])
        self.pool.release(old[:, moved])
        self._set_table(new)


class PagedKVCache(CroppingCache):
    """A cache of [`PagedLayer`]s: give it as `past_key_values=`.

    Exact, and the same tokens as `DynamicCache`. Appending never copies the history, beams and copies share pages
    until they differ, and what is dropped goes back to the pool. An attention function that reads pages in place (see
    [`PageView`]) never builds the dense history; for any other it is gathered at each update, as dear as the
    concatenation of `DynamicCache`. Croppable; not compileable. `copy.deepcopy` shares pages; pickling is refused.
    Gradients do not flow through the history: `backward` raises.

    Args:
        config (`PreTrainedConfig`, *optional*): of the model; by default layers are made as they come up.
        page_tokens (`int`): tokens a page, default 64; without meaning if a pool is given.
        max_tokens (`int`, *optional*): the most tokens that a row may hold; by default there is no limit.
        pool (`MemoryPool` or `PagePools`, *optional*): shared with other requests; by default the cache's own.
    Raises:
        ValueError: for sizes below 1, or a model with layers that are not full attention.
    """

    def __init__(
        self,
        config=None,
        page_tokens: int = 64,
        max_tokens: int | None = None,
        pool: MemoryPool | PagePools | None = None,
    ):
        if max_tokens is not None:
            require_positive("max_tokens", max_tokens)
        self.pools = PagePools(page_tokens) if pool is None else pool
        self.max_tokens = max_tokens
        if config is None:
            super().__init__(layer_class_to_replicate=partial(PagedLayer, self.pools, max_tokens))
            return
        count = count_full_attention(config, type(self).__name__)
        super().__init__(layers=[PagedLayer(self.pools, max_tokens) for _ in range(count)])


class PagedCache(CacheTechnique):
    """Every request of `generate()` gets a [`PagedKVCache`]. Exact.

    Args:
        config: taken and not needed, as all techniques may be given the model's.
        page_tokens (`int`): tokens a page, default 64.
        max_bytes (`int`, *optional*): requests share a pool of this size, and one that no longer fits raises a
            `MemoryError`; by default each request has a pool of its own, limited by the machine.
    Raises:
        ValueError: for sizes below 1 or unknown settings.
    """

    name = "paged_cache"
    exact = True

    def __init__(self, config=None, page_tokens: int = 64, max_bytes: int | None = None, **unknown):
        refuse_unknown(self.name, unknown, ("page_tokens", "max_bytes"))
        super().__init__(page_tokens=page_tokens, max_bytes=max_bytes)
        self._shared = PagePools(page_tokens, max_bytes)

    def make_cache(self, model, batch_size: int, max_length: int) -> PagedKVCache:
        # Not limited to `max_length`: the caller may go on with the cache that `generate()` returns.
        pool = None if self.settings["max_bytes"] is None else self._shared
        return PagedKVCache(model.config, self.settings["page_tokens"], pool=pool)
