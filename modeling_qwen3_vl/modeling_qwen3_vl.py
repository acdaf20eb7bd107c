"""Qwen3-VL: the vision tower and the decoder together, dense and mixture-of-experts.

The model is plain. Optimizations enter by four ports: attention by name (`modeling_text`, `modeling_vision`), the
cache and visual tokens (`generation_qwen3_vl`), and changes to layers (`Qwen3VLPreTrainedModel.from_pretrained`).
Source: Qwen3-VL Technical Report, arXiv 2511.21631.
"""

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast, MoeCausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from ..configuration.configuration_qwen3_vl import Qwen3VLConfig
from ..configuration.configuration_qwen3_vl_moe import Qwen3VLMoeConfig, Qwen3VLMoeVisionConfig
from ..configuration.profile_qwen3_vl import model_config
from ..optim.weights.moe_experts import load_balancing_loss
from .conversation_qwen3_vl import (
    NO_GRIDS,
    check_cache_rows,
    drop_cached_pictures,
    is_whole_conversation,
    tokens_in_cache,
)
from .generation_qwen3_vl import Qwen3VLGenerationMixin
from .modeling_base import Qwen3VLPreTrainedModel, Qwen3VLVisionOutput
from .modeling_moe import HoldsExperts, Qwen3VLMoeTextModel
from .modeling_text import Qwen3VLTextModel
from .modeling_vision import Qwen3VLVisionModel
from .mrope_qwen3_vl import (
    IMAGE,
    VIDEO,
    check_grids,
    compute_mrope_positions,
    forget_positions_after,
    next_position,
    next_positions_seen,
    remember_positions,
    token_types,
)
from .reduced_cache import noted_selections
from .visual_reduction import plan_tokens, shorten, split_plan


class Qwen3VLMoeVisionModel(Qwen3VLVisionModel):
    """The vision tower of the mixture-of-experts models; the same tower under a configuration of its own."""

    config_class = Qwen3VLMoeVisionConfig


class Qwen3VLModel(Qwen3VLPreTrainedModel):
    """Tower and decoder, without the language-model head."""

    accepts_loss_kwargs = False
    vision_class = Qwen3VLVisionModel
    text_class = Qwen3VLTextModel
    # Port 3: a technique that leaves out visual tokens (see `visual_reduction`).
    visual_reduction = None

    def __init__(self, config: Qwen3VLConfig):
        config = model_config(config)
        super().__init__(config)
        self.visual = self.vision_class._from_config(config.vision_config)
        self.language_model = self.text_class._from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    @can_return_tuple
    def get_image_features(
        self, pixel_values: torch.Tensor, image_grid_thw: torch.LongTensor | None = None, **kwargs
    ) -> tuple | Qwen3VLVisionOutput:
        """Encodes pictures.

        Args:
            pixel_values (`torch.Tensor`): (patches, channels * temporal_patch_size * patch_size**2), normalised.
            image_grid_thw (`torch.LongTensor`): (pictures, 3), patches in time, height and width.
        Returns:
            [`Qwen3VLVisionOutput`] with one tensor a picture in `pooler_output` and in each DeepStack level.
        """
        self._check_pixels(pixel_values, image_grid_thw)
        output = self.visual(pixel_values.to(self.visual.dtype), grid_thw=image_grid_thw, return_dict=True, **kwargs)
        sizes = (image_grid_thw.prod(-1) // self.visual.spatial_merge_size**2).tolist()
        output.pooler_output = torch.split(output.pooler_output, sizes)
        output.deepstack_features = [torch.split(level, sizes) for level in output.deepstack_features]
        return output

    def get_video_features(
        self, pixel_values_videos: torch.Tensor, video_grid_thw: torch.LongTensor | None = None, **kwargs
    ) -> tuple | Qwen3VLVisionOutput:
        """As [`~Qwen3VLModel.get_image_features`], for (videos, 3) grids whose frames are encoded one by one."""
        return self.get_image_features(pixel_values_videos, video_grid_thw, **kwargs)

    def get_rope_index(
        self,
        input_ids: torch.LongTensor,
        mm_token_type_ids: torch.Tensor | None = None,
        image_grid_thw: torch.LongTensor | None = None,
        video_grid_thw: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """M-RoPE positions (3, B, T) and deltas (B, 1) of whole rows; see `compute_mrope_positions`."""
        if mm_token_type_ids is None:
            mm_token_type_ids = token_types(input_ids, self.config.image_token_id, self.config.video_token_id)
        return compute_mrope_positions(
            mm_token_type_ids, image_grid_thw, video_grid_thw, attention_mask, self.visual.spatial_merge_size
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        image_grid_thw: torch.LongTensor | None = None,
        video_grid_thw: torch.LongTensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, Qwen3VLVisionOutput] | None = None,
        **kwargs,
    ) -> tuple | BaseModelOutputWithPast:
        """Encodes pictures, puts them where their placeholders stand, and runs the decoder.

        Args:
            input_ids (`torch.LongTensor`, *optional*): (B, T), the tokens that the cache has not seen, with one
                placeholder for every visual token. Either this or `inputs_embeds`. With a mask of their own length
                they are the whole conversation: what the cache holds, its pictures too, is left out first.
            attention_mask (`torch.Tensor`, *optional*): (B, tokens seen + T), 1 for real tokens.
            position_ids (`torch.LongTensor`, *optional*): (3, B, T) M-RoPE positions, or (4, B, T) with plain
                positions in front (packed rows start at 0 there). By default made from the grids and the cache.
            pixel_values, pixel_values_videos (`torch.Tensor`, *optional*): see `get_image_features`.
            image_grid_thw, video_grid_thw (`torch.LongTensor`, *optional*): (pictures, 3), (videos, 3).
            mm_token_type_ids (`torch.Tensor`, *optional*): (B, T), 1 for picture and 2 for video placeholders; read
                off `input_ids` by default.
            mm_encoder_outputs (`dict`, *optional*): the tower's outputs under `"image"` and `"video"`, in place of
                pixels.
        Raises:
            ValueError: if placeholders and visual features do not match, or for pixels that are not finite.
            TypeError: for ids or pixels of a wrong dtype.
        """
        self._check_inputs(input_ids, inputs_embeds, pixel_values, pixel_values_videos, mm_encoder_outputs)
        pictures = {
            "pixel_values": pixel_values,
            "pixel_values_videos": pixel_values_videos,
            "image_grid_thw": image_grid_thw,
            "video_grid_thw": video_grid_thw,
        }
        pictures = {name: value for name, value in pictures.items() if value is not None}
        length = (inputs_embeds if input_ids is None else input_ids).shape[1]
        counting = past_key_values is not None and (
            position_ids is None
            or length > 1
            or noted_selections(past_key_values) is not None
            or counts_on_host(past_key_values)
        )
        seen = tokens_in_cache(past_key_values) if counting else 0
        if seen:
            check_cache_rows(past_key_values, len(inputs_embeds if input_ids is None else input_ids))
        if seen and is_whole_conversation(input_ids, attention_mask, seen):
            drop_cached_pictures(self.config, input_ids, input_ids[:, seen:], pictures)
            input_ids = input_ids[:, seen:]

        encoded = self._encode(pictures, mm_encoder_outputs)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        visual_mask, deepstack, stays = None, None, None
        if encoded:
            if self.visual_reduction is not None:
                encoded = plan_tokens(
                    self, encoded, input_ids, inputs_embeds, mm_token_type_ids, pictures, attention_mask
                )
            inputs_embeds, visual_mask, deepstack, stays = self._place_features(
                encoded, input_ids, inputs_embeds, mm_token_type_ids
            )
        if position_ids is None and (pictures or encoded or counting):
            position_ids = self._make_positions(
                input_ids, inputs_embeds, mm_token_type_ids, pictures, attention_mask, past_key_values, seen
            )
            if encoded and position_ids is None and input_ids is not None:
                raise ValueError(NO_GRIDS)
        inputs = {
            "position_ids": position_ids,
            "attention_mask": attention_mask,
            "inputs_embeds": inputs_embeds,
            "visual_pos_masks": visual_mask,
            "deepstack_visual_embeds": deepstack,
        }
        shortened = shorten(self, past_key_values, stays, inputs)
        if shortened is None:
            outputs = self.language_model(past_key_values=past_key_values, **inputs, **kwargs)
        else:
            outputs = shortened.run(self.language_model, **kwargs)
        new_cache = past_key_values is None and outputs.past_key_values is not None
        if counting or (new_cache and position_ids is not None):
            self._note_positions(outputs.past_key_values, seen, position_ids, bool(encoded))
        return outputs

    @torch.compiler.disable
    def _note_positions(self, cache, seen: int, position_ids: torch.Tensor | None, saw_pictures: bool) -> None:
        if position_ids is not None and (saw_pictures or not seen):
            remember_positions(cache, seen, position_ids[-3:] if position_ids.ndim == 3 else position_ids)
        else:
            forget_positions_after(cache, seen)

    def _encode(self, pictures: dict, mm_encoder_outputs: dict | None) -> dict[str, Qwen3VLVisionOutput]:
        """The tower's outputs under "image" and "video", as far as there are any."""
        encoded = {name: output for name, output in (mm_encoder_outputs or {}).items() if output is not None}
        if "pixel_values" in pictures:
            encoded["image"] = self.get_image_features(
                pictures["pixel_values"], pictures.get("image_grid_thw"), return_dict=True
            )
        if "pixel_values_videos" in pictures:
            encoded["video"] = self.get_video_features(
                pictures["pixel_values_videos"], pictures.get("video_grid_thw"), return_dict=True
            )
        return encoded

    def _place_features(self, encoded, input_ids, inputs_embeds, mm_token_type_ids):
        """Puts visual features where their placeholders stand.

        Returns the embeddings, where visual tokens are (B, T), per DeepStack level (visual tokens, hidden size) in the
        order of those places, and which tokens stay (B, T), `None` for all.
        """
        device = inputs_embeds.device
        features, keep = split_plan(encoded)
        features = {name: of_modality.to(device) for name, of_modality in features.items()}
        rows = torch.cat(
            [
                self._placeholder_rows(name, input_ids, inputs_embeds, mm_token_type_ids, len(of_modality))
                for name, of_modality in features.items()
            ]
        )
        features = torch.cat(tuple(features.values())).to(inputs_embeds.dtype)
        flat = inputs_embeds.reshape(-1, inputs_embeds.shape[-1])
        inputs_embeds = flat.index_copy(0, rows, features).view_as(inputs_embeds)

        visual_mask = torch.zeros(flat.shape[0], dtype=torch.bool, device=flat.device)
        visual_mask[rows] = True
        levels = zip(*(output.deepstack_features or () for output in encoded.values()), strict=True)
        deepstack = [torch.cat([x.to(device) for modality in level for x in modality]) for level in levels]
        if len(encoded) > 1:  # pictures and videos take turns in the row
            order = rows.argsort()
            deepstack = [level[order] for level in deepstack]
        stays = None
        if keep is not None:
            stays = torch.ones_like(visual_mask)
            stays[rows] = keep.to(device)
            stays = stays.view(inputs_embeds.shape[:2])
        return inputs_embeds, visual_mask.view(inputs_embeds.shape[:2]), deepstack, stays

    def _placeholder_rows(self, modality, input_ids, inputs_embeds, mm_token_type_ids, features: int) -> torch.Tensor:
        token_id = getattr(self.config, f"{modality}_token_id")
        if input_ids is None:
            embedding = self.get_input_embeddings()(torch.tensor(token_id, device=inputs_embeds.device))
            mask = (inputs_embeds == embedding).all(-1)
        else:
            mask = input_ids == token_id
        rows = mask.to(inputs_embeds.device).flatten().nonzero().squeeze(-1)
        if len(rows) != features and mm_token_type_ids is not None and mm_token_type_ids.shape[1] >= mask.shape[1]:
            # Without a cache the model's own answer comes back as input: what it wrote there is text, whatever its id.
            marked = mm_token_type_ids[:, -mask.shape[1] :] == (IMAGE if modality == "image" else VIDEO)
            rows = marked.to(inputs_embeds.device).flatten().nonzero().squeeze(-1)
        if len(rows) != features:
            raise ValueError(
                f"the input holds {len(rows)} {modality} placeholder tokens but the {modality}s gave {features} "
                "visual tokens; pass ids, pixels and grids of the same processor call."
            )
        return rows

    @torch.compiler.disable
    def _make_positions(
        self, input_ids, inputs_embeds, mm_token_type_ids, pictures, attention_mask, past_key_values, seen
    ) -> torch.Tensor | None:
        """M-RoPE positions (3, B, T) of the new tokens, or `None` where nothing visual is known.

        Embeddings without ids cannot be told apart, so those count as text here, as in stock `transformers`; pass
        `position_ids` with them.
        """
        batch, length = inputs_embeds.shape[:2]
        grids = pictures.get("image_grid_thw"), pictures.get("video_grid_thw")
        visual = input_ids is not None and any(grid is not None for grid in grids)
        noted = past_key_values is not None and next_positions_seen(past_key_values) is not None
        base = next_position(past_key_values, seen, batch) if noted else None
        if not visual and base is None:
            return None
        mask = attention_mask if attention_mask is not None and attention_mask.ndim == 2 else None
        new_mask = None if mask is None else mask[:, mask.shape[1] - length :]
        if visual:
            if mm_token_type_ids is not None:
                if mm_token_type_ids.shape[1] < length:
                    raise ValueError(
                        f"mm_token_type_ids covers {mm_token_type_ids.shape[1]} tokens but the input has {length}; "
                        "pass one type a token, or leave it out."
                    )
                mm_token_type_ids = mm_token_type_ids[:, -length:]
            steps, _ = self.get_rope_index(input_ids, mm_token_type_ids, *grids, new_mask)
        elif new_mask is not None:
            steps = (new_mask.long().cumsum(1) - 1).clamp(min=0).expand(3, -1, -1)
        else:
            steps = torch.arange(length, device=base.device).expand(3, batch, -1)
        # Without a note, what the cache holds is text that took one position a token.
        return (steps + (seen if base is None else base.to(steps.device))).to(inputs_embeds.device)

    def _check_inputs(self, input_ids, inputs_embeds, pixel_values, pixel_values_videos, mm_encoder_outputs) -> None:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds.")
        given = input_ids if inputs_embeds is None else inputs_embeds
        if given.shape[0] == 0 or given.shape[1] == 0:
            raise ValueError(
                f"the batch is empty: got shape {tuple(given.shape)}; pass at least one row and one token."
            )
        if input_ids is not None and input_ids.dtype not in (torch.long, torch.int):
            raise TypeError(f"input_ids must be int64 or int32, got {input_ids.dtype}; pass the processor's output.")
        if (pixel_values is not None or pixel_values_videos is not None) and mm_encoder_outputs:
            raise ValueError("give either pixel_values / pixel_values_videos or mm_encoder_outputs, not both.")

    def _check_pixels(self, pixels: torch.Tensor, grids: torch.Tensor | None) -> None:
        if grids is None:
            raise ValueError("pixel values came without a grid; pass image_grid_thw (or video_grid_thw) beside them.")
        check_grids(grids, "image_grid_thw or video_grid_thw")
        vision = self.config.vision_config
        width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        if pixels.ndim != 2 or pixels.shape[1] != width:
            raise ValueError(
                f"pixel values must be flat patches of shape (patches, {width}), got {tuple(pixels.shape)}; "
                "use the processor."
            )
        if not pixels.is_floating_point():
            raise TypeError(
                f"pixel values must be floating-point normalised patches, got {pixels.dtype}; use the processor."
            )
        if not torch.compiler.is_compiling() and not torch.isfinite(pixels).all():
            raise ValueError(
                f"pixel values of shape {tuple(pixels.shape)} hold NaN or infinity; check the picture and its scaling."
            )


class Qwen3VLForConditionalGeneration(Qwen3VLPreTrainedModel, Qwen3VLGenerationMixin):
    """Qwen3-VL with its language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    accepts_loss_kwargs = False
    model_class = Qwen3VLModel

    def __init__(self, config: Qwen3VLConfig):
        config = model_config(config)
        super().__init__(config)
        self.model = self.model_class(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_image_features(self, pixel_values, image_grid_thw=None, **kwargs) -> tuple | Qwen3VLVisionOutput:
        """See [`Qwen3VLModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values, image_grid_thw, **kwargs)

    def get_video_features(self, pixel_values_videos, video_grid_thw=None, **kwargs) -> tuple | Qwen3VLVisionOutput:
        """See [`Qwen3VLModel.get_video_features`]."""
        return self.model.get_video_features(pixel_values_videos, video_grid_thw, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        image_grid_thw: torch.LongTensor | None = None,
        video_grid_thw: torch.LongTensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict[str, Qwen3VLVisionOutput] | None = None,
        **kwargs,
    ) -> tuple | CausalLMOutputWithPast:
        """As [`Qwen3VLModel.forward`], and:

        Args:
            labels (`torch.LongTensor`, *optional*): (B, T) next-token targets, -100 where none; shifted here.
            logits_to_keep (`int` or `torch.Tensor`): compute logits only for the last so many tokens (0 for all), or
                for these: (n,) positions, (B, n) positions of each row, or a boolean (B, T) mask.
        """
        outputs = self._run_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            pixel_values_videos=pixel_values_videos,
            image_grid_thw=image_grid_thw,
            video_grid_thw=video_grid_thw,
            mm_token_type_ids=mm_token_type_ids,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )
        logits = self.lm_head(keep_positions(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
        return self._make_output(outputs, logits, loss, attention_mask)

    def _run_model(self, **inputs):
        return self.model(**inputs)

    def _make_output(self, outputs, logits, loss, attention_mask) -> CausalLMOutputWithPast:
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class Qwen3VLMoePreTrainedModel(HoldsExperts, Qwen3VLPreTrainedModel):
    """Loading and saving of the mixture-of-experts models."""

    config_class = Qwen3VLMoeConfig


class Qwen3VLMoeModel(Qwen3VLMoePreTrainedModel, Qwen3VLModel):
    """Tower and sparse decoder, without the language-model head."""

    vision_class = Qwen3VLMoeVisionModel
    text_class = Qwen3VLMoeTextModel


class Qwen3VLMoeForConditionalGeneration(Qwen3VLMoePreTrainedModel, Qwen3VLForConditionalGeneration):
    """The mixture-of-experts Qwen3-VL with its language-model head."""

    model_class = Qwen3VLMoeModel

    def _run_model(self, output_router_logits: bool | None = None, **inputs):
        if output_router_logits is None:
            output_router_logits = self.config.text_config.output_router_logits
        return self.model(output_router_logits=output_router_logits, **inputs)

    def _make_output(self, outputs, logits, loss, attention_mask) -> MoeCausalLMOutputWithPast:
        """Adds the load-balancing loss where router logits were asked for."""
        text, aux_loss = self.config.text_config, None
        if outputs.router_logits:
            new_tokens = outputs.last_hidden_state.shape[1]
            mask = attention_mask if attention_mask is not None and attention_mask.ndim == 2 else None
            mask = None if mask is None else mask[:, mask.shape[1] - new_tokens :]
            mask = getattr(outputs, "tokens_in_decoder", mask)
            aux_loss = load_balancing_loss(outputs.router_logits, text.num_experts, text.num_experts_per_tok, mask)
            if loss is not None:
                loss = loss + text.router_aux_loss_coef * aux_loss.to(loss.device)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )


def counts_on_host(cache: Cache) -> bool:
    """Whether asking a cache for its length costs nothing; a static one counts on the device. Never when compiling."""
    return not torch.compiler.is_compiling() and isinstance(cache.get_seq_length(), int)


def keep_positions(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """The hidden states (B, T, H) for which logits are wanted; see [`Qwen3VLForConditionalGeneration.forward`]."""
    if isinstance(logits_to_keep, int):
        return hidden_states[:, -logits_to_keep:] if logits_to_keep else hidden_states
    if logits_to_keep.ndim == 1:
        return hidden_states[:, logits_to_keep]
    if logits_to_keep.dtype == torch.bool:
        return hidden_states[logits_to_keep]
    return hidden_states.take_along_dim(logits_to_keep[..., None], dim=1)


# Checkpoints store the experts transposed, and `transformers` turns them on loading and saving, by model type. It
# leaves out custom classes unless somebody registers the rule: stock's own, registered again, then holds for ours.
register_checkpoint_conversion_mapping(
    Qwen3VLMoeConfig.model_type, get_checkpoint_conversion_mapping(Qwen3VLMoeConfig.model_type), overwrite=True
)
