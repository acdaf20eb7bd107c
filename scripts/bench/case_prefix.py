"""Time to the first token of another question about a picture that was seen before, prompt and all.

Stock pays the vision tower and the prefill again. The first question of ours does too; the second finds both in a
`PrefixCache`. Where the picture stood behind other text before, its keys are of no use, and only the
`VisionFeatureCache` spares something. Every run asks a question of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import count
from typing import Any

import torch
from bench_contest import Contest, Way
from bench_measure import token_agreement
from bench_pair import ModelPair, build_pair, picture_inputs, special_tokens
from bench_settings import Settings


DTYPES = ("bfloat16",)
QUESTION_TOKENS = 32


def rows(settings: Settings) -> Iterator[Contest]:
    for dtype_name in settings.dtypes:
        dtype = settings.torch_dtype(dtype_name)
        pair = cache(partial(build_pair, settings, dtype))  # built only if a row is wanted
        for side in (128,) if settings.quick else (512, 1024):
            yield Contest(
                label=f"first token about {side:,}x{side:,}, {dtype_name}",
                sizes={
                    "picture": side,
                    "question_tokens": QUESTION_TOKENS,
                    "dtype": dtype_name,
                    "text_layers": settings.text_layers,
                    "vision_layers": settings.vision_layers,
                },
                ways=partial(_ways, pair, settings, dtype, side),
                agreement=token_agreement,
                most_repeats=5,
            )


def _ways(pair: Callable[[], ModelPair], settings: Settings, dtype: torch.dtype, side: int) -> dict[str, Way]:
    from qwen3_vl import PrefixCache, VisionFeatureCache
    from qwen3_vl.optim.attention.attention_exact import NAME as EXACT

    models = pair()
    models.ours.set_attn_implementation(EXACT)
    ask = partial(_Questions, settings, dtype, side)
    nothing, known, features = PrefixCache(), PrefixCache(), VisionFeatureCache()

    def way(model: Any, questions: _Questions, *techniques: Any, prepare: Any = None, **options: Any) -> Way:
        def ready() -> None:
            for name in ("prefix_cache", "vision_feature_cache"):  # the row before leaves its last one
                if hasattr(models.ours, name):
                    getattr(models.ours, name).revert(models.ours)
            for technique in techniques:
                technique.apply(models.ours)
            if prepare is not None:
                prepare()

        return Way(partial(_first_token, model, questions), prepare=ready, **options)

    def seen_before(technique: Any, move: bool = False) -> Callable[[], None]:
        """Asks one question that is not timed, once."""
        first = ask(move, start=1_000_000)

        def prepare() -> None:
            if not technique.statistics().misses:
                _first_token(models.ours, first)

        return prepare

    first = "ours, first question"
    return {
        "stock": way(models.stock, ask()),
        first: way(models.ours, ask(), nothing, prepare=nothing.clear),
        "second question": way(
            models.ours,
            ask(),
            known,
            prepare=seen_before(known),
            details=lambda: {"tokens_reused": known.statistics().tokens_reused},
            against=(first,),
        ),
        "picture seen elsewhere": way(
            models.ours, ask(), features, prepare=seen_before(features, move=True), against=(first,)
        ),
    }


class _Questions:
    """Prompts with the same picture and another question each time; with `move`, the text is in front of it."""

    def __init__(self, settings: Settings, dtype: torch.dtype, side: int, move: bool = False, start: int = 0):
        self.inputs = picture_inputs(settings, dtype, text_tokens=QUESTION_TOKENS, grid=(side // 16, side // 16))
        self.vocabulary = special_tokens(settings.quick)["vision_start"] // 2
        self.move, self.seeds = move, count(start)

    def next(self) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(next(self.seeds))
        ids = self.inputs["input_ids"]
        picture = ids[:, :-QUESTION_TOKENS]
        text = torch.randint(0, self.vocabulary, (1, QUESTION_TOKENS), generator=generator).to(ids.device)
        ids = torch.cat((text, picture) if self.move else (picture, text), dim=1)
        types = self.inputs["mm_token_type_ids"].roll(QUESTION_TOKENS if self.move else 0, 1)
        return {**self.inputs, "input_ids": ids, "mm_token_type_ids": types}


@torch.inference_mode()
def _first_token(model: Any, questions: _Questions) -> torch.Tensor:
    return model.generate(**questions.next(), do_sample=False, max_new_tokens=1)[:, -1:]
