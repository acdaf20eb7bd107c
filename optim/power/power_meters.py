"""What a run has taken so far: joules of the processor (RAPL) or the GPU (NVML), or CPU seconds of this process."""

import importlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from transformers.utils import logging


logger = logging.get_logger(__name__)

# More than any one package or board draws. A counter that moves by more was reset and did not count.
MOST_WATTS = 2000.0
POWERCAP = "sys/class/powercap"


class Meter(ABC):
    """A counter that only rises.

    `unit` is `"J"` or `"CPU s"`; `measures_power` says whether it is the former.
    """

    name: ClassVar[str]
    unit: ClassVar[str] = "J"
    _latest = 0.0

    @property
    def measures_power(self) -> bool:
        return self.unit == "J"

    @abstractmethod
    def read(self) -> float:
        """What was taken since the meter was made, in `unit`.

        Raises:
            OSError: if the counter cannot be read (any more).
        """

    def taken(self) -> float:
        """As `read`, but a counter that can no longer be read stays where it was, with one warning."""
        try:
            self._latest = self.read()
        except OSError as error:
            logger.warning_once(f"the meter {self.name} stopped, and with it the limit that it measures: {error}.")
        return self._latest


class CpuTimeMeter(Meter):
    """CPU seconds of all threads of this process.

    Args:
        cpu_time (`Callable`): gives them; by default those that the system counts.
    """

    name = "cpu_time"
    unit = "CPU s"

    def __init__(self, cpu_time: Callable[[], float] = time.process_time):
        self._cpu_time = cpu_time
        self._start = cpu_time()

    def read(self) -> float:
        return self._cpu_time() - self._start


class RaplMeter(Meter):
    """Joules of all processor packages, by the energy counters of Linux (`powercap`, Intel and AMD).

    What other processes take counts too. Counters wrap around within minutes, so `read` it more often than that.
    A counter that jumps, as after a suspend, counts on from where it is.

    Args:
        root (`str` or `Path`): folder that holds `sys`.
        clock (`Callable`): seconds that only rise.
    Raises:
        OSError: if there is no such counter or it cannot be read; the message says which and the way out.
    """

    name = "rapl"

    def __init__(self, root: str | Path = "/", clock: Callable[[], float] = time.monotonic):
        zones = _package_zones(Path(root, POWERCAP))
        if not zones:
            raise OSError(f"no processor package is listed in {Path(root, POWERCAP)}")
        self._counters = [_Counter(zone, clock) for zone in zones]

    def read(self) -> float:
        return sum(counter.read() for counter in self._counters)


class NvmlMeter(Meter):
    """Joules of one NVIDIA GPU since Volta, through `pynvml` (package `nvidia-ml-py`).

    Args:
        device (`int` or `str`): index as NVML counts, which `CUDA_VISIBLE_DEVICES` does not move, or `"GPU-..."`.
        clock (`Callable`): seconds that only rise.
    Raises:
        OSError: if the package, the driver or the counter is missing.
    """

    name = "nvml"

    def __init__(self, device: int | str = 0, clock: Callable[[], float] = time.monotonic):
        try:
            self._nvml = importlib.import_module("pynvml")
        except ImportError as error:
            raise OSError("NVML needs `pip install nvidia-ml-py`") from error
        try:
            self._nvml.nvmlInit()
            by = "Index" if isinstance(device, int) else "UUID"
            self._handle = getattr(self._nvml, f"nvmlDeviceGetHandleBy{by}")(device)
        except self._nvml.NVMLError as error:
            raise OSError(f"NVML gives no GPU {device}: {error}") from error
        self._joules = _Rising(self._read_joules(), clock, reach=None)

    def read(self) -> float:
        return self._joules.move_to(self._read_joules())

    def _read_joules(self) -> float:
        try:
            return self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1e3
        except self._nvml.NVMLError as error:
            raise OSError(f"the GPU's energy counter cannot be read: {error}") from error


def pick_meter(
    device: str = "cpu",
    root: str | Path = "/",
    clock: Callable[[], float] = time.monotonic,
    cpu_time: Callable[[], float] = time.process_time,
) -> tuple[Meter, str]:
    """The best meter that can be read here, and why it is that one.

    Args:
        device (`str`): where the model is: NVML for `cuda` or `cuda:1`, RAPL for `cpu`, else CPU time. A model on a
            GPU is not measured by the processor's counters, which miss most of it.
        root (`str` or `Path`): folder that holds `sys`.
        clock (`Callable`): seconds that only rise.
        cpu_time (`Callable`): CPU seconds of this process.
    """
    kind, _, index = str(device).partition(":")
    try:
        if kind == "cuda":
            return NvmlMeter(_nvml_name(int(index or 0)), clock), f"energy of GPU {index or 0} (NVML)"
        if kind == "cpu":
            return RaplMeter(root, clock), "energy of the processor packages (RAPL)"
        reason = f"no energy counter is known for {kind}"
    except OSError as error:
        reason = str(error)
    return CpuTimeMeter(cpu_time), f"CPU time of this process, since {reason}"


class _Rising:
    """Sums what a counter moves by, over wrap-arounds, and leaves out its jumps.

    Args:
        reach (`float`, *optional*): the value after which the counter begins again at 0, all in joules.
    """

    def __init__(self, value: float, clock: Callable[[], float], reach: float | None):
        self._last, self._time, self._clock, self._reach = value, clock(), clock, reach
        self._sum = 0.0

    def move_to(self, value: float) -> float:
        now = self._clock()
        moved = value - self._last
        if moved < 0 and self._reach:
            moved += self._reach
        # Counters are updated some times a second only, so that a short time may show the energy of a longer one.
        if 0 <= moved <= MOST_WATTS * max(now - self._time, 1.0):
            self._sum += moved
        self._last, self._time = value, now
        return self._sum


class _Counter:
    """One zone of `powercap`, whose files are in microjoules."""

    def __init__(self, zone: Path, clock: Callable[[], float]):
        self._path = zone / "energy_uj"
        reach = _read_text(zone / "max_energy_range_uj")
        self._joules = _Rising(self._value(), clock, int(reach) / 1e6 if reach.isdigit() else None)

    def read(self) -> float:
        return self._joules.move_to(self._value())

    def _value(self) -> float:
        try:
            return int(self._path.read_text()) / 1e6
        except PermissionError as error:
            raise OSError(f"{self._path} is for root alone; `sudo chmod a+r {self._path}` opens it") from error
        except ValueError as error:
            raise OSError(f"{self._path} holds no number") from error


def _package_zones(folder: Path) -> list[Path]:
    """One zone for each package: some machines list a package twice, by register and by memory-mapped interface."""
    zones: dict[str, Path] = {}
    for zone in sorted(folder.glob("intel-rapl*")):
        name = _read_text(zone / "name")
        if name.startswith("package") and (name not in zones or "mmio" in zones[name].name):
            zones[name] = zone
    return list(zones.values())


def _nvml_name(device: int) -> int | str:
    """How NVML names a GPU that CUDA shows as number `device`: both count for themselves."""
    import torch

    try:
        return f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    except (AssertionError, AttributeError, RuntimeError):  # no CUDA here, or a torch that does not tell
        return device


def _read_text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
