"""Layers that share weights: what they compute, what is saved and loaded, and what others make of that."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from helpers import assert_close, clone_inputs, make_inputs, make_pair, max_difference, one_line
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

import qwen3_vl
from qwen3_vl.optim.weights import low_rank
from qwen3_vl.optim.weights.layer_recycling import CrossLayerParameterRecycling
from qwen3_vl.optim.weights.layer_recycling_saving import METHOD, register_loader, withdraw_loader
from qwen3_vl.optim.weights.low_rank import LowRankLinear, fit_shared, low_rank_factors
from qwen3_vl.optim.weights.save_wrapper import SaveWrapper


INPUTS = make_inputs(["text:2", "image:4x6", "text:4"], ["text:6"], ["video:2x4x4", "text:5", "image:2x2"])
MODES = {
    "greedy": {},
    "sampling": {"do_sample": True},
    "beams": {"num_beams": 3},
}


@torch.no_grad()
def logits_of(model, inputs=INPUTS):
    return model(**clone_inputs(inputs)).logits


def recycled(model, **options):
    technique = CrossLayerParameterRecycling(**{"groups": [[0, 2]], "rank": 8, **options})
    technique.apply(model)
    return technique


def disturb(model):
    """As if it had been trained: no adapter is a truncated difference any more."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LowRankLinear):
                for parameter in (module.adapter_up, module.adapter_down):
                    parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.1)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(rows=st.integers(1, 12), columns=st.integers(1, 12), rank=st.integers(1, 14))
def test_truncated_decomposition_is_the_best_one(rows, columns, rank):
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows * 100 + columns))
    down, up = low_rank_factors(matrix, rank)
    assert down.shape == (rank, columns) and up.shape == (rows, rank)
    lost = (matrix - up @ down).norm()
    assert lost.item() == pytest.approx(torch.linalg.svdvals(matrix)[rank:].norm().item(), abs=1e-4)
    # Both factors carry the same scale, so that one rate suits both.
    assert_close(down.norm(dim=1), up.norm(dim=0), 1e-4)


def random_moment(size, seed=0):
    """Of inputs that lie mostly in a few directions, as hidden states do."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(200, size, generator=generator) * torch.logspace(1, -1, size)
    inputs = inputs @ torch.linalg.qr(torch.randn(size, size, generator=generator))[0]
    return inputs, inputs.T @ inputs


def test_weighted_by_inputs_the_products_are_nearer():
    inputs, moment = random_moment(20)
    matrix = torch.randn(14, 20, generator=torch.Generator().manual_seed(1))
    lost = []
    for weighting in (None, moment):
        down, up = low_rank_factors(matrix, 4, weighting)
        lost.append((inputs @ (matrix - up @ down).T).norm().item())
    # The best of rank 4 there is for these products, but for the floor under directions that samples hardly reach.
    best = torch.linalg.svdvals(inputs @ matrix.T)[4:].norm().item()
    assert lost[1] < 0.8 * lost[0] and lost[1] == pytest.approx(best, rel=0.05)


def test_large_matrices_are_decomposed_by_chance(monkeypatch):
    matrix = torch.randn(40, 5) @ torch.randn(5, 30) + 0.01 * torch.randn(40, 30)
    exact = torch.matmul(*low_rank_factors(matrix, 5)[::-1])
    monkeypatch.setattr(low_rank, "EXACT_UP_TO", 0)
    state = torch.get_rng_state()
    assert_close(torch.matmul(*low_rank_factors(matrix, 5)[::-1]), exact, 1e-3)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("count", [2, 3])
def test_fitted_beats_the_mean(count, weighted):
    generator = torch.Generator().manual_seed(2)
    weights = [torch.randn(14, 20, generator=generator) for _ in range(count)]
    moments = [random_moment(20, seed)[1] for seed in range(count)] if weighted else None

    def lost(shared):
        total = 0.0
        for place, weight in enumerate(weights):
            moment = moments[place] if moments else torch.eye(20)
            down, up = low_rank_factors(weight - shared, 4, moments[place] if moments else None)
            rest = weight - shared - up @ down
            total += ((rest @ moment) * rest).sum().item()
        return total

    fitted, mean = lost(fit_shared(weights, 4, moments)), lost(torch.stack(weights).mean(0))
    assert fitted < 0.9 * mean
    assert lost(fit_shared(weights, 4, moments, rounds=1)) >= fitted


def test_a_pair_is_fitted_by_twice_the_rank():
    """The adapters of both layers together reach what one decomposition of the difference does."""
    generator = torch.Generator().manual_seed(3)
    first, second = (torch.randn(16, 16, generator=generator) for _ in range(2))
    shared = fit_shared([first, second], 3, rounds=60)
    lost = sum(torch.linalg.svdvals(weight - shared)[3:].square().sum() for weight in (first, second))
    best = torch.linalg.svdvals(first - second)[6:].square().sum() / 2
    assert lost.item() == pytest.approx(best.item(), rel=0.02)


def test_calibration():
    """Less is lost on inputs like the samples', and the report says how much of the products."""
    changes, plain = [], logits_of(make_pair("dense").ours)
    for calibrated in (False, True):
        model = make_pair("dense").ours
        technique = CrossLayerParameterRecycling(groups=[[0, 2]], rank=8)
        with pytest.raises(ValueError, match="at least one batch"):
            technique.calibrate(model, [])
        if calibrated:
            technique.calibrate(model, [INPUTS])
            assert not any(module._forward_pre_hooks for module in model.modules())
        technique.apply(model)
        changes.append((logits_of(model) - plain).norm().item())
        with pytest.raises(ValueError, match="already applied; calibrate the plain model"):
            technique.calibrate(model, [INPUTS])
    assert changes[1] < 0.8 * changes[0]


def test_layers_compute_their_expanded_weights():
    model = make_pair("dense").ours
    technique = recycled(model)
    disturb(model)
    layers = model.model.language_model.layers
    assert layers[0].mlp.up_proj.weight is layers[2].mlp.up_proj.weight
    assert not isinstance(layers[1].mlp.up_proj, LowRankLinear)
    actual = logits_of(model)
    technique.release()
    technique.revert(model)
    assert not any(isinstance(module, LowRankLinear) for module in model.modules())
    assert_close(logits_of(model), actual, 2e-5)


def test_a_rank_that_suffices_loses_nothing():
    """The difference of two 48-column matrices has rank 48 at most."""
    model = make_pair("dense").ours
    before = logits_of(model)
    technique = recycled(model, rank=48)
    assert max(technique.report.errors.values()) < 1e-5
    assert_close(logits_of(model), before, 5e-4)


@pytest.mark.parametrize("shared", ["fitted", "mean", "first", "last"])
def test_error_and_bytes_are_what_they_say(shared):
    model = make_pair("dense").ours
    layers = model.model.language_model.layers
    plain = {
        layer: [m.weight.detach() for m in layers[layer].modules() if isinstance(m, nn.Linear)] for layer in (0, 2)
    }
    technique = recycled(model, shared=shared)
    for layer, weights in plain.items():
        now = [module.expanded() for module in layers[layer].modules() if isinstance(module, LowRankLinear)]
        lost = sum((a - b).square().sum() for a, b in zip(weights, now, strict=True))
        share = (lost / sum(a.square().sum() for a in weights)).sqrt().item()
        assert technique.report.errors[layer] == pytest.approx(share, rel=1e-4, abs=1e-6)
    exact = {"first": 0, "last": 2}.get(shared)
    assert exact is None or technique.report.errors[exact] < 1e-6
    before = sum(weight.numel() for weight in plain[0])
    adapters = sum(8 * sum(weight.shape) for weight in plain[0])
    report = technique.report
    assert report.bytes_before - report.bytes_after == 4 * (before - 2 * adapters)
    assert f"{report.saved_share:.1%} saved" in technique.describe() and "0+2" in technique.describe()


def test_more_rank_less_error():
    errors = [max(recycled(make_pair("dense").ours, rank=rank).report.errors.values()) for rank in (1, 8, 24)]
    assert errors[0] > errors[1] > errors[2] > 0


def test_apply_and_revert():
    model = make_pair("dense").ours
    before, names = logits_of(model), list(model.state_dict())
    technique = recycled(model)
    assert max_difference(logits_of(model), before) > 1e-2
    copied = copy.deepcopy(model)
    layers = copied.model.language_model.layers
    assert layers[0].mlp.up_proj.weight is layers[2].mlp.up_proj.weight and copied.save_pretrained.model is copied
    with pytest.raises(ValueError, match="already applied"):
        technique.apply(model)
    technique.revert(model)
    technique.revert(model)
    assert torch.equal(logits_of(model), before) and list(model.state_dict()) == names
    assert "save_pretrained" not in vars(model) and "not applied" in technique.describe()


def test_originals_are_let_go():
    model = make_pair("dense").ours
    assert recycled(model, keep_originals=False)._originals == []
    technique = recycled(make_pair("dense").ours)
    assert len(technique._originals) == 14


@pytest.mark.parametrize("mode", MODES)
def test_generate_as_the_expanded_model(mode, tmp_path):
    model = make_pair("dense").ours
    recycled(model, groups=[[0, 1, 2]])
    model.save_pretrained(tmp_path)
    expanded = type(model).from_pretrained(tmp_path)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, **MODES[mode]}
    for inputs in (INPUTS, make_inputs(["text:7"])):
        results = []
        for one in (model, expanded):
            torch.manual_seed(0)
            results.append(one.generate(**clone_inputs(inputs), **options))
        assert torch.equal(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_expanded_is_a_stock_checkpoint(tmp_path, dtype):
    pair = make_pair("dense", dtype=dtype)
    pair.ours.config.optim = {"decode_linear": {}, "layer_recycling": {"groups": [[0, 2]], "rank": 8}}
    recycled(pair.ours)
    disturb(pair.ours)
    pair.ours.save_pretrained(tmp_path)
    assert "layer_recycling" in pair.ours.config.optim
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["optim"] == {"decode_linear": {}} and "quantization_config" not in saved
    stock, report = type(pair.stock).from_pretrained(tmp_path, dtype=dtype, output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    inputs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in INPUTS.items()}
    valid = INPUTS["attention_mask"].bool()
    actual, expected = logits_of(stock, inputs)[valid], logits_of(pair.ours, inputs)[valid]
    assert_close(actual.float(), expected.float(), 2e-5 if dtype == torch.float32 else 0.2)


def test_saved_shared_holds_each_tensor_once(tmp_path):
    model = make_pair("dense").ours
    first = recycled(model, groups=[[0, 1, 2]])
    disturb(model)
    expected = logits_of(model)
    model.save_pretrained(tmp_path / "expanded")
    model.save_pretrained(tmp_path / "shared", storage="shared")
    assert not hasattr(model.config, "quantization_config") and model.config.optim is None
    with safe_open(tmp_path / "shared" / "model.safetensors", "pt") as saved:
        names = [name for name in saved.keys() if "up_proj" in name]  # noqa: SIM118
        assert [name for name in names if name.endswith("weight")] == [
            "model.language_model.layers.0.mlp.up_proj.weight"
        ]
        assert sorted({name.rsplit(".", 1)[1] for name in names}) == ["adapter_down", "adapter_up", "weight"]
    loaded = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "shared")
    assert torch.equal(logits_of(loaded), expected)
    [technique] = loaded.active_techniques
    assert technique.report.saved_share == pytest.approx(first.report.saved_share)
    layers = loaded.model.language_model.layers
    assert layers[0].mlp.up_proj.weight is layers[1].mlp.up_proj.weight is layers[2].mlp.up_proj.weight
    # Without the technique too: nothing may write what is neither stock nor marked.
    bare = type(loaded).from_pretrained(tmp_path / "shared", optim={})
    bare.save_pretrained(tmp_path / "bare")
    assert not bare.active_techniques
    assert torch.equal(logits_of(type(bare).from_pretrained(tmp_path / "bare")), expected)
    # What was loaded shared is saved shared again, or expanded when asked to, and can be unshared.
    loaded.save_pretrained(tmp_path / "again")
    again = type(loaded).from_pretrained(tmp_path / "again")
    assert torch.equal(logits_of(again), expected)
    loaded.save_pretrained(tmp_path / "expanded again", storage="expanded")
    stock = make_pair("dense").stock.from_pretrained(tmp_path / "expanded again")
    assert_close(logits_of(stock), expected, 2e-5)
    # Nothing says "quantized", which would refuse casts and training.
    assert not hasattr(loaded.config, "quantization_config") and not getattr(loaded, "is_quantized", False)
    with pytest.raises(ValueError, match="already changed"):
        recycled(loaded)
    technique.revert(loaded)
    assert_close(logits_of(loaded), expected, 2e-5)
    loaded.config.optim = None
    loaded.save_pretrained(tmp_path / "plain")
    assert_close(logits_of(type(loaded).from_pretrained(tmp_path / "plain")), expected, 2e-5)


@pytest.mark.parametrize("loader", ["AutoModelForImageTextToText", "Qwen3VLForConditionalGeneration"])
def test_stock_refuses_a_shared_folder(tmp_path, loader):
    model = make_pair("dense").ours
    recycled(model, storage="shared")
    model.save_pretrained(tmp_path)
    program = f"import transformers; transformers.{loader}.from_pretrained({str(tmp_path)!r})"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert result.returncode != 0 and "mismatched" in result.stderr


def test_a_profile_shares(tmp_path):
    make_pair("dense").ours.save_pretrained(tmp_path)
    profile = {"layer_recycling": {"groups": [[0, 2]], "rank": 4, "keep_originals": False}}
    loaded = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path, optim=profile)
    layers = loaded.model.language_model.layers
    assert layers[0].mlp.up_proj.weight is layers[2].mlp.up_proj.weight and layers[0].mlp.up_proj.rank == 4


def test_trains_as_it_is_and_saves_what_it_learned(tmp_path):
    model = make_pair("dense").ours
    recycled(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(6):
        loss = model(**INPUTS, labels=INPUTS["input_ids"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    module = model.model.language_model.layers[2].self_attn.q_proj
    assert all(p.grad.abs().max() > 0 for p in (module.weight, module.adapter_up, module.adapter_down))
    model.save_pretrained(tmp_path)
    assert_close(logits_of(type(model).from_pretrained(tmp_path)), logits_of(model), 5e-5)


def test_peft_on_top():
    peft = pytest.importorskip("peft")
    model = make_pair("dense").ours
    recycled(model)
    before = logits_of(model)
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    assert torch.equal(logits_of(tuned), before)
    trainable = [name for name, p in tuned.named_parameters() if p.requires_grad]
    assert trainable and all("lora_" in name for name in trainable)
    optimizer = torch.optim.Adam([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = tuned(**INPUTS, labels=INPUTS["input_ids"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    with tuned.disable_adapter():
        assert torch.equal(logits_of(tuned), before)


def test_wrappers_come_off_in_any_order():
    class Model:
        def save_pretrained(self, folder, is_main_process=True, **kwargs):
            return [folder]

    class Noting(SaveWrapper):
        def save(self, *args, **kwargs):
            return [*super().save(*args, **kwargs), self]

    model = Model()
    model.state_dict = dict
    first, second, third = (Noting(model) for _ in range(3))
    assert model.save_pretrained("f") == ["f", first, second, third]
    second.remove()
    assert model.save_pretrained("f") == ["f", first, third]
    third.remove()
    assert model.save_pretrained("f") == ["f", first]
    first.remove()
    assert "save_pretrained" not in vars(model) and model.save_pretrained("f") == ["f"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be a whole number of at least 1, got 0"),
        ({"rank": 2.5}, "rank must be a whole number"),
        ({"groups": []}, "every group needs at least two layers"),
        ({"groups": [[1]]}, "every group needs at least two layers"),
        ({"groups": [[0, 1], [1, 2]]}, "a layer stands in two places"),
        ({"groups": [0, 1]}, "groups must be lists of layer indices"),
        ({"groups": [[0, 9]]}, "layer 9 does not exist; the decoder has layers 0 to 2"),
        ({"groups": [[-1, 1]]}, "layer -1 does not exist"),
        ({"shared": "sum"}, "shared must be one of fitted, mean, first, last"),
        ({"storage": "tied"}, "storage must be one of expanded, shared"),
        ({"ranks": 3}, "has no setting 'ranks'"),
    ],
)
def test_bad_settings(options, message):
    model = make_pair("dense").ours
    names = list(model.state_dict())
    with pytest.raises(ValueError, match=message) as error:
        CrossLayerParameterRecycling(**options).apply(model)
    one_line(error.value)
    assert list(model.state_dict()) == names


def test_layers_that_do_not_fit():
    model = make_pair("dense").ours
    layers = model.model.language_model.layers
    layers[2].mlp.up_proj = nn.Linear(48, 71, bias=False)
    with pytest.raises(ValueError, match=r"layers 0 and 2 cannot share weights: mlp\.up_proj has shapes") as error:
        recycled(model)
    one_line(error.value)
    layers[2].mlp.up_proj = LowRankLinear(layers[0].mlp.up_proj.weight, torch.zeros(2, 48), torch.zeros(72, 2))
    with pytest.raises(ValueError, match="already changed"):
        recycled(model)
    with pytest.raises(ValueError, match="sparse experts") as error:
        recycled(make_pair("moe").ours, groups=[[0, 2]])
    one_line(error.value)


def test_other_groups_than_the_loaded_ones(tmp_path):
    model = make_pair("dense").ours
    recycled(model, storage="shared")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="was loaded with layers") as error:
        type(model).from_pretrained(tmp_path, optim={"layer_recycling": {"groups": [[0, 1]], "rank": 8}})
    one_line(error.value)
    assert Path(tmp_path, "model.safetensors").exists()


def test_unregister_withdraws_the_loader_and_register_brings_it_back(tmp_path):
    model = make_pair("dense").ours
    recycled(model)
    model.save_pretrained(tmp_path, storage="shared")
    tables = AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
    try:
        qwen3_vl.unregister()
        assert not any(METHOD in table for table in tables)
    finally:
        qwen3_vl.register()
    assert all(METHOD in table for table in tables)
    assert torch.equal(logits_of(type(model).from_pretrained(tmp_path)), logits_of(model))
    foreign = object()
    try:
        AUTO_QUANTIZER_MAPPING[METHOD] = foreign
        withdraw_loader()
        assert AUTO_QUANTIZER_MAPPING[METHOD] is foreign, "what another copy registered is its own"
    finally:
        register_loader()
