"""Linear layers that read their weights at the memory's speed while decoding."""

import torch
from torch import nn
from torch.nn import functional as F

from ..native.native_linear import native_linear, supports_linear
from ..technique_optim import Technique, refuse_unknown


class DecodeLinear(Technique):
    """Linear layers, the head included, that take up to eight rows through a kernel of ours, on a CPU with a compiler.

    Exact up to the order of float32 sums. A product of one row is bound by reading the weights once, and PyTorch's
    reaches about half of what the memory gives. More rows, gradients, other dtypes and traced graphs take the plain
    way. Layers of other classes, as quantized ones or adapters, are left alone.

    Args:
        config: accepted and not read.
    Raises:
        ValueError: for an unknown setting.
    """

    name = "decode_linear"
    exact = True
    # It takes the linear layers that those leave.
    after = ("adaptive_precision", "kernel_fusion", "layer_recycling", "learned_routing")

    def __init__(self, config=None, **unknown):
        refuse_unknown(self.name, unknown, ())
        super().__init__()

    def apply(self, model) -> None:
        for module in model.modules():
            if type(module) is nn.Linear and "forward" not in vars(module):
                module.forward = _Forward(module)

    def revert(self, model) -> None:
        for module in model.modules():
            if isinstance(vars(module).get("forward"), _Forward):
                del module.forward


class _Forward:
    """In the place of a linear layer's `forward`."""

    def __init__(self, module: nn.Linear):
        self.module = module

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.module.weight, self.module.bias
        return native_linear(x, weight, bias) if supports_linear(x, weight, bias) else F.linear(x, weight, bias)
