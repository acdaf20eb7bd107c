"""The sections of an optimization profile: frozen, checked when made, and written as plain dictionaries.

Each field acts through one technique of `optim/registry_optim.py`; `UnifiedConfig.techniques` says which.
"""

import math
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from typing import Any


CACHE_KINDS = ("auto", "dynamic", "paged", "int8", "int4", "int2", "tiered", "evicting")


def setting(default: Any, *, least: float | None = None, most: float | None = None, choices: tuple = ()) -> Any:
    """A field with a range (both ends included) or a list of values; `None`, where it is the default, always fits."""
    limits = {"least": least, "most": most, "choices": choices}
    return field(default=default, metadata=limits)


@dataclass(frozen=True)
class ProfileSection:
    """Values that are checked when they are given.

    Raises:
        ValueError: for a value out of range or of another type.
    """

    def __post_init__(self):
        for entry in fields(self):
            self._check(entry, getattr(self, entry.name))

    def _check(self, entry, value) -> None:
        wanted, limits = entry.type, entry.metadata
        if not _is_of(value, wanted):
            name = getattr(wanted, "__name__", str(wanted))
            raise ValueError(f"{self._label(entry)} must be {name}, got {value!r}.")
        if value is None or isinstance(value, bool | dict):
            return
        if limits["choices"] and value not in limits["choices"]:
            known = ", ".join(map(str, limits["choices"]))
            raise ValueError(f"{self._label(entry)} must be one of {known}, got {value!r}.")
        if isinstance(value, str):
            return
        least, most = limits["least"], limits["most"]
        if not math.isfinite(value) or (least is not None and value < least) or (most is not None and value > most):
            span = f"at least {least}" if most is None else f"from {least} to {most}"
            raise ValueError(f"{self._label(entry)} must be {span}, got {value!r}.")

    def _label(self, entry) -> str:
        return f"{type(self).__name__}.{entry.name}"

    def to_dict(self) -> dict[str, Any]:
        """What differs from the defaults, of types that JSON has."""
        return {name: value for name, value in asdict(self).items() if value != _default(type(self), name)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ProfileSection":
        """The section of a dictionary.

        Raises:
            ValueError: for a key that the section does not have, with the nearest that it has.
        """
        if not isinstance(values, dict):
            raise ValueError(f"{cls.__name__} must be a dictionary, got {type(values).__name__}.")
        refuse_keys(values, [entry.name for entry in fields(cls)], cls.__name__)
        return cls(**values)

    @classmethod
    def schema(cls) -> dict[str, Any]:
        """The section as JSON schema."""
        properties = {entry.name: _field_schema(entry) for entry in fields(cls)}
        return {"type": "object", "additionalProperties": False, "properties": properties}


@dataclass(frozen=True)
class MemoryConfig(ProfileSection):
    """What may be held, and how.

    Args:
        budget_bytes (`int`, *optional*): of weights, KV cache and a decoding step together; `auto` picks by it.
        kv_cache (`str`): `auto` for the exact one that suits the attention, or, with a budget, the best that fits;
            `dynamic`, `paged`, `int8`, `int4`, `int2`, `tiered`, `evicting`.
        lossy_cache (`bool`): whether `auto` may pack keys and values under a budget.
        prefix_cache_bytes (`int`): kept of prompts that were seen, with their pictures; 0 for nothing.
        vision_feature_bytes (`int`): kept of pictures that come again behind other text; 0 for nothing.
        vision_patches (`int`, *optional*): most patches that the vision tower takes at once.
    """

    budget_bytes: int | None = setting(None, least=1)
    kv_cache: str = setting("auto", choices=CACHE_KINDS)
    lossy_cache: bool = setting(False)
    prefix_cache_bytes: int = setting(0, least=0)
    vision_feature_bytes: int = setting(0, least=0)
    vision_patches: int | None = setting(None, least=1)


@dataclass(frozen=True)
class CPUConfig(ProfileSection):
    """What a CPU does.

    Args:
        threads (`int`, *optional*): of PyTorch while `generate()` runs; by default as they are.
        decode_linear (`bool`): whether products of a few rows take our kernels, which read weights at the memory's
            speed.
        faster_rotary (`bool`): whether rotary tables are kept and the tower's states rotated in one pass.
    """

    threads: int | None = setting(None, least=1)
    decode_linear: bool = setting(False)
    faster_rotary: bool = setting(False)


@dataclass(frozen=True)
class GPUConfig(ProfileSection):
    """What an accelerator does.

    Args:
        kernels (`bool`): whether kernels are picked by device and capability ([`HardwareSpecificKernels`]).
        compile_decode (`bool`): whether the decoding step is compiled, over a cache of fixed shape.
    """

    kernels: bool = setting(False)
    compile_decode: bool = setting(False)


@dataclass(frozen=True)
class PowerManagementConfig(ProfileSection):
    """How much power `generate()` may take; its tokens stay the same.

    Args:
        max_watts (`float`, *optional*): average of the package, or of the GPU, where a counter can be read.
        cpu_share (`float`, *optional*): most CPU time of the threads per second, over 0 up to 1.
        battery_cpu_share (`float`, *optional*): the same while on battery.
    """

    max_watts: float | None = setting(None, least=0.1)
    cpu_share: float | None = setting(None, least=0.01, most=1.0)
    battery_cpu_share: float | None = setting(None, least=0.01, most=1.0)


@dataclass(frozen=True)
class OptimizationConfig(ProfileSection):
    """What is computed, and how exactly.

    Args:
        attention (`str`, *optional*): name of an attention implementation; by default the model's own.
        attention_settings (`dict`): its settings.
        weight_bits (`int`, *optional*): 8 or 4, of linear layers and the head; by default they stay.
        visual_keep_ratio (`float`): share of visual tokens that the decoder gets, over 0 up to 1.
        visual_min_tokens (`int`): what a picture or video keeps of its tokens at least; small ones have few to spare.
        techniques (`dict`): further ones of the registry, `{name: settings}`; settings given here beat the fields.
        moe_num_experts, moe_top_k (`int`): of a [`MoeLayer`] that is built from the profile.
    """

    attention: str | None = setting(None)
    attention_settings: dict = field(default_factory=dict)
    weight_bits: int | None = setting(None, choices=(8, 4))
    visual_keep_ratio: float = setting(1.0, least=0.001, most=1.0)
    visual_min_tokens: int = setting(64, least=1)
    techniques: dict = field(default_factory=dict)
    moe_num_experts: int = setting(8, least=1)
    moe_top_k: int = setting(2, least=1)

    def __post_init__(self):
        super().__post_init__()
        if self.moe_top_k > self.moe_num_experts:
            raise ValueError(
                f"OptimizationConfig.moe_top_k={self.moe_top_k} chooses more experts than "
                f"moe_num_experts={self.moe_num_experts}; give a smaller moe_top_k."
            )
        if self.attention_settings and self.attention is None:
            raise ValueError("OptimizationConfig.attention_settings need an attention that they are for; name one.")


def refuse_keys(given, known: list[str], owner: str) -> None:
    """Raises a `ValueError` for a key that is not known, with the nearest one that is."""
    for key in given:
        if key not in known:
            nearest = get_close_matches(str(key), known, n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"it has {', '.join(known)}."
            raise ValueError(f"{owner} has no {key!r}; {hint}")


def _is_of(value, wanted) -> bool:
    kinds = getattr(wanted, "__args__", (wanted,))
    if isinstance(value, bool):  # which Python takes for a number
        return bool in kinds
    return isinstance(value, kinds) or (float in kinds and isinstance(value, int))


def _default(section: type, name: str) -> Any:
    return getattr(section(), name)


def _field_schema(entry) -> dict[str, Any]:
    names = {int: "integer", float: "number", str: "string", bool: "boolean", dict: "object", type(None): "null"}
    kinds = [names[kind] for kind in getattr(entry.type, "__args__", (entry.type,))]
    made: dict[str, Any] = {"type": kinds if len(kinds) > 1 else kinds[0]}
    limits = {"choices": (), "least": None, "most": None, **entry.metadata}
    if limits["choices"]:
        made["enum"] = [*limits["choices"], *([None] if "null" in kinds else [])]
    for name, limit in (("minimum", limits["least"]), ("maximum", limits["most"])):
        if limit is not None:
            made[name] = limit
    return made
