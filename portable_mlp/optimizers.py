"""Optimizers: update rules, each written for one array.

A rule takes a parameter p, its gradient g and its moments (the optimizer state), and returns
the new p and moments.  It may overwrite p and the moments it receives: on NumPy, CuPy and
torch the augmented assignments below work in place; on JAX they rebind.  Callers must use
only the returned arrays.  Numbers that may change without a new compilation (the learning
rate, bias corrections, momentum) come from ``coefficients``, which computes them on the host
in float64.

To add an optimizer, subclass `Optimizer` and list it in `SOLVERS`: estimators, the command
line and the tests take their names from there.  If an estimator selects it by name, the
estimator's parameters set the fields of the same names.  An instance can also be given
directly as a solver, without a name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from math import inf, sqrt
from numbers import Real
from typing import Any, ClassVar

from portable_mlp.schedules import Scheduled
from portable_mlp.typing import Array, Namespace, Params

Moments = tuple[Array, ...]
Coefficients = tuple[Any, ...]


@dataclass(frozen=True, kw_only=True)
class Optimizer(ABC):
    """Base class of all optimizers.

    Parameters
    ----------
    weight_decay : float >= 0, or Scheduled, default=0
        Decoupled weight decay (Loshchilov and Hutter, 2019): before the rule is applied,
        p ← (1 − rate · weight_decay) p.
    decay_biases : bool, default=True
        Whether the group "bias" decays too.
    average : float in [0, 1), default=0
        Decay rate δ of an exponential moving average of the parameters, a ← δ a + (1 − δ) p.
        After t steps a / (1 − δᵗ) takes their place wherever they are used but in training
        (Kingma and Ba, 2015, section 7.2).  With 0 there is no average.

    Raises
    ------
    ValueError
        If a number is negative, not finite, or out of its range.
    """

    weight_decay: float | Scheduled = 0.0
    decay_biases: bool = True
    average: float = 0.0
    n_moments: ClassVar[int] = 0
    """Number of the rule's state arrays per parameter, each of the parameter's shape."""

    @property
    def n_states(self) -> int:
        """Number of state arrays per parameter: the moments and, last, the average if any."""
        return self.n_moments + bool(self.average)

    def __post_init__(self) -> None:
        for name, given in vars(self).items():
            value: Any = given.value if isinstance(given, Scheduled) else given
            if isinstance(value, tuple):
                raise ValueError(f"{name}: one number for all members; treatments have factors")
            number = isinstance(value, Real) and not isinstance(value, bool)
            if number and not 0.0 <= value < inf:
                raise ValueError(f"{name} must be at least 0 and finite, got {value!r}")
        for name in ("momentum", "rho"):
            if not getattr(self, name, 0.0) <= 1.0:
                raise ValueError(f"{name} must be at most 1, got {getattr(self, name)!r}")
        for name in ("beta_1", "beta_2", "average"):
            if not getattr(self, name, 0.0) < 1.0:
                raise ValueError(f"{name} must be below 1, got {getattr(self, name)!r}")

    def init(self, params: Params, xp: Namespace) -> list[Moments]:
        """Return the states before the first step: zeros, a tuple for each parameter."""
        return [tuple(xp.zeros_like(p) for _ in range(self.n_states)) for p in params]

    def coefficients(self, step: int, rate: Any) -> Coefficients:
        """Return the numbers that ``update`` needs in a step, the learning rate first.

        Parameters
        ----------
        step : int
            Number of the step, counted from 1.
        rate : float, or ndarray (members,)
            Learning rate of the step.  Optimizers of this module get an array with one for
            each member of an ensemble; what they compute from it is one, too.
        """
        return (rate,)

    def rule(self) -> Optimizer:
        """Return the optimizer that a compiled step calls.

        Optimizers that differ only in numbers of the step (the decay, and what ``coefficients``
        returns) have equal rules, so they can share a compiled step.  A subclass defined
        elsewhere is its own rule unless it overrides this method.
        """
        own = type(self).__module__ == __name__
        return replace(self, weight_decay=0.0, decay_biases=True) if own else self

    @abstractmethod
    def update(
        self, p: Array, g: Array, moments: Moments, c: Coefficients, xp: Namespace
    ) -> tuple[Array, Moments]:
        """Update one parameter.

        Parameters
        ----------
        p, g : array
            The parameter and its gradient, of the same shape.  ``p`` may be overwritten.
        moments : tuple of ``n_moments`` arrays of that shape
            Optimizer state; it may be overwritten.
        c : tuple of float
            Numbers from ``coefficients``.
        xp : namespace

        Returns
        -------
        p : array
        moments : tuple of array
        """

    def apply(
        self,
        params: Params,
        grads: Params,
        moments: list[Moments],
        c: Coefficients,
        xp: Namespace,
        keep: Any = None,
    ) -> tuple[list[Array], list[Moments]]:
        """Update a list of parameters that have the same treatment.

        Parameters
        ----------
        params, grads : lists of arrays
        moments : list of tuples of arrays
            Optimizer state, from ``init`` or the previous step.
        c : tuple of float
            Numbers from ``coefficients``.
        xp : namespace
        keep : float, optional
            Factor on the parameters before the rule, 1 − rate · weight_decay; 1 if not given.

        Returns
        -------
        params : list of arrays
        moments : list of tuples of arrays
        """
        new_params, new_moments = [], []
        for p, g, m in zip(params, grads, moments, strict=True):
            if keep is not None:
                p *= keep
            new_p, new_m = self.update(p, g, m[: self.n_moments], c, xp)
            if self.average:
                a = m[-1]
                a *= self.average
                a += (1.0 - self.average) * new_p
                new_m = (*new_m, a)
            new_params.append(new_p)
            new_moments.append(new_m)
        return new_params, new_moments


@dataclass(frozen=True, kw_only=True)
class SGD(Optimizer):
    """Stochastic gradient descent with momentum, as in torch.optim.SGD.

    b ← μ b + g;  p ← p − rate · b, or with Nesterov's look-ahead p − rate (g + μ b)
    (Sutskever et al., 2013).

    Parameters
    ----------
    momentum : float in [0, 1], default=0
        The momentum μ; 0 gives plain gradient descent.
    nesterov : bool, default=False
        Whether to use Nesterov's look-ahead.

    Raises
    ------
    ValueError
        If ``nesterov`` is set without momentum.
    """

    momentum: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nesterov and self.momentum == 0.0:
            raise ValueError("nesterov=True needs a momentum above 0")

    @property
    def n_moments(self) -> int:  # type: ignore[override]
        return 1 if self.momentum else 0

    def coefficients(self, step: int, rate: Any) -> Coefficients:
        return rate, self.momentum

    def rule(self) -> Optimizer:
        rule = super().rule()
        # Any momentum above 0 runs the same code: its value comes in as a coefficient
        shared = type(self) is SGD and self.momentum
        return replace(rule, momentum=1.0) if shared else rule  # type: ignore[call-arg]

    def update(
        self, p: Array, g: Array, moments: Moments, c: Coefficients, xp: Namespace
    ) -> tuple[Array, Moments]:
        rate, momentum = c
        if not moments:
            p -= rate * g
            return p, ()
        (b,) = moments
        b *= momentum
        b += g
        p -= rate * (g + momentum * b if self.nesterov else b)
        return p, (b,)


@dataclass(frozen=True, kw_only=True)
class SklearnSGD(Optimizer):
    """Momentum as in scikit-learn, where the velocity includes the learning rate.

    v ← μ v − rate · g;  p ← p + v, or with Nesterov's look-ahead p + μ v − rate · g.
    With a constant rate it is equivalent to `SGD`; with a changing rate the two differ.

    Parameters
    ----------
    momentum : float in [0, 1], default=0.9
        The momentum μ.
    nesterov : bool, default=True
        Whether to use Nesterov's look-ahead.
    """

    momentum: float = 0.9
    nesterov: bool = True
    n_moments = 1

    def coefficients(self, step: int, rate: Any) -> Coefficients:
        return rate, self.momentum

    def rule(self) -> Optimizer:
        rule = super().rule()
        shared = type(self) is SklearnSGD
        return replace(rule, momentum=1.0) if shared else rule  # type: ignore[call-arg]

    def update(
        self, p: Array, g: Array, moments: Moments, c: Coefficients, xp: Namespace
    ) -> tuple[Array, Moments]:
        rate, momentum = c
        (v,) = moments
        descent = rate * g
        v *= momentum
        v -= descent
        p += momentum * v - descent if self.nesterov else v
        return p, (v,)


@dataclass(frozen=True, kw_only=True)
class Adam(Optimizer):
    """Adam (Kingma and Ba, 2015, algorithm 1), as in torch.optim.Adam.

    m ← β₁ m + (1 − β₁) g;  v ← β₂ v + (1 − β₂) g²;
    p ← p − rate · m̂ / (√v̂ + ε)  with  m̂ = m / (1 − β₁ᵗ),  v̂ = v / (1 − β₂ᵗ).

    Factors that are constant within a step are computed on the host.  The moments are stored
    as m′ = m / (1 − β₁) and v′ = v / (1 − β₂), so that m′ ← β₁ m′ + g,  v′ ← β₂ v′ + g² and
    p ← p − sizeₜ · m′ / (√v′ + εₜ).  With c = √((1 − β₂ᵗ) / (1 − β₂)),
    sizeₜ = rate · c (1 − β₁) / (1 − β₁ᵗ)  and  εₜ = ε c.

    Parameters
    ----------
    beta_1 : float in [0, 1), default=0.9
        Decay rate of the first moment.
    beta_2 : float in [0, 1), default=0.999
        Decay rate of the second moment.
    epsilon : float >= 0, default=1e-8
        Addend ε to the square root in the denominator.
    """

    beta_1: float = 0.9
    beta_2: float = 0.999
    epsilon: float = 1e-8
    n_moments = 2

    def coefficients(self, step: int, rate: Any) -> Coefficients:
        c = sqrt((1.0 - self.beta_2**step) / (1.0 - self.beta_2))
        corrected = rate * c * (1.0 - self.beta_1) / (1.0 - self.beta_1**step)
        return rate, corrected, self.epsilon * c

    def update(
        self, p: Array, g: Array, moments: Moments, c: Coefficients, xp: Namespace
    ) -> tuple[Array, Moments]:
        _, step_size, epsilon = c
        m, v = moments
        m *= self.beta_1
        m += g
        v *= self.beta_2
        v += g * g
        denominator = xp.sqrt(v)
        denominator += epsilon
        step = m / denominator
        step *= step_size
        p -= step
        return p, (m, v)


@dataclass(frozen=True, kw_only=True)
class AdamW(Adam):
    """`Adam` with decoupled weight decay, as in torch.optim.AdamW."""

    weight_decay: float | Scheduled = 0.01


@dataclass(frozen=True, kw_only=True)
class SklearnAdam(Adam):
    """Adam as in scikit-learn, where ε is added to √v, not to √v̂.

    This is the "ε̂" form at the end of section 2 of Kingma and Ba (2015).  With the moments
    stored as in `Adam`, εₜ = ε / √(1 − β₂).
    """

    def coefficients(self, step: int, rate: Any) -> Coefficients:
        rate, corrected, _ = super().coefficients(step, rate)
        return rate, corrected, self.epsilon / sqrt(1.0 - self.beta_2)


@dataclass(frozen=True, kw_only=True)
class RMSprop(Optimizer):
    """RMSprop (Tieleman and Hinton, 2012, lecture 6.5), as in torch.optim.RMSprop.

    v ← ρ v + (1 − ρ) g²;  p ← p − rate · g / (√v + ε).

    Parameters
    ----------
    rho : float in [0, 1], default=0.99
        Decay rate ρ of the second moment.
    epsilon : float >= 0, default=1e-8
        Addend ε to the square root in the denominator.
    """

    rho: float = 0.99
    epsilon: float = 1e-8
    n_moments = 1

    def update(
        self, p: Array, g: Array, moments: Moments, c: Coefficients, xp: Namespace
    ) -> tuple[Array, Moments]:
        (rate,) = c
        (v,) = moments
        v *= self.rho
        v += (1.0 - self.rho) * (g * g)
        p -= rate * g / (xp.sqrt(v) + self.epsilon)
        return p, (v,)


def clip_by_global_norm(
    grads: Params, max_norm: float, xp: Namespace, members: int | None = None
) -> list[Array]:
    """Scale all gradients by min(1, max_norm / (‖g‖ + 10⁻⁶)), with ‖g‖ their joint norm.

    The formula is that of torch.nn.utils.clip_grad_norm_ (Pascanu et al., 2013, algorithm 1).

    Parameters
    ----------
    grads : list of arrays
        Gradients of any shapes; (members, n) if there are members.
    max_norm : float
        Largest norm that is left unchanged.
    xp : namespace
    members : int, optional
        Number of members of an ensemble.  Each member's gradients then have their own norm.
    """
    squares: Any = 0.0
    for g in grads:
        # () for one network, (members, 1) for an ensemble
        own = xp.sum(g * g) if members is None else xp.sum(g * g, axis=1, keepdims=True)
        squares = squares + own
    scale = xp.minimum(max_norm / (xp.sqrt(squares) + 1e-6), 1.0)
    return [g * scale for g in grads]


SOLVERS: dict[str, type[Optimizer] | None] = {
    "sgd": SGD,
    "adam": Adam,
    "adamw": AdamW,
    "rmsprop": RMSprop,
    "lbfgs": None,  # no update rule: SciPy runs it (`portable_mlp.training.lbfgs`)
}
OPTIMIZERS: dict[str, type[Optimizer]] = {n: kind for n, kind in SOLVERS.items() if kind}
