"""Weights in int8 and int4: one decoded token behind a history, the forward pass over a prompt, and bytes held.

All ways but the first have exact attention, and decode with the paged cache; their plain bf16 row says how much of a
gain that is. Head and embedding are packed too, as one matrix. Against random weights the agreement says little of
quality: `scripts/evaluate` measures that on the trained tiny checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from bench_contest import Contest, Way
from bench_measure import tensor_agreement
from bench_pair import build_pair, picture_inputs, sharing_weights
from bench_settings import Settings
from case_decode import decode, filled
from transformers import DynamicCache


DTYPES = ("bfloat16",)
PLAIN = "bf16"


def rows(settings: Settings) -> Iterator[Contest]:
    steps = 2 if settings.quick else 8
    tokens = 64 if settings.quick else 1024
    for dtype_name in settings.dtypes:
        dtype = settings.torch_dtype(dtype_name)
        models = cache(partial(_models, settings, dtype))  # built only if a row is wanted
        sizes = {"dtype": dtype_name, "text_layers": settings.text_layers}
        yield Contest(
            label=f"decode, {tokens:,} cached, {dtype_name}",
            sizes={"phase": "decode", "context": tokens, "steps": steps, **sizes},
            ways=partial(_decoding, models, settings, dtype, tokens, steps),
            agreement=tensor_agreement,
            calls=steps,
        )
        yield Contest(
            label=f"prefill, {tokens:,} tokens, {dtype_name}",
            sizes={"phase": "prefill", "prompt_tokens": tokens, **sizes},
            ways=partial(_prefill, models, settings, dtype, tokens),
            agreement=tensor_agreement,
        )


def _models(settings: Settings, dtype: torch.dtype) -> dict[str, Any]:
    """Stock, ours, and ours packed, from the same weights."""
    from qwen3_vl import AdaptivePrecision
    from qwen3_vl.optim.attention.attention_exact import NAME as EXACT

    pair = build_pair(settings, dtype)
    models = {"stock": pair.stock, PLAIN: pair.ours}
    forms = {"int8": {"bits": 8}, "int4": {"bits": 4}}
    if not settings.quick:
        forms["int4, groups of 32"] = {"bits": 4, "group_size": 32}
    for name, options in forms.items():
        packed = sharing_weights(pair.ours)
        AdaptivePrecision(**options, vision=16, mergers=16, originals="drop").apply(packed)
        models[name] = packed
    for name, model in models.items():
        if name != "stock":
            model.set_attn_implementation(EXACT)
    return models


def _held(model: Any) -> dict[str, Any]:
    from qwen3_vl.optim.weights.adaptive_precision import bytes_of

    decoder = [model.lm_head, model.model.language_model]
    return {"text_weights_mib": round(bytes_of(torch.nn.ModuleList(decoder)) / 2**20, 1)}


def _decoding(
    models: Callable[[], dict[str, Any]], settings: Settings, dtype: torch.dtype, tokens: int, steps: int
) -> dict[str, Way]:
    from qwen3_vl.optim.cache.cache_paged import PagedKVCache
    from qwen3_vl.optim.weights.linear_decode import DecodeLinear

    fill = partial(filled, layers=settings.text_layers, tokens=tokens, dtype=dtype, device=settings.device)
    paged, linear = fill(PagedKVCache()), DecodeLinear()

    def way(model: Any, history: Any, native_linear: bool = False, **options: Any) -> Way:
        def prepare() -> None:
            history.crop(tokens - history.get_seq_length())
            if native_linear:
                linear.apply(model)
            else:
                linear.revert(model)

        work = partial(decode, model, history, steps=steps, device=settings.device)
        return Way(work, prepare=prepare, details=partial(_held, model), **options)

    ways = {"stock": way(models()["stock"], fill(DynamicCache()))}
    ways[PLAIN] = way(models()[PLAIN], paged)
    ways[f"{PLAIN}, linear"] = way(models()[PLAIN], paged, native_linear=True)
    for name, model in models().items():
        if name not in ways:
            ways[name] = way(model, paged, against=(PLAIN, f"{PLAIN}, linear"))
    return ways


def _prefill(
    models: Callable[[], dict[str, Any]], settings: Settings, dtype: torch.dtype, tokens: int
) -> dict[str, Way]:
    inputs = picture_inputs(settings, dtype, text_tokens=tokens, grid=None)

    @torch.inference_mode()
    def forward(model: Any) -> torch.Tensor:
        return model(**inputs, use_cache=True, logits_to_keep=1).logits

    return {
        name: Way(
            partial(forward, model),
            details=partial(_held, model),
            against=() if name in ("stock", PLAIN) else (PLAIN,),
        )
        for name, model in models().items()
    }
