"""How high the keys of a page can score, from bounds kept beside the page: Quest (Tang et al., arXiv 2406.10774).

No key of a page scores higher than the sum over channels of the larger of the two products of the query with the
page's smallest and largest key; of the query heads that share a KV head, the highest counts.
"""

import torch

from ..native.native_attention import native_page_scores, supports


@torch.no_grad()
def page_scores(query: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """The bound for every page, before scaling.

    Args:
        query (`torch.Tensor`): (B, H, T, D).
        low, high (`torch.Tensor`): smallest and largest keys, each (B, HK, pages, D).
    Returns:
        (B, HK, pages) float32.
    """
    if supports(query, low, high) and query.shape[-1] % 16 == 0 and low.stride() == high.stride():
        return native_page_scores(query, low, high)
    return plain_page_scores(query, low, high)


@torch.no_grad()
def plain_page_scores(query: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """As [`page_scores`], in plain PyTorch."""
    rows = query.unflatten(1, (low.shape[1], -1)).flatten(2, 3).float()  # (B, HK, group * T, D)
    low, high = (x.float().transpose(-1, -2) for x in (low, high))
    return (rows.clamp(min=0) @ high + rows.clamp(max=0) @ low).amax(2)


@torch.no_grad()
def pooled_page_scores(query: torch.Tensor, bounds: torch.Tensor, table: torch.Tensor) -> torch.Tensor | None:
    """As [`page_scores`], from the `bounds` (pages, HK, 2, D) of a pool without gathering them, or `None`.

    Args:
        table (`torch.Tensor`): (B, pages) int32, where each page of a row lies.
    """
    low, high = bounds.unbind(2)
    if not supports(query, low, high) or query.shape[-1] % 16:
        return None
    return native_page_scores(query, low, high, table)
