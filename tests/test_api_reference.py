"""The API reference: every import statement resolves, every usage block runs, and every name has a test of its effect.

The lists are this project's own copy of the reference. What belongs to issues that are not built yet is expected to
fail, by the issue's number, and fails here as soon as it exists and is still listed.
"""

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch

import qwen3_vl
from qwen3_vl import api_paths
from qwen3_vl.configuration.official_sizes import official_config
from qwen3_vl.inference import answering


TESTS = Path(__file__).resolve().parent
needs_tiny = pytest.mark.skipif(
    not (answering.SHIPPED_CHECKPOINT / "config.json").is_file(), reason="checkpoints/tiny is not there"
)

# Issue that builds a name which is not there yet.
LATER = {
    **dict.fromkeys(("Qwen3VLInference", "UnifiedInferencePipeline", "DataPipelineOptimization"), 8),
    **dict.fromkeys(("generate_text", "generate_multimodal"), 8),
    "AdaptiveBatchProcessing": 7,
    "DistributedPipelineParallelism": 7,
}

# Every import statement of the reference: the module as it is spelt there, and the names.
IMPORTS = {
    "src": ("qwen3_vl",),
    "src.qwen3_vl": ("Qwen3VLModel", "Qwen3VLConfig", "Qwen3VLAttention", "FlashAttention2"),
    "src.attention": (
        "Qwen3VLAttention",
        "FlashAttention2",
        "BlockSparseAttention",
        "DynamicSparseAttention",
        "Qwen3VLRotaryEmbedding",
        "apply_rotary_pos_emb",
        "repeat_kv",
    ),
    "src.components.attention": ("OptimizedQwen3VLAttention", "AttentionMechanisms", "DynamicSparseAttention"),
    "src.models": ("Qwen3VLModel", "Qwen3VLForConditionalGeneration", "Qwen3VLProcessor", "Qwen3VLPreTrainedModel"),
    "src.qwen3_vl.components.models": ("Qwen3VLModel",),
    "src.qwen3_vl.memory_management": (
        "KVCacheOptimizer",
        "GeneralMemoryManager",
        "VisionLanguageMemoryManager",
        "SparseMemoryManager",
        "MemoryPool",
        "MemoryEfficientAttention",
    ),
    "src.qwen3_vl.memory_management.kv_cache_optimizer": ("KVCacheOptimizer",),
    "src.qwen3_vl.memory_management.general_memory_manager": ("GeneralMemoryManager",),
    "src.qwen3_vl.memory_management.vision_language_memory_manager": ("VisionLanguageMemoryManager",),
    "src.qwen3_vl.config": (
        "Qwen3VLConfig",
        "UnifiedConfig",
        "MemoryConfig",
        "CPUConfig",
        "GPUConfig",
        "PowerManagementConfig",
        "OptimizationConfig",
        "UnifiedConfigManager",
        "get_default_config",
        "create_unified_config_manager",
    ),
    "src.qwen3_vl.config.unified_config": (
        "get_default_config",
        "create_unified_config_manager",
        "get_hardware_optimized_config",
    ),
    "src.qwen3_vl.inference": ("Qwen3VLInference", "UnifiedInferencePipeline", "DataPipelineOptimization"),
    "src.qwen3_vl.inference.generation": ("generate_text", "generate_multimodal"),
    "src.qwen3_vl.inference.cli": ("main",),
    "src.components.optimization": (
        "AdaptiveSparse",
        "AdaptivePrecision",
        "DistributedPipelineParallelism",
        "FasterRotaryEmbeddings",
        "MemoryEfficientGradientAccumulation",
        "AdaptiveSequencePacking",
        "CrossLayerParameterRecycling",
        "AdaptiveBatchProcessing",
        "HardwareSpecificKernels",
        "KVCachingOptimization",
        "LearnedActivationRouting",
        "HierarchicalMemoryCompression",
        "CrossModalTokenMerging",
    ),
    "src.qwen3_vl.optimization": (
        "UnifiedOptimizationOrchestrator",
        "UnifiedArchitecture",
        "UnifiedOptimizationManager",
        "OrderOptimizer",
        "MemoryOptimizationIntegrator",
        "KernelFusion",
        "FallbackManager",
        "AdaptiveAttention",
    ),
    "src.qwen3_vl.components.routing": ("MoeLayer",),
    "src.qwen3_vl.components.system.interfaces": ("ConfigurableComponent", "MemoryManager"),
}

ATTENTION, CACHE, MEMORY = "optim/attention/test_", "optim/cache/test_", "optim/memory/test_"
SECTIONS = ("MemoryConfig", "CPUConfig", "GPUConfig", "PowerManagementConfig", "OptimizationConfig")
PROFILES = "optim/test_profile_manager.py::test_"
MODELING, WEIGHTS = "modeling_qwen3_vl/test_", "optim/weights/test_"
# Where the effect of each name is observed.
EFFECTS = {
    "MemoryEfficientGradientAccumulation": (
        "optim/training/test_gradient_accumulation.py::test_loss_and_gradients_are_the_plain_ones"
    ),
    "qwen3_vl": "test_api_reference.py::test_the_package_is_the_same",
    "Qwen3VLModel": MODELING + "forward_parity.py::test_base_model",
    "Qwen3VLForConditionalGeneration": MODELING + "forward_parity.py::test_logits_and_hidden_states",
    "Qwen3VLPreTrainedModel": MODELING + "loading.py::test_official_names_and_shapes",
    "Qwen3VLConfig": "configuration/test_configuration_qwen3_vl.py::test_published_configs_equal_stock",
    "Qwen3VLProcessor": "processing/test_processing_qwen3_vl.py::test_calls_give_what_stock_gives",
    "Qwen3VLAttention": MODELING + "modeling_text.py::test_decoder_against_the_plain_definition",
    "Qwen3VLRotaryEmbedding": MODELING + "modeling_text.py::test_rotary_building_blocks",
    "apply_rotary_pos_emb": MODELING + "modeling_text.py::test_rotary_building_blocks",
    "repeat_kv": "test_api_reference.py::test_repeat_kv_copies_heads",
    "OptimizedQwen3VLAttention": MODELING + "modeling_optimized.py::test_equal_logits",
    "AttentionMechanisms": ATTENTION + "attention_mechanisms.py::test_entry_is_what_transformers_selects",
    "FlashAttention2": ATTENTION + "attention_exact.py::test_matches_float64",
    "BlockSparseAttention": ATTENTION + "attention_block_sparse.py::test_matches_the_reference",
    "DynamicSparseAttention": ATTENTION + "attention_dynamic_sparse.py::test_output_is_attention_over_what_was_chosen",
    "AdaptiveAttention": ATTENTION + "attention_adaptive.py::test_picks_by_layer_phase_and_length_in_a_model",
    "MemoryEfficientAttention": ATTENTION + "attention_memory_efficient.py::test_memory_does_not_grow_with_the_length",
    "AdaptiveSparse": ATTENTION + "sparse_calibration.py::test_budgets_keep_the_mass",
    "FasterRotaryEmbeddings": ATTENTION + "rotary_faster.py::test_values_come_from_the_table_and_cannot_change_it",
    "KVCacheOptimizer": MEMORY + "kv_cache_optimizer.py::test_a_request_applies_its_whole_plan",
    "KVCachingOptimization": MEMORY + "kv_cache_optimizer.py::test_less_budget_gives_fewer_bits",
    "GeneralMemoryManager": MEMORY + "memory_managers.py::test_never_over_budget_and_never_shared",
    "VisionLanguageMemoryManager": MEMORY + "memory_managers.py::test_requests_are_admitted_as_far_as_they_fit",
    "SparseMemoryManager": MEMORY + "memory_managers.py::test_evicting_caches_hold_fewer_than_they_have_seen",
    "MemoryPool": CACHE + "memory_pool.py::test_statistics_follow_the_pages",
    "HierarchicalMemoryCompression": CACHE + "cache_tiered.py::test_a_budget_in_bytes_holds",
    "UnifiedConfig": "configuration/test_profile.py::test_presets_survive_dictionaries_and_json",
    **dict.fromkeys(SECTIONS, "configuration/test_profile.py::test_each_field_puts_a_technique_on"),
    "UnifiedConfigManager": PROFILES + "less_memory_gives_less_precision_and_never_the_other_way",
    "get_default_config": PROFILES + "the_lines_of_the_reference",
    "create_unified_config_manager": PROFILES + "every_line_is_explained",
    "get_hardware_optimized_config": "test_api_reference.py::test_a_machine_by_the_function",
    "main": "inference/test_cli.py::test_help_and_version_are_quick",
    "AdaptivePrecision": WEIGHTS + "adaptive_precision.py::test_every_weight_is_what_its_codes_say",
    "CrossLayerParameterRecycling": WEIGHTS + "layer_recycling.py::test_layers_compute_their_expanded_weights",
    "HardwareSpecificKernels": WEIGHTS + "hardware_kernels.py::test_on_this_machine",
    "LearnedActivationRouting": WEIGHTS + "learned_routing.py::test_skipped_tokens_are_not_computed",
    "KernelFusion": WEIGHTS + "kernel_fusion.py::test_memory_is_not_doubled",
    "MoeLayer": WEIGHTS + "moe_layer.py::test_against_a_dense_loop",
    "AdaptiveSequencePacking": "optim/training/test_sequence_packing.py::test_equals_the_samples_alone",
    "CrossModalTokenMerging": "optim/tokens/test_token_reduction.py::test_survivors_are_what_stock_computes_over_them",
    "UnifiedOptimizationManager": "optim/test_orchestrator.py::test_apply_and_revert_leave_the_logits_as_they_were",
    "UnifiedOptimizationOrchestrator": "optim/test_orchestrator.py::test_a_context_manager_and_a_dry_run",
    "UnifiedArchitecture": PROFILES + "a_model_and_its_profile_as_one",
    "OrderOptimizer": "optim/test_orchestrator.py::test_order_respects_every_need",
    "FallbackManager": "optim/test_orchestrator.py::test_what_cannot_run_is_replaced_with_one_warning",
    "MemoryOptimizationIntegrator": PROFILES + "memory_is_integrated_into_a_profile",
    "ConfigurableComponent": "optim/test_components.py::test_a_technique_is_configured_anew",
    "MemoryManager": "optim/test_components.py::test_a_technique_of_one_s_own_runs_in_a_profile",
}


def expected(name):
    """Marks what another issue builds."""
    issue = LATER.get(name)
    return [pytest.mark.xfail(strict=True, reason=f"issue {issue}", raises=(ImportError, AttributeError))] * bool(
        issue
    )


ROWS = [pytest.param(path, name, marks=expected(name)) for path, names in IMPORTS.items() for name in names]


@pytest.fixture
def legacy():
    """The reference's own spelling, and none of it afterwards."""
    qwen3_vl.enable_legacy_imports()
    yield
    api_paths._FINDER.legacy = False
    for name in [name for name in sys.modules if name.partition(".")[0] == "src"]:
        del sys.modules[name]


@pytest.mark.parametrize(("path", "name"), ROWS)
def test_every_import_gives_the_real_object(legacy, path, name):
    names = {}
    exec(f"from {path} import {name}", names)
    found = names[name]
    if name not in ("qwen3_vl", "main"):
        assert found is getattr(qwen3_vl, name)
    own = path.removeprefix("src.").removeprefix("qwen3_vl.")
    if own in api_paths.API_PATHS:  # and without `src`
        assert getattr(importlib.import_module(f"qwen3_vl.{own}"), name) is found


@pytest.mark.parametrize("name", sorted(EFFECTS))
def test_every_effect_has_a_test(name):
    path, _, test = EFFECTS[name].partition("::")
    assert re.search(rf"^def {test}\(", (TESTS / path).read_text(encoding="utf-8"), re.MULTILINE), EFFECTS[name]


def test_every_name_is_in_one_of_the_lists():
    named = {name for names in IMPORTS.values() for name in names}
    assert named == set(EFFECTS) | set(LATER) and not set(EFFECTS) & set(LATER)


def test_the_package_is_the_same(legacy):
    from src import qwen3_vl as package

    assert package is qwen3_vl and package.__version__


def test_repeat_kv_copies_heads():
    states = torch.arange(2 * 3 * 4 * 5).view(2, 3, 4, 5)
    copied = qwen3_vl.repeat_kv(states, 2)
    assert copied.shape == (2, 6, 4, 5) and qwen3_vl.repeat_kv(states, 1) is states
    assert all(torch.equal(copied[:, head], states[:, head // 2]) for head in range(6))


def test_a_machine_by_the_function():
    specs = {"cpu_cores": 3, "memory_gb": 4, "gpu_memory": 0}
    small = qwen3_vl.get_hardware_optimized_config(specs)
    large = qwen3_vl.get_hardware_optimized_config(specs, model=official_config("Qwen/Qwen3-VL-4B-Instruct"))
    assert small.cpu.threads == large.cpu.threads == 3
    assert large.optimization.weight_bits == 4 < small.optimization.weight_bits


# The usage blocks, in the reference's own words but for what they leave open: `config` and `model`.
A_MODEL = """
from src.qwen3_vl.components.models import Qwen3VLModel
model = Qwen3VLModel(config=qwen3_vl_config)
"""
AN_ENGINE = """
from src.qwen3_vl.inference import Qwen3VLInference
inference_engine = Qwen3VLInference(model=model)
response = inference_engine.generate_response(text="Describe this image", max_new_tokens=5)
"""
CONFIGURATION = """
from src.qwen3_vl.config import UnifiedConfig, get_default_config, create_unified_config_manager
config = get_default_config()
manager = create_unified_config_manager()
minimal_config = manager.get_config("minimal")
balanced_config = manager.get_config("balanced")
aggressive_config = manager.get_config("aggressive")
hardware_specs = {"gpu_memory": 6 * 1024 * 1024 * 1024, "cpu_cores": 4, "memory_gb": 8}
hw_config = manager.get_hardware_optimized_config(hardware_specs)
"""
MANAGERS = """
from src.qwen3_vl.memory_management import GeneralMemoryManager, KVCacheOptimizer, VisionLanguageMemoryManager
memory_manager = GeneralMemoryManager(config=config)
kv_cache_optimizer = KVCacheOptimizer(config=config)
vl_memory_manager = VisionLanguageMemoryManager(config=config)
"""
EXPERTS = """
from src.qwen3_vl.components.routing import MoeLayer
moe_layer = MoeLayer(
    hidden_size=config.hidden_size,
    num_experts=config.optimization_config.moe_num_experts,
    top_k=config.optimization_config.moe_top_k
)
"""
ADAPTIVE = """
from src.qwen3_vl.optimization import AdaptiveAttention
adaptive_attention = AdaptiveAttention(config=config, attention_type=attention_type)
"""
COMPONENT = """
from src.qwen3_vl.components.system.interfaces import ConfigurableComponent
class MyComponent(ConfigurableComponent):
    def __init__(self, config):
        super().__init__(config)

    def configure(self, config):
        # Apply configuration
        pass
"""
MANAGER = """
from src.qwen3_vl.components.system.interfaces import MemoryManager
class MyMemoryManager(MemoryManager):
    def allocate(self, size):
        # Custom allocation logic
        pass

    def deallocate(self, ptr):
        # Custom deallocation logic
        pass
"""
A_CONFIGURED_MODEL = """
from src.qwen3_vl.config import get_default_config, create_unified_config_manager
from src.qwen3_vl.components.models import Qwen3VLModel
config = get_default_config()
config_manager = create_unified_config_manager()
optimized_config = config_manager.get_config("balanced")
model = Qwen3VLModel(config=optimized_config)
"""
ITS_ENGINE = """
from src.qwen3_vl.inference import Qwen3VLInference
inference_engine = Qwen3VLInference(model)
"""
MEMORY_OF_A_MODEL = """
from src.qwen3_vl.memory_management import GeneralMemoryManager, KVCacheOptimizer
memory_manager = GeneralMemoryManager(config=config)
kv_optimizer = KVCacheOptimizer(config=config)
optimized_model = kv_optimizer.apply_optimizations(model)
"""


def run(block, **names):
    exec(compile(block, "api-reference.md", "exec"), names)
    return names


@pytest.fixture
def config():
    return qwen3_vl.get_default_config()


@pytest.fixture
def tiny():
    return qwen3_vl.Qwen3VLForConditionalGeneration.from_pretrained(answering.SHIPPED_CHECKPOINT).eval()


@needs_tiny
def test_a_model_is_made(legacy):
    config = qwen3_vl.Qwen3VLConfig.from_pretrained(answering.SHIPPED_CHECKPOINT)
    model = run(A_MODEL, qwen3_vl_config=config)["model"].eval()
    assert type(model) is qwen3_vl.Qwen3VLModel
    assert model(input_ids=torch.arange(5)[None]).last_hidden_state.shape == (1, 5, config.text_config.hidden_size)


def test_the_configuration_system(legacy):
    names = run(CONFIGURATION)
    assert names["config"].techniques() == {} and all(map(names.get, ("minimal_config", "hw_config")))
    counts = [len(names[f"{preset}_config"].techniques()) for preset in ("minimal", "balanced", "aggressive")]
    assert counts == sorted(counts) and counts[0] > 0
    assert names["hw_config"].techniques()["hardware_kernels"] == {}


def test_memory_managers(legacy, config):
    names = run(MANAGERS, config=config)
    for name in ("memory_manager", "vl_memory_manager"):
        buffer = names[name].allocate(100)
        assert names[name].held >= 100
        names[name].deallocate(buffer)
        assert names[name].held == 0
    plan = names["memory_manager"].plan(qwen3_vl.MemoryRequest(text_tokens=100), model=official_config(OFFICIAL))
    assert plan.weights_total > 4e9


OFFICIAL = "Qwen/Qwen3-VL-2B-Instruct"


def test_an_expert_layer(legacy, config):
    layer = run(EXPERTS, config=config)["moe_layer"]
    assert layer(torch.randn(1, 2, config.hidden_size)).shape == (1, 2, config.hidden_size)


@needs_tiny
@pytest.mark.parametrize("attention_type", ["flash", "sparse", "dynamic_sparse"])
def test_adaptive_attention(legacy, config, tiny, attention_type):
    technique = run(ADAPTIVE, config=config, attention_type=attention_type)["adaptive_attention"]
    ids = torch.arange(5, 25)[None]
    before = tiny(input_ids=ids).logits
    technique.apply(tiny)
    assert tiny.config.text_config._attn_implementation == "qwen3_vl_adaptive"
    # Of twenty tokens nothing is left out.
    assert torch.allclose(tiny(input_ids=ids).logits, before, atol=0.1)
    technique.revert(tiny)
    assert torch.equal(tiny(input_ids=ids).logits, before)


def test_components_of_one_s_own(legacy):
    component = run(COMPONENT)["MyComponent"]({"depth": 3})
    assert component.config == {"depth": 3} and component.configure({}) is None
    assert isinstance(component, qwen3_vl.ConfigurableComponent)
    manager = run(MANAGER)["MyMemoryManager"]()
    assert isinstance(manager, qwen3_vl.ConfigurableComponent) and manager.allocate(3) is None
    with pytest.raises(TypeError, match="abstract"):
        type("Half", (qwen3_vl.MemoryManager,), {"allocate": lambda self, size: None})()


def test_a_model_is_configured(legacy):
    with torch.device("meta"):  # the published 2B sizes
        model = run(A_CONFIGURED_MODEL)["model"]
    assert model.config.optim == qwen3_vl.UnifiedConfig.from_preset("balanced").to_dict()
    assert sum(parameter.numel() for parameter in model.parameters()) > 2e9


@needs_tiny
def test_memory_of_a_model(legacy, config, tiny):
    ids = torch.arange(5, 25)[None]
    expected = tiny.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
    names = run(MEMORY_OF_A_MODEL, config=config, model=tiny)
    assert names["optimized_model"] is tiny
    assert [technique.name for technique in tiny.active_techniques] == ["kv_caching"]
    assert torch.equal(tiny.generate(input_ids=ids, max_new_tokens=3, do_sample=False), expected)


@needs_tiny
@pytest.mark.xfail(strict=True, reason="issue 8", raises=ImportError)
@pytest.mark.parametrize("block", [AN_ENGINE, ITS_ENGINE])
def test_an_inference_engine(legacy, tiny, block):
    assert run(block, model=tiny)["inference_engine"] is not None
