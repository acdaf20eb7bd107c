"""Attention to a history that is read part by part, and how much of it each part got."""

import torch

from ..attention.blocks_plain import merge
from .quantized_reading import attend_to_states


# The latest queries of a forward, which tell what is used.
OBSERVED_QUERIES = 64


class Reading:
    """Attention to parts of a history, one after the other, merged by their log-sum-exp (arXiv 2205.14135)."""

    def __init__(self, query: torch.Tensor, kv_heads: int, layout, scaling: float):
        if layout is not None and layout.segments is not None:
            raise ValueError(
                "packed rows have no history to be read; give each sequence a row of its own, or no cache."
            )
        self.query, self.layout, self.scaling = query, layout, scaling
        self.queries, self.group = query.shape[2], query.shape[1] // kv_heads
        self.out = self.log_sum = None
        self._observed: list[torch.Tensor] = []

    def add(self, first: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """The next part, tokens from `first` on: keys and values (B, KV heads, n, D)."""
        part, log_sum = attend_to_states(self.query, keys, values, self.layout, self.scaling, first)
        observed = log_sum.view(-1, self.group, self.queries)[..., -OBSERVED_QUERIES:]
        self._observed.append(observed.flatten())
        if self.out is None:
            self.out, self.log_sum = part.to(log_sum.dtype), log_sum
        else:
            self.out, self.log_sum = merge(self.out, self.log_sum, part, log_sum)

    def shares(self) -> torch.Tensor:
        """How much of the attention of the latest queries each part got, (parts,)."""
        return torch.stack(self._observed).softmax(0).mean(1)

    def result(self) -> torch.Tensor:
        """(B, T, H, D)."""
        return self.out.to(self.query.dtype).view(self.query.shape).transpose(1, 2)
