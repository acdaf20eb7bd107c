"""Labels of the assistant's words alone, by the mask of the chat template or by its markers."""

from collections.abc import Mapping

import torch

from .packing_samples import IGNORED


OPENING, CLOSING = "<|im_start|>assistant", "<|im_end|>"


def assistant_labels(sample: Mapping, tokenizer=None) -> torch.Tensor:
    """Next-token targets on what the assistant says, its closing `<|im_end|>` with it, and -100 elsewhere.

    The mask of `apply_chat_template(..., return_assistant_tokens_mask=True)` is used where there is one that marks
    anything. The published template marks nothing, so else the turns are found by their markers in the ids, where
    pictures have been expanded already.

    Args:
        sample: `input_ids` of shape (tokens,) or (rows, tokens), and `assistant_masks` of the same shape if known.
        tokenizer (*optional*): a tokenizer or processor, needed where there is no mask.
    Returns:
        labels (`torch.Tensor`) int64, of the shape of `input_ids`.
    Raises:
        ValueError: without a mask and without a tokenizer, or for a tokenizer without the markers.
    """
    ids = torch.as_tensor(sample["input_ids"]).long()
    mask = sample.get("assistant_masks")
    mask = None if mask is None else torch.as_tensor(mask).bool().view(ids.shape)
    if mask is None or not bool(mask.any()):
        if tokenizer is None:
            raise ValueError("the sample has no assistant_masks that mark a token; pass the tokenizer as well.")
        opening, closing = _markers(getattr(tokenizer, "tokenizer", tokenizer))
        rows = [_said_by_assistant(row, opening, closing) for row in ids.view(-1, ids.shape[-1]).tolist()]
        mask = torch.tensor(rows, dtype=torch.bool).view(ids.shape)
    return torch.where(mask, ids, IGNORED)


def _markers(tokenizer) -> tuple[list[int], int]:
    opening = tokenizer.encode(OPENING, add_special_tokens=False)
    closing = tokenizer.encode(CLOSING, add_special_tokens=False)
    if len(closing) != 1:
        raise ValueError(f"{CLOSING} is {len(closing)} tokens and not one; pass the tokenizer of a Qwen3-VL model.")
    return opening, closing[0]


def _said_by_assistant(ids: list[int], opening: list[int], closing: int) -> list[bool]:
    said, at, size = [False] * len(ids), 0, len(opening)
    while at < len(ids):
        if ids[at : at + size] != opening:
            at += 1
            continue
        begin = at + size + 1  # behind the newline
        at = ids.index(closing, begin) + 1 if closing in ids[begin:] else len(ids)
        said[begin:at] = [True] * (at - begin)
    return said
