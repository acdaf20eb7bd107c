"""Labels of the assistant's turns, by the template's mask and by its markers."""

import pytest
import torch
from PIL import Image

import qwen3_vl
from qwen3_vl import assistant_labels
from qwen3_vl.inference import answering


pytestmark = pytest.mark.skipif(
    not (answering.SHIPPED_CHECKPOINT / "config.json").is_file(), reason="checkpoints/tiny is not there"
)

TURNS = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A red square"}]},
    {"role": "user", "content": [{"type": "text", "text": "How many?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "one"}]},
]


@pytest.fixture(scope="module")
def processor():
    return qwen3_vl.Qwen3VLProcessor.from_pretrained(answering.SHIPPED_CHECKPOINT)


@pytest.fixture
def conversation():
    picture = {"type": "image", "image": Image.new("RGB", (64, 96), "red")}
    first = {**TURNS[0], "content": [picture, TURNS[0]["content"][1]]}
    return [first, *TURNS[1:]]


def learned(labels, processor):
    return processor.tokenizer.decode([token for token in labels.flatten().tolist() if token != -100])


def test_the_mask_and_the_markers_say_the_same(processor, conversation):
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    plain = processor.apply_chat_template(conversation, **options)
    by_markers = assistant_labels(plain, processor)
    assert by_markers.shape == plain["input_ids"].shape and by_markers.dtype == torch.long
    text = learned(by_markers, processor)
    assert text.count("<|im_end|>") == 2 and "square" in text and "one" in text
    assert "What" not in text and "image_pad" not in text and "assistant" not in text
    marked = processor.apply_chat_template(
        conversation, **options, return_assistant_tokens_mask=True, processor_kwargs={"return_offsets_mapping": True}
    )
    assert bool(torch.as_tensor(marked["assistant_masks"]).any())
    assert torch.equal(assistant_labels(marked), by_markers)


def test_one_row_and_lists(processor, conversation):
    sample = processor.apply_chat_template(conversation, tokenize=True, return_dict=True, return_tensors="pt")
    expected = assistant_labels(sample, processor)
    flat = {"input_ids": sample["input_ids"][0].tolist(), "assistant_masks": [0] * sample["input_ids"].shape[1]}
    assert torch.equal(assistant_labels(flat, processor.tokenizer), expected[0])


def test_an_unfinished_turn_is_learned_to_its_end(processor):
    ids = processor.tokenizer("<|im_start|>assistant\nA red", return_tensors="pt")["input_ids"]
    labels = assistant_labels({"input_ids": ids}, processor)
    assert learned(labels, processor).strip() == "A red"
    prompt = processor.tokenizer("<|im_start|>user\nA red<|im_end|>\n<|im_start|>assistant\n", return_tensors="pt")
    assert bool((assistant_labels(prompt, processor) == -100).all())


def test_needs_a_mask_or_a_tokenizer():
    with pytest.raises(ValueError, match="pass the tokenizer as well"):
        assistant_labels({"input_ids": [1, 2]})
