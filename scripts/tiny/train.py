"""Trains the tiny checkpoint on a CPU: `scripts/train_tiny --end 15:00`.

One process draws step after step from its own seed, two compute. State goes to `.cache/tiny/run` every few minutes,
and on SIGTERM, as safetensors; starting again continues. The rate stays flat until `--decay-minutes` before the end,
so a run may be given more time while it is still flat.
"""

import argparse
import ctypes
import json
import multiprocessing
import os
import signal
import time
from collections import defaultdict
from datetime import datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from .auxiliary_tiny import AuxiliaryHeads
from .data_batches import ConversationEncoder, MicroBatch
from .data_material import REPOSITORY, load_material
from .data_mix import LONGEST_TEXT, MOST_PICTURES, Difficulty, draw_step, draw_vision_step
from .init_tiny import initialize
from .model_tiny import MODEL_CLASS, fast_loss, tiny_config
from .optim_tiny import MasterOptimizer
from .tokenizer_tiny import build_tokenizer


RUN_FOLDER = REPOSITORY / ".cache" / "tiny" / "run"
TRAIN_STREAM = 0
PR_SET_PDEATHSIG = 1
LOG_STEPS = 20
# The decoder gets longer strings when it has this share of tokens right, and more pictures with this share of answers.
LENGTHEN_TEXT_AT = 0.4
MORE_PICTURES_AT = 0.55
PICTURES_MORE = 2


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=RUN_FOLDER, help="state and log (default: %(default)s)")
    parser.add_argument("--end", help="UTC time HH:MM at which the run ends; the alternative is --minutes")
    parser.add_argument("--minutes", type=float, default=120.0, help="length of the run (default: %(default)s)")
    parser.add_argument("--decay-minutes", type=float, default=35.0, help="final minutes of falling rate")
    parser.add_argument("--warmup-steps", type=int, default=30, help="first steps of rising rate, also when going on")
    parser.add_argument(
        "--curriculum-steps", type=int, default=200, help="steps of the second stage until full difficulty"
    )
    parser.add_argument("--vision-steps", type=int, default=560, help="steps of the first stage, mostly vision alone")
    parser.add_argument("--start-from", type=Path, help="checkpoint folder whose weights begin a new second stage")
    parser.add_argument("--muon-lr", type=float, default=0.004)
    parser.add_argument("--adam-lr", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=20261123)
    parser.add_argument("--save-minutes", type=float, default=4.0)
    return parser.parse_args()


def die_with_parent() -> None:
    """Lets Linux end this process when the one that started it ends, however that happens."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def draw_batches(work, reached, arguments: argparse.Namespace, first_step: int) -> None:
    """Body of the drawing process: puts (step, micro-batches of the step, micro-batch) in order, forever.

    `reached` holds the longest text and the most pictures of the curriculum.
    """
    die_with_parent()
    material = load_material()
    encoder = ConversationEncoder(build_tokenizer(material.names))
    step = first_step
    while True:
        rng = np.random.default_rng([arguments.seed, TRAIN_STREAM, step])
        if step < arguments.vision_steps:
            groups = draw_vision_step(rng, material, step / arguments.vision_steps)
        else:
            progress = (step - arguments.vision_steps) / arguments.curriculum_steps
            groups = draw_step(rng, material, Difficulty(progress, *reached))
        batches = [encoder.collate(samples, vision_only) for samples, vision_only in groups]
        # The largest first, so that no process waits long for the other at the end of a step.
        for batch in sorted(batches, key=lambda batch: -batch.cost):
            work.put((step, len(batches), batch))
        step += 1


def compute(model: torch.nn.Module, batch: MicroBatch) -> tuple[str, int, dict[str, float]]:
    """Adds the gradients of one micro-batch; returns its task, its rows and what `fast_loss` logs."""
    loss, log = fast_loss(model, model.auxiliary, batch)
    loss.backward()
    return batch.task, batch.rows, log


def share_gradients(model: torch.nn.Module, flat: torch.Tensor) -> None:
    """Makes every `.grad` a view of one flat shared tensor, into which backward accumulates in place."""
    offset = 0
    for parameter in model.parameters():
        parameter.grad = flat[offset : offset + parameter.numel()].view_as(parameter)
        offset += parameter.numel()


def help_compute(model: torch.nn.Module, flat: torch.Tensor, work, results, version) -> None:
    """Body of the second computing process: takes whatever micro-batch comes next, once the weights are that new."""
    die_with_parent()
    torch.set_num_threads(1)
    share_gradients(model, flat)
    while True:
        step, _, batch = work.get()
        while version.value < step:
            time.sleep(0.002)
        results.put(compute(model, batch))


def end_time(arguments: argparse.Namespace) -> datetime:
    now = datetime.now(timezone.utc)
    if arguments.end is None:
        return now + timedelta(minutes=arguments.minutes)
    hour, minute = (int(part) for part in arguments.end.split(":"))
    end = now.replace(hour=hour, minute=minute, second=0, microsecond=0)
    return end if end > now else end + timedelta(days=1)


def rate_scale(step: int, seconds_left: float, decay_seconds: float, warmup_steps: int) -> float:
    """Warm-up by the steps of this start, then flat, then linear to 2 % over the last `decay_seconds`."""
    return min(1.0, (step + 1) / max(warmup_steps, 1)) * max(0.02, min(1.0, seconds_left / decay_seconds))


def save_state(folder: Path, optimizer: MasterOptimizer, progress: dict) -> None:
    """Writes atomically, so that a kill in the middle leaves the previous state."""
    save_file(optimizer.state_tensors(), folder / "state.tmp", metadata={"progress": json.dumps(progress)})
    os.replace(folder / "state.tmp", folder / "state.safetensors")


def load_state(folder: Path, optimizer: MasterOptimizer) -> dict | None:
    """Restores what `save_state` wrote and returns its progress, or `None` when there is nothing."""
    path = folder / "state.safetensors"
    if not path.exists():
        return None
    with safe_open(path, "pt") as opened:
        progress = json.loads(opened.metadata()["progress"])
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        optimizer.load_state_tensors(tensors, progress["step"])
    return progress


def build_model(seed: int):
    """The untrained model in bfloat16, its initial values drawn from `seed`."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(load_material().names)
    model = MODEL_CLASS(tiny_config(tokenizer))
    model.auxiliary = AuxiliaryHeads(
        model.config.vision_config.hidden_size, model.config.text_config.hidden_size, len(load_material().names) + 10
    )
    initialize(model, load_material())
    return model.to(torch.bfloat16)


def summarize(sums: dict) -> dict[str, dict[str, float]]:
    """Sums since the last log line as means by task: `loss` and `correct` a token, `whole` an answer, `auxiliary`."""
    spoken = {task: numbers for task, numbers in sums.items() if numbers["tokens"]}
    labelled = {task: numbers for task, numbers in sums.items() if numbers["labels"]}
    noted = {task: numbers for task, numbers in sums.items() if numbers["notes"]}
    return {
        "notes": {task: numbers["noted"] / numbers["notes"] for task, numbers in noted.items()},
        "gazes": {task: numbers["gazed"] / numbers["gazes"] for task, numbers in noted.items()},
        "loss": {task: numbers["loss"] / numbers["tokens"] for task, numbers in spoken.items()},
        "correct": {task: numbers["correct"] / numbers["tokens"] for task, numbers in spoken.items()},
        "whole": {task: numbers["whole"] / numbers["answers"] for task, numbers in spoken.items()},
        "auxiliary": {task: numbers["auxiliary"] / numbers["labels"] for task, numbers in labelled.items()},
    }


def in_words(row: dict) -> str:
    parts = [f"{task} {row['loss'][task]:.3f}/{row['whole'][task]:.3f}" for task in sorted(row["loss"])]
    for kind in ("auxiliary", "notes", "gazes"):
        parts += ["|", *(f"{task} {value:.3f}" for task, value in sorted(row[kind].items()))]
    return " ".join(parts)


def raise_difficulty(reached, row: dict) -> None:
    """Moves the curriculum one step on where the answers since the last log line were good enough."""
    if row["correct"].get("text", 0) > LENGTHEN_TEXT_AT:
        reached[0] = min(reached[0] + 1, LONGEST_TEXT)
    if row["whole"].get("which", 0) > MORE_PICTURES_AT:
        reached[1] = min(reached[1] + PICTURES_MORE, MOST_PICTURES)


def main() -> None:
    arguments = parse_arguments()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    # One thread each: a busy neighbour then slows one process and not every kernel of both, where a pool of threads
    # would wait for its slowest at the end of each. Nor does such a pool survive a fork.
    torch.set_num_threads(1)
    model = build_model(arguments.seed).share_memory()
    total = sum(parameter.numel() for parameter in model.parameters())
    gradients = torch.zeros(2, total, dtype=torch.bfloat16).share_memory_()
    easy = Difficulty()
    fresh = {"step": 0, "samples": 0, "tokens": 0, "seconds": 0.0}
    fresh |= {"longest_text": easy.longest_text, "most_pictures": easy.most_pictures}
    if arguments.start_from is not None:
        # The heads were not exported, so they learn anew, beside a decoder that can already answer.
        model.load_state_dict(load_file(arguments.start_from / "model.safetensors"), strict=False)
        fresh |= {"step": arguments.vision_steps + arguments.curriculum_steps, "longest_text": LONGEST_TEXT}
        fresh["most_pictures"] = MOST_PICTURES
    optimizer = MasterOptimizer(model.named_parameters(), arguments.muon_lr, arguments.adam_lr)
    progress = fresh | (load_state(arguments.folder, optimizer) or {})
    end = end_time(arguments)
    print(f"step {progress['step']}, ends {end:%H:%M} UTC, {total / 1e6:.2f} M parameters", flush=True)

    context = multiprocessing.get_context("fork")
    work, results, version = context.Queue(maxsize=30), context.SimpleQueue(), context.Value("q", -1)
    reached = context.Array("q", [progress["longest_text"], progress["most_pictures"]])
    helpers = [
        context.Process(
            target=draw_batches,
            args=(work, reached, arguments, progress["step"]),
            daemon=True,
        ),
        context.Process(target=help_compute, args=(model, gradients[1], work, results, version), daemon=True),
    ]
    for helper in helpers:
        helper.start()
    share_gradients(model, gradients[0])
    log = (arguments.folder / "log.jsonl").open("a")
    started = last_save = time.monotonic()
    seconds_before = progress["seconds"]
    sums: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    waited = 0.0
    version.value = step = first_step = progress["step"]
    held = work.get()
    stopped = []
    signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
    while (left := (end - datetime.now(timezone.utc)).total_seconds()) > 0 and not stopped:
        outcomes, expected = [], held[1]
        while held[0] == step and len(outcomes) < expected:
            outcomes.append(compute(model, held[2]))
            while not results.empty():
                outcomes.append(results.get())
            asked = time.monotonic()
            held = work.get()
            waited += time.monotonic() - asked
        while len(outcomes) < expected:
            outcomes.append(results.get())
        for task, rows, numbers in outcomes:
            progress["samples"] += rows
            progress["tokens"] += numbers.get("tokens", 0)
            for name, value in numbers.items():
                sums[task][name] += value
        scale = rate_scale(step - first_step, left, 60 * arguments.decay_minutes, arguments.warmup_steps)
        norm = optimizer.step(gradients, scale)
        step += 1
        version.value = step
        progress["step"] = step
        progress["seconds"] = seconds_before + time.monotonic() - started
        if step % LOG_STEPS == 0:
            row = dict(progress, rate=scale, norm=norm, waited=waited)
            row |= summarize(sums)
            raise_difficulty(reached, row)
            progress["longest_text"], progress["most_pictures"] = reached
            log.write(json.dumps(row) + "\n")
            log.flush()
            minutes = progress["seconds"] / 60
            print(
                f"{minutes:6.1f} min step {step} rate {scale:.2f} reached {list(reached)} {in_words(row)}",
                flush=True,
            )
            sums.clear()
        if time.monotonic() - last_save > 60 * arguments.save_minutes:
            save_state(arguments.folder, optimizer, progress)
            last_save = time.monotonic()
    save_state(arguments.folder, optimizer, progress)
    for helper in helpers:
        helper.terminate()
    print("done", flush=True)


if __name__ == "__main__":
    main()
