"""What touches scikit-learn's private and experimental parts, in one place.

scikit-learn's own tests of its MLP look at a few of its private attributes;
`PeerInternals` answers them from the state of ours, so that those tests run here
unmodified.  Nothing else uses them.  The rest is what newer versions have and older
ones lack.
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
        """Without scikit-learn's callbacks, nothing."""

    def with_callbacks(method: Any) -> Any:
        """Return the method as it is."""
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
    """The epochs of a fit, told to callbacks that follow ``sklearn.callback``.

    Parameters
    ----------
    estimator : estimator with `CallbackSupportMixin`
    context : CallbackContext
        Of the fit.
    X, y : array-like
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
    """A method does not go with the parameters: ``hasattr`` says no, a call says why.

    Two kinds at once: meta-estimators ask by ``hasattr``, and scikit-learn raises a
    ValueError where ``partial_fit`` meets early stopping.
    """


class only_if:  # noqa: N801 (a decorator)
    """A method that is there only if ``why_not`` of the instance is None.

    Parameters
    ----------
    why_not : callable
        From the instance to the message of the `UnavailableError`, or None.
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
    """An attribute computed when it is looked at, unless the instance has one of its own."""

    def __init__(self, read: Callable[[Any], Any]) -> None:
        self.read = read

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else self.read(instance)


class PeerInternals:
    """Private attributes of scikit-learn's MLP that its tests look at."""

    @staticmethod
    def _learning_rate(model: Any) -> SimpleNamespace:
        """Return what the next step would take."""
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
        """Value and gradient at packed parameters: weights first, then biases."""
        model: Any = self
        trainer = model._trainer(model.network_, NumPyBackend(), str(theta.dtype))
        recipe = trainer.recipe
        batch = Batch(X, y, sample_weight)
        value, penalty, grads = objective(recipe, [theta], batch, trainer.alphas, NO_NUMBERS)
        return float(value + penalty), np.concatenate(grads)


def check_same_namespace(X: Any, estimator: Any, method: str) -> None:
    """With scikit-learn's array dispatch on, X has to come from where the fit's X did."""
    check = getattr(_array_api, "check_same_namespace", None)
    if check is not None:
        check(X, estimator, attribute="_first_coef", method=method)
