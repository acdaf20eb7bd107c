"""Visual tokens left out of the decoder, in every way in which the model is run (port 3)."""

import copy

import pytest
import torch
from helpers import (
    assert_close,
    clone_inputs,
    concat_turns,
    forget,
    make_inputs,
    make_pair,
    max_difference,
)
from transformers import DynamicCache, StaticCache

from qwen3_vl import (
    CrossLayerKVCache,
    CrossModalTokenMerging,
    EvictingKVCache,
    PagedKVCache,
    QuantizedKVCache,
    TieredKVCache,
)
from qwen3_vl.optim.tokens import token_merging
from qwen3_vl.optim.tokens.token_merging import share_budget, split_piece
from qwen3_vl.optim.tokens.token_policies import LAYER_POLICIES, POLICIES
from qwen3_vl.optim.tokens.visual_request import Piece


ROWS = (["text:4", "image:8x8", "text:3", "image:4x8", "text:6"], ["text:5", "video:2x4x8", "text:4"], ["text:7"])
WITH_LOGITS = {"output_logits": True, "return_dict_in_generate": True}
GREEDY = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5, "pad_token_id": 0}


@pytest.fixture
def model():
    return make_pair().ours


def switch_on(model, policy="uniform", **settings):
    technique = CrossModalTokenMerging(policy=policy, **{"keep_ratio": 0.25, **settings})
    technique.apply(model)
    return technique


@torch.no_grad()
def reference_logits(pair, inputs, every):
    """Stock's decoder over one row, of whose visual tokens each `every`th picture part was taken by hand."""
    stock = forget(pair.stock).model
    ids = inputs["input_ids"]
    image = stock.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
    features, visual = torch.cat(tuple(image.pooler_output)), ids[0] == pair.ours.config.image_token_id
    embeds = stock.get_input_embeddings()(ids)
    embeds[0, visual] = features
    positions, _ = stock.get_rope_index(
        ids, mm_token_type_ids=inputs["mm_token_type_ids"], image_grid_thw=inputs["image_grid_thw"]
    )
    kept, start = torch.zeros(int(visual.sum()), dtype=torch.bool), 0
    for grid in inputs["image_grid_thw"]:
        size = int(grid.prod()) // 4
        count = max(1, round(size * every))
        kept[start + (2 * torch.arange(count) + 1) * size // (2 * count)] = True
        start += size
    stays = torch.ones_like(visual)
    stays[visual] = kept
    levels = image.deepstack_features
    levels = [level if isinstance(level, torch.Tensor) else torch.cat(tuple(level)) for level in levels]
    output = stock.language_model(
        inputs_embeds=embeds[:, stays],
        position_ids=positions[..., stays],
        visual_pos_masks=visual[None, stays],
        deepstack_visual_embeds=[level[kept] for level in levels],
        use_cache=False,
    )
    return pair.stock.lm_head(output.last_hidden_state), stays


def test_survivors_are_what_stock_computes_over_them(kind):
    pair = make_pair(kind)
    inputs = make_inputs(["text:4", "image:8x8", "text:3", "image:4x8", "text:6"])
    expected, stays = reference_logits(pair, inputs, 0.25)
    switch_on(pair.ours)
    with torch.no_grad():
        output = pair.ours(**inputs)
    assert output.logits.shape[:2] == inputs["input_ids"].shape
    assert_close(output.logits[:, stays], expected, 2e-5)
    assert output.past_key_values.get_seq_length() == inputs["input_ids"].shape[1]
    assert output.past_key_values.layers[0].keys.shape[2] == int(stays.sum())
    # Where a token went is what the latest one before it gives.
    shown = stays.long().cumsum(0) - 1
    assert torch.equal(output.logits[0], output.logits[:, stays][0][shown])


def test_apply_and_revert_change_no_bit(model):
    inputs = make_inputs(*ROWS)
    with torch.no_grad():
        before = model(**inputs).logits
        technique = switch_on(model)
        assert max_difference(model(**inputs).logits, before) > 1e-3
        technique.revert(model)
        assert torch.equal(model(**inputs).logits, before)
        technique = switch_on(model, keep_ratio=1.0)
        assert torch.equal(model(**inputs).logits, before)
        technique.revert(model)


EVERY_POLICY = [{"policy": name} for name in (*POLICIES, *LAYER_POLICIES)]
WITH_LAYER = {"policy": "merge", "layer": 2, "layer_keep_ratio": 0.5}
# What does not look at the question, which a longer prompt would change.
WITHOUT_TEXT = [
    *({"policy": name} for name in POLICIES if name != "merge"),
    {"token_budget": 7},
    {"video_keep_ratio": 0.5},
]


@pytest.mark.parametrize("settings", WITHOUT_TEXT)
def test_generate_is_a_forward_without_a_cache_for_each_token(model, settings):
    inputs = make_inputs(*ROWS)
    switch_on(model, **settings)
    output = model.generate(**clone_inputs(inputs), **GREEDY, **WITH_LOGITS, output_scores=True)
    start = inputs["input_ids"].shape[1]
    ids = output.sequences
    assert ids.shape == (3, start + 5)
    whole = {
        **inputs,
        "input_ids": ids,
        "attention_mask": torch.cat((inputs["attention_mask"], torch.ones_like(ids[:, start:])), dim=1),
        "mm_token_type_ids": torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, 5)),
    }
    with torch.no_grad():
        expected = model(**whole, use_cache=False).logits
    for step in range(5):
        assert_close(output.logits[step], expected[:, start + step - 1], 1e-4, f"logits of step {step}")
        assert torch.equal(output.scores[step].argmax(-1), ids[:, start + step])


@pytest.mark.parametrize("settings", [*(x for x in EVERY_POLICY if x["policy"] != "random"), WITH_LAYER])
def test_a_row_in_a_batch_is_the_row_alone(model, settings):
    switch_on(model, **settings)
    inputs = make_inputs(*ROWS[:2], seed=3)
    batch = model.generate(**clone_inputs(inputs), **GREEDY, **WITH_LOGITS)
    for row, names in enumerate((("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw"))):
        real = inputs["attention_mask"][row].bool()
        alone = {name: inputs[name][row : row + 1, real] for name in ("input_ids", "mm_token_type_ids")}
        alone |= {name: inputs[name] for name in names}
        single = model.generate(**alone, **GREEDY, **WITH_LOGITS)
        for step in range(5):
            assert_close(batch.logits[step][row], single.logits[step][0], 1e-4, f"row {row}, step {step}")


def caches(config):
    return {
        "dynamic": DynamicCache(config=config),
        "static": StaticCache(config=config, max_cache_len=128),
        "paged": PagedKVCache(config, page_tokens=4),
        "quantized": QuantizedKVCache(config, bits=8, group_size=32, residual_tokens=1),
        "evicting": EvictingKVCache(config, visual_share=1.0, max_tokens=500),
        "tiered": TieredKVCache(config),
    }


@pytest.mark.parametrize("attention", ["sdpa", "eager", "qwen3_vl_exact", "qwen3_vl_block_sparse"])
@pytest.mark.parametrize("layer", [None, 2])
def test_every_cache_gives_what_the_plain_one_gives(model, attention, layer):
    model.set_attn_implementation(attention)
    switch_on(model, "merge", layer=layer)
    inputs = make_inputs(*ROWS)
    options = {**GREEDY, "output_logits": True, "return_dict_in_generate": True}
    expected = model.generate(**clone_inputs(inputs), **options)
    for name, cache in caches(model.config).items():
        if name == "evicting" and layer is not None:
            with pytest.raises(ValueError, match="cannot be left out between layers"):
                model.generate(**clone_inputs(inputs), **options, past_key_values=cache)
            continue
        output = model.generate(**clone_inputs(inputs), **options, past_key_values=cache)
        assert torch.equal(output.sequences, expected.sequences), name
        for step, logits in enumerate(output.logits):
            assert_close(logits, expected.logits[step], 1e-2 if name == "quantized" else 1e-4, f"{name}, step {step}")
        assert int(cache.get_seq_length()) == output.sequences.shape[1] - 1
        assert type(cache).__name__ == type(caches(model.config)[name]).__name__


@pytest.mark.parametrize("chunk", [1, 5, 16, 200])
def test_a_prompt_in_chunks_keeps_the_same_tokens(model, chunk):
    switch_on(model, "merge")
    inputs = make_inputs(*ROWS)
    expected = model.generate(**clone_inputs(inputs), **GREEDY)
    assert torch.equal(model.generate(**clone_inputs(inputs), **GREEDY, prefill_chunk_size=chunk), expected)


def test_beams_and_several_answers(model):
    switch_on(model, "merge")
    inputs = make_inputs(*ROWS)
    beams = model.generate(**clone_inputs(inputs), **GREEDY, num_beams=3, num_return_sequences=2)
    assert beams.shape == (6, inputs["input_ids"].shape[1] + 5)
    sampled = {"do_sample": True, "top_k": 1, "num_return_sequences": 2}
    repeated = model.generate(**clone_inputs(inputs), **{**GREEDY, **sampled})
    greedy = model.generate(**clone_inputs(inputs), **GREEDY)
    assert torch.equal(repeated, greedy.repeat_interleave(2, dim=0))
    one = model.generate(**clone_inputs(inputs), **GREEDY, num_beams=3)
    assert torch.equal(one, beams[::2])


def test_assisted_decoding_is_refused_at_a_layer(model):
    switch_on(model, "fastv")
    with pytest.raises(ValueError, match="generate without an assistant"):
        model.generate(**make_inputs(ROWS[0]), **GREEDY, prompt_lookup_num_tokens=3)


def test_prompt_lookup_gives_the_greedy_answer(model):
    switch_on(model, "merge")
    inputs = make_inputs(ROWS[0])
    expected = model.generate(**clone_inputs(inputs), **GREEDY)
    assert torch.equal(model.generate(**clone_inputs(inputs), **GREEDY, prompt_lookup_num_tokens=3), expected)
    switch_on_again = CrossModalTokenMerging(policy="merge")
    with pytest.raises(ValueError, match="already; revert"):
        switch_on_again.apply(model)


@pytest.mark.parametrize("cache_class", [DynamicCache, PagedKVCache])
def test_a_conversation_goes_on_with_text_and_with_a_new_picture(model, cache_class):
    switch_on(model, "uniform")
    first = make_inputs(["text:4", "image:8x8", "text:6"], seed=1)
    second = make_inputs(["text:3", "image:4x8", "text:2"], seed=2)
    third = make_inputs(["text:5"], seed=3)
    cache = cache_class(config=model.config)
    with torch.no_grad():
        model(**first, past_key_values=cache)
        middle = copy.deepcopy(cache)
        model(**second, past_key_values=cache)
        logits = model(input_ids=third["input_ids"], past_key_values=cache).logits
        together = concat_turns(first, second, third)
        expected = model(**together, use_cache=False).logits
        assert_close(logits, expected[:, -5:], 1e-4)
        assert middle.get_seq_length() == first["input_ids"].shape[1]
        # The whole conversation with all pictures, of which the cache holds the first turn.
        two = concat_turns(first, second)
        two["attention_mask"] = torch.ones_like(two["input_ids"])
        answer = model.generate(**clone_inputs(two), **GREEDY, past_key_values=middle)
        assert torch.equal(answer, model.generate(**clone_inputs(two), **GREEDY))


def test_layers_behind_hold_fewer_entries(model):
    switch_on(model, "uniform", layer=2, layer_keep_ratio=0.5)
    inputs = make_inputs(*ROWS)
    with torch.no_grad():
        cache = model(**inputs).past_key_values
    # Of 16 + 8 visual tokens 4 + 2 enter the decoder and 3 its last layer.
    text = int((inputs["mm_token_type_ids"][0] == 0).sum())
    assert [layer.keys.shape[2] for layer in cache.layers] == [text + 6, text + 6, text + 3]
    assert cache.get_seq_length() == cache.get_seq_length(2) == inputs["input_ids"].shape[1]
    with pytest.raises(ValueError, match="cannot be left out between layers with CrossLayerKVCache"):
        model(**inputs, past_key_values=CrossLayerKVCache(model.config))
    with pytest.raises(ValueError, match="cannot go back to"):
        cache.crop(-20)


def test_crop_goes_back_among_tokens(model):
    switch_on(model, "uniform")
    inputs, more = make_inputs(["text:4", "image:8x8", "text:6"]), make_inputs(["text:7"], seed=5)["input_ids"]
    length = inputs["input_ids"].shape[1]
    with torch.no_grad():
        cache = model(**inputs).past_key_values
        expected = model(input_ids=more, past_key_values=copy.deepcopy(cache)).logits
        model(input_ids=more, past_key_values=cache)
        cache.crop(-7)
        assert cache.get_seq_length() == length
        assert_close(model(input_ids=more, past_key_values=cache).logits, expected, 1e-5)
        cache.crop(-(7 + 10))  # into the picture
        assert cache.get_seq_length() == length - 10
        assert cache.layers[0].keys.shape[2] < length - 10
        cache.reset()
        assert cache.get_seq_length() == 0


def test_rows_move_with_their_tokens(model):
    switch_on(model, "uniform")
    inputs, more = make_inputs(*ROWS), make_inputs(["text:3"], ["text:3"], seed=4)["input_ids"]
    with torch.no_grad():
        cache = model(**inputs).past_key_values
        chosen = torch.tensor([1, 0])
        mask = torch.cat((inputs["attention_mask"][chosen], torch.ones(2, 3, dtype=torch.long)), dim=1)
        new = model(**{**inputs}, past_key_values=None).past_key_values
        all_mask = torch.cat((inputs["attention_mask"], torch.ones(3, 3, dtype=torch.long)), dim=1)
        three = torch.cat((more.flip(0), more[:1]))
        expected = model(input_ids=three, attention_mask=all_mask, past_key_values=new).logits
        cache.batch_select_indices(chosen)
        logits = model(input_ids=more, attention_mask=mask, past_key_values=cache).logits
    assert_close(logits, expected[chosen], 1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("settings", [{"policy": "merge"}, {"policy": "tome"}, {"policy": "fastv"}])
def test_gradients_flow_through_merging(model, settings, checkpointing):
    technique = switch_on(model, **settings)
    inputs = make_inputs(*ROWS)
    labels = inputs["input_ids"].masked_fill(inputs["mm_token_type_ids"] > 0, -100)
    labels = labels.masked_fill(inputs["attention_mask"] == 0, -100)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    inputs["pixel_values"].requires_grad_()
    output = model(**inputs, labels=labels)
    output.loss.backward()
    touched = inputs["pixel_values"].grad.abs().sum(1) > 0
    assert torch.isfinite(output.loss) and torch.isfinite(inputs["pixel_values"].grad).all()
    assert bool(touched.all())  # a tower token sees its whole picture
    model.eval()
    # The loss is that of the logits that come back.
    with torch.no_grad():
        logits = model(**inputs).logits
    shifted = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert_close(output.loss, shifted, 1e-5)
    technique.revert(model)


def test_packed_rows_do_not_see_each_other(model):
    switch_on(model, "uniform")
    layouts = ["text:4", "image:8x8", "text:6"], ["text:3", "image:4x8", "text:5"]
    parts = [make_inputs(layout, seed=seed) for seed, layout in enumerate(layouts)]
    packed = concat_turns(*parts)
    positions = []
    for part in parts:
        axes, _ = model.model.get_rope_index(part["input_ids"], part["mm_token_type_ids"], part["image_grid_thw"])
        plain = torch.arange(part["input_ids"].shape[1])[None, None]
        positions.append(torch.cat((plain, axes)))
    with torch.no_grad():
        logits = model(**packed, position_ids=torch.cat(positions, dim=-1), use_cache=False).logits
        apart = torch.cat([model(**part, use_cache=False).logits for part in parts], dim=1)
    assert_close(logits, apart, 1e-5)


def test_embeddings_as_inputs(model):
    switch_on(model, "uniform")
    inputs = make_inputs(ROWS[0])
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    expected = model.generate(**clone_inputs(inputs), **GREEDY)[:, inputs["input_ids"].shape[1] :]
    positions, _ = model.model.get_rope_index(
        inputs["input_ids"], inputs["mm_token_type_ids"], inputs["image_grid_thw"]
    )
    plain = torch.arange(embeds.shape[1])[None, None]
    answer = model.generate(
        inputs_embeds=embeds,
        position_ids=torch.cat((plain, positions)),
        **GREEDY,
        **{name: inputs[name] for name in ("pixel_values", "image_grid_thw")},
    )
    assert torch.equal(answer, expected)
    # Without ids and positions all count as text, and stay where they were.
    pictures = {name: inputs[name] for name in ("pixel_values", "image_grid_thw")}
    with torch.no_grad():
        alone = model(inputs_embeds=embeds, **pictures).logits
        told = model(inputs_embeds=embeds, **pictures, position_ids=plain.expand(3, -1, -1)).logits
    assert torch.equal(alone, told)


def test_expert_models_count_the_tokens_that_ran():
    pair = make_pair("moe")
    switch_on(pair.ours)
    inputs = make_inputs(*ROWS)
    output = pair.ours(**inputs, output_router_logits=True, labels=inputs["input_ids"])
    assert torch.isfinite(output.aux_loss)
    assert output.router_logits[0].shape[0] < inputs["input_ids"].numel()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep_ratio": 0}, "keep_ratio must be above 0"),
        ({"keep_ratio": 1.5}, "keep_ratio must be above 0"),
        ({"keep_ratio": float("nan")}, "keep_ratio must be above 0"),
        ({"keep_ratio": "half"}, "keep_ratio must be above 0"),
        ({"video_keep_ratio": 0.0}, "video_keep_ratio must be above 0"),
        ({"layer_keep_ratio": 0.5}, "needs a layer"),
        ({"layer_keep_ratio": float("nan"), "layer": 2}, "layer_keep_ratio must be above 0"),
        ({"token_budget": 0}, "token_budget must be a whole number"),
        ({"min_tokens": 0}, "min_tokens must be a whole number"),
        ({"min_tokens": 4, "token_budget": 9}, "not with a budget"),
        ({"policy": "tomee"}, "did you mean 'tome'"),
        ({"ratio": 0.5}, "has no setting 'ratio'"),
        ({"policy": "fastv", "token_budget": 5}, "takes keep_ratio alone"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        CrossModalTokenMerging(**settings)


def test_bad_layers_and_masks(model):
    for layer in (0, 1, 3):
        with pytest.raises(ValueError, match="layer must be from 2 on"):
            CrossModalTokenMerging(layer=layer).apply(model)
    with pytest.raises(ValueError, match="has no visual tokens"):
        CrossModalTokenMerging().apply(model.model.language_model)
    switch_on(model, token_budget=1)
    inputs = make_inputs(ROWS[0])
    with pytest.raises(ValueError, match="2 pictures and videos but token_budget is 1"):
        model(**inputs)
    model.model.visual_reduction.revert(model)
    switch_on(model)
    length = inputs["input_ids"].shape[1]
    with pytest.raises(ValueError, match="must be flags"):
        model(**inputs, attention_mask=torch.zeros(1, 1, length, length))


@pytest.mark.parametrize("policy", [*POLICIES, *LAYER_POLICIES])
def test_pictures_of_one_token_and_of_one_colour(model, policy):
    switch_on(model, policy)
    inputs = make_inputs(["text:3", "image:2x2", "text:2", "image:8x8", "text:4"], ["text:2", "video:2x8x8", "text:2"])
    inputs["pixel_values"].fill_(0.25)
    inputs["pixel_values_videos"].fill_(0.25)
    with torch.no_grad():
        assert torch.isfinite(model(**inputs).logits[:, -1]).all()


def test_budgets_are_shared_by_size():
    assert share_budget([10, 30], 100) == [10, 30]
    assert share_budget([10, 30], 20) == [5, 15]
    assert share_budget([1, 1, 100], 5) == [1, 1, 3]
    pieces = [Piece("image", 0, 1, 4, 4, row=0), Piece("image", 16, 1, 4, 4, row=1)]
    pieces.append(Piece("video", 32, 2, 4, 4, row=1))
    technique = CrossModalTokenMerging(token_budget=8)
    assert technique.counts(pieces) == [8, 3, 5]
    assert CrossModalTokenMerging(keep_ratio=0.25, min_tokens=6).counts(pieces) == [6, 6, 8]
    assert CrossModalTokenMerging(keep_ratio=0.01, video_keep_ratio=1.0).counts(pieces) == [1, 1, 32]


def test_long_videos_are_judged_in_parts(model, monkeypatch):
    parts = split_piece(Piece("video", 5, 5, 4, 4, row=1), 32)
    assert [(part.start, part.frames, part.height) for part in parts] == [(5, 2, 4), (37, 2, 4), (69, 1, 4)]
    bands = split_piece(Piece("image", 0, 1, 5, 4), 8)
    assert [(part.start, part.height) for part in bands] == [(0, 2), (8, 2), (16, 1)]
    monkeypatch.setattr(token_merging, "PAIRS_OF", 8)
    switch_on(model, "merge", keep_ratio=0.5)
    inputs = make_inputs(["text:3", "video:4x4x8", "text:2"])
    with torch.no_grad():
        cache = model(**inputs).past_key_values
    assert cache.layers[0].keys.shape[2] == inputs["input_ids"].shape[1] - 16


def test_what_is_written_stays(model):
    """Of a blank page with two squares of writing, these stay."""
    switch_on(model, "merge", keep_ratio=3 / 16)
    inputs = make_inputs(["text:3", "image:8x8", "text:2"])
    blank = inputs["pixel_values"][:1].expand(64, -1).clone()
    blank[20:28] = inputs["pixel_values"][20:28]
    with torch.no_grad():
        cache = model(**{**inputs, "pixel_values": blank}).past_key_values
    kept = cache._qwen3_vl_selections.first.kept[0]
    first = int((inputs["mm_token_type_ids"][0] > 0).nonzero()[0])
    assert {first + 5, first + 6} <= set(kept.tolist())


def test_a_profile_switches_it_on(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    loaded.config.optim = {"token_merging": {"policy": "uniform", "keep_ratio": 0.5}}
    loaded.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    inputs = make_inputs(ROWS[0])
    switch_on(model, keep_ratio=0.5)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
