"""Packing: how parameters share memory.

An update rule is elementwise, so its result is the same for separate parameters and for
parameters joined in one vector.  Only the number of calls differs (of kernels, on a GPU).
A *leaf* is an array to which the rule is applied: several parameters packed into one
vector, or a single parameter.  In an ensemble a leaf has two axes, (members, n), so that
one number for each member, (members, 1), broadcasts against it.
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
    """The assignment of parameters to leaves.

    Parameters
    ----------
    shapes : tuple of tuples of int
        Shapes of the parameters.
    leaves : tuple of tuples of int
        For each leaf, the indices of the parameters it holds.
    groups : tuple of str
        For each leaf, the group of its first parameter.
    members : int, optional
        Number of members of an ensemble, which is then the first axis of all shapes.
    """

    shapes: tuple[tuple[int, ...], ...]
    leaves: tuple[tuple[int, ...], ...]
    groups: tuple[str, ...]
    members: int | None = None

    @classmethod
    def plan(cls, params: tuple[Param, ...], treatment: Callable[[str], Hashable] | None) -> Layout:
        """Return a layout in which groups with the same treatment share a leaf.

        Within a leaf, groups come in the order of their first appearance (weights, then
        biases), and the parameters of a group in their own order.  scikit-learn's L-BFGS
        packs in the same order.

        Parameters
        ----------
        params : tuple of Param
        treatment : callable, optional
            Function of a group; groups with equal results share a leaf.  If None, every
            parameter is a leaf.  The parameters of an ensemble are always separate leaves.
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
        """Pack arrays, given in the order of the parameters, into leaves."""
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
        """Return the arrays in the order of the parameters; views where the library has them."""
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
        """The slice of each parameter in its leaf, by the parameter's index."""
        spans = {}
        for members in self.leaves:
            start = 0
            for i in members:
                end = start + prod(self.shapes[i])
                spans[i] = slice(start, end)
                start = end
        return spans
