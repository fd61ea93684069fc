"""Prediction with a fitted network, in chunks of rows that bound the memory used."""

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

_CHUNK = 2**22  # most elements, rows times width, of an activation in one chunk of prediction


class Selection:
    """View of some rows of a matrix; rows are copied only when they are asked for.

    Parameters
    ----------
    x : array, or scipy.sparse CSR
        The matrix, on any backend.
    indices : array of int, optional
        Indices of the rows, on the host; all rows if not given.
    """

    def __init__(self, x: Any, indices: NDArray[np.intp] | None = None) -> None:
        self._x = x
        self._home = None if issparse(x) else backend_of(x)
        self._indices: Any = indices
        if self._home is not None and indices is not None:
            self._indices = self._home.indices(indices)
        self.n_rows = x.shape[0] if indices is None else len(indices)

    def rows(self, start: int, end: int) -> Any:
        """Return a range of the selected rows, on x's device, and sparse if x is."""
        span = slice(start, min(end, self.n_rows))
        if self._home is None:
            return self._x[span if self._indices is None else self._indices[span]]
        if self._indices is None:
            return self._x[span, ...]
        with self._home.current():
            return self._home.xp.take(self._x, self._indices[span], axis=0)

    def dense(self, start: int, end: int, backend: Backend, dtype: str) -> Array:
        """Return a range of the selected rows as a dense array on a backend."""
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
    """Return the network's outputs for all rows, computed ``chunk`` rows at a time.

    The outputs of an ensemble's members are pooled by ``loss``, to (n, k).  Without one they
    stay apart, (members, n, k).
    """
    xp, parts = backend.xp, []
    for start in range(0, x.n_rows, chunk):
        z = network(params, x.dense(start, start + chunk, backend, dtype), xp)
        parts.append(z if loss is None else pooled(z, loss, xp))
    return parts[0] if len(parts) == 1 else xp.concat(parts, axis=parts[0].ndim - 2)


def pooled(z: Array, loss: Loss, xp: Any) -> Array:
    """Return logits (n, k), from (n, k) as they are, or pooled from (members, n, k)."""
    return z if z.ndim == 2 else loss.pool(z, xp)


class Inference(Construction):
    """Base of the estimators that computes outputs from the fitted parameters."""

    _results_on_host = False

    def hidden_activations(self, X: Any, layer: int = -1) -> Array:
        """Return a hidden layer's activations for X, for use as features of another model.

        Parameters
        ----------
        X : array-like or sparse matrix (n_samples, n_features)
        layer : int, default=-1
            Index of the hidden layer, from 0; negative indices count from the last.

        Returns
        -------
        h : array (n_samples, hidden_layer_sizes[layer])
            The activations, in the namespace and on the device of X.  Those of an ensemble
            are (members, n_samples, ...).

        Raises
        ------
        NotFittedError
            If the model is not fitted.
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
        # scikit-learn's metrics reject arrays on a device, so everything goes to the host
        weights = None if sample_weight is None else to_host(sample_weight)
        y = y.toarray() if issparse(y) else to_host(y)
        return float(self._metric(y, to_host(self.predict(X)), sample_weight=weights))

    def _predict_with(
        self, function: Any, X: Any, method: str, n_layers: int | None = None
    ) -> tuple[Array, Backend]:
        """Return ``function(logits, loss, xp)`` moved to the backend of X, and that backend.

        With ``n_layers``, the activations after so many layers take the place of the logits.
        """
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
            # Elements per row of the widest activation; the members of an ensemble share a row
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
