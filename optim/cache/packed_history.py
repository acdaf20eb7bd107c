"""Packed pages of a layer as attention reads them: in place where it can, unpacked piece by piece where it has to."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import torch

from ..attention.page_scores import plain_page_scores
from ..native.native_quantized import native_packed_page_scores, native_quantized_decode, supports_quantized
from .kv_quantization import PackedFormat, dequantize_keys, dequantize_values, packed_key_bounds, rotate_states
from .memory_pool import MemoryPool
from .quantized_reading import attend_piece_by_piece, attend_to_records, attend_to_states, merge_parts


# Query rows of a KV head up to which one pass over the packed bytes is faster than unpacking them for many rows.
DECODE_ROWS = 32
# Tokens that are packed or unpacked at once.
PIECE_TOKENS = 1024


@dataclass(frozen=True)
class PackedHistory:
    """The first tokens of each row of a layer, in whole pages. Good until the layer changes.

    Args:
        pool (`MemoryPool`): holds records, (pool pages, KV heads, group_size, token_bytes) uint8.
        form (`PackedFormat`): of the records.
        rotated (`bool`): whether keys were rotated before they were packed.
        table (`torch.Tensor`): (B, pages) int32, the pages of each row.
    """

    pool: MemoryPool
    form: PackedFormat
    rotated: bool
    table: torch.Tensor

    @property
    def tokens(self) -> int:
        return self.table.shape[1] * self.form.group_size

    def attend(self, query: torch.Tensor, layout, scaling: float, tail, page_map=None) -> torch.Tensor:
        """Attention (B, T, H, D) of queries that see all pages to these and to the tokens behind them.

        Args:
            query (`torch.Tensor`): (B, H, T, D).
            layout (`AttentionLayout`, *optional*): what a query may see; `None` for everything.
            scaling (`float`): factor on the scores.
            tail: keys and values (B, KV heads, n, D) of the tokens that follow, n at least 1.
            page_map (`PageMap`, *optional*): the pages that each KV head reads; it may go on behind these.
        """
        rows = query.shape[1] // self.pool.kv_heads * query.shape[2]
        if rows <= DECODE_ROWS and supports_quantized(query, *tail, self.form.value_groups):
            storages, turned = (self.pool.keys, self.pool.values), rotate_states(query) if self.rotated else None
            packed = (*storages, self.table, self.form)
            return native_quantized_decode(query, *packed, tail, layout, scaling, turned, page_map)
        if rows > DECODE_ROWS and page_map is None:
            pieces = pieces_of(0, self.tokens, self.form)
            pieces = ((begin, self.unpack(begin, end, query.dtype)) for begin, end in pieces)
            return attend_piece_by_piece(query, pieces, (self.tokens, tail), layout, scaling)
        valid = None
        if layout is not None and layout.valid is not None:
            valid = layout.valid[:, : self.tokens].unflatten(1, (-1, self.form.group_size))
        read = self._all_records(valid) if page_map is None else self._listed_records(valid, page_map.mask)
        turned = (rotate_states(query) if self.rotated else query.float()) * scaling
        parts = (attend_to_records(turned, *records, self.form, seen) for records, seen in read)
        last = attend_to_states(query, *tail, layout, scaling, self.tokens)
        return merge_parts(chain(parts, (last,)), query)

    def page_scores(self, query: torch.Tensor) -> torch.Tensor:
        """How high the keys of each page can score for `query` (B, H, T, D): (B, KV heads, pages), before scaling.

        Scale and zero of a page tell how far its keys reach in each channel, which are the bounds of Quest (Tang et
        al., arXiv 2406.10774).
        """
        turned = rotate_states(query) if self.rotated else None
        like = query[:, : self.pool.kv_heads]
        if supports_quantized(query, like, like):
            return native_packed_page_scores(query, self.pool.keys, self.table, self.form, turned)
        bounds = packed_key_bounds(self._gather(self.pool.keys, self.table), self.form)
        low, high = (bound.transpose(1, 2) for bound in bounds)
        return plain_page_scores(query if turned is None else turned, low, high)

    def unpack(self, begin: int, end: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (B, KV heads, tokens, D) of the tokens `begin` up to `end`, whole pages."""
        pages = self.table[:, begin // self.form.group_size : end // self.form.group_size]
        keys, values = (records.transpose(1, 2) for records in self._records(pages))
        keys, values = dequantize_keys(keys, self.form), dequantize_values(values, self.form)
        if self.rotated:
            keys = rotate_states(keys)
        return tuple(states.flatten(2, 3).to(dtype) for states in (keys, values))

    def _all_records(self, valid: torch.Tensor | None) -> Iterator[tuple]:
        """Records of keys and values (B, pages, KV heads, record) and which tokens are real, piece by piece."""
        for begin, end in pieces_of(0, self.tokens, self.form):
            piece = slice(begin // self.form.group_size, end // self.form.group_size)
            yield self._records(self.table[:, piece]), None if valid is None else valid[:, piece, None]

    def _listed_records(self, valid: torch.Tensor | None, flags: torch.Tensor) -> Iterator[tuple]:
        """As `_all_records`, of the pages with flags (B or 1, KV heads or 1, pages), those of each head by itself."""
        rows, pages = self.table.shape
        flags = flags[:, :, :pages].expand(rows, self.pool.kv_heads, -1)
        most = int(flags.sum(-1).max())
        order = flags.byte().sort(dim=-1, descending=True, stable=True).indices[..., :most].mT  # (B, listed, KV heads)
        row = torch.arange(rows, device=order.device)[:, None, None]
        head = torch.arange(self.pool.kv_heads, device=order.device)
        for begin, end in pieces_of(0, most * self.form.group_size, self.form):
            listed = order[:, begin // self.form.group_size : end // self.form.group_size]
            seen = flags[row, head, listed][..., None]  # heads with fewer pages read some that do not count
            if valid is not None:
                seen = seen & valid[row, listed]
            places = self.table[row, listed].long(), head
            yield [storage[places].flatten(3) for storage in (self.pool.keys, self.pool.values)], seen

    def _records(self, pages: torch.Tensor) -> list[torch.Tensor]:
        return [self._gather(storage, pages) for storage in (self.pool.keys, self.pool.values)]

    def _gather(self, storage: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
        return storage.index_select(0, pages.reshape(-1)).view(*pages.shape, self.pool.kv_heads, -1)


def pieces_of(begin: int, end: int, form: PackedFormat) -> list[tuple[int, int]]:
    """Begin and end of pieces of whole pages, `PIECE_TOKENS` or less unless a page is longer."""
    step = max(1, PIECE_TOKENS // form.group_size) * form.group_size
    return [(start, min(end, start + step)) for start in range(begin, end, step)]
