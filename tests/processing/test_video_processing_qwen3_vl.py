"""Videos: sampling, sizes, pixels by the stock formulas, memory held, and what is wrong."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.video_utils import VideoMetadata

from qwen3_vl.processing.patches_qwen3_vl import unpatchify
from qwen3_vl.processing.video_processing_qwen3_vl import Qwen3VLVideoProcessor, flatten_videos, resize_frames
from qwen3_vl.processing.video_reading import AvVideo, read_video


@pytest.fixture(scope="module")
def ours():
    return Qwen3VLVideoProcessor(size={"shortest_edge": 4096, "longest_edge": 25165824})


def make_frames(count=8, height=100, width=130, seed=0):
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def stock_pixels(frames, size):
    """The stock formulas, one by one, for settings 1/255 and 0.5: torchvision's tensor resize, then the fused map."""
    video = torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous()
    video = torch.nn.functional.interpolate(video, size=size, mode="bicubic", align_corners=False, antialias=True)
    return (video.float() - 127.5) / 127.5


@pytest.mark.parametrize("count, height, width", [(2, 64, 64), (5, 100, 130), (20, 97, 201), (4, 16, 40)])
def test_pixels_are_those_of_the_stock_formulas(ours, count, height, width):
    frames = make_frames(count, height, width)
    made = ours(frames, do_sample_frames=False, return_tensors="pt")
    (grid,) = made["video_grid_thw"].tolist()
    expected = stock_pixels(frames, (grid[1] * 16, grid[2] * 16))
    back = unpatchify(made["pixel_values_videos"], grid, 16, 2, 2)
    assert torch.equal(back[:count], expected)
    assert made["pixel_values_videos"].dtype == torch.float32


def test_a_file_gives_what_its_frames_give(ours, mp4, tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(mp4)
    frames, metadata = read_video(mp4)
    facts = {"fps": metadata.fps, "total_num_frames": len(frames)}
    for settings in ({}, {"fps": 5}, {"num_frames": 7}, {"do_sample_frames": False}):
        from_file = ours(str(path), return_metadata=True, **settings)
        from_frames = ours(frames, return_metadata=True, video_metadata=facts, **settings)
        assert torch.equal(from_file["pixel_values_videos"], from_frames["pixel_values_videos"])
        assert torch.equal(from_file["video_grid_thw"], from_frames["video_grid_thw"])
        chosen = [list(made["video_metadata"][0].frames_indices) for made in (from_file, from_frames)]
        if settings != {"do_sample_frames": False}:
            assert chosen[0] == chosen[1]


def test_kinds_of_clips_agree(ours, tmp_path):
    frames = make_frames(6, 64, 96)
    pictures = [Image.fromarray(frame) for frame in frames]
    names = []
    for index, picture in enumerate(pictures):
        names.append(str(tmp_path / f"{index}.png"))
        picture.save(names[-1])
    kinds = {
        "array": frames,
        "channels second": np.moveaxis(frames, -1, 1),
        "tensor": torch.from_numpy(frames),
        "pictures": pictures,
        "arrays": list(frames),
        "files": names,
        "files as a message holds them": [[names]],
        "one of a batch": frames[None],
    }
    expected = ours(frames, do_sample_frames=False)["pixel_values_videos"]
    for name, clip in kinds.items():
        assert torch.equal(ours(clip, do_sample_frames=False)["pixel_values_videos"], expected), name
    # Chosen before they are opened.
    some = ours(names, num_frames=2, return_metadata=True)
    assert some["video_metadata"][0].frames_indices.tolist() == [0, 5]


def test_grey_alpha_and_floats(ours):
    frames = make_frames(4, 64, 64)
    settings = {"do_sample_frames": False}
    grey = ours(frames[..., :1], **settings)["pixel_values_videos"]
    assert torch.equal(grey, ours(np.repeat(frames[..., :1], 3, -1), **settings)["pixel_values_videos"])
    opaque = np.concatenate([frames, np.full_like(frames[..., :1], 255)], -1)
    assert torch.equal(
        ours(opaque, **settings)["pixel_values_videos"], ours(frames, **settings)["pixel_values_videos"]
    )
    clear = np.concatenate([frames, np.zeros_like(frames[..., :1])], -1)
    assert (ours(clear, **settings)["pixel_values_videos"] == 1).all()
    unit = ours(frames / np.float32(255), do_rescale=False, **settings)["pixel_values_videos"]
    assert torch.allclose(unit, ours(frames, **settings)["pixel_values_videos"], atol=1e-6)


def test_several_videos_and_threads(ours):
    clips = [make_frames(count, 64 + 32 * count, 96, seed=count) for count in (4, 20, 6)]
    together = ours(clips, do_sample_frames=False)
    alone = [ours(clip, do_sample_frames=False) for clip in clips]
    assert torch.equal(together["pixel_values_videos"], torch.cat([made["pixel_values_videos"] for made in alone]))
    assert torch.equal(together["video_grid_thw"], torch.cat([made["video_grid_thw"] for made in alone]))


def test_other_means_use_the_table(ours):
    settings = {
        "image_mean": [0.4, 0.5, 0.6],
        "image_std": [0.2, 0.3, 0.4],
        "do_sample_frames": False,
        "do_resize": False,
    }
    frames = make_frames(2, 64, 64)
    made = unpatchify(ours(frames, **settings)["pixel_values_videos"], (1, 4, 4), 16, 2, 2)
    mean, std = (torch.tensor(settings[name]).view(3, 1, 1) * 255 for name in ("image_mean", "image_std"))
    assert torch.equal(made, (torch.from_numpy(frames).permute(0, 3, 1, 2).float() - mean) / std)


SAMPLES = {
    "2 a second of 10 seconds": ({"total_num_frames": 250, "fps": 25.0}, {}, 20),
    "at least 4": ({"total_num_frames": 25, "fps": 25.0}, {}, 4),
    "no more than there are": ({"total_num_frames": 3, "fps": 25.0}, {}, 3),
    "at most 768": ({"total_num_frames": 90000, "fps": 25.0}, {}, 768),
    "at most what the call says": ({"total_num_frames": 90000, "fps": 25.0}, {"max_frames": 10}, 10),
    "another rate": ({"total_num_frames": 250, "fps": 25.0}, {"fps": 0.5}, 5),
    "a count": ({"total_num_frames": 250, "fps": 25.0}, {"num_frames": 9}, 9),
    "24 where nobody knows": ({"total_num_frames": 240}, {}, 20),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_sampling(ours, name):
    facts, settings, count = SAMPLES[name]
    chosen = ours.sample_frames(VideoMetadata(**facts), **settings)
    assert len(chosen) == count and chosen[0] == 0 and chosen[-1] == facts["total_num_frames"] - 1
    assert np.array_equal(chosen, np.linspace(0, facts["total_num_frames"] - 1, count).round().astype(int))


def test_the_cap_and_the_count(ours):
    sizes = [(4, 1080, 1920), (40, 360, 640), (2, 30, 40), (7, 720, 1280)]
    capped = Qwen3VLVideoProcessor(size=dict(ours.size), cap_pixels_per_frame=True)
    for size in sizes:
        assert capped.count_tokens(*size) <= ours.count_tokens(*size)
        assert capped.count_tokens(*size) <= -(-size[0] // 2) * 768
    frames = make_frames(4, 300, 500)
    for settings in (
        {},
        {"cap_pixels_per_frame": True, "max_video_tokens": 20},
        {"min_pixels": 1024, "max_pixels": 90000},
    ):
        made = ours(frames, do_sample_frames=False, **settings)
        assert len(made["pixel_values_videos"]) == ours.get_num_of_video_patches(4, 300, 500, settings)


def test_full_size_frames_do_not_pile_up(ours, make_video, monkeypatch):
    alive, most = 0, 0
    plain = AvVideo.frames

    class Counted(np.ndarray):
        def __del__(self):
            nonlocal alive
            alive -= self.base is not None and self.ndim == 3

    def counting(self, indices):
        nonlocal alive, most
        for frame in plain(self, indices):
            alive += 1
            most = max(most, alive)
            yield frame.view(Counted)

    monkeypatch.setattr(AvVideo, "frames", counting)
    made = ours(make_video(80), num_frames=80, max_pixels=100_000)
    assert made["video_grid_thw"][0, 0] == 40
    assert most <= 3 * 8


def test_real_videos(ours, real_videos):
    for path in real_videos.values():
        made = ours(str(path), return_metadata=True, max_pixels=2_000_000)
        metadata = made["video_metadata"][0]
        frames, _ = read_video(path, lambda metadata, found=metadata: found.frames_indices)
        (grid,) = made["video_grid_thw"].tolist()
        back = unpatchify(made["pixel_values_videos"], grid, 16, 2, 2)
        assert torch.equal(back[: len(frames)], stock_pixels(frames, (grid[1] * 16, grid[2] * 16)))


@pytest.mark.parametrize("resample", [Image.Resampling.BICUBIC, Image.Resampling.BILINEAR, Image.Resampling.NEAREST])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.int16])
def test_resizing_in_blocks_is_resizing_at_once(resample, dtype):
    frames = torch.from_numpy(make_frames(20)).permute(0, 3, 1, 2).to(dtype)
    whole = resize_frames(frames, (64, 160), resample)
    assert whole.dtype == dtype
    assert torch.equal(whole, torch.cat([resize_frames(block, (64, 160), resample) for block in frames.split(3)]))


def test_saving_is_stable(tmp_path, ours):
    ours.save_pretrained(tmp_path / "a")
    Qwen3VLVideoProcessor.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    first, second = ((tmp_path / name / "video_preprocessor_config.json").read_text() for name in "ab")
    assert first == second
    assert json.loads(first)["video_processor_type"] == "Qwen3VLVideoProcessor"
    loaded = Qwen3VLVideoProcessor.from_pretrained(tmp_path / "a", min_pixels=5000, max_pixels=60000)
    assert dict(loaded.size) == {"shortest_edge": 5000, "longest_edge": 60000}


def test_nesting():
    clip = make_frames(2, 32, 32)
    assert flatten_videos(["a.mp4", "b.mp4"]) == flatten_videos([["a.mp4"], ["b.mp4"]]) == ["a.mp4", "b.mp4"]
    assert flatten_videos([["a.png", "b.png"]]) == [["a.png", "b.png"]]
    assert flatten_videos([[["a", "b"], "c.mp4"]]) == [["a", "b"], "c.mp4"]
    assert len(flatten_videos([clip, [clip, clip]])) == 3
    assert flatten_videos([[], ["a.mp4"]]) == ["a.mp4"]


FRAMES = make_frames(4, 64, 64)


@pytest.mark.parametrize(
    "videos, settings, message",
    [
        ([], {}, "got no videos"),
        (FRAMES[:0], {}, "video 0 has no frames"),
        (FRAMES[:1], {"do_sample_frames": False}, "has 1 frames, fewer than temporal_patch_size=2"),
        (FRAMES[:, :10], {}, "frames of 10x64 pixels, smaller than one patch of 16"),
        (FRAMES, {"num_frames": 5}, "num_frames=5 is more than the 4 frames"),
        (FRAMES, {"num_frames": 2, "fps": 1}, "exclude each other"),
        (FRAMES, {"num_frames": 0}, "num_frames must be an integer of at least 1, got 0"),
        (FRAMES, {"fps": -1}, "fps must be a number above 0, got -1"),
        (FRAMES, {"fps": "2"}, "fps must be a number above 0, got '2'"),
        (FRAMES, {"video_metadata": {"total_num_frames": 4, "fps": 0}}, "video_metadata says fps=0"),
        (FRAMES, {"video_metadata": {"total_num_frames": 9, "fps": 2}}, "has 4 frames and its metadata says 9"),
        (FRAMES, {"video_metadata": [{"total_num_frames": 4}] * 2}, "got 2 video_metadata for 1 videos"),
        (FRAMES, {"video_metadata": {"frames": 4}}, "video_metadata takes total_num_frames"),
        (np.full((4, 64, 64, 3), np.nan, np.float32), {}, "video 0 holds NaN"),
        (np.zeros((4, 64, 64, 2), np.uint8), {}, "one axis must hold 1, 3 or 4 channels"),
        ([FRAMES[0], FRAMES[1][:50]], {}, "frames of unequal sizes"),
        (FRAMES, {"do_resize": False, "patch_size": 24}, "must be multiples of 48"),
        (FRAMES, {"resample": 1, "do_sample_frames": False, "max_pixels": 9000}, "resample=1 is not supported"),
        (FRAMES, {"size": {"shortest_edge": 5}}, None),
    ],
)
def test_what_is_wrong_is_said_in_one_line(ours, videos, settings, message):
    if message is None:
        message, videos = "size must be", FRAMES
    with pytest.raises(ValueError, match=message) as caught:
        ours(videos, **settings)
    assert "\n" not in str(caught.value)


def test_wrong_kinds(ours):
    with pytest.raises(TypeError, match=r"a video must be a path, .* got int"):
        ours(3)
    with pytest.raises(TypeError, match="has dtype bool"):
        ours(np.zeros((4, 64, 64, 3), bool))
    with pytest.raises(TypeError, match="unknown argument 'frames'"):
        ours(FRAMES, frames=3)
