"""The picture beside a case's figures: lines over the context length, or a bar for each row."""

from __future__ import annotations

from math import log
from pathlib import Path
from typing import Any


GREY, BLUE, INK, FAINT = "#9aa0a6", "#1a73e8", "#3c4043", "#e8eaed"
# Far apart for all kinds of sight (after Okabe and Ito); what is alike has the same hue.
COLORS = {
    "stock": GREY,
    "exact, paged": "#0b3d91",
    "exact": BLUE,
    "our model": "#7b5ea7",
    "dynamic sparse": "#d55e00",
    "block sparse": "#009e73",
    "memory-efficient": "#b8860b",
    "paged": "#0b3d91",
    "int8": "#cc79a7",
    "int4": "#d55e00",
    "int2": "#b8860b",
    "evicting": "#009e73",
    "tiered": "#7b5ea7",
}


def draw(path: Path, name: str, records: list[dict[str, Any]], machine: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    if all("way" in record for record in records):
        lines = all("context" in record["sizes"] for record in records)
        figure = (_lines if lines else _way_bars)(plt, records)
    else:
        figure = _pair_bars(plt, records)
    quick = ", quick run" if machine["quick"] else ""
    figure.suptitle(f"{name}: {machine['device_name']}{quick}", fontsize=10, color=INK)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _pair_bars(plt: Any, records: list[dict[str, Any]]) -> Any:
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.7 * len(records)), layout="constrained")
    for row, record in enumerate(records):
        for offset, side, color in ((0.19, "stock", GREY), (-0.19, "ours", BLUE)):
            median, (low, high) = record[side]["median_ms"], record[side]["quartiles_ms"]
            spread = [[max(median - low, 0)], [max(high - median, 0)]]
            label = f"{side} (median, quartiles)" if row == 0 else None
            axes.barh(row + offset, median, 0.36, color=color, xerr=spread, ecolor=INK, label=label)
        label_at = max(record["ours"]["median_ms"], record["ours"]["quartiles_ms"][1])
        axes.annotate(f"  {record['speedup']:.2f}x", (label_at, row - 0.19), va="center", fontsize=9)
    axes.set_yticks(range(len(records)), [record["label"] for record in records])
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds, less is better")
    figure.legend(fontsize=8, frameon=False, loc="outside lower right", ncols=2)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _way_bars(plt: Any, records: list[dict[str, Any]]) -> Any:
    """One panel a contest, one bar a way, stock the first."""
    contests: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        contests.setdefault(record["label"].removesuffix(f": {record['way']}"), []).append(record)
    bars = len(records) + len(contests)
    figure, axes = plt.subplots(
        len(contests), 1, figsize=(8, 0.7 + 0.6 * len(contests) + 0.42 * bars), layout="constrained", squeeze=False
    )
    for axis, (label, rows) in zip(axes[:, 0], contests.items(), strict=True):
        names = ["stock", *(record["way"] for record in rows)]
        sides = [rows[0]["stock"], *(record["ours"] for record in rows)]
        for row, (name, side) in enumerate(zip(names, sides, strict=True)):
            median, (low, high) = side["median_ms"], side["quartiles_ms"]
            spread = [[max(median - low, 0)], [max(high - median, 0)]]
            axis.barh(row, median, 0.7, color=_color(name), xerr=spread, ecolor=INK)
            ratio = f"  {median:,.0f} ms" + (f", {sides[0]['median_ms'] / median:.2f}x" if row else "")
            axis.annotate(ratio, (max(median, high), row), va="center", fontsize=9, color=INK)
        axis.set_yticks(range(len(names)), names)
        axis.margins(x=0.16)
        axis.invert_yaxis()
        axis.set_title(label, fontsize=10, color=INK)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel("milliseconds (median, quartiles), less is better")
    return figure


def _lines(plt: Any, records: list[dict[str, Any]]) -> Any:
    """One panel a phase and dtype, one line an implementation, both axes logarithmic."""
    panels = [(title, lines, "milliseconds") for title, lines in _panels(records).items()]
    if any("held_mib" in record["details"] for record in records):
        panels.append(("held by the cache", _held(records), "MiB"))
    figure, axes = plt.subplots(1, len(panels), figsize=(1.0 + 5.6 * len(panels), 4.9), layout="constrained")
    for axis, panel in zip([axes] if len(panels) == 1 else axes, panels, strict=True):
        _panel(axis, *panel)
    return figure


def _panels(records: list[dict[str, Any]]) -> dict[str, dict[str, dict[int, float]]]:
    """Milliseconds by panel, implementation and context; a panel of a single length says nothing and is left out."""
    panels: dict[str, dict[str, dict[int, float]]] = {}
    for record in records:
        sizes = record["sizes"]
        lines = panels.setdefault(f"{sizes['phase']}, {sizes['dtype']}", {})
        lines.setdefault("stock", {})[sizes["context"]] = record["stock"]["median_ms"]
        lines.setdefault(record["way"], {})[sizes["context"]] = record["ours"]["median_ms"]
    several = {title: lines for title, lines in panels.items() if len(lines["stock"]) > 1}
    return several or panels


def _held(records: list[dict[str, Any]]) -> dict[str, dict[int, float]]:
    """MiB by cache and context; stock's is the whole of what the others hold a share of."""
    lines: dict[str, dict[int, float]] = {}
    for record in records:
        held, context = record["details"], record["sizes"]["context"]
        lines.setdefault("stock", {})[context] = held["held_mib"] / held["share_of_whole"]
        lines.setdefault(record["way"], {})[context] = held["held_mib"]
    return lines


def _panel(axis: Any, title: str, lines: dict[str, dict[int, float]], unit: str) -> None:
    contexts = sorted({context for points in lines.values() for context in points})
    ends, speed_ups = {}, {}
    for name, points in lines.items():
        x = sorted(points)
        y = [points[context] for context in x]
        axis.plot(
            x,
            y,
            color=_color(name),
            linestyle=(0, (4, 2)) if name.endswith("plain") else "-",
            linewidth=2.4 if name == "stock" else 1.8,
            marker="s" if "paged" in name else "o",
            markersize=4.5,
        )
        ends[name] = y[-1]
        speed_ups[name] = _speed_up(lines["stock"], points, x[-1], contexts[-1])
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(contexts, [f"{context:,}" for context in contexts])
    axis.minorticks_off()
    ticks = [tick for tick in axis.get_yticks() if axis.get_ylim()[0] <= tick <= axis.get_ylim()[1]]
    if len(ticks) < 3:
        axis.set_yticks(_steps(*axis.get_ylim()))
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}")
    axis.set_xlabel("tokens of context")
    axis.set_ylabel(f"{unit}, less is better")
    axis.set_title(title, fontsize=10, color=INK)
    axis.grid(color=FAINT, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    _name_lines(axis, ends, {**speed_ups, "stock": ""})


def _steps(low: float, high: float) -> list[float]:
    """1, 2, 5, 10 ... between two values, for a range of hardly more than a power of ten."""
    steps = [step * 10.0**power for power in range(-3, 7) for step in (1, 2, 5)]
    return [step for step in steps if low <= step <= high]


def _speed_up(stock: dict[int, float], points: dict[int, float], context: int, longest: int) -> str:
    """Over stock at a line's last `context`, which is named where it is not the `longest`."""
    ratio = stock[context] / points[context]
    where = "" if context == longest else f" at {context:,}"
    return f"  {ratio:.1f}x{where}" if ratio >= 0.95 else f"  {ratio:.2f}x{where}"


def _name_lines(axis: Any, ends: dict[str, float], speed_ups: dict[str, str]) -> None:
    """Names at the ends of the lines, pushed apart where they would touch."""
    low, high = axis.get_ylim()
    wanted = {name: log(value / low) / log(high / low) for name, value in ends.items()}
    for name, place in _spread_out(wanted).items():
        axis.annotate(
            name + speed_ups[name],
            (1.02, place),
            xycoords="axes fraction",
            va="center",
            fontsize=9,
            color=_color(name),
            fontweight="bold" if name == "stock" else None,
            annotation_clip=False,
        )


def _spread_out(wanted: dict[str, float], gap: float = 0.052) -> dict[str, float]:
    """Heights at least a gap apart, near the wanted ones: neighbours that touch move together as one block."""
    blocks: list[tuple[list[str], float]] = []  # names from below, and the middle of the block
    for name in sorted(wanted, key=wanted.get):
        names, middle = [name], wanted[name]
        while blocks and middle - len(names) * gap / 2 < blocks[-1][1] + len(blocks[-1][0]) * gap / 2:
            below, below_middle = blocks.pop()
            total = len(below) + len(names)
            middle = (below_middle * len(below) + middle * len(names)) / total
            names = below + names
        blocks.append((names, middle))
    return {
        name: middle + (index - (len(names) - 1) / 2) * gap
        for names, middle in blocks
        for index, name in enumerate(names)
    }


def _color(name: str) -> str:
    return next((color for start, color in COLORS.items() if name.startswith(start)), INK)
