"""Bins: every sample once, budgets kept, about as few rows as any greedy pass finds."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_vl.optim.training.packing_bins import pack_bins


ROW = (60, 40)
SIZES = st.lists(st.tuples(st.integers(1, ROW[0]), st.integers(0, ROW[1])), max_size=60)


def first_fit(sizes, row_tokens, row_patches):
    rows = []
    for tokens, patches in sizes:
        for row in rows:
            if row[0] + tokens <= row_tokens and row[1] + patches <= row_patches:
                row[0] += tokens
                row[1] += patches
                break
        else:
            rows.append([tokens, patches])
    return len(rows)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(SIZES)
def test_every_sample_once_within_both_budgets(sizes):
    rows = pack_bins(sizes, *ROW)
    assert sorted(index for row in rows for index in row) == list(range(len(sizes)))
    for row in rows:
        assert sum(sizes[index][0] for index in row) <= ROW[0]
        assert sum(sizes[index][1] for index in row) <= ROW[1]
        assert row == sorted(row)
    assert len(rows) <= first_fit(sizes, *ROW) + 1
    assert rows == sorted(rows)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(SIZES)
def test_patches_do_not_count_without_their_budget(sizes):
    rows = pack_bins(sizes, ROW[0])
    assert rows == pack_bins([(tokens, 0) for tokens, _ in sizes], *ROW)
    # Two rows that are half empty would have been one.
    assert 2 * sum(tokens for tokens, _ in sizes) > ROW[0] * (len(rows) - 1)


def test_fills_what_fits_exactly():
    assert pack_bins([(7, 0), (6, 0), (3, 0), (4, 0)], 10) == [[0, 2], [1, 3]]
    assert pack_bins([], 10) == []


def test_too_large_for_a_row():
    with pytest.raises(ValueError, match="sample 1 has 11 tokens and 0 vision patches"):
        pack_bins([(4, 0), (11, 0)], 10)
    with pytest.raises(ValueError, match="sample 0 has 4 tokens and 9 vision patches"):
        pack_bins([(4, 9)], 10, 8)
