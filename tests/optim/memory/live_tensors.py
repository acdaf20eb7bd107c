"""How many bytes of tensors are alive at once while something runs: the oracle of the activation formulas."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveTensors(TorchDispatchMode):
    """Counts the storages that operators make until they are freed; `peak` is the most bytes at once.

    What operators use inside of themselves is not seen. Storages of `known` tensors do not count.
    """

    def __init__(self, known=()):
        super().__init__()
        self.held = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._sizes = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor):
                self._note(leaf.untyped_storage())
        return output

    def _note(self, storage):
        key = storage._cdata
        if key in self._sizes or key in self._known:
            return
        self._sizes[key] = storage.nbytes()
        self.held += storage.nbytes()
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key):
        self.held -= self._sizes.pop(key, 0)
