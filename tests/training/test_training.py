"""The loop: order, batches, stopping, interruption, divergence."""

from __future__ import annotations

import signal
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from portable_mlp import DivergenceError, Network, mlp
from portable_mlp.backends import NumPyBackend
from portable_mlp.callbacks import Callback, Epoch
from portable_mlp.engines import ENGINES, Task
from portable_mlp.engines.base import RecordedEngine
from portable_mlp.engines.host.dialects import NumPyDialect
from portable_mlp.layers import Linear
from portable_mlp.losses import SquaredError
from portable_mlp.optimizers import SGD, AdamW, SklearnAdam
from portable_mlp.schedules import Adaptive, Clock, InverseScaling, OneCycle, ReduceOnPlateau
from portable_mlp.sources import ArraySource
from portable_mlp.steps import Batch
from portable_mlp.training import Trainer
from portable_mlp.training.pauses import deferred_interrupt

BACKEND = NumPyBackend()


def problem(n=50, d=4, seed=0):
    rng = np.random.RandomState(seed)
    x = rng.standard_normal((n, d))
    return x, x[:, :1] - 2 * x[:, 1:2]


def trainer(**settings):
    defaults = {"learning_rate": 0.01, "batch_size": 16, "tol": 0.0, "patience": np.inf}
    return Trainer(
        mlp([4, 8, 1], "tanh"), SquaredError(), SklearnAdam(), BACKEND, "float64",
        **{**defaults, **settings},
    )  # fmt: skip


def start(t, seed=1):
    return t.start(t.network.init(np.random.RandomState(seed)))


def source(x, y, rows=None):
    return ArraySource(Batch(x, y), rows)


@dataclass(frozen=True)
class Ends(SquaredError):
    """Reports the sum of the batch's first targets: which rows it saw."""

    def per_row(self, z, y, xp):
        values, dz = super().per_row(z, y, xp)
        return 0.0 * values + xp.reshape(y, (-1,)), dz


@pytest.mark.parametrize("engine", ["eager", "replay"])
def test_batches_cover_all_rows_once_in_order(engine, monkeypatch):
    x, _ = problem()
    y = np.arange(50.0)[:, None]
    monkeypatch.setattr(RecordedEngine, "EAGER", 0)
    order = np.random.RandomState(3).permutation(50)
    for rows in (None, np.arange(0, 50, 2)):
        given = np.arange(50) if rows is None else rows
        n = len(given)
        for permutation in (None, order if rows is None else np.argsort(order[:25])):
            wanted = given if permutation is None else given[permutation]
            t = replace(trainer(), loss=Ends(), learning_rate=0.0)
            run = ENGINES[engine](BACKEND, t.recipe)
            rows_of = ArraySource(Batch(x, y), rows)
            rows_of._order = permutation
            ((data, chosen),) = rows_of.parts(16)
            hypers = [t.hyper(Clock(0, 4, 0, 0), t.schedule.init())[0]] * 4
            task = Task(data, chosen, 16, hypers, lambda: False)
            _, values = run.run(start(t).arrays, task)
            means = [wanted[i : i + 16].mean() for i in range(0, n, 16)]
            np.testing.assert_allclose([v for v, _ in values], means, rtol=1e-12)


def test_reported_loss_is_the_mean_over_rows():
    """At learning rate ~0 the epoch's loss is that of all rows at once, short batch included."""
    x, y = problem()
    t = trainer(learning_rate=1e-30, alpha=0.0)
    state = start(t)
    params = [p.copy() for p in t.params(state.arrays.leaves)]
    t.fit(state, source(x, y), 1, np.random.RandomState(0))
    prediction = np.tanh(x @ params[0] + params[1]) @ params[2] + params[3]
    assert state.history[0].loss == pytest.approx(0.5 * np.mean((prediction - y) ** 2), rel=1e-12)


def test_full_batch_gradient_descent_by_hand():
    x, y = problem()
    t = trainer(batch_size=50)
    t = replace(t, optimizer=SGD(), network=mlp([4, 1]), learning_rate=0.1)
    state = start(t)
    w, b = [p.copy() for p in t.params(state.arrays.leaves)]
    t.fit(state, source(x, y), 30, np.random.RandomState(0))
    for _ in range(30):
        error = (x @ w + b - y) / len(x)
        w, b = w - 0.1 * x.T @ error, b - 0.1 * error.sum(0)
    got = t.params(state.arrays.leaves)
    np.testing.assert_allclose(got[0], w, rtol=1e-12)
    np.testing.assert_allclose(got[1], b, rtol=1e-12)


def test_start_copies_and_training_changes_no_input():
    x, y = problem()
    t = trainer()
    params = t.network.init(np.random.RandomState(0))
    before = [p.copy() for p in params] + [x.copy(), y.copy()]
    t.fit(t.start(params), source(x, y), 3, np.random.RandomState(0))
    for now, then in zip([*params, x, y], before, strict=True):
        assert np.array_equal(now, then)


def test_early_stopping_restores_the_best_weights():
    x, y = problem()
    scores = iter([1.0, 3.0, 2.0, 1.5, 1.0, 0.5])
    seen = []

    def validate(params):
        seen.append([p.copy() for p in params])
        return next(scores), 0.0

    t = trainer(patience=2)
    state = start(t)
    reason = t.fit(
        state, source(x, y), 6, np.random.RandomState(0), validate=validate, early_stopping=True
    )
    assert reason == "converged"
    assert [e.validation_score for e in state.history] == [1.0, 3.0, 2.0, 1.5, 1.0]
    for got, best in zip(t.params(state.final_leaves), seen[1], strict=True):
        assert np.array_equal(got, best)


def test_stops_when_the_loss_does():
    x, y = problem()
    t = trainer(tol=1e9, patience=3)
    state = start(t)
    assert t.fit(state, source(x, y), 100, np.random.RandomState(0)) == "converged"
    # The first epoch beats infinity, and then 3 + 1 do not improve
    assert len(state.history) == 5


def test_divergence_names_the_epoch_and_what_to_try():
    x, y = problem()
    t = replace(trainer(), optimizer=SGD(), learning_rate=1e6)
    with pytest.raises(DivergenceError, match=r"Epoch \d+, loss (nan|inf).*learning rate below"):
        t.fit(start(t), source(x, y), 100, np.random.RandomState(0))


def test_divergence_with_held_out_rows_warns_and_restores():
    x, y = problem()
    t = replace(trainer(), optimizer=SGD(), learning_rate=1e6)
    state = start(t)
    with pytest.warns(RuntimeWarning, match="training diverged"):
        reason = t.fit(
            state, source(x, y), 100, np.random.RandomState(0),
            validate=lambda p: (-1.0, 1.0), early_stopping=True,
        )  # fmt: skip
    assert reason == "diverged"
    assert np.isnan(state.history[-1].validation_score)
    assert all(np.isfinite(leaf).all() for leaf in state.final_leaves)


def test_clipping_keeps_a_run_that_diverges_without_it():
    x, y = problem()
    wild = replace(trainer(), optimizer=SGD(), learning_rate=100.0, network=mlp([4, 1]))
    with pytest.raises(DivergenceError):
        wild.fit(start(wild), source(x, y), 100, np.random.RandomState(0))
    tame = replace(wild, clip_norm=1e-5)
    state = start(tame)
    tame.fit(state, source(x, y), 100, np.random.RandomState(0))
    assert state.history[-1].loss < state.history[0].loss


def test_a_process_that_ignores_ctrl_c_is_not_interrupted():
    """A shell's background job is such a process."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with deferred_interrupt() as interrupted:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            assert not interrupted.is_set()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_handler_that_python_cannot_put_back_is_left_alone(monkeypatch):
    """That of a program that embeds Python, which ``getsignal`` tells as None."""
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(signal, "getsignal", lambda number: None)
    with deferred_interrupt() as interrupted:
        monkeypatch.undo()
        assert signal.getsignal(signal.SIGINT) is before
        assert not interrupted.is_set()


def test_ctrl_c_finishes_the_batch_and_leaves_a_usable_state(monkeypatch):
    """The signal comes in the middle of the third batch."""
    x, y = problem()
    t = trainer()
    state = start(t)
    calls = []

    def gather(self, x, rows, out, original=NumPyDialect.gather):
        calls.append(rows)
        if len(calls) == 5:
            signal.raise_signal(signal.SIGINT)
        return original(self, x, rows, out)

    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(RecordedEngine, "EAGER", 0)
        patch.setattr(NumPyDialect, "gather", gather)
        assert t.fit(state, source(x, y), 10, np.random.RandomState(0)) == "interrupted"
    assert signal.getsignal(signal.SIGINT) is before
    assert state.begun.steps == 3
    assert not state.history
    # The very parameters of a run that was asked for three batches
    same = start(t)
    order = np.random.RandomState(0)
    draw = np.arange(50)
    order.shuffle(draw)
    short = ArraySource(Batch(x, y), draw[:48])
    replace(t, shuffle=False).fit(same, short, 1, np.random.RandomState(0))
    for a, b in zip(state.arrays.leaves, same.arrays.leaves, strict=True):
        assert np.array_equal(a, b)


@pytest.fixture
def tasks(monkeypatch):
    """How many steps the engine was asked for at once."""
    asked = []

    def make(*arguments):
        task = Task(*arguments)
        asked.append(len(task.hypers))
        return task

    monkeypatch.setattr("portable_mlp.training.loop.Task", make)
    return asked


@pytest.mark.parametrize(
    ("settings", "n_epochs", "at_once"),
    [
        ({}, 40, [16, 16, 8]),
        ({"schedule": OneCycle(), "alpha": 0.1}, 40, [16, 16, 8]),
        ({"schedule": InverseScaling()}, 17, [16, 1]),
        # No epoch but the first one is progress: the next look is due when patience ends
        ({"tol": 1e9, "patience": 4}, 40, [5, 1]),
        ({"tol": 1e9, "patience": 4.5, "schedule": Adaptive()}, 20, [5, 1, 5, 5, 4]),
        # May lower the rate after any epoch
        ({"schedule": ReduceOnPlateau(patience=2, threshold=10.0)}, 5, [1] * 5),
    ],
)
def test_epochs_of_one_step_in_a_row_are_epochs_one_by_one(
    target, settings, n_epochs, at_once, tasks
):
    x, y = problem(n=12)
    network = mlp([4, 8, 1], "tanh", dropout=0.2)
    t = replace(trainer(batch_size=12, **settings), network=network, backend=target.backend)
    t = replace(t, dtype=target.dtype)
    outcomes = []
    for callbacks in ([], [Callback()]):
        tasks.clear()
        rng = np.random.RandomState(0)
        state = start(t)
        with target.scope():
            rows = ArraySource(Batch(target.array(x), target.array(y)))
        reason = t.fit(state, rows, n_epochs, rng, callbacks=callbacks)
        assert len(tasks) == (len(state.history) if callbacks else len(at_once))
        assert callbacks or tasks == at_once
        with target.scope():
            params = [target.backend.to_host(p) for p in t.params(state.final_leaves)]
        rates = [e.learning_rate for e in state.history]
        counts = state.steps, state.rows, state.epochs, state.done, state.stalled_for
        seen = reason, rates, counts, rng.randint(1000, size=5).tolist()
        outcomes.append((seen, [e.loss for e in state.history], *params))
    (seen, *got), (wanted_seen, *wanted) = outcomes
    assert seen == wanted_seen
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=target.tol, atol=target.tol)


@dataclass(frozen=True)
class Interrupting(SquaredError):
    """Presses Ctrl-C in a step that it is given the number of."""

    step: int = 0
    calls: list[int] = field(default_factory=list, compare=False)

    def per_row(self, z, y, xp):
        self.calls.append(1)
        if len(self.calls) == self.step:
            signal.raise_signal(signal.SIGINT)
        return super().per_row(z, y, xp)


@pytest.mark.parametrize("n_epochs", [10, 16, 32])
def test_ctrl_c_in_the_last_step_is_not_lost(n_epochs, monkeypatch):
    monkeypatch.setattr(NumPyBackend, "engine", "eager")
    x, y = problem()
    t = replace(trainer(batch_size=50), loss=Interrupting(n_epochs))
    state = start(t)
    assert t.fit(state, source(x, y), n_epochs, np.random.RandomState(0)) == "interrupted"
    assert state.epochs == n_epochs


def test_the_best_of_before_is_not_replaced_by_what_comes_in_a_row():
    """A state that keeps its best parameters, and goes on without held-out rows."""
    x, y = problem()
    t = replace(trainer(batch_size=50, learning_rate=3.0), optimizer=SGD(), network=mlp([4, 1]))
    outcomes = []
    for callbacks in ([], [Callback()]):
        state = start(t)
        t.fit(
            state, source(x, y), 1, np.random.RandomState(0), validate=lambda params: (1.0, 0.0),
            early_stopping=True,
        )  # fmt: skip
        state.done = 0
        t.fit(state, source(x, y), 16, np.random.RandomState(0), callbacks=callbacks)
        outcomes.append((state.best, state.final_leaves[0]))
    assert outcomes[0][0] == outcomes[1][0]
    np.testing.assert_array_equal(outcomes[0][1], outcomes[1][1])


def test_held_out_rows_are_scored_after_each_epoch_of_one_step():
    """Watched or not: the parameters of that epoch, not of a later one."""
    x, y = problem()
    t, scored = trainer(batch_size=50), []

    def validate(params):
        scored.append([p.copy() for p in params])
        return 0.0, 0.0

    state = start(t)
    t.fit(state, source(x, y), 5, np.random.RandomState(0), validate=validate)
    assert len(scored) == 5
    for n_epochs, got in enumerate(scored, 1):
        alone = start(t)
        t.fit(alone, source(x, y), n_epochs, np.random.RandomState(0))
        for a, b in zip(got, t.params(alone.final_leaves), strict=True):
            np.testing.assert_array_equal(a, b)


def test_an_epoch_of_one_step_that_is_begun_is_ended_and_not_done_again(monkeypatch):
    """Ctrl-C where somebody looks at each epoch; nobody does when it goes on."""
    monkeypatch.setattr(NumPyBackend, "engine", "eager")
    x, y = problem()
    t = replace(trainer(batch_size=50), loss=Interrupting(3))
    state, whole = start(t), start(t)
    rng = np.random.RandomState
    assert t.fit(state, source(x, y), 9, rng(0), callbacks=[Callback()]) == "interrupted"
    assert (state.epochs, state.begun.steps) == (2, 1)
    assert t.fit(state, source(x, y), 9, rng(0)) == "max_epochs"
    t.fit(whole, source(x, y), 9, rng(0))
    assert [e.loss for e in state.history] == [e.loss for e in whole.history]
    np.testing.assert_array_equal(state.final_leaves[0], whole.final_leaves[0])


def test_ctrl_c_among_epochs_of_one_step_counts_those_that_are_done(monkeypatch, tasks):
    monkeypatch.setattr(NumPyBackend, "engine", "eager")
    x, y = problem()
    t = replace(trainer(batch_size=50), loss=Interrupting(20))
    states = []
    for reasons in (["interrupted", "max_epochs"], ["max_epochs"]):
        state = start(t)
        for reason in reasons:
            rng = np.random.RandomState(0)
            assert t.fit(state, source(x, y), 30, rng) == reason
            assert state.epochs == len(state.history) == (20 if reason == "interrupted" else 30)
        states.append(state)
    assert tasks == [16, 14, 10, 16, 14]
    one, other = states
    assert [e.loss for e in one.history] == [e.loss for e in other.history]
    for a, b in zip(one.arrays.leaves, other.arrays.leaves, strict=True):
        np.testing.assert_array_equal(a, b)


def test_epochs_of_one_step_that_diverge_name_the_epoch():
    x, y = problem()
    wild = replace(trainer(batch_size=50), optimizer=SGD(), learning_rate=1e5)
    state = start(replace(wild, network=mlp([4, 1])))
    with pytest.raises(DivergenceError) as error:
        replace(wild, network=mlp([4, 1])).fit(state, source(x, y), 1000, np.random.RandomState(0))
    last = state.history[-1]
    assert f"Epoch {last.epoch}, loss {last.loss}" in str(error.value)
    assert not np.isfinite(last.loss)
    assert np.isfinite([e.loss for e in state.history[:-1]]).all()


class Impatient(Callback):
    def on_epoch_end(self, epoch: Epoch, params) -> None:
        if epoch.epoch == 2:
            raise KeyboardInterrupt


def test_interrupt_from_a_callback():
    x, y = problem()
    t = trainer()
    state = start(t)
    reason = t.fit(state, source(x, y), 10, np.random.RandomState(0), callbacks=[Impatient()])
    assert (reason, len(state.history)) == ("interrupted", 2)


def test_schedule_reaches_the_steps():
    x, y = problem()
    t = trainer(schedule=OneCycle(), learning_rate=0.04)
    state = start(t)
    t.fit(state, source(x, y), 10, np.random.RandomState(0))
    rates = [e.learning_rate for e in state.history]
    assert max(rates) == pytest.approx(0.04, rel=0.05)
    assert rates[-1] == pytest.approx(0.04 / 250_000, rel=1e-9)


def test_plateau_lowers_the_rate():
    x, y = problem()
    t = trainer(schedule=ReduceOnPlateau(gamma=0.5, patience=0, threshold=10.0))
    state = start(t)
    t.fit(state, source(x, y), 4, np.random.RandomState(0))
    assert [e.learning_rate for e in state.history] == [0.01, 0.01, 0.005, 0.0025]


def test_decay_without_biases_leaves_them_alone():
    """With a zero gradient AdamW only decays."""
    x, y = np.zeros((8, 4)), np.zeros((8, 1))
    decay = AdamW(weight_decay=0.5, decay_biases=False)
    t = replace(trainer(), optimizer=decay, network=mlp([4, 1]), learning_rate=0.1)
    state = t.start([np.ones((4, 1)), np.zeros(1)])
    t.fit(state, source(x, y), 1, np.random.RandomState(0))
    w, b = t.params(state.arrays.leaves)
    np.testing.assert_allclose(w, (1 - 0.1 * 0.5) * np.ones((4, 1)))
    assert b == 0.0


@pytest.mark.parametrize(
    ("engine", "packs"), [("eager", True), ("replay", False), ("replay", True)]
)
def test_packing_and_engine_change_nothing(engine, packs, monkeypatch):
    monkeypatch.setattr(RecordedEngine, "EAGER", 0)
    x, y = problem()
    runs = []
    for how in (("eager", False), (engine, packs)):
        backend = NumPyBackend()
        backend.engine, backend.packs = how
        t = replace(trainer(alpha=0.1), backend=backend)
        state = start(t)
        t.fit(state, source(x, y), 5, np.random.RandomState(0))
        runs.append((len(state.arrays.leaves), t.params(state.arrays.leaves)))
    assert [n for n, _ in runs] == [4, 1 if packs else 4]
    for a, b in zip(runs[0][1], runs[1][1], strict=True):
        np.testing.assert_array_equal(a, b)


@dataclass(frozen=True)
class Transposing(Linear):
    """A user's layer whose gradient is a transposed view."""

    def gradients(self, p, x, dz, xp):
        dw, db = super().gradients(p, x, dz, xp)
        return xp.matmul(dz.T, x).T + 0.0 * dw, db


@pytest.mark.parametrize("order", ["C", "F"])
def test_updates_whatever_the_layout(order):
    """A leaf that is not contiguous has no flat view; the update must not be lost in a copy."""
    x, y = problem()
    runs = []
    for kind, memory in ((Linear, "C"), (Transposing, order)):
        backend = NumPyBackend()
        backend.packs = False
        network = Network((kind(4, 8), Linear(8, 1)))
        t = replace(trainer(alpha=0.1), backend=backend, network=network)
        params = [np.asarray(p, order=memory) for p in network.init(np.random.RandomState(0))]
        state = t.start(params)
        t.fit(state, source(x, y), 5, np.random.RandomState(0))
        runs.append(t.params(state.arrays.leaves))
        assert not np.array_equal(runs[-1][0], params[0])
    for a, b in zip(*runs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)
