"""The presets of LoRA targets, and adapters on them with plain PEFT."""

import pytest
import torch
from helpers import make_inputs, make_pair, one_line

from qwen3_vl import lora_targets


peft = pytest.importorskip("peft")
PRESETS = ("language", "vision", "language+vision", "mergers", "all-linear")
VISION = {
    f"blocks.{n}.{part}" for n in range(3) for part in ("attn.qkv", "attn.proj", "mlp.linear_fc1", "mlp.linear_fc2")
}
MERGERS = {
    f"{m}.linear_fc{n}" for m in ("merger", "deepstack_merger_list.0", "deepstack_merger_list.1") for n in (1, 2)
}


def _expected(kind, preset):
    """Written out by hand: what each preset is to hit in the tests' tiny models."""
    plain_layers = range(3) if kind == "dense" else [1]
    language = {f"layers.{n}.self_attn.{part}_proj" for n in range(3) for part in "qkvo"}
    language |= {f"layers.{n}.mlp.{part}_proj" for n in plain_layers for part in ("gate", "up", "down")}
    modules = set()
    if preset in ("language", "language+vision", "all-linear"):
        modules |= {f"model.language_model.{name}" for name in language}
    if preset in ("vision", "language+vision", "all-linear"):
        modules |= {f"model.visual.{name}" for name in VISION}
    if preset in ("mergers", "all-linear"):
        modules |= {f"model.visual.{name}" for name in MERGERS}
    return modules


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_hit_exactly_what_they_name(kind, pair, preset):
    model, expected = pair.ours, _expected(kind, preset)
    config = peft.LoraConfig(r=2, **lora_targets(model, preset))
    wrapped = peft.get_peft_model(model, config).get_base_model()
    hit = {name for name, module in wrapped.named_modules() if isinstance(module, peft.tuners.lora.Linear)}
    assert hit == expected
    experts = {name for name, module in wrapped.named_modules() if type(module).__name__ == "ParamWrapper"}
    wants_experts = kind == "moe" and preset not in ("vision", "mergers")
    layers = {name.split(".mlp.")[0] for name in experts}
    assert layers == ({f"model.language_model.layers.{n}" for n in (0, 2)} if wants_experts else set())
    assert len(experts) == (4 if wants_experts else 0)


@pytest.mark.parametrize("dora", [False, True])
def test_train_merge_save_and_reload(kind, pair, dora, tmp_path):
    torch.manual_seed(0)
    inputs = make_inputs(["text:4", "image:4x4", "text:6"])
    targets = lora_targets(pair.ours, "all-linear", experts=not dora)
    wrapped = peft.get_peft_model(pair.ours, peft.LoraConfig(r=2, use_dora=dora, **targets))
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.05)
    for _ in range(2):
        wrapped(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
    wrapped.eval()
    with torch.no_grad():
        trained = wrapped(**inputs).logits
        plain = make_pair(kind).ours
        assert (trained - plain(**inputs).logits).abs().max() > 1e-3
        wrapped.save_pretrained(tmp_path)
        reloaded = peft.PeftModel.from_pretrained(plain, tmp_path).eval()
        torch.testing.assert_close(reloaded(**inputs).logits, trained, rtol=1e-5, atol=1e-5)
        reloaded.merge_adapter()
        torch.testing.assert_close(reloaded(**inputs).logits, trained, rtol=1e-3, atol=1e-3)
        reloaded.unmerge_adapter()
        torch.testing.assert_close(reloaded(**inputs).logits, trained, rtol=1e-3, atol=1e-3)
        merged = reloaded.merge_and_unload()
        torch.testing.assert_close(merged(**inputs).logits, trained, rtol=1e-3, atol=1e-3)
        assert merged.state_dict().keys() == make_pair(kind).ours.state_dict().keys()


@pytest.mark.parametrize(("preset", "hint"), [("langage", "'language'"), ("xyz", "all-linear")])
def test_unknown_presets(pair, preset, hint):
    with pytest.raises(ValueError) as error:
        lora_targets(pair.ours, preset)
    assert hint in one_line(error.value)


def test_a_model_without_the_modules():
    with pytest.raises(ValueError) as error:
        lora_targets(torch.nn.Linear(2, 2), "vision")
    one_line(error.value)
