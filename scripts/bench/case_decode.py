"""One decoded token of the whole model behind a long history, with the cache that it needs for it.

The caches are filled with random keys and values, so no prompt has to be computed; a run decodes a few tokens, and
what they added is dropped again before the next one. Against random keys attention is spread over everything, so the
agreement of the sparse rows says nothing of their quality.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from bench_contest import Contest, Way
from bench_measure import tensor_agreement
from bench_pair import TEXT_2B, ModelPair, build_pair, without_compiled
from bench_settings import Settings
from transformers import DynamicCache


DTYPES = ("bfloat16",)
FILLED_AT_ONCE = 4096


def rows(settings: Settings) -> Iterator[Contest]:
    return decode_rows(settings, "decode", _ways)


def decode_rows(
    settings: Settings,
    phase: str,
    make_ways: Callable[..., dict[str, Way]],
    contexts: tuple[int, ...] | None = None,
    agreement: Callable[..., dict[str, Any]] = tensor_agreement,
) -> Iterator[Contest]:
    """A contest for each context length, between the ways that `make_ways` gives to decode a few tokens."""
    steps = 2 if settings.quick else 8
    for dtype_name in settings.dtypes:
        dtype = settings.torch_dtype(dtype_name)
        pair = cache(partial(build_pair, settings, dtype))  # built only if a row is wanted
        for tokens in contexts or ((64, 512) if settings.quick else (1024, 8192, 32768)):
            yield Contest(
                label=f"{tokens:,} cached, {dtype_name}",
                sizes={
                    "phase": phase,
                    "context": tokens,
                    "dtype": dtype_name,
                    "steps": steps,
                    "text_layers": settings.text_layers,
                },
                ways=partial(make_ways, pair, settings, dtype, tokens, steps),
                agreement=agreement,
                calls=steps,
                most_repeats=5 if tokens > 16384 else None,
            )


def _ways(
    pair: Callable[[], ModelPair], settings: Settings, dtype: torch.dtype, tokens: int, steps: int
) -> dict[str, Way]:
    from qwen3_vl.optim.attention.attention_dynamic_sparse import NAME as DYNAMIC_SPARSE
    from qwen3_vl.optim.attention.attention_exact import NAME as EXACT
    from qwen3_vl.optim.cache.cache_paged import PagedKVCache
    from qwen3_vl.optim.cache.cache_quantized import QuantizedKVCache
    from qwen3_vl.optim.weights.linear_decode import DecodeLinear

    models, linear = pair(), DecodeLinear()
    fill = partial(filled, layers=settings.text_layers, tokens=tokens, dtype=dtype, device=settings.device)
    dynamic, paged, int4 = fill(DynamicCache()), fill(PagedKVCache()), fill(QuantizedKVCache(bits=4))
    work = partial(decode, steps=steps, device=settings.device)

    def way(model: Any, implementation: str, history: Any, native_linear: bool = False, **options: Any) -> Way:
        def prepare() -> None:
            history.crop(tokens - history.get_seq_length())
            if model is not models.stock:
                model.set_attn_implementation(implementation)
                (linear.apply if native_linear else linear.revert)(model)

        return Way(partial(work, model, history), prepare=prepare, **options)

    ways = {
        "stock": way(models.stock, "sdpa", fill(DynamicCache())),
        "exact, DynamicCache": way(models.ours, EXACT, dynamic),
        "exact, paged": way(models.ours, EXACT, paged),
        "exact, paged, linear": way(models.ours, EXACT, paged, native_linear=True, against=("exact, paged",)),
        "dynamic sparse, paged": way(models.ours, DYNAMIC_SPARSE, paged, against=("exact, paged",)),
        "dynamic sparse, paged, linear": way(models.ours, DYNAMIC_SPARSE, paged, native_linear=True),
        "exact, int4, linear": way(models.ours, EXACT, int4, native_linear=True),
        "dynamic sparse, int4, linear": way(
            models.ours, DYNAMIC_SPARSE, int4, native_linear=True, against=("exact, int4, linear",)
        ),
    }
    if torch.device(settings.device).type == "cpu":
        plain = way(models.ours, EXACT, dynamic)
        plain.work = without_compiled(plain.work)
        ways["exact, DynamicCache, plain"] = plain
    return ways


def filled(history: Any, *, layers: int, tokens: int, dtype: torch.dtype, device: str) -> Any:
    """`history` with `tokens` random keys and values in each layer, the same ones for every cache."""
    generator = torch.Generator().manual_seed(3)
    for start in range(0, tokens, FILLED_AT_ONCE):
        count = min(FILLED_AT_ONCE, tokens - start)
        shape = (1, TEXT_2B["num_key_value_heads"], count, TEXT_2B["head_dim"])
        for layer in range(layers):
            states = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))
            history.update(*states, layer)
    return history


@torch.inference_mode()
def decode(model: Any, history: Any, *, steps: int, device: str) -> torch.Tensor:
    """Logits (1, steps, vocabulary) of `steps` tokens, the same ones for every model, as `generate()` calls it."""
    return decode_behind(model, history, tokens=history.get_seq_length(), steps=steps, device=device)


def decode_behind(model: Any, history: Any, *, tokens: int, steps: int, device: str) -> torch.Tensor:
    """As [`decode`] behind so many tokens, for a cache that counts them on the device."""
    mask = torch.ones(1, tokens + steps, dtype=torch.long, device=device)
    logits = []
    for step in range(steps):
        output = model(
            input_ids=torch.full((1, 1), 100 + step, device=device),
            attention_mask=mask[:, : tokens + step + 1],
            position_ids=torch.full((3, 1, 1), tokens + step, device=device),
            past_key_values=history,
            use_cache=True,
        )
        logits.append(output.logits)
    return torch.cat(logits, dim=1)
