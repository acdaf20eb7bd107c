"""`qwen3-vl profile`: the profile that suits a machine and a model, and why; or a preset, or a file, as it is read.

Nothing heavy is imported before the command runs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table


def profile(
    name: Annotated[
        str | None,
        typer.Argument(help="minimal, balanced, aggressive, or a YAML or JSON file. Default: what suits the machine."),
    ] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Say why, line by line.")] = False,
    model: Annotated[
        str | None, typer.Option(help="A model folder or Hub name that it is for. Default: the published 2B model.")
    ] = None,
    memory: Annotated[str | None, typer.Option(help="8GB, 6GiB ... in place of this machine's.")] = None,
    cores: Annotated[int | None, typer.Option(help="CPU cores in place of this machine's.")] = None,
    gpu_memory: Annotated[str | None, typer.Option(help="24GB ..., 0 for no GPU, in place of this machine's.")] = None,
    output: Annotated[Path | None, typer.Option(help="A JSON file to write the profile to.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the table.")] = False,
    traceback: Annotated[bool, typer.Option("--traceback", hidden=True)] = False,
) -> None:
    """Say which profile suits this machine, or another, and why."""
    from .cli import _import_answering, _one_line_errors, _quieten_libraries

    notes = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    with _one_line_errors(notes, traceback):
        _quieten_libraries()
        answering = _import_answering()
        if name is not None and (memory, cores, gpu_memory) != (None, None, None):
            raise answering.AnsweringError(
                f"{name} is a profile of its own; leave it out to get one for --memory, --cores or --gpu-memory."
            )
        if name is None:
            made, reasons, hardware = _for_machine(answering, model, memory, cores, gpu_memory)
        else:
            made, reasons, hardware = _named(name), [], None
        steps = _steps(made)
        if output is not None:
            made.to_json(output)
    if as_json:
        report = {"profile": made.to_dict(), "techniques": steps, "explanation": reasons, "hardware": hardware}
        typer.echo(json.dumps(report))
        return
    out = Console(highlight=False, markup=False, soft_wrap=True)
    for line in reasons if explain else ():
        out.print(line)
    print_steps(steps, name or "what suits this machine", out)
    typer.echo(made.to_json(), nl=False)


def _for_machine(answering: Any, model: str | None, memory: str | None, cores: int | None, gpu_memory: str | None):
    """A profile by hardware, why it is that one, and the hardware."""
    from ..configuration.hardware_detection import GIB, Hardware, detect_hardware
    from ..optim.memory.memory_units import parse_bytes
    from ..optim.profile_manager import UnifiedConfigManager
    from .plan_command import load_sizes

    specs: dict[str, Any] = {}
    if memory is not None:
        specs["memory_gb"] = parse_bytes(memory, "memory") / GIB
    if cores is not None:
        specs["cpu_cores"] = cores
    if gpu_memory is not None:
        specs["gpu_memory"] = 0 if gpu_memory.strip() == "0" else parse_bytes(gpu_memory, "gpu memory")
    hardware = Hardware.from_specs(specs) if specs else detect_hardware()
    config = None if model is None else load_sizes(answering.find_model(model))[0]
    manager = UnifiedConfigManager(config)
    try:
        made = manager.get_hardware_optimized_config(hardware)
    except MemoryError as error:
        raise answering.AnsweringError(str(error)) from None
    return made, manager.explanation, hardware.to_dict()


def _named(name: str) -> Any:
    from ..configuration.profile_qwen3_vl import UnifiedConfig, given_profile

    return UnifiedConfig.parse(given_profile(name))


def _steps(made: Any) -> list[dict[str, Any]]:
    """The techniques in the order in which they are applied."""
    from ..optim.registry_optim import techniques_of
    from ..optim.technique_order import OrderOptimizer

    ordered = OrderOptimizer().order(techniques_of(made.techniques()))
    return [{"name": step.name, "exact": step.exact, "settings": made.techniques()[step.name]} for step in ordered]


def print_steps(steps: list[dict[str, Any]], title: str, console: Console) -> None:
    """A row for each technique that is on."""
    table = Table(title=title, title_justify="left")
    for heading in ("technique", "answers", "settings"):
        table.add_column(heading)
    for step in steps:
        given = ", ".join(f"{key}={value}" for key, value in step["settings"].items())
        table.add_row(step["name"], "the same" if step["exact"] else "may differ", given)
    console.print(table)
