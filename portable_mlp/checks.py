"""Gradient checks: layers and losses against finite differences, in float64.

For a function f and random directions u, the derivative along u by central differences of
fourth order, [8 (f(a + h u) − f(a − h u)) − (f(a + 2h u) − f(a − 2h u))] / 12h, must equal
⟨gradient, u⟩ within a tolerance.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import array_api_compat.numpy as xp
import numpy as np
from numpy.typing import NDArray

from portable_mlp.layers import Layer
from portable_mlp.losses import CallableLoss, Loss, SquaredError
from portable_mlp.members import PerMember
from portable_mlp.network import Network
from portable_mlp.schedules import Clock

# Small enough to stay on one side of nearby kinks.  The truncation error, of order h⁴, is
# below the rounding error, of order ε/h.
_H = 1e-4
_DIRECTIONS = 3

Floats = NDArray[np.float64]


class GradientError(AssertionError):
    """Error for a derivative that disagrees with its function; the message says where."""


def check_layer(
    layer: Layer, x: Any, params: list[Any] | None = None, *, tol: float = 1e-6, seed: int = 0
) -> float:
    """Verify a layer's ``backward`` and ``gradients`` against its ``forward``.

    Parameters
    ----------
    layer : Layer
    x : array-like (n, n_in)
        Input at which to check; it should be away from kinks.
    params : list of array-like, optional
        The layer's parameters; drawn by its initializers if not given.
    tol : float, default=1e-6
        Largest allowed error, relative to the size of the derivatives.
    seed : int, default=0
        Seed of the directions, and of the layer's noise if it draws any.

    Returns
    -------
    float
        The largest relative error.

    Raises
    ------
    GradientError
        If a derivative is off by more than ``tol`` or has the wrong shape, if ``gradients``
        returns the wrong number of arrays, or if a method changes its arguments.
    """
    rng = np.random.RandomState(seed)
    drawn = [p.init(rng, p.shape, p.fan_in, p.fan_out) for p in layer.params]
    names = ["the input", *(f"parameter {p.name!r}" for p in layer.params)]
    points = [_frozen(a) for a in (x, *(drawn if params is None else params))]
    keys = [rng.randint(2**31)] * ("key" in layer.numbers)
    (values,) = Network((layer,)).per_step(Clock(0, 1, 0, 0), keys) or ((),)
    arrays = (v.values if isinstance(v, PerMember) else v for v in values)
    noise = dict(zip(layer.numbers, arrays, strict=True))
    where = f"{type(layer).__name__}"

    def output(values: list[Floats]) -> Floats:
        y: Floats = layer.forward(values[1:], values[0], xp, **noise)[0]
        return y

    try:
        y, residual = layer.forward(points[1:], points[0], xp, **noise)
        # ⟨output, dy⟩ is a scalar function; its gradients are what the methods return for dy
        dy = _frozen(rng.standard_normal(y.shape))
        grads = [
            layer.backward(points[1:], residual, dy, xp),
            *layer.gradients(points[1:], residual, dy, xp),
        ]
    except ValueError as error:
        if "read-only" not in str(error):
            raise
        raise GradientError(f"{where}: changes an array it was given ({error})") from error
    if len(grads) != len(points):
        raise GradientError(
            f"{where}: gradients returns {len(grads) - 1} arrays for {len(points) - 1} parameters"
        )
    return _compare(where, lambda v: float(np.sum(output(v) * dy)), points, names, grads, tol, rng)


def check_loss(
    loss: Loss | Callable[..., Any],
    z: Any,
    y: Any,
    weights: Any = None,
    *,
    tol: float = 1e-6,
    seed: int = 0,
) -> float:
    """Verify that a loss's gradient is that of its value.

    Parameters
    ----------
    loss : Loss or callable
        An instance, or a function for `losses.CallableLoss`.
    z : array-like (n, k)
        Logits at which to check; they should be away from kinks.
    y : array-like (n,) or (n, k)
        Targets.
    weights : array-like (n,), optional
        Weights of the rows.
    tol, seed
        As for `check_layer`.

    Returns
    -------
    float
        The largest relative error.

    Raises
    ------
    GradientError
        If the gradient is off by more than ``tol`` or has the wrong shape, or if the loss
        changes its arguments.
    """
    where = type(loss).__name__
    if not isinstance(loss, Loss):
        where = getattr(loss, "__name__", where)
        loss = CallableLoss(loss, SquaredError())
    z, y = _frozen(z), np.array(y)
    y.flags.writeable = False
    share = None if weights is None else _frozen(weights)
    try:
        _, dz = loss(z, y, xp, share)
    except ValueError as error:
        if "read-only" not in str(error):
            raise
        raise GradientError(f"{where}: changes an array it was given ({error})") from error
    rng = np.random.RandomState(seed)
    return _compare(
        where, lambda v: float(loss(v[0], y, xp, share)[0]), [z], ["the logits"], [dz], tol, rng
    )


def _compare(
    where: str,
    f: Callable[[list[Floats]], float],
    points: list[Floats],
    names: list[str],
    grads: list[Any],
    tol: float,
    rng: np.random.RandomState,
) -> float:
    """Return the largest relative error over points and directions; raise above ``tol``."""
    worst = 0.0
    for i, (point, name, grad) in enumerate(zip(points, names, grads, strict=True)):
        shape = getattr(grad, "shape", None)
        if shape != point.shape:
            raise GradientError(
                f"{where}: the gradient with respect to {name} has shape {shape},"
                f" expected {point.shape}"
            )

        def slope(u: Floats, i: int = i) -> float:
            h = _H * max(1.0, float(np.max(np.abs(points[i]))))

            def at(step: float) -> float:
                return f([*points[:i], points[i] + step * u, *points[i + 1 :]])

            return (8.0 * (at(h) - at(-h)) - (at(2.0 * h) - at(-2.0 * h))) / (12.0 * h)

        for _ in range(_DIRECTIONS):
            u = rng.standard_normal(point.shape)
            u /= np.linalg.norm(u)
            numeric, analytic = slope(u), float(np.sum(grad * u))
            size = max(abs(numeric), abs(analytic), float(np.linalg.norm(grad)), 1e-8)
            error = abs(numeric - analytic) / size
            if not error <= tol:  # true for NaN as well
                raise GradientError(
                    f"{where}: the derivative with respect to {name} is wrong: along a random"
                    f" direction {analytic:.10g}, by finite differences {numeric:.10g}"
                    f" (relative error {error:.1e}, allowed {tol:.0e})."
                    f" {_worst_element(grad, slope)}"
                )
            worst = max(worst, error)
    return worst


def _worst_element(grad: Floats, slope: Callable[[Floats], float], most: int = 2000) -> str:
    """Describe the element with the largest error among the first ``most``."""
    numeric = np.empty(min(grad.size, most))
    for j in range(numeric.size):
        u = np.zeros(grad.size)
        u[j] = 1.0
        numeric[j] = slope(u.reshape(grad.shape))
    off = np.abs(grad.ravel()[:most] - numeric)
    j = int(np.argmax(np.where(np.isnan(off), np.inf, off)))
    index = tuple(int(k) for k in np.unravel_index(j, grad.shape))
    return f"Worst at {list(index)}: {grad[index]:.10g} instead of {numeric[j]:.10g}."


def _frozen(x: Any) -> Floats:
    # A read-only copy: a method that changes its argument raises an error
    array = np.array(x, dtype=np.float64)
    array.flags.writeable = False
    return array
