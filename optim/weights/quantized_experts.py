"""Sparse experts whose weights are packed bytes."""

import copy

import torch
from torch import nn

from .packed_codes import packed_linear
from .quantized_linear import PackedMatrix


class PackedExperts(nn.Module):
    """All experts of one layer; a token reads the bytes of the experts it chose and of no others.

    Args:
        gate_up (`PackedMatrix`): (experts, 2 * inner, hidden).
        down (`PackedMatrix`): (experts, hidden, inner).
        plain (`nn.Module`): the experts that were packed; their weights are let go of.
    """

    def __init__(self, gate_up: PackedMatrix, down: PackedMatrix, plain: nn.Module):
        super().__init__()
        self.gate_up, self.down, self.act_fn = gate_up, down, plain.act_fn
        self._shell = (_without_weights(plain),)  # in a tuple it is no part of this module
        self.num_experts, self.hidden_dim, self.intermediate_dim = down.shape

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Adds up what the chosen experts make of every token.

        Args:
            hidden_states (`torch.Tensor`): (tokens, hidden).
            top_k_index, top_k_weights (`torch.Tensor`): (tokens, k); an index of `num_experts` stands for none.
        """
        k = top_k_index.shape[-1]
        # Sorted once, the tokens of every expert are neighbours.
        by_expert = top_k_index.flatten().argsort(stable=True)
        counts = torch.bincount(top_k_index.flatten(), minlength=self.num_experts + 1).tolist()
        outputs = []
        for expert, tokens in enumerate((hidden_states[by_expert // k]).split(counts)):
            if expert < self.num_experts and len(tokens):
                gate, up = packed_linear(tokens, self.gate_up.expert(expert)).chunk(2, dim=-1)
                outputs.append(packed_linear(self.act_fn(gate) * up, self.down.expert(expert)))
            else:
                outputs.append(torch.zeros_like(tokens))
        weighted = torch.cat(outputs) * top_k_weights.flatten()[by_expert, None]
        in_order = torch.empty_like(weighted).index_copy(0, by_expert, weighted)
        return in_order.view(-1, k, self.hidden_dim).sum(1).to(hidden_states.dtype)

    def unpack(self, dtype: torch.dtype | None = None) -> nn.Module:
        """Experts of the plain class with the rounded weights."""
        plain = _without_weights(self._shell[0])
        for name, matrix in (("gate_up_proj", self.gate_up), ("down_proj", self.down)):
            setattr(plain, name, nn.Parameter(matrix.unpack().to(dtype or matrix.like.dtype)))
        return plain.train(self.training)


def _without_weights(experts: nn.Module) -> nn.Module:
    """A copy that shares everything but the parameters, which it lacks, and what stands in for its `forward`."""
    shell = copy.copy(experts)
    vars(shell).pop("forward", None)
    shell._parameters = dict.fromkeys(experts._parameters)
    return shell
