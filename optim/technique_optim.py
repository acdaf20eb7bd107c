"""What every technique is: something applied to a built model and taken off again."""

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from .component_interface import ConfigurableComponent


def refuse_unknown(name: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raises a `ValueError` if one of the settings `given` to a technique or mechanism is not `known`."""
    known = list(known)
    unknown = [setting for setting in given if setting not in known]
    if unknown:
        raise ValueError(f"{name} has no setting {unknown[0]!r}; it takes {', '.join(known) or 'none'}.")


class Technique(ConfigurableComponent):
    """Something that makes a model faster or smaller and can be taken off again.

    `apply` followed by `revert` leaves the logits bit-identical. A technique for the cache port overrides
    `make_cache`, one for the visual-token port `plan_visual_tokens` (and puts itself at `visual_reduction` of the
    base model when it is applied); `None` from either means "not mine".
    """

    name: ClassVar[str]
    exact: ClassVar[bool]
    # Of two techniques with one role, such as `cache`, only one can be on.
    role: ClassVar[str | None] = None
    # Names of techniques that are applied before this one if they are on, and that must be on.
    after: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[tuple[str, ...]] = ()
    # Names of techniques that this one cannot be on with, and why.
    excludes: ClassVar[dict[str, str]] = {}

    def __init__(self, **settings: Any):
        super().__init__(settings)

    @property
    def settings(self) -> dict[str, Any]:
        """What the technique was made with, as a profile writes it: `type(technique)(**technique.settings)`."""
        return self.config

    def configure(self, config: Mapping[str, Any]) -> None:
        """Takes other settings; those that `config` does not name stay. Not while it is applied.

        Raises:
            ValueError: for an unknown or invalid setting; the technique is as before.
        """
        changed = type(self)(**{**self.settings, **config})
        vars(self).clear()
        vars(self).update(vars(changed))

    @abstractmethod
    def apply(self, model) -> None:
        """Changes `model` in place."""

    @abstractmethod
    def revert(self, model) -> None:
        """Undoes `apply`."""

    @property
    def failure(self) -> str | None:
        """Why it does nothing any more though it is on, such as a compiler that failed at the first step."""
        return None

    def make_cache(self, model, batch_size: int, max_length: int):
        """A `transformers` `Cache` for `batch_size` rows of at most `max_length` tokens, or `None`."""
        return None

    def plan_visual_tokens(self, request):
        """Which visual tokens of a [`VisualRequest`] stay, as a [`VisualPlan`], or `None` for all."""
        return None
