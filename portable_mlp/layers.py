"""Layers: stateless, frozen descriptions with pure methods.

A layer maps a batch to a batch; rows are samples.  In an ensemble, the axis of the members
comes before the rows: a shape (n, d) below also stands for (members, n, d).  In each layer
the derivative stands right under the function it belongs to:

``forward(p, x, xp) -> (y, residual)``
    ``residual`` is whatever the derivative needs.  It is returned, not stored on the layer.
``backward(p, residual, dy, xp) -> dx``
    The gradient of the loss with respect to the input, from the gradient of the output.
``gradients(p, residual, dy, xp) -> dp``
    The gradients of the loss with respect to the parameters ``p``, in their order.

``p`` is the tuple of the layer's parameter arrays, in the order of ``params``.
``backward`` and ``gradients`` are two methods because the first layer needs only the second.
To add a layer, subclass `Layer` and verify it with `portable_mlp.check_layer`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import sqrt
from numbers import Integral
from typing import Any, ClassVar

import numpy as np
from array_api_compat import device, size
from numpy.typing import NDArray

from portable_mlp.functions import sum_rows, transposed
from portable_mlp.initializers import GlorotUniform, Initializer, Normal, Ones
from portable_mlp.members import PerMember
from portable_mlp.schedules import Clock, Scheduled, at
from portable_mlp.typing import Array, Namespace, Params


@dataclass(frozen=True)
class Param:
    """A description of one parameter array of a layer.

    Parameters
    ----------
    name : str
        Name used in messages.
    shape : tuple of int
        Shape of the array, with the members' axis first if there are members.
    init : callable
        Initializer, see `portable_mlp.initializers`.
    fan_in, fan_out : int
        Numbers of inputs and outputs of the unit the parameter belongs to.
    group : str, default="weight"
        Any label.  Parameters with the same label get the same treatment by the penalty and
        the optimizer, see `portable_mlp.groups`.
    members : int, optional
        Number of members of the ensemble, if the first axis of ``shape`` is theirs.
    """

    name: str
    shape: tuple[int, ...]
    init: Initializer
    fan_in: int
    fan_out: int
    group: str = "weight"
    members: int | None = None


class Layer(ABC):
    """Base class of all layers.

    A layer with a fixed number of input or output columns declares it in an attribute
    ``n_in`` or ``n_out``; without them any width passes through.  A layer for the members
    of an ensemble declares their number in an attribute ``members``.

    Attributes
    ----------
    params : tuple of Param
        The layer's parameters; empty by default.
    numbers : tuple of str
        Names of keyword arguments of ``forward`` that training passes in each step.
        Prediction omits them, so their defaults define prediction.  "key" is an int that
        is drawn anew for each step and seeds the layer's noise; `per_step` computes the
        others.
    whole : tuple of str
        Those of ``numbers`` that are ints; the others are floats.
    """

    numbers: ClassVar[tuple[str, ...]] = ()
    whole: ClassVar[tuple[str, ...]] = ("key",)

    @property
    def params(self) -> tuple[Param, ...]:
        return ()

    def per_step(self, clock: Clock) -> tuple[float | PerMember, ...]:
        """Return the numbers of a step, in the order of ``numbers`` without "key".

        Each is a number or a `members.PerMember`.  By default it is the attribute of the same
        name, which may be `schedules.Scheduled`.  The numbers are computed on the host in
        float64.  They may change from step to step without a new compilation.

        Parameters
        ----------
        clock : Clock
            Position of training before the step.
        """
        return tuple(at(getattr(self, name), clock) for name in self.numbers if name != "key")

    def fitted_init(
        self, p: list[NDArray[np.float64]], x: NDArray[np.float64], rng: np.random.RandomState
    ) -> list[NDArray[np.float64]]:
        """Return initial parameters that suit the rows that the layer will see; ``p`` by default.

        `Network.init` calls this if it is given rows.

        Parameters
        ----------
        p : list of ndarray
            Initial values from the parameters' initializers.
        x : ndarray (n, n_in)
            The layer's input for some training rows, with these initial parameters before it.
        rng : RandomState
        """
        return p

    @abstractmethod
    def forward(self, p: Params, x: Array, xp: Namespace) -> tuple[Array, Any]:
        """Map x (n, n_in) to y (n, n_out); return y and what the derivative needs."""

    @abstractmethod
    def backward(self, p: Params, residual: Any, dy: Array, xp: Namespace) -> Array:
        """Map dy (n, n_out) to dx (n, n_in)."""

    def gradients(self, p: Params, residual: Any, dy: Array, xp: Namespace) -> tuple[Array, ...]:
        """Map dy (n, n_out) to the gradients of the parameters, each of its parameter's shape."""
        return ()


@dataclass(frozen=True)
class Linear(Layer):
    """Linear layer, z = x W + b.

    Parameters
    ----------
    n_in, n_out : int
        Widths of input and output, at least 1; W is (n_in, n_out), b is (n_out,).
    weight_init, bias_init : callable, default=GlorotUniform()
        Initializers, see `portable_mlp.initializers`.
    members : int, optional
        Number of members of an ensemble.  W is then (members, n_in, n_out) and b is
        (members, 1, n_out).

    Raises
    ------
    ValueError
        If a width or the number of members is below 1.
    """

    n_in: int
    n_out: int
    weight_init: Initializer = GlorotUniform()
    bias_init: Initializer = GlorotUniform()
    members: int | None = None

    def __post_init__(self) -> None:
        check_sizes(self, self.n_in, self.n_out)

    @property
    def params(self) -> tuple[Param, ...]:
        fans = (self.n_in, self.n_out)
        weight, bias = with_members(self.members, fans, (self.n_out,))
        return (
            Param("weight", weight, self.weight_init, *fans, members=self.members),
            Param("bias", bias, self.bias_init, *fans, group="bias", members=self.members),
        )

    def forward(self, p: Params, x: Array, xp: Namespace) -> tuple[Array, Array]:
        """Return z = x W + b, (n, n_in) -> (n, n_out), and x."""
        w, b = p
        z = x @ w  # the operator, since xp.matmul does not take sparse rows
        z += b
        return z, x

    def backward(self, p: Params, x: Array, dz: Array, xp: Namespace) -> Array:
        """Return dx = dz Wᵀ, (n, n_out) -> (n, n_in)."""
        w, _ = p
        return xp.matmul(dz, transposed(w))

    def gradients(self, p: Params, x: Array, dz: Array, xp: Namespace) -> tuple[Array, Array]:
        """Return dW = xᵀ dz, (n_in, n_out), and db = Σₙ dz, (n_out,)."""
        # The reshape gives db its axis of length 1 where b is (members, 1, n_out)
        return transposed(x) @ dz, xp.reshape(sum_rows(dz, xp), p[1].shape)


@dataclass(frozen=True)
class NTKLinear(Layer):
    """Linear layer in the neural-tangent parametrisation, z = x W / √n_in + b.

    With W ~ N(0, 1), all weights have the same size, whatever the width, and so does their
    suitable learning rate (Jacot et al., 2018).

    The initial values suit the data, if there are rows.  Each column of W is divided by the
    standard deviation of its unit, so that z has variance 1.  Each unit's bias is −Σ eᵢ zᵢ over
    five random rows i, with random weights e that sum to one, so that the unit's kink is among
    the rows.  These are the initial values "std" and "he+5" of RealMLP (Holzmüller et al.,
    2024, appendix A).

    Parameters
    ----------
    n_in, n_out : int
        Widths of input and output, at least 1; W is (n_in, n_out), b is (n_out,).
    members : int, optional
        Number of members of an ensemble.  W is then (members, n_in, n_out) and b is
        (members, 1, n_out).

    Raises
    ------
    ValueError
        If a width or the number of members is below 1.
    """

    n_in: int
    n_out: int
    members: int | None = None

    def __post_init__(self) -> None:
        check_sizes(self, self.n_in, self.n_out)

    @property
    def params(self) -> tuple[Param, ...]:
        fans = (self.n_in, self.n_out)
        shapes = with_members(self.members, fans, (self.n_out,))
        return tuple(
            Param(name, shape, Normal(), *fans, group=name, members=self.members)
            for name, shape in zip(("weight", "bias"), shapes, strict=True)
        )

    def fitted_init(
        self, p: list[NDArray[np.float64]], x: NDArray[np.float64], rng: np.random.RandomState
    ) -> list[NDArray[np.float64]]:
        w, b = p
        z = x @ w / sqrt(self.n_in)  # (n, n_out), or (members, n, n_out)
        std = np.std(z, axis=-2, keepdims=True)
        std = np.where(std > 1e-6, std, 1.0)  # a constant input has none
        w, z = w / std, z / std
        n, lead = 5, z.shape[:-2]
        rows = rng.randint(z.shape[-2], size=(*lead, n, self.n_out))
        e = rng.exponential(size=rows.shape)
        e /= np.sum(e, axis=-2, keepdims=True)
        kinks = np.sum(e * np.take_along_axis(z, rows, axis=-2), axis=-2)
        return [w, -kinks.reshape(b.shape)]

    def forward(self, p: Params, x: Array, xp: Namespace) -> tuple[Array, tuple[Array, Array]]:
        """Return z = x W / √n_in + b, and what the gradients need: x and W / √n_in."""
        w, b = p
        w = w * (1.0 / sqrt(self.n_in))
        z = xp.matmul(x, w)
        z += b
        return z, (x, w)

    def backward(self, p: Params, residual: tuple[Array, Array], dz: Array, xp: Namespace) -> Array:
        """Return dx = dz Wᵀ / √n_in."""
        _, w = residual
        return xp.matmul(dz, transposed(w))

    def gradients(
        self, p: Params, residual: tuple[Array, Array], dz: Array, xp: Namespace
    ) -> tuple[Array, Array]:
        """Return dW = xᵀ dz / √n_in and db = Σₙ dz."""
        x, _ = residual
        dw = xp.matmul(transposed(x), dz) * (1.0 / sqrt(self.n_in))
        return dw, xp.reshape(sum_rows(dz, xp), p[1].shape)


@dataclass(frozen=True)
class Scale(Layer):
    """Scale, y = s ⊙ x, a factor for each column; it learns which columns matter.

    Parameters
    ----------
    n_in : int
        Number of columns; s is (n_in,).
    members : int, optional
        Number of members of an ensemble; s is then (members, 1, n_in).
    """

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
        return (Param("scale", shape, Ones(), 1, 1, "scale", self.members),)

    def forward(self, p: Params, x: Array, xp: Namespace) -> tuple[Array, Array]:
        (s,) = p
        return s * x, x

    def backward(self, p: Params, x: Array, dy: Array, xp: Namespace) -> Array:
        """Return dx = s ⊙ dy."""
        (s,) = p
        return s * dy

    def gradients(self, p: Params, x: Array, dy: Array, xp: Namespace) -> tuple[Array]:
        """Return ds = Σₙ x ⊙ dy."""
        return (xp.reshape(sum_rows(x * dy, xp), p[0].shape),)


@dataclass(frozen=True)
class Repeat(Layer):
    """Repetition of the rows for each member of an ensemble, (n, d) -> (members, n, d).

    Input that already has separate rows for each member, (members, n, d), passes through.

    Parameters
    ----------
    members : int
        Number of members, at least 1.
    """

    members: int

    def __post_init__(self) -> None:
        _check_members(self.members)

    def forward(self, p: Params, x: Array, xp: Namespace) -> tuple[Array, bool]:
        own = x.ndim == 3
        return (x if own else xp.broadcast_to(x, (self.members, *x.shape))), own

    def backward(self, p: Params, own: bool, dy: Array, xp: Namespace) -> Array:
        """Return dx = Σ dy over the members, or dy itself for separate rows."""
        return dy if own else xp.sum(dy, axis=0)


@dataclass(frozen=True)
class Dropout(Layer):
    """Inverted dropout, y = x · mask / (1 − rate) (Srivastava et al., 2014, sec. 10).

    The mask is a hash of position and key in 32-bit integers, so it is the same to
    the bit on every backend.  Without a key (prediction) the layer is the identity.

    Parameters
    ----------
    rate : float in [0, 1), a tuple of them, or Scheduled
        Probability that an element is zeroed; a tuple has one for each member.

    Raises
    ------
    ValueError
        If the rate is not in [0, 1): at construction, or during training if a schedule
        moves it out of the range.
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
        """Return the threshold of the random bits, and the factor 1 / (1 − rate).

        An element is zeroed if its random bits are below the threshold.
        """
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
    # The bits are in [0, 2³¹).  A rate just below 1 rounds to 2³¹, which int32 cannot hold
    return min(round(_check_rate(rate) * 2**31), 2**31 - 1)


def with_members(members: int | None, *shapes: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Return shapes with the members' axis first; a vector gets an axis of rows behind it."""
    if members is None:
        return list(shapes)
    return [(members, 1, *s) if len(s) == 1 else (members, *s) for s in shapes]


def check_sizes(layer: Any, *widths: int) -> None:
    """Raise a ValueError if a width or the number of members of a layer is below 1."""
    if min(widths) < 1:
        raise ValueError(f"a layer's widths must be at least 1, got {layer}")
    _check_members(layer.members)


def _check_members(members: int | None) -> None:
    whole = isinstance(members, Integral) and not isinstance(members, bool)
    if members is not None and not (whole and members >= 1):
        raise ValueError(f"members must be at least 1, got {members!r}")


def _check_rate(rate: float) -> float:
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"dropout must be in [0, 1), got {rate!r}")
    return rate


def random_bits(x: Array, key: Any, xp: Namespace) -> Array:
    """Return uniform int32 integers in [0, 2³¹) of the shape of x: hash(hash(position) ⊕ key).

    Without the inner hash, two keys could give the same values in another order.
    """
    position = xp.arange(size(x), dtype=xp.int32, device=device(x))
    bits = _hash_int32(_hash_int32(position) ^ key) & 0x7FFFFFFF
    return xp.reshape(bits, x.shape)


def _hash_int32(h: Array) -> Array:
    # The constants are those of C. Wellons' "lowbias32".  A right shift of a signed
    # integer copies the sign bit; the mask makes the shift logical.  The products wrap.
    h = (h ^ ((h >> 16) & 0xFFFF)) * 0x7FEB352D
    h = (h ^ ((h >> 15) & 0x1FFFF)) * (0x846CA68B - 2**32)  # as a signed 32-bit integer
    return h ^ ((h >> 16) & 0xFFFF)
