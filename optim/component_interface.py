"""The interface of whatever is made from a configuration and takes another one later."""

from abc import ABC, abstractmethod
from typing import Any


class ConfigurableComponent(ABC):
    """Base of techniques and memory managers, of this package and of its users.

    Args:
        config (*optional*): whatever the component is configured by; kept as `self.config`.
    """

    def __init__(self, config: Any = None):
        self.config = config

    @abstractmethod
    def configure(self, config: Any) -> None:
        """Takes another configuration, as if the component had been made with it."""
