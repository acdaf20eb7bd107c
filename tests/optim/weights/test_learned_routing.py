"""Routed blocks against blocks that compute everything and throw the skipped tokens' results away."""

import copy
import math

import pytest
import torch
from helpers import assert_close, clone_inputs, make_inputs, make_pair, max_difference, one_line, valid_positions
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, StaticCache

from qwen3_vl import EvictingKVCache, PagedKVCache, QuantizedKVCache
from qwen3_vl.optim.attention.attention_layout import AttentionLayout
from qwen3_vl.optim.native.native_attention import kernels, native_blocks, supports
from qwen3_vl.optim.weights import learned_routing_block
from qwen3_vl.optim.weights.learned_routing import LearnedActivationRouting
from qwen3_vl.optim.weights.learned_routing_choice import real_tokens, top_share


PROMPTS = {
    "one picture": [["text:4", "image:8x8", "text:5"]],
    "several pictures": [["text:2", "image:4x4", "text:1", "video:2x4x4", "image:2x6", "text:2"]],
    "left-padded": [["text:2", "image:4x6", "text:4"], ["text:6"], ["text:1", "video:2x4x4", "text:9", "image:2x2"]],
    "text": [["text:9"]],
}
MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.3},
    "beams": {"num_beams": 3},
    "several": {"do_sample": True, "num_return_sequences": 2},
    "chunked prefill": {"prefill_chunk_size": 5},
}
CACHES = {
    "dynamic": lambda model: DynamicCache(config=model.config),
    "static": lambda model: StaticCache(config=model.config, max_cache_len=96),
    "paged": lambda model: PagedKVCache(model.config, page_tokens=4),
    "quantized": lambda model: QuantizedKVCache(model.config, bits=8, group_size=32, residual_tokens=1),
    "evicting": lambda model: EvictingKVCache(model.config, policy="snapkv"),
}


def routed(model, seed=3, **options):
    """`model` with routers whose scores and predictions spread, in all blocks but where `options` say."""
    routing = LearnedActivationRouting(**{"blocks": list(range(3)), **options})
    routing.apply(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for router in routing.routers(model):
            router.score.weight.copy_(torch.randn(router.score.weight.shape, generator=generator) * 0.3)
            last = router.predictor[2]
            last.weight.copy_(torch.randn(last.weight.shape, generator=generator))
            last.bias.zero_()
    return routing


def compute_everything(monkeypatch):
    """Blocks that run whole, whose results are then dropped where a token skips."""

    def whole(layer, hidden_states, computed, gates, *args, **kwargs):
        after = type(layer).forward(layer, hidden_states, *args, **kwargs)
        moved = hidden_states + gates[..., None].to(after.dtype) * (after - hidden_states)
        return torch.where(computed[..., None], moved, hidden_states)

    monkeypatch.setattr(learned_routing_block, "block_on_some", whole)


@pytest.fixture(params=[False, True], ids=["PyTorch's tiles", "our tiles"])
def tiles(request, monkeypatch):
    """Which attention computes routed queries, whatever is faster here."""
    monkeypatch.setattr(learned_routing_block, "_native_wins", lambda *x: request.param and supports(*x))


@torch.no_grad()
def logits_of(model, inputs, **options):
    return model(**clone_inputs(inputs), **options).logits


def generate(model, inputs, **options):
    torch.manual_seed(0)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, **options}
    return model.generate(**clone_inputs(inputs), **options)


@pytest.mark.parametrize("tokens", ["visual", "all"])
def test_full_capacity_is_the_plain_model(kind, tokens):
    model, inputs = make_pair(kind).ours, make_inputs(*PROMPTS["left-padded"])
    before = logits_of(model, inputs)
    routing = routed(model, capacity=1.0, tokens=tokens)
    assert torch.equal(logits_of(model, inputs), before)
    routing.revert(model)
    assert torch.equal(logits_of(model, inputs), before)


@pytest.mark.parametrize("attention", ["sdpa", "eager", "qwen3_vl_exact", "qwen3_vl_memory_efficient"])
@pytest.mark.parametrize("tokens", ["visual", "all"])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_forward(kind, prompt, tokens, attention, tiles, monkeypatch):
    model, inputs = make_pair(kind, attn=attention).ours, make_inputs(*PROMPTS[prompt])
    plain = logits_of(model, inputs)
    routed(model, tokens=tokens)
    fast = logits_of(model, inputs)
    compute_everything(monkeypatch)
    valid = valid_positions(inputs)
    assert_close(fast[valid], logits_of(model, inputs)[valid], 2e-5)
    assert (prompt, tokens) == ("text", "visual") or max_difference(fast[valid], plain[valid]) > 1e-2


@pytest.mark.parametrize("queries", [3, 512])
def test_queries_in_steps_and_bfloat16(queries, tiles, monkeypatch):
    monkeypatch.setattr(learned_routing_block, "QUERY_STEP", queries)
    model = make_pair("dense", dtype=torch.bfloat16).ours
    inputs = make_inputs(*PROMPTS["left-padded"], dtype=torch.bfloat16)
    routed(model)
    fast = logits_of(model, inputs)
    compute_everything(monkeypatch)
    valid = valid_positions(inputs)
    # Rounding may turn the order of two tokens with nearly equal scores, which these do not have.
    assert_close(fast[valid].float(), logits_of(model, inputs)[valid].float(), 0.15)


@pytest.mark.parametrize("attention", ["sdpa", "qwen3_vl_exact"])
def test_packed_rows(attention, tiles):
    """Sequences one after the other in a row are ranked apart, as they would be alone."""
    model = make_pair("dense", attn=attention).ours.model.language_model
    lengths = (5, 7, 3)
    embeds = torch.randn(1, sum(lengths), 48)
    plain = torch.cat([torch.arange(length) for length in lengths])[None]
    routed(model, tokens="all")
    with torch.no_grad():
        packed = model(inputs_embeds=embeds, position_ids=plain.expand(4, -1, -1), use_cache=False)[0]
        parts = embeds.split(lengths, dim=1)
        alone = torch.cat([model(inputs_embeds=part, use_cache=False)[0] for part in parts], dim=1)
    assert_close(packed, alone, 2e-5)


@pytest.mark.skipif(kernels() is None, reason="no C++ compiler")
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    data=st.data(), batch=st.integers(1, 3), keys=st.integers(1, 300), padded=st.booleans(), packed=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_queries_at_places_of_their_own(data, batch, keys, padded, packed, dtype):
    count = data.draw(st.integers(1, keys))
    generator = torch.Generator().manual_seed(keys)
    places = torch.stack([torch.randperm(keys, generator=generator)[:count].sort().values for _ in range(batch)])
    query, key, value = (
        torch.randn(batch, *x, 32, generator=generator).to(dtype) for x in ((4, count), *[(2, keys)] * 2)
    )
    hidden, segments = torch.randint(0, 3, (batch, 1), generator=generator), torch.arange(keys).expand(batch, -1) // 40
    valid = torch.arange(keys) >= hidden if padded else torch.ones(batch, keys, dtype=torch.bool)
    layout = AttentionLayout(0, valid if padded else None, segments.int().contiguous() if packed else None)
    actual = native_blocks(query, key, value, layout, 0.2, places=places).transpose(1, 2)
    seen = (torch.arange(keys) <= places[..., None]) & valid[:, None]
    if packed:
        seen &= segments[:, None] == segments.gather(1, places)[..., None]
    scores = 0.2 * query.double() @ key.double().repeat_interleave(2, 1).mT
    shares = scores.masked_fill(~seen[:, None], -math.inf).softmax(-1).nan_to_num(0.0)
    expected = shares @ value.double().repeat_interleave(2, 1)
    assert_close(actual.double(), expected, 1e-5 if dtype == torch.float32 else 0.03)


@pytest.mark.parametrize("tokens", ["visual", "all"])
def test_padding_does_not_matter(tokens):
    model = make_pair("dense").ours
    routed(model, tokens=tokens)
    layouts = [["text:2", "image:4x6", "text:4"], ["text:1", "video:2x4x4", "text:9", "image:2x2"]]
    inputs = make_inputs(*layouts)
    batch = logits_of(model, inputs)
    first = inputs["attention_mask"][0].bool()
    alone = {"input_ids": inputs["input_ids"][:1, first], "mm_token_type_ids": inputs["mm_token_type_ids"][:1, first]}
    alone |= {name: inputs[name] for name in ("pixel_values", "image_grid_thw")}
    alone["image_grid_thw"] = alone["image_grid_thw"][:1]
    alone["pixel_values"] = alone["pixel_values"][: int(alone["image_grid_thw"].prod())]
    assert_close(logits_of(model, alone)[0], batch[0, first], 2e-5)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("mode", MODES)
def test_generate(mode, cache, monkeypatch):
    if cache == "static" and mode == "chunked prefill":
        pytest.skip("stock compiles chunks on a static cache")
    model = make_pair("dense").ours
    routed(model, tokens="all")
    monkeypatch.setattr(type(model), "_valid_auto_compile_criteria", lambda *args, **kwargs: False)
    for prompt in ("left-padded", "several pictures", "text"):
        inputs = make_inputs(*PROMPTS[prompt], mask=True)
        fast = generate(model, inputs, past_key_values=CACHES[cache](model), **MODES[mode])
        with monkeypatch.context() as patch:
            compute_everything(patch)
            slow = generate(model, inputs, past_key_values=CACHES[cache](model), **MODES[mode])
        assert torch.equal(fast, slow), prompt


def test_decoding_goes_on_as_without_a_cache():
    """Text is never skipped and the prompt's pictures are ranked once, so both ways route alike."""
    model, inputs = make_pair("dense").ours, make_inputs(*PROMPTS["left-padded"])
    routed(model)
    with_cache, without = (generate(model, inputs, use_cache=use) for use in (True, False))
    assert torch.equal(with_cache, without)


def test_what_follows_a_cache_is_causal():
    model = make_pair("dense").ours
    routed(model, tokens="all")
    ids = torch.randint(10, 140, (2, 14))

    def second_part(parts, ids):
        cache, results = DynamicCache(config=model.config), []
        for part in ids.split(parts, dim=1):
            results.append(logits_of(model, {"input_ids": part}, past_key_values=cache))
        return torch.cat(results[1:], dim=1)

    whole = second_part([6, 8], ids)
    assert_close(second_part([6, *[1] * 8], ids), whole, 2e-5)
    changed = ids.clone()
    changed[:, 11:] = 5
    assert_close(second_part([6, 8], changed)[:, :5], whole[:, :5], 2e-5)
    # Some were skipped and some were not, or nothing was shown.
    assert max_difference(second_part([6, 8], changed)[:, 5:], whole[:, 5:]) > 1e-3


def test_skipped_tokens_are_not_computed():
    model, counts = make_pair("dense").ours, []
    routing = routed(model, capacity=0.25, blocks=[1, 2])
    inputs = make_inputs(["text:4", "image:8x8", "text:5"])
    for layer in model.model.language_model.layers:
        layer.mlp.register_forward_hook(lambda module, given, out: counts.append(given[0].shape[:-1].numel()))
    logits_of(model, inputs)
    tokens, visual = inputs["input_ids"].shape[1], 16
    assert counts == [tokens, tokens - 12, tokens - 12]
    assert routing.computed_shares() == pytest.approx({1: 1 - 12 / tokens, 2: 1 - 12 / tokens})
    assert visual == int((inputs["mm_token_type_ids"] == 1).sum())


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data(), capacity=st.floats(0.01, 1.0), rows=st.integers(1, 3), length=st.integers(1, 12))
def test_top_share_by_definition(data, capacity, rows, length):
    draw = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    scores = torch.randint(0, 5, (rows, length), generator=draw).float()
    eligible = torch.rand(rows, length, generator=draw) < 0.7
    sequences = (torch.rand(rows, length, generator=draw) < 0.3).long().cumsum(1)
    expected = torch.zeros_like(eligible)
    for row in range(rows):
        for number in sequences[row].unique():
            places = [t for t in range(length) if eligible[row, t] and sequences[row, t] == number]
            taken = math.ceil(round(capacity * len(places), 5))
            for t in sorted(places, key=lambda t: (-scores[row, t], t))[:taken]:
                expected[row, t] = True
    assert torch.equal(top_share(scores, eligible, sequences, capacity), expected)


def test_real_tokens_of_every_mask():
    flags = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    dense = AttentionLayout(2, flags.bool()).dense(3, 5)
    expected = flags[:, 2:].bool()
    for mask in (flags, AttentionLayout(2, flags.bool()), dense, torch.zeros(dense.shape).masked_fill(~dense, -1e9)):
        assert torch.equal(real_tokens(mask, 2, 2, 3, "cpu"), expected)
    assert real_tokens(None, 2, 2, 3, "cpu").all()


def test_training_moves_routers_alone():
    model, inputs = make_pair("dense").ours, make_inputs(*PROMPTS["left-padded"])
    routing = LearnedActivationRouting(blocks=[1, 2])
    routing.apply(model)
    own = routing.freeze_others(model)
    weights = {name: p.clone() for name, p in model.named_parameters() if "token_router" not in name}
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    optimizer = torch.optim.Adam(own, lr=0.02)
    tasks, predictors = [], []
    for _ in range(25):
        outputs = model(**inputs, labels=labels)
        loss = routing.training_loss(outputs, weight=0.5)
        assert loss.item() == pytest.approx(outputs.loss.item() + 0.5 * routing.auxiliary_loss().item(), rel=1e-5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        tasks.append(outputs.loss.item())
        predictors.append(routing.auxiliary_loss().item())
    assert all(parameter.grad is not None for parameter in own)
    assert min(tasks[15:]) < tasks[0] and predictors[-1] < predictors[0]
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters() if name in weights)
    routing.revert(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_trainer_loss_and_checkpointing():
    model, inputs = make_pair("dense").ours, make_inputs(["text:3", "image:4x6", "text:3"])
    routing = routed(model)
    own = routing.freeze_others(model)
    labels = inputs["input_ids"]
    gradients, computed = [], []
    layer = model.model.language_model.layers[1]
    layer.mlp.register_forward_hook(lambda *given: computed.append(recompute))
    for recompute in (False, True):
        model.train()
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        outputs = model(**inputs, use_cache=False)
        loss = routing.trainer_loss(model, weight=2.0)(outputs, labels)
        model.zero_grad()
        loss.backward()
        gradients.append([parameter.grad.clone() for parameter in own])
    assert computed == [False, True, True]
    expected = model(**inputs, labels=labels, use_cache=False)
    assert loss.item() == pytest.approx(routing.training_loss(expected, weight=2.0).item(), rel=1e-5)
    for plain, recomputed in zip(*gradients, strict=True):
        assert_close(recomputed, plain, 1e-6)
    assert all(gradient.abs().max() > 0 for gradient in gradients[0])


def test_gradients_are_those_of_the_whole_block(monkeypatch):
    model, inputs = make_pair("dense").ours, make_inputs(*PROMPTS["left-padded"])
    routed(model)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    model(**inputs, labels=labels).loss.backward()
    fast = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    compute_everything(monkeypatch)
    model(**inputs, labels=labels).loss.backward()
    slow = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert fast.keys() == slow.keys() and "model.language_model.layers.0.self_attn.q_proj.weight" in fast
    for name, gradient in fast.items():
        assert_close(gradient, slow[name], 2e-4, name)


def test_saved_beside_official_weights(tmp_path, kind):
    pair, inputs = make_pair(kind), make_inputs(*PROMPTS["several pictures"])
    plain = logits_of(pair.ours, inputs)
    routing = routed(pair.ours, capacity=0.3, blocks=[0, 2])
    pair.ours.save_pretrained(tmp_path)
    assert pair.ours.config.optim is None
    loaded = type(pair.ours).from_pretrained(tmp_path)
    assert torch.equal(logits_of(loaded, inputs), logits_of(pair.ours, inputs))
    [technique] = loaded.active_techniques
    assert technique.settings == {**routing.settings, "blocks": [0, 2]}
    stock, report = type(pair.stock).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_close(logits_of(stock, inputs), plain)
    technique.revert(loaded)
    assert_close(logits_of(loaded, inputs), plain)
    with pytest.raises(ValueError, match="do not fit block 1") as error:
        LearnedActivationRouting(blocks=[1]).apply(loaded)
    one_line(error.value)
    assert not any("token_router" in name for name in loaded.state_dict())


def test_apply_revert_and_copies():
    model, inputs = make_pair("dense").ours, make_inputs(*PROMPTS["left-padded"])
    before, names = logits_of(model, inputs), list(model.state_dict())
    routing = routed(model)
    copied = copy.deepcopy(model)
    assert torch.equal(logits_of(copied, inputs), logits_of(model, inputs))
    layer = copied.model.language_model.layers[0]
    assert layer.forward.layer is layer and copied.save_pretrained.model is copied
    with pytest.raises(ValueError, match="already applied"):
        routing.apply(model)
    routing.revert(model)
    routing.revert(model)
    assert torch.equal(logits_of(model, inputs), before) and list(model.state_dict()) == names
    assert "save_pretrained" not in vars(model)
    with pytest.raises(ValueError, match="not applied"):
        routing.auxiliary_loss()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity": 0}, "capacity must be above 0 and at most 1, got 0"),
        ({"capacity": 1.5}, "capacity must be above 0 and at most 1, got 1.5"),
        ({"capacity": float("nan")}, "capacity must be above 0 and at most 1, got nan"),
        ({"capacity": "half"}, "capacity must be above 0"),
        ({"blocks": []}, "blocks must name at least one"),
        ({"blocks": [1, 1]}, "none twice"),
        ({"blocks": 3}, "list of layer indices"),
        ({"blocks": [7]}, "block 7 does not exist; the decoder has blocks 0 to 2"),
        ({"tokens": "image"}, "tokens must be one of visual, all"),
        ({"predictor_size": 0}, "predictor_size must be"),
        ({"depth": 1}, "has no setting 'depth'"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message) as error:
        LearnedActivationRouting(**options).apply(make_pair("dense").ours)
    one_line(error.value)


def test_bad_forwards():
    model, inputs = make_pair("dense", attn="eager").ours, make_inputs(*PROMPTS["one picture"])
    routing = routed(model)
    with pytest.raises(ValueError, match="never forms the weights"):
        logits_of(model, inputs, output_attentions=True)
    decoder = model.model.language_model
    handle = decoder.layers[0].register_forward_hook(lambda module, given, out: out[:, 1:])
    with pytest.raises(ValueError, match="dropped between blocks"):
        logits_of(model, inputs)
    handle.remove()
    routing.revert(model)


def test_default_blocks_are_the_last_half():
    model = make_pair("dense", text={"num_hidden_layers": 4}).ours
    routing = LearnedActivationRouting()
    routing.apply(model)
    assert routing.blocks_of(model.model.language_model) == [2, 3]
    assert [hasattr(layer, "token_router") for layer in model.model.language_model.layers] == [False] * 2 + [True] * 2
