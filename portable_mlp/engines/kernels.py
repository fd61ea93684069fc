"""A recorded program as CUDA kernels and matrix products.

All that is computed at the same points, one after the other, becomes one kernel: a layer's
bias with its activation, its derivative, a whole loss, the update of all parameters.  A
kernel has a thread for each of its points and keeps what stands between in registers.  It
ends where a result is needed elsewhere than where it was computed: by a matrix product, a
sum over many elements, or through a transposition.

Kernels read the numbers that change from step to step (learning rate, seeds) from a table
on the device, in the row that a counter on the device names, so that a launch never
changes and can be replayed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import isfinite, isnan, prod
from typing import Any, NamedTuple

import numpy as np

from portable_mlp.engines.calls import parts_at_home
from portable_mlp.engines.cplusplus import (
    COMBINE,
    FUNCTIONS,
    GATHER,
    LAST,
    POINTWISE,
    PREAMBLE,
    TOTAL,
    TYPES,
)
from portable_mlp.engines.elements import (
    Access,
    broadcast,
    indices_of,
    keys,
    linear,
    long_axes,
    row_strides,
    through,
)
from portable_mlp.engines.recording import (
    REDUCTIONS,
    VIEWS,
    Node,
    Program,
    Shape,
    Unrecordable,
)

# ---------------------------------------------------------------- what a program becomes


class Place(NamedTuple):
    """A number of bytes behind the start of a memory: of an input's, or of the work memory."""

    memory: int
    offset: int


class View(NamedTuple):
    """An array that begins at a place; what a kernel gets as a pointer."""

    place: Place
    shape: Shape
    strides: Shape  # in elements
    dtype: Any


@dataclass(frozen=True)
class Kernel:
    """A launch of a kernel, which gets the table, the counter, and these arrays.

    Attributes
    ----------
    name : str
    blocks, threads : int
    arguments : tuple of View
    """

    name: str
    blocks: int
    threads: int
    arguments: tuple[View, ...]


@dataclass(frozen=True)
class Product:
    """out = left right; matrices, each with contiguous rows or contiguous columns."""

    left: View
    right: View
    out: View


@dataclass(frozen=True)
class Kernels:
    """What `compile_program` returns.

    Attributes
    ----------
    source : str
        CUDA C++, to be read: ``print(kernels.source)``.
    launches : tuple of Kernel and Product
        In order.
    n_numbers : int
        Width of the table: the program's inputs that are numbers, in order.
    n_bytes : int
        Of the work memory, whose number is that of the input arrays.
    constants : tuple of (View, number)
        Parts of the work memory to fill beforehand.
    """

    source: str
    launches: tuple[Kernel | Product, ...]
    n_numbers: int
    n_bytes: int
    constants: tuple[tuple[View, float], ...]


def compile_program(program: Program, n_donated: int) -> Kernels:
    """Write the kernels of a program.

    Its outputs behind the donated ones have to be numbers or without axes; they go to the
    row of the counter in a table of results, two columns wide, which is the last kernel's
    last argument.  That kernel also increments the counter.

    Parameters
    ----------
    program : Program
    n_donated : int
        So many of the first inputs are overwritten, by the outputs of the same place.

    Raises
    ------
    Unrecordable
        If the program does what cannot be written; the message says what.
    """
    return _Builder(program, n_donated).build()


def gather_kernel(batch: Sequence[View], n_rows: int, batch_size: int) -> Kernels:
    """The kernel that takes a step's rows from where the data is.

    Its arguments are the row numbers of an epoch (int32), and in turn where an array's rows
    are taken from, and to.

    Parameters
    ----------
    batch : sequence of View
        Where the rows go.
    n_rows : int
        Of this batch.
    batch_size : int
        Rows of the batches before it.
    """
    parameters, lines = ["const double* table", "int* step", "int* rows"], []
    for number, view in enumerate(batch):
        width = prod(view.shape[1:])
        kind = TYPES[str(view.dtype)]
        parameters += [f"{kind}* data{number}", f"{kind}* batch{number}"]
        row = f"(long long)rows[*step * {batch_size} + i / {width}] * {width} + i % {width}"
        lines.append(
            f"    for (int i = first; i < {n_rows * width}; i += all)"
            f" batch{number}[i] = data{number}[{row}];"
        )
    source = GATHER.format(parameters=", ".join(parameters), body="\n".join(lines))
    points = n_rows * max(prod(view.shape[1:]) for view in batch)
    kernel = Kernel("gather", -(-points // _THREADS), _THREADS, ())
    return Kernels(source, (kernel,), 0, 0, ())


_THREADS = 256  # of a block
_LONG = 64  # elements; a sum over more is shared by many threads, or not kept in registers
_MOST = 2**30  # elements: kernels count them, and a stride beyond, in an int
_SHARE = 8192  # elements that one block adds up

# ---------------------------------------------------------------- the builder


@dataclass
class _Launch:
    """What is launched: a product, a sum over all elements, or a kernel of many nodes."""

    kind: str
    nodes: list[Node] = field(default_factory=list)
    rows: int = 0  # of a kernel whose threads have a row each: how many
    points: int = 0


class _Builder:
    """Gathers a program's operations into launches, gives them memory, and writes them."""

    def __init__(self, program: Program, n_donated: int) -> None:
        self.program = program
        self.arrays = [x for x in program.inputs if not x.is_number]
        self.numbers = {x: k for k, x in enumerate(x for x in program.inputs if x.is_number)}
        for x in (*self.arrays, *program.nodes):
            if not x.is_number and str(x.dtype) not in TYPES:
                raise Unrecordable(f"there are no CUDA kernels of {x.dtype}")
            if x.size > _MOST:
                raise Unrecordable(f"it has an array of more than {_MOST} elements")
        self.donated = self.arrays[:n_donated]
        self.outputs = program.outputs[:n_donated]
        self.results = program.outputs[n_donated:]
        calculated = [
            x for x in program.nodes if x.op not in VIEWS and not x.is_number and not _inline(x)
        ]
        # Rows of few elements that something is summed over: a thread may have a row
        summed = [
            (x.operands[0].shape, *x.attrs[0])
            for x in calculated
            if x.op in REDUCTIONS and len(x.attrs[0]) == 1 and x.operands[0].ndim == 2
        ]
        shapes = {(shape[1 - axis], shape[axis]) for shape, axis in summed}
        self.few = {(n, k) for n, k in shapes if 1 < k <= _LONG and n not in (1, k)}
        self.long = {n for n, _ in self.few}
        self.homes = parts_at_home(calculated)
        self.launches: list[_Launch] = []
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
        """Launch what is no kernel of many nodes, and before it what it reads."""
        if x.op in ("max", "min") and x.dtype.kind != "f":
            raise Unrecordable(f"it takes the {x.op} of {x.dtype}")
        if x.op == "matmul" and any(o.ndim > 1 for o in x.operands):
            self._check_product(x)
            self.constants += [o.root for o in x.operands if _inline(o.root)]
            self._launch(_Launch("product", [x]))
        elif x.op == "matmul" or (x.op in REDUCTIONS and x.size == 1 and _length(x) > _LONG):
            self._launch(_Launch("total", [x], points=_length(x)))
        elif x.op == "concat":
            self._put_concat(x)

    def _launch(self, launch: _Launch) -> None:
        for base, _ in list(self._where(launch)):
            self._need(base)
        for x in launch.nodes:
            self.at[x] = len(self.launches)
        self.launches.append(launch)

    def _put_concat(self, x: Node) -> None:
        if x.attrs != (0,):
            raise Unrecordable("it joins arrays along an axis that is not the first")
        offset = 0
        last = 0
        for part in x.operands:
            self._need(part)
            if self.homes.get(part.root) != (x, offset):
                self.launches.append(_Launch(f"copy {offset}", [x, part], points=part.size))
                last = len(self.launches) - 1
            last = max(last, self.at.get(part.root, 0))
            offset += part.n_bytes
        self.at[x] = last

    def _need(self, x: Node) -> None:
        """Put x, and all that nobody has needed before it, into a kernel.

        As late as possible: what was computed for a layer's output need not be kept for its
        derivative.
        """
        if _inline(x) or x.op in VIEWS:
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
        if together & self.at.keys():  # needed in between, elsewhere
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
            self.launches.append(_Launch("points", nodes, rows, points))
        self.at |= dict.fromkeys(nodes, i)

    def _pointwise(self, x: Node) -> bool:
        """Whether x is computed in a kernel of many nodes."""
        if x.op in ("matmul", "concat"):
            return False
        return not (x.op in REDUCTIONS and x.size == 1 and _length(x) > _LONG)

    def _check_pointwise(self, x: Node) -> None:
        if x.elementwise and x.op not in (*FUNCTIONS, "absolute", "astype"):
            raise Unrecordable(f"there is no CUDA kernel of {x.op}")

    def _rows(self, x: Node) -> int:
        """The number of rows, if each is a thread's; 0 if each element is."""
        shape = long_axes(x.shape)
        if len(shape) == 1:
            return shape[0] if shape[0] in self.long else 0
        if len(shape) != 2:
            return 0
        return next((n for n, k in (shape, shape[::-1]) if (n, k) in self.few), 0)

    def _own(self, x: Node, rows: int) -> Access:
        """The element of x that a thread computes: of a row, the j-th."""
        if not rows:
            return Access("i")
        indices = ["i" if n == rows else "0" if n == 1 else "j" for n in x.shape]
        return linear(x.shape, indices)

    def _check_product(self, x: Node) -> None:
        if x.ndim > 2 or any(o.ndim > 2 for o in x.operands):
            raise Unrecordable("it multiplies stacks of matrices")
        if x.dtype not in (np.float32, np.float64) or any(o.dtype != x.dtype for o in x.operands):
            raise Unrecordable(f"it multiplies matrices of {x.dtype}")
        for root in (o.root for o in x.operands):
            if _inline(root) and (root.op != "full" or isinstance(root.operands[0], Node)):
                raise Unrecordable("it multiplies by a matrix that is nowhere in memory")

    # ------------------------------------------------------------ what is read

    def _reads(self, x: Node, access: Access) -> Iterator[tuple[Node, Access]]:
        """The arrays, and their elements, that an element of x is computed from."""
        for operand, where in self._operands(x, access):
            if isinstance(operand, Node) and not operand.is_number:
                yield from self._bases(operand, where)

    def _bases(self, x: Node, access: Access) -> Iterator[tuple[Node, Access]]:
        while x.op in VIEWS:
            access = through(x, access)
            (x,) = x.operands
        if not _inline(x):
            yield x, access
        elif x.elementwise:
            yield from self._reads(x, access)

    def _operands(self, x: Node, access: Access) -> Iterator[tuple[Any, Access]]:
        """The operands, and which element of each."""
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
            if isinstance(operand, Node) and not operand.is_number:
                yield operand, broadcast(operand, x.shape, access)
            else:
                yield operand, access

    def _variable(self, x: Node, axis: int) -> str:
        """What runs along an axis that is summed over."""
        return "j" if self._rows(x) and x.shape[axis] != self._rows(x) else f"r{axis}"

    def _where(self, launch: _Launch) -> Iterator[tuple[Node, Access]]:
        """All that a launch reads."""
        for x in launch.nodes:
            if launch.kind == "product":
                yield from ((o.root, Access("")) for o in x.operands)
            elif launch.kind == "points":
                yield from self._reads(x, self._own(x, launch.rows))
            elif launch.kind == "total":
                for operand in x.operands:
                    yield from self._bases(operand, Access("i"))
        if launch.kind.startswith("copy"):
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
                and base in self.launches[at].nodes  # no array joined of parts
                and base not in self.homes
                and base not in self.places
                and base.dtype == x.dtype
                and all(
                    i < at or (i == at and flat == self._own(base, self.launches[at].rows).flat)
                    for i, flat in readers[x]
                )
            )
            if in_place:
                self.places[base] = self.places[x]
            else:
                moves.append((x, y))
        if {base for base, _ in self._last_reads()} & {x for x, _ in moves}:
            raise Unrecordable("it returns a number out of an array that it overwrites")
        # First aside, then home: an output may read what another overwrites
        for x, y in moves:
            self.launches.append(_Launch("move aside", [x, y], points=x.size))
        for x, y in moves:
            self.launches.append(_Launch("move home", [x, y], points=x.size))

    def _last_reads(self) -> Iterator[tuple[Node, Access]]:
        for y in self.results:
            if isinstance(y, Node) and not y.is_number:
                if y.size != 1:
                    raise Unrecordable(f"it returns an array of shape {y.shape}")
                yield from self._bases(y, Access("0", ("0",) * y.ndim))

    def _allocate(self) -> int:
        """Give a place to all that is read by another launch; return the bytes needed."""
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
            written = launch.nodes[:1] if launch.kind.startswith("copy") else launch.nodes
            for x in written:
                if (
                    launch.kind in ("product", "total")
                    or x in self.homes
                    or written != launch.nodes
                ):
                    live(owner(x), owner(x).n_bytes, i, i)
            if launch.kind == "total":
                live(("parts", launch.nodes[0]), 8 * _blocks(launch), i, i)
        for base, _ in self._last_reads():
            live(base, base.n_bytes, self.at.get(base, -1), end)
        work = len(self.arrays)
        total = 0
        placed: list[tuple[Any, int]] = []
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
                self.places[x] = Place(work, self.places[home].offset + offset)
        return max(total, 1)

    def _is_local(self, base: Node, access: Access, i: int) -> bool:
        """Whether a launch has computed this element itself, in the same thread."""
        if self.at.get(base) != i or base not in self.launches[i].nodes:
            return False
        return access.flat == self._own(base, self.launches[i].rows).flat

    # ------------------------------------------------------------ writing

    def build(self) -> Kernels:
        self._settle()
        n_bytes = self._allocate()
        self.source = [PREAMBLE]
        self.written: list[Kernel | Product] = []
        for i, launch in enumerate(self.launches):
            if launch.kind == "product":
                self._write_product(*launch.nodes)
            elif launch.kind == "total":
                self._write_total(launch)
            else:
                self._write_points(i, launch)
        self._write_last()
        constants = tuple(
            (self._whole(x), float(x.operands[0])) for x in dict.fromkeys(self.constants)
        )
        return Kernels(
            "".join(self.source), tuple(self.written), len(self.numbers), n_bytes, constants
        )

    def _whole(self, x: Node) -> View:
        return View(self.places[x], x.shape, row_strides(x.shape), x.dtype)

    def _write_product(self, x: Node) -> None:
        def matrix(o: Node, row: bool) -> View:
            place, shape, strides, dtype = self._view(o)
            if len(shape) == 2:
                return View(place, shape, strides, dtype)
            (n,), (stride,) = shape, strides
            return (
                View(place, (1, n), (n * stride, stride), dtype)
                if row
                else View(place, (n, 1), (stride, n * stride), dtype)
            )

        left, right = x.operands
        a, b = matrix(left, row=True), matrix(right, row=False)
        if not _in_pieces(a) or not _in_pieces(b):
            raise Unrecordable("it multiplies by a matrix with gaps in its rows and columns")
        n, m = a.shape[0], b.shape[1]
        out = View(self.places[x], (n, m), (m, 1), x.dtype)
        self.written.append(Product(a, b, out))

    def _view(self, x: Node) -> View:
        """Shape and strides of a view of an array that lies in memory row by row."""
        if x.op not in VIEWS:
            return self._whole(x)
        (operand,) = x.operands
        place, shape, strides, dtype = self._view(operand)
        if x.op == "reshape":
            return View(place, x.shape, row_strides(x.shape), dtype)
        if x.op == "permute":
            (axes,) = x.attrs
            return View(place, x.shape, tuple(strides[axis] for axis in axes), dtype)
        if x.op == "broadcast":
            raise Unrecordable("it multiplies by a broadcast matrix")
        new: list[int] = []
        offset = 0
        by_axis = keys(x, next_new=lambda: new.append(0))
        for n, stride, key in zip(shape, strides, by_axis, strict=True):
            if isinstance(key, int):
                offset += (key % n) * stride
            else:
                start, _, step = slice(*key[1:]).indices(n)
                offset += start * stride
                new.append(step * stride)
        there = Place(place.memory, place.offset + offset * dtype.itemsize)
        return View(there, x.shape, tuple(new), dtype)

    def _kernel(
        self, template: str, blocks: int, threads: int, used: dict[str, View], **parts: Any
    ) -> None:
        name = f"k{len(self.written)}"
        pointers = [f"{TYPES[str(view.dtype)]}* {pointer}" for pointer, view in used.items()]
        parameters = ", ".join(["const double* table", "int* step", *pointers])
        row = f"    const double* h = table + (long long)*step * {len(self.numbers)};\n"
        numbers = row if any("h[" in str(part) for part in parts.values()) else ""
        self.source.append(
            template.format(name=name, parameters=parameters, numbers=numbers, **parts)
        )
        self.written.append(Kernel(name, blocks, threads, tuple(used.values())))

    def _write_total(self, launch: _Launch) -> None:
        (x,) = launch.nodes
        kind = TYPES[str(x.dtype)]
        used: dict[str, View] = {}
        operands = [self._read(o, x.dtype, Access("i"), used, -1) for o in x.operands]
        value = operands[0] if x.op in REDUCTIONS else f"{operands[0]} * {operands[1]}"
        start, combine = COMBINE[x.op if x.op in REDUCTIONS else "sum"]
        parts = {"type": kind, "start": f"({kind})({start})", "combined": combine.format("a", "b")}
        blocks, threads = _blocks(launch), 1024
        whole = self._whole(x)
        partial = View(self.places[("parts", x)], (blocks,), (1,), x.dtype) if blocks > 1 else whole  # type: ignore[index]
        used["out"] = partial
        self._kernel(
            TOTAL, blocks, threads, used,
            value=value, points=launch.points, **parts,
        )  # fmt: skip
        if blocks > 1:
            self._kernel(
                TOTAL, 1, threads, {"partial": partial, "out": whole},
                value="partial[i]", points=blocks, **parts,
            )  # fmt: skip

    def _write_points(self, i: int, launch: _Launch) -> None:
        used: dict[str, View] = {}
        lines: list[str] = []
        stores: list[str] = []
        if launch.kind == "points":
            for x in launch.nodes:
                lines += self._compute(x, launch, i, used)
                if x in self.places:
                    stores.append(self._store(x, launch, used))
        else:
            x, y = launch.nodes
            aside = View(self.places.get(("aside", x), Place(0, 0)), (x.size,), (1,), x.dtype)  # type: ignore[call-overload]
            whole = self._whole(x)
            if launch.kind == "move home":
                used |= {"source": aside, "to": whole}
                value = "source[i]"
            else:
                value = self._read(y, x.dtype, Access("i"), used, -1)
                used["to"] = aside
                if launch.kind.startswith("copy"):
                    place, offset = whole.place, int(launch.kind.split()[1])
                    there = Place(place.memory, place.offset + offset)
                    used["to"] = View(there, (y.size,), (1,), x.dtype)
            stores.append(f"to[i] = {value};")
        body = "\n".join(f"        {line}" for line in (*lines, *stores))
        self._kernel(
            POINTWISE, -(-launch.points // _THREADS), _THREADS, used,
            points=launch.points, body=body,
        )  # fmt: skip

    def _compute(self, x: Node, launch: _Launch, i: int, used: dict[str, View]) -> list[str]:
        """The lines that compute a node, in a variable of its own."""
        kind, own = TYPES[str(x.dtype)], self._own(x, launch.rows)
        name = f"v{self.number[x]}"
        loop = self._loop(x, launch.rows)
        if x.op not in REDUCTIONS:
            value = self._expression(x, own, used, i)
            if loop:
                return [f"{kind} {name}[{loop}];", _for("j", loop, f"{name}[j] = {value};")]
            return [f"{kind} {name} = {value};"]
        if loop:
            raise Unrecordable("it sums along an axis of an array of more than two axes")
        ((operand, access),) = self._operands(x, own)
        start, combine = COMBINE[x.op]
        term = self._read(operand, x.dtype, access, used, i)
        line = f"{{ {kind} b = {term}; {name} = {combine.format(name, 'b')}; }}"
        for axis in reversed(x.attrs[0]):
            if operand.shape[axis] > 1:
                line = _for(self._variable(operand, axis), operand.shape[axis], line)
        return [f"{kind} {name} = ({kind})({start});", line]

    def _loop(self, x: Node, rows: int) -> int:
        """The number of elements of x that a thread computes, if not one."""
        return next((n for n in x.shape if rows and n not in (1, rows)), 0)

    def _store(self, x: Node, launch: _Launch, used: dict[str, View]) -> str:
        name, loop = f"v{self.number[x]}", self._loop(x, launch.rows)
        flat = self._own(x, launch.rows).flat
        used[f"out{self.number[x]}"] = self._whole(x)
        if loop:
            return _for("j", loop, f"out{self.number[x]}[{flat}] = {name}[j];")
        return f"out{self.number[x]}[{flat}] = {name};"

    def _expression(self, x: Node, access: Access, used: dict[str, View], i: int) -> str:
        operands = [
            self._read(operand, dtype, where, used, i)
            for (operand, where), dtype in zip(self._operands(x, access), x.wanted, strict=True)
        ]
        kind = TYPES[str(x.dtype)]
        if x.op in ("astype", "copy"):
            return f"({kind}){operands[0]}"
        integers = all(dtype.kind != "f" for dtype in x.wanted)
        if integers and x.op == "power":
            raise Unrecordable("it takes a power of integers")
        if x.op == "invert" and x.dtype == bool:
            text = "(!{0})"
        elif integers and x.op in ("floor", "ceil", "trunc"):
            text = "{0}"
        elif integers and x.op in ("isfinite", "isnan", "isinf"):
            text = f"{x.op}((double){{0}})"  # NVIDIA's have no overload for integers
        elif x.op == "absolute":
            text = "fabs({0})" if x.dtype.kind == "f" else "({0} < 0 ? -{0} : {0})"
        else:
            text = FUNCTIONS[x.op]
        if x.dtype.kind == "i" and x.op in ("add", "subtract", "multiply", "left_shift"):
            # Integers wrap, which C++ promises of unsigned ones only
            return f"({kind})" + text.format(*(f"(unsigned long long){o}" for o in operands))
        return text.format(*operands)

    def _read(self, x: Any, dtype: Any, access: Access, used: dict[str, View], i: int) -> str:
        """An operand's element; ``i`` is the launch that reads it."""
        if not isinstance(x, Node) or x.is_number:
            # A number takes the type of what it meets; alone, it is in double precision
            return f"({TYPES.get(str(dtype), 'double')})({self._number(x)})"
        while x.op in VIEWS:
            access = through(x, access)
            (x,) = x.operands
        if x.op == "full":
            return f"({TYPES[str(x.dtype)]})({self._number(x.operands[0])})"
        if x.op == "arange":
            span = range(*x.operands)
            return f"({TYPES[str(x.dtype)]})({span.start} + ({access.flat}) * {span.step})"
        if _inline(x):
            return f"({self._expression(x, access, used, i)})"
        if i >= 0 and self._is_local(x, access, i):
            return f"v{self.number[x]}" + "[j]" * bool(self._loop(x, self.launches[i].rows))
        pointer = f"m{self.number[x]}"
        used[pointer] = self._whole(x)
        return f"{pointer}[{access.flat}]"

    def _number(self, x: Any) -> str:
        """A number, known or from the table, in double precision."""
        if isinstance(x, Node):
            if x in self.numbers:
                return f"h[{self.numbers[x]}]"
            operands = [f"(double)({self._number(o)})" for o in x.operands]
            if x.op == "absolute":
                return f"fabs({operands[0]})"
            return FUNCTIONS[x.op].format(*operands)
        if isinstance(x, bool):
            return str(int(x))
        if isinstance(x, float) and not isfinite(x):
            return "NOT_A_NUMBER" if isnan(x) else "INF" if x > 0 else "-INF"
        return repr(x)

    def _write_last(self) -> None:
        used: dict[str, View] = {}
        lines = []
        for column, y in enumerate(self.results):
            if isinstance(y, Node) and not y.is_number:
                value = self._read(y, y.dtype, Access("0", ("0",) * y.ndim), used, -1)
            else:
                value = self._number(y)
            lines.append(f"        results[(long long)*step * 2 + {column}] = {value};")
        self._kernel(LAST, 1, 1, used, body="\n".join(lines))


def _inline(x: Node) -> bool:
    """Whether x is computed again at each use, which costs less than to store it."""
    return x.op in ("full", "arange") or (x.shape == () and x.elementwise and x.op != "input")


def _in_pieces(matrix: View) -> bool:
    """Whether rows or columns are contiguous, one after the other, as cuBLAS wants."""
    (n, m), (down, along) = matrix.shape, matrix.strides
    rows = (along == 1 or m == 1) and (down >= m or n == 1)
    columns = (down == 1 or n == 1) and (along >= n or m == 1)
    return rows or columns


def _length(x: Node) -> int:
    """The number of elements that a result is made of."""
    n: int = x.operands[0].size
    return n


def _blocks(launch: _Launch) -> int:
    return min(-(-launch.points // _SHARE), 256)


def _for(variable: str, n: int, line: str) -> str:
    return f"for (int {variable} = 0; {variable} < {n}; ++{variable}) {line}"
