"""Tables: from a CSV file or a bundled data set to columns and a target."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_MISSING = ["", "NA", "N/A", "NaN", "nan", "null"]

BUNDLED = ("digits", "breast_cancer", "iris", "wine", "diabetes")
"""Data sets that ship with scikit-learn; the last is a regression."""


def load_bundled(name: str) -> tuple[Any, NDArray[Any]]:
    """A data set of `BUNDLED` as (X, y)."""
    import sklearn.datasets

    X, y = getattr(sklearn.datasets, f"load_{name}")(return_X_y=True)
    return X, y


def read_csv(path: str | Path, target: str | int = -1) -> tuple[Any, NDArray[Any]]:
    """Read a CSV file and split off the target column.

    Columns are separated by commas, semicolons or tabs, whatever the first line has most
    of.  The first line is a header unless all of its fields but the target's are numbers.
    Empty fields and NA, N/A, NaN, nan, null are missing values.

    Parameters
    ----------
    path : path
    target : str or int, default=-1
        Name, or position (from the end if negative), of the target's column.

    Returns
    -------
    X : polars.DataFrame
    y : ndarray (n_samples,)

    Raises
    ------
    ValueError
        If the file is empty or malformed, has no such column, or holds the target alone.
    """
    try:
        import polars as pl
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "reading CSV files needs polars: pip install 'portable_mlp[cli]'"
        ) from error

    with open(path, newline="", encoding="utf-8-sig") as file:
        line = file.readline()
    if not line.strip():
        raise ValueError(f"{path} is empty, or begins with an empty line")
    separator = max(",;\t", key=line.count)
    first = next(csv.reader([line], delimiter=separator))
    skip = target % len(first) if isinstance(target, int) and -len(first) <= target else None
    has_header = isinstance(target, str) or not all(
        _is_number(field) for i, field in enumerate(first) if i != skip
    )
    try:
        table = pl.read_csv(
            path,
            separator=separator,
            has_header=has_header,
            null_values=_MISSING,
            infer_schema_length=None,
        )
    except pl.exceptions.PolarsError as error:
        raise ValueError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    if table.height == 0:
        raise ValueError(f"{path} has a header and no rows")
    if isinstance(target, int):
        if not -table.width <= target < table.width:
            raise ValueError(f"{path} has {table.width} columns; there is no column {target}")
        target = table.columns[target]
    if target not in table.columns:
        raise ValueError(f"{path} has no column {target!r}; it has: {', '.join(table.columns)}")
    if table.width < 2:
        raise ValueError(
            f"{path} holds the target {target!r} alone: there is nothing to learn from"
        )
    y = table[target]
    if y.null_count():
        raise ValueError(f"{path}: the target {target!r} is missing in {y.null_count()} rows")
    values: NDArray[Any] = y.to_numpy()
    if values.dtype.kind == "O":
        values = values.astype(str)
    return table.drop(target), values


def _is_number(field: str) -> bool:
    try:
        float(field or "nan")
    except ValueError:
        return False
    return True


def make_preprocessing(X: Any, dtype: str) -> Any:
    """A transformer, not fitted, from a table to scaled numbers.

    Numbers are scaled to mean 0 and variance 1, missing ones set to the median;
    everything else is one-hot encoded.

    Parameters
    ----------
    X : ndarray or polars.DataFrame
    dtype : {"float32", "float64"}
        Of the result.
    """
    from sklearn.compose import make_column_transformer
    from sklearn.impute import SimpleImputer
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    def scale() -> Any:
        return make_pipeline(SimpleImputer(strategy="median"), StandardScaler())

    if isinstance(X, np.ndarray):
        return make_pipeline(scale())
    numbers = [name for name, kind in X.schema.items() if kind.is_numeric()]
    others = [name for name in X.columns if name not in numbers]
    one_hot = OneHotEncoder(handle_unknown="ignore", sparse_output=False, dtype=dtype)
    return make_column_transformer((scale(), numbers), (one_hot, others))
