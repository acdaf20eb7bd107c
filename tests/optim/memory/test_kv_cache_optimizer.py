"""Caches picked and installed for a budget, and the reference's own lines."""

import copy

import pytest
import torch
from helpers import make_inputs, make_pair, one_line
from transformers import DynamicCache

from qwen3_vl import KVCacheOptimizer, KVCachingOptimization, MemoryRequest, PagedKVCache, plan_memory
from qwen3_vl.optim.cache.cache_quantized import QuantizedKVCache
from qwen3_vl.optim.memory import kv_cache_optimizer
from qwen3_vl.optim.memory.memory_shapes import weight_bytes
from qwen3_vl.optim.orchestrator_optim import apply_profile
from qwen3_vl.optim.registry_optim import TECHNIQUES


OPTIONS = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True}
INPUTS = make_inputs(["text:30", "image:8x8", "text:5"])


@pytest.fixture
def model():
    return make_pair("dense").ours


def cache_of(model, **options):
    return model.generate(**INPUTS, **OPTIONS, **options).past_key_values


def test_lines_of_the_reference(model):
    config = model.config
    plain = model.generate(**INPUTS, **OPTIONS)
    kv_optimizer = KVCacheOptimizer(config=config)
    optimized_model = kv_optimizer.apply_optimizations(model)
    assert optimized_model is model
    assert isinstance(model.active_techniques[0], KVCachingOptimization)
    assert torch.equal(model.generate(**INPUTS, **OPTIONS).sequences, plain.sequences)
    with pytest.raises(ValueError, match="applied to the model already"):
        kv_optimizer.apply_optimizations(model)
    kv_optimizer.revert(model)
    assert model.active_techniques == []


def test_less_budget_gives_fewer_bits(model):
    model.set_attn_implementation("qwen3_vl_exact")
    weights = sum(weight_bytes(model, 4))
    kinds = []
    for megabytes in (1000, *range(40, 1, -1)):
        technique = KVCachingOptimization(budget=weights + megabytes * 10**6)
        try:
            cache = technique.make_cache(model, 1, 20_000)
        except MemoryError:
            break
        kinds.append(cache.layers[0].settings.bits if isinstance(cache, QuantizedKVCache) else 16)
    assert kinds == sorted(kinds, reverse=True) and set(kinds) == {16, 8, 4, 2}
    with pytest.raises(MemoryError) as caught:
        KVCachingOptimization(budget=weights + 1000).make_cache(model, 1, 20_000)
    assert "no cache fits: 1 rows of 20000 tokens" in one_line(caught.value)
    with pytest.raises(MemoryError, match="as paged"):
        KVCachingOptimization(budget=weights + 8 * 10**6, lossy=False).make_cache(model, 1, 20_000)


def test_what_is_free_counts_without_a_budget(model, monkeypatch):
    technique = KVCachingOptimization()
    assert technique.make_cache(model, 1, 1000) is None  # stock's own is the best for stock's attention
    monkeypatch.setattr(kv_cache_optimizer, "available_memory", lambda device: 10)
    with pytest.raises(MemoryError, match="no cache fits"):
        technique.make_cache(model, 1, 1000)
    monkeypatch.undo()
    assert 10**6 < kv_cache_optimizer.available_memory(torch.device("cpu")) < 10**14


@pytest.mark.parametrize(
    ("name", "kind"),
    [("dynamic", DynamicCache), ("paged", PagedKVCache), ("int8", QuantizedKVCache), ("int4", QuantizedKVCache)],
)
def test_named_caches_through_a_profile(model, name, kind):
    model.config.optim = {"kv_caching": {"cache": name}}
    (technique,) = apply_profile(model)
    assert type(technique) is TECHNIQUES["kv_caching"] is KVCachingOptimization
    assert technique.exact is (name in ("dynamic", "paged"))
    cache = cache_of(model)
    assert isinstance(cache, kind)
    if kind is QuantizedKVCache:
        assert cache.layers[0].settings.bits == int(name[3:])
    assert isinstance(cache_of(model, past_key_values=DynamicCache()), DynamicCache)  # the caller comes first
    assert cache_of(model, use_cache=False) is None


def test_a_request_applies_its_whole_plan(model):
    request = MemoryRequest([(96, 96)] * 4, text_tokens=900, new_tokens=10)
    free = plan_memory(model, request)
    optimizer = KVCacheOptimizer(config=model.config, budget=int(free.peak * 0.8), request=request)
    expected = copy.deepcopy(model).generate(**INPUTS, **OPTIONS).sequences
    optimizer.apply_optimizations(model)
    plan = optimizer.plan
    assert plan.peak <= 0.8 * free.peak
    assert plan.max_patches is not None or plan.prefill_chunk is not None
    assert model.generation_config.prefill_chunk_size == plan.prefill_chunk
    assert ("forward" in vars(model.model.visual)) is (plan.max_patches is not None)
    if plan.cache == "dynamic":
        assert torch.equal(model.generate(**INPUTS, **OPTIONS).sequences, expected)
    optimizer.revert(model)
    assert "forward" not in vars(model.model.visual)
    assert model.generation_config.prefill_chunk_size is None
    assert torch.equal(model.generate(**INPUTS, **OPTIONS).sequences, expected)


def test_what_cannot_fit_leaves_the_model_alone(model):
    optimizer = KVCacheOptimizer(budget=1000, request=MemoryRequest())
    with pytest.raises(MemoryError, match="nothing fits"):
        optimizer.apply_optimizations(model)
    assert not getattr(model, "active_techniques", [])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"cache": "int3"}, "cache must be one of"),
        ({"budget": 0}, "budget must be bytes"),
        ({"bits": 4}, "has no setting 'bits'"),
    ],
)
def test_bad_settings(settings, words):
    with pytest.raises(ValueError, match=words):
        KVCachingOptimization(**settings)
    with pytest.raises(ValueError, match="budget must be bytes"):
        KVCacheOptimizer(budget="lots")
