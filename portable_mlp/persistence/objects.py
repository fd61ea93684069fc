"""Parameters as JSON: plain values, and instances of registered classes."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from functools import cache
from numbers import Integral, Real
from types import UnionType
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import numpy as np

from portable_mlp import (
    activations,
    architectures,
    embeddings,
    groups,
    initializers,
    layers,
    losses,
    optimizers,
    schedules,
)
from portable_mlp.architectures import Architecture
from portable_mlp.estimators.columns import DateEncoder, NumberEncoder, TextEncoder, UnusedEncoder
from portable_mlp.estimators.packed import Preset
from portable_mlp.groups import Treatment
from portable_mlp.layers import Layer
from portable_mlp.losses import Loss
from portable_mlp.optimizers import Optimizer
from portable_mlp.schedules import Schedule, Scheduled

C = TypeVar("C")

_KINDS = (Architecture, Layer, Loss, Optimizer, Schedule, Scheduled, Treatment)
_CLASSES: dict[str, Any] = {
    name: value
    for module in (
        activations,
        architectures,
        embeddings,
        groups,
        layers,
        losses,
        optimizers,
        schedules,
    )
    for name, value in vars(module).items()
    if isinstance(value, type) and issubclass(value, _KINDS)
} | {name: value for name, value in vars(initializers).items() if is_dataclass(value)}
_CLASSES |= {
    cls.__name__: cls for cls in (NumberEncoder, DateEncoder, TextEncoder, UnusedEncoder, Preset)
}


def register(cls: C) -> C:
    """Allow model files to hold instances of a custom class; usable as a decorator.

    A file stores the name of the class and the values of its fields.  The class has to be
    registered before such a file is loaded.

    Parameters
    ----------
    cls : type
        A dataclass whose fields hold plain values, or objects that model files can hold.

    Returns
    -------
    type
        The same class.

    Raises
    ------
    TypeError
        If ``cls`` is not a dataclass.
    ValueError
        If another class of this name is registered.
    """
    if not (isinstance(cls, type) and is_dataclass(cls)):
        raise TypeError(f"only dataclasses can be registered, got {cls!r}")
    known: Any = _CLASSES.setdefault(cls.__name__, cls)
    # Rerunning a notebook cell defines the same class again, as another object
    if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ValueError(f"a class of the name {cls.__name__} is registered: {known}")
    _CLASSES[cls.__name__] = cls
    return cls


def encode(name: str, value: Any) -> Any:
    """Return a parameter's value as JSON data; raise a TypeError if a file cannot hold it."""
    if name == "callbacks" or (name == "scoring" and callable(value)):
        return None  # they belong to training, not to the model
    if name == "cv":
        return int(value) if isinstance(value, Integral) else None  # so do splitters
    if isinstance(value, dict):
        return {"dict": [[encode(name, k), encode(name, v)] for k, v in value.items()]}
    if is_dataclass(value) and _CLASSES.get(type(value).__name__) is type(value):
        names = [field.name for field in fields(cast(Any, value)) if field.init]
        own = {name: getattr(value, name) for name in names}
        return {"class": type(value).__name__, **{k: encode(name, v) for k, v in own.items()}}
    if isinstance(value, list | tuple):
        return [encode(name, v) for v in value]
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, np.random.RandomState):
        return None
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise TypeError(
        f"{name}={value!r} cannot be written to a model file:"
        " it takes plain values and this library's own objects"
    )


def decode(value: Any) -> Any:
    """Return the value that `encode` was given, with tuples in the place of lists.

    Raises
    ------
    KeyError, TypeError, ValueError
        If it names a class that is not registered, or if the class does not accept the fields.
    """
    if isinstance(value, list):
        return tuple(decode(v) for v in value)
    if not isinstance(value, dict):
        return value
    if value.keys() == {"dict"}:
        return {decode(k): decode(v) for k, v in value["dict"]}
    cls = _CLASSES[value["class"]]
    given = {name: decode(v) for name, v in value.items() if name != "class"}
    hints = _hints(cls)
    for field in fields(cast(Any, cls)):
        if field.init and not _is_a(hints.get(field.name, Any), given.get(field.name)):
            raise ValueError(f"{cls.__name__} of {field.name}={given.get(field.name)!r}")
    return cls(**given)


def _is_a(hint: Any, value: Any) -> bool:
    """Tell whether a value is of an annotated type.

    The items of a tuple are not checked.  An annotation that is not a type, such as a literal,
    accepts any value.
    """
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return any(_is_a(option, value) for option in get_args(hint))
    kind = Real if hint is float else origin or hint
    return hint is Any or not isinstance(kind, type) or isinstance(value, kind)


@cache
def _hints(cls: type) -> dict[str, Any]:
    try:
        return get_type_hints(cls)
    except NameError:  # annotations may use names that exist for type checkers only
        return {}
