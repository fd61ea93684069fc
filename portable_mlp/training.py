"""Training: the epoch, the fit.

``fit`` asks a source for rows and has an engine repeat the step over their batches.  The
host does what needs no array: the order of the rows, the learning rate, when to stop.
"""

from __future__ import annotations

import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import ceil, inf, isfinite, nan
from types import FrameType
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from portable_mlp.backends import Backend
from portable_mlp.callbacks import Callback, Epoch, pausing
from portable_mlp.engines import ENGINES, Engine, Task
from portable_mlp.losses import Loss
from portable_mlp.network import Network
from portable_mlp.optimizers import Moments, Optimizer
from portable_mlp.packing import Layout
from portable_mlp.schedules import Clock, Schedule
from portable_mlp.sources import Source
from portable_mlp.steps import Arrays, Batch, Hyper, Recipe, objective
from portable_mlp.typing import Array, Params


class DivergenceError(ValueError):
    """Training produced NaN or infinite values."""


# ---------------------------------------------------------------- the fit


class Begun(NamedTuple):
    """What is done of an epoch that is not: steps, rows, and the sum of the rows' losses."""

    steps: int = 0
    rows: int = 0
    loss: float = 0.0


NOT_BEGUN = Begun()


@dataclass
class State:
    """Where training stands: arrays on the device, counters on the host.

    Attributes
    ----------
    arrays : Arrays
        After the last step.
    schedule : object
        The schedule's memory.
    origin : tuple
        What the moments belong to.
    generator : tuple
        State of the random generator before the run's first draw.
    steps, rows, epochs : int
        Done, and seen, in whole epochs since the moments began.
    done : int
        Epochs of the present run; the draws of so many are repeated when it goes on.
    begun : Begun
        What is done of the next one.
    stalled_for : int
        Epochs in a row without progress.
    watched : {"loss", "score"}
    best : float
        Of what is watched, lower is better.
    best_leaves : list of arrays, optional
        Parameters that scored best.
    history : list of Epoch
    """

    arrays: Arrays
    schedule: Any
    origin: Any = None
    generator: Any = None
    steps: int = 0
    rows: int = 0
    epochs: int = 0
    done: int = 0
    begun: Begun = NOT_BEGUN
    stalled_for: int = 0
    watched: str = "loss"
    best: float = inf
    best_leaves: list[Array] | None = None
    history: list[Epoch] = field(default_factory=list)

    @property
    def leaves(self) -> list[Array]:
        """The parameters to use: the best, where a score was watched, or the last."""
        return self.arrays.leaves if self.best_leaves is None else self.best_leaves

    def cut_short(self) -> State:
        """What is begun counted, but not to be ended: the next epoch is a new one."""
        steps, rows, _ = self.begun
        return replace(self, steps=self.steps + steps, rows=self.rows + rows, begun=NOT_BEGUN)

    def beside_leaves(self) -> State:
        """What is to be kept beside `leaves`: of the arrays, those that differ from them."""
        last = [] if self.best_leaves is None else self.arrays.leaves
        return replace(self, arrays=self.arrays._replace(leaves=last), best_leaves=None)


StopReason = Literal["converged", "max_epochs", "stopped", "interrupted", "diverged"]

Validate = Callable[[list[Array]], tuple[float, float]]


@dataclass(frozen=True)
class Trainer:
    """A training run's settings.

    Parameters
    ----------
    network : Network
    loss : Loss
    optimizer : Optimizer
    backend : Backend
    dtype : {"float32", "float64"}
    learning_rate : float
        Times the schedule's factor.
    schedule : Schedule
    alpha : float, default=0
        L2 penalty on the weights, see `objective`.
    clip_norm : float, optional
    batch_size : int, default=200
    shuffle : bool, default=True
        Draw a new order of the rows each epoch.
    tol : float, default=1e-4
        Least improvement of the loss (or validation score) that counts as one.
    patience : float, default=10
        Epochs in a row without one after which training stops.
    loss_scale : float, default=1
        Factor on the *reported* loss, without the penalty: for an interface whose
        convention divides by the number of outputs.
    """

    network: Network
    loss: Loss
    optimizer: Optimizer
    backend: Backend
    dtype: str
    learning_rate: float
    schedule: Schedule = Schedule()
    alpha: float = 0.0
    clip_norm: float | None = None
    batch_size: int = 200
    shuffle: bool = True
    tol: float = 1e-4
    patience: float = 10
    loss_scale: float = 1.0

    @cached_property
    def recipe(self) -> Recipe:
        layout = Layout.plan(
            self.network.params, self.optimizer.decays if self.backend.packs else None
        )
        return Recipe(
            self.backend.xp,
            self.network,
            self.loss,
            self.optimizer,
            layout,
            self.clip_norm,
            self.alpha > 0.0,
        )

    def start(self, params: Params) -> State:
        """The state before the first step; the parameters, from anywhere, are copied."""
        with self.backend.scope(self.dtype):
            how = (self.optimizer, self.schedule, self.recipe.layout)
            origin = (*how, repr(self.backend), self.dtype)
            return State(Arrays(*self._fresh(params)), self.schedule.init(), origin)

    def resume(self, old: State, fresh: State) -> State:
        """``old`` with the parameters of ``fresh``, and its own moments if they fit.

        The moments are copied: if training fails, ``old`` is as it was.
        """
        history = list(old.history)
        if old.origin == fresh.origin:
            with self.backend.scope(self.dtype):
                moments = [tuple(self.copy(m)) for m in old.arrays.moments]
            arrays = fresh.arrays._replace(moments=moments)
            return replace(old, arrays=arrays, history=history)
        warnings.warn(
            "optimizer, schedule, backend or data type are not those of the last call: the"
            " optimizer's moments and the schedule start anew",
            UserWarning,
            stacklevel=5,
        )
        # Steps too: they correct the bias of moments that began at zero
        return replace(
            old.cut_short(),
            arrays=fresh.arrays,
            history=history,
            origin=fresh.origin,
            schedule=fresh.schedule,
            steps=0,
        )

    def _fresh(self, params: Params) -> tuple[list[Array], list[Moments]]:
        leaves = self.load(params)
        return leaves, self.optimizer.init(leaves, self.backend.xp)

    def load(self, params: Params) -> list[Array]:
        """Leaves of our own from parameters on the host or on the backend."""
        arrays = [self.backend.asarray(p, self.dtype, copy=True) for p in params]
        # Laid out row by row, whatever came in: engines take a leaf for one run of memory
        xp = self.backend.xp
        arrays = [xp.reshape(xp.reshape(a, (-1,)), a.shape) for a in arrays]
        return self.recipe.layout.pack(arrays, xp)

    def params(self, leaves: list[Array]) -> list[Array]:
        """Parameters in order, from leaves; views where arrays have them."""
        return self.recipe.layout.unpack(leaves, self.backend.xp)

    def fit(
        self,
        state: State,
        source: Source,
        max_epochs: int,
        rng: np.random.RandomState,
        *,
        validate: Validate | None = None,
        early_stopping: bool = False,
        callbacks: Sequence[Callback] = (),
        planned_epochs: int | None = None,
        model: Callable[[State], Any] | None = None,
    ) -> StopReason:
        """Train, changing ``state``, until something stops it.

        Parameters
        ----------
        state : State
            If some epochs of this run are done, it goes on behind them, exactly as if
            it had never stopped.
        source : Source
        max_epochs : int
            Of the whole run.
        rng : RandomState
            Draws the order of the rows and the seeds of random layers; as it was when
            the run began.
        validate : callable, optional
            From parameters to the score, higher is better, and the loss of held-out
            rows, after each epoch.
        early_stopping : bool, default=False
            Watch that score instead of the loss; ``state.leaves`` then are the best.
        callbacks : sequence of Callback
        planned_epochs : int, optional
            What schedules take for the whole length of training, if it goes on after
            this call; ``max_epochs`` if not given.
        model : callable, optional
            From the state to what callbacks are given that pause training.

        Returns
        -------
        {"converged", "max_epochs", "stopped", "interrupted", "diverged"}
            "stopped" by a callback; "diverged" only with early stopping, whose best
            parameters then are what remains.

        Raises
        ------
        ValueError
            If the state is in the middle of an epoch over other rows.
        DivergenceError
            If the loss or a parameter is not finite and there is nothing to restore.
        """
        steps, seen, _ = state.begun
        if seen != min(steps * self.batch_size, source.n_rows):
            raise ValueError(
                f"training stopped {seen} rows into an epoch, and goes on with the rows and the"
                " batch size that it had"
            )
        watched = "score" if early_stopping else "loss"
        if state.watched != watched:
            # What was best of the one says nothing of the other
            state.watched, state.best, state.stalled_for = watched, inf, 0
        if early_stopping and state.best_leaves is None:
            state.best_leaves = self.copy(state.arrays.leaves)
        for callback in callbacks:
            callback.on_fit_begin(max_epochs)
        try:
            with self.backend.scope(self.dtype), deferred_interrupt() as interrupted:
                reason = self._epochs(
                    state,
                    source,
                    max_epochs,
                    planned_epochs or max_epochs,
                    rng,
                    validate,
                    callbacks,
                    _Pauses(interrupted, callbacks, lambda: model and model(state)),
                )
                xp = self.backend.xp
                finite = [xp.astype(xp.all(xp.isfinite(a)), xp.float32) for a in state.leaves]
                if not self.backend.fetch(finite).all():
                    raise DivergenceError(self._divergence(state.epochs, nan))
        finally:
            for callback in callbacks:
                callback.on_fit_end()
        return reason

    def _epochs(
        self,
        state: State,
        source: Source,
        max_epochs: int,
        planned_epochs: int,
        rng: np.random.RandomState,
        validate: Validate | None,
        callbacks: Sequence[Callback],
        pauses: _Pauses,
    ) -> StopReason:
        began = time.perf_counter()
        early = state.watched == "score"
        engine = ENGINES[self.backend.engine](self.backend, self.recipe)
        order = np.arange(source.n_rows)
        n_steps = ceil(source.n_rows / self.batch_size)
        if state.done and state.stalled_for > self.patience:
            return "converged"
        for epoch in range(max_epochs):
            keys = self._draw(rng, order, n_steps)
            if epoch < state.done:
                continue
            for callback in callbacks:
                callback.on_epoch_begin(state.epochs + 1)
            hypers, rate = self._hypers(state, n_steps, planned_epochs, keys)
            loss = self._epoch(
                state, source, engine, order if self.shuffle else None, hypers, pauses
            )
            if loss is None:
                return "interrupted"
            state.epochs += 1
            state.done += 1
            validation = nan, nan
            if validate is not None and isfinite(loss):
                validation = validate(self.params(state.arrays.leaves))
            score, validation_loss = validation
            record = Epoch(
                state.epochs, loss, validation_loss, score, rate, time.perf_counter() - began
            )
            state.history.append(record)
            try:
                asked = [c.on_epoch_end(record, lambda: self._snapshot(state)) for c in callbacks]
            except KeyboardInterrupt:
                return "interrupted"
            if not isfinite(loss):
                if not early:
                    raise DivergenceError(self._divergence(state.epochs, loss))
                said = self._divergence(state.epochs, loss) + " The best weights so far are kept."
                warnings.warn(said, RuntimeWarning, stacklevel=5)
                return "diverged"
            if self._watch(state, -score if early else loss):
                remembered = self.schedule.stalled(state.schedule, rate)
                if remembered is None:
                    return "converged"
                state.schedule = remembered
                state.stalled_for = 0
            if any(asked):
                return "stopped"
        return "max_epochs"

    def _draw(
        self, rng: np.random.RandomState, order: NDArray[np.intp], n_steps: int
    ) -> list[tuple[int, ...]]:
        """Bring the rows in their next order, and draw seeds for each step's random layers."""
        if self.shuffle:
            rng.shuffle(order)  # in place: scikit-learn's orders compose, too
        n_random = self.network.n_random
        if not n_random:
            return [()] * n_steps
        return list(map(tuple, rng.randint(2**31, size=(n_steps, n_random)).tolist()))

    def _hypers(
        self, state: State, n_steps: int, planned_epochs: int, keys: list[tuple[int, ...]]
    ) -> tuple[list[Hyper], float]:
        """An epoch's changing numbers, a step each, and the last learning rate."""
        hypers = []
        rate = nan
        for i in range(n_steps):
            clock = Clock(state.steps + i, planned_epochs * n_steps, state.epochs, state.rows)
            rate = self.schedule.rate(self.learning_rate, clock, state.schedule)
            coefficients = self.optimizer.coefficients(state.steps + i + 1, rate)
            hypers.append(Hyper(self.alpha, coefficients, keys[i]))
        return hypers, rate

    def _epoch(
        self,
        state: State,
        source: Source,
        engine: Engine,
        order: NDArray[np.intp] | None,
        hypers: list[Hyper],
        pauses: _Pauses,
    ) -> float | None:
        """The batches not done yet; the mean of the reported loss over all rows of the epoch.

        None if interrupted.
        """
        steps, seen, loss = state.begun
        end = 0
        for data, rows in source.parts(self.batch_size, order):
            start = end
            end += ceil((data.x.shape[0] if rows is None else len(rows)) / self.batch_size)
            while steps < end:
                own = hypers[start:end]
                task = Task(data, rows, self.batch_size, own, pauses.due, steps - start)
                state.arrays, values = engine.run(state.arrays, task)
                for value, penalty in values:
                    n = min(self.batch_size, source.n_rows - seen)
                    loss += n * (self.loss_scale * value + penalty)
                    seen += n
                steps += len(values)
                if pauses.due():
                    state.begun = Begun(steps, seen, loss)
                    pauses.hold()
                    if pauses.interrupted.is_set():
                        return None
        state.steps += steps
        state.rows += seen
        state.begun = NOT_BEGUN
        return loss / source.n_rows

    def _snapshot(self, state: State) -> list[Array]:
        return self.params(self.copy(state.arrays.leaves))

    def _watch(self, state: State, value: float) -> bool:
        """Note whether ``value``, lower is better, improved; true if it has stalled.

        A score that equals the best plus ``tol`` counts as progress, a loss that
        equals the best minus ``tol`` does too: scikit-learn's comparisons.
        """
        state.schedule = self.schedule.observe(state.schedule, value)
        state.stalled_for = state.stalled_for + 1 if value > state.best - self.tol else 0
        if value < state.best:
            state.best = value
            if state.best_leaves is not None:
                state.best_leaves = []  # its memory is free before there is another
                state.best_leaves = self.copy(state.arrays.leaves)
        return state.stalled_for > self.patience

    def copy(self, leaves: Sequence[Array]) -> list[Array]:
        """Leaves of their own memory."""
        # Copied, not aliased: the next step overwrites what it is handed
        return [self.backend.asarray(leaf, copy=True) for leaf in leaves]

    def _divergence(self, epoch: int, loss: float) -> str:
        return (
            "Solver produced non-finite parameter weights. The input data may contain"
            " large values and need to be preprocessed."
            f" (Epoch {epoch}, loss {loss}: training diverged. Try a learning rate"
            f" below {self.learning_rate:g}, inputs scaled to unit variance, or clip_norm.)"
        )


class _Pauses:
    """When the loop halts between two steps, and what is done then.

    Parameters
    ----------
    interrupted : Event
    callbacks : sequence of Callback
        Those that ask for pauses are found here: without any, a step costs no more.
    model : callable
        What they are given.

    Attributes
    ----------
    due : callable
        Whether to halt.
    """

    def __init__(
        self,
        interrupted: threading.Event,
        callbacks: Sequence[Callback],
        model: Callable[[], Any],
    ) -> None:
        self.interrupted = interrupted
        self._asking = pausing(callbacks)
        self._model = model
        self.due: Callable[[], bool] = self._due if self._asking else interrupted.is_set

    def _due(self) -> bool:
        return self.interrupted.is_set() or any(c.wants_pause() for c in self._asking)

    def hold(self) -> None:
        """Let the callbacks do what they wanted the pause for."""
        for callback in self._asking:
            callback.on_pause(self._model)


@contextmanager
def deferred_interrupt() -> Iterator[threading.Event]:
    """Turn Ctrl-C into an event that the loop looks at between batches.

    A second Ctrl-C raises KeyboardInterrupt at once.  Only the main thread receives
    signals.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def handle(signum: int, frame: FrameType | None) -> None:
        event.set()
        signal.signal(signal.SIGINT, previous)

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, previous)


# ---------------------------------------------------------------- L-BFGS


def fit_lbfgs(
    trainer: Trainer,
    params: Params,
    data: Batch,
    *,
    max_iter: int,
    max_fun: int,
    callbacks: Sequence[Callback] = (),
) -> tuple[list[Array], float, int, str | None]:
    """Minimise the loss over all rows by SciPy's L-BFGS-B.

    Value and gradient are computed on the backend; SciPy works on the host, in
    float64.  On NumPy, ``data.x`` may be sparse.

    Returns
    -------
    params : list of arrays
    loss : float
    n_iter : int
    message : str or None
        Why it stopped short of convergence; None if it converged.
    """
    from scipy.optimize import minimize

    backend, recipe = trainer.backend, trainer.recipe
    evaluate = backend.compile(objective, static=(0,))

    def split(theta: NDArray[np.float64]) -> list[Array]:
        ends = np.cumsum([leaf.size for leaf in shapes])[:-1]
        parts = np.split(theta, ends)
        return [
            backend.asarray(part.reshape(leaf.shape), trainer.dtype)
            for part, leaf in zip(parts, shapes, strict=True)
        ]

    def value_and_grad(theta: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        value, penalty, grads = evaluate(recipe, split(theta), data, trainer.alpha, ())
        loss = trainer.loss_scale * backend.fetch([value])[0]
        if recipe.penalised:
            loss += backend.fetch([penalty])[0]
        flat = [backend.to_host(g).astype(np.float64).ravel() for g in grads]
        return float(loss), np.concatenate(flat)

    began = time.perf_counter()
    n_iter = 0

    def after_iteration(intermediate_result: Any) -> None:
        nonlocal n_iter
        n_iter += 1
        seconds = time.perf_counter() - began
        record = Epoch(n_iter, float(intermediate_result.fun), seconds=seconds)
        theta = intermediate_result.x
        for callback in callbacks:
            callback.on_epoch_begin(n_iter)  # SciPy tells of an iteration when it is done
        asked = [c.on_epoch_end(record, lambda: trainer.params(split(theta))) for c in callbacks]
        if any(asked):
            raise StopIteration

    for callback in callbacks:
        callback.on_fit_begin(max_iter)
    try:
        with backend.scope(trainer.dtype):
            shapes = [backend.to_host(leaf) for leaf in trainer.load(params)]
            theta = np.concatenate([leaf.astype(np.float64).ravel() for leaf in shapes])
            result = minimize(
                value_and_grad,
                theta,
                method="L-BFGS-B",
                jac=True,
                callback=after_iteration if callbacks else None,
                options={"maxfun": max_fun, "maxiter": max_iter, "gtol": trainer.tol},
            )
    finally:
        for callback in callbacks:
            callback.on_fit_end()
    with backend.scope(trainer.dtype):
        if not np.isfinite(result.x).all() or not isfinite(result.fun):
            raise DivergenceError(trainer._divergence(int(result.nit), float(result.fun)))
        stopped = 99  # by a callback
        message = None if result.status in (0, stopped) else str(result.message)
        return trainer.params(split(result.x)), float(result.fun), int(result.nit), message
