"""What `recycle_tiny` and `route_tiny` share: batches, the full model's states as targets, and the evaluation."""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers import AutoProcessor

from .data_batches import ConversationEncoder, MicroBatch
from .data_material import REPOSITORY, Material, load_material
from .data_mix import (
    LONGEST_TEXT,
    MOST_PICTURES,
    ROWS,
    SPOKEN_MADE_UP,
    draw_digits,
    draw_emoji_batch,
    draw_large,
    draw_scenes,
    draw_several,
    draw_side,
    draw_text_batch,
    rows_of,
)
from .data_tasks import Sample
from .evaluate import evaluate_model, load_checkpoint
from .model_tiny import MODEL_CLASS, batch_features, decoder_start, rms_norm, text_layer, tiny_config
from .tokenizer_tiny import build_tokenizer


CHECKPOINT = REPOSITORY / "checkpoints" / "tiny"
BENCH = REPOSITORY / "docs" / "bench"
# Like the training's seeds the first number tells streams apart; the evaluation has another one.
SEED = 20261124
POINTS = 100
EMOJI_ROWS = 64
# Rows of the evaluation that are no questions of their own.
POOLS = ("scenes", "long", "text_characters")


def load_tiny(dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """The tiny checkpoint as the class that is trained, without auxiliary heads."""
    model = MODEL_CLASS(tiny_config(build_tokenizer(load_material().names)))
    model.load_state_dict(load_file(CHECKPOINT / "model.safetensors"), strict=False)
    model.tie_weights()
    return model.to(dtype)


def spoken_batches(steps: int, draws: int = 1) -> Iterator[list[MicroBatch]]:
    """The micro-batches of `steps` steps, from the training's generators at full difficulty.

    What takes the decoder longest to learn comes in every step, `draws` times: text, scenes, and many emoji, whose
    names are most of what it knows by heart; several pictures in every other step, digits and large canvases in turns.
    """
    material = load_material()
    encoder = ConversationEncoder(build_tokenizer(material.names))
    for step in range(steps):
        rngs = [np.random.default_rng([SEED, step, draw]) for draw in range(draws)]
        groups = [samples for draw, rng in enumerate(rngs) for samples in draw_spoken(rng, material, step + draw)]
        yield [encoder.collate(samples) for samples in groups]


def draw_spoken(rng: np.random.Generator, material: Material, step: int) -> list[list[Sample]]:
    """Groups of samples of one picture size each."""
    side, emoji_side = draw_side(rng, 1.0, (64, 96, 128, 192, 256)), draw_side(rng, 1.0, (64, 96, 128))
    groups = [
        draw_text_batch(rng, material, ROWS["text"], LONGEST_TEXT, made_up=SPOKEN_MADE_UP),
        draw_scenes(rng, rows_of(ROWS["scene"], side), side, most=6),
        draw_emoji_batch(rng, material, rows_of(EMOJI_ROWS, emoji_side), emoji_side),
    ]
    if step % 2:
        groups.append(draw_several(rng, material, MOST_PICTURES, 1.0))
    if step % 4 in (0, 1):
        groups.append(draw_large(rng, material, LONGEST_TEXT))
    else:
        groups.append(draw_digits(rng, material, ROWS["digit"] // 3, draw_side(rng, 1.0, (64, 96))))
    return groups


def decoder_states(
    model: nn.Module, batch: MicroBatch, features: list[torch.Tensor], layer_of=text_layer
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The hidden states (tokens, width) behind every layer but the last, and the logits at `batch.predict_index`.

    `layer_of` runs one layer; it takes what `text_layer` takes.
    """
    text = model.model.language_model
    places, predict = torch.from_numpy(batch.visual_index), torch.from_numpy(batch.predict_index)
    hidden, tables = decoder_start(model, batch, features)
    states = []
    for number, layer in enumerate(text.layers):
        last = number + 1 == len(text.layers)
        hidden = layer_of(layer, hidden, *tables, predict if last else None)
        if number + 1 < len(features):
            hidden = hidden.index_add(0, places, features[number + 1])
        states.append(hidden)
    return states[:-1], F.linear(rms_norm(text.norm, states[-1]), text.embed_tokens.weight)


@torch.no_grad()
def teacher_targets(teacher: nn.Module, batch: MicroBatch):
    """Features of the tower, hidden states by layer and logits of the full model."""
    features = batch_features(teacher, batch)[0]
    return features, *decoder_states(teacher, batch, features)


def distillation_loss(states, logits, target_states, target_logits, state_weight: float = 1.0) -> torch.Tensor:
    """Kullback-Leibler divergence of the answers' tokens, and the relative squared error of the hidden states."""
    loss = F.kl_div(
        logits.float().log_softmax(-1), target_logits.float().log_softmax(-1), log_target=True, reduction="batchmean"
    )
    errors = [
        (ours - theirs).float().square().sum() / theirs.float().square().sum()
        for ours, theirs in zip(states, target_states, strict=True)
    ]
    return loss + state_weight * torch.stack(errors).mean() if state_weight else loss


def rate_at(step: int, steps: int, warmup: int = 10) -> float:
    """Warm-up, then linear to 2 %."""
    return min(1.0, (step + 1) / warmup) * max(0.02, 1 - step / steps)


def measure_quality(folder: str | Path, limit: int | None) -> dict:
    """Rows of the evaluation, through the Auto classes and in float32 like the published ones."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model, processor = load_checkpoint(str(folder))
    rows = evaluate_model(model, processor, limit=limit)["rows"]
    return {name: {key: row[key] for key in ("n", "right", "accuracy")} for name, row in rows.items()}


def all_questions(rows: dict) -> float:
    """Right answers over all rows of questions, in points."""
    asked = [row for name, row in rows.items() if name not in POOLS]
    return POINTS * sum(row["right"] for row in asked) / sum(row["n"] for row in asked)


def compare_quality(folder: str | Path, limit: int | None) -> dict:
    """The evaluation of `folder` beside the plain checkpoint's, on the same questions."""
    plain = measure_quality(CHECKPOINT, limit)
    changed = measure_quality(folder, limit)
    points = {"plain": all_questions(plain), "changed": all_questions(changed)}
    for name, row in plain.items():
        print(f"{name}: {POINTS * row['accuracy']:.1f} -> {POINTS * changed[name]['accuracy']:.1f}")
    print(f"all questions: {points['plain']:.2f} -> {points['changed']:.2f}", flush=True)
    return {"all_questions": points, "plain": plain, "changed": changed}


def write_result(name: str, result: dict) -> None:
    path = BENCH / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {path}")


def add_arguments(parser: argparse.ArgumentParser, folder: Path) -> None:
    parser.add_argument("--folder", type=Path, default=folder, help="for the checkpoints (default: %(default)s)")
    parser.add_argument("--limit", type=int, help="at most this many questions a row of the evaluation")
    parser.add_argument("--threads", type=int, default=1)


def save_checkpoint(model: nn.Module, folder: Path, **options) -> int:
    """Writes the model, with options of its `save_pretrained`, and the processor; the bytes of the weights."""
    model.save_pretrained(folder, **options)
    AutoProcessor.from_pretrained(CHECKPOINT).save_pretrained(folder)
    return (folder / "model.safetensors").stat().st_size


class TrainingLog:
    """Means of what is measured, a row every few steps, printed and kept in `rows`.

    Args:
        steps: of the whole training.
        every: so many steps a row.
    """

    def __init__(self, steps: int, every: int):
        self.steps, self.every = steps, every
        self.started = time.monotonic()
        self.figures: dict[str, list[float]] = {}
        self.rows: list[dict] = []

    def add(self, **figures: float) -> None:
        for name, value in figures.items():
            self.figures.setdefault(name, []).append(value)

    def end_step(self, step: int) -> None:
        if (step + 1) % self.every and step + 1 < self.steps:
            return
        row = {"step": step + 1} | {name: sum(values) / len(values) for name, values in self.figures.items()}
        row["seconds"] = round(time.monotonic() - self.started, 1)
        print(", ".join(f"{name} {value:.4g}" for name, value in row.items()), flush=True)
        self.rows.append(row)
        self.figures.clear()
