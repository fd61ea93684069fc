"""scikit-learn's interface to the training loop, and nothing else.

Names, defaults and conventions are those of ``sklearn.neural_network``; what is
added comes after them, keyword-only, and changes no default.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import inf, nan
from numbers import Integral, Real
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import accuracy_score, r2_score
from sklearn.model_selection import train_test_split
from sklearn.utils import check_array, check_consistent_length, check_random_state
from sklearn.utils._param_validation import Interval, Options, StrOptions
from sklearn.utils.metaestimators import available_if
from sklearn.utils.multiclass import type_of_target
from sklearn.utils.validation import check_is_fitted, column_or_1d, validate_data

from portable_mlp.activations import lookup
from portable_mlp.backends import Backend, NumPyBackend, backend_of, get_backend, move, to_host
from portable_mlp.callbacks import Callback, Progress
from portable_mlp.functions import log_softmax, sigmoid, softplus
from portable_mlp.initializers import GlorotUniform
from portable_mlp.layers import Layer
from portable_mlp.losses import (
    LOSSES,
    BinaryCrossEntropy,
    Loss,
    Poisson,
    SoftmaxCrossEntropy,
    SquaredError,
)
from portable_mlp.network import Network, mlp
from portable_mlp.optimizers import SGD, AdamW, Optimizer, RMSprop, SklearnAdam, SklearnSGD
from portable_mlp.schedules import Adaptive, InverseScaling, Schedule
from portable_mlp.steps import Batch
from portable_mlp.training import ArraySource, State, Trainer, fit_lbfgs
from portable_mlp.typing import Array

_CHUNK = 2**22  # elements of the widest activation that prediction holds at once


class _MultilayerPerceptron(BaseEstimator):
    """What classifier and regressor share."""

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        "hidden_layer_sizes": ["array-like", Interval(Integral, 1, None, closed="left")],
        "alpha": [Interval(Real, 0, None, closed="left")],
        "batch_size": [StrOptions({"auto"}), Interval(Integral, 1, None, closed="left")],
        "learning_rate_init": [Interval(Real, 0, None, closed="neither")],
        "power_t": [Interval(Real, 0, None, closed="left")],
        "max_iter": [Interval(Integral, 1, None, closed="left")],
        "shuffle": ["boolean"],
        "random_state": ["random_state"],
        "tol": [Interval(Real, 0, None, closed="left")],
        "verbose": ["verbose"],
        "warm_start": ["boolean"],
        "momentum": [Interval(Real, 0, 1, closed="both")],
        "nesterovs_momentum": ["boolean"],
        "early_stopping": ["boolean"],
        "validation_fraction": [Interval(Real, 0, 1, closed="left")],
        "beta_1": [Interval(Real, 0, 1, closed="left")],
        "beta_2": [Interval(Real, 0, 1, closed="left")],
        "epsilon": [Interval(Real, 0, None, closed="neither")],
        "n_iter_no_change": [Interval(Integral, 1, None, closed="left"), Options(Real, {inf})],
        "max_fun": [Interval(Integral, 1, None, closed="left")],
        "dtype": [StrOptions({"float32", "float64"}), None],
        "dropout": [Interval(Real, 0, 1, closed="left")],
        "clip_norm": [Interval(Real, 0, None, closed="neither"), None],
    }

    # -------------------------------------------------------- parameters -> objects

    def _optimizer(self) -> Optimizer:
        if isinstance(self.solver, Optimizer):
            return self.solver
        moments = {"beta_1": self.beta_1, "beta_2": self.beta_2, "epsilon": self.epsilon}
        build = {
            "sgd": lambda: (
                SklearnSGD(momentum=self.momentum, nesterov=self.nesterovs_momentum)
                if self.momentum
                else SGD()
            ),
            "adam": lambda: SklearnAdam(**moments),
            "adamw": lambda: AdamW(**moments),
            "rmsprop": lambda: RMSprop(epsilon=self.epsilon),
            "lbfgs": lambda: SGD(),  # never stepped
        }
        optimizer: Optimizer = lookup("solver", self.solver, build, Optimizer)()
        return optimizer

    def _schedule(self) -> Schedule:
        named = {
            "constant": Schedule(),
            "invscaling": InverseScaling(self.power_t),
            "adaptive": Adaptive(),
        }
        schedule: Schedule = lookup("learning_rate", self.learning_rate, named, Schedule)
        if isinstance(self.learning_rate, str) and self.solver != "sgd":
            if self.learning_rate != "constant":
                warnings.warn(
                    f"learning_rate={self.learning_rate!r} is for solver='sgd' and has no"
                    f" effect with solver={self.solver!r}, as in scikit-learn; a schedule"
                    " from portable_mlp.schedules works with every solver but 'lbfgs'",
                    UserWarning,
                    stacklevel=4,
                )
            return Schedule()
        return schedule

    def _hidden(self) -> list[int]:
        hidden: list[int] = np.atleast_1d(np.asarray(self.hidden_layer_sizes)).tolist()
        if any(not isinstance(n, int) or n < 1 for n in hidden):
            raise ValueError(f"hidden_layer_sizes must be > 0, got {hidden}.")
        return hidden

    def _network(self, sizes: list[int]) -> Network:
        init = GlorotUniform(2.0 if self.activation == "logistic" else 6.0)
        activation = self.activation
        if not isinstance(activation, str | Layer):
            activation = tuple(activation)
        return mlp(
            sizes,
            activation,
            dropout=self.dropout,
            weight_init=init,
            bias_init=init,
        )

    def _check_parameters(self) -> None:
        self._validate_params()
        if self.solver == "lbfgs":
            given = {"dropout": self.dropout > 0, "clip_norm": self.clip_norm is not None}
            given["a schedule"] = isinstance(self.learning_rate, Schedule)
            for name in (name for name, is_given in given.items() if is_given):
                raise ValueError(f"solver='lbfgs' cannot take {name}: it has no steps of its own")
            if self.early_stopping:
                warnings.warn(
                    "early_stopping has no effect with solver='lbfgs', as in scikit-learn",
                    UserWarning,
                    stacklevel=4,
                )

    # -------------------------------------------------------- input

    def _check_X(self, X: Any, reset: bool) -> Array:
        """X, two-dimensional, real, finite, of the width seen in fit, where it is."""
        if isinstance(backend_of(X), NumPyBackend):
            return validate_data(self, X, dtype=(np.float64, np.float32), reset=reset)
        xp = backend_of(X).xp
        name = type(self).__name__
        if X.ndim != 2:
            raise ValueError(f"X: expected a 2-D array, got {X.ndim} dimensions")
        if 0 in X.shape:
            raise ValueError(f"X: found array with shape {tuple(X.shape)}, nothing to learn from")
        if xp.isdtype(X.dtype, "complex floating"):
            raise ValueError("X: complex data not supported")
        if not xp.isdtype(X.dtype, "real floating"):
            known = xp.__array_namespace_info__().dtypes(device=backend_of(X).device)
            X = xp.astype(X, known.get("float64", xp.float32))
        elif not bool(xp.all(xp.isfinite(X))):
            raise ValueError(f"X contains NaN or infinity, which {name} does not accept")
        if reset:
            self.n_features_in_ = int(X.shape[1])
            if hasattr(self, "feature_names_in_"):
                del self.feature_names_in_
        elif X.shape[1] != self.n_features_in_:
            raise ValueError(
                f"X has {X.shape[1]} features, but {name} is expecting"
                f" {self.n_features_in_} features as input"
            )
        return X

    def _check_y(self, y: Any, X: Array) -> NDArray[Any]:
        if y is None:
            raise ValueError(f"{type(self).__name__} requires y to be passed, but y is None")
        host: NDArray[Any] = check_array(to_host(y), ensure_2d=False, dtype=None, input_name="y")
        check_consistent_length(np.empty((X.shape[0], 0)), host)
        if host.ndim == 2 and host.shape[1] == 1:
            host = column_or_1d(host, warn=True)
        return host

    @staticmethod
    def _check_weights(sample_weight: Any, X: Array) -> NDArray[np.float64] | None:
        if sample_weight is None:
            return None
        weights = np.asarray(to_host(sample_weight), dtype=np.float64)
        if weights.ndim == 0:
            weights = np.full(X.shape[0], float(weights))
        if weights.shape != (X.shape[0],):
            raise ValueError(f"sample_weight: expected shape {(X.shape[0],)}, got {weights.shape}")
        if not np.isfinite(weights).all() or (weights < 0).any():
            raise ValueError("sample_weight must be finite and not negative")
        if not weights.any():
            raise ValueError("sample_weight is zero for every row: nothing to learn from")
        return weights

    # -------------------------------------------------------- fit

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Fit the network to X and y.

        Parameters
        ----------
        X : array-like (n_samples, n_features)
            From any backend; computation follows it unless ``device`` or ``backend``
            say otherwise.
        y : array-like (n_samples,) or (n_samples, n_outputs)
            Labels (strings too), indicators of several labels, or real targets.
        sample_weight : array-like (n_samples,), optional
            Not negative, not all zero.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            If a parameter or the data is not as it must be; the model is unchanged.
        DivergenceError
            If training leads to NaN or infinite values; the model is unchanged.  With
            early stopping it is a RuntimeWarning instead, and the best weights are kept.
        BackendError
            If the device or backend asked for cannot be used.
        """
        with self._unchanged_on_error():
            return self._fit(X, y, sample_weight, incremental=False)

    @contextmanager
    def _unchanged_on_error(self) -> Iterator[None]:
        # Attributes are replaced, never altered in place, so references are enough
        before = dict(vars(self))
        try:
            yield
        except BaseException:
            for name in vars(self).keys() - before.keys():
                delattr(self, name)
            for name, value in before.items():
                setattr(self, name, value)
            raise

    def _fit(self, X: Any, y: Any, sample_weight: Any, *, incremental: bool) -> Self:
        self._check_parameters()
        optimizer, schedule = self._optimizer(), self._schedule()
        again = hasattr(self, "coefs_") and (self.warm_start or incremental)
        home = backend_of(X)
        backend = get_backend(self.device, self.backend, like=X)
        X = self._check_X(X, reset=not again)
        weights = self._check_weights(sample_weight, X)
        target, loss, attributes = self._encode(self._check_y(y, X), X, again, incremental)
        n_outputs = target.shape[1] if target.ndim == 2 else attributes.pop("n_outputs_", 1)
        network = self._network([X.shape[1], *self._hidden(), n_outputs])
        for name, value in attributes.items():
            setattr(self, name, value)
        if again:
            self._check_shapes(network)
        dtype = self.dtype or ("float32" if str(X.dtype).endswith("float32") else "float64")
        rng = check_random_state(self.random_state)
        params = self._flat_params() if again else network.init(rng)

        with backend.scope(dtype):
            data = Batch(
                move(X, backend, dtype),
                backend.asarray(target, "int32" if target.dtype.kind == "i" else dtype),
                None if weights is None else backend.asarray(weights, dtype),
            )
        trainer = Trainer(
            network,
            loss,
            optimizer,
            backend,
            dtype,
            self.learning_rate_init,
            schedule,
            alpha=self.alpha,
            clip_norm=self.clip_norm,
            shuffle=self.shuffle,
            tol=self.tol,
            patience=self.n_iter_no_change,
            # scikit-learn reports the squared error's mean over the outputs
            loss_scale=1.0 / n_outputs if isinstance(loss, SquaredError) else 1.0,
        )
        if self.solver == "lbfgs":
            params, fitted = self._run_lbfgs(trainer, params, data)
        else:
            params, fitted = self._run_epochs(
                trainer, params, data, target, weights, rng, again, incremental
            )
        with backend.scope(dtype):
            if home == backend:
                kept = [backend.asarray(p, copy=True) for p in params]
            else:
                kept = [move(p, home, dtype) for p in params]
        self.coefs_, self.intercepts_ = kept[::2], kept[1::2]
        self.n_outputs_ = n_outputs
        self.n_layers_ = len(self.coefs_) + 1
        self.out_activation_ = loss.link_name
        self._loss = loss
        for name, value in fitted.items():
            setattr(self, name, value)
        return self

    def _flat_params(self) -> list[Array]:
        return [p for pair in zip(self.coefs_, self.intercepts_, strict=True) for p in pair]

    def _check_shapes(self, network: Network) -> None:
        wanted = [param.shape for param in network.params]
        fitted = [tuple(own.shape) for own in self._flat_params()]
        if wanted != fitted:
            raise ValueError(
                f"continuing needs the same layers: asked for are weights and biases of"
                f" shapes {wanted}, fitted are {fitted}"
            )

    def _run_lbfgs(
        self, trainer: Trainer, params: list[Array], data: Batch
    ) -> tuple[list[Array], dict[str, Any]]:
        params, loss, n_iter, message = fit_lbfgs(
            trainer, params, data, max_iter=self.max_iter, max_fun=self.max_fun
        )
        if message is not None:
            warnings.warn(
                f"lbfgs failed to converge after {n_iter} iteration(s): {message}."
                " Increase max_iter, or scale the data.",
                ConvergenceWarning,
                stacklevel=4,
            )
        return params, {"loss_": loss, "n_iter_": n_iter, "t_": 0}

    def _run_epochs(
        self,
        trainer: Trainer,
        params: list[Array],
        data: Batch,
        target: NDArray[Any],
        weights: NDArray[np.float64] | None,
        rng: np.random.RandomState,
        again: bool,
        incremental: bool,
    ) -> tuple[list[Array], dict[str, Any]]:
        if self.early_stopping and incremental:
            raise ValueError("partial_fit does not support early_stopping=True")
        rows, validate = None, None
        if self.early_stopping:
            # Binary labels alone are stratified, as in scikit-learn
            binary = isinstance(trainer.loss, BinaryCrossEntropy) and target.ndim == 1
            stratify = target.astype(bool)[:, None] if binary else None
            rows, held_out = train_test_split(
                np.arange(data.x.shape[0]),
                test_size=self.validation_fraction,
                random_state=rng,
                stratify=stratify,
            )
            if len(held_out) < 2:
                raise ValueError(
                    "The validation set is too small. Increase 'validation_fraction'"
                    " or the size of your dataset."
                )
            validate = self._validation(trainer, data, target, weights, held_out)

        source = ArraySource(data, rows)
        batch_size = 200 if self.batch_size == "auto" else self.batch_size
        if self.batch_size != "auto" and batch_size > source.n_rows:
            warnings.warn(
                "Got `batch_size` less than 1 or larger than sample size."
                f" It is going to be clipped to {source.n_rows}",
                UserWarning,
                stacklevel=4,
            )
        trainer = replace(trainer, batch_size=min(batch_size, source.n_rows))

        state = trainer.start(params)
        old: State | None = getattr(self, "_state", None) if again else None
        if old is not None:
            # A warm start forgets the moments and the schedule, partial_fit does not
            if incremental:
                state = trainer.resume(old, state)
            else:
                state = replace(
                    state,
                    rows=old.rows,
                    watched=old.watched,
                    best=old.best,
                    stalled_for=old.stalled_for,
                    history=list(old.history),
                )
        n_before = len(state.history)
        callbacks: list[Callback] = [Progress()] if self.verbose else []
        reason = trainer.fit(
            state,
            source,
            1 if incremental else self.max_iter,
            rng,
            validate=validate,
            callbacks=callbacks,
            planned_epochs=self.max_iter,
        )
        if reason == "interrupted":
            warnings.warn("Training interrupted by user.", UserWarning, stacklevel=4)
        if reason == "max_epochs" and not incremental:
            warnings.warn(
                f"Stochastic Optimizer: Maximum iterations ({self.max_iter}) reached and"
                " the optimization hasn't converged yet.",
                ConvergenceWarning,
                stacklevel=4,
            )
        params = trainer.params(state.arrays.leaves)
        state.arrays = state.arrays._replace(leaves=[])
        losses = [epoch.loss for epoch in state.history]
        scores = [epoch.validation_score for epoch in state.history]
        return params, {
            "_state": state,
            "loss_": losses[-1] if losses else inf,
            "loss_curve_": losses,
            "n_iter_": len(losses) - n_before,
            "t_": state.rows,
            "best_loss_": None if self.early_stopping else state.best,
            "validation_scores_": scores if self.early_stopping else None,
            "best_validation_score_": -state.best if self.early_stopping else None,
        }

    def _validation(
        self,
        trainer: Trainer,
        data: Batch,
        target: NDArray[Any],
        weights: NDArray[np.float64] | None,
        rows: NDArray[np.intp],
    ) -> Any:
        """The validation score as a function of the parameters."""
        backend, xp = trainer.backend, trainer.backend.xp
        with backend.scope(trainer.dtype):
            x = xp.take(data.x, backend.indices(rows), axis=0)
        wanted = target[rows]
        share = None if weights is None else weights[rows]

        def validate(params: list[Array]) -> float:
            z = _logits(trainer.network, params, x, backend)
            if not bool(xp.all(xp.isfinite(z))):
                return nan
            got = backend.to_host(self._decide(z, trainer.loss, xp))
            if got.shape != wanted.shape:
                got = got.reshape(wanted.shape)
            return float(self._metric(wanted, got, sample_weight=share))

        return validate

    def _has_steps(self) -> bool:
        if self.solver == "lbfgs":
            raise AttributeError(
                "partial_fit is only available for stochastic optimizers."
                f" {self.solver} is not stochastic."
            )
        return True

    # -------------------------------------------------------- predict

    def _score(self, X: Any, y: Any, sample_weight: Any) -> float:
        # On the host: scikit-learn's metrics refuse a device's arrays
        weights = None if sample_weight is None else to_host(sample_weight)
        return float(self._metric(to_host(y), to_host(self.predict(X)), sample_weight=weights))

    def _predict_with(self, function: Any, X: Any) -> tuple[Array, Backend]:
        """``function(logits, loss, xp)`` where it is computed, moved to where X is."""
        check_is_fitted(self)
        home = backend_of(X)
        backend = get_backend(self.device, self.backend, like=X)
        X = self._check_X(X, reset=False)
        params = self._flat_params()
        dtype = str(params[0].dtype).split(".")[-1]
        # The layers as they were fitted, whatever hidden_layer_sizes says by now
        network = self._network([self.n_features_in_, *(w.shape[1] for w in params[::2])])
        with backend.scope(dtype):
            params = [move(p, backend, dtype) for p in params]
            z = _logits(network, params, move(X, backend, dtype), backend)
            result = function(z, self._loss, backend.xp)
            return (result if home == backend else move(result, home)), home


def _logits(network: Network, params: list[Array], x: Array, backend: Backend) -> Array:
    """Logits of all rows, computed in chunks of bounded memory."""
    xp = backend.xp
    widest = max(max(p.shape) for p in network.params)
    chunk = max(1, _CHUNK // widest)
    n = x.shape[0]
    parts = [
        network(params, x[start : min(start + chunk, n), ...], xp) for start in range(0, n, chunk)
    ]
    return parts[0] if len(parts) == 1 else xp.concat(parts)


class MLPClassifier(ClassifierMixin, _MultilayerPerceptron):
    """Multilayer perceptron for one label of two or more classes, or several labels.

    Minimises the cross-entropy of its logits.

    Parameters
    ----------
    hidden_layer_sizes : int or sequence of int, default=(100,)
        Units of each hidden layer.
    activation : str, Layer, or a sequence of one for each hidden layer, default="relu"
        A name of `portable_mlp.activations.ACTIVATIONS`.
    solver : {"adam", "sgd", "adamw", "rmsprop", "lbfgs"} or Optimizer, default="adam"
        "adam" and "sgd" follow scikit-learn's conventions; an instance from
        `portable_mlp.optimizers` brings its own settings.
    alpha : float >= 0, default=1e-4
        L2 penalty on the weights, divided by the rows of a batch.
    batch_size : int or "auto", default="auto"
        Rows of a batch; "auto" is min(200, n_samples).
    learning_rate : {"constant", "invscaling", "adaptive"} or Schedule, default="constant"
        The names are for solver="sgd"; an instance from `portable_mlp.schedules`
        works with every solver but "lbfgs".
    learning_rate_init : float > 0, default=0.001
    power_t : float >= 0, default=0.5
        Exponent of "invscaling".
    max_iter : int >= 1, default=200
        Epochs; iterations of "lbfgs".
    shuffle : bool, default=True
        Draw a new order of the rows each epoch.
    random_state : int, RandomState or None, default=None
        One generator for initial weights, held-out rows, order, and dropout.
    tol : float >= 0, default=1e-4
        Least improvement that counts.
    verbose : bool, default=False
        A progress bar on a terminal, a line an epoch elsewhere.
    warm_start : bool, default=False
        Whether ``fit`` goes on from the fitted weights.
    momentum : float in [0, 1], default=0.9
        Of "sgd".
    nesterovs_momentum : bool, default=True
        Of "sgd".
    early_stopping : bool, default=False
        Watch the score of held-out rows instead of the loss, and keep the best weights.
    validation_fraction : float in [0, 1), default=0.1
    beta_1, beta_2, epsilon : float
        Of "adam" and "adamw" (epsilon of "rmsprop" too).
    n_iter_no_change : int or inf, default=10
        Epochs without improvement after which training stops.
    max_fun : int, default=15000
        Evaluations that "lbfgs" may take.
    device : {"cpu", "gpu", "auto"}, optional
        Where to compute: NumPy, CuPy, or CuPy where there is a GPU.
    backend : {"numpy", "cupy", "torch", "jax"}, optional
        With neither, computation follows X.
    dtype : {"float32", "float64"}, optional
        Of the computation; that of X if not given (float64 for all but float32).
    dropout : float in [0, 1), default=0
        Rate behind each hidden activation.
    clip_norm : float > 0, optional
        Largest global norm of a step's gradients.
    label_smoothing : float in [0, 1), default=0
        Share of each target that is spread evenly over the classes.

    Attributes
    ----------
    classes_ : ndarray (n_classes,)
    coefs_, intercepts_ : lists of arrays (n_in, n_out) and (n_out,)
        In the namespace, and on the device, of the X fitted.
    loss_, best_loss_ : float
    loss_curve_ : list of float
    validation_scores_, best_validation_score_ : list of float, float; None without
        early stopping
    n_iter_, t_, n_layers_, n_outputs_, n_features_in_ : int
    feature_names_in_ : ndarray of str
    out_activation_ : str

    Examples
    --------
    >>> from portable_mlp import MLPClassifier
    >>> from sklearn.datasets import load_iris
    >>> X, y = load_iris(return_X_y=True)
    >>> model = MLPClassifier(solver="lbfgs", alpha=1.0, max_iter=1000, random_state=0)
    >>> model = model.fit(X, y)
    >>> model.score(X, y) > 0.95
    True
    """

    _metric = staticmethod(accuracy_score)
    _parameter_constraints: ClassVar[dict[str, Any]] = {
        **_MultilayerPerceptron._parameter_constraints,
        "label_smoothing": [Interval(Real, 0, 1, closed="left")],
    }

    def __init__(
        self,
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
        dropout: float = 0.0,
        clip_norm: float | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        self.hidden_layer_sizes = hidden_layer_sizes
        self.activation = activation
        self.solver = solver
        self.alpha = alpha
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.learning_rate_init = learning_rate_init
        self.power_t = power_t
        self.max_iter = max_iter
        self.shuffle = shuffle
        self.random_state = random_state
        self.tol = tol
        self.verbose = verbose
        self.warm_start = warm_start
        self.momentum = momentum
        self.nesterovs_momentum = nesterovs_momentum
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.beta_1 = beta_1
        self.beta_2 = beta_2
        self.epsilon = epsilon
        self.n_iter_no_change = n_iter_no_change
        self.max_fun = max_fun
        self.device = device
        self.backend = backend
        self.dtype = dtype
        self.dropout = dropout
        self.clip_norm = clip_norm
        self.label_smoothing = label_smoothing

    def _encode(
        self, y: NDArray[Any], X: Array, again: bool, incremental: bool
    ) -> tuple[NDArray[Any], Loss, dict[str, Any]]:
        """Targets as numbers, their loss, and attributes to set."""
        kind = type_of_target(y, input_name="y")
        if kind == "multilabel-indicator":
            classes = np.arange(y.shape[1])
        elif kind in ("binary", "multiclass"):
            classes = np.unique(y)
        else:
            raise ValueError(
                f"Unknown label type: {kind}. Maybe you are trying to fit a classifier,"
                " which expects discrete classes on a regression target with continuous"
                " values."
            )
        if incremental:
            if np.setdiff1d(classes, self.classes_).size:
                raise ValueError(
                    "`y` has classes not in `self.classes_`. `self.classes_` has"
                    f" {self.classes_}. 'y' has {classes}."
                )
            classes = self.classes_
        elif again and not np.array_equal(classes, self.classes_):
            raise ValueError(
                "warm_start can only be used where `y` has the same classes as in the previous"
                f" call to fit. Previously got {self.classes_}, `y` has {classes}"
            )
        binary = BinaryCrossEntropy(self.label_smoothing)
        attributes: dict[str, Any] = {"classes_": classes}
        if kind == "multilabel-indicator":
            return y.astype(np.float64), binary, {**attributes, "_multilabel": True}
        attributes["_multilabel"] = False
        codes = np.searchsorted(classes, y).astype(np.int32)
        if len(classes) <= 2:
            return codes.astype(np.float64), binary, attributes
        attributes["n_outputs_"] = len(classes)
        return codes, SoftmaxCrossEntropy(self.label_smoothing), attributes

    @available_if(_MultilayerPerceptron._has_steps)
    def partial_fit(self, X: Any, y: Any, classes: Any = None, sample_weight: Any = None) -> Self:
        """One epoch over X and y, going on from where the model is.

        Parameters
        ----------
        X : array-like (n_samples, n_features)
        y : array-like (n_samples,) or (n_samples, n_outputs)
        classes : array-like (n_classes,), optional
            All labels that may ever come; needed in the first call.
        sample_weight : array-like (n_samples,), optional

        Returns
        -------
        self
        """
        known = getattr(self, "classes_", None)
        given = known if classes is None else np.unique(to_host(classes))
        if given is None:
            raise ValueError("classes must be passed on the first call to partial_fit.")
        if known is not None and not np.array_equal(given, known):
            raise ValueError(
                f"`classes={classes!r}` is not the same as on last call to partial_fit,"
                f" was: {known!r}"
            )
        with self._unchanged_on_error():
            self.classes_ = given
            return self._fit(X, y, sample_weight, incremental=True)

    def _decide(self, z: Array, loss: Loss, xp: Any) -> Array:
        """Class numbers (n,), or indicators (n, n_labels), from logits."""
        if isinstance(loss, SoftmaxCrossEntropy):
            return xp.argmax(z, axis=1)
        yes = xp.astype(z > 0.0, xp.int32)
        if not self._multilabel and len(self.classes_) == 1:
            yes = xp.zeros_like(yes)
        return yes[:, 0] if yes.shape[1] == 1 else yes

    def predict(self, X: Any) -> Array:
        """The most probable class of each row.

        Parameters
        ----------
        X : array-like (n_samples, n_features)

        Returns
        -------
        y : array (n_samples,) or, for several labels, (n_samples, n_labels)
            In the namespace and on the device of X; labels that it has no data type
            for as NumPy.
        """
        codes, home = self._predict_with(self._decide, X)
        if self._multilabel:
            return codes.astype(np.int64) if isinstance(home, NumPyBackend) else codes
        classes = self.classes_
        if not isinstance(home, NumPyBackend) and classes.dtype.kind in "biuf":
            labels = home.indices(classes) if classes.dtype.kind in "iu" else home.asarray(classes)
            # Large integers may have no place there (JAX has 32 bits by default)
            if np.array_equal(home.to_host(labels), classes):
                return home.xp.take(labels, codes, axis=0)
        return classes[home.to_host(codes)]

    def predict_proba(self, X: Any) -> Array:
        """Probabilities of the classes.

        Parameters
        ----------
        X : array-like (n_samples, n_features)

        Returns
        -------
        p : array (n_samples, n_classes)
            Rows sum to one, except for several labels, where each is on its own.
        """

        def probabilities(z: Array, loss: Loss, xp: Any) -> Array:
            if z.shape[1] > 1:
                return loss.link(z, xp)
            return xp.concat([sigmoid(-z, xp), sigmoid(z, xp)], axis=1)

        return self._predict_with(probabilities, X)[0]

    def predict_log_proba(self, X: Any) -> Array:
        """Logarithms of `predict_proba`, computed from the logits: finite where those are.

        Parameters
        ----------
        X : array-like (n_samples, n_features)

        Returns
        -------
        log_p : array (n_samples, n_classes)
        """

        def logs(z: Array, loss: Loss, xp: Any) -> Array:
            if isinstance(loss, SoftmaxCrossEntropy):
                return log_softmax(z, xp)
            if z.shape[1] > 1:
                return -softplus(-z, xp)
            return xp.concat([-softplus(z, xp), -softplus(-z, xp)], axis=1)

        return self._predict_with(logs, X)[0]

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Accuracy: the share of rows with the right class (for several labels, with all right).

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

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = True
        return tags


class MLPRegressor(RegressorMixin, _MultilayerPerceptron):
    """Multilayer perceptron for one or several real targets.

    Parameters
    ----------
    loss : {"squared_error", "poisson", "huber", "quantile"} or Loss, default="squared_error"
        An instance from `portable_mlp.losses` brings its own settings, such as
        ``Quantile(0.9)``.
    hidden_layer_sizes, activation, solver, alpha, batch_size, learning_rate, \
learning_rate_init, power_t, max_iter, shuffle, random_state, tol, verbose, warm_start, \
momentum, nesterovs_momentum, early_stopping, validation_fraction, beta_1, beta_2, epsilon, \
n_iter_no_change, max_fun, device, backend, dtype, dropout, clip_norm
        As in `MLPClassifier`.

    Attributes
    ----------
    coefs_, intercepts_, loss_, best_loss_, loss_curve_, validation_scores_, \
best_validation_score_, n_iter_, t_, n_layers_, n_outputs_, n_features_in_, \
feature_names_in_, out_activation_
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

    _metric = staticmethod(r2_score)

    def __init__(
        self,
        loss: str | Loss = "squared_error",
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
        dropout: float = 0.0,
        clip_norm: float | None = None,
    ) -> None:
        self.loss = loss
        self.hidden_layer_sizes = hidden_layer_sizes
        self.activation = activation
        self.solver = solver
        self.alpha = alpha
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.learning_rate_init = learning_rate_init
        self.power_t = power_t
        self.max_iter = max_iter
        self.shuffle = shuffle
        self.random_state = random_state
        self.tol = tol
        self.verbose = verbose
        self.warm_start = warm_start
        self.momentum = momentum
        self.nesterovs_momentum = nesterovs_momentum
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.beta_1 = beta_1
        self.beta_2 = beta_2
        self.epsilon = epsilon
        self.n_iter_no_change = n_iter_no_change
        self.max_fun = max_fun
        self.device = device
        self.backend = backend
        self.dtype = dtype
        self.dropout = dropout
        self.clip_norm = clip_norm

    def _encode(
        self, y: NDArray[Any], X: Array, again: bool, incremental: bool
    ) -> tuple[NDArray[Any], Loss, dict[str, Any]]:
        names = ("squared_error", "poisson", "huber", "quantile")
        loss = lookup("loss", self.loss, {name: LOSSES[name] for name in names}, Loss)
        if isinstance(loss, BinaryCrossEntropy | SoftmaxCrossEntropy):
            raise ValueError(f"loss={loss!r} is for labels: use MLPClassifier")
        y = check_array(y, ensure_2d=False, dtype=np.float64, input_name="y")
        if isinstance(loss, Poisson) and (y < 0).any():
            raise ValueError("y must not be negative for loss='poisson'")
        return y, loss, {}

    @available_if(_MultilayerPerceptron._has_steps)
    def partial_fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """One epoch over X and y, going on from where the model is.

        Parameters
        ----------
        X : array-like (n_samples, n_features)
        y : array-like (n_samples,) or (n_samples, n_outputs)
        sample_weight : array-like (n_samples,), optional

        Returns
        -------
        self
        """
        with self._unchanged_on_error():
            return self._fit(X, y, sample_weight, incremental=True)

    def _decide(self, z: Array, loss: Loss, xp: Any) -> Array:
        """Predictions (n,) or (n, n_outputs) from logits."""
        y = loss.link(z, xp)
        return y[:, 0] if y.shape[1] == 1 else y

    def predict(self, X: Any) -> Array:
        """Predicted targets.

        Parameters
        ----------
        X : array-like (n_samples, n_features)

        Returns
        -------
        y : array (n_samples,) or (n_samples, n_outputs)
            In the namespace and on the device of X.
        """
        return self._predict_with(self._decide, X)[0]

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Coefficient of determination R², averaged over the outputs.

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
