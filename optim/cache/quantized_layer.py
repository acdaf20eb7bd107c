"""One layer of a quantized KV cache: packed pages, the newest tokens in full precision, and attention to both.

Sources: KIVI (Liu et al., arXiv 2402.02750) for what is grouped with what and for the window of full precision; QuaRot
(Ashkboos et al., arXiv 2404.00456) for the rotation of keys. Unlike there, packed pages lie in a `MemoryPool`, so that
beams and copies share them, and what a query reads depends on its position alone, not on how tokens came in.
"""

import weakref
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.nn import functional

from ..attention.block_map import blocks_of
from ..attention.blocks_plain import plain_blocks, plain_decode
from .cache_common import HistoryLayer, HistoryWithoutGradient, NoPickle, require_alike, require_rows, row_numbers
from .kv_quantization import (
    ROLLBACK_TOKENS,
    PackedFormat,
    QuantizedSettings,
    hadamard,
    kept_tokens,
    quantize_keys,
    quantize_values,
    rollback_window,
    rotate_states,
)
from .memory_pool import PagePools
from .packed_history import PackedHistory, pieces_of


@dataclass(frozen=True)
class _State:
    """All tokens of a layer at one moment.

    Args:
        length (`int`): tokens of each row.
        table (`np.ndarray`): (B, pages) int32, the packed ones; never written to afterwards.
        first (`int`): the first token in `newest`, a multiple of the page size and not behind the packed ones.
        newest (`torch.Tensor`, *optional*): (2, B, KV heads, places, D), keys and values of full precision; places
            behind `length - first` are free.
    """

    length: int
    table: np.ndarray
    first: int
    newest: torch.Tensor | None


_EMPTY = _State(0, np.empty((0, 0), dtype=np.int32), 0, None)


class QuantizedLayer(NoPickle, HistoryLayer):
    """Keys and values of one decoder layer, packed but for the newest tokens.

    A query at position p reads packed those of the tokens up to p that fill whole pages of `group_size`, the newest
    `residual_tokens` left out, and the others in full precision. Appending a token costs the same however long the
    history is. An update that fails changes nothing. `keys` and `values` stay `None`: use `attend` or `dense`.

    `crop` by up to `ROLLBACK_TOKENS`, and of a whole update, leaves no trace. Beyond that the tokens that come back
    from packed pages have the precision that those had.

    Args:
        settings (`QuantizedSettings`, *optional*): bits, groups, window and rotation.
        pools (`PagePools`, *optional*): where pages come from, with pages of `group_size`; by default its own.
    """

    def __init__(self, settings: QuantizedSettings | None = None, pools: PagePools | None = None):
        super().__init__()
        self.settings = QuantizedSettings() if settings is None else settings
        self.pools = PagePools(self.settings.group_size) if pools is None else pools
        self._forget()

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        heads, dim = key_states.shape[1], key_states.shape[3]
        form = PackedFormat(self.settings.bits, self.settings.group_size, dim)
        if self.settings.rotate:
            hadamard(dim, key_states.device)
        shape = (1, heads, 1, form.token_bytes)
        self.pool = self.pools.pool_for(torch.empty((), dtype=torch.uint8, device=key_states.device).expand(shape))
        self.form, self.dtype, self.device, self._shape = form, key_states.dtype, key_states.device, (heads, dim)
        self.is_initialized = True

    @torch.compiler.disable
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, dense: bool = True, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends tokens, and packs the pages that they complete.

        Args:
            key_states, value_states (`torch.Tensor`): (B, KV heads, new tokens, head_dim).
            dense (`bool`): whether to return the whole history, unpacked, or what is at hand.
        Returns:
            keys and values, (B, KV heads, tokens, head_dim): of all tokens as they were given, if the layer was
            empty; else of all tokens, or with `dense=False` of the newest, the new ones at least.
        Raises:
            ValueError: if shape, dtype or device do not fit what the layer holds, or an entry that is to be packed
                is NaN or infinite.
            MemoryError: if the pool has no pages left.
        """
        self._require_fit(key_states, value_states)
        before, new = self._state, key_states.shape[2]
        self._at_hand = None
        if new:
            self._append((key_states.detach(), value_states.detach()))
        if not before.length or (not dense and new <= ROLLBACK_TOKENS):
            return key_states, value_states
        packed = max(before.first, self.settings.quantized(before.length + 1))
        tail = [key_states, value_states]
        if new > ROLLBACK_TOKENS:  # what a later query may read packed, the first of these may not
            kept = before.newest[:, :, :, packed - before.first : before.length - before.first]
            tail = [torch.cat((old, given), 2) for old, given in zip(kept, tail, strict=True)]
            if not dense:
                self._at_hand = [weakref.ref(states) for states in tail]
                return tuple(tail)
        elif not torch.is_grad_enabled():
            return self._dense(packed)
        return self._joined(packed, before, key_states, value_states)

    @torch.compiler.disable
    def dense(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the whole history, unpacked: each (B, KV heads, tokens, head_dim)."""
        self._require_content()
        return self._dense(self._packed)

    @torch.compiler.disable
    def attend(self, query: torch.Tensor, layout, scaling: float, page_map=None) -> torch.Tensor:
        """Attention of the newest tokens to all, without unpacking more than a piece of the history.

        Args:
            query (`torch.Tensor`): (B, H, T, D).
            layout (`AttentionLayout`, *optional*): what a query may see; `None` for everything.
            scaling (`float`): factor on the scores.
            page_map (`PageMap`, *optional*): the pages of `page_tokens` that each KV head reads, all by default; what
                a query does not read packed it reads in any case.
        Returns:
            (B, T, H, D); zeros for queries that see nothing.
        Raises:
            ValueError: if the layer holds nothing.
        """
        self._require_content()
        if page_map is not None:
            self._require_pages(page_map)
        if layout is not None and layout.segments is not None:
            keys, values = self.dense()
            if page_map is not None:
                return plain_decode(query, keys, values, layout, scaling, page_map)
            return plain_blocks(query, keys, values, layout, scaling)
        tail = [None if states is None else states() for states in self._at_hand or ()]
        if tail and all(states is not None for states in tail):
            packed = self._state.length - tail[0].shape[2]
            return self._history(packed).attend(query, layout, scaling, tail, page_map)
        if layout is None:
            newest = self._newest_from(self._packed)
            return self._history(self._packed).attend(query, None, scaling, newest, page_map)
        parts = []
        for start, stop, packed in self._runs(layout.query_offset, query.shape[2]):
            own = replace(layout, query_offset=layout.query_offset + start)
            part, newest = query[:, :, start:stop], self._newest_from(packed)
            parts.append(self._history(packed).attend(part, own, scaling, newest, page_map))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    @property
    def page_tokens(self) -> int:
        """Tokens in a page."""
        return self.settings.group_size

    @torch.compiler.disable
    def page_scores(self, query: torch.Tensor) -> torch.Tensor:
        """How high the keys of each page can score for `query` (B, H, T, D): (B, KV heads, pages), before scaling.

        Pages that are not packed get 0.
        Raises:
            ValueError: if the layer holds nothing.
        """
        self._require_content()
        scores = self._history(self._packed).page_scores(query)
        return functional.pad(scores, (0, blocks_of(self._state.length, self.page_tokens) - scores.shape[-1]))

    def tokens_in_full(self, seen: int) -> int:
        """The latest of `seen` tokens that the last of them does not read packed."""
        return seen - self._read_packed(seen)

    def get_seq_length(self) -> int:
        return self._state.length

    @property
    def held_bytes(self) -> int:
        """Bytes of codes, scales and zeros, each page counted once, and of the window of full precision."""
        if not self._state.length:
            return 0
        windows = {id(x.newest): x.newest.nbytes for x in (self._state, self._before) if x is not None and x.length}
        return len(np.unique(self._state.table)) * self.pool.page_bytes + sum(windows.values())

    def _crop_to(self, length: int) -> None:
        state = self._state
        packed = min(self._packed, self.settings.quantized(length))
        table = state.table[:, : packed // self.settings.group_size].copy()
        if self._before is not None and self._before.length == length:
            kept = self._before
        elif state.first <= packed:
            kept = _State(length, table, state.first, state.newest)
        else:
            unpacked = torch.stack(self._history(self._packed).unpack(packed, state.first, self.dtype))
            known = torch.cat((unpacked, state.newest[:, :, :, : max(0, length - state.first)]), 3)
            kept = _State(length, table, packed, self._window(known[:, :, :, : length - packed]))
        self.pool.release(state.table[:, kept.table.shape[1] :])
        self._set(kept)

    def reset(self) -> None:
        """Drops everything and gives the pages back to the pool."""
        if self.pool is not None:
            self.pool.release(self._state.table)
        self._forget()

    def replace(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Drops all and holds these tokens of as many rows instead; raises as `update`, with nothing changed."""
        self._require_fit(key_states, value_states)
        state, before = self._state, self._before
        self._set(_EMPTY)
        try:
            self.update(key_states, value_states, dense=False)
        except BaseException:
            self._set(state, before)
            raise
        if state.length:
            self.pool.release(state.table)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the rows `indices` (rows,), as numbers or flags; a row may occur several times.

        Raises:
            IndexError: for a row that does not exist; nothing changes then.
        """
        if self._state.length:
            self._take_rows(row_numbers(indices, self._state.newest.shape[1]))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row; the repetitions share its pages."""
        if self._state.length:
            self._take_rows(np.arange(self._state.newest.shape[1]).repeat(repeats))

    def __deepcopy__(self, memo):
        copied = memo[id(self)] = type(self)(self.settings, self.pools)
        if self.is_initialized:
            copied.pool, copied.form, copied._shape = self.pool, self.form, self._shape
            copied.dtype, copied.device, copied.is_initialized = self.dtype, self.device, True
        if self._state.length:
            newest = self._state.newest.clone()
            self.pool.retain(self._state.table)
            copied._set(replace(self._state, newest=newest))
        return copied

    def __del__(self):
        pool = getattr(self, "pool", None)
        if pool is not None:
            pool.release_later(self._state.table)

    def _forget(self) -> None:
        self.pool, self.is_initialized = None, False
        self._set(_EMPTY)

    def _set(self, state: _State, before: _State | None = None) -> None:
        """`before` is what a crop of the whole last update restores; its pages are among those of `state`."""
        self._state, self._before = state, before
        self._table = None
        self._at_hand = None

    @property
    def _packed(self) -> int:
        """Tokens in packed pages, some of which may be among the newest too."""
        return self._state.table.shape[1] * self.settings.group_size

    def _require_pages(self, page_map) -> None:
        if page_map.page_tokens != self.page_tokens:
            raise ValueError(
                f"a page map of {page_map.page_tokens} tokens a page does not fit a cache of {self.page_tokens}; make "
                "both of the same page size."
            )
        rows, (heads, dim) = self._state.newest.shape[1], self._shape
        page_map.check(self._state.newest.new_empty(()).expand(rows, heads, self._state.length, dim))

    def _require_fit(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        require_alike(keys, values)
        if not keys.is_floating_point():
            raise ValueError(f"keys and values must be floating point to be quantized, got {keys.dtype}.")
        if not self._state.length:
            self.lazy_initialization(keys, values)
            return
        rows, (heads, dim) = self._state.newest.shape[1], self._shape
        if (keys.shape[1], keys.shape[3], keys.dtype, keys.device) != (heads, dim, self.dtype, self.device):
            raise ValueError(
                f"the cache holds {heads} KV heads of {dim} in {self.dtype} on {self.device} but the keys have "
                f"{keys.shape[1]} of {keys.shape[3]} in {keys.dtype} on {keys.device}; make a cache for this model."
            )
        require_rows(keys.shape[0], rows)

    def _append(self, states: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Keys and values (B, KV heads, new, D) behind the history, or an error with nothing changed."""
        state, new = self._state, states[0].shape[2]
        length = state.length + new
        packed = max(self._packed, self.settings.quantized(length))
        fresh = self._pack(state, states, packed)
        try:
            first, newest = self._extended(state, states, packed)
        except BaseException:
            self.pool.release(fresh)
            raise
        undo = state if new > ROLLBACK_TOKENS and state.length else None
        if fresh.size or not state.length:
            table = np.concatenate((state.table, fresh), 1) if state.table.size else fresh
            self._set(_State(length, table, first, newest), undo)
        else:  # the usual step
            self._state, self._before = _State(length, state.table, first, newest), undo

    def _pack(self, state: _State, states: tuple[torch.Tensor, torch.Tensor], packed: int) -> np.ndarray:
        """Packs tokens up to `packed` into new pages, (B, pages)."""
        group, rows = self.settings.group_size, len(states[0])
        start = state.table.shape[1] * group
        if packed == start:
            return np.empty((rows, 0), dtype=np.int32)
        pages = self.pool.allocate(rows * (packed - start) // group).reshape(rows, -1)
        try:
            for begin, end in pieces_of(start, packed, self.form):
                index = pages[:, (begin - start) // group : (end - start) // group].reshape(-1)
                self._write(torch.from_numpy(index).long().to(self.device), _between(state, states, begin, end))
        except BaseException:
            self.pool.release(pages)
            raise
        return pages

    def _write(self, pages: torch.Tensor, states: torch.Tensor) -> None:
        """Packs (2, B, KV heads, tokens, D) into `pages` (B * tokens / group_size,)."""
        keys, values = states.unflatten(3, (-1, self.settings.group_size))  # (B, KV heads, pages, tokens, D)
        if self.settings.rotate:
            keys = rotate_states(keys)
        records = quantize_keys(keys, self.form), quantize_values(values, self.form)
        with self.pool.lock:  # a pool that has to grow by copying must not miss a write
            for storage, packed in zip((self.pool.keys, self.pool.values), records, strict=True):
                storage.index_copy_(0, pages, packed.transpose(1, 2).reshape(len(pages), *storage.shape[1:]))

    def _extended(self, state: _State, states, packed: int) -> tuple[int, torch.Tensor]:
        """The window with the new tokens in it, and its first token."""
        length = state.length + states[0].shape[2]
        places = kept_tokens(self.settings.group_size, self.settings.residual_tokens)
        if state.length and length - state.first <= places:
            for kept, new in zip(state.newest, states, strict=True):
                kept[:, :, state.length - state.first : length - state.first] = new
            return state.first, state.newest
        first = max(state.first, packed - rollback_window(self.settings.group_size))
        return first, self._window(_between(state, states, first, length))

    def _window(self, states: torch.Tensor) -> torch.Tensor:
        """A new window that begins with `states` (2, B, KV heads, tokens, D)."""
        places = kept_tokens(self.settings.group_size, self.settings.residual_tokens)
        # A tensor made in inference mode could not be written to outside of it.
        with torch.inference_mode(False), torch.no_grad():
            try:
                shape = (*states.shape[:3], places, states.shape[4])
                window = torch.empty(shape, dtype=self.dtype, device=self.device)
            except RuntimeError:  # so torch reports a lack of memory
                raise MemoryError(
                    f"no memory for {places} tokens of full precision on {self.device}; use a smaller batch."
                ) from None
            window[:, :, :, : states.shape[3]] = states
        return window

    def _newest_from(self, packed: int) -> list[torch.Tensor]:
        """Keys and values (B, KV heads, tokens, D) of the tokens from `packed` on."""
        state = self._state
        return list(state.newest[:, :, :, packed - state.first : state.length - state.first])

    def _runs(self, offset: int, queries: int) -> list[tuple[int, int, int]]:
        """Neighbouring queries that read the same tokens packed: first, end, and how many tokens those are."""
        runs, start = [], 0
        while start < queries:
            packed = self._read_packed(offset + start + 1)
            grows = packed + self.page_tokens + self.settings.residual_tokens - offset - 1
            stop = queries if packed == self._packed else min(queries, grows)
            runs.append((start, stop, packed))
            start = stop
        return runs

    def _read_packed(self, seen: int) -> int:
        """How many of `seen` tokens the last of them reads packed."""
        return min(max(self.settings.quantized(seen), self._state.first), self._packed)

    def _history(self, packed: int) -> PackedHistory:
        """The first `packed` tokens."""
        if self._table is None:
            self._table = torch.from_numpy(self._state.table).to(self.device)
        return PackedHistory(self.pool, self.form, self.settings.rotate, self._table[:, : packed // self.page_tokens])

    def _dense(self, packed: int, tail=None) -> tuple[torch.Tensor, torch.Tensor]:
        """The whole history, of which the first `packed` tokens are unpacked and `tail` is the rest."""
        tail = self._newest_from(packed) if tail is None else tail
        shape = (tail[0].shape[0], self._shape[0], packed + tail[0].shape[2], self._shape[1])
        out = [torch.empty(shape, dtype=self.dtype, device=self.device) for _ in tail]
        history = self._history(packed)
        for begin, end in pieces_of(0, packed, self.form):
            for whole, part in zip(out, history.unpack(begin, end, self.dtype), strict=True):
                whole[:, :, begin:end] = part
        for whole, part in zip(out, tail, strict=True):
            whole[:, :, packed:] = part
        return tuple(out)

    def _joined(self, packed: int, before: _State, keys, values) -> tuple[torch.Tensor, torch.Tensor]:
        """The history as the new tokens see it, and they themselves with their gradients."""
        kept = before.newest[:, :, :, packed - before.first : before.length - before.first]
        history = self._dense(packed, [x.detach() for x in kept])
        if torch.is_grad_enabled() and (keys.requires_grad or values.requires_grad):
            history = [
                HistoryWithoutGradient.apply(old, new) for old, new in zip(history, (keys, values), strict=True)
            ]
        return tuple(torch.cat(states, 2) for states in zip(history, (keys, values), strict=True))

    def _take_rows(self, rows: np.ndarray) -> None:
        state = self._state
        if np.array_equal(rows, np.arange(state.newest.shape[1])):
            return
        newest = state.newest.index_select(1, torch.from_numpy(rows).to(self.device))
        table = state.table[rows]
        self.pool.retain(table)
        self.pool.release(state.table)
        self._set(replace(state, table=table, newest=newest))


def _between(state: _State, states: tuple[torch.Tensor, torch.Tensor], begin: int, end: int) -> torch.Tensor:
    """Tokens `begin` up to `end`, (2, B, KV heads, tokens, D), of those that `state` keeps and the new behind them."""
    old = state.length
    new = torch.stack([x[:, :, max(0, begin - old) : max(0, end - old)] for x in states])
    if begin >= old:
        return new
    kept = state.newest[:, :, :, begin - state.first : min(end, old) - state.first]
    return kept if end <= old else torch.cat((kept, new), 3)
