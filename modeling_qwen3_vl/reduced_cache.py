"""Caches that hold fewer entries than the conversation has tokens, since visual tokens were left out before them.

To `generate()` such a cache counts tokens, to the decoder entries. Any cache class can do it: what was left out is
noted on the cache object, and a class in front of its own translates.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from transformers.cache_utils import Cache

from ..optim.cache.cache_front import CacheFront, put_in_front


_SELECTIONS = "_qwen3_vl_selections"


@dataclass(frozen=True)
class Selection:
    """Which tokens of a sequence have entries in a shorter one. Behind those of which it tells, every token has one.

    Args:
        kept (`torch.Tensor`): (R, entries) int64, the token of each entry, -1 for gaps; R is 1 if rows are equal.
        length (`int`): tokens of which `kept` tells.
    """

    kept: torch.Tensor
    length: int

    @property
    def entries(self) -> int:
        return self.kept.shape[1]

    @property
    def has_gaps(self) -> bool:
        return bool((self.kept < 0).any())

    def tokens(self, entries):
        """How many tokens so many entries stand for; a number on the device stays there."""
        if isinstance(entries, int) and entries == 0:
            return 0
        return entries - self.entries + self.length

    def by_entry(self, by_token: torch.Tensor | None, entries: int, gap=False) -> torch.Tensor | None:
        """What belongs to each token (B, tokens) for each of `entries` (B, entries); `None` is true everywhere."""
        if by_token is None:
            if not self.has_gaps:
                return None
            by_token = torch.ones(len(self.kept), self.tokens(entries), dtype=torch.bool, device=self.kept.device)
        kept = self.kept.to(by_token.device).expand(len(by_token), -1)[:, :entries]
        own = by_token.gather(1, kept.clamp(min=0)).masked_fill(kept < 0, gap)
        return torch.cat((own, by_token[:, self.length : self.length + entries - kept.shape[1]]), dim=1)

    def extended(self, seen: int, index: torch.Tensor, new_tokens: int) -> "Selection":
        """With the tokens up to `seen`, and of `new_tokens` behind them those that `index` (B, entries) names."""
        rows = max(len(self.kept), len(index))
        between = torch.arange(self.length, seen, device=index.device).expand(rows, -1)
        new = torch.where(index < 0, -1, index + seen)
        kept = torch.cat((self.kept.to(index.device).expand(rows, -1), between, new.expand(rows, -1)), dim=1)
        if bool((kept == kept[:1]).all()):
            kept = kept[:1]  # one row stands for any number of equal ones
        return Selection(kept, seen + new_tokens)

    def cropped(self, tokens: int) -> "Selection":
        """With the first `tokens` alone.

        Raises:
            ValueError: if rows have different numbers of entries behind those.
        """
        if tokens >= self.length:
            return self
        behind = (self.kept >= tokens).sum(1)
        if not bool((behind == behind[0]).all()):
            raise ValueError(
                f"a cache of rows that keep different visual tokens cannot go back to {tokens} tokens, which is among "
                f"them; go back to {self.length} at least, or reset it."
            )
        return Selection(self.kept[:, : self.entries - int(behind[0])], tokens)

    def moved(self, move: Callable) -> "Selection":
        return self if len(self.kept) == 1 else replace(self, kept=move(self.kept))


@dataclass(frozen=True)
class Selections:
    """What is left out in front of the first decoder layer, and again from `layer` on, of what the first one has."""

    first: Selection
    layer: int | None = None
    later: Selection | None = None

    def tokens(self, entries, layer_idx: int):
        if self.later is not None and layer_idx >= self.layer:
            entries = self.later.tokens(entries)
        return self.first.tokens(entries)

    def moved(self, move: Callable) -> "Selections":
        later = None if self.later is None else self.later.moved(move)
        return replace(self, first=self.first.moved(move), later=later)


NOTHING = Selection(torch.empty(1, 0, dtype=torch.long), 0)


def noted_selections(cache: Cache | None) -> Selections | None:
    """What a cache has been told by [`note_selections`], if anything."""
    return getattr(cache, _SELECTIONS, None)


def note_selections(cache: Cache, selections: Selections) -> None:
    """Tells a cache which tokens its entries are; from then on it counts tokens."""
    setattr(cache, _SELECTIONS, selections)
    count_all_tokens(cache)


def count_all_tokens(cache: Cache) -> None:
    """Makes a cache translate by its note, as one that was copied from another cache does not yet."""
    put_in_front(CountsAllTokens, cache)


@contextmanager
def entries_counted(cache: Cache | None) -> Iterator[None]:
    """Lets a cache speak of its entries, as the decoder must hear it."""
    if not isinstance(cache, CountsAllTokens) or cache.speaks_of_entries:
        yield
        return
    cache.speaks_of_entries = True
    try:
        yield
    finally:
        cache.speaks_of_entries = False


class CountsAllTokens(CacheFront):
    """Put in front of a cache's class when visual tokens were left out before it."""

    speaks_of_entries = False

    @property
    def is_compileable(self) -> bool:
        # Masks made before `forward` would be those of tokens.
        return False

    def get_seq_length(self, layer_idx: int = 0):
        entries, selections = super().get_seq_length(layer_idx), noted_selections(self)
        if self.speaks_of_entries or selections is None:
            return entries
        return selections.tokens(entries, layer_idx)

    def crop(self, tokens_to_remove: int) -> None:
        selections = noted_selections(self)
        if selections is None or tokens_to_remove >= 0:
            return self._of_entries(super().crop, tokens_to_remove)
        first, left = selections.first, int(self.get_seq_length()) + tokens_to_remove
        cropped = first.cropped(left)
        if cropped is not first:
            if selections.later is not None:
                raise ValueError(
                    f"a cache whose later layers hold fewer visual tokens cannot go back to {left} tokens, which is "
                    f"among them; go back to {first.length} at least, or reset it."
                )
            with entries_counted(self):
                tokens_to_remove = cropped.entries - int(self.get_seq_length())
        self._of_entries(super().crop, tokens_to_remove)
        setattr(self, _SELECTIONS, replace(selections, first=cropped))

    def reset(self) -> None:
        self._of_entries(super().reset)
        setattr(self, _SELECTIONS, None)

    def move_rows(self, method: Callable, argument, move: Callable) -> None:
        with entries_counted(self):
            super().move_rows(method, argument, move)

    def move_notes(self, move: Callable) -> None:
        super().move_notes(move)
        selections = noted_selections(self)
        if selections is not None:
            setattr(self, _SELECTIONS, selections.moved(move))

    def _of_entries(self, method: Callable, *args) -> None:
        with entries_counted(self):
            method(*args)
