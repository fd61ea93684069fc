"""The end of a packed fit whose last wave of the learning rate would bring nothing."""

from __future__ import annotations

from collections.abc import Callable
from math import inf, isnan

from portable_mlp.callbacks import Callback, Epoch
from portable_mlp.typing import Array

_PROGRESS = 0.98  # factor on the error, above which a wave brought nothing


class Waves(Callback):
    """A stop at the end of the third of four waves of the learning rate, if it brought nothing.

    The waves end after 1, 3, 7 and 15 fifteenths of the epochs.  If the error of held-out rows
    is not smaller in the third than before, by more than two percent, the members would only
    learn noise by heart in the longest one.

    Parameters
    ----------
    epochs : int
        Number of epochs of the fit.

    Attributes
    ----------
    second, third : int
        The last epochs of the second and the third wave.
    ended : bool
        Whether it has asked to stop.
    """

    def __init__(self, epochs: int) -> None:
        self.second, self.third = (round(epochs * i / 15) for i in (3, 7))
        self._before = self._since = inf
        self.ended = False

    def on_epoch_end(self, epoch: Epoch, params: Callable[[], list[Array]]) -> bool | None:
        error = inf if isnan(epoch.validation_score) else -epoch.validation_score
        if epoch.epoch <= self.second:
            self._before = min(self._before, error)
        else:
            self._since = min(self._since, error)
        if epoch.epoch == self.third > self.second:
            self.ended = self._since > _PROGRESS * self._before
        return self.ended
