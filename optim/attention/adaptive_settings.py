"""The rules of adaptive attention: which mechanism computes what, checked, and as plain data for profiles."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from .attention_exact import NAME as EXACT
from .attention_mechanisms import ADAPTIVE, FORWARDS, PHASES, AttentionMechanisms, require_phase
from .attention_timing import checked_shapes, load_timing


Rules = tuple[tuple[int, str], ...]
ALWAYS_EXACT: Rules = ((0, EXACT),)


@dataclass(frozen=True)
class AdaptiveSettings:
    """Which mechanism computes what. By default exact attention computes everything.

    Rules are `[[0, mechanism], [from_keys, mechanism], ...]` in rising order: the last one whose `from_keys` is not
    above the number of keys counts. The name of a mechanism alone stands for all lengths. Everything can be given as
    JSON gives it back.

    Args:
        vision: rules by the patches of a frame.
        prefill, decode: rules by the tokens seen and new. Decoding is few new tokens, up to 32 query rows a KV head.
        layers: `{layer: {phase: rules}}`, where a layer differs from the others. Under "vision" the number is that of
            the vision block.
        mechanisms: `{mechanism: settings}`, for mechanisms whose defaults do not fit.
    Raises:
        ValueError: for rules out of order, an unknown phase, mechanism or setting, or a mechanism that does nothing of
            its own in a phase.
    """

    vision: Rules = ALWAYS_EXACT
    prefill: Rules = ALWAYS_EXACT
    decode: Rules = ALWAYS_EXACT
    layers: Mapping[int, Mapping[str, Rules]] = field(default_factory=dict)
    mechanisms: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        for phase in PHASES:
            object.__setattr__(self, phase, _checked_rules(getattr(self, phase), phase))
        layers = {_layer_number(layer): _checked_phases(own, layer) for layer, own in dict(self.layers).items()}
        object.__setattr__(self, "layers", layers)
        object.__setattr__(self, "mechanisms", dict(_checked_settings(*item) for item in self.mechanisms.items()))

    def rules(self, phase: str, layer: int | None = None) -> Rules:
        """The rules of a phase, in a layer if one is given."""
        require_phase(phase)
        return self.layers.get(layer, {}).get(phase, getattr(self, phase))

    def for_layer(self, layer: int) -> "AdaptiveSettings":
        """The same with what the layer has of its own taken in."""
        return replace(self, layers={}, **self.layers.get(layer, {}))

    def of_layer(self, layer: int) -> dict[str, Any]:
        """What the attention module of a layer holds as `attention_settings`: rules, and settings by mechanism."""
        return {ADAPTIVE: self.for_layer(layer), **self.mechanisms}

    @property
    def used(self) -> tuple[str, ...]:
        """The mechanisms that the rules name."""
        tables = [getattr(self, phase) for phase in PHASES]
        tables += [rules for own in self.layers.values() for rules in own.values()]
        return tuple(name for name in FORWARDS if any(name == named for rules in tables for _, named in rules))

    def to_dict(self) -> dict:
        """As plain data for JSON; `AdaptiveSettings(**data)` gives the same settings."""
        return {
            **{phase: _as_lists(getattr(self, phase)) for phase in PHASES},
            "layers": {
                str(layer): {phase: _as_lists(rules) for phase, rules in own.items()}
                for layer, own in self.layers.items()
            },
            "mechanisms": {name: asdict(settings) for name, settings in self.mechanisms.items()},
        }

    @classmethod
    def from_timing(cls, path: str | Path | None = None, model=None) -> "AdaptiveSettings":
        """The rules of a run of [`AdaptiveAttention.measure`] on this machine.

        Args:
            path (*optional*): the file that was written; by default the one in the user's cache.
            model (*optional*): a model, or its shapes, where the file holds runs of several.
        Raises:
            FileNotFoundError: if there is no file.
            ValueError: if the file holds no run of this processor and number of threads, or several.
        """
        run = load_timing(path, None if model is None else checked_shapes(model))
        return cls(**run["rules"], mechanisms=run["mechanisms"])


def _checked_rules(rules, phase: str) -> Rules:
    if isinstance(rules, str):
        rules = ((0, rules),)
    fits = isinstance(rules, Sequence) and all(isinstance(r, Sequence) and len(r) == 2 for r in rules)
    if not fits or not rules or any(isinstance(n, bool) or not isinstance(n, int) for n, _ in rules):
        raise ValueError(f"{phase} takes rules [[0, mechanism], [from_keys, mechanism], ...], got {rules!r}.")
    starts = [start for start, _ in rules]
    if starts[0] != 0 or any(later <= start for start, later in pairwise(starts)):
        raise ValueError(f"rules of {phase} must begin at 0 keys and rise, got {starts}; sort them.")
    return tuple((start, _mechanism_for(name, phase)) for start, name in rules)


def _mechanism_for(name: str, phase: str) -> str:
    full = AttentionMechanisms.resolve(name)
    if full == ADAPTIVE:
        raise ValueError(f"{ADAPTIVE} picks among the others and cannot pick itself in {phase}.")
    if phase not in AttentionMechanisms.get(full).phases:
        raise ValueError(
            f"{full} has nothing of its own in {phase}; name one of "
            f"{', '.join(AttentionMechanisms.serving(phase, exact_only=False))}."
        )
    return full


def _checked_phases(phases, layer) -> dict[str, Rules]:
    if not isinstance(phases, Mapping):
        raise ValueError(f"layer {layer} takes {{phase: rules}}, got {phases!r}.")
    for phase in phases:
        require_phase(phase)
    return {phase: _checked_rules(rules, phase) for phase, rules in phases.items()}


def _layer_number(layer) -> int:
    if isinstance(layer, str) and layer.isdecimal():
        layer = int(layer)  # as JSON gives it back
    if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
        raise ValueError(f"layers are numbered from 0 on, got {layer!r}.")
    return layer


def _checked_settings(name: str, settings) -> tuple[str, Any]:
    mechanism = AttentionMechanisms.get(name)
    if mechanism.name == ADAPTIVE:
        raise ValueError(f"{ADAPTIVE} has no settings among those of the mechanisms it picks.")
    if isinstance(settings, mechanism.technique.settings_class):
        return mechanism.name, settings
    if not isinstance(settings, Mapping):
        raise ValueError(f"settings of {mechanism.name} must be a dictionary, got {settings!r}.")
    return mechanism.name, mechanism.settings(**settings)


def _as_lists(rules: Rules) -> list[list]:
    return [list(rule) for rule in rules]


DEFAULTS = AdaptiveSettings()
