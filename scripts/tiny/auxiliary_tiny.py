"""Auxiliary heads that teach the vision tower to see before the decoder can tell it how: used in training only.

The tower learns slowly from a decoder that has not learned to look. So the tower's last states also feed a class head
(emoji and digits) and two heads for the shape and the colour at each patch of a scene: where things were drawn is
known. A letter head names the letter at each column of a text from the picture tokens, so that the merger passes on
what the decoder spells. None is exported; they take the place of the pretrained encoder of larger models.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from .data_draw import COLOURS, SHAPES, SceneObject
from .data_tasks import TEXT_ALPHABET


BLANK = len(TEXT_ALPHABET)
# A picture token is 32 pixels wide and may show several letters.
FRAMES_PER_TOKEN = 4
FRAME_PIXELS = 8


def frame_labels(text: str, letters: np.ndarray) -> np.ndarray:
    """The letter in the middle of every 8 pixels, as index into the alphabet or `BLANK`: (width / 8,) int64.

    Args:
        letters ((width,)): index into `text` of the letter at each column, or -1.
    """
    middle = letters[FRAME_PIXELS // 2 :: FRAME_PIXELS]
    return np.array([BLANK if index < 0 else TEXT_ALPHABET.index(text[index]) for index in middle])


def scene_labels(objects: list[SceneObject], side: int) -> np.ndarray:
    """Shape and colour in the middle of every patch, in merge order: (patches, 2) int64; the last class is nothing."""
    count = side // 32
    rows, columns = np.meshgrid(np.arange(2 * count), np.arange(2 * count), indexing="ij")
    places = np.stack([rows, columns], -1).reshape(count, 2, count, 2, 2).transpose(0, 2, 1, 3, 4).reshape(-1, 2)
    labels = np.tile([len(SHAPES), len(COLOURS)], (len(places), 1))
    down, across = (16 * places + 8).T
    for item in objects:
        inside = np.hypot(across - item.x, down - item.y) < item.radius
        labels[inside] = SHAPES.index(item.shape), list(COLOURS).index(item.colour)
    return labels


class AuxiliaryHeads(nn.Module):
    """Heads over patch states (pictures, patches in merge order, width), and over picture tokens for letters.

    Args:
        width, token_width (`int`): of the patch states and of the picture tokens.
        classes (`int`): emoji names and then ten digits.
    """

    def __init__(self, width: int, token_width: int, classes: int):
        super().__init__()
        self.class_head = nn.Linear(width, classes)
        self.class_weight = nn.Linear(width, 1)
        self.letter_head = nn.Linear(token_width, FRAMES_PER_TOKEN * (BLANK + 1))
        self.letter_weight = nn.Linear(token_width, 1)
        self.shape_head = nn.Linear(width, len(SHAPES) + 1)
        self.colour_head = nn.Linear(width, len(COLOURS) + 1)

    def class_loss(self, states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean cross entropy of `labels` (pictures,) from states pooled by learned weights."""
        states = F.layer_norm(states, states.shape[-1:])
        pooled = (self.class_weight(states).softmax(1) * states).sum(1)
        return F.cross_entropy(self.class_head(pooled).float(), labels)

    def text_loss(self, tokens: torch.Tensor, grid: tuple[int, int], frames: torch.Tensor) -> torch.Tensor:
        """Mean cross entropy of `frames` (pictures, width / 8) from picture tokens (all pictures' tokens, width).

        Learned weights pool the rows of `grid` (in patches).
        """
        tokens = F.layer_norm(tokens, tokens.shape[-1:]).view(len(frames), grid[0] // 2, grid[1] // 2, -1)
        pooled = (self.letter_weight(tokens).softmax(1) * tokens).sum(1)
        logits = self.letter_head(pooled).view(-1, BLANK + 1)
        return F.cross_entropy(logits.float(), frames.view(-1))

    def scene_loss(self, states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean cross entropy of the shape and colour `labels` (pictures, patches, 2) of every patch."""
        states = F.layer_norm(states, states.shape[-1:])
        heads = (self.shape_head, self.colour_head)
        return sum(
            F.cross_entropy(head(states).float().flatten(0, 1), labels[:, :, slot].flatten())
            for slot, head in enumerate(heads)
        )
