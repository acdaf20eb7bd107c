"""Pictures to patches: our image processor against the stock one that needs no torchvision."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from bench_measure import Comparison, tensor_agreement
from bench_settings import Settings
from PIL import Image


SIZES = [(640, 480), (1920, 1080), (4000, 3000)]


def rows(settings: Settings) -> Iterator[Comparison]:
    ours, stock = _processors(settings.against_itself)
    for width, height in SIZES[:1] if settings.quick else SIZES:
        for count in (1,) if settings.quick else (1, 8):
            pictures = [_picture(width, height, seed) for seed in range(count)]
            yield Comparison(
                label=f"{count} x {width}x{height}",
                sizes={"pictures": count, "width": width, "height": height},
                ours=_process(ours, pictures),
                stock=_process(stock, pictures),
                agreement=tensor_agreement,
            )


def _processors(against_itself: bool) -> tuple[Any, Any]:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    # What the published checkpoints set.
    values = {
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "size": {"shortest_edge": 65536, "longest_edge": 16777216},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    stock = Qwen2VLImageProcessorPil(**values)
    if against_itself:
        return stock, stock
    import qwen3_vl

    return qwen3_vl.Qwen3VLImageProcessor(**values), stock


def _picture(width: int, height: int, seed: int) -> Image.Image:
    """Smooth colour with some noise, which resizes like a photo."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (height // 40 + 1, width // 40 + 1, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    noisy = smooth + generator.integers(-8, 9, smooth.shape, dtype=np.int16)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def _process(processor: Any, pictures: list[Image.Image]) -> Any:
    return lambda: processor(images=pictures, return_tensors="pt")["pixel_values"]
