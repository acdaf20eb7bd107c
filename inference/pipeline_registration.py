"""Makes `transformers.pipeline("image-to-text", ...)` build our pipeline for our models, reversibly.

Transformers 5.23 rewrites that task name before any registry look-up, so a registered task is never reached. The
smallest hook is the factory itself: a wrapper hands it `pipeline_class` when the task and the model are ours, and
leaves every other call as it was.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import transformers


OUR_MODEL_TYPES = ("qwen3_vl", "qwen3_vl_moe")


def pipeline_class_for(task: str | None) -> type | None:
    """The pipeline class of a task that is ours, else `None`."""
    if task != "image-to-text":
        return None
    from .pipeline_image_to_text import Qwen3VLImageToTextPipeline

    return Qwen3VLImageToTextPipeline


def register_pipelines(module: ModuleType) -> Callable[[], None]:
    """Wraps the `pipeline` factory of `transformers.pipelines`, given as `module`; returns what takes it back.

    A reference to the factory that somebody took before stays as it is.
    """
    stock = module.pipeline
    wrapper = _wrap(stock)
    _swap(module, stock, wrapper)
    return lambda: _swap(module, wrapper, stock)


def _swap(module: ModuleType, old: Callable, new: Callable) -> None:
    # The package keeps a name once it was asked for; one that was not will be looked up in the module.
    for holder in (module, transformers):
        if vars(holder).get("pipeline") is old:
            holder.pipeline = new


def _wrap(stock: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stock)
    def pipeline(task: str | None = None, model: Any = None, *args: Any, **kwargs: Any) -> Any:
        ours = pipeline_class_for(task) if kwargs.get("pipeline_class") is None else None
        if ours is not None and _model_type(model, kwargs) in OUR_MODEL_TYPES:
            # The name that is not deprecated: no warning, and no demand for trusted code that is installed anyway.
            task, kwargs["pipeline_class"] = "image-text-to-text", ours
        return stock(task, model, *args, **kwargs)

    return pipeline


def _model_type(model: Any, kwargs: dict[str, Any]) -> str | None:
    """The type of a model that is given loaded, by its config, or by name."""
    for holder in (model, kwargs.get("config")):
        config = getattr(holder, "config", holder)
        if getattr(config, "model_type", None):
            return config.model_type
    if model is None:
        return None
    hub = {name: kwargs[name] for name in ("revision", "token", "local_files_only") if kwargs.get(name) is not None}
    try:
        values, _ = transformers.PreTrainedConfig.get_config_dict(str(model), **hub)
    except OSError:
        return None  # the factory itself says what is wrong with the source
    return values.get("model_type")
