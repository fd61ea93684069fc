"""Preprocessing as JSON: scikit-learn's transformers by class, parameters and fitted attributes.

Transformers that this form cannot hold are written as a skops file.  It loads known types only
too, but needs skops, which imports all of scikit-learn.
"""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from portable_mlp.persistence import skops_files
from portable_mlp.persistence.modelfile import Contents, check_json

_MODULES = (
    "sklearn.compose",
    "sklearn.decomposition",
    "sklearn.feature_extraction.text",
    "sklearn.impute",
    "sklearn.model_selection",
    "sklearn.pipeline",
    "sklearn.preprocessing",
    "portable_mlp.preprocessing",
)
"""Modules whose estimators, and splitters of rows, may stand in a file."""

_MOST_CHARACTERS = 2**24
_SCALARS = ("bool", "int32", "int64", "float32", "float64")


class _Unknown(Exception):
    """A value has no form as JSON."""


def encode_transformer(transformer: Any) -> NDArray[np.uint8]:
    """Return a fitted transformer as bytes; raise a TypeError if these could not be loaded."""
    try:
        data = json.dumps(_encode(transformer)).encode("ascii")
        check_json(data)
    except (_Unknown, ValueError, RecursionError):
        data = skops_files.encode(transformer)
    return np.frombuffer(data, np.uint8)


def decode_transformer(contents: Contents) -> Any:
    """Load a model file's transformer; raise a ValueError if it is not one."""
    section: Any = contents.section("preprocessing")
    if section.read(1) == b"{":
        section.seek(0)
        data = section.read()
        check_json(data)
        transformer = _decode(json.loads(data))
    else:
        transformer = skops_files.decode(contents.section("preprocessing"))
    if not callable(getattr(transformer, "transform", None)):
        raise ValueError(f"its preprocessing is no transformer but a {type(transformer)}")
    return transformer


# ------------------------------------------------------------------ values


def _encode(value: Any) -> Any:
    """Return a value as JSON data: plain values as they are, others as an object of one key."""
    if value is None or isinstance(value, bool | str) or type(value) in (int, float):
        return value
    if isinstance(value, list):
        return [_encode(v) for v in value]
    if type(value) is tuple:
        return {"tuple": [_encode(v) for v in value]}
    if type(value) is dict:
        return {"dict": [[_encode(k), _encode(v)] for k, v in value.items()]}
    if isinstance(value, slice):
        return {"slice": [value.start, value.stop, value.step]}
    if isinstance(value, np.dtype):
        return {"dtype": _named(value)}
    if isinstance(value, type) and issubclass(value, np.generic):
        return {"type": _named(np.dtype(value))}
    if isinstance(value, np.generic):
        return {"scalar": _encode(np.asarray(value))}
    if isinstance(value, np.ndarray):
        return {"array": _encode_array(value)}
    name = type(value).__name__
    module = next((m for m in _MODULES if type(value).__module__.startswith(m)), "")
    if _estimator(module, name) is not type(value):
        raise _Unknown(value)
    return {"class": [module, name], "state": _encode(value.__getstate__() or {})}


def _estimator(module: str, name: str) -> Any:
    """Return a class of `_MODULES` by name; None if there is no such estimator or splitter."""
    from sklearn.base import BaseEstimator
    from sklearn.model_selection import BaseCrossValidator

    cls = getattr(import_module(module), name, None) if module in _MODULES else None
    bases = BaseEstimator, BaseCrossValidator
    return cls if isinstance(cls, type) and issubclass(cls, bases) else None


def _encode_array(value: NDArray[Any]) -> dict[str, Any]:
    shape = list(value.shape)
    if value.dtype.kind in "OU":
        items = value.ravel().tolist()
        if not all(item is None or type(item) in (str, float, bool) for item in items):
            raise _Unknown(value)
        _check_texts(items)
        return {"shape": shape, "kind": value.dtype.kind, "items": items}
    # The order in memory decides about the last bits of products
    order: Any = "F" if value.flags.fnc else "C"
    data = b64encode(value.astype(value.dtype.newbyteorder("<")).tobytes(order)).decode("ascii")
    return {"shape": shape, "dtype": _named(value.dtype), "order": order, "data": data}


def _check_texts(items: list[Any]) -> None:
    """Raise a ValueError for texts that take much memory: each takes as much as the longest."""
    longest = max((len(item) for item in items if isinstance(item, str)), default=0)
    if len(items) * longest > _MOST_CHARACTERS:
        raise ValueError(f"{len(items)} texts of up to {longest} characters are too many")


def _named(dtype: np.dtype[Any]) -> str:
    if dtype.name not in _SCALARS and dtype != np.dtype(object):
        raise _Unknown(dtype)
    return dtype.name


def _decode(value: Any) -> Any:
    """Return the value that `_encode` was given; raise a ValueError if it is none."""
    if isinstance(value, list):
        return [_decode(v) for v in value]
    if not isinstance(value, dict):
        return value
    match value:
        case {"tuple": [*items]}:
            return tuple(_decode(v) for v in items)
        case {"dict": [*pairs]}:
            return {_decode(k): _decode(v) for k, v in pairs}
        case {"slice": [start, stop, step]}:
            return slice(start, stop, step)
        case {"dtype": str(name)}:
            return _dtype(name)
        case {"type": str(name)}:
            return _dtype(name).type
        case {"scalar": array}:
            return _decode(array)[()]
        case {"array": dict(array)}:
            return _decode_array(array)
        case {"class": [str(module), str(name)], "state": state}:
            return _decode_estimator(module, name, _decode(state))
    raise ValueError(f"its preprocessing has {str(value)[:80]}")


def _decode_array(value: dict[str, Any]) -> NDArray[Any]:
    shape = tuple(value["shape"])
    if "items" in value:
        items = value["items"]
        _check_texts(items)
        array = np.array(items, np.str_) if value["kind"] == "U" else np.empty(len(items), object)
        array[:] = items
        return array.reshape(shape)
    flat = np.frombuffer(b64decode(value["data"]), _dtype(value["dtype"]).newbyteorder("<"))
    return flat.reshape(shape, order=value["order"]).astype(
        _dtype(value["dtype"]), order=value["order"]
    )


def _dtype(name: str) -> np.dtype[Any]:
    if name not in (*_SCALARS, "object"):
        raise ValueError(f"its preprocessing has the dtype {name}")
    return np.dtype(name)


def _decode_estimator(module: str, name: str, state: Any) -> Any:
    cls = _estimator(module, name)
    if cls is None or not isinstance(state, dict):
        raise ValueError(f"its preprocessing has a {module}.{name}")
    made = cls.__new__(cls)
    getattr(made, "__setstate__", made.__dict__.update)(state)
    return made
