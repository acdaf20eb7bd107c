"""What of a model can be packed, to which part it belongs, and how many bytes it takes."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from .packed_codes import group_size_for


PARTS = ("decoder", "experts", "lm_head", "embedding", "vision", "mergers")
PLAIN_BITS = 16


@dataclass(frozen=True)
class Target:
    """One module with weights that can be packed.

    Attributes:
        name (`str`): of the module in the model.
        module (`nn.Module`): a linear layer, an embedding, or experts with three-dimensional weights.
        part (`str`): one of `PARTS`.
        group (`str`): what gets one precision together: an attention or feed-forward block, a merger, the head.
    """

    name: str
    module: nn.Module
    part: str
    group: str

    def weights(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The weights by the name that they have in the module."""
        names = ("gate_up_proj", "down_proj") if self.part == "experts" else ("weight",)
        return ((name, getattr(self.module, name)) for name in names)


@dataclass(frozen=True)
class Form:
    """How a weight is held: 16 for as it is, 8, or 4 bits in groups of `group_size` inputs."""

    bits: int
    group_size: int = 0

    def bytes_of(self, weight) -> int:
        """Of a weight (..., outputs, inputs), scales and zeros included."""
        if self.bits == PLAIN_BITS:
            return weight.nbytes
        outputs = weight.numel() // weight.shape[-1]
        return (
            weight.numel() + 4 * outputs
            if self.bits == 8
            else weight.numel() // 2 + 4 * weight.numel() // self.group_size
        )


def form_for(weight, bits: int, group_size: int) -> Form:
    """What `weight` gets when `bits` are asked for: int8 in the place of int4 where no group fits its width."""
    if bits != 4:
        return Form(bits)
    fitting = group_size_for(weight.shape[-1], group_size)
    return Form(8) if fitting is None else Form(4, fitting)


def find_targets(model: nn.Module) -> list[Target]:
    """All that can be packed, in the model's order. Routers, norms and convolutions are no part of it."""
    targets = []
    for name, module in model.named_modules():
        part = _part_of(name, module)
        if part is not None:
            targets.append(Target(name, module, part, _group_of(name, part)))
    return targets


def _part_of(name: str, module: nn.Module) -> str | None:
    if isinstance(module, nn.Embedding):
        return "embedding" if name.rpartition(".")[2] == "embed_tokens" else None
    if all(getattr(getattr(module, one, None), "ndim", 0) == 3 for one in ("gate_up_proj", "down_proj")):
        return "experts"
    # Adapters stay as they are, and what belongs to other techniques too.
    if type(module) is not nn.Linear or "lora_" in name:
        return None
    path = name.split(".")
    if path[-1] == "lm_head" or "lm_head" in path:
        return "lm_head"
    if any("merger" in one for one in path):
        return "mergers"
    return "vision" if "visual" in path or "blocks" in path else "decoder"


def _group_of(name: str, part: str) -> str:
    """`model.language_model.layers.3.mlp.up_proj` to `model.language_model.layers.3.mlp`."""
    if part in ("lm_head", "embedding", "experts"):
        return name
    pattern = r"(.*blocks\.\d+)\..*" if part == "vision" else r"(.*)\.[^.]+"
    found = re.fullmatch(pattern, name.replace(".base_layer", ""))
    return found.group(1) if found else name


def is_tied(targets: list[Target]) -> bool:
    """Whether the head and the embedding are one weight."""
    pair = [next(target.weights())[1] for target in targets if target.part in ("lm_head", "embedding")]
    return len(pair) == 2 and pair[0] is pair[1]
