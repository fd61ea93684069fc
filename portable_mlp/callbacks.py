"""Callbacks: hooks of the training loop, and the progress display."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from math import isnan, nan
from typing import Any, NamedTuple

from portable_mlp.typing import Array


class Epoch(NamedTuple):
    """One record of a training history.

    Attributes
    ----------
    epoch : int
        Number of the epoch, counted from 1.
    loss : float
        Mean over the epoch's rows of the minimised loss, including the penalty.
    validation_loss : float
        Mean loss over held-out rows, without the penalty; NaN without held-out rows.
    validation_score : float
        Score of held-out rows, higher is better; NaN without held-out rows.
    learning_rate : float
        Learning rate of the epoch's last step.
    seconds : float
        Time since training began.
    """

    epoch: int
    loss: float
    validation_loss: float = nan
    validation_score: float = nan
    learning_rate: float = nan
    seconds: float = nan


class Callback:
    """Base class of callbacks; a subclass overrides the hooks it needs."""

    def on_fit_begin(self, max_epochs: int) -> None:
        """Act before the first epoch.

        Parameters
        ----------
        max_epochs : int
            Largest number that the last epoch can have.
        """

    def on_epoch_begin(self, epoch: int) -> None:
        """Act before an epoch, counted from 1.

        L-BFGS calls it after each iteration, just before `on_epoch_end`.
        """

    def on_epoch_end(self, epoch: Epoch, params: Callable[[], list[Array]]) -> bool | None:
        """Act after an epoch, or after an iteration of L-BFGS.

        Parameters
        ----------
        epoch : Epoch
            Record of the epoch.
        params : callable
            Function without arguments that returns copies of the current parameters.

        Returns
        -------
        bool, optional
            True to stop training.
        """
        return None

    def wants_pause(self) -> bool:
        """Tell whether training should pause for `on_pause`.

        The loop asks after each step (on JAX after many steps); L-BFGS does not ask.  The
        answer must stay True until `on_pause` has been called.
        """
        return False

    def on_pause(self, model: Callable[[], Any]) -> None:
        """Act between two steps, after a callback wanted a pause or the user pressed Ctrl-C.

        Parameters
        ----------
        model : callable
            Function without arguments that returns the estimator as if training had ended
            here.  Its arrays are views that the next step overwrites.
        """

    def on_fit_end(self) -> None:
        """Act after the last epoch, also when training fails or is interrupted."""


class Together(Callback):
    """Several callbacks as one.

    Parameters
    ----------
    callbacks : sequence of Callback
        None of which pauses training.

    Attributes
    ----------
    asked : bool
        Whether one of them has asked to stop.
    """

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self._callbacks = callbacks
        self.asked = False

    def on_fit_begin(self, max_epochs: int) -> None:
        for callback in self._callbacks:
            callback.on_fit_begin(max_epochs)

    def on_epoch_begin(self, epoch: int) -> None:
        for callback in self._callbacks:
            callback.on_epoch_begin(epoch)

    def on_epoch_end(self, epoch: Epoch, params: Callable[[], list[Array]]) -> bool | None:
        asked = [callback.on_epoch_end(epoch, params) for callback in self._callbacks]
        self.asked = any(asked)
        return self.asked

    def on_fit_end(self) -> None:
        for callback in self._callbacks:
            callback.on_fit_end()


def pausing(callbacks: Sequence[Callback]) -> list[Callback]:
    """Return the callbacks that may want a pause, those that override ``wants_pause``."""
    return [c for c in callbacks if type(c).wants_pause is not Callback.wants_pause]


class Progress(Callback):
    """A progress bar on a terminal, plain lines anywhere else.

    Parameters
    ----------
    full : bool, default=False
        Whether plain lines contain everything that the bar shows; otherwise they are
        scikit-learn's.
    looks_only : bool, default=False
        Whether there are plain lines only for epochs after which held-out rows were looked at.
    """

    def __init__(self, full: bool = False, *, looks_only: bool = False) -> None:
        from rich.console import Console

        self._console = Console()
        self._full = full
        self._looks_only = looks_only
        self._bar: Any = None
        self._before: int | None = None

    def on_fit_begin(self, max_epochs: int) -> None:
        self._max_epochs = max_epochs
        self._before = None
        if not self._console.is_terminal:
            return
        from rich.progress import BarColumn, Progress, TextColumn

        # bar_width=None and expand=True: the bar fills the width that the text leaves
        self._bar = Progress(
            TextColumn("epoch {task.completed:.0f}/{task.total:.0f} {task.description}"),
            BarColumn(bar_width=None),
            console=self._console,
            expand=True,
        )
        self._task = self._bar.add_task("", total=max_epochs)
        self._bar.start()

    def on_epoch_begin(self, epoch: int) -> None:
        if self._before is None:
            self._before = epoch - 1  # not 0 if training resumes

    def on_epoch_end(self, epoch: Epoch, params: Callable[[], list[Array]]) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=epoch.epoch, description=self._told(epoch))
        elif self._looks_only and isnan(epoch.validation_score):
            return
        elif self._full:
            print(f"epoch {epoch.epoch}/{self._max_epochs} {self._told(epoch)}", flush=True)
        else:
            print(f"Iteration {epoch.epoch}, loss = {epoch.loss:.8f}")
            if not isnan(epoch.validation_score):
                print(f"Validation score: {epoch.validation_score:f}")

    def on_fit_end(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _told(self, epoch: Epoch) -> str:
        """Return losses, validation score, learning rate, epochs per second and the time left."""
        numbers = {
            "loss": f"{epoch.loss:.4g}",
            "val": f"{epoch.validation_loss:.4g}",
            "score": f"{epoch.validation_score:.3f}",
            "lr": f"{epoch.learning_rate:.3g}",
        }
        rate = (epoch.epoch - (self._before or 0)) / max(epoch.seconds, 1e-9)
        left = timedelta(seconds=round((self._max_epochs - epoch.epoch) / rate))
        told = [f"{name} {value}" for name, value in numbers.items() if value != "nan"]
        return " ".join([*told, f"{rate:.{0 if rate >= 10 else 2}f}/s", f"{left} left"])
