"""The forward pass over a whole prompt: text alone, and one picture before text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from bench_measure import Comparison, tensor_agreement
from bench_pair import build_pair, picture_inputs
from bench_settings import Settings


def rows(settings: Settings) -> Iterator[Comparison]:
    for dtype_name in settings.dtypes:
        dtype = settings.torch_dtype(dtype_name)
        pair = build_pair(settings, dtype)
        for text_tokens, grid in _prompts(settings.quick):
            inputs = picture_inputs(settings, dtype, text_tokens=text_tokens, grid=grid)
            total = inputs["input_ids"].shape[1]
            picture = "text" if grid is None else f"picture of {grid[0] * grid[1] // 4} tokens"
            yield Comparison(
                label=f"{picture}, {total} in all, {dtype_name}",
                sizes={
                    "dtype": dtype_name,
                    "prompt_tokens": total,
                    "image_tokens": 0 if grid is None else grid[0] * grid[1] // 4,
                    "text_layers": settings.text_layers,
                    "vision_layers": settings.vision_layers,
                },
                ours=_forward(pair.ours, inputs),
                stock=_forward(pair.stock, inputs),
                agreement=tensor_agreement,
            )


def _prompts(quick: bool) -> list[tuple[int, tuple[int, int] | None]]:
    return [(64, None), (32, (8, 8))] if quick else [(1024, None), (128, (32, 32)), (128, (64, 64))]


def _forward(model: Any, inputs: dict[str, torch.Tensor]) -> Any:
    @torch.inference_mode()
    def forward() -> torch.Tensor:
        return model(**inputs, use_cache=True, logits_to_keep=1).logits

    return forward
