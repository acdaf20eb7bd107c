"""The decoding step as one compiled graph over a cache of fixed shape."""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import StaticCache
from transformers.cache_utils import Cache, StaticLayer
from transformers.utils import logging

from ..attention.attention_technique import implementations
from ..native.native_linear import linear_kernel, native_linear, supports_linear
from ..technique_optim import Technique, refuse_unknown
from .compiled_ops import NAME, define_operators, fits_compiled_linear


logger = logging.get_logger(__name__)

# What computes exact attention; others would change their results, or be changed, by being compiled here.
EXACT_IMPLEMENTATIONS = ("eager", "sdpa", "qwen3_vl_exact")
OTHER_ATTENTION = (
    "adaptive_sparse",
    "qwen3_vl_adaptive",
    "qwen3_vl_block_sparse",
    "qwen3_vl_dynamic_sparse",
    "qwen3_vl_memory_efficient",
)


class CompiledDecode(Technique):
    """Decodes by one compiled graph of the decoder, over a `StaticCache` whose capacity is a multiple of a bucket.

    Exact up to the order of float32 sums. Norms, rotation and SwiGLU are fused by the compiler; on a CPU products of
    up to eight rows and attention to the tokens held are our native kernels, called from the graph. Prefill, training,
    and steps that ask for attentions or hidden states run uncompiled. The first step of each batch size and capacity
    waits for the compiler, 20 seconds and more. If it fails, or is missing, decoding goes on uncompiled after one
    warning that names the reason.

    In a profile `generate()` gets its cache from here. After a bare `apply`, pass `cache_implementation="static"`, or
    `past_key_values=technique.make_cache(model, batch_size, max_length)`; other caches decode uncompiled.

    Args:
        config: accepted and not read.
        bucket_tokens (`int`): capacities of caches are multiples of it. Attention reads only what is held, so a large
            one costs memory alone, and a small one compiles again and again.
        backend (`str`): of `torch.compile`.
    Raises:
        ValueError: for an unknown setting or a bucket below 1, and from `apply` on a model whose attention is not
            exact, or that has no decoder.
    """

    name = "compiled_decode"
    exact = True
    role = "cache"
    after = (
        "qwen3_vl_exact",
        "decode_linear",
        "faster_rotary",
        "grouped_experts",
        "hardware_kernels",
        "kernel_fusion",
        "layer_recycling",
        "learned_routing",
    )
    excludes = {
        "adaptive_precision": "a compiled graph cannot call the kernels for packed weights",
        **dict.fromkeys(OTHER_ATTENTION, "the compiled graph computes exact attention in its own way"),
    }

    def __init__(self, config=None, bucket_tokens: int = 1024, backend: str = "inductor", **unknown):
        refuse_unknown(self.name, unknown, ("bucket_tokens", "backend"))
        if isinstance(bucket_tokens, bool) or not isinstance(bucket_tokens, int) or bucket_tokens < 1:
            raise ValueError(f"bucket_tokens must be a whole number of at least 1, got {bucket_tokens!r}.")
        super().__init__(bucket_tokens=bucket_tokens, backend=backend)
        self._before: dict[str, str] | None = None
        self.step: CompiledStep | None = None

    def apply(self, model) -> None:
        if self._before is not None:
            raise ValueError(f"{self.name} is already applied; revert it first.")
        decoder = _decoder_of(model)
        before = implementations(model)
        used = decoder.config._attn_implementation
        if used not in EXACT_IMPLEMENTATIONS:
            raise ValueError(
                f"{self.name} computes exact attention and the decoder has {used!r}; set one of "
                f"{', '.join(EXACT_IMPLEMENTATIONS)} first, or leave {self.name} away."
            )
        model.set_attn_implementation({"text_config": NAME} if "text_config" in before else NAME)
        self._before = before
        define_operators()
        for module in model.modules():
            if type(module) is nn.Linear:
                module.forward = TracedLinear(module)
        self.step = decoder.forward = CompiledStep(decoder, self.settings["backend"])

    def revert(self, model) -> None:
        if self._before is None:
            return
        for module in model.modules():
            ours = vars(module).get("forward")
            if isinstance(ours, (TracedLinear, CompiledStep)):
                ours.put_back()
        parts = {part: name for part, name in self._before.items() if part}
        model.set_attn_implementation(parts or self._before[""])
        self._before, self.step = None, None

    @property
    def failure(self) -> str | None:
        return None if self.step is None else self.step.failure

    def make_cache(self, model, batch_size: int, max_length: int) -> StaticCache:
        """A static cache for `max_length` tokens a row, rounded up to whole buckets."""
        bucket = self.settings["bucket_tokens"]
        return StaticCache(config=model.config, max_cache_len=-(-max(max_length, 1) // bucket) * bucket)


class _Replacement:
    """In the place of a module's `forward`, or of what another technique has put there."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.replaced = vars(module).get("forward")

    def plain(self, *args, **kwargs):
        if self.replaced is not None:
            return self.replaced(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    def put_back(self) -> None:
        if self.replaced is None:
            del self.module.forward
        else:
            self.module.forward = self.replaced


class TracedLinear(_Replacement):
    """Linear layers that take few rows through our kernel, also out of a compiled graph."""

    def __init__(self, module: nn.Linear):
        super().__init__(module)
        self.native = linear_kernel() is not None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.module.weight, self.module.bias
        if torch.compiler.is_compiling():
            if self.native and not torch.is_grad_enabled() and fits_compiled_linear(x, weight):
                return torch.ops.qwen3_vl.few_rows_linear(x, weight, bias)
            return F.linear(x, weight, bias)
        return native_linear(x, weight, bias) if supports_linear(x, weight, bias) else self.plain(x)


class CompiledStep(_Replacement):
    """The decoder's `forward`: one new token a row goes through the compiled graph, everything else the plain way.

    `failure` is why nothing is compiled any more, or `None`.
    """

    def __init__(self, module: nn.Module, backend: str):
        super().__init__(module)
        self.failure: str | None = None
        self.steps = 0
        self.compiled = torch.compile(self.plain, backend=backend, fullgraph=True, dynamic=False)

    def __call__(self, *args, **kwargs):
        if args or self.failure is not None or not self._is_decoding(**kwargs):
            return self.plain(*args, **kwargs)
        prepared = {**kwargs, **self._fixed_shapes(**kwargs)}
        try:
            output = self.compiled(**prepared)
        except _compiler_errors() as error:
            # Nothing has run yet: the graph is whole, so the cache is as it was.
            self.failure = _first_line(error)
            logger.warning(f"compiled_decode is off, decoding goes on uncompiled: {self.failure}")
            return self.plain(**kwargs)
        self.steps += 1
        return output

    def _is_decoding(self, inputs_embeds=None, past_key_values=None, attention_mask=None, **kwargs) -> bool:
        config = self.module.config
        asked = ("output_attentions", "output_hidden_states", "output_router_logits")
        return (
            not torch.compiler.is_compiling()
            and not torch.jit.is_tracing()
            and not torch.is_grad_enabled()
            and not self.module.training
            and inputs_embeds is not None
            and inputs_embeds.shape[1] == 1
            and not torch.is_autocast_enabled(inputs_embeds.device.type)
            and isinstance(past_key_values, Cache)
            and len(past_key_values.layers) > 0
            and all(type(layer) is StaticLayer and layer.is_initialized for layer in past_key_values.layers)
            and (attention_mask is None or (isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2))
            and kwargs.get("visual_pos_masks") is None
            and config._attn_implementation == NAME
            and not any(kwargs.get(name, getattr(config, name, False)) for name in asked)
        )

    def _fixed_shapes(self, inputs_embeds, past_key_values, attention_mask=None, position_ids=None, **kwargs) -> dict:
        """Arguments whose shapes and strides are the same at every step and for every request."""
        capacity, device = past_key_values.layers[0].max_cache_len, inputs_embeds.device
        held = past_key_values.get_seq_length() + 1
        for layer in past_key_values.layers:
            _let_move(layer)
        seen = torch.arange(capacity, device=device) < held
        seen = seen.expand(len(inputs_embeds), 1, 1, capacity)
        if attention_mask is not None:
            flags = F.pad(attention_mask[:, :capacity].bool(), (0, max(0, capacity - attention_mask.shape[1])))
            seen = seen & flags[:, None, None]
        state = None
        if device.type == "cpu":  # elsewhere reading them would wait for the device
            padded = attention_mask is not None and not bool(attention_mask.all())
            state = torch.tensor([int(held), padded], dtype=torch.int64)
            _check_room(int(held), capacity)
        if position_ids is None:
            position_ids = torch.as_tensor(held - 1, device=device).expand(1, len(inputs_embeds), 1)
        positions = position_ids if position_ids.ndim == 3 else position_ids[None]
        positions = positions[-3:].expand(3, -1, -1).contiguous()
        return {"attention_mask": seen.contiguous(), "position_ids": positions, "cache_state": state}


def _check_room(tokens: int, capacity: int) -> None:
    if tokens > capacity:
        raise ValueError(
            f"the static cache holds {capacity} tokens and token {tokens} came; make it larger (max_cache_len, or "
            "max_new_tokens before generate())."
        )


def _compiler_errors() -> tuple[type[Exception], ...]:
    """What the tracer and its backends raise, before anything of the graph has run."""
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException  # takes a second to import

    return FailOnRecompileLimitHit, TorchDynamoException


def _first_line(error: Exception) -> str:
    """What a backend raised, without the frames around it."""
    inner = getattr(error, "inner_exception", None) or error
    return f"{type(inner).__name__}: {(str(inner).strip() or 'no reason given').splitlines()[0]}"


def _let_move(layer: StaticLayer) -> None:
    """Lets a graph serve the next request's cache: a layer pins the addresses of its tensors, for CUDA graphs."""
    for tensor in (layer.keys, layer.values, layer.cumulative_length):
        if hasattr(tensor, "_dynamo_static_input_type"):
            del tensor._dynamo_static_input_type


def _decoder_of(model) -> nn.Module:
    for module in model.modules():
        if all(hasattr(module, part) for part in ("layers", "rotary_emb", "norm")):
            return module
    raise ValueError(f"compiled_decode found no decoder in {type(model).__name__}; apply it to a Qwen3-VL model.")
