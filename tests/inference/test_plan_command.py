"""`qwen3-vl plan`: the table, the lines that apply it, and one line for each mistake."""

import json
import re

import pytest
import torch
from helpers import tiny_config_dict
from PIL import Image
from transformers import AutoProcessor
from typer.testing import CliRunner

from qwen3_vl.inference import answering, cli
from qwen3_vl.inference.cli import app


OFFICIAL = "Qwen/Qwen3-VL-2B-Instruct"
needs_tiny = pytest.mark.skipif(
    not (answering.SHIPPED_CHECKPOINT / "config.json").is_file(), reason="checkpoints/tiny is not there"
)


@pytest.fixture(autouse=True)
def _libraries_stay_as_loud_as_they_are(monkeypatch):
    monkeypatch.setattr(cli, "_quieten_libraries", lambda: None)


def call(*arguments):
    return CliRunner().invoke(app, ["plan", *arguments], env={"COLUMNS": "140"})


def test_an_official_name_without_a_network(monkeypatch):
    monkeypatch.setattr(answering, "_unreachable", lambda url: pytest.fail("the network was asked"))
    result = call("--model", OFFICIAL, "--images", "4x1024x1024", "--video", "600s", "--budget", "8GB")
    assert result.exit_code == 0, result.output
    text = result.stdout
    for words in ("text", "image", "video", "KV cache", "weights", "peak of", "prefill", "settings:", "to apply:"):
        assert words in text
    assert f'from_pretrained("{OFFICIAL}"' in text
    # 1024x1024 in patches of 16, four to a token, four pictures.
    assert re.search(r"tokens of the prompt.*\b4096\b", text)


def test_json_adds_up():
    result = call("--model", OFFICIAL, "--images", "640x480", "--json", "--new-tokens", "10", "--batch", "2")
    values = json.loads(result.stdout)
    assert values["sizes"]["image"] == (640 // 32) * (480 // 32)
    assert values["kv_total"] == sum(values["kv"].values())
    assert values["peak"] == max(values["peaks"].values())
    assert values["model"] == OFFICIAL and values["request"]["batch_size"] == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--budget", "0"], "budget must be bytes above 0"),
        (["--budget", "-3GB"], "budget must be bytes above 0"),
        (["--budget", "eight"], "budget must be bytes above 0"),
        (["--images", "1024"], "COUNTx"),
        (["--video", "ten"], "video must be like"),
        (["--text-tokens", "-1"], "text_tokens must be"),
        (["--new-tokens", "0"], "new_tokens must be"),
        (["--cache", "int3"], "cache must be one of"),
        (["--attn-implementation", "qwen3_vl_exakt"], "did you mean 'qwen3_vl_exact'"),
        (["--budget", "1GB"], "nothing fits into 1.00 GB: at least"),
        (["--model", "no-such-folder"], "no folder"),
    ],
)
def test_mistakes_get_one_line(arguments, words):
    result = call(*(["--model", OFFICIAL] if "--model" not in arguments else []), *arguments)
    assert result.exit_code == 1
    assert result.stdout == ""
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert words in line


def test_folders_without_processors_and_of_other_models(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tiny_config_dict()))
    result = call("--model", str(tmp_path), "--images", "64x64", "--json")
    assert result.exit_code == 0, result.output
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    assert "is a qwen3 model; plan takes Qwen3-VL models" in call("--model", str(tmp_path)).stderr
    (tmp_path / "config.json").write_text("{")
    assert "cannot read the configuration" in call("--model", str(tmp_path)).stderr


@needs_tiny
def test_the_printed_lines_run_as_planned():
    """The plan of a folder's own processors, applied by its own lines, against what really is held."""
    arguments = ["--images", "128x128", "--text-tokens", "12", "--new-tokens", "4"]
    values = json.loads(call(*arguments, "--json").stdout)
    picture = Image.new("RGB", (128, 128), "red")
    processor = AutoProcessor.from_pretrained(answering.SHIPPED_CHECKPOINT)
    inputs = processor(text=["<|vision_start|><|image_pad|><|vision_end|>" + " a" * 12], images=[picture])
    inputs = {name: torch.as_tensor(value) for name, value in inputs.items()}
    image_token = processor.image_token_id
    assert values["sizes"]["image"] == int((inputs["input_ids"] == image_token).sum())

    result = call(*arguments, "--cache", "int8")
    lines = [line.strip() for line in result.stdout.split("to apply:")[1].strip().splitlines()]
    assert "'kv_caching': {'cache': 'int8'}" in result.stdout
    names = {"inputs": {**inputs, "return_dict_in_generate": True}}
    exec("\n".join(lines[:-1]), names)
    output = eval(lines[-1], names)
    assert type(output.past_key_values).__name__ == "QuantizedKVCache"
    assert output.sequences.shape[1] <= inputs["input_ids"].shape[1] + 4
