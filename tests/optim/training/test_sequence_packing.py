"""Packed rows against the same samples alone, what a batch holds, and bad samples."""

import pytest
import torch
from helpers import IMAGE_TOKEN, assert_close, make_pair, one_line
from packing_cases import LAYOUTS, loss_alone, loss_packed, make_sample, make_samples

from qwen3_vl import AdaptiveSequencePacking
from qwen3_vl.optim.training.sequence_packing import EXACT_IN_TRAINING


TOLERANCE = 1e-5
TOKENS = sum(make_sample(layout)["input_ids"].shape[1] for layout in LAYOUTS)


def assert_same(found, expected):
    assert found[0] == pytest.approx(expected[0], abs=TOLERANCE)
    assert found[1].keys() == expected[1].keys() and len(expected[1]) > 20
    for name, gradient in expected[1].items():
        assert_close(found[1][name], gradient, TOLERANCE * max(1.0, float(gradient.abs().max())), name)


@pytest.mark.parametrize("attention", [name for name in EXACT_IN_TRAINING if name != "flex_attention"])
def test_equals_the_samples_alone(kind, attention):
    model, samples = make_pair(kind, attn=attention).ours.train(), make_samples()
    expected = loss_alone(model, samples)
    one_row = AdaptiveSequencePacking(model, row_tokens=TOKENS)(samples)
    assert one_row["input_ids"].shape == (1, TOKENS)
    assert_same(loss_packed(model, one_row), expected)
    rows = AdaptiveSequencePacking(model, row_tokens=40)(samples)
    assert len(rows["input_ids"]) > 1
    assert_same(loss_packed(model, rows), expected)


def test_flex_attention_keeps_samples_apart():
    """On a CPU it computes no gradients, so the logits are compared."""
    model, samples = make_pair("dense").ours, make_samples(LAYOUTS[:2])
    with torch.no_grad():
        expected = torch.cat([model(**sample).logits for sample in samples], dim=1)
        model.set_attn_implementation({"text_config": "flex_attention", "vision_config": "sdpa"})
        found = model(**AdaptiveSequencePacking(model)(samples)).logits
    assert_close(found, expected, TOLERANCE * 10)


def test_mean_over_all_accumulation_steps():
    model, samples = make_pair("dense").ours.train(), make_samples()
    expected = loss_alone(model, samples)
    packing = AdaptiveSequencePacking(model)
    batches = [packing(samples[:2]), packing(samples[2:])]
    learned = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    assert learned == packing.statistics.label_tokens
    model.zero_grad()
    total = 0.0
    for batch in batches:
        loss = model(**batch, num_items_in_batch=learned).loss
        loss.backward()
        total += loss.item()
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    assert_same((total, found), expected)


def test_positions_are_those_of_each_sample_alone():
    model, samples = make_pair("dense").ours, make_samples()
    batch = AdaptiveSequencePacking(model)(samples)
    start = 0
    for sample in samples:
        length = sample["input_ids"].shape[1]
        grids = sample.get("image_grid_thw"), sample.get("video_grid_thw")
        expected, _ = model.model.get_rope_index(sample["input_ids"], sample["mm_token_type_ids"], *grids, None)
        found = batch["position_ids"][:, 0, start : start + length]
        assert torch.equal(found[0], torch.arange(length))
        assert torch.equal(found[1:], expected[:, 0])
        assert batch["labels"][0, start] == -100
        assert torch.equal(batch["labels"][0, start + 1 : start + length], sample["labels"][0, 1:])
        start += length
    assert start == batch["input_ids"].shape[1] and "attention_mask" not in batch


def test_samples_do_not_see_each_other():
    model, samples = make_pair("dense").ours, make_samples()
    packing = AdaptiveSequencePacking(model)
    changed = [make_sample(LAYOUTS[0], seed=99), *samples[1:]]
    with torch.no_grad():
        before, after = model(**packing(samples)).logits, model(**packing(changed)).logits
    first = samples[0]["input_ids"].shape[1]
    assert not torch.equal(before[:, :first], after[:, :first])
    assert torch.equal(before[:, first:], after[:, first:])


def test_lists_padding_and_masks_are_read():
    model, samples = make_pair("dense").ours, make_samples()
    packing = AdaptiveSequencePacking(model)
    expected = packing(samples)
    as_lists = [{key: value.tolist() for key, value in sample.items()} for sample in samples]
    flat = [
        {**sample, "input_ids": sample["input_ids"][0], "pixel_values_videos": sample.get("pixel_values_videos")}
        for sample in as_lists
    ]
    padded = []
    for sample in samples:
        pad = torch.zeros(1, 3, dtype=torch.long)
        tokens = {key: torch.cat((pad, sample[key]), dim=1) for key in ("input_ids", "mm_token_type_ids", "labels")}
        mask = torch.cat((pad, torch.ones_like(sample["input_ids"])), dim=1)
        padded.append({**sample, **tokens, "attention_mask": mask})
    untyped = [{key: value for key, value in sample.items() if key != "mm_token_type_ids"} for sample in samples]
    for other in (as_lists, flat, padded, untyped):
        found = packing(other)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert value is False or torch.equal(found[key], value), key


def test_the_longest_leads():
    """Else `accelerate` cuts what comes of a stream to the rows of `input_ids`."""
    packing = AdaptiveSequencePacking(make_pair("dense").ours, row_tokens=20)
    for samples in (make_samples(LAYOUTS[1:3]), make_samples(LAYOUTS[:1]), make_samples(LAYOUTS[:1] * 30)):
        lengths = [len(value) for value in packing(samples).values() if value is not False]
        assert lengths[0] == max(lengths)


def test_assistant_masks_stand_for_labels():
    model, sample = make_pair("dense").ours, make_sample(LAYOUTS[0])
    mask = torch.tensor([[0, 0, 1, 1, 0, 0]])
    batch = AdaptiveSequencePacking(model)([{"input_ids": sample["input_ids"], "assistant_masks": mask}])
    assert torch.equal(batch["labels"], torch.where(mask.bool(), sample["input_ids"], -100))


def test_statistics_count_what_was_packed():
    packing = AdaptiveSequencePacking(make_pair("dense").ours, row_tokens=40)
    batch = packing(make_samples())
    counts = packing.statistics
    assert (counts.samples, counts.tokens, counts.rows) == (len(LAYOUTS), TOKENS, len(batch["input_ids"]))
    assert counts.padding_tokens == batch["input_ids"].numel() - TOKENS > 0
    assert counts.label_tokens == int((batch["labels"] != -100).sum())


def without(sample, *keys):
    return {key: value for key, value in sample.items() if key not in keys}


def with_nan(sample):
    pixels = sample["pixel_values"].clone()
    pixels[3, 2] = float("nan")
    return {**sample, "pixel_values": pixels}


PICTURE = make_sample(LAYOUTS[2], seed=5)
BAD = {
    "too_long": (make_sample(["text:80"]), "80 tokens but a row holds 60"),
    "no_input_ids": (without(PICTURE, "input_ids"), "no input_ids"),
    "empty": ({**PICTURE, "input_ids": []}, "no input_ids"),
    "no_labels": (without(PICTURE, "labels"), "no labels"),
    "empty_labels": ({**PICTURE, "labels": torch.full_like(PICTURE["labels"], -100)}, "no token to learn"),
    "wrong_length": ({**PICTURE, "labels": PICTURE["labels"][:, 1:]}, "labels; pass one a token"),
    "two_rows": ({**PICTURE, "input_ids": PICTURE["input_ids"].view(-1)[:14].view(2, 7)}, r"shape \(2, 7\)"),
    "float_ids": ({**PICTURE, "input_ids": PICTURE["input_ids"].float()}, "torch.float32"),
    "fewer_patches": (
        {**PICTURE, "pixel_values": PICTURE["pixel_values"][1:]},
        r"floating-point \(28, 96\)",
    ),
    "whole_pixels": ({**PICTURE, "pixel_values": PICTURE["pixel_values"].long()}, "torch.int64"),
    "no_pixels": (without(PICTURE, "pixel_values"), "no pixel_values"),
    "no_picture": (without(PICTURE, "pixel_values", "image_grid_thw"), "7 image placeholder tokens but .* for 0"),
    "wrong_grid": ({**PICTURE, "image_grid_thw": torch.tensor([[1, 0, 4]])}, "positive whole numbers"),
    "swapped_grids": ({**PICTURE, "image_grid_thw": PICTURE["image_grid_thw"].flip(0)}, "interrupt"),
    "nan": (with_nan(PICTURE), "NaN or infinity in pixel_values"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_samples_are_named_or_skipped(name):
    sample, message = BAD[name]
    model, good = make_pair("dense").ours, make_sample(LAYOUTS[1])
    with pytest.raises(ValueError, match=message) as error:
        AdaptiveSequencePacking(model, row_tokens=60)([good, sample])
    assert one_line(error.value).startswith("sample 1 of the batch")
    packing = AdaptiveSequencePacking(model, row_tokens=60, on_error="skip")
    expected = AdaptiveSequencePacking(model, row_tokens=60)([good])
    assert torch.equal(packing([good, sample])["input_ids"], expected["input_ids"])
    assert sum(packing.statistics.skipped.values()) == 1
    with pytest.raises(ValueError, match="none of 1 samples"):
        packing([sample])


def test_too_many_patches():
    packing = AdaptiveSequencePacking(make_pair("dense").ours, row_patches=27)
    with pytest.raises(ValueError, match="28 vision patches but a row holds 27; raise row_patches"):
        packing([PICTURE])


def test_bad_arguments():
    model = make_pair("dense").ours
    for options, message in (
        ({"row_tokens": 0}, "row_tokens must be >= 1"),
        ({"row_patches": -1}, "row_patches must be >= 1"),
        ({"on_error": "ignore"}, "'raise' or 'skip'"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            AdaptiveSequencePacking(model, **options)
        one_line(error.value)
    with pytest.raises(ValueError, match="got dict"):
        AdaptiveSequencePacking({})


@pytest.mark.parametrize("attention", ["qwen3_vl_block_sparse", "qwen3_vl_dynamic_sparse", "qwen3_vl_adaptive"])
def test_other_attention_is_refused(attention):
    model = make_pair("dense").ours
    packing = AdaptiveSequencePacking(model)
    model.set_attn_implementation({"text_config": attention, "vision_config": "sdpa"})
    for use in (lambda: AdaptiveSequencePacking(model), lambda: packing([make_sample(LAYOUTS[0])])):
        with pytest.raises(ValueError, match=attention) as error:
            use()
        one_line(error.value)


def test_placeholders_marked_as_text_are_text():
    sample = make_sample(["text:5", "image:2x2", "text:3"])
    sample["input_ids"][0, 1] = IMAGE_TOKEN
    model = make_pair("dense").ours.train()
    batch = AdaptiveSequencePacking(model)([sample])
    assert loss_packed(model, batch)[0] == pytest.approx(loss_alone(model, [sample])[0], abs=TOLERANCE)
