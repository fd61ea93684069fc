"""Preparation of the rows for training and validation: checks, encoding, weights, split."""

from __future__ import annotations

from math import ceil
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import issparse
from sklearn.model_selection import train_test_split
from sklearn.utils import compute_sample_weight

from portable_mlp.backends import Backend, move
from portable_mlp.estimators.inference import Inference
from portable_mlp.estimators.input_checks import check_weights, check_X, check_y
from portable_mlp.sources import Source, checked_part, on_backend, row_count
from portable_mlp.steps import Batch


class Rows(NamedTuple):
    """Checked rows.

    Attributes
    ----------
    x : array or CSR matrix
        On any backend.  It is never copied: ``indices`` selects from it.
    y : ndarray
        Targets as they were given.
    target : ndarray
        Targets as numbers, encoded for the loss.
    weights : ndarray or None
    indices : ndarray, optional
        The rows of x that are meant; all if None.
    read : Source, optional
        Where the rows come from.  Then the other fields describe its first rows only, and x
        is None.
    """

    x: Any
    y: NDArray[Any]
    target: NDArray[Any]
    weights: NDArray[np.float64] | None
    indices: NDArray[np.intp] | None = None
    read: Source | None = None

    def take(self, indices: NDArray[np.intp]) -> Rows:
        weights = None if self.weights is None else self.weights[indices]
        return Rows(self.x, self.y[indices], self.target[indices], weights, indices)


class Preparation(Inference):
    """Base of the estimators that prepares rows for training."""

    _target_dtype: ClassVar[type | None] = None  # labels may be anything

    def _look_into(
        self, source: Source, y: Any, sample_weight: Any, X_val: Any
    ) -> tuple[Any, NDArray[Any]]:
        """Return x and y of the first rows of a source, to determine their shapes and dtypes.

        Raises
        ------
        ValueError
            If a setting or an argument does not go with a source, or it has no rows.
        """
        if y is not None or sample_weight is not None:
            raise ValueError("a source brings y and the weights itself: do not pass them")
        if self.solver == "lbfgs":
            raise ValueError("solver='lbfgs' takes all rows at once: it cannot take a source")
        if self.early_stopping and X_val is None:
            raise ValueError("early_stopping on a source needs X_val and y_val: none is held out")
        if getattr(self, "class_weight", None) == "balanced":
            raise ValueError("class_weight='balanced' needs all rows at once: pass a dict")
        row_count(source)
        source.begin(0, np.random.RandomState(0) if self.shuffle else None)
        for part in source.parts(self._rows_per_batch):
            (x, y, _), rows = checked_part(part, type(source).__name__)
            if len(y if rows is None else rows):
                return x, y
        raise ValueError(f"{type(source).__name__}: a source without rows")

    def _prepared(self, backend: Backend, dtype: str, data: Batch) -> Batch:
        """Return rows of a source, checked, encoded and moved to a backend."""
        X = check_X(self, data.x, reset=False)
        y = check_y(self, data.y, X, self._target_dtype)
        weights = check_weights(data.weights, X, dtype, "the source's weights", some=False)
        weights = self._class_weighted(y, weights, dtype, some=False)
        x = X.toarray() if issparse(X) else move(X, backend, dtype)
        return on_backend(x, self._encode_target(y), weights, backend, dtype)

    def _class_weighted(
        self,
        y: NDArray[Any],
        weights: NDArray[np.float64] | None,
        dtype: str,
        where: str = "",
        some: bool = True,
    ) -> NDArray[np.float64] | None:
        class_weight = getattr(self, "class_weight", None)
        if class_weight is None:
            return weights
        labels = y
        if isinstance(class_weight, dict) and y.ndim == 1:
            # scikit-learn may raise where the dict names a class that these rows lack: put each
            # class before the rows once; the slice below drops its weight
            labels = np.concatenate([self.classes_, y])
        by_class: NDArray[np.float64] = compute_sample_weight(class_weight, labels)[-len(y) :]
        name = f"class_weight{where}"
        if weights is not None:
            name = f"sample_weight times {name}"
            with np.errstate(over="ignore"):
                by_class = weights * by_class
        return check_weights(by_class, y, dtype, name, some)

    def _check_validation(self, X: Any, y: Any, sample_weight: Any, dtype: str) -> Rows | None:
        if X is None and y is None and sample_weight is None:
            return None
        if X is None or y is None:
            raise ValueError("X_val and y_val go together: one of them is missing")
        if self.solver == "lbfgs":
            raise ValueError("solver='lbfgs' cannot take X_val: it has no epochs to validate after")
        X = check_X(self, X, reset=False)
        y = check_y(self, y, X, self._target_dtype)
        weights = check_weights(sample_weight, X, dtype, "sample_weight_val")
        weights = self._class_weighted(y, weights, dtype, " of y_val")
        try:
            target = self._encode_target(y)
        except ValueError as error:
            raise ValueError(f"y_val: {error}") from error
        return Rows(X, y, target, weights)

    def _split(self, rows: Rows, rng: np.random.RandomState) -> list[NDArray[np.intp]]:
        """Return the indices of the rows to train on and of those to validate on."""
        # Only binary labels are stratified, as in scikit-learn
        binary = rows.target.ndim == 1 and self._loss.link_name == "logistic"
        numbers = np.arange(rows.x.shape[0])
        n_held_out = ceil(self.validation_fraction * len(numbers))
        # scikit-learn's own error tells of a class of one row
        counts = np.unique(rows.target, return_counts=True)[1]
        if binary and n_held_out < len(counts) and counts.min() > 1:
            raise ValueError(
                f"The validation set is too small: {n_held_out} of {len(numbers)} rows cannot have"
                " both classes. Increase 'validation_fraction' or the size of your dataset."
            )
        split: list[NDArray[np.intp]] = train_test_split(
            numbers,
            test_size=float(self.validation_fraction),
            random_state=rng,
            stratify=rows.target.astype(bool)[:, None] if binary else None,
        )
        if len(split[1]) < 2:
            raise ValueError(
                "The validation set is too small. Increase 'validation_fraction'"
                " or the size of your dataset."
            )
        return split
