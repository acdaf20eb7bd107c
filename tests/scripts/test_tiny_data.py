"""The data of the tiny checkpoint: right answers, fixed seeds, and sets that share nothing with held-out ones."""

import dataclasses
import math
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch


SCRIPTS = str(Path(__file__).resolve().parents[2] / "scripts")
if SCRIPTS not in sys.path:
    sys.path.insert(0, SCRIPTS)

from tiny import data_batches, data_draw, data_evaluation, data_material, data_tasks, evaluate  # noqa: E402
from tiny.tokenizer_tiny import SPECIAL_TOKENS, VOCABULARY, build_tokenizer  # noqa: E402


CHECKPOINT = Path(__file__).resolve().parents[2] / "checkpoints" / "tiny"


def scene(*objects: tuple[str, str, float, float]) -> list[data_draw.SceneObject]:
    return [data_draw.SceneObject(shape, colour, x, y, 10) for shape, colour, x, y in objects]


@pytest.fixture(scope="module")
def material() -> data_material.Material:
    try:
        return data_material.load_material()
    except data_material.MaterialMissingError as error:
        pytest.skip(str(error))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(3)


def test_scene_answers_follow_the_objects(rng):
    objects = scene(("circle", "red", 20, 20), ("circle", "blue", 80, 80), ("cross", "blue", 80, 20))
    assert data_tasks.colour_turns(rng, objects, 100) == [("What colour is the cross?", "blue")]
    assert data_tasks.shape_turns(rng, objects, 100) == [("What shape is red?", "circle")]
    counts = dict(data_tasks.count_turns(rng, objects, 100))
    assert counts["How many shapes are there?"] == "3"
    assert counts.get("How many circles are there?", "2") == "2"
    positions = dict(data_tasks.position_turns(rng, objects, 100))
    assert positions["Where is the red circle?"] == "top left"
    assert positions["Where is the blue circle?"] == "bottom right"
    assert positions["Is the red circle left or right of the blue cross?"] == "left"
    assert positions["Is the blue circle above or below the blue cross?"] == "below"
    # The two stand level, so which is higher is not asked.
    assert "Is the red circle above or below the blue cross?" not in positions


def test_description_counts_equal_objects_from_left_to_right(rng):
    objects = scene(("heart", "red", 70, 20), ("square", "orange", 10, 50), ("heart", "red", 30, 80))
    assert data_tasks.describe_turns(rng, objects, 100)[0][1] == "an orange square and two red hearts"
    crosses = scene(("cross", "white", 10, 10), ("cross", "white", 60, 60))
    assert data_tasks.describe_turns(rng, crosses, 100)[0][1] == "two white crosses"


@pytest.mark.parametrize("shape", data_draw.SHAPES)
def test_shapes_stay_within_their_radius(shape):
    points = np.array(data_draw.shape_outline(shape, 50, 40, 10))
    assert np.hypot(points[:, 0] - 50, points[:, 1] - 40).max() <= 12.1
    with pytest.raises(ValueError, match="unknown shape 'blob'"):
        data_draw.shape_outline("blob", 0, 0, 1)


def test_objects_do_not_overlap(rng):
    for _ in range(50):
        objects = data_tasks.random_objects(rng, 6, 64)
        for i, first in enumerate(objects):
            assert first.radius < first.x < 64 - first.radius
            for second in objects[:i]:
                assert math.hypot(first.x - second.x, first.y - second.y) > first.radius + second.radius


@pytest.mark.parametrize("kind", list(data_tasks.SCENE_TURNS))
def test_a_scene_of_one_kind_asks_that_kind(kind, rng):
    sample = data_tasks.scene_sample(rng, 96, kinds=(kind,), turns=1)
    assert sample.meta["kinds"] == [kind]
    assert sample.pictures[0].shape == (96, 96, 3)
    assert sample.pictures[0].dtype == np.uint8


def test_which_picture_names_exactly_one(rng):
    for _ in range(20):
        sample = data_tasks.many_sample(rng, None, "heldout", 16, turns=2, kind="shape", find_first=True)
        question, answer = sample.turns[0]
        assert len(sample.pictures) == 16
        assert question.startswith("Which of the 16 pictures shows a")
        assert 1 <= int(answer) <= 16


def test_evaluation_questions_are_fixed_and_prefix_stable():
    first = data_evaluation.evaluation_set("scene_count", None, 3)
    again = data_evaluation.evaluation_set("scene_count", None, 5)[:3]
    for one, other in zip(first, again, strict=True):
        assert one.turns == other.turns
        np.testing.assert_array_equal(one.pictures[0], other.pictures[0])


def test_training_seeds_cannot_meet_evaluation_seeds():
    from tiny.train import TRAIN_STREAM

    # Generators are keyed by a list of numbers; the lists differ in length and in their first number.
    training = np.random.default_rng([20261123, TRAIN_STREAM, 0]).integers(0, 2**62, 8)
    evaluation = np.random.default_rng([data_evaluation.EVALUATION_STREAM, data_evaluation.EVALUATION_SEED, 0, 0])
    assert not np.intersect1d(training, evaluation.integers(0, 2**62, 8)).size


def test_patches_equal_the_stock_processor(rng):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    half = [0.5, 0.5, 0.5]
    stock = Qwen2VLImageProcessorPil(
        patch_size=16, size={"shortest_edge": 4096, "longest_edge": 65536}, image_mean=half, image_std=half
    )
    picture = rng.integers(0, 256, (64, 96, 3), dtype=np.uint8)
    expected = stock(picture, return_tensors="np")
    patches = data_batches.to_patches(picture).astype(np.float32) / 127.5 - 1
    assert expected["image_grid_thw"].tolist() == [[1, 4, 6]]
    both = expected["pixel_values"].reshape(-1, 3, 2, 256)
    np.testing.assert_allclose(both[:, :, 0].reshape(patches.shape), patches, atol=1e-6)
    np.testing.assert_array_equal(both[:, :, 0], both[:, :, 1])


def test_edit_distance_and_interval():
    assert evaluate.edit_distance("kitten", "sitting") == 3
    assert evaluate.edit_distance("", "ab") == 2
    low, high = evaluate.wilson_interval(90, 100)
    assert (round(low, 3), round(high, 3)) == (0.826, 0.945)
    assert evaluate.wilson_interval(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="unknown tasks \\['nothing'\\]"):
        evaluate.evaluate_model(None, None, ["nothing"])


def test_splits_share_no_word_font_digit_or_photo(material):
    words = {split: {word.lower() for word in material.words[split]} for split in ("train", "heldout")}
    assert words["train"] and words["heldout"] and not words["train"] & words["heldout"]
    fonts = {split: {path for group in material.fonts[split] for path in group} for split in ("train", "heldout")}
    assert fonts["train"] and fonts["heldout"] and not fonts["train"] & fonts["heldout"]
    digits = material.digit_indices
    assert not np.intersect1d(digits["train"], digits["heldout"]).size
    assert len(digits["train"]) + len(digits["heldout"]) == len(material.digits)
    assert len(material.names) == len(set(material.names)) == len(material.twemoji) == len(material.openmoji)


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_drawn_strings_belong_to_their_split(material, rng, split):
    for length in range(1, 13):
        for _ in range(20):
            text = data_tasks.random_text(rng, material, split, length)
            assert data_material.text_split(text) == split


def test_answers_name_what_is_drawn(material, rng):
    sample = data_tasks.emoji_sample(rng, material, "train", 64, row=5)
    assert sample.turns[0][1] == data_tasks.with_article(material.names[5])
    for kind in data_tasks.MANY_KINDS:
        sample = data_tasks.many_sample(rng, material, "train", 5, kind=kind, find_first=True)
        assert len(sample.pictures) == 5
        assert sample.turns[0][1] in list("12345")


def test_reading_answers_are_spelled_and_names_are_not(material):
    tokenizer = build_tokenizer(material.names)
    assert tokenizer.get_vocab_size() == VOCABULARY
    assert tokenizer.encode("reduce").tokens == list("reduce")
    assert tokenizer.encode("a grinning face").tokens == ["a", "Ġgrinning", "Ġface"]
    for token in SPECIAL_TOKENS:
        assert tokenizer.encode(token).tokens == [token]
    text = "Which of the 12 pictures shows the word Ærø?\n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_training_forward_equals_the_model(material, rng):
    """Float32 logits of the packed training forward against the model's own; tolerance is float32 rounding."""
    from tiny.model_tiny import MODEL_CLASS, fast_logits, tiny_config

    tokenizer = build_tokenizer(material.names)
    torch.manual_seed(0)
    model = MODEL_CLASS(tiny_config(tokenizer)).eval()
    samples = [data_tasks.many_sample(rng, material, "train", n, kind="shape") for n in (3, 2)]
    batch = data_batches.ConversationEncoder(tokenizer).collate(samples)
    pixels = torch.from_numpy(batch.patches).float() / 127.5 - 1
    pixels = pixels.view(-1, 3, 1, 256).expand(-1, -1, 2, -1).reshape(-1, 1536)
    slots = torch.from_numpy(batch.slots)
    input_ids = torch.zeros(batch.rows * batch.length, dtype=torch.long)
    input_ids[slots] = torch.from_numpy(batch.input_ids)
    mask = torch.zeros_like(input_ids)
    mask[slots] = 1
    input_ids, mask = input_ids.view(batch.rows, -1), mask.view(batch.rows, -1)
    with torch.no_grad():
        expected = model(
            input_ids=input_ids,
            attention_mask=mask,
            pixel_values=pixels,
            image_grid_thw=torch.tensor([[1, *batch.grid]] * len(batch.patches)),
            mm_token_type_ids=(input_ids == model.config.image_token_id).int(),
        ).logits.flatten(0, 1)[slots[torch.from_numpy(batch.predict_index)]]
        torch.testing.assert_close(fast_logits(model, batch)[0], expected, atol=2e-5, rtol=1e-4)


def test_questions_asked_apart_equal_questions_asked_alone(material, rng):
    """Float32 logits of one row with three branches against three rows of one question; tolerance is rounding."""
    from tiny.model_tiny import MODEL_CLASS, fast_logits, tiny_config

    tokenizer = build_tokenizer(material.names)
    torch.manual_seed(0)
    model = MODEL_CLASS(tiny_config(tokenizer)).eval()
    encoder = data_batches.ConversationEncoder(tokenizer)
    sample = data_tasks.many_sample(rng, material, "train", 3, kind="shape")
    alone = [data_tasks.Sample("many", sample.pictures, [turn]) for turn in sample.turns]
    together, apart = encoder.collate(alone), encoder.collate([dataclasses.replace(sample, apart=True)])
    assert len(apart.patches) == 3 and len(together.patches) == 3 * len(alone)
    np.testing.assert_array_equal(together.targets, apart.targets)
    with torch.no_grad():
        torch.testing.assert_close(fast_logits(model, apart)[0], fast_logits(model, together)[0], atol=2e-5, rtol=1e-4)


def test_notes_stand_at_the_ends_of_pictures(material, rng):
    tokenizer = build_tokenizer(material.names)
    sample = data_tasks.many_sample(rng, material, "train", 4, kind="shape")
    batch = data_batches.ConversationEncoder(tokenizer).collate([sample])
    ends = np.flatnonzero(batch.input_ids == tokenizer.token_to_id("<|vision_end|>"))
    words = [tokenizer.decode([token]) for token in batch.note_targets]
    expected = [word for number, label in enumerate(sample.labels) for word in (str(number + 1), *label.split()[1:])]
    assert [word.strip() for word in words] == expected
    np.testing.assert_array_equal(batch.note_index, np.repeat(ends, 3))


def test_questions_look_at_what_they_name(material):
    tokenizer = build_tokenizer(material.names)
    objects = scene(("circle", "red", 20, 20), ("cross", "blue", 80, 50))
    picture = np.zeros((96, 96, 3), np.uint8)
    turns = [("What colour is the cross?", "blue"), ("Is the red circle left or right of the blue cross?", "left")]
    sample = data_tasks.Sample("scene", [picture], turns, {"objects": objects}, apart=True)
    row = data_batches.ConversationEncoder(tokenizer).encode(sample)
    first = row.ids.index(tokenizer.token_to_id("<|image_pad|>"))
    looks = [(tokenizer.decode([row.ids[named]]).strip(), place - first) for named, place in row.gazes]
    # The circle stands in the first of nine picture tokens, the cross in the sixth.
    assert looks == [("cross", 5), ("circle", 0), ("cross", 5)]


def test_encoder_writes_what_the_chat_template_writes(material, rng):
    """Token ids of a training conversation against the shipped template, whose pictures are expanded by hand."""
    if not (CHECKPOINT / "tokenizer_config.json").exists():
        pytest.skip("checkpoints/tiny is absent")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    sample = data_tasks.many_sample(rng, material, "train", 3, kind="digit", turns=2)
    messages = evaluate.chat_messages(sample)
    for turn, (question, answer) in enumerate(sample.turns):
        if turn:
            messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    text = tokenizer.apply_chat_template(messages, tokenize=False).replace("<|image_pad|>", "<|image_pad|>" * 4)
    row = data_batches.ConversationEncoder(build_tokenizer(material.names)).encode(sample)
    assert tokenizer(text.rstrip("\n"))["input_ids"] == row.ids
    answers = tokenizer.decode([token for token, is_trained in zip(row.ids, row.trained, strict=True) if is_trained])
    assert answers == "".join(f"{answer}<|im_end|>" for _, answer in sample.turns)


def test_evaluation_set_covers_lengths_and_classes(material):
    lengths = Counter(sample.meta["length"] for sample in data_evaluation.evaluation_set("text", material, 60))
    assert min(lengths) <= 2 and max(lengths) >= 11
    names = {sample.meta["name"] for sample in data_evaluation.evaluation_set("emoji_twemoji", material, 60)}
    assert len(names) > 50


def test_letter_frames_follow_the_drawn_letters(material, rng):
    from tiny.auxiliary_tiny import BLANK, frame_labels

    sample = data_tasks.text_sample(rng, material, "train", (32, 256), 8)
    text = sample.turns[0][1]
    frames = frame_labels(text, sample.meta["letters"])
    assert frames.shape == (32,)
    read = [data_tasks.TEXT_ALPHABET[label] for label in frames if label != BLANK]
    assert set(read) <= set(text)
    # Letters come in the order of the text; a narrow one may fall between two frames.
    places = [int(index) for index in sample.meta["letters"] if index >= 0]
    assert places == sorted(places) and places[-1] == len(text) - 1


def test_scene_labels_name_the_patch_under_each_object():
    from tiny.auxiliary_tiny import scene_labels

    labels = scene_labels(scene(("heart", "white", 40, 8)), 64)
    shapes, colours = len(data_draw.SHAPES), len(data_draw.COLOURS)
    assert labels.shape == (16, 2)
    named = labels[labels[:, 0] != shapes]
    assert named.tolist() == [[data_draw.SHAPES.index("heart"), list(data_draw.COLOURS).index("white")]]
    # Merge order: the third patch of the first row is the first patch of the second block.
    assert labels[4, 0] == data_draw.SHAPES.index("heart")
    assert (labels[labels[:, 0] == shapes, 1] == colours).all()
