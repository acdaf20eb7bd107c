"""Pixels to patches: the sizes, the order of patches, and the exact map from bytes to floats.

Shared by the picture and the video processor. Everything here is a plain function of arrays: no classes, no settings.
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image


PATCHES_PER_BLOCK = 64


def patchify(frames: torch.Tensor, patch_size: int, merge_size: int, temporal_patch_size: int) -> torch.Tensor:
    """Cuts frames into patches, in the order the vision tower reads them.

    Patches of one `merge_size x merge_size` block are neighbours in the result. A clip whose length is not a multiple
    of `temporal_patch_size` repeats its last frame. A single frame stays single: the caller repeats it.

    Args:
        frames (`torch.Tensor`, (frames, channels, height, width)): any dtype and memory layout.
    Returns:
        `torch.Tensor`, (patches, channels, temporal_patch_size or 1, patch_size, patch_size), contiguous, same dtype.
    """
    if frames.shape[0] == 1:
        temporal_patch_size = 1
    elif missing := -frames.shape[0] % temporal_patch_size:
        frames = torch.cat((frames, frames[-1:].expand(missing, -1, -1, -1)))
    count, channels, height, width = frames.shape
    grid_t, grid_h, grid_w = count // temporal_patch_size, height // patch_size, width // patch_size
    blocks = (
        frames.unflatten(3, (grid_w // merge_size, merge_size, patch_size))
        .unflatten(2, (grid_h // merge_size, merge_size, patch_size))
        .unflatten(0, (grid_t, temporal_patch_size))
    )  # (t, T, C, H/m, m, p, W/m, m, p)
    blocks = blocks.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return blocks.reshape(-1, channels, temporal_patch_size, patch_size, patch_size)


def unpatchify(
    patches: torch.Tensor, grid_thw: Sequence[int], patch_size: int, merge_size: int, temporal_patch_size: int
) -> torch.Tensor:
    """Puts patches back into frames: the inverse of `patchify`, for tests and for looking at what the model sees.

    Args:
        patches (`torch.Tensor`, (patches, channels * temporal_patch_size * patch_size**2)): rows of `pixel_values`.
        grid_thw (`Sequence[int]`): patches along time, height and width.
    Returns:
        `torch.Tensor`, (frames, channels, height, width).
    """
    grid_t, grid_h, grid_w = (int(n) for n in grid_thw)
    blocks = patches.reshape(
        grid_t, grid_h // merge_size, grid_w // merge_size, merge_size, merge_size, -1,
        temporal_patch_size, patch_size, patch_size,
    )  # fmt: skip
    blocks = blocks.permute(0, 6, 5, 1, 3, 7, 2, 4, 8)
    return blocks.reshape(grid_t * temporal_patch_size, -1, grid_h * patch_size, grid_w * patch_size)


def cut_picture(picture: Image.Image, patch_size: int, merge_size: int) -> np.ndarray:
    """Cuts an RGB Pillow image into byte patches, a plane at a time; the same order as `patchify`, in half the time.

    Returns:
        `np.ndarray`, (patches, 3, 1, patch_size, patch_size), uint8.
    """
    rows, columns = picture.height // (patch_size * merge_size), picture.width // (patch_size * merge_size)
    patches = np.empty((rows * columns * merge_size**2, 3, 1, patch_size, patch_size), dtype=np.uint8)
    # One row of one patch is one element of `line`: numpy then moves patch_size bytes at once.
    line = np.dtype((np.void, patch_size))
    cells = patches.view(line).reshape(rows, columns, merge_size, merge_size, 3, patch_size)
    for channel, plane in enumerate(picture.split()):
        lines = np.asarray(plane).view(line).reshape(rows, merge_size, patch_size, columns, merge_size)
        cells[..., channel, :] = lines.transpose(0, 3, 1, 4, 2)
    return patches


def write_pixels(patches: np.ndarray, table: np.ndarray, affine: tuple | None, out: np.ndarray) -> None:
    """Turns byte patches into floats, in place in `out`.

    Args:
        patches (`np.ndarray`, (patches, channels, 1 or temporal_patch_size, patch_size, patch_size)): uint8; a single
            frame is repeated to fill `out`.
        table (`np.ndarray`, (channels, 256)): float32, the value of every byte.
        affine (`tuple`, *optional*): what `find_affine` gave for `table`; without it the table is looked up.
        out (`np.ndarray`, (patches, channels, temporal_patch_size, patch_size, patch_size)): float32.
    """
    if affine is None:
        for channel, values in enumerate(table):
            out[:, channel] = values[patches[:, channel]]
        return
    divisor, shift = affine
    # Blocks that fit the cache make one pass over memory of three.
    for start in range(0, len(patches), PATCHES_PER_BLOCK):
        block = out[start : start + PATCHES_PER_BLOCK]
        block[:] = patches[start : start + PATCHES_PER_BLOCK]
        block /= divisor
        block -= shift


def find_affine(table: np.ndarray, rescale_factor: float, mean: Sequence[float], std: Sequence[float]) -> tuple | None:
    """Looks for `byte / divisor - shift` that gives every entry of `table` bit for bit.

    Two operations a pixel instead of a look-up. Float rounding decides whether they agree with the formula the table
    came from, so all 256 bytes of each channel are tried; mean and deviation 0.5, the official values, agree.

    Args:
        table (`np.ndarray`, (channels, 256)): float32.
    Returns:
        `(divisor, shift)`, float32 numbers or arrays (channels, 1, 1, 1); `None` where no such pair is exact.
    """
    divisor = np.array([deviation / rescale_factor for deviation in std], dtype=np.float32)
    shift = np.array([m / deviation for m, deviation in zip(mean, std, strict=True)], dtype=np.float32)
    byte = np.arange(256, dtype=np.float32)
    if not np.array_equal(byte / divisor[:, None] - shift[:, None], table):
        return None
    if len(set(divisor.tolist())) == len(set(shift.tolist())) == 1:
        return divisor[0], shift[0]
    return divisor.reshape(-1, 1, 1, 1), shift.reshape(-1, 1, 1, 1)
