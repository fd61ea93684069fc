"""Construction: from an estimator's parameters to the network, optimizer, loss and trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import fields
from functools import cache
from inspect import signature
from math import inf
from numbers import Integral, Real
from typing import Any, ClassVar

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.metrics import get_scorer_names
from sklearn.utils._param_validation import Interval, Options, StrOptions

from portable_mlp.activations import lookup
from portable_mlp.architectures import MLP
from portable_mlp.backends import DTYPES, Backend
from portable_mlp.callbacks import Callback, pausing
from portable_mlp.estimators.base import Estimator
from portable_mlp.estimators.fitted import OF_SCIKIT_LEARN, Fitted
from portable_mlp.groups import check
from portable_mlp.losses import CallableLoss, Loss, SquaredError
from portable_mlp.network import Network
from portable_mlp.optimizers import SGD, SOLVERS, Adam, Optimizer, SklearnAdam, SklearnSGD
from portable_mlp.schedules import SCHEDULES, Adaptive, InverseScaling, Schedule, Scheduled
from portable_mlp.training import Trainer
from portable_mlp.typing import Array
from portable_mlp.warn import warn

# Given by name, these affect only solver="sgd", as in scikit-learn; as instances, every solver
_OF_SGD = (InverseScaling, Adaptive)

LossFunction = Callable[[Array, Array, Any], tuple[Array, Array]]
"""Function from logits, targets and the namespace to the rows' losses and their derivatives."""


def chosen_loss(loss: Any, named: dict[str, Loss], like: Loss) -> Loss:
    """Return the loss for a name, a `Loss` or a function (see `losses.CallableLoss`)."""
    if callable(loss) and not isinstance(loss, Loss | type):
        return CallableLoss(loss, like)
    chosen: Loss = lookup("loss", loss, named, Loss)
    return chosen


class Construction(Estimator, Fitted, BaseEstimator):
    """Base of the estimators that builds the network and its trainer from the parameters."""

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
        "dtype": [StrOptions(set(DTYPES)), None],
        "dropout": [Interval(Real, 0, 1, closed="left"), Scheduled],
        "clip_norm": [Interval(Real, 0, None, closed="neither"), None],
        "weight_decay": [Interval(Real, 0, None, closed="left"), Scheduled, None],
        "treatments": [dict, None],
        "architecture": [callable, None],
        "scoring": [StrOptions(set(get_scorer_names())), callable, None],
        "callbacks": ["array-like", None],
    }

    @classmethod
    @cache
    def _get_param_names(cls) -> list[str]:
        # Cached: inspecting a long signature takes a tenth of the time of a short fit
        names: list[str] = super()._get_param_names()
        return names

    def _check_parameters(self) -> None:
        self._validate_params()
        check(self.treatments or {})
        for callback in self.callbacks or ():
            if not isinstance(callback, Callback):
                raise ValueError(f"callbacks: expected instances of Callback, got {callback!r}")
        if self.solver == "lbfgs":
            given = {"dropout": bool(self.dropout), "clip_norm": self.clip_norm is not None}
            given["a schedule"] = self._is_scheduled()
            given["weight_decay"] = self.weight_decay is not None
            given["scoring"] = self.scoring is not None
            given["treatments"] = self.treatments is not None
            given["a checkpoint"] = bool(pausing(self.callbacks or ()))
            for name in (name for name, is_given in given.items() if is_given):
                raise ValueError(f"solver='lbfgs' cannot take {name}: it has no steps of its own")
            if self.early_stopping:
                warn(
                    "early_stopping has no effect with solver='lbfgs', as in scikit-learn",
                    UserWarning,
                )

    def _make(self, kind: type) -> Any:
        """Return an instance of a dataclass; parameters of the same names set its fields."""
        ahead = bool(self.momentum) and self.nesterovs_momentum
        given = {**vars(self), "nesterov": ahead, "power": self.power_t}
        names = (field.name for field in fields(kind))
        return kind(**{name: given[name] for name in names if given.get(name) is not None})

    def _make_optimizer(self) -> Optimizer:
        kind = lookup("solver", self.solver, SOLVERS, Optimizer)
        if isinstance(kind, Optimizer):
            if self.weight_decay is not None:
                raise ValueError(f"weight_decay is for a solver given by name: set it in {kind!r}")
            return kind
        # The names "sgd" and "adam" stand for scikit-learn's variants of these optimizers
        if kind is SGD and self.momentum:
            kind = SklearnSGD
        elif kind is Adam:
            kind = SklearnAdam
        optimizer: Optimizer = SGD() if kind is None else self._make(kind)
        return optimizer

    def _is_scheduled(self) -> bool:
        """Tell whether ``learning_rate`` is a schedule that lbfgs, which has no steps, rejects.

        The names "constant", "invscaling" and "adaptive" are not: scikit-learn ignores them.
        """
        if isinstance(self.learning_rate, str):
            kind = SCHEDULES.get(self.learning_rate, Schedule)
            return kind not in (Schedule, *_OF_SGD)
        return isinstance(self.learning_rate, Schedule)

    def _make_schedule(self) -> Schedule:
        kind = lookup("learning_rate", self.learning_rate, SCHEDULES, Schedule)
        if kind in _OF_SGD and self.solver != "sgd":
            warn(
                f"learning_rate={self.learning_rate!r} is for solver='sgd' and has no"
                f" effect with solver={self.solver!r}, as in scikit-learn; a schedule"
                " from portable_mlp.schedules works with every solver but 'lbfgs'",
                UserWarning,
            )
            return Schedule()
        schedule: Schedule = kind if isinstance(kind, Schedule) else self._make(kind)
        return schedule

    @property
    def _rows_per_batch(self) -> int:
        rows: int = 200 if self.batch_size == "auto" else self.batch_size
        return rows

    def _hidden(self) -> list[int]:
        hidden: list[int] = np.atleast_1d(np.asarray(self.hidden_layer_sizes)).tolist()
        if any(type(n) is not int or n < 1 for n in hidden):
            raise ValueError(f"hidden_layer_sizes must be > 0, got {hidden}.")
        return hidden

    def _network(self, n_in: int, n_out: int) -> Network:
        """Return the network that the parameters describe.

        Raises
        ------
        ValueError
            If an architecture is given together with parameters that it replaces, or if its
            network does not have ``n_in`` inputs and ``n_out`` outputs.
        """
        if self.architecture is None:
            activation = self.activation
            if isinstance(activation, Iterable) and not isinstance(activation, str):
                activation = tuple(activation)
            return MLP(tuple(self._hidden()), activation, self.dropout)(n_in, n_out)
        default = signature(type(self)).parameters
        replaced = ("hidden_layer_sizes", "activation", "dropout")
        given = [n for n in replaced if repr(getattr(self, n)) != repr(default[n].default)]
        if given:
            raise ValueError(
                f"an architecture says what the layers are: leave {' and '.join(given)} out"
            )
        network = self.architecture(n_in, n_out)
        if not isinstance(network, Network):
            raise ValueError(f"architecture: expected a function that gives a Network: {network!r}")
        if (network.n_in, network.n_out) != (n_in, n_out):
            raise ValueError(
                f"architecture: its network takes {network.n_in} columns and gives"
                f" {network.n_out}, the data have {n_in} and need {n_out}"
            )
        return network

    def _trainer(self, network: Network, backend: Backend, dtype: str) -> Trainer:
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
            batch_size=self._rows_per_batch,
            shuffle=self.shuffle,
            tol=self.tol,
            patience=self.n_iter_no_change,
            treatments=self.treatments,
            # scikit-learn reports the squared error averaged over the outputs
            loss_scale=1.0 / self.n_outputs_ if isinstance(self._loss, SquaredError) else 1.0,
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        known = self.__dict__
        for name, parameter in signature(type(self)).parameters.items():
            known.setdefault(name, parameter.default)  # a parameter newer than the pickle
        # Pickles of version 0.1.0 hold these lists of arrays, and no network
        old = {name: known.pop(name) for name in OF_SCIKIT_LEARN if name in known}
        if old:
            self._adopt_plain(old)

    def _adopt_plain(self, arrays: dict[str, list[Array]]) -> None:
        """Take the fitted parameters of a plain MLP.

        The widths come from the arrays' shapes: hidden_layer_sizes may have been changed since
        the fit.
        """
        n_in, *hidden = (w.shape[0] for w in arrays["coefs_"])
        n_out = arrays["coefs_"][-1].shape[1]
        self._adopt(MLP(tuple(hidden), self.activation, self.dropout)(n_in, n_out), arrays)
