"""scikit-learn's interface to the training loop, and nothing else.

Names, defaults and conventions are those of ``sklearn.neural_network``; what is
added comes after them, keyword-only, and changes no default.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from math import inf, nan
from numbers import Integral, Real
from typing import Any, ClassVar, Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import issparse
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import accuracy_score, check_scoring, get_scorer_names, r2_score
from sklearn.model_selection import train_test_split
from sklearn.utils import check_random_state, compute_sample_weight
from sklearn.utils._param_validation import Interval, Options, StrOptions
from sklearn.utils.multiclass import type_of_target
from sklearn.utils.validation import check_is_fitted

from portable_mlp.activations import lookup
from portable_mlp.backends import Backend, NumPyBackend, backend_of, get_backend, move, to_host
from portable_mlp.callbacks import Callback, Progress, pausing
from portable_mlp.functions import log_softmax, sigmoid, softplus
from portable_mlp.initializers import GlorotUniform
from portable_mlp.layers import Layer, Linear
from portable_mlp.lbfgs import fit_lbfgs
from portable_mlp.losses import (
    LOSSES,
    BinaryCrossEntropy,
    CallableLoss,
    Loss,
    Poisson,
    SoftmaxCrossEntropy,
    SquaredError,
)
from portable_mlp.network import Network, mlp
from portable_mlp.optimizers import SGD, AdamW, Optimizer, RMSprop, SklearnAdam, SklearnSGD
from portable_mlp.peer import (
    CallbackSupportMixin,
    FitCallbacks,
    PeerInternals,
    check_same_namespace,
    only_if,
    with_callbacks,
)
from portable_mlp.schedules import Adaptive, InverseScaling, Schedule
from portable_mlp.sources import ArraySource, Selection, Source, SparseSource, on_backend
from portable_mlp.training import State, Trainer, Validate
from portable_mlp.typing import Array
from portable_mlp.validation import check_weights, check_X, check_y
from portable_mlp.warn import warn

Mode = Literal["fit", "partial", "continue", "init"]

LossFunction = Callable[[Array, Array, Any], tuple[Array, Array]]

_CHUNK = 2**22  # elements of the widest activation that prediction holds at once


class _Rows(NamedTuple):
    """Checked rows: x where it is (or CSR), y as it came and as numbers, weights.

    Of x, only ``numbers`` if given: it is never copied.
    """

    x: Any
    y: NDArray[Any]
    target: NDArray[Any]
    weights: NDArray[np.float64] | None
    numbers: NDArray[np.intp] | None = None

    def take(self, numbers: NDArray[np.intp]) -> _Rows:
        weights = None if self.weights is None else self.weights[numbers]
        return _Rows(self.x, self.y[numbers], self.target[numbers], weights, numbers)


def _without_steps(model: Any) -> str | None:
    if model.solver == "lbfgs":
        return "only available for stochastic optimizers: lbfgs is not stochastic"
    return None


def _without_partial_fit(model: Any) -> str | None:
    if model.early_stopping:
        return "partial_fit does not support early_stopping=True"
    return _without_steps(model)


class _MultilayerPerceptron(CallbackSupportMixin, PeerInternals, BaseEstimator):
    """What classifier and regressor share."""

    _target_dtype: ClassVar[type | None] = None  # labels may be anything

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
        "weight_decay": [Interval(Real, 0, None, closed="left"), None],
        "scoring": [StrOptions(set(get_scorer_names())), callable, None],
        "callbacks": ["array-like", None],
    }

    _results_on_host = False
    classes_: NDArray[Any]

    def _store(self, given: dict[str, Any]) -> None:
        """Keep the constructor's arguments as they are."""
        for name, value in given.items():
            if name not in ("self", "__class__"):
                setattr(self, name, value)

    # -------------------------------------------------------- parameters -> objects

    def _make_optimizer(self) -> Optimizer:
        if isinstance(self.solver, Optimizer):
            if self.weight_decay is not None:
                raise ValueError(
                    f"weight_decay is for a solver given by name: set it in {self.solver!r}"
                )
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
        if self.weight_decay is None:
            return optimizer
        return replace(optimizer, weight_decay=self.weight_decay)

    def _make_schedule(self) -> Schedule:
        named = {
            "constant": Schedule(),
            "invscaling": InverseScaling(self.power_t),
            "adaptive": Adaptive(),
        }
        schedule: Schedule = lookup("learning_rate", self.learning_rate, named, Schedule)
        if isinstance(self.learning_rate, str) and self.solver != "sgd":
            if self.learning_rate != "constant":
                warn(
                    f"learning_rate={self.learning_rate!r} is for solver='sgd' and has no"
                    f" effect with solver={self.solver!r}, as in scikit-learn; a schedule"
                    " from portable_mlp.schedules works with every solver but 'lbfgs'",
                    UserWarning,
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

    @classmethod
    @cache
    def _get_param_names(cls) -> list[str]:
        # Reading a long signature takes a tenth of a short fit
        names: list[str] = super()._get_param_names()
        return names

    def _check_parameters(self) -> None:
        self._validate_params()
        if self.solver == "lbfgs":
            given = {"dropout": self.dropout > 0, "clip_norm": self.clip_norm is not None}
            given["a schedule"] = isinstance(self.learning_rate, Schedule)
            given["weight_decay"] = self.weight_decay is not None
            given["scoring"] = self.scoring is not None
            given["a checkpoint"] = bool(pausing(self.callbacks or ()))
            for name in (name for name, is_given in given.items() if is_given):
                raise ValueError(f"solver='lbfgs' cannot take {name}: it has no steps of its own")
            if self.early_stopping:
                warn(
                    "early_stopping has no effect with solver='lbfgs', as in scikit-learn",
                    UserWarning,
                )

    # -------------------------------------------------------- fit

    @with_callbacks
    def fit(
        self,
        X: Any,
        y: Any,
        sample_weight: Any = None,
        *,
        X_val: Any = None,
        y_val: Any = None,
        sample_weight_val: Any = None,
    ) -> Self:
        """Fit the network to X and y.

        Parameters
        ----------
        X : array-like or sparse matrix (n_samples, n_features)
            From any backend; computation follows it unless ``device`` or ``backend``
            say otherwise.
        y : array-like (n_samples,) or (n_samples, n_outputs)
            Labels (strings too), indicators of several labels, or real targets.
        sample_weight : array-like (n_samples,), optional
            Not negative, not all zero.
        X_val, y_val, sample_weight_val : array-like, optional
            Rows to validate on after each epoch, instead of a share of X where
            ``early_stopping`` is on; their curves are kept in any case.

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
        validation = X_val, y_val, sample_weight_val
        return self._guarded(X, y, sample_weight, "fit", validation=validation)

    @only_if(_without_steps)
    @with_callbacks
    def continue_fit(
        self,
        X: Any,
        y: Any,
        sample_weight: Any = None,
        *,
        n_iter: int | None = None,
        X_val: Any = None,
        y_val: Any = None,
        sample_weight_val: Any = None,
    ) -> Self:
        """Go on exactly where the last call stopped, up to ``max_iter`` epochs in all.

        Weights, the optimizer's moments, the random generator, the schedule and early
        stopping go on as if training had never stopped: with ``max_iter=n + m``, one
        ``fit`` and ``continue_fit`` of n and of m epochs give the same model.  (A warm
        start, as in scikit-learn, seeds the generator and the moments anew.)  On a
        model that is not fitted it begins.

        Parameters
        ----------
        X, y, sample_weight, X_val, y_val, sample_weight_val
            As in the call that is continued; see `fit`.
        n_iter : int, optional
            Epochs to do now; all that ``max_iter`` leaves, if not given.

        Returns
        -------
        self
        """
        if n_iter is not None and n_iter < 1:
            raise ValueError(f"n_iter must be at least 1, got {n_iter!r}")
        validation = X_val, y_val, sample_weight_val
        return self._guarded(X, y, sample_weight, "continue", n_iter=n_iter, validation=validation)

    def init_model(self, X: Any, y: Any) -> Self:
        """Draw the initial weights that ``fit`` would start from, and do not train.

        What the model predicts then is what it begins with; `continue_fit`,
        `partial_fit`, and ``fit`` with ``warm_start`` go on from there.

        Parameters
        ----------
        X : array-like (n_samples, n_features)
        y : array-like (n_samples,) or (n_samples, n_outputs)
            All classes have to occur.

        Returns
        -------
        self
        """
        return self._guarded(X, y, None, "init")

    def _guarded(self, X: Any, y: Any, sample_weight: Any, mode: Mode, **how: Any) -> Self:
        context = None
        told = hasattr(self, "_skl_callbacks") or hasattr(self, "_parent_callback_ctx")
        if told and mode in ("fit", "continue"):
            # Outside of what is undone on an error: callbacks are torn down after it
            context = self._init_callback_context(max_subtasks=self.max_iter)
        with self._unchanged_on_error():
            return self._fit(X, y, sample_weight, mode, context, **how)

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

    def _fit(
        self,
        X: Any,
        y: Any,
        sample_weight: Any,
        mode: Mode,
        context: Any = None,
        *,
        validation: tuple[Any, Any, Any] = (None, None, None),
        n_iter: int | None = None,
    ) -> Self:
        self._check_parameters()
        again = hasattr(self, "coefs_") and (
            mode in ("partial", "continue") or (mode == "fit" and self.warm_start)
        )
        home = backend_of(X)
        backend = get_backend(self.device, self.backend, like=X)
        as_given = X, y
        X = check_X(self, X, reset=not again)
        weights = check_weights(sample_weight, X)
        y = check_y(self, y, X, self._target_dtype)
        self._loss, n_outputs = self._learn_target(y, again, mode == "partial")
        target = self._numbers(y)
        self.out_activation_ = self._loss.link_name
        network = self._network([X.shape[1], *self._hidden(), n_outputs])
        dtype = self.dtype or ("float32" if str(X.dtype).endswith("float32") else "float64")
        rng = check_random_state(self.random_state)
        params = self._flat_params(network) if again else network.init(rng)
        weights = self._class_weighted(y, weights)
        if not issparse(X):
            with backend.scope(dtype):
                X = move(X, backend, dtype)
        trainer = self._trainer(network, backend, dtype)
        self.n_outputs_ = n_outputs
        self.n_layers_ = len(self._hidden()) + 2
        rows = _Rows(X, y, target, weights)
        held_out = self._check_validation(*validation)
        callbacks: list[Callback] = [Progress()] if self.verbose else []
        callbacks += self.callbacks or ()
        if context is not None:
            attributes = partial(self._with_params, network=network)
            callbacks.append(FitCallbacks(self, context, *as_given, attributes))
        if self.solver == "lbfgs" and mode != "init":
            params, fitted = self._run_lbfgs(trainer, params, rows, callbacks)
        else:
            state = self._state_to_go_on(trainer, params, again, mode)
            del params  # copied: training would hold them for nothing
            if mode == "init":
                state.generator = rng.get_state()
                before = 0
            else:
                before = self._run_epochs(
                    trainer, state, rows, rng, mode, callbacks, held_out, n_iter
                )
            params = trainer.params(state.leaves)
            fitted = self._curves(state, before)
        with backend.scope(dtype):
            if home == backend:
                kept = [backend.asarray(p, copy=True) for p in params]
            else:
                kept = [move(p, home, dtype) for p in params]
        fitted |= self._with_params(kept, network)
        for name, value in fitted.items():
            setattr(self, name, value)
        return self

    def _trainer(self, network: Network, backend: Backend, dtype: str) -> Trainer:
        n_outputs = network.params[-1].shape[0]
        return Trainer(
            network,
            self._loss,
            self._make_optimizer(),
            backend,
            dtype,
            self.learning_rate_init,
            self._make_schedule(),
            alpha=self.alpha,
            clip_norm=self.clip_norm,
            batch_size=200 if self.batch_size == "auto" else self.batch_size,
            shuffle=self.shuffle,
            tol=self.tol,
            patience=self.n_iter_no_change,
            # scikit-learn reports the squared error's mean over the outputs
            loss_scale=1.0 / n_outputs if isinstance(self._loss, SquaredError) else 1.0,
        )

    # -------------------------------------------------------- parameters of the network

    def _with_params(self, params: list[Array], network: Network) -> dict[str, list[Array]]:
        """Fitted attributes that hold these parameters, in the network's order."""
        coefs: list[Array] = []
        intercepts: list[Array] = []
        own: list[Array] = []
        for layer, arrays in zip(network.layers, network.split(params), strict=True):
            if isinstance(layer, Linear):
                coefs.append(arrays[0])
                intercepts.append(arrays[1])
            else:
                own += arrays
        return {"coefs_": coefs, "intercepts_": intercepts, "layer_params_": own}

    def _flat_params(self, network: Network) -> list[Array]:
        """The fitted parameters in the network's order."""
        pairs = zip(self.coefs_, self.intercepts_, strict=True)
        own = iter(getattr(self, "layer_params_", ()))
        found: list[Array] = []
        for layer in network.layers:
            if isinstance(layer, Linear):
                found += next(pairs, ())
            else:
                found += [next(own) for _ in layer.params]
        wanted = [param.shape for param in network.params]
        shapes = [tuple(array.shape) for array in found]
        if wanted != shapes or next(pairs, None) is not None:
            raise ValueError(
                f"continuing needs the same layers: asked for are weights and biases of"
                f" shapes {wanted}, fitted are {[tuple(w.shape) for w in self.coefs_]}"
            )
        return found

    def _fitted_network(self) -> Network:
        """The layers as they were fitted, whatever hidden_layer_sizes says by now."""
        return self._network([self.coefs_[0].shape[0], *(w.shape[1] for w in self.coefs_)])

    @property
    def _first_coef(self) -> Array:
        return self.coefs_[0]

    # -------------------------------------------------------- rows

    def _class_weighted(
        self, y: NDArray[Any], weights: NDArray[np.float64] | None
    ) -> NDArray[np.float64] | None:
        class_weight = getattr(self, "class_weight", None)
        if class_weight is None:
            return weights
        by_class: NDArray[np.float64] = compute_sample_weight(class_weight, y)
        return by_class if weights is None else weights * by_class

    def _check_validation(self, X: Any, y: Any, sample_weight: Any) -> _Rows | None:
        if X is None and y is None and sample_weight is None:
            return None
        if X is None or y is None:
            raise ValueError("X_val and y_val go together: one of them is missing")
        if self.solver == "lbfgs":
            raise ValueError("solver='lbfgs' cannot take X_val: it has no epochs to validate after")
        X = check_X(self, X, reset=False)
        y = check_y(self, y, X, self._target_dtype)
        weights = self._class_weighted(y, check_weights(sample_weight, X))
        return _Rows(X, y, self._numbers(y), weights)

    def _split(self, rows: _Rows, rng: np.random.RandomState) -> list[NDArray[np.intp]]:
        """Row numbers to train on, and to validate on."""
        # Binary labels alone are stratified, as in scikit-learn
        binary = rows.target.ndim == 1 and self._loss.link_name == "logistic"
        numbers = np.arange(rows.x.shape[0])
        split: list[NDArray[np.intp]] = train_test_split(
            numbers,
            test_size=self.validation_fraction,
            random_state=rng,
            stratify=rows.target.astype(bool)[:, None] if binary else None,
        )
        if len(split[1]) < 2:
            raise ValueError(
                "The validation set is too small. Increase 'validation_fraction'"
                " or the size of your dataset."
            )
        return split

    # -------------------------------------------------------- solvers

    def _run_lbfgs(
        self, trainer: Trainer, params: list[Array], rows: _Rows, callbacks: list[Callback]
    ) -> tuple[list[Array], dict[str, Any]]:
        backend, dtype = trainer.backend, trainer.dtype
        with backend.scope(dtype):
            if issparse(rows.x) and not isinstance(backend, NumPyBackend):
                raise ValueError(f"solver='lbfgs' takes sparse X on NumPy only, not on {backend!r}")
            x = rows.x.astype(dtype, copy=False) if issparse(rows.x) else None
            data = on_backend(
                np.empty((0, 0)) if x is not None else rows.x,
                rows.target,
                rows.weights,
                backend,
                dtype,
            )
        params, loss, n_iter, message = fit_lbfgs(
            trainer,
            params,
            data if x is None else data._replace(x=x),
            max_iter=self.max_iter,
            max_fun=self.max_fun,
            callbacks=callbacks,
        )
        if message is not None:
            warn(
                f"lbfgs failed to converge after {n_iter} iteration(s): {message}."
                " Increase max_iter, or scale the data.",
                ConvergenceWarning,
            )
        return params, {"loss_": loss, "n_iter_": n_iter, "t_": 0}

    def _run_epochs(
        self,
        trainer: Trainer,
        state: State,
        rows: _Rows,
        rng: np.random.RandomState,
        mode: Mode,
        callbacks: list[Callback],
        held_out: _Rows | None,
        n_iter: int | None,
    ) -> int:
        """Train; returns the number of epochs in the history that are not of this fit."""
        if mode == "continue" and state.generator is not None:
            rng = np.random.RandomState()
            rng.set_state(state.generator)
        else:
            state.generator = rng.get_state()
        backend, dtype, network = trainer.backend, trainer.dtype, trainer.network
        used = None
        if self.early_stopping and held_out is None:
            used, held = self._split(rows, rng)
            held_out = rows.take(held)
        source: Source
        with backend.scope(dtype):
            if issparse(rows.x):
                parts = rows.x, rows.target, rows.weights
                source = SparseSource(*parts, backend, dtype, used)
            else:
                source = ArraySource(
                    on_backend(rows.x, rows.target, rows.weights, backend, dtype), used
                )
        if self.batch_size != "auto" and self.batch_size > source.n_rows:
            warn(
                "Got `batch_size` less than 1 or larger than sample size."
                f" It is going to be clipped to {source.n_rows}",
                UserWarning,
            )
        before = len(state.history) if mode != "continue" else len(state.history) - state.done
        whole = 1 if mode == "partial" else self.max_iter
        reason = trainer.fit(
            state,
            source,
            whole if n_iter is None else min(whole, state.done + n_iter),
            rng,
            validate=None if held_out is None else self._validation(trainer, held_out),
            early_stopping=self.early_stopping,
            callbacks=callbacks,
            planned_epochs=self.max_iter,
            model=lambda now: self._view(
                self._curves(now, before) | self._with_params(trainer.params(now.leaves), network)
            ),
        )
        if reason == "interrupted":
            warn("Training interrupted by user.", UserWarning)
        if reason == "max_epochs" and mode != "partial" and state.done == self.max_iter:
            warn(
                f"Stochastic Optimizer: Maximum iterations ({self.max_iter}) reached and"
                " the optimization hasn't converged yet.",
                ConvergenceWarning,
            )
        return before

    def _state_to_go_on(
        self, trainer: Trainer, params: list[Array], again: bool, mode: Mode
    ) -> State:
        state = trainer.start(params)
        old: State | None = getattr(self, "_state", None) if again else None
        if old is None:
            return state
        if mode == "partial":
            return replace(trainer.resume(old, state).cut_short(), done=0)
        if mode == "continue":
            new = trainer.resume(old, state)
            if old.watched == "score" and self.early_stopping and old.arrays.leaves:
                # The fitted parameters are the best ones; training goes on from the last
                new.best_leaves = new.arrays.leaves
                with trainer.backend.scope(trainer.dtype):
                    last = trainer.copy(old.arrays.leaves)
                new.arrays = new.arrays._replace(leaves=last)
            return new
        # A warm start forgets the moments and the schedule
        return replace(
            state,
            rows=old.cut_short().rows,
            watched=old.watched,
            best=old.best,
            stalled_for=old.stalled_for,
            history=list(old.history),
        )

    def _curves(self, state: State, before: int) -> dict[str, Any]:
        """Fitted attributes that tell of the training."""
        history = state.history
        losses = [epoch.loss for epoch in history]
        validated = bool(history) and (
            self.early_stopping or not np.isnan(history[-1].validation_loss)
        )
        early = self.early_stopping
        return {
            "_state": state.beside_leaves(),
            "loss_": losses[-1] if losses else inf,
            "loss_curve_": losses,
            "n_iter_": len(losses) - before,
            "t_": state.cut_short().rows,
            "best_loss_": None if early else state.best,
            "validation_loss_curve_": (
                [epoch.validation_loss for epoch in history] if validated else None
            ),
            "validation_scores_": (
                [epoch.validation_score for epoch in history] if validated else None
            ),
            "best_validation_score_": -state.best if early else None,
        }

    def _validation(self, trainer: Trainer, rows: _Rows) -> Validate:
        """Score and loss of held-out rows as a function of the parameters."""
        backend, network, xp = trainer.backend, trainer.network, trainer.backend.xp
        with backend.scope(trainer.dtype):
            moved = rows.x if issparse(rows.x) else move(rows.x, backend, trainer.dtype)
            x = Selection(moved, rows.numbers)
            _, target, weights = on_backend(
                np.empty((0, 0)), rows.target, rows.weights, backend, trainer.dtype
            )
        scorer = None if self.scoring is None else check_scoring(self, self.scoring)
        given = {} if rows.weights is None else {"sample_weight": rows.weights}
        chunk = -(-trainer.batch_size // 2)  # beside what training holds

        def validate(params: list[Array]) -> tuple[float, float]:
            z = _logits(network, params, x, backend, trainer.dtype, chunk)
            (loss,) = backend.fetch([trainer.loss(z, target, xp, weights)[0]]).tolist()
            loss *= trainer.loss_scale
            if not bool(xp.all(xp.isfinite(z))):
                return nan, loss
            if scorer is not None:
                view = self._view(self._with_params(params, network))
                view._results_on_host = True
                return float(scorer(view, x.rows(0, x.n_rows), rows.y, **given)), loss
            got = backend.to_host(self._decide(z, trainer.loss, xp))
            got = got.reshape(rows.target.shape)
            return float(self._metric(rows.target, got, sample_weight=rows.weights)), loss

        return validate

    def _view(self, fitted: dict[str, Any]) -> Self:
        """A copy with other fitted attributes."""
        view = copy.copy(self)
        for name, value in fitted.items():
            setattr(view, name, value)
        return view

    # -------------------------------------------------------- predict

    def hidden_activations(self, X: Any, layer: int = -1) -> Array:
        """What a hidden layer makes of X: learned features for another model.

        Parameters
        ----------
        X : array-like or sparse matrix (n_samples, n_features)
        layer : int, default=-1
            Of the hidden layers, from 0; negative from the last.

        Returns
        -------
        h : array (n_samples, hidden_layer_sizes[layer])
            In the namespace and on the device of X.
        """
        check_is_fitted(self)
        network = self._fitted_network()
        # A hidden layer ends where the next linear one begins
        ends = [i for i, own in enumerate(network.layers) if isinstance(own, Linear)][1:]
        if not -len(ends) <= layer < len(ends):
            raise ValueError(f"layer: there are {len(ends)} hidden layers, asked for was {layer}")
        return self._predict_with(lambda h, *_: h, X, "hidden_activations", n_layers=ends[layer])[0]

    def _score(self, X: Any, y: Any, sample_weight: Any) -> float:
        # On the host: scikit-learn's metrics refuse a device's arrays
        weights = None if sample_weight is None else to_host(sample_weight)
        return float(self._metric(to_host(y), to_host(self.predict(X)), sample_weight=weights))

    def _predict_with(
        self, function: Any, X: Any, method: str, n_layers: int | None = None
    ) -> tuple[Array, Backend]:
        """``function(logits, loss, xp)`` where it is computed, moved to where X is."""
        check_is_fitted(self)
        check_same_namespace(X, self, method)
        home = NumPyBackend() if self._results_on_host else backend_of(X)
        backend = get_backend(self.device, self.backend, like=X)
        X = check_X(self, X, reset=False)
        network = self._fitted_network()
        params = self._flat_params(network)
        dtype = str(params[0].dtype).split(".")[-1]
        with backend.scope(dtype):
            params = [move(p, backend, dtype) for p in params]
            part = Network(network.layers[:n_layers])
            widest = max(max(p.shape) for p in part.params)
            chunk = max(1, _CHUNK // widest)
            own = params[: len(part.params)]
            z = _logits(part, own, Selection(X), backend, dtype, chunk)
            result = function(z, self._loss, backend.xp)
            return (result if home == backend else move(result, home)), home

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        tags.array_api_support = True
        return tags


def _chosen_loss(loss: Any, named: dict[str, Loss], like: Loss) -> Loss:
    """A loss from its name, itself, or a function (see `losses.CallableLoss`)."""
    if callable(loss) and not isinstance(loss, Loss | type):
        return CallableLoss(loss, like)
    chosen: Loss = lookup("loss", loss, named, Loss)
    return chosen


def _logits(
    network: Network,
    params: list[Array],
    x: Selection,
    backend: Backend,
    dtype: str,
    chunk: int,
) -> Array:
    """What the network gives for all rows, computed so many at a time."""
    parts = [
        network(params, x.dense(start, start + chunk, backend, dtype), backend.xp)
        for start in range(0, x.n_rows, chunk)
    ]
    return parts[0] if len(parts) == 1 else backend.xp.concat(parts)


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
    weight_decay : float >= 0, optional
        Decoupled from the gradient (Loshchilov and Hutter, 2019): each step takes
        away learning rate × weight_decay of the parameters.  For every solver but
        "lbfgs"; if not given, 0.01 for "adamw" and 0 for the others.
    scoring : str or callable, optional
        What early stopping watches, and ``validation_scores_`` holds: a scorer of
        scikit-learn; that of ``score`` if not given.
    callbacks : sequence of portable_mlp.Callback, optional
        Told of every epoch; they can stop the fit.
    label_smoothing : float in [0, 1), default=0
        Share of each target that is spread evenly over the classes.
    loss : Loss or callable, optional
        The cross-entropy if not given.  A callable takes logits (n, k), targets and
        the namespace, and returns the rows' losses (n,) and their derivatives by the
        logits (n, k); `portable_mlp.check_loss` verifies it.  Targets are class
        numbers (n,), or 0.0 and 1.0 where there are two classes, (n,), or several
        labels, (n, k).
    class_weight : dict or "balanced", optional
        Factors on the rows' weights by class; "balanced" gives each class the same
        weight.

    Attributes
    ----------
    classes_ : ndarray (n_classes,)
    coefs_, intercepts_ : lists of arrays (n_in, n_out) and (n_out,)
        In the namespace, and on the device, of the X fitted.
    loss_, best_loss_ : float
    loss_curve_ : list of float
    validation_loss_curve_, validation_scores_ : list of float
        Of the rows held out, or given as X_val; None without such rows.
    best_validation_score_ : float; None without early stopping
    layer_params_ : list of arrays
        Parameters of activations that have some.
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
        "class_weight": [dict, StrOptions({"balanced"}), None],
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
        weight_decay: float | None = None,
        scoring: str | Callable[..., float] | None = None,
        callbacks: Sequence[Callback] | None = None,
        label_smoothing: float = 0.0,
        loss: Loss | LossFunction | None = None,
        class_weight: dict[Any, float] | str | None = None,
    ) -> None:
        self._store(locals())

    def _learn_target(self, y: NDArray[Any], again: bool, incremental: bool) -> tuple[Loss, int]:
        """Set ``classes_``; return the loss and the number of logits."""
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
        self.classes_ = classes
        self._multilabel = kind == "multilabel-indicator"
        softmax = len(classes) > 2 and not self._multilabel
        cross_entropy = (SoftmaxCrossEntropy if softmax else BinaryCrossEntropy)(
            self.label_smoothing
        )
        n_outputs = len(classes) if softmax or self._multilabel else 1
        if self.loss is None:
            return cross_entropy, n_outputs
        if self.label_smoothing:
            raise ValueError("label_smoothing is for the cross-entropy: set it in the loss given")
        return _chosen_loss(self.loss, {}, cross_entropy), n_outputs

    def _numbers(self, y: NDArray[Any]) -> NDArray[Any]:
        """Labels as the loss takes them: class numbers (int32), or 0.0 and 1.0."""
        if self._multilabel:
            if y.ndim != 2 or y.shape[1] != len(self.classes_):
                raise ValueError(f"y: expected {len(self.classes_)} labels a row, got {y.shape}")
            return y.astype(np.float64)
        if np.setdiff1d(y, self.classes_).size:
            raise ValueError(f"y has labels that are not among the classes {self.classes_}")
        codes = np.searchsorted(self.classes_, y).astype(np.int32)
        return codes if len(self.classes_) > 2 else codes.astype(np.float64)

    @only_if(_without_partial_fit)
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
        if self.class_weight == "balanced":
            raise ValueError(
                "class_weight='balanced' needs all rows at once: for partial_fit compute the"
                " weights with sklearn.utils.class_weight.compute_class_weight and pass a dict"
            )
        with self._unchanged_on_error():
            self.classes_ = given
            return self._fit(X, y, sample_weight, "partial")

    def _decide(self, z: Array, loss: Loss, xp: Any) -> Array:
        """Class numbers (n,), or indicators (n, n_labels), from logits."""
        if loss.link_name == "softmax":
            return xp.argmax(z, axis=1)
        yes = xp.astype(z > 0.0, xp.int32)
        if not self._multilabel and len(self.classes_) == 1:
            yes = xp.zeros_like(yes)
        return yes[:, 0] if yes.shape[1] == 1 else yes

    def _probabilities(self, z: Array, loss: Loss, xp: Any) -> Array:
        """Those of the classes, (n, n_classes), from logits."""
        if z.shape[1] > 1:
            return loss.link(z, xp)
        return xp.concat([sigmoid(-z, xp), sigmoid(z, xp)], axis=1)

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
        codes, home = self._predict_with(self._decide, X, "predict")
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
        return self._predict_with(self._probabilities, X, "predict_proba")[0]

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
            if loss.link_name == "softmax":
                return log_softmax(z, xp)
            if z.shape[1] > 1:
                # Probabilities that are equal have equal logarithms, as there
                return xp.where(z > 0.0, xp.log(sigmoid(z, xp)), -softplus(-z, xp))
            return xp.concat([-softplus(z, xp), -softplus(-z, xp)], axis=1)

        return self._predict_with(logs, X, "predict_log_proba")[0]

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
    loss : {"squared_error", "poisson", "huber", "quantile"}, Loss or callable, \
default="squared_error"
        An instance from `portable_mlp.losses` brings its own settings, such as
        ``Quantile(0.9)``; a callable takes predictions and targets, (n, k) or, with
        one output, targets (n,), and the namespace, and returns the rows' losses (n,)
        and their derivatives (n, k).
    hidden_layer_sizes, activation, solver, alpha, batch_size, learning_rate, \
learning_rate_init, power_t, max_iter, shuffle, random_state, tol, verbose, warm_start, \
momentum, nesterovs_momentum, early_stopping, validation_fraction, beta_1, beta_2, epsilon, \
n_iter_no_change, max_fun, device, backend, dtype, dropout, clip_norm, weight_decay, scoring, \
callbacks
        As in `MLPClassifier`.

    Attributes
    ----------
    coefs_, intercepts_, layer_params_, loss_, best_loss_, loss_curve_, \
validation_loss_curve_, validation_scores_, best_validation_score_, n_iter_, t_, n_layers_, \
n_outputs_, n_features_in_, feature_names_in_, out_activation_
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
        dropout: float = 0.0,
        clip_norm: float | None = None,
        weight_decay: float | None = None,
        scoring: str | Callable[..., float] | None = None,
        callbacks: Sequence[Callback] | None = None,
    ) -> None:
        self._store(locals())

    def _learn_target(self, y: NDArray[Any], again: bool, incremental: bool) -> tuple[Loss, int]:
        """The loss, and the number of logits."""
        names = ("squared_error", "poisson", "huber", "quantile")
        loss = _chosen_loss(self.loss, {name: LOSSES[name] for name in names}, SquaredError())
        if isinstance(loss, BinaryCrossEntropy | SoftmaxCrossEntropy):
            raise ValueError(f"loss={loss!r} is for labels: use MLPClassifier")
        return loss, y.shape[1] if y.ndim == 2 else 1

    def _numbers(self, y: NDArray[Any]) -> NDArray[np.float64]:
        """Targets, which are floating-point numbers."""
        if isinstance(self._loss, Poisson) and (y < 0).any():
            raise ValueError("y must not be negative for loss='poisson'")
        return y

    @only_if(_without_partial_fit)
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
        return self._guarded(X, y, sample_weight, "partial")

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
        return self._predict_with(self._decide, X, "predict")[0]

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
