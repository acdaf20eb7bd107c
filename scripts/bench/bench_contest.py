"""Several ways to the same result, run in turns: one record for each, beside the first."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from bench_measure import Side, make_record, measure_peak_mib, time_ms


# Far more than any cache holds, so that a plain read of it is one of memory.
YARDSTICK_BYTES = 2**28


@dataclass
class Way:
    """One way to the result of a contest.

    Attributes:
        work (callable): does it, as often as the contest's `calls` says, and returns an output.
        prepare (callable): run before every `work`, not timed.
        details (callable, *optional*): figures for the record, taken after the first run.
        reads_bytes (`int`, *optional*): what one call has to read; reported as GB/s and as a share of a plain read.
        against (`tuple[str]`): ways besides the first that this one is compared to.
    """

    work: Callable[[], Any]
    prepare: Callable[[], None] = lambda: None
    details: Callable[[], dict[str, Any]] = dict
    reads_bytes: int | None = None
    against: tuple[str, ...] = ()


@dataclass
class Contest:
    """One row of the table for every way but the first.

    Attributes:
        label (`str`): the beginning of the rows' names.
        sizes (`dict`): what it is measured on; with `context` and `phase`, a point of the plot.
        ways (callable): makes the ways by name, the first of them stock; called when the contest's turn comes.
        agreement (callable): takes a way's output and the first one's, returns figures.
        calls (`int`): how often `work` does it; times are of one.
        most_repeats (`int`, *optional*): for what takes long.
    """

    label: str
    sizes: dict[str, Any]
    ways: Callable[[], dict[str, Way]]
    agreement: Callable[[Any, Any], dict[str, Any]]
    calls: int = 1
    most_repeats: int | None = None


@dataclass
class _Entrant:
    way: Way
    side: Side = field(default_factory=Side)
    agreement: dict[str, Any] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)


def run_contest(
    contest: Contest, *, repeats: int, device: str, against_itself: bool = False, only: list[str] | None = None
) -> list[dict[str, Any]]:
    """Runs all ways in turns, another one first in each round, and returns a record for every way but the first.

    With `only`, those named and the first.
    """
    ways = contest.ways()
    if only:
        ways = {name: way for place, (name, way) in enumerate(ways.items()) if place == 0 or name in only}
    if against_itself:
        first = next(iter(ways))
        ways = {first: ways[first], f"{first} again": ways[first]}
    entrants = {name: _Entrant(way) for name, way in ways.items()}
    _first_runs(contest, list(entrants.values()), device)
    yardstick = _Yardstick(device) if any(way.reads_bytes for way in ways.values()) else None
    for repeat in range(min(repeats, contest.most_repeats or repeats)):
        order = list(entrants.values())
        turn = repeat % len(order)
        for entrant in order[turn:] + order[:turn]:
            entrant.way.prepare()
            entrant.side.times_ms.append(time_ms(entrant.way.work, device) / contest.calls)
        if yardstick:
            yardstick.read()
    return _records(contest, entrants, yardstick)


def _first_runs(contest: Contest, entrants: list[_Entrant], device: str) -> None:
    """Warms up, and takes from the same run what is not a time, since some ways need half a minute for one."""
    reference = None
    for entrant in entrants:
        entrant.way.prepare()
        entrant.side.peak_mib, output = measure_peak_mib(entrant.way.work, device)
        reference = output if reference is None else reference
        entrant.agreement = contest.agreement(output, reference)
        entrant.details = entrant.way.details()


def _records(contest: Contest, entrants: dict[str, _Entrant], yardstick: _Yardstick | None) -> list[dict[str, Any]]:
    records = []
    (_, stock), *others = entrants.items()
    for name, entrant in others:
        sides = {"ours": entrant.side, "stock": stock.side}
        record = make_record(f"{contest.label}: {name}", contest.sizes, sides, entrant.agreement)
        record["way"] = name
        record["against"] = {
            other: round(entrants[other].side.median_ms / entrant.side.median_ms, 4)
            for other in entrant.way.against
            if other in entrants
        }
        record["details"] = dict(entrant.details)
        if yardstick and entrant.way.reads_bytes:
            record["details"] |= yardstick.figures(entrant.way.reads_bytes, entrant.side.median_ms)
        records.append(record)
    return records


class _Yardstick:
    """The speed of a plain read: a sum of integers, the fastest that PyTorch has here."""

    def __init__(self, device: str):
        self.device = device
        self.memory = torch.ones(YARDSTICK_BYTES // 8, dtype=torch.int64, device=device)
        self.memory.sum()
        self.times_ms: list[float] = []

    def read(self) -> None:
        self.times_ms.append(time_ms(self.memory.sum, self.device))

    def figures(self, reads_bytes: int, milliseconds: float) -> dict[str, Any]:
        plain = YARDSTICK_BYTES / statistics.median(self.times_ms) / 1e6
        reached = reads_bytes / milliseconds / 1e6
        return {
            "gb_per_s": round(reached, 2),
            "plain_read_gb_per_s": round(plain, 2),
            "share_of_plain_read": round(reached / plain, 3),
        }
