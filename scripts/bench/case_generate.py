"""Greedy `generate()` after a prompt with one picture: the price of a token, with all that surrounds it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from bench_measure import Comparison, token_agreement
from bench_pair import build_pair, picture_inputs
from bench_settings import Settings


def rows(settings: Settings) -> Iterator[Comparison]:
    new_tokens, prompts = (4, [(16, (8, 8))]) if settings.quick else (64, [(64, (16, 16)), (64, (64, 64))])
    for dtype_name in settings.dtypes:
        dtype = settings.torch_dtype(dtype_name)
        pair = build_pair(settings, dtype)
        for text_tokens, grid in prompts:
            inputs = picture_inputs(settings, dtype, text_tokens=text_tokens, grid=grid)
            prompt_tokens = inputs["input_ids"].shape[1]
            yield Comparison(
                label=f"{new_tokens} tokens after {prompt_tokens}, {dtype_name}",
                sizes={
                    "dtype": dtype_name,
                    "prompt_tokens": prompt_tokens,
                    "new_tokens": new_tokens,
                    "text_layers": settings.text_layers,
                    "vision_layers": settings.vision_layers,
                },
                ours=_generate(pair.ours, inputs, new_tokens),
                stock=_generate(pair.stock, inputs, new_tokens),
                agreement=token_agreement,
                unit="tokens/s",
                per_run=new_tokens,
            )


def _generate(model: Any, inputs: dict[str, torch.Tensor], new_tokens: int) -> Any:
    @torch.inference_mode()
    def generate() -> torch.Tensor:
        return model.generate(**inputs, do_sample=False, max_new_tokens=new_tokens, min_new_tokens=new_tokens)

    return generate
