"""Conversations on a cache: pictures that come later, several at a time, rolled back, copied and reordered.

Stock raises or answers wrongly for a picture on a cache that is not empty, so the reference is stock's forward over
the whole conversation, without a cache.
"""

import copy

import pytest
import torch
from helpers import (
    IMAGE_TOKEN,
    VIDEO_TOKEN,
    assert_close,
    clone_inputs,
    concat_turns,
    forget,
    make_inputs,
    stock_forward,
    without,
)
from transformers import DynamicCache, StaticCache


FIRST = ["text:3", "image:4x6", "text:4"]
SECOND = ["text:2", "image:6x6", "text:3"]
TURNS = {
    "image_image": (FIRST, SECOND),
    "text_image": (["text:7"], SECOND),
    "image_text": (FIRST, ["text:5"]),
    "image_video": (FIRST, ["text:2", "video:2x4x4", "text:3"]),
    "video_image": (["video:2x2x4", "text:3"], SECOND),
    "three": (FIRST, ["text:4"], SECOND),
    "four": (FIRST, SECOND, ["video:2x4x2", "text:1"], ["image:2x2", "image:8x2", "text:2"]),
}
OPTIONS = {"max_new_tokens": 5, "do_sample": False, "suppress_tokens": [IMAGE_TOKEN, VIDEO_TOKEN]}
CACHES = {
    "dynamic": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config=config, max_cache_len=150),
}


def make_turns(name):
    return [make_inputs(layout, seed=seed) for seed, layout in enumerate(TURNS[name])]


def answered(conversation, new_tokens):
    """The conversation with generated tokens behind it."""
    return {
        **conversation,
        "input_ids": torch.cat([conversation["input_ids"], new_tokens], dim=1),
        "mm_token_type_ids": torch.nn.functional.pad(conversation["mm_token_type_ids"], (0, new_tokens.shape[1])),
    }


def reference_answer(pair, conversation):
    """Stock's greedy answer, without a cache."""
    mask = torch.ones_like(conversation["input_ids"])
    sequences = forget(pair.stock).generate(
        **clone_inputs(conversation), attention_mask=mask, use_cache=False, **OPTIONS
    )
    return sequences[:, mask.shape[1] :]


def with_mask(inputs, length=None):
    rows, own = inputs["input_ids"].shape
    return {**inputs, "attention_mask": torch.ones(rows, length or own, dtype=torch.long)}


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("turns", TURNS)
def test_generate_with_the_full_ids_and_all_pixels(pair, turns, cache):
    cache = CACHES[cache](pair.ours.config)
    conversation = None
    for turn in make_turns(turns):
        conversation = turn if conversation is None else concat_turns(conversation, turn)
        expected = reference_answer(pair, conversation)
        length = conversation["input_ids"].shape[1]
        sequences = pair.ours.generate(**with_mask(conversation), past_key_values=cache, **OPTIONS)
        assert sequences[:, :length].tolist() == conversation["input_ids"].tolist()
        assert sequences[:, length:].tolist() == expected.tolist()
        conversation = answered(conversation, sequences[:, length:])


@pytest.mark.parametrize("types", ["given", "derived"])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("turns", TURNS)
def test_generate_with_the_new_ids_only(pair, turns, cache, types):
    """New ids and new pixels, under a mask over all tokens; the last answer token is not in the cache yet."""
    cache = CACHES[cache](pair.ours.config)
    conversation, left_over = None, None
    for turn in make_turns(turns):
        if conversation is None:
            conversation, new = turn, turn
        else:
            conversation = concat_turns(conversation, turn)
            new = {
                **turn,
                "input_ids": torch.cat([left_over, turn["input_ids"]], dim=1),
                "mm_token_type_ids": torch.nn.functional.pad(turn["mm_token_type_ids"], (1, 0)),
            }
        if types == "derived":
            new = without(new, "mm_token_type_ids")
        expected = reference_answer(pair, conversation)
        total, own = conversation["input_ids"].shape[1], new["input_ids"].shape[1]
        assert cache.get_seq_length() == total - own
        sequences = pair.ours.generate(**with_mask(new, total), past_key_values=cache, **OPTIONS)
        assert sequences[:, own:].tolist() == expected.tolist()
        conversation = answered(conversation, sequences[:, own:])
        left_over = sequences[:, -1:]


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("turns", TURNS)
@torch.no_grad()
def test_forward_with_the_new_ids_only(pair, turns, cache, mask):
    turns = make_turns(turns)
    expected = stock_forward(pair.stock, **concat_turns(*turns)).logits
    cache, outputs, total = CACHES[cache](pair.ours.config), [], 0
    for turn in turns:
        total += turn["input_ids"].shape[1]
        given = with_mask(turn, total) if mask else turn
        outputs.append(pair.ours(**given, past_key_values=cache).logits)
    assert_close(torch.cat(outputs, dim=1), expected, what="logits of turns on a cache and of all at once")
    assert int(cache.get_seq_length()) == total


@pytest.mark.parametrize("turns", ["image_image", "text_image", "video_image"])
@torch.no_grad()
def test_forward_with_the_full_ids_and_all_pixels(pair, turns):
    """The mask, as long as the ids, tells that they are the whole conversation; the new tokens' logits come back."""
    turns = make_turns(turns)
    whole = concat_turns(*turns)
    expected = stock_forward(pair.stock, **whole).logits
    cache = DynamicCache(config=pair.ours.config)
    pair.ours(**turns[0], past_key_values=cache)
    actual = pair.ours(**with_mask(whole), past_key_values=cache).logits
    assert cache.get_seq_length() == expected.shape[1]
    new = turns[1]["input_ids"].shape[1]
    assert_close(actual[:, -new:], expected[:, -new:], what="logits of the new tokens")


@torch.no_grad()
def test_left_padded_batch_with_a_second_picture(pair):
    """Two rows of unequal length and unequal pictures in both turns."""
    first = make_inputs(FIRST, ["text:2", "image:2x4", "text:1"])
    second = make_inputs(SECOND, ["image:2x2", "text:3"], seed=1)
    mask = torch.cat([first["attention_mask"], second["attention_mask"]], dim=1)
    cache = DynamicCache(config=pair.ours.config)
    before = pair.ours(**first, past_key_values=cache).logits
    given = {**second, "attention_mask": mask}
    after = pair.ours(**given, past_key_values=cache).logits
    # Pixels of the whole batch come row by row: row 0's two pictures, then row 1's.
    grids = [first["image_grid_thw"], second["image_grid_thw"]]
    pixels = [
        turn["pixel_values"].split(grid.prod(-1).tolist()) for turn, grid in zip((first, second), grids, strict=True)
    ]
    whole = {
        "input_ids": torch.cat([first["input_ids"], second["input_ids"]], dim=1),
        "mm_token_type_ids": torch.cat([first["mm_token_type_ids"], second["mm_token_type_ids"]], dim=1),
        "attention_mask": mask,
        "image_grid_thw": torch.stack([grid[row] for row in range(2) for grid in grids]),
        "pixel_values": torch.cat([part[row] for row in range(2) for part in pixels]),
    }
    expected = stock_forward(pair.stock, **whole).logits
    keep = mask.bool()
    assert_close(torch.cat([before, after], dim=1)[keep], expected[keep], what="logits of two turns and of one")


@torch.no_grad()
def test_left_padded_text_and_then_a_picture(pair):
    """Nothing visual is known in the first turn, yet its positions must fit those of the second."""
    first, second = make_inputs(["text:9"], ["text:4"]), make_inputs(SECOND, ["text:2", "image:6x6", "text:3"], seed=1)
    mask = torch.cat([first["attention_mask"], torch.ones_like(second["input_ids"])], dim=1)
    cache = DynamicCache(config=pair.ours.config)
    pair.ours(**first, past_key_values=cache)
    actual = pair.ours(**{**second, "attention_mask": mask}, past_key_values=cache).logits
    whole = concat_turns(without(first, "attention_mask"), second)
    expected = stock_forward(pair.stock, **whole, attention_mask=mask).logits[:, 9:]
    assert_close(actual, expected, what="logits of the second turn")


@torch.no_grad()
def test_two_conversations_on_one_model(pair):
    """Turn by turn in alternation: each gives what it gives alone, as positions belong to the cache."""
    talks = [make_turns("four"), [*make_turns("video_image"), make_inputs(["text:6"], seed=9)]]
    expected = [stock_forward(pair.stock, **concat_turns(*turns)).logits for turns in talks]
    caches = [DynamicCache(config=pair.ours.config) for _ in talks]
    outputs = [[], []]
    for step in range(4):
        for index, turns in enumerate(talks):
            if step < len(turns):
                outputs[index].append(pair.ours(**turns[step], past_key_values=caches[index]).logits)
    for index in range(2):
        assert_close(torch.cat(outputs[index], dim=1), expected[index], what=f"conversation {index}")


def test_two_generations_in_alternation(pair):
    first, second = make_inputs(FIRST), make_inputs(["text:2", "image:8x8", "text:1"], seed=4)
    whole = [reference_answer(pair, inputs) for inputs in (first, second)]
    caches = [DynamicCache(config=pair.ours.config) for _ in range(2)]
    known = [with_mask(first), with_mask(second)]
    for step in range(5):
        for index in range(2):
            inputs = known[index]
            grown = pair.ours.generate(**inputs, past_key_values=caches[index], **{**OPTIONS, "max_new_tokens": 1})
            assert grown[0, -1] == whole[index][0, step]
            known[index] = with_mask(answered(inputs, grown[:, -1:]))


@pytest.mark.parametrize("cut", ["after_picture", "inside_picture", "before_picture"])
@torch.no_grad()
def test_crop(pair, cut):
    """Part of a conversation is taken back and another goes on from there."""
    inputs = make_inputs(["text:3", "image:4x6", "text:6"])
    keep = {"after_picture": 12, "inside_picture": 7, "before_picture": 3}[cut]
    length = inputs["input_ids"].shape[1]
    cache = DynamicCache(config=pair.ours.config)
    pair.ours(**inputs, past_key_values=cache)
    cache.crop(keep - length)
    assert cache.get_seq_length() == keep
    if cut == "inside_picture":
        # The rest of the picture's tokens again, as plain positions by hand.
        rest = inputs["input_ids"][:, keep:]
        encoded = pair.stock.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"], return_dict=True)
        placeholders = int((rest == IMAGE_TOKEN).sum())
        encoded.pooler_output = [torch.cat(encoded.pooler_output)[-placeholders:]]
        encoded.deepstack_features = [[torch.cat(level)[-placeholders:]] for level in encoded.deepstack_features]
        positions, _ = pair.stock.model.get_rope_index(**inputs)
        actual = pair.ours(
            input_ids=rest,
            position_ids=positions[..., keep:],
            past_key_values=cache,
            mm_encoder_outputs={"image": encoded},
        ).logits
        expected = stock_forward(pair.stock, **inputs).logits[:, keep:]
        assert_close(actual, expected, what="logits after a cut")
        return
    other = make_inputs(["text:5"], seed=8)
    kept = {"input_ids": inputs["input_ids"][:, :keep], "mm_token_type_ids": inputs["mm_token_type_ids"][:, :keep]}
    if cut == "after_picture":
        kept |= {name: inputs[name] for name in ("pixel_values", "image_grid_thw")}
    whole = concat_turns(kept, other)
    expected = stock_forward(pair.stock, **whole).logits[:, keep:]
    assert_close(pair.ours(**other, past_key_values=cache).logits, expected, what="logits after a cut")
    picture = make_inputs(SECOND, seed=5)
    expected = stock_forward(pair.stock, **concat_turns(whole, picture)).logits[:, -picture["input_ids"].shape[1] :]
    assert_close(pair.ours(**picture, past_key_values=cache).logits, expected, what="logits of a picture after a cut")


@pytest.mark.parametrize("name", CACHES)
@torch.no_grad()
def test_reset(pair, name):
    cache = CACHES[name](pair.ours.config)
    pair.ours(**make_inputs(FIRST), past_key_values=cache)
    cache.reset()
    if name == "dynamic" and cache.get_seq_length():
        pytest.fail("a reset dynamic cache still counts tokens")
    for other in (make_inputs(["text:9"], seed=3), make_inputs(SECOND, seed=2)):
        expected = stock_forward(pair.stock, **other).logits
        assert_close(pair.ours(**other, past_key_values=cache).logits, expected, what="logits after a reset")
        more = make_inputs(["text:2"], seed=7)
        expected = stock_forward(pair.stock, **concat_turns(other, more)).logits[:, -2:]
        assert_close(pair.ours(**more, past_key_values=cache).logits, expected, what="next logits after a reset")
        cache.reset()


@pytest.mark.parametrize("name", CACHES)
@torch.no_grad()
def test_copies_go_their_own_ways(pair, name):
    first = make_inputs(FIRST)
    cache = CACHES[name](pair.ours.config)
    pair.ours(**first, past_key_values=cache)
    fork = copy.deepcopy(cache)
    ways = [(cache, make_inputs(SECOND, seed=2)), (fork, make_inputs(["text:6"], seed=3))]
    tail = make_inputs(["text:2"], seed=4)
    for own, turn in ways:
        pair.ours(**turn, past_key_values=own)
    for own, turn in ways:
        expected = stock_forward(pair.stock, **concat_turns(first, turn, tail)).logits[:, -2:]
        assert_close(pair.ours(**tail, past_key_values=own).logits, expected, what="logits on a copied cache")


def batch_of_two(pair):
    """Rows whose pictures, and so whose position deltas, differ; the cache after them, and stock's logits of more."""
    first = make_inputs(FIRST, ["text:1", "image:2x12", "text:6"], mask=True)
    assert first["attention_mask"].all()
    cache = DynamicCache(config=pair.ours.config)
    pair.ours(**first, past_key_values=cache)
    tail = make_inputs(["text:3"], ["text:3"], seed=6)
    return first, cache, tail


def follow(pair, first, tail, rows):
    """Stock's logits of `tail` behind the rows of `first` given by index."""
    grids = first["image_grid_thw"]
    pixels = first["pixel_values"].split(grids.prod(-1).tolist())
    whole = {
        "input_ids": torch.cat([first["input_ids"][rows], tail], dim=1),
        "mm_token_type_ids": torch.nn.functional.pad(first["mm_token_type_ids"][rows], (0, tail.shape[1])),
        "image_grid_thw": grids[rows],
        "pixel_values": torch.cat([pixels[row] for row in rows]),
    }
    return stock_forward(pair.stock, **whole).logits[:, -tail.shape[1] :]


@pytest.mark.parametrize("rows", [[1, 0], [1, 1], [0, 0]])
@torch.no_grad()
def test_reorder(pair, rows):
    first, cache, tail = batch_of_two(pair)
    cache.reorder_cache(torch.tensor(rows))
    expected = follow(pair, first, tail["input_ids"], rows)
    actual = pair.ours(input_ids=tail["input_ids"], past_key_values=cache).logits
    assert_close(actual, expected, what="logits on a reordered cache")


@torch.no_grad()
def test_repeat_and_select(pair):
    first, cache, tail = batch_of_two(pair)
    cache.batch_repeat_interleave(2)
    ids = tail["input_ids"].repeat_interleave(2, 0)
    expected = follow(pair, first, ids, [0, 0, 1, 1])
    repeated = copy.deepcopy(cache)
    assert_close(pair.ours(input_ids=ids, past_key_values=repeated).logits, expected, what="logits of repeated rows")
    cache.batch_select_indices(torch.tensor([2, 0]))
    expected = follow(pair, first, tail["input_ids"], [1, 0])
    actual = pair.ours(input_ids=tail["input_ids"], past_key_values=cache).logits
    assert_close(actual, expected, what="logits of selected rows")


@torch.no_grad()
def test_a_prefix_cache_serves_many_rows(pair):
    """One picture is prefilled once, its cache repeated, and two questions are asked about it."""
    prefix = make_inputs(FIRST)
    cache = DynamicCache(config=pair.ours.config)
    pair.ours(**prefix, past_key_values=cache)
    cache.batch_repeat_interleave(2)
    tail = make_inputs(["text:4"], ["text:4"], seed=6)["input_ids"]
    actual = pair.ours(input_ids=tail, past_key_values=cache).logits
    for row in range(2):
        whole = concat_turns(prefix, {"input_ids": tail[row : row + 1], "mm_token_type_ids": torch.zeros(1, 4).int()})
        expected = stock_forward(pair.stock, **whole).logits[:, -4:]
        assert_close(actual[row : row + 1], expected, what=f"logits of question {row}")


@torch.no_grad()
def test_one_token_at_a_time(pair):
    """A decoding loop without masks or positions, over two turns with pictures."""
    first, second = make_inputs(FIRST), make_inputs(SECOND, seed=1)
    tokens = make_inputs(["text:6"], seed=2)
    cache = DynamicCache(config=pair.ours.config)
    outputs = [pair.ours(**first, past_key_values=cache).logits]
    for index in range(6):
        outputs.append(pair.ours(input_ids=tokens["input_ids"][:, index : index + 1], past_key_values=cache).logits)
    outputs.append(pair.ours(**second, past_key_values=cache).logits)
    expected = stock_forward(pair.stock, **concat_turns(first, tokens, second)).logits
    assert_close(torch.cat(outputs, dim=1), expected, what="logits")
