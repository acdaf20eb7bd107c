"""The released models by name, so that they can be planned for without a network or their weights.

Numbers of the published `config.json` files, as far as memory depends on them.
"""

from functools import cache
from typing import Any

from .configuration_qwen3_vl import Qwen3VLConfig
from .configuration_qwen3_vl_moe import Qwen3VLMoeConfig


_SMALL_TOWER = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": [5, 11, 17]}
_LARGE_TOWER = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "deepstack_visual_indexes": [8, 16, 24]}
# hidden size, inner size, layers, query heads, key and value heads
_DENSE = {
    "2B": (2048, 6144, 28, 16, 8),
    "4B": (2560, 9728, 36, 32, 8),
    "8B": (4096, 12288, 36, 32, 8),
    "32B": (5120, 25600, 64, 64, 8),
    "30B-A3B": (2048, 6144, 48, 32, 4),
    "235B-A22B": (4096, 12288, 94, 64, 4),
}
_EXPERT_INNER = {"30B-A3B": 768, "235B-A22B": 1536}
_TIED = _SMALL = ("2B", "4B")
EDITIONS = ("Instruct", "Thinking")
NAMES = tuple(f"Qwen/Qwen3-VL-{size}-{edition}" for size in _DENSE for edition in EDITIONS)


def official_config(name: str) -> Any:
    """The configuration of a released model by its Hub name, or `None` for another name."""
    size, _, edition = name.removeprefix("Qwen/Qwen3-VL-").rpartition("-")
    if not name.startswith("Qwen/Qwen3-VL-") or size not in _DENSE or edition not in EDITIONS:
        return None
    hidden, inner, layers, heads, kv_heads = _DENSE[size]
    text = {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 128,
        "vocab_size": 151936,
        "dtype": "bfloat16",
    }
    if size in _EXPERT_INNER:
        text |= {"moe_intermediate_size": _EXPERT_INNER[size], "num_experts": 128, "num_experts_per_tok": 8}
    config_class = Qwen3VLMoeConfig if size in _EXPERT_INNER else Qwen3VLConfig
    return config_class(
        text_config=text,
        vision_config={**(_SMALL_TOWER if size in _SMALL else _LARGE_TOWER), "out_hidden_size": hidden},
        tie_word_embeddings=size in _TIED,
    )


@cache
def default_config() -> Any:
    """The configuration that stands for a model where none is named: that of the 2B one. Not to be written to."""
    return official_config("Qwen/Qwen3-VL-2B-Instruct")
