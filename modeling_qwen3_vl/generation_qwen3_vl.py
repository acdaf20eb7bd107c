"""What `generate()` needs beyond stock: M-RoPE from the cache, and conversations that go on with new pictures.

Everything here overrides a named hook of `transformers`' `GenerationMixin`; this file is the place to look when a
new version moves one.
"""

import copy
from functools import partial, wraps

import torch
from transformers.generation import GenerationMixin, GenerationMode
from transformers.masking_utils import create_masks_for_generate

from ..optim.attention.attention_layout import IMPLEMENTATION_PREFIX
from ..optim.registry_optim import cache_from_profile
from .conversation_qwen3_vl import NO_GRIDS, PIXELS_AND_GRID, drop_cached_pictures, tokens_in_cache, uncached_ids
from .mrope_qwen3_vl import (
    IMAGE,
    VIDEO,
    compute_mrope_positions,
    next_position,
    remember_positions,
    remember_visual_runs,
    token_types,
)
from .reduced_cache import count_all_tokens
from .visual_reduction import plan_tokens


def _keeping_prefixes(decode):
    """A decoding loop of stock, after which a request that began from a prefix cache is stored there."""

    @wraps(decode)
    def decode_and_keep(self, *args, **kwargs):
        result = decode(self, *args, **kwargs)
        cache = kwargs.get("past_key_values")
        ticket = getattr(cache, "prefix_ticket", None)
        if ticket is not None:
            # The beams that a search returns are not those that its cache ends with; their prompts are.
            searched = kwargs["generation_config"].num_beams > 1
            ticket.store(cache, getattr(result, "sequences", result), prompts_alone=searched)
        return result

    return decode_and_keep


class Qwen3VLGenerationMixin(GenerationMixin):
    """`generate()` for Qwen3-VL."""

    _sample = _keeping_prefixes(GenerationMixin._sample)
    _beam_search = _keeping_prefixes(GenerationMixin._beam_search)

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
        if model_input_name == "input_ids" and self._may_take_prefix(given, model_kwargs, generation_config):
            names = ("attention_mask", "position_ids", "mm_token_type_ids", *sum(PIXELS_AND_GRID.values(), ()))
            described = {name: model_kwargs[name] for name in names if name in model_kwargs}
            model_kwargs["past_key_values"] = self._begin_from_prefix(self.prefix_cache, given, **described)
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
            model_kwargs["mm_encoder_outputs"] = self._plan_visual_tokens(encoded, given, seen, grids, model_kwargs)
        return model_kwargs

    def _plan_visual_tokens(self, encoded, ids, seen, grids, model_kwargs) -> dict:
        """Settles which visual tokens stay while the whole prompt is at hand; `forward` may see it in chunks."""
        if self.base_model.visual_reduction is None:
            return encoded
        embeds, mask = model_kwargs.get("inputs_embeds"), model_kwargs.get("attention_mask")
        types = model_kwargs.get("mm_token_type_ids")
        if embeds is None:
            if seen and not all(self._placeholders_match(ids, name, output) for name, output in encoded.items()):
                ids = ids[:, seen:]
            embeds = self.get_input_embeddings()(ids.to(self.device))
        else:
            ids, types = None, None
        types = None if types is None else types[:, -embeds.shape[1] :]
        return plan_tokens(self.base_model, encoded, ids, embeds, types, grids, mask)

    def _prepare_multimodal_encoder_kwargs_for_generation(self, model_kwargs):
        """As stock, but what the vision feature cache knows is not encoded again."""
        features = getattr(self, "vision_feature_cache", None)
        given = model_kwargs.get("mm_encoder_outputs") or {}
        for modality, (pixels_key, grid_key) in (("image", PIXELS_AND_GRID[IMAGE]), ("video", PIXELS_AND_GRID[VIDEO])):
            pixels, grids = model_kwargs.get(pixels_key), model_kwargs.get(grid_key)
            if features is None or pixels is None or grids is None or given.get(modality) is not None:
                continue
            run = getattr(self.base_model, f"get_{modality}_features")
            output = features.encode(self.base_model.visual, partial(run, return_dict=True), pixels, grids)
            given = {**given, modality: output}
            del model_kwargs[pixels_key]
        if given:
            model_kwargs["mm_encoder_outputs"] = given
        return super()._prepare_multimodal_encoder_kwargs_for_generation(model_kwargs)

    def _may_take_prefix(self, ids, model_kwargs, generation_config) -> bool:
        """Whether `generate()` chooses the cache, has a prefix cache, and a whole prompt in ids to look up in it."""
        if getattr(self, "prefix_cache", None) is None or model_kwargs.get("past_key_values") is not None:
            return False
        if self.base_model.visual_reduction is not None:
            return False  # which tokens of a picture stay may depend on what is asked
        mask = model_kwargs.get("attention_mask")
        covered = getattr(generation_config, "_mask_length", None) if mask is None else mask.shape[1]
        return (
            generation_config.use_cache is not False
            and generation_config.cache_implementation is None
            and not generation_config.is_assistant
            and not getattr(generation_config, "_is_assisted", False)
            and model_kwargs.get("inputs_embeds") is None
            and not model_kwargs.get("mm_encoder_outputs")
            and covered == ids.shape[1]
        )

    def _validate_generation_mode(self, generation_mode, generation_config, generation_mode_kwargs):
        super()._validate_generation_mode(generation_mode, generation_config, generation_mode_kwargs)
        # Assisted decoding begins with the whole prompt whatever the cache holds, and needs all pictures for that.
        generation_config._is_assisted = generation_mode == GenerationMode.ASSISTED_GENERATION

    def cache_from_prefix(self, prefix, input_ids: torch.Tensor, position_ids=None, **inputs):
        """A cache for `generate()` or `forward` that begins with what a prefix cache knows of these inputs.

        Args:
            prefix ([`PrefixCache`]): whose pages are used, and where the request is stored at the end of `generate()`.
            input_ids (`torch.Tensor`): (B, T), the whole prompt.
            inputs: `attention_mask`, `mm_token_type_ids`, pixels and grids, as for `generate()`.
        Raises:
            ValueError: if a prefix of such inputs cannot be told or used, as with padding on the right.
        """
        if position_ids is None:
            position_ids = self._prepare_position_ids_for_generation(input_ids, {"input_ids": input_ids, **inputs})
        cache = self._begin_from_prefix(prefix, input_ids, position_ids=position_ids, **inputs)
        if cache is None:
            raise ValueError(
                "no prefix can be told of these inputs: padding must be on the left, pictures need pixels and grids, "
                "and the model must be in eval mode, without autocast, and keep all visual tokens; use a DynamicCache."
            )
        return cache

    def _begin_from_prefix(self, prefix, ids, position_ids, attention_mask=None, mm_token_type_ids=None, **pictures):
        if mm_token_type_ids is None:
            mm_token_type_ids = token_types(ids, self.config.image_token_id, self.config.video_token_id)
        positions = position_ids if position_ids.ndim == 3 else position_ids[None]
        if positions.shape[-1] != ids.shape[1] or self.base_model.visual_reduction is not None:
            return None
        positions = positions[-3:].expand(3, *ids.shape)
        merge = self.config.vision_config.spatial_merge_size
        cache = prefix.start(self, ids, mm_token_type_ids, positions, attention_mask, pictures, merge)
        seen = tokens_in_cache(cache)
        if seen:
            remember_positions(cache, 0, positions[..., :seen])
            if bool(mm_token_type_ids[:, :seen].any()):
                remember_visual_runs(cache, 0, mm_token_type_ids[:, :seen] > 0)
        return cache

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
        expand_size = max(generation_config.num_beams, generation_config.num_return_sequences)
        given = model_kwargs.get("past_key_values")
        if expand_size > 1 and hasattr(given, "prefix_ticket") and given.rows == batch_size:
            given.batch_repeat_interleave(expand_size)
        undecided = given is None and generation_config.cache_implementation is None
        if undecided and generation_config.use_cache is not False:
            given = cache_from_profile(self, batch_size * expand_size, max_cache_length)
        rolls_back = generation_mode == GenerationMode.ASSISTED_GENERATION or generation_config.is_assistant
        if rolls_back and not getattr(given, "is_croppable", True):
            raise ValueError(
                f"assisted decoding takes tokens back, which {type(given).__name__} cannot do exactly; pass "
                "past_key_values=PagedKVCache(), or generate without an assistant."
            )
        if undecided and given is not None:
            model_kwargs["past_key_values"] = given
        else:
            super()._prepare_cache_for_generation(
                generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            )
        self._prepare_cache_for_fewer_tokens(model_kwargs, rolls_back)

    def _prepare_cache_for_fewer_tokens(self, model_kwargs, rolls_back: bool) -> None:
        """Keeps `generate()` from making masks by tokens where a cache will hold fewer entries."""
        planner, cache = self.base_model.visual_reduction, model_kwargs.get("past_key_values")
        if planner is None or not model_kwargs.get("mm_encoder_outputs"):
            return
        if rolls_back and planner.layer is not None:
            raise ValueError(
                f"{planner.name} at decoder layer {planner.layer} judges visual tokens by the latest ones, which in "
                "assisted decoding are a guess; use layer=None, or generate without an assistant."
            )
        if cache is not None:
            count_all_tokens(cache)
