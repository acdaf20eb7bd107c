"""What a prefix cache has to know of a request: who its tokens are, and where pictures must not be cut."""

from dataclasses import dataclass

import numpy as np
import torch

from .picture_digest import describes_pixels, picture_digests


# Of `mm_token_type_ids`, with the names of the inputs.
_MODALITIES = ((1, "pixel_values", "image_grid_thw"), (2, "pixel_values_videos", "video_grid_thw"))
_ID, _DIGEST, _POSITION = 0, slice(1, 3), slice(3, 6)
KEY_COLUMNS = 6


@dataclass(eq=False)
class PrefixRequest:
    """The prompts of a batch.

    A token is known by its id, the hash of its picture or video, and its M-RoPE position, on which its keys depend.

    Args:
        keys (`np.ndarray`): (B, T, 6) int64, those numbers for every token: id, hash (2), time, row and column.
        padding (`list[int]`): tokens of padding on the left of each row.
        pictures (`list[tuple[int, int]]`): first and last plus one of the tokens of each picture or video, in its row.
    """

    keys: np.ndarray
    padding: list[int]
    pictures: list[tuple[int, int]]

    @classmethod
    def from_inputs(
        cls,
        ids: torch.Tensor,
        types: torch.Tensor,
        positions: torch.Tensor,
        attention_mask: torch.Tensor | None,
        pictures: dict[str, torch.Tensor],
        merge: int,
    ) -> "PrefixRequest | None":
        """`None` for inputs of which a prefix cannot be told: padding elsewhere than left, features without pixels.

        Args:
            ids (`torch.Tensor`): (B, T), the whole prompt.
            types (`torch.Tensor`): (B, T), 1 for picture and 2 for video placeholders.
            positions (`torch.Tensor`): (3, B, T), M-RoPE positions.
            attention_mask (`torch.Tensor`, *optional*): (B, T).
            pictures (`dict`): `pixel_values`, `image_grid_thw` and the same of videos, as far as there are any.
            merge (`int`): `spatial_merge_size` of the vision tower.
        """
        padding = _left_padding(ids, attention_mask)
        if padding is None or types.shape != ids.shape:
            return None
        spans = []
        keys = np.zeros((*ids.shape, KEY_COLUMNS), dtype=np.int64)
        keys[..., _ID] = ids.cpu().numpy()
        keys[..., _POSITION] = positions.cpu().permute(1, 2, 0).numpy()
        types = types.cpu().numpy()
        for modality, pixels_name, grid_name in _MODALITIES:
            where = np.flatnonzero(types == modality)
            found = _put_digests(keys, where, pictures.get(pixels_name), pictures.get(grid_name), merge)
            if found is None:
                return None
            spans += found
        return cls(keys, padding, spans)

    def rows(self) -> list[np.ndarray]:
        """The real tokens of each row: (tokens, 6)."""
        return [row[padding:] for row, padding in zip(self.keys, self.padding, strict=True)]

    def before_pictures(self, length: int) -> int:
        """The largest number of tokens up to `length` that ends inside no picture or video of any row."""
        while inside := [start for start, stop in self.pictures if start < length < stop]:
            length = min(inside)
        return length

    def with_answer(self, row: int, ids: np.ndarray) -> np.ndarray:
        """The real tokens of a row and the text `ids` (new,) that was generated behind it: (tokens, 6)."""
        answer = np.zeros((len(ids), KEY_COLUMNS), dtype=np.int64)
        answer[:, _ID] = ids
        # As `generate()` counts on.
        answer[:, _POSITION] = self.keys[row, -1, _POSITION] + np.arange(1, len(ids) + 1)[:, None]
        return np.concatenate((self.keys[row, self.padding[row] :], answer))

    def begins(self, sequences: np.ndarray) -> bool:
        """Whether the rows of `sequences` (B * n, tokens) begin with these prompts, each n times."""
        rows, length = self.keys.shape[:2]
        if sequences.ndim != 2 or sequences.shape[1] < length or len(sequences) % rows:
            return False
        prompts = self.keys[..., _ID].repeat(len(sequences) // rows, axis=0)
        return bool((sequences[:, :length] == prompts).all())


def _left_padding(ids: torch.Tensor, mask: torch.Tensor | None) -> list[int] | None:
    """Tokens of padding in front of each row, or `None` if there is padding elsewhere or nothing but padding."""
    if mask is None:
        return [0] * len(ids)
    if mask.shape != ids.shape:
        return None
    real = mask.bool()
    if not bool(real[:, -1].all()) or bool((real[:, :-1] & ~real[:, 1:]).any()):
        return None
    return (~real).sum(1).tolist()


def _put_digests(keys, where, pixels, grids, merge: int) -> list[tuple[int, int]] | None:
    """Writes the pictures' hashes at the flat places `where`; returns where each picture stands in its row.

    `None` if pictures and placeholders do not match.
    """
    if grids is None or pixels is None:
        return None if len(where) or grids is not None or pixels is not None else []
    if not describes_pixels(pixels, grids):
        return None
    sizes = (grids.prod(-1) // merge**2).cpu().numpy()
    if sizes.sum() != len(where) or not sizes.all():
        return None
    numbers = np.frombuffer(b"".join(picture_digests(pixels, grids)), dtype=np.int64).reshape(-1, 2)
    keys.reshape(-1, KEY_COLUMNS)[where, _DIGEST] = numbers.repeat(sizes, axis=0)
    ends, length = sizes.cumsum(), keys.shape[1]
    first, last = where[ends - sizes], where[ends - 1]
    if (first // length != last // length).any():
        return None
    return list(zip((first % length).tolist(), (last % length + 1).tolist(), strict=True))
