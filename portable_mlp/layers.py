"""Layers: stateless, frozen descriptions with pure methods.

A layer maps a batch to a batch; rows are samples.  An ensemble's members come before the rows:
where (n, d) stands below, (members, n, d) is meant too.  In each layer the derivative stands
right under the function it belongs to:

``forward(p, x, xp) -> (y, residual)``
    ``residual`` is whatever the derivative needs, returned rather than remembered.
``backward(p, residual, dy, xp) -> dx``
    the gradient of the loss with respect to the input, from that of the output.
``gradients(p, residual, dy, xp) -> dp``
    the gradients of the loss with respect to the parameters ``p``, in their order.

``p`` is the tuple of the layer's parameter arrays, in the order of ``params``.
Backward and gradients are two methods because the first layer needs only the second.
To add a layer, subclass `Layer`, and let `portable_mlp.check_layer` verify it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from numbers import Integral
from typing import Any, ClassVar

from array_api_compat import device, size

from portable_mlp.functions import sum_rows, transposed
from portable_mlp.initializers import GlorotUniform, Initializer
from portable_mlp.members import PerMember
from portable_mlp.schedules import Clock, Scheduled, at
from portable_mlp.typing import Array, Namespace, Params


@dataclass(frozen=True)
class Param:
    """What a layer says of one of its parameters.

    Parameters
    ----------
    name : str
        For messages.
    shape : tuple of int
    init : callable
        See `portable_mlp.initializers`.
    fan_in, fan_out : int
        Numbers of inputs and outputs of the unit the parameter belongs to.
    group : str, default="weight"
        A free label: the parameters of a group share their treatment by the penalty and
        the optimizer, see `portable_mlp.groups`.
    members : int, optional
        If the first axis of ``shape`` is that of the members of an ensemble, how many.
    """

    name: str
    shape: tuple[int, ...]
    init: Initializer
    fan_in: int
    fan_out: int
    group: str = "weight"
    members: int | None = None


class Layer(ABC):
    """Base of all layers.

    A layer that takes or gives a fixed number of columns says so in attributes
    ``n_in`` and ``n_out``; without them any width passes through.  One that is for the
    members of an ensemble says how many in an attribute ``members``.

    Attributes
    ----------
    params : tuple of Param
        The layer's parameters; none by default.
    numbers : tuple of str
        Names of the numbers that ``forward`` takes in each step of training, and not in
        prediction: its keyword arguments, whose defaults are what prediction takes.
        "key" is an int that is drawn in each step and seeds the layer's noise;
        what the others are, `per_step` says.
    whole : tuple of str
        Those of them that are ints; the others are floats.
    """

    numbers: ClassVar[tuple[str, ...]] = ()
    whole: ClassVar[tuple[str, ...]] = ("key",)

    @property
    def params(self) -> tuple[Param, ...]:
        return ()

    def per_step(self, clock: Clock) -> tuple[float | PerMember, ...]:
        """Numbers of a step, in the order of ``numbers`` without "key".

        Each is a number, or a `members.PerMember`.  By default it is the attribute of its name,
        which may be `schedules.Scheduled`.  They are computed on the host in float64, and may
        change without a new compilation.
        """
        return tuple(at(getattr(self, name), clock) for name in self.numbers if name != "key")

    @abstractmethod
    def forward(self, p: Params, x: Array, xp: Namespace) -> tuple[Array, Any]:
        """Map x (n, n_in) to y (n, n_out), with what the derivative needs."""

    @abstractmethod
    def backward(self, p: Params, residual: Any, dy: Array, xp: Namespace) -> Array:
        """Map dy (n, n_out) to dx (n, n_in)."""

    def gradients(self, p: Params, residual: Any, dy: Array, xp: Namespace) -> tuple[Array, ...]:
        """Map dy (n, n_out) to the parameters' gradients, each in its parameter's shape."""
        return ()


@dataclass(frozen=True)
class Linear(Layer):
    """z = x W + b.

    Parameters
    ----------
    n_in, n_out : int
        Widths of input and output; W is (n_in, n_out), b is (n_out,).
    weight_init, bias_init : callable, default=GlorotUniform()
        See `portable_mlp.initializers`.
    members : int, optional
        Of an ensemble: W is (members, n_in, n_out), b is (members, 1, n_out).
    """

    n_in: int
    n_out: int
    weight_init: Initializer = GlorotUniform()
    bias_init: Initializer = GlorotUniform()
    members: int | None = None

    def __post_init__(self) -> None:
        if self.n_in < 1 or self.n_out < 1:
            raise ValueError(f"a layer's widths must be at least 1, got {self}")
        _check_members(self.members)

    @property
    def params(self) -> tuple[Param, ...]:
        fans = (self.n_in, self.n_out)
        weight, bias = fans, (self.n_out,)
        if self.members is not None:
            weight, bias = (self.members, *weight), (self.members, 1, *bias)  # type: ignore[assignment]
        return (
            Param("weight", weight, self.weight_init, *fans, members=self.members),
            Param("bias", bias, self.bias_init, *fans, group="bias", members=self.members),
        )

    def forward(self, p: Params, x: Array, xp: Namespace) -> tuple[Array, Array]:
        """Return z = x W + b, (n, n_in) -> (n, n_out), and x."""
        w, b = p
        z = x @ w  # as an operator, a product that sparse rows know too
        z += b
        return z, x

    def backward(self, p: Params, x: Array, dz: Array, xp: Namespace) -> Array:
        """Return dx = dz Wᵀ, (n, n_out) -> (n, n_in)."""
        w, _ = p
        return xp.matmul(dz, transposed(w))

    def gradients(self, p: Params, x: Array, dz: Array, xp: Namespace) -> tuple[Array, Array]:
        """Return dW = xᵀ dz, (n_in, n_out), and db = Σₙ dz, (n_out,)."""
        return transposed(x) @ dz, xp.reshape(sum_rows(dz, xp), p[1].shape)


@dataclass(frozen=True)
class Repeat(Layer):
    """y = x for each member of an ensemble: (n, d) -> (members, n, d).

    Rows of the members' own, (members, n, d), pass through.

    Parameters
    ----------
    members : int
    """

    members: int

    def __post_init__(self) -> None:
        _check_members(self.members)

    def forward(self, p: Params, x: Array, xp: Namespace) -> tuple[Array, bool]:
        own = x.ndim == 3
        return (x if own else xp.broadcast_to(x, (self.members, *x.shape))), own

    def backward(self, p: Params, own: bool, dy: Array, xp: Namespace) -> Array:
        """Return dx = Σ dy over the members."""
        return dy if own else xp.sum(dy, axis=0)


@dataclass(frozen=True)
class Dropout(Layer):
    """y = x · mask / (1 − rate): inverted dropout (Srivastava et al., 2014, sec. 10).

    The mask is a hash of position and key in 32-bit integers, so it is the same to
    the bit on every backend.  Without a key (prediction) the layer is the identity.

    Parameters
    ----------
    rate : float in [0, 1), a tuple of them, or Scheduled
        Probability that an element is zeroed; a tuple has one for each member.

    Raises
    ------
    ValueError
        If the rate is not in [0, 1): at once, or where a schedule takes it out of it.
    """

    rate: float | tuple[float, ...] | Scheduled
    numbers: ClassVar[tuple[str, ...]] = ("key", "threshold", "scale")
    whole: ClassVar[tuple[str, ...]] = ("key", "threshold")

    def __post_init__(self) -> None:
        rates = self.rate.value if isinstance(self.rate, Scheduled) else self.rate
        for rate in rates if isinstance(rates, tuple) else (rates,):
            _check_rate(rate)

    @property
    def members(self) -> int | None:
        rates = self.rate.value if isinstance(self.rate, Scheduled) else self.rate
        return len(rates) if isinstance(rates, tuple) else None

    def per_step(self, clock: Clock) -> tuple[float | PerMember, ...]:
        """Below which random bits an element is zeroed, and the factor on the others."""
        rates = at(self.rate, clock)
        if not isinstance(rates, tuple):
            return _threshold(rates), 1.0 / (1.0 - rates)
        return (
            PerMember([_threshold(rate) for rate in rates], ndim=3),
            PerMember([1.0 / (1.0 - rate) for rate in rates], ndim=3),
        )

    def forward(
        self,
        p: Params,
        x: Array,
        xp: Namespace,
        key: Any = None,
        threshold: Any = None,
        scale: Any = None,
    ) -> tuple[Array, Any]:
        if key is None:
            return x, None
        keep = random_bits(x, key, xp) >= threshold
        mask = xp.astype(keep, x.dtype)
        mask *= scale
        return x * mask, mask

    def backward(self, p: Params, mask: Any, dy: Array, xp: Namespace) -> Array:
        return dy if mask is None else dy * mask


def _threshold(rate: float) -> int:
    return min(round(_check_rate(rate) * 2**31), 2**31 - 1)


def _check_members(members: int | None) -> None:
    whole = isinstance(members, Integral) and not isinstance(members, bool)
    if members is not None and not (whole and members >= 1):
        raise ValueError(f"members must be at least 1, got {members!r}")


def _check_rate(rate: float) -> float:
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"dropout must be in [0, 1), got {rate!r}")
    return rate


def random_bits(x: Array, key: Any, xp: Namespace) -> Array:
    """Uniform integers in [0, 2³¹), int32, in the shape of x: hash(hash(position) ⊕ key).

    The inner hash keeps two keys from merely permuting each other's values.
    """
    position = xp.arange(size(x), dtype=xp.int32, device=device(x))
    bits = _hash_int32(_hash_int32(position) ^ key) & 0x7FFFFFFF
    return xp.reshape(bits, x.shape)


def _hash_int32(h: Array) -> Array:
    # C. Wellons' "lowbias32" constants.  A right shift of a signed integer copies
    # the sign; the mask makes it logical.  The products wrap.
    h = (h ^ ((h >> 16) & 0xFFFF)) * 0x7FEB352D
    h = (h ^ ((h >> 15) & 0x1FFFF)) * (0x846CA68B - 2**32)
    return h ^ ((h >> 16) & 0xFFFF)
