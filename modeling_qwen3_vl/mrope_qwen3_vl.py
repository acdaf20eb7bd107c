"""M-RoPE positions of mixed text, pictures and video, and what a cache remembers of the tokens that it holds.

A text token takes one position on all three axes. A picture or a video frame takes, for its visual tokens, the
position at which it starts plus their row and column, and the text after it goes on behind its longer side. So after
a picture, positions run behind the count of tokens. Source: Qwen2-VL (arXiv 2409.12191), section 2.1; in Qwen3-VL
every video frame stands alone behind a time stamp in text (arXiv 2511.21631).
"""

import torch

from ..optim.cache.cache_front import CacheFront, put_in_front


TEXT, IMAGE, VIDEO = 0, 1, 2
# Caches that are made of others take over what is named so (`optim/cache/cache_common.py`).
_STATE = "_qwen3_vl_next_position"
_RUNS = "_qwen3_vl_visual_runs"
# What is noted on a cache token by token, (B, tokens); moves and shrinks with the rows.
_NOTES = (_STATE, _RUNS)


def token_types(input_ids: torch.Tensor, image_token_id: int, video_token_id: int) -> torch.Tensor:
    """0 for text, 1 for picture and 2 for video placeholders: (B, T), as the processor's `mm_token_type_ids`."""
    return (input_ids == image_token_id).int() * IMAGE + (input_ids == video_token_id).int() * VIDEO


def split_video_frames(video_grid_thw: torch.Tensor) -> torch.Tensor:
    """(videos, 3) grids to one grid a frame, as frames stand alone in the text."""
    frames = torch.repeat_interleave(video_grid_thw, video_grid_thw[:, 0], dim=0)
    return torch.cat((torch.ones_like(frames[:, :1]), frames[:, 1:]), dim=1)


def check_grids(grids: torch.Tensor, name: str) -> None:
    """Raises a `ValueError` unless `grids` is (pictures, 3) with positive whole numbers."""
    if grids.ndim != 2 or grids.shape[1] != 3 or grids.is_floating_point():
        raise ValueError(
            f"{name} must be whole numbers of shape (pictures, 3): patches in time, height and width of each; "
            f"got {grids.dtype} of shape {tuple(grids.shape)}."
        )
    if len(grids) == 0 or int(grids.min()) < 1:
        raise ValueError(f"{name} must hold at least one grid and positive numbers, got {grids.tolist()}.")


def compute_mrope_positions(
    mm_token_type_ids: torch.Tensor,
    image_grid_thw: torch.Tensor | None = None,
    video_grid_thw: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    spatial_merge_size: int = 2,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of whole rows, without a loop over tokens or pictures.

    Args:
        mm_token_type_ids (`torch.Tensor`): (B, T), see [`token_types`].
        image_grid_thw, video_grid_thw (`torch.Tensor`, *optional*): (pictures, 3) and (videos, 3), in the order in
            which the placeholders stand in the batch.
        attention_mask (`torch.Tensor`, *optional*): (B, T), 0 for padding, which gets position 0.
    Returns:
        positions (3, B, T) int64, and for every row the next text position minus its real tokens, (B, 1).
    Raises:
        ValueError: if the placeholders of a modality are not those that its grids call for.
    """
    for name, grids in (("image_grid_thw", image_grid_thw), ("video_grid_thw", video_grid_thw)):
        if grids is not None:
            check_grids(grids, name)
    real = torch.ones_like(mm_token_type_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    types = torch.where(real, mm_token_type_ids, TEXT)
    advance = (real & (types == TEXT)).long()
    offsets = torch.zeros(3, *types.shape, dtype=torch.long, device=types.device)
    if video_grid_thw is not None:
        video_grid_thw = split_video_frames(video_grid_thw)
    for modality, grids in ((IMAGE, image_grid_thw), (VIDEO, video_grid_thw)):
        if grids is not None:
            _place_modality(modality, grids.to(types.device), types, spatial_merge_size, advance, offsets)

    # Inside a picture nothing advances, so all of its tokens see the position at which it starts.
    start = advance.cumsum(1) - advance
    positions = torch.where(real, start + offsets, 0)
    reach = torch.where(real, positions, -1).amax(dim=(0, 2)) + 1
    return positions, (reach - real.sum(1))[:, None]


def _place_modality(modality, grids, types, merge, advance, offsets) -> None:
    """Writes, in place, the offsets inside each picture of one modality and the advance behind it."""
    where = (types == modality).flatten().nonzero().squeeze(-1)
    time, height, width = grids[:, 0], grids[:, 1] // merge, grids[:, 2] // merge
    sizes = time * height * width
    ends = sizes.cumsum(0)
    _check_placeholders(modality, where, sizes, ends, types.shape[1])

    picture = torch.repeat_interleave(torch.arange(len(grids), device=where.device), sizes, output_size=len(where))
    inside = torch.arange(len(where), device=where.device) - (ends - sizes)[picture]
    row_size = width[picture]
    frame_size = height[picture] * row_size
    offsets[0].view(-1)[where] = inside // frame_size
    offsets[1].view(-1)[where] = inside % frame_size // row_size
    offsets[2].view(-1)[where] = inside % row_size
    advance.view(-1)[where[ends - 1]] = torch.maximum(height, width)


def _check_placeholders(modality, where, sizes, ends, row_length) -> None:
    name, piece = ("image", "image") if modality == IMAGE else ("video", "video frame")
    needed = int(ends[-1]) if len(ends) else 0
    if needed != len(where):
        raise ValueError(
            f"{name}_grid_thw calls for {needed} {name} placeholder tokens but input_ids hold {len(where)}; "
            f"pass ids and {name}_grid_thw of the same processor call."
        )
    first, last = where[ends - sizes], where[ends - 1]
    broken = ((last - first != sizes - 1) | (first // row_length != last // row_length)).nonzero()
    if len(broken):
        index = int(broken[0])
        raise ValueError(
            f"{piece} {index} needs {int(sizes[index])} placeholder tokens in one run but they are interrupted; "
            f"{name}_grid_thw must follow the order of the placeholders."
        )


def remember_positions(cache, start: int, position_ids: torch.Tensor) -> None:
    """Notes in `cache` where text goes on after each of the tokens `start`, `start + 1`, ...

    The note is an attribute of the cache object, so it is copied, dropped and shared with the cache, and
    conversations on one model do not disturb each other.

    Args:
        cache (`Cache`): any; read again by [`next_position`].
        start (`int`): tokens that the cache had seen before these.
        position_ids (`torch.Tensor`): (3, B, T), or (B, T) for plain ones.
    """
    latest = (position_ids.amax(0) if position_ids.ndim == 3 else position_ids).cummax(1).values + 1
    earlier = next_positions_seen(cache)
    if start and earlier is not None:
        held = earlier[:, :start].to(latest.device)
        if held.shape[1] < start:  # the tokens between were text: each took one position
            gap = torch.arange(1, start - held.shape[1] + 1, device=held.device)
            held = torch.cat((held, held[:, -1:] + gap), dim=1)
        if held.shape[0] != latest.shape[0]:
            held = expand_rows(held, latest.shape[0])
        latest = torch.cat((held, latest), dim=1)
    elif start:
        plain = torch.arange(1, start + 1, device=latest.device).expand(latest.shape[0], -1)
        latest = torch.cat((plain, latest), dim=1)
    _note(cache, _STATE, latest)


def remember_visual_runs(cache, start: int, visual_mask: torch.Tensor) -> None:
    """Notes which tokens are visual and of which picture or frame: visual tokens side by side are one.

    Args:
        cache (`Cache`): any; read again by [`visual_runs`].
        start (`int`): tokens that the cache had seen before these.
        visual_mask (`torch.Tensor`): (B, T) boolean, true where a new token is visual.
    """
    earlier = visual_runs(cache, start, len(visual_mask), visual_mask.device)
    _note(cache, _RUNS, torch.cat((earlier, number_runs(visual_mask, earlier)), dim=1))


def number_runs(visual_mask: torch.Tensor, earlier: torch.Tensor) -> torch.Tensor:
    """0 for text and k for the k-th run of visual tokens: (B, T) int32, counted on from `earlier` (B, tokens)."""
    before = earlier[:, -1:] if earlier.shape[1] else torch.zeros_like(visual_mask[:, :1], dtype=torch.int32)
    begins = visual_mask & ~torch.cat((before > 0, visual_mask[:, :-1]), dim=1)
    held = earlier.amax(1, keepdim=True) if earlier.shape[1] else before
    return torch.where(visual_mask, held + begins.int().cumsum(1), 0).int()


def visual_runs(cache, length: int, batch_size: int, device=None) -> torch.Tensor:
    """The picture or frame of each of the first `length` tokens, 0 for text: (batch_size, length) int32."""
    noted = None if cache is None else getattr(cache, _RUNS, None)
    if noted is None:
        return torch.zeros(batch_size, length, dtype=torch.int32, device=device)
    noted = expand_rows(noted[:, :length], batch_size).to(device)
    # Tokens after the last note were text.
    return torch.nn.functional.pad(noted, (0, length - noted.shape[1]))


def _note(cache, name: str, rows: torch.Tensor) -> None:
    if bool((rows == rows[:1]).all()):
        rows = rows[:1]  # one row stands for any number of equal ones
    else:
        put_in_front(PositionsFollowRows, cache)
    setattr(cache, name, rows)


class PositionsFollowRows(CacheFront):
    """Put in front of a cache's class while its rows have come differently far, so that the note moves with them.

    A note that stayed behind would give silently wrong positions.
    """

    def move_notes(self, move) -> None:
        super().move_notes(move)
        for name in _NOTES:
            rows = getattr(self, name, None)
            if rows is not None and len(rows) > 1:
                setattr(self, name, move(rows))


def next_positions_seen(cache) -> torch.Tensor | None:
    """The note of [`remember_positions`]: (B, tokens), or `None` if the cache has none."""
    return getattr(cache, _STATE, None)


def forget_positions_after(cache, length: int) -> None:
    """Drops what was noted for tokens that the cache no longer holds, as after `crop` or `reset`."""
    for name in _NOTES:
        _forget(cache, name, length)


def forget_runs_after(cache, entries: int) -> None:
    """As [`forget_positions_after`], for pictures alone: they are noted by entry where visual tokens were left out."""
    _forget(cache, _RUNS, entries)


def _forget(cache, name: str, length: int) -> None:
    rows = getattr(cache, name, None)
    if rows is not None and rows.shape[1] > length:
        setattr(cache, name, rows[:, :length] if length else None)


def next_position(cache, length: int, batch_size: int) -> torch.Tensor | None:
    """Where text goes on after the first `length` tokens of a cache: (batch_size, 1), or `None` if nothing is noted.

    Rows are repeated when the batch was expanded since, as for beams.
    Raises:
        ValueError: if the batch is no multiple of the rows that were noted.
    """
    forget_positions_after(cache, length)
    noted = next_positions_seen(cache)
    if noted is None or length == 0:
        return None
    # Tokens after the last note were text: each took one position.
    return expand_rows(noted[:, -1:] + (length - noted.shape[1]), batch_size)


def expand_rows(rows: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Repeats each row so that there are `batch_size`, as `generate()` expands a batch."""
    if batch_size % rows.shape[0]:
        raise ValueError(
            f"the cache holds M-RoPE positions of {rows.shape[0]} rows but the batch has {batch_size}; "
            "use a cache made for this batch."
        )
    return rows.repeat_interleave(batch_size // rows.shape[0], dim=0)
