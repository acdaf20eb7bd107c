"""Forward and backward against the stock classes with the same weights, over every form of input. float32."""

import pytest
import torch
from helpers import (
    EOS_TOKEN,
    IMAGE_TOKEN,
    VISION_START,
    assert_close,
    clone_inputs,
    forget,
    make_inputs,
    make_pair,
    stock_forward,
    valid_positions,
    without,
)
from transformers import DynamicCache


FORMS = {
    "text": ([["text:9"]], {}),
    "one_token": ([["text:1"]], {}),
    "text_batch": ([["text:5"], ["text:5"]], {}),
    "text_left_padded": ([["text:9"], ["text:4"]], {}),
    "text_right_padded": ([["text:9"], ["text:4"]], {"padding": "right"}),
    "image": ([["text:4", "image:4x6", "text:5"]], {}),
    "image_with_mask": ([["text:4", "image:4x6", "text:5"]], {"mask": True}),
    "image_first_and_last": ([["image:6x4"]], {}),
    "smallest_image": ([["text:2", "image:2x2", "text:2"]], {}),
    "image_larger_than_table": ([["text:2", "image:10x14", "text:2"]], {}),
    "several_images": ([["text:2", "image:4x4", "text:1", "image:2x8", "image:6x2", "text:3"]], {}),
    "video": ([["text:3", "video:3x4x4", "text:4"]], {}),
    "two_videos": ([["video:2x2x4", "text:2", "video:3x4x2", "text:2"]], {}),
    "image_then_video": ([["text:2", "image:4x6", "text:1", "video:2x4x4", "text:3"]], {}),
    "video_then_image": ([["text:2", "video:2x4x4", "text:1", "image:4x6", "text:3"]], {}),
    "batch_left_padded": ([["text:2", "image:4x6", "text:4"], ["text:6"], ["text:1", "video:2x4x4", "text:9"]], {}),
    "batch_right_padded": (
        [["text:2", "image:4x6", "text:4"], ["text:6"], ["text:1", "video:2x4x4", "image:2x2", "text:9"]],
        {"padding": "right"},
    ),
    "batch_of_images": ([["text:2", "image:4x6", "text:4"], ["text:1", "image:6x4", "text:5"]], {}),
}
MIXED = FORMS["batch_left_padded"]


def form_inputs(name):
    layouts, options = FORMS[name]
    return make_inputs(*layouts, **options)


def mixed_inputs(**options):
    return make_inputs(*MIXED[0], **options)


def labels_of(inputs):
    """Every token is a label but padding, placeholders, and the first three of each row."""
    labels = inputs["input_ids"].clone()
    labels[~valid_positions(inputs)] = -100
    labels[inputs["mm_token_type_ids"] > 0] = -100
    labels[:, :3] = -100
    return labels


def compare_outputs(actual, expected, keep, tolerance=1e-5):
    assert_close(actual.logits[keep], expected.logits[keep], tolerance, "logits")
    assert len(actual.hidden_states) == len(expected.hidden_states)
    for index, (ours, stock) in enumerate(zip(actual.hidden_states, expected.hidden_states, strict=True)):
        assert_close(ours[keep], stock[keep], tolerance, f"hidden states {index}")


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_logits_and_hidden_states(pair, form):
    inputs = form_inputs(form)
    expected = stock_forward(pair.stock, **inputs, output_hidden_states=True)
    actual = pair.ours(**inputs, output_hidden_states=True)
    compare_outputs(actual, expected, valid_positions(inputs))


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_token_types_are_derived_from_the_ids(pair, form):
    inputs = form_inputs(form)
    expected = stock_forward(pair.stock, **inputs)
    actual = pair.ours(**without(inputs, "mm_token_type_ids"))
    keep = valid_positions(inputs)
    assert_close(actual.logits[keep], expected.logits[keep], what="logits")


@torch.no_grad()
def test_inputs_are_left_as_they_were(pair):
    inputs = mixed_inputs()
    before = clone_inputs(inputs)
    pair.ours(**inputs)
    for name, value in before.items():
        assert torch.equal(inputs[name], value), f"{name} was changed in place"


@torch.no_grad()
def test_base_model(pair):
    inputs = mixed_inputs()
    expected = forget(pair.stock).model(**inputs)
    actual = pair.ours.model(**inputs)
    keep = valid_positions(inputs)
    assert_close(actual.last_hidden_state[keep], expected.last_hidden_state[keep], what="last hidden state")


@torch.no_grad()
def test_text_embeddings_as_input(pair):
    inputs = make_inputs(["text:9"], ["text:4"])
    embeds = pair.stock.get_input_embeddings()(inputs["input_ids"])
    given = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}
    expected = stock_forward(pair.stock, **given)
    keep = valid_positions(inputs)
    assert_close(pair.ours(**given).logits[keep], expected.logits[keep], what="logits")


@pytest.mark.parametrize("form", ["image", "image_then_video", "batch_left_padded"])
@torch.no_grad()
def test_embeddings_with_pixels_and_given_positions(pair, form):
    inputs = form_inputs(form)
    positions, _ = forget(pair.stock).model.get_rope_index(**inputs)
    given = {
        **without(inputs, "input_ids", "mm_token_type_ids"),
        "inputs_embeds": pair.stock.get_input_embeddings()(inputs["input_ids"]),
        "position_ids": positions,
    }
    keep = valid_positions(inputs)
    expected = stock_forward(pair.stock, **given)
    assert_close(pair.ours(**given).logits[keep], expected.logits[keep], what="logits")
    by_ids = stock_forward(pair.stock, **inputs)
    assert_close(expected.logits[keep], by_ids.logits[keep], what="stock's logits by ids and by embeddings")


@pytest.mark.parametrize("rows", [None, 3, 4])
@torch.no_grad()
def test_given_positions(pair, rows):
    inputs = make_inputs(["text:3", "image:4x6", "text:4"])
    generator = torch.Generator().manual_seed(3)
    length = inputs["input_ids"].shape[1]
    shape = (1, length) if rows is None else (rows, 1, length)
    positions = torch.randint(0, 40, shape, generator=generator)
    if rows == 4:
        positions[0] = torch.arange(length)
    expected = stock_forward(pair.stock, **inputs, position_ids=positions)
    default = stock_forward(pair.stock, **inputs)
    assert (expected.logits - default.logits).abs().max() > 1e-2, "the given positions make no difference"
    assert_close(pair.ours(**inputs, position_ids=positions).logits, expected.logits, what="logits")


def packed(*layouts):
    """Several rows as one, with four-row position ids: text positions that begin anew, then the three of M-RoPE."""
    singles = [make_inputs(layout, seed=seed) for seed, layout in enumerate(layouts)]
    joined, positions = {}, []
    for single in singles:
        for key, value in single.items():
            joined.setdefault(key, []).append(value)
        positions.append(single["input_ids"])
    joined = {
        key: torch.cat(values, dim=1 if key in ("input_ids", "mm_token_type_ids") else 0)
        for key, values in joined.items()
    }
    return singles, joined


@pytest.mark.parametrize(
    "layouts",
    [
        [["text:5"], ["text:3"], ["text:7"]],
        [["text:2", "image:4x6", "text:3"], ["text:4"], ["image:2x2", "text:2", "video:2x2x4", "text:2"]],
    ],
    ids=["text", "mixed"],
)
@torch.no_grad()
def test_packed_rows(pair, layouts):
    singles, joined = packed(*layouts)
    positions = []
    for single in singles:
        mrope, _ = pair.stock.model.get_rope_index(**single)
        text = torch.arange(mrope.shape[-1]).view(1, 1, -1)
        positions.append(torch.cat([text, mrope]))
    given = {**without(joined, "mm_token_type_ids"), "position_ids": torch.cat(positions, dim=-1)}
    # Stock looks for packed rows in the positions only where no cache is made.
    expected = stock_forward(pair.stock, **given, use_cache=False)
    actual = pair.ours(**given, use_cache=False)
    assert_close(actual.logits, expected.logits, what="logits")
    apart = torch.cat([stock_forward(pair.stock, **single).logits for single in singles], dim=1)
    assert_close(actual.logits, apart, what="logits of packed rows and of each row alone")


@pytest.mark.parametrize("keep", [1, 4, "tensor"])
@torch.no_grad()
def test_logits_to_keep(pair, keep):
    inputs = mixed_inputs()
    keep = torch.tensor([2, 5, 11]) if keep == "tensor" else keep
    expected = stock_forward(pair.stock, **inputs, logits_to_keep=keep)
    actual = pair.ours(**inputs, logits_to_keep=keep)
    assert actual.logits.shape[1] == (3 if isinstance(keep, torch.Tensor) else keep)
    rows = valid_positions(inputs)
    rows = rows[:, keep] if isinstance(keep, torch.Tensor) else rows[:, -keep:]
    assert_close(actual.logits[rows], expected.logits[rows], what="logits")


@pytest.mark.parametrize("padding", ["left", "right"])
@torch.no_grad()
def test_loss(pair, padding):
    inputs = mixed_inputs(padding=padding)
    labels = labels_of(inputs)
    expected = stock_forward(pair.stock, **inputs, labels=labels)
    actual = pair.ours(**inputs, labels=labels)
    assert_close(actual.loss, expected.loss, what="loss")
    keep = valid_positions(inputs)
    shifted = labels[:, 1:]
    by_hand = torch.nn.functional.cross_entropy(
        expected.logits[:, :-1][shifted != -100].double(), shifted[shifted != -100]
    )
    assert_close(actual.loss, by_hand, 1e-4, "loss and its definition")
    assert_close(actual.logits[keep], expected.logits[keep], what="logits beside a loss")


@torch.no_grad()
def test_loss_over_a_given_number_of_items(pair):
    inputs = mixed_inputs()
    labels = labels_of(inputs)
    expected = stock_forward(pair.stock, **inputs, labels=labels, num_items_in_batch=torch.tensor(50))
    plain = stock_forward(pair.stock, **inputs, labels=labels)
    assert (expected.loss - plain.loss).abs() > 1e-3
    actual = pair.ours(**inputs, labels=labels, num_items_in_batch=torch.tensor(50))
    assert_close(actual.loss, expected.loss, what="loss")


@pytest.mark.parametrize("form", ["text", "image", "batch_left_padded", "batch_right_padded"])
@torch.no_grad()
def test_attention_weights(kind, form):
    pair = make_pair(kind, attn="eager")
    inputs = form_inputs(form)
    expected = stock_forward(pair.stock, **inputs, output_attentions=True)
    actual = pair.ours(**inputs, output_attentions=True)
    keep = valid_positions(inputs)
    assert len(actual.attentions) == len(expected.attentions) == 3
    for layer, (ours, stock) in enumerate(zip(actual.attentions, expected.attentions, strict=True)):
        ours, stock = ours.transpose(1, 2)[keep], stock.transpose(1, 2)[keep]
        assert_close(ours, stock, what=f"attention of layer {layer}")


@pytest.mark.parametrize("form", ["image_then_video", "batch_left_padded"])
def test_gradients(pair, form):
    inputs = form_inputs(form)
    labels = labels_of(inputs)
    forget(pair.stock).train()(**inputs, labels=labels).loss.backward()
    pair.ours.train()(**inputs, labels=labels).loss.backward()
    expected = {name: parameter.grad for name, parameter in pair.stock.named_parameters()}
    for name, parameter in pair.ours.named_parameters():
        assert (parameter.grad is None) == (expected[name] is None), f"only one model has a gradient of {name}"
        if parameter.grad is not None:
            assert_close(parameter.grad, expected[name], 1e-4, f"gradients of {name}")
    assert expected["model.visual.patch_embed.proj.weight"].abs().max() > 1e-3, "no gradient reached the pixels' end"


@torch.no_grad()
def test_pixel_gradients(pair):
    inputs = form_inputs("image_then_video")
    grads = []
    for model in (forget(pair.stock), pair.ours):
        with torch.enable_grad():
            pixels = inputs["pixel_values"].clone().requires_grad_()
            model(**{**inputs, "pixel_values": pixels}).logits.pow(2).mean().backward()
        grads.append(pixels.grad)
    assert grads[0].abs().max() > 1e-5
    assert_close(grads[1], grads[0], 1e-4, "gradients of the pixels")


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("form", ["text_right_padded", "image", "batch_left_padded"])
@torch.no_grad()
def test_attention_names(kind, form, attn):
    pair = make_pair(kind)
    inputs = form_inputs(form)
    keep = valid_positions(inputs)
    expected = stock_forward(pair.stock, **inputs)
    pair.ours.set_attn_implementation(attn)
    assert pair.ours.model.language_model.config._attn_implementation == attn
    assert pair.ours.model.visual.config._attn_implementation == attn
    assert_close(pair.ours(**inputs).logits[keep], expected.logits[keep], what=f"logits of {attn} and stock's sdpa")


@pytest.mark.parametrize("attn", [{"text_config": "eager", "vision_config": "sdpa"}, {"text_config": "sdpa"}])
@torch.no_grad()
def test_attention_per_part(kind, attn):
    pair = make_pair(kind, attn=attn)
    stock_names = [
        getattr(pair.stock.model, part).config._attn_implementation for part in ("language_model", "visual")
    ]
    our_names = [getattr(pair.ours.model, part).config._attn_implementation for part in ("language_model", "visual")]
    assert our_names == stock_names
    inputs = form_inputs("image")
    assert_close(pair.ours(**inputs).logits, stock_forward(pair.stock, **inputs).logits, what="logits")


def test_flash_attention_is_refused_as_in_stock(pair):
    with pytest.raises(ImportError) as stock_error:
        pair.stock.set_attn_implementation("flash_attention_2")
    with pytest.raises(ImportError) as our_error:
        pair.ours.set_attn_implementation("flash_attention_2")
    assert str(our_error.value) == str(stock_error.value)


@torch.no_grad()
def test_output_as_tuple(pair):
    inputs = form_inputs("image")
    expected = stock_forward(pair.stock, **inputs, return_dict=False)
    actual = pair.ours(**inputs, return_dict=False)
    assert isinstance(actual, tuple)
    assert len(actual) == len(expected)
    assert_close(actual[0], expected[0], what="logits")


@torch.no_grad()
def test_output_fields(pair):
    inputs = form_inputs("image")
    for options in ({}, {"use_cache": False}, {"output_hidden_states": True}, {"labels": inputs["input_ids"]}):
        expected = stock_forward(pair.stock, **inputs, **options)
        actual = pair.ours(**inputs, **options)
        assert list(actual.keys())[: len(expected.keys())] == list(expected.keys())
        assert set(actual.keys()) - set(expected.keys()) <= {"rope_deltas"}


@torch.no_grad()
def test_cache_contents(pair):
    inputs = mixed_inputs()
    expected = stock_forward(pair.stock, **inputs).past_key_values
    actual = pair.ours(**inputs).past_key_values
    assert isinstance(actual, DynamicCache)
    assert actual.get_seq_length() == inputs["input_ids"].shape[1]
    keep = valid_positions(inputs)
    for ours, stock in zip(actual.layers, expected.layers, strict=True):
        for name in ("keys", "values"):
            first, second = getattr(ours, name).transpose(1, 2)[keep], getattr(stock, name).transpose(1, 2)[keep]
            assert_close(first, second, what=name)


@pytest.mark.parametrize("form", ["text", "image", "batch_left_padded"])
@pytest.mark.parametrize("step", [1, 3])
@torch.no_grad()
def test_decoding_by_hand(pair, form, step):
    """Prefill, then more tokens on the cache: as stock's steps, and as stock's forward over all of it at once."""
    inputs = form_inputs(form)
    rows, length = inputs["input_ids"].shape
    mask = valid_positions(inputs).long()
    more = torch.randint(10, 140, (rows, 6), generator=torch.Generator().manual_seed(5))
    cache = pair.ours(**inputs).past_key_values
    outputs = []
    for start in range(0, 6, step):
        known = torch.cat([mask, mask.new_ones(rows, start + step)], dim=1)
        ids = more[:, start : start + step]
        outputs.append(pair.ours(input_ids=ids, attention_mask=known, past_key_values=cache).logits)
    whole = {
        **inputs,
        "input_ids": torch.cat([inputs["input_ids"], more], dim=1),
        "mm_token_type_ids": torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, 6)),
        "attention_mask": torch.nn.functional.pad(mask, (0, 6), value=1),
    }
    expected = stock_forward(pair.stock, **whole).logits[:, length:]
    assert_close(torch.cat(outputs, dim=1), expected, what="logits of cached steps and of one forward")


@torch.no_grad()
def test_image_and_video_features(pair):
    inputs = form_inputs("image_then_video")
    for features, pixels, grid in (
        ("get_image_features", "pixel_values", "image_grid_thw"),
        ("get_video_features", "pixel_values_videos", "video_grid_thw"),
    ):
        expected = getattr(pair.stock, features)(inputs[pixels], inputs[grid], return_dict=True)
        actual = getattr(pair.ours, features)(inputs[pixels], inputs[grid], return_dict=True)
        assert_close(actual.last_hidden_state, expected.last_hidden_state, what="last hidden state")
        assert [len(part) for part in actual.pooler_output] == [len(part) for part in expected.pooler_output]
        assert_close(torch.cat(actual.pooler_output), torch.cat(expected.pooler_output), what="features")
        assert len(actual.deepstack_features) == len(expected.deepstack_features) == 2
        for ours, stock in zip(actual.deepstack_features, expected.deepstack_features, strict=True):
            assert_close(torch.cat(ours), torch.cat(stock), what="DeepStack features")


@torch.no_grad()
def test_encoder_outputs_instead_of_pixels(pair):
    inputs = form_inputs("image_then_video")
    expected = stock_forward(pair.stock, **inputs)
    encoded = {
        "image": pair.ours.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"], return_dict=True),
        "video": pair.ours.get_video_features(
            inputs["pixel_values_videos"], inputs["video_grid_thw"], return_dict=True
        ),
    }
    given = {**without(inputs, "pixel_values", "pixel_values_videos"), "mm_encoder_outputs": encoded}
    assert_close(pair.ours(**given).logits, expected.logits, what="logits")


@torch.no_grad()
def test_models_forget_a_request(pair):
    """A text request after a picture, on the same model: what it gives alone (stock keeps a stale delta)."""
    picture = form_inputs("image_larger_than_table")
    text = make_inputs(["text:9"], seed=4)
    embeds = pair.stock.get_input_embeddings()(text["input_ids"])
    expected = stock_forward(pair.stock, **text).logits
    for given in (text, without(text, "mm_token_type_ids"), {"inputs_embeds": embeds}):
        pair.ours(**picture)
        assert_close(pair.ours(**given).logits, expected, what="logits after a picture and alone")


@torch.no_grad()
def test_placeholders_without_pixels_are_text(pair):
    """Stock takes placeholder ids without pixels as plain tokens, and so must a decoder that generated one."""
    inputs = {"input_ids": torch.tensor([[20, VISION_START, IMAGE_TOKEN, 30, EOS_TOKEN]])}
    assert_close(pair.ours(**inputs).logits, stock_forward(pair.stock, **inputs).logits, what="logits")


@pytest.mark.parametrize("kind", ["dense", "moe"])
@torch.no_grad()
def test_other_shapes(kind):
    """One head a group, no DeepStack, attention biases, tied embeddings, sections that leave time a tail."""
    pair = make_pair(
        kind,
        text={
            "num_key_value_heads": 4,
            "attention_bias": True,
            "head_dim": 32,
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": [12, 2, 2], "rope_type": "default"},
            "tie_word_embeddings": True,
        },
        vision={"deepstack_visual_indexes": [], "num_heads": 4},
        tie_word_embeddings=True,
    )
    inputs = mixed_inputs()
    keep = valid_positions(inputs)
    # Tied to embeddings of unit variance, the logits are seven times those of the other tests.
    pair.stock.lm_head.weight.div_(7)
    pair.ours.lm_head.weight.div_(7)
    expected = stock_forward(pair.stock, **inputs, output_hidden_states=True)
    compare_outputs(pair.ours(**inputs, output_hidden_states=True), expected, keep)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    ],
    ids=lambda rope: rope["rope_type"],
)
@torch.no_grad()
def test_rope_scaling_types(rope):
    scaling = {"mrope_interleaved": True, "mrope_section": [4, 2, 2], **rope}
    pair = make_pair("dense", text={"rope_scaling": scaling})
    plain = make_pair("dense")
    inputs = make_inputs(["text:30", "image:4x6", "text:30"])
    expected = stock_forward(pair.stock, **inputs)
    if rope["rope_type"] != "dynamic":
        assert (expected.logits - stock_forward(plain.stock, **inputs).logits).abs().max() > 1e-2
    assert_close(pair.ours(**inputs).logits, expected.logits, what="logits")
