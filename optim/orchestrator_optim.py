"""One object that applies a profile to a model, says what runs, and takes all of it off again."""

from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..configuration.profile_files import GivenProfile
from ..configuration.profile_qwen3_vl import UnifiedConfig, given_profile
from .fallback_manager import FallbackManager, Outcome, gives_numbers
from .registry_optim import techniques_of
from .technique_optim import Technique
from .technique_order import OrderOptimizer
from .weights.precision_saving import adopt_packed_weights


logger = logging.get_logger(__name__)


class UnifiedOptimizationManager:
    """Applies a profile to a built model, in the order that its techniques need, and reverts it.

    What a preset names and this machine cannot run is replaced by the next weaker choice, with one warning; what a
    dictionary or a [`UnifiedConfig`] names raises, and the model is as before. What is on is noted on the model, so a
    manager made without a profile, of a model that `from_pretrained` gave, describes and reverts that. Also a context
    manager:

        with UnifiedOptimizationManager(model, "balanced"):
            model.generate(...)

    Args:
        model: to be changed in place.
        profile (*optional*): a preset's name, a dictionary, the path of a YAML or JSON file, or a [`UnifiedConfig`];
            by default what the model's configuration names.
        strict (`bool`, *optional*): whether what cannot run raises; by default unless `profile` is a preset's name.
    Raises:
        ValueError: for an unknown key, technique or setting, or techniques that exclude each other; the model is
            untouched.
    """

    def __init__(self, model, profile: UnifiedConfig | dict | str | Path | None = None, strict: bool | None = None):
        self.model = model
        profile = getattr(model.config, "optim", None) if profile is None else given_profile(profile)
        self.profile = UnifiedConfig.parse(profile)
        self.strict = not isinstance(profile, str) if strict is None else strict
        self.written = profile
        self.planned = OrderOptimizer().order(techniques_of(self.profile.techniques()))

    @property
    def outcomes(self) -> list[Outcome]:
        """What became of each technique that was applied to the model."""
        return getattr(self.model, "optimization_outcomes", [])

    @property
    def techniques(self) -> list[Technique]:
        """What is on."""
        return getattr(self.model, "active_techniques", [])

    def dry_run(self) -> list[dict[str, Any]]:
        """What `apply` would do, step by step: `name`, `exact`, `settings`. Changes nothing."""
        return [{"name": t.name, "exact": t.exact, "settings": dict(t.settings)} for t in self.planned]

    def apply(self, check: bool = True):
        """Applies the profile and returns the model.

        Args:
            check (`bool`): whether a forward of a few tokens is run afterwards; while it gives NaN, a lossy technique,
                the last one first, gives way to the next weaker choice.
        Raises:
            ValueError: if a profile is on already, or the check fails for what may not be replaced.
        """
        if self.techniques:
            on = ", ".join(technique.name for technique in self.techniques)
            raise ValueError(f"the model has a profile on already ({on}); revert that first.")
        before = self.model.config.optim
        fallback = FallbackManager([technique.name for technique in self.planned] if self.strict else ())
        try:
            self._apply_planned(fallback)
            while check and self.planned and not gives_numbers(self.model):
                self._refuse_lossy(fallback)
                self._take_off()
                self._apply_planned(fallback)
        except BaseException:
            self.revert()
            self.model.config.optim = before
            raise
        self.model.config.optim = self.written if self.planned else None
        return self.model

    def revert(self):
        """Takes everything off that is on, the last first, and returns the model, which is the plain one then."""
        self._take_off()
        self.model.config.optim = None
        return self.model

    def describe(self) -> str:
        """A line for each technique: what runs, whether exactly, with which settings, and why if not as asked."""
        lines = [_line(outcome) for outcome in self.outcomes]
        if not lines:
            lines = [f"{step['name']}: not applied yet" for step in self.dry_run()]
        return "\n".join(lines) or "nothing is on: the plain model"

    def _note(self, outcomes: list[Outcome]) -> None:
        self.model.optimization_outcomes = outcomes
        self.model.active_techniques = [outcome.ran for outcome in outcomes if outcome.ran is not None]

    def _apply_planned(self, fallback: FallbackManager) -> None:
        planned = {technique.name for technique in self.planned}
        self._note([])
        for technique in self.planned:
            taken = planned | {ran.name for ran in self.techniques}
            self._note([*self.outcomes, fallback.apply(technique, self.model, taken)])

    def _take_off(self) -> None:
        for technique in reversed(self.techniques):
            technique.revert(self.model)
        for name in ("active_techniques", "optimization_outcomes"):
            vars(self.model).pop(name, None)

    def _refuse_lossy(self, fallback: FallbackManager) -> None:
        """Has the last lossy technique give way, since the logits are no numbers."""
        lossy = [technique for technique in self.techniques if not technique.exact]
        if self.strict or not lossy:
            raise ValueError("the model gives NaN or infinite logits with this profile; try another dtype.")
        fallback.refuse(lossy[-1], "the first forward gave NaN or infinite logits")

    def __enter__(self):
        self.apply()
        return self

    def __exit__(self, *error) -> None:
        self.revert()


# The API reference has two names for it.
UnifiedOptimizationOrchestrator = UnifiedOptimizationManager


def optimize(model, profile: UnifiedConfig | dict | str | Path = "balanced", strict: bool | None = None):
    """Applies a profile to a model and returns it; `UnifiedOptimizationManager(model)` describes and reverts it.

    Args:
        model, profile, strict: as of [`UnifiedOptimizationManager`].
    """
    return UnifiedOptimizationManager(model, profile, strict).apply()


def apply_profile(model) -> list[Technique]:
    """Applies what `model.config.optim` names; called at the end of `from_pretrained`.

    The techniques are kept as `model.active_techniques`, for the other ports to ask and for the caller to revert.
    A preset, and a profile that came with the weights, goes on without what cannot run; one that the caller gave
    raises.
    """
    adopt_packed_weights(model)
    manager = UnifiedOptimizationManager(model, strict=isinstance(getattr(model.config, "optim", None), GivenProfile))
    # A forward takes little beside the loading; exact techniques give what the plain model gives.
    lossy = any(not technique.exact for technique in manager.planned)
    manager.apply(check=lossy and model.can_generate() and model.device.type != "meta")
    return model.active_techniques


def _line(outcome: Outcome) -> str:
    if outcome.ran is None:
        return f"{outcome.asked}: off, {outcome.reason}"
    given = ", ".join(f"{name}={value}" for name, value in outcome.ran.settings.items() if value is not None)
    line = f"{outcome.ran.name}: {'exact' if outcome.ran.exact else 'lossy'}" + (f", {given}" if given else "")
    if outcome.ran.failure is not None:
        line += f"; off since it failed, {outcome.ran.failure}"
    return line if outcome.reason is None else f"{line}; in place of {outcome.asked}, {outcome.reason}"
