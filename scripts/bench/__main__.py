"""Speed and memory against the stock class, same weights, same process: `python scripts/bench [CASE ...]`.

Prints a table for each case and writes `docs/bench/CASE_DEVICE.json` with a plot beside it. A case is a file
`case_NAME.py` in this folder with `rows(settings)`, which yields `Comparison`s and `Contest`s, or `records(settings)`.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from bench_contest import Contest, run_contest
from bench_measure import compare
from bench_report import print_table, save
from bench_settings import REPOSITORY, Settings, describe_machine
from rich.console import Console


CASES = sorted(path.stem.removeprefix("case_") for path in Path(__file__).parent.glob("case_*.py"))


def main() -> int:
    options = parse_options()
    settings = make_settings(options)
    transformers.utils.logging.set_verbosity_error()
    if options.threads:
        torch.set_num_threads(options.threads)
    transformers.utils.logging.disable_progress_bar()
    console = Console() if sys.stdout.isatty() else Console(width=170)
    failed = []
    for name in options.cases or CASES:
        try:
            records = list(measure(name, settings, options, console))
            if not records:
                raise ValueError(f"no row's label has {options.rows!r} in it")
        except Exception as error:
            console.print(f"{name}: {type(error).__name__}: {error}", style="red", markup=False)
            failed.append(name)
            continue
        machine = describe_machine(settings)
        print_table(console, name, records, machine)
        for path in save(options.out, name, records, machine, keep_others=bool(options.rows or options.way)):
            console.print(f"wrote {path}", style="dim")
    return 1 if failed else 0


def measure(name: str, settings: Settings, options: argparse.Namespace, console: Console) -> Iterator[dict[str, Any]]:
    """The records of one case, as they are measured."""
    case = importlib.import_module(f"case_{name}")
    if not options.dtype and hasattr(case, "DTYPES"):
        settings = replace(settings, dtypes=case.DTYPES)
    if hasattr(case, "records"):
        yield from case.records(settings)
        return
    for row in case.rows(settings):
        if settings.rows not in row.label:
            continue
        with console.status(f"{name}: {row.label}"):
            if isinstance(row, Contest):
                yield from run_contest(
                    row,
                    repeats=settings.repeats,
                    device=settings.device,
                    against_itself=settings.against_itself,
                    only=options.way,
                )
            else:
                yield compare(row, repeats=settings.repeats, device=settings.device)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python scripts/bench", description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"default: all of {', '.join(CASES)}")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, mps ... (default: cpu)")
    parser.add_argument(
        "--dtype",
        action="append",
        choices=("float32", "bfloat16", "float16"),
        help="default: both, or what the case is about",
    )
    parser.add_argument("--repeats", type=int, help="runs of each side (default: 9, quick 2)")
    parser.add_argument("--text-layers", type=int, help="decoder layers (default: 4, quick 1)")
    parser.add_argument("--vision-layers", type=int, help="vision layers (default: 8, quick 4)")
    parser.add_argument("--threads", type=int, help="CPU threads of torch")
    parser.add_argument("--rows", metavar="TEXT", help="rows whose label has it; others of an earlier run are kept")
    parser.add_argument("--way", action="append", metavar="NAME", help="of a row with several ways, this and stock")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: proves that a case works, no figures")
    parser.add_argument("--against-itself", action="store_true", help="stock on both sides: shows the noise")
    parser.add_argument(
        "--peer", type=Path, metavar="LLAMA_BENCH", help="profiles: a column of llama.cpp's bench tool"
    )
    parser.add_argument("--out", type=Path, default=REPOSITORY / "docs" / "bench", help="default: docs/bench")
    options = parser.parse_args()
    unknown = sorted(set(options.cases) - set(CASES))
    if unknown:
        parser.error(f"no such case: {', '.join(unknown)}; there are {', '.join(CASES)}")
    if options.repeats is not None and options.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {options.repeats}")
    return options


def make_settings(options: argparse.Namespace) -> Settings:
    quick = options.quick
    return Settings(
        device=options.device,
        dtypes=tuple(options.dtype or (("float32",) if quick else ("float32", "bfloat16"))),
        repeats=options.repeats or (2 if quick else 9),
        text_layers=options.text_layers or (1 if quick else 4),
        vision_layers=options.vision_layers or (4 if quick else 8),
        quick=quick,
        against_itself=options.against_itself,
        rows=options.rows or "",
        peer=options.peer,
    )


if __name__ == "__main__":
    sys.exit(main())
