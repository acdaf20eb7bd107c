"""Import paths of the API reference that are no folders here: one lazy table, a row for each path.

`from qwen3_vl.memory_management import KVCacheOptimizer` works at once. The reference's own spelling, which begins
with `src`, works after `qwen3_vl.enable_legacy_imports()`. Every name is the real object of this package, imported
when it is asked for.
"""

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


PACKAGE = __name__.rpartition(".")[0]
LEGACY = "src"

_ATTENTION = (
    "Qwen3VLAttention",
    "FlashAttention2",
    "BlockSparseAttention",
    "DynamicSparseAttention",
    "Qwen3VLRotaryEmbedding",
    "apply_rotary_pos_emb",
    "repeat_kv",
)
_MANAGERS = ("KVCacheOptimizer", "GeneralMemoryManager", "VisionLanguageMemoryManager", "SparseMemoryManager")
_PROFILE = (
    "UnifiedConfig",
    "MemoryConfig",
    "CPUConfig",
    "GPUConfig",
    "PowerManagementConfig",
    "OptimizationConfig",
    "UnifiedConfigManager",
)
_PROFILE_MAKERS = ("get_default_config", "create_unified_config_manager", "get_hardware_optimized_config")

# Names by path; each stands in the package's own table of names.
API_PATHS: dict[str, tuple[str, ...]] = {
    "attention": _ATTENTION,
    "models": ("Qwen3VLModel", "Qwen3VLForConditionalGeneration", "Qwen3VLProcessor", "Qwen3VLPreTrainedModel"),
    "memory_management": (*_MANAGERS, "MemoryPool", "MemoryEfficientAttention"),
    "memory_management.kv_cache_optimizer": ("KVCacheOptimizer",),
    "memory_management.general_memory_manager": ("GeneralMemoryManager",),
    "memory_management.vision_language_memory_manager": ("VisionLanguageMemoryManager",),
    "config": ("Qwen3VLConfig", *_PROFILE, *_PROFILE_MAKERS),
    "config.unified_config": (*_PROFILE, *_PROFILE_MAKERS),
    "optimization": (
        "UnifiedOptimizationOrchestrator",
        "UnifiedArchitecture",
        "UnifiedOptimizationManager",
        "OrderOptimizer",
        "MemoryOptimizationIntegrator",
        "KernelFusion",
        "FallbackManager",
        "AdaptiveAttention",
    ),
    "components": (),
    "components.attention": ("OptimizedQwen3VLAttention", "AttentionMechanisms", "DynamicSparseAttention"),
    "components.models": ("Qwen3VLModel", "Qwen3VLForConditionalGeneration"),
    "components.optimization": (
        "AdaptiveSparse",
        "AdaptivePrecision",
        "AdaptiveSequencePacking",
        "FasterRotaryEmbeddings",
        "CrossLayerParameterRecycling",
        "HardwareSpecificKernels",
        "KVCachingOptimization",
        "LearnedActivationRouting",
        "HierarchicalMemoryCompression",
        "CrossModalTokenMerging",
        "MemoryEfficientGradientAccumulation",
    ),
    "components.routing": ("MoeLayer",),
    "components.system": (),
    "components.system.interfaces": ("ConfigurableComponent", "MemoryManager"),
}


class _ApiModule(ModuleType):
    """A path of the reference, whose names are those of the package."""

    def __getattr__(self, name: str):
        if name not in API_PATHS[self.__api_path__]:
            known = ", ".join(API_PATHS[self.__api_path__]) or "none"
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}; it has {known}.")
        return getattr(importlib.import_module(PACKAGE), name)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *API_PATHS[self.__api_path__]})


class _ApiFinder(MetaPathFinder, Loader):
    """Finds the paths of the table where no file has their name, and under `src` when that was asked for."""

    def __init__(self):
        self.legacy = False

    def find_spec(self, fullname: str, path=None, target=None) -> ModuleSpec | None:
        if fullname.removeprefix(f"{PACKAGE}.") in API_PATHS and fullname.startswith(f"{PACKAGE}."):
            return ModuleSpec(fullname, self, is_package=True)
        if self.legacy and fullname.partition(".")[0] == LEGACY:
            return ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = ModuleType(spec.name)
        if spec.name.startswith(f"{PACKAGE}."):
            module.__class__ = _ApiModule
            module.__api_path__ = spec.name.removeprefix(f"{PACKAGE}.")
            module.__all__ = list(API_PATHS[module.__api_path__])
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Puts the real module in the place of one that begins with `src`; `src` itself stays empty."""
        name = module.__name__
        if name.startswith(f"{LEGACY}."):
            path = name.removeprefix(f"{LEGACY}.").removeprefix(PACKAGE).removeprefix(".")
            sys.modules[name] = importlib.import_module(f"{PACKAGE}.{path}" if path else PACKAGE)


_FINDER = _ApiFinder()


def install() -> None:
    """Makes the paths of the table importable; behind everything else, so that files come first."""
    if _FINDER not in sys.meta_path:
        sys.meta_path.append(_FINDER)


def enable_legacy_imports() -> None:
    """Makes `src.…`, as the API reference spells its imports, resolve to this package.

    Raises:
        ImportError: if there is another package `src` already.
    """
    other = sys.modules.get(LEGACY)
    if other is not None and not isinstance(getattr(other, "__loader__", None), _ApiFinder):
        raise ImportError(
            f"a package {LEGACY!r} is imported already ({getattr(other, '__file__', 'without a file')}); import from "
            f"{PACKAGE} instead."
        )
    _FINDER.legacy = True
    if _FINDER in sys.meta_path:
        sys.meta_path.remove(_FINDER)
    # In front, since many a working folder has a `src` of its own.
    sys.meta_path.insert(0, _FINDER)
