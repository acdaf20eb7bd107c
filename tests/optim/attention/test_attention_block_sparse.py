"""The fixed pattern: which blocks it keeps, what comes out, and the technique on models."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import IMAGE_TOKEN, make_inputs, make_pair, one_line
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import ALL_CASES, AttentionCase, assert_matches, dense_reference, inputs_of, layout_of, perturb_future

from qwen3_vl.optim.attention.attention_block_sparse import (
    NAME,
    BlockSparseAttention,
    BlockSparseSettings,
    block_sparse_attention,
    pattern_of,
    picture_groups,
)
from qwen3_vl.optim.attention.attention_layout import AttentionLayout
from qwen3_vl.optim.attention.block_map import visible_pairs
from qwen3_vl.optim.cache.cache_paged import PagedLayer
from qwen3_vl.optim.cache.memory_pool import PagePools


SMALL = BlockSparseSettings(sink_tokens=3, window_tokens=6, query_block=8, key_block=4, short_text_tokens=3)


def module_with(settings_given, causal=True):
    return SimpleNamespace(is_causal=causal, config=None, attention_settings={NAME: settings_given})


def runs_of(case, seed=0):
    """Pictures of 5 to 13 tokens and texts of 1 to 9, for every row; 0 at padding."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(case.batch):
        row, number = [], 0
        while len(row) < case.keys:
            row += [0] * int(torch.randint(1, 10, (), generator=generator))
            number += 1
            row += [number] * int(torch.randint(5, 14, (), generator=generator))
        rows.append(row[: case.keys])
    runs = torch.tensor(rows, dtype=torch.int32)
    layout = layout_of(case)
    if layout is not None and layout.valid is not None:
        runs = runs.masked_fill(~layout.valid, 0)
    return runs


def slow_groups(runs, valid, segments, short):
    """Token by token: text that is short and stands before a picture of its sequence belongs to it."""
    groups = []
    for b, row in enumerate(runs.tolist()):
        kind = [-1 if valid is not None and not valid[b, t] else x for t, x in enumerate(row)]
        part = [0] * len(row) if segments is None else segments[b].tolist()
        for start in range(len(row)):
            if kind[start] != 0 or (start and kind[start - 1] == 0 and part[start - 1] == part[start]):
                continue
            stop = start
            while stop < len(row) and row[stop] == 0 and kind[stop] == 0 and part[stop] == part[start]:
                stop += 1
            before_picture = stop < len(row) and kind[stop] > 0 and part[stop] == part[start]
            if before_picture and stop - start < short:
                kind[start:stop] = [kind[stop]] * (stop - start)
        groups.append(kind)
    return torch.tensor(groups)


def slow_pattern(case, layout, runs, settings_given):
    """The kept blocks, from the pairs of tokens that the pattern names."""
    query = torch.arange(case.queries)[:, None] + case.past
    key = torch.arange(case.keys)[None]
    valid = torch.ones(case.batch, case.keys, dtype=torch.bool) if layout.valid is None else layout.valid
    seen = layout.dense(case.queries, case.keys).expand(case.batch, 1, -1, -1)[:, 0]
    sink = (valid.long().cumsum(1) <= settings_given.sink_tokens)[:, None]
    pairs = sink | (key > query - settings_given.window_tokens)[None]
    if runs is not None:
        groups = slow_groups(runs, layout.valid, layout.segments, settings_given.short_text_tokens)
        own = groups[:, case.past : case.past + case.queries]
        pairs = pairs | ((own[:, :, None] == groups[:, None]) & (own > 0)[:, :, None]) | (groups == 0)[:, None]
        if settings_given.text_queries == "all":
            pairs = pairs | (own == 0)[:, :, None]
    pairs = pairs & seen
    rows = pairs.split(settings_given.query_block, dim=1)
    blocks = [[part.any(2).any(1) for part in row.split(settings_given.key_block, dim=2)] for row in rows]
    return torch.stack([torch.stack(row, -1) for row in blocks], 1)


# --- Settings ---


@pytest.mark.parametrize(
    ("given_settings", "message"),
    [
        ({"sink_tokens": -1}, "sink_tokens must be an integer >= 0, got -1"),
        ({"window_tokens": 0}, "window_tokens must be an integer >= 1"),
        ({"query_block": 12.5}, "query_block must be an integer"),
        ({"key_block": True}, "key_block must be an integer"),
        ({"text_queries": "some"}, r"text_queries must be one of \('all', 'local'\), got 'some'"),
        ({"window": 3}, "no setting 'window'"),
    ],
)
def test_settings_are_checked(given_settings, message):
    with pytest.raises(ValueError, match=message) as error:
        BlockSparseAttention(**given_settings)
    one_line(error.value)


def test_a_config_is_accepted_as_with_the_other_mechanisms():
    assert BlockSparseAttention(config=object(), sink_tokens=5).options.sink_tokens == 5


# --- The pattern ---


@given(
    data=st.data(),
    keys=st.integers(1, 60),
    batch=st.integers(1, 3),
    short=st.integers(0, 8),
    kind=st.sampled_from(("none", "left", "packed")),
)
@settings(max_examples=80, deadline=None, derandomize=True)
def test_short_text_belongs_to_the_picture_behind_it(data, keys, batch, short, kind):
    case = AttentionCase(batch=batch, queries=keys)
    packed = ()
    if kind == "packed" and keys > 1:
        cut = data.draw(st.integers(1, keys - 1))
        packed = (cut, keys - cut)
    case = replace(case, padding="left" if kind == "left" else "none", padding_step=2, packed=packed)
    layout, runs = layout_of(case), runs_of(case, data.draw(st.integers(0, 99)))
    expected = slow_groups(runs, layout.valid, layout.segments, short)
    assert torch.equal(picture_groups(runs, layout, short), expected)


@given(
    queries=st.integers(1, 60),
    past=st.integers(0, 40),
    padding=st.sampled_from(("none", "left", "right")),
    seed=st.integers(0, 99),
    known=st.booleans(),
    text=st.sampled_from(("all", "local")),
    blocks=st.sampled_from(((8, 4), (16, 16), (5, 7))),
    sink=st.integers(0, 9),
    window=st.integers(1, 20),
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_blocks_of_the_pattern(queries, past, padding, seed, known, text, blocks, sink, window):
    case = AttentionCase(batch=2, queries=queries, past=past, padding=padding)
    layout, runs = layout_of(case), runs_of(case, seed) if known else None
    own = BlockSparseSettings(sink, window, *blocks, text, short_text_tokens=3)
    block_map = pattern_of(layout, queries, case.keys, runs, own)
    expected = slow_pattern(case, layout, runs, own)
    visible = (visible_pairs(layout, queries, case.keys, *blocks) > 0).expand(2, -1, -1)
    kept = visible if block_map is None else (block_map.mask[:, 0] & visible).expand(2, -1, -1)
    assert (kept | ~expected).all(), "a block of the pattern is missing"
    # A window over right padding still keeps the block that holds its end.
    if padding != "right":
        assert torch.equal(kept, expected)


@pytest.mark.parametrize("known", [False, True])
def test_packed_rows_keep_their_own_first_tokens(known):
    case = AttentionCase(batch=2, queries=90, packed=(50, 40), kv_heads=1, head_dim=8)
    layout, runs = layout_of(case), runs_of(case) if known else None
    block_map = pattern_of(layout, 90, 90, runs, replace(SMALL, text_queries="local"))
    for row, lengths in enumerate(((50, 40), (40, 50))):
        start = lengths[0]
        mask = block_map.dense(layout, 90, 90)[row if len(block_map.mask) > 1 else 0, 0]
        assert mask[89, start : start + 3].all(), "the first tokens of the second sequence"
        assert not mask[start:, :start].any()


def test_text_sees_everything_and_pictures_do_not():
    runs = torch.tensor([[0] * 40 + [1] * 64 + [0] * 4 + [2] * 64 + [0] * 44])
    layout = AttentionLayout(0)
    own = BlockSparseSettings(sink_tokens=4, window_tokens=4, query_block=4, key_block=4, short_text_tokens=8)
    mask = pattern_of(layout, 216, 216, runs, own).dense(layout, 216, 216)[0, 0]
    causal = torch.ones(216, 216, dtype=torch.bool).tril()
    assert torch.equal(mask[172:], causal[172:]), "the question after the pictures"
    assert mask[168, 104:169].all() and not mask[168, 44:104].any(), (
        "the second picture, with its label, not the first"
    )
    assert mask[168, :40].all(), "long text"
    local = pattern_of(layout, 216, 216, runs, replace(own, text_queries="local")).dense(layout, 216, 216)[0, 0]
    assert not local[215, 40:172].any() and local[215, :40].all() and local[215, 172:].all()


def test_the_pattern_is_made_once_a_forward(monkeypatch):
    calls = []
    original = picture_groups
    monkeypatch.setattr(
        "qwen3_vl.optim.attention.attention_block_sparse.picture_groups",
        lambda *given: calls.append(1) or original(*given),
    )
    case = AttentionCase(queries=60)
    layout, runs = layout_of(case), runs_of(case)
    first = pattern_of(layout, 60, 60, runs, SMALL)
    assert pattern_of(layout, 60, 60, runs, SMALL) is first and len(calls) == 1
    other = pattern_of(layout, 60, 60, runs.clone().fill_(1), SMALL)
    assert other is not first, "the pattern of other pictures was reused"
    pattern_of(replace(layout), 60, 60, runs, SMALL)
    assert len(calls) == 3


@pytest.mark.parametrize("known", [True, False])
def test_nothing_is_left_out_of_a_short_row(known):
    case = AttentionCase(queries=30)
    runs = torch.zeros(1, 30, dtype=torch.int32) if known else None
    own = replace(SMALL, window_tokens=1 if known else 30)
    assert pattern_of(layout_of(case), 30, 30, runs, own) is None


# --- The attention function ---


@pytest.mark.parametrize("blocks", [(8, 4), (32, 32)])  # the compiled kernels take the second
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_matches_the_reference(case, known, blocks):
    tensors, layout = inputs_of(case), layout_of(case)
    runs = runs_of(case) if known and layout is not None else None
    text = "local" if case.groups == 4 else "all"
    own = replace(SMALL, text_queries=text, query_block=blocks[0], key_block=blocks[1])
    output, weights = block_sparse_attention(
        module_with(own, case.causal), *tensors, layout, case.scaling, visual_runs=runs
    )
    assert weights is None
    mask = layout
    if layout is not None:
        block_map = pattern_of(layout, case.queries, case.keys, runs, own)
        mask = layout if block_map is None else block_map.dense(layout, case.queries, case.keys)
    assert_matches(output, dense_reference(*tensors, mask))


@pytest.mark.parametrize("case", [c for c in ALL_CASES if c.causal and c.queries > 1], ids=str)
def test_the_future_changes_nothing(case):
    token = case.queries // 2
    tensors, layout, runs = inputs_of(case), layout_of(case), runs_of(case)
    changed = perturb_future(case, tensors, token)
    before, after = (
        block_sparse_attention(module_with(SMALL), *x, layout, case.scaling, visual_runs=runs)[0][:, : token + 1]
        for x in (tensors, changed)
    )
    assert_matches(after, before.double(), 1e-5 if case.dtype == torch.float32 else None)


@pytest.mark.parametrize("text", ["all", "local"])
def test_chunks_of_the_prompt_see_the_same_blocks(text):
    case = AttentionCase(batch=2, queries=96, head_dim=16, padding="left")
    (query, key, value), layout, runs = inputs_of(case), layout_of(case), runs_of(case)
    # Where a chunk ends inside short text, that text does not know yet what follows.
    own = replace(SMALL, text_queries=text, short_text_tokens=0)
    whole, _ = block_sparse_attention(module_with(own), query, key, value, layout, case.scaling, visual_runs=runs)
    for first, stop in ((0, 32), (32, 40), (40, 96)):
        chunk, _ = block_sparse_attention(
            module_with(own),
            query[:, :, first:stop],
            key[:, :, :stop],
            value[:, :, :stop],
            AttentionLayout(first, layout.valid[:, :stop]),
            case.scaling,
            visual_runs=runs[:, :stop],
        )
        assert_matches(chunk, whole[:, first:stop].double())


def test_unused_places_of_a_cache_need_no_runs():
    case = AttentionCase(queries=40, past=8, spare=30, head_dim=16)
    tensors, layout = inputs_of(case), layout_of(case)
    runs = runs_of(replace(case, spare=0))
    output, _ = block_sparse_attention(module_with(SMALL), *tensors, layout, case.scaling, visual_runs=runs)
    shorter = (tensors[0], *(x[:, :, :48] for x in tensors[1:]))
    expected, _ = block_sparse_attention(
        module_with(SMALL), *shorter, AttentionLayout(8), case.scaling, visual_runs=runs
    )
    assert_matches(output, expected.double())


@pytest.mark.parametrize("page_tokens", [4, 16, 64])
@pytest.mark.parametrize("blocks", [(8, 4), (32, 32), (64, 64)])
@pytest.mark.parametrize(("queries", "text"), [(1, "all"), (1, "local"), (90, "all"), (90, None)])
def test_a_paged_history_gives_the_same(queries, text, blocks, page_tokens):
    case = AttentionCase(batch=2, queries=queries, past=70, padding="left", head_dim=16)
    (query, key, value), runs = inputs_of(case), None if text is None else runs_of(case)
    own = replace(SMALL, text_queries=text or "all", query_block=blocks[0], key_block=blocks[1])
    layer = PagedLayer(PagePools(page_tokens=page_tokens))
    layer.update(key[:, :, :70], value[:, :, :70])
    new = layer.update(key[:, :, 70:], value[:, :, 70:], dense=False)
    output, _ = block_sparse_attention(
        module_with(own), query, *new, layout_of(case), case.scaling, kv_layer=layer, visual_runs=runs
    )
    expected, _ = block_sparse_attention(
        module_with(own), query, key, value, layout_of(case), case.scaling, visual_runs=runs
    )
    assert_matches(output, expected.double())


def test_gradients_match_the_reference():
    case = AttentionCase(batch=2, queries=60, padding="left", head_dim=16)
    layout, runs = layout_of(case), runs_of(case)
    tensors = inputs_of(case, requires_grad=True)
    mask = pattern_of(layout, 60, 60, runs, SMALL).dense(layout, 60, 60)
    wanted = torch.autograd.grad(dense_reference(*tensors, mask).square().sum(), tensors)
    output, _ = block_sparse_attention(module_with(SMALL), *tensors, layout, case.scaling, visual_runs=runs)
    for gradient, expected in zip(torch.autograd.grad(output.square().sum(), tensors), wanted, strict=True):
        assert_matches(gradient, expected.double(), 1e-4)


@pytest.mark.parametrize(
    ("given_arguments", "message"),
    [
        ({"attention_mask": torch.ones(1, 1, 33, 33, dtype=torch.bool)}, "dense mask.*qwen3_vl_exact"),
        ({"attention_mask": torch.ones(2, 3)}, "does not fit"),
        ({"attention_mask": AttentionLayout(0, torch.ones(1, 9, dtype=torch.bool))}, "valid of shape"),
        ({"dropout": 0.1}, "dropout"),
        ({"output_attentions": True}, "output_attentions"),
        ({"visual_runs": torch.zeros(1, 9)}, r"visual_runs of shape \(1, 9\) does not fit 33 tokens"),
    ],
)
def test_what_is_refused(given_arguments, message):
    case = AttentionCase()
    arguments = {"attention_mask": layout_of(case), "scaling": case.scaling, **given_arguments}
    with pytest.raises(ValueError, match=message) as error:
        block_sparse_attention(module_with(SMALL), *inputs_of(case), **arguments)
    one_line(error.value)


def test_padding_flags_and_no_mask_at_all():
    case = AttentionCase(batch=2, padding="left")
    tensors, layout = inputs_of(case), layout_of(case)
    expected, _ = block_sparse_attention(module_with(SMALL), *tensors, layout, case.scaling)
    output, _ = block_sparse_attention(module_with(SMALL), *tensors, layout.valid.long())
    assert torch.equal(output, expected)
    output, _ = block_sparse_attention(module_with(SMALL), *tensors, None)
    expected, _ = block_sparse_attention(module_with(SMALL), *tensors, AttentionLayout(0), case.scaling)
    assert torch.equal(output, expected)


# --- On models ---


@torch.no_grad()
def test_apply_and_revert_restore_the_logits(kind):
    model = make_pair(kind).ours
    model.set_attn_implementation({"text_config": "eager", "vision_config": "sdpa"})
    pictures = ["image:8x8", "text:20"] * 3
    inputs = make_inputs(["text:20", *pictures], ["text:60"])
    before = model(**inputs).logits
    technique = BlockSparseAttention(sink_tokens=1, window_tokens=4, query_block=4, key_block=4, short_text_tokens=3)
    technique.apply(model)
    assert model.config.text_config._attn_implementation == NAME
    sparse = model(**inputs).logits
    real = inputs["attention_mask"].bool()
    last_picture = inputs["input_ids"][0] == IMAGE_TOKEN
    first = int(last_picture.nonzero()[0])
    assert_matches(sparse[0, :first], before[0, :first].double(), 2e-4)
    assert (sparse[0, last_picture] - before[0, last_picture]).abs().max() > 1e-2, "later pictures saw earlier ones"
    # A row of text alone sees everything, so the decoder has said where the pictures are.
    assert_matches(sparse[1][real[1]], before[1][real[1]].double(), 2e-4)
    technique.revert(model)
    assert torch.equal(model(**inputs).logits, before)
    assert model.config.text_config._attn_implementation == "eager"
    assert model.config.vision_config._attn_implementation == "sdpa"
    assert not any(hasattr(module, "attention_settings") for module in model.modules())


@torch.no_grad()
def test_a_chunked_prompt_and_decoding_know_the_pictures(kind):
    model = make_pair(kind).ours
    BlockSparseAttention(sink_tokens=1, window_tokens=4, query_block=4, key_block=4, short_text_tokens=0).apply(model)
    inputs = make_inputs(["text:20", *["image:8x8", "text:20"] * 2])
    whole = model(**inputs).logits
    tokens = inputs["input_ids"].shape[1]
    out = model(**{**inputs, "input_ids": inputs["input_ids"][:, :-3], "mm_token_type_ids": None})
    assert_matches(out.logits, whole[:, :-3].double(), 2e-4)
    for token in range(tokens - 3, tokens):
        out = model(input_ids=inputs["input_ids"][:, token : token + 1], past_key_values=out.past_key_values)
        assert_matches(out.logits, whole[:, token : token + 1].double(), 2e-4)


@torch.no_grad()
def test_a_window_over_everything_is_exact(kind):
    pair = make_pair(kind)
    inputs = make_inputs(["text:40", "image:4x6", "text:30"], ["text:9", "video:2x4x4"])
    expected = pair.ours(**inputs).logits
    pair.ours.set_attn_implementation(NAME)
    mask = inputs["attention_mask"].bool()
    assert_matches(pair.ours(**inputs).logits[mask], expected[mask].double(), 2e-4)


def test_trains_under_gradient_checkpointing():
    model = make_pair("dense").ours
    BlockSparseAttention(sink_tokens=1, window_tokens=8, query_block=8, key_block=8).apply(model)
    inputs = make_inputs(["text:20", "image:4x4", "text:9"])
    gradients = []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        gradients.append(model.model.language_model.layers[0].self_attn.q_proj.weight.grad.clone())
    assert gradients[0].abs().max() > 0
    assert_matches(gradients[1], gradients[0].double(), 1e-6)


def test_generates_with_pictures_and_padding(checkpoint):
    model, inputs = checkpoint
    greedy = {"max_new_tokens": 8, "do_sample": False}
    expected = model.generate(**inputs, **greedy)
    technique = BlockSparseAttention()
    technique.apply(model)
    try:
        # The default window is longer than the prompt.
        assert torch.equal(model.generate(**inputs, **greedy), expected)
        technique.revert(model)
        technique = BlockSparseAttention(sink_tokens=2, window_tokens=8, query_block=8, key_block=8)
        technique.apply(model)
        tokens = model.generate(**inputs, **greedy)
        assert tokens.shape[0] == 2 and tokens.shape[1] > inputs["input_ids"].shape[1]
    finally:
        technique.revert(model)
    assert torch.equal(model.generate(**inputs, **greedy), expected)
