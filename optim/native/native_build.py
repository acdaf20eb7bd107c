"""Compiles C++ once on the user's machine and loads it; without a compiler the plain PyTorch paths serve.

The library lies in `~/.cache/qwen3_vl/native` (`XDG_CACHE_HOME` counts; `QWEN3_VL_NATIVE_CACHE` names another folder)
under a hash of source, flags, compiler and processor. `QWEN3_VL_NATIVE=0` switches native kernels off.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from transformers.utils import logging

from ..user_cache import user_cache_folder


logger = logging.get_logger(__name__)

# No flag may reorder additions or assume finite numbers: masks are infinities.
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-w")
FLAGS += ("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-ffp-contract=fast")
COMPILE_SECONDS = 300


@cache
def load_library(name: str, source: str, flags: tuple[str, ...] = ()) -> ctypes.CDLL | None:
    """The compiled `source`, or `None` with one warning that says why there is none.

    Args:
        name (`str`): begins the file's name.
        source (`str`): C++17 with `extern "C"` functions; OpenMP is used where the compiler has it.
        flags (`tuple`): for the compiler, behind the usual ones.
    """
    if os.environ.get("QWEN3_VL_NATIVE", "1") == "0":
        return None
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return _without(name, "no C++ compiler was found (g++, clang++ or $CXX)")
    try:
        path = _library_path(name, source, compiler, flags)
        if not path.is_file():
            _compile(compiler, source, path, flags)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        return _without(name, detail.strip().splitlines()[0] if detail.strip() else type(error).__name__)


def takes_native(*tensors: torch.Tensor) -> bool:
    """Whether native kernels may see these tensors at all: they have no backward and no place in a traced graph."""
    return (
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and all(type(x) in (torch.Tensor, torch.nn.Parameter) and x.device.type == "cpu" for x in tensors)
        and all(x.dtype in (torch.float32, torch.bfloat16) for x in tensors)
        and not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))
    )


def _without(name: str, reason: str) -> None:
    logger.warning_once(f"native {name} kernels are off, plain PyTorch runs instead: {reason}.")


def _machine_flags() -> list[str]:
    arm = platform.machine().lower() in ("arm64", "aarch64")
    return ["-mcpu=native" if arm else "-march=native"]


def _library_path(name: str, source: str, compiler: str, flags: tuple[str, ...]) -> Path:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    # A home folder may be shared by machines, so the processor counts: code for another one may not run here.
    parts = (source, *FLAGS, *flags, *_machine_flags(), version, _processor())
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
    return _cache_folder() / f"{name}-{digest}.so"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next((x for x in lines if x.startswith(("flags", "Features"))), platform.processor())
    except OSError:
        return platform.processor() + torch.backends.cpu.get_cpu_capability()


def _cache_folder() -> Path:
    """A folder that only this user can write, since what lies there is run."""
    folder = Path(os.environ.get("QWEN3_VL_NATIVE_CACHE") or user_cache_folder() / "native")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    foreign = hasattr(os, "getuid") and status.st_uid != os.getuid()
    if foreign or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise OSError(f"{folder} can be written by others; set QWEN3_VL_NATIVE_CACHE to a folder of your own")
    return folder


def _compile(compiler: str, source: str, path: Path, flags: tuple[str, ...]) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        code, library = Path(folder) / "kernels.cpp", Path(folder) / path.name
        code.write_text(source, encoding="utf-8")
        command = [compiler, *FLAGS, *flags, *_machine_flags(), str(code), "-o", str(library)]
        try:
            # `torch` has loaded the OpenMP runtime of the same name already, so both share one pool of threads.
            _run([*command, "-fopenmp"])
        except subprocess.CalledProcessError:
            _run(command)
        os.replace(library, path)  # two processes that compile at once both leave a whole file


def _run(command: list[str]) -> None:
    subprocess.run(command, capture_output=True, text=True, check=True, timeout=COMPILE_SECONDS)
