"""The `qwen3-vl` command: what it prints, its exit codes, and one line for each mistake."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from qwen3_vl.inference import answering
from qwen3_vl.inference.cli import app


needs_tiny = pytest.mark.skipif(
    not (answering.SHIPPED_CHECKPOINT / "config.json").is_file(), reason="checkpoints/tiny is not there"
)
runner = CliRunner()


def call(*arguments: str):
    return runner.invoke(app, list(arguments))


def error_line(result) -> str:
    """The one line on standard error of a command that failed."""
    assert result.exit_code == 1, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    assert result.stdout == ""
    return lines[0]


@pytest.fixture
def picture(tmp_path) -> str:
    path = tmp_path / "picture [1].png"
    Image.radial_gradient("L").resize((96, 64)).convert("RGB").save(path)
    return str(path)


@pytest.fixture
def clip(tmp_path) -> str:
    av = pytest.importorskip("av")
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for shade in range(8):
            frame = av.VideoFrame.from_image(Image.new("RGB", (64, 64), (shade * 30, 0, 0)))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return str(path)


def test_help_and_version_are_quick():
    program = (
        "import sys; from qwen3_vl.inference import cli; heavy = [m for m in ('torch', 'PIL') if m in sys.modules]; "
        "assert not heavy, heavy; sys.argv = ['qwen3-vl', '--help']; cli.main()"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "ask" in result.stdout
    assert "export" in result.stdout
    version = call("--version")
    assert version.exit_code == 0
    assert version.stdout.startswith("qwen3-vl 0.")
    assert "transformers" in version.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ("ask",),
        ("ask", "--max-new-tokens", "0", "what?"),
        ("ask", "--unknown", "what?"),
        ("export", "one"),
        ("other",),
    ],
)
def test_wrong_usage_exits_with_2(arguments):
    assert call(*arguments).exit_code == 2


def test_mistakes_get_one_line_before_anything_is_loaded(tmp_path, picture, monkeypatch):
    monkeypatch.setattr(answering, "load", lambda *a, **k: pytest.fail("the model was loaded"))
    text = tmp_path / "text.png"
    text.write_text("no picture")
    cut = tmp_path / "cut.png"
    cut.write_bytes(Path(picture).read_bytes()[:100])
    absent = str(tmp_path / "absent.png")
    for arguments, message in [
        (("--image", absent, "what?"), "no such picture"),
        (("--image", str(tmp_path), "what?"), "is a folder; name one picture file"),
        (("--image", str(text), "what?"), "is not a picture"),
        (("--image", str(cut), "what?"), "is a broken picture"),
        (("--video", absent, "what?"), "no such video"),
        (("--image", picture, " "), "the question is empty"),
        (("--model", str(tmp_path), "what?"), "is not a model folder"),
        (("--model", str(text), "what?"), "is a file"),
        (("--model", absent, "what?"), "no folder"),
    ]:
        assert message in error_line(call("ask", *arguments)), arguments


def test_loading_mistakes_get_one_line(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_vl"}')
    assert "cannot load" in error_line(call("ask", "--model", str(tmp_path), "what?"))
    assert "dtype 'int4' is unknown" in error_line(call("ask", "--model", str(tmp_path), "--dtype", "int4", "what?"))
    assert "device 'tpu9' is not usable" in error_line(
        call("ask", "--model", str(tmp_path), "--device", "tpu9", "what?")
    )
    monkeypatch.setattr(answering, "_unreachable", lambda url: "no network")
    monkeypatch.setattr("huggingface_hub.is_offline_mode", lambda: False)
    line = error_line(call("ask", "--model", "nobody/absent-model", "what?"))
    assert "no network" in line
    assert "--model takes a folder too" in line


def test_no_shipped_checkpoint_names_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setattr(answering, "SHIPPED_CHECKPOINT", tmp_path)
    assert f"--model {answering.OFFICIAL_EXAMPLE}" in error_line(call("ask", "what?"))


def test_traceback_shows_where_an_error_comes_from(tmp_path):
    result = call("ask", "--traceback", "--image", str(tmp_path / "absent.png"), "what?")
    assert isinstance(result.exception, answering.AnsweringError)


@needs_tiny
def test_answer_is_printed_with_its_cost_beside_it(picture):
    result = call("ask", "--image", picture, "--max-new-tokens", "4", "what is in the picture?")
    assert result.exit_code == 0, result.output
    assert "tiny checkpoint" in result.stderr
    assert f"--model {answering.OFFICIAL_EXAMPLE}" in result.stderr
    assert "prompt tokens" in result.stderr
    assert "prompt tokens" not in result.stdout


@needs_tiny
def test_json_is_one_object(picture):
    result = call(
        "ask", "--json", "--image", picture, "--image", picture, "--max-new-tokens", "4", "are they the same?"
    )
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    # 96x64 in patches of 16, four to a token, two pictures.
    assert values["image_tokens"] == 2 * (96 // 32) * (64 // 32)
    assert values["prompt_tokens"] > values["image_tokens"]
    assert 1 <= values["new_tokens"] <= 4
    assert 0 < values["seconds_to_first_token"] <= values["seconds"]
    assert values["video_tokens"] == 0
    assert set(values) >= {"model", "answer", "tokens_per_second"}


@needs_tiny
def test_video_is_answered_about(clip):
    result = call("ask", "--json", "--video", clip, "--max-new-tokens", "2", "what happens?")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["video_tokens"] > 0


@needs_tiny
def test_broken_video_gets_one_line(tmp_path):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video at all" * 10)
    assert "cannot prepare the input" in error_line(call("ask", "--video", str(broken), "what happens?"))


@needs_tiny
def test_text_pieces_are_streamed(picture):
    loaded = answering.load(dtype="float32", device="cpu")
    pieces: list[str] = []
    result = answering.answer(loaded, "what is it?", images=[picture], max_new_tokens=6, on_text=pieces.append)
    assert "".join(pieces).strip() == result.answer
    with pytest.raises(answering.AnsweringError, match="at least 1, got 0"):
        answering.answer(loaded, "what is it?", max_new_tokens=0)


@needs_tiny
def test_export_writes_a_folder_and_refuses_to_mix(tmp_path):
    result = call("export", str(answering.SHIPPED_CHECKPOINT), str(tmp_path / "hub"))
    assert result.exit_code == 0, result.output
    assert (tmp_path / "hub" / "modeling_qwen3_vl.py").is_file()
    assert "code files" in result.stdout
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    line = error_line(call("export", str(answering.SHIPPED_CHECKPOINT), str(tmp_path / "full")))
    assert "is not empty" in line
