"""Prediction: what a fitted network gives for rows, a bounded number of them at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import issparse
from sklearn.utils.validation import check_is_fitted

from portable_mlp.backends import Backend, NumPyBackend, backend_of, get_backend, move, to_host
from portable_mlp.estimators.construction import Construction
from portable_mlp.estimators.input_checks import check_X
from portable_mlp.estimators.sklearn_compat import check_same_namespace
from portable_mlp.layers import Linear
from portable_mlp.losses import Loss
from portable_mlp.network import Network
from portable_mlp.typing import Array

_CHUNK = 2**22  # elements of the widest activation that prediction holds at once


class Selection:
    """Some rows of a matrix that are not copied before they are asked for.

    Parameters
    ----------
    x : array, or scipy.sparse CSR
        Anywhere.
    indices : array of int, optional
        The rows, on the host; all if not given.
    """

    def __init__(self, x: Any, indices: NDArray[np.intp] | None = None) -> None:
        self._x = x
        self._home = None if issparse(x) else backend_of(x)
        self._indices: Any = indices
        if self._home is not None and indices is not None:
            self._indices = self._home.indices(indices)
        self.n_rows = x.shape[0] if indices is None else len(indices)

    def rows(self, start: int, end: int) -> Any:
        """Return a range of them where x is, sparse if x is."""
        span = slice(start, min(end, self.n_rows))
        if self._home is None:
            return self._x[span if self._indices is None else self._indices[span]]
        if self._indices is None:
            return self._x[span, ...]
        with self._home.current():
            return self._home.xp.take(self._x, self._indices[span], axis=0)

    def dense(self, start: int, end: int, backend: Backend, dtype: str) -> Array:
        """Return a range of them on a backend."""
        found = self.rows(start, end)
        return move(found.toarray() if issparse(found) else found, backend, dtype)


def logits(
    network: Network,
    params: list[Array],
    x: Selection,
    backend: Backend,
    dtype: str,
    chunk: int,
    loss: Loss | None = None,
) -> Array:
    """Return what the network gives for all rows, computed so many at a time.

    Of an ensemble, that is what its members give together by a ``loss``, or each, (members, n,
    k), without one.
    """
    xp, parts = backend.xp, []
    for start in range(0, x.n_rows, chunk):
        z = network(params, x.dense(start, start + chunk, backend, dtype), xp)
        parts.append(z if loss is None else pooled(z, loss, xp))
    return parts[0] if len(parts) == 1 else xp.concat(parts, axis=parts[0].ndim - 2)


def pooled(z: Array, loss: Loss, xp: Any) -> Array:
    """Logits (n, k) from those of one network, or of an ensemble's members."""
    return z if z.ndim == 2 else loss.pool(z, xp)


class Inference(Construction):
    """What is computed from fitted parameters."""

    _results_on_host = False

    def hidden_activations(self, X: Any, layer: int = -1) -> Array:
        """Return what a hidden layer makes of X: learned features for another model.

        Parameters
        ----------
        X : array-like or sparse matrix (n_samples, n_features)
        layer : int, default=-1
            Of the hidden layers, from 0; negative from the last.

        Returns
        -------
        h : array (n_samples, hidden_layer_sizes[layer])
            Of an ensemble, (members, n_samples, ...).  In the namespace and on the device of X.

        Raises
        ------
        NotFittedError
        ValueError
            If there is no such layer, or X does not fit the model.
        """
        check_is_fitted(self)
        network = self.network_
        # A hidden layer ends where the next linear one begins
        ends = [i for i, own in enumerate(network.layers) if isinstance(own, Linear)][1:]
        if not -len(ends) <= layer < len(ends):
            raise ValueError(f"layer: there are {len(ends)} hidden layers, asked for was {layer}")
        return self._predict_with(lambda h, *_: h, X, "hidden_activations", n_layers=ends[layer])[0]

    def _score(self, X: Any, y: Any, sample_weight: Any) -> float:
        # On the host: scikit-learn's metrics refuse a device's arrays
        weights = None if sample_weight is None else to_host(sample_weight)
        y = y.toarray() if issparse(y) else to_host(y)
        return float(self._metric(y, to_host(self.predict(X)), sample_weight=weights))

    def _predict_with(
        self, function: Any, X: Any, method: str, n_layers: int | None = None
    ) -> tuple[Array, Backend]:
        """``function(logits, loss, xp)`` where it is computed, moved to where X is."""
        check_is_fitted(self)
        check_same_namespace(X, self, method)
        home = NumPyBackend() if self._results_on_host else backend_of(X)
        backend = get_backend(self.device, self.backend, like=X)
        X = check_X(self, X, reset=False)
        network, params = self.network_, self.params_
        dtype = str(params[0].dtype).split(".")[-1]
        with backend.scope(dtype):
            params = [move(p, backend, dtype) for p in params]
            part = Network(network.layers[:n_layers])
            # Elements of the widest activation, a row
            widths = (
                max(p.shape[bool(p.members) :], default=1) * (p.members or 1) for p in part.params
            )
            widest = max(widths, default=1)
            chunk = max(1, _CHUNK // widest)
            own = params[: len(part.params)]
            loss = None if n_layers else self._loss
            z = logits(part, own, Selection(X), backend, dtype, chunk, loss)
            result = function(z, self._loss, backend.xp)
            return (result if home == backend else move(result, home)), home

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        tags.array_api_support = True
        return tags
