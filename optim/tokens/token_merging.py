"""Fewer visual tokens: chosen behind the vision tower, and again at a decoder layer where that is asked for."""

import math
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

import torch
from torch.nn import functional as F

from ..technique_optim import Technique, refuse_unknown
from .token_policies import LAYER_POLICIES, PAIRWISE, POLICIES, Choice, PieceView
from .visual_request import LayerRequest, Piece, VisualPlan, VisualRequest


# Tokens that are compared with each other; of more, a square of similarities would fill the memory.
PAIRS_OF = 4096
RATIOS = ("keep_ratio", "video_keep_ratio", "min_tokens", "token_budget")
SETTINGS = ("policy", *RATIOS, "layer", "layer_keep_ratio", "seed")


class CrossModalTokenMerging(Technique):
    """Fewer visual tokens go through the decoder. Lossy, and reading of text suffers first.

    Those that stay keep their M-RoPE positions; DeepStack features are chosen and merged like the tokens. Ids, masks,
    `sequences`, logits and the cache's length stay those of the whole prompt: where a token went, hidden states and
    logits of a forward are those of the latest token before it that stayed. Hidden states of inner layers and
    attentions, if asked for, hold the tokens that stayed. Works with any cache, in batches, in chunks, with beams, in
    training: gradients flow through averages, and the choice itself has none. In training the text of a row that
    relevance looks at includes the answer.

    Policies in front of the decoder:
        `"merge"` (default): what the text asks for, what the picture does not repeat (nor the frame before) and what
            is not yet kept; the rest is averaged into what it resembles most.
        `"tome"`: the most similar pairs are averaged (ToMe, arXiv 2210.09461).
        `"divprune"`: the most diverse stay (DivPrune, arXiv 2503.02175).
        `"frames"`: of a video what changes between frames (the idea of EVS); pictures stay whole.
        `"uniform"`, `"random"`: evenly spaced, and by lot: the baselines.
    Policies at decoder layer `layer`, which see the question and cost the layers before it:
        `"fastv"`: what the last token attends to (FastV, arXiv 2403.06764).
        `"sparsevlm"`: what the text that is about the pictures attends to (SparseVLM, arXiv 2410.04417).
    With one of the first kind and a `layer`, `layer_keep_ratio` of what is left stays from there on by `"fastv"`.

    Reduction at a layer judges by the tokens of one forward: not for assisted decoding, and in a chunked prefill by
    each chunk's own. It needs a cache whose layers may hold different numbers of entries.

    Args:
        config: taken and not needed, as all techniques may be given the model's.
        policy (`str`): how tokens are chosen.
        keep_ratio (`float`): share of each picture's tokens that stays, above 0 and at most 1, default 0.25; at least
            one token of each does. 1 changes nothing.
        video_keep_ratio (`float`, *optional*): of each video's; by default `keep_ratio`.
        min_tokens (`int`): what a picture or video keeps of its tokens whatever its ratio, default 1; small pictures,
            such as single lines of text, have nothing to spare.
        token_budget (`int`, *optional*): visual tokens of a row of a forward, in place of ratios; shared by size. Rows
            that have fewer keep all.
        layer (`int`, *optional*): decoder layer, behind the DeepStack ones. Default none, and the first behind them
            for policies that work at a layer.
        layer_keep_ratio (`float`): of what enters `layer`, default 0.5; policies at a layer take `keep_ratio`.
        seed (`int`): of `"random"`.
    Raises:
        ValueError: for an unknown policy or setting, or one out of range; when applied, for a layer that the model
            does not have or into which DeepStack features go, or if another such technique is on.
    """

    name = "token_merging"
    exact = False

    def __init__(
        self,
        config=None,
        policy: str = "merge",
        keep_ratio: float = 0.25,
        video_keep_ratio: float | None = None,
        min_tokens: int = 1,
        token_budget: int | None = None,
        layer: int | None = None,
        layer_keep_ratio: float | None = None,
        seed: int = 0,
        **unknown: Any,
    ):
        refuse_unknown(self.name, unknown, SETTINGS)
        _check_policy(policy)
        _check_ratio("keep_ratio", keep_ratio)
        if video_keep_ratio is not None:
            _check_ratio("video_keep_ratio", video_keep_ratio)
        if layer_keep_ratio is not None:
            _check_ratio("layer_keep_ratio", layer_keep_ratio)
        _check_count("min_tokens", 0 if min_tokens is None else min_tokens, least=1)
        _check_count("token_budget", token_budget, least=1)
        _check_count("layer", layer, least=0)
        _check_count("seed", seed, least=0)
        at_layer = policy in LAYER_POLICIES
        if at_layer and any(value is not None for value in (video_keep_ratio, token_budget, layer_keep_ratio)):
            raise ValueError(f"policy {policy!r} works at a layer and takes keep_ratio alone, besides the layer.")
        if min_tokens > 1 and (at_layer or token_budget is not None):
            raise ValueError("min_tokens goes with ratios in front of the decoder, not with a budget or at a layer.")
        if layer is None and layer_keep_ratio is not None:
            raise ValueError("layer_keep_ratio needs a layer; give the number of a decoder layer.")
        super().__init__(
            policy=policy,
            keep_ratio=keep_ratio,
            video_keep_ratio=video_keep_ratio,
            min_tokens=min_tokens,
            token_budget=token_budget,
            layer=layer,
            layer_keep_ratio=layer_keep_ratio,
            seed=seed,
        )
        self.policy, self.at_layer, self.layer = policy, at_layer, layer

    def apply(self, model) -> None:
        """Puts itself where the model looks: `model.base_model.visual_reduction`."""
        base = model.base_model
        if not hasattr(base, "visual_reduction"):
            raise ValueError(f"{type(model).__name__} has no visual tokens; apply this to a Qwen3-VL model.")
        if base.visual_reduction not in (None, self):
            raise ValueError(f"{base.visual_reduction.name} leaves out visual tokens already; revert that first.")
        first = len(base.visual.deepstack_visual_indexes)
        layers = len(base.language_model.layers)
        layer = self.settings["layer"]
        if self.at_layer and layer is None:
            layer = min(first, layers - 1)
        if layer is not None and not first <= layer < layers:
            raise ValueError(
                f"layer must be from {first} on, behind the DeepStack layers, and below {layers}, got {layer}."
            )
        self.layer = layer
        base.visual_reduction = self

    def revert(self, model) -> None:
        """Takes itself from the model."""
        if vars(model.base_model).get("visual_reduction") is self:
            del model.base_model.visual_reduction

    def plan_visual_tokens(self, request: VisualRequest) -> VisualPlan | None:
        """Which tokens stay and what they become; `None` if all do."""
        if self.at_layer:
            return None
        counts = self.counts(request.pieces)
        if all(count == piece.tokens for count, piece in zip(counts, request.pieces, strict=True)):
            return None
        pairwise = self.policy in PAIRWISE
        alike: dict[tuple[Piece, int], list[Piece]] = {}
        for piece, count in zip(request.pieces, counts, strict=True):
            if count == piece.tokens:
                continue
            parts = split_piece(piece, PAIRS_OF) if pairwise else [piece]
            shares = share_budget([part.tokens for part in parts], max(count, len(parts)))
            for part, share in zip(parts, shares, strict=True):
                alike.setdefault((replace(part, start=0, row=0), share), []).append(part)
        choose = POLICIES[self.policy]
        generator = torch.Generator().manual_seed(self.settings["seed"])
        choices = []
        with torch.no_grad():
            for (like, share), parts in alike.items():
                most = max(1, (PAIRS_OF // like.tokens) ** 2) if pairwise else len(parts)
                for start in range(0, len(parts), most):
                    view = PieceView(request, tuple(parts[start : start + most]), generator)
                    choices.append((view.pieces, choose(view, share)))
        return _carry_out(request, choices)

    def counts(self, pieces: tuple[Piece, ...]) -> list[int]:
        """How many tokens of each picture or video stay.

        Raises:
            ValueError: if a row has more of them than its budget has tokens.
        """
        budget = self.settings["token_budget"]
        if budget is None:
            least = self.settings["min_tokens"]
            shares = [round(self._ratio(piece.modality) * piece.tokens) for piece in pieces]
            return [min(piece.tokens, max(least, share)) for piece, share in zip(pieces, shares, strict=True)]
        counts = [0] * len(pieces)
        for row in {piece.row for piece in pieces}:
            members = [number for number, piece in enumerate(pieces) if piece.row == row]
            shares = share_budget([pieces[number].tokens for number in members], budget)
            for number, share in zip(members, shares, strict=True):
                counts[number] = share
        return counts

    def _ratio(self, modality: str) -> float:
        video = self.settings["video_keep_ratio"]
        return video if modality == "video" and video is not None else self.settings["keep_ratio"]

    @torch.no_grad()
    def plan_at_layer(self, request: LayerRequest) -> torch.Tensor:
        """Which of the visual tokens that enter `layer` stay: (B, T) boolean."""
        if self.at_layer:
            rank, ratio = LAYER_POLICIES[self.policy], self.settings["keep_ratio"]
        else:
            rank, ratio = LAYER_POLICIES["fastv"], self.settings["layer_keep_ratio"] or 0.5
        stays = torch.zeros_like(request.valid)
        for row, pieces in enumerate(request.pieces):
            visual = pieces > 0
            if not bool(visual.any()):
                continue
            score = rank(request, row)
            # A share of all of the row's, as attention compares pictures too; of each at least its best.
            score = torch.where(visual, score, -1.0)
            for piece in range(1, int(pieces.max()) + 1):
                score[torch.where(pieces == piece, score, -1.0).argmax()] += 2.0
            count = max(int(pieces.max()), round(ratio * int(visual.sum())))
            stays[row, score.argsort(descending=True, stable=True)[:count]] = True
        return stays & (request.pieces > 0)


def share_budget(sizes: list[int], budget: int) -> list[int]:
    """Parts of `budget` for pieces of so many tokens, by size, at least one each and at most all.

    Raises:
        ValueError: if there are more pieces than tokens in the budget.
    """
    total = sum(sizes)
    if total <= budget:
        return list(sizes)
    if len(sizes) > budget:
        raise ValueError(
            f"a row has {len(sizes)} pictures and videos but token_budget is {budget}; each needs one token at least."
        )
    exact = [size * budget / total for size in sizes]
    parts = [max(1, math.floor(part)) for part in exact]
    # What rounding left goes to the largest remainders, and what the ones took comes from the largest parts.
    order = sorted(range(len(sizes)), key=lambda number: parts[number] - exact[number])
    for number in order[: max(0, budget - sum(parts))]:
        parts[number] += 1
    while sum(parts) > budget:
        parts[max(range(len(parts)), key=parts.__getitem__)] -= 1
    return parts


def split_piece(piece: Piece, most: int) -> list[Piece]:
    """A picture or video in parts of whole frames, or of whole rows of one frame, of about `most` tokens each."""
    frame = piece.height * piece.width
    parts, start = [], piece.start
    if frame <= most:
        for first in range(0, piece.frames, most // frame):
            frames = min(most // frame, piece.frames - first)
            parts.append(replace(piece, start=start, frames=frames))
            start += parts[-1].tokens
        return parts
    rows = max(1, most // piece.width)
    for _ in range(piece.frames):
        for first in range(0, piece.height, rows):
            parts.append(replace(piece, start=start, frames=1, height=min(rows, piece.height - first)))
            start += parts[-1].tokens
    return parts


def _carry_out(request: VisualRequest, choices: list[tuple[tuple[Piece, ...], Choice]]) -> VisualPlan:
    keep = torch.ones(len(request.features), dtype=torch.bool, device=request.features.device)
    owner = torch.arange(len(keep), device=keep.device)
    weight = torch.ones(len(keep), device=keep.device)
    for pieces, choice in choices:
        starts = torch.tensor([piece.start for piece in pieces], device=keep.device)[:, None]
        places = starts + torch.arange(pieces[0].tokens, device=keep.device)
        keep[places] = False
        keep[starts + choice.kept] = True
        own = torch.full_like(places, -1) if choice.owner is None else choice.owner
        own = own.scatter(1, choice.kept, choice.kept)
        owner[places] = torch.where(own < 0, -1, own + starts)
        if choice.weight is not None:
            weight[places] = choice.weight
    merged = bool((owner[~keep] >= 0).any())
    average = (lambda x: _average(x, keep, owner, weight)) if merged else (lambda x: x)
    return VisualPlan(keep, average(request.features), [average(level) for level in request.deepstack])


def _average(x: torch.Tensor, keep: torch.Tensor, owner: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Weighted averages (N, H) of the tokens that belong to each that stays; other rows are as they were."""
    kept, members = keep.nonzero().squeeze(-1), (owner >= 0).nonzero().squeeze(-1)
    bags, order = owner[members].sort(stable=True)
    members = members[order]
    number = torch.searchsorted(kept, bags)
    total = torch.zeros(len(kept), device=x.device).index_add(0, number, weight[members])
    share = (weight[members] / total[number].clamp(min=1e-12)).to(x.dtype)
    starts = torch.searchsorted(bags, kept)
    # One pass over the rows, where a gathered copy in float32 and its sums would take ten times as long.
    averages = F.embedding_bag(members, x, starts, mode="sum", per_sample_weights=share)
    return x.index_copy(0, kept, averages)


def _check_policy(policy: str) -> None:
    known = [*POLICIES, *LAYER_POLICIES]
    if policy not in known:
        nearest = get_close_matches(str(policy), known, n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"there are {', '.join(known)}."
        raise ValueError(f"policy {policy!r} does not exist; {hint}")


def _check_ratio(name: str, value) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise ValueError(f"{name} must be above 0 and at most 1, got {value!r}; 1 keeps every visual token.")


def _check_count(name: str, value, least: int) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}.")
