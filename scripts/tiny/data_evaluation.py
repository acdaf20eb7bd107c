"""The fixed evaluation sets: each row of the table, from seeds, words, fonts, digits and photos never trained.

The definition was written before anything was evaluated and does not change; a new question gets a new row at the
end of the table. The rows "long" came later so: larger pictures, and many of them.
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
# Something small on the largest canvas: what a text fills, and a digit's share of the side.
LARGEST_SIDE = 256
LONG_LINES = ((32, 128), (48, 160), (64, 192))
LONG_DIGIT_REACH = (0.2, 0.5)


@dataclass(frozen=True)
class EvaluationTask:
    """One row of the table.

    Attributes:
        name, title: key in the JSON and label in the table.
        count: questions at full size.
        needs_material: false for what is only drawn from shapes, which runs in a bare checkout.
        in_scenes: whether the row counts towards "all scenes".
        is_long: whether it counts towards "all with larger pictures".
    """

    name: str
    title: str
    count: int
    needs_material: bool = True
    in_scenes: bool = False
    is_long: bool = False


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
        EvaluationTask("long_text", "long: text on 256 x 256", 60, is_long=True),
        EvaluationTask("long_digit", "long: digit on 256 x 256", 60, is_long=True),
        EvaluationTask("long_emoji", "long: Twemoji on 192 or 256", 60, is_long=True),
        EvaluationTask("long_scene", "long: scene of 192 to 256", 80, False, is_long=True),
        EvaluationTask("long_which", "long: which of 6 to 12 of 96 to 160", 60, False, is_long=True),
    )
}


def draw_long_question(rng: np.random.Generator, task: str, material: Material | None) -> Sample:
    """One sample with one turn of a row "long": 36 to 64 picture tokens, or 54 to 300 where there are several."""
    if task == "long_text":
        line = LONG_LINES[int(rng.integers(len(LONG_LINES)))]
        length = int(rng.integers(1, longest_text_on(line) + 1))
        return text_sample(rng, material, "heldout", (LARGEST_SIDE, LARGEST_SIDE), length, made_up=0.0, line=line)
    if task == "long_digit":
        return digit_sample(rng, material, "heldout", LARGEST_SIDE, reach=LONG_DIGIT_REACH)
    if task == "long_emoji":
        return emoji_sample(rng, material, "heldout", int(rng.choice([192, 256])), reach=(0.25, 0.6))
    if task == "long_scene":
        kind = str(rng.choice(["colour", "shape", "count", "position"]))
        return scene_sample(rng, int(rng.choice([192, 224, 256])), kinds=(kind,), turns=1)
    side, count = int(rng.choice([96, 128, 160])), int(rng.integers(6, 13))
    return many_sample(rng, material, "heldout", count, side, turns=1, kind="shape", find_first=True)


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
    if task.startswith("long_"):
        return draw_long_question(rng, task, material)
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
