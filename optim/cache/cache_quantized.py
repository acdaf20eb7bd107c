"""A KV cache of packed 8-, 4- or 2-bit entries that attention reads as they are, and its technique.

Sources: KIVI (Liu et al., arXiv 2402.02750) and QuaRot (Ashkboos et al., arXiv 2404.00456); see `quantized_layer.py`.
"""

from functools import partial

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from ..technique_optim import Technique, refuse_unknown
from .cache_paged import _with_notes
from .kv_quantization import QuantizedSettings, quantized_bytes
from .memory_pool import PagePools
from .quantized_layer import QuantizedLayer


class QuantizedKVCache(Cache):
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
        layers = DynamicCache(config=config).layers
        others = sorted({type(layer).__name__ for layer in layers if type(layer) is not DynamicLayer})
        if others:
            raise ValueError(f"QuantizedKVCache is for layers of full attention alone, but the model has {others}.")
        super().__init__(layers=[make_layer() for _ in layers])

    @staticmethod
    def bytes_per_row(tokens: int, kv_heads: int, head_dim: int, itemsize: int = 2, **settings) -> int:
        """Bytes that one layer holds for one row of `tokens`; `settings` as for the class, see `quantized_bytes`."""
        return quantized_bytes(tokens, kv_heads, head_dim, itemsize, **settings)

    @property
    def held_bytes(self) -> int:
        """Bytes that all layers hold."""
        return sum(layer.held_bytes for layer in self.layers)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See [`QuantizedLayer.update`]. If a layer fails, those before it drop the new tokens too."""
        try:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        except Exception as error:
            new, seen = key_states.shape[-2], self.get_seq_length(layer_idx)
            for layer in self.layers[:layer_idx]:
                if layer.get_seq_length() == seen + new:
                    layer.crop(-new)
            if isinstance(error, ValueError):
                raise ValueError(f"layer {layer_idx}: {error}") from None
            raise

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        super().reorder_cache(beam_idx.cpu())  # once, and not by every layer

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(torch.as_tensor(indices).cpu())

    @classmethod
    def from_dynamic(cls, cache: Cache, **options) -> "QuantizedKVCache":
        """A quantized cache with the content of a cache that holds all tokens of full attention, which stays as it is.

        Args:
            options: the arguments of the class.
        Raises:
            ValueError: if a layer of `cache` does not hold every token that it has seen.
        """
        quantized = cls(**options)
        for index, layer in enumerate(cache.layers):
            seen = int(layer.get_seq_length())
            if not seen:
                continue
            keys, values = layer.keys, layer.values
            if keys is None and hasattr(layer, "dense"):
                keys, values = layer.dense()
            if getattr(layer, "is_sliding", False) or keys is None or keys.ndim != 4 or keys.shape[2] != seen:
                raise ValueError(
                    f"layer {index} of the {type(cache).__name__} does not hold the {seen} tokens that it has seen; "
                    "only caches of plain full attention can be converted, such as DynamicCache."
                )
            quantized.update(keys, values, index, dense=False)
        return _with_notes(quantized, cache)

    def to_dynamic(self) -> DynamicCache:
        """A `DynamicCache` with the same content, unpacked; this one stays as it is."""
        dynamic = DynamicCache()
        for index, layer in enumerate(self.layers):
            if layer.get_seq_length():
                dynamic.update(*layer.dense(), index)
        return _with_notes(dynamic, self)


class QuantizedCache(Technique):
    """Every request of `generate()` gets a [`QuantizedKVCache`]. Lossy.

    Args:
        config: taken and not needed, as all techniques may be given the model's.
        bits, group_size, residual_tokens, rotate: of the cache.
    Raises:
        ValueError: for settings out of range or unknown ones.
    """

    name = "quantized_cache"
    exact = False

    def __init__(
        self,
        config=None,
        bits: int = 4,
        group_size: int = 64,
        residual_tokens: int = 128,
        rotate: bool = False,
        **unknown,
    ):
        settings = {"bits": bits, "group_size": group_size, "residual_tokens": residual_tokens, "rotate": rotate}
        refuse_unknown(self.name, unknown, settings)
        super().__init__(**settings)
        QuantizedSettings(**settings)

    def apply(self, model) -> None:
        """Nothing to change: the cache is asked for by `make_cache`."""

    def revert(self, model) -> None:
        """Nothing to undo."""

    def make_cache(self, model, batch_size: int, max_length: int) -> QuantizedKVCache:
        return QuantizedKVCache(model.config, **self.settings)
