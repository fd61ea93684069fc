"""The only module that uses scikit-learn's private and experimental parts.

scikit-learn's own tests of its MLP read a few of its private attributes.  `PeerInternals`
provides them, computed from this library's state, so that those tests run here unmodified;
nothing else uses them.  The rest makes up for what older versions of scikit-learn lack.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import update_wrapper
from types import MethodType, SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.utils import _array_api

from portable_mlp.backends import NumPyBackend
from portable_mlp.callbacks import Callback, Epoch
from portable_mlp.schedules import Clock
from portable_mlp.steps import NO_NUMBERS, Batch, objective
from portable_mlp.typing import Array

try:
    from sklearn.callback import CallbackSupportMixin, with_callbacks
except ImportError:  # before scikit-learn 1.9

    class CallbackSupportMixin:  # type: ignore[no-redef]
        """Stand-in without function, for versions that have no callbacks."""

    def with_callbacks(method: Any) -> Any:
        """Return the method unchanged."""
        return method


__all__ = [
    "CallbackSupportMixin",
    "FitCallbacks",
    "PeerInternals",
    "check_same_namespace",
    "only_if",
    "with_callbacks",
]


class FitCallbacks(Callback):
    """Callback that reports the epochs of a fit to callbacks of ``sklearn.callback``.

    Parameters
    ----------
    estimator : estimator with `CallbackSupportMixin`
    context : CallbackContext
        Context of the fit.
    X, y : array-like or None
        The data as they were given.
    """

    def __init__(self, estimator: Any, context: Any, X: Any, y: Any) -> None:
        self._context = context
        self._task: Any = None
        self._fixed = {"estimator": estimator, "X": X, "y": y}

    def on_fit_begin(self, max_epochs: int) -> None:
        self._context.call_on_fit_task_begin(**self._fixed)

    def on_epoch_begin(self, epoch: int) -> None:
        self._task = self._context.subcontext(task_name="epoch")
        self._task.call_on_fit_task_begin(**self._fixed)

    def on_epoch_end(self, epoch: Epoch, params: Callable[[], list[Array]]) -> bool | None:
        stop: bool = self._task.call_on_fit_task_end(
            **self._fixed, reconstruction_attributes=lambda: {"params_": params()}
        )
        return stop

    def on_fit_end(self) -> None:
        self._context.call_on_fit_task_end(**self._fixed)


class UnavailableError(AttributeError, ValueError):
    """A method is not available with the estimator's parameters; the message says why.

    It is an AttributeError because meta-estimators ask with ``hasattr``.  It is a ValueError
    too because scikit-learn raises one for ``partial_fit`` with early stopping.
    """


class only_if:  # noqa: N801 (a decorator)
    """Decorator of a method that exists only while ``why_not(instance)`` is None.

    Parameters
    ----------
    why_not : callable
        Function from the instance to None, or to the message of an `UnavailableError`.
    """

    def __init__(self, why_not: Callable[[Any], str | None]) -> None:
        self.why_not = why_not

    def __call__(self, method: Callable[..., Any]) -> Any:
        self.method = method
        update_wrapper(self, method)
        return self

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        if instance is None:
            return self.method
        if reason := self.why_not(instance):
            raise UnavailableError(reason)
        return MethodType(self.method, instance)


class _Reading:
    """Descriptor that computes an attribute on access, unless the instance has its own."""

    def __init__(self, read: Callable[[Any], Any]) -> None:
        self.read = read

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else self.read(instance)


class PeerInternals:
    """Private attributes of scikit-learn's MLP that its tests read."""

    @staticmethod
    def _learning_rate(model: Any) -> SimpleNamespace:
        """Return an object that holds the learning rate of the next step."""
        state = model._state
        clock = Clock(state.steps, state.steps + 1, state.epochs, state.rows)
        schedule = model._make_schedule()
        rate = schedule.rate(model.learning_rate_init, clock, state.schedule)
        return SimpleNamespace(learning_rate=rate)

    _optimizer = _Reading(_learning_rate)
    _no_improvement_count = _Reading(lambda model: model._state.stalled_for)

    def _loss_grad_lbfgs(
        self, theta: NDArray[np.float64], X: Array, y: Array, sample_weight: Any, *buffers: Any
    ) -> tuple[float, NDArray[np.float64]]:
        """Return the loss and its gradient at packed parameters: weights first, then biases."""
        model: Any = self
        trainer = model._trainer(model.network_, NumPyBackend(), str(theta.dtype))
        recipe = trainer.recipe
        batch = Batch(X, y, sample_weight)
        value, penalty, grads = objective(recipe, [theta], batch, trainer.alphas, NO_NUMBERS)
        return float(value + penalty), np.concatenate(grads)


def check_same_namespace(X: Any, estimator: Any, method: str) -> None:
    """Raise unless X has the namespace and device of the fit; only with array dispatch on.

    Versions of scikit-learn without this check skip it.
    """
    check = getattr(_array_api, "check_same_namespace", None)
    if check is not None:
        check(X, estimator, attribute="_first_coef", method=method)
