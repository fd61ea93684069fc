"""Preprocessing: from a table's columns to the network's numbers; stored with the model."""

from __future__ import annotations

import re
from typing import Any, Self

import numpy as np
import polars as pl
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.compose import ColumnTransformer
from sklearn.impute import MissingIndicator, SimpleImputer
from sklearn.model_selection import KFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler, TargetEncoder

from portable_mlp.estimators.columns import MOST_LEVELS, PERIODS, place_in

KINDS = {"number": pl.Float64, "boolean": pl.Boolean, "category": pl.String, "date": pl.Datetime}
"""The kinds of columns, and the polars dtype in which a model takes each."""

_FEW_ROWS = 20
_INDEX = r"Unnamed: [\d.]+|__index_level_\d+__"  # as pandas calls it
_DISTINCT = 0.95  # share of distinct values in a column that tells rows apart
_TARGETS = {None: "continuous", 2: "binary"}  # by the number of classes


def column_kinds(X: pl.DataFrame) -> dict[str, str]:
    """Return the kind of each column, a key of `KINDS`.

    Raises
    ------
    ValueError
        If a column holds anything else, such as lists; the message names it.
    """
    return {name: kind_of(name, dtype) for name, dtype in X.schema.items()}


def kind_of(name: str, dtype: Any) -> str:
    """Return the kind of a column of a polars dtype; raise a ValueError if there is none."""
    if dtype.is_numeric():
        return "number"
    kinds = {pl.Boolean: "boolean", pl.String: "category", pl.Null: "category"}
    kinds |= {pl.Date: "date", pl.Datetime: "date"}
    if dtype.base_type() not in kinds:
        raise ValueError(
            f"column {name!r} holds {dtype}: only numbers, text, booleans and dates can be used;"
            " remove or convert it"
        )
    return kinds[dtype.base_type()]


def useless_columns(X: pl.DataFrame) -> dict[str, str]:
    """Return the columns that carry no information, each with "all missing" or "constant"."""
    found = {}
    for name in X.columns:
        if X[name].null_count() == X.height:
            found[name] = "all missing"
        elif X[name].n_unique() == 1:
            found[name] = "constant"
    return found


def identifiers(X: pl.DataFrame, kinds: dict[str, str]) -> dict[str, str]:
    """Return the columns that tell rows apart rather than say something about them.

    These are texts that are different in nearly every row, and numbers of the rows without a
    name among columns with names, as a data frame's index is written.

    Parameters
    ----------
    X : polars.DataFrame
        All rows and columns of a table, in any order.
    kinds : dict
        Kinds of the columns that may be left out.
    """
    found = {}
    unnamed = [name for name in X.columns if re.fullmatch(r"column_\d+", name)]
    for name, kind in kinds.items():
        values = X[name].drop_nulls()
        if kind == "category" and len(values) >= _FEW_ROWS:
            if values.n_unique() >= _DISTINCT * len(values):
                found[name] = "different in nearly every row"
        elif kind == "number" and ([name] == unnamed or re.fullmatch(_INDEX, name)):
            steps = values.sort().diff().drop_nulls()
            if len(values) == X.height > 2 and (steps == 1).all():
                found[name] = "numbers the rows"
    return found


def make_preprocessing(
    X: pl.DataFrame,
    used: list[str],
    *,
    scale: bool,
    by_name: bool,
    n_classes: int | None = None,
    seed: int = 0,
) -> Any:
    """Return an unfitted transformer from a table to numbers.

    Missing numbers and booleans are replaced by the median.  If ``X`` has missing values in
    such a column, an additional column marks them.  Dates are encoded by `DateParts`.  Text is
    one-hot encoded.  Text of more than 64 different values is encoded by the mean target of
    each value as well, fitted out of fold.  All but the one-hot encoding is then scaled to mean
    0 and variance 1 if ``scale`` is set.

    Parameters
    ----------
    X : polars.DataFrame
        Rows to which the transformer will be fitted.
    used : list of str
        Names of the columns to keep.
    scale : bool
        Whether to standardise the numeric columns.
    by_name : bool
        Whether the transformer finds its columns by name, in a data frame, or by
        position, in an array.
    n_classes : int, optional
        Number of classes of the target; None for a regression.
    seed : int, default=0
        Seed of the folds for the mean targets.

    Returns
    -------
    sklearn.compose.ColumnTransformer
    """
    kinds = column_kinds(X)

    def scaled(*steps: Any) -> Any:
        return make_pipeline(*steps, *([StandardScaler()] if scale else []))

    numbers = [name for name in used if kinds[name] in ("number", "boolean")]
    texts = [name for name in used if kinds[name] == "category"]
    one_hot = OneHotEncoder(
        categories=[_frequent(X[name]) for name in texts],
        handle_unknown="ignore",
        sparse_output=False,
    )
    many = [name for name in texts if X[name].n_unique() > MOST_LEVELS]
    folds = KFold(5, shuffle=True, random_state=seed)
    means = TargetEncoder(target_type=_TARGETS.get(n_classes, "multiclass"), cv=folds)
    parts = {
        "numbers": (scaled(SimpleImputer(strategy="median")), numbers),
        "missing": (
            MissingIndicator(features="all"),
            [name for name in numbers if X[name].null_count()],
        ),
        "dates": (
            scaled(DateParts()),
            [name for name in used if kinds[name] == "date"],
        ),
        "categories": (one_hot, texts),
        "targets": (scaled(means), many),
    }
    at = {name: name if by_name else i for i, name in enumerate(X.columns)}
    return ColumnTransformer(
        [(part, how, [at[c] for c in columns]) for part, (how, columns) in parts.items() if columns]
    )


def _frequent(texts: pl.Series) -> list[str | None]:
    """Return the most frequent categories, sorted, with a missing value (None) last.

    These get a column each in the one-hot encoding.
    """
    counts = texts.alias("text").value_counts(name="n").sort("n", "text", descending=[True, False])
    found: list[str | None] = counts["text"].head(MOST_LEVELS).to_list()
    return sorted(found, key=lambda text: (text is None, text or ""))


class DateParts(TransformerMixin, BaseEstimator):
    """A transformer from dates to numbers.

    Each date becomes the days since 1970, the sine and cosine of its place in the year, the
    week and the day, and a mark.  The mark is 1 for a missing date, which is replaced by the
    median.

    Attributes
    ----------
    n_features_in_ : int
    medians_ : ndarray (n_features_in_,)
        Median of each column, in days since 1970.
    """

    def fit(self, X: Any, y: Any = None) -> Self:
        self.n_features_in_ = X.shape[1]
        self.medians_ = np.array([np.nanmedian(days) for days in self._days(X)])
        return self

    def transform(self, X: Any) -> NDArray[np.float64]:
        """Return eight columns for each column of X, a data frame; the last marks missing dates.

        Returns
        -------
        ndarray (n, 8 * n_features_in_)
        """
        parts = []
        for days, median in zip(self._days(X), self.medians_, strict=True):
            missing = np.isnan(days)
            filled = np.where(missing, median, days)
            parts.append(filled)
            for period in PERIODS:
                parts += place_in(filled, period)
            parts.append(missing)
        return np.column_stack(parts)

    def _days(self, X: Any) -> list[NDArray[np.float64]]:
        seconds = [np.asarray(X[name]).astype("datetime64[s]") for name in X.columns]
        return [(s - np.datetime64(0, "s")) / np.timedelta64(1, "D") for s in seconds]


def model_input(X: pl.DataFrame, by_name: bool) -> Any:
    """Return a table as a model takes it: by names, or as a float64 array without names.

    Booleans are numbers, for a missing one is NaN then.
    """
    X = X.with_columns(pl.col(pl.Boolean).cast(pl.Float64))
    return X if by_name else X.to_numpy().astype(np.float64, copy=False)
