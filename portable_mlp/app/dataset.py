"""The data set of a run: reads the rows, checks them, and splits them for training and test."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import file_digest
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from sklearn.model_selection import train_test_split
from sklearn.utils.multiclass import type_of_target

from portable_mlp.app.settings import Settings
from portable_mlp.app.table import (
    PENGUINS,
    bundled_table,
    is_array_file,
    read_table,
    split_target,
)
from portable_mlp.preprocessing import check_finite, column_kinds, useless_columns


@dataclass(frozen=True)
class Dataset:
    """Training and test rows.

    Attributes
    ----------
    X, X_test : polars.DataFrame
    y, y_test : ndarray
    target, target_kind : str
        Name of the target column, and its kind.
    kinds, dropped : dict
        From the columns' names to their kinds, and to why a column is not used.
    by_name : bool
        Whether the model finds its columns by name, rather than by position.
    digests : dict
        SHA-256 of each file, by path.
    classify : bool
        Whether the task is classification.
    """

    X: pl.DataFrame
    y: NDArray[Any]
    X_test: pl.DataFrame
    y_test: NDArray[Any]
    target: str
    target_kind: str
    kinds: dict[str, str]
    dropped: dict[str, str]
    by_name: bool
    digests: dict[str, str]
    classify: bool

    @property
    def used(self) -> list[str]:
        """The names of the columns that the model uses."""
        return [name for name in self.kinds if name not in self.dropped]


def read(settings: Settings) -> Dataset:
    """Read the rows that the settings name, and split them into training and test rows.

    Raises
    ------
    ValueError
        If the data are not suitable for training; the message says why.
    """
    if settings.data:
        source = ", ".join(map(str, settings.data))
        frame = read_table(settings.data, settings.target)
    else:
        source, frame = settings.dataset, bundled_table(settings.dataset)
    X, y, target = split_target(frame, settings.target, source)
    check_finite(X)
    classify = _is_classification(settings.task, y)
    if classify:
        _check_classes(target, y)
    elif y.dtype.kind not in "iufb":
        raise ValueError(f"the target {target!r} is no number: use --task classification")
    train, test = _split(settings, y, classify)
    kinds, dropped = column_kinds(X), useless_columns(X[train])
    if len(dropped) == len(kinds):
        raise ValueError(
            f"{source}: all columns are constant or empty: there is nothing to learn from"
        )
    return Dataset(
        X[train], y[train], X[test], y[test], target, column_kinds(frame)[target], kinds, dropped,
        by_name=_has_names(settings) or not {"category", "date"}.isdisjoint(kinds.values()),
        digests={str(path): _digest(path) for path in settings.data},
        classify=classify,
    )  # fmt: skip


def _has_names(settings: Settings) -> bool:
    if settings.data:
        return not any(map(is_array_file, settings.data))
    return settings.dataset == PENGUINS.stem


def _is_classification(task: str, y: NDArray[Any]) -> bool:
    if task != "auto":
        return task == "classification"
    few = y.dtype.kind in "iu" and len(np.unique(y)) <= 20
    return y.dtype.kind in "bUO" or few or type_of_target(y) == "binary"


def _check_classes(target: str, y: NDArray[Any]) -> None:
    classes, counts = np.unique(y, return_counts=True)
    if len(classes) < 2:
        raise ValueError(
            f"the target {target!r} has one class only, {classes[0]}: there is nothing to learn"
        )
    if counts.min() < 2:
        raise ValueError(
            f"the target {target!r} has a class of one row, {classes[counts.argmin()]}: there"
            " have to be two at least, to train and to test on"
        )


def _split(settings: Settings, y: NDArray[Any], classify: bool) -> tuple[Any, Any]:
    """Return the indices of the training rows and of the test rows."""
    said = f"--test-fraction {settings.test_fraction} of {len(y)} rows"
    try:
        train, test = train_test_split(
            np.arange(len(y)),
            test_size=settings.test_fraction,
            random_state=settings.seed,
            stratify=y if classify else None,
        )
    except ValueError as error:
        raise ValueError(f"{said} cannot be held back: {error}") from error
    if classify and (lost := np.setdiff1d(y, y[train])).size:
        raise ValueError(f"{said} leaves none to train on of the class {lost[0]}: lower it")
    return train, test


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return file_digest(file, "sha256").hexdigest()
