"""What a cache really holds: bytes and entries of each layer, whether it keeps everything, evicts, packs or shares."""

from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch

from .general_memory_manager import GeneralMemoryManager
from .memory_units import format_bytes


@dataclass(frozen=True)
class LayerCount:
    """One layer of a cache.

    Args:
        logical (`int`): tokens that it has seen.
        physical (`int`): places for entries that a row has, the most of any head.
        bytes (`int`): all its tensors; of pages, those in use, shared ones too.
        dense_bytes (`int`): what plain keys and values of all tokens would take.
    """

    logical: int
    physical: int
    bytes: int
    dense_bytes: int


@dataclass(frozen=True)
class CacheCount:
    """A whole cache: its layers, and the bytes of all, in which pages that layers share count once."""

    layers: tuple[LayerCount, ...]
    bytes: int

    @property
    def dense_bytes(self) -> int:
        return sum(layer.dense_bytes for layer in self.layers)

    @property
    def share(self) -> float:
        """Bytes held for each byte of a plain cache; 1 for an empty one."""
        return self.bytes / self.dense_bytes if self.dense_bytes else 1.0

    @property
    def entry_share(self) -> float:
        """Places held for each token seen; 1 for an empty one."""
        logical = sum(layer.logical for layer in self.layers)
        return sum(layer.physical for layer in self.layers) / logical if logical else 1.0


class SparseMemoryManager(GeneralMemoryManager):
    """Counts what caches hold, of this package or of `transformers`, and holds them to the budget.

    Args: as for [`GeneralMemoryManager`]; `config`, of the model, gives the size of a plain entry.
    """

    def count(self, cache: Any, rows: int = 1, dtype: torch.dtype = torch.bfloat16) -> CacheCount:
        """The layers of `cache` as they are now.

        Args:
            rows (`int`), dtype (`torch.dtype`): of the plain cache that it is compared with.
        Raises:
            TypeError: for what has no layers.
        """
        if not hasattr(cache, "layers"):
            raise TypeError(f"only caches with layers can be counted, got {type(cache).__name__}.")
        text = None if self.config is None else self.config.get_text_config()
        entry = 0 if text is None else 2 * rows * text.num_key_value_heads * text.head_dim * dtype.itemsize
        seen: set[Any] = set()
        layers = []
        for layer in cache.layers:
            logical = int(layer.get_seq_length())
            layers.append(LayerCount(logical, physical_entries(layer), held_bytes(layer, seen), logical * entry))
        total = getattr(cache, "held_bytes", None)
        return CacheCount(tuple(layers), sum(layer.bytes for layer in layers) if total is None else total)

    def check(self, cache: Any) -> CacheCount:
        """Counts a cache.

        Raises:
            MemoryError: if it holds more than what is free of the budget.
        """
        count = self.count(cache)
        if count.bytes > self.free:
            raise MemoryError(
                f"the cache holds {format_bytes(count.bytes)} and {format_bytes(self.free)} are free of "
                f"{format_bytes(self.budget)}; crop or evict, or raise the budget."
            )
        return count


def physical_entries(layer: Any) -> int:
    """Places for entries that one row of a layer has, the most of any head."""
    logical = int(layer.get_seq_length())
    if not logical:
        return 0
    kept = getattr(layer, "kept_positions", None)
    if isinstance(kept, torch.Tensor):
        return int((kept >= 0).sum(-1).max())
    keys = getattr(layer, "keys", None)
    return keys.shape[-2] if isinstance(keys, torch.Tensor) and keys.ndim == 4 else logical


def held_bytes(layer: Any, seen: set[Any]) -> int:
    """Bytes of a layer: what it says itself, else those of its tensors whose storage is not in `seen` yet."""
    if not int(layer.get_seq_length()):
        return 0
    own = getattr(layer, "held_bytes", None)
    if own is not None:
        return own
    size = 0
    for tensor in _tensors(vars(layer)):
        storage = tensor.untyped_storage()
        key = (tensor.device, storage.data_ptr())
        if key not in seen:
            seen.add(key)
            size += storage.nbytes()
    return size


def _tensors(value: Any):
    """The tensors inside of attributes, lists, dictionaries and dataclasses."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name))
