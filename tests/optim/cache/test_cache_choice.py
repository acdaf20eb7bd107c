"""The cache that `generate()` takes when nobody names one."""

import pytest
import torch
from helpers import make_inputs, make_pair
from transformers import DynamicCache

from qwen3_vl import PagedKVCache
from qwen3_vl.optim.cache import cache_choice
from qwen3_vl.optim.native.native_attention import kernels


@pytest.fixture(scope="module")
def pair():
    return make_pair("dense")


@pytest.fixture(autouse=True)
def plain_again(pair):
    yield
    pair.ours.set_attn_implementation("sdpa")


def cache_of(pair, **options):
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True}
    inputs = make_inputs(["text:5", "image:4x6", "text:3"])
    ours = pair.ours.generate(**inputs, **settings, **options)
    assert torch.equal(ours.sequences, pair.stock.generate(**inputs, **settings).sequences)
    return ours.past_key_values


@pytest.mark.skipif(kernels() is None, reason="no C++ compiler")
@pytest.mark.parametrize("name", ["qwen3_vl_exact", "qwen3_vl_adaptive", "qwen3_vl_dynamic_sparse"])
def test_pages_where_attention_reads_them(pair, name):
    pair.ours.set_attn_implementation(name)
    assert isinstance(cache_of(pair), PagedKVCache)


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_stock_names_keep_the_stock_cache(pair, name):
    pair.ours.set_attn_implementation(name)
    assert type(cache_of(pair)) is DynamicCache


def test_the_caller_comes_first(pair):
    pair.ours.set_attn_implementation("qwen3_vl_exact")
    assert isinstance(cache_of(pair, past_key_values=DynamicCache()), DynamicCache)
    assert not isinstance(cache_of(pair, cache_implementation="dynamic"), PagedKVCache)
    assert cache_of(pair, use_cache=False) is None


def test_without_a_compiler_the_stock_cache_stays(pair, monkeypatch):
    monkeypatch.setattr(cache_choice, "kernels", lambda: None)
    pair.ours.set_attn_implementation("qwen3_vl_exact")
    assert type(cache_of(pair)) is DynamicCache


def test_autocast_keeps_the_stock_cache(pair):
    pair.ours.set_attn_implementation("qwen3_vl_exact")
    inputs = make_inputs(["text:5", "image:4x6", "text:3"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = pair.ours.generate(**inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    assert type(output.past_key_values) is DynamicCache
