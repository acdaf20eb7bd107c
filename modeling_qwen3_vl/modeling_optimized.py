"""The decoder's attention with a mechanism of its own, in place of the one that the whole model names."""

import copy

import torch
from transformers.cache_utils import Cache

from ..configuration.configuration_qwen3_vl import Qwen3VLTextConfig
from ..optim.attention.attention_layout import AttentionLayout
from ..optim.attention.attention_mechanisms import ADAPTIVE, AttentionMechanisms
from ..optim.attention.attention_technique import refuse_attention_weights
from ..optim.attention.block_map import remembered
from ..optim.attention.rotary_faster import FasterRotation
from .modeling_text import Qwen3VLAttention


class OptimizedQwen3VLAttention(Qwen3VLAttention):
    """[`Qwen3VLAttention`] that computes by `mechanism`, whatever `attn_implementation` the model has.

    For single layers, or for a model whose `attn_implementation` must stay. Parameters and their names are those of
    the plain module. Exact mechanisms give the plain module's results. Rotation adds in place, bit-equal.

    Masks are the model's, made for its own implementation. Padding flags, [`AttentionLayout`]s and no mask at all suit
    every mechanism. A dense boolean mask, as "sdpa" gets for padded batches, is read back into padding flags where it
    says no more than that; exact mechanisms take any other dense mask as it is, and sparse ones raise. A mechanism
    that asks for `visual_runs` gets what the model hands on.

    Args:
        mechanism (`str`): a name or short form of [`AttentionMechanisms`].
        settings (`dict` or settings object, *optional*): of the mechanism.
    Raises:
        ValueError: for an unknown mechanism or setting.
    """

    def __init__(self, config: Qwen3VLTextConfig, layer_idx: int, mechanism: str = "qwen3_vl_adaptive", settings=None):
        chosen = AttentionMechanisms.get(mechanism)
        if settings is None or isinstance(settings, dict):
            settings = chosen.settings(**(settings or {}))
        # The implementation is looked up in the module's config, which the layers of a model share.
        own_config = copy.copy(config)
        own_config._attn_implementation_internal = chosen.name
        super().__init__(own_config, layer_idx)
        self.model_config = config
        self.rotate = FasterRotation(self)
        self.attention_settings = settings.of_layer(layer_idx) if chosen.name == ADAPTIVE else {chosen.name: settings}

    @property
    def mechanism(self) -> str:
        """The full name of the mechanism."""
        return self.config._attn_implementation

    @classmethod
    def from_attention(
        cls, module: Qwen3VLAttention, mechanism: str = "qwen3_vl_adaptive", settings=None
    ) -> "OptimizedQwen3VLAttention":
        """An attention module with the projections and norms of `module`, which are shared and not copied.

        `layer.self_attn = OptimizedQwen3VLAttention.from_attention(layer.self_attn)` replaces a layer's.
        """
        with torch.device("meta"):
            made = cls(getattr(module, "model_config", module.config), module.layer_idx, mechanism, settings)
        for name, child in module.named_children():
            setattr(made, name, child)
        earlier = getattr(module, "attention_settings", {})
        own = made.attention_settings
        made.attention_settings = {**own, **earlier} if settings is None else {**earlier, **own}
        made.attention_dropout = module.attention_dropout
        return made.train(module.training)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | AttentionLayout | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, None]:
        """As the plain module's.

        Raises:
            ValueError: for a mask of FlexAttention, which hides what it says in a function; if attention weights are
                asked for; and what the mechanism raises.
        """
        weights_asked = kwargs.get("output_attentions", getattr(self.model_config, "output_attentions", False))
        refuse_attention_weights(self, self.mechanism, {"output_attentions": weights_asked})
        if kwargs.get("is_causal", self.is_causal):
            # Entries, which are fewer than tokens where a cache evicts.
            seen = 0 if past_key_values is None else past_key_values.get_query_offset(self.layer_idx)
            attention_mask = as_layout(attention_mask, hidden_states.shape[1], seen, position_embeddings[0])
        return super().forward(
            hidden_states,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )


def as_layout(
    mask, queries: int, seen: int | torch.Tensor, shared: torch.Tensor | None = None
) -> AttentionLayout | torch.Tensor:
    """A mask of another implementation, for causal attention of `queries` new tokens behind `seen` ones, as ours.

    Args:
        mask: `None`, padding flags (B, keys), a dense mask (B or 1, heads or 1, queries, keys), or a layout.
        shared (`torch.Tensor`, *optional*): any tensor that all layers of a forward get. Without a mask the layout is
            kept with it, so that patterns which depend on the layout are made once.
    Returns:
        A layout where the mask says no more than causality and padding, else the mask.
    """
    if mask is None:
        # Not by the number of keys: a preallocated cache has unused ones.
        seen = int(seen)
        if shared is None or torch.compiler.is_compiling():
            return AttentionLayout(seen)
        return remembered(shared, ("layout", seen), lambda: AttentionLayout(seen))
    if isinstance(mask, AttentionLayout):
        return mask
    if not isinstance(mask, torch.Tensor):
        raise ValueError(
            f"a mask of type {type(mask).__name__} cannot be read; load the model with attn_implementation='sdpa' or "
            "one of ours."
        )
    if mask.dtype != torch.bool or mask.ndim != 4 or mask.shape[1] != 1 or torch.compiler.is_compiling():
        return mask
    layout = remembered(mask, ("layout", queries), lambda: _read_back(mask, queries, int(seen)))
    return mask if layout is None else layout


def _read_back(mask: torch.Tensor, queries: int, seen: int) -> AttentionLayout | None:
    """The layout that a boolean mask (B, 1, queries, keys) spells out, if there is one."""
    keys = mask.shape[3]
    if keys < seen + queries or mask.shape[2] != queries:
        return None
    # Only the last query sees all that is no padding; what comes after it is hidden by causality. A copy, since a view
    # would keep the mask alive, with which the layout is to go.
    valid = mask[:, 0, -1].clone()
    layout = AttentionLayout(seen, None if bool(valid[:, : seen + queries].all()) else valid)
    same = queries == 1 or torch.equal(layout.dense(queries, keys, mask.device).expand_as(mask), mask)
    return layout if same else None
