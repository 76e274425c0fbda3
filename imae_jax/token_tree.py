"""Token trees: sequences that begin alike share the tokens of their beginning, which are computed once."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class TokenTree:
    """Sequences laid out depth-first as nodes, each a token behind its ancestors.

    Attributes:
        tokens: of every node.
        depths: how many ancestors a node has: its position in each of its sequences.
        ends: one more than the index of a node's last descendant: a node's descendants are the nodes between.
        paths: for every sequence the indices of its nodes.
    """

    tokens: list[int]
    depths: list[int]
    ends: list[int]
    paths: list[list[int]]

    def __len__(self) -> int:
        return len(self.tokens)


def token_tree(sequences: Sequence[Sequence[int]]) -> TokenTree:
    """The tree of some token sequences."""
    tree = TokenTree([], [], [], [[]] * len(sequences))
    path: list[int] = []
    before: Sequence[int] = ()
    # Sorted, so that sequences which begin alike are neighbours.
    for i in sorted(range(len(sequences)), key=lambda i: sequences[i]):
        sequence = sequences[i]
        shared = common_length(before, sequence)
        for node in path[shared:]:
            tree.ends[node] = len(tree)
        path = path[:shared] + list(range(len(tree), len(tree) + len(sequence) - shared))
        tree.tokens.extend(sequence[shared:])
        tree.depths.extend(range(shared, len(sequence)))
        tree.ends.extend([0] * (len(sequence) - shared))
        tree.paths[i], before = path, sequence
    for node in path:
        tree.ends[node] = len(tree)
    return tree


def common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """How many items two sequences have in common at their beginning."""
    differ = (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    return next(differ, min(len(first), len(second)))


def attend_to_ancestors(ends: jax.Array) -> jax.Array:
    """Bool [B, S, S], True where a node may look: at its ancestors and itself.

    Args:
        ends: int32 [B, S], `TokenTree.ends` in rows of trees; 0 at padding, which neither looks nor is seen.
    """
    node = jnp.arange(ends.shape[1])
    looking, seen = node[:, None], node[None, :]
    return (seen <= looking) & (looking < ends[:, None, :])
