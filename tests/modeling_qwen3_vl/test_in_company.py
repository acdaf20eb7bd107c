"""The model among the tools around it: offloading, adapters by name, hooks, uploads, copies of caches, compilation."""

import copy
import os
import pickle

import pytest
import torch
from helpers import assert_close, clone_inputs, concat_turns, forget, make_inputs, stock_forward
from torch.utils import _pytree
from transformers import DynamicCache

import qwen3_vl
from qwen3_vl.modeling_qwen3_vl.hub_export import HubExportError, export_hub_folder


ONE = ["text:3", "image:4x6", "text:4"]
TWO_DIFFERENT = (["text:3", "image:4x6", "text:2"], ["text:3", "image:6x4", "text:2"])


@pytest.mark.parametrize("where", ["disk", "cpu_offload"])
@torch.no_grad()
def test_offloaded_weights(pair, where, tmp_path):
    """Weights that a hook brings in when a module is called; none may be read behind the hook's back."""
    accelerate = pytest.importorskip("accelerate")
    inputs = make_inputs(ONE)
    expected = stock_forward(pair.stock, **inputs).logits
    if where == "disk":
        pair.stock.save_pretrained(tmp_path / "model")
        device_map = {"model.visual": "disk", "model.language_model": "cpu", "lm_head": "cpu"}
        model = type(pair.ours).from_pretrained(
            tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
        )
    else:
        model = accelerate.cpu_offload(pair.ours, execution_device=torch.device("cpu"))
    assert_close(model(**inputs).logits, expected, what="logits of an offloaded model")


def test_an_adapter_on_the_patch_embedding_acts(pair):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["patch_embed.proj"], init_lora_weights=False)
    inputs, results = make_inputs(ONE), {}
    for name in ("stock", "ours"):
        torch.manual_seed(1)
        adapted = peft.get_peft_model(getattr(pair, name), config)
        logits = adapted(**clone_inputs(inputs)).logits
        logits.square().mean().backward()
        gradients = {key: value.grad for key, value in adapted.named_parameters() if "lora_" in key}
        assert gradients and all(gradient.abs().sum() > 0 for gradient in gradients.values())
        results[name] = logits
    assert_close(results["ours"], results["stock"], what="logits with an adapted patch embedding")


@torch.no_grad()
def test_hooks_see_the_layer_s_own_output(pair):
    inputs, seen = make_inputs(ONE), {}
    for name in ("stock", "ours"):
        layer = getattr(pair, name).model.language_model.layers[0]

        def keep(module, args, output, name=name):
            seen[name] = output[0] if isinstance(output, tuple) else output

        handle = layer.register_forward_hook(keep)
        getattr(pair, name)(**clone_inputs(inputs))
        handle.remove()
    assert_close(seen["ours"], seen["stock"], what="output of the first layer")


@pytest.fixture
def uploads(monkeypatch):
    """Names of the files that a push would upload; nothing is sent."""
    from transformers.utils.hub import PushToHubMixin

    names = []

    def record(self, working_dir, repo_id, files_timestamps, *args, **kwargs):
        for name in os.listdir(working_dir):
            path = os.path.join(working_dir, name)
            if name not in files_timestamps or os.path.getmtime(path) > files_timestamps[name]:
                names.append(name)

    monkeypatch.setattr(PushToHubMixin, "_upload_modified_files", record)
    return names


def test_an_upload_holds_the_code(pair, uploads, tmp_path):
    pair.stock.save_pretrained(tmp_path / "plain")
    folder = export_hub_folder(tmp_path / "plain", tmp_path / "hub")
    model = type(pair.ours).from_pretrained(folder)
    model.save_pretrained(tmp_path / "again")
    stamps = {path.name: path.stat().st_mtime for path in (tmp_path / "again").iterdir()}
    model._upload_modified_files(str(tmp_path / "again"), "someone/model", stamps)
    code = {path.name for path in folder.glob("*.py")}
    assert code and code <= set(uploads)


def test_only_the_main_process_writes_code(pair, tmp_path):
    pair.stock.save_pretrained(tmp_path / "plain")
    model = type(pair.ours).from_pretrained(export_hub_folder(tmp_path / "plain", tmp_path / "hub"))
    model.save_pretrained(tmp_path / "rank1", False)
    assert not list((tmp_path / "rank1").glob("*.py"))


def test_an_export_never_overwrites_its_source(pair, tmp_path):
    pair.stock.save_pretrained(tmp_path / "plain")
    folder = export_hub_folder(tmp_path / "plain", tmp_path / "hub")
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(HubExportError, match="came from"):
        export_hub_folder(type(pair.ours).from_pretrained(folder), folder)
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.fixture
def noted(pair):
    """A cache whose rows have come differently far, and the prompt that filled it."""
    cache, first = DynamicCache(config=pair.ours.config), make_inputs(*TWO_DIFFERENT)
    with torch.no_grad():
        pair.ours(**first, past_key_values=cache)
    return cache, first


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
@torch.no_grad()
def test_a_noted_cache_can_be_copied(pair, noted, duplicate):
    cache, _ = noted
    twin = duplicate(cache)
    assert isinstance(twin, DynamicCache)
    twin.reorder_cache(torch.tensor([1, 0]))
    more = torch.tensor([[7, 8], [9, 10]])
    expected = pair.ours(input_ids=more, past_key_values=cache).logits
    assert_close(pair.ours(input_ids=more.flip(0), past_key_values=twin).logits.flip(0), expected)


def test_a_noted_cache_stays_a_tree(noted):
    if DynamicCache not in _pytree.SUPPORTED_NODES:
        pytest.skip("nothing has registered DynamicCache with pytree in this process")
    assert len(_pytree.tree_leaves(noted[0])) > 1


@torch.no_grad()
def test_selected_equal_rows(pair):
    cache, first = DynamicCache(config=pair.ours.config), make_inputs(*[ONE] * 4)
    pair.ours(**first, past_key_values=cache)
    cache.batch_select_indices(torch.tensor([0, 2]))
    more = make_inputs(["text:3"], seed=2)
    actual = pair.ours(input_ids=more["input_ids"].expand(2, -1), past_key_values=cache).logits
    expected = stock_forward(pair.stock, **concat_turns(make_inputs(ONE), more)).logits[:, -3:]
    assert_close(actual[:1], expected)


@pytest.mark.parametrize("mask", ["own length", None])
def test_a_new_part_without_its_mask_is_told(pair, mask):
    cache, turn = DynamicCache(config=pair.ours.config), make_inputs(["text:2"], mask=mask is not None)
    with torch.no_grad():
        pair.ours(**make_inputs(ONE), past_key_values=cache)
    length = cache.get_seq_length()
    with pytest.raises(ValueError, match=f"cache has seen {length} tokens but input_ids hold 2"):
        pair.ours.generate(**turn, past_key_values=cache, max_new_tokens=2)
    assert cache.get_seq_length() == length


def test_encoder_outputs_are_not_changed(pair):
    inputs = make_inputs(*TWO_DIFFERENT)
    with torch.no_grad():
        encoded = {"image": pair.ours.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])}
    given = {key: value for key, value in inputs.items() if key != "pixel_values"}
    options = {"num_beams": 2, "max_new_tokens": 4, "do_sample": False}
    expected = forget(pair.stock).generate(**clone_inputs(inputs), **options)
    for _ in range(2):
        assert pair.ours.generate(**clone_inputs(given), mm_encoder_outputs=encoded, **options).equal(expected)


def test_encoder_outputs_need_grids(pair):
    inputs = make_inputs(ONE)
    with torch.no_grad():
        encoded = {"image": pair.ours.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])}
    for call in (pair.ours, pair.ours.generate):
        with pytest.raises(ValueError, match="without image_grid_thw"):
            call(input_ids=inputs["input_ids"], mm_encoder_outputs=encoded)


@torch.no_grad()
def test_positions_of_the_caller_in_a_conversation(pair):
    first, second = make_inputs(ONE), make_inputs(["text:2", "image:4x4", "text:3"], seed=4)
    whole = concat_turns(first, second)
    mask = torch.ones_like(whole["input_ids"])
    options = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": [150, 151]}
    positions, _ = pair.ours.model.get_rope_index(whole["input_ids"], image_grid_thw=whole["image_grid_thw"])
    positions = torch.cat((torch.arange(mask.shape[1]).expand(1, 1, -1), positions))
    expected = forget(pair.stock).generate(**clone_inputs(whole), attention_mask=mask, use_cache=False, **options)
    cache = DynamicCache(config=pair.ours.config)
    pair.ours(**first, past_key_values=cache)
    actual = pair.ours.generate(**whole, attention_mask=mask, position_ids=positions, past_key_values=cache, **options)
    assert actual.equal(expected)


@torch.no_grad()
def test_a_note_does_not_outlive_a_crop(pair):
    """Cropped to before the picture, then single tokens with positions given, then one without."""
    cache, first = DynamicCache(config=pair.ours.config), make_inputs(ONE)
    pair.ours(**first, past_key_values=cache)
    cache.crop(3 - cache.get_seq_length())
    ids = torch.randint(10, 140, (1, 11))
    for index in range(10):
        pair.ours(
            input_ids=ids[:, index : index + 1],
            position_ids=torch.full((3, 1, 1), 3 + index),
            past_key_values=cache,
        )
    actual = pair.ours(input_ids=ids[:, 10:], past_key_values=cache).logits
    text = torch.cat((first["input_ids"][:, :3], ids), dim=1)
    assert_close(actual, stock_forward(pair.stock, input_ids=text).logits[:, -1:])


@pytest.mark.slow
@pytest.mark.parametrize("order", ["compiled first", "compiled last"])
@torch.no_grad()
def test_a_compiled_model_keeps_positions(pair, order):
    torch.compiler.reset()
    first, more = make_inputs(ONE), make_inputs(["text:4"], seed=3)
    expected = stock_forward(pair.stock, **concat_turns(first, more)).logits[:, -4:]
    compiled = torch.compile(pair.ours, backend="eager")
    steps = (compiled, pair.ours) if order == "compiled first" else (pair.ours, compiled)
    cache = DynamicCache(config=pair.ours.config)
    steps[0](**first, past_key_values=cache)
    outputs = [steps[1](input_ids=token, past_key_values=cache).logits for token in more["input_ids"].split(1, dim=1)]
    torch.compiler.reset()
    assert_close(torch.cat(outputs, dim=1), expected, what="logits behind a picture")


def test_registration_tables_agree():
    from qwen3_vl.modeling_qwen3_vl import hub_export, registration

    public = {name: module.rsplit(".", 1)[-1] for name, module in qwen3_vl._MODULE_OF.items()}
    references = [
        *registration.CONFIG_CLASSES.values(),
        *registration.BASE_MODELS.values(),
        *registration.GENERATIVE_MODELS.values(),
        *(reference for _, reference in registration.PROCESSOR_CLASSES.values()),
    ]
    for family in hub_export.FAMILIES.values():
        references += [entry.reference for entry in (family.config, family.base, family.generation)]
    for reference in references:
        module, _, name = reference.partition(".")
        assert public[name] == module
