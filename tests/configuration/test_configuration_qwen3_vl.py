"""The published configs, their older spellings, and what must survive load -> save -> load."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from helpers import assert_close, make_inputs, our_class, stock_class, tiny_config_dict


SIZES = ["2B", "4B", "8B", "32B", "30B-A3B", "235B-A22B"]


def kind_of(config_dict):
    return "moe" if config_dict["model_type"].endswith("moe") else "dense"


def load_json(path):
    return json.loads(path.read_text())


def comparable(config):
    """All fields as plain values, without those that name the library or the folder, and an unset profile."""
    fields = config.to_dict()
    for name in ("transformers_version", "_name_or_path"):
        fields.pop(name, None)
    if fields.get("optim") is None:
        fields.pop("optim", None)
    return fields


def holds(config, given, where=""):
    """Every published field is found in the config, by its own name or by the one it is translated into."""
    for name, value in given.items():
        path = f"{where}{name}"
        if name == "transformers_version" or path == "vision_config.model_type":
            continue
        if isinstance(value, dict) and name.endswith("_config"):
            holds(getattr(config, name), value, f"{name}.")
        elif name == "rope_scaling":
            assert {key: config.rope_parameters[key] for key in value} == value, path
        elif name == "rope_theta":
            assert config.rope_parameters["rope_theta"] == value, path
        elif name == "dtype":
            assert config.dtype == getattr(torch, value), path
        else:
            found = getattr(config, name)
            assert (list(found) if isinstance(found, tuple) else found) == value, path


def test_all_six_sizes_are_here(config_fixtures):
    assert sorted(config_fixtures) == sorted(SIZES)


@pytest.mark.parametrize("size", SIZES)
def test_published_fields_survive(config_fixtures, size, tmp_path):
    published = load_json(config_fixtures[size])
    config_class = our_class(kind_of(published), "Config")
    first = config_class.from_pretrained(config_fixtures[size])
    holds(first, published)
    first.save_pretrained(tmp_path)
    second = config_class.from_pretrained(tmp_path)
    holds(second, published)
    assert comparable(second) == comparable(first)


@pytest.mark.parametrize("size", SIZES)
def test_published_configs_equal_stock(config_fixtures, size, tmp_path):
    kind = kind_of(load_json(config_fixtures[size]))
    ours = our_class(kind, "Config").from_pretrained(config_fixtures[size])
    stock = stock_class(kind, "Config").from_pretrained(config_fixtures[size])
    assert comparable(ours) == comparable(stock)
    ours.save_pretrained(tmp_path / "ours")
    stock.save_pretrained(tmp_path / "stock")
    assert load_json(tmp_path / "ours" / "config.json") == load_json(tmp_path / "stock" / "config.json")


@pytest.mark.parametrize("size", SIZES)
def test_stock_reads_what_ours_writes(config_fixtures, size, tmp_path):
    published = load_json(config_fixtures[size])
    kind = kind_of(published)
    our_class(kind, "Config").from_pretrained(config_fixtures[size]).save_pretrained(tmp_path)
    holds(stock_class(kind, "Config").from_pretrained(tmp_path), published)


@pytest.mark.parametrize("name", ["Config", "TextConfig", "VisionConfig"])
def test_defaults_equal_stock(kind, name):
    ours, stock = our_class(kind, name)(), stock_class(kind, name)()
    assert comparable(ours) == comparable(stock)
    assert ours.model_type == stock.model_type
    for attribute in ("base_config_key", "attribute_map"):
        assert getattr(ours, attribute, None) == getattr(stock, attribute, None), attribute
    assert set(getattr(stock, "keys_to_ignore_at_inference", ())) <= set(
        getattr(ours, "keys_to_ignore_at_inference", ())
    )


def spellings(kind):
    suffix = "" if kind == "dense" else "_moe"
    section = {"mrope_section": [4, 2, 2], "mrope_interleaved": True}

    def text(*, drop=(), **more):
        config = tiny_config_dict(kind)
        for name in drop:
            del config["text_config"][name]
        config["text_config"].update(more)
        return config

    def vision(**more):
        config = tiny_config_dict(kind)
        config["vision_config"].update(more)
        return config

    rope = ("rope_scaling", "rope_theta")
    return {
        "vision_type_of_the_whole": vision(model_type=f"qwen3_vl{suffix}"),
        "vision_type_of_its_own": vision(model_type=f"qwen3_vl{suffix}_vision"),
        "rope_parameters": text(drop=rope, rope_parameters={"rope_type": "default", "rope_theta": 12345.0, **section}),
        "rope_type_as_type": text(rope_scaling={"type": "default", **section}),
        "rope_theta_alone": text(drop=("rope_scaling",), rope_theta=777.0),
        "no_rope_at_all": text(drop=rope),
        "yarn": text(
            rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, **section}
        ),
        "torch_dtype": {**tiny_config_dict(kind), "torch_dtype": "bfloat16"},
        "dtype": {**tiny_config_dict(kind), "dtype": "float16"},
        "dtype_of_the_text": text(dtype="bfloat16"),
        "key_value_heads_missing": text(num_key_value_heads=None),
        "head_dim_missing": text(
            drop=("head_dim",), rope_scaling={"mrope_section": [2, 2, 2], "rope_type": "default"}
        ),
        "unknown_fields": {**vision(window=7), "comment": "kept", "auto_map": {"AutoConfig": "a.B"}},
        "tied": {**text(tie_word_embeddings=True), "tie_word_embeddings": True},
        "parts_missing": {
            name: value for name, value in tiny_config_dict(kind).items() if not name.endswith("_config")
        },
        "several_end_tokens": text(eos_token_id=[1, 3]),
    }


@pytest.mark.parametrize("spelling", spellings("dense"))
def test_spellings_equal_stock(kind, spelling, tmp_path):
    if spelling == "key_value_heads_missing" and kind == "moe":
        pytest.skip("stock's MoE config wants a number here")
    given = spellings(kind)[spelling]
    ours = our_class(kind, "Config").from_dict(copy.deepcopy(given))
    stock = stock_class(kind, "Config").from_dict(copy.deepcopy(given))
    assert comparable(ours) == comparable(stock)
    assert comparable(ours.text_config) == comparable(stock.text_config)
    assert comparable(ours.vision_config) == comparable(stock.vision_config)
    ours.save_pretrained(tmp_path)
    again = our_class(kind, "Config").from_pretrained(tmp_path)
    assert comparable(again) == comparable(ours)


def test_parts_may_be_configs(kind):
    parts = tiny_config_dict(kind)
    text = our_class(kind, "TextConfig")(**parts["text_config"])
    vision = our_class(kind, "VisionConfig")(**{**parts["vision_config"], "model_type": "ignored"})
    config = our_class(kind, "Config")(text_config=text, vision_config=vision)
    assert config.text_config is text
    assert config.vision_config is vision
    assert config.get_text_config() is text


def test_unknown_fields_are_kept(kind, tmp_path):
    given = {**tiny_config_dict(kind), "comment": {"by": "me"}}
    given["text_config"]["extra"], given["vision_config"]["extra"] = [1, 2], "three"
    our_class(kind, "Config").from_dict(given).save_pretrained(tmp_path)
    again = our_class(kind, "Config").from_pretrained(tmp_path)
    assert (again.comment, again.text_config.extra, again.vision_config.extra) == ({"by": "me"}, [1, 2], "three")


@pytest.mark.parametrize("optim", ["balanced", {"profile": "balanced", "cache": {"name": "paged", "page": 16}}, None])
def test_optim_is_kept_as_given(kind, optim, tmp_path):
    given = {**tiny_config_dict(kind), **({} if optim is None else {"optim": copy.deepcopy(optim)})}
    config = our_class(kind, "Config").from_dict(given)
    assert getattr(config, "optim", None) == optim
    config.save_pretrained(tmp_path)
    written = load_json(tmp_path / "config.json")
    assert written.get("optim") == optim
    assert getattr(our_class(kind, "Config").from_pretrained(tmp_path), "optim", None) == optim
    if optim is None:
        assert "optim" not in written, "a config without a profile must look like stock's"


@pytest.mark.parametrize("optim", ["balanced", {"profile": "balanced"}])
@torch.no_grad()
def test_stock_ignores_optim(kind, optim):
    plain, rich = tiny_config_dict(kind), {**tiny_config_dict(kind), "optim": optim}
    models = []
    for given in (plain, rich):
        torch.manual_seed(0)
        config = stock_class(kind, "Config").from_dict(copy.deepcopy(given))
        models.append(stock_class(kind, "ForConditionalGeneration")(config).eval())
    inputs = make_inputs(["text:3", "image:4x6"])
    assert_close(models[1](**inputs).logits, models[0](**inputs).logits, 0.0)


def test_strings_and_copies(kind):
    config = our_class(kind, "Config").from_dict(tiny_config_dict(kind))
    assert json.loads(config.to_json_string(use_diff=False))["text_config"]["hidden_size"] == 48
    clone = copy.deepcopy(config)
    clone.text_config.hidden_size = 96
    assert config.text_config.hidden_size == 48
    assert comparable(our_class(kind, "Config").from_dict(config.to_dict())) == comparable(config)
    assert config.model_type in repr(config)


@pytest.mark.parametrize(
    "part, field, value",
    [("text_config", "hidden_size", "many"), ("vision_config", "depth", 2.5), ("text_config", "use_cache", "maybe")],
)
def test_wrong_types_are_refused_as_in_stock(kind, part, field, value):
    given = tiny_config_dict(kind)
    given[part][field] = value
    with pytest.raises(Exception) as stock_error:
        stock_class(kind, "Config").from_dict(copy.deepcopy(given))
    with pytest.raises(type(stock_error.value)) as our_error:
        our_class(kind, "Config").from_dict(copy.deepcopy(given))
    assert field in str(our_error.value)


def test_configs_do_not_need_torch():
    script = (
        "import sys, qwen3_vl\n"
        "config = qwen3_vl.Qwen3VLConfig(), qwen3_vl.Qwen3VLMoeConfig()\n"
        "assert 'qwen3_vl.modeling_qwen3_vl.modeling_qwen3_vl' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
