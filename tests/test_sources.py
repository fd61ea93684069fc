"""Rows from anywhere: what a source of one's own gives is trained on, and on nothing else."""

from __future__ import annotations

import signal

import numpy as np
import pytest
from helpers.targets import get_target
from scipy.sparse import csr_array
from sklearn.datasets import load_diabetes, load_iris

from portable_mlp import Callback, MLPClassifier, MLPRegressor, mlp
from portable_mlp.backends import to_host
from portable_mlp.engines.base import RecordedEngine
from portable_mlp.losses import SquaredError
from portable_mlp.optimizers import AdamW
from portable_mlp.sources import ArraySource, MemberSource, Source, on_backend
from portable_mlp.steps import Batch
from portable_mlp.training import Trainer

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
        (lambda: Reader(X[:0], NAMES[:0]), {}, "n_rows: expected an integer above 0, got 0"),
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


class Chosen(Source):
    """One part that lies still, and row numbers that change."""

    def __init__(self, numbers=lambda order: order, n_rows=len(X)):
        self.numbers, self.n_rows = numbers, n_rows

    def begin(self, epoch, rng):
        if epoch == 0:
            self.order = np.arange(len(X))
        if rng is not None:
            rng.shuffle(self.order)

    def parts(self, batch_size):
        yield (X, NAMES), self.numbers(self.order)


KINDS = {"as they are": lambda o: o, "lists": list, "small": lambda o: o.astype(np.uint8)}


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_part_that_lies_still(kind):
    source = Chosen(KINDS[kind])
    same(MLPClassifier(**SETTINGS).fit(source), MLPClassifier(**SETTINGS).fit(X, NAMES))
    # Every fourth row alone, and a number of rows that NumPy has counted
    some = Chosen(lambda order: np.sort(order)[::4], np.int64(38))
    got = MLPClassifier(**SETTINGS, shuffle=False).fit(some)
    wanted = MLPClassifier(**SETTINGS, shuffle=False).fit(X[::4], NAMES[::4])
    same(got, wanted)
    assert type(got.t_) is int
    # Labels count among the classes though no row of theirs is named
    two = MLPClassifier(**SETTINGS).fit(Chosen(lambda order: np.sort(order)[:100], 100))
    assert two.classes_.tolist() == ["setosa", "versicolor", "virginica"]


@pytest.mark.parametrize("name", ["numpy", "torch", "jax", "cupy-emulated"])
@pytest.mark.parametrize(
    "numbers",
    [
        lambda o: o - 1, lambda o: o + 1, lambda o: o + 10**6, lambda o: o.astype(float),
        lambda o: o > -1, lambda o: o[:, None],
    ],
)  # fmt: skip
def test_rows_that_a_part_does_not_have(name, numbers, request):
    """Refused before an engine reads memory there; late ones, too."""
    target = get_target(name, request)
    late = Chosen()
    late.numbers = lambda order: numbers(order) if late.epoch == 4 else order
    begin = late.begin

    def counted(epoch, rng):
        late.epoch = epoch
        begin(epoch, rng)

    late.begin = counted
    for source in (Chosen(numbers), late):
        model = MLPClassifier(**SETTINGS, backend=None)
        if name != "numpy":
            model.set_params(backend=target.backend.name)
        if name == "cupy-emulated":
            model.set_params(device="gpu", backend=None)
        with pytest.raises(ValueError, match="have to be numbers from 0 to 149"):
            model.fit(source)
        assert not hasattr(model, "params_")


@pytest.mark.parametrize("n_rows", [0, -3, 150.0, "150", True, None])
def test_a_number_of_rows_that_is_none(n_rows):
    with pytest.raises(ValueError, match="Chosen.n_rows: expected an integer above 0"):
        MLPClassifier(**SETTINGS).fit(Chosen(n_rows=n_rows))


@pytest.mark.parametrize(
    "part", [(X, NAMES), ((X, NAMES, None), None, None), None, (X, None), ((X,), None)]
)
def test_parts_of_another_form(part):
    source = Chosen()
    source.parts = lambda batch_size: iter([part])
    with pytest.raises(ValueError, match=r"Chosen: parts\(\) has to yield pairs"):
        MLPClassifier(**SETTINGS).fit(source)


def test_empty_parts_are_left_out_and_lists_are_taken():
    class Halting(Reader):
        def parts(self, batch_size):
            nothing = (X[:0], NAMES[:0], None), None
            yield nothing
            for (x, y, w), rows in super().parts(batch_size):
                yield (x.tolist(), list(y), w), rows
                yield nothing

    same(MLPClassifier(**SETTINGS).fit(Halting()), MLPClassifier(**SETTINGS).fit(X, NAMES))


def test_parts_that_can_be_read_once():
    once = Chosen()
    kept = iter([((X, NAMES), None)])
    once.parts = lambda batch_size: kept
    once.targets = lambda batch_size: NAMES
    with pytest.raises(ValueError, match="has to begin anew each time that it is called"):
        MLPClassifier(**SETTINGS).fit(once)


def test_targets_of_other_shapes_in_a_later_part():
    wide = changed(change=lambda i, x, y, w: (x, np.stack([y, y], 1) if i else y, w))
    with pytest.raises(ValueError, match=r"of shapes \(n, "):
        MLPRegressor(**SETTINGS).fit(wide(X, X[:, 0]))


@pytest.mark.parametrize("weights", [{"setosa": 50.0}, {"setosa": 0.0}])
def test_class_weights_of_classes_that_are_not_in_each_part(weights):
    """Sorted rows: a part has one class or two."""
    settings = SETTINGS | {"class_weight": weights, "shuffle": False}
    wanted = MLPClassifier(**settings).fit(X, NAMES)
    same(MLPClassifier(**settings).fit(Reader()), wanted)
    parts = MLPClassifier(**settings | {"max_iter": 1}).partial_fit(X, NAMES, None, wanted.classes_)
    parts.partial_fit(X[100:], NAMES[100:])


def test_weights_may_be_zero_in_a_part():
    weights = np.r_[np.zeros(64), np.ones(86)]
    settings = SETTINGS | {"shuffle": False}
    got = MLPClassifier(**settings).fit(Reader(weights=weights))
    same(got, MLPClassifier(**settings).fit(X, NAMES, weights))


def test_without_shuffling_there_is_no_generator():
    seen = []

    class Noting(Reader):
        def begin(self, epoch, rng):
            seen.append(rng)
            super().begin(epoch, rng)

    MLPRegressor(**SETTINGS, shuffle=False).fit(Noting(X, X[:, 0]))
    assert seen == [None] * 6


def test_a_source_where_rows_are_wanted():
    model = MLPClassifier(**SETTINGS).fit(X, NAMES)
    for call in (
        model.predict, lambda source: model.score(source, NAMES),
        lambda source: model.fit(X, NAMES, X_val=source, y_val=NAMES),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="a Source is what fit and continue_fit take"):
            call(Reader())


# ---------------------------------------------------------------- rows of each member


def trained(target, network, params, source, seed=None):
    """The parameters on the host after three epochs in batches of 8, by AdamW."""
    trainer = Trainer(
        network, SquaredError(), AdamW(weight_decay=0.1), target.backend, target.dtype, 0.02,
        batch_size=8, shuffle=seed is not None,
    )  # fmt: skip
    state = trainer.start(params)
    trainer.fit(state, source, 3, np.random.RandomState(seed))
    return [target.backend.to_host(p) for p in trainer.params(state.arrays.leaves)]


@pytest.mark.parametrize("weighted", [False, True])
def test_members_train_on_rows_of_their_own(weighted, target, monkeypatch):
    """Each member ends where a single network does that trains on its rows alone."""
    monkeypatch.setattr(RecordedEngine, "EAGER", 0)
    k, n, d = 3, 21, 4
    rng = np.random.RandomState(0)
    x, y = rng.standard_normal((40, d)), rng.standard_normal((40, 2))
    weights = rng.uniform(0.5, 2.0, 40) if weighted else None
    rows = [rng.permutation(40)[:n] for _ in range(k)]
    network = mlp([d, 6, 2], "tanh", members=k)
    params = network.init(rng)
    backend, dtype = target.backend, target.dtype
    with target.scope():
        data = on_backend(x, y, weights, backend, dtype)
        got = trained(target, network, params, MemberSource(data, rows, n))
        for i, own in enumerate(rows):
            alone = on_backend(x[own], y[own], None if weights is None else weights[own],
                               backend, dtype)  # fmt: skip
            single = mlp([d, 6, 2], "tanh")
            begin = [p[i].reshape(q.shape) for p, q in zip(params, single.params, strict=True)]
            wanted = trained(target, single, begin, ArraySource(alone))
            for g, w in zip(got, wanted, strict=True):
                np.testing.assert_allclose(g[i].reshape(w.shape), w, rtol=1e3 * target.tol,
                                           atol=10 * target.tol)  # fmt: skip


def test_members_see_all_their_rows_in_a_new_order():
    rows = [np.arange(10), np.arange(10, 14), np.arange(20, 50)]
    source = MemberSource(Batch(np.zeros((50, 1)), np.zeros(50)), rows, 12)
    rng = np.random.RandomState(0)
    seen = []
    for epoch in range(20):
        source.begin(epoch, rng)
        ((_, order),) = source.parts(4)
        seen.append(order.copy())
        assert order.shape == (3, 12)
        for start in (0, 4, 8):  # four rows, three times in an epoch
            assert set(order[1, start : start + 4]) == set(rows[1])
        assert set(order[0, :10]) == set(rows[0])
        assert len(set(order[2])) == 12
    for own, each in zip(rows, np.stack(seen, 1), strict=True):
        assert set(each.ravel()) == set(own)
    assert (seen[0] != seen[1]).any()
    source.begin(0, None)
    ((_, order),) = source.parts(4)
    np.testing.assert_array_equal(order[1], np.tile(rows[1], 3))
