"""A model, its processor and its profile as one object."""

from typing import Any

from .orchestrator_optim import UnifiedOptimizationManager
from .technique_optim import Technique


class UnifiedArchitecture:
    """A model with a profile on it. Whatever else is asked of it, as `generate` and `config`, is the model's.

    Args:
        model: a built model; changed in place.
        profile: as of [`UnifiedOptimizationManager`]; nothing by default.
        processor (*optional*): the model's.
    """

    def __init__(self, model, profile: Any = None, processor: Any = None):
        self.model, self.processor = model, processor
        self.optimization = UnifiedOptimizationManager(model, profile)
        if profile is not None:
            self.optimization.apply()

    @classmethod
    def from_pretrained(cls, name_or_path: str, profile: Any = None, **kwargs: Any) -> "UnifiedArchitecture":
        """Loads model and processor, and applies a profile.

        Args:
            name_or_path (`str`): a folder or a Hub repository.
            profile (*optional*): by default the one in the folder's `config.json`.
            kwargs: of the model's `from_pretrained`.
        """
        from transformers import AutoModelForImageTextToText, AutoProcessor

        if profile is not None:
            kwargs["optim"] = None  # the folder's own is not put on first
        model = AutoModelForImageTextToText.from_pretrained(name_or_path, **kwargs)
        return cls(model, profile, AutoProcessor.from_pretrained(name_or_path))

    def apply(self, profile: Any) -> "UnifiedArchitecture":
        """Puts another profile on, in the place of the one that is.

        Raises:
            ValueError: for a profile that cannot be; the one that is stays on.
        """
        changed, before, was_on = UnifiedOptimizationManager(self.model, profile), self.optimization, self.techniques
        before.revert()
        try:
            changed.apply()
        except BaseException:
            if was_on:
                before.apply()
            raise
        self.optimization = changed
        return self

    @property
    def techniques(self) -> list[Technique]:
        """What is on."""
        return self.optimization.techniques

    def revert(self) -> "UnifiedArchitecture":
        """Makes the model the plain one."""
        self.optimization.revert()
        return self

    def describe(self) -> str:
        """What is on, a line for each technique."""
        return self.optimization.describe()

    def save_pretrained(self, folder: str, **kwargs: Any) -> None:
        """Saves model and processor; the profile goes into `config.json`."""
        self.model.save_pretrained(folder, **kwargs)
        if self.processor is not None:
            self.processor.save_pretrained(folder)

    def __call__(self, *args, **kwargs):
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str):
        if name.startswith("__") or name == "model":
            raise AttributeError(name)
        return getattr(self.model, name)
