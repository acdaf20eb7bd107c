"""The chunked loss against the plain one, and its gradients."""

import pytest
import torch
from helpers import one_line
from torch.nn import functional as F

from qwen3_vl import chunked_cross_entropy


def _problem(dtype=torch.float32, rows=23, width=8, vocabulary=37, trained=True):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(rows, width, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=generator).to(dtype).requires_grad_(trained)
    labels = torch.randint(0, vocabulary, (rows,), generator=generator)
    labels[::4] = -100
    return hidden, weight, labels


def _plain(hidden, weight, labels, items=None):
    logits = (hidden @ weight.T).float() if hidden.dtype != torch.float64 else hidden @ weight.T
    loss = F.cross_entropy(logits, labels, reduction="sum")
    return loss / ((labels != -100).sum() if items is None else items)


@pytest.mark.parametrize("chunk_rows", [1, 5, 17, 100, None])
@pytest.mark.parametrize("items", [None, 7, torch.tensor(11)])
def test_loss_and_gradients_equal_the_plain_ones(chunk_rows, items):
    hidden, weight, labels = _problem()
    expected = torch.autograd.grad(3 * _plain(hidden, weight, labels, items), (hidden, weight))
    loss = chunked_cross_entropy(hidden, weight, labels, items, chunk_rows=chunk_rows)
    torch.testing.assert_close(loss, _plain(hidden, weight, labels, items), rtol=1e-6, atol=1e-6)
    for ours, plain in zip(torch.autograd.grad(3 * loss, (hidden, weight)), expected, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)


def test_gradcheck_in_float64():
    hidden, weight, labels = _problem(torch.float64, rows=6, width=3, vocabulary=5)
    assert torch.autograd.gradcheck(lambda h, w: chunked_cross_entropy(h, w, labels, chunk_rows=2), (hidden, weight))


def test_a_second_backward_of_a_kept_graph_gives_the_same():
    hidden, weight, labels = _problem()
    loss = chunked_cross_entropy(hidden, weight, labels)
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(2 * loss, (hidden, weight))
    assert all(torch.equal(2 * a, b) for a, b in zip(first, second, strict=True))


def test_a_frozen_head_gets_no_gradient():
    hidden, weight, labels = _problem(trained=False)
    chunked_cross_entropy(hidden, weight, labels).backward()
    expected = torch.autograd.grad(_plain(hidden, weight, labels), hidden)[0]
    assert weight.grad is None
    torch.testing.assert_close(hidden.grad, expected)


def test_bfloat16_softmax_is_float32():
    hidden, weight, labels = _problem(torch.bfloat16)
    loss = chunked_cross_entropy(hidden, weight, labels, chunk_rows=4)
    plain = _plain(hidden, weight, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=1e-5)
    ours, theirs = torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(plain, (hidden, weight))
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == torch.bfloat16
        torch.testing.assert_close(mine, other, rtol=0.05, atol=0.01)


def test_autocast_multiplies_in_its_dtype():
    hidden, weight, labels = _problem()
    with torch.autocast("cpu", torch.bfloat16):
        loss = chunked_cross_entropy(hidden, weight, labels, chunk_rows=4)
        plain = F.cross_entropy(F.linear(hidden, weight).float(), labels)
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(plain, (hidden, weight))
    for mine, other in zip(*grads, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, other, rtol=0.05, atol=0.01)


def test_no_label_at_all_is_zero_and_has_zero_gradients():
    hidden, weight, labels = _problem()
    loss = chunked_cross_entropy(hidden, weight, torch.full_like(labels, -100))
    loss.backward()
    assert loss.item() == 0
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_never_holds_all_logits():
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            output = func(*args, **(kwargs or {}))
            if torch.is_tensor(output):
                largest = max(largest, output.numel())
            return output

    hidden, weight, labels = _problem(rows=64, vocabulary=500)
    with Watch():
        chunked_cross_entropy(hidden, weight, labels, chunk_rows=4).backward()
    assert largest <= weight.numel() < 64 * 500


@pytest.mark.parametrize("wrong", ["labels", "width", "chunk"])
def test_bad_input(wrong):
    hidden, weight, labels = _problem()
    with pytest.raises(ValueError) as error:
        chunked_cross_entropy(
            hidden[:, 1:] if wrong == "width" else hidden,
            weight,
            labels[1:] if wrong == "labels" else labels,
            chunk_rows=0 if wrong == "chunk" else None,
        )
    one_line(error.value)
