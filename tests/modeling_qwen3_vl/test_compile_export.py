"""`torch.compile`, `torch.export` and FlexAttention."""

import shutil

import pytest
import torch
from helpers import assert_close, forget, make_inputs, make_pair, stock_forward, valid_positions
from transformers import StaticCache


NEEDS_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs g++")


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def visual_inputs(seed=0):
    return make_inputs(["text:3", "image:4x6", "text:4"], ["text:7"], seed=seed)


@torch.no_grad()
def test_compiled_text_forward_is_one_graph(pair):
    """`fullgraph=True`: any break raises."""
    inputs = make_inputs(["text:9"], ["text:9"])["input_ids"]
    expected = stock_forward(pair.stock, input_ids=inputs).logits
    if pair.kind == "moe":
        compiled = torch.compile(pair.ours, backend="eager")
    else:
        compiled = torch.compile(pair.ours, backend="eager", fullgraph=True)
    actual = compiled(input_ids=inputs, use_cache=False).logits
    assert_close(actual, expected, what="logits")


@pytest.mark.slow
@torch.no_grad()
def test_compiled_forward_with_pictures(pair):
    """Eager and compiled agree over several shapes; pictures may break the graph."""
    compiled = torch.compile(pair.ours, backend="eager")
    for seed, inputs in enumerate((visual_inputs(), make_inputs(["text:2", "image:6x4", "video:2x2x4", "text:3"]))):
        keep = valid_positions(inputs)
        expected = stock_forward(pair.stock, **inputs).logits[keep]
        assert_close(compiled(**inputs).logits[keep], expected, what=f"logits of form {seed}")


@pytest.mark.slow
def test_compiled_training_step(pair):
    inputs = make_inputs(["text:3", "image:4x6", "text:4"])
    compiled = torch.compile(pair.ours.train(), backend="aot_eager")
    compiled(**inputs, labels=inputs["input_ids"]).loss.backward()
    forget(pair.stock).train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    for name, parameter in pair.stock.named_parameters():
        if parameter.grad is not None:
            assert_close(pair.ours.get_parameter(name).grad, parameter.grad, 1e-4, f"gradients of {name}")


@NEEDS_COMPILER
@pytest.mark.slow
@torch.no_grad()
def test_compiled_by_inductor():
    pair = make_pair("dense")
    inputs = make_inputs(["text:3", "image:4x6", "text:4"])
    expected = stock_forward(pair.stock, **inputs).logits
    compiled = torch.compile(pair.ours)
    assert_close(compiled(**inputs).logits, expected, what="logits")


@torch.no_grad()
def test_compiled_decoding_step_on_a_static_cache(pair):
    """The step of a decoding loop: one token, a static cache, given positions; compiled once for all steps."""
    inputs = make_inputs(["text:3", "image:4x6", "text:4"])
    cache = StaticCache(config=pair.ours.config, max_cache_len=40)
    pair.ours(**inputs, past_key_values=cache)
    length = inputs["input_ids"].shape[1]
    more = make_inputs(["text:4"], seed=3)["input_ids"]
    _, delta = pair.stock.model.get_rope_index(**inputs)
    compilations = []

    def counting(graph, example_inputs):
        compilations.append(graph)
        return graph.forward

    step = torch.compile(pair.ours.model.language_model, backend=counting, fullgraph=pair.kind == "dense")
    outputs = []
    for index in range(4):
        position = (length + index + delta).view(1, 1, 1).expand(3, 1, 1)
        embeds = pair.ours.get_input_embeddings()(more[:, index : index + 1])
        mask = torch.zeros(1, 1, 1, 40)
        mask[..., length + index + 1 :] = torch.finfo(torch.float32).min
        hidden = step(inputs_embeds=embeds, position_ids=position, attention_mask=mask, past_key_values=cache)
        outputs.append(pair.ours.lm_head(hidden.last_hidden_state))
        if index == 1:
            so_far = len(compilations)
    whole = {
        **inputs,
        "input_ids": torch.cat([inputs["input_ids"], more], dim=1),
        "mm_token_type_ids": torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, 4)),
    }
    expected = stock_forward(pair.stock, **whole).logits[:, length:]
    assert_close(torch.cat(outputs, dim=1), expected, what="logits")
    assert so_far > 0
    if pair.kind == "dense":
        # How many tokens an expert gets is data, so the graphs of a sparse layer may grow with what was met.
        assert len(compilations) == so_far, "later steps were compiled again"


@torch.no_grad()
def test_exported_decoder(pair):
    """`torch.export` of the text decoder with a free length, no cache, and positions given."""
    pair.stock.set_attn_implementation("eager")
    decoder = pair.ours.model.language_model
    decoder.set_attn_implementation("eager")
    if pair.kind == "moe":
        # Which tokens go to which expert is data; a loop over experts cannot be captured, a batched product can.
        decoder.set_experts_implementation("batched_mm")
    tokens = torch.export.Dim("tokens", min=2, max=64)
    embeds, positions = torch.randn(1, 6, 48), torch.arange(6).view(1, 1, 6).expand(3, 1, 6).contiguous()
    program = torch.export.export(
        decoder,
        (),
        {"inputs_embeds": embeds, "position_ids": positions, "use_cache": False},
        dynamic_shapes={"inputs_embeds": {1: tokens}, "position_ids": {2: tokens}, "use_cache": None},
        strict=False,
    )
    longer = torch.randn(1, 11, 48)
    places = torch.arange(11).view(1, 1, 11).expand(3, 1, 11).contiguous()
    given = {"inputs_embeds": longer, "position_ids": places, "use_cache": False}
    expected = forget(pair.stock).model.language_model(**given).last_hidden_state
    actual = program.module()(**given)
    actual = actual[0] if isinstance(actual, tuple) else actual.last_hidden_state
    assert_close(actual, expected, what="states of the exported decoder")


@NEEDS_COMPILER
@pytest.mark.slow
@torch.no_grad()
def test_flex_attention(pair):
    """Stock's dense class refuses flex attention, though its MoE class runs it; ours runs both."""
    inputs = visual_inputs()
    keep = valid_positions(inputs)
    expected = stock_forward(pair.stock, **inputs).logits[keep]
    pair.ours.set_attn_implementation({"text_config": "flex_attention", "vision_config": "sdpa"})
    assert pair.ours.model.language_model.config._attn_implementation == "flex_attention"
    assert_close(pair.ours(**inputs).logits[keep], expected, what="logits of flex and stock's sdpa")
    text = make_inputs(["text:9"], ["text:5"])
    keep = valid_positions(text)
    expected = stock_forward(pair.stock, **text).logits[keep]
    assert_close(pair.ours(**text).logits[keep], expected, what="logits of text")
