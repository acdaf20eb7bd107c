"""What runs in the place of a technique that cannot run here."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils import logging

from .registry_optim import TECHNIQUES
from .technique_optim import Technique


logger = logging.get_logger(__name__)

# The next weaker choice of a technique: name and settings out of its own settings, or `None` for nothing in its place.
WEAKER = {
    "adaptive_precision": lambda settings: ("adaptive_precision", {"bits": 8}) if settings.get("bits") == 4 else None,
    "compiled_decode": lambda settings: ("decode_linear", {}),
    "evicting_cache": lambda settings: ("paged_cache", {}),
    "quantized_cache": lambda settings: ("paged_cache", {}),
    "tiered_cache": lambda settings: ("paged_cache", {}),
    "cross_layer_cache": lambda settings: ("paged_cache", {}),
    "qwen3_vl_block_sparse": lambda settings: ("qwen3_vl_exact", {}),
    "qwen3_vl_dynamic_sparse": lambda settings: ("qwen3_vl_exact", {}),
}
# What a machine may lack. Wrong settings are `ValueError`s too and come up when a technique is made, not here.
LACKING = (ImportError, NotImplementedError, MemoryError, OSError, RuntimeError, ValueError)


@dataclass(frozen=True)
class Outcome:
    """What became of one technique of a profile.

    Args:
        asked (`str`): its name.
        ran (`Technique`, *optional*): what was applied, itself or a weaker one; `None` for nothing.
        reason (`str`, *optional*): why it was not itself.
    """

    asked: str
    ran: Technique | None
    reason: str | None = None


class FallbackManager:
    """Applies techniques, and in the place of one that fails the next weaker choice, with one warning.

    Args:
        named (*optional*): names that the caller gave himself; those raise.
    """

    def __init__(self, named: Any = ()):
        self.named = frozenset(named)
        self._refused: dict[str, str] = {}

    def refuse(self, technique: Technique, reason: str) -> None:
        """Lets `technique`, with the settings that it has, give way to a weaker choice from now on."""
        self._refused[_signature(technique)] = reason

    def apply(self, technique: Technique, model, taken: Any = ()) -> Outcome:
        """Applies `technique` to `model`, or what can stand for it.

        Args:
            taken (*optional*): names of techniques that are on already and are not applied again.
        Raises:
            whatever the technique raises, if the caller named it; the model is as before then.
        """
        asked, reason = technique.name, None
        while technique is not None:
            try:
                self._try(technique, model)
                return Outcome(asked, technique, reason)
            except LACKING as error:
                if asked in self.named:
                    raise
                reason = reason or _first_line(error)
            choice = self._weaker(technique)
            technique = None if choice is None or choice.name in set(taken) - {asked} else choice
            stands = "nothing stands in for it" if technique is None else f"{technique.name} stands in for it"
            logger.warning_once(f"{asked} cannot run here and {stands}: {reason}")
        return Outcome(asked, None, reason)

    def _try(self, technique: Technique, model) -> None:
        if _signature(technique) in self._refused:
            raise RuntimeError(self._refused[_signature(technique)])
        try:
            technique.apply(model)
        except BaseException:
            technique.revert(model)
            raise

    def _weaker(self, technique: Technique) -> Technique | None:
        choose = WEAKER.get(technique.name)
        choice = choose(technique.settings) if choose else None
        return None if choice is None else TECHNIQUES[choice[0]](**choice[1])


@torch.inference_mode()
def gives_numbers(model) -> bool:
    """Whether a short forward of text gives finite logits or states."""
    ids = torch.arange(1, 9, device=model.device)[None]
    output = model(input_ids=ids, attention_mask=torch.ones_like(ids))
    return bool(output[0].isfinite().all())


def _signature(technique: Technique) -> str:
    return f"{technique.name} {technique.settings}"


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]
