"""What a user of a CPU would take instead: llama.cpp, measured by its own `llama-bench` at the same widths.

`scripts/bench profiles --peer PATH_TO_LLAMA_BENCH`. The tool loads files, so random weights of the widths are written
once, with the `gguf` package, and kept in the user's cache folder. A matrix is one random block repeated, which costs
as much to read.
"""

from __future__ import annotations

import importlib
import json
import os
import statistics
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import torch
from bench_pair import config_values
from bench_settings import Settings


# The tool's names of weight forms.
FORMS = ("BF16", "Q4_0")
# It fills its cache with a prompt first, which takes minutes for longer ones.
MOST_CONTEXT = 8192
NEW_TOKENS, REPEATS = 16, 3
BLOCK_ROWS = 512
SECONDS = 900


@cache
def peer_decode_ms(settings: Settings, form: str, context: int) -> float:
    """Milliseconds of a decoded token behind `context` cached ones."""
    return _run(settings, form, "-p", "0", "-n", str(NEW_TOKENS), "-d", str(context))


@cache
def peer_prefill_ms(settings: Settings, form: str, tokens: int) -> float:
    """Milliseconds of a prompt of so many tokens."""
    return tokens * _run(settings, form, "-p", str(tokens), "-n", "0")


def _run(settings: Settings, form: str, *arguments: str) -> float:
    """Median milliseconds of a token.

    Raises:
        RuntimeError: if the tool or the package is missing, or the tool fails.
    """
    command = [str(settings.peer), "-m", str(weights_file(settings, form)), *arguments]
    command += ["-t", str(torch.get_num_threads()), "-r", str(REPEATS), "-o", "json"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=SECONDS)
        (result,) = json.loads(done.stdout)
        return 1e3 / statistics.median(result["samples_ts"])
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or [f"status {error.returncode}"])[-1]
        raise RuntimeError(f"{settings.peer} failed: {last}") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RuntimeError(f"{settings.peer} does not run: {error}; give the path of llama-bench as --peer") from None
    except (ValueError, KeyError) as error:
        raise RuntimeError(f"{settings.peer} did not print what llama-bench -o json prints: {error!r}") from None


def weights_file(settings: Settings, form: str) -> Path:
    """A GGUF file of random weights at the text widths of the settings, written if it is not there yet."""
    from qwen3_vl.optim.user_cache import user_cache_folder

    text = config_values(settings.text_layers, settings.vision_layers, settings.quick)["text_config"]
    sizes = [text[name] for name in ("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size")]
    path = user_cache_folder() / "bench" / f"qwen3-{'-'.join(map(str, sizes))}-{form}.gguf"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        try:
            _write(partial, text, form)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    return path


def _write(path: Path, text: dict[str, Any], form: str) -> None:
    try:
        gguf = importlib.import_module("gguf")
    except ImportError:
        raise RuntimeError("--peer writes its weights with the gguf package; pip install gguf") from None
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{form}"])
    writer.add_block_count(text["num_hidden_layers"])
    writer.add_context_length(text["max_position_embeddings"])
    writer.add_embedding_length(text["hidden_size"])
    writer.add_feed_forward_length(text["intermediate_size"])
    writer.add_head_count(text["num_attention_heads"])
    writer.add_head_count_kv(text["num_key_value_heads"])
    writer.add_key_length(text["head_dim"])
    writer.add_value_length(text["head_dim"])
    writer.add_rope_freq_base(text["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(text["vocab_size"])
    writer.add_tokenizer_model("none")
    for name, shape in _shapes(text).items():
        _add_tensor(gguf, writer, name, shape, form)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _shapes(text: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a Qwen3 decoder whose head is its embedding."""
    hidden, inner, width = text["hidden_size"], text["intermediate_size"], text["head_dim"]
    query, key = text["num_attention_heads"] * width, text["num_key_value_heads"] * width
    layer = {
        "attn_norm": (hidden,),
        "attn_q": (query, hidden),
        "attn_k": (key, hidden),
        "attn_v": (key, hidden),
        "attn_q_norm": (width,),
        "attn_k_norm": (width,),
        "attn_output": (hidden, query),
        "ffn_norm": (hidden,),
        "ffn_gate": (inner, hidden),
        "ffn_up": (inner, hidden),
        "ffn_down": (hidden, inner),
    }
    shapes = {"token_embd.weight": (text["vocab_size"], hidden), "output_norm.weight": (hidden,)}
    for index in range(text["num_hidden_layers"]):
        shapes |= {f"blk.{index}.{name}.weight": shape for name, shape in layer.items()}
    return shapes


def _add_tensor(gguf, writer, name: str, shape: tuple[int, ...], form: str) -> None:
    import numpy as np

    if len(shape) == 1:
        writer.add_tensor(name, np.ones(shape, dtype=np.float32))
        return
    kind = gguf.GGMLQuantizationType[form]
    rows, columns = shape
    block = np.random.default_rng(0).normal(0, 0.02, (BLOCK_ROWS, columns)).astype(np.float32)
    packed = gguf.quants.quantize(block, kind)
    repeated = np.tile(packed, (-(-rows // BLOCK_ROWS), 1))[:rows]
    writer.add_tensor(name, repeated, raw_dtype=kind)
