"""Our kernels as operators that a compiled graph may call, and the attention implementation that calls them."""

import torch

from ..attention.attention_exact import exact_attention_forward
from ..attention.attention_kernels import attend_decode
from ..attention.attention_layout import AttentionLayout, register_attention
from ..native.native_linear import MOST_ROWS, native_linear


NAME = "qwen3_vl_compiled"


# An operator lives as long as its definition.
_operators: list = []


def define_operators() -> None:
    """Makes `torch.ops.qwen3_vl.few_rows_linear` and `.static_cache_attention`, when first needed.

    The table is the process's, and this code may be loaded twice, from the package and from a Hub copy: the second
    takes what the first made.
    """
    if not hasattr(torch.ops.qwen3_vl, "static_cache_attention"):
        _operators.extend((_linear_operator(), _attention_operator()))


def _linear_operator():
    """`(x (..., inputs), weight, bias or None) -> (..., outputs)` for few rows on a CPU with a compiler."""

    @torch.library.custom_op("qwen3_vl::few_rows_linear", mutates_args=())
    def few_rows_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return native_linear(x.contiguous(), weight, bias)

    @few_rows_linear.register_fake
    def _(x, weight, bias):
        return x.new_empty(*x.shape[:-1], weight.shape[0])

    return few_rows_linear


def _attention_operator():
    """Attention of one new token a row to what a static cache holds; (B, 1, H, D).

    `state` has two numbers, how many entries the cache holds and whether rows are padded: in a tensor, so that one
    graph serves all. `seen` (B, 1, 1, S) tells padding.
    """

    @torch.library.custom_op("qwen3_vl::static_cache_attention", mutates_args=())
    def static_cache_attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        state: torch.Tensor,
        seen: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        held, padded = state.tolist()
        layout = AttentionLayout(held - 1, seen[:, 0, 0, :held] if padded else None, None)
        return attend_decode(query, key[:, :, :held], value[:, :, :held], layout, scaling).contiguous()

    @static_cache_attention.register_fake
    def _(query, key, value, state, seen, scaling):
        batch, heads, queries, dim = query.shape
        return query.new_empty(batch, queries, heads, dim)

    return static_cache_attention


def compiled_attention_forward(
    module, query, key, value, attention_mask, scaling=None, dropout=0.0, is_causal=None, cache_state=None, **kwargs
):
    """Exact attention; in a compiled decoding step on a CPU by an operator.

    Args:
        cache_state (`torch.Tensor`, *optional*): how many entries the cache holds, and 1 where rows are padded; given
            by the compiled step alone.
    """
    if cache_state is None or query.device.type != "cpu":
        return exact_attention_forward(
            module, query, key, value, attention_mask, scaling, dropout, is_causal=is_causal, **kwargs
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return torch.ops.qwen3_vl.static_cache_attention(query, key, value, cache_state, attention_mask, scaling), None


compiled_attention_forward.reads_cache_layer = True
register_attention(NAME, compiled_attention_forward)


def fits_compiled_linear(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the native product takes these, read off shapes and dtypes alone, as a traced graph must."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype
        and x.dtype in (torch.float32, torch.bfloat16)
        and 0 < x.numel() <= MOST_ROWS * weight.shape[1]
    )
