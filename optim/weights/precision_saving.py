"""Packed models as folders: in torchao's own format, so that stock `transformers` with torchao reads them too.

`transformers` asks a model's quantizer for what to write; ours writes each packed weight as the `Int8Tensor` or
`Int4Tensor` of torchao that it already is, number for number, and names torchao as the method in `config.json`. On
loading, torchao's quantizer builds these tensors, and `adopt_packed_weights` turns them into our modules.
"""

from typing import Any

import torch
from torch import nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils import is_torchao_available, logging
from transformers.utils.quantization_config import QuantizationConfigMixin, QuantizationMethod

from .packed_codes import PackedWeight
from .quantized_experts import PackedExperts
from .quantized_linear import PackedEmbedding, PackedLinear, PackedMatrix


logger = logging.get_logger(__name__)

EXPERT_WEIGHTS = ("gate_up_proj", "down_proj")


class PackedConfig(QuantizationConfigMixin):
    """Says that a model is packed, before it is saved; a saved one has torchao's configuration."""

    def __init__(self):
        self.quant_method = QuantizationMethod.TORCHAO


class PackedQuantizer(HfQuantizer):
    """What `transformers` asks about a packed model.

    Attributes:
        from_folder (`bool`): the weights were loaded packed, so that there are no others to go back to.
    """

    def __init__(self, from_folder: bool = False):
        super().__init__(PackedConfig(), pre_quantized=True)
        self.from_folder = from_folder

    def is_serializable(self, *args, **kwargs) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    def get_state_dict_and_metadata(self, model) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """The state dict with official names, its packed weights in torchao's safetensors form.

        Raises:
            ImportError: without torchao.
        """
        require_torchao("saving packed weights")
        from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

        matrices = packed_weights(model)
        state = {
            name: tensor
            for name, tensor in model.state_dict().items()
            if not isinstance(_owner(model, name), PackedMatrix)
        }
        written, seen = {}, set()
        for name, matrix in matrices.items():
            if id(matrix) not in seen:  # a head that shares the embedding's is tied again on loading
                written[name] = to_torchao(matrix)
                seen.add(id(matrix))
        model.config.quantization_config = torchao_config(written)
        return flatten_tensor_state_dict({**state, **written})

    def _dequantize(self, model, dtype=None):
        """Plain modules with the rounded weights; a configuration that was saved names its dtype as text."""
        unpack_model(model, getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        return model


def require_torchao(purpose: str) -> None:
    """Raises an `ImportError` that says how to get torchao, unless it is there."""
    if not is_torchao_available():
        raise ImportError(f'{purpose} needs torchao, whose format it is; pip install "qwen3-vl[quant]".')


def mark_packed(model, from_folder: bool = False) -> None:
    """Tells `transformers` that the model is quantized and how it is saved."""
    model.hf_quantizer = PackedQuantizer(from_folder)
    model.is_quantized = True
    model.quantization_method = QuantizationMethod.TORCHAO


def unmark_packed(model) -> None:
    """Takes back what `mark_packed`, `mark_bitsandbytes` and saving wrote."""
    loaded = ("is_loaded_in_4bit", "is_loaded_in_8bit")
    for name in ("hf_quantizer", "is_quantized", "quantization_method", *loaded):
        vars(model).pop(name, None)
    vars(model.config).pop("quantization_config", None)


def packed_weights(model: nn.Module) -> dict[str, PackedMatrix]:
    """Every packed weight by its official name; an embedding stands before a head that shares its matrix."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear | PackedEmbedding):
            found[f"{name}.weight"] = module.matrix
        elif isinstance(module, PackedExperts):
            found |= {f"{name}.gate_up_proj": module.gate_up, f"{name}.down_proj": module.down}
    return found


def _owner(model: nn.Module, tensor_name: str) -> nn.Module:
    return model.get_submodule(tensor_name.rpartition(".")[0])


def to_torchao(matrix: PackedMatrix) -> torch.Tensor:
    """The same weight as torchao holds it; codes are not copied."""
    from torchao.quantization import Int4Tensor, Int8Tensor

    whole = [1] * (matrix.codes.ndim - 1)
    if matrix.bits == 8:
        return Int8Tensor(matrix.codes, matrix.scale, [*whole, matrix.shape[-1]], matrix.like.dtype)
    turned = (one.transpose(-1, -2).contiguous() for one in (matrix.scale, matrix.zero))
    group = matrix.shape[-1] // matrix.scale.shape[-1]
    return Int4Tensor(matrix.codes.view(torch.int8), *turned, [*whole, group], matrix.shape)


def from_torchao(tensor: torch.Tensor, dtype: torch.dtype) -> PackedMatrix | None:
    """The packed matrix that a weight of torchao is, or `None` if our kernels do not know its form."""
    kind = type(tensor).__name__
    plain = getattr(tensor, "act_pre_scale", None) is None and getattr(tensor, "act_quant_kwargs", None) is None
    if kind == "Int8Tensor" and plain and tensor.block_size == [*[1] * (tensor.ndim - 1), tensor.shape[-1]]:
        zero = tensor.zero_point
        if zero is None or not zero.any():
            return PackedMatrix(PackedWeight(tensor.qdata, tensor.scale.float()), dtype)
    if kind == "Int4Tensor" and plain and tensor.activation_dtype == torch.bfloat16:
        turned = (one.transpose(-1, -2).bfloat16().contiguous() for one in (tensor.scale, tensor.zero_point))
        return PackedMatrix(PackedWeight(tensor.qdata.view(torch.uint8), *turned), dtype)
    return None


def torchao_config(written: dict[str, torch.Tensor]) -> Any:
    """`quantization_config` that names the form of every weight."""
    from torchao.quantization import FqnToConfig, Int4WeightOnlyConfig, Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    forms = {}
    for name, tensor in written.items():
        key = name.removesuffix(".weight")
        if type(tensor).__name__ == "Int8Tensor":
            forms[key] = Int8WeightOnlyConfig(version=2)
        else:
            forms[key] = Int4WeightOnlyConfig(group_size=tensor.block_size[-1])
    return TorchAoConfig(FqnToConfig(forms))


def adopt_packed_weights(model) -> None:
    """Turns the torchao weights of a model that was just loaded into packed modules; does nothing without any."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None or isinstance(quantizer, PackedQuantizer):
        return
    if getattr(quantizer.quantization_config, "quant_method", None) != QuantizationMethod.TORCHAO:
        return
    dtype, matrices, adopted = _plain_dtype(model), {}, 0
    for name, module in list(model.named_modules()):
        new = _adopted(module, dtype, matrices)
        if new is not None:
            model.set_submodule(name, new.train(module.training))
            adopted += 1
    if adopted:
        settings = model.config.quantization_config
        mark_packed(model, from_folder=True)
        model.config.quantization_config = settings
        model.all_tied_weights_keys = {}
        # How torchao's tensors were read is nothing to run backwards: they are written by our own quantizer.
        model._weight_conversions = [x for x in getattr(model, "_weight_conversions", None) or () if not _reads(x)]


def _reads(conversion) -> bool:
    """Whether a conversion of weights on loading is one of a quantizer's."""
    return any(hasattr(operation, "hf_quantizer") for operation in getattr(conversion, "operations", ()))


def _adopted(module: nn.Module, dtype: torch.dtype, matrices: dict[int, PackedMatrix | None]) -> nn.Module | None:
    def matrix(name: str) -> PackedMatrix | None:
        weight = getattr(module, name, None)
        if not isinstance(weight, torch.Tensor) or id(weight) in matrices:
            return matrices.get(id(weight))
        return matrices.setdefault(id(weight), from_torchao(weight, dtype))

    if isinstance(module, nn.Linear) and matrix("weight") is not None:
        return PackedLinear(matrix("weight"), module.bias)
    if isinstance(module, nn.Embedding) and matrix("weight") is not None:
        return PackedEmbedding(matrix("weight"), module.padding_idx)
    if all(matrix(name) is not None for name in EXPERT_WEIGHTS):
        return PackedExperts(*(matrix(name) for name in EXPERT_WEIGHTS), module)
    return None


def _plain_dtype(model: nn.Module) -> torch.dtype:
    """Of norms and other weights that are never packed."""
    for name, parameter in model.named_parameters():
        if "norm" in name and type(parameter.data) is torch.Tensor:
            return parameter.dtype
    return torch.get_default_dtype()


def unpack_model(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Puts plain linear layers, embeddings and experts with the rounded weights in the place of packed ones."""
    weights: dict[int, nn.Parameter] = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, PackedExperts):
            model.set_submodule(name, module.unpack(dtype))
        if not isinstance(module, PackedLinear | PackedEmbedding):
            continue
        key = id(module.matrix)
        if key not in weights:
            weights[key] = nn.Parameter(module.matrix.unpack().to(dtype or module.matrix.like.dtype))
        model.set_submodule(name, _plain_module(module, weights[key]))


def _plain_module(module: nn.Module, weight: nn.Parameter) -> nn.Module:
    with torch.device("meta"):
        if isinstance(module, PackedEmbedding):
            plain = nn.Embedding(module.num_embeddings, module.embedding_dim, module.padding_idx)
        else:
            plain = nn.Linear(module.in_features, module.out_features, bias=False)
            plain.bias = module.bias
    plain.weight = weight
    return plain.train(module.training)
