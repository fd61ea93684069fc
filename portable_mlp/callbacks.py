"""What watches training: a protocol of no-op hooks, and the progress display."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from math import isnan, nan
from typing import Any, NamedTuple

from portable_mlp.typing import Array


class Epoch(NamedTuple):
    """One line of a training history.

    Attributes
    ----------
    epoch : int
        From 1.
    loss : float
        Mean over the epoch's rows of what was minimised, the penalty included.
    validation_loss : float
        Mean over held-out rows, without the penalty; NaN without such rows.
    validation_score : float
        Of held-out rows, higher is better; NaN without such rows.
    learning_rate : float
        In the epoch's last step.
    seconds : float
        Since training began.
    """

    epoch: int
    loss: float
    validation_loss: float = nan
    validation_score: float = nan
    learning_rate: float = nan
    seconds: float = nan


class Callback:
    """Hooks of the training loop; override what is needed."""

    def on_fit_begin(self, max_epochs: int) -> None:
        """Before the first epoch; ``max_epochs`` is the number that the last one may have."""

    def on_epoch_begin(self, epoch: int) -> None:
        """Before each epoch, counted from 1 (each iteration of L-BFGS)."""

    def on_epoch_end(self, epoch: Epoch, params: Callable[[], list[Array]]) -> bool | None:
        """After each epoch (each iteration of L-BFGS).

        Parameters
        ----------
        epoch : Epoch
        params : callable
            Returns copies of the network's current parameters.

        Returns
        -------
        bool, optional
            True to stop training.
        """
        return None

    def wants_pause(self) -> bool:
        """Whether to halt for `on_pause`: asked after each step (JAX: after many), not by L-BFGS.

        True until `on_pause` has been called.
        """
        return False

    def on_pause(self, model: Callable[[], Any]) -> None:
        """Between two steps, where a callback wanted it, or because of Ctrl-C.

        Parameters
        ----------
        model : callable
            Returns the estimator as it would be had training ended here: a view of
            arrays that the next step overwrites.
        """

    def on_fit_end(self) -> None:
        """After the last epoch, whatever ended it."""


def pausing(callbacks: Sequence[Callback]) -> list[Callback]:
    """Those that may want a pause."""
    return [c for c in callbacks if type(c).wants_pause is not Callback.wants_pause]


class Progress(Callback):
    """A progress bar on a terminal, plain lines anywhere else.

    Parameters
    ----------
    full : bool, default=False
        Whether lines tell what the bar does; else they are scikit-learn's.
    """

    def __init__(self, full: bool = False) -> None:
        from rich.console import Console

        self._console = Console()
        self._full = full
        self._bar: Any = None
        self._before: int | None = None

    def on_fit_begin(self, max_epochs: int) -> None:
        self._max_epochs = max_epochs
        if not self._console.is_terminal:
            return
        from rich.progress import BarColumn, Progress, TextColumn

        # The bar takes the room that the text leaves
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
            self._before = epoch - 1  # not 0 where training goes on

    def on_epoch_end(self, epoch: Epoch, params: Callable[[], list[Array]]) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=epoch.epoch, description=self._told(epoch))
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
        """Losses, validation score, learning rate, epochs a second, and the time left."""
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
