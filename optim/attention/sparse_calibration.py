"""Budgets of sparse attention for each layer and head, from how the attention mass lies in samples of one's own."""

from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional

from ..technique_optim import Technique
from .attention_dynamic_sparse import DynamicSparseAttention, DynamicSparseSettings, estimate_mass, pages_to_read
from .attention_exact import exact_attention_forward
from .attention_layout import AttentionLayout, check_layout, register_attention
from .attention_technique import AttentionTechnique, attention_modules, put_settings, refuse_dense_mask, settings_of
from .block_map import anchor_blocks, blocks_of, visible_pairs
from .block_selection import page_bounds, select_blocks, select_pages
from .page_scores import page_scores


PROBE = "qwen3_vl_mass_probe"
BUDGETED = ("threshold", "decode_share")
THRESHOLDS = (0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99, 0.995, 1.0)
DECODE_SHARES = (0.02, 0.03, 0.05, 0.08, 0.125, 0.18, 0.25, 0.35, 0.5, 0.7, 1.0)
# Last tokens of a sample, which stand for what will be decoded.
DECODE_TOKENS = 16
# Scores that exist at a time, of all heads.
SCORES_AT_ONCE = 2**23


class AdaptiveSparse(Technique):
    """Dynamic sparse attention with a budget for every layer and head, calibrated on samples.

    Heads differ: some look at a few blocks of keys, some at all. `calibrate` measures, for every head, how much of the
    exact attention mass the selection of [`DynamicSparseAttention`] keeps at each threshold (decoding: at each share
    of pages), and takes the smallest that keeps `target_mass` on average; `apply` selects `qwen3_vl_dynamic_sparse`
    with those. Lossy: the target holds for inputs like the samples. Calibration costs about two dense forwards in
    float32, and memory that is linear in the length.

    Source: differs from the offline search of MInference 1.0 (arXiv 2407.02490, section 3.2), which gives each head a
    pattern, in that all heads keep the selection by content and differ in its threshold.

    Args:
        config: accepted and not read.
        target_mass (`float`): share of the attention mass that each head keeps, over 0 and below 1.
        budgets (*optional*): what `calibrate` returned, as a profile holds it.
        settings: fields of [`DynamicSparseSettings`] other than `threshold` and `decode_share`, which are calibrated.
    Raises:
        ValueError: for an unknown or invalid setting.
    """

    name = "adaptive_sparse"
    exact = False
    role = "attention"

    def __init__(self, config=None, target_mass: float = 0.95, budgets: Mapping | None = None, **settings: Any):
        if isinstance(target_mass, bool) or not isinstance(target_mass, float) or not 0 < target_mass < 1:
            raise ValueError(f"target_mass must be a share over 0 and below 1, got {target_mass!r}.")
        fixed = [name for name in BUDGETED if name in settings]
        if fixed:
            raise ValueError(f"{fixed[0]} is what {self.name} calibrates; leave it out or use DynamicSparseAttention.")
        self._dynamic = DynamicSparseAttention(**settings)
        budgets = None if budgets is None else _checked_budgets(budgets)
        super().__init__(target_mass=target_mass, budgets=budgets, **settings)
        self.coverage: dict[str, dict[str, list[float]]] = {}

    @torch.no_grad()
    def calibrate(
        self, model, samples: Iterable[Mapping[str, Any]], profile: MutableMapping | None = None
    ) -> dict[str, dict[str, list[float]]]:
        """Measures attention mass on samples and keeps the budgets that follow.

        What was measured stays in `coverage`, by layer and head: the mass that the budget keeps (`kept_mass`) and the
        share of the pairs that it computes (`density`), the mass of the first and the latest tokens (`anchors`) and,
        of visual tokens, that within the own picture or frame (`own_picture`), and the share of the pairs that would
        do for every block of queries if one knew its heaviest blocks of keys (`least_density`).

        Args:
            samples: inputs of the model, such as the processor gives; each longer than `dense_below_tokens`, as
                shorter ones are not computed sparsely and do not count.
            profile (`dict`, *optional*): gets this technique with its budgets, in place, ready for `config.optim`.
        Returns:
            `{layer: {"threshold": [one a head], "decode_share": [one a KV head]}}`, in numbers that JSON holds.
        Raises:
            ValueError: if no sample is long enough, or a mask is neither causal nor padding.
            TypeError: for samples that are no mappings.
        """
        recorder = _Recorder(self._dynamic.options, self.settings["target_mass"])
        probe = _MassProbe(recorder=recorder)
        probe.apply(model)
        try:
            for sample in samples:
                if not isinstance(sample, Mapping):
                    raise TypeError(f"a sample must be a mapping of model inputs, got {type(sample).__name__}.")
                inputs = {name: value for name, value in sample.items() if name not in ("labels", "use_cache")}
                model.base_model(**inputs, use_cache=False)
        finally:
            probe.revert(model)
        if not recorder.layers:
            raise ValueError(
                f"no sample is longer than dense_below_tokens={recorder.settings.dense_below_tokens} (the longest has "
                f"{recorder.longest}), so nothing would be sparse; give longer samples or a lower dense_below_tokens."
            )
        layers = sorted(recorder.layers.items())
        budgets = {str(layer): measured.budget(recorder.target) for layer, measured in layers}
        self.coverage = {str(layer): measured.summary(recorder.target) for layer, measured in layers}
        self.settings["budgets"] = budgets
        if profile is not None:
            profile[self.name] = dict(self.settings)
        return budgets

    def apply(self, model) -> None:
        """Selects `qwen3_vl_dynamic_sparse` and hands every decoder layer its budgets.

        Raises:
            ValueError: without budgets, or with those of a model of other layers or heads.
        """
        budgets = self.settings["budgets"]
        if budgets is None:
            raise ValueError(f"{self.name} has no budgets yet; call calibrate(model, samples) or pass budgets.")
        modules = {str(module.layer_idx): module for module in attention_modules(model) if module.is_causal}
        _check_fit(budgets, modules)
        self._dynamic.apply(model)
        for layer, budget in budgets.items():
            shares = {name: tuple(values) for name, values in budget.items()}
            module = modules[layer]
            put_settings(module, self._dynamic.name, replace(self._dynamic.options, **shares))

    def revert(self, model) -> None:
        self._dynamic.revert(model)


def _checked_budgets(budgets: Mapping) -> dict[str, dict[str, list[float]]]:
    if not isinstance(budgets, Mapping):
        raise ValueError(f"budgets must be what calibrate returned, got {budgets!r}.")
    checked = {}
    for layer, budget in budgets.items():
        fits = str(layer).isdecimal() and isinstance(budget, Mapping) and set(budget) == set(BUDGETED)
        if not fits or not all(_are_shares(budget[name]) for name in BUDGETED):
            raise ValueError(
                f"budgets of layer {layer!r} must hold shares over 0 and up to 1 under 'threshold' (one a head) and "
                f"'decode_share' (one a KV head), got {budget!r}; pass what calibrate returned."
            )
        checked[str(layer)] = {name: [float(share) for share in budget[name]] for name in BUDGETED}
    return checked


def _are_shares(values) -> bool:
    if not isinstance(values, list | tuple):
        return False
    return all(isinstance(share, int | float) and 0 < share <= 1 for share in values)


def _check_fit(budgets: Mapping, modules: Mapping) -> None:
    for layer, budget in budgets.items():
        if layer not in modules:
            raise ValueError(f"budgets are for layer {layer}, but the model has {len(modules)}; calibrate this model.")
        config = modules[layer].config
        heads = {"threshold": config.num_attention_heads, "decode_share": config.num_key_value_heads}
        for name, count in heads.items():
            if len(budget[name]) != count:
                raise ValueError(
                    f"layer {layer} has {count} heads for {name}, but the budget has {len(budget[name])}; calibrate "
                    "this model."
                )


class _LayerCoverage:
    """Sums, over the samples, of what a layer's heads keep; all in float64 on the host."""

    def __init__(self, kv_heads: int):
        self.kv_heads = kv_heads
        self.sums: dict[str, torch.Tensor] = {}
        self.counts: dict[str, float] = {}

    def add(self, name: str, values: torch.Tensor, count: float) -> None:
        """Adds sums (..., heads) over `count` queries."""
        values = values.detach().double().cpu()
        self.sums[name] = self.sums[name] + values if name in self.sums else values
        self.counts[name] = self.counts.get(name, 0.0) + float(count)

    def mean(self, name: str) -> torch.Tensor | None:
        if not self.counts.get(name):
            return None
        return self.sums[name] / self.counts[name]

    def chosen(self, name: str, target: float) -> torch.Tensor:
        """Index, for each head, of the smallest budget on the list that keeps the target; else of the last, all."""
        enough = self.mean(name) >= target
        enough[-1] = True
        return enough.int().argmax(0)  # the first one

    def budget(self, target: float) -> dict[str, list[float]]:
        heads = [THRESHOLDS[index] for index in self.chosen("kept", target).tolist()]
        if self.mean("kept_pages") is None:  # packed rows are nothing to decode from
            shares = [1.0] * self.kv_heads
        else:
            shares = [DECODE_SHARES[index] for index in self.chosen("kept_pages", target).tolist()]
        return {"threshold": heads, "decode_share": shares}

    def summary(self, target: float) -> dict[str, list[float]]:
        chosen = self.chosen("kept", target)[None]
        lines = {
            "kept_mass": self.mean("kept").gather(0, chosen)[0],
            "density": self.mean("density").gather(0, chosen)[0],
            "least_density": self.mean("least_density"),
            "anchors": self.mean("anchors"),
            "own_picture": self.mean("own_picture"),
        }
        if self.mean("kept_pages") is not None:
            lines["kept_mass_decoding"] = self.mean("kept_pages").gather(0, self.chosen("kept_pages", target)[None])[0]
        return {name: values.tolist() for name, values in lines.items() if values is not None}


class _Recorder:
    """Measures what the attention calls of a forward hold."""

    def __init__(self, settings: DynamicSparseSettings, target: float):
        self.settings, self.target = settings, target
        self.layers: dict[int, _LayerCoverage] = {}
        self.longest = 0

    def observe(self, layer: int, query, key, layout: AttentionLayout, scaling: float, visual_runs) -> None:
        queries = query.shape[2]
        self.longest = max(self.longest, queries)
        if queries <= self.settings.dense_below_tokens:
            return
        measured = self.layers.setdefault(layer, _LayerCoverage(key.shape[1]))
        blocks = self.settings.query_block, self.settings.key_block
        mass, own, visual = block_mass(query, key, layout, scaling, *blocks, visual_runs)
        self._add_blocks(measured, query, key, layout, scaling, mass)
        if visual:
            measured.add("own_picture", own, visual)
        if layout.segments is None:
            self._add_pages(measured, query, key, layout, scaling)

    def _add_blocks(self, measured: _LayerCoverage, query, key, layout, scaling: float, mass: torch.Tensor) -> None:
        settings, (queries, keys) = self.settings, (query.shape[2], key.shape[2])
        shape = queries, keys, settings.query_block, settings.key_block
        pairs = visible_pairs(layout, *shape, query.device)[:, None]
        count = float(mass.sum()) / query.shape[1]  # every real query has a mass of 1 in each head
        estimate = estimate_mass(query, key, layout, scaling, settings)
        kept, density = [], []
        for threshold in THRESHOLDS:
            chosen = select_blocks(
                estimate, layout, *shape, threshold, settings.min_blocks, settings.window_tokens
            ).mask | (threshold == 1.0)
            kept.append((mass * chosen).sum((0, 2, 3)))
            share = (pairs * chosen).sum((0, 2, 3)) / pairs.expand(len(mass), -1, -1, -1).sum()
            density.append(share * count)
        measured.add("kept", torch.stack(kept), count)
        measured.add("density", torch.stack(density), count)
        anchors = anchor_blocks(layout, *shape, 1, settings.window_tokens, query.device)
        measured.add("anchors", (mass * anchors[:, None]).sum((0, 2, 3)), count)
        measured.add("least_density", least_density(mass, pairs, self.target) * count, count)

    def _add_pages(self, measured: _LayerCoverage, query, key, layout: AttentionLayout, scaling: float) -> None:
        settings, keys = self.settings, key.shape[2]
        bounds = page_bounds(key, layout, settings.page_tokens)
        for token in range(max(0, query.shape[2] - DECODE_TOKENS), query.shape[2]):
            own = query[:, :, token : token + 1]
            step = AttentionLayout(layout.query_offset + token, layout.valid)
            mass, _, _ = block_mass(own, key, step, scaling, 1, settings.page_tokens)
            mass = mass[:, :, 0].unflatten(1, (key.shape[1], -1)).mean(2)  # (B, KV heads, pages)
            kept = []
            for share in DECODE_SHARES:
                pages = pages_to_read(
                    step.query_offset + 1, settings.page_tokens, replace(settings, decode_share=share)
                )
                if pages is None:
                    kept.append(mass.sum((0, 2)))
                    continue
                scores = page_scores(own, *bounds)
                sizes = own.shape[2], step, keys, settings.page_tokens
                chosen = select_pages(scores, *sizes, pages, settings.window_tokens)
                kept.append((mass * chosen.mask).sum((0, 2)))
            measured.add("kept_pages", torch.stack(kept), float(mass.sum()) / key.shape[1])


def block_mass(
    query: torch.Tensor,
    key: torch.Tensor,
    layout: AttentionLayout,
    scaling: float,
    query_block: int,
    key_block: int,
    visual_runs: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """The exact attention mass of every pair of blocks, summed over the real queries, in float32.

    A few queries at a time: no more than 8 million scores exist at once, or those of one query.

    Args:
        query, key (`torch.Tensor`): (B, H, T, D), (B, HK, S, D).
        visual_runs (`torch.Tensor`, *optional*): (B, S), the picture or frame of each token, 0 for text.
    Returns:
        mass (B, H, query blocks, key blocks); the mass (H,) that visual queries have within their own picture; and
        the number of visual queries.
    """
    (batch, heads, queries, _), (kv_heads, keys) = query.shape, key.shape[1:3]
    key = key.float().transpose(-1, -2)
    mass = query.new_zeros(
        batch, heads, blocks_of(queries, query_block), blocks_of(keys, key_block), dtype=torch.float32
    )
    own, visual = mass.new_zeros(heads), 0
    at_once = max(1, SCORES_AT_ONCE // (batch * heads * keys))
    for first in range(0, queries, at_once):
        part = query[:, :, first : first + at_once].unflatten(1, (kv_heads, -1)).flatten(2, 3).float()
        count = min(at_once, queries - first)
        rows = slice(layout.query_offset + first, layout.query_offset + first + count)
        seen = layout.dense(count, keys, query.device, first)
        if layout.valid is not None:
            seen = seen & layout.valid[:, None, rows, None]  # what padding sees counts for nothing
        scores = (part @ key).mul_(scaling).view(batch, heads, count, keys)
        share = scores.masked_fill_(~seen, float("-inf")).softmax(-1)
        share = share.masked_fill_(~seen.any(-1, keepdim=True), 0.0)
        by_block = functional.pad(share, (0, mass.shape[3] * key_block - keys)).unflatten(3, (-1, key_block)).sum(-1)
        blocks = torch.arange(first, first + count, device=query.device) // query_block
        mass.index_add_(2, blocks, by_block)
        if visual_runs is not None:
            asking = visual_runs[:, rows, None]
            same = (asking == visual_runs[:, None, :keys]) & (asking > 0)
            own += (share * same[:, None]).sum((0, 2, 3))
            visual += int((asking > 0).sum())
    return mass, own, visual


def least_density(mass: torch.Tensor, pairs: torch.Tensor, target: float) -> torch.Tensor:
    """The share of the pairs (H,) in the heaviest key blocks that hold the target for every query block.

    Args:
        mass (`torch.Tensor`): (B, H, query blocks, key blocks).
        pairs (`torch.Tensor`): (B or 1, 1, query blocks, key blocks), the pairs that may be computed.
    """
    pairs = pairs.expand_as(mass)
    heaviest, order = mass.sort(-1, descending=True)
    needed = heaviest.cumsum(-1) - heaviest < target * mass.sum(-1, keepdim=True)
    return (pairs.gather(-1, order) * needed).sum((0, 2, 3)) / pairs[:, 0].sum()


@dataclass(frozen=True)
class _ProbeSettings:
    recorder: _Recorder


class _MassProbe(AttentionTechnique):
    """Exact attention of the decoder that shows its calls to a recorder."""

    name = PROBE
    exact = True
    settings_class = _ProbeSettings
    parts = ("text_config",)


def _probe_forward(
    module, query, key, value, attention_mask, scaling=None, dropout=0.0, is_causal=None, visual_runs=None, **kwargs
) -> tuple[torch.Tensor, None]:
    settings = settings_of(module, PROBE, None)
    if settings is not None:
        layout = check_layout(attention_mask, query, key, True)
        if isinstance(layout, torch.Tensor):
            refuse_dense_mask(PROBE, layout)
        factor = query.shape[-1] ** -0.5 if scaling is None else scaling
        settings.recorder.observe(module.layer_idx, query, key, layout, factor, visual_runs)
    return exact_attention_forward(module, query, key, value, attention_mask, scaling, 0.0, is_causal, **kwargs)


_probe_forward.reads_visual_runs = True
register_attention(PROBE, _probe_forward)
