"""A KV cache in tiers: full precision, int8, int4, and host memory or a file; give it as `past_key_values=`."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from transformers.cache_utils import Cache

from ..technique_optim import refuse_unknown
from .cache_common import CacheTechnique, HistoryCache, count_full_attention
from .tier_settings import Tiers, TierSettings
from .tiered_layer import TieredLayer


SETTINGS = tuple(field.name for field in fields(TierSettings))


class TieredKVCache(HistoryCache):
    """A cache of [`TieredLayer`]s that holds every token, the less exactly or the further away the less it is used.

    The history lies in segments of some hundred tokens. Full ones move between tiers: full precision, int8, int4 (the
    formats of KIVI, arXiv 2402.02750), and the slow tier: host memory where the model is on an accelerator, else a
    temporary file. The newest tokens and the first segment (attention sinks, arXiv 2309.17453) stay on top; for the
    rest, attention that a segment got lately counts against its age. A segment that is used more comes back from the
    slow tier, though not to a precision that it has lost. Attention functions of this package read it segment by
    segment, of which one at a time is unpacked or read back, and tell the cache what was used; for any other the
    history is rebuilt at each update and age alone counts. The next layer is read ahead meanwhile.

    For histories that do not fit into memory. Every token reads all of them, the file included, so decoding goes at
    the speed of the disk once the system cannot hold the file in its page cache. Lossy by the quantized tiers; with
    `int8_tokens=0` and `int4_tokens=0` exact, and the same tokens as `DynamicCache`. Nothing is ever dropped.

    A file that cannot be written to leaves segments in memory, with one warning; with `max_bytes` it raises. What
    cannot be read back, or comes back changed, raises a `TierFileError` (an `OSError`) that names the segment. In both
    cases the cache is as it was before that forward. Without a name where the system allows that, the file is gone
    with the cache, with `reset()`, or with the process however that ends.

    Croppable: what stays reads as before, and as many of the newest tokens as a segment has are undone in full
    precision. Tokens of assisted decoding can differ from plain ones by the quantized tiers, as segments move at other
    steps. Not compileable. `copy.deepcopy` shares segments; pickling is refused. Gradients do not flow through the
    history: `backward` raises.

    Args:
        config (`PreTrainedConfig`): of the model.
        hot_tokens (`int`, *optional*): tokens a row and layer in full precision, at least two segments; default 1024.
        int8_tokens, int4_tokens (`int`, *optional*): in the quantized tiers, 0 for none; default 3072 and 12288.
        max_bytes (`int`, *optional*): most bytes of all layers in memory, between forwards. Tiers without a number of
            tokens then share them: half, a quarter and a quarter.
        folder (`str`, *optional*): where the file is made, on an accelerator too; by default the system's folder for
            temporary files, which on some systems is memory.
        segment_tokens (`int`): tokens that move together, default 256; a multiple of 32 if they are quantized.
    Raises:
        ValueError: for budgets that do not hold a segment, a folder that cannot be written to, an unknown setting, or
            a model with layers that are not full attention.
    """

    def __init__(self, config, **settings: Any):
        refuse_unknown(type(self).__name__, settings, SETTINGS)
        count = count_full_attention(config, type(self).__name__)
        self.tiers = Tiers(TierSettings(**settings), count)
        super().__init__(layers=[TieredLayer(self.tiers, index) for index in range(count)])

    @property
    def stored_bytes(self) -> int:
        """Bytes of all layers in the slow tier; copies of a cache share them."""
        return sum(layer.stored_bytes for layer in self.layers)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See [`TieredLayer.update`]. If a layer fails, those before it go back to what they were."""
        if not layer_idx:
            self.tiers.commit()  # a forward begins, so the one before has been done
        first = not self.layers[layer_idx].get_seq_length()
        try:
            states = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        except BaseException:
            self.tiers.undo()
            raise
        # Where nothing will be read from it any more, the forward is done with the last layer; else with its `attend`.
        if layer_idx == len(self.layers) - 1 and (first or kwargs.get("dense", True)):
            self.tiers.commit()
        return states

    def crop(self, tokens_to_remove: int) -> None:
        """See [`TieredLayer.crop`]. If a layer fails, none is cropped."""
        self._change_all(lambda: super(TieredKVCache, self).crop(tokens_to_remove))

    # A class that stands in front moves M-RoPE positions with the rows, so that neither of these calls the other.
    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        beam_idx = beam_idx.cpu()  # once, and not by every layer
        self._change_all(lambda: super(TieredKVCache, self).reorder_cache(beam_idx))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        indices = torch.as_tensor(indices).cpu()
        self._change_all(lambda: super(TieredKVCache, self).batch_select_indices(indices))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """See [`TieredLayer.batch_repeat_interleave`]. If a layer fails, none is changed."""
        self._change_all(lambda: super(TieredKVCache, self).batch_repeat_interleave(repeats))

    @classmethod
    def from_dynamic(cls, cache: Cache, config, **settings: Any) -> "TieredKVCache":
        """A cache with the content of one that holds all tokens of full attention, which stays as it is.

        Args:
            config, settings: the arguments of the class.
        Raises:
            ValueError: if a layer of `cache` does not hold every token that it has seen.
        """
        return super().from_dynamic(cache, config=config, **settings)

    def _change_all(self, change: Callable[[], None]) -> None:
        before = [layer.state for layer in self.layers]
        try:
            change()
        except BaseException:
            for layer, state in zip(self.layers, before, strict=True):
                layer.restore(state)
            raise


class HierarchicalMemoryCompression(CacheTechnique):
    """Every request of `generate()` gets a [`TieredKVCache`]. Lossy, unless the quantized tiers are switched off.

    Args:
        config: taken and not needed, as all techniques may be given the model's.
        settings: as of [`TieredKVCache`].
    Raises:
        ValueError: for an unknown setting or one out of range.
    """

    name = "tiered_cache"
    exact = False
    cache_class = TieredKVCache

    def __init__(self, config=None, **settings: Any):
        refuse_unknown(self.name, settings, SETTINGS)
        TierSettings(**settings)
        super().__init__(**settings)
