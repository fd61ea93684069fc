"""Embeddings of numbers: layers that turn a column into several, as functions of its value.

A linear layer sees a column x only as a multiple of x.  After an embedding it also sees waves
of x, so that the network can follow a target that goes up and down along a column.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import pi, sqrt
from typing import Any

from portable_mlp.functions import cosine_of_turns, sine_of_turns, sum_rows, transposed
from portable_mlp.initializers import Initializer, Normal, Ones, Uniform, Zeros
from portable_mlp.layers import Layer, Param, check_sizes, with_members
from portable_mlp.typing import Array, Namespace, Params


@dataclass(frozen=True)
class PeriodicEmbedding(Layer):
    """Periodic embedding of numbers beside the numbers themselves: "PBLD" of RealMLP.

    Each of the first columns x becomes z = cos(2π x w + b) V + c; the output is [x, z].  The
    letters stand for periodic, bias, linear, DenseNet (Holzmüller et al., 2024, section 3;
    periodic activations of numbers are from Gorishniy et al., 2022).

    Parameters
    ----------
    n_in : int
        Number of columns.
    n_embedded : int
        Number of columns, from the first, that are embedded.
    n_frequencies : int, default=16
        Number of cosines of a column; w and b are (n_embedded, 1, n_frequencies).
    width : int, default=3
        Number of columns of z for each column of x; V is (n_embedded, n_frequencies, width)
        and c is (n_embedded, 1, width).
    sigma : float, or a tuple of them, default=0.1
        Standard deviation of the initial frequencies w; a tuple has one for each member.
    members : int, optional
        Number of members of an ensemble, whose axis is then the first of all parameters.
    """

    n_in: int
    n_embedded: int
    n_frequencies: int = 16
    width: int = 3
    sigma: float | tuple[float, ...] = 0.1
    members: int | None = None

    def __post_init__(self) -> None:
        check_sizes(self, self.n_in, self.n_frequencies, self.width)
        if not 1 <= self.n_embedded <= self.n_in:
            raise ValueError(f"n_embedded must be from 1 to the number of columns, got {self}")

    @property
    def n_out(self) -> int:
        return self.n_in + self.n_embedded * self.width

    @property
    def params(self) -> tuple[Param, ...]:
        d, m, k = self.n_embedded, self.n_frequencies, self.width
        small = Uniform(1.0 / sqrt(m))
        inits: list[Initializer] = [Normal(self.sigma), Uniform(pi), small, small]
        shapes = with_members(self.members, (d, 1, m), (d, 1, m), (d, m, k), (d, 1, k))
        names = ("frequency", "phase", "weight", "bias")
        fans = ((1, m), (1, m), (m, k), (m, k))
        return tuple(
            Param(name, shape, init, *fan, "embedding", self.members)
            for name, shape, init, fan in zip(names, shapes, inits, fans, strict=True)
        )

    def forward(self, p: Params, x: Array, xp: Namespace) -> tuple[Array, Any]:
        # One matrix for each column, of each member: (columns, n, ·), columns = members · d
        w, b, v, c = (_stacked(a, xp) for a in p)
        d = self.n_embedded
        column = transposed(x[..., :d])  # (d, n), or (members, d, n)
        column = xp.reshape(column, (-1, x.shape[-2], 1))
        t = column * w + b * (0.5 / pi)  # u in turns, (columns, n, n_frequencies)
        cosine = cosine_of_turns(t, xp)
        z = xp.matmul(cosine, v)
        z += c
        return xp.concat([x, self._side_by_side(z, x, xp)], axis=-1), (column, t, cosine)

    def backward(self, p: Params, residual: Any, dy: Array, xp: Namespace) -> Array:
        """Return dx = dy_x + 2π Σₘ du w for the embedded columns, du = −sin u ⊙ dz Vᵀ."""
        w = _stacked(p[0], xp)
        _, du = self._inner(p, residual, dy, xp)
        d, n_in = self.n_embedded, self.n_in
        through = (2.0 * pi) * xp.sum(du * w, axis=-1)  # (columns, n)
        lead = dy.shape[:-2]
        through = transposed(xp.reshape(through, (*lead, d, dy.shape[-2])))
        return xp.concat([dy[..., :d] + through, dy[..., d:n_in]], axis=-1)

    def gradients(self, p: Params, residual: Any, dy: Array, xp: Namespace) -> tuple[Array, ...]:
        """Return dw = 2π Σₙ x du, db = Σₙ du, dV = cosᵀ dz and dc = Σₙ dz."""
        column, _, cosine = residual
        dz, du = self._inner(p, residual, dy, xp)
        found = (
            (2.0 * pi) * xp.matmul(transposed(column), du),
            sum_rows(du, xp),
            xp.matmul(transposed(cosine), dz),
            sum_rows(dz, xp),
        )
        return tuple(xp.reshape(g, a.shape) for g, a in zip(found, p, strict=True))

    def _inner(self, p: Params, residual: Any, dy: Array, xp: Namespace) -> tuple[Array, Array]:
        """Return dz (columns, n, width), and du (columns, n, n_frequencies)."""
        _, t, _ = residual
        n, d, k = dy.shape[-2], self.n_embedded, self.width
        lead = dy.shape[:-2]
        dz = xp.reshape(dy[..., self.n_in :], (*lead, n, d, k))
        dz = xp.reshape(_swapped(dz, xp), (-1, n, k))
        du = xp.matmul(dz, transposed(_stacked(p[2], xp)))
        du *= -sine_of_turns(t, xp)
        return dz, du

    def _side_by_side(self, z: Array, x: Array, xp: Namespace) -> Array:
        """Return the columns' embeddings in rows, (columns, n, width) -> (..., n, d · width)."""
        n, d, k = x.shape[-2], self.n_embedded, self.width
        z = _swapped(xp.reshape(z, (*x.shape[:-2], d, n, k)), xp)
        return xp.reshape(z, (*x.shape[:-1], d * k))


@dataclass(frozen=True)
class CosineEmbedding(Layer):
    """Cosine embedding of numbers, y = a + s ⊙ [x, cos(2π (x w + b))] for each column x.

    This is the embedding of TabPack (Gorishniy et al., 2026).

    Parameters
    ----------
    n_in : int
        Number of columns.
    n_frequencies : int, default=11
        Number of cosines of a column; w and b are (n_in, n_frequencies), a and s are
        (n_in, 1 + n_frequencies).
    sigma : float, or a tuple of them, default=0.1
        Standard deviation of the initial frequencies w; a tuple has one for each member.
    members : int, optional
        Number of members of an ensemble, whose axis is then the first of all parameters.
    """

    n_in: int
    n_frequencies: int = 11
    sigma: float | tuple[float, ...] = 0.1
    members: int | None = None

    def __post_init__(self) -> None:
        check_sizes(self, self.n_in, self.n_frequencies)

    @property
    def n_out(self) -> int:
        return self.n_in * (1 + self.n_frequencies)

    @property
    def params(self) -> tuple[Param, ...]:
        d, m = self.n_in, self.n_frequencies
        shapes = with_members(self.members, (1, d, m), (1, d, m), (1, d, m + 1), (1, d, m + 1))
        inits: list[Initializer] = [Normal(self.sigma), Uniform(0.5), Ones(), Zeros()]
        names = ("frequency", "phase", "scale", "shift")
        return tuple(
            Param(name, shape, init, 1, m, "embedding", self.members)
            for name, shape, init in zip(names, shapes, inits, strict=True)
        )

    def forward(self, p: Params, x: Array, xp: Namespace) -> tuple[Array, Any]:
        w, b, s, a = p
        x = x[..., None]  # (..., n, d, 1)
        t = x * w + b
        c = xp.concat([x, cosine_of_turns(t, xp)], axis=-1)
        y = a + s * c
        return xp.reshape(y, (*y.shape[:-2], self.n_out)), (x, t, c)

    def _inner(self, p: Params, residual: Any, dy: Array, xp: Namespace) -> tuple[Array, ...]:
        """Return dy and dc (..., n, d, 1 + m), and du (..., n, d, m)."""
        _, t, c = residual
        dy = xp.reshape(dy, c.shape)
        dc = dy * p[2]
        return dy, dc, (-2.0 * pi) * sine_of_turns(t, xp) * dc[..., 1:]

    def backward(self, p: Params, residual: Any, dy: Array, xp: Namespace) -> Array:
        """Return dx = dc_x + Σₘ du w, with dc = s ⊙ dy and du = −2π sin u ⊙ dc."""
        _, dc, du = self._inner(p, residual, dy, xp)
        return dc[..., 0] + xp.sum(du * p[0], axis=-1)

    def gradients(self, p: Params, residual: Any, dy: Array, xp: Namespace) -> tuple[Array, ...]:
        """Return dw = Σₙ x du, db = Σₙ du, ds = Σₙ dy ⊙ c and da = Σₙ dy."""
        x, _, c = residual
        dy, _, du = self._inner(p, residual, dy, xp)
        return tuple(xp.sum(g, axis=-3, keepdims=True) for g in (x * du, du, dy * c, dy))


def _stacked(a: Array, xp: Namespace) -> Array:
    """Return all matrices of an array in one stack, (..., n, m) -> (stack, n, m)."""
    return xp.reshape(a, (-1, *a.shape[-2:]))


def _swapped(a: Array, xp: Namespace) -> Array:
    """Return the array with its last axes but one swapped, (..., n, d, k) -> (..., d, n, k)."""
    first = range(a.ndim - 3)
    return xp.permute_dims(a, (*first, a.ndim - 2, a.ndim - 3, a.ndim - 1))
