"""How visual tokens are judged: what they repeat, what they add, and what the text asks for."""

import torch
from torch.nn import functional as F

from .visual_request import Piece, VisualRequest


def similarities(features: torch.Tensor) -> torch.Tensor:
    """Cosines between all tokens (B, n, H) of a piece: (B, n, n) float32, as exact as the features' dtype."""
    directions = F.normalize(features.float(), dim=-1).to(features.dtype)
    return (directions @ directions.transpose(1, 2)).float()


def redundancy(features: torch.Tensor, piece: Piece) -> torch.Tensor:
    """How much each token (B, n, H) is like its neighbours in space and time: mean cosine, (B, n) float32.

    Neighbours are left, right, above, below, and the same place in the frames before and after. A token without any
    has 0.
    """
    grid = F.normalize(features.float(), dim=-1).unflatten(1, (piece.frames, piece.height, piece.width))
    total = torch.zeros(grid.shape[:4], device=grid.device)
    count = torch.zeros_like(total)
    for axis in range(1, 4):
        length = grid.shape[axis]
        if length > 1:
            first, second = grid.narrow(axis, 0, length - 1), grid.narrow(axis, 1, length - 1)
            alike = (first * second).sum(-1)
            for start in (0, 1):
                total.narrow(axis, start, length - 1).add_(alike)
                count.narrow(axis, start, length - 1).add_(1)
    return (total / count.clamp(min=1)).flatten(1)


def distinctness(features: torch.Tensor, piece: Piece) -> torch.Tensor:
    """How little the rest of its picture repeats each token (B, n, H): (B, n) float32, 0 for what is everywhere.

    One minus the cosine with the mean; of a video's later frames, times how much the place has changed. Of a lower
    tower level: there tokens still speak of their own pixels, and paper, wall and sky are alike. (Likeness with
    neighbours was tried in its place: it prefers the edges of writing to writing.)
    """
    directions = F.normalize(features.float(), dim=-1)
    mean = F.normalize(directions.mean(1), dim=-1)
    distinct = (1 - (directions @ mean[..., None])[..., 0]).clamp(min=0)
    if piece.frames == 1:
        return distinct
    frames = directions.unflatten(1, (piece.frames, -1))
    change = (1 - (frames[:, 1:] * frames[:, :-1]).sum(-1)).clamp(min=0).flatten(1)
    change = change / change.amax(1, keepdim=True).clamp(min=1e-6)
    first = torch.ones_like(distinct[:, : piece.height * piece.width])
    return distinct * torch.cat((first, change.sqrt() + 0.05), dim=1)


def text_relevance(request: VisualRequest, pieces: tuple[Piece, ...]) -> torch.Tensor:
    """How much the text of a row asks for each token of its pieces, B of one size: (B, n) float32, mean 1.

    Similarity of the prompt's queries with the tokens' keys in the first decoder layer, before rotation. For every
    text token and head the tokens of a piece share one unit of attention; each token gets what it received.
    """
    layer = request.decoder.layers[0]
    attention = layer.self_attn
    relevance = torch.ones(len(pieces), pieces[0].tokens, device=request.features.device)
    for row in {piece.row for piece in pieces}:
        text = request.embeds[row][request.is_text[row]]
        if not len(text):
            continue
        queries = _heads(attention.q_norm, attention.q_proj, layer.input_layernorm(text), attention.head_dim)
        members = [number for number, piece in enumerate(pieces) if piece.row == row]
        x = torch.cat([request.features[pieces[number].place] for number in members]).to(text.dtype)
        keys = _heads(attention.k_norm, attention.k_proj, layer.input_layernorm(x), attention.head_dim)
        for number, own in zip(members, keys.split(pieces[0].tokens, dim=1), strict=True):
            relevance[number] = _attention_shared(queries, own, attention.scaling)
    return relevance


def _attention_shared(queries: torch.Tensor, keys: torch.Tensor, scaling: float) -> torch.Tensor:
    """What each key (KV heads, n, D) gets of the attention of all queries (heads, T, D): (n,), mean 1."""
    grouped = queries.reshape(keys.shape[0], -1, keys.shape[2])
    received = torch.zeros(keys.shape[1], device=keys.device)
    for start in range(0, grouped.shape[1], 256):  # of a long text never all pairs at once
        scores = grouped[:, start : start + 256].float() @ keys.float().transpose(1, 2) * scaling
        received += scores.softmax(-1).sum((0, 1))
    return received * (keys.shape[1] / (grouped.shape[0] * grouped.shape[1]))


def _heads(norm, projection, x: torch.Tensor, head_dim: int) -> torch.Tensor:
    return norm(projection(x).view(len(x), -1, head_dim)).transpose(0, 1)  # (heads, n, D)


def attention_received(
    layer, hidden_states: torch.Tensor, position_embeddings, valid: torch.Tensor, queries: torch.Tensor
) -> torch.Tensor:
    """Attention that every token gets from some, in a decoder layer that is about to run: (T,) float32.

    Args:
        layer: the decoder layer.
        hidden_states (`torch.Tensor`): (T, hidden) of one row; position_embeddings: its cosine and sine (T, D).
        valid (`torch.Tensor`): (T,) boolean, what may be attended to.
        queries (`torch.Tensor`): (n,) numbers of the tokens that look.
    Returns:
        the sum over queries of the mean over heads.
    """
    attention = layer.self_attn
    x = layer.input_layernorm(hidden_states)
    query = _heads(attention.q_norm, attention.q_proj, x[queries], attention.head_dim)
    key = _heads(attention.k_norm, attention.k_proj, x, attention.head_dim)
    cos, sin = position_embeddings
    query, key = _rotated(query, cos[queries], sin[queries]).float(), _rotated(key, cos, sin).float()
    numbers = torch.arange(len(x), device=x.device)
    hidden = ~valid | (numbers > queries[:, None])
    groups = len(query) // len(key)
    received = torch.zeros(len(x), device=x.device)
    for head in range(len(query)):
        scores = (query[head] @ key[head // groups].T * attention.scaling).masked_fill(hidden, float("-inf"))
        received += scores.softmax(-1).nan_to_num(0.0).sum(0)
    return received / len(query)


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
