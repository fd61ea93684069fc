"""Which parameters lie together in memory.

An update rule is elementwise, so it does not care whether it sees one parameter or
many laid end to end; what differs is the number of calls (kernels, on a GPU).  A
*leaf* is what the rule is applied to: parameters packed into one vector, or a single
one.  That of an ensemble's members has two axes, (members, n), so that numbers of the
members' own, (members, 1), go with it.
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
    members : int, optional
        The first axis of all shapes is that of so many members.
    """

    shapes: tuple[tuple[int, ...], ...]
    leaves: tuple[tuple[int, ...], ...]
    groups: tuple[str, ...]
    members: int | None = None

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
            every parameter is a leaf.  So are those of members, of which each is one run of
            memory.
        """
        shapes = tuple(p.shape for p in params)
        members = params[0].members if params else None
        if treatment is None or members is not None:
            alone = tuple((i,) for i in range(len(params)))
            return cls(shapes, alone, tuple(p.group for p in params), members)
        together: dict[Hashable, tuple[int, ...]] = {}
        for group in dict.fromkeys(p.group for p in params):
            alike = tuple(i for i, p in enumerate(params) if p.group == group)
            key = treatment(group)
            together[key] = together.get(key, ()) + alike
        leaves = tuple(together.values())
        return cls(shapes, leaves, tuple(params[leaf[0]].group for leaf in leaves))

    @cached_property
    def leaf_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of the leaves."""
        sizes = [sum(prod(self.shapes[i]) for i in leaf) for leaf in self.leaves]
        if self.members is not None:
            return tuple((self.members, size // self.members) for size in sizes)
        return tuple(
            self.shapes[leaf[0]] if len(leaf) == 1 else (size,)
            for leaf, size in zip(self.leaves, sizes, strict=True)
        )

    def pack(self, arrays: Params, xp: Namespace) -> list[Array]:
        """Arrays in the order of the parameters -> leaves."""
        if self.members is not None:
            pairs = zip(arrays, self.leaf_shapes, strict=True)
            return [xp.reshape(array, shape) for array, shape in pairs]
        return [
            arrays[leaf[0]]
            if len(leaf) == 1
            else xp.concat([xp.reshape(arrays[i], (-1,)) for i in leaf])
            for leaf in self.leaves
        ]

    def unpack(self, leaves: Params, xp: Namespace) -> list[Array]:
        """Leaves -> arrays in the order of the parameters: views, where arrays have them."""
        if self.members is not None:
            pairs = zip(leaves, self.shapes, strict=True)
            return [xp.reshape(leaf, shape) for leaf, shape in pairs]
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
