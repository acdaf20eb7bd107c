"""Which modules of Qwen3-VL an adapter is put on, by name."""

from difflib import get_close_matches

from torch import nn


PRESETS = ("language", "vision", "language+vision", "mergers", "all-linear")
EXPERTS = ("gate_up_proj", "down_proj")


def lora_targets(model: nn.Module, preset: str = "language", experts: bool = True) -> dict[str, list[str]]:
    """The modules that a preset names, as arguments of PEFT's `LoraConfig`.

    `LoraConfig(r=16, **lora_targets(model, "language"))`. Names are whole, so that nothing else is hit: attention's
    fused `qkv` of the tower is in `vision`, and the mergers, DeepStack's too, are in `mergers` and `all-linear` only.
    Neither the head, nor the embeddings, nor routers of experts are in any preset. The model is not changed.

    Args:
        model (`nn.Module`): a Qwen3-VL model, not wrapped by PEFT yet.
        preset (`str`): `language` (the decoder's attention and feed-forward layers), `vision` (those of the tower,
            without mergers), `language+vision`, `mergers`, or `all-linear` (all of these).
        experts (`bool`): also name the stacked experts of a mixture-of-experts decoder, under `target_parameters`;
            DoRA and dropout do not work on those in PEFT 0.21.
    Returns:
        `target_modules`, and `target_parameters` where there are experts among the targets.
    Raises:
        ValueError: for an unknown preset, or if the model has none of its modules.
    """
    if preset not in PRESETS:
        nearest = get_close_matches(str(preset), PRESETS, n=1, cutoff=0.4)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"there are {', '.join(PRESETS)}."
        raise ValueError(f"there is no preset {preset!r} of LoRA targets; {hint}")
    parts = {"language", "vision", "mergers"} if preset == "all-linear" else set(preset.split("+"))
    modules, parameters = [], []
    for name, module in model.named_modules():
        if _part_of(name) not in parts:
            continue
        if isinstance(module, nn.Linear):
            modules.append(name)
        elif experts and all(getattr(getattr(module, part, None), "ndim", 0) == 3 for part in EXPERTS):
            parameters += [f"{name}.{part}" for part in EXPERTS]
    if not modules and not parameters:
        raise ValueError(
            f"{type(model).__name__} has no modules of preset {preset!r}; pass a plain Qwen3-VL model, before PEFT "
            "wraps it."
        )
    targets = {"target_modules": modules}
    if parameters:
        targets["target_parameters"] = parameters
    return targets


def _part_of(name: str) -> str | None:
    """The part of the model that a module's name lies in."""
    path = name.split(".")
    if "language_model" in path:
        return "language"
    if "visual" in path:
        return "mergers" if {"merger", "deepstack_merger_list"} & set(path) else "vision"
    return None
