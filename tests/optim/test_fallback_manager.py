"""What a machine lacks: the next weaker choice runs in its place, with one warning; what the caller named raises."""

import pytest
import torch
from helpers import make_inputs, make_pair, one_line

from qwen3_vl.optim import fallback_manager
from qwen3_vl.optim.fallback_manager import WEAKER, FallbackManager
from qwen3_vl.optim.orchestrator_optim import UnifiedOptimizationManager, optimize
from qwen3_vl.optim.registry_optim import TECHNIQUES


FAILURES = {
    "missing package": ImportError("No module named 'torchao'"),
    "unsupported device": NotImplementedError("'aten::_weight_int4pack_mm' is not there for 'xpu'"),
    "failed compile": RuntimeError("g++ exited with 1\nerror: no AVX"),
    "out of memory": MemoryError("2.00 GB were asked for"),
    "out of the GPU's memory": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "no space left": OSError(28, "No space left on device"),
}
SETTINGS = {"adaptive_precision": {"bits": 4}}
GREEDY = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}


@pytest.fixture
def model():
    return make_pair("dense").ours


@pytest.fixture
def warnings(monkeypatch):
    said = []
    monkeypatch.setattr(fallback_manager.logger, "warning_once", said.append)
    return said


def break_technique(monkeypatch, name, error):
    """Lets a technique fail once it has begun; its weaker forms, if they are of the same class, work."""
    technique, apply = TECHNIQUES[name], TECHNIQUES[name].apply

    def fail(self, model):
        if self.settings == TECHNIQUES[name](**SETTINGS.get(name, {})).settings:
            raise error
        apply(self, model)

    monkeypatch.setattr(technique, "apply", fail)


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("name", sorted(WEAKER))
def test_the_next_weaker_choice_runs(model, warnings, monkeypatch, name, failure):
    error, profile = FAILURES[failure], {name: SETTINGS.get(name, {})}
    inputs = make_inputs(["text:5", "image:4x6", "text:3"])
    before = model(**inputs).logits
    break_technique(monkeypatch, name, error)
    manager = UnifiedOptimizationManager(model, profile, strict=False)
    manager.apply()
    weaker, settings = WEAKER[name](profile[name]) or (None, {})
    (outcome,) = manager.outcomes
    assert outcome.asked == name and outcome.ran.name == weaker and settings.items() <= outcome.ran.settings.items()
    reason = str(error).splitlines()[0]
    assert outcome.reason == reason and warnings == [f"{name} cannot run here and {weaker} stands in for it: {reason}"]
    assert f"in place of {name}, {reason}" in manager.describe()
    assert model.generate(**inputs, **GREEDY).shape[1] == inputs["input_ids"].shape[1] + 3
    manager.revert()
    assert torch.equal(model(**inputs).logits, before)


@pytest.mark.parametrize("failure", FAILURES)
def test_what_the_caller_named_raises(model, warnings, monkeypatch, failure):
    error = FAILURES[failure]
    break_technique(monkeypatch, "quantized_cache", error)
    with pytest.raises(type(error)) as raised:
        optimize(model, {"qwen3_vl_exact": {}, "quantized_cache": {}})
    assert raised.value is error and not warnings
    assert not hasattr(model, "active_techniques") and model.config.optim is None
    assert model.config.text_config._attn_implementation == "sdpa"


def test_a_preset_goes_on_without_what_nothing_stands_in_for(model, warnings, monkeypatch):
    break_technique(monkeypatch, "faster_rotary", FAILURES["missing package"])
    optimize(model, "minimal")
    assert [technique.name for technique in model.active_techniques] == ["qwen3_vl_exact", "decode_linear"]
    assert "faster_rotary: off, No module named 'torchao'" in UnifiedOptimizationManager(model).describe()
    assert warnings == ["faster_rotary cannot run here and nothing stands in for it: No module named 'torchao'"]


def test_a_mistake_in_the_code_is_no_lack(model, monkeypatch):
    break_technique(monkeypatch, "quantized_cache", AttributeError("a typing error"))
    with pytest.raises(AttributeError, match="a typing error"):
        UnifiedOptimizationManager(model, {"quantized_cache": {}}, strict=False).apply()
    assert not hasattr(model, "active_techniques")


def test_a_compiler_that_fails_at_the_first_step_is_told(model):
    def broken(graph, example_inputs):
        raise RuntimeError("no such compiler")

    inputs = make_inputs(["text:5"])
    expected = model.generate(**inputs, **GREEDY)
    optimize(model, {"compiled_decode": {"backend": broken}})
    assert "failed" not in UnifiedOptimizationManager(model).describe()
    assert torch.equal(model.generate(**inputs, **GREEDY), expected)
    assert "; off since it failed, RuntimeError: no such compiler" in UnifiedOptimizationManager(model).describe()


@pytest.fixture
def nan_in_four_bits(monkeypatch):
    """Packed weights of 4 bits that give NaN, as too large scales in float16 do."""
    technique, apply = TECHNIQUES["adaptive_precision"], TECHNIQUES["adaptive_precision"].apply

    def spoil(self, model):
        apply(self, model)
        if self.settings["bits"] == 4:
            self.hook = model.register_forward_hook(lambda module, inputs, output: output.logits.fill_(float("nan")))

    revert = technique.revert

    def unspoil(self, model):
        if hasattr(self, "hook"):
            self.hook.remove()
            del self.hook
        revert(self, model)

    monkeypatch.setattr(technique, "apply", spoil)
    monkeypatch.setattr(technique, "revert", unspoil)


def test_nan_takes_the_next_weaker_choice(model, warnings, nan_in_four_bits):
    before = model(**make_inputs(["text:5"])).logits
    manager = UnifiedOptimizationManager(model, "aggressive")
    with manager:
        by_name = {technique.name: technique for technique in manager.techniques}
        assert by_name["adaptive_precision"].settings["bits"] == 8
        assert "in place of adaptive_precision, the first forward gave NaN" in manager.describe()
        # What was not to blame gave way before, since nobody knows what is.
        assert "token_merging: off, the first forward gave NaN" in manager.describe()
        assert any("adaptive_precision stands in for it" in said for said in warnings)
        assert model(**make_inputs(["text:5"])).logits.isfinite().all()
    assert torch.equal(model(**make_inputs(["text:5"])).logits, before)
    with pytest.raises(ValueError, match="NaN or infinite logits") as error:
        optimize(model, {"adaptive_precision": {"bits": 4}})
    assert one_line(error.value) and torch.equal(model(**make_inputs(["text:5"])).logits, before)


def test_a_preset_of_a_folder_is_looked_at_too(tmp_path, model, warnings, nan_in_four_bits):
    model.config.optim = "aggressive"
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded(**make_inputs(["text:5"])).logits.isfinite().all() and warnings


def test_nothing_is_applied_twice_in_the_place_of_others(model, monkeypatch, warnings):
    break_technique(monkeypatch, "compiled_decode", FAILURES["failed compile"])
    outcome = FallbackManager().apply(TECHNIQUES["compiled_decode"](), model, taken={"decode_linear"})
    assert outcome.ran is None and "nothing stands in for it" in warnings[0]
