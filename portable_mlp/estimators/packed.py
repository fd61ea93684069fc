"""The packed fit: members of one network, each of which holds out a fold of the rows.

All members train at once, each on its own rows in its own order, with its own learning rate,
weight decay, dropout and frequencies.  Every row is held out by some member, so that one fit
gives an honest prediction of each training row, and with it the epoch to stop at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil, inf, isnan, log
from typing import Any

import numpy as np
from numpy.typing import NDArray

from portable_mlp.architectures import TabularMLP
from portable_mlp.backends import Backend
from portable_mlp.callbacks import Callback, Epoch, Together
from portable_mlp.estimators.selection import LEARNED, MANY_ROWS, Selection
from portable_mlp.estimators.time_limit import Deadline, Length, seconds_of
from portable_mlp.estimators.waves import Waves
from portable_mlp.groups import Treatment
from portable_mlp.losses import Loss
from portable_mlp.network import Network
from portable_mlp.optimizers import AdamW
from portable_mlp.schedules import FlatCosine, LogCosine, Scheduled
from portable_mlp.sources import MemberSource, on_backend
from portable_mlp.steps import Batch
from portable_mlp.training import StopReason, Trainer, is_kept
from portable_mlp.typing import Array
from portable_mlp.warn import warn

Floats = NDArray[np.float64]
Rows = NDArray[np.intp]
Judge = Callable[[Floats, Rows], tuple[Floats, Floats]]

_ROWS_OF_START = 1024  # rows to which initial values are fitted
_ELEMENTS = 2**22  # of an activation of all members in one chunk of rows
_MOST_LOOKS = 32  # at the held-out rows, in a fit


@dataclass(frozen=True)
class Preset:
    """The settings of a packed fit.

    Parameters
    ----------
    members : int, default=8
        Number of networks; as many as there are folds if these are more.
    hidden_layer_sizes : tuple of int, default=(64, 64, 64)
    activation : str, default="selu"
    batch_size : int, default=128
    epochs, steps : int
        Smallest numbers of epochs and of steps of a fit, unless it ends early; see `Waves`.
    learning_rate : float
        Largest learning rate of a member with a factor of 1.
    rates, decays, dropouts : (float, float)
        Ranges of the members' factors on the learning rate, of their weight decays, and of
        their dropout rates.
    sigmas : tuple of float
        Standard deviations of the embedding's initial frequencies; members take them in turn.
    n_frequencies : int, default=8
        Number of cosines of an embedded column.
    beta_2 : float, default=0.95
        Decay rate of Adam's second moment.
    groups : tuple of (str, float)
        Factors on the learning rate, by label of the parameters.
    label_smoothing : float, default=0.1
        Smoothing of the targets of a classification.
    slack : float, default=0.01
        The kept epoch is the last one whose error on held-out rows is not above the smallest by
        more than this fraction; of those epochs after which the held-out rows are looked at.
    average : float, default=0
        Decay rate of the running average of the parameters; 0 for none.
    relevance : float, default=1
        Columns with a smaller t statistic are left out, see `portable_mlp.estimators.selection`;
        0 for none.

    Raises
    ------
    ValueError
        If a number is too small.
    """

    learning_rate: float
    activation: str = "selu"
    members: int = 8
    hidden_layer_sizes: tuple[int, ...] = (64, 64, 64)
    batch_size: int = 128
    epochs: int = 64
    steps: int = 2000
    rates: tuple[float, float] = (0.4, 1.6)
    decays: tuple[float, float] = (0.005, 0.08)
    dropouts: tuple[float, float] = (0.0, 0.0)
    sigmas: tuple[float, ...] = (0.03, 0.05, 0.1, 0.1, 0.2, 0.3, 0.5, 1.0)
    n_frequencies: int = 8
    beta_2: float = 0.95
    groups: tuple[tuple[str, float], ...] = (
        ("scale", 6.0), ("bias", 0.1), ("activation", 0.1), ("embedding", 1.0), ("weight", 1.0),
    )  # fmt: skip
    label_smoothing: float = 0.1
    slack: float = 0.01
    average: float = 0.0
    relevance: float = 1.0

    def __post_init__(self) -> None:
        for name in ("batch_size", "epochs", "n_frequencies"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)!r}")
        if self.members < 2:
            raise ValueError(f"members must be at least 2, got {self.members!r}")
        if not self.sigmas:
            raise ValueError("sigmas: at least one is needed")
        if not 0.0 <= self.relevance <= LEARNED:
            raise ValueError(f"relevance must be from 0 to {LEARNED:g}, got {self.relevance!r}")


def spread(
    low: float, high: float, members: int, rng: np.random.RandomState, *, logs: bool
) -> tuple[float, ...]:
    """Return one value for each member, evenly spread over a range, in random order."""
    at = (rng.permutation(members) + 0.5) / members
    if logs:
        return tuple(np.exp(log(low) + at * (log(high) - log(low))).tolist())
    return tuple((low + at * (high - low)).tolist())


def fold_means(values: Floats, fold: NDArray[np.intp]) -> Floats:
    """Return the means over the members of each fold, (members, ...) -> (folds, ...)."""
    return np.stack([values[fold == i].mean(axis=0) for i in range(fold.max() + 1)])


@dataclass
class HeldOut:
    """The rows that each member holds out.

    Attributes
    ----------
    rows : ndarray (members, n)
        Their numbers; a member with fewer than n repeats its first one.
    counted : ndarray (members, n) of bool
        Which of them are not such a repetition.
    fold : ndarray (members,) of int
        Number of each member's fold.
    """

    rows: Rows
    counted: NDArray[np.bool_]
    fold: NDArray[np.intp]

    @property
    def n_folds(self) -> int:
        """The number of folds; the first members hold out one each, in order."""
        return int(self.fold.max()) + 1

    @classmethod
    def of(cls, tests: Sequence[Rows], members: int) -> HeldOut:
        """Return the rows of folds that members take in turn."""
        fold = np.arange(members) % len(tests)
        folds = [tests[i] for i in fold.tolist()]
        n = max(map(len, folds))
        rows = np.stack([np.concatenate([f, np.full(n - len(f), f[0])]) for f in folds])
        counted = np.stack([np.arange(n) < len(f) for f in folds])
        return cls(rows.astype(np.intp), counted, fold)

    def by_fold(self, values: Floats, weights: Floats | None = None) -> list[tuple[Rows, Floats]]:
        """Return the rows of each fold, and the mean (rows, k) over the members that hold it out.

        Parameters
        ----------
        values : ndarray (members, n, k)
            Values of the held-out rows.
        weights : ndarray (rows,), optional
            Weights of all rows; those of weight zero are left out.
        """
        counted = self.counted
        if weights is not None:
            counted = counted & (weights[self.rows] > 0.0)
        # The first members hold out one fold each, in order
        means = fold_means(values, self.fold)
        folds = zip(self.rows, counted, means, strict=False)
        return [(rows[some], mean[some]) for rows, some, mean in folds]

    def mean(self, values: Floats, n_rows: int) -> Floats:
        """Return the mean over the folds that hold out a row; NaN where none does.

        Parameters
        ----------
        values : ndarray (members, n, k)
            Values of the held-out rows.
        n_rows : int
            Number of all rows.

        Returns
        -------
        ndarray (n_rows, k)
        """
        total, count = np.zeros((n_rows, values.shape[2])), np.zeros(n_rows)
        for rows, mean in self.by_fold(values):
            total[rows] += mean
            count[rows] += 1.0
        with np.errstate(invalid="ignore"):
            return total / count[:, None]


@dataclass
class Packed:
    """A fitted pack.

    Attributes
    ----------
    network : Network
    params : list of arrays
        On the backend.
    held_out : HeldOut
    logits : ndarray (members, n, k)
        Logits of the held-out rows, at the kept epoch.
    history : list of Epoch
    reason : str
        Why training stopped.
    kept : int
        Number of the kept epoch; the last one if nobody looked.
    useless : list of int
        Columns of the table without which the fit should begin anew.
    """

    network: Network
    params: list[Array]
    held_out: HeldOut
    logits: Floats
    history: list[Epoch]
    reason: StopReason
    kept: int
    useless: list[int]

    @property
    def best_score(self) -> float:
        """The best score of the held-out rows; −∞ if nobody looked."""
        looked = (e.validation_score for e in self.history if not isnan(e.validation_score))
        return max(looked, default=-inf)


def fit_pack(
    x: NDArray[np.float32],
    n_embedded: int,
    target: NDArray[Any],
    n_out: int,
    weights: Floats | None,
    splits: Sequence[tuple[Rows, Rows]],
    loss: Loss,
    judge: Judge,
    preset: Preset,
    backend: Backend,
    dtype: str,
    rng: np.random.RandomState,
    callbacks: Sequence[Callback] = (),
    deadline: Deadline | None = None,
    blocks: Sequence[Rows] = (),
) -> Packed:
    """Train a pack.

    Parameters
    ----------
    x : ndarray (rows, columns)
        Input of the network, on the host.
    n_embedded : int
        Number of columns, from the first, to embed.
    target : ndarray (rows,) or (rows, k)
        Targets as the loss takes them.
    n_out : int
        Number of logits.
    weights : ndarray (rows,), optional
    splits : sequence of (train, test)
        Row numbers of each fold; members take them in turn.
    loss : Loss
    judge : callable
        Function from logits (n, k) and row numbers (n,) to the rows' errors (n,), by which
        the epoch is chosen, and their losses (n,), for the history.
    preset : Preset
    backend : Backend
    dtype : {"float32", "float64"}
    rng : RandomState
    callbacks : sequence of Callback
    deadline : Deadline, optional
        When the fit has to be over.
    blocks : sequence of ndarray of int
        For each column of the table, the columns of x that come from it.  Those of no use are
        looked for; nothing is if not given.

    Returns
    -------
    Packed
    """
    k = max(preset.members, len(splits))
    own = [splits[j % len(splits)] for j in range(k)]
    held_out = HeldOut.of([test for _, test in splits], k)
    n_train = int(np.mean([len(train) for train, _ in own]))
    batch_size = min(preset.batch_size, n_train)
    n_steps = max(1, n_train // batch_size)
    length = Length(max(preset.epochs, ceil(preset.steps / n_steps)), n_steps)
    drawn = {
        "rates": spread(*preset.rates, k, rng, logs=True),
        "decays": spread(*preset.decays, k, rng, logs=True),
        "dropouts": spread(*preset.dropouts, k, rng, logs=False),
    }
    dropping = any(drawn["dropouts"])
    network = TabularMLP(
        n_embedded,
        k,
        preset.hidden_layer_sizes,
        preset.activation,
        Scheduled(drawn["dropouts"], FlatCosine()) if dropping else 0.0,
        tuple(preset.sigmas[j % len(preset.sigmas)] for j in range(k)),
        preset.n_frequencies,
    )(x.shape[1], n_out)
    some = [rng.choice(train, min(_ROWS_OF_START, n_train)) for train, _ in own]
    params = network.init(rng, x[np.stack(some)].astype(np.float64))
    known = {param.group for param in network.params}
    treatments = {
        label: Treatment(
            rate=tuple(factor * r for r in drawn["rates"]),
            decay=drawn["decays"] if label != "bias" else 0.0,
        )
        for label, factor in preset.groups
        if label in known
    }
    trainer = Trainer(
        network,
        loss,
        AdamW(
            beta_2=preset.beta_2,
            weight_decay=Scheduled(1.0, FlatCosine()),
            average=preset.average,
        ),
        backend,
        dtype,
        preset.learning_rate,
        LogCosine(),
        batch_size=batch_size,
        tol=0.0,
        patience=np.inf,
        treatments=treatments,
        slack=preset.slack,
    )
    with backend.scope(dtype):
        data = on_backend(x, target, weights, backend, dtype)
        trains = [train for train, _ in own]
        look = _Look(trainer, data, held_out, judge, weights)
        if deadline is not None:
            trial = MemberSource(data, trains, length.trial.steps * batch_size)
            a_draw = np.random.RandomState(0)

            def few_steps() -> None:
                if trainer.fit(trainer.start(params), trial, 1, a_draw) == "interrupted":
                    raise KeyboardInterrupt

            steps = seconds_of(few_steps)
            leaves = trainer.start(params).current_leaves
            one_look = seconds_of(lambda: look.logits(trainer.params(leaves)))
            length = length.within(
                deadline.left, steps / length.trial.steps, lambda n: one_look * (n // _every(n))
            )
            if length.steps < n_steps:
                warn(
                    f"the time limit is too short for an epoch of {n_steps} steps: there are"
                    f" {length.steps}",
                    UserWarning,
                )
        source = MemberSource(data, trains, length.steps * batch_size)
        look.begin(length.epochs)
        state, waves, given = trainer.start(params), Waves(length.epochs), Together(callbacks)
        losses = partial(look.losses, blocks)
        # In a table of few rows, weak columns take longer to learn
        at = waves.second if n_train >= MANY_ROWS else waves.third
        selection = Selection(
            at if preset.relevance and blocks else 0,
            len(blocks),
            held_out.n_folds,
            held_out.rows.shape[1],
            preset.relevance,
            losses,
            rng,
        )
        reason = trainer.fit(
            state,
            source,
            length.epochs,
            rng,
            validate=look,
            early_stopping=True,
            callbacks=[given, selection, waves, *([deadline] if deadline else [])],
        )
        if reason == "interrupted":
            warn("Training interrupted by user.")
        # Before the first look the best parameters are the initial ones
        looked = not all(isnan(e.validation_loss) for e in state.history)
        params = trainer.params(state.final_leaves if looked else state.current_leaves)
        reason = "converged" if waves.ended else reason
        kept = _kept(trainer, state.history) if looked else len(state.history)
        return Packed(
            network, params, held_out, look.logits(params), state.history, reason, kept,
            [] if given.asked else selection.useless,
        )  # fmt: skip


def _every(epochs: int) -> int:
    """Return after how many epochs there is a look at the held-out rows."""
    return max(1, epochs // _MOST_LOOKS)


def _kept(trainer: Trainer, history: Sequence[Epoch]) -> int:
    best, kept = inf, 0
    for epoch in history:
        error = -epoch.validation_score
        if is_kept(error, best, trainer.slack):
            kept = epoch.epoch
        best = min(best, inf if isnan(error) else error)
    return kept


class _Look:
    """The look at the held-out rows after an epoch, as `Trainer.fit` takes it."""

    def __init__(
        self,
        trainer: Trainer,
        data: Batch,
        held_out: HeldOut,
        judge: Judge,
        weights: Floats | None,
    ) -> None:
        self._trainer = trainer
        self._data = data
        self._held_out = held_out
        self._judge = judge
        share = held_out.counted.astype(np.float64)
        if weights is not None:
            share *= weights[held_out.rows]
        self._share = share.ravel() / max(float(share.sum()), np.finfo(np.float64).tiny)
        self.begin(1)
        backend, network = trainer.backend, trainer.network

        def forward(params: list[Array], x: Array) -> Array:
            return network(params, x, backend.xp)

        self._forward = backend.compile(forward)

    def begin(self, epochs: int) -> None:
        """Set the number of epochs to come, of which some are followed by a look."""
        self._every, self._to_come = _every(epochs), epochs

    def __call__(self, params: list[Array]) -> tuple[float, float]:
        self._to_come -= 1
        if self._to_come % self._every:
            return np.nan, np.nan
        z = self.logits(params)
        each = self._judge(z.reshape(-1, z.shape[2]), self._held_out.rows.ravel())
        error, loss = (float(values @ self._share) for values in each)
        return -error, loss

    def logits(self, params: list[Array]) -> Floats:
        """Return the logits of the held-out rows, (members, n, k), on the host."""
        return self._logits(params, self._held_out.rows)

    def losses(
        self,
        blocks: Sequence[Rows],
        params: list[Array],
        columns: Sequence[int],
        places: Rows,
        rng: np.random.RandomState,
    ) -> tuple[Floats, Floats]:
        """Return losses of some held-out rows with columns shuffled; see `selection.Losses`."""
        held_out = self._held_out
        rows = held_out.rows[:, places]
        weights = self._share.reshape(held_out.rows.shape)[:, places]
        others, counted = rows.copy(), weights > 0.0
        others[counted] = rng.permutation(rows[counted])
        shuffled = np.concatenate([blocks[c] for c in columns]) if len(columns) else None
        one = slice(held_out.n_folds)  # one member of each fold
        z = self._logits(params, rows, others, shuffled)[one]
        _, losses = self._judge(z.reshape(-1, z.shape[2]), rows[one].ravel())
        return losses, weights[one].ravel()

    def _logits(
        self,
        params: list[Array],
        rows: Rows,
        others: Rows | None = None,
        columns: Rows | None = None,
    ) -> Floats:
        """Return the logits of rows, with some columns of x taken from others."""
        trainer = self._trainer
        backend, xp = trainer.backend, trainer.backend.xp
        mask = None
        if columns is not None:
            of_others = np.zeros(self._data.x.shape[1], bool)
            of_others[columns] = True
            mask = backend.asarray(of_others, "bool")
        chunk = rows_at_once(trainer.network)

        def taken(some: Rows) -> Array:
            return xp.take(self._data.x, backend.indices(some.ravel()), axis=0)

        found = []
        for start in range(0, rows.shape[1], chunk):
            part = slice(start, start + chunk)
            x = taken(rows[:, part])
            if mask is not None and others is not None:
                x = xp.where(mask, taken(others[:, part]), x)
            x = xp.reshape(x, (*rows[:, part].shape, -1))
            found.append(backend.to_host(self._forward(params, x)).astype(np.float64))
        return np.concatenate(found, axis=1)


def rows_at_once(network: Network) -> int:
    """Return for how many rows the activations of all members fit in a bounded memory."""
    members, width = network.members or 1, network.n_in or 1
    for layer in network.layers:
        frequencies = getattr(layer, "n_frequencies", 1) * getattr(layer, "n_embedded", 1)
        width = max(width, frequencies, getattr(layer, "n_out", 1))
    return max(1, _ELEMENTS // (members * width))
