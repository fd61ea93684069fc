"""Which parameters lie together in memory.

An update rule is elementwise, so it does not care whether it sees one parameter or
many laid end to end; what differs is the number of calls (kernels, on a GPU).  A
*leaf* is what the rule is applied to: parameters packed into one vector, or a single
one as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property
from math import prod

from portable_mlp.layers import Param
from portable_mlp.typing import Array, Namespace, Params


@dataclass(frozen=True)
class Layout:
    """How parameters are laid out in leaves.

    Parameters
    ----------
    shapes : tuple of shapes, one a parameter
    leaves : tuple of tuples of int
        For each leaf, the parameters it holds.
    groups : tuple of str
        For each leaf, the group of its first parameter.
    """

    shapes: tuple[tuple[int, ...], ...]
    leaves: tuple[tuple[int, ...], ...]
    groups: tuple[str, ...]

    @classmethod
    def plan(cls, params: tuple[Param, ...], treatment: Callable[[str], Hashable] | None) -> Layout:
        """Pack parameters whose groups are treated alike.

        In a leaf the order is that of the groups' first appearance (weights, then
        biases), and in each group that of the parameters, as scikit-learn's L-BFGS
        packs.

        Parameters
        ----------
        params : tuple of Param
        treatment : callable, optional
            From a group to anything; groups with equal results share a leaf.  None:
            every parameter is a leaf.
        """
        shapes = tuple(p.shape for p in params)
        if treatment is None:
            alone = tuple((i,) for i in range(len(params)))
            return cls(shapes, alone, tuple(p.group for p in params))
        together: dict[Hashable, tuple[int, ...]] = {}
        for group in dict.fromkeys(p.group for p in params):
            members = tuple(i for i, p in enumerate(params) if p.group == group)
            key = treatment(group)
            together[key] = together.get(key, ()) + members
        leaves = tuple(together.values())
        return cls(shapes, leaves, tuple(params[leaf[0]].group for leaf in leaves))

    def pack(self, arrays: Params, xp: Namespace) -> list[Array]:
        """Arrays in the order of the parameters -> leaves."""
        return [
            arrays[leaf[0]]
            if len(leaf) == 1
            else xp.concat([xp.reshape(arrays[i], (-1,)) for i in leaf])
            for leaf in self.leaves
        ]

    def unpack(self, leaves: Params, xp: Namespace) -> list[Array]:
        """Leaves -> arrays in the order of the parameters: views, where arrays have them."""
        arrays: list[Array] = [None] * len(self.shapes)
        for leaf, members in zip(leaves, self.leaves, strict=True):
            if len(members) == 1:
                arrays[members[0]] = leaf
                continue
            for i in members:
                arrays[i] = xp.reshape(leaf[self._spans[i]], self.shapes[i])
        return arrays

    @cached_property
    def _spans(self) -> dict[int, slice]:
        """For each parameter, its place in its leaf."""
        spans = {}
        for members in self.leaves:
            start = 0
            for i in members:
                end = start + prod(self.shapes[i])
                spans[i] = slice(start, end)
                start = end
        return spans
