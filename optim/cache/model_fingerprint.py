"""Whether a model still computes what it computed when something of it was kept."""

import contextlib
import weakref

import torch

from ..attention.attention_technique import implementations


# Of adapters (PEFT): which are on, how strong they are, and whether they are merged.
_ADAPTER_STATE = ("_active_adapter", "_disable_adapters", "merged_adapters", "scaling")


class ModelFingerprint:
    """What decides a module's results at one moment: weights, attention, adapters, active techniques, autocast.

    Notices a weight that was replaced, moved or cast, and one that was changed in place, by an optimizer or by
    loading a state. Writes through `weight.data` are not counted by PyTorch and go unnoticed, and so do those to
    weights that were made in inference mode. Costs a walk over the modules, a few milliseconds for hundreds.

    Args:
        module (`nn.Module`): a model, or its vision tower.
    """

    def __init__(self, module):
        tensors, self._settings, self._objects = _inspect(module)
        self._tensors = [(weakref.ref(tensor), *_place(tensor)) for tensor in tensors]

    def matches(self, module) -> bool:
        """Whether `module` is what it was, or would at least compute the same in the same way."""
        tensors, settings, objects = _inspect(module)
        return (
            len(tensors) == len(self._tensors)
            and settings == self._settings
            and len(objects) == len(self._objects)
            and all(one is other for one, other in zip(objects, self._objects, strict=True))
            and all(
                reference() is tensor and (address, version) == _place(tensor)
                for (reference, address, version), tensor in zip(self._tensors, tensors, strict=True)
            )
        )


def _inspect(module) -> tuple[list, list, list]:
    """Tensors, settings to be compared by value, and objects to be compared by identity."""
    tensors, settings = [], [implementations(module)]
    device = module.device.type
    if torch.is_autocast_enabled(device):
        settings.append(torch.get_autocast_dtype(device))
    objects = list(getattr(module, "active_techniques", ()))
    for part in module.modules():
        state = vars(part)
        for group in (state["_parameters"], state["_buffers"]):
            tensors.extend(tensor for tensor in group.values() if tensor is not None)
        settings.extend(repr(state[name]) for name in _ADAPTER_STATE if name in state)
        objects.extend(state.get("attention_settings", {}).values())
    return tensors, settings, objects


def _place(tensor: torch.Tensor) -> tuple[int, int]:
    address = 0
    with contextlib.suppress(RuntimeError):  # some quantized weights have no storage of their own
        address = tensor.data_ptr()
    return address, -1 if tensor.is_inference() else tensor._version
