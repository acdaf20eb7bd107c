"""Time and peak memory of two callables that do the same, run in turns."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch


@dataclass
class Comparison:
    """One row of a case: two ways to the same result.

    Attributes:
        label (`str`): the row's name in the table.
        sizes (`dict`): what the row was measured on (tokens, pictures, layers ...).
        ours, stock (callables): do the work once and return the outputs.
        agreement (callable): takes both outputs, returns figures such as the largest difference.
        unit (`str`): of the reported figure: "ms", or "tokens/s" for `per_run` tokens.
        per_run (`int`): tokens that one run produces, for "tokens/s".
    """

    label: str
    sizes: dict[str, Any]
    ours: Callable[[], Any]
    stock: Callable[[], Any]
    agreement: Callable[[Any, Any], dict[str, Any]]
    unit: str = "ms"
    per_run: int = 1


@dataclass
class Side:
    """The measurements of one side, in milliseconds and MiB."""

    times_ms: list[float] = field(default_factory=list)
    peak_mib: float | None = None

    @property
    def median_ms(self) -> float:
        return statistics.median(self.times_ms)

    def to_dict(self) -> dict[str, Any]:
        ordered = sorted(self.times_ms)
        quartiles = statistics.quantiles(ordered, n=4) if len(ordered) > 1 else [ordered[0]] * 3
        return {
            "median_ms": round(self.median_ms, 3),
            "quartiles_ms": [round(quartiles[0], 3), round(quartiles[2], 3)],
            "min_ms": round(ordered[0], 3),
            "max_ms": round(ordered[-1], 3),
            "times_ms": [round(value, 3) for value in self.times_ms],
            "peak_mib": None if self.peak_mib is None else round(self.peak_mib, 1),
        }


def compare(row: Comparison, *, repeats: int, device: str) -> dict[str, Any]:
    """Runs both sides in turns, the order swapped each time, and returns a record for the JSON file."""
    agreement = row.agreement(row.ours(), row.stock())  # also the warm-up
    sides = {"ours": Side(), "stock": Side()}
    for repeat in range(repeats):
        order = ("ours", "stock") if repeat % 2 else ("stock", "ours")
        for name in order:
            sides[name].times_ms.append(time_ms(getattr(row, name), device))
    for name, side in sides.items():
        side.peak_mib, _ = measure_peak_mib(getattr(row, name), device)
    return make_record(row.label, row.sizes, sides, agreement, row.unit, row.per_run)


def make_record(
    label: str,
    sizes: dict[str, Any],
    sides: dict[str, Side],
    agreement: dict[str, Any],
    unit: str = "ms",
    per_run: int = 1,
) -> dict[str, Any]:
    """One row as it is saved. `speedup` is the ratio of medians, stock over ours: above 1 is faster than stock."""
    record = {
        "label": label,
        "sizes": sizes,
        "unit": unit,
        **{name: side.to_dict() for name, side in sides.items()},
        "speedup": round(sides["stock"].median_ms / sides["ours"].median_ms, 4),
        # The ratio of each neighbouring pair: what a slow spell of the machine cannot shift.
        "speedup_pairs": _spread(
            [s / o for s, o in zip(sides["stock"].times_ms, sides["ours"].times_ms, strict=True)]
        ),
        "agreement": agreement,
    }
    if unit == "tokens/s":
        for name, side in sides.items():
            record[name]["tokens_per_second"] = round(per_run / side.median_ms * 1000, 2)
    return record


def tensor_agreement(ours: torch.Tensor, stock: torch.Tensor) -> dict[str, Any]:
    """The largest absolute difference, and the largest value it stands beside."""
    difference = (ours.float() - stock.float()).abs().max().item()
    return {"max_abs_diff": difference, "max_abs_stock": stock.float().abs().max().item()}


def token_agreement(ours: torch.Tensor, stock: torch.Tensor) -> dict[str, Any]:
    """The share of generated tokens that are equal."""
    return {"equal_tokens": (ours == stock).float().mean().item()}


def synchronize(device: str) -> None:
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize(device)


def time_ms(work: Callable[[], Any], device: str) -> float:
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return (time.perf_counter() - started) * 1000


def _spread(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        "median": round(statistics.median(ordered), 4),
        "min": round(ordered[0], 4),
        "max": round(ordered[-1], 4),
    }


def measure_peak_mib(work: Callable[[], Any], device: str) -> tuple[float, Any]:
    """Memory above what was held before: allocated on a GPU, resident on the CPU (sampled, so a lower bound).

    The second of the pair is what `work` returned.
    """
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        output = work()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20, output
    _release_heap()
    with ResidentPeak() as peak:
        output = work()
    return peak.above_start_mib, output


def _release_heap() -> None:
    """Gives freed memory back, so that the next rise of the resident size is all new."""
    # Without glibc the figure is smaller by what the heap holds in reserve.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


class ResidentPeak:
    """Samples the resident size of this process in a thread."""

    def __init__(self, every_seconds: float = 0.002):
        self.every_seconds = every_seconds
        self.process = psutil.Process()

    def __enter__(self) -> ResidentPeak:
        self.start = self.peak = self.process.memory_info().rss
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._sample, daemon=True)
        self.thread.start()
        return self

    def _sample(self) -> None:
        while not self.stopped.wait(self.every_seconds):
            self.peak = max(self.peak, self.process.memory_info().rss)

    def __exit__(self, *error: object) -> None:
        self.peak = max(self.peak, self.process.memory_info().rss)
        self.stopped.set()
        self.thread.join()

    @property
    def above_start_mib(self) -> float:
        return (self.peak - self.start) / 2**20
