"""The presets against stock: a decoded token at several lengths, and the first token of a prompt with four pictures.

One way more composes a quarter of the visual tokens, int4 weights, int4 keys and values, and dynamic sparse attention.
With `--peer PATH` a column tells what llama.cpp's `llama-bench` measures at the same text widths, see `bench_peer.py`.
Weights, keys and values are random, so the agreement of lossy rows says nothing of their quality; `scripts/evaluate
--techniques` does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from bench_contest import Contest, Way
from bench_measure import tensor_agreement, token_agreement
from bench_pair import ModelPair, build_pair, picture_inputs, sharing_weights
from bench_peer import MOST_CONTEXT, peer_decode_ms, peer_prefill_ms
from bench_settings import Settings
from case_decode import decode, filled
from transformers import DynamicCache


DTYPES = ("bfloat16",)
PICTURES = 4
COMPOSITION = {
    "token_merging": {"keep_ratio": 0.25},
    "adaptive_precision": {"bits": 4, "originals": "drop"},
    "quantized_cache": {"bits": 4},
    "qwen3_vl_dynamic_sparse": {},
    "decode_linear": {},
    "faster_rotary": {},
}
# The weights of llama.cpp that come closest.
PEERS = {"minimal": "BF16", "aggressive": "Q4_0", "composition": "Q4_0"}


def rows(settings: Settings) -> Iterator[Contest]:
    steps = 2 if settings.quick else 8
    for dtype_name in settings.dtypes:
        dtype = settings.torch_dtype(dtype_name)
        models = cache(partial(_with_profiles, settings, dtype))
        shared = {"dtype": dtype_name, "text_layers": settings.text_layers}
        for tokens in (64, 512) if settings.quick else (1024, 8192, 32768):
            yield Contest(
                label=f"{tokens:,} cached, {dtype_name}",
                sizes={"phase": "time of a token", "context": tokens, "steps": steps, **shared},
                ways=partial(_decoding, models, settings, dtype, tokens, steps),
                agreement=tensor_agreement,
                calls=steps,
                most_repeats=5 if tokens > 16384 else None,
            )
        yield Contest(
            label=f"first token of {tokens_of_text(settings):,} tokens of text, {dtype_name}",
            sizes={"text_tokens": tokens_of_text(settings), **shared},
            ways=partial(_prefill_of_text, models, settings, dtype),
            agreement=token_agreement,
            most_repeats=3,
        )
        side = 64 if settings.quick else 1024
        yield Contest(
            label=f"first token about {PICTURES} pictures of {side:,}x{side:,}, {dtype_name}",
            sizes={"picture": side, "pictures": PICTURES, "vision_layers": settings.vision_layers, **shared},
            ways=partial(_prefill, models, settings, dtype, side),
            agreement=token_agreement,
            most_repeats=3,
        )


def _with_profiles(settings: Settings, dtype: torch.dtype) -> dict[str, Any]:
    """Stock, and a model for each preset, which share the weights that stay."""
    from qwen3_vl.configuration.profile_presets import PRESETS
    from qwen3_vl.optim.orchestrator_optim import optimize

    pair: ModelPair = build_pair(settings, dtype)
    models = {"stock": pair.stock}
    profiles: dict[str, Any] = {name: name for name in PRESETS}
    profiles["composition"] = COMPOSITION
    for name, profile in profiles.items():
        models[name] = optimize(sharing_weights(pair.ours), profile)
    return models


def _decoding(
    models: Callable[[], dict[str, Any]], settings: Settings, dtype: torch.dtype, tokens: int, steps: int
) -> dict[str, Way]:
    from qwen3_vl.optim.registry_optim import cache_from_profile

    fill = partial(filled, layers=settings.text_layers, tokens=tokens, dtype=dtype, device=settings.device)
    ways = {}
    for name, model in models().items():
        history = DynamicCache() if name == "stock" else cache_from_profile(model, 1, tokens + steps) or DynamicCache()
        work = partial(decode, model, fill(history), steps=steps, device=settings.device)
        peer = _peer(name, settings, peer_decode_ms, tokens) if tokens <= MOST_CONTEXT else {}
        ways[name] = Way(work, details=partial(_held, model, history, peer))
    return ways


def _prefill_of_text(models: Callable[[], dict[str, Any]], settings: Settings, dtype: torch.dtype) -> dict[str, Way]:
    tokens, ways = tokens_of_text(settings), {}
    inputs = picture_inputs(settings, dtype, text_tokens=tokens, grid=None)
    for name, model in models().items():
        peer = _peer(name, settings, peer_prefill_ms, tokens)
        ways[name] = Way(partial(_first_token, model, inputs), details=partial(dict, peer))
    return ways


def tokens_of_text(settings: Settings) -> int:
    return 64 if settings.quick else 1024


def _peer(name: str, settings: Settings, measure: Callable[..., float], tokens: int) -> dict[str, Any]:
    """What llama.cpp takes with the weights that a way is held against, if both are there."""
    if settings.peer is None or name not in PEERS:
        return {}
    return {"peer": PEERS[name], "peer_ms": round(measure(settings, PEERS[name], tokens), 3)}


def _prefill(
    models: Callable[[], dict[str, Any]], settings: Settings, dtype: torch.dtype, side: int
) -> dict[str, Way]:
    inputs = _pictures(settings, dtype, side)
    return {name: Way(partial(_first_token, model, inputs)) for name, model in models().items()}


def _pictures(settings: Settings, dtype: torch.dtype, side: int) -> dict[str, torch.Tensor]:
    one = picture_inputs(settings, dtype, text_tokens=32, grid=(side // 16, side // 16))
    picture = one["input_ids"].shape[1] - 32
    inputs = {}
    for name, value in one.items():
        by_token = name in ("input_ids", "attention_mask", "mm_token_type_ids")
        parts = value.split((picture, 32), dim=1) if by_token else (value, value[:0])
        inputs[name] = torch.cat((*[parts[0]] * PICTURES, parts[1]), dim=int(by_token))
    return inputs


@torch.inference_mode()
def _first_token(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return model.generate(**inputs, do_sample=False, max_new_tokens=1)[:, -1:]


def _held(model: Any, history: Any, peer: dict[str, Any]) -> dict[str, Any]:
    """Bytes of weights and of keys and values, beside the figures of a `peer`."""
    tensors = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(model)}
    if isinstance(history, DynamicCache):
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in history.layers)
    else:
        held = history.held_bytes
    return {"kv_mib": round(held / 2**20, 2), "weights_mib": round(sum(tensors.values()) / 2**20, 2), **peer}


def _tensors(model: Any) -> Iterator[torch.Tensor]:
    yield from model.parameters()
    yield from model.buffers()
