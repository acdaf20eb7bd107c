"""Which tokens a routed block computes: what may be skipped, what is chosen, and the routers that choose."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from ..attention.attention_layout import AttentionLayout


class TokenRouter(nn.Module):
    """Scores the tokens in front of one block, and foretells from each alone whether its score will be chosen.

    In float32 and on normalised states, whatever the model computes in. An untrained predictor has every token
    computed.

    Args:
        hidden_size (`int`): of the residual stream.
        predictor_size (`int`): inner width of the predictor.
        seed (`int`): of the initial scores, which are close to equal.
    """

    def __init__(self, hidden_size: int, predictor_size: int = 32, seed: int = 0):
        super().__init__()
        self.score = nn.Linear(hidden_size, 1, bias=False)
        self.predictor = nn.Sequential(nn.Linear(hidden_size, predictor_size), nn.SiLU(), nn.Linear(predictor_size, 1))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for linear in (self.score, self.predictor[0]):
                linear.weight.copy_(torch.randn(linear.weight.shape, generator=generator) * hidden_size**-0.5)
            self.score.weight.mul_(0.1)
            self.predictor[0].bias.zero_()
            self.predictor[2].weight.zero_()
            self.predictor[2].bias.fill_(2.0)

    def scores(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, T, hidden size) to (B, T)."""
        return self.score(self._normed(hidden_states)).squeeze(-1)

    def foretell(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Logits (B, T) of being chosen; no gradient reaches the hidden states."""
        return self.predictor(self._normed(hidden_states.detach())).squeeze(-1)

    def _normed(self, hidden_states: torch.Tensor) -> torch.Tensor:
        dtype = self.score.weight.dtype
        return F.rms_norm(hidden_states.to(dtype), hidden_states.shape[-1:], eps=1e-6)


@dataclass(frozen=True)
class RoutingPlan:
    """What one forward pass of the decoder may skip.

    Attributes:
        eligible (`torch.Tensor`): (B, T) boolean, tokens that may skip a block.
        always (`torch.Tensor`): (B, T) boolean, tokens that never do; what is in neither is padding.
        sequences (`torch.Tensor`): (B, T) the packed sequence of each token, 0 in ordinary rows.
        begins (`bool`): whether nothing lies in a cache, so that a sequence may be ranked as a whole.
    """

    eligible: torch.Tensor
    always: torch.Tensor
    sequences: torch.Tensor
    begins: bool

    def choose(self, router: TokenRouter, hidden_states: torch.Tensor, scores: torch.Tensor, capacity: float):
        """The eligible tokens that are computed, (B, T) boolean.

        Of a sequence that begins, the share `capacity` with the highest scores; of one that goes on, those of which
        the predictor says so, which no later token changes.
        """
        if not self.begins:
            return self.eligible & (router.foretell(hidden_states) > 0)
        return top_share(scores.detach(), self.eligible, self.sequences, capacity)


def top_share(scores: torch.Tensor, eligible: torch.Tensor, sequences: torch.Tensor, capacity: float) -> torch.Tensor:
    """The highest-scored of the eligible tokens of each sequence: `capacity` times their number, rounded up.

    Args:
        scores (`torch.Tensor`): (B, T); of equal ones the first wins.
        eligible (`torch.Tensor`): (B, T) boolean.
        sequences (`torch.Tensor`): (B, T) integers from 0 on.
    """
    count = int(sequences.max()) + 1
    sequences = sequences.masked_fill(~eligible, count)
    order = scores.argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, sequences.gather(1, order).argsort(dim=1, stable=True))
    sizes = torch.zeros(len(scores), count + 1, dtype=torch.long, device=scores.device)
    sizes.scatter_add_(1, sequences, torch.ones_like(sequences))
    begins = (sizes.cumsum(1) - sizes).gather(1, sequences.gather(1, order))
    places = torch.arange(scores.shape[1], device=scores.device) - begins
    ranks = torch.empty_like(order).scatter_(1, order, places)
    # Rounded before it is rounded up: 0.1 times 30 is a little more than 3.
    taken = (sizes * capacity).round(decimals=6).ceil().long().gather(1, sequences)
    return (ranks < taken) & eligible


def make_plan(tokens: str, inputs: dict) -> RoutingPlan | None:
    """The plan of a forward pass, from the decoder's keyword arguments; `None` where nothing may be skipped.

    Args:
        tokens (`str`): "visual" or "all".
    """
    visual = inputs.get("visual_pos_masks")
    if tokens == "visual" and visual is None:
        return None
    given = inputs.get("inputs_embeds")
    given = inputs.get("input_ids") if given is None else given
    rows, length = given.shape[:2]
    cache = inputs.get("past_key_values")
    seen = 0 if cache is None else int(cache.get_seq_length())
    mask = inputs.get("attention_mask")
    real = real_tokens(mask, seen, rows, length, given.device)
    eligible = real if tokens == "all" else visual.to(real.device) & real
    if not bool(eligible.any()):
        return None
    sequences = torch.zeros(rows, length, dtype=torch.long, device=given.device)
    positions = inputs.get("position_ids")
    if mask is None and not seen and positions is not None and (positions.ndim == 2 or len(positions) == 4):
        plain = (positions if positions.ndim == 2 else positions[0]).expand(rows, -1)
        sequences[:, 1:] = (plain.diff() != 1).cumsum(1)
    return RoutingPlan(eligible, real & ~eligible, sequences, begins=seen == 0)


def real_tokens(mask, seen: int, rows: int, length: int, device) -> torch.Tensor:
    """(rows, length) boolean, false where a new token is padding, as far as a mask of any form tells."""
    if isinstance(mask, AttentionLayout):
        mask = mask.valid
    if isinstance(mask, torch.Tensor) and mask.ndim == 4:
        last = mask[:, 0, -1]
        mask = last if last.dtype == torch.bool else last >= 0
        mask = mask[:, : seen + length]
    if not isinstance(mask, torch.Tensor):
        return torch.ones(rows, length, dtype=torch.bool, device=device)
    return mask[:, mask.shape[1] - length :].to(device).bool().expand(rows, -1)
