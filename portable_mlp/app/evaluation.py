"""Evaluation of predictions: the metrics that reports and the command line show."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray
from sklearn import metrics
from sklearn.calibration import calibration_curve
from sklearn.inspection import permutation_importance

from portable_mlp.preprocessing import model_input

_REPEATS = 5
# Limits on the cost of the permutation importance, in rows × columns that are predicted
_BUDGET = 2**17  # for one shuffled column
_BUDGET_OF_ALL = 2**29  # for all shuffled columns and all repeats
_OVERHEAD = 300  # fixed cost of a prediction, expressed in rows


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
    model: Any, X: pl.DataFrame, y: NDArray[Any], columns: list[str], *, by_name: bool, seed: int
) -> list[Importance]:
    """Return the permutation importance of the columns, the largest first.

    To bound the time, large tables are evaluated on their first rows only, and very wide
    ones on their first columns only.
    """
    n = min(X.height, max(200, _BUDGET // X.width))
    columns = columns[: max(1, _BUDGET_OF_ALL // (_REPEATS * (n + _OVERHEAD) * X.width))]
    order = np.arange(n)

    def score(model: Any, rows: NDArray[np.intp], y: NDArray[Any]) -> float:
        # scikit-learn shuffles a matrix of row indices, whose columns stand for those of X;
        # gathering by these indices keeps each column's dtype
        shuffled = X[:n].with_columns(
            pl.col(name).gather(rows[:, i])
            for i, name in enumerate(columns)
            if not np.array_equal(rows[:, i], order)
        )
        return float(model.score(model_input(shuffled, by_name), y))

    numbers = np.repeat(order[:, None], len(columns), axis=1)  # (rows, columns)
    found = permutation_importance(
        model, numbers, y[:n], scoring=score, n_repeats=_REPEATS, random_state=seed
    )
    named = zip(columns, found.importances_mean, found.importances_std, strict=True)
    return sorted((Importance(c, float(m), float(s)) for c, m, s in named), key=lambda i: -i.mean)
