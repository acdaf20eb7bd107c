"""A KV cache that lets go of entries by a policy: give it as `past_key_values=`, or name it in a profile."""

from collections.abc import Callable
from dataclasses import fields
from difflib import get_close_matches
from functools import partial
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache

from ..technique_optim import refuse_unknown
from .cache_common import CacheTechnique, HistoryCache, count_full_attention, whole_history, with_notes
from .cache_paged import PagedLayer
from .evicting_layer import EvictingLayer
from .eviction_budget import EvictionSettings, TokenNotes
from .eviction_policies import POLICIES
from .kv_quantization import QuantizedSettings
from .memory_pool import MemoryPool, PagePools
from .quantized_layer import QuantizedLayer


SETTINGS = tuple(field.name for field in fields(EvictionSettings))
STORES = ("paged", "quantized")


class EvictingKVCache(HistoryCache):
    """A cache of [`EvictingLayer`]s that keeps a part of what it has seen: give it as `past_key_values=`.

    Lossy. What is evicted is invisible from then on; the tokens of the forward that brought it have still attended to
    it. Each KV head of each layer chooses for itself. `get_seq_length` counts the tokens seen, so positions go on as
    if nothing was gone; the layers hold fewer, and the models of this package make masks for those. Rows of a padded
    batch keep what each would keep alone.

    Policies, by name:
        `"modality"`: pictures and text have budgets of their own; pictures go before text. In a picture, what the
            latest text attends to stays, and the rest is merged into it (see [`merge_evicted`]). For questions about
            long documents and videos; reading of text suffers first.
        `"streaming"`: the first tokens and the latest ones (StreamingLLM, arXiv 2309.17453). For endless text; costs
            nothing to choose, and forgets the middle. Differs from the paper: positions stay what they were.
        `"h2o"`: most attention from all queries so far, and the latest tokens (H2O, arXiv 2306.14048). Prefill counts
            attention beside computing it, which is as much work again.
        `"snapkv"`: most attention from the latest queries, pooled (SnapKV, arXiv 2404.14469). When decoding exceeds
            the budget, the latest queries choose again, which the paper leaves open.
        `"pyramid"`: the same with more in lower layers, less in higher ones (PyramidKV, arXiv 2406.02069).
        `"random"`: by lot, with the budgets of `"modality"`: the baseline.

    Not croppable, so not for assisted decoding; not compileable. `copy.deepcopy` works, pickling is refused.
    Gradients do not flow through the history: `backward` raises.

    Args:
        config (`PreTrainedConfig`): of the model.
        policy (`str`): how entries are chosen.
        store (`str` or `Callable`): what holds the entries that stay: `"paged"`, `"quantized"`, or a function that
            returns an empty layer with `update`, `dense`, `reader`, `crop` and `held_bytes`.
        store_options (`dict`, *optional*): of `"quantized"`, fields of [`QuantizedSettings`] such as `{"bits": 4}`.
        page_tokens (`int`): tokens a page, default 64, of `"paged"`.
        pool (`MemoryPool` or `PagePools`, *optional*): shared with other requests; for `"quantized"` `PagePools` with
            pages of its `group_size`.
        settings: the fields of [`EvictionSettings`]; by default a quarter of each picture stays, and all text.
    Raises:
        ValueError: for an unknown policy, store or setting, one out of range, or a model with layers that are not full
            attention.
    """

    # The model notes which tokens are of which picture, and tells it by `prepare_forward`.
    wants_visual_runs = True

    def __init__(
        self,
        config,
        policy: str = "modality",
        *,
        store: str | Callable = "paged",
        store_options: dict | None = None,
        page_tokens: int = 64,
        pool: MemoryPool | PagePools | None = None,
        **settings: Any,
    ):
        check_policy(policy)
        refuse_unknown(type(self).__name__, settings, SETTINGS)
        self.policy, self.settings, self.notes = policy, EvictionSettings(**settings), TokenNotes()
        count = count_full_attention(config, type(self).__name__)
        shares = self.settings.layer_shares
        if shares and len(shares) != count:
            raise ValueError(f"layer_shares has {len(shares)} shares for {count} layers; give one for each.")
        make_store = store_maker(store, store_options or {}, page_tokens, pool)
        shared = (POLICIES[policy], self.settings, make_store, self.notes)
        super().__init__(layers=[EvictingLayer(*shared, layer, count) for layer in range(count)])

    @property
    def evicted(self) -> bool:
        """Whether anything was ever evicted."""
        return any(layer.evicted for layer in self.layers)

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Entries of a layer that stand before its next token, as masks count them."""
        return self.layers[layer_idx].entries

    @torch.compiler.disable
    def prepare_forward(
        self,
        rows: int,
        new_tokens: int,
        attention_mask: torch.Tensor | None = None,
        visual_runs: torch.Tensor | None = None,
    ) -> None:
        """Called by a model before a forward: says what its tokens are, and evicts what decoding brought beyond the
        limits.

        Args:
            rows, new_tokens (`int`): shape of the new tokens.
            attention_mask (`torch.Tensor`, *optional*): (B, tokens seen + new), 0 for padding; none by default.
            visual_runs (`torch.Tensor`, *optional*): (B, tokens seen + new), the picture or frame of each, 0 for text.
        Raises:
            ValueError: if the mask does not fit, or changed for tokens that were judged by it; nothing changes then.
            MemoryError: if there is no room for what stays.
        """
        seen, length = self.get_seq_length(), self.get_seq_length() + new_tokens
        held = self.layers[0].rows
        if held and held != rows:
            raise ValueError(f"the cache holds {held} rows but the batch has {rows}; use a cache made for this batch.")
        valid = None
        if attention_mask is not None:
            if attention_mask.ndim != 2 or attention_mask.shape[0] != rows or attention_mask.shape[1] < length:
                raise ValueError(
                    f"an attention_mask of shape {tuple(attention_mask.shape)} does not fit an evicting cache; pass "
                    f"flags of the whole conversation, ({rows}, {length})."
                )
            valid = attention_mask[:, :length].bool()
            valid = None if bool(valid.all()) else valid
        if self.evicted and not same_flags(self.notes.valid, valid, seen):
            raise ValueError(
                f"the attention_mask differs from earlier ones in the {seen} tokens that the cache has seen and "
                "evicted from; pass the mask of the whole conversation, unchanged."
            )
        self.notes.describe(length, valid, visual_runs)
        for layer in self.layers:
            layer.make_room()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See [`EvictingLayer.update`]. If a layer fails, those before it go back to what they were.

        Raises:
            ValueError: if the model did not call `prepare_forward`, and so would mask and evict wrongly.
        """
        layer, new = self.layers[layer_idx], key_states.shape[2]
        if self.notes.length != layer.get_seq_length() + new:
            raise ValueError(
                f"{new} tokens came to an evicting cache that was not told what they are; use the models of this "
                "package, or call prepare_forward before each forward."
            )
        try:
            states = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        except BaseException:
            for earlier in self.layers[:layer_idx]:
                earlier.undo()
            raise
        if layer_idx == len(self.layers) - 1:
            for done in self.layers:
                done.commit()
        return states

    def reset(self) -> None:
        super().reset()
        self.notes.describe(0, None, None)

    # A class that stands in front moves M-RoPE positions with the rows, so that neither of these calls the other.
    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        super().reorder_cache(beam_idx.cpu())
        self.notes.move_rows(lambda rows: rows[beam_idx.to(rows.device)])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        indices = torch.as_tensor(indices).cpu()
        super().batch_select_indices(indices)
        self.notes.move_rows(lambda rows: rows[indices.to(rows.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.notes.move_rows(lambda rows: rows.repeat_interleave(repeats, dim=0))

    @classmethod
    def from_dynamic(cls, cache: Cache, config, **options) -> "EvictingKVCache":
        """A cache with the content of one that holds all tokens of full attention, which stays as it is.

        Entries go at the next forward, by its attention. Which tokens are visual is known only where the model noted
        it on `cache`, as it does when an attention function asks; else all counts as text.

        Args:
            config, options: the arguments of the class.
        Raises:
            ValueError: if a layer of `cache` does not hold every token that it has seen.
        """
        evicting = cls(config, **options)
        for index in range(len(cache.layers)):
            evicting.layers[index].adopt(*whole_history(cache, index))
        evicting.notes.describe(cache.get_seq_length(), None, None)
        return with_notes(evicting, cache)

    def to_dynamic(self) -> DynamicCache:
        """A `DynamicCache` with the same content, as long as nothing was evicted; this one stays as it is.

        Raises:
            ValueError: after the first eviction, since a plain cache takes what it holds for all there was.
        """
        if self.evicted:
            raise ValueError(
                f"the cache has evicted some of the {self.get_seq_length()} tokens it has seen, and a DynamicCache "
                "cannot say which are gone; convert before anything is evicted, or run the conversation again."
            )
        return super().to_dynamic()


class EvictingCache(CacheTechnique):
    """Every request of `generate()` gets an [`EvictingKVCache`]. Lossy.

    Args:
        config: taken and not needed, as all techniques may be given the model's.
        policy, store, store_options, page_tokens, settings: as of [`EvictingKVCache`].
    Raises:
        ValueError: for an unknown policy, store or setting, or one out of range.
    """

    name = "evicting_cache"
    exact = False
    cache_class = EvictingKVCache

    def __init__(self, config=None, policy: str = "modality", **settings: Any):
        refuse_unknown(self.name, settings, ("store", "store_options", "page_tokens", *SETTINGS))
        check_policy(policy)
        EvictionSettings(**{name: value for name, value in settings.items() if name in SETTINGS})
        store_maker(settings.get("store", "paged"), settings.get("store_options", {}), settings.get("page_tokens", 64))
        super().__init__(policy=policy, **settings)


def check_policy(policy: str) -> None:
    """Raises a `ValueError` unless there is such a policy."""
    if policy not in POLICIES:
        nearest = get_close_matches(str(policy), POLICIES, n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"there are {', '.join(POLICIES)}."
        raise ValueError(f"policy {policy!r} does not exist; {hint}")


def store_maker(
    store: str | Callable, options: dict, page_tokens: int, pool: MemoryPool | PagePools | None = None
) -> Callable:
    """What makes an empty layer that holds all it is given.

    Raises:
        ValueError: for an unknown store or option.
    """
    if callable(store):
        return partial(store, **options)
    if store == "paged":
        refuse_unknown("the paged store", options, ())
        return partial(PagedLayer, PagePools(page_tokens) if pool is None else pool)
    if store == "quantized":
        refuse_unknown("the quantized store", options, (field.name for field in fields(QuantizedSettings)))
        quantized = QuantizedSettings(**options)
        return partial(QuantizedLayer, quantized, PagePools(quantized.group_size) if pool is None else pool)
    raise ValueError(f"store must be one of {', '.join(STORES)} or a function that makes a layer, got {store!r}.")


def same_flags(first: torch.Tensor | None, second: torch.Tensor | None, length: int) -> bool:
    """Whether flags (B, tokens) agree in the first `length` tokens; `None` stands for true everywhere."""
    first, second = (None if flags is None else flags[:, :length] for flags in (first, second))
    if first is None or second is None:
        given = first if second is None else second
        return given is None or bool(given.all())
    return torch.equal(first.to(second.device), second)
