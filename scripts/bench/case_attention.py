"""Attention alone at the widths of 2B, one layer: a decoded token, and the whole prompt at once.

Stock is the attention function that the stock model calls, with what it gets there. Decoding goes through the caches
of several layers one after the other, so that keys and values come from memory, as they do in a model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from bench_contest import Contest, Way
from bench_inputs import Heads, mass_kept, noise_inputs, structured_inputs
from bench_pair import TEXT_2B, without_compiled
from bench_settings import Settings
from transformers.integrations.sdpa_attention import sdpa_attention_forward


DTYPES = ("bfloat16",)
HEADS = Heads(TEXT_2B["num_attention_heads"], TEXT_2B["num_key_value_heads"], TEXT_2B["head_dim"])
SCALING = HEADS.dim**-0.5
# Keys and values of all layers together, more than the processor's cache holds.
DECODE_BYTES, MOST_LAYERS = 2**28, 28
SAMPLED_ROWS = 64
# Of the causal square, what sink and window of the block-sparse rows leave.
BLOCK_SPARSE_DENSITY = 0.25
LONG = 16384


def rows(settings: Settings) -> Iterator[Contest]:
    for dtype_name in settings.dtypes:
        dtype = settings.torch_dtype(dtype_name)
        for phase, ways in (("decode", _decode_ways), ("prefill", _prefill_ways)):
            for tokens in (128, 512) if settings.quick else (1024, 8192, 32768):
                layers = 1 if phase == "prefill" else _layers(tokens, dtype, settings.quick)
                yield _contest(phase, tokens, dtype_name, "local structure", layers, partial(ways, settings, dtype))
        tokens = 512 if settings.quick else 8192
        yield _contest("prefill", tokens, dtype_name, "noise", 1, partial(_noise_ways, settings, dtype))


def _contest(phase: str, tokens: int, dtype_name: str, inputs: str, layers: int, ways: Callable) -> Contest:
    label = f"{phase} at {tokens:,}{' of noise' if inputs == 'noise' else ''}, {dtype_name}"
    sizes = {
        "phase": phase if inputs != "noise" else "prefill of noise",
        "context": tokens,
        "dtype": dtype_name,
        "query_heads": HEADS.query_heads,
        "kv_heads": HEADS.kv_heads,
        "head_dim": HEADS.dim,
        "layers_in_turn": layers,
        "inputs": inputs,
    }
    slow = phase == "prefill" and tokens >= LONG
    return Contest(label, sizes, partial(ways, tokens, layers), _relative_error, layers, 3 if slow else None)


def _relative_error(ours: torch.Tensor, stock: torch.Tensor) -> dict[str, float]:
    difference = (ours.float() - stock.float()).norm() / stock.float().norm()
    return {"relative_error": round(difference.item(), 5)}


def _layers(tokens: int, dtype: torch.dtype, quick: bool) -> int:
    one = _bytes_of_cache(tokens, dtype)
    return 2 if quick else min(MOST_LAYERS, max(1, -(-DECODE_BYTES // one)))


def _bytes_of_cache(tokens: int, dtype: torch.dtype) -> int:
    return 2 * tokens * HEADS.kv_heads * HEADS.dim * dtype.itemsize


class _Layer(torch.nn.Module):
    """What the attention functions look at of the module that calls them."""

    def __init__(self, settings: dict[str, Any]):
        super().__init__()
        self.num_key_value_groups = HEADS.query_heads // HEADS.kv_heads
        self.is_causal = True
        self.attention_settings = settings


def _technique_settings(tokens: int, quick: bool) -> dict[str, Any]:
    """Defaults, but for a window of the density that is asked for, and no exact path for short inputs if quick."""
    from qwen3_vl.optim.attention import attention_block_sparse, attention_dynamic_sparse

    window = round(tokens * (1 - (1 - BLOCK_SPARSE_DENSITY) ** 0.5))
    block_sparse = attention_block_sparse.BlockSparseSettings(window_tokens=window)
    dynamic = attention_dynamic_sparse.DynamicSparseSettings()
    if quick:
        dynamic = attention_dynamic_sparse.DynamicSparseSettings(
            dense_below_tokens=0, min_blocks=1, window_tokens=32, min_pages=2, page_tokens=16
        )
    return {attention_block_sparse.NAME: block_sparse, attention_dynamic_sparse.NAME: dynamic}


def _decode_ways(settings: Settings, dtype: torch.dtype, tokens: int, layers: int) -> dict[str, Way]:
    from qwen3_vl.optim.attention.attention_dynamic_sparse import dynamic_sparse_attention
    from qwen3_vl.optim.attention.attention_exact import exact_attention_forward
    from qwen3_vl.optim.attention.attention_layout import AttentionLayout

    techniques = _technique_settings(tokens, settings.quick)
    modules = [_Layer(techniques) for _ in range(layers)]
    inputs = [structured_inputs(HEADS, tokens, dtype, settings.device, seed) for seed in range(layers)]
    # A real copy, or the queries of the whole prompt stay in memory.
    inputs = [(query[:, :, -1:].clone(), key, value) for query, key, value in inputs]
    paged = [_paged_layer(key, value, 16 if settings.quick else 64) for _, key, value in inputs]

    def each_layer(attend: Callable) -> Callable:
        @torch.inference_mode()
        def work() -> torch.Tensor:
            layout = AttentionLayout(tokens - 1)  # one for all layers of a step, as a model makes it
            calls = enumerate(zip(modules, inputs, strict=True))
            return torch.stack([attend(module, *states, layout, index) for index, (module, states) in calls])

        return work

    def stock(module, query, key, value, layout, index):
        return sdpa_attention_forward(module, query, key, value, None, scaling=SCALING)[0]

    def from_pages(function, module, query, key, value, layout, index):
        new = key[:, :, -1:], value[:, :, -1:]
        return function(module, query, *new, layout, scaling=SCALING, kv_layer=paged[index])[0]

    def exact(module, query, key, value, layout, index):
        return exact_attention_forward(module, query, key, value, layout, scaling=SCALING)[0]

    read = _bytes_of_cache(tokens, dtype)
    sparse = partial(from_pages, dynamic_sparse_attention)
    ways = {
        "stock": Way(each_layer(stock), reads_bytes=read),
        "exact": Way(each_layer(exact), reads_bytes=read),
        "exact, paged": Way(each_layer(partial(from_pages, exact_attention_forward)), reads_bytes=read),
        "dynamic sparse, paged": Way(
            each_layer(sparse), details=lambda: _pages_kept(modules, inputs, tokens), against=("exact", "exact, paged")
        ),
    }
    if torch.device(settings.device).type == "cpu":
        ways["exact, plain"] = Way(each_layer(_plain_decode), reads_bytes=read)
        plain_sparse = _plain_sparse(techniques, inputs, tokens)
        ways["dynamic sparse, plain"] = Way(each_layer(plain_sparse), against=("exact, plain",))
    return ways


def _paged_layer(key: torch.Tensor, value: torch.Tensor, page_tokens: int) -> Any:
    from qwen3_vl.optim.cache.cache_paged import PagedLayer
    from qwen3_vl.optim.cache.memory_pool import PagePools

    layer = PagedLayer(PagePools(page_tokens))
    layer.update(key, value, dense=False)
    return layer


def _plain_decode(module, query, key, value, layout, index):
    from qwen3_vl.optim.attention.blocks_plain import plain_decode

    return plain_decode(query, key, value, layout, SCALING)


def _plain_sparse(techniques: dict[str, Any], inputs: list, tokens: int) -> Callable:
    """Pages chosen and gathered by PyTorch alone, from contiguous keys whose bounds are kept."""
    from qwen3_vl.optim.attention import attention_dynamic_sparse as dynamic
    from qwen3_vl.optim.attention.attention_layout import AttentionLayout
    from qwen3_vl.optim.attention.block_selection import page_bounds, select_pages
    from qwen3_vl.optim.attention.blocks_plain import plain_decode
    from qwen3_vl.optim.attention.page_scores import plain_page_scores

    options = techniques[dynamic.NAME]
    bounds = [page_bounds(key, AttentionLayout(tokens - 1), options.page_tokens) for _, key, _ in inputs]
    pages = -(-tokens // options.page_tokens)
    count = max(options.min_pages, math.ceil(options.decode_share * pages))

    def attend(module, query, key, value, layout, index):
        kept = None
        if tokens > options.dense_below_tokens and count < pages:
            numbers = tokens, options.page_tokens, count, options.window_tokens
            kept = select_pages(plain_page_scores(query, *bounds[index]), 1, layout, *numbers)
        return plain_decode(query, key, value, layout, SCALING, kept)

    return attend


def _pages_kept(modules: list[_Layer], inputs: list, tokens: int) -> dict[str, Any]:
    """Density and mass, over layers and heads."""
    position, shares, densities = torch.tensor([tokens - 1]), [], []
    for module, (query, key, _) in zip(modules, inputs, strict=True):
        computed = module.last_computed
        densities.append(computed.density())
        if computed.kept is None:
            return {"density": 1.0, "mass_kept": 1.0, "mass_kept_worst_head": 1.0}
        kept = computed.kept.mask[0].repeat_interleave(computed.kept.page_tokens, dim=1)[:, None, :tokens]
        shares.append(mass_kept(query, key, position.to(key.device), kept, SCALING))
    return {
        "density": round(sum(densities) / len(densities), 4),
        "mass_kept": round(sum(share["mass_kept"] for share in shares) / len(shares), 4),
        "mass_kept_worst_head": min(share["mass_kept_worst_head"] for share in shares),
    }


def _prefill_ways(settings: Settings, dtype: torch.dtype, tokens: int, layers: int) -> dict[str, Way]:
    states = structured_inputs(HEADS, tokens, dtype, settings.device)
    ways = _exact_prefill(states)
    sparse = _sparse_prefill(states, _technique_settings(tokens, settings.quick))
    if torch.device(settings.device).type == "cpu":
        ways["exact, plain"] = Way(without_compiled(ways["exact"].work))
    return {**ways, **sparse, "memory-efficient": _memory_efficient(states)}


def _noise_ways(settings: Settings, dtype: torch.dtype, tokens: int, layers: int) -> dict[str, Way]:
    states = noise_inputs(HEADS, tokens, dtype, settings.device)
    sparse = _sparse_prefill(states, _technique_settings(tokens, settings.quick))
    return {**_exact_prefill(states), "dynamic sparse": sparse["dynamic sparse"]}


def _exact_prefill(states: tuple) -> dict[str, Way]:
    from qwen3_vl.optim.attention.attention_exact import exact_attention_forward

    module = _Layer({})

    @torch.inference_mode()
    def stock() -> torch.Tensor:
        return sdpa_attention_forward(module, *states, None, scaling=SCALING)[0]

    @torch.inference_mode()
    def exact() -> torch.Tensor:
        return exact_attention_forward(module, *states, None, scaling=SCALING)[0]

    return {"stock": Way(stock), "exact": Way(exact)}


def _sparse_prefill(states: tuple, techniques: dict[str, Any]) -> dict[str, Way]:
    from qwen3_vl.optim.attention import attention_block_sparse as block_sparse
    from qwen3_vl.optim.attention.attention_dynamic_sparse import dynamic_sparse_attention
    from qwen3_vl.optim.attention.attention_layout import AttentionLayout

    module, tokens = _Layer(techniques), states[0].shape[2]

    @torch.inference_mode()
    def dynamic() -> torch.Tensor:
        return dynamic_sparse_attention(module, *states, AttentionLayout(0), scaling=SCALING)[0]

    @torch.inference_mode()
    def static() -> torch.Tensor:
        return block_sparse.block_sparse_attention(module, *states, AttentionLayout(0), scaling=SCALING)[0]

    def static_figures() -> dict[str, Any]:
        layout, options = AttentionLayout(0), techniques[block_sparse.NAME]
        pattern = block_sparse.pattern_of(layout, tokens, tokens, None, options, states[0].device)
        return _blocks_kept(*states[:2], pattern)

    return {
        "dynamic sparse": Way(
            dynamic, details=lambda: _blocks_kept(*states[:2], module.last_computed.kept), against=("exact",)
        ),
        "block sparse": Way(static, details=static_figures, against=("exact",)),
    }


def _blocks_kept(query: torch.Tensor, key: torch.Tensor, block_map: Any) -> dict[str, Any]:
    from qwen3_vl.optim.attention.attention_layout import AttentionLayout

    if block_map is None:
        return {"density": 1.0, "mass_kept": 1.0, "mass_kept_worst_head": 1.0}
    tokens = query.shape[2]
    density = block_map.density(AttentionLayout(0), tokens, tokens).item()
    sampled = torch.linspace(0, tokens - 1, SAMPLED_ROWS, device=key.device).long()
    flags = block_map.mask[0, :, sampled // block_map.query_block]
    kept = flags.repeat_interleave(block_map.key_block, dim=2)[..., :tokens]
    return {"density": round(density, 4), **mass_kept(query[:, :, sampled], key, sampled, kept, SCALING)}


def _memory_efficient(states: tuple) -> Way:
    from qwen3_vl.optim.attention.attention_memory_efficient import memory_efficient_attention_forward

    module = _Layer({})

    @torch.inference_mode()
    def work() -> torch.Tensor:
        return memory_efficient_attention_forward(module, *states, None, scaling=SCALING)[0]

    return Way(work, against=("exact",))
