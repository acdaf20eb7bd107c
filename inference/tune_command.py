"""`qwen3-vl tune`: the profile that is fastest on one's own samples and answers nearly as the exact model does.

Nothing heavy is imported before the command runs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table


def tune(
    samples: Annotated[
        str, typer.Option(help='A folder of pictures, or JSONL with rows {"image": "a.png", "prompt": "What is it?"}.')
    ],
    model: Annotated[
        str | None, typer.Option(help="A model folder or Hub name. Default: the tiny checkpoint of this checkout.")
    ] = None,
    target_quality: Annotated[
        float, typer.Option(help="Least share of the exact model's tokens that the profile ranks first too.")
    ] = 0.99,
    trials: Annotated[int, typer.Option(min=1, help="Profiles to try; the presets come first.")] = 20,
    rounds: Annotated[int, typer.Option(min=1, help="How often each is timed, in turns with the exact model.")] = 3,
    limit: Annotated[int | None, typer.Option(min=1, help="The most samples to take.")] = None,
    prompt: Annotated[str | None, typer.Option(help="What to ask about pictures without a prompt of their own.")] = (
        None
    ),
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The most tokens of an answer.")] = 32,
    out: Annotated[Path, typer.Option(help="A folder for the report, the plot and the copy of config.json.")] = Path(
        "tuned"
    ),
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu, cuda ... Default: the first that is here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the table.")] = False,
    traceback: Annotated[bool, typer.Option("--traceback", hidden=True)] = False,
) -> None:
    """Search the profile that is fastest on your samples and answers as the exact model does.

    Memory for two models is needed: one stays exact.
    """
    from .cli import _import_answering, _one_line_errors, _quieten_libraries, _status

    notes = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    with _one_line_errors(notes, traceback):
        _quieten_libraries()
        answering = _import_answering()
        from .tuning_report import make_folder
        from .tuning_samples import DEFAULT_PROMPT, read_samples
        from .tuning_search import ProfileSearch, import_optuna

        # All of this before the weights are loaded, which may take minutes.
        if not 0 < target_quality <= 1:
            raise answering.AnsweringError(f"--target-quality must be above 0 and at most 1, got {target_quality}.")
        import_optuna()
        taken = read_samples(samples, prompt or DEFAULT_PROMPT, limit)
        chats = [answering.build_messages(sample.prompt, sample.images) for sample in taken]
        source = answering.find_model(model)
        folder = make_folder(out, source)
        with _status(notes, "Loading ..."):
            from .tuning_measure import ProfileMeter

            loaded = answering.load(source, dtype=dtype, device=device, optim="none")
            requests = [dict(answering.encode(loaded, chat)) for chat in chats]
            meter = ProfileMeter(loaded.model, requests, max_new_tokens, rounds)
        search = ProfileSearch(
            meter.measure,
            target_quality,
            longest_prompt=max(request["input_ids"].shape[1] for request in requests),
            on_gpu=loaded.model.device.type == "cuda",
        )
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=notes,
            transient=True,
            disable=not notes.is_terminal,
        ) as progress:
            task = progress.add_task("trying profiles", total=trials)
            for trial in search.run(trials):
                progress.update(task, advance=1, description=_word(trial))
        report = _write(folder, source, search, meter.exact_bytes, len(requests))
    if as_json:
        typer.echo(json.dumps(report))
    else:
        out_console = Console(highlight=False, markup=False, soft_wrap=True)
        print_front(search, out_console)
        typer.echo(f"{folder}: config.json with the profile, profile.json, report.json, pareto.png.")
        notes.print(f"--optim {folder / 'profile.json'} uses it.", style="dim")


def _write(folder: Path, source: str, search: Any, exact_bytes: int, samples: int) -> dict[str, Any]:
    """Leaves report and plot behind even where no profile is good enough, and the choice where one is."""
    from .answering import AnsweringError
    from .tuning_report import PLOT, draw_front, write_profile, write_report

    try:
        best, failure = search.best(), None
    except AnsweringError as error:
        best, failure = None, error
    front = search.front()
    report = {
        "model": source,
        "samples": samples,
        "target_quality": search.target,
        "exact_bytes": exact_bytes,
        "best": None if best is None else best.to_dict(),
        "front": [trial.number for trial in front],
        "trials": [trial.to_dict() for trial in search.trials],
    }
    write_report(folder, report)
    draw_front(folder / PLOT, search.trials, front, best, search.target, exact_bytes)
    if failure is not None:
        raise failure
    write_profile(folder, source, best)
    return report


def _word(trial: Any) -> str:
    if trial.measurement is None:
        return f"profile {trial.number + 1}: does not run here"
    return f"profile {trial.number + 1}: {trial.measurement.time_ratio:.2f} of the time"


def print_front(search: Any, console: Console) -> None:
    """The profiles that no other one beats, the fastest first, with what they cost and change."""
    best = search.best()
    table = Table(title=f"agree on {search.target:.1%} of the tokens and more", title_justify="left")
    table.add_column("profile", min_width=26)
    for heading in ("time", "first ms", "token ms", "MB", "top-1", "same"):
        table.add_column(heading, justify="right", no_wrap=True)
    for trial in search.front():
        found = trial.measurement
        table.add_row(
            f"{trial.title} (chosen)" if trial.profile == best.profile else trial.title,
            f"{found.time_ratio:.2f}",
            f"{found.prefill_ms:.1f}",
            "-" if found.token_ms is None else f"{found.token_ms:.1f}",
            f"{found.held_bytes / 1e6:.1f}",
            f"{found.top1_agreement:.1%}",
            f"{found.token_agreement:.1%}",
        )
    console.print(table)
