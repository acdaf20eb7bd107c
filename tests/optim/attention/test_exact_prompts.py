"""Exact attention answers twenty mixed prompts with the very tokens of the stock model, on the tiny checkpoint."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image


TINY = Path(__file__).resolve().parents[3] / "checkpoints" / "tiny"
QUESTIONS = ("What is this?", "What color is the shape?", "How many shapes are there?", "Read the text.")
SIZES = ((64, 64), (128, 96), (256, 64), (96, 192), (256, 256))


def picture(number: int) -> Image.Image:
    """A part of the shipped picture, or coloured rectangles."""
    size = SIZES[number % len(SIZES)]
    if number % 3 == 0:
        return Image.open(TINY / "demo.png").convert("RGB").resize(size)
    rng = np.random.default_rng(number)
    pixels = np.full((size[1], size[0], 3), rng.integers(0, 256, 3), dtype=np.uint8)
    top, left = rng.integers(0, size[1] // 2), rng.integers(0, size[0] // 2)
    pixels[top : top + size[1] // 3, left : left + size[0] // 3] = rng.integers(0, 256, 3)
    return Image.fromarray(pixels)


def prompts() -> list[list[tuple[str, int]]]:
    """Twenty conversations as (question, pictures): text alone, one picture, several, and two turns."""
    text = [[(question, 0)] for question in QUESTIONS]
    single = [[(QUESTIONS[n % 4], 1)] for n in range(8)]
    several = [[(f"Which picture shows a shape? {question}", 2 + 3 * n)] for n, question in enumerate(QUESTIONS)]
    turns = [[(QUESTIONS[n], 1), (QUESTIONS[(n + 1) % 4], n % 2)] for n in range(4)]
    return text + single + several + turns


def messages_of(conversation, number: int) -> tuple[list[dict], list[Image.Image]]:
    messages, pictures = [], []
    for question, count in conversation:
        if messages:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": "a red shape"}]})
        content = [{"type": "image"} for _ in range(count)]
        messages.append({"role": "user", "content": [*content, {"type": "text", "text": question}]})
        pictures += [picture(number + n) for n in range(count)]
    return messages, pictures


@pytest.fixture(scope="module")
def models():
    stock = transformers.Qwen3VLForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32).eval()
    ours = transformers.AutoModelForImageTextToText.from_pretrained(
        TINY, dtype=torch.float32, attn_implementation="qwen3_vl_exact"
    ).eval()
    assert type(ours) is not type(stock)
    return ours, stock, transformers.AutoProcessor.from_pretrained(TINY)


def generate(model, inputs):
    return model.generate(**inputs, max_new_tokens=16, do_sample=False)


@pytest.mark.parametrize("number", range(20))
def test_same_tokens(models, number):
    ours, stock, processor = models
    messages, pictures = messages_of(prompts()[number], number)
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = processor(text=[text], images=pictures or None, return_tensors="pt")
    assert torch.equal(generate(ours, inputs), generate(stock, inputs))


def test_same_tokens_in_one_left_padded_batch(models):
    ours, stock, processor = models
    conversations = [messages_of(conversation, number) for number, conversation in enumerate(prompts())]
    texts = [processor.apply_chat_template(x, add_generation_prompt=True, tokenize=False) for x, _ in conversations]
    pictures = [one for _, several in conversations for one in several]
    inputs = processor(text=texts, images=pictures, padding=True, padding_side="left", return_tensors="pt")
    assert torch.equal(generate(ours, inputs), generate(stock, inputs))


def test_same_tokens_about_a_video(models):
    ours, stock, processor = models
    frames = np.stack([np.asarray(picture(number).resize((64, 64))) for number in range(6)])
    messages = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What moves?"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = processor(text=[text], videos=[torch.from_numpy(frames).permute(0, 3, 1, 2)], return_tensors="pt")
    assert torch.equal(generate(ours, inputs), generate(stock, inputs))
