"""Frames of a video file, decoding no more than was asked for: sampled frames only, never the whole film in memory.

Needs PyAV (`pip install qwen3-vl[video]`) or torchcodec, and only when a file is opened.
"""

import bisect
import io
import os
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from importlib import import_module
from typing import Any

import numpy as np
from transformers.video_utils import VideoMetadata


# Jumping to a key frame costs about as much as decoding this many frames.
FRAMES_WORTH_A_SEEK = 8
DOWNLOAD_TIMEOUT_SECONDS = 60


def name_video(source: Any) -> str:
    """Names a video for an error message, in a few words whatever it holds."""
    if isinstance(source, (bytes, bytearray)):
        return f"of {len(source)} bytes"
    if isinstance(source, (str, os.PathLike)):
        text = str(source)
        return repr(text if len(text) <= 120 else text[:100] + "…")
    return f"from {type(source).__name__}"


def is_video_file(source: Any) -> bool:
    """Whether `source` is something to open and decode: a path, an address, bytes or a binary file."""
    return isinstance(source, (str, os.PathLike, bytes, bytearray)) or hasattr(source, "read")


def open_video(source: Any, backend: str | None = None) -> "AvVideo | TorchcodecVideo":
    """Opens a video for reading frames by number.

    Args:
        source: a path, a `file://` or `http(s)://` address (downloaded whole), the file's bytes, or an open binary
            file.
        backend (`str`, *optional*): `"pyav"` or `"torchcodec"`; by default the first of them that imports.
    Raises:
        ImportError: if neither is installed, with the command that installs one.
        FileNotFoundError: for a path that is not there.
        ValueError: for a file that is no video, is damaged, or holds no frames.
    """
    readers = {"pyav": AvVideo, "torchcodec": TorchcodecVideo}
    if backend is not None and backend not in readers:
        raise ValueError(f"backend must be 'pyav' or 'torchcodec', got {backend!r}.")
    file = _local_file(source)
    for name in [backend] if backend else readers:
        try:
            return readers[name](file, name_video(source))
        except (ImportError, RuntimeError):
            # torchcodec raises RuntimeError where the FFmpeg libraries are missing.
            continue
    raise ImportError(
        f"reading video {name_video(source)} needs {backend or 'PyAV'}: pip install "
        f"{'torchcodec' if backend == 'torchcodec' else 'qwen3-vl[video]'}; or pass decoded frames."
    )


def _local_file(source: Any) -> Any:
    if isinstance(source, (bytes, bytearray)):
        return io.BytesIO(source)
    if not isinstance(source, (str, os.PathLike)):
        return source
    path = str(source)
    if path.startswith(("http://", "https://")):
        request = urllib.request.Request(path, headers={"User-Agent": "qwen3-vl"})
        with urllib.request.urlopen(request, timeout=DOWNLOAD_TIMEOUT_SECONDS) as response:
            return io.BytesIO(response.read())
    path = path.removeprefix("file://")
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"video {name_video(source)} is no existing file; pass a path, an http(s) address or bytes."
        )
    return path


class AvVideo:
    """A video read with PyAV.

    Opening reads the packets without decoding them, so that the number of frames is exact and frames can be found by
    their time stamp; `frames` then jumps between key frames where that saves decoding. One frame is in memory at a
    time.

    Attributes:
        metadata (`VideoMetadata`): frames, frames a second, seconds, and the stored height and width.
    """

    def __init__(self, file: Any, name: str):
        # Through importlib: the Hub loader takes a plain import, even here, for something every user must install.
        self._av, self._file, self.name = import_module("av"), file, name
        try:
            with self._open() as container:
                stream = self._video_stream(container)
                self._index_packets(container, stream)
                rate = stream.average_rate or stream.guessed_rate
                seconds = float(stream.duration * stream.time_base) if stream.duration else None
                height, width = stream.height, stream.width
        except self._av.FFmpegError as error:
            raise self._unreadable(error) from error
        if not self.total_num_frames:
            raise ValueError(f"video {name} has no frames; pass a video with at least two.")
        fps = float(rate) if rate else (self.total_num_frames / seconds if seconds else None)
        self.metadata = VideoMetadata(
            total_num_frames=self.total_num_frames,
            fps=fps,
            duration=self.total_num_frames / fps if fps else seconds,
            video_backend="pyav",
            height=height,
            width=width,
        )

    def _open(self) -> Any:
        if hasattr(self._file, "seek"):
            self._file.seek(0)
        container = self._av.open(self._file)
        for stream in container.streams.video:
            stream.thread_type = "AUTO"
        return container

    def _video_stream(self, container: Any) -> Any:
        if not container.streams.video:
            raise ValueError(f"video {self.name} has no video stream; pass a file with pictures.")
        return container.streams.video[0]

    def _unreadable(self, error: Exception | None) -> ValueError:
        reason = getattr(error, "strerror", None) or str(error or "no frame decodes")
        return ValueError(f"video {self.name} cannot be decoded ({reason}); pass a whole, undamaged video file.")

    def _damaged(self, index: int) -> ValueError:
        return ValueError(
            f"video {self.name} is damaged: frame {index} of {self.total_num_frames} does not decode; re-encode it."
        )

    def _index_packets(self, container: Any, stream: Any) -> None:
        stamps, keys = [], []
        for packet in container.demux(stream):
            if packet.size and not getattr(packet, "is_discard", False):
                stamps.append(packet.pts)
                if packet.is_keyframe:
                    keys.append(packet.pts)
        self.total_num_frames = len(stamps)
        known = None not in stamps and len(set(stamps)) == len(stamps)
        # Without distinct stamps a frame is only its place in the stream: count from the start.
        self._stamps = sorted(stamps) if known else None
        self._keys = sorted(keys) if known else []

    def frames(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        """Decodes the frames at `indices` (ascending, repeats allowed), one at a time.

        Yields:
            `np.ndarray`, (height, width, 3), uint8 RGB, upright by the file's display matrix.
        Raises:
            ValueError: for a frame that cannot be decoded.
        """
        find = self._by_stamp if self._stamps else self._by_count
        try:
            for frame, repeats in find(Counter(indices)):
                pixels = frame.to_ndarray(format="rgb24")
                # The matrix turns counter-clockwise by `rotation` degrees, and so does rot90.
                if turns := round(getattr(frame, "rotation", 0) / 90) % 4:
                    pixels = np.ascontiguousarray(np.rot90(pixels, turns))
                for _ in range(repeats):
                    yield pixels
        except self._av.FFmpegError as error:
            raise self._unreadable(error) from error

    def _decoded(self, container: Any, start_stamp: int | None = None) -> Iterator[Any]:
        """Decodes on from where `container` stands, or from the key frame at `start_stamp`."""
        stream = self._video_stream(container)
        if start_stamp is not None:
            container.seek(start_stamp, stream=stream, backward=True)
        for packet in container.demux(stream):
            try:
                yield from packet.decode()
            except self._av.error.InvalidDataError:
                # One bad packet; whether a frame that was asked for is missing shows later.
                continue

    def _by_stamp(self, repeats: Counter) -> Iterator[tuple[Any, int]]:
        with ExitStack() as files:
            container = files.enter_context(self._open())
            decoder, position, seeks_land = self._decoded(container), -1, True  # position: newest frame taken
            for index in sorted(repeats):
                stamp = self._stamps[index]
                place = bisect.bisect_right(self._keys, stamp)
                key = self._keys[place - 1] if place and seeks_land else None
                jumps = key is not None and bisect.bisect_left(self._stamps, key) > position + FRAMES_WORTH_A_SEEK
                if jumps:
                    decoder = self._decoded(container, key)
                frame = _first_from(stamp, decoder)
                if jumps and (frame is None or frame.pts > stamp):
                    # MPEG-TS and its like have no index: a seek can land behind the frame. From the start, then.
                    seeks_land, decoder = False, self._decoded(files.enter_context(self._open()))
                    frame = _first_from(stamp, decoder)
                if frame is None or frame.pts > stamp:
                    raise self._unreadable(None) if position < 0 and frame is None else self._damaged(index)
                position = index
                yield frame, repeats[index]

    def _by_count(self, repeats: Counter) -> Iterator[tuple[Any, int]]:
        position, last = -1, max(repeats)
        with self._open() as container:
            for position, frame in enumerate(self._decoded(container)):
                if position in repeats:
                    yield frame, repeats[position]
                if position == last:
                    return
        raise self._unreadable(None) if position < 0 else self._damaged(position + 1)


def _first_from(stamp: int, frames: Iterator[Any]) -> Any:
    """The first frame at or after `stamp`, or `None`."""
    return next((frame for frame in frames if frame.pts is not None and frame.pts >= stamp), None)


class TorchcodecVideo:
    """A video read with torchcodec, in blocks of frames; same interface as `AvVideo`."""

    def __init__(self, file: Any, name: str):
        self.name = name
        content = file.read() if hasattr(file, "read") else file
        self._decoder = import_module("torchcodec.decoders").VideoDecoder(
            content, seek_mode="exact", num_ffmpeg_threads=0
        )
        found = self._decoder.metadata
        self.total_num_frames = int(found.num_frames or 0)
        if not self.total_num_frames:
            raise ValueError(f"video {name} has no frames; pass a video with at least two.")
        self.metadata = VideoMetadata(
            total_num_frames=self.total_num_frames,
            fps=found.average_fps,
            duration=found.duration_seconds,
            video_backend="torchcodec",
            height=found.height,
            width=found.width,
        )

    def frames(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        for start in range(0, len(indices), FRAMES_WORTH_A_SEEK):
            block = self._decoder.get_frames_at(indices=list(indices[start : start + FRAMES_WORTH_A_SEEK])).data
            yield from block.permute(0, 2, 3, 1).numpy()


def read_video(
    source: Any, sample_indices_fn: Callable[..., Sequence[int]] | None = None, backend: str | None = None
) -> tuple[np.ndarray, VideoMetadata]:
    """Decodes the sampled frames of one video at full size.

    Args:
        source: as for `open_video`.
        sample_indices_fn (`Callable`, *optional*): gets `metadata=`, gives the frame numbers; all frames without it.
    Returns:
        Frames, (frames, height, width, 3) uint8 RGB, and the metadata with `frames_indices` filled in.
    """
    video = open_video(source, backend)
    indices = choose_frames(video.metadata, sample_indices_fn)
    frames = list(video.frames(indices))
    return np.stack(frames), video.metadata


def choose_frames(metadata: VideoMetadata, sample_indices_fn: Callable[..., Sequence[int]] | None) -> list[int]:
    """Asks for the frame numbers, checks them and notes them in `metadata` (in place)."""
    total = metadata.total_num_frames
    chosen = range(total) if sample_indices_fn is None else sample_indices_fn(metadata=metadata)
    indices = [int(index) for index in chosen]
    shown = f"{indices[:8]}{'…' if len(indices) > 8 else ''}"
    if not indices or min(indices) < 0 or max(indices) >= total:
        raise ValueError(f"frames to sample must be numbers from 0 to {total - 1}, got {shown}.")
    if indices != sorted(indices):
        raise ValueError(f"frames to sample must ascend, got {shown}; sort them.")
    metadata.frames_indices = np.array(indices)
    return indices
