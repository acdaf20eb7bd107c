"""Quantizing and packing of keys and values: the arithmetic, without a cache.

Source: KIVI (Liu et al., arXiv 2402.02750), section 3: keys are quantized per channel over a group of tokens, as some
channels are large in every token; values per token over a group of channels. Both are asymmetric. The optional
rotation of keys is that of QuaRot (Ashkboos et al., arXiv 2404.00456), section 4.

A page of keys or values of one KV head becomes a record of bytes: packed codes, then scales, then zeros in bfloat16.
Codes lie as the products of attention read them. Keys: [4 channels][token][4 channels]; values: [4 tokens][channel]
[4 tokens], in both cases the first half of what is summed over in the low bits of a byte and the second half in the
high bits (quarters with 2 bits). So one step of a dot product finds sixteen results beside each other.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch

from .memory_pool import require_positive


BITS = (8, 4, 2)
# Tokens of full precision that a layer keeps although their page is quantized already, so that as many can be undone.
ROLLBACK_TOKENS = 64
# Keys and values of one page and the bounds that a `MemoryPool` has room for beside them.
BOUND_ROWS = 2


@dataclass(frozen=True)
class PackedFormat:
    """How pages of keys and values are packed.

    Args:
        bits (`int`): 8, 4 or 2.
        group_size (`int`): tokens that share the scale of a key channel, which make a page, and channels that share
            the scale of a value; a multiple of 32. Where it does not divide `head_dim`, the values of a token share
            one scale.
        head_dim (`int`): a multiple of 16.
    Raises:
        ValueError: for other numbers.
    """

    bits: int
    group_size: int
    head_dim: int

    def __post_init__(self):
        check_format(self.bits, self.group_size)
        if self.head_dim % 16:
            raise ValueError(
                f"head_dim must be a multiple of 16 to be packed, got {self.head_dim}; use PagedKVCache instead."
            )

    @property
    def levels(self) -> int:
        return 2**self.bits - 1

    @property
    def planes(self) -> int:
        """Codes in a byte."""
        return 8 // self.bits

    @property
    def value_groups(self) -> int:
        """Scales of one token's values."""
        return self.head_dim // self.group_size if self.head_dim % self.group_size == 0 else 1

    @property
    def packed_bytes(self) -> int:
        return self.group_size * self.head_dim // self.planes

    @property
    def token_bytes(self) -> int:
        """Bytes of keys, and again of values, that a token takes in a page of one head."""
        parameters = 4 * max(self.head_dim, self.value_groups * self.group_size)
        return -(-(self.packed_bytes + parameters) // self.group_size)

    @property
    def record_bytes(self) -> int:
        return self.token_bytes * self.group_size


def check_format(bits: int, group_size: int) -> None:
    """Raises a `ValueError` for what cannot be packed."""
    if isinstance(bits, bool) or bits not in BITS:
        raise ValueError(f"bits must be 8, 4 or 2, got {bits!r}.")
    require_positive("group_size", group_size)
    if group_size % 32:
        raise ValueError(f"group_size must be a multiple of 32, got {group_size}; 64 is usual.")


def kept_tokens(group_size: int, residual_tokens: int) -> int:
    """Places for tokens of full precision in each row of a layer."""
    return residual_tokens + group_size + 2 * rollback_window(group_size)


def rollback_window(group_size: int) -> int:
    """`ROLLBACK_TOKENS` in whole pages."""
    return -(-ROLLBACK_TOKENS // group_size) * group_size


def quantized_tokens(length: int, group_size: int, residual_tokens: int) -> int:
    """How many of `length` tokens are read in quantized form: whole pages, the newest `residual_tokens` excepted."""
    return max(0, length - residual_tokens) // group_size * group_size


def quantized_bytes(
    tokens: int,
    kv_heads: int,
    head_dim: int,
    itemsize: int = 2,
    bits: int = 4,
    group_size: int = 64,
    residual_tokens: int = 128,
) -> int:
    """Bytes that one layer holds for one row of `tokens`: codes, scales, zeros and the full-precision window.

    Args:
        tokens (`int`): in the row; a layer without tokens holds nothing.
        kv_heads, head_dim (`int`): shape of a token's keys.
        itemsize (`int`): bytes of an unquantized entry.
        bits, group_size, residual_tokens: as for `QuantizedKVCache`.
    """
    if not tokens:
        return 0
    form = PackedFormat(bits, group_size, head_dim)
    pages = quantized_tokens(tokens, group_size, residual_tokens) // group_size
    page = 2 * kv_heads * (group_size + BOUND_ROWS // 2) * form.token_bytes
    return pages * page + 2 * kv_heads * kept_tokens(group_size, residual_tokens) * head_dim * itemsize


@dataclass(frozen=True)
class QuantizedSettings:
    """What `QuantizedKVCache` takes besides a config; errors are its."""

    bits: int = 4
    group_size: int = 64
    residual_tokens: int = 128
    rotate: bool = False

    def __post_init__(self):
        check_format(self.bits, self.group_size)
        require_positive("residual_tokens", self.residual_tokens)

    def quantized(self, length: int) -> int:
        """How many of `length` tokens are read packed."""
        return quantized_tokens(length, self.group_size, self.residual_tokens)


def quantize_keys(keys: torch.Tensor, form: PackedFormat) -> torch.Tensor:
    """Records (..., record_bytes) uint8 of pages of keys (..., group_size, head_dim).

    Raises:
        ValueError: if an entry is NaN or infinite.
    """
    codes, scale, zero = _quantize(keys.float(), -2, form.levels)
    return _record(codes.mT, scale.squeeze(-2), zero.squeeze(-2), form, "keys")


def quantize_values(values: torch.Tensor, form: PackedFormat) -> torch.Tensor:
    """Records (..., record_bytes) uint8 of pages of values (..., group_size, head_dim). Raises as `quantize_keys`."""
    codes, scale, zero = _quantize(values.float().unflatten(-1, (form.value_groups, -1)), -1, form.levels)
    scale, zero = (x.squeeze(-1).mT.flatten(-2) for x in (scale, zero))  # (..., groups * tokens)
    return _record(codes.flatten(-2), scale, zero, form, "values")


def dequantize_keys(records: torch.Tensor, form: PackedFormat, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Keys (..., group_size, head_dim) in `dtype` out of records (..., record_bytes)."""
    keys = torch.empty(*records.shape[:-1], form.group_size, form.head_dim, dtype=dtype, device=records.device)
    packed, scale, zero = record_parts(records, form, form.head_dim)
    _unpack_into(keys.mT, packed, form)
    return keys.mul_(scale.unsqueeze(-2)).add_(zero.unsqueeze(-2))


def dequantize_values(records: torch.Tensor, form: PackedFormat, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Values (..., group_size, head_dim) in `dtype` out of records (..., record_bytes)."""
    values = torch.empty(*records.shape[:-1], form.group_size, form.head_dim, dtype=dtype, device=records.device)
    packed, scale, zero = record_parts(records, form, form.value_groups * form.group_size)
    _unpack_into(values, packed, form)
    scale, zero = (x.unflatten(-1, (form.value_groups, -1)).mT.unsqueeze(-1) for x in (scale, zero))
    grouped = values.unflatten(-1, (form.value_groups, -1))
    grouped.mul_(scale).add_(zero)
    return values


def packed_key_bounds(records: torch.Tensor, form: PackedFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """The smallest and largest key that each channel of a page can hold, (..., head_dim) float32, without its codes.

    Args:
        records (`torch.Tensor`): (..., record_bytes), of keys; bounds are of rotated keys where those were packed.
    """
    _, scale, zero = record_parts(records, form, form.head_dim)
    return zero.float(), zero.float() + form.levels * scale.float()


def record_parts(records: torch.Tensor, form: PackedFormat, parameters: int):
    """Packed codes, and the `parameters` scales and zeros in bfloat16, of records (..., record_bytes)."""
    packed = records[..., : form.packed_bytes]
    ends = form.packed_bytes + 2 * parameters, form.packed_bytes + 4 * parameters
    scale = records[..., form.packed_bytes : ends[0]].contiguous().view(torch.bfloat16)
    return packed, scale, records[..., ends[0] : ends[1]].contiguous().view(torch.bfloat16)


def multiply_codes(weights: torch.Tensor, packed: torch.Tensor, form: PackedFormat) -> torch.Tensor:
    """Products (..., rows, lanes) of weights (..., rows, summed) with the codes (summed, lanes) in `packed`, float32.

    Codes are multiplied as they lie: each weight of four with all four codes that stand together, of which the
    products that belong to each other are summed. That is four times the work of a product that takes none to speak
    of, and saves turning the codes around.
    """
    summed = weights.shape[-1]
    quads = summed // form.planes // 4
    raw = packed.unflatten(-1, (1, quads, -1))  # (..., 1, quads, lanes * 4)
    if form.planes == 1:
        codes = raw.float()
    else:
        codes = torch.empty(*raw.shape[:-3], form.planes, *raw.shape[-2:], device=raw.device)
        for plane, part in enumerate(codes.unbind(-3)):
            part.copy_((packed >> (plane * form.bits)).bitwise_and_(form.levels).unflatten(-1, (quads, -1)))
    turned = weights.unflatten(-1, (-1, 4)).mT.flatten(-3, -2)  # (..., rows * 4, summed / 4)
    products = (turned @ codes.flatten(-3, -2)).unflatten(-2, (-1, 4)).unflatten(-1, (-1, 4))
    return products.diagonal(dim1=-3, dim2=-1).sum(-1)


@lru_cache
def hadamard(size: int, device: torch.device) -> torch.Tensor:
    """The normalized Hadamard matrix (size, size) float32 in Sylvester's form: symmetric and its own inverse.

    Raises:
        ValueError: unless `size` is a power of two.
    """
    if size < 1 or size & (size - 1):
        raise ValueError(f"rotate=True needs a head_dim that is a power of two, got {size}; use rotate=False.")
    matrix = torch.ones(1, 1, device=device)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)), 0)
    return matrix / size**0.5


def rotate_states(states: torch.Tensor) -> torch.Tensor:
    """`states` (..., head_dim) turned by the Hadamard matrix, in float32; twice is the identity."""
    return states.float() @ hadamard(states.shape[-1], states.device)


def _quantize(x: torch.Tensor, dim: int, levels: int):
    """Codes as float32, and scale and zero in bfloat16, over groups along `dim`.

    The zero is rounded down and the scale up, so that the stored ones cover every entry, and codes are made with
    those: the error is half a step at most, however coarse they are.
    """
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    zero = _round_towards(low, low.new_full((), float("-inf")), low.__lt__)
    step = (high - zero.float()) / levels
    scale = _round_towards(step, step.new_full((), float("inf")), step.__gt__)
    steps_per_unit = torch.where(scale == 0, 0.0, 1.0 / scale.float())
    return ((x - zero.float()) * steps_per_unit).round_().clamp_(0, levels), scale, zero


def _round_towards(exact: torch.Tensor, end: torch.Tensor, misses) -> torch.Tensor:
    """bfloat16 that is not on the wrong side of `exact`."""
    rounded = exact.bfloat16()
    return torch.where(misses(rounded.float()), torch.nextafter(rounded, end.bfloat16()), rounded)


def _record(codes, scale, zero, form: PackedFormat, what: str) -> torch.Tensor:
    if not bool(torch.isfinite(scale).all()):
        raise ValueError(
            f"{what} with NaN or infinite entries cannot be quantized; find out where they come from, or drop them "
            "with crop() or reset()."
        )
    record = codes.new_zeros(*scale.shape[:-1], form.record_bytes, dtype=torch.uint8)
    record[..., : form.packed_bytes] = _pack(codes, form)
    for index, parameter in enumerate((scale, zero)):
        start = form.packed_bytes + 2 * index * parameter.shape[-1]
        record[..., start : start + 2 * parameter.shape[-1]] = parameter.contiguous().view(torch.uint8)
    return record


def _pack(codes: torch.Tensor, form: PackedFormat) -> torch.Tensor:
    """Bytes (..., packed_bytes) of codes (..., summed, lanes): [4 summed][lane][4 summed], planes in one byte."""
    by_plane = codes.to(torch.uint8).unflatten(-2, (form.planes, -1, 4))  # (..., planes, quads, 4, lanes)
    packed = by_plane.select(-4, 0).clone()
    for plane in range(1, form.planes):
        packed |= by_plane.select(-4, plane) << (plane * form.bits)
    return packed.mT.flatten(-3)


def _unpack_into(target: torch.Tensor, packed: torch.Tensor, form: PackedFormat) -> None:
    """Writes the codes into `target` (..., summed, lanes)."""
    summed, lanes = target.shape[-2:]
    by_quad = packed.unflatten(-1, (summed // form.planes // 4, lanes, 4)).mT  # (..., quads, 4, lanes)
    for plane, part in enumerate(target.unflatten(-2, (form.planes, -1, 4)).unbind(-4)):
        part.copy_(by_quad if form.planes == 1 else (by_quad >> (plane * form.bits)) & form.levels)
