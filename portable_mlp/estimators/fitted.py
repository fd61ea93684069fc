"""Fitted parameters: in the order of the network, and as scikit-learn's users know them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from portable_mlp.layers import Linear
from portable_mlp.network import Network
from portable_mlp.typing import Array

OF_SCIKIT_LEARN = ("coefs_", "intercepts_", "layer_params_")


class View(list[Array]):
    """Some of a list's items; an item that is set here is set there, too.

    Parameters
    ----------
    items : list
    places : list of int
        Which of them.
    """

    def __init__(self, items: list[Array], places: list[int]) -> None:
        super().__init__(items[i] for i in places)
        self._items = items
        self._places = places

    def __setitem__(self, key: Any, value: Any) -> None:
        places = self._places[key]
        if isinstance(key, slice):
            value = list(value)
            pairs = list(zip(places, value, strict=True))  # nothing is set if they do not match
        else:
            pairs = [(places, value)]
        for place, item in pairs:
            self._items[place] = item
        super().__setitem__(key, value)

    def __reduce__(self) -> Any:
        return list, (list(self),)  # a copy is a list of its own


class Shown:
    """An attribute that shows some of the fitted parameters.

    On a model that is not fitted it holds what it is given to begin with, in ``_before``.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, model: Any, owner: type | None = None) -> Any:
        if model is None:
            return self
        if "params_" in vars(model):
            return View(model.params_, places(model.network_, self.name))
        held = vars(model).get("_before", {})
        if self.name not in held:
            raise AttributeError(f"{type(model).__name__} is not fitted: it has no {self.name}")
        return held[self.name]

    def __set__(self, model: Any, arrays: Sequence[Array]) -> None:
        if "params_" not in vars(model):
            vars(model).setdefault("_before", {})[self.name] = arrays
            return
        params = list(model.params_)
        for place, array in zip(places(model.network_, self.name), arrays, strict=True):
            params[place] = array
        model.params_ = params


class Fitted:
    """What a fit leaves, and what `coefs_` and its like show of it.

    Attributes
    ----------
    network_ : Network
        The layers, as they were fitted.
    params_ : list of arrays
        Their parameters, as ``network_.params`` describes them.
    coefs_, intercepts_ : list of arrays
        Of these, weights and biases of the linear layers.
    layer_params_ : list of arrays
        All others.
    """

    network_: Network
    params_: list[Array]
    coefs_ = Shown()
    intercepts_ = Shown()
    layer_params_ = Shown()

    def _adopt(self, network: Network, arrays: Mapping[str, Sequence[Array]]) -> None:
        """Take parameters that are given by the names of `OF_SCIKIT_LEARN`."""
        params: list[Array] = [None] * len(network.params)
        for name in OF_SCIKIT_LEARN:
            for place, array in zip(places(network, name), arrays.get(name, ()), strict=True):
                params[place] = array
        self.network_, self.params_ = network, params

    @property
    def _first_coef(self) -> Array:
        return self.params_[0]

    def _params_for(self, network: Network) -> list[Array]:
        """Return the fitted parameters, if a network has such ones.

        Raises
        ------
        ValueError
            If it has parameters of other shapes, or another number of them.
        """
        if "params_" not in vars(self):
            self._adopt(network, vars(self).pop("_before", {}))
        wanted = [param.shape for param in network.params]
        shapes = [tuple(array.shape) for array in self.params_]
        if wanted != shapes:
            raise ValueError(
                f"continuing needs the same layers: asked for are parameters of shapes {wanted},"
                f" fitted are {shapes}"
            )
        return self.params_


def places(network: Network, name: str) -> list[int]:
    """Which parameters of a network an attribute of `OF_SCIKIT_LEARN` shows."""
    found, start = [], 0
    for layer in network.layers:
        n = len(layer.params)
        if isinstance(layer, Linear):
            found += {"coefs_": [start], "intercepts_": [start + 1]}.get(name, [])
        elif name == "layer_params_":
            found += range(start, start + n)
        start += n
    return found
