"""`generate()` on the quantized cache, the technique that puts it there, and answers of the trained checkpoint."""

import copy

import pytest
import torch
import transformers
from helpers import clone_inputs, make_inputs, make_pair, max_difference, one_line
from PIL import Image, ImageDraw
from transformers import DynamicCache

from qwen3_vl import QuantizedKVCache
from qwen3_vl.optim.cache.cache_quantized import QuantizedCache
from qwen3_vl.optim.registry_optim import TECHNIQUES


SMALL = {"group_size": 32, "residual_tokens": 8}
PROMPTS = {
    "text": [["text:60"]],
    "images_and_video": [["text:12", "image:8x8", "text:1", "video:2x8x4", "image:4x6", "text:20"]],
    "left_padded": [["text:12", "image:8x12", "text:40"], ["text:16"], ["text:21", "video:2x8x4", "text:9"]],
}
MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.3, "top_k": 30},
    "several_sequences": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3},
    "sampled_beams": {"num_beams": 3, "do_sample": True, "temperature": 0.7},
    "chunked_prefill": {"prefill_chunk_size": 70},
    "chunked_prefill_and_beams": {"prefill_chunk_size": 17, "num_beams": 2},
}


class Untouched(QuantizedKVCache):
    """What a quantized cache is but for the rounding: a window longer than any prompt."""

    def __init__(self, config):
        super().__init__(config, residual_tokens=4096)


@pytest.fixture(scope="module")
def shared():
    """A dense model that no test changes."""
    return make_pair("dense", attn="qwen3_vl_exact").ours


def prompt(name, seed=0):
    return make_inputs(*PROMPTS[name], seed=seed, mask=True)


def generate(model, inputs, **options):
    torch.manual_seed(0)
    options = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False, **options}
    return model.generate(**clone_inputs(inputs), **options)


@pytest.mark.parametrize(
    ("form", "mode", "attention"),
    [
        *((form, mode, "qwen3_vl_exact") for form in PROMPTS for mode in MODES),
        *(("left_padded", mode, "sdpa") for mode in ("greedy", "beams", "chunked_prefill")),
    ],
)
def test_modes_of_generation(shared, form, mode, attention):
    """The same rows, steps and reorderings as a `DynamicCache`: with an unquantized window, the same tokens."""
    model, inputs = shared, prompt(form)
    model.set_attn_implementation(attention)
    expected = generate(model, inputs, past_key_values=DynamicCache(config=model.config), **MODES[mode])
    cache = Untouched(model.config)
    assert generate(model, inputs, past_key_values=cache, **MODES[mode]).tolist() == expected.tolist()
    # And with most of it quantized to 8 bits, the logits of the same tokens stay close.
    cache = QuantizedKVCache(model.config, bits=8, **SMALL)
    generate(model, inputs, past_key_values=cache, **MODES[mode])
    layer = cache.layers[0]
    assert layer.get_seq_length() == inputs["input_ids"].shape[1] + 23
    assert layer._packed >= layer.get_seq_length() - 8 - 31
    assert layer.pool.statistics().pages_held < 3 * len(layer._state.table) * layer._state.table.shape[1] + 1


@torch.no_grad()
def logits_of(model, inputs, cache, tokens):
    """Prefill, then `tokens` (B, n) one by one: logits (B, n, vocabulary)."""
    model(**clone_inputs(inputs), past_key_values=cache)
    mask, out = inputs["attention_mask"], []
    for index in range(tokens.shape[1]):
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        step = tokens[:, index : index + 1]
        out.append(model(input_ids=step, attention_mask=mask, past_key_values=cache).logits)
    return torch.cat(out, 1)


@pytest.mark.parametrize("form", PROMPTS)
@pytest.mark.parametrize("rotate", [False, True])
def test_logits_follow_the_bits(shared, form, rotate):
    inputs, tokens = prompt(form), torch.randint(10, 140, (len(PROMPTS[form]), 30))
    shared.set_attn_implementation("qwen3_vl_exact")
    expected = logits_of(shared, inputs, DynamicCache(config=shared.config), tokens)
    losses = []
    for bits in (8, 4, 2):
        cache = QuantizedKVCache(shared.config, bits=bits, rotate=rotate, **SMALL)
        logits = logits_of(shared, inputs, cache, tokens)
        losses.append((logits - expected).abs().mean().item() / expected.abs().mean().item())
    assert losses[0] < 0.02 and 8 * losses[0] < losses[1] and 2 * losses[1] < losses[2]


@pytest.mark.parametrize("other", ["sdpa", "eager", "qwen3_vl_dynamic_sparse", "qwen3_vl_adaptive", "plain"])
def test_every_attention_reads_the_same_history(shared, monkeypatch, other):
    # Eager attention gives padding other hidden states, and the keys of those share the scales of their page.
    form = "images_and_video" if other == "eager" else "left_padded"
    inputs, tokens = prompt(form), torch.randint(10, 140, (len(PROMPTS[form]), 50))
    shared.set_attn_implementation("qwen3_vl_exact")
    expected = logits_of(shared, inputs, QuantizedKVCache(shared.config, **SMALL), tokens)
    if other == "plain":
        from qwen3_vl.optim.cache import packed_history

        monkeypatch.setattr(packed_history, "supports_quantized", lambda *args: False)
    else:
        shared.set_attn_implementation(other)
    actual = logits_of(shared, inputs, QuantizedKVCache(shared.config, **SMALL), tokens)
    assert max_difference(actual, expected) < 2e-3


@pytest.mark.parametrize("form", ["text", "images_and_video"])
@pytest.mark.parametrize("candidates", [4, 20])
def test_assisted_decoding_gives_the_tokens_of_greedy_decoding(shared, form, candidates):
    helper = make_pair("dense", seed=1, text={"num_hidden_layers": 2, "mlp_only_layers": []}).ours
    helper.load_state_dict(shared.state_dict(), strict=False)
    helper.generation_config.num_assistant_tokens = candidates
    shared.set_attn_implementation("qwen3_vl_exact")
    inputs, options = prompt(form), {"max_new_tokens": 60, "min_new_tokens": 60}
    expected = generate(shared, inputs, past_key_values=QuantizedKVCache(shared.config, bits=2, **SMALL), **options)
    cache = QuantizedKVCache(shared.config, bits=2, **SMALL)
    actual = generate(shared, inputs, past_key_values=cache, assistant_model=helper, **options)
    assert actual.tolist() == expected.tolist()
    plain = generate(shared, inputs, **options)
    assert plain.tolist() != expected.tolist()  # else two bits changed nothing and nothing was tested


def test_rows_and_their_positions_move_together(shared):
    inputs, tokens = prompt("left_padded"), torch.randint(10, 140, (6, 3))
    shared.set_attn_implementation("qwen3_vl_exact")
    mask, rows, found = inputs["attention_mask"], torch.tensor([2, 0, 1]), []
    dynamic = DynamicCache(config=shared.config)
    caches = [Untouched(shared.config), dynamic]
    with torch.no_grad():
        for cache in caches:
            shared(**clone_inputs(inputs), past_key_values=cache)
        caches.append(Untouched.from_dynamic(dynamic, config=shared.config))
        caches.append(copy.deepcopy(caches[0]))
        caches.append(caches[0].to_dynamic())
        for cache in caches:
            cache.reorder_cache(rows)
            cache.batch_repeat_interleave(2)
            now = torch.nn.functional.pad(mask[rows].repeat_interleave(2, 0), (0, 3), value=1)
            found.append(shared(input_ids=tokens, attention_mask=now, past_key_values=cache).logits)
    for logits in found[1:]:
        assert max_difference(logits, found[0]) < 1e-4


# --- The technique ---


def test_the_technique_gives_every_request_a_quantized_cache():
    assert TECHNIQUES["quantized_cache"] is QuantizedCache
    inputs, model = prompt("left_padded"), make_pair("dense").ours
    technique = QuantizedCache(config=model.config, bits=8, **SMALL)
    assert (technique.name, technique.exact) == ("quantized_cache", False)
    technique.apply(model)
    model.active_techniques = [technique]
    found = generate(model, inputs, num_beams=2, return_dict_in_generate=True).past_key_values
    assert isinstance(found, QuantizedKVCache) and found.settings.bits == 8
    model.active_techniques = []
    technique.revert(model)
    assert not isinstance(generate(model, inputs, return_dict_in_generate=True).past_key_values, QuantizedKVCache)


@pytest.mark.parametrize(
    ("settings_given", "message"),
    [
        ({"bits": 3}, "bits must be 8, 4 or 2"),
        ({"residual_tokens": -1}, "residual_tokens must be"),
        ({"nbits": 4}, "quantized_cache has no setting 'nbits'"),
    ],
)
def test_settings_of_the_technique(settings_given, message):
    with pytest.raises(ValueError, match=message) as error:
        QuantizedCache(**settings_given)
    one_line(error.value)


def test_a_model_with_sliding_windows_is_refused():
    config = transformers.Gemma3TextConfig(num_hidden_layers=2, layer_types=["full_attention", "sliding_attention"])
    with pytest.raises(ValueError, match=r"full attention alone, but the model has .'Dynamic"):
        QuantizedKVCache(config)


# --- The trained checkpoint ---


def test_answers_of_the_trained_checkpoint():
    folder = "checkpoints/tiny"
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = transformers.AutoProcessor.from_pretrained(folder)
    picture = Image.new("RGB", (128, 96), "white")
    ImageDraw.Draw(picture).rectangle((8, 8, 64, 48), fill="red")
    questions = ("What color is the shape?", "What is this?")
    chats = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}] for text in questions]
    texts = [processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in chats]
    inputs = processor(text=texts, images=[picture] * 2, padding=True, padding_side="left", return_tensors="pt")
    options = {"max_new_tokens": 30, "min_new_tokens": 30}
    expected = generate(model, inputs, **options)
    for attention in ("qwen3_vl_exact", "sdpa"):
        model.set_attn_implementation(attention)
        cache = QuantizedKVCache(model.config, bits=8, **SMALL)
        assert generate(model, inputs, past_key_values=cache, **options).tolist() == expected.tolist()
        assert cache.layers[0]._packed
