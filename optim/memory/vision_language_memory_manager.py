"""Memory by modality: what text, pictures and videos take, and requests that are held to their plan."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from .general_memory_manager import GeneralMemoryManager
from .memory_plan import MemoryPlan, plan_memory
from .memory_request import MODALITIES, MemoryRequest


class VisionLanguageMemoryManager(GeneralMemoryManager):
    """A [`GeneralMemoryManager`] that counts buffers by modality and admits requests only as far as all of them fit.

    Args: as for [`GeneralMemoryManager`]. The budget holds the weights too.
    """

    def __init__(self, config: Any = None, budget: int | str | None = None, device: torch.device | str = "cpu"):
        super().__init__(config, budget, device)
        self._modality_of: dict[int, str] = {}

    def allocate(self, size: int, modality: str = "text") -> torch.Tensor:
        """As [`GeneralMemoryManager.allocate`], counted for `text`, `image` or `video`.

        Raises:
            ValueError: for another modality.
        """
        if modality not in MODALITIES:
            raise ValueError(f"modality must be one of {', '.join(MODALITIES)}, got {modality!r}.")
        buffer = super().allocate(size)
        self._modality_of[buffer.data_ptr()] = modality
        return buffer

    def deallocate(self, ptr: torch.Tensor) -> None:
        super().deallocate(ptr)
        self._modality_of.pop(ptr.untyped_storage().data_ptr(), None)

    def held_by_modality(self) -> dict[str, int]:
        """Bytes of buffers that are out, by modality."""
        with self._lock:
            held = dict.fromkeys(MODALITIES, 0)
            for key, block in self._out.items():
                held[self._modality_of[key]] += block.nbytes
            return held

    @contextlib.contextmanager
    def hold(self, request: MemoryRequest, model: Any = None, **options: Any) -> Iterator[MemoryPlan]:
        """Keeps what a request takes besides the weights reserved while it runs, and yields its plan.

        Args:
            request ([`MemoryRequest`]): what is going to run.
            model (*optional*): a model or a configuration; by default the manager's `config`.
            options: of [`plan_memory`].
        Raises:
            MemoryError: if it does not fit beside the requests and buffers that are held.
        """
        with self._lock:
            plan = plan_memory(self.config if model is None else model, request, max(self.free, 1), **options)
            reserved = plan.peak - plan.weights_total
            self._reserve(reserved)
        try:
            yield plan
        finally:
            self._reserve(-reserved)

    def check_inputs(self, plan: MemoryPlan, inputs: dict[str, torch.Tensor], config: Any = None) -> None:
        """Holds the inputs of `generate()` to a plan.

        Args:
            plan ([`MemoryPlan`]): of the request.
            inputs (`dict`): as the processor gives them, with `input_ids` (B, T).
            config (*optional*): of the model; by default the manager's.
        Raises:
            ValueError: if they have more rows or tokens, or more tokens of a picture or video, than were planned.
        """
        config, ids = self.config if config is None else config, inputs["input_ids"]
        request, sizes = plan.request, plan.sizes
        given = {
            "image tokens": (_longest(ids == config.image_token_id), sizes.image),
            "video tokens": (_longest(ids == config.video_token_id), sizes.video),
            "prompt tokens": (ids.shape[1], sizes.prompt),
            "rows": (ids.shape[0], request.batch_size),
        }
        for name, (count, planned) in given.items():
            if count > planned:
                raise ValueError(
                    f"the inputs hold {count} {name} but {planned} were planned; plan for the real sizes, or shrink "
                    "the input."
                )


def _longest(marks: torch.Tensor) -> int:
    return int(marks.sum(1).max())
