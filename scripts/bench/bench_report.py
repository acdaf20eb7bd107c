"""A case's records as a table, a JSON file and a plot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench_plot import draw
from rich.console import Console
from rich.table import Table


def print_table(console: Console, name: str, records: list[dict[str, Any]], machine: dict[str, Any]) -> None:
    versions = machine["versions"]
    compared = any(record.get("against") for record in records)
    detailed = any(record.get("details") for record in records)
    peered = any("peer_ms" in record.get("details", {}) for record in records)
    headings = ["row", "ours", "stock", "speed-up", *["llama.cpp"] * peered, *["beside"] * compared]
    headings += ["ours MiB", "stock MiB", "agreement"]
    table = Table(title=f"{name} on {machine['device']}", title_justify="left")
    for heading in [*headings, *["details"] * detailed]:
        table.add_column(heading, justify="left" if heading in ("row", "beside", "agreement", "details") else "right")
    group = None
    for record in records:
        label = record["label"]
        if "way" in record:
            if group != (group := label.removesuffix(f": {record['way']}")):
                table.add_section()
                table.add_row(f"[bold]{group}")
            label = f"  {record['way']}"
        pairs = record["speedup_pairs"]
        table.add_row(
            label,
            _figure(record, "ours"),
            _figure(record, "stock"),
            f"{record['speedup']:.2f}x ({pairs['min']:.2f} - {pairs['max']:.2f})",
            *[_peer(record)] * peered,
            *[_against(record)] * compared,
            _memory(record["ours"]["peak_mib"]),
            _memory(record["stock"]["peak_mib"]),
            _agreement(record["agreement"]),
            *[_details(record.get("details", {}))] * detailed,
        )
    console.print(table)
    console.print(
        f"{machine['device_name']}, {machine['threads']} threads, torch {versions['torch']}, "
        f"transformers {versions['transformers']}, commit {machine['commit']}, {machine['repeats']} repeats; "
        "peak: above what was held before (startup: whole process); "
        "speed-up: stock / ours, medians (lowest and highest pair)",
        style="dim",
    )


def save(
    folder: Path, name: str, records: list[dict[str, Any]], machine: dict[str, Any], *, keep_others: bool = False
) -> list[Path]:
    """Writes `NAME_DEVICE.json` and `.png`; returns both paths.

    Args:
        keep_others (`bool`): rows of the file that stands there stay, unless they were measured anew.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{name}_{machine['device'].split(':')[0]}"
    data, plot = folder / f"{stem}.json", folder / f"{stem}.png"
    if keep_others and data.exists():
        records = _merged(json.loads(data.read_text(encoding="utf-8"))["rows"], records)
    data.write_text(json.dumps({"case": name, **machine, "rows": records}, indent=2) + "\n", encoding="utf-8")
    draw(plot, name, records, machine)
    return [data, plot]


def _merged(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    fresh = {record["label"]: record for record in new}
    kept = [fresh.pop(record["label"], record) for record in old]
    return [*kept, *fresh.values()]


def _figure(record: dict[str, Any], side: str) -> str:
    if record["unit"] == "tokens/s":
        return f"{record[side]['tokens_per_second']:.1f} tok/s"
    median = record[side]["median_ms"]
    return f"{median:.1f} ms" if median >= 10 else f"{median:.3g} ms"


def _memory(mib: float | None) -> str:
    return "-" if mib is None else f"{mib:.0f}"


def _agreement(figures: dict[str, Any]) -> str:
    if "max_abs_diff" in figures:
        return f"{figures['max_abs_diff']:.2g} beside {figures['max_abs_stock']:.3g}"
    if "relative_error" in figures:
        return f"error {figures['relative_error']:.2%}"
    if "equal_tokens" in figures:
        return f"{figures['equal_tokens']:.0%} equal tokens"
    return ", ".join(f"{key} {value}" for key, value in figures.items())


def _against(record: dict[str, Any]) -> str:
    return "\n".join(f"{ratio:.2f}x {name}" for name, ratio in record.get("against", {}).items())


def _peer(record: dict[str, Any]) -> str:
    """Another program's time, and how much faster we are."""
    figures = record.get("details", {})
    if "peer_ms" not in figures:
        return "-"
    ratio = figures["peer_ms"] / record["ours"]["median_ms"]
    return f"{figures['peer']} {figures['peer_ms']:.1f} ms, {ratio:.2f}x"


def _details(figures: dict[str, Any]) -> str:
    lines = []
    if "gb_per_s" in figures:
        lines.append(f"{figures['gb_per_s']:.1f} GB/s, {figures['share_of_plain_read']:.0%} of a plain read")
    if "density" in figures:
        lines.append(f"{figures['density']:.1%} computed, mass {figures['mass_kept']:.1%}")
        lines[-1] += f" (worst head {figures['mass_kept_worst_head']:.1%})"
    if "held_mib" in figures:
        lines.append(f"holds {figures['held_mib']:.1f} MiB, {figures['share_of_whole']:.1%} of all")
    if "kv_mib" in figures:
        lines.append(f"KV {figures['kv_mib']:.1f} MiB, weights {figures['weights_mib']:.0f} MiB")
    if "text_weights_mib" in figures:
        lines.append(f"{figures['text_weights_mib']:,.0f} MiB of text weights")
    if figures.get("failure"):
        lines.append(f"fell back: {figures['failure']}")
    return "\n".join(lines)
