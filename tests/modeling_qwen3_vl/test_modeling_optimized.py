"""The attention module with a mechanism of its own: the plain module's answers, whatever masks the model makes."""

import copy
import gc

import pytest
import torch
from helpers import assert_close, make_inputs, make_pair, one_line, valid_positions
from torch.nn.attention.flex_attention import create_block_mask
from transformers import DynamicCache, StaticCache

from qwen3_vl.modeling_qwen3_vl.modeling_optimized import OptimizedQwen3VLAttention, as_layout
from qwen3_vl.modeling_qwen3_vl.modeling_text import Qwen3VLAttention
from qwen3_vl.optim.attention import block_map
from qwen3_vl.optim.attention.adaptive_settings import AdaptiveSettings
from qwen3_vl.optim.attention.attention_adaptive import AdaptiveAttention
from qwen3_vl.optim.attention.attention_dynamic_sparse import DynamicSparseAttention, DynamicSparseSettings
from qwen3_vl.optim.attention.attention_layout import AttentionLayout
from qwen3_vl.optim.cache.cache_evicting import EvictingKVCache
from qwen3_vl.optim.cache.cache_paged import PagedKVCache
from qwen3_vl.optim.registry_optim import TECHNIQUES


GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
EXACT = ("qwen3_vl_adaptive", "qwen3_vl_exact", "qwen3_vl_memory_efficient")
LAYOUTS = {
    "image": [["text:5", "image:4x6", "text:3"]],
    "left-padded": [["text:5", "image:4x6", "text:3"], ["text:4"], ["image:4x4", "text:12"]],
}
CACHES = {
    "dynamic": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config=config, max_cache_len=40),
    "paged": lambda config: PagedKVCache(),
}
# So small that it leaves most out of the inputs here.
SPARSE = DynamicSparseSettings(
    threshold=0.2, min_blocks=1, window_tokens=4, query_block=8, key_block=4, stride=4, dense_below_tokens=0,
    decode_share=0.01, min_pages=1, page_tokens=4,
)  # fmt: skip


def optimized(model, *arguments, layers=slice(None)):
    """A copy of `model` whose decoder layers, or some, have the optimized module; the weights are shared."""
    made = copy.deepcopy(model)
    made.load_state_dict(model.state_dict(), assign=True)
    for layer in made.model.language_model.layers[layers]:
        layer.self_attn = OptimizedQwen3VLAttention.from_attention(layer.self_attn, *arguments)
    return made


@pytest.mark.parametrize("mechanism", EXACT)
@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_evicted_history(layout, mechanism):
    """With a cache that evicts, where entries are fewer than tokens, the module answers as the model-wide function."""
    model = make_pair("dense").ours
    model.set_attn_implementation(mechanism)
    made = optimized(model, mechanism)
    made.set_attn_implementation("sdpa")
    inputs, config = make_inputs(*LAYOUTS[layout]), model.config.get_text_config()
    answers = []
    for candidate in (model, made):
        cache = EvictingKVCache(
            config, policy="streaming", max_tokens=8, sink_tokens=2, slack_tokens=1, window_tokens=4
        )
        answers.append(candidate.generate(**inputs, past_key_values=cache, **GREEDY))
        assert cache.evicted
    assert torch.equal(*answers)


@pytest.mark.parametrize("model_wide", ["sdpa", "eager", "qwen3_vl_exact"])
@pytest.mark.parametrize("mechanism", EXACT)
@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_equal_logits(kind, layout, mechanism, model_wide):
    model = make_pair(kind).ours
    inputs = make_inputs(*LAYOUTS[layout])
    expected = model(**inputs).logits
    model.set_attn_implementation(model_wide)
    made = optimized(model, mechanism)
    assert list(made.state_dict()) == list(model.state_dict())
    assert made.model.language_model.layers[0].self_attn.mechanism == mechanism
    keep = valid_positions(inputs)
    assert_close(made(**inputs).logits[keep], expected[keep])


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_generates_the_same_tokens(layout, cache):
    pair = make_pair("dense")
    inputs = make_inputs(*LAYOUTS[layout])
    expected = pair.stock.generate(**inputs, **GREEDY)
    for mechanism in EXACT:
        made = optimized(pair.ours, mechanism)
        past = CACHES[cache](made.config)
        assert torch.equal(made.generate(**inputs, **GREEDY, past_key_values=past), expected)


@torch.no_grad()
def test_chunked_prefill():
    pair = make_pair("dense")
    inputs = make_inputs(["text:20"], ["text:15"])
    expected = pair.stock(**inputs).logits[:, -4:]
    for cache in CACHES:
        made, past = optimized(pair.ours), CACHES[cache](pair.ours.config)
        made(
            input_ids=inputs["input_ids"][:, :9], attention_mask=inputs["attention_mask"][:, :9], past_key_values=past
        )
        rest = made(
            input_ids=inputs["input_ids"][:, 9:], attention_mask=inputs["attention_mask"], past_key_values=past
        )
        assert_close(rest.logits[:, -4:], expected)


@torch.no_grad()
def test_prefill_into_a_preallocated_cache_without_a_mask():
    pair = make_pair("dense")
    ids = make_inputs(["text:12"])["input_ids"]
    made, past = optimized(pair.ours), StaticCache(config=pair.ours.config, max_cache_len=30)
    assert_close(made(input_ids=ids, past_key_values=past).logits, pair.stock(input_ids=ids).logits)


def test_shares_weights_and_settings():
    model = make_pair("dense").ours
    plain = model.model.language_model.layers[1].self_attn
    made = OptimizedQwen3VLAttention.from_attention(plain)
    assert isinstance(made, Qwen3VLAttention) and made.layer_idx == 1 and not made.training
    assert all(mine is its for mine, its in zip(made.parameters(), plain.parameters(), strict=True))
    assert plain.config._attn_implementation == "sdpa" == model.config.text_config._attn_implementation
    again = OptimizedQwen3VLAttention.from_attention(made, "dynamic_sparse", {"threshold": 0.5})
    assert again.mechanism == "qwen3_vl_dynamic_sparse" and again.model_config is plain.config
    assert again.attention_settings["qwen3_vl_dynamic_sparse"].threshold == 0.5
    assert OptimizedQwen3VLAttention.from_attention(again, "dynamic_sparse").attention_settings == {
        **again.attention_settings
    }


def test_built_alone():
    config = make_pair("dense").ours.config.text_config
    module = OptimizedQwen3VLAttention(config, 0, "memory_efficient", {"query_chunk": 3})
    assert set(module.state_dict()) == set(Qwen3VLAttention(config, 0).state_dict())
    positions = (torch.ones(1, 5, 16), torch.zeros(1, 5, 16))
    assert module(torch.randn(1, 5, 48), positions)[0].shape == (1, 5, 48)


@torch.no_grad()
def test_layers_have_rules_of_their_own(monkeypatch):
    model = make_pair("dense").ours
    rules = AdaptiveSettings(
        layers={1: {"prefill": "dynamic_sparse"}}, mechanisms={"dynamic_sparse": SPARSE, "sparse": {}}
    )
    made = optimized(model, "qwen3_vl_adaptive", rules)
    made(**make_inputs(["text:60"]))
    assert [hasattr(layer.self_attn, "last_computed") for layer in made.model.language_model.layers] == [
        False,
        True,
        False,
    ]
    assert DynamicSparseAttention.last_density(made)[0] < 1


@torch.no_grad()
def test_sparse_mechanisms_read_dense_masks_back():
    """With padding, sdpa's mask is dense; the answer is that of the same mechanism for the whole model."""
    model = make_pair("dense").ours
    inputs = make_inputs(["text:60"], ["text:41"])
    made = optimized(model, "dynamic_sparse", SPARSE)
    logits, tokens = made(**inputs).logits, made.generate(**inputs, **GREEDY)
    assert max(DynamicSparseAttention.last_density(made)) < 1
    keep = valid_positions(inputs)
    assert (logits - model(**inputs).logits)[keep].abs().max() > 1e-3
    technique = DynamicSparseAttention(**vars(SPARSE))
    technique.apply(model)
    assert_close(logits[keep], model(**inputs).logits[keep])
    # A cache of pages brings its own page size, so both take the stock one.
    assert torch.equal(tokens, model.generate(**inputs, **GREEDY, past_key_values=DynamicCache()))


@torch.no_grad()
def test_packed_rows():
    """Packing is more than padding: exact mechanisms take the dense mask, sparse ones refuse it."""
    pair = make_pair("dense")
    inputs = make_inputs(["text:7"])["input_ids"], make_inputs(["text:5"], seed=3)["input_ids"]
    plain = torch.cat([torch.arange(7), torch.arange(5)])[None]
    packed = {"input_ids": torch.cat(inputs, dim=1), "position_ids": plain.expand(4, 1, -1), "use_cache": False}
    alone = torch.cat([pair.stock(input_ids=ids).logits for ids in inputs], dim=1)
    assert_close(optimized(pair.ours)(**packed).logits, alone)
    with pytest.raises(ValueError, match="dense mask") as error:
        optimized(pair.ours, "dynamic_sparse")(**packed)
    one_line(error.value)


@pytest.mark.parametrize("seen", [0, 4])
@pytest.mark.parametrize("spare", [0, 3])
@pytest.mark.parametrize("queries", [1, 5])
def test_masks_are_read_back_exactly(queries, spare, seen):
    keys = seen + queries + spare
    valid = torch.ones(2, keys, dtype=torch.bool)
    valid[:, seen + queries :] = False
    mask = AttentionLayout(seen, valid).dense(queries, keys)
    layout = as_layout(mask, queries, seen)
    assert layout.plainly_causal and torch.equal(layout.dense(queries, keys).expand_as(mask), mask)
    valid[1, :1] = False
    mask = AttentionLayout(seen, valid).dense(queries, keys)
    layout = as_layout(mask, queries, seen)
    assert isinstance(layout, AttentionLayout) and torch.equal(layout.dense(queries, keys), mask)
    assert as_layout(mask, queries, seen) is layout  # all layers of a forward share it


def test_other_masks_stay_as_they_are():
    causal = AttentionLayout(0).dense(6, 6)
    window = causal & ~AttentionLayout(-3).dense(6, 6)
    additive = torch.zeros(1, 1, 6, 6).masked_fill(~causal, float("-inf"))
    per_head = causal.expand(1, 4, 6, 6)
    flags, layout = torch.ones(1, 6), AttentionLayout(2)
    for mask in (window, additive, per_head, flags, layout, causal[..., :-1]):
        assert as_layout(mask, 6, 0) is mask
    assert as_layout(None, 6, 7) == AttentionLayout(7)


def test_nothing_is_left_of_masks():
    gc.collect()
    held = len(block_map._NOTES)
    for mask in (AttentionLayout(0).dense(6, 6), AttentionLayout(-1).dense(6, 6)):
        as_layout(mask, 6, 0)
    as_layout(None, 6, 0, shared := torch.ones(1))
    assert len(block_map._NOTES) == held + 2  # of the last of each
    assert as_layout(None, 6, 0, shared) is as_layout(None, 6, 0, shared)
    del mask, shared
    gc.collect()
    assert len(block_map._NOTES) == held


def test_masks_of_flex_attention_are_refused():
    mask = create_block_mask(lambda b, h, q, k: q >= k, 1, None, 8, 8, device="cpu")
    with pytest.raises(ValueError, match="type BlockMask cannot be read") as error:
        as_layout(mask, 8, 0)
    one_line(error.value)


@torch.no_grad()
def test_compiles_in_one_graph():
    model = make_pair("dense").ours
    module = OptimizedQwen3VLAttention.from_attention(model.model.language_model.layers[0].self_attn)
    states, positions = torch.randn(2, 9, 48), (torch.randn(2, 9, 16), torch.randn(2, 9, 16))
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    for mask in (None, AttentionLayout(0).dense(9, 9).expand(2, 1, 9, 9)):
        assert_close(compiled(states, positions, mask)[0], module(states, positions, mask)[0])


def test_attention_weights_are_refused():
    model = make_pair("dense", attn="eager").ours
    made = optimized(model, layers=slice(1))
    with pytest.raises(ValueError, match="never forms the weights"):
        made(**make_inputs(["text:4"]), output_attentions=True)
    made.config.text_config.output_attentions = True
    with pytest.raises(ValueError, match="never forms the weights") as error:
        made(**make_inputs(["text:4"]))
    one_line(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("exact",), "there is no attention mechanism"),
        (("sparse", {"windows": 1}), "no setting 'windows'"),
        (("adaptive", {"decode": "sprase"}), "did you mean 'sparse'"),
    ],
)
def test_bad_arguments(arguments, message):
    plain = make_pair("dense").ours.model.language_model.layers[0].self_attn
    with pytest.raises(ValueError, match=message) as error:
        OptimizedQwen3VLAttention.from_attention(plain, *arguments)
    one_line(error.value)


def test_techniques_apply_and_revert_around_it():
    model = make_pair("dense").ours
    inputs = make_inputs(["text:5", "image:4x6", "text:3"])
    made = optimized(model, "qwen3_vl_adaptive", {"prefill": "memory_efficient"})
    before = made(**inputs).logits
    for technique in (AdaptiveAttention(attention_type="flash"), TECHNIQUES["qwen3_vl_exact"]()):
        technique.apply(made)
        assert_close(made(**inputs).logits, before, 1e-4)
        technique.revert(made)
        assert torch.equal(made(**inputs).logits, before)


def test_trains_and_copies():
    pair = make_pair("dense")
    inputs = make_inputs(["text:5", "image:4x6", "text:3"])
    made = copy.deepcopy(optimized(pair.ours)).train()
    for model in (pair.stock, made):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    theirs = dict(pair.stock.named_parameters())
    for name, parameter in made.named_parameters():
        assert_close(parameter.grad, theirs[name].grad, 1e-4, name)
