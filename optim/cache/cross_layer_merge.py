"""What two neighbouring layers share of their keys and values: the arithmetic, without a cache.

Source: MiniCache (Liu et al., arXiv 2405.14366): of two vectors one direction is kept, between theirs on the sphere,
and both lengths; vectors that point too far apart stay as they are. Here the length of the lower layer's vector is
multiplied in, and the upper one's kept as a ratio to it, so that the lower layer reads what is stored as it is.
"""

import math
from dataclasses import dataclass

import torch
from torch.nn import functional


@dataclass(frozen=True)
class SharedFormat:
    """How a shared page of keys, or of values, of one KV head is stored.

    Beside the page itself, which is the lower layer's, a record of bytes holds for the upper layer: the ratio of
    lengths of every token in float32, then the numbers of the tokens that are not merged in int32, then those.

    Args:
        page_tokens, head_dim (`int`): shape of a page.
        dtype (`torch.dtype`): of keys and values.
        kept (`int`): tokens a page that are not merged.
    """

    page_tokens: int
    head_dim: int
    dtype: torch.dtype
    kept: int

    @property
    def token_bytes(self) -> int:
        """Bytes of a record for each token of the page."""
        kept = self.kept * (4 + self.head_dim * self.dtype.itemsize)
        return -(-(4 * self.page_tokens + kept) // self.page_tokens)

    @property
    def record_bytes(self) -> int:
        return self.page_tokens * self.token_bytes


@dataclass(frozen=True)
class Comparison:
    """Two layers' vectors beside each other, in float32 (float64 for such).

    Args:
        lower, upper (`torch.Tensor`): (..., tokens, head_dim) unit vectors; zeros stay zeros.
        lower_length, upper_length (`torch.Tensor`): (..., tokens, 1).
        distance (`torch.Tensor`): (..., tokens), the angle between them as a share of half a turn: 0 for equal
            directions, 0.5 for unrelated ones, 1 for opposite ones.
    """

    lower: torch.Tensor
    upper: torch.Tensor
    lower_length: torch.Tensor
    upper_length: torch.Tensor
    distance: torch.Tensor


def compare(lower: torch.Tensor, upper: torch.Tensor, what: str) -> Comparison:
    """Compares vectors (..., tokens, head_dim) of two layers; `what` they are is named in errors.

    Raises:
        ValueError: if an entry is NaN or infinite.
    """
    dtype = torch.float64 if lower.dtype == torch.float64 else torch.float32
    lower, upper = lower.to(dtype), upper.to(dtype)
    lengths = [torch.linalg.vector_norm(x, dim=-1, keepdim=True) for x in (lower, upper)]
    if not bool(torch.isfinite(torch.stack(lengths)).all()):
        raise ValueError(
            f"{what} with NaN or infinite entries cannot be shared; find out where they come from, or drop them with "
            "crop() or reset()."
        )
    lower, upper = (functional.normalize(x, dim=-1) for x in (lower, upper))
    # The arc cosine would lose all small angles in float32.
    angle = 2 * torch.atan2((lower - upper).norm(dim=-1), (lower + upper).norm(dim=-1))
    return Comparison(lower, upper, *lengths, angle / math.pi)


def share(
    lower: torch.Tensor, upper: torch.Tensor, compared: Comparison, interpolation: float, form: SharedFormat
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merges pages of two layers, (..., page_tokens, head_dim) each.

    Args:
        compared (`Comparison`): of the two.
        interpolation (`float`): where the shared direction lies, 0 at the lower layer's and 1 at the upper one's.
    Returns:
        the page as the lower layer reads it, in its shape and dtype, and records (..., record_bytes) uint8 from which
        [`restore_`] makes the upper layer's.
    """
    direction = _between(compared.lower, compared.upper, compared.distance, interpolation)
    merged = (direction * compared.lower_length).to(form.dtype)
    has_length = compared.lower_length > 0
    ratio = torch.where(has_length, compared.upper_length / compared.lower_length, 0.0)[..., 0]
    # A length that no ratio to 0 gives comes first among those that are not merged.
    unscalable = ~has_length[..., 0] & (compared.upper_length[..., 0] > 0)
    tokens = compared.distance.masked_fill(unscalable, 2.0).topk(form.kept, dim=-1).indices  # (..., kept)
    places = tokens[..., None].expand(*tokens.shape, form.head_dim)
    merged.scatter_(-2, places, lower.gather(-2, places))
    return merged, _record(ratio.float(), tokens.int(), upper.gather(-2, places), form)


def restore_(states: torch.Tensor, records: torch.Tensor, form: SharedFormat) -> torch.Tensor:
    """Turns shared pages (..., page_tokens, head_dim), contiguous, into the upper layer's, in place.

    In float32 that is faster than in bfloat16, and rounds nothing.
    """
    tokens, width = form.page_tokens, form.head_dim * form.dtype.itemsize
    sizes = [4 * tokens, 4 * form.kept, form.kept * width]
    ratio, places, kept = (part.contiguous() for part in records[..., : sum(sizes)].split(sizes, dim=-1))
    states.mul_(ratio.view(torch.float32).unsqueeze(-1))
    if form.kept:
        places = places.view(torch.int32).flatten(0, -2).long()  # (pages, kept)
        places += torch.arange(len(places), device=places.device)[:, None] * tokens
        kept = kept.view(form.dtype).view(-1, form.head_dim).to(states.dtype)
        states.view(-1, form.head_dim).index_copy_(0, places.flatten(), kept)
    return states


def _between(first: torch.Tensor, second: torch.Tensor, distance: torch.Tensor, share_of_second: float):
    """Unit vectors on the arc from `first` to `second`; the first where the two are opposite and no arc is meant."""
    # sin(a * angle) for the shares a, divided by the angle, which the normalization takes out again.
    weights = (a * torch.sinc(a * distance)[..., None] for a in (1 - share_of_second, share_of_second))
    between = next(weights) * first + next(weights) * second
    length = between.norm(dim=-1, keepdim=True)
    return torch.where(length > 1e-6, between / length, first)


def _record(ratio: torch.Tensor, tokens: torch.Tensor, kept: torch.Tensor, form: SharedFormat) -> torch.Tensor:
    parts = [part.contiguous().flatten(ratio.ndim - 1).view(torch.uint8) for part in (ratio, tokens, kept)]
    record = torch.cat(parts, dim=-1)
    return functional.pad(record, (0, form.record_bytes - record.shape[-1]))
