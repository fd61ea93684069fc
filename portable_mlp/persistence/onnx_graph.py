"""Recorded programs as ONNX graphs: each operation becomes an operator.

The operations of a function are recorded (`portable_mlp.engines.graph.recording`) and written as
ONNX operators, so no formula is written here a second time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from portable_mlp.engines.graph.program import Node, Program, specify
from portable_mlp.engines.graph.recording import Recorder, Traced, Unrecordable, record


def missing(error: ModuleNotFoundError) -> ModuleNotFoundError:
    """Return the error that says what to install."""
    return ModuleNotFoundError(
        f"ONNX needs {error.name}, which is not installed: pip install 'portable_mlp[onnx]'"
    )


try:
    from onnx import helper, numpy_helper
except ModuleNotFoundError as error:
    raise missing(error) from error

OPSET = 18
"""The first operator set in which all reductions take their axes as an input."""


def write_program(
    graph: GraphWriter,
    x: str,
    n_in: int,
    params: Sequence[NDArray[np.float32]],
    function: Callable[[Recorder, list[Traced], Traced], list[Traced]],
) -> list[str]:
    """Write a function's operations for any number of rows; return the names of its results.

    Parameters
    ----------
    graph : GraphWriter
    x : str
        Name of the rows, float32 (n, n_in).
    n_in : int
    params : sequence of ndarray
        Values of the parameters; the graph holds them as constants.
    function : callable
        From the namespace, the parameters and the rows to the results.

    Raises
    ------
    ValueError
        If there is no operator for an operation.
    """

    def recorded(n_rows: int) -> Program:
        recorder = _Recorder()
        arguments = specify((list(params), np.empty((n_rows, n_in), np.float32)))
        return record(lambda *given: function(recorder, *given), recorder, arguments)[0]

    try:
        program, other = recorded(2), recorded(3)
        if _form(program) != _form(other):
            raise Unrecordable("what it computes depends on the number of rows")
        writer = _ProgramWriter(graph, x, program.inputs, params, _shapes(program, other))
        for node in program.nodes:
            writer.write(node)
    except Unrecordable as reason:
        raise ValueError(f"the model has no ONNX form: {reason}") from reason
    return [writer.names[id(output)] for output in program.outputs]


class GraphWriter:
    """The operators and constants of an ONNX graph.

    Parameters
    ----------
    taken : collection of str
        Names of inputs and outputs, which nothing else may have.

    Attributes
    ----------
    nodes, constants : list
    """

    def __init__(self, taken: Collection[str] = ()) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self._taken = taken

    def _free(self, name: str) -> str:
        while name in self._taken:
            name += "_"
        return name

    def constant(self, value: Any) -> str:
        """Add a constant array to the graph, and return its name."""
        name = self._free(f"c{len(self.constants)}")
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def node(
        self, op: str, *inputs: str, name: str | None = None, results: int = 1, **attributes: Any
    ) -> str:
        """Add an operator to the graph, and return the name of its first result."""
        name = name or self._free(f"t{len(self.nodes)}")
        names = [name, *(self._free(f"{name}_{i}") for i in range(1, results))]
        self.nodes.append(helper.make_node(op, inputs, names, name, **attributes))
        return name

    def model(self, inputs: list[Any], outputs: list[Any]) -> Any:
        """Return the graph as a model; inputs and outputs are ``onnx.ValueInfoProto``."""
        domains = {node.domain for node in self.nodes} - {""}
        opset = [helper.make_opsetid("", OPSET), *(helper.make_opsetid(d, 3) for d in domains)]
        return helper.make_model(
            helper.make_graph(self.nodes, "portable_mlp", inputs, outputs, self.constants),
            producer_name="portable_mlp",
            opset_imports=opset,
            ir_version=helper.find_min_ir_version_for(opset),  # older runtimes reject newer ones
        )


def labels(model: Any) -> NDArray[Any]:
    """Return a classifier's labels as ONNX holds them: int64, float64 or strings."""
    classes = np.asarray(model.classes_)
    if classes.dtype.kind in "iub":
        return classes.astype(np.int64)
    return classes.astype(np.float64 if classes.dtype.kind == "f" else object)


class _Recorder(Recorder):
    """Recorder with functions that predictions use, but training does not."""

    def argmax(self, x: Traced, *, axis: int) -> Traced:
        shape = tuple(n for i, n in enumerate(x.shape) if i != axis)
        return self.node("argmax", (x,), (axis,), shape, np.dtype(np.int64))

    def sort(self, x: Traced, *, axis: int) -> Traced:
        return self.node("sort", (x,), (axis % x.ndim, x.shape[axis]), x.shape, x.dtype)


def _shapes(program: Program, other: Program) -> dict[int, tuple[int | None, ...]]:
    """Return each node's shape by the node's id; lengths that depend on the rows are None.

    The two programs are recordings of the same function for different numbers of rows.
    """
    pairs = zip((*program.inputs, *program.nodes), (*other.inputs, *other.nodes), strict=True)
    return {
        id(x): tuple(n if n == m else None for n, m in zip(x.shape, y.shape, strict=True))
        for x, y in pairs
    }


def _form(program: Program) -> list[Any]:
    """Return a program's operations without their shapes, for comparison."""
    places = {id(node): i for i, node in enumerate((*program.inputs, *program.nodes))}
    return [
        # The text of a node would hold those of all nodes before it
        (
            node.op,
            [places[id(o)] if id(o) in places else repr(o) for o in node.operands],
            node.attrs,
        )
        for node in program.nodes
    ]


# ---------------------------------------------------------------- operators

_SAME = {
    "add": "Add", "subtract": "Sub", "multiply": "Mul", "divide": "Div", "power": "Pow",
    "negative": "Neg", "absolute": "Abs", "sign": "Sign", "reciprocal": "Reciprocal",
    "exp": "Exp", "log": "Log", "sqrt": "Sqrt", "maximum": "Max", "minimum": "Min",
    "sin": "Sin", "cos": "Cos", "tan": "Tan", "arcsin": "Asin", "arccos": "Acos",
    "arctan": "Atan", "sinh": "Sinh", "cosh": "Cosh", "tanh": "Tanh", "arcsinh": "Asinh",
    "arccosh": "Acosh", "arctanh": "Atanh", "floor": "Floor", "ceil": "Ceil", "rint": "Round",
    "less": "Less", "less_equal": "LessOrEqual", "greater": "Greater",
    "greater_equal": "GreaterOrEqual", "equal": "Equal", "logical_and": "And",
    "logical_or": "Or", "logical_xor": "Xor", "logical_not": "Not", "where": "Where",
    "matmul": "MatMul", "copy": "Identity",
}  # fmt: skip
_REDUCTIONS = {"sum": "ReduceSum", "prod": "ReduceProd", "max": "ReduceMax", "min": "ReduceMin"}


class _ProgramWriter:
    """Writer of a program's nodes as the nodes of an ONNX graph, operands first.

    Parameters
    ----------
    graph : GraphWriter
    x : str
        Name of the rows.
    inputs : tuple of Node
        The program's inputs: the parameters, then the rows.
    params : sequence of ndarray
        Values of the parameters.
    shapes : dict
        Result of `_shapes`.
    """

    def __init__(
        self,
        graph: GraphWriter,
        x: str,
        inputs: tuple[Node, ...],
        params: Sequence[NDArray[np.float32]],
        shapes: dict[int, tuple[int | None, ...]],
    ) -> None:
        self.shapes = shapes
        self.node, self.constant = graph.node, graph.constant
        *own, rows = inputs
        self.names = {id(rows): x}
        self.names |= {id(i): self.constant(p) for i, p in zip(own, params, strict=True)}

    def write(self, node: Node) -> None:
        """Write one operation of the program; its operands have to be written already."""
        made = getattr(self, "_" + node.op, None)
        if made is None and node.op not in _SAME and node.op not in _REDUCTIONS:
            raise Unrecordable(f"there is no operator for its {node.op}")
        # The attributes of an elementwise function are the dtypes of its operands
        types = node.attrs if len(node.attrs) == len(node.operands) else ()
        inputs = [
            self.names[id(o)]
            if isinstance(o, Node)
            else self.constant(np.asarray(o, types[i] if types else node.dtype))
            for i, o in enumerate(node.operands)
        ]
        if made is not None:
            name = made(node, *inputs)
        elif node.op in _REDUCTIONS:
            axes, keepdims = node.attrs
            axes = self.constant(np.asarray(axes, np.int64))
            name = self.node(_REDUCTIONS[node.op], inputs[0], axes, keepdims=int(keepdims))
        else:
            name = self.node(_SAME[node.op], *inputs)
        self.names[id(node)] = name

    def _astype(self, node: Node, x: str) -> str:
        return self.node("Cast", x, to=helper.np_dtype_to_tensor_dtype(node.dtype))

    def _permute(self, node: Node, x: str) -> str:
        return self.node("Transpose", x, perm=list(node.attrs[0]))

    def _concat(self, node: Node, *parts: str) -> str:
        return self.node("Concat", *parts, axis=node.attrs[0])

    def _argmax(self, node: Node, x: str) -> str:
        return self.node("ArgMax", x, axis=node.attrs[0], keepdims=0)

    def _sort(self, node: Node, x: str) -> str:
        axis, n = node.attrs
        return self.node("TopK", x, self._ints(n), results=2, axis=axis, largest=0, sorted=1)

    def _not_equal(self, node: Node, *operands: str) -> str:
        return self.node("Not", self.node("Equal", *operands))

    def _square(self, node: Node, x: str) -> str:
        return self.node("Mul", x, x)

    def _expm1(self, node: Node, x: str) -> str:
        return self.node("Sub", self.node("Exp", x), self.constant(np.ones((), node.dtype)))

    def _log1p(self, node: Node, x: str) -> str:
        return self.node("Log", self.node("Add", x, self.constant(np.ones((), node.dtype))))

    def _index(self, node: Node, x: str) -> str:
        (operand,) = node.operands
        rest = operand.ndim - sum(key is not None and key is not ... for key in node.attrs)
        whole = ("slice", None, None, None)
        at = node.attrs.index(...) if ... in node.attrs else len(node.attrs)
        keys = [*node.attrs[:at], *[whole] * rest, *node.attrs[at + 1 :]]
        old = [key for key in keys if key is not None]  # one for each axis of the operand
        for axis, key in enumerate(old):
            if isinstance(key, tuple) and key != whole:
                x = self._part(x, operand, axis, slice(*key[1:]))
        for axis, key in reversed(list(enumerate(old))):
            if isinstance(key, int):
                x = self.node("Gather", x, self.constant(np.int64(key)), axis=axis)
        left = [key for key in keys if not isinstance(key, int)]
        new = [axis for axis, key in enumerate(left) if key is None]
        return self.node("Unsqueeze", x, self._ints(*new)) if new else x

    def _part(self, x: str, operand: Node, axis: int, part: slice) -> str:
        if self.shapes[id(operand)][axis] is None:
            raise Unrecordable("it takes a part of the rows")
        start, stop, step = part.indices(operand.shape[axis])
        if step < 0:
            raise Unrecordable("it reverses an axis")
        ranges = (self._ints(n) for n in (start, stop, axis, step))
        return self.node("Slice", x, *ranges)

    def _ints(self, *values: int) -> str:
        return self.constant(np.array(values, np.int64))

    def _reshape(self, node: Node, x: str) -> str:
        shape = self.shapes[id(node)]
        if shape.count(None) > 1:
            raise Unrecordable("it splits the rows over several axes")
        return self.node("Reshape", x, self._ints(*(-1 if n is None else n for n in shape)))

    def _broadcast(self, node: Node, x: str) -> str:
        (operand,) = node.operands
        shape, given = self.shapes[id(node)], self.shapes[id(operand)]
        own = (1,) * (len(shape) - len(given)) + given
        if any(n is None and m is not None for n, m in zip(shape, own, strict=True)):
            raise Unrecordable("it repeats an array for each row")
        # Expand broadcasts: a length of 1 keeps the axis of the operand as it is
        return self.node("Expand", x, self._ints(*(1 if n is None else n for n in shape)))

    def _full(self, node: Node, *_: str) -> str:
        if None in self.shapes[id(node)]:
            raise Unrecordable("it makes an array of as many rows")
        return self.constant(np.full(node.shape, node.operands[0], node.dtype))
