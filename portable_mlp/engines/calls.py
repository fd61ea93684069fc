"""A recorded program as a list of calls that write into fixed buffers.

What a plain step costs beyond its matrix products is, in about equal parts, memory
(each operation makes a new array) and calls.  Here every result has its place
beforehand: in the memory of an operand that nobody needs any more, in a part of the
array it will be concatenated into, or in a buffer that an earlier result has left.
Chains of elementwise operations on arrays larger than a core's cache run block by
block.  The calls are written out as Python source and compiled once, with the buffers,
their views and the constants as the function's free variables.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate
from types import CodeType
from typing import Any

import numpy as np

from portable_mlp.engines.dialects import NumPyDialect
from portable_mlp.engines.recording import (
    COMPARISONS,
    NUMBERS,
    REDUCTIONS,
    VIEWS,
    Node,
    Program,
)
from portable_mlp.typing import Array


@dataclass(frozen=True)
class Replay:
    """Source of the calls that a program is, see `lower`.

    Attributes
    ----------
    source : str
        To be read: ``print(replay.source)``.
    """

    source: str
    code: CodeType

    def bind(self, donated: list[Array], dialect: NumPyDialect) -> Callable[..., tuple[Any, ...]]:
        """Allocate, and return the function of the remaining arguments.

        Parameters
        ----------
        donated : list of arrays, C-contiguous
            Overwritten at each call by the program's first results.
        dialect : NumPyDialect
        """
        scope = dialect.globals()
        exec(self.code, scope)
        run: Callable[..., tuple[Any, ...]] = scope["bind"](*donated)
        return run


def lower(program: Program, n_donated: int, dialect: type[NumPyDialect]) -> Replay:
    """Plan the memory of a program, and write its calls.

    Parameters
    ----------
    program : Program
    n_donated : int
        So many of the first inputs are overwritten, by the outputs of the same place.
    dialect : type of NumPyDialect
    """
    if dialect.numeric_masks:
        program = with_numeric_masks(program)
    plan = _Plan(program, n_donated, dialect.block)
    source = _Writer(plan, dialect).source()
    return Replay(source, compile(source, "<replay>", "exec"))


def with_numeric_masks(program: Program) -> Program:
    """The program with comparisons made in the type to which they are only converted."""
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


def parts_at_home(calculated: list[Node]) -> dict[Node, tuple[Node, int]]:
    """What can be written straight into the vector it is joined in, and its offset there.

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


class _Plan:
    """Where each result of a program lies in memory.

    Attributes
    ----------
    segments : list of lists of Node
        What is calculated, in order; a segment of more than one is a chain of
        elementwise operations that run block by block.
    place : dict
        For each calculated node, its memory's number and its offset there in bytes.
        Negative numbers are scratch memories, as large as a block.
    sizes : list of int
        Bytes of the memories; the first are the donated arrays'.
    homes : dict
        For a result that is written straight into the array it will be joined in,
        that array's node and the offset there.
    """

    def __init__(self, program: Program, n_donated: int, block: int) -> None:
        self.program = program
        self.donated = program.inputs[:n_donated]
        self.passed = program.inputs[n_donated:]
        self.block = block
        self.fixed = self._fixed()
        calculated = [
            x for x in program.nodes
            if x.op not in VIEWS and x not in self.fixed and not x.is_number
        ]  # fmt: skip
        self.place: dict[Node, tuple[int, int]] = {}
        self.sizes: list[int] = []
        self.scratch: list[int] = []
        self.homes = self._homes(calculated)
        self.segments = self._segments(calculated)
        self._assign()

    def _fixed(self) -> set[Node]:
        """What depends on no input: computed once."""
        fixed: set[Node] = set()
        for x in self.program.nodes:
            if all(o in fixed for o in x.operands if isinstance(o, Node)):
                fixed.add(x)
        return fixed

    def _homes(self, calculated: list[Node]) -> dict[Node, tuple[Node, int]]:
        known = set(calculated)
        homes = parts_at_home(calculated)
        # And what such a result is calculated from elementwise, if nobody else reads it
        readers = Counter(o.root for x in calculated for o in {*x.arrays})
        readers.update(y.root for y in self.program.outputs if isinstance(y, Node))
        for x in reversed(calculated):
            if x in homes and x.elementwise and x.op != "where":
                for a in x.arrays:
                    alike = (a.shape, a.dtype) == (x.shape, x.dtype)
                    if alike and a in known and a not in homes and readers[a] == 1:
                        homes[a] = homes[x]
                        break
        return homes

    def _segments(self, calculated: list[Node]) -> list[list[Node]]:
        segments: list[list[Node]] = []
        chained: tuple[int, ...] | None = None
        for x in calculated:
            blockwise = (
                0 < self.block < x.size and x.elementwise
                and all(a.shape in ((), x.shape) for a in x.arrays)
            )  # fmt: skip
            if blockwise and x.shape == chained:
                segments[-1].append(x)
            else:
                segments.append([x])
            chained = x.shape if blockwise else None
        return segments

    def rows(self, segment: list[Node]) -> int:
        """Rows of a block; 0 if the segment is not to be cut."""
        (first, *more) = segment
        if not more or first.size <= self.block:
            return 0
        return max(1, first.shape[0] * self.block // first.size)

    # ------------------------------------------------------------ memory

    def _assign(self) -> None:
        uses: dict[Node, list[int]] = defaultdict(list)  # by segment
        for i, segment in enumerate(self.segments):
            for x in segment:
                for operand in x.arrays:
                    uses[operand.root].append(i)
        end = len(self.segments)
        for output in self.program.outputs:
            if isinstance(output, Node):
                uses[output.root].append(end)
        last = {x: max(segments) for x, segments in uses.items()}
        until: dict[int, int] = {}  # the segment after which a memory is free
        for x in self.donated:
            self.place[x] = self._new(x.n_bytes), 0
            until[self.place[x][0]] = last.get(x, 0)
        n_given = len(self.sizes)
        free: list[int] = []
        for now, segment in enumerate(self.segments):
            rows = self.rows(segment)
            left = {x: len([o for y in segment for o in y.arrays if o.root is x])
                    for x in segment}  # fmt: skip
            spare = list(range(len(self.scratch)))  # other segments' is free again
            for x in segment:
                if x in self.homes:
                    home, offset = self.homes[x]
                    if home not in self.place:
                        self.place[home] = self._take(free, home.n_bytes), 0
                    memory, _ = self.place[home]
                    self.place[x] = memory, offset
                    until[memory] = max(last[home], last[x], until.get(memory, 0))
                elif x not in self.place:
                    dead = self._overwritten(x, segment, until, now)
                    local = rows and last[x] == now
                    if local and (dead is None or dead >= n_given):
                        self._place_scratch(x, left, spare, rows)
                        continue
                    memory = self._take(free, x.n_bytes) if dead is None else dead
                    self.place[x] = memory, 0
                    until[memory] = last[x]
                self._retire(x, left, spare)
            free += [
                m for m, done in until.items() if done == now and m >= n_given and m not in free
            ]

    def _place_scratch(self, x: Node, left: dict[Node, int], spare: list[int], rows: int) -> None:
        """A result that only its own segment reads: a block of it is enough."""
        # An operand's memory serves if each element is read before it is written over
        alike = all(o.dtype.itemsize == x.dtype.itemsize for o in x.arrays)
        over_operands = alike and x.op != "where"
        if over_operands:
            self._retire(x, left, spare)
        n_bytes = rows * (x.n_bytes // x.shape[0])
        fits = [s for s in spare if self.scratch[s] >= n_bytes]
        if fits:
            number = fits[-1]
            spare.remove(number)
        else:
            number = len(self.scratch)
            self.scratch.append(n_bytes)
        self.place[x] = -1 - number, 0
        if not over_operands:
            self._retire(x, left, spare)

    def _retire(self, x: Node, left: dict[Node, int], spare: list[int]) -> None:
        """Scratch memory that x is the last to read; an elementwise result may go there."""
        for operand in x.arrays:
            root = operand.root
            if root in left:
                left[root] -= 1
                memory = self.place[root][0]
                if not left[root] and memory < 0:
                    spare.append(-1 - memory)

    def _overwritten(
        self, x: Node, segment: list[Node], until: dict[int, int], now: int
    ) -> int | None:
        """A memory that nobody reads any more where x is written, if there is one.

        That of an operand, where each element is read before it is written; or that of
        the donated array which x replaces.
        """
        later = segment[segment.index(x) + 1 :]
        still_read = {self.place.get(o.root, (0,))[0] for y in later for o in y.arrays}
        candidates: dict[int, bool] = {}
        for operand in x.arrays:
            memory, offset = self.place.get(operand.root, (-1, 0))
            fits = (
                x.elementwise and x.op != "where"
                and (operand.shape, operand.dtype) == (x.shape, x.dtype) and operand.contiguous
                and offset == 0 and memory >= 0 and self.sizes[memory] == x.n_bytes
                and until[memory] <= now and memory not in still_read
            )  # fmt: skip
            # Any other view of the same memory would be read after it was overwritten
            candidates[memory] = candidates.get(memory, True) and fits
        for memory, output in enumerate(self.program.outputs[: len(self.donated)]):
            if output is x and until[memory] <= now and memory not in still_read:
                candidates.setdefault(memory, True)
        # Donated memory first: its result is to be there in the end
        return min((m for m, fits in candidates.items() if fits), default=None)

    def _new(self, n_bytes: int) -> int:
        self.sizes.append(n_bytes)
        return len(self.sizes) - 1

    def _take(self, free: list[int], n_bytes: int) -> int:
        fits = [m for m in free if n_bytes <= self.sizes[m] <= 2 * n_bytes + 4096]
        if not fits:
            return self._new(n_bytes)
        best = min(fits, key=lambda m: self.sizes[m])
        free.remove(best)
        return best


class _Writer:
    """Writes a plan's calls."""

    def __init__(self, plan: _Plan, dialect: type[NumPyDialect]) -> None:
        self.plan = plan
        self.dialect = dialect
        self.foreign = set(plan.passed)
        self.bound: list[str] = []  # lines run once
        self.calls: list[str] = []  # lines run at each call
        self.names: dict[Any, str] = {}

    def source(self) -> str:
        plan = self.plan
        donated = [self._set(x, f"state{i}") for i, x in enumerate(plan.donated)]
        passed = [self._set(x, f"arg{i}") for i, x in enumerate(plan.passed)]
        own = range(len(donated), len(plan.sizes))
        memories = {f"m{m}": plan.sizes[m] for m in own}
        memories |= {f"s{s}": n_bytes for s, n_bytes in enumerate(plan.scratch)}
        ends = [*accumulate((-(-n // 64) * 64 for n in memories.values()), initial=0)]
        self.bound.append(f"memory = work({ends[-1]})")
        for (memory, n_bytes), start in zip(memories.items(), ends, strict=False):
            self.bound.append(f"{memory} = memory[{start}:{start + n_bytes}]")
        for segment in plan.segments:
            rows = plan.rows(segment)
            if rows:
                self._blocks(segment, rows)
            else:
                for x in segment:
                    self._call(x, self.calls)
        self._settle()
        results = "".join(f"{self._result(y)}, " for y in plan.program.outputs[len(donated) :])
        lines = [
            f"def bind({', '.join(donated)}):",
            *(f"    {line}" for line in self.bound),
            f"    def run({', '.join(passed)}):",
            *(f"        {line}" for line in self.calls),
            f"        return ({results})",
            "    return run",
        ]
        return "\n".join(lines) + "\n"

    def _settle(self) -> None:
        """Bring what is to be in donated memory there, if it is not."""
        plan = self.plan
        moves: list[str] = []
        for x, y in zip(plan.donated, plan.program.outputs, strict=False):
            if plan.place.get(y) != plan.place[x]:
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
        """A local name for a library's function."""
        if path not in self.names:
            self._set(path, path.split(".", 1)[1].replace(".", "_") + "_")
            self.bound.append(f"{self.names[path]} = {path}")
        return self.names[path]

    def _number(self, x: Any) -> str:
        """A number, known or changing from call to call, as an expression."""
        if not isinstance(x, Node):
            return repr(x) if abs(x) < float("inf") else f"float('{x}')"
        if x in self.names:
            return self.names[x]
        return "(" + NUMBERS[x.op].format(*(self._number(o) for o in x.operands)) + ")"

    def operand(self, x: Any, dtype: Any) -> str:
        """An array; of a number, one without axes: half the time of a Python number."""
        if isinstance(x, Node) and not x.is_number:
            return self.name(x)
        key = ("scalar", dtype, x if isinstance(x, Node) else (type(x), repr(x)))
        if key not in self.names:
            name = self._fresh(key, "c")
            known = not isinstance(x, Node)
            value = self._number(x) if known else 0
            self.bound.append(f"{name} = {self.dialect.constant(value, (), dtype)}")
            if not known:
                self.calls.append(f"{name}[()] = {self._number(x)}")
        return self.names[key]

    def name(self, x: Node) -> str:
        """A variable that holds x; made where it is asked for first."""
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
            given = memory < len(self.plan.donated)
            where = (
                self.dialect.bytes_of(self.name(self.plan.donated[memory]))
                if given else f"m{memory}"
            )  # fmt: skip
            self.bound.append(f"{name} = {self._array(where, offset, x.shape, x.dtype)}")
        return name

    def _array(self, memory: str, offset: int, shape: tuple[int, ...], dtype: Any) -> str:
        n_bytes = int(np.prod(shape)) * dtype.itemsize
        where = f"{memory}[{offset}:{offset + n_bytes}]"
        return f"{where}.view({self.dialect.dtype(dtype)}).reshape({shape})"

    def _expression(self, x: Node) -> str:
        """Views, and what is computed once."""
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
            return f"{first}[{', '.join(_key(k) for k in x.attrs)}]"
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
        # As (a b)ᵀ = bᵀ aᵀ
        product = self._fresh(("transposed", x), "p")
        array = self._array(f"empty({x.n_bytes})", 0, (x.shape[1], x.shape[0]), x.dtype)
        self.bound.append(f"{product} = {array}")
        a = self._view(left, dialect.transpose(a, (1, 0)))
        b = self._view(right, dialect.transpose(b, (1, 0)))
        line = dialect.matmul(b, a, product, (2, 2))
        return f"{line}; {dialect.assign(out, dialect.transpose(product, (1, 0)))}"

    def _concat(self, x: Node) -> list[str]:
        """Copy the parts that are not there yet."""
        lines, start = [], 0
        (axis,) = x.attrs
        for part in x.operands:
            end = start + part.shape[axis]
            # A part that stands twice is at home in one place
            if axis or self.plan.homes.get(part.root) != (x, start * x.dtype.itemsize):
                key = ":, " * axis + f"{start}:{end}"
                lines.append(self.dialect.assign(f"{self.name(x)}[{key}]", self.name(part)))
            start = end
        return lines

    def _blocks(self, segment: list[Node], rows: int) -> None:
        """A chain of elementwise operations, a block of rows at a time."""
        n = segment[0].shape[0]
        views: dict[str, str] = {}  # a block's name -> the whole array's
        passed: list[bool] = []

        def cut(x: Any, dtype: Any) -> str:
            if not isinstance(x, Node) or x.shape != segment[0].shape:
                return self.operand(x, dtype)
            passed.append(x.root in self.foreign)
            memory, _ = self.plan.place.get(x, (0, 0))
            if memory < 0:  # scratch: the whole of it is a block
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
        """Several short rows as one long one, where a vector is added to each of them.

        NumPy's inner loop is over one row: with few columns it does little else than
        to begin anew.
        """
        if x.ndim != 2 or not x.elementwise or not x.size:
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
        """A row, n times."""
        tile = self._fresh(("tile", x), "t")
        memory = self._array(f"empty({n * x.n_bytes})", 0, (n, k), x.dtype)
        self.bound += [f"{tile} = {memory}", f"{tile}_ = {tile}.reshape(-1)"]
        self.calls.append(self.dialect.assign(tile, text))
        return f"{tile}_"

    def _vector(self, value: Any, length: int, dtype: Any) -> str:
        """A number, repeated."""
        key = ("vector", length, dtype, type(value), repr(value))
        if key not in self.names:
            constant = self.dialect.constant(self._number(value), (length,), dtype)
            self.bound.append(f"{self._fresh(key, 'c')} = {constant}")
        return self.names[key]

    def _view(self, x: Node, text: str) -> str:
        """A name for an expression of x that looks at its memory in another way."""
        key = ("view", text)
        if key not in self.names:
            name = self._fresh(key, "l")
            lines = self.calls if x.root in self.foreign else self.bound
            lines.append(f"{name} = {text}")
        return self.names[key]


def _key(k: Any) -> str:
    """An index as it is written between brackets."""
    if isinstance(k, tuple):
        _, start, stop, step = k
        return f"{'' if start is None else start}:{'' if stop is None else stop}" + (
            "" if step is None else f":{step}"
        )
    return "..." if k is ... else repr(k)
