"""Training: steps equal to stock's, checkpointing, bfloat16, and LoRA through PEFT."""

import pytest
import torch
from helpers import assert_close, forget, make_inputs, make_pair, our_class, stock_forward, valid_positions


def batch(seed=0):
    inputs = make_inputs(
        ["text:2", "image:4x6", "text:4"], ["text:6"], ["text:1", "video:2x4x4", "text:9"], padding="right", seed=seed
    )
    labels = inputs["input_ids"].clone()
    labels[~valid_positions(inputs) | (inputs["mm_token_type_ids"] > 0)] = -100
    return {**inputs, "labels": labels}


def gradients(model, inputs):
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(actual, expected, tolerance=1e-4):
    assert actual.keys() == expected.keys()
    assert len(expected) > 20
    for name, gradient in expected.items():
        assert_close(actual[name], gradient, tolerance, f"gradients of {name}")


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(pair, use_reentrant):
    inputs = batch()
    expected = gradients(pair.ours.train(), inputs)
    pair.ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    assert pair.ours.is_gradient_checkpointing
    if use_reentrant:
        pair.ours.enable_input_require_grads()
    calls = []
    # Hooked before it runs, as the second run is broken off once all is there that the way back needs.
    layer = pair.ours.model.language_model.layers[0].mlp
    layer.register_forward_pre_hook(lambda *_: calls.append(1))
    actual = gradients(pair.ours, inputs)
    assert len(calls) == 2, "the layer was not computed again on the way back"
    if use_reentrant:
        # The tower's input is pixels without a gradient, which the reentrant kind cannot start from; stock the same.
        actual, expected = ({n: g for n, g in grads.items() if "visual" not in n} for grads in (actual, expected))
    assert_same_gradients(actual, expected)
    pair.ours.gradient_checkpointing_disable()
    assert_same_gradients(gradients(pair.ours, inputs), gradients(forget(pair.stock).train(), inputs))


def test_checkpointing_reaches_the_tower(pair):
    pair.ours.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    calls = []
    pair.ours.model.visual.blocks[1].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    pair.ours(**batch()).loss.backward()
    assert len(calls) == 2 + 2, "image and video, each computed again"


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_training_steps_equal_stock(pair, optimizer):
    losses = []
    for model in (pair.stock, pair.ours):
        steps = optimizer(model.train().parameters(), lr=1e-3)
        own = []
        for seed in range(3):
            steps.zero_grad()
            loss = forget(model)(**batch(seed)).loss
            loss.backward()
            steps.step()
            own.append(loss.detach())
        losses.append(torch.stack(own))
    assert_close(losses[1], losses[0], 1e-4, "losses of three steps")
    assert losses[0].std() > 1e-3


def test_a_batch_can_be_learned(pair):
    inputs = batch()
    optimizer = torch.optim.AdamW(pair.ours.train().parameters(), lr=3e-3)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = pair.ours(**inputs).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_frozen_tower(pair):
    pair.ours.train().model.visual.requires_grad_(False)
    found = gradients(pair.ours, batch())
    assert found
    assert not any("visual" in name for name in found)


def test_attention_dropout_only_in_training(kind):
    pair = make_pair(kind, text={"attention_dropout": 0.5}, attn="eager")
    inputs = batch()
    keep = valid_positions(inputs)
    with torch.no_grad():
        expected = stock_forward(pair.stock, **inputs).logits[keep]
        assert_close(pair.ours.eval()(**inputs).logits[keep], expected, what="logits in evaluation")
        noisy = pair.ours.train()(**inputs).logits[keep]
    assert (noisy - expected).abs().max() > 1e-2


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_bfloat16_stays_finite(kind, attn):
    pair = make_pair(kind, attn=attn, dtype=torch.bfloat16)
    inputs = batch()
    keep = valid_positions(inputs)
    with torch.no_grad():
        exact = stock_forward(make_pair(kind, attn=attn).stock, **inputs).logits[keep]
        stock = stock_forward(pair.stock, **inputs).logits[keep]
        ours = pair.ours(**inputs).logits[keep]
    assert ours.dtype == torch.bfloat16
    assert ours.isfinite().all()
    # Ours may round elsewhere than stock, but not worse: twice stock's mean error against float32.
    stock_error, our_error = (stock.float() - exact).abs().mean(), (ours.float() - exact).abs().mean()
    assert our_error <= 2 * stock_error, f"{our_error:.3g} against stock's {stock_error:.3g}"
    found = gradients(pair.ours.train(), inputs)
    assert all(gradient.isfinite().all() for gradient in found.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_large_activations_stay_finite(kind, dtype):
    pair = make_pair(kind, dtype=dtype)
    for model in (pair.ours, pair.stock):
        model.get_input_embeddings().weight.mul_(300)
    inputs = make_inputs(["text:3", "image:4x6", "text:4"])
    assert stock_forward(pair.stock, **inputs).logits.isfinite().all()
    assert pair.ours(**inputs).logits.isfinite().all()


@torch.no_grad()
def test_autocast(pair):
    inputs = make_inputs(["text:3", "image:4x6", "text:4"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = stock_forward(pair.stock, **inputs).logits
        actual = pair.ours(**inputs).logits
    exact = stock_forward(pair.stock, **inputs).logits
    assert (actual.float() - exact).abs().mean() <= 2 * (expected.float() - exact).abs().mean()


def lora(model, **options):
    from peft import LoraConfig, get_peft_model

    options = {"target_modules": ["q_proj", "v_proj", "qkv"], "r": 4, "lora_alpha": 8, **options}
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))


def train_steps(model, inputs, count=3):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(count):
        optimizer.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_lora_trains_saves_and_reloads(pair, tmp_path):
    from peft import PeftModel

    inputs = batch()
    before = {name: value.clone() for name, value in pair.ours.state_dict().items()}
    torch.manual_seed(0)
    adapted = lora(pair.ours).train()
    trainable = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert trainable
    assert all("lora_" in name for name in trainable)
    assert any("visual" in name for name in trainable)
    losses = train_steps(adapted, inputs)
    assert losses[-1] < losses[0]
    adapted.eval()
    keep = valid_positions(inputs)
    with torch.no_grad():
        trained = adapted(**inputs).logits[keep]
    adapted.save_pretrained(tmp_path)

    base = our_class(pair.kind, "ForConditionalGeneration")._from_config(
        our_class(pair.kind, "Config").from_dict(pair.config_dict), attn_implementation="sdpa"
    )
    base.load_state_dict(before, strict=True)
    again = PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.no_grad():
        assert_close(again(**inputs).logits[keep], trained, what="logits of a reloaded adapter")
        merged = again.merge_and_unload()
        assert_close(merged(**inputs).logits[keep], trained, 1e-4, "logits of a merged adapter")
    assert merged.state_dict().keys() == before.keys()


def test_adapters_are_exchanged_with_stock(pair, tmp_path):
    from peft import PeftModel

    inputs = batch()
    keep = valid_positions(inputs)
    torch.manual_seed(0)
    ours = lora(pair.ours, init_lora_weights=False).eval()
    ours.save_pretrained(tmp_path)
    stock = PeftModel.from_pretrained(forget(pair.stock), tmp_path).eval()
    with torch.no_grad():
        expected = stock(**inputs).logits[keep]
        assert_close(ours(**inputs).logits[keep], expected, what="logits of one adapter on both")


def test_lora_with_checkpointing_and_generation(pair):
    inputs = batch()
    torch.manual_seed(0)
    adapted = lora(pair.ours, init_lora_weights=False).train()
    expected = gradients(adapted, inputs)
    adapted.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    adapted.enable_input_require_grads()
    actual = gradients(adapted, inputs)
    for name, gradient in expected.items():
        assert_close(actual[name], gradient, 1e-4, f"gradients of {name}")
    adapted.eval()
    prompt = make_inputs(["text:3", "image:4x6", "text:2"])
    tokens = adapted.generate(**prompt, max_new_tokens=4, do_sample=False)
    with torch.no_grad(), adapted.disable_adapter():
        plain = adapted.generate(**prompt, max_new_tokens=4, do_sample=False)
    assert tokens.tolist() != plain.tolist()


def test_all_linear_layers_can_be_adapted(pair):
    adapted = lora(pair.ours, target_modules="all-linear")
    names = {name for name, _ in adapted.named_modules() if name.endswith("lora_A")}
    parts = (
        "self_attn.q_proj",
        "self_attn.o_proj",
        "mlp.down_proj",
        "attn.qkv",
        "mlp.linear_fc1",
        "merger.linear_fc2",
    )
    for part in parts:
        assert any(part in name for name in names), part
    assert not any("lm_head" in name for name in names)
