"""Segments of a tiered KV cache: what a run of tokens is held as, and in which tier it should be."""

from dataclasses import dataclass

import torch

from .kv_quantization import (
    PackedFormat,
    dequantize_keys,
    dequantize_values,
    quantize_keys,
    quantize_values,
)


# Tiers in memory by their place, and the one below them.
HOT, INT8, INT4, SLOW = range(4)
BITS = {INT8: 8, INT4: 4}
# Tokens that share the scale of a key channel.
GROUP_TOKENS = 32
# A segment of average use has half the rank of a new one when so many segments came after it.
AGE_SEGMENTS = 8
# How much more use a segment of the slow tier must show than the one whose place it takes.
RETURN_FACTOR = 2.0


class _Pair:
    """What is made of `keys` and `values`, of which the first dimension is the batch rows."""

    keys: torch.Tensor
    values: torch.Tensor

    @property
    def rows(self) -> int:
        return len(self.keys)

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [self.keys, self.values]


@dataclass(frozen=True)
class Entries(_Pair):
    """Keys and values of full precision, each (rows, KV heads, tokens, D).

    Args:
        borrowed (`bool`): whether they are views of somebody else's tensors.
    """

    keys: torch.Tensor
    values: torch.Tensor
    borrowed: bool = False
    tier = HOT

    def read(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        return self.keys, self.values

    def take(self, rows: list[int]) -> "Entries":
        return Entries(self.keys[rows], self.values[rows])

    def own(self) -> "Entries":
        """The same in memory of its own."""
        if not self.borrowed:
            return self
        return Entries(*(x.clone(memory_format=torch.contiguous_format) for x in self.tensors))


@dataclass(frozen=True)
class Packed(_Pair):
    """Quantized keys and values: records (rows, KV heads, pages, record_bytes) uint8, see `kv_quantization`."""

    keys: torch.Tensor
    values: torch.Tensor
    form: PackedFormat

    @property
    def tier(self) -> int:
        return INT8 if self.form.bits == BITS[INT8] else INT4

    def read(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        keys = dequantize_keys(self.keys, self.form, dtype).flatten(2, 3)
        return keys, dequantize_values(self.values, self.form, dtype).flatten(2, 3)

    def take(self, rows: list[int]) -> "Packed":
        return Packed(self.keys[rows], self.values[rows], self.form)

    def own(self) -> "Packed":
        return self


@dataclass(frozen=True)
class Stored:
    """Keys and values in the slow tier, in the form that they had in memory."""

    ticket: object
    form: PackedFormat | None
    rows: int
    device: torch.device
    tier = SLOW

    @classmethod
    def put(cls, storage, payload: Entries | Packed) -> "Stored":
        """Moves a payload there. Raises a [`TierFileError`] if it cannot be written."""
        device = payload.keys.device
        return cls(storage.put(payload.tensors), getattr(payload, "form", None), payload.rows, device)

    @property
    def memory_tier(self) -> int:
        """The tier in memory to which it can come back."""
        return HOT if self.form is None else INT8 if self.form.bits == BITS[INT8] else INT4

    @property
    def nbytes(self) -> int:
        return self.ticket.nbytes

    def load(self) -> Entries | Packed:
        """What was put there. Raises a [`TierFileError`] if it cannot be read."""
        tensors = self.ticket.get(self.device)
        return Entries(*tensors) if self.form is None else Packed(*tensors, self.form)

    def read(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        return self.load().read(dtype)


@dataclass(frozen=True)
class Segment:
    """Some tokens of all batch rows. Never changed, so that copies of a cache share it.

    Args:
        payload: holds rows as they were when it was made.
        rows (`tuple[int, ...]`): which of those each row of the batch is now.
    """

    payload: Entries | Packed | Stored
    rows: tuple[int, ...]

    def read(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (B, KV heads, tokens, D) in `dtype`. Raises a [`TierFileError`] if they are lost."""
        return tuple(self._of_batch(x) for x in self.payload.read(dtype))

    def take(self, rows: tuple[int, ...]) -> "Segment":
        """With other rows of its payload; those that nobody is any more are let go once they are the half."""
        payload, used = self.payload, sorted(set(rows))
        if payload.tier != SLOW and 2 * len(used) <= payload.rows:
            places = {row: place for place, row in enumerate(used)}
            payload, rows = payload.take(used), tuple(places[row] for row in rows)
        return Segment(payload, rows)

    @property
    def memory_bytes(self) -> int:
        return 0 if self.payload.tier == SLOW else self.payload.nbytes

    @property
    def stored_bytes(self) -> int:
        return self.payload.nbytes if self.payload.tier == SLOW else 0

    def _of_batch(self, x: torch.Tensor) -> torch.Tensor:
        if self.rows == tuple(range(len(x))):
            return x
        if len(set(self.rows)) == 1:
            return x[self.rows[0] :][:1].expand(len(self.rows), -1, -1, -1)
        return x[list(self.rows)]


@dataclass(frozen=True)
class TierLimits:
    """What one layer may hold in memory.

    Args:
        segments (`tuple[int | None, ...]`): in each tier, the tail of newest tokens not counted; `None` for no limit.
        shares (`tuple[float | None, ...]`): of `bytes`, for each tier; `None` for no limit.
        bytes (`int`, *optional*): in all tiers together, the tail not counted.
    """

    segments: tuple[int | None, ...]
    shares: tuple[float | None, ...]
    bytes: int | None

    def enabled(self, tier: int) -> bool:
        return self.segments[tier] is None or self.segments[tier] > 0


def choose_tiers(segments: list[Segment], use: list[float], limits: TierLimits, cost) -> list[int]:
    """The tier in which each segment should be.

    Segments are asked in the order of their rank: the newest, the first (attention sinks), then by attention that they
    got lately and age. Each takes the highest tier that has room and is not above its precision, which never returns.

    Args:
        segments (`list[Segment]`): oldest first.
        use (`list[float]`): attention to each lately, 1 for the average.
        limits (`TierLimits`): of the tiers.
        cost: bytes of a segment in a tier, a function of both.
    """
    newest, counts, held = len(segments) - 1, [0] * SLOW, [0] * SLOW
    targets = [SLOW] * len(segments)
    for index in _by_rank(segments, use):
        payload = segments[index].payload
        highest = payload.memory_tier if payload.tier == SLOW else payload.tier
        for tier in range(highest, SLOW):
            if not limits.enabled(tier):
                continue
            needed = cost(segments[index], tier)
            if limits.bytes is not None and sum(held) + needed > limits.bytes:
                continue
            pinned = index == newest and tier == HOT
            if pinned or _has_room(tier, counts[tier], held[tier] + needed, limits):
                counts[tier], held[tier], targets[index] = counts[tier] + 1, held[tier] + needed, tier
                break
    return targets


def _has_room(tier: int, count: int, held: int, limits: TierLimits) -> bool:
    most, share = limits.segments[tier], limits.shares[tier]
    return (most is None or count < most) and (share is None or held <= share * limits.bytes)


def _by_rank(segments: list[Segment], use: list[float]) -> list[int]:
    newest = len(segments) - 1

    def rank(index: int) -> tuple:
        score = use[index] / (1 + (newest - index) / AGE_SEGMENTS)
        if segments[index].payload.tier == SLOW:
            score /= RETURN_FACTOR
        return index != newest, index != 0, -score, -index

    return sorted(range(len(segments)), key=rank)


def lower(payload: Entries | Packed, tier: int) -> Entries | Packed:
    """A payload in the form of `tier`, which is not above its own; itself if that is its form.

    Raises:
        ValueError: for a head_dim that cannot be packed, or entries that are NaN or infinite.
    """
    if payload.tier == tier:
        return payload
    keys, values = payload.read(torch.float32)
    form = PackedFormat(BITS[tier], GROUP_TOKENS, keys.shape[-1])
    keys, values = (x.unflatten(2, (-1, GROUP_TOKENS)) for x in (keys, values))
    return Packed(quantize_keys(keys, form), quantize_values(values, form), form)


def payload_bytes(rows: int, heads: int, tokens: int, head_dim: int, itemsize: int, tier: int) -> int:
    """Bytes of keys and values of `tokens` in the form of a tier in memory."""
    if tier == HOT:
        return 2 * rows * heads * tokens * head_dim * itemsize
    return 2 * rows * heads * tokens // GROUP_TOKENS * PackedFormat(BITS[tier], GROUP_TOKENS, head_dim).record_bytes
