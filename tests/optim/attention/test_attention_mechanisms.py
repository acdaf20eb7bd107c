"""The registry of mechanisms: names, short forms, what each serves."""

import pytest
from helpers import one_line
from transformers import AttentionInterface, AttentionMaskInterface

from qwen3_vl.optim.attention.attention_adaptive import AdaptiveAttention
from qwen3_vl.optim.attention.attention_exact import FlashAttention2
from qwen3_vl.optim.attention.attention_layout import layout_mask
from qwen3_vl.optim.attention.attention_mechanisms import ALIASES, PHASES, AttentionMechanisms, require_phase


NAMES = (
    "qwen3_vl_exact",
    "qwen3_vl_block_sparse",
    "qwen3_vl_dynamic_sparse",
    "qwen3_vl_memory_efficient",
    "qwen3_vl_adaptive",
)


def test_all_five_are_there():
    assert set(AttentionMechanisms.names()) == set(NAMES)
    assert {"flash", "sparse", "dynamic_sparse", "memory_efficient", "adaptive"} == set(ALIASES)


@pytest.mark.parametrize("name", NAMES)
def test_entry_is_what_transformers_selects(name):
    mechanism = AttentionMechanisms.get(name)
    assert mechanism.name == mechanism.technique.name == name
    assert AttentionInterface()[name] is mechanism.forward
    assert AttentionMaskInterface()[name] is layout_mask
    assert isinstance(mechanism.settings(), mechanism.technique.settings_class)
    assert set(mechanism.phases) <= set(PHASES) and "cpu" in mechanism.devices
    assert "\n" not in mechanism.description


@pytest.mark.parametrize(("alias", "name"), ALIASES.items())
def test_short_forms(alias, name):
    assert AttentionMechanisms.resolve(alias) == name
    assert AttentionMechanisms.get(alias).technique is AttentionMechanisms.get(name).technique


def test_names_of_the_api_reference_are_the_classes():
    assert AttentionMechanisms.get("flash").technique is FlashAttention2
    assert AttentionMechanisms.get("adaptive").technique is AdaptiveAttention


def test_exact_and_lossy():
    exact = {name for name in NAMES if AttentionMechanisms.get(name).exact}
    assert exact == {"qwen3_vl_exact", "qwen3_vl_memory_efficient"}


def test_choice_in_a_phase():
    exact = ("qwen3_vl_exact", "qwen3_vl_memory_efficient")
    assert AttentionMechanisms.serving("vision", exact_only=False) == exact
    assert AttentionMechanisms.serving("decode") == exact
    assert set(AttentionMechanisms.serving("prefill", "cuda", exact_only=False)) == set(NAMES[:-1])
    assert AttentionMechanisms.serving("prefill", "nothing") == ()


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("qwen3_vl_exakt", "qwen3_vl_exact"),
        ("flesh", "flash"),
        ("zzz", "known"),
        (None, "known"),
        (["flash"], "flash"),
    ],
)
def test_unknown_names(name, hint):
    with pytest.raises(ValueError, match=hint) as error:
        AttentionMechanisms.get(name)
    one_line(error.value)


def test_unknown_phase_and_setting():
    with pytest.raises(ValueError, match="did you mean 'decode'"):
        require_phase("decoding")
    with pytest.raises(ValueError, match=r"no setting 'windows'.*window_tokens") as error:
        AttentionMechanisms.get("sparse").settings(windows=3)
    one_line(error.value)


def test_description_has_a_line_each():
    lines = AttentionMechanisms.describe().splitlines()
    assert [line.split()[0] for line in lines] == list(AttentionMechanisms.names())
    assert "(sparse): lossy" in lines[1] and "(flash): exact" in lines[0] and "exact or lossy" in lines[-1]
