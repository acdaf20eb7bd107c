"""Training steps whose memory neither the vocabulary, nor the depth, nor a frozen tower decides."""

import contextlib
import functools
from collections.abc import Iterable

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..technique_optim import Technique, refuse_unknown
from .chunked_loss import chunked_cross_entropy
from .frozen_tower import FrozenTower


IGNORED = -100


class MemoryEfficientGradientAccumulation(Technique):
    """Chunked loss with labels counted over all accumulation steps, activation checkpoints, a tower without a graph.

    In training mode, `model(labels=...)` gives the loss and `logits=None`: they are never made as a whole. The loss
    is divided by `num_items_in_batch`, which `Trainer` counts over its accumulation steps (and ranks), as the model
    then says that it accepts it; [`count_label_tokens`] counts for loops of one's own. Evaluation, calls without
    labels or with `logits_to_keep`, and a head that is no plain linear layer (an adapter on it, quantized weights) go
    the plain way, with logits. Exact up to the order of sums; checkpointing computes layers twice.

    Args:
        config: accepted and not read.
        checkpointing (`bool`): keep only the inputs of the decoder's layers (and of a trained tower's).
        offload (`bool`): keep what is kept for the backward pass in host memory.
        frozen_tower (`bool`): run the vision tower without a graph while none of its parameters is trained.
        chunk_rows (`int`, *optional*): tokens whose logits are held at once; see [`chunked_cross_entropy`].
    Raises:
        ValueError: for an unknown or invalid setting, and from `apply` for a model without a head.
    """

    name = "gradient_accumulation"
    exact = True
    after = ("chunked_vision", "repeated_patches")  # whose ways through the tower are wrapped then

    def __init__(
        self,
        config=None,
        checkpointing: bool = True,
        offload: bool = False,
        frozen_tower: bool = True,
        chunk_rows: int | None = None,
        **unknown,
    ):
        refuse_unknown(self.name, unknown, ("checkpointing", "offload", "frozen_tower", "chunk_rows"))
        if chunk_rows is not None and (type(chunk_rows) is not int or chunk_rows < 1):
            raise ValueError(f"chunk_rows must be a whole number of at least 1, got {chunk_rows!r}; None chooses it.")
        super().__init__(
            checkpointing=checkpointing, offload=offload, frozen_tower=frozen_tower, chunk_rows=chunk_rows
        )
        self._applied: list = []

    def apply(self, model) -> None:
        if self._applied:
            raise ValueError(f"{self.name} is already applied; revert it first.")
        if not isinstance(getattr(model, "lm_head", None), nn.Module):
            raise ValueError(
                f"{self.name} needs a model with a language-model head, got {type(model).__name__}; apply it to a "
                "Qwen3VLForConditionalGeneration, before PEFT wraps it."
            )
        self._applied.append(LossForward(model, self.settings["chunk_rows"], self.settings["offload"]))
        self._applied += [_Attribute(model, "accepts_loss_kwargs", True)]
        modules = list(model.modules())
        if self.settings["checkpointing"]:
            function = functools.partial(checkpoint, use_reentrant=False)
            for module in (each for each in modules if hasattr(each, "gradient_checkpointing")):
                self._applied.append(_Attribute(module, "_gradient_checkpointing_func", function))
                self._applied.append(_Attribute(module, "gradient_checkpointing", True))
        if self.settings["frozen_tower"]:
            self._applied += [FrozenTower(module.visual) for module in modules if hasattr(module, "visual")]

    def revert(self, model) -> None:
        while self._applied:
            self._applied.pop().put_back()


class LossForward:
    """In the place of a model's `forward`: where a loss is trained on, the head makes it in place of logits."""

    def __init__(self, model: nn.Module, chunk_rows: int | None, offload: bool):
        self.model, self.chunk_rows, self.offload = model, chunk_rows, offload
        self.plain = model.forward
        self.set_before = "forward" in vars(model)
        functools.update_wrapper(self, self.plain)  # `Trainer` reads the signature
        model.forward = self

    def put_back(self) -> None:
        if vars(self.model).get("forward") is self:
            del self.model.forward
            if self.set_before:
                self.model.forward = self.plain

    def __call__(self, *args, labels=None, return_dict: bool | None = None, **kwargs):
        if not self._is_training_step(args, labels, kwargs):
            return self.plain(*args, labels=labels, return_dict=return_dict, **kwargs)
        with self._host_memory(), _HeadMakesLoss(self.model, labels, self.chunk_rows, kwargs):
            output = self.plain(*args, labels=labels, return_dict=True, **kwargs)
        output = type(output)(**{**output, "logits": None})
        wants_dict = self.model.config.return_dict if return_dict is None else return_dict
        return output if wants_dict else output.to_tuple()

    def _is_training_step(self, args: tuple, labels, kwargs: dict) -> bool:
        head = self.model.lm_head
        plain_head = type(head) is nn.Linear and head.bias is None and "forward" not in vars(head)
        keeps_all = isinstance(kwargs.get("logits_to_keep", 0), int) and not kwargs.get("logits_to_keep", 0)
        # More than five arguments by place would bring the labels among them.
        return self.model.training and labels is not None and plain_head and keeps_all and len(args) <= 5

    def _host_memory(self):
        if not self.offload:
            return contextlib.nullcontext()
        return torch.autograd.graph.save_on_cpu(pin_memory=self.model.device.type == "cuda")


class _HeadMakesLoss:
    """For one forward pass: the head turns hidden states into the loss, and the loss function hands that out.

    The weight is read inside of the head's own call, for which wrappers such as FSDP are meant to gather it; that is
    not tested on several processes yet.
    """

    def __init__(self, model: nn.Module, labels: torch.Tensor, chunk_rows: int | None, options: dict):
        self.model, self.labels, self.chunk_rows = model, labels, chunk_rows
        self.items = options.get("num_items_in_batch")
        self.targets = options.get("shift_labels")
        self.ignored = options.get("ignore_index", IGNORED)

    def __enter__(self) -> None:
        if self.targets is None:  # every token predicts the next one
            self.targets = F.pad(self.labels[:, 1:], (0, 1), value=self.ignored)
        self.loss_before = vars(self.model).get("_loss_function")
        self.model.lm_head.forward = self._make_loss
        self.model.loss_function = self._hand_out

    def __exit__(self, *error) -> None:
        del self.model.lm_head.forward
        del self.model._loss_function
        if self.loss_before is not None:
            self.model.loss_function = self.loss_before

    def _make_loss(self, hidden: torch.Tensor) -> torch.Tensor:
        weight = self.model.lm_head.weight
        return chunked_cross_entropy(hidden, weight, self.targets, self.items, self.ignored, self.chunk_rows)

    def _hand_out(self, logits: torch.Tensor, **kwargs) -> torch.Tensor:
        return logits


class _Attribute:
    """An attribute that is set on an object and taken back."""

    def __init__(self, owner, name: str, value):
        self.owner, self.name = owner, name
        self.was_own, self.before = name in vars(owner), vars(owner).get(name)
        setattr(owner, name, value)

    def put_back(self) -> None:
        if self.was_own:
            setattr(self.owner, self.name, self.before)
        else:
            delattr(self.owner, self.name)


def count_label_tokens(labels: Iterable[torch.Tensor], ignore_index: int = IGNORED) -> torch.Tensor:
    """What every micro-batch of one optimizer step passes as `num_items_in_batch`.

    The targets of all micro-batches; where `torch.distributed` runs, of all ranks too, divided by the number of
    ranks, since data parallelism averages their gradients. The sum of the losses is then the mean over all targets.

    Args:
        labels: one (B, T) tensor a micro-batch, not shifted: the first token of a row is no target.
        ignore_index (`int`): label of tokens that do not count.
    Returns:
        a scalar, float64; of at least one target, so that a step without any gives 0 and not NaN.
    Raises:
        ValueError: if there is no micro-batch.
    """
    counts = [(each[..., 1:] != ignore_index).sum() for each in labels]
    if not counts:
        raise ValueError("count_label_tokens got no micro-batch; pass the labels of those of one step.")
    total = torch.stack([count.to(counts[0].device) for count in counts]).sum()
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return total.clamp(min=1).double()
    torch.distributed.all_reduce(total)
    return total.clamp(min=1).double() / torch.distributed.get_world_size()
