"""What an attention function learns of pictures: `visual_runs`, over all tokens of a conversation."""

import pytest
import torch
from helpers import IMAGE_TOKEN, make_inputs, make_pair
from transformers import AttentionInterface, DynamicCache

import qwen3_vl
from qwen3_vl.modeling_qwen3_vl.modeling_base import eager_attention_forward
from qwen3_vl.modeling_qwen3_vl.mrope_qwen3_vl import number_runs, remember_visual_runs, visual_runs
from qwen3_vl.optim.attention.attention_layout import withdraw_attention


NAME = "recorder"


@pytest.fixture
def recorded():
    """An attention function that wants to know the pictures and writes down what it is told."""
    seen = []

    def record(module, query, key, value, attention_mask, visual_runs=None, **kwargs):
        if module.is_causal and module.layer_idx == 0:
            seen.append(visual_runs.clone())
        return eager_attention_forward(module, query, key, value, attention_mask, **kwargs)

    record.reads_visual_runs = True
    AttentionInterface.register(NAME, record)
    yield seen
    AttentionInterface._global_mapping.pop(NAME)


@pytest.fixture(scope="module")
def model():
    return make_pair("dense").ours


def runs_of(row):
    """`[0, 0, 1, 1, 0, 2]` to `[(1, 2), (2, 1)]`: (number, tokens) of each picture."""
    return [(int(n), int((row == n).sum())) for n in row.unique() if n]


def test_pictures_and_frames_are_numbered(model, recorded):
    model.set_attn_implementation({"text_config": NAME})
    layout = ["text:2", "image:4x4", "text:2", "video:2x4x6", "text:3"]
    inputs = make_inputs(layout, ["text:4"])
    with torch.no_grad():
        model(**inputs)
    [runs] = recorded
    assert runs.shape == inputs["input_ids"].shape
    assert runs_of(runs[0]) == [(1, 4), (2, 6), (3, 6)]
    assert not runs[1].any()
    assert torch.equal(runs[0] == 1, inputs["input_ids"][0] == IMAGE_TOKEN)


def test_history_is_kept_while_generating_and_with_beams(model, recorded):
    model.set_attn_implementation({"text_config": NAME})
    inputs = make_inputs(["text:3", "image:4x4", "text:2"], ["image:4x6", "text:5"])
    model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, num_beams=2, do_sample=False)
    prompt = inputs["input_ids"].shape[1]
    assert [len(x[0]) for x in recorded] == [prompt, prompt + 1, prompt + 2, prompt + 3]
    for runs in recorded:
        assert [runs_of(row) for row in runs] == [[(1, 4)]] * 2 + [[(1, 6)]] * 2


def test_second_picture_counts_on_and_crop_forgets(model, recorded):
    model.set_attn_implementation({"text_config": NAME})
    cache = DynamicCache(config=model.config)
    first, second = make_inputs(["text:3", "image:4x4"]), make_inputs(["text:2", "image:4x6", "text:1"])
    with torch.no_grad():
        model(**first, past_key_values=cache)
        model(**second, past_key_values=cache)
        assert runs_of(recorded[-1][0]) == [(1, 4), (2, 6)]
        cache.crop(-second["input_ids"].shape[1])
        model(**make_inputs(["text:2"]), past_key_values=cache)
    assert runs_of(recorded[-1][0]) == [(1, 4)]
    assert recorded[-1].shape[1] == cache.get_seq_length()


def test_a_picture_cut_by_a_chunk_stays_one(model, recorded):
    model.set_attn_implementation({"text_config": NAME})
    inputs = make_inputs(["text:3", "image:4x6", "text:4"])
    model.generate(**inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False, prefill_chunk_size=5)
    assert all(len(runs_of(runs[0])) <= 1 for runs in recorded)
    assert runs_of(recorded[-1][0]) == [(1, 6)]


def test_nobody_asked(model):
    model.set_attn_implementation("eager")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(**make_inputs(["text:3", "image:4x4"]), past_key_values=cache)
    assert not hasattr(cache, "_qwen3_vl_visual_runs")


def test_rows_move_with_the_cache():
    cache = DynamicCache()
    mask = torch.tensor([[0, 1, 1, 0, 1], [0, 0, 1, 1, 1]]).bool()
    remember_visual_runs(cache, 0, mask)
    assert visual_runs(cache, 6, 2).tolist() == [[0, 1, 1, 0, 2, 0], [0, 0, 1, 1, 1, 0]]
    cache.reorder_cache(torch.tensor([1, 0]))
    assert visual_runs(cache, 5, 2).tolist() == [[0, 0, 1, 1, 1], [0, 1, 1, 0, 2]]


def test_numbering_goes_on_inside_a_picture():
    earlier = torch.tensor([[0, 1, 1]], dtype=torch.int32)
    assert number_runs(torch.tensor([[True, False, True]]), earlier).tolist() == [[1, 0, 2]]
    assert number_runs(torch.tensor([[False, True]]), earlier).tolist() == [[0, 2]]


def test_unregister_withdraws_the_names_and_register_brings_them_back(model):
    from transformers import AttentionMaskInterface

    name = "qwen3_vl_exact"
    try:
        withdraw_attention()
        assert name not in AttentionInterface._global_mapping
        assert name not in AttentionMaskInterface._global_mapping
    finally:
        qwen3_vl.unregister()
        qwen3_vl.register()
    assert name in AttentionInterface._global_mapping
    model.set_attn_implementation(name)
