"""ONNX: another runtime computes the same, for every activation and task."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
from sklearn.compose import make_column_transformer
from sklearn.datasets import load_diabetes, load_iris, make_multilabel_classification
from sklearn.decomposition import PCA, TruncatedSVD
from sklearn.exceptions import NotFittedError
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import (
    Binarizer,
    MaxAbsScaler,
    MinMaxScaler,
    Normalizer,
    OneHotEncoder,
    OrdinalEncoder,
    PolynomialFeatures,
    PowerTransformer,
    QuantileTransformer,
    RobustScaler,
    StandardScaler,
)

from portable_mlp import ACTIVATIONS, Layer, MLPClassifier, MLPRegressor, load, save
from portable_mlp.activations import ELU, LeakyReLU
from portable_mlp.losses import Huber, Quantile

ours = pytest.importorskip("portable_mlp.persistence.onnx")
onnx_graph = pytest.importorskip("portable_mlp.persistence.onnx_graph")
onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
skl2onnx = pytest.importorskip("skl2onnx")

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")

X, Y = load_iris(return_X_y=True)
X = X.astype(np.float32)
NAMES = np.array(["setosa", "versicolor", "virginica"])[Y]
D, T = load_diabetes(return_X_y=True)
D, T = D.astype(np.float32), T / 100
SETTINGS = {"hidden_layer_sizes": (16, 8), "max_iter": 60, "random_state": 0}


def run(model, rows):
    """What onnxruntime makes of the rows."""
    onnx.checker.check_model(model, full_check=True)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    given = rows if isinstance(rows, dict) else {"X": rows}
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, given), strict=True))


def agree(model, rows, found):
    """Within 1e-5 in float32, and labels identical."""
    wanted = model.predict(rows)
    if hasattr(model, "predict_proba"):
        assert np.array_equal(found["label"], wanted)
        probabilities = model.predict_proba(rows)
        np.testing.assert_allclose(found["probabilities"], probabilities, rtol=0, atol=1e-5)
        assert found["probabilities"].dtype == np.float32
        return abs(found["probabilities"] - probabilities).max()
    got = found["variable"].reshape(wanted.shape)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
    return abs(got - wanted).max()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation, dtype, record_property):
    settings = {**SETTINGS, "activation": activation, "dtype": dtype, "learning_rate_init": 0.01}
    model = MLPClassifier(**settings, dropout=0.1).fit(X, NAMES)
    assert model.score(X, NAMES) > 0.6
    largest = agree(model, X, run(ours.to_onnx(model), X))
    record_property(
        "ONNX against NumPy, largest difference", f"{activation:12} {dtype} {largest:.1e}"
    )


TASKS = {
    "binary": (MLPClassifier(**SETTINGS), X, Y == 1),
    "binary, integers": (MLPClassifier(**SETTINGS), X, np.where(Y == 1, 7, -2)),
    "binary, strings": (MLPClassifier(**SETTINGS), X, np.where(Y == 1, "yes", "no")),
    "classes": (MLPClassifier(**SETTINGS), X, Y),
    "classes, strings": (MLPClassifier(**SETTINGS), X, NAMES),
    "classes, objects": (MLPClassifier(**SETTINGS), X, NAMES.astype(object)),
    "classes, floats": (MLPClassifier(**SETTINGS), X, Y.astype(float)),
    "labels": (
        MLPClassifier(**SETTINGS),
        *make_multilabel_classification(n_classes=4, random_state=0),
    ),
    "one target": (MLPRegressor(**SETTINGS), D, T),
    "two targets": (MLPRegressor(**SETTINGS), D, np.c_[T, -T]),
    "poisson": (MLPRegressor("poisson", **SETTINGS), D, T),
    "huber": (MLPRegressor(Huber(2.0), **SETTINGS), D, T),
    "quantile, lbfgs": (MLPRegressor(Quantile(0.9), **SETTINGS, solver="lbfgs"), D, T),
    "no hidden layer": (MLPClassifier((), max_iter=60), X, NAMES),
    "layers of several kinds": (
        MLPRegressor(hidden_layer_sizes=(5, 6), activation=("mish", ELU(0.5, 2.0)), max_iter=20),
        D,
        T,
    ),
    "a slope": (MLPClassifier((5,), LeakyReLU(0.2), max_iter=20), X, NAMES),
}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("how", ["bare", "pipeline"])
def test_every_task(task, how):
    model, rows, y = TASKS[task]
    rows = rows.astype(np.float32)
    if how == "pipeline":
        model = make_pipeline(StandardScaler(), model)
    model.fit(rows, y)
    given = rows.astype(np.float64 if how == "pipeline" else np.float32)
    agree(model, rows, run(ours.to_onnx(model), given))
    agree(model, rows[:1], run(ours.to_onnx(model), given[:1]))


@pytest.mark.parametrize("offset", [1.7e9, -3e8, 2.0**24 * 40])
def test_numbers_that_vary_little_around_a_large_one(offset):
    """Such as seconds since 1970 within an hour: float32 would hold steps of two minutes."""
    rng = np.random.RandomState(0)
    rows = offset + np.c_[np.sort(rng.uniform(0, 3600, 400)), rng.uniform(0, 3600, 400)]
    y = np.sin((rows[:, 0] - offset) / 300) > 0
    model = make_pipeline(StandardScaler(), MLPClassifier(**SETTINGS, dtype="float32"))
    model.fit(rows, y)
    assert agree(model, rows, run(ours.to_onnx(model), rows)) < 3e-6


STEPS = {
    "StandardScaler": StandardScaler(),
    "MinMaxScaler": MinMaxScaler(),
    "MaxAbsScaler": MaxAbsScaler(),
    "RobustScaler": RobustScaler(),
    "QuantileTransformer": QuantileTransformer(n_quantiles=20),
    "PCA": PCA(3),
    "TruncatedSVD": TruncatedSVD(3),
    "Normalizer": Normalizer(),
    "OneHotEncoder": OneHotEncoder(handle_unknown="ignore", sparse_output=False),
    "OrdinalEncoder": OrdinalEncoder(),
    "SimpleImputer, median": SimpleImputer(strategy="median"),
    "SimpleImputer, constant": SimpleImputer(strategy="constant", fill_value=2.5),
    "SimpleImputer, of -1": SimpleImputer(missing_values=-1.0, strategy="most_frequent"),
    "parts": make_column_transformer(
        (make_pipeline(SimpleImputer(), StandardScaler()), [0, 1]), remainder="passthrough"
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
def test_steps_in_float64(name):
    rows = X.astype(np.float64)
    if name.endswith("Encoder"):
        rows = np.round(rows)  # skl2onnx encodes whole numbers
    rows[::11, 0] = -1.0 if name.endswith("-1") else rows[::11, 0]
    if "Imputer" in name or name == "parts":
        rows[::7, 1] = np.nan if not name.endswith("-1") else -1.0
    model = make_pipeline(STEPS[name], MLPClassifier(**SETTINGS)).fit(rows, NAMES)
    graph = ours.to_onnx(model)
    assert graph.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.DOUBLE
    agree(model, rows, run(graph, rows))


@pytest.mark.parametrize(
    "step", [PolynomialFeatures(2), PowerTransformer(), Binarizer(threshold=3.5)]
)
def test_steps_that_have_no_form_in_float64(step):
    rows = X[:, :2] if isinstance(step, PolynomialFeatures) else X
    model = make_pipeline(StandardScaler(), step, MLPClassifier(**SETTINGS)).fit(rows, NAMES)
    graph = ours.to_onnx(model)
    assert graph.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    agree(model, rows, run(graph, rows))


NO_MODELS = {
    "got GridSearchCV: give its best_estimator_": GridSearchCV(
        MLPClassifier(max_iter=2), {"alpha": [0.1, 1.0]}, cv=2
    ),
    "got LogisticRegression$": make_pipeline(StandardScaler(), LogisticRegression()),
}


@pytest.mark.parametrize("said", NO_MODELS)
def test_what_is_no_model(said):
    model = NO_MODELS[said].fit(X, Y)
    with pytest.raises(TypeError, match=f"takes an MLPClassifier, an MLPRegressor, or .*{said}"):
        ours.to_onnx(model)
    ours.to_onnx(getattr(model, "best_estimator_", MLPClassifier(max_iter=1).fit(X, Y)))


@pytest.mark.parametrize(
    "model", [MLPClassifier(), make_pipeline(StandardScaler(), MLPRegressor())]
)
def test_unfitted_models(model):
    with pytest.raises(NotFittedError):
        ours.to_onnx(model)


def test_the_twin_with_a_weight_changed():
    model = MLPClassifier(**SETTINGS).fit(X, NAMES)
    graph = ours.to_onnx(model)
    model.intercepts_[-1][0] += 1e-3
    with pytest.raises(AssertionError):
        agree(model, X, run(graph, X))


def test_mixed_columns_in_a_pipeline():
    pd = pytest.importorskip("pandas")
    rng = np.random.RandomState(0)
    frame = pd.DataFrame(
        {
            "length": rng.standard_normal(200).astype(np.float32),
            "width": rng.standard_normal(200).astype(np.float32),
            "colour": rng.choice(["red", "green", "blue"], 200),
        }
    )
    frame.loc[::7, "width"] = np.nan
    y = np.where((frame["length"] > 0) & (frame["colour"] == "red"), "sell", "keep")
    columns = make_column_transformer(
        (make_pipeline(SimpleImputer(), StandardScaler()), ["length", "width"]),
        (OneHotEncoder(handle_unknown="ignore", sparse_output=False), ["colour"]),
    )
    pipeline = make_pipeline(columns, MLPClassifier(**SETTINGS, dtype="float32"))
    pipeline.fit(frame, y)
    kinds = skl2onnx.common.data_types
    types = [
        (name, (kinds.StringTensorType if name == "colour" else kinds.FloatTensorType)([None, 1]))
        for name in frame
    ]
    graph = ours.to_onnx(pipeline, initial_types=types)
    given = {name: frame[[name]].to_numpy() for name in frame}
    agree(pipeline, frame, run(graph, given))


def test_skl2onnx_knows_the_estimators():
    model = make_pipeline(StandardScaler(), MLPClassifier(**SETTINGS)).fit(X, NAMES)
    found = run(skl2onnx.to_onnx(model, X[:1]), X)
    assert np.array_equal(found["output_label"], model.predict(X))
    first = found["output_probability"][0]  # a dictionary, as it makes of scikit-learn's own
    np.testing.assert_allclose(
        [first[name] for name in model.classes_], model.predict_proba(X[:1])[0], atol=1e-5
    )
    regressor = MLPRegressor(**SETTINGS).fit(D, T)
    found = run(skl2onnx.to_onnx(regressor, D[:1]), D)
    agree(regressor, D, found)
    # Double goes in where it was asked for
    found = run(skl2onnx.to_onnx(regressor, D[:1].astype(float)), D.astype(float))
    agree(regressor, D, found)
    with pytest.raises(ValueError, match="target_opset: 18 or more"):
        skl2onnx.to_onnx(regressor, D[:1], target_opset=15)


def test_written_whole_and_from_a_file(tmp_path):
    model = MLPClassifier(**SETTINGS).fit(X, NAMES)
    again = load(save(model, tmp_path / "model.safetensors"))
    graph = ours.to_onnx(again, tmp_path / "model.onnx")
    assert onnx.load(tmp_path / "model.onnx") == graph
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "model.safetensors"]
    agree(model, X, run(graph, X))
    with pytest.raises(OSError, match="cannot save.*none.*onnx"):
        ours.to_onnx(again, tmp_path / "none" / "model.onnx")


@dataclass(frozen=True)
class Own(Layer):
    """Any function as a layer; nothing learns through it."""

    function: object

    def forward(self, p, x, xp):
        return self.function(x, xp), None

    def backward(self, p, residual, dy, xp):
        return 0.0 * dy


def flag(name):
    return lambda x, xp: xp.astype(getattr(xp, name)(x, 0.1), xp.float32)


def logical(name):
    return lambda x, xp: xp.astype(getattr(xp, name)(x > 0.1, x < 0.5), xp.float32)


OWN = {name: (lambda x, xp, name=name: getattr(xp, name)(0.9 / (1.0 + xp.abs(x)))) for name in (
    "negative", "absolute", "sign", "reciprocal", "exp", "log", "sqrt", "sin", "cos", "tan",
    "arcsin", "arccos", "arctan", "sinh", "cosh", "tanh", "arcsinh", "arctanh", "floor", "ceil",
    "square", "expm1", "log1p",
)}  # fmt: skip
OWN["rint"] = lambda x, xp: xp.round(7 * x)
OWN["arccosh"] = lambda x, xp: xp.acosh(xp.abs(x) + 1.5)
OWN |= {name: flag(name) for name in (
    "less", "less_equal", "greater", "greater_equal", "equal", "not_equal",
)}  # fmt: skip
OWN |= {name: logical(name) for name in ("logical_and", "logical_or", "logical_xor")}
OWN["logical_not"] = lambda x, xp: xp.astype(xp.logical_not(x > 0.1), xp.float32)
OWN |= {
    "add": lambda x, xp: x + 1, "subtract": lambda x, xp: 2 - x, "multiply": lambda x, xp: 3 * x,
    "divide": lambda x, xp: x / 3, "power": lambda x, xp: x**3,
    "maximum": lambda x, xp: xp.maximum(x, 0.25), "minimum": lambda x, xp: xp.minimum(x, 0.25),
    "where": lambda x, xp: xp.where(x > 0, x, -2.0),
    "matmul": lambda x, xp: x @ xp.matmul(x.T, x),
    "copy": lambda x, xp: x,
    "sum": lambda x, xp: x - xp.sum(x, axis=1, keepdims=True),
    "prod": lambda x, xp: x - xp.prod(x, axis=1, keepdims=True),
    "max": lambda x, xp: x - xp.max(x, axis=1, keepdims=True),
    "min": lambda x, xp: x - xp.min(x, axis=-1, keepdims=True),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(OWN))
@pytest.mark.filterwarnings("ignore:the step runs eagerly")
def test_one_s_own_layer(name):
    settings = {"hidden_layer_sizes": (6,), "max_iter": 1, "random_state": 0, "alpha": 0}
    model = MLPRegressor(activation=Own(OWN[name]), **settings).fit(X, Y / 2)
    rows = X[:40] / 8
    agree(model, rows, run(ours.to_onnx(model), rows))


def test_every_operator_is_tried():
    assert set(OWN) >= set(onnx_graph._SAME) | set(onnx_graph._REDUCTIONS)


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (lambda x, xp: xp.cumulative_sum(x, axis=1), "no cumulative_sum"),
        (lambda x, xp: xp.trunc(x), "no operator for its trunc"),
        (lambda x, xp: x * x.shape[0], "depends on the number of rows"),
        (lambda x, xp: x if float(x[0, 0]) > 0 else -x, "value of an array"),
        (lambda x, xp: xp.concat([x[:, 1:], x[:, ::-1][:, :1]], axis=1), "reverses an axis"),
        (lambda x, xp: x + x[:1, :], "a part of the rows"),
    ],
)
@pytest.mark.filterwarnings("ignore:the step runs eagerly")
def test_a_layer_without_a_form_is_named(function, says):
    model = MLPRegressor(hidden_layer_sizes=(3,), activation=Own(function), max_iter=1).fit(
        X, Y / 2
    )
    with pytest.raises(ValueError, match=f"no ONNX form: .*{says}"):
        ours.to_onnx(model)


@pytest.mark.slow
def test_a_missing_library_is_named():
    code = "import sys; sys.modules['onnx'] = None; import portable_mlp; portable_mlp.to_onnx"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "pip install 'portable_mlp[onnx]'" in done.stderr
