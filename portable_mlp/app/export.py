"""ONNX export of a run's model, with the table's columns as inputs.

Importing this module registers three transformers of the preprocessing with skl2onnx, whose own
converters for them are missing or do less.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from sklearn.impute import MissingIndicator
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import TargetEncoder

from portable_mlp import TabularClassifier, TabularRegressor, load
from portable_mlp.estimators.columns import PERIODS
from portable_mlp.persistence import read_metadata
from portable_mlp.persistence.onnx import to_onnx
from portable_mlp.persistence.onnx_tables import input_names
from portable_mlp.preprocessing import DateParts

from onnx import TensorProto  # isort: skip  # portable_mlp.persistence.onnx says what is missing
from skl2onnx import update_registered_converter  # isort: skip
from skl2onnx.operator_converters.common import concatenate_variables  # isort: skip
from skl2onnx.operator_converters.target_encoder import (  # isort: skip
    convert_sklearn_target_encoder,
)
from skl2onnx.shape_calculators.target_encoder import (  # isort: skip
    calculate_sklearn_target_encoder_output_shapes,
)
from skl2onnx.common.data_types import (  # isort: skip
    DoubleTensorType,
    FloatTensorType,
    StringTensorType,
)

_TYPES = {
    "number": DoubleTensorType,
    "boolean": DoubleTensorType,
    "category": StringTensorType,
    "date": DoubleTensorType,
}


def export_onnx(path: Path, out: Path) -> dict[str, str]:
    """Write the model of a file, with its preprocessing, as ONNX.

    Each column is an input (n, 1) of the column's name.  Numbers and booleans are float64, with
    NaN for missing values.  Text is strings, with the empty string for missing values.  Dates
    are days since 1970 in float64, with NaN for missing values.  A model trained on arrays has
    one input, X (n, n_columns), in float64.

    Parameters
    ----------
    path : Path
        The model file.
    out : Path
        The ONNX file; overwritten if it exists.

    Returns
    -------
    dict
        From the names of columns to those of their inputs, where these differ.

    Raises
    ------
    ValueError
        If a column has no name, or the model has no ONNX form.
    """
    pipeline, notes = load(path), read_metadata(path)["notes"]
    if isinstance(pipeline, TabularClassifier | TabularRegressor):
        to_onnx(pipeline, out)
        return {name: own for name, own in input_names(pipeline).items() if name != own}
    names: list[str] = []
    types = [("X", DoubleTensorType([None, pipeline.n_features_in_]))]
    if notes.get("by_name"):
        used = {name: of for name, of in notes["columns"].items() if name not in notes["dropped"]}
        if "" in used:
            raise ValueError("a column has no name: ONNX needs one, so name it and train again")
        names = list(used)
        types = [(name, _TYPES[kind]([None, 1])) for name, kind in used.items()]
        _name_missing(pipeline[0])
    found = to_onnx(pipeline, out, initial_types=types)
    pairs = zip(names, (given.name for given in found.graph.input), strict=False)
    return {name: own for name, own in pairs if name != own}


def _name_missing(preprocessing: Any) -> None:
    """Replace the category None by the empty string: ONNX's strings have no missing value."""
    for name, transformer, _ in preprocessing.transformers_:
        if name in ("categories", "targets"):
            encoder = transformer[0] if isinstance(transformer, Pipeline) else transformer
            encoder.categories_ = [
                np.array([category or "" for category in categories], dtype=object)
                for categories in encoder.categories_
            ]


def _declare_missing(operator: Any) -> None:
    operator.outputs[0].type = FloatTensorType(list(operator.inputs[0].type.shape))


def _declare_dates(operator: Any) -> None:
    rows, n = operator.inputs[0].type.shape
    operator.outputs[0].type = DoubleTensorType([rows, n * (2 * len(PERIODS) + 2)])


def _declare_means(operator: Any) -> None:
    if not isinstance(operator.inputs[0].type, StringTensorType):
        calculate_sklearn_target_encoder_output_shapes(operator)
        return
    encoder = operator.raw_operator
    rows = operator.inputs[0].get_first_dimension()
    operator.outputs[0].type = DoubleTensorType([rows, len(encoder.encodings_)])


class _OperatorWriter:
    """Writer that adds operators to the graph that skl2onnx is building."""

    def __init__(self, scope: Any, container: Any) -> None:
        self._scope = scope
        self._container = container

    def __call__(self, op: str, *inputs: str, **attributes: Any) -> str:
        output: str = self._scope.get_unique_variable_name("t")
        self._container.add_node(op, list(inputs), [output], op_version=18, **attributes)
        return output

    def constant(self, kind: int, *values: float) -> str:
        name: str = self._scope.get_unique_variable_name("c")
        self._container.add_initializer(name, kind, [len(values)], list(values))
        return name


def _convert_missing(scope: Any, operator: Any, container: Any) -> None:
    write = _OperatorWriter(scope, container)
    missing = write("IsNaN", operator.inputs[0].full_name)
    floats = write("Cast", missing, to=TensorProto.FLOAT)
    container.add_node("Identity", [floats], [operator.outputs[0].full_name], op_version=16)


def _convert_dates(scope: Any, operator: Any, container: Any) -> None:
    write = _OperatorWriter(scope, container)
    parts = []
    for i, median in enumerate(operator.raw_operator.medians_):
        column = write.constant(TensorProto.INT64, i)
        given = write("Gather", operator.inputs[0].full_name, column, axis=1)
        missing = write("IsNaN", given)
        days = write("Where", missing, write.constant(TensorProto.DOUBLE, median), given)
        parts.append(days)
        for period in PERIODS:
            turns = write("Div", days, write.constant(TensorProto.DOUBLE, period))
            # Subtract whole turns in float64: the remainder in [0, 1) is exact enough in float32
            rest = write("Cast", write("Sub", turns, write("Floor", turns)), to=TensorProto.FLOAT)
            angle = write("Mul", rest, write.constant(TensorProto.FLOAT, 2 * np.pi))
            for part in (write("Sin", angle), write("Cos", angle)):
                parts.append(write("Cast", part, to=TensorProto.DOUBLE))
        parts.append(write("Cast", missing, to=TensorProto.DOUBLE))
    container.add_node("Concat", parts, [operator.outputs[0].full_name], op_version=13, axis=1)


def _convert_means(scope: Any, operator: Any, container: Any) -> None:
    """Write a TargetEncoder of texts; skl2onnx's own takes no more than two classes."""
    if not isinstance(operator.inputs[0].type, StringTensorType):
        convert_sklearn_target_encoder(scope, operator, container)
        return
    write, encoder = _OperatorWriter(scope, container), operator.raw_operator
    texts = concatenate_variables(scope, operator.inputs, container)
    flat = write.constant(TensorProto.INT64, -1)
    n_classes = len(encoder.encodings_) // len(encoder.categories_)
    parts = []
    for place, categories in enumerate(encoder.categories_):
        own = encoder.encodings_[place * n_classes : (place + 1) * n_classes]
        # The last row is for unknown texts
        means = np.vstack([np.transpose(own), np.atleast_1d(encoder.target_mean_)])
        table = scope.get_unique_variable_name("means")
        container.add_initializer(table, TensorProto.DOUBLE, means.shape, means.ravel().tolist())
        column = write("Gather", texts, write.constant(TensorProto.INT64, place), axis=1)
        row = scope.get_unique_variable_name("row")
        container.add_node(
            "LabelEncoder",
            [column],
            [row],
            op_domain="ai.onnx.ml",
            op_version=2,
            keys_strings=[str(c).encode() for c in categories],
            values_int64s=list(range(len(categories))),
            default_int64=len(categories),
        )
        parts.append(write("Gather", table, write("Reshape", row, flat), axis=0))
    container.add_node("Concat", parts, [operator.outputs[0].full_name], op_version=13, axis=1)


update_registered_converter(
    MissingIndicator, "MissingIndicator", _declare_missing, _convert_missing
)
update_registered_converter(
    TargetEncoder, "PortableMLPTargetEncoder", _declare_means, _convert_means
)
update_registered_converter(DateParts, "PortableMLPDateParts", _declare_dates, _convert_dates)
