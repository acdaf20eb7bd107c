"""`reference.py` beside this file is imported by its plain name; the tiny checkpoint with pictures, for all."""

import sys
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image, ImageDraw


sys.path.insert(0, str(Path(__file__).resolve().parent))
TINY = Path(__file__).resolve().parents[3] / "checkpoints" / "tiny"


@pytest.fixture(scope="module")
def checkpoint():
    """The tiny checkpoint in float32 and a left-padded batch of two questions, each with a picture."""
    model = transformers.AutoModelForImageTextToText.from_pretrained(TINY, dtype=torch.float32).eval()
    processor = transformers.AutoProcessor.from_pretrained(TINY)
    picture = Image.new("RGB", (128, 96), "white")
    ImageDraw.Draw(picture).rectangle((8, 8, 64, 48), fill="red")
    chats = [
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
        for text in ("What color is the shape?", "What is this?")
    ]
    texts = [processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in chats]
    inputs = processor(text=texts, images=[picture] * 2, padding=True, padding_side="left", return_tensors="pt")
    assert not inputs["attention_mask"].all()
    return model, dict(inputs)
