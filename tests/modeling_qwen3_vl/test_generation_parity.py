"""`generate()` against the stock classes with the same weights: the same tokens, and the same scores."""

import pytest
import torch
from helpers import (
    EOS_TOKEN,
    IMAGE_TOKEN,
    VIDEO_TOKEN,
    assert_close,
    clone_inputs,
    forget,
    make_inputs,
    make_pair,
    without,
)
from transformers import DynamicCache, QuantizedCache, StaticCache
from transformers.utils import is_optimum_quanto_available


PROMPTS = {
    "text": [["text:6"]],
    "text_batch": [["text:6"], ["text:3"]],
    "image": [["text:4", "image:4x6", "text:5"]],
    "images_and_video": [["text:2", "image:4x4", "text:1", "video:2x4x4", "image:2x6", "text:2"]],
    "batch": [["text:2", "image:4x6", "text:4"], ["text:6"], ["text:1", "video:2x4x4", "text:9", "image:2x2"]],
}
VISUAL_PROMPTS = ["image", "batch"]
TOKENS = 8
# Without a cache stock raises when it has generated a placeholder.
NO_PLACEHOLDERS = {"suppress_tokens": [IMAGE_TOKEN, VIDEO_TOKEN]}


def prompt(name, seed=0):
    return make_inputs(*PROMPTS[name], seed=seed, mask=True)


def generate(model, inputs, **options):
    torch.manual_seed(0)
    options = {"max_new_tokens": TOKENS, "do_sample": False, **options}
    return forget(model).generate(**clone_inputs(inputs), **options)


def assert_same_generation(pair, inputs, **options):
    """Tokens and raw logits of every step; returns the sequences."""
    full = {"return_dict_in_generate": True, "output_logits": True, **options}
    expected = generate(pair.stock, inputs, **full)
    actual = generate(pair.ours, inputs, **full)
    assert actual.sequences.tolist() == expected.sequences.tolist()
    assert len(actual.logits) == len(expected.logits)
    for step, (ours, stock) in enumerate(zip(actual.logits, expected.logits, strict=True)):
        assert_close(ours, stock, 2e-5, f"logits of step {step}")
    assert actual.sequences.shape[1] > inputs["input_ids"].shape[1]
    return actual.sequences


@pytest.mark.parametrize("form", PROMPTS)
def test_greedy(pair, form):
    assert_same_generation(pair, prompt(form))


@pytest.mark.parametrize("form", PROMPTS)
def test_greedy_derives_token_types(pair, form):
    inputs = prompt(form)
    expected = generate(pair.stock, inputs)
    actual = generate(pair.ours, without(inputs, "mm_token_type_ids"))
    assert actual.tolist() == expected.tolist()


def test_greedy_without_a_mask(pair):
    assert_same_generation(pair, make_inputs(*PROMPTS["image"]))


@pytest.mark.parametrize("form", PROMPTS)
def test_cached_steps_equal_no_cache(pair, form):
    inputs = prompt(form)
    expected = generate(pair.stock, inputs, use_cache=False, **NO_PLACEHOLDERS)
    assert generate(pair.ours, inputs, **NO_PLACEHOLDERS).tolist() == expected.tolist()
    assert generate(pair.ours, inputs, use_cache=False, **NO_PLACEHOLDERS).tolist() == expected.tolist()


def test_generated_placeholders_without_a_cache(pair):
    """A generated placeholder is a plain token; without a cache stock takes it for a picture's and raises."""
    inputs = prompt("image")
    options = {"sequence_bias": {(IMAGE_TOKEN,): 100.0}, "max_new_tokens": 3}
    expected = generate(pair.stock, inputs, **options)
    assert (expected[:, -3:] == IMAGE_TOKEN).all()
    assert generate(pair.ours, inputs, **options).tolist() == expected.tolist()
    assert generate(pair.ours, inputs, use_cache=False, **options).tolist() == expected.tolist()


@pytest.mark.parametrize("form", VISUAL_PROMPTS)
@pytest.mark.parametrize("seed", range(3))
def test_sampling_with_a_seed(pair, form, seed):
    options = {"do_sample": True, "temperature": 1.3, "top_k": 30, "top_p": 0.95}
    assert_same_generation(pair, prompt(form, seed), **options)


@pytest.mark.parametrize("form", VISUAL_PROMPTS)
@pytest.mark.parametrize(
    "options",
    [
        {"num_return_sequences": 3, "do_sample": True},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5, "early_stopping": True},
        {"num_beams": 3, "do_sample": True, "temperature": 0.7},
        {"num_beams": 2, "use_cache": False, **NO_PLACEHOLDERS},
    ],
    ids=lambda options: "-".join(options),
)
def test_beams_and_several_sequences(pair, form, options):
    assert_same_generation(pair, prompt(form), **options)


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.8},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 6, "suppress_tokens": [IMAGE_TOKEN, VIDEO_TOKEN]},
        {"prompt_lookup_num_tokens": 3},
        {"max_length": 30, "max_new_tokens": None},
        {"max_new_tokens": 1},
    ],
    ids=lambda options: "-".join(options),
)
def test_other_options(pair, options):
    inputs = prompt("image")
    expected = generate(pair.stock, inputs, **options)
    assert generate(pair.ours, inputs, **options).tolist() == expected.tolist()


def test_rows_stop_at_the_end_token(pair):
    """With an end token that some row meets early, that row is filled with padding and the others go on."""
    inputs = prompt("batch")
    free = generate(pair.stock, inputs)[:, inputs["input_ids"].shape[1] :]
    end = next(token for token in free[0].tolist() if token not in free[1].tolist()[:2])
    sequences = assert_same_generation(pair, inputs, eos_token_id=[EOS_TOKEN, end])
    assert (sequences[0] == end).any()


@pytest.mark.parametrize("form", ["text", "image", "images_and_video"])
@pytest.mark.parametrize("do_sample", [False, True])
def test_assisted_decoding(kind, form, do_sample):
    pair = make_pair(kind)
    helper = make_pair(kind, seed=1, text={"num_hidden_layers": 2, "mlp_only_layers": []})
    # Helpers of the same lineage agree at times, so both taken and refused candidates occur.
    helper.ours.load_state_dict(pair.ours.state_dict(), strict=False)
    helper.stock.load_state_dict(helper.ours.state_dict(), strict=True)
    inputs = prompt(form)
    options = {"do_sample": do_sample, "max_new_tokens": 14}
    expected = generate(pair.stock, inputs, assistant_model=forget(helper.stock), **options)
    actual = generate(pair.ours, inputs, assistant_model=helper.ours, **options)
    assert actual.tolist() == expected.tolist()
    if not do_sample:
        assert actual.tolist() == generate(pair.stock, inputs, **options).tolist(), "assistance changed the answer"


@pytest.mark.parametrize("form", PROMPTS)
def test_static_cache(pair, form):
    inputs = prompt(form)
    expected = generate(pair.stock, inputs)
    assert generate(pair.ours, inputs, cache_implementation="static").tolist() == expected.tolist()
    length = inputs["input_ids"].shape[1] + TOKENS
    cache = StaticCache(config=pair.ours.config, max_cache_len=length)
    assert generate(pair.ours, inputs, past_key_values=cache).tolist() == expected.tolist()
    cache.reset()
    assert generate(pair.ours, inputs, past_key_values=cache).tolist() == expected.tolist(), "after reset"


@pytest.mark.parametrize("form", VISUAL_PROMPTS)
def test_static_cache_with_beams(pair, form):
    inputs = prompt(form)
    options = {"num_beams": 3, "cache_implementation": "static"}
    assert generate(pair.ours, inputs, **options).tolist() == generate(pair.stock, inputs, **options).tolist()


@pytest.mark.skipif(not is_optimum_quanto_available(), reason="QuantizedCache needs optimum-quanto, not installed")
@pytest.mark.parametrize("form", ["text", "image", "batch"])
def test_quantized_cache(pair, form):
    """A short residual window, so that most keys are read back from int4."""
    inputs = prompt(form)
    results = []
    for model in (pair.stock, pair.ours):
        cache = QuantizedCache(
            "quanto", config=model.config, nbits=4, axis_key=0, axis_value=0, q_group_size=16, residual_length=4
        )
        results.append(
            generate(model, inputs, past_key_values=cache, return_dict_in_generate=True, output_logits=True)
        )
    assert results[1].sequences.tolist() == results[0].sequences.tolist()
    exact = generate(pair.stock, inputs, return_dict_in_generate=True, output_logits=True)
    last = torch.stack(results[1].logits)[-1], torch.stack(results[0].logits)[-1]
    assert_close(*last, 1e-4, "last logits on quantized caches")
    assert (results[1].logits[1] - exact.logits[1]).abs().max() > 1e-4, "the cache was not quantized"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="offloaded caches copy over a device stream: needs CUDA")
@pytest.mark.gpu
@pytest.mark.parametrize("name", ["offloaded", "offloaded_static"])
def test_offloaded_cache(pair, name):
    inputs = {key: value.cuda() for key, value in prompt("batch").items()}
    pair.stock.cuda(), pair.ours.cuda()
    expected = generate(pair.stock, inputs)
    assert generate(pair.ours, inputs, cache_implementation=name).tolist() == expected.tolist()


@pytest.mark.parametrize("form", PROMPTS)
@pytest.mark.parametrize("chunk", [1, 4, 7, 100])
def test_chunked_prefill(pair, form, chunk):
    """Chunk edges that cut pictures in two, against stock's prefill in one piece."""
    inputs = prompt(form)
    options = {"return_dict_in_generate": True, "output_logits": True}
    expected = generate(pair.stock, inputs, **options)
    actual = generate(pair.ours, inputs, prefill_chunk_size=chunk, **options)
    assert actual.sequences.tolist() == expected.sequences.tolist()
    assert_close(actual.logits[0], expected.logits[0], 2e-5, "first logits")


@pytest.mark.parametrize("chunk", [5])
def test_chunked_prefill_with_beams_and_static_cache(pair, chunk):
    inputs = prompt("batch")
    expected = generate(pair.stock, inputs, num_beams=2)
    for options in ({}, {"cache_implementation": "static"}):
        actual = generate(pair.ours, inputs, num_beams=2, prefill_chunk_size=chunk, **options)
        assert actual.tolist() == expected.tolist()


def test_reuse_of_a_dynamic_cache(pair):
    """A text prompt is prefilled once; its cache, copied, serves two continuations."""
    import copy

    prefix = make_inputs(["text:8"])
    cache = DynamicCache(config=pair.ours.config)
    with torch.no_grad():
        pair.ours(input_ids=prefix["input_ids"], past_key_values=cache)
    for seed in (1, 2):
        more = make_inputs(["text:4"], seed=seed)
        ids = torch.cat([prefix["input_ids"], more["input_ids"]], dim=1)
        whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        expected = generate(pair.stock, whole)
        assert generate(pair.ours, whole, past_key_values=copy.deepcopy(cache)).tolist() == expected.tolist()
    assert cache.get_seq_length() == 8


@pytest.mark.parametrize("form", ["text", "image"])
def test_reuse_of_a_cache_that_holds_a_picture(pair, form):
    """The prompt's cache, then the same prompt with more text after it: only that is computed."""
    inputs = prompt("image")
    more = make_inputs(["text:5"], seed=3)["input_ids"]
    with torch.no_grad():
        cache = pair.ours(**inputs).past_key_values
    ids = torch.cat([inputs["input_ids"], more], dim=1)
    whole = {
        **inputs,
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, 5)),
    }
    expected = generate(pair.stock, whole)
    given = {name: whole[name] for name in ("input_ids", "attention_mask")}
    if form == "image":
        given = whole
    assert generate(pair.ours, given, past_key_values=cache).tolist() == expected.tolist()


def test_embeddings_as_prompt(pair):
    inputs = prompt("text_batch")
    given = {
        "inputs_embeds": pair.stock.get_input_embeddings()(inputs["input_ids"]).detach(),
        "attention_mask": inputs["attention_mask"],
    }
    expected = generate(pair.stock, given)
    assert expected.shape[1] == TOKENS
    assert generate(pair.ours, given).tolist() == expected.tolist()


def test_outputs_beside_the_tokens(kind):
    pair = make_pair(kind, attn="eager")
    inputs = prompt("image")
    options = {
        "return_dict_in_generate": True,
        "output_hidden_states": True,
        "output_attentions": True,
        "output_scores": True,
    }
    expected, actual = generate(pair.stock, inputs, **options), generate(pair.ours, inputs, **options)
    assert set(actual.keys()) == set(expected.keys())
    for name in ("hidden_states", "attentions"):
        ours, stock = getattr(actual, name), getattr(expected, name)
        assert len(ours) == len(stock)
        for mine, theirs in zip(ours, stock, strict=True):
            assert len(mine) == len(theirs)
            for first, second in zip(mine, theirs, strict=True):
                assert_close(first, second, 2e-5, name)


def test_a_user_s_inputs_are_not_changed(pair):
    inputs = prompt("batch")
    before = clone_inputs(inputs)
    torch.manual_seed(0)
    pair.ours.generate(**inputs, max_new_tokens=3, num_beams=2)
    assert inputs.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(inputs[name], value), f"{name} was changed"


def test_streaming(pair):
    from transformers.generation.streamers import BaseStreamer

    class Collector(BaseStreamer):
        def __init__(self):
            self.tokens = []

        def put(self, value):
            self.tokens.extend(value.flatten().tolist())

        def end(self):
            self.tokens.append("end")

    inputs = prompt("image")
    collector = Collector()
    sequences = generate(pair.ours, inputs, streamer=collector)
    assert collector.tokens == [*sequences[0].tolist(), "end"]


def test_stock_options_are_accepted_after_training_mode(pair):
    """`generate` on a model in training mode with gradient checkpointing switched on, as trainers do to evaluate."""
    inputs = prompt("image")
    expected = generate(pair.stock, inputs)
    pair.ours.gradient_checkpointing_enable()
    pair.ours.train()
    generate(pair.ours, inputs)
    pair.ours.eval()
    assert generate(pair.ours, inputs).tolist() == expected.tolist()
