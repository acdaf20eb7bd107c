"""The sparse layer on its own."""

import pytest
import torch
from helpers import assert_close, make_pair, one_line, slow_experts

from qwen3_vl import MoeLayer


def layer(dtype=torch.float32, **sizes):
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 24,
        "num_experts": 6,
        "top_k": 2,
        "intermediate_size": 10,
        "initializer_range": 0.3,
        **sizes,
    }
    return MoeLayer(**sizes).to(dtype)


@pytest.mark.parametrize("shape", [(24,), (1, 24), (2, 5, 24), (200, 24), (0, 24)])
@pytest.mark.parametrize("top_k", [1, 2, 6])
@torch.no_grad()
def test_against_a_dense_loop(shape, top_k):
    moe, x = layer(top_k=top_k), torch.randn(shape, generator=torch.Generator().manual_seed(1))
    state = {f"moe.{name}": value.double() for name, value in moe.state_dict().items()}
    expected = slow_experts(state, "moe", x.double(), top_k)
    assert_close(moe(x), expected, 1e-5, "experts and a dense loop")


@torch.no_grad()
def test_takes_the_weights_of_the_decoder():
    block = make_pair("moe").ours.model.language_model.layers[0].mlp
    moe = MoeLayer(hidden_size=48, num_experts=5, top_k=2, intermediate_size=40)
    moe.load_state_dict(block.state_dict(), strict=True)
    x = torch.randn(2, 9, 48, generator=torch.Generator().manual_seed(1))
    assert_close(moe(x), block(x), what="the layer and the decoder's block")


def test_gradients_are_those_of_the_dense_loop():
    moe, x = layer(), torch.randn(7, 24, generator=torch.Generator().manual_seed(1))
    moe(x).pow(2).sum().backward()
    state = {f"moe.{name}": value.detach().double().requires_grad_() for name, value in moe.named_parameters()}
    slow_experts(state, "moe", x.double(), 2).pow(2).sum().backward()
    for name, parameter in moe.named_parameters():
        assert_close(parameter.grad, state[f"moe.{name}"].grad, 1e-4, f"gradients of {name}")
        assert parameter.grad.abs().max() > 0


def test_balancing_loss():
    moe = layer(num_experts=4, top_k=1)
    balanced = torch.eye(4) * 1e-3
    assert abs(moe.balancing_loss(balanced).item() - 1.0) < 1e-3, "equal shares give top_k"
    one_sided = torch.tensor([[50.0, 0.0, 0.0, 0.0]] * 4)
    assert abs(moe.balancing_loss(one_sided).item() - 4.0) < 1e-3, "one busy expert gives their number"
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]])
    padded = torch.cat((balanced, one_sided))
    assert_close(moe.balancing_loss(padded, mask), moe.balancing_loss(balanced), what="loss without padding")


def test_training_with_the_loss_spreads_tokens():
    moe = layer()
    with torch.no_grad():
        moe.gate.weight[0] += 0.5  # tokens with a positive sum like this expert best
    x = torch.randn(64, 24, generator=torch.Generator().manual_seed(1)) + 0.5
    optimizer = torch.optim.Adam([moe.gate.weight], lr=0.01)
    losses = []
    for _ in range(60):
        _, logits = moe(x, output_router_logits=True)
        loss = moe.balancing_loss(logits)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1 and losses[-1] < 2.2, losses[::20]


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"top_k": 7}, "cannot visit 7 of 6 experts"),
        ({"top_k": 0}, "top_k must be a whole number of at least 1, got 0"),
        ({"num_experts": 2.5}, "num_experts must be a whole number"),
        ({"num_experts": True}, "num_experts must be a whole number"),
        ({"hidden_size": 0}, "hidden_size must be a whole number of at least 1, got 0"),
        ({"intermediate_size": -1}, "intermediate_size must be"),
    ],
)
def test_bad_sizes(sizes, message):
    with pytest.raises(ValueError, match=message) as caught:
        layer(**sizes)
    one_line(caught.value)


def test_bad_width():
    with pytest.raises(ValueError, match=r"must end in 24 \(hidden_size\), got shape \(3, 25\)"):
        layer()(torch.zeros(3, 25))


def test_default_width_is_that_of_the_published_model():
    assert MoeLayer(hidden_size=2048 // 64, num_experts=4, top_k=1).intermediate_size == 96
    with torch.device("meta"):
        assert MoeLayer(hidden_size=2048, num_experts=128, top_k=8).intermediate_size == 768
