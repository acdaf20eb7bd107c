"""The search for profiles: what may be chosen, by Optuna, under a floor for the quality."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ..configuration.profile_presets import PRESETS
from ..configuration.profile_qwen3_vl import UnifiedConfig
from .answering import AnsweringError, first_line
from .tuning_measure import Measurement


SEED = 0
SPARSE_FROM = 2048  # tokens of a prompt; below, sparse attention computes everything
CHOICES: dict[str, tuple[Any, ...]] = {
    "attention": ("qwen3_vl_exact", "qwen3_vl_dynamic_sparse"),
    "weight_bits": (None, 8, 4),
    "kv_cache": ("auto", "int8", "int4", "int2", "evicting"),
    "visual_keep_ratio": (1.0, 0.75, 0.5, 0.35, 0.25),
}


@dataclass(frozen=True)
class Trial:
    """One profile that was tried: what it is, and what it measured or why it did not run."""

    number: int
    profile: UnifiedConfig
    measurement: Measurement | None
    failure: str | None = None

    @property
    def title(self) -> str:
        """What was chosen, in words."""
        chosen, cache = self.profile.optimization, self.profile.memory.kv_cache
        parts = [
            f"int{chosen.weight_bits} weights" if chosen.weight_bits else "",
            f"{cache} cache" if cache != "auto" else "",
            f"{chosen.visual_keep_ratio:.0%} of visual tokens" if chosen.visual_keep_ratio < 1 else "",
            "sparse attention" if "sparse" in chosen.attention else "",
        ]
        return ", ".join(part for part in parts if part) or "exact, by faster kernels"

    def fits(self, target: float) -> bool:
        return self.measurement is not None and self.measurement.top1_agreement >= target

    def to_dict(self) -> dict[str, Any]:
        measured = None if self.measurement is None else self.measurement.to_dict()
        return {
            "trial": self.number,
            "profile": self.profile.to_dict(),
            "measurement": measured,
            "failure": self.failure,
        }


class ProfileSearch:
    """Proposes profiles, the presets first, and learns from what they measure.

    Both objectives, time and memory, are made small; the agreement with the exact model is a constraint. The seed is
    fixed, so that the same measurements lead to the same proposals.

    Args:
        measure (callable): [`Measurement`] of a [`UnifiedConfig`].
        target_quality (`float`): least agreement.
        longest_prompt (`int`): tokens, by which it is known what can act at all.
        on_gpu (`bool`): whether kernels are picked for a GPU.
    Raises:
        AnsweringError: if Optuna is not installed.
    """

    def __init__(
        self,
        measure: Callable[[UnifiedConfig], Measurement],
        target_quality: float,
        longest_prompt: int = 0,
        on_gpu: bool = False,
    ):
        optuna = import_optuna()
        self.measure, self.target, self.on_gpu = measure, target_quality, on_gpu
        self.choices = dict(CHOICES)
        if longest_prompt <= SPARSE_FROM:
            self.choices["attention"] = CHOICES["attention"][:1]
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.study = optuna.create_study(
            directions=["minimize", "minimize"], sampler=optuna.samplers.TPESampler(seed=SEED)
        )
        for preset in PRESETS:
            self.study.enqueue_trial(self._choices_of(UnifiedConfig.from_preset(preset)))
        self.trials: list[Trial] = []

    def run(self, trials: int) -> Iterator[Trial]:
        """Tries so many profiles, and yields each when it is measured. One that came before is not measured again."""
        import optuna

        for _ in range(trials):
            proposed = self.study.ask()
            profile = self._profile({name: _suggest(proposed, name, of) for name, of in self.choices.items()})
            trial = self._try(proposed.number, profile)
            self.trials.append(trial)
            if trial.measurement is None:
                self.study.tell(proposed, state=optuna.trial.TrialState.FAIL)
            else:
                proposed.set_constraint("quality", self.target - trial.measurement.top1_agreement)
                self.study.tell(proposed, [trial.measurement.time_ratio, trial.measurement.held_bytes])
            yield trial

    def best(self) -> Trial:
        """The fastest that agrees well enough; of equals the smaller.

        Raises:
            AnsweringError: if there is none.
        """
        fitting = [trial for trial in self.trials if trial.fits(self.target)]
        if fitting:
            return min(fitting, key=lambda trial: (trial.measurement.time_ratio, trial.measurement.held_bytes))
        ran = [trial.measurement.top1_agreement for trial in self.trials if trial.measurement is not None]
        if not ran:
            raise AnsweringError(f"no profile ran here; the first one: {self.trials[0].failure}")
        raise AnsweringError(
            f"no profile of {len(self.trials)} agrees with the exact model on {self.target:.1%} of the tokens; the "
            f"best reached {max(ran):.1%}. Give a lower --target-quality or more --trials."
        )

    def front(self) -> list[Trial]:
        """Those that no other one beats in time and memory alike, of the ones that agree well enough; each once."""
        fitting = {trial.title: trial for trial in self.trials if trial.fits(self.target)}.values()
        return sorted(
            (trial for trial in fitting if not any(_beats(other, trial) for other in fitting)),
            key=lambda trial: trial.measurement.time_ratio,
        )

    def _try(self, number: int, profile: UnifiedConfig) -> Trial:
        known = next((trial for trial in self.trials if trial.profile == profile), None)
        if known is not None:
            return Trial(number, profile, known.measurement, known.failure)
        try:
            return Trial(number, profile, self.measure(profile))
        except (ValueError, RuntimeError, NotImplementedError, ImportError, MemoryError) as error:
            return Trial(number, profile, None, first_line(error))

    def _profile(self, chosen: dict[str, Any]) -> UnifiedConfig:
        device = {"gpu": {"kernels": True}} if self.on_gpu else {"cpu": {"decode_linear": True, "faster_rotary": True}}
        optimization = {name: value for name, value in chosen.items() if name != "kv_cache"}
        return UnifiedConfig(optimization=optimization, memory={"kv_cache": chosen["kv_cache"]}, **device)

    def _choices_of(self, profile: UnifiedConfig) -> dict[str, Any]:
        values = {**vars(profile.optimization), "kv_cache": profile.memory.kv_cache}
        return {name: str(values[name]) for name in self.choices}


def import_optuna() -> Any:
    """The package, which is loaded for tuning alone.

    Raises:
        AnsweringError: if it is not installed.
    """
    try:
        import optuna
    except ImportError:
        raise AnsweringError('tuning needs Optuna and Matplotlib: pip install "qwen3-vl[tune]".') from None
    return optuna


def _suggest(proposed: Any, name: str, choices: tuple[Any, ...]) -> Any:
    # By name, since a number would be taken for a place on a scale and `None` for nothing.
    by_name = {str(choice): choice for choice in choices}
    return by_name[proposed.suggest_categorical(name, list(by_name))]


def _beats(first: Trial, second: Trial) -> bool:
    one, other = ((x.measurement.time_ratio, x.measurement.held_bytes) for x in (first, second))
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))
