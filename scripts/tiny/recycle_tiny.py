"""Pairs of decoder layers share weights, then 200 steps of distillation: `python scripts/tiny/recycle_tiny.py`.

The full tiny checkpoint teaches: hidden states of every layer and the answers' distributions. All weights of the
decoder's layers are trained, on the training's own data. Writes the measured bytes and the evaluation before and after
to `docs/bench/recycling_tiny.json`, and the checkpoint (expanded, and with shared tensors) to `--folder`.
"""

import argparse
import copy
import itertools
import sys
from pathlib import Path


if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    __package__ = "tiny"

import torch
from torch import nn

from qwen3_vl import CrossLayerParameterRecycling

from .data_material import REPOSITORY
from .distill_tiny import (
    CHECKPOINT,
    TrainingLog,
    add_arguments,
    compare_quality,
    decoder_states,
    distillation_loss,
    load_tiny,
    rate_at,
    save_checkpoint,
    spoken_batches,
    teacher_targets,
    write_result,
)
from .optim_tiny import MasterOptimizer


FOLDER = REPOSITORY / ".cache" / "tiny" / "recycled"
STATE_WEIGHT = 5.0
LOG_STEPS = 20
# The first so many steps of the training also show what the layers see.
CALIBRATION_STEPS = 6
SETTINGS = ("steps", "draws", "rank", "groups", "shared", "muon_lr", "adam_lr")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--draws", type=int, default=1, help="so many times the data a step (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters (default: %(default)s)")
    parser.add_argument("--groups", help="layers that share, as 0,1;2,3;4,5 (default: neighbouring pairs)")
    parser.add_argument("--shared", default="fitted", help="what the shared weight begins as (default: %(default)s)")
    parser.add_argument("--muon-lr", type=float, default=0.003)
    parser.add_argument("--adam-lr", type=float, default=5e-4)
    add_arguments(parser, FOLDER)
    return parser.parse_args()


def trained_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Name and parameter of the decoder's layers and last norm, shared ones once; all others are frozen."""
    model.requires_grad_(False)
    text = model.model.language_model
    chosen = [(name, p) for name, p in text.named_parameters() if name.startswith(("layers.", "norm."))]
    for _, parameter in chosen:
        parameter.requires_grad_(True)
    return chosen


def train(teacher: nn.Module, student: nn.Module, arguments: argparse.Namespace) -> list[dict]:
    """Distils in place; the losses every `LOG_STEPS` steps."""
    named = trained_parameters(student)
    flat = torch.zeros(2, sum(p.numel() for _, p in named), dtype=torch.bfloat16)
    offset = 0
    for _, parameter in named:
        parameter.grad = flat[0, offset : offset + parameter.numel()].view_as(parameter)
        offset += parameter.numel()
    optimizer = MasterOptimizer(named, arguments.muon_lr, arguments.adam_lr, weight_decay=0.0)
    log = TrainingLog(arguments.steps, LOG_STEPS)
    for step, batches in enumerate(spoken_batches(arguments.steps, arguments.draws)):
        for batch in batches:
            features, target_states, target_logits = teacher_targets(teacher, batch)
            states, logits = decoder_states(student, batch, features)
            loss = distillation_loss(states, logits, target_states, target_logits, STATE_WEIGHT)
            (loss / len(batches)).backward()
            agreement = (logits.argmax(-1) == target_logits.argmax(-1)).float().mean()
            log.add(loss=loss.item(), agreement=agreement.item())
        optimizer.step(flat, rate_at(step, arguments.steps))
        log.end_step(step)
    return log.rows


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    groups = None
    if arguments.groups:
        groups = [[int(layer) for layer in group.split(",")] for group in arguments.groups.split(";")]
    teacher = load_tiny()
    student = copy.deepcopy(teacher)
    recycling = CrossLayerParameterRecycling(groups=groups, rank=arguments.rank, shared=arguments.shared)
    with recycling.collecting(student):
        for batches in itertools.islice(spoken_batches(arguments.steps), CALIBRATION_STEPS):
            for batch in batches:
                teacher_targets(student, batch)
    recycling.apply(student)
    print(recycling.describe(), flush=True)
    recycling.release()
    log = train(teacher, student, arguments)
    sizes = {
        storage: save_checkpoint(student, arguments.folder / storage, storage=storage)
        for storage in ("expanded", "shared")
    }
    report = recycling.report
    result = {
        "settings": {name: getattr(arguments, name) for name in SETTINGS},
        "decoder_bytes": {"plain": report.bytes_before, "recycled": report.bytes_after},
        "saved_share": report.saved_share,
        "error_before_training": report.errors,
        "file_bytes": {"plain": (CHECKPOINT / "model.safetensors").stat().st_size, **sizes},
        "log": log,
        "limit": arguments.limit,
    }
    result |= compare_quality(arguments.folder / "shared", arguments.limit)
    write_result("recycling_tiny", result)


if __name__ == "__main__":
    main()
