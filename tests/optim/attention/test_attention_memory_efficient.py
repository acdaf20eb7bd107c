"""Chunked attention against the dense definition, and what its memory does not grow with."""

from dataclasses import replace

import pytest
import torch
from helpers import assert_close, make_pair, one_line
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import (
    ALL_CASES,
    CASES,
    AttentionCase,
    assert_matches,
    dense_mask_of,
    dense_reference,
    inputs_of,
    layout_of,
    perturb_future,
)

from qwen3_vl.optim.attention.attention_layout import AttentionLayout
from qwen3_vl.optim.attention.attention_memory_efficient import (
    NAME,
    MemoryEfficientAttention,
    MemoryEfficientSettings,
    memory_efficient_attention_forward,
)


def module_with(query_chunk=16, key_chunk=24, is_causal=True):
    module = torch.nn.Module()
    module.is_causal = is_causal
    module.attention_settings = {NAME: MemoryEfficientSettings(query_chunk, key_chunk)}
    return module


def attend(case, tensors, mask="layout", chunks=(16, 24)):
    mask = layout_of(case) if isinstance(mask, str) else mask
    module = module_with(*chunks, is_causal=case.causal)
    output, weights = memory_efficient_attention_forward(module, *tensors, mask, case.scaling)
    assert weights is None
    return output


@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_against_the_definition(case):
    tensors = inputs_of(case)
    output = attend(case, tensors)
    assert output.dtype == case.dtype and output.is_contiguous()
    assert_matches(output, dense_reference(*tensors, dense_mask_of(case), case.scaling))


@pytest.mark.parametrize("chunks", [(1, 1), (7, 5), (5, 64), (64, 5), (512, 512)])
@pytest.mark.parametrize("case", [CASES[2], CASES[5], CASES[10], CASES[11], CASES[16]], ids=str)
def test_chunk_sizes_change_nothing(case, chunks):
    tensors = inputs_of(case)
    assert_matches(attend(case, tensors, chunks=chunks), dense_reference(*tensors, dense_mask_of(case), case.scaling))


@given(
    batch=st.integers(1, 3),
    queries=st.integers(1, 40),
    past=st.integers(0, 30),
    spare=st.integers(0, 10),
    kv_heads=st.integers(1, 3),
    groups=st.sampled_from([1, 2, 4, 8]),
    padding=st.sampled_from(["none", "left", "right"]),
    step=st.integers(1, 20),
    chunks=st.tuples(st.integers(1, 45), st.integers(1, 45)),
)
@settings(max_examples=80, deadline=None, derandomize=True)
def test_any_call(batch, queries, past, spare, kv_heads, groups, padding, step, chunks):
    """Rows that are nothing but padding among them."""
    case = AttentionCase(batch, queries, past, spare, kv_heads, groups, 8, torch.float32, padding, step)
    tensors = inputs_of(case)
    assert_matches(attend(case, tensors, chunks=chunks), dense_reference(*tensors, dense_mask_of(case)))


@given(st.lists(st.integers(1, 20), min_size=1, max_size=6), st.integers(1, 3), st.integers(1, 30), st.integers(1, 30))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_any_packing(lengths, batch, query_chunk, key_chunk):
    case = AttentionCase(batch, sum(lengths), head_dim=8, packed=tuple(lengths))
    tensors = inputs_of(case)
    output = attend(case, tensors, chunks=(query_chunk, key_chunk))
    assert_matches(output, dense_reference(*tensors, dense_mask_of(case)))


@pytest.mark.parametrize("case", [CASES[0], CASES[2], CASES[9], CASES[11]], ids=str)
def test_the_future_changes_nothing(case):
    tensors = inputs_of(case)
    output = attend(case, tensors)
    for token in (0, case.queries // 2):
        changed = attend(case, perturb_future(case, tensors, token))
        assert torch.equal(changed[:, : token + 1], output[:, : token + 1])
        assert (changed[:, token + 1 :] - output[:, token + 1 :]).abs().max() > 1


@pytest.mark.parametrize("side", ["left", "right"])
def test_what_lies_under_padding_changes_nothing(side):
    case = AttentionCase(batch=3, queries=33, padding=side, padding_step=9)
    query, key, value = inputs_of(case)
    output = attend(case, (query, key, value))
    hidden = ~layout_of(case).valid[:, None, :, None]
    changed = attend(case, (query, key.masked_fill(hidden, 9.0), value.masked_fill(hidden, 1e6)))
    assert torch.equal(changed, output)


def test_queries_that_see_nothing_give_zeros():
    case = AttentionCase(batch=2, queries=20, padding="left", padding_step=11)
    output = attend(case, inputs_of(case))
    assert torch.equal(output[0, :11], torch.zeros_like(output[0, :11]))
    assert torch.equal(output[1], torch.zeros_like(output[1]))
    assert (output[0, 11:] != 0).all()


MASK_SHAPES = [(1, 1, 20, 31), (3, 1, 20, 31), (1, 4, 20, 31), (3, 4, 20, 31), (3, 1, 20, 40), (3, 1, 1, 31)]


@pytest.mark.parametrize("additive", [False, True], ids=["boolean", "additive"])
@pytest.mark.parametrize("shape", MASK_SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_dense_masks(shape, additive):
    """Exact, chunk by chunk; the mask alone counts, as in `transformers`, and may be longer than the keys."""
    case = AttentionCase(batch=3, queries=20, past=11, head_dim=16)
    tensors = inputs_of(case)
    generator = torch.Generator().manual_seed(1)
    seen = torch.rand(shape, generator=generator) > 0.4
    seen[-1, -1, 0] = False
    mask = torch.where(seen, torch.randn(shape, generator=generator), torch.finfo(torch.float32).min)
    mask = mask if additive else seen
    assert_matches(attend(case, tensors, mask), dense_reference(*tensors, mask[..., :31], case.scaling))


@pytest.mark.parametrize("lowest", [float("-inf"), torch.finfo(torch.bfloat16).min])
def test_rows_of_an_additive_mask_that_hide_everything(lowest):
    case = AttentionCase(queries=6, head_dim=16, dtype=torch.bfloat16)
    mask = torch.zeros(1, 1, 6, 6, dtype=torch.bfloat16)
    mask[:, :, 2] = lowest
    output = attend(case, inputs_of(case), mask, chunks=(4, 4))
    assert torch.equal(output[:, 2], torch.zeros_like(output[:, 2]))
    assert torch.isfinite(output).all() and (output[:, 3] != 0).all()


@pytest.mark.parametrize("causal", [True, False])
def test_padding_flags(causal):
    case = AttentionCase(batch=2, queries=12, past=5, head_dim=16, causal=causal)
    tensors = inputs_of(case)
    flags = torch.ones(2, 17, dtype=torch.long)
    flags[0, :6] = 0
    expected = flags.bool()[:, None, None] & (dense_mask_of(case) if causal else torch.tensor(True))
    assert_matches(attend(case, tensors, flags, chunks=(4, 5)), dense_reference(*tensors, expected))


def test_no_mask_means_causal_or_full():
    for causal in (True, False):
        case = AttentionCase(queries=9, past=4, causal=causal)
        tensors = inputs_of(case)
        assert_matches(attend(case, tensors, None), dense_reference(*tensors, dense_mask_of(case)))


def test_argument_beats_the_module():
    case = AttentionCase(queries=9, causal=False)
    tensors = inputs_of(case)
    output, _ = memory_efficient_attention_forward(module_with(is_causal=True), *tensors, None, is_causal=False)
    assert_matches(output, dense_reference(*tensors, None))


GRADIENT_CASES = [CASES[1], CASES[3], CASES[5], CASES[10], CASES[11], CASES[15]]


@pytest.mark.parametrize("case", GRADIENT_CASES, ids=str)
def test_gradients_against_the_definition(case):
    tensors = inputs_of(case, requires_grad=True)
    output = attend(case, tensors)
    expected = dense_reference(*tensors, dense_mask_of(case), case.scaling)
    outer = torch.randn(output.shape, generator=torch.Generator().manual_seed(3))
    actual = torch.autograd.grad(output, tensors, outer)
    for ours, exact in zip(actual, torch.autograd.grad(expected, tensors, outer.double()), strict=True):
        assert ours.dtype == case.dtype
        assert_close(ours, exact, 5e-5, "gradients")


def test_gradients_in_bfloat16_against_sdpa():
    """Grouped heads and padding. The error against float64 is no larger than that of `sdpa`."""
    case = AttentionCase(batch=2, queries=70, groups=4, padding="left", padding_step=9, dtype=torch.bfloat16)
    tensors = inputs_of(case, requires_grad=True)
    expected = dense_reference(*tensors, dense_mask_of(case))
    stock = torch.nn.functional.scaled_dot_product_attention(*tensors, dense_mask_of(case), enable_gqa=True)
    outer = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3)).bfloat16()
    exact = torch.autograd.grad(expected, tensors, outer.double())
    ours = torch.autograd.grad(attend(case, tensors), tensors, outer)
    theirs = torch.autograd.grad(stock.transpose(1, 2), tensors, outer)
    for mine, other, truth in zip(ours, theirs, exact, strict=True):
        assert (mine.double() - truth).abs().max() <= 1.1 * (other.double() - truth).abs().max() + 1e-3
        assert_close(mine, truth, 0.06, "gradients")


@pytest.mark.parametrize(
    "case",
    [
        AttentionCase(
            batch=2, queries=5, past=2, kv_heads=1, head_dim=3, padding="left", padding_step=3, dtype=torch.float64
        ),
        AttentionCase(queries=7, kv_heads=1, head_dim=3, packed=(3, 1, 3), dtype=torch.float64),
        AttentionCase(queries=5, kv_heads=2, head_dim=2, causal=False, dtype=torch.float64),
    ],
    ids=str,
)
def test_gradcheck(case):
    """Against differences. One row sees nothing in part: its gradient is zero and not NaN."""
    tensors = inputs_of(case, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *x: attend(case, x, chunks=(3, 2)), tensors)


def test_gradcheck_under_a_dense_mask():
    case = AttentionCase(queries=4, head_dim=3, kv_heads=2, groups=2, dtype=torch.float64)
    mask = torch.randn(1, 4, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask[:, 1, 2] = float("-inf")
    tensors = inputs_of(case, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *x: attend(case, x, mask, chunks=(3, 2)), tensors)


def test_second_derivatives_are_refused():
    case = AttentionCase(queries=5, head_dim=4)
    tensors = inputs_of(case, requires_grad=True)
    (first,) = torch.autograd.grad(attend(case, tensors).square().sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        first.sum().backward()


def peak_bytes(function):
    """The most memory that `function` held at a time beyond what was there, as the allocator saw it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    assert len(events) > 10
    return peak


@pytest.mark.parametrize("kind", ["causal", "padded", "packed", "full", "additive"])
def test_memory_does_not_grow_with_the_length(kind):
    """From 1,024 to 8,192 tokens, what is held beyond the output grows by a flag for each pair of chunks at most."""
    beyond = {}
    for tokens in (1024, 8192):
        case = AttentionCase(
            queries=tokens,
            kv_heads=1,
            groups=2,
            head_dim=8,
            padding="left" if kind == "padded" else "none",
            padding_step=600,
            packed=(tokens // 4 + 3, tokens - tokens // 4 - 3) if kind == "packed" else (),
            causal=kind != "full",
        )
        tensors = inputs_of(case)
        mask = torch.zeros(1, 1, tokens, tokens, dtype=torch.bfloat16) if kind == "additive" else layout_of(case)
        output = tokens * case.heads * case.head_dim * 4
        beyond[tokens] = peak_bytes(lambda: attend(case, tensors, mask, chunks=(256, 256))) - output  # noqa: B023
    scores = 2 * 256 * 256 * 4
    assert scores < beyond[1024] < 2.5 * scores
    assert beyond[8192] - beyond[1024] <= 4096


def test_memory_of_training_is_linear():
    """What is held with gradients doubles with the length; the square of it would grow fourfold."""
    held = {}
    for tokens in (1024, 2048):
        case = AttentionCase(queries=tokens, kv_heads=1, groups=2, head_dim=8)
        tensors = inputs_of(case, requires_grad=True)
        outer = torch.ones(1, tokens, 2, 8)
        held[tokens] = peak_bytes(lambda: attend(case, tensors, chunks=(128, 128)).backward(outer))  # noqa: B023
    chunk = 2 * 128 * 128 * 4
    assert held[2048] - held[1024] < held[1024]
    assert held[2048] < 1024 * 2048 * 4 and held[1024] > chunk


def count_products(function):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    return sum(event.count for event in profile.key_averages() if event.key in ("aten::bmm", "aten::baddbmm_"))


@pytest.mark.parametrize(
    "kind, expected",
    # Of 8 x 8 pairs of chunks: all; on or under the diagonal; of keys that are not all padding; of one's own sequence.
    [("full", 64), ("causal", 36), ("padded", 21), ("packed", 20)],
)
def test_only_chunks_that_are_seen_are_computed(kind, expected):
    case = AttentionCase(
        queries=128,
        head_dim=8,
        kv_heads=1,
        causal=kind != "full",
        padding="left" if kind == "padded" else "none",
        padding_step=32,
        packed=(64, 64) if kind == "packed" else (),
    )
    tensors = inputs_of(case)
    assert count_products(lambda: attend(case, tensors, chunks=(16, 16))) == 2 * expected


def test_short_queries_of_many_heads_share_a_product():
    case = AttentionCase(batch=2, queries=1, past=47, kv_heads=4, groups=2, head_dim=8)
    tensors = inputs_of(case)
    assert count_products(lambda: attend(case, tensors, chunks=(16, 16))) == 2 * 3
    many = AttentionCase(batch=9, queries=1, past=47, kv_heads=4, groups=2, head_dim=8)
    tensors = inputs_of(many)
    assert_matches(attend(many, tensors), dense_reference(*tensors, None))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("case", [CASES[2], CASES[5], CASES[11], ALL_CASES[-1]], ids=str)
def test_on_a_gpu(case):
    tensors = inputs_of(case, requires_grad=True)
    expected = dense_reference(*tensors, dense_mask_of(case), case.scaling)
    on_gpu = [x.detach().cuda().requires_grad_() for x in tensors]
    layout = layout_of(case)
    output = attend(case, on_gpu, None if layout is None else layout.to("cuda"))
    assert_matches(output.cpu(), expected)
    outer = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3))
    for ours, exact in zip(
        torch.autograd.grad(output, on_gpu, outer.to("cuda", case.dtype)),
        torch.autograd.grad(expected, tensors, outer.double()),
        strict=True,
    ):
        assert_close(ours.cpu(), exact, 0.1 if case.dtype == torch.bfloat16 else 1e-3, "gradients")


# --- What it refuses. ---


def refused(message, mask=None, module=None, **kwargs):
    case = AttentionCase(batch=2, queries=5, past=3)
    with pytest.raises(ValueError, match=message) as error:
        memory_efficient_attention_forward(module or module_with(), *inputs_of(case), mask, **kwargs)
    return one_line(error.value)


def test_dropout_and_weights_are_refused():
    refused("no dropout .* got 0.1", dropout=0.1)
    refused("output_attentions", output_attentions=True)
    module = module_with()
    module.config = make_pair("dense").ours.config
    module.config._output_attentions = True
    refused("output_attentions", module=module)


@pytest.mark.parametrize("shape", [(2, 1, 4, 8), (2, 1, 5, 7), (3, 1, 5, 8), (2, 2, 5, 8), (2, 7)])
def test_masks_of_a_wrong_shape(shape):
    assert str(shape) in refused("does not fit", torch.zeros(shape))


def test_masks_of_a_wrong_kind():
    refused("boolean or additive", torch.zeros(2, 1, 5, 8, dtype=torch.long))
    refused("no gradient for attention_mask", torch.zeros(2, 1, 5, 8, requires_grad=True))
    refused("valid of shape", AttentionLayout(3, torch.ones(2, 9, dtype=torch.bool)))


@pytest.mark.parametrize("bad", [0, -1, 2.0, True, "64"])
@pytest.mark.parametrize("name", ["query_chunk", "key_chunk"])
def test_bad_settings(name, bad):
    with pytest.raises(ValueError, match=f"{name} must be .* got {bad!r}") as error:
        MemoryEfficientAttention(**{name: bad})
    one_line(error.value)


def test_unknown_settings():
    with pytest.raises(ValueError, match="'chunk'") as error:
        MemoryEfficientAttention(chunk=3)
    assert "query_chunk" in one_line(error.value)


@pytest.mark.slow
def test_compiled_without_a_graph_break():
    """The operators are nodes of the graph; so are their gradients."""
    module = module_with(4, 6)
    case = AttentionCase(queries=18, head_dim=16)
    compiled = torch.compile(
        lambda q, k, v: memory_efficient_attention_forward(module, q, k, v, None)[0],
        backend="aot_eager",
        fullgraph=True,
    )
    for queries in (18, 25):
        tensors = inputs_of(replace(case, queries=queries), requires_grad=True)
        output, expected = compiled(*tensors), attend(case, tensors, None, chunks=(4, 6))
        assert torch.equal(output, expected)
        actual = torch.autograd.grad(output.square().sum(), tensors)
        for ours, exact in zip(actual, torch.autograd.grad(expected.square().sum(), tensors), strict=True):
            assert torch.equal(ours, exact)
