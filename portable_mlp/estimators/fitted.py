"""Fitted parameters: in the network's order, and under scikit-learn's attribute names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from portable_mlp.layers import Linear
from portable_mlp.network import Network
from portable_mlp.typing import Array

OF_SCIKIT_LEARN = ("coefs_", "intercepts_", "layer_params_")


class View(list[Array]):
    """List of some of the items of another list; setting an item sets it in both.

    Parameters
    ----------
    items : list
        The other list.
    places : list of int
        Positions in ``items``.
    """

    def __init__(self, items: list[Array], places: list[int]) -> None:
        super().__init__(items[i] for i in places)
        self._items = items
        self._places = places

    def __setitem__(self, key: Any, value: Any) -> None:
        places = self._places[key]
        if isinstance(key, slice):
            value = list(value)
            pairs = list(zip(places, value, strict=True))  # raises before anything is set
        else:
            pairs = [(places, value)]
        for place, item in pairs:
            self._items[place] = item
        super().__setitem__(key, value)

    def __reduce__(self) -> Any:
        return list, (list(self),)  # pickles and copies are plain lists


class Shown:
    """Descriptor that shows some of the fitted parameters as an attribute.

    A model that is not fitted has no parameters to show.  Values that are set on it are kept
    in ``_before``; a call that continues training starts from them.
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
    """Base of the estimators that holds the fitted network and its parameters.

    Attributes
    ----------
    network_ : Network
        The fitted layers.
    params_ : list of arrays
        The network's parameters, in the order of ``network_.params``.
    coefs_, intercepts_ : list of arrays
        The weights and biases of the linear layers.
    layer_params_ : list of arrays
        The parameters of all other layers.
    """

    network_: Network
    params_: list[Array]
    coefs_ = Shown()
    intercepts_ = Shown()
    layer_params_ = Shown()

    def _adopt(self, network: Network, arrays: Mapping[str, Sequence[Array]]) -> None:
        """Set the network, and its parameters from lists named as in `OF_SCIKIT_LEARN`."""
        params: list[Array] = [None] * len(network.params)
        for name in OF_SCIKIT_LEARN:
            for place, array in zip(places(network, name), arrays.get(name, ()), strict=True):
                params[place] = array
        self.network_, self.params_ = network, params

    @property
    def _first_coef(self) -> Array:
        return self.params_[0]

    def _params_for(self, network: Network) -> list[Array]:
        """Return the fitted parameters, to continue training with a network.

        Raises
        ------
        ValueError
            If the network has another number of parameters, or parameters of other shapes.
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
    """Return the indices of the network's parameters that a name of `OF_SCIKIT_LEARN` shows."""
    found, start = [], 0
    for layer in network.layers:
        n = len(layer.params)
        if isinstance(layer, Linear):
            found += {"coefs_": [start], "intercepts_": [start + 1]}.get(name, [])
        elif name == "layer_params_":
            found += range(start, start + n)
        start += n
    return found
