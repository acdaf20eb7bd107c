"""The technique in training: loss and gradients of the plain model, in less memory."""

import pytest
import torch
from helpers import make_inputs, one_line

import qwen3_vl
from qwen3_vl import MemoryEfficientGradientAccumulation, count_label_tokens


def _batch(*layouts, seed=0):
    inputs = make_inputs(*(layouts or (["text:4", "image:4x4", "text:6"], ["text:9"])), seed=seed)
    labels = inputs["input_ids"].clone()
    labels[:, :3] = -100
    return {**inputs, "labels": labels}


def _step(model, **inputs):
    model.zero_grad()
    output = model(**inputs, use_cache=False)
    output.loss.backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _assert_same(ours, plain):
    assert ours.keys() == plain.keys()
    for name in plain:
        torch.testing.assert_close(ours[name], plain[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("settings", [{}, {"offload": True}, {"checkpointing": False, "chunk_rows": 2}])
@pytest.mark.parametrize("items", [None, 13])
def test_loss_and_gradients_are_the_plain_ones(pair, settings, items):
    model, batch = pair.ours.train(), _batch()
    batch["num_items_in_batch"] = items
    plain, expected = _step(model, **batch)
    MemoryEfficientGradientAccumulation(**settings).apply(model)
    ours, gradients = _step(model, **batch)
    assert ours.logits is None
    torch.testing.assert_close(ours.loss, plain.loss, rtol=1e-6, atol=1e-6)
    _assert_same(gradients, expected)


def test_moe_keeps_its_balancing_loss(kind, pair):
    model, batch = pair.ours.train(), _batch()
    if kind == "moe":
        model.config.text_config.output_router_logits = True
    plain, expected = _step(model, **batch)
    MemoryEfficientGradientAccumulation().apply(model)
    ours, gradients = _step(model, **batch)
    assert getattr(ours, "aux_loss", None) == getattr(plain, "aux_loss", None)
    torch.testing.assert_close(ours.loss, plain.loss, rtol=1e-6, atol=1e-6)
    _assert_same(gradients, expected)


def test_tied_embeddings():
    from helpers import make_pair

    model, batch = make_pair("dense", tie_word_embeddings=True).ours.train(), _batch()
    assert model.lm_head.weight is model.get_input_embeddings().weight
    _, expected = _step(model, **batch)
    MemoryEfficientGradientAccumulation().apply(model)
    _assert_same(_step(model, **batch)[1], expected)


def test_accumulated_steps_equal_one_batch(pair):
    """Micro-batches with different numbers of labels: the mean over all targets, not the mean of means."""
    model = pair.ours.train()
    batches = [_batch(["text:12"], seed=1), _batch(["text:5"], seed=2)]
    MemoryEfficientGradientAccumulation().apply(model)
    counted = count_label_tokens(batch["labels"] for batch in batches)
    assert counted == 9 + 2
    model.zero_grad()
    for batch in batches:
        model(**batch, num_items_in_batch=counted).loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    sum(model(**batch, num_items_in_batch=11).loss for batch in batches).backward()
    _assert_same(gradients, {name: p.grad for name, p in model.named_parameters() if p.grad is not None})


def test_evaluation_and_kept_logits_are_untouched(pair):
    model, batch = pair.ours, _batch()
    with torch.no_grad():
        plain = model(**batch)
        MemoryEfficientGradientAccumulation().apply(model)
        ours = model(**batch)
        assert torch.equal(ours.logits, plain.logits)
        assert torch.equal(ours.loss, plain.loss)
        model.train()
        batch.pop("labels")
        assert model(**batch, logits_to_keep=2).logits.shape[1] == 2


def test_tuples_have_the_loss_first(pair):
    model, batch = pair.ours.train(), _batch()
    MemoryEfficientGradientAccumulation().apply(model)
    assert torch.equal(model(**batch, return_dict=False)[0], model(**batch).loss)


def test_revert_leaves_nothing_behind(pair):
    model, batch = pair.ours.train(), _batch()
    before = [dict(vars(module)) for module in model.modules()]
    plain = model(**batch)
    technique = MemoryEfficientGradientAccumulation()
    technique.apply(model)
    model(**batch).loss.backward()
    technique.revert(model)
    for module, was in zip(model.modules(), before, strict=True):
        assert set(vars(module)) == set(was)
    again = model(**batch)
    assert torch.equal(again.logits, plain.logits)
    assert torch.equal(again.loss, plain.loss)


def test_a_failing_forward_leaves_the_head_as_it_was(pair):
    model, batch = pair.ours.train(), _batch()
    MemoryEfficientGradientAccumulation().apply(model)
    with pytest.raises(ValueError):
        model(**{**batch, "pixel_values": batch["pixel_values"] * float("nan")})
    assert "forward" not in vars(model.lm_head)
    assert model.loss_function is pair.stock.loss_function


@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_tower_keeps_no_activations(pair, frozen):
    model, batch = pair.ours.train(), _batch()
    model.model.visual.requires_grad_(not frozen)
    model.enable_input_require_grads()  # as PEFT does
    MemoryEfficientGradientAccumulation().apply(model)
    features = model.get_image_features(batch["pixel_values"], batch["image_grid_thw"]).pooler_output
    assert any(feature.requires_grad for feature in features) is not frozen
    _, gradients = _step(model, **batch)
    assert any(".visual." in name for name in gradients) is not frozen


def test_a_head_with_an_adapter_goes_the_plain_way(pair):
    peft = pytest.importorskip("peft")
    model, batch = pair.ours.train(), _batch()
    MemoryEfficientGradientAccumulation().apply(model)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["lm_head"])).train()
    output = wrapped(**batch)
    assert output.logits is not None
    output.loss.backward()
    assert any("lm_head" in name and p.grad is not None for name, p in wrapped.named_parameters())


def test_a_profile_names_it(pair, tmp_path):
    pair.ours.save_pretrained(tmp_path)
    model = type(pair.ours).from_pretrained(tmp_path, optim={"gradient_accumulation": {"chunk_rows": 3}}).train()
    assert [technique.name for technique in model.active_techniques] == ["gradient_accumulation"]
    assert model(**_batch()).logits is None


def test_bad_settings_and_models(pair):
    for wrong in ({"chunk_rows": 0}, {"chunks": 3}):
        with pytest.raises(ValueError) as error:
            MemoryEfficientGradientAccumulation(**wrong)
        one_line(error.value)
    with pytest.raises(ValueError) as error:
        MemoryEfficientGradientAccumulation().apply(pair.ours.model)
    one_line(error.value)
    with pytest.raises(ValueError):
        count_label_tokens([])
    assert qwen3_vl.Technique in MemoryEfficientGradientAccumulation.__mro__
