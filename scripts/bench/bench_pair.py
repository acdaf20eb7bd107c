"""Our model and the stock one with the same random weights, at official widths and few layers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from bench_settings import Settings


OFFICIAL_VOCABULARY, QUICK_VOCABULARY = 151936, 2048
# The published widths of Qwen3-VL-2B.
TEXT_2B = {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 262144,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 5000000.0,
        "mrope_section": [24, 20, 20],
        "mrope_interleaved": True,
    },
}
VISION_2B = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_heads": 16,
    "out_hidden_size": 2048,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "num_position_embeddings": 2304,
}


@dataclass
class ModelPair:
    """Two models that share their weights' memory, so that a comparison holds one copy."""

    ours: Any
    stock: Any


def special_tokens(quick: bool) -> dict[str, int]:
    """The ids that frame a picture; in a quick run the vocabulary is small, so they lie lower."""
    offset = QUICK_VOCABULARY - OFFICIAL_VOCABULARY if quick else 0
    names = ("vision_start", "vision_end", "image", "video")
    return {name: token + offset for name, token in zip(names, (151652, 151653, 151655, 151656), strict=True)}


def config_values(text_layers: int, vision_layers: int, quick: bool) -> dict[str, Any]:
    """A 2B configuration cut to a number of layers."""
    vocabulary = QUICK_VOCABULARY if quick else OFFICIAL_VOCABULARY
    deepstack = sorted({vision_layers // 4, vision_layers // 2, 3 * vision_layers // 4})
    return {
        "text_config": {
            **TEXT_2B,
            "vocab_size": vocabulary,
            "num_hidden_layers": text_layers,
            "tie_word_embeddings": True,
        },
        "vision_config": {**VISION_2B, "depth": vision_layers, "deepstack_visual_indexes": deepstack},
        **{f"{name}_token_id": token for name, token in special_tokens(quick).items()},
        "tie_word_embeddings": True,
    }


def stock_classes() -> tuple[type, type]:
    """Configuration and model of the installed Transformers, whatever is registered."""
    from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLConfig
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLForConditionalGeneration

    return Qwen3VLConfig, Qwen3VLForConditionalGeneration


def our_classes() -> tuple[type, type]:
    import qwen3_vl

    return qwen3_vl.Qwen3VLConfig, qwen3_vl.Qwen3VLForConditionalGeneration


def build_pair(
    settings: Settings, dtype: torch.dtype, *, text_layers: int | None = None, only_stock: bool = False
) -> ModelPair:
    """Builds stock with seeded random weights and gives ours the same tensors.

    Args:
        text_layers (`int`, *optional*): in place of the settings' number.
        only_stock (`bool`): gives the one stock model as both sides.
    """
    values = config_values(text_layers or settings.text_layers, settings.vision_layers, settings.quick)
    stock_config, stock_model = stock_classes()
    our_config, our_model = stock_classes() if settings.against_itself else our_classes()
    torch.manual_seed(0)
    with torch.device(settings.device), _default_dtype(dtype):
        stock = stock_model(stock_config(**values)).eval()
        if only_stock:
            return ModelPair(stock, stock)
        ours = our_model(our_config(**values)).eval()
    ours.load_state_dict(stock.state_dict(), strict=True, assign=True)
    ours.tie_weights()
    return ModelPair(ours, stock)


def sharing_weights(model: Any) -> Any:
    """The same model again, whose parameters lie where those of the other do until a technique replaces them."""
    memory = {id(one): torch.nn.Parameter(one.detach(), one.requires_grad) for one in model.parameters()}
    return copy.deepcopy(model, memory)


def without_compiled(work: Callable[[], Any]) -> Callable[[], Any]:
    """`work` as it runs on a machine without a compiler: our attention in plain PyTorch."""
    from qwen3_vl.optim.native import native_attention

    def plain() -> Any:
        with mock.patch.object(native_attention, "kernels", lambda: None):
            return work()

    return plain


class _default_dtype:
    """Parameters are made in `dtype` at once; the rotary tables stay in float32, as `from_pretrained` leaves them."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

    def __enter__(self) -> None:
        self.before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)

    def __exit__(self, *error: object) -> None:
        torch.set_default_dtype(self.before)


def picture_inputs(
    settings: Settings, dtype: torch.dtype, *, text_tokens: int, grid: tuple[int, int] | None
) -> dict[str, torch.Tensor]:
    """Model inputs with one random picture of `grid` patches (height, width) before `text_tokens` tokens of text."""
    generator = torch.Generator().manual_seed(1)
    tokens = special_tokens(settings.quick)
    text = torch.randint(0, tokens["vision_start"] // 2, (1, text_tokens), generator=generator)
    inputs: dict[str, torch.Tensor] = {}
    if grid is None:
        ids = text
    else:
        height, width = grid
        picture = [tokens["vision_start"], *[tokens["image"]] * (height * width // 4), tokens["vision_end"]]
        ids = torch.cat([torch.tensor([picture]), text], dim=1)
        patches = torch.randn(height * width, 3 * 2 * 16 * 16, generator=generator)
        inputs["pixel_values"] = patches.to(dtype)
        inputs["image_grid_thw"] = torch.tensor([[1, height, width]])
        inputs["mm_token_type_ids"] = (ids == tokens["image"]).long()
    inputs["input_ids"] = ids
    inputs["attention_mask"] = torch.ones_like(ids)
    return {name: tensor.to(settings.device) for name, tensor in inputs.items()}
