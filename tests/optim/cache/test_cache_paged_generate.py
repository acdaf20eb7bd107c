"""`generate()` on the paged cache, token by token against `DynamicCache`, and the technique that puts it there."""

import copy
import gc
import pickle
import threading

import pytest
import torch
import transformers
from helpers import clone_inputs, concat_turns, make_inputs, make_pair, max_difference, one_line
from PIL import Image, ImageDraw
from transformers import DynamicCache, StaticCache

from qwen3_vl.optim.cache import memory_pool
from qwen3_vl.optim.cache.cache_paged import PagedCache, PagedKVCache
from qwen3_vl.optim.cache.memory_pool import MemoryPool, PagePools


PAGE = 4
PROMPTS = {
    "text": [["text:9"]],
    "images_and_video": [["text:2", "image:4x4", "text:1", "video:2x4x4", "image:2x6", "text:2"]],
    "left_padded": [["text:2", "image:4x6", "text:4"], ["text:6"], ["text:1", "video:2x4x4", "text:9", "image:2x2"]],
}
MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.3, "top_k": 30},
    "several_sequences": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3},
    "beams_and_several_sequences": {"num_beams": 4, "num_return_sequences": 2, "early_stopping": True},
    "sampled_beams": {"num_beams": 3, "do_sample": True, "temperature": 0.7},
    "chunked_prefill": {"prefill_chunk_size": 5},
    "chunked_prefill_and_beams": {"prefill_chunk_size": 7, "num_beams": 2},
}


@pytest.fixture(scope="module")
def shared():
    """A dense model that no test changes."""
    return make_pair("dense").ours


def prompt(name, seed=0):
    return make_inputs(*PROMPTS[name], seed=seed, mask=True)


def generate(model, inputs, **options):
    torch.manual_seed(0)
    options = {"max_new_tokens": 11, "do_sample": False, **options}
    return model.generate(**clone_inputs(inputs), **options)


def assert_same_tokens(model, inputs, **options):
    """Against `DynamicCache`, for pages smaller than the prompt and for the default size."""
    full = {"return_dict_in_generate": True, "output_logits": True, **options}
    expected = generate(model, inputs, past_key_values=DynamicCache(config=model.config), **full)
    for page_tokens in (PAGE, 64):
        cache = PagedKVCache(model.config, page_tokens=page_tokens)
        actual = generate(model, inputs, past_key_values=cache, **full)
        assert actual.sequences.tolist() == expected.sequences.tolist()
        for ours, theirs in zip(actual.logits, expected.logits, strict=True):
            assert max_difference(ours, theirs) < 1e-4
        assert actual.past_key_values is cache
        assert cache.get_seq_length() == expected.past_key_values.get_seq_length() > inputs["input_ids"].shape[1]


@pytest.mark.parametrize("form", PROMPTS)
@pytest.mark.parametrize("mode", MODES)
def test_the_tokens_of_a_dynamic_cache(shared, form, mode):
    assert_same_tokens(shared, prompt(form), **MODES[mode])


def test_the_tokens_of_a_dynamic_cache_with_experts():
    assert_same_tokens(make_pair("moe").ours, prompt("left_padded"), num_beams=2)


@pytest.mark.parametrize("form", ["text", "images_and_video"])
@pytest.mark.parametrize("do_sample", [False, True])
def test_assisted_decoding(shared, form, do_sample):
    helper = make_pair("dense", seed=1, text={"num_hidden_layers": 2, "mlp_only_layers": []}).ours
    # Helpers of the same lineage agree at times, so both taken and refused candidates occur.
    helper.load_state_dict(shared.state_dict(), strict=False)
    options = {"do_sample": do_sample, "max_new_tokens": 14, "assistant_model": helper}
    assert_same_tokens(shared, prompt(form), **options)
    helper.active_techniques = [PagedCache(page_tokens=PAGE)]
    assert_same_tokens(shared, prompt(form), **options)


def test_candidates_from_the_prompt(shared):
    inputs = prompt("text")
    inputs["input_ids"][0, 4:] = inputs["input_ids"][0, :5].clone()
    assert_same_tokens(shared, inputs, prompt_lookup_num_tokens=3)


@torch.no_grad()
def step(model, cache, ids, mask):
    return model(input_ids=ids, attention_mask=mask, past_key_values=cache).logits


@pytest.mark.parametrize("way", ["paged", "from_dynamic", "to_dynamic", "copied"])
def test_positions_follow_the_rows(shared, way):
    """Rows that pictures brought differently far are reordered, repeated and go on, after a conversion too."""
    inputs = prompt("left_padded")
    caches = [DynamicCache(config=shared.config), PagedKVCache(shared.config, page_tokens=PAGE)]
    if way == "from_dynamic":
        caches[1] = DynamicCache(config=shared.config)
    for cache in caches:
        with torch.no_grad():
            shared(**inputs, past_key_values=cache)
    if way == "from_dynamic":
        caches[1] = PagedKVCache.from_dynamic(caches[1], page_tokens=PAGE)
    elif way == "to_dynamic":
        caches[1] = caches[1].to_dynamic()
    elif way == "copied":
        caches[1] = copy.deepcopy(caches[1])
    assert isinstance(caches[1], DynamicCache if way == "to_dynamic" else PagedKVCache)
    mask, rows = inputs["attention_mask"], torch.tensor([2, 0, 1])
    more = make_inputs(["text:4"], seed=3)["input_ids"].expand(6, -1)
    logits = []
    for cache in caches:
        cache.reorder_cache(rows)
        cache.batch_repeat_interleave(2)
        now = torch.nn.functional.pad(mask[rows].repeat_interleave(2, 0), (0, 4), value=1)
        logits.append(step(shared, cache, more, now))
        cache.batch_select_indices(torch.tensor([5, 0]))
        cache.crop(-2)
        logits.append(step(shared, cache, more[:2], torch.nn.functional.pad(now[[5, 0]], (0, 2), value=1)))
    assert max_difference(logits[2], logits[0]) < 1e-4
    assert max_difference(logits[3], logits[1]) < 1e-4


def test_a_conversation_goes_on_with_a_new_picture(shared):
    first, second = prompt("images_and_video"), make_inputs(["text:2", "image:4x6", "text:3"], seed=4, mask=True)
    whole = concat_turns(first, second)
    cache = PagedKVCache(shared.config, page_tokens=PAGE)
    with torch.no_grad():
        shared(**first, past_key_values=cache)
    assert generate(shared, whole, past_key_values=cache).tolist() == generate(shared, whole).tolist()
    cache.reset()
    assert generate(shared, whole, past_key_values=cache).tolist() == generate(shared, whole).tolist()


def refuse_address_space(shape, dtype, huge=False):
    raise OSError("no address space")


def test_threads_share_a_pool(shared, monkeypatch):
    """One that grows by copying, so that a write into the old storage would be lost."""
    monkeypatch.setattr(memory_pool, "map_memory", refuse_address_space)
    prompts = [make_inputs(["text:3", "image:4x4", f"text:{5 + seed}"], seed=seed, mask=True) for seed in range(3)]
    options = {"max_new_tokens": 24, "do_sample": False}
    expected = [shared.generate(**inputs, **options).tolist() for inputs in prompts]
    pools, found = PagePools(PAGE), {}

    def work(index):
        cache = PagedKVCache(shared.config, pool=pools)
        found[index] = shared.generate(**prompts[index], past_key_values=cache, **options).tolist()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[index] for index in range(3)] == expected
    (pool,) = pools.pools.values()
    gc.collect()
    assert pool.statistics().pages_held == 0


def test_a_compiled_model_breaks_its_graph_at_the_cache():
    pair, inputs = make_pair("dense"), prompt("text")
    cache = PagedKVCache(pair.ours.config, page_tokens=PAGE)
    compiled = torch.compile(pair.ours.model.language_model.layers[0].self_attn, backend="eager")
    pair.ours.model.language_model.layers[0].self_attn = compiled
    expected = generate(pair.stock, inputs)
    assert generate(pair.ours, inputs, past_key_values=cache).tolist() == expected.tolist()


def test_a_cache_without_all_tokens_is_not_converted(shared):
    static = StaticCache(config=shared.config, max_cache_len=30)
    with torch.no_grad():
        shared(**make_inputs(["text:6"]), past_key_values=static)
    with pytest.raises(ValueError, match=r"layer 0 of the StaticCache does not hold the 6 tokens") as error:
        PagedKVCache.from_dynamic(static)
    one_line(error.value)


def test_conversion_both_ways():
    dynamic = DynamicCache()
    for index in (0, 2):  # an empty layer between
        dynamic.update(torch.randn(2, 3, 7, 4), torch.randn(2, 3, 7, 4), index)
    paged = PagedKVCache.from_dynamic(dynamic, page_tokens=PAGE)
    assert [layer.get_seq_length() for layer in paged.layers] == [7, 0, 7]
    back = paged.to_dynamic()
    paged.update(torch.randn(2, 3, 1, 4), torch.randn(2, 3, 1, 4), 0)
    assert type(back) is DynamicCache and not back.layers[1].is_initialized
    for index in (0, 2):
        for name in ("keys", "values"):
            assert torch.equal(getattr(back.layers[index], name), getattr(dynamic.layers[index], name))
    assert paged.get_seq_length() == 8


@pytest.mark.parametrize("filled", [False, True])
def test_pickling_is_refused(shared, filled):
    """After rows of different lengths too, when another class has been put in front of the cache's."""
    cache = PagedKVCache(shared.config, page_tokens=PAGE)
    if filled:
        with torch.no_grad():
            shared(**prompt("left_padded"), past_key_values=cache)
    with pytest.raises(TypeError, match="cannot be pickled, since its pages live in a pool of this process") as error:
        pickle.dumps(cache)
    assert "to_dynamic" in one_line(error.value)
    assert pickle.loads(pickle.dumps(cache.to_dynamic())).get_seq_length() == cache.get_seq_length()


def test_a_model_with_sliding_windows_is_refused():
    config = transformers.Gemma3TextConfig(num_hidden_layers=2, layer_types=["full_attention", "sliding_attention"])
    with pytest.raises(ValueError, match=r"full attention alone, but the model has .'Dynamic"):
        PagedKVCache(config)


# --- The technique ---


def test_the_technique_gives_every_request_a_paged_cache():
    inputs, model = prompt("left_padded"), make_pair("dense").ours
    expected = generate(model, inputs, num_beams=2)
    technique = PagedCache(config=model.config, page_tokens=PAGE)
    assert (technique.name, technique.exact) == ("paged_cache", True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    technique.apply(model)
    model.active_techniques = [technique]
    actual = generate(model, inputs, num_beams=2, return_dict_in_generate=True)
    assert actual.sequences.tolist() == expected.tolist()
    assert isinstance(actual.past_key_values, PagedKVCache)
    assert actual.past_key_values.layers[0].pool.page_tokens == PAGE
    for options, kind in (
        ({"past_key_values": DynamicCache(config=model.config)}, DynamicCache),
        ({"cache_implementation": "static"}, StaticCache),
    ):
        assert isinstance(generate(model, inputs, return_dict_in_generate=True, **options).past_key_values, kind)
    assert generate(model, inputs, use_cache=False, return_dict_in_generate=True).past_key_values is None
    technique.revert(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_budget_holds_for_all_requests_together():
    page = MemoryPool(2, 16, page_tokens=PAGE, max_pages=1).page_bytes
    inputs, model = make_inputs(["text:9"], mask=True), make_pair("dense").ours
    expected = generate(model, inputs).tolist()
    model.active_techniques = [PagedCache(page_tokens=PAGE, max_bytes=3 * 5 * page)]  # 3 layers of 20 tokens
    first = generate(model, inputs, return_dict_in_generate=True)
    assert first.sequences.tolist() == expected
    with pytest.raises(MemoryError, match=r"the pool is full: 3 pages of .* 15 are held and 0 free"):
        generate(model, inputs)
    del first
    gc.collect()
    assert generate(model, inputs).tolist() == expected


@pytest.mark.parametrize(
    ("settings_given", "message"),
    [
        ({"page_tokens": 0}, "page_tokens must be"),
        ({"max_bytes": -1}, "max_bytes must be"),
        ({"page_size": 16}, "has no setting 'page_size'"),
    ],
)
def test_settings_of_the_technique(settings_given, message):
    with pytest.raises(ValueError, match=message) as error:
        PagedCache(**settings_given)
    one_line(error.value)


# --- The trained checkpoint ---


@pytest.fixture(scope="module")
def tiny_checkpoint():
    folder = "checkpoints/tiny"
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    return model, transformers.AutoProcessor.from_pretrained(folder)


def drawing(size, color):
    picture = Image.new("RGB", size, "white")
    ImageDraw.Draw(picture).rectangle((8, 8, size[0] // 2, size[1] // 2), fill=color)
    return picture


@pytest.mark.parametrize("mode", ["greedy", "sampling", "beams", "chunked_prefill"])
def test_answers_of_the_trained_checkpoint(tiny_checkpoint, mode):
    model, processor = tiny_checkpoint
    pictures = [drawing((96, 64), "red"), drawing((64, 64), "blue"), drawing((128, 96), "green")]
    chats = [
        [{"role": "user", "content": [*({"type": "image"} for _ in range(count)), {"type": "text", "text": question}]}]
        for count, question in ((2, "What colors are the shapes in the pictures?"), (1, "What is this?"))
    ]
    texts = [processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in chats]
    inputs = processor(text=texts, images=pictures, padding=True, padding_side="left", return_tensors="pt")
    assert_same_tokens(model, dict(inputs), **MODES[mode])
