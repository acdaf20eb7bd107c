"""Configurations of the mixture-of-experts Qwen3-VL models (30B-A3B, 235B-A22B).

Source: Qwen3-VL Technical Report, arXiv 2511.21631, and the published configurations.
"""

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec
from transformers.modeling_rope_utils import RopeParameters

from .configuration_qwen3_vl import (
    DENSE_TENSOR_PARALLEL_PLAN,
    PIPELINE_PARALLEL_PLAN,
    Qwen3VLConfig,
    Qwen3VLVisionConfig,
)


@strict
class Qwen3VLMoeVisionConfig(Qwen3VLVisionConfig):
    """Vision tower of the mixture-of-experts models; the same tower under a type of its own."""

    model_type = "qwen3_vl_moe_vision"


@strict
class Qwen3VLMoeTextConfig(PreTrainedConfig):
    """Decoder whose feed-forward layers are sparse experts.

    Args:
        num_experts (`int`): experts in one layer.
        num_experts_per_tok (`int`): experts that each token visits.
        moe_intermediate_size (`int`): inner width of one expert.
        decoder_sparse_step (`int`): every so many layers are sparse.
        mlp_only_layers (`list[int]`, *optional*): layers that stay dense, with `intermediate_size`.
        output_router_logits (`bool`): also compute the load-balancing loss.
        router_aux_loss_coef (`float`): its weight in the training loss.
    """

    model_type = "qwen3_vl_moe_text"
    base_config_key = "text_config"
    default_theta = 500000.0
    ignore_keys_at_rope_validation = {"mrope_section", "mrope_interleaved"}
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {"num_experts": "num_local_experts"}
    base_model_tp_plan = {
        **DENSE_TENSOR_PARALLEL_PLAN,
        "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
        "layers.*.mlp.experts.down_proj": "rowwise",
        "layers.*.mlp.experts": "moe_tp_experts",
    }
    base_model_ep_plan = {
        "layers.*.mlp.experts.gate_up_proj": "grouped_gemm",
        "layers.*.mlp.experts.down_proj": "grouped_gemm",
        "layers.*.mlp.experts": "ep_dispatch_experts",
    }
    base_model_pp_plan = PIPELINE_PARALLEL_PLAN

    vocab_size: int = 151936
    hidden_size: int = 2048
    intermediate_size: int = 5632
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    num_key_value_heads: int | None = 16
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 128000
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    tie_word_embeddings: bool = True
    rope_parameters: RopeParameters | dict | None = None
    attention_bias: bool = False
    attention_dropout: float | int = 0.0
    decoder_sparse_step: int = 1
    moe_intermediate_size: int = 1408
    num_experts_per_tok: int = 4
    num_experts: int = 60
    output_router_logits: bool = False
    router_aux_loss_coef: float = 0.001
    mlp_only_layers: list[int] | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        self.mlp_only_layers = self.mlp_only_layers or []
        # Read by cache classes of `transformers`, which otherwise take a missing value for "unknown".
        self.sliding_window = None
        super().__post_init__(**kwargs)


@strict
class Qwen3VLMoeConfig(Qwen3VLConfig):
    """A whole mixture-of-experts Qwen3-VL model; the fields are those of [`Qwen3VLConfig`]."""

    model_type = "qwen3_vl_moe"
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(config_class=Qwen3VLMoeVisionConfig),
        "text_config": SubConfigSpec(config_class=Qwen3VLMoeTextConfig),
    }
