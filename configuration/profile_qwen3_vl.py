"""The optimization profile: what a model does beyond the plain one, in five sections."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .official_sizes import default_config
from .profile_files import GivenProfile, is_profile_file, parse_json, read_profile
from .profile_presets import preset_sections
from .profile_sections import (
    CPUConfig,
    GPUConfig,
    MemoryConfig,
    OptimizationConfig,
    PowerManagementConfig,
    ProfileSection,
    refuse_keys,
)


PROFILE_VERSION = 1
SECTIONS: dict[str, type[ProfileSection]] = {
    "memory": MemoryConfig,
    "cpu": CPUConfig,
    "gpu": GPUConfig,
    "power": PowerManagementConfig,
    "optimization": OptimizationConfig,
}


@dataclass(frozen=True)
class UnifiedConfig:
    """A profile. In `config.json` it stands under `optim`, as a plain dictionary or a preset's name.

    Where a model's configuration is expected, as by `Qwen3VLModel(config=…)`, it stands for `model`; unknown names are
    looked up there, `hidden_size` and other fields of the decoder too.

    Args:
        memory, cpu, gpu, power, optimization: the sections, also as `memory_config`, `optimization_config` and so on.
        model (`PreTrainedConfig`, *optional*): of the model that the profile is for; by default the published 2B one.
            Not written with the profile.
    Raises:
        ValueError: for what the sections refuse.
    """

    memory: MemoryConfig = field(default_factory=MemoryConfig)
    cpu: CPUConfig = field(default_factory=CPUConfig)
    gpu: GPUConfig = field(default_factory=GPUConfig)
    power: PowerManagementConfig = field(default_factory=PowerManagementConfig)
    optimization: OptimizationConfig = field(default_factory=OptimizationConfig)
    model: Any = field(default=None, compare=False, repr=False)

    def __post_init__(self):
        for name, section in SECTIONS.items():
            value = getattr(self, name)
            if isinstance(value, dict):
                object.__setattr__(self, name, section.from_dict(value))
            elif not isinstance(value, section):
                raise ValueError(f"{name} must be a {section.__name__} or a dictionary, got {type(value).__name__}.")

    @classmethod
    def from_preset(cls, name: str) -> "UnifiedConfig":
        """Raises a `ValueError` for a name that is not `minimal`, `balanced` or `aggressive`."""
        return cls(**preset_sections(name))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "UnifiedConfig":
        """The profile of a dictionary as `to_dict` writes it, or of `{technique: settings}` alone.

        Raises:
            ValueError: for an unknown key, with the nearest known one; for a profile of a newer version.
        """
        if not isinstance(values, dict):
            raise ValueError(f"a profile must be a dictionary, got {type(values).__name__}.")
        values = dict(values)
        version = values.pop("version", None)
        if version is None and not set(values) & set(SECTIONS):
            # Version 0 named techniques alone, and stays the short form.
            return cls(optimization=OptimizationConfig(techniques=values))
        version = PROFILE_VERSION if version is None else version
        if isinstance(version, bool) or not isinstance(version, int) or version < 1:
            raise ValueError(f"a profile's version must be a whole number of at least 1, got {version!r}.")
        if version > PROFILE_VERSION:
            raise ValueError(
                f"the profile has version {version} and this package reads up to {PROFILE_VERSION}; update qwen3_vl, "
                "or load with optim=None."
            )
        refuse_keys(values, list(SECTIONS), "a profile")
        return cls(**{name: SECTIONS[name].from_dict(section) for name, section in values.items()})

    @classmethod
    def parse(cls, optim: "UnifiedConfig | dict | str | None") -> "UnifiedConfig":
        """The profile of whatever `optim=` may be: a preset's name, a dictionary, a profile, or nothing.

        Raises:
            TypeError: for anything else; `ValueError` as above.
        """
        if isinstance(optim, cls):
            return optim
        if optim is None:
            return cls()
        if isinstance(optim, str):
            return cls.from_preset(optim)
        if isinstance(optim, dict):
            return cls.from_dict(optim)
        if hasattr(optim, "to_dict") and hasattr(optim, "techniques"):  # of another copy of this file
            return cls.from_dict(optim.to_dict())
        raise TypeError(f"optim must be a preset's name, a dictionary or None, got {type(optim).__name__}.")

    @classmethod
    def from_json(cls, source: str | Path) -> "UnifiedConfig":
        """The profile in a JSON file, or in JSON text.

        Raises:
            ValueError: if it is no JSON, and as `from_dict`.
        """
        if isinstance(source, Path) or not str(source).lstrip().startswith("{"):
            return cls.from_file(source)
        return cls.from_dict(parse_json(str(source), "the profile"))

    @classmethod
    def from_file(cls, path: str | Path) -> "UnifiedConfig":
        """The profile in a YAML or JSON file.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it cannot be read, and as `from_dict`; the file is named.
        """
        values = read_profile(path)
        try:
            return cls.from_dict(values)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """The version and what differs from the defaults, of types that JSON has."""
        sections = {name: getattr(self, name).to_dict() for name in SECTIONS}
        return {"version": PROFILE_VERSION, **{name: values for name, values in sections.items() if values}}

    def to_json(self, path: str | Path | None = None) -> str:
        """The profile as JSON text, written to `path` if one is given."""
        text = json.dumps(self.to_dict(), indent=2) + "\n"
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    @classmethod
    def schema(cls) -> dict[str, Any]:
        """JSON schema of what `to_dict` writes; `docs/profile.schema.json` holds it."""
        properties = {name: section.schema() for name, section in SECTIONS.items()}
        properties["version"] = {"type": "integer", "minimum": 1, "maximum": PROFILE_VERSION}
        return {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "title": "Optimization profile of qwen3_vl",
            "type": "object",
            "additionalProperties": False,
            "properties": properties,
        }

    def with_changes(self, **sections: dict[str, Any]) -> "UnifiedConfig":
        """A copy with other values: `profile.with_changes(memory={"kv_cache": "int4"})`.

        Raises:
            ValueError: for an unknown section or key.
        """
        refuse_keys(sections, list(SECTIONS), "a profile")
        changed = {}
        for name, values in sections.items():
            refuse_keys(values, list(vars(getattr(self, name))), SECTIONS[name].__name__)
            changed[name] = replace(getattr(self, name), **values)
        return replace(self, **changed)

    def techniques(self) -> dict[str, dict[str, Any]]:
        """The techniques that the profile names, `{name in the registry: settings}`; empty for the plain model."""
        made: dict[str, dict[str, Any]] = {}
        for name, settings in self._named():
            made[name] = settings
        for name, settings in self.optimization.techniques.items():
            made[name] = {**made.get(name, {}), **(settings or {})}
        return made

    def _named(self):
        memory, power, chosen = self.memory, self.power, self.optimization
        if chosen.attention is not None:
            yield chosen.attention, dict(chosen.attention_settings)
        if self.cpu.faster_rotary:
            yield "faster_rotary", {}
        if chosen.weight_bits is not None:
            yield "adaptive_precision", {"bits": chosen.weight_bits}
        if self.cpu.decode_linear:
            yield "decode_linear", {}
        if self.gpu.kernels:
            yield "hardware_kernels", {}
        if self.gpu.compile_decode:
            yield "compiled_decode", {}
        if memory.vision_patches is not None:
            yield "chunked_vision", {"max_patches": memory.vision_patches}
        if chosen.visual_keep_ratio < 1:
            yield "token_merging", {"keep_ratio": chosen.visual_keep_ratio, "min_tokens": chosen.visual_min_tokens}
        if memory.vision_feature_bytes:
            yield "vision_feature_cache", {"max_bytes": memory.vision_feature_bytes}
        if memory.prefix_cache_bytes:
            yield "prefix_cache", {"max_bytes": memory.prefix_cache_bytes}
        yield from _cache_technique(memory)
        pacing = {"max_watts": power.max_watts, "cpu_share": power.cpu_share, "threads": self.cpu.threads}
        if power.battery_cpu_share is not None:
            pacing["battery"] = {"cpu_share": power.battery_cpu_share}
        pacing = {name: value for name, value in pacing.items() if value is not None}
        if pacing:
            yield "power_management", pacing

    def to_model_config(self):
        """A copy of the model's configuration that carries this profile."""
        model = default_config() if self.model is None else self.model
        config, optim = type(model).from_dict(model.to_dict()), self.to_dict()
        config.optim = optim if len(optim) > 1 else None
        return config

    def __getattr__(self, name: str):
        section = name.removesuffix("_config").replace("power_management", "power")
        if name.endswith("_config") and section in SECTIONS:
            return getattr(self, section)
        if name.startswith("__"):
            raise AttributeError(name)
        config = default_config() if self.model is None else self.model
        return getattr(config, name) if hasattr(config, name) else getattr(config.get_text_config(), name)


def given_profile(optim: Any) -> GivenProfile | str | None:
    """What a caller gives as `optim=`, checked and in the form in which a model's configuration holds it.

    Args:
        optim: a preset's name, a dictionary, the path of a YAML or JSON file, a [`UnifiedConfig`], or `None`.
    Raises:
        ValueError, TypeError: as of [`UnifiedConfig.parse`] and `from_file`.
    """
    if is_profile_file(optim):
        return GivenProfile(UnifiedConfig.from_file(optim).to_dict())
    profile = UnifiedConfig.parse(optim)
    if optim is None or isinstance(optim, str):
        return optim
    return GivenProfile(optim if isinstance(optim, dict) else profile.to_dict())


def model_config(config):
    """A model's configuration out of itself, or out of a [`UnifiedConfig`] that stands for it."""
    return config.to_model_config() if hasattr(config, "to_model_config") else config


def _cache_technique(memory: MemoryConfig):
    kind = memory.kv_cache
    if kind == "auto":
        if memory.budget_bytes is not None:
            yield "kv_caching", {"budget": memory.budget_bytes, "lossy": memory.lossy_cache}
    elif kind in ("tiered", "evicting", "paged"):
        yield f"{kind}_cache", {}
    elif kind.startswith("int"):
        yield "quantized_cache", {"bits": int(kind.removeprefix("int"))}
    else:
        yield "kv_caching", {"cache": kind}
