"""What a decoded token costs with each cache, and how much each holds: whole steps at the widths of the 2B model.

All but stock run `qwen3_vl_exact`. Keys and values are random, so the agreement of lossy rows says nothing of their
quality; `scripts/evaluate --techniques` does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from bench_contest import Contest, Way
from bench_pair import TEXT_2B, ModelPair, without_compiled
from bench_settings import Settings
from case_decode import decode, decode_rows, filled
from transformers import DynamicCache


DTYPES = ("bfloat16",)
# Share of the history that is pictures, of which the evicting cache keeps a quarter.
VISUAL_SHARE = 0.75


def rows(settings: Settings) -> Iterator[Contest]:
    return decode_rows(settings, "time of a token", _ways)


def _ways(
    pair: Callable[[], ModelPair], settings: Settings, dtype: torch.dtype, tokens: int, steps: int
) -> dict[str, Way]:
    from qwen3_vl import CrossLayerKVCache, EvictingKVCache, PagedKVCache, QuantizedKVCache, TieredKVCache

    models = pair()
    models.ours.set_attn_implementation("qwen3_vl_exact")
    fill = partial(filled, layers=settings.text_layers, tokens=tokens, dtype=dtype, device=settings.device)
    work = partial(decode, steps=steps, device=settings.device)
    config = models.ours.config.get_text_config()
    evicting = EvictingKVCache(config, window_tokens=32)
    _fill_at_once(evicting, fill(DynamicCache()))

    def way(history: Any, model: Any = models.ours, **options: Any) -> Way:
        return Way(partial(work, model, history), details=partial(_held, history), **options)

    beside = ("paged",)
    ways = {
        "stock": way(fill(DynamicCache()), models.stock),
        "paged": way(fill(PagedKVCache())),
        "int8": way(fill(QuantizedKVCache(bits=8)), against=beside),
        "int4": way(fill(QuantizedKVCache(bits=4)), against=beside),
        "int2": way(fill(QuantizedKVCache(bits=2)), against=beside),
        "evicting, a quarter of the pictures": way(evicting, against=beside),
        "tiered, from 16,384 on in a file": way(fill(TieredKVCache(config)), against=beside),
    }
    if settings.text_layers > 1:
        # Random layers are not alike: merged all the same, for the time that it takes.
        ways["cross-layer"] = way(fill(CrossLayerKVCache(config, min_similarity=0.0)), against=beside)
    if torch.device(settings.device).type == "cpu":
        plain = way(fill(QuantizedKVCache(bits=4)))
        plain.work = without_compiled(plain.work)
        ways["int4, plain"] = plain
    return ways


def _fill_at_once(history: Any, states: DynamicCache) -> None:
    """As a prefill does: one picture in the middle, random queries."""
    batch, _, tokens, _ = states.layers[0].keys.shape
    visual = torch.zeros(batch, tokens, dtype=torch.int32)
    start = int(tokens * (1 - VISUAL_SHARE) / 2)
    visual[:, start : start + int(tokens * VISUAL_SHARE)] = 1
    history.prepare_forward(batch, tokens, None, visual)
    generator = torch.Generator().manual_seed(4)
    for index, layer in enumerate(states.layers):
        shape = (batch, TEXT_2B["num_attention_heads"], tokens, TEXT_2B["head_dim"])
        queries = torch.randn(shape, generator=generator).to(layer.keys)
        history.update(layer.keys, layer.values, index, dense=False, query_states=queries)


def _held(history: Any) -> dict[str, Any]:
    """What the cache itself holds, and its share of keys and values of all tokens in the model's dtype."""
    if isinstance(history, DynamicCache):
        held = whole = sum(layer.keys.nbytes + layer.values.nbytes for layer in history.layers)
    else:
        held = history.held_bytes
        entry = 2 * TEXT_2B["num_key_value_heads"] * TEXT_2B["head_dim"] * torch.bfloat16.itemsize
        whole = len(history.layers) * history.get_seq_length() * entry
    return {"held_mib": round(held / 2**20, 2), "share_of_whole": round(held / whole, 4)}
