"""ONNX export: a fitted model as a graph for other runtimes, in float32.

The operations of the layers and the loss are recorded (`portable_mlp.engines.graph.recording`)
and written as ONNX operators, so no formula is written here a second time.  Custom layers can
be exported too, if they use only the operators below.

Importing this module registers the estimators with skl2onnx: ``skl2onnx.to_onnx`` then
accepts pipelines that contain them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.compose import ColumnTransformer
from sklearn.impute import SimpleImputer
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils.validation import check_is_fitted

from portable_mlp.backends import to_host
from portable_mlp.engines.graph.program import Node, Program, specify
from portable_mlp.engines.graph.recording import Recorder, Traced, Unrecordable, record
from portable_mlp.estimators import MLPClassifier, MLPRegressor
from portable_mlp.estimators.inference import pooled
from portable_mlp.persistence.modelfile import write_whole

try:
    import onnx
    from onnx import TensorProto, helper, numpy_helper
    from skl2onnx import to_onnx as convert_pipeline
    from skl2onnx import update_registered_converter
    from skl2onnx.common.data_types import (
        DoubleTensorType,
        FloatTensorType,
        Int64TensorType,
        StringTensorType,
    )
    from skl2onnx.operator_converters.common import concatenate_variables
    from skl2onnx.operator_converters.imputer_op import convert_sklearn_imputer
    from skl2onnx.shape_calculators.imputer import calculate_sklearn_imputer_output_shapes
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"ONNX needs {error.name}, which is not installed: pip install 'portable_mlp[onnx]'"
    ) from error

__all__ = ["to_onnx"]

OPSET = 18  # the first in which all reductions take their axes as an input


def to_onnx(model: Any, path: str | Path | None = None, *, initial_types: Any = None) -> Any:
    """Return a fitted model, or a pipeline that ends in one, as an ONNX model.

    The graph's input is ``X`` (n, n_features), in float32 for a model.  For a pipeline it is in
    float64 if all its steps have a form for that: scaling would lose digits in float32.  With
    ``initial_types``, the inputs have these names and types.  A classifier's outputs are
    ``label`` and ``probabilities`` (n, n_classes).  A regressor's output is ``variable``
    (n, n_outputs).  Labels are strings, int64 (for booleans too) or float64.

    Parameters
    ----------
    model : MLPClassifier, MLPRegressor or Pipeline
        The fitted model.
    path : path, optional
        File to write the ONNX model to as well; overwritten if it exists.
    initial_types : list of (str, skl2onnx type), optional
        The inputs of a pipeline, as ``skl2onnx.to_onnx`` takes them; ignored for a bare
        model.  A pipeline that selects columns by name needs one for each column.

    Returns
    -------
    onnx.ModelProto

    Raises
    ------
    TypeError
        If ``model`` is something else, such as a search; the message says what to give.
    NotFittedError
        If the model is not fitted.
    ValueError
        If a layer or the loss uses an operation that this module cannot write as ONNX.
    OSError
        If the file cannot be written.
    """
    final = model[-1] if isinstance(model, Pipeline) else model
    if not isinstance(final, MLPClassifier | MLPRegressor):
        hint = ": give its best_estimator_" if hasattr(final, "best_estimator_") else ""
        raise TypeError(
            "to_onnx takes an MLPClassifier, an MLPRegressor, or a Pipeline that ends in one, got"
            f" {type(final).__name__}{hint}"
        )
    check_is_fitted(final)
    if isinstance(model, Pipeline):
        kind = DoubleTensorType if _takes_float64(model[:-1]) else FloatTensorType
        types = initial_types or [("X", kind([None, model.n_features_in_]))]
        found = convert_pipeline(
            model,
            initial_types=types,
            options={id(final): {"zipmap": False}} if isinstance(final, MLPClassifier) else None,
            target_opset=OPSET,
        )
        _rename_inputs(found.graph, [name for name, _ in types])
    else:
        found = _bare(model)
    if path is not None:
        write_whole(path, [found.SerializeToString()])
    return found


# Transformers that onnxruntime computes in float64 as scikit-learn does, as the tests show
_IN_FLOAT64 = {
    "StandardScaler", "MinMaxScaler", "MaxAbsScaler", "RobustScaler", "QuantileTransformer",
    "SimpleImputer", "PCA", "TruncatedSVD", "Normalizer", "OneHotEncoder", "OrdinalEncoder",
}  # fmt: skip


def _takes_float64(transformer: Any) -> bool:
    """Tell whether a transformer and all its parts have a form in float64."""
    if isinstance(transformer, Pipeline):
        return all(_takes_float64(step) for _, step in transformer.steps)
    if isinstance(transformer, ColumnTransformer):
        return all(_takes_float64(part) for _, part, _ in transformer.transformers_)
    if isinstance(transformer, FunctionTransformer):  # what passes columns through
        return transformer.func is None
    return transformer in (None, "passthrough", "drop") or (
        type(transformer).__module__.startswith("sklearn.")
        and type(transformer).__name__ in _IN_FLOAT64
    )


def _rename_inputs(graph: Any, names: list[str]) -> None:
    """Give a graph's inputs the names that were asked for.

    skl2onnx replaces characters that no variable of Python's has.  An input that is called as an
    output gets an underscore, for the names of a graph have to differ.
    """
    taken = {name for node in graph.node for name in node.output}
    new = {}
    for given, name in zip(graph.input, names, strict=True):
        while name in taken:
            name += "_"
        taken.add(name)
        new[given.name], given.name = name, name
    for node in graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = new.get(name, name)


def _bare(model: Any) -> Any:
    graph = _graph(model)
    rows = "n"
    inputs = [
        helper.make_tensor_value_info(graph.x, TensorProto.FLOAT, [rows, model.n_features_in_])
    ]
    outputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(dtype), [rows, *rest])
        for name, (dtype, rest) in zip(graph.outputs, _outputs(model), strict=True)
    ]
    opset = [helper.make_opsetid("", OPSET)]
    return helper.make_model(
        helper.make_graph(graph.nodes, "portable_mlp", inputs, outputs, graph.constants),
        producer_name="portable_mlp",
        opset_imports=opset,
        ir_version=helper.find_min_ir_version_for(opset),  # older runtimes reject newer versions
    )


# ---------------------------------------------------------------- the graph


class _Graph(NamedTuple):
    x: str
    outputs: list[str]
    nodes: list[Any]
    constants: list[Any]


class _Recorder(Recorder):
    """Recorder with ``argmax``, which a classifier's decision uses."""

    def argmax(self, x: Traced, *, axis: int) -> Traced:
        shape = tuple(n for i, n in enumerate(x.shape) if i != axis)
        return self.node("argmax", (x,), (axis,), shape, np.dtype(np.int64))


def _labels(model: Any) -> NDArray[Any]:
    classes = np.asarray(model.classes_)
    if classes.dtype.kind in "iub":
        return classes.astype(np.int64)
    return classes.astype(np.float64 if classes.dtype.kind == "f" else object)


def _outputs(model: Any) -> list[tuple[np.dtype[Any], list[int]]]:
    """Return the dtype of each output, and its shape without the axis of the rows."""
    if isinstance(model, MLPRegressor):
        return [(np.dtype(np.float32), [model.n_outputs_])]
    n = len(model.classes_)
    labels = _labels(model).dtype
    return [(labels, [n] if model._multilabel else []), (np.dtype(np.float32), [n])]


def _graph(model: Any) -> _Graph:
    network = model.network_
    params = [to_host(p).astype(np.float32) for p in model.params_]

    def predict(recorder: Recorder, params: list[Traced], x: Traced) -> list[Traced]:
        z = pooled(network(params, x, recorder), model._loss, recorder)
        if isinstance(model, MLPRegressor):
            return [model._loss.link(z, recorder)]
        return [f(z, model._loss, recorder) for f in (model._decide, model._probabilities)]

    def recorded(n_rows: int) -> Program:
        recorder = _Recorder()
        x = np.empty((n_rows, model.n_features_in_), np.float32)
        arguments = specify((params, x))
        return record(lambda *given: predict(recorder, *given), recorder, arguments)[0]

    try:
        program, other = recorded(2), recorded(3)
        if _form(program) != _form(other):
            raise Unrecordable("what it computes depends on the number of rows")
        writer = _GraphWriter(program.inputs, params, _shapes(program, other))
        for node in program.nodes:
            writer.write(node)
    except Unrecordable as reason:
        raise ValueError(f"the model has no ONNX form: {reason}") from reason
    names = [writer.names[id(output)] for output in program.outputs]
    if isinstance(model, MLPRegressor):
        outputs = [writer.node("Identity", names[0], name="variable")]
    else:
        code, probabilities = names
        label = (
            writer.node("Cast", code, name="label", to=TensorProto.INT64)
            if model._multilabel
            else writer.node("Gather", writer.constant(_labels(model)), code, name="label")
        )
        outputs = [label, writer.node("Identity", probabilities, name="probabilities")]
    return _Graph("X", outputs, writer.nodes, writer.constants)


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
        (node.op, [places.get(id(o), repr(o)) for o in node.operands], node.attrs)
        for node in program.nodes
    ]


# ---------------------------------------------------------------- operators

_SAME = {
    "add": "Add", "subtract": "Sub", "multiply": "Mul", "divide": "Div", "power": "Pow",
    "negative": "Neg", "absolute": "Abs", "sign": "Sign", "reciprocal": "Reciprocal",
    "exp": "Exp", "log": "Log", "sqrt": "Sqrt", "maximum": "Max", "minimum": "Min",
    "sin": "Sin", "cos": "Cos", "tan": "Tan", "arcsin": "Asin", "arccos": "Acos",
    "arctan": "Atan", "sinh": "Sinh", "cosh": "Cosh", "tanh": "Tanh", "arcsinh": "Asinh",
    "arccosh": "Acosh", "arctanh": "Atanh", "floor": "Floor", "ceil": "Ceil",
    "less": "Less", "less_equal": "LessOrEqual", "greater": "Greater",
    "greater_equal": "GreaterOrEqual", "equal": "Equal", "logical_and": "And",
    "logical_or": "Or", "logical_xor": "Xor", "logical_not": "Not", "where": "Where",
    "matmul": "MatMul", "copy": "Identity",
}  # fmt: skip
_REDUCTIONS = {"sum": "ReduceSum", "prod": "ReduceProd", "max": "ReduceMax", "min": "ReduceMin"}


class _GraphWriter:
    """Writer of a program's nodes as the nodes of an ONNX graph, operands first.

    Parameters
    ----------
    inputs : tuple of Node
        The program's inputs: the parameters, then the rows.
    params : list of array
        Values of the parameters; the graph holds them as constants.
    shapes : dict
        Result of `_shapes`.
    """

    def __init__(
        self,
        inputs: tuple[Node, ...],
        params: list[NDArray[np.float32]],
        shapes: dict[int, tuple[int | None, ...]],
    ) -> None:
        self.shapes = shapes
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        *own, x = inputs
        self.names = {id(x): "X"}
        self.names |= {id(i): self.constant(p) for i, p in zip(own, params, strict=True)}

    def constant(self, value: Any) -> str:
        """Add a constant array to the graph, and return its name."""
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def node(self, op: str, *inputs: str, name: str | None = None, **attributes: Any) -> str:
        """Add an operator to the graph, and return the name of its output."""
        name = name or f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], name, **attributes))
        return name

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


# ---------------------------------------------------------------- skl2onnx


def _declare(operator: Any) -> None:
    """Set the types of an operator's outputs, as skl2onnx asks for."""
    kinds = {"f": FloatTensorType, "i": Int64TensorType, "O": StringTensorType}
    rows = operator.inputs[0].get_first_dimension()
    for variable, (dtype, rest) in zip(
        operator.outputs, _outputs(operator.raw_operator), strict=True
    ):
        kind = DoubleTensorType if dtype == np.float64 else kinds[dtype.kind]
        variable.set_type(kind([rows, *rest]))


def _convert(scope: Any, operator: Any, container: Any) -> None:
    """Add a model's graph to the graph that skl2onnx is building, under unique names."""
    if container.target_opset < OPSET:
        raise ValueError(f"target_opset: {OPSET} or more is needed, got {container.target_opset}")
    graph = _graph(operator.raw_operator)
    names = dict(zip(graph.outputs, operator.output_full_names, strict=True))
    rename: Callable[[str], str] = scope.get_unique_variable_name
    names |= {graph.x: rename("x")}
    names |= {tensor.name: rename(tensor.name) for tensor in graph.constants}
    names |= {n: rename(n) for node in graph.nodes for n in node.output if n not in names}
    container.add_node(
        "Cast", operator.inputs[0].full_name, names[graph.x], op_version=13, to=TensorProto.FLOAT
    )
    for tensor in graph.constants:
        values = numpy_helper.to_array(tensor)
        container.add_initializer(
            names[tensor.name], tensor.data_type, list(tensor.dims), values.ravel().tolist()
        )
    for node in graph.nodes:
        container.add_node(
            node.op_type,
            [names[n] for n in node.input],
            [names[n] for n in node.output],
            op_version=onnx.defs.get_schema(node.op_type, OPSET, "").since_version,
            **{a.name: helper.get_attribute_value(a) for a in node.attribute},
        )


def _convert_imputer(scope: Any, operator: Any, container: Any) -> None:
    """Write a SimpleImputer; onnxruntime's own operator for it takes no float64."""
    imputer = operator.raw_operator
    if not isinstance(operator.inputs[0].type, DoubleTensorType):
        convert_sklearn_imputer(scope, operator, container)
        return
    values = np.asarray(imputer.statistics_, np.float64)
    if imputer.add_indicator or np.isnan(values).any():
        raise ValueError(
            "a SimpleImputer with an indicator, or for a column without values, has no ONNX form"
        )
    unique: Callable[[str], str] = scope.get_unique_variable_name
    x = concatenate_variables(scope, operator.inputs, container)
    missing, statistics = unique("missing"), unique("statistics")
    if np.isnan(imputer.missing_values):
        container.add_node("IsNaN", [x], [missing], op_version=13)
    else:
        value = unique("value")
        container.add_initializer(value, TensorProto.DOUBLE, [1], [imputer.missing_values])
        container.add_node("Equal", [x, value], [missing], op_version=13)
    container.add_initializer(statistics, TensorProto.DOUBLE, [1, len(values)], values.tolist())
    output = operator.outputs[0].full_name
    container.add_node("Where", [missing, statistics, x], [output], op_version=16)


update_registered_converter(
    SimpleImputer,
    "PortableMLPImputer",
    calculate_sklearn_imputer_output_shapes,
    _convert_imputer,
)
_OPTIONS = {"zipmap": [True, False, "columns"], "nocl": [False], "output_class_labels": [False]}
update_registered_converter(
    MLPClassifier, "PortableMLPClassifier", _declare, _convert, options=_OPTIONS
)
update_registered_converter(MLPRegressor, "PortableMLPRegressor", _declare, _convert)
