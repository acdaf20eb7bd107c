"""How large pictures and video frames become, and how many frames are taken: plain arithmetic of the processors.

Source of the rules: Qwen Team, Qwen3-VL technical report (arXiv:2511.21631), and qwen-vl-utils.
"""

import math


MAX_ASPECT_RATIO = 200


def fit_size(
    height: int,
    width: int,
    factor: int,
    min_pixels: int,
    max_pixels: int,
    num_frames: int = 1,
    temporal_factor: int = 1,
) -> tuple[int, int]:
    """Picks the size a picture (`num_frames=1`) or every frame of a clip is resized to.

    Both sides become multiples of `factor`, the pixels of all frames together stay inside `[min_pixels, max_pixels]`,
    and the aspect ratio changes as little as that permits. What is too small is rounded up, so it can pass a maximum
    that is close to the minimum; a side never goes below `factor`.

    Args:
        height (`int`), width (`int`): size in pixels.
        factor (`int`): patch size times merge size, in pixels.
        min_pixels (`int`), max_pixels (`int`): bounds on `num_frames * height * width`.
        num_frames (`int`): frames of the clip.
        temporal_factor (`int`): frames that share one patch; the count is rounded to it when the bounds are checked.
    Returns:
        `(height, width)` in pixels.
    Raises:
        ValueError: for an empty picture, or one side more than 200 times the other.
    """
    if height < 1 or width < 1:
        raise ValueError(
            f"size must be at least 1x1 pixels, got {height}x{width} (height x width); drop the empty input."
        )
    if temporal_factor > 1 and min(height, width) < factor:
        # Clips, unlike pictures, are first brought up to one merged patch a side: the stock video rule.
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    ratio = max(height, width) / min(height, width)
    if ratio > MAX_ASPECT_RATIO:
        raise ValueError(
            f"aspect ratio must be at most {MAX_ASPECT_RATIO}, got {ratio:.1f} for {height}x{width} pixels; "
            "crop or pad it."
        )
    frames = round(num_frames / temporal_factor) * temporal_factor
    rows, columns = round(height / factor) * factor, round(width / factor) * factor
    pixels = num_frames * height * width
    if frames * rows * columns > max_pixels:
        shrink = math.sqrt(pixels / max_pixels)
        rows = max(factor, math.floor(height / shrink / factor) * factor)
        columns = max(factor, math.floor(width / shrink / factor) * factor)
    elif frames * rows * columns < min_pixels:
        grow = math.sqrt(min_pixels / pixels)
        rows = math.ceil(height * grow / factor) * factor
        columns = math.ceil(width * grow / factor) * factor
    return rows, columns


def sampled_frame_count(seconds: float, fps: float, min_frames: int, max_frames: int) -> int:
    """Frames that the video processor takes of `seconds` of video at `fps` frames a second.

    Held to `[min_frames, max_frames]`. A file that has fewer frames than that gives those it has.
    """
    return min(max(int(seconds * fps), min_frames), max_frames)
