"""The techniques that a profile can name, and the ports of the model through which they act.

A technique is one class in one file of this room. It joins by a line in `TECHNIQUES`; nothing else changes. With
`config.optim` unset no technique is active and the model is the plain one.
"""

from difflib import get_close_matches

from transformers.utils import logging

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
from .technique_optim import Technique
from .weights.linear_decode import DecodeLinear


logger = logging.get_logger(__name__)

PRESETS: dict[str, tuple[str, ...]] = {"minimal": (), "balanced": (), "aggressive": ()}


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
        DecodeLinear,
    )
}


def techniques_of(optim: dict | str | None) -> list[Technique]:
    """The techniques that a profile names, in its order.

    Args:
        optim (`dict` or `str`, *optional*): a preset's name, or `{technique name: settings}`.
    Raises:
        ValueError: for a preset or technique that does not exist; the nearest known name is suggested.
        TypeError: if `optim` is neither a string, a dictionary nor `None`.
    """
    if optim is None:
        return []
    if isinstance(optim, str):
        _require_known(optim, PRESETS, "preset")
        if not PRESETS[optim]:
            logger.warning_once(f"optim={optim!r} names no technique in this version; the model stays plain.")
        optim = {name: {} for name in PRESETS[optim]}
    if not isinstance(optim, dict):
        raise TypeError(f"optim must be a preset's name, a dictionary or None, got {type(optim).__name__}.")
    for name in optim:
        _require_known(name, TECHNIQUES, "technique")
    return [TECHNIQUES[name](**(settings or {})) for name, settings in optim.items()]


def apply_techniques(model) -> list[Technique]:
    """Applies what `model.config.optim` names (port 4); called at the end of `from_pretrained`.

    They are kept as `model.active_techniques`, for the other ports to ask and for the caller to revert.
    """
    model.active_techniques = techniques_of(getattr(model.config, "optim", None))
    for technique in model.active_techniques:
        technique.apply(model)
    return model.active_techniques


def cache_from_profile(model, batch_size: int, max_length: int):
    """The cache that an active technique makes (port 2), else what suits the attention; `None` for the stock one."""
    for technique in getattr(model, "active_techniques", ()):
        cache = technique.make_cache(model, batch_size, max_length)
        if cache is not None:
            return cache
    return cache_for_attention(model)


def visual_tokens_from_profile(model, input_ids, grids: dict, encoder_outputs: dict) -> dict:
    """Encoder outputs after the visual-token reduction of the active techniques (port 3); unchanged without one."""
    for technique in getattr(model, "active_techniques", ()):
        reduced = technique.plan_visual_tokens(model, input_ids, grids, encoder_outputs)
        encoder_outputs = encoder_outputs if reduced is None else reduced
    return encoder_outputs


def _require_known(name: str, known: dict, kind: str) -> None:
    if name in known:
        return
    nearest = get_close_matches(str(name), known, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else f"; known: {', '.join(known) or 'none yet'}."
    raise ValueError(f"optim names an unknown {kind} {name!r}{hint}")
