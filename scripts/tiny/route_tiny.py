"""Trains routers for half of the decoder's blocks, all else frozen: `python scripts/tiny/route_tiny.py`.

The full tiny checkpoint teaches the routed one the answers' distributions. In training a block runs whole and what it
made of skipped tokens is dropped, which gives the same numbers on packed rows. Writes the evaluation of untrained and
trained routers to `docs/bench/routing_tiny.json`, and the checkpoint with its routers to `--folder`.
"""

import argparse
import sys
from pathlib import Path


if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    __package__ = "tiny"

import torch
import torch.nn.functional as F
from torch import nn

from qwen3_vl import LearnedActivationRouting
from qwen3_vl.optim.weights.learned_routing_choice import top_share

from .data_batches import MicroBatch
from .data_material import REPOSITORY
from .distill_tiny import (
    TrainingLog,
    add_arguments,
    all_questions,
    compare_quality,
    decoder_states,
    distillation_loss,
    load_tiny,
    measure_quality,
    rate_at,
    save_checkpoint,
    spoken_batches,
    teacher_targets,
    write_result,
)
from .model_tiny import text_layer


FOLDER = REPOSITORY / ".cache" / "tiny" / "routed"
LOG_STEPS = 10


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--capacity", type=float, default=0.5, help="share of visual tokens (default: %(default)s)")
    parser.add_argument("--blocks", help="as 1,3,5 (default: the last half)")
    parser.add_argument("--rate", type=float, default=0.01)
    add_arguments(parser, FOLDER)
    return parser.parse_args()


def routed_layer(batch: MicroBatch, capacity: float, losses: list):
    """A `text_layer` for packed tokens that follows the routers; puts the predictors' losses into `losses`."""
    visual = torch.zeros(len(batch.input_ids), dtype=torch.bool)
    visual[torch.from_numpy(batch.visual_index)] = True
    rows = torch.from_numpy(batch.slots) // batch.length

    def run(layer, hidden, cos, sin, slots, mask, wanted):
        after = text_layer(layer, hidden, cos, sin, slots, mask, wanted)
        router = getattr(layer, "token_router", None)
        if router is None or wanted is not None:  # what is wanted of the last block is text, which is never skipped
            return after
        scores = router.scores(hidden)
        chosen = top_share(scores.detach()[None], visual[None], rows[None], capacity)[0]
        foretold = router.foretell(hidden)[visual]
        losses.append(F.binary_cross_entropy_with_logits(foretold, chosen[visual].float()))
        gates = torch.where(chosen, 2 * scores.sigmoid(), 1.0)[:, None].to(hidden.dtype)
        moved = hidden + gates * (after - hidden)
        return torch.where((chosen | ~visual)[:, None], moved, hidden)

    return run


def train(teacher: nn.Module, student: nn.Module, routing: LearnedActivationRouting, steps: int, rate: float):
    """Trains the routers in place; the losses every `LOG_STEPS` steps."""
    optimizer = torch.optim.Adam(routing.freeze_others(student), lr=rate)
    log = TrainingLog(steps, LOG_STEPS)
    for step, batches in enumerate(spoken_batches(steps)):
        for group in optimizer.param_groups:
            group["lr"] = rate * rate_at(step, steps)
        for batch in batches:
            features, target_states, target_logits = teacher_targets(teacher, batch)
            foretelling = []
            layer_of = routed_layer(batch, routing.settings["capacity"], foretelling)
            states, logits = decoder_states(student, batch, features, layer_of)
            loss = distillation_loss(states, logits, target_states, target_logits, state_weight=0.0)
            helper = torch.stack(foretelling).mean()
            ((loss + helper) / len(batches)).backward()
            log.add(loss=loss.item(), predictor=helper.item())
        optimizer.step()
        optimizer.zero_grad()
        log.end_step(step)
    return log.rows


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    blocks = [int(block) for block in arguments.blocks.split(",")] if arguments.blocks else None
    teacher, student = load_tiny(), load_tiny()
    routing = LearnedActivationRouting(capacity=arguments.capacity, blocks=blocks)
    routing.apply(student)
    save_checkpoint(student, arguments.folder / "untrained")
    log = train(teacher, student, routing, arguments.steps, arguments.rate)
    save_checkpoint(student, arguments.folder / "trained")
    result = {"settings": {**routing.settings, "steps": arguments.steps}, "log": log, "limit": arguments.limit}
    result |= compare_quality(arguments.folder / "trained", arguments.limit)
    result["untrained"] = measure_quality(arguments.folder / "untrained", arguments.limit)
    result["all_questions"]["untrained"] = all_questions(result["untrained"])
    print(f"untrained routers: {result['all_questions']['untrained']:.2f}")
    write_result("routing_tiny", result)


if __name__ == "__main__":
    main()
