"""The evicting cache in a model: `generate()`, and logits against a full cache with the same entries hidden."""

import copy
import pickle
import threading

import pytest
import torch
from helpers import (
    IMAGE_TOKEN,
    MERGE,
    PAD_TOKEN,
    VIDEO_TOKEN,
    clone_inputs,
    concat_turns,
    make_inputs,
    make_pair,
    max_difference,
    one_line,
)
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import sdpa_mask

from qwen3_vl import EvictingKVCache, PagedKVCache, measure_layer_shares
from qwen3_vl.optim.cache.cache_evicting import EvictingCache
from qwen3_vl.optim.cache.eviction_calibration import shares_by_need


PAGE = 4
POLICIES = ("modality", "streaming", "h2o", "snapkv", "pyramid", "random")
# Small enough for prompts of some thirty tokens.
SMALL = {"sink_tokens": 1, "window_tokens": 3, "observation_tokens": 3, "slack_tokens": 2, "pool_tokens": 3}
SMALL["merge"] = False  # the references hide entries, and do not merge any
TIGHT = {**SMALL, "visual_share": 0.5, "max_tokens": 16}
NOTHING = {"max_tokens": 500, "visual_share": 1.0}
PROMPTS = {
    "text": [["text:23"]],
    "images_and_video": [["text:2", "image:8x8", "text:3", "video:2x4x8", "image:4x6", "text:6"]],
    "batch": [
        ["text:2", "image:8x12", "text:7"],
        ["text:19"],
        ["text:1", "video:2x8x4", "text:4", "image:4x4", "text:3"],
    ],
}
MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.3, "top_k": 30},
    "several_sequences": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"num_beams": 3},
    "chunked_prefill": {"prefill_chunk_size": 5},
    "chunked_prefill_and_beams": {"prefill_chunk_size": 7, "num_beams": 2},
}


@pytest.fixture(scope="module")
def shared():
    """A dense model of which tests change nothing but the attention."""
    return make_pair("dense").ours


@pytest.fixture(autouse=True)
def plain_again(shared):
    yield
    shared.set_attn_implementation("sdpa")


def prompt(name, seed=0, padding="left"):
    return make_inputs(*PROMPTS[name], seed=seed, mask=True, padding=padding)


def evicting(model, policy="modality", **settings):
    return EvictingKVCache(model.config, policy, page_tokens=PAGE, **(settings or TIGHT))


def generate(model, inputs, **options):
    torch.manual_seed(0)
    return model.generate(**clone_inputs(inputs), **{"max_new_tokens": 11, "do_sample": False, **options})


# --- Nothing evicted: the tokens of a dynamic cache ---


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("form", PROMPTS)
@pytest.mark.parametrize("mode", MODES)
def test_the_tokens_of_a_dynamic_cache(shared, form, mode, padding):
    if padding == "right" and form != "batch":
        pytest.skip("nothing is padded")
    inputs = prompt(form, padding=padding)
    full = {"return_dict_in_generate": True, "output_logits": True, **MODES[mode]}
    expected = generate(shared, inputs, past_key_values=DynamicCache(config=shared.config), **full)
    cache = evicting(shared, "modality", **NOTHING)
    actual = generate(shared, inputs, past_key_values=cache, **full)
    assert actual.sequences.tolist() == expected.sequences.tolist()
    for ours, theirs in zip(actual.logits, expected.logits, strict=True):
        assert max_difference(ours, theirs) < 1e-4
    assert cache.get_seq_length() == expected.past_key_values.get_seq_length() and not cache.evicted


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("attention", ["eager", "qwen3_vl_exact", "qwen3_vl_memory_efficient"])
def test_every_policy_and_attention_agree_as_long_as_all_fits(shared, policy, attention):
    inputs = prompt("batch")
    expected = generate(shared, inputs)
    shared.set_attn_implementation({"text_config": attention})
    assert generate(shared, inputs, past_key_values=evicting(shared, policy, **NOTHING)).tolist() == expected.tolist()


# --- After eviction: a full cache with exactly the evicted entries hidden ---

HIDDEN = "hides_entries"


class FullModel:
    """The model in float64 on a complete cache, where each KV head of each layer sees only what it is told."""

    def __init__(self, model):
        self.model, self.cache, self.shown = copy.deepcopy(model).double(), DynamicCache(), {}
        AttentionInterface.register(HIDDEN, self.attend)
        AttentionMaskInterface.register(
            HIDDEN, lambda **kwargs: sdpa_mask(**{**kwargs, "allow_is_causal_skip": False})
        )
        self.model.set_attn_implementation({"text_config": HIDDEN})

    def attend(self, module, query, key, value, attention_mask, scaling=None, **kwargs):
        group, shown = module.num_key_value_groups, self.shown[module.layer_idx]  # (B, KV heads, history)
        shown = F.pad(shown, (0, key.shape[2] - shown.shape[2]), value=True)
        key, value, shown = (x.repeat_interleave(group, dim=1) for x in (key, value, shown))
        seen = attention_mask & shown[:, :, None]
        weights = (query @ key.transpose(2, 3) * scaling).masked_fill(~seen, -torch.inf).softmax(-1)
        return (weights.nan_to_num() @ value).transpose(1, 2), weights

    @torch.no_grad()
    def forward(self, positions, inputs):
        """`positions`: of every layer the tokens that its heads hold, (B, KV heads or 1, entries)."""
        seen = self.cache.get_seq_length()
        for layer, kept in enumerate(positions):
            shown = torch.zeros(len(kept), 2, seen + 1, dtype=torch.bool)
            shown.scatter_(2, torch.where(kept < 0, seen, kept).expand(-1, 2, -1), True)
            self.shown[layer] = shown[..., :seen]
        return self.model(**as_double(inputs), past_key_values=self.cache).logits


@pytest.fixture
def full_model():
    yield FullModel
    for table in (AttentionInterface, AttentionMaskInterface):
        table._global_mapping.pop(HIDDEN, None)


def as_double(inputs):
    return {key: x.double() if x.is_floating_point() else x for key, x in clone_inputs(inputs).items()}


@torch.no_grad()
def run_both(model, cache, reference, inputs):
    """One forward of both; the largest difference of the logits of real tokens."""
    held = []
    prepare = type(cache).prepare_forward

    def recorded(*args, **kwargs):
        prepare(cache, *args, **kwargs)
        held.extend(layer.kept_positions for layer in cache.layers)

    cache.prepare_forward = recorded
    logits = model(**clone_inputs(inputs), past_key_values=cache).logits
    del cache.prepare_forward
    if not cache.layers[0].rows or not held[0].numel():
        held = [torch.zeros(len(logits), 1, 0, dtype=torch.long)] * len(cache.layers)
    expected = reference.forward(held, inputs)
    mask = inputs.get("attention_mask")
    real = torch.ones(logits.shape[:2]).bool() if mask is None else mask[:, -logits.shape[1] :].bool()
    return max_difference(logits[real], expected[real])


def steps_of(inputs, extra, rows):
    """The prompt, single tokens, a turn with a picture, and single tokens again, as forwards with whole masks."""
    mask = inputs["attention_mask"]

    def whole(part):
        nonlocal mask
        own = part.get("attention_mask", torch.ones_like(part["input_ids"]))
        mask = torch.cat((mask, own), dim=1)
        return {**part, "attention_mask": mask}

    yield inputs
    singles = make_inputs(*[["text:7"]] * rows, seed=5)["input_ids"]
    for token in singles.split(1, dim=1):
        yield whole({"input_ids": token})
    yield whole(make_inputs(*[extra] * rows, seed=6, mask=True))
    for token in singles[:, :4].split(1, dim=1):
        yield whole({"input_ids": token})


@pytest.mark.parametrize("attention", ["sdpa", "eager", "qwen3_vl_exact"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("form", ["images_and_video", "batch"])
def test_logits_of_a_full_cache_with_the_evicted_entries_hidden(shared, full_model, form, policy, attention):
    inputs = prompt(form)
    shared.set_attn_implementation({"text_config": attention})
    cache, reference = evicting(shared, policy), full_model(shared)
    entries = []
    for part in steps_of(inputs, ["text:2", "image:4x6", "text:4"], len(inputs["input_ids"])):
        assert run_both(shared, cache, reference, part) < 1e-4
        entries.append(cache.layers[1].entries)
    assert cache.evicted and max(entries) <= 16 * (2 if policy == "pyramid" else 1) + 3
    assert cache.get_seq_length() == reference.cache.get_seq_length()


def test_right_padding_and_layers_with_different_numbers(shared, full_model):
    inputs = prompt("batch", padding="right")
    cache, reference = evicting(shared, "pyramid", **{**SMALL, "visual_share": 0.4}), full_model(shared)
    for part in steps_of(inputs, ["text:3"], 3):
        assert run_both(shared, cache, reference, part) < 1e-4
    assert len({layer.entries for layer in cache.layers}) == 3


def row_of(part, row, padding):
    """The inputs of one row of a batch that is padded by `padding` tokens on the left, without them."""
    ids = part["input_ids"]
    skip = padding if ids.shape[1] > padding and (ids[row, :padding] == PAD_TOKEN).all() else 0
    own = {"input_ids": ids[row : row + 1, skip:], "attention_mask": part["attention_mask"][row : row + 1, padding:]}
    for token, grids, pixels in (
        (IMAGE_TOKEN, "image_grid_thw", "pixel_values"),
        (VIDEO_TOKEN, "video_grid_thw", "pixel_values_videos"),
    ):
        patches = MERGE**2 * (ids == token).sum(1)
        before, here = int(patches[:row].sum()), int(patches[row])
        if not here:
            continue
        ends = part[grids].prod(-1).cumsum(0)
        own[grids] = part[grids][(ends > before) & (ends <= before + here)]
        own[pixels] = part[pixels][before : before + here]
    return own


@pytest.mark.parametrize("policy", POLICIES)
def test_a_row_of_a_padded_batch_keeps_what_it_keeps_alone(shared, policy):
    inputs = prompt("batch")
    parts, together = list(steps_of(inputs, ["text:2", "image:4x6", "text:4"], 3)), evicting(shared, policy)
    with torch.no_grad():
        expected = [shared(**clone_inputs(part), past_key_values=together).logits[:, -1] for part in parts]
    for row, padding in enumerate((inputs["attention_mask"] == 0).sum(1).tolist()):
        alone = evicting(shared, policy)
        for part, logits in zip(parts, expected, strict=True):
            with torch.no_grad():
                found = shared(**clone_inputs(row_of(part, row, padding)), past_key_values=alone).logits[:, -1]
            assert max_difference(found, logits[row : row + 1]) < 1e-4
        for one, other in zip(alone.layers, together.layers, strict=True):
            own, kept = one.kept_positions[0], other.kept_positions[row]
            gaps = kept.shape[1] - own.shape[1]
            assert torch.equal(kept[:, gaps:] - padding, own) and bool((kept[:, :gaps] < 0).all())


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("mode", MODES)
def test_generate_with_eviction_runs_in_every_mode(shared, policy, mode):
    cache = evicting(shared, policy)
    output = generate(shared, prompt("batch"), past_key_values=cache, min_new_tokens=11, **MODES[mode])
    assert cache.evicted and cache.get_seq_length() == output.shape[1] - 1
    assert max(layer.entries for layer in cache.layers) <= 2 * 16 + 3


def test_beams_are_reordered_with_what_they_kept(shared):
    """Beam search by hand, on rows that are repeated and reordered, gives what `generate()` finds."""
    inputs = prompt("images_and_video")
    shares = {**SMALL, "visual_share": 0.25}  # by the prompt alone, so that equal rows keep equal entries
    first = generate(shared, inputs, past_key_values=evicting(shared, **shares), num_beams=3)
    sequences, scores = inputs["input_ids"].repeat(3, 1), torch.tensor([0.0, -1e9, -1e9])
    cache_of_prompt = evicting(shared, **shares)
    with torch.no_grad():
        logits = shared(**clone_inputs(inputs), past_key_values=cache_of_prompt).logits[:, -1].repeat(3, 1)
        cache_of_prompt.batch_repeat_interleave(3)
        mask = inputs["attention_mask"].repeat(3, 1)
        for _ in range(10):
            total = scores[:, None] + logits.log_softmax(-1)
            scores, best = total.flatten().topk(3)
            parents, tokens = best // total.shape[1], best % total.shape[1]
            cache_of_prompt.reorder_cache(parents)
            sequences = torch.cat((sequences[parents], tokens[:, None]), dim=1)
            mask = F.pad(mask, (0, 1), value=1)
            logits = shared(input_ids=tokens[:, None], attention_mask=mask, past_key_values=cache_of_prompt).logits[
                :, -1
            ]
        total = scores[:, None] + logits.log_softmax(-1)
        best = total.flatten().argmax()
        found = torch.cat((sequences[best // total.shape[1]], (best % total.shape[1])[None]))
    if 1 not in found[inputs["input_ids"].shape[1] :]:
        assert found.tolist() == first[0].tolist()


# --- Conversations ---


def conversation(model, cache, seed, turns=3):
    """Greedy answers of some turns with pictures, one step at a time: yields after every forward."""
    mask, answers = None, []
    for turn in range(turns):
        part = make_inputs(["text:2", "image:4x6", f"text:{3 + turn}"], seed=10 * seed + turn, mask=True)
        for _ in range(4):
            mask = part["attention_mask"] if mask is None else F.pad(mask, (0, part["input_ids"].shape[1]), value=1)
            with torch.no_grad():
                logits = model(**{**part, "attention_mask": mask}, past_key_values=cache).logits
            answers.append(int(logits[0, -1].argmax()))
            part = {"input_ids": logits[:, -1:].argmax(-1)}
            yield answers
    yield answers


def finish(steps):
    return list(steps)[-1]


CACHES = {
    "dynamic": lambda model: DynamicCache(config=model.config),
    "paged": lambda model: PagedKVCache(model.config, page_tokens=PAGE),
    **{policy: lambda model, policy=policy: evicting(model, policy) for policy in POLICIES},
}


@pytest.mark.parametrize("name", CACHES)
def test_two_conversations_stepped_alternately(shared, name):
    alone = [list(finish(conversation(shared, CACHES[name](shared), seed))) for seed in (1, 2)]
    running = [conversation(shared, CACHES[name](shared), seed) for seed in (1, 2)]
    found = [[], []]
    for steps in zip(*running, strict=True):
        found = [list(step) for step in steps]
    assert found == alone and alone[0] != alone[1]


@pytest.mark.parametrize("name", CACHES)
def test_two_conversations_in_two_threads(shared, name):
    alone = [list(finish(conversation(shared, CACHES[name](shared), seed))) for seed in (1, 2)]
    found = {}

    def work(seed):
        found[seed] = list(finish(conversation(shared, CACHES[name](shared), seed)))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[1], found[2]] == alone


def test_generate_goes_on_with_a_new_picture_and_the_whole_conversation(shared):
    first = prompt("images_and_video")
    second = make_inputs(["text:2", "image:4x6", "text:3"], seed=4, mask=True)
    cache = evicting(shared)
    with torch.no_grad():
        shared(**clone_inputs(first), past_key_values=cache)
    forked = copy.deepcopy(cache)
    whole = concat_turns(first, second)
    expected = generate(shared, whole, past_key_values=cache)[0, whole["input_ids"].shape[1] :]
    mask = whole["attention_mask"]
    found = generate(shared, {**second, "attention_mask": mask}, past_key_values=forked)
    assert found[0, second["input_ids"].shape[1] :].tolist() == expected.tolist()
    cache.reset()
    assert cache.get_seq_length() == 0 and not cache.evicted
    again = generate(shared, first, past_key_values=cache)
    assert again.tolist() == generate(shared, first, past_key_values=evicting(shared)).tolist()


def test_a_copy_goes_its_own_way(shared):
    inputs = prompt("batch")
    cache = evicting(shared, "h2o")
    with torch.no_grad():
        shared(**clone_inputs(inputs), past_key_values=cache)
    copied, mask = copy.deepcopy(cache), F.pad(inputs["attention_mask"], (0, 1), value=1)
    step = {"input_ids": torch.tensor([[20], [30], [40]]), "attention_mask": mask}
    with torch.no_grad():
        first = shared(**step, past_key_values=cache).logits
        assert copied.get_seq_length() == cache.get_seq_length() - 1
        assert torch.equal(shared(**step, past_key_values=copied).logits, first)
    assert copied.notes is not cache.notes and copied.layers[0].notes is copied.notes


@pytest.mark.parametrize("policy", ["modality", "h2o"])
def test_rows_move_with_their_notes(shared, policy):
    """Selected, repeated and reordered rows answer as they would have alone."""
    inputs, rows = prompt("batch"), torch.tensor([2, 0, 0])
    cache = evicting(shared, policy)
    with torch.no_grad():
        shared(**clone_inputs(inputs), past_key_values=cache)
        mask = F.pad(inputs["attention_mask"], (0, 1), value=1)
        token = torch.tensor([[20], [30], [40]])
        expected = shared(input_ids=token, attention_mask=mask, past_key_values=copy.deepcopy(cache)).logits
        cache.batch_select_indices(rows)
        found = shared(input_ids=token[rows], attention_mask=mask[rows], past_key_values=cache).logits
    assert max_difference(found, expected[rows]) < 1e-5


# --- Gradients, copies, conversions, refusals ---


def test_training_in_one_forward_and_not_through_the_history():
    model, inputs = make_pair("dense").ours, prompt("text")
    plain = model(**clone_inputs(inputs)).logits.sum()
    plain.backward()
    expected = model.model.language_model.layers[0].self_attn.k_proj.weight.grad.clone()
    model.zero_grad()
    cache = evicting(model)
    model(**clone_inputs(inputs), past_key_values=cache).logits.sum().backward()
    assert max_difference(model.model.language_model.layers[0].self_attn.k_proj.weight.grad, expected) < 1e-3
    more = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"].repeat(1, 2)}
    with pytest.raises(RuntimeError, match="no gradients of the history"):
        model(**more, past_key_values=cache).logits.sum().backward()


def test_conversion_both_ways(shared):
    inputs = prompt("batch")
    dynamic = DynamicCache(config=shared.config)
    with torch.no_grad():
        shared(**clone_inputs(inputs), past_key_values=dynamic)
    converted = EvictingKVCache.from_dynamic(dynamic, shared.config, page_tokens=PAGE, **NOTHING)
    back = converted.to_dynamic()
    assert type(back).__name__ == "DynamicCache" and not hasattr(back, "notes")
    for ours, theirs in zip(back.layers, dynamic.layers, strict=True):
        assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)
    step = {"input_ids": torch.tensor([[20], [30], [40]])}
    step["attention_mask"] = F.pad(inputs["attention_mask"], (0, 1), value=1)
    with torch.no_grad():
        logits = [shared(**step, past_key_values=cache).logits for cache in (converted, back, dynamic)]
    assert max_difference(logits[0], logits[2]) < 1e-5 and max_difference(logits[1], logits[2]) < 1e-5


@pytest.mark.parametrize("policy", POLICIES)
def test_a_converted_cache_evicts_as_it_goes_on(shared, policy, full_model):
    inputs, reference = prompt("batch"), full_model(shared)
    dynamic = DynamicCache(config=shared.config)
    with torch.no_grad():
        shared(**clone_inputs(inputs), past_key_values=dynamic)
        reference.forward([torch.zeros(3, 1, 0).long()] * 3, inputs)
    cache = EvictingKVCache.from_dynamic(dynamic, shared.config, policy=policy, page_tokens=PAGE, **TIGHT)
    parts = list(steps_of(inputs, ["text:3"], 3))[1:]
    for part in parts:
        assert run_both(shared, cache, reference, part) < 1e-4
    assert cache.evicted


def test_after_an_eviction_there_is_no_plain_cache(shared):
    cache = evicting(shared)
    with torch.no_grad():
        shared(**prompt("images_and_video"), past_key_values=cache)
    with pytest.raises(ValueError, match="has evicted some of the") as error:
        cache.to_dynamic()
    one_line(error.value)
    with pytest.raises(TypeError, match="cannot be pickled") as error:
        pickle.dumps(cache)
    one_line(error.value)
    with pytest.raises(ValueError, match="cannot go back to what it let go of") as error:
        cache.crop(-1)
    one_line(error.value)
    cache.crop(0)


@pytest.mark.parametrize("way", ["assistant", "prompt_lookup", "profile"])
def test_assisted_decoding_is_refused_before_anything_runs(shared, way):
    options = {"prompt_lookup_num_tokens": 2}
    if way == "assistant":
        options = {"assistant_model": make_pair("dense", text={"num_hidden_layers": 2, "mlp_only_layers": []}).ours}
    model, cache = shared, evicting(shared)
    if way == "profile":
        model = make_pair("dense").ours
        model.active_techniques, cache = [EvictingCache(**TIGHT)], None
    with pytest.raises(ValueError, match="takes tokens back, which EvictingKVCache cannot do") as error:
        generate(model, prompt("text"), past_key_values=cache, **options)
    assert "PagedKVCache" in one_line(error.value)
    assert cache is None or cache.get_seq_length() == 0


def test_other_uses_that_cannot_be_right_are_refused(shared):
    inputs = prompt("text")
    ids = inputs["input_ids"]
    packed = torch.cat((torch.arange(10), torch.arange(13)))[None].expand(4, 1, -1)
    changed = inputs["attention_mask"].clone()
    changed[0, 4] = 0
    cache = evicting(shared)
    with torch.no_grad():
        with pytest.raises(ValueError, match="rows are packed, which EvictingKVCache does not take") as error:
            shared(input_ids=ids, position_ids=packed, past_key_values=cache)
        one_line(error.value)
        with pytest.raises(ValueError, match=r"attention_mask of shape \(1, 1, 23, 23\) does not fit") as error:
            shared(input_ids=ids, attention_mask=torch.ones(1, 1, 23, 23).bool(), past_key_values=cache)
        one_line(error.value)
        assert cache.get_seq_length() == 0
        shared(**clone_inputs(inputs), past_key_values=cache)
        before = [layer.kept_positions for layer in cache.layers]
        more = {"input_ids": ids[:, :2], "past_key_values": cache}
        with pytest.raises(ValueError, match="differs from earlier ones in the 23 tokens") as error:
            shared(**more, attention_mask=F.pad(changed, (0, 2), value=1))
        one_line(error.value)
        with pytest.raises(ValueError, match="the cache holds 1 rows but the batch has 2") as error:
            shared(input_ids=ids[:, :2].expand(2, -1), past_key_values=cache)
        one_line(error.value)
        with pytest.raises(ValueError, match="was not told what they are") as error:
            cache.update(torch.zeros(1, 2, 1, 16), torch.zeros(1, 2, 1, 16), 0)
        one_line(error.value)
        assert all(torch.equal(x, layer.kept_positions) for x, layer in zip(before, cache.layers, strict=True))
        shared(**more)


def test_a_stock_model_cannot_use_it_silently():
    pair = make_pair("dense")
    with pytest.raises(ValueError, match="use the models of this package"):
        pair.stock.generate(**prompt("text"), past_key_values=evicting(pair.stock), max_new_tokens=3)


@pytest.mark.parametrize("attention", ["qwen3_vl_dynamic_sparse", "qwen3_vl_block_sparse", "qwen3_vl_adaptive"])
def test_other_attention_reads_what_stayed(shared, attention):
    """Sparse attention that computes everything at this length, on pages of kept entries."""
    inputs = prompt("batch")
    expected = generate(shared, inputs, past_key_values=evicting(shared))
    shared.set_attn_implementation({"text_config": attention})
    assert generate(shared, inputs, past_key_values=evicting(shared)).tolist() == expected.tolist()


def test_page_bounds_are_those_of_the_kept_entries(shared):
    cache = evicting(shared)
    shared.set_attn_implementation({"text_config": "qwen3_vl_exact"})
    with torch.no_grad():
        shared(**prompt("batch"), past_key_values=cache)
    for layer in cache.layers:
        keys, (low, high) = layer.dense()[0], layer.reader.key_bounds()
        pages = keys.split(PAGE, dim=2)
        assert torch.equal(low, torch.stack([x.amin(2) for x in pages], 2))
        assert torch.equal(high, torch.stack([x.amax(2) for x in pages], 2))


# --- Composed ---

PACKED = {"store": "quantized", "store_options": {"bits": 8, "group_size": 32, "residual_tokens": 2}}


@pytest.mark.parametrize("attention", ["sdpa", "qwen3_vl_exact"])
def test_what_stays_may_be_quantized(shared, attention):
    """The entries of a paged store up to the error of 8 bits, which single tokens and a second turn read."""
    inputs = make_inputs(["text:30", "image:16x16", "text:9"], ["text:50"], mask=True)
    settings = {**SMALL, "max_tokens": 70, "visual_share": 0.5}
    shared.set_attn_implementation({"text_config": attention})
    plain, packed = (EvictingKVCache(shared.config, **settings, **options) for options in ({}, PACKED))
    for part in steps_of(inputs, ["text:40"], 2):
        with torch.no_grad():
            logits = [shared(**clone_inputs(part), past_key_values=cache).logits[:, -1] for cache in (plain, packed)]
        assert max_difference(*logits) < 0.1 * logits[0].abs().max()
    assert packed.evicted and [layer.entries for layer in packed.layers] == [layer.entries for layer in plain.layers]
    for one, other in zip(plain.layers, packed.layers, strict=True):
        assert type(other.reader).__name__ == "QuantizedLayer"
        assert one.layout == other.layout


def test_eviction_and_packing_save_together(shared):
    held = []
    for options in ({}, PACKED):
        cache = EvictingKVCache(shared.config, "streaming", max_tokens=640, **options)
        cache.prepare_forward(1, 900)
        states = torch.randn(1, 2, 900, 16)
        for index in range(3):
            cache.update(states, states, index)
        held.append(cache.held_bytes)
    full = 3 * 2 * states.nbytes
    assert held[0] < 0.75 * full and held[1] < 0.6 * held[0]


@pytest.mark.parametrize("mode", ["greedy", "beams", "chunked_prefill"])
def test_generate_on_a_quantized_store(shared, mode):
    shared.set_attn_implementation({"text_config": "qwen3_vl_exact"})
    cache = EvictingKVCache(shared.config, "snapkv", **TIGHT, **PACKED)
    output = generate(shared, prompt("batch"), past_key_values=cache, min_new_tokens=11, **MODES[mode])
    assert cache.evicted and cache.get_seq_length() == output.shape[1] - 1


def test_merging_changes_pictures_alone_and_keeps_the_numbers(shared):
    inputs, caches = prompt("batch"), []
    for merge in (True, False):
        caches.append(evicting(shared, **{**SMALL, "visual_share": 0.25, "merge": merge}))
        with torch.no_grad():
            shared(**clone_inputs(inputs), past_key_values=caches[-1])
    merged, dropped = (cache.layers[0] for cache in caches)
    assert torch.equal(merged.kept_positions, dropped.kept_positions)
    runs = caches[0].notes.runs[:, None].expand(-1, 2, -1).gather(2, merged.kept_positions.clamp(min=0))
    same = (merged.dense()[1] == dropped.dense()[1]).all(-1)
    text = (runs == 0) & (merged.kept_positions >= 0)
    assert same[text].all() and not same[runs > 0].all()


# --- Layers measured ---


def test_layers_that_matter_more_get_larger_shares():
    model = make_pair("dense").ours
    layouts = ["text:3", "image:16x16", "text:4"], ["text:5", "image:12x12", "text:6"]
    batches = [make_inputs(*layouts, seed=seed, mask=True) for seed in (0, 1)]
    with torch.no_grad():  # the middle layer's attention is switched off, so its entries do not matter
        model.model.language_model.layers[1].self_attn.o_proj.weight.zero_()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    shares = measure_layer_shares(model, batches, 0.25, new_tokens=6, **{**SMALL, "merge": True})
    assert shares[1] == 0.025 and min(shares[0], shares[2]) > 0.1
    assert sum(shares) / 3 == pytest.approx(0.25, abs=1e-3)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    cache = EvictingKVCache(model.config, layer_shares=shares, page_tokens=PAGE, **SMALL)
    with torch.no_grad():
        model(**batches[0], past_key_values=cache)
    assert cache.layers[1].entries < min(cache.layers[0].entries, cache.layers[2].entries)


def test_answers_of_one_token_tell_nothing(shared):
    with pytest.raises(ValueError, match="gave no answer of two tokens") as error:
        measure_layer_shares(shared, [prompt("images_and_video")], new_tokens=1)
    one_line(error.value)


@pytest.mark.parametrize("needs", [[1, 2, 3, 4], [0, 0, 0, 0], [0, 0, 0, 9], [1e-9, 1, 1, 1]])
@pytest.mark.parametrize("mean", [0.05, 0.25, 0.6, 1.0])
def test_shares_have_the_mean_that_was_asked_for(needs, mean):
    shares = shares_by_need(needs, mean)
    assert sum(shares) / 4 == pytest.approx(mean, abs=1e-3)
    assert all(0.1 * mean - 1e-4 <= share <= 1 for share in shares)
    assert list(shares) == sorted(shares)


# --- The technique ---


def test_the_technique_gives_every_request_an_evicting_cache():
    model, inputs = make_pair("dense").ours, prompt("batch")
    expected = generate(model, inputs)
    technique = EvictingCache(config=model.config, policy="snapkv", page_tokens=PAGE, **TIGHT)
    assert (technique.name, technique.exact) == ("evicting_cache", False)
    technique.apply(model)
    model.active_techniques = [technique]
    actual = generate(model, inputs, return_dict_in_generate=True).past_key_values
    assert isinstance(actual, EvictingKVCache) and actual.policy == "snapkv" and actual.evicted
    assert actual.layers[0].reader.pool.page_tokens == PAGE
    technique.revert(model)
    model.active_techniques = []
    assert torch.equal(generate(model, inputs), expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"policy": "snapkw"}, "did you mean 'snapkv'"),
        ({"budget": 3}, "has no setting 'budget'"),
        ({"visual_share": 0}, "visual_share must be over 0"),
        ({"max_tokens": 0}, "max_tokens must be a whole number of at least 1"),
        ({"max_tokens": 30}, "leaves no room beside 4 sink and 32 window tokens"),
        ({"store": "disk"}, "store must be one of"),
    ],
)
def test_settings_of_the_technique(settings, message):
    with pytest.raises(ValueError, match=message) as error:
        EvictingCache(**settings)
    one_line(error.value)
