"""Picks kernels by what the model lies on, and says which and why."""

import importlib.util
from dataclasses import dataclass

import torch
from torch import nn
from transformers.utils import logging

from ..attention.rotary_faster import FasterRotaryEmbeddings
from ..native.native_fused import is_silu
from ..native.native_linear import linear_kernel
from ..technique_optim import Technique, refuse_unknown
from .kernel_fusion import KernelFusion
from .linear_decode import DecodeLinear
from .moe_grouped import GroupedExperts, holds_experts


logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class KernelChoice:
    """What computes one part of the model: its name, the kernel picked and the reason."""

    part: str
    kernel: str
    reason: str

    def __str__(self) -> str:
        return f"{self.part}: {self.kernel} ({self.reason})"


class HardwareSpecificKernels(Technique):
    """The kernels that suit the device the model lies on; `describe()` and `print` say what was picked and why.

    On a CPU with a C++ compiler: our products of few rows, sparse experts, RMSNorm, SwiGLU and rotary passes, and
    PyTorch's oneDNN products (AMX or AVX-512 bf16 where the processor has them) for many rows. On CUDA: Triton kernels
    for RMSNorm, SwiGLU and rotation where Triton is installed, or RMSNorm of the `kernels` hub. Elsewhere PyTorch's
    own. Exact up to rounding; gradients and compiled graphs take the plain way.

    The device is looked at when it is applied; apply it again after moving the model.

    Args:
        config: accepted and not read.
        hub (`bool`): on CUDA, take RMSNorm from the `kernels` hub, which downloads it at first use.
        verbose (`bool`): print what was picked.
    Raises:
        ValueError: for an unknown setting, and from `apply` if `hub` is asked for where it cannot be had.
    """

    name = "hardware_kernels"
    exact = True
    after = ("adaptive_precision", "kernel_fusion", "layer_recycling", "learned_routing")

    def __init__(self, config=None, hub: bool = False, verbose: bool = False, **unknown):
        refuse_unknown(self.name, unknown, ("hub", "verbose"))
        super().__init__(hub=hub, verbose=verbose)
        self.choices: list[KernelChoice] = []
        self._parts: list = []
        self._hub_model = None

    def apply(self, model) -> None:
        if self.choices:
            raise ValueError(f"{self.name} is already applied; revert it first.")
        device = next(model.parameters()).device
        if self.settings["hub"]:
            self._take_hub(model, device)
        if device.type == "cpu":
            self._apply_on_cpu(model)
        elif device.type == "cuda":
            self._apply_on_cuda(model)
        else:
            self._choose("all", "PyTorch", f"nothing faster is known for {device.type}")
        logger.info(self.describe())
        if self.settings["verbose"]:
            print(self.describe())

    def revert(self, model) -> None:
        while self._parts:
            self._parts.pop().revert(model)
        if self._hub_model is not None:
            self._hub_model.set_use_kernels(False)
            self._hub_model = None
        self.choices = []

    def describe(self) -> str:
        """One line for each part: the kernel and the reason."""
        if not self.choices:
            return f"{self.name}: not applied."
        return "\n".join([f"{self.name}:", *(f"  {choice}" for choice in self.choices)])

    def __str__(self) -> str:
        return self.describe()

    def _choose(self, part: str, kernel: str, reason: str) -> None:
        self.choices.append(KernelChoice(part, kernel, reason))

    def _add(self, model, technique: Technique) -> None:
        technique.apply(model)
        self._parts.append(technique)

    def _apply_on_cpu(self, model) -> None:
        instructions = cpu_instructions()
        self._choose("products of many rows", "PyTorch, oneDNN", f"the processor has {instructions}")
        if linear_kernel() is None:
            self._choose("everything else", "PyTorch", "no C++ compiler, or QWEN3_VL_NATIVE=0")
            return
        self._add(model, DecodeLinear())
        self._choose("products of up to 8 rows", "native C++", "bound by reading weights once")
        if any(holds_experts(module) for module in model.modules()):
            self._add(model, GroupedExperts())
            self._choose("sparse experts", "native C++", "few tokens read the chosen experts alone")
        self._add(model, KernelFusion(products=False))
        self._choose("RMSNorm, SwiGLU", "native C++", "one pass each")
        if any(hasattr(module, "mrope_section") for module in model.modules()):
            self._add(model, FasterRotaryEmbeddings())
            self._choose("rotary", "table and native layout", "bit-equal, with less work")

    def _apply_on_cuda(self, model) -> None:
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
        if importlib.util.find_spec("triton") is None:
            self._choose("all", "PyTorch", f"Triton is not installed; compute capability {capability}")
            return
        self._add(model, TritonKernels(norms=self._hub_model is None))
        parts = "SwiGLU, rotary" if self._hub_model is not None else "RMSNorm, SwiGLU, rotary"
        self._choose(parts, "Triton", f"compute capability {capability}")

    def _take_hub(self, model, device: torch.device) -> None:
        if device.type != "cuda" or importlib.util.find_spec("kernels") is None:
            raise ValueError(
                f"hub=True needs the package kernels and a CUDA device, and the model lies on {device.type}; install "
                "kernels, or leave hub away."
            )
        model.set_use_kernels(True)
        self._hub_model = model
        self._choose("RMSNorm", "kernels hub", "asked for by hub=True")


class TritonKernels(Technique):
    """RMSNorm, SwiGLU and rotation by the Triton kernels of `hardware_triton`; a part of `hardware_kernels`."""

    name = "triton_kernels"
    exact = True

    def __init__(self, norms: bool = True):
        super().__init__(norms=norms)
        self._placed: list[tuple[nn.Module, str, object, object]] = []

    def apply(self, model) -> None:
        for module in model.modules():
            if self.settings["norms"] and type(module).__name__.endswith("RMSNorm"):
                self._place(module, "forward", TritonNorm(module))
            elif is_silu(getattr(module, "act_fn", None)) and hasattr(module, "gate_proj"):
                self._place(module, "forward", TritonSwiGLU(module))
            elif hasattr(module, "rotate"):
                self._place(module, "rotate", TritonRotation(module))

    def _place(self, module: nn.Module, attribute: str, ours) -> None:
        self._placed.append((module, attribute, vars(module).get(attribute), ours))
        setattr(module, attribute, ours)

    def revert(self, model) -> None:
        while self._placed:
            module, attribute, before, ours = self._placed.pop()
            if vars(module).get(attribute) is not ours:
                continue
            delattr(module, attribute)
            if before is not None:
                setattr(module, attribute, before)


class TritonNorm:
    """In the place of a norm's `forward`."""

    def __init__(self, module: nn.Module):
        self.module = module

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        from .hardware_triton import WIDEST_ROW, triton_rms_norm

        weight = self.module.weight
        if takes_triton(x, weight) and x.shape[-1] <= WIDEST_ROW and weight.is_contiguous():
            return triton_rms_norm(x, weight, self.module.variance_epsilon)
        return type(self.module).forward(self.module, x)


class TritonSwiGLU:
    """In the place of a SwiGLU layer's `forward`."""

    def __init__(self, module: nn.Module):
        self.module = module

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        from .hardware_triton import triton_swiglu

        module = self.module
        if not takes_triton(x):
            return type(module).forward(module, x)
        gate, up = module.gate_proj(x), module.up_proj(x)
        inner = triton_swiglu(gate, up) if takes_triton(gate, up) else module.act_fn(gate) * up
        return module.down_proj(inner)


class TritonRotation:
    """In the place of an attention module's `rotate`."""

    def __init__(self, module: nn.Module):
        self.module = module

    def __call__(self, q, k, cos, sin, unsqueeze_dim: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        from .hardware_triton import triton_rotation

        if unsqueeze_dim != 1 or not takes_triton(q, k, cos, sin):
            return type(self.module).rotate(q, k, cos, sin, unsqueeze_dim)
        return triton_rotation(q, cos, sin), triton_rotation(k, cos, sin)


def takes_triton(*tensors: torch.Tensor) -> bool:
    """Whether Triton kernels may see these tensors: of one dtype that they know, without gradients, untraced."""
    return (
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))
        and len({x.dtype for x in tensors}) == 1
        and tensors[0].dtype in (torch.float32, torch.bfloat16, torch.float16)
    )


def cpu_instructions() -> str:
    """What of its vector units PyTorch's products can use, in words."""
    names = []
    for name, test in (("AMX", "_is_amx_tile_supported"), ("AVX-512 bf16", "_is_avx512_bf16_supported")):
        supported = getattr(torch.cpu, test, None)
        if supported is not None and supported():
            names.append(name)
    return ", ".join(names) or torch.backends.cpu.get_cpu_capability()
