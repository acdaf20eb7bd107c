"""What a run will take in memory, said before it, and the settings that make it fit a budget."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..attention.attention_mechanisms import ADAPTIVE, FORWARDS
from .memory_caches import CacheChoice, cache_choices, find_cache
from .memory_formulas import (
    PIXEL_BYTES,
    PhasePeak,
    decode_peak,
    heap_slack,
    prefill_peak,
    tower_output,
    tower_peak,
)
from .memory_request import MODALITIES, MemoryRequest, RequestSizes, VisualRules, measure_request
from .memory_shapes import ModelShapes, model_config, weight_bytes, weight_dtype
from .memory_units import format_bytes, parse_bytes


DEFAULT_ATTENTION = "qwen3_vl_exact"
PREFILL_CHUNKS = (None, 16384, 8192, 4096, 2048, 1024, 512, 256, 128)
VISION_CHUNKS = (None, 65536, 32768, 16384, 8192, 4096, 2048, 1024)
PHASES = ("vision", "prefill", "decode")


@dataclass(frozen=True)
class MemoryPlan:
    """The memory of one request in bytes, and the settings it holds for.

    Args:
        budget (`int`, *optional*): that it was made for.
        dtype, attention, cache (`str`): of weights and activations, of the attention, of [`CacheChoice`].
        prefill_chunk, max_patches (`int`, *optional*): tokens a prefill step, patches a run of the tower; `None` for
            all at once.
        weights (`dict`): bytes of the decoder (`text`) and the tower (`vision`).
        kv (`dict`): bytes of keys and values by modality; what is generated counts as text.
        inputs (`dict`): pixels that the caller holds, by modality.
        features (`dict`): what the tower gave, by modality; `generate()` keeps it until the end.
        activations (`dict`): bytes at the peak of each phase besides all of the above: `vision`, `prefill`, `decode`.
        slack (`dict`): what the CPU's heap and pages keep besides, of each phase.
        peaks (`dict`): all together, of each phase.
        sizes ([`RequestSizes`]): patches and tokens.
    """

    budget: int | None
    dtype: str
    attention: str
    cache: str
    prefill_chunk: int | None
    max_patches: int | None
    weights: dict[str, int]
    kv: dict[str, int]
    inputs: dict[str, int]
    features: dict[str, int]
    activations: dict[str, int]
    slack: dict[str, int]
    peaks: dict[str, int]
    sizes: RequestSizes
    request: MemoryRequest

    @property
    def peak(self) -> int:
        """The most bytes at any moment."""
        return max(self.peaks.values())

    @property
    def kv_total(self) -> int:
        return sum(self.kv.values())

    @property
    def weights_total(self) -> int:
        return sum(self.weights.values())

    @property
    def by_modality(self) -> dict[str, int]:
        """Keys, values, pixels and features of each modality."""
        return {name: self.kv[name] + self.inputs[name] + self.features[name] for name in MODALITIES}

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers and texts, for JSON."""
        return {**asdict(self), "peak": self.peak, "kv_total": self.kv_total, "weights_total": self.weights_total}

    def profile(self) -> dict[str, dict[str, Any]]:
        """What `optim=` of `from_pretrained` takes to apply the plan."""
        profile: dict[str, dict[str, Any]] = {}
        if self.cache != "dynamic":
            profile["kv_caching"] = {"cache": self.cache}
        if self.max_patches is not None:
            profile["chunked_vision"] = {"max_patches": self.max_patches}
        return profile

    def generate_options(self) -> dict[str, int]:
        """Keywords for `generate()`."""
        request = self.request
        options = {"max_new_tokens": request.new_tokens}
        if self.prefill_chunk is not None:
            options["prefill_chunk_size"] = self.prefill_chunk
        others = {"num_beams": request.num_beams, "num_return_sequences": request.num_return_sequences}
        return {**options, **{name: value for name, value in others.items() if value > 1}}

    def lines(self, model_name: str) -> list[str]:
        """Lines of Python that apply the plan."""
        profile = self.profile()
        optim = f", optim={profile}" if profile else ""
        options = ", ".join(f"{name}={value}" for name, value in self.generate_options().items())
        return [
            "import qwen3_vl",
            "from transformers import AutoModelForImageTextToText",
            f'model = AutoModelForImageTextToText.from_pretrained("{model_name}", dtype="{self.dtype}", '
            f'attn_implementation="{self.attention}"{optim})',
            f"model.generate(**inputs, {options})",
        ]


def plan_memory(
    model: Any,
    request: MemoryRequest | None = None,
    budget: int | str | None = None,
    *,
    rules: VisualRules | None = None,
    attention: str | None = None,
    cache: str | None = None,
    lossy: bool = True,
    device: str | None = None,
) -> MemoryPlan:
    """Says what a request takes, and picks the best settings that fit a budget.

    Tried in this order, and the first that fits is taken: the exact cache, then 8, 4 and 2 bits; weights as they are,
    then, for a configuration, bfloat16 in place of float32; the tower and the prefill at once, then in smaller parts.

    Args:
        model: a model, or its configuration alone; weights need not be there (meta device).
        request ([`MemoryRequest`], *optional*): the default one if left out.
        budget (`int` or `str`, *optional*): bytes, or `"8GB"`; without one, nothing is made smaller.
        rules ([`VisualRules`], *optional*): of the processors; by default those of the released checkpoints.
        attention (`str`, *optional*): its implementation; by default a model's own, `qwen3_vl_exact` for a
            configuration.
        cache (`str`, *optional*): one of `CACHES`, in place of a choice.
        lossy (`bool`): whether settings that change results may be picked, default true.
        device (`str`, *optional*): `cpu`, `cuda` ...; by default a model's own, `cpu` for a configuration.
    Raises:
        ValueError: for a budget that is no amount above 0, an unknown cache or attention, or another kind of model.
        MemoryError: if nothing fits; it names the least that is needed.
    """
    config = model_config(model)
    ModelShapes.of_config(config)  # says what is wrong with another kind of model before anything else does
    limit = None if budget is None else parse_bytes(budget)
    least: MemoryPlan | None = None
    sizes = measure_request(request or MemoryRequest(), rules or VisualRules.of_config(config))
    for counter in _counters(model, config, request or MemoryRequest(), sizes, attention, cache, lossy, device):
        plan = counter.fit(limit)
        if limit is None or plan.peak <= limit:
            return plan
        least = plan if least is None or plan.peak < least.peak else least
    raise MemoryError(_nothing_fits(least, limit))


def _counters(model, config, request, sizes, attention, cache, lossy, device) -> Iterator["_Counter"]:
    is_model = isinstance(model, torch.nn.Module)
    if attention is None:
        attention = config.get_text_config()._attn_implementation if is_model else DEFAULT_ATTENTION
        attention = attention or "sdpa"
    _check_attention(attention)
    if device is None:
        device = model.device.type if is_model else "cpu"
    shapes = ModelShapes.of_config(config)
    own = weight_dtype(model)
    # A model that is built already keeps its precision.
    lower = lossy and own == torch.float32 and not is_model
    dtypes = [own, torch.bfloat16] if lower else [own]
    choices = cache_choices(attention, lossy, shapes.head_dim) if cache is None else [find_cache(cache)]
    for choice in choices:
        for dtype in dtypes:
            weights = weight_bytes(model, dtype.itemsize)
            yield _Counter(shapes, request, sizes, dtype, attention, choice, device, weights)


@dataclass
class _Counter:
    """Counts one kind of cache and precision, for any sizes of chunks."""

    shapes: ModelShapes
    request: MemoryRequest
    sizes: RequestSizes
    dtype: torch.dtype
    attention: str
    cache: CacheChoice
    device: str
    weights: tuple[int, int]

    def fit(self, limit: int | None) -> MemoryPlan:
        """The plan with the largest chunks that fit, or the smallest plan of all if none does."""
        towers = [(size, self._tower(size)) for size in self._vision_ladder()]
        prefills = [(size, self._prefill(size)) for size in self._prefill_ladder()]
        max_patches, tower = _first_that_fits(towers, limit, self._before_prefill())
        ground = self._base() + self._kv(self.sizes.prompt) + self._rounding(self.sizes.prompt)
        chunk, prefill = _first_that_fits(prefills, limit, ground)
        return self._plan(limit, chunk, max_patches, tower, prefill)

    def _plan(self, limit, chunk, max_patches, tower: PhasePeak, prefill: PhasePeak) -> MemoryPlan:
        phases = dict(zip(PHASES, (tower, prefill, self._decode()), strict=True))
        ground = {
            "vision": self._before_prefill(),
            "prefill": self._base() + self._kv(self.sizes.prompt),
            "decode": self._base() + self._kv(self.sizes.cached),
        }
        tokens = {"vision": 0, "prefill": self.sizes.prompt, "decode": self.sizes.cached}
        slack = {name: self._slack(peak) + self._rounding(tokens[name]) for name, peak in phases.items()}
        return MemoryPlan(
            budget=limit,
            dtype=str(self.dtype).removeprefix("torch."),
            attention=self.attention,
            cache=self.cache.name,
            prefill_chunk=chunk,
            max_patches=max_patches,
            weights=dict(zip(("text", "vision"), self.weights, strict=True)),
            kv=self._kv_by_modality(),
            inputs={name: self._pixels(name) for name in MODALITIES},
            features={name: self._features(name) for name in MODALITIES},
            activations={name: peak.bytes for name, peak in phases.items()},
            slack=slack,
            peaks={name: ground[name] + peak.bytes + slack[name] for name, peak in phases.items()},
            sizes=self.sizes,
            request=self.request,
        )

    def _vision_ladder(self) -> list[int | None]:
        patches = self.request.batch_size * max(self.sizes.patches("image"), self.sizes.patches("video"))
        smallest = self.sizes.largest_frame
        steps = [size for size in VISION_CHUNKS if size is None or smallest < size < patches]
        return [*steps, smallest] if 0 < smallest < patches else steps

    def _prefill_ladder(self) -> list[int | None]:
        return [size for size in PREFILL_CHUNKS if size is None or size < self.sizes.prompt]

    def _before_prefill(self) -> int:
        return sum(self.weights) + sum(self._pixels(name) for name in MODALITIES)

    def _base(self) -> int:
        return self._before_prefill() + sum(self._features(name) for name in MODALITIES)

    def _pixels(self, modality: str) -> int:
        return self.request.batch_size * self.sizes.patches(modality) * self.shapes.pixel_width * PIXEL_BYTES

    def _features(self, modality: str) -> int:
        patches, itemsize = self.sizes.patches(modality), self.dtype.itemsize
        once = self.request.batch_size * tower_output(self.shapes, patches, itemsize)
        tokens = patches // self.shapes.merge * self.shapes.hidden * (1 + self.shapes.deepstack) * itemsize
        return once + (self.request.rows - self.request.batch_size) * tokens

    def _tower(self, max_patches: int | None) -> PhasePeak:
        """Pictures first, then videos while the pictures' features are held."""
        peaks, held = [], 0
        for modality, grids in (("image", self.sizes.image_grids), ("video", self.sizes.video_grids)):
            peak = tower_peak(
                self.shapes, grids * self.request.batch_size, self.dtype.itemsize, max_patches, self.attention
            )
            peaks.append(PhasePeak(held + peak.bytes, peak.largest_block))
            held += self.request.batch_size * tower_output(
                self.shapes, self.sizes.patches(modality), self.dtype.itemsize
            )
        return max(peaks, key=lambda peak: peak.bytes)

    def _prefill(self, chunk: int | None) -> PhasePeak:
        return prefill_peak(
            self.shapes, self.sizes, self.request.rows, self.dtype.itemsize, chunk, self.attention, self.cache.name
        )

    def _decode(self) -> PhasePeak:
        return decode_peak(
            self.shapes, self.sizes, self.request.rows, self.dtype.itemsize, self.attention, self.cache.name
        )

    def _kv(self, tokens: int) -> int:
        return self.cache.bytes_held(self.shapes, self.request.rows, tokens, self.dtype.itemsize)

    def _kv_by_modality(self) -> dict[str, int]:
        total = self._kv(self.sizes.cached)
        shares = {name: total * getattr(self.sizes, name) // self.sizes.cached for name in ("image", "video")}
        return {"text": total - sum(shares.values()), **shares}

    def _rounding(self, tokens: int) -> int:
        if self.device != "cpu":
            return 0
        return self.cache.rounding(self.shapes, self.request.rows, tokens, self.dtype.itemsize)

    def _slack(self, peak: PhasePeak) -> int:
        return heap_slack(peak.largest_block) if self.device == "cpu" else 0


def _check_attention(name: str) -> None:
    # Ours are named besides, since they are registered only once the model or a technique was imported.
    known = ["eager", *FORWARDS, ADAPTIVE, *ALL_ATTENTION_FUNCTIONS.keys()]
    if name in known or "/" in name:  # with a slash it is a kernel of the Hub
        return
    nearest = get_close_matches(name, known, n=1)
    hint = f"did you mean {nearest[0]!r}?" if nearest else "qwen3_vl_exact, sdpa and eager are some that are."
    raise ValueError(f"attention {name!r} is not known; {hint}")


def _first_that_fits(ladder, limit: int | None, ground: int):
    """The first rung whose peak fits above `ground` bytes, else the one that takes least."""
    for rung in ladder:
        peak = rung[1]
        if limit is None or ground + peak.bytes + heap_slack(peak.largest_block) <= limit:
            return rung
    return min(ladder, key=lambda rung: rung[1].bytes + heap_slack(rung[1].largest_block))


def _nothing_fits(least: MemoryPlan, limit: int) -> str:
    phase = max(least.peaks, key=least.peaks.get)
    parts = f"weights {format_bytes(least.weights_total)}, KV {format_bytes(least.kv_total)} as {least.cache}"
    ways = "raise the budget, or ask for fewer or smaller pictures, fewer frames, less text or fewer new tokens"
    if least.weights_total > limit:
        ways = "raise the budget, or take a smaller model"
    return (
        f"nothing fits into {format_bytes(limit)}: at least {format_bytes(least.peak)} are needed, in {phase} "
        f"({parts}, dtype {least.dtype}); {ways}."
    )
