"""Pictures to patches, without torchvision: resized by Pillow as bytes, cut as bytes, made floats once at the end."""

import base64
import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.image_utils import ImageInput, PILImageResampling, SizeDict, load_image
from transformers.processing_utils import ImagesKwargs
from transformers.utils import logging

from ..configuration.visual_sizes import fit_size
from .patches_qwen3_vl import cut_picture, find_affine, patchify, write_pixels


logger = logging.get_logger(__name__)

# Below this many output floats, threads cost more than they save.
MIN_VALUES_FOR_THREADS = 1_000_000


class Qwen3VLImagesKwargs(ImagesKwargs, total=False):
    """What a call takes beyond the common picture arguments.

    min_pixels (`int`, *optional*), max_pixels (`int`, *optional*):
        bounds on height times width after resizing; another spelling of `size["shortest_edge"]` and
        `size["longest_edge"]`, which hold pixel counts for this model, not edges.
    patch_size (`int`, *optional*), temporal_patch_size (`int`, *optional*), merge_size (`int`, *optional*):
        as in the vision config.
    """

    min_pixels: int | None
    max_pixels: int | None
    patch_size: int
    temporal_patch_size: int
    merge_size: int


def describe_source(source: Any) -> str:
    """Names an input for an error message, in a few words whatever it holds."""
    if isinstance(source, (str, os.PathLike)):
        text = str(source)
        return repr(text if len(text) <= 80 else f"{text[:60]}… ({len(text)} characters)")
    if isinstance(source, (bytes, bytearray)):
        return f"{len(source)} bytes"
    shape = getattr(source, "shape", None)
    return type(source).__name__ if shape is None else f"{type(source).__name__} of shape {tuple(shape)}"


def open_picture(source: str | os.PathLike | bytes | io.IOBase) -> Image.Image:
    """Reads one picture as RGB, upright by its EXIF tag, as the stock loader does.

    Args:
        source: a path, a `file://` or `http(s)://` address, base64 text (bare or as a `data:image/` address), the
            file's bytes, or an open binary file.
    Raises:
        FileNotFoundError: for a path that is not there.
        ValueError: for something Pillow cannot read, or a damaged file.
    """
    try:
        if isinstance(source, str) and source.startswith(("http://", "https://")):
            return load_image(source)
        with Image.open(_picture_file(source)) as picture:
            return ImageOps.exif_transpose(picture).convert("RGB")
    except FileNotFoundError:
        raise
    except Exception as error:
        reason = (str(error).splitlines() or ["no detail"])[0][:120]
        raise ValueError(
            f"picture {describe_source(source)} cannot be read ({type(error).__name__}: {reason}); "
            "pass a whole file of a format that Pillow opens, such as PNG or JPEG."
        ) from error


def _picture_file(source: Any) -> Any:
    if isinstance(source, (bytes, bytearray)):
        return io.BytesIO(source)
    if not isinstance(source, str):
        return source
    path = source.removeprefix("file://")
    if len(path) < 4096 and os.path.exists(path):
        return path
    encoded = source.split(",", 1)[-1] if source.startswith("data:image/") else source
    # A name with a dot or no base64 form at all was meant as a path: say so, instead of failing to decode it.
    if not source.startswith("data:image/") and (len(source) < 64 or "." in source):
        raise FileNotFoundError(
            f"picture {describe_source(source)} is no existing file; "
            "pass a path, an http(s) address, base64 text or a picture."
        )
    return io.BytesIO(base64.decodebytes(encoded.encode()))


def flatten_pictures(images: Any) -> list[Any]:
    """Lists the pictures of any nesting of lists and 4-D arrays, in order; reads nothing."""
    if isinstance(images, (list, tuple)):
        return [picture for item in images for picture in flatten_pictures(item)]
    if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4:
        return list(images)
    return [images]


def picture_to_rgb(picture: Image.Image) -> Image.Image:
    """Converts any Pillow mode to RGB; what is transparent becomes white. EXIF rotation is left to `open_picture`."""
    if "A" in picture.getbands() or picture.info.get("transparency") is not None:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, picture).convert("RGB")
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def check_finite(values: np.ndarray | torch.Tensor, name: str) -> None:
    """Raises for NaN or infinity in a float array."""
    finite = torch.isfinite(values).all() if isinstance(values, torch.Tensor) else np.isfinite(values).all()
    if not finite:
        raise ValueError(f"{name} holds NaN or infinite pixels; clean it with nan_to_num or drop it.")


def array_to_rgb(picture: np.ndarray | torch.Tensor, index: int, input_data_format: str | None = None) -> np.ndarray:
    """Lays an array out as (height, width, 3), repeating grey and blending alpha over white.

    Raises:
        TypeError: for a dtype that holds no pixel values.
        ValueError: for a shape that is no picture, or for NaN.
    """
    name = f"picture {index}"
    if isinstance(picture, torch.Tensor):
        picture = picture.detach().cpu()
        picture = (picture.float() if picture.dtype == torch.bfloat16 else picture).numpy()
    if picture.dtype.kind not in "uif":
        raise TypeError(f"{name} has dtype {picture.dtype}; pass uint8, another integer type, or floats.")
    if picture.ndim == 2:
        picture = picture[None]
        input_data_format = "channels_first"
    if picture.ndim != 3:
        raise ValueError(
            f"{name} has shape {picture.shape}; pass (height, width), (height, width, channels) or channels first."
        )
    layout = getattr(input_data_format, "value", input_data_format)
    if layout is None:
        layout = "channels_first" if picture.shape[0] in (1, 3, 4) else "channels_last"
    if layout == "channels_first":
        picture = np.moveaxis(picture, 0, -1)
    channels = picture.shape[-1]
    if channels not in (1, 3, 4):
        raise ValueError(
            f"{name} has shape {picture.shape}; one axis must hold 1, 3 or 4 channels; "
            "say which with input_data_format."
        )
    if picture.dtype.kind == "f":
        check_finite(picture, name)
    if channels == 1:
        return np.repeat(picture, 3, axis=-1)
    if channels == 3:
        return picture
    if picture.dtype.kind == "f" and (picture.min() < 0 or picture.max() > 1):
        raise ValueError(f"{name} has an alpha channel and floats outside [0, 1]; divide by 255, or pass uint8.")
    white = 1.0 if picture.dtype.kind == "f" else 255
    alpha = picture[..., 3:] / white
    blended = alpha * picture[..., :3] + (1 - alpha) * white
    return (np.round(blended) if white == 255 else blended).astype(picture.dtype)


class Qwen3VLImageProcessor(BaseImageProcessor):
    """Makes `pixel_values` and `image_grid_thw` from pictures; equal to the stock Pillow processor, and faster.

    A picture is resized once so that both sides are multiples of `patch_size * merge_size` and its pixels lie between
    `size["shortest_edge"]` and `size["longest_edge"]` (pixel counts, by the checkpoints' convention), then cut into
    patches. Bytes stay bytes until the last step. Several pictures share `torch.get_num_threads()` threads.

    Defaults are those of the released checkpoints. `from_pretrained` reads a released folder or one written by stock,
    also with the older `min_pixels` and `max_pixels`; what `save_pretrained` writes, stock loads.

    Source of the resizing rule: Wang et al., Qwen2-VL (arXiv:2409.12191), section 2.1; Qwen3-VL patches are 16 pixels.
    """

    resample = PILImageResampling.BICUBIC
    size = {"shortest_edge": 256 * 256, "longest_edge": 4096 * 4096}
    default_to_square = False
    do_resize = True
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    image_mean = (0.5, 0.5, 0.5)
    image_std = (0.5, 0.5, 0.5)
    do_convert_rgb = True
    patch_size = 16
    temporal_patch_size = 2
    merge_size = 2
    valid_kwargs = Qwen3VLImagesKwargs
    model_input_names = ["pixel_values", "image_grid_thw"]

    def __init__(self, **kwargs: Any):
        size = merge_pixel_bounds(
            kwargs.pop("size", None), kwargs.pop("min_pixels", None), kwargs.pop("max_pixels", None), self.size
        )
        super().__init__(size=size, **kwargs)
        self._set_attributes(size=size, **kwargs)

    @property
    def backend(self) -> str:
        return "pil"

    def fetch_images(self, images: Any) -> Any:
        """Reads what is given as a path, an address, base64 text, bytes or a file; hands pictures and arrays through.

        Args:
            images: one picture or any nesting of lists; the nesting is kept.
        """
        if isinstance(images, (list, tuple)):
            return [self.fetch_images(item) for item in images]
        if isinstance(images, (Image.Image, np.ndarray, torch.Tensor)):
            return images
        if isinstance(images, (str, os.PathLike, bytes, bytearray)) or hasattr(images, "read"):
            return open_picture(images if not isinstance(images, Path) else str(images))
        raise TypeError(
            "a picture must be a Pillow image, an array, a path, an address, base64 text or bytes, "
            f"got {type(images).__name__}."
        )

    def preprocess(self, images: ImageInput, **kwargs: Any) -> BatchFeature:
        """Resizes, cuts and normalizes pictures.

        Args:
            images: one picture or any nesting of lists: Pillow images of any mode, arrays or tensors ((height, width),
                channels last or first, uint8 or floats), paths, addresses, bytes. A 4-D array is a batch.
            kwargs: any attribute of this class for this call; `return_tensors` (`"pt"`, `"np"` or `None`, which gives
                numpy arrays).
        Returns:
            `BatchFeature` with `pixel_values` (float32, (patches of all pictures, channels * temporal_patch_size *
            patch_size**2)) and `image_grid_thw` (int64, (pictures, 3): patches along time, height and width).
        Raises:
            ValueError: for no pictures, a picture smaller than a patch, an aspect ratio over 200, NaN, a damaged file,
                or settings that do not fit together.
            TypeError: for something that is no picture.
        """
        settings = self._settings(kwargs)
        pictures = flatten_pictures(self.fetch_images(images))
        if not pictures:
            raise ValueError("got no pictures; pass at least one, or leave `images` out.")
        planned = [self._plan(picture, index, settings) for index, picture in enumerate(pictures)]
        pixel_values, grids = self._run(planned, settings)
        features = BatchFeature(
            data={"pixel_values": pixel_values, "image_grid_thw": grids}, tensor_type=settings["return_tensors"]
        )
        return features if settings["device"] is None else features.to(settings["device"])

    def _settings(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        _, settings = settings_of_call(self, kwargs)
        for name in ("image_mean", "image_std"):
            value = settings[name]
            settings[name] = tuple(value) if isinstance(value, Sequence) else (value,) * 3
            if settings["do_normalize"] and (
                len(settings[name]) != 3 or None in settings[name] or (name == "image_std" and 0 in settings[name])
            ):
                raise ValueError(
                    f"{name} must hold 3 numbers, none 0 for image_std, got {value!r}; or pass do_normalize=False."
                )
        return settings

    def _plan(self, picture: Any, index: int, settings: dict[str, Any]) -> tuple[Any, bool, int, int]:
        """Brings one picture to Pillow RGB (or a float array where nothing is resized) and picks its size."""
        was_unit_floats = False
        if isinstance(picture, Image.Image):
            try:
                picture.load()
                picture = picture_to_rgb(picture) if settings["do_convert_rgb"] or picture.mode == "RGB" else picture
            except (OSError, SyntaxError) as error:
                raise ValueError(
                    f"picture {index} cannot be decoded ({error}); pass a whole, undamaged file."
                ) from error
            if picture.mode != "RGB":
                raise ValueError(
                    f"picture {index} has mode {picture.mode}, and the model takes RGB; pass do_convert_rgb=True."
                )
            height, width = picture.height, picture.width
        else:
            picture = array_to_rgb(picture, index, settings["input_data_format"])
            height, width = picture.shape[:2]
        if min(height, width) < settings["patch_size"]:
            raise ValueError(
                f"picture {index} is {height}x{width} pixels (height x width), smaller than one patch of "
                f"{settings['patch_size']}; enlarge it first."
            )
        if isinstance(picture, np.ndarray) and (settings["do_resize"] or picture.dtype == np.uint8):
            picture, was_unit_floats = array_to_picture(picture, index)
            if was_unit_floats and settings["do_rescale"]:
                logger.warning_once(
                    "Float pixels in [0, 1] are rescaled by 1/255 once more, as the stock processor does; "
                    "pass do_rescale=False for floats that are already scaled."
                )
        factor = settings["patch_size"] * settings["merge_size"]
        if settings["do_resize"]:
            size = settings["size"]
            height, width = fit_size(height, width, factor, size["shortest_edge"], size["longest_edge"])
        elif height % factor or width % factor:
            raise ValueError(
                f"picture {index} is {height}x{width} pixels; without do_resize both sides must be "
                f"multiples of {factor}."
            )
        return picture, was_unit_floats, height, width

    def _run(
        self, planned: list[tuple[Any, bool, int, int]], settings: dict[str, Any]
    ) -> tuple[np.ndarray, np.ndarray]:
        patch, merge, depth = (settings[name] for name in ("patch_size", "merge_size", "temporal_patch_size"))
        grids = np.array([[1, height // patch, width // patch] for *_, height, width in planned], dtype=np.int64)
        ends = grids.prod(axis=1).cumsum().tolist()
        pixel_values = np.empty((ends[-1], 3 * depth * patch * patch), dtype=np.float32)
        out = pixel_values.reshape(-1, 3, depth, patch, patch)
        maps = {unit: byte_map(settings, unit) for unit in {unit for _, unit, *_ in planned}}

        def make(index: int) -> None:
            picture, unit_floats, height, width = planned[index]
            target = out[ends[index - 1] if index else 0 : ends[index]]
            if isinstance(picture, np.ndarray):
                write_floats(picture, target, settings)
                return
            if settings["do_resize"]:
                picture = picture.resize((width, height), resample=settings["resample"])
            write_pixels(cut_picture(picture, patch, merge), *maps[unit_floats], target)

        threads = min(len(planned), torch.get_num_threads())
        if threads == 1 or pixel_values.size < MIN_VALUES_FOR_THREADS:
            for index in range(len(planned)):
                make(index)
        else:
            # Pillow and numpy let go of the interpreter lock while they work on pixels.
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(make, range(len(planned))))
        return pixel_values, grids

    def get_number_of_image_patches(self, height: int, width: int, images_kwargs: dict | None = None) -> int:
        """Counts the patches of a picture of this size without making it; vLLM calls this by name.

        Args:
            height (`int`), width (`int`): size in pixels before resizing.
            images_kwargs (`dict`, *optional*): settings of the call, such as `min_pixels`, `max_pixels` or `size`.
        """
        given = {name: value for name, value in (images_kwargs or {}).items() if value is not None}
        patch, merge = given.get("patch_size", self.patch_size), given.get("merge_size", self.merge_size)
        size = merge_pixel_bounds(given.get("size"), given.get("min_pixels"), given.get("max_pixels"), self.size)
        height, width = fit_size(height, width, patch * merge, size["shortest_edge"], size["longest_edge"])
        return (height // patch) * (width // patch)

    def count_tokens(self, height: int, width: int, **images_kwargs: Any) -> int:
        """Counts the placeholder tokens a picture of this size takes in the prompt: its patches, merged."""
        merge = images_kwargs.get("merge_size") or self.merge_size
        return self.get_number_of_image_patches(height, width, images_kwargs) // merge**2

    def to_dict(self) -> dict[str, Any]:
        # The released class name, whatever this class is called where it was loaded: stock resolves by it.
        kept = self.__dict__.get("image_processor_type")
        written = super().to_dict()
        written["image_processor_type"] = kept if str(kept).startswith("Qwen2VL") else "Qwen2VLImageProcessorFast"
        written["processor_class"] = "Qwen3VLProcessor"
        return written


def settings_of_call(processor: Any, kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a call names, and with it every setting of a picture or video processor for that call.

    Raises:
        TypeError: for an argument the processor does not know.
        ValueError: for pixel bounds or patch sizes that do not fit.
    """
    names = processor.valid_kwargs.__annotations__
    if unknown := sorted(set(kwargs) - set(names)):
        raise TypeError(
            f"unknown argument {unknown[0]!r} for {type(processor).__name__}; known: {', '.join(sorted(names))}."
        )
    given = {name: value for name, value in kwargs.items() if value is not None}
    settings = {name: given.get(name, getattr(processor, name, None)) for name in names}
    settings["size"] = merge_pixel_bounds(
        given.get("size"), given.get("min_pixels"), given.get("max_pixels"), processor.size
    )
    for name in ("patch_size", "temporal_patch_size", "merge_size"):
        if not isinstance(settings[name], int) or settings[name] < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {settings[name]!r}.")
    return given, settings


def merge_pixel_bounds(
    size: Any, min_pixels: int | None, max_pixels: int | None, default: dict[str, int] | SizeDict
) -> dict[str, int]:
    """Reads the pixel bounds from any accepted spelling: `size`, with either pair of keys, or the two numbers.

    Raises:
        ValueError: for a `size` with other keys, for bounds below 1, or for a minimum above the maximum.
    """
    given = dict(default if size is None else size) if not isinstance(size, (int, float, str)) else None
    names = {"shortest_edge": ("min_pixels", min_pixels), "longest_edge": ("max_pixels", max_pixels)}
    bounds = {}
    for edge, (alias, value) in names.items():
        bounds[edge] = value if value is not None else given and (given.get(edge) or given.get(alias))
    low, high = bounds["shortest_edge"], bounds["longest_edge"]
    if not low or not high or low < 1 or low > high:
        raise ValueError(
            f"size must be {{'shortest_edge': fewest pixels, 'longest_edge': most pixels}} with 1 <= fewest <= most, "
            f"got size={size!r}, min_pixels={min_pixels!r}, max_pixels={max_pixels!r}."
        )
    return bounds


def array_to_picture(picture: np.ndarray, index: int) -> tuple[Image.Image, bool]:
    """Makes a Pillow image of an array (height, width, 3); says whether the values were floats in [0, 1].

    Raises:
        ValueError: for values that are neither whole numbers in [0, 255] nor floats in [0, 1].
    """
    if picture.dtype == np.uint8:
        return Image.fromarray(np.ascontiguousarray(picture)), False
    low, high = picture.min(), picture.max()
    whole = picture.dtype.kind in "ui" or np.allclose(picture, picture.astype(np.int64))
    if low < 0 or high > (255 if whole else 1):
        raise ValueError(
            f"picture {index} holds {picture.dtype} values in [{low}, {high}]; "
            "pass whole numbers in [0, 255] or floats in [0, 1]."
        )
    if not whole:
        picture = (picture.astype(np.float64) * 255).astype(np.float32)
    return Image.fromarray(np.ascontiguousarray(picture.astype(np.uint8))), not whole


def byte_map(settings: dict[str, Any], unit_floats: bool) -> tuple[np.ndarray, tuple | None]:
    """The float of each of the 256 bytes of a channel, by the stock formula and its roundings, and a short cut to it.

    Returns:
        The table, (3, 256) float32, and what `find_affine` gives for it.
    """
    values = np.tile(np.arange(256, dtype=np.uint8), (3, 1))
    if unit_floats:
        values = (values.astype(np.float64) * (1 / 255)).astype(np.float32)
    table = to_floats(values, settings, channel_axis=0)
    factor = settings["rescale_factor"] if settings["do_rescale"] else 1.0
    mean, std = (settings["image_mean"], settings["image_std"]) if settings["do_normalize"] else ((0,) * 3, (1,) * 3)
    return table, None if unit_floats else find_affine(table, factor, mean, std)


def to_floats(values: np.ndarray, settings: dict[str, Any], channel_axis: int) -> np.ndarray:
    """Rescales in float64, rounds to float32, then normalizes in float32: the stock order, so the stock roundings."""
    if settings["do_rescale"]:
        values = (values.astype(np.float64) * settings["rescale_factor"]).astype(np.float32)
    if settings["do_normalize"]:
        values = values if values.dtype.kind == "f" else values.astype(np.float32)
        shape = [1] * values.ndim
        shape[channel_axis] = 3
        mean, std = (
            np.array(settings[name], dtype=values.dtype).reshape(shape) for name in ("image_mean", "image_std")
        )
        values = (values - mean) / std
    return values.astype(np.float32)


def write_floats(picture: np.ndarray, out: np.ndarray, settings: dict[str, Any]) -> None:
    """The way of float arrays that are not resized: no bytes to look up; in place in `out`."""
    values = torch.from_numpy(np.ascontiguousarray(to_floats(picture, settings, channel_axis=2)))
    patches = patchify(
        values.permute(2, 0, 1)[None], settings["patch_size"], settings["merge_size"], settings["temporal_patch_size"]
    )
    out[:] = patches.numpy()
