"""Writes the flat folder that `trust_remote_code=True` loads where this package is not installed.

A Hub repository has no sub-folders for code: `auto_map` takes `module.Class`, and the loader copies sibling modules
only. So every module that the entry classes need is copied under its own basename, and its relative imports are
rewritten to siblings. The configs keep the official `model_type` and class names, so the same folder loads as the
stock model without `trust_remote_code`.

This module is part of the copy. There the files of the manifest, which lie beside it, are what is saved again.
"""

from __future__ import annotations

import ast
import copy
import hashlib
import importlib
import importlib.metadata
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .code_manifest import CODE_FILES, PACKAGE_VERSION


__all__ = ["export_hub_folder", "mark_processor_files", "read_manifest", "save_code_files"]

MANIFEST_NAME = "code_manifest.py"
MANIFEST_MODULE = "code_manifest"
DOCUMENTS = ("README.md", "LICENSE", "LICENSE.txt", "NOTICE")
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")

# What the Hub loader searches the text of a module for.
LOADER_IMPORT = re.compile(r"^\s*(?:import\s+\.(\S+)\s*$|from\s+\.(\S+)\s+import)", flags=re.MULTILINE)
RELATIVE_FROM = re.compile(r"from(\s+)\.+[\w.]+")


class HubExportError(ValueError):
    """The folder cannot be written as asked; the message says why and what fits."""


@dataclass(frozen=True)
class Entry:
    """One class that a loader asks for by name: its module inside the package, and its name."""

    room: str
    module: str
    name: str

    @property
    def path(self) -> str:
        return f"{self.room}/{self.module}.py"

    @property
    def reference(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True)
class Family:
    """The entry classes of one `model_type`."""

    config: Entry
    base: Entry
    generation: Entry

    def entries(self) -> list[Entry]:
        return [self.config, self.base, self.generation, PROCESSOR, IMAGE_PROCESSOR, VIDEO_PROCESSOR, PIPELINE]


PROCESSOR = Entry("processing", "processing_qwen3_vl", "Qwen3VLProcessor")
IMAGE_PROCESSOR = Entry("processing", "image_processing_qwen3_vl", "Qwen3VLImageProcessor")
VIDEO_PROCESSOR = Entry("processing", "video_processing_qwen3_vl", "Qwen3VLVideoProcessor")
PIPELINE = Entry("inference", "pipeline_image_to_text", "Qwen3VLImageToTextPipeline")
FAMILIES = {
    "qwen3_vl": Family(
        Entry("configuration", "configuration_qwen3_vl", "Qwen3VLConfig"),
        Entry("modeling_qwen3_vl", "modeling_qwen3_vl", "Qwen3VLModel"),
        Entry("modeling_qwen3_vl", "modeling_qwen3_vl", "Qwen3VLForConditionalGeneration"),
    ),
    "qwen3_vl_moe": Family(
        Entry("configuration", "configuration_qwen3_vl_moe", "Qwen3VLMoeConfig"),
        Entry("modeling_qwen3_vl", "modeling_qwen3_vl", "Qwen3VLMoeModel"),
        Entry("modeling_qwen3_vl", "modeling_qwen3_vl", "Qwen3VLMoeForConditionalGeneration"),
    ),
}


@dataclass(frozen=True)
class ProcessorPart:
    """A part of the processor, the file of its own, and the name that stock resolves when code is not trusted."""

    key: str
    file_name: str
    auto_class: str
    entry: Entry
    stock_name: str


PROCESSOR_MARKS = {"AutoProcessor": PROCESSOR.reference}
PARTS = (
    ProcessorPart(
        "image_processor", "preprocessor_config.json", "AutoImageProcessor", IMAGE_PROCESSOR, "Qwen2VLImageProcessor"
    ),
    ProcessorPart(
        "video_processor",
        "video_preprocessor_config.json",
        "AutoVideoProcessor",
        VIDEO_PROCESSOR,
        "Qwen3VLVideoProcessor",
    ),
)


def export_hub_folder(
    model_or_path: Any,
    output_dir: str | Path,
    *,
    processor: Any | None = None,
    max_shard_size: str | int = "5GB",
    revision: str | None = None,
    local_files_only: bool = False,
) -> Path:
    """Writes weights, configs, processor and code as one flat folder, ready for `trust_remote_code=True`.

    From a folder or a Hub repository the weight files are copied as they are and never loaded. They are copied, not
    linked: saving into a linked folder later would change the source as well.

    Args:
        model_or_path (`PreTrainedModel`, `str` or `Path`): a loaded model, a checkpoint folder or a Hub repository id.
        output_dir (`str` or `Path`): a new or empty folder, or an earlier export, which is replaced.
        processor (`Qwen3VLProcessor`, *optional*): defaults to the one in the source folder. A loaded model has none,
            and its folder is written without one.
        max_shard_size (`str` or `int`): for a loaded model only; copied weight files stay as they are.
        revision (`str`, *optional*): of a Hub repository.
        local_files_only (`bool`): read a Hub repository from the local cache alone.
    Returns:
        `Path`: the folder.
    Raises:
        HubExportError: if the source is no Qwen3-VL checkpoint with safetensors, or the target holds other files.
        FileNotFoundError: if the source folder does not exist.
    """
    output = Path(output_dir)
    if not isinstance(model_or_path, (str, Path)):
        _family(model_or_path.config)  # before anything is cleared
        if Path(model_or_path.config.name_or_path or "-").resolve() == output.resolve():
            raise HubExportError(f"output_dir {output} is the folder the model came from; name another one.")
        _clear_target(output)
        _save_loaded_model(model_or_path, output, max_shard_size)
    else:
        source = _source_folder(model_or_path, revision, local_files_only)
        if source.resolve() == output.resolve():
            raise HubExportError(f"output_dir {output} is the checkpoint itself; name another folder.")
        config = _load_config(source)
        _weight_files(source)  # before anything is cleared or written
        _clear_target(output)
        _copy_checkpoint(source, output, config)
        processor = processor or _load_processor(source)
    if processor is not None:
        processor.save_pretrained(output)
        mark_processor_files(output)
    return output


def save_code_files(output_dir: str | Path, config: Any) -> list[Path]:
    """Writes the code of `config.model_type` into `output_dir`, and names it in `config`.

    Call it before the config is saved: `auto_map` and `custom_pipelines` are set on the object, in place.

    Args:
        output_dir (`str` or `Path`): created if absent.
        config (`PreTrainedConfig`): of one of the two model types.
    Returns:
        `list[Path]`: the files written, the manifest last.
    """
    output = Path(output_dir)
    output.mkdir(parents=True, exist_ok=True)
    _name_code_in_config(config)
    files = _read_hub_copy() if CODE_FILES else collect_code_files(_family(config).entries(), _package_root())
    files[MANIFEST_NAME] = manifest_text(files)
    for name, text in files.items():
        _write_text(output / name, text)
    if (output / "processor_config.json").is_file():
        mark_processor_files(output)
    return [output / name for name in files]


def mark_processor_files(output_dir: str | Path) -> None:
    """Makes the processor files of a folder load ours with trusted code and the stock classes without.

    Names the classes as stock does, writes the image and video parts as files of their own too, which is where
    earlier versions and serving engines look, and, where the folder holds our code, adds `auto_map` in each place
    that transformers 5.23 searches.
    """
    output = Path(output_dir)
    has_code = (output / MANIFEST_NAME).is_file()
    processor = _read_json(output / "processor_config.json")
    _mark(processor, PROCESSOR_MARKS if has_code else None)
    for part in PARTS:
        values = processor.get(part.key) or _read_json(output / part.file_name)
        _mark(values, PROCESSOR_MARKS | {part.auto_class: part.entry.reference} if has_code else None)
        values[f"{part.key}_type"] = part.stock_name
        processor[part.key] = values
        _write_json(output / part.file_name, values)
    _write_json(output / "processor_config.json", processor)
    tokenizer = _read_json(output / "tokenizer_config.json")
    if tokenizer:
        _mark(tokenizer, PROCESSOR_MARKS if has_code else None)
        _write_json(output / "tokenizer_config.json", tokenizer)


def _mark(values: dict[str, Any], auto_map: dict[str, str] | None) -> None:
    values["processor_class"] = PROCESSOR.name
    values.pop("auto_map", None)
    if auto_map is not None:
        values["auto_map"] = auto_map


def collect_code_files(entries: list[Entry], root: Path) -> dict[str, str]:
    """The text of every module that `entries` need, flattened, by file name in alphabetical order.

    Raises:
        HubExportError: if two modules share a basename, or an import cannot be flattened.
    """
    found: dict[str, Path] = {}
    texts: dict[str, str] = {}
    queue = [root / entry.path for entry in entries]
    while queue:
        path = queue.pop()
        known = found.setdefault(path.name, path)
        if known != path:
            raise HubExportError(f"{path} and {known} share a basename; a Hub folder is flat, so rename one.")
        if path.name in texts:
            continue
        if not path.is_file():
            raise HubExportError(f"{path} is needed by the Hub copy and does not exist.")
        texts[path.name], needed = flatten_module(path)
        queue.extend(needed)
    texts.pop(MANIFEST_NAME, None)
    _check_loader_view(texts)
    return dict(sorted(texts.items()))


def flatten_module(path: Path) -> tuple[str, list[Path]]:
    """The text of a module with its relative imports turned into imports of siblings, and the modules they name."""
    source = path.read_text(encoding="utf-8")
    lines = source.splitlines(keepends=True)
    needed = []
    for node in ast.walk(ast.parse(source, filename=str(path))):
        if not isinstance(node, ast.ImportFrom) or node.level == 0:
            continue
        target = _resolve_import(path, node)
        needed.append(target)
        index, column = node.lineno - 1, _column(lines[node.lineno - 1], node.col_offset)
        head, tail = lines[index][:column], lines[index][column:]
        lines[index] = head + RELATIVE_FROM.sub(rf"from\g<1>.{target.stem}", tail, count=1)
    return "".join(lines), needed


def manifest_text(files: dict[str, str]) -> str:
    """The manifest module of a Hub copy: version, hashes, and the imports that make the loader carry every file."""
    names = sorted(name for name in files if name != MANIFEST_NAME)
    hashes = "".join(f'    "{name}": "{hashlib.sha256(files[name].encode()).hexdigest()}",\n' for name in names)
    imports = "".join(f"    from .{Path(name).stem} import __name__ as _\n" for name in names)
    return (
        '"""Which files this Hub copy of the code consists of; written by `hub_export`."""\n\n'
        f'PACKAGE_VERSION: str = "{_package_version()}"\n'
        f"CODE_FILES: dict[str, str] = {{  # file name -> sha256\n{hashes}}}\n\n\n"
        "def _name_every_module() -> None:\n"
        '    """Never called: the Hub loader copies the modules that this text names."""\n'
        f"{imports}"
    )


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """`PACKAGE_VERSION` and `CODE_FILES` of an exported folder, without running its code."""
    tree = ast.parse((Path(folder) / MANIFEST_NAME).read_text(encoding="utf-8"))
    values = {}
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            values[node.target.id] = ast.literal_eval(node.value)
    return values


def _resolve_import(path: Path, node: ast.ImportFrom) -> Path:
    where = f"{path}:{node.lineno}"
    if node.module is None:
        raise HubExportError(f"{where}: `from . import x` cannot be flattened; write `from .x import Name`.")
    base = path.parents[node.level - 1]
    target = base.joinpath(*node.module.split("."))
    if target.is_dir():
        raise HubExportError(f"{where}: {node.module} is a package, which a flat folder has not; import its module.")
    target = target.with_name(f"{target.name}.py")
    if not target.is_file():
        raise HubExportError(f"{where}: {'.' * node.level}{node.module} names no module ({target}).")
    return target


def _column(line: str, byte_offset: int) -> int:
    return len(line.encode("utf-8")[:byte_offset].decode("utf-8"))


def _check_loader_view(texts: dict[str, str]) -> None:
    """Fails on text that the loader takes for an import of a file that is not there, such as a docstring line."""
    for name, text in texts.items():
        for match in LOADER_IMPORT.finditer(text):
            module = match.group(1) or match.group(2)
            if f"{module}.py" not in texts and module != MANIFEST_MODULE:
                raise HubExportError(
                    f"{name}: the Hub loader reads {match.group(0).strip()!r} as an import of {module}.py, "
                    "which is not part of the copy; reword that line."
                )


def _read_hub_copy() -> dict[str, str]:
    here = Path(__file__).parent
    missing = [name for name in CODE_FILES if not (here / name).is_file()]
    if missing:
        raise HubExportError(f"{here} lacks {', '.join(missing)} of its manifest; load the model from the Hub again.")
    return {name: (here / name).read_text(encoding="utf-8") for name in sorted(CODE_FILES)}


def _package_root() -> Path:
    return Path(__file__).resolve().parents[1]


def _package_version() -> str:
    if CODE_FILES:
        return PACKAGE_VERSION
    try:
        return importlib.metadata.version("qwen3-vl")
    except importlib.metadata.PackageNotFoundError:
        return "0+unknown"


def _family(config: Any) -> Family:
    model_type = getattr(config, "model_type", None)
    if model_type not in FAMILIES:
        raise HubExportError(f"model_type {model_type!r} has no Hub code here; it must be one of {sorted(FAMILIES)}.")
    return FAMILIES[model_type]


def _name_code_in_config(config: Any) -> None:
    family = _family(config)
    config.auto_map = {
        "AutoConfig": family.config.reference,
        "AutoModel": family.base.reference,
        "AutoModelForImageTextToText": family.generation.reference,
        "AutoModelForMultimodalLM": family.generation.reference,
    }
    # Set anew each time: `pipeline()` replaces the names under "pt" by classes, which JSON cannot hold.
    others = copy.copy(getattr(config, "custom_pipelines", None) or {})
    others["image-to-text"] = {
        "impl": PIPELINE.reference,
        "pt": ["AutoModelForImageTextToText"],
        "type": "multimodal",
    }
    config.custom_pipelines = others


def _load_class(entry: Entry) -> type:
    package = __package__ if CODE_FILES else f"{__package__.rpartition('.')[0]}.{entry.room}"
    return getattr(importlib.import_module(f"{package}.{entry.module}"), entry.name)


def _load_config(folder: Path) -> Any:
    values = _read_json(folder / "config.json")
    model_type = values.get("model_type")
    if model_type not in FAMILIES:
        raise HubExportError(f"{folder} holds model_type {model_type!r}; export takes one of {sorted(FAMILIES)}.")
    family = FAMILIES[model_type]
    config = _load_class(family.config).from_pretrained(folder)
    config.architectures = config.architectures or [family.generation.name]
    _fill_dtypes(config, config.dtype)
    return config


def _fill_dtypes(config: Any, dtype: Any) -> None:
    """Gives the parts of a configuration a dtype, as loading the model does; else the next save would differ."""
    for name in config.sub_configs:
        part = getattr(config, name)
        part.dtype = part.dtype or dtype


def _load_processor(folder: Path) -> Any | None:
    if not any((folder / name).exists() for name in PROCESSOR_FILES):
        return None
    return _load_class(PROCESSOR).from_pretrained(folder)


def _source_folder(model: str | Path, revision: str | None, local_files_only: bool) -> Path:
    path = Path(model)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise HubExportError(f"{path} holds no config.json, so it is no model folder.")
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(model)):
        raise FileNotFoundError(
            f"{model} is neither a folder nor a Hub repository id such as Qwen/Qwen3-VL-2B-Instruct."
        )
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.txt", "*.jinja", *DOCUMENTS]
    folder = snapshot_download(
        str(model), revision=revision, allow_patterns=patterns, local_files_only=local_files_only
    )
    return Path(folder)


def _weight_files(folder: Path) -> list[Path]:
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")])
    if not any(file.suffix == ".safetensors" for file in files):
        raise HubExportError(f"{folder} holds no .safetensors weights; load the model and pass it instead of a path.")
    return files


def _clear_target(output: Path) -> None:
    """Leaves `output` existing and free of an earlier export; refuses to mix with anything else."""
    if output.is_file():
        raise HubExportError(f"output_dir {output} is a file; name a folder.")
    output.mkdir(parents=True, exist_ok=True)
    if not any(output.iterdir()):
        return
    if not (output / MANIFEST_NAME).is_file():
        raise HubExportError(f"output_dir {output} is not empty and no earlier export; name a new folder.")
    for name in [*read_manifest(output).get("CODE_FILES", {}), MANIFEST_NAME]:
        (output / name).unlink(missing_ok=True)
    for file in [*output.glob("*.safetensors"), *output.glob("*.json")]:
        file.unlink()


def _save_loaded_model(model: Any, output: Path, max_shard_size: str | int) -> None:
    config = model.config
    before = {name: value for name, value in vars(config).items() if name in ("auto_map", "custom_pipelines")}
    try:
        save_code_files(output, config)
        _fill_dtypes(config, model.dtype)
        model.save_pretrained(output, max_shard_size=max_shard_size)
    finally:
        # A later plain save of this model must not name code that it does not write.
        for name in ("auto_map", "custom_pipelines"):
            vars(config).pop(name, None)
        vars(config).update(before)


def _copy_checkpoint(source: Path, output: Path, config: Any) -> None:
    from transformers import GenerationConfig

    save_code_files(output, config)
    config.save_pretrained(output)
    if (source / "generation_config.json").is_file():
        GenerationConfig.from_pretrained(source).save_pretrained(output)
    else:
        GenerationConfig.from_model_config(config).save_pretrained(output)
    for file in _weight_files(source):
        shutil.copyfile(file, output / file.name)
    for name in DOCUMENTS:
        if (source / name).is_file():
            shutil.copyfile(source / name, output / name)
    if (source / "optim").is_dir():  # weights of techniques, as learned routers
        shutil.copytree(source / "optim", output / "optim", dirs_exist_ok=True)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise HubExportError(f"{path} is not valid JSON: {error}.") from None


def _write_json(path: Path, values: dict[str, Any]) -> None:
    # The format that Transformers writes, so that saving again changes no byte.
    _write_text(path, json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def _write_text(path: Path, text: str) -> None:
    # Bytes, so that every system writes the same line ends.
    path.write_bytes(text.encode("utf-8"))
