"""What the estimators for tables store beside a network: the encoding, and the held-out rows."""

from __future__ import annotations

from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from portable_mlp.estimators import TabularClassifier, TabularRegressor
from portable_mlp.estimators.columns import (
    WORDS,
    Encoder,
    NumberEncoder,
    TableEncoder,
    TextEncoder,
    UnusedEncoder,
)
from portable_mlp.estimators.tabular_regressor import is_of_scaled
from portable_mlp.layers import Repeat
from portable_mlp.losses import Loss
from portable_mlp.persistence.modelfile import Contents
from portable_mlp.persistence.objects import decode, encode

_NUMBERS: dict[str, Any] = {
    "n_iter_": int, "best_epoch_": int, "oof_score_": Real, "stop_reason_": str, "_seed": int,
}  # fmt: skip
_OF_CLASSIFIER: dict[str, Any] = {"temperature_": Real, "sharpness_": Real}
_OF_REGRESSOR: dict[str, Any] = {"_flat": bool}
_COUNTS = "n_ranked", "n_embedded"
_OF_COLUMNS = "median", "scale", "used"
_OF_TARGET = "_mean", "_std", "_limits"
_OF_ROWS = "oof_predictions_", "_fold"


def numbers(model: Any) -> dict[str, Any]:
    """Return the names and types of a model's fitted values."""
    is_classifier = isinstance(model, TabularClassifier)
    return _NUMBERS | (_OF_CLASSIFIER if is_classifier else _OF_REGRESSOR)


def describe(model: Any) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Return what a model is beside its network, as JSON and arrays."""
    encoder: TableEncoder = model._encoder
    meta = {
        "encoder": {
            "parts": [encode("columns", part) for part in encoder.parts],
            **{name: getattr(encoder, name) for name in _COUNTS},
        },
        "names": model._names,
    }
    if isinstance(model, TabularRegressor):
        meta["loss"] = encode("loss", model._loss)
    arrays = {f"encoder.{name}": getattr(encoder, name) for name in _OF_COLUMNS}
    arrays |= {f"encoder.quantiles.{i}": q for i, q in enumerate(encoder.quantiles)}
    arrays |= {f"nonconformity.{i}": own for i, own in enumerate(model._nonconformity)}
    for name in (*_OF_ROWS, *_OF_TARGET):
        if hasattr(model, name):
            arrays[name] = getattr(model, name)
    return meta, arrays


def rebuild(model: Any, contents: Contents) -> None:
    """Set what `describe` returned; the network, parameters and labels are there already."""
    meta = contents.meta["encoder"]
    median, scale, used = (contents.array(f"encoder.{name}") for name in _OF_COLUMNS)
    n_ranked, n_embedded = (meta[name] for name in _COUNTS)
    parts, quantiles = list(decode(meta["parts"])), contents.arrays("encoder.quantiles")
    model._encoder = TableEncoder(parts, median, scale, used, n_ranked, n_embedded, quantiles)
    if isinstance(model, TabularRegressor):
        model._loss = decode(contents.meta["loss"])
    model._names = contents.meta["names"]
    names = model._names or range(len(model._encoder.parts))
    model.unused_columns_ = [
        name
        for name, part in zip(names, model._encoder.parts, strict=True)
        if isinstance(part, UnusedEncoder)
    ]
    model._nonconformity = contents.arrays("nonconformity")
    for name in (*_OF_ROWS, *_OF_TARGET):
        if name in contents:
            setattr(model, name, contents.array(name))
    model.n_features_in_ = len(model._encoder.parts)


def check(model: Any) -> None:
    """Raise a ValueError unless parameters and fitted attributes are consistent."""
    model._validate_params()
    if missing := [name for name in numbers(model) if not hasattr(model, name)]:
        raise ValueError(f"it lacks {', '.join(missing)}")
    encoder: TableEncoder = model._encoder
    _check_encoder(encoder)
    names, members = model._names, model.network_.members
    if names is not None and not (
        len(names) == len(encoder.parts) and all(isinstance(name, str) for name in names)
    ):
        raise ValueError(f"the names {names} for {len(encoder.parts)} columns")
    if model.network_.n_in != encoder.n_columns:
        raise ValueError(f"{encoder.n_columns} numbers for a network of {model.network_.n_in}")
    if not isinstance(model.network_.layers[0], Repeat):
        raise ValueError(f"its rows are not repeated for each member: {model.network_.layers[0]}")
    fold, held_out = model._fold, model._nonconformity
    n_folds = len(held_out)
    if not (
        members
        and fold.dtype.kind == "i"
        and np.array_equal(fold, np.arange(members) % max(1, n_folds))
        and n_folds <= members
    ):
        raise ValueError(f"the folds {fold} of {members} members, of {n_folds} folds")
    for own in held_out:
        if own.dtype != np.float64 or own.ndim != 1 or not np.all(np.diff(own) >= 0.0):
            raise ValueError("its held-out rows are not sorted numbers")
    n_out = model.network_.n_out
    if isinstance(model, TabularClassifier):
        if not (len(model.classes_) == n_out >= 2 and model.temperature_ > 0.0):
            raise ValueError(f"{n_out} outputs for the classes {model.classes_}")
        if not np.array_equal(np.unique(model.classes_), model.classes_):
            raise ValueError(f"the classes {model.classes_} are not sorted and distinct")
    else:
        shapes = [getattr(model, name).shape for name in _OF_TARGET]
        kinds = {getattr(model, name).dtype.name for name in _OF_TARGET}
        n = len(model._mean)
        if not (isinstance(model._loss, Loss) and is_of_scaled(model._loss)):
            raise ValueError(f"its loss is {model._loss}")
        wanted = model._loss.n_logits(n)
        if shapes != [(n,), (n,), (2, n)] or kinds != {"float64"} or n_out != wanted:
            raise ValueError(f"{n_out} outputs, scaled by arrays of {shapes}, {kinds}")


def _check_encoder(encoder: TableEncoder) -> None:
    parts = encoder.parts
    if not all(isinstance(part, Encoder) for part in parts):
        raise ValueError(f"its columns are {parts}")
    for part in parts:
        if isinstance(part, NumberEncoder) and part.kind not in WORDS:
            raise ValueError(f"its column is {part}")
        items = part.levels if isinstance(part, TextEncoder) else getattr(part, "periods", ())
        kind = str if isinstance(part, TextEncoder) else float
        if not all(type(item) is kind for item in items):
            raise ValueError(f"its column is {part}")
    n = sum(part.width for part in parts)
    used, counts = encoder.used, (encoder.n_ranked, encoder.n_embedded)
    if not (
        encoder.median.shape == encoder.scale.shape == (n,)
        and encoder.median.dtype == encoder.scale.dtype == np.float64
        and used.dtype.kind == "i"
        and used.ndim == 1
        and np.all((used >= 0) & (used < n))
        and all(type(count) is int and count >= 0 for count in counts)
        and encoder.n_ranked == len(encoder.quantiles) <= len(used)
        and encoder.n_embedded <= encoder.n_columns
    ):
        raise ValueError(f"its encoding of {n} numbers is inconsistent")
    for grid in encoder.quantiles:
        if grid.dtype != np.float64 or grid.ndim != 1 or not (len(grid) and _rises(grid)):
            raise ValueError("its quantiles do not rise")


def _rises(grid: NDArray[Any]) -> bool:
    return bool(np.all(np.diff(grid) > 0.0))
