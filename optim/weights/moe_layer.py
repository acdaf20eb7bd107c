"""Sparse experts with their router, usable in any network."""

import torch
from torch import nn
from torch.nn import functional as F

from .moe_experts import check_top_k, choose_experts, load_balancing_loss
from .moe_grouped import experts_forward


class MoeLayer(nn.Module):
    """A feed-forward layer of SwiGLU experts, of which every token visits the `top_k` that its router likes best.

    The block of Qwen3-VL's sparse decoders, with the same names of parameters, so that a block's state dict loads. On
    a CPU few tokens read the chosen experts' weights alone, in one native pass; many are sorted by expert.

    Sources: Switch Transformer (arXiv 2101.03961), Qwen3 Technical Report (arXiv 2505.09388).

    Args:
        hidden_size (`int`): width of the tokens.
        num_experts (`int`): experts to choose from.
        top_k (`int`): experts that each token visits; at most `num_experts`.
        intermediate_size (`int`, *optional*): inner width of one expert. By default `3 * hidden_size / top_k`, as in
            Qwen3-VL-30B-A3B, so that a token passes a fixed number of weights whatever `top_k` is.
        initializer_range (`float`): standard deviation of the first weights.
    Raises:
        ValueError: for sizes below 1, or more experts to visit than exist.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        intermediate_size: int | None = None,
        initializer_range: float = 0.02,
    ):
        super().__init__()
        check_top_k(top_k, num_experts)
        if intermediate_size is None:
            intermediate_size = max(1, 3 * hidden_size // top_k)
        for name, size in (("hidden_size", hidden_size), ("intermediate_size", intermediate_size)):
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {size!r}.")
        self.hidden_size, self.num_experts, self.top_k = hidden_size, num_experts, top_k
        self.intermediate_size, self.initializer_range = intermediate_size, initializer_range
        self.gate = _Weights(weight=(num_experts, hidden_size))
        self.experts = _Weights(
            gate_up_proj=(num_experts, 2 * intermediate_size, hidden_size),
            down_proj=(num_experts, hidden_size, intermediate_size),
        )
        self.act_fn = nn.SiLU()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=self.initializer_range)

    def forward(
        self, hidden_states: torch.Tensor, output_router_logits: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """(..., hidden_size) to the same; with `output_router_logits` also the router's logits (tokens, num_experts).

        Raises:
            ValueError: if the last dimension is not `hidden_size`.
        """
        if hidden_states.shape[-1] != self.hidden_size:
            raise ValueError(
                f"hidden_states must end in {self.hidden_size} (hidden_size), got shape {tuple(hidden_states.shape)}."
            )
        flat = hidden_states.reshape(-1, self.hidden_size)
        logits = F.linear(flat, self.gate.weight)
        shares, indices = choose_experts(logits, self.top_k)
        weights = self.experts.gate_up_proj, self.experts.down_proj
        output = experts_forward(flat, indices, shares, *weights, self.act_fn).view_as(hidden_states)
        return (output, logits) if output_router_logits else output

    def balancing_loss(self, router_logits: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """What to add to the loss, times a small factor (0.001 in Qwen3-VL), so that all experts stay in use.

        Args:
            router_logits (`torch.Tensor`): (B * T, num_experts), from `forward`.
            attention_mask (`torch.Tensor`, *optional*): (B, T), 0 for padding.
        Returns:
            a scalar, `top_k` when perfectly balanced.
        """
        return load_balancing_loss((router_logits,), self.num_experts, self.top_k, attention_mask)

    def extra_repr(self) -> str:
        return (
            f"hidden_size={self.hidden_size}, num_experts={self.num_experts}, top_k={self.top_k}, "
            f"intermediate_size={self.intermediate_size}"
        )


class _Weights(nn.Module):
    """Parameters under a name of their own."""

    def __init__(self, **shapes: tuple[int, ...]):
        super().__init__()
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.empty(shape)))
