"""What all Qwen3-VL classes share: loading and saving, output types, and the attention reference."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.hub import cached_file

from ..configuration.configuration_qwen3_vl import Qwen3VLConfig
from ..configuration.versions_qwen3_vl import check_transformers_version
from ..optim.orchestrator_optim import apply_profile
from .hub_export import save_code_files


check_transformers_version()


@dataclass
class Qwen3VLVisionOutput(BaseModelOutputWithPooling):
    """Output of the vision tower.

    `last_hidden_state` (patches, vision hidden size); `pooler_output` (visual tokens, decoder hidden size), or a
    tuple with one such tensor a picture; `deepstack_features`: for every DeepStack level the same as
    `pooler_output`.
    """

    deepstack_features: list | None = None


class Qwen3VLPreTrainedModel(PreTrainedModel):
    """Loading, saving and the capabilities that `transformers` asks a model for."""

    config_class = Qwen3VLConfig
    base_model_prefix = "model"
    input_modalities = ("image", "video", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["Qwen3VLTextDecoderLayer", "Qwen3VLVisionBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """Loads a checkpoint as `transformers` does, then applies the techniques its `optim` profile names.

        Raises:
            ValueError: if a safetensors file is corrupt or cut short; the message names the file.
        """
        try:
            loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        except SafetensorError as error:
            culprit = _first_unreadable_shard(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
            raise ValueError(
                f"the weights in {culprit} cannot be read ({error}); the file is corrupt or was cut short, "
                "download or save it again."
            ) from error
        apply_profile(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    def save_pretrained(self, save_directory, is_main_process: bool = True, *args, **kwargs):
        """Saves as `transformers` does; a model that came from a `trust_remote_code` folder keeps its code files."""
        if getattr(self.config, "auto_map", None) and is_main_process:
            save_code_files(save_directory, self.config)
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)

    def _upload_modified_files(self, working_dir, repo_id, files_timestamps, *args, **kwargs):
        # Stock uploads what is newer than its first look at the folder, and the code is written before that.
        others = {name: time for name, time in files_timestamps.items() if not name.endswith(".py")}
        return super()._upload_modified_files(working_dir, repo_id, others, *args, **kwargs)


def _first_unreadable_shard(name_or_path, subfolder: str) -> str:
    folder = Path(str(name_or_path), subfolder)
    if not folder.is_dir():  # a Hub repository: what was loaded lies in the local cache
        config = cached_file(name_or_path, "config.json", subfolder=subfolder, local_files_only=True)
        folder = Path(config).parent
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError:
            return str(path)
    return str(folder)


def repeat_kv(hidden_states: torch.Tensor, n_rep: int) -> torch.Tensor:
    """Copies every key or value head `n_rep` times: (B, kv_heads, T, D) to (B, kv_heads * n_rep, T, D)."""
    if n_rep == 1:
        return hidden_states
    return hidden_states.repeat_interleave(n_rep, dim=1)


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    """Swaps the two halves of the last dimension and negates the new first one."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention as it is defined, with its weights; the reference for every faster implementation.

    Args:
        query (`torch.Tensor`): (B, heads, T, D).
        key, value (`torch.Tensor`): (B, kv_heads, S, D).
        attention_mask (`torch.Tensor`, *optional*): additive, broadcast to (B, heads, T, S).
        scaling (`float`): factor on the scores, before the mask.
    Returns:
        output (B, T, heads, D) and weights (B, heads, T, S). The softmax runs in float32.
    """
    key = repeat_kv(key, module.num_key_value_groups)
    value = repeat_kv(value, module.num_key_value_groups)
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights
