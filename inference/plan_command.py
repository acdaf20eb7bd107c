"""`qwen3-vl plan`: what a run will take in memory, and the settings that make it fit.

Nothing heavy is imported before the command runs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table


def plan(
    model: Annotated[
        str | None, typer.Option(help="A model folder or Hub name. Default: the tiny checkpoint of this checkout.")
    ] = None,
    images: Annotated[
        list[str] | None, typer.Option(help="Pictures as [COUNTx]WIDTHxHEIGHT; give it again for more.")
    ] = None,
    video: Annotated[
        list[str] | None,
        typer.Option(help="A video as 600s, 600s@1280x720 or, sampled already, 64f@512x512; again for more."),
    ] = None,
    text_tokens: Annotated[int, typer.Option(help="Text tokens of the prompt.")] = 256,
    new_tokens: Annotated[int, typer.Option(help="The most tokens to generate.")] = 128,
    batch: Annotated[int, typer.Option(help="Rows of the batch, each with these pictures and this text.")] = 1,
    beams: Annotated[int, typer.Option(help="Beams of the search.")] = 1,
    budget: Annotated[str | None, typer.Option(help="8GB, 6GiB ... Default: no limit, nothing is made smaller.")] = (
        None
    ),
    attn_implementation: Annotated[str, typer.Option(help="qwen3_vl_exact, sdpa, eager ...")] = "qwen3_vl_exact",
    cache: Annotated[str | None, typer.Option(help="dynamic, paged, int8, int4 or int2. Default: what fits.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda; on a cpu the heap's reserve is counted too.")] = "cpu",
    exact: Annotated[bool, typer.Option("--exact", help="Pick nothing that changes results.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the table.")] = False,
    traceback: Annotated[bool, typer.Option("--traceback", hidden=True)] = False,
) -> None:
    """Say what pictures, videos and text will take in memory, and which settings fit a budget."""
    from .cli import _import_answering, _one_line_errors, _quieten_libraries

    notes = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    with _one_line_errors(notes, traceback):
        _quieten_libraries()
        answering = _import_answering()
        from ..optim.memory.memory_plan import plan_memory
        from ..optim.memory.memory_request import MemoryRequest
        from ..optim.memory.memory_units import parse_bytes, parse_images, parse_video

        limit = None if budget is None else parse_bytes(budget)
        request = MemoryRequest(
            images=[size for text in images or () for size in parse_images(text)],
            videos=[parse_video(text) for text in video or ()],
            text_tokens=text_tokens,
            new_tokens=new_tokens,
            batch_size=batch,
            num_beams=beams,
        )
        name = answering.find_model(model)
        config, rules = load_sizes(name)
        try:
            result = plan_memory(
                config,
                request,
                limit,
                rules=rules,
                attention=attn_implementation,
                cache=cache,
                lossy=not exact,
                device=device,
            )
        except MemoryError as error:
            raise answering.AnsweringError(str(error)) from None
    if as_json:
        typer.echo(json.dumps({"model": name, **result.to_dict()}))
    else:
        print_plan(result, name, Console(highlight=False, markup=False, soft_wrap=True))


def load_sizes(name: str) -> tuple[Any, Any]:
    """The configuration of a model and the size rules of its processors, without its weights.

    A folder is read; a released model is known by name; others are asked of the Hub.

    Raises:
        AnsweringError: if there is no such model, or it is of another kind.
    """
    from transformers import AutoConfig

    from ..configuration.official_sizes import official_config
    from ..optim.memory.memory_request import VisualRules
    from .answering import AnsweringError, first_line, only_in_cache

    config = None if Path(name).is_dir() else official_config(name)
    if config is not None:
        return config, VisualRules.of_config(config)
    local = {} if Path(name).is_dir() else {"local_files_only": only_in_cache(name)}
    try:
        config = AutoConfig.from_pretrained(name, **local)
    except (OSError, ValueError, KeyError) as error:
        raise AnsweringError(f"cannot read the configuration of {name}: {first_line(error)}") from error
    if not hasattr(config, "vision_config") or not hasattr(config.vision_config, "deepstack_visual_indexes"):
        raise AnsweringError(f"{name} is a {config.model_type} model; plan takes Qwen3-VL models.")
    return config, _processor_rules(name, config, local)


def _processor_rules(name: str, config: Any, local: dict[str, Any]) -> Any:
    """The rules of a model's own processors, or the released ones where it has none."""
    from transformers import AutoImageProcessor, AutoVideoProcessor

    from ..optim.memory.memory_request import VisualRules

    try:
        processors = [found.from_pretrained(name, **local) for found in (AutoImageProcessor, AutoVideoProcessor)]
    except (OSError, ValueError):
        return VisualRules.of_config(config)
    return VisualRules.of_processors(*processors)


def print_plan(plan: Any, name: str, console: Console) -> None:
    """The plan as a table, with the lines that apply it."""
    from ..optim.memory.memory_request import MODALITIES
    from ..optim.memory.memory_units import format_bytes

    sizes = plan.sizes
    table = Table(title=name, title_justify="left")
    for heading in ("", *MODALITIES, "all"):
        table.add_column(heading, justify="right" if heading else "left")

    def add(label: str, values: dict[str, int], form: Any = format_bytes) -> None:
        cells = [form(values[key]) if values.get(key) else "-" for key in MODALITIES]
        table.add_row(label, *cells, form(sum(values.values())))

    add("tokens of the prompt", {key: getattr(sizes, key) for key in MODALITIES}, str)
    add(f"KV cache, {plan.cache}", plan.kv)
    add("pixels", plan.inputs)
    add("features of the tower", plan.features)
    weights = [format_bytes(plan.weights[part]) for part in ("text", "vision")]
    table.add_row("weights: decoder, tower", *weights, "-", format_bytes(plan.weights_total))
    console.print(table)
    phases = Table()
    for heading in ("peak of", "activations", "heap's reserve", "all"):
        phases.add_column(heading, justify="left" if heading == "peak of" else "right")
    for phase, peak in plan.peaks.items():
        phases.add_row(phase, *(format_bytes(size) for size in (plan.activations[phase], plan.slack[phase], peak)))
    console.print(phases)
    limit = "no budget given" if plan.budget is None else f"budget {format_bytes(plan.budget)}"
    console.print(f"peak {format_bytes(plan.peak)}, {limit}; {sizes.new} new tokens, {plan.request.rows} rows")
    parts = [
        f"dtype {plan.dtype}",
        f"attention {plan.attention}",
        f"cache {plan.cache}",
        f"prefill {_steps(plan.prefill_chunk, 'tokens')}",
        f"vision {_steps(plan.max_patches, 'patches')}",
    ]
    console.print("settings: " + ", ".join(parts))
    console.print("to apply:")
    for line in plan.lines(name):
        console.print(f"    {line}")


def _steps(size: int | None, what: str) -> str:
    return "at once" if size is None else f"in steps of {size} {what}"
