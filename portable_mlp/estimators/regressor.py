"""The regressor, for real targets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.base import RegressorMixin
from sklearn.metrics import r2_score

from portable_mlp.architectures import BuildNetwork
from portable_mlp.callbacks import Callback
from portable_mlp.estimators.construction import LossFunction, chosen_loss
from portable_mlp.estimators.fitting import MultilayerPerceptron, without_partial_fit
from portable_mlp.estimators.sklearn_compat import (
    only_if,
)
from portable_mlp.groups import Treatment
from portable_mlp.layers import Layer
from portable_mlp.losses import (
    LOSSES,
    Loss,
    SquaredError,
)
from portable_mlp.optimizers import Optimizer
from portable_mlp.schedules import Schedule, Scheduled
from portable_mlp.typing import Array


class MLPRegressor(RegressorMixin, MultilayerPerceptron):
    """Multilayer perceptron for one or several real targets.

    Parameters
    ----------
    loss : str, Loss or callable, default="squared_error"
        Loss to minimise: a name of a regression in `portable_mlp.losses.LOSSES`, or an
        instance, which brings its own settings, such as ``Quantile(0.9)``.  A callable takes
        predictions (n, k), targets (n, k), or (n,) with one output, and the namespace.  It
        returns the rows' losses (n,) and their derivatives with respect to the predictions
        (n, k).
    hidden_layer_sizes, activation, solver, alpha, batch_size, learning_rate, \
learning_rate_init, power_t, max_iter, shuffle, random_state, tol, verbose, warm_start, \
momentum, nesterovs_momentum, early_stopping, validation_fraction, beta_1, beta_2, epsilon, \
n_iter_no_change, max_fun, device, backend, dtype, dropout, clip_norm, weight_decay, scoring, \
callbacks, treatments, architecture
        As in `MLPClassifier`.

    Attributes
    ----------
    network_, params_, coefs_, intercepts_, layer_params_, loss_, best_loss_, loss_curve_, \
validation_loss_curve_, validation_scores_, best_validation_score_, n_iter_, t_, n_layers_, \
n_outputs_, n_features_in_, stop_reason_, feature_names_in_, out_activation_
        As in `MLPClassifier`.

    Examples
    --------
    >>> from portable_mlp import MLPRegressor
    >>> from sklearn.datasets import load_diabetes
    >>> X, y = load_diabetes(return_X_y=True)
    >>> model = MLPRegressor(hidden_layer_sizes=(), solver="lbfgs", max_iter=1000)
    >>> model.fit(X, y / 100).score(X, y / 100) > 0.5
    True
    """

    _target_dtype = np.float64

    _metric = staticmethod(r2_score)

    def __init__(
        self,
        loss: str | Loss | LossFunction = "squared_error",
        hidden_layer_sizes: int | Sequence[int] = (100,),
        activation: str | Layer | Sequence[str | Layer] = "relu",
        *,
        solver: str | Optimizer = "adam",
        alpha: float = 0.0001,
        batch_size: int | str = "auto",
        learning_rate: str | Schedule = "constant",
        learning_rate_init: float = 0.001,
        power_t: float = 0.5,
        max_iter: int = 200,
        shuffle: bool = True,
        random_state: Any = None,
        tol: float = 1e-4,
        verbose: bool = False,
        warm_start: bool = False,
        momentum: float = 0.9,
        nesterovs_momentum: bool = True,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-8,
        n_iter_no_change: float = 10,
        max_fun: int = 15000,
        device: str | None = None,
        backend: str | None = None,
        dtype: str | None = None,
        dropout: float | Scheduled = 0.0,
        clip_norm: float | None = None,
        weight_decay: float | Scheduled | None = None,
        scoring: str | Callable[..., float] | None = None,
        callbacks: Sequence[Callback] | None = None,
        treatments: dict[str, Treatment] | None = None,
        architecture: BuildNetwork | None = None,
    ) -> None:
        self._store(locals())

    def _learn_target(self, y: NDArray[Any], again: bool, incremental: bool) -> tuple[Loss, int]:
        """Return the loss and the number of logits."""
        named = {name: loss for name, loss in LOSSES.items() if not loss.for_labels}
        loss = chosen_loss(self.loss, named, SquaredError())
        if loss.for_labels:
            raise ValueError(f"loss={loss!r} is for labels: use MLPClassifier")
        if loss.n_logits(1) != 1:
            raise ValueError(f"loss={loss!r} has several logits for a target: use TabularRegressor")
        return loss, y.shape[1] if y.ndim == 2 else 1

    def _encode_target(self, y: NDArray[Any]) -> NDArray[np.float64]:
        """Return the targets unchanged; raise a ValueError if the loss cannot take them."""
        if self._loss.nonnegative and (y < 0).any():
            raise ValueError(f"y must not be negative for loss={self.loss!r}")
        return y

    @only_if(without_partial_fit)
    def partial_fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Train for one epoch over X and y, continuing from the model's present state.

        Parameters
        ----------
        X : array-like (n_samples, n_features)
        y : array-like (n_samples,) or (n_samples, n_outputs)
        sample_weight : array-like (n_samples,), optional

        Returns
        -------
        self

        Raises
        ------
        UnavailableError, ValueError, DivergenceError, BackendError
            As in `MLPClassifier.partial_fit`.
        """
        return self._guarded(X, y, sample_weight, "partial")

    def _decide(self, z: Array, loss: Loss, xp: Any) -> Array:
        """Return predictions (n,) or (n, n_outputs) from logits."""
        y = loss.link(z, xp)
        return y[:, 0] if y.shape[1] == 1 else y

    def predict(self, X: Any) -> Array:
        """Return the predicted targets.

        Parameters
        ----------
        X : array-like (n_samples, n_features)

        Returns
        -------
        y : array (n_samples,) or (n_samples, n_outputs)
            In the namespace and on the device of X.
        """
        return self._predict_with(self._decide, X, "predict")[0]

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Return the coefficient of determination R², averaged over the outputs.

        Parameters
        ----------
        X : array-like (n_samples, n_features)
        y : array-like (n_samples,) or (n_samples, n_outputs)
        sample_weight : array-like (n_samples,), optional

        Returns
        -------
        float
        """
        return self._score(X, y, sample_weight)
