"""Products with a common input as one product; norms, with the residual sum before them, and SwiGLU as one pass."""

import weakref

import torch
from torch import nn
from torch.nn import functional as F

from ..native.native_fused import (
    is_silu,
    native_add_rms_norm,
    native_rms_norm,
    native_swiglu,
    supports_add_rms_norm,
    supports_rms_norm,
    supports_swiglu,
)
from ..native.native_linear import MOST_ROWS, native_linear, supports_linear
from ..technique_optim import Technique, refuse_unknown


FUSED_GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
CHANGES_PRODUCTS = ("adaptive_precision", "layer_recycling")
# A decoder layer of exactly these parts is attention behind one norm and a feed-forward layer behind the other.
PRE_NORM_LAYER = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}


class KernelFusion(Technique):
    """Query, key and value as one product, gate and up as one; on a CPU, native passes for RMSNorm and SwiGLU.

    The sum of the residual stream and attention's output is taken in the pass of the norm behind it.

    Exact up to the order of sums. Products of up to eight rows are fused, as in decoding; more gain nothing by it, and
    what comes behind them loses. The weights of a group move into one piece of memory, of which the parameters become
    views: nothing is held twice, names stay the official ones, and whoever writes into a parameter writes into the
    fused weight. So `save_pretrained` and `state_dict` give the plain model's checkpoint while it is fused. Where
    gradients are wanted, in traced graphs, and after the parameters were moved or cast, the plain way runs. `revert`
    copies the parameters apart again, bit-identical.

    With PEFT: apply it before adapters are added, which then work on fused layers; wrapped layers raise.

    Args:
        config: accepted and not read.
        products (`bool`): fuse the products.
        passes (`bool`): use the native norms, with residual sums, and SwiGLU.
    Raises:
        ValueError: for an unknown setting, if nothing is left to do, and from `apply` for what cannot be fused.
    """

    name = "kernel_fusion"
    exact = True
    after = CHANGES_PRODUCTS

    def __init__(self, config=None, products: bool = True, passes: bool = True, **unknown):
        refuse_unknown(self.name, unknown, ("products", "passes"))
        if not (products or passes):
            raise ValueError("kernel_fusion with products=False and passes=False does nothing; leave it away.")
        super().__init__(products=products, passes=passes)
        if products:
            self.excludes = dict.fromkeys(CHANGES_PRODUCTS, "it leaves no plain products to fuse; products=False goes")
        self._applied: list = []

    def apply(self, model) -> None:
        if self._applied:
            raise ValueError(f"{self.name} is already applied; revert it first.")
        modules = list(model.modules())
        groups = [
            (module, names) for module in modules for names in FUSED_GROUPS if all(hasattr(module, n) for n in names)
        ]
        if not groups:
            raise ValueError(f"{self.name} found nothing to fuse in {type(model).__name__}; apply it to a decoder.")
        if self.settings["products"]:
            for module, names in groups:
                _check_group(module, names)
            self._applied += [FusedProducts([getattr(module, name) for name in names]) for module, names in groups]
        if self.settings["passes"]:
            self._applied += [FusedNorm(module) for module in modules if _is_rms_norm(module)]
            self._applied += [FusedSwiGLU(module) for module in modules if _is_swiglu(module)]
            self._applied += [FusedResidual(module) for module in modules if _is_pre_norm_layer(module)]

    def revert(self, model) -> None:
        while self._applied:
            self._applied.pop().put_back()


def _check_group(module: nn.Module, names: tuple[str, ...]) -> None:
    members = [getattr(module, name) for name in names]
    wrong = next((name for name, member in zip(names, members, strict=True) if type(member) is not nn.Linear), None)
    if wrong is not None:
        raise ValueError(
            f"kernel_fusion cannot fuse {', '.join(names)}: {wrong} is a {type(getattr(module, wrong)).__name__}, no "
            "plain linear layer; apply it before adapters or quantization, or merge and unload them first."
        )
    weights = [member.weight for member in members]
    kinds = {
        (member.weight.dtype, member.weight.device, member.in_features, type(member.weight), member.bias is None)
        for member in members
    }
    if len(kinds) > 1 or weights[0].device.type == "meta":
        raise ValueError(
            f"kernel_fusion cannot fuse {', '.join(names)}: their weights differ in dtype, device, width or bias, or "
            "lie on no device; load the model whole and in one dtype."
        )
    if len({w.data_ptr() for w in weights}) < len(weights):
        raise ValueError(f"kernel_fusion cannot fuse {', '.join(names)}: they share one weight.")


class FusedProducts:
    """Linear layers with a common input: the first computes for all, the others hand out their part.

    Each layer keeps its module and parameters. A layer asked with another input than the first computes its own.
    """

    def __init__(self, members: list[nn.Linear]):
        self.members = members
        self.sizes = [member.weight.shape[0] for member in members]
        self._gather()
        self.held: tuple | None = None  # input, its version, and the parts not handed out yet
        self.forwards = [_MemberForward(self, index) for index in range(len(members))]
        self.replaced = [vars(member).get("forward") for member in members]
        for member, forward in zip(members, self.forwards, strict=True):
            member.forward = forward

    @torch.no_grad()
    def _gather(self) -> None:
        self.weight = torch.cat([member.weight for member in self.members])
        self.bias = None
        for member, part in zip(self.members, self.weight.split(self.sizes), strict=True):
            member.weight.data = part
        if self.members[0].bias is not None:
            self.bias = torch.cat([member.bias for member in self.members])
            for member, part in zip(self.members, self.bias.split(self.sizes), strict=True):
                member.bias.data = part

    @torch.no_grad()
    def put_back(self) -> None:
        for member, forward, replaced in zip(self.members, self.forwards, self.replaced, strict=True):
            if vars(member).get("forward") is forward:
                del member.forward
                if replaced is not None:
                    member.forward = replaced
            member.weight.data = member.weight.data.clone()
            if member.bias is not None:
                member.bias.data = member.bias.data.clone()
        self.weight = self.bias = None

    def __getstate__(self) -> dict:
        return {**vars(self), "held": None}

    def __call__(self, index: int, x: torch.Tensor) -> torch.Tensor:
        if index:
            part = self._part(index, x)
            return self._plain(index, x) if part is None else part
        if not self._can_fuse(x):
            return self._plain(0, x)
        product = native_linear if supports_linear(x, self.weight, self.bias) else F.linear
        first, *others = product(x, self.weight, self.bias).split(self.sizes, dim=-1)
        self.held = weakref.ref(x), _version(x), dict(enumerate(others, start=1))
        return first

    def _part(self, index: int, x: torch.Tensor) -> torch.Tensor | None:
        """What the first layer's call computed for this one from the same input."""
        held = self.held  # read once, as another thread may put its own here
        if held is None or torch.compiler.is_compiling() or held[0]() is not x or held[1] != _version(x):
            return None
        return held[2].pop(index, None)

    def _plain(self, index: int, x: torch.Tensor) -> torch.Tensor:
        member, replaced = self.members[index], self.replaced[index]
        return F.linear(x, member.weight, member.bias) if replaced is None else replaced(x)

    def _can_fuse(self, x: torch.Tensor) -> bool:
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_grad_enabled():
            return False
        if self.weight is not None and not self._is_whole():
            self.weight = self.bias = None  # the parameters live elsewhere now; this would be a second copy
        # With many rows nothing is gained, and what comes behind reads parts that are not contiguous.
        return self.weight is not None and type(x) is torch.Tensor and x.numel() <= MOST_ROWS * x.shape[-1]

    def _is_whole(self) -> bool:
        """Whether all parameters still are views of the fused ones: a model that was cast or moved has others."""
        for name, fused in (("weight", self.weight), ("bias", self.bias)):
            if fused is None:
                continue
            at, row = fused.data_ptr(), fused[0].numel() * fused.element_size()
            for member, size in zip(self.members, self.sizes, strict=True):
                own = getattr(member, name)
                if type(own) is not nn.Parameter or own.data_ptr() != at or own.dtype != fused.dtype:
                    return False
                at += size * row
        return True


def _version(x: torch.Tensor) -> int:
    return 0 if x.is_inference() else x._version


class _MemberForward:
    """In the place of one fused layer's `forward`."""

    def __init__(self, group: FusedProducts, index: int):
        self.group, self.index = group, index

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.group(self.index, x)


class _Pass:
    """In the place of a module's `forward`, or of what another technique has put there."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.replaced = vars(module).get("forward")
        module.forward = self

    def plain(self, x: torch.Tensor, **kwargs) -> torch.Tensor:
        if self.replaced is None:
            return type(self.module).forward(self.module, x, **kwargs)
        return self.replaced(x, **kwargs)

    def put_back(self) -> None:
        if vars(self.module).get("forward") is self:
            del self.module.forward
            if self.replaced is not None:
                self.module.forward = self.replaced


class FusedNorm(_Pass):
    """RMSNorm in one pass over each row."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        weight, eps = self.module.weight, self.module.variance_epsilon
        return native_rms_norm(x, weight, eps) if supports_rms_norm(x, weight) else self.plain(x)


class FusedSwiGLU(_Pass):
    """A feed-forward layer whose activation and gating are one pass over gate and up."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        module = self.module
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return self.plain(x)
        gate, up = module.gate_proj(x), module.up_proj(x)
        inner = native_swiglu(gate, up) if supports_swiglu(gate, up) else module.act_fn(gate) * up
        return module.down_proj(inner)


class FusedResidual(_Pass):
    """A decoder layer that adds attention's output and norms the sum in one pass."""

    def __call__(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        layer = self.module
        norm = layer.post_attention_layernorm
        if self.replaced is not None or not _is_idle(norm) or not supports_rms_norm(hidden_states, norm.weight):
            return self.plain(hidden_states, **kwargs)
        attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **kwargs)
        if supports_add_rms_norm(hidden_states, attended, norm.weight):
            hidden_states, normed = native_add_rms_norm(hidden_states, attended, norm.weight, norm.variance_epsilon)
            return hidden_states.add_(layer.mlp(normed))
        hidden_states = hidden_states + attended
        return hidden_states + layer.mlp(norm(hidden_states))


def _is_idle(norm: nn.Module) -> bool:
    """Whether nobody but [`FusedNorm`] wants to be called for this norm."""
    own = isinstance(vars(norm).get("forward"), FusedNorm) and vars(norm)["forward"].replaced is None
    return own and not (norm._forward_hooks or norm._forward_pre_hooks)


def _is_pre_norm_layer(module: nn.Module) -> bool:
    return {name for name, _ in module.named_children()} == PRE_NORM_LAYER and _is_rms_norm(
        module.post_attention_layernorm
    )


def _is_rms_norm(module: nn.Module) -> bool:
    return type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon")


def _is_swiglu(module: nn.Module) -> bool:
    parts = all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj"))
    return parts and is_silu(getattr(module, "act_fn", None))
