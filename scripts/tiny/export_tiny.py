"""Writes the checkpoint folder from the training state: `python scripts/tiny/export_tiny.py`.

The folder has the layout of the official Qwen3-VL repositories and loads with the stock classes. `--untrained` writes
the structure with the initial weights, for those who only need a loadable folder.
"""

import argparse
import json
import sys
from pathlib import Path


if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    __package__ = "tiny"

import torch
from safetensors import safe_open

from .data_material import REPOSITORY, load_material
from .model_tiny import MODEL_CLASS, tiny_config
from .tokenizer_tiny import build_tokenizer, save_tokenizer
from .train import RUN_FOLDER


CHECKPOINT = REPOSITORY / "checkpoints" / "tiny"
LARGEST_BYTES = 24_000_000
IMAGE_PROCESSOR = {
    "size": {"shortest_edge": 64 * 64, "longest_edge": 256 * 256},
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "Qwen3VLProcessor",
    "image_processor_type": "Qwen2VLImageProcessorFast",
}
# A clip of 16 frames may have 128 x 128 pixels a frame; a shorter one more.
VIDEO_PROCESSOR = {
    **{key: value for key, value in IMAGE_PROCESSOR.items() if key != "image_processor_type"},
    "size": {"shortest_edge": 4 * 64 * 64, "longest_edge": 16 * 128 * 128},
    "fps": 2,
    "min_frames": 4,
    "max_frames": 16,
    "video_processor_type": "Qwen3VLVideoProcessor",
}


def chat_template() -> str:
    """The package's chat template, read without importing the package."""
    scope: dict = {}
    exec((REPOSITORY / "processing" / "chat_template_qwen3_vl.py").read_text(), scope)
    return scope["QWEN3_VL_CHAT_TEMPLATE"]


def trained_weights(folder: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """The float32 master weights by parameter name, and the progress they were saved at."""
    with safe_open(folder / "state.safetensors", "pt") as state:
        progress = json.loads(state.metadata()["progress"])
        keys = [key for key in state.keys() if key.startswith("master/model.")]  # noqa: SIM118
        return {key.removeprefix("master/"): state.get_tensor(key) for key in keys}, progress


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=False) + "\n")


def export(folder: Path, run_folder: Path | None) -> dict:
    """Writes weights, config, tokenizer, processors and generation config to `folder`; returns the progress.

    Args:
        run_folder: where `state.safetensors` lies, or `None` for initial weights.
    Raises:
        RuntimeError: if the weights are larger than `LARGEST_BYTES`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(load_material().names)
    torch.manual_seed(0)
    model = MODEL_CLASS(tiny_config(tokenizer))
    progress = {"step": 0}
    if run_folder is not None:
        weights, progress = trained_weights(run_folder)
        missing, unexpected = model.load_state_dict(weights, strict=False)
        if unexpected or set(missing) - {"lm_head.weight"}:
            raise RuntimeError(f"the state does not fit the model: missing {missing}, unexpected {unexpected}")
    end, pad = (tokenizer.token_to_id(token) for token in ("<|im_end|>", "<|endoftext|>"))
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    size = (folder / "model.safetensors").stat().st_size
    if size > LARGEST_BYTES:
        raise RuntimeError(f"model.safetensors has {size} bytes, more than {LARGEST_BYTES}")
    generation = {"bos_token_id": pad, "do_sample": False, "eos_token_id": [end, pad], "pad_token_id": pad}
    write_json(folder / "generation_config.json", generation)
    save_tokenizer(tokenizer, folder, chat_template())
    write_json(folder / "chat_template.json", {"chat_template": chat_template()})
    write_json(folder / "preprocessor_config.json", IMAGE_PROCESSOR)
    write_json(folder / "video_preprocessor_config.json", VIDEO_PROCESSOR)
    return progress


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=CHECKPOINT, help="where to write (default: %(default)s)")
    parser.add_argument("--run", type=Path, default=RUN_FOLDER, help="folder of the training state")
    parser.add_argument("--untrained", action="store_true", help="initial weights instead of the training state")
    arguments = parser.parse_args()
    progress = export(arguments.folder, None if arguments.untrained else arguments.run)
    print(f"wrote {arguments.folder} at step {progress['step']}")


if __name__ == "__main__":
    main()
