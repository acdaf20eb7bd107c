"""Policies: which tokens of a picture or video stay, and which of them takes over what the others held.

A policy is a function in one of two tables. Those of `POLICIES` see what the tower made, in front of the decoder;
those of `LAYER_POLICIES` see the tokens at a decoder layer.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch.nn import functional as F

from .token_scores import attention_received, distinctness, redundancy, similarities, text_relevance
from .visual_request import LayerRequest, Piece, VisualRequest


@dataclass(frozen=True)
class Choice:
    """What a policy answers for B pieces of n tokens each.

    Args:
        kept (`torch.Tensor`): (B, count) numbers of the tokens that stay, rising.
        owner (`torch.Tensor`, *optional*): (B, n), for every token the kept one into which it is merged, itself for
            those that stay, -1 for those that are dropped; by default all are dropped.
        weight (`torch.Tensor`, *optional*): (B, n), how much a token counts in the average; 1 by default.
    """

    kept: torch.Tensor
    owner: torch.Tensor | None = None
    weight: torch.Tensor | None = None


@dataclass(frozen=True)
class PieceView:
    """Pictures or videos of one grid for a policy; costly views are made when they are asked for.

    Args:
        pieces (`tuple[Piece, ...]`): B of n tokens each, which differ in place and row alone.
    """

    request: VisualRequest = field(repr=False)
    pieces: tuple[Piece, ...]
    generator: torch.Generator | None = field(default=None, repr=False)

    @property
    def piece(self) -> Piece:
        return self.pieces[0]

    @property
    def device(self) -> torch.device:
        return self.request.features.device

    def of(self, level: torch.Tensor) -> torch.Tensor:
        """(B, n, hidden) of (N, hidden)."""
        return torch.stack([level[piece.place].detach() for piece in self.pieces])

    @cached_property
    def features(self) -> torch.Tensor:
        """(B, n, hidden) float32."""
        return self.of(self.request.features).float()

    @cached_property
    def similarities(self) -> torch.Tensor:
        return similarities(self.of(self.request.features))

    @cached_property
    def distinctness(self) -> torch.Tensor:
        level = self.request.deepstack[0] if self.request.deepstack else self.request.features
        return distinctness(self.of(level), self.piece)

    @cached_property
    def relevance(self) -> torch.Tensor:
        return text_relevance(self.request, self.pieces)


def keep_uniform(view: PieceView, count: int) -> Choice:
    """Evenly spaced in the order of the row."""
    steps = torch.arange(count, device=view.device)
    return Choice(((2 * steps + 1) * view.piece.tokens // (2 * count)).expand(len(view.pieces), -1))


def keep_random(view: PieceView, count: int) -> Choice:
    """By lot; the baseline."""
    drawn = [torch.randperm(view.piece.tokens, generator=view.generator)[:count] for _ in view.pieces]
    return Choice(torch.stack(drawn).sort().values.to(view.device))


def keep_diverse(view: PieceView, count: int) -> Choice:
    """The subset whose least distance is greatest, greedily (DivPrune, arXiv 2503.02175)."""
    distances = 1 - view.similarities
    each = torch.arange(len(distances), device=distances.device)
    others = distances.clone()
    others.diagonal(dim1=1, dim2=2).fill_(float("inf"))
    # The first is the token whose nearest neighbour is farthest.
    chosen = [others.amin(2).argmax(1)]
    nearest = distances[each, chosen[0]]
    for _ in range(1, count):
        nearest[each, chosen[-1]] = -float("inf")
        chosen.append(nearest.argmax(1))
        nearest = torch.minimum(nearest, distances[each, chosen[-1]])
    return Choice(torch.stack(chosen, dim=1).sort().values)


def merge_pairs(view: PieceView, count: int) -> Choice:
    """Merges the most similar pairs of every other token, until few enough are left (ToMe, arXiv 2210.09461).

    Differs from the paper: once, behind the tower, and by its tokens, not by the keys of each of its layers.
    """
    sums = view.features.clone()
    batch, n, hidden = sums.shape
    sizes = sums.new_ones(batch, n)
    numbers = torch.arange(n, device=view.device).expand(batch, -1)
    owner = alive = numbers
    while alive.shape[1] > count:
        first, second = alive[:, ::2], alive[:, 1::2]
        means = F.normalize(sums / sizes[..., None], dim=-1)
        best, partner = (_rows(means, first) @ _rows(means, second).transpose(1, 2)).max(2)
        merged = best.argsort(descending=True, stable=True)[:, : min(alive.shape[1] - count, first.shape[1])]
        source, target = first.gather(1, merged), second.gather(1, partner.gather(1, merged))
        sums.scatter_add_(1, target[..., None].expand(-1, -1, hidden), _rows(sums, source))
        sizes.scatter_add_(1, target, sizes.gather(1, source))
        owner = numbers.scatter(1, source, target).gather(1, owner)
        stays = torch.ones_like(numbers, dtype=torch.bool).scatter(1, source, False)
        alive = alive[stays.gather(1, alive)].view(batch, -1)
    return Choice(alive, owner)


def _rows(x: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    return x.gather(1, numbers[..., None].expand(-1, -1, x.shape[-1]))


def keep_changes(view: PieceView, count: int) -> Choice:
    """Of a video the first frame and what changes most from frame to frame (the idea of EVS); of a picture all.

    If the first frame alone is more than `count`, its tokens that differ most from their neighbours.
    """
    piece = view.piece
    if piece.modality == "image":
        return Choice(torch.arange(piece.tokens, device=view.device).expand(len(view.pieces), -1))
    frames = F.normalize(view.features, dim=-1).unflatten(1, (piece.frames, -1))
    change = 1 - (frames[:, 1:] * frames[:, :-1]).sum(-1)
    still = Piece("image", 0, 1, piece.height, piece.width)
    first = 3 - redundancy(view.features[:, : still.tokens], still)  # in front of any change
    score = torch.cat((first, change.flatten(1)), dim=1)
    return Choice(score.argsort(descending=True, stable=True)[:, :count].sort().values)


def merge_by_relevance(view: PieceView, count: int) -> Choice:
    """Keeps what the text asks for, what the picture does not repeat and what is not kept yet; merges the rest.

    Quality of a token is its distinctness and relevance; likeness counts by `DIVERSITY`: with all of its weight,
    letters push each other out. A token that goes is averaged into the kept one that it is most like, the less the
    less it is like it.
    """
    similar, distinct = view.similarities, view.distinctness
    quality = distinct / distinct.mean(1, keepdim=True).clamp(min=1e-6) + 0.1
    quality = quality * view.relevance.clamp(min=1e-3) ** RELEVANCE
    likeness = (similar * quality[:, None]).mul_(DIVERSITY * quality[:, :, None])
    likeness.diagonal(dim1=1, dim2=2).copy_(quality.square())
    kept = largest_volume(likeness, count).sort().values
    nearness, nearest = _rows(similar, kept).max(1)
    owner = kept.gather(1, nearest).scatter(1, kept, kept)
    weight = ((nearness - 1) / TEMPERATURE).exp().scatter(1, kept, 1.0)
    return Choice(kept, owner, weight)


def largest_volume(likeness: torch.Tensor, count: int) -> torch.Tensor:
    """The greedy maximum of a determinantal point process (k-DPP, Kulesza and Taskar, arXiv 1207.6083).

    Each next token is the one that adds most to the determinant; a Cholesky factor grows by its row.

    Args:
        likeness (`torch.Tensor`): (B, n, n) symmetric, float32.
    Returns:
        (B, count) in the order of choice.
    """
    batch, n, _ = likeness.shape
    each = torch.arange(batch, device=likeness.device)
    gain = likeness.diagonal(dim1=1, dim2=2).clone()
    factor = likeness.new_empty(batch, count, n)
    chosen = []
    for step in range(count):
        best = gain.argmax(1)
        row = likeness[each, best]
        known = factor[:, :step]
        row = torch.baddbmm(row[:, None], known[each, :, best][:, None], known, alpha=-1)[:, 0]
        row = row * gain[each, best].clamp(min=1e-8).rsqrt()[:, None]
        factor[:, step] = row
        gain = gain.addcmul(row, row, value=-1)
        gain[each, best] = -float("inf")
        chosen.append(best)
    return torch.stack(chosen, dim=1)


# Exponent of relevance, weight of likeness, and how fast the weight of a merged token falls with its distance.
RELEVANCE, DIVERSITY, TEMPERATURE = 0.5, 0.8, 0.1


def rank_by_last_query(request: LayerRequest, row: int) -> torch.Tensor:
    """Attention from the last token (FastV, arXiv 2403.06764): (T,) float32.

    Differs from the paper: the attention of the layer that comes, where the paper takes that of the layer before.
    """
    last = request.valid[row].nonzero()[-1]
    return _received(request, row, last)


def rank_by_text_raters(request: LayerRequest, row: int) -> torch.Tensor:
    """Attention from the text tokens that are most about the pictures (SparseVLM, arXiv 2410.04417): (T,) float32.

    Raters are text tokens behind the last visual one whose mean similarity with the visual tokens is above average.
    Differs from the paper: the share that stays is given, and what goes is not gathered into new tokens.
    """
    visual = request.pieces[row] > 0
    numbers = torch.arange(len(visual), device=visual.device)
    behind = request.valid[row] & (numbers > visual.nonzero()[-1])
    text = behind.nonzero().squeeze(-1)
    if not len(text):
        return rank_by_last_query(request, row)
    hidden = request.hidden_states[row].float()
    about = (hidden[text] @ hidden[visual].T).softmax(0).mean(1)
    return _received(request, row, text[about >= about.mean()])


def _received(request: LayerRequest, row: int, queries: torch.Tensor) -> torch.Tensor:
    embeddings = tuple(x[row if len(x) > 1 else 0] for x in request.position_embeddings)
    return attention_received(request.layer, request.hidden_states[row], embeddings, request.valid[row], queries)


POLICIES: dict[str, Callable[[PieceView, int], Choice]] = {
    "merge": merge_by_relevance,
    "tome": merge_pairs,
    "divprune": keep_diverse,
    "frames": keep_changes,
    "uniform": keep_uniform,
    "random": keep_random,
}
LAYER_POLICIES: dict[str, Callable[[LayerRequest, int], torch.Tensor]] = {
    "fastv": rank_by_last_query,
    "sparsevlm": rank_by_text_raters,
}
# These compare every token with every other one, so a long video comes to them in parts.
PAIRWISE = ("merge", "tome", "divprune")
