"""Recording: a function of arrays is called once with stand-ins, and becomes a program.

The stand-ins (`Traced`) have a shape and a data type, but no values.  Each operation on
them is recorded as a node of the program.  The operations that can be recorded are a small
closed set: the standard's elementwise functions, and a dozen others.  A function that does
more, or branches on a value, raises `Unrecordable`; the caller then runs it as it is.

Nodes are unique: the same operation on the same operands is recorded once.  So a formula
that is written in two places (an exponential in a loss and in its gradient) is
computed once.  Operations that do not contribute to a result are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any

import numpy as np

from portable_mlp.engines.graph.program import (
    NUMBERS,
    Node,
    Program,
    Shape,
    Shaped,
    flatten,
    unflatten,
)
from portable_mlp.engines.graph.verifier import verify, verifying


class Unrecordable(Exception):
    """A function does something that a program cannot express; the message says what."""


Operator = Callable[["Traced", Any], "Traced"]


def _operators(function: str) -> tuple[Operator, Operator]:
    """Return an operator's methods, for a stand-in on its left and on its right."""

    def left(self: Traced, other: Any) -> Traced:
        return self.recorder.elementwise(function, self, other)

    def right(self: Traced, other: Any) -> Traced:
        return self.recorder.elementwise(function, other, self)

    return left, right


class Traced(Shaped):
    """A stand-in for an array, or for a number, whose value is not known; see `Node`.

    The data type of a number is a Python type: with an array, it takes the array's data type.
    Operators record an operation, and so does ``==``.
    """

    __slots__ = ("attrs", "contiguous", "dtype", "op", "operands", "recorder", "shape")
    __array_ufunc__ = None  # so that NumPy's scalars call the methods below

    def __init__(
        self,
        recorder: Recorder,
        op: str,
        operands: tuple[Any, ...],
        attrs: tuple[Any, ...],
        shape: Shape,
        dtype: Any,
        contiguous: bool,
    ) -> None:
        self.recorder = recorder
        self.op = op
        self.operands = operands
        self.attrs = attrs
        self.shape = shape
        self.dtype = dtype
        self.contiguous = contiguous

    def __repr__(self) -> str:
        return f"<{self.op} {self.shape} {self.dtype}>"

    @property
    def device(self) -> str:
        return "cpu"

    @property
    def T(self) -> Traced:
        if self.ndim != 2:  # the standard defines it of matrices alone
            raise Unrecordable(f"it takes the transpose T of an array of {self.ndim} dimensions")
        return self.recorder.permute_dims(self, (1, 0))

    @property
    def mT(self) -> Traced:
        return self.recorder.matrix_transpose(self)

    def __getitem__(self, key: Any) -> Traced:
        return self.recorder.index(self, key)

    def _unknown(self, *_: Any) -> Any:
        raise Unrecordable("it looks at the value of an array")

    __bool__ = __float__ = __int__ = __index__ = __len__ = __iter__ = __array__ = _unknown
    __setitem__ = _unknown

    __add__, __radd__ = _operators("add")
    __sub__, __rsub__ = _operators("subtract")
    __mul__, __rmul__ = _operators("multiply")
    __truediv__, __rtruediv__ = _operators("divide")
    __pow__, __rpow__ = _operators("power")
    __floordiv__, __rfloordiv__ = _operators("floor_divide")
    __mod__, __rmod__ = _operators("remainder")
    __and__, __rand__ = _operators("bitwise_and")
    __or__, __ror__ = _operators("bitwise_or")
    __xor__, __rxor__ = _operators("bitwise_xor")
    __lshift__, __rlshift__ = _operators("left_shift")
    __rshift__, __rrshift__ = _operators("right_shift")
    __lt__, _ = _operators("less")
    __le__, _ = _operators("less_equal")
    __gt__, _ = _operators("greater")
    __ge__, _ = _operators("greater_equal")
    __eq__, _ = _operators("equal")  # type: ignore[assignment]
    __ne__, _ = _operators("not_equal")  # type: ignore[assignment]

    def __neg__(self) -> Traced:
        return self.recorder.elementwise("negative", self)

    def __abs__(self) -> Traced:
        return self.recorder.elementwise("absolute", self)

    def __invert__(self) -> Traced:
        return self.recorder.elementwise("invert", self)

    def __matmul__(self, other: Traced) -> Traced:
        return self.recorder.matmul(self, other)

    __hash__ = object.__hash__


# The standard's names where NumPy's ufuncs are called otherwise
_UFUNCS = {
    "abs": "absolute", "acos": "arccos", "acosh": "arccosh", "asin": "arcsin",
    "asinh": "arcsinh", "atan": "arctan", "atan2": "arctan2", "atanh": "arctanh",
    "bitwise_left_shift": "left_shift", "bitwise_right_shift": "right_shift",
    "bitwise_invert": "invert", "pow": "power", "round": "rint",
}  # fmt: skip


class Recorder:
    """A namespace of the array API standard whose functions record their calls.

    A function that it lacks raises `Unrecordable`.
    """

    finfo = staticmethod(np.finfo)

    def __init__(self) -> None:
        self._nodes: dict[Any, Traced] = {}

    def __getattr__(self, name: str) -> Any:
        found = getattr(np, _UFUNCS.get(name, name), None)
        if isinstance(found, np.ufunc) and found.signature is None and found.nout == 1:
            return partial(self.elementwise, found.__name__)
        if isinstance(found, type) and issubclass(found, np.generic):
            return np.dtype(found)
        if isinstance(found, float):  # pi, e, inf, nan
            return found
        raise Unrecordable(f"the recorder has no {name}")

    # ------------------------------------------------------------ nodes

    def node(
        self,
        op: str,
        operands: tuple[Any, ...],
        attrs: tuple[Any, ...],
        shape: Shape,
        dtype: Any,
        contiguous: bool = True,
    ) -> Traced:
        """Return the one node of this operation on these operands."""
        # 1, 1.0 and True are equal, 0.0 and -0.0 too, but not the same operand
        names = tuple(
            id(o) if isinstance(o, Traced) else (type(o).__name__, repr(o)) for o in operands
        )
        key = op, names, attrs, shape, dtype
        if key not in self._nodes:
            self._nodes[key] = Traced(self, op, operands, attrs, shape, dtype, contiguous)
        return self._nodes[key]

    @property
    def nodes(self) -> list[Traced]:
        """All recorded nodes, in order."""
        return list(self._nodes.values())

    def input(self, number: int, shape: Shape, dtype: Any) -> Traced:
        """Return the stand-in of an argument of the program."""
        return self.node("input", (), (number,), shape, dtype)

    def _operand(self, x: Any) -> Any:
        if isinstance(x, Traced) or type(x) in (bool, int, float):
            return x
        if isinstance(x, np.ndarray | np.generic):
            raise Unrecordable("it mixes in arrays that are not its arguments")
        raise Unrecordable(f"it computes with {type(x).__name__}")

    def elementwise(self, function: str, *operands: Any) -> Traced:
        operands = tuple(self._operand(o) for o in operands)
        traced = [o for o in operands if isinstance(o, Traced)]
        ufunc: np.ufunc = getattr(np, function)
        kinds = [_kind(o) for o in operands]
        if all(isinstance(kind, type) for kind in kinds):
            # Numbers stay numbers: Python computes them at each call, as the eager step does
            if function not in NUMBERS:
                raise Unrecordable(f"it takes {function} of a number")
            kind = float if function == "divide" or any(k is float for k in kinds) else int
            return self.node(function, operands, (), _common_shape(operands), kind)
        try:
            *wanted, dtype = ufunc.resolve_dtypes((*kinds, None))
        except TypeError as error:
            raise Unrecordable(str(error)) from error
        # NumPy converts operands to the data type of its inner loop: here that is a node
        operands = tuple(
            self.astype(o, d) if isinstance(o, Traced) and not o.is_number and o.dtype != d else o
            for o, d in zip(operands, wanted, strict=True)
        )
        shape = _common_shape(operands)
        # Elementwise functions commute with a transposition: f(aᵀ, b) = f(a, bᵀ)ᵀ.  So the
        # result has its operands' layout, and a matrix product can read the transpose
        large = [t for t in traced if t.shape == shape]
        axes = large[0].attrs[0] if large and large[0].op == "permute" else None
        if (
            axes is not None
            and all(t.op == "permute" and t.attrs == (axes,) for t in large)
            and all(t.ndim in (0, len(shape)) for t in traced)
            and not any(t.is_number and t.shape for t in traced)
        ):
            back = tuple(sorted(range(len(axes)), key=axes.__getitem__))
            inner = [
                self.permute_dims(o, back) if isinstance(o, Traced) and o.shape else o
                for o in operands
            ]
            return self.permute_dims(self.elementwise(function, *inner), axes)
        return self.node(function, operands, tuple(wanted), shape, dtype)

    # ------------------------------------------------------------ the table

    def astype(self, x: Traced, dtype: Any, *, copy: bool = True) -> Traced:
        dtype = np.dtype(dtype)
        return (
            x
            if x.dtype == dtype and not x.is_number
            else self.node("astype", (x,), (), x.shape, dtype)
        )

    def where(self, condition: Traced, a: Any, b: Any) -> Traced:
        a, b = self._operand(a), self._operand(b)
        kinds = [_kind(x) for x in (a, b)]
        _, _, dtype = np.add.resolve_dtypes((*kinds, None))
        a, b = (
            self.astype(x, dtype) if isinstance(x, Traced) and not x.is_number else x
            for x in (a, b)
        )
        operands = condition, a, b
        return self.node("where", operands, (), _common_shape(operands), dtype)

    def matmul(self, a: Traced, b: Traced) -> Traced:
        if a.ndim == 0 or b.ndim == 0 or a.shape[-1] != b.shape[-2 if b.ndim > 1 else 0]:
            raise ValueError(f"matmul: shapes {a.shape} and {b.shape} do not match")
        batch = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        shape = (*batch, *a.shape[-2:-1], *(b.shape[-1:] if b.ndim > 1 else ()))
        return self.node("matmul", (a, b), (), shape, np.result_type(a.dtype, b.dtype))

    def vecdot(self, a: Traced, b: Traced, *, axis: int = -1) -> Traced:
        return self.matmul(a, b) if a.ndim == b.ndim == 1 else self.sum(a * b, axis=axis)

    def _reduce(self, name: str, x: Traced, axis: Any, keepdims: bool) -> Traced:
        axes = range(x.ndim) if axis is None else (axis,) if isinstance(axis, int) else axis
        axes = tuple(sorted(a % x.ndim for a in axes))
        kept = tuple(1 if i in axes else n for i, n in enumerate(x.shape))
        shape = kept if keepdims else tuple(n for i, n in enumerate(x.shape) if i not in axes)
        dtype = getattr(np, name)(np.zeros(1, x.dtype)).dtype  # max of an empty array raises
        return self.node(name, (x,), (axes, keepdims), shape, dtype)

    def sum(self, x: Traced, *, axis: Any = None, keepdims: bool = False) -> Traced:
        return self._reduce("sum", x, axis, keepdims)

    def prod(self, x: Traced, *, axis: Any = None, keepdims: bool = False) -> Traced:
        return self._reduce("prod", x, axis, keepdims)

    def max(self, x: Traced, *, axis: Any = None, keepdims: bool = False) -> Traced:
        return self._reduce("max", x, axis, keepdims)

    def min(self, x: Traced, *, axis: Any = None, keepdims: bool = False) -> Traced:
        return self._reduce("min", x, axis, keepdims)

    def mean(self, x: Traced, *, axis: Any = None, keepdims: bool = False) -> Traced:
        total = self.sum(x, axis=axis, keepdims=keepdims)
        return self.elementwise("divide", total, x.size // max(total.size, 1))

    def reshape(self, x: Traced, shape: Any, *, copy: bool | None = None) -> Traced:
        if x.is_number:
            raise Unrecordable("it reshapes a number")
        shape = tuple(shape)
        if -1 in shape:
            rest = -prod(shape)
            shape = tuple(x.size // rest if n == -1 else n for n in shape)
        if prod(shape) != x.size:
            raise ValueError(f"reshape: {x.shape} has another size than {shape}")
        if not x.contiguous:
            x = self.node("copy", (x,), (), x.shape, x.dtype)
        while x.op == "reshape":
            (x,) = x.operands
        return x if x.shape == shape else self.node("reshape", (x,), (), shape, x.dtype)

    def permute_dims(self, x: Traced, axes: Any) -> Traced:
        given = tuple(axes)
        axes = tuple(a + x.ndim * (a < 0) for a in given)
        if sorted(axes) != list(range(x.ndim)):
            raise ValueError(f"permute_dims: {given} are not the axes of an array {x.shape}")
        if axes == tuple(range(x.ndim)):
            return x
        if x.op == "permute":
            return self.permute_dims(x.operands[0], [x.attrs[0][a] for a in axes])
        shape = tuple(x.shape[a] for a in axes)
        return self.node("permute", (x,), (axes,), shape, x.dtype, contiguous=False)

    def matrix_transpose(self, x: Traced) -> Traced:
        return self.permute_dims(x, [*range(x.ndim - 2), x.ndim - 1, x.ndim - 2])

    def index(self, x: Traced, key: Any) -> Traced:
        key = key if isinstance(key, tuple) else (key,)
        if not key:
            return x
        if not all(k is None or k is ... or isinstance(k, int | slice) for k in key):
            raise Unrecordable("it indexes by an array")
        shape = np.broadcast_to(0, x.shape)[key].shape
        # The result is contiguous if only the first axis is cut
        contiguous = x.contiguous and all(
            k is None or k is ... or k == slice(None) or (i == 0 and isinstance(k, int))
            or (i == 0 and k.step in (None, 1))
            for i, k in enumerate(key)
        )  # fmt: skip
        attrs = tuple(
            ("slice", k.start, k.stop, k.step) if isinstance(k, slice) else k for k in key
        )
        return self.node("index", (x,), attrs, shape, x.dtype, contiguous)

    def expand_dims(self, x: Traced, *, axis: int = 0) -> Traced:
        axis %= x.ndim + 1
        return self.index(x, (slice(None),) * axis + (None,))

    def squeeze(self, x: Traced, axis: Any) -> Traced:
        axes = {a % x.ndim for a in (axis if isinstance(axis, tuple) else (axis,))}
        return self.index(x, tuple(0 if i in axes else slice(None) for i in range(x.ndim)))

    def broadcast_to(self, x: Traced, shape: Any) -> Traced:
        return self.node("broadcast", (x,), (), tuple(shape), x.dtype, contiguous=False)

    def concat(self, arrays: Any, *, axis: int = 0) -> Traced:
        first = arrays[0]
        axis %= first.ndim
        length = sum(a.shape[axis] for a in arrays)
        shape = (*first.shape[:axis], length, *first.shape[axis + 1 :])
        dtype = np.result_type(*(a.dtype for a in arrays))
        arrays = tuple(self.astype(a, dtype) for a in arrays)
        return self.node("concat", arrays, (axis,), shape, dtype)

    def stack(self, arrays: Any, *, axis: int = 0) -> Traced:
        return self.concat([self.expand_dims(a, axis=axis) for a in arrays], axis=axis)

    def full(self, shape: Any, value: Any, *, dtype: Any, device: Any = None) -> Traced:
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        return self.node("full", (value,), (), shape, np.dtype(dtype))

    def full_like(self, x: Traced, value: Any, *, dtype: Any = None, device: Any = None) -> Traced:
        return self.full(x.shape, value, dtype=dtype or x.dtype)

    def zeros_like(self, x: Traced, *, dtype: Any = None, device: Any = None) -> Traced:
        return self.full_like(x, 0, dtype=dtype)

    def ones_like(self, x: Traced, *, dtype: Any = None, device: Any = None) -> Traced:
        return self.full_like(x, 1, dtype=dtype)

    def zeros(self, shape: Any, *, dtype: Any, device: Any = None) -> Traced:
        return self.full(shape, 0, dtype=dtype)

    def ones(self, shape: Any, *, dtype: Any, device: Any = None) -> Traced:
        return self.full(shape, 1, dtype=dtype)

    def arange(self, *bounds: int, dtype: Any, device: Any = None) -> Traced:
        if not all(isinstance(b, int) for b in bounds):
            raise Unrecordable("it makes a range of what is not an int")
        return self.node("arange", bounds, (), (len(range(*bounds)),), np.dtype(dtype))


def _common_shape(operands: Sequence[Any]) -> Shape:
    """Return the shape to which operands are broadcast."""
    return np.broadcast_shapes(*(x.shape for x in operands if isinstance(x, Traced)))


def _kind(x: Any) -> Any:
    """Return the data type, or the type of a Python number, of an operand for type promotion."""
    if isinstance(x, Traced):
        return x.dtype
    return np.dtype(bool) if isinstance(x, bool) else type(x)


def record(function: Callable[..., Any], recorder: Recorder, arguments: Any) -> tuple[Program, Any]:
    """Call a function with stand-ins; return its program, and the tree of its results.

    Parameters
    ----------
    function : callable
        Pure; takes arrays of the recorder's namespace.
    recorder : Recorder
    arguments : tuple
        The arguments' trees of `Spec`, from `specify`.

    Raises
    ------
    Unrecordable
        If the function does something that a program cannot express.
    """
    inputs = [recorder.input(i, *spec) for i, spec in enumerate(flatten(arguments))]
    result = function(*unflatten(arguments, iter(inputs)))
    needed = {id(x) for x in flatten(result)}
    for x in reversed(recorder.nodes):  # backwards, since operands stand before their readers
        if id(x) in needed:
            needed.update(map(id, x.operands))
    made: dict[int, Node] = {}

    def node(x: Any) -> Any:
        return made[id(x)] if isinstance(x, Traced) else x

    for x in recorder.nodes:
        if x.op == "input" or id(x) in needed:
            operands = tuple(node(o) for o in x.operands)
            made[id(x)] = Node(x.op, operands, x.attrs, x.shape, x.dtype, x.contiguous)
    outputs = tuple(node(x) for x in flatten(result))
    nodes = tuple(x for x in made.values() if x.op != "input")
    program = Program(tuple(map(node, inputs)), outputs, nodes)
    if verifying():
        verify(program)
    return program, result
