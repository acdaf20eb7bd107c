"""Names and shapes of the official sizes, and folders written by stock and by ours."""

import copy
import json
from pathlib import Path

import pytest
import torch
from helpers import (
    assert_close,
    forget,
    make_inputs,
    make_pair,
    our_class,
    stock_class,
    stock_forward,
    tiny_config_dict,
    valid_positions,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file


SIZES = ["2B", "4B", "8B", "32B", "30B-A3B", "235B-A22B"]
MODEL = "ForConditionalGeneration"


def inputs_of_all_forms():
    return make_inputs(["text:2", "image:4x6", "text:4"], ["text:6"], ["text:1", "video:2x4x4", "text:9"])


def read_weights(folder):
    """All tensors of a folder, by name, whatever the shards."""
    tensors = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        part = load_file(file)
        assert not tensors.keys() & part.keys()
        tensors.update(part)
    return tensors


def assert_same_tensors(first, second):
    assert sorted(first) == sorted(second)
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor, second[name]), name


@torch.no_grad()
def assert_same_logits(stock, ours, tolerance=1e-5):
    inputs = inputs_of_all_forms()
    keep = valid_positions(inputs)
    expected = stock_forward(stock, **inputs).logits[keep]
    assert_close(ours(**inputs).logits[keep], expected, tolerance, "logits")


@pytest.mark.parametrize("size", SIZES)
def test_official_names_and_shapes(config_fixtures, size):
    """On the meta device: parameters, buffers that are saved, tied names and parts that must not be split."""
    kind = "moe" if "-A" in size else "dense"
    models = {}
    for side, get_class in (("stock", stock_class), ("ours", our_class)):
        config = get_class(kind, "Config").from_pretrained(config_fixtures[size])
        with torch.device("meta"):
            models[side] = get_class(kind, MODEL)(config)
    shapes = {
        side: {name: (tuple(value.shape), value.dtype) for name, value in model.state_dict().items()}
        for side, model in models.items()
    }
    assert shapes["ours"] == shapes["stock"]
    counted = {side: model.num_parameters() for side, model in models.items()}
    assert counted["ours"] == counted["stock"] > 2e9
    assert models["ours"]._tied_weights_keys == models["stock"]._tied_weights_keys
    tied = {side: model.lm_head.weight is model.get_input_embeddings().weight for side, model in models.items()}
    assert tied["ours"] == tied["stock"] == (size in ("2B", "4B"))


def published_folder(stock, folder, shards=True):
    """A folder as the Hub holds it: shards with an index, a config in the published spelling."""
    stock.save_pretrained(folder, max_shard_size="60KB" if shards else "5GB")
    return folder


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"device_map": "auto"},
        {"device_map": "cpu", "low_cpu_mem_usage": True},
        {"dtype": "auto", "device_map": "auto", "low_cpu_mem_usage": True},
        {"dtype": torch.float64},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_ours_loads_what_stock_writes(pair, options, tmp_path):
    published_folder(pair.stock, tmp_path)
    assert (tmp_path / "model.safetensors.index.json").exists()
    loaded, info = our_class(pair.kind, MODEL).from_pretrained(tmp_path, output_loading_info=True, **options)
    for name in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        assert not info.get(name), f"{name}: {info[name]}"
    assert not loaded.training
    expected = pair.stock.to(options["dtype"]) if isinstance(options.get("dtype"), torch.dtype) else pair.stock
    state = loaded.state_dict()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(state[name], tensor), name
    if "dtype" not in options or options["dtype"] == "auto":
        assert_same_logits(pair.stock, loaded)


def test_stock_loads_what_ours_writes(pair, tmp_path):
    pair.ours.save_pretrained(tmp_path, max_shard_size="60KB")
    loaded, info = stock_class(pair.kind, MODEL).from_pretrained(tmp_path, output_loading_info=True)
    for name in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[name], f"{name}: {info[name]}"
    assert_same_logits(loaded, pair.ours)
    assert_same_logits(pair.stock, our_class(pair.kind, MODEL).from_pretrained(tmp_path))


@pytest.mark.parametrize("shard_size", ["60KB", "5GB"])
def test_files_equal_stock_s(pair, shard_size, tmp_path):
    """The same file names, tensors and metadata, the same index, generation config and config."""
    folders = {"stock": tmp_path / "stock", "ours": tmp_path / "ours"}
    pair.stock.save_pretrained(folders["stock"], max_shard_size=shard_size)
    pair.ours.save_pretrained(folders["ours"], max_shard_size=shard_size)
    names = {side: sorted(path.name for path in folder.iterdir()) for side, folder in folders.items()}
    assert names["ours"] == names["stock"]
    for name in names["stock"]:
        stock, ours = folders["stock"] / name, folders["ours"] / name
        if name.endswith(".json"):
            assert json.loads(ours.read_text()) == json.loads(stock.read_text()), name
        else:
            assert_same_tensors(load_file(ours), load_file(stock))
            with safe_open(ours, "pt") as first, safe_open(stock, "pt") as second:
                assert first.metadata() == second.metadata()


def test_files_equal_stock_s_after_loading(pair, tmp_path):
    pair.stock.save_pretrained(tmp_path / "first")
    loaded = our_class(pair.kind, MODEL).from_pretrained(tmp_path / "first")
    loaded.save_pretrained(tmp_path / "second")
    assert_same_tensors(read_weights(tmp_path / "second"), read_weights(tmp_path / "first"))


def published_experts(folder):
    """Rewrites a folder's experts as published: (experts, hidden, 2 * inner) and (experts, inner, hidden)."""
    weights = read_weights(folder)
    for name in list(weights):
        if "experts" in name:
            rows = 80 if "gate_up" in name else 48
            tensor = weights[name]
            weights[name] = tensor if tensor.shape[2] == rows else tensor.transpose(1, 2).contiguous()
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return weights


@pytest.mark.parametrize("name", [MODEL, "Model"])
def test_published_layout_of_experts(name, tmp_path):
    """Unequal numbers of experts, widths and inner widths; in memory both tensors are transposed.

    Stock 5.23 reads either layout, by its shape, and writes the one of the memory; so does ours.
    """
    pair = make_pair("moe", name=name)
    published, again = tmp_path / "published", tmp_path / "again"
    pair.stock.save_pretrained(published)
    weights = published_experts(published)
    prefix = "model.language_model" if name == MODEL else "language_model"
    experts = f"{prefix}.layers.0.mlp.experts"
    assert tuple(weights[f"{experts}.gate_up_proj"].shape) == (5, 48, 80)
    assert tuple(weights[f"{experts}.down_proj"].shape) == (5, 40, 48)
    for options in ({}, {"device_map": "auto"}):
        loaded = our_class("moe", name).from_pretrained(published, **options)
        assert_same_tensors(loaded.state_dict(), pair.stock.state_dict())
    stock = stock_class("moe", name).from_pretrained(published)
    stock.save_pretrained(again / "stock")
    loaded.save_pretrained(again / "ours")
    assert_same_tensors(read_weights(again / "ours"), read_weights(again / "stock"))
    for get_class in (stock_class, our_class):
        twice = get_class("moe", name).from_pretrained(again / "ours")
        assert_same_tensors(twice.state_dict(), pair.stock.state_dict())


def test_published_config_beside_the_weights(pair, tmp_path):
    """The spelling of 4.57 (`rope_scaling`, vision `model_type` of the whole) instead of what stock writes today."""
    published_folder(pair.stock, tmp_path)
    config = {**copy.deepcopy(pair.config_dict), "transformers_version": "4.57.0.dev0"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_same_logits(pair.stock, our_class(pair.kind, MODEL).from_pretrained(tmp_path))


@pytest.mark.parametrize("where", ["top", "text"])
def test_dtype_auto(pair, where, tmp_path):
    pair.stock.to(torch.bfloat16).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    if where == "text":
        # The official configs name the dtype in the text part alone.
        config.pop("dtype", None)
        config["vision_config"].pop("dtype", None)
        config["text_config"]["dtype"] = "bfloat16"
        (tmp_path / "config.json").write_text(json.dumps(config))
    stock = stock_class(pair.kind, MODEL).from_pretrained(tmp_path, dtype="auto")
    ours = our_class(pair.kind, MODEL).from_pretrained(tmp_path, dtype="auto")
    assert ours.dtype == stock.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.bfloat16}
    assert ours.model.language_model.rotary_emb.inv_freq.dtype == torch.float32


def test_base_model_from_a_full_folder(pair, tmp_path):
    pair.stock.save_pretrained(tmp_path)
    base = our_class(pair.kind, "Model").from_pretrained(tmp_path).eval()
    inputs = inputs_of_all_forms()
    keep = valid_positions(inputs)
    with torch.no_grad():
        expected = forget(pair.stock).model(**inputs).last_hidden_state[keep]
        assert_close(base(**inputs).last_hidden_state[keep], expected, what="last hidden state")


def test_full_model_from_a_base_folder(kind, tmp_path):
    pair = make_pair(kind, name="Model")
    pair.stock.save_pretrained(tmp_path)
    full, info = our_class(kind, MODEL).from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {"lm_head.weight"}
    assert_same_tensors(full.model.state_dict(), pair.stock.state_dict())


def test_tied_weights(kind, tmp_path):
    pair = make_pair(kind, tie_word_embeddings=True, text={"tie_word_embeddings": True})
    embeddings = pair.ours.get_input_embeddings().weight
    assert pair.ours.lm_head.weight is embeddings
    pair.ours.save_pretrained(tmp_path)
    assert "lm_head.weight" not in read_weights(tmp_path)
    for options in ({}, {"device_map": "auto"}):
        loaded = our_class(kind, MODEL).from_pretrained(tmp_path, **options)
        assert loaded.lm_head.weight.data_ptr() == loaded.get_input_embeddings().weight.data_ptr()
        assert_close(loaded.lm_head.weight, embeddings, 0.0)
    with torch.no_grad():
        loaded.get_input_embeddings().weight.zero_()
    assert loaded.lm_head.weight.abs().max() == 0


def test_untied_weights_stay_apart(pair, tmp_path):
    pair.ours.save_pretrained(tmp_path)
    assert "lm_head.weight" in read_weights(tmp_path)
    loaded = our_class(pair.kind, MODEL).from_pretrained(tmp_path)
    assert loaded.lm_head.weight.data_ptr() != loaded.get_input_embeddings().weight.data_ptr()
    assert_close(loaded.lm_head.weight, pair.stock.lm_head.weight, 0.0)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("size", [176, 155])
@torch.no_grad()
def test_resized_token_embeddings(kind, tied, size, tmp_path):
    pair = make_pair(kind, tie_word_embeddings=tied, text={"tie_word_embeddings": tied})
    for model in (pair.stock, pair.ours):
        torch.manual_seed(0)
        model.resize_token_embeddings(size, mean_resizing=False)
    assert pair.ours.config.text_config.vocab_size == size
    assert pair.ours.get_input_embeddings().weight.shape == pair.ours.lm_head.weight.shape == (size, 48)
    inputs = inputs_of_all_forms()
    keep = valid_positions(inputs)
    rows = min(size, 160)
    expected = stock_forward(pair.stock, **inputs).logits[keep][:, :rows]
    actual = pair.ours(**inputs).logits[keep]
    assert actual.shape[-1] == size
    # Tied heads have the embeddings' variance, so their logits are several times larger.
    assert_close(actual[:, :rows], expected, 5e-5 if tied else 1e-5, "logits of the tokens that were there before")
    pair.ours.save_pretrained(tmp_path)
    again = our_class(kind, MODEL).from_pretrained(tmp_path)
    assert_close(again(**inputs).logits[keep], actual, 1e-6, "logits after saving a resized model")


def test_missing_and_unexpected_weights_are_told(pair, tmp_path):
    pair.stock.save_pretrained(tmp_path)
    weights = read_weights(tmp_path)
    gone = "model.language_model.layers.1.self_attn.q_norm.weight"
    del weights[gone]
    weights["model.something_else.weight"] = torch.zeros(3)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    infos = [
        get_class(pair.kind, MODEL).from_pretrained(tmp_path, output_loading_info=True)[1]
        for get_class in (stock_class, our_class)
    ]
    assert set(infos[1]["missing_keys"]) == set(infos[0]["missing_keys"]) == {gone}
    assert set(infos[1]["unexpected_keys"]) == set(infos[0]["unexpected_keys"]) == {"model.something_else.weight"}


def test_wrong_shapes_are_refused(pair, tmp_path):
    pair.stock.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["intermediate_size"] = 80
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        our_class(pair.kind, MODEL).from_pretrained(tmp_path)


def test_attention_is_chosen_at_loading(pair, tmp_path):
    pair.stock.save_pretrained(tmp_path)
    choice = {"text_config": "eager", "vision_config": "sdpa"}
    loaded = our_class(pair.kind, MODEL).from_pretrained(tmp_path, attn_implementation=choice)
    assert loaded.model.language_model.config._attn_implementation == "eager"
    assert loaded.model.visual.config._attn_implementation == "sdpa"
    assert_same_logits(pair.stock, loaded)


def test_generation_config_is_kept(pair, tmp_path):
    pair.stock.generation_config.temperature = 0.7
    pair.stock.generation_config.do_sample = True
    pair.stock.generation_config.top_k = 20
    pair.stock.save_pretrained(tmp_path)
    loaded = our_class(pair.kind, MODEL).from_pretrained(tmp_path).generation_config
    assert (loaded.temperature, loaded.do_sample, loaded.top_k) == (0.7, True, 20)
    assert (
        loaded.eos_token_id == stock_class(pair.kind, MODEL).from_pretrained(tmp_path).generation_config.eos_token_id
    )


@pytest.mark.parametrize("optim", ["minimal", {"profile": "minimal"}])
def test_a_profile_in_the_config_does_not_disturb_stock(pair, optim, tmp_path):
    pair.ours.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "optim": optim}))
    assert_same_logits(stock_class(pair.kind, MODEL).from_pretrained(tmp_path), pair.ours)


@torch.no_grad()
def test_initial_weights_have_stock_s_statistics(kind):
    """A fresh model: norms at one, biases at zero, matrices at the config's deviation, in every part."""
    stats = []
    for get_class in (stock_class, our_class):
        torch.manual_seed(0)
        config = get_class(kind, "Config").from_dict(tiny_config_dict(kind, text={"initializer_range": 0.1}))
        model = get_class(kind, MODEL)(config)
        stats.append({name: (value.mean().item(), value.std().item()) for name, value in model.named_parameters()})
    assert stats[0].keys() == stats[1].keys()
    for name, (mean, deviation) in stats[0].items():
        assert abs(stats[1][name][0] - mean) < 0.05, name
        assert abs(stats[1][name][1] - deviation) <= 0.35 * deviation, f"{name}: {stats[1][name][1]} not {deviation}"


@torch.no_grad()
def test_copies_and_pickles(pair, tmp_path):
    assert_same_logits(pair.stock, copy.deepcopy(pair.ours))
    torch.save(pair.ours, tmp_path / "model.pt")
    assert_same_logits(pair.stock, torch.load(tmp_path / "model.pt", weights_only=False))


def test_attributes_that_tools_read(pair):
    """What `accelerate`, PEFT, serving and `generate` look up on the class."""
    for ours, stock in (
        (pair.ours, pair.stock),
        (pair.ours.model, pair.stock.model),
        (pair.ours.model.language_model, pair.stock.model.language_model),
        (pair.ours.model.visual, pair.stock.model.visual),
    ):
        for name in (
            "base_model_prefix", "input_modalities", "supports_gradient_checkpointing", "_supports_sdpa",
            "_supports_flash_attn", "_supports_attention_backend", "_can_compile_fullgraph",
            "_skip_keys_device_placement",
        ):  # fmt: skip
            actual, expected = getattr(ours, name, None), getattr(stock, name, None)
            if name == "input_modalities":
                actual, expected = sorted(actual), sorted(expected)
            assert actual == expected, f"{type(ours).__name__}.{name}"
        assert set(stock._tp_plan.items()) <= set(ours._tp_plan.items())
        assert [name for name, _ in ours.named_modules()] == [name for name, _ in stock.named_modules()]
    blocks = {
        type(part[0]).__name__ for part in (pair.ours.model.language_model.layers, pair.ours.model.visual.blocks)
    }
    assert blocks <= set(pair.ours._no_split_modules)
    assert not pair.ours.accepts_loss_kwargs
