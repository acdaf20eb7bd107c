"""`qwen3-vl doctor`: what is installed, what the machine has, and what of this package runs on it.

Nothing heavy is imported before the command runs.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table


PACKAGES = {
    "qwen3-vl": "this package",
    "torch": "needed",
    "transformers": "needed",
    "safetensors": "needed",
    "numpy": "needed",
    "pillow": "needed",
    "av": "reads videos",
    "accelerate": "training, several devices",
    "peft": "adapters",
    "torchao": "writes and reads packed weights",
    "optimum-quanto": "stock's quantized caches, for comparison",
    "bitsandbytes": "stock's 8- and 4-bit weights",
    "flash-attn": "FlashAttention on a GPU",
    "triton": "kernels on a GPU",
    "kernels": "kernels from the Hub",
    "nvidia-ml-py": "power of an NVIDIA GPU",
    "datasets": "training data, bulk runs",
    "optuna": "tuning",
}


def doctor(
    device: Annotated[
        str | None, typer.Option(help="Where to try: cpu, cuda ... Default: the first accelerator, else the CPU.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the tables.")] = False,
    traceback: Annotated[bool, typer.Option("--traceback", hidden=True)] = False,
) -> None:
    """Say what is installed, what the machine has, and which kernels, caches and techniques run on it."""
    from .cli import _import_answering, _one_line_errors, _quieten_libraries, _status

    notes = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    out = Console(highlight=False, markup=False, soft_wrap=True)
    with _one_line_errors(notes, traceback):
        packages = installed_packages()
        if not as_json:
            print_packages(packages, out)
        _quieten_libraries()
        answering = _import_answering()
        device = answering.pick_device(device)
        from ..configuration.hardware_detection import detect_hardware
        from ..optim.power.power_meters import pick_meter
        from .doctor_checks import check_kernels, check_techniques

        hardware, meter = detect_hardware(), pick_meter(device)[1]
        if not as_json:
            print_machine([*hardware.lines(), f"power: {meter}"], out)
        with _status(notes, "Compiling kernels, trying techniques ..."):
            kernels, techniques = check_kernels(), check_techniques(device)
        if as_json:
            report = {
                "python": platform.python_version(),
                "device": device,
                "packages": packages,
                "hardware": hardware.to_dict(),
                "power_meter": meter,
                "kernels": [check.to_dict() for check in kernels],
                "techniques": [check.to_dict() for check in techniques],
            }
            typer.echo(json.dumps(report))
        else:
            print_checks(kernels, techniques, device, out)
        ill = [check.name for check in techniques if not check.well]
        if ill:
            raise answering.AnsweringError(
                f"{len(ill)} of {len(techniques)} do not run as they should: {', '.join(ill)}."
            )


def installed_packages() -> dict[str, str | None]:
    """Versions of what this package needs or can use, read without importing it; `None` for what is not there."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def print_packages(packages: dict[str, str | None], console: Console) -> None:
    """Versions and what each is for."""
    table = Table(title=f"Python {platform.python_version()}, {platform.system()}", title_justify="left")
    for heading in ("package", "version", "for"):
        table.add_column(heading)
    for name, version in packages.items():
        table.add_row(name, version or "-", PACKAGES[name])
    console.print(table)


def print_machine(lines: list[str], console: Console) -> None:
    """What was found of the hardware, one line a value."""
    for line in lines:
        console.print(line)


def print_checks(kernels: list[Any], techniques: list[Any], device: str, console: Console) -> None:
    """Kernels, and techniques as they ran on a small model."""
    table = Table(title="native kernels", title_justify="left")
    for heading in ("kernel", "status", ""):
        table.add_column(heading)
    for check in kernels:
        table.add_row(check.name, check.status, check.detail)
    console.print(table)
    table = Table(title=f"tried on {device}, with default settings", title_justify="left")
    for heading in ("kind", "name", "exact", "status", "kernels", "why"):
        table.add_column(heading)
    for check in techniques:
        exact = {True: "yes", False: "no", None: "-"}[check.exact]
        kernels_used = ", ".join(check.kernels) or "-"
        table.add_row(check.kind, check.name, exact, check.status, kernels_used, check.detail)
    console.print(table)
