"""Measures a model on the fixed held-out questions: `scripts/evaluate --model checkpoints/tiny`.

Goes the way a user goes: pictures and chat through the processor of the folder, answers by greedy `generate()`.
`evaluate_model` is what a later technique calls to see what it costs in quality.
"""

import argparse
import json
import math
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image

from .data_evaluation import EVALUATION_SEED, TASKS, evaluation_set
from .data_material import REPOSITORY, MaterialMissingError, load_material
from .data_tasks import Sample


PICTURES_PER_BATCH = 64
LONGEST_ANSWER = 48


def load_checkpoint(folder: str, attention: str | None = None, dtype: str = "float32") -> tuple[Any, Any]:
    """The model and the processor of `folder` through the Auto classes, with our package registered."""
    import qwen3_vl  # noqa: F401

    options = {} if attention is None else {"attn_implementation": attention}
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=getattr(torch, dtype), **options)
    return model.eval(), transformers.AutoProcessor.from_pretrained(folder)


def chat_messages(sample: Sample) -> list[dict]:
    """The first question of a sample as chat messages; several pictures are numbered in the text."""
    content: list[dict] = []
    for number, picture in enumerate(sample.pictures, start=1):
        if len(sample.pictures) > 1:
            content.append({"type": "text", "text": f"Picture {number}: "})
        content.append({"type": "image", "image": Image.fromarray(picture)})
    content.append({"type": "text", "text": sample.turns[0][0]})
    return [{"role": "user", "content": content}]


def make_inputs(processor: Any, samples: list[Sample]) -> dict:
    """Left-padded model inputs for a batch of samples."""
    messages = [chat_messages(sample) for sample in samples]
    texts = [processor.apply_chat_template(one, tokenize=False, add_generation_prompt=True) for one in messages]
    pictures = [Image.fromarray(picture) for sample in samples for picture in sample.pictures]
    return processor(text=texts, images=pictures, padding=True, padding_side="left", return_tensors="pt")


def answer_samples(
    model: Any, processor: Any, samples: list[Sample], generate_kwargs: dict | None = None
) -> list[str]:
    """Greedy answers in the order of `samples`; equally long questions share a batch."""
    order = sorted(range(len(samples)), key=lambda i: sum(picture.size for picture in samples[i].pictures))
    answers = [""] * len(samples)
    while order:
        batch, pictures = [], 0
        while order and (not batch or pictures + len(samples[order[0]].pictures) <= PICTURES_PER_BATCH):
            batch.append(order.pop(0))
            pictures += len(samples[batch[-1]].pictures)
        inputs = make_inputs(processor, [samples[i] for i in batch]).to(model.device)
        options = {"max_new_tokens": LONGEST_ANSWER, "do_sample": False, **(generate_kwargs or {})}
        with torch.inference_mode():
            output = model.generate(**inputs, **options)
        tokenizer = getattr(processor, "tokenizer", processor)
        texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for i, text in zip(batch, texts, strict=True):
            answers[i] = text.strip()
    return answers


def edit_distance(first: str, second: str) -> int:
    """Fewest insertions, deletions and replacements that turn one string into the other."""
    row = list(range(len(second) + 1))
    for i, left in enumerate(first, start=1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(second, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
    return row[-1]


def wilson_interval(right: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share, which stays within 0 and 1 also for few questions."""
    if count == 0:
        return 0.0, 1.0
    share = right / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    reach = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, centre - reach), min(1.0, centre + reach)


def score_row(title: str, right: int, count: int) -> dict:
    low, high = wilson_interval(right, count)
    return {"title": title, "n": count, "right": right, "accuracy": right / max(count, 1), "low": low, "high": high}


def evaluate_model(
    model: Any, processor: Any, tasks: list[str] | None = None, limit: int | None = None,
    generate_kwargs: dict | None = None, keep_answers: bool = False,
) -> dict:  # fmt: skip
    """Accuracy by task on the fixed held-out questions.

    Args:
        model: anything with `generate()`; it is used as it is (dtype, device, attention, techniques applied).
        processor: the processor of the checkpoint.
        tasks: keys of `TASKS`; all by default. Without the fetched material only those that need none run.
        limit: at most this many questions a task, always the first ones.
        generate_kwargs: passed to `generate()`, for instance a cache.
        keep_answers: also return each question, expected and given answer.
    Returns:
        `{"rows": {task: {"n", "right", "accuracy", "low", "high", "title"}}, "seconds", "skipped", ...}`. The row
        "scenes" pools colour, shape, count, position and which-of-N; "long" those with larger pictures;
        "text_characters" counts characters.
    Raises:
        ValueError: for a task that does not exist.
    """
    if unknown := set(tasks or ()) - set(TASKS):
        raise ValueError(f"unknown tasks {sorted(unknown)}; known: {', '.join(TASKS)}")
    try:
        material = load_material()
    except MaterialMissingError:
        material = None
    rows, answers, skipped = {}, {}, []
    started = time.monotonic()
    for name in tasks or TASKS:
        task = TASKS[name]
        if task.needs_material and material is None:
            skipped.append(name)
            continue
        samples = evaluation_set(name, material, limit)
        given = answer_samples(model, processor, samples, generate_kwargs)
        expected = [sample.turns[0][1] for sample in samples]
        rows[name] = score_row(task.title, sum(g == e for g, e in zip(given, expected, strict=True)), len(samples))
        if name == "text":
            length = sum(len(e) for e in expected)
            wrong = sum(min(edit_distance(g, e), len(e)) for g, e in zip(given, expected, strict=True))
            rows["text_characters"] = score_row("text, by character", length - wrong, length)
        if keep_answers:
            questions = [sample.turns[0][0] for sample in samples]
            answers[name] = [list(row) for row in zip(questions, expected, given, strict=True)]
    pools = {
        "scenes": ("all scenes", [name for name, task in TASKS.items() if task.in_scenes]),
        "long": ("all with larger pictures", [name for name, task in TASKS.items() if task.is_long]),
    }
    for name, (title, members) in pools.items():
        if pooled := [rows[member] for member in members if member in rows]:
            rows[name] = score_row(title, sum(r["right"] for r in pooled), sum(r["n"] for r in pooled))
    result = {
        "rows": rows,
        "seconds": round(time.monotonic() - started, 1),
        "seed": EVALUATION_SEED,
        "skipped": skipped,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    return {**result, "answers": answers} if keep_answers else result


def print_table(result: dict, title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for heading in ("task", "questions", "right", "95 % interval"):
        table.add_column(heading, justify="left" if heading == "task" else "right")
    for row in result["rows"].values():
        interval = f"{100 * row['low']:.1f} to {100 * row['high']:.1f}"
        table.add_row(row["title"], str(row["n"]), f"{100 * row['accuracy']:.1f} %", interval)
    console = Console()
    console.print(table)
    if result["skipped"]:
        console.print(f"left out, material not fetched: {', '.join(result['skipped'])}")
    console.print(f"{result['seconds']} s")


def draw_plot(result: dict, path: Path) -> None:
    """A bar a row, with its 95 % interval."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = list(result["rows"].values())[::-1]
    shares = [100 * row["accuracy"] for row in rows]
    errors = [
        [max(0.0, 100 * (row["accuracy"] - row["low"])) for row in rows],
        [max(0.0, 100 * (row["high"] - row["accuracy"])) for row in rows],
    ]
    figure, axes = pyplot.subplots(figsize=(8, 0.36 * len(rows) + 1))
    axes.barh([row["title"] for row in rows], shares, xerr=errors, color="#4c72b0", ecolor="#333333", height=0.65)
    axes.set_xlim(0, 100)
    axes.set_xlabel("right answers, % (95 % interval)")
    axes.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="scripts/evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(REPOSITORY / "checkpoints" / "tiny"), help="checkpoint folder")
    parser.add_argument("--tasks", nargs="*", choices=list(TASKS), help="rows to measure (default: all)")
    parser.add_argument("--limit", type=int, help="at most this many questions a row")
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--plot", type=Path, help="write the bar plot here")
    parser.add_argument("--answers", action="store_true", help="keep all answers in the JSON")
    parser.add_argument("--attn-implementation", help="attention by name, as in from_pretrained")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the weights")
    parser.add_argument("--techniques", action="store_true", help="what each technique costs, into docs/bench")
    parser.add_argument("--only", metavar="PATTERN", help="with --techniques: the rows of these names, as '*visual*'")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if arguments.techniques:
        from .evaluate_techniques import report_techniques

        report_techniques(arguments.model, arguments.limit, arguments.only)
        return
    model, processor = load_checkpoint(arguments.model, arguments.attn_implementation, arguments.dtype)
    result = evaluate_model(model, processor, arguments.tasks, arguments.limit, keep_answers=arguments.answers)
    result |= {
        "model": Path(arguments.model).name,
        "dtype": arguments.dtype,
        "attention": model.config._attn_implementation,
    }
    print_table(result, f"{arguments.model} · greedy · {arguments.dtype}")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    if arguments.plot:
        draw_plot(result, arguments.plot)
    sys.exit(0)


if __name__ == "__main__":
    main()
