"""Evaluation of predictions: the metrics that reports and the command line show."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray
from sklearn import metrics
from sklearn.calibration import calibration_curve

from portable_mlp.preprocessing import model_input

_REPEATS = 5
_BUDGET = 2**17  # rows × columns whose importance is measured
_NUMBERS = 2**20  # numbers that are predicted at once
_MOST_SECONDS = 20.0
_LONG = 2.0  # seconds that are announced


class Bin(NamedTuple):
    """Mean predicted probability and observed frequency of rows with similar probabilities."""

    predicted: float
    observed: float


@dataclass(frozen=True)
class Evaluation:
    """Predictions together with the true targets.

    Attributes
    ----------
    y, predicted : ndarray (n_samples,)
        True and predicted targets.
    classes : ndarray or None
        None for a regression.
    probabilities : ndarray (n_samples, n_classes) or None
        None for a regression.
    """

    y: NDArray[Any]
    predicted: NDArray[Any]
    classes: NDArray[Any] | None
    probabilities: NDArray[Any] | None

    def scores(self) -> dict[str, float]:
        """Return metrics over all rows, by name; the first is the main one."""
        y, predicted = self.y, self.predicted
        if self.classes is None:
            return {
                "R²": float(metrics.r2_score(y, predicted)),
                "mean absolute error": float(metrics.mean_absolute_error(y, predicted)),
                "root mean squared error": float(metrics.root_mean_squared_error(y, predicted)),
                "median absolute error": float(metrics.median_absolute_error(y, predicted)),
            }
        found = {
            "accuracy": float(metrics.accuracy_score(y, predicted)),
            "balanced accuracy": float(
                np.mean([row["recall"] for row in self.by_class() if row["rows"]])
            ),
            "log loss": float(metrics.log_loss(y, self._float64(), labels=self.classes)),
        }
        if len(self.classes) == 2 and len(np.unique(y)) == 2:
            found["ROC AUC"] = float(metrics.roc_auc_score(y, self._float64()[:, 1]))
        return found

    def _float64(self) -> NDArray[np.float64]:
        p = np.asarray(self.probabilities, np.float64)
        normalised: NDArray[np.float64] = p / p.sum(axis=1, keepdims=True)
        return normalised

    def by_class(self) -> list[dict[str, Any]]:
        """Return precision, recall, F1 and the number of rows of each class."""
        columns = metrics.precision_recall_fscore_support(
            self.y, self.predicted, labels=self.classes, zero_division=0.0
        )
        names = "precision", "recall", "F1", "rows"
        assert self.classes is not None
        return [
            {"class": str(label), **dict(zip(names, row, strict=True))}
            for label, *row in zip(self.classes, *(c.tolist() for c in columns), strict=True)
        ]

    def confusion(self) -> NDArray[np.int64]:
        """Return the confusion matrix: true classes down the rows, predicted across the columns."""
        counts: NDArray[np.int64] = metrics.confusion_matrix(
            self.y, self.predicted, labels=self.classes
        )
        return counts

    def calibration(self) -> list[Bin]:
        """Return a calibration curve: predicted against observed frequencies in ten quantiles.

        With two classes, the probabilities are those of the second class.  With more, they are
        those of the predicted class.
        """
        p = self._float64()
        assert self.classes is not None
        if len(self.classes) == 2:
            true, p = self.y == self.classes[1], p[:, 1]
        else:
            true, p = self.y == self.predicted, p.max(axis=1)
        observed, predicted = calibration_curve(true, p, n_bins=10, strategy="quantile")
        return [Bin(*pair) for pair in zip(predicted.tolist(), observed.tolist(), strict=True)]


def evaluate(model: Any, X: pl.DataFrame, y: NDArray[Any], *, by_name: bool) -> Evaluation:
    """Predict X with a model, and return the predictions together with y."""
    given = model_input(X, by_name)
    if not hasattr(model, "predict_proba"):
        return Evaluation(np.asarray(y, np.float64), model.predict(given), None, None)
    return Evaluation(y, model.predict(given), model.classes_, model.predict_proba(given))


class Importance(NamedTuple):
    """Mean and standard deviation of the drop in score when a column is shuffled."""

    column: str
    mean: float
    std: float


def importances(
    model: Any,
    X: pl.DataFrame,
    y: NDArray[Any],
    columns: list[str],
    *,
    by_name: bool,
    seed: int,
    say: Callable[[str], None],
) -> list[Importance]:
    """Return the permutation importance of the columns, the largest first.

    To bound the time, large tables are evaluated on their first rows only.  When the time is up,
    a column is shuffled less often, or is left out.

    Parameters
    ----------
    model : estimator
    X : polars.DataFrame
    y : ndarray (n_samples,)
    columns : list of str
        Names of the columns that the model uses.
    by_name : bool
        Whether the model finds its columns by name, rather than by position.
    seed : int
        Seed of the shuffles.
    say : callable
        Function that is called with a message if this takes long.
    """
    rows = min(X.height, max(200, _BUDGET // X.width))
    X, y = X[:rows], y[:rows]
    rng = np.random.RandomState(seed)
    metric = metrics.accuracy_score if hasattr(model, "classes_") else metrics.r2_score
    at_once = max(1, _NUMBERS // (rows * X.width))
    groups = [columns[i : i + at_once] for i in range(0, len(columns), at_once)]

    def scores(tables: list[pl.DataFrame]) -> list[float]:
        predicted = model.predict(model_input(pl.concat(tables), by_name))
        return [float(metric(y, own)) for own in np.split(predicted, len(tables))]

    began = time.perf_counter()
    whole = scores([X] * len(groups[0]))[0]
    expected = (time.perf_counter() - began) * len(groups) * _REPEATS
    if expected > _LONG:
        say(
            f"importance of {len(columns)} columns: {min(expected, _MOST_SECONDS):.0f} s"
            " (--no-importance leaves it out)"
        )
    drops: dict[str, list[float]] = {}
    for group in groups * _REPEATS:
        if drops and time.perf_counter() - began > _MOST_SECONDS:
            break
        shuffled = [X.with_columns(X[name].gather(rng.permutation(rows))) for name in group]
        for name, score in zip(group, scores(shuffled), strict=True):
            drops.setdefault(name, []).append(whole - score)
    found = [Importance(name, float(np.mean(d)), float(np.std(d))) for name, d in drops.items()]
    return sorted(found, key=lambda i: -i.mean)
