"""Puts packed modules in the place of plain ones, and takes them out again."""

from collections.abc import Callable, Mapping

import torch
from torch import nn

from .packed_codes import PackedWeight, pack
from .precision_groups import PLAIN_BITS, Form, Target, is_tied
from .precision_originals import Originals
from .quantized_experts import PackedExperts
from .quantized_linear import PackedEmbedding, PackedLinear, PackedMatrix


TIE = "tie_word_embeddings"


class Installation:
    """What was replaced in a model.

    Args:
        model: whose modules are replaced, at once.
        targets (`list[Target]`): of that model.
        forms (`dict`): `{target name: {weight name: Form}}`.
        originals (`Originals`): gets the weights.
        make_linear (callable, *optional*): a linear layer and its bits to what takes its place; by default a
            `PackedLinear` of ours. With it nothing but linear layers can be packed.
    Raises:
        ValueError: if a weight cannot be packed; the model is as it was.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: list[Target],
        forms: Mapping[str, dict],
        originals: Originals,
        make_linear: Callable[[nn.Linear, int], nn.Module] | None = None,
    ):
        self.model, self.originals = model, originals
        self.replaced: list[tuple[str, nn.Module]] = []
        self.plain_attributes = {}
        chosen = [target for target in targets if any(form.bits != PLAIN_BITS for form in forms[target.name].values())]
        # The head and the embedding that are one weight share one packed matrix, if both get the same.
        shared: dict[tuple[nn.Parameter, Form], PackedMatrix] = {}
        tied = is_tied(targets)
        still_plain = {weight for target in targets if target not in chosen for _, weight in target.weights()}
        try:
            for target in chosen:
                if make_linear is not None:
                    self._put(target, make_linear(target.module, forms[target.name]["weight"].bits))
                    continue
                packed = {}
                for name, weight in target.weights():
                    key = weight, forms[target.name][name]
                    if key not in shared:
                        shared[key] = pack_matrix(weight, key[1])
                    packed[name] = shared[key]
                self._put(target, _packed_module(target, packed))
            for target in chosen:
                for _, weight in target.weights():
                    if weight not in still_plain:
                        originals.take(weight)
        except Exception:
            self._undo_modules()
            if originals.place != "drop":
                originals.give_back()
            raise
        if tied:
            self._note_tie([target for target in targets if target.part in ("lm_head", "embedding")])

    def _put(self, target: Target, new: nn.Module) -> None:
        self.replaced.append((target.name, target.module))
        self.model.set_submodule(target.name, new.train(target.module.training))

    def _note_tie(self, pair: list[Target]) -> None:
        """Says in the model whether head and embedding are still one weight, so that it is saved and loaded so."""
        now = [self.model.get_submodule(target.name) for target in pair]
        if all(module is target.module for module, target in zip(now, pair, strict=True)):
            return
        one = getattr(now[0], "matrix", None) is not None and now[0].matrix is getattr(now[1], "matrix", None)
        self._set(self.model, "all_tied_weights_keys", {})
        if not one:
            self._set(self.model.config, TIE, False)
            text = self.model.config.get_text_config()
            if text is not self.model.config:
                self._set(text, TIE, False)

    def _set(self, owner, name: str, value) -> None:
        if hasattr(owner, name):
            self.plain_attributes[id(owner), name] = owner, getattr(owner, name)
            setattr(owner, name, value)

    def undo(self) -> None:
        """Puts the original modules and weights back.

        Raises:
            ValueError: if the weights were dropped; the model stays packed.
        """
        now = self.model.get_submodule(self.replaced[0][0]) if self.replaced else self.model
        device = next((x.device for x in (*now.buffers(), *now.parameters())), None)
        self.originals.give_back(device)
        self._undo_modules()

    def _undo_modules(self) -> None:
        for name, old in reversed(self.replaced):
            self.model.set_submodule(name, old.train(self.model.get_submodule(name).training))
        self.replaced.clear()
        for (_, name), (owner, value) in self.plain_attributes.items():
            setattr(owner, name, value)
        self.plain_attributes.clear()


def _packed_module(target: Target, packed: dict[str, PackedMatrix]) -> nn.Module:
    old = target.module
    if target.part == "experts":
        return PackedExperts(packed["gate_up_proj"], packed["down_proj"], old)
    if target.part == "embedding":
        return PackedEmbedding(packed["weight"], old.padding_idx)
    return PackedLinear(packed["weight"], old.bias)


def pack_matrix(weight, form: Form) -> PackedMatrix:
    """Packs a weight (outputs, inputs), or one matrix after another of (experts, outputs, inputs)."""
    if weight.ndim == 2:
        return PackedMatrix(pack(weight, form.bits, form.group_size), weight.dtype)
    each = [pack(one, form.bits, form.group_size) for one in weight]
    stacked = (
        None if getattr(each[0], name) is None else torch.stack([getattr(one, name) for one in each])
        for name in ("codes", "scale", "zero")
    )
    return PackedMatrix(PackedWeight(*stacked), weight.dtype)
