"""Decoder layers that share one set of weights, each with small adapters of its own."""

from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from ..technique_optim import Technique, refuse_unknown
from .layer_recycling_saving import RecyclingSaver, check_storage, decoder_of, linear_names, loaded_recycled
from .low_rank import LowRankLinear, fit_shared, is_low_rank, low_rank_factors


SHARED_CHOICES = ("fitted", "mean", "first", "last")


@dataclass(frozen=True)
class RecyclingReport:
    """What recycling saves and what it costs before any training.

    Attributes:
        bytes_before, bytes_after (`int`): of the parameters of all decoder layers, each shared one counted once.
        errors (`dict[int, float]`): for each recycled layer the Frobenius norm of what its weights lost, as a share of
            the norm of the weights; after calibration, of their products with the samples. 0 where a folder was
            loaded that had been saved shared.
    """

    bytes_before: int
    bytes_after: int
    errors: dict[int, float]

    @property
    def saved_share(self) -> float:
        return 1 - self.bytes_after / self.bytes_before

    def __str__(self) -> str:
        errors = ", ".join(f"{layer}: {error:.3f}" for layer, error in self.errors.items())
        return (
            f"decoder layers {self.bytes_before / 2**20:.1f} MiB -> {self.bytes_after / 2**20:.1f} MiB "
            f"({self.saved_share:.1%} saved); relative error by layer {errors}"
        )


class CrossLayerParameterRecycling(Technique):
    """Groups of decoder layers share one set of linear weights; each keeps low-rank adapters, norms and biases.

    Lossy, and poor before fine-tuning: `scripts/tiny/recycle_tiny.py` shows how. For saving memory, not time: the
    adapters add a few products. The adapters of a layer begin as the truncated singular value decomposition of what
    the shared weight lacks. Source: Bae et al., "Relaxed Recursive Transformers", arXiv 2410.20672; differs in that a
    group need not be the whole decoder, norms are not shared, the shared weight is by default fitted together with the
    adapters, and errors count by the layers' real inputs once `calibrate` has seen some. That is worth about a hundred
    steps of fine-tuning, and samples should look like later use: what no sample shows, pictures among it, is not kept.

    Trainable as it is (shared weights, adapters and norms are parameters) or with PEFT on top, whose adapters must not
    be merged into the shared weights. `save_pretrained` writes a stock checkpoint with the weights expanded and the
    technique left out of its profile; with `storage="shared"`, here or as an argument of `save_pretrained`, one that
    holds shared tensors once, which `from_pretrained` of this package loads and any other refuses. `revert` gives the
    very modules from before `apply`; after `release()`, or in a model that was loaded shared, plain layers with
    expanded weights.

    Args:
        config: accepted and not read.
        groups (`list[list[int]]`, *optional*): decoder layers by index, at least two a group, each layer in one group
            at most. Neighbouring pairs by default.
        rank (`int`): of the adapters, at least 1.
        shared (`str`): what the shared weight begins as: "fitted", or the group's "mean", "first" or "last" layer.
        storage (`str`): what `save_pretrained` writes: "expanded" or "shared".
        keep_originals (`bool`): hold the original modules for `revert`; without them memory is freed at once.
    Raises:
        ValueError: for an unknown setting, a rank below 1, groups that overlap or have one layer; on `apply` for
            layers that do not exist, differ in shape, hold sparse experts or are already changed.
    """

    name = "layer_recycling"
    exact = False

    def __init__(
        self, config=None, groups=None, rank=16, shared="fitted", storage="expanded", keep_originals=True, **unknown
    ):
        refuse_unknown(self.name, unknown, ("groups", "rank", "shared", "storage", "keep_originals"))
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise ValueError(f"rank must be a whole number of at least 1, got {rank!r}.")
        if shared not in SHARED_CHOICES:
            raise ValueError(f"shared must be one of {', '.join(SHARED_CHOICES)}, got {shared!r}.")
        check_storage(storage)
        groups = None if groups is None else _checked_groups(groups)
        super().__init__(groups=groups, rank=rank, shared=shared, storage=storage, keep_originals=keep_originals)
        self.report: RecyclingReport | None = None
        self._originals: list[tuple[nn.Module, str, nn.Module]] = []
        self._moments: dict[tuple[int, str], torch.Tensor] = {}
        self._groups: list[list[int]] | None = None
        self._saver: RecyclingSaver | None = None

    def calibrate(self, model, batches) -> None:
        """Runs the plain model on `batches`, an iterable of its keyword arguments, and notes what its layers see.

        Before `apply`. Holds a float32 matrix (in, in) for every linear layer that is to be shared.

        Raises:
            ValueError: if already applied, or for no batches.
        """
        with self.collecting(model), torch.no_grad():
            for batch in batches:
                model(**batch)
        if not self._moments:
            raise ValueError("calibration needs at least one batch of model inputs; got none.")

    @contextmanager
    def collecting(self, model):
        """What [`calibrate`] notes, of whatever runs through the decoder's layers inside the `with` block."""
        if self._groups is not None:
            raise ValueError(f"{self.name} is already applied; calibrate the plain model.")
        layers = decoder_of(model).layers
        groups = self.settings["groups"] or _neighbouring_pairs(len(layers))
        _check_layers(layers, groups)
        handles = []
        for layer in (layer for group in groups for layer in group):
            for name in linear_names(layers[layer]):
                linear = layers[layer].get_submodule(name)
                handles.append(linear.register_forward_pre_hook(partial(self._note, (layer, name))))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def _note(self, key: tuple[int, str], module: nn.Module, args: tuple) -> None:
        seen = args[0].reshape(-1, args[0].shape[-1]).float()
        self._moments[key] = self._moments.get(key, 0) + seen.T @ seen

    def apply(self, model) -> None:
        """Changes `model` in place and fills `report`."""
        if self._groups is not None:
            raise ValueError(f"{self.name} is already applied; revert it first.")
        layers = decoder_of(model).layers
        already = loaded_recycled(model)
        if already is None:
            groups = self.settings["groups"] or _neighbouring_pairs(len(layers))
            _check_layers(layers, groups)
        else:
            groups = self._fitting(already)
        before = sum(p.numel() * p.element_size() for p in layers.parameters())
        if already is not None:
            before += _shared_bytes(layers, groups)
        errors = {} if already is None else {layer: 0.0 for group in groups for layer in group}
        for group in groups if already is None else ():
            errors |= self._share(layers, group)
        self._groups = groups
        after = sum(p.numel() * p.element_size() for p in layers.parameters())
        self.report = RecyclingReport(before, after, errors)
        self._saver = already or RecyclingSaver(model, groups, self.settings["storage"])
        self._saver.storage, self._saver.owned = self.settings["storage"], True
        if not self.settings["keep_originals"]:
            self.release()

    def revert(self, model) -> None:
        """Puts the original modules back, or after `release` plain ones with the expanded weights."""
        if self._groups is None:
            return
        for parent, name, original in self._originals or _expanded_layers(decoder_of(model).layers):
            setattr(parent, name, original)
        self._saver.remove()
        self._originals, self._groups, self.report, self._saver = [], None, None, None

    def release(self) -> None:
        """Lets go of the original modules, which frees their memory; `revert` then expands what is there."""
        self._originals = []

    def describe(self) -> str:
        """Groups, bytes saved and the error of each layer, in words."""
        if self.report is None:
            return f"{self.name}: not applied."
        groups = ", ".join("+".join(map(str, group)) for group in self._groups)
        return f"{self.name}: layers {groups} share weights, adapters of rank {self.settings['rank']}; {self.report}."

    def _fitting(self, already: RecyclingSaver) -> list[list[int]]:
        """The groups of a model that was loaded shared, if the settings ask for no others."""
        groups, rank = already.groups, already.rank
        if self.settings["groups"] not in (None, groups) or self.settings["rank"] != rank:
            raise ValueError(
                f"the model was loaded with layers {groups} recycled at rank {rank}, which its weights cannot change; "
                "leave groups and rank of layer_recycling at that, or load the checkpoint they were made from."
            )
        return groups

    @torch.no_grad()
    def _share(self, layers: nn.ModuleList, group: list[int]) -> dict[int, float]:
        """Puts shared layers in the place of one group's; the relative error of each layer."""
        lost = dict.fromkeys(group, 0.0)
        norms = dict.fromkeys(group, 0.0)
        for name in linear_names(layers[group[0]]):
            linears = [layers[layer].get_submodule(name) for layer in group]
            moments = [self._moments[layer, name] for layer in group] if self._moments else None
            shared = nn.Parameter(self._begin(linears, moments), requires_grad=linears[0].weight.requires_grad)
            for place, (layer, linear) in enumerate(zip(group, linears, strict=True)):
                weight, moment = linear.weight.float(), moments[place] if moments else None
                factors = low_rank_factors(weight - shared.float(), self.settings["rank"], moment)
                down, up = (factor.to(linear.weight.dtype) for factor in factors)
                recycled = LowRankLinear(shared, down, up, linear.bias).train(linear.training)
                lost[layer] += _energy(weight - recycled.expanded().float(), moment)
                norms[layer] += _energy(weight, moment)
                self._replace(layers[layer], name, recycled)
        return {layer: (lost[layer] / norms[layer]) ** 0.5 for layer in group}

    def _begin(self, linears: list[nn.Linear], moments: list[torch.Tensor] | None) -> torch.Tensor:
        """The shared weight (out, in) before training."""
        weights, dtype = [linear.weight.detach() for linear in linears], linears[0].weight.dtype
        if self.settings["shared"] == "fitted":
            return fit_shared(weights, self.settings["rank"], moments).to(dtype)
        if self.settings["shared"] == "mean":
            return torch.stack([weight.float() for weight in weights]).mean(0).to(dtype)
        return weights[0 if self.settings["shared"] == "first" else -1].clone()

    def _replace(self, layer: nn.Module, name: str, recycled: LowRankLinear) -> None:
        parent_name, _, attribute = name.rpartition(".")
        parent = layer.get_submodule(parent_name)
        self._originals.append((parent, attribute, getattr(parent, attribute)))
        setattr(parent, attribute, recycled)


def _energy(weight: torch.Tensor, moment: torch.Tensor | None) -> float:
    """The squared norm of a weight (out, in), or of its products with inputs of this moment."""
    return float(((weight if moment is None else weight @ moment) * weight).sum())


def _checked_groups(groups) -> list[list[int]]:
    try:
        groups = [[int(layer) for layer in group] for group in groups]
    except (TypeError, ValueError):
        raise ValueError(f"groups must be lists of layer indices such as [[0, 1], [2, 3]], got {groups!r}.") from None
    if not groups or any(len(group) < 2 for group in groups):
        raise ValueError(f"every group needs at least two layers, got {groups}; leave single layers out.")
    named = [layer for group in groups for layer in group]
    if len(set(named)) < len(named):
        raise ValueError(f"a layer stands in two places of the groups {groups}; name each at most once.")
    return groups


def _neighbouring_pairs(layers: int) -> list[list[int]]:
    if layers < 2:
        raise ValueError(f"recycling needs at least two decoder layers, the model has {layers}.")
    return [[first, first + 1] for first in range(0, layers - 1, 2)]


def _check_layers(layers: nn.ModuleList, groups: list[list[int]]) -> None:
    """Raises a `ValueError` for groups that these layers cannot form."""
    for layer in (layer for group in groups for layer in group):
        if not 0 <= layer < len(layers):
            raise ValueError(f"layer {layer} does not exist; the decoder has layers 0 to {len(layers) - 1}.")
        _check_linears(layer, layers[layer])
    for group in groups:
        shapes = [
            {name: tuple(layers[layer].get_submodule(name).weight.shape) for name in linear_names(layers[layer])}
            for layer in group
        ]
        for layer, found in zip(group, shapes, strict=True):
            if found != shapes[0]:
                name = next(n for n in [*found, *shapes[0]] if found.get(n) != shapes[0].get(n))
                raise ValueError(
                    f"layers {group[0]} and {layer} cannot share weights: {name} has shapes {shapes[0].get(name)} and "
                    f"{found.get(name)}; group layers of equal shape."
                )


def _check_linears(index: int, layer: nn.Module) -> None:
    for name, parameter in layer.named_parameters():
        if parameter.ndim > 2:
            raise ValueError(
                f"layer {index} holds sparse experts ({name} of shape {tuple(parameter.shape)}), which are not "
                "shared; leave such layers out of the groups."
            )
    for name in linear_names(layer):
        linear = layer.get_submodule(name)
        if type(linear) is not nn.Linear or type(linear.weight) is not nn.Parameter or "forward" in vars(linear):
            raise ValueError(
                f"layer {index} has {name} already changed ({type(linear).__name__}); apply layer_recycling before "
                "techniques that quantize, fuse or replace linear layers."
            )


def _shared_bytes(layers: nn.ModuleList, groups: list[list[int]]) -> int:
    """What plain layers would hold beyond these: a weight each, and no adapters."""
    total = 0
    for group in groups:
        for layer in group:
            for name in linear_names(layers[layer]):
                linear = layers[layer].get_submodule(name)
                size = linear.adapter_down.element_size()
                total += 0 if layer == group[0] else linear.weight.numel() * linear.weight.element_size()
                total -= size * (linear.adapter_down.numel() + linear.adapter_up.numel())
    return total


def _expanded_layers(layers: nn.ModuleList) -> list[tuple[nn.Module, str, nn.Module]]:
    """Parents, names and plain layers with the expanded weights, for every shared layer."""
    plain = []
    for parent in layers.modules():
        for name, child in parent.named_children():
            if is_low_rank(child):
                with torch.device("meta"):
                    made = nn.Linear(child.in_features, child.out_features, bias=False)
                made.weight = nn.Parameter(child.expanded(), requires_grad=child.weight.requires_grad)
                made.bias = child.bias
                plain.append((parent, name, made.train(child.training)))
    return plain
