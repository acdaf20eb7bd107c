"""Experts for few tokens against float64, and a sparse model that takes them."""

import copy

import pytest
import torch
from helpers import assert_close, make_inputs, make_pair, max_difference, one_line, tiny_config_dict
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import qwen3_vl
from qwen3_vl.optim.native import native_experts as native
from qwen3_vl.optim.native.native_experts import experts_kernel, native_experts, supports_experts
from qwen3_vl.optim.registry_optim import TECHNIQUES
from qwen3_vl.optim.weights import moe_grouped
from qwen3_vl.optim.weights.moe_experts import sum_of_experts
from qwen3_vl.optim.weights.moe_grouped import GroupedExperts


needs_compiler = pytest.mark.skipif(experts_kernel() is None, reason="no C++ compiler")


def states(tokens, k, experts, hidden, width, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, hidden, generator=generator)
    index = torch.stack([torch.randperm(experts, generator=generator)[:k] for _ in range(tokens)])
    shares = torch.rand(tokens, k, generator=generator).softmax(-1)
    gate_up = torch.randn(experts, 2 * width, hidden, generator=generator) / hidden**0.5
    down = torch.randn(experts, hidden, width, generator=generator) / width**0.5
    return [x.to(dtype), index, shares.to(dtype), gate_up.to(dtype), down.to(dtype)]


def reference(x, index, shares, gate_up, down):
    """Token by token, expert by expert, in float64."""
    x, shares, gate_up, down = (one.double() for one in (x, shares, gate_up, down))
    result = torch.zeros_like(x)
    for token, choice in enumerate(index.tolist()):
        for place, expert in enumerate(choice):
            if expert < len(down):
                gate, up = (gate_up[expert] @ x[token]).chunk(2)
                inner = gate / (1 + (-gate).exp()) * up
                result[token] += shares[token, place] * (down[expert] @ inner)
    return result


def check(actual, given_states, dtype):
    expected = reference(*given_states)
    tolerance = 1e-5 if dtype == torch.float32 else 2**-6
    assert actual.dtype == dtype
    assert ((actual.double() - expected).abs() <= tolerance * (1 + expected.abs())).all()


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hidden, width", [(48, 40), (32, 16), (33, 7), (5, 1), (130, 67)])
@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 8])
def test_kernel_matches_float64(tokens, hidden, width, dtype):
    given_states = states(tokens, 3, 5, hidden, width, dtype)
    assert supports_experts(*given_states)
    check(native_experts(*given_states), given_states, dtype)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_both_ways_on_any_shape(data):
    experts = data.draw(st.integers(1, 9))
    k = data.draw(st.integers(1, experts))
    sizes = [data.draw(st.integers(1, 40)) for _ in range(3)]
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    given_states = states(sizes[0], k, experts, sizes[1], sizes[2], dtype, seed=data.draw(st.integers(0, 99)))
    check(sum_of_experts(*given_states, nn.SiLU()), given_states, dtype)
    if experts_kernel() is not None:
        check(native_experts(*given_states), given_states, dtype)


@needs_compiler
@pytest.mark.parametrize("default", [torch.float32, torch.bfloat16])
def test_only_chosen_experts_are_read(default):
    given_states = states(2, 2, 6, 32, 16)
    given_states[1] = torch.tensor([[4, 1], [1, 0]])
    expected = native_experts(*given_states)
    for weight in given_states[3:]:
        weight[[2, 3, 5]] = float("nan")
    torch.set_default_dtype(default)
    try:
        assert torch.equal(native_experts(*given_states), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@needs_compiler
def test_experts_of_other_devices_add_nothing():
    given_states = states(3, 2, 4, 32, 16)
    given_states[1][0, 1] = given_states[1][2, 0] = 4
    given_states[1][1] = 4
    check(native_experts(*given_states), given_states, torch.float32)
    check(sum_of_experts(*given_states, nn.SiLU()), given_states, torch.float32)
    assert not native_experts(*given_states)[1].any()


@needs_compiler
def test_nan_stays_with_its_token():
    given_states = states(4, 2, 4, 32, 16)
    given_states[0][2, 3] = float("nan")
    assert native_experts(*given_states).isnan().any(-1).tolist() == [False, False, True, False]


@needs_compiler
def test_not_supported():
    few = states(2, 2, 4, 32, 16)
    assert supports_experts(*few)
    assert not supports_experts(*states(native.MOST_ROWS_OF_EXPERT * 4, 2, 4, 32, 16))
    assert not supports_experts(few[0].bfloat16(), *few[1:])
    assert not supports_experts(few[0], few[1].int(), *few[2:])
    assert not supports_experts(*(one.double() if one.is_floating_point() else one for one in few))
    assert not supports_experts(*few[:4], few[4].transpose(1, 2).contiguous().transpose(1, 2))
    assert not supports_experts(*few[:3], nn.Parameter(few[3]), few[4])
    with torch.autocast("cpu", torch.bfloat16):
        assert not supports_experts(*few)


@needs_compiler
@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}],
    ids=["greedy", "beams", "sampling"],
)
@pytest.mark.parametrize(
    "layout", [["text:6"], ["text:2", "image:4x6", "image:4x4"], ["video:2x4x4", "text:3"]], ids=str
)
def test_same_tokens_as_stock(layout, options, monkeypatch):
    pair, used = make_pair("moe"), []
    monkeypatch.setattr(moe_grouped, "native_experts", lambda *x: used.append(1) or native_experts(*x))
    inputs = make_inputs(layout, ["text:4"])
    options = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5, **options}
    GroupedExperts().apply(pair.ours)
    torch.manual_seed(0)
    ours = pair.ours.generate(**inputs, **options)
    torch.manual_seed(0)
    assert torch.equal(ours, pair.stock.generate(**inputs, **options))
    assert used


def test_many_tokens_and_gradients():
    pair, inputs = make_pair("moe"), make_inputs(["text:60"], ["text:60"])
    GroupedExperts().apply(pair.ours)
    for model in (pair.ours, pair.stock):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    for name, parameter in pair.stock.named_parameters():
        if "experts" in name or "gate.weight" in name:
            assert_close(pair.ours.get_parameter(name).grad, parameter.grad, 1e-4, f"gradients of {name}")


@torch.no_grad()
def test_apply_and_revert():
    model, inputs, technique = make_pair("moe").ours, make_inputs(["text:5"]), GroupedExperts()
    names = list(model.state_dict())
    before = model(**inputs).logits
    technique.apply(model)
    assert 0 < max_difference(model(**inputs).logits, before) <= 1e-5
    assert list(model.state_dict()) == names
    copied = copy.deepcopy(model)
    experts = copied.model.language_model.layers[0].mlp.experts
    assert experts.forward.module is experts
    technique.revert(model)
    assert torch.equal(model(**inputs).logits, before)
    assert not any("forward" in vars(module) for module in model.modules())


@torch.no_grad()
def test_compiled_graphs_take_the_model_s_way():
    pair, inputs = make_pair("moe"), make_inputs(["text:5"])
    expected = pair.ours(**inputs).logits
    GroupedExperts().apply(pair.ours)
    compiled = torch.compile(pair.ours, backend="eager")
    assert_close(compiled(**inputs, use_cache=False).logits, expected, what="logits")
    torch.compiler.reset()


def test_from_profile(tmp_path):
    model = make_pair("moe").ours
    model.config.optim = {"grouped_experts": {}}
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert isinstance(loaded.active_techniques[0], GroupedExperts)
    assert "forward" in vars(loaded.model.language_model.layers[0].mlp.experts)


def test_bad_input():
    with pytest.raises(ValueError, match="found no sparse experts with plain weights") as caught:
        GroupedExperts().apply(make_pair("dense").ours)
    one_line(caught.value)
    with pytest.raises(ValueError, match="grouped_experts has no setting 'rows'"):
        GroupedExperts(rows=3)
    config = qwen3_vl.Qwen3VLMoeConfig(**tiny_config_dict("moe", text={"num_experts_per_tok": 6}))
    with pytest.raises(ValueError, match="cannot visit 6 of 5 experts") as caught:
        qwen3_vl.Qwen3VLMoeForConditionalGeneration(config)
    one_line(caught.value)
    assert TECHNIQUES["grouped_experts"] is qwen3_vl.GroupedExperts
