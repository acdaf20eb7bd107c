"""Memory handed out from a budget: every byte is counted, and what comes back is used again."""

from dataclasses import dataclass
from math import prod
from threading import RLock
from typing import Any

import torch

from ..cache.memory_pool import device_memory
from .memory_interface import MemoryManager
from .memory_plan import MemoryPlan, plan_memory
from .memory_request import MemoryRequest, require_count
from .memory_units import format_bytes, parse_bytes


ALIGNMENT = 64


@dataclass(frozen=True)
class MemoryStatistics:
    """Bytes: the budget, what is handed out, what may still be, what waits to be used again, and the most ever out."""

    budget: int
    held: int
    free: int
    idle: int
    peak: int


class GeneralMemoryManager(MemoryManager):
    """Buffers from a budget. Freed ones are kept and used again for requests of at least half their size.

    Args:
        config (*optional*): of the model that `plan` is for.
        budget (`int` or `str`, *optional*): bytes, or `"8GB"`; by default the memory of the device.
        device (`torch.device` or `str`): where buffers lie, default `cpu`.
    Raises:
        ValueError: for a budget that is no amount above 0.
    """

    def __init__(self, config: Any = None, budget: int | str | None = None, device: torch.device | str = "cpu"):
        super().__init__(config)
        self.device = torch.device(device)
        self.budget = device_memory(self.device) if budget is None else parse_bytes(budget)
        self._lock = RLock()
        self._out: dict[int, torch.Tensor] = {}
        self._idle: list[torch.Tensor] = []
        self._reserved = self._peak = 0

    @property
    def held(self) -> int:
        """Bytes handed out and not taken back."""
        with self._lock:
            return self._reserved + sum(block.nbytes for block in self._out.values())

    @property
    def free(self) -> int:
        """Bytes that may still be handed out."""
        return self.budget - self.held

    def statistics(self) -> MemoryStatistics:
        with self._lock:
            idle = sum(block.nbytes for block in self._idle)
            return MemoryStatistics(self.budget, self.held, self.free, idle, self._peak)

    def allocate(self, size: int) -> torch.Tensor:
        """A buffer (size,) uint8 whose content is undefined.

        Raises:
            ValueError: for a size below 1.
            MemoryError: if it does not fit beside what is held, or the device has no memory left; nothing changes.
        """
        require_count("size", size)
        rounded = -(-size // ALIGNMENT) * ALIGNMENT
        with self._lock:
            self._require_room(rounded)
            block = self._take_idle(rounded)
            if block is None:
                self._drop_idle(self.budget - self.held - rounded)
                block = self._new_block(rounded)
            self._out[block.data_ptr()] = block
            self._peak = max(self._peak, self.held)
            return block[:size]

    def allocate_tensor(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A tensor of `shape` and `dtype` in a buffer of its own; errors as of `allocate`."""
        return self.allocate(prod(shape) * dtype.itemsize).view(dtype).view(shape)

    def deallocate(self, ptr: torch.Tensor) -> None:
        """Takes a buffer or tensor back; whoever still reads it reads what the next one writes.

        Raises:
            ValueError: if this manager did not hand it out, or has it back already.
        """
        with self._lock:
            key = ptr.untyped_storage().data_ptr() if isinstance(ptr, torch.Tensor) else None
            block = self._out.pop(key, None)
            if block is None:
                raise ValueError(
                    f"this memory is not held: got {_describe(ptr)}; pass what allocate() returned, and once."
                )
            self._idle.append(block)

    def plan(self, request: MemoryRequest | None = None, model: Any = None, **options: Any) -> MemoryPlan:
        """The plan of a request in what is free; see [`plan_memory`].

        Args:
            model (*optional*): a model or a configuration; by default the manager's `config`.
        """
        return plan_memory(self.config if model is None else model, request, max(self.free, 1), **options)

    def _reserve(self, size: int) -> None:
        """Counts bytes as held that are allocated elsewhere, or gives them back with a negative number."""
        with self._lock:
            if size > 0:
                self._require_room(size)
            self._reserved += size
            self._peak = max(self._peak, self.held)

    def _require_room(self, size: int) -> None:
        if size > self.free:
            raise MemoryError(
                f"{format_bytes(size)} were asked for, {format_bytes(self.held)} are held and "
                f"{format_bytes(self.free)} free of {format_bytes(self.budget)}; deallocate something, ask for less, "
                "or raise the budget."
            )

    def _take_idle(self, size: int) -> torch.Tensor | None:
        fitting = [index for index, block in enumerate(self._idle) if size <= block.nbytes <= 2 * size]
        # A larger block must not take the manager past its budget.
        fitting = [index for index in fitting if self._idle[index].nbytes <= self.free]
        return self._idle.pop(min(fitting, key=lambda index: self._idle[index].nbytes)) if fitting else None

    def _drop_idle(self, room: int) -> None:
        """Frees idle blocks, the oldest first, until they take no more than `room` bytes."""
        while self._idle and sum(block.nbytes for block in self._idle) > room:
            self._idle.pop(0)

    def _new_block(self, size: int) -> torch.Tensor:
        try:
            with torch.inference_mode(False):
                return torch.empty(size, dtype=torch.uint8, device=self.device)
        except RuntimeError:  # how torch reports a lack of memory
            raise MemoryError(
                f"{self.device} has no memory for {format_bytes(size)}, {format_bytes(self.held)} are held; "
                "deallocate something or ask for less."
            ) from None


def _describe(ptr: Any) -> str:
    return f"a tensor of shape {tuple(ptr.shape)}" if isinstance(ptr, torch.Tensor) else repr(ptr)
