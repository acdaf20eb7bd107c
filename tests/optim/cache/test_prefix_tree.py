"""The tree of known token sequences against a plain list of them."""

import numpy as np
import pytest
from helpers import one_line
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_vl.optim.cache.prefix_tree import PrefixTree, shared_length


def key(*tokens):
    """(tokens, 2) rows; the second number goes with the first."""
    return np.array([[token, 7 * token] for token in tokens], dtype=np.int64).reshape(-1, 2)


def plain_shared(one, other):
    count = 0
    while count < min(len(one), len(other)) and one[count] == other[count]:
        count += 1
    return count


SEQUENCES = st.lists(st.integers(0, 2), max_size=6).map(tuple)
STEPS = st.lists(st.tuples(st.sampled_from(["insert", "insert", "look", "remove"]), SEQUENCES), max_size=40)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(STEPS)
def test_against_a_plain_list(steps):
    tree, known = PrefixTree(), []
    for what, tokens in steps:
        best = max((plain_shared(tokens, other) for other in known), default=0)
        if what == "look":
            found, value = tree.longest(key(*tokens))
            assert found == best
            assert (value is None) == (best == 0)
            assert value is None or (value in known and plain_shared(tokens, value) == best)
        elif what == "insert" and best < len(tokens):
            begun = [other for other in known if tokens[: len(other)] == other]
            assert tree.insert(key(*tokens), tokens) == (begun[0] if begun else None)
            known = [other for other in known if other not in begun] + [tokens]
        elif what == "insert":
            with pytest.raises(ValueError, match="known already"):
                tree.insert(key(*tokens), tokens)
        elif tokens in known:
            tree.remove(key(*tokens))
            known.remove(tokens)
        else:
            with pytest.raises(KeyError, match="no sequence"):
                tree.remove(key(*tokens))
        assert sorted(tree.values()) == sorted(known)
        assert_compact(tree._root)


def assert_compact(node, root=True):
    """A node that is no leaf branches, or it would be one with its child; so the tree is as small as its rows."""
    if not root:
        assert len(node.label) and (len(node.children) >= 2) == (node.value is None) and len(node.children) != 1
    for first, child in node.children.items():
        assert first == child.label[0].tobytes()
        assert_compact(child, root=False)


def test_all_columns_tell_tokens_apart():
    tree = PrefixTree()
    tree.insert(key(1, 2, 3), "a")
    other = key(1, 2, 3)
    other[1, 1] = 0
    assert tree.longest(other) == (1, "a")
    assert tree.insert(other, "b") is None
    assert tree.longest(other) == (3, "b")
    assert shared_length(other, key(1, 2, 3)) == 1 and shared_length(other, other[:2]) == 2


def test_what_cannot_be_inserted():
    tree = PrefixTree()
    tree.insert(key(1, 2), "a")
    for tokens in ((), (1,), (1, 2)):
        with pytest.raises(ValueError, match="ask longest") as error:
            tree.insert(key(*tokens), "b")
        one_line(error.value)
    assert tree.insert(key(1, 2, 3), "c") == "a"
    assert list(tree.values()) == ["c"]
