"""Configurations of the dense Qwen3-VL models: vision tower, decoder, and both together.

Field names, defaults and spellings are those of the official `config.json` files, so that any of them loads
unchanged. Source: Qwen3-VL Technical Report, arXiv 2511.21631, and the published configurations.
"""

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec
from transformers.modeling_rope_utils import RopeParameters


DENSE_TENSOR_PARALLEL_PLAN = {
    "layers.*.self_attn.q_proj": "colwise",
    "layers.*.self_attn.k_proj": "colwise",
    "layers.*.self_attn.v_proj": "colwise",
    "layers.*.self_attn.o_proj": "rowwise",
    "layers.*.mlp.gate_proj": "colwise",
    "layers.*.mlp.up_proj": "colwise",
    "layers.*.mlp.down_proj": "rowwise",
}

PIPELINE_PARALLEL_PLAN = {
    "embed_tokens": (["input_ids"], ["inputs_embeds"]),
    "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
    "norm": (["hidden_states"], ["hidden_states"]),
}


@strict
class Qwen3VLVisionConfig(PreTrainedConfig):
    """Vision tower.

    Args:
        depth (`int`): number of transformer blocks.
        hidden_size (`int`): width of a patch inside the tower.
        out_hidden_size (`int`): width of a visual token handed to the decoder; equals the decoder's `hidden_size`.
        patch_size (`int`): side of a square patch, in pixels.
        temporal_patch_size (`int`): video frames in one patch; a picture is repeated to fill them.
        spatial_merge_size (`int`): side, in patches, of the square that becomes one visual token.
        num_position_embeddings (`int`): entries of the learned position table; a square number.
        deepstack_visual_indexes (`list[int]`): blocks whose output also feeds the first decoder layers.
    """

    model_type = "qwen3_vl_vision"
    base_config_key = "vision_config"
    default_rope_type = "axial"
    attribute_map = {"num_attention_heads": "num_heads", "num_hidden_layers": "depth"}

    depth: int = 27
    hidden_size: int = 1152
    hidden_act: str = "gelu_pytorch_tanh"
    intermediate_size: int = 4304
    num_heads: int = 16
    in_channels: int = 3
    patch_size: int | list[int] | tuple[int, int] = 16
    spatial_merge_size: int = 2
    temporal_patch_size: int | list[int] | tuple[int, int] = 2
    out_hidden_size: int = 3584
    num_position_embeddings: int = 2304
    deepstack_visual_indexes: list[int] | tuple[int, ...] = (8, 16, 24)
    initializer_range: float = 0.02
    rope_parameters: dict | None = None


@strict
class Qwen3VLTextConfig(PreTrainedConfig):
    """Decoder.

    Args:
        num_key_value_heads (`int`, *optional*): key and value heads shared by groups of query heads; `None` means
            one for each query head.
        head_dim (`int`): width of one head; not tied to `hidden_size / num_attention_heads`.
        rope_parameters (`dict`, *optional*): `rope_type`, `rope_theta`, and `mrope_section`, the number of rotary
            frequencies that follow time, height and width. The older spelling `rope_scaling` beside `rope_theta`
            is accepted.
    """

    model_type = "qwen3_vl_text"
    base_config_key = "text_config"
    default_theta = 500000.0
    ignore_keys_at_rope_validation = {"mrope_section", "mrope_interleaved"}
    keys_to_ignore_at_inference = ["past_key_values"]
    base_model_tp_plan = DENSE_TENSOR_PARALLEL_PLAN
    base_model_pp_plan = PIPELINE_PARALLEL_PLAN

    vocab_size: int = 151936
    hidden_size: int = 4096
    intermediate_size: int = 22016
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = 32
    head_dim: int = 128
    hidden_act: str = "silu"
    max_position_embeddings: int = 128000
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    rope_parameters: RopeParameters | dict | None = None
    attention_bias: bool = False
    attention_dropout: float | int = 0.0
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        super().__post_init__(**kwargs)


@strict
class Qwen3VLConfig(PreTrainedConfig):
    """A whole dense Qwen3-VL model.

    Args:
        text_config (`dict` or `Qwen3VLTextConfig`, *optional*): the decoder.
        vision_config (`dict` or `Qwen3VLVisionConfig`, *optional*): the vision tower.
        image_token_id (`int`): placeholder that stands once for every visual token of a picture.
        video_token_id (`int`): the same for video frames.
        optim (`dict` or `str`, *optional*): optimization profile, or the name of a preset. `None` is the plain
            model. Stock `transformers` keeps the key and ignores it. `from_pretrained` takes the path of a YAML or
            JSON file too.
    """

    model_type = "qwen3_vl"
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(config_class=Qwen3VLVisionConfig),
        "text_config": SubConfigSpec(config_class=Qwen3VLTextConfig),
    }
    keys_to_ignore_at_inference = ["past_key_values"]

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653
    tie_word_embeddings: bool = False
    optim: dict | str | None = None

    def __post_init__(self, **kwargs):
        # The first published checkpoints name the tower's type after the whole model.
        if isinstance(self.vision_config, dict) and self.vision_config.get("model_type") == self.model_type:
            self.vision_config = {**self.vision_config, "model_type": f"{self.model_type}_vision"}
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """As in `transformers`; an `optim` given beside the dictionary is checked before weights are loaded."""
        if "optim" in kwargs:
            from .profile_qwen3_vl import given_profile  # which names configurations of this file

            kwargs["optim"] = given_profile(kwargs["optim"])
        return super().from_dict(config_dict, **kwargs)

    def to_dict(self) -> dict:
        values = super().to_dict()
        if values.get("optim") is None:  # so that the plain model's file is the stock one
            values.pop("optim", None)
        return values
