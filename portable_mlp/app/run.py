"""The result of a training run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sklearn.pipeline import make_pipeline

from portable_mlp import MLPRegressor
from portable_mlp.app.dataset import Dataset
from portable_mlp.app.evaluation import Evaluation, Importance
from portable_mlp.app.settings import Settings
from portable_mlp.backends import is_out_of_memory
from portable_mlp.callbacks import Callback, Epoch
from portable_mlp.losses import LOSSES
from portable_mlp.typing import Array


@dataclass(frozen=True)
class Trained:
    """A trained model.

    Attributes
    ----------
    preprocessing : transformer or None
        None if the model takes the table as it is.
    estimator : estimator
    history : list of Epoch
    kept : int or None
        The epoch whose weights were kept, by held-out rows; None without these.
    interrupted : bool
        Whether the user ended training.
    """

    preprocessing: Any
    estimator: Any
    history: list[Epoch]
    kept: int | None
    interrupted: bool

    @property
    def model(self) -> Any:
        """The preprocessing and the estimator in one."""
        if self.preprocessing is None:
            return self.estimator
        return make_pipeline(self.preprocessing, self.estimator)


@dataclass(frozen=True)
class Run:
    """Result of a training run, as the report shows it."""

    settings: Settings
    data: Dataset
    trained: Trained
    training: Evaluation
    test: Evaluation
    importances: list[Importance]
    seconds: float

    @property
    def history(self) -> list[Epoch]:
        """The epochs of training; none of L-BFGS."""
        return self.trained.history

    @property
    def training_rows(self) -> str:
        """How the training rows were predicted for their scores."""
        return "in training" if self.settings.model == "plain" else "out of fold"

    @property
    def scaled_target(self) -> bool:
        """Whether the network was trained on a scaled target."""
        return scales_target(self.settings, self.data)


class History(Callback):
    """Callback that collects all epochs, and those before a checkpoint.

    Attributes
    ----------
    fits : list of lists of Epoch
        The epochs of each fit: a model for tables may begin anew without some columns.
    """

    def __init__(self, before: Sequence[Epoch] = ()) -> None:
        self._before = list(before)
        self.fits = [list(before)]

    @property
    def epochs(self) -> list[Epoch]:
        """The epochs of the last fit."""
        return self.fits[-1]

    def on_fit_begin(self, max_epochs: int) -> None:
        self.fits.append(list(self._before))

    def on_epoch_end(self, epoch: Epoch, params: Callable[[], list[Array]]) -> None:
        self.epochs.append(epoch)


@contextmanager
def named_shortage(hint: str) -> Iterator[None]:
    """Turn out-of-memory errors in training into a MemoryError that says what to do."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryError(f"out of memory in training: {hint}") from error


def scales_target(settings: Settings, data: Dataset) -> bool:
    """Tell whether the target of a regression is scaled.

    The output layer can undo the scaling only if the loss has the identity as its link.  A loss
    that takes no negative targets cannot take scaled ones.
    """
    if data.classify or not settings.scaling or settings.model != "plain":
        return False
    loss = LOSSES[settings.loss or MLPRegressor().loss]
    return loss.link_name == "identity" and not loss.nonnegative
