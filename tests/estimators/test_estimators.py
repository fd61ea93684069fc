"""The estimators: scikit-learn's model, every backend, every input, every error."""

from __future__ import annotations

import pickle
import signal
import subprocess
import sys
import threading
import tracemalloc
import warnings
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
from helpers.targets import TARGETS, get_target
from scipy.sparse import csr_array
from sklearn.base import clone
from sklearn.datasets import (
    load_iris,
    make_classification,
    make_multilabel_classification,
    make_regression,
)
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import GridSearchCV
from sklearn.neural_network import MLPRegressor as PeerRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from portable_mlp import Callback, DivergenceError, MLPClassifier, MLPRegressor
from portable_mlp.activations import ELU
from portable_mlp.backends import to_host
from portable_mlp.callbacks import Progress
from portable_mlp.engines import ENGINES
from portable_mlp.engines.base import RecordedEngine
from portable_mlp.losses import BinaryCrossEntropy, Quantile, SoftmaxCrossEntropy, SquaredError
from portable_mlp.optimizers import SGD
from portable_mlp.schedules import Cosine, ReduceOnPlateau, Step
from portable_mlp.sources import ArraySource

pytestmark = [
    pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning"),
    # scikit-learn 1.7's own call of SciPy's L-BFGS
    pytest.mark.filterwarnings("ignore:scipy.optimize. The `disp`:DeprecationWarning"),
]

RNG = np.random.RandomState(0)
TASKS = {
    "binary": make_classification(120, 8, random_state=0),
    "multiclass": make_classification(120, 8, n_classes=3, n_informative=5, random_state=0),
    "multilabel": make_multilabel_classification(120, 8, n_classes=3, random_state=0),
    "regression": make_regression(120, 8, noise=1.0, random_state=0),
    "multioutput": make_regression(120, 8, n_targets=3, noise=1.0, random_state=0),
    "poisson": (RNG.standard_normal((120, 8)), RNG.poisson(2.0, 120).astype(float)),
}


def data(task):
    X, y = TASKS[task]
    return X, y / 100.0 if task in ("regression", "multioutput") else y


def estimator(task, **params):
    params = {"hidden_layer_sizes": (10, 6), "max_iter": 20, "random_state": 3, **params}
    if task in ("binary", "multiclass", "multilabel"):
        return MLPClassifier(**params)
    return MLPRegressor("poisson" if task == "poisson" else "squared_error", **params)


@pytest.mark.parametrize("task", TASKS)
def test_fit_and_predict_follow_the_arrays(task, target):
    """An array in, the same kind of array out, on its device; the same model as on NumPy."""
    if target.name == "strict-no_x64" and task == "multiclass":
        pytest.skip("array_api_strict's argmax makes an int64 that its no_x64 device refuses")
    X, y = data(task)
    wanted = estimator(task, activation="tanh", dtype=target.dtype).fit(X, y)
    with target.scope():
        there = target.array(X)
        model = estimator(task, activation="tanh").fit(there, target.array(y))
        for p in model.coefs_ + model.intercepts_:
            assert type(p) is type(there)
            assert p.device == there.device
        predicted = model.predict(there)
        assert type(predicted) is type(there)
        assert predicted.device == there.device
        tol = 1e-9 if target.dtype == "float64" else 1e-4
        for mine, theirs in zip(model.coefs_, wanted.coefs_, strict=True):
            np.testing.assert_allclose(
                target.backend.to_host(mine), theirs, rtol=0, atol=tol * np.abs(theirs).max()
            )
        host = target.backend.to_host(predicted)
        np.testing.assert_allclose(host, wanted.predict(X), rtol=1e3 * tol, atol=1e3 * tol)
        assert isinstance(model.score(there, target.array(y)), float)
        if hasattr(model, "predict_proba"):
            p = target.backend.to_host(model.predict_proba(there))
            np.testing.assert_allclose(p, wanted.predict_proba(X), atol=10 * tol)
            log_p = target.backend.to_host(model.predict_log_proba(there))
            np.testing.assert_allclose(np.exp(log_p), p, atol=10 * tol)


@pytest.mark.parametrize("backend", ["torch", "jax", "cupy"])
def test_backend_named_numpy_in_numpy_out(backend, request):
    """Row three of the documentation's table: computed elsewhere, all comes back as NumPy."""
    get_target(backend, request)
    X, y = data("multiclass")
    wanted = MLPClassifier(max_iter=5, random_state=0).fit(X, y)
    model = MLPClassifier(max_iter=5, random_state=0, backend=backend).fit(X, y)
    for mine, theirs in zip(model.coefs_, wanted.coefs_, strict=True):
        assert type(mine) is np.ndarray
        assert mine.flags.writeable
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-9)
    assert type(model.predict(X)) is np.ndarray


@pytest.fixture
def computed(monkeypatch):
    """The engines that ran, and the types of the arrays they ran on."""
    seen = set()
    for engine in ENGINES.values():

        def run(self, arrays, *args, original=engine.run):
            seen.add((self.name, type(arrays.leaves[0])))
            return original(self, arrays, *args)

        monkeypatch.setattr(engine, "run", run)
    return seen


def test_device_cpu_computes_on_numpy_whatever_comes_in(computed):
    """Row five: another backend given than X's; coefs_ and predictions come back to X's."""
    torch = pytest.importorskip("torch")
    X, y = data("binary")
    model = MLPRegressor(device="cpu", max_iter=1).fit(torch.tensor(X), y)
    assert computed == {("replay", np.ndarray)}
    assert all(isinstance(w, torch.Tensor) for w in model.coefs_)
    assert isinstance(model.predict(torch.tensor(X)), torch.Tensor)


def test_a_fit_computes_in_the_namespace_of_x(target, computed):
    X, y = data("regression")
    with target.scope():
        there = target.array(X)
        MLPRegressor(max_iter=1).fit(there, target.array(y))
    assert computed == {(target.backend.engine, type(there))}


@pytest.mark.parametrize("name", ["torch", "jax"])
def test_string_labels_come_back_as_numpy(name, request):
    target = get_target(name, request)
    X, y = load_iris(return_X_y=True)
    labels = np.array(["setosa", "versicolor", "virginica"])[y]
    with target.scope():
        model = MLPClassifier(max_iter=3).fit(target.array(X), labels)
        predicted = model.predict(target.array(X))
    assert type(predicted) is np.ndarray
    assert set(predicted) <= set(labels)


@pytest.mark.parametrize(
    "form",
    ["list", "integers", "F-order", "strided", "read-only", "float32"],
)
def test_any_form_of_input_gives_the_same_model(form):
    X, y = data("multiclass")
    X = np.round(4 * X)
    forms = {
        "list": X.tolist(),
        "integers": X.astype(int),
        "F-order": np.asfortranarray(X),
        "strided": np.repeat(X, 2, axis=0)[::2],
        "read-only": X.copy(),
        "float32": X.astype(np.float32),
    }
    given = forms[form]
    if form == "read-only":
        given.flags.writeable = False
    before = np.array(given, copy=True)
    params = {"max_iter": 5, "random_state": 0, "dtype": "float64"}
    wanted = MLPClassifier(**params).fit(X, y)
    model = MLPClassifier(**params).fit(given, y)
    assert np.array_equal(before, np.asarray(given))
    for a, b in zip(model.coefs_, wanted.coefs_, strict=True):
        # BLAS may sum in another order where the memory lies otherwise
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-13)
    assert np.array_equal(model.predict(given), wanted.predict(X))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_dtype_follows_x_throughout(dtype):
    X, y = data("binary")
    model = MLPClassifier(max_iter=3).fit(X.astype(dtype), y)
    assert {p.dtype for p in model.coefs_ + model.intercepts_} == {np.dtype(dtype)}
    assert model.predict_proba(X.astype(dtype)).dtype == dtype


# ---------------------------------------------------------------- what is added


def test_quantile_regression_finds_the_quantile():
    rng = np.random.RandomState(0)
    X = rng.uniform(-1, 1, (2000, 1))
    y = X[:, 0] + rng.uniform(0, 1, 2000)
    model = MLPRegressor(Quantile(0.9), (), learning_rate_init=0.01, random_state=0).fit(X, y)
    # ± four standard deviations of a binomial share
    assert np.mean(y < model.predict(X)) == pytest.approx(0.9, abs=4 * np.sqrt(0.09 / 2000))
    assert model.coefs_[0][0, 0] == pytest.approx(1.0, abs=0.1)


def test_partial_fit_spreads_a_schedule_over_max_iter_calls():
    X, y = data("binary")
    whole = MLPClassifier(max_iter=4, random_state=0, learning_rate=Cosine(), batch_size=20)
    parts = clone(whole)
    whole.fit(X, y)
    for _ in range(6):
        parts.partial_fit(X, y, classes=[0, 1])
    rates = [epoch.learning_rate for epoch in parts._state.history]
    assert rates[:4] == [epoch.learning_rate for epoch in whole._state.history]
    assert rates[4:] == [0.0, 0.0]


def test_schedules_work_with_adam():
    X, y = data("binary")
    model = MLPClassifier(learning_rate=Step(every=1, gamma=0.0), max_iter=3, random_state=0)
    once = clone(model).set_params(max_iter=1).fit(X, y)
    assert np.array_equal(model.fit(X, y).coefs_[0], once.coefs_[0])


# ---------------------------------------------------------------- scikit-learn's machinery


def test_clone_pickle_pipeline_and_grid_search(tmp_path):
    X, y = data("multiclass")
    model = MLPClassifier(max_iter=10, random_state=0, learning_rate=Cosine()).fit(X, y)
    fresh = clone(model)
    assert not hasattr(fresh, "coefs_")
    assert fresh.get_params() == model.get_params()
    again = pickle.loads(pickle.dumps(model))
    assert np.array_equal(again.predict_proba(X), model.predict_proba(X))
    grid = GridSearchCV(
        make_pipeline(StandardScaler(), MLPClassifier(max_iter=60, random_state=0)),
        {"mlpclassifier__hidden_layer_sizes": [(2,), (16,)], "mlpclassifier__dropout": [0, 0.2]},
        cv=2,
    ).fit(X, y)
    assert grid.score(X, y) > 0.6


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torch", "jax"])
def test_pickle_crosses_processes(name, request, tmp_path):
    target = get_target(name, request)
    X, y = data("binary")
    with target.scope():
        # Float32: JAX itself unpickles float64 as float32 unless x64 is on
        there = target.backend.asarray(X, "float32")
        model = MLPClassifier(max_iter=3, random_state=0).fit(there, y)
        wanted = target.backend.to_host(model.predict_proba(there))
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(model))
    np.save(tmp_path / "X.npy", X)
    code = (
        "import numpy as np, pickle, sys; m = pickle.load(open(sys.argv[1] + '/model.pkl', 'rb'));"
        "np.save(sys.argv[1] + '/p.npy', m.predict_proba(np.load(sys.argv[1] + '/X.npy')))"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    np.testing.assert_allclose(np.load(tmp_path / "p.npy"), wanted, rtol=1e-6)


def test_two_threads_predict_as_one():
    X, y = data("multiclass")
    model = MLPClassifier((64, 64), max_iter=5, random_state=0).fit(X, y)
    big = np.random.RandomState(0).standard_normal((20_000, X.shape[1]))
    wanted = [model.predict_proba(big), model.predict_proba(-big)]
    got: dict[int, list[np.ndarray]] = {0: [], 1: []}
    barrier = threading.Barrier(2)

    def work(which):
        barrier.wait()
        for _ in range(5):
            got[which].append(model.predict_proba(-big if which else big))

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for which in (0, 1):
        assert len(got[which]) == 5
        assert all(np.array_equal(p, wanted[which]) for p in got[which])


def test_fit_in_a_thread_that_gets_no_signals():
    X, y = data("binary")
    model = MLPClassifier(max_iter=3, random_state=0)
    failures = []

    def work():
        import warnings

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model.fit(X, y)
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failures
    assert model.n_iter_ == 3


def test_prediction_in_chunks_is_the_same(monkeypatch):
    X, y = data("multiclass")
    model = MLPClassifier((20,), max_iter=5, random_state=0).fit(X, y)
    whole = model.predict_proba(X)
    monkeypatch.setattr("portable_mlp.estimators.inference._CHUNK", 20 * 7)
    np.testing.assert_allclose(model.predict_proba(X), whole, rtol=1e-14)


def test_progress_counts_the_epochs_of_its_own_fit(capsys, monkeypatch):
    """A callback may be used for several fits; each epoch takes a second here."""
    X, y = data("binary")
    progress = Progress(full=True)
    model = MLPClassifier(max_iter=2, tol=0, random_state=0, callbacks=[progress]).fit(X, y)
    model.set_params(max_iter=4)

    def on_epoch_end(epoch, params, original=progress.on_epoch_end):
        original(epoch._replace(seconds=float(epoch.epoch - 2)), params)

    monkeypatch.setattr(progress, "on_epoch_end", on_epoch_end)
    capsys.readouterr()
    model.continue_fit(X, y)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-3:] for line in lines] == [
        ["1.00/s", "0:00:01", "left"], ["1.00/s", "0:00:00", "left"]
    ]  # fmt: skip


def test_verbose_prints_a_line_an_epoch(capsys):
    X, y = data("binary")
    MLPClassifier(max_iter=3, verbose=True, early_stopping=True, random_state=0).fit(X, y)
    out = capsys.readouterr().out
    assert out.count("Iteration") == 3
    assert out.count("Validation score") == 3


# ---------------------------------------------------------------- bad input, bad days

BAD_PARAMETERS = [
    ({"activation": "rleu"}, "unknown activation 'rleu'. Did you mean 'relu'"),
    ({"activation": ("relu", "relu")}, "one for each of the 1 hidden layers, got 2"),
    ({"solver": "adan"}, "unknown solver 'adan'. Did you mean 'adam'"),
    ({"learning_rate": "adaptve"}, "unknown learning_rate 'adaptve'. Did you mean 'adaptive'"),
    ({"alpha": -1.0}, "'alpha' parameter"),
    ({"alpha": float("nan")}, "'alpha' parameter"),
    ({"learning_rate_init": float("nan")}, "'learning_rate_init' parameter"),
    ({"learning_rate_init": -0.1}, "'learning_rate_init' parameter"),
    ({"dropout": 1.0}, "'dropout' parameter"),
    ({"label_smoothing": -0.1}, "'label_smoothing' parameter"),
    ({"clip_norm": 0.0}, "'clip_norm' parameter"),
    ({"dtype": "float16"}, "'dtype' parameter"),
    ({"hidden_layer_sizes": (4, 0)}, r"hidden_layer_sizes must be > 0, got \[4, 0\]"),
    ({"device": "cuda"}, "unknown device 'cuda'; known: cpu, gpu, auto"),
    ({"backend": "tensorflow"}, "unknown backend 'tensorflow'"),
    ({"solver": "lbfgs", "dropout": 0.5}, "solver='lbfgs' cannot take dropout"),
    ({"solver": "lbfgs", "learning_rate": Cosine()}, "solver='lbfgs' cannot take a schedule"),
    ({"solver": "lbfgs", "learning_rate": "cosine"}, "solver='lbfgs' cannot take a schedule"),
]


def fitted():
    X, y = data("multiclass")
    return MLPClassifier(max_iter=2, random_state=0).fit(X, y), X, y


def assert_unchanged(model, before):
    now = vars(model)
    assert now.keys() == before.keys()
    for name, value in before.items():
        assert now[name] is value or now[name] == value, name


@pytest.mark.parametrize(("params", "message"), BAD_PARAMETERS, ids=str)
def test_bad_parameters(params, message):
    model, X, y = fitted()
    model.set_params(**params)
    before, weights = dict(vars(model)), [w.copy() for w in model.coefs_]
    with pytest.raises(ValueError, match=message):
        model.fit(X, y)
    assert_unchanged(model, before)
    assert all(np.array_equal(a, b) for a, b in zip(model.coefs_, weights, strict=True))


def with_value(X, value):
    X = X.copy()
    X[3, 2] = value
    return X


BAD_DATA = {
    "NaN": (lambda X, y: (with_value(X, np.nan), y), "NaN"),
    "infinity": (lambda X, y: (with_value(X, np.inf), y), "infinity"),
    "one dimension": (lambda X, y: (X[:, 0], y), "2D array"),
    "no rows": (lambda X, y: (X[:0], y[:0]), "0 sample"),
    "no columns": (lambda X, y: (X[:, :0], y), "0 feature"),
    "lengths": (lambda X, y: (X, y[:-1]), r"inconsistent numbers of samples"),
    "objects": (lambda X, y: (np.array([[object()] * 8] * 120), y), "float"),
    "complex": (lambda X, y: (X + 1j, y), "[Cc]omplex data not supported"),
    "continuous labels": (lambda X, y: (X, X[:, 0]), "Unknown label type: continuous"),
    "NaN labels": (lambda X, y: (X, np.where(y == 0, np.nan, y)), "NaN"),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data_before_any_training(name):
    make, message = BAD_DATA[name]
    model, X, y = fitted()
    before = dict(vars(model))
    with pytest.raises((ValueError, TypeError), match=message):
        model.fit(*make(X, y))
    assert_unchanged(model, before)


BAD_ARRAYS = {
    "NaN": (lambda X: with_value(X, np.nan), "NaN or infinity"),
    "one dimension": (lambda X: X[:, 0], "expected a 2-D array, got 1"),
    "no rows": (lambda X: X[:0], r"shape \(0, 8\)"),
    "width": (lambda X: X[:, :5], "X has 5 features, but MLPClassifier is expecting 8"),
}


@pytest.mark.parametrize("name", BAD_ARRAYS)
@pytest.mark.parametrize("library", [t for t in TARGETS if not t.startswith("numpy")])
def test_bad_device_arrays(name, library, request):
    target = get_target(library, request)
    make, message = BAD_ARRAYS[name]
    X, y = data("multiclass")
    with target.scope():
        model = MLPClassifier(max_iter=1).fit(target.array(X), y)
        with pytest.raises(ValueError, match=message):
            model.predict(target.array(make(X)))


def test_width_at_predict_names_expected_and_got():
    model, X, _ = fitted()
    with pytest.raises(ValueError, match="X has 5 features, but MLPClassifier is expecting 8"):
        model.predict(X[:, :5])


def test_unseen_labels():
    model, X, y = fitted()
    with pytest.raises(ValueError, match="`y` has classes not in `self.classes_`"):
        model.partial_fit(X, y + 1)
    model.set_params(warm_start=True)
    with pytest.raises(ValueError, match="same classes as in the previous call to fit"):
        model.fit(X, y + 1)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (np.zeros(120), "zero for every row"),
        (-np.ones(120), "not negative"),
        (np.full(120, np.nan), "finite"),
        (np.ones(119), r"expected shape \(120,\), got \(119,\)"),
    ],
)
def test_bad_weights(weights, message):
    X, y = data("binary")
    with pytest.raises(ValueError, match=message):
        MLPClassifier().fit(X, y, sample_weight=weights)


def test_diverging_fit_raises_and_leaves_the_model():
    model, X, y = fitted()
    model.set_params(solver="sgd", learning_rate_init=1e12, max_iter=50)
    before = dict(vars(model))
    with pytest.raises(DivergenceError, match="non-finite parameter weights.*Epoch"):
        model.fit(X * 1e6, y)
    assert_unchanged(model, before)


def test_negative_counts_for_poisson():
    X, y = data("regression")
    with pytest.raises(ValueError, match="must not be negative for loss='poisson'"):
        MLPRegressor("poisson").fit(X, y)


def test_continuing_with_other_layers():
    model, X, y = fitted()
    model.set_params(warm_start=True, hidden_layer_sizes=(3,))
    with pytest.raises(ValueError, match="continuing needs the same layers"):
        model.fit(X, y)


def test_not_converged_says_so():
    X, y = data("binary")
    with pytest.warns(ConvergenceWarning, match=r"Maximum iterations \(2\) reached"):
        MLPClassifier(max_iter=2).fit(X, y)


# ---------------------------------------------------------------- continuing, and odd cases


def test_one_class_is_predicted(target):
    X = np.random.RandomState(0).standard_normal((30, 4))
    with target.scope():
        there = target.array(X)
        model = MLPClassifier(max_iter=3, random_state=0).fit(there, np.full(30, 7))
        assert set(to_host(model.predict(there)).tolist()) == {7}
        assert model.score(there, np.full(30, 7)) == 1.0


@pytest.mark.slow
def test_labels_too_large_for_the_namespace_come_back_as_numpy(request):
    target = get_target("jax", request)
    X, y = data("multiclass")
    large = y.astype(np.int64) + 3_000_000_000
    model = MLPClassifier(max_iter=3, random_state=0)
    wanted = model.fit(X.astype(np.float32), large).predict(X.astype(np.float32))
    there = target.backend.asarray(X, "float32")
    assert np.array_equal(to_host(clone(model).fit(there, large).predict(there)), wanted)


def test_integers_on_a_device_are_computed_in_float64(request):
    target = get_target("torch", request)
    X, y = data("binary")
    whole = np.round(4 * X).astype(np.int64)
    model = MLPClassifier(max_iter=3, random_state=0).fit(target.array(whole), y)
    wanted = MLPClassifier(max_iter=3, random_state=0).fit(whole, y)
    assert str(model.coefs_[0].dtype) == "torch.float64"
    np.testing.assert_allclose(to_host(model.coefs_[0]), wanted.coefs_[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("solver", ["sgd", "adam"])
def test_failed_partial_fit_leaves_no_trace(solver):
    X, y = data("multiclass")
    params = {"random_state": 0, "solver": solver, "batch_size": 20}
    hurt, well = (MLPClassifier(**params).partial_fit(X, y, classes=[0, 1, 2]) for _ in "12")
    with pytest.raises(DivergenceError):
        hurt.set_params(learning_rate_init=1e308).partial_fit(X, y)
    hurt.set_params(learning_rate_init=1e-3)
    for model in (hurt, well):
        model.partial_fit(X, y)
    assert np.array_equal(hurt.coefs_[0], well.coefs_[0])


@pytest.mark.parametrize("first", [True, False])
def test_switching_early_stopping_forgets_the_other_measure(first):
    X, y = data("multiclass")
    model = MLPClassifier(warm_start=True, early_stopping=first, max_iter=15, random_state=0)
    model.fit(X, y).set_params(early_stopping=not first, n_iter_no_change=3).fit(X, y)
    assert model.n_iter_ > 4
    if first:
        assert model.best_loss_ == min(model.loss_curve_[-model.n_iter_ :])
    else:
        assert model.best_validation_score_ == np.nanmax(model.validation_scores_)


@pytest.mark.parametrize("hidden", [(5,), (5, 3, 2), (4, 3)])
def test_warm_start_with_other_layers(hidden):
    X, y = data("multiclass")
    model = MLPClassifier((5, 3), max_iter=2, warm_start=True, random_state=0).fit(X, y)
    with pytest.raises(ValueError, match="continuing needs the same layers"):
        model.set_params(hidden_layer_sizes=hidden).fit(X, y)


def test_predict_uses_the_layers_that_were_fitted():
    model, X, _ = fitted()
    wanted = model.predict_proba(X)
    assert np.array_equal(model.set_params(hidden_layer_sizes=(7, 7)).predict_proba(X), wanted)


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {"solver": "sgd"},
        {"backend": "jax"},
        {"backend": "torch"},
        {"learning_rate": ReduceOnPlateau()},
    ],
)
def test_partial_fit_after_a_change_says_that_moments_start_anew(change, request):
    if "backend" in change:
        get_target(change["backend"], request)
    X, y = data("multiclass")
    model = MLPClassifier(random_state=0).partial_fit(X, y, classes=[0, 1, 2])
    with pytest.warns(UserWarning, match="moments and the schedule start anew"):
        model.set_params(**change).partial_fit(X, y)
    assert len(model.loss_curve_) == 2


def test_reduce_on_plateau_gets_its_chance_before_training_stops():
    X, y = data("binary")
    model = MLPClassifier(
        learning_rate=ReduceOnPlateau(), learning_rate_init=1e-7, max_iter=100, random_state=0
    ).fit(X, y)
    rates = {epoch.learning_rate for epoch in model._state.history}
    np.testing.assert_allclose(sorted(rates), [1e-11, 1e-10, 1e-9, 1e-8, 1e-7])
    assert model.n_iter_ < 100


@pytest.mark.parametrize("loss", [SoftmaxCrossEntropy(), BinaryCrossEntropy()])
def test_regressor_refuses_losses_for_labels(loss):
    X, y = data("regression")
    with pytest.raises(ValueError, match="is for labels: use MLPClassifier"):
        MLPRegressor(loss).fit(X, y)


@dataclass(frozen=True)
class PressesCtrlC(SquaredError):
    """Sends the signal once, when told to."""

    due: ClassVar[list[bool]] = []

    def per_row(self, z, y, xp):
        if self.due:
            self.due.pop()
            signal.raise_signal(signal.SIGINT)
        return super().per_row(z, y, xp)


def test_ctrl_c_leaves_a_model_that_predicts():
    X, y = data("regression")
    PressesCtrlC.due.append(True)
    model = MLPRegressor(PressesCtrlC(), batch_size=30, max_iter=1000, random_state=0)
    with pytest.warns(UserWarning, match="Training interrupted by user"):
        model.fit(X, y)
    assert (model.t_, model.stop_reason_) == (30, "interrupted")
    assert np.isfinite(model.predict(X)).all()


def test_moments_that_start_anew_start_at_step_one():
    """Adam's bias correction counts from when its moments were zero."""
    X, y = data("binary")
    model = MLPClassifier(random_state=0, tol=0).partial_fit(X, y, classes=[0, 1])
    for _ in range(5):
        model.partial_fit(X, y)
    weights = model.coefs_[0]
    with pytest.warns(UserWarning, match="moments and the schedule start anew"):
        model.set_params(solver="adamw").partial_fit(X, y)
    # The first step of Adam moves every weight with a gradient by about the rate
    assert np.median(np.abs(model.coefs_[0] - weights)) == pytest.approx(1e-3, rel=0.02)


def test_second_ctrl_c_raises_and_leaves_the_model():
    @dataclass(frozen=True)
    class Twice(SquaredError):
        def per_row(self, z, y, xp):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            return super().per_row(z, y, xp)

    X, y = data("regression")
    model = MLPRegressor(max_iter=2, random_state=0).fit(X, y)
    before = dict(vars(model.set_params(loss=Twice())))
    with pytest.raises(KeyboardInterrupt):
        model.fit(X, y)
    assert_unchanged(model, before)


@pytest.mark.parametrize("values", [["2020-01-01", "NaT"], ["1", "2"]])
def test_what_is_no_number_is_refused(values):
    other = np.array(values * 10, dtype="U" if values[0] == "1" else "datetime64[ns]")
    x = np.arange(20.0)[:, None]
    with pytest.raises(ValueError, match="X: numbers are expected, got dtype"):
        MLPClassifier(max_iter=1).fit(other[:, None], np.arange(20) % 2)
    with pytest.raises(ValueError, match="y: numbers are expected, got dtype"):
        MLPRegressor(max_iter=1).fit(x, other)


@pytest.mark.parametrize("kind", ["pandas", "polars"])
def test_frames_of_dates_are_refused(kind):
    library = pytest.importorskip(kind)
    dates = np.array(["2020-01-01", "2021-01-01"] * 10, dtype="datetime64[ns]")
    frame = library.DataFrame({"number": np.arange(20.0), "date": dates})
    with pytest.raises(ValueError, match=r"X: numbers are expected, got dtype [dD]atetime"):
        MLPClassifier(max_iter=1).fit(frame, np.arange(20) % 2)
    with pytest.raises(ValueError, match=r"y: numbers are expected, got dtype [dD]atetime"):
        MLPRegressor(max_iter=1).fit(np.arange(20.0)[:, None], frame["date"])


def test_sparse_tensors_are_refused():
    torch = pytest.importorskip("torch")
    with pytest.raises(ValueError, match="X: sparse tensors are not supported"):
        MLPClassifier(max_iter=1).fit(torch.eye(4).to_sparse(), [0, 1, 0, 1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"callbacks": [1]}, "callbacks: expected instances of Callback, got 1"),
        ({"callbacks": [Callback]}, "callbacks: expected instances of Callback, got <class"),
        ({"activation": None}, "unknown activation None. Known: identity"),
        ({"loss": "log_loss"}, "unknown loss 'log_loss'. Expected: an instance of Loss"),
        ({"hidden_layer_sizes": True}, "hidden_layer_sizes must be > 0, got"),
    ],
)
def test_settings_of_the_wrong_kind_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        MLPClassifier(**settings).fit(np.eye(4), [0, 1, 0, 1])


@pytest.fixture
def trained_on(monkeypatch):
    """The arrays X that training took its rows from."""
    seen = []

    class Spying(ArraySource):
        def __init__(self, data, rows=None):
            seen.append(data.x)
            super().__init__(data, rows)

    monkeypatch.setattr("portable_mlp.estimators.fitting.ArraySource", Spying)
    return seen


POINTERS = {
    "numpy": lambda a: a.ctypes.data,
    "torch": lambda a: a.data_ptr(),
    "torch-cuda": lambda a: a.data_ptr(),
    "jax": lambda a: a.unsafe_buffer_pointer(),
    "jax-cuda": lambda a: a.unsafe_buffer_pointer(),
    "cupy": lambda a: a.data.ptr,
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("early_stopping", [False, True])
@pytest.mark.parametrize("name", POINTERS)
def test_rows_are_not_copied_where_they_are(name, early_stopping, dtype, trained_on, request):
    backend = get_target(name, request).backend
    X, y = data("binary")
    with backend.scope(dtype):
        there = backend.asarray(X, dtype, copy=True)
        MLPClassifier(max_iter=2, early_stopping=early_stopping, n_iter_no_change=5).fit(there, y)
        (used,) = trained_on
        assert POINTERS[name](used) == POINTERS[name](there)
        # The planted twin: another data type is a copy
        other = {"float32": "float64", "float64": "float32"}[dtype]
        if name.startswith("jax"):
            return  # which has no float64 outside of such a scope
        MLPClassifier(max_iter=2, dtype=other).fit(there, y)
        assert POINTERS[name](trained_on[1]) != POINTERS[name](there)


@pytest.mark.parametrize("name", ["torch", "jax", "torch-cuda", "jax-cuda", "cupy"])
def test_rows_from_elsewhere_are_copied_once(name, trained_on, request, monkeypatch):
    backend = get_target(name, request).backend
    X, y = data("binary")
    copies = []
    kind = type(backend)

    def asarray(self, x, dtype=None, *, copy=None, original=kind.asarray):
        if type(x) is np.ndarray and x.shape == X.shape:
            copies.append(x)
        return original(self, x, dtype, copy=copy)

    monkeypatch.setattr(kind, "asarray", asarray)
    device = "gpu" if "cuda" in name or name == "cupy" else "cpu"
    model = MLPClassifier(max_iter=3, backend=name.split("-")[0], device=device).fit(X, y)
    assert len(copies) == len(trained_on) == 1
    assert model.n_iter_ == 3


# ---------------------------------------------------------------- what is asked in other words


def test_activations_in_an_array():
    X, y = data("binary")
    params = {"hidden_layer_sizes": (6, 5), "max_iter": 3, "random_state": 0}
    wanted = MLPClassifier(**params, activation=("tanh", "relu")).fit(X, y)
    model = MLPClassifier(**params, activation=np.array(["tanh", "relu"])).fit(X, y)
    assert np.array_equal(model.coefs_[0], wanted.coefs_[0])


def test_the_same_activation_for_each_layer_is_that_activation():
    """Its initial weights, too."""
    X, y = data("binary")
    params = {"hidden_layer_sizes": (6, 5), "max_iter": 3, "random_state": 0}
    wanted = MLPClassifier(**params, activation="logistic").fit(X, y)
    model = MLPClassifier(**params, activation=("logistic", "logistic")).fit(X, y)
    assert np.array_equal(model.coefs_[0], wanted.coefs_[0])


def test_callbacks_are_told_the_number_of_the_last_epoch():
    X, y = data("binary")
    told = []

    class Told(Callback):
        def on_fit_begin(self, max_epochs):
            told.append(max_epochs)

    parts = MLPClassifier(random_state=0, callbacks=[Told()])
    for _ in range(3):
        parts.partial_fit(X, y, classes=[0, 1])
    model = MLPClassifier(random_state=0, max_iter=7, callbacks=[Told()])
    model.continue_fit(X, y, n_iter=2).continue_fit(X, y)
    assert told == [1, 2, 3, 2, 7]


def test_a_callback_is_one():
    class Other:
        def on_epoch_end(self, epoch, params):
            return True

    X, y = data("binary")
    with pytest.raises(ValueError, match="callbacks: expected instances of Callback"):
        MLPClassifier(callbacks=[Other()]).fit(X, y)


@pytest.mark.parametrize("backend", [None, "torch"])
@pytest.mark.parametrize(
    "extra",
    [
        {"alpha": 1e-4, "learning_rate_init": 0.01, "beta_1": 0.8, "beta_2": 0.9, "epsilon": 1e-7},
        {"solver": "sgd", "momentum": 0.5, "learning_rate": "invscaling", "power_t": 0.5},
        {"solver": SGD(momentum=np.float64(0.5)), "learning_rate": Step(3, np.float64(0.5))},
        {"activation": ELU(np.float64(0.5)), "dropout": 0.25, "clip_norm": 0.5, "batch_size": 30},
        {"early_stopping": True, "validation_fraction": 0.25, "label_smoothing": 0.125},
    ],
    ids=lambda extra: ", ".join(extra),
)
def test_numbers_of_numpys_are_numbers(extra, backend):
    """As a search over `np.logspace` hands them in; they do not widen float32."""
    if backend:
        pytest.importorskip(backend)
    X, y = data("multiclass")
    params = {"hidden_layer_sizes": (6,), "max_iter": 20, "random_state": 0, "backend": backend}
    numbers = {k: v for k, v in extra.items() if type(v) in (int, float)}
    wanted = MLPClassifier(**params, **extra).fit(X.astype(np.float32), y)
    scalars = {k: np.asarray(v)[()] for k, v in numbers.items()}
    model = MLPClassifier(**params, **{**extra, **scalars}).fit(X.astype(np.float32), y)
    assert model.coefs_[0].dtype == np.float32
    assert np.array_equal(model.coefs_[0], wanted.coefs_[0])
    assert type(model.t_) is int
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RecordedEngine, "EAGER", 1000)
        eager = clone(model).fit(X.astype(np.float32), y)
    np.testing.assert_allclose(eager.coefs_[0], wanted.coefs_[0], rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_early_stopping_with_predictions_that_overflow():
    """Of e to the power of the outputs, which are finite."""
    r = np.random.RandomState(0)
    X, counts = r.randn(30, 3), r.poisson(1.5, 30)
    params = {
        "loss": "poisson", "hidden_layer_sizes": (3,), "activation": "identity", "solver": "sgd",
        "learning_rate_init": 0.1, "max_iter": 12, "early_stopping": True, "random_state": 1,
    }  # fmt: skip
    model, peer = MLPRegressor(**params).fit(X, counts), PeerRegressor(**params).fit(X, counts)
    assert model.best_validation_score_ == pytest.approx(peer.best_validation_score_, rel=1e-9)
    np.testing.assert_allclose(model.predict(X), peer.predict(X), rtol=1e-6)


def test_the_score_of_sparse_labels():
    X, y = data("binary")
    several = np.c_[y, 1 - y]
    model = MLPClassifier(max_iter=5, random_state=0).fit(X, several)
    assert model.score(X, csr_array(several)) == model.score(X, several)


def test_one_label_and_several_do_not_follow_each_other():
    X, y = data("multiclass")
    several = np.eye(3, dtype=int)[y]
    for first, then in ((y, several), (several, y)):
        model = MLPClassifier(max_iter=3, random_state=0).fit(X, first)
        with pytest.raises(ValueError, match="the model was fitted to (one|several) labels? a row"):
            model.partial_fit(X, then)
        np.testing.assert_array_equal(model.predict(X).shape, first.shape)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"early_stopping": True}], ids=["plain", "early"])
def test_a_memory_map_is_read_a_batch_at_a_time(settings, tmp_path):
    """A file of rows is never in memory as a whole, and the model is that of the array."""
    rng = np.random.default_rng(0)
    X = rng.standard_normal((60_000, 200), dtype=np.float32)
    y = rng.integers(3, size=len(X))
    np.save(tmp_path / "X.npy", X)
    there = np.load(tmp_path / "X.npy", mmap_mode="r")
    params = {"max_iter": 2, "batch_size": 500, "random_state": 0, **settings}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = MLPClassifier((16,), **params).fit(X, y)
        tracemalloc.start()
        model = MLPClassifier((16,), **params).fit(there, y)
        predicted = model.predict(there)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < X.nbytes / 4
    np.testing.assert_array_equal(predicted, wanted.predict(X))
    for a, b in zip(model.coefs_, wanted.coefs_, strict=True):
        np.testing.assert_array_equal(a, b)


def test_labels_that_cannot_be_learned_say_what_to_do(rng):
    X = rng.standard_normal((60, 3))
    names = np.array(["a", "b"] * 30)
    with pytest.raises(ValueError, match="Each of the 2 columns of y has classes of its own"):
        MLPClassifier(max_iter=2).fit(X, np.c_[np.arange(60) % 3, np.arange(60) % 3])
    with pytest.raises(ValueError, match="1 of 10 rows cannot have both classes. Increase"):
        MLPClassifier(max_iter=2, early_stopping=True).fit(X[:10], names[:10])
