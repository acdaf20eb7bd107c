"""The attention mechanisms of this room by name: what each is for, and where it runs."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any

from ..technique_optim import refuse_unknown
from .attention_block_sparse import BlockSparseAttention, block_sparse_attention
from .attention_dynamic_sparse import DynamicSparseAttention, dynamic_sparse_attention
from .attention_exact import FlashAttention2, exact_attention_forward
from .attention_memory_efficient import MemoryEfficientAttention, memory_efficient_attention_forward
from .attention_technique import AttentionTechnique


PHASES = ("vision", "prefill", "decode")
ADAPTIVE = "qwen3_vl_adaptive"


@dataclass(frozen=True)
class Mechanism:
    """One way to compute attention.

    Args:
        forward (`Callable`): the attention function that is registered under the mechanism's name.
        technique (`type`): the class that selects it for a whole model.
        phases (`tuple[str, ...]`): of [`PHASES`], those in which it does its own work; in others it computes exactly.
        devices (`tuple[str, ...]`): types of device that it is written and tested for.
        description (`str`): one line.
    """

    forward: Callable
    technique: type[AttentionTechnique]
    phases: tuple[str, ...]
    devices: tuple[str, ...]
    description: str

    @property
    def name(self) -> str:
        return self.technique.name

    @property
    def exact(self) -> bool:
        """Whether it is exact whatever its settings; a technique that does not say so is not."""
        return getattr(self.technique, "exact", False)

    def settings(self, **values: Any):
        """The mechanism's settings object.

        Raises:
            ValueError: for an unknown or invalid setting.
        """
        known = [field.name for field in fields(self.technique.settings_class)]
        refuse_unknown(self.name, values, known)
        return self.technique.settings_class(**values)


_DEVICES = ("cpu", "cuda")
_MECHANISMS = {
    mechanism.name: mechanism
    for mechanism in (
        Mechanism(
            exact_attention_forward,
            FlashAttention2,
            PHASES,
            _DEVICES,
            "exact, by the fastest kernel at hand",
        ),
        Mechanism(
            block_sparse_attention,
            BlockSparseAttention,
            ("prefill", "decode"),
            _DEVICES,
            "first and latest tokens, the own picture or frame, and text",
        ),
        Mechanism(
            dynamic_sparse_attention,
            DynamicSparseAttention,
            ("prefill", "decode"),
            _DEVICES,
            "the blocks and pages of keys that hold most of the attention, chosen by content",
        ),
        Mechanism(
            memory_efficient_attention_forward,
            MemoryEfficientAttention,
            PHASES,
            _DEVICES,
            "exact, in chunks, with memory that does not grow with the length",
        ),
    )
}
# What a rule of the adaptive mechanism can name; a plain dictionary, since it is read inside compiled graphs.
FORWARDS: dict[str, Callable] = {name: mechanism.forward for name, mechanism in _MECHANISMS.items()}

ALIASES = {
    "flash": FlashAttention2.name,
    "sparse": BlockSparseAttention.name,
    "dynamic_sparse": DynamicSparseAttention.name,
    "memory_efficient": MemoryEfficientAttention.name,
    "adaptive": ADAPTIVE,
}


class AttentionMechanisms:
    """The registry of attention mechanisms. Names and their short forms are taken alike.

    >>> AttentionMechanisms.get("flash").name
    'qwen3_vl_exact'
    """

    @staticmethod
    def names() -> tuple[str, ...]:
        """The full names, each an `attn_implementation`."""
        return (*_MECHANISMS, ADAPTIVE)

    @staticmethod
    def resolve(name: str) -> str:
        """The full name of a mechanism.

        Raises:
            ValueError: for an unknown one; the nearest known name is suggested.
        """
        full = ALIASES.get(name, name) if isinstance(name, str) else None
        if full in AttentionMechanisms.names():
            return full
        known = (*AttentionMechanisms.names(), *ALIASES)
        nearest = get_close_matches(str(name), known, n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"known: {', '.join(known)}."
        raise ValueError(f"there is no attention mechanism {name!r}; {hint}")

    @staticmethod
    def get(name: str) -> Mechanism:
        """A mechanism by its name or short form.

        Raises:
            ValueError: for an unknown one; the nearest known name is suggested.
        """
        full = AttentionMechanisms.resolve(name)
        return _adaptive() if full == ADAPTIVE else _MECHANISMS[full]

    @staticmethod
    def serving(phase: str, device: str = "cpu", exact_only: bool = True) -> tuple[str, ...]:
        """The mechanisms among which there is a choice in a phase, on a type of device; only exact ones by default.

        Raises:
            ValueError: for an unknown phase.
        """
        require_phase(phase)
        return tuple(
            name
            for name, mechanism in _MECHANISMS.items()
            if phase in mechanism.phases and device in mechanism.devices and (mechanism.exact or not exact_only)
        )

    @staticmethod
    def describe() -> str:
        """A line for each mechanism: name, short form, exact or lossy, phases, what it is."""
        short = {full: alias for alias, full in ALIASES.items()}
        lines = []
        for name in AttentionMechanisms.names():
            mechanism = AttentionMechanisms.get(name)
            kind = "exact" if mechanism.exact else "lossy" if name in _MECHANISMS else "exact or lossy"
            phases = ", ".join(mechanism.phases)
            lines.append(f"{name} ({short[name]}): {kind}; {phases}; {mechanism.description}")
        return "\n".join(lines)


def require_phase(phase: str) -> None:
    """Raises a `ValueError` for anything but a phase."""
    if phase not in PHASES:
        nearest = get_close_matches(str(phase), PHASES, n=1) or PHASES
        raise ValueError(f"there is no phase {phase!r} of attention; did you mean {' or '.join(map(repr, nearest))}?")


def _adaptive() -> Mechanism:
    # Imported here, since it picks among the others and so imports this file.
    from .attention_adaptive import AdaptiveAttention, adaptive_attention_forward

    return Mechanism(
        adaptive_attention_forward, AdaptiveAttention, PHASES, _DEVICES, "one of the others by layer, phase and length"
    )
