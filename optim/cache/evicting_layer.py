"""One layer of a KV cache that lets go of entries: a policy says which, and another layer stores what stays."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from transformers.cache_utils import CacheLayerMixin

from .cache_common import HistoryWithoutGradient, require_rows
from .cache_paged import PagedLayer
from .eviction_budget import EvictionSettings, RowBudget, TokenCounts, TokenNotes, choose_entries, packed_order
from .eviction_merging import merge_evicted
from .eviction_policies import Entries, Policy, attention_sums, latest_queries


# Queries whose attention is still to be counted, at most, before a policy that counts all of it does so.
PENDING_QUERIES = 32


BY_ROW = ("selected", "sums", "queries", "query_positions")


@dataclass(frozen=True)
class Holding:
    """What a layer holds at one moment; an update makes a new one, so that the old one undoes it.

    Args:
        store: the layer with keys and values of the entries: of `selected`, then of every token from `since` on.
        rows, length (`int`): batch rows, and tokens seen.
        selected (`torch.Tensor`, *optional*): (B, KV heads, entries) int32, the token of each entry that stayed when
            some were evicted last, −1 for gaps, which come first.
        gaps (`tuple[int, ...]`): the gaps of each row.
        since (`int`): tokens seen when some were evicted last.
        sums (`torch.Tensor`, *optional*): (B, KV heads, entries), attention counted so far.
        queries (`torch.Tensor`, *optional*): (B, H, queries, D), those that a policy still needs.
        query_positions (`torch.Tensor`, *optional*): (B, queries), −1 for none.
        check_at (`int`): the length at which the limits have to be looked at again.
    """

    store: CacheLayerMixin
    rows: int = 0
    length: int = 0
    selected: torch.Tensor | None = None
    gaps: tuple[int, ...] = ()
    since: int = 0
    sums: torch.Tensor | None = None
    queries: torch.Tensor | None = None
    query_positions: torch.Tensor | None = None
    check_at: int = 0

    @property
    def evicted(self) -> bool:
        return self.selected is not None

    @property
    def entries(self) -> int:
        """Entries of each row and KV head, gaps among them."""
        return self.length - self.since + (self.selected.shape[2] if self.evicted else 0)

    @property
    def can_judge(self) -> bool:
        """Whether there is any attention to judge entries by."""
        return self.queries is not None or self.sums is not None

    @property
    def notes_bytes(self) -> int:
        return sum(getattr(self, name).nbytes for name in BY_ROW if getattr(self, name) is not None)

    def take_rows(self, rows: list[int], device) -> "Holding":
        index = torch.tensor(rows, dtype=torch.long, device=device)
        named = {name: getattr(self, name) for name in BY_ROW}
        moved = {name: None if states is None else states.index_select(0, index) for name, states in named.items()}
        gaps = tuple(self.gaps[row] for row in rows) if self.gaps else ()
        return replace(self, **moved, gaps=gaps, rows=len(rows))


class EvictingLayer(CacheLayerMixin):
    """Keys and values of one decoder layer, of which a policy evicts some.

    `get_seq_length` counts the tokens seen, as positions and masks of the model do; the layer holds fewer, and
    `get_mask_sizes` speaks of those. A forward of several tokens attends to everything and the choice follows at
    once; single tokens are appended in place and the choice follows when `slack_tokens` are too many, at
    [`make_room`](EvictingLayer.make_room). An update that fails changes nothing.

    Args:
        policy (`Policy`): how entries are chosen.
        settings (`EvictionSettings`): how many.
        make_store (`Callable`): returns an empty layer that holds all it is given, such as [`PagedLayer`].
        notes (`TokenNotes`): which tokens are padding and which are of which picture.
        layer, layers (`int`): number of this layer, and how many there are.
    """

    is_compileable = False
    is_croppable = False
    is_sliding = False

    def __init__(
        self,
        policy: Policy,
        settings: EvictionSettings,
        make_store: Callable[[], CacheLayerMixin] = PagedLayer,
        notes: TokenNotes | None = None,
        layer: int = 0,
        layers: int = 1,
    ):
        super().__init__()
        self.policy, self.settings, self.make_store = policy, settings, make_store
        self.notes = TokenNotes() if notes is None else notes
        self.layer, self.factor = layer, policy.layer_factor(layer, layers)
        self._holding, self._before = Holding(make_store()), None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self._form = (key_states.shape[1], key_states.shape[-1], key_states.dtype)
        self.is_initialized = True

    @property
    def wants_queries(self) -> bool:
        """Whether `update` has to be given `query_states`."""
        return self.policy.wants_queries

    @property
    def reader(self):
        """What an attention function reads in place of dense keys and values: it knows entries, not tokens."""
        return self._holding.store.reader

    @property
    def entries(self) -> int:
        """Entries held by each row and KV head, gaps among them."""
        return self._holding.entries

    @property
    def evicted(self) -> bool:
        """Whether entries were ever evicted, so that the layer holds fewer than it has seen."""
        return self._holding.evicted

    @property
    def rows(self) -> int:
        """Batch rows; 0 as long as the layer is empty."""
        return self._holding.rows

    @property
    def kept_positions(self) -> torch.Tensor:
        """(B, KV heads, entries): how many tokens stand before each entry in the conversation; −1 for gaps."""
        held = self._holding
        tail = torch.arange(held.since, held.length, device=getattr(self, "device", None))
        if not held.evicted:
            return tail.expand(held.rows, 1, -1)
        selected = held.selected.long()
        return torch.cat((selected, tail.expand(*selected.shape[:2], -1)), dim=2)

    @property
    def held_bytes(self) -> int:
        """Bytes of the entries, of their positions and of what the policy notes."""
        return self._holding.store.held_bytes + self._holding.notes_bytes

    def get_seq_length(self) -> int:
        return self._holding.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.entries + query_length, 0

    def get_max_length(self) -> int:
        return -1

    @property
    def layout(self) -> tuple:
        """Layers with the same one may share a mask."""
        return self.entries, self._holding.since, self._holding.gaps

    def by_entry(self, by_token: torch.Tensor | None, new_tokens: int, gap=False) -> torch.Tensor | None:
        """What belongs to each token (B, tokens seen + new) for each entry and new token (B, entries + new).

        For real tokens of masks, that does not depend on the KV head. `None` stands for true everywhere.
        """
        held = self._holding
        if not held.evicted:
            return by_token
        if by_token is None:
            if not any(held.gaps):
                return None
            by_token = held.selected.new_ones(held.rows, held.length + new_tokens, dtype=torch.bool)
        own = held.selected[:, 0].long()
        kept = by_token.gather(1, own.clamp(min=0)).masked_fill(own < 0, gap)
        return torch.cat((kept, by_token[:, held.since : held.length + new_tokens]), dim=1)

    @torch.compiler.disable
    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        *args,
        dense: bool = True,
        query_states: torch.Tensor | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds tokens, and evicts if there are several and they are too many.

        Args:
            key_states, value_states (`torch.Tensor`): (B, KV heads, new tokens, head_dim).
            dense (`bool`): whether to return all that these tokens attend to, or at least the new ones.
            query_states (`torch.Tensor`): (B, H, new tokens, head_dim), rotated; needed if `wants_queries`.
        Returns:
            keys and values (B, KV heads, entries before + new tokens, head_dim); with `dense=False` the new ones
            where `reader` holds all of them.
        Raises:
            ValueError: if a tensor does not fit, queries are missing, or keys that are to be judged hold NaN.
            MemoryError: if the store has no room.
        """
        self._require_fit(key_states, value_states, query_states)
        before = self._holding
        try:
            with torch.no_grad():
                found = self._extend(key_states, value_states, dense, query_states)
        except BaseException:
            self._restore(before)
            raise
        self._before = before
        if found is None:
            return key_states, value_states
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            return tuple(
                states if states is new else HistoryWithoutGradient.apply(states, new)
                for states, new in zip(found, (key_states, value_states), strict=True)
            )
        return found

    def adopt(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Takes over all tokens (B, KV heads, tokens, D) of another cache, unjudged, into an empty layer."""
        self.lazy_initialization(keys, values)
        self._holding.store.update(keys.detach(), values.detach(), dense=False)
        self._holding = replace(self._holding, rows=len(keys), length=keys.shape[2])

    def dense(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the entries: each (B, KV heads, entries, head_dim)."""
        return self._holding.store.dense()

    @torch.compiler.disable
    def make_room(self) -> None:
        """Evicts what single tokens brought beyond the limits and the slack; called before a forward.

        Raises:
            ValueError: if the keys hold NaN.
            MemoryError: if the store has no room for what stays; nothing changes.
        """
        held = self._holding
        if not held.rows or held.length < held.check_at:
            return
        over = self._excess() > self.settings.slack_tokens
        if bool(over.any()) and (held.can_judge or not self.wants_queries):
            with torch.no_grad():
                self._evict(over, *held.store.dense())
        self._plan_check()

    def commit(self) -> None:
        """Gives up what undoes the latest update."""
        self._before = None

    def undo(self) -> None:
        """Takes the latest update back, unless it was committed."""
        if self._before is not None:
            self._restore(self._before)

    def crop(self, tokens_to_remove: int) -> None:
        """Only 0, which does nothing: an evicted entry does not come back.

        Raises:
            ValueError: for any other count.
        """
        if tokens_to_remove:
            raise ValueError(
                f"crop({tokens_to_remove}) was asked of an evicting cache, which cannot go back to what it let go of; "
                "copy.deepcopy it before tokens that may have to be taken back, or use PagedKVCache."
            )

    def reset(self) -> None:
        """Drops everything."""
        self._holding.store.reset()
        self._holding, self._before, self.is_initialized = Holding(self._holding.store), None, False

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the rows `indices` (rows,), as numbers or flags; a row may occur several times.

        Raises:
            IndexError: for a row that does not exist; nothing changes then.
        """
        held = self._holding
        if not held.rows:
            return
        held.store.batch_select_indices(indices)
        rows = torch.arange(held.rows)[torch.as_tensor(indices).cpu()].tolist()
        self._holding, self._before = held.take_rows(rows, self.device), None

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row."""
        held = self._holding
        if held.rows:
            held.store.batch_repeat_interleave(repeats)
            rows = [row for row in range(held.rows) for _ in range(repeats)]
            self._holding, self._before = held.take_rows(rows, self.device), None

    def __deepcopy__(self, memo):
        copied = memo[id(self)] = type(self).__new__(type(self))
        for name, value in vars(self).items():
            setattr(copied, name, None if name == "_before" else copy.deepcopy(value, memo))
        return copied

    def __reduce_ex__(self, protocol):
        raise TypeError(
            f"{type(self).__name__} cannot be pickled, since its entries lie in memory of this process and no plain "
            "cache can stand for it; use copy.deepcopy, or save the conversation and run it again."
        )

    def _require_fit(self, keys: torch.Tensor, values: torch.Tensor, queries: torch.Tensor | None) -> None:
        held = self._holding
        if held.rows:
            require_rows(len(keys), held.rows)
        given = (keys.shape[1], keys.shape[-1], keys.dtype)
        if held.rows and given != self._form:
            own, other = (f"{heads} KV heads of {dim} in {dtype}" for heads, dim, dtype in (self._form, given))
            raise ValueError(f"the cache holds {own} but the keys have {other}; use a cache made for this model.")
        if self.wants_queries and (queries is None or queries.ndim != 4 or queries.shape[2] != keys.shape[2]):
            found = "none" if queries is None else f"some of shape {tuple(queries.shape)}"
            raise ValueError(
                f"the policy judges entries by attention and needs the queries of all {keys.shape[2]} new tokens, got "
                f"{found}; use the models of this package, or a policy such as 'streaming'."
            )
        if not held.rows:
            self.lazy_initialization(keys, values)

    def _extend(self, keys, values, dense: bool, queries):
        """Takes new tokens in; keys and values that they attend to, or `None` where that is what was given."""
        held, new = self._holding, keys.shape[2]
        if not new:
            return held.store.dense() if dense and held.length else None
        several = self._several(len(keys), new)
        extended = replace(held, rows=len(keys), length=held.length + new)
        if several is not None:
            over = several & (self._excess(extended) > 0)
            if bool(over.any()):
                return self._attend_then_evict(extended, over, keys, values, queries)
        found = held.store.update(keys.detach(), values.detach(), dense=dense)
        self._holding = extended
        # A single token is judged by where text can exceed the limits, or a check is due as a picture is open.
        if self.wants_queries and (several is not None or self.settings.bounds_text or held.check_at > held.length):
            self._observe(queries)
        if several is not None:
            self._plan_check()
        return found if dense and held.length else None

    def _attend_then_evict(self, extended: Holding, over: torch.Tensor, keys, values, queries):
        held = self._holding
        if held.store.get_seq_length():
            old = held.store.dense()
            keys, values = (torch.cat(pair, dim=2) for pair in zip(old, (keys, values), strict=True))
        self._holding = extended
        if self.wants_queries:
            self._observe(queries, keys.detach(), values.detach())
        self._evict(over, keys.detach(), values.detach())
        self._plan_check()
        return keys, values

    def _several(self, rows: int, new: int) -> torch.Tensor | None:
        """Which rows (B,) get more than one real token; `None` where that is certain of none."""
        if new == 1:
            return None
        start = self._holding.length
        return self._counts(rows, start + new).real[:, start:].sum(1) > 1

    def _counts(self, rows: int, length: int) -> TokenCounts:
        return self.notes.counts(rows, length, self.device)

    def _budget(self, held: Holding) -> RowBudget:
        counts = self._counts(held.rows, held.length)
        share = self.settings.visual_share_of(self.layer)
        return counts.budget(self.settings, self.policy.by_modality, share, self.factor)

    def _excess(self, held: Holding | None = None) -> torch.Tensor:
        """How many entries more than its budget every row holds, (B,)."""
        held = self._holding if held is None else held
        real = self._counts(held.rows, held.length).real[:, held.since :].sum(1)
        if held.evicted:
            real = real + held.selected.shape[2] - torch.tensor(held.gaps, device=real.device)
        return real - self._budget(held).total

    def _plan_check(self) -> None:
        """A single token adds one entry at most, so for some time nothing has to be looked at."""
        held, slack = self._holding, self.settings.slack_tokens
        wait = 0
        if not bool(self._counts(held.rows, held.length).is_open.any()):
            wait = max(slack - max(int(self._excess().max()), 0), 0)
        self._holding = replace(held, check_at=held.length + 1 + wait)

    def _observe(self, queries: torch.Tensor, keys=None, values=None) -> None:
        """Notes the queries (B, H, new, D) of the newest tokens, as far as the policy needs them."""
        held, new = self._holding, queries.shape[2]
        counts = self._counts(held.rows, held.length)
        eligible = counts.real[:, -new:]
        if self.policy.observes == "text":
            eligible = eligible & (counts.pictures[:, -new:] == 0)
        at = torch.arange(held.length - new, held.length, device=queries.device)
        positions = torch.where(eligible, at, -1)
        queries = queries.detach()
        if held.queries is not None:
            queries = torch.cat((held.queries, queries), dim=2)
            positions = torch.cat((held.query_positions, positions), dim=1)
        if not self.policy.accumulates:
            queries, positions = latest_queries(queries, positions, self.settings.observation_tokens)
        self._holding = replace(held, queries=queries, query_positions=positions)
        if self.policy.accumulates and (keys is not None or queries.shape[2] >= PENDING_QUERIES):
            self._count_attention(*(held.store.dense() if keys is None else (keys, values)))

    def _count_attention(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Adds the attention of the noted queries to that of each entry, and forgets them."""
        held = self._holding
        if held.queries is None:
            return
        sums = attention_sums(self._describe(keys, values))
        if held.sums is not None:
            sums[..., : held.sums.shape[2]] += held.sums
        self._holding = replace(held, sums=sums, queries=None, query_positions=None)

    def _describe(self, keys: torch.Tensor, values: torch.Tensor) -> Entries:
        """What the policy is shown of the entries (B, KV heads, entries, D)."""
        held = self._holding
        counts = self._counts(held.rows, held.length)
        positions = self.kept_positions.expand(-1, keys.shape[1], -1)
        at, shape = positions.clamp(min=0).flatten(1), positions.shape
        of_tokens = (counts.real, counts.ordinals, counts.pictures)
        real, ordinals, pictures = (states.gather(1, at).view(shape) for states in of_tokens)
        valid = real & (positions >= 0)
        return Entries(
            keys,
            values,
            positions,
            valid,
            torch.where(valid, ordinals, -1),
            torch.where(valid, pictures, 0),
            counts.total,
            self._budget(held),
            held.queries,
            held.query_positions,
            held.sums,
            self.layer,
        )

    def _evict(self, over: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Puts what stays of the rows `over`, and all of the others, into a new store."""
        if self.policy.accumulates:
            self._count_attention(keys, values)
        held, entries = self._holding, self._describe(keys, values)
        scores = self.policy.score(entries, self.settings)
        if not bool(torch.isfinite(keys.sum((2, 3), dtype=torch.float32)).all() & torch.isfinite(scores).all()):
            raise ValueError(
                f"the keys or queries of layer {self.layer} hold NaN or infinity, so no entry can be chosen over "
                "another; look for the first layer whose outputs are not finite."
            )
        groups = entries.pictures if self.policy.by_modality else torch.zeros_like(entries.pictures)
        kept = choose_entries(scores, groups.masked_fill(~entries.valid, -1), entries.budget)
        kept = torch.where(over[:, None, None], kept, entries.valid)
        if self.policy.merges and self.settings.merge:
            keys, values = merge_evicted(entries, kept)
        places, gaps = packed_order(kept)
        store = self.make_store()
        at = places[..., None].expand(-1, -1, -1, keys.shape[3])
        store.update(keys.gather(2, at), values.gather(2, at), dense=False)
        columns = torch.arange(places.shape[2], device=places.device)
        selected = entries.positions.gather(2, places).masked_fill(columns < gaps[:, None, None], -1)
        self._holding = replace(
            held,
            store=store,
            selected=selected.int(),
            gaps=tuple(gaps.tolist()),
            since=held.length,
            sums=None if held.sums is None else held.sums.gather(2, places),
            # Where text alone never exceeds the limits, nobody will ask for them again.
            **({} if self.settings.bounds_text else {"queries": None, "query_positions": None}),
        )

    def _restore(self, before: Holding) -> None:
        store = before.store
        if self._holding.store is store and store.get_seq_length() > before.entries:
            store.crop(before.entries - store.get_seq_length())
        self._holding, self._before = before, None
