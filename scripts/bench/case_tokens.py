"""Fewer visual tokens: a prompt with four pictures through the decoder, the same to its first token, and a page.

Stock computes all tokens. Random weights: quality is measured on the tiny checkpoint by `scripts/evaluate`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from bench_contest import Contest, Way
from bench_measure import tensor_agreement
from bench_pair import build_pair, picture_inputs
from bench_settings import Settings


DTYPES = ("bfloat16",)
PICTURES = 4
WAYS: dict[str, dict[str, Any] | None] = {
    "all tokens": None,
    "merge 50%": {"policy": "merge", "keep_ratio": 0.5},
    "merge 25%": {"policy": "merge", "keep_ratio": 0.25},
    "merge 10%": {"policy": "merge", "keep_ratio": 0.1},
    "tome 25%": {"policy": "tome", "keep_ratio": 0.25},
    "divprune 25%": {"policy": "divprune", "keep_ratio": 0.25},
    "fastv 25%": {"policy": "fastv", "keep_ratio": 0.25},
    "random 25%": {"policy": "random", "keep_ratio": 0.25},
    "random 10%": {"policy": "random", "keep_ratio": 0.1},
}
TO_FIRST_TOKEN = ("all tokens", "merge 25%", "merge 10%", "random 25%")


def rows(settings: Settings) -> Iterator[Contest]:
    # 4 pictures of 992 tokens and 120 of text are 4,096 with the tokens that frame each.
    grid, text = ((8, 8), 16) if settings.quick else ((62, 64), 120)
    # Behind three DeepStack layers there must be one more.
    names = tuple(name for name in WAYS if settings.text_layers > 3 or not name.startswith("fastv"))
    for dtype_name in settings.dtypes:
        dtype = settings.torch_dtype(dtype_name)
        sizes = {"dtype": dtype_name, "text_layers": settings.text_layers, "vision_layers": settings.vision_layers}
        inputs = four_pictures(settings, dtype, grid, text)
        tokens = inputs["input_ids"].shape[1]
        for phase, compared, ways in (
            ("decoder", names, _decoder_ways),
            ("to the first token", TO_FIRST_TOKEN, _first_token_ways),
        ):
            yield Contest(
                label=f"{PICTURES} pictures, {tokens} tokens, {phase}, {dtype_name}",
                sizes={**sizes, "prompt_tokens": tokens, "phase": phase},
                ways=partial(ways, settings, dtype, inputs, compared),
                agreement=tensor_agreement,
                most_repeats=5,
            )
        page_grid = (16, 12) if settings.quick else (72, 56)
        yield Contest(
            label=f"tower, document page of {16 * page_grid[0]}x{16 * page_grid[1]}, {dtype_name}",
            sizes={**sizes, "patches": page_grid[0] * page_grid[1], "phase": "tower"},
            ways=partial(_page_ways, settings, dtype, page_grid),
            agreement=tensor_agreement,
        )


def four_pictures(settings: Settings, dtype: torch.dtype, grid: tuple[int, int], text: int) -> dict[str, torch.Tensor]:
    """Inputs with four random pictures before `text` tokens of text."""
    one = picture_inputs(settings, dtype, text_tokens=text, grid=grid)
    joined = {}
    for name, value in one.items():
        if name in ("input_ids", "attention_mask", "mm_token_type_ids"):
            picture, rest = value.split((value.shape[1] - text, text), dim=1)
            joined[name] = torch.cat((*[picture] * PICTURES, rest), dim=1)
        else:
            joined[name] = torch.cat([value] * PICTURES)
    noise = torch.Generator().manual_seed(3)
    patches = joined["pixel_values"]
    joined["pixel_values"] = torch.randn(patches.shape, generator=noise).to(patches)
    return joined


def _ways(pair: Any, names: tuple[str, ...], run: Callable[[Any], Callable[[], Any]]) -> dict[str, Way]:
    from qwen3_vl import CrossModalTokenMerging

    pair.ours.set_attn_implementation("qwen3_vl_exact")
    active: list[Any] = []

    def way(settings: dict[str, Any] | None) -> Way:
        def prepare() -> None:
            while active:
                active.pop().revert(pair.ours)
            if settings is not None:
                active.append(CrossModalTokenMerging(**settings))
                active[-1].apply(pair.ours)

        return Way(run(pair.ours), prepare=prepare)

    return {"stock": Way(run(pair.stock)), **{name: way(WAYS[name]) for name in names}}


def _decoder_ways(settings: Settings, dtype: torch.dtype, inputs: dict, names: tuple[str, ...]) -> dict[str, Way]:
    """The forward over the prompt, features at hand, the choice of tokens included."""
    pair = build_pair(settings, dtype)
    text = {name: value for name, value in inputs.items() if name != "pixel_values"}

    def run(model: Any) -> Callable[[], torch.Tensor]:
        with torch.inference_mode():
            image = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"], return_dict=True)

        @torch.inference_mode()
        def forward() -> torch.Tensor:
            return model(**text, mm_encoder_outputs={"image": image}, use_cache=True, logits_to_keep=1).logits

        return forward

    return _ways(pair, names, run)


def _first_token_ways(settings: Settings, dtype: torch.dtype, inputs: dict, names: tuple[str, ...]) -> dict[str, Way]:
    """`generate()` of one token, tower included."""
    pair = build_pair(settings, dtype)

    def run(model: Any) -> Callable[[], torch.Tensor]:
        def generate() -> torch.Tensor:
            options = {"max_new_tokens": 1, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
            return model.generate(**inputs, **options).logits[0]

        return generate

    return _ways(pair, names, run)


def document_page(grid: tuple[int, int]) -> torch.Tensor:
    """Patches (height * width, 1536) of a rendered page in merge order: a title, paragraphs, and margins."""
    from PIL import Image, ImageDraw

    height, width = 16 * grid[0], 16 * grid[1]
    page = Image.new("L", (width, height), 255)
    draw, words = ImageDraw.Draw(page), "tokens of a page repeat each other wherever nothing is written on it "
    margin = width // 8
    draw.text((margin, margin // 2), "A page", fill=0, font_size=max(12, width // 24))
    for line in range(margin + 24, height - margin, 22):
        if (line // 22) % 9 < 6:  # paragraphs with white between them
            letters = (words * 3)[: max(4, (width - 2 * margin) // 8 - (20 if (line // 22) % 9 == 5 else 0))]
            draw.text((margin, line), letters, fill=0, font_size=14)
    pixels = torch.frombuffer(bytearray(page.tobytes()), dtype=torch.uint8).view(height, width).float() / 127.5 - 1
    squares = pixels.view(grid[0] // 2, 2, 16, grid[1] // 2, 2, 16).permute(0, 3, 1, 4, 2, 5)
    return squares.reshape(-1, 1, 1, 256).expand(-1, 3, 2, -1).reshape(grid[0] * grid[1], -1)


def _page_ways(settings: Settings, dtype: torch.dtype, grid: tuple[int, int]) -> dict[str, Way]:
    from qwen3_vl import RepeatedPatchRemoval

    pair = build_pair(settings, dtype, text_layers=1)
    pair.ours.set_attn_implementation("qwen3_vl_exact")
    pixels = document_page(grid).to(settings.device, dtype)
    grid_thw = torch.tensor([[1, *grid]], device=settings.device)
    active: list[Any] = []

    def way(depth: float | None) -> Way:
        def prepare() -> None:
            while active:
                active.pop().revert(pair.ours)
            if depth is not None:
                active.append(RepeatedPatchRemoval(depth=depth))
                active[-1].apply(pair.ours)

        against = () if depth is None else ("all patches",)
        return Way(partial(_encode, pair.ours, pixels, grid_thw), prepare=prepare, against=against)

    return {
        "stock": Way(partial(_encode, pair.stock, pixels, grid_thw)),
        "all patches": way(None),
        **{f"flat squares shared in {depth:.0%} of the blocks": way(depth) for depth in (0.5, 1.0)},
    }


@torch.inference_mode()
def _encode(model: Any, pixels: torch.Tensor, grid_thw: torch.Tensor) -> torch.Tensor:
    return torch.cat(list(model.get_image_features(pixels, grid_thw, return_dict=True).pooler_output))
