"""A quarter of the visual tokens, int4 weights, int4 keys and values and dynamic sparse attention, all at once."""

from pathlib import Path

import pytest
import torch
import transformers
from helpers import clone_inputs
from PIL import Image, ImageDraw

from qwen3_vl import DynamicSparseAttention, QuantizedKVCache


TINY = Path(__file__).resolve().parents[2] / "checkpoints" / "tiny"
# The defaults would compute everything at these lengths.
SPARSE = {"window_tokens": 8, "decode_share": 0.25, "min_pages": 1, "min_blocks": 1, "dense_below_tokens": 0}
SPARSE |= {"query_block": 16, "key_block": 16, "stride": 8}
PROFILE = {
    "token_merging": {"keep_ratio": 0.25},
    "adaptive_precision": {"bits": 4},
    "quantized_cache": {"bits": 4, "group_size": 32, "residual_tokens": 8},
    "qwen3_vl_dynamic_sparse": SPARSE,
}
LONG = "Look at all of them with care and take your time. " * 6
IMAGE = {"type": "image"}
CHATS = {
    "one picture": [[IMAGE, "What color is the shape? " + LONG]],
    "several pictures": [[IMAGE, "Here is one,", IMAGE, IMAGE, "and two more. " + LONG]],
    "left-padded": [[IMAGE, "What color is the shape?"], [LONG], [IMAGE, IMAGE, "Which is larger? " + LONG]],
    "no picture": [["Say something. " + LONG]],
}
MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.2},
    "several_sequences": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"num_beams": 3},
    "chunked_prefill": {"prefill_chunk_size": 40},
}
NEW = 8


@pytest.fixture(scope="module")
def composed():
    """The tiny checkpoint with the profile, as a plain `from_pretrained` gives it, and its processor."""
    load = transformers.AutoModelForImageTextToText.from_pretrained
    model = load(TINY, dtype=torch.float32, optim=PROFILE).eval()
    assert [technique.name for technique in model.active_techniques] == list(PROFILE)
    return model, transformers.AutoProcessor.from_pretrained(TINY)


def inputs_of(processor, chats):
    picture = Image.new("RGB", (256, 192), "white")
    ImageDraw.Draw(picture).rectangle((16, 16, 128, 96), fill="red")
    contents = [[{"type": "text", "text": x} if isinstance(x, str) else x for x in chat] for chat in chats]
    texts = [
        processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        for content in contents
    ]
    images = [picture] * sum(chat.count(IMAGE) for chat in chats) or None
    return dict(processor(text=texts, images=images, padding=True, padding_side="left", return_tensors="pt"))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("form", CHATS)
def test_plain_generate(composed, form, mode):
    model, processor = composed
    inputs, options = inputs_of(processor, CHATS[form]), {"max_new_tokens": NEW, "min_new_tokens": NEW, **MODES[mode]}
    options = {"do_sample": False, "output_scores": True, "return_dict_in_generate": True, **options}
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        runs.append(model.generate(**clone_inputs(inputs), **options))
        assert 0 < max(DynamicSparseAttention.last_density(model)) < 1
    output, again = runs
    rows, prompt = inputs["input_ids"].shape
    rows *= options.get("num_return_sequences", 1)
    assert output.sequences.shape == (rows, prompt + NEW) and torch.equal(output.sequences, again.sequences)
    assert len(output.scores) == NEW and not any(torch.isnan(scores).any() for scores in output.scores)
    cache = output.past_key_values
    assert isinstance(cache, QuantizedKVCache) and cache.settings.bits == 4
    layer, visual = cache.layers[0], int((inputs["input_ids"] == model.config.image_token_id).sum())
    assert layer.tokens_in_full(layer.get_seq_length()) < 64 < layer.get_seq_length(), "there are packed pages"
    if rows == 1:  # three quarters of the visual tokens never reach the decoder
        assert layer.get_seq_length() <= prompt + NEW - 1 - int(0.7 * visual)
