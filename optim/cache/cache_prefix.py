"""Keys and values of earlier requests, for new ones that begin alike: a second question skips picture and prefill.

Sources: PagedAttention (Kwon et al., arXiv 2309.06180, section 4.4) for shared pages, RadixAttention (Zheng et al.,
arXiv 2312.07104, section 3) for the tree of what was seen.
"""

from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from threading import RLock

import numpy as np
import torch

from ..technique_optim import Technique, refuse_unknown
from .cache_paged import PagedKVCache
from .memory_pool import MemoryPool, require_positive
from .model_fingerprint import ModelFingerprint
from .prefix_pages import PrefixedKVCache, PrefixTicket, SharedPools, StoredRow
from .prefix_request import PrefixRequest
from .prefix_tree import PrefixTree


@dataclass(frozen=True)
class PrefixStatistics:
    """What a [`PrefixCache`] did since it was made, and holds now.

    Args:
        hits, misses (`int`): requests that found a beginning, and that found none.
        tokens_reused (`int`): tokens that needed no prefill, over all rows.
        rows_held (`int`): rows of finished requests that are kept.
        bytes_held (`int`): keys, values and bounds of their pages; a page that several rows share counts once.
        rows_evicted (`int`): rows dropped for lack of room.
    """

    hits: int
    misses: int
    tokens_reused: int
    rows_held: int
    bytes_held: int
    rows_evicted: int


class PrefixCache(Technique):
    """Keeps the KV pages of finished requests, and begins new ones with the pages of their longest known prefix.

    Exact up to rounding: what was computed in another batch or step by step is used again. A prefix is text and
    pictures, known by token ids, by a hash of the pixels and by positions; it ends at any token but not inside a
    picture. Pictures in it are not encoded again, and at least one token of a prompt is always computed. Rows of a
    batch are looked up one by one and begin together where the shortest known prefix ends. Rows that are padded on
    the left otherwise than before get copies of pages; all others share them.

    `generate()` of a model that it is applied to takes a prefix, and keeps the request when it is done, if it chooses
    the cache itself: not with `past_key_values`, `use_cache=False`, `cache_implementation`, embeddings as inputs,
    assisted decoding, autocast, or a technique that drops visual tokens by the prompt. Of a beam search the prompt
    is kept. Beside another cache of a profile this one comes first, and holds keys and values in the model's
    precision; what it cannot take is left to the other. When a weight, an adapter or the attention changes, all is
    dropped (see [`ModelFingerprint`]).

    May be used without being applied, also with a loop of one's own:

        cache = prefix.match(model, **inputs)
        output = model.generate(**inputs, past_key_values=cache)  # keeps it when it is done; else prefix.store(...)

    Threads may share it. Copies and pickles are empty.

    Args:
        config: taken and not needed, as all techniques may be given the model's.
        max_bytes (`int`): of pages kept, default 1 GiB. The least recently used rows go first; of a row that is
            larger, the beginning is kept.
        page_tokens (`int`): tokens a page, default 64.
        pool_bytes (`int`, *optional*): of pages kept and of running requests together. Where it is reached, rows that
            are kept go first, and then a `MemoryError` is raised. By default the machine's memory.
    Raises:
        ValueError: for sizes below 1 or unknown settings.
    """

    name = "prefix_cache"
    exact = True
    excludes = {"compiled_decode": "a compiled graph takes caches of fixed shape, and a prefix is in pages"}

    def __init__(
        self,
        config=None,
        max_bytes: int = 2**30,
        page_tokens: int = 64,
        pool_bytes: int | None = None,
        **unknown,
    ):
        refuse_unknown(self.name, unknown, ("max_bytes", "page_tokens", "pool_bytes"))
        require_positive("max_bytes", max_bytes)
        super().__init__(max_bytes=max_bytes, page_tokens=page_tokens, pool_bytes=pool_bytes)
        self.max_bytes = max_bytes
        # One lock for the pages and for what is kept: a full pool drops rows while it holds its own.
        self.lock = RLock()
        self.pools = SharedPools(self.lock, self._evict, page_tokens, pool_bytes)
        self._tree = PrefixTree()
        self._rows: OrderedDict[StoredRow, None] = OrderedDict()  # the least recently used first
        self._holders: dict[MemoryPool, np.ndarray] = {}  # of every page, how many kept rows have it
        self._fingerprint: ModelFingerprint | None = None
        self._bytes = self._hits = self._misses = self._reused = self._evicted = 0

    def apply(self, model) -> None:
        """Puts itself in the place where `generate()` looks: `model.prefix_cache`.

        Raises:
            ValueError: if the model has another one.
        """
        if getattr(model, "prefix_cache", self) is not self:
            raise ValueError("the model has a prefix cache already; revert that one first.")
        model.prefix_cache = self

    def revert(self, model) -> None:
        """Takes itself from the model; what is kept stays until `clear()`."""
        if getattr(model, "prefix_cache", None) is self:
            del model.prefix_cache

    def match(self, model, **inputs) -> PagedKVCache:
        """A cache for a request that begins with what is known of it, to be given as `past_key_values`.

        Args:
            model: one with `generate()`.
            inputs: those of `generate()`: `input_ids` (B, T) of the whole prompt, `attention_mask`, pixels and grids.
                Give the same to `generate()`, or to `forward` without what the cache has seen.
        """
        return model.cache_from_prefix(self, **inputs)

    def start(self, model, *description) -> PagedKVCache | None:
        """As `match`, for the arguments of [`PrefixRequest.from_inputs`]; `None` where a prefix would not be exact."""
        # Under autocast keys and values are of two dtypes, for which there are no pages.
        if model.training or torch.is_autocast_enabled(model.device.type) or _plans_visual_tokens(model):
            return None
        request = PrefixRequest.from_inputs(*description)
        if request is None:
            return None
        cache = PrefixedKVCache(model.config, pool=self.pools)
        with self.lock:
            if self._fingerprint is None or not self._fingerprint.matches(model):
                self.clear()
                self._fingerprint = ModelFingerprint(model)
            self._begin(cache, request)
            cache.prefix_ticket = PrefixTicket(self, request, self._fingerprint)
        return cache

    def store(self, cache: PagedKVCache, sequences: torch.Tensor | None = None) -> None:
        """Keeps the rows of a cache that `match` gave; the cache may be used on.

        Args:
            sequences (`torch.Tensor`, *optional*): (rows, tokens) ids of the rows that the cache holds, the prompts
                and what was generated. Without, the prompts alone are kept.
        Raises:
            ValueError: if the cache is not one of `match` or was stored before, or if `sequences` begin otherwise.
        """
        ticket = vars(cache).pop("prefix_ticket", None)
        if ticket is None or ticket.prefix is not self:
            raise ValueError("the cache is not from this match(), or was stored before; match() every request anew.")
        request, ids = ticket.request, None if sequences is None else sequences.cpu().numpy()
        if ids is not None and not request.begins(ids):
            raise ValueError(
                f"sequences of shape {tuple(sequences.shape)} do not begin with the prompts {request.keys.shape[:2]} "
                "that match() was asked for; give the prompts together with what was generated."
            )
        if cache.rows % len(request.keys) or (ids is not None and cache.rows not in (0, len(ids))):
            raise ValueError(
                f"the cache holds {cache.rows} rows, which are not the {len(request.keys)} prompts, each as often as "
                "another; store it before rows are dropped."
            )
        with self.lock:
            # Another one if the model was changed meanwhile and another thread asked since.
            if ticket.fingerprint is self._fingerprint and cache.rows:
                self._store_rows(cache, request, ids)

    def clear(self) -> None:
        """Drops all that is kept. Its memory stays for later requests, as that of any pool."""
        with self.lock:
            while self._rows:
                self._drop(next(iter(self._rows)))

    def statistics(self) -> PrefixStatistics:
        with self.lock:
            return PrefixStatistics(
                self._hits, self._misses, self._reused, len(self._rows), self._bytes, self._evicted
            )

    def __reduce__(self):
        return partial(type(self), **self.settings), ()

    def _begin(self, cache: PrefixedKVCache, request: PrefixRequest) -> None:
        """Puts the longest prefix that all rows have into an empty cache."""
        found = [self._tree.longest(row) for row in request.rows()]
        reach = min(padding + known for padding, (known, _) in zip(request.padding, found, strict=True))
        length = request.before_pictures(min(reach, request.keys.shape[1] - 1))
        rows = [row for _, row in found]
        reused = sum(max(0, length - padding) for padding in request.padding)
        for row in rows:
            if reused and row is not None:
                self._rows.move_to_end(row)
        if reused and self._fill(cache, rows, request.padding, length):
            self._hits += 1
            self._reused += reused
        else:
            self._misses += 1

    def _fill(self, cache: PrefixedKVCache, rows: list, padding: list[int], length: int) -> bool:
        if all(row is not None and row.padding == own for row, own in zip(rows, padding, strict=True)):
            columns = -(-length // self.pools.page_tokens)
            for index, layer in enumerate(cache.layers):
                layer.share(rows[0].pools[index], np.stack([row.tables[index][:columns] for row in rows]), length)
            return True
        return self._copy(cache, rows, padding, length)

    def _copy(self, cache: PrefixedKVCache, rows: list, padding: list[int], length: int) -> bool:
        """Moves tokens to where the padding of this batch puts them; `False` if there is no memory for it."""
        sources = [row for row in rows if row is not None]
        for row in sources:  # the pool may drop any row to make room for the copies
            row.retain()
        try:
            for index, layer in enumerate(cache.layers):
                pool = sources[0].pools[index]
                shape = (2, len(rows), pool.kv_heads, length, pool.head_dim)
                keys, values = torch.zeros(shape, dtype=pool.dtype, device=pool.device)
                for place, (row, own) in enumerate(zip(rows, padding, strict=True)):
                    if own < length:
                        keys[place, :, own:], values[place, :, own:] = row.read(index, length - own)
                layer.update(keys, values, dense=False)
        except MemoryError:
            cache.reset()
            return False
        finally:
            for row in sources:
                row.release()
        return True

    def _store_rows(self, cache: PrefixedKVCache, request: PrefixRequest, ids: np.ndarray | None) -> None:
        prompts, length = request.keys.shape[:2]
        repeats = cache.rows // prompts
        if ids is not None:
            end = min(cache.get_seq_length(), ids.shape[1])
            for row, own in enumerate(ids):
                answer = _without_padding(own[length:end])
                self._insert(request.with_answer(row // repeats, answer), request.padding[row // repeats], cache, row)
            return
        for row, key in enumerate(request.rows()):
            key = key[: max(0, cache.get_seq_length() - request.padding[row])]
            self._insert(key, request.padding[row], cache, row * repeats)

    def _insert(self, key: np.ndarray, padding: int, cache: PrefixedKVCache, row: int) -> None:
        pools = [layer.pool for layer in cache.layers]
        page_tokens = self.pools.page_tokens
        affordable = self.max_bytes // sum(pool.page_bytes for pool in pools)
        columns = min(-(-(padding + len(key)) // page_tokens), affordable)
        key = key[: max(0, columns * page_tokens - padding)]
        known, similar = self._tree.longest(key)
        if known == len(key):
            if similar is not None:
                self._rows.move_to_end(similar)
            return
        tables = [layer.pages_of(row)[:columns].copy() for layer in cache.layers]
        if similar is not None and similar.padding == padding:
            whole = (padding + known) // page_tokens
            for table, known_pages in zip(tables, similar.tables, strict=True):
                table[:whole] = known_pages[:whole]  # the same tokens, perhaps computed twice
        stored = StoredRow(key, padding, pools, tables)
        self._hold(stored)
        replaced = self._tree.insert(key, stored)
        if replaced is not None:
            self._release(replaced)
        while self._bytes > self.max_bytes:
            self._evict()

    def _hold(self, row: StoredRow) -> None:
        row.retain()
        self._rows[row] = None
        for pool, pages in zip(row.pools, row.tables, strict=True):
            holders = self._holders.get(pool, np.zeros(0, dtype=np.int32))
            missing = int(pages.max()) + 1 - len(holders)
            if missing > 0:
                holders = np.pad(holders, (0, max(missing, len(holders))))
            self._holders[pool] = holders
            self._bytes += int((holders[pages] == 0).sum()) * pool.page_bytes
            holders[pages] += 1

    def _release(self, row: StoredRow) -> None:
        del self._rows[row]
        for pool, pages in zip(row.pools, row.tables, strict=True):
            self._holders[pool][pages] -= 1
            self._bytes -= int((self._holders[pool][pages] == 0).sum()) * pool.page_bytes
        row.release()

    def _drop(self, row: StoredRow) -> None:
        self._tree.remove(row.key)
        self._release(row)

    def _evict(self) -> bool:
        """Drops the least recently used row; `False` if there is none."""
        if not self._rows:
            return False
        self._drop(next(iter(self._rows)))
        self._evicted += 1
        return True


def _plans_visual_tokens(model) -> bool:
    """Whether a technique drops visual tokens, for which it may look at the whole prompt."""
    if getattr(model.base_model, "visual_reduction", None) is not None:
        return True
    overridden = (type(technique).plan_visual_tokens for technique in getattr(model, "active_techniques", ()))
    return any(plan is not Technique.plan_visual_tokens for plan in overridden)


def _without_padding(answer: np.ndarray) -> np.ndarray:
    """An answer (new,) without the run of equal tokens behind its first: what follows the end of a finished row."""
    if not len(answer):
        return answer
    other = np.flatnonzero(answer != answer[-1])
    return answer[: other[-1] + 2] if len(other) else answer[:1]
