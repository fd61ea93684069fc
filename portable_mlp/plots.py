"""Pictures of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def plot_learning_curve(model: Any, path: str | Path) -> Path:
    """Write the loss, and the validation score if there is one, over epochs as a PNG.

    Parameters
    ----------
    model : MLPClassifier or MLPRegressor
        Fitted by any solver but "lbfgs", which keeps no curve.
    path : path
        Overwritten.

    Returns
    -------
    Path

    Raises
    ------
    ModuleNotFoundError
        If matplotlib is missing; the message names what to install.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "plots need matplotlib: pip install 'portable_mlp[plot]'"
        ) from error

    figure = Figure(figsize=(7.0, 4.0), layout="constrained")
    axes = figure.subplots()
    epochs = range(1, len(model.loss_curve_) + 1)
    axes.plot(epochs, model.loss_curve_, color="C0", marker="." if len(epochs) < 30 else "")
    low, high = min(model.loss_curve_), max(model.loss_curve_)
    axes.set(xlabel="epoch", yscale="log" if 0 < 10 * low < high else "linear")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("training loss", color="C0")
    if model.validation_scores_ is not None:
        right = axes.twinx()
        right.plot(epochs, model.validation_scores_, color="C1")
        right.set_ylabel("validation score", color="C1")
    axes.grid(alpha=0.3)
    path = Path(path)
    figure.savefig(path, dpi=150)
    return path
