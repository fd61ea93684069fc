"""Model files: arrays as safetensors, everything else as JSON beside them; no pickle.

What comes before the network (scaling, encoding) is a scikit-learn transformer; it
rides along as the bytes of a skops file, which loads known types only.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from sklearn.utils.validation import check_is_fitted

from portable_mlp import activations, estimators, losses, optimizers, schedules
from portable_mlp.backends import to_host
from portable_mlp.layers import Layer
from portable_mlp.losses import Loss
from portable_mlp.optimizers import Optimizer
from portable_mlp.schedules import Schedule

_FORMAT = "portable_mlp/1"
_ESTIMATORS = {cls.__name__: cls for cls in (estimators.MLPClassifier, estimators.MLPRegressor)}
_CLASSES = {
    name: value
    for module in (activations, losses, optimizers, schedules)
    for name, value in vars(module).items()
    if isinstance(value, type) and issubclass(value, Layer | Loss | Optimizer | Schedule)
}
_FITTED = (
    "n_features_in_", "n_outputs_", "n_layers_", "n_iter_", "t_", "loss_", "loss_curve_",
    "best_loss_", "validation_loss_curve_", "validation_scores_", "best_validation_score_",
    "out_activation_", "_multilabel",
)  # fmt: skip


def save(model: Any, path: str | Path, preprocessing: Any = None) -> Path:
    """Write a fitted model.

    Parameters
    ----------
    model : MLPClassifier or MLPRegressor
        Parameters given as objects have to be this library's own; callbacks and a
        callable ``scoring`` are left out.
    path : path
        Overwritten.
    preprocessing : scikit-learn transformer, optional
        Fitted; stored with the model and applied before it by what `load` returns.

    Returns
    -------
    Path

    Raises
    ------
    TypeError
        If a parameter of the model cannot be written as JSON, or the model is of
        another class.
    FileNotFoundError
        If the folder does not exist.
    """
    check_is_fitted(model)
    path = Path(path)
    if _ESTIMATORS.get(type(model).__name__) is not type(model):
        raise TypeError(f"only {' and '.join(_ESTIMATORS)} can be saved, got {type(model)}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no folder {path.parent} to save {path.name} in")
    host = {f"coefs.{i}": to_host(w) for i, w in enumerate(model.coefs_)}
    host |= {f"intercepts.{i}": to_host(b) for i, b in enumerate(model.intercepts_)}
    host |= {f"layer_params.{i}": to_host(a) for i, a in enumerate(model.layer_params_)}
    meta: dict[str, Any] = {
        "format": _FORMAT,
        "estimator": type(model).__name__,
        "params": {k: _encode(k, v) for k, v in model.get_params(deep=False).items()},
        "loss": _encode("loss", model._loss),
        "fitted": {k: getattr(model, k) for k in _FITTED if hasattr(model, k)},
    }
    for name in ("classes_", "feature_names_in_"):
        if hasattr(model, name):
            values = np.asarray(getattr(model, name))
            meta[name] = {"dtype": values.dtype.str, "values": values.tolist()}
    if preprocessing is not None:
        from skops.io import dumps

        host["preprocessing"] = np.frombuffer(dumps(preprocessing), dtype=np.uint8)
    # Contiguous: safetensors would store a transposed array's memory as it lies
    contiguous = {name: np.ascontiguousarray(array) for name, array in host.items()}
    save_file(contiguous, path, metadata={"portable_mlp": json.dumps(meta)})
    return path


def load(path: str | Path) -> Any:
    """Read what `save` wrote.

    Parameters
    ----------
    path : path

    Returns
    -------
    MLPClassifier, MLPRegressor, or a Pipeline of the preprocessing and one of these
        With NumPy arrays; ``device`` and ``backend`` as they were at fit.

    Raises
    ------
    ValueError
        If the file is not a model of this format.
    """
    try:
        with safe_open(path, framework="np") as file:
            meta = json.loads((file.metadata() or {}).get("portable_mlp", "{}"))
            host: dict[str, NDArray[Any]] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a model file: {error}") from error
    if meta.get("format") != _FORMAT:
        raise ValueError(
            f"{path} is not a model of format {_FORMAT!r}; it says {meta.get('format')!r}"
        )
    params = {k: _decode(v) for k, v in meta["params"].items()}
    model = _ESTIMATORS[meta["estimator"]](**params)
    for name, value in meta["fitted"].items():
        setattr(model, name, value)
    for name in ("classes_", "feature_names_in_"):
        if name in meta:
            setattr(model, name, np.asarray(meta[name]["values"], dtype=meta[name]["dtype"]))
    layers = range(model.n_layers_ - 1)
    model.coefs_ = [host[f"coefs.{i}"] for i in layers]
    model.intercepts_ = [host[f"intercepts.{i}"] for i in layers]
    model.layer_params_ = [
        host[f"layer_params.{i}"]
        for i in range(sum(name.startswith("layer_params.") for name in host))
    ]
    model._loss = _decode(meta["loss"])
    if "preprocessing" not in host:
        return model
    from sklearn.pipeline import make_pipeline
    from skops.io import loads

    return make_pipeline(loads(host["preprocessing"].tobytes(), trusted=["numpy.dtype"]), model)


def _encode(name: str, value: Any) -> Any:
    if name == "callbacks" or (name == "scoring" and callable(value)):
        return None  # of the training, not of the model
    if isinstance(value, dict):
        return {"dict": [[_encode(name, k), _encode(name, v)] for k, v in value.items()]}
    if is_dataclass(value) and _CLASSES.get(type(value).__name__) is type(value):
        return {"class": type(value).__name__, **asdict(value)}  # type: ignore[arg-type]
    if isinstance(value, list | tuple):
        return [_encode(name, v) for v in value]
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, np.random.RandomState):
        warnings.warn(f"{name}: a generator's state is not stored", UserWarning, stacklevel=3)
        return None
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise TypeError(
        f"{name}={value!r} cannot be written to a model file:"
        " it takes plain values and this library's own objects"
    )


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_decode(v) for v in value)
    if isinstance(value, dict):
        fields = dict(value)
        if "dict" in fields:
            return {_decode(k): _decode(v) for k, v in fields["dict"]}
        return _CLASSES[fields.pop("class")](**fields)
    return value
