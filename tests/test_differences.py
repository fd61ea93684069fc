"""Each row of the README's table of differences: scikit-learn does so, this library so."""

from __future__ import annotations

import re
import warnings

import numpy as np
import pytest
from scipy.special import logsumexp
from sklearn import neural_network as peer
from sklearn.datasets import load_wine, make_classification
from sklearn.exceptions import ConvergenceWarning

import portable_mlp as ours
from portable_mlp import DivergenceError

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")

X, Y = make_classification(120, 8, random_state=0)
PARAMS = {"hidden_layer_sizes": (8,), "random_state": 0, "max_iter": 5}


def classifiers(**params):
    return (library.MLPClassifier(**{**PARAMS, **params}) for library in (peer, ours))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_divergence_is_noticed_at_once():
    params = {**PARAMS, "max_iter": 9, "solver": "sgd", "learning_rate_init": 1e12}
    theirs, mine = peer.MLPRegressor(**params), ours.MLPRegressor(**params)
    with pytest.raises(ValueError, match="non-finite parameter weights"):
        theirs.fit(1e6 * X, Y)
    assert theirs.n_iter_ == 9  # looked at after the last epoch
    with pytest.raises(DivergenceError, match="non-finite parameter weights") as caught:
        mine.fit(1e6 * X, Y)
    assert issubclass(DivergenceError, ValueError)
    assert re.search(r"Epoch [1-4], loss", str(caught.value))


def test_divergence_with_early_stopping_keeps_the_best():
    theirs, mine = classifiers(
        early_stopping=True, solver="sgd", max_iter=30, activation="identity",
        learning_rate_init=1e150,
    )  # fmt: skip
    with np.errstate(all="ignore"):
        theirs.fit(X, Y)
    assert np.isnan(theirs.loss_curve_).sum() > 5
    with pytest.warns(RuntimeWarning, match="Epoch .*The best weights so far are kept"):
        mine.fit(X, Y)
    assert np.isnan(mine.loss_curve_).sum() <= 1
    assert all(np.isfinite(w).all() for w in mine.coefs_)


@pytest.mark.parametrize(
    "ignored", [{"learning_rate": "adaptive"}, {"solver": "lbfgs", "early_stopping": True}]
)
def test_what_is_ignored_is_said(ignored):
    theirs, mine = classifiers(**ignored)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", ConvergenceWarning)
        theirs.fit(X, Y)
    with pytest.warns(UserWarning, match="no effect with solver="):
        mine.fit(X, Y)


def test_a_batch_of_rows_that_weigh_nothing():
    theirs, mine = classifiers(batch_size=40, shuffle=False)
    weights = np.where(np.arange(120) < 40, 0.0, 1.0)
    with pytest.raises(ZeroDivisionError):
        theirs.fit(X, Y, sample_weight=weights)
    mine.fit(X, Y, sample_weight=weights)
    assert np.isfinite(mine.loss_curve_).all()


def test_negative_weights():
    theirs, mine = classifiers()
    weights = np.where(np.arange(120) < 40, -0.1, 1.0)
    theirs.fit(X, Y, sample_weight=weights)
    with pytest.raises(ValueError, match="not negative"):
        mine.fit(X, Y, sample_weight=weights)


def test_the_reported_loss_is_not_clipped():
    x, y = load_wine(return_X_y=True)  # not scaled: proline goes up to 1680
    params = {"hidden_layer_sizes": (50,), "random_state": 4, "batch_size": 178, "alpha": 0.0}
    theirs = peer.MLPClassifier(**params, max_iter=1).fit(x, y)
    mine = ours.MLPClassifier(**params, max_iter=1).fit(x, y)
    for a, b in zip(theirs.coefs_, mine.coefs_, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)
    first = ours.MLPClassifier(**params).init_model(x, y)
    z = first.hidden_activations(x) @ first.coefs_[-1] + first.intercepts_[-1]
    per_row = logsumexp(z, axis=1) - z[np.arange(178), y]
    assert mine.loss_curve_[0] == pytest.approx(per_row.mean(), rel=1e-12)
    assert theirs.loss_curve_[0] == pytest.approx(np.minimum(per_row, 36.04).mean(), rel=1e-3)
    assert mine.loss_curve_[0] > 2 * theirs.loss_curve_[0]


@pytest.mark.parametrize("values", [(-1, 1), (1, 2), (0, 2)])
def test_several_labels_are_zeros_and_ones(values):
    several = np.choose(np.c_[Y, 1 - Y], values)
    theirs, mine = classifiers()
    theirs.fit(X, several)
    true, _ = classifiers()
    for a, b in zip(theirs.coefs_, true.fit(X, 1 * (several != 0)).coefs_, strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match=f"0 or 1 each, got .{values[0]} +{values[1]}"):
        mine.fit(X, several)


def test_the_best_weights_are_the_models_own():
    theirs, mine = classifiers(early_stopping=True)
    assert theirs.fit(X, Y).coefs_ is theirs._best_coefs
    mine.set_params(warm_start=True, learning_rate_init=0.1).fit(X, Y)
    before = mine.coefs_
    copies = [w.copy() for w in before]
    mine.fit(X, Y)
    for w, copy in zip(before, copies, strict=True):
        np.testing.assert_array_equal(w, copy)


def test_lbfgs_keeps_float32():
    theirs, mine = classifiers(solver="lbfgs")
    single = X.astype(np.float32)
    assert theirs.fit(single, Y).coefs_[0].dtype == np.float64
    assert {w.dtype for w in mine.fit(single, Y).coefs_} == {np.dtype("float32")}


def test_lbfgs_has_no_partial_fit():
    theirs, mine = (
        library.MLPRegressor(solver="lbfgs", **PARAMS).fit(X, Y) for library in (peer, ours)
    )
    assert hasattr(theirs, "partial_fit")
    assert not hasattr(mine, "partial_fit")


def test_log_probabilities_are_finite():
    theirs, mine = (model.fit(X, Y) for model in classifiers())
    with np.errstate(divide="ignore"):
        assert np.isneginf(theirs.predict_log_proba(1e6 * X)).any()
    assert np.isfinite(mine.predict_log_proba(1e6 * X)).all()


def test_kept_the_loss_reported_for_several_outputs_is_their_mean():
    """Though what is minimised is their sum."""
    params = {**PARAMS, "max_iter": 1, "alpha": 0.0, "batch_size": 120}
    start = ours.MLPRegressor(**params).init_model(X, X[:, :3])
    wanted = 0.5 * np.mean((start.predict(X) - X[:, :3]) ** 2)
    for library in (peer, ours):
        model = library.MLPRegressor(**params).fit(X, X[:, :3])
        assert model.loss_curve_[0] == pytest.approx(wanted, rel=1e-12)


def test_kept_held_out_rows_of_several_labels_are_not_stratified():
    """The rows held out are the peer's, for which it stratifies single labels alone."""
    labels = np.column_stack([Y, X[:, 0] > 0])
    theirs, mine = (model.fit(X, labels) for model in classifiers(early_stopping=True))
    np.testing.assert_allclose(mine.validation_scores_, theirs.validation_scores_, rtol=1e-12)
