"""Managers: bytes handed out and taken back, requests held to plans, and what caches hold."""

import pytest
import torch
from helpers import make_inputs, make_pair, one_line, tiny_config_dict
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, StaticCache

import qwen3_vl
from qwen3_vl import (
    GeneralMemoryManager,
    MemoryManager,
    MemoryRequest,
    PagedKVCache,
    SparseMemoryManager,
    VisionLanguageMemoryManager,
    VisualRules,
)
from qwen3_vl.optim.cache.cache_cross_layer import CrossLayerKVCache
from qwen3_vl.optim.cache.cache_evicting import EvictingKVCache
from qwen3_vl.optim.cache.cache_quantized import QuantizedKVCache


MANAGERS = [GeneralMemoryManager, VisionLanguageMemoryManager, SparseMemoryManager]
RULES = VisualRules(4, image_pixels=(1, 10**9))


@pytest.fixture(scope="module")
def config():
    return qwen3_vl.Qwen3VLConfig(**tiny_config_dict())


def test_the_interface_as_the_reference_uses_it():
    class MyMemoryManager(MemoryManager):
        def allocate(self, size):
            return bytearray(size)

        def deallocate(self, ptr):
            ptr.clear()

    manager = MyMemoryManager()
    buffer = manager.allocate(3)
    manager.deallocate(buffer)
    assert len(buffer) == 0
    with pytest.raises(TypeError):
        MemoryManager()
    assert all(issubclass(manager, MemoryManager) for manager in MANAGERS)


@pytest.mark.parametrize("manager_class", MANAGERS)
def test_bytes_come_and_go(manager_class, config):
    manager = manager_class(config=config, budget=1024)
    first = manager.allocate(500)
    assert first.shape == (500,) and first.dtype == torch.uint8
    assert (manager.held, manager.free) == (512, 512)
    with pytest.raises(MemoryError) as caught:
        manager.allocate(513)
    message = one_line(caught.value)
    assert "576 B were asked for, 512 B are held and 512 B free" in message
    address = first.data_ptr()
    manager.deallocate(first)
    assert manager.held == 0 and manager.statistics().idle == 512
    again = manager.allocate(400)
    assert again.data_ptr() == address  # the same memory, used again
    manager.deallocate(again)
    with pytest.raises(ValueError, match="not held"):
        manager.deallocate(again)
    with pytest.raises(ValueError, match="not held"):
        manager.deallocate(torch.zeros(3))
    with pytest.raises(ValueError, match="size must be a whole number"):
        manager.allocate(0)
    whole = manager.allocate(1024)  # what waits is given up for it
    assert manager.statistics().idle == 0 and manager.statistics().peak == 1024
    manager.deallocate(whole)


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 600)), max_size=40))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_never_over_budget_and_never_shared(steps):
    manager, out = GeneralMemoryManager(budget=2048), []
    for take, number in steps:
        if take:
            try:
                buffer = manager.allocate(number)
            except MemoryError:
                assert number > manager.free - 64
                continue
            buffer.fill_(len(out) % 251)
            out.append((buffer, len(out) % 251))
        elif out:
            buffer, mark = out.pop(number % len(out))
            assert (buffer == mark).all()
            manager.deallocate(buffer)
        statistics = manager.statistics()
        assert statistics.held + statistics.idle <= statistics.budget
        assert statistics.held >= sum(buffer.nbytes for buffer, _ in out)
    assert all((buffer == mark).all() for buffer, mark in out)


def test_tensors_and_a_failing_device(monkeypatch):
    manager = GeneralMemoryManager(budget="1MB")
    tensor = manager.allocate_tensor((3, 5), torch.bfloat16)
    assert tensor.shape == (3, 5) and tensor.dtype == torch.bfloat16
    manager.deallocate(tensor)

    def fail(*args, **kwargs):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(torch, "empty", fail)
    with pytest.raises(MemoryError, match="has no memory for 5"):
        manager.allocate(500_000)
    assert manager.held == 0


@pytest.mark.parametrize("budget", [0, -5, "none", "8XB"])
def test_bad_budgets(budget):
    with pytest.raises(ValueError, match="budget must be bytes"):
        GeneralMemoryManager(budget=budget)
    assert GeneralMemoryManager().budget > 2**30  # that of the machine


def test_plans_fit_into_what_is_free(config):
    manager = GeneralMemoryManager(config=config, budget="500MB")
    request = MemoryRequest([(96, 96)])
    assert manager.plan(request, rules=RULES).budget == 500_000_000
    held = manager.allocate(450_000_000)
    with pytest.raises(MemoryError, match=r"nothing fits into 50\.0 MB"):
        manager.plan(MemoryRequest(text_tokens=500_000), rules=RULES)
    manager.deallocate(held)


def test_modalities_are_counted_apart(config):
    manager = VisionLanguageMemoryManager(config=config, budget=10_000)
    buffers = [manager.allocate(100), manager.allocate(1000, "image"), manager.allocate(300, modality="video")]
    assert manager.held_by_modality() == {"text": 128, "image": 1024, "video": 320}
    for buffer in buffers:
        manager.deallocate(buffer)
    assert set(manager.held_by_modality().values()) == {0}
    with pytest.raises(ValueError, match="modality must be one of text, image, video"):
        manager.allocate(5, "audio")


def test_requests_are_admitted_as_far_as_they_fit(config):
    request = MemoryRequest([(96, 96)], text_tokens=2000)
    plan = qwen3_vl.plan_memory(config, request, rules=RULES)
    own = plan.peak - plan.weights_total
    manager = VisionLanguageMemoryManager(config=config, budget=plan.peak + own + 1000)
    with manager.hold(request, rules=RULES) as first, manager.hold(request, rules=RULES) as second:
        assert first.peak == second.peak == plan.peak
        assert manager.held == 2 * own
        with pytest.raises(MemoryError, match="nothing fits"), manager.hold(request, rules=RULES):
            pass
    assert manager.held == 0
    with pytest.raises(RuntimeError, match="stopped"), manager.hold(request, rules=RULES):
        raise RuntimeError("stopped")
    assert manager.held == 0


def test_inputs_are_held_to_their_plan(config):
    manager = VisionLanguageMemoryManager(config=config)
    inputs = make_inputs(["text:9", "image:4x6", "video:2x4x4"])
    sizes = {"text_tokens": 40, "videos": [qwen3_vl.VideoClip(16, 16, frames=4)]}
    rules = VisualRules(4, image_pixels=(1, 10**9), video_pixels=(1, 10**9))
    enough = manager.plan(MemoryRequest([(16, 24)], **sizes), rules=rules)
    manager.check_inputs(enough, inputs)
    small = manager.plan(MemoryRequest([(16, 16)], **sizes), rules=rules)
    with pytest.raises(ValueError, match="hold 6 image tokens but 4 were planned"):
        manager.check_inputs(small, inputs)
    twice = {name: torch.cat((ids, ids)) for name, ids in inputs.items() if name == "input_ids"}
    with pytest.raises(ValueError, match="hold 2 rows but 1 were planned"):
        manager.check_inputs(enough, twice)


def fill(cache, config, tokens, rows=2):
    text = config.text_config
    states = torch.randn(2, rows, text.num_key_value_heads, tokens, text.head_dim)
    for layer in range(text.num_hidden_layers):
        cache.update(*states, layer)
    return cache


def test_what_caches_hold(config):
    manager = SparseMemoryManager(config=config)
    dense = 2 * 2 * 100 * 2 * 16 * 4  # keys and values, rows, tokens, heads, head_dim, float32

    count = manager.count(fill(DynamicCache(config=config), config, 100), rows=2, dtype=torch.float32)
    assert [(layer.logical, layer.physical, layer.bytes) for layer in count.layers] == [(100, 100, dense)] * 3
    assert count.share == count.entry_share == 1 and count.bytes == count.dense_bytes == 3 * dense

    static = fill(StaticCache(config=config, max_cache_len=160), config, 100)
    assert manager.count(static).layers[0].physical == 160

    paged = fill(PagedKVCache(config), config, 100)
    assert manager.count(paged).bytes == sum(pool.statistics().bytes_held for pool in paged.pools.pools.values())
    once = manager.count(paged).bytes
    paged.batch_repeat_interleave(3)  # copies share their pages
    assert manager.count(paged).bytes == once

    shared = fill(CrossLayerKVCache(config), config, 100)
    assert manager.count(shared).bytes == shared.held_bytes > 0

    packed = fill(QuantizedKVCache(config, bits=4), config, 1000)
    count = manager.count(packed, rows=2, dtype=torch.float32)
    assert count.bytes == packed.held_bytes and count.share < 0.6

    empty = manager.count(DynamicCache(config=config))
    assert empty.bytes == 0 and empty.share == empty.entry_share == 1
    with pytest.raises(TypeError, match="only caches with layers"):
        manager.count([1, 2])


def test_evicting_caches_hold_fewer_than_they_have_seen():
    model = make_pair("dense").ours
    cache = EvictingKVCache(model.config, "streaming", text_share=0.1)
    inputs = make_inputs(["text:400"])
    model.generate(**inputs, past_key_values=cache, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    count = SparseMemoryManager(config=model.config).count(cache, dtype=torch.float32)
    assert count.bytes == cache.held_bytes
    for counted, layer in zip(count.layers, cache.layers, strict=True):
        assert counted.logical == 402
        kept = (layer.kept_positions >= 0).sum(-1)
        assert counted.physical == kept.max() < 200
    assert count.entry_share < 0.5 and count.share < 1


def test_what_a_run_leaves(config):
    model = make_pair("dense").ours
    manager = SparseMemoryManager(config=model.config)
    inputs = make_inputs(["text:20", "image:8x8", "text:3"])
    cache = model.generate(
        **inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False, return_dict_in_generate=True
    ).past_key_values
    plan = qwen3_vl.plan_memory(
        model, MemoryRequest([(32, 32)], text_tokens=23, new_tokens=4), rules=RULES, cache="dynamic"
    )
    count = manager.count(cache, dtype=torch.float32)
    assert count.bytes == plan.kv_total
    assert count.layers[0].logical == plan.sizes.cached
    tight = SparseMemoryManager(config=model.config, budget=count.bytes - 1)
    with pytest.raises(MemoryError, match="the cache holds"):
        tight.check(cache)
    assert manager.check(cache) == manager.count(cache)
