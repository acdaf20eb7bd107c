"""Policies on batches of pieces against plain definitions, one piece and one step at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from qwen3_vl.optim.tokens.token_merging import CrossModalTokenMerging
from qwen3_vl.optim.tokens.token_policies import PAIRWISE, POLICIES, PieceView, largest_volume
from qwen3_vl.optim.tokens.visual_request import Piece, VisualRequest


def request_of(pieces, hidden=16, seed=0):
    """Random features of `pieces`; without text, so that relevance is one everywhere."""
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(piece.tokens for piece in pieces)
    features, *deepstack = (torch.randn(tokens, hidden, generator=generator) for _ in range(3))
    rows = 1 + max(piece.row for piece in pieces)
    is_text = torch.zeros(rows, tokens, dtype=torch.bool)
    layers = type("Layer", (), {"self_attn": None})()
    decoder = type("Decoder", (), {"layers": [layers]})()
    return VisualRequest(features, deepstack, tuple(pieces), torch.zeros(rows, tokens, hidden), is_text, decoder)


def three_pictures(modality="image", frames=1):
    size = frames * 5 * 6
    return [Piece(modality, start, frames, 5, 6, row) for start, row in ((0, 0), (size, 1), (2 * size, 0))]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(n=st.integers(1, 12), count=st.integers(1, 12), batch=st.integers(1, 3), seed=st.integers(0, 99))
def test_the_greedy_choice_has_the_largest_determinant_of_each_step(n, count, batch, seed):
    count = min(n, count)
    x = torch.randn(batch, n, n + 2, generator=torch.Generator().manual_seed(seed))
    likeness = x @ x.transpose(1, 2)
    for chosen, one in zip(largest_volume(likeness, count).tolist(), likeness.double(), strict=True):
        for step in range(count):
            volumes = {}
            for candidate in set(range(n)) - set(chosen[:step]):
                members = [*chosen[:step], candidate]
                volumes[candidate] = float(torch.linalg.det(one[members][:, members]))
            assert volumes[chosen[step]] >= (1 - 1e-3) * max(volumes.values())


@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "random"])
@pytest.mark.parametrize("count", [1, 7, 29])
def test_a_batch_of_pieces_is_each_alone(policy, count):
    pieces = three_pictures("video", 2) if policy == "frames" else three_pictures()
    request = request_of(pieces)
    together = POLICIES[policy](PieceView(request, tuple(pieces)), count)
    for number, piece in enumerate(pieces):
        alone = POLICIES[policy](PieceView(request, (piece,)), count)
        for mine, theirs in zip(vars(together).values(), vars(alone).values(), strict=True):
            assert (mine is None) == (theirs is None)
            if mine is not None:
                assert torch.allclose(mine[number], theirs[0], atol=1e-5)


def test_diverse_tokens_are_the_farthest_from_those_chosen():
    pieces = three_pictures()
    request = request_of(pieces)
    kept = POLICIES["divprune"](PieceView(request, tuple(pieces)), 6).kept
    for row, piece in zip(kept, pieces, strict=True):
        directions = F.normalize(request.features[piece.place], dim=-1)
        distances = 1 - directions @ directions.T
        chosen = [int((distances + 9 * torch.eye(30)).amin(1).argmax())]
        while len(chosen) < 6:
            chosen.append(max(set(range(30)) - set(chosen), key=lambda token: float(distances[token, chosen].min())))
        assert sorted(chosen) == row.tolist()


@pytest.mark.parametrize("policy", ["merge", "tome"])
def test_merged_features_are_weighted_means(policy):
    pieces = three_pictures()
    request = request_of(pieces)
    plan = CrossModalTokenMerging(policy=policy, keep_ratio=0.2).plan_visual_tokens(request)
    choice = POLICIES[policy](PieceView(request, tuple(pieces)), 6)
    for number, piece in enumerate(pieces):
        weight = torch.ones(30) if choice.weight is None else choice.weight[number]
        for before, after in ((request.features, plan.features), *zip(request.deepstack, plan.deepstack, strict=True)):
            for token in choice.kept[number].tolist():
                own = choice.owner[number] == token
                mean = (before[piece.place][own] * weight[own, None]).sum(0) / weight[own].sum()
                assert torch.allclose(after[piece.start + token], mean, atol=1e-5)
    assert int(plan.keep.sum()) == 18


def test_pieces_of_one_size_are_judged_at_once_and_never_too_many(monkeypatch):
    seen = []

    def counting(view, count):
        seen.append((len(view.pieces), view.piece.tokens, count))
        return POLICIES["uniform"](view, count)

    monkeypatch.setitem(POLICIES, "merge", counting)
    pieces = three_pictures()
    pieces.append(Piece("image", 90, 1, 2, 4, 1))
    technique = CrossModalTokenMerging(policy="merge", keep_ratio=0.5)
    plan = technique.plan_visual_tokens(request_of(pieces))
    assert seen == [(3, 30, 15), (1, 8, 4)] and int(plan.keep.sum()) == 49
    seen.clear()
    monkeypatch.setattr("qwen3_vl.optim.tokens.token_merging.PAIRS_OF", 45)
    technique.plan_visual_tokens(request_of(pieces))
    assert sorted(seen) == [(1, 8, 4), (1, 30, 15), (1, 30, 15), (1, 30, 15)] and "merge" in PAIRWISE
