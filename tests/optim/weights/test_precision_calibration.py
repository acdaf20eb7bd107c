"""The choice of bits: against all combinations, and on a model."""

from itertools import product

import pytest
import torch
from helpers import make_inputs, make_pair, without
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_vl import AdaptivePrecision
from qwen3_vl.optim.weights.adaptive_precision import bytes_of
from qwen3_vl.optim.weights.precision_calibration import choose_bits


def total(table, chosen):
    return sum(table[group].get(bits, 0) for group, bits in chosen.items())


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data(), groups=st.integers(1, 4), share=st.floats(0, 1))
def test_choice_fits_and_nothing_better_still_fits(data, groups, share):
    sizes = {str(g): data.draw(st.integers(1, 20)) for g in range(groups)}
    candidates = {g: {16: 16 * n, 8: 9 * n, 4: 5 * n} for g, n in sizes.items()}
    costs = {}
    for g in candidates:
        narrow = data.draw(st.floats(0.01, 1))
        costs[g] = {16: 0.0, 8: narrow * data.draw(st.floats(0, 0.9)), 4: narrow}
    least, most = (sum(pick(options.values()) for options in candidates.values()) for pick in (min, max))
    budget = 7 + round(least + share * (most - least))
    chosen = choose_bits(candidates, costs, budget, rest_bytes=7)
    spent = 7 + total(candidates, chosen)
    assert spent <= budget
    for group, bits in chosen.items():
        for other in candidates[group]:
            better = costs[group][other] < costs[group][bits]
            assert not (better and spent - candidates[group][bits] + candidates[group][other] <= budget)
    fitting = (
        total(costs, choice)
        for choice in (dict(zip(candidates, bits, strict=True)) for bits in product((16, 8, 4), repeat=groups))
        if 7 + total(candidates, choice) <= budget
    )
    # Greedy by cost a byte: never more than the best choice and one group's whole cost.
    assert total(costs, chosen) <= min(fitting) + max(costs[g][4] for g in costs) + 1e-9


def test_calibration_on_a_model(kind):
    model = make_pair(kind, tie_word_embeddings=True).ours
    inputs = [make_inputs(["text:5", "image:4x6", "text:3"], ["text:4"])]
    state, size = {k: v.clone() for k, v in model.state_dict().items()}, bytes_of(model)
    technique, profile = AdaptivePrecision(bits=4, vision=4, mergers=4), {}
    budget = int(0.28 * size)
    layers = technique.calibrate(model, inputs, budget_bytes=budget, profile=profile)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert set(layers.values()) >= {4, 8} and profile["adaptive_precision"]["layers"] == layers
    for group, measured in technique.sensitivity.items():
        assert measured[16] == 0 and measured[8] < measured[4], group
    AdaptivePrecision(**profile["adaptive_precision"]).apply(model)
    assert bytes_of(model) <= budget


def test_a_flat_head_is_measured_as_kl():
    """The cost of the head against the divergence written out in float64."""
    model, inputs = make_pair("dense").ours, make_inputs(["text:6"])
    technique = AdaptivePrecision(bits=16, lm_head=8, vision=16, mergers=16)
    technique.calibrate(model, [inputs], budget_bytes=bytes_of(model))
    with torch.no_grad():
        plain = model(**inputs).logits.double().log_softmax(-1)
        AdaptivePrecision(bits=16, lm_head=8, vision=16, mergers=16).apply(model)
        packed = model(**inputs).logits.double().log_softmax(-1)
    expected = (plain.exp() * (plain - packed)).sum(-1).mean().item()
    assert technique.sensitivity == {"lm_head": {16: 0.0, 8: pytest.approx(expected, rel=1e-2)}}
    assert technique.settings["layers"] == {"lm_head": 16}


def test_bad_calibration():
    model, inputs = make_pair("dense").ours, make_inputs(["text:5", "image:4x6", "text:3"])
    technique = AdaptivePrecision(bits=4)
    words = without(make_inputs(["text:5"]), "pixel_values")
    with pytest.raises(ValueError, match=r"no sample holds pixel_values.*vision=16 and mergers=16"):
        technique.calibrate(model, [words], budget_bytes=10**6)
    with pytest.raises(ValueError, match="needs at least one sample"):
        technique.calibrate(model, [], budget_bytes=10**6)
    with pytest.raises(TypeError, match="a sample must be a mapping of model inputs, got Tensor"):
        technique.calibrate(model, [inputs["input_ids"]], budget_bytes=10**6)
    with pytest.raises(ValueError, match=r"needs at least \d+ bytes.*got budget_bytes=1000"):
        technique.calibrate(model, [inputs], budget_bytes=1000)
    for budget in (0, 1.5, True, -3):
        with pytest.raises(ValueError, match="budget_bytes must be a positive whole number"):
            technique.calibrate(model, [inputs], budget_bytes=budget)
    leaving = AdaptivePrecision(bits=4, vision=16, mergers=16)
    leaving.calibrate(model, [words], budget_bytes=bytes_of(model) - 1000)
    leaving.apply(model)
    with pytest.raises(ValueError, match="packed or quantized already"):
        technique.calibrate(model, [inputs], budget_bytes=10**7)
