"""The decoder over a prompt with pictures, where half of its blocks compute half of the visual tokens.

The decoder alone: the tower, which routing does not touch, would be most of the time beside four layers. Routers are
untrained here, which changes which tokens are computed and not how many; what routing costs in right answers is
measured by `scripts/tiny/route_tiny.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from bench_contest import Contest, Way
from bench_measure import tensor_agreement
from bench_pair import ModelPair, build_pair
from bench_settings import Settings


DTYPES = ("bfloat16",)
CAPACITIES = (0.5, 0.25)


def rows(settings: Settings) -> Iterator[Contest]:
    for dtype_name in settings.dtypes:
        dtype = settings.torch_dtype(dtype_name)
        layers = max(2, settings.text_layers)  # of one, the half is the whole
        pair = cache(partial(build_pair, settings, dtype, text_layers=layers))
        active: list[Any] = []  # on the one model of all rows
        for pictures, each, text in ((2, 16, 16),) if settings.quick else ((1, 1024, 128), (4, 1000, 96)):
            total = pictures * each + text
            yield Contest(
                label=f"{pictures} pictures, {total} tokens, {dtype_name}",
                sizes={
                    "phase": "prefill of the decoder",
                    "context": total,
                    "dtype": dtype_name,
                    "image_tokens": pictures * each,
                    "text_layers": layers,
                },
                ways=partial(_ways, pair, active, prompt(pictures, each, text, dtype, settings)),
                agreement=tensor_agreement,
                most_repeats=5 if total > 2048 else None,
            )


def prompt(pictures: int, each: int, text: int, dtype: torch.dtype, settings: Settings) -> dict[str, torch.Tensor]:
    """Inputs of the decoder: random embeddings, and pictures one after the other in front of the text."""
    visual, total = pictures * each, pictures * each + text
    generator = torch.Generator().manual_seed(2)
    inputs = {
        "inputs_embeds": torch.randn(1, total, 2048, generator=generator).to(dtype),
        "attention_mask": torch.ones(1, total, dtype=torch.long),
        "position_ids": torch.arange(total).expand(4, 1, -1),
        "visual_pos_masks": (torch.arange(total) < visual)[None],
    }
    return {name: tensor.to(settings.device) for name, tensor in inputs.items()}


def _ways(pair: Callable[[], ModelPair], active: list[Any], inputs: dict[str, torch.Tensor]) -> dict[str, Way]:
    from qwen3_vl import LearnedActivationRouting
    from qwen3_vl.optim.attention.attention_exact import NAME as EXACT

    models = pair()

    def way(model: Any, implementation: str, capacity: float | None = None) -> Way:
        routing = None if capacity is None else LearnedActivationRouting(capacity=capacity)

        def prepare() -> None:
            while active:
                active.pop().revert(models.ours)
            model.set_attn_implementation(implementation)
            if routing is not None:
                routing.apply(model)
                active.append(routing)

        @torch.inference_mode()
        def work() -> torch.Tensor:
            return model.model.language_model(**inputs, use_cache=True).last_hidden_state[:, -1]

        against = ("plain, exact",) if capacity else ()
        return Way(work, prepare=prepare, details=lambda: _shares(routing), against=against)

    ways = {"stock": way(models.stock, "sdpa"), "plain, exact": way(models.ours, EXACT)}
    return ways | {f"capacity {capacity}": way(models.ours, EXACT, capacity) for capacity in CAPACITIES}


def _shares(routing: Any) -> dict[str, Any]:
    return {} if routing is None else {"computed_shares": routing.computed_shares()}
