"""Losses on logits: value and gradient together, and the link to predictions.

A loss defines ``per_row``: the loss ℓᵢ of each row and its derivative ∂ℓᵢ/∂zᵢ.  The base
class turns these into the mean (or weighted mean) over the rows and its gradient, so the
gradient is always that of the reported value.  To add a loss, subclass `Loss` and list it
in `LOSSES`: `MLPRegressor`, the command line and the tests take their names from there.
`portable_mlp.check_loss` verifies a custom loss.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Real
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
    """Base class of all losses.

    Attributes
    ----------
    link_name : {"identity", "logistic", "softmax", "exp"}
        Name of the function that turns logits into predictions.
    for_labels : bool
        Whether the targets are class labels.
    nonnegative : bool
        Whether the targets must not be negative.
    """

    link_name: ClassVar[str] = "identity"
    for_labels: ClassVar[bool] = False
    nonnegative: ClassVar[bool] = False

    @property
    def numbers(self) -> tuple[str, ...]:
        """The names of keyword arguments that training passes to ``per_row`` in each step.

        Outside of training, ``per_row`` is called without them.
        """
        return ()

    def per_step(self, clock: Clock) -> tuple[float, ...]:
        """Return the numbers of a step, the attributes named in ``numbers``.

        See `Layer.per_step`.
        """
        return tuple(at(getattr(self, name), clock) for name in self.numbers)

    def n_logits(self, n_targets: int) -> int:
        """Return the number of logits for a number of targets; as many by default."""
        return n_targets

    @abstractmethod
    def per_row(self, z: Array, y: Array, xp: Namespace) -> tuple[Array, Array]:
        """Return the loss of each row and its derivative with respect to the logits.

        Parameters
        ----------
        z : array (n, k)
            Logits.
        y : array
            Targets, (n, k) or, where k = 1 or the loss takes labels, (n,).
        xp : namespace

        Returns
        -------
        values : array (n,)
            Losses ℓᵢ.
        dz : array (n, k)
            Derivatives ∂ℓᵢ/∂zᵢ.
        """

    def link(self, z: Array, xp: Namespace) -> Array:
        """Return the predictions (n, k) from logits (n, k)."""
        return z

    def pool(self, z: Array, xp: Namespace) -> Array:
        """Combine the logits of members, (m, n, k), into logits of the ensemble, (n, k).

        The ensemble's prediction is the mean of the members' predictions.
        """
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
        """Return the weighted mean loss and its gradient with respect to the logits.

        L = Σ wᵢ ℓᵢ / Σ wᵢ,  dzᵢ = (wᵢ / Σ w) ∂ℓᵢ/∂zᵢ.  If all weights are zero, L = 0 and
        dz = 0.

        In an ensemble, the logits, targets and weights have an additional first axis for the
        m members.  The mean is then taken for each member separately.

        Parameters
        ----------
        z : array (n, k) or (m, n, k)
            Logits.
        y : array (n,) or (n, k); (m, n) or (m, n, k)
            Targets.
        xp : namespace
        weights : array (n,) or (m, n), optional
            Non-negative weights of the rows; equal if not given.
        total : float or array (), optional
            Divisor to use instead of Σ w.  For rows that are a part of a batch it is that of
            the whole batch, so that the results of the parts add up.
        numbers : sequence of float, optional
            Numbers from ``per_step``.

        Returns
        -------
        value : array () or (m,)
        dz : array of the shape of z
        """
        named = dict(zip(self.numbers, numbers, strict=True)) if numbers else {}
        if z.ndim == 3:
            # per_row treats each row alone, so the members' rows are stacked: (m · n, k)
            rows = xp.reshape(z, (-1, z.shape[2])), xp.reshape(y, (-1, *y.shape[2:]))
            values, dz = self.per_row(*rows, xp, **named)
            # Going through one axis makes dz contiguous in row-major order in all libraries
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
        share = weights / total  # (n,) or (m, n)
        return xp.sum(share * values, axis=-1), dz * share[..., None]


@dataclass(frozen=True)
class CallableLoss(Loss):
    """A loss given by a function.

    Parameters
    ----------
    function : callable
        ``function(z, y, xp) -> (values, dz)``, with the contract of `Loss.per_row`.
    like : Loss
        Loss whose link turns logits into predictions.

    Raises
    ------
    ValueError
        If ``function`` returns arrays of other shapes than (n,) and (n, k).
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
    """Return the targets in the shape of the logits.

    Targets of a single output may lack the second axis: (n,) -> (n, 1).
    """
    return y if y.ndim == z.ndim else xp.reshape(y, z.shape)


def _check_smoothing(smoothing: Any) -> float:
    if isinstance(smoothing, tuple) or not 0.0 <= smoothing < 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1), got {smoothing!r}")
    return float(smoothing)


@dataclass(frozen=True)
class _CrossEntropy(Loss):
    """Base class of the two cross-entropies: label smoothing and clipping."""

    label_smoothing: float | Scheduled = 0.0
    clipped: bool = False

    def __post_init__(self) -> None:
        _check_smoothing(self._constant)

    @property
    def _constant(self) -> Any:
        """The label smoothing used outside of training: a schedule's initial value."""
        given = self.label_smoothing
        return given.value if isinstance(given, Scheduled) else given

    @property
    def numbers(self) -> tuple[str, ...]:
        return ("label_smoothing",) if isinstance(self.label_smoothing, Scheduled) else ()

    def per_step(self, clock: Clock) -> tuple[float, ...]:
        return tuple(map(_check_smoothing, super().per_step(clock)))

    def smoothed(self, t: Array, n_classes: int, smoothing: Any) -> Array:
        """Return the targets t = (1 − s) y + s / n_classes (Szegedy et al., 2016, sec. 7)."""
        s = self._constant if smoothing is None else smoothing
        # Tested only where it is a constant: a number of the step may be traced
        if smoothing is None and not s:
            return t
        return (1.0 - s) * t + s / n_classes


def _sum_outputs(values: Array, xp: Namespace) -> Array:
    """Return the sum over the outputs, (n, k) -> (n,)."""
    return values[:, 0] if values.shape[1] == 1 else xp.sum(values, axis=1)


def _clip(p: Array, xp: Namespace) -> Array:
    """Clip probabilities to [ε, 1 − ε], where ε is the machine epsilon of their dtype."""
    epsilon = float(xp.finfo(p.dtype).eps)
    return xp.minimum(xp.maximum(p, epsilon), 1.0 - epsilon)


@dataclass(frozen=True)
class BinaryCrossEntropy(_CrossEntropy):
    """Binary cross-entropy, ℓ = −Σₖ [t log σ(z) + (1 − t) log(1 − σ(z))],  ∂ℓ/∂z = σ(z) − t.

    It is computed as Σₖ [max(z, 0) − z t + log(1 + e^(−|z|))].  There may be one output, or
    several independent ones (multi-label).

    Parameters
    ----------
    label_smoothing : float in [0, 1), or Scheduled, default=0
        Smoothing s of the targets, t = (1 − s) y + s / 2, as for two classes of a softmax.
    clipped : bool, default=False
        Whether to clip the probabilities in ℓ, but not in its derivative, to [ε, 1 − ε], as
        in scikit-learn.  This limits ℓ to −log ε for each output: 36 in float64 and 16 in
        float32.
    """

    link_name: ClassVar[str] = "logistic"
    for_labels = True

    def per_row(
        self, z: Array, y: Array, xp: Namespace, label_smoothing: Any = None
    ) -> tuple[Array, Array]:
        t = self.smoothed(_match_shape(y, z, xp), 2, label_smoothing)
        p = self.link(z, xp)
        # Only the value is clipped: the gradient stays p − t, as in scikit-learn
        if self.clipped:
            q = _clip(p, xp)
            values = -(t * xp.log(q) + (1.0 - t) * xp.log(1.0 - q))
        else:
            values = softplus(z, xp) - z * t
        return _sum_outputs(values, xp), p - t

    def link(self, z: Array, xp: Namespace) -> Array:
        return sigmoid(z, xp)

    def pool(self, z: Array, xp: Namespace) -> Array:
        # z = log p − log(1 − p), with p and 1 − p each the mean over the members
        return log_mean_exp(-softplus(-z, xp), xp) - log_mean_exp(-softplus(z, xp), xp)


@dataclass(frozen=True)
class SoftmaxCrossEntropy(_CrossEntropy):
    """Softmax cross-entropy, ℓ = −Σₖ tₖ log softmax(z)ₖ,  ∂ℓ/∂z = softmax(z) − t.

    Targets are either integer labels (n,) in [0, k), or probabilities (n, k) whose rows
    sum to one.

    Parameters
    ----------
    label_smoothing : float in [0, 1), or Scheduled, default=0
        Smoothing s of the targets, t = (1 − s) y + s / k (Szegedy et al., 2016, sec. 7).
    clipped : bool, default=False
        Whether to clip probabilities in the loss value, as in `BinaryCrossEntropy`.
    """

    link_name: ClassVar[str] = "softmax"
    for_labels = True

    def per_row(
        self, z: Array, y: Array, xp: Namespace, label_smoothing: Any = None
    ) -> tuple[Array, Array]:
        # Classes along the first axis, (k, n).  With few classes, sums and broadcasts then
        # run over long contiguous rows, which is many times faster on NumPy.
        k = z.shape[1]
        z = columns_first(z, xp)
        if y.ndim == 1:
            labels = xp.arange(k, dtype=y.dtype, device=device(y))
            t = xp.astype(labels[:, None] == y, z.dtype)  # one-hot, (k, n)
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
    """Half the squared error, ℓ = ½ Σₖ (z − y)²,  ∂ℓ/∂z = z − y."""

    def per_row(self, z: Array, y: Array, xp: Namespace) -> tuple[Array, Array]:
        error = z - _match_shape(y, z, xp)
        return 0.5 * _sum_outputs(error * error, xp), error


@dataclass(frozen=True)
class Poisson(Loss):
    """Half the Poisson deviance, ℓ = Σₖ [eᶻ − y z + y log y − y],  ∂ℓ/∂z = eᶻ − y.

    The domain is y ≥ 0, with z ≤ 88 in float32 and z ≤ 709 in float64: beyond these
    limits eᶻ overflows.
    """

    link_name: ClassVar[str] = "exp"
    nonnegative = True

    def per_row(self, z: Array, y: Array, xp: Namespace) -> tuple[Array, Array]:
        y = _match_shape(y, z, xp)
        mean = xp.exp(z)
        y_log_y = y * xp.log(xp.where(y > 0.0, y, 1.0))  # its limit at y = 0 is 0
        return _sum_outputs(mean - y * z + y_log_y - y, xp), mean - y

    def link(self, z: Array, xp: Namespace) -> Array:
        return xp.exp(z)

    def pool(self, z: Array, xp: Namespace) -> Array:
        return log_mean_exp(z, xp)


@dataclass(frozen=True)
class Huber(Loss):
    """Huber's loss: ℓ = Σₖ c (r − c/2),  ∂ℓ/∂z = c, with r = z − y and c = r clipped to [−δ, δ].

    It equals ½ r² for ``|r| ≤ δ`` and ``δ (|r| − δ/2)`` beyond (Huber, 1964).

    Parameters
    ----------
    delta : float > 0, default=1
        Size of the residual, δ, at which the loss becomes linear.

    Raises
    ------
    ValueError
        If ``delta`` is not positive.
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
    """Pinball loss, ℓ = Σₖ max(q r, (q − 1) r) with r = y − z,  ∂ℓ/∂z = [r < 0] − q.

    At r = 0 the loss has a kink.  The derivative returned there is −q, one of the
    subgradients (Koenker and Bassett, 1978).

    Parameters
    ----------
    q : float in (0, 1), or a sequence of them in rising order, default=0.5
        The quantile to predict.  Of several quantiles of a single target, each has a logit, and
        the loss is their sum.

    Raises
    ------
    ValueError
        If a quantile is not in (0, 1), or they do not rise.
    """

    q: float | tuple[float, ...] = 0.5

    def __post_init__(self) -> None:
        given: Any = self.q
        if not isinstance(given, Real):
            object.__setattr__(self, "q", tuple(map(float, given)))
        if not all(0.0 < q < 1.0 for q in self.levels):
            raise ValueError(f"quantile must be in (0, 1), got {self.q!r}")
        if not self.levels or any(a >= b for a, b in pairwise(self.levels)):
            raise ValueError(f"quantiles have to rise, got {self.q!r}")

    @property
    def levels(self) -> tuple[float, ...]:
        """The quantiles, one or several."""
        return self.q if isinstance(self.q, tuple) else (self.q,)

    def n_logits(self, n_targets: int) -> int:
        if not isinstance(self.q, tuple):
            return n_targets
        if n_targets != 1:
            raise ValueError(f"several quantiles are for a single target, got {n_targets}")
        return len(self.q)

    def per_row(self, z: Array, y: Array, xp: Namespace) -> tuple[Array, Array]:
        if isinstance(self.q, tuple):
            y = y if y.ndim == z.ndim else y[..., None]
            each = [
                Quantile(q).per_row(z[..., i : i + 1], y, xp) for i, q in enumerate(self.levels)
            ]
            return sum(values for values, _ in each), xp.concat([dz for _, dz in each], axis=-1)
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
