"""Saving and loading of estimators: what is written, and how the model is rebuilt from it.

Arrays are stored as their bytes and everything else as JSON
(`portable_mlp.persistence.modelfile`); there is no pickle.  Values that follow from the arrays'
shapes are not stored.  Values that are read are checked against these shapes.  The
preprocessing (scaling, encoding) is a scikit-learn transformer.  It is stored as the bytes of
a skops file, which loads known types only.
"""

from __future__ import annotations

import json
import warnings
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.pipeline import make_pipeline
from sklearn.utils.validation import check_is_fitted

from portable_mlp import __version__, estimators
from portable_mlp.architectures import Fixed
from portable_mlp.backends import check_names, to_host
from portable_mlp.callbacks import Epoch
from portable_mlp.estimators.fitted import OF_SCIKIT_LEARN
from portable_mlp.estimators.tabular import TabularModel
from portable_mlp.groups import Treatments
from portable_mlp.layers import Layer
from portable_mlp.network import Network
from portable_mlp.packing import Layout
from portable_mlp.persistence import tabular
from portable_mlp.persistence.modelfile import (
    OLD_FORMAT,
    Contents,
    opened,
    write,
)
from portable_mlp.persistence.objects import decode, encode
from portable_mlp.persistence.transformers import decode_transformer, encode_transformer
from portable_mlp.steps import Arrays
from portable_mlp.training import Begun, State
from portable_mlp.warn import warn

_ESTIMATORS = {name: getattr(estimators, name) for name in estimators.__all__}
_NUMBERS: dict[str, Any] = {
    "n_iter_": int, "t_": int, "loss_": Real, "best_loss_": Real | None,
    "best_validation_score_": Real | None, "_multilabel": bool,
}  # fmt: skip
_LABELS = {"classes": "classes_", "feature_names": "feature_names_in_"}
_CURVES = ("loss_curve_", "validation_loss_curve_", "validation_scores_")
_COUNTS = ("steps", "rows", "epochs", "done", "stalled_for")


def save(
    model: Any, path: str | Path, preprocessing: Any = None, *, notes: dict[str, Any] | None = None
) -> Path:
    """Write a fitted model to a file; a crash at any point leaves the old file or the new one.

    Parameters
    ----------
    model : MLPClassifier, MLPRegressor, TabularClassifier or TabularRegressor
        A fitted model.  Its layers, and parameters that are objects, have to be of this
        library's classes, or of classes given to `register`.  Callbacks, a callable
        ``scoring`` and a ``cv`` that is no number are not stored.  If ``architecture`` is a
        function, the network is stored in its place.
    path : path
        The file; overwritten if it exists.
    preprocessing : scikit-learn transformer, optional
        A fitted transformer, stored with the model.  `load` then returns a pipeline of both.
    notes : dict, optional
        Additional information, of types that JSON can hold; `read_metadata` returns it.

    Returns
    -------
    Path
        The path of the file.

    Raises
    ------
    TypeError
        If the model is of another class, or if one of its parameters, its labels, the
        preprocessing or the notes cannot be stored.
    ValueError
        If the model's parameters are not valid, or its JSON is longer than `load` accepts.
    OSError
        If the file cannot be written; the previous file remains.
    """
    meta, arrays = _describe(model, preprocessing, notes)
    if isinstance(model.random_state, np.random.RandomState):
        said = "random_state: a generator's state is not stored"
        warn(said, UserWarning)
    return write(path, meta, arrays)


def save_checkpoint(
    model: Any, path: str | Path, preprocessing: Any = None, *, notes: dict[str, Any] | None = None
) -> Path:
    """Write a model as `save` does, with the training state that `continue_fit` needs.

    Parameters, result and errors are those of `save`.

    Raises
    ------
    ValueError
        If the model has no training state: L-BFGS leaves none, and files of `save` hold none.
    """
    meta, arrays = _describe(model, preprocessing, notes)
    state: State | None = getattr(model, "_state", None)
    if state is None:
        raise ValueError("the model has no training state: it was not trained in epochs here")
    _, _, layout, backend, dtype = state.origin
    kind, keys, *rest = state.generator
    memory = state.schedule
    meta["state"] = {
        **{name: getattr(state, name) for name in _COUNTS},
        "watched": state.watched,
        "best": state.best,
        "begun": list(state.begun),
        "schedule": None if memory is None else list(memory),
        "generator": [kind, *rest],
        "packed": layout != Layout.plan(model.network_.params, None),
        "backend": backend,
        "dtype": dtype,
    }
    arrays["state.generator"] = keys
    arrays["state.history"] = np.array(state.history, np.float64).reshape(-1, len(Epoch._fields))
    arrays |= {f"state.leaves.{i}": to_host(a) for i, a in enumerate(state.arrays.leaves)}
    moments = [to_host(m) for leaf in state.arrays.moments for m in leaf]
    arrays |= {f"state.moments.{i}": m for i, m in enumerate(moments)}
    return write(path, meta, arrays)


def load(path: str | Path) -> Any:
    """Read a model that `save` wrote, or a checkpoint.

    Parameters
    ----------
    path : path

    Returns
    -------
    estimator, or a Pipeline of the preprocessing and an estimator
        The model.  Its arrays are NumPy's; ``device`` and ``backend`` are those of the
        saved model.

    Raises
    ------
    ModelFileError
        If the file is not a model of this format, is damaged, or contains anything that
        `save` does not write.  Nothing in a file is executed.
    OSError
        If the file cannot be read.
    """
    with opened(path) as contents:
        model = _build(contents)
        if "preprocessing" in contents:
            model = make_pipeline(decode_transformer(contents), model)
        if contents.unread:
            raise ValueError(f"it has arrays that no model has: {sorted(contents.unread)}")
        return model


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Return the description of the model in a file; verify the file, but do not build the model.

    Parameters
    ----------
    path : path

    Returns
    -------
    dict
        ``format``, ``library_version``, ``estimator``; ``params``, ``fitted`` and ``network``
        as they are stored (``network`` is a list of layers, empty in files of the previous
        format); ``classes`` and ``feature_names``, arrays or None; ``notes``;
        ``preprocessing``, whether there is one; ``checkpoint``, whether training can be
        continued; and the arrays' ``shapes``, by name.

    Raises
    ------
    ModelFileError
        If the file is not a model of this format, or is damaged.
    OSError
        If the file cannot be read.
    """
    with opened(path) as contents:
        meta = contents.meta
        as_written = ("format", "library_version", "estimator", "params", "fitted", "notes")
        return {
            **{name: meta[name] for name in as_written},
            "network": meta.get("network", []),
            **{name: _read_labels(contents, name) for name in _LABELS},
            "preprocessing": "preprocessing" in contents,
            "checkpoint": "state" in meta,
            "shapes": contents.shapes,
        }


# ---------------------------------------------------------------- a model as JSON and arrays


def _describe(
    model: Any, preprocessing: Any, notes: dict[str, Any] | None
) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    check_is_fitted(model)
    if _ESTIMATORS.get(type(model).__name__) is not type(model):
        raise TypeError(f"only {' and '.join(_ESTIMATORS)} can be saved, got {type(model)}")
    meta: dict[str, Any] = {
        "library_version": __version__,
        "estimator": type(model).__name__,
        "params": {k: encode(k, v) for k, v in _writable_params(model).items()},
        "network": [encode("layers", layer) for layer in model.network_.layers],
        "fitted": {k: getattr(model, k) for k in _numbers(model) if hasattr(model, k)},
        "labels": {},
        "notes": notes or {},
    }
    arrays: dict[str, NDArray[Any]] = {}
    if isinstance(model, TabularModel):
        own, arrays = tabular.describe(model)
        meta |= own
    else:
        meta["loss"] = encode("loss", model._loss)
    _check(model)
    for value in (*meta["params"].values(), meta["network"], meta.get("loss")):
        try:  # fail now rather than in `load`
            decode(json.loads(json.dumps(value)))
        except (TypeError, ValueError) as error:
            raise TypeError(f"a model file could not be read again: {error}") from error
    arrays |= {f"params.{i}": to_host(a) for i, a in enumerate(model.params_)}
    for name, attribute in _LABELS.items():
        if hasattr(model, attribute):
            values = np.asarray(getattr(model, attribute))
            meta["labels"][name], arrays[name] = _encode_labels(attribute, values)
    for name in _CURVES:
        if getattr(model, name, None) is not None:
            arrays[name] = np.asarray(getattr(model, name), np.float64)
    if preprocessing is not None:
        arrays["preprocessing"] = encode_transformer(preprocessing)
    return meta, arrays


def _writable_params(model: Any) -> dict[str, Any]:
    params: dict[str, Any] = model.get_params(deep=False)
    try:
        encode("architecture", params.get("architecture"))
    except TypeError:
        params["architecture"] = Fixed(model.network_.layers)
    return params


def _build(contents: Contents) -> Any:
    meta = contents.meta
    model = _ESTIMATORS[meta["estimator"]](**{k: decode(v) for k, v in meta["params"].items()})
    numbers = _numbers(model)
    for name, value in meta["fitted"].items():
        if not isinstance(value, numbers[name]):
            raise ValueError(f"its {name} is {value!r}")
        setattr(model, name, value)
    for name in _CURVES:
        if name in contents:
            setattr(model, name, contents.array(name).tolist())
        elif "best_loss_" in meta["fitted"]:  # fitted in epochs, without a validation set
            setattr(model, name, None)
    if meta["format"] == OLD_FORMAT:
        model._adopt_plain({name: contents.arrays(name[:-1]) for name in OF_SCIKIT_LEARN})
    else:
        layers = tuple(decode(layer) for layer in meta["network"])
        if not all(isinstance(layer, Layer) for layer in layers):
            raise ValueError(f"its layers are {layers}")
        model.network_, model.params_ = Network(layers), contents.arrays("params")
    if isinstance(model, TabularModel):
        tabular.rebuild(model, contents)
    else:
        model._loss = decode(meta["loss"])
        model.n_features_in_, model.n_outputs_ = model.network_.n_in, model.network_.n_out
        model.n_layers_ = model.network_.n_linear + 1
        model.out_activation_ = model._loss.link_name
    for name, attribute in _LABELS.items():
        values = _read_labels(contents, name)
        if values is not None:
            setattr(model, attribute, values)
    _check(model)
    if "state" in meta:
        model._state = _build_state(model, contents)
    return model


def _numbers(model: Any) -> dict[str, Any]:
    """Return the names and types of a model's fitted values."""
    return tabular.numbers(model) if isinstance(model, TabularModel) else _NUMBERS


def _check(model: Any) -> None:
    """Raise a ValueError unless parameters and fitted attributes are consistent."""
    check_names(model.device, model.backend)
    arrays = model.params_
    shapes = [tuple(a.shape) for a in arrays]
    if [param.shape for param in model.network_.params] != shapes:
        raise ValueError(f"its weights are of shapes {shapes}, which are not those of its layers")
    kinds = {str(array.dtype).rpartition(".")[2] for array in arrays}
    if kinds not in ({"float32"}, {"float64"}):
        raise ValueError(f"the weights' data types are {kinds}")
    names = getattr(model, "feature_names_in_", None)
    if names is not None and (names.dtype != object or len(names) != model.n_features_in_):
        raise ValueError(f"the names {names} for {model.n_features_in_} columns")
    (tabular.check if isinstance(model, TabularModel) else _check_plain)(model)


def _check_plain(model: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they were shown at fit
        model._check_parameters()
        model._make_optimizer()
        model._make_schedule()
    model._network(model.n_features_in_, model.n_outputs_)
    if model._loss.link_name != model.out_activation_:
        raise ValueError(f"loss {model._loss} with outputs for {model.out_activation_!r}")
    if isinstance(model, estimators.MLPClassifier):
        classes = model.classes_
        wanted = len(classes) if model._multilabel or len(classes) > 2 else 1
        distinct = len(classes) > 0 and np.array_equal(np.unique(classes), classes)
        if model.n_outputs_ != wanted or not distinct:
            raise ValueError(f"{model.n_outputs_} outputs for the classes {classes}")


# ---------------------------------------------------------------- the state of training


def _build_state(model: Any, contents: Contents) -> State:
    meta = contents.meta["state"]
    optimizer, schedule = model._make_optimizer(), model._make_schedule()
    params = model.network_.params
    kinds = Treatments.of(params, optimizer, model.treatments).kinds
    layout = Layout.plan(params, kinds.get if meta["packed"] else None)
    leaves = contents.arrays("state.leaves")
    moments = contents.arrays("state.moments")
    n = optimizer.n_states
    shapes = list(layout.leaf_shapes)
    if [m.shape for m in moments] != [shape for shape in shapes for _ in range(n)]:
        raise ValueError("its moments are not those of its weights")
    if leaves and [leaf.shape for leaf in leaves] != shapes:
        raise ValueError("its last weights are not of the shapes of the best")
    memory = schedule.init()
    if memory is not None:
        memory = type(memory)(*meta["schedule"])
        if not all(isinstance(value, Real | None) for value in memory):
            raise ValueError(f"its schedule remembers {memory}")
    kind, position, *rest = meta["generator"]
    generator = (kind, contents.array("state.generator"), position, *rest)
    np.random.RandomState().set_state(generator)  # raises if it is not a valid state
    if not 0 <= position <= len(generator[1]):  # NumPy would read out of bounds
        raise ValueError(f"its random generator is at {position}")
    if meta["watched"] not in ("loss", "score"):
        raise ValueError(f"it watches {meta['watched']!r}")
    counts = {name: meta[name] for name in _COUNTS}
    begun = Begun(*meta["begun"])
    if not all(type(n) is int and n >= 0 for n in (*counts.values(), begun.steps, begun.rows)):
        raise ValueError(f"it counts {counts} and {begun}")
    return State(
        Arrays(leaves, [tuple(moments[i * n : (i + 1) * n]) for i in range(len(shapes))]),
        memory,
        origin=(optimizer, schedule, layout, meta["backend"], meta["dtype"]),
        generator=generator,
        begun=begun._replace(loss=float(begun.loss)),
        watched=meta["watched"],
        best=float(meta["best"]),
        history=[
            Epoch(int(epoch), *numbers)
            for epoch, *numbers in contents.array("state.history").tolist()
        ],
        **counts,
    )


# ---------------------------------------------------------------- labels


def _encode_labels(name: str, values: NDArray[Any]) -> tuple[str, NDArray[Any]]:
    """Return a kind and an array of numbers: strings as code points, uint32 (n, length)."""
    kind = values.dtype.kind
    if kind in "iuf":
        return "numbers", values
    if kind == "b":
        return "booleans", values.astype(np.uint8)
    texts = np.asarray(values, np.str_) if all(isinstance(v, str) for v in values) else values
    if texts.dtype.kind != "U" or texts.tolist() != values.tolist():
        raise TypeError(f"{name}: only numbers, booleans and texts can be saved, got {values!r}")
    codes = np.ascontiguousarray(texts)[:, None].view(np.uint32)
    return "objects" if kind == "O" else "texts", codes


def _read_labels(contents: Contents, name: str) -> NDArray[Any] | None:
    kind = contents.meta["labels"].get(name)
    if kind is None:
        return None
    values = contents.array(name)
    if kind == "numbers":
        return values
    if kind == "booleans":
        return values.astype(bool)
    if values.dtype != np.uint32 or values.max(initial=0) > 0x10FFFF:
        raise ValueError(f"its {name} are not characters")
    texts = values.view(f"<U{values.shape[1]}")[:, 0]
    return {"texts": texts, "objects": texts.astype(object)}[kind]
