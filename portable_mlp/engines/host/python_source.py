"""A recorded program as Python source: a list of calls that write into fixed buffers.

Beyond its matrix products, a plain step spends its time in about equal parts on memory
(each operation makes a new array) and on the overhead of calls.  Here the place of every
result is planned first (`portable_mlp.engines.host.memory`).  Chains of elementwise operations
on arrays larger than a core's cache run block by block.  With a C compiler, each run of
elementwise operations is one call (`portable_mlp.engines.host.loops`).  The calls are written
as Python source and compiled once; the buffers, their views and the constants are free
variables of the function.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, groupby
from types import CodeType
from typing import Any

import numpy as np

from portable_mlp.engines.graph.program import (
    COMPARISONS,
    NUMBERS,
    REDUCTIONS,
    VIEWS,
    Node,
    Program,
)
from portable_mlp.engines.graph.verifier import verifying
from portable_mlp.engines.host.dialects import NumPyDialect
from portable_mlp.engines.host.loops import LoopWriter
from portable_mlp.engines.host.memory import Plan
from portable_mlp.engines.host.plan_verifier import verify_plan
from portable_mlp.typing import Array


@dataclass(frozen=True)
class Replay:
    """The source of a program as calls, see `lower`.

    Attributes
    ----------
    source : str
        Python source, for readers: ``print(replay.source)``.
    code : CodeType
        The same, compiled.
    loops : str
        C source of the loops among the calls; empty if there are none.
    """

    source: str
    code: CodeType
    loops: str = ""

    def bind(
        self, given: list[Array], dialect: NumPyDialect, library: ctypes.PyDLL | None = None
    ) -> Callable[..., tuple[Any, ...]]:
        """Allocate memory, and return the program as a function of the remaining arguments.

        Parameters
        ----------
        given : list of arrays, C-contiguous
            The donated arrays, which the program's first results overwrite at each call, and
            behind them the resident arrays, which are only read.
        dialect : NumPyDialect
        library : ctypes.PyDLL, optional
            The compiled ``loops``; needed if there are any.
        """
        scope = dialect.globals()
        if library is not None:
            scope["loops"] = partial(_loops, library)
        exec(self.code, scope)
        # A function in its own globals is a reference cycle: its memory would live on until the
        # garbage collector runs
        bind = scope.pop("bind")
        run: Callable[..., tuple[Any, ...]] = bind(*given)
        return run


def _loops(library: ctypes.PyDLL, number: int, *arrays: Array) -> Callable[[], None]:
    """Return a call of a compiled function, which points at the arrays and keeps them alive."""
    memory = (ctypes.c_void_p * len(arrays))(*(a.ctypes.data for a in arrays))
    function = library[f"run{number}"]
    function.argtypes, function.restype = [ctypes.c_void_p], None
    call = partial(function, ctypes.addressof(memory))
    call.kept = memory, arrays  # type: ignore[attr-defined]
    return call


def lower(
    program: Program,
    n_donated: int,
    dialect: type[NumPyDialect],
    *,
    n_resident: int = 0,
    loops: bool = False,
) -> Replay:
    """Plan the memory of a program, and write its calls.

    Parameters
    ----------
    program : Program
    n_donated : int
        Number of first inputs that are overwritten by the outputs at the same positions.
    dialect : type of NumPyDialect
    n_resident : int, default=0
        Number of inputs behind them that are bound, too, but only read.
    loops : bool, default=False
        Whether to write elementwise operations in C where possible; NumPy only.
    """
    if dialect.numeric_masks:
        program = with_numeric_masks(program)
    plan = Plan(program, n_donated, dialect.block, n_resident=n_resident, loops=loops)
    if verifying():
        verify_plan(plan)
    writer = _SourceWriter(plan, dialect)
    source = writer.source()
    return Replay(source, compile(source, "<replay>", "exec"), writer.loops.source)


def with_numeric_masks(program: Program) -> Program:
    """Return the program with each comparison in the data type to which it is converted.

    Only comparisons that nothing else reads are changed.
    """
    readers = Counter(o for x in program.nodes for o in x.arrays)
    readers.update(y for y in program.outputs if isinstance(y, Node))
    new: dict[Any, Any] = {}
    for x in program.nodes:
        source = x
        if x.op == "astype" and x.operands[0].op in COMPARISONS and readers[x.operands[0]] == 1:
            (source,) = x.operands
        operands = tuple(new.get(o, o) for o in source.operands)
        new[x] = replace(source, operands=operands, dtype=x.dtype)
    outputs = tuple(new.get(y, y) for y in program.outputs)
    merged = {o for x in program.nodes if x.op != new[x].op for o in x.operands}
    nodes = tuple(y for x, y in new.items() if x not in merged)
    return Program(program.inputs, outputs, nodes)


class _SourceWriter:
    """Writer of the calls of a plan."""

    def __init__(self, plan: Plan, dialect: type[NumPyDialect]) -> None:
        self.plan = plan
        self.dialect = dialect
        self.foreign = set(plan.passed)  # their views are made at each call
        self.bound: list[str] = []  # lines run once
        self.calls: list[str] = []  # lines run at each call
        self.names: dict[Any, str] = {}
        self.loops = LoopWriter(plan.registers, plan.place, self.name, self.operand)

    def source(self) -> str:
        plan = self.plan
        given = [self._set(x, f"state{i}") for i, x in enumerate(plan.given)]
        passed = [self._set(x, f"arg{i}") for i, x in enumerate(plan.passed)]
        own = range(len(given), len(plan.sizes))
        memories = {f"m{m}": plan.sizes[m] for m in own}
        memories |= {f"s{s}": n_bytes for s, n_bytes in enumerate(plan.scratch)}
        # One allocation for all, each part aligned to a cache line
        ends = [*accumulate((-(-n // 64) * 64 for n in memories.values()), initial=0)]
        self.bound.append(f"memory = work({ends[-1]})")
        for (memory, n_bytes), start in zip(memories.items(), ends, strict=False):
            self.bound.append(f"{memory} = memory[{start}:{start + n_bytes}]")
        for in_loops, segments in groupby(plan.segments, lambda segment: segment[0] in plan.loops):
            if in_loops:
                self._loops(list(segments))
                continue
            for segment in segments:
                rows = plan.rows(segment)
                if rows:
                    self._blocks(segment, rows)
                else:
                    for x in segment:
                        self._call(x, self.calls)
        results = plan.program.outputs[len(plan.donated) :]
        # Results are copied before the moves below, which may overwrite them
        self.calls += [f"result{i} = {self._result(y)}" for i, y in enumerate(results)]
        self._settle()
        lines = [
            f"def bind({', '.join(given)}):",
            *(f"    {line}" for line in self.bound),
            f"    def run({', '.join(passed)}):",
            *(f"        {line}" for line in self.calls),
            f"        return ({''.join(f'result{i}, ' for i in range(len(results)))})",
            "    return run",
        ]
        return "\n".join(lines) + "\n"

    def _settle(self) -> None:
        """Move outputs to the donated memory that they replace, if they are not there."""
        plan = self.plan
        moves: list[str] = []
        for x, y in zip(plan.donated, plan.program.outputs, strict=False):
            if plan.place.get(y) != plan.place[x]:
                # Copied first: an output may be what another one overwrites
                self.calls.append(f"moved{len(moves)} = {self.dialect.copy(self.name(y))}")
                moves.append(self.dialect.assign(self.name(x), f"moved{len(moves)}"))
        self.calls += moves

    def _result(self, y: Any) -> str:
        if not isinstance(y, Node) or y.is_number:
            return self._number(y)
        return self.dialect.result(self.name(y), y.shape)

    # ------------------------------------------------------------ names

    def _set(self, key: Any, name: str) -> str:
        self.names[key] = name
        return name

    def _fresh(self, key: Any, prefix: str) -> str:
        return self._set(key, f"{prefix}{len(self.names)}")

    def _local(self, path: str) -> str:
        """Return a local name for a function of the library; attribute lookups cost time."""
        if path not in self.names:
            self._set(path, path.split(".", 1)[1].replace(".", "_") + "_")
            self.bound.append(f"{self.names[path]} = {path}")
        return self.names[path]

    def _number(self, x: Any) -> str:
        """Return a number as an expression; it may change from call to call."""
        if not isinstance(x, Node):
            return repr(x) if abs(x) < float("inf") else f"float('{x}')"
        if x in self.names:
            return self.names[x]
        return "(" + NUMBERS[x.op].format(*(self._number(o) for o in x.operands)) + ")"

    def operand(self, x: Any, dtype: Any) -> str:
        """Return the name of an operand.

        A number becomes an array with the axes of the number: NumPy takes half as long with it.
        """
        if isinstance(x, Node) and not x.is_number:
            return self.name(x)
        key = ("scalar", dtype, x if isinstance(x, Node) else (type(x), repr(x)))
        if key not in self.names:
            name = self._fresh(key, "c")
            known = not isinstance(x, Node)
            value, shape = (self._number(x), ()) if known else (0, x.shape)
            self.bound.append(f"{name} = {self.dialect.constant(value, shape, dtype)}")
            if not known:
                self.calls.append(self.dialect.fill(name, self._number(x), shape))
        return self.names[key]

    def name(self, x: Node) -> str:
        """Return the variable that holds x; it is made at the first use."""
        if x in self.names:
            return self.names[x]
        name = self._fresh(x, "v")
        if x.op in (*VIEWS, "full", "arange"):
            lines = self.calls if x.root in self.foreign else self.bound
            line = self._expression(x)
            lines.append(f"{name} = {line}")
        elif x in self.plan.fixed:
            array = self._array(f"empty({x.n_bytes})", 0, x.shape, x.dtype)
            self.bound.append(f"{name} = {array}")
            self._call(x, self.bound)
        else:
            memory, offset = self.plan.place[x]
            given = self.plan.given
            where = (
                self.dialect.bytes_of(self.name(given[memory]))
                if memory < len(given) else f"m{memory}"
            )  # fmt: skip
            self.bound.append(f"{name} = {self._array(where, offset, x.shape, x.dtype)}")
        return name

    def _array(self, memory: str, offset: int, shape: tuple[int, ...], dtype: Any) -> str:
        n_bytes = int(np.prod(shape)) * dtype.itemsize
        where = f"{memory}[{offset}:{offset + n_bytes}]"
        return f"{where}.view({self.dialect.dtype(dtype)}).reshape({shape})"

    def _expression(self, x: Node) -> str:
        """Return the expression of a view, or of an array that is computed once."""
        dialect = self.dialect
        if x.op == "full":
            return dialect.constant(self._number(x.operands[0]), x.shape, x.dtype)
        if x.op == "arange":
            return dialect.arange(", ".join(map(str, x.operands)), x.dtype)
        first = self.name(x.operands[0])
        if x.op == "reshape":
            return f"{first}.reshape({x.shape})"
        if x.op == "permute":
            return dialect.transpose(first, x.attrs[0])
        if x.op == "index":
            # Without the ellipsis the result would be a copy of an element, not a view
            keys = [_key(k) for k in x.attrs] + ["..."] * (x.shape == () and ... not in x.attrs)
            return f"{first}[{', '.join(keys)}]"
        return dialect.broadcast(first, x.shape)

    # ------------------------------------------------------------ calls

    def _call(self, x: Node, lines: list[str]) -> None:
        """Write the call that computes x into its place."""
        if x.op == "concat":
            lines += self._concat(x)
            return
        if x.op == "astype" and x.operands[0].is_number:
            lines.append(self.dialect.assign(self.name(x), self._number(x.operands[0])))
            return
        operands = [self.operand(o, d) for o, d in zip(x.operands, x.wanted, strict=True)]
        out = self.name(x)
        if lines is self.calls:
            operands, out = self._long_rows(x, operands, out)
        lines.append(self._compute(x, operands, out))

    def _compute(self, x: Node, operands: list[str], out: str) -> str:
        dialect = self.dialect
        if x.op in ("astype", "copy"):
            return dialect.assign(out, operands[0])
        if x.op in REDUCTIONS:
            function = self._local(dialect.reduction(x.op))
            axes, keepdims = x.attrs
            return dialect.reduce(function, operands[0], axes, keepdims, out)
        if x.op == "where":
            condition, a, b = operands
            return dialect.where(out, condition, a, b)
        if x.op == "matmul":
            return self._product(x, operands[0], operands[1], out)
        function = self._local(dialect.elementwise(x.op))
        return f"{function}({', '.join(operands)}, out={out})"

    def _product(self, x: Node, a: str, b: str, out: str) -> str:
        dialect = self.dialect
        left, right = x.operands
        if not (
            left.op == "permute"
            and x.ndim == left.ndim == 2
            and x.shape[1] < dialect.narrow <= min(left.shape)
        ):
            return dialect.matmul(a, b, out, (left.ndim, right.ndim))
        # Computed as (a b)ᵀ = bᵀ aᵀ, which is faster here: see `narrow` of the dialect
        product = self._fresh(("transposed", x), "p")
        array = self._array(f"empty({x.n_bytes})", 0, (x.shape[1], x.shape[0]), x.dtype)
        self.bound.append(f"{product} = {array}")
        a = self._view(left, dialect.transpose(a, (1, 0)))
        b = self._view(right, dialect.transpose(b, (1, 0)))
        line = dialect.matmul(b, a, product, (2, 2))
        return f"{line}; {dialect.assign(out, dialect.transpose(product, (1, 0)))}"

    def _concat(self, x: Node) -> list[str]:
        """Return copies of the parts that are not already in place."""
        lines, start = [], 0
        (axis,) = x.attrs
        for part in x.operands:
            end = start + part.shape[axis]
            # A part that is joined twice was written into one of its two places only
            if axis or self.plan.homes.get(part.root) != (x, start * x.dtype.itemsize):
                key = ":, " * axis + f"{start}:{end}"
                lines.append(self.dialect.assign(f"{self.name(x)}[{key}]", self.name(part)))
            start = end
        return lines

    def _loops(self, segments: list[list[Node]]) -> None:
        """Write one call of a function with the loops of consecutive segments."""
        number, arrays = self.loops.run(segments)
        call = self._fresh(("loops", number), "loops")
        self.bound.append(f"{call} = loops({', '.join([str(number), *arrays])})")
        self.calls.append(f"{call}()")

    def _blocks(self, segment: list[Node], rows: int) -> None:
        """Write a chain of elementwise operations that runs one block of rows at a time."""
        n = segment[0].shape[0]
        views: dict[str, str] = {}  # a block's name -> the whole array's
        passed: list[bool] = []

        def cut(x: Any, dtype: Any) -> str:
            if not isinstance(x, Node) or x.shape != segment[0].shape:
                return self.operand(x, dtype)
            passed.append(x.root in self.foreign)
            memory, _ = self.plan.place.get(x, (0, 0))
            if memory < 0:  # scratch memory holds one block
                short = (rows, *x.shape[1:])
                whole = self.names.get(("scratch", x))
                if whole is None:
                    whole = self._fresh(("scratch", x), "w")
                    self.bound.append(
                        f"{whole} = {self._array(f's{-1 - memory}', 0, short, x.dtype)}"
                    )
                views[f"{whole}_"] = whole
                return f"{whole}_"
            whole = self.name(x)
            views[f"{whole}_"] = whole
            return f"{whole}_"

        lines = []
        for x in segment:
            operands = [
                self._vector(o, x.shape[-1], d)
                if x.op in self.dialect.vectors and x.ndim > 1 and not isinstance(o, Node)
                else cut(o, d)
                for o, d in zip(x.operands, x.wanted, strict=True)
            ]
            lines.append(self._compute(x, operands, cut(x, x.dtype)))
        blocks = self._fresh(("blocks", segment[0]), "blocks")
        parts = []
        for start in range(0, n, rows):
            end = min(start + rows, n)
            parts.append(
                ", ".join(
                    f"{x}[:{end - start}]" if x.startswith("w") else f"{x}[{start}:{end}]"
                    for x in views.values()
                )
            )
        where = self.calls if any(passed) else self.bound
        where.append(f"{blocks} = [{', '.join(f'({part},)' for part in parts)}]")
        self.calls.append(f"for {', '.join(views)}, in {blocks}:")
        self.calls += [f"    {line}" for line in lines]

    def _long_rows(self, x: Node, operands: list[str], out: str) -> tuple[list[str], str]:
        """Return operands and output reshaped so that several short rows are one long row.

        NumPy's inner loop runs over one row, so with few columns its start-up cost dominates.
        A vector that is added to each row is tiled.
        """
        if x.ndim != 2 or not x.elementwise or not x.size:
            return operands, out
        if any(o.is_number for o in x.with_axes):
            return operands, out
        n, k = x.shape
        arrays = [a for a in x.arrays if a.shape]
        rows = {a for a in arrays if a.shape == (k,)}
        repeated = x.op in self.dialect.vectors and not rows
        wide = self.dialect.wide if rows else self.dialect.wider if repeated else 0
        whole = all(a in rows or (a.shape == x.shape and a.contiguous) for a in arrays)
        together = max((r for r in range(1, wide // k + 1) if n % r == 0), default=1)
        if not whole or (together == 1 and not repeated):
            return operands, out
        shape = n // together, together * k
        new = []
        for operand, text, dtype in zip(x.operands, operands, x.wanted, strict=True):
            if operand in rows:
                new.append(self._tile(operand, text, together, k))
            elif isinstance(operand, Node) and operand.shape:
                new.append(self._view(operand, f"{text}.reshape({shape})"))
            elif repeated and not isinstance(operand, Node):
                new.append(self._vector(operand, shape[1], dtype))
            else:
                new.append(text)
        return new, self._view(x, f"{out}.reshape({shape})")

    def _tile(self, x: Node, text: str, n: int, k: int) -> str:
        """Return a row of length k, tiled n times: (n * k,)."""
        tile = self._fresh(("tile", x), "t")
        memory = self._array(f"empty({n * x.n_bytes})", 0, (n, k), x.dtype)
        self.bound += [f"{tile} = {memory}", f"{tile}_ = {tile}.reshape(-1)"]
        self.calls.append(self.dialect.assign(tile, text))
        return f"{tile}_"

    def _vector(self, value: Any, length: int, dtype: Any) -> str:
        """Return a number as a vector of ``length``."""
        key = ("vector", length, dtype, type(value), repr(value))
        if key not in self.names:
            constant = self.dialect.constant(self._number(value), (length,), dtype)
            self.bound.append(f"{self._fresh(key, 'c')} = {constant}")
        return self.names[key]

    def _view(self, x: Node, text: str) -> str:
        """Return a variable for an expression that is a view of x."""
        key = ("view", text)
        if key not in self.names:
            name = self._fresh(key, "l")
            lines = self.calls if x.root in self.foreign else self.bound
            lines.append(f"{name} = {text}")
        return self.names[key]


def _key(k: Any) -> str:
    """Return the source of one key of an index."""
    if isinstance(k, tuple):
        _, start, stop, step = k
        return f"{'' if start is None else start}:{'' if stop is None else stop}" + (
            "" if step is None else f":{step}"
        )
    return "..." if k is ... else repr(k)
