"""Plots of training."""

from __future__ import annotations

from collections.abc import Sequence
from math import isnan
from typing import Any, Self


class LossCurveDisplay:
    """A plot of the losses, and of the validation score if there is one, over the epochs.

    Like scikit-learn's displays, it is created by `from_estimator`.

    Parameters
    ----------
    loss_curve : sequence of float
        Training loss of each epoch.
    validation_loss_curve, validation_scores : sequence of float, optional
        Loss and score of the validation set for each epoch.

    Attributes
    ----------
    ax_ : matplotlib Axes
        Axes of the losses.
    score_ax_ : matplotlib Axes or None
        Axes of the scores, on the right; None without scores.
    figure_ : matplotlib Figure
    lines_ : list of matplotlib Line2D
    """

    def __init__(
        self,
        loss_curve: Sequence[float],
        validation_loss_curve: Sequence[float] | None = None,
        validation_scores: Sequence[float] | None = None,
    ) -> None:
        self.loss_curve = loss_curve
        self.validation_loss_curve = validation_loss_curve
        self.validation_scores = validation_scores

    @classmethod
    def from_estimator(cls, estimator: Any, *, ax: Any = None) -> Self:
        """Draw the curves of a fitted estimator.

        Parameters
        ----------
        estimator : estimator of this library
            Fitted; not by the solver "lbfgs", which keeps no curve.
        ax : matplotlib Axes, optional
            Axes to draw into; those of a new pyplot figure if not given.

        Returns
        -------
        LossCurveDisplay

        Raises
        ------
        ValueError
            If the estimator has no loss curve.
        ModuleNotFoundError
            If matplotlib is missing; the message names what to install.
        """
        if not getattr(estimator, "loss_curve_", None):
            raise ValueError(
                f"{estimator!r} has no loss curve: fit it, by another solver than lbfgs"
            )
        curves = (
            estimator.loss_curve_,
            estimator.validation_loss_curve_,
            getattr(estimator, "validation_scores_", None),
        )
        return cls(*curves).plot(ax=ax)

    def plot(self, *, ax: Any = None) -> Self:
        """Draw the curves into ``ax``, or into a new pyplot figure; return the display itself.

        The losses have a logarithmic scale if they are positive and span more than a decade.
        """
        _matplotlib()
        from matplotlib.ticker import MaxNLocator

        if ax is None:
            from matplotlib import pyplot

            ax = pyplot.subplots()[1]
        epochs = range(1, len(self.loss_curve) + 1)
        dots = "." if len(epochs) < 30 else ""
        held_out = self.validation_loss_curve
        label = "training" if held_out is not None else None
        self.lines_ = ax.plot(epochs, self.loss_curve, "C0", marker=dots, label=label)
        if held_out is not None:
            # Some epochs have no value: the line goes on over them
            known = [(i, v) for i, v in zip(epochs, held_out, strict=True) if not isnan(v)]
            x, y = zip(*known, strict=True) if known else ((), ())
            self.lines_ += ax.plot(x, y, "C2", marker=dots, label="validation")
            ax.legend()
        low, high = min(self.loss_curve), max(self.loss_curve)
        ax.set(xlabel="epoch", yscale="log" if 0 < 10 * low < high else "linear")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set_ylabel("training loss" if held_out is None else "loss", color="C0")
        ax.grid(alpha=0.3)
        self.score_ax_ = None
        if self.validation_scores is not None:
            self.score_ax_ = ax.twinx()
            self.lines_ += self.score_ax_.plot(epochs, self.validation_scores, "C1", marker=dots)
            self.score_ax_.set_ylabel("validation score", color="C1")
        self.ax_, self.figure_ = ax, ax.figure
        return self


def figure(**options: Any) -> Any:
    """Return a matplotlib Figure made without pyplot, which would keep a reference to it.

    Raises
    ------
    ModuleNotFoundError
        If matplotlib is missing; the message names what to install.
    """
    return _matplotlib().Figure(**options)


def _matplotlib() -> Any:
    try:
        from matplotlib import figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "plots need matplotlib: pip install 'portable_mlp[plot]'"
        ) from error
    return figure
