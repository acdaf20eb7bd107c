"""Wrong input gets a one-line error that names what was given and what fits, and leaves the model usable."""

import re

import pytest
import torch
from helpers import (
    IMAGE_TOKEN,
    PATCH_WIDTH,
    assert_close,
    make_inputs,
    one_line,
    our_class,
    stock_forward,
    without,
)
from transformers import DynamicCache


ERRORS = (ValueError, TypeError)


def good():
    return make_inputs(["text:3", "image:4x6", "text:4"])


def good_video():
    return make_inputs(["text:3", "video:2x4x4", "text:4"])


def refuses(pair, inputs, *needles, call=None, errors=ERRORS):
    """The call raises a readable error with all needles in it (regular expressions), and the next one is right."""
    call = pair.ours if call is None else call
    with pytest.raises(errors) as caught:
        call(**inputs)
    assert type(caught.value) in (ValueError, TypeError), f"{type(caught.value).__name__}: {caught.value}"
    message = one_line(caught.value)
    for needle in needles:
        assert re.search(needle, message, re.IGNORECASE), f"no {needle!r} in {message!r}"
    still_right(pair)


@torch.no_grad()
def still_right(pair):
    for inputs in (good(), make_inputs(["text:6"], seed=2)):
        assert_close(pair.ours(**inputs).logits, stock_forward(pair.stock, **inputs).logits, what="logits afterwards")


def drop_token(inputs, token, count=1):
    """Takes placeholders away from the first run of them."""
    at = int((inputs["input_ids"][0] == token).nonzero()[0])
    keep = [i for i in range(inputs["input_ids"].shape[1]) if not at <= i < at + count]
    return {
        **inputs,
        "input_ids": inputs["input_ids"][:, keep],
        "mm_token_type_ids": inputs["mm_token_type_ids"][:, keep],
    }


@pytest.mark.parametrize("types", ["given", "derived"])
@pytest.mark.parametrize("count, tokens", [(1, 5), (-1, 7), (6, 0)])
@torch.no_grad()
def test_too_few_or_too_many_image_tokens(pair, types, count, tokens):
    inputs = good()
    if count > 0:
        inputs = drop_token(inputs, IMAGE_TOKEN, count)
    else:
        inputs = drop_token(make_inputs(["text:3", "image:4x8", "text:4"]), IMAGE_TOKEN, 1)
        inputs |= {name: good()[name] for name in ("pixel_values", "image_grid_thw")}
    if types == "derived":
        inputs = without(inputs, "mm_token_type_ids")
    refuses(pair, inputs, rf"\b{tokens}\b", r"\b6\b", "image")


@torch.no_grad()
def test_too_few_video_tokens(pair):
    refuses(pair, drop_token(good_video(), 151), r"\b7\b", r"\b8\b", "video")


@torch.no_grad()
def test_pixels_without_a_grid(pair):
    refuses(pair, without(good(), "image_grid_thw"), "image_grid_thw")
    refuses(pair, without(good_video(), "video_grid_thw"), "grid_thw")


@pytest.mark.parametrize("grid", [[1, 3, 8], [1, 8, 3], [2, 3, 4]])
@torch.no_grad()
def test_grids_that_do_not_divide_by_the_merge_size(pair, grid):
    inputs = {**good(), "image_grid_thw": torch.tensor([grid])}
    refuses(pair, inputs, rf"{grid[1]}\D+{grid[2]}", r"\b2\b")


@pytest.mark.parametrize("grid", [[[1, 4, 4]], [[1, 4, 6], [1, 4, 6]], [[1, 8, 6]]])
@torch.no_grad()
def test_grids_and_pixels_of_different_sizes(pair, grid):
    inputs = {**good(), "image_grid_thw": torch.tensor(grid)}
    rows = int(torch.tensor(grid).prod(-1).sum())
    refuses(pair, inputs, rf"\b{rows}\b", r"\b24\b")


@pytest.mark.parametrize("grid", [[[1, 0, 6]], [[1, -4, -6]], [[4, 6]], [1, 4, 6]])
@torch.no_grad()
def test_grids_that_are_none(pair, grid):
    refuses(pair, {**good(), "image_grid_thw": torch.tensor(grid)}, "grid")


@torch.no_grad()
def test_patches_of_a_wrong_width(pair):
    inputs = good()
    inputs["pixel_values"] = inputs["pixel_values"][:, :-1]
    refuses(pair, inputs, rf"\b{PATCH_WIDTH - 1}\b", rf"\b{PATCH_WIDTH}\b")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["pixel_values", "pixel_values_videos"])
@torch.no_grad()
def test_pixels_that_are_not_finite(pair, name, value):
    inputs = good() if name == "pixel_values" else good_video()
    inputs[name][3, 5] = value
    refuses(pair, inputs, "nan|infinit|finite")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.long, torch.bool, torch.complex64])
@torch.no_grad()
def test_pixels_of_a_wrong_dtype(pair, dtype):
    inputs = good()
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    refuses(pair, inputs, str(dtype).removeprefix("torch."), "float")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
@torch.no_grad()
def test_ids_of_a_wrong_dtype(pair, dtype):
    inputs = good()
    inputs["input_ids"] = inputs["input_ids"].to(dtype)
    refuses(pair, inputs, str(dtype).removeprefix("torch."), "int")


@pytest.mark.parametrize("shape", [(0, 5), (1, 0), (0, 0)])
@torch.no_grad()
def test_empty_batches(pair, shape):
    refuses(pair, {"input_ids": torch.zeros(shape, dtype=torch.long)}, "empty", rf"{shape[0]}, {shape[1]}")
    refuses(pair, {"inputs_embeds": torch.zeros(*shape, 48)}, "empty")


@torch.no_grad()
def test_ids_and_embeddings(pair):
    inputs = make_inputs(["text:4"])
    embeds = pair.ours.get_input_embeddings()(inputs["input_ids"])
    refuses(pair, {**inputs, "inputs_embeds": embeds}, "input_ids", "inputs_embeds")
    refuses(pair, {}, "input_ids", "inputs_embeds")


@torch.no_grad()
def test_pixels_and_encoder_outputs(pair):
    inputs = good()
    encoded = pair.ours.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"], return_dict=True)
    refuses(pair, {**inputs, "mm_encoder_outputs": {"image": encoded}}, "pixel_values", "mm_encoder_outputs")


@torch.no_grad()
def test_token_types_of_another_length(pair):
    inputs = good()
    inputs["mm_token_type_ids"] = inputs["mm_token_type_ids"][:, :-3]
    refuses(pair, inputs, "mm_token_type_ids")


@torch.no_grad()
def test_token_types_that_contradict_the_grids(pair):
    inputs = good()
    inputs["mm_token_type_ids"][0, 5:7] = 0
    refuses(pair, inputs, "mm_token_type_ids|placeholder|token")


@torch.no_grad()
def test_more_grids_than_pictures_in_the_row(pair):
    """Two pictures' pixels fit the number of tokens but not their places."""
    inputs = make_inputs(["text:2", "image:4x6", "text:1", "image:2x4", "text:2"])
    inputs["image_grid_thw"] = inputs["image_grid_thw"].flip(0)
    refuses(pair, inputs, "grid|order|placeholder")


@pytest.mark.parametrize("call", ["generate", "forward"])
@torch.no_grad()
def test_errors_name_the_same_in_generate(pair, call):
    inputs = drop_token(good(), IMAGE_TOKEN)
    method = pair.ours if call == "forward" else lambda **given: pair.ours.generate(**given, max_new_tokens=2)
    refuses(pair, inputs, r"\b5\b", r"\b6\b", call=method)


@torch.no_grad()
def test_a_failed_turn_leaves_the_cache_as_it_was(pair):
    first, second = good(), make_inputs(["text:2", "image:6x6", "text:1"], seed=1)
    cache = DynamicCache(config=pair.ours.config)
    pair.ours(**first, past_key_values=cache)
    length = cache.get_seq_length()
    with pytest.raises(ERRORS):
        pair.ours(**drop_token(second, IMAGE_TOKEN), past_key_values=cache)
    assert cache.get_seq_length() == length
    whole = {name: torch.cat([first[name], second[name]], dim=1) for name in ("input_ids", "mm_token_type_ids")}
    whole |= {name: torch.cat([first[name], second[name]]) for name in ("pixel_values", "image_grid_thw")}
    expected = stock_forward(pair.stock, **whole).logits[:, length:]
    assert_close(pair.ours(**second, past_key_values=cache).logits, expected, what="logits after a failed turn")


@torch.no_grad()
def test_a_cache_of_another_batch(pair):
    cache = DynamicCache(config=pair.ours.config)
    pair.ours(**make_inputs(["text:3", "image:4x6"], ["text:3", "image:4x6"]), past_key_values=cache)
    with pytest.raises(ERRORS) as caught:
        pair.ours(input_ids=torch.tensor([[5]] * 3), past_key_values=cache)
    message = one_line(caught.value)
    assert re.search(r"\b2\b", message)
    assert re.search(r"\b3\b", message)
    still_right(pair)


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "header"])
def test_damaged_safetensors(pair, damage, tmp_path):
    pair.stock.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(
        {
            "truncated": whole[: len(whole) // 2],
            "garbage": b"\xff" * len(whole),
            "empty": b"",
            "header": whole[:8] + b"{" * 100 + whole[108:],
        }[damage]
    )
    with pytest.raises(Exception) as caught:
        our_class(pair.kind, "ForConditionalGeneration").from_pretrained(tmp_path)
    message = one_line(caught.value)
    assert "model.safetensors" in message, f"does not name the file: {message!r}"
    file.write_bytes(whole)
    loaded = our_class(pair.kind, "ForConditionalGeneration").from_pretrained(tmp_path)
    with torch.no_grad():
        assert_close(loaded(**good()).logits, stock_forward(pair.stock, **good()).logits, what="logits")


def test_a_missing_shard_is_named(pair, tmp_path):
    pair.stock.save_pretrained(tmp_path, max_shard_size="60KB")
    shard = sorted(tmp_path.glob("*-00002-of-*.safetensors"))[0]
    shard.unlink()
    with pytest.raises(Exception, match=re.escape(shard.name)):
        our_class(pair.kind, "ForConditionalGeneration").from_pretrained(tmp_path)


@pytest.mark.parametrize("version", ["4.57.0", "5.0.0", "5.19.2", "6.0.0", "6.1.0.dev0", "nonsense"])
def test_unsupported_transformers(version):
    from qwen3_vl import check_transformers_version

    with pytest.raises(ImportError) as caught:
        check_transformers_version(version)
    message = one_line(caught.value)
    assert version in message
    assert "5.20" in message


@pytest.mark.parametrize("version", ["5.20.0", "5.23.0", "5.99.1", None])
def test_supported_transformers(version):
    from qwen3_vl import check_transformers_version

    check_transformers_version(version)


def test_unsupported_transformers_on_use():
    """The first class that is used says it, not an import error from somewhere inside."""
    import subprocess
    import sys

    script = (
        "import transformers; transformers.__version__ = '4.57.0'\n"
        "import qwen3_vl\n"
        "qwen3_vl.Qwen3VLForConditionalGeneration\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: ")
    assert "4.57.0" in last
    assert "5.20" in last
