"""A tree of token sequences that finds the longest beginning which a new one shares with any of them."""

from collections.abc import Iterator
from typing import Any

import numpy as np


class _Node:
    """`label` (tokens, columns) leads here from the parent; leaves hold a value, all others at least two children."""

    __slots__ = ("children", "label", "value")

    def __init__(self, label: np.ndarray, value: Any = None):
        self.label, self.value = label, value
        self.children: dict[bytes, _Node] = {}


class PrefixTree:
    """Values under sequences of tokens, none of which is the beginning of another.

    A radix tree: looking up, inserting and removing cost what the sequence is long, however many there are. A token is
    a row of integers, so that what tells it from others may be more than its id. After RadixAttention (Zheng et al.,
    arXiv 2312.07104, section 3).
    """

    def __init__(self):
        self._root = _Node(np.empty((0, 0), dtype=np.int64))

    def longest(self, key: np.ndarray) -> tuple[int, Any]:
        """How many leading tokens of `key` (tokens, columns) some sequence shares, and the value of one that does.

        `(0, None)` if there is none.
        """
        node, matched = self._root, 0
        for child, common in self._walk(key):
            node, matched = child, matched + common
        if not matched:
            return 0, None
        while node.children:
            node = next(iter(node.children.values()))
        return matched, node.value

    def insert(self, key: np.ndarray, value: Any) -> Any:
        """Adds a sequence; returns the value of the one that it goes on from and takes the place of, or `None`.

        Raises:
            ValueError: if `key` is empty, or the beginning of a sequence that is there.
        """
        node, matched, common = self._root, 0, 0
        for child, shared in self._walk(key):
            node, common = child, shared
            matched += shared
        if matched == len(key):
            raise ValueError(f"a sequence of {len(key)} tokens is known already, or empty; ask longest() first.")
        if common < len(node.label):
            self._split(node, common)
        replaced, node.value = node.value, None
        if replaced is not None:
            node.label, node.value = np.concatenate((node.label, key[matched:])), value
        else:
            node.children[key[matched].tobytes()] = _Node(key[matched:].copy(), value)
        return replaced

    def remove(self, key: np.ndarray) -> None:
        """Takes out the sequence `key`.

        Raises:
            KeyError: if it is not there.
        """
        steps = list(self._walk(key))
        path = [self._root, *(node for node, _ in steps)]
        leaf = path[-1]
        whole = len(key) == sum(common for _, common in steps) == sum(len(node.label) for node in path)
        if leaf.value is None or not whole:
            raise KeyError(f"no sequence of these {len(key)} tokens.")
        parent = path[-2]
        del parent.children[leaf.label[0].tobytes()]
        if parent is not self._root and len(parent.children) == 1:
            (only,) = parent.children.values()
            parent.label = np.concatenate((parent.label, only.label))
            parent.children, parent.value = only.children, only.value

    def values(self) -> Iterator[Any]:
        """All values, in no particular order."""
        nodes = [self._root]
        while nodes:
            node = nodes.pop()
            nodes.extend(node.children.values())
            if node.value is not None:
                yield node.value

    def _walk(self, key: np.ndarray) -> Iterator[tuple[_Node, int]]:
        """The nodes along `key`, each with how many tokens of its label are shared; only the last may share a part."""
        node, matched = self._root, 0
        while matched < len(key):
            node = node.children.get(key[matched].tobytes())
            if node is None:
                return
            common = shared_length(node.label, key[matched:])
            yield node, common
            matched += common
            if common < len(node.label):
                return

    def _split(self, node: _Node, length: int) -> None:
        """Puts a node in the middle of a label."""
        rest = _Node(node.label[length:].copy(), node.value)
        rest.children, node.children = node.children, {rest.label[0].tobytes(): rest}
        node.label, node.value = node.label[:length].copy(), None


def shared_length(one: np.ndarray, other: np.ndarray) -> int:
    """How many leading rows two arrays (rows, columns) have in common."""
    length = min(len(one), len(other))
    differ = (one[:length] != other[:length]).any(1)
    return int(differ.argmax()) if differ.any() else length
