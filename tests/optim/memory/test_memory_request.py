"""Sizes as people write them, and token counts against the processors'."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_vl import MemoryRequest, Qwen3VLImageProcessor, Qwen3VLVideoProcessor, VideoClip, VisualRules
from qwen3_vl.optim.memory.memory_request import measure_request
from qwen3_vl.optim.memory.memory_units import format_bytes, parse_bytes, parse_images, parse_video


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GB", 8 * 10**9),
        ("8 GiB", 8 * 2**30),
        ("1.5gb", 15 * 10**8),
        ("512MiB", 2**29),
        ("100", 100),
        (7, 7),
        (2.5e3, 2500),
        (".5k" + "b", 500),
    ],
)
def test_bytes(text, size):
    assert parse_bytes(text) == size


@given(st.integers(1, 10**14))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_bytes_survive_being_written(size):
    assert parse_bytes(format_bytes(size)) == pytest.approx(size, rel=0.006)


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("4x1024x768", [(768, 1024)] * 4),
        ("640x480", [(480, 640)]),
        ("2x32x64, 100x200", [(64, 32)] * 2 + [(200, 100)]),
    ],
)
def test_images(text, sizes):
    assert list(parse_images(text)) == sizes


@pytest.mark.parametrize("text", ["", "1024", "0x10x10", "4x", "axb", "-1x10", "1x2x3x4"])
def test_bad_images(text):
    with pytest.raises(ValueError, match="COUNTx"):
        parse_images(text)


def test_videos():
    assert parse_video("600s") == VideoClip(720, 1280, seconds=600.0)
    assert parse_video("1.5s@640x480") == VideoClip(480, 640, seconds=1.5)
    assert parse_video("64f@512x256") == VideoClip(256, 512, frames=64)


@pytest.mark.parametrize("text", ["", "600", "0s", "-5s", "1f", "1.5f", "9s@", "9s@0x4", "inf", "10min"])
def test_bad_videos(text):
    with pytest.raises(ValueError, match="video must be like"):
        parse_video(text)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "either seconds or frames"),
        ({"seconds": 3.0, "frames": 3}, "either seconds or frames"),
        ({"frames": 1}, "at least 2"),
        ({"seconds": -1.0}, "above 0"),
    ],
)
def test_bad_clips(options, words):
    with pytest.raises(ValueError, match=words):
        VideoClip(10, 10, **options)


IMAGES = {"shortest_edge": 65536, "longest_edge": 16777216}
VIDEOS = {"shortest_edge": 4096, "longest_edge": 25165824}


@given(st.integers(28, 3000), st.integers(28, 3000), st.floats(1.0, 500.0))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_counts_are_the_processors(height, width, seconds):
    pictures, videos = Qwen3VLImageProcessor(size=IMAGES), Qwen3VLVideoProcessor(size=VIDEOS)
    rules = VisualRules.of_processors(pictures, videos)
    assert rules == VisualRules()
    clip = VideoClip(height, width, seconds=seconds)
    sizes = measure_request(MemoryRequest([(height, width)] * 2, [clip]), rules)
    assert sizes.image == 2 * pictures.count_tokens(height, width)
    frames = rules.frame_count(clip)
    metadata = type("Metadata", (), {"total_num_frames": int(seconds * 30), "fps": 30.0})()
    sampled = videos.sample_frames(metadata)
    assert abs(frames - len(sampled)) <= 1  # a file's seconds are a whole number of frames
    assert sizes.video == videos.count_tokens(frames, height, width)
    assert sizes.patches("video") == 4 * sizes.video
    assert sizes.prompt == sizes.text + sizes.image + sizes.video
    assert sizes.cached == sizes.prompt + sizes.new - 1


def test_a_real_picture_and_its_plan():
    pictures, videos = Qwen3VLImageProcessor(size=IMAGES), Qwen3VLVideoProcessor(size=VIDEOS)
    rules = VisualRules.of_processors(pictures, videos)
    batch = pictures([torch.zeros(3, 300, 500, dtype=torch.uint8)], return_tensors="pt")
    sizes = measure_request(MemoryRequest([(300, 500)]), rules)
    assert batch["image_grid_thw"].tolist() == [list(grid) for grid in sizes.image_grids]
    assert len(batch["pixel_values"]) == sizes.patches("image")
    clip = torch.zeros(7, 3, 100, 200, dtype=torch.uint8)
    batch = videos([clip], do_sample_frames=False, return_tensors="pt")
    sizes = measure_request(MemoryRequest(videos=[VideoClip(100, 200, frames=7)]), rules)
    assert batch["video_grid_thw"].tolist() == [list(grid) for grid in sizes.video_grids]


def test_time_stamps_count_as_text():
    clip = VideoClip(64, 64, frames=8)
    sizes = measure_request(MemoryRequest(videos=[clip], text_tokens=10), VisualRules())
    # Four in time, each `<`, one digit, `.`, one digit, ` seconds`, `>` and two marks.
    assert sizes.text == 10 + 4 * 8
