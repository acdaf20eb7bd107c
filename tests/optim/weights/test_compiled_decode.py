"""The compiled decoding step: stock's tokens, one graph for all of them, and a named reason where it cannot be."""

import shutil

import pytest
import torch
from helpers import make_inputs, make_pair, max_difference, one_line
from transformers import StaticCache

from qwen3_vl import CompiledDecode, DecodeLinear, FlashAttention2, KernelFusion
from qwen3_vl.optim.weights import compiled_decode


GREEDY = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def fast(**settings):
    """Traced as for the real compiler, and run by PyTorch: seconds less a test."""
    return CompiledDecode(backend="eager", bucket_tokens=32, **settings)


def both(pair, inputs, technique=None, **options):
    technique = technique or fast()
    technique.apply(pair.ours)
    rows = len(inputs["input_ids"]) * options.get("num_beams", 1) * options.get("num_return_sequences", 1)
    cache = technique.make_cache(pair.ours, rows, inputs["input_ids"].shape[1] + 6)
    torch.manual_seed(0)
    ours = pair.ours.generate(**inputs, **{**GREEDY, **options}, past_key_values=cache)
    torch.manual_seed(0)
    return technique, ours, pair.stock.generate(**inputs, **{**GREEDY, **options})


@pytest.mark.parametrize(
    "kind, layouts",
    [
        ("dense", [["text:6"]]),
        ("dense", [["text:2", "image:4x6", "image:4x4"], ["text:4"]]),
        ("dense", [["video:2x4x4", "text:3"], ["text:4"]]),
        ("moe", [["text:2", "image:4x6"], ["text:4"]]),
    ],
    ids=["text", "padded pictures", "padded video", "experts"],
)
def test_same_tokens_as_stock(kind, layouts):
    technique, ours, stock = both(make_pair(kind), make_inputs(*layouts))
    assert torch.equal(ours, stock)
    assert technique.step.steps == 5 and technique.step.failure is None


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}], ids=str)
def test_beams_and_sampling(options):
    technique, ours, stock = both(make_pair("dense"), make_inputs(["text:6"], ["text:4"]), **options)
    assert torch.equal(ours, stock)
    assert technique.step.steps > 0 and technique.step.failure is None


def test_one_graph_for_all_steps_and_requests():
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    pair = make_pair("dense")
    technique, _, _ = both(pair, make_inputs(["text:6"], ["text:4"]), _with(count))
    for seed in (1, 2):
        inputs = make_inputs(["text:3", "image:4x4"], ["text:9"], seed=seed)
        cache = technique.make_cache(pair.ours, 2, 20)
        assert torch.equal(
            pair.ours.generate(**inputs, **GREEDY, past_key_values=cache), pair.stock.generate(**inputs, **GREEDY)
        )
    assert len(graphs) == 1 and technique.step.steps == 15


def _with(backend):
    technique = CompiledDecode(bucket_tokens=32)
    technique.settings["backend"] = backend
    return technique


def test_cache_implementation_by_name():
    pair, technique = make_pair("dense"), fast()
    technique.apply(pair.ours)
    inputs = make_inputs(["text:6"])
    ours = pair.ours.generate(**inputs, **GREEDY, cache_implementation="static")
    assert torch.equal(ours, pair.stock.generate(**inputs, **GREEDY))
    assert technique.step.steps == 5


@pytest.mark.parametrize("layouts", [[["text:6"], ["text:4"]], [["text:1"]]], ids=str)
def test_other_caches_decode_uncompiled(layouts):
    pair, technique = make_pair("dense"), fast()
    technique.apply(pair.ours)
    inputs = make_inputs(*layouts)
    assert torch.equal(pair.ours.generate(**inputs, **GREEDY), pair.stock.generate(**inputs, **GREEDY))
    assert technique.step.steps == 0 and technique.step.failure is None


def test_hidden_states_are_given_uncompiled():
    pair, technique = make_pair("dense"), fast()
    technique.apply(pair.ours)
    inputs, options = make_inputs(["text:6"]), {"output_hidden_states": True, "return_dict_in_generate": True}
    cache = technique.make_cache(pair.ours, 1, 12)
    ours = pair.ours.generate(**inputs, **GREEDY, **options, past_key_values=cache)
    stock = pair.stock.generate(**inputs, **GREEDY, **options)
    assert max_difference(ours.hidden_states[3][1], stock.hidden_states[3][1]) <= 1e-5
    assert technique.step.steps == 0


def test_capacity_is_in_buckets():
    model = make_pair("dense").ours
    sizes = [CompiledDecode(bucket_tokens=64).make_cache(model, 1, n).layers[0].max_cache_len for n in (1, 64, 65)]
    assert sizes == [64, 64, 128]


@torch.no_grad()
def test_full_cache_raises():
    model, technique = make_pair("dense").ours, fast()
    technique.apply(model)
    cache = StaticCache(config=model.config, max_cache_len=4)
    model(**make_inputs(["text:4"]), past_key_values=cache)
    with pytest.raises(ValueError, match="holds 4 tokens and token 5 came") as error:
        model(**make_inputs(["text:1"]), past_key_values=cache)
    one_line(error.value)


def test_a_failing_compiler_is_named_and_nothing_is_lost(monkeypatch):
    warnings = []
    monkeypatch.setattr(compiled_decode.logger, "warning", warnings.append)

    def broken(graph, example_inputs):
        raise RuntimeError("no such compiler\nsecond line")

    technique, ours, stock = both(make_pair("dense"), make_inputs(["text:6"], ["text:4"]), _with(broken))
    assert torch.equal(ours, stock)
    assert technique.step.steps == 0 and "no such compiler" in technique.step.failure
    assert len(warnings) == 1 and "no such compiler" in one_line(warnings[0])


@torch.no_grad()
def test_apply_and_revert():
    model, inputs, technique = make_pair("dense").ours, make_inputs(["text:5"]), fast()
    before, implementation = model(**inputs).logits, model.model.language_model.config._attn_implementation
    names = list(model.state_dict())
    technique.apply(model)
    assert max_difference(model(**inputs).logits, before) <= 1e-5
    assert list(model.state_dict()) == names
    with pytest.raises(ValueError, match="already applied"):
        technique.apply(model)
    technique.revert(model)
    assert torch.equal(model(**inputs).logits, before)
    assert model.model.language_model.config._attn_implementation == implementation
    assert not any("forward" in vars(module) for module in model.modules())


def test_on_top_of_others():
    pair = make_pair("dense")
    others = [FlashAttention2(), DecodeLinear(), KernelFusion()]
    for technique in others:
        technique.apply(pair.ours)
    inputs = make_inputs(["text:6"], ["text:4"])
    compiled, ours, stock = both(pair, inputs)
    assert torch.equal(ours, stock) and compiled.step.steps == 5
    for technique in reversed([*others, compiled]):
        technique.revert(pair.ours)
    assert not any("forward" in vars(module) for module in pair.ours.modules())


def test_training_takes_the_plain_way():
    model, inputs = make_pair("dense").ours, make_inputs(["text:5"])
    fast().apply(model)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert model.lm_head.weight.grad.abs().max() > 0


def test_from_profile(tmp_path):
    pair = make_pair("dense")
    pair.ours.config.optim = {"compiled_decode": {"backend": "eager", "bucket_tokens": 32}}
    pair.ours.save_pretrained(tmp_path)
    loaded = type(pair.ours).from_pretrained(tmp_path)
    inputs = make_inputs(["text:2", "image:4x6"], ["text:3"])
    assert torch.equal(loaded.generate(**inputs, **GREEDY), pair.stock.generate(**inputs, **GREEDY))
    assert loaded.active_techniques[0].step.steps == 5


def test_bad_input():
    with pytest.raises(ValueError, match="bucket_tokens must be a whole number of at least 1, got 0"):
        CompiledDecode(bucket_tokens=0)
    with pytest.raises(ValueError, match="compiled_decode has no setting 'mode'"):
        CompiledDecode(mode="fast")
    with pytest.raises(ValueError, match="found no decoder in Linear"):
        CompiledDecode().apply(torch.nn.Linear(2, 2))
    model = make_pair("dense").ours
    model.set_attn_implementation("qwen3_vl_block_sparse")
    with pytest.raises(ValueError, match="the decoder has 'qwen3_vl_block_sparse'") as error:
        CompiledDecode().apply(model)
    one_line(error.value)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs g++")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_by_inductor(dtype):
    pair = make_pair("dense", dtype=dtype, text={"num_hidden_layers": 1}, vision={"deepstack_visual_indexes": [0]})
    inputs = make_inputs(["text:6"], ["text:4"], dtype=dtype)
    technique, ours, stock = both(pair, inputs, CompiledDecode(bucket_tokens=32))
    assert technique.step.steps == 5 and technique.step.failure is None
    if dtype == torch.float32:
        assert torch.equal(ours, stock)
