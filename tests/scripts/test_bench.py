"""`python scripts/bench`: that a case runs, and what it leaves behind."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


BENCH = Path(__file__).resolve().parents[2] / "scripts" / "bench"


def run_bench(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(BENCH), *arguments], capture_output=True, text=True)


@pytest.mark.slow
def test_quick_run_writes_figures_and_a_plot(tmp_path):
    pytest.importorskip("matplotlib")
    options = ["--quick", "--repeats", "2", "--threads", "1", "--out", str(tmp_path)]
    result = run_bench("vision", "preprocessing", *options)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "speed-up" in result.stdout
    for case in ("vision", "preprocessing"):
        assert (tmp_path / f"{case}_cpu.png").stat().st_size > 1000
        values = json.loads((tmp_path / f"{case}_cpu.json").read_text())
        assert values["quick"] is True
        assert set(values) >= {"device_name", "versions", "commit", "repeats", "date", "threads"}
        row = values["rows"][0]
        assert len(row["ours"]["times_ms"]) == len(row["stock"]["times_ms"]) == 2
        assert row["speedup"] == pytest.approx(row["stock"]["median_ms"] / row["ours"]["median_ms"], rel=1e-2)
        # fp32 with the same weights and pictures.
        assert row["agreement"]["max_abs_diff"] <= 1e-4 * max(1, row["agreement"]["max_abs_stock"])


def test_unknown_case_is_named():
    result = run_bench("nonsense")
    assert result.returncode == 2
    assert "no such case: nonsense" in result.stderr
