"""The base of the estimators for tables: a packed fit on any columns.

`packed` trains; `columns` turns a table into numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from numbers import Integral, Real
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.model_selection import GroupKFold, KFold, check_cv
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import check_is_fitted

from portable_mlp.backends import (
    DTYPES,
    Backend,
    NumPyBackend,
    backend_of,
    get_backend,
    move,
    to_host,
)
from portable_mlp.callbacks import Callback, Progress, pausing
from portable_mlp.estimators.base import Estimator
from portable_mlp.estimators.columns import TableEncoder, read_columns
from portable_mlp.estimators.input_checks import check_weights, check_y
from portable_mlp.estimators.packed import Floats, Packed, Preset, Rows, fit_pack, rows_at_once
from portable_mlp.estimators.time_limit import Deadline
from portable_mlp.warn import warn

PRESETS = {
    "default": Preset(learning_rate=0.04, average=0.995),
    "fast": Preset(learning_rate=0.04, members=4, epochs=32, steps=1000, average=0.99),
}
"""The settings of a classification by name."""

_MOST_FOLDS = 64


class TabularModel(Estimator, BaseEstimator):
    """Base of the estimators for tables."""

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        "preset": [StrOptions(set(PRESETS)), Preset],
        "cv": ["cv_object"],
        "random_state": ["random_state"],
        "verbose": ["verbose"],
        "dtype": [StrOptions(set(DTYPES)), None],
        "callbacks": ["array-like", None],
        "time_limit": [Interval(Real, 0.0, None, closed="neither"), None],
    }
    presets: ClassVar[dict[str, Preset]]
    _target_dtype: ClassVar[type | None] = None
    _names: list[str] | None

    def _fit(self, X: Any, y: Any, sample_weight: Any, groups: Any) -> Self:
        self._validate_params()
        deadline = None if self.time_limit is None else Deadline(self.time_limit)
        preset = self.preset if isinstance(self.preset, Preset) else self.presets[self.preset]
        rng = check_random_state(self.random_state)
        home, backend = self._backends(X)
        dtype = self.dtype or "float32"
        if pausing(self.callbacks or ()):
            raise ValueError(
                "callbacks: a model for tables cannot be saved in the middle of a fit, so that"
                " those that pause training, such as Checkpoint, are of no use"
            )
        columns = read_columns(self, X, reset=True)
        rows = np.empty((len(columns[0].numbers), 0))
        y = check_y(self, y, rows, self._target_dtype)
        given = check_weights(sample_weight, rows, dtype)
        loss = self._make_loss(preset)
        target, n_targets = self._learn_target(y, given)
        n_out = loss.n_logits(n_targets)
        weights = self._class_weighted(y, given, dtype)
        splits = self._splits(X, y, groups, preset, rng)
        if weights is not None and not any(weights[test].any() for _, test in splits):
            raise ValueError("sample_weight: all held-out rows have the weight zero")
        callbacks: list[Callback] = [Progress()] if self.verbose else []
        callbacks += self.callbacks or ()

        def fit(unused: Sequence[int]) -> tuple[TableEncoder, Packed]:
            encoder = TableEncoder.of(columns, unused)
            return encoder, fit_pack(
                encoder.transform(columns), encoder.n_embedded, target, n_out, weights, splits,
                loss, self._judge(target), preset, backend, dtype, rng, callbacks, deadline,
                () if unused else encoder.blocks,
            )  # fmt: skip

        unused: list[int] = []
        self._encoder, packed = fit(unused)
        if packed.useless and (deadline is None or deadline.allows_more):
            encoder, again = fit(packed.useless)
            if again.best_score >= packed.best_score:
                unused, self._encoder, packed = packed.useless, encoder, again
            else:  # it was interrupted, as a rule
                packed = replace(packed, reason=again.reason)
        self.unused_columns_ = [columns[j].name for j in unused]
        self._fold, self._seed = packed.held_out.fold, rng.randint(2**31 - 1)
        self._learn_outputs(packed, y, target, given, weights)
        self.network_ = packed.network
        self.params_ = [move(p, home, dtype) for p in packed.params]
        self.loss_curve_ = [epoch.loss for epoch in packed.history]
        self.validation_loss_curve_ = [epoch.validation_loss for epoch in packed.history]
        self.n_iter_, self.best_epoch_ = len(packed.history), packed.kept
        self.stop_reason_ = packed.reason
        return self

    def _splits(
        self, X: Any, y: NDArray[Any], groups: Any, preset: Preset, rng: np.random.RandomState
    ) -> list[tuple[Rows, Rows]]:
        """Return the rows to train on and to hold out, for each fold."""
        n = len(y)
        if n < 2:
            raise ValueError(f"a fit needs at least 2 rows, to hold some out; got {n} sample(s)")
        cv = self.cv
        if cv is None or isinstance(cv, Integral):
            wanted = preset.members if cv is None else int(cv)
            n_folds = min(wanted, n)
            if n_folds < wanted:
                warn(f"there are {n_folds} folds only, one for each row", UserWarning)
            if groups is None:
                return self._own_folds(n_folds, y, rng)
            cv = n_folds
        classify = isinstance(self, ClassifierMixin)
        if groups is not None and isinstance(cv, int):
            n_groups = len({*to_host(groups).tolist()})
            if n_groups < 2:
                raise ValueError("groups: at least two are needed, to hold one out")
            cv = GroupKFold(min(cv, n_groups))
        splitter = check_cv(cv, y, classifier=classify)
        found = [
            tuple(np.flatnonzero(a) if a.dtype == bool else a for a in map(np.asarray, pair))
            for pair in splitter.split(X, y, groups)
        ]
        if not found or not all(len(train) and len(test) for train, test in found):
            raise ValueError("cv: folds are needed, with rows to train on and rows to hold out")
        if len(found) > _MOST_FOLDS:
            raise ValueError(
                f"cv: there are {len(found)} folds, each of which needs a network; at most"
                f" {_MOST_FOLDS} are possible"
            )
        return found  # type: ignore[return-value]

    def _own_folds(
        self, n_folds: int, y: NDArray[Any], rng: np.random.RandomState
    ) -> list[tuple[Rows, Rows]]:
        folds = KFold(n_folds, shuffle=True, random_state=rng.randint(2**31 - 1))
        return list(folds.split(y))

    def _class_weighted(self, y: NDArray[Any], weights: Floats | None, dtype: str) -> Floats | None:
        return weights

    def _predict_with(self, function: Any, X: Any, *, on_host: bool = False) -> Any:
        """Return ``function(logits, xp)`` for all rows of X, on the backend of X.

        The logits are (members, rows, k), of some rows at a time.  With ``on_host`` they are
        NumPy's in float64, and so is the result.
        """
        check_is_fitted(self)
        columns = read_columns(self, X, reset=False)
        home, backend = self._backends(X)
        dtype = str(self.params_[0].dtype).split(".")[-1]
        if isinstance(backend, NumPyBackend):
            # In float32 a row's result would depend on its place among the rows, by rounding
            dtype = "float64"
        x, found = self._encoder.transform(columns), []
        with backend.scope(dtype):
            params = [move(p, backend, dtype) for p in self.params_]
            chunk = rows_at_once(self.network_)
            for start in range(0, len(x), chunk):
                some = backend.asarray(x[start : start + chunk], dtype)
                z = self.network_(params, some, backend.xp)
                if on_host:
                    found.append(function(to_host(z).astype(np.float64), np))
                else:
                    found.append(function(z, backend.xp))
            if on_host:
                return np.concatenate(found)
            result = found[0] if len(found) == 1 else backend.xp.concat(found, axis=0)
            return result if home == backend else move(result, home)

    def _backends(self, X: Any) -> tuple[Backend, Backend]:
        """Return the backend of X, NumPy's for a table, and the one to compute with."""
        like = X if hasattr(X, "shape") and not hasattr(X, "columns") else None
        home = NumPyBackend() if like is None else backend_of(like)
        return home, get_backend(self.device, self.backend, like=like)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        tags.input_tags.string = True
        tags.input_tags.categorical = True
        return tags


def check_coverage(coverage: float) -> None:
    """Raise a ValueError unless a coverage is in (0, 1)."""
    if not 0.0 < coverage < 1.0:
        raise ValueError(f"coverage must be in (0, 1), got {coverage!r}")
