"""Fewer visual tokens in the decoder than in the prompt (port 3).

Everything outside of the decoder counts the tokens of the prompt: ids, masks, positions, what a cache says it has
seen, hidden states that come back. Inside, and in the layers of the cache, are those that stay: a row's new tokens
move together, to the right where rows keep different numbers. Survivors keep their M-RoPE positions. So `generate()`,
its slicing and its outputs need not know, whatever the cache.

`model.visual_reduction` is a technique that says which stay (`plan_visual_tokens`, and at its `layer` once more
`plan_at_layer`), or `None`.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional as F
from transformers.cache_utils import Cache

from ..optim.tokens.visual_request import LayerRequest, Piece, VisualPlan, VisualRequest
from .masks_qwen3_vl import EntriesFromLayer, make_masks
from .modeling_base import Qwen3VLVisionOutput
from .mrope_qwen3_vl import number_runs
from .reduced_cache import NOTHING, Selections, entries_counted, note_selections, noted_selections


@dataclass
class PlannedVisionOutput(Qwen3VLVisionOutput):
    """Features of which it is settled which stay.

    A row of `pooler_output` has one number more than the decoder is wide: 1 if the token stays, else 0. In this form
    the plan goes wherever `generate()` takes features: repeated for beams, cut into the chunks of a long prompt.
    """


@torch.compiler.disable
def plan_tokens(
    model, encoded: dict, input_ids, inputs_embeds, mm_token_type_ids, grids: dict, attention_mask
) -> dict[str, Qwen3VLVisionOutput]:
    """Asks `model.visual_reduction` which visual tokens stay; `encoded` itself if all do, or if it is settled.

    Args:
        model ([`Qwen3VLModel`]): whose tower made `encoded`.
        encoded (`dict`): the tower's outputs under `"image"` and `"video"`, for all placeholders of the ids.
        input_ids (`torch.Tensor`, *optional*): (B, T); `inputs_embeds` (B, T, hidden) are theirs.
        grids (`dict`): `image_grid_thw` and `video_grid_thw`, as far as known.
        attention_mask (`torch.Tensor`, *optional*): its last T columns belong to the ids.
    """
    if any(isinstance(output, PlannedVisionOutput) for output in encoded.values()):
        return encoded
    length = inputs_embeds.shape[1]
    is_text = real_tokens(attention_mask, inputs_embeds).clone()
    pieces, rows = [], []
    for name, output in encoded.items():
        sizes = [len(features) for features in output.pooler_output]
        of_modality = model._placeholder_rows(name, input_ids, inputs_embeds, mm_token_type_ids, sum(sizes))
        is_text.view(-1)[of_modality] = False
        before = sum(len(x) for x in rows)
        places = of_modality.tolist()
        start = 0
        for size, grid in zip(sizes, _token_grids(model, grids.get(f"{name}_grid_thw"), sizes), strict=True):
            pieces.append(Piece(name, before + start, *grid, row=places[start] // length))
            start += size
        rows.append(of_modality)
    device = inputs_embeds.device
    levels = zip(*(output.deepstack_features or () for output in encoded.values()), strict=True)
    request = VisualRequest(
        features=torch.cat([x.to(device) for output in encoded.values() for x in output.pooler_output]),
        deepstack=[torch.cat([x.to(device) for modality in level for x in modality]) for level in levels],
        pieces=tuple(pieces),
        embeds=inputs_embeds,
        is_text=is_text,
        decoder=model.language_model,
    )
    plan = model.visual_reduction.plan_visual_tokens(request)
    return encoded if plan is None else _with_plan(encoded, plan)


def _token_grids(model, grids: torch.Tensor | None, sizes: list[int]) -> list[tuple[int, int, int]]:
    """(frames, height, width) in visual tokens; without grids a picture is one row of tokens."""
    merge = model.config.vision_config.spatial_merge_size
    if grids is not None:
        found = [(time, height // merge, width // merge) for time, height, width in grids.tolist()]
        if [time * height * width for time, height, width in found] == sizes:
            return found
    return [(1, 1, size) for size in sizes]


def _with_plan(encoded: dict, plan: VisualPlan) -> dict[str, PlannedVisionOutput]:
    flagged = torch.cat((plan.features, plan.keep[:, None].to(plan.features)), dim=1)
    planned, start = {}, 0
    for name, output in encoded.items():
        sizes = [len(features) for features in output.pooler_output]
        own = slice(start, start + sum(sizes))
        planned[name] = PlannedVisionOutput(
            pooler_output=flagged[own].split(sizes),
            deepstack_features=[level[own].split(sizes) for level in plan.deepstack],
        )
        start = own.stop
    return planned


def split_plan(encoded: dict) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
    """Features (tokens, hidden) by modality, and which of all of them stay (N,), `None` for all."""
    features = {name: torch.cat(tuple(output.pooler_output)) for name, output in encoded.items()}
    if not any(isinstance(output, PlannedVisionOutput) for output in encoded.values()):
        return features, None
    keep = torch.cat([rows[:, -1] > 0.5 for rows in features.values()])
    return {name: rows[:, :-1] for name, rows in features.items()}, keep


def real_tokens(attention_mask: torch.Tensor | None, inputs_embeds: torch.Tensor) -> torch.Tensor:
    """Which new tokens are no padding: (B, T) boolean.

    Raises:
        ValueError: for a mask that is not 2-D.
    """
    batch, length = inputs_embeds.shape[:2]
    if attention_mask is None:
        return torch.ones(batch, length, dtype=torch.bool, device=inputs_embeds.device)
    _require_flags(attention_mask)
    return attention_mask[:, attention_mask.shape[1] - length :].to(inputs_embeds.device).bool()


def _require_flags(attention_mask) -> None:
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim != 2:
        shape = tuple(getattr(attention_mask, "shape", ()))
        raise ValueError(
            f"visual tokens are left out, so attention_mask must be flags (batch, tokens seen + new), got {shape}; "
            "pass those, or revert the technique."
        )


class Shortening:
    """Moves the tokens of each row that stay together, to the right where rows keep different numbers.

    Args:
        stays (`torch.Tensor`): (B, T) boolean.
    """

    def __init__(self, stays: torch.Tensor):
        self.tokens = stays.shape[1]
        rank = stays.long().cumsum(1)
        counts = rank[:, -1:]
        self.length = int(counts.max())
        first = self.length - counts
        place = torch.where(stays, rank - 1 + first, self.length)  # those that go land behind the end
        index = torch.full((len(stays), self.length + 1), -1, device=stays.device)
        numbers = torch.arange(self.tokens, device=stays.device).expand_as(place)
        self.index = index.scatter(1, place, numbers)[:, :-1]  # (B, entries), -1 for gaps
        # The latest entry at or before each token, counted from 1; 0 for none.
        self._shown = torch.where(rank > 0, rank + first, 0)

    def take(self, x: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """What belongs to the tokens (B, T, ...) for those that stay; gaps get that of the first."""
        index = self.index.clamp(min=0)
        if dim == -1:  # (axes, B, T)
            return x.gather(-1, index.expand(len(x), -1, -1))
        return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1])) if x.ndim == 3 else x.gather(1, index)

    def flags(self, x: torch.Tensor) -> torch.Tensor:
        """Flags (B, T) of the tokens that stay, false for gaps."""
        return x.gather(1, self.index.clamp(min=0)) & (self.index >= 0)

    def widen(self, x: torch.Tensor) -> torch.Tensor:
        """Back to (B, T, hidden): in the place of a token that went is the latest before it, or zeros."""
        return F.pad(x, (0, 0, 1, 0)).gather(1, self._shown[..., None].expand(-1, -1, x.shape[-1]))


def shorten(model, cache: Cache | None, stays: torch.Tensor | None, inputs: dict) -> "ShortenedForward | None":
    """How to run the decoder where visual tokens were, are or will be left out; `None` where none are.

    Args:
        stays (`torch.Tensor`, *optional*): (B, T) boolean, which of the new tokens stay; all by default.
        inputs (`dict`): what the decoder would get.
    """
    noted = noted_selections(cache)
    planner = model.visual_reduction
    again = planner is not None and planner.layer is not None and inputs["visual_pos_masks"] is not None
    if stays is None and noted is None and not again:
        return None
    return ShortenedForward(planner if again else None, cache, stays, inputs)


class ShortenedForward:
    """One run of the decoder over fewer tokens than came."""

    @torch.compiler.disable
    def __init__(self, planner, cache: Cache | None, stays: torch.Tensor | None, inputs: dict):
        self.cache, self.inputs = cache, dict(inputs)
        embeds, mask = inputs["inputs_embeds"], inputs["attention_mask"]
        if mask is not None:
            _require_flags(mask)
        self.tokens = embeds.shape[1]
        self.noted = noted_selections(cache)
        self.seen = 0 if cache is None else int(cache.get_seq_length())
        if inputs["position_ids"] is None:  # plain ones, which the decoder would count by its entries
            plain = torch.arange(self.seen, self.seen + self.tokens, device=embeds.device)
            self.inputs["position_ids"] = plain.expand(3, len(embeds), -1)
        self.first = Shortening(stays & real_tokens(mask, embeds)) if stays is not None else None
        self.selection = self.noted.first if self.noted is not None else NOTHING
        if self.first is not None:
            self.selection = self.selection.extended(self.seen, self.first.index, self.tokens)
            self._take_first()
        with entries_counted(cache):
            held = 0 if cache is None else int(cache.get_seq_length())
        entries = held + self.inputs["inputs_embeds"].shape[1]
        if not self._is_packed:
            self.inputs["attention_mask"] = self.selection.by_entry(mask, entries)
        self.later = None
        if planner is not None and self._is_packed:
            raise ValueError(
                "packed rows cannot leave visual tokens out between layers; give each sequence a row of its own, or "
                "leave tokens out in front of the decoder alone (layer=None)."
            )
        if planner is not None or (self.noted is not None and self.noted.later is not None):
            self.later = LaterShortening(planner, self.noted, cache, self.inputs, held)

    def _take_first(self) -> None:
        inputs, first = self.inputs, self.first
        visual = inputs["visual_pos_masks"]
        kept = first.index.new_zeros(first.index.shape[0], self.tokens + 1, dtype=torch.bool)
        kept = kept.scatter(1, torch.where(first.index < 0, self.tokens, first.index), True)[:, :-1]
        inputs["deepstack_visual_embeds"] = [level[kept[visual]] for level in inputs["deepstack_visual_embeds"] or ()]
        inputs["visual_pos_masks"] = first.flags(visual)
        inputs["inputs_embeds"] = first.take(inputs["inputs_embeds"])
        inputs["position_ids"] = self._take_positions(inputs["position_ids"])

    def _take_positions(self, positions: torch.Tensor) -> torch.Tensor:
        """M-RoPE positions of the survivors; plain ones in front only where they tell packed rows apart."""
        plain = positions if positions.ndim == 2 else positions[0] if len(positions) == 4 else None
        axes = positions.expand(3, -1, -1) if positions.ndim == 2 else positions[-3:]
        batch = self.inputs["visual_pos_masks"].shape[0]
        axes = self.first.take(axes.expand(3, batch, -1), dim=-1)
        if plain is None or self.inputs["attention_mask"] is not None or self.cache is not None:
            return axes
        plain = plain.expand(batch, -1)
        begins = plain.diff(dim=1, prepend=plain[:, :1] - 1) != 1
        if not bool(begins.any()):
            return axes
        # Gaps are a sequence of their own in front; in each sequence positions count on without the tokens that went.
        sequence = torch.where(self.first.index < 0, -1, self.first.take(begins.long().cumsum(1)))
        number = torch.arange(sequence.shape[1], device=sequence.device).expand_as(sequence)
        fresh = sequence.diff(dim=1, prepend=sequence[:, :1] - 1) != 0
        plain = number - torch.where(fresh, number, 0).cummax(1).values
        return torch.cat((plain[None], axes))

    @property
    def _is_packed(self) -> bool:
        return self.first is not None and self.inputs["position_ids"].shape[0] == 4

    @property
    def real(self) -> torch.Tensor | None:
        """Which of the tokens in the decoder are no padding or gap: (B, entries of this run), `None` for all."""
        mask, new = self.inputs["attention_mask"], self.inputs["inputs_embeds"].shape[1]
        return None if mask is None else mask[:, mask.shape[1] - new :]

    def run(self, decoder, **kwargs):
        """The decoder's output, with hidden states for all tokens, and the cache told what it holds."""
        if self._is_packed:
            kwargs["use_cache"] = False  # with a cache, packed rows would see each other
        if self.later is not None:
            kwargs["later_shortening"] = self.later
        if self.inputs["inputs_embeds"].shape[1]:
            with entries_counted(self.cache):
                outputs = decoder(past_key_values=self.cache, **self.inputs, **kwargs)
        else:  # a chunk of a prompt inside a picture
            outputs = decoder.output_class(last_hidden_state=self.inputs["inputs_embeds"], past_key_values=self.cache)
        hidden = outputs.last_hidden_state
        if self.later is not None and self.later.shortening is not None:
            hidden = self.later.shortening.widen(hidden)
        if self.first is not None:
            hidden = self.first.widen(hidden)
        outputs.last_hidden_state = hidden
        outputs.tokens_in_decoder = self.real
        self._note(outputs.past_key_values)
        return outputs

    @torch.compiler.disable
    def _note(self, cache: Cache | None) -> None:
        if cache is None or (self.first is None and self.later is None):
            return
        if self.later is None:
            note_selections(cache, Selections(self.selection))
        else:
            note_selections(cache, Selections(self.selection, self.later.layer, self.later.selection))


class LaterShortening:
    """Leaves tokens out once more, between two decoder layers.

    Args:
        planner: whose `plan_at_layer` says which stay, or `None` if nothing new is visual.
        noted ([`Selections`], *optional*): what the cache has been told.
        inputs (`dict`): what the decoder gets.
        held (`int`): entries in the first layers of the cache.
    """

    def __init__(self, planner, noted: Selections | None, cache: Cache | None, inputs: dict, held: int):
        self.planner, self.cache, self.inputs, self.held = planner, cache, inputs, held
        self.layer = noted.layer if noted is not None and noted.later is not None else planner.layer
        if planner is not None and planner.layer != self.layer:
            raise ValueError(
                f"the cache holds fewer visual tokens from layer {self.layer} on, but the technique is set to layer "
                f"{planner.layer}; go on with the settings with which the cache was begun."
            )
        if hasattr(cache, "prepare_forward") or getattr(cache, "pairs", ()):
            raise ValueError(
                f"visual tokens cannot be left out between layers with {type(cache).__name__}, whose layers must see "
                "the same tokens; use another cache, or leave tokens out in front of the decoder alone (layer=None)."
            )
        self.selection = noted.later if noted is not None and noted.later is not None else NOTHING
        self.shortening = None

    def enter(self, config, layer, layers: int, hidden_states, position_embeddings, runs):
        """Hidden states, cosine and sine, masks and pictures for the `layers` from here on."""
        if self.planner is not None:
            new = hidden_states.shape[1]
            self._plan(layer, hidden_states, position_embeddings)
            self.selection = self.selection.extended(self.held, self.shortening.index, new)
            hidden_states = self.shortening.take(hidden_states)
            position_embeddings = tuple(self.shortening.take(x) for x in position_embeddings)
        cache = None if self.cache is None else EntriesFromLayer(self.cache, self.layer)
        entries = hidden_states.shape[1] + self.selection_entries
        mask = self.selection.by_entry(self.inputs["attention_mask"], entries)
        runs = None if runs is None else self.selection.by_entry(runs, entries, gap=0)
        masks, runs = make_masks(config, hidden_states, mask, cache, None, layers, runs)
        return hidden_states, position_embeddings, masks, runs

    @property
    def selection_entries(self) -> int:
        """Entries that the later layers hold before this forward."""
        if self.cache is None or self.layer >= len(self.cache.layers):
            return 0
        return int(self.cache.layers[self.layer].get_seq_length())

    @torch.compiler.disable
    def _plan(self, layer, hidden_states, position_embeddings) -> None:
        visual = self.inputs["visual_pos_masks"]
        mask, new = self.inputs["attention_mask"], hidden_states.shape[1]
        valid = torch.ones_like(visual) if mask is None else mask[:, mask.shape[1] - new :].bool()
        pieces = number_runs(visual, torch.zeros_like(visual[:, :0], dtype=torch.int32))
        request = LayerRequest(hidden_states, pieces, valid, layer, position_embeddings)
        self.shortening = Shortening((self.planner.plan_at_layer(request) | ~visual) & valid)
