"""The vision tower alone, from patches to the features that enter the decoder."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from bench_measure import Comparison, tensor_agreement
from bench_pair import build_pair
from bench_settings import Settings


def rows(settings: Settings) -> Iterator[Comparison]:
    for dtype_name in settings.dtypes:
        dtype = settings.torch_dtype(dtype_name)
        pair = build_pair(settings, dtype, text_layers=1)
        for grids in _grids(settings.quick):
            grid_thw = torch.tensor(grids, device=settings.device)
            generator = torch.Generator().manual_seed(2)
            pixels = torch.randn(int(grid_thw.prod(-1).sum()), 1536, generator=generator).to(settings.device, dtype)
            yield Comparison(
                label=f"{len(grids)} x {grids[0][1] * 16}x{grids[0][2] * 16}, {dtype_name}",
                sizes={
                    "dtype": dtype_name,
                    "grids": grids,
                    "patches": pixels.shape[0],
                    "vision_layers": settings.vision_layers,
                },
                ours=_encode(pair.ours, pixels, grid_thw),
                stock=_encode(pair.stock, pixels, grid_thw),
                agreement=tensor_agreement,
            )


def _grids(quick: bool) -> list[list[list[int]]]:
    if quick:
        return [[[1, 8, 8]]]
    return [[[1, 32, 32]], [[1, 64, 64]], [[1, 16, 16]] * 8]


def _encode(model: Any, pixels: torch.Tensor, grid_thw: torch.Tensor) -> Any:
    @torch.inference_mode()
    def encode() -> torch.Tensor:
        features = model.get_image_features(pixels, grid_thw, return_dict=True)
        return torch.cat(list(features.pooler_output))

    return encode
