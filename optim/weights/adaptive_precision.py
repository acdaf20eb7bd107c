"""Weights in int8 or int4, the same for all layers or chosen for each from samples of one's own."""

from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any

from torch import nn
from transformers.utils import logging

from ..technique_optim import Technique, refuse_unknown
from .packed_codes import GROUP_SIZES
from .precision_bitsandbytes import (
    bitsandbytes_linear,
    check_one_width,
    mark_bitsandbytes,
    require_bitsandbytes,
)
from .precision_calibration import Sensitivity, choose_bits, measure_sensitivity
from .precision_groups import PLAIN_BITS, Form, Target, find_targets, form_for, is_tied
from .precision_install import Installation
from .precision_originals import PLACES, Originals
from .precision_saving import PackedQuantizer, mark_packed, packed_weights, unmark_packed
from .quantized_linear import PackedMatrix


logger = logging.get_logger(__name__)

BITS = (4, 8, PLAIN_BITS)
BACKENDS = ("packed", "bitsandbytes")


class AdaptivePrecision(Technique):
    """Weights as packed int8 or int4, so that a decoded token reads a half or a quarter of the bytes.

    Lossy. Up to 96 rows are multiplied by kernels of ours that read the packed bytes; more rows, as in a prompt, with
    weights that are unpacked a matrix at a time, so that no second copy is kept. From about 40 rows on this is up to a
    fifth slower than bfloat16. Without a C++ compiler and on a GPU every product unpacks: as small, not faster.
    Adapters of PEFT can be trained on top. `save_pretrained` writes torchao's format, which `from_pretrained` loads
    packed, in a second; both need torchao. Stock `transformers` with torchao reads such a folder too, and computes
    with it where torchao has kernels: int8 on a CPU, but for experts; int4 on a GPU. Elsewhere it raises.

    Int8 has one scale an output, int4 a scale and a zero for `group_size` neighbouring inputs (4.5 bits a weight with
    64). Where a width is no multiple of 16 int4 becomes int8, and smaller groups are taken where they alone fit:
    `describe` says where. Source: rounding to the nearest, with the choice for each layer by the KL divergence that it
    causes, in the manner of HAWQ (arXiv 1905.03696) with a measured in the place of a second-order error.

    Args:
        config: accepted and not read.
        bits (`int`): of the decoder's linear layers: 4, 8, or 16 for leaving them.
        group_size (`int`): 32, 64 or 128 inputs.
        lm_head (`int`, *optional*): bits of the head; `bits` by default.
        embedding (`int`, *optional*): of the token embedding; by default as the head where both are one weight, which
            is then packed once, else 16.
        experts (`int`, *optional*): of sparse experts, each packed on its own; `bits` by default.
        vision, mergers (`int`, *optional*): of the vision tower's blocks, and of its merger and DeepStack mergers; 8
            by default, with bitsandbytes `bits`.
        layers (*optional*): `{group: bits}` of single blocks, such as `calibrate` returns.
        originals (`str`): where the packed weights' originals wait for `revert`: `"file"` (the default) writes them
            to disk and frees their memory, `"keep"` holds them in memory, which saves none, `"drop"` forgets them, and
            `revert` raises; a profile that is never taken off loads sooner with it.
        originals_folder (`str`, *optional*): for the files; the system's temporary folder by default.
        backend (`str`): `"packed"` for the above, or on a GPU `"bitsandbytes"`: its LLM.int8() or NF4 layers, saved
            and loaded by `transformers` as its own. It has linear layers of one width alone: parts get `bits` or 16,
            embeddings stay, experts have to be left by `experts=16`, and there is nothing to calibrate.
    Raises:
        ValueError: for an unknown or invalid setting.
    """

    name = "adaptive_precision"
    exact = False
    after = ("layer_recycling",)

    def __init__(
        self,
        config=None,
        bits: int = 8,
        group_size: int = 64,
        lm_head: int | None = None,
        embedding: int | None = None,
        experts: int | None = None,
        vision: int | None = None,
        mergers: int | None = None,
        layers: Mapping[str, int] | None = None,
        originals: str = "file",
        originals_folder: str | None = None,
        backend: str = "packed",
        **unknown: Any,
    ):
        _check_choice("backend", backend, BACKENDS)
        usual = 8 if backend == "packed" else bits
        vision, mergers = (usual if value is None else value for value in (vision, mergers))
        parts = {"lm_head": lm_head, "embedding": embedding, "experts": experts, "vision": vision, "mergers": mergers}
        others = ("layers", "originals", "originals_folder", "backend")
        refuse_unknown(self.name, unknown, ("bits", "group_size", *parts, *others))
        for name, value in {"bits": bits, **parts}.items():
            if value is not None or name == "bits":
                _check_choice(name, value, BITS)
        _check_choice("group_size", group_size, GROUP_SIZES)
        _check_choice("originals", originals, PLACES)
        if layers is not None:
            layers = _checked_layers(layers)
        super().__init__(
            bits=bits,
            group_size=group_size,
            **parts,
            layers=layers,
            originals=originals,
            originals_folder=originals_folder,
            backend=backend,
        )
        if backend == "bitsandbytes":
            check_one_width(bits, {**parts, **(layers or {})})
        if (bits if experts is None else experts) != PLAIN_BITS:
            self.excludes = {"grouped_experts": "packed experts have a kernel of their own; experts=16 goes"}
        self.sensitivity: Sensitivity | None = None
        self._installed: tuple[nn.Module, Installation] | None = None
        self._asked: dict[str, int] = {}

    def calibrate(
        self,
        model,
        samples: Iterable[Mapping[str, Any]],
        budget_bytes: int,
        profile: MutableMapping | None = None,
    ) -> dict[str, int]:
        """Measures what packing each block costs on samples, and chooses bits for all under a budget.

        Every block (attention, feed-forward, experts of a layer, vision block, merger, head) is packed alone to 8 and
        to 4 bits, and the mean KL divergence of the logits from those of the plain model is taken: two runs over the
        samples a block. Bits are then lowered where that costs least for each byte. The settings of the parts say
        how narrow a part may get: with `bits=8` nothing of the decoder gets 4, `vision=16` leaves the tower alone.
        What was measured stays in `sensitivity`.

        Args:
            model: not packed; it is as before afterwards.
            samples: inputs of the model, such as the processor gives, with pictures if a part of vision may be packed.
            budget_bytes (`int`): for all weights of the model together, packed or not.
            profile (`dict`, *optional*): gets this technique with its choice, in place, ready for `config.optim`.
        Returns:
            `{group: bits}`, also kept as the setting `layers`.
        Raises:
            ValueError: without samples, without pictures where vision is to be packed, or if the budget is smaller
                than the model with all at their narrowest; the message says how much that is.
            TypeError: for samples that are no mappings.
        """
        if self.settings["backend"] == "bitsandbytes":
            raise ValueError("calibrate chooses among forms of backend='packed'; bitsandbytes has one for all layers.")
        _require_plain(model)
        samples = list(samples)
        targets = find_targets(model)
        narrowest = {target.group: self._bits_of_part(target, is_tied(targets)) for target in targets}
        _check_samples(
            samples, any(narrowest[x.group] != PLAIN_BITS for x in targets if x.part in ("vision", "mergers"))
        )
        candidates = self._candidates(model, targets, narrowest)
        rest = bytes_of(model) - sum(options[PLAIN_BITS] for options in candidates.values())
        choose_bits(candidates, {}, budget_bytes, rest)  # a budget that nothing fits is found before the measuring
        self.sensitivity = measure_sensitivity(model, samples, candidates, self._install_group)
        layers = choose_bits(candidates, self.sensitivity, budget_bytes, rest)
        self.settings["layers"] = layers
        if profile is not None:
            profile[self.name] = {name: value for name, value in self.settings.items() if value is not None}
        return layers

    def _candidates(self, model, targets: list[Target], narrowest: dict[str, int]) -> dict[str, dict[int, int]]:
        """`{group: {bits: bytes}}` for every group that may be packed; a tied embedding goes with the head."""
        merged = self._group_names(targets)
        candidates: dict[str, dict[int, int]] = {}
        counted = set()
        for target in targets:
            if narrowest[target.group] == PLAIN_BITS:
                continue
            options = candidates.setdefault(merged[target.name], {})
            for _, weight in target.weights():
                if weight in counted:
                    continue
                counted.add(weight)
                for bits in (x for x in BITS if x >= narrowest[target.group]):
                    form = form_for(weight, bits, self.settings["group_size"])
                    options[bits] = options.get(bits, 0) + form.bytes_of(weight)
        return candidates

    def _group_names(self, targets: list[Target]) -> dict[str, str]:
        head = next((target.group for target in targets if target.part == "lm_head"), None)
        together = is_tied(targets) and self.settings["embedding"] is None and self.settings["backend"] == "packed"
        return {x.name: head if together and x.part == "embedding" else x.group for x in targets}

    def _install_group(self, model, group: str, bits: int) -> Installation:
        """Packs one group of a plain model."""
        targets = find_targets(model)
        names = self._group_names(targets)
        forms = {
            target.name: self._forms(target, bits if names[target.name] == group else PLAIN_BITS) for target in targets
        }
        return Installation(model, targets, forms, Originals("keep"))

    def apply(self, model) -> None:
        """Packs the weights. A model that was loaded packed stays as it is.

        Raises:
            ValueError: if this or another one packed the model already, if `layers` names a group that it does not
                have, or if a weight holds NaN or infinity; the model is then as it was.
            OSError: if the originals cannot be written.
        """
        if isinstance(getattr(model, "hf_quantizer", None), PackedQuantizer) and model.hf_quantizer.from_folder:
            logger.info("the model was loaded with packed weights, which stay as they are.")
            return
        _require_plain(model)
        make_linear = None
        if self.settings["backend"] == "bitsandbytes":
            require_bitsandbytes(model)
            make_linear = bitsandbytes_linear
        targets = find_targets(model)
        if make_linear is not None and self.settings["experts"] is None and any(x.part == "experts" for x in targets):
            raise ValueError(
                "bitsandbytes has no layers for sparse experts; leave them by experts=16, or take backend='packed'."
            )
        bits = self._chosen_bits(targets)
        forms = {target.name: self._forms(target, bits[target.name]) for target in targets}
        originals = Originals(self.settings["originals"], self.settings["originals_folder"])
        self._installed = model, Installation(model, targets, forms, originals, make_linear)
        replaced = [name for name, _ in self._installed[1].replaced]
        if make_linear is not None and replaced:
            mark_bitsandbytes(model, self.settings["bits"], replaced)
        elif replaced:
            mark_packed(model)

    def revert(self, model) -> None:
        """Puts the original weights back, bit for bit.

        Raises:
            ValueError: if there are none: they were dropped, or the model was loaded packed.
        """
        if self._installed is None or self._installed[0] is not model:
            if packed_weights(model):
                raise ValueError(
                    "this object did not pack the weights and has no originals of them; revert the one that did, "
                    "or, if they were loaded packed, call model.dequantize() for plain layers of rounded weights."
                )
            return
        self._installed[1].undo()
        self._installed = None
        unmark_packed(model)

    def describe(self, model) -> str:
        """What a packed model holds: bytes of its weights, and for each part how many are in which form."""
        counts: dict[str, int] = {}
        for name, matrix in packed_weights(model).items():
            wanted, form = self._wanted(model, name), _form_name(matrix)
            note = "" if wanted is None or wanted == form else f" (its width of {matrix.shape[-1]} fits no {wanted})"
            counts[form + note] = counts.get(form + note, 0) + 1
        lines = [f"{bytes_of(model) / 2**20:.1f} MiB of weights in memory"]
        if self._installed is not None and self.settings["originals"] == "keep":
            kept = sum(data.nbytes for data in self._installed[1].originals.kept.values())
            lines.append(f"{kept / 2**20:.1f} MiB of originals in memory besides")
        if self._installed is not None and self.settings["backend"] == "bitsandbytes":
            form = "int8" if self.settings["bits"] == 8 else "NF4"
            lines.append(f"{len(self._installed[1].replaced)} weights in {form} of bitsandbytes")
        return "\n".join([*lines, *(f"{count} weights in {form}" for form, count in counts.items())])

    def _wanted(self, model, weight_name: str) -> str | None:
        if self._installed is None:
            return None
        bits = self._asked.get(weight_name.rpartition(".")[0])
        return f"int4 in groups of {self.settings['group_size']}" if bits == 4 else f"int{bits}"

    def _forms(self, target: Target, bits: int) -> dict[str, Form]:
        return {name: form_for(weight, bits, self.settings["group_size"]) for name, weight in target.weights()}

    def _bits_of_part(self, target: Target, tied: bool) -> int:
        own = self.settings["bits" if target.part == "decoder" else target.part]
        if own is None and target.part == "embedding" and self.settings["backend"] == "bitsandbytes":
            return PLAIN_BITS
        if own is not None:
            return own
        if target.part == "embedding":
            if not tied:
                return PLAIN_BITS
            head = self.settings["lm_head"]
            return self.settings["bits"] if head is None else head
        return self.settings["bits"]

    def _chosen_bits(self, targets: list[Target]) -> dict[str, int]:
        """Bits for each target by name, the ones of `layers` before the ones of its part."""
        layers, tied, names = self.settings["layers"] or {}, is_tied(targets), self._group_names(targets)
        unknown = sorted(set(layers) - {target.group for target in targets})
        if unknown:
            raise ValueError(f"layers names {unknown[0]!r}, which this model does not have; calibrate this model.")
        self._asked = {
            target.name: layers.get(names[target.name], self._bits_of_part(target, tied)) for target in targets
        }
        return self._asked


def bytes_of(model: nn.Module) -> int:
    """Bytes of a model's weights in memory, shared ones once."""
    seen = {}
    for tensor in (
        *model.parameters(),
        *(b for m in model.modules() if isinstance(m, PackedMatrix) for b in m.buffers()),
    ):
        seen[id(tensor)] = tensor.nbytes
    return sum(seen.values())


def _form_name(matrix: PackedMatrix) -> str:
    return "int8" if matrix.bits == 8 else f"int4 in groups of {matrix.shape[-1] // matrix.scale.shape[-1]}"


def _check_choice(name: str, value: Any, choices: tuple) -> None:
    if isinstance(value, bool) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def _checked_layers(layers: Mapping[str, int]) -> dict[str, int]:
    if not isinstance(layers, Mapping):
        raise ValueError(f"layers must be what calibrate returned, {{group: bits}}, got {layers!r}.")
    for group, bits in layers.items():
        _check_choice(f"layers[{group!r}]", bits, BITS)
    return dict(layers)


def _check_samples(samples: list, need_pictures: bool) -> None:
    if not samples:
        raise ValueError("calibrate needs at least one sample, got none; give inputs such as the processor returns.")
    for sample in samples:
        if not isinstance(sample, Mapping):
            raise TypeError(f"a sample must be a mapping of model inputs, got {type(sample).__name__}.")
    pictured = any(x.get(name) is not None for x in samples for name in ("pixel_values", "pixel_values_videos"))
    if need_pictures and not pictured:
        raise ValueError(
            "no sample holds pixel_values, so nothing says what packing the vision tower costs; give samples with "
            "pictures, or vision=16 and mergers=16 to leave it."
        )


def _require_plain(model) -> None:
    if packed_weights(model) or getattr(model, "hf_quantizer", None) is not None:
        raise ValueError("the model's weights are packed or quantized already; revert that first or load it again.")
