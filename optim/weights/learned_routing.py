"""Mixture of depths: tokens that a learned router leaves out skip a decoder block."""

import torch
from torch import nn
from torch.nn import functional as F
from transformers.utils import logging

from ..technique_optim import Technique, refuse_unknown
from .layer_recycling_saving import decoder_of
from .learned_routing_block import checkpointed_block_on_some
from .learned_routing_choice import RoutingPlan, TokenRouter, make_plan
from .learned_routing_saving import FILE_NAME, ROUTER, RoutingSaver, load_routers, router_tensors


logger = logging.get_logger(__name__)

TOKENS = ("visual", "all")
# The decoder's first arguments, for callers who give them by position.
POSITIONAL = ("input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds")


class LearnedActivationRouting(Technique):
    """Routers in front of decoder blocks: of the tokens that may skip a block, a share `capacity` is computed.

    Lossy, and of use only with trained routers; for prompts with many visual tokens. Skipped tokens compute the
    block's keys and values and nothing else, so caches, masks and positions are those of the plain model, and later
    tokens still see them. What a chosen token gains from the block is multiplied by `2 * sigmoid(score)`, through
    which the router learns. Source: Raposo et al., "Mixture-of-Depths", arXiv 2404.02258; differs in that only visual
    tokens are routed by default, that skipped tokens keep keys and values, and that the factor begins at about 1,
    since the blocks are trained already.

    A sequence that begins is ranked as a whole, so a visual token's place may depend on later ones; a sequence that
    goes on behind a cache (decoding, later chunks of a prompt) asks the predictor, token by token, and is causal.
    Blocks compute routed forward passes with exact attention, whatever the attention implementation: bfloat16 on a CPU
    by a kernel of ours, else PyTorch's SDPA. Where nothing may be skipped, as when text is decoded, and at capacity
    1.0 they run as they are, bit-identical.

    To train: `freeze_others(model)`, an optimizer over what it returns, and `training_loss(outputs)` in place of
    `outputs.loss`; with the Trainer `compute_loss_func=routing.trainer_loss(model)`. `save_pretrained` writes official
    weights and the routers into `optim/learned_routing.safetensors` beside them: other loaders get the plain model,
    `from_pretrained` of this package the routed one. Not for compiled graphs.

    Args:
        config: accepted and not read.
        capacity (`float`): share of the eligible tokens of a sequence that a block computes, above 0 and at most 1.
        blocks (`list[int]`, *optional*): which decoder blocks; the last half by default, where visual tokens matter
            least.
        tokens (`str`): "visual" (text is always computed) or "all".
        predictor_size (`int`): inner width of the predictor.
    Raises:
        ValueError: for an unknown setting, a capacity out of range or NaN, blocks that do not exist; in a forward pass
            if attention weights are asked for, or if tokens were dropped between blocks.
    """

    name = "learned_routing"
    exact = False
    # Routers are no weights to share or to pack.
    after = ("adaptive_precision", "layer_recycling")

    def __init__(self, config=None, capacity=0.5, blocks=None, tokens="visual", predictor_size=32, **unknown):
        refuse_unknown(self.name, unknown, ("capacity", "blocks", "tokens", "predictor_size"))
        if isinstance(capacity, bool) or not isinstance(capacity, (int, float)) or not 0 < capacity <= 1:
            raise ValueError(f"capacity must be above 0 and at most 1, got {capacity!r}; 1 computes every token.")
        if tokens not in TOKENS:
            raise ValueError(f"tokens must be one of {', '.join(TOKENS)}, got {tokens!r}.")
        if not isinstance(predictor_size, int) or predictor_size < 1:
            raise ValueError(f"predictor_size must be a whole number of at least 1, got {predictor_size!r}.")
        blocks = None if blocks is None else _checked_blocks(blocks)
        super().__init__(capacity=float(capacity), blocks=blocks, tokens=tokens, predictor_size=predictor_size)
        self._state: RoutingState | None = None
        self._handle = self._saver = None
        self._frozen: list[nn.Parameter] = []

    def apply(self, model) -> None:
        """Adds the routers, trained ones if the model's checkpoint has them."""
        if self._state is not None:
            raise ValueError(f"{self.name} is already applied; revert it first.")
        decoder = decoder_of(model)
        blocks = self.blocks_of(decoder)
        width = decoder.embed_tokens.weight.shape[1]
        for block in blocks:
            router = TokenRouter(width, self.settings["predictor_size"], seed=block)
            setattr(decoder.layers[block], ROUTER, router.to(decoder.embed_tokens.weight.device))
        try:
            found = load_routers(decoder.layers, blocks, router_tensors(model), FILE_NAME)
        except ValueError:
            for block in blocks:
                delattr(decoder.layers[block], ROUTER)
            raise
        if not found and self.settings["capacity"] < 1:
            logger.warning_once(f"{self.name} found no trained routers: until they are, tokens are skipped at random.")
        self._state = RoutingState(self.settings["tokens"])
        for block in blocks:
            layer = decoder.layers[block]
            layer.forward = RoutedForward(layer, block, self._state, self.settings["capacity"])
        self._handle = decoder.register_forward_pre_hook(self._state.plan_forward, with_kwargs=True)
        self._saver = RoutingSaver(model, {**self.settings, "blocks": blocks})

    def revert(self, model) -> None:
        """Takes the routers away; parameters that `freeze_others` froze are trainable again."""
        if self._state is None:
            return
        self._handle.remove()
        self._saver.remove()
        for layer in decoder_of(model).layers:
            if isinstance(vars(layer).get("forward"), RoutedForward):
                layer.forward.leave()
                delattr(layer, ROUTER)
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._frozen, self._state, self._handle, self._saver = [], None, None, None

    def blocks_of(self, decoder) -> list[int]:
        """The indices of the routed blocks, checked against the decoder."""
        count = len(decoder.layers)
        blocks = list(range(count // 2, count)) if self.settings["blocks"] is None else self.settings["blocks"]
        for block in blocks:
            if not 0 <= block < count:
                raise ValueError(f"block {block} does not exist; the decoder has blocks 0 to {count - 1}.")
        return blocks

    def routers(self, model) -> list[TokenRouter]:
        """The routers in the order of their blocks."""
        return [getattr(layer, ROUTER) for layer in decoder_of(model).layers if hasattr(layer, ROUTER)]

    def freeze_others(self, model) -> list[nn.Parameter]:
        """Leaves only the routers trainable and returns their parameters, for an optimizer."""
        self._applied()
        own = [parameter for router in self.routers(model) for parameter in router.parameters()]
        kept = set(own)
        others = [p for p in model.parameters() if p.requires_grad and p not in kept]
        for parameter in others:
            parameter.requires_grad_(False)
        self._frozen += others
        return own

    def auxiliary_loss(self) -> torch.Tensor:
        """Mean binary cross-entropy of the predictors in the last forward pass with gradients; 0 where none ran."""
        losses = list(self._applied().losses.values())
        return torch.stack(losses).mean() if losses else torch.zeros(())

    def training_loss(self, outputs, weight: float = 1.0) -> torch.Tensor:
        """`outputs.loss` plus `weight` times [`auxiliary_loss`], which trains the predictors and nothing else."""
        auxiliary = self.auxiliary_loss()
        return outputs.loss + weight * auxiliary.to(outputs.loss.device)

    def trainer_loss(self, model, weight: float = 1.0):
        """A `compute_loss_func` for the Trainer of `transformers`."""
        vocabulary = model.config.get_text_config().vocab_size

        def loss(outputs, labels, num_items_in_batch=None):
            task = model.loss_function(outputs.logits, labels, vocabulary, num_items_in_batch=num_items_in_batch)
            return task + weight * self.auxiliary_loss().to(task.device)

        return loss

    def computed_shares(self) -> dict[int, float]:
        """By block the share of real tokens that it computed in the last forward pass with something to skip."""
        return {block: float(share) for block, share in self._applied().shares.items()}

    def _applied(self) -> "RoutingState":
        if self._state is None:
            raise ValueError(f"{self.name} is not applied; call apply(model) first.")
        return self._state


class RoutingState:
    """What the routed blocks of one model share during a forward pass.

    Attributes:
        plan (`RoutingPlan`, *optional*): what may be skipped; `None` where nothing may.
        losses, shares (`dict`): by block, of the last forward pass that routed.
    """

    def __init__(self, tokens: str):
        self.tokens = tokens
        self.plan: RoutingPlan | None = None
        self.losses: dict[int, torch.Tensor] = {}
        self.shares: dict[int, torch.Tensor] = {}

    def plan_forward(self, decoder, args, kwargs) -> None:
        """Runs in front of the decoder. What it leaves stays until the next pass, for recomputed checkpoints."""
        kwargs = {**dict(zip(POSITIONAL, args, strict=False)), **kwargs}
        self.losses, self.shares = {}, {}
        self.plan = make_plan(self.tokens, kwargs)


class RoutedForward:
    """In the place of a decoder block's `forward`.

    Args:
        block (`int`): its index.
        capacity (`float`): share of the eligible tokens that are computed.
    """

    def __init__(self, layer: nn.Module, block: int, state: RoutingState, capacity: float):
        self.layer, self.block, self.state, self.capacity = layer, block, state, capacity
        self.replaced = vars(layer).get("forward")

    def leave(self) -> None:
        """Puts back what was there."""
        if self.replaced is None:
            del self.layer.forward
        else:
            self.layer.forward = self.replaced

    def __call__(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        plan = self.state.plan
        if plan is None or self.capacity == 1:
            plain = self.replaced or type(self.layer).forward.__get__(self.layer)
            return plain(hidden_states, **kwargs)
        if hidden_states.shape[:2] != plan.eligible.shape:
            raise ValueError(
                f"block {self.block} got {hidden_states.shape[1]} tokens of {plan.eligible.shape[1]}: tokens were "
                "dropped between blocks, which learned_routing does not follow; drop them before the decoder."
            )
        router = getattr(self.layer, ROUTER)
        scores = router.scores(hidden_states)
        chosen = plan.choose(router, hidden_states, scores, self.capacity)
        if torch.is_grad_enabled() and plan.begins:
            foretold = router.foretell(hidden_states)[plan.eligible]
            self.state.losses[self.block] = F.binary_cross_entropy_with_logits(
                foretold, chosen[plan.eligible].to(foretold.dtype)
            )
        computed = chosen | plan.always
        self.state.shares[self.block] = computed.sum() / (plan.eligible | plan.always).sum()
        gates = torch.where(chosen, 2 * scores.sigmoid(), 1.0)
        return checkpointed_block_on_some(self.layer, hidden_states, computed, gates, **kwargs)


def _checked_blocks(blocks) -> list[int]:
    try:
        blocks = [int(block) for block in blocks]
    except (TypeError, ValueError):
        raise ValueError(f"blocks must be a list of layer indices such as [3, 4, 5], got {blocks!r}.") from None
    if not blocks or len(set(blocks)) < len(blocks):
        raise ValueError(f"blocks must name at least one block and none twice, got {blocks}.")
    return sorted(blocks)
