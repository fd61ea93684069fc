"""What scikit-learn's users asked for: each against an oracle, and the same on every backend."""

from __future__ import annotations

import pickle
import re
import warnings
from dataclasses import dataclass

import numpy as np
import pytest
from array_api_compat import device
from sklearn import config_context
from sklearn.base import clone
from sklearn.datasets import make_classification, make_regression
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import get_scorer, log_loss
from sklearn.model_selection import GridSearchCV
from sklearn.neural_network import MLPClassifier as PeerClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.class_weight import compute_sample_weight

from portable_mlp import (
    Callback,
    LossCurveDisplay,
    MLPClassifier,
    MLPRegressor,
    check_layer,
    check_loss,
)
from portable_mlp.backends import to_host
from portable_mlp.layers import Layer, Param
from portable_mlp.losses import Quantile
from portable_mlp.optimizers import OPTIMIZERS, SGD, Adam, AdamW
from portable_mlp.schedules import SCHEDULES, Cosine, ReduceOnPlateau

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")

SHARES = [0.45, 0.3]  # of the classes
X, Y = make_classification(120, 8, n_classes=3, n_informative=5, weights=SHARES, random_state=0)
X_VAL, Y_VAL = make_classification(40, 8, n_classes=3, n_informative=5, random_state=1)
PARAMS = {"hidden_layer_sizes": (8, 6), "max_iter": 6, "random_state": 0, "batch_size": 32}


def classifier(**params):
    return MLPClassifier(**{**PARAMS, **params})


def same(a, b, tol=0.0):
    for mine, theirs in zip(a.coefs_ + a.intercepts_, b.coefs_ + b.intercepts_, strict=True):
        mine, theirs = to_host(mine), to_host(theirs)
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=tol * np.abs(theirs).max())


def different(a, b):
    return not np.array_equal(to_host(a.coefs_[0]), to_host(b.coefs_[0]))


def without_argmax(target):
    if target.name == "strict-no_x64":
        pytest.skip("array_api_strict's argmax makes an int64 that its no_x64 device refuses")


# ---------------------------------------------------------------- one's own parts


def squared(z, y, xp):
    """Half the squared difference from the right class's number, for one logit a class."""
    k = xp.arange(z.shape[1], dtype=y.dtype, device=device(y))
    d = z - xp.astype(y[:, None] == k, z.dtype)
    return 0.5 * xp.sum(d * d, axis=1), d


def halved(z, y, xp):
    d = z[:, 0] - y
    return 0.5 * d * d, d[:, None]


def quarter(rng, shape, fan_in, fan_out):
    return np.full(shape, 0.25)


@dataclass(frozen=True)
class PReLU(Layer):
    """max(x, 0) + a min(x, 0), with a trained slope a for each unit (He et al., 2015)."""

    n: int

    @property
    def params(self):
        return (Param("slope", (self.n,), quarter, self.n, self.n, group="slope"),)

    def forward(self, p, x, xp):
        return xp.maximum(x, 0.0) + p[0] * xp.minimum(x, 0.0), x

    def backward(self, p, x, dy, xp):
        positive = xp.astype(x > 0.0, x.dtype)
        return dy * (positive + (1.0 - positive) * p[0])

    def gradients(self, p, x, dy, xp):
        return (xp.sum(dy * xp.minimum(x, 0.0), axis=0),)


# ---------------------------------------------------------------- every backend

# What the first argument brings, with the others
FEATURES = {
    "class_weight": {"class_weight": {0: 2.0, 1: 0.5, 2: 1.0}},
    "balanced": {"class_weight": "balanced"},
    "dropout": {"dropout": 0.3},
    "adamw": {"solver": "adamw"},
    "rmsprop": {"solver": "rmsprop"},
    "weight_decay": {"weight_decay": 0.5, "solver": "adamw"},
    "optimizer": {"solver": AdamW(weight_decay=0.3)},
    "loss function": {"loss": squared},
    "label_smoothing": {"label_smoothing": 0.2},
    "activations": {"activation": ("tanh", "gelu")},
    "own layer": {"activation": (PReLU(8), "tanh")},
    "schedule": {"learning_rate": Cosine(0.1)},
    "schedule of sgd": {"learning_rate": Cosine(0.1), "solver": "sgd"},
    "schedule of adamw": {"learning_rate": Cosine(0.1), "solver": "adamw"},
    "schedule of rmsprop": {"learning_rate": Cosine(0.1), "solver": "rmsprop"},
    "clip_norm": {"clip_norm": 0.05},
    "scoring": {
        "scoring": "neg_log_loss",
        "early_stopping": True,
        "max_iter": 12,
        "validation_fraction": 0.3,
    },
}


@pytest.mark.parametrize("feature", FEATURES)
def test_every_feature_has_an_effect_and_is_the_same_everywhere(feature, target):
    extra = FEATURES[feature]
    if feature == "scoring":
        without_argmax(target)
    wanted = classifier(**extra, dtype=target.dtype).fit(X, Y)
    if target.name == "numpy":
        others = {name: extra[name] for name in list(extra)[1:]}
        assert different(wanted, classifier(**others).fit(X, Y))
    with target.scope():
        model = classifier(**extra).fit(target.array(X), target.array(Y.astype(np.int32)))
        same(model, wanted, 1e-9 if target.dtype == "float64" else 1e-4)
        for mine, theirs in zip(model.layer_params_, wanted.layer_params_, strict=True):
            np.testing.assert_allclose(to_host(mine), theirs, atol=1e-4)
        if wanted.validation_scores_ is not None:
            np.testing.assert_allclose(model.validation_scores_, wanted.validation_scores_)


@pytest.mark.parametrize("loss", ["huber", Quantile(0.8), halved], ids=["huber", "quantile", "own"])
def test_losses_of_the_regressor_are_the_same_everywhere(loss, target):
    y = np.abs(Y + 0.1 * X[:, 0])
    wanted = MLPRegressor(loss, **PARAMS, dtype=target.dtype).fit(X, y)
    with target.scope():
        model = MLPRegressor(loss, **PARAMS).fit(target.array(X), target.array(y))
        same(model, wanted, 1e-9 if target.dtype == "float64" else 1e-4)
        np.testing.assert_allclose(model.loss_curve_, wanted.loss_curve_, rtol=1e-4)


@pytest.mark.parametrize("kind", ["warm start", "parts"])
def test_warm_starts_and_parts_are_the_peers_on_every_backend(kind, target):
    """They seed the order of rows anew; parts keep the moments, a warm start does not."""
    params = {**PARAMS, "warm_start": kind == "warm start", "max_iter": 3}
    x, weights = X.astype(target.dtype), np.linspace(0.5, 2.0, len(X))
    peer, model = PeerClassifier(**params), MLPClassifier(**params)
    with target.scope():
        data = target.array(X), target.array(Y.astype(np.int32))
        for _ in range(3):
            if kind == "parts":
                peer.partial_fit(x, Y, weights, [0, 1, 2])
                model.partial_fit(*data, weights, [0, 1, 2])
            else:
                peer.fit(x, Y)
                model.fit(*data)
    single = target.dtype == "float32"
    same(model, peer, 1e-5 if single else 1e-12)
    np.testing.assert_allclose(model.loss_curve_, peer.loss_curve_, rtol=1e-4 if single else 1e-9)
    assert (model.t_, model.n_iter_) == (peer.t_, peer.n_iter_)


def test_what_is_told_and_drawn_on_every_backend(target, capsys):
    with target.scope():
        model = classifier(verbose=True).fit(target.array(X), target.array(Y.astype(np.int32)))
    told = [
        float(loss) for loss in re.findall(r"Iteration \d+, loss = (\S+)", capsys.readouterr().out)
    ]
    np.testing.assert_allclose(told, model.loss_curve_, atol=1e-7)
    pytest.importorskip("matplotlib")
    display = LossCurveDisplay.from_estimator(model)
    np.testing.assert_array_equal(display.lines_[0].get_ydata(), model.loss_curve_)


@pytest.mark.parametrize("early_stopping", [False, True])
def test_validation_rows_of_ones_own_on_every_backend(early_stopping, target):
    without_argmax(target)
    params = {"early_stopping": early_stopping, "max_iter": 12, "dtype": target.dtype}
    weights = np.random.RandomState(0).uniform(0.5, 2.0, len(X_VAL))
    rows = {"y_val": Y_VAL, "sample_weight_val": weights}
    wanted = classifier(**params).fit(X, Y, X_val=X_VAL, **rows)
    with target.scope():
        model = classifier(**params).fit(target.array(X), Y, X_val=target.array(X_VAL), **rows)
        tol = 1e-9 if target.dtype == "float64" else 1e-4
        same(model, wanted, tol)
        np.testing.assert_allclose(model.validation_scores_, wanted.validation_scores_)
        np.testing.assert_allclose(
            model.validation_loss_curve_, wanted.validation_loss_curve_, rtol=tol
        )


def test_initial_weights_activations_and_continuation_on_every_backend(target):
    wanted = classifier(dtype=target.dtype, activation="tanh").fit(X, Y)
    tol = 1e-9 if target.dtype == "float64" else 1e-4
    with target.scope():
        there, y = target.array(X), target.array(Y.astype(np.int32))
        model = classifier(activation="tanh").init_model(there, y)
        assert type(model.coefs_[0]) is type(there)
        model.continue_fit(there, y, n_iter=2).continue_fit(there, y)
        same(model, wanted, tol)
        h = model.hidden_activations(there, 0)
        assert type(h) is type(there)
        np.testing.assert_allclose(to_host(h), wanted.hidden_activations(X, 0), atol=10 * tol)


def test_callbacks_on_every_backend(target):
    with target.scope():
        stops = StopsAfter(2)
        model = classifier(callbacks=[stops]).fit(target.array(X), Y)
        assert model.n_iter_ == 2
        same(model, classifier(max_iter=2, dtype=target.dtype).fit(X, Y), 1e-4)
        assert all(type(p) is type(model.coefs_[0]) for p in stops.params)


@pytest.mark.parametrize("kind", ["csr", "csc"])
def test_sparse_rows_on_every_backend(kind, target):
    scipy_sparse = pytest.importorskip("scipy.sparse")
    if target.name.startswith("numpy"):
        return  # below
    S = getattr(scipy_sparse, f"{kind}_array")(np.where(X > 0.5, X, 0.0))
    named = target.name if target.name in ("torch", "jax", "cupy") else None
    if named is None:
        pytest.skip("sparse rows are NumPy's; a backend by name moves them")
    model = classifier(backend=named).fit(S, Y)
    same(model, classifier().fit(S.toarray(), Y), 1e-9)
    np.testing.assert_allclose(
        model.predict_proba(S), classifier().fit(S, Y).predict_proba(S), atol=1e-9
    )
    with pytest.raises(ValueError, match="takes sparse X on NumPy only"):
        classifier(backend=named, solver="lbfgs").fit(S, Y)


# ---------------------------------------------------------------- oracles


@pytest.mark.parametrize("class_weight", [{0: 2.0, 1: 0.5, 2: 1.0}, "balanced"])
def test_class_weights_are_sample_weights(class_weight):
    weights = np.random.RandomState(0).uniform(0.5, 2.0, len(X))
    by_class = compute_sample_weight(class_weight, Y)
    model = classifier(class_weight=class_weight)
    same(model.fit(X, Y), classifier().fit(X, Y, by_class))
    same(model.fit(X, Y, weights), classifier().fit(X, Y, weights * by_class))


def test_class_weights_by_label_and_in_partial_fit():
    names = np.array(["a", "b", "c"])[Y]
    weights = {"a": 3.0, "b": 1.0, "c": 0.1}
    model = classifier(class_weight=weights)
    by_class = compute_sample_weight(weights, names)
    same(model.partial_fit(X, names, classes=["a", "b", "c"]),
         classifier().partial_fit(X, names, by_class, ["a", "b", "c"]))  # fmt: skip
    balanced = classifier(class_weight="balanced")
    assert not hasattr(balanced, "partial_fit")
    with pytest.raises(ValueError, match="'balanced' needs all rows at once"):
        balanced.partial_fit(X, Y, classes=[0, 1, 2])
    with pytest.raises(ValueError, match="not in class_weight"):
        classifier(class_weight={0: 1.0, 7: 1.0}).fit(X, Y)


def test_weight_decay_is_that_of_the_optimizer():
    same(classifier(weight_decay=0.3, solver="adamw").fit(X, Y),
         classifier(solver=AdamW(weight_decay=0.3)).fit(X, Y))  # fmt: skip
    decayed = classifier(weight_decay=0.3, solver="sgd", momentum=0.0, alpha=0.0)
    same(decayed.fit(X, Y), clone(decayed).set_params(
        weight_decay=None, solver=SGD(weight_decay=0.3)).fit(X, Y))  # fmt: skip
    with pytest.raises(ValueError, match="weight_decay is for a solver given by name"):
        classifier(solver=Adam(), weight_decay=0.1).fit(X, Y)


def test_a_function_as_loss():
    Xr, yr = make_regression(80, 5, random_state=0)
    params = {"hidden_layer_sizes": (6,), "max_iter": 8, "random_state": 0}
    default = MLPRegressor(**params).fit(Xr, yr / 100)
    model = MLPRegressor(halved, **params).fit(Xr, yr / 100)
    same(model, default, 1e-12)
    np.testing.assert_allclose(model.loss_curve_, default.loss_curve_, rtol=1e-12)
    check_loss(squared, np.random.RandomState(0).standard_normal((6, 3)), Y[:6])
    model = classifier(loss=squared, max_iter=200, learning_rate_init=0.01)
    assert model.fit(X, Y).score(X, Y) > 0.9
    with pytest.raises(ValueError, match="label_smoothing is for the cross-entropy"):
        classifier(loss=squared, label_smoothing=0.1).fit(X, Y)


def test_a_function_as_loss_that_asks_for_more_than_the_standard():
    """It runs as it is."""
    Xr, yr = make_regression(80, 5, random_state=0)

    def absolute(z, y, xp):
        d = z[:, 0] - y
        return np.abs(d), np.sign(d)[:, None]

    def standard(z, y, xp):
        d = z[:, 0] - y
        return xp.abs(d), xp.sign(d)[:, None]

    params = {"hidden_layer_sizes": (6,), "max_iter": 20, "random_state": 0}
    with pytest.warns(RuntimeWarning, match="runs eagerly.*does not support ufuncs"):
        model = MLPRegressor(absolute, **params).fit(Xr, yr)
    same(model, MLPRegressor(standard, **params).fit(Xr, yr), 1e-12)


def test_a_function_as_loss_that_returns_something_else():
    Xr, yr = make_regression(80, 5, random_state=0)

    def summed(z, y, xp):
        d = z[:, 0] - y
        return xp.sum(d * d), 2.0 * d[:, None]

    for loss in (summed, lambda z, y, xp: (0.0, z)):
        with pytest.raises(ValueError, match=r"shapes \(80,\) and \(80, 1\), not \(\) and"):
            MLPRegressor(loss).fit(Xr, yr)


def test_a_layer_with_parameters_of_its_own():
    check_layer(PReLU(8), X)
    model = classifier(activation=(PReLU(8), "tanh")).fit(X, Y)
    (slope,) = model.layer_params_
    assert slope.shape == (8,)
    assert not np.array_equal(slope, np.full(8, 0.25))
    # What it predicts is what the layers compute, one by one
    h = X @ model.coefs_[0] + model.intercepts_[0]
    h = np.where(h > 0, h, slope * h)
    np.testing.assert_allclose(model.hidden_activations(X, 0), h, rtol=1e-12)
    again = pickle.loads(pickle.dumps(model))
    assert np.array_equal(again.predict_proba(X), model.predict_proba(X))
    model.set_params(warm_start=True).fit(X, Y)
    assert not np.array_equal(model.layer_params_[0], slope)


def test_hidden_activations_are_the_layers_outputs():
    model = classifier(activation="tanh").fit(X, Y)
    h0 = np.tanh(X @ model.coefs_[0] + model.intercepts_[0])
    h1 = np.tanh(h0 @ model.coefs_[1] + model.intercepts_[1])
    for layer, wanted in ((0, h0), (-2, h0), (1, h1), (-1, h1)):
        np.testing.assert_allclose(model.hidden_activations(X, layer), wanted, rtol=1e-12)
    with pytest.raises(ValueError, match="there are 2 hidden layers, asked for was 2"):
        model.hidden_activations(X, 2)


def test_init_model_draws_what_fit_starts_from():
    model = classifier().init_model(X, Y)
    assert model.predict_proba(X).shape == (len(X), 3)
    assert (model.n_iter_, model.loss_curve_, model.t_) == (0, [], 0)
    # One step of nothing is the beginning, too
    still = classifier(max_iter=1, solver=SGD(), learning_rate_init=1e-300, alpha=0.0).fit(X, Y)
    same(model, still)
    same(model.continue_fit(X, Y), classifier().fit(X, Y))
    assert MLPRegressor(random_state=0).init_model(X, X[:, 0]).predict(X).shape == (len(X),)


# ---------------------------------------------------------------- validation


def test_validation_curves_are_those_of_the_model_after_each_epoch():
    weights = np.random.RandomState(0).uniform(0.5, 2.0, len(X_VAL))
    rows = {"X_val": X_VAL, "y_val": Y_VAL, "sample_weight_val": weights}
    model = classifier().fit(X, Y, **rows)
    for k in (1, 3, 6):
        after = classifier(max_iter=k).fit(X, Y)
        assert model.validation_scores_[k - 1] == after.score(X_VAL, Y_VAL, weights)
        wanted = log_loss(Y_VAL, after.predict_proba(X_VAL), sample_weight=weights)
        assert model.validation_loss_curve_[k - 1] == pytest.approx(wanted, rel=1e-12)
    same(model, classifier().fit(X, Y))  # watching changes nothing
    assert classifier().fit(X, Y).validation_loss_curve_ is None


@pytest.mark.parametrize("scoring", ["neg_log_loss", "balanced_accuracy", "f1_macro"])
def test_early_stopping_watches_the_scorer(scoring):
    model = classifier(early_stopping=True, scoring=scoring, max_iter=40, n_iter_no_change=5)
    model.fit(X, Y, X_val=X_VAL, y_val=Y_VAL)
    score = get_scorer(scoring)
    assert model.best_validation_score_ == max(model.validation_scores_)
    assert score(model, X_VAL, Y_VAL) == pytest.approx(model.best_validation_score_, rel=1e-12)
    first = classifier(max_iter=1).fit(X, Y)
    assert model.validation_scores_[0] == pytest.approx(score(first, X_VAL, Y_VAL), rel=1e-12)


def test_early_stopping_with_a_function_as_scorer():
    def margin(estimator, X, y):
        return -float(estimator.predict_proba(X)[:, 0].mean())

    model = classifier(early_stopping=True, scoring=margin).fit(X, Y, X_val=X_VAL, y_val=Y_VAL)
    assert model.best_validation_score_ == pytest.approx(margin(model, X_VAL, Y_VAL), rel=1e-12)


@pytest.mark.parametrize("scoring", [lambda model, X, y: model.score(X, y), "rand_score"])
def test_a_scorer_that_takes_no_weights_gets_none(scoring):
    weights = np.linspace(0.5, 2.0, len(X))
    model = classifier(early_stopping=True, scoring=scoring).fit(X, Y, weights)
    held = classifier(early_stopping=True).fit(X, Y, weights)
    assert len(model.validation_scores_) == 6
    if callable(scoring):
        assert model.validation_scores_ != held.validation_scores_  # those are weighted


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"X_val": X_VAL}, "X_val and y_val go together"),
        ({"X_val": X_VAL[:, :3], "y_val": Y_VAL}, "3 features"),
        (
            {"X_val": X_VAL, "y_val": Y_VAL + 1},
            r"^y_val: labels \[.*\] are not among the classes of y",
        ),
        ({"X_val": X_VAL, "y_val": Y_VAL[:-1]}, "inconsistent numbers"),
    ],
)
def test_bad_validation_rows(rows, message):
    with pytest.raises(ValueError, match=message):
        classifier().fit(X, Y, **rows)


@pytest.mark.parametrize("given", [{"scoring": "accuracy"}, {"weight_decay": 0.1}])
def test_lbfgs_refuses_what_it_cannot_take(given):
    with pytest.raises(ValueError, match="lbfgs' cannot take"):
        classifier(solver="lbfgs", **given).fit(X, Y)
    with pytest.raises(ValueError, match="lbfgs' cannot take X_val"):
        classifier(solver="lbfgs").fit(X, Y, X_val=X_VAL, y_val=Y_VAL)


# ---------------------------------------------------------------- callbacks


class StopsAfter(Callback):
    def __init__(self, n):
        self.n = n
        self.seen = []

    def on_fit_begin(self, max_epochs):
        self.seen.append(("begin", max_epochs))

    def on_epoch_begin(self, epoch):
        self.seen.append(("epoch", epoch))

    def on_epoch_end(self, epoch, params):
        self.seen.append((epoch.epoch, epoch.loss))
        self.params = params()
        return epoch.epoch >= self.n

    def on_fit_end(self):
        self.seen.append("end")


def test_callbacks_see_every_epoch_and_can_stop():
    watcher = StopsAfter(3)
    model = classifier(callbacks=[watcher]).fit(X, Y)
    losses = model.loss_curve_
    assert watcher.seen == [
        ("begin", 6), ("epoch", 1), (1, losses[0]), ("epoch", 2), (2, losses[1]),
        ("epoch", 3), (3, losses[2]), "end",
    ]  # fmt: skip
    same(model, classifier(max_iter=3).fit(X, Y))
    for mine, theirs in zip(watcher.params[::2], model.coefs_, strict=True):
        assert np.array_equal(mine, theirs)
        mine += 1.0  # copies: nothing happens to the model
    same(model, classifier(max_iter=3).fit(X, Y))


def test_callbacks_of_lbfgs():
    watcher = StopsAfter(3)
    model = classifier(solver="lbfgs", callbacks=[watcher], max_iter=50).fit(X, Y)
    assert model.n_iter_ == 3
    assert model.loss_ == pytest.approx(watcher.seen[-2][1])


def test_scikit_learns_own_callbacks(target):
    callback = pytest.importorskip("sklearn.callback")
    without_argmax(target)
    monitor = callback.ScoringMonitor(scoring="accuracy")
    model = classifier()
    model.set_callbacks(monitor)
    # Its metrics take arrays on a device by dispatch alone
    with target.scope(), config_context(array_api_dispatch=True):
        model.fit(target.array(X), target.array(Y.astype(np.int32)))
    scores = [scores["accuracy"] for *_, scores in monitor._log if "accuracy" in scores]
    wanted = [classifier(max_iter=k).fit(X, Y).score(X, Y) for k in range(1, 7)]
    assert scores[:6] == pytest.approx(wanted, rel=1e-6)  # torch: in float32
    same(model, classifier().fit(X, Y), 1e-9 if target.dtype == "float64" else 1e-4)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({0: -1, 1: 1, 2: 1}, "class_weight must be finite, also in sum, and not negative"),
        ({0: np.nan, 1: 1, 2: 1}, "class_weight must be finite"),
        ({0: 1e308, 1: 1e308, 2: 1}, "class_weight must be finite, also in sum"),
        ({0: 0, 1: 0, 2: 0}, "class_weight is zero for every row"),
    ],
)
@pytest.mark.parametrize("solver", ["adam", "lbfgs"])
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_class_weights_are_checked_as_sample_weights_are(weights, message, solver):
    with pytest.raises(ValueError, match=message):
        classifier(class_weight=weights, solver=solver).fit(X, Y)


def test_class_and_sample_weights_that_leave_nothing():
    model = classifier(class_weight={0: 0, 1: 1, 2: 1})
    with pytest.raises(ValueError, match="sample_weight times class_weight is zero for every row"):
        model.fit(X, Y, sample_weight=1.0 * (Y == 0))


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_weights_too_large_for_their_type():
    heavy = np.full(len(X), 1e38)
    classifier().fit(X, Y, sample_weight=heavy)
    with pytest.raises(ValueError, match="sample_weight must be finite, also in sum"):
        classifier(dtype="float32").fit(X, Y, sample_weight=heavy)
    with pytest.raises(ValueError, match="sample_weight times class_weight must be finite"):
        classifier(class_weight={0: 1e300, 1: 1e300, 2: 1}).fit(X, Y, sample_weight=1e12 * heavy)


def test_parts_without_weight_and_held_out_rows_without():
    model = classifier(class_weight={0: 1, 1: 0, 2: 1}, alpha=0.0)
    model.partial_fit(X, Y, classes=[0, 1, 2])
    model.partial_fit(X[Y == 1], Y[Y == 1])  # as a batch of such rows: no error
    assert model.loss_ == 0.0
    with pytest.raises(ValueError, match="class_weight of y_val is zero for every row"):
        model.fit(X, Y, X_val=X[Y == 1], y_val=Y[Y == 1])


class Hooks:
    """What a callback of scikit-learn's is told, by name."""

    def __init__(self):
        self.calls = []

    def setup(self, estimator, context):
        self.calls.append("setup")

    def on_fit_task_begin(self, estimator, context):
        pass

    def on_fit_task_end(self, estimator, context):
        pass

    def teardown(self, estimator, context):
        self.calls.append("teardown")


@pytest.mark.parametrize(
    ("method", "wanted"),
    [
        ("fit", ["setup", "teardown"]),
        ("continue_fit", ["setup", "teardown"]),
        ("partial_fit", []),  # as in scikit-learn: they are for whole fits
        ("init_model", []),
    ],
)
@pytest.mark.parametrize("kind", [MLPClassifier, MLPRegressor])
def test_scikit_learns_own_callbacks_are_set_up_and_torn_down(kind, method, wanted):
    pytest.importorskip("sklearn.callback")
    model = kind(hidden_layer_sizes=(3,), max_iter=2).set_callbacks(hooks := Hooks())
    known = {"classes": [0, 1, 2]} if (kind, method) == (MLPClassifier, "partial_fit") else {}
    getattr(model, method)(X, Y, **known)
    assert hooks.calls == wanted
    assert [name for name in vars(model) if "callback" in name] == ["callbacks", "_skl_callbacks"]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({}, "max_epochs"),
        ({"tol": 1e9, "n_iter_no_change": 2, "max_iter": 50}, "converged"),
        ({"callbacks": [StopsAfter(3)]}, "stopped"),
        ({"early_stopping": True, "solver": "sgd", "learning_rate_init": 1e150,
          "activation": "identity"}, "diverged"),
        ({"solver": "lbfgs"}, "max_epochs"),
        ({"solver": "lbfgs", "max_iter": 5000, "alpha": 1.0}, "converged"),
        ({"solver": "lbfgs", "callbacks": [StopsAfter(3)]}, "stopped"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_why_training_ended(settings, reason):
    model = classifier(**settings).fit(X, Y)
    assert model.stop_reason_ == reason
    if model.solver != "lbfgs":
        assert model.init_model(X, Y).stop_reason_ is None


# ---------------------------------------------------------------- names


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("solver", OPTIMIZERS)
def test_the_name_of_a_schedule_is_the_schedule(schedule, solver, recwarn):
    model = classifier(solver=solver, learning_rate=schedule).fit(X, Y)
    without = solver != "sgd" and schedule in ("invscaling", "adaptive")  # as in scikit-learn
    assert without == any("has no effect" in str(w.message) for w in recwarn)
    by_object = SCHEDULES["constant" if without else schedule]()
    same(model, classifier(solver=solver, learning_rate=by_object).fit(X, Y))


# ---------------------------------------------------------------- warnings


@pytest.mark.parametrize("around", ["nothing", "pipeline", "search"])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_iter": 1}, "Maximum iterations"),
        ({"max_iter": 1, "batch_size": 500}, "clipped"),
        ({"learning_rate": "adaptive"}, "no effect with solver"),
        ({"solver": "lbfgs", "early_stopping": True}, "no effect with solver"),
        ({"solver": "lbfgs", "max_iter": 1}, "lbfgs failed to converge"),
        (
            {"solver": "sgd", "learning_rate_init": 1e150, "early_stopping": True,
             "activation": "identity"},
            "best weights so far",
        ),
    ],
)  # fmt: skip
def test_warnings_point_at_the_line_that_called(settings, message, around):
    model = classifier(**settings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        {
            "nothing": model,
            "pipeline": make_pipeline(StandardScaler(), model),
            "search": GridSearchCV(model, {"alpha": [0.1]}, cv=2),
        }[around].fit(X, Y)
    found = [w for w in caught if message in str(w.message)]
    assert len(found) == (3 if around == "search" else 1)
    assert {w.filename for w in found} == {__file__}


def test_warnings_reach_code_without_a_module():
    scope = {"model": classifier(max_iter=1), "X": X, "Y": Y}
    with pytest.warns(ConvergenceWarning, match="Maximum iterations") as caught:
        exec("model.fit(X, Y)", scope)
    assert caught[0].filename == "<string>"


# ---------------------------------------------------------------- exact continuation


@pytest.mark.parametrize(
    "extra",
    [
        {}, {"solver": "sgd"}, {"dropout": 0.4}, {"shuffle": False}, {"learning_rate": Cosine(0.2)},
        {"learning_rate": ReduceOnPlateau(patience=0, threshold=0.5)},
        {"solver": "sgd", "learning_rate": "invscaling"},
        {"early_stopping": True, "validation_fraction": 0.3},
        {
            "early_stopping": True, "scoring": "neg_log_loss", "learning_rate_init": 0.1,
            "validation_fraction": 0.3,
        },
        {"random_state": None}, {"batch_size": 120}, {"class_weight": "balanced"},
    ],
    ids=str,
)  # fmt: skip
def test_n_and_m_epochs_are_n_plus_m_to_the_last_bit(extra):
    whole = classifier(max_iter=8, **{"n_iter_no_change": 100, **extra})
    parts = clone(whole)
    if "random_state" in extra:
        np.random.seed(5)
    whole.fit(X, Y)
    if "random_state" in extra:
        np.random.seed(5)
    parts.continue_fit(X, Y, n_iter=3)
    assert parts.n_iter_ == 3
    parts = pickle.loads(pickle.dumps(parts))
    parts.continue_fit(X, Y, n_iter=1).continue_fit(X, Y)
    same(parts, whole)
    assert parts.loss_curve_ == whole.loss_curve_
    assert parts.validation_scores_ == whole.validation_scores_
    assert parts.best_validation_score_ == whole.best_validation_score_
    assert (parts.n_iter_, parts.t_) == (8, whole.t_)
    assert np.array_equal(parts.predict_proba(X), whole.predict_proba(X))


@pytest.mark.slow
@pytest.mark.parametrize("change", [{"backend": "torch"}, {"backend": "jax"}, {"solver": "adamw"},
                                    {"dtype": "float32"}], ids=str)  # fmt: skip
def test_continuation_from_the_last_parameters_elsewhere(change):
    """Those after the last epoch, though the best ones are kept; the moments begin anew."""
    if "backend" in change:
        pytest.importorskip(change["backend"])
    early = {"early_stopping": True, "validation_fraction": 0.3, "learning_rate_init": 0.1}
    model = classifier(**early, max_iter=9).fit(X, Y)
    assert np.argmax(model.validation_scores_) < 8
    last = [w.copy() for w in model._state.last_params]
    assert np.abs(last[0] - model.coefs_[0]).max() > 0.01
    seen = []

    class First(Callback):
        def on_epoch_begin(self, epoch):
            seen.append(epoch)

    model.set_params(max_iter=10, learning_rate_init=1e-12, callbacks=[First()], **change)
    with pytest.warns(UserWarning, match="moments and the schedule start anew"):
        model.continue_fit(X, Y)
    assert seen == [10]
    for w, old in zip(model._state.last_params, last, strict=True):
        np.testing.assert_allclose(to_host(w), old, atol=1e-6)
        assert str(w.dtype).endswith(change.get("dtype", "float64"))


def test_after_lbfgs_nothing_is_left_of_earlier_epochs():
    model = classifier(early_stopping=True).fit(X, Y)
    model.set_params(solver="lbfgs", early_stopping=False).fit(X, Y)
    assert not hasattr(model, "loss_curve_")
    assert not hasattr(model, "validation_scores_")
    coefs = model.coefs_
    model.set_params(solver="adam", max_iter=1, learning_rate_init=1e-12)
    with pytest.warns(UserWarning, match="no state of training to go on with"):
        model.continue_fit(X, Y)
    np.testing.assert_allclose(model.coefs_[0], coefs[0], atol=1e-9)


def test_fit_then_continue():
    model = classifier(max_iter=3).fit(X, Y)
    model.set_params(max_iter=8).continue_fit(X, Y)
    same(model, classifier(max_iter=8).fit(X, Y))


def test_continuation_after_convergence_is_the_end():
    whole = classifier(max_iter=50, tol=1e9, n_iter_no_change=3).fit(X, Y)
    assert whole.n_iter_ == 5
    same(clone(whole).continue_fit(X, Y).continue_fit(X, Y), whole)


def test_what_cannot_be_continued():
    with pytest.raises(ValueError, match="n_iter must be at least 1, an integer, got 2.5"):
        classifier().continue_fit(X, Y, n_iter=2.5)
    with pytest.raises(ValueError, match="n_iter must be at least 1"):
        classifier().continue_fit(X, Y, n_iter=0)
    assert not hasattr(classifier(solver="lbfgs"), "continue_fit")
    assert not hasattr(classifier(solver="lbfgs"), "partial_fit")
    assert not hasattr(classifier(early_stopping=True), "partial_fit")
    with pytest.raises(ValueError, match="same layers"):
        classifier().fit(X, Y).set_params(hidden_layer_sizes=(3,)).continue_fit(X, Y)


# ---------------------------------------------------------------- sparse


@pytest.mark.parametrize("kind", ["csr_matrix", "csc_array", "coo_array"])
@pytest.mark.parametrize("extra", [{}, {"early_stopping": True}, {"dropout": 0.2}], ids=str)
def test_sparse_rows_give_the_dense_model(kind, extra):
    scipy_sparse = pytest.importorskip("scipy.sparse")
    dense = np.where(X > 0.5, X, 0.0)
    S = getattr(scipy_sparse, kind)(dense)
    weights = np.random.RandomState(0).uniform(0.5, 2.0, len(X))
    model = classifier(**extra).fit(S, Y, weights)
    same(model, classifier(**extra).fit(dense, Y, weights))
    assert np.array_equal(model.predict_proba(S), model.predict_proba(dense))
    assert np.array_equal(model.hidden_activations(S), model.hidden_activations(dense))
    assert model.score(S, Y) == model.score(dense, Y)


def test_sparse_rows_are_never_dense_as_a_whole(monkeypatch):
    scipy_sparse = pytest.importorskip("scipy.sparse")
    S = scipy_sparse.random_array((2000, 300), density=0.01, format="csr", random_state=0)
    y = (S[:, [0]].toarray()[:, 0] > 0).astype(int)
    largest = []
    original = scipy_sparse.csr_array.toarray

    def toarray(self, *args, **kwargs):
        largest.append(self.shape[0])
        return original(self, *args, **kwargs)

    monkeypatch.setattr(scipy_sparse.csr_array, "toarray", toarray)
    monkeypatch.setattr("portable_mlp.estimators.inference._CHUNK", 300 * 100)
    model = classifier(max_iter=1).fit(S, y)
    assert max(largest) == 32
    model.predict(S)
    assert max(largest) == 100
    largest.clear()
    classifier(max_iter=2, solver="lbfgs").fit(S, y)
    assert not largest


def test_sparse_lbfgs_is_dense_lbfgs():
    scipy_sparse = pytest.importorskip("scipy.sparse")
    dense = np.where(X > 0.5, X, 0.0)
    for dtype, tol in (("float64", 1e-7), ("float32", 1e-2)):
        params = {"solver": "lbfgs", "activation": "tanh", "max_iter": 20}
        model = classifier(**params).fit(scipy_sparse.csr_array(dense.astype(dtype)), Y)
        same(model, classifier(**params).fit(dense.astype(dtype), Y), tol)
        assert model.coefs_[0].dtype == dtype


# ---------------------------------------------------------------- pictures


def test_loss_curve_display():
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    model = classifier(early_stopping=True).fit(X, Y)
    ax = Figure().subplots()
    display = LossCurveDisplay.from_estimator(model, ax=ax)
    assert display.ax_ is ax
    assert display.figure_ is ax.figure
    drawn = [list(line.get_ydata()) for line in display.lines_]
    assert drawn == [model.loss_curve_, model.validation_loss_curve_, model.validation_scores_]
    plain = LossCurveDisplay.from_estimator(classifier().fit(X, Y), ax=Figure().subplots())
    assert len(plain.lines_) == 1
    assert plain.score_ax_ is None
    with pytest.raises(ValueError, match="no loss curve"):
        LossCurveDisplay.from_estimator(classifier(solver="lbfgs").fit(X, Y))
