"""The fixed evaluation sets: each row of the table, from seeds, words, fonts, digits and photos never trained.

The definition was written before anything was evaluated and does not change; a new question gets a new row.
"""

from dataclasses import dataclass

import numpy as np

from .data_material import Material
from .data_mix import TEXT_SIZE_WEIGHTS, TEXT_SIZES, longest_text_on
from .data_tasks import Sample, digit_sample, emoji_sample, many_sample, scene_sample, text_sample


EVALUATION_SEED = 7
# The first number of a training generator's seed sequence is the training seed; this one can never be that.
EVALUATION_STREAM = 1_000_003
OTHER_KINDS = ("emoji", "digit", "word")


@dataclass(frozen=True)
class EvaluationTask:
    """One row of the table.

    Attributes:
        name, title: key in the JSON and label in the table.
        count: questions at full size.
        needs_material: false for what is only drawn from shapes, which runs in a bare checkout.
        in_scenes: whether the row counts towards "all scenes".
    """

    name: str
    title: str
    count: int
    needs_material: bool = True
    in_scenes: bool = False


TASKS = {
    task.name: task
    for task in (
        EvaluationTask("emoji_twemoji", "emoji, Twemoji, new renderings", 300),
        EvaluationTask("emoji_openmoji", "emoji, OpenMoji, another artist", 200),
        EvaluationTask("text", "text, new words and fonts", 300),
        EvaluationTask("digit", "handwritten digit", 250),
        EvaluationTask("scene_colour", "scene: colour", 100, False, True),
        EvaluationTask("scene_shape", "scene: shape", 100, False, True),
        EvaluationTask("scene_count", "scene: count", 100, False, True),
        EvaluationTask("scene_position", "scene: position", 100, False, True),
        EvaluationTask("which_2_4", "which of 2 to 4 pictures", 60, False, True),
        EvaluationTask("which_5_8", "which of 5 to 8 pictures", 60, False, True),
        EvaluationTask("which_9_16", "which of 9 to 16 pictures", 60, False, True),
        EvaluationTask("which_other", "which of 2 to 16: emoji, digit, word", 60),
        EvaluationTask("scene_describe", "scene: whole description", 60, False),
    )
}


def draw_question(rng: np.random.Generator, task: str, material: Material | None) -> Sample:
    """One sample with one turn of `task`. Raises `KeyError` for an unknown task."""
    if task == "emoji_twemoji":
        return emoji_sample(rng, material, "heldout", int(rng.choice([64, 96, 128], p=[0.5, 0.3, 0.2])))
    if task == "emoji_openmoji":
        side = int(rng.choice([64, 96, 128], p=[0.5, 0.3, 0.2]))
        return emoji_sample(rng, material, "heldout", side, source="openmoji")
    if task == "text":
        length = int(rng.integers(1, 13))
        allowed = [i for i, size in enumerate(TEXT_SIZES) if longest_text_on(size) >= length]
        weights = np.array([TEXT_SIZE_WEIGHTS[i] for i in allowed])
        size = TEXT_SIZES[allowed[rng.choice(len(allowed), p=weights / weights.sum())]]
        # Words where there are any of that length; one and two characters come as random strings.
        return text_sample(rng, material, "heldout", size, length, made_up=0.0)
    if task == "digit":
        return digit_sample(rng, material, "heldout", int(rng.choice([64, 96], p=[0.75, 0.25])))
    if task.startswith("scene_"):
        side = int(rng.choice([64, 96, 128], p=[0.3, 0.4, 0.3]))
        return scene_sample(rng, side, kinds=(task.removeprefix("scene_"),), turns=1)
    fewest, most = {"which_2_4": (2, 4), "which_5_8": (5, 8), "which_9_16": (9, 16), "which_other": (2, 16)}[task]
    kind = str(rng.choice(OTHER_KINDS)) if task == "which_other" else "shape"
    count = int(rng.integers(fewest, most + 1))
    return many_sample(rng, material, "heldout", count, turns=1, kind=kind, find_first=True)


def evaluation_set(task: str, material: Material | None, count: int | None = None) -> list[Sample]:
    """The first `count` questions of `task` (all when `None`); question i is the same whatever `count` is."""
    row = list(TASKS).index(task)
    total = TASKS[task].count if count is None else min(count, TASKS[task].count)
    return [
        draw_question(np.random.default_rng([EVALUATION_STREAM, EVALUATION_SEED, row, i]), task, material)
        for i in range(total)
    ]
