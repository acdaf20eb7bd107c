"""What the cache classes of this room share: checks, conversions, and what follows a cache into its copy."""

from typing import ClassVar

import numpy as np
import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from ..technique_optim import Technique
from .cache_front import fronts_of, put_in_front


# What models of this package note on a cache under such names belongs to the conversation, whatever holds it.
NOTE_PREFIX = "_qwen3_vl_"


class NoPickle:
    """Refuses to be pickled: what it stands for are places in this process's memory."""

    def __reduce_ex__(self, protocol):
        raise TypeError(
            f"{type(self).__name__} cannot be pickled, since its pages live in a pool of this process; "
            "pickle what the cache's to_dynamic() gives instead, or use copy.deepcopy."
        )


class HistoryLayer(CacheLayerMixin):
    """A layer that holds all tokens that it has seen in a form of its own, which attention functions read in place.

    `keys` and `values` stay `None`. Classes bring `update`, `dense`, `attend` or `page_view`, `get_seq_length`,
    `batch_select_indices`, `reset`, and `_crop_to`, which keeps the first tokens, at least one and not all.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False

    @property
    def reader(self):
        """What an attention function reads in place of a dense history."""
        return self

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    @torch.compiler.disable
    def crop(self, tokens_to_remove: int) -> None:
        """Drops the newest tokens of all rows, given as a negative count; 0 does nothing.

        Raises:
            ValueError: for a positive count.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a negative count of tokens to drop, got {tokens_to_remove}.")
        if not tokens_to_remove or not self.get_seq_length():
            return
        length = self.get_seq_length() + tokens_to_remove
        if length <= 0:
            self.reset()
        else:
            self._crop_to(length)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def _require_content(self) -> None:
        if not self.get_seq_length():
            raise ValueError("the layer holds no tokens yet; call update() first.")


class HistoryCache(Cache):
    """A cache whose layers hold every token that they have seen, in a form of their own.

    Layers have `dense()` and `held_bytes`.
    """

    @property
    def held_bytes(self) -> int:
        """Bytes that all layers hold in the device's memory; what rows share counts once."""
        return sum(layer.held_bytes for layer in self.layers)

    @classmethod
    def from_dynamic(cls, cache: Cache, **options) -> "HistoryCache":
        """A cache of this class with the content of one that holds all tokens of full attention and stays as it is.

        Args:
            cache (`Cache`): such as `DynamicCache`, or another of this package.
            options: the arguments of the class.
        Raises:
            ValueError: if a layer of `cache` does not hold every token that it has seen.
        """
        made = cls(**options)
        for index, layer in enumerate(cache.layers):
            if layer.get_seq_length():
                made.update(*whole_history(cache, index), index, dense=False)
        return with_notes(made, cache)

    def to_dynamic(self) -> DynamicCache:
        """A `DynamicCache` with the same content, unpacked; this one stays as it is."""
        dynamic = DynamicCache()
        for index, layer in enumerate(self.layers):
            if layer.get_seq_length():
                dynamic.update(*layer.dense(), index)
        return with_notes(dynamic, self)


class CroppingCache(HistoryCache):
    """A `HistoryCache` that takes a failed forward back by cropping the layers that had done it."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `update` of the layers. If a layer fails, those before it drop the new tokens too."""
        try:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        except Exception:
            new, seen = key_states.shape[-2], self.get_seq_length(layer_idx)
            for layer in self.layers[:layer_idx]:
                if layer.get_seq_length() == seen + new:
                    layer.crop(-new)
            raise

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        super().reorder_cache(beam_idx.cpu())  # once, and not by every layer

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(torch.as_tensor(indices).cpu())


class CacheTechnique(Technique):
    """A technique that acts through the cache port alone: every request of `generate()` gets a `cache_class`."""

    role = "cache"
    cache_class: ClassVar[type[Cache]]

    def apply(self, model) -> None:
        """Nothing to change: the cache is asked for by `make_cache`."""

    def revert(self, model) -> None:
        """Nothing to undo."""

    def make_cache(self, model, batch_size: int, max_length: int) -> Cache:
        return self.cache_class(model.config, **self.settings)


class HistoryWithoutGradient(torch.autograd.Function):
    """Passes a history on whose keys and values were stored, and says so when somebody wants their gradient."""

    @staticmethod
    def forward(ctx, history, new_states):
        return history.view_as(history)

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("this cache keeps no gradients of the history; train in one forward, or with DynamicCache.")


def count_full_attention(config, cache_name: str) -> int:
    """The number of decoder layers.

    Raises:
        ValueError: if the model has layers that are not full attention, or none.
    """
    kinds = [type(layer) for layer in DynamicCache(config=config).layers]
    others = sorted({kind.__name__ for kind in kinds if kind is not DynamicLayer})
    if others or not kinds:
        raise ValueError(f"{cache_name} is for layers of full attention alone, but the model has {others}.")
    return len(kinds)


def whole_history(cache: Cache, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values (B, KV heads, tokens, head_dim) of all tokens that a layer has seen.

    Raises:
        ValueError: if the layer does not hold them all.
    """
    layer = cache.layers[index]
    seen, keys, values = int(layer.get_seq_length()), layer.keys, layer.values
    if keys is None and seen and hasattr(layer, "dense"):
        keys, values = layer.dense()
    if getattr(layer, "is_sliding", False) or keys is None or keys.ndim != 4 or keys.shape[2] != seen:
        raise ValueError(
            f"layer {index} of the {type(cache).__name__} does not hold the {seen} tokens that it has seen; "
            "only filled caches of plain full attention can be converted, such as DynamicCache."
        )
    return keys, values


def require_alike(keys: torch.Tensor, values: torch.Tensor) -> None:
    """Raises a `ValueError` unless both are (batch, KV heads, tokens, head_dim), of one dtype and device."""
    if keys.ndim != 4 or keys.shape != values.shape or keys.dtype != values.dtype or keys.device != values.device:
        raise ValueError(
            "keys and values must be alike and of shape (batch, KV heads, tokens, head_dim), got "
            f"{tuple(keys.shape)} in {keys.dtype} and {tuple(values.shape)} in {values.dtype}."
        )


def require_rows(given: int, held: int) -> None:
    """Raises a `ValueError` unless a batch has as many rows as a cache holds."""
    if given != held:
        raise ValueError(
            f"the cache holds {held} rows but the batch has {given}; use a cache made for this batch, "
            "or move its rows with reorder_cache, batch_select_indices or batch_repeat_interleave first."
        )


def row_numbers(indices, rows: int) -> np.ndarray:
    """Row numbers (n,) out of numbers or flags.

    Raises:
        IndexError: for a row that does not exist.
    """
    numbers = torch.as_tensor(indices).cpu().numpy()
    if numbers.dtype == bool and numbers.shape == (rows,):
        return np.flatnonzero(numbers)
    fits = numbers.ndim == 1 and (np.issubdtype(numbers.dtype, np.integer) or not numbers.size)
    if not fits or (numbers.size and (numbers.min() < -rows or numbers.max() >= rows)):
        raise IndexError(
            f"the cache has {rows} rows, got indices {numbers.tolist()}; give row numbers or one flag a row."
        )
    return numbers.astype(np.int64)


def with_notes(target: Cache, source: Cache) -> Cache:
    """Takes over what a model noted on `source`, as M-RoPE positions, and the classes in front that look after it."""
    for name, note in vars(source).items():
        if name.startswith(NOTE_PREFIX):
            setattr(target, name, note)
    for front in fronts_of(source):
        put_in_front(front, target)
    return target
