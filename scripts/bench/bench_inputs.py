"""Queries, keys and values for attention alone, with the structure that sparse attention lives on."""

from __future__ import annotations

from dataclasses import dataclass

import torch


# Fixed before anything was measured on them.
WALK_TOKENS = 512  # over which the walk forgets where it was: about a picture of 512x512 with its text
SEGMENT_TOKENS = (512, 1536)
TOPICS = 8
SHARED = 0.8  # of a token's key or query, what its neighbours have too; the rest is noise of its own
SINKS, SINK_PULL = 4, 0.7
GAINS = (0.5, 2.0)


@dataclass
class Heads:
    """Shapes of the attention of one layer."""

    query_heads: int
    kv_heads: int
    dim: int


def structured_inputs(
    heads: Heads, tokens: int, dtype: torch.dtype, device: str, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs whose neighbouring tokens are alike, whose topics return, and with attention sinks.

    Every KV head has a content vector that goes through the row: half of its variance is a random walk that forgets
    over `WALK_TOKENS` tokens, half is a topic, one of `TOPICS`, which changes every 512 to 1,536 tokens and comes
    back later. A key is 0.8 of the content and 0.6 of noise, so of unit variance a channel, and so is a query, times
    the gain of its head: from 0.5 (diffuse attention) to 2 (sharp). All queries are drawn to the first four keys. A
    query then sees its neighbourhood, older places of the same topic, the sinks, and a little of everything.

    Returns:
        query (1, query heads, tokens, D), laid out token by token as a model leaves it; key and value
        (1, KV heads, tokens, D), contiguous.
    """
    generator = torch.Generator().manual_seed(seed)
    group = heads.query_heads // heads.kv_heads
    content = _topics(heads, tokens, generator).add_(_walk(heads, tokens, generator)).mul_(0.5**0.5)
    sink = torch.randn(heads.kv_heads, 1, heads.dim, generator=generator)
    key = _with_noise(content, generator)
    key[:, :SINKS] = sink
    gains = torch.logspace(0, 1, heads.query_heads, base=GAINS[1] / GAINS[0]) * GAINS[0]
    query = torch.empty(1, tokens, heads.query_heads, heads.dim, dtype=dtype)
    for head, gain in enumerate(gains.tolist()):
        own = _with_noise(content[head // group], generator) * gain + SINK_PULL * sink[head // group]
        query[0, :, head] = own.to(dtype)
    value = _with_noise(_walk(heads, tokens, generator), generator)
    return (
        query.to(device).transpose(1, 2),
        key[None].to(device, dtype),
        value[None].to(device, dtype),
    )


def noise_inputs(
    heads: Heads, tokens: int, dtype: torch.dtype, device: str, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same shapes without any structure: what content-based sparsity cannot gain from."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(1, tokens, heads.query_heads, heads.dim, generator=generator).to(device, dtype)
    shape = (1, heads.kv_heads, tokens, heads.dim)
    key, value = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))
    return query.transpose(1, 2), key, value


def _walk(heads: Heads, tokens: int, generator: torch.Generator) -> torch.Tensor:
    """(KV heads, tokens, D): a stationary random walk of unit variance (Ornstein-Uhlenbeck), in blocks of tokens."""
    keep, block = torch.exp(torch.tensor(-1.0 / WALK_TOKENS)), min(512, tokens)
    steps = torch.arange(block)
    decay = torch.where(steps[:, None] >= steps, keep ** (steps[:, None] - steps), 0.0)
    walk = torch.randn(heads.kv_heads, tokens, heads.dim, generator=generator)
    before = torch.randn(heads.kv_heads, 1, heads.dim, generator=generator)
    for part in walk.split(block, dim=1):
        size = part.shape[1]
        new = decay[:size, :size] @ part * (1 - keep**2).sqrt() + keep ** (steps[:size, None] + 1) * before
        part.copy_(new)
        before = new[:, -1:]
    return walk


def _topics(heads: Heads, tokens: int, generator: torch.Generator) -> torch.Tensor:
    """(KV heads, tokens, D): the topic of each token."""
    topics = torch.randn(heads.kv_heads, TOPICS, heads.dim, generator=generator)
    low, high = SEGMENT_TOKENS
    lengths = torch.randint(low, high + 1, (-(-tokens // low),), generator=generator)
    chosen = torch.randint(0, TOPICS, lengths.shape, generator=generator)
    return topics[:, chosen.repeat_interleave(lengths)[:tokens]]


def _with_noise(content: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    noise = torch.randn(content.shape, generator=generator)
    return SHARED * content + (1 - SHARED**2) ** 0.5 * noise


def mass_kept(
    query: torch.Tensor, key: torch.Tensor, rows: torch.Tensor, kept: torch.Tensor, scaling: float
) -> dict[str, float]:
    """How much of the exact attention falls on keys that were kept, in float64: mean, and the mean of the worst head.

    Args:
        query (`torch.Tensor`): (1, H, R, D), the sampled queries.
        key (`torch.Tensor`): (1, HK, S, D).
        rows (`torch.Tensor`): (R,) their positions; key j is seen from position j on.
        kept (`torch.Tensor`): (H or HK, R, S) boolean.
    """
    group = query.shape[1] // key.shape[1]
    hidden = torch.arange(key.shape[2], device=key.device) > rows[:, None]
    shares = []
    for head in range(query.shape[1]):
        scores = query[0, head].double() @ key[0, head // group].double().T * scaling
        weights = scores.masked_fill_(hidden, -torch.inf).softmax(-1)
        flags = kept[head * kept.shape[0] // query.shape[1]]
        shares.append((weights * flags).sum(-1).mean().item())
    return {"mass_kept": round(sum(shares) / len(shares), 4), "mass_kept_worst_head": round(min(shares), 4)}
