"""Exact attention by the fastest kernel at hand: `attn_implementation="qwen3_vl_exact"`.

Decoding reads every key once for all query heads that share it, straight from a paged cache where there is one.
Prefill on a CPU runs our tiles or PyTorch's, on a GPU FlashAttention 2 (arXiv 2307.08691) where it is installed.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right
from transformers.utils import is_flash_attn_2_available

from .attention_kernels import attend_blocks, attend_decode, is_decoding, reads_itself
from .attention_layout import AttentionLayout, check_layout, register_attention
from .attention_technique import AttentionTechnique, refuse_attention_weights


NAME = "qwen3_vl_exact"


def exact_attention_forward(
    module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    kv_layer=None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Exact attention.

    Gradients, dropout, `torch.compile` and dense masks go through PyTorch's scaled dot product attention.

    Args:
        query (`torch.Tensor`): (B, H, T, D).
        key, value (`torch.Tensor`): (B, HK, S, D); the new tokens alone where `kv_layer` holds the history.
        attention_mask: an [`AttentionLayout`], a dense mask (B, 1, T, S), or padding flags (B, S).
        kv_layer (*optional*): a cache layer that is read in place, see [`find_history`].
    Returns:
        (B, T, H, D), and `None` for the weights.
    Raises:
        ValueError: if attention weights are asked for, or a mask does not fit.
    """
    refuse_attention_weights(module, NAME, kwargs)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    key, value, kv_layer = find_history(key, value, kv_layer)
    keys = key.shape[2] if kv_layer is None else kv_layer.get_seq_length()
    mask = check_layout(attention_mask, query, key, causal, keys)
    if isinstance(mask, torch.Tensor) or dropout or _is_traced_or_trained(query, key, value):
        if kv_layer is not None:
            key, value = kv_layer.dense()
        return attend_with_sdpa(query, key, value, mask, scaling, dropout), None
    if query.device.type == "cuda":
        return _attend_on_gpu(query, key, value, mask, scaling, kv_layer), None
    attend = attend_decode if is_decoding(query, key.shape[1]) else attend_blocks
    return attend(query, key, value, mask, scaling, kv_layer=kv_layer), None


exact_attention_forward.reads_cache_layer = True


def find_history(key: torch.Tensor, value: torch.Tensor, kv_layer):
    """Where a call finds its keys and values.

    Args:
        key, value (`torch.Tensor`): (B, HK, S, D), what the cache gave back.
        kv_layer (*optional*): a cache layer to read in place; see [`update_cache`].
    Returns:
        keys, values, and the layer that holds more than those, or `None`.
    """
    if kv_layer is None or kv_layer.get_seq_length() <= key.shape[2]:
        return key, value, None
    return key, value, kv_layer


def attend_with_sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: AttentionLayout | torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
) -> torch.Tensor:
    """PyTorch's attention, with the causal flag where that says all and a dense mask elsewhere: (B, T, H, D)."""
    queries, keys = query.shape[2], key.shape[2]
    causal = isinstance(mask, AttentionLayout) and mask.plainly_causal and mask.query_offset + queries == keys
    unmasked = mask is None or (causal and queries == 1)
    flag = causal and queries == keys and not unmasked
    dense = None
    if not unmasked and not flag:
        lower_right = causal and query.device.type == "cuda"
        dense = causal_lower_right(queries, keys) if lower_right else _dense(mask, queries, keys, query)
    group = query.shape[1] // key.shape[1]
    if group > 1 and not (query.device.type == "cuda" and dense is None):
        # Elsewhere `enable_gqa` is slower than the copy, or not there.
        key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
        group = 1
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=dense, dropout_p=dropout, is_causal=flag, scale=scaling, enable_gqa=group > 1
    )
    if isinstance(dense, torch.Tensor) and dense.dtype == torch.bool and type(dense) is torch.Tensor:
        out = out.masked_fill(~dense.any(-1, keepdim=True), 0.0)
    return out.transpose(1, 2)


def _dense(mask: AttentionLayout | torch.Tensor, queries: int, keys: int, query: torch.Tensor) -> torch.Tensor:
    if isinstance(mask, AttentionLayout):
        return mask.dense(queries, keys, query.device)
    return mask[..., :keys]


def _is_traced_or_trained(*tensors: torch.Tensor) -> bool:
    if torch.compiler.is_compiling():
        return True
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _attend_on_gpu(query, key, value, layout, scaling, kv_layer) -> torch.Tensor:
    if reads_itself(kv_layer):
        return kv_layer.attend(query, layout, scaling)
    if kv_layer is not None:
        key, value = kv_layer.dense()
    half = query.dtype in (torch.float16, torch.bfloat16)
    plain = layout is None or (layout.plainly_causal and layout.query_offset + query.shape[2] == key.shape[2])
    if plain and half and query.shape[-1] <= 256 and is_flash_attn_2_available():
        from flash_attn import flash_attn_func

        states = (x.transpose(1, 2) for x in (query, key, value))
        return flash_attn_func(*states, softmax_scale=scaling, causal=layout is not None)
    if is_decoding(query, key.shape[1]):
        return attend_decode(query, key, value, layout, scaling)
    return attend_with_sdpa(query, key, value, layout, scaling)


@dataclass(frozen=True)
class ExactSettings:
    """Nothing to choose."""


class FlashAttention2(AttentionTechnique):
    """Exact attention of decoder and vision tower by the fastest kernel at hand, selected as `qwen3_vl_exact`."""

    name = NAME
    exact = True
    settings_class = ExactSettings


register_attention(NAME, exact_attention_forward)
