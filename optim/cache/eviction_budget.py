"""How many entries of a layer may stay, by row and modality, and which of them: the part that all policies share."""

from dataclasses import dataclass, field

import torch

from .memory_pool import require_positive


@dataclass(frozen=True)
class EvictionSettings:
    """How much stays. All limits hold for each batch row, KV head and layer; padding is never kept.

    Args:
        visual_share (`float`): share of the entries of every picture or video frame, over 0 up to 1; rounded up.
        layer_shares (`tuple[float, ...]`, *optional*): the same for each layer, in place of one for all; see
            [`measure_layer_shares`].
        text_share (`float`): the same of the text.
        max_tokens (`int`, *optional*): the most entries in all; by default the shares alone decide.
        sink_tokens (`int`): first tokens, which stay before all others.
        window_tokens (`int`): latest tokens, which stay before all but those.
        observation_tokens (`int`): latest queries by whose attention entries are judged, where a policy does so.
        pool_tokens (`int`): neighbours over which such judgements are pooled, an odd number; 1 for none.
        slack_tokens (`int`): how far single new tokens may exceed the limits before entries are evicted, so that this
            does not happen at every step.
        merge (`bool`): whether `"modality"` merges what it evicts of a picture into what stays of it.
        seed (`int`): of random eviction.
    Raises:
        ValueError: for a value out of range, a window that does not fit `max_tokens`, or limits that limit nothing.
    """

    visual_share: float = 0.25
    layer_shares: tuple[float, ...] | None = None
    text_share: float = 1.0
    max_tokens: int | None = None
    sink_tokens: int = 4
    window_tokens: int = 32
    observation_tokens: int = 32
    pool_tokens: int = 5
    slack_tokens: int = 32
    merge: bool = True
    seed: int = 0

    def __post_init__(self):
        if isinstance(self.layer_shares, list):
            object.__setattr__(self, "layer_shares", tuple(self.layer_shares))
        shares = [("visual_share", self.visual_share), ("text_share", self.text_share)]
        for name, share in [*shares, *(("layer_shares", share) for share in self.layer_shares or ())]:
            if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
                raise ValueError(f"{name} must be over 0 and up to 1, got {share!r}; 1 keeps everything.")
        for name in ("sink_tokens", "window_tokens", "slack_tokens", "seed"):
            count = getattr(self, name)
            if isinstance(count, bool) or not isinstance(count, int) or count < 0:
                raise ValueError(f"{name} must be a whole number of at least 0, got {count!r}.")
        for name in ("observation_tokens", "pool_tokens"):
            require_positive(name, getattr(self, name))
        if self.pool_tokens % 2 == 0:
            raise ValueError(f"pool_tokens must be odd, to have a middle, got {self.pool_tokens}.")
        if self.max_tokens is not None:
            require_positive("max_tokens", self.max_tokens)
            if self.max_tokens <= self.sink_tokens + self.window_tokens:
                raise ValueError(
                    f"max_tokens={self.max_tokens} leaves no room beside {self.sink_tokens} sink and "
                    f"{self.window_tokens} window tokens; give more, or a smaller sink_tokens or window_tokens."
                )
        elif self.visual_share == self.text_share == 1 and not self.layer_shares:
            raise ValueError("no entry would ever be evicted; lower a share, set max_tokens, or use PagedKVCache.")

    def visual_share_of(self, layer: int) -> float:
        return self.layer_shares[layer] if self.layer_shares else self.visual_share

    @property
    def bounds_text(self) -> bool:
        """Whether text alone can exceed the limits, so that entries go while decoding too."""
        return self.max_tokens is not None or self.text_share < 1


@dataclass
class TokenNotes:
    """What the model says of all tokens seen and of those of the running forward; shared by a cache's layers.

    Args:
        length (`int`): tokens that the other fields describe.
        valid (`torch.Tensor`, *optional*): (B, length) boolean, false for padding; `None` where there is none.
        runs (`torch.Tensor`, *optional*): (B, length), the picture or frame of each token, 0 for text; `None` where
            all is text.
    """

    length: int = 0
    valid: torch.Tensor | None = None
    runs: torch.Tensor | None = None
    _remembered: dict = field(default_factory=dict)

    def describe(self, length: int, valid: torch.Tensor | None, runs: torch.Tensor | None) -> None:
        """Takes over what is known of `length` tokens."""
        self.length, self.valid, self.runs, self._remembered = length, valid, runs, {}

    def move_rows(self, move) -> None:
        """Applies `move` to what is noted by row."""
        valid, runs = (None if rows is None else move(rows) for rows in (self.valid, self.runs))
        self.describe(self.length, valid, runs)

    def counts(self, rows: int, length: int, device) -> "TokenCounts":
        """Of the first `length` tokens; the same object for all layers of a forward."""
        key = rows, length
        if key not in self._remembered:
            self._remembered = {key: TokenCounts(*self.tables(rows, length, device))}
        return self._remembered[key]

    def tables(self, rows: int, length: int, device) -> tuple[torch.Tensor, torch.Tensor]:
        """Real tokens, boolean, and pictures, each (rows, length). What nobody described is real text."""
        known = min(length, self.length)
        real = torch.ones(rows, length, dtype=torch.bool, device=device)
        pictures = torch.zeros(rows, length, dtype=torch.long, device=device)
        if self.valid is not None:
            real[:, :known] = self.valid[:, :known].to(device)
        if self.runs is not None:
            pictures[:, :known] = self.runs[:, :known].to(device)
        return real, pictures


class TokenCounts:
    """Numbers of real tokens by kind.

    Args:
        real (`torch.Tensor`): (B, tokens) boolean.
        pictures (`torch.Tensor`): (B, tokens), 0 for text.
    """

    def __init__(self, real: torch.Tensor, pictures: torch.Tensor):
        self.real, self.pictures = real, pictures
        self.ordinals = real.long().cumsum(1) - 1  # of each token among the real ones of its row
        self.total = real.sum(1)
        self.text = (real & (pictures == 0)).sum(1)
        numbers = int(pictures.max()) if pictures.numel() else 0
        sizes = torch.zeros(len(real), numbers + 1, dtype=torch.long, device=real.device)
        self.sizes = sizes.scatter_add_(1, pictures, real.long())[:, 1:]  # (B, pictures)
        # A picture that no text follows yet: nobody can say which of its entries will be asked for.
        newest = torch.where(real, pictures, 0).gather(1, last_true(real)[:, None])
        self.is_open = newest == torch.arange(1, numbers + 1, device=real.device)

    def budget(
        self, settings: EvictionSettings, by_modality: bool, visual_share: float, factor: float = 1.0
    ) -> "RowBudget":
        """How many entries each row may keep.

        Args:
            by_modality (`bool`): whether text and pictures have budgets of their own, else all entries compete.
            visual_share, factor (`float`): share of the visual entries, and part of all, in this layer.
        """
        text = share_of(self.text, settings.text_share)
        pictures = share_of(self.sizes, visual_share)
        if by_modality:
            pictures = torch.where(self.is_open, self.sizes, pictures)
        total = text + pictures.sum(1)
        if settings.max_tokens is not None:
            total = total.clamp(max=settings.max_tokens)
        if factor != 1:  # a row that fits as it is stays whole in all layers
            total = torch.where(total < self.total, share_of(total, factor), total)
        total = torch.minimum(total, self.total)
        if not by_modality:
            return RowBudget(total, total[:, None])
        text = torch.minimum(text, total)  # pictures go before text
        return RowBudget(total, torch.cat((text[:, None], shrink(pictures, total - text)), dim=1))


@dataclass(frozen=True)
class RowBudget:
    """Entries that each row may keep.

    Args:
        total (`torch.Tensor`): (B,), in all.
        groups (`torch.Tensor`): (B, 1 + pictures), of text and of each picture; (B, 1) where all compete.
    """

    total: torch.Tensor
    groups: torch.Tensor


def share_of(counts: torch.Tensor, share: float) -> torch.Tensor:
    """`share` of whole numbers, rounded up; without the error by which 0.1 of 10 would be 2."""
    return (counts.double() * share - 1e-9).ceil().long()


def shrink(counts: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """Takes from all `counts` (B, n) alike until they come to `total` (B,) or less; none grows."""
    wanted = counts.sum(1)
    ends = counts.cumsum(1) * torch.minimum(wanted, total)[:, None] // wanted.clamp(min=1)[:, None]
    return ends.diff(dim=1, prepend=torch.zeros_like(ends[:, :1]))


def last_true(flags: torch.Tensor) -> torch.Tensor:
    """The last true place of each row of `flags` (B, n), 0 where there is none: (B,)."""
    return (flags * torch.arange(flags.shape[1], device=flags.device)).amax(1)


def choose_entries(scores: torch.Tensor, groups: torch.Tensor, budget: RowBudget) -> torch.Tensor:
    """Marks the entries that stay: of each group those with the highest scores, the earlier one of equals.

    Args:
        scores (`torch.Tensor`): (B, KV heads, entries).
        groups (`torch.Tensor`): (B, KV heads, entries), the column of `budget.groups`; −1 for what cannot stay.
        budget (`RowBudget`): of each row.
    Returns:
        (B, KV heads, entries) boolean.
    """
    rows, heads, entries = scores.shape
    last = budget.groups.shape[1]
    groups = torch.where(groups < 0, last, groups)
    limits = torch.cat((budget.groups, budget.groups.new_zeros(rows, 1)), dim=1)
    limits = limits[:, None].expand(-1, heads, -1)
    # Sorted by score and then by group, so that groups lie one behind the other, the best of each in front.
    order = scores.argsort(dim=-1, descending=True, stable=True)
    order = order.gather(-1, groups.gather(-1, order).argsort(dim=-1, stable=True))
    sizes = torch.zeros_like(limits).scatter_add_(-1, groups, torch.ones_like(groups))
    own = groups.gather(-1, order)
    rank = torch.arange(entries, device=scores.device) - (sizes.cumsum(-1) - sizes).gather(-1, own)
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order, rank < limits.gather(-1, own))


def packed_order(kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where kept entries stand, in their order and to the right, as all rows need equally many.

    Args:
        kept (`torch.Tensor`): (B, KV heads, entries) boolean, equally many in every head of a row.
    Returns:
        places (B, KV heads, most kept in a row, at least 1), where the gaps in front repeat the row's first, so that
        bounds over keys stay tight; and the number of gaps of each row (B,).
    """
    count = kept[:, 0].sum(-1)
    width = max(int(count.max()), 1)
    places = kept.int().argsort(dim=-1, stable=True)[..., -width:]
    gaps = width - count
    column = torch.arange(width, device=kept.device)
    first = torch.maximum(column, gaps[:, None]).clamp(max=width - 1)[:, None].expand_as(places)
    return places.gather(-1, first), gaps
