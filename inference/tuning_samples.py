"""The samples that profiles are tuned on: pictures with prompts, from a folder or a JSONL file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .answering import AnsweringError


DEFAULT_PROMPT = "Describe this image."
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")


@dataclass(frozen=True)
class Sample:
    """One request: a question, and the pictures in front of it."""

    prompt: str
    images: tuple[Path, ...] = ()


def read_samples(source: str | Path, prompt: str = DEFAULT_PROMPT, limit: int | None = None) -> list[Sample]:
    """The samples of a folder of pictures, which are all asked `prompt`, or of a JSONL file.

    A row is `{"image": path or list of paths, "prompt": text}`, either of which may be missing; paths begin at the
    file's folder.

    Args:
        limit (`int`, *optional*): the most that are taken, from the beginning.
    Raises:
        AnsweringError: if there are none, or a row is none, with its line's number.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        pictures = sorted(file for file in path.iterdir() if file.suffix.lower() in PICTURES)
        samples = [Sample(prompt, (picture,)) for picture in pictures]
    elif path.is_file():
        samples = _read_rows(path, prompt)
    else:
        raise AnsweringError(f"no samples at {path}; give a folder of pictures, or a JSONL file.")
    if not samples:
        raise AnsweringError(f"{path} holds no samples; give a folder of pictures, or a JSONL file with rows.")
    return samples[:limit]


def _read_rows(path: Path, prompt: str) -> list[Sample]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise AnsweringError(f"{path} is no text; give a folder of pictures, or a JSONL file.") from None
    return [_sample(line, f"{path}, line {n}", path.parent, prompt) for n, line in enumerate(lines, 1) if line.strip()]


def _sample(line: str, where: str, folder: Path, prompt: str) -> Sample:
    try:
        row: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise AnsweringError(f"{where} is no JSON ({error.msg}).") from None
    known = isinstance(row, dict) and set(row) <= {"image", "prompt"} and row
    images = (row.get("image") or []) if known else None
    images = [images] if isinstance(images, str) else images
    text = row.get("prompt", prompt) if known else None
    if not isinstance(text, str) or not isinstance(images, list) or not all(isinstance(x, str) for x in images):
        raise AnsweringError(f'{where} must be like {{"image": "a.png", "prompt": "What is it?"}}.')
    paths = tuple(folder / Path(image).expanduser() for image in images)
    missing = next((image for image in paths if not image.is_file()), None)
    if missing is not None:
        raise AnsweringError(f"{where} names a picture that is not there: {missing}.")
    return Sample(text, paths)
