"""Calibrated budgets: measured mass against the definition, and that what is kept is what was asked for."""

import json
from dataclasses import replace

import pytest
import torch
from helpers import assert_close, make_inputs, make_pair, one_line, valid_positions
from reference import AttentionCase, inputs_of, layout_of

from qwen3_vl.optim.attention import sparse_calibration
from qwen3_vl.optim.attention.attention_adaptive import AdaptiveAttention
from qwen3_vl.optim.attention.attention_dynamic_sparse import (
    DynamicSparseAttention,
    DynamicSparseSettings,
    choose_blocks,
    dynamic_sparse_attention,
)
from qwen3_vl.optim.attention.attention_layout import AttentionLayout
from qwen3_vl.optim.attention.attention_mechanisms import AttentionMechanisms
from qwen3_vl.optim.attention.block_map import BlockMap
from qwen3_vl.optim.attention.block_selection import kept_mass, select_blocks
from qwen3_vl.optim.attention.sparse_calibration import AdaptiveSparse, block_mass, least_density


DYNAMIC = "qwen3_vl_dynamic_sparse"
SMALL = {
    "min_blocks": 1, "window_tokens": 4, "query_block": 8, "key_block": 8, "stride": 4, "min_pages": 1,
    "page_tokens": 8, "dense_below_tokens": 16,
}  # fmt: skip
LAYOUTS = (["text:20", "image:8x12", "text:9", "image:8x8", "text:30"], ["text:70"])


@pytest.fixture(scope="module")
def model():
    """Queries and keys of such length that heads attend to a few tokens each, and some to more than others."""
    model = make_pair("dense").ours
    for index, layer in enumerate(model.model.language_model.layers):
        layer.self_attn.q_norm.weight.data.mul_(1.5 + index)
    return model


def samples():
    return [make_inputs(*LAYOUTS), make_inputs(["text:90"], seed=5)]


def dense_mass(query, key, mask, real, scaling, query_block, key_block):
    """The same by the definition: weights in float64, summed token by token."""
    group = query.shape[1] // key.shape[1]
    scores = query.double() @ key.double().repeat_interleave(group, 1).mT * scaling
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1).nan_to_num(0.0) * real
    queries, keys = weights.shape[2:]
    mass = torch.zeros(*weights.shape[:2], -(-queries // query_block), -(-keys // key_block), dtype=torch.float64)
    for q in range(queries):
        for k in range(keys):
            mass[:, :, q // query_block, k // key_block] += weights[:, :, q, k]
    return mass


@pytest.mark.parametrize("at_once", [1, 2000, 2**23])
@pytest.mark.parametrize(
    "case",
    [
        AttentionCase(queries=21, head_dim=16),
        AttentionCase(batch=2, queries=21, past=9, padding="left", head_dim=16, groups=4),
        AttentionCase(batch=2, queries=21, padding="right", head_dim=16),
        AttentionCase(batch=2, queries=21, packed=(9, 12), head_dim=16, groups=1),
    ],
    ids=str,
)
def test_block_mass(case, at_once, monkeypatch):
    monkeypatch.setattr(sparse_calibration, "SCORES_AT_ONCE", at_once)
    query, key, _ = inputs_of(case)
    layout = layout_of(case)
    real = torch.ones(case.batch, 1, case.queries, 1)
    if layout.valid is not None:
        real = layout.valid[:, None, case.past :, None]
    expected = dense_mass(query, key, layout.dense(case.queries, case.keys), real, case.scaling, 8, 5)
    mass, own, visual = block_mass(query, key, layout, case.scaling, 8, 5)
    assert_close(mass, expected)
    assert visual == 0 and not own.any()


def test_mass_within_the_own_picture():
    case = AttentionCase(queries=12, head_dim=16)
    query, key, _ = inputs_of(case)
    runs = torch.tensor([[0, 0, 1, 1, 1, 0, 2, 2, 0, 0, 0, 0]])
    _, own, visual = block_mass(query, key, layout_of(case), case.scaling, 4, 4, runs)
    scores = query.double() @ key.double().repeat_interleave(2, 1).mT * case.scaling
    weights = scores.masked_fill(~layout_of(case).dense(12, 12), float("-inf")).softmax(-1)
    expected = weights[:, :, 2:5, 2:5].sum((0, 2, 3)) + weights[:, :, 6:8, 6:8].sum((0, 2, 3))
    assert visual == 5
    assert_close(own, expected)


def test_least_density():
    mass = torch.tensor([[[[4.0, 0.0, 0.0], [1.0, 3.0, 0.0], [1.0, 1.0, 2.0]]]])
    pairs = torch.tensor([[[[3, 0, 0], [4, 3, 0], [4, 4, 3]]]])
    assert_close(least_density(mass, pairs, 0.5), torch.tensor([(3 + 3 + 3) / 21]))
    assert_close(least_density(mass, pairs, 0.76), torch.tensor([(3 + 7 + 11) / 21]))
    assert_close(least_density(mass, pairs, 0.74), torch.tensor([(3 + 3 + 7) / 21]))


def test_scores_exist_a_few_rows_at_a_time(monkeypatch):
    """Never (heads, queries, keys) at once: the longest tensor of a softmax is within the limit."""
    monkeypatch.setattr(sparse_calibration, "SCORES_AT_ONCE", 3000)
    case, sizes = AttentionCase(queries=200, head_dim=16), []
    query, key, _ = inputs_of(case)
    softmax = torch.Tensor.softmax
    monkeypatch.setattr(torch.Tensor, "softmax", lambda x, dim: (sizes.append(x.numel()), softmax(x, dim))[1])
    block_mass(query, key, layout_of(case), case.scaling, 8, 8)
    assert len(sizes) == 67 and max(sizes) <= 3000


@pytest.mark.parametrize("scoring", ["antidiagonal", "pooled"])
def test_budgets_keep_the_mass(model, scoring):
    target = 0.9
    technique = AdaptiveSparse(target_mass=target, scoring=scoring, **SMALL)
    budgets = technique.calibrate(model, samples())
    assert list(budgets) == ["0", "1", "2"]
    coverage, kept = technique.coverage, {}

    # What the selection of the technique really keeps, on the calls of the same samples, by another measure.
    def measure(module, query, key, layout, scaling):
        settings = replace(technique._dynamic.options, threshold=tuple(budgets[str(module.layer_idx)]["threshold"]))
        chosen = choose_blocks(query, key, layout, scaling, settings)
        shares = kept_mass(query, key, layout, scaling, chosen, samples=query.shape[2])
        real = torch.tensor([query.shape[2]]) if layout.valid is None else layout.valid.sum(1)
        kept.setdefault(module.layer_idx, []).append((shares * real[:, None]).sum(0) / sum(real_tokens))

    real_tokens = [int(valid_positions(inputs).sum()) for inputs in samples()]
    observe_calls(model, measure)
    for layer, parts in kept.items():
        shares = torch.stack(parts).sum(0)
        assert (shares >= target - 1e-4).all()
        assert_close(shares, torch.tensor(coverage[str(layer)]["kept_mass"]), 1e-4)
    thresholds = [share for budget in budgets.values() for share in budget["threshold"]]
    assert min(thresholds) < 1.0 and len(set(thresholds)) > 1
    densities = [share for summary in coverage.values() for share in summary["density"]]
    assert min(densities) < 0.8


def observe_calls(model, measure):
    """Calls `measure` with what every decoder layer attends to on the samples."""
    seen = AttentionMechanisms.get("flash").forward

    def record(module, query, key, value, attention_mask, scaling=None, **kwargs):
        measure(module, query, key, attention_mask, scaling)
        return seen(module, query, key, value, attention_mask, scaling=scaling, **kwargs)

    sparse_calibration.register_attention("qwen3_vl_test_calls", record)
    before = model.config._attn_implementation
    model.set_attn_implementation({"text_config": "qwen3_vl_test_calls"})
    with torch.no_grad():
        for inputs in samples():
            model(**inputs)
    model.set_attn_implementation(before)


def test_smallest_budget_that_keeps_the_mass(model):
    """The next smaller threshold on the list would keep less than the target."""
    technique = AdaptiveSparse(target_mass=0.9, **SMALL)
    budgets = technique.calibrate(model, samples())
    smaller = {}
    for layer, budget in budgets.items():
        indices = [sparse_calibration.THRESHOLDS.index(share) for share in budget["threshold"]]
        smaller[int(layer)] = [sparse_calibration.THRESHOLDS[max(0, index - 1)] for index in indices]
    kept, tokens = {}, sum(int(valid_positions(inputs).sum()) for inputs in samples())

    def measure(module, query, key, layout, scaling):
        settings = replace(technique._dynamic.options, threshold=tuple(smaller[module.layer_idx]))
        chosen = choose_blocks(query, key, layout, scaling, settings)
        real = torch.tensor([query.shape[2]]) if layout.valid is None else layout.valid.sum(1)
        shares = kept_mass(query, key, layout, scaling, chosen, samples=query.shape[2])
        kept[module.layer_idx] = kept.get(module.layer_idx, 0) + (shares * real[:, None]).sum(0) / tokens

    observe_calls(model, measure)
    for layer, shares in kept.items():
        first = torch.tensor(smaller[layer]) == torch.tensor(budgets[str(layer)]["threshold"])
        assert (first | (shares < 0.9)).all()


def test_more_mass_costs_more(model):
    shares, densities = [], []
    for target in (0.6, 0.8, 0.95):
        technique = AdaptiveSparse(target_mass=target, **SMALL)
        budgets = technique.calibrate(model, samples())
        shares.append(torch.tensor([b["threshold"] for b in budgets.values()]))
        densities.append(torch.tensor([c["density"] for c in technique.coverage.values()]))
        for summary in technique.coverage.values():
            # The anchors are part of what is kept.
            assert all(a <= k + 1e-9 for a, k in zip(summary["anchors"], summary["kept_mass"], strict=True))
            assert min(summary["least_density"]) > 0 and max(summary["least_density"]) <= 1
            assert all(0 <= share <= 1 for share in summary["own_picture"])
    assert (shares[0] <= shares[1]).all() and (shares[1] <= shares[2]).all() and (shares[0] < shares[2]).any()
    assert (densities[0] <= densities[2]).all()


def test_decoding_budgets_keep_the_mass(model):
    technique = AdaptiveSparse(target_mass=0.8, **SMALL)
    budgets = technique.calibrate(model, samples()[1:])
    for layer, summary in technique.coverage.items():
        assert min(summary["kept_mass_decoding"]) >= 0.8 - 1e-6
        assert len(budgets[layer]["decode_share"]) == 2
    assert min(share for budget in budgets.values() for share in budget["decode_share"]) < 1


def test_profile_takes_the_budgets_and_gives_them_back(model):
    profile = {"qwen3_vl_exact": {}}
    technique = AdaptiveSparse(target_mass=0.8, **SMALL)
    budgets = technique.calibrate(model, iter(samples()), profile)
    again = AdaptiveSparse(**json.loads(json.dumps(profile))["adaptive_sparse"])
    assert again.settings == technique.settings and again.settings["budgets"] == budgets
    assert "qwen3_vl_exact" in profile
    inputs, logits = samples()[0], []
    keep = valid_positions(inputs)
    for one in (technique, again):
        one.apply(model)
        logits.append(model(**inputs).logits[keep])
        one.revert(model)
    assert torch.equal(*logits)


@torch.no_grad()
def test_apply_and_revert_are_bit_identical(model):
    inputs = make_inputs(["text:60"], ["text:33"])
    before = model(**inputs).logits
    technique = AdaptiveSparse(target_mass=0.5, **SMALL)
    budgets = technique.calibrate(model, samples())
    assert torch.equal(model(**inputs).logits, before)  # calibration leaves nothing behind
    technique.apply(model)
    assert model.config.text_config._attn_implementation == DYNAMIC
    for layer in model.model.language_model.layers:
        own = layer.self_attn.attention_settings[DYNAMIC]
        assert own.threshold == tuple(budgets[str(layer.self_attn.layer_idx)]["threshold"]) and own.min_blocks == 1
    keep = valid_positions(inputs)
    assert (model(**inputs).logits - before)[keep].abs().max() > 1e-4
    assert max(DynamicSparseAttention.last_density(model)) < 1
    tokens = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert tokens.shape[1] == 64
    technique.revert(model)
    assert model.config.text_config._attn_implementation == "sdpa"
    assert torch.equal(model(**inputs).logits, before)
    assert not any(hasattr(module, "attention_settings") for module in model.modules())


@torch.no_grad()
def test_rules_of_adaptive_attention_take_the_budgets(model):
    inputs = make_inputs(["text:60"])
    budgeted = AdaptiveSparse(target_mass=0.5, **SMALL)
    budgeted.calibrate(model, samples())
    budgeted.apply(model)
    expected = model(**inputs).logits
    adaptive = AdaptiveAttention(prefill=[[0, "flash"], [50, "dynamic_sparse"]])
    adaptive.apply(model)
    assert torch.equal(model(**inputs).logits, expected)
    adaptive.revert(model)
    assert torch.equal(model(**inputs).logits, expected)
    budgeted.revert(model)


def test_short_samples_and_labels_do_not_count(model):
    technique = AdaptiveSparse(target_mass=0.8, **SMALL)
    long = make_inputs(["text:70"])
    budgets = technique.calibrate(model, [long])
    with_short = technique.calibrate(model, [make_inputs(["text:9"]), {**long, "labels": long["input_ids"]}])
    assert with_short == budgets


def test_packed_samples_give_no_decoding_budget(model):
    ids = make_inputs(["text:70"])["input_ids"]
    positions = torch.cat([torch.arange(40), torch.arange(30)]).expand(4, 1, -1)
    technique = AdaptiveSparse(target_mass=0.8, **SMALL)
    budgets = technique.calibrate(model, [{"input_ids": ids, "position_ids": positions}])
    assert all(budget["decode_share"] == [1.0, 1.0] for budget in budgets.values())


# --- Shares for each head, in the mechanism itself. ---


def test_every_head_has_its_own_threshold():
    case = AttentionCase(batch=2, queries=96, head_dim=16, padding="left", padding_step=9)
    query, key, _ = inputs_of(case)
    layout = layout_of(case)
    each = (0.3, 1.0, 0.6, 0.9)
    settings = DynamicSparseSettings(**SMALL)
    together = choose_blocks(query, key, layout, case.scaling, replace(settings, threshold=each)).mask
    for head, threshold in enumerate(each):
        alone = choose_blocks(query, key, layout, case.scaling, replace(settings, threshold=threshold)).mask
        if threshold == 1:
            assert together[:, head].all()
        else:
            assert torch.equal(together[:, head], alone[:, head])
    kept = kept_mass(query, key, layout, case.scaling, BlockMap(together, 8, 8), samples=96)
    assert_close(kept[:, 1], torch.ones(2))


@pytest.mark.parametrize("padding", ["none", "left"])
def test_every_kv_head_has_its_own_pages(padding):
    case = AttentionCase(batch=2, queries=1, past=80, head_dim=16, padding=padding)
    tensors, layout = inputs_of(case), layout_of(case)

    class Module:
        is_causal, config = True, None

    def run(decode_share):
        module = Module()
        module.attention_settings = {DYNAMIC: DynamicSparseSettings(**SMALL, decode_share=decode_share)}
        output, _ = dynamic_sparse_attention(module, *tensors, layout, case.scaling)
        return output, module.last_computed.kept

    output, kept = run((0.2, 1.0))
    few, few_kept = run(0.2)
    all_of_it, _ = run(1.0)
    assert torch.equal(kept.mask[:, 0], few_kept.mask[:, 0]) and not torch.equal(kept.mask[:, 1], few_kept.mask[:, 1])
    assert_close(output[:, :, :2], few[:, :, :2])
    assert_close(output[:, :, 2:], all_of_it[:, :, 2:])


def test_ones_for_all_heads_are_exact(model):
    inputs = make_inputs(["text:60"])
    expected = model(**inputs).logits
    technique = DynamicSparseAttention(**SMALL, threshold=[1.0] * 4)
    technique.apply(model)
    logits = model(**inputs).logits
    assert DynamicSparseAttention.last_density(model) == [1.0] * 3
    technique.revert(model)
    assert_close(logits, expected, 1e-4)


def test_a_tensor_of_thresholds_equals_numbers():
    mass = torch.rand(1, 3, 12, 12).tril()
    each = torch.tensor([0.2, 0.5, 0.9])[:, None, None]
    together = select_blocks(mass, AttentionLayout(0), 96, 96, 8, 8, each, 1, 4).mask
    for head, threshold in enumerate((0.2, 0.5, 0.9)):
        alone = select_blocks(mass, AttentionLayout(0), 96, 96, 8, 8, threshold, 1, 4).mask
        assert torch.equal(together[:, head], alone[:, head])


# --- What is refused. ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_mass": 0}, "target_mass must be a share"),
        ({"target_mass": 1.0}, "target_mass must be a share"),
        ({"target_mass": "all"}, "target_mass must be a share"),
        ({"threshold": 0.5}, "threshold is what adaptive_sparse calibrates"),
        ({"decode_share": 0.5}, "decode_share is what adaptive_sparse calibrates"),
        ({"min_block": 3}, "no setting 'min_block'"),
        ({"min_blocks": 0}, "min_blocks must be"),
        ({"budgets": {"a": {"threshold": [1.0], "decode_share": [1.0]}}}, "budgets of layer 'a'"),
        ({"budgets": {"0": {"threshold": [1.0]}}}, "budgets of layer '0'"),
        ({"budgets": {"0": {"threshold": [1.5], "decode_share": [1.0]}}}, "budgets of layer '0'"),
        ({"budgets": {"0": {"threshold": ["a"], "decode_share": [1.0]}}}, "budgets of layer '0'"),
        ({"budgets": {"0": {"threshold": 0.5, "decode_share": [1.0]}}}, "budgets of layer '0'"),
        ({"budgets": {"0": 0.5}}, "budgets of layer '0'"),
        ({"budgets": [0.5]}, "what calibrate returned"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message) as error:
        AdaptiveSparse(**settings)
    one_line(error.value)


@pytest.mark.parametrize(
    ("budgets", "message"),
    [
        (None, "has no budgets yet"),
        ({"7": {"threshold": [1.0] * 4, "decode_share": [1.0] * 2}}, "budgets are for layer 7"),
        ({0: {"threshold": [0.5] * 3, "decode_share": [1.0] * 2}}, "4 heads for threshold, but the budget has 3"),
        ({0: {"threshold": [0.5] * 4, "decode_share": [1.0]}}, "2 heads for decode_share, but the budget has 1"),
    ],
)
def test_apply_refuses_what_does_not_fit(model, budgets, message):
    with pytest.raises(ValueError, match=message) as error:
        AdaptiveSparse(budgets=budgets).apply(model)
    one_line(error.value)
    assert model.config.text_config._attn_implementation == "sdpa"


def test_calibration_refuses(model):
    technique = AdaptiveSparse()
    for none in ([], [make_inputs(["text:40"])]):
        with pytest.raises(ValueError, match="no sample is longer than dense_below_tokens=2048") as error:
            technique.calibrate(model, none)
        one_line(error.value)
    with pytest.raises(TypeError, match="mapping of model inputs, got list") as error:
        technique.calibrate(model, [[1, 2]])
    one_line(error.value)
    ids = make_inputs(["text:20"])["input_ids"]
    with pytest.raises(ValueError, match="dense mask"):
        technique.calibrate(model, [{"input_ids": ids, "attention_mask": torch.ones(1, 1, 20, 20, dtype=torch.bool)}])
    # The model is as before, whatever went wrong.
    assert model.config.text_config._attn_implementation == "sdpa"
    assert not any(hasattr(module, "attention_settings") for module in model.modules())


def test_settings_refuse_a_wrong_number_of_heads():
    case = AttentionCase(queries=40, head_dim=16)
    query, key, _ = inputs_of(case)
    settings = DynamicSparseSettings(**SMALL, threshold=(0.5, 0.5))
    with pytest.raises(ValueError, match="threshold has 2 shares for 4 heads") as error:
        choose_blocks(query, key, layout_of(case), case.scaling, settings)
    one_line(error.value)
    for shares in ((), (0.5, 0.0), (0.5, "a"), [0.5, True]):
        with pytest.raises(ValueError, match="decode_share must be a share"):
            DynamicSparseSettings(decode_share=shares)
