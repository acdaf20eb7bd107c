"""What `generate()` needs beyond stock: M-RoPE from the cache, and conversations that go on with new pictures.

Everything here overrides a named hook of `transformers`' `GenerationMixin`; this file is the place to look when a
new version moves one.
"""

import torch
from transformers.generation import GenerationMixin

from ..optim.registry_optim import cache_from_profile, visual_tokens_from_profile
from .mrope_qwen3_vl import IMAGE, VIDEO, compute_mrope_positions, next_position, token_types


PIXELS_AND_GRID = {IMAGE: ("pixel_values", "image_grid_thw"), VIDEO: ("pixel_values_videos", "video_grid_thw")}


class Qwen3VLGenerationMixin(GenerationMixin):
    """`generate()` for Qwen3-VL."""

    def _prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs):
        """Plain positions and M-RoPE positions of the whole prompt, (4, B, tokens seen + T).

        The part that the cache already holds is dropped by `generate()`, so only the new part has to be right.
        """
        plain = super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)
        ids = model_kwargs.get("input_ids")
        ids = inputs_tensor if ids is None or ids.shape[1] == 0 else ids
        seen = tokens_in_cache(model_kwargs)
        if ids.ndim != 2 or ids.is_floating_point():
            return self._continue_text(plain, seen, model_kwargs)

        new_ids = uncached_ids(ids, seen, model_kwargs)
        # This hook runs first and sees the whole conversation; from here on only new pictures are left.
        drop_cached_pictures(self.config, ids, new_ids, model_kwargs)
        image_grids, video_grids = model_kwargs.get("image_grid_thw"), model_kwargs.get("video_grid_thw")
        if image_grids is None and video_grids is None:
            return self._continue_text(plain, seen, model_kwargs)

        types = model_kwargs.get("mm_token_type_ids")
        if types is None or types.shape[1] < new_ids.shape[1]:
            types = token_types(ids, self.config.image_token_id, self.config.video_token_id)
        mask = model_kwargs.get("attention_mask")
        new = new_ids.shape[1]
        positions, _ = compute_mrope_positions(
            types[:, types.shape[1] - new :],
            image_grids,
            video_grids,
            None if mask is None else mask[:, mask.shape[1] - new :],
            self.config.vision_config.spatial_merge_size,
        )
        if seen:
            positions = positions + self._next_position(plain, seen, model_kwargs)
            positions = torch.cat((plain[:, : plain.shape[1] - new].expand(3, len(ids), -1), positions), dim=-1)
        return torch.cat((plain.expand(len(ids), -1)[None], positions), dim=0)

    def _continue_text(self, plain, seen, model_kwargs):
        """Positions where nothing new is visual: plain ones, moved behind the pictures that the cache holds."""
        shift = 0
        if seen:
            shift = self._next_position(plain, seen, model_kwargs) - plain[:, seen : seen + 1]
        return torch.cat((plain[None], (plain + shift).expand(3, -1, -1)), dim=0)

    def _next_position(self, plain, seen, model_kwargs) -> torch.Tensor:
        noted = next_position(model_kwargs["past_key_values"], seen, plain.shape[0])
        return plain[:, seen : seen + 1] if noted is None else noted.to(plain.device)

    def _maybe_prepare_encoder_kwargs_for_generation(
        self, inputs_tensor, model_kwargs, model_input_name, generation_config
    ):
        """Runs the vision tower once before decoding (stock), then the profile's visual-token reduction (port 3)."""
        given = inputs_tensor if model_input_name == "input_ids" else model_kwargs.get("input_ids")
        model_kwargs = super()._maybe_prepare_encoder_kwargs_for_generation(
            inputs_tensor, model_kwargs, model_input_name, generation_config
        )
        encoded = model_kwargs.get("mm_encoder_outputs")
        if encoded:
            model_kwargs["mm_encoder_outputs"] = visual_tokens_from_profile(self, given, encoded)
        return model_kwargs

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        """As stock, but pictures are matched with the placeholders that the cache does not hold yet."""
        encoded = model_kwargs.pop("mm_encoder_outputs", None)
        if encoded and expand_size > 1:
            ids = input_ids
            if ids is not None and ids.shape[1]:
                ids = uncached_ids(ids, tokens_in_cache(model_kwargs), model_kwargs)
            encoded = self._expand_multimodal_outputs(
                ids, encoded, expand_size=expand_size, inputs_embeds=model_kwargs.get("inputs_embeds")
            )
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        if encoded is not None:
            model_kwargs["mm_encoder_outputs"] = encoded
        return input_ids, model_kwargs

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ):
        """Port 2. Order of precedence: the caller's cache, `use_cache=False`, `cache_implementation`, the profile."""
        undecided = model_kwargs.get("past_key_values") is None and generation_config.cache_implementation is None
        if undecided and generation_config.use_cache is not False:
            rows = batch_size * max(generation_config.num_beams, generation_config.num_return_sequences)
            cache = cache_from_profile(self, rows, max_cache_length)
            if cache is not None:
                model_kwargs["past_key_values"] = cache
                return
        super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )


def tokens_in_cache(model_kwargs: dict) -> int:
    """Tokens that the caller's cache has seen; 0 without one."""
    cache = model_kwargs.get("past_key_values")
    return 0 if cache is None else int(cache.get_seq_length())


def uncached_ids(ids: torch.Tensor, seen: int, model_kwargs: dict) -> torch.Tensor:
    """The part of `ids` that the cache does not hold; a caller may pass the whole conversation or the new part."""
    mask = model_kwargs.get("attention_mask")
    only_new = mask is not None and mask.shape[1] > ids.shape[1]
    return ids if only_new else ids[:, seen:]


def drop_cached_pictures(config, ids: torch.Tensor, new_ids: torch.Tensor, model_kwargs: dict) -> None:
    """Removes, in place, the pictures and videos that the cache has seen, so that they are not encoded again.

    Raises:
        ValueError: if the pictures are neither those of the whole conversation nor those of its new part, or if the
            cache ends inside one.
    """
    tokens_per_patch = config.vision_config.spatial_merge_size**2
    for modality, (pixels_key, grid_key) in PIXELS_AND_GRID.items():
        grids = model_kwargs.get(grid_key)
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
            model_kwargs.pop(grid_key)
            model_kwargs.pop(pixels_key, None)
            continue
        model_kwargs[grid_key] = grids[is_new]
        if model_kwargs.get(pixels_key) is not None:
            model_kwargs[pixels_key] = model_kwargs[pixels_key][patches]
