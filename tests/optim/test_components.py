"""Techniques and memory managers of one's own: by the same bases as the package's, and in a profile."""

import pytest
import torch
from helpers import make_inputs, make_pair, one_line

import qwen3_vl
from qwen3_vl.components.system.interfaces import ConfigurableComponent, MemoryManager
from qwen3_vl.optim.registry_optim import TECHNIQUES, register_technique
from qwen3_vl.optim.technique_optim import Technique


class Ledger(MemoryManager):
    """Hands out buffers and counts them."""

    def __init__(self, config=None):
        super().__init__(config)
        self.out = {}

    def allocate(self, size):
        if size > self.config["most"]:
            raise MemoryError(f"{size} bytes are more than {self.config['most']}")
        buffer = torch.zeros(size, dtype=torch.uint8)
        self.out[buffer.data_ptr()] = buffer
        return buffer

    def deallocate(self, ptr):
        del self.out[ptr.data_ptr()]


class SofterLogits(Technique):
    """Divides the logits, with a note in a buffer of a user's own manager."""

    name, exact = "softer_logits", False

    def __init__(self, config=None, temperature: float = 1.0, manager: MemoryManager | None = None):
        if temperature <= 0:
            raise ValueError(f"temperature must be above 0, got {temperature}.")
        super().__init__(temperature=temperature)
        self.manager = manager or Ledger({"most": 64})

    def apply(self, model):
        self.buffer = self.manager.allocate(8)
        self.hook = model.register_forward_hook(self._soften)

    def revert(self, model):
        self.hook.remove()
        self.manager.deallocate(self.buffer)

    def _soften(self, module, inputs, output):
        self.buffer[0] += 1
        output.logits = output.logits / self.settings["temperature"]
        return output


@pytest.fixture
def softer():
    yield register_technique(SofterLogits)
    del TECHNIQUES["softer_logits"]


@torch.no_grad()
def test_a_technique_of_one_s_own_runs_in_a_profile(softer):
    model, inputs = make_pair("dense").ours, make_inputs(["text:6"])
    before = model(**inputs).logits
    qwen3_vl.optimize(model, {"softer_logits": {"temperature": 2.0}, "qwen3_vl_exact": {}})
    manager = qwen3_vl.UnifiedOptimizationManager(model)
    (own, _) = manager.techniques
    assert torch.allclose(model(**inputs).logits, before / 2, atol=1e-5) and int(own.buffer[0]) > 0
    assert manager.describe().splitlines()[0] == "softer_logits: lossy, temperature=2.0" and len(own.manager.out) == 1
    manager.revert()
    assert torch.equal(model(**inputs).logits, before) and not own.manager.out
    with pytest.raises(ValueError, match="temperature must be above 0"):
        qwen3_vl.optimize(model, {"softer_logits": {"temperature": -1}})
    with pytest.raises(ValueError, match="did you mean 'softer_logits'"):
        qwen3_vl.optimize(model, {"softer_logit": {}})


@pytest.mark.parametrize(
    ("made", "error", "words"),
    [
        (lambda: dict, TypeError, "subclass of qwen3_vl.Technique"),
        (lambda: SofterLogits(), TypeError, "subclass of qwen3_vl.Technique"),
        (lambda: type("Nameless", (SofterLogits,), {"name": "paged_cache"}), ValueError, "exists already"),
        (lambda: type("Half", (Technique,), {"name": "half", "exact": True}), TypeError, "Half has no apply"),
        (lambda: type("Half", (Technique,), {"apply": print, "revert": print}), TypeError, "Half has no name"),
    ],
)
def test_what_is_no_technique_is_refused(made, error, words):
    known = dict(TECHNIQUES)
    with pytest.raises(error, match=words) as raised:
        register_technique(made())
    assert one_line(raised.value) and known == TECHNIQUES


def test_our_own_classes_stand_on_the_same_bases():
    managers = (qwen3_vl.GeneralMemoryManager, qwen3_vl.VisionLanguageMemoryManager, qwen3_vl.SparseMemoryManager)
    assert all(issubclass(cls, MemoryManager) and issubclass(cls, ConfigurableComponent) for cls in managers)
    assert all(issubclass(cls, ConfigurableComponent) for cls in TECHNIQUES.values())
    with pytest.raises(TypeError, match="abstract"):
        ConfigurableComponent()


@pytest.mark.parametrize("name", sorted(TECHNIQUES))
def test_settings_make_the_technique_again(name):
    technique = TECHNIQUES[name]()
    again = TECHNIQUES[name](**technique.settings)
    assert again.settings == technique.settings == technique.config
    technique.configure({})
    assert technique.settings == again.settings


def test_a_technique_is_configured_anew():
    technique = TECHNIQUES["quantized_cache"](bits=4, residual_tokens=64)
    technique.configure({"bits": 8})
    assert (technique.settings["bits"], technique.settings["residual_tokens"]) == (8, 64)
    cache = technique.make_cache(make_pair("dense").ours, 1, 100)
    assert cache.settings.bits == 8
    with pytest.raises(ValueError, match="bits"):
        technique.configure({"bits": 5})
    assert technique.settings["bits"] == 8


def test_a_manager_is_configured_anew():
    manager = qwen3_vl.GeneralMemoryManager(budget="1GB")
    small, large = (make_pair("dense", text={"num_hidden_layers": layers}).ours.config for layers in (2, 4))
    request = qwen3_vl.MemoryRequest(text_tokens=10)
    manager.configure(small)
    weights = manager.plan(request).weights["text"]
    manager.configure(large)
    assert manager.config is large and manager.plan(request).weights["text"] > weights
