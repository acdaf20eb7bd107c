"""Conversations that go on with an old cache: which tokens and pictures are new.

A caller may pass the whole conversation with all of its pictures, as the processor makes it, or the new part only.
"""

import torch

from .mrope_qwen3_vl import IMAGE, VIDEO
from .reduced_cache import count_all_tokens, noted_selections


PIXELS_AND_GRID = {IMAGE: ("pixel_values", "image_grid_thw"), VIDEO: ("pixel_values_videos", "video_grid_thw")}

NO_GRIDS = (
    "visual features came without image_grid_thw or video_grid_thw, so their M-RoPE positions are unknown; "
    "pass the grids beside them, or position_ids."
)


@torch.compiler.disable
def tokens_in_cache(cache) -> int:
    """Tokens that a cache has seen; 0 without one. Waits for the device where a cache counts there."""
    if noted_selections(cache) is not None:
        count_all_tokens(cache)  # a cache of another class that took the content over does not yet
    return 0 if cache is None else int(cache.get_seq_length())


def check_cache_rows(cache, batch: int) -> None:
    """Raises a `ValueError` if a cache holds keys of another number of rows than the batch has."""
    keys = getattr(cache.layers[0], "keys", None) if getattr(cache, "layers", None) else None
    if keys is not None and keys.ndim == 4 and keys.shape[0] != batch:
        raise ValueError(
            f"the cache holds {keys.shape[0]} rows but the batch has {batch}; use a cache made for this batch."
        )


def uncached_ids(ids: torch.Tensor, seen: int, covered: int | None) -> torch.Tensor:
    """The part of `ids` (B, T) that the cache does not hold.

    Args:
        seen (`int`): tokens in the cache.
        covered (`int`, *optional*): tokens that the attention mask covers. More than T means that `ids` are new.
    Raises:
        ValueError: if `ids` can be neither the whole conversation nor, by their mask, its new part.
    """
    if covered is not None and covered > ids.shape[1]:
        return ids
    if seen and ids.shape[1] <= seen:
        raise ValueError(
            f"the cache has seen {seen} tokens but input_ids hold {ids.shape[1]}; pass the whole conversation, or its "
            f"new part with an attention_mask that covers the cache too ({seen + ids.shape[1]} tokens)."
        )
    return ids[:, seen:]


def is_whole_conversation(ids: torch.Tensor | None, attention_mask: torch.Tensor | None, seen: int) -> bool:
    """Whether `ids` repeat what the cache holds: a mask covers all tokens, so then it is no longer than they are."""
    if ids is None or attention_mask is None or attention_mask.ndim != 2:
        return False
    if attention_mask.shape[1] < seen + ids.shape[1] and ids.shape[1] <= seen:
        uncached_ids(ids, seen, attention_mask.shape[1])  # raises: the mask leaves out what the cache holds
    return attention_mask.shape[1] == ids.shape[1] > seen


def drop_cached_pictures(config, ids: torch.Tensor, new_ids: torch.Tensor, inputs: dict) -> None:
    """Removes, in place, the pictures and videos that the cache has seen, so that they are not encoded again.

    Raises:
        ValueError: if the pictures are neither those of the whole conversation nor those of its new part, or if the
            cache ends inside one.
    """
    tokens_per_patch = config.vision_config.spatial_merge_size**2
    for modality, (pixels_key, grid_key) in PIXELS_AND_GRID.items():
        grids = inputs.get(grid_key)
        if grids is None:
            continue
        placeholder = config.image_token_id if modality == IMAGE else config.video_token_id
        needed_new = int((new_ids == placeholder).sum())
        sizes = grids.prod(-1) // tokens_per_patch
        if int(sizes.sum()) == needed_new:
            continue
        where = (ids == placeholder).flatten().nonzero().squeeze(-1)
        if int(sizes.sum()) != len(where):
            raise ValueError(
                f"{grid_key} describes {int(sizes.sum())} placeholder tokens, but the conversation holds "
                f"{len(where)} and its new part {needed_new}; pass the pictures of either."
            )
        cached_length = ids.shape[1] - new_ids.shape[1]
        ends = sizes.cumsum(0)
        is_new = where.to(sizes.device)[ends - sizes] % ids.shape[1] >= cached_length
        if int(sizes[is_new].sum()) != needed_new:
            raise ValueError(
                f"the cache ends after {cached_length} tokens, inside a picture or video; crop it to where one starts."
            )
        patches = torch.repeat_interleave(is_new.cpu(), grids.prod(-1).cpu())
        if not bool(is_new.any()):
            inputs.pop(grid_key)
            inputs.pop(pixels_key, None)
            continue
        inputs[grid_key] = grids[is_new]
        if inputs.get(pixels_key) is not None:
            inputs[pixels_key] = inputs[pixels_key][patches]
