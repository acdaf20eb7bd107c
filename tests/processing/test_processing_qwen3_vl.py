"""The whole processor: the same inputs as stock makes, loading and saving both ways, counting, and what is wrong."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fetch_material import find_torchvision
from PIL import Image
from transformers import AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor as StockProcessor

from qwen3_vl.modeling_qwen3_vl.hub_export import flatten_module
from qwen3_vl.processing import Qwen3VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor, processing_qwen3_vl
from qwen3_vl.processing.processing_qwen3_vl import frame_timestamps
from qwen3_vl.processing.video_reading import read_video


IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
SOURCES = Path(processing_qwen3_vl.__file__).parent


class StockWithOurVideos(StockProcessor):
    """The stock processor with its class check off: its own video processor does not load without torchvision."""

    def check_argument_for_proper_class(self, argument_name, argument):
        return type(argument)


@pytest.fixture(scope="module")
def stock(tiny_folder):
    return StockWithOurVideos(
        Qwen2VLImageProcessorPil.from_pretrained(tiny_folder),
        AutoTokenizer.from_pretrained(tiny_folder),
        Qwen3VLVideoProcessor.from_pretrained(tiny_folder),
    )


@pytest.fixture(scope="module")
def clip():
    return np.random.default_rng(0).integers(0, 256, (9, 64, 96, 3), dtype=np.uint8)


def assert_same(mine, theirs):
    assert set(mine) == set(theirs)
    for name in mine:
        if isinstance(mine[name], torch.Tensor):
            assert torch.equal(mine[name], theirs[name]), name
        else:
            assert np.array_equal(np.asarray(mine[name]), np.asarray(theirs[name])), name


CALLS = {
    "text": {"text": ["Hello"]},
    "one text": {"text": "Hello"},
    "picture": {"text": [f"a{IMAGE}b"], "images": 1},
    "pictures in a batch": {"text": [f"a{IMAGE}{IMAGE}", f"long text {IMAGE}"], "images": 3, "padding": True},
    "video": {"text": [f"a{VIDEO}b"], "videos": 1},
    "mixed": {"text": [f"{VIDEO}{IMAGE}", "words", f"{IMAGE} and {VIDEO}"], "images": 2, "videos": 2, "padding": True},
    "settings": {
        "text": [f"{IMAGE}{VIDEO}"], "images": 1, "videos": 1,
        "images_kwargs": {"max_pixels": 70000},
        "videos_kwargs": {"num_frames": 5, "size": {"shortest_edge": 1024, "longest_edge": 20000}},
    },
    "bare bounds": {"text": [IMAGE], "images": 1, "min_pixels": 1024, "max_pixels": 9000},
}  # fmt: skip


@pytest.mark.parametrize("tensors", ["pt", "np", None])
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_calls_give_what_stock_gives(processor, stock, make_picture, clip, name, tensors):
    call = dict(CALLS[name], return_tensors=tensors)
    if "images" in call:
        call["images"] = [make_picture(60 + 90 * index, 200, seed=index) for index in range(call["images"])]
    if "videos" in call:
        call["videos"] = [clip[index:] for index in range(call["videos"])]
        call["video_metadata"] = [{"total_num_frames": len(video), "fps": 3.0} for video in call["videos"]]
    if tensors == "np" and "padding" not in call:
        call["padding"] = True
    assert_same(processor(**call), stock(**call))


def test_bare_bounds_mean_pictures(processor, make_picture, clip):
    call = {
        "text": [f"{IMAGE}{VIDEO}"],
        "images": [make_picture(200, 200)],
        "videos": [clip],
        "do_sample_frames": False,
    }
    plain, bound = processor(**call), processor(**call, min_pixels=1024, max_pixels=9000)
    assert len(bound["pixel_values"]) < len(plain["pixel_values"])
    assert torch.equal(bound["pixel_values_videos"], plain["pixel_values_videos"])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_sides(processor, stock, make_picture, side):
    call = {
        "text": [f"a{IMAGE}", "a much longer text than the other"], "images": [make_picture(64, 64)], "padding": True,
        "padding_side": side, "return_tensors": "pt",
    }  # fmt: skip
    mine = processor(**call)
    assert_same(mine, stock(**call))
    marks = mine["mm_token_type_ids"]
    assert set(marks.unique().tolist()) == {0, 1}
    assert torch.equal(marks == 1, mine["input_ids"] == processor.image_token_id)


def test_time_stamps(processor, clip):
    made = processor(
        text=[VIDEO], videos=[clip], video_metadata=[{"total_num_frames": 9, "fps": 3.0}], do_sample_frames=False
    )
    text = processor.decode(made["input_ids"][0]).replace("<|video_pad|>", "")
    for seconds in ("0.2", "0.8", "1.5", "2.2", "2.7"):
        assert f"<{seconds} seconds><|vision_start|><|vision_end|>" in text
    assert frame_timestamps([0, 13, 26], 25.0) == [0.26, 1.04]
    indices = [0, 13, 26]
    frame_timestamps(indices, 25.0)
    assert indices == [0, 13, 26]


def test_chat_with_files(processor, make_picture, mp4, tmp_path):
    make_picture(80, 120).save(tmp_path / "a.png")
    (tmp_path / "a.mp4").write_bytes(mp4)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [
            {"type": "image", "path": str(tmp_path / "a.png")},
            {"type": "image", "image": make_picture(80, 120)},
            {"type": "video", "video": str(tmp_path / "a.mp4")},
            {"type": "text", "text": "Compare."},
        ]},
    ]  # fmt: skip
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert text == (
        f"<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{IMAGE}{IMAGE}{VIDEO}Compare.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    made = processor.apply_chat_template(messages, **options)
    assert made["image_grid_thw"].shape == (2, 3)
    half = len(made["pixel_values"]) // 2
    assert torch.equal(made["pixel_values"][:half], made["pixel_values"][half:])
    assert made["video_grid_thw"].tolist() == [[2, 4, 6]]
    fewer = processor.apply_chat_template(messages, processor_kwargs={"num_frames": 2}, **options)
    assert fewer["video_grid_thw"].tolist() == [[1, 4, 6]]
    batch = processor.apply_chat_template([messages, messages[:1]], processor_kwargs={"padding": True}, **options)
    assert batch["input_ids"].shape[0] == 2


def test_assistant_mask(processor, make_picture):
    messages = [
        {"role": "user", "content": [{"type": "image", "image": make_picture(64, 64)}, {"type": "text", "text": "?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
        {"role": "user", "content": [{"type": "text", "text": "Sure?"}]},
    ]
    made = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", return_assistant_tokens_mask=True
    )
    written = made["input_ids"][0][torch.as_tensor(made["assistant_masks"])[0].bool()]
    assert processor.decode(written) == "A cat.<|im_end|>"


def test_counting(processor, make_picture, clip, tmp_path):
    picture = make_picture(300, 200)
    exif = picture.getexif()
    exif[0x0112] = 8
    picture.save(tmp_path / "a.jpg", exif=exif)
    counted = processor.count_tokens(f"ab{IMAGE}", [picture, (300, 200), str(tmp_path / "a.jpg")], [(8, 64, 96)])
    made = processor(text=[f"ab{IMAGE}"], images=[picture])
    assert counted["images"][0] == counted["images"][1] == sum(made["mm_token_type_ids"][0])
    assert counted["images"][2] == processor.image_processor.count_tokens(200, 300)
    assert counted["text"] == len(made["input_ids"][0]) - counted["images"][0]
    assert counted["total"] == counted["text"] + sum(counted["images"]) + sum(counted["videos"])
    found = processor._get_num_multimodal_tokens(
        image_sizes=[(300, 200)], video_sizes=[(8, 64, 96)], max_pixels=9000, min_pixels=1024
    )
    assert found["num_image_tokens"] == [
        processor.image_processor.count_tokens(300, 200, max_pixels=9000, min_pixels=1024)
    ]
    assert found["num_video_tokens"] == counted["videos"]
    assert "mm_token_type_ids" in processor.model_input_names


def test_it_builds_our_parts_and_saves_for_stock(processor, tiny_folder, tmp_path, make_picture):
    assert type(processor.image_processor) is Qwen3VLImageProcessor
    assert type(processor.video_processor) is Qwen3VLVideoProcessor
    processor.save_pretrained(tmp_path / "a")
    again = Qwen3VLProcessor.from_pretrained(tmp_path / "a")
    again.save_pretrained(tmp_path / "b")
    for name in (
        "processor_config.json",
        "preprocessor_config.json",
        "video_preprocessor_config.json",
        "chat_template.jinja",
    ):
        assert (tmp_path / "a" / name).read_text() == (tmp_path / "b" / name).read_text()
    written = json.loads((tmp_path / "a" / "processor_config.json").read_text())
    assert written["processor_class"] == "Qwen3VLProcessor"
    assert written["image_processor"]["image_processor_type"] == "Qwen2VLImageProcessorFast"
    assert written["video_processor"]["video_processor_type"] == "Qwen3VLVideoProcessor"
    call = {"text": [IMAGE], "images": [make_picture(70, 90)], "return_tensors": "pt"}
    assert_same(again(**call), processor(**call))


@pytest.mark.parametrize("file", ["chat_template.json", "chat_template.jinja"])
def test_a_folders_own_template_is_kept(tiny_folder, tmp_path, file):
    shutil.copytree(tiny_folder, tmp_path, dirs_exist_ok=True)
    own = "{{ messages[0].content }}!"
    (tmp_path / file).write_text(json.dumps({"chat_template": own}) if file.endswith("json") else own)
    loaded = Qwen3VLProcessor.from_pretrained(tmp_path)
    assert loaded.apply_chat_template([{"role": "user", "content": "Hi"}]) == "Hi!"
    loaded.chat_template = "other"
    loaded.save_pretrained(tmp_path)
    assert Qwen3VLProcessor.from_pretrained(tmp_path).chat_template == "other"


@pytest.mark.parametrize(
    "call, message",
    [
        ({}, "got nothing to process"),
        ({"text": [IMAGE]}, r"holds 1 <\|image_pad\|> placeholders and 0 images"),
        ({"text": ["none"], "images": [Image.new("RGB", (64, 64))]}, "holds 0 .* placeholders and 1 images"),
        ({"text": [VIDEO + VIDEO], "videos": [np.zeros((4, 32, 32, 3), np.uint8)]}, "holds 2 .* and 1 videos"),
        ({"text": ["a", 3]}, "text must be a string or a list of strings, got a int"),
        ({"text": "a", "audio": [1]}, "takes no audio"),
        ({"text": [IMAGE], "images": [Image.new("RGB", (64, 8))]}, "smaller than one patch"),
        ({"text": [VIDEO], "videos": [np.zeros((4, 32, 32, 3), np.uint8)], "fps": 0}, "fps must be a number above 0"),
        ({"text": [VIDEO], "videos": [np.zeros((4, 32, 32, 3), np.uint8)], "num_frames": 9}, "more than the 4 frames"),
        ({"text": [VIDEO], "videos": [b"junk"]}, "cannot be decoded"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(processor, call, message):
    with pytest.raises(ValueError, match=message) as caught:
        processor(**call)
    assert "\n" not in str(caught.value)


def test_wrong_parts(processor, tiny_folder):
    with pytest.raises(ValueError, match="needs a tokenizer"):
        Qwen3VLProcessor()
    with pytest.raises(TypeError, match="image_processor must be a ImageProcessingMixin"):
        Qwen3VLProcessor(image_processor=processor.tokenizer, tokenizer=processor.tokenizer)


def test_a_flat_folder_loads_where_the_package_is_not(processor, tmp_path):
    """Code as the exporter writes it, beside the configs, loaded with trust in a fresh process."""
    folder = tmp_path / "hub"
    processor.save_pretrained(folder)
    files = [*SOURCES.glob("*.py"), SOURCES.parent / "configuration" / "visual_sizes.py"]
    for file in files:
        if file.name != "__init__.py":
            (folder / file.name).write_text(flatten_module(file)[0])
    config = json.loads((folder / "processor_config.json").read_text())
    config["auto_map"] = {"AutoProcessor": "processing_qwen3_vl.Qwen3VLProcessor"}
    (folder / "processor_config.json").write_text(json.dumps(config))
    script = f"""
import json, sys
import numpy as np
from transformers import AutoProcessor
processor = AutoProcessor.from_pretrained({str(folder)!r}, trust_remote_code=True)
parts = [processor, processor.image_processor, processor.video_processor]
assert all(type(part).__module__.startswith("transformers_modules.") for part in parts), parts
made = processor(text=["<|image_pad|><|video_pad|>"], images=[np.zeros((64, 64, 3), np.uint8)],
                 videos=[np.zeros((4, 64, 64, 3), np.uint8)], return_tensors="pt")
assert made["video_grid_thw"].shape == (1, 3)
processor.save_pretrained({str(tmp_path / "again")!r})
assert json.load(open({str(tmp_path / "again" / "processor_config.json")!r}))["auto_map"]
assert "qwen3_vl" not in sys.modules and "torchvision" not in sys.modules
"""
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_everything_equals_stock_with_its_own_video_processor(real_folder, real_pictures, real_videos, tmp_path):
    torchvision = find_torchvision()
    if torchvision is None:
        pytest.skip("torchvision's wheel is absent: python tests/processing/fetch_material.py")
    ours = Qwen3VLProcessor.from_pretrained(real_folder)
    ours.save_pretrained(tmp_path / "saved")
    calls = []
    for path in real_videos.values():
        frames, metadata = read_video(path, lambda metadata: range(0, min(100, metadata.total_num_frames)))
        facts = {"total_num_frames": len(frames), "fps": metadata.fps}
        shared = {
            "text": [f"What?{VIDEO}Ende. 東京"],
            "videos": [frames],
            "video_metadata": [facts],
            "return_tensors": "pt",
        }
        calls.append(shared)
        calls.append({**shared, "cap_pixels_per_frame": True, "fps": 5})
        calls.append(
            {
                **shared,
                "do_sample_frames": False,
                "videos": [frames[:7]],
                "video_metadata": [{**facts, "frames_indices": list(range(7))}],
            }
        )
    batch = {
        "text": [IMAGE * 2, f"{VIDEO} x {IMAGE}"],
        "images": list(real_pictures.values())[:3],
        "videos": [frames[::5]],
    }
    facts = {"total_num_frames": 20, "fps": 6.0}
    calls.append({**batch, "video_metadata": [facts], "padding": True, "return_tensors": "pt"})
    torch.save(calls, tmp_path / "inputs.pt")
    script = Path(__file__).parent / "stock_reference.py"
    command = [sys.executable, str(script), str(torchvision), str(tmp_path / "saved"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for call, (expected, _) in zip(calls, torch.load(tmp_path / "outputs.pt", weights_only=False), strict=True):
        made = dict(ours(**call))
        # With torchvision, stock resizes pictures by torch; only its Pillow processor is what we follow to the bit.
        pixels, others = made.pop("pixel_values", None), expected.pop("pixel_values", None)
        assert_same(made, expected)
        if pixels is not None:
            assert pixels.shape == others.shape
            assert (pixels - others).abs().mean() < 0.01
