"""Best-fit-decreasing bins under two budgets: which samples share a packed row."""

from bisect import bisect_left, insort
from collections.abc import Sequence


def pack_bins(sizes: Sequence[tuple[int, int]], row_tokens: int, row_patches: int | None = None) -> list[list[int]]:
    """Puts samples into as few rows as a greedy pass finds.

    The largest sample comes first, and each goes where the fewest tokens stay free. In time n log n for budgets that
    seldom refuse a picture; a row's own samples stand in their given order, and rows in the order of their first.

    Source: D. S. Johnson, Near-Optimal Bin Packing Algorithms (1973), best fit decreasing; at most 11/9 of the
    optimum, plus one, where tokens alone count.

    Args:
        sizes: (tokens, vision patches) of each sample, each within the budgets.
        row_tokens (`int`): tokens that a row may hold.
        row_patches (`int`, *optional*): vision patches that a row may hold; any number by default.
    Returns:
        the samples of each row, by index: every index once.
    Raises:
        ValueError: for a sample that is larger than a row.
    """

    def share(index: int) -> float:
        tokens, patches = sizes[index]
        return max(tokens / row_tokens, patches / row_patches if row_patches else 0)

    rows: list[list[int]] = []
    free: list[tuple[int, int, int]] = []  # tokens, patches and row, the fullest first
    for index in sorted(range(len(sizes)), key=share, reverse=True):
        tokens, patches = sizes[index]
        if row_patches is None:
            patches = 0
        if tokens > row_tokens or patches > (row_patches or 0):
            raise ValueError(
                f"sample {index} has {tokens} tokens and {patches} vision patches, more than a row of {row_tokens} "
                f"tokens and {row_patches} patches; leave it out or allow longer rows."
            )
        place = bisect_left(free, (tokens, 0, 0))
        while place < len(free) and free[place][1] < patches:
            place += 1
        if place == len(free):
            rows.append([])
            left = (row_tokens, row_patches or 0, len(rows) - 1)
        else:
            left = free.pop(place)
        rows[left[2]].append(index)
        insort(free, (left[0] - tokens, left[1] - patches, left[2]))
    return sorted(sorted(row) for row in rows)
