"""A mechanism for each layer, phase and length: `attn_implementation="qwen3_vl_adaptive"`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .adaptive_settings import DEFAULTS, AdaptiveSettings, Rules
from .attention_exact import find_history
from .attention_kernels import is_decoding
from .attention_layout import AttentionLayout, register_attention
from .attention_mechanisms import ADAPTIVE, FORWARDS, PHASES, AttentionMechanisms
from .attention_technique import (
    AttentionTechnique,
    attention_modules,
    put_settings,
    refuse_attention_weights,
    settings_of,
)
from .attention_timing import checked_shapes, measure_mechanisms, save_timing


NAME = ADAPTIVE


def adaptive_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: AttentionLayout | torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    kv_layer=None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Attention by the mechanism that the module's settings name; see [`AdaptiveAttention`].

    Args:
        query (`torch.Tensor`): (B, H, T, D).
        key, value (`torch.Tensor`): (B, HK, S, D); the new tokens alone where `kv_layer` holds the history.
        attention_mask: whatever the mechanism takes: all take an [`AttentionLayout`], padding flags (B, S) and `None`.
        kv_layer (*optional*): a cache layer. A mechanism that does not read it gets the history gathered.
        kwargs: handed on, `visual_runs` among them.
    Returns:
        (B, T, H, D), and `None` for the weights.
    Raises:
        ValueError: if attention weights are asked for; and what the mechanism raises, as a sparse one does for a
            dense mask.
    """
    refuse_attention_weights(module, NAME, kwargs)
    attend = FORWARDS[choose_mechanism(module, query, key, attention_mask, kv_layer)]
    if getattr(attend, "reads_cache_layer", False):
        kwargs["kv_layer"] = kv_layer
    elif find_history(key, value, kv_layer)[2] is not None:
        key, value = kv_layer.dense()
    return attend(
        module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, is_causal=is_causal, **kwargs
    )


adaptive_attention_forward.reads_cache_layer = True
adaptive_attention_forward.reads_visual_runs = True


def choose_mechanism(module, query: torch.Tensor, key: torch.Tensor, attention_mask=None, kv_layer=None) -> str:
    """The mechanism that computes a call, by the arguments of the attention function."""
    rules = getattr(settings_of(module, NAME, DEFAULTS), phase_of(module, query, key.shape[1]))
    if isinstance(attention_mask, AttentionLayout):
        keys = attention_mask.query_offset + query.shape[2]  # without the unused places of a preallocated cache
    else:
        keys = key.shape[2] if kv_layer is None else kv_layer.get_seq_length()
    return _mechanism_at(rules, keys)


def phase_of(module, query: torch.Tensor, kv_heads: int) -> str:
    """The phase of a call, by the module and its query (B, H, T, D)."""
    if not getattr(module, "is_causal", True):
        return "vision"
    return "decode" if is_decoding(query, kv_heads) else "prefill"


def _mechanism_at(rules: Rules, keys: int) -> str:
    chosen = rules[0][1]
    for from_keys, mechanism in rules[1:]:
        if keys >= from_keys:
            chosen = mechanism
    return chosen


class AdaptiveAttention(AttentionTechnique):
    """Picks an attention mechanism by layer, phase (vision, prefill, decode) and length.

    Exact as long as the rules name exact mechanisms, as the default does; `exact` of an object says whether they do.
    Without rules of your own it costs and gains nothing over `qwen3_vl_exact`; it pays where the best mechanism
    changes with the length, or where some layers bear sparsity and others do not. What another technique has left at
    the layers, such as the budgets of [`AdaptiveSparse`], holds for a mechanism that `mechanisms` does not name.

    Args:
        config: accepted and not read.
        attention_type (`str`, *optional*): a mechanism for every phase it serves that has no rules of its own: "flash"
            (exact), "sparse", "dynamic_sparse", "memory_efficient", or a full name.
        settings: the fields of [`AdaptiveSettings`].
    Raises:
        ValueError: for an unknown or invalid setting.
    """

    name = NAME
    exact = False
    settings_class = AdaptiveSettings

    def __init__(self, config=None, attention_type: str | None = None, **settings: Any):
        if attention_type is not None:
            mechanism = AttentionMechanisms.get(attention_type)
            settings = {**dict.fromkeys(mechanism.phases, mechanism.name), **settings}
        super().__init__(config, **settings)
        self.exact = all(AttentionMechanisms.get(name).exact for name in self.options.used)
        self._replaced: list[tuple[torch.nn.Module, str, Any]] = []

    def apply(self, model) -> None:
        """Selects the mechanism by name and hands every layer its rules.

        Raises:
            ValueError: if `layers` numbers a layer that the model does not have, or it is applied already.
        """
        towers = _towers(model)
        self._check_layers(towers)
        own = [
            (module, name, settings)
            for modules in towers.values()
            for layer, module in enumerate(modules)
            for name, settings in self.options.of_layer(layer).items()
        ]
        before = [(module, name, settings_of(module, name, None)) for module, name, _ in own]
        super().apply(model)
        self._replaced = before
        for module, name, settings in own:
            put_settings(module, name, settings)

    def revert(self, model) -> None:
        super().revert(model)
        for module, name, before in self._replaced:
            put_settings(module, name, before)
        self._replaced = []

    def describe(self, model) -> str:
        """What runs where in `model`, a line for every run of layers with the same rules."""
        lines = []
        for phase, modules in _towers_by_phase(model):
            noun = "blocks" if phase == "vision" else "layers"
            for first, last, rules in _equal_runs([self.options.rules(phase, n) for n in range(len(modules))]):
                parts = [rules[0][1], *(f"from {start} keys {name}" for start, name in rules[1:])]
                lossy = any(not AttentionMechanisms.get(name).exact for _, name in rules)
                lines.append(f"{phase}, {noun} {first}-{last}: {', '.join(parts)}{' (lossy)' if lossy else ''}")
        return "\n".join(lines)

    @staticmethod
    def measure(
        shapes_or_model,
        mechanisms: Sequence[str] | Mapping[str, Mapping] | None = None,
        lengths: Sequence[int] | None = None,
        seconds: float = 10.0,
        path: str | Path | None = None,
        paged: bool = False,
    ) -> AdaptiveSettings:
        """Times mechanisms on this machine, in turns, and keeps the rules that follow.

        The inputs are random, with neighbouring tokens alike. What a mechanism gains that chooses by content depends
        on the content, so compare such ones on inputs of your own before you rely on the rules.

        Args:
            shapes_or_model: a model, or [`AttentionShape`]s under "decoder" and "vision".
            mechanisms: names, or settings by name. A lossy mechanism is measured and picked only if it is named here;
                by default the exact ones are.
            lengths (`Sequence[int]`): numbers of keys, default 256, 1,024, 4,096 and 16,384.
            seconds (`float`): time that the run takes. The longest lengths are left out where it does not suffice.
            path (*optional*): a JSON file, which may hold other runs; by default
                `~/.cache/qwen3_vl/attention_timing.json`.
            paged (`bool`): whether decoding is timed with a paged cache.
        Returns:
            The rules, as [`AdaptiveSettings.from_timing`] reads them back.
        Raises:
            ValueError: for an unknown mechanism or setting, lengths below 1, or a file that holds something else.
        """
        run = measure_mechanisms(checked_shapes(shapes_or_model), mechanisms, lengths, seconds, paged)
        save_timing(run, path)
        return AdaptiveSettings(**run["rules"], mechanisms=run["mechanisms"])

    def _check_layers(self, towers: dict[str, list]) -> None:
        for layer, phases in self.options.layers.items():
            for phase in phases:
                count = len(towers["vision" if phase == "vision" else "decoder"])
                if layer >= count:
                    raise ValueError(
                        f"layers has rules for {phase} in layer {layer}, but the model has {count} there, numbered "
                        "from 0 on."
                    )


def _towers(model) -> dict[str, list]:
    """The attention modules of the decoder and of the vision tower, in their order."""
    modules = attention_modules(model)
    return {
        "decoder": [module for module in modules if module.is_causal],
        "vision": [module for module in modules if not module.is_causal],
    }


def _towers_by_phase(model) -> list[tuple[str, list]]:
    towers = _towers(model)
    return [(phase, towers["vision" if phase == "vision" else "decoder"]) for phase in PHASES]


def _equal_runs(rules: list[Rules]) -> list[tuple[int, int, Rules]]:
    """First and last number of neighbours that are equal."""
    runs: list[tuple[int, int, Rules]] = []
    for number, own in enumerate(rules):
        if runs and runs[-1][2] == own:
            runs[-1] = (runs[-1][0], number, own)
        else:
            runs.append((number, number, own))
    return runs


register_attention(NAME, adaptive_attention_forward)
