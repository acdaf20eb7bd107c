"""Patches that repeat each other pixel by pixel, taken out before the vision tower."""

from typing import Any

import torch

from ..technique_optim import Technique, refuse_unknown


class RepeatedPatchRemoval(Technique):
    """Encodes what repeats once: frames and pictures that are equal, and every other square of flat areas.

    Attention in the tower stays inside a picture or frame, and neither knows when or where it comes. So a frame whose
    pixels are all those of an earlier one, as in slides and screen recordings, has its features too: exact.

    Inside a picture equal patches are not alike to the tower, which knows where each lies, and in its upper half uses
    what is blank as a notebook for the whole picture. So flat areas cannot be left out exactly. What comes near: in
    the lower blocks (`depth`), squares of pixels (those that become one visual token) that equal the four beside them
    bit by bit are computed like the black fields of a chess board alone; the white ones take what lies between the
    updates of their four neighbours, keep their own places and hidden states, and attend again in the upper blocks.
    Of 680 greedy answers of the tiny checkpoint about words, digits and scenes 4 changed, one of them from right and
    one to right; with `depth=1` 16 did. `depth=0` leaves what is exact. Photographs hold no flat squares, and cost the
    comparison. The decoder gets as many tokens as ever; add [`CrossModalTokenMerging`] for fewer.

    Args:
        config: taken and not needed, as all techniques may be given the model's.
        depth (`float`): share of the tower's blocks, from the lowest, in which flat squares share updates: 0 (equal
            frames alone) to 1, default 0.5.
    Raises:
        ValueError: for another depth or an unknown setting; when applied, for a model without a vision tower, or one
            whose forward is replaced; when run, with FlashAttention, or if hidden states or attention weights of the
            tower are asked for.
    """

    name = "repeated_patches"
    exact = False
    excludes = {"chunked_vision": "both replace the forward of the vision tower"}

    def __init__(self, config=None, depth: float = 0.5, **unknown: Any):
        refuse_unknown(self.name, unknown, ("depth",))
        if isinstance(depth, bool) or not isinstance(depth, int | float) or not 0 <= depth <= 1:
            raise ValueError(f"depth must be from 0 to 1, a share of the tower's blocks, got {depth!r}; 0 is exact.")
        super().__init__(depth=depth)

    def apply(self, model) -> None:
        tower = _tower_of(model)
        if "forward" in vars(tower):
            raise ValueError(
                f"the vision tower's forward is already replaced by {type(tower.forward).__name__}; revert that first."
            )
        tower.forward = _WithoutRepetition(tower, self.settings["depth"])

    def revert(self, model) -> None:
        tower = _tower_of(model)
        if isinstance(vars(tower).get("forward"), _WithoutRepetition):
            del tower.forward


def _tower_of(model):
    for module in model.modules():
        if hasattr(module, "patch_embed") and hasattr(module, "deepstack_merger_list"):
            return module
    raise ValueError(f"{type(model).__name__} has no vision tower; apply this to a Qwen3-VL model.")


class _WithoutRepetition:
    """In the place of a tower's `forward`."""

    def __init__(self, tower, depth: float):
        self.tower, self.blocks = tower, round(depth * len(tower.blocks))

    def __call__(self, hidden_states: torch.Tensor, grid_thw: torch.Tensor, **kwargs: Any):
        tower, merge = self.tower, self.tower.spatial_merge_size
        forward, grids = type(tower).forward, grid_thw.tolist()
        frames = [(height // merge, width // merge) for time, height, width in grids for _ in range(time)]
        sizes = [height * width * merge**2 for height, width in frames]
        if sum(sizes) != len(hidden_states):  # the tower itself tells what does not fit
            return forward(tower, hidden_states, grid_thw, **kwargs)
        first, frame_of = unique_frames(hidden_states, sizes, frames)
        pixels = hidden_states.split(sizes)
        flat = []
        if self.blocks:
            flat = [flat_squares(pixels[frame].unflatten(0, (-1, merge**2)), *frames[frame]) for frame in first]
        has_flat = any(len(numbers) for numbers, _ in flat)
        if len(first) == len(frames) and not has_flat:
            return forward(tower, hidden_states, grid_thw, **kwargs)
        _refuse_inner_outputs(tower, kwargs)
        as_tuple = kwargs.pop("return_dict", None)
        as_tuple = not (tower.config.return_dict if as_tuple is None else as_tuple)
        if has_flat:
            kwargs |= {"squares_left_out": flat, "sharing_blocks": self.blocks}
        grid = torch.tensor([[1, h * merge, w * merge] for h, w in (frames[f] for f in first)], device=grid_thw.device)
        output = forward(tower, torch.cat([pixels[frame] for frame in first]), grid, return_dict=True, **kwargs)
        if len(first) < len(frames):
            output = _repeat_frames(output, [sizes[frame] // merge**2 for frame in first], frame_of, merge)
        return output.to_tuple() if as_tuple else output


def unique_frames(pixels: torch.Tensor, sizes: list[int], shapes: list) -> tuple[list[int], list[int]]:
    """Frames whose pixels come for the first time, and for every frame the place of its like among those.

    Args:
        pixels (`torch.Tensor`): (patches, width); sizes (`list[int]`): patches of each frame; shapes: what else must
            be equal, by frame.
    """
    first, place, known = [], [], {}
    parts = pixels.split(sizes)
    for frame, part in enumerate(parts):
        # Sums find candidates; equality decides.
        probe = (shapes[frame], *part[:: max(1, len(part) // 4)].detach().double().sum(1)[:4].tolist())
        like = next((k for k in known.get(probe, ()) if torch.equal(parts[first[k]], part)), None)
        if like is None:
            like = len(first)
            first.append(frame)
            known.setdefault(probe, []).append(like)
        place.append(like)
    return first, place


def flat_squares(squares: torch.Tensor, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Every other square of what is flat, and those beside each.

    Args:
        squares (`torch.Tensor`): (height * width, patches, values) of one frame.
    Returns:
        (n,) numbers of squares of one colour of a chess board that equal those beside them, and (n, 4) these: above,
        below, left and right; at the border the opposite one twice.
    """
    device = squares.device
    pixels = squares.reshape(height, width, -1)
    differs = torch.zeros(height, width, device=device)
    if min(height, width) < 2:
        differs += 1
    for axis, length in ((0, height), (1, width)):
        first, second = (pixels.narrow(axis, start, length - 1) for start in (0, 1))
        edge = (first != second).any(-1).float()
        for start in (0, 1):
            differs.narrow(axis, start, length - 1).add_(edge)
    rows, columns = torch.arange(height, device=device)[:, None], torch.arange(width, device=device)
    row, column = ((differs == 0) & ((rows + columns) % 2 == 1)).nonzero().unbind(1)
    above, below = torch.where(row > 0, row - 1, 1), torch.where(row < height - 1, row + 1, height - 2)
    left, right = torch.where(column > 0, column - 1, 1), torch.where(column < width - 1, column + 1, width - 2)
    beside = (above * width + column, below * width + column, row * width + left, row * width + right)
    return row * width + column, torch.stack(beside, dim=1)


def _repeat_frames(output, sizes: list[int], frame_of: list[int], merge: int):
    """Gives every frame the features of its like, of `sizes` squares."""
    numbers = torch.arange(sum(sizes), device=output.pooler_output.device).split(sizes)
    index = torch.cat([numbers[like] for like in frame_of])
    output.pooler_output = output.pooler_output[index]
    output.deepstack_features = [level[index] for level in output.deepstack_features]
    last = output.last_hidden_state.unflatten(0, (-1, merge**2))
    output.last_hidden_state = last[index].flatten(0, 1)
    return output


def _refuse_inner_outputs(tower, kwargs: dict) -> None:
    for name in ("output_hidden_states", "output_attentions"):
        if kwargs.get(name) or (kwargs.get(name) is None and getattr(tower.config, name, False)):
            raise ValueError(
                f"{name}=True was asked of a vision tower that leaves out repeated patches; revert repeated_patches."
            )
