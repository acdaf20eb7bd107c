"""A KV cache in which neighbouring layers share keys and values where those are alike, and its technique.

Source: MiniCache (Liu et al., arXiv 2405.14366); see `cross_layer_merge.py` for what differs.
"""

from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache
from transformers.utils import logging

from ..technique_optim import refuse_unknown
from .cache_common import CacheTechnique
from .cache_paged import PagedKVCache
from .kv_quantization import ROLLBACK_TOKENS
from .memory_pool import PagePools
from .sharing_layer import PairSimilarity, SharingLayer, SharingSettings


logger = logging.get_logger(__name__)


class CrossLayerKVCache(PagedKVCache):
    """A cache in which pairs of layers share pages of keys and values: give it as `past_key_values=`.

    Lossy, unless the two layers of a pair are equal. For two vectors one direction is kept, between theirs, and both
    lengths; in every page of every KV head the `retained_share` of tokens that point furthest apart stay as they are.
    The newest tokens are never merged, and the first prefill is attended in full precision. From `start_layer` on the
    layers hold about `(1 + retained_share) / 2` of their bytes. The lower layer of a pair is read as fast as that of a
    `PagedKVCache`; the upper one is restored piece by piece, which takes longer.

    How alike two layers are is measured as their tokens are merged. A pair that is less alike than `min_similarity` in
    keys or in values stays as it is from then on, with one warning; `similarity` says what was measured. Models differ
    in this, and random ones do not have it.

    Croppable: taking back what a forward brought, of the first one up to 64 tokens, leaves no trace; what is taken
    back beyond that leaves older tokens merged. Not compileable. `copy.deepcopy` shares pages; pickling is refused.
    Gradients do not flow through the history: `backward` raises.
    Source: MiniCache (arXiv 2405.14366). There a threshold on the distance decides which tokens stay, here a share, so
    that the bytes are known beforehand; and padding counts as tokens, as a cache is not told of it.

    Args:
        config (`PreTrainedConfig`): of the model.
        start_layer (`int`, *optional*): the lower layer of the first pair; by default the middle of the model.
        retained_share (`float`): of a page's tokens, up to 0.5, default 0.05; rounded up to whole tokens.
        min_similarity (`float`): 1 for equal directions, 0.5 for unrelated ones, default 0.8.
        residual_tokens (`int`): the newest tokens that are not merged, at least 1, default 128.
        interpolation (`float`): where the shared direction lies, from 0 at the lower layer's to 1 at the upper one's.
        page_tokens (`int`): tokens a page, default 64; without meaning if a pool is given.
        pool (`PagePools`, *optional*): shared with other requests; by default the cache's own.
    Raises:
        ValueError: for settings out of range, or a model with layers that are not full attention.
    """

    def __init__(
        self,
        config,
        start_layer: int | None = None,
        retained_share: float = 0.05,
        min_similarity: float = 0.8,
        residual_tokens: int = 128,
        interpolation: float = 0.5,
        page_tokens: int = 64,
        pool: PagePools | None = None,
    ):
        super().__init__(config, page_tokens, pool=pool)
        if not isinstance(self.pools, PagePools):
            raise ValueError(
                f"pool must be PagePools, got {type(pool).__name__}: the cache needs pages of more than one kind."
            )
        self.settings = SharingSettings(start_layer, retained_share, min_similarity, residual_tokens, interpolation)
        self.pairs = self.settings.pairs(len(self.layers))
        self._warned = False
        for _, upper in self.pairs:
            self.layers[upper] = SharingLayer(self.pools, settings=self.settings)

    @property
    def similarity(self) -> dict[tuple[int, int], PairSimilarity]:
        """How alike the layers of each pair were found; pairs of which nothing was merged yet are left out."""
        found = {pair: self.layers[pair[1]].similarity for pair in self.pairs}
        return {pair: similarity for pair, similarity in found.items() if similarity is not None}

    @property
    def held_bytes(self) -> int:
        """Bytes of pages and records in all layers; what several rows or layers share counts once."""
        tables: dict[int, list] = {}
        for layer in self.layers:
            if layer.get_seq_length():
                tables.setdefault(id(layer.pool), [layer.pool]).append(layer._table.ravel())
        pages = sum(len(np.unique(np.concatenate(numbers))) * pool.page_bytes for pool, *numbers in tables.values())
        return pages + sum(self.layers[upper].record_bytes for _, upper in self.pairs)

    # Lengths decide what is done, and a graph would be made anew for each; it breaks here.
    @torch.compiler.disable
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See [`PagedLayer.update`]; what earlier forwards brought is merged first. If a layer fails, those before it
        drop the new tokens too.

        Raises:
            ValueError: also for NaN and infinite entries, when they are to be merged.
        """
        seen, new = self.get_seq_length(layer_idx), key_states.shape[-2]
        try:
            if (layer_idx, layer_idx + 1) in self.pairs:
                self._share(layer_idx, rollback=0)
            states = super().update(key_states, value_states, layer_idx, *args, **kwargs)
            if not seen and (layer_idx - 1, layer_idx) in self.pairs:
                # Nobody else reads the history of a first forward, so the next layers can have the memory.
                self._share(layer_idx - 1, rollback=ROLLBACK_TOKENS)
                self.layers[layer_idx].close_gaps()
            return states
        except Exception:
            for layer in self.layers[: layer_idx + 1]:
                if layer.get_seq_length() == seen + new:
                    layer.crop(-new)
            raise

    def crop(self, tokens_to_remove: int) -> None:
        """Drops the newest tokens of all rows, given as a negative count; 0 does nothing.

        Where a forward was interrupted between two layers, those that it did not reach have less to drop.
        Raises:
            ValueError: for a positive count.
        """
        length = self.get_seq_length() + tokens_to_remove
        for layer in self.layers:
            layer.crop(min(length - layer.get_seq_length(), 0) if tokens_to_remove < 0 else tokens_to_remove)

    @classmethod
    def from_dynamic(cls, cache: Cache, config, **options) -> "CrossLayerKVCache":
        """As of [`PagedKVCache`], with the arguments of this class; what is old enough is merged at once."""
        return super().from_dynamic(cache, config=config, **options)

    def _share(self, lower: int, rollback: int) -> None:
        """Merges what both layers of a pair have, except for the newest tokens."""
        below, upper = self.layers[lower], self.layers[lower + 1]
        settled = min(below.get_seq_length(), upper.get_seq_length()) - self.settings.residual_tokens - rollback
        if settled < self.pools.page_tokens or upper.refused:
            return
        upper.share_with(below, settled)
        if upper.refused and not self._warned:
            self._warned = True
            logger.warning_once(self._refusal(lower))

    def _refusal(self, lower: int) -> str:
        found, who = self.layers[lower + 1].similarity, f"layers {lower} and {lower + 1}"
        if found is None:
            return f"{who} do not share keys and values, since they differ in shape, dtype or device."
        return (
            f"{who} do not share keys and values: their similarity is {found.keys:.2f} in keys and {found.values:.2f} "
            f"in values over {found.tokens} tokens, where min_similarity={self.settings.min_similarity} is asked for "
            "(0.5 is what unrelated ones have); other pairs may follow, see `similarity`."
        )


class CrossLayerCache(CacheTechnique):
    """Every request of `generate()` gets a [`CrossLayerKVCache`]. Lossy.

    Args:
        config: taken and not needed, as all techniques may be given the model's.
        settings: the arguments of [`CrossLayerKVCache`] but for `config` and `pool`.
    Raises:
        ValueError: for unknown settings or ones out of range.
    """

    name = "cross_layer_cache"
    exact = False
    cache_class = CrossLayerKVCache

    def __init__(self, config=None, **settings: Any):
        known = {**vars(SharingSettings()), "page_tokens": 64}
        refuse_unknown(self.name, settings, known)
        super().__init__(**{**known, **settings})
        PagePools(self.settings["page_tokens"])
        SharingSettings(**{name: value for name, value in self.settings.items() if name != "page_tokens"})
