"""Attention as it is defined, in float64, and the cases that every attention implementation is held against.

A case is a shape of call: rows, new tokens, tokens before them, heads, and where padding stands or packed sequences
begin. `inputs_of` makes its tensors, `layout_of` what the mask function would hand over, `dense_reference` the
answer.
"""

from dataclasses import dataclass, replace

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qwen3_vl.optim.attention.attention_layout import AttentionLayout


# Absolute, for values of unit scale: float32 differs by the order of its sums; bfloat16 rounds the output (2**-9 of
# values up to about 3) and, in most kernels, the probabilities.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2.5e-2}


@dataclass(frozen=True)
class AttentionCase:
    """One shape of call.

    Args:
        batch (`int`): rows.
        queries (`int`): new tokens.
        past (`int`): tokens before them, as behind a cache.
        spare (`int`): unused key places after them, as in a preallocated cache.
        groups (`int`): query heads of a KV head.
        padding (`str`): `"none"`, `"left"` or `"right"`; row r then lacks r + 1 tokens, times `padding_step`.
        packed (`tuple[int, ...]`): lengths of the packed sequences, the same in every row but rotated by its number;
            they sum up to `queries`.
        causal (`bool`): false for the vision tower, where every query sees every key.
    """

    batch: int = 1
    queries: int = 33
    past: int = 0
    spare: int = 0
    kv_heads: int = 2
    groups: int = 2
    head_dim: int = 64
    dtype: torch.dtype = torch.float32
    padding: str = "none"
    padding_step: int = 3
    packed: tuple[int, ...] = ()
    causal: bool = True

    @property
    def heads(self) -> int:
        return self.kv_heads * self.groups

    @property
    def seen(self) -> int:
        return self.past + self.queries

    @property
    def keys(self) -> int:
        return self.seen + self.spare

    @property
    def scaling(self) -> float:
        return self.head_dim**-0.5

    def __str__(self) -> str:
        kind = "packed" if self.packed else self.padding
        dtype = str(self.dtype).removeprefix("torch.")
        shape = f"b{self.batch}-q{self.queries}-past{self.past}-spare{self.spare}"
        heads = f"h{self.kv_heads}x{self.groups}x{self.head_dim}"
        return f"{shape}-{heads}-{kind}{'' if self.causal else '-full'}-{dtype}"


def inputs_of(case: AttentionCase, seed: int = 0, requires_grad: bool = False) -> tuple[torch.Tensor, ...]:
    """Query (B, heads, queries, D), key and value (B, KV heads, keys, D), laid out as in the model."""
    generator = torch.Generator().manual_seed(seed)

    def draw(tokens, heads):
        x = torch.randn(case.batch, tokens, heads, case.head_dim, generator=generator, dtype=torch.float64)
        return x.to(case.dtype).transpose(1, 2).requires_grad_(requires_grad)

    return draw(case.queries, case.heads), draw(case.keys, case.kv_heads), draw(case.keys, case.kv_heads)


def valid_of(case: AttentionCase) -> torch.Tensor | None:
    """The padding mask (B, keys), true for real tokens and unused places after them; `None` without padding."""
    if case.padding == "none":
        return None
    missing = ((torch.arange(case.batch) + 1) * case.padding_step)[:, None]
    token = torch.arange(case.keys)[None]
    if case.padding == "left":
        return token >= missing
    return (token < case.seen - missing) | (token >= case.seen)


def segments_of(case: AttentionCase) -> torch.Tensor | None:
    """The number of each token's packed sequence (B, keys) int32; `None` without packing."""
    if not case.packed:
        return None
    if sum(case.packed) != case.queries or case.past or case.spare:
        raise ValueError(f"packed lengths {case.packed} must sum up to {case.queries} tokens without a cache.")
    rows = []
    for row in range(case.batch):
        first = row % len(case.packed)
        lengths = torch.tensor(case.packed[first:] + case.packed[:first])
        rows.append(torch.repeat_interleave(torch.arange(len(lengths)), lengths))
    return torch.stack(rows).int()


def layout_of(case: AttentionCase) -> AttentionLayout | None:
    """What the mask function of the room hands over for this case; `None` where every query sees every key."""
    if not case.causal:
        return None
    return AttentionLayout(case.past, valid_of(case), segments_of(case))


def dense_mask_of(case: AttentionCase) -> torch.Tensor | None:
    """The boolean mask (B or 1, 1, queries, keys), from the definitions and not through [`AttentionLayout`]."""
    if not case.causal:
        return None
    query = torch.arange(case.past, case.seen)[:, None]
    key = torch.arange(case.keys)[None]
    mask = (key <= query)[None, None]
    valid, segments = valid_of(case), segments_of(case)
    if valid is not None:
        mask = mask & valid[:, None, None]
    if segments is not None:
        mask = mask & (segments[:, None, :, None] == segments[:, None, None, :])
    return mask


def dense_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout_or_mask: AttentionLayout | torch.Tensor | None,
    scaling: float | None = None,
) -> torch.Tensor:
    """Attention in float64, differentiable.

    Args:
        query, key, value (`torch.Tensor`): (B, heads, queries, D), (B, KV heads, keys, D) twice.
        layout_or_mask: an [`AttentionLayout`]; a boolean mask that broadcasts to (B, heads, queries, keys), true
            where a query sees a key; an additive mask of that shape; or `None` where every query sees every key.
        scaling (`float`, *optional*): factor on the scores, `D ** -0.5` by default.
    Returns:
        (B, queries, heads, D) in float64; zeros for a query that sees no key.
    """
    groups = query.shape[1] // key.shape[1]
    query, key, value = query.double(), key.double(), value.double()
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if isinstance(layout_or_mask, AttentionLayout):
        layout_or_mask = layout_or_mask.dense(scores.shape[-2], scores.shape[-1])
    if layout_or_mask is not None:
        if layout_or_mask.dtype == torch.bool:
            seen = layout_or_mask.expand_as(scores)
        else:
            # Additive masks of the library block with the lowest number of their dtype.
            seen = (layout_or_mask > torch.finfo(layout_or_mask.dtype).min / 2).expand_as(scores)
            scores = scores + layout_or_mask.double().masked_fill(~seen, 0.0)
        sees_any = seen.any(-1, keepdim=True)
        # Rows without any key keep finite scores, so that neither they nor their gradient become NaN.
        scores = scores.masked_fill(~seen & sees_any, float("-inf"))
        weights = scores.softmax(-1) * sees_any
    else:
        weights = scores.softmax(-1)
    return (weights @ value).transpose(1, 2)


def assert_matches(output: torch.Tensor, expected: torch.Tensor, tolerance: float | None = None) -> None:
    """Shape, no NaN, and values within the tolerance of the output's dtype."""
    assert output.shape == expected.shape, f"shapes {tuple(output.shape)} and {tuple(expected.shape)}"
    assert torch.isfinite(output).all(), "the output holds NaN or infinity"
    tolerance = TOLERANCE[output.dtype] if tolerance is None else tolerance
    difference = (output.double() - expected).abs().max().item()
    assert difference <= tolerance, f"differs by {difference:.3g} from the float64 reference, allowed {tolerance:.3g}"


def perturb_future(case: AttentionCase, tensors: tuple[torch.Tensor, ...], token: int) -> tuple[torch.Tensor, ...]:
    """The same query, with key and value of all tokens after the new token `token` replaced by large other values."""
    query, key, value = (x.detach().clone() for x in tensors)
    key[:, :, case.past + token + 1 :] = 5.0
    value[:, :, case.past + token + 1 :] = -100.0
    return query, key, value


_PACKED = (9, 1, 17, 6)
# Every axis of the issue once at least, not their product: batch, padding, packing, lengths, groups, head dims.
CASES: tuple[AttentionCase, ...] = (
    AttentionCase(),
    AttentionCase(batch=4, groups=1),
    AttentionCase(batch=4, padding="left", groups=4),
    AttentionCase(batch=4, padding="right", groups=8, kv_heads=1, head_dim=128),
    AttentionCase(packed=_PACKED, head_dim=80),
    AttentionCase(batch=4, packed=_PACKED),
    AttentionCase(queries=1, past=70),
    AttentionCase(batch=4, queries=1, past=70, padding="left", head_dim=128),
    AttentionCase(batch=4, queries=1, past=70, padding="right", groups=8, head_dim=80),
    AttentionCase(queries=7, past=41, groups=4),
    AttentionCase(batch=4, queries=7, past=41, padding="left", head_dim=80),
    AttentionCase(queries=19, past=64, spare=13),
    AttentionCase(batch=4, queries=1, past=50, spare=27, padding="left"),
    AttentionCase(queries=130, head_dim=128),
    AttentionCase(batch=4, queries=65, padding="left", padding_step=15, head_dim=80),
    AttentionCase(queries=48, groups=1, head_dim=64, causal=False),
    AttentionCase(batch=4, queries=37, groups=1, head_dim=80, causal=False),
)
ALL_CASES: tuple[AttentionCase, ...] = CASES + tuple(replace(case, dtype=torch.bfloat16) for case in CASES)


class CountOperations(TorchDispatchMode):
    """Names of the operations that run inside."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func).rsplit(".", 1)[0])
        return func(*args, **(kwargs or {}))
