"""The vision tower in groups of whole pictures and frames, so that few patches are in work at once."""

from typing import Any

import torch

from ..technique_optim import Technique
from .memory_formulas import frame_groups
from .memory_request import require_count


class ChunkedVision(Technique):
    """Runs the tower over at most `max_patches` patches at once. Exact up to the order of sums in matrix products.

    Attention stays inside a picture or frame, so any whole number of them gives the same result as all together. A
    single picture or frame that is larger runs alone. The output takes the memory that it always takes; what is
    inside of the tower (about 40 bytes a patch and hidden channel) shrinks to that of a group.

    Args:
        config: accepted and not read.
        max_patches (`int`): at least 1, default 16384, which is 16 pictures of 512x512.
    Raises:
        ValueError: for another number or an unknown setting; when applied, for a model without a vision tower; when
            run, if hidden states or attention weights of the tower are asked for.
    """

    name = "chunked_vision"
    exact = True

    def __init__(self, config=None, max_patches: int = 16384, **unknown):
        if unknown:
            raise ValueError(f"{self.name} has no setting {next(iter(unknown))!r}; it takes max_patches.")
        require_count("max_patches", max_patches)
        super().__init__(max_patches=max_patches)

    def apply(self, model) -> None:
        tower = find_tower(model)
        if "forward" in vars(tower):
            raise ValueError(
                f"the vision tower's forward is already replaced by {type(tower.forward).__name__}; revert that first."
            )
        tower.forward = _Chunks(tower, self.settings["max_patches"])

    def revert(self, model) -> None:
        tower = find_tower(model)
        if isinstance(vars(tower).get("forward"), _Chunks):
            del tower.forward


def find_tower(model):
    """The vision tower of a model, or the model itself if it is one.

    Raises:
        ValueError: if there is none.
    """
    for module in model.modules():
        if hasattr(module, "patch_embed") and hasattr(module, "deepstack_merger_list"):
            return module
    raise ValueError(f"{type(model).__name__} has no vision tower; apply this to a Qwen3-VL model.")


class _Chunks:
    """In the place of a tower's `forward`."""

    def __init__(self, tower, max_patches: int):
        self.tower, self.max_patches = tower, max_patches

    def __call__(self, hidden_states: torch.Tensor, grid_thw: torch.Tensor, **kwargs: Any):
        forward, grids = type(self.tower).forward, grid_thw.tolist()
        groups = frame_groups(grids, self.max_patches)
        needed = [sum(time * height * width for time, height, width in group) for group in groups]
        if len(groups) < 2 or sum(needed) != len(hidden_states):  # the tower itself tells what does not fit
            return forward(self.tower, hidden_states, grid_thw, **kwargs)
        self._refuse_inner_outputs(kwargs)
        as_tuple = kwargs.pop("return_dict", None)
        as_tuple = not (self.tower.config.return_dict if as_tuple is None else as_tuple)
        joined = None
        start = 0
        for group, patches in zip(groups, needed, strict=True):
            pixels = hidden_states[start : start + patches]
            grid = torch.tensor(group, dtype=grid_thw.dtype, device=grid_thw.device)
            output = forward(self.tower, pixels, grid, return_dict=True, **kwargs)
            joined = joined or _Joined(output, sum(needed) / patches)
            joined.add(output)
            start += patches
        output = joined.finish(output)
        return output.to_tuple() if as_tuple else output

    def _refuse_inner_outputs(self, kwargs: dict) -> None:
        for name in ("output_hidden_states", "output_attentions"):
            if kwargs.get(name) or (kwargs.get(name) is None and getattr(self.tower.config, name, False)):
                raise ValueError(
                    f"{name}=True was asked of a vision tower that runs in groups of frames; revert "
                    "chunked_vision, or raise its max_patches."
                )


class _Joined:
    """The outputs of groups one behind the other: in place where no gradient needs the parts."""

    def __init__(self, output, ratio: float):
        self.in_place = not torch.is_grad_enabled()
        self.filled = 0
        self.parts: list[list[torch.Tensor]] = []
        first = self._tensors(output)
        if self.in_place:
            self.whole = [x.new_empty(round(len(x) * ratio), *x.shape[1:]) for x in first]
            self.ends = [0] * len(first)

    @staticmethod
    def _tensors(output) -> list[torch.Tensor]:
        return [output.last_hidden_state, output.pooler_output, *(output.deepstack_features or ())]

    def add(self, output) -> None:
        tensors = self._tensors(output)
        if not self.in_place:
            self.parts.append(tensors)
            return
        for index, tensor in enumerate(tensors):
            end = self.ends[index] + len(tensor)
            self.whole[index][self.ends[index] : end] = tensor
            self.ends[index] = end

    def finish(self, output):
        whole = self.whole if self.in_place else [torch.cat(parts) for parts in zip(*self.parts, strict=True)]
        output.last_hidden_state, output.pooler_output, *levels = whole
        output.deepstack_features = levels
        return output
