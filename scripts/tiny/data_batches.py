"""Turns samples into micro-batches: token ids, M-RoPE positions, patches and the places where answers are trained.

All pictures of a micro-batch have one size, so the vision tower runs them as one dense batch without masks.
"""

import functools
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from .auxiliary_tiny import frame_labels, scene_labels
from .data_tasks import Sample, place_of


PATCH = 16
MERGE = 2


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
        branches (int64, (tokens,)): 0 for what every later token of the row sees; a positive number is seen by the
            same number only. So several questions share the pictures and not one another.
        visual_index (int64): which tokens are picture tokens, in picture order.
        predict_index, targets (int64): tokens after which a trained token stands, and that token.
        answer_starts (int64): where in `targets` each answer begins.
        note_index, note_targets (int64): tokens that should hold words, and those words; a token with several words is
            listed several times. The end of a picture holds its number and label, a picture token the colour, shape
            and corner of the object in the middle of it.
        gaze_index, gaze_rows, gaze_columns (int64): tokens at which a question has named something, and where in the
            padded view that was shown.
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
    branches: np.ndarray
    patches: np.ndarray
    grid: tuple[int, int]
    visual_index: np.ndarray
    predict_index: np.ndarray
    targets: np.ndarray
    answer_starts: np.ndarray
    note_index: np.ndarray
    note_targets: np.ndarray
    gaze_index: np.ndarray
    gaze_rows: np.ndarray
    gaze_columns: np.ndarray
    rows: int
    length: int
    labels: np.ndarray | None = None
    frames: np.ndarray | None = None
    shapes: np.ndarray | None = None
    vision_only: bool = False

    @property
    def cost(self) -> int:
        """Tokens to compute: two patches take about as long as one token of the decoder."""
        return self.patches.shape[0] * self.patches.shape[1] // 2 + (0 if self.vision_only else len(self.input_ids))


def to_patches(picture: np.ndarray) -> np.ndarray:
    """(height, width, 3) uint8 to (patches, 768): the stock processor's order, without the repeated time step."""
    height, width, _ = picture.shape
    blocks = picture.reshape(height // 32, MERGE, PATCH, width // 32, MERGE, PATCH, 3)
    return blocks.transpose(0, 3, 1, 4, 6, 2, 5).reshape(-1, 3 * PATCH * PATCH)


@dataclass
class Encoded:
    """One row before it is packed; lists hold one entry a token.

    Attributes:
        ids, branches: as in `MicroBatch`.
        positions (int64, (3, length)).
        trained: whether the token belongs to an answer.
        notes: (place, token) pairs; see `note_index`.
        gazes: (place, place looked at) pairs; see `gaze_index`.
    """

    ids: list[int]
    positions: np.ndarray
    trained: list[bool]
    branches: list[int]
    notes: list[tuple[int, int]]
    gazes: list[tuple[int, int]]


class RowWriter:
    """Appends text and pictures to one row and keeps its M-RoPE clock."""

    def __init__(self, ids_of):
        self.ids_of = ids_of
        self.ids: list[int] = []
        self.positions: list[np.ndarray] = []
        self.trained: list[bool] = []
        self.branches: list[int] = []
        self.clock = 0
        self.branch = 0

    def add_text(self, text: str, trained: bool = False) -> None:
        piece = self.ids_of(text)
        places = np.arange(self.clock, self.clock + len(piece))
        self._add(piece, np.broadcast_to(places, (3, len(piece))), trained)
        self.clock += len(piece)

    def add_picture(self, placeholder: int, rows: int, columns: int) -> None:
        down, across = np.divmod(np.arange(rows * columns), columns)
        self._add([placeholder] * (rows * columns), np.stack([np.zeros_like(down), down, across]) + self.clock, False)
        self.clock += max(rows, columns)

    def _add(self, ids: list[int], positions: np.ndarray, trained: bool) -> None:
        self.ids.extend(ids)
        self.positions.append(positions)
        self.trained.extend([trained] * len(ids))
        self.branches.extend([self.branch] * len(ids))


class ConversationEncoder:
    """Writes a `Sample` as Qwen's chat format: token ids, M-RoPE positions and a mask of trained tokens."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.image_id = tokenizer.token_to_id("<|image_pad|>")
        self.video_id = tokenizer.token_to_id("<|video_pad|>")
        self.ids = functools.lru_cache(maxsize=50000)(lambda text: tokenizer.encode(text).ids)

    def encode(self, sample: Sample) -> Encoded:
        row = RowWriter(self.ids)
        notes, shown = self._write_pictures(row, sample)
        gazes = []
        fork = row.clock
        for turn, (question, answer) in enumerate(sample.turns):
            if sample.apart:
                row.branch, row.clock = turn + 1, fork
            opening = "" if turn == 0 or sample.apart else "\n<|im_start|>user\n"
            for mention, place in shown.items():
                if (found := question.find(mention)) >= 0:
                    named = opening + question[: found + len(mention) - 1]
                    gazes.append((len(row.ids) + len(self.ids(named)) - 1, place))
            row.add_text(f"{opening}{question}<|im_end|>\n<|im_start|>assistant\n")
            row.add_text(f"{answer}<|im_end|>", trained=True)
        return Encoded(row.ids, np.concatenate(row.positions, 1), row.trained, row.branches, notes, gazes)

    def _write_pictures(self, row: RowWriter, sample: Sample) -> tuple[list[tuple[int, int]], dict[str, int]]:
        """Writes the user's turn up to the first question.

        Returns the notes, and by the words (with one character more) that name something in a question the place
        where that was shown.
        """
        notes, shown = [], {}
        row.add_text("<|im_start|>user\n")
        seconds = sample.meta.get("seconds")
        placeholder = self.image_id if seconds is None else self.video_id
        if sample.meta.get("wrapped"):
            row.add_text("<|vision_start|>")
        for number, picture in enumerate(sample.pictures):
            label = f"Picture {number + 1}: " if len(sample.pictures) > 1 else ""
            row.add_text(f"{label if seconds is None else f'<{seconds[number]:.1f} seconds>'}<|vision_start|>")
            if number in sample.worded:
                row.add_text(f" {bare(sample.labels[number])}")
            else:
                row.add_picture(placeholder, *(extent // (PATCH * MERGE) for extent in picture.shape[:2]))
            row.add_text("<|vision_end|>")
            if sample.labels:
                # A handwritten digit beside the number of its picture would be ambiguous.
                named = "" if sample.meta["kind"] == "digit" else f" {bare(sample.labels[number])}"
                notes += [(len(row.ids) - 1, token) for token in (*self.ids(f"{number + 1}"), *self.ids(named))]
                for mention in (f"shows {sample.labels[number]}?", f"does picture {number + 1} show?"):
                    shown[mention] = len(row.ids) - 1
        if sample.meta.get("wrapped"):
            row.add_text("<|vision_end|>")
        for item in sample.meta.get("objects", ()):
            side = len(sample.pictures[0])
            place = row.ids.index(self.image_id) + int(item.y) // 32 * (side // 32) + int(item.x) // 32
            corner = place_of(item, side)
            words = f" {item.name}" if corner is None else f" {item.name} {corner}"
            notes += [(place, token) for token in self.ids(words)]
            for mention in (f"the {item.name} ", f"the {item.name}?", f"the {item.shape}?", f"is {item.colour}?"):
                shown[mention] = place
        return notes, shown

    def collate(self, samples: list[Sample], vision_only: bool = False) -> MicroBatch:
        """Puts samples whose pictures all have one size into one micro-batch."""
        encoded = [self.encode(sample) for sample in samples]
        ids = np.concatenate([row.ids for row in encoded])
        trained = np.concatenate([row.trained for row in encoded])
        branches = np.concatenate([row.branches for row in encoded])
        owner = np.repeat(np.arange(len(encoded)), [len(row.ids) for row in encoded])
        follows = (np.diff(branches) == 0) & (np.diff(owner) == 0)
        # The last token of an answer is a target only: nothing follows it.
        kept = ~trained | np.append(follows, False)
        new_place = np.cumsum(kept) - 1
        targets = np.flatnonzero(trained)
        starts = np.searchsorted(owner, np.arange(len(encoded)))
        notes = [(starts[i] + place, token) for i, row in enumerate(encoded) for place, token in row.notes]
        notes = np.array(notes, np.int64).reshape(-1, 2)
        gazes = [(starts[i] + named, i, place) for i, row in enumerate(encoded) for named, place in row.gazes]
        gazes = np.array(gazes, np.int64).reshape(-1, 3)
        lengths = np.bincount(owner[kept])
        pictures = [
            picture
            for sample in samples
            for number, picture in enumerate(sample.pictures)
            if number not in sample.worded
        ]
        height, width, _ = pictures[0].shape
        return MicroBatch(
            task=samples[0].task,
            input_ids=ids[kept],
            position_ids=np.concatenate([row.positions for row in encoded], 1)[:, kept],
            slots=np.concatenate([row * max(lengths) + np.arange(length) for row, length in enumerate(lengths)]),
            branches=branches[kept],
            patches=np.stack([to_patches(picture) for picture in pictures]),
            grid=(height // PATCH, width // PATCH),
            visual_index=np.flatnonzero(np.isin(ids[kept], (self.image_id, self.video_id))),
            predict_index=new_place[targets - 1],
            targets=ids[targets],
            answer_starts=np.flatnonzero(~trained[targets - 1]),
            note_index=new_place[notes[:, 0]],
            note_targets=notes[:, 1],
            gaze_index=new_place[gazes[:, 0]],
            gaze_rows=gazes[:, 1],
            gaze_columns=gazes[:, 2],
            rows=len(samples),
            length=max(lengths),
            labels=np.array([sample.meta["label"] for sample in samples]) if "label" in samples[0].meta else None,
            frames=text_frames(samples) if samples[0].task == "text" else None,
            shapes=scene_shapes(samples) if samples[0].task == "scene" else None,
            vision_only=vision_only,
        )


def bare(label: str) -> str:
    """A label without its article."""
    return label.split(" ", 1)[1]


def text_frames(samples: list[Sample]) -> np.ndarray:
    return np.stack([frame_labels(sample.turns[0][1], sample.meta["letters"]) for sample in samples])


def scene_shapes(samples: list[Sample]) -> np.ndarray:
    return np.stack([scene_labels(sample.meta["objects"], len(sample.pictures[0])) for sample in samples])
