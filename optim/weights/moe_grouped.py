"""The decoder's experts on the CPU: few tokens through a kernel of ours, many sorted by expert."""

import torch
from torch import nn

from ..native.native_experts import native_experts, supports_experts
from ..native.native_fused import is_silu
from ..technique_optim import Technique, refuse_unknown
from .moe_experts import sum_of_experts


class GroupedExperts(Technique):
    """Sparse experts that read each chosen expert's weights once, and no others, on a CPU.

    While few tokens come, as in decoding, one native pass computes gate, up, SwiGLU and down; it is bound by reading
    the weights, which PyTorch's products do at half of the memory's speed. More tokens are sorted by expert, one pair
    of products each. Exact up to the order and rounding of sums. Other devices, traced graphs, quantized and
    distributed weights take the implementation that the model has; gradients flow everywhere.

    Args:
        config: accepted and not read.
    Raises:
        ValueError: for an unknown setting, and from `apply` on a model without experts.
    """

    name = "grouped_experts"
    exact = True
    after = ("adaptive_precision",)

    def __init__(self, config=None, **unknown):
        refuse_unknown(self.name, unknown, ())
        super().__init__()

    def apply(self, model) -> None:
        modules = [module for module in model.modules() if holds_experts(module)]
        if not modules:
            raise ValueError(
                f"{self.name} found no sparse experts with plain weights in {type(model).__name__}; leave it away for "
                "a dense model, or one whose experts are packed."
            )
        for module in modules:
            if "forward" not in vars(module):
                module.forward = GroupedForward(module)

    def revert(self, model) -> None:
        for module in model.modules():
            if isinstance(vars(module).get("forward"), GroupedForward):
                del module.forward


def holds_experts(module: nn.Module) -> bool:
    """Whether a module keeps the weights of all its experts in two three-dimensional parameters."""
    weights = (vars(module).get("_parameters", {}).get(name) for name in ("gate_up_proj", "down_proj"))
    return all(weight is not None and weight.ndim == 3 for weight in weights) and hasattr(module, "act_fn")


class GroupedForward:
    """In the place of the `forward` of a module with experts."""

    def __init__(self, module: nn.Module):
        self.module = module

    def __call__(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        module = self.module
        given = (hidden_states, top_k_index, top_k_weights)
        if not _is_plain(*given, module.gate_up_proj, module.down_proj):
            return type(module).forward(module, *given)
        return experts_forward(*given, module.gate_up_proj, module.down_proj, module.act_fn)


def experts_forward(hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj, act_fn) -> torch.Tensor:
    """As `sum_of_experts`, natively where that is faster and possible."""
    if is_silu(act_fn) and supports_experts(hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj):
        return native_experts(hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj)
    return sum_of_experts(hidden_states, top_k_index, top_k_weights, gate_up_proj, down_proj, act_fn)


def _is_plain(*tensors: torch.Tensor) -> bool:
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return not traced and all(type(x) in (torch.Tensor, nn.Parameter) and x.device.type == "cpu" for x in tensors)
