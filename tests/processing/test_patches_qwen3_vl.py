"""Sizes, the order of patches, and the map from bytes to floats."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as stock_picture_size
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize as stock_video_size

from qwen3_vl.configuration.visual_sizes import fit_size
from qwen3_vl.processing.patches_qwen3_vl import (
    cut_picture,
    find_affine,
    patchify,
    unpatchify,
    write_pixels,
)


BOUNDS = [(65536, 16777216), (3136, 12845056), (1024, 200_000), (500_000, 600_000)]


def random_sizes(count, seed=0):
    generator = np.random.default_rng(seed)
    return [tuple(int(side) for side in np.exp(generator.uniform(2.8, 8, 2))) for _ in range(count)]


@pytest.mark.parametrize("low, high", BOUNDS)
def test_picture_sizes_are_those_of_stock_and_keep_the_promises(low, high):
    for height, width in random_sizes(400):
        if max(height, width) / min(height, width) > 200:
            continue
        rows, columns = fit_size(height, width, 32, low, high)
        assert (rows, columns) == stock_picture_size(height, width, 32, low, high)
        assert rows % 32 == columns % 32 == 0
        # A picture that has to grow is rounded up, even past a maximum that close.
        assert rows * columns <= high or 32 in (rows, columns) or height * width < low
        if min(rows, columns) >= 640:
            # At most 32 pixels off on each side.
            assert 0.85 < (rows / columns) / (height / width) < 1.18


@pytest.mark.parametrize("frames", [2, 3, 8, 21, 768])
@pytest.mark.parametrize("low, high", [(4096, 25165824), (131072, 786432)])
def test_video_sizes_are_those_of_stock(frames, low, high):
    for height, width in [*random_sizes(200, frames), (17, 40), (16, 16)]:
        if max(height, width) / min(height, width) > 150:
            continue
        ours = fit_size(height, width, 32, low, high, frames, 2)
        assert ours == stock_video_size(frames, height, width, 2, 32, low, high)


@pytest.mark.parametrize("height, width", [(0, 5), (1, 300), (4000, 16)])
def test_sizes_that_no_picture_can_have(height, width):
    with pytest.raises(ValueError, match=r"aspect ratio must be at most 200|at least 1x1"):
        fit_size(height, width, 32, 65536, 16777216)


@pytest.mark.parametrize("frames, patch, merge, depth", [(2, 16, 2, 2), (5, 4, 2, 2), (6, 4, 1, 3), (1, 8, 2, 1)])
def test_patches_go_back_to_the_frames_they_came_from(frames, patch, merge, depth):
    video = torch.arange(frames * 3 * (6 * patch) * (4 * patch)).view(frames, 3, 6 * patch, 4 * patch)
    patches = patchify(video, patch, merge, depth)
    grid = (-(-frames // depth), 6, 4)
    back = unpatchify(patches.flatten(1), grid, patch, merge, depth)
    assert torch.equal(back[:frames], video)
    assert all(torch.equal(frame, video[-1]) for frame in back[frames:])
    # The order: the first merge*merge patches are one square block.
    assert torch.equal(patches[0, :, 0], video[0, :, :patch, :patch])
    if merge == 2:
        assert torch.equal(patches[2, :, 0], video[0, :, patch : 2 * patch, :patch])


def test_memory_layout_does_not_matter():
    video = torch.randint(0, 256, (4, 3, 64, 96), dtype=torch.uint8)
    assert torch.equal(patchify(video, 16, 2, 2), patchify(video.to(memory_format=torch.channels_last), 16, 2, 2))


def test_the_fast_cut_is_the_plain_cut():
    pixels = np.random.default_rng(0).integers(0, 256, (96, 160, 3), dtype=np.uint8)
    plain = patchify(torch.from_numpy(pixels).permute(2, 0, 1)[None], 16, 2, 2)
    assert np.array_equal(cut_picture(Image.fromarray(pixels), 16, 2), plain.numpy())


@pytest.mark.parametrize("mean, std", [((0.5,) * 3, (0.5,) * 3), ((0.48, 0.46, 0.41), (0.27, 0.26, 0.28))])
def test_floats_are_the_table_with_and_without_the_short_cut(mean, std):
    byte = np.arange(256, dtype=np.float32) / np.float32(255)
    table = np.stack([(byte - np.float32(m)) / np.float32(s) for m, s in zip(mean, std, strict=True)])
    affine = find_affine(table, 1 / 255, mean, std)
    assert (affine is not None) == (mean[0] == 0.5)
    patches = np.random.default_rng(0).integers(0, 256, (130, 3, 1, 4, 4), dtype=np.uint8)
    expected = np.stack([table[channel][patches[:, channel]] for channel in range(3)], axis=1)
    for short_cut in {affine, None}:
        out = np.empty((130, 3, 2, 4, 4), np.float32)
        write_pixels(patches, table, short_cut, out)
        assert np.array_equal(out, np.broadcast_to(expected, out.shape))
