"""Patches that repeat each other pixel by pixel, taken out before the vision tower."""

from typing import Any

import torch

from ..technique_optim import Technique, refuse_unknown


class RepeatedPatchRemoval(Technique):
    """Encodes what repeats once: frames and pictures that are equal, and areas of one picture that are flat.

    Attention in the tower stays inside a picture or frame, and neither knows when or where it comes. So a frame whose
    pixels are all those of an earlier one, as in slides and screen recordings, has its features too: exact.

    Inside a picture equal patches are not alike to the tower, which knows where each lies. Squares of pixels (those
    that become one visual token) that are equal bit by bit over a block of 2x2, 4x4, ... up to `area` x `area` are
    represented by one, in their middle: it counts in attention as many times as the block has squares (the logarithm
    of their number is added to its scores), and they all get its features. That would be exact if places inside a flat
    block did not matter. It is not: features of what is written differ by a little, and of the answers of the tiny
    checkpoint that read text on plain paper a few in a hundred change (right ones become as often wrong as the other
    way). `area=1` leaves only what is exact. Photographs hold no equal squares, and cost the comparison. The decoder
    gets as many tokens as ever; add [`CrossModalTokenMerging`] for fewer.

    Args:
        config: taken and not needed, as all techniques may be given the model's.
        area (`int`): side of the largest block in visual tokens, a power of two, default 2; 1 for equal frames alone.
    Raises:
        ValueError: for another side or an unknown setting; when applied, for a model without a vision tower, or one
            whose forward is replaced; when run, with FlashAttention, or if hidden states or attention weights of the
            tower are asked for.
    """

    name = "repeated_patches"
    exact = False

    def __init__(self, config=None, area: int = 2, **unknown: Any):
        refuse_unknown(self.name, unknown, ("area",))
        if isinstance(area, bool) or not isinstance(area, int) or area < 1 or area & (area - 1):
            raise ValueError(f"area must be 1, 2, 4, 8, ... visual tokens, got {area!r}; 1 is exact.")
        super().__init__(area=area)

    def apply(self, model) -> None:
        tower = _tower_of(model)
        if "forward" in vars(tower):
            raise ValueError(
                f"the vision tower's forward is already replaced by {type(tower.forward).__name__}; revert that first."
            )
        tower.forward = _WithoutRepetition(tower, self.settings["area"])

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

    def __init__(self, tower, area: int):
        self.tower, self.area = tower, area

    def __call__(self, hidden_states: torch.Tensor, grid_thw: torch.Tensor, **kwargs: Any):
        tower, merge = self.tower, self.tower.spatial_merge_size
        forward, grids = type(tower).forward, grid_thw.tolist()
        frames = [(height // merge, width // merge) for time, height, width in grids for _ in range(time)]
        sizes = [height * width * merge**2 for height, width in frames]
        if sum(sizes) != len(hidden_states):  # the tower itself tells what does not fit
            return forward(tower, hidden_states, grid_thw, **kwargs)
        first, frame_of = unique_frames(hidden_states, sizes, frames)
        squares = hidden_states.split(sizes)
        blocks = [
            flat_blocks(squares[frame].unflatten(0, (-1, merge**2)), *frames[frame], self.area) for frame in first
        ]
        if len(first) == len(frames) and all(len(kept) == len(owner) for kept, owner in blocks):
            return forward(tower, hidden_states, grid_thw, **kwargs)
        _refuse_inner_outputs(tower, kwargs)
        as_tuple = kwargs.pop("return_dict", None)
        as_tuple = not (tower.config.return_dict if as_tuple is None else as_tuple)
        grid = torch.tensor([[1, h * merge, w * merge] for h, w in (frames[f] for f in first)], device=grid_thw.device)
        pixels = torch.cat([squares[frame] for frame in first])
        output = forward(tower, pixels, grid, return_dict=True, squares=tuple(zip(*blocks, strict=True)), **kwargs)
        output = _spread(output, blocks, frame_of, merge)
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
        probe = (shapes[frame], *(float(x) for x in part[:: max(1, len(part) // 4)].double().sum(1)[:4]))
        like = next((k for k in known.get(probe, ()) if torch.equal(parts[first[k]], part)), None)
        if like is None:
            like = len(first)
            first.append(frame)
            known.setdefault(probe, []).append(like)
        place.append(like)
    return first, place


def flat_blocks(squares: torch.Tensor, height: int, width: int, area: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Squares that stand for blocks of equal ones, and of every square the one that stands for it.

    Args:
        squares (`torch.Tensor`): (height * width, patches, values) of one frame.
        area (`int`): side of the largest block.
    Returns:
        numbers of those that stay, rising, and (height * width,) owners.
    """
    owner = torch.arange(height * width, device=squares.device)
    if area == 1 or height < 2 or width < 2:
        return owner, owner
    pixels = squares.reshape(height, width, -1)
    flat = {1: torch.ones(height, width, dtype=torch.bool, device=pixels.device)}
    side = 1
    while side < area and 2 * side <= min(height, width) and bool(flat[side].any()):
        half, side = side, 2 * side
        rows, columns = height // side, width // side
        quarters = flat[half][: 2 * rows, : 2 * columns].view(rows, 2, columns, 2)
        corners = pixels[: rows * side : half, : columns * side : half]
        corners = corners.unflatten(0, (rows, 2)).unflatten(2, (columns, 2))
        alike = (corners == corners[:, :1, :, :1]).all(-1)
        flat[side] = (quarters & alike).all(3).all(1)
    owner = owner.view(height, width).clone()
    for side in sorted(flat)[1:]:
        rows, columns = flat[side].nonzero().unbind(1)
        middle = (rows * side + side // 2) * width + columns * side + side // 2
        steps = torch.arange(side, device=pixels.device)
        places = (rows[:, None] * side + steps)[:, :, None], (columns[:, None] * side + steps)[:, None, :]
        owner[places] = middle[:, None, None].expand(-1, side, side)
    owner = owner.flatten()
    return owner.unique(), owner


def _spread(output, blocks: list, frame_of: list[int], merge: int):
    """Gives every square of every frame the features of what stands for it."""
    starts, total, index = [], 0, []
    for kept, _ in blocks:
        starts.append(total)
        total += len(kept)
    for like in frame_of:
        kept, owner = blocks[like]
        place = torch.zeros_like(owner)
        place[kept] = torch.arange(len(kept), device=owner.device)
        index.append(starts[like] + place[owner])
    index = torch.cat(index)
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
