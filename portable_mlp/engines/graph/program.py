"""Programs: a recorded function of arrays, as a graph of operations.

`portable_mlp.engines.graph.recording` makes programs; engines run or translate them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import numpy as np

Shape = tuple[int, ...]

COMPARISONS = ("equal", "not_equal", "less", "less_equal", "greater", "greater_equal")

REDUCTIONS = {"sum": "add", "prod": "multiply", "max": "maximum", "min": "minimum"}
"""Reductions along axes, and the elementwise function that each applies repeatedly."""

VIEWS = ("reshape", "permute", "index", "broadcast")
"""Operations whose result is a view of their operand's memory."""

NOT_ELEMENTWISE = {"matmul", "concat", "copy", "full", "arange", *REDUCTIONS, *VIEWS}
"""Operations that may read an operand at other positions than they write the result."""

NUMBERS = {
    "add": "{} + {}", "subtract": "{} - {}", "multiply": "{} * {}", "divide": "{} / {}",
    "power": "{} ** {}", "negative": "-{}", "absolute": "abs({})",
}  # fmt: skip
"""Operations on numbers that change from call to call, as Python expressions."""


class Shaped:
    """Base of what has a shape and a data type: arrays and numbers."""

    shape: Shape
    dtype: Any

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def is_number(self) -> bool:
        return isinstance(self.dtype, type)  # np.dtype(int) == int: compare with care


@dataclass(frozen=True, eq=False)
class Node(Shaped):
    """An operation of a program, and the array or number that is its result.

    Attributes
    ----------
    op : str
        The name of an elementwise function, "input", or one of the operations of
        `Recorder`.
    operands : tuple of Node or number
    attrs : tuple
        Other arguments of the operation: axes, a shape, slices; for an elementwise
        function, the data types to which its operands are converted.
    shape : tuple of int
    dtype : numpy.dtype, or the type int or float of a number
        A number may change from call to call.  With an array, it takes the array's data type.
        A number may have axes, such as that of an ensemble's members.
    contiguous : bool
        Whether its elements lie in memory in row-major order, without gaps.
    """

    op: str
    operands: tuple[Any, ...]
    attrs: tuple[Any, ...]
    shape: Shape
    dtype: Any
    contiguous: bool

    @property
    def n_bytes(self) -> int:
        n_bytes: int = self.size * self.dtype.itemsize
        return n_bytes

    @property
    def arrays(self) -> list[Node]:
        """The operands that are arrays."""
        return [o for o in self.operands if isinstance(o, Node) and not o.is_number]

    @property
    def with_axes(self) -> list[Node]:
        """The operands that are arrays, or numbers with axes."""
        return [o for o in self.operands if isinstance(o, Node) and (o.shape or not o.is_number)]

    @property
    def elementwise(self) -> bool:
        """Whether each element depends only on the operands' elements at the same position."""
        return self.op not in NOT_ELEMENTWISE

    @property
    def wanted(self) -> tuple[Any, ...]:
        """The data types to which the operands are converted."""
        if self.op == "where":
            return np.dtype(bool), self.dtype, self.dtype
        if not self.elementwise or self.op == "astype":
            return tuple(o.dtype for o in self.operands)
        return self.attrs

    @property
    def root(self) -> Node:
        """The node that owns the memory: this one, or the one that it is a view of."""
        node = self
        while node.op in VIEWS:
            (node,) = node.operands
        return node


@dataclass(frozen=True, eq=False)
class Program:
    """A recorded function of arrays and numbers.

    Attributes
    ----------
    inputs : tuple of Node
        The arguments, in order.
    outputs : tuple of Node or number
        The results, in order.
    nodes : tuple of Node
        All operations that the outputs depend on, operands before their readers.
    """

    inputs: tuple[Node, ...]
    outputs: tuple[Any, ...]
    nodes: tuple[Node, ...]


def parts_at_home(calculated: list[Node]) -> dict[Node, tuple[Node, int]]:
    """Return the results that can be written directly into the vector they are joined in.

    Parameters
    ----------
    calculated : list of Node
        The operations to compute, in order.

    Returns
    -------
    homes : dict
        For each such result, the node of the vector, and the offset in it in bytes.
    """
    homes: dict[Node, tuple[Node, int]] = {}
    known = set(calculated)
    for x in calculated:
        offset = 0
        for part in x.operands if x.op == "concat" and x.ndim == 1 else ():
            root = part.root
            whole = part.contiguous and part.size == root.size
            if whole and root in known and root not in homes and root.op != "concat":
                homes[root] = x, offset
            offset += part.n_bytes
    return homes


# ---------------------------------------------------------------- trees of arguments


class Spec(NamedTuple):
    """The shape and data type of an argument; a number has a Python type as ``dtype``."""

    shape: Shape
    dtype: Any


def flatten(tree: Any) -> Iterator[Any]:
    """Yield the arrays and numbers of nested tuples and lists, in order; skip None."""
    if isinstance(tree, tuple | list) and not isinstance(tree, Spec):
        for branch in tree:
            yield from flatten(branch)
    elif tree is not None:
        yield tree


def unflatten(tree: Any, values: Iterator[Any]) -> Any:
    """Return a tree of the same form with other values."""
    if isinstance(tree, tuple | list) and not isinstance(tree, Spec):
        branches = [unflatten(branch, values) for branch in tree]
        return type(tree)(*branches) if hasattr(tree, "_fields") else type(tree)(branches)
    return None if tree is None else next(values)


def specify(tree: Any) -> Any:
    """Return the tree of `Spec` of a tree of arrays and numbers."""
    specs = [
        Spec(tuple(x.shape), _dtype(x.dtype)) if hasattr(x, "shape") else Spec((), type(x))
        for x in flatten(tree)
    ]
    return unflatten(tree, iter(specs))


def _dtype(dtype: Any) -> Any:
    """Return the NumPy data type for one of any library; a number's Python type stays."""
    return dtype if isinstance(dtype, type) else np.dtype(str(dtype).rsplit(".", 1)[-1])
