"""Turns samples into micro-batches: token ids, M-RoPE positions, patches and the places where answers are trained.

All pictures of a micro-batch have one size, so the vision tower runs them as one dense batch without masks.
"""

import functools
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from .auxiliary_tiny import frame_labels, scene_labels
from .data_material import Material
from .data_tasks import Sample, clip_sample, digit_sample, emoji_sample, many_sample, scene_sample, text_sample


PATCH = 16
MERGE = 2
# (height, width) of text pictures; the longest string that is drawn on a canvas is about one character a 14 pixels.
TEXT_SIZES = ((64, 64), (64, 96), (32, 128), (64, 128), (32, 192), (64, 192), (32, 256), (64, 256), (96, 192))
TEXT_SIZE_WEIGHTS = (0.05, 0.08, 0.12, 0.15, 0.2, 0.15, 0.12, 0.08, 0.05)
LONGEST_TEXT = 12
# Share of texts and digits with strong contrast on a plain ground: strokes are learned there first.
EASY_SHARE = 0.5
# While the tower cannot read, the decoder learns little from texts and gets few.
SHORT_TEXT = 2
# Questions about the same pictures; further ones cost little.
TURNS = 5
# How often the group of several pictures is one of videos.
CLIP_SHARE = 0.25


@dataclass
class MicroBatch:
    """One dense forward pass.

    Tokens lie one after another without padding; only attention puts them into padded rows.

    Attributes:
        task: what the rows are about; the loss is logged under it.
        input_ids (int64, (tokens,)) and position_ids (int64, (3, tokens)).
        slots (int64, (tokens,)): row * length + column of each token in the padded (rows, length) view.
        patches (uint8, (pictures, grid_h * grid_w, 768)): channel-major patches in merge order, one time step.
        grid: (grid_h, grid_w) in patches, the same for all pictures.
        visual_index (int64): which tokens are picture tokens, in picture order.
        predict_index, targets (int64): tokens after which a trained token stands, and that token.
        rows, length: size of the padded view.
        labels (int64, (rows,)): classes for the auxiliary head, where a row is one emoji or digit.
        frames (int64, (rows, width / 8)): letters by column for the auxiliary head, where a row is one string.
        shapes (int64, (rows, patches, 2)): shape and colour by patch for the auxiliary heads, for scenes.
        vision_only: train the tower by the auxiliary heads alone, without the decoder.
    """

    task: str
    input_ids: np.ndarray
    position_ids: np.ndarray
    slots: np.ndarray
    patches: np.ndarray
    grid: tuple[int, int]
    visual_index: np.ndarray
    predict_index: np.ndarray
    targets: np.ndarray
    rows: int
    length: int
    labels: np.ndarray | None = None
    frames: np.ndarray | None = None
    shapes: np.ndarray | None = None
    vision_only: bool = False


def to_patches(picture: np.ndarray) -> np.ndarray:
    """(height, width, 3) uint8 to (patches, 768): the stock processor's order, without the repeated time step."""
    height, width, _ = picture.shape
    blocks = picture.reshape(height // 32, MERGE, PATCH, width // 32, MERGE, PATCH, 3)
    return blocks.transpose(0, 3, 1, 4, 6, 2, 5).reshape(-1, 3 * PATCH * PATCH)


class ConversationEncoder:
    """Writes a `Sample` as Qwen's chat format: token ids, M-RoPE positions and a mask of trained tokens."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.image_id = tokenizer.token_to_id("<|image_pad|>")
        self.video_id = tokenizer.token_to_id("<|video_pad|>")
        self.ids = functools.lru_cache(maxsize=50000)(lambda text: tokenizer.encode(text).ids)

    def encode(self, sample: Sample) -> tuple[list[int], np.ndarray, list[bool]]:
        """Returns ids (length), positions (3, length) and whether each id is an answer token (length)."""
        ids = list(self.ids("<|im_start|>user\n"))
        positions = [np.broadcast_to(np.arange(len(ids)), (3, len(ids)))]
        clock = len(ids)

        def add_text(text: str) -> int:
            nonlocal clock
            piece = self.ids(text)
            ids.extend(piece)
            positions.append(np.broadcast_to(np.arange(clock, clock + len(piece)), (3, len(piece))))
            clock += len(piece)
            return len(piece)

        seconds = sample.meta.get("seconds")
        placeholder = self.image_id if seconds is None else self.video_id
        if sample.meta.get("wrapped"):
            add_text("<|vision_start|>")
        for number, picture in enumerate(sample.pictures):
            label = f"Picture {number + 1}: " if len(sample.pictures) > 1 else ""
            add_text(f"{label if seconds is None else f'<{seconds[number]:.1f} seconds>'}<|vision_start|>")
            rows, columns = picture.shape[0] // (PATCH * MERGE), picture.shape[1] // (PATCH * MERGE)
            ids.extend([placeholder] * (rows * columns))
            down, across = np.divmod(np.arange(rows * columns), columns)
            positions.append(np.stack([np.zeros_like(down), down, across]) + clock)
            clock += max(rows, columns)
            add_text("<|vision_end|>")
        if sample.meta.get("wrapped"):
            add_text("<|vision_end|>")
        trained = [False] * len(ids)
        for turn, (question, answer) in enumerate(sample.turns):
            opening = "" if turn == 0 else "\n<|im_start|>user\n"
            asked = add_text(f"{opening}{question}<|im_end|>\n<|im_start|>assistant\n")
            answered = add_text(f"{answer}<|im_end|>")
            trained += [False] * asked + [True] * answered
        return ids, np.concatenate(positions, 1), trained

    def collate(self, samples: list[Sample], vision_only: bool = False) -> MicroBatch:
        """Puts samples whose pictures all have one size into one micro-batch."""
        encoded = [self.encode(sample) for sample in samples]
        lengths = [len(ids) for ids, _, _ in encoded]
        input_ids = np.concatenate([ids for ids, _, _ in encoded])
        trained = np.flatnonzero(np.concatenate([mask for _, _, mask in encoded]))
        pictures = [picture for sample in samples for picture in sample.pictures]
        height, width, _ = pictures[0].shape
        return MicroBatch(
            task=samples[0].task,
            input_ids=input_ids,
            position_ids=np.concatenate([positions for _, positions, _ in encoded], 1),
            slots=np.concatenate([row * max(lengths) + np.arange(length) for row, length in enumerate(lengths)]),
            patches=np.stack([to_patches(picture) for picture in pictures]),
            grid=(height // PATCH, width // PATCH),
            visual_index=np.flatnonzero((input_ids == self.image_id) | (input_ids == self.video_id)),
            predict_index=trained - 1,
            targets=input_ids[trained],
            rows=len(samples),
            length=max(lengths),
            labels=np.array([sample.meta["label"] for sample in samples]) if "label" in samples[0].meta else None,
            frames=text_frames(samples) if samples[0].task == "text" else None,
            shapes=scene_shapes(samples) if samples[0].task == "scene" else None,
            vision_only=vision_only,
        )


def text_frames(samples: list[Sample]) -> np.ndarray:
    return np.stack([frame_labels(sample.turns[0][1], sample.meta["letters"]) for sample in samples])


def scene_shapes(samples: list[Sample]) -> np.ndarray:
    return np.stack([scene_labels(sample.meta["objects"], len(sample.pictures[0])) for sample in samples])


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


def draw_vision_step(rng: np.random.Generator, material: Material, progress: float, rows: int) -> list:
    """One step of the first stage: single pictures for the auxiliary heads, and one small group for the decoder.

    Arguments are those of `draw_step`; `rows` is the size of a group.
    """
    groups = [([emoji_sample(rng, material, "train") for _ in range(rows)], True) for _ in range(2)]
    groups += [
        ([digit_sample(rng, material, "train", easy=rng.random() < EASY_SHARE) for _ in range(rows)], True)
        for _ in range(2)
    ]
    groups += [(draw_text_batch(rng, material, rows, LONGEST_TEXT, flat=number > 1), True) for number in range(5)]
    side = int(rng.choice([64, 96]))
    groups.append(([scene_sample(rng, side) for _ in range(rows)], True))
    spoken = int(rng.integers(4))
    if spoken == 0:
        samples = [emoji_sample(rng, material, "train") for _ in range(rows // 2)]
    elif spoken == 1:
        samples = [digit_sample(rng, material, "train", easy=rng.random() < EASY_SHARE) for _ in range(rows // 2)]
    elif spoken == 2:
        samples = draw_text_batch(rng, material, rows // 2, 3)
    else:
        samples = [scene_sample(rng, 64, round(2 + 4 * min(progress, 1.0))) for _ in range(rows // 2)]
    return [*groups, (samples, False)]


def draw_step(
    rng: np.random.Generator, material: Material, progress: float, longest: int, sizes: dict[str, int]
) -> list[tuple[list[Sample], bool]]:
    """One step of the second stage: groups of one picture size, each with whether it is for vision only.

    Args:
        progress: 0 to 1, how far the curriculum has come; from 1 on every task but text has its full difficulty.
        longest: most characters of a text.
        sizes: rows of a group by task: "emoji", "text", "digit", "scene", "many".
    """
    hard = min(progress, 1.0)
    emoji_side, scene_side, digit_side = (
        int(rng.choice([64, 96, 128], p=[1 - wide - wider, wide, wider]))
        for wide, wider in ((0.3 * hard, 0.2 * hard), (0.4 * hard, 0.3 * hard), (0.25 * hard, 0.0))
    )
    most_objects = round(2 + 4 * hard)
    most_pictures = round(3 + 13 * hard)
    alone = [[emoji_sample(rng, material, "train") for _ in range(sizes["emoji"])]]
    alone.append([digit_sample(rng, material, "train", easy=rng.random() < EASY_SHARE) for _ in range(sizes["digit"])])
    alone += [draw_text_batch(rng, material, sizes["text"], LONGEST_TEXT, flat=number > 0) for number in range(3)]
    groups = [[emoji_sample(rng, material, "train", emoji_side) for _ in range(sizes["emoji"])]]
    groups.append(
        [
            digit_sample(rng, material, "train", digit_side, rng.random() < EASY_SHARE)
            for _ in range(sizes["digit"] // 2)
        ]
    )
    groups += [
        [scene_sample(rng, side, most_objects, turns=TURNS) for _ in range(sizes["scene"])]
        for side in (64, scene_side)
    ]
    text_batches = 1 if longest <= SHORT_TEXT else 2
    groups += [draw_text_batch(rng, material, sizes["text"] // 2, longest) for _ in range(text_batches)]
    if rng.random() < CLIP_SHARE:
        groups.append([clip_sample(rng, material, "train") for _ in range(sizes["many"])])
        return [*((group, True) for group in alone), *((group, False) for group in groups)]
    # Rows of similar picture counts share a micro-batch: the count is drawn once, then jittered.
    # Few pictures are cheap and teach the same look-up, so they are drawn more often.
    pictures = int(2 + (most_pictures - 1) * rng.random() ** 2)
    rows = max(4, min(3 * sizes["many"], sizes["many"] * 10 // pictures))
    kinds = (*["shape"] * 6, *["digit"] * 2, *["emoji"] * 3, "word") if hard > 0.3 else ("shape", "digit")
    groups.append(
        [
            many_sample(
                rng, material, "train", max(2, pictures - int(rng.integers(0, 2))), kind=str(rng.choice(kinds))
            )
            for _ in range(rows)
        ]
    )
    return [*((group, True) for group in alone), *((group, False) for group in groups)]
