"""Bytes, picture sizes and videos as people write them: `8GB`, `4x1024x1024`, `600s@1280x720`."""

import math
import re

from .memory_request import VideoClip


UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
DEFAULT_CLIP_SIZE = (720, 1280)


def parse_bytes(text: int | float | str, name: str = "budget") -> int:
    """Bytes out of a number or a text: `8GB` is 8 * 10**9, `8GiB` is 8 * 2**30.

    Raises:
        ValueError: for what is not an amount above 0.
    """
    hint = f"{name} must be bytes above 0 such as 8GB, 512MiB or 2000000000, got {text!r}."
    if isinstance(text, bool) or not isinstance(text, (int, float, str)):
        raise ValueError(hint)
    number, unit = text, ""
    if isinstance(text, str):
        match = re.fullmatch(r"([0-9]*\.?[0-9]+(?:e[0-9]+)?)\s*([a-z]*)", text.strip(), re.IGNORECASE)
        if not match or match[2].upper() not in UNITS:
            raise ValueError(hint)
        number, unit = float(match[1]), match[2].upper()
    size = number * UNITS[unit]
    if not math.isfinite(size) or size < 1:
        raise ValueError(hint)
    return int(size)


def format_bytes(size: int) -> str:
    """`size` with three figures and a decimal unit."""
    for unit in ("TB", "GB", "MB", "kB"):
        factor = UNITS[unit.upper()]
        if abs(size) >= factor:
            return f"{size / factor:.{2 if abs(size) < 10 * factor else 1 if abs(size) < 100 * factor else 0}f} {unit}"
    return f"{size} B"


def parse_images(text: str) -> tuple[tuple[int, int], ...]:
    """(height, width) of each picture out of `[COUNTx]WIDTHxHEIGHT`, several joined by commas.

    Raises:
        ValueError: for another form, or a number below 1.
    """
    sizes = []
    for part in text.split(","):
        match = re.fullmatch(r"(?:([0-9]+)x)?([0-9]+)x([0-9]+)", part.strip().lower())
        numbers = [int(n) for n in match.groups(default="1")] if match else [0]
        if min(numbers) < 1:
            raise ValueError(
                f"images must be [COUNTx]WIDTHxHEIGHT in pixels, such as 4x1024x1024 or 640x480, got {text!r}."
            )
        count, width, height = numbers
        sizes += [(height, width)] * count
    return tuple(sizes)


def parse_video(text: str) -> VideoClip:
    """A clip out of `SECONDSs[@WIDTHxHEIGHT]` or, of frames that are sampled already, `FRAMESf[@WIDTHxHEIGHT]`.

    Without a size it is 1280x720.
    Raises:
        ValueError: for another form, or a number that is not above 0.
    """
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)(s|f)(?:@([0-9]+)x([0-9]+))?", text.strip().lower())
    hint = f"video must be like 600s, 600s@1280x720 (WIDTHxHEIGHT) or 64f@512x512, got {text!r}."
    if not match or (match[2] == "f" and "." in match[1]):
        raise ValueError(hint)
    height, width = (int(match[4]), int(match[3])) if match[3] else DEFAULT_CLIP_SIZE
    length = {"frames": int(match[1])} if match[2] == "f" else {"seconds": float(match[1])}
    try:
        return VideoClip(height, width, **length)
    except ValueError:
        raise ValueError(hint) from None
