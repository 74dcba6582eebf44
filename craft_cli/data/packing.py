"""Pack rows into shared sequences, so that a batch has hardly any padding and each batch the same shape."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

from craft_cli.data.tokens import Encoded


def packed(encoded: Encoded, limit: int) -> Encoded:
    """Pack rows of token targets into sequences of at most `limit` tokens.

    The sequences are the same in every epoch, their order is not.
    """
    assert encoded.targets is not None
    together = best_fit(encoded.lengths, limit)
    return Encoded(
        features=[
            {"input_ids": [token for row in rows for token in encoded.features[row]["input_ids"]]} for rows in together
        ],
        labels=None,
        cut=encoded.cut,
        limit=encoded.limit,
        targets=[[target for row in rows for target in encoded.targets[row]] for rows in together],
        segments=[[number for number, row in enumerate(rows) for _ in encoded.targets[row]] for rows in together],
    )


def best_fit(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Best fit decreasing: each row, the longest first, into the sequence where the least space remains.

    Args:
        lengths: tokens of each row, at most `limit`.
        limit: maximum tokens per sequence.

    Returns:
        The row numbers of each sequence.
    """
    together: list[list[int]] = []
    space: list[tuple[int, int]] = []  # (free tokens, sequence), sorted
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        at = bisect_left(space, (lengths[row], 0))
        if at < len(space):
            free, number = space.pop(at)
        else:
            free, number = limit, len(together)
            together.append([])
        together[number].append(row)
        insort(space, (free - lengths[row], number))
    return together
