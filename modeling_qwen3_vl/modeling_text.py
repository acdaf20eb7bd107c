"""The decoder: grouped-query attention with QK-norm, interleaved M-RoPE, SwiGLU, and DeepStack injection.

Sources: Qwen3 Technical Report (arXiv 2505.09388), Qwen3-VL Technical Report (arXiv 2511.21631), DeepStack
(arXiv 2406.04334).
"""

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.integrations import use_kernel_forward_from_hub
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ..configuration.configuration_qwen3_vl import Qwen3VLTextConfig
from .masks_qwen3_vl import make_masks
from .modeling_base import Qwen3VLPreTrainedModel, eager_attention_forward, rotate_half
from .mrope_qwen3_vl import forget_runs_after, number_runs, remember_visual_runs, visual_runs


@use_kernel_forward_from_hub("RMSNorm")
class Qwen3VLTextRMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, computed in float32."""

    def __init__(self, hidden_size: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        x = hidden_states.float()
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * x.to(hidden_states.dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


class Qwen3VLRotaryEmbedding(nn.Module):
    """Cosines and sines of interleaved M-RoPE.

    Every rotary frequency follows one of three axes. Height takes frequencies 1, 4, 7, ..., width 2, 5, 8, ..., up
    to their share in `mrope_section`, and time takes the rest, so that each axis sees high and low frequencies.
    """

    def __init__(self, config: Qwen3VLTextConfig):
        super().__init__()
        self.config = config
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = config.rope_parameters["rope_type"]
        self.mrope_section = config.rope_parameters.get("mrope_section", [24, 20, 20])
        compute = self.compute_default_rope_parameters
        if self.rope_type != "default":
            compute = ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, self.attention_scaling = compute(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config, device=None, **kwargs) -> tuple[torch.Tensor, float]:
        """Inverse wavelengths (head_dim / 2,) in radians a position, and the factor on cosine and sine."""
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim
        return 1.0 / (config.rope_parameters["rope_theta"] ** exponents).to(device), 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions to rotations.

        Args:
            x (`torch.Tensor`): gives device and dtype.
            position_ids (`torch.Tensor`): (3, B, T), positions in time, height and width.
        Returns:
            cosine and sine, each (B, T, head_dim) in `x.dtype`.
        """
        inv_freq = self.inv_freq.to(device=x.device, dtype=torch.float)
        by_axis = position_ids.expand(3, -1, -1)[..., None].float() * inv_freq
        angles = by_axis[0]
        for axis in (1, 2):
            own = slice(axis, 3 * self.mrope_section[axis], 3)
            angles[..., own] = by_axis[axis, ..., own]
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return torch.cat((cos, cos), dim=-1).to(x.dtype), torch.cat((sin, sin), dim=-1).to(x.dtype)


def apply_rotary_pos_emb(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotates queries and keys.

    Args:
        q, k (`torch.Tensor`): (B, heads, T, D), or (B, T, heads, D) with `unsqueeze_dim=2`.
        cos, sin (`torch.Tensor`): (B, T, D).
        unsqueeze_dim (`int`): where the dimension of heads is put into `cos` and `sin`.
    """
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


class Qwen3VLAttention(nn.Module):
    """Causal self-attention; the implementation is looked up by name at every call (port 1).

    `rotate` turns queries and keys by their positions; a technique may put an equal, faster function in its place.
    """

    rotate = staticmethod(apply_rotary_pos_emb)

    def __init__(self, config: Qwen3VLTextConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True

        q_width, kv_width = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_width, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=config.attention_bias)
        self.o_proj = nn.Linear(q_width, config.hidden_size, bias=config.attention_bias)
        self.q_norm = Qwen3VLTextRMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.k_norm = Qwen3VLTextRMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attends to the new tokens and to what the cache holds.

        Args:
            hidden_states (`torch.Tensor`): (B, T, hidden size).
            position_embeddings: cosine and sine of [`Qwen3VLRotaryEmbedding`].
            attention_mask: what the mask function registered under the implementation's name returned.
            past_key_values (`Cache`, *optional*): extended in place by the T new tokens.
        Returns:
            output (B, T, hidden size), and the attention weights if the implementation gives them.
        """
        shape = hidden_states.shape[:-1]
        heads = (*shape, -1, self.head_dim)
        query = self.q_norm(self.q_proj(hidden_states).view(heads)).transpose(1, 2)
        key = self.k_norm(self.k_proj(hidden_states).view(heads)).transpose(1, 2)
        value = self.v_proj(hidden_states).view(heads).transpose(1, 2)
        query, key = self.rotate(query, key, *position_embeddings)

        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        if past_key_values is not None:
            key, value, kwargs = update_cache(past_key_values, query, key, value, self.layer_idx, attend, kwargs)
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(output.reshape(*shape, -1).contiguous()), weights


def update_cache(
    cache: Cache, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer_idx: int, attend, kwargs: dict
):
    """Extends a cache (port 2) and returns keys, values and keywords for the attention function.

    An attention function that `reads_cache_layer` and a layer with a `reader` meet without copying the history: the
    function gets the reader as `kv_layer`, and as keys and values what the layer has at hand, the new ones at least.
    A layer that `wants_queries` is given those of the new tokens.
    """
    layer = cache.layers[layer_idx] if layer_idx < len(cache.layers) else None
    extra = {"query_states": query} if getattr(layer, "wants_queries", False) else {}
    trained = torch.is_grad_enabled() and key.requires_grad  # the history in the pages has no gradient: say so
    in_place = getattr(attend, "reads_cache_layer", False) and not trained
    if not in_place or getattr(layer, "reader", None) is None:
        return *cache.update(key, value, layer_idx, **extra), kwargs
    key, value = cache.update(key, value, layer_idx, dense=False, **extra)
    return key, value, {**kwargs, "kv_layer": layer.reader}


class Qwen3VLTextMLP(nn.Module):
    """SwiGLU feed-forward layer."""

    def __init__(self, config: Qwen3VLTextConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Qwen3VLTextDecoderLayer(GradientCheckpointingLayer):
    """Pre-norm attention and feed-forward, each with a residual connection."""

    def __init__(self, config: Qwen3VLTextConfig, layer_idx: int):
        super().__init__()
        self.self_attn = Qwen3VLAttention(config, layer_idx)
        self.mlp = self.make_mlp(config, layer_idx)
        self.input_layernorm = Qwen3VLTextRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Qwen3VLTextRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def make_mlp(self, config: Qwen3VLTextConfig, layer_idx: int) -> nn.Module:
        return Qwen3VLTextMLP(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> torch.Tensor:
        attended, _ = self.self_attn(
            hidden_states=self.input_layernorm(hidden_states),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class Qwen3VLTextModel(Qwen3VLPreTrainedModel):
    """The decoder without its head."""

    config_class = Qwen3VLTextConfig
    input_modalities = ("text",)
    _can_record_outputs = {"hidden_states": Qwen3VLTextDecoderLayer, "attentions": Qwen3VLAttention}
    layer_class = Qwen3VLTextDecoderLayer
    output_class = BaseModelOutputWithPast

    def __init__(self, config: Qwen3VLTextConfig):
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(self.layer_class(config, index) for index in range(config.num_hidden_layers))
        self.norm = Qwen3VLTextRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Qwen3VLRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        visual_pos_masks: torch.Tensor | None = None,
        deepstack_visual_embeds: list[torch.Tensor] | None = None,
        later_shortening=None,
        **kwargs,
    ) -> tuple | BaseModelOutputWithPast:
        """Runs the decoder over new tokens.

        Args:
            input_ids (`torch.LongTensor`, *optional*): (B, T). Either this or `inputs_embeds` (B, T, hidden size).
            attention_mask (`torch.Tensor`, *optional*): (B, tokens seen + T), 1 for real tokens; or a prepared 4-D
                mask, passed on as it is.
            position_ids (`torch.LongTensor`, *optional*): (B, T); or (3, B, T) with time, height and width; or
                (4, B, T) with plain positions in front, from which packed rows are told apart.
            visual_pos_masks (`torch.Tensor`, *optional*): (B, T) boolean, true where a visual token stands.
            deepstack_visual_embeds (`list[torch.Tensor]`, *optional*): one (visual tokens, hidden size) tensor for
                each of the first layers, added to that layer's output.
            later_shortening ([`LaterShortening`], *optional*): leaves tokens out in front of its layer.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds.")
        if use_cache and past_key_values is None and not torch.jit.is_tracing():
            past_key_values = DynamicCache(config=self.config)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)

        text_position_ids, position_ids = self._split_positions(position_ids, inputs_embeds, past_key_values)
        implementations = {layer.self_attn.config._attn_implementation for layer in self.layers}
        reads_runs, runs = any(map(reads_visual_runs, implementations)), None
        if reads_runs or getattr(past_key_values, "wants_visual_runs", False):
            runs = note_visual_runs(inputs_embeds, visual_pos_masks, past_key_values)
        all_runs = runs
        masks, runs = make_masks(
            self.config, inputs_embeds, attention_mask, past_key_values, text_position_ids, len(self.layers), all_runs
        )
        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        deepstack = deepstack_visual_embeds or []
        visual_rows = visual_pos_masks.flatten().nonzero().squeeze(-1) if len(deepstack) else None

        for index, layer in enumerate(self.layers):
            if later_shortening is not None and index == later_shortening.layer:
                hidden_states, position_embeddings, masks[index:], runs[index:] = later_shortening.enter(
                    self.config, layer, len(self.layers) - index, hidden_states, position_embeddings, all_runs
                )
            if reads_runs:
                kwargs["visual_runs"] = runs[index]
            hidden_states = layer(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=masks[index],
                position_ids=text_position_ids,
                past_key_values=past_key_values,
                **kwargs,
            )
            if index < len(deepstack):
                # Autograd, and whoever hooked the layer to record it, need its own output untouched.
                in_place = not torch.is_grad_enabled() and not layer._forward_hooks
                hidden_states = add_at_rows(hidden_states, visual_rows, deepstack[index], in_place)

        return self.output_class(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)

    def _split_positions(self, position_ids, inputs_embeds, past_key_values):
        """Plain positions (B, T) or `None`, and M-RoPE positions (3, B, T)."""
        batch, length = inputs_embeds.shape[:2]
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(length, device=inputs_embeds.device) + seen).expand(batch, -1)
        if position_ids.ndim == 2:
            return position_ids, position_ids.expand(3, -1, -1)
        if position_ids.shape[0] == 4:
            return position_ids[0], position_ids[1:]
        return None, position_ids


def reads_visual_runs(implementation: str) -> bool:
    """Whether an attention implementation asks which tokens are of which picture."""
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
    return getattr(attend, "reads_visual_runs", False)


@torch.compiler.disable
def note_visual_runs(inputs_embeds, visual_pos_masks, past_key_values: Cache | None) -> torch.Tensor:
    """The picture or frame of every token, 0 for text, of what the cache holds and of the new: (B, tokens) int32."""
    batch, length = inputs_embeds.shape[:2]
    seen = 0 if past_key_values is None else int(past_key_values.get_seq_length())
    if past_key_values is not None:
        forget_runs_after(past_key_values, seen)
    if visual_pos_masks is None:
        return visual_runs(past_key_values, seen + length, batch, inputs_embeds.device)
    if past_key_values is None:
        return number_runs(visual_pos_masks, visual_runs(None, 0, batch, inputs_embeds.device))
    remember_visual_runs(past_key_values, seen, visual_pos_masks)
    return visual_runs(past_key_values, seen + length, batch, inputs_embeds.device)


def add_at_rows(
    hidden_states: torch.Tensor, rows: torch.Tensor, features: torch.Tensor, in_place: bool
) -> torch.Tensor:
    """Adds `features` (R, H) to the R `rows` of `hidden_states` (B, T, H), counted over batch and time."""
    rows = rows.to(hidden_states.device)
    features = features.to(hidden_states.device, hidden_states.dtype)
    flat = hidden_states.view(-1, hidden_states.shape[-1])
    if in_place:
        flat.index_add_(0, rows, features)
        return hidden_states
    return flat.index_add(0, rows, features).view_as(hidden_states)
