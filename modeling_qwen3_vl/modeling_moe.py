"""Sparse experts in place of the decoder's feed-forward layers.

Source: Qwen3 Technical Report (arXiv 2505.09388).
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.utils.output_capturing import OutputRecorder

from ..configuration.configuration_qwen3_vl_moe import Qwen3VLMoeTextConfig
from ..optim.weights.moe_experts import (
    check_top_k,
    choose_experts,
    sum_of_experts,
)
from .modeling_text import Qwen3VLAttention, Qwen3VLTextDecoderLayer, Qwen3VLTextMLP, Qwen3VLTextModel


@use_experts_implementation
class Qwen3VLMoeTextExperts(nn.Module):
    """All experts of one layer as two three-dimensional weights.

    `gate_up_proj` (experts, 2 * inner, hidden), `down_proj` (experts, hidden, inner): the layout that stock
    `transformers` holds in memory. Checkpoints store both with the last two dimensions swapped.
    """

    def __init__(self, config: Qwen3VLMoeTextConfig):
        super().__init__()
        self.num_experts = config.num_experts
        self.hidden_dim = config.hidden_size
        self.intermediate_dim = config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * self.intermediate_dim, self.hidden_dim))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim, self.intermediate_dim))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Adds up what the chosen experts make of every token.

        Args:
            hidden_states (`torch.Tensor`): (tokens, hidden).
            top_k_index, top_k_weights (`torch.Tensor`): (tokens, k), the experts of each token and their shares. An
                index of `num_experts` marks an expert held by another device.
        """
        return sum_of_experts(
            hidden_states, top_k_index, top_k_weights, self.gate_up_proj, self.down_proj, self.act_fn
        )


class Qwen3VLMoeTextTopKRouter(nn.Module):
    """Chooses the k experts of every token; their shares add up to one."""

    def __init__(self, config: Qwen3VLMoeTextConfig):
        super().__init__()
        check_top_k(config.num_experts_per_tok, config.num_experts)
        self.top_k = config.num_experts_per_tok
        self.num_experts = config.num_experts
        self.hidden_dim = config.hidden_size
        self.weight = nn.Parameter(torch.zeros(self.num_experts, self.hidden_dim))

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(tokens, hidden) to logits (tokens, experts), shares (tokens, k) and indices (tokens, k)."""
        logits = F.linear(hidden_states.reshape(-1, self.hidden_dim), self.weight)
        return logits, *choose_experts(logits, self.top_k)


class Qwen3VLMoeTextSparseMoeBlock(nn.Module):
    def __init__(self, config: Qwen3VLMoeTextConfig):
        super().__init__()
        self.experts = Qwen3VLMoeTextExperts(config)
        self.gate = Qwen3VLMoeTextTopKRouter(config)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, shares, indices = self.gate(flat)
        return self.experts(flat, indices, shares).view_as(hidden_states)


class Qwen3VLMoeTextDecoderLayer(Qwen3VLTextDecoderLayer):
    def make_mlp(self, config: Qwen3VLMoeTextConfig, layer_idx: int) -> nn.Module:
        sparse = config.num_experts > 0 and (layer_idx + 1) % config.decoder_sparse_step == 0
        if sparse and layer_idx not in config.mlp_only_layers:
            return Qwen3VLMoeTextSparseMoeBlock(config)
        return Qwen3VLTextMLP(config)


class HoldsExperts:
    """What `transformers` asks of every class with experts inside, in front of its dense counterpart."""

    _no_split_modules = ["Qwen3VLMoeTextDecoderLayer", "Qwen3VLVisionBlock"]

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # Stock searches the source of the class's own module and inherits what it found for the dense parent.
        return True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Also draws the weights of experts and routers, which are bare parameters that stock does not know."""
        super()._init_weights(module)
        std = self.config.get_text_config().initializer_range
        if isinstance(module, Qwen3VLMoeTextExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)
        elif isinstance(module, Qwen3VLMoeTextTopKRouter):
            init.normal_(module.weight, mean=0.0, std=std)


class Qwen3VLMoeTextModel(HoldsExperts, Qwen3VLTextModel):
    """The sparse decoder without its head."""

    config_class = Qwen3VLMoeTextConfig
    _can_record_outputs = {
        "hidden_states": Qwen3VLMoeTextDecoderLayer,
        "attentions": Qwen3VLAttention,
        "router_logits": OutputRecorder(Qwen3VLMoeTextTopKRouter, index=0),
    }
    layer_class = Qwen3VLMoeTextDecoderLayer
    output_class = MoeModelOutputWithPast
