"""A case's records as a table, a JSON file and a plot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def print_table(console: Console, name: str, records: list[dict[str, Any]], machine: dict[str, Any]) -> None:
    versions = machine["versions"]
    table = Table(title=f"{name} on {machine['device']}", title_justify="left")
    for heading in ("row", "ours", "stock", "speed-up", "ours MiB", "stock MiB", "agreement"):
        table.add_column(heading, justify="left" if heading in ("row", "agreement") else "right")
    for record in records:
        pairs = record["speedup_pairs"]
        table.add_row(
            record["label"],
            _figure(record, "ours"),
            _figure(record, "stock"),
            f"{record['speedup']:.2f}x ({pairs['min']:.2f} - {pairs['max']:.2f})",
            _memory(record["ours"]["peak_mib"]),
            _memory(record["stock"]["peak_mib"]),
            _agreement(record["agreement"]),
        )
    console.print(table)
    console.print(
        f"{machine['device_name']}, {machine['threads']} threads, torch {versions['torch']}, "
        f"transformers {versions['transformers']}, commit {machine['commit']}, {machine['repeats']} repeats; "
        "peak: above what was held before (startup: whole process); "
        "speed-up: stock / ours, medians (lowest and highest pair)",
        style="dim",
    )


def save(folder: Path, name: str, records: list[dict[str, Any]], machine: dict[str, Any]) -> list[Path]:
    """Writes `NAME_DEVICE.json` and `.png`; returns both paths."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{name}_{machine['device'].split(':')[0]}"
    data, plot = folder / f"{stem}.json", folder / f"{stem}.png"
    data.write_text(json.dumps({"case": name, **machine, "rows": records}, indent=2) + "\n", encoding="utf-8")
    _plot(plot, name, records, machine)
    return [data, plot]


def _plot(path: Path, name: str, records: list[dict[str, Any]], machine: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.7 * len(records)), layout="constrained")
    for row, record in enumerate(records):
        for offset, side, color in ((0.19, "stock", "#9aa0a6"), (-0.19, "ours", "#1a73e8")):
            median, (low, high) = record[side]["median_ms"], record[side]["quartiles_ms"]
            spread = [[max(median - low, 0)], [max(high - median, 0)]]
            label = f"{side} (median, quartiles)" if row == 0 else None
            axes.barh(row + offset, median, 0.36, color=color, xerr=spread, ecolor="#3c4043", label=label)
        label_at = max(record["ours"]["median_ms"], record["ours"]["quartiles_ms"][1])
        axes.annotate(f"  {record['speedup']:.2f}x", (label_at, row - 0.19), va="center", fontsize=9)
    axes.set_yticks(range(len(records)), [record["label"] for record in records])
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds, less is better")
    quick = ", quick run" if machine["quick"] else ""
    axes.set_title(f"{name}: {machine['device_name']}{quick}", fontsize=10)
    axes.legend(fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _figure(record: dict[str, Any], side: str) -> str:
    if record["unit"] == "tokens/s":
        return f"{record[side]['tokens_per_second']:.1f} tok/s"
    return f"{record[side]['median_ms']:.1f} ms"


def _memory(mib: float | None) -> str:
    return "-" if mib is None else f"{mib:.0f}"


def _agreement(figures: dict[str, Any]) -> str:
    if "max_abs_diff" in figures:
        return f"{figures['max_abs_diff']:.2g} beside {figures['max_abs_stock']:.3g}"
    if "equal_tokens" in figures:
        return f"{figures['equal_tokens']:.0%} equal tokens"
    return ", ".join(f"{key} {value}" for key, value in figures.items())
