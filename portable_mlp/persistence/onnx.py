"""ONNX export: a fitted model as a graph for other runtimes, in float32.

The layers and the loss are written by `portable_mlp.persistence.onnx_graph`.  Custom layers can
be exported too, if they use only the operators there.

Importing this module registers the estimators with skl2onnx: ``skl2onnx.to_onnx`` then
accepts pipelines that contain them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.compose import ColumnTransformer
from sklearn.impute import SimpleImputer
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils.validation import check_is_fitted

from portable_mlp.backends import to_host
from portable_mlp.engines.graph.recording import Recorder, Traced
from portable_mlp.estimators import (
    MLPClassifier,
    MLPRegressor,
    TabularClassifier,
    TabularRegressor,
)
from portable_mlp.estimators.inference import pooled
from portable_mlp.persistence.modelfile import write_whole
from portable_mlp.persistence.onnx_graph import (
    OPSET,
    GraphWriter,
    labels,
    missing,
    write_program,
)
from portable_mlp.persistence.onnx_tables import tables_to_onnx

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
    raise missing(error) from error

__all__ = ["to_onnx"]


def to_onnx(model: Any, path: str | Path | None = None, *, initial_types: Any = None) -> Any:
    """Return a fitted model, or a pipeline that ends in one, as an ONNX model.

    The graph's input is ``X`` (n, n_features), in float32 for a model.  For a pipeline it is in
    float64 if all its steps have a form for that: scaling would lose digits in float32.  With
    ``initial_types``, the inputs have these names and types.  A classifier's outputs are
    ``label`` and ``probabilities`` (n, n_classes).  A regressor's output is ``variable``
    (n, n_outputs).  Labels are strings, int64 (for booleans too) or float64.

    A model for tables has one input (n, 1) for each column, of the column's name.  Numbers and
    booleans are float64, with NaN for missing values; text is strings, and a string that training
    did not have for missing values; dates are days since 1970, and time spans are seconds, in
    float64.  Columns of no use have none.  If the model was fitted on an array of numbers, its
    input is ``X`` in float64.

    Parameters
    ----------
    model : MLPClassifier, MLPRegressor, a Pipeline that ends in one, or a model for tables
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
    if isinstance(model, TabularClassifier | TabularRegressor):
        check_is_fitted(model)
        found = tables_to_onnx(model)
        if path is not None:
            write_whole(path, [found.SerializeToString()])
        return found
    final = model[-1] if isinstance(model, Pipeline) else model
    if not isinstance(final, MLPClassifier | MLPRegressor):
        hint = ": give its best_estimator_" if hasattr(final, "best_estimator_") else ""
        raise TypeError(
            "to_onnx takes an MLPClassifier, an MLPRegressor, or a Pipeline that ends in one, or a"
            f" model for tables without steps before it, got {type(final).__name__}{hint}"
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
    graph, outputs = _graph(model)
    rows = "n"
    given = helper.make_tensor_value_info("X", TensorProto.FLOAT, [rows, model.n_features_in_])
    return graph.model([given], [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(dtype), [rows, *rest])
        for name, (dtype, rest) in zip(outputs, _outputs(model), strict=True)
    ])  # fmt: skip


# ---------------------------------------------------------------- the graph


def _outputs(model: Any) -> list[tuple[np.dtype[Any], list[int]]]:
    """Return the dtype of each output, and its shape without the axis of the rows."""
    if isinstance(model, MLPRegressor):
        return [(np.dtype(np.float32), [model.n_outputs_])]
    n = len(model.classes_)
    kind = labels(model).dtype
    return [(kind, [n] if model._multilabel else []), (np.dtype(np.float32), [n])]


def _graph(model: Any) -> tuple[GraphWriter, list[str]]:
    """Return a graph from X to the outputs, and the names of these."""
    network = model.network_

    def predict(recorder: Recorder, params: list[Traced], x: Traced) -> list[Traced]:
        z = pooled(network(params, x, recorder), model._loss, recorder)
        if isinstance(model, MLPRegressor):
            return [model._loss.link(z, recorder)]
        return [f(z, model._loss, recorder) for f in (model._decide, model._probabilities)]

    graph = GraphWriter()
    params = [to_host(p).astype(np.float32) for p in model.params_]
    names = write_program(graph, "X", model.n_features_in_, params, predict)
    if isinstance(model, MLPRegressor):
        return graph, [graph.node("Identity", names[0], name="variable")]
    code, probabilities = names
    if model._multilabel:
        label = graph.node("Cast", code, name="label", to=TensorProto.INT64)
    else:
        label = graph.node("Gather", graph.constant(labels(model)), code, name="label")
    return graph, [label, graph.node("Identity", probabilities, name="probabilities")]


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
    graph, outputs = _graph(operator.raw_operator)
    names = dict(zip(outputs, operator.output_full_names, strict=True))
    rename: Callable[[str], str] = scope.get_unique_variable_name
    names |= {"X": rename("x")}
    names |= {tensor.name: rename(tensor.name) for tensor in graph.constants}
    names |= {n: rename(n) for node in graph.nodes for n in node.output if n not in names}
    container.add_node(
        "Cast", operator.inputs[0].full_name, names["X"], op_version=13, to=TensorProto.FLOAT
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
