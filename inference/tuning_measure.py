"""What a profile does to a model on samples: time, memory held, and agreement with the exact model."""

from __future__ import annotations

import copy
import statistics
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from ..configuration.profile_qwen3_vl import UnifiedConfig
from ..optim.memory.memory_shapes import weight_bytes
from ..optim.memory.sparse_memory_manager import SparseMemoryManager
from ..optim.orchestrator_optim import UnifiedOptimizationManager


@dataclass(frozen=True)
class Measurement:
    """A profile beside the exact model on all samples.

    Args:
        prefill_ms, token_ms (`float`): medians until the first token, and of each later one; the latter is `None`
            where no answer is longer than a token.
        exact_prefill_ms, exact_token_ms (`float`): the same of the exact model, in turns with the former.
        time_ratio (`float`): median over samples of the time of a whole answer, of that of the exact model.
        held_bytes (`int`): weights, and the cache at the end of the longest request.
        top1_agreement (`float`): share of the exact model's tokens that the profile ranks first when it is given the
            exact model's tokens before them.
        token_agreement (`float`): share of the exact model's tokens that are the same, up to the first that differs,
            when it answers by itself.
    """

    prefill_ms: float
    token_ms: float | None
    exact_prefill_ms: float
    exact_token_ms: float | None
    time_ratio: float
    held_bytes: int
    top1_agreement: float
    token_agreement: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Side:
    """What one model took, by sample: lists of seconds until the first token, and behind it for each token."""

    model: Any
    prefill: dict[int, list[float]] = field(default_factory=dict)
    token: dict[int, list[float]] = field(default_factory=dict)
    cache_bytes: int = 0
    ranked_first: int = 0

    def answer_seconds(self, sample: int, tokens: int) -> float:
        later = statistics.median(self.token[sample]) * (tokens - 1) if sample in self.token else 0.0
        return statistics.median(self.prefill[sample]) + later

    def median_ms(self, times: dict[int, list[float]]) -> float | None:
        values = [seconds for runs in times.values() for seconds in runs]
        return round(1e3 * statistics.median(values), 3) if values else None

    @property
    def held_bytes(self) -> int:
        return sum(weight_bytes(self.model, self.model.dtype.itemsize)) + self.cache_bytes


class ProfileMeter:
    """Measures profiles beside the plain model, on inputs as the processor gives them.

    Each profile is applied to a copy of the model, so that memory for two models is needed.

    Args:
        model: the plain model; stays as it is.
        requests (`list[dict]`): inputs of `generate()`, one a sample.
        max_new_tokens (`int`): the most of an answer.
        rounds (`int`): how often each is timed.
    """

    def __init__(self, model: Any, requests: list[dict[str, Any]], max_new_tokens: int = 32, rounds: int = 3):
        self.model, self.requests, self.rounds = model, requests, rounds
        self.max_new_tokens = max_new_tokens
        self.answers = [self._answer(model, request) for request in requests]

    def measure(self, profile: UnifiedConfig) -> Measurement:
        """Applies a profile to a copy of the model and measures it.

        Raises:
            whatever a technique of the profile raises that cannot run here.
        """
        candidate = copy.deepcopy(self.model)
        UnifiedOptimizationManager(candidate, _not_to_be_reverted(profile), strict=True).apply()
        exact, other = Side(self.model), Side(candidate)
        same = sum(
            _common_prefix(self._answer(candidate, request), answer)
            for request, answer in zip(self.requests, self.answers, strict=True)
        )
        for turn in range(self.rounds + 1):
            for number in range(len(self.requests)):
                # In turns, so that whatever else the machine does slows both; the first turn warms up.
                for side in (exact, other) if turn % 2 else (other, exact):
                    self._forced(side, number, timed=turn > 0)
        tokens = sum(map(len, self.answers))
        ratios = [
            other.answer_seconds(number, len(answer)) / exact.answer_seconds(number, len(answer))
            for number, answer in enumerate(self.answers)
        ]
        return Measurement(
            prefill_ms=other.median_ms(other.prefill),
            token_ms=other.median_ms(other.token),
            exact_prefill_ms=exact.median_ms(exact.prefill),
            exact_token_ms=exact.median_ms(exact.token),
            time_ratio=round(statistics.median(ratios), 4),
            held_bytes=other.held_bytes,
            top1_agreement=other.ranked_first / (tokens * (self.rounds + 1)),
            token_agreement=same / tokens,
        )

    @property
    def exact_bytes(self) -> int:
        """What the plain model holds, with the cache of the longest request."""
        side = Side(self.model)
        for number in range(len(self.requests)):
            self._forced(side, number, timed=False)
        return side.held_bytes

    @torch.inference_mode()
    def _answer(self, model: Any, request: dict[str, Any]) -> list[int]:
        output = model.generate(**request, max_new_tokens=self.max_new_tokens, do_sample=False)
        return output[0, request["input_ids"].shape[1] :].tolist()

    @torch.inference_mode()
    def _forced(self, side: Side, number: int, timed: bool) -> None:
        """Lets a model say the exact model's answer, and notes when each token came and which it ranked first."""
        request, answer = self.requests[number], self.answers[number]
        forcing = Forcing(answer, request["input_ids"].shape[1])
        _synchronize(side.model.device)
        start = time.perf_counter()
        output = side.model.generate(
            **request,
            max_new_tokens=len(answer),
            do_sample=False,
            logits_processor=LogitsProcessorList([forcing]),
            return_dict_in_generate=True,
        )
        side.ranked_first += sum(int(best) == token for best, token in zip(forcing.best, answer, strict=True))
        if timed:
            side.prefill.setdefault(number, []).append(forcing.times[0] - start)
            if len(answer) > 1:
                later = (forcing.times[-1] - forcing.times[0]) / (len(answer) - 1)
                side.token.setdefault(number, []).append(later)
        cache = output.past_key_values
        if hasattr(cache, "layers"):
            side.cache_bytes = max(side.cache_bytes, SparseMemoryManager(side.model.config).count(cache).bytes)


class Forcing(LogitsProcessor):
    """Chooses given tokens whatever the logits say, and notes which they ranked first, and when.

    Args:
        tokens (`list[int]`): of the one row, one a step.
        prompt_tokens (`int`): how long the prompt is.
    """

    def __init__(self, tokens: list[int], prompt_tokens: int):
        self.tokens, self.prompt_tokens = tokens, prompt_tokens
        self.best: list[int] = []
        self.times: list[float] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Scores (1, vocabulary) that leave one token."""
        self.best.append(int(scores[0].argmax()))  # waits for the device
        self.times.append(time.perf_counter())
        forced = torch.full_like(scores, float("-inf"))
        forced[:, self.tokens[input_ids.shape[1] - self.prompt_tokens]] = 0.0
        return forced


def _not_to_be_reverted(profile: UnifiedConfig) -> UnifiedConfig:
    """The profile for a copy that is thrown away, whose weights need not wait on disk."""
    if "adaptive_precision" not in profile.techniques():
        return profile
    techniques = dict(profile.optimization.techniques)
    techniques["adaptive_precision"] = {**techniques.get("adaptive_precision", {}), "originals": "drop"}
    return profile.with_changes(optimization={"techniques": techniques})


def _common_prefix(first: list[int], second: list[int]) -> int:
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(first), len(second)))


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
