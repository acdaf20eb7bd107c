"""What packing each block of a model costs on samples, and the best choice of bits under a budget."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from .precision_groups import PLAIN_BITS


# {group: {bits: mean KL divergence of the logits in nats}}
Sensitivity = dict[str, dict[int, float]]
POSITIONS_AT_ONCE = 256


@torch.no_grad()
def measure_sensitivity(
    model, samples: list[Mapping[str, Any]], candidates: Mapping[str, Mapping[int, int]], install: Callable
) -> Sensitivity:
    """Mean KL divergence of the logits from the plain model's, for every group alone at every width.

    Args:
        model: plain; put into evaluation mode while it runs.
        samples: inputs of the model. Padding does not count.
        candidates: `{group: {bits: bytes}}`.
        install (callable): `(model, group, bits)` packs one group and returns something with `undo()`.
    """
    training = model.training
    model.eval()
    try:
        plain = [_logits(model, sample) for sample in samples]
        measured = {}
        for group, options in candidates.items():
            measured[group] = {PLAIN_BITS: 0.0}
            for bits in options:
                if bits == PLAIN_BITS:
                    continue
                installation = install(model, group, bits)
                try:
                    changed = [_logits(model, sample) for sample in samples]
                finally:
                    installation.undo()
                measured[group][bits] = _mean_divergence(plain, changed)
        return measured
    finally:
        model.train(training)


def _logits(model, sample: Mapping[str, Any]) -> torch.Tensor:
    """(tokens, vocabulary) of the tokens that are no padding."""
    inputs = {name: value for name, value in sample.items() if name not in ("labels", "use_cache")}
    logits = model(**inputs, use_cache=False).logits
    mask = sample.get("attention_mask")
    return logits.flatten(0, 1) if mask is None else logits[mask.bool()]


def _mean_divergence(plain: list[torch.Tensor], changed: list[torch.Tensor]) -> float:
    total, count = 0.0, 0
    for before, after in zip(plain, changed, strict=True):
        for p, q in zip(before.split(POSITIONS_AT_ONCE), after.split(POSITIONS_AT_ONCE), strict=True):
            p, q = p.float().log_softmax(-1), q.float().log_softmax(-1)
            total += float((p.exp() * (p - q)).sum())
        count += len(before)
    return max(total / count, 0.0)


def choose_bits(
    candidates: Mapping[str, Mapping[int, int]], sensitivity: Sensitivity, budget_bytes: int, rest_bytes: int = 0
) -> dict[str, int]:
    """Lowers bits where it costs least for each byte until all fits, then raises again what still has room.

    Args:
        candidates: `{group: {bits: bytes}}`.
        sensitivity: `{group: {bits: cost}}`; what is missing costs nothing.
        budget_bytes (`int`): for all groups and the rest.
        rest_bytes (`int`): of what is not chosen.
    Raises:
        ValueError: if even the narrowest choice is larger.
    """
    if isinstance(budget_bytes, bool) or not isinstance(budget_bytes, int) or budget_bytes < 1:
        raise ValueError(f"budget_bytes must be a positive whole number of bytes, got {budget_bytes!r}.")
    least = rest_bytes + sum(min(options.values()) for options in candidates.values())
    if least > budget_bytes:
        raise ValueError(
            f"the model needs at least {least} bytes with every part at its narrowest, got budget_bytes="
            f"{budget_bytes}; give a larger budget, or allow 4 bits for more parts."
        )

    def cost(group: str, bits: int) -> float:
        return sensitivity.get(group, {}).get(bits, 0.0)

    chosen = {group: max(options) for group, options in candidates.items()}
    size = rest_bytes + sum(options[chosen[group]] for group, options in candidates.items())
    while size > budget_bytes:
        steps = [
            ((cost(group, bits) - cost(group, now)) / (candidates[group][now] - candidates[group][bits]), group, bits)
            for group, now in chosen.items()
            for bits in candidates[group]
            if candidates[group][bits] < candidates[group][now]
        ]
        _, group, bits = min(steps)
        size -= candidates[group][chosen[group]] - candidates[group][bits]
        chosen[group] = bits
    return _raise_what_fits(candidates, cost, chosen, budget_bytes - size)


def _raise_what_fits(candidates, cost: Callable, chosen: dict[str, int], room: int) -> dict[str, int]:
    while True:
        steps = [
            (cost(group, now) - cost(group, bits), group, bits)
            for group, now in chosen.items()
            for bits in candidates[group]
            if 0 <= candidates[group][bits] - candidates[group][now] <= room and cost(group, bits) < cost(group, now)
        ]
        if not steps:
            return chosen
        _, group, bits = max(steps)
        room -= candidates[group][bits] - candidates[group][chosen[group]]
        chosen[group] = bits
