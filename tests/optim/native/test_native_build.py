"""Compiling on the user's machine, and what happens where that fails."""

import ctypes
import os
import stat
import subprocess
import sys

import pytest

from qwen3_vl.optim.native import native_build


SOURCE = 'extern "C" int {name}() {{ return {value}; }}'


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    folder = tmp_path / "native"
    monkeypatch.setenv("QWEN3_VL_NATIVE_CACHE", str(folder))
    monkeypatch.delenv("QWEN3_VL_NATIVE", raising=False)
    native_build.load_library.cache_clear()
    yield folder
    native_build.load_library.cache_clear()


@pytest.fixture
def warnings_seen(monkeypatch):
    seen = []
    monkeypatch.setattr(native_build.logger, "warning_once", seen.append)
    return seen


needs_compiler = pytest.mark.skipif(
    native_build.shutil.which("g++") is None and native_build.shutil.which("clang++") is None, reason="no C++ compiler"
)


@needs_compiler
def test_compiles_once_and_loads_again(own_cache, monkeypatch):
    source = SOURCE.format(name="answer", value=41)
    assert native_build.load_library("sample", source).answer() == 41
    [library] = own_cache.glob("sample-*.so")
    assert stat.S_IMODE(own_cache.stat().st_mode) == 0o700

    native_build.load_library.cache_clear()
    monkeypatch.setattr(native_build, "_compile", lambda *_: pytest.fail("compiled again"))
    assert isinstance(native_build.load_library("sample", source), ctypes.CDLL)
    assert list(own_cache.iterdir()) == [library], "the temporary folder stayed behind"


@needs_compiler
def test_other_source_or_flags_make_another_library(own_cache, monkeypatch):
    native_build.load_library("sample", SOURCE.format(name="answer", value=1))
    native_build.load_library("sample", SOURCE.format(name="answer", value=2))
    monkeypatch.setattr(native_build, "_processor", lambda: "another processor")
    native_build.load_library.cache_clear()
    native_build.load_library("sample", SOURCE.format(name="answer", value=2))
    assert len(list(own_cache.glob("*.so"))) == 3


@needs_compiler
def test_broken_source_warns_once_in_one_line(own_cache, warnings_seen):
    assert native_build.load_library("sample", "this is no C++") is None
    [message] = warnings_seen
    assert message.startswith("native sample kernels are off, plain PyTorch runs instead: ") and "\n" not in message
    assert not list(own_cache.iterdir())


def test_no_compiler(monkeypatch, warnings_seen):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(native_build.shutil, "which", lambda name: None)
    assert native_build.load_library("sample", SOURCE.format(name="answer", value=1)) is None
    assert "no C++ compiler was found" in warnings_seen[0]


def test_switched_off(monkeypatch, warnings_seen):
    monkeypatch.setenv("QWEN3_VL_NATIVE", "0")
    assert native_build.load_library("sample", SOURCE.format(name="answer", value=1)) is None
    assert warnings_seen == []


@needs_compiler
@pytest.mark.skipif(not hasattr(os, "getuid"), reason="folders without owners")
def test_a_folder_that_others_can_write_is_refused(own_cache, warnings_seen):
    own_cache.mkdir()
    own_cache.chmod(0o777)
    assert native_build.load_library("sample", SOURCE.format(name="answer", value=1)) is None
    assert "can be written by others; set QWEN3_VL_NATIVE_CACHE" in warnings_seen[0]


@needs_compiler
def test_processes_may_compile_at_once(own_cache):
    code = (
        "from qwen3_vl.optim.native.native_build import load_library;"
        f"print(load_library('sample', {SOURCE.format(name='answer', value=7)!r}).answer())"
    )
    runs = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [run.communicate()[0].strip() for run in runs] == ["7"] * 3
    assert len(list(own_cache.iterdir())) == 1
