"""The techniques that a profile can name, and the ports of the model through which they act.

A technique is one class in one file of this room. It joins by a line in `TECHNIQUES`, a user's own by
[`register_technique`]; nothing else changes. With
`config.optim` unset no technique is active and the model is the plain one.
"""

from difflib import get_close_matches

from .attention.attention_adaptive import AdaptiveAttention
from .attention.attention_block_sparse import BlockSparseAttention
from .attention.attention_dynamic_sparse import DynamicSparseAttention
from .attention.attention_exact import FlashAttention2
from .attention.attention_memory_efficient import MemoryEfficientAttention
from .attention.rotary_faster import FasterRotaryEmbeddings
from .attention.sparse_calibration import AdaptiveSparse
from .cache.cache_choice import cache_for_attention
from .cache.cache_cross_layer import CrossLayerCache
from .cache.cache_evicting import EvictingCache
from .cache.cache_paged import PagedCache
from .cache.cache_prefix import PrefixCache
from .cache.cache_quantized import QuantizedCache
from .cache.cache_tiered import HierarchicalMemoryCompression
from .cache.vision_feature_cache import VisionFeatureCache
from .memory.chunked_vision import ChunkedVision
from .memory.kv_cache_optimizer import KVCachingOptimization
from .power.power_pacing import PowerManagement
from .technique_optim import Technique
from .tokens.repeated_patches import RepeatedPatchRemoval
from .tokens.token_merging import CrossModalTokenMerging
from .training.gradient_accumulation import MemoryEfficientGradientAccumulation
from .weights.adaptive_precision import AdaptivePrecision
from .weights.compiled_decode import CompiledDecode
from .weights.hardware_kernels import HardwareSpecificKernels
from .weights.kernel_fusion import KernelFusion
from .weights.layer_recycling import CrossLayerParameterRecycling
from .weights.learned_routing import LearnedActivationRouting
from .weights.linear_decode import DecodeLinear
from .weights.moe_grouped import GroupedExperts


TECHNIQUES: dict[str, type[Technique]] = {
    technique.name: technique
    for technique in (
        FlashAttention2,
        MemoryEfficientAttention,
        BlockSparseAttention,
        DynamicSparseAttention,
        AdaptiveAttention,
        AdaptiveSparse,
        FasterRotaryEmbeddings,
        PagedCache,
        QuantizedCache,
        EvictingCache,
        CrossLayerCache,
        PrefixCache,
        HierarchicalMemoryCompression,
        VisionFeatureCache,
        KVCachingOptimization,
        ChunkedVision,
        CrossLayerParameterRecycling,
        LearnedActivationRouting,
        DecodeLinear,
        AdaptivePrecision,
        GroupedExperts,
        KernelFusion,
        CompiledDecode,
        HardwareSpecificKernels,
        CrossModalTokenMerging,
        RepeatedPatchRemoval,
        MemoryEfficientGradientAccumulation,
        PowerManagement,
    )
}


def register_technique(technique: type[Technique]) -> type[Technique]:
    """Makes a class of one's own a technique that profiles can name; also a decorator.

    Args:
        technique (`type`): a subclass of [`Technique`] with a `name` of its own and `exact`.
    Raises:
        TypeError: for something else, or a class whose `apply` or `revert` is missing.
        ValueError: if the name is taken by another class.
    """
    if not isinstance(technique, type) or not issubclass(technique, Technique):
        raise TypeError(f"a technique must be a subclass of qwen3_vl.Technique, got {technique!r}.")
    missing = [name for name in ("name", "exact") if not hasattr(technique, name)]
    missing += sorted(getattr(technique, "__abstractmethods__", ()))
    if missing:
        raise TypeError(f"{technique.__name__} has no {missing[0]}; a technique has name, exact, apply and revert.")
    if TECHNIQUES.get(technique.name, technique) is not technique:
        taken = TECHNIQUES[technique.name].__name__
        raise ValueError(
            f"a technique {technique.name!r} exists already ({taken}); give {technique.__name__} another."
        )
    TECHNIQUES[technique.name] = technique
    return technique


def techniques_of(named: dict[str, dict | None]) -> list[Technique]:
    """Techniques, made of `{name: settings}` in that order.

    Raises:
        ValueError: for a technique that does not exist; the nearest known name is suggested.
    """
    for name in named:
        if name not in TECHNIQUES:
            nearest = get_close_matches(str(name), TECHNIQUES, n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"there are {', '.join(TECHNIQUES)}."
            raise ValueError(f"optim names an unknown technique {name!r}; {hint}")
    return [TECHNIQUES[name](**(settings or {})) for name, settings in named.items()]


def cache_from_profile(model, batch_size: int, max_length: int):
    """The cache that an active technique makes (port 2), else what suits the attention; `None` for the stock one."""
    for technique in getattr(model, "active_techniques", ()):
        cache = technique.make_cache(model, batch_size, max_length)
        if cache is not None:
            return cache
    return cache_for_attention(model)
