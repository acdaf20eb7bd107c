"""What is installed, and what of this package runs on this machine: tried on a small model with random weights."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ..configuration.configuration_qwen3_vl import Qwen3VLConfig
from ..configuration.configuration_qwen3_vl_moe import Qwen3VLMoeConfig
from ..modeling_qwen3_vl.modeling_qwen3_vl import Qwen3VLForConditionalGeneration, Qwen3VLMoeForConditionalGeneration
from ..optim.attention.attention_exact import FlashAttention2
from ..optim.attention.attention_technique import AttentionTechnique
from ..optim.native import (
    native_attention,
    native_experts,
    native_layout,
    native_linear,
    native_packed_linear,
    native_quantized,
)
from ..optim.registry_optim import TECHNIQUES
from ..optim.technique_optim import Technique


RUNS, WARNS, FALLS_BACK = "runs", "warns", "falls back"
REFUSES, UNAVAILABLE = "refuses", "not available"
FAILS, DIFFERS = "fails", "other tokens"
KERNELS = {
    "attention": (native_attention.kernels, "attention of prompts and of decoding steps"),
    "linear": (native_linear.linear_kernel, "products of few rows"),
    "layout": (native_layout.layout_kernel, "rotation of the vision tower's states"),
    "quantized": (native_quantized.quantized_kernel, "attention over packed keys and values"),
    "packed": (native_packed_linear.packed_kernel, "products with packed weights"),
    "experts": (native_experts.experts_kernel, "sparse experts"),
}


@dataclass(frozen=True)
class Check:
    """What became of one kernel, attention implementation, cache or other technique.

    Args:
        kind (`str`): `"kernel"`, `"attention"`, `"cache"` or `"technique"`.
        name (`str`): of the registry.
        status (`str`): `"runs"`; `"warns"`, runs with the warning in `detail`; `"falls back"`, runs on plain PyTorch;
            `"refuses"`, wants settings, calibration or another model; `"not available"`; `"fails"`; `"other tokens"`,
            though it is exact.
        detail (`str`): why, or what for.
        kernels (`tuple[str, ...]`): native kernels that it went through.
        exact (`bool`, *optional*): whether it must give the plain model's tokens.
        seconds (`float`): that it took, with compiling where there was need for it.
    """

    kind: str
    name: str
    status: str
    detail: str = ""
    kernels: tuple[str, ...] = ()
    exact: bool | None = None
    seconds: float = field(default=0.0, compare=False)

    @property
    def well(self) -> bool:
        return self.status not in (FAILS, DIFFERS)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "kernels": list(self.kernels), "seconds": round(self.seconds, 3)}


def check_kernels() -> list[Check]:
    """Whether each native kernel is compiled, or can be, and loads; the first time this takes a compiler's time."""
    checks = []
    for name, (load, purpose) in KERNELS.items():
        start = time.perf_counter()
        with _warnings_of_ours() as said:
            status, detail = (RUNS, purpose) if load() is not None else (FALLS_BACK, None)
        if status == FALLS_BACK:
            off = os.environ.get("QWEN3_VL_NATIVE") == "0"
            reason = "QWEN3_VL_NATIVE=0 switches it off" if off else (said or ["it was tried before"])[-1]
            detail = f"{purpose} on plain PyTorch: {reason.rpartition('instead: ')[2]}"
        checks.append(Check("kernel", name, status, detail, seconds=time.perf_counter() - start))
    return checks


def check_techniques(device: str = "cpu") -> list[Check]:
    """Tries each technique of the registry, with its default settings, on a model with a picture.

    Args:
        device (`str`): where.
    """
    dense, sparse = Trial(device), Trial(device, experts=True)
    plain = [
        dense.run("attention", name, lambda model, name=name: model.set_attn_implementation(name), exact=True)
        for name in ("eager", "sdpa")
    ]
    return [*plain, *(_check_technique(name, made, dense, sparse) for name, made in TECHNIQUES.items())]


def _check_technique(name: str, made: type[Technique], dense: Trial, sparse: Trial) -> Check:
    kind = "technique"
    if issubclass(made, AttentionTechnique):
        kind = "attention"
    elif made.make_cache is not Technique.make_cache:
        kind = "cache"
    try:
        technique = made()
    except (TypeError, ValueError) as error:
        return Check(kind, name, REFUSES, _first_line(error))

    def apply(model) -> None:
        if kind == "cache":  # read in place by this attention alone
            model.set_attn_implementation(FlashAttention2.name)
        technique.apply(model)
        model.active_techniques = [technique]

    trial = sparse if "expert" in name else dense
    return trial.run(kind, name, apply, exact=bool(technique.exact))


class Trial:
    """A small model with random weights, a prompt with a picture, and the tokens that the plain model gives."""

    def __init__(self, device: str, experts: bool = False):
        config_class, model_class = (
            (Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration)
            if experts
            else (Qwen3VLConfig, Qwen3VLForConditionalGeneration)
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = config_class(**_sizes(experts))
            self.model = model_class._from_config(config, dtype=torch.float32).eval().to(device)
            pixels = torch.randn(64, 3 * 2 * 16 * 16)
        ids = [3, 4, 5, 250, *[251] * 16, 253, *range(6, 30)]
        self.inputs = {
            "input_ids": torch.tensor([ids]),
            "mm_token_type_ids": torch.tensor([[int(token == 251) for token in ids]], dtype=torch.int32),
            "pixel_values": pixels,
            "image_grid_thw": torch.tensor([[1, 8, 8]]),
        }
        self.inputs = {name: value.to(device) for name, value in self.inputs.items()}
        self.expected = self._tokens(self.model)

    def run(self, kind: str, name: str, apply, exact: bool) -> Check:
        """Applies something to a copy of the model and lets it generate."""
        start, model = time.perf_counter(), copy.deepcopy(self.model)
        asked: set[str] = set()
        called: set[str] = set()
        with _warnings_of_ours() as said:
            try:
                status, detail = self._try(model, apply, exact, asked, called)
            except (ImportError, NotImplementedError) as error:
                status, detail = UNAVAILABLE, _first_line(error)
            except Exception as error:
                status, detail = FAILS, f"{type(error).__name__}: {_first_line(error)}"
        if status == RUNS and said:
            status, detail = WARNS, said[0]
        lost = sorted(name for name in asked - called if KERNELS[name][0]() is None)
        if status == RUNS and lost:
            status, detail = FALLS_BACK, f"plain PyTorch in place of native {', '.join(lost)}"
        return Check(kind, name, status, detail, tuple(sorted(called)), exact, time.perf_counter() - start)

    def _try(self, model, apply, exact: bool, asked: set[str], called: set[str]) -> tuple[str, str]:
        try:
            apply(model)
        except ValueError as error:
            return REFUSES, _first_line(error)
        tokens = self._tokens(model)
        if exact and not torch.equal(tokens, self.expected):
            return DIFFERS, "it is exact, and gave other tokens than the plain model"
        # Watched afterwards only, since that would slow down a compiler.
        with _kernels_called(asked, called):
            self._tokens(model)
        return RUNS, ""

    def _tokens(self, model) -> torch.Tensor:
        return model.generate(**self.inputs, do_sample=False, max_new_tokens=4, min_new_tokens=4)


def _sizes(experts: bool) -> dict[str, Any]:
    text = {
        "vocab_size": 256,
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "max_position_embeddings": 512,
        "rope_theta": 10000.0,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [12, 10, 10], "rope_type": "default"},
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    if experts:
        text |= {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2, "mlp_only_layers": [0]}
    vision = {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_heads": 1,
        "out_hidden_size": 128,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
    }
    tokens = {"vision_start": 250, "image": 251, "video": 252, "vision_end": 253}
    return {
        **{f"{name}_token_id": token for name, token in tokens.items()},
        "tie_word_embeddings": False,
        "text_config": text,
        "vision_config": vision,
    }


@contextlib.contextmanager
def _warnings_of_ours() -> Iterator[list[str]]:
    """What modules of this package warn of meanwhile, by message, and no longer on the screen."""
    said: list[str] = []
    ours = logging.getLogger(__name__.partition(".")[0])

    class Keep(logging.Handler):
        def emit(self, record):
            said.append(record.getMessage().splitlines()[0])

    handler, propagates = Keep(logging.WARNING), ours.propagate
    ours.addHandler(handler)
    ours.propagate = False
    try:
        yield said
    finally:
        ours.removeHandler(handler)
        ours.propagate = propagates


@contextlib.contextmanager
def _kernels_called(asked: set[str], called: set[str]) -> Iterator[None]:
    """Adds the names of `KERNELS` that are looked for and called meanwhile, by the functions that do so."""
    loading = {load.__code__: name for name, (load, _) in KERNELS.items()}
    files = {load.__code__.co_filename: name for name, (load, _) in KERNELS.items()}

    def notice(frame, event, argument):
        if event != "call":
            return
        code = frame.f_code
        if code in loading:
            asked.add(loading[code])
        elif code.co_name.startswith("native_") and code.co_filename in files:
            called.add(files[code.co_filename])

    earlier = sys.getprofile()
    sys.setprofile(notice)
    try:
        yield
    finally:
        sys.setprofile(earlier)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
