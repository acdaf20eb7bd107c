"""One decoded token of the whole model: exact attention uncompiled, our native products and passes, the compiled step.

Behind 1,024 cached tokens, as in `decode`. The compiled way waits for the compiler in its first run, which is not
timed. All models share one set of weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from bench_contest import Contest, Way
from bench_measure import tensor_agreement
from bench_pair import ModelPair, sharing_weights
from bench_settings import Settings
from case_decode import decode_behind, decode_rows, filled
from transformers import DynamicCache


DTYPES = ("bfloat16", "float32")


def rows(settings: Settings) -> Iterator[Contest]:
    dtypes = settings.dtypes[:1] if settings.quick else settings.dtypes  # each waits for the compiler
    contexts = (64,) if settings.quick else (1024,)
    return decode_rows(replace(settings, dtypes=dtypes), "decode", _ways, contexts, _agreement)


def _ways(
    pair: Callable[[], ModelPair], settings: Settings, dtype: torch.dtype, tokens: int, steps: int
) -> dict[str, Way]:
    from qwen3_vl.optim.attention.attention_exact import NAME as EXACT
    from qwen3_vl.optim.attention.rotary_faster import FasterRotaryEmbeddings
    from qwen3_vl.optim.cache.cache_paged import PagedKVCache
    from qwen3_vl.optim.weights.compiled_decode import CompiledDecode
    from qwen3_vl.optim.weights.kernel_fusion import KernelFusion
    from qwen3_vl.optim.weights.linear_decode import DecodeLinear

    models = pair()
    fill = partial(filled, layers=settings.text_layers, tokens=tokens, dtype=dtype, device=settings.device)

    def way(model: Any, history: Any, **options: Any) -> Way:
        work = partial(
            torch.no_grad()(decode_behind), model, history, tokens=tokens, steps=steps, device=settings.device
        )
        return Way(work, prepare=partial(_back_to, history, tokens), **options)

    def with_techniques(*techniques: Any) -> Any:
        model = sharing_weights(models.ours)
        model.set_attn_implementation(EXACT)
        for technique in techniques:
            technique.apply(model)
        return model

    if settings.against_itself:
        return {"stock": way(models.stock, fill(DynamicCache()))}
    plain, native = "exact, paged", "exact, paged, linear"
    ways = {
        "stock": way(models.stock, fill(DynamicCache())),
        plain: way(with_techniques(), fill(PagedKVCache())),
        native: way(with_techniques(DecodeLinear()), fill(PagedKVCache()), against=(plain,)),
    }
    fused = with_techniques(DecodeLinear(), KernelFusion(), FasterRotaryEmbeddings())
    ways["exact, paged, fused"] = way(fused, fill(PagedKVCache()), against=(plain, native))
    technique = CompiledDecode(bucket_tokens=256)
    compiled = with_techniques(technique)
    history = fill(technique.make_cache(compiled, 1, tokens + steps))
    ways["compiled"] = way(compiled, history, details=lambda: _state(technique), against=(plain, native))
    return ways


def _state(technique: Any) -> dict[str, Any]:
    return {"compiled_steps": technique.step.steps, "failure": technique.step.failure}


def _agreement(output: torch.Tensor, reference: torch.Tensor) -> dict[str, Any]:
    equal = (output.argmax(-1) == reference.argmax(-1)).float().mean().item()
    return {**tensor_agreement(output, reference), "equal_best_tokens": equal}


def _back_to(history: Any, tokens: int) -> None:
    """Drops what earlier runs added; a static cache only has its counts put back."""
    if history.is_compileable:
        for layer in history.layers:
            layer.cumulative_length.fill_(tokens)
    elif history.get_seq_length() > tokens:
        history.crop(tokens - history.get_seq_length())
