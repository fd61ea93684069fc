"""Losses on logits: value and gradient together, and the link to predictions.

A loss defines ``per_row``: the loss ℓᵢ of each row and its derivative ∂ℓᵢ/∂zᵢ.  The
base class turns that into the mean (or weighted mean) over the rows and its gradient,
so the gradient is always that of the reported value.  To add a loss, subclass `Loss`
and list it in `LOSSES`: `MLPRegressor`, command line and tests take their names from there.
`portable_mlp.check_loss` verifies a custom one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from array_api_compat import device

from portable_mlp.functions import (
    columns_first,
    log_mean_exp,
    log_softmax,
    sigmoid,
    softmax,
    softplus,
    total_weight,
)
from portable_mlp.schedules import Clock, Scheduled, at
from portable_mlp.typing import Array, Namespace


class Loss(ABC):
    """Base of all losses.

    Attributes
    ----------
    link_name : str
        What turns logits into predictions: "identity", "logistic", "softmax", "exp".
    for_labels : bool
        Whether its targets are labels.
    nonnegative : bool
        Whether its targets must not be negative.
    """

    link_name: ClassVar[str] = "identity"
    for_labels: ClassVar[bool] = False
    nonnegative: ClassVar[bool] = False

    @property
    def numbers(self) -> tuple[str, ...]:
        """Names of the numbers that ``per_row`` takes in each step of training.

        They are its keyword arguments; elsewhere it is called without them.
        """
        return ()

    def per_step(self, clock: Clock) -> tuple[float, ...]:
        """Numbers of a step: the attributes of these names, see `Layer.per_step`."""
        return tuple(at(getattr(self, name), clock) for name in self.numbers)

    @abstractmethod
    def per_row(self, z: Array, y: Array, xp: Namespace) -> tuple[Array, Array]:
        """Loss of each row, (n,), and its derivative with respect to the logits, (n, k).

        Parameters
        ----------
        z : array (n, k)
            Logits.
        y : array
            Targets, (n, k) or, where k = 1 or the loss takes labels, (n,).

        Returns
        -------
        values : array (n,)
        dz : array (n, k)
        """

    def link(self, z: Array, xp: Namespace) -> Array:
        """Predictions (n, k) from logits (n, k)."""
        return z

    def pool(self, z: Array, xp: Namespace) -> Array:
        """Logits (n, k) whose prediction is the mean of the members', from theirs (m, n, k)."""
        return xp.mean(z, axis=0)

    def __call__(
        self,
        z: Array,
        y: Array,
        xp: Namespace,
        weights: Array | None = None,
        total: Any = None,
        numbers: Sequence[Any] = (),
    ) -> tuple[Array, Array]:
        """Weighted mean loss and its gradient with respect to the logits.

        L = Σ wᵢ ℓᵢ / Σ wᵢ,  dzᵢ = (wᵢ / Σ w) ∂ℓᵢ/∂zᵢ.  Rows that all weigh nothing
        have L = 0 and dz = 0.

        Logits of an ensemble's members have a first axis more, as y and the weights then do;
        each member has a mean of its own.

        Parameters
        ----------
        z : array (n, k) or (m, n, k)
        y : array (n,) or (n, k); (m, n) or (m, n, k)
        xp : namespace
        weights : array (n,) or (m, n), optional
            Non-negative; equal if not given.
        total : float or array (), optional
            What to divide by instead of Σ w: of rows that are a part of a batch, that of the
            whole batch, so that the parts' results add up.
        numbers : sequence of float, optional
            From ``per_step``.

        Returns
        -------
        value : array () or (m,)
        dz : array, as z
        """
        named = dict(zip(self.numbers, numbers, strict=True)) if numbers else {}
        if z.ndim == 3:
            # A member's row is a row as any other
            rows = xp.reshape(z, (-1, z.shape[2])), xp.reshape(y, (-1, *y.shape[2:]))
            values, dz = self.per_row(*rows, xp, **named)
            # By way of one axis, so that all libraries lay dz out row by row
            dz = xp.reshape(xp.reshape(dz, (-1,)), z.shape)
            values = xp.reshape(values, z.shape[:2])
        else:
            values, dz = self.per_row(z, y, xp, **named)
        if weights is None:
            share = 1.0 / (z.shape[-2] if total is None else total)
            return xp.sum(values, axis=-1) * share, dz * share
        if total is None:
            total = total_weight(weights, xp)
            total = total[:, None] if z.ndim == 3 else total
        share = weights / total
        return xp.sum(share * values, axis=-1), dz * share[..., None]


@dataclass(frozen=True)
class CallableLoss(Loss):
    """A function as a loss.

    Parameters
    ----------
    function : callable
        ``function(z, y, xp) -> (values, dz)``: what `per_row` does.
    like : Loss
        Whose link turns logits into predictions.
    """

    function: Callable[[Array, Array, Namespace], tuple[Array, Array]]
    like: Loss

    def per_row(self, z: Array, y: Array, xp: Namespace) -> tuple[Array, Array]:
        values, dz = self.function(z, y, xp)
        wanted = tuple(z.shape[:1]), tuple(z.shape)
        shapes = tuple(tuple(getattr(a, "shape", ())) for a in (values, dz))
        if shapes != wanted:
            raise ValueError(
                "the loss must return the rows' losses and their derivatives, arrays of shapes"
                f" {wanted[0]} and {wanted[1]}, not {shapes[0]} and {shapes[1]}"
            )
        return values, dz

    @property
    def link_name(self) -> str:  # type: ignore[override]
        return self.like.link_name

    def link(self, z: Array, xp: Namespace) -> Array:
        return self.like.link(z, xp)

    def pool(self, z: Array, xp: Namespace) -> Array:
        return self.like.pool(z, xp)


def _match_shape(y: Array, z: Array, xp: Namespace) -> Array:
    """Targets of one output may come without their axis: (n,) -> (n, 1)."""
    return y if y.ndim == z.ndim else xp.reshape(y, z.shape)


def _check_smoothing(smoothing: Any) -> float:
    if isinstance(smoothing, tuple) or not 0.0 <= smoothing < 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1), got {smoothing!r}")
    return float(smoothing)


@dataclass(frozen=True)
class _CrossEntropy(Loss):
    """What the two cross-entropies share."""

    label_smoothing: float | Scheduled = 0.0
    clipped: bool = False

    def __post_init__(self) -> None:
        _check_smoothing(self._constant)

    @property
    def _constant(self) -> Any:
        """The smoothing outside of training."""
        given = self.label_smoothing
        return given.value if isinstance(given, Scheduled) else given

    @property
    def numbers(self) -> tuple[str, ...]:
        return ("label_smoothing",) if isinstance(self.label_smoothing, Scheduled) else ()

    def per_step(self, clock: Clock) -> tuple[float, ...]:
        return tuple(map(_check_smoothing, super().per_step(clock)))

    def smoothed(self, t: Array, n_classes: int, smoothing: Any) -> Array:
        """Targets t = (1 − s) y + s / n_classes (Szegedy et al., 2016, sec. 7)."""
        s = self._constant if smoothing is None else smoothing
        if smoothing is None and not s:
            return t
        return (1.0 - s) * t + s / n_classes


def _sum_outputs(values: Array, xp: Namespace) -> Array:
    """Σₖ, (n, k) -> (n,)."""
    return values[:, 0] if values.shape[1] == 1 else xp.sum(values, axis=1)


def _clip(p: Array, xp: Namespace) -> Array:
    """Probabilities, in [ε, 1 − ε] with ε that of their data type."""
    epsilon = float(xp.finfo(p.dtype).eps)
    return xp.minimum(xp.maximum(p, epsilon), 1.0 - epsilon)


@dataclass(frozen=True)
class BinaryCrossEntropy(_CrossEntropy):
    """ℓ = −Σₖ [t log σ(z) + (1 − t) log(1 − σ(z))] = Σₖ [max(z, 0) − z t + log(1 + e^(−|z|))].

    ∂ℓ/∂z = σ(z) − t.  One output, or several independent ones (multi-label).

    Parameters
    ----------
    label_smoothing : float in [0, 1), or Scheduled, default=0
        t = (1 − s) y + s / 2, as for two classes of a softmax.
    clipped : bool, default=False
        Whether ℓ, but not its derivative, is that of probabilities within [ε, 1 − ε]: at most
        −log ε for each output, 36 in float64 and 16 in float32.  As in scikit-learn.
    """

    link_name: ClassVar[str] = "logistic"
    for_labels = True

    def per_row(
        self, z: Array, y: Array, xp: Namespace, label_smoothing: Any = None
    ) -> tuple[Array, Array]:
        t = self.smoothed(_match_shape(y, z, xp), 2, label_smoothing)
        p = self.link(z, xp)
        if self.clipped:
            q = _clip(p, xp)
            values = -(t * xp.log(q) + (1.0 - t) * xp.log(1.0 - q))
        else:
            values = softplus(z, xp) - z * t
        return _sum_outputs(values, xp), p - t

    def link(self, z: Array, xp: Namespace) -> Array:
        return sigmoid(z, xp)

    def pool(self, z: Array, xp: Namespace) -> Array:
        # z = log p − log(1 − p)
        return log_mean_exp(-softplus(-z, xp), xp) - log_mean_exp(-softplus(z, xp), xp)


@dataclass(frozen=True)
class SoftmaxCrossEntropy(_CrossEntropy):
    """ℓ = −Σₖ tₖ log softmax(z)ₖ,  ∂ℓ/∂z = softmax(z) − t.

    Targets are labels, integers (n,) in [0, k), or probabilities (n, k) whose rows
    sum to one.

    Parameters
    ----------
    label_smoothing : float in [0, 1), or Scheduled, default=0
        t = (1 − s) y + s / k (Szegedy et al., 2016, sec. 7).
    clipped : bool, default=False
        As of `BinaryCrossEntropy`.
    """

    link_name: ClassVar[str] = "softmax"
    for_labels = True

    def per_row(
        self, z: Array, y: Array, xp: Namespace, label_smoothing: Any = None
    ) -> tuple[Array, Array]:
        # Classes along the first axis, (k, n): with few classes, sums over them and
        # broadcasts along them then run over long rows, many times faster on NumPy
        k = z.shape[1]
        z = columns_first(z, xp)
        if y.ndim == 1:
            labels = xp.arange(k, dtype=y.dtype, device=device(y))
            t = xp.astype(labels[:, None] == y, z.dtype)
        else:
            t = y.T
        t = self.smoothed(t, k, label_smoothing)
        shifted = z - xp.max(z, axis=0)
        e = xp.exp(shifted)
        total = xp.sum(e, axis=0)
        p = e / total
        if self.clipped:
            values = -xp.sum(t * xp.log(_clip(p, xp)), axis=0)
        else:
            # Σ t = 1, so −Σ t (shifted − log total) = log total − Σ t · shifted
            values = xp.log(total) - xp.sum(t * shifted, axis=0)
        return values, (p - t).T

    def link(self, z: Array, xp: Namespace) -> Array:
        return softmax(z, xp)

    def pool(self, z: Array, xp: Namespace) -> Array:
        return log_mean_exp(log_softmax(z, xp), xp)


@dataclass(frozen=True)
class SquaredError(Loss):
    """ℓ = ½ Σₖ (z − y)²,  ∂ℓ/∂z = z − y."""

    def per_row(self, z: Array, y: Array, xp: Namespace) -> tuple[Array, Array]:
        error = z - _match_shape(y, z, xp)
        return 0.5 * _sum_outputs(error * error, xp), error


@dataclass(frozen=True)
class Poisson(Loss):
    """Half the Poisson deviance: ℓ = Σₖ [eᶻ − y z + y log y − y],  ∂ℓ/∂z = eᶻ − y.

    Domain: y ≥ 0; z ≤ 88 in float32 and 709 in float64, where eᶻ overflows.
    """

    link_name: ClassVar[str] = "exp"
    nonnegative = True

    def per_row(self, z: Array, y: Array, xp: Namespace) -> tuple[Array, Array]:
        y = _match_shape(y, z, xp)
        mean = xp.exp(z)
        y_log_y = y * xp.log(xp.where(y > 0.0, y, 1.0))
        return _sum_outputs(mean - y * z + y_log_y - y, xp), mean - y

    def link(self, z: Array, xp: Namespace) -> Array:
        return xp.exp(z)

    def pool(self, z: Array, xp: Namespace) -> Array:
        return log_mean_exp(z, xp)


@dataclass(frozen=True)
class Huber(Loss):
    """With r = z − y and c = r clipped to [−δ, δ]:  ℓ = Σₖ c (r − c/2),  ∂ℓ/∂z = c.

    That is ½ r² for ``|r| ≤ δ`` and ``δ (|r| − δ/2)`` beyond (Huber, 1964).

    Parameters
    ----------
    delta : float > 0, default=1
    """

    delta: float = 1.0

    def __post_init__(self) -> None:
        if not self.delta > 0.0:
            raise ValueError(f"delta must be positive, got {self.delta!r}")

    def per_row(self, z: Array, y: Array, xp: Namespace) -> tuple[Array, Array]:
        r = z - _match_shape(y, z, xp)
        c = xp.minimum(xp.maximum(r, -self.delta), self.delta)
        return _sum_outputs(c * (r - 0.5 * c), xp), c


@dataclass(frozen=True)
class Quantile(Loss):
    """Pinball loss: ℓ = Σₖ max(q r, (q − 1) r) with r = y − z,  ∂ℓ/∂z = [r < 0] − q.

    At r = 0, where ℓ has a kink, the derivative given is −q, one of its subgradients
    (Koenker and Bassett, 1978).

    Parameters
    ----------
    q : float in (0, 1), default=0.5
        The quantile to predict.
    """

    q: float = 0.5

    def __post_init__(self) -> None:
        if not 0.0 < self.q < 1.0:
            raise ValueError(f"quantile must be in (0, 1), got {self.q!r}")

    def per_row(self, z: Array, y: Array, xp: Namespace) -> tuple[Array, Array]:
        r = _match_shape(y, z, xp) - z
        values = xp.maximum(self.q * r, (self.q - 1.0) * r)
        return _sum_outputs(values, xp), xp.astype(r < 0.0, z.dtype) - self.q


LOSSES: dict[str, Loss] = {
    "binary_cross_entropy": BinaryCrossEntropy(),
    "softmax_cross_entropy": SoftmaxCrossEntropy(),
    "squared_error": SquaredError(),
    "poisson": Poisson(),
    "huber": Huber(),
    "quantile": Quantile(),
}
