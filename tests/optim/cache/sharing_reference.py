"""How two layers share a page, by its definition."""

import torch


def slow_pair(lower, upper, kept, interpolation):
    """What the two layers read of a page, (tokens, D) each: the `kept` pairs furthest apart exactly, others merged.

    In float64; the arc cosine is good enough there.
    """
    lower, upper = lower.double(), upper.double()
    lengths = lower.norm(dim=-1, keepdim=True), upper.norm(dim=-1, keepdim=True)
    angle = ((lower * upper).sum(-1, keepdim=True) / lengths[0] / lengths[1]).clamp(-1, 1).acos()
    first, second = ((1 - interpolation) * angle).sin(), (interpolation * angle).sin()
    direction = (first * lower / lengths[0] + second * upper / lengths[1]) / angle.sin()
    direction = torch.where(angle < 1e-6, lower / lengths[0], direction)
    read = direction * lengths[0], direction * lengths[1]
    for token in angle.flatten().argsort(descending=True)[:kept].tolist():
        read[0][token], read[1][token] = lower[token], upper[token]
    return read
