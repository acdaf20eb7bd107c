"""The M-RoPE index of whole batches equals stock's, without its loops over rows, groups of tokens and pictures."""

import random

import pytest
import torch
from helpers import forget, make_inputs, make_pair, slow_mrope_index
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import CountOperations

from qwen3_vl.modeling_qwen3_vl.mrope_qwen3_vl import compute_mrope_positions


def index_inputs(layouts, padding, mask):
    inputs = make_inputs(*layouts, padding=padding, mask=mask)
    wanted = ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw", "attention_mask")
    return {name: inputs[name] for name in wanted if name in inputs}


PARTS = st.lists(
    st.one_of(
        st.integers(1, 9).map(lambda n: f"text:{n}"),
        st.tuples(st.integers(1, 4), st.integers(1, 4)).map(lambda s: f"image:{2 * s[0]}x{2 * s[1]}"),
        st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4)).map(
            lambda s: f"video:{s[0]}x{2 * s[1]}x{2 * s[2]}"
        ),
    ),
    min_size=1,
    max_size=6,
)


@pytest.fixture(scope="module")
def stock():
    return make_pair("dense").stock


@given(
    rows=st.lists(PARTS, min_size=1, max_size=4),
    padding=st.sampled_from(["left", "right"]),
    mask=st.sampled_from([None, True]),
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_index_equals_stock(stock, rows, padding, mask):
    """Padded left and right, several pictures and videos a row, and rows without any."""
    inputs = index_inputs(rows, padding, mask)
    expected, deltas = forget(stock).model.get_rope_index(**inputs)
    arguments = {name: value for name, value in inputs.items() if name != "input_ids"}
    actual, ours = compute_mrope_positions(**arguments)
    assert torch.equal(actual, expected.long())
    assert torch.equal(ours, deltas.long())


@pytest.mark.parametrize(
    "rows",
    [
        [["text:4"], ["text:9"]],
        [["image:4x6", "image:2x2", "image:8x4"], ["text:5"], ["video:3x4x4", "text:2", "image:2x2", "video:1x2x8"]],
        [["text:5"], ["image:2x8"], ["text:1"], ["video:2x2x2", "text:7"]],
    ],
    ids=["text", "pictures", "image-less rows between"],
)
@pytest.mark.parametrize("padding", ["left", "right"])
def test_index_by_hand(stock, rows, padding):
    inputs = index_inputs(rows, padding, True)
    arguments = {name: value for name, value in inputs.items() if name != "input_ids"}
    expected, deltas = slow_mrope_index(inputs)
    for actual in (compute_mrope_positions(**arguments), forget(stock).model.get_rope_index(**inputs)):
        assert torch.equal(actual[0].long(), expected) and torch.equal(actual[1].long(), deltas)


def test_index_has_no_loop_over_pictures(stock):
    """As many operations, and waits for the device, for thirty pictures in four rows as for two in one."""
    counts = {}
    for size in ("small", "large"):
        rng = random.Random(0)
        row = ["text:3", "image:4x4", "video:2x4x4"]
        rows = [row] if size == "small" else [row * 5 + [f"text:{rng.randint(1, 9)}"] for _ in range(4)]
        inputs = index_inputs(rows, "left", True)
        arguments = {name: value for name, value in inputs.items() if name != "input_ids"}
        with CountOperations() as ours:
            compute_mrope_positions(**arguments)
        with CountOperations() as theirs:
            forget(stock).model.get_rope_index(**inputs)
        counts[size] = [(len(mode.names), mode.names.count("aten._local_scalar_dense")) for mode in (ours, theirs)]
    (few, waits), (many, more_waits) = counts["small"][0], counts["large"][0]
    assert many <= few and more_waits == waits
    # The count is no artefact of the measure: stock's grows with the pictures.
    assert counts["large"][1][0] > 5 * counts["small"][1][0] and counts["large"][1][1] > 5 * counts["small"][1][1]
