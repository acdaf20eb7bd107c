"""One processed sample, checked: what a packed row is made of."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .packing_positions import IMAGE, VIDEO, sample_positions


IGNORED = -100
# Pixels and grids of each modality, as the processor and the model name them.
PICTURES = {IMAGE: ("pixel_values", "image_grid_thw"), VIDEO: ("pixel_values_videos", "video_grid_thw")}


class SampleError(ValueError):
    """A sample that cannot be trained on. `reason` is the word under which skipped samples are counted."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class PackedSample:
    """A sample as it goes into a row.

    Args:
        input_ids, labels, types (`torch.Tensor`): (tokens,) int64; the first label is ignored, since in a row the
            token before it is another sample's.
        positions (`torch.Tensor`): (3, tokens) int64, those of the sample alone.
        pictures: pixels (patches, width) and grids (pictures, 3) by the model's argument names.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    types: torch.Tensor
    positions: torch.Tensor
    pictures: dict[str, torch.Tensor]

    @property
    def size(self) -> tuple[int, int]:
        """Tokens and vision patches."""
        grids = (self.pictures[grid] for _, grid in PICTURES.values() if grid in self.pictures)
        return len(self.input_ids), sum(int(grid.prod(1).sum()) for grid in grids)


def sample_size(sample: Mapping) -> tuple[int, int]:
    """Tokens without padding and vision patches of a processed sample, whose pixels are not looked at."""
    ids = _tensor(sample, "input_ids")
    mask = _tensor(sample, "attention_mask")
    tokens = 0 if ids is None else ids.numel() if mask is None else int(mask.bool().sum())
    grids = [_tensor(sample, grid) for _, grid in PICTURES.values()]
    return tokens, sum(int(grid.prod(-1).sum()) for grid in grids if grid is not None)


def read_sample(sample: Mapping, name: str, config) -> PackedSample:
    """Checks a processed sample and finds its positions.

    Args:
        sample: `input_ids` and `labels` (or `assistant_masks`, true where the assistant's tokens are) of shape
            (tokens,) or (1, tokens), as tensors, arrays or lists; optionally `attention_mask`, whose padding is cut,
            `mm_token_type_ids`, and pixels with grids. Other columns are left alone.
        name (`str`): how an error calls the sample.
        config: of the model.
    Raises:
        SampleError: in one line that names the sample.
    """
    ids = _row(sample, "input_ids", name)
    if ids is None or ids.numel() == 0:
        raise SampleError("no_input_ids", f"{name} has no input_ids; pass the output of the processor.")
    if ids.is_floating_point():
        raise SampleError("wrong_dtype", f"{name} has input_ids of {ids.dtype}; pass whole numbers.")
    ids = ids.long()
    rows = {"labels": _labels(sample, ids, name), "types": _types(sample, ids, name, config)}
    mask = _row(sample, "attention_mask", name)
    for what, values in (*rows.items(), ("attention_mask", mask)):
        if values is not None and len(values) != len(ids):
            raise SampleError(
                "wrong_length", f"{name} has {len(ids)} input_ids but {len(values)} {what}; pass one a token."
            )
    if mask is not None:
        ids, rows = ids[mask.bool()], {what: values[mask.bool()] for what, values in rows.items()}
    rows["labels"][:1] = IGNORED
    if not bool((rows["labels"] != IGNORED).any()):
        raise SampleError(
            "no_labels",
            f"{name} has no token to learn, all {len(ids)} labels are {IGNORED}; check how its answer is marked.",
        )
    pictures = _pictures(sample, name, config.vision_config)
    grids = {modality: pictures.get(grid) for modality, (_, grid) in PICTURES.items()}
    try:
        positions = sample_positions(rows["types"], grids, config.vision_config.spatial_merge_size)
    except ValueError as error:
        raise SampleError("wrong_pictures", f"{name} {error}.") from None
    return PackedSample(ids, positions=positions, pictures=pictures, **rows)


def _tensor(sample: Mapping, key: str) -> torch.Tensor | None:
    value = sample.get(key)
    if value is None:
        return None
    value = torch.as_tensor(value)
    return value if value.numel() else None


def _row(sample: Mapping, key: str, name: str) -> torch.Tensor | None:
    """A column of one value a token, (tokens,)."""
    value = _tensor(sample, key)
    if value is not None and value.ndim == 2 and len(value) == 1:
        return value[0]
    if value is not None and value.ndim != 1:
        raise SampleError(
            "wrong_shape",
            f"{name} has {key} of shape {tuple(value.shape)}; a sample is one row, (tokens,) or (1, tokens).",
        )
    return value


def _labels(sample: Mapping, ids: torch.Tensor, name: str) -> torch.Tensor:
    labels = _row(sample, "labels", name)
    if labels is not None:
        return labels.long().clone()
    mask = _row(sample, "assistant_masks", name)
    if mask is None:
        raise SampleError(
            "no_labels", f"{name} has no labels; add them, for instance with assistant_labels(sample, tokenizer)."
        )
    return torch.where(mask.bool(), ids, IGNORED) if len(mask) == len(ids) else mask.long()


def _types(sample: Mapping, ids: torch.Tensor, name: str, config) -> torch.Tensor:
    types = _row(sample, "mm_token_type_ids", name)
    if types is not None:
        return types.long()
    return (ids == config.image_token_id) * IMAGE + (ids == config.video_token_id) * VIDEO


def _pictures(sample: Mapping, name: str, vision) -> dict[str, torch.Tensor]:
    found = {}
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    for pixel_name, grid_name in PICTURES.values():
        pixels, grid = _tensor(sample, pixel_name), _tensor(sample, grid_name)
        if pixels is None and grid is None:
            continue
        if pixels is None or grid is None:
            missing = pixel_name if pixels is None else grid_name
            raise SampleError("wrong_pictures", f"{name} has no {missing} beside its other half; pass both.")
        if grid.ndim != 2 or grid.shape[1] != 3 or grid.is_floating_point() or int(grid.min()) < 1:
            raise SampleError(
                "wrong_pictures", f"{name} has {grid_name} {grid.tolist()}; pass (pictures, 3) positive whole numbers."
            )
        patches = int(grid.prod(1).sum())
        if tuple(pixels.shape) != (patches, width) or not pixels.is_floating_point():
            raise SampleError(
                "wrong_pictures",
                f"{name} has {pixel_name} of {pixels.dtype} and shape {tuple(pixels.shape)} but {grid_name} calls for "
                f"floating-point ({patches}, {width}); pass pixels and grids of the same processor call.",
            )
        if not bool(torch.isfinite(pixels).all()):
            raise SampleError(
                "wrong_pictures", f"{name} has NaN or infinity in {pixel_name}; check the picture and its scaling."
            )
        found[pixel_name], found[grid_name] = pixels, grid.long()
    return found
