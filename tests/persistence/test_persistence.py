"""Model files: what is saved is what is loaded, on any backend, and nothing is run."""

from __future__ import annotations

import pickle
import warnings
from dataclasses import dataclass

import numpy as np
import pytest
from helpers.paths import DATA
from helpers.targets import get_target
from sklearn.datasets import load_diabetes, load_iris, make_multilabel_classification
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.preprocessing import StandardScaler

from portable_mlp import MLPClassifier, MLPRegressor, load, save
from portable_mlp.layers import Layer
from portable_mlp.losses import Huber
from portable_mlp.optimizers import AdamW
from portable_mlp.schedules import Cosine

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


def models():
    X, y = load_iris(return_X_y=True)
    names = np.array(["setosa", "versicolor", "virginica"])
    yield "strings", MLPClassifier((8,), max_iter=5, random_state=0), X, names[y]
    yield "binary", MLPClassifier(max_iter=5, random_state=0), X, y == 0
    yield "multilabel", MLPClassifier(max_iter=5), *make_multilabel_classification(random_state=0)
    X, y = load_diabetes(return_X_y=True)
    objects = {"solver": AdamW(weight_decay=0.1), "learning_rate": Cosine(0.1), "max_iter": 3}
    yield "objects", MLPRegressor(Huber(2.0), (5, 4), ("tanh", "selu"), **objects), X, y
    yield "lbfgs", MLPRegressor(solver="lbfgs", max_iter=5), X, y
    yield "float32", MLPRegressor(early_stopping=True, max_iter=3), X.astype("float32"), y


@pytest.mark.parametrize("case", list(models()), ids=lambda case: case[0])
def test_loaded_model_is_the_saved_one(case, tmp_path):
    _, model, X, y = case
    model.fit(X, y)
    again = load(save(model, tmp_path / "model.safetensors"))
    assert type(again) is type(model)
    assert again.get_params() == model.get_params()
    wanted = model.predict(X)
    got = again.predict(X)
    assert got.dtype == wanted.dtype
    assert np.array_equal(got, wanted)
    if hasattr(model, "predict_proba"):
        assert np.array_equal(again.predict_proba(X), model.predict_proba(X))
    assert again.score(X, y) == model.score(X, y)
    assert all(w.flags.writeable for w in again.coefs_)


@pytest.mark.parametrize("method", ["continue_fit", "partial_fit"])
def test_a_model_without_its_training_says_that_training_starts_anew(method, tmp_path):
    X, y = np.random.RandomState(0).standard_normal((30, 4)), np.arange(30) % 2
    model = MLPClassifier((3,), max_iter=9, random_state=0).continue_fit(X, y, n_iter=4)
    again = load(save(model, tmp_path / "model"))
    with pytest.warns(UserWarning, match="no state of training to go on with"):
        getattr(again, method)(X, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.simplefilter("ignore", ConvergenceWarning)
        getattr(model, method)(X, y)
        getattr(again, method)(X, y)


@pytest.mark.parametrize("there", ["numpy", "torch", "jax"])
@pytest.mark.parametrize("here", ["numpy", "strict", "torch", "jax"])
def test_trained_there_predicts_here(there, here, tmp_path, request):
    there, here = get_target(there, request), get_target(here, request)
    X, y = load_iris(return_X_y=True)
    with there.scope():
        model = MLPClassifier((9, 7), max_iter=5, random_state=0).fit(there.array(X), y)
        wanted = there.backend.to_host(model.predict_proba(there.array(X)))
    again = load(save(model, tmp_path / "model"))
    with here.scope():
        got = here.backend.to_host(again.predict_proba(here.array(X)))
    if here.name == there.name:
        assert np.array_equal(got, wanted)
    np.testing.assert_allclose(got, wanted, rtol=1e-12)


LABELS = [
    np.array([False, True]),
    np.array([-3, 2**60]),
    np.array([1.0, 2.0], dtype=np.float32),
    np.array(["a", "é\u4e2d\U0001f600"]),
    np.array(["a", "b"], dtype=object),
    np.array([0, 255], dtype=np.uint8),
]


@pytest.mark.parametrize("labels", LABELS, ids=lambda labels: f"{labels.dtype}")
def test_labels_come_back(labels, tmp_path):
    X, y = load_iris(return_X_y=True)
    model = MLPClassifier(max_iter=1).fit(X, labels[(y == 0).astype(int)])
    again = load(save(model, tmp_path / "model"))
    assert again.classes_.dtype == model.classes_.dtype
    assert again.classes_.tolist() == model.classes_.tolist()
    assert np.array_equal(again.predict(X), model.predict(X))


def test_labels_that_would_not_are_refused(tmp_path):
    X, y = load_iris(return_X_y=True)
    model = MLPClassifier(max_iter=1).fit(X, np.array(["a", "b\0"], dtype=object)[(y == 0) * 1])
    with pytest.raises(TypeError, match="classes_: only numbers, booleans and texts"):
        save(model, tmp_path / "model")


def test_names_of_columns_come_back(tmp_path):
    frame, y = load_iris(return_X_y=True, as_frame=True)
    model = MLPClassifier(max_iter=1).fit(frame, y)
    again = load(save(model, tmp_path / "model"))
    assert again.feature_names_in_.tolist() == list(frame)
    assert np.array_equal(again.predict(frame), model.predict(frame))
    with pytest.raises(ValueError, match="feature names should match"):
        again.predict(frame.rename(columns=str.upper))


def test_a_model_that_is_not_valid_is_not_saved(tmp_path):
    model = MLPClassifier(max_iter=1).fit(*load_iris(return_X_y=True)).set_params(alpha=-1)
    with pytest.raises(ValueError, match="'alpha' parameter"):
        save(model, tmp_path / "model")
    with pytest.raises(ValueError, match="at most"):
        save(model.set_params(alpha=0), tmp_path / "model", notes={"a": "x" * 5_000_000})
    assert not list(tmp_path.iterdir())


def test_transposed_weights_are_stored_right(tmp_path):
    """safetensors' NumPy writer takes memory as it lies; ours must not let it."""
    X, y = load_iris(return_X_y=True)
    model = MLPClassifier(max_iter=3, random_state=0).fit(X, y)
    wanted = model.predict_proba(X)
    model.coefs_ = [np.asfortranarray(w) for w in model.coefs_]
    again = load(save(model, tmp_path / "model.safetensors"))
    np.testing.assert_allclose(again.predict_proba(X), wanted, rtol=1e-14)


def test_preprocessing_travels_along(tmp_path):
    X, y = load_iris(return_X_y=True)
    scaler = StandardScaler().fit(X)
    model = MLPClassifier(max_iter=5, random_state=0).fit(scaler.transform(X), y)
    again = load(save(model, tmp_path / "model.safetensors", scaler))
    assert np.array_equal(again.predict_proba(X), model.predict_proba(scaler.transform(X)))


@dataclass(frozen=True)
class Foreign(Layer):
    def forward(self, p, x, xp):
        return x, None

    def backward(self, p, residual, dy, xp):
        return dy


def test_what_cannot_be_written_is_said(tmp_path):
    X, y = load_iris(return_X_y=True)
    model = MLPClassifier((4,), (Foreign(),), max_iter=1).fit(X, y)
    with pytest.raises(TypeError, match="activation=Foreign.*cannot be written to a model file"):
        save(model, tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b"not a model", b"\xff" * 100])
def test_not_a_model_file(content, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"model.safetensors is not a model file"):
        load(path)


def test_another_library_s_safetensors(tmp_path):
    from safetensors.numpy import save_file

    save_file({"a": np.ones(3)}, tmp_path / "other.safetensors")
    with pytest.raises(
        ValueError, match="other.safetensors is no model of format 'portable_mlp/3'.*says None"
    ):
        load(tmp_path / "other.safetensors")


@dataclass(frozen=True)
class Tanh(Layer):
    """A user's layer with the name of one of the library's."""

    def forward(self, p, x, xp):
        return x**3, x

    def backward(self, p, x, dy, xp):
        return 3 * x**2 * dy


class Heir(MLPClassifier):
    """A subclass, which a file could not name."""


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (MLPClassifier((4,), Tanh(), max_iter=1), "activation=Tanh"),
        (Heir(max_iter=1), "only MLPClassifier and .* can be saved, got .*Heir"),
    ],
)
def test_what_would_come_back_as_something_else_is_refused(model, message, tmp_path):
    model.fit(*load_iris(return_X_y=True))
    with pytest.raises(TypeError, match=message):
        save(model, tmp_path / "model.safetensors")


def test_save_unfitted_or_into_no_folder(tmp_path):
    with pytest.raises(NotFittedError):
        save(MLPClassifier(), tmp_path / "model.safetensors")
    model = MLPClassifier(max_iter=1).fit(*load_iris(return_X_y=True))
    with pytest.raises(
        FileNotFoundError, match="cannot save: No such file.*none.model.safetensors"
    ):
        save(model, tmp_path / "none" / "model.safetensors")


def test_generators_are_not_stored_and_arrays_become_tuples(tmp_path):
    X, y = load_iris(return_X_y=True)
    model = MLPClassifier(np.array([3, 4]), max_iter=1, random_state=np.random.RandomState(0))
    model.fit(X, y)
    with pytest.warns(UserWarning, match="a generator's state is not stored"):
        again = load(save(model, tmp_path / "model.safetensors"))
    assert again.hidden_layer_sizes == (3, 4)
    assert np.array_equal(again.predict(X), model.predict(X))


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.InconsistentVersionWarning")
def test_a_pickle_of_version_0_1():
    """Its classes are found where they were; it predicts, and goes on training."""
    stored = pickle.loads((DATA / "fitted_0.1.pickle").read_bytes())
    model, X, y = stored["model"], stored["X"], stored["y"]
    np.testing.assert_allclose(model.predict_proba(X), stored["predicted"], rtol=1e-12)
    model.continue_fit(X, y, n_iter=3)
    np.testing.assert_allclose(model.predict_proba(X), stored["on"], rtol=1e-9)
