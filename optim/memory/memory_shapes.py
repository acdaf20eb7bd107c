"""The widths of a model and the bytes of its weights, from its configuration or from the model itself."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class ModelShapes:
    """What memory is counted from; widths in entries.

    Args:
        hidden, inner, layers, heads, kv_heads, head_dim, vocabulary (`int`): of the decoder.
        experts_per_token, expert_inner (`int`): of sparse layers, 0 for a dense model.
        vision_hidden, vision_inner, vision_layers, vision_heads, merge, deepstack, pixel_width (`int`): of the
            tower; `deepstack` counts levels, `pixel_width` the values of a patch, `merge` the patches of a token.
        text_weights, vision_weights (`int`): parameters.
    """

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    experts_per_token: int
    expert_inner: int
    vision_hidden: int
    vision_inner: int
    vision_layers: int
    vision_heads: int
    merge: int
    deepstack: int
    pixel_width: int
    text_weights: int
    vision_weights: int

    @classmethod
    def of_config(cls, config) -> "ModelShapes":
        """Raises a `ValueError` for a configuration that is not one of Qwen3-VL."""
        text, vision = getattr(config, "text_config", None), getattr(config, "vision_config", None)
        if text is None or not hasattr(vision, "deepstack_visual_indexes"):
            raise ValueError(
                f"a plan needs the configuration of a Qwen3-VL model, got {type(config).__name__}; pass a "
                "Qwen3VLConfig, a model, or a model folder's config."
            )
        sparse = len(sparse_layers(text))
        return cls(
            hidden=text.hidden_size,
            inner=text.intermediate_size if sparse < text.num_hidden_layers else 0,
            layers=text.num_hidden_layers,
            heads=text.num_attention_heads,
            kv_heads=text.num_key_value_heads,
            head_dim=text.head_dim,
            vocabulary=text.vocab_size,
            experts_per_token=text.num_experts_per_tok if sparse else 0,
            expert_inner=text.moe_intermediate_size if sparse else 0,
            vision_hidden=vision.hidden_size,
            vision_inner=vision.intermediate_size,
            vision_layers=vision.depth,
            vision_heads=vision.num_heads,
            merge=vision.spatial_merge_size**2,
            deepstack=len(vision.deepstack_visual_indexes),
            pixel_width=vision.in_channels * vision.temporal_patch_size * vision.patch_size**2,
            text_weights=text_weight_count(text, config.tie_word_embeddings),
            vision_weights=vision_weight_count(vision),
        )

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Entries of one token's keys, and again of its values."""
        return self.kv_heads * self.head_dim


def sparse_layers(text) -> list[int]:
    """The decoder layers that have experts."""
    if not getattr(text, "num_experts", 0):
        return []
    step, dense = text.decoder_sparse_step, text.mlp_only_layers or []
    return [index for index in range(text.num_hidden_layers) if (index + 1) % step == 0 and index not in dense]


def text_weight_count(text, tied: bool) -> int:
    """Parameters of the decoder with its head, which a tied model shares with the embedding."""
    hidden, heads, kv = text.hidden_size, text.num_attention_heads, text.num_key_value_heads
    q_width, kv_width = heads * text.head_dim, kv * text.head_dim
    attention = 2 * hidden * (q_width + kv_width) + 2 * text.head_dim
    if text.attention_bias:
        attention += q_width + 2 * kv_width + hidden
    layer = attention + 2 * hidden
    sparse = len(sparse_layers(text))
    dense_mlp = 3 * hidden * text.intermediate_size
    experts = text.num_experts * (hidden + 3 * hidden * text.moe_intermediate_size) if sparse else 0
    mlps = (text.num_hidden_layers - sparse) * dense_mlp + sparse * experts
    embeddings = text.vocab_size * hidden * (1 if tied else 2)
    return text.num_hidden_layers * layer + mlps + embeddings + hidden


def vision_weight_count(vision) -> int:
    """Parameters of the tower with its mergers."""
    hidden, inner = vision.hidden_size, vision.intermediate_size
    joined = hidden * vision.spatial_merge_size**2
    block = 4 * hidden + 4 * hidden * hidden + 4 * hidden + 2 * hidden * inner + inner + hidden
    patch = hidden * (vision.in_channels * vision.temporal_patch_size * vision.patch_size**2 + 1)
    linear = joined * joined + joined + joined * vision.out_hidden_size + vision.out_hidden_size
    mergers = linear + 2 * hidden + len(vision.deepstack_visual_indexes) * (linear + 2 * joined)
    return vision.depth * block + patch + mergers + vision.num_position_embeddings * hidden


def model_config(model: Any):
    """The configuration of a model, or the configuration that was given itself."""
    return model.config if isinstance(model, torch.nn.Module) else model


def weight_bytes(model: Any, itemsize: int) -> tuple[int, int]:
    """Bytes of the decoder with its head, and of the tower.

    Args:
        model: a model, whose tensors are counted, each storage once; or a configuration.
        itemsize (`int`): bytes of a parameter, for a configuration.
    """
    if not isinstance(model, torch.nn.Module):
        shapes = ModelShapes.of_config(model)
        return shapes.text_weights * itemsize, shapes.vision_weights * itemsize
    seen: dict[Any, tuple[int, bool]] = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        # Tensors on the meta device have no address; there, what is tied is the same object.
        storage = tensor.untyped_storage()
        key = id(tensor) if tensor.device.type == "meta" else (tensor.device, storage.data_ptr())
        seen[key] = storage.nbytes(), "visual." in name
    text, vision = (sum(size for size, visual in seen.values() if visual is wanted) for wanted in (False, True))
    return text, vision


def weight_dtype(model: Any) -> torch.dtype:
    """The dtype of a model's activations: its own, or what a configuration says, bfloat16 where it says nothing."""
    if isinstance(model, torch.nn.Module):
        return model.dtype
    for part in (model, model.text_config):
        named = getattr(part, "dtype", None)
        if named is not None:
            return getattr(torch, named) if isinstance(named, str) else named
    return torch.bfloat16
