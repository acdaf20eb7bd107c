"""Videos to patches, without torchvision: sampled, resized as bytes while the file decodes, cut, made floats."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import PILImageResampling
from transformers.processing_utils import VideosKwargs
from transformers.utils import logging
from transformers.video_processing_utils import VideoProcessorMixin
from transformers.video_utils import VideoMetadata

from ..configuration.visual_sizes import fit_size, sampled_frame_count
from .image_processing_qwen3_vl import check_finite, merge_pixel_bounds, open_picture, settings_of_call
from .patches_qwen3_vl import find_affine, patchify, write_pixels
from .video_reading import choose_frames, is_video_file, name_video, open_video, read_video


logger = logging.get_logger(__name__)

# Frames made at once: enough to be worth a thread, few enough that full-size frames do not pile up.
FRAMES_PER_BLOCK = 8
ASSUMED_FPS = 24
STILL_PICTURE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
INTERPOLATIONS = {
    PILImageResampling.BILINEAR: {"mode": "bilinear", "antialias": True},
    PILImageResampling.BICUBIC: {"mode": "bicubic", "antialias": True},
    PILImageResampling.NEAREST: {"mode": "nearest-exact"},
}


class Qwen3VLVideosKwargs(VideosKwargs, total=False):
    """What a call takes beyond the common video arguments.

    min_pixels (`int`, *optional*), max_pixels (`int`, *optional*):
        bounds on frames times height times width; another spelling of `size["shortest_edge"]` and
        `size["longest_edge"]`. Only inside `videos_kwargs`: as bare arguments they mean pictures, as in stock.
    patch_size (`int`), temporal_patch_size (`int`), merge_size (`int`): as in the vision config.
    min_frames (`int`), max_frames (`int`): bounds on the frames that sampling by `fps` gives.
    cap_pixels_per_frame (`bool`, *optional*):
        hold every frame to `max_video_tokens` tokens and to its share of `size["longest_edge"]`; off by default.
    max_video_tokens (`int`): tokens a frame under that cap.
    """

    min_pixels: int | None
    max_pixels: int | None
    patch_size: int
    temporal_patch_size: int
    merge_size: int
    min_frames: int
    max_frames: int
    cap_pixels_per_frame: bool | None
    max_video_tokens: int


def flatten_videos(videos: Any, depth: int = 0) -> list[Any]:
    """Lists the clips of any nesting, in order; reads nothing.

    A clip is something to decode (path, address, bytes, file), a 4-D array, or a list of frames. A list of names is a
    list of videos, except where they are named like still pictures or lie three lists deep, as chat messages put them:
    then they are the frames of one clip.
    """
    if is_video_file(videos):
        return [videos]
    if isinstance(videos, (np.ndarray, torch.Tensor)):
        return list(videos) if videos.ndim == 5 else [videos[None] if videos.ndim == 3 else videos]
    if isinstance(videos, Image.Image):
        return [[videos]]
    if not isinstance(videos, (list, tuple)):
        raise TypeError(
            f"a video must be a path, an address, bytes, an array or a list of frames, got {type(videos).__name__}."
        )
    if videos and all(_is_frame(item) for item in videos):
        return [list(videos)]
    names = bool(videos) and all(isinstance(item, (str, os.PathLike)) for item in videos)
    if names and (depth > 1 or all(str(item).lower().endswith(STILL_PICTURE_ENDINGS) for item in videos)):
        return [list(videos)]
    if not videos and depth > 1:
        raise ValueError("a video with no frames was passed; pass at least two frames, or leave it out.")
    return [clip for item in videos for clip in flatten_videos(item, depth + 1)]


def _is_frame(item: Any) -> bool:
    return isinstance(item, Image.Image) or (isinstance(item, (np.ndarray, torch.Tensor)) and item.ndim in (2, 3))


def list_metadata(video_metadata: Any, count: int) -> list[VideoMetadata | None]:
    """Lists one metadata object a clip, from an object, a dictionary or any nesting of lists.

    Raises:
        ValueError: for unknown keys, or for a number of entries other than that of the clips.
    """

    def flat(entry: Any) -> list[Any]:
        return [found for item in entry for found in flat(item)] if isinstance(entry, (list, tuple)) else [entry]

    if video_metadata is None:
        return [None] * count
    entries = flat(video_metadata)
    if len(entries) != count:
        raise ValueError(f"got {len(entries)} video_metadata for {count} videos; pass one a video.")
    try:
        return [entry if entry is None else VideoMetadata(**entry) for entry in entries]
    except TypeError as error:
        raise ValueError(
            f"video_metadata takes total_num_frames, fps, duration, frames_indices, height, width: {error}."
        ) from error


class Qwen3VLVideoProcessor(VideoProcessorMixin):
    """Makes `pixel_values_videos` and `video_grid_thw` from videos; equal to the stock one, without torchvision.

    Frames of a file are sampled (2 a second by default), decoded one by one and resized while the next ones decode:
    what stays in memory is the sampled frames at the size the model sees. The result is what resizing all of them at
    once gives. All frames of a clip get one size, so that their pixels together lie between `size["shortest_edge"]`
    and `size["longest_edge"]`.

    `from_pretrained` reads a released folder or one written by stock; what `save_pretrained` writes, stock loads.

    Source of the sampling and size rules: Qwen Team, Qwen3-VL technical report (arXiv:2511.21631), and qwen-vl-utils.
    """

    resample = PILImageResampling.BICUBIC
    size = {"shortest_edge": 128 * 32 * 32, "longest_edge": 768 * 32 * 32}
    do_resize = True
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    image_mean = (0.5, 0.5, 0.5)
    image_std = (0.5, 0.5, 0.5)
    do_convert_rgb = True
    do_sample_frames = True
    patch_size = 16
    temporal_patch_size = 2
    merge_size = 2
    fps = 2
    num_frames = None
    min_frames = 4
    max_frames = 768
    cap_pixels_per_frame = None
    max_video_tokens = 768
    return_metadata = False
    valid_kwargs = Qwen3VLVideosKwargs
    model_input_names = ["pixel_values_videos", "video_grid_thw"]

    def __init__(self, **kwargs: Any):
        size = merge_pixel_bounds(
            kwargs.pop("size", None), kwargs.pop("min_pixels", None), kwargs.pop("max_pixels", None), self.size
        )
        super().__init__(size=size, **kwargs)
        self._set_attributes(size=size, **kwargs)

    def sample_frames(
        self, metadata: VideoMetadata, num_frames: int | None = None, fps: float | None = None, **kwargs: Any
    ) -> np.ndarray:
        """Picks evenly spaced frames, the first and the last included.

        Args:
            metadata (`VideoMetadata`): of the whole video; an unknown `fps` is set to 24, with one warning.
            num_frames (`int`, *optional*): how many; without it, `fps` frames a second of video, held to
                `[min_frames, max_frames]` and to the frames there are.
            fps (`float`, *optional*): frames a second to take, `self.fps` by default; not together with `num_frames`.
        Returns:
            `np.ndarray`, (frames,), ascending frame numbers.
        Raises:
            ValueError: for both arguments, for a count that is below 1 or above the frames there are, for an fps that
                is not above 0, and for a video with no frames.
        """
        total = metadata.total_num_frames
        if not total or total < 1:
            raise ValueError("the video has no frames; pass one with at least two.")
        if num_frames is not None and fps is not None:
            raise ValueError(f"num_frames={num_frames} and fps={fps} exclude each other; pass one of them.")
        check_sampling(num_frames, fps)
        if num_frames is not None:
            if num_frames > total:
                raise ValueError(
                    f"num_frames={num_frames} is more than the {total} frames of the video; pass at most {total}."
                )
            return np.linspace(0, total - 1, num_frames).round().astype(int)
        low, high = kwargs.get("min_frames") or self.min_frames, kwargs.get("max_frames") or self.max_frames
        fps = self.fps if fps is None else fps
        if fps is None:
            count = min(max(total, low), high, total)
        else:
            if metadata.fps is None:
                warn_unknown_fps()
                metadata.fps = ASSUMED_FPS
            if not metadata.fps > 0:
                raise ValueError(f"video_metadata says fps={metadata.fps}; it must be above 0.")
            count = min(sampled_frame_count(total / metadata.fps, fps, low, high), total)
        return np.linspace(0, total - 1, count).round().astype(int)

    def fetch_videos(self, videos: Any, sample_indices_fn: Callable | None = None) -> Any:
        """Decodes files at full size: frames (frames, height, width, 3) and metadata, or a list of each for a list."""
        if isinstance(videos, list):
            return list(zip(*[self.fetch_videos(video, sample_indices_fn) for video in videos], strict=True))
        return read_video(videos, sample_indices_fn)

    def preprocess(self, videos: Any, **kwargs: Any) -> BatchFeature:
        """Samples, resizes, cuts and normalizes videos.

        Args:
            videos: one video or any nesting of lists: paths, addresses, bytes; arrays or tensors (frames, height,
                width, channels) or channels second, uint8 or floats; lists of pictures or of picture files.
            kwargs: any attribute of this class for this call; `video_metadata` for frames decoded elsewhere (with
                their `fps`; `frames_indices` if they are sampled already); `return_metadata`; `return_tensors`
                (`"pt"`, `"np"` or `None`, which gives tensors).
        Returns:
            `BatchFeature` with `pixel_values_videos` (float32, (patches of all videos, channels * temporal_patch_size
            * patch_size**2)) and `video_grid_thw` (int64, (videos, 3): patches along time, height and width).
        Raises:
            ValueError: for no videos, fewer frames than `temporal_patch_size`, frames smaller than a patch or of
                unequal sizes, wrong sampling settings, NaN, or a file that does not decode.
            TypeError: for something that is no video.
        """
        settings = self._settings(kwargs)
        clips = flatten_videos(videos)
        if not clips:
            raise ValueError("got no videos; pass at least one, or leave `videos` out.")
        metadata = list_metadata(settings["video_metadata"], len(clips))
        made = [
            self._make(clip, found, index, settings)
            for index, (clip, found) in enumerate(zip(clips, metadata, strict=True))
        ]
        patches, grids, metadata = zip(*made, strict=True)
        features = BatchFeature(
            data={
                "pixel_values_videos": patches[0] if len(patches) == 1 else torch.cat(patches),
                "video_grid_thw": torch.tensor(grids),
            },
            tensor_type=settings["return_tensors"],
        )
        if settings["device"] is not None:
            features = features.to(settings["device"])
        if settings["return_metadata"]:
            features["video_metadata"] = list(metadata)
        return features

    def _settings(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        given, settings = settings_of_call(self, kwargs)
        check_sampling(given.get("num_frames"), given.get("fps"))
        # What a call names beats what the processor holds of the other way to sample.
        if "num_frames" in given and "fps" not in given:
            settings["fps"] = None
        elif "fps" in given and "num_frames" not in given:
            settings["num_frames"] = None
        elif settings["num_frames"] is not None and not given.keys() & {"num_frames", "fps"}:
            settings["fps"] = None
        for name in ("image_mean", "image_std"):
            value = settings[name]
            settings[name] = tuple(value) if isinstance(value, Sequence) else (value,) * 3
        return settings

    def _make(
        self, clip: Any, metadata: VideoMetadata | None, index: int, settings: dict[str, Any]
    ) -> tuple[torch.Tensor, list[int], VideoMetadata]:
        """Makes one clip: its patches, its grid and its metadata."""
        sample = None
        if settings["do_sample_frames"]:
            chosen = {name: settings[name] for name in ("num_frames", "fps", "min_frames", "max_frames")}
            sample = partial(self.sample_frames, **chosen)
        depth = settings["temporal_patch_size"]
        block = -(-FRAMES_PER_BLOCK // depth) * depth
        if is_video_file(clip):
            video, name = open_video(clip), name_video(clip)
            metadata = video.metadata
            indices = choose_frames(metadata, sample)
            patches, grid, (metadata.height, metadata.width) = self._cut(
                decode_blocks(video, indices, block, name), len(indices), name, settings
            )
        else:
            clip, metadata = choose_from_memory(clip, metadata, sample, index)
            frames = clip_to_tensor(clip, index, settings["input_data_format"], settings["do_convert_rgb"])
            patches, grid, _ = self._cut(iter(frames.split(block)), len(frames), str(index), settings)
        return patches, grid, metadata

    def _cut(
        self, blocks: Iterator[torch.Tensor], count: int, name: str, settings: dict[str, Any]
    ) -> tuple[torch.Tensor, list[int], tuple[int, int]]:
        """Turns blocks of full-size frames into patches, each in a thread while the next one is made.

        Args:
            blocks (`Iterator[torch.Tensor]`, (frames, 3, height, width)): a multiple of `temporal_patch_size` frames
                each, but for the last.
            count (`int`): frames in all of them.
        Returns:
            Patches, their grid, and the (height, width) of the frames.
        """
        first = next(blocks)
        height, width = first.shape[-2:]
        size = self._target(count, height, width, name, settings)
        patch, merge, depth = (settings[name] for name in ("patch_size", "merge_size", "temporal_patch_size"))
        grid = [-(-count // depth), size[0] // patch, size[1] // patch]
        changes = settings["do_rescale"] or settings["do_normalize"]
        from_bytes = first.dtype == torch.uint8 and changes
        out = torch.empty(
            (grid[0] * grid[1] * grid[2], 3, depth, patch, patch),
            dtype=torch.float32 if from_bytes or settings["do_normalize"] else first.dtype,
        )
        table = byte_map(settings) if from_bytes else None

        def make(frames: torch.Tensor, start: int) -> None:
            patches = patchify(resize_frames(frames, size, settings["resample"]), patch, merge, depth)
            place = start // depth * grid[1] * grid[2]
            target = out[place : place + len(patches)]
            if from_bytes:
                write_pixels(patches.numpy(), *table, target.numpy())
            else:
                target.copy_(normalize_values(patches, settings, channel_axis=1))

        jobs, start, threads = [], 0, torch.get_num_threads()
        with ThreadPoolExecutor(threads) as pool:
            for frames in chain([first], blocks):
                jobs.append(pool.submit(make, frames, start))
                start += len(frames)
                if len(jobs) > threads:
                    # Full-size frames wait in no longer a queue than there are threads.
                    jobs.pop(0).result()
            for job in jobs:
                job.result()
        return out.view(len(out), -1), grid, (height, width)

    def _target(self, count: int, height: int, width: int, name: str, settings: dict[str, Any]) -> tuple[int, int]:
        """Checks a clip's frames and picks the size they get."""
        depth, patch = settings["temporal_patch_size"], settings["patch_size"]
        if count < depth:
            raise ValueError(
                f"video {name} has {count} frames, fewer than temporal_patch_size={depth}; pass a picture as an image."
            )
        if min(height, width) < patch:
            raise ValueError(
                f"video {name} has frames of {height}x{width} pixels, smaller than one patch of "
                f"{patch}; enlarge them first."
            )
        factor = patch * settings["merge_size"]
        if not settings["do_resize"]:
            if height % factor or width % factor:
                raise ValueError(
                    f"video {name} has frames of {height}x{width} pixels; without do_resize both sides "
                    f"must be multiples of {factor}."
                )
            return height, width
        return self._fit(count, height, width, factor, settings)

    def _fit(self, count: int, height: int, width: int, factor: int, settings: dict[str, Any]) -> tuple[int, int]:
        fewest, most = settings["size"]["shortest_edge"], settings["size"]["longest_edge"]
        if settings["cap_pixels_per_frame"]:
            share = min(settings["max_video_tokens"] * factor**2, most // count)
            most = max(share, int(fewest * 1.05)) * count
        return fit_size(height, width, factor, fewest, most, count, settings["temporal_patch_size"])

    def get_num_of_video_patches(
        self, num_frames: int, height: int, width: int, videos_kwargs: dict | None = None
    ) -> int:
        """Counts the patches of a clip of this size without making it; vLLM calls this by name.

        Args:
            num_frames (`int`): frames after sampling.
            height (`int`), width (`int`): size in pixels before resizing.
            videos_kwargs (`dict`, *optional*): settings of the call, such as `size` or `cap_pixels_per_frame`.
        """
        known = {
            name: value for name, value in (videos_kwargs or {}).items() if name in self.valid_kwargs.__annotations__
        }
        settings = self._settings(known)
        patch, depth = settings["patch_size"], settings["temporal_patch_size"]
        if num_frames < depth:
            raise ValueError(
                f"num_frames={num_frames} is below temporal_patch_size={depth}; a video needs at least {depth}."
            )
        height, width = self._fit(num_frames, height, width, patch * settings["merge_size"], settings)
        return -(-num_frames // depth) * (height // patch) * (width // patch)

    def count_tokens(self, num_frames: int, height: int, width: int, **videos_kwargs: Any) -> int:
        """Counts the placeholder tokens a clip of this size takes in the prompt, without those of its time stamps."""
        merge = videos_kwargs.get("merge_size") or self.merge_size
        return self.get_num_of_video_patches(num_frames, height, width, videos_kwargs) // merge**2

    def to_dict(self) -> dict[str, Any]:
        written = super().to_dict()
        written["video_processor_type"] = "Qwen3VLVideoProcessor"
        written["processor_class"] = "Qwen3VLProcessor"
        return written


def warn_unknown_fps() -> None:
    """Says once that time stamps rest on a guess."""
    logger.warning_once(
        f"The frames a second of a video are unknown; {ASSUMED_FPS} is assumed. "
        "Pass video_metadata with fps for true times."
    )


def check_sampling(num_frames: Any, fps: Any) -> None:
    """Raises for a frame count or rate that cannot be sampled by."""
    if num_frames is not None and (
        isinstance(num_frames, bool) or not isinstance(num_frames, (int, np.integer)) or num_frames < 1
    ):
        raise ValueError(f"num_frames must be an integer of at least 1, got {num_frames!r}.")
    if fps is not None and (
        isinstance(fps, bool) or not isinstance(fps, (int, float, np.number)) or not 0 < fps < float("inf")
    ):
        raise ValueError(f"fps must be a number above 0, got {fps!r}.")


def choose_from_memory(
    clip: Any, metadata: VideoMetadata | None, sample: Callable | None, index: int
) -> tuple[Any, VideoMetadata]:
    """Takes the sampled frames of a clip that is already decoded, or of a list of picture files."""
    if len(clip) == 0:
        raise ValueError(f"video {index} has no frames; pass at least two, or leave it out.")
    if metadata is None:
        metadata = VideoMetadata(total_num_frames=len(clip), frames_indices=list(range(len(clip))))
    if sample is None:
        if metadata.frames_indices is None:
            metadata.frames_indices = list(range(len(clip)))
        return clip, metadata
    if metadata.total_num_frames != len(clip):
        raise ValueError(
            f"video {index} has {len(clip)} frames and its metadata says {metadata.total_num_frames}; correct it, "
            "or pass do_sample_frames=False if the frames are sampled already."
        )
    indices = choose_frames(metadata, sample)
    return ([clip[i] for i in indices] if isinstance(clip, list) else clip[indices]), metadata


def clip_to_tensor(clip: Any, index: int, input_data_format: Any = None, do_convert_rgb: bool = True) -> torch.Tensor:
    """Brings decoded frames to one tensor (frames, 3, height, width), by view where it can.

    Grey is repeated; alpha is blended over white, in float32, as in stock.

    Raises:
        ValueError: for frames of unequal sizes, for a shape that is no video, or for NaN.
        TypeError: for a dtype that holds no pixel values.
    """
    if isinstance(clip, list):
        frames = [_frame_array(frame) for frame in clip]
        if len({frame.shape for frame in frames}) > 1:
            raise ValueError(
                f"video {index} has frames of unequal sizes, {frames[0].shape} and others; bring them to one."
            )
        clip = np.stack(frames)
    video = torch.from_numpy(clip) if isinstance(clip, np.ndarray) and clip.dtype.kind in "uif" else clip
    video = video.detach().cpu() if isinstance(video, torch.Tensor) else video
    if not isinstance(video, torch.Tensor) or video.dtype == torch.bool or video.is_complex():
        raise TypeError(f"video {index} has dtype {clip.dtype}; pass uint8, another integer type, or floats.")
    if video.ndim != 4:
        raise ValueError(
            f"video {index} has shape {tuple(video.shape)}; "
            "pass (frames, height, width, 3) or (frames, 3, height, width)."
        )
    layout = getattr(input_data_format, "value", input_data_format)
    if layout is None:
        first, last = video.shape[1], video.shape[3]
        layout = "channels_first" if first in (1, 3) or (first == 4 and last not in (1, 3, 4)) else "channels_last"
    if layout == "channels_last":
        video = video.permute(0, 3, 1, 2)
    channels = video.shape[1]
    if channels not in (1, 3, 4):
        raise ValueError(
            f"video {index} has shape {tuple(clip.shape)}; "
            "one axis must hold 1, 3 or 4 channels; say which with input_data_format."
        )
    if video.is_floating_point():
        check_finite(video, f"video {index}")
    if channels == 1:
        return video.expand(-1, 3, -1, -1)
    if channels == 4:
        if not do_convert_rgb:
            raise ValueError(f"video {index} has an alpha channel, and the model takes RGB; pass do_convert_rgb=True.")
        if not (video[:, 3] < 255).any():
            return video[:, :3]
        alpha = video[:, 3:] / 255.0
        return (1 - alpha) * 255 + alpha * video[:, :3]
    return video


def _frame_array(frame: Any) -> np.ndarray:
    if isinstance(frame, (str, os.PathLike)):
        frame = open_picture(str(frame))
    if isinstance(frame, Image.Image):
        return np.array(frame if frame.mode in ("RGB", "RGBA") else frame.convert("RGB"))
    frame = frame.detach().cpu().numpy() if isinstance(frame, torch.Tensor) else frame
    return frame[..., None] if frame.ndim == 2 else frame


def resize_frames(frames: torch.Tensor, size: tuple[int, int], resample: int) -> torch.Tensor:
    """Resizes frames with antialiasing, as torchvision's tensor path does, byte for byte.

    Bytes are resized as bytes: torch has a kernel for it, on one thread. Frames do not depend on each other, so any
    split of a clip gives the same.

    Args:
        frames (`torch.Tensor`, (frames, channels, height, width)): any dtype; channels-last memory is fastest.
        size (`tuple[int, int]`): (height, width) in pixels.
        resample (`int`): a Pillow resampling filter: bicubic, bilinear or nearest.
    Raises:
        ValueError: for another filter.
    """
    if tuple(frames.shape[-2:]) == tuple(size):
        return frames
    if resample not in INTERPOLATIONS:
        raise ValueError(f"resample={resample!r} is not supported for videos; pass BICUBIC, BILINEAR or NEAREST.")
    options = dict(INTERPOLATIONS[resample])
    if options["mode"] != "nearest-exact":
        options["align_corners"] = False
    dtype = frames.dtype
    native = dtype in (torch.uint8, torch.float32, torch.float64)
    resized = F.interpolate(frames if native else frames.float(), size=size, **options)
    return resized if native else (resized if dtype.is_floating_point else resized.round_()).to(dtype)


def normalize_values(values: torch.Tensor, settings: dict[str, Any], channel_axis: int = 0) -> torch.Tensor:
    """Rescales and normalizes in the stock order: both at once in float32, mean and deviation scaled up instead."""
    shape = [1] * values.ndim
    shape[channel_axis] = 3
    if not settings["do_normalize"]:
        return values * settings["rescale_factor"] if settings["do_rescale"] else values
    mean, std = (torch.tensor(settings[name]) for name in ("image_mean", "image_std"))
    if settings["do_rescale"]:
        mean, std = (scaled * (1.0 / settings["rescale_factor"]) for scaled in (mean, std))
    return (values.to(torch.float32) - mean.view(shape)) / std.view(shape)


def byte_map(settings: dict[str, Any]) -> tuple[np.ndarray, tuple | None]:
    """The float of each of the 256 bytes of a channel, (3, 256) float32, and what `find_affine` gives for it."""
    table = normalize_values(torch.arange(256, dtype=torch.uint8).repeat(3, 1), settings).numpy()
    factor = settings["rescale_factor"] if settings["do_rescale"] else 1.0
    mean, std = (settings["image_mean"], settings["image_std"]) if settings["do_normalize"] else ((0,) * 3, (1,) * 3)
    return table, find_affine(table, factor, mean, std)


def decode_blocks(video: Any, indices: list[int], block: int, name: str) -> Iterator[torch.Tensor]:
    """Decodes frames into tensors (up to `block` frames, 3, height, width), a view of channels-last memory.

    Raises:
        ValueError: for a video whose frames change their size on the way.
    """
    frames: list[np.ndarray] = []
    shape = None
    for done, frame in enumerate(video.frames(indices), start=1):
        shape = shape or frame.shape
        if frame.shape != shape:
            raise ValueError(
                f"video {name} changes its size from {shape[:2]} to {frame.shape[:2]}; re-encode it to one size."
            )
        frames.append(frame)
        if len(frames) == block or done == len(indices):
            yield torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)
            frames.clear()
