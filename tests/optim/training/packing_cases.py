"""What the tests of packing share: processed samples of every kind, and a model's loss and gradients."""

import torch
from helpers import make_inputs


LAYOUTS = (
    ["text:6"],
    ["text:3", "image:4x6", "text:4"],
    ["image:2x2", "text:2", "image:6x4", "text:3"],
    ["text:2", "video:2x4x4", "text:5", "image:4x4", "text:2"],
    ["text:1", "video:3x2x4", "text:2", "video:1x4x2", "text:1"],
)


def make_sample(layout, seed=0):
    """A sample as the processor gives it, (1, tokens), with labels on the text, its first token among it."""
    sample = make_inputs(layout, seed=seed)
    labels = torch.where(sample["mm_token_type_ids"] == 0, sample["input_ids"], -100)
    labels[:, -2] = -100
    return {**sample, "labels": labels}


def make_samples(layouts=LAYOUTS):
    return [make_sample(layout, seed) for seed, layout in enumerate(layouts)]


def gradients(model):
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def loss_alone(model, samples):
    """Loss and gradients of samples run one by one: the mean over all that is learned in any of them."""
    model.zero_grad(set_to_none=True)
    learned = sum(int((sample["labels"][:, 1:] != -100).sum()) for sample in samples)
    total = 0.0
    for sample in samples:
        loss = model(**sample, use_cache=False).loss * int((sample["labels"][:, 1:] != -100).sum()) / learned
        loss.backward()
        total += loss.item()
    return total, gradients(model)


def loss_packed(model, batch, **options):
    model.zero_grad(set_to_none=True)
    loss = model(**batch, **options).loss
    loss.backward()
    return loss.item(), gradients(model)
