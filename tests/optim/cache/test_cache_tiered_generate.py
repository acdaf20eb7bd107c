"""`generate()` on the tiered cache, token by token against `DynamicCache`, and the technique that puts it there."""

import copy
import threading

import pytest
import torch
import transformers
from helpers import clone_inputs, concat_turns, make_inputs, make_pair, max_difference
from PIL import Image, ImageDraw
from transformers import DynamicCache, StaticCache

import qwen3_vl
from qwen3_vl.optim.cache.cache_tiered import HierarchicalMemoryCompression, TieredKVCache
from qwen3_vl.optim.cache.tier_segments import HOT, SLOW
from qwen3_vl.optim.cache.tier_storage import FileStorage, TierFileError
from qwen3_vl.optim.registry_optim import techniques_of


EXACT = {"hot_tokens": 8, "int8_tokens": 0, "int4_tokens": 0, "segment_tokens": 4}
ALL_TIERS = {"hot_tokens": 64, "int8_tokens": 32, "int4_tokens": 32, "segment_tokens": 32}
PROMPTS = {
    "images_and_video": [["text:2", "image:4x4", "text:1", "video:2x4x4", "image:2x6", "text:2"]],
    "left_padded": [["text:2", "image:4x6", "text:4"], ["text:6"], ["text:1", "video:2x4x4", "text:9", "image:2x2"]],
}
MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.3, "top_k": 30},
    "several_sequences": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3},
    "beams_and_several_sequences": {"num_beams": 4, "num_return_sequences": 2, "early_stopping": True},
    "chunked_prefill": {"prefill_chunk_size": 7},
}


@pytest.fixture(scope="module", params=["sdpa", "qwen3_vl_exact"])
def shared(request):
    """A dense model that no test changes."""
    model = make_pair("dense").ours
    model.set_attn_implementation(request.param)
    return model


def prompt(name, seed=0):
    return make_inputs(*PROMPTS[name], seed=seed, mask=True)


def generate(model, inputs, **options):
    torch.manual_seed(0)
    options = {"max_new_tokens": 11, "do_sample": False, **options}
    return model.generate(**clone_inputs(inputs), **options)


def assert_same_tokens(model, inputs, **options):
    full = {"return_dict_in_generate": True, "output_logits": True, **options}
    expected = generate(model, inputs, past_key_values=DynamicCache(config=model.config), **full)
    cache = TieredKVCache(model.config, **EXACT)
    actual = generate(model, inputs, past_key_values=cache, **full)
    assert actual.sequences.tolist() == expected.sequences.tolist()
    for ours, theirs in zip(actual.logits, expected.logits, strict=True):
        assert max_difference(ours, theirs) < 1e-4
    assert actual.past_key_values is cache
    assert cache.get_seq_length() == expected.past_key_values.get_seq_length() > inputs["input_ids"].shape[1]
    assert SLOW in cache.layers[0].segment_tiers and cache.layers[2].segment_tiers.count(HOT) == 1


@pytest.mark.parametrize("form", PROMPTS)
@pytest.mark.parametrize("mode", MODES)
def test_the_tokens_of_a_dynamic_cache(shared, form, mode):
    assert_same_tokens(shared, prompt(form), **MODES[mode])


def test_assisted_decoding(shared):
    helper = make_pair("dense", seed=1, text={"num_hidden_layers": 2, "mlp_only_layers": []}).ours
    # Helpers of the same lineage agree at times, so both taken and refused candidates occur.
    helper.load_state_dict(shared.state_dict(), strict=False)
    assert_same_tokens(shared, prompt("images_and_video"), max_new_tokens=14, assistant_model=helper)


@pytest.mark.parametrize("mode", ["greedy", "beams", "chunked_prefill"])
def test_quantized_tiers_stay_near(shared, mode):
    """What is read by tiers is what `to_dynamic` says it is."""
    inputs = make_inputs(["text:60", "image:4x6", "text:70"], ["text:90"], mask=True)
    options = {**MODES[mode], "max_new_tokens": 40, "return_dict_in_generate": True, "output_logits": True}
    cache = TieredKVCache(shared.config, **ALL_TIERS)
    generate(shared, inputs, past_key_values=cache, **options)
    assert set(cache.layers[1].segment_tiers) == {0, 1, 2, 3}
    copied, exact = copy.deepcopy(cache), cache.to_dynamic()
    rows, seen = cache.layers[0].state.rows, cache.get_seq_length()
    ids, mask = torch.full((rows, 1), 17), torch.ones(rows, seen + 1, dtype=torch.long)
    with torch.no_grad():
        logits = [shared(input_ids=ids, attention_mask=mask, past_key_values=x).logits for x in (copied, exact)]
    assert max_difference(*logits) < 1e-4


def test_two_conversations_alternate_and_threads(shared):
    prompts = [make_inputs(["text:3", "image:4x4", f"text:{15 + seed}"], seed=seed, mask=True) for seed in range(3)]
    options = {"max_new_tokens": 20, "do_sample": False}
    expected = [shared.generate(**inputs, **options).tolist() for inputs in prompts]
    caches = [TieredKVCache(shared.config, **EXACT) for _ in prompts]
    ids = [inputs["input_ids"] for inputs in prompts]
    for _ in range(20):
        for index, cache in enumerate(caches):
            whole = {**prompts[index], "input_ids": ids[index], "max_new_tokens": 1}
            whole["attention_mask"] = torch.ones_like(ids[index])
            extra = ids[index].shape[1] - prompts[index]["input_ids"].shape[1]
            whole["mm_token_type_ids"] = torch.nn.functional.pad(prompts[index]["mm_token_type_ids"], (0, extra))
            ids[index] = shared.generate(**whole, past_key_values=cache, do_sample=False)
    assert [x.tolist() for x in ids] == expected
    found = {}

    def work(index):
        cache = TieredKVCache(shared.config, **EXACT)
        found[index] = shared.generate(**prompts[index], past_key_values=cache, **options).tolist()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[index] for index in range(3)] == expected


@pytest.mark.parametrize("way", ["tiered", "from_dynamic", "to_dynamic", "copied"])
def test_positions_follow_the_rows(shared, way):
    """Rows that pictures brought differently far are reordered, repeated and go on, after a conversion too."""
    inputs = prompt("left_padded")
    caches = [DynamicCache(config=shared.config), TieredKVCache(shared.config, **EXACT)]
    if way == "from_dynamic":
        caches[1] = DynamicCache(config=shared.config)
    for cache in caches:
        with torch.no_grad():
            shared(**inputs, past_key_values=cache)
    if way == "from_dynamic":
        caches[1] = TieredKVCache.from_dynamic(caches[1], shared.config, **EXACT)
    elif way == "to_dynamic":
        caches[1] = caches[1].to_dynamic()
    elif way == "copied":
        caches[1] = copy.deepcopy(caches[1])
    assert isinstance(caches[1], DynamicCache if way == "to_dynamic" else TieredKVCache)
    mask, rows = inputs["attention_mask"], torch.tensor([2, 0, 1])
    more, logits = make_inputs(["text:4"], seed=3)["input_ids"].expand(6, -1), []
    for cache in caches:
        cache.reorder_cache(rows)
        cache.batch_repeat_interleave(2)
        now = torch.nn.functional.pad(mask[rows].repeat_interleave(2, 0), (0, 4), value=1)
        with torch.no_grad():
            logits.append(shared(input_ids=more, attention_mask=now, past_key_values=cache).logits)
        cache.batch_select_indices(torch.tensor([5, 0]))
        cache.crop(-2)
        now = torch.nn.functional.pad(now[[5, 0]], (0, 2), value=1)
        with torch.no_grad():
            logits.append(shared(input_ids=more[:2], attention_mask=now, past_key_values=cache).logits)
    assert max_difference(logits[2], logits[0]) < 1e-4
    assert max_difference(logits[3], logits[1]) < 1e-4


def test_a_conversation_goes_on_with_a_new_picture(shared):
    first = prompt("images_and_video")
    whole = concat_turns(first, make_inputs(["text:2", "image:4x6", "text:3"], seed=4, mask=True))
    cache = TieredKVCache(shared.config, **EXACT)
    with torch.no_grad():
        shared(**first, past_key_values=cache)
    expected = generate(shared, whole).tolist()
    assert generate(shared, whole, past_key_values=cache).tolist() == expected
    cache.reset()
    assert generate(shared, whole, past_key_values=cache).tolist() == expected


def test_a_disk_error_in_the_middle_of_an_answer(shared, monkeypatch):
    """The call fails; what the cache holds by then goes on to the same answer."""
    inputs, cache = prompt("images_and_video"), TieredKVCache(shared.config, **EXACT)
    expected = generate(shared, inputs, max_new_tokens=16)
    read, calls = FileStorage.read, []

    def lossy(self, *args):
        calls.append(0)
        if len(calls) == 200:
            raise TierFileError("the disk is gone")
        return read(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(FileStorage, "read", lossy)
        with pytest.raises(
            TierFileError, match=r"segment \d+ of layer \d .* is lost: the disk is gone; crop the cache"
        ):
            generate(shared, inputs, past_key_values=cache, max_new_tokens=16)
    seen, length = cache.get_seq_length(), inputs["input_ids"].shape[1]
    assert length < seen < expected.shape[1]
    assert {layer.get_seq_length() for layer in cache.layers} == {seen}
    begun = {**inputs, "input_ids": expected[:, : seen + 1], "attention_mask": torch.ones(1, seen + 1)}
    begun["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, seen + 1 - length))
    rest = generate(shared, begun, past_key_values=cache, max_new_tokens=expected.shape[1] - seen - 1)
    assert rest.tolist() == expected.tolist()


# --- The technique ---


def test_the_technique_gives_every_request_a_tiered_cache():
    assert qwen3_vl.TieredKVCache is TieredKVCache
    assert qwen3_vl.HierarchicalMemoryCompression is HierarchicalMemoryCompression
    inputs, model = prompt("left_padded"), make_pair("dense").ours
    expected = generate(model, inputs, num_beams=2)
    technique = HierarchicalMemoryCompression(config=model.config, **EXACT)
    assert (technique.name, technique.exact) == ("tiered_cache", False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    technique.apply(model)
    model.active_techniques = [technique]
    actual = generate(model, inputs, num_beams=2, return_dict_in_generate=True)
    assert actual.sequences.tolist() == expected.tolist()
    assert isinstance(actual.past_key_values, TieredKVCache)
    for options, kind in (
        ({"past_key_values": DynamicCache(config=model.config)}, DynamicCache),
        ({"cache_implementation": "static"}, StaticCache),
    ):
        assert isinstance(generate(model, inputs, return_dict_in_generate=True, **options).past_key_values, kind)
    assert generate(model, inputs, use_cache=False, return_dict_in_generate=True).past_key_values is None
    technique.revert(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_profile_names_it():
    (technique,) = techniques_of({"tiered_cache": {"hot_tokens": 512}})
    assert isinstance(technique, HierarchicalMemoryCompression) and technique.settings == {"hot_tokens": 512}


def test_a_model_with_sliding_windows_is_refused():
    config = transformers.Gemma3TextConfig(num_hidden_layers=2, layer_types=["full_attention", "sliding_attention"])
    with pytest.raises(ValueError, match=r"full attention alone, but the model has .'Dynamic"):
        TieredKVCache(config)


# --- The trained checkpoint ---


@pytest.mark.parametrize("attention", ["sdpa", "qwen3_vl_exact"])
def test_answers_of_the_trained_checkpoint(attention):
    folder = "checkpoints/tiny"
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    model.set_attn_implementation(attention)
    processor = transformers.AutoProcessor.from_pretrained(folder)
    picture = Image.new("RGB", (128, 96), "white")
    ImageDraw.Draw(picture).rectangle((8, 8, 64, 48), fill="red")
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert_same_tokens(model, dict(processor(text=text, images=[picture], return_tensors="pt")))
