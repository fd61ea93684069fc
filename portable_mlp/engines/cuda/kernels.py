"""A recorded program as CUDA kernels and matrix products.

Operations on the same points share a kernel (`portable_mlp.engines.cuda.fusion`).  It has a
thread for each point, and keeps intermediate results in registers.

Numbers that change from step to step (learning rate, seeds) stand in a table on the device.
A kernel reads the row that a counter on the device names.  So a launch never changes, and can
be replayed.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import isfinite, isnan, prod
from typing import Any

from portable_mlp.engines.cuda.fusion import Fusion, Launch, inline, n_blocks
from portable_mlp.engines.cuda.launches import Kernel, Kernels, Place, Product, View
from portable_mlp.engines.graph.c_source import (
    COMBINE,
    FUNCTIONS,
    GATHER,
    LAST,
    POINTWISE,
    PREAMBLE,
    TOTAL,
    TYPES,
)
from portable_mlp.engines.graph.elements import (
    Access,
    keys,
    row_strides,
    through,
)
from portable_mlp.engines.graph.program import (
    REDUCTIONS,
    VIEWS,
    Node,
    Program,
    Shape,
    Spec,
)
from portable_mlp.engines.graph.recording import Unrecordable

_THREADS = 256  # of a block
_MOST_PRODUCTS = 64  # calls of cuBLAS for one product of stacks


def compile_program(program: Program, n_donated: int) -> Kernels:
    """Write the kernels of a program.

    The outputs behind the donated ones are numbers, or arrays with at most one axis.  The last
    kernel writes them to a table of results, its last argument, in the row that the counter
    names.  It also increments the counter.  A program without such outputs has no such kernel.

    Parameters
    ----------
    program : Program
    n_donated : int
        Number of first inputs that are overwritten by the outputs at the same positions.

    Raises
    ------
    Unrecordable
        If the program does something that kernels cannot; the message says what.
    """
    return _KernelWriter(program, n_donated).build()


def gather_kernel(
    batch: Sequence[Spec], n_rows: int, batch_size: int, members: int | None = None
) -> tuple[str, Kernel]:
    """Return the kernel that copies the rows of a batch from the data into buffers.

    Its arguments are the row numbers of an epoch (int32), and then for each array its data and
    its buffer.

    Parameters
    ----------
    batch : sequence of Spec
        Shapes and data types of the buffers.
    n_rows : int
        Rows of this batch.
    batch_size : int
        Rows of the batches before it.
    members : int, optional
        Number of members that have rows of their own.  Row numbers are then (rows, members),
        and the buffers have the members' axis first.

    Returns
    -------
    source : str
    kernel : Kernel
    """
    parameters, lines = ["const double* table", "int* step", "int* rows"], []
    for number, (shape, dtype) in enumerate(batch):
        width = prod(shape[1 if members is None else 2 :])
        kind = TYPES[str(dtype)]
        parameters += [f"{kind}* data{number}", f"{kind}* batch{number}"]
        at = f"*step * {batch_size} + i / {width}"
        if members is not None:
            place = f"(*step * {batch_size} + i / {width} % {n_rows}) * {members}"
            at = f"{place} + i / {n_rows * width}"
        row = f"(long long)rows[{at}] * {width} + i % {width}"
        lines.append(
            f"    for (int i = first; i < {prod(shape)}; i += all)"
            f" batch{number}[i] = data{number}[{row}];"
        )
    source = GATHER.format(parameters=", ".join(parameters), body="\n".join(lines))
    points = max(prod(shape) for shape, _ in batch)
    return source, Kernel("gather", -(-points // _THREADS), _THREADS, ())


class _KernelWriter(Fusion):
    """Writer of the launches of a program."""

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
        n_results = self._write_last()
        constants = tuple(
            (self._whole(x), float(x.operands[0])) for x in dict.fromkeys(self.constants)
        )
        return Kernels(
            "".join(self.source), tuple(self.written), self.n_numbers, n_results, n_bytes, constants
        )

    def _whole(self, x: Node) -> View:
        return View(self.places[x], x.shape, row_strides(x.shape), x.dtype)

    def _write_product(self, x: Node) -> None:
        left, right = x.operands
        stack = x.shape[: x.ndim - (left.ndim > 1) - (right.ndim > 1)]
        a, b = self._matrices(left, stack, row=True), self._matrices(right, stack, row=False)
        if not _in_pieces(a) or not _in_pieces(b):
            raise Unrecordable("it multiplies by a matrix with gaps in its rows and columns")
        shape = (*a.shape[:-1], b.shape[-1])
        views = a, b, View(self.places[x], shape, row_strides(shape), x.dtype)
        # Axes of the stack with a common stride in all three operands are merged into one
        axes = [(1, (0, 0, 0))]
        for n, *steps in zip(stack, *(view.strides for view in views), strict=False):
            outer, before = axes[-1]
            if before == tuple(n * step for step in steps) or outer == 1:
                axes[-1] = outer * n, tuple(steps)
            elif n > 1:
                axes.append((n, tuple(steps)))
        *others, (count, inner) = axes
        if prod(n for n, _ in others) > _MOST_PRODUCTS:
            raise Unrecordable("it multiplies a stack of matrices that lie in many places")
        for at in product(*(range(n) for n, _ in others)):
            parts = []
            for number, view in enumerate(views):
                start = sum(i * steps[number] for i, (_, steps) in zip(at, others, strict=True))
                n_bytes = view.place.offset + start * x.dtype.itemsize
                lead = ((count,), (inner[number],)) if stack else ((), ())
                parts.append(
                    View(
                        Place(view.place.memory, n_bytes),
                        (*lead[0], *view.shape[-2:]),
                        (*lead[1], *view.strides[-2:]),
                        view.dtype,
                    )
                )
            self.written.append(Product(*parts))

    def _matrices(self, x: Node, stack: Shape, *, row: bool) -> View:
        """Return an operand as a matrix, or as a stack of as many as the product has.

        Parameters
        ----------
        x : Node
        stack : tuple of int
            The axes of the product in front of its matrices.
        row : bool
            Whether a vector is a row; it is a column otherwise.
        """
        place, shape, strides, dtype = self._view(x)
        if len(shape) == 1:
            (n,), (stride,) = shape, strides
            whole = n * stride
            shape, strides = ((1, n), (whole, stride)) if row else ((n, 1), (stride, whole))
        lead = len(shape) - 2
        # A stride of 0 repeats the matrix along an axis of the stack that x does not have
        steps = (0,) * (len(stack) - lead) + tuple(
            step if n > 1 else 0 for n, step in zip(shape[:lead], strides[:lead], strict=True)
        )
        return View(place, (*stack, *shape[lead:]), (*steps, *strides[lead:]), dtype)

    def _view(self, x: Node) -> View:
        """Return a view of a contiguous array, as a place, a shape and strides."""
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
            new_axes = len(x.shape) - len(shape)
            there = (0,) * new_axes + tuple(
                stride if n > 1 else 0 for n, stride in zip(shape, strides, strict=True)
            )
            return View(place, x.shape, there, dtype)
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
        there_ = Place(place.memory, place.offset + offset * dtype.itemsize)
        return View(there_, x.shape, tuple(new), dtype)

    def _kernel(
        self, template: str, blocks: int, threads: int, used: dict[str, View], **parts: Any
    ) -> None:
        name = f"k{len(self.written)}"
        pointers = [f"{TYPES[str(view.dtype)]}* {pointer}" for pointer, view in used.items()]
        parameters = ", ".join(["const double* table", "int* step", *pointers])
        row = f"    const double* h = table + (long long)*step * {self.n_numbers};\n"
        numbers = row if any("h[" in str(part) for part in parts.values()) else ""
        self.source.append(
            template.format(name=name, parameters=parameters, numbers=numbers, **parts)
        )
        self.written.append(Kernel(name, blocks, threads, tuple(used.values())))

    def _write_total(self, launch: Launch) -> None:
        (x,) = launch.nodes
        kind = TYPES[str(x.dtype)]
        used: dict[str, View] = {}
        operands = [self._read(o, x.dtype, Access("i"), used, -1) for o in x.operands]
        value = operands[0] if x.op in REDUCTIONS else f"{operands[0]} * {operands[1]}"
        start, combine = COMBINE[x.op if x.op in REDUCTIONS else "sum"]
        parts = {"type": kind, "start": f"({kind})({start})", "combined": combine.format("a", "b")}
        blocks, threads = n_blocks(launch), 1024
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

    def _write_points(self, i: int, launch: Launch) -> None:
        if not launch.points:
            return
        used: dict[str, View] = {}
        lines: list[str] = []
        stores: list[str] = []
        if launch.kind == "points":
            for x in launch.nodes:
                lines += self._compute(x, launch, i, used)
                if x in self.places:
                    stores.append(self._store(x, launch, used))
        else:
            at = "i"
            x, y = launch.nodes
            aside = View(self.places.get(("aside", x), Place(0, 0)), (x.size,), (1,), x.dtype)  # type: ignore[call-overload]
            whole = self._whole(x)
            if launch.kind == "move home":
                used |= {"source": aside, "to": whole}
                value = "source[i]"
            else:
                value = self._read(y, x.dtype, Access("i"), used, -1)
                used["to"] = aside
                if launch.kind == "copy":
                    place, n_bytes = whole.place, launch.offset * x.dtype.itemsize
                    there = Place(place.memory, place.offset + n_bytes)
                    used["to"] = View(there, (x.size - launch.offset,), (1,), x.dtype)
                    run, apart = launch.runs
                    if run < launch.points:
                        at = f"i / {run} * {apart} + i % {run}"
            stores.append(f"to[{at}] = {value};")
        body = "\n".join(f"        {line}" for line in (*lines, *stores))
        self._kernel(
            POINTWISE, -(-launch.points // _THREADS), _THREADS, used,
            points=launch.points, body=body,
        )  # fmt: skip

    def _compute(self, x: Node, launch: Launch, i: int, used: dict[str, View]) -> list[str]:
        """Return the lines that compute a node, in a variable of its own."""
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
        """Return the number of elements of a row of x that a thread computes; 0 if it is one."""
        return next((n for n in x.shape if rows and n not in (1, rows)), 0)

    def _store(self, x: Node, launch: Launch, used: dict[str, View]) -> str:
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
            text = f"{x.op}((double){{0}})"  # CUDA has no overload for integers
        elif x.op == "absolute":
            text = "fabs({0})" if x.dtype.kind == "f" else "({0} < 0 ? -{0} : {0})"
        else:
            text = FUNCTIONS[x.op]
        if x.dtype.kind == "i" and x.op in ("add", "subtract", "multiply", "left_shift"):
            # NumPy's integers wrap around; in C++ only unsigned overflow is defined
            return f"({kind})" + text.format(*(f"(unsigned long long){o}" for o in operands))
        return text.format(*operands)

    def _read(self, x: Any, dtype: Any, access: Access, used: dict[str, View], i: int) -> str:
        """Return the element of an operand; ``i`` is the number of the launch that reads it."""
        if not isinstance(x, Node) or x.is_number:
            # With an array a number has the array's type; alone, it is in double precision
            return f"({TYPES.get(str(dtype), 'double')})({self._number(x, access)})"
        while x.op in VIEWS:
            access = through(x, access)
            (x,) = x.operands
        if x.op == "full":
            return f"({TYPES[str(x.dtype)]})({self._number(x.operands[0], access)})"
        if x.op == "arange":
            span = range(*x.operands)
            return f"({TYPES[str(x.dtype)]})({span.start} + ({access.flat}) * {span.step})"
        if inline(x):
            return f"({self._expression(x, access, used, i)})"
        if i >= 0 and self._is_local(x, access, i):
            return f"v{self.number[x]}" + "[j]" * bool(self._loop(x, self.launches[i].rows))
        pointer = f"m{self.number[x]}"
        used[pointer] = self._whole(x)
        return f"{pointer}[{access.flat}]"

    def _number(self, x: Any, access: Access) -> str:
        """Return a number of the step, or an element of one with axes, in double precision."""
        if isinstance(x, Node):
            if x in self.numbers:
                column = self.numbers[x]
                return f"h[{column} + {access.flat}]" if x.shape else f"h[{column}]"
            operands = [
                f"(double)({self._number(o, where)})" for o, where in self._operands(x, access)
            ]
            if x.op == "absolute":
                return f"fabs({operands[0]})"
            return FUNCTIONS[x.op].format(*operands)
        if isinstance(x, bool):
            return str(int(x))
        if isinstance(x, float) and not isfinite(x):
            return "NOT_A_NUMBER" if isnan(x) else "INF" if x > 0 else "-INF"
        return repr(x)

    def _write_last(self) -> int:
        """Write the kernel that stores the results, if there are any; return their number."""
        if not self.results:
            return 0
        used: dict[str, View] = {}
        values: list[str] = []
        for y in self.results:
            if isinstance(y, Node) and not y.is_number:
                values += [
                    self._read(y, y.dtype, Access(str(i), (str(i),) * y.ndim), used, -1)
                    for i in range(y.size)
                ]
            else:
                values.append(self._number(y, Access("0")))
        lines = [
            f"        results[(long long)*step * {len(values)} + {column}] = {value};"
            for column, value in enumerate(values)
        ]
        self._kernel(LAST, 1, 1, used, body="\n".join(lines))
        return len(values)


def _in_pieces(matrix: View) -> bool:
    """Tell whether rows or columns are contiguous and do not overlap, as cuBLAS requires."""
    (n, m), (down, along) = matrix.shape[-2:], matrix.strides[-2:]
    rows = (along == 1 or m == 1) and (down >= m or n == 1)
    columns = (down == 1 or n == 1) and (along >= n or m == 1)
    return rows or columns


def _for(variable: str, n: int, line: str) -> str:
    return f"for (int {variable} = 0; {variable} < {n}; ++{variable}) {line}"
