"""How long a packed fit may be, so that it ends within a time limit.

The learning rate falls to zero at the end of a fit.  A fit that is cut off is worse than one that
was planned shorter, so the time of a step is measured first.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from portable_mlp.callbacks import Callback, Epoch
from portable_mlp.typing import Array

_SHARE = 0.9  # of the time that is left, is planned
_TRIAL_STEPS = 20
_FOR_ANOTHER = 0.25  # of the time limit


@dataclass(frozen=True)
class Length:
    """The length of a fit.

    Attributes
    ----------
    epochs : int
    steps : int
        Number of steps in an epoch.
    """

    epochs: int
    steps: int

    @property
    def trial(self) -> Length:
        """One epoch of a few steps, to measure their time."""
        return Length(1, min(_TRIAL_STEPS, self.steps))

    def within(self, seconds: float, step: float, looks: Callable[[int], float]) -> Length:
        """Return the longest length, up to this one, that takes at most a number of seconds.

        Parameters
        ----------
        seconds : float
            Time that is left.
        step : float
            Seconds that a step takes.
        looks : callable
            From a number of epochs to the seconds that are spent on the held-out rows.

        Returns
        -------
        Length
            At least one step.  If the time is too short for an epoch, the only one has fewer
            steps.
        """
        seconds = max(0.0, _SHARE * seconds)
        for epochs in range(self.epochs, 0, -1):
            if epochs * self.steps * step + looks(epochs) <= seconds:
                return Length(epochs, self.steps)
        return Length(1, max(1, min(self.steps, int((seconds - looks(1)) / step))))


class Deadline(Callback):
    """A stop after the first epoch that ends later than a point in time.

    Parameters
    ----------
    seconds : float
        Time limit, from now.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._end = time.perf_counter() + seconds

    @property
    def left(self) -> float:
        """The seconds that are left; below zero when the time is up."""
        return self._end - time.perf_counter()

    @property
    def allows_more(self) -> bool:
        """Whether a fit that begins now can be more than a hasty one."""
        return self.left > _FOR_ANOTHER * self._seconds

    def on_epoch_end(self, epoch: Epoch, params: Callable[[], list[Array]]) -> bool:
        return self.left < 0.0


def seconds_of(act: Callable[[], object]) -> float:
    """Return how long a call takes the second time; the first one may compile."""
    act()
    began = time.perf_counter()
    act()
    return time.perf_counter() - began
