"""Token sequences of any lengths as batches of few shapes, so that few programs are compiled."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from imae_jax.distributed import to_host
from imae_jax.sharding import row_shards, use_mesh


def round_up(n: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `n`."""
    return -(-n // multiple) * multiple


def run_by_length(
    function: Callable[[np.ndarray, np.ndarray], Any],
    rows: Sequence[Sequence[int]],
    *,
    tokens_per_batch: int,
    length_multiple: int,
    mesh: jax.sharding.Mesh | None = None,
) -> Iterator[tuple[int, Any]]:
    """Runs a function over rows of about equal length at a time.

    Args:
        function: of tokens int32 [B, T], padded with 0 on the right, and lengths int32 [B], 0 for rows that
            fill up a batch; returns a pytree of arrays [B, …]. Compiled once for every T.
        rows: token ids.
        tokens_per_batch: B · T is at most this, but B is at least 1; over a mesh, what it divides.
        length_multiple: T is a multiple of it.
        mesh: on which the function runs.

    Yields:
        `(i, values)` for every row, the shortest first: its slices [...] of the arrays, on the host.
    """
    batches: list[list[int]] = []
    for i in sorted(range(len(rows)), key=lambda i: len(rows[i])):
        length = round_up(len(rows[i]), length_multiple)
        if not batches or (len(batches[-1]) + 1) * length > tokens_per_batch:
            batches.append([])
        batches[-1].append(i)
    for batch in batches:
        length = round_up(len(rows[batch[-1]]), length_multiple)
        size = min(max(1, tokens_per_batch // length), len(rows))
        with use_mesh(mesh):
            size = round_up(size, row_shards())
        tokens, lengths = np.zeros((size, length), np.int32), np.zeros(size, np.int32)
        for row, i in enumerate(batch):
            lengths[row] = len(rows[i])
            tokens[row, : lengths[row]] = rows[i]
        with use_mesh(mesh):
            values = jax.tree.map(to_host, function(tokens, lengths))
        for row, i in enumerate(batch):
            yield i, jax.tree.map(lambda array, row=row: array[row], values)
