"""`qwen3-vl profile`, and profiles from files on the command line and in `from_pretrained`."""

import json

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText
from typer.testing import CliRunner

import qwen3_vl
from qwen3_vl.configuration import hardware_detection
from qwen3_vl.configuration.hardware_detection import GIB, Hardware
from qwen3_vl.configuration.profile_files import GivenProfile, is_profile_file, read_profile
from qwen3_vl.configuration.profile_qwen3_vl import UnifiedConfig
from qwen3_vl.inference import answering, cli
from qwen3_vl.inference.cli import app


needs_tiny = pytest.mark.skipif(
    not (answering.SHIPPED_CHECKPOINT / "config.json").is_file(), reason="checkpoints/tiny is not there"
)
YAML = "version: 1\nmemory: {kv_cache: int8}\ncpu:\n  decode_linear: true\n"


@pytest.fixture(autouse=True)
def _libraries_stay_as_loud_as_they_are(monkeypatch):
    monkeypatch.setattr(cli, "_quieten_libraries", lambda: None)


@pytest.fixture
def yaml_file(tmp_path):
    path = tmp_path / "profile.yaml"
    path.write_text(YAML)
    return path


def call(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "140"})


def error_line(result):
    assert result.exit_code == 1 and result.stdout == "", result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    return line


def test_a_machine_is_explained_line_by_line():
    result = call("profile", "--explain", "--memory", "64GiB", "--cores", 4, "--gpu-memory", 0)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert "CPU cores: 4 (as given)" in lines and "memory: 64.0 GiB (as given)" in lines
    assert any("fits: chosen" in line for line in lines) and "decode_linear" in result.stdout
    assert json.loads(result.stdout[result.stdout.index("{") :])["cpu"]["threads"] == 4
    assert "fits: chosen" not in call("profile", "--memory", "64GiB").stdout


def test_less_memory_takes_a_weaker_profile_and_a_gpu_its_kernels():
    def chosen(*arguments):
        return json.loads(call("profile", "--json", *arguments).stdout)

    large, small = chosen("--memory", "64GiB", "--gpu-memory", 0), chosen("--memory", "4GiB", "--gpu-memory", 0)
    assert "weight_bits" not in large["profile"]["optimization"]
    assert small["profile"]["optimization"]["weight_bits"] in (4, 8)
    assert any("does not fit" in line for line in small["explanation"])
    assert small["hardware"]["memory_bytes"] == 4 * GIB
    assert chosen("--gpu-memory", "80GB")["profile"]["gpu"] == {"kernels": True}
    names = [step["name"] for step in small["techniques"]]
    assert names.index("adaptive_precision") < names.index("decode_linear")


def test_the_model_decides_what_fits():
    arguments = ("--memory", "16GiB", "--gpu-memory", 0, "--json")
    small = json.loads(call("profile", *arguments).stdout)["profile"]
    large = json.loads(call("profile", *arguments, "--model", "Qwen/Qwen3-VL-8B-Instruct").stdout)["profile"]
    assert "weight_bits" not in small["optimization"] and large["optimization"]["weight_bits"] in (4, 8)


@pytest.mark.parametrize("name", ["minimal", "balanced", "aggressive"])
def test_a_preset_is_shown(name, tmp_path):
    result = call("profile", name, "--output", tmp_path / "profile.json")
    assert result.exit_code == 0, result.output
    assert ("may differ" in result.stdout) == (name != "minimal")
    assert UnifiedConfig.from_file(tmp_path / "profile.json") == UnifiedConfig.from_preset(name)


def test_a_file_is_shown(yaml_file):
    report = json.loads(call("profile", yaml_file, "--json").stdout)
    assert report["profile"] == {"version": 1, "memory": {"kv_cache": "int8"}, "cpu": {"decode_linear": True}}
    assert [step["name"] for step in report["techniques"]] == ["decode_linear", "quantized_cache"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("balancd",), "did you mean 'balanced'"),
        (("balanced", "--cores", 4), "is a profile of its own"),
        (("absent.yaml",), "no profile file absent.yaml"),
        (("--memory", "much"), "memory must be bytes above 0"),
        (("--cores", 0), "cpu_cores must be a whole number"),
        (("--memory", "200MB", "--gpu-memory", 0), "nothing fits into"),
        (("--model", "no-such-folder"), "no folder"),
    ],
)
def test_mistakes_get_one_line(arguments, words):
    assert words in error_line(call("profile", *arguments))


def test_a_machine_that_says_nothing_of_its_memory(monkeypatch):
    monkeypatch.setattr(hardware_detection, "detect_hardware", lambda *a, **k: Hardware(cpu_cores=2))
    assert "give memory_gb" in error_line(call("profile"))


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.json", '{"memory": ', "is no JSON (line 1"),
        ("a.yaml", "memory: {kv_cache: [", "is no YAML (line"),
        ("a.yaml", "just text", "must hold a profile's sections"),
        ("a.yml", "memory: {kv_cach: int8}", "did you mean 'kv_cache'"),
        ("a.json", '{"version": 99, "memory": {}}', "update qwen3_vl"),
        ("a.json", '{"memory": {"budget_bytes": -5}}', "at least 1, got -5"),
    ],
)
def test_corrupt_files_get_one_line_that_names_them(tmp_path, name, text, words):
    path = tmp_path / name
    path.write_text(text)
    for load in (UnifiedConfig.from_file, lambda source: qwen3_vl.optimize(torch.nn.Linear(1, 1), source)):
        with pytest.raises(ValueError) as error:
            load(path)
        assert words in str(error.value) and "\n" not in str(error.value) and name in str(error.value)
    assert words in error_line(call("profile", path))
    assert words in error_line(call("ask", "--optim", path, "what?"))


def test_what_is_a_file_and_what_a_preset(tmp_path):
    assert is_profile_file("a.yaml") and is_profile_file(tmp_path) and not is_profile_file("balanced")
    with pytest.raises(ValueError, match=r"must end with \.json, \.yaml, \.yml"):
        read_profile(tmp_path / "profile.toml")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is no text file"):
        read_profile(tmp_path / "binary.json")
    with pytest.raises(ValueError, match=r"unknown preset '.*\.json'"):  # a model's folder cannot name files
        UnifiedConfig.parse("elsewhere.json")


@needs_tiny
@pytest.mark.parametrize("form", ["path", "text", "dict", "profile"])
def test_a_caller_s_profile_reaches_the_model_and_its_folder(form, yaml_file, tmp_path):
    profile = UnifiedConfig.from_file(yaml_file)
    optim = {"path": yaml_file, "text": str(yaml_file), "dict": profile.to_dict(), "profile": profile}[form]
    model = AutoModelForImageTextToText.from_pretrained(answering.SHIPPED_CHECKPOINT, optim=optim)
    assert [technique.name for technique in model.active_techniques] == ["decode_linear", "quantized_cache"]
    model.config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["optim"] == profile.to_dict()
    assert isinstance(model.config.optim, GivenProfile)


@needs_tiny
def test_a_caller_s_profile_raises_where_a_folder_s_goes_on(tmp_path, monkeypatch):
    named = {"grouped_experts": {}}
    with pytest.raises(ValueError, match="no sparse experts"):
        AutoModelForImageTextToText.from_pretrained(answering.SHIPPED_CHECKPOINT, optim=named)
    model = AutoModelForImageTextToText.from_pretrained(answering.SHIPPED_CHECKPOINT)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"optim": named}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert (
        model.active_techniques == []
        and "off, grouped_experts found" in qwen3_vl.UnifiedOptimizationManager(model).describe()
    )


def test_a_bad_profile_is_refused_before_weights_are_read(monkeypatch):
    monkeypatch.setattr(qwen3_vl.Qwen3VLForConditionalGeneration, "__init__", lambda *a, **k: pytest.fail("built"))
    with pytest.raises(ValueError, match="did you mean 'kv_cache'"):
        AutoModelForImageTextToText.from_pretrained("checkpoints/tiny", optim={"memory": {"kv_cach": 1}})


@needs_tiny
def test_ask_takes_presets_files_and_none(yaml_file, tmp_path, monkeypatch):
    picture = tmp_path / "picture.png"
    Image.new("RGB", (64, 64), "red").save(picture)
    seen, load = [], answering.load

    def note(*arguments, **options):
        loaded = load(*arguments, **options)
        seen.append([technique.name for technique in loaded.model.active_techniques])
        return loaded

    monkeypatch.setattr(answering, "load", note)
    for optim in ("balanced", yaml_file, "none"):
        result = call("ask", "--optim", optim, "--image", picture, "--max-new-tokens", 2, "what colour?")
        assert result.exit_code == 0, result.output
    assert "adaptive_precision" in seen[0] and seen[1:] == [["decode_linear", "quantized_cache"], []]
    assert "did you mean 'minimal'" in error_line(call("ask", "--optim", "minimul", "what?"))
