"""What a run is asked to do, in pictures, seconds of video and tokens, and how many patches and tokens that makes."""

from dataclasses import dataclass
from typing import Any

from ...configuration.visual_sizes import fit_size, sampled_frame_count


MODALITIES = ("text", "image", "video")


@dataclass(frozen=True)
class VideoClip:
    """A video by its size and length.

    Args:
        height, width (`int`): of a frame, in pixels.
        seconds (`float`, *optional*): of video, sampled as the processor does.
        frames (`int`, *optional*): frames that are sampled already; in place of `seconds`.
    Raises:
        ValueError: for numbers that are not above 0, fewer than two frames, or both lengths or none.
    """

    height: int
    width: int
    seconds: float | None = None
    frames: int | None = None

    def __post_init__(self):
        require_count("video height", self.height)
        require_count("video width", self.width)
        if (self.seconds is None) == (self.frames is None):
            raise ValueError("a video has either seconds or frames; give one of them.")
        if self.frames is not None:
            require_count("video frames", self.frames, least=2)
        elif not 0 < self.seconds < float("inf"):
            raise ValueError(f"video seconds must be above 0, got {self.seconds}.")


@dataclass(frozen=True)
class VisualRules:
    """How the processors turn pixels into patches; the defaults are those of the released checkpoints.

    Args:
        patch_size, merge_size, temporal_patch_size (`int`): side of a patch in pixels, side of a merged token in
            patches, frames in a patch.
        image_pixels, video_pixels: least and most pixels of a picture, and of all frames of a clip together.
        fps, min_frames, max_frames: how videos are sampled.
    """

    patch_size: int = 16
    merge_size: int = 2
    temporal_patch_size: int = 2
    image_pixels: tuple[int, int] = (65536, 16777216)
    video_pixels: tuple[int, int] = (4096, 25165824)
    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 768

    @classmethod
    def of_config(cls, config) -> "VisualRules":
        """With the patch sizes of a model's configuration."""
        vision = config.vision_config
        return cls(vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size)

    @classmethod
    def of_processors(cls, image_processor: Any, video_processor: Any) -> "VisualRules":
        """With the settings of a picture and a video processor."""
        bounds = [(p.size["shortest_edge"], p.size["longest_edge"]) for p in (image_processor, video_processor)]
        sampling = {name: getattr(video_processor, name) for name in ("fps", "min_frames", "max_frames")}
        return cls(
            image_processor.patch_size,
            image_processor.merge_size,
            video_processor.temporal_patch_size,
            *bounds,
            **{name: value for name, value in sampling.items() if value is not None},
        )

    def image_grid(self, height: int, width: int) -> tuple[int, int, int]:
        """Patches in time, height and width of a picture of this size in pixels."""
        return 1, *self._patches(fit_size(height, width, self.patch_size * self.merge_size, *self.image_pixels))

    def frame_count(self, clip: VideoClip) -> int:
        """Sampled frames of a clip."""
        if clip.frames is not None:
            return clip.frames
        return sampled_frame_count(clip.seconds, self.fps, self.min_frames, self.max_frames)

    def video_grid(self, clip: VideoClip) -> tuple[int, int, int]:
        """Patches in time, height and width of a clip."""
        frames, factor = self.frame_count(clip), self.patch_size * self.merge_size
        size = fit_size(clip.height, clip.width, factor, *self.video_pixels, frames, self.temporal_patch_size)
        return -(-frames // self.temporal_patch_size), *self._patches(size)

    def stamp_tokens(self, clip: VideoClip) -> int:
        """Text tokens around the patches of a clip: `<12.5 seconds>` and two vision marks for each in time.

        Digits are a token each, as in the released tokenizer.
        """
        frames, depth = self.frame_count(clip), self.temporal_patch_size
        times = -(-frames // depth)
        seconds = clip.seconds if clip.seconds is not None else frames / self.fps
        mids = (seconds * (index + 0.5) / times for index in range(times))
        return sum(len(str(int(mid))) + 7 for mid in mids)

    def _patches(self, size: tuple[int, int]) -> tuple[int, int]:
        return size[0] // self.patch_size, size[1] // self.patch_size


@dataclass(frozen=True)
class MemoryRequest:
    """One call of `generate()` by its sizes; pictures and text are those of each row of the batch.

    Args:
        images: (height, width) in pixels of each picture.
        videos ([`VideoClip`]s): the clips.
        text_tokens (`int`): of the prompt, the chat template's included and the marks around pictures not.
        new_tokens (`int`): the most that is generated.
        batch_size, num_beams, num_return_sequences (`int`): as for `generate()`.
    Raises:
        ValueError: for sizes and counts that are negative or nothing at all.
    """

    images: tuple[tuple[int, int], ...] = ()
    videos: tuple[VideoClip, ...] = ()
    text_tokens: int = 256
    new_tokens: int = 128
    batch_size: int = 1
    num_beams: int = 1
    num_return_sequences: int = 1

    def __post_init__(self):
        object.__setattr__(self, "images", tuple(tuple(size) for size in self.images))
        object.__setattr__(self, "videos", tuple(self.videos))
        for height, width in self.images:
            require_count("image height", height)
            require_count("image width", width)
        require_count("text_tokens", self.text_tokens, least=0)
        for name in ("new_tokens", "batch_size", "num_beams", "num_return_sequences"):
            require_count(name, getattr(self, name))
        if not self.text_tokens and not self.images and not self.videos:
            raise ValueError("the request is empty; give text_tokens above 0, images or videos.")

    @property
    def rows(self) -> int:
        """Rows that the decoder runs and the cache holds."""
        return self.batch_size * max(self.num_beams, self.num_return_sequences)


@dataclass(frozen=True)
class RequestSizes:
    """A request in patches and tokens.

    Args:
        image_grids, video_grids: (time, height, width) in patches, of one row.
        text, image, video, new (`int`): tokens of one row; `new` are generated.
        merge (`int`): patches in a visual token.
    """

    image_grids: tuple[tuple[int, int, int], ...]
    video_grids: tuple[tuple[int, int, int], ...]
    text: int
    image: int
    video: int
    new: int
    merge: int

    @property
    def prompt(self) -> int:
        return self.text + self.image + self.video

    @property
    def cached(self) -> int:
        """Tokens that the cache holds at the end: all but the last one, which nothing attends to."""
        return self.prompt + self.new - 1

    def patches(self, modality: str) -> int:
        return self.merge * getattr(self, modality) if modality != "text" else 0

    @property
    def largest_frame(self) -> int:
        """Patches of the largest picture or frame, 0 without any."""
        return max((height * width for _, height, width in (*self.image_grids, *self.video_grids)), default=0)


def measure_request(request: MemoryRequest, rules: VisualRules) -> RequestSizes:
    """A request in patches and tokens, by the rules of the processors."""
    images = tuple(rules.image_grid(*size) for size in request.images)
    videos = tuple(rules.video_grid(clip) for clip in request.videos)
    merge = rules.merge_size**2
    marks = 2 * len(images) + sum(rules.stamp_tokens(clip) for clip in request.videos)
    counts = [sum(t * h * w for t, h, w in grids) // merge for grids in (images, videos)]
    return RequestSizes(images, videos, request.text_tokens + marks, *counts, request.new_tokens, merge)


def require_count(name: str, value: Any, least: int = 1) -> None:
    """Raises a `ValueError` unless `value` is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}.")
