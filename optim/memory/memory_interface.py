"""The interface of whatever hands out memory and takes it back."""

from abc import abstractmethod
from typing import Any

from ..component_interface import ConfigurableComponent


class MemoryManager(ConfigurableComponent):
    """Base of memory managers, of this package and of its users.

    Args:
        config (*optional*): whatever the manager is configured by; kept as `self.config`.
    """

    def configure(self, config: Any) -> None:
        """Takes another configuration; what is handed out stays."""
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
