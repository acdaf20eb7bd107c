"""The faster rotary embedding is bit-equal to the plain one, on its own and in a model."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from helpers import (
    assert_close,
    make_inputs,
    make_pair,
    one_line,
    valid_positions,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import CountOperations
from transformers import DynamicCache, StaticCache

import qwen3_vl
from qwen3_vl.modeling_qwen3_vl.modeling_text import Qwen3VLRotaryEmbedding, apply_rotary_pos_emb
from qwen3_vl.optim.attention.rotary_faster import (
    CHUNK,
    FIRST_TABLE,
    FasterRotaryEmbeddings,
    FasterRotation,
    TabledAngles,
)


TINY = Path(__file__).resolve().parents[3] / "checkpoints" / "tiny"
DTYPES = (torch.float32, torch.bfloat16)


def config_with(head_dim=128, section=(24, 20, 20), rope_type="default", **rope):
    return qwen3_vl.Qwen3VLTextConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=4096,
        rope_parameters={
            "rope_type": rope_type,
            "rope_theta": 5e6,
            "mrope_section": list(section),
            "mrope_interleaved": True,
            **rope,
        },
    )


def rotary_pair(config=None, limit=32768):
    """The plain module, and its copy with a table."""
    plain = Qwen3VLRotaryEmbedding(config or config_with())
    tabled = copy.deepcopy(plain)
    tabled.forward = TabledAngles(tabled, limit)
    return plain, tabled


def tables_of(module):
    return {dtype: len(table) for dtype, table in module.forward.tables.items()}


def assert_same(actual, expected):
    for mine, plain in zip(actual, expected, strict=True):
        assert mine.dtype == plain.dtype and mine.shape == plain.shape
        assert torch.equal(mine, plain)


# --- Angles. ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim, section", [(128, (24, 20, 20)), (64, (12, 10, 10)), (16, (4, 2, 2))])
def test_table_is_bit_equal(dtype, head_dim, section):
    """Token by token, a few at a time, and rows at different places, over the seams of the table."""
    plain, tabled = rotary_pair(config_with(head_dim, section))
    x = torch.zeros(1, dtype=dtype)
    for position in [*range(0, 300), FIRST_TABLE - 1, FIRST_TABLE, 2 * FIRST_TABLE, 20000, 5]:
        for width in (1, 7):
            ids = torch.arange(position, position + width).expand(3, 1, -1)
            assert_same(tabled(x, ids), plain(x, ids))
    rows = torch.tensor([[3], [1500], [7000], [0]]).expand(3, -1, -1)
    assert_same(tabled(x, rows), plain(x, rows))
    assert tables_of(tabled) == {dtype: 32768}


@pytest.mark.parametrize("ids", [torch.tensor([[4, 5]]), torch.tensor([[[4, 5]]])], ids=["plain", "one axis"])
def test_shapes_of_positions(ids):
    plain, tabled = rotary_pair()
    assert_same(tabled(torch.zeros(1), ids), plain(torch.zeros(1), ids))
    assert tables_of(tabled) == {torch.float32: FIRST_TABLE}


PLAIN_INPUTS = {
    "axes differ": torch.tensor([[[5]], [[6]], [[5]]]),
    "beyond the limit": torch.full((3, 1, 1), 5000),
    "negative": torch.full((3, 1, 1), -1),
    "many": torch.arange(700).expand(3, 1, -1),
    "fractions": torch.full((3, 1, 1), 2.5),
}


@pytest.mark.parametrize("name", PLAIN_INPUTS)
def test_other_positions_are_computed(name):
    plain, tabled = rotary_pair(limit=4096)
    x = torch.zeros(1)
    assert_same(tabled(x, PLAIN_INPUTS[name]), plain(x, PLAIN_INPUTS[name]))
    assert tables_of(tabled) == {}


def test_the_table_grows_to_its_limit_only():
    plain, tabled = rotary_pair(limit=3000)
    sizes = []
    for position in (0, FIRST_TABLE, 2999, 3000):
        ids = torch.full((3, 1, 1), position)
        assert_same(tabled(torch.zeros(1), ids), plain(torch.zeros(1), ids))
        sizes.append(tables_of(tabled)[torch.float32])
    assert sizes == [FIRST_TABLE, 3000, 3000, 3000]


def test_values_come_from_the_table_and_cannot_change_it():
    plain, tabled = rotary_pair()
    x, ids = torch.zeros(1), torch.full((3, 1, 1), 9)
    tabled(x, ids)
    tabled.forward.tables[torch.float32][9] += 1.0
    marked = [values + 1.0 for values in plain(x, ids)]
    for values in tabled(x, ids):
        values.zero_()
    assert_same(tabled(x, ids), marked)


@pytest.mark.parametrize(
    "change",
    [
        lambda module: module.to(torch.bfloat16),
        lambda module: module.inv_freq.mul_(0.5),
        lambda module: module.register_buffer("inv_freq", module.inv_freq * 2, persistent=False),
        lambda module: setattr(module, "attention_scaling", 0.5),
    ],
    ids=["dtype", "in place", "other buffer", "scaling"],
)
def test_changed_frequencies_make_a_new_table(change):
    plain, tabled = rotary_pair()
    ids = torch.full((3, 1, 1), 777)
    before = tabled(torch.zeros(1), ids)
    for module in (plain, tabled):
        change(module)
    assert_same(tabled(torch.zeros(1), ids), plain(torch.zeros(1), ids))
    assert not torch.equal(tabled(torch.zeros(1), ids)[0], before[0])


def test_a_table_for_each_dtype():
    plain, tabled = rotary_pair()
    ids = torch.full((3, 1, 1), 777)
    for dtype in (*DTYPES, *DTYPES):
        x = torch.zeros(1, dtype=dtype)
        assert_same(tabled(x, ids), plain(x, ids))
    assert set(tables_of(tabled)) == set(DTYPES)


@pytest.mark.parametrize(
    "rope_type, rope",
    [
        ("dynamic", {"factor": 2.0}),
        ("linear", {"factor": 2.0}),
        ("yarn", {"factor": 4.0, "original_max_position_embeddings": 1024}),
        (
            "longrope",
            {
                "short_factor": [1.0] * 64,
                "long_factor": [2.0] * 64,
                "factor": 4.0,
                "original_max_position_embeddings": 1024,
            },
        ),
    ],
)
def test_other_types_stay_plain(rope_type, rope):
    """Dynamic ones change their frequencies with the length, back and forth."""
    plain, tabled = rotary_pair(config_with(rope_type=rope_type, **rope))
    for position in (5, 5000, 5, 2000):
        ids = torch.full((3, 1, 1), position)
        assert_same(tabled(torch.zeros(1), ids), plain(torch.zeros(1), ids))
    assert tables_of(tabled) == {}


def test_a_table_from_inference_mode_serves_training():
    _, tabled = rotary_pair()
    ids = torch.full((3, 1, 1), 3)
    with torch.inference_mode():
        tabled(torch.zeros(1), ids)
    cos, sin = tabled(torch.zeros(1), ids)
    q = torch.randn(1, 2, 1, 128, requires_grad=True)
    rotation = FasterRotation(torch.nn.Module())
    rotation(q, q, cos, sin)[0].sum().backward()
    assert torch.isfinite(q.grad).all()


def test_other_devices_stay_plain():
    plain, tabled = rotary_pair()
    for module in (plain, tabled):
        module.to("meta")
    ids = torch.zeros(3, 1, 1, dtype=torch.long, device="meta")
    actual, expected = tabled(torch.zeros(1, device="meta"), ids), plain(torch.zeros(1, device="meta"), ids)
    assert actual[0].shape == expected[0].shape and actual[0].is_meta
    assert tables_of(tabled) == {}


# --- Rotation. ---


def rotation_inputs(tokens, dtype, batch=2, heads=(4, 2), dim=128, seed=0, requires_grad=False):
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(batch, tokens, n, dim, generator=generator).to(dtype).transpose(1, 2) for n in heads)
    angles = torch.rand(batch, tokens, dim // 2, generator=generator) * 6.3
    cos, sin = (torch.cat((x, x), dim=-1).to(dtype) for x in (angles.cos(), angles.sin()))
    return q.requires_grad_(requires_grad), k.requires_grad_(requires_grad), cos, sin


@pytest.fixture
def rotation():
    module = torch.nn.Module()
    return FasterRotation(module)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16, torch.float64])
@pytest.mark.parametrize("tokens", [1, 7, 2 * CHUNK - 1, 2 * CHUNK, 3 * CHUNK + 5])
@torch.no_grad()
def test_rotation_is_bit_equal(rotation, dtype, tokens):
    inputs = rotation_inputs(tokens, dtype, batch=1, dim=64)
    copies = [x.clone() for x in inputs]
    actual = rotation(*inputs)
    assert_same(actual, apply_rotary_pos_emb(*inputs))
    if tokens > 1:  # the stride of a single token says nothing
        assert [x.stride() for x in actual] == [x.stride() for x in inputs[:2]]
    for given_tensor, before in zip(inputs, copies, strict=True):
        assert torch.equal(given_tensor, before)


@given(
    tokens=st.integers(1, 12),
    batch=st.integers(1, 3),
    heads=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    dim=st.sampled_from([4, 16, 80, 128]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_rotation(tokens, batch, heads, dim, dtype, seed):
    inputs = rotation_inputs(tokens, dtype, batch, heads, dim, seed)
    assert_same(FasterRotation(torch.nn.Module())(*inputs), apply_rotary_pos_emb(*inputs))


@pytest.mark.parametrize("tokens", [3, 2 * CHUNK + 3])
@torch.no_grad()
def test_heads_behind_tokens(rotation, tokens):
    q, k, cos, sin = rotation_inputs(tokens, torch.bfloat16, batch=1, dim=16)
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    expected = apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
    assert_same(rotation(q, k, cos, sin, unsqueeze_dim=2), expected)


@pytest.mark.parametrize("tokens", [5, 2 * CHUNK + 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_bit_equal(rotation, dtype, tokens):
    inputs = rotation_inputs(tokens, dtype, batch=1, dim=16, requires_grad=True)
    outer = [torch.randn_like(x) for x in inputs[:2]]
    actual = torch.autograd.grad(rotation(*inputs), inputs[:2], outer)
    assert_same(actual, torch.autograd.grad(apply_rotary_pos_emb(*inputs), inputs[:2], outer))


def test_gradcheck_of_the_rotation(rotation):
    q, k, cos, sin = rotation_inputs(3, torch.float64, batch=1, heads=(2, 1), dim=4, requires_grad=True)
    assert torch.autograd.gradcheck(lambda q, k: rotation(q, k, cos, sin), (q, k))


def test_one_signed_sine_for_all_layers(rotation):
    """And a new one for another forward, though the old one was freed."""
    for seed in range(5):
        q, k, cos, sin = rotation_inputs(3, torch.float32, seed=seed)
        expected = apply_rotary_pos_emb(q, k, cos, sin)
        assert_same(rotation(q, k, cos, sin), expected)
        with CountOperations() as later:
            assert_same(rotation(q, k, cos, sin), expected)
        assert later.names.count("aten.neg") == 0 and later.names.count("aten.cat") == 0


@torch.no_grad()
def test_no_copy_of_half_the_heads(rotation):
    inputs = rotation_inputs(9, torch.float32)
    rotation(*inputs)
    with CountOperations() as ours:
        rotation(*inputs)
    with CountOperations() as plain:
        apply_rotary_pos_emb(*inputs)
    assert len(ours.names) < len(plain.names)
    assert "aten.neg" in plain.names and "aten.cat" in plain.names


def test_mixed_precision_goes_the_plain_way():
    """bfloat16 states under float32 angles are promoted, as in the plain model."""
    module = make_pair("dense").ours.model.language_model.layers[0].self_attn
    q, k, cos, sin = rotation_inputs(4, torch.float32)
    inputs = (q.bfloat16(), k.bfloat16(), cos, sin)
    actual = FasterRotation(module)(*inputs)
    assert actual[0].dtype == torch.float32
    assert_same(actual, apply_rotary_pos_emb(*inputs))


# --- On models. ---


def parts_of(model):
    decoder = next(module for module in model.modules() if hasattr(module, "rotary_emb") and hasattr(module, "layers"))
    return decoder.rotary_emb, [layer.self_attn for layer in decoder.layers]


def is_applied(model):
    rotary, attention = parts_of(model)
    found = [isinstance(vars(rotary).get("forward"), TabledAngles)]
    found += [isinstance(vars(module).get("rotate"), FasterRotation) for module in attention]
    assert len(set(found)) == 1
    return found[0]


def run(model, **generate):
    """Logits of a padded prefill and of what follows on its cache, and the tokens of `generate()`."""
    inputs = make_inputs(["text:3", "image:4x6", "text:9"], ["text:5", "video:2x4x4", "text:3"])
    with torch.no_grad():
        prefill = model(**inputs, past_key_values=DynamicCache(config=model.config.text_config))
        mask = torch.cat((inputs["attention_mask"], torch.ones(2, 2, dtype=torch.long)), 1)
        step = model(torch.tensor([[20, 21], [22, 23]]), attention_mask=mask, past_key_values=prefill.past_key_values)
        options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, **generate}
        tokens = model.generate(**inputs, **options)
    return prefill.logits, step.logits, tokens


@pytest.mark.parametrize("dtype", DTYPES)
def test_apply_and_revert_on_a_model(kind, dtype):
    model = make_pair(kind, dtype=dtype).ours
    before = run(model)
    technique = FasterRotaryEmbeddings(model.config)
    technique.apply(model)
    assert is_applied(model)
    assert_same(run(model), before)
    # Decoding went by the table, prefill with pictures did not need to.
    assert tables_of(parts_of(model)[0]) == {dtype: FIRST_TABLE}
    technique.revert(model)
    assert not is_applied(model)
    assert_same(run(model), before)


def test_static_cache():
    model = make_pair("dense").ours
    expected = run(model)[2]
    FasterRotaryEmbeddings().apply(model)
    cache = StaticCache(config=model.config.text_config, max_cache_len=64)
    assert torch.equal(run(model, past_key_values=cache)[2], expected)


def test_training_gradients_are_bit_equal():
    inputs = make_inputs(["text:3", "image:4x6", "text:9"], ["text:5"], padding="right")
    labels = inputs["input_ids"].masked_fill(~valid_positions(inputs), -100)
    gradients = []
    for fast in (False, True):
        model = make_pair("dense").ours.train()
        if fast:
            FasterRotaryEmbeddings().apply(model)
        model(**inputs, labels=labels).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert_same(gradients[1], gradients[0])


def test_under_an_adapter():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False)
    model = peft.get_peft_model(make_pair("dense").ours, config).eval()
    before = run(model)
    technique = FasterRotaryEmbeddings()
    technique.apply(model)
    assert is_applied(model)
    assert_same(run(model), before)
    technique.revert(model)
    assert not is_applied(model)
    assert_same(run(model), before)


def test_the_decoder_alone():
    decoder = make_pair("dense").ours.model.language_model
    inputs = {"input_ids": torch.tensor([[11, 12, 13]])}
    with torch.no_grad():
        before = decoder(**inputs).last_hidden_state
        FasterRotaryEmbeddings().apply(decoder)
        assert torch.equal(decoder(**inputs).last_hidden_state, before)
    assert tables_of(decoder.rotary_emb) == {torch.float32: FIRST_TABLE}


def test_copies_and_casts():
    """A copy has a table and modules of its own; a cast model computes with its own frequencies."""
    model = make_pair("dense").ours
    FasterRotaryEmbeddings().apply(model)
    run(model)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for twin in twins:
        rotary, attention = parts_of(twin)
        assert rotary.forward.module is rotary and attention[1].rotate.module is attention[1]
        twin.to(torch.bfloat16)
        plain = copy.deepcopy(twin)
        FasterRotaryEmbeddings().revert(plain)
        assert not is_applied(plain) and is_applied(twin)
        assert_same(run(twin), run(plain))
    assert parts_of(model)[0].inv_freq.dtype == torch.float32


def test_what_stood_there_comes_back():
    """A hook's forward, as `accelerate` puts it, and another technique's rotation."""
    model = make_pair("dense").ours
    rotary, attention = parts_of(model)
    calls = []
    plain_forward = rotary.forward

    def hooked(x, position_ids):
        calls.append(position_ids.shape)
        return plain_forward(x, position_ids)

    def other_rotation(*args, **kwargs):
        return apply_rotary_pos_emb(*args, **kwargs)

    rotary.forward, attention[0].rotate = hooked, other_rotation
    technique = FasterRotaryEmbeddings()
    technique.apply(model)
    run(model)
    assert calls
    technique.revert(model)
    assert rotary.forward is hooked and attention[0].rotate is other_rotation
    assert "rotate" not in vars(attention[1])


def test_reverting_what_was_not_applied_does_nothing():
    model = make_pair("dense").ours
    FasterRotaryEmbeddings().revert(model)
    assert not is_applied(model)


@pytest.mark.slow
def test_compiled_forward():
    """One graph; it computes angles and rotation plainly, and what is decoded outside goes on by the table."""
    model = make_pair("dense").ours.model.language_model
    FasterRotaryEmbeddings().apply(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    ids = torch.randint(10, 140, (1, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        actual = compiled(input_ids=ids, use_cache=False).last_hidden_state
        assert tables_of(model.rotary_emb) == {}
        assert torch.equal(model(input_ids=ids, use_cache=False).last_hidden_state, actual)
    assert tables_of(model.rotary_emb) == {torch.float32: FIRST_TABLE}


@pytest.mark.slow
def test_exported_forward():
    model = make_pair("dense").ours.model.language_model.eval()
    FasterRotaryEmbeddings().apply(model)
    ids = torch.randint(10, 140, (1, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).last_hidden_state
        exported = torch.export.export(model, (), {"input_ids": ids, "use_cache": False}, strict=False)
        assert_close(exported.module()(input_ids=ids, use_cache=False).last_hidden_state, expected, 1e-5)


def test_tiny_checkpoint():
    model = qwen3_vl.Qwen3VLForConditionalGeneration.from_pretrained(TINY).eval()
    prompt = torch.tensor([[10, 200, 31, 7, 99, 640]])

    def answer():
        with torch.no_grad():
            logits = model(prompt).logits
            out = model.generate(
                input_ids=prompt, max_new_tokens=12, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
        return (logits, out.sequences, *out.logits)

    before = answer()
    technique = FasterRotaryEmbeddings()
    technique.apply(model)
    assert_same(answer(), before)
    assert tables_of(parts_of(model)[0]) == {torch.bfloat16: FIRST_TABLE}
    technique.revert(model)
    assert_same(answer(), before)


def test_errors():
    with pytest.raises(ValueError, match="no setting 'size'") as error:
        FasterRotaryEmbeddings(size=3)
    one_line(error.value)
    for bad in (-1, 2.5, "all"):
        with pytest.raises(ValueError, match=f"table_positions .* got {bad!r}"):
            FasterRotaryEmbeddings(table_positions=bad)
    with pytest.raises(ValueError, match="found no M-RoPE in Linear"):
        FasterRotaryEmbeddings().apply(torch.nn.Linear(2, 2))
