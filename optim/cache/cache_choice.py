"""Which cache suits an attention implementation when neither the caller nor the profile names one."""

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..native.native_attention import kernels
from .cache_paged import PagedKVCache


def cache_for_attention(model) -> PagedKVCache | None:
    """A paged cache where the decoder's attention reads pages in place by native kernels, else `None` for stock's.

    Elsewhere the pages would be gathered at every step, which is no faster than stock's concatenation.
    """
    config = model.config.get_text_config()
    attend = ALL_ATTENTION_FUNCTIONS.get(config._attn_implementation)
    in_place = (
        getattr(attend, "reads_cache_layer", False)
        and model.device.type == "cpu"
        and model.dtype in (torch.float32, torch.bfloat16)
        and config.head_dim % 16 == 0
        and not torch.is_autocast_enabled("cpu")  # gives keys and values of different dtypes
        and kernels() is not None
    )
    return PagedKVCache(config) if in_place else None
