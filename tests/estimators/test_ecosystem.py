"""With the rest of scikit-learn, data frames, processes, and arrays of other libraries."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import sklearn
from helpers.targets import get_target
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.datasets import make_classification
from sklearn.ensemble import BaggingClassifier
from sklearn.model_selection import GridSearchCV, KFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from portable_mlp import MLPClassifier, MLPRegressor
from portable_mlp.backends import to_host

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")

X, Y = make_classification(120, 8, random_state=0)
SMALL = {"hidden_layer_sizes": (8,), "max_iter": 10, "random_state": 0}


@pytest.mark.slow
def test_cross_validation_in_processes_is_that_in_one():
    model = MLPClassifier(**SMALL)
    with warnings.catch_warnings():  # of the processes: the settings of this one do not reach them
        one = cross_val_score(model, X, Y, cv=3)
        two = cross_val_score(model, X, Y, cv=3, n_jobs=2)
    assert np.array_equal(one, two)


@pytest.mark.parametrize(
    "meta",
    [
        lambda model: CalibratedClassifierCV(model, cv=3),
        lambda model: BaggingClassifier(model, n_estimators=4, random_state=0),
        lambda model: GridSearchCV(model, {"alpha": [0.0, 1.0], "dropout": [0.0, 0.2]}, cv=2),
    ],
    ids=["calibrated", "bagging", "grid"],
)
def test_meta_estimators(meta):
    model = meta(MLPClassifier(**{**SMALL, "max_iter": 60}, learning_rate_init=0.02)).fit(X, Y)
    assert model.score(X, Y) > 0.8
    p = model.predict_proba(X)
    np.testing.assert_allclose(p.sum(axis=1), 1.0, rtol=1e-12)


def test_weights_are_routed_through_a_pipeline_and_a_search():
    pytest.importorskip("sklearn", "1.9")  # before it a pipeline's score took no requests
    weights = np.where(Y == 1, 3.0, 0.2)
    wanted = MLPClassifier(**SMALL).fit(StandardScaler().fit_transform(X), Y, weights)
    with sklearn.config_context(enable_metadata_routing=True):
        model = MLPClassifier(**SMALL).set_fit_request(sample_weight=True)
        model.set_score_request(sample_weight=True)
        scaler = StandardScaler().set_fit_request(sample_weight=False)
        search = GridSearchCV(make_pipeline(scaler, model), {"mlpclassifier__alpha": [1e-4]}, cv=2)
        search.fit(X, Y, sample_weight=weights)
    coefs = search.best_estimator_[-1].coefs_
    for mine, theirs in zip(coefs, wanted.coefs_, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_validation_rows_are_routed_through_a_pipeline():
    with sklearn.config_context(enable_metadata_routing=True):
        model = MLPClassifier(**SMALL).set_fit_request(X_val=True, y_val=True)
        pipe = make_pipeline(StandardScaler(), model, transform_input=["X_val"])
        pipe.fit(X[:80], Y[:80], X_val=X[80:], y_val=Y[80:])
    scaler = StandardScaler().fit(X[:80])
    wanted = MLPClassifier(**SMALL).fit(
        scaler.transform(X[:80]), Y[:80], X_val=scaler.transform(X[80:]), y_val=Y[80:]
    )
    assert pipe[-1].validation_loss_curve_ == wanted.validation_loss_curve_


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_data_frames_compute_on_numpy_and_keep_their_names(library):
    frames = pytest.importorskip(library)
    frame = frames.DataFrame({f"column {i}": X[:, i] for i in range(X.shape[1])})
    model = MLPClassifier(**SMALL).fit(frame, Y)
    wanted = MLPClassifier(**SMALL).fit(X, Y)
    assert list(model.feature_names_in_) == list(frame.columns)
    assert np.array_equal(model.predict_proba(frame), wanted.predict_proba(X))
    renamed = {"column 0": "other"}
    other = frame.rename(columns=renamed) if library == "pandas" else frame.rename(renamed)
    with pytest.raises(ValueError, match="feature names"):
        model.predict(other)


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_set_output_in_a_pipeline(library):
    frames = pytest.importorskip(library)
    frame = frames.DataFrame({f"column {i}": X[:, i] for i in range(X.shape[1])})
    pipe = make_pipeline(StandardScaler(), MLPClassifier(**SMALL)).set_output(transform=library)
    wanted = make_pipeline(StandardScaler(), MLPClassifier(**SMALL)).fit(X, Y)
    pipe.fit(frame, Y)
    assert list(pipe[-1].feature_names_in_) == list(frame.columns)
    np.testing.assert_allclose(pipe.predict_proba(frame), wanted.predict_proba(X), rtol=1e-12)


@pytest.mark.parametrize("dispatch", [False, True])
@pytest.mark.parametrize("cls", [MLPClassifier, MLPRegressor])
def test_arrays_with_and_without_scikit_learns_dispatch(cls, dispatch, target):
    with sklearn.config_context(array_api_dispatch=dispatch), target.scope():
        there, y = target.array(X), target.array(Y.astype(np.float32))
        model = cls(**SMALL).fit(there, y)
        predicted = model.predict(there)
        assert type(predicted) is type(there)
        assert isinstance(model.score(there, y), float)
    wanted = cls(**SMALL, dtype=target.dtype).fit(X, Y)
    tol = 1e-9 if target.dtype == "float64" else 1e-4
    for mine, theirs in zip(model.coefs_, wanted.coefs_, strict=True):
        np.testing.assert_allclose(to_host(mine), theirs, rtol=0, atol=tol * np.abs(theirs).max())


@pytest.mark.parametrize("method", ["predict", "predict_proba", "hidden_activations"])
def test_another_namespace_than_in_fit_is_an_error_with_dispatch_alone(method, request):
    pytest.importorskip("sklearn", "1.9")
    torch = get_target("torch", request)
    model = MLPClassifier(**SMALL).fit(torch.array(X), Y)
    getattr(model, method)(X)  # moved
    with (
        sklearn.config_context(array_api_dispatch=True),
        pytest.raises(ValueError, match=rf"MLPClassifier.{method}\(\) must use the same namespace"),
    ):
        getattr(model, method)(X)


def test_generic_pipelines_take_tensors_with_dispatch(request):
    """As scikit-learn's own estimators need it."""
    pytest.importorskip("sklearn", "1.9")
    torch = get_target("torch", request)
    pipe = make_pipeline(StandardScaler(), MLPClassifier(**SMALL))
    wanted = clone(pipe).fit(X, Y)
    with sklearn.config_context(array_api_dispatch=True):
        there, y = torch.array(X), torch.array(Y)
        pipe.fit(there, y)
        assert type(pipe.predict(there)) is type(there)
        search = GridSearchCV(pipe, {"mlpclassifier__alpha": [0.0, 1.0]}, cv=KFold(2))
        search.fit(there, y)
    np.testing.assert_allclose(to_host(pipe[-1].coefs_[0]), wanted[-1].coefs_[0], rtol=0, atol=1e-9)
    assert 0.0 <= search.best_score_ <= 1.0
