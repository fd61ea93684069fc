"""Programs: what a function of arrays did, as a graph of operations.

`portable_mlp.engines.graph.recording` makes them; what runs or translates them starts here.
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
"""Functions along axes, and the elementwise function that each repeats."""

VIEWS = ("reshape", "permute", "index", "broadcast")
"""Operations that only look at their operand's memory in another way."""


NOT_ELEMENTWISE = {"matmul", "concat", "copy", "full", "arange", *REDUCTIONS, *VIEWS}
"""Operations that may read an operand's elements elsewhere than they write the result's."""

NUMBERS = {
    "add": "{} + {}", "subtract": "{} - {}", "multiply": "{} * {}", "divide": "{} / {}",
    "power": "{} ** {}", "negative": "-{}", "absolute": "abs({})",
}  # fmt: skip
"""What can be done with numbers that change from call to call, in Python."""


class Shaped:
    """What follows from a shape and a data type, of an array or a number."""

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
    """An operation of a program, and the array or number that it makes.

    Attributes
    ----------
    op : str
        The name of an elementwise function, "input", or one of the operations of
        `Recorder`.
    operands : tuple of Node or number
    attrs : tuple
        What else the operation needs: axes, a shape, slices; of an elementwise
        function, the data types it takes its operands in.
    shape : tuple of int
    dtype : numpy.dtype, or the type int or float of a number
        Numbers change from call to call, and take the data type of what they meet.  They may
        have axes, such as that of an ensemble's members.
    contiguous : bool
        Whether its elements lie in memory row by row, without gaps.
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
        """Whether each element is computed from those in the same place of the operands."""
        return self.op not in NOT_ELEMENTWISE

    @property
    def wanted(self) -> tuple[Any, ...]:
        """The data types in which the operands are taken."""
        if self.op == "where":
            return np.dtype(bool), self.dtype, self.dtype
        if not self.elementwise or self.op == "astype":
            return tuple(o.dtype for o in self.operands)
        return self.attrs

    @property
    def root(self) -> Node:
        """The node whose memory this one looks at."""
        node = self
        while node.op in VIEWS:
            (node,) = node.operands
        return node


@dataclass(frozen=True, eq=False)
class Program:
    """A recorded function.

    Attributes
    ----------
    inputs : tuple of Node
        The arguments' arrays and numbers, in order.
    outputs : tuple of Node or number
        What the function returned, in order.
    nodes : tuple of Node
        All that the outputs need, operands first.
    """

    inputs: tuple[Node, ...]
    outputs: tuple[Any, ...]
    nodes: tuple[Node, ...]


def parts_at_home(calculated: list[Node]) -> dict[Node, tuple[Node, int]]:
    """Return what can be written straight into the vector it is joined in, and its offset there.

    Parameters
    ----------
    calculated : list of Node
        What is to be computed; in each a vector's place is looked for.
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
    """What a program has to know of an argument: of a number, its type as ``dtype``."""

    shape: Shape
    dtype: Any


def flatten(tree: Any) -> Iterator[Any]:
    """Arrays and numbers in nested tuples and lists, in order; None is none."""
    if isinstance(tree, tuple | list) and not isinstance(tree, Spec):
        for branch in tree:
            yield from flatten(branch)
    elif tree is not None:
        yield tree


def unflatten(tree: Any, values: Iterator[Any]) -> Any:
    """Return a tree of the same form, of other values."""
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
    """NumPy's data type, whatever library's is given; of numbers, Python's type."""
    return dtype if isinstance(dtype, type) else np.dtype(str(dtype).rsplit(".", 1)[-1])
