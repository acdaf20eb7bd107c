"""What a training step consists of: how many samples of each task, how large, how hard.

A curriculum (`Difficulty`) starts with short strings and few pictures and is raised by the trainer once those succeed.
"""

from dataclasses import dataclass

import numpy as np

from .data_material import Material
from .data_tasks import Sample, clip_sample, digit_sample, emoji_sample, many_sample, scene_sample, text_sample


# (height, width) of text pictures; the longest string that is drawn on a canvas is about one character a 14 pixels.
TEXT_SIZES = ((64, 64), (64, 96), (32, 128), (64, 128), (32, 192), (64, 192), (32, 256), (64, 256), (96, 192))
TEXT_SIZE_WEIGHTS = (0.05, 0.08, 0.12, 0.15, 0.2, 0.15, 0.12, 0.08, 0.05)
LONGEST_TEXT = 12
MOST_PICTURES = 16
# Share of texts and digits with strong contrast on a plain ground: strokes are learned there first.
EASY_SHARE = 0.5
ROWS = {"emoji": 8, "text": 24, "digit": 24, "scene": 8}
VISION_ROWS = 28
# Encoding a picture costs more than a question about it, so each gets many, all asked apart. Positions are the
# hardest and most various questions.
SCENE_TURNS = 9
SCENE_KINDS = ("position", "position", "position", "count", "count", "colour", "colour", "shape", "describe")
MANY_TURNS = 10
# Tokens of a group of several pictures: one of them is about 11 with its label, a question about 16.
GROUP_TOKENS = 1800
PICTURE_TOKENS, QUESTION_TOKENS = 11, 16
# Share of the pictures, where there are several, that are written in words: matching a question to the number of a
# picture is learned in words first and carries over.
WORDED_SHARE = 0.35
CLIP_SHARE = 0.15
CLIP_ROWS = 7

Groups = list[tuple[list[Sample], bool]]


@dataclass
class Difficulty:
    """How far the curriculum has come.

    Attributes:
        scene: 0 to 1; larger pictures and more shapes.
        longest_text: most characters of a string that the decoder reads.
        most_pictures: most pictures of a question which one is meant.
    """

    scene: float = 0.0
    longest_text: int = 3
    most_pictures: int = 3


def longest_text_on(size: tuple[int, int]) -> int:
    return min(LONGEST_TEXT, max(3, size[1] // 14))


def draw_text_batch(
    rng: np.random.Generator, material: Material, rows: int, longest: int, flat: bool = False
) -> list[Sample]:
    """Training strings of similar length on canvases of one size.

    Args:
        longest: most characters; how far the curriculum has come.
        flat: only canvases one line high, which show the most letters a patch.
    """
    allowed = [i for i, size in enumerate(TEXT_SIZES) if size[1] <= max(96, 24 * longest)]
    allowed = [i for i in allowed if TEXT_SIZES[i][0] == 32 or not flat]
    weights = np.array([TEXT_SIZE_WEIGHTS[i] for i in allowed])
    size = TEXT_SIZES[allowed[rng.choice(len(allowed), p=weights / weights.sum())]]
    most = min(longest, longest_text_on(size))
    least = max(1, min(most - 1, size[1] // 40))
    return [
        text_sample(rng, material, "train", size, int(rng.integers(least, most + 1)), easy=rng.random() < EASY_SHARE)
        for _ in range(rows)
    ]


def draw_digits(rng: np.random.Generator, material: Material, rows: int, side: int = 64) -> list[Sample]:
    return [digit_sample(rng, material, "train", side, rng.random() < EASY_SHARE) for _ in range(rows)]


def draw_emoji_batch(rng: np.random.Generator, material: Material, rows: int, side: int = 64) -> list[Sample]:
    return [emoji_sample(rng, material, "train", side) for _ in range(rows)]


def draw_scenes(rng: np.random.Generator, rows: int, side: int, most: int) -> list[Sample]:
    kinds = [tuple(str(kind) for kind in rng.permutation(SCENE_KINDS)) for _ in range(rows)]
    samples = [scene_sample(rng, side, most, kinds[row], SCENE_TURNS) for row in range(rows)]
    for sample in samples:
        sample.apart = True
    return samples


def draw_many(rng: np.random.Generator, material: Material, most: int, kind: str, task: str) -> list[Sample]:
    """Rows of one number of pictures; few pictures are cheap and teach the same look-up, so they come more often."""
    pictures = int(2 + (most - 1) * rng.random() ** 1.5)
    turns = min(MANY_TURNS, pictures + 1)
    rows = int(np.clip(GROUP_TOKENS // (PICTURE_TOKENS * pictures + QUESTION_TOKENS * turns), 4, 16))
    samples = [many_sample(rng, material, "train", pictures, turns=turns, kind=kind) for _ in range(rows)]
    for row, sample in enumerate(samples):
        sample.apart, sample.task = True, task
        # One picture has to remain, or the tower would have nothing to do.
        sample.worded = frozenset(int(i) for i in np.flatnonzero(rng.random(pictures) < WORDED_SHARE) if i + row > 0)
    return samples


def draw_vision_step(rng: np.random.Generator, material: Material, progress: float) -> Groups:
    """One step of the first stage: single pictures for the auxiliary heads, and one small group for the decoder."""
    groups = [(draw_emoji_batch(rng, material, VISION_ROWS), True) for _ in range(2)]
    groups += [(draw_digits(rng, material, VISION_ROWS), True) for _ in range(2)]
    groups += [
        (draw_text_batch(rng, material, VISION_ROWS, LONGEST_TEXT, flat=number > 1), True) for number in range(5)
    ]
    side = int(rng.choice([64, 96]))
    groups.append(([scene_sample(rng, side) for _ in range(VISION_ROWS)], True))
    spoken = int(rng.integers(4))
    if spoken == 0:
        samples = draw_emoji_batch(rng, material, VISION_ROWS // 2)
    elif spoken == 1:
        samples = draw_digits(rng, material, VISION_ROWS // 2)
    elif spoken == 2:
        samples = draw_text_batch(rng, material, VISION_ROWS // 2, 3)
    else:
        samples = [scene_sample(rng, 64, round(2 + 4 * min(progress, 1.0))) for _ in range(VISION_ROWS // 2)]
    return [*groups, (samples, False)]


def draw_step(rng: np.random.Generator, material: Material, difficulty: Difficulty) -> Groups:
    """One step of the second stage: groups of one picture size, each with whether it is for vision only."""
    hard = min(difficulty.scene, 1.0)
    emoji_side, scene_side, digit_side = (
        int(rng.choice([64, 96, 128], p=[1 - wide - wider, wide, wider]))
        for wide, wider in ((0.3 * hard, 0.2 * hard), (0.4 * hard, 0.3 * hard), (0.25 * hard, 0.0))
    )
    alone = [draw_emoji_batch(rng, material, ROWS["emoji"]), draw_digits(rng, material, ROWS["digit"])]
    alone.append(draw_text_batch(rng, material, ROWS["text"], LONGEST_TEXT, flat=rng.random() < 0.5))
    spoken = [draw_emoji_batch(rng, material, ROWS["emoji"], emoji_side)]
    spoken.append(draw_digits(rng, material, ROWS["digit"] // 2, digit_side))
    spoken += [draw_scenes(rng, ROWS["scene"], side, round(2 + 4 * hard)) for side in (64, scene_side)]
    spoken.append(draw_text_batch(rng, material, ROWS["text"] // 2, difficulty.longest_text))
    spoken.append(draw_many(rng, material, difficulty.most_pictures, "shape", "which"))
    if rng.random() < CLIP_SHARE:
        spoken.append([clip_sample(rng, material, "train") for _ in range(CLIP_ROWS)])
    else:
        kind = str(rng.choice(["digit", "emoji", "emoji", "word"]))
        spoken.append(draw_many(rng, material, difficulty.most_pictures, kind, "many"))
    return [*((group, True) for group in alone), *((group, False) for group in spoken)]
