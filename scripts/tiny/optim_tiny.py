"""Muon for the hidden matrices and AdamW for everything else, on float32 master copies of bfloat16 parameters.

Source: K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024. Differs in that the update
is scaled by sqrt(max(1, rows / columns)), query/key/value stacks are orthogonalised as one matrix each, and the patch
embedding is a matrix too (its pixels are so correlated that Adam learns little but mean colours at first).
"""

import torch


# Tables and output layers are no maps between hidden states; the mergers' square matrices would cost as much to
# orthogonalise as all others together; of two low-rank factors each would be changed by as much as a whole matrix.
ADAM_PARTS = ("embed_tokens", "pos_embed", "auxiliary", "merger.linear_fc1", "merger_list", "adapter_")
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Pushes the singular values of each matrix (count, rows, columns) towards 1, in bfloat16."""
    a, b, c = NEWTON_SCHULZ
    x = matrices.to(torch.bfloat16)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.float().norm(dim=(1, 2), keepdim=True) + 1e-7).to(x.dtype)
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        x = a * x + torch.bmm(b * gram + c * torch.bmm(gram, gram), x)
    return (x.mT if tall else x).float()


class MasterOptimizer:
    """Holds float32 masters and moments; `step` writes the new values into the bfloat16 parameters.

    Args:
        named_parameters: (name, parameter) pairs of the model; tied tensors once.
        muon_lr, adam_lr: peak rates; `step(scale)` multiplies both.
        weight_decay: decoupled, on matrices only.
    """

    def __init__(self, named_parameters, muon_lr: float, adam_lr: float, weight_decay: float = 0.02):
        self.parameters = dict(named_parameters)
        self.muon_lr, self.adam_lr, self.weight_decay = muon_lr, adam_lr, weight_decay
        self.masters = {name: parameter.detach().float().clone() for name, parameter in self.parameters.items()}
        self.first = {name: torch.zeros_like(master) for name, master in self.masters.items()}
        by_shape: dict[tuple, list[str]] = {}
        self.adam_names = []
        for name, master in self.masters.items():
            if master.ndim >= 2 and not any(part in name for part in ADAM_PARTS):
                by_shape.setdefault(tuple(master.flatten(1).shape), []).append(name)
            else:
                self.adam_names.append(name)
        self.muon_groups = list(by_shape.values())
        self.second = {name: torch.zeros_like(self.masters[name]) for name in self.adam_names}
        self.steps = 0

    @torch.no_grad()
    def step(self, flat_gradients: torch.Tensor, scale: float, clip: float = 1.0) -> float:
        """One update; returns the gradient norm before clipping.

        Args:
            flat_gradients ((2, parameters), bfloat16): one row a process; summed and then zeroed in place.
            scale: multiplies both learning rates.
            clip: largest gradient norm.
        """
        self.steps += 1
        # All in place and tensor by tensor: fresh memory for all gradients at once costs more than the arithmetic.
        total = flat_gradients[0].add_(flat_gradients[1])
        norm = torch.linalg.vector_norm(total, dtype=torch.float32).item()
        shrink = min(1.0, clip / (norm + 1e-6))
        pieces = total.split([parameter.numel() for parameter in self.parameters.values()])
        gradients = {
            name: piece.view_as(parameter)
            for (name, parameter), piece in zip(self.parameters.items(), pieces, strict=True)
        }
        for group in self.muon_groups:
            rows, columns = self.masters[group[0]].flatten(1).shape
            for name in group:
                self.first[name].mul_(0.95).add_(gradients[name], alpha=0.05 * shrink)
            ahead = (self.first[name] + gradients[name] * (0.05 / 0.95 * shrink) for name in group)
            stacked = torch.stack([update.to(torch.bfloat16) for update in ahead]).flatten(2)
            updates = orthogonalize(stacked)
            rate = scale * self.muon_lr * max(1.0, rows / columns) ** 0.5
            for name, update in zip(group, updates, strict=True):
                self.masters[name].mul_(1 - rate * self.weight_decay).add_(
                    update.view_as(self.masters[name]), alpha=-rate
                )
        beta1, beta2 = 0.9, 0.98
        for name in self.adam_names:
            gradient = gradients[name].float() * shrink
            self.first[name].lerp_(gradient, 1 - beta1)
            self.second[name].lerp_(gradient.square(), 1 - beta2)
            mean = self.first[name] / (1 - beta1**self.steps)
            root = (self.second[name] / (1 - beta2**self.steps)).sqrt_().add_(1e-8)
            self.masters[name].addcdiv_(mean, root, value=-scale * self.adam_lr)
        for name, parameter in self.parameters.items():
            parameter.copy_(self.masters[name])
        flat_gradients.zero_()
        return norm

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """All state as one flat dictionary of tensors, for safetensors."""
        tensors = {f"master/{name}": value for name, value in self.masters.items()}
        tensors |= {f"first/{name}": value for name, value in self.first.items()}
        return tensors | {f"second/{name}": value for name, value in self.second.items()}

    @torch.no_grad()
    def load_state_tensors(self, tensors: dict[str, torch.Tensor], steps: int) -> None:
        """The inverse of `state_tensors`; also writes the parameters."""
        self.steps = steps
        for key, value in tensors.items():
            kind, name = key.split("/", 1)
            table = getattr(self, {"master": "masters"}.get(kind, kind))
            # Heads that were added or left out since then stay as they are.
            if name in table:
                table[name].copy_(value)
        for name, parameter in self.parameters.items():
            parameter.copy_(self.masters[name])
