"""Routing and experts against a dense loop, and the auxiliary loss against stock's."""

import pytest
import torch
from helpers import assert_close, forget, make_inputs, make_pair, slow_experts, stock_forward, valid_positions


def sparse_block(model, layer=0):
    return model.model.language_model.layers[layer].mlp


def run_block(block, x):
    output = block(x)
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("top_k", [1, 2, 5])
@pytest.mark.parametrize("shape", [(1, 1), (2, 7), (3, 40)])
@torch.no_grad()
def test_experts_against_a_dense_loop(top_k, shape):
    pair = make_pair("moe", text={"num_experts_per_tok": top_k})
    model = pair.ours.double()
    # The other implementations call a grouped matrix product that knows no float64.
    model.set_experts_implementation("eager")
    x = torch.randn(*shape, 48, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = slow_experts(model.state_dict(), "model.language_model.layers.0.mlp", x, top_k)
    assert expected.abs().max() > 0.1
    # Stock, and so ours, takes the softmax of the router in float32.
    assert_close(run_block(sparse_block(model), x), expected, 1e-6, "experts and a dense loop")


@torch.no_grad()
def test_default_experts_against_a_dense_loop():
    pair = make_pair("moe")
    x = torch.randn(2, 30, 48, generator=torch.Generator().manual_seed(1))
    state = {name: value.double() for name, value in pair.ours.state_dict().items()}
    expected = slow_experts(state, "model.language_model.layers.0.mlp", x.double(), 2)
    assert_close(run_block(sparse_block(pair.ours), x), expected, 1e-5, "experts and a dense loop")


@torch.no_grad()
def test_order_of_tokens_does_not_count():
    block = sparse_block(make_pair("moe").ours)
    x = torch.randn(1, 30, 48, generator=torch.Generator().manual_seed(1))
    order = torch.randperm(30, generator=torch.Generator().manual_seed(2))
    assert_close(run_block(block, x[:, order]), run_block(block, x)[:, order], 1e-5, "tokens in another order")


@torch.no_grad()
def test_all_tokens_to_the_same_experts():
    pair = make_pair("moe")
    for model in (pair.ours, pair.stock):
        sparse_block(model).gate.weight.zero_()
        sparse_block(model).gate.weight[3] = 1.0
    x = torch.rand(2, 9, 48, generator=torch.Generator().manual_seed(1))
    expected = run_block(sparse_block(pair.stock), x)
    assert_close(run_block(sparse_block(pair.ours), x), expected, what="one busy expert")


def test_experts_without_tokens_get_no_gradient():
    pair = make_pair("moe")
    block = sparse_block(pair.ours)
    with torch.no_grad():
        block.gate.weight.zero_()
        block.gate.weight[1], block.gate.weight[4] = 2.0, 1.0
    run_block(block, torch.rand(2, 9, 48, generator=torch.Generator().manual_seed(1))).pow(2).sum().backward()
    used = block.experts.down_proj.grad.flatten(1).abs().amax(1) > 0
    assert used.tolist() == [False, True, False, False, True]


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@torch.no_grad()
def test_experts_implementation_names(implementation):
    pair = make_pair("moe")
    inputs = make_inputs(["text:3", "image:4x6", "text:4"], ["text:5"])
    keep = valid_positions(inputs)
    expected = stock_forward(pair.stock, **inputs).logits[keep]
    pair.ours.set_experts_implementation(implementation)
    assert_close(pair.ours(**inputs).logits[keep], expected, what=f"logits with {implementation} and stock's")


@pytest.mark.parametrize(
    "layers",
    [{"mlp_only_layers": []}, {"mlp_only_layers": [0, 2]}, {"mlp_only_layers": [], "decoder_sparse_step": 2}],
    ids=str,
)
@torch.no_grad()
def test_which_layers_are_sparse(layers):
    pair = make_pair("moe", text=layers)
    inputs = make_inputs(["text:3", "image:4x6", "text:4"])
    assert_close(pair.ours(**inputs).logits, stock_forward(pair.stock, **inputs).logits, what="logits")


@pytest.mark.parametrize("padding", ["left", "right"])
@torch.no_grad()
def test_router_logits_and_auxiliary_loss(padding):
    pair = make_pair("moe")
    inputs = make_inputs(["text:3", "image:4x6", "text:4"], ["text:5"], padding=padding)
    keep = valid_positions(inputs).flatten()
    options = {"output_router_logits": True, "labels": inputs["input_ids"]}
    expected = stock_forward(pair.stock, **inputs, **options)
    actual = pair.ours(**inputs, **options)
    assert len(actual.router_logits) == len(expected.router_logits) == 2, "one dense and two sparse layers"
    for ours, stock in zip(actual.router_logits, expected.router_logits, strict=True):
        assert_close(ours[keep], stock[keep], what="router logits")
    assert_close(actual.aux_loss, expected.aux_loss, what="auxiliary loss")
    assert_close(actual.loss, expected.loss, what="loss with the auxiliary loss")
    assert expected.aux_loss > 1.0
    plain = pair.ours(**inputs, labels=inputs["input_ids"])
    assert_close(actual.loss - plain.loss, 0.001 * actual.aux_loss, what="what the auxiliary loss adds")
    assert plain.aux_loss is None


@torch.no_grad()
def test_router_logits_by_config():
    pair = make_pair("moe", text={"output_router_logits": True, "router_aux_loss_coef": 0.5})
    inputs = make_inputs(["text:7"])
    expected = stock_forward(pair.stock, **inputs, labels=inputs["input_ids"])
    actual = pair.ours(**inputs, labels=inputs["input_ids"])
    assert_close(actual.loss, expected.loss, what="loss")
    assert_close(actual.aux_loss, expected.aux_loss, what="auxiliary loss without a mask")


def test_gradients_of_the_auxiliary_loss():
    pair = make_pair("moe", text={"router_aux_loss_coef": 1.0})
    inputs = make_inputs(["text:3", "image:4x6", "text:4"], ["text:5"])
    for model in (forget(pair.stock), pair.ours):
        model(**inputs, labels=inputs["input_ids"], output_router_logits=True).loss.backward()
    name = "model.language_model.layers.2.mlp.gate.weight"
    actual, expected = pair.ours.get_parameter(name).grad, pair.stock.get_parameter(name).grad
    assert expected.abs().max() > 1e-3
    assert_close(actual, expected, 1e-4, "gradients of the router")
