"""What this process may use of the machine: cores, memory, instruction sets, compiler, GPU, power supply.

Read from files of Linux where there are such. Nothing of ours and no `torch` is imported until a GPU is asked for.
"""

import math
import os
import shutil
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from .cgroup_limits import cgroup_cores, cgroup_memory


# By the names of /proc/cpuinfo, in the order in which processors got them.
INSTRUCTION_SETS = ("AVX2", "AVX512F", "AVX512_VNNI", "AVX512_BF16", "AMX_TILE", "AMX_BF16", "AMX_INT8")
SPECS = ("gpu_memory", "cpu_cores", "memory_gb")
GIB = 2**30


@dataclass(frozen=True)
class Hardware:
    """What a run has to go by. `None` is unknown or absent.

    Args:
        cpu_cores (`int`): that this process may use: by its affinity, and by the CPU quota of its cgroup, rounded down
            (threads beyond a quota only stand still together); at least 1.
        memory_bytes (`int`, *optional*): of the machine, or of the cgroup where that is less.
        instruction_sets (`tuple[str, ...]`): those of `INSTRUCTION_SETS` that the processor has.
        compiler (`str`, *optional*): path of a C++ compiler, as the native kernels look for it.
        gpu_name (`str`, *optional*), gpu_memory_bytes (`int`, *optional*), gpu_capability (`tuple[int, int]`,
            *optional*): of the first GPU.
        on_battery (`bool`, *optional*): whether the machine draws on its battery now.
        notes (`dict`): where a value comes from, for `lines`.
    """

    cpu_cores: int
    memory_bytes: int | None = None
    instruction_sets: tuple[str, ...] = ()
    compiler: str | None = None
    gpu_name: str | None = None
    gpu_memory_bytes: int | None = None
    gpu_capability: tuple[int, int] | None = None
    on_battery: bool | None = None
    notes: dict[str, str] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def from_specs(cls, specs: dict[str, Any], root: str | Path = "/") -> "Hardware":
        """A machine as described; what the description leaves out is as detected on this one.

        Args:
            specs (`dict`): any of `gpu_memory` (bytes; 0 or `None` for no GPU), `cpu_cores`, `memory_gb` (of 2^30
                bytes).
        Raises:
            ValueError: for an unknown key, with the nearest known one, and for a value that is no such quantity.
        """
        if not isinstance(specs, dict):
            raise ValueError(f"hardware specs must be a dictionary of {', '.join(SPECS)}, got {type(specs).__name__}.")
        for key in specs:
            if key not in SPECS:
                nearest = get_close_matches(str(key), SPECS, n=1)
                hint = f"did you mean {nearest[0]!r}?" if nearest else f"known: {', '.join(SPECS)}."
                raise ValueError(f"hardware specs have no {key!r}; {hint}")
        given = {key: _quantity(key, value) for key, value in specs.items()}
        values = asdict(detect_hardware(root, gpu="gpu_memory" not in specs))
        notes = values["notes"]
        if "cpu_cores" in given:
            values["cpu_cores"], notes["cpu_cores"] = int(given["cpu_cores"]), "as given"
        if "memory_gb" in given:
            values["memory_bytes"], notes["memory_bytes"] = int(given["memory_gb"] * GIB), "as given"
        if given.get("gpu_memory"):
            values |= {"gpu_name": "GPU", "gpu_memory_bytes": int(given["gpu_memory"])}
        if "gpu_memory" in given:
            notes["gpu"] = "as given"
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The values without the notes, of types that JSON has."""
        values = {name: value for name, value in asdict(self).items() if name != "notes"}
        return values | {
            "instruction_sets": list(self.instruction_sets),
            "gpu_capability": list(self.gpu_capability) if self.gpu_capability else None,
        }

    def lines(self) -> list[str]:
        """What was found and why it counts, one line for each value."""
        battery = {True: "battery", False: "mains", None: "unknown"}[self.on_battery]
        found = [
            ("CPU cores", str(self.cpu_cores), "cpu_cores"),
            ("memory", _gibibytes(self.memory_bytes), "memory_bytes"),
            ("instruction sets", ", ".join(self.instruction_sets) or "none known", "instruction_sets"),
            ("C++ compiler", self.compiler or "none", "compiler"),
            ("GPU", self._gpu_text(), "gpu"),
            ("power supply", battery, "on_battery"),
        ]
        notes = {name: f" ({text})" for name, text in self.notes.items() if text}
        return [f"{label}: {value}{notes.get(name, '')}" for label, value, name in found]

    def _gpu_text(self) -> str:
        if self.gpu_name is None:
            return "none"
        parts = [self.gpu_name, _gibibytes(self.gpu_memory_bytes)]
        if self.gpu_capability:
            parts.append("capability {}.{}".format(*self.gpu_capability))
        return ", ".join(parts)


def detect_hardware(root: str | Path = "/", gpu: bool = True) -> Hardware:
    """What this machine has and this process may use.

    Args:
        root (`str` or `Path`): folder that holds `proc` and `sys`.
        gpu (`bool`): whether to look for a GPU, which imports `torch` and starts CUDA where there is one.
    """
    root = Path(root)
    cores, cores_note = _usable_cores(root)
    memory, memory_note = _usable_memory(root)
    chosen = os.environ.get("CXX")
    compiler = shutil.which(chosen) if chosen else shutil.which("g++") or shutil.which("clang++")
    name, gpu_bytes, capability = _first_gpu() if gpu else (None, None, None)
    battery = read_on_battery(root)
    return Hardware(
        cpu_cores=cores,
        memory_bytes=memory,
        instruction_sets=_instruction_sets(root),
        compiler=compiler,
        gpu_name=name,
        gpu_memory_bytes=gpu_bytes,
        gpu_capability=capability,
        on_battery=battery,
        notes={
            "cpu_cores": cores_note,
            "memory_bytes": memory_note,
            "compiler": "" if compiler else "native kernels need g++, clang++ or a valid $CXX; plain PyTorch runs",
            "gpu": "" if gpu else "not asked for",
            "on_battery": "" if battery is not None else "no supply is listed in /sys/class/power_supply",
        },
    )


def read_on_battery(root: str | Path = "/") -> bool | None:
    """Whether the machine draws on its battery now; `None` where it does not say."""
    plugged, batteries = [], []
    for supply in sorted(Path(root, "sys/class/power_supply").glob("*")):
        kind = _text(supply / "type")
        if kind in ("Mains", "USB") and _text(supply / "online") is not None:
            plugged.append(_text(supply / "online") != "0")
        # Mice and headsets list their batteries here too.
        if kind == "Battery" and _text(supply / "scope") != "Device":
            batteries.append(_text(supply / "status"))
    if any(plugged) or "Charging" in batteries:
        return False
    if batteries:
        return "Discharging" in batteries or bool(plugged)
    return False if plugged else None


def _usable_cores(root: Path) -> tuple[int, str]:
    present = os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else present
    note = f"affinity allows {allowed} of {present}" if allowed < present else "all of the machine"
    quota = cgroup_cores(root)
    if quota is None or quota >= allowed:
        return allowed, note
    return max(1, math.floor(quota)), f"{note}, a cgroup quota {quota:g}"


def _usable_memory(root: Path) -> tuple[int | None, str]:
    physical, limit = _physical_memory(root), cgroup_memory(root)
    if limit is not None and (physical is None or limit < physical):
        return limit, f"cgroup limit; the machine has {_gibibytes(physical)}"
    return physical, "of the machine; no cgroup sets less" if physical else ""


def _physical_memory(root: Path) -> int | None:
    for line in (_text(root / "proc/meminfo") or "").splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) * 1024
    if root != Path("/"):
        return None
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _instruction_sets(root: Path) -> tuple[str, ...]:
    lines = (_text(root / "proc/cpuinfo") or "").splitlines()
    flags = next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), [])
    return tuple(name for name in INSTRUCTION_SETS if name.lower() in flags)


def _first_gpu() -> tuple[str | None, int | None, tuple[int, int] | None]:
    import torch

    try:
        if not torch.cuda.is_available():
            return None, None, None
        properties = torch.cuda.get_device_properties(0)
    except (RuntimeError, AssertionError):  # a driver that does not fit, or a GPU that another process holds alone
        return None, None, None
    return properties.name, properties.total_memory, (properties.major, properties.minor)


def _quantity(key: str, value: Any) -> int | float | None:
    """`value`, checked. Memory of no GPU is 0 or `None`; the others are above 0."""
    if key == "gpu_memory" and value is None:
        return None
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    whole = key == "memory_gb" or (number and value == int(value))
    least = {"gpu_memory": 0, "cpu_cores": 1}.get(key, 0)
    if not number or not whole or value < least or (key == "memory_gb" and value == 0):
        unit = {"gpu_memory": "a whole number of bytes >= 0", "cpu_cores": "a whole number >= 1"}
        raise ValueError(f"{key} must be {unit.get(key, 'a number of GiB above 0')}, got {value!r}.")
    return value


def _text(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return None


def _gibibytes(size: int | None) -> str:
    return "unknown" if size is None else f"{size / GIB:.1f} GiB"
