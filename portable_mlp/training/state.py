"""The state of training, between two steps and between two calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass, replace
from math import inf
from typing import Any, Literal, NamedTuple

import numpy as np

from portable_mlp.backends import backend_of
from portable_mlp.callbacks import Epoch
from portable_mlp.steps import Arrays
from portable_mlp.typing import Array


class DivergenceError(ValueError):
    """Error for training that produced NaN or infinite values."""


class Begun(NamedTuple):
    """Progress within an unfinished epoch: steps, rows, and the sum of the rows' losses."""

    steps: int = 0
    rows: int = 0
    loss: float = 0.0


NOT_BEGUN = Begun()


@dataclass
class State:
    """The state of training: arrays on the device, counters on the host.

    Attributes
    ----------
    arrays : Arrays
        Parameters and moments after the last step.
    schedule : object
        Memory of the schedule.
    origin : tuple
        Settings that the moments belong to: optimizer, schedule, layout, backend and dtype.
        Moments are reused only if these are unchanged.
    generator : tuple
        State of the random generator before the run's first draw.
    steps : int
        Number of steps in completed epochs since the moments were zero.
    rows, epochs : int
        Number of rows seen in completed epochs, and of completed epochs.
    done : int
        Number of completed epochs in the current run.  When the run resumes, their random
        draws are repeated.
    begun : Begun
        Progress within the next epoch.
    stalled_for : int
        Number of epochs in a row without progress.
    watched : {"loss", "score"}
        Quantity that defines progress.
    best : float
        Best value of that quantity (the negated score); lower is better.
    best_leaves : list of arrays, optional
        Leaves with the best score; None if no score is watched.
    history : list of Epoch
        Records of all completed epochs.
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
    def averages(self) -> bool:
        """Whether the optimizer keeps a running average of the parameters."""
        return bool(self.origin[0].average)

    @property
    def current_leaves(self) -> list[Array]:
        """The leaves to use after the last step: these themselves, or their running average."""
        steps = self.steps + self.begun.steps
        if not self.averages or not steps:
            return self.arrays.leaves
        optimizer, *_, dtype = self.origin
        scale = 1.0 / (1.0 - optimizer.average**steps)
        with backend_of(self.arrays.moments[0][-1]).scope(dtype):
            return [states[-1] * scale for states in self.arrays.moments]

    @property
    def final_leaves(self) -> list[Array]:
        """The leaves to use: those with the best score if a score is watched, else the last."""
        return self.current_leaves if self.best_leaves is None else self.best_leaves

    @property
    def last_params(self) -> list[Array]:
        """The parameters after the last step, in order, on the device of training."""
        _, _, layout, *_ = self.origin
        params: list[Array] = layout.unpack(
            self.arrays.leaves, backend_of(self.arrays.leaves[0]).xp
        )
        return params

    def cut_short(self) -> State:
        """Count the partial epoch, then start a new one."""
        steps, rows, _ = self.begun
        return replace(self, steps=self.steps + steps, rows=self.rows + rows, begun=NOT_BEGUN)

    def without_final_leaves(self) -> State:
        """Return the state to store next to `final_leaves`, without the arrays in those."""
        same = self.best_leaves is None and not self.averages
        last = [] if same else self.arrays.leaves
        return replace(self, arrays=self.arrays._replace(leaves=last), best_leaves=None)


StopReason = Literal["converged", "max_epochs", "stopped", "interrupted", "diverged", "failed"]

Validate = Callable[[list[Array]], tuple[float, float]]


def is_kept(value: float, best: float, slack: float) -> bool:
    """Tell whether early stopping keeps an epoch's parameters.

    Parameters
    ----------
    value : float
        What early stopping watches, lower is better; NaN if nobody looked.
    best : float
        The best value before.
    slack : float
        See `Trainer`.
    """
    return value < best or (bool(slack) and value <= best + slack * abs(best))


def plain(x: Any) -> Any:
    """Replace NumPy scalars, which would promote float32 to float64, by Python numbers."""
    if isinstance(x, np.generic):
        return x.item()
    if isinstance(x, tuple):
        items = tuple(plain(item) for item in x)
        return x if all(a is b for a, b in zip(x, items, strict=True)) else items
    if is_dataclass(x) and not isinstance(x, type):
        old = {f.name: getattr(x, f.name) for f in fields(x) if f.init}
        new = {name: plain(value) for name, value in old.items()}
        changed = {name: value for name, value in new.items() if value is not old[name]}
        return replace(x, **changed) if changed else x
    return x
