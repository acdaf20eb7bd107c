"""Makes the Auto classes of `transformers` resolve to ours, and takes it back.

Nothing heavy is imported for it: a module of `transformers` that is not loaded yet is patched right after its import,
and our own classes are imported at the first look-up. Not part of a Hub copy, where `auto_map` does this work.

What `transformers` 5 needs in each place:
- `AutoConfig`, `AutoModel...`: entries in `_extra_content`, the part of their mappings that outranks the built-in one.
- `AutoProcessor`, `AutoImageProcessor`, `AutoVideoProcessor`: built-in names win there and other models share them, so
  `from_pretrained` is wrapped and looks at the folder's model type.
"""

import importlib
import importlib.abc
import importlib.machinery
import json
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path


CONFIG_CLASSES = {
    "qwen3_vl": "configuration_qwen3_vl.Qwen3VLConfig",
    "qwen3_vl_text": "configuration_qwen3_vl.Qwen3VLTextConfig",
    "qwen3_vl_vision": "configuration_qwen3_vl.Qwen3VLVisionConfig",
    "qwen3_vl_moe": "configuration_qwen3_vl_moe.Qwen3VLMoeConfig",
    "qwen3_vl_moe_text": "configuration_qwen3_vl_moe.Qwen3VLMoeTextConfig",
    "qwen3_vl_moe_vision": "configuration_qwen3_vl_moe.Qwen3VLMoeVisionConfig",
}
BASE_MODELS = {
    "qwen3_vl": "modeling_qwen3_vl.Qwen3VLModel",
    "qwen3_vl_text": "modeling_text.Qwen3VLTextModel",
    "qwen3_vl_vision": "modeling_vision.Qwen3VLVisionModel",
    "qwen3_vl_moe": "modeling_qwen3_vl.Qwen3VLMoeModel",
    "qwen3_vl_moe_text": "modeling_moe.Qwen3VLMoeTextModel",
    "qwen3_vl_moe_vision": "modeling_qwen3_vl.Qwen3VLMoeVisionModel",
}
GENERATIVE_MODELS = {
    "qwen3_vl": "modeling_qwen3_vl.Qwen3VLForConditionalGeneration",
    "qwen3_vl_moe": "modeling_qwen3_vl.Qwen3VLMoeForConditionalGeneration",
}
MODEL_MAPPINGS = {
    "MODEL_MAPPING": BASE_MODELS,
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING": GENERATIVE_MODELS,
    "MODEL_FOR_MULTIMODAL_LM_MAPPING": GENERATIVE_MODELS,
}
PROCESSOR_CLASSES = {
    "processing_auto": ("AutoProcessor", "processing_qwen3_vl.Qwen3VLProcessor"),
    "image_processing_auto": ("AutoImageProcessor", "image_processing_qwen3_vl.Qwen3VLImageProcessor"),
    "video_processing_auto": ("AutoVideoProcessor", "video_processing_qwen3_vl.Qwen3VLVideoProcessor"),
}
# Modules of `optim` that write into tables of `transformers` when they are imported, and what writes and takes back.
TABLES = (
    ("attention.attention_layout", "register_known_attention", "withdraw_attention"),
    ("weights.layer_recycling_saving", "register_loader", "withdraw_loader"),
)
PROCESSED_MODEL_TYPES = ("qwen3_vl", "qwen3_vl_moe")
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")

_AUTO = "transformers.models.auto."
_PACKAGE = __name__.rsplit(".", 2)[0]
_undo: list[Callable[[], None]] = []


def register() -> None:
    """Makes the Auto classes and `pipeline` resolve to this package for its model types; harmless when repeated."""
    if _undo:
        return
    actions = {
        "transformers": _uncover_video_processor,
        f"{_AUTO}configuration_auto": _register_configs,
        f"{_AUTO}modeling_auto": _register_models,
        "transformers.pipelines": _register_pipelines,
        **{f"{_AUTO}{name}": _register_processor for name in PROCESSOR_CLASSES},
    }
    hook = _AfterImport({name: action for name, action in actions.items() if name not in sys.modules})
    sys.meta_path.insert(0, hook)
    _undo.append(lambda: sys.meta_path.remove(hook))
    for module, enter, leave in TABLES:
        _if_imported(module, enter)
        _undo.append(partial(_if_imported, module, leave))
    for name, action in actions.items():
        if name in sys.modules:
            action(sys.modules[name])


def unregister() -> None:
    """Gives the Auto classes and `pipeline` back to stock `transformers`; classes already imported keep working."""
    while _undo:
        _undo.pop()()


def _if_imported(module: str, action: str) -> None:
    """Runs a function of one of our modules; before its import there is nothing to do."""
    imported = sys.modules.get(f"{_PACKAGE}.optim.{module}")
    if imported is not None:
        getattr(imported, action)()


def _register_configs(module) -> None:
    _add_entries(
        module.CONFIG_MAPPING, lambda: {name: _load("configuration", ref) for name, ref in CONFIG_CLASSES.items()}
    )


def _register_models(module) -> None:
    for mapping_name, models in MODEL_MAPPINGS.items():

        def load(models=models):
            return {
                _load("configuration", CONFIG_CLASSES[name]): _load("modeling_qwen3_vl", reference)
                for name, reference in models.items()
            }

        _add_entries(getattr(module, mapping_name), load)


def _add_entries(mapping, load: Callable[[], dict]) -> None:
    stock = mapping._extra_content
    entries = mapping._extra_content = _LazyEntries(stock, load)

    def take_out():
        stock.update(entries.added_by_others())
        mapping._extra_content = stock

    _undo.append(take_out)


def _register_processor(module) -> None:
    auto_name, reference = PROCESSOR_CLASSES[module.__name__.rpartition(".")[2]]
    auto_class = getattr(module, auto_name)
    stock = auto_class.__dict__["from_pretrained"]

    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        if is_qwen3_vl(pretrained_model_name_or_path, kwargs):
            kwargs.pop("trust_remote_code", None)
            return _load("processing", reference).from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        return stock.__get__(None, cls)(pretrained_model_name_or_path, *args, **kwargs)

    from_pretrained.__doc__ = stock.__func__.__doc__
    auto_class.from_pretrained = classmethod(from_pretrained)
    _undo.append(lambda: setattr(auto_class, "from_pretrained", stock))


def _uncover_video_processor(module) -> None:
    """Without torchvision, `transformers.AutoVideoProcessor` is a stand-in that refuses every use; ours needs none."""
    # While it is imported, the library puts an object of its own in the place of the module.
    name, library = "AutoVideoProcessor", sys.modules[module.__name__]
    missing = getattr(library, "_object_missing_backend", {})
    if name not in missing:
        return
    backends, stand_in = missing.pop(name), vars(library).pop(name, None)

    def cover_again():
        missing[name] = backends
        vars(library).pop(name, None)
        if stand_in is not None:
            setattr(library, name, stand_in)

    _undo.append(cover_again)


def _register_pipelines(module) -> None:
    pipelines = importlib.import_module(f"{_PACKAGE}.inference.pipeline_registration")
    _undo.append(pipelines.register_pipelines(module))


def is_qwen3_vl(name_or_path, kwargs: dict) -> bool:
    """Whether a folder or Hub repository holds one of our model types, or only a processor made for them."""
    from transformers.utils.hub import cached_file

    config = kwargs.get("config")
    if getattr(config, "model_type", None):
        return config.model_type in PROCESSED_MODEL_TYPES
    hub = {
        key: kwargs[key]
        for key in ("cache_dir", "revision", "token", "local_files_only", "subfolder")
        if key in kwargs
    }
    for file_name in ("config.json", *PROCESSOR_FILES):
        try:
            path = cached_file(name_or_path, file_name, _raise_exceptions_for_missing_entries=False, **hub)
            content = {} if path is None else json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False  # stock's own look-up says what is wrong
        if content.get("model_type"):
            return content["model_type"] in PROCESSED_MODEL_TYPES
        if content.get("processor_class"):
            return content["processor_class"] == "Qwen3VLProcessor"
    return False


def _load(room: str, reference: str):
    module, _, name = reference.partition(".")
    return getattr(importlib.import_module(f"{_PACKAGE}.{room}.{module}"), name)


class _LazyEntries(dict):
    """Entries of an Auto mapping; ours are imported when somebody first looks."""

    def __init__(self, stock: dict, load: Callable[[], dict]):
        super().__init__(stock)
        self._load = load
        self._filling = False
        self._lock = threading.RLock()
        self._others = {}

    def _fill(self) -> None:
        if self._load is None:
            return
        with self._lock:
            # Our modules may look here while they are being imported, in this thread; others wait.
            if self._load is None or self._filling:
                return
            self._filling = True
            try:
                super().update({**self._load(), **self._others})
                self._load = None
            finally:
                self._filling = False

    def __setitem__(self, key, value) -> None:
        """A later `register` of somebody else; it outranks ours and outlives it."""
        self._others[key] = value
        super().__setitem__(key, value)

    def added_by_others(self) -> dict:
        return self._others

    def __getitem__(self, key):
        self._fill()
        return super().__getitem__(key)

    def __contains__(self, key) -> bool:
        self._fill()
        return super().__contains__(key)

    def __iter__(self):
        self._fill()
        return super().__iter__()

    def __len__(self) -> int:
        self._fill()
        return super().__len__()

    def keys(self):
        self._fill()
        return super().keys()

    def values(self):
        self._fill()
        return super().values()

    def items(self):
        self._fill()
        return super().items()


class _AfterImport(importlib.abc.MetaPathFinder):
    """Runs an action right after the import of a module."""

    def __init__(self, actions: dict[str, Callable]):
        self.actions = actions

    def find_spec(self, fullname, path, target=None):
        if fullname not in self.actions:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenAct(spec.loader, self.actions[fullname])
        return spec


class _ThenAct(importlib.abc.Loader):
    """A module's own loader, followed by an action on the module."""

    def __init__(self, loader, action: Callable):
        self._loader = loader
        self._action = action

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module) -> None:
        self._loader.exec_module(module)
        self._action(module)

    def __getattr__(self, name):
        return getattr(self._loader, name)
