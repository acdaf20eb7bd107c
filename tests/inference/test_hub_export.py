"""The flat `trust_remote_code` folder: how it is written, and that it loads where this package is not installed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import GenerationConfig

import qwen3_vl
from qwen3_vl.modeling_qwen3_vl.hub_export import (
    Entry,
    HubExportError,
    collect_code_files,
    export_hub_folder,
    manifest_text,
    mark_processor_files,
    read_manifest,
    save_code_files,
)


TINY = Path(__file__).parents[2] / "checkpoints" / "tiny"
needs_tiny = pytest.mark.skipif(not (TINY / "config.json").is_file(), reason="checkpoints/tiny is not there")

# Runs before every isolated program: this package cannot be imported, whatever is installed.
ISOLATION = """
import importlib.abc, json, sys

class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "qwen3_vl":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
import torch, transformers
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline
from transformers import AutoImageProcessor
from transformers.models.auto.video_processing_auto import AutoVideoProcessor  # the name above it needs torchvision
from PIL import Image
torch.set_num_threads(1)
folder, work = sys.argv[1:]
picture = Image.open(work + "/picture.png")
CHAT = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "what is it?"}]}]

def encode(processor):
    return processor.apply_chat_template(
        CHAT, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )

def logits_of(model, inputs):
    with torch.inference_mode():
        return model.float().eval()(**inputs).logits
"""


def run_isolated(program: str, folder: Path, work: Path) -> dict:
    """Runs `program` on an exported folder in a fresh interpreter without this package; it prints one JSON object."""
    Image.radial_gradient("L").resize((96, 64)).convert("RGB").save(work / "picture.png")
    environment = {
        **os.environ,
        "HF_MODULES_CACHE": str(work / "modules"),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    result = subprocess.run(
        [sys.executable, "-I", "-c", ISOLATION + program, str(folder), str(work)],
        cwd=work,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.strip().splitlines()[-1])


def text_files(folder: Path) -> dict[str, bytes]:
    """Everything in a folder but the weights and what only the export copies."""
    return {
        path.name: path.read_bytes()
        for path in sorted(folder.iterdir())
        if path.suffix in (".json", ".py", ".jinja", ".txt")
    }


# Flattening


@pytest.fixture
def package(tmp_path):
    """A function that writes files into a package, and one that collects from its entry module."""

    def write(**files: str) -> Path:
        for name, text in files.items():
            path = tmp_path / f"{name.replace('__', '/')}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        return tmp_path

    return write


ENTRY = [Entry("room", "entry", "Entry")]


def test_relative_imports_become_siblings(package):
    root = package(
        room__entry="from ..other.helper import (\n    f,\n)\nfrom .near import g\n\n"
        "def h():\n    from ..a.b.deep import k\n",
        room__near="import os\n",
        other__helper="from ..a.b.deep import k\n",
        a__b__deep="from ...room.near import g\n",
        other__unused="x = 1\n",
    )
    files = collect_code_files(ENTRY, root)
    assert list(files) == ["deep.py", "entry.py", "helper.py", "near.py"]
    assert files["entry.py"].splitlines()[0] == "from .helper import ("
    assert "    from .deep import k\n" in files["entry.py"]
    assert files["deep.py"] == "from .near import g\n"


def test_text_beside_an_import_is_kept(package):
    root = package(room__entry='x = "ü"; from .near import g  # why\n', room__near="")
    assert collect_code_files(ENTRY, root)["entry.py"] == 'x = "ü"; from .near import g  # why\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("from . import near\n", "`from . import x` cannot be flattened"),
        ("from .. import other\n", "`from . import x` cannot be flattened"),
        ("from ..other import x\n", "other is a package"),
        ("from .absent import x\n", r"\.absent names no module"),
        ("from .near import x\nfrom ..other.near import y\n", "share a basename"),
        ('"""Words.\n\nfrom .strange import is not code.\n"""\n', r"reads .from \.strange import. as an import"),
    ],
)
def test_what_cannot_be_flattened_is_refused(package, text, message):
    root = package(room__entry=text, room__near="", other__near="", other____init__="")
    with pytest.raises(HubExportError, match=message) as raised:
        collect_code_files(ENTRY, root)
    assert "\n" not in str(raised.value).replace("\n\n", "")


def test_missing_entry_is_named(tmp_path):
    with pytest.raises(HubExportError, match=r"entry\.py is needed"):
        collect_code_files(ENTRY, tmp_path)


def test_manifest_names_every_file_and_reads_back(tmp_path):
    (tmp_path / "code_manifest.py").write_text(manifest_text({"b.py": "1", "a.py": "2"}))
    manifest = read_manifest(tmp_path)
    assert list(manifest["CODE_FILES"]) == ["a.py", "b.py"]
    assert manifest["PACKAGE_VERSION"] == qwen3_vl.__version__
    from transformers.dynamic_module_utils import get_relative_imports

    assert sorted(get_relative_imports(tmp_path / "code_manifest.py")) == ["a", "b"]


def test_processor_files_without_code_stay_free_of_auto_map(tmp_path):
    (tmp_path / "processor_config.json").write_text('{"image_processor": {"auto_map": {"x": "y"}}}')
    mark_processor_files(tmp_path)
    values = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert "auto_map" not in values
    assert values["image_processor_type"] == "Qwen2VLImageProcessor"


# Sources and targets


def tiny_config(moe: bool = False):
    """A configuration of a few thousand parameters; the expert sizes are all different."""
    text = {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
    }
    if moe:
        text |= {"moe_intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 2, "decoder_sparse_step": 1}
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_heads": 2,
        "out_hidden_size": 32,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }
    special = {"image_token_id": 120, "video_token_id": 121, "vision_start_token_id": 122, "vision_end_token_id": 123}
    config_class = qwen3_vl.Qwen3VLMoeConfig if moe else qwen3_vl.Qwen3VLConfig
    return config_class(text_config=text, vision_config=vision, **special)


def tiny_model(moe: bool = False):
    torch.manual_seed(0)
    model_class = qwen3_vl.Qwen3VLMoeForConditionalGeneration if moe else qwen3_vl.Qwen3VLForConditionalGeneration
    return model_class(tiny_config(moe)).eval()


def test_a_folder_is_copied_without_loading(tmp_path, monkeypatch):
    tiny_model().save_pretrained(tmp_path / "source", max_shard_size="40KB")
    shards = sorted(path.name for path in (tmp_path / "source").glob("*.safetensors*"))
    assert len(shards) > 2
    monkeypatch.setattr(torch.nn.Module, "__init__", lambda *a, **k: pytest.fail("a module was built"))
    folder = export_hub_folder(tmp_path / "source", tmp_path / "out")
    for name in shards:
        assert (folder / name).read_bytes() == (tmp_path / "source" / name).read_bytes()
        assert (folder / name).stat().st_nlink == 1  # saving into one folder must not change the other


def test_a_loaded_model_is_sharded_as_asked_and_left_as_it_was(tmp_path):
    model = tiny_model()
    folder = export_hub_folder(model, tmp_path / "out", max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert (
        json.loads((folder / "config.json").read_text())["auto_map"]["AutoModel"] == "modeling_qwen3_vl.Qwen3VLModel"
    )
    model.save_pretrained(tmp_path / "plain")
    assert not list((tmp_path / "plain").glob("*.py"))


def test_an_earlier_export_is_replaced_and_nothing_else(tmp_path):
    model = tiny_model()
    folder = export_hub_folder(model, tmp_path / "out", max_shard_size="40KB")
    (folder / "mine.txt").write_text("kept")
    export_hub_folder(model, folder)
    assert [path.name for path in folder.glob("*.safetensors*")] == ["model.safetensors"]
    assert (folder / "mine.txt").read_text() == "kept"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("important")
    with pytest.raises(HubExportError, match="not empty and no earlier export"):
        export_hub_folder(model, tmp_path / "other")
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no config.json"),
        ({"config.json": "{"}, "is not valid JSON"),
        ({"config.json": '{"model_type": "llama"}'}, "model_type 'llama'"),
        ({"config.json": '{"model_type": "qwen3_vl"}'}, "holds no .safetensors"),
    ],
)
def test_what_is_no_checkpoint_is_refused_and_leaves_nothing(tmp_path, files, message):
    source = tmp_path / "source"
    source.mkdir()
    for name, text in files.items():
        (source / name).write_text(text)
    with pytest.raises(HubExportError, match=message):
        export_hub_folder(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_absent_source_and_export_onto_itself_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a folder nor a Hub repository id"):
        export_hub_folder(tmp_path / "absent", tmp_path / "out")
    tiny_model().save_pretrained(tmp_path / "source")
    with pytest.raises(HubExportError, match="the checkpoint itself"):
        export_hub_folder(tmp_path / "source", tmp_path / "source")


def test_unknown_model_type_is_refused(tmp_path):
    with pytest.raises(HubExportError, match="one of"):
        save_code_files(tmp_path, GenerationConfig())


# Loading elsewhere


TRUSTED = """
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
inputs = encode(processor)
parts = [
    config, model, AutoModel.from_pretrained(folder, trust_remote_code=True), processor,
    AutoImageProcessor.from_pretrained(folder, trust_remote_code=True),
    AutoVideoProcessor.from_pretrained(folder, trust_remote_code=True),
    processor.image_processor, processor.video_processor,
]
answers = pipeline("image-text-to-text", model=folder, trust_remote_code=True)(text=CHAT, max_new_tokens=3)
captioner = pipeline("image-to-text", model=folder, trust_remote_code=True)
caption = captioner(picture, max_new_tokens=3)
parts.append(captioner)
# Saving must not stumble over what pipeline() leaves in the configuration.
captioner.model.save_pretrained(work + "/captioner")
model.save_pretrained(work + "/second")
processor.save_pretrained(work + "/second")
torch.save([dict(inputs), logits_of(model, inputs)], work + "/trusted.pt")
print(json.dumps({
    "classes": [type(part).__module__.split(".")[0] + ":" + type(part).__name__ for part in parts],
    "answer": answers[0]["generated_text"][-1]["content"], "caption": caption,
    "hidden": "qwen3_vl" not in sys.modules,
}))
"""

AGAIN = """
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
inputs, logits = torch.load(work + "/trusted.pt")
model.save_pretrained(work + "/third")
processor.save_pretrained(work + "/third")
difference = (logits_of(model, encode(processor)) - logits).abs().max().item()
print(json.dumps({"difference": difference, "module": type(model).__module__.split(".")[0]}))
"""

STOCK = """
model = AutoModelForImageTextToText.from_pretrained(folder)
image_processor = AutoImageProcessor.from_pretrained(folder)
inputs, logits = torch.load(work + "/trusted.pt")
difference = (logits_of(model, inputs) - logits).abs().max().item()
pixels = image_processor(images=[picture], return_tensors="pt")["pixel_values"]
print(json.dumps({
    "model": type(model).__module__, "image_processor": type(image_processor).__name__, "difference": difference,
    "pixels": (pixels - inputs["pixel_values"]).abs().max().item(),
}))
"""


@needs_tiny
@pytest.mark.slow
def test_folder_loads_answers_and_saves_where_the_package_is_absent(tmp_path):
    first = export_hub_folder(TINY, tmp_path / "first")
    result = run_isolated(TRUSTED, first, tmp_path)
    assert result["hidden"]
    names = ["Qwen3VLConfig", "Qwen3VLForConditionalGeneration", "Qwen3VLModel", "Qwen3VLProcessor"]
    names += ["Qwen3VLImageProcessor", "Qwen3VLVideoProcessor"] * 2 + ["Qwen3VLImageToTextPipeline"]
    assert result["classes"] == [f"transformers_modules:{name}" for name in names]
    assert isinstance(result["answer"], str)
    assert list(result["caption"][0]) == ["generated_text"]

    # Save -> load -> save, both from the Hub copy of the code.
    again = run_isolated(AGAIN, tmp_path / "second", tmp_path)
    assert again == {"difference": 0.0, "module": "transformers_modules"}
    saved = [text_files(tmp_path / name) for name in ("first", "second", "third")]
    assert saved[1] == saved[2]
    # How a tokenizer was loaded is written into its file by Transformers; the programs run offline.
    name = "tokenizer_config.json"
    values = [{**json.loads(files.pop(name)), "local_files_only": None} for files in saved]
    assert values[0] == values[1]
    assert sorted(saved[0]) == sorted(saved[1])
    for name in saved[0]:
        assert saved[0][name] == saved[1][name], name
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("first", "third")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])

    # Without trust the same folder is the stock model. Tolerance: fp32, another order of sums.
    stock = run_isolated(STOCK, first, tmp_path)
    assert stock["model"].startswith("transformers.models.qwen3_vl")
    assert stock["image_processor"].startswith("Qwen2VLImageProcessor")
    assert stock["difference"] <= 1e-4
    assert stock["pixels"] <= 2 / 255


MOE = """
ids = torch.arange(1, 25).reshape(2, 12)
models = [AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=trust) for trust in (True, False)]
models[0].save_pretrained(work + "/second")
with torch.inference_mode():
    logits = [model.eval()(input_ids=ids).logits for model in models]
print(json.dumps({
    "modules": [type(model).__module__.split(".")[0] for model in models],
    "difference": (logits[0] - logits[1]).abs().max().item(), "logits": logits[0].tolist(),
}))
"""


@pytest.mark.slow
def test_experts_survive_the_hub_folder(tmp_path):
    model = tiny_model(moe=True)
    folder = export_hub_folder(model, tmp_path / "first")
    result = run_isolated(MOE, folder, tmp_path)
    assert result["modules"] == ["transformers_modules", "transformers"]
    assert result["difference"] <= 1e-5
    with torch.inference_mode():
        expected = model(input_ids=torch.arange(1, 25).reshape(2, 12)).logits
    torch.testing.assert_close(torch.tensor(result["logits"]), expected, atol=1e-5, rtol=0)
    assert text_files(folder) == text_files(tmp_path / "second")
    weights = [load_file(path / "model.safetensors") for path in (folder, tmp_path / "second")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


FROM_HUB = """
model = AutoModelForImageTextToText.from_pretrained("someone/tiny", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("someone/tiny", trust_remote_code=True)
model.save_pretrained(work + "/saved")
processor.save_pretrained(work + "/saved")
print(json.dumps({"modules": [type(part).__module__.split(".")[0] for part in (model, processor)]}))
"""


@needs_tiny
@pytest.mark.slow
def test_a_hub_repository_brings_all_of_its_code(tmp_path, monkeypatch):
    """The loader takes another path for a repository than for a folder: one module at a time, by its imports."""
    commit = "0" * 40
    repository = tmp_path / "cache" / "models--someone--tiny"
    repository.mkdir(parents=True)
    export_hub_folder(TINY, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    result = run_isolated(FROM_HUB, tmp_path, tmp_path)
    assert result["modules"] == ["transformers_modules", "transformers_modules"]
    first, saved = text_files(repository / "snapshots" / commit), text_files(tmp_path / "saved")
    assert {name: text for name, text in saved.items() if name.endswith(".py")} == {
        name: text for name, text in first.items() if name.endswith(".py")
    }
    assert saved["config.json"] == first["config.json"]
