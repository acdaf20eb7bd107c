"""Pictures, videos and conversations made into model inputs, without torchvision."""

from importlib import import_module
from typing import Any


_HOMES = {
    "QWEN3_VL_CHAT_TEMPLATE": "chat_template_qwen3_vl",
    "Qwen3VLImageProcessor": "image_processing_qwen3_vl",
    "Qwen3VLProcessor": "processing_qwen3_vl",
    "Qwen3VLVideoProcessor": "video_processing_qwen3_vl",
    "frame_timestamps": "processing_qwen3_vl",
    "open_picture": "image_processing_qwen3_vl",
    "read_video": "video_reading",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
