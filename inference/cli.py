"""The `qwen3-vl` command.

Nothing heavy is imported before a command runs, so that `--help` is quick.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import logging as python_logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .doctor_command import doctor
from .plan_command import plan
from .profile_command import profile
from .tune_command import tune


app = typer.Typer(
    name="qwen3-vl",
    help="Ask Qwen3-VL about pictures and videos, and write models for the Hub.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

TracebackOption = Annotated[bool, typer.Option("--traceback", help="Show where an error comes from.", hidden=True)]


def main() -> None:
    """Entry point of the console script."""
    app()


def _print_version(asked: bool) -> None:
    if not asked:
        return
    versions = {name: _version_of(name) for name in ("qwen3-vl", "transformers", "torch")}
    others = ", ".join(f"{name} {version}" for name, version in versions.items() if name != "qwen3-vl")
    typer.echo(f"qwen3-vl {versions['qwen3-vl']} ({others})")
    raise typer.Exit


def _version_of(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show versions and leave."),
    ] = False,
) -> None: ...


@app.command()
def ask(
    question: Annotated[str, typer.Argument(help="What to ask, in quotes.")],
    image: Annotated[list[str] | None, typer.Option(help="A picture; give it again for several.")] = None,
    video: Annotated[list[str] | None, typer.Option(help="A video file; give it again for several.")] = None,
    model: Annotated[
        str | None, typer.Option(help="A model folder or Hub name. Default: the tiny checkpoint of this checkout.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The most tokens to generate.")] = 128,
    attn_implementation: Annotated[str | None, typer.Option(help="sdpa, eager, or another attention name.")] = None,
    optim: Annotated[
        str | None,
        typer.Option(help="minimal, balanced, aggressive, a YAML or JSON file, or none. Default: the model's own."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps ... Default: the first that is here.")] = (
        None
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the text.")] = False,
    traceback: TracebackOption = False,
) -> None:
    """Answer a question about pictures or videos, word by word."""
    notes = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    with _one_line_errors(notes, traceback):
        _quieten_libraries()
        with _status(notes, "Loading ..."):
            answering = _import_answering()
            # Checked before the weights are loaded, which may take minutes.
            pictures = [answering.open_picture(path) for path in image or ()]
            answering.build_messages(question, pictures, video or ())
            answering.find_profile(optim)
            source = answering.find_model(model)
            if model is None:
                notes.print(f"Using the tiny checkpoint in {_shorten(source)}, trained for small test pictures.")
                notes.print(f"Official weights: --model {answering.OFFICIAL_EXAMPLE}", style="dim")
            loaded = answering.load(
                source, dtype=dtype, device=device, attn_implementation=attn_implementation, optim=optim
            )
        result = answering.answer(
            loaded,
            question,
            images=pictures,
            videos=video or (),
            max_new_tokens=max_new_tokens,
            on_text=None if as_json else _write_now,
        )
    if as_json:
        typer.echo(json.dumps({"model": source, **result.to_dict()}, ensure_ascii=False))
    else:
        typer.echo()
        notes.print(_cost_line(result), style="dim")


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="A model folder or a Hub name.")],
    output: Annotated[Path, typer.Argument(metavar="DIR", help="The new folder.")],
    traceback: TracebackOption = False,
) -> None:
    """Write a folder that loads with trust_remote_code=True where this package is not installed."""
    notes = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    with _one_line_errors(notes, traceback):
        _quieten_libraries()
        with _status(notes, "Exporting ..."):
            folder, manifest = _export(model, output)
    files = manifest["CODE_FILES"]
    typer.echo(f"{folder}: {len(files)} code files of qwen3-vl {manifest['PACKAGE_VERSION']}, weights and processor.")
    typer.echo(f'AutoModelForImageTextToText.from_pretrained("{folder}", trust_remote_code=True) loads it.', err=True)


app.command()(plan)
app.command()(doctor)
app.command()(profile)
app.command()(tune)


def _export(model: str, output: Path) -> tuple[Path, dict[str, Any]]:
    from ..modeling_qwen3_vl.hub_export import export_hub_folder, read_manifest

    answering = _import_answering()
    source = answering.find_model(model)
    local_only = not Path(source).is_dir() and answering.only_in_cache(source)
    folder = export_hub_folder(source, output, local_files_only=local_only)
    return folder, read_manifest(folder)


def _import_answering() -> Any:
    import qwen3_vl  # noqa: F401  # registers our classes

    from . import answering

    return answering


@contextlib.contextmanager
def _one_line_errors(notes: Console, traceback: bool) -> Iterator[None]:
    """Turns an error into one line on standard error and exit code 1."""
    try:
        yield
    except (typer.Exit, typer.Abort):
        raise
    except KeyboardInterrupt:
        notes.print("stopped")
        raise typer.Exit(130) from None
    except Exception as error:
        if traceback:
            raise
        # Not through rich, which would read square brackets in a path as markup and break the line.
        typer.echo(f"error: {_message(error)}", err=True)
        raise typer.Exit(1) from None


def _message(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else "no reason given"
    expected = isinstance(error, (OSError, ValueError)) or type(error).__name__ == "AnsweringError"
    return text if expected else f"{type(error).__name__}: {text} (add --traceback to see where)"


@contextlib.contextmanager
def _status(notes: Console, text: str) -> Iterator[None]:
    """A spinner where a person looks on, nothing in a log."""
    with notes.status(text) if notes.is_terminal else contextlib.nullcontext():
        yield


def _quieten_libraries() -> None:
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # It warns of GPU libraries that a machine without one cannot load.
    python_logging.getLogger("torchao").setLevel(python_logging.ERROR)
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    hub_logging.set_verbosity_error()
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def _write_now(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _shorten(path: str) -> str:
    with contextlib.suppress(ValueError):
        return str(Path(path).relative_to(Path.cwd()))
    return path


def _cost_line(result: Any) -> str:
    parts = [f"{result.prompt_tokens} prompt tokens"]
    if result.image_tokens:
        parts.append(f"{result.image_tokens} of them image")
    if result.video_tokens:
        parts.append(f"{result.video_tokens} of them video")
    parts.append(f"{result.new_tokens} new in {result.seconds:.1f} s")
    return ", ".join(parts)


if __name__ == "__main__":
    main()
