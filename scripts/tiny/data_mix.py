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
EASY_SHARE = 0.25
ROWS = {"emoji": 8, "text": 24, "digit": 36, "scene": 8}
# Letters are the hardest to see: what the letter head gets wrong the decoder gets wrong too. A string for that head
# alone costs a third of one that is spelled, and a canvas one line high has no empty patches.
FLAT_ROWS = 72
# Share of strings that are no words.
SPOKEN_MADE_UP = 0.2
VISION_ROWS = 28
# Encoding a picture costs more than a question about it, so each gets many, all asked apart. Positions are the
# hardest and most various questions.
SCENE_TURNS = 9
SCENE_KINDS = ("position", "position", "position", "count", "count", "colour", "colour", "shape", "describe")
MANY_TURNS = 10
# Tokens of a group of several pictures: one of 64 pixels is about 11 with its label, a question about 16.
GROUP_TOKENS = 1800
PICTURE_TOKENS, QUESTION_TOKENS = 11, 16
# Share of the pictures, where there are several, that are written in words: matching a question to the number of a
# picture is learned in words first and carries over.
WORDED_SHARE = 0.35
# Share of the steps with scenes and with several pictures, and of clips and "which of N shapes" among the latter.
SCENE_SHARE = 0.65
SEVERAL_SHARE = 0.5
CLIP_SHARE = 0.1
WHICH_SHARE = 0.4
CLIP_ROWS = 7
# How often larger pictures come, against the smallest ones of their task.
SIDE_WEIGHTS = {96: 0.7, 128: 0.5, 160: 0.3, 192: 0.35, 256: 0.3}
# Largest question about several pictures, in patches of the tower.
MOST_PATCHES = 700
# Share of the steps with something small on a large canvas, how many of them, and what part of the side it takes.
LARGE_SHARE = 0.4
LARGE_ROWS = 5
LARGE_REACH = (0.2, 0.6)

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
    rng: np.random.Generator, material: Material, rows: int, longest: int, flat: bool = False, made_up: float = 0.3
) -> list[Sample]:
    """Training strings of similar length on canvases of one size.

    Args:
        longest: most characters; how far the curriculum has come.
        flat: only canvases one line high, which show the most letters a patch.
        made_up: share of strings that are no words.
    """
    allowed = [i for i, size in enumerate(TEXT_SIZES) if size[1] <= max(96, 24 * longest)]
    allowed = [i for i in allowed if TEXT_SIZES[i][0] == 32 or not flat]
    weights = np.array([TEXT_SIZE_WEIGHTS[i] for i in allowed])
    size = TEXT_SIZES[allowed[rng.choice(len(allowed), p=weights / weights.sum())]]
    most = min(longest, longest_text_on(size))
    least = max(1, min(most - 1, size[1] // 40))
    return [
        text_sample(rng, material, "train", size, int(length), made_up, rng.random() < EASY_SHARE)
        for length in rng.integers(least, most + 1, rows)
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


def draw_many(
    rng: np.random.Generator, material: Material, most: int, kind: str, task: str, side: int = 64
) -> list[Sample]:
    """Rows of one number of pictures; few pictures are cheap and teach the same look-up, so they come more often."""
    pictures = int(2 + (most - 1) * rng.random() ** 1.5)
    turns = min(MANY_TURNS, pictures + 1)
    picture_tokens = PICTURE_TOKENS - 4 + (side // 32) ** 2
    rows = int(np.clip(GROUP_TOKENS // (picture_tokens * pictures + QUESTION_TOKENS * turns), 3, 16))
    samples = [many_sample(rng, material, "train", pictures, side, turns=turns, kind=kind) for _ in range(rows)]
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
    most = difficulty.longest_text
    alone = [draw_text_batch(rng, material, FLAT_ROWS, LONGEST_TEXT, flat=True) for _ in range(3)]
    alone.append(draw_text_batch(rng, material, ROWS["text"], LONGEST_TEXT))
    alone.append(draw_digits(rng, material, ROWS["digit"]))
    spoken = [draw_text_batch(rng, material, ROWS["text"] * 2 // 3, most, True, SPOKEN_MADE_UP)]
    spoken.append(draw_text_batch(rng, material, ROWS["text"] * 2 // 3, most, False, SPOKEN_MADE_UP))
    spoken.append(draw_digits(rng, material, ROWS["digit"] // 3, draw_side(rng, hard, (64, 96))))
    spoken.append(draw_emoji_batch(rng, material, ROWS["emoji"], draw_side(rng, hard, (64, 96, 128))))
    if rng.random() < SCENE_SHARE:
        side = draw_side(rng, hard, (64, 96, 128, 192, 256))
        spoken.append(draw_scenes(rng, rows_of(ROWS["scene"], side), side, round(2 + 4 * hard)))
    if rng.random() < SEVERAL_SHARE:
        spoken.append(draw_several(rng, material, difficulty.most_pictures, hard))
    if rng.random() < LARGE_SHARE * hard:
        spoken.append(draw_large(rng, material, most))
    return [*((group, True) for group in alone), *((group, False) for group in spoken)]


def draw_side(rng: np.random.Generator, hard: float, sides: tuple[int, ...]) -> int:
    """One of `sides`: at first the smallest, at last the larger ones too, though less often."""
    weights = np.array([1.0, *(hard * SIDE_WEIGHTS[side] for side in sides[1:])])
    return int(rng.choice(sides, p=weights / weights.sum()))


def rows_of(rows: int, side: int) -> int:
    """So many pictures of `side` pixels that they cost about as much as `rows` of 96 pixels, and at least 2."""
    return int(np.clip(rows * 96**2 // side**2, 2, rows))


def draw_several(rng: np.random.Generator, material: Material, most: int, hard: float) -> list[Sample]:
    """Questions about several pictures, or a clip; which of several shapes is asked as often as all others."""
    kind = rng.random()
    if kind < CLIP_SHARE:
        return [clip_sample(rng, material, "train") for _ in range(CLIP_ROWS)]
    side = draw_side(rng, hard, (64, 96, 128, 160))
    most = max(2, min(most, MOST_PATCHES // (side // 16) ** 2))
    if kind < CLIP_SHARE + WHICH_SHARE:
        return draw_many(rng, material, most, "shape", "which", side)
    return draw_many(rng, material, most, str(rng.choice(["digit", "emoji", "emoji", "word"])), "many", side)


def draw_large(rng: np.random.Generator, material: Material, longest: int) -> list[Sample]:
    """A line of text, a digit or an emoji somewhere on a canvas of 192 or 256 pixels a side."""
    side = int(rng.choice([192, 256]))
    kind = rng.random()
    if kind < 0.6:
        line = TEXT_SIZES[rng.choice(len(TEXT_SIZES), p=np.array(TEXT_SIZE_WEIGHTS) / sum(TEXT_SIZE_WEIGHTS))]
        line = (line[0], min(line[1], side))
        most = min(longest, longest_text_on(line))
        return [
            text_sample(
                rng, material, "train", (side, side), int(rng.integers(1, most + 1)), SPOKEN_MADE_UP, line=line
            )
            for _ in range(LARGE_ROWS)
        ]
    if kind < 0.8:
        return [digit_sample(rng, material, "train", side, reach=LARGE_REACH) for _ in range(LARGE_ROWS)]
    return [emoji_sample(rng, material, "train", side, reach=LARGE_REACH) for _ in range(LARGE_ROWS)]
