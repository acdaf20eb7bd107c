"""The vision tower on a video of 8 frames: equal frames as one batch, with our attention and with PyTorch's."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from bench_contest import Contest, Way
from bench_measure import tensor_agreement
from bench_pair import build_pair, without_compiled
from bench_settings import Settings


DTYPES = ("bfloat16",)


def rows(settings: Settings) -> Iterator[Contest]:
    grid = (2, 8, 8) if settings.quick else (8, 32, 32)
    for dtype_name in settings.dtypes:
        yield Contest(
            label=f"{grid[0]} frames of {16 * grid[1]}x{16 * grid[2]}, {dtype_name}",
            sizes={
                "dtype": dtype_name,
                "grid": grid,
                "patches": grid[0] * grid[1] * grid[2],
                "vision_layers": settings.vision_layers,
            },
            ways=partial(_ways, settings, settings.torch_dtype(dtype_name), grid),
            agreement=tensor_agreement,
        )


def _ways(settings: Settings, dtype: torch.dtype, grid: tuple[int, int, int]) -> dict[str, Way]:
    from qwen3_vl import FasterRotaryEmbeddings

    pair, rotary = build_pair(settings, dtype, text_layers=1), FasterRotaryEmbeddings()
    grid_thw = torch.tensor([grid], device=settings.device)
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randn(int(grid_thw.prod()), 1536, generator=generator).to(settings.device, dtype)

    def way(model: Any, implementation: str, native_layout: bool = False) -> Way:
        def prepare() -> None:
            if model is not pair.stock:
                model.set_attn_implementation(implementation)
                rotary.revert(model)
                if native_layout:
                    rotary.apply(model)

        return Way(partial(_encode, model, pixels, grid_thw), prepare=prepare)

    ways = {
        "stock": way(pair.stock, "sdpa"),
        "our model, sdpa": way(pair.ours, "sdpa"),
        "exact": way(pair.ours, "qwen3_vl_exact"),
        "exact, rotary": way(pair.ours, "qwen3_vl_exact", native_layout=True),
    }
    if torch.device(settings.device).type == "cpu":
        plain = way(pair.ours, "qwen3_vl_exact")
        plain.work = without_compiled(plain.work)
        ways["exact, plain"] = plain
    return ways


@torch.inference_mode()
def _encode(model: Any, pixels: torch.Tensor, grid_thw: torch.Tensor) -> torch.Tensor:
    return torch.cat(list(model.get_video_features(pixels, grid_thw, return_dict=True).pooler_output))
