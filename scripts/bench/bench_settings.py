"""What a benchmark run was asked for, and what it ran on."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Settings:
    """Options of one run; `quick` is for proving that a case works, its figures mean little."""

    device: str
    dtypes: tuple[str, ...]
    repeats: int
    text_layers: int
    vision_layers: int
    quick: bool
    against_itself: bool
    rows: str = ""  # only those whose label has it
    peer: Path | None = None  # llama-bench, for the cases that compare with it

    def torch_dtype(self, name: str) -> torch.dtype:
        return getattr(torch, name)


def describe_machine(settings: Settings) -> dict[str, Any]:
    """Device, threads, versions and commit, for the head of the JSON file."""
    packages = ("torch", "transformers", "numpy", "pillow")
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": settings.device,
        "device_name": _device_name(settings.device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "commit": _commit(),
        "repeats": settings.repeats,
        "quick": settings.quick,
        "against_itself": settings.against_itself,
    }


def _device_name(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} ({os.cpu_count()} logical cores)" if names else platform.machine()


def _commit() -> str:
    """The commit, with `+changes` where the tree differs; `QWEN3_VL_COMMIT` names it where there is no git."""
    if "QWEN3_VL_COMMIT" in os.environ:
        return os.environ["QWEN3_VL_COMMIT"]
    try:
        commit = _git("rev-parse", "--short=12", "HEAD")
        return f"{commit}+changes" if _git("status", "--porcelain", "--untracked-files=no") else commit
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    result = subprocess.run(["git", *arguments], cwd=REPOSITORY, check=True, capture_output=True, text=True)
    return result.stdout.strip()
