"""Linear layers of bitsandbytes in the place of plain ones, and what `transformers` has to know of them.

Source: Dettmers et al., LLM.int8() (arXiv 2208.07339) for 8 bits, QLoRA's NF4 (arXiv 2305.14314) for 4.
"""

from collections.abc import Iterable, Mapping
from importlib import import_module

import torch
from torch import nn
from transformers.utils import is_bitsandbytes_available
from transformers.utils.quantization_config import BitsAndBytesConfig

from .precision_groups import PLAIN_BITS


OUTLIERS = 6.0  # inputs beyond it are multiplied in 16 bits, as the paper found it to be needed


def check_one_width(bits: int, chosen: Mapping[str, int | None]) -> None:
    """Raises a `ValueError` for what a configuration of bitsandbytes cannot say: two widths, or no linear layers.

    Args:
        bits (`int`): of the decoder.
        chosen (`dict`): of parts and blocks by name, `None` where nothing was asked for.
    """
    if bits == PLAIN_BITS:
        raise ValueError("with backend='bitsandbytes' bits must be 4 or 8, got 16.")
    for name, value in chosen.items():
        allowed = (PLAIN_BITS,) if name in ("embedding", "experts") else (bits, PLAIN_BITS)
        if value is not None and value not in allowed:
            choices = " or ".join(map(str, allowed))
            raise ValueError(f"with backend='bitsandbytes' and bits={bits} {name} must be {choices}, got {value}.")


def require_bitsandbytes(model: nn.Module) -> None:
    """Raises unless the package is there and the model lies where its kernels are fast.

    Raises:
        ImportError: without bitsandbytes.
        ValueError: for a model that does not lie on a GPU.
    """
    if not is_bitsandbytes_available():
        raise ImportError("backend='bitsandbytes' needs the package; pip install bitsandbytes, or leave backend away.")
    device = next(model.parameters()).device.type
    if device != "cuda":
        raise ValueError(
            f"backend='bitsandbytes' needs the model on a GPU and it lies on {device}; move it to cuda first, or "
            "leave backend away for kernels that are made for a CPU."
        )


def bitsandbytes_linear(linear: nn.Linear, bits: int) -> nn.Linear:
    """A layer of bitsandbytes with the rounded weights of a plain one, on its device, and its very bias."""
    layers = import_module("bitsandbytes.nn")  # by name: a Hub copy does not ask for packages that it does not import

    weight = linear.weight
    with torch.device("meta"):
        if bits == 8:
            made = layers.Linear8bitLt(
                linear.in_features, linear.out_features, bias=False, has_fp16_weights=False, threshold=OUTLIERS
            )
            made.weight = layers.Int8Params(
                weight.detach().to("cpu", copy=True), requires_grad=False, has_fp16_weights=False
            )
        else:
            made = layers.Linear4bit(
                linear.in_features, linear.out_features, bias=False, compute_dtype=weight.dtype, quant_type="nf4"
            )
            made.weight = layers.Params4bit(
                weight.detach().clone(), requires_grad=False, quant_type="nf4", quant_storage=torch.uint8, module=made
            )
    # What rounds is the move of the weight to its device.
    made.weight = made.weight.to(weight.device)
    made.bias = linear.bias
    return made


def mark_bitsandbytes(model, bits: int, packed: Iterable[str]) -> None:
    """Tells `transformers` that linear layers were replaced, which it then saves and loads as its own.

    Args:
        packed: names of the replaced layers; all others are named as ones to be left.
    """
    from transformers.quantizers.auto import AutoHfQuantizer

    packed = set(packed)
    left = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in packed]
    if bits == 8:
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=OUTLIERS, llm_int8_skip_modules=left)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=model.dtype,
            llm_int8_skip_modules=left,
        )
    model.hf_quantizer = AutoHfQuantizer.from_config(config)
    model.is_quantized, model.quantization_method = True, config.quant_method
    model.config.quantization_config = config
    setattr(model, f"is_loaded_in_{bits}bit", True)
