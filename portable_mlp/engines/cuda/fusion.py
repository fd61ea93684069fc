"""Fusion: which operations of a program share a CUDA kernel, and where results lie.

Consecutive operations on the same points become one kernel: a layer's bias with its
activation, its derivative, a whole loss, the update of all parameters.  A kernel ends where
another thread needs a result: in a matrix product, a sum over many elements, or a
transposition.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal

import numpy as np

from portable_mlp.engines.cuda.launches import Place
from portable_mlp.engines.graph.c_source import FUNCTIONS, TYPES
from portable_mlp.engines.graph.elements import (
    Access,
    broadcast,
    indices_of,
    linear,
    long_axes,
    through,
)
from portable_mlp.engines.graph.program import (
    REDUCTIONS,
    VIEWS,
    Node,
    Program,
    Shape,
    parts_at_home,
)
from portable_mlp.engines.graph.recording import Unrecordable

_LONG = 64  # elements; many threads share a sum over more
_ROW = 16  # elements of a row that a thread keeps in registers; of 32 in float64 some spill
_MOST = 2**30  # elements: a kernel counts them in an int, which also holds one stride more
_SHARE = 8192  # elements that one block adds up


@dataclass
class Launch:
    """A launch: a kernel on points, a matrix product, a sum over all elements, or a copy.

    A copy moves a part into the array that it is joined in.  An output moves to the donated
    array that it replaces in two launches: aside, and then home.
    """

    kind: Literal["points", "product", "total", "copy", "move aside", "move home"]
    nodes: list[Node] = field(default_factory=list)
    rows: int = 0  # if each thread computes a row: the number of rows
    points: int = 0
    offset: int = 0  # of a copy: the first element of the joined array to write
    # Of a copy: contiguous elements, and the stride from such a run to the next one
    runs: tuple[int, int] = (0, 0)


class Fusion:
    """The launches of a program, and the memory of their results."""

    def __init__(self, program: Program, n_donated: int) -> None:
        self.program = program
        self.arrays = [x for x in program.inputs if not x.is_number]
        self.numbers: dict[Node, int] = {}  # first column in the table of numbers
        self.n_numbers = 0
        for x in program.inputs:
            if x.is_number:
                self.numbers[x] = self.n_numbers
                self.n_numbers += x.size
        for x in (*self.arrays, *program.nodes):
            if not x.is_number and str(x.dtype) not in TYPES:
                raise Unrecordable(f"there are no CUDA kernels of {x.dtype}")
            if x.size > _MOST:
                raise Unrecordable(f"it has an array of more than {_MOST} elements")
        self.donated = self.arrays[:n_donated]
        self.outputs = program.outputs[:n_donated]
        self.results = program.outputs[n_donated:]
        calculated = [
            x for x in program.nodes if x.op not in VIEWS and not x.is_number and not inline(x)
        ]
        # Short rows that are summed: one thread computes a whole row
        summed = [
            (x.operands[0].shape, *x.attrs[0])
            for x in calculated
            if x.op in REDUCTIONS and len(x.attrs[0]) == 1 and x.operands[0].ndim == 2
        ]
        shapes = {(shape[1 - axis], shape[axis]) for shape, axis in summed}
        self.few = {(n, k) for n, k in shapes if 1 < k <= _ROW and n not in (1, k)}
        self.long = {n for n, _ in self.few}
        self.homes = parts_at_home(calculated)
        self.launches: list[Launch] = []
        self.at: dict[Node, int] = {}
        self.number = {x: i for i, x in enumerate((*program.inputs, *program.nodes))}
        self.places: dict[Node, Place] = {x: Place(i, 0) for i, x in enumerate(self.arrays)}
        self.constants: list[Node] = []
        self.order = {x: i for i, x in enumerate(calculated)}
        for x in calculated:
            self._put(x)
        for y in self.outputs:
            self._need(y)
        for base, _ in self._last_reads():
            self._need(base)

    # ------------------------------------------------------------ launches

    def _put(self, x: Node) -> None:
        """Launch x, after what it reads, if it cannot be a part of a kernel on points."""
        if x.op in ("max", "min") and x.dtype.kind != "f":
            raise Unrecordable(f"it takes the {x.op} of {x.dtype}")
        if x.op == "matmul" and any(o.ndim > 1 for o in x.operands):
            self._check_product(x)
            self.constants += [o.root for o in x.operands if inline(o.root)]
            self._launch(Launch("product", [x]))
        elif x.op == "matmul" or (x.op in REDUCTIONS and x.size == 1 and _length(x) > _LONG):
            self._launch(Launch("total", [x], points=_length(x)))
        elif x.op == "concat":
            self._put_concat(x)

    def _launch(self, launch: Launch) -> None:
        for base, _ in list(self._where(launch)):
            self._need(base)
        for x in launch.nodes:
            self.at[x] = len(self.launches)
        self.launches.append(launch)

    def _put_concat(self, x: Node) -> None:
        (axis,) = x.attrs
        inner = prod(x.shape[axis + 1 :])
        offset = 0
        last = 0
        for part in x.operands:
            if not part.size:
                continue
            self._need(part)
            if self.homes.get(part.root) != (x, offset * x.dtype.itemsize):
                runs = part.shape[axis] * inner, x.shape[axis] * inner
                copy = Launch("copy", [x, part], points=part.size, offset=offset, runs=runs)
                self.launches.append(copy)
                last = len(self.launches) - 1
            last = max(last, self.at.get(part.root, 0))
            offset += part.shape[axis] * inner
        self.at[x] = last

    def _need(self, x: Node) -> None:
        """Put x, and all that it needs and no earlier launch has computed, into a kernel.

        Kernels are made as late as possible, so that few results have to be kept.
        """
        if inline(x) or x.op in VIEWS:
            for base, _ in list(self._bases(x, Access("0"))):
                self._need(base)
            return
        if x in self.at or x not in self.order:
            return
        rows = self._rows(x)
        points = rows or x.size
        together, first = {x}, 0
        open_ = [x]
        while open_:
            reader = open_.pop()
            self._check_pointwise(reader)
            for base, access in self._reads(reader, self._own(reader, rows)):
                same = base in self.order and (self._rows(base), self._rows(base) or base.size) == (
                    rows, points,
                )  # fmt: skip
                local = same and self._own(base, rows).flat == access.flat
                if local and base not in self.at and self._pointwise(base):
                    if base not in together:
                        together.add(base)
                        open_.append(base)
                    continue
                self._need(base)
                if base in self.at:
                    here = local and self.launches[self.at[base]].kind == "points"
                    first = max(first, self.at[base] + (not here))
        if together & self.at.keys():  # a launch added meanwhile needed some of them
            self._need(x)
            return
        nodes = sorted(together, key=self.order.__getitem__)
        for i in range(first, len(self.launches)):
            launch = self.launches[i]
            if launch.kind == "points" and (launch.rows, launch.points) == (rows, points):
                launch.nodes += nodes
                break
        else:
            i = len(self.launches)
            self.launches.append(Launch("points", nodes, rows, points))
        self.at |= dict.fromkeys(nodes, i)

    def _pointwise(self, x: Node) -> bool:
        """Tell whether x is computed in a kernel on points."""
        if x.op in ("matmul", "concat"):
            return False
        return not (x.op in REDUCTIONS and x.size == 1 and _length(x) > _LONG)

    def _check_pointwise(self, x: Node) -> None:
        if x.elementwise and x.op not in (*FUNCTIONS, "absolute", "astype"):
            raise Unrecordable(f"there is no CUDA kernel of {x.op}")

    def _rows(self, x: Node) -> int:
        """Return the number of rows if a thread computes a row; 0 if it computes an element."""
        rows = self._rows_of(x.shape)
        # A thread with a row of sums would have to add up a row for each of them
        several = x.op in REDUCTIONS and any(n not in (1, rows) for n in x.shape)
        return 0 if several else rows

    def _rows_of(self, shape: Shape) -> int:
        shape = long_axes(shape)
        if len(shape) == 1:
            return shape[0] if shape[0] in self.long else 0
        if len(shape) != 2:
            return 0
        return next((n for n, k in (shape, shape[::-1]) if (n, k) in self.few), 0)

    def _own(self, x: Node, rows: int) -> Access:
        """Return the element of x that thread i computes; in a row, the j-th element."""
        if not rows:
            return Access("i")
        indices = ["i" if n == rows else "0" if n == 1 else "j" for n in x.shape]
        return linear(x.shape, indices)

    def _check_product(self, x: Node) -> None:
        if any(not o.size for o in x.operands):
            raise Unrecordable("it multiplies matrices without elements")
        if x.dtype not in (np.float32, np.float64) or any(o.dtype != x.dtype for o in x.operands):
            raise Unrecordable(f"it multiplies matrices of {x.dtype}")
        for root in (o.root for o in x.operands):
            if inline(root) and (root.op != "full" or isinstance(root.operands[0], Node)):
                raise Unrecordable("it multiplies by a matrix that is nowhere in memory")

    # ------------------------------------------------------------ what is read

    def _reads(self, x: Node, access: Access) -> Iterator[tuple[Node, Access]]:
        """Yield the arrays in memory, and the element of each, that an element of x depends on."""
        for operand, where in self._operands(x, access):
            if isinstance(operand, Node) and not operand.is_number:
                yield from self._bases(operand, where)

    def _bases(self, x: Node, access: Access) -> Iterator[tuple[Node, Access]]:
        while x.op in VIEWS:
            access = through(x, access)
            (x,) = x.operands
        if not inline(x):
            yield x, access
        elif x.elementwise:
            yield from self._reads(x, access)

    def _operands(self, x: Node, access: Access) -> Iterator[tuple[Any, Access]]:
        """Yield the operands of x, and the element of each that an element of x depends on."""
        if x.op in REDUCTIONS:
            (operand,) = x.operands
            axes, keepdims = x.attrs
            kept = iter(indices_of(x.shape, access))
            indices = []
            for axis, n in enumerate(operand.shape):
                if axis in axes:
                    if keepdims:
                        next(kept)
                    indices.append("0" if n == 1 else self._variable(operand, axis))
                else:
                    indices.append(next(kept))
            yield operand, linear(operand.shape, indices)
            return
        for operand in x.operands:
            if operand in x.with_axes:
                yield operand, broadcast(operand, x.shape, access)
            else:
                yield operand, access

    def _variable(self, x: Node, axis: int) -> str:
        """Return the loop variable along an axis that is summed."""
        return "j" if self._rows(x) and x.shape[axis] != self._rows(x) else f"r{axis}"

    def _where(self, launch: Launch) -> Iterator[tuple[Node, Access]]:
        """Yield the arrays, and the element of each, that a launch reads."""
        for x in launch.nodes:
            if launch.kind == "product":
                yield from ((o.root, Access("")) for o in x.operands)
            elif launch.kind == "points":
                yield from self._reads(x, self._own(x, launch.rows))
            elif launch.kind == "total":
                for operand in x.operands:
                    yield from self._bases(operand, Access("i"))
        if launch.kind == "copy":
            yield from self._bases(launch.nodes[1], Access("i"))

    # ------------------------------------------------------------ memory

    def _settle(self) -> None:
        """Place outputs over the donated arrays, or copy them there at the end."""
        readers: dict[Node, list[tuple[int, str]]] = defaultdict(list)
        for i, launch in enumerate(self.launches):
            for base, access in self._where(launch):
                readers[base].append((i, access.flat))
        end = len(self.launches)
        for base, access in self._last_reads():
            readers[base].append((end, access.flat))
        for y in self.outputs:
            for base, _ in self._bases(y, Access("0")):
                readers[base].append((end, ""))
        moves = []
        for x, y in zip(self.donated, self.outputs, strict=True):
            base = y
            while base.op == "reshape":
                (base,) = base.operands
            if base is x:
                continue
            at = self.at.get(base, -1)
            in_place = (
                at >= 0
                and self.launches[at].kind == "points"
                and base in self.launches[at].nodes  # not joined from parts
                and base not in self.homes
                and base not in self.places
                and base.dtype == x.dtype
                and all(
                    i < at or (i == at and flat == self._own(base, self.launches[at].rows).flat)
                    for i, flat in readers[x]
                )
            )
            # Parts are written one by one: the donated array must not be read any more
            joined = base.op == "concat" and not readers[x] and base.dtype == x.dtype
            if in_place or (joined and base not in self.places):
                self.places[base] = self.places[x]
            else:
                moves.append((x, y))
        if {base for base, _ in self._last_reads()} & {x for x, _ in moves}:
            raise Unrecordable("it returns a number out of an array that it overwrites")
        # All aside first, then home, since an output may read what another one overwrites
        for x, y in moves:
            self.launches.append(Launch("move aside", [x, y], points=x.size))
        for x, y in moves:
            self.launches.append(Launch("move home", [x, y], points=x.size))

    def _last_reads(self) -> Iterator[tuple[Node, Access]]:
        for y in self.results:
            if isinstance(y, Node) and not y.is_number:
                if y.ndim > 1:
                    raise Unrecordable(f"it returns an array of shape {y.shape}")
                yield from self._bases(y, Access("0", ("0",) * y.ndim))

    def _allocate(self) -> int:
        """Place the results that other launches read; return the bytes of work memory."""
        born: dict[Any, int] = {}
        dies: dict[Any, int] = {}
        size: dict[Any, int] = {}
        end = len(self.launches)

        def owner(x: Node) -> Node:
            return self.homes[x][0] if x in self.homes else x

        def live(key: Any, n_bytes: int, since: int, until: int) -> None:
            born[key] = min(born.get(key, since), since)
            dies[key] = max(dies.get(key, until), until)
            size[key] = n_bytes

        for x in self.constants:
            live(x, x.n_bytes, -1, end + 1)
        for i, launch in enumerate(self.launches):
            reads = list(self._where(launch))
            if launch.kind == "move aside":
                reads = list(self._bases(launch.nodes[1], Access("i")))
                live(("aside", launch.nodes[0]), launch.nodes[0].n_bytes, i, end)
            for base, access in reads:
                if not self._is_local(base, access, i):
                    live(owner(base), owner(base).n_bytes, self.at.get(base, -1), i)
            written = launch.nodes[:1] if launch.kind == "copy" else launch.nodes
            for x in written:
                if (
                    launch.kind in ("product", "total")
                    or x in self.homes
                    or written != launch.nodes
                ):
                    live(owner(x), owner(x).n_bytes, i, i)
            if launch.kind == "total":
                live(("parts", launch.nodes[0]), 8 * n_blocks(launch), i, i)
        for base, _ in self._last_reads():
            live(owner(base), owner(base).n_bytes, self.at.get(base, -1), end)
        work = len(self.arrays)
        total = 0
        placed: list[tuple[Any, int]] = []
        # First fit: the lowest offset that is free for the whole life of a result
        for key in sorted(born, key=lambda key: born[key]):
            if key in self.places:
                continue
            start = 0
            for other, offset in sorted(placed, key=lambda pair: pair[1]):
                together = born[key] <= dies[other] and born[other] <= dies[key]
                if together and start + size[key] > offset and start < offset + size[other]:
                    start = -(-(offset + size[other]) // 256) * 256
            placed.append((key, start))
            self.places[key] = Place(work, start)
            total = max(total, start + size[key])
        for x, (home, offset) in self.homes.items():
            if home in self.places:
                there = self.places[home]
                self.places[x] = Place(there.memory, there.offset + offset)
        return max(total, 1)

    def _is_local(self, base: Node, access: Access, i: int) -> bool:
        """Tell whether a launch computes this element itself, in the same thread."""
        if self.at.get(base) != i or base not in self.launches[i].nodes:
            return False
        return access.flat == self._own(base, self.launches[i].rows).flat


def inline(x: Node) -> bool:
    """Tell whether x is computed again at each use, which is cheaper than to store it."""
    return x.op in ("full", "arange") or (x.shape == () and x.elementwise and x.op != "input")


def _length(x: Node) -> int:
    """Return the number of elements that x sums up."""
    n: int = x.operands[0].size
    return n


def n_blocks(launch: Launch) -> int:
    """Return the number of thread blocks that share a sum over all elements."""
    return min(-(-launch.points // _SHARE), 256)
