"""JAX's engine: what is compiled, and how often."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from helpers.steps import case, hyper_of

from portable_mlp import MLPClassifier, MLPRegressor, get_backend
from portable_mlp.engines import Engine, Task, jax_scan
from portable_mlp.losses import SquaredError
from portable_mlp.optimizers import Adam

pytest.importorskip("jax")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning"),
    pytest.mark.filterwarnings("ignore:Got .batch_size. less than 1 or larger"),
]


@pytest.fixture
def traced(monkeypatch):
    """The number of rows in each step that was compiled."""
    rows = []

    def step(recipe, arrays, batch, hyper, original=jax_scan.step):
        rows.append(batch.x.shape[0])
        return original(recipe, arrays, batch, hyper)

    monkeypatch.setattr(jax_scan, "step", step)
    jax_scan._loop.cache_clear()
    yield rows
    jax_scan._loop.cache_clear()


@pytest.mark.parametrize(
    ("batch_size", "compiled"), [(60, [60]), (100, [60]), (30, [30]), (25, [25, 10])]
)
def test_a_grid_search_compiles_once_per_architecture_and_batch_shape(
    traced, batch_size, compiled, rng
):
    X, y = rng.standard_normal((60, 4)), rng.standard_normal(60)
    grid = product([0.01, 0.1], [1e-4, 1e-2], [0.5, 0.9], [1, 5, 40], [3, 10])
    for rate, alpha, momentum, n_epochs, patience in grid:
        MLPRegressor(
            hidden_layer_sizes=(5,), solver="sgd", learning_rate_init=rate, alpha=alpha,
            momentum=momentum, max_iter=n_epochs, n_iter_no_change=patience,
            batch_size=batch_size, backend="jax", random_state=0,
        ).fit(X, y)  # fmt: skip
    assert traced == compiled
    wider = MLPRegressor(hidden_layer_sizes=(6,), max_iter=2, batch_size=batch_size, backend="jax")
    wider.fit(X, y)
    assert traced == 2 * compiled
    # Another task, the same number of rows
    MLPClassifier((5,), max_iter=2, batch_size=batch_size, backend="jax").fit(X, y > 0)
    assert traced == 3 * compiled


@pytest.mark.parametrize(("seconds", "one_by_one"), [(0.0, True), (1e9, False)])
@pytest.mark.parametrize(("batch_size", "n_steps"), [(12, 7), (5, 3), (4, 3)])
def test_the_length_of_a_piece_changes_nothing(
    batch_size, n_steps, seconds, one_by_one, monkeypatch
):
    """Between two pieces it is asked whether to stop."""
    monkeypatch.setattr(jax_scan.ScanEngine, "SECONDS", seconds)
    order = None if batch_size == 12 else np.random.RandomState(1).permutation(12)
    outcomes = []
    for backend, kind in (
        (get_backend("cpu", "jax"), jax_scan.ScanEngine),
        (get_backend(), Engine),
    ):
        trainer, arrays, batch = case(SquaredError(), Adam(), backend=backend, alpha=0.1)
        hypers = [hyper_of(trainer, i + 1) for i in range(n_steps)]
        engine, asked = kind(backend, trainer.recipe), []
        task = Task(batch, order, batch_size, hypers, lambda asked=asked: asked.append(1))
        with backend.scope("float64"):
            for _ in range(2):  # the first time its pace is not known
                asked.clear()
                arrays, values = engine.run(arrays, task)
            outcomes.append(
                [np.asarray(values), *map(backend.to_host, trainer.params(arrays.leaves))]
            )
        if kind is jax_scan.ScanEngine:
            short = n_steps * batch_size > 12 and batch_size < 12  # a program of its own
            assert len(asked) == (n_steps - 1 if one_by_one else short)
    for got, wanted in zip(*outcomes, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-12, atol=1e-14)


def test_it_stops_between_two_pieces(monkeypatch):
    monkeypatch.setattr(jax_scan.ScanEngine, "SECONDS", 0.0)
    backend = get_backend("cpu", "jax")
    trainer, arrays, batch = case(SquaredError(), Adam(), backend=backend)
    engine = jax_scan.ScanEngine(backend, trainer.recipe)
    hypers = [hyper_of(trainer, i + 1) for i in range(6)]
    stops = iter([False, True])
    with backend.scope("float64"):
        _, values = engine.run(arrays, Task(batch, None, 2, hypers, stops.__next__, first=1))
    assert len(values) == 2
