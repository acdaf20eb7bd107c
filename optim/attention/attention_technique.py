"""What the attention techniques share: switching a model over and back, their settings, and what they refuse."""

from dataclasses import fields
from typing import Any, ClassVar

from ..technique_optim import Technique, refuse_unknown


class AttentionTechnique(Technique):
    """An attention implementation as a technique: `apply` selects it by name and hands its settings to the modules.

    `settings_class` is a frozen dataclass that checks itself; its fields are the keyword arguments.
    """

    role = "attention"
    settings_class: ClassVar[type]
    parts: ClassVar[tuple[str, ...]] = ("text_config", "vision_config")

    def __init__(self, config=None, **settings: Any):
        refuse_unknown(self.name, settings, (field.name for field in fields(self.settings_class)))
        super().__init__(**settings)
        self.options = self.settings_class(**settings)
        self._before: dict[str, str] | None = None

    def apply(self, model) -> None:
        if self._before is not None:
            raise ValueError(f"{self.name} is already applied; revert it first.")
        before = implementations(model)
        model.set_attn_implementation({part: self.name for part in self.parts if part in before} or self.name)
        self._before = before
        modules = attention_modules(model)
        self._settings_before = [(module, settings_of(module, self.name, None)) for module in modules]
        for module in modules:
            put_settings(module, self.name, self.options)

    def revert(self, model) -> None:
        if self._before is None:
            return
        model.set_attn_implementation({part: name for part, name in self._before.items() if part} or self._before[""])
        self._before = None
        for module, before in self._settings_before:
            put_settings(module, self.name, before)


def implementations(model) -> dict[str, str]:
    """The attention implementation of a model (under "") and of each part of its configuration."""
    config = model.config
    found = {"": config._attn_implementation}
    for part in getattr(config, "sub_configs", {}):
        found[part] = getattr(config, part)._attn_implementation
    return found


def attention_modules(model) -> list:
    """The modules that look their attention implementation up by name: of the decoder and of the vision tower."""
    return [module for module in model.modules() if hasattr(module, "scaling") and hasattr(module, "is_causal")]


def settings_of(module, name: str, default):
    """The settings that a technique left at an attention module, else the defaults."""
    return getattr(module, "attention_settings", {}).get(name, default)


def put_settings(module, name: str, options) -> None:
    """Leaves a technique's settings at an attention module, or takes them away with `None`."""
    settings = {key: value for key, value in getattr(module, "attention_settings", {}).items() if key != name}
    if options is not None:
        settings[name] = options
    if settings:
        module.attention_settings = settings
    else:
        vars(module).pop("attention_settings", None)


def refuse_attention_weights(module, name: str, kwargs: dict) -> None:
    """Raises a `ValueError` when the attention weights are asked for, which these implementations never form."""
    asked = kwargs.get("output_attentions")
    if asked is None:
        asked = getattr(getattr(module, "config", None), "output_attentions", False)
    if asked:
        raise ValueError(
            f"output_attentions=True was asked of {name!r}, which never forms the weights; load the model with "
            "attn_implementation='eager' for them."
        )


def refuse_dropout(name: str, dropout: float) -> None:
    """Raises a `ValueError` for attention dropout, which these implementations do not have."""
    if dropout:
        raise ValueError(
            f"attention dropout {dropout} was asked of {name!r}, which has none; set attention_dropout=0 or train "
            "with attn_implementation='sdpa'."
        )


def refuse_dense_mask(name: str, mask) -> None:
    """Raises a `ValueError` for a dense mask, which says nothing about blocks."""
    shape = tuple(mask.shape)
    raise ValueError(
        f"{name!r} got a dense mask of shape {shape}; it takes causal, padded and packed rows. Use "
        "attn_implementation='qwen3_vl_exact' for other patterns."
    )
