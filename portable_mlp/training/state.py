"""Where training stands, between two steps and between two calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any, Literal, NamedTuple

from portable_mlp.backends import backend_of
from portable_mlp.callbacks import Epoch
from portable_mlp.steps import Arrays
from portable_mlp.typing import Array


class DivergenceError(ValueError):
    """Training produced NaN or infinite values."""


class Begun(NamedTuple):
    """Progress within an unfinished epoch: steps, rows, and the sum of the rows' losses."""

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
        Progress within the epoch that follows.
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
    def final_leaves(self) -> list[Array]:
        """The parameters to use: the best, where a score was watched, or the last."""
        return self.arrays.leaves if self.best_leaves is None else self.best_leaves

    @property
    def last_params(self) -> list[Array]:
        """Parameters after the last step, in order, where they were trained."""
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
        """Return the state to keep beside `final_leaves`, without the arrays that are in these."""
        last = [] if self.best_leaves is None else self.arrays.leaves
        return replace(self, arrays=self.arrays._replace(leaves=last), best_leaves=None)


StopReason = Literal["converged", "max_epochs", "stopped", "interrupted", "diverged", "failed"]

Validate = Callable[[list[Array]], tuple[float, float]]
