"""From a table's columns to numbers: what stands before the network, fitted and stored with it."""

from __future__ import annotations

from math import inf
from typing import Any, Self

import numpy as np
import polars as pl
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.compose import ColumnTransformer
from sklearn.impute import MissingIndicator, SimpleImputer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

KINDS = {"number": pl.Float64, "boolean": pl.Boolean, "category": pl.String, "date": pl.Datetime}
"""What a column can be, and the type that a model takes it in."""

_MOST = 1e150  # its square is finite
_MAX_CATEGORIES = 64  # the rarer ones of a column are all zeros, as unknown ones are


def column_kinds(X: pl.DataFrame) -> dict[str, str]:
    """Return the kind of each column, a key of `KINDS`.

    Raises
    ------
    ValueError
        If a column holds anything else, such as lists; the message names it.
    """
    return {name: _kind(name, dtype) for name, dtype in X.schema.items()}


def _kind(name: str, dtype: Any) -> str:
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
    """Columns that tell rows apart in no way, and why: "all missing" or "constant"."""
    found = {}
    for name in X.columns:
        if X[name].null_count() == X.height:
            found[name] = "all missing"
        elif X[name].n_unique() == 1:
            found[name] = "constant"
    return found


def nearly_numbers(X: pl.DataFrame) -> dict[str, list[str]]:
    """Columns of text that is numbers but for one value in ten or fewer; the first few of those."""
    found = {}
    for name, dtype in X.schema.items():
        if dtype == pl.String:
            other = X[name].cast(pl.Float64, strict=False).is_null() & X[name].is_not_null()
            n_values = X.height - X[name].null_count()
            if 0 < 10 * other.sum() <= n_values:
                found[name] = X[name].filter(other).unique(maintain_order=True).head(3).to_list()
    return found


def check_finite(X: pl.DataFrame) -> None:
    """Raise a ValueError that names a column with values that are infinite, or nearly so."""
    for name, dtype in X.schema.items():
        largest: Any = X[name].drop_nans().abs().max() if dtype.is_float() else None
        if largest == inf:
            raise ValueError(f"column {name!r} has infinite values")
        if largest is not None and largest > _MOST:
            raise ValueError(f"column {name!r} has values beyond {_MOST:g}, too large to scale")


def make_preprocessing(X: pl.DataFrame, used: list[str], *, scale: bool, by_name: bool) -> Any:
    """Return a transformer, not fitted, from a table to numbers.

    Numbers and booleans are scaled to mean 0 and variance 1, missing ones set to the
    median and marked in a column of their own; text is one-hot encoded; dates become
    days, and the time of the year, week and day as points on circles.

    Parameters
    ----------
    X : polars.DataFrame
        The rows to fit it to.
    used : list of str
        The columns to keep.
    scale : bool
    by_name : bool
        Whether the transformer finds its columns by name, in a data frame, or by
        position, in an array.
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
    }
    at = {name: name if by_name else i for i, name in enumerate(X.columns)}
    return ColumnTransformer(
        [(part, how, [at[c] for c in columns]) for part, (how, columns) in parts.items() if columns]
    )


def _frequent(texts: pl.Series) -> list[str | None]:
    """Return the categories that get a place of their own, missing among them; in order."""
    counts = texts.value_counts(name="n").sort("n", texts.name, descending=[True, False])
    found: list[str | None] = counts[texts.name].head(_MAX_CATEGORIES).to_list()
    return sorted(found, key=lambda text: (text is None, text or ""))


class DateParts(TransformerMixin, BaseEstimator):
    """Dates as numbers: days since 1970, and the time of year, week and day on circles.

    A missing one is set to the median, and marked.
    """

    PERIODS = 365.2425, 7.0, 1.0

    def fit(self, X: Any, y: Any = None) -> Self:
        self.n_features_in_ = X.shape[1]
        self.medians_ = np.array([np.nanmedian(days) for days in self._days(X)])
        return self

    def transform(self, X: Any) -> NDArray[np.float64]:
        """Eight columns for each of X, a data frame; the last marks the missing."""
        parts = []
        for days, median in zip(self._days(X), self.medians_, strict=True):
            missing = np.isnan(days)
            filled = np.where(missing, median, days)
            parts.append(filled)
            for period in self.PERIODS:
                # Whole turns off: else the noise of their sines would be scaled up
                angle = 2 * np.pi * (filled / period % 1.0)
                parts += [np.sin(angle), np.cos(angle)]
            parts.append(missing)
        return np.column_stack(parts)

    def _days(self, X: Any) -> list[NDArray[np.float64]]:
        seconds = [np.asarray(X[name]).astype("datetime64[s]") for name in X.columns]
        return [(s - np.datetime64(0, "s")) / np.timedelta64(1, "D") for s in seconds]


def model_input(X: pl.DataFrame, by_name: bool) -> Any:
    """Return a table as a model takes it: as it is, or as an array whose columns have no names."""
    return X if by_name else X.to_numpy().astype(np.float64, copy=False)
