"""`qwen3-vl doctor`: what it says of this machine, and of techniques that fail in each way they can."""

import importlib.metadata
import json
import logging
import shutil
import subprocess
import sys

import pytest
import torch
from transformers.utils import logging as transformers_logging
from typer.testing import CliRunner

from qwen3_vl.inference import cli, doctor_checks, doctor_command
from qwen3_vl.inference.cli import app
from qwen3_vl.inference.doctor_checks import Trial, check_kernels, check_techniques
from qwen3_vl.optim.native.native_build import load_library
from qwen3_vl.optim.native.native_linear import linear_kernel
from qwen3_vl.optim.registry_optim import TECHNIQUES
from qwen3_vl.optim.technique_optim import Technique


FEW = ("qwen3_vl_exact", "paged_cache", "quantized_cache", "faster_rotary", "decode_linear", "adaptive_sparse")
needs_kernels = pytest.mark.skipif(linear_kernel() is None, reason="no C++ compiler")


@pytest.fixture(autouse=True)
def _libraries_stay_as_loud_as_they_are(monkeypatch):
    monkeypatch.setattr(cli, "_quieten_libraries", lambda: None)


@pytest.fixture
def few(monkeypatch):
    """The registry, without those that take long; a test may add to it."""
    chosen = {name: TECHNIQUES[name] for name in FEW}
    monkeypatch.setattr(doctor_checks, "TECHNIQUES", chosen)
    return chosen


@pytest.fixture
def fresh_kernels():
    """Each kernel is looked for anew, and warned of anew."""

    def forget():
        load_library.cache_clear()
        transformers_logging.warning_once.cache_clear()

    forget()
    yield
    forget()


def call(*arguments):
    return CliRunner().invoke(app, ["doctor", "--device", "cpu", *arguments], env={"COLUMNS": "200"})


def by_name(checks):
    return {check.name: check for check in checks}


def technique(label, apply, is_exact=False):
    class Made(Technique):
        name, exact = label, is_exact

        def apply(self, model):
            apply(model)

        def revert(self, model):
            raise AssertionError("the copy is thrown away")

    return Made


@needs_kernels
def test_tables(few):
    result = call()
    assert result.exit_code == 0, result.output
    text = result.stdout
    for words in ("transformers", "CPU cores: ", "C++ compiler: ", "power: ", "native kernels", "tried on cpu", *FEW):
        assert words in text
    assert importlib.metadata.version("torch") in text


@needs_kernels
def test_json(few):
    result = call("--json")
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert values["packages"]["transformers"] == importlib.metadata.version("transformers")
    assert values["hardware"]["cpu_cores"] >= 1 and values["device"] == "cpu" and values["power_meter"]
    assert {row["status"] for row in values["kernels"]} == {"runs"}
    rows = {row["name"]: row for row in values["techniques"]}
    assert {name: rows[name]["status"] for name in FEW} == dict.fromkeys(FEW, "runs") | {"adaptive_sparse": "refuses"}
    assert rows["decode_linear"]["kernels"] == ["linear"] and rows["faster_rotary"]["kernels"] == ["layout"]
    assert rows["quantized_cache"]["kernels"] == ["quantized"] and not rows["quantized_cache"]["exact"]
    assert (rows["paged_cache"]["kind"], rows["qwen3_vl_exact"]["kind"]) == ("cache", "attention")
    assert "calibrate" in rows["adaptive_sparse"]["detail"]


def test_kernels_that_are_switched_off(few, fresh_kernels, monkeypatch):
    monkeypatch.setenv("QWEN3_VL_NATIVE", "0")
    kernels, rows = check_kernels(), by_name(check_techniques())
    assert {check.status for check in kernels} == {"falls back"}
    assert all("QWEN3_VL_NATIVE=0" in check.detail and check.well for check in kernels)
    assert (rows["decode_linear"].status, rows["decode_linear"].kernels) == ("falls back", ())
    assert rows["decode_linear"].detail == "plain PyTorch in place of native linear"
    assert rows["qwen3_vl_exact"].well and rows["eager"].status == "runs"


def test_no_compiler(few, fresh_kernels, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    (check,) = [check for check in check_kernels() if check.name == "linear"]
    assert check.status == "falls back"
    assert check.detail == "products of few rows on plain PyTorch: no C++ compiler was found (g++, clang++ or $CXX)."


def raising(error):
    def apply(model):
        raise error

    return apply


def late(model):
    model.register_forward_pre_hook(raising_hook)


def raising_hook(*_):
    raise RuntimeError("boom\nsecond line")


def spoil(model):
    with torch.no_grad():
        model.lm_head.weight.neg_()


def warn(model):
    logging.getLogger("qwen3_vl.somewhere").warning("slower than it looks")


@pytest.mark.parametrize(
    ("apply", "exact", "status", "detail", "well"),
    [
        (raising(ImportError("needs `pip install it`")), False, "not available", "needs `pip install it`", True),
        (raising(ValueError("wants settings")), False, "refuses", "wants settings", True),
        (raising(RuntimeError()), False, "fails", "RuntimeError: RuntimeError", False),
        (late, False, "fails", "RuntimeError: boom", False),
        (spoil, True, "other tokens", "it is exact, and gave other tokens than the plain model", False),
        (spoil, False, "runs", "", True),
        (warn, True, "warns", "slower than it looks", True),
    ],
)
def test_each_way_to_fail(apply, exact, status, detail, well):
    trial = Trial("cpu")
    check = trial.run("technique", "some", apply, exact)
    assert (check.status, check.detail, check.well) == (status, detail, well)
    assert trial.run("technique", "none", lambda model: None, exact=True).status == "runs", "the next is not affected"
    assert sys.getprofile() is None


def test_what_fails_is_told_in_one_line(monkeypatch):
    chosen = {"bad": technique("bad", spoil, is_exact=True), "good": technique("good", lambda model: None, True)}
    monkeypatch.setattr(doctor_checks, "TECHNIQUES", chosen)
    monkeypatch.setattr(doctor_checks, "KERNELS", {})
    result = call()
    assert result.exit_code == 1 and "tried on cpu" in result.stdout
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert line == "error: 1 of 4 do not run as they should: bad."


def test_experts_and_constructors_that_want_something(monkeypatch):
    class Wanting(Technique):
        name, exact = "wanting", False

        def __init__(self, needed):
            super().__init__(needed=needed)

        apply = revert = None

    monkeypatch.setattr(
        doctor_checks, "TECHNIQUES", {"wanting": Wanting, "grouped_experts": TECHNIQUES["grouped_experts"]}
    )
    rows = by_name(check_techniques())
    assert rows["wanting"].status == "refuses" and "needed" in rows["wanting"].detail
    assert rows["grouped_experts"].status == "runs"


def test_bad_device_gets_one_line():
    result = CliRunner().invoke(app, ["doctor", "--device", "abacus", "--json"])
    assert result.exit_code == 1 and result.stdout == ""
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "device 'abacus' is not usable here" in line


def test_versions_without_importing():
    program = (
        "import sys; from qwen3_vl.inference.doctor_command import installed_packages; "
        "found = installed_packages(); assert found['torch'] and 'torch' not in sys.modules; "
        "assert 'torchao' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert set(doctor_command.installed_packages()) == set(doctor_command.PACKAGES)


def test_a_package_that_is_not_there(monkeypatch):
    monkeypatch.setitem(doctor_command.PACKAGES, "no-such-package-of-ours", "nothing")
    assert doctor_command.installed_packages()["no-such-package-of-ours"] is None
