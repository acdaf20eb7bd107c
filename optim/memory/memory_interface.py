"""The interface of whatever hands out memory and takes it back."""

from abc import ABC, abstractmethod
from typing import Any


class MemoryManager(ABC):
    """Base of memory managers, of this package and of its users.

    Args:
        config (*optional*): whatever the manager is configured by; kept as `self.config`.
    """

    def __init__(self, config: Any = None):
        self.config = config

    @abstractmethod
    def allocate(self, size: int) -> Any:
        """Hands out memory for `size` bytes.

        Raises:
            MemoryError: if that does not fit.
        """

    @abstractmethod
    def deallocate(self, ptr: Any) -> None:
        """Takes back what `allocate` returned."""
