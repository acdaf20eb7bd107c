"""The prefix cache through `generate()`: the same tokens as without it, what is skipped, who comes first, faults."""

import copy
import gc
import pickle
import threading

import numpy as np
import pytest
import torch
from helpers import IMAGE_TOKEN, VIDEO_TOKEN, clone_inputs, concat_turns, make_inputs, make_pair, one_line, without
from PIL import Image, ImageDraw
from transformers import AutoModelForImageTextToText, AutoProcessor, DynamicCache, StaticCache

from qwen3_vl import PagedKVCache, PrefixCache, QuantizedKVCache
from qwen3_vl.modeling_qwen3_vl.mrope_qwen3_vl import next_positions_seen, visual_runs


PAGE = 4
MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.3, "top_k": 30},
    "several_sequences": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3},
    "beams_and_several_sequences": {"num_beams": 4, "num_return_sequences": 2, "early_stopping": True},
    "chunked_prefill": {"prefill_chunk_size": 3},
    "chunked_prefill_and_beams": {"prefill_chunk_size": 5, "num_beams": 2},
}
# Beginnings that two requests share, each with two different ends.
SHARED = {
    "text": (["text:9"], ["text:5"], ["text:6"]),
    "image": (["text:3", "image:4x6"], ["text:5"], ["text:4"]),
    "images": (["image:4x4", "text:1", "image:2x6", "text:2"], ["text:1"], ["text:3"]),
    "video": (["text:2", "video:2x4x4", "text:2"], ["text:3"], ["text:1"]),
    "new_image": (["text:3", "image:4x6"], ["text:2", "image:4x4", "text:2"], ["text:1", "image:6x2", "text:3"]),
    "new_video": (
        ["image:2x4", "text:2"],
        ["video:2x2x4", "text:2"],
        ["text:2", "video:1x4x4", "image:2x2", "text:1"],
    ),
}


@pytest.fixture(scope="module")
def model():
    """A dense model; every test takes off what it applied."""
    return make_pair("dense").ours


@pytest.fixture
def prefix(model):
    technique = PrefixCache(page_tokens=PAGE)
    technique.apply(model)
    yield technique
    technique.revert(model)
    model.set_attn_implementation("sdpa")


def generate(model, inputs, **options):
    torch.manual_seed(0)
    kept = {"suppress_tokens": [IMAGE_TOKEN, VIDEO_TOKEN], "max_new_tokens": 7, "do_sample": False}
    return model.generate(**clone_inputs(inputs), **{**kept, **options})


def without_it(model, prefix, inputs, **options):
    """What the model says when the prefix cache is off."""
    prefix.revert(model)
    tokens = generate(model, inputs, **options).tolist()
    prefix.apply(model)
    return tokens


def requests(name):
    start, *ends = (make_inputs(layout, seed=seed) for seed, layout in enumerate(SHARED[name]))
    return start["input_ids"].shape[1], [concat_turns(start, end) for end in ends]


class Prefill:
    """Writes down how many tokens and pictures reach the decoder and the tower."""

    def __init__(self, model, monkeypatch):
        self.tokens, self.pictures = [], []
        self.decoder, self.tower = model.model.language_model.forward, model.model.visual.forward
        monkeypatch.setattr(model.model.language_model, "forward", self.decode)
        monkeypatch.setattr(model.model.visual, "forward", self.encode)

    def decode(self, *args, **kwargs):
        self.tokens.append(kwargs["inputs_embeds"].shape[1])
        return self.decoder(*args, **kwargs)

    def encode(self, pixels, grid_thw, **kwargs):
        self.pictures += grid_thw.tolist()
        return self.tower(pixels, grid_thw=grid_thw, **kwargs)


# --- The same tokens ---


@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize("mode", MODES)
def test_the_same_tokens_in_every_mode(model, prefix, name, mode):
    shared, prompts = requests(name)
    expected = [without_it(model, prefix, prompt, **MODES[mode]) for prompt in prompts]
    assert generate(model, prompts[0], **MODES[mode]).tolist() == expected[0]
    assert prefix.statistics().hits == 0
    assert generate(model, prompts[1], **MODES[mode]).tolist() == expected[1]
    assert (prefix.statistics().hits, prefix.statistics().tokens_reused) == (1, shared)
    for prompt, tokens in zip(prompts, expected, strict=True):  # known to the last token but one
        assert generate(model, prompt, **MODES[mode]).tolist() == tokens
    lengths = [prompt["input_ids"].shape[1] - 1 for prompt in prompts]
    assert prefix.statistics().tokens_reused == shared + sum(lengths)


@pytest.mark.parametrize("implementation", ["eager", "qwen3_vl_exact", "qwen3_vl_memory_efficient"])
def test_the_same_tokens_with_every_attention(model, prefix, implementation):
    model.set_attn_implementation(implementation)
    shared, prompts = requests("images")
    for prompt in prompts:
        assert generate(model, prompt).tolist() == without_it(model, prefix, prompt)
    assert prefix.statistics().tokens_reused == shared


@pytest.mark.parametrize("name", ["qwen3_vl_block_sparse", "qwen3_vl_dynamic_sparse"])
def test_the_same_tokens_where_pictures_are_read_in_blocks(model, prefix, name):
    """Those ask for the note of which picture a token is in, and for the bounds of keys in the pages."""
    model.set_attn_implementation(name)
    _, prompts = requests("new_image")
    for prompt in prompts:
        assert generate(model, prompt).tolist() == without_it(model, prefix, prompt)
    assert prefix.statistics().hits == 1


@torch.no_grad()
def test_a_prefix_has_the_notes_of_a_whole_prefill(model, prefix):
    """Where text goes on, and which picture or frame each token is of."""
    model.set_attn_implementation("qwen3_vl_block_sparse")
    _, prompts = requests("new_video")
    plain = DynamicCache(config=model.config)
    model(**prompts[1], past_key_values=plain)
    generate(model, prompts[1])
    cache = prefix.match(model, **prompts[1])
    seen = cache.get_seq_length()
    assert seen == prompts[1]["input_ids"].shape[1] - 1
    assert next_positions_seen(cache).tolist() == next_positions_seen(plain)[:, :seen].tolist()
    runs = visual_runs(cache, seen, 1)
    assert runs.tolist() == visual_runs(plain, seen, 1).tolist() and int(runs.max()) == 3


def test_the_same_tokens_with_experts():
    model, prefix = make_pair("moe").ours, PrefixCache(page_tokens=PAGE)
    prefix.apply(model)
    shared, prompts = requests("new_image")
    for prompt in prompts:
        assert generate(model, prompt).tolist() == without_it(model, prefix, prompt)
    assert prefix.statistics().tokens_reused == shared


def test_the_logits_are_those_of_a_whole_prefill(model, prefix):
    _, prompts = requests("new_video")
    generate(model, prompts[0])
    output = generate(model, prompts[1], return_dict_in_generate=True, output_logits=True)
    prefix.revert(model)
    plain = generate(model, prompts[1], return_dict_in_generate=True, output_logits=True)
    for ours, theirs in zip(output.logits, plain.logits, strict=True):
        assert (ours - theirs).abs().max() < 1e-4


def test_a_batch_begins_where_its_shortest_known_prefix_ends(model, prefix):
    start, middle = make_inputs(["text:3", "image:4x6"], seed=1), make_inputs(["text:4"], seed=2)
    rows = [concat_turns(start, middle, make_inputs([f"text:{n}"], seed=n)) for n in (3, 4)]
    generate(model, rows[0])
    other = concat_turns(start, make_inputs(["text:7"], seed=9))
    batch = {key: torch.cat((rows[0][key], other[key])) for key in other}
    expected = without_it(model, prefix, batch, num_beams=2)
    assert generate(model, batch, num_beams=2).tolist() == expected
    assert prefix.statistics().tokens_reused == 2 * start["input_ids"].shape[1]
    assert generate(model, batch, num_beams=2).tolist() == expected
    assert prefix.statistics().tokens_reused == 2 * (start["input_ids"].shape[1] + batch["input_ids"].shape[1] - 1)


@pytest.mark.parametrize("mode", ["greedy", "several_sequences", "beams", "chunked_prefill"])
def test_padding_on_the_left(model, prefix, mode):
    """The same rows come padded, otherwise padded and alone; pages are copied where they cannot be shared."""
    layouts = [["text:2", "image:4x6", "text:4"], ["text:1", "video:2x4x4", "text:2", "image:2x2", "text:1"]]
    long, longer = (layouts[0], [*layouts[1], "text:3"]), (layouts[0], [*layouts[1], "text:9"])
    alone = make_inputs(layouts[0], seed=5)
    for inputs in (alone, *(make_inputs(*batch, seed=5, mask=True) for batch in (long, longer, long))):
        assert generate(model, inputs, **MODES[mode]).tolist() == without_it(model, prefix, inputs, **MODES[mode])
    assert prefix.statistics().hits == 2  # in the first batch one row is unknown


def test_a_prefix_never_ends_inside_a_picture(model, prefix):
    """A short row in the batch, or a budget, may end it anywhere."""
    inputs = make_inputs(["text:1", "image:8x8", "text:5"], seed=1)
    expected = without_it(model, prefix, inputs)
    prefix.revert(model)
    page_bytes = 3 * 2 * (PAGE + 1) * 2 * 16 * 4
    small = PrefixCache(page_tokens=PAGE, max_bytes=3 * page_bytes)
    small.apply(model)
    try:
        for _ in range(3):
            assert generate(model, inputs).tolist() == expected
        assert small.statistics().tokens_reused == 2 * 2  # the text and the start of the picture
        assert small.statistics().bytes_held == 3 * page_bytes
    finally:
        small.revert(model)


# --- What is skipped ---


def test_the_tower_and_the_prefix_are_skipped(model, prefix, monkeypatch):
    shared, prompts = requests("new_image")
    generate(model, prompts[0])
    prefill = Prefill(model, monkeypatch)
    generate(model, prompts[1])
    assert prefill.tokens[0] == prompts[1]["input_ids"].shape[1] - shared
    assert prefill.pictures == [[1, 6, 2]]
    generate(model, prompts[1])
    assert prefill.pictures == [[1, 6, 2]] and prefill.tokens[-7:] == [1] * 7


def test_other_pixels_under_the_same_ids_are_no_hit(model, prefix):
    inputs = make_inputs(["text:3", "image:4x6", "text:3"], seed=1)
    other = {**inputs, "pixel_values": inputs["pixel_values"] * 1.5}
    generate(model, inputs)
    expected = without_it(model, prefix, other)
    assert generate(model, other).tolist() == expected
    assert prefix.statistics().tokens_reused == 4  # the text and the start of the picture


def test_other_positions_are_no_hit(model, prefix):
    inputs = make_inputs(["text:6"], mask=True)
    positions = torch.arange(3, 9).expand(1, -1)
    generate(model, inputs)
    expected = without_it(model, prefix, inputs, position_ids=positions)
    for _ in range(2):
        assert generate(model, inputs, position_ids=positions).tolist() == expected
    assert (prefix.statistics().hits, prefix.statistics().tokens_reused) == (1, 5)


def test_a_conversation_goes_on_from_its_answer(model, prefix):
    """The next turn has the answer in its prompt; pages behind the prefill are used too."""
    turns = [
        make_inputs(layout, seed=seed) for seed, layout in enumerate([["text:2", "image:4x6", "text:3"], ["text:3"]])
    ]
    answer = generate(model, turns[0])[:, turns[0]["input_ids"].shape[1] :]
    said = {"input_ids": answer, "mm_token_type_ids": torch.zeros_like(answer)}
    for extra, last in enumerate((turns[1], make_inputs(["text:1", "image:2x4", "text:2"], seed=9))):
        whole = concat_turns(turns[0], said, last)
        before = prefix.statistics().tokens_reused
        assert generate(model, whole).tolist() == without_it(model, prefix, whole)
        known = turns[0]["input_ids"].shape[1] + answer.shape[1] - 1  # its last token came with the second turn
        assert prefix.statistics().tokens_reused - before == known + extra


def test_conversations_take_turns(model, prefix):
    chats = [
        make_inputs(["text:2", grid, "text:3"], seed=seed) for seed, grid in enumerate(["image:4x6", "image:6x4"])
    ]
    for turn in range(3):
        for index in range(2):
            if turn:
                chats[index] = concat_turns(chats[index], make_inputs(["text:2", "image:2x4"], seed=10 * turn + index))
            chats[index] = concat_turns(chats[index], make_inputs(["text:3"], seed=20 * turn + index))
            assert generate(model, chats[index]).tolist() == without_it(model, prefix, chats[index])
    assert (prefix.statistics().hits, prefix.statistics().misses) == (4, 2)


# --- Who chooses the cache ---


def test_the_caller_comes_first(model, prefix):
    inputs = make_inputs(["text:5", "image:4x6", "text:3"], mask=True)
    generate(model, inputs)
    before, full = prefix.statistics(), {"return_dict_in_generate": True}
    for options, kind in (
        ({"past_key_values": DynamicCache(config=model.config)}, DynamicCache),
        ({"cache_implementation": "static"}, StaticCache),
        ({"use_cache": False}, type(None)),
    ):
        assert type(generate(model, inputs, **full, **options).past_key_values) is kind
    embeds = model.get_input_embeddings()(inputs["input_ids"][:, :5])
    generate(model, {"inputs_embeds": embeds}, **full)
    assert prefix.statistics() == before
    assert isinstance(generate(model, inputs, **full).past_key_values, PagedKVCache)


@pytest.mark.parametrize("helped", [False, True])
def test_assisted_decoding_has_a_cache_of_its_own(model, prefix, helped):
    options = {"assistant_model": make_pair("dense", seed=1).ours} if helped else {"prompt_lookup_num_tokens": 2}
    inputs = make_inputs(["text:2", "image:4x6", "text:4"], mask=True)
    expected = generate(model, inputs).tolist()
    before = prefix.statistics()
    assert generate(model, inputs, **options).tolist() == expected
    assert prefix.statistics() == before


def test_the_cache_that_comes_back_goes_on(model, prefix):
    """It is the caller's then; what is kept stays as it was."""
    first, second = (
        make_inputs(["text:2", "image:4x6", "text:3"], seed=1),
        make_inputs(["text:2", "image:2x4"], seed=2),
    )
    output = generate(model, first, return_dict_in_generate=True)
    answer = output.sequences[:, first["input_ids"].shape[1] :]
    whole = concat_turns(first, {"input_ids": answer, "mm_token_type_ids": torch.zeros_like(answer)}, second)
    mask = torch.ones_like(whole["input_ids"])
    expected = without_it(model, prefix, whole)
    rows = prefix.statistics().rows_held
    given = {**whole, "attention_mask": mask}
    assert generate(model, given, past_key_values=output.past_key_values).tolist() == expected
    assert prefix.statistics().rows_held == rows
    assert generate(model, whole).tolist() == expected
    assert generate(model, first).tolist() == output.sequences.tolist()


def test_chosen_by_the_profile():
    model = AutoModelForImageTextToText.from_pretrained(
        "checkpoints/tiny", optim={"prefix_cache": {"page_tokens": 16}}
    )
    (technique,) = model.active_techniques
    assert (technique.name, technique.exact, model.prefix_cache) == ("prefix_cache", True, technique)
    inputs = {"input_ids": torch.randint(10, 90, (1, 9))}
    first, second = (model.generate(**inputs, max_new_tokens=3, do_sample=False).tolist() for _ in range(2))
    assert first == second and technique.statistics().hits == 1
    technique.revert(model)
    assert not hasattr(model, "prefix_cache")


def test_comes_before_another_cache_of_the_profile():
    """Where both could hold a request, the one that keeps it for the next does; what it cannot, the other holds."""
    optim = {"quantized_cache": {"bits": 8}, "prefix_cache": {}}
    model = AutoModelForImageTextToText.from_pretrained("checkpoints/tiny", optim=optim)
    options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    ids = torch.randint(10, 90, (2, 9))
    assert isinstance(model.generate(input_ids=ids, **options).past_key_values, PagedKVCache)
    right_padded = torch.tensor([[1] * 9, [1] * 7 + [0] * 2])  # of which no prefix can be told
    other = model.generate(input_ids=ids, attention_mask=right_padded, **options).past_key_values
    assert isinstance(other, QuantizedKVCache)


class Pruning(PrefixCache):
    name = "pruning"

    def plan_visual_tokens(self, model, input_ids, grids, encoder_outputs):
        return None


def test_visual_tokens_planned_by_the_prompt_are_not_shared(model, prefix):
    inputs = make_inputs(["text:2", "image:4x6"])
    model.active_techniques = [Pruning()]
    try:
        generate(model, inputs)
        assert prefix.statistics().rows_held == prefix.statistics().misses == 0
    finally:
        model.active_techniques = []


# --- By hand ---


def test_match_and_store_by_hand(model):
    prefix = PrefixCache(page_tokens=PAGE)
    shared, prompts = requests("new_image")
    expected = [generate(model, prompt).tolist() for prompt in prompts]
    cache = prefix.match(model, **prompts[0])
    assert cache.get_seq_length() == 0
    ids = prompts[0]["input_ids"]
    with torch.no_grad():
        logits = model(**prompts[0], past_key_values=cache).logits
        for _ in range(2):
            ids = torch.cat((ids, logits[:, -1:].argmax(-1)), 1)
            logits = model(input_ids=ids[:, -1:], past_key_values=cache).logits
    prefix.store(cache, ids)
    assert ids.tolist()[0] == expected[0][0][: ids.shape[1]]
    cache = prefix.match(model, **prompts[1])
    assert cache.get_seq_length() == shared
    assert generate(model, prompts[1], past_key_values=cache).tolist() == expected[1]
    cache = prefix.match(model, **prompts[1])
    assert cache.get_seq_length() == prompts[1]["input_ids"].shape[1] - 1
    cache = prefix.match(model, **{**prompts[0], "input_ids": prompts[0]["input_ids"]})
    assert generate(model, prompts[0], past_key_values=cache, num_beams=2).shape[0] == 1
    whole = {"input_ids": ids, **without(prompts[0], "input_ids", "mm_token_type_ids")}
    assert prefix.match(model, **whole).get_seq_length() == ids.shape[1] - 1


def test_new_ids_behind_a_prefix_are_not_stored_under_a_wrong_name(model):
    prefix, (shared, prompts) = PrefixCache(page_tokens=PAGE), requests("text")
    generate(model, prompts[0], past_key_values=prefix.match(model, **prompts[0]))
    cache, mask = prefix.match(model, **prompts[1]), torch.ones_like(prompts[1]["input_ids"])
    new = {"input_ids": prompts[1]["input_ids"][:, shared:], "attention_mask": mask}
    expected = generate(model, prompts[1]).tolist()[0]
    answer = generate(model, new, past_key_values=cache)
    assert answer.tolist()[0] == expected[shared:]
    assert prefix.statistics().rows_held == 1
    prefix.store(cache, torch.tensor([expected]))
    assert prefix.statistics().rows_held == 2
    assert generate(model, prompts[1], past_key_values=prefix.match(model, **prompts[1])).tolist() == [expected]


@torch.no_grad()
def test_forward_goes_on_from_a_prefix(model):
    prefix, (shared, prompts) = PrefixCache(page_tokens=PAGE), requests("new_image")
    generate(model, prompts[0], past_key_values=prefix.match(model, **prompts[0]))
    cache, mask = prefix.match(model, **prompts[1]), torch.ones_like(prompts[1]["input_ids"])
    logits = model(**prompts[1], attention_mask=mask, past_key_values=cache).logits
    plain = model(**prompts[1]).logits
    assert (logits - plain[:, shared:]).abs().max() < 1e-4


def test_store_wants_what_was_matched(model):
    prefix, inputs = PrefixCache(page_tokens=PAGE), make_inputs(["text:6"])
    cache = prefix.match(model, **inputs)
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
    copied, dynamic, stranger = copy.deepcopy(cache), cache.to_dynamic(), PrefixCache()
    for wrong, message in (
        (lambda: stranger.store(copy.deepcopy(cache)), "not from this match"),
        (lambda: prefix.store(PagedKVCache(model.config)), "not from this match"),
        (lambda: prefix.store(dynamic), "not from this match"),
        (lambda: prefix.store(copy.deepcopy(cache), inputs["input_ids"] + 1), "do not begin with the prompts"),
        (lambda: prefix.store(copy.deepcopy(cache), inputs["input_ids"][:, :3]), "do not begin with the prompts"),
        (lambda: prefix.store(copy.deepcopy(cache), inputs["input_ids"].repeat(2, 1)), "the cache holds 1 rows"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            wrong()
        one_line(error.value)
    prefix.store(cache)
    assert prefix.statistics().rows_held == 1
    with pytest.raises(ValueError, match="was stored before"):
        prefix.store(cache)
    prefix.store(copied, inputs["input_ids"])
    assert prefix.statistics().rows_held == 1


@pytest.mark.parametrize("case", ["right_padding", "features", "training", "autocast"])
def test_what_has_no_prefix_is_refused_by_hand_and_plain_in_generate(case):
    model, prefix = make_pair("dense").ours, PrefixCache(page_tokens=PAGE)
    inputs = make_inputs(["text:2", "image:4x6", "text:2"], ["text:3"], mask=True)
    if case == "right_padding":
        inputs = make_inputs(["text:6"], ["text:3"], padding="right")
    elif case == "features":
        with torch.no_grad():
            encoded = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
        inputs = without(inputs, "pixel_values")
    elif case == "training":
        model.train()
    with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        with pytest.raises(ValueError, match="no prefix can be told") as error:
            prefix.match(model, **inputs)
        one_line(error.value)
        prefix.apply(model)
        given = {**inputs, "mm_encoder_outputs": {"image": encoded}} if case == "features" else inputs
        expected = without_it(model, prefix, given)
        assert generate(model, given).tolist() == expected
    assert prefix.statistics().rows_held == prefix.statistics().misses == 0


# --- When the model changes ---


def scale(model):
    with torch.no_grad():
        model.model.language_model.layers[1].mlp.up_proj.weight.mul_(1.1)


CHANGES = {
    "decoder": scale,
    "tower": lambda model: torch.nn.init.normal_(model.model.visual.merger.linear_fc2.bias),
    "loaded": lambda model: model.load_state_dict({k: v * 1.01 for k, v in model.state_dict().items()}),
    "replaced": lambda model: model.load_state_dict({k: v * 1.01 for k, v in model.state_dict().items()}, assign=True),
    "attention": lambda model: model.set_attn_implementation("eager"),
    "cast": lambda model: model.to(torch.float64),
}


@pytest.mark.parametrize("change", CHANGES)
def test_nothing_is_kept_when_the_model_changes(change):
    model, prefix = make_pair("dense").ours, PrefixCache(page_tokens=PAGE)
    inputs = make_inputs(["text:2", "image:4x6", "text:3"])
    for _ in range(2):
        generate(model, inputs, past_key_values=prefix.match(model, **inputs))
    CHANGES[change](model)
    expected = generate(model, inputs).tolist()
    assert generate(model, inputs, past_key_values=prefix.match(model, **inputs)).tolist() == expected
    assert (prefix.statistics().hits, prefix.statistics().rows_held) == (1, 1)
    (current,) = [pool for pool in prefix.pools.pools.values() if pool.dtype == model.dtype]
    gc.collect()
    assert current.statistics().bytes_held == prefix.statistics().bytes_held


def test_adapters_have_their_own_answers():
    peft = pytest.importorskip("peft")
    model, inputs = make_pair("dense").ours, make_inputs(["text:2", "image:4x6", "text:3"])
    plain = generate(model, inputs).tolist()
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, r=8, lora_alpha=64)
    adapted = peft.get_peft_model(model, config).eval()
    prefix = PrefixCache(page_tokens=PAGE)
    prefix.apply(model)
    changed = generate(adapted, inputs).tolist()
    assert changed != plain
    with adapted.disable_adapter():
        assert generate(adapted, inputs).tolist() == plain
    assert generate(adapted, inputs).tolist() == changed
    assert prefix.statistics().hits == 0


# --- Room ---


def test_the_least_recently_used_goes_first(model, prefix):
    chats = [make_inputs(["text:12"], seed=seed) for seed in range(3)]
    generate(model, chats[0], max_new_tokens=1)
    each = prefix.statistics().bytes_held
    prefix.revert(model)
    prefix = PrefixCache(page_tokens=PAGE, max_bytes=2 * each)
    prefix.apply(model)

    def known(index):
        before = prefix.statistics().hits
        generate(model, chats[index], max_new_tokens=1)
        assert prefix.statistics().bytes_held <= prefix.max_bytes
        return prefix.statistics().hits > before

    assert [known(index) for index in (0, 1, 0, 2)] == [False, False, True, False]
    assert [known(index) for index in (0, 2, 1)] == [True, True, False]
    assert (prefix.statistics().rows_held, prefix.statistics().rows_evicted) == (2, 2)
    prefix.revert(model)


def test_rows_that_share_tokens_share_pages(model, prefix):
    start = make_inputs(["image:12x12", "text:1"], seed=1)
    for seed in range(4):
        generate(model, concat_turns(start, make_inputs(["text:2"], seed=seed)), max_new_tokens=1)
        if not seed:
            first = prefix.statistics().bytes_held
    assert prefix.statistics().rows_held == 4
    assert prefix.statistics().bytes_held < 2 * first
    # Two that were computed at the same time, neither from the other, share in the end.
    plain = PrefixCache(page_tokens=PAGE)
    prompts = [concat_turns(start, make_inputs(["text:2"], seed=seed)) for seed in range(2)]
    for prompt, cache in [(prompt, plain.match(model, **prompt)) for prompt in prompts]:
        assert cache.get_seq_length() == 0
        generate(model, prompt, past_key_values=cache, max_new_tokens=1)
    del cache
    gc.collect()
    assert plain.statistics().bytes_held < 1.5 * first
    (pool,) = plain.pools.pools.values()
    assert pool.statistics().bytes_held == plain.statistics().bytes_held


def test_pages_go_back_when_all_is_dropped(model, prefix):
    _, prompts = requests("images")
    for prompt in prompts:
        for mode in ("greedy", "beams", "several_sequences"):
            generate(model, prompt, **MODES[mode])
    (pool,) = prefix.pools.pools.values()
    gc.collect()
    assert pool.statistics().bytes_held == prefix.statistics().bytes_held > 0
    held = generate(model, prompts[0], return_dict_in_generate=True)
    prefix.clear()
    assert prefix.statistics().bytes_held == prefix.statistics().rows_held == 0
    assert not any(holders.any() for holders in prefix._holders.values())
    assert generate(model, prompts[0]).tolist() == held.sequences.tolist()
    prefix.clear()
    gc.collect()
    pages = -(-(held.sequences.shape[1] - 1) // PAGE)
    assert pool.statistics().pages_held == 3 * pages  # those of the cache that came back
    del held
    gc.collect()
    assert pool.statistics().pages_held == 0 and not pool._references.any()


def test_a_full_pool_drops_what_is_kept_before_it_raises(model, prefix):
    prefix.revert(model)
    page = 2 * (PAGE + 1) * 2 * 16 * 4
    prefix = PrefixCache(page_tokens=PAGE, pool_bytes=3 * 5 * page)  # 3 layers of 20 tokens
    prefix.apply(model)
    try:
        prompts = [make_inputs(["text:12"], seed=seed) for seed in range(3)]
        for prompt in prompts:
            assert generate(model, prompt, max_new_tokens=5).tolist() == without_it(
                model, prefix, prompt, max_new_tokens=5
            )
        assert prefix.statistics().rows_evicted == 2 and prefix.statistics().rows_held == 1
        with pytest.raises(MemoryError, match="the pool is full") as error:
            generate(model, make_inputs(["text:25"], seed=5))
        one_line(error.value)
        gc.collect()
        assert generate(model, prompts[0], max_new_tokens=5).tolist() == without_it(
            model, prefix, prompts[0], max_new_tokens=5
        )
    finally:
        prefix.revert(model)


def test_no_memory_for_copies_is_no_hit(model, prefix):
    """Of rows that come padded, the copies do not fit beside the pages they are made of."""
    prefix.revert(model)
    page = 2 * (PAGE + 1) * 2 * 16 * 4
    prefix = PrefixCache(page_tokens=PAGE, pool_bytes=3 * 6 * page)
    prefix.apply(model)
    try:
        inputs = make_inputs(["text:12"], seed=1, mask=True)
        generate(model, inputs, max_new_tokens=1)
        padded = {
            "input_ids": torch.nn.functional.pad(inputs["input_ids"], (3, 0)),
            "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (3, 0)),
        }
        expected = without_it(model, prefix, padded, max_new_tokens=5)
        assert generate(model, padded, max_new_tokens=5).tolist() == expected
        assert (prefix.statistics().hits, prefix.statistics().misses) == (0, 2)
    finally:
        prefix.revert(model)


# --- Bad input ---


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_bytes": 0}, "max_bytes must be"),
        ({"page_tokens": 0}, "page_tokens must be"),
        ({"pool_bytes": -1}, "max_bytes must be"),
        ({"budget": 3}, "has no setting 'budget'"),
    ],
)
def test_settings_are_checked(given, message):
    with pytest.raises(ValueError, match=message) as error:
        PrefixCache(**given)
    one_line(error.value)


def test_a_model_has_one_of_it(model, prefix):
    with pytest.raises(ValueError, match="has a prefix cache already") as error:
        PrefixCache().apply(model)
    one_line(error.value)
    PrefixCache().revert(model)  # not the one that is there
    assert model.prefix_cache is prefix


def test_pictures_that_are_refused_leave_nothing_behind(model, prefix):
    inputs = make_inputs(["text:2", "image:4x6", "text:3"], seed=1)
    for bad in (
        {"pixel_values": inputs["pixel_values"] * torch.nan},
        {"pixel_values": inputs["pixel_values"][:-1]},
        {"image_grid_thw": torch.tensor([[1, 4, 8]])},
        {"image_grid_thw": torch.tensor([[0, 4, 6]])},
    ):
        with pytest.raises(ValueError) as plain:
            without_it(model, prefix, {**inputs, **bad})
        prefix.apply(model)
        for _ in range(2):
            with pytest.raises(ValueError) as error:
                generate(model, {**inputs, **bad})
            assert str(error.value) == str(plain.value)
    assert prefix.statistics().rows_held == 0
    assert generate(model, inputs).tolist() == without_it(model, prefix, inputs)


def test_an_error_while_decoding_leaves_the_rest_usable(model, prefix):
    _, prompts = requests("image")
    generate(model, prompts[0])
    before = prefix.statistics()

    def stop(*args, **kwargs):
        raise RuntimeError("stopped by the caller")

    with pytest.raises(RuntimeError, match="stopped by the caller"):
        generate(model, prompts[1], stopping_criteria=[stop])
    gc.collect()
    (pool,) = prefix.pools.pools.values()
    assert prefix.statistics().rows_held == before.rows_held
    assert pool.statistics().bytes_held == before.bytes_held
    assert generate(model, prompts[1]).tolist() == without_it(model, prefix, prompts[1])


def test_copies_are_empty(model, prefix):
    generate(model, make_inputs(["text:6"]))
    copied = copy.deepcopy(model).prefix_cache
    for other in (copied, pickle.loads(pickle.dumps(prefix))):
        assert other is not prefix and other.settings == prefix.settings
        assert other.statistics().rows_held == 0


# --- Threads ---


@pytest.mark.parametrize("max_bytes", [2**30, 40_000])
def test_threads_ask_at_once(model, prefix, max_bytes):
    prefix.revert(model)
    prefix = PrefixCache(page_tokens=PAGE, max_bytes=max_bytes)
    start = make_inputs(["text:3", "image:4x4"], seed=1)
    prompts = [concat_turns(start, make_inputs([f"text:{2 + seed}"], seed=seed)) for seed in range(4)]
    expected = [generate(model, prompt, max_new_tokens=12).tolist() for prompt in prompts]
    prefix.apply(model)
    found = {}

    def work(index):
        order = np.roll(np.arange(4), index)
        found[index] = {int(i): generate(model, prompts[i], max_new_tokens=12).tolist() for i in order}

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    prefix.revert(model)
    assert all(found[index] == dict(enumerate(expected)) for index in range(4))
    assert prefix.statistics().hits + prefix.statistics().misses == 16 and prefix.statistics().hits >= 8
    assert prefix.statistics().bytes_held <= max_bytes
    gc.collect()
    (pool,) = prefix.pools.pools.values()
    assert pool.statistics().bytes_held == prefix.statistics().bytes_held


# --- The trained checkpoint ---


def test_questions_to_the_trained_checkpoint():
    """Two questions about the same two pictures, then a third picture, as the processor makes them."""
    model = AutoModelForImageTextToText.from_pretrained("checkpoints/tiny", dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained("checkpoints/tiny")
    pictures = []
    for size, color in (((96, 64), "red"), ((64, 64), "blue"), ((128, 96), "green")):
        pictures.append(Image.new("RGB", size, "white"))
        ImageDraw.Draw(pictures[-1]).rectangle((8, 8, size[0] // 2, size[1] // 2), fill=color)

    def ask(count, *texts):
        content = [*({"type": "image"} for _ in range(2)), {"type": "text", "text": texts[0]}]
        chat = [{"role": "user", "content": content}]
        for text in texts[1:]:
            chat.append({"role": "assistant", "content": [{"type": "text", "text": "red and blue"}]})
            chat.append({"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]})
        text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        return dict(processor(text=[text], images=pictures[:count], return_tensors="pt"))

    prompts = [
        ask(2, "What colors are the shapes?"),
        ask(2, "How many pictures?"),
        ask(3, "How many pictures?", "And?"),
    ]
    expected = [model.generate(**prompt, max_new_tokens=12, do_sample=False).tolist() for prompt in prompts]
    prefix = PrefixCache()
    prefix.apply(model)
    answers = [model.generate(**prompt, max_new_tokens=12, do_sample=False).tolist() for prompt in prompts]
    assert answers == expected
    assert prefix.statistics().hits == 2
    pictures_end = [int(np.flatnonzero(p["mm_token_type_ids"][0].numpy())[-1]) for p in prompts[:2]]
    assert prefix.statistics().tokens_reused > sum(pictures_end)
