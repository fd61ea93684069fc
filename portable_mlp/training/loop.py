"""Training: the epoch and the fit.

``fit`` takes rows from a source, and an engine repeats the step over their batches.  The host
does everything that needs no array: the order of the rows, the learning rate, when to stop.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil, inf, isfinite, nan
from typing import Any

import numpy as np
from numpy.typing import NDArray

from portable_mlp.backends import Backend
from portable_mlp.callbacks import Callback, Epoch
from portable_mlp.engines import ENGINES, EPOCHS_AT_ONCE, Task
from portable_mlp.groups import Treatment, Treatments
from portable_mlp.losses import Loss
from portable_mlp.members import PerMember, each
from portable_mlp.network import Network
from portable_mlp.optimizers import Coefficients, Moments, Optimizer
from portable_mlp.packing import Layout
from portable_mlp.schedules import Clock, Schedule, at
from portable_mlp.sources import Source
from portable_mlp.steps import Arrays, Hyper, Recipe
from portable_mlp.training.pauses import Pauses, deferred_interrupt
from portable_mlp.training.state import (
    NOT_BEGUN,
    Begun,
    DivergenceError,
    State,
    StopReason,
    Validate,
    is_kept,
    plain,
)
from portable_mlp.typing import Array, Params
from portable_mlp.warn import warn


@dataclass(frozen=True)
class Trainer:
    """The settings of a training run.

    Parameters
    ----------
    network : Network
    loss : Loss
    optimizer : Optimizer
    backend : Backend
    dtype : {"float32", "float64"}
    learning_rate : float
        Initial learning rate, which the schedule's factor multiplies.
    schedule : Schedule
    alpha : float, default=0
        L2 penalty on the weights, see `objective`.
    clip_norm : float, optional
        Largest global norm of the gradients.
    batch_size : int, default=200
    shuffle : bool, default=True
        Whether to draw a new order of the rows each epoch.
    tol : float, default=1e-4
        Smallest improvement of the loss (or validation score) that counts as progress.
    patience : float, default=10
        Training stops after more than this number of epochs in a row without progress.
    treatments : dict, optional
        Non-default treatments, from labels of parameters to `groups.Treatment`.
    reduce : callable, optional
        Function that changes the vector of sums in place between the two halves of each
        step, see `portable_mlp.engines.Engine`.
    loss_scale : float, default=1
        Factor on the *reported* loss, but not on the penalty, for interfaces that divide
        by the number of outputs.
    slack : float, default=0
        With early stopping, the last parameters are kept whose score s is not below the best
        one, b, by more than slack · ``|b|``.  With 0 they are the first with the best score.
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
    treatments: Mapping[str, Treatment] | None = None
    reduce: Callable[[Array], None] | None = None
    loss_scale: float = 1.0
    slack: float = 0.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            object.__setattr__(self, name, plain(value))

    @cached_property
    def groups(self) -> Treatments:
        """The treatments of the groups of the network's parameters."""
        return Treatments.of(self.network.params, self.optimizer, self.treatments)

    @cached_property
    def recipe(self) -> Recipe:
        params, groups = self.network.params, self.groups
        layout = Layout.plan(params, groups.kinds.get if self.backend.packs else None)
        return Recipe(
            self.backend.xp,
            self.network,
            self.loss,
            self.optimizer.rule(),
            layout,
            tuple(groups.kinds[group] for group in layout.groups),
            tuple(bool(self.optimizer.weight_decay and t.decay) for t in groups.updates),
            tuple(groups.penalised[p.group] if self.alpha > 0.0 else None for p in params),
            self.clip_norm,
        )

    @cached_property
    def _loss_takes_numbers(self) -> bool:
        return bool(self.loss.numbers)

    @cached_property
    def alphas(self) -> tuple[float, ...]:
        """The L2 penalties, as `Hyper.alphas`."""
        return tuple(self.alpha * factor for factor in self.groups.penalties)

    def hyper(self, clock: Clock, memory: Any, keys: Sequence[int] = ()) -> tuple[Hyper, float]:
        """Return the numbers of the next step, and the learning rate.

        Parameters
        ----------
        clock : Clock
        memory : object
            Memory of the schedule.
        keys : sequence of int
            Seeds, one for each layer that draws noise.
        """
        rate = self.schedule.rate(self.learning_rate, clock, memory)
        decay = at(self.optimizer.weight_decay, clock)
        coefficients, keeps = [], []
        for treatment in self.groups.updates:
            own = rate
            if treatment.schedule is not None:
                own = treatment.schedule.rate(self.learning_rate, clock, None)
            of = self._of_members if treatment.apart else self._of_all
            found, keep = of(treatment, clock, own, decay)
            coefficients.append(found)
            keeps.append(keep)
        return Hyper(
            self.alphas,
            tuple(coefficients),
            tuple(keeps),
            self.network.per_step(clock, keys),
            self.loss.per_step(clock) if self._loss_takes_numbers else (),
        ), rate

    def _of_all(
        self, treatment: Any, clock: Clock, rate: float, decay: float
    ) -> tuple[Coefficients, Any]:
        """Return the coefficients, and the factor on the parameters before the rule."""
        # Python floats, whatever type a custom schedule or optimizer returns
        rate = float(rate * treatment.rate)
        found = self.optimizer.coefficients(clock.step + 1, rate)
        return tuple(map(float, found)), 1.0 - rate * (decay * treatment.decay)

    @cached_property
    def _apart(self) -> dict[Treatment, list[NDArray[np.float64]]]:
        """The members' rates and decays, for treatments with values that differ."""
        return {
            t: [np.array(each(factor, self.network.members, "")) for factor in (t.rate, t.decay)]
            for t in self.groups.updates
            if t.apart
        }

    def _of_members(
        self, treatment: Treatment, clock: Clock, rate: float, decay: float
    ) -> tuple[Coefficients, Any]:
        """Return the results of `_of_all`, those that depend on the rate for each member."""
        rates, decays = self._apart[treatment]
        own = rate * rates
        keeps = PerMember(1.0 - own * (decay * decays), ndim=2)
        if type(self.optimizer).__module__ != Optimizer.__module__:
            # A custom optimizer may compute what does not work with arrays, such as a minimum
            each_one = [self.optimizer.coefficients(clock.step + 1, r) for r in own.tolist()]
            columns = zip(*each_one, strict=True)
            return tuple(PerMember(values, ndim=2) for values in columns), keeps
        found = self.optimizer.coefficients(clock.step + 1, own)
        coefficients = (
            PerMember(c, ndim=2) if isinstance(c, np.ndarray) else float(c) for c in found
        )
        return tuple(coefficients), keeps

    def start(self, params: Params) -> State:
        """Return the state before the first step, with copies of the parameters."""
        with self.backend.scope(self.dtype):
            how = (self.optimizer, self.schedule, self.recipe.layout)
            origin = (*how, repr(self.backend), self.dtype)
            return State(Arrays(*self._fresh(params)), self.schedule.init(), origin)

    def resume(self, old: State, fresh: State) -> State:
        """Return ``old`` with the parameters of ``fresh``, and its own moments if they fit.

        The moments are copied, so that ``old`` stays intact if training fails.
        """
        history = list(old.history)
        if old.origin == fresh.origin:
            with self.backend.scope(self.dtype):
                moments = [tuple(self.copy(m)) for m in old.arrays.moments]
            arrays = fresh.arrays._replace(moments=moments)
            return replace(old, arrays=arrays, history=history)
        warn(
            "optimizer, schedule, groups, backend or data type are not those of the last call: the"
            " optimizer's moments and the schedule start anew",
            UserWarning,
        )
        # The step count restarts too: it corrects the bias of moments that start at zero
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
        """Copy parameters, from the host or the backend, into leaves on the backend."""
        arrays = [self.backend.asarray(p, self.dtype, copy=True) for p in params]
        # Made contiguous in row-major order, since engines treat a leaf as one memory block
        xp = self.backend.xp
        arrays = [xp.reshape(xp.reshape(a, (-1,)), a.shape) for a in arrays]
        return self.recipe.layout.pack(arrays, xp)

    def params(self, leaves: list[Array]) -> list[Array]:
        """Return the parameters in order, from leaves; views where the library has them."""
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
        """Train until a limit or a stopping rule ends it; change ``state`` in place.

        Parameters
        ----------
        state : State
            If it contains completed epochs of this run, training resumes after them as if it
            had never stopped.
        source : Source
        max_epochs : int
            Number of epochs of the whole run.
        rng : RandomState
            Random generator, in its state at the beginning of the run.  It draws the order
            of the rows and the seeds of random layers.
        validate : callable, optional
            Function from parameters to the score, higher is better, and the loss of held-out
            rows; called after each epoch.
        early_stopping : bool, default=False
            Whether to watch that score instead of the loss and keep the best parameters.
        callbacks : sequence of Callback
        planned_epochs : int, optional
            Number of epochs that schedules assume, if training continues after this call;
            ``max_epochs`` if not given.
        model : callable, optional
            Function from the state to the model for callbacks that pause training.

        Returns
        -------
        {"converged", "max_epochs", "stopped", "interrupted", "diverged"}
            "stopped" by a callback; "diverged" only with early stopping, after which the
            best parameters remain.

        Raises
        ------
        ValueError
            If the state is in the middle of an epoch, and the rows or batch size have changed.
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
            # The best loss cannot be compared with a score, nor a score with a loss
            state.watched, state.best, state.stalled_for = watched, inf, 0
        if early_stopping and state.best_leaves is None:
            state.best_leaves = self.copy(state.current_leaves)
        for callback in callbacks:
            callback.on_fit_begin(max_epochs + state.epochs - state.done)
        try:
            with self.backend.scope(self.dtype), deferred_interrupt() as interrupted:
                reason = _Loop(
                    self,
                    state,
                    source,
                    rng,
                    max_epochs,
                    planned_epochs or max_epochs,
                    validate,
                    callbacks,
                    Pauses(interrupted, callbacks, lambda: model and model(state)),
                ).epochs()
                xp = self.backend.xp
                finite = [xp.astype(xp.all(xp.isfinite(a)), xp.float32) for a in state.final_leaves]
                if not self.backend.fetch(finite).all():
                    raise DivergenceError(self.divergence(state.epochs, nan))
        finally:
            for callback in callbacks:
                callback.on_fit_end()
        return reason

    def copy(self, leaves: Sequence[Array]) -> list[Array]:
        """Return copies of the leaves."""
        # Not aliases: the next step overwrites the leaves it receives
        return [self.backend.asarray(leaf, copy=True) for leaf in leaves]

    def reported(self, value: Any, penalty: float = 0.0) -> float:
        """Return the reported loss, given the mean loss without the penalty, and the penalty.

        For an ensemble, with one loss for each member and a common penalty, it is the mean.
        """
        if self.network.members is None:
            return float(self.loss_scale * value + penalty)
        mean = float(np.mean(np.asarray(value, np.float64)))
        return self.loss_scale * mean + penalty / self.network.members

    def divergence(self, epoch: int, loss: float) -> str:
        """Return the message about values that are not finite."""
        return (
            "Solver produced non-finite parameter weights. The input data may contain"
            " large values and need to be preprocessed."
            f" (Epoch {epoch}, loss {loss}: training diverged. Try a learning rate"
            f" below {self.learning_rate:g}, inputs scaled to unit variance, or clip_norm.)"
        )


@dataclass
class _Loop:
    """The loop of one call of `Trainer.fit`, with its arguments."""

    trainer: Trainer
    state: State
    source: Source
    rng: np.random.RandomState
    max_epochs: int
    planned_epochs: int
    validate: Validate | None
    callbacks: Sequence[Callback]
    pauses: Pauses

    def __post_init__(self) -> None:
        trainer, source = self.trainer, self.source
        kind = ENGINES[trainer.backend.engine]
        self.engine = kind(trainer.backend, trainer.recipe, trainer.reduce)
        self.drawn = 0  # epochs of this run whose draws are made
        self.n_steps = ceil(source.n_rows / trainer.batch_size)
        self.whole = source.whole(trainer.batch_size)
        self.began = time.perf_counter()

    def epochs(self) -> StopReason:
        """Run the remaining epochs; return why training stopped."""
        state = self.state
        for _ in range(state.done):
            self.draw()  # repeated, so that the generator is where it was
        if state.done and state.stalled_for > self.trainer.patience:
            return "converged"
        while state.done < self.max_epochs:
            for callback in self.callbacks:
                callback.on_epoch_begin(state.epochs + 1)
            n_epochs = self.n_unobserved()
            plans = [self.plan(ahead, self.draw()) for ahead in range(n_epochs)]
            if n_epochs > 1:
                losses = self.repeat([hyper for (hyper,), _ in plans])
            else:
                loss = self.epoch(plans[0][0])
                losses = [] if loss is None else [loss]
            for (_, rate), loss in zip(plans, losses, strict=False):
                reason = self.end_epoch(loss, rate)
                if reason is not None:
                    return reason
            if len(losses) < n_epochs or self.pauses.interrupted.is_set():
                return "interrupted"
        return "max_epochs"

    def n_unobserved(self) -> int:
        """Return the number of epochs to run before anything needs the state.

        It can be above one only if an epoch is one step.  A separate call of the engine for
        such an epoch, with its synchronisation, would take longer than the step.
        """
        trainer, state = self.trainer, self.state
        watched = (
            self.callbacks
            or self.validate is not None
            or state.begun != NOT_BEGUN
            or state.best_leaves is not None
            or type(trainer.schedule).observe is not Schedule.observe
        )
        if watched or self.whole is None:
            return 1
        # Each epoch adds at most one to ``stalled_for``
        until_stalled = trainer.patience - state.stalled_for + 1
        return max(1, int(min(until_stalled, self.max_epochs - state.done, EPOCHS_AT_ONCE)))

    def plan(self, ahead: int, keys: list[tuple[int, ...]]) -> tuple[list[Hyper], float]:
        """Return the numbers of each step of an epoch, and its last learning rate.

        Parameters
        ----------
        ahead : int
            Number of epochs to run before this one.
        keys : list of tuple of int
            Seeds of random layers, for each step.
        """
        trainer, state, n_steps = self.trainer, self.state, self.n_steps
        hypers = []
        rate = nan
        done = state.steps + ahead * n_steps
        epochs = state.epochs + ahead
        rows = state.rows + ahead * self.source.n_rows
        for i in range(n_steps):
            clock = Clock(done + i, self.planned_epochs * n_steps, epochs, rows)
            hyper, rate = trainer.hyper(clock, state.schedule, keys[i])
            hypers.append(hyper)
        return hypers, rate

    def draw(self) -> list[tuple[int, ...]]:
        """Begin the source's next epoch; draw the seeds of random layers, for each step."""
        self.source.begin(self.drawn, self.rng if self.trainer.shuffle else None)
        self.drawn += 1
        n_random = self.trainer.network.n_random
        if not n_random:
            return [()] * self.n_steps
        return list(map(tuple, self.rng.randint(2**31, size=(self.n_steps, n_random)).tolist()))

    def epoch(self, hypers: list[Hyper]) -> float | None:
        """Run the remaining batches; return the mean loss over all rows, None if interrupted."""
        trainer, state, source = self.trainer, self.state, self.source
        size, pauses = trainer.batch_size, self.pauses
        steps, seen, loss = state.begun
        end = 0
        for data, rows in source.parts(size):
            start = end
            end += ceil((data.x.shape[0] if rows is None else rows.shape[-1]) / size)
            while steps < end:
                task = Task(data, rows, size, hypers[start:end], pauses.due, steps - start)
                state.arrays, values = self.engine.run(state.arrays, task)
                for pair in values:
                    n = min(size, source.n_rows - seen)
                    loss += n * trainer.reported(*pair)
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

    def repeat(self, hypers: list[Hyper]) -> list[float]:
        """Run epochs of one step on all rows, fewer if interrupted; return their losses."""
        state, n = self.state, self.source.n_rows
        assert self.whole is not None
        task = Task(self.whole, None, self.trainer.batch_size, hypers, self.pauses.due)
        state.arrays, values = self.engine.run(state.arrays, task)
        state.steps += len(values)
        state.rows += n * len(values)
        # Multiplied and divided by n for the same rounding as in `epoch`
        return [n * self.trainer.reported(*pair) / n for pair in values]

    def end_epoch(self, loss: float, rate: float) -> StopReason | None:
        """Finish an epoch: validate, call back, note progress; return a reason to stop, if any."""
        trainer, state = self.trainer, self.state
        early = state.watched == "score"
        state.epochs += 1
        state.done += 1
        score, validation_loss = nan, nan
        if self.validate is not None and isfinite(loss):
            score, validation_loss = self.validate(trainer.params(state.current_leaves))
        seconds = time.perf_counter() - self.began
        record = Epoch(state.epochs, loss, validation_loss, score, rate, seconds)
        state.history.append(record)
        try:
            asked = [c.on_epoch_end(record, self.snapshot) for c in self.callbacks]
        except KeyboardInterrupt:
            return "interrupted"
        if not isfinite(loss):
            said = trainer.divergence(state.epochs, loss)
            if not early:
                raise DivergenceError(said)
            said += " The best weights so far are kept."
            warn(said, RuntimeWarning)
            return "diverged"
        if self.note_progress(-score if early else loss):
            remembered = trainer.schedule.stalled(state.schedule, rate)
            if remembered is None:
                return "converged"
            state.schedule = remembered
            state.stalled_for = 0
        return "stopped" if any(asked) else None

    def snapshot(self) -> list[Array]:
        trainer = self.trainer
        return trainer.params(trainer.copy(self.state.current_leaves))

    def note_progress(self, value: float) -> bool:
        """Note whether ``value``, lower is better, improved; return whether progress stalled.

        A score equal to the best plus ``tol``, or a loss equal to the best minus ``tol``,
        counts as progress, as in scikit-learn.
        """
        trainer, state = self.trainer, self.state
        state.schedule = trainer.schedule.observe(state.schedule, value)
        state.stalled_for = state.stalled_for + 1 if value > state.best - trainer.tol else 0
        best = state.best
        if value < best:
            state.best = value
        if state.best_leaves is not None and is_kept(value, best, trainer.slack):
            state.best_leaves = []  # frees the old copy before the new one is made
            state.best_leaves = trainer.copy(state.current_leaves)
        return state.stalled_for > trainer.patience
