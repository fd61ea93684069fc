"""Runs of elementwise operations as loops in C.

A library's call reads its operands from memory and writes its result there, and costs half a
microsecond besides.  A loop keeps what only itself needs in registers, and one function has
all loops between two operations that are none.  Only what IEEE 754 fixes to the last bit is
taken, in the order of the program: loops and NumPy's calls give the same bits, so that it
does not matter when the one takes over from the other.
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
    "absolute", "maximum", "minimum", "where", "astype", "copy", "logical_and", "logical_or",
    "logical_not", "bitwise_and", "bitwise_or", "bitwise_xor", *COMPARISONS,
}  # fmt: skip
"""Functions that have one right result; of zeros of either sign, `maximum` has NumPy's on x86."""

BLOCK = 512
"""Elements that stay in the nearest cache from one loop to the next."""

FEW = 64
"""Of rows that are added up: at most so many, each longer.  NumPy, too, adds one by one then."""

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
    """Whether x is to be computed in a loop.

    Parameters
    ----------
    x : Node
    passed : set of Node
        Inputs that lie elsewhere at each call.
    """
    if any(o.root in passed for o in x.arrays):
        return False
    if x.op in REDUCTIONS:
        (operand,) = x.operands
        few = operand.ndim == 2 and x.attrs[0] == (0,) and 0 < operand.shape[0] <= FEW < x.size
        plain = operand.contiguous and _plain(seen(operand, Access("j * 2 + i"))[1])
        return few and plain and operand.dtype == x.dtype and str(x.dtype) in ("float32", "float64")
    kinds = [*(d for d in x.wanted if isinstance(d, np.dtype)), x.dtype]
    if x.op not in EXACT or any(str(kind) not in TYPES for kind in kinds):
        return False
    if x.op == "astype" and (
        x.operands[0].is_number or (x.operands[0].dtype.kind == "f" and x.dtype.kind in "iu")
    ):
        return False  # out-of-range casts from float to int are undefined in C
    if x.op in ("absolute", "reciprocal") and x.dtype.kind != "f":
        return False
    if any(d.kind == "i" and x.op not in COMPARISONS for d in kinds):
        return False  # C's signed numbers need not wrap
    if x.op in COMPARISONS and len(set(x.wanted)) > 1:
        return False  # of signed with unsigned numbers: C converts the former
    return all(_plain(access) for _, access in _reads(x, linear(x.shape, _indices(x))))


def _indices(x: Node) -> list[str]:
    return ["0" if n == 1 else f"i{axis}" for axis, n in enumerate(x.shape)]


def _plain(access: Access) -> bool:
    """Whether an element is found without a division."""
    return not {"/", "%"} & {*access.flat}


def _reads(x: Node, own: Access) -> Iterator[tuple[Node, Access]]:
    """Yield what has axes, and its elements, that an element of x is computed from."""
    for operand in x.with_axes:
        yield seen(operand, broadcast(operand, x.shape, own))


def seen(x: Node, access: Access) -> tuple[Node, Access]:
    """Return what a view's element is of the array that it looks at."""
    while x.op in VIEWS:
        access = through(x, access)
        (x,) = x.operands
    return x, access


class LoopWriter:
    """Writes functions, each a few loops one after the other.

    Parameters
    ----------
    registers : set of Node
        What is needed in its own loop only.
    place : mapping of Node
        Arrays of the same place lie in the same memory.
    name, number : callable
        The names of an array in memory, and of the array without axes that holds a number
        which changes from call to call, in a given data type.

    Attributes
    ----------
    functions : list of str
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
        self._arrays: dict[Any, tuple[int, str]] = {}  # a run's
        self._parameters: dict[str, str] = {}  # a loop's, and what it is called with

    @property
    def source(self) -> str:
        return PREAMBLE + "\n".join(self.functions) if self.functions else ""

    def run(self, segments: list[list[Node]]) -> tuple[int, list[str]]:
        """Write a run of loops; return its number, and the names of the arrays it takes.

        Parameters
        ----------
        segments : list of lists of Node
            Each a loop: one reduction, or elementwise operations of one shape.
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
        """Return a parameter that points to an array."""
        at = self._at(self.place.get(root, root), self.name(root))
        # Memory that two point to is only read
        self._parameters[f"{TYPES[str(root.dtype)]} *restrict m{at}"] = f"memory[{at}]"
        return f"m{at}"

    def _value(self, x: Node, dtype: Any, access: Access) -> str:
        """Return a parameter that is a number, or an element of one with axes."""
        name, kind = self.number(x, dtype), TYPES[str(dtype)]
        at = self._at(name, name)
        if x.shape:
            self._parameters[f"{kind} *restrict h{at}"] = f"memory[{at}]"
            return f"h{at}[{access.flat}]"
        self._parameters[f"{kind} h{at}"] = f"*({kind} *)memory[{at}]"
        return f"h{at}"

    def _loop(self, segment: list[Node]) -> list[str]:
        """Elementwise operations, all at one element and then at the next."""
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
        """Return the operations up to each stored result that needs no other's registers.

        Short loops over few arrays wait less for memory than one over many: what is computed
        does not keep the processor from looking ahead.
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
        """Return what is done at one element; ``here`` names what is known of it, and gets more."""
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
        """Return an operand's element, in the type in which it is taken."""
        if not isinstance(x, Node):
            return _literal(x, dtype)
        if x.is_number:
            return self._value(x, dtype, broadcast(x, shape, own))
        root, access = seen(x, broadcast(x, shape, own))
        text = here.get(root) or f"{self._pointer(root)}[{access.flat}]"
        kind = TYPES[str(dtype)]
        if root.dtype == dtype:
            return text
        # To convert booleans as such would hinder vector instructions
        return f"({text} ? ({kind})1 : ({kind})0)" if root.dtype == bool else f"({kind}){text}"

    def _sum(self, x: Node) -> list[str]:
        """Return a sum, or another reduction, over rows: the first, and one row after the other."""
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
        # NumPy adds the first to zero, which makes -0 a 0
        start = "0 + " if x.op == "sum" else ""
        return [
            *_nested([("i", n)], [f"{out}[i] = {start}{source}[{access.flat}];"]),
            f"for (long j = 1; j < {rows}; ++j)",
            *(f"    {line}" for line in _nested([("i", n)], more)),
        ]


def _literal(x: Any, dtype: Any) -> str:
    """Return a number, rounded to a data type as NumPy does."""
    value, kind = np.asarray(x).astype(dtype)[()], TYPES[str(dtype)]
    if value.dtype.kind != "f":
        return f"({kind}){int(value)}{'u' * (value.dtype.kind == 'u')}"
    if not np.isfinite(value):
        return f"({kind})" + (
            "NAN" if np.isnan(value) else "-INFINITY" if value < 0 else "INFINITY"
        )
    return f"({kind}){float(x)!r}"


def _nested(bounds: list[tuple[str, int]], body: list[str]) -> list[str]:
    """Loops within each other, from the first to the last index."""
    lines = body
    for i, n in reversed(bounds):
        lines = [
            f"for (long {i} = 0; {i} < {n}; ++{i}) {{",
            *(f"    {line}" for line in lines),
            "}",
        ]
    return lines
