"""Fitting: the methods that train an estimator, and the steps that they share."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from inspect import signature
from math import inf, nan
from numbers import Integral
from typing import Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import issparse
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import check_scoring
from sklearn.utils import check_random_state

from portable_mlp.backends import NumPyBackend, backend_of, get_backend, move
from portable_mlp.callbacks import Callback, Progress
from portable_mlp.estimators.inference import Selection, logits
from portable_mlp.estimators.input_checks import check_weights, check_X, check_y
from portable_mlp.estimators.preparation import Preparation, Rows
from portable_mlp.estimators.sklearn_compat import (
    CallbackSupportMixin,
    FitCallbacks,
    PeerInternals,
    only_if,
    with_callbacks,
)
from portable_mlp.sources import ArraySource, CheckedSource, Source, SparseSource, on_backend
from portable_mlp.training import State, StopReason, Trainer, Validate
from portable_mlp.training.lbfgs import fit_lbfgs
from portable_mlp.typing import Array
from portable_mlp.warn import warn

Mode = Literal["fit", "partial", "continue", "init"]


def _without_steps(model: Any) -> str | None:
    if model.solver == "lbfgs":
        return "only available for stochastic optimizers: lbfgs is not stochastic"
    return None


def without_partial_fit(model: Any) -> str | None:
    """Return why ``partial_fit`` is not available for a model; None if it is."""
    if model.early_stopping:
        return "partial_fit does not support early_stopping=True"
    if getattr(model, "class_weight", None) == "balanced":
        return (
            "class_weight='balanced' needs all rows at once: for partial_fit compute the"
            " weights with sklearn.utils.class_weight.compute_class_weight and pass a dict"
        )
    return _without_steps(model)


_OF_EPOCHS = {
    "_state", "loss_curve_", "best_loss_",
    "validation_loss_curve_", "validation_scores_", "best_validation_score_",
}  # fmt: skip
"""Attributes that a fit in epochs sets, and L-BFGS does not."""


def _takes_weights(scorer: Any) -> bool:
    """Tell whether a scorer, or the metric that it wraps, takes sample weights."""
    return "sample_weight" in signature(getattr(scorer, "_score_func", scorer)).parameters


class MultilayerPerceptron(CallbackSupportMixin, PeerInternals, Preparation):
    """Base class of the classifier and the regressor: the methods that fit."""

    _target_dtype: ClassVar[type | None] = None  # labels may be anything
    _learns_classes: ClassVar[bool] = False
    classes_: NDArray[Any]

    # -------------------------------------------------------- entry points

    @with_callbacks
    def fit(
        self,
        X: Any,
        y: Any = None,
        sample_weight: Any = None,
        *,
        X_val: Any = None,
        y_val: Any = None,
        sample_weight_val: Any = None,
    ) -> Self:
        """Fit the network to X and y.

        Parameters
        ----------
        X : array-like or sparse matrix (n_samples, n_features), or a `sources.Source`
            Arrays of any backend; computation follows X unless ``device`` or ``backend``
            is set.  A source also supplies y and the weights.
        y : array-like (n_samples,) or (n_samples, n_outputs)
            Labels (strings too), indicators of several labels, or real targets.
        sample_weight : array-like (n_samples,), optional
            Weights of the rows: not negative, and not all zero.
        X_val, y_val, sample_weight_val : array-like, optional
            Validation set, evaluated after each epoch.  With ``early_stopping``, it replaces
            the held-out fraction of X.  Its loss and score are recorded in either case.

        Returns
        -------
        self

        Raises
        ------
        ValueError
            If a parameter or the data is invalid; the model is unchanged.
        DivergenceError
            If training produces NaN or infinite values; the model is unchanged.  With early
            stopping this is a RuntimeWarning instead, and the best weights are kept.
        BackendError
            If the requested device or backend cannot be used.
        """
        validation = X_val, y_val, sample_weight_val
        return self._guarded(X, y, sample_weight, "fit", validation=validation)

    @only_if(_without_steps)
    @with_callbacks
    def continue_fit(
        self,
        X: Any,
        y: Any = None,
        sample_weight: Any = None,
        *,
        n_iter: int | None = None,
        X_val: Any = None,
        y_val: Any = None,
        sample_weight_val: Any = None,
    ) -> Self:
        """Continue training exactly where the last call stopped, up to ``max_iter`` epochs in all.

        Weights, optimizer state, random generator, schedule and early stopping continue as
        if training had never stopped.  With ``max_iter=n + m``, one ``fit`` gives the same
        model as ``continue_fit`` for n and then for m epochs.  (A warm start, as in
        scikit-learn, resets the generator and the optimizer state.)  A model that is not
        fitted starts training.

        Parameters
        ----------
        X, y, sample_weight, X_val, y_val, sample_weight_val
            The same as in the call that is continued; see `fit`.
        n_iter : int, optional
            Number of epochs of this call.  The default is all that remain of ``max_iter``.

        Returns
        -------
        self

        Raises
        ------
        UnavailableError
            With ``solver="lbfgs"``, which keeps no state to continue from.  It is an
            AttributeError and a ValueError.
        ValueError, DivergenceError, BackendError
            As in `fit`; also if the last call stopped in the middle of an epoch over other
            rows, or had other layers.
        """
        if n_iter is not None and not (isinstance(n_iter, Integral) and n_iter >= 1):
            raise ValueError(f"n_iter must be at least 1, an integer, got {n_iter!r}")
        validation = X_val, y_val, sample_weight_val
        return self._guarded(X, y, sample_weight, "continue", n_iter=n_iter, validation=validation)

    def init_model(self, X: Any, y: Any) -> Self:
        """Draw the initial weights that ``fit`` would start from, without training.

        The model can then predict with these weights.  `continue_fit`, `partial_fit`, and
        ``fit`` with ``warm_start`` train from there.

        Parameters
        ----------
        X : array-like (n_samples, n_features)
        y : array-like (n_samples,) or (n_samples, n_outputs)
            Targets.  All classes have to occur.

        Returns
        -------
        self

        Raises
        ------
        ValueError, BackendError
            As in `fit`.
        """
        return self._guarded(X, y, None, "init")

    # -------------------------------------------------------- shared steps

    def _guarded(self, X: Any, y: Any, sample_weight: Any, mode: Mode, **how: Any) -> Self:
        context = None
        told = hasattr(self, "_skl_callbacks") or hasattr(self, "_parent_callback_ctx")
        if told and mode in ("fit", "continue"):
            # Outside of the block that restores attributes on an error: the context tears the
            # callbacks down afterwards, and needs the attributes that it has set
            context = self._init_callback_context(max_subtasks=self.max_iter)
        with self._unchanged_on_error():
            return self._fit(X, y, sample_weight, mode, context, **how)

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
        read = X if isinstance(X, Source) else None
        if read is not None:
            X, y = self._look_into(read, y, sample_weight, validation[0])
        again = hasattr(self, "coefs_") and (
            mode in ("partial", "continue") or (mode == "fit" and self.warm_start)
        )
        home = backend_of(X)
        backend = get_backend(self.device, self.backend, like=X)
        # Callbacks get X and y for scoring; of a source only its first rows are at hand: pass none
        as_given = (X, y) if read is None else (None, None)
        X = check_X(self, X, reset=not again)
        dtype = self.dtype or ("float32" if str(X.dtype).endswith("float32") else "float64")
        weights = check_weights(sample_weight, X, dtype)
        y = check_y(self, y, X, self._target_dtype)
        known = (
            y if read is None or not self._learns_classes else read.targets(self._rows_per_batch)
        )
        self._loss, n_outputs = self._learn_target(known, again, mode == "partial")
        target = self._encode_target(y)
        self.out_activation_ = self._loss.link_name
        network = self._network(X.shape[1], n_outputs)
        rng = check_random_state(self.random_state)
        params = self._params_for(network) if again else network.init(rng)
        some = mode != "partial" and read is None  # the rows of one part may all weigh nothing
        weights = self._class_weighted(y, weights, dtype, some=some)
        if read is not None:
            X = None  # frees the memory of the first rows before others are read
        elif not issparse(X):
            with backend.scope(dtype):
                X = move(X, backend, dtype)
        self.network_, self.n_outputs_ = network, n_outputs
        self.n_layers_ = network.n_linear + 1
        trainer = self._trainer(network, backend, dtype)
        rows = Rows(X, y, target, weights, read=read)
        held_out = self._check_validation(*validation, dtype)
        callbacks: list[Callback] = [Progress()] if self.verbose else []
        callbacks += self.callbacks or ()
        if context is not None:
            callbacks.append(FitCallbacks(self, context, *as_given))
        if self.solver == "lbfgs" and mode != "init":
            params, fitted = self._run_lbfgs(trainer, params, rows, callbacks)
            for name in vars(self).keys() & _OF_EPOCHS:  # set by an earlier fit in epochs
                delattr(self, name)
        else:
            state = self._state_to_go_on(trainer, params, again, mode)
            del params  # the state holds a copy; free the original during training
            if mode == "init":
                state.generator = rng.get_state()
                fitted = self._curves(state, 0)
            else:
                fitted = self._run_epochs(
                    trainer, state, rows, rng, mode, callbacks, held_out, n_iter
                )
            params = trainer.params(state.final_leaves)
        with backend.scope(dtype):
            if home == backend:
                kept = [backend.asarray(p, copy=True) for p in params]
            else:
                kept = [move(p, home, dtype) for p in params]
        fitted["params_"] = kept
        for name, value in fitted.items():
            setattr(self, name, value)
        return self

    # -------------------------------------------------------- solvers

    def _run_lbfgs(
        self, trainer: Trainer, params: list[Array], rows: Rows, callbacks: list[Callback]
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
        params, loss, n_iter, reason, message = fit_lbfgs(
            trainer,
            params,
            data if x is None else data._replace(x=x),
            max_iter=self.max_iter,
            max_fun=self.max_fun,
            callbacks=callbacks,
        )
        if reason in ("max_epochs", "failed"):
            warn(
                f"lbfgs failed to converge after {n_iter} iteration(s): {message}."
                " Increase max_iter, or scale the data.",
                ConvergenceWarning,
            )
        return params, {"loss_": loss, "n_iter_": n_iter, "t_": 0, "stop_reason_": reason}

    def _run_epochs(
        self,
        trainer: Trainer,
        state: State,
        rows: Rows,
        rng: np.random.RandomState,
        mode: Mode,
        callbacks: list[Callback],
        held_out: Rows | None,
        n_iter: int | None,
    ) -> dict[str, Any]:
        """Train, updating ``state`` in place; return the fitted attributes by name."""
        if mode == "continue" and state.generator is not None:
            rng = np.random.RandomState()
            rng.set_state(state.generator)
        else:
            state.generator = rng.get_state()
        backend, dtype = trainer.backend, trainer.dtype
        used = None
        if self.early_stopping and held_out is None:
            used, held = self._split(rows, rng)
            held_out = rows.take(held)
        source: Source
        with backend.scope(dtype):
            if rows.read is not None:
                source = CheckedSource(rows.read, partial(self._prepared, backend, dtype))
            elif issparse(rows.x):
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
        # The history also holds epochs of earlier fits; `n_iter_` does not count these
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
                self._curves(now, before) | {"params_": trainer.params(now.final_leaves)}
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
        return self._curves(state, before, reason)

    def _state_to_go_on(
        self, trainer: Trainer, params: list[Array], again: bool, mode: Mode
    ) -> State:
        state = trainer.start(params)
        old: State | None = getattr(self, "_state", None) if again else None
        if old is None:
            if again and mode in ("partial", "continue"):
                warn(
                    "the model has no state of training to go on with (it was fitted by L-BFGS, or"
                    " loaded from a file that Checkpoint did not write): the optimizer's moments,"
                    " the random generator and the schedule start anew"
                )
            return state
        if mode in ("partial", "continue"):
            new = trainer.resume(old, state)
            early = old.watched == "score" and self.early_stopping
            # Under other settings the average starts anew, and so do the parameters from it
            averaged = old.averages and old.watched == "loss" and old.origin == state.origin
            if old.arrays.leaves and (early or averaged):
                # The fitted parameters are the best ones, or their average; training continues
                # from the last ones
                new.best_leaves = new.arrays.leaves if early else None
                backend = trainer.backend
                with backend.scope(trainer.dtype):
                    last = trainer.load([move(p, backend) for p in old.last_params])
                new.arrays = new.arrays._replace(leaves=last)
            return replace(new.cut_short(), done=0) if mode == "partial" else new
        # A warm start resets the optimizer state and the schedule
        return replace(
            state,
            rows=old.cut_short().rows,
            watched=old.watched,
            best=old.best,
            stalled_for=old.stalled_for,
            history=list(old.history),
        )

    def _curves(
        self, state: State, before: int, reason: StopReason | None = None
    ) -> dict[str, Any]:
        """Return the fitted attributes that describe the training, by name."""
        history = state.history
        losses = [epoch.loss for epoch in history]
        validated = bool(history) and (
            self.early_stopping or not np.isnan(history[-1].validation_loss)
        )
        early = self.early_stopping
        return {
            "_state": state.without_final_leaves(),
            "loss_": losses[-1] if losses else inf,
            "loss_curve_": losses,
            "n_iter_": len(losses) - before,
            "stop_reason_": reason,
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

    def _validation(self, trainer: Trainer, rows: Rows) -> Validate:
        """Return a function from parameters to the score and the loss of the held-out rows."""
        backend, network, xp = trainer.backend, trainer.network, trainer.backend.xp
        with backend.scope(trainer.dtype):
            moved = rows.x if issparse(rows.x) else move(rows.x, backend, trainer.dtype)
            x = Selection(moved, rows.indices)
            _, target, weights = on_backend(
                np.empty((0, 0)), rows.target, rows.weights, backend, trainer.dtype
            )
        scorer = None if self.scoring is None else check_scoring(self, self.scoring)
        weighs = rows.weights is not None and scorer is not None and _takes_weights(scorer)
        given = {"sample_weight": rows.weights} if weighs else {}
        chunk = -(-trainer.batch_size // 2)  # small: training's buffers are in memory too

        def validate(params: list[Array]) -> tuple[float, float]:
            z = logits(network, params, x, backend, trainer.dtype, chunk, trainer.loss)
            (loss,) = backend.fetch([trainer.loss(z, target, xp, weights)[0]]).tolist()
            loss = trainer.reported(loss)
            # With a log link, exp(z) may overflow; metrics raise on infinite predictions
            if not bool(xp.all(xp.isfinite(trainer.loss.link(z, xp)))):
                return nan, loss
            if scorer is not None:
                view = self._view({"params_": params})
                view._results_on_host = True
                return float(scorer(view, x.rows(0, x.n_rows), rows.y, **given)), loss
            got = backend.to_host(self._decide(z, trainer.loss, xp))
            got = got.reshape(rows.target.shape)
            return float(self._metric(rows.target, got, sample_weight=rows.weights)), loss

        return validate

    def _view(self, fitted: dict[str, Any]) -> Self:
        """Return a shallow copy of the estimator with some fitted attributes replaced."""
        view = copy.copy(self)
        for name, value in fitted.items():
            setattr(view, name, value)
        return view
