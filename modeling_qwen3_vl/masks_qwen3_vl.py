"""Masks of the decoder's layers: one for all with ordinary caches, one for each layout where layers hold a selection.

Stock masks take a cache for contiguous: entry i is token i. A layer that has let go of entries holds fewer than it has
seen, others in each layer, and says by `by_entry` which of them are padding or gaps.
"""

import torch
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask


def make_masks(
    config,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    past_key_values: Cache | None,
    position_ids: torch.Tensor | None,
    layers: int,
    visual_runs: torch.Tensor | None = None,
) -> tuple[list, list]:
    """Masks and pictures by layer, for what each attends to in this forward.

    Args:
        inputs_embeds (`torch.Tensor`): (B, T, hidden size) of the new tokens.
        attention_mask (`torch.Tensor`, *optional*): (B, tokens seen + T), or a prepared 4-D mask.
        position_ids (`torch.Tensor`, *optional*): (B, T) plain positions, from which packed rows are told apart.
        layers (`int`): how many there are.
        visual_runs (`torch.Tensor`, *optional*): (B, tokens seen + T), the picture of each token.
    Returns:
        for every layer a mask in the form that the attention implementation takes, and `visual_runs` as that layer
        holds the tokens.
    Raises:
        ValueError: for a cache that evicts, if rows are packed or the mask is not 2-D.
    """
    shared = {"config": config, "inputs_embeds": inputs_embeds}
    if not hasattr(past_key_values, "prepare_forward"):
        mask = create_causal_mask(
            **shared, attention_mask=attention_mask, past_key_values=past_key_values, position_ids=position_ids
        )
        return [mask] * layers, [visual_runs] * layers
    return _masks_by_layout(shared, attention_mask, past_key_values, position_ids, visual_runs)


@torch.compiler.disable
def _masks_by_layout(shared: dict, attention_mask, cache: Cache, position_ids, visual_runs) -> tuple[list, list]:
    rows, new_tokens = shared["inputs_embeds"].shape[:2]
    if attention_mask is None and position_ids is not None and not bool((position_ids.diff() > 0).all()):
        raise ValueError(
            f"positions start again inside a row, so rows are packed, which {type(cache).__name__} does not take; "
            "give each sequence a row of its own, or no cache."
        )
    cache.prepare_forward(rows, new_tokens, attention_mask, visual_runs)
    made, masks = {}, []
    for layer in cache.layers:
        if layer.layout not in made:
            made[layer.layout] = create_causal_mask(
                **shared,
                attention_mask=layer.by_entry(cache.notes.valid, new_tokens),
                past_key_values=EntriesOfLayer(layer.entries),
            )
        masks.append(made[layer.layout])
    if visual_runs is None:
        return masks, [None] * len(masks)
    return masks, [layer.by_entry(visual_runs, new_tokens, gap=0) for layer in cache.layers]


class EntriesFromLayer:
    """Stands for a cache while a mask is made for the layers from `first_layer` on, which hold fewer entries."""

    is_compileable = False

    def __init__(self, cache: Cache, first_layer: int):
        # A cache that makes its layers on the way has none yet in the first forward.
        self.layer = cache.layers[first_layer] if first_layer < len(cache.layers) else None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0 if self.layer is None else int(self.layer.get_seq_length())

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.get_seq_length()

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return (query_length, 0) if self.layer is None else self.layer.get_mask_sizes(query_length)


class EntriesOfLayer:
    """Stands for the cache while a mask is made: `entries` that all come before the new tokens."""

    is_compileable = False

    def __init__(self, entries: int):
        self.entries = entries

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.entries

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.entries

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.entries + query_length, 0
