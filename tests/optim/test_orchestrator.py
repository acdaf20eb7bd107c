"""The orchestrator: order, conflicts, what stands in for what cannot run, and that all of it comes off again."""

import pytest
import torch
from helpers import make_inputs, make_pair, one_line
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_vl.configuration.profile_presets import PRESETS
from qwen3_vl.configuration.profile_qwen3_vl import UnifiedConfig
from qwen3_vl.optim import fallback_manager
from qwen3_vl.optim.orchestrator_optim import UnifiedOptimizationManager, optimize
from qwen3_vl.optim.registry_optim import TECHNIQUES
from qwen3_vl.optim.technique_optim import Technique
from qwen3_vl.optim.technique_order import OrderOptimizer


GREEDY = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}


@pytest.fixture
def model():
    return make_pair("dense").ours


def named(name, **attributes):
    """A technique that notes on the model that it is on, in order."""

    class Noting(Technique):
        exact = True

        def apply(self, model):
            model.noted = [*getattr(model, "noted", []), self.name]

        def revert(self, model):
            model.noted = [other for other in getattr(model, "noted", []) if other != self.name]

    return type(name, (Noting,), {"name": name, **attributes})()


def order(*techniques):
    return [technique.name for technique in OrderOptimizer().order(techniques)]


def test_order_keeps_what_was_given_where_it_may():
    assert order(named("c"), named("a"), named("b")) == ["c", "a", "b"]
    assert order(named("c", after=("b",)), named("a"), named("b")) == ["a", "b", "c"]
    assert order(named("a", after=("missing",))) == ["a"]


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.permutations("abcdef"), st.sets(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=8))
def test_order_respects_every_need(names, edges):
    """Edges from smaller to larger letters cannot contradict each other."""
    after = {
        name: tuple("abcdef"[low] for low, high in edges if low < high and "abcdef"[high] == name) for name in names
    }
    ordered = order(*(named(name, after=after[name]) for name in names))
    assert sorted(ordered) == sorted(names)
    assert all(ordered.index(other) < ordered.index(name) for name in names for other in after[name])


@pytest.mark.parametrize(
    ("techniques", "words"),
    [
        ([named("a", role="cache"), named("b", role="cache")], "a and b exclude each other: both are the cache"),
        ([named("a"), named("b", excludes={"a": "of old grudges"})], "a and b exclude each other: of old grudges"),
        ([named("a", after=("b",)), named("b", after=("a",))], "each have to come after the other"),
        ([named("a", needs=("b",))], "a needs b"),
        ([named("a"), named("a")], "a is named twice"),
    ],
)
def test_what_cannot_be_ordered_is_named(techniques, words):
    with pytest.raises(ValueError, match=words) as error:
        OrderOptimizer().order(techniques)
    assert one_line(error)


def traces(model):
    """What a technique may leave behind: attributes of modules, hooks, classes, and the configuration."""
    modules = {
        name: (type(module), sorted(vars(module)), len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    }
    return modules, model.config.to_dict(), model.generation_config.to_dict()


@pytest.mark.parametrize("preset", PRESETS)
@torch.no_grad()
def test_apply_and_revert_leave_the_logits_as_they_were(kind, preset):
    model = make_pair(kind).ours
    inputs = make_inputs(["text:5", "image:4x6", "text:3"])
    before, tokens = model(**inputs).logits, model.generate(**inputs, **GREEDY)
    state, left = {name: value.clone() for name, value in model.state_dict().items()}, traces(model)
    manager = UnifiedOptimizationManager(model, preset)
    manager.apply()
    assert model.config.optim == preset and [t.name for t in manager.techniques]
    during = model.generate(**inputs, **GREEDY)
    assert during.shape == tokens.shape
    if preset == "minimal":
        assert torch.equal(during, tokens)
    manager.revert()
    assert torch.equal(model(**inputs).logits, before) and torch.equal(model.generate(**inputs, **GREEDY), tokens)
    assert traces(model) == left and model.config.optim is None
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_optimize_and_a_manager_without_a_profile(model):
    assert optimize(model, {"qwen3_vl_exact": {}, "paged_cache": {"page_tokens": 16}}) is model
    manager = UnifiedOptimizationManager(model)
    assert manager.describe() == "qwen3_vl_exact: exact\npaged_cache: exact, page_tokens=16"
    with pytest.raises(ValueError, match=r"on already \(qwen3_vl_exact, paged_cache\)"):
        optimize(model, "minimal")
    manager.revert()
    assert UnifiedOptimizationManager(model).describe() == "nothing is on: the plain model"


def test_a_context_manager_and_a_dry_run(model):
    manager = UnifiedOptimizationManager(model, "minimal")
    steps = manager.dry_run()
    assert [step["name"] for step in steps] == ["qwen3_vl_exact", "faster_rotary", "decode_linear"]
    assert all(step["exact"] for step in steps) and not hasattr(model, "active_techniques")
    assert manager.describe().count("not applied yet") == 3
    with manager:
        assert len(model.active_techniques) == 3
    assert not hasattr(model, "active_techniques")


class Broken(Technique):
    """Fails when it is applied, after it has begun."""

    name, exact = "broken", False
    error: Exception = ImportError("no module named 'faster'")

    def apply(self, model):
        model.half_done = True
        raise self.error

    def revert(self, model):
        vars(model).pop("half_done", None)


@pytest.fixture
def broken(monkeypatch):
    monkeypatch.setitem(TECHNIQUES, "broken", Broken)
    return Broken


@pytest.mark.parametrize("error", [ImportError("no torchao"), MemoryError("full"), RuntimeError("not\ncompiled")])
def test_what_cannot_run_is_replaced_with_one_warning(model, broken, monkeypatch, error):
    warnings, reason = [], str(error).splitlines()[0]
    monkeypatch.setattr(Broken, "error", error)
    monkeypatch.setitem(fallback_manager.WEAKER, "broken", lambda settings: ("paged_cache", {}))
    monkeypatch.setattr(fallback_manager.logger, "warning_once", warnings.append)
    manager = UnifiedOptimizationManager(model, {"broken": {}, "decode_linear": {}}, strict=False)
    manager.apply()
    assert [technique.name for technique in model.active_techniques] == ["paged_cache", "decode_linear"]
    assert not hasattr(model, "half_done")
    (outcome, _) = manager.outcomes
    assert (outcome.asked, outcome.reason) == ("broken", reason)
    assert "in place of broken" in manager.describe().splitlines()[0]
    assert warnings == [f"broken cannot run here and paged_cache stands in for it: {reason}"]


def test_what_is_on_already_is_not_put_in_twice(model, broken, monkeypatch):
    monkeypatch.setitem(fallback_manager.WEAKER, "broken", lambda settings: ("paged_cache", {}))
    UnifiedOptimizationManager(model, {"broken": {}, "paged_cache": {}}, strict=False).apply()
    assert [technique.name for technique in model.active_techniques] == ["paged_cache"]
    assert UnifiedOptimizationManager(model).describe().startswith("broken: off, no module named")


def test_what_the_caller_names_raises_and_nothing_stays(model, broken):
    with pytest.raises(ImportError, match="faster"):
        optimize(model, {"qwen3_vl_exact": {}, "broken": {}})
    assert not hasattr(model, "active_techniques") and model.config.optim is None
    assert model.config.text_config._attn_implementation != "qwen3_vl_exact"


class Poison(Technique):
    """Makes the logits NaN."""

    name, exact = "poison", False

    def apply(self, model):
        self.hook = model.register_forward_hook(self._spoil)

    def revert(self, model):
        self.hook.remove()

    @staticmethod
    def _spoil(module, inputs, output):
        output.logits = output.logits * float("nan")
        return output


def test_nan_in_the_first_forward_takes_lossy_ones_off(model, monkeypatch):
    monkeypatch.setitem(TECHNIQUES, "poison", Poison)
    manager = UnifiedOptimizationManager(model, {"poison": {}, "qwen3_vl_exact": {}}, strict=False)
    manager.apply()
    assert [technique.name for technique in model.active_techniques] == ["qwen3_vl_exact"]
    assert "NaN" in manager.describe().splitlines()[0]
    manager.revert()
    with pytest.raises(ValueError, match="NaN"):
        optimize(model, {"poison": {}})
    assert not hasattr(model, "active_techniques")


@pytest.mark.parametrize(
    ("profile", "words"),
    [
        ({"paged_cach": {}}, "did you mean 'paged_cache'"),
        ({"paged_cache": {}, "quantized_cache": {}}, "paged_cache and quantized_cache exclude each other"),
        ({"qwen3_vl_exact": {}, "qwen3_vl_block_sparse": {}}, "both are the attention"),
        ({"paged_cache": {"page_token": 3}}, "page_token"),
        ({"version": 99, "memory": {}}, "update qwen3_vl"),
        ("fastest", "unknown preset 'fastest'"),
        ({"memory": {"kv_cach": "int8"}}, "did you mean 'kv_cache'"),
        ({"memory": {"budget_bytes": -5}}, "must be at least 1, got -5"),
        ({"memory": {"kv_cache": "int8"}, "gpu": {"compile_decode": True}}, "both are the cache"),
        ({"decode_linear": {}, "grouped_experts": {}}, "found no sparse experts"),
        ("{corrupt}", "is no JSON"),
    ],
)
@torch.no_grad()
def test_bad_profiles_leave_the_model_alone(model, profile, words, tmp_path):
    inputs = make_inputs(["text:5", "image:4x6"])
    before, logits = traces(model), model(**inputs).logits
    if profile == "{corrupt}":
        profile = tmp_path / "profile.json"
        profile.write_text("{corrupt}")
    with pytest.raises(ValueError, match=words) as error:
        optimize(model, profile)
    assert one_line(error.value)
    assert traces(model) == before and torch.equal(model(**inputs).logits, logits)


def test_a_profile_object(model):
    optimize(model, UnifiedConfig.from_preset("minimal"))
    assert model.config.optim == UnifiedConfig.from_preset("minimal").to_dict()
