"""Which layers need their visual entries: measured on a few prompts, for the `layer_shares` of an evicting cache.

Layers differ: some read a picture again for every word of the answer, others have taken from it all they need when the
prompt is through. PyramidKV (arXiv 2406.02069) assumes an order; here it is measured.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F
from transformers.cache_utils import Cache, DynamicCache

from .cache_evicting import EvictingKVCache


# No layer gets less than this part of the mean, as prompts differ from those that were measured.
LEAST_PART = 0.1


def measure_layer_shares(
    model, batches: Sequence[dict], visual_share: float = 0.25, new_tokens: int = 24, **settings: Any
) -> tuple[float, ...]:
    """The share of visual entries that each layer should keep, with `visual_share` as their mean.

    Each layer in turn keeps half of `visual_share` while all others keep everything; what counts is how far the
    probabilities of the model's own greedy answers move (Kullback-Leibler). A layer's share goes with the root of it.
    One run of the prompt a layer, beside one to answer it.

    Args:
        model: with `generate()`, unchanged afterwards.
        batches: model inputs of prompts with pictures, as the processor makes them; some dozens of prompts that are
            like those to come.
        visual_share (`float`): mean over the layers, over 0 up to 1.
        new_tokens (`int`): length of the answers.
        settings: further arguments of [`EvictingKVCache`].
    Returns:
        for each layer its share, over 0 up to 1.
    Raises:
        ValueError: if there are no prompts, or none of their answers has a second token.
    """
    layers = len(DynamicCache(config=model.config).layers)
    moved, count = torch.zeros(layers, dtype=torch.float64), 0
    for inputs in batches:
        answers, counts = _answer(model, inputs, new_tokens)
        if not bool(counts.any()):
            continue
        expected = _log_probabilities(model, inputs, answers, DynamicCache(config=model.config))
        for layer in range(layers):
            shares = [1.0] * layers
            shares[layer] = visual_share / 2
            cache = EvictingKVCache(model.config, "modality", layer_shares=shares, **settings)
            found = _log_probabilities(model, inputs, answers, cache)
            divergence = F.kl_div(found, expected, reduction="none", log_target=True).sum(-1)
            moved[layer] += divergence[counts].double().sum().cpu()
        count += int(counts.sum())
    if not count:
        raise ValueError(
            f"{len(batches)} batches gave no answer of two tokens or more, so no layer can be judged; pass prompts "
            "whose answers are longer."
        )
    return shares_by_need((moved / count).clamp(min=0).sqrt().tolist(), visual_share)


def shares_by_need(needs: Sequence[float], mean: float) -> tuple[float, ...]:
    """Shares in proportion to `needs`, none under a tenth of `mean` nor over 1, whose mean is `mean`."""
    low, high = 0.0, 1.0
    needs = torch.tensor(needs, dtype=torch.float64).clamp(min=1e-12)
    needs = needs / needs.max()

    def shares(scale: float) -> torch.Tensor:
        return (needs * scale).clamp(LEAST_PART * mean, 1.0)

    while float(shares(high).mean()) < mean and high < 1e15:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if float(shares(middle).mean()) < mean else (low, middle)
    return tuple(round(share, 4) for share in shares(high).tolist())


@torch.no_grad()
def _answer(model, inputs: dict, new_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy answers (B, n), and which of their tokens but the first count, (B, n − 1) boolean."""
    options = {"do_sample": False, "num_beams": 1, "max_new_tokens": new_tokens}
    output = model.generate(**inputs, **options, past_key_values=DynamicCache(config=model.config))
    answers = output[:, inputs["input_ids"].shape[1] :]
    ends = model.generation_config.eos_token_id
    ends = torch.tensor([] if ends is None else ends, device=answers.device).flatten()
    ended = torch.isin(answers, ends).cumsum(1) > 0
    return answers, ~ended[:, :-1]


@torch.no_grad()
def _log_probabilities(model, inputs: dict, answers: torch.Tensor, cache: Cache) -> torch.Tensor:
    """Of what follows each token of the answers but the last: (B, n − 1, vocabulary)."""
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(inputs["input_ids"]) if mask is None else mask
    model(**inputs, past_key_values=cache, logits_to_keep=1)
    mask = F.pad(mask, (0, answers.shape[1] - 1), value=1)
    return model(input_ids=answers[:, :-1], attention_mask=mask, past_key_values=cache).logits.float().log_softmax(-1)
