"""Qwen3-VL for Hugging Face Transformers: stock answers, in less time and memory.

`import qwen3_vl` makes the Auto classes resolve to this package for `qwen3_vl` and `qwen3_vl_moe`. Names below are
imported when they are first used.
"""

import importlib

from .api_paths import enable_legacy_imports
from .api_paths import install as _install_api_paths
from .modeling_qwen3_vl.registration import register, unregister


__version__ = "0.1.0"

_MODULE_OF = {
    "Qwen3VLConfig": "configuration.configuration_qwen3_vl",
    "Qwen3VLTextConfig": "configuration.configuration_qwen3_vl",
    "Qwen3VLVisionConfig": "configuration.configuration_qwen3_vl",
    "Qwen3VLMoeConfig": "configuration.configuration_qwen3_vl_moe",
    "Qwen3VLMoeTextConfig": "configuration.configuration_qwen3_vl_moe",
    "Qwen3VLMoeVisionConfig": "configuration.configuration_qwen3_vl_moe",
    "check_transformers_version": "configuration.versions_qwen3_vl",
    "Qwen3VLPreTrainedModel": "modeling_qwen3_vl.modeling_base",
    "repeat_kv": "modeling_qwen3_vl.modeling_base",
    "Qwen3VLAttention": "modeling_qwen3_vl.modeling_text",
    "Qwen3VLRotaryEmbedding": "modeling_qwen3_vl.modeling_text",
    "Qwen3VLTextModel": "modeling_qwen3_vl.modeling_text",
    "apply_rotary_pos_emb": "modeling_qwen3_vl.modeling_text",
    "Qwen3VLMoeTextModel": "modeling_qwen3_vl.modeling_moe",
    "Qwen3VLVisionModel": "modeling_qwen3_vl.modeling_vision",
    "OptimizedQwen3VLAttention": "modeling_qwen3_vl.modeling_optimized",
    "Qwen3VLForConditionalGeneration": "modeling_qwen3_vl.modeling_qwen3_vl",
    "Qwen3VLModel": "modeling_qwen3_vl.modeling_qwen3_vl",
    "Qwen3VLMoeForConditionalGeneration": "modeling_qwen3_vl.modeling_qwen3_vl",
    "Qwen3VLMoeModel": "modeling_qwen3_vl.modeling_qwen3_vl",
    "Qwen3VLMoePreTrainedModel": "modeling_qwen3_vl.modeling_qwen3_vl",
    "Qwen3VLMoeVisionModel": "modeling_qwen3_vl.modeling_qwen3_vl",
    "AdaptiveAttention": "optim.attention.attention_adaptive",
    "AdaptiveSettings": "optim.attention.adaptive_settings",
    "AttentionShape": "optim.attention.attention_timing",
    "CrossModalTokenMerging": "optim.tokens.token_merging",
    "RepeatedPatchRemoval": "optim.tokens.repeated_patches",
    "AdaptiveSequencePacking": "optim.training.sequence_packing",
    "assistant_labels": "optim.training.packing_labels",
    "chunked_cross_entropy": "optim.training.chunked_loss",
    "MemoryEfficientGradientAccumulation": "optim.training.gradient_accumulation",
    "count_label_tokens": "optim.training.gradient_accumulation",
    "lora_targets": "optim.training.peft_targets",
    "AdaptiveSparse": "optim.attention.sparse_calibration",
    "AdaptivePrecision": "optim.weights.adaptive_precision",
    "AttentionMechanisms": "optim.attention.attention_mechanisms",
    "BlockSparseAttention": "optim.attention.attention_block_sparse",
    "CrossLayerParameterRecycling": "optim.weights.layer_recycling",
    "LearnedActivationRouting": "optim.weights.learned_routing",
    "DecodeLinear": "optim.weights.linear_decode",
    "DynamicSparseAttention": "optim.attention.attention_dynamic_sparse",
    "FasterRotaryEmbeddings": "optim.attention.rotary_faster",
    "FlashAttention2": "optim.attention.attention_exact",
    "MemoryEfficientAttention": "optim.attention.attention_memory_efficient",
    "CrossLayerKVCache": "optim.cache.cache_cross_layer",
    "EvictingKVCache": "optim.cache.cache_evicting",
    "measure_layer_shares": "optim.cache.eviction_calibration",
    "ChunkedVision": "optim.memory.chunked_vision",
    "GeneralMemoryManager": "optim.memory.general_memory_manager",
    "KVCacheOptimizer": "optim.memory.kv_cache_optimizer",
    "KVCachingOptimization": "optim.memory.kv_cache_optimizer",
    "MemoryManager": "optim.memory.memory_interface",
    "MemoryPlan": "optim.memory.memory_plan",
    "MemoryPool": "optim.cache.memory_pool",
    "MemoryRequest": "optim.memory.memory_request",
    "PagedKVCache": "optim.cache.cache_paged",
    "QuantizedKVCache": "optim.cache.cache_quantized",
    "SparseMemoryManager": "optim.memory.sparse_memory_manager",
    "VideoClip": "optim.memory.memory_request",
    "VisionLanguageMemoryManager": "optim.memory.vision_language_memory_manager",
    "VisualRules": "optim.memory.memory_request",
    "plan_memory": "optim.memory.memory_plan",
    "PrefixCache": "optim.cache.cache_prefix",
    "CompiledDecode": "optim.weights.compiled_decode",
    "HardwareSpecificKernels": "optim.weights.hardware_kernels",
    "KernelFusion": "optim.weights.kernel_fusion",
    "GroupedExperts": "optim.weights.moe_grouped",
    "MoeLayer": "optim.weights.moe_layer",
    "HierarchicalMemoryCompression": "optim.cache.cache_tiered",
    "TieredKVCache": "optim.cache.cache_tiered",
    "VisionFeatureCache": "optim.cache.vision_feature_cache",
    "PowerManagement": "optim.power.power_pacing",
    "ConfigurableComponent": "optim.component_interface",
    "Technique": "optim.technique_optim",
    "register_technique": "optim.registry_optim",
    "Hardware": "configuration.hardware_detection",
    "detect_hardware": "configuration.hardware_detection",
    "CPUConfig": "configuration.profile_sections",
    "GPUConfig": "configuration.profile_sections",
    "MemoryConfig": "configuration.profile_sections",
    "OptimizationConfig": "configuration.profile_sections",
    "PowerManagementConfig": "configuration.profile_sections",
    "UnifiedConfig": "configuration.profile_qwen3_vl",
    "FallbackManager": "optim.fallback_manager",
    "MemoryOptimizationIntegrator": "optim.memory.memory_integrator",
    "OrderOptimizer": "optim.technique_order",
    "UnifiedArchitecture": "optim.unified_architecture",
    "UnifiedConfigManager": "optim.profile_manager",
    "UnifiedOptimizationManager": "optim.orchestrator_optim",
    "UnifiedOptimizationOrchestrator": "optim.orchestrator_optim",
    "create_unified_config_manager": "optim.profile_manager",
    "get_default_config": "optim.profile_manager",
    "get_hardware_optimized_config": "optim.profile_manager",
    "optimize": "optim.orchestrator_optim",
    "export_hub_folder": "modeling_qwen3_vl.hub_export",
    "Qwen3VLImageProcessor": "processing.image_processing_qwen3_vl",
    "Qwen3VLProcessor": "processing.processing_qwen3_vl",
    "Qwen3VLVideoProcessor": "processing.video_processing_qwen3_vl",
}
__all__ = ["__version__", "enable_legacy_imports", "register", "unregister", *_MODULE_OF]


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register()
_install_api_paths()
