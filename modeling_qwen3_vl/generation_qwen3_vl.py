"""What `generate()` needs beyond stock: M-RoPE from the cache, and conversations that go on with new pictures.

Everything here overrides a named hook of `transformers`' `GenerationMixin`; this file is the place to look when a
new version moves one.
"""

import copy

import torch
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_masks_for_generate

from ..optim.attention.attention_layout import IMPLEMENTATION_PREFIX
from ..optim.registry_optim import cache_from_profile, visual_tokens_from_profile
from .conversation_qwen3_vl import NO_GRIDS, PIXELS_AND_GRID, drop_cached_pictures, tokens_in_cache, uncached_ids
from .mrope_qwen3_vl import compute_mrope_positions, next_position, token_types


class Qwen3VLGenerationMixin(GenerationMixin):
    """`generate()` for Qwen3-VL."""

    @staticmethod
    def create_masks_for_generate(config, attention_mask=None, **kwargs):
        """The mask of a compileable cache, made before `forward`; ours are made in it, from padding flags."""
        if config.get_text_config()._attn_implementation.startswith(IMPLEMENTATION_PREFIX):
            return attention_mask
        return create_masks_for_generate(config=config, attention_mask=attention_mask, **kwargs)

    def _prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs):
        """Plain positions and M-RoPE positions of the whole prompt, (4, B, tokens seen + T).

        The part that the cache already holds is dropped by `generate()`, so only the new part has to be right.
        """
        plain = super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)
        ids = model_kwargs.get("input_ids")
        ids = inputs_tensor if ids is None or ids.shape[1] == 0 else ids
        seen = tokens_in_cache(model_kwargs.get("past_key_values"))
        if ids.ndim != 2 or ids.is_floating_point():
            return self._continue_text(plain, seen, model_kwargs)

        mask = model_kwargs.get("attention_mask")
        new_ids = uncached_ids(ids, seen, None if mask is None else mask.shape[1])
        # This hook runs first and sees the whole conversation; from here on only new pictures are left.
        drop_cached_pictures(self.config, ids, new_ids, model_kwargs)
        image_grids, video_grids = model_kwargs.get("image_grid_thw"), model_kwargs.get("video_grid_thw")
        if image_grids is None and video_grids is None:
            if model_kwargs.get("mm_encoder_outputs"):
                raise ValueError(NO_GRIDS)
            return self._continue_text(plain, seen, model_kwargs)

        types = model_kwargs.get("mm_token_type_ids")
        if types is None:
            types = token_types(ids, self.config.image_token_id, self.config.video_token_id)
            # `generate()` marks what it adds as text, so a placeholder that the model writes is never taken for one.
            model_kwargs["mm_token_type_ids"] = types
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
        seen = tokens_in_cache(model_kwargs.get("past_key_values"))
        if seen and given is not None and given.shape[1]:
            # Positions that the caller gives skip the hook above, so pictures in the cache may still be here.
            covered = getattr(generation_config, "_mask_length", None)  # an all-ones mask is gone by now
            mask = model_kwargs.get("attention_mask")
            new_ids = uncached_ids(given, seen, covered if mask is None else mask.shape[1])
            drop_cached_pictures(self.config, given, new_ids, model_kwargs)
        grids = {name: model_kwargs[name] for _, name in PIXELS_AND_GRID.values() if name in model_kwargs}
        model_kwargs = super()._maybe_prepare_encoder_kwargs_for_generation(
            inputs_tensor, model_kwargs, model_input_name, generation_config
        )
        encoded = model_kwargs.get("mm_encoder_outputs")
        if encoded:
            model_kwargs["mm_encoder_outputs"] = visual_tokens_from_profile(self, given, grids, encoded)
        return model_kwargs

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        """As stock, but pictures are matched with the placeholders that the cache does not hold yet."""
        encoded = model_kwargs.pop("mm_encoder_outputs", None)
        if encoded and expand_size > 1:
            seen = tokens_in_cache(model_kwargs.get("past_key_values"))
            expanded = {}
            for name, output in encoded.items():
                ids = input_ids
                if seen and ids is not None and not self._placeholders_match(ids, name, output):
                    ids = ids[:, seen:]
                # On a copy, since stock writes into what may be the caller's object.
                expanded |= self._expand_multimodal_outputs(
                    ids,
                    {name: copy.copy(output)},
                    expand_size=expand_size,
                    inputs_embeds=model_kwargs.get("inputs_embeds"),
                )
            encoded = expanded
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        if encoded is not None:
            model_kwargs["mm_encoder_outputs"] = encoded
        return input_ids, model_kwargs

    def _placeholders_match(self, ids, modality, output) -> bool:
        placeholders = int((ids == getattr(self.config, f"{modality}_token_id")).sum())
        return placeholders == sum(len(features) for features in output.pooler_output)

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ):
        """Port 2. Order of precedence: the caller's cache, `use_cache=False`, `cache_implementation`, the profile.

        Last comes the cache that suits the attention implementation; stock's own for stock's.
        """
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
