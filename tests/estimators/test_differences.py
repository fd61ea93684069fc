"""Each row of the documentation's table of differences: scikit-learn does so, this library so."""

from __future__ import annotations

import re
import warnings

import numpy as np
import pytest
from scipy.sparse import csr_array, issparse
from scipy.special import logsumexp
from sklearn import neural_network as peer
from sklearn.datasets import load_wine, make_classification
from sklearn.exceptions import ConvergenceWarning

import portable_mlp as ours
from portable_mlp import DivergenceError
from portable_mlp.losses import SoftmaxCrossEntropy
from portable_mlp.optimizers import SklearnAdam

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


def test_several_sparse_labels_are_predicted_dense():
    several = csr_array(np.c_[Y, 1 - Y])
    theirs, mine = (model.fit(X, several) for model in classifiers())
    assert issparse(theirs.predict(X))
    np.testing.assert_array_equal(mine.predict(X), theirs.predict(X).toarray())


@pytest.mark.parametrize(
    ("dtype", "before", "after"),
    [("object", "<U2", "object"), ("Int64", "float64", "int64"), ("boolean", "float64", "bool")],
)
def test_labels_keep_their_type(dtype, before, after):
    pandas = pytest.importorskip("pandas")
    labels = np.array(["no", "so"], object)[Y] if dtype == "object" else Y
    labels = pandas.Series(labels, dtype=dtype)
    theirs, mine = (model.fit(X, labels) for model in classifiers())
    assert theirs.classes_.dtype == before
    assert mine.classes_.dtype == mine.predict(X).dtype == after
    np.testing.assert_array_equal(mine.predict(X), theirs.predict(X))


def test_updates_have_the_type_of_the_parameters():
    theirs, mine = (model.fit(X.astype(np.float32), Y) for model in classifiers())
    gradients = [np.ones_like(w) for w in theirs.coefs_ + theirs.intercepts_]
    assert theirs.coefs_[0].dtype == mine.coefs_[0].dtype == np.float32
    assert {u.dtype for u in theirs._optimizer._get_updates(gradients)} == {np.dtype("float64")}
    leaf = np.ones(3, np.float32)
    rule = SklearnAdam()
    hyper = rule.coefficients(1, 0.001)
    updated, _ = rule.update(leaf, leaf, (leaf, leaf), hyper, np)
    assert updated.dtype == np.float32


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


@pytest.mark.parametrize("kind", ["two classes", "three classes", "several labels"])
def test_log_probabilities_are_finite(kind):
    y = {"two classes": Y, "three classes": Y + (X[:, 0] > 1), "several labels": np.c_[Y, 1 - Y]}
    theirs, mine = (model.fit(X, y[kind]) for model in classifiers())
    with np.errstate(divide="ignore"):
        assert np.isneginf(theirs.predict_log_proba(1e6 * X)).any()
        wanted = np.log(theirs.predict_proba(X))
    assert np.isfinite(mine.predict_log_proba(1e6 * X)).all()
    np.testing.assert_allclose(mine.predict_log_proba(X), wanted, rtol=1e-9)


def test_a_loss_that_overflows_is_a_divergence():
    theirs, mine = (library.MLPRegressor(**PARAMS) for library in (peer, ours))
    with np.errstate(all="ignore"):
        theirs.fit(X, 1e160 * X[:, 0])
    assert theirs.loss_ == np.inf
    with pytest.raises(DivergenceError):
        mine.fit(X, 1e160 * X[:, 0])


def test_parameters_changed_between_parts_hold():
    first, second = [], []
    for library, found in ((peer, first), (ours, second)):
        for rate in (0.001, 0.5):
            model = library.MLPClassifier(**PARAMS).partial_fit(X, Y, classes=[0, 1])
            model.set_params(learning_rate_init=rate)
            found.append(model.partial_fit(X, Y).coefs_[0])
    np.testing.assert_array_equal(*first)
    assert np.abs(second[0] - second[1]).max() > 0.1


def test_other_layers_are_not_those_to_go_on_with():
    theirs, mine = (model.fit(X, Y) for model in classifiers(warm_start=True))
    for model in (theirs, mine):
        model.set_params(hidden_layer_sizes=(3,))
    assert theirs.fit(X, Y).coefs_[0].shape == (8, 8)
    with pytest.raises(ValueError, match="continuing needs the same layers"):
        mine.fit(X, Y)


def test_predictions_have_the_type_of_the_model():
    theirs, mine = (model.fit(X.astype(np.float32), Y) for model in classifiers())
    assert theirs.predict_proba(X).dtype == np.float64
    assert mine.predict_proba(X).dtype == np.float32


def test_lbfgs_leaves_no_curves_of_earlier_fits():
    theirs, mine = (model.fit(X, Y).set_params(solver="lbfgs").fit(X, Y) for model in classifiers())
    assert len(theirs.loss_curve_) == 5
    assert not hasattr(mine, "loss_curve_")


def test_counts_are_not_negative():
    theirs, mine = (library.MLPRegressor("poisson", **PARAMS) for library in (peer, ours))
    with np.errstate(all="ignore"):
        assert np.isnan(theirs.fit(X, Y - 1.0).loss_)
    with pytest.raises(ValueError, match="y must not be negative"):
        mine.fit(X, Y - 1.0)


def test_warnings_come_from_the_line_that_called():
    theirs, mine = classifiers()
    for model, own, other in ((theirs, "sklearn", __name__), (mine, __name__, "sklearn")):
        for ignored, n_shown in ((own, 0), (other, 1)):
            with warnings.catch_warnings(record=True) as shown:
                warnings.simplefilter("always")
                warnings.filterwarnings("ignore", module=ignored)
                model.fit(X, Y)
            assert [w.category for w in shown] == [ConvergenceWarning] * n_shown


def test_parts_and_early_stopping_are_refused_beforehand():
    theirs, mine = classifiers(early_stopping=True)
    assert hasattr(theirs, "partial_fit")
    assert not hasattr(mine, "partial_fit")
    for model in (theirs, mine):
        with pytest.raises(ValueError, match="partial_fit does not support early_stopping=True"):
            model.partial_fit(X, Y, classes=[0, 1])


def test_kept_the_reported_loss_is_clipped():
    """Unless a loss is given that is not."""
    x, y = load_wine(return_X_y=True)  # not scaled: proline goes up to 1680
    params = {"hidden_layer_sizes": (50,), "random_state": 4, "batch_size": 178, "alpha": 0.0}
    theirs = peer.MLPClassifier(**params, max_iter=20).fit(x, y)
    mine = ours.MLPClassifier(**params, max_iter=20).fit(x, y)
    np.testing.assert_allclose(mine.loss_curve_, theirs.loss_curve_, rtol=1e-9)
    first = ours.MLPClassifier(**params).init_model(x, y)
    z = first.hidden_activations(x) @ first.coefs_[-1] + first.intercepts_[-1]
    per_row = logsumexp(z, axis=1) - z[np.arange(178), y]
    assert mine.loss_curve_[0] == pytest.approx(np.minimum(per_row, 36.04).mean(), rel=1e-3)
    exact = ours.MLPClassifier(**params, max_iter=1, loss=SoftmaxCrossEntropy()).fit(x, y)
    assert exact.loss_curve_[0] == pytest.approx(per_row.mean(), rel=1e-12)
    assert exact.loss_curve_[0] > 2 * mine.loss_curve_[0]


def test_an_activation_that_is_set_later():
    theirs, mine = (model.fit(X, Y) for model in classifiers(activation="tanh"))
    before = theirs.predict_proba(X), mine.predict_proba(X)
    for model in (theirs, mine):
        model.set_params(activation="relu")
    assert not np.allclose(theirs.predict_proba(X), before[0])
    assert np.array_equal(mine.predict_proba(X), before[1])
    assert not np.allclose(mine.fit(X, Y).predict_proba(X), before[1])


def test_kept_the_loss_reported_for_several_outputs_is_their_mean():
    """Though what is minimised is their sum."""
    params = {**PARAMS, "max_iter": 1, "alpha": 0.0, "batch_size": 120}
    start = ours.MLPRegressor(**params).init_model(X, X[:, :3])
    wanted = 0.5 * np.mean((start.predict(X) - X[:, :3]) ** 2)
    for library in (peer, ours):
        model = library.MLPRegressor(**params).fit(X, X[:, :3])
        assert model.loss_curve_[0] == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("labels", [np.c_[Y, X[:, 0] > 0], Y + (X[:, 0] > 1)], ids=["2", "3"])
def test_kept_held_out_rows_are_stratified_for_two_classes_alone(labels):
    """The rows held out are the peer's."""
    theirs, mine = (model.fit(X, labels) for model in classifiers(early_stopping=True))
    np.testing.assert_allclose(mine.validation_scores_, theirs.validation_scores_, rtol=1e-12)
