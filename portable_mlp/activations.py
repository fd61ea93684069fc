"""Activations: elementwise layers y = f(x), with dx = dy · f′(x) right below.

Where f′ can be computed from f, only the output is kept for ``backward``.  To add an
activation, subclass `Layer` here and list it in `ACTIVATIONS`; the tests take their
parameters from there.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from math import pi, sqrt
from typing import Any

from portable_mlp.functions import sigmoid, softplus, sum_rows
from portable_mlp.initializers import Ones
from portable_mlp.layers import Layer, Param, check_sizes, with_members
from portable_mlp.typing import Array, Namespace, Params


@dataclass(frozen=True)
class Identity(Layer):
    """Identity, f(x) = x."""

    def forward(self, p: Params, x: Array, xp: Namespace) -> tuple[Array, None]:
        return x, None

    def backward(self, p: Params, residual: None, dy: Array, xp: Namespace) -> Array:
        return dy


@dataclass(frozen=True)
class Sigmoid(Layer):
    """Logistic sigmoid, f(x) = 1 / (1 + e⁻ˣ),  f′ = f (1 − f)."""

    def forward(self, p: Params, x: Array, xp: Namespace) -> tuple[Array, Array]:
        y = sigmoid(x, xp)
        return y, y

    def backward(self, p: Params, y: Array, dy: Array, xp: Namespace) -> Array:
        dx = 1.0 - y
        dx *= y
        dx *= dy
        return dx


@dataclass(frozen=True)
class Tanh(Layer):
    """Hyperbolic tangent, f(x) = tanh x,  f′ = 1 − f²."""

    def forward(self, p: Params, x: Array, xp: Namespace) -> tuple[Array, Array]:
        y = xp.tanh(x)
        return y, y

    def backward(self, p: Params, y: Array, dy: Array, xp: Namespace) -> Array:
        dx = 1.0 - y * y
        dx *= dy
        return dx


@dataclass(frozen=True)
class ReLU(Layer):
    """Rectified linear unit, f(x) = max(x, 0),  f′ = [f > 0]  (0 at the kink)."""

    def forward(self, p: Params, x: Array, xp: Namespace) -> tuple[Array, Array]:
        y = xp.maximum(x, 0.0)
        return y, y

    def backward(self, p: Params, y: Array, dy: Array, xp: Namespace) -> Array:
        dx = xp.astype(y > 0.0, dy.dtype)
        dx *= dy
        return dx


@dataclass(frozen=True)
class LeakyReLU(Layer):
    """Leaky ReLU, f(x) = x for x > 0 and slope · x otherwise (Maas et al., 2013).

    Parameters
    ----------
    slope : float, default=0.01
        Derivative for x ≤ 0.
    """

    slope: float = 0.01

    def forward(self, p: Params, x: Array, xp: Namespace) -> tuple[Array, Array]:
        return xp.where(x > 0.0, x, self.slope * x), x

    def backward(self, p: Params, x: Array, dy: Array, xp: Namespace) -> Array:
        return xp.where(x > 0.0, dy, self.slope * dy)


@dataclass(frozen=True)
class ELU(Layer):
    """Exponential linear unit, f(x) = λx for x > 0 and λα (eˣ − 1) otherwise.

    For x ≤ 0, f′ = f + λα.  The form with λ = 1 is from Clevert et al. (2016), the one
    with λ from Klambauer et al. (2017), eq. 2.

    Parameters
    ----------
    alpha : float > 0, default=1
        α.
    scale : float > 0, default=1
        λ.
    """

    alpha: float = 1.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        # The derivative distinguishes the two sides by the sign of f
        if not (self.alpha > 0.0 and self.scale > 0.0):
            raise ValueError(f"alpha and scale must be positive, got {self}")

    def forward(self, p: Params, x: Array, xp: Namespace) -> tuple[Array, Array]:
        # The minimum keeps expm1 from overflowing at large x
        y = xp.maximum(x, 0.0) + self.alpha * xp.expm1(xp.minimum(x, 0.0))
        y *= self.scale
        return y, y

    def backward(self, p: Params, y: Array, dy: Array, xp: Namespace) -> Array:
        return dy * xp.where(y > 0.0, self.scale, y + self.scale * self.alpha)


@dataclass(frozen=True)
class SELU(ELU):
    """ELU with the self-normalising constants of Klambauer et al. (2017), eq. 2."""

    alpha: float = 1.6732632423543772
    scale: float = 1.0507009873554805


@dataclass(frozen=True)
class GELU(Layer):
    """Gaussian error linear unit, f(x) = ½ x (1 + tanh u),  u = √(2/π) (x + 0.044715 x³).

    The tanh approximation of Hendrycks and Gimpel (2016), sec. 2, is used because the
    array API standard has no erf.
    f′ = ½ (1 + t) + ½ x (1 − t²) u′ with t = tanh u,  u′ = √(2/π) (1 + 3 · 0.044715 x²).
    """

    def forward(self, p: Params, x: Array, xp: Namespace) -> tuple[Array, tuple[Array, Array]]:
        t = xp.tanh(sqrt(2.0 / pi) * (x + 0.044715 * x * x * x))
        return 0.5 * x * (1.0 + t), (x, t)

    def backward(self, p: Params, residual: tuple[Array, Array], dy: Array, xp: Namespace) -> Array:
        x, t = residual
        du = sqrt(2.0 / pi) * (1.0 + 3.0 * 0.044715 * x * x)
        return dy * (0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * du)


@dataclass(frozen=True)
class SiLU(Layer):
    """Sigmoid linear unit, f(x) = x σ(x),  f′ = σ + f (1 − σ)  (Elfwing et al., 2018)."""

    def forward(self, p: Params, x: Array, xp: Namespace) -> tuple[Array, tuple[Array, Array]]:
        s = sigmoid(x, xp)
        y = x * s
        return y, (y, s)

    def backward(self, p: Params, residual: tuple[Array, Array], dy: Array, xp: Namespace) -> Array:
        y, s = residual
        return dy * (s + y * (1.0 - s))


@dataclass(frozen=True)
class Mish(Layer):
    """Mish, f(x) = x t,  t = tanh(log(1 + eˣ)),  f′ = t + x σ(x) (1 − t²)  (Misra, 2020).

    With e = eˣ,  t = n / (n + 2) for n = e (e + 2), and σ(x) = e / (1 + e).
    """

    def forward(self, p: Params, x: Array, xp: Namespace) -> tuple[Array, Any]:
        e = xp.exp(xp.minimum(x, 20.0))  # beyond, t is 1 to rounding in float64 too
        n = e * (e + 2.0)
        t = n / (n + 2.0)
        return x * t, (x, e, t)

    def backward(self, p: Params, residual: Any, dy: Array, xp: Namespace) -> Array:
        x, e, t = residual
        return dy * (t + x * (e / (1.0 + e)) * (1.0 - t * t))


@dataclass(frozen=True)
class Softplus(Layer):
    """Softplus, f(x) = log(1 + eˣ),  f′ = σ(x)."""

    def forward(self, p: Params, x: Array, xp: Namespace) -> tuple[Array, Array]:
        return softplus(x, xp), x

    def backward(self, p: Params, x: Array, dy: Array, xp: Namespace) -> Array:
        return dy * sigmoid(x, xp)


@dataclass(frozen=True)
class Parametric(Layer):
    """An activation between the identity and f, y = x + α ⊙ (f(x) − x), that is learned.

    Each unit has its own α, at first 1 (the parametric activations of RealMLP, Holzmüller et
    al., 2024).

    Parameters
    ----------
    activation : Layer
        The activation f; an elementwise layer without parameters.
    n_in : int
        Number of units; α is (n_in,).
    members : int, optional
        Number of members of an ensemble; α is then (members, 1, n_in).
    """

    activation: Layer
    n_in: int
    members: int | None = None

    def __post_init__(self) -> None:
        check_sizes(self, self.n_in)

    @property
    def n_out(self) -> int:
        return self.n_in

    @property
    def params(self) -> tuple[Param, ...]:
        (shape,) = with_members(self.members, (self.n_in,))
        return (Param("alpha", shape, Ones(), 1, 1, "activation", self.members),)

    def forward(self, p: Params, x: Array, xp: Namespace) -> tuple[Array, Any]:
        (a,) = p
        f, residual = self.activation.forward((), x, xp)
        bend = f - x
        return x + a * bend, (residual, bend)

    def backward(self, p: Params, residual: Any, dy: Array, xp: Namespace) -> Array:
        """Return dx = (1 − α) dy + f′ α dy."""
        (a,) = p
        inner, _ = residual
        bent = a * dy
        return dy - bent + self.activation.backward((), inner, bent, xp)

    def gradients(self, p: Params, residual: Any, dy: Array, xp: Namespace) -> tuple[Array]:
        """Return dα = Σₙ dy (f(x) − x)."""
        _, bend = residual
        return (xp.reshape(sum_rows(dy * bend, xp), p[0].shape),)


ACTIVATIONS: dict[str, Layer] = {
    "identity": Identity(),
    "logistic": Sigmoid(),
    "tanh": Tanh(),
    "relu": ReLU(),
    "leaky_relu": LeakyReLU(),
    "elu": ELU(),
    "selu": SELU(),
    "gelu": GELU(),
    "silu": SiLU(),
    "mish": Mish(),
    "softplus": Softplus(),
}


def get_activation(activation: Any) -> Layer:
    """Return the layer with a given name, or the argument itself if it is a layer.

    Parameters
    ----------
    activation : str or Layer
        A key of `ACTIVATIONS`, or an instance.

    Raises
    ------
    ValueError
        If the name is unknown (the message gives the nearest one), or the argument is
        neither a name nor a layer.
    """
    layer: Layer = lookup("activation", activation, ACTIVATIONS, Layer)
    return layer


def lookup(argument: str, value: Any, table: dict[str, Any], kind: type) -> Any:
    """Return ``table[value]`` for a name, or ``value`` itself if it is a ``kind``.

    Raises
    ------
    ValueError
        If ``value`` is neither; the message names the argument and the nearest name.
    """
    if isinstance(value, kind):
        return value
    if isinstance(value, str) and value in table:
        return table[value]
    near = get_close_matches(str(value), table, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    known = f"Known: {', '.join(table)}; or" if table else "Expected:"
    raise ValueError(f"unknown {argument} {value!r}.{hint} {known} an instance of {kind.__name__}.")
