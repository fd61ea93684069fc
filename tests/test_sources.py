"""Rows from anywhere: what a source of one's own gives is trained on, and on nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.targets import get_target
from scipy.sparse import csr_array
from sklearn.datasets import load_diabetes, load_iris

from portable_mlp import Callback, MLPClassifier, MLPRegressor
from portable_mlp.backends import to_host
from portable_mlp.sources import ArraySource, Source
from portable_mlp.steps import Batch

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")

X, Y = load_iris(return_X_y=True)
NAMES = np.array(["setosa", "versicolor", "virginica"])[Y]
WEIGHTS = np.random.RandomState(0).uniform(0.1, 2.0, len(X))
SETTINGS = {"hidden_layer_sizes": (6,), "max_iter": 5, "batch_size": 32, "random_state": 0}


class Reader(Source):
    """Rows that are read when they are asked for: so many batches together."""

    def __init__(self, x=X, y=NAMES, weights=None, together=1):
        self.arrays, self.together = (x, y, weights), together
        self.n_rows, self.order = x.shape[0], None
        self.epochs, self.reads = [], 0

    def begin(self, epoch, rng):
        self.epochs.append(epoch)
        if epoch == 0:
            self.order = np.arange(self.n_rows)
        if rng is not None:
            rng.shuffle(self.order)

    def parts(self, batch_size):
        size = batch_size * self.together
        for start in range(0, self.n_rows, size):
            self.reads += 1
            rows = self.order[start : start + size]
            yield tuple(None if a is None else a[rows] for a in self.arrays), None


def same(a, b, tol=0.0):
    for mine, theirs in zip(a.params_, b.params_, strict=True):
        np.testing.assert_allclose(to_host(mine), to_host(theirs), rtol=0, atol=tol)


CASES = {
    "labels": (MLPClassifier, {}, NAMES, None),
    "weights": (MLPClassifier, {"dropout": 0.2}, NAMES, WEIGHTS),
    "class weights": (MLPClassifier, {"class_weight": {"setosa": 2.0}}, NAMES, None),
    "several labels": (MLPClassifier, {}, np.eye(3, dtype=int)[Y], None),
    "two targets": (MLPRegressor, {"solver": "sgd"}, X[:, :2] * X[:, 2:], None),
    "not shuffled": (MLPRegressor, {"shuffle": False}, X[:, 0], WEIGHTS),
    "float32": (MLPRegressor, {"dtype": "float32"}, X[:, 0], None),
}


@pytest.mark.parametrize("together", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_the_model_is_that_of_the_arrays(case, together):
    kind, settings, y, weights = CASES[case]
    source = Reader(X, y, weights, together)
    got = kind(**SETTINGS | settings).fit(source)
    wanted = kind(**SETTINGS | settings).fit(X, y, weights)
    same(got, wanted)
    assert got.loss_curve_ == wanted.loss_curve_
    assert got.n_features_in_ == 4
    if kind is MLPClassifier:
        assert got.classes_.tolist() == wanted.classes_.tolist()
    assert source.epochs[-5:] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("name", ["numpy", "strict", "torch", "jax", "cupy-emulated"])
def test_on_every_backend(name, request):
    target = get_target(name, request)
    wanted = MLPClassifier(**SETTINGS).fit(X, Y)
    with target.scope():
        if name == "numpy":
            source, y = Reader(csr_array(X), Y), Y
        else:
            source, y = Reader(X, Y), Y
            source.arrays = target.array(X), Y, None
            source.parts = lambda size: (
                ((target.backend.xp.take(source.arrays[0], target.backend.indices(rows), axis=0),
                  y[rows]), None)
                for rows in np.split(source.order, range(size, len(y), size))
            )  # fmt: skip
        got = MLPClassifier(**SETTINGS).fit(source)
        same(got, wanted, 1e-10)


def test_an_order_of_one_s_own():
    """The rows come as the source says: here backwards in every other epoch."""

    class Turning(Reader):
        def begin(self, epoch, rng):
            self.order = np.arange(self.n_rows)[:: -1 if epoch % 2 else 1]

    got = MLPClassifier(**SETTINGS).fit(Turning())
    by_hand = MLPClassifier(**SETTINGS | {"shuffle": False, "max_iter": 1})
    by_hand.partial_fit(X, NAMES, classes=np.unique(NAMES))
    for epoch in range(1, 5):
        step = -1 if epoch % 2 else 1
        by_hand.partial_fit(X[::step], NAMES[::step])
    same(got, by_hand, 1e-14)


@pytest.mark.parametrize("middle", [False, True])
def test_goes_on_where_it_stopped(middle):
    class Stops(Callback):
        def on_epoch_end(self, epoch, params):
            return epoch.epoch == 2

    class Interrupts(Reader):
        def parts(self, batch_size):
            for i, part in enumerate(super().parts(batch_size)):
                if self.epochs[-1] == 2 and i == 2:
                    import signal

                    signal.raise_signal(signal.SIGINT)
                yield part

    whole = MLPClassifier(**SETTINGS).fit(Reader())
    first = MLPClassifier(**SETTINGS)
    if middle:
        with pytest.warns(UserWarning, match="interrupted"):
            first.fit(Interrupts())
        assert first._state.begun.steps > 0
        first.continue_fit(Reader())
    else:
        first.set_params(callbacks=[Stops()]).fit(Reader())
        first.set_params(callbacks=None).continue_fit(Reader())
    same(first, whole)


def test_validated_on_arrays():
    got = MLPClassifier(**SETTINGS, early_stopping=True).fit(
        Reader(), X_val=X[::3], y_val=NAMES[::3]
    )
    wanted = MLPClassifier(**SETTINGS, early_stopping=True)
    wanted.fit(X, NAMES, X_val=X[::3], y_val=NAMES[::3])
    assert got.validation_scores_ == wanted.validation_scores_
    same(got, wanted)


def test_one_part_at_a_time():
    """A source is read again in each epoch, and before training only for its first rows."""
    source = Reader(X, X[:, 0])
    MLPRegressor(**SETTINGS).fit(source)
    assert source.reads == 1 + 5 * 5


def changed(**how):
    class Changed(Reader):
        def parts(self, batch_size):
            for i, (data, rows) in enumerate(super().parts(batch_size)):
                yield how["change"](i, *data), rows

    return Changed


def nan_at(i, x, y, w):
    return (np.where(i == 2, np.nan, x), y, w)


@pytest.mark.parametrize(
    ("source", "settings", "words"),
    [
        (lambda: changed(change=nan_at)(), {}, "NaN"),
        (lambda: changed(change=lambda i, x, y, w: (x[:, : 4 - i], y, w))(), {}, "3 features"),
        (lambda: changed(change=lambda i, x, y, w: (x[:-1], y[:-1], w))(), {}, "no multiple of"),
        (lambda: changed(change=lambda i, x, y, w: (x, y[:-1], w))(), {}, "inconsistent numbers"),
        (
            lambda: changed(change=lambda i, x, y, w: (x, y, np.ones(len(x)) if i else w))(),
            {},
            "after",
        ),
        (lambda: changed(change=lambda i, x, y, w: (x, y, -np.ones(len(x))))(), {}, "not negative"),
        (lambda: Reader(X[:0], NAMES[:0]), {}, "a source without rows"),
        (Reader, {"solver": "lbfgs"}, "cannot take a source"),
        (Reader, {"early_stopping": True}, "needs X_val and y_val"),
        (Reader, {"class_weight": "balanced"}, "pass a dict"),
    ],
)
def test_what_cannot_be(source, settings, words):
    model = MLPClassifier(**SETTINGS | settings)
    with pytest.raises(ValueError, match=words):
        model.fit(source())
    assert not hasattr(model, "params_")


@pytest.mark.parametrize("n", [140, 160])
def test_other_rows_than_said(n):
    source = Reader()
    source.n_rows = n
    source.order = None
    original = source.begin

    def begin(epoch, rng):
        source.n_rows = 150
        original(epoch, rng)
        source.n_rows = n

    source.begin = begin
    source.parts = lambda size: (
        ((X[rows], NAMES[rows]), None) for rows in np.split(source.order, range(size, 150, size))
    )
    with pytest.raises(ValueError, match=f"Reader: says n_rows={n}, and gave"):
        MLPClassifier(**SETTINGS).fit(source)


def test_y_beside_a_source():
    for given in ({"y": NAMES}, {"sample_weight": WEIGHTS}):
        with pytest.raises(ValueError, match="brings y and the weights itself"):
            MLPClassifier(**SETTINGS).fit(Reader(), **given)
    with pytest.raises(ValueError, match="requires y to be passed"):
        MLPClassifier(**SETTINGS).fit(X)


def test_the_library_s_own_are_sources_for_estimators_too():
    D, T = load_diabetes(return_X_y=True)
    got = MLPRegressor(**SETTINGS).fit(ArraySource(Batch(D, T)))
    same(got, MLPRegressor(**SETTINGS).fit(D, T), 1e-12)
