"""Validation of the estimators' input, before any training.

Arrays other than NumPy's are checked here, without scikit-learn.  Unless its array dispatch
is on, scikit-learn's checks reject such arrays, or silently convert them to NumPy.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import issparse
from sklearn.utils import check_array, check_consistent_length
from sklearn.utils.validation import column_or_1d, validate_data

from portable_mlp.backends import NumPyBackend, backend_of, to_host
from portable_mlp.sources import Source
from portable_mlp.typing import Array


def check_X(estimator: Any, X: Any, reset: bool) -> Array:
    """Return X, checked to be two-dimensional, real, finite, and as wide as in ``fit``.

    Parameters
    ----------
    estimator : estimator
    X : array-like or sparse matrix (n_samples, n_features)
    reset : bool
        Whether this is a fit, which sets ``n_features_in_`` and ``feature_names_in_``.

    Returns
    -------
    array or CSR matrix
        In a real floating dtype, on the backend of X; sparse X as CSR.

    Raises
    ------
    ValueError
        If X fails one of these checks.
    """
    if isinstance(X, Source):
        raise ValueError("X: a Source is what fit and continue_fit take; here it has to be rows")
    home = backend_of(X)
    _refuse_other_kinds(X, "X")
    if isinstance(home, NumPyBackend):
        kinds = (np.float64, np.float32)
        return validate_data(estimator, X, accept_sparse="csr", dtype=kinds, reset=reset)
    xp = home.xp
    name = type(estimator).__name__
    if X.ndim != 2:
        raise ValueError(f"X: expected a 2-D array, got {X.ndim} dimensions")
    if 0 in X.shape:
        raise ValueError(f"X: found array with shape {tuple(X.shape)}, nothing to learn from")
    if xp.isdtype(X.dtype, "complex floating"):
        raise ValueError("X: complex data not supported")
    with home.current():
        if not xp.isdtype(X.dtype, "real floating"):
            known = xp.__array_namespace_info__().dtypes(device=home.device)
            X = xp.astype(X, known.get("float64", xp.float32))
        elif not bool(xp.all(xp.isfinite(X))):
            raise ValueError(f"X contains NaN or infinity, which {name} does not accept")
    if reset:
        estimator.n_features_in_ = int(X.shape[1])
        if hasattr(estimator, "feature_names_in_"):
            del estimator.feature_names_in_
    elif X.shape[1] != estimator.n_features_in_:
        raise ValueError(
            f"X has {X.shape[1]} features, but {name} is expecting"
            f" {estimator.n_features_in_} features as input"
        )
    return X


def check_y(estimator: Any, y: Any, X: Array, dtype: type | None) -> NDArray[Any]:
    """Return the targets on the host, checked to be as many as X has rows.

    They are converted to ``dtype`` unless it is None.  A single column becomes a vector.
    """
    if y is None:
        raise ValueError(
            f"{type(estimator).__name__} requires y to be passed, but the target y is None"
        )
    if issparse(y):
        y = y.toarray()
    if dtype is not None:
        _refuse_other_kinds(y, "y")
    host: NDArray[Any] = check_array(to_host(y), ensure_2d=False, dtype=dtype, input_name="y")
    check_consistent_length(np.empty((X.shape[0], 0)), host)
    if host.ndim == 2 and host.shape[1] == 1:
        host = column_or_1d(host, warn=True)
    return host


def _refuse_other_kinds(a: Any, name: str) -> None:
    """Raise a ValueError for dates and text, which NumPy would convert, and sparse tensors."""
    for dtype in [a.dtype] if hasattr(a, "dtype") else getattr(a, "dtypes", ()):  # data frames
        other = getattr(dtype, "kind", "") in ("m", "M", "U", "S")
        if other or str(dtype).startswith(("Date", "Time", "Duration", "String")):  # Polars
            raise ValueError(f"{name}: numbers are expected, got dtype {dtype}")
    if str(getattr(a, "layout", "torch.strided")).startswith("torch.sparse"):
        raise ValueError(f"{name}: sparse tensors are not supported; SciPy's matrices are")


def check_weights(
    sample_weight: Any, X: Array, dtype: str, name: str = "sample_weight", some: bool = True
) -> NDArray[np.float64] | None:
    """Return the rows' weights on the host, or None; a scalar stands for equal weights.

    Raises
    ------
    ValueError
        If a weight is negative, if their sum is not finite in ``dtype``, or, with ``some``, if
        all weights are zero.  The message begins with ``name``.
    """
    if sample_weight is None:
        return None
    weights = np.asarray(to_host(sample_weight), dtype=np.float64)
    if weights.ndim == 0:
        weights = np.full(X.shape[0], float(weights))
    if weights.shape != (X.shape[0],):
        raise ValueError(f"{name}: expected shape {(X.shape[0],)}, got {weights.shape}")
    with np.errstate(over="ignore"):
        total = weights.sum()
    if not total <= np.finfo(dtype).max or (weights < 0).any():
        raise ValueError(f"{name} must be finite, also in sum, and not negative")
    if some and not weights.any():
        raise ValueError(f"{name} is zero for every row: nothing to learn from")
    return weights
