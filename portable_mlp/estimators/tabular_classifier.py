"""The classifier for tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from sklearn.base import ClassifierMixin
from sklearn.metrics import accuracy_score
from sklearn.utils import compute_sample_weight
from sklearn.utils._param_validation import StrOptions
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted

from portable_mlp.backends import to_host
from portable_mlp.callbacks import Callback
from portable_mlp.estimators.conformal import adaptive_scores, label_sets
from portable_mlp.estimators.input_checks import check_weights
from portable_mlp.estimators.packed import Floats, Judge, Packed, Preset, Rows, fold_means
from portable_mlp.estimators.tabular import PRESETS, TabularModel, check_coverage
from portable_mlp.functions import log_softmax, softmax
from portable_mlp.losses import Loss, SoftmaxCrossEntropy
from portable_mlp.typing import Array

# Members that are too sure of themselves (a high temperature) disagree, and their mean is the more
# cautious.  This rule was found on rows that six sets held out from all members: the log-loss is
# 3 % smaller in the mean, and at most 0.2 % larger
_SHARPNESS = 1.2


class TabularClassifier(ClassifierMixin, TabularModel):
    """Classifier for tables: an ensemble of networks that hold out a fold each.

    It takes a table as it is: numbers, text, booleans, dates, missing values.  The members'
    probabilities are calibrated on the rows that they hold out.  Their mean is less sure than it
    should be, and is sharpened.

    Parameters
    ----------
    preset : {"default", "fast"} or Preset, default="default"
        Settings of the fit; "fast" takes about 0.4 of the time.
    cv : int, splitter or iterable, optional
        Folds, as scikit-learn's; as many stratified folds as members by default.
    time_limit : float, optional
        Seconds that a fit may take.  The number of epochs is chosen so that it ends in time; the
        result then depends on the machine.
    class_weight : dict or "balanced", optional
        Weights of the classes, as scikit-learn's.
    random_state : int, RandomState or None, default=None
        Seed of folds, initial values and orders of rows.
    device : {"cpu", "gpu"}, optional
        Where to compute; where X is by default.
    backend : str, optional
        Array library to compute with; that of X by default.
    dtype : {"float32", "float64"}, optional
        Data type to train in; float32 by default.  Predictions on NumPy are in float64.
    verbose : bool, default=False
        Whether to show progress.
    callbacks : sequence of Callback, optional
        Called after each epoch.

    Attributes
    ----------
    classes_ : ndarray (n_classes,)
    oof_predictions_ : ndarray (n_samples, n_classes)
        Probabilities of each training row by the members that did not train on it; NaN for rows
        that no fold holds out.
    oof_score_ : float
        Accuracy of these predictions, weighted by ``sample_weight``.
    presets : dict
        Settings by name, of the class; ``dataclasses.replace`` changes some of them.
    temperature_ : float
        Divisor of the logits, fitted on the held-out rows.
    sharpness_ : float
        Exponent of the members' mean probabilities, which are then normalised.
    unused_columns_ : list of str or int
        Columns that were left out, since shuffling them among the held-out rows did not make the
        predictions worse; see `portable_mlp.estimators.selection`.  Names as text, or positions
        in an array.  Tables to predict need these columns too, but their values do not matter.
    network_, params_ : Network, list of arrays
        The members' layers and parameters.
    loss_curve_, validation_loss_curve_ : list of float
        Training loss of each epoch, with the smoothing of the labels, and log-loss of the rows
        held out, before the temperature; NaN for epochs after which nobody looked.
    n_iter_ : int
        Number of epochs.
    best_epoch_ : int
        The epoch whose parameters were kept, by the held-out rows: the share of wrong labels plus
        a thousandth of the log-loss.
    stop_reason_ : {"max_epochs", "converged", "stopped", "interrupted", "diverged"}
        Why training ended; "converged" if the last wave of the learning rate but one brought
        nothing.
    n_features_in_, feature_names_in_
        As in `MLPClassifier`.

    Examples
    --------
    >>> from portable_mlp import TabularClassifier
    >>> from sklearn.datasets import load_wine
    >>> X, y = load_wine(return_X_y=True, as_frame=True)
    >>> model = TabularClassifier(preset="fast", random_state=0).fit(X, y)
    >>> model.oof_score_ > 0.95
    True
    """

    presets = PRESETS
    _parameter_constraints: ClassVar[dict[str, Any]] = {
        **TabularModel._parameter_constraints,
        "class_weight": [dict, StrOptions({"balanced"}), None],
    }

    def __init__(
        self,
        preset: str | Preset = "default",
        *,
        cv: Any = None,
        time_limit: float | None = None,
        class_weight: dict[Any, float] | str | None = None,
        random_state: Any = None,
        device: str | None = None,
        backend: str | None = None,
        dtype: str | None = None,
        verbose: bool = False,
        callbacks: Sequence[Callback] | None = None,
    ) -> None:
        self._store(locals())

    def fit(self, X: Any, y: Any, sample_weight: Any = None, *, groups: Any = None) -> Self:
        """Fit the model to a table X and labels y.

        Parameters
        ----------
        X : data frame or array-like (n_samples, n_features)
            Missing values are allowed.
        y : array-like (n_samples,)
            Labels: numbers, text or booleans.
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
        check_classification_targets(y)
        if y.ndim > 1:
            raise ValueError(f"y: expected labels (n,), got shape {y.shape}")
        self.classes_, target = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            (only,) = self.classes_.tolist()
            raise ValueError(f"y has one class only, {only!r}: nothing to tell apart")
        return target.astype(np.int64), len(self.classes_)

    def _class_weighted(self, y: NDArray[Any], weights: Floats | None, dtype: str) -> Floats | None:
        if self.class_weight is None:
            return weights
        known: Floats = compute_sample_weight(self.class_weight, y)
        known = known if weights is None else known * weights
        return check_weights(known, np.empty((len(y), 0)), dtype, "class_weight")

    def _own_folds(
        self, n_folds: int, y: NDArray[Any], rng: np.random.RandomState
    ) -> list[tuple[Rows, Rows]]:
        # Rows are dealt to the folds class by class, so that classes may be smaller than folds
        order = np.lexsort((rng.permutation(len(y)), np.unique(y, return_inverse=True)[1]))
        fold = np.empty(len(y), np.intp)
        fold[order] = np.arange(len(y)) % n_folds
        return [(np.flatnonzero(fold != i), np.flatnonzero(fold == i)) for i in range(n_folds)]

    def _make_loss(self, preset: Preset) -> Loss:
        return SoftmaxCrossEntropy(preset.label_smoothing)

    def _judge(self, target: NDArray[Any]) -> Judge:
        def judge(z: Floats, rows: Rows) -> tuple[Floats, Floats]:
            # Of two epochs with as many wrong classes the one with the smaller loss is better
            true = target[rows]
            log_loss: Floats = -log_softmax(z, np)[np.arange(len(z)), true]
            return (z.argmax(axis=1) != true) + 1e-3 * log_loss, log_loss

        return judge

    def _learn_outputs(
        self,
        packed: Packed,
        y: NDArray[Any],
        target: NDArray[Any],
        given: Floats | None,
        weights: Floats | None,
    ) -> None:
        rows, counted, z = packed.held_out.rows, packed.held_out.counted, packed.logits
        share = counted * (1.0 if weights is None else weights[rows])
        true = target[rows][..., None]

        def log_loss(log_temperature: float) -> float:
            log_p = log_softmax(z / np.exp(log_temperature), np)
            return -float(np.sum(share * np.take_along_axis(log_p, true, axis=2)[..., 0]))

        found = minimize_scalar(log_loss, bounds=(np.log(0.1), np.log(10.0)), method="bounded")
        self.temperature_ = float(np.exp(found.x))
        self.sharpness_ = max(1.0, _SHARPNESS * self.temperature_**0.5)
        p = softmax(z / self.temperature_, np)
        self.oof_predictions_ = packed.held_out.mean(p, len(y))
        u = np.random.RandomState(self._seed).uniform(size=len(y))
        self._nonconformity = [
            np.sort(np.take_along_axis(adaptive_scores(q, u[own]), target[own, None], axis=1)[:, 0])
            for own, q in packed.held_out.by_fold(p, weights)
        ]
        known = ~np.isnan(self.oof_predictions_[:, 0])
        self.oof_score_ = float(accuracy_score(
            target[known], self.oof_predictions_[known].argmax(axis=1),
            sample_weight=None if given is None else given[known],
        ))  # fmt: skip

    def predict_proba(self, X: Any) -> Array:
        """Return the probabilities of the classes.

        Parameters
        ----------
        X : data frame or array-like (n_samples, n_features)

        Returns
        -------
        p : array (n_samples, n_classes)
            In the namespace and on the device of X, if it is an array.
        """
        return self._predict_with(self._pooled, X)

    def _pooled(self, z: Array, xp: Any) -> Array:
        """Return the probabilities (n, k) from the members' logits (members, n, k)."""
        p = xp.mean(softmax(z / self.temperature_, xp), axis=0) ** self.sharpness_
        return p / xp.sum(p, axis=1, keepdims=True)

    def predict(self, X: Any) -> NDArray[Any]:
        """Return the most probable labels, (n_samples,), on the host.

        Parameters
        ----------
        X : data frame or array-like (n_samples, n_features)
        """
        p = to_host(self.predict_proba(X))
        labels: NDArray[Any] = self.classes_[p.argmax(axis=1)]
        return labels

    def predict_set(self, X: Any, coverage: float = 0.9) -> NDArray[np.bool_]:
        """Return for each row a set of labels that contains the right one with a probability.

        The sets are adaptive: small where the model is sure (Romano et al., 2020).  They are
        drawn with random numbers that depend on the row's place in X.  A set can be empty.
        Rows of weight zero do not count; other weights are not used.  See
        `portable_mlp.estimators.conformal` for the guarantee.

        Parameters
        ----------
        X : data frame or array-like (n_samples, n_features)
        coverage : float in (0, 1), default=0.9
            The probability.

        Returns
        -------
        ndarray (n_samples, n_classes) of bool
            Which of ``classes_`` belong to the set; on the host.

        Raises
        ------
        ValueError
            If ``coverage`` is not in (0, 1).
        """
        check_coverage(coverage)
        check_is_fitted(self)
        rng = np.random.RandomState(self._seed + 1)

        def sets(z: Floats, xp: Any) -> NDArray[np.bool_]:
            p = fold_means(softmax(z / self.temperature_, xp), self._fold)
            scores = adaptive_scores(p, rng.uniform(size=p.shape[1]))
            return label_sets(scores, self._nonconformity, coverage)

        found: NDArray[np.bool_] = self._predict_with(sets, X, on_host=True)
        return found
