"""Where this package keeps files of its own on a user's machine."""

import os
from pathlib import Path


def user_cache_folder() -> Path:
    """`~/.cache/qwen3_vl`; `XDG_CACHE_HOME` counts. It need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qwen3_vl"
