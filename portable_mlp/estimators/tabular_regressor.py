"""The regressor for tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Self

import numpy as np
from array_api_compat import device
from numpy.typing import NDArray
from sklearn.base import RegressorMixin
from sklearn.metrics import d2_pinball_score, r2_score
from sklearn.utils.validation import check_is_fitted

from portable_mlp.backends import to_host
from portable_mlp.callbacks import Callback
from portable_mlp.estimators.conformal import interval
from portable_mlp.estimators.packed import Floats, Judge, Packed, Preset, Rows, fold_means
from portable_mlp.estimators.tabular import PRESETS, TabularModel, check_coverage
from portable_mlp.losses import LOSSES, Loss, Quantile
from portable_mlp.typing import Array


def is_of_scaled(loss: Loss) -> bool:
    """Tell whether a loss can have a scaled target, which may be negative."""
    return loss.link_name == "identity" and not loss.for_labels and not loss.nonnegative


class TabularRegressor(RegressorMixin, TabularModel):
    """Regressor for tables: an ensemble of networks that hold out a fold each.

    It takes a table as it is: numbers, text, booleans, dates, missing values.

    Parameters
    ----------
    loss : {"squared_error", "huber", "quantile"} or Loss, default="squared_error"
        Loss of the target, which is scaled to unit variance.  ``Quantile((0.1, 0.5, 0.9))``
        predicts several quantiles of a single target; they do not cross.
    preset, cv, time_limit, random_state, device, backend, dtype, verbose, callbacks
        As in `TabularClassifier`; the folds are not stratified.

    Attributes
    ----------
    oof_predictions_ : ndarray as of `predict`
        Predictions of each training row by the members that did not train on it; NaN for rows
        that no fold holds out.
    oof_score_ : float
        Score of these predictions, as of `score`.
    loss_curve_, validation_loss_curve_ : list of float
        Losses of the scaled target, of the training rows and of those held out; NaN for epochs
        after which nobody looked.
    unused_columns_, network_, params_, n_iter_, best_epoch_, n_features_in_, feature_names_in_, \
stop_reason_
        As in `TabularClassifier`.

    Examples
    --------
    >>> from portable_mlp import TabularRegressor
    >>> from sklearn.datasets import load_diabetes
    >>> X, y = load_diabetes(return_X_y=True, as_frame=True)
    >>> model = TabularRegressor(preset="fast", random_state=0).fit(X, y)
    >>> model.oof_score_ > 0.4
    True
    """

    presets: ClassVar[dict[str, Preset]] = {
        name: replace(
            preset, learning_rate=0.2, activation="mish", dropouts=(0.0, 0.3), average=0.0
        )
        for name, preset in PRESETS.items()
    }
    _parameter_constraints: ClassVar[dict[str, Any]] = {
        **TabularModel._parameter_constraints,
        "loss": [str, Loss],
    }
    _target_dtype = np.float64

    def __init__(
        self,
        preset: str | Preset = "default",
        *,
        loss: str | Loss = "squared_error",
        cv: Any = None,
        time_limit: float | None = None,
        random_state: Any = None,
        device: str | None = None,
        backend: str | None = None,
        dtype: str | None = None,
        verbose: bool = False,
        callbacks: Sequence[Callback] | None = None,
    ) -> None:
        self._store(locals())

    def fit(self, X: Any, y: Any, sample_weight: Any = None, *, groups: Any = None) -> Self:
        """Fit the model to a table X and targets y.

        Parameters
        ----------
        X : data frame or array-like (n_samples, n_features)
            Missing values are allowed.
        y : array-like (n_samples,) or (n_samples, n_outputs)
        sample_weight : array-like (n_samples,), optional
        groups : array-like (n_samples,), optional
            Groups that folds keep together.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            If a parameter or the data is invalid; the model is unchanged.
        """
        with self._unchanged_on_error():
            return self._fit(X, y, sample_weight, groups)

    def _learn_target(self, y: NDArray[Any], weights: Floats | None) -> tuple[NDArray[Any], int]:
        y = y if y.ndim == 2 else y[:, None]
        self._mean = np.average(y, axis=0, weights=weights)
        std = np.sqrt(np.average((y - self._mean) ** 2, axis=0, weights=weights))
        self._std = np.where(std > 0.0, std, 1.0)
        target = (y - self._mean) / self._std
        counted = target if weights is None else target[weights > 0.0]
        self._limits = np.stack([counted.min(axis=0), counted.max(axis=0)])
        return target, target.shape[1]

    def _make_loss(self, preset: Preset) -> Loss:
        named = {name: loss for name, loss in LOSSES.items() if is_of_scaled(loss)}
        loss = self.loss if isinstance(self.loss, Loss) else named.get(self.loss)
        if loss is None or not is_of_scaled(loss):
            raise ValueError(
                f"loss={self.loss!r}: a target that is scaled can have {', '.join(named)}, or"
                " another loss of which the predictions are the logits themselves"
            )
        self._loss = loss
        return loss

    def _judge(self, target: NDArray[Any]) -> Judge:
        def judge(z: Floats, rows: Rows) -> tuple[Floats, Floats]:
            losses, _ = self._loss.per_row(np.clip(z, *self._limits), target[rows], np)
            return losses, losses

        return judge

    def _learn_outputs(
        self,
        packed: Packed,
        y: NDArray[Any],
        target: NDArray[Any],
        given: Floats | None,
        weights: Floats | None,
    ) -> None:
        z = np.clip(packed.logits, *self._limits)
        found = self._sorted(packed.held_out.mean(z, len(y)) * self._std + self._mean, np)
        self._flat = y.ndim == found.shape[1] == 1
        self.oof_predictions_ = found[:, 0] if self._flat else found
        known = ~np.isnan(found[:, 0])
        self.oof_score_ = self._score(
            y[known], self.oof_predictions_[known], None if given is None else given[known]
        )
        self._nonconformity = [
            np.sort(np.abs(target[own, 0] - q[:, 0])) * self._std[0]
            for own, q in packed.held_out.by_fold(z, weights)
        ]

    def predict(self, X: Any) -> Array:
        """Return the predicted targets.

        Parameters
        ----------
        X : data frame or array-like (n_samples, n_features)

        Returns
        -------
        y : array (n_samples,), (n_samples, n_outputs) or (n_samples, n_quantiles)
            In the namespace and on the device of X, if it is an array.
        """

        def mean(z: Array, xp: Any) -> Array:
            low, high, std, centre = (
                xp.asarray(a, dtype=z.dtype, device=device(z)) for a in self._outputs
            )
            y = self._pooled(z, low, high, std, centre, xp)
            return y[:, 0] if self._flat else y

        return self._predict_with(mean, X)

    @property
    def _outputs(self) -> tuple[Floats, Floats, Floats, Floats]:
        """The limits of the scaled targets, and their scale and centre, each (k,)."""
        return self._limits[0], self._limits[1], self._std, self._mean

    def _pooled(
        self, z: Array, low: Array, high: Array, std: Array, centre: Array, xp: Any
    ) -> Array:
        """Return the targets (n, k) from the members' logits (members, n, k)."""
        mean = xp.mean(xp.minimum(xp.maximum(z, low), high), axis=0)
        return self._sorted(mean * std + centre, xp)

    def _sorted(self, y: Array, xp: Any) -> Array:
        """Return quantiles in rising order.

        Sorted, they are nearer to the true ones (Chernozhukov, Fernández-Val and Galichon, 2010).
        """
        several = isinstance(self._loss, Quantile) and len(self._loss.levels) > 1
        return xp.sort(y, axis=-1) if several else y

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Return the coefficient of determination, R², averaged over the outputs.

        With ``loss=Quantile(...)`` it is the mean over the quantiles of the part of the pinball
        loss that is explained, D².

        Parameters
        ----------
        X : data frame or array-like (n_samples, n_features)
        y : array-like (n_samples,) or (n_samples, n_outputs)
        sample_weight : array-like (n_samples,), optional

        Returns
        -------
        float
        """
        return self._score(y, to_host(self.predict(X)), sample_weight)

    def _score(self, y: Any, predicted: NDArray[Any], weights: Any) -> float:
        if not isinstance(self._loss, Quantile):
            return float(r2_score(y, predicted, sample_weight=weights))
        several = isinstance(self._loss.q, tuple)
        each = predicted.T if several and predicted.ndim == 2 else [predicted]
        return float(np.mean([
            d2_pinball_score(y, one, sample_weight=weights, alpha=q)
            for one, q in zip(each, self._loss.levels, strict=True)
        ]))  # fmt: skip

    def predict_interval(self, X: Any, coverage: float = 0.9) -> Floats:
        """Return for each row an interval that contains the target with a probability.

        The intervals are those of CV+ (Barber et al., 2021), from the errors on held-out rows.
        Rows of weight zero do not count; other weights are not used.  See
        `portable_mlp.estimators.conformal` for the guarantee.

        Parameters
        ----------
        X : data frame or array-like (n_samples, n_features)
        coverage : float in (0, 1), default=0.9
            The probability.

        Returns
        -------
        ndarray (n_samples, 2)
            Lower and upper limits, on the host; infinite if there are too few training rows.

        Raises
        ------
        ValueError
            If ``coverage`` is not in (0, 1), or the model has several outputs.
        """
        check_coverage(coverage)
        check_is_fitted(self)
        if self.network_.n_out != 1:
            raise ValueError(
                "predict_interval is for a single target, of which one value is predicted"
            )

        def limits(z: Floats, xp: Any) -> Floats:
            z = np.clip(z, *self._limits)[..., 0]
            centres = fold_means(z, self._fold) * self._std[0] + self._mean[0]
            return interval(centres, self._nonconformity, coverage)

        found: Floats = self._predict_with(limits, X, on_host=True)
        return found

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags
