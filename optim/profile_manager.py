"""Profiles by name and by machine: presets, and the largest quality that a machine's memory holds."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from ..configuration.hardware_detection import Hardware, detect_hardware
from ..configuration.official_sizes import default_config
from ..configuration.profile_qwen3_vl import UnifiedConfig
from .memory.memory_plan import MemoryPlan, plan_memory
from .memory.memory_request import MemoryRequest
from .memory.memory_units import format_bytes


# Of the memory, what is left to the system and to everybody else.
FREE_SHARE = 0.2
BATTERY_CPU_SHARE = 0.5
REASONS = {
    "qwen3_vl_exact": "the same answers without copies of keys and values",
    "faster_rotary": "tables of angles are computed once",
    "decode_linear": "reads weights at the memory's speed while decoding",
    "hardware_kernels": "kernels by the GPU's capability",
    "adaptive_precision": "weights as they are take too much memory or power",
    "quantized_cache": "exact keys and values take too much memory",
    "power_management": "as many threads as cores may be used, less on battery",
}
# Best answers first: bits of weights and of keys and values, `None` for as they are.
QUALITIES = ((None, None), (None, 8), (8, None), (8, 8), (4, 8), (4, 4), (4, 2))
# Bytes a weight takes beside its bits: a scale and a zero in bfloat16 for each group of 64 or so.
SCALE_BITS = 0.5


@dataclass(frozen=True)
class _Candidate:
    profile: UnifiedConfig
    plan: MemoryPlan
    peak: int
    quality: str


class UnifiedConfigManager:
    """Makes [`UnifiedConfig`]s.

    Args:
        model (`PreTrainedConfig`, model or `str`, *optional*): what the profiles are for: a configuration, a model,
            or a folder or Hub name; by default the configuration of the published 2B model.
        request ([`MemoryRequest`], *optional*): the largest that will run; decides what fits.
    Attributes:
        explanation (`list[str]`): why the latest hardware profile is what it is, line by line.
    """

    def __init__(self, model: Any = None, request: MemoryRequest | None = None):
        self.model_config = _config_of(model)
        self.request = request
        self.explanation: list[str] = []

    def get_config(self, name: str) -> UnifiedConfig:
        """The preset `minimal`, `balanced` or `aggressive`; raises a `ValueError` for another name."""
        return replace(UnifiedConfig.from_preset(name), model=self.model_config)

    def get_hardware_optimized_config(self, specs: dict[str, Any] | Hardware | None = None) -> UnifiedConfig:
        """The best answers that fit a machine, and what it runs fastest without changing them.

        On battery weights are packed even where they would fit, and half of the CPU time is taken while it lasts.

        Args:
            specs (`dict` or [`Hardware`], *optional*): `gpu_memory` in bytes, `cpu_cores`, `memory_gb`; by default
                this machine.
        Raises:
            ValueError: for an unknown or negative specification.
            MemoryError: if nothing fits, with what would be needed.
        """
        if specs is None:
            hardware = detect_hardware()
        else:
            hardware = specs if isinstance(specs, Hardware) else Hardware.from_specs(specs)
        on_gpu = hardware.gpu_memory_bytes is not None
        memory = hardware.gpu_memory_bytes if on_gpu else hardware.memory_bytes
        if memory is None:
            raise ValueError("this machine does not say how much memory it has; give memory_gb.")
        room = int(memory * (1 - FREE_SHARE))
        self.explanation = [
            *hardware.lines(),
            f"{format_bytes(room)} of {format_bytes(memory)} may be used; the rest is left to others.",
        ]
        if hardware.on_battery:
            self.explanation.append(
                "on battery: packed weights, since reading them is what a token costs, and half of the CPU time."
            )
        tried = []
        for candidate in self._candidates(hardware, on_gpu):
            fits = candidate.peak <= room
            tried.append(candidate)
            word = "fits: chosen" if fits else "does not fit"
            self.explanation.append(f"{candidate.quality}: {format_bytes(candidate.peak)} at the peak, {word}.")
            if fits:
                self._explain_rest(candidate.profile, hardware)
                return candidate.profile
        least = min(tried, key=lambda candidate: candidate.peak)
        raise MemoryError(
            f"nothing fits into {format_bytes(room)}: {least.quality} needs {format_bytes(least.peak)}; take a "
            "smaller model or request, or a machine with more memory."
        )

    def _candidates(self, hardware: Hardware, on_gpu: bool) -> Iterator[_Candidate]:
        for weight_bits, cache_bits in QUALITIES:
            if weight_bits is None and hardware.on_battery:
                continue
            cache = "paged" if cache_bits is None else f"int{cache_bits}"
            device = "cuda" if on_gpu else "cpu"
            plan = plan_memory(self.model_config, self.request, cache=cache, device=device)
            saved = 0
            if weight_bits is not None:
                bits = 8 * _itemsize(plan.dtype)
                saved = int(plan.weights["text"] * (1 - min(1.0, (weight_bits + SCALE_BITS) / bits)))
            profile = self._profile(hardware, on_gpu, weight_bits, cache_bits)
            weights = "weights as they are" if weight_bits is None else f"int{weight_bits} weights"
            history = "exact KV cache" if cache_bits is None else f"int{cache_bits} KV cache"
            yield _Candidate(profile, plan, plan.peak - saved, f"{weights}, {history}")

    def _profile(self, hardware: Hardware, on_gpu: bool, weight_bits, cache_bits) -> UnifiedConfig:
        sections: dict[str, dict[str, Any]] = {
            "optimization": {"attention": "qwen3_vl_exact", "weight_bits": weight_bits},
            "memory": {"kv_cache": "auto" if cache_bits is None else f"int{cache_bits}"},
        }
        if on_gpu:
            sections["gpu"] = {"kernels": True}
        else:
            sections["cpu"] = {"decode_linear": True, "faster_rotary": True, "threads": hardware.cpu_cores}
        if hardware.on_battery:
            sections["power"] = {"battery_cpu_share": BATTERY_CPU_SHARE}
        return UnifiedConfig(**sections, model=self.model_config)

    def _explain_rest(self, profile: UnifiedConfig, hardware: Hardware) -> None:
        for name, settings in profile.techniques().items():
            given = ", ".join(f"{key}={value}" for key, value in settings.items())
            reason = REASONS[name]
            if name == "decode_linear" and hardware.compiler is None:
                reason = "would read weights at the memory's speed; without a C++ compiler PyTorch's products run"
            self.explanation.append(f"on: {name}" + (f" ({given})" if given else "") + f", {reason}.")


def create_unified_config_manager(model: Any = None, request: MemoryRequest | None = None) -> UnifiedConfigManager:
    """A [`UnifiedConfigManager`]; see there."""
    return UnifiedConfigManager(model, request)


def get_default_config(model: Any = None) -> UnifiedConfig:
    """The profile that switches nothing on, for a model as of [`UnifiedConfigManager`]."""
    return UnifiedConfig(model=_config_of(model))


def get_hardware_optimized_config(specs: dict[str, Any] | Hardware | None = None, model: Any = None) -> UnifiedConfig:
    """See [`UnifiedConfigManager.get_hardware_optimized_config`]."""
    return UnifiedConfigManager(model).get_hardware_optimized_config(specs)


def _config_of(model: Any) -> Any:
    if model is None:
        return default_config()
    if isinstance(model, str):
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(model)
    return getattr(model, "config", model)


def _itemsize(dtype: str) -> int:
    return {"float32": 4, "float64": 8}.get(dtype, 2)
