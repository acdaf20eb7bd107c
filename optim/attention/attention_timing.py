"""Which mechanism is fastest on this machine: a short run, the rules that follow, and the file that keeps both."""

import itertools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import torch

from ..cache.cache_paged import PagedLayer
from ..user_cache import user_cache_folder
from .attention_exact import NAME as EXACT
from .attention_layout import AttentionLayout
from .attention_mechanisms import ADAPTIVE, FORWARDS, PHASES, AttentionMechanisms


# A change of mechanism has to gain more than two runs of the same one differ by.
MARGIN = 0.05
LEAST_ROUNDS, MOST_ROUNDS = 3, 200
# Neighbouring tokens of the inputs are alike in runs of this length, as attention to text and pictures is local.
RUN_TOKENS = 64


@dataclass(frozen=True)
class AttentionShape:
    """The heads of an attention layer.

    Args:
        heads, kv_heads, head_dim (`int`): `heads` is a multiple of `kv_heads`.
        dtype (`str` or `torch.dtype`): such as `"bfloat16"`.
        device (`str`): such as `"cpu"` or `"cuda:0"`.
    Raises:
        ValueError: for heads that do not fit, or a dtype that does not exist.
    """

    heads: int
    kv_heads: int
    head_dim: int
    dtype: str = "float32"
    device: str = "cpu"

    def __post_init__(self):
        dtype, device = str(self.dtype).removeprefix("torch."), str(self.device)
        if not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ValueError(f"there is no dtype {dtype!r}; name one such as 'bfloat16'.")
        for name in ("heads", "kv_heads", "head_dim"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {getattr(self, name)!r}.")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} is no multiple of kv_heads={self.kv_heads}.")
        object.__setattr__(self, "dtype", dtype)
        object.__setattr__(self, "device", device)

    def __str__(self) -> str:
        return f"{self.heads}x{self.kv_heads}x{self.head_dim} {self.dtype} on {self.device}"


def shapes_of(model) -> dict[str, AttentionShape]:
    """The shapes of a model's attention, under "decoder" and, where there is a tower, "vision"."""
    device, config = str(model.device), model.config
    text, dtype = config.get_text_config(), model.dtype
    shapes = {
        "decoder": AttentionShape(text.num_attention_heads, text.num_key_value_heads, text.head_dim, dtype, device)
    }
    vision = getattr(config, "vision_config", None)
    if vision is not None:
        heads = vision.num_heads
        shapes["vision"] = AttentionShape(heads, heads, vision.hidden_size // heads, dtype, device)
    return shapes


def checked_shapes(shapes_or_model) -> dict[str, AttentionShape]:
    """[`shapes_of`] a model, or the mapping that was given in its place.

    Raises:
        ValueError: for a mapping without shapes, or with others than of "decoder" and "vision".
    """
    if not isinstance(shapes_or_model, Mapping):
        return shapes_of(shapes_or_model)
    shapes = dict(shapes_or_model)
    wrong = [part for part in shapes if part not in ("decoder", "vision")]
    if wrong or not shapes or not all(isinstance(shape, AttentionShape) for shape in shapes.values()):
        raise ValueError(
            f"shapes must hold an AttentionShape under 'decoder' or 'vision' or both, got {sorted(map(str, shapes))}; "
            "or pass the model."
        )
    return shapes


def measure_mechanisms(
    shapes: Mapping[str, AttentionShape],
    mechanisms: Sequence[str] | Mapping[str, Mapping] | None = None,
    lengths: Sequence[int] | None = None,
    seconds: float = 10.0,
    paged: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> dict:
    """Times mechanisms in turns, by phase and length; see [`AdaptiveAttention.measure`] for the arguments.

    Lengths for which the time does not suffice are left out, the shortest never.

    Args:
        clock: gives seconds.
    Returns:
        What [`save_timing`] stores: `"timings_ms"` by phase, length and mechanism, the `"rules"` that follow by
        phase, the `"mechanisms"` with their settings, and where it was measured.
    Raises:
        ValueError: for an unknown mechanism or setting, lengths below 1, or no time.
    """
    given = mechanisms if isinstance(mechanisms, Mapping) else {name: {} for name in mechanisms or ()}
    candidates = {AttentionMechanisms.resolve(name): dict(values) for name, values in given.items()}
    if ADAPTIVE in candidates:
        raise ValueError(f"{ADAPTIVE} picks among the others; leave it out of what is measured.")
    settings = {name: AttentionMechanisms.get(name).settings(**values) for name, values in candidates.items()}
    lengths = sorted(set((256, 1024, 4096, 16384) if lengths is None else lengths))
    if not lengths or not all(isinstance(n, int) and n >= 1 for n in lengths):
        raise ValueError(f"lengths must be counts of tokens >= 1, got {lengths}.")
    if seconds <= 0:
        raise ValueError(f"seconds must be above 0, got {seconds}.")

    bench = _Bench(shapes, settings, candidates or None, paged, clock)
    timings = bench.run(lengths, seconds)
    return {
        **_place(shapes),
        "torch": torch.__version__,
        "paged": paged,
        "mechanisms": {name: asdict(value) for name, value in settings.items()},
        "timings_ms": {phase: {str(n): cell for n, cell in cells.items()} for phase, cells in timings.items()},
        "rules": {phase: rules_from_timings(cells) for phase, cells in timings.items()},
    }


class _Bench:
    """Runs one phase at one length after the other until the time is over."""

    def __init__(self, shapes, settings, named, paged: bool, clock):
        self.shapes, self.paged, self.clock = shapes, paged, clock
        self.settings, self.named = settings, named

    def candidates(self, phase: str) -> list[str]:
        device = torch.device(self.shape(phase).device).type
        if self.named is None:
            return list(AttentionMechanisms.serving(phase, device))
        serving = AttentionMechanisms.serving(phase, device, exact_only=False)
        # Where none of the named ones has anything to do, there is nothing to choose.
        return [name for name in self.named if name in serving] or [EXACT]

    def shape(self, phase: str) -> AttentionShape:
        return self.shapes["vision" if phase == "vision" else "decoder"]

    def run(self, lengths: list[int], seconds: float) -> dict[str, dict[int, dict[str, float]]]:
        phases = [phase for phase in PHASES if ("vision" if phase == "vision" else "decoder") in self.shapes]
        cells = list(itertools.product(lengths, phases))  # every phase has its shortest length first
        timings: dict[str, dict[int, dict[str, float]]] = {phase: {} for phase in phases}
        stop = self.clock() + seconds
        for index, (length, phase) in enumerate(cells):
            known, left = timings[phase], stop - self.clock()
            if known and _expected_seconds(phase, length, known) > left:
                continue
            known[length] = self.time_cell(phase, length, left / (len(cells) - index))
        return timings

    @torch.no_grad()
    def time_cell(self, phase: str, length: int, seconds: float) -> dict[str, float]:
        """Median milliseconds of every candidate, measured in turns."""
        calls = {name: self.call(name, phase, length) for name in self.candidates(phase)}
        stop = self.clock() + (seconds if len(calls) > 1 else 0)
        for call in calls.values():
            call()  # compiles, allocates
        taken: dict[str, list[float]] = {name: [] for name in calls}
        rounds = 0
        while rounds < LEAST_ROUNDS or (self.clock() < stop and rounds < MOST_ROUNDS):
            for name, call in calls.items():
                begin = self.clock()
                call()
                taken[name].append(self.clock() - begin)
            rounds += 1
        return {name: statistics.median(times) * 1e3 for name, times in taken.items()}

    def call(self, name: str, phase: str, length: int) -> Callable[[], None]:
        """A function that computes one layer's attention of a prompt, a frame or a token."""
        shape, forward = self.shape(phase), FORWARDS[name]
        query, key, value = local_inputs(shape, length, 1 if phase == "decode" else length)
        module = SimpleNamespace(attention_settings=self.settings, is_causal=phase != "vision")
        layout, keywords = None, {}
        if phase != "vision":
            layout = AttentionLayout(length - query.shape[2])
        if phase == "decode" and self.paged:
            layer = PagedLayer()
            layer.update(key, value, dense=False)
            if getattr(forward, "reads_cache_layer", False):
                key, value, keywords = key[:, :, -1:], value[:, :, -1:], {"kv_layer": layer}

        def run():
            states = (key, value)
            if phase == "decode" and self.paged and not keywords:
                states = layer.dense()  # what such a mechanism costs with this cache
            forward(module, query, *states, layout, scaling=shape.head_dim**-0.5, **keywords)
            if query.is_cuda:
                torch.cuda.synchronize(query.device)

        return run


def local_inputs(shape: AttentionShape, keys: int, queries: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random query (1, H, queries, D), key and value (1, HK, keys, D) of the last tokens, alike in runs of 64."""
    generator = torch.Generator().manual_seed(0)
    runs = -(-keys // RUN_TOKENS)

    def draw(*size):
        return torch.randn(size, generator=generator)

    content = draw(1, shape.kv_heads, runs, shape.head_dim).repeat_interleave(RUN_TOKENS, dim=2)[:, :, :keys]
    key = content + 0.5 * draw(1, shape.kv_heads, keys, shape.head_dim)
    asked = content[:, :, keys - queries :].repeat_interleave(shape.heads // shape.kv_heads, dim=1)
    query = asked + 0.5 * draw(1, shape.heads, queries, shape.head_dim)
    value = draw(1, shape.kv_heads, keys, shape.head_dim)
    return tuple(x.to(shape.device, getattr(torch, shape.dtype)) for x in (query, key, value))


def _expected_seconds(phase: str, length: int, known: Mapping[int, Mapping[str, float]]) -> float:
    """Of warming up and the least rounds, by the longest length measured; only decoding is linear."""
    before = max(known)
    growth = length / before if phase == "decode" else (length / before) ** 2
    return (1 + LEAST_ROUNDS) * growth * sum(known[before].values()) / 1e3


def rules_from_timings(cells: Mapping[int, Mapping[str, float]], margin: float = MARGIN) -> list[list]:
    """`[[from_keys, mechanism], ...]`: the fastest at each length; a change has to gain more than `margin`.

    Args:
        cells: milliseconds by length and mechanism.
    """
    rules: list[list] = []
    for length in sorted(cells):
        times = cells[length]
        fastest = min(times, key=times.get)
        current = rules[-1][1] if rules else None
        if current is None:
            rules.append([0, fastest])
        elif times[fastest] < (1 - margin) * times[current]:
            rules.append([length, fastest])
    return rules


def timing_path(path: str | Path | None = None) -> Path:
    """`path`, or the file in the user's cache (`XDG_CACHE_HOME` counts)."""
    if path is not None:
        return Path(path)
    return user_cache_folder() / "attention_timing.json"


def save_timing(run: dict, path: str | Path | None = None) -> Path:
    """Writes a run to a JSON file beside those of other processors, shapes and numbers of threads.

    Raises:
        ValueError: if the file holds something else.
    """
    target = timing_path(path)
    runs = _read_runs(target) if target.is_file() else {}
    runs[_key(run)] = run
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.{os.getpid()}")
    part.write_text(json.dumps({"attention_timing": runs}, indent=1) + "\n", encoding="utf-8")
    os.replace(part, target)  # a reader sees the old file or the new one
    return target


def load_timing(path: str | Path | None = None, shapes: Mapping[str, AttentionShape] | None = None) -> dict:
    """The run in a file that was made on this processor with as many threads, and with these shapes if given.

    Raises:
        FileNotFoundError: if there is no file.
        ValueError: if the file holds no such run, or several.
    """
    source = timing_path(path)
    if not source.is_file():
        raise FileNotFoundError(f"there is no timing file {source}; make one with AdaptiveAttention.measure(model).")
    runs = _read_runs(source)
    fitting = [run for run in runs.values() if _fits(run, shapes)]
    if len(fitting) == 1:
        return fitting[0]
    if not fitting:
        raise ValueError(
            f"{source} holds runs of {'; '.join(runs) or 'nothing'}, none of this processor, number of threads "
            "and shape; make one with AdaptiveAttention.measure(model)."
        )
    raise ValueError(f"{source} holds {len(fitting)} runs of this processor; pass the model, to tell them apart.")


def _read_runs(path: Path) -> dict[str, dict]:
    try:
        runs = json.loads(path.read_text(encoding="utf-8"))["attention_timing"]
        if not all(isinstance(run[part], dict) for run in runs.values() for part in ("shapes", "rules", "mechanisms")):
            raise TypeError
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is no timing file; name another path or remove it.") from None
    return runs


def _fits(run: dict, shapes: Mapping[str, AttentionShape] | None) -> bool:
    try:
        measured = {part: AttentionShape(**values) for part, values in run["shapes"].items()}
        here = _place(measured)
    except (RuntimeError, AssertionError):  # of a device that is not here
        return False
    same_place = all(run.get(name) == here[name] for name in ("processor", "threads"))
    return same_place and (shapes is None or measured == dict(shapes))


def _place(shapes: Mapping[str, AttentionShape]) -> dict:
    """Where shapes are measured, and the shapes."""
    device = torch.device(next(iter(shapes.values())).device)
    processor = torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
    return {
        "processor": processor,
        "threads": torch.get_num_threads(),
        "shapes": {part: asdict(shape) for part, shape in sorted(shapes.items())},
    }


def _key(run: dict) -> str:
    shapes = (f"{part} {AttentionShape(**values)}" for part, values in run["shapes"].items())
    return ", ".join((run["processor"], f"{run['threads']} threads", *shapes))


def processor_name() -> str:
    """The processor, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    told = {}
    for line in lines:
        name, _, value = line.partition(":")
        told.setdefault(name.strip(), value.strip())
    # Virtual machines hide the name behind a family's.
    parts = [told.get("model name") or platform.processor() or platform.machine()]
    parts += [f"{name} {told[name]}" for name in ("cpu family", "model") if name in told]
    return " ".join(parts)
