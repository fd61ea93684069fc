"""Networks: tuples of layers, and backpropagation through them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import array_api_compat.numpy as numpy_namespace
import numpy as np
from numpy.typing import NDArray

from portable_mlp.activations import get_activation
from portable_mlp.initializers import GlorotUniform, Initializer
from portable_mlp.layers import Dropout, Layer, Linear, Param, Repeat
from portable_mlp.members import PerMember
from portable_mlp.schedules import Clock, Scheduled
from portable_mlp.typing import Array, Namespace, Params

Numbers = tuple[tuple[Any, ...], ...]


@dataclass(frozen=True)
class Network:
    """Layers applied one after the other; the output of the last layer are the logits.

    Parameters
    ----------
    layers : tuple of Layer

    Raises
    ------
    ValueError
        If the width of a layer's input differs from that of the output before it, or
        layers or parameters disagree on the number of members.
    TypeError
        If a layer cannot be hashed, or uses the outdated attribute ``random = True``.
    """

    layers: tuple[Layer, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        width: int | None = None
        for i, layer in enumerate(self.layers):
            try:
                hash(layer)  # caches of compiled steps use the network as a key
            except TypeError as error:
                raise TypeError(
                    f"layer {i}, {layer}: its fields have to be hashable ({error})"
                ) from error
            if getattr(layer, "random", False):
                raise TypeError(f"layer {i}, {layer}: a random layer says numbers = ('key',)")
            n_in = getattr(layer, "n_in", None) or width
            if width not in (None, n_in):
                raise ValueError(
                    f"layer {i}, {layer}, takes {n_in} columns,"
                    f" but the layers before it give {width}"
                )
            width = getattr(layer, "n_out", None) or n_in
        said = [getattr(layer, "members", None) for layer in self.layers]
        counts = {n for n in said if n is not None}
        # None counts too: either all parameters have members, or none
        counts |= {param.members for param in self.params}
        if len(counts) > 1:
            raise ValueError(f"not all layers are for as many members: {self.layers}")

    @cached_property
    def members(self) -> int | None:
        """The number of members with separate parameters; None if this is not an ensemble."""
        counts = (getattr(layer, "members", None) for layer in self.layers)
        return next((n for n in counts if n is not None), None)

    @cached_property
    def params(self) -> tuple[Param, ...]:
        """The parameters of all layers, in order."""
        return tuple(param for layer in self.layers for param in layer.params)

    @property
    def n_in(self) -> int | None:
        """The number of input columns; None if any number is accepted."""
        return next(filter(None, (getattr(layer, "n_in", None) for layer in self.layers)), None)

    @property
    def n_out(self) -> int | None:
        """The number of output columns; None if it equals the number of input columns."""
        last_first = reversed(self.layers)
        return next(filter(None, (getattr(layer, "n_out", None) for layer in last_first)), None)

    @property
    def n_linear(self) -> int:
        """The number of linear layers."""
        return sum(isinstance(layer, Linear) for layer in self.layers)

    def init(
        self, rng: np.random.RandomState, x: NDArray[np.float64] | None = None
    ) -> list[NDArray[np.float64]]:
        """Draw initial parameters on the host, in the order of ``params``, in float64.

        Parameters
        ----------
        rng : RandomState
        x : ndarray (n, n_in) or (members, n, n_in), optional
            Some training rows, to which layers may fit their parameters, one layer after the
            other: see `Layer.fitted_init`.
        """
        drawn: list[NDArray[np.float64]] = []
        for layer in self.layers:
            own = [p.init(rng, p.shape, p.fan_in, p.fan_out) for p in layer.params]
            if x is not None:
                own = layer.fitted_init(own, x, rng)
                x, _ = layer.forward(own, x, numpy_namespace)
            drawn += own
        return drawn

    @cached_property
    def n_random(self) -> int:
        """The number of layers that draw noise, which is the number of keys of a step."""
        return sum("key" in layer.numbers for layer in self.layers)

    @cached_property
    def _take_numbers(self) -> tuple[Layer, ...]:
        return tuple(layer for layer in self.layers if layer.numbers)

    def per_step(self, clock: Clock, keys: Sequence[int]) -> Numbers:
        """Return the numbers of a step, a tuple for each layer that takes numbers, in order.

        Parameters
        ----------
        clock : Clock
            Position of training before the step.
        keys : sequence of int
            Seeds, one for each of the ``n_random`` layers that draw noise.

        Raises
        ------
        ValueError
            If a layer returns more or fewer numbers than it names.
        """
        drawn = iter(keys)
        found = []
        for layer in self._take_numbers:
            others = [name for name in layer.numbers if name != "key"]
            values: dict[str, Any] = dict(zip(others, layer.per_step(clock), strict=True))
            if "key" in layer.numbers:
                values["key"] = next(drawn)
            found.append(tuple(
                value if isinstance(value, PerMember)
                else int(value) if name in layer.whole else float(value)
                for name, value in ((name, values[name]) for name in layer.numbers)
            ))  # fmt: skip
        return tuple(found)

    @cached_property
    def _slices(self) -> tuple[slice, ...]:
        ends = accumulate((len(layer.params) for layer in self.layers), initial=0)
        return tuple(slice(start, end) for start, end in pairwise(ends))

    def split(self, params: Params) -> list[Params]:
        """Return the parameters of each layer, given those of all layers in order."""
        return [params[own] for own in self._slices]

    def forward(
        self, params: Params, x: Array, xp: Namespace, numbers: Numbers | None = None
    ) -> tuple[Array, list[Any]]:
        """Return the logits, and what each layer needs for its derivative.

        Parameters
        ----------
        params : list of arrays
            Parameter values, in the order of ``Network.params``.
        x : array (n, n_in)
        xp : namespace of the arrays
        numbers : tuple of tuple, optional
            Numbers of the step, from `per_step`.  Without them, layers behave as in
            prediction.

        Returns
        -------
        z : array (n, n_out), or (members, n, n_out)
        residuals : list, one entry for each layer
        """
        given = iter(numbers or ())
        residuals = []
        for layer, own in zip(self.layers, self._slices, strict=True):
            named = (
                zip(layer.numbers, next(given, ()), strict=bool(numbers)) if layer.numbers else ()
            )
            x, residual = layer.forward(params[own], x, xp, **dict(named))
            residuals.append(residual)
        return x, residuals

    def backward(
        self, params: Params, residuals: list[Any], dz: Array, xp: Namespace
    ) -> list[Array]:
        """Return the gradients of all parameters, given the gradient of the logits.

        The chain rule is applied from the last layer to the first that has parameters.
        Layers before that one, and its own input, need no gradient.

        Parameters
        ----------
        params : list of arrays
        residuals : list
            Second result of `forward`.
        dz : array (n, n_out), or (members, n, n_out)
        xp : namespace of the arrays

        Returns
        -------
        list of arrays
            Gradients, in the order and shapes of the parameters.
        """
        first = next((i for i, own in enumerate(self._slices) if own.stop), len(self.layers))
        grads: list[Array] = []
        for i in reversed(range(first, len(self.layers))):
            layer, p = self.layers[i], params[self._slices[i]]
            grads[:0] = layer.gradients(p, residuals[i], dz, xp)
            if i > first:
                dz = layer.backward(p, residuals[i], dz, xp)
        return grads

    def __call__(self, params: Params, x: Array, xp: Namespace) -> Array:
        """Return the logits without keeping residuals, for prediction."""
        for layer, own in zip(self.layers, self._slices, strict=True):
            x, _ = layer.forward(params[own], x, xp)
        return x


def mlp(
    sizes: Sequence[int],
    activation: str | Layer | Sequence[str | Layer] = "relu",
    *,
    dropout: float | tuple[float, ...] | Scheduled = 0.0,
    weight_init: Initializer = GlorotUniform(),
    bias_init: Initializer = GlorotUniform(),
    members: int | None = None,
) -> Network:
    """Return a multilayer perceptron: linear layers with activations between them.

    Parameters
    ----------
    sizes : sequence of int
        Numbers of columns from the input to the logits.  For example, ``[4, 16, 1]`` has
        one hidden layer of 16 units.
    activation : str, Layer, or a sequence of one for each hidden layer, default="relu"
        Activation after each hidden linear layer; the names are the keys of
        `portable_mlp.activations.ACTIVATIONS`.
    dropout : float in [0, 1), a tuple of them, or Scheduled, default=0
        Dropout rate after each hidden activation; a tuple has one for each member.
    weight_init, bias_init : callable, default=GlorotUniform()
        Initializers, see `portable_mlp.initializers`.
    members : int, optional
        Number of members of an ensemble: networks of this form that are evaluated
        together, each with its own parameters.

    Raises
    ------
    ValueError
        If an activation is unknown, or the number of activations differs from the number
        of hidden layers.
    """
    hidden = len(sizes) - 2
    single = isinstance(activation, str) or not isinstance(activation, Iterable)
    activations = [activation] * hidden if single else list(activation)  # type: ignore[arg-type]
    if len(activations) != hidden:
        raise ValueError(
            f"activation: expected one for each of the {hidden} hidden layers,"
            f" got {len(activations)}"
        )
    layers: list[Layer] = [] if members is None else [Repeat(members)]
    for i, (n_in, n_out) in enumerate(pairwise(sizes)):
        layers.append(Linear(n_in, n_out, weight_init, bias_init, members))
        if i < hidden:
            layers.append(get_activation(activations[i]))
            if dropout:
                layers.append(Dropout(dropout))
    return Network(tuple(layers))
