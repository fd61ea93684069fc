"""Initial values of parameters, drawn on the host.

Every initializer is called as ``init(rng, shape, fan_in, fan_out)`` and returns a
float64 NumPy array.  The caller casts it and moves it to the backend, so one seed
starts the same run on every backend.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Initializer: TypeAlias = Callable[
    [np.random.RandomState, tuple[int, ...], int, int], NDArray[np.float64]
]


@dataclass(frozen=True)
class GlorotUniform:
    """Uniform initial values, U(−a, a) with a = √(factor / (fan_in + fan_out)).

    Parameters
    ----------
    factor : float, default=6.0
        The value 6 preserves the variance through activations that are linear around
        zero (Glorot and Bengio, 2010, eq. 16).  scikit-learn uses 2 for the logistic
        sigmoid.
    """

    factor: float = 6.0

    def __call__(
        self, rng: np.random.RandomState, shape: tuple[int, ...], fan_in: int, fan_out: int
    ) -> NDArray[np.float64]:
        bound = np.sqrt(self.factor / (fan_in + fan_out))
        return rng.uniform(-bound, bound, shape)


@dataclass(frozen=True)
class HeNormal:
    """Normal initial values, N(0, 2 / fan_in).

    They preserve the variance through ReLU layers (He et al., 2015, eq. 10).
    """

    def __call__(
        self, rng: np.random.RandomState, shape: tuple[int, ...], fan_in: int, fan_out: int
    ) -> NDArray[np.float64]:
        return rng.normal(0.0, np.sqrt(2.0 / fan_in), shape)


@dataclass(frozen=True)
class Zeros:
    """Zeros; the random generator is not used."""

    def __call__(
        self, rng: np.random.RandomState, shape: tuple[int, ...], fan_in: int, fan_out: int
    ) -> NDArray[np.float64]:
        return np.zeros(shape)


@dataclass(frozen=True)
class Normal:
    """Normal initial values, N(0, std²), whatever the numbers of inputs and outputs.

    Parameters
    ----------
    std : float >= 0, or a tuple of them, default=1
        Standard deviation; a tuple has one for each member of an ensemble, whose axis is the
        first.
    """

    std: float | tuple[float, ...] = 1.0

    def __call__(
        self, rng: np.random.RandomState, shape: tuple[int, ...], fan_in: int, fan_out: int
    ) -> NDArray[np.float64]:
        std = np.reshape(self.std, (-1, *(1,) * (len(shape) - 1)))
        return std * rng.standard_normal(shape)


@dataclass(frozen=True)
class Uniform:
    """Uniform initial values, U(−bound, bound), whatever the numbers of inputs and outputs.

    Parameters
    ----------
    bound : float > 0
    """

    bound: float

    def __call__(
        self, rng: np.random.RandomState, shape: tuple[int, ...], fan_in: int, fan_out: int
    ) -> NDArray[np.float64]:
        return rng.uniform(-self.bound, self.bound, shape)


@dataclass(frozen=True)
class Ones:
    """Ones; the random generator is not used."""

    def __call__(
        self, rng: np.random.RandomState, shape: tuple[int, ...], fan_in: int, fan_out: int
    ) -> NDArray[np.float64]:
        return np.ones(shape)
