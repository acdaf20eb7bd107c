"""A decoder block that is computed for some of its tokens.

The others keep their residual stream. They do get keys and values, which later queries of the block read as ever: so
every cache and mask stays what it is without routing, at the cost of two products (8% of a 2B block).
"""

from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from ..attention.attention_layout import AttentionLayout
from ..attention.attention_technique import refuse_attention_weights
from ..native.native_attention import has_bf16_products, native_blocks, supports


# Queries that PyTorch computes at once; those to the front need not read the keys behind them.
QUERY_STEP = 256


def checkpointed_block_on_some(layer: nn.Module, hidden_states, computed, gates, **kwargs) -> torch.Tensor:
    """[`block_on_some`], recomputed in the backward pass if the layer is to be; without a cache then, as in stock."""
    if not (getattr(layer, "gradient_checkpointing", False) and layer.training):
        return block_on_some(layer, hidden_states, computed, gates, **kwargs)
    block = partial(block_on_some, layer, **{**kwargs, "past_key_values": None})
    return layer._gradient_checkpointing_func(block, hidden_states, computed, gates)


def block_on_some(
    layer: nn.Module,
    hidden_states: torch.Tensor,
    computed: torch.Tensor,
    gates: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    attention_mask=None,
    past_key_values=None,
    **kwargs,
) -> torch.Tensor:
    """A pre-norm block whose output for the tokens `computed` is `x + gate * (block(x) - x)`, and `x` for the others.

    Args:
        layer (`nn.Module`): with `self_attn`, `mlp` and the two norms.
        hidden_states (`torch.Tensor`): (B, T, hidden size).
        computed (`torch.Tensor`): (B, T) boolean.
        gates (`torch.Tensor`): (B, T).
        position_embeddings: cosine and sine, (B or 1, T, head_dim).
        attention_mask: as the attention implementation of the model gets it.
        past_key_values (`Cache`, *optional*): extended in place by all T tokens.
    Raises:
        ValueError: for a mask of FlexAttention, or if attention weights are asked for.
    """
    refuse_attention_weights(layer.self_attn, "learned_routing", kwargs)
    flat = hidden_states.reshape(-1, hidden_states.shape[-1])
    rows = computed.flatten().nonzero().squeeze(-1)
    normed = layer.input_layernorm(hidden_states)
    attended = _attend(layer.self_attn, normed, computed, rows, position_embeddings, attention_mask, past_key_values)
    if not len(rows):
        return hidden_states.clone()
    before = flat[rows]
    middle = before + attended
    # A leading dimension, as the plain block has one.
    change = attended + layer.mlp(layer.post_attention_layernorm(middle)[None])[0]
    after = before + gates.flatten()[rows, None].to(change.dtype) * change
    return flat.index_copy(0, rows, after).view_as(hidden_states)


def _attend(attention, normed, computed, rows, position_embeddings, mask, cache) -> torch.Tensor:
    """Attention of the tokens at `rows` (M,) of the batch to all, after the output product: (M, hidden size)."""
    batch, length = normed.shape[:2]
    cos, sin = (table.expand(batch, -1, -1) for table in position_embeddings)
    heads = (batch, length, -1, attention.head_dim)
    key = attention.k_norm(attention.k_proj(normed).view(heads)).transpose(1, 2)
    value = attention.v_proj(normed).view(heads).transpose(1, 2)
    key = _rotate(key, cos[:, None], sin[:, None])
    query = _queries(attention, normed.flatten(0, 1)[rows], cos.flatten(0, 1)[rows], sin.flatten(0, 1)[rows])
    if cache is not None:
        extra = {}
        if getattr(_layer_of(cache, attention.layer_idx), "wants_queries", False):
            every = _queries(attention, normed.flatten(0, 1), cos.flatten(0, 1), sin.flatten(0, 1))
            extra["query_states"] = every.view(heads).transpose(1, 2)
        key, value = cache.update(key, value, attention.layer_idx, **extra)
    if not len(rows):
        return normed.new_zeros(0, normed.shape[-1])
    output = _attend_in_rows(attention, query, key, value, computed, mask)
    return attention.o_proj(output.flatten(1))


def _layer_of(cache, index: int):
    layers = getattr(cache, "layers", ())
    return layers[index] if index < len(layers) else None


def _queries(attention, normed: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotated queries (M, heads, head_dim) of (M, hidden size)."""
    query = attention.q_proj(normed)
    query = query.view(len(normed), query.shape[1] // attention.head_dim, attention.head_dim)
    return _rotate(attention.q_norm(query), cos[:, None], sin[:, None])


def _rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat((-second, first), dim=-1) * sin


def _attend_in_rows(attention, query, key, value, computed, mask) -> torch.Tensor:
    """Attention of queries (M, heads, D), those `computed` of the batch in order, as (M, heads, D)."""
    batch, length = computed.shape
    places = computed.long().argsort(dim=1, descending=True, stable=True)
    counts = computed.sum(1)
    widest = int(counts.max())
    places = places[:, :widest]  # (B, N): the computed tokens of a row in order, then others to fill it up
    filled = torch.arange(widest, device=counts.device) < counts[:, None]
    padded = query.new_zeros(batch * widest, *query.shape[1:])
    padded = padded.index_copy(0, filled.flatten().nonzero().squeeze(-1), query)
    padded = padded.view(batch, widest, *query.shape[1:]).transpose(1, 2)
    dropout = attention.attention_dropout if attention.training else 0.0
    mask = _layout_of(mask, length, key.shape[2])
    if isinstance(mask, AttentionLayout) and not dropout and _native_wins(padded, key, value):
        # Rising to the end also where rows are filled up.
        rising = torch.where(filled, places, length - 1) + mask.query_offset
        return native_blocks(padded, key, value, mask, attention.scaling, places=rising)[filled]
    groups = attention.num_key_value_groups
    key, value = (states.repeat_interleave(groups, dim=1) if groups > 1 else states for states in (key, value))
    outputs = []
    for start in range(0, widest, QUERY_STEP):
        own = slice(start, start + QUERY_STEP)
        seen = _mask_of(mask, places[:, own], key.shape[2])
        if seen.dtype == torch.bool:
            seen = seen | ~filled[:, None, own, None]
        keys = seen.shape[-1]
        outputs.append(
            F.scaled_dot_product_attention(
                padded[:, :, own], key[:, :, :keys], value[:, :, :keys], seen, dropout, scale=attention.scaling
            )
        )
    output = torch.cat(outputs, dim=2).transpose(1, 2)
    return output[filled]


def _native_wins(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether our tiles take the tensors and are faster than PyTorch's, which need a dense mask."""
    faster = query.dtype == torch.bfloat16 and has_bf16_products() and not torch.cpu._is_amx_tile_supported()
    return faster and supports(query, key, value)


def _layout_of(mask, length: int, keys: int):
    """The mask of `length` new tokens and `keys` in all as a layout, if it is one; else the mask."""
    if isinstance(mask, torch.Tensor) and mask.ndim == 2:
        return AttentionLayout(keys - length, mask[:, -keys:].bool())
    if mask is None:  # what SDPA makes of that: a single query sees all, several begin at the first key
        return AttentionLayout(keys - 1 if length == 1 else 0)
    return mask


def _mask_of(mask, places: torch.Tensor, keys: int) -> torch.Tensor:
    """What the new tokens at `places` (B, N) see, (B, 1 or heads, N, keys): boolean, or what is added to the scores.

    Where the mask is known to be causal, the keys behind the last of the tokens are left out.
    """
    if isinstance(mask, AttentionLayout):
        ends = places + mask.query_offset
        keys = int(ends.max()) + 1
        seen = (torch.arange(keys, device=places.device) <= ends[..., None])[:, None]
        if mask.valid is not None:
            seen = seen & mask.valid[:, None, None, :keys]
        if mask.segments is not None:
            own = mask.segments.gather(1, places)
            seen = seen & (own[:, None, :, None] == mask.segments[:, None, None, :keys])
        return seen
    if not isinstance(mask, torch.Tensor):
        raise ValueError(
            f"learned_routing cannot read a mask of type {type(mask).__name__}; load the model with "
            "attn_implementation='sdpa' or one of ours."
        )
    mask = mask[..., :keys].expand(len(places), -1, -1, -1)
    return mask.gather(2, places[:, None, :, None].expand(-1, mask.shape[1], -1, keys))
