"""How visual tokens are judged: what they repeat, what they add, and what the text asks for."""

import torch
from torch.nn import functional as F

from .visual_request import Piece, VisualRequest


def similarities(features: torch.Tensor) -> torch.Tensor:
    """Cosines between all tokens (n, H) of a piece: (n, n) float32."""
    directions = F.normalize(features.float(), dim=-1)
    return directions @ directions.T


def redundancy(features: torch.Tensor, piece: Piece) -> torch.Tensor:
    """How much each token (n, H) is like its neighbours in space and time: mean cosine, (n,) float32.

    Neighbours are left, right, above, below, and the same place in the frames before and after. A token without any
    has 0.
    """
    grid = F.normalize(features.float(), dim=-1).view(piece.frames, piece.height, piece.width, -1)
    total = torch.zeros(grid.shape[:3], device=grid.device)
    count = torch.zeros_like(total)
    for axis in range(3):
        length = grid.shape[axis]
        if length > 1:
            first, second = grid.narrow(axis, 0, length - 1), grid.narrow(axis, 1, length - 1)
            alike = (first * second).sum(-1)
            for start in (0, 1):
                total.narrow(axis, start, length - 1).add_(alike)
                count.narrow(axis, start, length - 1).add_(1)
    return (total / count.clamp(min=1)).flatten()


def distinctness(features: torch.Tensor, piece: Piece) -> torch.Tensor:
    """How little the rest of its picture repeats each token (n, H): (n,) float32, 0 for what is everywhere.

    One minus the cosine with the mean; of a video's later frames, times how much the place has changed. Of a lower
    tower level: there tokens still speak of their own pixels, and paper, wall and sky are alike. (Likeness with
    neighbours was tried in its place: it prefers the edges of writing to writing.)
    """
    directions = F.normalize(features.float(), dim=-1)
    mean = F.normalize(directions.mean(0), dim=-1)
    distinct = (1 - directions @ mean).clamp(min=0)
    if piece.frames == 1:
        return distinct
    frames = directions.view(piece.frames, piece.height * piece.width, -1)
    change = (1 - (frames[1:] * frames[:-1]).sum(-1)).clamp(min=0)
    change = change / change.amax().clamp(min=1e-6)
    return distinct * torch.cat((torch.ones_like(change[0]), change.flatten().sqrt() + 0.05))


def text_relevance(request: VisualRequest, piece: Piece) -> torch.Tensor:
    """How much the text of a row asks for each token of a piece: (n,) float32, mean 1.

    Similarity of the prompt's queries with the tokens' keys in the first decoder layer, before rotation. For every
    text token and head the tokens share one unit of attention; each token gets what it received.
    """
    text = request.embeds[piece.row][request.is_text[piece.row]]
    n = piece.tokens
    if not len(text):
        return torch.ones(n, device=request.features.device)
    layer = request.decoder.layers[0]
    attention = layer.self_attn
    queries = _heads(attention.q_norm, attention.q_proj, layer.input_layernorm(text), attention.head_dim)
    keys = request.features[piece.place].to(text.dtype)
    keys = _heads(attention.k_norm, attention.k_proj, layer.input_layernorm(keys), attention.head_dim)
    grouped = queries.view(keys.shape[0], -1, queries.shape[1], queries.shape[2]).flatten(1, 2)
    received = torch.zeros(n, device=keys.device)
    for start in range(0, grouped.shape[1], 256):  # of a long text never all pairs at once
        scores = grouped[:, start : start + 256].float() @ keys.float().transpose(1, 2) * attention.scaling
        received += scores.softmax(-1).sum((0, 1))
    return received * (n / (grouped.shape[0] * grouped.shape[1]))


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
