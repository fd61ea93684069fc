"""Models for tables as ONNX: another runtime computes the same from the raw columns."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.special import ndtri
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from portable_mlp import TabularClassifier, TabularRegressor
from portable_mlp.losses import Quantile

ours = pytest.importorskip("portable_mlp.persistence.onnx")
tables = pytest.importorskip("portable_mlp.persistence.onnx_tables")
onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
pd = pytest.importorskip("pandas")

SHORT = {"members": 3, "epochs": 6, "steps": 40, "hidden_layer_sizes": (16, 16)}
N = 240


def estimator(kind, **given):
    return kind(replace(kind.presets["default"], **SHORT), random_state=0, **given)


def run(model, feeds):
    found = ours.to_onnx(model)
    onnx.checker.check_model(found, full_check=True)
    session = ort.InferenceSession(found.SerializeToString(), providers=["CPUExecutionProvider"])
    wanted = {given.name for given in session.get_inputs()}
    unused = feeds.keys() - wanted
    assert len(unused) == len(model.unused_columns_) or "X" in wanted
    return session.run(None, {name: feeds[name] for name in wanted})


def feeds(X, renamed=None):
    """The columns as the exported model takes them."""
    found = {}
    for name in X.columns:
        column = X[name]
        if pd.api.types.is_datetime64_any_dtype(column):
            values = ((column - pd.Timestamp(0)) / pd.Timedelta("1D")).to_numpy(float)
        elif pd.api.types.is_timedelta64_dtype(column):
            values = (column / pd.Timedelta("1s")).to_numpy(float)
        elif pd.api.types.is_numeric_dtype(column):
            values = column.to_numpy(float)
        else:
            values = column.astype(object).where(column.notna(), "").to_numpy(object)
        found[(renamed or {}).get(name, name)] = values.reshape(-1, 1)
    return found


def table(seed, n=N):
    rng = np.random.RandomState(seed)
    holes = rng.rand(n) < 0.15
    days = pd.Timestamp("2019-03-01") + pd.to_timedelta(rng.randint(0, 24 * 900, n), unit="h")
    return pd.DataFrame({
        "number": rng.standard_cauchy(n) * 1e3,
        "few values": rng.randint(0, 4, n),
        "holes": np.where(holes, np.nan, rng.standard_normal(n)),
        "two": rng.choice(["yes", "no"], n),
        "text": rng.choice(["a", "b", "ß", None], n),
        "boolean": rng.rand(n) < 0.3,
        "date": np.where(holes, np.datetime64("NaT", "ns"), days.to_numpy("datetime64[ns]")),
        "span": pd.to_timedelta(rng.randint(0, 9999, n), unit="s"),
        "constant": 1.5,
    })  # fmt: skip


def target(X):
    text = 1.0 * (X["text"] == "a") + (X["two"] == "yes") + X["boolean"] + X["holes"].fillna(2.0)
    waves = (
        np.sin(X["date"].dt.hour.fillna(0) * 2 * np.pi / 24) + X["span"].dt.total_seconds() / 5e3
    )
    numbers = np.tanh(X["number"] / 1e3) + 0.3 * X["few values"]
    return (text + waves + numbers).to_numpy(float)


LABELS = {
    "strings": lambda y: np.where(y > 3, "yes", "no"),
    "integers": lambda y: np.digitize(y, [2.0, 4.0]) * 7 - 2,
    "booleans": lambda y: y > 3,
    "floats": lambda y: np.digitize(y, [3.0]) + 1.0,
}


@pytest.mark.parametrize("labels", LABELS)
def test_a_classification(labels, record_property):
    X, new = table(0), table(1)
    model = estimator(TabularClassifier).fit(X, LABELS[labels](target(X)))
    label, p = run(model, feeds(new))
    wanted = model.predict_proba(new)
    assert wanted.std(axis=0).min() > 0.05
    np.testing.assert_allclose(p, wanted, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(label, model.predict(new))
    assert p.dtype == np.float32
    difference = np.abs(p - wanted).max()
    record_property("ONNX against NumPy, largest difference", f"table        {difference:.1e}")


@pytest.mark.parametrize("several", [False, True])
def test_a_regression(several):
    X, new = table(0), table(1)
    y = 100 + 10 * target(X)
    model = estimator(TabularRegressor).fit(X, np.column_stack([y, -y]) if several else y)
    (found,) = run(model, feeds(new))
    wanted = model.predict(new).reshape(found.shape)
    assert wanted.std() > 1.0
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-4)


def test_quantiles():
    X, new = table(0), table(1)
    y = target(X) + np.random.RandomState(2).standard_normal(N)
    model = estimator(TabularRegressor, loss=Quantile((0.2, 0.5, 0.8))).fit(X, y)
    (found,) = run(model, feeds(new))
    np.testing.assert_allclose(found, model.predict(new), rtol=1e-5, atol=1e-5)
    assert np.all(np.diff(found, axis=1) >= 0.0)


def test_what_training_did_not_have():
    X, new = table(0), table(1)
    model = estimator(TabularClassifier).fit(X, target(X) > 3)
    new["text"] = "unknown"
    new.loc[:50, "two"] = "perhaps"
    new.loc[:80, "few values"] = np.nan
    new.loc[20:30, "number"] = [1e300, -1e300, 1e9, -1e9, 0, -0.0, 1, 2, 3, np.nan, 1e-300]
    _, p = run(model, feeds(new))
    np.testing.assert_allclose(p, model.predict_proba(new), rtol=0, atol=1e-5)


@pytest.mark.parametrize("columns", [3, 40])
def test_an_array_has_one_input(columns):
    """Of a wide table nothing is ranked."""
    rng = np.random.RandomState(0)
    x = rng.standard_normal((N, columns))
    x[rng.rand(*x.shape) < 0.1] = np.nan
    model = estimator(TabularRegressor).fit(x, np.nansum(x[:, :3], axis=1))
    assert model._encoder.n_ranked == (0 if columns == 40 else columns)
    (found,) = run(model, {"X": x})
    np.testing.assert_allclose(found[:, 0], model.predict(x), rtol=1e-5, atol=1e-5)


def test_texts_in_an_array():
    x = np.array([["a" if i % 3 else "b", i % 7, i / 10] for i in range(N)], object)
    model = estimator(TabularClassifier).fit(x, (np.arange(N) % 3 == 0) ^ (np.arange(N) % 7 > 3))
    given = {f"column_{i}": x[:, [i]].astype(object if i == 0 else float) for i in range(3)}
    label, _ = run(model, given)
    np.testing.assert_array_equal(label, model.predict(x))


def test_names_that_the_graph_uses_itself():
    rng = np.random.RandomState(0)
    names = ["label", "probabilities", "label_", "t0", "c0", "X"]
    X = pd.DataFrame(rng.standard_normal((N, 6)), columns=names)
    model = estimator(TabularClassifier).fit(X, X.sum(axis=1) > 0)
    found = ours.to_onnx(model)
    own = [given.name for given in found.graph.input]
    assert len({*own, "label", "probabilities"}) == 8
    label, p = run(model, feeds(X, dict(zip(names, own, strict=True))))
    np.testing.assert_array_equal(label, model.predict(X))
    np.testing.assert_allclose(p, model.predict_proba(X), rtol=0, atol=1e-5)


@pytest.mark.parametrize("value", [1.0, "a", None])
def test_nothing_but_constants(value):
    X = pd.DataFrame({"x": [value] * 40})
    model = estimator(TabularRegressor).fit(X, np.arange(40.0))
    X = X.astype(float) if value is None else X  # a column of nothing takes numbers
    (found,) = run(model, feeds(X))
    np.testing.assert_allclose(found[:, 0], model.predict(X), rtol=1e-5)


def test_the_normal_distribution_s_inverse():
    p = np.linspace(1e-3, 1 - 1e-3, 20001)
    graph = tables.GraphWriter({"p", "z"})
    graph.node("Identity", tables._TableWriter(graph)._ppf("p"), name="z")
    info = onnx.helper.make_tensor_value_info
    model = graph.model(
        [info("p", onnx.TensorProto.DOUBLE, ["n"])], [info("z", onnx.TensorProto.DOUBLE, ["n"])]
    )
    (z,) = ort.InferenceSession(model.SerializeToString()).run(None, {"p": p})
    np.testing.assert_allclose(z, ndtri(p), rtol=1e-13, atol=1e-14)


def test_what_has_no_form():
    x = np.random.RandomState(0).standard_normal((N, 2))
    model = make_pipeline(StandardScaler(), estimator(TabularRegressor)).fit(x, x[:, 0])
    with pytest.raises(TypeError, match="a model for tables without steps before it"):
        ours.to_onnx(model)
    unnamed = pd.DataFrame(x, columns=["a", ""])
    model = estimator(TabularRegressor).fit(unnamed, x[:, 0])
    with pytest.raises(ValueError, match="a column has no name"):
        ours.to_onnx(model)


def test_written_to_a_file(tmp_path):
    x = np.random.RandomState(0).standard_normal((N, 2))
    model = estimator(TabularRegressor).fit(x, x[:, 0])
    found = ours.to_onnx(model, tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").read_bytes() == found.SerializeToString()
