"""The import paths of the API reference: each name is the package's own object, and `src` works when asked for."""

import subprocess
import sys
import types

import pytest

import qwen3_vl
from qwen3_vl.api_paths import API_PATHS


ROWS = [(path, name) for path, names in API_PATHS.items() for name in names]
LEGACY = """
import sys
import qwen3_vl
try:
    import src.attention
except ImportError:
    pass
else:
    sys.exit("src was there before it was asked for")
qwen3_vl.enable_legacy_imports()
from src import qwen3_vl as package
from src.qwen3_vl import Qwen3VLModel, Qwen3VLConfig, Qwen3VLAttention, FlashAttention2
from src.attention import Qwen3VLAttention as again
from src.components.attention import DynamicSparseAttention as ComponentDynamicSparseAttention
from src.qwen3_vl.components.models import Qwen3VLModel as ConsolidatedQwen3VLModel
from src.qwen3_vl.memory_management.kv_cache_optimizer import KVCacheOptimizer
from src.qwen3_vl.config.unified_config import get_default_config
from src.qwen3_vl.inference.cli import main as cli_main
from src.qwen3_vl.components.routing import MoeLayer
import src.qwen3_vl.inference, qwen3_vl.inference
assert package is qwen3_vl and src.qwen3_vl.inference is qwen3_vl.inference
assert qwen3_vl.inference.__spec__.name == "qwen3_vl.inference"
assert ConsolidatedQwen3VLModel is Qwen3VLModel is qwen3_vl.Qwen3VLModel and again is Qwen3VLAttention
assert KVCacheOptimizer is qwen3_vl.KVCacheOptimizer and callable(cli_main)
qwen3_vl.enable_legacy_imports()
try:
    import src.nothing
except ModuleNotFoundError as error:
    assert "qwen3_vl.nothing" in str(error)
"""


@pytest.mark.parametrize(("path", "name"), ROWS)
def test_each_name_is_the_real_object(path, name):
    module = __import__(f"qwen3_vl.{path}", fromlist=[name])
    assert getattr(module, name) is getattr(qwen3_vl, name)
    assert name in dir(module) and name in qwen3_vl.__all__


def test_every_public_name_can_be_imported():
    for name in qwen3_vl.__all__:
        assert getattr(qwen3_vl, name) is not None


def test_what_a_path_does_not_have_is_named():
    with pytest.raises(
        AttributeError, match=r"qwen3_vl.components.routing' has no attribute 'MoeLayr'; it has MoeLayer"
    ):
        import qwen3_vl.components.routing as routing

        routing.MoeLayr  # noqa: B018
    with pytest.raises(ModuleNotFoundError):
        import qwen3_vl.components.nothing  # noqa: F401


def test_the_reference_spelling_works_when_asked_for():
    result = subprocess.run([sys.executable, "-c", LEGACY], capture_output=True, text=True, cwd="/")
    assert result.returncode == 0, result.stderr


def test_another_package_of_that_name_is_not_replaced(monkeypatch):
    monkeypatch.setitem(sys.modules, "src", types.ModuleType("src"))
    before = list(sys.meta_path)
    with pytest.raises(ImportError, match="'src' is imported already"):
        qwen3_vl.enable_legacy_imports()
    assert sys.meta_path == before
