"""`generate()` that pauses: the same tokens, the right pauses, and a model that is as before afterwards."""

import copy
import inspect
import pickle
import time as real_time
from pathlib import Path

import pytest
import torch
from helpers import make_inputs, make_pair, max_difference, one_line
from power_trees import write_battery, write_zone
from transformers import TextIteratorStreamer
from transformers.generation import StoppingCriteria, StoppingCriteriaList

import qwen3_vl
from qwen3_vl.optim.power.power_pacing import PowerManagement, Surroundings
from qwen3_vl.optim.registry_optim import techniques_of


TINY = Path(qwen3_vl.__file__).parent / "checkpoints" / "tiny"
STEP = 0.1  # seconds of a forward by the fake clock


@pytest.fixture
def model():
    return make_pair("dense").ours


@pytest.fixture
def surroundings(time, tmp_path):
    return Surroundings(time.clock, time.sleep, time.cpu_time, tmp_path)


def paced(model, time, surroundings, **settings):
    """`model` under power management, each of whose forwards takes `STEP` seconds of the fake clock."""
    technique = PowerManagement(**settings)
    technique.surroundings = surroundings
    technique.apply(model)
    model.register_forward_pre_hook(lambda *_: time.work(STEP))
    return technique


def draw(counter, joules, reach=10**12):
    counter.write_text(str((int(counter.read_text()) + round(joules * 1e6)) % reach))


def tokens(model, inputs=None, count=6, **settings):
    inputs = make_inputs(["text:5", "image:4x6", "text:3"]) if inputs is None else inputs
    settings = {"do_sample": False, "max_new_tokens": count, "min_new_tokens": count, **settings}
    return model.generate(**inputs, **settings)


def test_cpu_share(model, time, surroundings):
    technique = paced(model, time, surroundings, cpu_share=0.25)
    tokens(model, count=6)
    assert time.sleeps == [pytest.approx(3 * STEP)] * 6
    report = technique.last_report
    assert (report.pauses, report.paused_seconds) == (6, pytest.approx(18 * STEP))
    assert report.meter == "cpu_time" and report.average == pytest.approx(0.25)
    assert report.seconds == pytest.approx(24 * STEP) and report.taken == pytest.approx(6 * STEP)


def test_cpu_share_counts_by_thread(model, time, surroundings):
    time.busy = 2.0
    paced(model, time, surroundings, cpu_share=0.5, threads=2)
    tokens(model, count=4)
    assert time.sleeps == [pytest.approx(STEP)] * 4


def test_a_full_share_never_pauses(model, time, surroundings):
    technique = paced(model, time, surroundings, cpu_share=1.0)
    tokens(model)
    assert time.sleeps == [] and technique.last_report.pauses == 0


def test_watts(model, time, surroundings, tmp_path):
    counter = write_zone(tmp_path, "intel-rapl:0", "package-0", 999_000_000, reach=1_000_000_000)
    technique = paced(model, time, surroundings, max_watts=40)

    model.register_forward_pre_hook(lambda *_: draw(counter, 100 * STEP, reach=1_000_000_000))
    tokens(model, count=5)
    assert time.sleeps == [pytest.approx(100 * STEP / 40 - STEP)] * 5
    report = technique.last_report
    assert (report.meter, report.unit) == ("rapl", "J")
    assert report.taken == pytest.approx(500 * STEP) and report.average == pytest.approx(40)


def test_both_limits_hold(model, time, surroundings, tmp_path):
    counter = write_zone(tmp_path, "intel-rapl:0", "package-0", 0)
    paced(model, time, surroundings, max_watts=40, cpu_share=0.1)
    model.register_forward_pre_hook(lambda *_: draw(counter, 10))
    tokens(model, count=3)
    assert sum(time.sleeps) == pytest.approx(3 * STEP * 9)


def test_watts_that_nobody_counts(model, time, surroundings, caplog):
    technique = paced(model, time, surroundings, max_watts=40)
    with caplog.at_level("WARNING"):
        tokens(model)
        tokens(model)
    assert time.sleeps == [] and technique.last_report.meter == "cpu_time"
    (line,) = [record.message for record in caplog.records if "max_watts is not held" in record.message]
    assert "no processor package is listed" in line and "set cpu_share instead" in line


def test_the_share_holds_where_watts_cannot(model, time, surroundings, caplog):
    paced(model, time, surroundings, max_watts=40, cpu_share=0.5)
    with caplog.at_level("WARNING"):
        tokens(model, count=3)
    assert time.sleeps == [pytest.approx(STEP)] * 3
    assert any("cpu_share alone is held" in record.message for record in caplog.records)


def test_a_counter_that_dies_on_the_way(model, time, surroundings, tmp_path, caplog):
    counter = write_zone(tmp_path, "intel-rapl:0", "package-0", 0)
    paced(model, time, surroundings, max_watts=10)
    values = iter([5_000_000, 10_000_000])

    def rise_and_vanish(*_):
        value = next(values, None)
        counter.unlink(missing_ok=True) if value is None else counter.write_text(str(value))

    model.register_forward_pre_hook(rise_and_vanish)
    with caplog.at_level("WARNING"):
        result = tokens(model, count=5)
    assert result.shape[1] == make_inputs(["text:5", "image:4x6", "text:3"])["input_ids"].shape[1] + 5
    assert time.sleeps == [pytest.approx(0.4), pytest.approx(0.4)]
    assert sum("the meter rapl stopped" in record.message for record in caplog.records) == 1


INPUTS = {
    "no picture": lambda: make_inputs(["text:7"]),
    "left padding": lambda: make_inputs(["text:5", "image:4x6", "text:3"], ["text:4"]),
    "pictures and video": lambda: make_inputs(["text:2", "image:4x6", "text:1", "image:2x2", "video:2x4x4", "text:2"]),
}
DECODING = {
    "greedy": {},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"num_beams": 3},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
}


@pytest.mark.parametrize("decoding", DECODING)
@pytest.mark.parametrize("layout", INPUTS)
def test_the_same_tokens_and_scores(model, time, surroundings, layout, decoding):
    inputs, options = INPUTS[layout](), DECODING[decoding]
    if decoding == "prompt lookup" and layout == "left padding":
        inputs = make_inputs(["text:5", "image:4x6", "text:3"])
    options = {**options, "return_dict_in_generate": True, "output_scores": True}
    torch.manual_seed(1)
    plain = tokens(model, inputs, **options)
    technique = paced(model, time, surroundings, cpu_share=0.3)
    torch.manual_seed(1)
    ours = tokens(model, inputs, **options)
    assert torch.equal(ours.sequences, plain.sequences)
    assert len(ours.scores) == len(plain.scores)
    assert all(torch.equal(one, other) for one, other in zip(ours.scores, plain.scores, strict=True))
    assert technique.last_report.pauses >= 1
    assert technique.last_report.average == pytest.approx(0.3)


def test_an_assistant_that_is_paced_too(model, time, surroundings):
    assistant, inputs = make_pair("dense", seed=3).ours, make_inputs(["text:7"])
    plain = tokens(model, inputs, assistant_model=assistant)
    own = paced(model, time, surroundings, cpu_share=0.5)
    drafts = paced(assistant, time, surroundings, cpu_share=0.5)
    assert torch.equal(tokens(model, inputs, assistant_model=assistant), plain)
    assert own.last_report.average == pytest.approx(0.5)
    assert drafts.last_report.pauses >= 1


def test_the_end_of_generation_stays(model, time, surroundings):
    inputs = make_inputs(["text:7"])
    ids = tokens(model, inputs, count=8)
    stop = ids[0, -4].item()
    plain = model.generate(**inputs, do_sample=False, max_new_tokens=8, eos_token_id=stop)
    paced(model, time, surroundings, cpu_share=0.5)
    assert torch.equal(model.generate(**inputs, do_sample=False, max_new_tokens=8, eos_token_id=stop), plain)
    assert plain.shape[1] < ids.shape[1]


class StopAfter(StoppingCriteria):
    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.length)


def test_the_callers_criteria_count(model, time, surroundings):
    inputs = make_inputs(["text:7"])
    paced(model, time, surroundings, cpu_share=0.5)
    given = StoppingCriteriaList([StopAfter(10)])
    assert tokens(model, inputs, stopping_criteria=given).shape[1] == 10
    assert model.generate(inputs["input_ids"], None, None, given, do_sample=False, max_new_tokens=9).shape[1] == 10
    assert len(given) == 1 and len(time.sleeps) == 6


def test_streaming(model, time, surroundings):
    class Tokenizer:
        def decode(self, ids, **kwargs):
            return " ".join(str(int(token)) for token in ids) + " "

    paced(model, time, surroundings, cpu_share=0.5)
    streamer, inputs = TextIteratorStreamer(Tokenizer(), skip_prompt=True), make_inputs(["text:7"])
    ids = tokens(model, inputs, count=4, streamer=streamer)
    assert "".join(streamer).split() == [str(token) for token in ids[0, 7:].tolist()]


def test_threads_while_it_runs(model, time, surroundings):
    before, seen = torch.get_num_threads(), set()
    paced(model, time, surroundings, threads=before + 1)
    model.register_forward_pre_hook(lambda *_: seen.add(torch.get_num_threads()))
    tokens(model)
    assert seen == {before + 1} and torch.get_num_threads() == before


def test_threads_after_an_error(model, time, surroundings):
    before = torch.get_num_threads()

    def fail(*_):
        raise RuntimeError("out of something")

    technique = paced(model, time, surroundings, threads=before + 1)
    model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of something"):
        tokens(model)
    assert torch.get_num_threads() == before and technique.last_report.seconds == pytest.approx(STEP)


def test_on_battery(model, time, surroundings, tmp_path):
    write_battery(tmp_path, discharging=True)
    before, seen = torch.get_num_threads(), []
    paced(model, time, surroundings, cpu_share=0.5, battery={"cpu_share": 0.05, "threads": before + 1})
    time.busy = before + 1

    def look(*_):
        seen.append(torch.get_num_threads())
        if len(seen) == 4:
            time.busy = before
            write_battery(tmp_path, discharging=False)

    model.register_forward_pre_hook(look)
    tokens(model, count=8)
    # 20 steps a token on battery. The plug is seen 6 s after the first look, at the fourth token; all begins anew.
    assert time.sleeps == [pytest.approx(19 * STEP)] * 3 + [pytest.approx(STEP)] * 4
    assert seen == [before + 1] * 4 + [before] * 4 and torch.get_num_threads() == before


def test_without_a_battery_its_limits_are_not_used(model, time, surroundings):
    paced(model, time, surroundings, battery={"cpu_share": 0.1})
    tokens(model)
    assert time.sleeps == []


def test_measures_without_a_limit(model, time, surroundings, tmp_path):
    counter = write_zone(tmp_path, "intel-rapl:0", "package-0", 0)
    technique = paced(model, time, surroundings)
    model.register_forward_pre_hook(lambda *_: draw(counter, 3))
    tokens(model, count=4)
    assert technique.last_report.average == pytest.approx(30) and time.sleeps == []


def test_apply_and_revert(model):
    inputs = make_inputs(["text:5", "image:4x6"])
    with torch.no_grad():
        before, signature = model(**inputs).logits, inspect.signature(model.generate)
        technique = PowerManagement(cpu_share=0.9)
        technique.apply(model)
        assert inspect.signature(model.generate) == signature
        assert max_difference(model(**inputs).logits, before) == 0
        second = PowerManagement()
        with pytest.raises(ValueError, match="paced already") as caught:
            second.apply(model)
        one_line(caught.value)
        second.revert(model)
        assert model.generate.technique is technique
        technique.revert(model)
        assert "generate" not in vars(model)
        technique.revert(model)
        assert torch.equal(model(**inputs).logits, before)


def test_a_generate_that_was_replaced_before_is_kept(model):
    calls, plain = [], model.generate
    replaced = lambda *arguments, **options: calls.append(1) or plain(*arguments, **options)  # noqa: E731
    model.generate, technique = replaced, PowerManagement()
    technique.apply(model)
    tokens(model)
    assert calls == [1] and technique.last_report.seconds > 0
    technique.revert(model)
    assert model.generate is replaced


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_paced_for_themselves(model, how):
    technique = PowerManagement(cpu_share=1.0)
    technique.apply(model)
    copied = how(model)
    assert copied.generate.model is copied and copied.generate.technique is not technique
    with torch.no_grad():
        copied.lm_head.weight.zero_()
    assert not torch.equal(tokens(copied), tokens(model))
    assert copied.generate.technique.last_report.seconds != technique.last_report.seconds
    copied.generate.technique.revert(copied)
    assert "generate" not in vars(copied) and "generate" in vars(model)


class Recorder(torch.nn.Module):
    """Gives back the criteria that its `generate()` gets."""

    device = torch.device("cpu")

    def generate(self, inputs=None, generation_config=None, logits_processor=None, stopping_criteria=None, **kwargs):
        return stopping_criteria


def test_continuous_batching_gets_no_criterion():
    recorder = Recorder()
    PowerManagement(cpu_share=0.5).apply(recorder)
    assert recorder.generate(cache_implementation="paged") is None
    (criterion,) = recorder.generate()
    assert criterion(torch.zeros(3, 5, dtype=torch.long), None).tolist() == [False] * 3


def test_under_an_adapter(model, time, surroundings):
    peft = pytest.importorskip("peft")
    paced(model, time, surroundings, cpu_share=0.5)
    inputs, config = make_inputs(["text:7"]), peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config).eval()
    tokens(adapted, inputs, count=3)
    assert time.sleeps == [pytest.approx(STEP)] * 3


def test_a_model_without_generate(model):
    base, technique = model.base_model, PowerManagement(cpu_share=0.5)
    technique.apply(base)
    technique.revert(base)
    assert "generate" not in vars(base)


def test_a_profile_brings_it(model, tmp_path):
    model.save_pretrained(tmp_path)
    profile = {"power_management": {"cpu_share": 0.9, "battery": {"threads": 1}}}
    loaded = type(model).from_pretrained(tmp_path, optim=profile)
    (technique,) = loaded.active_techniques
    assert isinstance(technique, PowerManagement) and technique.limits.cpu_share == 0.9
    assert torch.equal(tokens(loaded), tokens(model))
    assert technique.last_report.seconds > 0
    loaded.save_pretrained(tmp_path / "again")
    (again,) = type(model).from_pretrained(tmp_path / "again").active_techniques
    assert again.settings == technique.settings
    (alone,) = techniques_of(profile)
    assert alone.exact


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_wats": 3}, "has no setting 'max_wats'"),
        ({"max_watts": 0}, "max_watts must be a number above 0"),
        ({"max_watts": -5}, "max_watts must be"),
        ({"max_watts": float("inf")}, "max_watts must be"),
        ({"max_watts": "15 W"}, "max_watts must be"),
        ({"cpu_share": 0}, "cpu_share must be above 0"),
        ({"cpu_share": 1.5}, "cpu_share must be"),
        ({"cpu_share": True}, "cpu_share must be"),
        ({"threads": 0}, "threads must be a whole number"),
        ({"threads": 1.5}, "threads must be"),
        ({"threads": True}, "threads must be"),
        ({"battery": 0.5}, "battery must be a dictionary of max_watts, cpu_share, threads"),
        ({"battery": {"share": 0.5}}, "battery has no setting 'share'"),
        ({"battery": {"cpu_share": 2}}, "cpu_share must be"),
    ],
)
def test_bad_settings(settings, words):
    with pytest.raises(ValueError) as caught:
        PowerManagement(**settings)
    assert words in one_line(caught.value)


@pytest.mark.skipif(not (TINY / "config.json").is_file(), reason="checkpoints/tiny is not there")
def test_the_tiny_checkpoint_by_real_clocks():
    model = qwen3_vl.Qwen3VLForConditionalGeneration.from_pretrained(TINY)
    inputs, slept = {"input_ids": torch.arange(20, 40)[None]}, []
    plain = tokens(model, inputs)
    # A tenth, as a loaded machine may give this process little more than a half.
    technique = PowerManagement(cpu_share=0.1)
    technique.surroundings = Surroundings(sleep=lambda seconds: slept.append(seconds) or real_time.sleep(seconds))
    technique.apply(model)
    assert torch.equal(tokens(model, inputs), plain)
    report = technique.last_report
    assert report.pauses == len(slept) >= 1 and report.paused_seconds == pytest.approx(sum(slept))
    # What the end of `generate()` takes behind the last pause is all that may exceed it.
    assert report.meter != "cpu_time" or report.average <= 0.13 * torch.get_num_threads()
