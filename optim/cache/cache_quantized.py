"""A KV cache of packed 8-, 4- or 2-bit entries that attention reads as they are, and its technique.

Sources: KIVI (Liu et al., arXiv 2402.02750) and QuaRot (Ashkboos et al., arXiv 2404.00456); see `quantized_layer.py`.
"""

from dataclasses import fields
from functools import partial
from typing import Any

import torch

from ..technique_optim import refuse_unknown
from .cache_common import CacheTechnique, CroppingCache, count_full_attention
from .kv_quantization import QuantizedSettings, quantized_bytes
from .memory_pool import PagePools
from .quantized_layer import QuantizedLayer


SETTINGS = tuple(field.name for field in fields(QuantizedSettings))


class QuantizedKVCache(CroppingCache):
    """A cache of [`QuantizedLayer`]s: give it as `past_key_values=`.

    Lossy. At 4 bits it holds 0.29 of bfloat16's bytes, scales and window included. Keys are quantized per channel over
    groups of tokens, values per token over groups of channels, both with scale and zero; the newest tokens and the
    first prefill are attended in full precision. Attention functions that read a cache layer (`qwen3_vl_exact` and
    its kin) read packed entries directly on a CPU with a compiler, and piece by piece elsewhere; for any other the
    history is unpacked at each update, which takes the memory and time that it saves. Prefill packs as it goes.

    Croppable: what assisted decoding rolls back leaves no trace (see [`QuantizedLayer`]), and it gives the tokens of
    greedy decoding on this cache. Not compileable. `copy.deepcopy` shares pages; pickling is refused. Gradients do
    not flow through the history: `backward` raises.
    Sources: KIVI (arXiv 2402.02750), QuaRot (arXiv 2404.00456).

    Args:
        config (`PreTrainedConfig`, *optional*): of the model; by default layers are made as they come up.
        bits (`int`): 8, 4 (default) or 2.
        group_size (`int`): tokens or channels that share a scale, and tokens a page; a multiple of 32, default 64.
        residual_tokens (`int`): the newest tokens that are never read packed, at least 1, default 128.
        rotate (`bool`): whether keys are rotated by a Hadamard matrix before quantizing, for a `head_dim` that is a
            power of two; helps where a few channels of single tokens are extreme.
        pool (`PagePools`, *optional*): shared with other requests, with pages of `group_size` tokens; by default the
            cache's own.
    Raises:
        ValueError: for settings out of range, or a model with layers that are not full attention.
    """

    def __init__(
        self,
        config=None,
        bits: int = 4,
        group_size: int = 64,
        residual_tokens: int = 128,
        rotate: bool = False,
        pool: PagePools | None = None,
    ):
        self.settings = QuantizedSettings(bits, group_size, residual_tokens, rotate)
        self.pools = PagePools(group_size) if pool is None else pool
        if self.pools.page_tokens != group_size:
            raise ValueError(
                f"a pool with pages of {self.pools.page_tokens} tokens does not fit group_size={group_size}; make "
                f"PagePools(page_tokens={group_size}), or leave pool out."
            )
        make_layer = partial(QuantizedLayer, self.settings, self.pools)
        if config is None:
            super().__init__(layer_class_to_replicate=make_layer)
            return
        super().__init__(layers=[make_layer() for _ in range(count_full_attention(config, type(self).__name__))])

    @staticmethod
    def bytes_per_row(tokens: int, kv_heads: int, head_dim: int, itemsize: int = 2, **settings) -> int:
        """Bytes that one layer holds for one row of `tokens`; `settings` as for the class, see `quantized_bytes`."""
        return quantized_bytes(tokens, kv_heads, head_dim, itemsize, **settings)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See [`QuantizedLayer.update`]. If a layer fails, those before it drop the new tokens too."""
        try:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        except ValueError as error:
            raise ValueError(f"layer {layer_idx}: {error}") from None


class QuantizedCache(CacheTechnique):
    """Every request of `generate()` gets a [`QuantizedKVCache`]. Lossy.

    Args:
        config: taken and not needed, as all techniques may be given the model's.
        settings: `bits`, `group_size`, `residual_tokens` and `rotate`, as of the cache.
    Raises:
        ValueError: for settings out of range or unknown ones.
    """

    name = "quantized_cache"
    exact = False
    cache_class = QuantizedKVCache

    def __init__(self, config=None, **settings: Any):
        refuse_unknown(self.name, settings, SETTINGS)
        QuantizedSettings(**settings)
        super().__init__(**settings)
