"""Merging instead of dropping: what is evicted of a picture goes into the entries that stay of it.

Every evicted entry joins the one that stays in its picture with the key most like its own. The value becomes the mean
by attention, as attention itself would take it, and the key the mean as well, moved so that the attention of the
observed queries to the merged entry is what they paid to all its members. For a single query the output is unchanged.
Related: token merging (ToMe, arXiv 2210.09461) and KV merging (D2O, arXiv 2406.13035), which do not keep the attention
that is paid to what they merge.
"""

import torch
from torch.nn import functional as F

from .eviction_policies import Entries


LEAST_WEIGHT = 1e-9


def merge_evicted(entries: Entries, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values (B, KV heads, entries, D), where the kept entries of pictures stand for the evicted ones too.

    Args:
        entries (`Entries`): with queries, in an order by position. Equally many entries of a picture in each head.
        kept (`torch.Tensor`): (B, KV heads, entries) boolean, equally many of a picture in each head.
    """
    keys, values = entries.keys, entries.values
    group = entries.queries.shape[1] // keys.shape[1]
    merged = None
    for row, picture in torch.unique(_places_of(entries, kept), dim=0).tolist():
        first, last = _span(entries.pictures[row, 0] == picture)
        part = slice(first, last + 1)
        stays = kept[row, :, part]
        if not bool(stays[0].any()):
            continue
        if merged is None:
            merged = keys.clone(), values.clone()
        asked = entries.query_positions[row] >= 0
        queries = entries.queries[row, :, asked].float().unflatten(0, (-1, group)).flatten(1, 2)
        found = _merge(keys[row, :, part].float(), values[row, :, part].float(), stays, queries)
        for target, states in zip(merged, found, strict=True):
            target[row, :, part] = states.to(target.dtype)
    return (keys, values) if merged is None else merged


def _places_of(entries: Entries, kept: torch.Tensor) -> torch.Tensor:
    """(n, 2) row and picture of every evicted entry of the first head."""
    evicted = entries.valid[:, 0] & ~kept[:, 0] & (entries.pictures[:, 0] > 0)
    rows, columns = evicted.nonzero(as_tuple=True)
    return torch.stack((rows, entries.pictures[rows, 0, columns]), dim=1)


def _span(flags: torch.Tensor) -> tuple[int, int]:
    """The first and last true place of `flags` (n,)."""
    places = flags.nonzero()
    return int(places[0]), int(places[-1])


def _merge(keys: torch.Tensor, values: torch.Tensor, stays: torch.Tensor, queries: torch.Tensor):
    """One picture: keys and values (KV heads, n, D), flags (KV heads, n), queries (KV heads, queries, D), float32."""
    dim = keys.shape[2]
    scores = queries @ keys.transpose(1, 2) * dim**-0.5  # (KV heads, queries, n)
    weights = scores.softmax(-1).sum(1) + LEAST_WEIGHT
    homes = stays.int().argsort(dim=1, descending=True, stable=True)[:, : int(stays[0].sum())]  # (KV heads, kept)
    directions = F.normalize(keys, dim=-1)
    likeness = directions @ take(directions, homes).transpose(1, 2)
    home = likeness.argmax(-1).scatter_(1, homes, torch.arange(homes.shape[1], device=keys.device).expand_as(homes))

    total = gather_up(weights[..., None], home, homes.shape[1])
    new_keys, new_values = (
        gather_up(weights[..., None] * states, home, homes.shape[1]) / total for states in (keys, values)
    )
    new_keys = new_keys + _move_to_mass(queries, scores, new_keys, home)
    index = homes[..., None].expand(-1, -1, dim)
    joined = gather_up(torch.ones_like(weights)[..., None], home, homes.shape[1]) > 1
    return tuple(
        old.scatter(1, index, torch.where(joined, new, take(old, homes)))
        for old, new in ((keys, new_keys), (values, new_values))
    )


def _move_to_mass(queries, scores, new_keys, home) -> torch.Tensor:
    """What is added to merged keys (KV heads, kept, D), so that queries pay them what they paid all their members.

    Along the mean query, the one direction that moves the scores of all queries that are alike.
    """
    if not queries.shape[1]:
        return torch.zeros_like(new_keys)
    highest = scores.amax(-1, keepdim=True)
    paid = gather_up((scores - highest).exp().transpose(1, 2), home, new_keys.shape[1]).transpose(1, 2)
    wanted = paid.clamp(min=torch.finfo(torch.float32).tiny).log() + highest  # (KV heads, queries, kept)
    missing = (wanted - queries @ new_keys.transpose(1, 2) * queries.shape[2] ** -0.5).mean(1)
    mean = queries.mean(1)
    along = mean / (mean.square().sum(-1, keepdim=True) * queries.shape[2] ** -0.5).clamp(min=LEAST_WEIGHT)
    return missing[..., None] * along[:, None]


def take(states: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """(KV heads, n, D) at `places` (KV heads, m): (KV heads, m, D)."""
    return states.gather(1, places[..., None].expand(-1, -1, states.shape[2]))


def gather_up(states: torch.Tensor, home: torch.Tensor, homes: int) -> torch.Tensor:
    """Sums (KV heads, n, D) by `home` (KV heads, n), numbers below `homes`: (KV heads, homes, D)."""
    sums = states.new_zeros(states.shape[0], homes, states.shape[2])
    return sums.scatter_add_(1, home[..., None].expand_as(states), states)
