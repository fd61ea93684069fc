"""From a table's columns to numbers: what stands before the network, fitted and stored with it."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
import polars as pl
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.compose import ColumnTransformer
from sklearn.impute import SimpleImputer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

KINDS = {"number": pl.Float64, "boolean": pl.Boolean, "category": pl.String, "date": pl.Datetime}
"""What a column can be, and the type that a model takes it in."""

_MAX_CATEGORIES = 64  # the rarest of a column share one place


def column_kinds(X: pl.DataFrame) -> dict[str, str]:
    """The kind of each column, a key of `KINDS`.

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


def check_finite(X: pl.DataFrame) -> None:
    """Raise a ValueError that names a column with infinite values."""
    for name, dtype in X.schema.items():
        if dtype.is_float() and X[name].is_infinite().any():
            raise ValueError(f"column {name!r} has infinite values")


def make_preprocessing(
    kinds: dict[str, str], used: list[str], *, scale: bool, by_name: bool
) -> Any:
    """A transformer, not fitted, from a table to numbers.

    Numbers and booleans are scaled to mean 0 and variance 1, missing ones set to the
    median and marked in a column of their own; text is one-hot encoded; dates become
    days, and the time of the year, week and day as points on circles.

    Parameters
    ----------
    kinds : dict
        Of all columns, in their order.
    used : list of str
        The columns to keep.
    scale : bool
    by_name : bool
        Whether the transformer finds its columns by name, in a data frame, or by
        position, in an array.
    """
    columns = {name: name if by_name else i for i, name in enumerate(kinds)}

    def of(*wanted: str) -> list[Any]:
        return [columns[name] for name in used if kinds[name] in wanted]

    def numbers(*before: Any) -> Any:
        imputer = SimpleImputer(strategy="median", add_indicator=True)
        return make_pipeline(*before, imputer, *([StandardScaler()] if scale else []))

    one_hot = OneHotEncoder(
        handle_unknown="infrequent_if_exist",
        max_categories=_MAX_CATEGORIES,
        sparse_output=False,
    )
    parts = [
        ("numbers", numbers(), of("number", "boolean")),
        ("dates", numbers(DateParts()), of("date")),
        ("categories", one_hot, of("category")),
    ]
    return ColumnTransformer([part for part in parts if part[2]])


class DateParts(TransformerMixin, BaseEstimator):
    """Dates as numbers: days since 1970, and the time of year, week and day on circles."""

    _PERIODS = 365.2425, 7.0, 1.0

    def fit(self, X: Any, y: Any = None) -> Self:
        self.n_features_in_ = X.shape[1]
        return self

    def transform(self, X: Any) -> NDArray[np.float64]:
        """Seven columns for each of X, a data frame; NaN where a date is missing."""
        parts = []
        for name in X.columns:
            seconds = np.asarray(X[name]).astype("datetime64[s]")
            days = (seconds - np.datetime64(0, "s")) / np.timedelta64(1, "D")
            parts.append(days)
            for period in self._PERIODS:
                parts += [np.sin(2 * np.pi * days / period), np.cos(2 * np.pi * days / period)]
        return np.column_stack(parts)


def model_input(X: pl.DataFrame, by_name: bool) -> Any:
    """A table as a model takes it: as it is, or as an array whose columns have no names."""
    return X if by_name else X.to_numpy().astype(np.float64, copy=False)
