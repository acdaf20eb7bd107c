"""Classes in front of a cache's own: hooks for what models note on a cache, whatever its class."""

from collections.abc import Callable
from functools import cache as remember_result

import torch
from torch.utils import _pytree as pytree
from transformers.cache_utils import Cache


class CacheFront:
    """What is put in front of the class of a cache object: [`put_in_front`].

    A plain cache offers no hook for notes that belong to its rows. Classes that derive from this one, each directly,
    extend `move_notes`, and may be in front of each other.
    """

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.move_rows(super().reorder_cache, beam_idx, lambda rows: rows[beam_idx.to(rows.device)])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        chosen = torch.as_tensor(indices)
        self.move_rows(super().batch_select_indices, indices, lambda rows: rows[chosen.to(rows.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.move_rows(super().batch_repeat_interleave, repeats, lambda rows: rows.repeat_interleave(repeats, dim=0))

    def move_rows(self, method: Callable, argument, move: Callable) -> None:
        """Has the cache's own `method` move its rows, and the notes do as they did."""
        method(argument)
        self.move_notes(move)

    def move_notes(self, move: Callable) -> None:
        """Replaces what is noted by row, (B, ...), by `move` of it."""

    def __reduce__(self):
        # The derived class has no name to be found by; a copy is made of the cache's own class and derived again.
        return _rebuild, (_own_class(type(self)), fronts_of(self), self.__dict__)


def put_in_front(front: type[CacheFront], cache: Cache) -> None:
    """Derives the class of a cache object from `front` and what it was, in place; once, and under the same name."""
    if not isinstance(cache, front):
        cache.__class__ = _derived(front, type(cache))


def fronts_of(cache: Cache) -> tuple[type[CacheFront], ...]:
    """What was put in front of a cache's class, the first one first."""
    return tuple(base for base in reversed(type(cache).__mro__) if CacheFront in base.__bases__)


def _own_class(cache_class: type) -> type:
    return next(base for base in cache_class.__mro__ if not issubclass(base, CacheFront))


@remember_result
def _derived(front: type, cache_class: type) -> type:
    derived = type(cache_class.__name__, (front, cache_class), {"__module__": cache_class.__module__})
    node = pytree.SUPPORTED_NODES.get(cache_class)
    if node is not None:  # `torch.export` and friends look a cache up by its exact type
        pytree.register_pytree_node(derived, node.flatten_fn, node.unflatten_fn)
    return derived


def _rebuild(cache_class: type, fronts: tuple, state: dict) -> Cache:
    cache = cache_class.__new__(cache_class)
    cache.__dict__.update(state)
    for front in fronts:
        put_in_front(front, cache)
    return cache
