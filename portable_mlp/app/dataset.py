"""The data set of a run: reads the rows, checks them, and splits them for training and test."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from hashlib import file_digest
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from sklearn.model_selection import train_test_split

from portable_mlp.app.reading.columns import Reading
from portable_mlp.app.settings import Settings, options_of
from portable_mlp.app.table import bundled_table, find_column, read_table, split_target
from portable_mlp.preprocessing import identifiers, useless_columns

_MOST_CLASSES = 20  # different whole numbers that are taken for classes
_RARE = 0.1  # share of the rows


@dataclass(frozen=True)
class Dataset:
    """Training and test rows.

    Attributes
    ----------
    X, X_test : polars.DataFrame
    y, y_test : ndarray
    target : str
        Name of the target column.
    reading : Reading
        How the columns were read, those that are not used and the target too.
    dropped : dict
        From the names of columns to why they are not used.
    by_name : bool
        Whether the model finds its columns by name, rather than by position.
    digests : dict
        SHA-256 of each file, by path.
    classify : bool
        Whether the task is classification.
    notes : list of str
        What is not obvious about the data.
    """

    X: pl.DataFrame
    y: NDArray[Any]
    X_test: pl.DataFrame
    y_test: NDArray[Any]
    target: str
    reading: Reading
    dropped: dict[str, str]
    by_name: bool
    digests: dict[str, str]
    classify: bool
    notes: list[str]

    @property
    def kinds(self) -> dict[str, str]:
        """The kinds of the columns of X, by name."""
        return {name: self.reading.columns[name].kind for name in self.X.columns}

    @property
    def used(self) -> list[str]:
        """The names of the columns that the model uses."""
        return [name for name in self.X.columns if name not in self.dropped]


def read(settings: Settings) -> Dataset:
    """Read the rows that the settings name, and split them into training and test rows.

    The files are read in the order of their digests, so the order in which they are given
    does not matter.

    Raises
    ------
    ValueError
        If the data are not suitable for training; the message says why.
    """
    digest = cache(_digest)
    if settings.data:
        source = ", ".join(map(str, settings.data))
        table = read_table(settings.data, settings.target, options_of(settings), digest)
    else:
        source, table = settings.dataset, bundled_table(settings.dataset, options_of(settings))
    frame = table.frame
    target = find_column(frame.columns, settings.target, source)
    n_missing = frame[target].null_count()
    if n_missing and settings.missing_target == "error":
        raise ValueError(f"{source}: the target {target!r} is missing in some rows ({n_missing})")
    column = table.reading.columns[target]
    X, y, _ = split_target(frame, target, source, whole=column.whole)
    notes = list(table.notes)
    if n_missing:
        notes.append(f"rows without a target, left out: {n_missing}")
    classify, why = _is_classification(settings.task, y)
    notes += [f"{target} {why}"] if why else []
    if classify:
        _check_classes(target, y)
        notes += _imbalance(settings, y)
    elif y.dtype.kind not in "iufb":
        raise ValueError(f"the target {target!r} is no number: use --task classification")
    train, test = _split(settings, y, classify)
    kinds = {name: table.reading.columns[name].kind for name in X.columns}
    dropped = table.dropped | useless_columns(X[train])
    dropped |= identifiers(frame, {n: kind for n, kind in kinds.items() if n not in table.said})
    if dropped.keys() >= set(X.columns):
        raise ValueError(
            f"{source}: all columns are left out, so there is nothing to learn from: "
            + ", ".join(f"{name} ({why})" for name, why in dropped.items())
        )
    return Dataset(
        X[train], y[train], X[test], y[test], target, table.reading, dropped,
        by_name=table.by_name or not {"category", "date"}.isdisjoint(kinds.values()),
        digests={str(path): digest(path) for path in settings.data},
        classify=classify,
        notes=notes,
    )  # fmt: skip


def _is_classification(task: str, y: NDArray[Any]) -> tuple[bool, str]:
    """Tell whether the task is a classification, and why if that is not obvious."""
    if task != "auto":
        return task == "classification", ""
    if y.dtype.kind in "bUO":
        return True, ""
    values, counts = np.unique(y, return_counts=True)
    if not np.array_equal(values, np.floor(values)):
        return False, ""
    what = f"has {len(values)} different whole numbers"
    if len(values) <= 2 or (len(values) <= _MOST_CLASSES and counts.min() > 1):
        return True, f"{what}: they are taken for classes (--task regression says otherwise)"
    rare = f", of which {values[counts.argmin()]:g} is in one row" if counts.min() == 1 else ""
    return False, f"{what}{rare}: they are taken for amounts (--task classification says otherwise)"


def _check_classes(target: str, y: NDArray[Any]) -> None:
    classes, counts = np.unique(y, return_counts=True)
    if len(classes) < 2:
        raise ValueError(
            f"the target {target!r} has one class only, {classes[0]}: there is nothing to learn"
        )
    if counts.min() < 2:
        rare = classes[counts.argmin()]
        is_text = y.dtype.kind in "UO"
        drop, number = f"--missing {rare} leaves its row out", "--task regression predicts a number"
        raise ValueError(
            f"the target {target!r} has a class of one row, {rare}: there have to be two at least,"
            f" to train and to test on; {drop if is_text else number}"
        )


def _imbalance(settings: Settings, y: NDArray[Any]) -> list[str]:
    classes, counts = np.unique(y, return_counts=True)
    share = counts.min() / len(y)
    # With many classes, each has a small share
    if settings.class_weight != "none" or share >= min(_RARE, 0.5 / len(classes)):
        return []
    return [
        f"the smallest class, {classes[counts.argmin()]}, has {share:.1%} of the rows:"
        " --class-weight balanced lets all classes weigh the same"
    ]


def _split(settings: Settings, y: NDArray[Any], classify: bool) -> tuple[Any, Any]:
    """Return the indices of the training rows and of the test rows."""
    said = f"--test-fraction {settings.test_fraction} of {len(y)} rows"
    n_test, n_classes = ceil(settings.test_fraction * len(y)), len(np.unique(y))
    if classify and min(n_test, len(y) - n_test) < n_classes:
        raise ValueError(
            f"{said} cannot be held back: of {n_test} rows to test and {len(y) - n_test} to train"
            f" on, each has to have all {n_classes} classes"
        )
    if len(y) - n_test < 1:
        raise ValueError(f"{said} cannot be held back: none would be left to train on")
    train, test = train_test_split(
        np.arange(len(y)),
        test_size=settings.test_fraction,
        random_state=settings.seed,
        stratify=y if classify else None,
    )
    if classify and (lost := np.setdiff1d(y, y[train])).size:
        raise ValueError(f"{said} leaves none to train on of the class {lost[0]}: lower it")
    return train, test


def _digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with open(path, "rb") as file:
        return file_digest(file, "sha256").hexdigest()
