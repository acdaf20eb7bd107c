"""Packed models: close to plain ones, generating on every way, and exactly back."""

import copy
import re

import pytest
import torch
from helpers import make_inputs, make_pair, max_difference, one_line

from qwen3_vl import AdaptivePrecision
from qwen3_vl.optim.weights.adaptive_precision import bytes_of
from qwen3_vl.optim.weights.precision_saving import packed_weights, unpack_model
from qwen3_vl.optim.weights.quantized_experts import PackedExperts
from qwen3_vl.optim.weights.quantized_linear import PackedEmbedding, PackedLinear


INPUTS = (["text:5", "image:4x6", "text:3"], ["text:4"])
# Widths of the tiny models fit int4 in groups of 16 or 64, but for 40 and 72, which become int8.
ROUNDING = {8: 0.05, 4: 0.4}


@torch.no_grad()
def logits_of(model, inputs):
    return model(**inputs).logits


def relative(first, second):
    return ((first - second).norm() / second.norm()).item()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("originals", ["file", "keep"])
@pytest.mark.parametrize("tied", [False, True])
def test_apply_and_revert(kind, tied, originals, bits):
    model, inputs = make_pair(kind, tie_word_embeddings=tied).ours, make_inputs(*INPUTS)
    before, names, size = logits_of(model, inputs), list(model.state_dict()), bytes_of(model)
    parameters, config = dict(model.named_parameters()), model.config.to_dict()
    technique = AdaptivePrecision(bits=bits, originals=originals)
    technique.apply(model)
    difference = relative(logits_of(model, inputs), before)
    assert 0 < difference < ROUNDING[bits] and bytes_of(model) < size * (0.5 if bits == 8 else 0.45)
    technique.revert(model)
    assert torch.equal(logits_of(model, inputs), before)
    assert list(model.state_dict()) == names and model.config.to_dict() == config
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert not packed_weights(model) and getattr(model, "hf_quantizer", None) is None


def test_every_weight_is_what_its_codes_say(kind):
    """The packed model is the plain one with rounded weights, experts and vision included."""
    model, inputs = make_pair(kind).ours, make_inputs(*INPUTS)
    rounded = copy.deepcopy(model)
    AdaptivePrecision(bits=4, vision=4, mergers=4, embedding=8).apply(model)
    matrices = packed_weights(model)
    assert len(matrices) == sum(
        p.ndim == 3 or (p.ndim == 2 and "pos_embed" not in n and "gate.weight" not in n)
        for n, p in rounded.named_parameters()
    )
    with torch.no_grad():
        for name, matrix in matrices.items():
            rounded.get_parameter(name).copy_(matrix.unpack())
    assert max_difference(logits_of(model, inputs), logits_of(rounded, inputs)) < 2e-3


def test_experts_are_packed_each(kind):
    if kind != "moe":
        pytest.skip("experts only")
    model = make_pair(kind).ours
    AdaptivePrecision(bits=16, lm_head=16, vision=16, mergers=16, experts=8).apply(model)
    experts = model.model.language_model.layers[0].mlp.experts
    assert isinstance(experts, PackedExperts) and experts.gate_up.codes.ndim == 3
    assert set(packed_weights(model)) == {
        f"model.language_model.layers.{layer}.mlp.experts.{name}"
        for layer in (0, 2)
        for name in ("gate_up_proj", "down_proj")
    }


def test_tied_head_and_embedding_share_one_matrix():
    model = make_pair("dense", tie_word_embeddings=True).ours
    AdaptivePrecision().apply(model)
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, PackedEmbedding) and embedding.matrix is model.lm_head.matrix
    assert model.to(torch.bfloat16).lm_head.matrix.codes is embedding.matrix.codes
    assert embedding(torch.tensor([[3]])).dtype == torch.bfloat16 and embedding.matrix.scale.dtype == torch.float32
    split = make_pair("dense", tie_word_embeddings=True).ours
    technique = AdaptivePrecision(embedding=16)
    technique.apply(split)
    assert type(split.get_input_embeddings()) is torch.nn.Embedding and isinstance(split.lm_head, PackedLinear)
    assert split.config.tie_word_embeddings is False
    technique.revert(split)
    assert split.config.tie_word_embeddings is True and split.lm_head.weight is split.get_input_embeddings().weight


@pytest.mark.parametrize(
    "layouts",
    [INPUTS, (["image:4x4", "text:2", "image:2x4", "text:3"],), (["video:2x4x4", "text:3"],), (["text:6"],)],
    ids=["padded", "pictures", "video", "text"],
)
@pytest.mark.parametrize(
    "settings",
    [{}, {"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}],
    ids=["greedy", "beams", "sampling"],
)
def test_generates_as_the_rounded_model(settings, layouts):
    model, inputs = make_pair("dense").ours, make_inputs(*layouts)
    technique = AdaptivePrecision(bits=4)
    technique.apply(model)
    rounded = copy.deepcopy(model)
    unpack_model(rounded)
    settings = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5, **settings}
    torch.manual_seed(0)
    ours = model.generate(**inputs, **settings)
    torch.manual_seed(0)
    assert torch.equal(ours, rounded.generate(**inputs, **settings))


def test_gradients_and_peft():
    peft = pytest.importorskip("peft")
    model, inputs = make_pair("dense").ours, make_inputs(["text:9"])
    AdaptivePrecision(bits=4).apply(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=0.02)
    codes = {name: matrix.codes.clone() for name, matrix in packed_weights(model).items()}
    losses = []
    for _ in range(6):
        loss = adapted(**inputs, labels=inputs["input_ids"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    assert all(torch.equal(matrix.codes, codes[name]) for name, matrix in packed_weights(model).items())
    with pytest.raises(RuntimeError):
        adapted.merge_adapter()


def test_drop_and_keep_say_what_they_hold():
    model = make_pair("dense").ours
    technique = AdaptivePrecision(originals="keep")
    technique.apply(model)
    assert "MiB of originals in memory besides" in technique.describe(model)
    technique.revert(model)
    dropped = AdaptivePrecision(bits=4, originals="drop")
    dropped.apply(model)
    text = dropped.describe(model)
    assert "originals" not in text and "in int8 (its width of 72 fits no int4 in groups of 64)" in text
    with pytest.raises(ValueError, match="were dropped"):
        dropped.revert(model)
    assert packed_weights(model)


def test_only_named_groups():
    model = make_pair("dense").ours
    group = "model.language_model.layers.1.mlp"
    AdaptivePrecision(bits=16, vision=16, mergers=16, layers={group: 8}).apply(model)
    assert {name.rpartition(".")[0].rpartition(".")[0] for name in packed_weights(model)} == {group}


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"bits": 3}, "bits must be one of 4, 8, 16, got 3"),
        ({"bits": True}, "bits must be one of 4, 8, 16, got True"),
        ({"lm_head": 2}, "lm_head must be one of"),
        ({"vision": 2}, "vision must be one of"),
        ({"group_size": 48}, "group_size must be one of 32, 64, 128, got 48"),
        ({"originals": "somewhere"}, "originals must be one of 'file', 'keep', 'drop'"),
        ({"layers": {"a": 5}}, r"layers\['a'\] must be one of"),
        ({"layers": [4]}, "layers must be what calibrate returned"),
        ({"widths": 4}, "adaptive_precision has no setting 'widths'"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message) as error:
        AdaptivePrecision(**settings)
    one_line(error.value)


def test_bad_models(tmp_path):
    model = make_pair("dense").ours
    with pytest.raises(ValueError, match="layers names 'head', which this model does not have"):
        AdaptivePrecision(layers={"head": 8}).apply(model)
    technique = AdaptivePrecision()
    technique.apply(model)
    with pytest.raises(ValueError, match="packed or quantized already"):
        AdaptivePrecision().apply(model)
    technique.revert(model)
    technique.revert(model)  # nothing left to do
    with pytest.raises(OSError, match=re.escape(str(tmp_path / "none"))):
        AdaptivePrecision(originals_folder=str(tmp_path / "none")).apply(model)


def test_a_weight_that_cannot_be_packed_leaves_the_model_as_it_was():
    model, inputs = make_pair("dense").ours, make_inputs(["text:4"])
    before = logits_of(model, inputs)
    weight = model.lm_head.weight
    with torch.no_grad():
        kept = weight[3].clone()
        weight[3] = float("nan")
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        AdaptivePrecision().apply(model)
    with torch.no_grad():
        weight[3] = kept
    assert torch.equal(logits_of(model, inputs), before) and not packed_weights(model)


def test_with_other_techniques(tmp_path):
    """Chunked prefill, a paged cache, exact attention and the native products of what stays plain."""
    pair = make_pair("dense")
    pair.ours.save_pretrained(tmp_path)
    optim = {"qwen3_vl_exact": {}, "paged_cache": {}, "decode_linear": {}, "adaptive_precision": {"bits": 4}}
    model = type(pair.ours).from_pretrained(tmp_path, optim=optim)
    alone = type(pair.ours).from_pretrained(tmp_path, optim={"adaptive_precision": {"bits": 4}})
    inputs = make_inputs(*INPUTS)
    settings = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5, "prefill_chunk_size": 4}
    assert torch.equal(model.generate(**inputs, **settings), alone.generate(**inputs, **settings))
    for technique in reversed(model.active_techniques):
        technique.revert(model)
    assert torch.equal(logits_of(model, inputs), logits_of(pair.ours, inputs))
