"""How good predictions are: the numbers that reports and the command line show."""

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
_BUDGET = 2**17  # rows times columns that are predicted in a repeat of the importance
_BUDGET_OF_ALL = 2**29  # in all repeats, for all columns
_OVERHEAD = 300  # what a column costs beside its rows, in rows


class Bin(NamedTuple):
    """Predictions of about the same probability."""

    predicted: float
    observed: float


@dataclass(frozen=True)
class Evaluation:
    """Predictions beside the truth.

    Attributes
    ----------
    y, predicted : ndarray (n_samples,)
    classes : ndarray or None
        None for a regression.
    probabilities : ndarray (n_samples, n_classes) or None
    """

    y: NDArray[Any]
    predicted: NDArray[Any]
    classes: NDArray[Any] | None
    probabilities: NDArray[Any] | None

    def scores(self) -> dict[str, float]:
        """Numbers for the whole, by name; the first is the one to look at."""
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
        """Precision, recall, F1 and the number of rows of each class."""
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
        """Rows of each class (downwards) by what was predicted (across)."""
        counts: NDArray[np.int64] = metrics.confusion_matrix(
            self.y, self.predicted, labels=self.classes
        )
        return counts

    def calibration(self) -> list[Bin]:
        """Probabilities in tenths of the rows, and how often they came true.

        Of the second class if there are two, and of the predicted one if there are more.
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
    """Predict, and put the truth beside it."""
    given = model_input(X, by_name)
    if not hasattr(model, "predict_proba"):
        return Evaluation(np.asarray(y, np.float64), model.predict(given), None, None)
    return Evaluation(y, model.predict(given), model.classes_, model.predict_proba(given))


class Importance(NamedTuple):
    """How much a score falls when a column's values are shuffled."""

    column: str
    mean: float
    std: float


def importances(
    model: Any, X: pl.DataFrame, y: NDArray[Any], columns: list[str], *, by_name: bool, seed: int
) -> list[Importance]:
    """Permutation importance of some columns, the largest first.

    Of wide tables, the first rows alone are looked at; of very wide ones, the first columns.
    """
    n = min(X.height, max(200, _BUDGET // X.width))
    columns = columns[: max(1, _BUDGET_OF_ALL // (_REPEATS * (n + _OVERHEAD) * X.width))]
    order = np.arange(n)

    def score(model: Any, rows: NDArray[np.intp], y: NDArray[Any]) -> float:
        # scikit-learn shuffles row numbers; each column is read in its own order
        shuffled = X[:n].with_columns(
            pl.col(name).gather(rows[:, i])
            for i, name in enumerate(columns)
            if not np.array_equal(rows[:, i], order)
        )
        return float(model.score(model_input(shuffled, by_name), y))

    numbers = np.repeat(order[:, None], len(columns), axis=1)
    found = permutation_importance(
        model, numbers, y[:n], scoring=score, n_repeats=_REPEATS, random_state=seed
    )
    named = zip(columns, found.importances_mean, found.importances_std, strict=True)
    return sorted((Importance(c, float(m), float(s)) for c, m, s in named), key=lambda i: -i.mean)
