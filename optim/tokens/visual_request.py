"""What a technique of the visual-token port is shown, and what it answers."""

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Piece:
    """One picture or one video among the visual tokens.

    Args:
        modality (`str`): `"image"` or `"video"`.
        start (`int`): its first token.
        frames, height, width (`int`): its grid in tokens, in raster order.
        row (`int`): the batch row in which it stands.
    """

    modality: str
    start: int
    frames: int
    height: int
    width: int
    row: int = 0

    @property
    def tokens(self) -> int:
        return self.frames * self.height * self.width

    @property
    def place(self) -> slice:
        return slice(self.start, self.start + self.tokens)


@dataclass(frozen=True)
class VisualRequest:
    """All visual tokens of a forward, before the decoder.

    Args:
        features (`torch.Tensor`): (N, hidden), the tower's tokens, pictures first, then videos.
        deepstack (`list[torch.Tensor]`): per level (N, hidden).
        pieces (`tuple[Piece, ...]`): whose tokens these are, in this order.
        embeds (`torch.Tensor`): (B, T, hidden), embeddings of the row; meaningless where visual tokens stand.
        is_text (`torch.Tensor`): (B, T) boolean, true for real tokens that are not visual.
        decoder: the decoder, for policies that ask its projections.
    """

    features: torch.Tensor
    deepstack: list[torch.Tensor]
    pieces: tuple[Piece, ...]
    embeds: torch.Tensor
    is_text: torch.Tensor
    decoder: object = field(repr=False, default=None)


@dataclass(frozen=True)
class VisualPlan:
    """Which visual tokens stay, and as what.

    Args:
        keep (`torch.Tensor`): (N,) boolean; at least one in every piece.
        features (`torch.Tensor`): (N, hidden); rows that do not stay are not read.
        deepstack (`list[torch.Tensor]`): per level (N, hidden), likewise.
    """

    keep: torch.Tensor
    features: torch.Tensor
    deepstack: list[torch.Tensor]


@dataclass(frozen=True)
class LayerRequest:
    """The visual tokens on their way into a decoder layer.

    Args:
        hidden_states (`torch.Tensor`): (B, T, hidden), entering the layer.
        pieces (`torch.Tensor`): (B, T) int, 0 for text and gaps, and k for the k-th picture or frame of the row.
        valid (`torch.Tensor`): (B, T) boolean, false for padding and gaps.
        layer: the decoder layer; position_embeddings: cosine and sine (B, T, head_dim).
    """

    hidden_states: torch.Tensor
    pieces: torch.Tensor
    valid: torch.Tensor
    layer: object = field(repr=False)
    position_embeddings: tuple[torch.Tensor, torch.Tensor] = field(repr=False)
