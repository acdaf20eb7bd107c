"""M-RoPE and the decoder against their plain definitions, and what padding and order may not change."""

import random

import pytest
import torch
from helpers import (
    IMAGE_TOKEN,
    VIDEO_TOKEN,
    assert_close,
    make_inputs,
    make_pair,
    slow_decoder,
    slow_mrope_index,
    slow_vision_tower,
    stock_class,
    valid_positions,
)
from transformers.models.qwen3_vl import modeling_qwen3_vl as stock_modeling

import qwen3_vl


def random_layout(rng):
    parts = []
    for _ in range(rng.randint(1, 5)):
        what = rng.choice(["text", "text", "image", "video"])
        if what == "text":
            parts.append(f"text:{rng.randint(1, 7)}")
        else:
            grid = f"{2 * rng.randint(1, 4)}x{2 * rng.randint(1, 4)}"
            parts.append(f"image:{grid}" if what == "image" else f"video:{rng.randint(1, 3)}x{grid}")
    return parts


def strip(state, prefix):
    return {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}


@pytest.mark.parametrize("seed", range(25))
def test_mrope_index(seed):
    rng = random.Random(seed)
    layouts = [random_layout(rng) for _ in range(rng.randint(1, 4))]
    inputs = make_inputs(*layouts, padding=rng.choice(["left", "right"]), seed=seed)
    model = make_pair("dense").ours.model
    expected, deltas = slow_mrope_index(inputs)
    wanted = ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw", "attention_mask")
    given = {name: inputs[name] for name in wanted if name in inputs}
    actual, actual_deltas = model.get_rope_index(**given)
    assert torch.equal(actual, expected)
    assert torch.equal(actual_deltas.long(), deltas)


def test_mrope_index_by_hand():
    """Two text tokens, a 4 x 6 picture (2 x 3 merged), one text token; then the same as one frame of a video."""
    inputs = make_inputs(["text:2", "image:4x6", "text:1"])
    model = make_pair("dense").ours.model
    positions, delta = model.get_rope_index(
        inputs["input_ids"], mm_token_type_ids=inputs["mm_token_type_ids"], image_grid_thw=inputs["image_grid_thw"]
    )
    assert positions[:, 0].tolist() == [
        [0, 1, 2, 3, 3, 3, 3, 3, 3, 6, 7],
        [0, 1, 2, 3, 3, 3, 4, 4, 4, 6, 7],
        [0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7],
    ]
    assert delta.tolist() == [[-3]]


@pytest.mark.parametrize("seed", range(5))
def test_mrope_index_derives_token_types(seed):
    rng = random.Random(100 + seed)
    inputs = make_inputs(random_layout(rng), random_layout(rng), seed=seed)
    expected, _ = slow_mrope_index(inputs)
    given = {name: inputs[name] for name in ("image_grid_thw", "video_grid_thw", "attention_mask") if name in inputs}
    actual, _ = make_pair("dense").ours.model.get_rope_index(inputs["input_ids"], **given)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("layout", [["text:12"], ["text:4", "image:4x6", "text:5"]], ids=["text", "image"])
@torch.no_grad()
def test_decoder_against_the_plain_definition(pair, layout):
    inputs = make_inputs(layout)
    state = pair.ours.state_dict()
    embeds = state["model.language_model.embed_tokens.weight"][inputs["input_ids"][0]].double()
    visual_mask, deep = inputs["input_ids"][0] == IMAGE_TOKEN, ()
    if visual_mask.any():
        _, merged, deep = slow_vision_tower(
            strip(state, "model.visual."),
            pair.config_dict["vision_config"],
            inputs["pixel_values"],
            inputs["image_grid_thw"],
        )
        embeds[visual_mask] = merged
    positions, _ = slow_mrope_index(inputs)
    hidden = slow_decoder(
        strip(state, "model.language_model."),
        pair.config_dict["text_config"],
        embeds,
        positions[:, 0],
        visual_mask,
        deep,
    )
    logits = hidden @ state["lm_head.weight"].double().T
    # The definition runs in float64, so this holds the float32 error of the whole model.
    assert_close(pair.ours(**inputs).logits[0], logits, 5e-5, "logits and their definition")


@pytest.mark.parametrize("padding", ["left", "right"])
@torch.no_grad()
def test_padding_changes_nothing(pair, padding):
    layouts = [["text:3", "image:4x6", "text:4"], ["text:5"], ["text:2", "video:2x4x4", "text:16", "image:2x2"]]
    inputs = make_inputs(*layouts, padding=padding)
    batch = pair.ours(**inputs).logits
    used = {IMAGE_TOKEN: 0, VIDEO_TOKEN: 0}
    for row in range(len(layouts)):
        valid = valid_positions(inputs)[row]
        single = {
            "input_ids": inputs["input_ids"][row][valid][None],
            "mm_token_type_ids": inputs["mm_token_type_ids"][row][valid][None],
        }
        for token, pixels, grid in (
            (IMAGE_TOKEN, "pixel_values", "image_grid_thw"),
            (VIDEO_TOKEN, "pixel_values_videos", "video_grid_thw"),
        ):
            tokens = int((single["input_ids"] == token).sum())
            if tokens:
                sizes = inputs[grid].prod(-1)
                start = used[token]
                single[grid] = inputs[grid][start : start + 1]
                single[pixels] = inputs[pixels].split(sizes.tolist())[start]
                assert int(sizes[start]) // 4 == tokens
                used[token] += 1
        alone = pair.ours(**single).logits[0]
        assert_close(batch[row][valid], alone, what=f"row {row} in a {padding}-padded batch and alone")


@torch.no_grad()
def test_values_under_padding_change_nothing(pair):
    inputs = make_inputs(["text:3", "image:4x6", "text:4"], ["text:5"])
    keep = valid_positions(inputs)
    before = pair.ours(**inputs).logits[keep]
    inputs["input_ids"][~keep] = 77
    assert_close(pair.ours(**inputs).logits[keep], before, what="logits beside other padding ids")


@torch.no_grad()
def test_later_tokens_change_nothing(pair):
    inputs = make_inputs(["text:3", "image:4x6", "text:8"])
    before = pair.ours(**inputs).logits
    inputs["input_ids"][:, -4:] = 77
    after = pair.ours(**inputs).logits
    assert_close(after[:, :-4], before[:, :-4], what="logits before a change")
    assert (after[:, -4:] - before[:, -4:]).abs().max() > 1e-2


@torch.no_grad()
def test_only_distances_count(pair):
    """Rotary positions are relative: all of them moved by 50 give the same logits."""
    inputs = make_inputs(["text:3", "image:4x6", "text:4"])
    positions, _ = slow_mrope_index(inputs)
    near = pair.ours(**inputs, position_ids=positions).logits
    far = pair.ours(**inputs, position_ids=positions + 50).logits
    assert_close(far, near, 1e-4, "logits at moved positions")


@torch.no_grad()
def test_deepstack_counts_and_goes_to_the_first_layers(kind):
    """Features that are all zero equal no DeepStack; otherwise they change the layers from the first on."""
    pair = make_pair(kind)
    without = make_pair(kind, vision={"deepstack_visual_indexes": []}).ours
    inputs = make_inputs(["text:3", "image:4x6", "text:4"])
    rich = pair.ours(**inputs, output_hidden_states=True)
    for merger in pair.ours.model.visual.deepstack_merger_list:
        merger.linear_fc2.weight.zero_()
        merger.linear_fc2.bias.zero_()
    empty = pair.ours(**inputs, output_hidden_states=True)
    without.load_state_dict(
        {name: value for name, value in pair.ours.state_dict().items() if "deepstack" not in name}, strict=True
    )
    plain = without(**inputs, output_hidden_states=True)
    for zeroed, none in zip(empty.hidden_states, plain.hidden_states, strict=True):
        assert_close(zeroed, none, 1e-6, "zero DeepStack features and none")
    assert torch.equal(rich.hidden_states[0], empty.hidden_states[0])
    assert (rich.logits - empty.logits).abs().max() > 1e-2


def test_rotary_building_blocks():
    """The names of the API reference, against stock's."""
    pair = make_pair("dense")
    ours = qwen3_vl.Qwen3VLRotaryEmbedding(pair.ours.config.text_config)
    stock = stock_modeling.Qwen3VLTextRotaryEmbedding(pair.stock.config.text_config)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 7, 48, generator=generator)
    positions = torch.randint(0, 300, (3, 2, 7), generator=generator)
    actual, expected = ours(x, positions), stock(x, positions)
    for mine, theirs in zip(actual, expected, strict=True):
        assert_close(mine, theirs, 1e-6, "cosines and sines")
    q, k = torch.randn(2, 4, 7, 16, generator=generator), torch.randn(2, 2, 7, 16, generator=generator)
    for mine, theirs in zip(
        qwen3_vl.apply_rotary_pos_emb(q, k, *expected),
        stock_modeling.apply_rotary_pos_emb(q, k, *expected),
        strict=True,
    ):
        assert_close(mine, theirs, 1e-6, "rotated states")
    assert torch.equal(qwen3_vl.repeat_kv(k, 2), stock_modeling.repeat_kv(k, 2))
    assert torch.equal(qwen3_vl.repeat_kv(k, 1), k)


@torch.no_grad()
def test_text_model_alone(kind):
    pair = make_pair(kind)
    decoder = type(pair.ours.model.language_model)(pair.ours.config.text_config).eval()
    decoder.load_state_dict(strip(pair.stock.state_dict(), "model.language_model."), strict=True)
    stock = stock_class(kind, "TextModel")(pair.stock.config.text_config).eval()
    stock.load_state_dict(strip(pair.stock.state_dict(), "model.language_model."), strict=True)
    inputs = make_inputs(["text:9"], ["text:4"])
    keep = valid_positions(inputs)
    given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    expected, actual = stock(**given), decoder(**given)
    assert_close(actual.last_hidden_state[keep], expected.last_hidden_state[keep], what="last hidden state")
    visual = torch.zeros_like(keep)
    visual[0, 2:6] = True
    features = [torch.randn(4, 48, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    deep = {"visual_pos_masks": visual, "deepstack_visual_embeds": features}
    with_deep = stock(**given, **deep).last_hidden_state
    assert (with_deep - expected.last_hidden_state)[keep].abs().max() > 1e-2
    assert_close(decoder(**given, **deep).last_hidden_state[keep], with_deep[keep], what="states with DeepStack")
