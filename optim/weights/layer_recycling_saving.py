"""Saving and loading of decoder layers that share weights.

Expanded, a folder is an ordinary checkpoint. Shared, it names a quantization method that only this package registers,
through the extension point of `transformers` for checkpoints whose modules differ: modules are put in place before the
weights come. The one copy of a shared weight has a leading dimension of 1 there, under the name of the group's first
layer. So whoever does not know the method stops at shapes that do not fit, and never runs with weights missing.
"""

import torch
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .low_rank import LowRankLinear, expand_low_rank, is_low_rank
from .save_wrapper import SaveWrapper


METHOD = "qwen3_vl_layer_recycling"
TECHNIQUE = "layer_recycling"
STORAGES = ("expanded", "shared")


def check_storage(storage: str) -> str:
    """The argument, if it is a way to save. Raises a `ValueError` otherwise."""
    if storage not in STORAGES:
        raise ValueError(f"storage must be one of {', '.join(STORAGES)}, got {storage!r}.")
    return storage


def decoder_of(model) -> nn.Module:
    """The module that holds the decoder's `layers`."""
    for module in model.modules():
        if hasattr(module, "layers") and hasattr(module, "embed_tokens"):
            return module
    raise ValueError(f"{type(model).__name__} has no decoder with layers; pass a Qwen3-VL model.")


def linear_names(layer: nn.Module) -> list[str]:
    """The linear layers of a decoder layer, by their names in it."""
    return [name for name, module in layer.named_modules() if isinstance(module, nn.Linear)]


class RecyclingSaver(SaveWrapper):
    """Saves the weights expanded, or each shared one once; the configuration is as before when it returns.

    Args:
        groups (`list[list[int]]`): decoder layers that share weights.
        storage (`str`): "expanded" or "shared"; `save_pretrained(folder, storage=...)` says otherwise for once.
    """

    def __init__(self, model, groups: list[list[int]], storage: str):
        super().__init__(model)
        self.groups, self.storage = groups, storage
        self.owned = True  # by a technique that is applied

    @property
    def rank(self) -> int:
        return next(module.rank for _, module in self._recycled())

    def save(self, save_directory, is_main_process: bool, state_dict: dict, storage: str | None = None, **kwargs):
        storage = check_storage(storage or self.storage)
        state_dict = self._expand(state_dict) if storage == "expanded" else self._without_copies(state_dict)
        config, before = self.model.config, dict(vars(self.model.config))
        try:
            self._describe(config, storage)
            return super().save(save_directory, is_main_process, state_dict, **kwargs)
        finally:
            for name in ("optim", "quantization_config"):
                vars(config).pop(name, None)
                if name in before:
                    setattr(config, name, before[name])

    def _describe(self, config, storage: str) -> None:
        """Writes into `config` how the folder is to be loaded."""
        profile = getattr(config, "optim", None)
        if storage == "expanded":
            if isinstance(profile, dict) and TECHNIQUE in profile:
                config.optim = {name: settings for name, settings in profile.items() if name != TECHNIQUE} or None
            return
        if getattr(config, "quantization_config", None) is not None:
            raise ValueError(
                "a quantized model cannot be saved with shared layers; save it with storage='expanded', or before it "
                "is quantized."
            )
        config.quantization_config = RecyclingConfig(groups=self.groups, rank=self.rank)
        settings = {"groups": self.groups, "rank": self.rank, "storage": "shared"}
        config.optim = {**(profile if isinstance(profile, dict) else {}), TECHNIQUE: settings}

    def _recycled(self) -> list[tuple[str, LowRankLinear]]:
        return [(name, module) for name, module in self.model.named_modules() if is_low_rank(module)]

    def _expand(self, state_dict: dict) -> dict:
        """Official names and shapes: every shared layer gets a weight of its own."""
        for name, _ in self._recycled():
            down, up = state_dict.pop(f"{name}.adapter_down"), state_dict.pop(f"{name}.adapter_up")
            state_dict[f"{name}.weight"] = expand_low_rank(state_dict[f"{name}.weight"], down, up)
        return state_dict

    def _without_copies(self, state_dict: dict) -> dict:
        """Each shared weight once, (1, out, in) under the group's first layer."""
        seen = set()
        for name, module in self._recycled():
            weight = state_dict.pop(f"{name}.weight")
            if module.weight not in seen:
                state_dict[f"{name}.weight"] = weight[None]
            seen.add(module.weight)
        return state_dict


class RecyclingConfig(QuantizationConfigMixin):
    """What `config.json` says of a folder with shared layers: the `groups` and the `rank` of the adapters."""

    def __init__(self, groups=None, rank: int = 16, quant_method: str = METHOD, **kwargs):
        self.quant_method = METHOD
        self.groups, self.rank = groups, rank


class RecyclingLoader(HfQuantizer):
    """Puts shared layers into a model before its weights are read, and ties them afterwards."""

    requires_calibration = False

    def _process_model_before_weight_loading(self, model, **kwargs):
        layers = decoder_of(model).layers
        rank = self.quantization_config.rank
        for group in self.quantization_config.groups:
            for layer in group:
                for name in linear_names(layers[layer]):
                    linear = layers[layer].get_submodule(name)
                    made = _empty_like(linear, rank, owns=layer == group[0])
                    parent, _, attribute = name.rpartition(".")
                    setattr(layers[layer].get_submodule(parent), attribute, made)
        return model

    def postprocess_model(self, model, **kwargs):
        """Not as in other methods, whose models stay marked as quantized: this one is trained and cast as any."""
        layers, groups = decoder_of(model).layers, self.quantization_config.groups
        for group in groups:
            for name in linear_names(layers[group[0]]):
                first = layers[group[0]].get_submodule(name)
                first.weight = nn.Parameter(first.weight.detach()[0], requires_grad=first.weight.requires_grad)
                for layer in group[1:]:
                    layers[layer].get_submodule(name).weight = first.weight
        self.remove_quantization_config(model)
        RecyclingSaver(model, groups, "shared").owned = False

    def is_serializable(self, *args, **kwargs) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def _empty_like(linear: nn.Linear, rank: int, owns: bool) -> LowRankLinear:
    """A shared layer on the device of `linear`; only the owner has a weight, of shape (1, out, in)."""
    weight = nn.Parameter(torch.empty_like(linear.weight)[None]) if owns else None
    made = LowRankLinear(
        weight,
        linear.weight.new_empty(rank, linear.in_features),
        linear.weight.new_empty(linear.out_features, rank),
        linear.bias,
    )
    made._is_hf_initialized = True
    return made


def loaded_recycled(model) -> RecyclingSaver | None:
    """The saver of a model that was loaded from a folder with shared layers, until a technique takes it over."""
    saver = vars(model).get("save_pretrained")
    # By attribute: beside a Hub copy of the code there are two of each class.
    while saver is not None and getattr(saver, "owned", True):
        saver = saver.replaced
    return saver


def register_loader() -> None:
    """Makes `from_pretrained` know folders with shared layers; again, after [`withdraw_loader`]."""
    # Not by the decorators, which refuse a second registration, as from a Hub copy beside the package.
    AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = RecyclingConfig
    AUTO_QUANTIZER_MAPPING[METHOD] = RecyclingLoader


def withdraw_loader() -> None:
    """Takes our names out of the tables of `transformers`, unless another copy of this code has put its own there."""
    tables = (AUTO_QUANTIZATION_CONFIG_MAPPING, RecyclingConfig), (AUTO_QUANTIZER_MAPPING, RecyclingLoader)
    for table, ours in tables:
        if table.get(METHOD) is ours:
            del table[METHOD]


register_loader()
