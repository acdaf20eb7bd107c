"""What a query may see, without a dense mask: the form in which masks reach the attention functions of this room.

Every implementation registers [`layout_mask`] as its mask function, so that a padded batch of 32,768 tokens carries
32,768 flags a row and not a square of them.
"""

from dataclasses import dataclass, replace

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function, prepare_padding_mask, sdpa_mask


IMPLEMENTATION_PREFIX = "qwen3_vl_"
ROWS_TO_CHECK = 64


@dataclass(frozen=True)
class AttentionLayout:
    """Causal attention of new tokens to all tokens, with padding or packed rows.

    Args:
        query_offset (`int`): keys that stand before the first query; query i sees keys up to `query_offset + i`.
        valid (`torch.Tensor`, *optional*): (B, keys) boolean, true for real tokens; `None` where all are.
        segments (`torch.Tensor`, *optional*): (B, keys) int32, the packed sequence of each token, for as many queries
            as keys; a query sees its own sequence alone.
    """

    query_offset: int
    valid: torch.Tensor | None = None
    segments: torch.Tensor | None = None

    @property
    def plainly_causal(self) -> bool:
        return self.valid is None and self.segments is None

    def to(self, device) -> "AttentionLayout":
        """A copy on `device`, for hooks that move a layer's inputs."""
        moved = {name: None if x is None else x.to(device) for name, x in vars(self).items() if name != "query_offset"}
        return replace(self, **moved)

    def dense(self, queries: int, keys: int, device=None, first_query: int = 0) -> torch.Tensor:
        """The mask (B or 1, 1, queries, keys) of `queries` from `first_query` on, true where a query sees a key."""
        rows = torch.arange(first_query, first_query + queries, device=device) + self.query_offset
        mask = (torch.arange(keys, device=device) <= rows[:, None])[None, None]
        if self.valid is not None:
            mask = mask & self.valid[:, None, None, :]
        if self.segments is not None:
            own = self.segments[:, first_query : first_query + queries]
            mask = mask & (own[:, None, :, None] == self.segments[:, None, None, :])
        return mask


def layout_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function=causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    device=None,
    **kwargs,
) -> AttentionLayout | torch.Tensor:
    """The mask function of this room, called by `transformers`' `create_causal_mask`.

    A pattern other than causal, padded or packed comes back as a dense boolean mask (B, 1, queries, keys), which an
    implementation takes or refuses.
    """
    # Offsets and padding may not be read in a graph.
    if not torch.compiler.is_compiling():
        offset, valid = int(q_offset) - kv_offset, prepare_padding_mask(attention_mask, kv_length, kv_offset)
        if valid is not None:
            valid = valid[:, kv_offset : kv_offset + kv_length].bool()
            # Behind the last query causality hides everything, the unused places of a preallocated cache among it.
            valid = None if bool(valid[:, : offset + q_length].all()) else valid
        if mask_function is causal_mask_function:
            return AttentionLayout(offset, valid)
        if valid is None and offset == 0 and q_length == kv_length and not kwargs.get("use_vmap"):
            segments = _packed_segments(mask_function, batch_size, q_length, device)
            if segments is not None:
                return AttentionLayout(0, segments=segments)
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        device=device,
        **{**kwargs, "allow_is_causal_skip": False},
    )


def _packed_segments(mask_function, batch_size: int, length: int, device) -> torch.Tensor | None:
    """Reads packed sequences off a mask function; `None` if it is not causal attention inside contiguous sequences.

    A sequence begins where a token does not see the one before it.
    """
    row = torch.arange(batch_size, device=device)[:, None]
    head = torch.zeros_like(row)
    token = torch.arange(length, device=device)[None]
    begins = ~mask_function(row, head, token, (token - 1).clamp(min=0)).expand(batch_size, length)
    begins[:, 0] = False
    segments = begins.cumsum(1)
    first = torch.where(begins, token, 0).cummax(1).values
    sees_first = mask_function(row, head, token, first)
    sees_before = mask_function(row, head, token, (first - 1).clamp(min=0)) & (first > 0)
    sees_next = mask_function(row, head, token, (token + 1).clamp(max=length - 1)) & (token < length - 1)
    if not bool((sees_first & ~sees_before & ~sees_next).all()):
        return None
    # Holes between those show on whole rows of the mask: on all of a short one, on some of a long one.
    rows = torch.linspace(0, length - 1, min(length, ROWS_TO_CHECK), device=device).long()[None, :, None]
    expected = (segments[:, rows.flatten(), None] == segments[:, None]) & (token <= rows)
    seen = mask_function(row[..., None], head[..., None], rows, token[:, None])
    if not torch.equal(seen.expand_as(expected), expected):
        return None
    return segments.int()


_IMPLEMENTATIONS: dict = {}


def register_attention(name: str, attention_function) -> None:
    """Makes an implementation selectable by name. Both tables, since an unknown mask name silently means no mask."""
    _IMPLEMENTATIONS[name] = attention_function
    AttentionInterface.register(name, attention_function)
    AttentionMaskInterface.register(name, layout_mask)


def register_known_attention() -> None:
    """Registers again what [`withdraw_attention`] took out."""
    for name, attention_function in _IMPLEMENTATIONS.items():
        register_attention(name, attention_function)


def withdraw_attention() -> None:
    """Takes our names out of the tables of `transformers`; a model that still uses one has to be switched first."""
    for name in _IMPLEMENTATIONS:
        for table in (AttentionInterface, AttentionMaskInterface):
            table._global_mapping.pop(name, None)


def check_layout(
    attention_mask, query: torch.Tensor, key: torch.Tensor, is_causal: bool, keys: int | None = None
) -> AttentionLayout | torch.Tensor | None:
    """The layout of a call, checked against its tensors; `None` means that every query sees every key.

    Args:
        attention_mask: what [`layout_mask`] returned, or a dense boolean or additive mask, which is handed back.
        query, key (`torch.Tensor`): (B, heads, queries, D) and (B, KV heads, keys, D).
        keys (`int`, *optional*): how many keys there are where a cache layer holds them and `key` has the new ones.
    Raises:
        ValueError: for a mask that does not fit the tensors.
    """
    queries, keys = query.shape[2], key.shape[2] if keys is None else keys
    if attention_mask is None:
        return AttentionLayout(keys - queries) if is_causal else None
    if isinstance(attention_mask, torch.Tensor):
        if attention_mask.ndim == 2 and attention_mask.shape == (key.shape[0], keys):
            flags = attention_mask.bool()
            return AttentionLayout(keys - queries, flags) if is_causal else flags[:, None, None]
        shape, sizes = attention_mask.shape, (*query.shape[:2], queries)
        broadcasts = all(given in (1, size) for given, size in zip(shape, sizes, strict=False))
        if len(shape) != 4 or not broadcasts or shape[-1] < keys:
            raise ValueError(
                f"attention_mask of shape {tuple(shape)} does not fit {queries} queries and {keys} keys "
                f"of {query.shape[0]} rows; pass (batch, keys) padding flags or a (batch, 1, queries, keys) mask."
            )
        return attention_mask
    if attention_mask.query_offset + queries > keys:
        raise ValueError(
            f"a layout of {queries} queries from key {attention_mask.query_offset} on does not fit {keys} keys; make "
            "the mask for the cache that is used."
        )
    for name in ("valid", "segments"):
        flags = getattr(attention_mask, name)
        if flags is not None and tuple(flags.shape) != (key.shape[0], keys):
            raise ValueError(
                f"{name} of shape {tuple(flags.shape)} does not fit {keys} keys of {key.shape[0]} rows; pass the "
                "attention_mask of the whole conversation, (batch, tokens seen + new)."
            )
    return attention_mask
