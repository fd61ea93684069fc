"""ONNX export of the estimators for tables: from raw columns to predictions in one graph.

The encoding of the columns is computed in float64, as `portable_mlp.estimators.columns` does, and
the network in float32.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from portable_mlp.backends import to_host
from portable_mlp.engines.graph.recording import Recorder, Traced
from portable_mlp.estimators import TabularClassifier
from portable_mlp.estimators.columns import (
    CLIP,
    EDGE,
    PLACES,
    RANK_SCALE,
    DateEncoder,
    Encoder,
    TableEncoder,
    TextEncoder,
    UnusedEncoder,
)
from portable_mlp.persistence.onnx_graph import GraphWriter, labels, write_program

from onnx import TensorProto, helper  # isort: skip  # onnx_graph says what is missing

# The inverse of the normal distribution's function: algorithm AS 241 of Wichura (1988), PPND16,
# whose coefficients these are, from the highest power; for |p - 0.5| ≤ 0.425, and beyond
_CENTRE = (
    (2509.0809287301226727, 33430.575583588128105, 67265.770927008700853, 45921.953931549871457,
     13731.693765509461125, 1971.5909503065514427, 133.14166789178437745, 3.387132872796366608),
    (5226.495278852854561, 28729.085735721942674, 39307.89580009271061, 21213.794301586595867,
     5394.1960214247511077, 687.1870074920579083, 42.313330701600911252, 1.0),
)  # fmt: skip
_REST = (
    (7.7454501427834140764e-4, 0.0227238449892691845833, 0.24178072517745061177,
     1.27045825245236838258, 3.64784832476320460504, 5.7694972214606914055,
     4.6303378461565452959, 1.42343711074968357734),
    (1.05075007164441684324e-9, 5.475938084995344946e-4, 0.0151986665636164571966,
     0.14810397642748007459, 0.68976733498510000455, 1.6763848301838038494,
     2.05319162663775882187, 1.0),
)  # fmt: skip


def tables_to_onnx(model: Any) -> Any:
    """Return an estimator for tables as an ONNX model; see `portable_mlp.to_onnx`.

    Raises
    ------
    ValueError
        If a column has no name, or a layer uses an operation that has no operator.
    """
    encoder: TableEncoder = model._encoder
    rows = "n"
    outputs = _outputs(model)
    inputs = _inputs(model, outputs)
    graph = GraphWriter({*(name for name, *_ in inputs), *outputs})
    own = [name for name, *_ in inputs]
    if own == ["X"] and model._names is None:
        places = [graph.constant(np.array([i])) for i in range(len(encoder.parts))]
        columns = [graph.node("Gather", "X", at, axis=1) for at in places]
    else:
        columns = ["" if _unused(part) else own.pop(0) for part in encoder.parts]
    write = _TableWriter(graph)
    network, params = model.network_, [to_host(p).astype(np.float32) for p in model.params_]
    x = write.encoded(encoder, columns)

    def predict(recorder: Recorder, params: list[Traced], x: Traced) -> list[Traced]:
        params, targets = params[: len(network.params)], params[len(network.params) :]
        z = network(params, x, recorder)
        if isinstance(model, TabularClassifier):
            return [model._pooled(z, recorder)]
        return [model._pooled(z, *targets, recorder)]

    if not isinstance(model, TabularClassifier):
        params += [a.astype(np.float32) for a in model._outputs]
    (found,) = write_program(graph, x, encoder.n_columns, params, predict)
    if isinstance(model, TabularClassifier):
        known = labels(model)
        code = graph.node("ArgMax", found, axis=1, keepdims=0)
        graph.node("Gather", graph.constant(known), code, name="label")
        shapes = [(known.dtype, [rows]), (np.dtype(np.float32), [rows, len(known)])]
    else:
        shapes = [(np.dtype(np.float32), [rows, network.n_out])]
    graph.node("Identity", found, name=outputs[-1])
    given = [helper.make_tensor_value_info(name, kind, [rows, n]) for name, kind, n in inputs]
    return graph.model(given, [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(dtype), shape)
        for name, (dtype, shape) in zip(outputs, shapes, strict=True)
    ])  # fmt: skip


def input_names(model: Any) -> dict[str, str]:
    """Return the inputs' names, by the names of the columns that a model uses."""
    if model._names is None:
        return {}
    pairs = zip(model._names, model._encoder.parts, strict=True)
    used = [name for name, part in pairs if not _unused(part)]
    return dict(zip(used, (name for name, *_ in _inputs(model, _outputs(model))), strict=True))


def _outputs(model: Any) -> tuple[str, ...]:
    return ("label", "probabilities") if isinstance(model, TabularClassifier) else ("variable",)


def _unused(part: Encoder) -> bool:
    return isinstance(part, UnusedEncoder)


def _inputs(model: Any, outputs: Collection[str]) -> list[tuple[str, int, int]]:
    """Return the name, the type and the number of columns of each input of the graph."""
    parts, names = model._encoder.parts, model._names
    if names is None and not any(isinstance(part, TextEncoder) for part in parts):
        return [("X", TensorProto.DOUBLE, len(parts))]
    if names is None:
        names = [f"column_{i}" for i in range(len(parts))]
    found: dict[str, int] = {}
    for name, part in zip(names, parts, strict=True):
        if _unused(part):
            continue
        if name == "":
            raise ValueError("a column has no name: ONNX needs one, so name it and train again")
        while name in outputs or name in found:
            name += "_"
        found[name] = TensorProto.STRING if isinstance(part, TextEncoder) else TensorProto.DOUBLE
    return [(name, kind, 1) for name, kind in found.items()]


class _TableWriter:
    """Writer of the encoding of columns."""

    def __init__(self, graph: GraphWriter) -> None:
        self._node, self._constant = graph.node, graph.constant

    def encoded(self, encoder: TableEncoder, columns: list[str]) -> str:
        """Write the table's encoding; return the name of the network's input, float32."""
        node, constant = self._node, self._constant
        if not len(encoder.used):  # one column of zeros
            zero = helper.make_tensor("zero", TensorProto.FLOAT, [1], [0.0])
            given = next(filter(None, columns))
            return node("ConstantOfShape", node("Shape", given), value=zero)
        raw = [
            number
            for part, column in zip(encoder.parts, columns, strict=True)
            for number in self._numbers(part, column)
        ]
        used = [raw[i] for i in encoder.used.tolist()]
        ranks = [self._rank(x, grid) for x, grid in zip(used, encoder.quantiles, strict=False)]
        x = node("Concat", *used, axis=1)
        centre, factor = (constant(a[encoder.used]) for a in (encoder.median, encoder.scale))
        z = node("Mul", node("Sub", x, centre), factor)
        # Beyond this the clipped value is the limit itself, and the square would overflow
        far = (constant(limit) for limit in (-1e150, 1e150))
        z = node("Clip", z, *far)
        square = node("Mul", *[node("Div", z, constant(CLIP))] * 2)
        z = self._without_missing(
            x, node("Div", z, node("Sqrt", node("Add", square, constant(1.0))))
        )
        if ranks:
            k, n = encoder.n_ranked, len(used)
            first, rest = (
                node("Slice", z, *(constant(np.array([i])) for i in (start, stop, 1)))
                for start, stop in ((0, k), (k, n))
            )
            z = node("Concat", first, *ranks, *([rest] if k < n else []), axis=1)
        return node("Cast", z, to=TensorProto.FLOAT)

    def _without_missing(self, x: str, z: str) -> str:
        """Return z with zeros where x is NaN."""
        return self._node("Where", self._node("IsNaN", x), self._constant(0.0), z)

    def _numbers(self, part: Encoder, column: str) -> list[str]:
        """Return the numbers (n, 1) that a column becomes."""
        if isinstance(part, UnusedEncoder):
            return []
        node, constant = self._node, self._constant
        if isinstance(part, TextEncoder):
            return self._levels(part, column)
        numbers = [column]
        if part.marked:
            numbers.append(node("Cast", node("IsNaN", column), to=TensorProto.DOUBLE))
        for period in part.periods if isinstance(part, DateEncoder) else ():
            turns = node("Div", column, constant(period))
            place = node("Sub", turns, node("Floor", turns))
            angle = node("Mul", place, constant(2.0 * np.pi))
            scale = constant(10.0**PLACES)
            # A cosine of float64 is missing in older runtimes
            later = node("Add", angle, constant(0.5 * np.pi))
            for wave in (node("Sin", angle), node("Sin", later)):
                scaled = node("Round", node("Mul", wave, scale))
                numbers.append(node("Div", scaled, scale))
        return numbers

    def _levels(self, part: TextEncoder, column: str) -> list[str]:
        if not part.levels:
            return []
        node, constant = self._node, self._constant
        numbers = list(range(len(part.levels)))
        at = node(
            "LabelEncoder", column, domain="ai.onnx.ml", keys_strings=list(part.levels),
            values_int64s=numbers, default_int64=-1,
        )  # fmt: skip
        if part.width < len(part.levels):
            return [node("Gather", constant(np.array([-1.0, 1.0, 0.0])), at)]
        same = [node("Equal", at, constant(np.int64(i))) for i in numbers]
        return [node("Cast", one, to=TensorProto.DOUBLE) for one in same]

    def _rank(self, x: str, grid: NDArray[np.float64]) -> str:
        """Return the place of numbers among quantiles, through Φ⁻¹."""
        node, constant = self._node, self._constant
        last = len(grid) - 1
        above = node("Cast", node("GreaterOrEqual", x, constant(grid)), to=TensorProto.INT64)
        count = node("ReduceSum", above, constant(np.array([1])), keepdims=1)
        one, most = constant(np.int64(1)), constant(np.int64(last - 1))
        at = node("Clip", node("Sub", count, one), constant(np.int64(0)), most)
        low, high = (node("Gather", constant(grid), i) for i in (at, node("Add", at, one)))
        place = node("Div", node("Sub", x, low), node("Sub", high, low))
        place = node("Clip", place, constant(0.0), constant(1.0))
        u = node("Add", node("Cast", at, to=TensorProto.DOUBLE), place)
        u = node("Div", u, constant(float(last)))
        u = node("Clip", u, constant(EDGE), constant(1.0 - EDGE))
        return self._without_missing(x, node("Mul", self._ppf(u), constant(RANK_SCALE)))

    def _ppf(self, p: str) -> str:
        node, constant = self._node, self._constant
        q = node("Sub", p, constant(0.5))
        squared = node("Sub", constant(0.180625), node("Mul", q, q))
        centre = node("Mul", q, self._ratio(squared, *_CENTRE))
        tail = node("Min", p, node("Sub", constant(1.0), p))
        root = node("Sqrt", node("Neg", node("Log", tail)))
        rest = self._ratio(node("Sub", root, constant(1.6)), *_REST)
        rest = node("Mul", rest, node("Sign", q))
        inside = node("LessOrEqual", node("Abs", q), constant(0.425))
        return node("Where", inside, centre, rest)

    def _ratio(self, x: str, above: tuple[float, ...], below: tuple[float, ...]) -> str:
        return self._node("Div", self._polynomial(x, above), self._polynomial(x, below))

    def _polynomial(self, x: str, coefficients: tuple[float, ...]) -> str:
        """Return a polynomial's value, by Horner's rule."""
        first, *others = coefficients
        value = self._constant(first)
        for c in others:
            value = self._node("Add", self._node("Mul", value, x), self._constant(c))
        return value
