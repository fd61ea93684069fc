"""Loops in C for runs of elementwise operations.

A call of a library reads its operands from memory, writes its result there, and has an
overhead of half a microsecond.  A loop keeps intermediate results in registers, and one
function holds all loops between two operations that are not loops.  Only operations whose
result IEEE 754 defines to the last bit become loops, in the order of the program.  So loops
and NumPy's calls give the same bits, and a switch between them at any step changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from portable_mlp.engines.graph.c_source import COMBINE, FUNCTIONS, TYPES
from portable_mlp.engines.graph.elements import Access, broadcast, linear, through
from portable_mlp.engines.graph.program import COMPARISONS, REDUCTIONS, VIEWS, Node

EXACT = {
    "add", "subtract", "multiply", "divide", "sqrt", "square", "reciprocal", "negative",
    "absolute", "maximum", "minimum", "rint", "floor", "ceil", "trunc", "where", "astype",
    "copy", "logical_and", "logical_or", "logical_not", "bitwise_and", "bitwise_or",
    "bitwise_xor", *COMPARISONS,
}  # fmt: skip
"""Functions with one correct result; for zeros of either sign, `maximum` is NumPy's on x86."""

OF_INTEGERS = {
    "add", "subtract", "multiply", "bitwise_and", "bitwise_or", "bitwise_xor", "left_shift",
    "right_shift", "where", "copy", *COMPARISONS,
}  # fmt: skip
"""Functions of signed integers of 32 or 64 bits; a shift is by a constant."""

BLOCK = 512
"""Elements that stay in the first-level cache from one loop to the next."""

FEW = 64
"""The most rows that a loop adds up, each of them longer.  NumPy adds them in the same order."""

_FUNCTIONS = FUNCTIONS | {"absolute": "fabs({0})", "astype": "{0}", "copy": "{0}"}

PREAMBLE = """\
#include <float.h>
#include <math.h>
#include <stdbool.h>
#include <tgmath.h>
#ifdef __FAST_MATH__
#error "arithmetic is not that of IEEE 754"
#endif
#if FLT_EVAL_METHOD != 0
#error "results are not rounded at once"
#endif
"""


def is_loop(x: Node, passed: set[Node]) -> bool:
    """Tell whether x is computed in a loop.

    Parameters
    ----------
    x : Node
    passed : set of Node
        Inputs that have another memory at each call.
    """
    if any(o.root in passed for o in x.arrays):
        return False
    if x.op in REDUCTIONS:
        (operand,) = x.operands
        few = operand.ndim == 2 and x.attrs[0] == (0,) and 0 < operand.shape[0] <= FEW < x.size
        plain = operand.contiguous and _plain(seen(operand, Access("j * 2 + i"))[1])
        return few and plain and operand.dtype == x.dtype and str(x.dtype) in ("float32", "float64")
    kinds = [*(d for d in x.wanted if isinstance(d, np.dtype)), x.dtype]
    if x.op not in EXACT | OF_INTEGERS or any(str(kind) not in TYPES for kind in kinds):
        return False
    if x.op == "astype" and (
        x.operands[0].is_number or (x.operands[0].dtype.kind == "f" and x.dtype.kind in "iu")
    ):
        return False  # out-of-range casts from float to int are undefined in C
    if x.op in ("absolute", "reciprocal") and x.dtype.kind != "f":
        return False
    if x.op not in COMPARISONS and any(d.kind == "i" for d in kinds):
        small = any(d.kind == "i" and d.itemsize < 4 for d in kinds)  # C would widen them
        if x.op not in {"astype"} | OF_INTEGERS or small:
            return False
    if x.op.endswith("shift"):
        # C does not define shifts by negative numbers, or by as many bits as there are
        by, bits = x.operands[1], 8 * x.dtype.itemsize
        if not (x.dtype.kind == "i" and isinstance(by, int) and 0 <= by < bits):
            return False
    if x.op in COMPARISONS and len(set(x.wanted)) > 1:
        return False  # comparing signed with unsigned numbers, C converts the signed one
    return all(_plain(access) for _, access in _reads(x, linear(x.shape, _indices(x))))


def _indices(x: Node) -> list[str]:
    return ["0" if n == 1 else f"i{axis}" for axis, n in enumerate(x.shape)]


def _plain(access: Access) -> bool:
    """Tell whether an element is found without a division, which would be slow in a loop."""
    return not {"/", "%"} & {*access.flat}


def _reads(x: Node, own: Access) -> Iterator[tuple[Node, Access]]:
    """Yield the operands with axes, and the element of each that an element of x depends on."""
    for operand in x.with_axes:
        yield seen(operand, broadcast(operand, x.shape, own))


def seen(x: Node, access: Access) -> tuple[Node, Access]:
    """Return the array that a view is of, and the element of it that an element of x is."""
    while x.op in VIEWS:
        access = through(x, access)
        (x,) = x.operands
    return x, access


class LoopWriter:
    """Writer of C functions, each a sequence of loops.

    Parameters
    ----------
    registers : set of Node
        Results that only their own loop reads.
    place : mapping of Node
        Places in memory; arrays with the same place share it.
    name : callable
        From a node to the name of its array.
    number : callable
        From a number that changes from call to call, and a data type, to the name of the
        array that holds it.

    Attributes
    ----------
    functions : list of str
        The source of the functions so far.
    """

    def __init__(
        self,
        registers: set[Node],
        place: Mapping[Node, Any],
        name: Callable[[Node], str],
        number: Callable[[Any, Any], str],
    ) -> None:
        self.registers = registers
        self.place = place
        self.name = name
        self.number = number
        self.functions: list[str] = []
        self._n_runs = 0
        self._arrays: dict[Any, tuple[int, str]] = {}  # of a run: number and name
        self._parameters: dict[str, str] = {}  # of a loop: parameter to argument

    @property
    def source(self) -> str:
        return PREAMBLE + "\n".join(self.functions) if self.functions else ""

    def run(self, segments: list[list[Node]]) -> tuple[int, list[str]]:
        """Write a run of loops as a function; return its number, and the names of its arrays.

        Parameters
        ----------
        segments : list of lists of Node
            Each becomes a loop: one reduction, or elementwise operations of one shape.
        """
        number, calls = self._n_runs, []
        self._n_runs += 1
        self._arrays = {}
        for segment in segments:
            self._parameters = {}
            body = self._sum(segment[0]) if segment[0].op in REDUCTIONS else self._loop(segment)
            name = f"loop{len(self.functions)}"
            self._function(f"static void {name}({', '.join(self._parameters)})", body)
            calls.append(f"{name}({', '.join(self._parameters.values())});")
        self._function(f"void run{number}(void **memory)", calls)
        return number, [name for _, name in self._arrays.values()]

    def _function(self, head: str, body: list[str]) -> None:
        self.functions.append("\n".join([f"{head} {{", *(f"    {line}" for line in body), "}\n"]))

    def _at(self, key: Any, name: str) -> int:
        return self._arrays.setdefault(key, (len(self._arrays), name))[0]

    def _pointer(self, root: Node) -> str:
        """Return the name of a parameter that points to an array."""
        at = self._at(self.place.get(root, root), self.name(root))
        # Arrays that share memory share a pointer, or are only read: so `restrict` holds
        self._parameters[f"{TYPES[str(root.dtype)]} *restrict m{at}"] = f"memory[{at}]"
        return f"m{at}"

    def _value(self, x: Node, dtype: Any, access: Access) -> str:
        """Return the expression of a number, or of an element of a number with axes."""
        name, kind = self.number(x, dtype), TYPES[str(dtype)]
        at = self._at(name, name)
        if x.shape:
            self._parameters[f"{kind} *restrict h{at}"] = f"memory[{at}]"
            return f"h{at}[{access.flat}]"
        self._parameters[f"{kind} h{at}"] = f"*({kind} *)memory[{at}]"
        return f"h{at}"

    def _loop(self, segment: list[Node]) -> list[str]:
        """Return the loop of elementwise operations: all at one element, then at the next."""
        shape = segment[0].shape
        own = Access("i")
        if not all(_plain(access) for x in segment for _, access in _reads(x, own)):
            indices = _indices(segment[0])
            own = linear(shape, indices)
            bounds = [(i, n) for i, n in zip(indices, shape, strict=True) if i != "0"]
            return _nested(bounds, self._statements(segment, own, {}))
        n = segment[0].size
        parts = self._parts(segment)
        if n <= BLOCK or len(parts) == 1:
            return _nested([("i", n)], self._statements(segment, own, {}))
        here: dict[Node, str] = {}
        lines = []
        for part in parts:
            lines.append("for (long i = start; i < end; ++i) {")
            lines += [f"    {line}" for line in self._statements(part, own, here)]
            lines.append("}")
            here = {x: f"{self._pointer(x)}[i]" for x in here if x not in self.registers}
        return [
            f"for (long start = 0; start < {n}; start += {BLOCK}) {{",
            f"    const long end = start < {n - BLOCK} ? start + {BLOCK} : {n};",
            *(f"    {line}" for line in lines),
            "}",
        ]

    def _parts(self, segment: list[Node]) -> list[list[Node]]:
        """Return the operations in parts, each of which ends with a stored result.

        Several short loops over few arrays wait less for memory than one loop over many,
        because the processor can look further ahead.  If a part would need the registers of
        another one, the segment stays whole.
        """
        parts: list[list[Node]] = [[]]
        for x in segment:
            parts[-1].append(x)
            if x not in self.registers and x is not segment[-1]:
                parts.append([])
        for part in reversed(parts):
            for o in (o for x in part for o in x.arrays):
                if o in self.registers and o not in part:
                    return [segment]
        return parts

    def _statements(self, nodes: list[Node], own: Access, here: dict[Node, str]) -> list[str]:
        """Return the statements for one element; ``here`` maps results to their variables."""
        lines = []
        for x in nodes:
            kind, name = TYPES[str(x.dtype)], f"v{len(here)}"
            wanted = (x.dtype,) if x.op == "astype" else x.wanted
            operands = [
                self._read(o, d, x.shape, own, here)
                for o, d in zip(x.operands, wanted, strict=True)
            ]
            lines.append(f"const {kind} {name} = {_FUNCTIONS[x.op].format(*operands)};")
            here[x] = name
            if x not in self.registers:
                lines.append(f"{self._pointer(x)}[{own.flat}] = {name};")
        return lines

    def _read(
        self, x: Any, dtype: Any, shape: tuple[int, ...], own: Access, here: dict[Node, str]
    ) -> str:
        """Return the element of an operand, converted to ``dtype``."""
        if not isinstance(x, Node):
            return _literal(x, dtype)
        if x.is_number:
            return self._value(x, dtype, broadcast(x, shape, own))
        root, access = seen(x, broadcast(x, shape, own))
        text = here.get(root) or f"{self._pointer(root)}[{access.flat}]"
        kind = TYPES[str(dtype)]
        if root.dtype == dtype:
            return text
        # A plain conversion of booleans would not be vectorised
        return f"({text} ? ({kind})1 : ({kind})0)" if root.dtype == bool else f"({kind}){text}"

    def _sum(self, x: Node) -> list[str]:
        """Return loops that reduce rows: copy the first row, then combine the others in order."""
        (operand,) = x.operands
        rows, n = operand.shape
        root, access = seen(operand, Access("i"))
        _, combine = COMBINE[x.op]
        source, out = self._pointer(root), self._pointer(x)
        _, following = seen(operand, Access(f"j * {n} + i"))
        kind = TYPES[str(x.dtype)]
        more = [
            f"const {kind} a = {out}[i], b = {source}[{following.flat}];",
            f"{out}[i] = {combine.format('a', 'b')};",
        ]
        # NumPy starts from zero, and 0 + -0 is 0
        start = "0 + " if x.op == "sum" else ""
        return [
            *_nested([("i", n)], [f"{out}[i] = {start}{source}[{access.flat}];"]),
            f"for (long j = 1; j < {rows}; ++j)",
            *(f"    {line}" for line in _nested([("i", n)], more)),
        ]


def _literal(x: Any, dtype: Any) -> str:
    """Return a number as a C literal of a data type, rounded as NumPy rounds it."""
    value, kind = np.asarray(x).astype(dtype)[()], TYPES[str(dtype)]
    if value.dtype.kind != "f":
        return f"({kind}){int(value)}{'u' * (value.dtype.kind == 'u')}"
    if not np.isfinite(value):
        return f"({kind})" + (
            "NAN" if np.isnan(value) else "-INFINITY" if value < 0 else "INFINITY"
        )
    return f"({kind}){float(x)!r}"


def _nested(bounds: list[tuple[str, int]], body: list[str]) -> list[str]:
    """Return nested loops over the indices, the first outermost."""
    lines = body
    for i, n in reversed(bounds):
        lines = [
            f"for (long {i} = 0; {i} < {n}; ++{i}) {{",
            *(f"    {line}" for line in lines),
            "}",
        ]
    return lines
