"""Fits a profile to a request and a budget, by the memory plan."""

from typing import Any

from ...configuration.profile_qwen3_vl import UnifiedConfig
from .memory_plan import MemoryPlan, plan_memory
from .memory_request import MemoryRequest


class MemoryOptimizationIntegrator:
    """Takes what a [`MemoryPlan`] picks over into a profile: the cache, and the groups of the vision tower.

    The prefill's chunks are an option of `generate()`; `generate_options` has them.

    Args:
        model: a model, or its configuration alone.
        request ([`MemoryRequest`], *optional*): the largest that will run.
        budget (`int` or `str`, *optional*): bytes, or `"8GB"`; by default nothing is made smaller.
        lossy (`bool`): whether packed caches may be picked, default true.
    Attributes:
        plan (`MemoryPlan`, *optional*): the latest one.
    """

    def __init__(
        self,
        model: Any,
        request: MemoryRequest | None = None,
        budget: int | str | None = None,
        lossy: bool = True,
    ):
        self.model, self.request, self.budget, self.lossy = model, request, budget, lossy
        self.plan: MemoryPlan | None = None

    def integrate(self, profile: UnifiedConfig | dict | str | None = None) -> UnifiedConfig:
        """A profile that keeps the request within the budget, `profile` otherwise.

        Raises:
            ValueError: for a budget that is no amount above 0, or a profile that names a cache technique of its own.
            MemoryError: if nothing fits; it names the least that is needed.
        """
        profile = UnifiedConfig.parse(profile)
        attention = profile.optimization.attention
        self.plan = plan_memory(self.model, self.request, self.budget, attention=attention, lossy=self.lossy)
        memory: dict[str, Any] = {"kv_cache": self.plan.cache, "budget_bytes": None}
        if self.plan.max_patches is not None:
            memory["vision_patches"] = self.plan.max_patches
        return profile.with_changes(memory=memory)

    @property
    def generate_options(self) -> dict[str, Any]:
        """What `generate()` is to be given besides, as the latest plan has it."""
        return {} if self.plan is None else self.plan.generate_options()
