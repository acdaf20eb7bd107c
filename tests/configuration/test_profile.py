"""The profile: sections that check themselves, presets, JSON, versions, and the techniques that it names."""

import copy
import json
import pickle
from dataclasses import FrozenInstanceError, fields

import pytest
from helpers import one_line
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_vl.configuration.profile_presets import PRESETS
from qwen3_vl.configuration.profile_qwen3_vl import PROFILE_VERSION, SECTIONS, UnifiedConfig
from qwen3_vl.configuration.profile_sections import CACHE_KINDS, MemoryConfig, OptimizationConfig
from qwen3_vl.optim.registry_optim import TECHNIQUES, techniques_of


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_dictionaries_and_json(name, tmp_path):
    profile = UnifiedConfig.from_preset(name)
    assert profile.techniques()
    assert UnifiedConfig.from_dict(profile.to_dict()) == profile
    assert UnifiedConfig.from_dict(json.loads(profile.to_json())) == profile
    profile.to_json(tmp_path / "profile.json")
    assert UnifiedConfig.from_json(tmp_path / "profile.json") == UnifiedConfig.from_json(profile.to_json()) == profile
    assert copy.deepcopy(profile) == pickle.loads(pickle.dumps(profile)) == profile


@pytest.mark.parametrize("name", PRESETS)
def test_presets_name_techniques_that_exist(name):
    made = techniques_of(UnifiedConfig.from_preset(name).techniques())
    assert all(technique.exact for technique in made) == (name == "minimal")


def test_nothing_is_the_plain_model():
    assert UnifiedConfig().techniques() == {} == UnifiedConfig.parse(None).techniques()
    assert UnifiedConfig().to_dict() == {"version": PROFILE_VERSION}
    assert UnifiedConfig().to_model_config().optim is None


# Every field of every section, with what it puts on.
ACTS = [
    ("memory", "budget_bytes", 10**9, {"kv_caching": {"budget": 10**9, "lossy": False}}),
    ("memory", "kv_cache", "int4", {"quantized_cache": {"bits": 4}}),
    ("memory", "prefix_cache_bytes", 7, {"prefix_cache": {"max_bytes": 7}}),
    ("memory", "vision_feature_bytes", 7, {"vision_feature_cache": {"max_bytes": 7}}),
    ("memory", "vision_patches", 64, {"chunked_vision": {"max_patches": 64}}),
    ("cpu", "threads", 3, {"power_management": {"threads": 3}}),
    ("cpu", "decode_linear", True, {"decode_linear": {}}),
    ("cpu", "faster_rotary", True, {"faster_rotary": {}}),
    ("gpu", "kernels", True, {"hardware_kernels": {}}),
    ("gpu", "compile_decode", True, {"compiled_decode": {}}),
    ("power", "max_watts", 15.0, {"power_management": {"max_watts": 15.0}}),
    ("power", "cpu_share", 0.5, {"power_management": {"cpu_share": 0.5}}),
    ("power", "battery_cpu_share", 0.5, {"power_management": {"battery": {"cpu_share": 0.5}}}),
    ("optimization", "attention", "qwen3_vl_exact", {"qwen3_vl_exact": {}}),
    ("optimization", "weight_bits", 8, {"adaptive_precision": {"bits": 8}}),
    ("optimization", "visual_keep_ratio", 0.5, {"token_merging": {"keep_ratio": 0.5, "min_tokens": 64}}),
    ("optimization", "techniques", {"paged_cache": {"page_tokens": 16}}, {"paged_cache": {"page_tokens": 16}}),
]  # fmt: skip


@pytest.mark.parametrize(("section", "name", "value", "named"), ACTS)
def test_each_field_puts_a_technique_on(section, name, value, named):
    profile = UnifiedConfig(**{section: {name: value}})
    assert profile.techniques() == named
    assert UnifiedConfig().with_changes(**{section: {name: value}}) == profile


def test_every_field_is_among_those():
    # These belong to another field or to a layer of its own.
    others = {("memory", "lossy_cache"), ("optimization", "attention_settings"), ("optimization", "visual_min_tokens")}
    others |= {("optimization", "moe_num_experts"), ("optimization", "moe_top_k")}
    known = {(section, entry.name) for section, cls in SECTIONS.items() for entry in fields(cls)}
    assert known == {row[:2] for row in ACTS} | others


@pytest.mark.parametrize("kind", CACHE_KINDS)
def test_each_cache_exists(kind):
    made = techniques_of(UnifiedConfig(memory={"kv_cache": kind}).techniques())
    assert len(made) == (kind != "auto") and all(technique.role == "cache" for technique in made)


def test_techniques_given_by_name_beat_the_fields():
    profile = UnifiedConfig(
        memory={"kv_cache": "int4"},
        optimization={"techniques": {"quantized_cache": {"group_size": 32}, "chunked_vision": None}},
    )
    assert profile.techniques() == {"quantized_cache": {"bits": 4, "group_size": 32}, "chunked_vision": {}}


def test_the_short_form_stays():
    profile = UnifiedConfig.from_dict({"qwen3_vl_exact": {}, "paged_cache": {"page_tokens": 16}})
    assert profile.techniques() == {"qwen3_vl_exact": {}, "paged_cache": {"page_tokens": 16}}


def test_it_stands_for_a_model_configuration():
    profile = UnifiedConfig.from_preset("minimal")
    assert (profile.hidden_size, profile.vision_config.depth, profile.image_token_id) == (2048, 24, 151655)
    assert profile.optimization_config is profile.optimization and profile.power_management_config is profile.power
    config = profile.to_model_config()
    assert config.optim == profile.to_dict() and config.text_config.hidden_size == 2048
    assert UnifiedConfig().to_model_config().optim is None  # the shared default was not written to
    with pytest.raises(AttributeError, match="hiden_size"):
        profile.hiden_size  # noqa: B018


def test_frozen():
    with pytest.raises(FrozenInstanceError):
        UnifiedConfig().memory.kv_cache = "int4"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"memory": {"kv_cach": "int4"}}, "MemoryConfig has no 'kv_cach'; did you mean 'kv_cache'"),
        ({"version": 1, "memmory": {}}, "did you mean 'memory'"),
        ({"memory": {"budget_bytes": -1}}, "MemoryConfig.budget_bytes must be at least 1, got -1"),
        ({"memory": {"kv_cache": "int5"}}, "must be one of auto"),
        ({"cpu": {"threads": True}}, r"CPUConfig.threads must be int \| None, got True"),
        ({"cpu": {"threads": 0}}, "at least 1"),
        ({"power": {"cpu_share": float("nan")}}, "from 0.01 to 1.0, got nan"),
        ({"optimization": {"visual_keep_ratio": 0}}, "from 0.001 to 1.0, got 0"),
        ({"optimization": {"weight_bits": 5}}, "one of 8, 4, got 5"),
        ({"optimization": {"moe_top_k": 9}}, "moe_top_k=9 chooses more experts than moe_num_experts=8"),
        ({"optimization": {"attention_settings": {"threshold": 1}}}, "name one"),
        ({"version": PROFILE_VERSION + 1}, "update qwen3_vl"),
        ({"version": "new", "memory": {}}, "whole number"),
        ({"version": 1, "memory": 4}, "must be a dictionary, got int"),
    ],
)
def test_bad_values_are_named(values, words):
    with pytest.raises(ValueError, match=words) as error:
        UnifiedConfig.from_dict(values)
    assert one_line(error)


def test_bad_sources_are_named(tmp_path):
    (tmp_path / "broken.json").write_text('{"memory": ')
    with pytest.raises(ValueError, match="no JSON"):
        UnifiedConfig.from_json(tmp_path / "broken.json")
    with pytest.raises(ValueError, match="unknown preset 'balancd'; did you mean 'balanced'"):
        UnifiedConfig.parse("balancd")
    with pytest.raises(TypeError, match="got int"):
        UnifiedConfig.parse(3)
    with pytest.raises(ValueError, match="memory must be a MemoryConfig"):
        UnifiedConfig(memory=OptimizationConfig())


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "budget_bytes": st.none() | st.integers(1, 2**60),
            "kv_cache": st.sampled_from(CACHE_KINDS),
            "lossy_cache": st.booleans(),
            "prefix_cache_bytes": st.integers(0, 2**40),
            "vision_patches": st.none() | st.integers(1, 10**6),
        },
    )
)
def test_any_section_survives_json(values):
    section = MemoryConfig.from_dict(values)
    again = MemoryConfig.from_dict(json.loads(json.dumps(section.to_dict())))
    assert again == section and set(section.to_dict()) <= set(values)
    techniques_of(UnifiedConfig(memory=section).techniques())


def test_the_schema_in_the_docs_is_this_one():
    with open("docs/profile.schema.json", encoding="utf-8") as file:
        assert json.load(file) == json.loads(json.dumps(UnifiedConfig.schema()))


def test_names_of_techniques_are_their_keys():
    assert all(name == technique.name for name, technique in TECHNIQUES.items())
