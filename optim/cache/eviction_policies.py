"""Which entries of a layer stay: each policy is one small function from [`Entries`] to a score for every entry."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from .eviction_budget import EvictionSettings, RowBudget


# Scores in a piece of work at a time: 64 MiB in float32.
PIECE_SCORES = 2**24
# Above every score that a policy gives: tokens of the window by their order, then the sink.
WINDOW, SINK = 2.0**22, 2.0**24
PYRAMID_SLOPE = 20


@dataclass(frozen=True)
class Entries:
    """What a layer holds when it has to let go of some.

    Args:
        keys, values (`torch.Tensor`): (B, KV heads, entries, D).
        positions (`torch.Tensor`): (B, KV heads, entries), tokens before it in the whole conversation, −1 for none.
        valid (`torch.Tensor`): (B, KV heads, entries) boolean, false for padding and for none.
        ordinals (`torch.Tensor`): (B, KV heads, entries), the same as positions with real tokens alone counted.
        pictures (`torch.Tensor`): (B, KV heads, entries), picture or frame of each entry, 0 for text.
        seen (`torch.Tensor`): (B,) real tokens of the conversation.
        budget (`RowBudget`): what may stay.
        queries (`torch.Tensor`, *optional*): (B, H, queries, D), the latest, for policies that ask for them.
        query_positions (`torch.Tensor`, *optional*): (B, queries), −1 for none.
        sums (`torch.Tensor`, *optional*): (B, KV heads, entries), attention that each entry got so far.
        layer (`int`): number of the layer.
    """

    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor
    valid: torch.Tensor
    ordinals: torch.Tensor
    pictures: torch.Tensor
    seen: torch.Tensor
    budget: RowBudget
    queries: torch.Tensor | None = None
    query_positions: torch.Tensor | None = None
    sums: torch.Tensor | None = None
    layer: int = 0


def latest_first(entries: Entries, settings: EvictionSettings) -> torch.Tensor:
    """The first tokens and the latest ones: StreamingLLM (arXiv 2309.17453), with the original positions."""
    return protect(entries, entries.ordinals.float(), settings.sink_tokens)


def by_lot(entries: Entries, settings: EvictionSettings) -> torch.Tensor:
    """Random, the same for a row in every batch: the baseline."""
    heads = torch.arange(entries.positions.shape[1], device=entries.positions.device)[:, None]
    mixed = entries.ordinals + 7919 * heads + 104729 * entries.layer + 15485863 * settings.seed
    for _ in range(3):  # multiply and fold, modulo 2^31
        mixed = (mixed * 1103515245 + 12345) % 2**31
        mixed = mixed ^ (mixed >> 15)
    return protect_text(entries, mixed.float() / 2**31, settings)


def most_attended(entries: Entries, settings: EvictionSettings) -> torch.Tensor:
    """The attention from all queries so far, beside a window of half the budget: H2O (arXiv 2306.14048)."""
    return protect(entries, entries.sums, 0, entries.budget.total // 2)


def observed(entries: Entries, settings: EvictionSettings) -> torch.Tensor:
    """The attention of the latest queries, pooled over neighbours: SnapKV (arXiv 2404.14469)."""
    window = settings.observation_tokens
    sums = attention_sums(entries)
    in_window = entries.ordinals >= (entries.seen - window)[:, None, None]
    pooled = pool_neighbours(sums.masked_fill(in_window, 0.0), settings.pool_tokens)
    return protect(entries, pooled, 0, window)


def observed_by_text(entries: Entries, settings: EvictionSettings) -> torch.Tensor:
    """The attention of the latest text; of text itself, first and latest tokens come before."""
    return protect_text(entries, attention_sums(entries), settings)


@dataclass(frozen=True)
class Policy:
    """A way to choose what stays.

    Args:
        score: the function; higher scores stay.
        by_modality (`bool`): whether text and pictures have budgets of their own and text goes last.
        observes (`str`, *optional*): which queries it needs: the latest `"any"`, or the latest of `"text"`.
        accumulates (`bool`): whether it needs the attention that entries got from all queries.
        pyramid (`bool`): whether lower layers keep more and higher ones less.
        merges (`bool`): whether what it evicts of a picture may be merged into what stays.
    """

    score: Callable[[Entries, EvictionSettings], torch.Tensor]
    by_modality: bool = False
    observes: str | None = None
    accumulates: bool = False
    pyramid: bool = False
    merges: bool = False

    @property
    def wants_queries(self) -> bool:
        return self.accumulates or self.observes is not None

    def layer_factor(self, layer: int, layers: int) -> float:
        """The budget of a layer in parts of the mean, falling evenly: PyramidKV (arXiv 2406.02069, section 4.2)."""
        if not self.pyramid or layers < 2:
            return 1.0
        top = 1 / PYRAMID_SLOPE
        return 2 - top - (2 - 2 * top) * layer / (layers - 1)


POLICIES: dict[str, Policy] = {
    "modality": Policy(observed_by_text, by_modality=True, observes="text", merges=True),
    "streaming": Policy(latest_first),
    "h2o": Policy(most_attended, accumulates=True),
    "snapkv": Policy(observed, observes="any"),
    "pyramid": Policy(observed, observes="any", pyramid=True),
    "random": Policy(by_lot, by_modality=True),
}


def protect(entries: Entries, scores: torch.Tensor, sink: int, window: int | torch.Tensor = 0) -> torch.Tensor:
    """`scores` (B, KV heads, entries) with the first `sink` and the latest `window` real tokens above all others."""
    start = entries.seen - window
    recent = entries.ordinals >= start[:, None, None]
    scores = torch.where(recent, WINDOW + entries.ordinals.float(), scores.float())
    return scores.masked_fill(entries.ordinals < sink, SINK)


def protect_text(entries: Entries, scores: torch.Tensor, settings: EvictionSettings) -> torch.Tensor:
    """The same for text alone: where a picture stands in the prompt says nothing about its entries."""
    protected = protect(entries, scores, settings.sink_tokens, settings.window_tokens)
    return torch.where(entries.pictures > 0, scores.float(), protected)


def pool_neighbours(scores: torch.Tensor, width: int) -> torch.Tensor:
    """The mean over `width` entries around each of (B, KV heads, entries)."""
    return scores if width == 1 else F.avg_pool1d(scores, width, stride=1, padding=width // 2)


def attention_sums(entries: Entries) -> torch.Tensor:
    """The attention of all given queries to every entry, summed: (B, KV heads, entries) float32."""
    sums = torch.zeros_like(entries.positions, dtype=torch.float32)
    for weights in attention_pieces(entries):
        sums += weights.sum((2, 3))
    return sums


def attention_pieces(entries: Entries) -> Iterator[torch.Tensor]:
    """The causal attention weights, some queries at a time: (B, KV heads, group, some, entries) float32.

    Queries at position −1, and those that see nothing, have none.
    """
    queries, keys = entries.queries, entries.keys
    rows, heads, count, dim = queries.shape
    kv_heads = keys.shape[1]
    step = max(PIECE_SCORES // max(rows * heads * keys.shape[2], 1), 1)
    group = heads // kv_heads
    for start in range(0, count, step):
        # The heads that share keys as if they were more queries, so that the keys are not copied for each.
        some = queries[:, :, start : start + step].unflatten(1, (kv_heads, group)).flatten(2, 3)
        asked_at = entries.query_positions[:, None, start : start + step, None]
        seen = (entries.positions[:, :, None] <= asked_at) & entries.valid[:, :, None]
        scores = torch.matmul(some, keys.transpose(-1, -2)).float().unflatten(2, (group, -1)) * dim**-0.5
        weights = scores.masked_fill_(~seen[:, :, None], float("-inf")).softmax(-1)
        yield torch.where(seen[:, :, None], weights, 0.0)  # rows that see nothing came out as NaN


def latest_queries(queries: torch.Tensor, positions: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The last `count` of each row that are not at position −1, to the right.

    Args:
        queries (`torch.Tensor`): (B, H, queries, D).
        positions (`torch.Tensor`): (B, queries), −1 for those that do not count.
    Returns:
        queries and positions of the same form, with at most `count` of them; −1 in front where there are fewer.
    """
    order = (positions >= 0).int().argsort(dim=1, stable=True)[:, -count:]
    at = order[:, None, :, None].expand(-1, queries.shape[1], -1, queries.shape[3])
    return queries.gather(2, at), positions.gather(1, order)
