"""Import and load time, each in a fresh interpreter: seconds and resident memory of the whole process."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench_measure import Side, make_record
from bench_pair import build_pair
from bench_settings import Settings


# Prints how long the measured part took and the most memory the process ever held. `getrusage` would not do: its
# peak survives `exec`, so a child starts with that of this process.
PROGRAM = """
import json, re, time
{before}
started = time.perf_counter()
{measured}
milliseconds = (time.perf_counter() - started) * 1000
try:
    mib = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read()).group(1)) / 1024
except OSError:
    mib = None
print(json.dumps([milliseconds, mib]))
"""
STOCK_CLASS = "from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLForConditionalGeneration as Model"
OUR_CLASS = "from qwen3_vl import Qwen3VLForConditionalGeneration as Model"


def records(settings: Settings) -> Iterator[dict[str, Any]]:
    """Yields finished records, since a subprocess cannot be run as a callable in this one."""
    yield _compare(
        "import the package", {}, ("", "import transformers, qwen3_vl"), ("", "import transformers"), settings
    )
    yield _compare("import the model class", {}, ("", OUR_CLASS), ("", STOCK_CLASS), settings)
    with tempfile.TemporaryDirectory() as folder:
        for dtype in settings.dtypes:
            size = _write_checkpoint(settings, Path(folder), dtype)
            load = f'model = Model.from_pretrained({folder!r}, dtype="auto", device_map={settings.device!r})'
            # Weights are mapped from the file: touching one element a page makes both sides hold them all.
            measured = f"{load}; [parameter.flatten()[::1024].sum() for parameter in model.parameters()]"
            yield _compare(
                f"load {size:.0f} MiB, {dtype}",
                {"dtype": dtype, "weights_mib": round(size, 1), "text_layers": settings.text_layers},
                (OUR_CLASS, measured),
                (STOCK_CLASS, measured),
                settings,
            )


def _write_checkpoint(settings: Settings, folder: Path, dtype: str) -> float:
    build_pair(settings, settings.torch_dtype(dtype), only_stock=True).stock.save_pretrained(folder)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 2**20


def _compare(
    label: str, sizes: dict[str, Any], ours: tuple[str, str], stock: tuple[str, str], settings: Settings
) -> dict[str, Any]:
    sides = {"ours": Side(), "stock": Side()}
    programs = {"ours": stock if settings.against_itself else ours, "stock": stock}
    _run(programs["ours"]), _run(programs["stock"])  # warm the file cache
    for repeat in range(settings.repeats):
        for name in ("ours", "stock") if repeat % 2 else ("stock", "ours"):
            milliseconds, peak = _run(programs[name])
            sides[name].times_ms.append(milliseconds)
            sides[name].peak_mib = max(sides[name].peak_mib or 0.0, peak) if peak else None
    extra = sides["ours"].median_ms - sides["stock"].median_ms
    return make_record(label, sizes, sides, {"extra_ms": round(extra, 1)})


def _run(program: tuple[str, str]) -> tuple[float, float | None]:
    before, measured = program
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(before=before, measured=measured)], capture_output=True, text=True
    )
    if result.returncode:
        raise RuntimeError(f"{measured!r} failed: {result.stderr.strip().splitlines()[-1]}")
    return tuple(json.loads(result.stdout.strip().splitlines()[-1]))
