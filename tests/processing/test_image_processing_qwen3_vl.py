"""Pictures: equal to the stock Pillow processor, bit for bit, and clear about what is wrong."""

import base64
import io
import json
import warnings

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from qwen3_vl.processing.image_processing_qwen3_vl import Qwen3VLImageProcessor


def skip_where_stock_was_other(case):
    """We follow 5.23; older ones drop alpha without blending it, and refuse grey arrays."""
    cases = {"P+transparency", "RGBA", "LA", "rgba", "grey"}
    if case in cases and Version(transformers.__version__) < Version("5.23"):
        pytest.skip(f"stock treats {case} otherwise before transformers 5.23")


@pytest.fixture(scope="module")
def ours(image_config):
    return Qwen3VLImageProcessor(**image_config)


@pytest.fixture(scope="module")
def stock(image_config):
    return Qwen2VLImageProcessorPil(**image_config)


def assert_same(ours, stock, images, **kwargs):
    # Equal to the last bit: the same Pillow resize, and float roundings in the same order.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mine, theirs = ours(images, **kwargs), stock(images, **kwargs)
    assert set(mine) == set(theirs)
    for name in mine:
        assert type(mine[name]) is type(theirs[name]) and mine[name].dtype == theirs[name].dtype
        assert mine[name].shape == theirs[name].shape
        assert np.array_equal(np.asarray(mine[name]), np.asarray(theirs[name])), name


@pytest.mark.parametrize("size", [(64, 64), (256, 256), (37, 411), (300, 401), (640, 480), (19, 1900), (1031, 777)])
def test_sizes(ours, stock, make_picture, size):
    assert_same(ours, stock, make_picture(*size), return_tensors="pt")


@pytest.mark.parametrize(
    "mode", ["L", "1", "P", "P+transparency", "RGBA", "LA", "CMYK", "I;16", "YCbCr", "HSV", "I", "F"]
)
def test_modes(ours, stock, make_picture, mode):
    skip_where_stock_was_other(mode)
    picture = make_picture(90, 130, "RGBA").convert("LA") if mode == "LA" else make_picture(90, 130, mode)
    assert_same(ours, stock, picture, return_tensors="pt")


def test_real_pictures(ours, stock, real_pictures):
    for picture in real_pictures.values():
        assert_same(ours, stock, picture, return_tensors="pt")
    assert_same(ours, stock, list(real_pictures.values())[:4])


@pytest.mark.parametrize("tensors", [None, "np", "pt"])
def test_batches_and_nesting(ours, stock, make_picture, tensors):
    pictures = [make_picture(300 + 40 * index, 500, seed=index) for index in range(4)]
    assert_same(ours, stock, pictures, return_tensors=tensors)
    assert_same(ours, stock, [pictures[:1], pictures[1:]], return_tensors=tensors)
    assert_same(ours, stock, [[], pictures[1:]], return_tensors=tensors)


@pytest.mark.parametrize(
    "settings",
    [
        {"min_pixels": 4096, "max_pixels": 40000},
        {"size": {"shortest_edge": 1024, "longest_edge": 90000}},
        {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]},
        {"do_normalize": False},
        {"do_rescale": False},
        {"do_rescale": False, "do_normalize": False},
        {"patch_size": 14, "temporal_patch_size": 1},
        {"merge_size": 1, "patch_size": 8},
        {"resample": 2},
        {"rescale_factor": 1 / 127},
    ],
)
def test_settings_of_a_call(ours, stock, make_picture, settings):
    assert_same(ours, stock, make_picture(310, 205), return_tensors="pt", **settings)


def test_without_resizing(ours, stock, make_picture):
    assert_same(ours, stock, make_picture(64, 96), do_resize=False, return_tensors="pt")
    floats = np.asarray(make_picture(64, 96), dtype=np.float32) / 255
    assert_same(ours, stock, floats, do_resize=False, do_rescale=False, return_tensors="pt")


@pytest.mark.parametrize(
    "kind", ["uint8", "channels_first", "rgba", "grey", "unit_floats", "byte_floats", "int64", "tensor"]
)
def test_arrays(ours, stock, make_picture, kind):
    skip_where_stock_was_other(kind)
    pixels = np.asarray(make_picture(120, 200))
    made = {
        "uint8": pixels,
        "channels_first": np.moveaxis(pixels, -1, 0),
        "rgba": np.asarray(make_picture(120, 200, "RGBA")),
        "grey": pixels[..., :1],
        "unit_floats": pixels / 255,
        "byte_floats": pixels.astype(np.float32),
        "int64": pixels.astype(np.int64),
        "tensor": torch.from_numpy(np.moveaxis(pixels, -1, 0).copy()),
    }
    assert_same(ours, stock, made[kind], return_tensors="pt")
    assert_same(ours, stock, [made[kind]] * 2, return_tensors="pt")


def test_a_flat_grey_array_is_a_picture(ours, make_picture):
    grey = np.asarray(make_picture(100, 100, "L"))
    assert torch.equal(
        ours(grey, return_tensors="pt")["pixel_values"],
        ours(Image.fromarray(grey), return_tensors="pt")["pixel_values"],
    )


def test_files_addresses_and_bytes_are_read_upright(ours, stock, make_picture, tmp_path):
    picture = make_picture(150, 310)
    exif = picture.getexif()
    exif[0x0112] = 6
    file = io.BytesIO()
    picture.save(file, "PNG", exif=exif)
    content = file.getvalue()
    path = tmp_path / "a.png"
    path.write_bytes(content)
    text = base64.b64encode(content).decode()
    expected = stock(stock.fetch_images(str(path)), return_tensors="pt")
    assert expected["image_grid_thw"][0, 1] > expected["image_grid_thw"][0, 2]
    for source in (
        str(path),
        path,
        f"file://{path}",
        content,
        io.BytesIO(content),
        text,
        f"data:image/png;base64,{text}",
    ):
        assert torch.equal(ours(source, return_tensors="pt")["pixel_values"], expected["pixel_values"])
    # An opened picture is taken as it lies, as in stock.
    assert_same(ours, stock, Image.open(path), return_tensors="pt")


def test_many_pictures_in_threads_are_each_in_their_place(ours, make_picture):
    pictures = [make_picture(400 + 32 * index, 600, seed=index) for index in range(6)]
    together = ours(pictures, return_tensors="pt")
    alone = torch.cat([ours(picture, return_tensors="pt")["pixel_values"] for picture in pictures])
    assert torch.equal(together["pixel_values"], alone)


def test_counting_agrees_with_making(ours, stock):
    for height, width in [(64, 64), (500, 333), (2000, 3000), (31, 640)]:
        made = ours(Image.new("RGB", (width, height)), return_tensors="np")
        count = ours.get_number_of_image_patches(height, width)
        assert count == len(made["pixel_values"]) == stock.get_number_of_image_patches(height, width)
        assert ours.count_tokens(height, width) == count // 4
    bounds = {"min_pixels": 1024, "max_pixels": 50000}
    assert ours.get_number_of_image_patches(500, 333, bounds) == stock.get_number_of_image_patches(500, 333, bounds)


@pytest.mark.parametrize(
    "written", [{"min_pixels": 3136, "max_pixels": 100352}, {"size": {"min_pixels": 3136, "max_pixels": 100352}}]
)
def test_older_spellings_of_the_bounds_load(tmp_path, written):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**written, "patch_size": 16}))
    loaded = Qwen3VLImageProcessor.from_pretrained(tmp_path)
    assert dict(loaded.size) == {"shortest_edge": 3136, "longest_edge": 100352}
    loaded.save_pretrained(tmp_path / "again")
    assert dict(Qwen3VLImageProcessor.from_pretrained(tmp_path / "again").size) == dict(loaded.size)


def test_saving_is_stable_and_stock_loads_it(tmp_path, ours, make_picture):
    ours.auto_map = {"AutoImageProcessor": "image_processing_qwen3_vl.Qwen3VLImageProcessor"}
    try:
        ours.save_pretrained(tmp_path / "a")
        again = Qwen3VLImageProcessor.from_pretrained(tmp_path / "a")
        again.save_pretrained(tmp_path / "b")
    finally:
        del ours.auto_map
    first, second = ((tmp_path / name / "preprocessor_config.json").read_text() for name in "ab")
    assert first == second
    content = json.loads(first)
    assert content["image_processor_type"] == "Qwen2VLImageProcessorFast"
    assert content["processor_class"] == "Qwen3VLProcessor"
    assert "auto_map" in content
    assert_same(
        again, Qwen2VLImageProcessorPil.from_pretrained(tmp_path / "a"), make_picture(77, 123), return_tensors="pt"
    )


@pytest.mark.parametrize(
    "images, settings, message",
    [
        ([], {}, "got no pictures"),
        (Image.new("RGB", (10, 400)), {}, "picture 0 is 400x10 pixels .* smaller than one patch of 16"),
        (Image.new("RGB", (4000, 16)), {}, "aspect ratio must be at most 200, got 250.0"),
        (np.full((32, 32, 3), np.nan), {}, "picture 0 holds NaN or infinite"),
        (np.full((32, 32, 3), 300.0), {}, r"values in \[300.0, 300.0\]; pass whole numbers in \[0, 255\]"),
        (np.zeros((32, 32, 5), np.uint8), {}, "one axis must hold 1, 3 or 4 channels"),
        (np.zeros((32,), np.uint8), {}, "picture 0 has shape"),
        (Image.new("RGB", (40, 40)), {"do_resize": False}, "must be multiples of 32"),
        (Image.new("L", (64, 64)), {"do_convert_rgb": False}, "has mode L, and the model takes RGB"),
        (Image.new("RGB", (64, 64)), {"size": {"height": 3, "width": 4}}, "size must be"),
        (Image.new("RGB", (64, 64)), {"min_pixels": 10**6, "max_pixels": 10**3}, "fewest <= most"),
        (Image.new("RGB", (64, 64)), {"patch_size": 0}, "patch_size must be an integer of at least 1"),
        (Image.new("RGB", (64, 64)), {"image_std": [1.0, 0.0, 1.0]}, "image_std must hold 3 numbers"),
        (b"not a picture", {}, "picture 13 bytes cannot be read"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(ours, images, settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        ours(images, **settings)
    assert "\n" not in str(caught.value)


def test_wrong_kinds_and_names(ours, tmp_path):
    with pytest.raises(TypeError, match=r"a picture must be a Pillow image, .* got int"):
        ours(3)
    with pytest.raises(TypeError, match="has dtype bool"):
        ours(np.zeros((32, 32, 3), bool))
    with pytest.raises(TypeError, match="unknown argument 'max_pixel'"):
        ours(Image.new("RGB", (64, 64)), max_pixel=3)
    with pytest.raises(FileNotFoundError, match=r"'absent\.png' is no existing file"):
        ours("absent.png")


def test_a_file_cut_short_is_named(ours, make_picture, tmp_path):
    path = tmp_path / "cut.jpg"
    make_picture(200, 200).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"picture '.*cut.jpg' cannot be read \(OSError: "):
        ours(str(path))
    with pytest.raises(ValueError, match="picture 0 cannot be decoded"):
        ours(Image.open(path))
