"""The memory plan beside what a run really holds: weights, keys and values, and the resident peak.

`agreement` is planned over measured bytes, `activations` being all above the weights. Each side runs once, in a
process of its own; stock's is the same request with its own cache, at once.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import torch
from bench_measure import Side, make_record
from bench_settings import REPOSITORY, Settings


DTYPES = ("bfloat16",)
# One process a row, so that no row inherits another one's heap. The library's first use of every kernel, with a small
# prompt, is no part of a request and comes before.
PROGRAM = """
import json, sys, time
sys.path.insert(0, {bench!r})
import torch
from bench_measure import ResidentPeak, _release_heap
from bench_pair import build_pair, picture_inputs
from bench_settings import Settings
from qwen3_vl import ChunkedVision, KVCachingOptimization, MemoryRequest, SparseMemoryManager, VisualRules, plan_memory

# Called as `program ROW SIDE`.
row, threads = json.loads(sys.argv[1]), {threads}
torch.set_num_threads(threads)
settings = Settings("cpu", (row["dtype"],), 1, row["text_layers"], row["vision_layers"], row["quick"], False)
dtype = getattr(torch, row["dtype"])
side = sys.argv[2]
model = getattr(build_pair(settings, dtype, only_stock=side == "stock"), side)
model.set_attn_implementation(row["attention"] if side == "ours" else "sdpa")
images = [(16 * row["grid"][0], 16 * row["grid"][1])] * row["pictures"] if row["pictures"] else []
request = MemoryRequest(images, text_tokens=row["text_tokens"], new_tokens=row["new_tokens"])
rules = VisualRules(image_pixels=(1, 10**9))
free = plan_memory(model, request, rules=rules, cache=row["cache"])
budget = None if row["share"] is None else int(free.weights_total + row["share"] * (free.peak - free.weights_total))
plan = plan_memory(model, request, budget, rules=rules, cache=row["cache"])

techniques, options = [], {{"max_new_tokens": row["new_tokens"]}}
if side == "ours":
    techniques, options = [KVCachingOptimization(cache=plan.cache)], plan.generate_options()
if side == "ours" and plan.max_patches is not None:
    techniques.append(ChunkedVision(max_patches=plan.max_patches))
options = dict(options, min_new_tokens=row["new_tokens"], do_sample=False)
model.active_techniques = techniques
with torch.inference_mode():
    small = picture_inputs(settings, torch.float32, text_tokens=16, grid=(4, 4))
    model.generate(**small, max_new_tokens=2, do_sample=False)
    for technique in techniques:
        technique.apply(model)
    _release_heap()
    with ResidentPeak(0.001) as peak:
        inputs = picture_inputs(settings, torch.float32, text_tokens=row["text_tokens"], grid=row["grid"])
        repeated = inputs["input_ids"].shape[1] - row["text_tokens"]
        for name, value in inputs.items():
            by_token = name in ("input_ids", "attention_mask", "mm_token_type_ids")
            parts = value.split((repeated, row["text_tokens"]), dim=1) if by_token else (value, value[:0])
            inputs[name] = torch.cat((*[parts[0]] * max(row["pictures"], 1), parts[1]), dim=int(by_token))
        started = time.perf_counter()
        cache = model.generate(**inputs, **options, return_dict_in_generate=True).past_key_values
        seconds = time.perf_counter() - started
tensors = [*model.parameters(), *model.buffers()]
weights = sum({{t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}}.values())
held = SparseMemoryManager(config=model.config).count(cache).bytes
above = peak.above_start_mib * 2**20
print(json.dumps({{"plan": plan.to_dict(), "weights": weights, "kv": held, "above": above, "ms": 1000 * seconds}}))
"""


def records(settings: Settings) -> Iterator[dict[str, Any]]:
    """Yields a record for each request: the times and peaks of both sides, and planned over measured bytes.

    `--rows` looks at attention and cache, such as `"qwen3_vl_exact, int4"`: the rest of a label is known afterwards.
    """
    stock: dict[tuple, dict[str, Any]] = {}
    for row in requests(settings):
        if settings.rows not in f"{row['attention']}, {row['cache']}":
            continue
        ours = _run(row, "ours")
        key = row["dtype"], row["text_tokens"], row["grid"]
        if key not in stock:
            stock[key] = _run({**row, "share": None, "cache": "dynamic"}, "stock")
        plan, measured = ours["plan"], ours["above"]
        planned = {
            "weights": plan["weights_total"],
            "kv": plan["kv_total"],
            "peak": plan["peak"],
            "activations": plan["peak"] - plan["weights_total"],
        }
        real = {
            "weights": ours["weights"],
            "kv": ours["kv"],
            "peak": measured + ours["weights"],
            "activations": measured,
        }
        sides = {"ours": Side([ours["ms"]], measured / 2**20)}
        sides["stock"] = Side([stock[key]["ms"]], stock[key]["above"] / 2**20)
        record = make_record(_label(row, plan), row, sides, {key: round(planned[key] / real[key], 3) for key in real})
        record["planned_mib"] = {name: round(size / 2**20, 2) for name, size in planned.items()}
        record["measured_mib"] = {name: round(size / 2**20, 2) for name, size in real.items()}
        yield record


def requests(settings: Settings) -> Iterator[dict[str, Any]]:
    """Text, pictures and both; stock's attention and ours; at once and in the steps that a smaller budget asks for."""
    sizes = [(4096, None, 0), (2048, (64, 64), 1), (256, (32, 32), 8)]
    if settings.quick:
        sizes = [(64, None, 0), (16, (4, 4), 2)]
    for dtype in settings.dtypes:
        for attention, cache in (("sdpa", "dynamic"), ("qwen3_vl_exact", "paged"), ("qwen3_vl_exact", "int4")):
            for text_tokens, grid, pictures in sizes:
                for share in (None, 0.7):
                    if share and (settings.quick or pictures == 1):  # a single picture cannot be cut
                        continue
                    yield {
                        "dtype": dtype,
                        "attention": attention,
                        "cache": cache,
                        "text_tokens": text_tokens,
                        "grid": grid,
                        "pictures": pictures,
                        "share": share,
                        "new_tokens": 8,
                        "text_layers": settings.text_layers,
                        "vision_layers": settings.vision_layers,
                        "quick": settings.quick,
                    }


def _run(row: dict[str, Any], side: str) -> dict[str, Any]:
    program = PROGRAM.format(bench=str(REPOSITORY / "scripts" / "bench"), threads=torch.get_num_threads())
    result = subprocess.run([sys.executable, "-c", program, json.dumps(row), side], capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{row} failed: {result.stderr.strip().splitlines()[-1]}")
    return json.loads(result.stdout.strip().splitlines()[-1])


def _label(row: dict[str, Any], plan: dict[str, Any]) -> str:
    picture = "" if row["grid"] is None else f", {row['pictures']} of {row['grid'][0] * 16}x{row['grid'][1] * 16}"
    steps = [f"prefill {plan['prefill_chunk']}"] * bool(plan["prefill_chunk"])
    steps += [f"vision {plan['max_patches']}"] * bool(plan["max_patches"])
    smaller = ["smaller budget"] * bool(row["share"])
    names = [row["attention"], row["cache"], *smaller, *steps, row["dtype"]]
    return f"{row['text_tokens']} tokens{picture}: " + ", ".join(names)
