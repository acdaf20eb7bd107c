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
    """What a policy answers for one piece of n tokens.

    Args:
        kept (`torch.Tensor`): (count,) numbers of the tokens that stay, rising.
        owner (`torch.Tensor`, *optional*): (n,), for every token the kept one into which it is merged, itself for
            those that stay, -1 for those that are dropped; by default all are dropped.
        weight (`torch.Tensor`, *optional*): (n,), how much a token counts in the average; 1 by default.
    """

    kept: torch.Tensor
    owner: torch.Tensor | None = None
    weight: torch.Tensor | None = None


@dataclass(frozen=True)
class PieceView:
    """One picture or video for a policy; costly views are made when they are asked for."""

    request: VisualRequest = field(repr=False)
    piece: Piece
    generator: torch.Generator | None = field(default=None, repr=False)

    @property
    def tokens(self) -> int:
        return self.piece.tokens

    @cached_property
    def features(self) -> torch.Tensor:
        """(n, hidden) float32."""
        return self.request.features[self.piece.place].detach().float()

    @cached_property
    def similarities(self) -> torch.Tensor:
        return similarities(self.features)

    @cached_property
    def distinctness(self) -> torch.Tensor:
        level = self.request.deepstack[0] if self.request.deepstack else self.request.features
        return distinctness(level[self.piece.place].detach(), self.piece)

    @cached_property
    def relevance(self) -> torch.Tensor:
        return text_relevance(self.request, self.piece)


def keep_uniform(view: PieceView, count: int) -> Choice:
    """Evenly spaced in the order of the row."""
    steps = torch.arange(count, device=view.features.device)
    return Choice((2 * steps + 1) * view.tokens // (2 * count))


def keep_random(view: PieceView, count: int) -> Choice:
    """By lot; the baseline."""
    drawn = torch.randperm(view.tokens, generator=view.generator)[:count]
    return Choice(drawn.sort().values.to(view.features.device))


def keep_diverse(view: PieceView, count: int) -> Choice:
    """The subset whose least distance is greatest, greedily (DivPrune, arXiv 2503.02175)."""
    distances = 1 - view.similarities
    # The first is the token whose nearest neighbour is farthest.
    first = distances.clone().fill_diagonal_(float("inf")).amin(1).argmax() if view.tokens > 1 else 0
    chosen = torch.zeros(count, dtype=torch.long, device=distances.device)
    chosen[0] = first
    nearest = distances[first].clone()
    for step in range(1, count):
        nearest[chosen[step - 1]] = -float("inf")
        chosen[step] = nearest.argmax()
        nearest = torch.minimum(nearest, distances[chosen[step]])
    return Choice(chosen.sort().values)


def merge_pairs(view: PieceView, count: int) -> Choice:
    """Merges the most similar pairs of every other token, until few enough are left (ToMe, arXiv 2210.09461).

    Differs from the paper: once, behind the tower, and by its tokens, not by the keys of each of its layers.
    """
    n, device = view.tokens, view.features.device
    owner, alive = torch.arange(n, device=device), torch.arange(n, device=device)
    sums, sizes = view.features.clone(), torch.ones(n, device=device)
    while len(alive) > count:
        first, second = alive[::2], alive[1::2]
        means = F.normalize(sums / sizes[:, None], dim=-1)
        best, partner = (means[first] @ means[second].T).max(1)
        merged = best.argsort(descending=True, stable=True)[: min(len(alive) - count, len(first))]
        source, target = first[merged], second[partner[merged]]
        sums.index_add_(0, target, sums[source])
        sizes.index_add_(0, target, sizes[source])
        moved = torch.arange(n, device=device)
        moved[source] = target
        owner = moved[owner]
        gone = torch.zeros(n, dtype=torch.bool, device=device)
        gone[source] = True
        alive = alive[~gone[alive]]
    return Choice(alive, owner)


def keep_changes(view: PieceView, count: int) -> Choice:
    """Of a video the first frame and what changes most from frame to frame (the idea of EVS); of a picture all.

    If the first frame alone is more than `count`, its tokens that differ most from their neighbours.
    """
    piece = view.piece
    if piece.modality == "image":
        return Choice(torch.arange(view.tokens, device=view.features.device))
    frames = F.normalize(view.features, dim=-1).view(piece.frames, piece.height * piece.width, -1)
    change = 1 - (frames[1:] * frames[:-1]).sum(-1)
    still = Piece("image", 0, 1, piece.height, piece.width)
    first = 3 - redundancy(view.features[: still.tokens], still)  # in front of any change
    score = torch.cat((first, change.flatten()))
    return Choice(score.argsort(descending=True, stable=True)[:count].sort().values)


def merge_by_relevance(view: PieceView, count: int) -> Choice:
    """Keeps what the text asks for, what the picture does not repeat and what is not kept yet; merges the rest.

    Greedy maximum of a determinantal point process (k-DPP, Kulesza and Taskar, arXiv 1207.6083) whose quality is
    distinctness and relevance. Likeness counts by `DIVERSITY`: with all of its weight, letters push each other out.
    A token that goes is averaged into the kept one that it is most like, the less the less it is like it.
    """
    similar = view.similarities
    quality = view.distinctness / view.distinctness.mean().clamp(min=1e-6) + 0.1
    quality = quality * view.relevance.clamp(min=1e-3) ** RELEVANCE
    gain = quality.square()
    rows = torch.zeros(count, view.tokens, device=similar.device)
    chosen = torch.zeros(count, dtype=torch.long, device=similar.device)
    for step in range(count):
        best = gain.argmax()
        row = DIVERSITY * quality[best] * quality * similar[best]
        row[best] = quality[best].square()
        rows[step] = (row - rows[:step, best] @ rows[:step]) / gain[best].clamp(min=1e-8).sqrt()
        chosen[step] = best
        gain = gain - rows[step].square()
        gain[best] = -float("inf")
    kept = chosen.sort().values
    nearness, nearest = similar[:, kept].max(1)
    owner = kept[nearest]
    owner[kept] = kept
    weight = ((nearness - 1) / TEMPERATURE).exp()
    weight[kept] = 1
    return Choice(kept, owner, weight)


# Exponent of relevance, weight of likeness, and how fast the weight of a merged token falls with its distance.
RELEVANCE, DIVERSITY, TEMPERATURE = 0.5, 0.5, 0.1


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
