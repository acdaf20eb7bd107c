"""`generate()` that keeps to a power limit or a share of CPU time, by pauses between tokens."""

import inspect
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from transformers.generation import StoppingCriteria, StoppingCriteriaList
from transformers.utils import logging

from ...configuration.hardware_detection import read_on_battery
from ..technique_optim import Technique, refuse_unknown
from .power_budget import PowerBudget
from .power_meters import CpuTimeMeter, Meter, pick_meter


logger = logging.get_logger(__name__)

LOOK_SECONDS = 5.0  # at the battery, and at counters that would wrap around twice unseen


@dataclass(frozen=True)
class PowerLimits:
    """What `generate()` may take; `None` is no limit.

    Args:
        max_watts (`float`, *optional*): above 0; average power of the processor packages, or of the model's GPU.
        cpu_share (`float`, *optional*): above 0, up to 1; CPU time of this process for each second and thread.
        threads (`int`, *optional*): of PyTorch.
    Raises:
        ValueError: for a value that is no such quantity.
    """

    max_watts: float | None = None
    cpu_share: float | None = None
    threads: int | None = None

    def __post_init__(self):
        watts, share, threads = self.max_watts, self.cpu_share, self.threads
        if watts is not None and not (_is_number(watts) and watts > 0):
            raise ValueError(f"max_watts must be a number above 0 or None for no limit, got {watts!r}.")
        if share is not None and not (_is_number(share) and 0 < share <= 1):
            raise ValueError(f"cpu_share must be above 0 and at most 1, or None for no limit, got {share!r}.")
        if threads is not None and (type(threads) is not int or threads < 1):
            raise ValueError(f"threads must be a whole number >= 1 or None to leave them, got {threads!r}.")


@dataclass(frozen=True)
class PacingReport:
    """What one `generate()` took, from its first prefill to its last pause.

    Args:
        meter (`str`): `"rapl"`, `"nvml"` or `"cpu_time"`.
        unit (`str`): of `taken`: `"J"` or `"CPU s"`.
        taken (`float`), seconds (`float`), average (`float`): in all, the wall time, and the former by the latter:
            watts, or CPU seconds for each second.
        pauses (`int`), paused_seconds (`float`): how often and how long it slept.
    """

    meter: str
    unit: str
    taken: float
    seconds: float
    average: float
    pauses: int
    paused_seconds: float


@dataclass(frozen=True)
class Surroundings:
    """Where pacing gets its time and counters from; a test puts others in their place."""

    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    cpu_time: Callable[[], float] = time.process_time
    root: str | Path = "/"


class PowerManagement(Technique):
    """Holds the average power of `generate()`, or its share of CPU time, under a limit by pauses between tokens.

    Exact: tokens, scores and the end of generation stay what they were; only `max_time` runs on during pauses. The
    average counts from the call of `generate()`, so a long prefill is paid for by a long pause behind the first token,
    and the last token by one before `generate()` returns. All ways of decoding are paced (with an assistant, between
    its drafts); continuous batching, which takes no criteria, is not. A model without `generate()` stays as it is.

    Watts come from RAPL for a model on the CPU, where all processes count, and from NVML for one on a GPU. Where no
    counter can be read one warning says so, and `cpu_share` alone is held. A limit below what the machine takes at
    rest cannot be held: generation then goes on without pauses, with one warning. Without a limit it only measures.
    `last_report` is the [`PacingReport`] of the last `generate()`.

    Args:
        config: taken and not needed, as all techniques may be given the model's.
        max_watts (`float`, *optional*), cpu_share (`float`, *optional*), threads (`int`, *optional*): see
            [`PowerLimits`]. Threads are set while `generate()` runs, and put back.
        battery (`dict`, *optional*): of the same, those that hold instead while the machine draws on its battery. This
            is looked up every 5 s; the average begins anew when it changes.
    Raises:
        ValueError: for an unknown setting or a value out of range.
    """

    name = "power_management"
    exact = True

    def __init__(
        self,
        config=None,
        max_watts: float | None = None,
        cpu_share: float | None = None,
        threads: int | None = None,
        battery: dict[str, Any] | None = None,
        **unknown,
    ):
        known = [entry.name for entry in fields(PowerLimits)]
        refuse_unknown(self.name, unknown, [*known, "battery"])
        if battery is not None and not isinstance(battery, dict):
            raise ValueError(f"battery must be a dictionary of {', '.join(known)}, got {battery!r}.")
        refuse_unknown(f"{self.name}'s battery", battery or {}, known)
        super().__init__(max_watts=max_watts, cpu_share=cpu_share, threads=threads, battery=battery)
        self.limits = PowerLimits(max_watts, cpu_share, threads)
        self.battery_limits = replace(self.limits, **battery) if battery else self.limits
        self.surroundings = Surroundings()
        self.last_report: PacingReport | None = None

    def apply(self, model) -> None:
        """Puts a paced `generate` on the model itself; its class stays.

        Raises:
            ValueError: if the model is paced already.
        """
        earlier = vars(model).get("generate")
        if isinstance(earlier, PacedGenerate):
            raise ValueError("the model's generate() is paced already; revert that power_management first.")
        if hasattr(model, "generate"):
            model.generate = PacedGenerate(model, self, earlier)

    def revert(self, model) -> None:
        paced = vars(model).get("generate")
        if isinstance(paced, PacedGenerate) and paced.technique is self:
            del model.generate
            if paced.earlier is not None:
                model.generate = paced.earlier


class PacedGenerate:
    """In the place of a model's `generate`: the same, with one criterion more, which pauses and never stops."""

    def __init__(self, model, technique: PowerManagement, earlier: Callable | None):
        self.model, self.technique, self.earlier = model, technique, earlier

    def __call__(
        self, inputs=None, generation_config=None, logits_processor=None, stopping_criteria=None, *args, **kwargs
    ):
        pacer = Pacer(self.technique, str(self.model.device))
        # Continuous batching, which this stands for, refuses criteria.
        if kwargs.get("cache_implementation") != "paged":
            stopping_criteria = StoppingCriteriaList([*(stopping_criteria or ()), pacer])
        try:
            generate = self.__wrapped__
            return generate(inputs, generation_config, logits_processor, stopping_criteria, *args, **kwargs)
        finally:
            self.technique.last_report = pacer.finish()

    @property
    def __wrapped__(self) -> Callable:
        # Not kept as a bound method: a copy of the model would run the first one's.
        return type(self.model).generate.__get__(self.model) if self.earlier is None else self.earlier

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.__wrapped__)


class Pacer(StoppingCriteria):
    """The pauses of one `generate()`, and its number of threads.

    Args:
        technique ([`PowerManagement`]): whose limits hold.
        device (`str`): where the model is.
    """

    def __init__(self, technique: PowerManagement, device: str):
        self._technique, self._around = technique, technique.surroundings
        self._threads = torch.get_num_threads()
        self._pauses, self._paused = 0, 0.0
        self._start = self._looked = self._around.clock()
        self._meter = self._pick_meter(device)
        self._on_battery = self._look_at_battery()
        self._hold(technique.battery_limits if self._on_battery else technique.limits)

    def __call__(self, input_ids: torch.LongTensor, scores=None, **kwargs) -> torch.BoolTensor:
        """Pauses; `False` for every row of `input_ids` (B, T)."""
        self._look_again()
        for budget in self._budgets:
            budget.settle(self._sleep)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    def finish(self) -> PacingReport:
        """Puts the number of threads back, and says what was taken."""
        _set_threads(self._threads)
        seconds, taken = self._around.clock() - self._start, self._meter.taken()
        average = taken / seconds if seconds > 0 else 0.0
        return PacingReport(self._meter.name, self._meter.unit, taken, seconds, average, self._pauses, self._paused)

    def _pick_meter(self, device: str) -> Meter:
        around = self._around
        meter, reason = pick_meter(device, around.root, around.clock, around.cpu_time)
        every = (self._technique.limits, self._technique.battery_limits)
        if not meter.measures_power and any(limits.max_watts for limits in every):
            kept = "cpu_share alone is held" if any(limits.cpu_share for limits in every) else "set cpu_share instead"
            logger.warning_once(f"max_watts is not held, as what can be measured here is {reason}; {kept}.")
        return meter

    def _hold(self, limits: PowerLimits) -> None:
        _set_threads(limits.threads or self._threads)
        self._budgets = []
        if limits.max_watts and self._meter.measures_power:
            self._budgets.append(PowerBudget(self._meter, limits.max_watts, self._around.clock))
        if limits.cpu_share:
            meter, share = CpuTimeMeter(self._around.cpu_time), limits.cpu_share * torch.get_num_threads()
            self._budgets.append(PowerBudget(meter, share, self._around.clock))

    def _look_again(self) -> None:
        now = self._around.clock()
        if now - self._looked < LOOK_SECONDS:
            return
        self._looked = now
        self._meter.taken()
        on_battery = self._look_at_battery()
        if on_battery != self._on_battery:
            self._on_battery = on_battery
            self._hold(self._technique.battery_limits if on_battery else self._technique.limits)

    def _look_at_battery(self) -> bool:
        technique = self._technique
        return technique.battery_limits != technique.limits and bool(read_on_battery(self._around.root))

    def _sleep(self, seconds: float) -> None:
        self._pauses, self._paused = self._pauses + 1, self._paused + seconds
        self._around.sleep(seconds)


def _set_threads(count: int) -> None:
    if torch.get_num_threads() != count:
        torch.set_num_threads(count)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
