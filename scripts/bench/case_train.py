"""Training: what the loss holds at the official vocabulary, and a LoRA step behind a frozen tower.

The loss is measured alone, as stock computes it from the head's input to the gradients; look at the peaks there. The
step is that of a picture with a short answer, adapters on the decoder and only the answer labelled, with activation
checkpoints (as `Trainer(gradient_checkpointing=True)` and PEFT set them up) and without.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from bench_contest import Contest, Way
from bench_measure import tensor_agreement
from bench_pair import OFFICIAL_VOCABULARY, QUICK_VOCABULARY, TEXT_2B, build_pair, picture_inputs
from bench_settings import Settings


DTYPES = ("bfloat16",)
LOSS_TOKENS, QUICK_LOSS_TOKENS = 4096, 256
TEXT_TOKENS, ANSWER_TOKENS = 128, 32


def rows(settings: Settings) -> Iterator[Contest]:
    for dtype_name in settings.dtypes:
        dtype = settings.torch_dtype(dtype_name)
        tokens = QUICK_LOSS_TOKENS if settings.quick else LOSS_TOKENS
        vocabulary = QUICK_VOCABULARY if settings.quick else OFFICIAL_VOCABULARY
        for trained in (False, True):
            yield Contest(
                label=f"loss, {tokens:,} tokens, {'trained' if trained else 'frozen'} head, {dtype_name}",
                sizes={"dtype": dtype_name, "tokens": tokens, "vocabulary": vocabulary, "trained_head": trained},
                ways=partial(_loss_ways, settings, dtype, tokens, vocabulary, trained),
                agreement=tensor_agreement,
                most_repeats=1,
            )
        grid = (8, 8) if settings.quick else (64, 64)
        for checkpointing in (True,) if settings.quick else (True, False):
            yield Contest(
                label=f"LoRA step, {'checkpoints' if checkpointing else 'no checkpoints'}, {dtype_name}",
                sizes={
                    "dtype": dtype_name,
                    "image_tokens": grid[0] * grid[1] // 4,
                    "text_tokens": TEXT_TOKENS,
                    "text_layers": settings.text_layers,
                    "vision_layers": settings.vision_layers,
                },
                ways=partial(_step_ways, settings, dtype, grid, checkpointing),
                agreement=tensor_agreement,
                most_repeats=5,
            )


def _loss_ways(settings: Settings, dtype: torch.dtype, tokens: int, vocabulary: int, trained: bool) -> dict[str, Way]:
    from transformers.loss.loss_utils import ForCausalLMLoss

    from qwen3_vl import chunked_cross_entropy

    generator = torch.Generator().manual_seed(1)
    width = TEXT_2B["hidden_size"]
    hidden = torch.randn(1, tokens, width, generator=generator).to(settings.device, dtype).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=generator).mul_(width**-0.5).to(settings.device, dtype)
    weight.requires_grad_(trained)
    labels = torch.randint(0, vocabulary, (1, tokens), generator=generator).to(settings.device)

    def stock() -> torch.Tensor:
        logits = hidden @ weight.T  # held until the step is done, as the model's output holds them
        ForCausalLMLoss(logits=logits, labels=None, shift_labels=labels, vocab_size=vocabulary).backward()
        return hidden.grad

    def ours() -> torch.Tensor:
        chunked_cross_entropy(hidden, weight, labels).backward()
        return hidden.grad

    def prepare() -> None:
        hidden.grad = weight.grad = None

    work = {"stock": stock, "chunked": stock if settings.against_itself else ours}
    return {name: Way(way, prepare) for name, way in work.items()}


def _step_ways(settings: Settings, dtype: torch.dtype, grid: tuple[int, int], checkpointing: bool) -> dict[str, Way]:
    from qwen3_vl import MemoryEfficientGradientAccumulation

    pair = build_pair(settings, dtype)
    inputs = picture_inputs(settings, dtype, text_tokens=TEXT_TOKENS, grid=grid)
    labels = inputs["input_ids"].clone()
    labels[:, :-ANSWER_TOKENS] = -100
    if not settings.against_itself:
        MemoryEfficientGradientAccumulation(checkpointing=checkpointing).apply(pair.ours)
    elif checkpointing:
        _checkpoint(pair.ours)
    if checkpointing:
        _checkpoint(pair.stock)
    return {
        name: _step(_with_adapters(model, checkpointing), {**inputs, "labels": labels})
        for name, model in (("stock", pair.stock), ("gradient_accumulation", pair.ours))
    }


def _checkpoint(model: Any) -> None:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _with_adapters(model: Any, checkpointing: bool) -> Any:
    from peft import LoraConfig, get_peft_model

    from qwen3_vl import lora_targets

    torch.manual_seed(2)
    if checkpointing:
        model.enable_input_require_grads()
    return get_peft_model(model, LoraConfig(r=16, **lora_targets(model, "language"))).train()


def _step(model: Any, inputs: dict[str, torch.Tensor]) -> Way:
    trained = [weight for weight in model.parameters() if weight.requires_grad]

    def step() -> torch.Tensor:
        model(**inputs, use_cache=False).loss.backward()
        return torch.cat([weight.grad.flatten() for weight in trained])

    def prepare() -> None:
        model.zero_grad(set_to_none=True)

    return Way(step, prepare)
