"""Layers whose weights are packed bytes: a linear layer, a table of embeddings, and the matrix that both hold."""

import torch
from torch import nn

from .packed_codes import PackedWeight, define_operator, packed_linear, unpack_codes


class PackedMatrix(nn.Module):
    """Packed weights as buffers of a module, so that two layers can share one matrix wherever the model moves.

    Args:
        packed (`PackedWeight`): (outputs, inputs); with a leading dimension in all its tensors, one matrix an expert.
        dtype (`torch.dtype`): of the weights that were packed; `model.to(dtype)` changes it, never the scales.
    """

    def __init__(self, packed: PackedWeight, dtype: torch.dtype):
        super().__init__()
        define_operator()
        self.register_buffer("codes", packed.codes)
        self.register_buffer("scale", packed.scale)
        self.register_buffer("zero", packed.zero)
        self.register_buffer("like", torch.empty(0, dtype=dtype, device=packed.codes.device), persistent=False)

    @property
    def packed(self) -> PackedWeight:
        return PackedWeight(self.codes, self.scale, self.zero)

    @property
    def bits(self) -> int:
        return self.packed.bits

    @property
    def shape(self) -> torch.Size:
        """Of the weights that were packed."""
        return torch.Size((*self.codes.shape[:-1], self.codes.shape[-1] * 8 // self.bits))

    @property
    def bytes_held(self) -> int:
        return sum(one.nbytes for one in (self.codes, self.scale, self.zero) if one is not None)

    def expert(self, index: int) -> PackedWeight:
        """One matrix of several."""
        return PackedWeight(self.codes[index], self.scale[index], None if self.zero is None else self.zero[index])

    def unpack(self) -> torch.Tensor:
        """The rounded weights in the dtype of the model."""
        if self.codes.ndim == 2:
            return self.packed.unpack(self.like.dtype)
        return torch.stack([self.expert(index).unpack(self.like.dtype) for index in range(len(self.codes))])

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Some rows as numbers: ids of any shape to (*ids, inputs)."""
        zero = None if self.zero is None else self.zero[ids]
        return unpack_codes(self.codes[ids], self.scale[ids], zero).to(self.like.dtype)

    def _apply(self, fn, recurse: bool = True):
        exact = self.scale, self.zero
        super()._apply(fn, recurse)
        device = self.codes.device
        self.scale, self.zero = (None if one is None else one.to(device) for one in exact)
        return self

    def extra_repr(self) -> str:
        groups = "" if self.bits == 8 else f", groups of {self.shape[-1] // self.scale.shape[-1]}"
        return f"{tuple(self.shape)}, int{self.bits}{groups}"


class PackedLinear(nn.Linear):
    """A linear layer with packed weights; to PEFT a linear layer like any other, with frozen weights.

    `weight` gives the bytes, so that what would write into them, as merging an adapter, fails instead of being lost.
    Gradients reach the input.
    """

    def __init__(self, matrix: PackedMatrix, bias: nn.Parameter | None = None):
        nn.Module.__init__(self)
        self.out_features, self.in_features = matrix.shape
        self.matrix = matrix
        self.register_parameter("bias", bias)

    @property
    def weight(self) -> torch.Tensor:
        return self.matrix.codes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return packed_linear(x, self.matrix.packed, self.bias)


class PackedEmbedding(nn.Module):
    """Rows of a packed matrix, unpacked as they are looked up."""

    def __init__(self, matrix: PackedMatrix, padding_idx: int | None = None):
        super().__init__()
        self.num_embeddings, self.embedding_dim = matrix.shape
        self.padding_idx = padding_idx
        self.matrix = matrix

    @property
    def weight(self) -> torch.Tensor:
        return self.matrix.codes

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.matrix.rows(ids)
