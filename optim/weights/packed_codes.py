"""How weights become bytes and numbers again, and the product with them.

int8: one signed byte a weight and a float32 scale for each output; weight = code * scale. int4: groups of neighbouring
inputs with scale and zero in bfloat16; weight = code * scale + zero with codes of -8 to 7, two a byte, the even input
in the low bits. These are the numbers of torchao's `Int8Tensor` and `Int4Tensor`, so that a checkpoint holds them
unchanged.
"""

import threading
from dataclasses import dataclass
from functools import cache

import torch
from torch.nn import functional as F

from ..native.native_packed_linear import (
    MOST_PACKED_ROWS,
    native_packed_linear,
    native_unpack,
    supports_packed,
    supports_unpack,
)


GROUP_SIZES = (32, 64, 128)
SMALLEST_GROUP = 16
# Numbers that exist unpacked at a time: a whole matrix of a 2B model, a slice of its head.
UNPACKED_AT_ONCE = 2**24
_scratch = threading.local()
_operators: list = []


@dataclass
class PackedWeight:
    """One packed matrix (outputs, inputs).

    Attributes:
        codes (`torch.Tensor`): (outputs, inputs) int8, or (outputs, inputs / 2) uint8 of int4 pairs.
        scale (`torch.Tensor`): (outputs, 1) float32, or (outputs, groups) bfloat16.
        zero (`torch.Tensor`, *optional*): (outputs, groups) bfloat16, for int4.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None = None

    @property
    def bits(self) -> int:
        return 8 if self.zero is None else 4

    @property
    def outputs(self) -> int:
        return self.codes.shape[0]

    @property
    def inputs(self) -> int:
        return self.codes.shape[1] * 8 // self.bits

    @property
    def group_size(self) -> int:
        """Neighbouring inputs that share a scale."""
        return self.inputs // self.scale.shape[1]

    def unpack(self, dtype: torch.dtype, first: int = 0, end: int | None = None) -> torch.Tensor:
        """Rows `first` to `end` as numbers, (rows, inputs) of `dtype`, rounded once."""
        end = self.outputs if end is None else end
        if supports_unpack(self, dtype):
            return native_unpack(self, first, end, dtype)
        part = slice(first, end)
        zero = None if self.zero is None else self.zero[part]
        return unpack_codes(self.codes[part], self.scale[part], zero).to(dtype)


def group_size_for(inputs: int, group_size: int) -> int | None:
    """The largest group of at most `group_size` inputs that divides `inputs` evenly; `None` if only int8 fits."""
    while group_size >= SMALLEST_GROUP:
        if inputs % group_size == 0:
            return group_size
        group_size //= 2
    return None


def pack(weight: torch.Tensor, bits: int, group_size: int) -> PackedWeight:
    """Rounds a matrix (outputs, inputs) to the nearest codes; `group_size` must divide its inputs.

    Raises:
        ValueError: if the weights hold NaN or infinity.
    """
    if not torch.isfinite(weight).all():
        raise ValueError(
            f"a weight of shape {tuple(weight.shape)} holds NaN or infinity and cannot be packed; check the file."
        )
    rows = max(1, UNPACKED_AT_ONCE // weight.shape[1])  # no float32 copy of a whole head
    parts = [_pack_rows(part.float(), bits, group_size) for part in weight.detach().split(rows)]
    joined = (None if one[0] is None else torch.cat(one) for one in zip(*parts, strict=True))
    return PackedWeight(*joined)


def _pack_rows(weight: torch.Tensor, bits: int, group_size: int) -> tuple[torch.Tensor | None, ...]:
    if bits == 8:
        scale = (weight.abs().amax(1, keepdim=True) / 127).clamp_min(torch.finfo(torch.float32).tiny)
        return (weight / scale).round().to(torch.int8), scale, None
    groups = weight.unflatten(1, (-1, group_size))
    low, high = groups.amin(2), groups.amax(2)
    scale = ((high - low) / 15).clamp_min(1e-6).bfloat16()
    # From the rounded scale, so that the zero makes up for its rounding; a flat group is its zero.
    zero = torch.where(high > low, (low + high + scale.float()) / 2, low).bfloat16()
    codes = ((groups - zero.float()[..., None]) / scale.float()[..., None]).round().clamp(-8, 7)
    codes = codes.flatten(1).to(torch.int8).view(torch.uint8)
    return (codes[:, ::2] & 15) | (codes[:, 1::2] << 4), scale, zero


def unpack_codes(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
    """The numbers (rows, inputs) of some rows in float32, in plain PyTorch."""
    if zero is None:
        return codes.float() * scale
    # Codes as signed numbers: those of 8 and above stand for what is 16 less.
    pairs = torch.stack((codes & 15, codes >> 4), -1).flatten(-2).float()
    values = (pairs - 16 * (pairs > 7)).unflatten(-1, (scale.shape[-1], -1))
    return (values * scale.float()[..., None] + zero.float()[..., None]).flatten(-2)


def packed_linear(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`x` (..., inputs) times a packed weight (outputs, inputs), turned, plus `bias`: (..., outputs) of `x`'s dtype.

    Up to 96 rows are multiplied by kernels that read the packed bytes, more with weights that are unpacked a few
    million at a time.
    Gradients reach `x` and `bias`, never the weight.
    """
    trained = bias is not None and bias.requires_grad
    if not torch.is_grad_enabled() or not (x.requires_grad or trained):
        return _product(x, weight, bias)
    product = _ProductWithGradient.apply(x, weight) if x.requires_grad else _product(x, weight, None)
    return product if bias is None else product + bias


def _product(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    if x.numel() <= MOST_PACKED_ROWS * weight.inputs and supports_packed(x, weight):
        return native_packed_linear(x, weight, bias)
    if torch.compiler.is_compiling() and x.numel() <= MOST_PACKED_ROWS * weight.inputs and x.device.type == "cpu":
        return torch.ops.qwen3_vl.packed_linear(x, weight.codes, weight.scale, weight.zero, bias)
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type):
        return F.linear(x, weight.unpack(x.dtype), bias)
    rows = x.reshape(-1, weight.inputs)
    out = x.new_empty(len(rows), weight.outputs)
    for first, end in _slices(weight):
        torch.mm(rows, _unpack_for_now(weight, x.dtype, first, end).t(), out=out[:, first:end])
    out = out if bias is None else out.add_(bias)
    return out.view(*x.shape[:-1], weight.outputs)


@cache
def define_operator() -> None:
    """Makes `torch.ops.qwen3_vl.packed_linear`, the kernel to compiled graphs; called outside of one."""

    @torch.library.custom_op("qwen3_vl::packed_linear", mutates_args=())
    def operator(
        x: torch.Tensor,
        codes: torch.Tensor,
        scale: torch.Tensor,
        zero: torch.Tensor | None,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        return _product(x, PackedWeight(codes, scale, zero), bias)

    @operator.register_fake
    def _(x, codes, scale, zero, bias):
        return x.new_empty(*x.shape[:-1], codes.shape[0])

    _operators.append(operator)  # it lives as long as its definition


def _unpack_for_now(weight: PackedWeight, dtype: torch.dtype, first: int, end: int) -> torch.Tensor:
    """As `weight.unpack`, into memory that the next call of this thread writes again: fresh pages cost as much."""
    if not supports_unpack(weight, dtype):
        return weight.unpack(dtype, first, end)
    size = (end - first) * weight.inputs
    memory = getattr(_scratch, str(dtype), None)
    if memory is None or len(memory) < size:
        memory = torch.empty(size, dtype=dtype, device="cpu")
        setattr(_scratch, str(dtype), memory)
    return native_unpack(weight, first, end, dtype, out=memory[:size].view(end - first, weight.inputs))


def _slices(weight: PackedWeight):
    """First and last output of the slices that are unpacked at a time."""
    rows = max(1, UNPACKED_AT_ONCE // weight.inputs)
    return [(first, min(first + rows, weight.outputs)) for first in range(0, weight.outputs, rows)]


class _ProductWithGradient(torch.autograd.Function):
    """A product whose backward unpacks the weight again, so that nothing unpacked is kept."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.weight = weight
        return _product(x, weight, None)

    @staticmethod
    def backward(ctx, gradient):
        weight, total = ctx.weight, None
        for first, end in _slices(weight):
            part = gradient[..., first:end] @ weight.unpack(gradient.dtype, first, end)
            total = part if total is None else total + part
        return total, None
