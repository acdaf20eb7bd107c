"""Picks, sizes and installs a cache for a model and a budget."""

from pathlib import Path
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache

from ..cache.cache_paged import PagedKVCache
from ..cache.cache_quantized import QuantizedKVCache
from ..cache.memory_pool import device_memory
from ..technique_optim import Technique
from .chunked_vision import ChunkedVision
from .memory_caches import GROUP_SIZE, PAGE_TOKENS, RESIDUAL_TOKENS, cache_choices, find_cache
from .memory_formulas import decode_peak, heap_slack
from .memory_plan import MemoryPlan, plan_memory
from .memory_request import MemoryRequest, RequestSizes
from .memory_shapes import ModelShapes, weight_bytes
from .memory_units import format_bytes, parse_bytes


class KVCachingOptimization(Technique):
    """Gives every request of `generate()` the best cache that fits: exact, else in 8, 4 or 2 bits.

    Rows and length of the request are known by then, so a short one stays exact where a long one is packed.

    Args:
        config: accepted and not read.
        budget (`int` or `str`, *optional*): bytes of weights, cache and a decoding step together, or `"8GB"`; by
            default the weights and what is free of the device when the request comes.
        cache (`str`): `auto`, or the name of one cache: `dynamic`, `paged`, `int8`, `int4`, `int2`.
        lossy (`bool`): whether `auto` may pick packed caches, default true.
    Raises:
        ValueError: for an unknown cache or setting, or a budget that is no amount above 0.
    """

    name = "kv_caching"
    role = "cache"

    def __init__(
        self, config=None, budget: int | str | None = None, cache: str = "auto", lossy: bool = True, **unknown
    ):
        if unknown:
            raise ValueError(f"{self.name} has no setting {next(iter(unknown))!r}; it takes budget, cache and lossy.")
        super().__init__(budget=budget, cache=cache, lossy=lossy)
        self.budget = None if budget is None else parse_bytes(budget)
        self.choice = None if cache == "auto" else find_cache(cache)
        self.exact = not lossy if self.choice is None else self.choice.exact

    def apply(self, model) -> None:
        """Nothing to change: the cache is asked for by `make_cache`."""

    def revert(self, model) -> None:
        """Nothing to undo."""

    def make_cache(self, model, batch_size: int, max_length: int) -> Cache | None:
        """The cache of a request of `batch_size` rows and at most `max_length` tokens.

        Raises:
            MemoryError: if none fits.
        """
        choice = self.choice or self._choose(model, batch_size, max_length)
        if choice.name == "paged":
            return PagedKVCache(model.config, PAGE_TOKENS)
        if choice.bits:
            return QuantizedKVCache(model.config, choice.bits, GROUP_SIZE, RESIDUAL_TOKENS)
        return DynamicCache(config=model.config) if self.choice else None

    def _choose(self, model, rows: int, tokens: int):
        shapes, itemsize = ModelShapes.of_config(model.config), model.dtype.itemsize
        attention = model.config.get_text_config()._attn_implementation or "sdpa"
        if self.budget is None:
            room = available_memory(model.device)
        else:
            room = self.budget - sum(weight_bytes(model, itemsize))
        sizes = RequestSizes((), (), tokens, 0, 0, 1, shapes.merge)
        needs = {}
        for choice in cache_choices(attention, self.settings["lossy"], shapes.head_dim):
            step = decode_peak(shapes, sizes, rows, itemsize, attention, choice.name)
            on_cpu = model.device.type == "cpu"
            slack = heap_slack(step.largest_block) + choice.rounding(shapes, rows, tokens, itemsize) if on_cpu else 0
            needs[choice.name] = choice.bytes_held(shapes, rows, tokens, itemsize) + step.bytes + slack
            if needs[choice.name] <= room:
                return choice
        name = min(needs, key=needs.get)
        raise MemoryError(
            f"no cache fits: {rows} rows of {tokens} tokens need {format_bytes(needs[name])} as {name} and "
            f"{format_bytes(max(room, 0))} are left beside the weights; raise the budget, or use fewer rows or "
            "tokens."
        )


class KVCacheOptimizer:
    """Sets a model up for a budget.

    Without a request, each call of `generate()` gets the best cache that fits then ([`KVCachingOptimization`]). With
    one, the whole plan is applied: the cache, the groups of the vision tower and the chunks of the prefill.

    Args:
        config (*optional*): of the model; the model's own is what counts.
        budget (`int` or `str`, *optional*): bytes, or `"8GB"`; by default what the device has.
        request ([`MemoryRequest`], *optional*): the largest that will run.
        lossy (`bool`): whether packed caches may be picked, default true.
    Raises:
        ValueError: for a budget that is no amount above 0.
    """

    def __init__(
        self,
        config: Any = None,
        budget: int | str | None = None,
        request: MemoryRequest | None = None,
        lossy: bool = True,
    ):
        self.config, self.request, self.lossy = config, request, lossy
        self.budget = None if budget is None else parse_bytes(budget)
        self.plan: MemoryPlan | None = None
        self._installed: list[tuple[Any, list[Technique], int | None]] = []

    def apply_optimizations(self, model):
        """Installs what was chosen, in place, and returns the model.

        Raises:
            MemoryError: if the request does not fit the budget in any way.
            ValueError: if this optimizer is applied to the model already.
        """
        if any(entry[0] is model for entry in self._installed):
            raise ValueError("these optimizations are applied to the model already; revert them first.")
        self.plan = None
        if self.request is not None:
            budget = self.budget or device_memory(model.device)
            self.plan = plan_memory(model, self.request, budget, lossy=self.lossy)
        techniques = self._techniques(model)
        for technique in techniques:
            technique.apply(model)
        # In front: of several techniques that make a cache, the first one does.
        model.active_techniques = [*techniques, *getattr(model, "active_techniques", ())]
        settings = getattr(model, "generation_config", None)
        self._installed.append((model, techniques, getattr(settings, "prefill_chunk_size", None)))
        if self.plan is not None and settings is not None:
            settings.prefill_chunk_size = self.plan.prefill_chunk
        return model

    def revert(self, model) -> None:
        """Undoes `apply_optimizations`."""
        for entry in [entry for entry in self._installed if entry[0] is model]:
            _, techniques, chunk = entry
            for technique in techniques:
                technique.revert(model)
            model.active_techniques = [own for own in model.active_techniques if own not in techniques]
            if getattr(model, "generation_config", None) is not None:
                model.generation_config.prefill_chunk_size = chunk
            self._installed.remove(entry)

    def _techniques(self, model) -> list[Technique]:
        if self.plan is None:
            return [KVCachingOptimization(budget=self.budget, lossy=self.lossy)]
        techniques: list[Technique] = [KVCachingOptimization(cache=self.plan.cache)]
        if self.plan.max_patches is not None:
            techniques.append(ChunkedVision(max_patches=self.plan.max_patches))
        return techniques


def available_memory(device: torch.device) -> int:
    """Bytes that are free on a device; where the system does not say, all that it has."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return device_memory(device)
