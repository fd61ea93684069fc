"""Architectures: which network to build for a number of columns and a number of outputs.

An estimator asks its architecture for a network once it knows both numbers.  A custom
architecture is a function ``(n_in, n_out) -> Network`` or a subclass of `Architecture`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

from portable_mlp.activations import Parametric, get_activation
from portable_mlp.embeddings import PeriodicEmbedding
from portable_mlp.initializers import GlorotUniform
from portable_mlp.layers import Dropout, Layer, NTKLinear, Repeat, Scale
from portable_mlp.network import Network, mlp
from portable_mlp.schedules import Scheduled

BuildNetwork = Callable[[int, int], Network]


class Architecture(ABC):
    """Base class of the architectures that model files can hold."""

    @abstractmethod
    def __call__(self, n_in: int, n_out: int) -> Network:
        """Build the network for rows of ``n_in`` columns and ``n_out`` logits."""


@dataclass(frozen=True)
class MLP(Architecture):
    """Linear layers with activations between them, with scikit-learn's initial values.

    Parameters
    ----------
    hidden_layer_sizes : int or sequence of int, default=(100,)
        Numbers of units of the hidden layers.
    activation : str, Layer, or a sequence of one for each hidden layer, default="relu"
        Activation after each hidden linear layer, see `portable_mlp.network.mlp`.
    dropout : float in [0, 1), a tuple of them, or Scheduled, default=0
        Dropout rate after each hidden activation; a tuple has one for each member.
    members : int, optional
        Number of members of an ensemble.  They are trained together but independently of
        each other; the prediction is the mean of theirs (`Loss.pool`).
    """

    hidden_layer_sizes: int | tuple[int, ...] = (100,)
    activation: str | Layer | tuple[str | Layer, ...] = "relu"
    dropout: float | tuple[float, ...] | Scheduled = 0.0
    members: int | None = None

    def __post_init__(self) -> None:
        sizes = self.hidden_layer_sizes
        given = {"hidden_layer_sizes": (sizes,) if isinstance(sizes, int) else tuple(sizes)}
        for name in ("activation", "dropout"):  # tuples, so that the architecture is hashable
            value = getattr(self, name)
            given[name] = tuple(value) if isinstance(value, list) else value
        for name, value in given.items():
            object.__setattr__(self, name, value)

    def __call__(self, n_in: int, n_out: int) -> Network:
        try:
            return _shared(self, n_in, n_out)
        except TypeError:  # a layer that cannot be hashed: building raises an error that names it
            return self._build(n_in, n_out)

    def _build(self, n_in: int, n_out: int) -> Network:
        given = self.activation
        several = isinstance(given, Iterable) and not isinstance(given, str)
        each: Iterable[Any] = given if several else [given]  # type: ignore[assignment]
        logistic = all(isinstance(a, str) and a == "logistic" for a in each)
        init = GlorotUniform(2.0 if logistic else 6.0)  # scikit-learn's factors
        return mlp(
            [n_in, *cast("tuple[int, ...]", self.hidden_layer_sizes), n_out],
            given,
            dropout=self.dropout,
            weight_init=init,
            bias_init=init,
            members=self.members,
        )


@lru_cache(maxsize=64)
def _shared(architecture: MLP, n_in: int, n_out: int) -> Network:
    # A network is immutable, so fits with the same settings can share one
    return architecture._build(n_in, n_out)


@dataclass(frozen=True)
class TabularMLP(Architecture):
    """RealMLP's network for tables, for the members of an ensemble (Holzmüller et al., 2024).

    It is a periodic embedding of the first columns, a scale, and linear layers in the
    neural-tangent parametrisation with parametric activations between them.

    Parameters
    ----------
    n_embedded : int
        Number of columns, from the first, that are embedded.
    members : int
    hidden_layer_sizes : tuple of int, default=(64, 64, 64)
    activation : str or Layer, default="selu"
        The function of the parametric activations.
    dropout : float in [0, 1), a tuple of them, or Scheduled, default=0
        Dropout rate after each hidden activation; a tuple has one for each member.
    sigma : float, or a tuple of them, default=0.1
        Standard deviation of the embedding's initial frequencies, for each member.
    n_frequencies : int, default=16
        Number of cosines of an embedded column.
    """

    n_embedded: int
    members: int
    hidden_layer_sizes: tuple[int, ...] = (64, 64, 64)
    activation: str | Layer = "selu"
    dropout: float | tuple[float, ...] | Scheduled = 0.0
    sigma: float | tuple[float, ...] = 0.1
    n_frequencies: int = 16

    def __call__(self, n_in: int, n_out: int) -> Network:
        k, width = self.members, n_in
        layers: list[Layer] = [Repeat(k)]
        if self.n_embedded:
            embedding = PeriodicEmbedding(
                n_in, self.n_embedded, self.n_frequencies, sigma=self.sigma, members=k
            )
            layers.append(embedding)
            width = embedding.n_out
        layers.append(Scale(width, k))
        activation = get_activation(self.activation)
        for n in self.hidden_layer_sizes:
            layers += [NTKLinear(width, n, k), Parametric(activation, n, k)]
            if self.dropout:
                layers.append(Dropout(self.dropout))
            width = n
        return Network((*layers, NTKLinear(width, n_out, k)))


@dataclass(frozen=True)
class Fixed(Architecture):
    """An architecture that always builds the same network.

    Model files store it in place of a function.

    Parameters
    ----------
    layers : tuple of Layer
        Layers of the network.
    """

    layers: tuple[Layer, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))

    def __call__(self, n_in: int, n_out: int) -> Network:
        return Network(self.layers)
