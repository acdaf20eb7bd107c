"""A vision tower that is not trained, and so keeps nothing for a backward pass."""

import torch
from torch import nn


class FrozenTower:
    """In the place of a tower's `forward`: without a graph unless a parameter or the pixels need gradients.

    `enable_input_require_grads`, which PEFT calls, would otherwise make a frozen tower record every step.
    """

    def __init__(self, tower: nn.Module):
        self.tower = tower
        self.replaced = vars(tower).get("forward")
        tower.forward = self

    def __call__(self, hidden_states: torch.Tensor, *args, **kwargs):
        plain = self.replaced or type(self.tower).forward.__get__(self.tower)
        trained = hidden_states.requires_grad or any(weight.requires_grad for weight in self.tower.parameters())
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
            return plain(hidden_states, *args, **kwargs)

    def put_back(self) -> None:
        if vars(self.tower).get("forward") is self:
            del self.tower.forward
            if self.replaced is not None:
                self.tower.forward = self.replaced
