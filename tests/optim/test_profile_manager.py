"""Profiles by machine: the best that fits, explained, and the API reference's own lines."""

import pytest
import torch
from helpers import one_line

import qwen3_vl
from qwen3_vl import MemoryOptimizationIntegrator, MemoryRequest, UnifiedArchitecture, UnifiedConfig
from qwen3_vl.configuration.hardware_detection import Hardware, detect_hardware
from qwen3_vl.optim.profile_manager import QUALITIES, create_unified_config_manager, get_default_config


GIB = 2**30
TEXT = MemoryRequest(text_tokens=4096)


def machine(memory_gb, **others):
    return {"cpu_cores": 4, "memory_gb": memory_gb, "gpu_memory": 0, **others}


def test_less_memory_gives_less_precision_and_never_the_other_way():
    manager = create_unified_config_manager(request=TEXT)
    chosen = []
    for memory in (64, 8, 4, 3, 2.5):
        try:
            profile = manager.get_hardware_optimized_config(machine(memory))
        except MemoryError:
            break
        cache = profile.memory.kv_cache
        bits = None if cache == "auto" else int(cache.removeprefix("int"))
        chosen.append(QUALITIES.index((profile.optimization.weight_bits, bits)))
    assert chosen == sorted(chosen) and chosen[0] == 0 and chosen[-1] > 0


def test_every_line_is_explained():
    manager = create_unified_config_manager(request=TEXT)
    profile = manager.get_hardware_optimized_config(machine(64))
    text = "\n".join(manager.explanation)
    assert "fits: chosen" in text and all(f"on: {name}" in text for name in profile.techniques())
    assert profile.cpu.threads == 4 and profile.cpu.decode_linear


def test_on_a_gpu_its_memory_counts_and_its_kernels_are_picked():
    manager = create_unified_config_manager(request=TEXT)
    profile = manager.get_hardware_optimized_config({"gpu_memory": 80 * GIB, "cpu_cores": 2, "memory_gb": 1})
    assert profile.gpu.kernels and not profile.cpu.decode_linear and profile.cpu.threads is None


def test_nothing_fits():
    with pytest.raises(MemoryError, match=r"nothing fits into .* int4 weights, int2 KV cache needs") as error:
        create_unified_config_manager(request=TEXT).get_hardware_optimized_config(machine(0.5))
    assert one_line(error)


@pytest.mark.parametrize(
    ("specs", "words"), [({"gpu_memry": 1}, "gpu_memory"), ({"memory_gb": -1}, "memory_gb"), ({"cpu_cores": 0}, "cpu")]
)
def test_bad_specifications(specs, words):
    with pytest.raises(ValueError, match=words):
        create_unified_config_manager().get_hardware_optimized_config(specs)


def test_this_machine():
    profile = create_unified_config_manager("checkpoints/tiny").get_hardware_optimized_config()
    assert (profile.optimization.weight_bits is None) == (not detect_hardware().on_battery)
    assert profile.hidden_size < 1000


def test_a_battery_saves():
    hardware = Hardware.from_specs(machine(64))
    on_battery = Hardware(**{**vars(hardware), "on_battery": True})
    manager = create_unified_config_manager(request=TEXT)
    assert manager.get_hardware_optimized_config(hardware).optimization.weight_bits is None
    profile = manager.get_hardware_optimized_config(on_battery)
    assert profile.techniques()["power_management"]["battery"] == {"cpu_share": 0.5}
    assert profile.optimization.weight_bits == 8 and any("on battery: packed" in line for line in manager.explanation)


def test_a_machine_that_does_not_tell_its_memory():
    hardware = Hardware(cpu_cores=2)
    with pytest.raises(ValueError, match="give memory_gb") as error:
        create_unified_config_manager().get_hardware_optimized_config(hardware)
    assert one_line(error.value)


def test_the_lines_of_the_reference():
    config, manager = get_default_config(), create_unified_config_manager()
    optimized = manager.get_config("balanced")
    assert config.techniques() == {} and optimized == UnifiedConfig.from_preset("balanced")
    with torch.device("meta"):
        model = qwen3_vl.Qwen3VLModel(config=optimized)
    assert model.config.optim == optimized.to_dict() and model.config.text_config.hidden_size == optimized.hidden_size
    layer = qwen3_vl.MoeLayer(
        hidden_size=64,
        num_experts=config.optimization_config.moe_num_experts,
        top_k=config.optimization_config.moe_top_k,
    )
    assert layer(torch.randn(1, 3, 64)).shape == (1, 3, 64)
    hardware = manager.get_hardware_optimized_config({"gpu_memory": 6 * GIB, "cpu_cores": 4, "memory_gb": 8})
    assert hardware.gpu.kernels


def test_memory_is_integrated_into_a_profile():
    request = MemoryRequest([(1024, 1024)] * 4, text_tokens=256)
    model = create_unified_config_manager().model_config
    free = MemoryOptimizationIntegrator(model, request)
    assert free.integrate("minimal").memory.kv_cache == "paged" and not free.generate_options.get("prefill_chunk_size")
    tight = MemoryOptimizationIntegrator(model, request, budget=int(free.plan.peak * 0.93))
    profile = tight.integrate("minimal")
    assert tight.plan.peak <= free.plan.peak * 0.93
    assert profile.memory.vision_patches is not None or profile.memory.kv_cache != "paged"
    assert profile.cpu == UnifiedConfig.from_preset("minimal").cpu


def test_a_model_and_its_profile_as_one(tmp_path):
    both = UnifiedArchitecture.from_pretrained("checkpoints/tiny", "minimal")
    ids = torch.arange(5, 12)[None]
    first = both.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
    both.save_pretrained(tmp_path)
    again = UnifiedArchitecture.from_pretrained(str(tmp_path))
    assert again.describe() == both.describe() and again.config.optim == "minimal"
    assert torch.equal(again.generate(input_ids=ids, max_new_tokens=3, do_sample=False), first)
    assert both.apply({"paged_cache": {}}).describe().startswith("paged_cache: exact")
    assert both.revert().describe() == "paged_cache: not applied yet" and not hasattr(both.model, "active_techniques")
    both.apply("minimal")
    for bad in ({"paged_cach": {}}, {"grouped_experts": {}}):
        with pytest.raises(ValueError):
            both.apply(bad)
        assert next(technique.name for technique in both.techniques) == "qwen3_vl_exact"
        assert torch.equal(both.generate(input_ids=ids, max_new_tokens=3, do_sample=False), first)
