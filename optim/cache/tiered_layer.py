"""One layer of a tiered KV cache: the newest tokens in full precision, older ones in segments that move."""

import copy
from dataclasses import dataclass, replace

import torch
from transformers.utils import logging

from .cache_common import HistoryLayer, HistoryWithoutGradient, require_alike, row_numbers
from .tier_reading import OBSERVED_QUERIES, Reading
from .tier_segments import (
    HOT,
    SLOW,
    Entries,
    Segment,
    Stored,
    TierLimits,
    choose_tiers,
    lower,
    payload_bytes,
)
from .tier_settings import StaysHere, Tiers
from .tier_storage import TierFileError


logger = logging.get_logger(__name__)

# Of the use of a segment, what is left of it after another query.
USE_DECAY = 0.99


@dataclass(frozen=True)
class TieredState:
    """All tokens of a layer at one moment.

    Args:
        length (`int`): tokens of each row.
        rows (`int`): batch rows.
        segments (`tuple[Segment, ...]`): of `segment_tokens` each, oldest first.
        tail (`tuple`, *optional*): keys and values (B, KV heads, segment_tokens, D) of the tokens behind the segments;
            places behind those are free.
        use (`torch.Tensor`): (segments,) attention to each lately, 1 for the average.
    """

    length: int = 0
    rows: int = 0
    segments: tuple[Segment, ...] = ()
    tail: tuple[torch.Tensor, torch.Tensor] | None = None
    use: torch.Tensor | None = None


class TieredLayer(StaysHere, HistoryLayer):
    """Keys and values of one decoder layer, in tiers; see [`TieredKVCache`]. Nothing is ever dropped.

    A call that fails changes nothing. `keys` and `values` stay `None`: use `attend` or `dense`.

    Args:
        tiers (`Tiers`): shared with the other layers.
        index (`int`): of this layer.
    """

    def __init__(self, tiers: Tiers, index: int):
        super().__init__()
        self.tiers, self.index, self.size = tiers, index, tiers.settings.segment_tokens
        tiers.join(self)
        self._forget()

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.heads, self.head_dim = key_states.shape[1], key_states.shape[3]
        self.is_initialized = True

    @torch.compiler.disable
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, dense: bool = True, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends tokens; when a segment is full, segments move between the tiers.

        Args:
            key_states, value_states (`torch.Tensor`): (B, KV heads, new tokens, head_dim).
            dense (`bool`): whether to return the whole history, or what was given.
        Returns:
            keys and values, (B, KV heads, tokens, head_dim), of all tokens or, with `dense=False`, of the new ones;
            these in full precision, however many.
        Raises:
            ValueError: if shape, dtype or device do not fit what the layer holds, `max_bytes` does not hold the
                newest tokens, or a segment that is to be quantized has entries that are NaN or infinite.
            TierFileError: if the slow tier cannot be written to although `max_bytes` leaves no other place, or what
                it holds cannot be read back.
        """
        seen = self.state.length
        self._before, self._fresh = self.state, None
        try:
            self._require_fit(key_states, value_states)
            new = key_states.shape[2]
            if new:
                self.state = self._extended(key_states.detach(), value_states.detach())
            if not seen:
                return key_states, value_states
            if new > self.size:
                self._fresh = key_states.detach(), value_states.detach()
            if not dense:
                return key_states, value_states
            keys, values = self.dense()
        except BaseException:
            self.undo()
            raise
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            keys = HistoryWithoutGradient.apply(keys, key_states)
            values = HistoryWithoutGradient.apply(values, value_states)
        return keys, values

    @torch.compiler.disable
    def dense(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the whole history, rebuilt: each (B, KV heads, tokens, head_dim).

        Raises:
            ValueError: if the layer holds nothing.
            TierFileError: if a segment cannot be read back; in a forward, the cache is then as it was before it.
        """
        self._require_content()
        self.tiers.prefetch(self.index + 1)
        fresh, self._fresh = self._fresh, None
        shape = (self.state.rows, self.heads, self.state.length, self.head_dim)
        whole = tuple(torch.empty(shape, dtype=self.dtype, device=self.device) for _ in range(2))

        def copy_part(first: int, keys: torch.Tensor, values: torch.Tensor) -> None:
            for target, part in zip(whole, (keys, values), strict=True):
                target[:, :, first : first + part.shape[2]].copy_(part)

        self._for_each_part(copy_part, fresh)
        return whole

    @torch.compiler.disable
    def attend(self, query: torch.Tensor, layout, scaling: float) -> torch.Tensor:
        """Attention of `query` to all tokens, of which one segment at a time is unpacked or read back.

        Args:
            query (`torch.Tensor`): (B, H, T, D).
            layout (`AttentionLayout`, *optional*): what a query may see; `None` for everything.
            scaling (`float`): factor on the scores.
        Returns:
            (B, T, H, D); zeros for queries that see nothing.
        Raises:
            ValueError: if the layer holds nothing.
            TierFileError: if a segment cannot be read back; the cache is then as it was before this forward.
        """
        self._require_content()
        self.tiers.prefetch(self.index + 1)
        fresh, self._fresh = self._fresh, None
        reading = Reading(query, self.heads, layout, scaling)
        self._for_each_part(reading.add, fresh)
        self._note_use(reading)
        return reading.result()

    def prefetch(self) -> None:
        """Has the system read ahead what lies in the slow tier; a hint that nothing depends on."""
        for segment in self.state.segments:
            if segment.payload.tier == SLOW:
                segment.payload.ticket.prefetch()

    @property
    def held_bytes(self) -> int:
        """Bytes in the device's memory, the places for the newest tokens among them."""
        tail = () if self.state.tail is None else self.state.tail
        return sum(x.nbytes for x in tail) + sum(segment.memory_bytes for segment in self.state.segments)

    @property
    def stored_bytes(self) -> int:
        """Bytes in the slow tier."""
        return sum(segment.stored_bytes for segment in self.state.segments)

    @property
    def segment_tiers(self) -> tuple[int, ...]:
        """The tier of each segment, oldest first: 0 is full precision, 1 int8, 2 int4, 3 the slow tier."""
        return tuple(segment.payload.tier for segment in self.state.segments)

    def get_seq_length(self) -> int:
        return self.state.length

    def _crop_to(self, length: int) -> None:
        """The tokens that stay read as before; if the segment that is cut cannot be read back, nothing changes."""
        state, whole, rest = self.state, length // self.size, length % self.size
        tail = state.tail
        if whole < len(state.segments):
            tail = None
            if rest:
                cut = self._read(whole)
                tail = self._new_tail(state.rows)
                _write(tail, 0, (x[:, :, :rest] for x in cut))
        use = None if state.use is None else state.use[:whole]
        self.restore(replace(state, length=length, segments=state.segments[:whole], tail=tail, use=use))

    def reset(self) -> None:
        """Drops everything; the file goes with the last that it holds."""
        self._forget()
        if self.tiers.storage is not None:
            self.tiers.storage.collect()

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the rows `indices` (rows,), as numbers or flags; a row may occur several times.

        Raises:
            IndexError: for a row that does not exist; nothing changes then.
        """
        if self.state.length:
            rows = row_numbers(indices, self.state.rows) % max(1, self.state.rows)
            self._take_rows(tuple(rows.tolist()))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row; the repetitions share its segments.

        Raises:
            ValueError: if `max_bytes` does not hold the newest tokens of so many rows.
        """
        if self.state.length:
            self._take_rows(tuple(row for row in range(self.state.rows) for _ in range(repeats)))

    def commit(self) -> None:
        """Lets go of what was before the last update."""
        self._before = None

    def undo(self) -> None:
        """Goes back to what was before the last update, if that was not committed."""
        if self._before is not None:
            self.state, self._before, self._fresh = self._before, None, None
            if not self.state.length:
                self._forget()

    def restore(self, state: TieredState) -> None:
        """Makes `state`, which this layer had or which was made of one, what it holds."""
        self.state, self._before, self._fresh = state, None, None

    def __deepcopy__(self, memo):
        copied = memo[id(self)] = type(self)(copy.deepcopy(self.tiers, memo), self.index)
        state = self.state
        if self.is_initialized:
            for name in ("dtype", "device", "heads", "head_dim", "is_initialized"):
                setattr(copied, name, getattr(self, name))
        # Segments never change and are shared; the tail is written to.
        tail = None if state.tail is None else tuple(x.clone() for x in state.tail)
        copied.state = replace(state, tail=tail)
        return copied

    def _forget(self) -> None:
        self.is_initialized = False
        self.state, self._before, self._fresh = TieredState(), None, None

    def _require_fit(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        require_alike(keys, values)
        if not self.state.length:
            # What cannot be quantized is refused at once and not in the middle of an answer.
            if self.tiers.settings.quantizes:
                payload_bytes(1, 1, self.size, keys.shape[3], 1, self.tiers.settings.lowest)
            self.lazy_initialization(keys, values)
        else:
            held = (self.state.rows, self.heads, self.head_dim, self.dtype, self.device)
            given = (keys.shape[0], keys.shape[1], keys.shape[3], keys.dtype, keys.device)
            if held != given:
                raise ValueError(
                    f"the cache holds {_describe(*held)} but {_describe(*given)} came; use a cache made for this "
                    "batch and model, or move its rows with batch_select_indices or batch_repeat_interleave first."
                )
        self._limits(keys.shape[0])

    def _cost(self, rows: int, tier: int) -> int:
        return payload_bytes(rows, self.heads, self.size, self.head_dim, self.dtype.itemsize, tier)

    def _limits(self, rows: int) -> TierLimits:
        """Raises a `ValueError` if not even the newest tokens fit."""
        settings, whole = self.tiers.settings, self._cost(rows, HOT)
        if settings.max_bytes is None:
            return settings.limits(None)
        left = settings.max_bytes // self.tiers.count - whole
        if left < whole:
            raise ValueError(
                f"max_bytes={settings.max_bytes} does not hold the newest {2 * self.size} tokens of {rows} rows, "
                f"which take {2 * whole * self.tiers.count} bytes in {self.tiers.count} layers; give as many, a "
                "smaller segment_tokens, or fewer rows."
            )
        return settings.limits(left)

    def _new_tail(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (rows, self.heads, self.size, self.head_dim)
        with torch.inference_mode(False):  # a tensor made in that mode could not be written to outside of it
            return tuple(torch.empty(shape, dtype=self.dtype, device=self.device) for _ in range(2))

    def _extended(self, keys: torch.Tensor, values: torch.Tensor) -> TieredState:
        state, new = self.state, keys.shape[2]
        filled = state.length - self.size * len(state.segments)
        tail = state.tail
        first = min(new, self.size - filled) if filled else 0
        if first:
            _write(tail, filled, (x[:, :, :first] for x in (keys, values)))
            if filled + first < self.size:
                return replace(state, length=state.length + new)
        rest = (new - first) % self.size
        made = [Entries(*tail)] if first else []
        for start in range(first, new - rest, self.size):
            made.append(Entries(*(x[:, :, start : start + self.size] for x in (keys, values)), borrowed=True))
        tail = None
        if rest:
            tail = self._new_tail(len(keys))
            _write(tail, 0, (x[:, :, -rest:] for x in (keys, values)))
        extended = replace(state, length=state.length + new, rows=len(keys), tail=tail)
        if not made:
            return extended
        self._require_finite(made, len(state.segments))
        segments = (*state.segments, *(Segment(entries, tuple(range(len(keys)))) for entries in made))
        use = torch.ones(len(made), device=self.device)
        use = use if state.use is None else torch.cat((state.use, use))
        return replace(extended, segments=self._moved(segments, use, len(keys)), use=use)

    def _require_finite(self, made: list[Entries], first: int) -> None:
        if not self.tiers.settings.quantizes:
            return  # an exact cache holds whatever it is given, as a DynamicCache does
        for index, entries in enumerate(made, first):
            if not all(bool(x.isfinite().all()) for x in entries.tensors):
                finite = entries.keys.isfinite().all(-1) & entries.values.isfinite().all(-1)  # (B, heads, tokens)
                token = index * self.size + int((~finite).any(0).any(0).nonzero()[0])
                raise ValueError(
                    f"keys or values of token {token} in layer {self.index} are NaN or infinite and cannot be "
                    "quantized; find out where they come from, drop them with crop() or reset(), or use int8_tokens=0 "
                    "and int4_tokens=0."
                )

    def _moved(self, segments: tuple[Segment, ...], use: torch.Tensor, rows: int) -> tuple[Segment, ...]:
        """The segments, each in the tier where it should be."""
        targets = choose_tiers(
            list(segments),
            use.nan_to_num(1.0).tolist(),
            self._limits(rows),
            lambda segment, tier: self._cost(segment.payload.rows, tier),
        )
        moved, takes_more = list(segments), True
        # Down before up, so that there is room.
        for index in sorted(range(len(moved)), key=lambda index: -targets[index]):
            segment, target = segments[index], targets[index]
            if target != SLOW:
                moved[index] = self._in_memory(segment, target)
            elif segment.payload.tier != SLOW:
                moved[index] = self._put_away(segment, takes_more)
                takes_more = moved[index].payload.tier == SLOW
        return tuple(moved)

    def _in_memory(self, segment: Segment, target: int) -> Segment:
        payload = segment.payload
        if payload.tier != SLOW:
            return replace(segment, payload=lower(payload, target).own())
        try:
            return replace(segment, payload=payload.load()).take(segment.rows)
        except TierFileError:
            return segment  # its reader will say so; here nobody asked for it

    def _put_away(self, segment: Segment, takes_more: bool) -> Segment:
        """The segment in the slow tier, or in memory in the form that it would have there if that takes no more."""
        tiers, payload = self.tiers, segment.payload
        lowered = lower(payload, max(payload.tier, tiers.settings.lowest))
        if takes_more:
            try:
                return replace(segment, payload=Stored.put(tiers.storage_for(self.device), lowered))
            except TierFileError as error:
                if tiers.settings.max_bytes is not None:
                    raise
                if not tiers.warned:
                    tiers.warned = True
                    logger.warning(f"{error} Until then segments stay in memory; no entry is lost.")
        return replace(segment, payload=lowered.own())

    def _take_rows(self, rows: tuple[int, ...]) -> None:
        state = self.state
        if rows == tuple(range(state.rows)):
            self.commit()
            return
        self._limits(len(rows))
        known, moved = {}, []
        for segment in state.segments:
            if segment.rows not in known:
                known[segment.rows] = tuple(segment.rows[row] for row in rows)
            moved.append(segment.take(known[segment.rows]))
        tail = None
        if state.tail is not None:
            filled = state.length - self.size * len(moved)
            tail = self._new_tail(len(rows))
            _write(tail, 0, (x[list(rows), :, :filled] for x in state.tail))
        if self.tiers.settings.max_bytes is not None and moved and len(rows) > state.rows:
            moved = self._moved(tuple(moved), state.use, len(rows))
        self.restore(replace(state, rows=len(rows), segments=tuple(moved), tail=tail))

    def _for_each_part(self, read, fresh) -> None:
        """Gives the history to `read` part by part. The last layer ends a forward; one that fails never was."""
        try:
            for first in range(0, self.state.length, self.size):
                read(first, *self._part(first, fresh))  # the only references, so that one part lives at a time
        except BaseException:
            self.tiers.undo()
            raise
        if self.index == self.tiers.count - 1:
            self.tiers.commit()

    def _part(self, first: int, fresh) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the tokens from `first` up to the next segment, those of this forward as they came."""
        index, stop = first // self.size, min(first + self.size, self.state.length)
        old = self.state.length if fresh is None else self.state.length - fresh[0].shape[2]
        if first >= old:
            return tuple(x[:, :, first - old : stop - old] for x in fresh)
        if index < len(self.state.segments):
            part = self._read(index)
        else:
            part = tuple(x[:, :, : stop - first] for x in self.state.tail)
        if stop <= old:
            return part
        cut = zip(part, fresh, strict=True)
        return tuple(torch.cat((x[:, :, : old - first], new[:, :, : stop - old]), dim=2) for x, new in cut)

    def _read(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        try:
            return self.state.segments[index].read(self.dtype)
        except TierFileError as error:
            first = index * self.size
            raise TierFileError(
                f"segment {index} of layer {self.index} (tokens {first} to {first + self.size - 1}) is lost: {error}; "
                f"crop the cache to at most {first} tokens, or reset() it, and run the rest of the prompt again."
            ) from error

    def _note_use(self, reading: "Reading") -> None:
        """Moves the use of each segment towards the share of attention that it just got."""
        segments = len(self.state.segments)
        if not segments:
            return
        shares = reading.shares()[:segments]
        average = shares.mean().clamp(min=torch.finfo(shares.dtype).tiny)
        kept = USE_DECAY ** min(reading.queries, OBSERVED_QUERIES)
        self.state = replace(self.state, use=kept * self.state.use + (1 - kept) * shares / average)


def _write(tail: tuple[torch.Tensor, torch.Tensor], place: int, states) -> None:
    """Writes keys and values (B, KV heads, n, D) into a tail from `place` on."""
    for target, source in zip(tail, states, strict=True):
        target[:, :, place : place + source.shape[2]].copy_(source)


def _describe(rows, heads, head_dim, dtype, device) -> str:
    return f"{rows} rows of {heads} KV heads of {head_dim} in {dtype} on {device}"
