"""Sparse experts in plain PyTorch: choosing them, adding up what they make, and keeping them equally busy.

The decoder's experts and [`MoeLayer`] share these functions. Sources: Outrageously Large Neural Networks (arXiv
1701.06538), Switch Transformer (arXiv 2101.03961).
"""

from collections.abc import Callable

import torch
from torch.nn import functional as F


def check_top_k(top_k: int, num_experts: int) -> None:
    """Raises a `ValueError` unless each token can visit `top_k` different ones of `num_experts` experts."""
    for name, value in (("num_experts", num_experts), ("top_k", top_k)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}.")
    if top_k > num_experts:
        raise ValueError(
            f"a token cannot visit {top_k} of {num_experts} experts; choose a top_k (num_experts_per_tok in a "
            "config) of at most num_experts."
        )


def choose_experts(logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Router logits (tokens, experts) to the shares of the best `top_k`, which add up to one, and their indices.

    Both (tokens, top_k); shares in `logits.dtype`, from a softmax in float32.
    """
    shares, indices = logits.softmax(dim=-1, dtype=torch.float).topk(top_k, dim=-1)
    shares = shares / shares.sum(dim=-1, keepdim=True)
    return shares.to(logits.dtype), indices


def sum_of_experts(
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    act_fn: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Adds up what the chosen experts make of every token; one pair of products for each expert in use.

    Args:
        hidden_states (`torch.Tensor`): (tokens, hidden).
        top_k_index, top_k_weights (`torch.Tensor`): (tokens, k), the experts of each token and their shares. An
            index equal to the number of experts marks one held by another device, which adds nothing.
        gate_up_proj (`torch.Tensor`): (experts, 2 * inner, hidden).
        down_proj (`torch.Tensor`): (experts, hidden, inner).
    Returns:
        (tokens, hidden) in the dtype of `hidden_states`, summed in float32 at least.
    """
    k, num_experts = top_k_index.shape[-1], len(down_proj)
    # Sorted once, the tokens of every expert are neighbours.
    by_expert = top_k_index.flatten().argsort(stable=True)
    counts = torch.bincount(top_k_index.flatten(), minlength=num_experts + 1).tolist()[:num_experts]
    tokens, shares = by_expert // k, top_k_weights.flatten()[by_expert, None]
    total = torch.zeros_like(hidden_states, dtype=torch.promote_types(hidden_states.dtype, torch.float32))
    start = 0
    for expert, count in enumerate(counts):
        if count:
            own = slice(start, start + count)
            gate, up = F.linear(hidden_states[tokens[own]], gate_up_proj[expert]).chunk(2, dim=-1)
            made = F.linear(act_fn(gate) * up, down_proj[expert]) * shares[own]
            # Gathered and added expert by expert, rows stay in the processor's cache on the way.
            total.index_add_(0, tokens[own], made.to(total.dtype))
            start += count
    return total.to(hidden_states.dtype)


def load_balancing_loss(
    router_logits: tuple[torch.Tensor, ...], num_experts: int, top_k: int, attention_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Auxiliary loss that is least when all experts get equal shares of tokens and probability.

    Equations 4 to 6 of Switch Transformer (arXiv 2101.03961), over the tokens of all layers together.

    Args:
        router_logits: one (B * T, experts) tensor a sparse layer.
        attention_mask (`torch.Tensor`, *optional*): (B, T); padding does not count.
    Returns:
        a scalar, `top_k` when perfectly balanced.
    """
    device = router_logits[0].device
    rows = 1.0 if attention_mask is None else attention_mask.reshape(-1, 1).to(device, torch.float32)
    chosen = torch.zeros(num_experts, device=device)
    probability = torch.zeros(num_experts, device=device)
    counted = torch.zeros((), device=device)
    for logits in router_logits:
        probabilities = logits.to(device).softmax(dim=-1)
        picks = torch.zeros_like(probabilities, dtype=torch.float32)
        picks.scatter_(1, probabilities.topk(top_k, dim=-1).indices, 1.0)
        chosen = chosen + (picks * rows).sum(0)
        probability = probability + (probabilities.float() * rows).sum(0)
        counted = counted + (logits.shape[0] if attention_mask is None else rows.sum())
    return num_experts * torch.sum(chosen / counted * (probability / counted))
