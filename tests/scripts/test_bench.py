"""`python scripts/bench`: that a case runs, what it leaves behind, and that its figures mean what they say."""

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch


BENCH = Path(__file__).resolve().parents[2] / "scripts" / "bench"
sys.path.insert(0, str(BENCH))

import bench_peer  # noqa: E402
from bench_contest import Contest, Way, run_contest  # noqa: E402
from bench_inputs import SINKS, Heads, mass_kept, noise_inputs, structured_inputs  # noqa: E402
from bench_pair import config_values  # noqa: E402
from bench_plot import _spread_out  # noqa: E402
from bench_report import save  # noqa: E402
from bench_settings import Settings  # noqa: E402

from qwen3_vl.optim.user_cache import user_cache_folder  # noqa: E402


def run_bench(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(BENCH), *arguments], capture_output=True, text=True)


def quick_rows(folder: Path, case: str, *options: str, runs: int = 2) -> list[dict]:
    result = run_bench(case, "--quick", "--repeats", "2", "--threads", "1", "--out", str(folder), *options)
    assert result.returncode == 0, result.stdout + result.stderr
    assert (folder / f"{case}_cpu.png").stat().st_size > 1000
    values = json.loads((folder / f"{case}_cpu.json").read_text())
    assert values["quick"] is True
    assert set(values) >= {"device_name", "versions", "commit", "repeats", "date", "threads"}
    for row in values["rows"]:
        assert len(row["ours"]["times_ms"]) == len(row["stock"]["times_ms"]) == runs
        ratio = row["stock"]["median_ms"] / row["ours"]["median_ms"]
        assert row["speedup"] == pytest.approx(ratio, rel=1e-2, abs=0.02)
    return values["rows"]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["vision", "preprocessing"])
def test_quick_run_writes_figures_and_a_plot(tmp_path, case):
    pytest.importorskip("matplotlib")
    row = quick_rows(tmp_path, case)[0]
    # fp32 with the same weights and pictures.
    assert row["agreement"]["max_abs_diff"] <= 1e-4 * max(1, row["agreement"]["max_abs_stock"])


@pytest.mark.slow
def test_attention_rows_agree_and_say_what_was_computed(tmp_path):
    pytest.importorskip("matplotlib")
    rows = quick_rows(tmp_path, "attention")
    exact = [row for row in rows if row["way"].startswith("exact") or row["way"] == "memory-efficient"]
    assert len(exact) >= 10
    # What bfloat16 rounds away; a key too much or too few costs percents.
    assert all(row["agreement"]["relative_error"] < 0.005 for row in exact)
    sparse = [row for row in rows if "density" in row["details"]]
    assert {row["way"] for row in sparse} == {"dynamic sparse", "dynamic sparse, paged", "block sparse"}
    assert all(row["details"]["density"] <= row["details"]["mass_kept"] <= 1 for row in sparse)
    assert any(row["details"]["density"] < 0.5 for row in sparse)
    assert all(row["details"]["share_of_plain_read"] > 0 for row in exact if row["sizes"]["phase"] == "decode")

    kept = quick_rows(tmp_path, "attention", "--rows", "prefill at 128")
    assert [row["label"] for row in kept] == [row["label"] for row in rows]
    changed = [new["label"] for new, old in zip(kept, rows, strict=True) if new != old]
    assert changed and all(label.startswith("prefill at 128") for label in changed)


@pytest.mark.slow
def test_cache_rows_say_what_is_held(tmp_path):
    pytest.importorskip("matplotlib")
    longest = [row for row in quick_rows(tmp_path, "cache") if row["label"].startswith("512")]
    shares = {row["way"]: row["details"]["share_of_whole"] for row in longest}
    assert shares["int2"] < shares["int4"] < shares["int8"] < shares["paged"]
    assert shares["int4"] == shares["int4, plain"]


@pytest.mark.slow
def test_prefix_rows_have_equal_tokens(tmp_path):
    pytest.importorskip("matplotlib")
    rows = {row["way"]: row for row in quick_rows(tmp_path, "prefix")}
    assert all(row["agreement"]["equal_tokens"] == 1 for row in rows.values())
    assert rows["second question"]["details"]["tokens_reused"] > 0


@pytest.mark.slow
def test_plan_rows_compare_with_what_was_held(tmp_path):
    pytest.importorskip("matplotlib")
    for row in quick_rows(tmp_path, "plan", "--rows", "qwen3_vl_exact, paged", runs=1):
        assert row["agreement"]["weights"] == row["agreement"]["kv"] == 1
        assert row["planned_mib"]["peak"] > row["planned_mib"]["weights"] > 0


@pytest.mark.slow
def test_token_rows_compute_less_and_pages_hardly_differ(tmp_path):
    pytest.importorskip("matplotlib")
    rows = quick_rows(tmp_path, "tokens")
    by_phase = {phase: {} for phase in ("decoder", "to the first token", "tower")}
    for row in rows:
        by_phase[row["sizes"]["phase"]][row["way"]] = row
    assert {"all tokens", "merge 25%", "random 25%"} <= set(by_phase["to the first token"]) <= set(by_phase["decoder"])
    everything = by_phase["decoder"]["all tokens"]["agreement"]
    assert everything["max_abs_diff"] < 0.03 * everything["max_abs_stock"]  # in bfloat16
    assert by_phase["decoder"]["merge 25%"]["agreement"]["max_abs_diff"] > everything["max_abs_diff"]
    for row in by_phase["tower"].values():
        assert row["agreement"]["max_abs_diff"] < 0.1 * row["agreement"]["max_abs_stock"]
        assert set(row["against"]) == ({"all patches"} if row["way"].startswith("flat") else set())


@pytest.mark.slow
@pytest.mark.parametrize("case", ["decode", "tower"])
def test_model_rows_agree(tmp_path, case):
    pytest.importorskip("matplotlib")
    rows = [row for row in quick_rows(tmp_path, case) if "int4" not in row["way"]]
    assert any(row["way"].endswith("plain") for row in rows)
    # In bfloat16, through several layers.
    assert all(row["agreement"]["max_abs_diff"] < 0.03 * row["agreement"]["max_abs_stock"] for row in rows)


@pytest.mark.slow
def test_weights_rows_say_what_is_held(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [row for row in quick_rows(tmp_path, "weights") if row["sizes"]["phase"] == "decode"]
    held = {row["way"]: row["details"]["text_weights_mib"] for row in rows}
    assert 1.7 * held["int4"] < held["int8"] < 0.6 * held["bf16"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "ways"),
    [
        ("moe", ("stock, batched_mm", "grouped_experts")),
        ("compiled", ("exact, paged, linear", "exact, paged, fused", "compiled")),
        ("routing", ("plain, exact", "capacity 0.5")),
    ],
)
def test_rows_of_exact_ways_agree(tmp_path, case, ways):
    pytest.importorskip("matplotlib")
    rows = [row for row in quick_rows(tmp_path, case) if row["way"] in ways]
    assert {row["way"] for row in rows} == set(ways)
    for row in rows:
        assert row["details"].get("failure") is None
        assert row["agreement"]["max_abs_diff"] < 0.03 * row["agreement"]["max_abs_stock"]


@pytest.mark.slow
def test_profile_rows_have_a_column_of_the_peer(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    pytest.importorskip("gguf")
    monkeypatch.setenv("QWEN3_VL_NATIVE_CACHE", str(user_cache_folder() / "native"))  # compiled once for all tests
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rows = quick_rows(tmp_path, "profiles", "--peer", str(fake_peer(tmp_path, [50.0, 100.0, 25.0])))
    decoding = [row for row in rows if row["sizes"].get("context") == 512]
    assert [row["way"] for row in decoding] == ["minimal", "balanced", "aggressive", "composition"]
    by_way = {row["way"]: row["details"] for row in decoding}
    assert by_way["aggressive"] == {**by_way["aggressive"], "peer": "Q4_0", "peer_ms": 20.0}
    assert by_way["minimal"]["peer"] == "BF16" and "peer" not in by_way["balanced"]
    assert by_way["aggressive"]["weights_mib"] < by_way["balanced"]["weights_mib"] < by_way["minimal"]["weights_mib"]
    minimal = next(row["agreement"] for row in decoding if row["way"] == "minimal")
    assert minimal["max_abs_diff"] < 0.03 * minimal["max_abs_stock"]


def fake_peer(folder: Path, tokens_per_second: list[float], status: int = 0) -> Path:
    """An executable that prints what `llama-bench -o json` does, and notes how it was called."""
    path, called = folder / "llama-bench", str(folder / "called")
    lines = [
        f"#!{sys.executable}",
        "import sys",
        f"open({called!r}, 'w').write(' '.join(sys.argv[1:]))",
        "print('loading', 'no such model', sep=chr(10), file=sys.stderr)",
        f"print({json.dumps([{'samples_ts': tokens_per_second}])!r})",
        f"sys.exit({status})",
    ]
    path.write_text("\n".join(lines))
    path.chmod(0o755)
    return path


def peer_settings(peer: Path) -> Settings:
    return Settings("cpu", ("bfloat16",), 2, 1, 4, quick=True, against_itself=False, peer=peer)


def test_the_peer_is_asked_for_tokens_behind_a_context(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_peer, "weights_file", lambda settings, form: tmp_path / f"{form}.gguf")
    settings = peer_settings(fake_peer(tmp_path, [50.0, 100.0, 25.0]))
    assert bench_peer.peer_decode_ms(settings, "BF16", 1024) == 20.0
    called = (tmp_path / "called").read_text()
    assert called.startswith(f"-m {tmp_path / 'BF16.gguf'} -p 0 -n 16 -d 1024 -t ") and called.endswith("-o json")
    assert bench_peer.peer_prefill_ms(settings, "Q4_0", 64) == 64 * 20.0
    assert "-p 64 -n 0" in (tmp_path / "called").read_text()


def test_a_peer_that_does_not_work_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_peer, "weights_file", lambda settings, form: tmp_path / "none")
    with pytest.raises(RuntimeError, match="llama-bench failed: no such model"):
        bench_peer.peer_decode_ms(peer_settings(fake_peer(tmp_path, [], status=1)), "BF16", 7)
    with pytest.raises(RuntimeError, match=r"does not run: .*give the path of llama-bench as --peer"):
        bench_peer.peer_decode_ms(peer_settings(tmp_path / "missing"), "BF16", 7)
    (tmp_path / "llama-bench").write_text("#!/bin/sh\necho nothing")
    with pytest.raises(RuntimeError, match="did not print what llama-bench -o json prints"):
        bench_peer.peer_decode_ms(peer_settings(tmp_path / "llama-bench"), "BF16", 8)


@pytest.mark.parametrize(("form", "bits"), [("BF16", 16), ("Q4_0", 4.5)])
def test_weights_for_the_peer_have_the_widths(tmp_path, monkeypatch, form, bits):
    gguf = pytest.importorskip("gguf")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    narrow = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    values = config_values(2, 4, True)
    values["text_config"] |= {**narrow, "head_dim": 32, "vocab_size": 700}
    monkeypatch.setattr(bench_peer, "config_values", lambda *sizes: values)
    path = bench_peer.weights_file(peer_settings(tmp_path), form)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert len(tensors) == 2 + 2 * 11
    matrices = {name: tensor for name, tensor in tensors.items() if len(tensor.shape) > 1}
    assert matrices["token_embd.weight"].shape.tolist() == [64, 700]
    assert matrices["blk.1.ffn_down.weight"].shape.tolist() == [96, 64]
    assert matrices["blk.0.attn_k.weight"].shape.tolist() == [64, 64]
    for tensor in matrices.values():
        assert tensor.n_bytes == tensor.n_elements * bits / 8
    before = path.stat().st_mtime_ns
    assert bench_peer.weights_file(peer_settings(tmp_path), form).stat().st_mtime_ns == before


def test_without_gguf_the_way_out_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(RuntimeError, match="pip install gguf"):
        bench_peer.weights_file(peer_settings(tmp_path), "BF16")
    assert not list(tmp_path.rglob("*.gguf"))


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["nonsense"], 2, "no such case: nonsense"),
        (["attention", "--quick", "--rows", "nonsense"], 1, "no row's label has 'nonsense' in it"),
    ],
)
def test_what_does_not_exist_is_named(arguments, code, words):
    result = run_bench(*arguments)
    assert result.returncode == code
    assert words in result.stdout + result.stderr


class Log:
    """Ways that write down when they ran."""

    def __init__(self):
        self.entries = []

    def way(self, name: str, output: float, **options) -> Way:
        def work():
            self.entries.append(name)
            return torch.tensor(output)

        return Way(work, prepare=lambda: self.entries.append(f"prepare {name}"), **options)


def contest(ways: dict[str, Way], **options) -> Contest:
    return Contest("row", {}, lambda: ways, lambda ours, stock: {"difference": (ours - stock).item()}, **options)


def test_contest_runs_in_turns_and_compares_with_the_first():
    log = Log()
    ways = {
        "stock": log.way("stock", 1.0),
        "a": log.way("a", 3.0, details=lambda: {"density": 0.5}),
        "b": log.way("b", 1.0, against=("a", "absent")),
    }
    records = run_contest(contest(ways, most_repeats=2), repeats=9, device="cpu")
    ran = [entry for entry in log.entries if not entry.startswith("prepare")]
    # A first run of each, then two rounds with another one first.
    assert ran == ["stock", "a", "b", "stock", "a", "b", "a", "b", "stock"]
    assert log.entries[::2] == [f"prepare {name}" for name in ran]
    assert [record["label"] for record in records] == ["row: a", "row: b"]
    a, b = records
    assert a["agreement"] == {"difference": 2.0} and a["details"] == {"density": 0.5}
    assert b["agreement"] == {"difference": 0.0} and set(b["against"]) == {"a"}
    assert a["stock"]["times_ms"] == b["stock"]["times_ms"] and len(a["stock"]["times_ms"]) == 2


def test_contest_against_itself_has_one_row():
    log = Log()
    ways = {"stock": log.way("stock", 1.0), "a": log.way("a", 2.0)}
    (record,) = run_contest(contest(ways), repeats=1, device="cpu", against_itself=True)
    assert record["way"] == "stock again" and "a" not in log.entries


def test_contest_times_one_call_and_counts_what_it_reads(monkeypatch):
    times = iter([8.0, 4.0, 268.435456])  # stock, a, and the plain read of 2**28 bytes at 1 GB/s
    monkeypatch.setattr("bench_contest.time_ms", lambda work, device: next(times))
    log = Log()
    ways = {"stock": log.way("stock", 1.0), "a": log.way("a", 1.0, reads_bytes=500_000)}
    (record,) = run_contest(contest(ways, calls=4), repeats=1, device="cpu")
    assert (record["stock"]["median_ms"], record["ours"]["median_ms"]) == (2.0, 1.0)
    assert record["details"] == {"gb_per_s": 0.5, "plain_read_gb_per_s": 1.0, "share_of_plain_read": 0.5}


def test_mass_kept_counts_only_what_is_seen():
    heads, tokens = Heads(4, 2, 8), 12
    query, key = torch.zeros(1, heads.query_heads, 2, heads.dim), torch.randn(1, heads.kv_heads, tokens, heads.dim)
    rows = torch.tensor([3, 7])
    kept = torch.zeros(heads.kv_heads, 2, tokens, dtype=torch.bool)
    kept[0, :, :2] = True  # 2 of 4 seen, 2 of 8 seen
    kept[1, :, 4:] = True  # nothing, 4 of 8
    figures = mass_kept(query, key, rows, kept, 1.0)
    assert figures == {"mass_kept": pytest.approx((0.375 + 0.25) / 2, abs=1e-4), "mass_kept_worst_head": 0.25}


def test_structured_inputs_are_what_they_say():
    heads, tokens = Heads(4, 2, 64), 3000
    query, key, value = structured_inputs(heads, tokens, torch.float32, "cpu")
    assert query.shape == (1, 4, tokens, 64) and key.shape == value.shape == (1, 2, tokens, 64)
    assert torch.equal(key, structured_inputs(heads, tokens, torch.float32, "cpu")[1])

    def likeness(x, distance):
        return (x[:, :, distance:] * x[:, :, :-distance]).mean().item()

    rest = key[:, :, SINKS:]
    assert rest.var().item() == pytest.approx(1, abs=0.15)
    # 0.64 of the variance is content; of that half forgets over 512 tokens, half stays for a segment.
    assert likeness(rest, 8) == pytest.approx(0.64, abs=0.1)
    assert likeness(rest, 8) > likeness(rest, 400) > likeness(rest, 1500) - 0.05
    noise = noise_inputs(heads, tokens, torch.float32, "cpu")
    assert likeness(noise[1], 8) == pytest.approx(0, abs=0.02)


def test_heads_go_from_diffuse_to_sharp():
    heads = Heads(4, 2, 64)
    query, key, _ = structured_inputs(heads, 2048, torch.float32, "cpu")
    near = torch.zeros(4, 1, 2048, dtype=torch.bool)
    near[:, :, -256:] = True
    rows = torch.tensor([2047])
    shares = [mass_kept(query[:, [h], -1:], key[:, [h // 2]], rows, near[[h]], 64**-0.5)["mass_kept"] for h in (0, 3)]
    assert shares[0] < shares[1]


def test_rows_of_an_earlier_run_stay(tmp_path):
    pytest.importorskip("matplotlib")
    machine = {"device": "cpu", "device_name": "a machine", "quick": False}
    side = {"median_ms": 1.0, "quartiles_ms": [1.0, 1.0]}

    def record(label, speedup):
        return {"label": label, "sizes": {}, "ours": side, "stock": side, "speedup": speedup}

    save(tmp_path, "case", [record("a", 1.0), record("b", 1.0)], machine)
    data, _ = save(tmp_path, "case", [record("c", 2.0), record("a", 2.0)], machine, keep_others=True)
    assert [(row["label"], row["speedup"]) for row in json.loads(data.read_text())["rows"]] == [
        ("a", 2.0),
        ("b", 1.0),
        ("c", 2.0),
    ]


def test_names_of_lines_do_not_touch():
    places = _spread_out({"a": 0.5, "b": 0.5, "c": 0.51, "d": 0.9}, gap=0.05)
    assert places["d"] == 0.9
    heights = sorted(places.values())
    assert all(upper - lower >= 0.05 - 1e-9 for lower, upper in pairwise(heights))
    assert (places["a"] + places["b"] + places["c"]) / 3 == pytest.approx(0.503, abs=0.01)
