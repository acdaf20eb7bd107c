"""What techniques cost in right answers: `scripts/evaluate --techniques`.

The same held-out questions, one run a profile. Prompts here have a few hundred tokens, so the sparse techniques get
small blocks; their defaults would compute everything. Writes `docs/bench/quality.json` and a plot.
"""

import json
import math
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from textwrap import fill

import numpy as np

from qwen3_vl.configuration.profile_presets import PRESETS
from qwen3_vl.configuration.profile_qwen3_vl import UnifiedConfig

from .data_evaluation import TASKS, draw_question, evaluation_set
from .data_material import REPOSITORY, load_material
from .evaluate import evaluate_model, load_checkpoint, make_inputs


SMALL_BLOCKS = {"query_block": 16, "key_block": 16, "window_tokens": 8}
DYNAMIC = {**SMALL_BLOCKS, "stride": 8, "min_blocks": 1, "min_pages": 2, "dense_below_tokens": 0}
SMALL_PAGES = {"page_tokens": 8}
# Prompts here are shorter than the default window, so that nothing would be packed.
SMALL_GROUPS = {"group_size": 32, "residual_tokens": 1}
POLICIES = ("modality", "snapkv", "pyramid", "h2o", "streaming", "random")
# The larger pictures have 36 to 64 tokens and the others 4 to 16, which a picture of a preset keeps at least.
SMALL_PICTURES = {"min_tokens": 16}
# A quarter of the visual tokens, and everything else packed or left out; groups and blocks as small as prompts here.
COMPOSITION = {
    "token_merging": {"keep_ratio": 0.25, **SMALL_PICTURES},
    "adaptive_precision": {"bits": 4},
    "quantized_cache": {"bits": 4, **SMALL_GROUPS},
    "qwen3_vl_dynamic_sparse": {},
}
SPARSE = {**DYNAMIC, "threshold": 0.95, "decode_share": 0.5}
TOKEN_POLICIES = ("merge", "tome", "divprune", "fastv", "sparsevlm", "uniform", "random")
MEASURED = "measured"
CALIBRATION_STREAM, CALIBRATION_SAMPLES = 1_000_004, 6


def small_preset(name: str) -> dict:
    """The techniques of a preset, with groups of the cache and pictures that stay as small as things are here."""
    named = UnifiedConfig.from_preset(name).techniques()
    for technique, small in (("quantized_cache", SMALL_GROUPS), ("token_merging", SMALL_PICTURES)):
        if technique in named:
            named[technique] |= small
    return named


PROFILES = {
    "plain": {},
    "exact, paged cache, decode_linear": {"qwen3_vl_exact": {}, "paged_cache": {}, "decode_linear": {}},
    "memory-efficient": {"qwen3_vl_memory_efficient": {}},
    "block sparse": {"qwen3_vl_block_sparse": {**SMALL_BLOCKS, "sink_tokens": 4}},
    **{
        f"dynamic sparse, mass {threshold}, {share:.0%} of pages": {
            "qwen3_vl_dynamic_sparse": {**DYNAMIC, "threshold": threshold, "decode_share": share},
            "paged_cache": SMALL_PAGES,
        }
        for threshold, share in ((0.95, 0.5), (0.8, 0.25), (0.5, 0.125))
    },
    **{f"cache in {bits} bits": {"quantized_cache": {"bits": bits, **SMALL_GROUPS}} for bits in (8, 4, 2)},
    # All of them keep as many entries: the text and a quarter of what is visual.
    "evict 3/4 of visual, modality, layers measured": {"evicting_cache": {"layer_shares": MEASURED}},
    **{f"evict 3/4 of visual, {policy}": {"evicting_cache": {"policy": policy}} for policy in POLICIES},
    "evict 3/4 of visual, modality, dropped": {"evicting_cache": {"merge": False}},
    "evict 3/4 of visual, modality, in 4 bits": {
        "evicting_cache": {"store": "quantized", "store_options": {"bits": 4, **SMALL_GROUPS}}
    },
    **{
        f"{share:.0%} of visual tokens, {policy}": {"token_merging": {"policy": policy, "keep_ratio": share}}
        for share in (0.25, 0.1)
        for policy in TOKEN_POLICIES
    },
    "repeated patches": {"repeated_patches": {}},
    **{f"weights in {bits} bits": {"adaptive_precision": {"bits": bits}} for bits in (8, 4)},
    **{name: small_preset(name) for name in PRESETS},
    # Prompts here are short enough for attention to compute everything, and with small blocks it does not.
    "composition": COMPOSITION,
    "composition, small blocks": {**COMPOSITION, "qwen3_vl_dynamic_sparse": SPARSE},
}
COLUMNS = {
    "emoji_twemoji": "emoji",
    "text_characters": "text, by character",
    "digit": "digit",
    "scenes": "all scenes",
    "which_9_16": "which of 9 to 16",
    "long": "larger pictures",
    "long_text": "text on larger pictures",
}
LONGEST_TASK, DENSITY_SAMPLES = "which_9_16", 12


def measure_profiles(folder: str, names: Iterable[str], limit: int | None = None) -> dict[str, dict]:
    """Rows of [`evaluate_model`] for the profiles of these names, all on one model."""
    from qwen3_vl import UnifiedOptimizationManager

    model, processor = load_checkpoint(folder)
    results = {}
    for name in names:
        profile = with_measured_layers(PROFILES[name], model, processor)
        with UnifiedOptimizationManager(model, profile):
            results[name] = evaluate_model(model, processor, limit=limit)["rows"]
            results[name]["density"] = measure_density(model, processor)
        print_row(name, results)
    return results


def with_measured_layers(profile: dict, model, processor) -> dict:
    """`profile`, where `layer_shares` are measured on questions like those of the evaluation but other ones."""
    from qwen3_vl import measure_layer_shares

    if all(settings.get("layer_shares") != MEASURED for settings in profile.values()):
        return profile
    material = load_material()
    batches = []
    for row, task in enumerate(TASKS):
        rngs = [np.random.default_rng([CALIBRATION_STREAM, row, i]) for i in range(CALIBRATION_SAMPLES)]
        batches.append(dict(make_inputs(processor, [draw_question(rng, task, material) for rng in rngs])))
    shares = measure_layer_shares(model, batches)
    print(f"layer shares: {', '.join(f'{share:.2f}' for share in shares)}", flush=True)
    return {name: {**settings, "layer_shares": shares} for name, settings in profile.items()}


def measure_density(model, processor) -> dict[str, float]:
    """Share of the causal pairs that dynamic sparse attention computes on the longest prompts; empty for others."""
    from qwen3_vl import DynamicSparseAttention

    inputs = make_inputs(processor, evaluation_set(LONGEST_TASK, None, DENSITY_SAMPLES))
    shares = {}
    for phase, new_tokens in (("prefill", 1), ("decode", 4)):
        model.generate(**inputs, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False)
        layers = DynamicSparseAttention.last_density(model)
        if layers:
            shares[phase] = sum(layers) / len(layers)
    return shares


def print_row(name: str, results: dict[str, dict]) -> None:
    rows = results[name]
    cells = [f"{label} {100 * rows[key]['accuracy']:.1f} %" for key, label in COLUMNS.items() if key in rows]
    computed = [f"{phase} {100 * share:.0f} % computed" for phase, share in rows["density"].items()]
    print(f"{name}: {', '.join(cells + computed)}", flush=True)


def draw_profiles(results: dict[str, dict], path: Path) -> None:
    """Points lost against the plain model by kind of question, with the standard error of the difference."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    plain, names = results["plain"], [name for name in results if name != "plain"]
    columns = {key: label for key, label in COLUMNS.items() if key in plain}
    size = (1.7 * len(columns) + 4, 0.28 * len(names) + 1.6)
    figure, axes = pyplot.subplots(1, len(columns), figsize=size, sharey=True, layout="constrained")
    for axis, (key, label) in zip(axes, columns.items(), strict=True):
        changes = [100 * (results[name][key]["accuracy"] - plain[key]["accuracy"]) for name in names]
        share, count = plain[key]["accuracy"], plain[key]["n"]
        noise = 100 * math.sqrt(2 * share * (1 - share) / count)
        axis.axvspan(-noise, noise, color="#dddddd", label="standard error of two independent runs")
        axis.barh(names[::-1], changes[::-1], color=["#4c72b0" if x >= -noise else "#c44e52" for x in changes[::-1]])
        axis.axvline(0, color="#333333", linewidth=0.8)
        axis.set_title(f"{fill(label, 16)}\nplain {100 * share:.1f} %", fontsize=10)
        axis.margins(y=0.01)
        axis.set_xlabel("points")
    figure.suptitle("Right answers on the tiny checkpoint, change against the plain model")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def report_techniques(
    folder: str, limit: int | None = None, only: str | None = None, out: Path = REPOSITORY / "docs" / "bench"
) -> None:
    """Measures and writes; with `only`, a pattern for names as of a shell, the other rows stay as they were."""
    path = out / "quality.json"
    kept = {} if only is None or not path.exists() else json.loads(path.read_text())["results"]
    named = [name for name in PROFILES if only is None or fnmatch(name, only)]
    if not named:
        raise SystemExit(f"no profile is called {only!r}; there are {', '.join(map(repr, PROFILES))}.")
    names = named if "plain" in named or "plain" in kept else ["plain", *named]  # which the plot compares with
    measured = {**kept, **measure_profiles(folder, names, limit)}
    results = {name: measured[name] for name in PROFILES if name in measured}
    path.write_text(json.dumps({"profiles": PROFILES, "results": results}, indent=1, ensure_ascii=False) + "\n")
    draw_profiles(results, out / "quality.png")
    print(f"wrote {path} and quality.png")
