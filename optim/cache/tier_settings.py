"""What the layers of a tiered KV cache share: how much each tier holds, the slow tier, and each other."""

import weakref
from dataclasses import dataclass

import torch
from transformers.cache_utils import CacheLayerMixin

from .memory_pool import require_positive
from .tier_segments import GROUP_TOKENS, HOT, INT4, INT8, TierLimits
from .tier_storage import FileStorage, HostStorage


DEFAULT_TOKENS = {HOT: 1024, INT8: 3072, INT4: 12288}
# Of `max_bytes`, where tokens are not given.
SHARES = {HOT: 0.5, INT8: 0.25, INT4: 0.25}


@dataclass(frozen=True)
class TierSettings:
    """What `TieredKVCache` takes besides a config; meanings and errors are its."""

    hot_tokens: int | None = None
    int8_tokens: int | None = None
    int4_tokens: int | None = None
    max_bytes: int | None = None
    folder: str | None = None
    segment_tokens: int = 256

    def __post_init__(self):
        require_positive("segment_tokens", self.segment_tokens)
        if self.max_bytes is not None:
            require_positive("max_bytes", self.max_bytes)
        if self.hot_tokens is not None:
            self._require_tokens("hot_tokens", self.hot_tokens, 2 * self.segment_tokens)
        for name in ("int8_tokens", "int4_tokens"):
            tokens = getattr(self, name)
            if tokens is not None and (tokens != 0 or isinstance(tokens, bool)):
                self._require_tokens(name, tokens, self.segment_tokens)
        if self.quantizes and self.segment_tokens % GROUP_TOKENS:
            raise ValueError(
                f"segment_tokens must be a multiple of {GROUP_TOKENS} to be quantized, got {self.segment_tokens}; "
                "give such a number, or int8_tokens=0 and int4_tokens=0."
            )

    @property
    def tokens(self) -> tuple[int | None, ...]:
        """Of each tier in memory, as given."""
        return self.hot_tokens, self.int8_tokens, self.int4_tokens

    @property
    def quantizes(self) -> bool:
        return self.int8_tokens != 0 or self.int4_tokens != 0

    @property
    def lowest(self) -> int:
        """The tier in whose form segments go to the slow tier."""
        return INT4 if self.int4_tokens != 0 else INT8 if self.int8_tokens != 0 else HOT

    def limits(self, layer_bytes: int | None) -> TierLimits:
        """Of one layer that may hold `layer_bytes` besides its tail."""
        segments, shares = [], []
        for tier, given in enumerate(self.tokens):
            by_share = given is None and layer_bytes is not None
            tokens = DEFAULT_TOKENS[tier] if given is None else given
            least = 1 if tier == HOT else 0
            segments.append(None if by_share else max(least, tokens // self.segment_tokens - least))
            shares.append(SHARES[tier] if by_share else None)
        return TierLimits(tuple(segments), tuple(shares), layer_bytes)

    def _require_tokens(self, name: str, tokens: int, least: int) -> None:
        if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < least:
            zero = "" if name == "hot_tokens" else "0 or "
            raise ValueError(
                f"{name} must be {zero}a whole number of at least {least} with segments of {self.segment_tokens} "
                f"tokens, got {tokens!r}; give more, or a smaller segment_tokens."
            )


class StaysHere:
    """Refuses to be pickled: a part of it may lie in a file that is this process's alone."""

    def __reduce_ex__(self, protocol):
        raise TypeError(
            f"{type(self).__name__} cannot be pickled, since a part of it may lie in a file of this process; pickle "
            "`TieredKVCache.to_dynamic()` instead, or use copy.deepcopy."
        )


class Tiers(StaysHere):
    """What the layers of a cache share: settings, the slow tier, and each other.

    Args:
        settings (`TierSettings`): of the cache.
        layers (`int`): how many there are.
        storage (*optional*): the slow tier; by default it is made when it is needed, or at once in a folder that was
            named, since that may not be there.
    """

    def __init__(self, settings: TierSettings, layers: int, storage: HostStorage | FileStorage | None = None):
        self.settings, self.count, self.storage, self.warned = settings, layers, storage, False
        if storage is None and settings.folder is not None:
            self.storage = FileStorage(settings.folder)
        self._layers: dict[int, weakref.ref] = {}

    def join(self, layer: CacheLayerMixin) -> None:
        self._layers[layer.index] = weakref.ref(layer)

    def storage_for(self, device: torch.device):
        """The slow tier: a file in the folder that was named, else host memory for accelerators, a file for CPUs."""
        if self.storage is None:
            self.storage = FileStorage() if device.type == "cpu" else HostStorage()
        return self.storage

    def prefetch(self, index: int) -> None:
        """Starts to read what layer `index` holds in the slow tier, the first layer after the last."""
        layer = self._layer(index % self.count)
        if layer is not None:
            layer.prefetch()

    def commit(self) -> None:
        """A forward is done: what was before it is let go."""
        for index in self._layers:
            layer = self._layer(index)
            if layer is not None:
                layer.commit()

    def undo(self) -> None:
        """A forward failed: every layer goes back to what it was before."""
        for index in self._layers:
            layer = self._layer(index)
            if layer is not None:
                layer.undo()

    def __deepcopy__(self, memo):
        copied = memo[id(self)] = type(self)(self.settings, self.count, self.storage)
        copied.warned = self.warned
        return copied

    def _layer(self, index: int) -> CacheLayerMixin | None:
        reference = self._layers.get(index)
        return None if reference is None else reference()
