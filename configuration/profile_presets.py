"""The presets of the optimization profile, as sections."""

from difflib import get_close_matches
from typing import Any


PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    # The same tokens as the plain model, up to rounding.
    "minimal": {
        "cpu": {"decode_linear": True, "faster_rotary": True},
        "optimization": {"attention": "qwen3_vl_exact"},
    },
    # Up to half a point of right answers for less memory and time.
    "balanced": {
        "memory": {"kv_cache": "int8"},
        "cpu": {"decode_linear": True, "faster_rotary": True},
        "optimization": {"attention": "qwen3_vl_exact", "weight_bits": 8},
    },
    # The fastest and smallest that still answers.
    "aggressive": {
        "memory": {"kv_cache": "int4"},
        "cpu": {"decode_linear": True, "faster_rotary": True},
        "optimization": {"attention": "qwen3_vl_exact", "weight_bits": 4, "visual_keep_ratio": 0.25},
    },
}


def preset_sections(name: str) -> dict[str, dict[str, Any]]:
    """Raises a `ValueError` for a preset that does not exist; the nearest is suggested."""
    if name not in PRESETS:
        nearest = get_close_matches(str(name), PRESETS, n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"there are {', '.join(PRESETS)}."
        raise ValueError(f"optim names an unknown preset {name!r}; {hint}")
    return {section: dict(values) for section, values in PRESETS[name].items()}
