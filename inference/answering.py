"""Load a model, ask it about pictures and videos, and stream the answer.

Small steps that do not print: the command line and later front ends are built from them.
"""

from __future__ import annotations

import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from safetensors import SafetensorError
from transformers import AutoModelForImageTextToText, AutoProcessor, TextStreamer

from ..configuration.profile_qwen3_vl import given_profile


OFFICIAL_EXAMPLE = "Qwen/Qwen3-VL-2B-Instruct"
SHIPPED_CHECKPOINT = Path(__file__).resolve().parents[1] / "checkpoints" / "tiny"
DTYPES = ("auto", "float32", "bfloat16", "float16")


class AnsweringError(Exception):
    """What was asked for cannot be done; the message is one line that says why and what fits."""


@dataclass
class LoadedModel:
    """A model with its processor, ready to answer."""

    model: Any
    processor: Any


@dataclass
class Answer:
    """An answer and what it took. Times in seconds; `None` where nothing was generated."""

    answer: str
    prompt_tokens: int
    image_tokens: int
    video_tokens: int
    new_tokens: int
    seconds_to_first_token: float | None
    seconds: float
    tokens_per_second: float | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def find_model(model: str | Path | None) -> str:
    """The folder or Hub repository to load; without a name, the tiny checkpoint that a checkout holds.

    Raises:
        AnsweringError: if it is neither.
    """
    if model is None:
        if not (SHIPPED_CHECKPOINT / "config.json").is_file():
            raise AnsweringError(
                f"no model named and no tiny checkpoint at {SHIPPED_CHECKPOINT}; name one: --model {OFFICIAL_EXAMPLE}."
            )
        return str(SHIPPED_CHECKPOINT)
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise AnsweringError(f"{path} is not a model folder: it holds no config.json.")
        return str(path)
    if path.exists():
        raise AnsweringError(f"{path} is a file; --model takes a folder or a name such as {OFFICIAL_EXAMPLE}.")
    if str(model).count("/") != 1 or str(model).startswith((".", "/", "~")):
        raise AnsweringError(f"no folder {path}; --model takes a folder or a name such as {OFFICIAL_EXAMPLE}.")
    return str(model)


def only_in_cache(source: str) -> bool:
    """Whether a Hub repository must be read from the local cache, since the Hub is out of reach.

    One request with a short limit, in place of the minutes of retries that each missing file would take.

    Raises:
        AnsweringError: if it is not in the cache either, or does not exist.
    """
    from huggingface_hub import constants, is_offline_mode, try_to_load_from_cache

    reason = (
        "HF_HUB_OFFLINE is set" if is_offline_mode() else _unreachable(f"{constants.ENDPOINT}/api/models/{source}")
    )
    if reason is None:
        return False
    if isinstance(try_to_load_from_cache(source, "config.json"), str):
        return True
    raise AnsweringError(
        f"cannot load {source}: {reason}, and it is not in the local cache; --model takes a folder too."
    )


def _unreachable(url: str) -> str | None:
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=10).close()
    except urllib.error.HTTPError as error:
        # 401 is also what an unknown name gives; a private one may still load with a token.
        return "the Hub knows no such repository" if error.code == 404 else None
    except urllib.error.URLError as error:
        # A certificate that Python does not know may be fine for the Hub library.
        return None if isinstance(error.reason, ssl.SSLError) else "no network"
    except OSError:
        return "no network"
    return None


def pick_device(device: str | None) -> str:
    """`device`, checked, or the first accelerator of this machine, or the CPU."""
    if device is None:
        return torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise AnsweringError(f"device {device!r} is not usable here: {first_line(error)}") from None
    return device


def load(
    model: str | Path | None = None,
    *,
    dtype: str = "auto",
    device: str | None = None,
    attn_implementation: str | None = None,
    optim: str | dict[str, Any] | None = None,
) -> LoadedModel:
    """Loads a model and its processor for answering.

    Args:
        model (`str` or `Path`, *optional*): a folder or Hub repository; default: see `find_model`.
        dtype (`str`): one of `DTYPES`; `auto` is what the checkpoint holds.
        device (`str`, *optional*): default: see `pick_device`.
        attn_implementation (`str`, *optional*): the name of an attention function.
        optim (`str` or `dict`, *optional*): a preset's name, a profile or its file, or "none" for the plain model;
            by default what the model's folder says.
    Raises:
        AnsweringError: if it cannot be loaded.
    """
    if dtype not in DTYPES:
        raise AnsweringError(f"dtype {dtype!r} is unknown; it must be one of {', '.join(DTYPES)}.")
    source, device = find_model(model), pick_device(device)
    local = {} if Path(source).is_dir() else {"local_files_only": only_in_cache(source)}
    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    options |= find_profile(optim)
    try:
        processor = AutoProcessor.from_pretrained(source, **local)
        network = AutoModelForImageTextToText.from_pretrained(
            source, dtype=dtype if dtype == "auto" else getattr(torch, dtype), **local, **options
        )
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise AnsweringError(f"cannot load {source}: {first_line(error)}") from error
    return LoadedModel(network.to(device).eval(), processor)


def find_profile(optim: str | dict[str, Any] | None) -> dict[str, Any]:
    """What `from_pretrained` is to be given for a profile: nothing, or `optim`.

    Raises:
        AnsweringError: if there is no such preset or file, or it holds no profile.
    """
    if optim is None:
        return {}
    try:
        return {"optim": None if optim == "none" else given_profile(optim)}
    except (OSError, ValueError, TypeError) as error:
        raise AnsweringError(first_line(error)) from None


def open_picture(path: str | Path) -> Image.Image:
    """A picture as RGB, turned as its camera says.

    Raises:
        AnsweringError: if the file is missing or no readable picture.
    """
    file = _existing_file(path, "picture")
    try:
        with Image.open(file) as picture:
            return ImageOps.exif_transpose(picture).convert("RGB")
    except UnidentifiedImageError:
        raise AnsweringError(f"{file} is not a picture that Pillow can read (PNG, JPEG, WebP, ...).") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise AnsweringError(f"{file} is a broken picture: {first_line(error)}") from None


def build_messages(
    question: str, images: Sequence[str | Path | Image.Image] = (), videos: Sequence[str | Path] = ()
) -> list[dict[str, Any]]:
    """One user turn: pictures, then videos, then the question."""
    if not question.strip():
        raise AnsweringError('the question is empty; ask something, such as "What is in the picture?".')
    pictures = [image if isinstance(image, Image.Image) else open_picture(image) for image in images]
    content: list[dict[str, Any]] = [{"type": "image", "image": picture} for picture in pictures]
    content += [{"type": "video", "video": str(_existing_file(video, "video"))} for video in videos]
    return [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]


def encode(loaded: LoadedModel, messages: list[dict[str, Any]]) -> Any:
    """The model inputs of a conversation, on the model's device."""
    try:
        inputs = loaded.processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        raise AnsweringError(f"cannot prepare the input: {first_line(error)}") from error
    return inputs.to(loaded.model.device)


def answer(
    loaded: LoadedModel,
    question: str,
    *,
    images: Sequence[str | Path | Image.Image] = (),
    videos: Sequence[str | Path] = (),
    max_new_tokens: int = 128,
    on_text: Callable[[str], None] | None = None,
    **generate_kwargs: Any,
) -> Answer:
    """Asks one question, greedily unless `generate_kwargs` say otherwise.

    Args:
        question (`str`): what to ask.
        images (sequence of paths or `PIL.Image.Image`): shown before the question, in this order.
        videos (sequence of paths): shown after the pictures.
        max_new_tokens (`int`): the most that is generated, at least 1.
        on_text (callable, *optional*): called with each piece of text as it is generated.
    """
    if max_new_tokens < 1:
        raise AnsweringError(f"max_new_tokens must be at least 1, got {max_new_tokens}.")
    inputs = encode(loaded, build_messages(question, images, videos))
    streamer = TextCollector(loaded.processor.tokenizer, on_text)
    started = time.perf_counter()
    with torch.inference_mode():
        sequences = loaded.model.generate(
            **inputs, max_new_tokens=max_new_tokens, streamer=streamer, **{"do_sample": False, **generate_kwargs}
        )
    return _summarize(loaded.model.config, inputs["input_ids"], sequences, streamer, started, time.perf_counter())


class TextCollector(TextStreamer):
    """Collects the generated text, passes each piece on, and notes when the first token came."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None] | None = None):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text = on_text
        self.pieces: list[str] = []
        self.first_token_at: float | None = None
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_seen and self.first_token_at is None:
            self.first_token_at = time.perf_counter()
        self._prompt_seen = True
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if not text:
            return
        self.pieces.append(text)
        if self.on_text is not None:
            self.on_text(text)


def _summarize(
    config: Any,
    input_ids: torch.Tensor,
    sequences: torch.Tensor,
    streamer: TextCollector,
    started: float,
    ended: float,
) -> Answer:
    new_tokens = sequences.shape[1] - input_ids.shape[1]
    first = streamer.first_token_at
    decoding = ended - first if first is not None else 0.0
    return Answer(
        answer="".join(streamer.pieces).strip(),
        prompt_tokens=input_ids.shape[1],
        image_tokens=int((input_ids == config.image_token_id).sum()),
        video_tokens=int((input_ids == config.video_token_id).sum()),
        new_tokens=new_tokens,
        seconds_to_first_token=None if first is None else round(first - started, 4),
        seconds=round(ended - started, 4),
        # Of the tokens after the first, which is the work of the prompt.
        tokens_per_second=round((new_tokens - 1) / decoding, 2) if new_tokens > 1 and decoding > 0 else None,
    )


def _existing_file(path: str | Path, what: str) -> Path:
    file = Path(path).expanduser()
    if file.is_dir():
        raise AnsweringError(f"{file} is a folder; name one {what} file.")
    if not file.is_file():
        raise AnsweringError(f"no such {what}: {file}.")
    return file


def first_line(error: BaseException) -> str:
    """The first line that an exception says, or its class if it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
