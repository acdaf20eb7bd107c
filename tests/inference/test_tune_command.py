"""`qwen3-vl tune`: what it measures, what it chooses, what it leaves behind, and one line for each mistake."""

import builtins
import json

import pytest
import torch
from helpers import make_inputs, make_pair
from PIL import Image
from typer.testing import CliRunner

from qwen3_vl.configuration.profile_qwen3_vl import UnifiedConfig
from qwen3_vl.inference import answering, cli, tuning_search
from qwen3_vl.inference.cli import app
from qwen3_vl.inference.tuning_measure import Forcing, Measurement, ProfileMeter
from qwen3_vl.inference.tuning_report import CONFIG, PLOT, PROFILE, REPORT
from qwen3_vl.inference.tuning_samples import DEFAULT_PROMPT, Sample, read_samples


pytest.importorskip("optuna")
needs_tiny = pytest.mark.skipif(
    not (answering.SHIPPED_CHECKPOINT / "config.json").is_file(), reason="checkpoints/tiny is not there"
)


@pytest.fixture(autouse=True)
def _libraries_stay_as_loud_as_they_are(monkeypatch):
    monkeypatch.setattr(cli, "_quieten_libraries", lambda: None)


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.radial_gradient("L").resize((96, 64)).convert("RGB").save(folder / "b.png")
    Image.new("RGB", (64, 64), "red").save(folder / "a.jpg")
    (folder / "notes.txt").write_text("no picture")
    return folder


def call(*arguments):
    return CliRunner().invoke(app, ["tune", *map(str, arguments)], env={"COLUMNS": "160"})


def error_line(result):
    assert result.exit_code == 1 and result.stdout == "", result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    return line


def test_samples_of_a_folder_and_of_rows(pictures, tmp_path):
    assert [sample.images[0].name for sample in read_samples(pictures)] == ["a.jpg", "b.png"]
    assert read_samples(pictures, "Why?", limit=1) == [Sample("Why?", (pictures / "a.jpg",))]
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        '{"image": "pictures/a.jpg", "prompt": "What?"}\n\n{"prompt": "Hello"}\n'
        '{"image": ["pictures/a.jpg", "pictures/b.png"]}\n'
    )
    first, second, third = read_samples(rows)
    assert first == Sample("What?", (pictures / "a.jpg",)) and second == Sample("Hello")
    assert third.prompt == DEFAULT_PROMPT and len(third.images) == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"image": "absent.png"}', "line 1 names a picture that is not there"),
        ('{"prompt": "a"}\n{"prompt": ', "line 2 is no JSON"),
        ('{"picture": "a.png"}', "line 1 must be like"),
        ('{"prompt": 3}', "line 1 must be like"),
        ("[]", "line 1 must be like"),
        ("", "holds no samples"),
    ],
)
def test_bad_rows_are_named(tmp_path, text, words):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(text)
    assert words in error_line(call("--samples", rows))


def test_mistakes_get_one_line_before_anything_is_loaded(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(answering, "load", lambda *a, **k: pytest.fail("the model was loaded"))
    assert "no samples at" in error_line(call("--samples", tmp_path / "absent"))
    assert "must be above 0 and at most 1" in error_line(call("--samples", pictures, "--target-quality", 1.5))
    assert "no folder" in error_line(call("--samples", pictures, "--model", tmp_path / "absent"))
    own = answering.SHIPPED_CHECKPOINT
    assert "is the model's own folder" in error_line(call("--samples", pictures, "--model", own, "--out", own))
    (tmp_path / "file").write_text("")
    assert "cannot write to" in error_line(call("--samples", pictures, "--out", tmp_path / "file"))
    assert call("--samples", pictures, "--trials", 0).exit_code == 2 == call().exit_code
    plain_import = builtins.__import__

    def without_optuna(name, *rest, **others):
        if name == "optuna":
            raise ImportError(name)
        return plain_import(name, *rest, **others)

    monkeypatch.setattr(builtins, "__import__", without_optuna)
    assert 'pip install "qwen3-vl[tune]"' in error_line(call("--samples", pictures))


def measured(time, memory, quality):
    return Measurement(1.0, 1.0, 1.0, 1.0, time, memory, quality, quality)


def fake(profile):
    """Fewer bits are faster, smaller and worse; fewer visual tokens are faster and worse."""
    bits, share = profile.optimization.weight_bits or 16, profile.optimization.visual_keep_ratio
    cache = {"auto": 16, "evicting": 10}.get(profile.memory.kv_cache) or int(profile.memory.kv_cache[3:])
    if cache == 2:
        raise ValueError("no such cache here")
    lost = 0.002 * (16 - bits) + 0.05 * (1 - share)
    return measured(0.3 + 0.02 * bits + 0.3 * share, 100 * bits + 10 * cache, 1 - lost)


def test_the_search_keeps_to_the_target():
    search = tuning_search.ProfileSearch(fake, target_quality=0.98)
    trials = list(search.run(40))
    presets = [
        UnifiedConfig.from_preset(name).optimization.weight_bits for name in ("minimal", "balanced", "aggressive")
    ]
    assert [trial.profile.optimization.weight_bits for trial in trials[:3]] == presets
    best, front = search.best(), search.front()
    every = [trial for trial in trials if trial.fits(0.98)]
    assert best.measurement.time_ratio == min(trial.measurement.time_ratio for trial in every)
    assert best.profile.optimization.weight_bits == 8 and best.title in {trial.title for trial in front}
    assert all(trial.fits(0.98) for trial in front) and len({trial.title for trial in front}) == len(front)
    assert any(trial.failure == "no such cache here" for trial in trials)
    again = tuning_search.ProfileSearch(fake, target_quality=0.98)
    assert [trial.profile for trial in again.run(40)] == [trial.profile for trial in trials]


def test_a_target_that_nothing_reaches():
    search = tuning_search.ProfileSearch(lambda profile: measured(1.0, 1, 0.5), target_quality=0.9)
    list(search.run(2))
    with pytest.raises(answering.AnsweringError, match=r"no profile of 2 agrees .* 90.0% .* reached 50.0%"):
        search.best()
    assert search.front() == []


def test_sparse_attention_is_tried_for_long_prompts_alone():
    for longest, count in ((100, 1), (5000, 2)):
        assert len(tuning_search.ProfileSearch(fake, 0.9, longest).choices["attention"]) == count


def test_forcing_notes_what_was_ranked_first():
    forcing = Forcing([5, 7], prompt_tokens=3)
    scores = torch.tensor([[0.0, 2.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    assert int(forcing(torch.zeros(1, 3, dtype=torch.long), scores).argmax()) == 5
    assert int(forcing(torch.zeros(1, 4, dtype=torch.long), scores).argmax()) == 7
    assert forcing.best == [1, 1] and len(forcing.times) == 2


def test_the_meter_knows_what_agrees_and_what_is_held():
    model = make_pair("dense", text={"hidden_size": 64}, vision={"out_hidden_size": 64}).ours
    requests = [make_inputs(["text:5", "image:4x6", "text:3"], seed=seed) for seed in (0, 1)]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    meter = ProfileMeter(model, requests, max_new_tokens=4, rounds=1)
    exact = meter.measure(UnifiedConfig.from_preset("minimal"))
    assert exact.top1_agreement == exact.token_agreement == 1.0
    assert exact.prefill_ms > 0 and exact.token_ms > 0 and exact.time_ratio > 0
    packed = meter.measure(UnifiedConfig(optimization={"weight_bits": 4, "visual_keep_ratio": 0.25}))
    assert packed.held_bytes < 0.8 * exact.held_bytes
    assert packed.token_agreement <= packed.top1_agreement <= 1.0 and packed.token_agreement < 1.0
    assert meter.exact_bytes >= sum(value.nbytes for value in state.values())
    assert not hasattr(model, "active_techniques")
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@needs_tiny
def test_the_command_leaves_a_profile_a_report_and_a_plot(pictures, tmp_path):
    out = tmp_path / "tuned"
    result = call(
        "--samples", pictures, "--trials", 3, "--rounds", 1, "--limit", 1, "--max-new-tokens", 3, "--dtype", "float32",
        "--target-quality", 0.3, "--out", out, "--prompt", "What colour is it?", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report == json.loads((out / REPORT).read_text())
    assert [trial["trial"] for trial in report["trials"]] == [0, 1, 2] and report["best"]["trial"] in report["front"]
    config = json.loads((out / CONFIG).read_text())
    plain = json.loads((answering.SHIPPED_CHECKPOINT / "config.json").read_text())
    assert config.pop("optim") == report["best"]["profile"] and config == plain
    assert UnifiedConfig.from_file(out / PROFILE).to_dict() == report["best"]["profile"]
    with Image.open(out / PLOT) as plot:
        assert min(plot.size) > 400 and len(plot.convert("RGB").getcolors(10**6)) > 10


@needs_tiny
def test_what_was_measured_stays_where_nothing_is_good_enough(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(ProfileMeter, "measure", lambda self, profile: measured(1.0, 10**6, 0.5))
    out = tmp_path / "tuned"
    line = error_line(call("--samples", pictures, "--trials", 1, "--limit", 1, "--max-new-tokens", 1, "--out", out))
    assert "best reached 50.0%" in line
    assert json.loads((out / REPORT).read_text())["best"] is None and (out / PLOT).is_file()
    assert not (out / CONFIG).exists()
