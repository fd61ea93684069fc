"""A training run: from settings to the folder it leaves, and on from a checkpoint."""

from __future__ import annotations

import csv
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import file_digest
from math import ceil
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import train_test_split
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.multiclass import type_of_target

from portable_mlp import Checkpoint, MLPClassifier, MLPRegressor, get_backend, load, save
from portable_mlp.backends import is_out_of_memory
from portable_mlp.callbacks import Callback, Epoch, Progress
from portable_mlp.config import Training, settings_table, to_toml
from portable_mlp.data import PENGUINS, bundled_table, is_array_file, read_table, split_target
from portable_mlp.evaluation import Evaluation, Importance, evaluate, importances
from portable_mlp.files import replacing
from portable_mlp.losses import LOSSES
from portable_mlp.pauses import deferred_interrupt
from portable_mlp.persistence import read_metadata
from portable_mlp.plots import figure
from portable_mlp.preprocessing import (
    check_finite,
    column_kinds,
    make_preprocessing,
    model_input,
    nearly_numbers,
    useless_columns,
)
from portable_mlp.report import learning_curves, report
from portable_mlp.typing import Array

MODEL, HISTORY, SETTINGS = "model.safetensors", "history.csv", "config.toml"
CURVE, REPORT = "learning_curve.png", "report.html"
_CHECKPOINT = "checkpoint.safetensors"
_MAY_CHANGE = {"epochs", "device", "backend", "checkpoint_every", "out"}  # on the way


@dataclass(frozen=True)
class Table:
    """Rows to train and to test on.

    Attributes
    ----------
    X, X_test : polars.DataFrame
    y, y_test : ndarray
    target, target_kind : str
        The name of y, and its kind.
    kinds, dropped : dict
        Of the columns, by name: what they are, and why some are not used.
    by_name : bool
        Whether the columns have names, and not their positions alone.
    digests : dict
        SHA-256 of the files.
    classify : bool
    """

    X: pl.DataFrame
    y: NDArray[Any]
    X_test: pl.DataFrame
    y_test: NDArray[Any]
    target: str
    target_kind: str
    kinds: dict[str, str]
    dropped: dict[str, str]
    by_name: bool
    digests: dict[str, str]
    classify: bool

    @property
    def used(self) -> list[str]:
        """The columns that the network sees."""
        return [name for name in self.kinds if name not in self.dropped]


@dataclass(frozen=True)
class Run:
    """What a run came to, for the report."""

    settings: Training
    table: Table
    model: Pipeline
    history: list[Epoch]
    training: Evaluation
    test: Evaluation
    importances: list[Importance]
    seconds: float
    interrupted: bool

    @property
    def scaled_target(self) -> bool:
        """Whether the network saw the target scaled."""
        return _scales_target(self.settings, self.table)


def read(settings: Training) -> Table:
    """The rows that settings name, split in two.

    Raises
    ------
    ValueError
        If the table cannot be learned from; the message says why.
    """
    if settings.data:
        source = ", ".join(map(str, settings.data))
        frame = read_table(settings.data, settings.target)
    else:
        source, frame = settings.dataset, bundled_table(settings.dataset)
    X, y, target = split_target(frame, settings.target, source)
    check_finite(X)
    classify = _is_classification(settings.task, y)
    if classify:
        _check_classes(target, y)
    elif y.dtype.kind not in "iufb":
        raise ValueError(f"the target {target!r} is no number: use --task classification")
    train, test = _split(settings, y, classify)
    kinds, dropped = column_kinds(X), useless_columns(X[train])
    if len(dropped) == len(kinds):
        raise ValueError(
            f"{source}: all columns are constant or empty: there is nothing to learn from"
        )
    return Table(
        X[train], y[train], X[test], y[test], target, column_kinds(frame)[target], kinds, dropped,
        by_name=_has_names(settings) or not {"category", "date"}.isdisjoint(kinds.values()),
        digests={str(path): _digest(path) for path in settings.data},
        classify=classify,
    )  # fmt: skip


def _has_names(settings: Training) -> bool:
    if settings.data:
        return not any(map(is_array_file, settings.data))
    return settings.dataset == PENGUINS.stem


def _is_classification(task: str, y: NDArray[Any]) -> bool:
    if task != "auto":
        return task == "classification"
    few = y.dtype.kind in "iu" and len(np.unique(y)) <= 20
    return y.dtype.kind in "bUO" or few or type_of_target(y) == "binary"


def _check_classes(target: str, y: NDArray[Any]) -> None:
    classes, counts = np.unique(y, return_counts=True)
    if len(classes) < 2:
        raise ValueError(
            f"the target {target!r} has one class only, {classes[0]}: there is nothing to learn"
        )
    if counts.min() < 2:
        raise ValueError(
            f"the target {target!r} has a class of one row, {classes[counts.argmin()]}: there"
            " have to be two at least, to train and to test on"
        )


def _split(settings: Training, y: NDArray[Any], classify: bool) -> tuple[Any, Any]:
    """The rows to train on, and those to test on."""
    said = f"--test-fraction {settings.test_fraction} of {len(y)} rows"
    try:
        train, test = train_test_split(
            np.arange(len(y)),
            test_size=settings.test_fraction,
            random_state=settings.seed,
            stratify=y if classify else None,
        )
    except ValueError as error:
        raise ValueError(f"{said} cannot be held back: {error}") from error
    if classify and (lost := np.setdiff1d(y, y[train])).size:
        raise ValueError(f"{said} leaves none to train on of the class {lost[0]}: lower it")
    return train, test


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return file_digest(file, "sha256").hexdigest()


# ------------------------------------------------------------------ training


def train(settings: Training, *, resume: bool = False, say: Callable[[str], None] = print) -> Run:
    """Train as the settings say, and write the run's folder.

    Parameters
    ----------
    settings : Training
    resume : bool, default=False
        Go on from the checkpoint in the folder, if there is one.
    say : callable
        Is told what happens.

    Returns
    -------
    Run

    Raises
    ------
    KeyboardInterrupt
        If interrupted before there was a model.  After that the run is written as far
        as it came; it is ``interrupted``.
    """
    began = time.perf_counter()
    if settings.optimizer == "lbfgs" and settings.checkpoint_every is not None:
        raise ValueError("--checkpoint-every is for the other optimizers: lbfgs cannot go on")
    if resume and settings.checkpoint_every is None:
        raise ValueError(f"{settings.out} was begun without --checkpoint-every: begin anew")
    table = read(settings)
    _check_task(settings, table)
    if _stops_early(settings) and len(table.y) <= 10:  # a tenth has to be two
        raise ValueError(f"{len(table.y)} rows are too few to hold some out: --no-early-stopping")
    say(
        f"{'classification' if table.classify else 'regression'} of {table.target}:"
        f" {len(table.y)} rows to train on, {len(table.y_test)} to test, {len(table.used)} columns"
    )
    if table.dropped:
        say("dropped: " + ", ".join(f"{name} ({why})" for name, why in table.dropped.items()))
    rows = pl.concat([table.X, table.X_test]).select(table.used)
    for name, values in nearly_numbers(rows).items():
        say(f"{name}: taken as text, for not all values are numbers: {', '.join(values)}")
    get_backend(settings.where.device, settings.where.backend)
    _check_writable(settings.out)
    preprocessing = make_preprocessing(
        table.X, table.used, scale=settings.scaling, by_name=table.by_name
    )
    numbers = preprocessing.fit_transform(model_input(table.X, table.by_name))
    model, history, interrupted = _fit(settings, table, numbers, resume, say)
    if interrupted and not history:
        raise KeyboardInterrupt

    out = settings.out
    notes = {
        "target": table.target,
        "target_kind": table.target_kind,
        "columns": table.kinds,
        "dropped": table.dropped,
        "by_name": table.by_name,
        "settings": settings_table(settings),
    }
    with deferred_interrupt() as late:  # what took hours is not lost in its last second
        save(model, out / MODEL, preprocessing, notes=notes)
        _write_history(out / HISTORY, history)
        _write(out / SETTINGS, to_toml(settings))
    if late.is_set():
        raise KeyboardInterrupt
    pipeline = make_pipeline(preprocessing, model)
    test = table.X_test, table.y_test
    run = Run(
        settings,
        table,
        pipeline,
        history,
        evaluate(pipeline, table.X, table.y, by_name=table.by_name),
        evaluate(pipeline, *test, by_name=table.by_name),
        importances(pipeline, *test, table.used, by_name=table.by_name, seed=settings.seed),
        time.perf_counter() - began,
        interrupted,
    )
    if history:
        picture = figure(figsize=(7.0, 4.0), layout="constrained")
        learning_curves(run, picture.subplots())
        with replacing(out / CURVE) as beside:
            picture.savefig(beside, dpi=150)
    _write(out / REPORT, report(run))
    for name, scores in (("train", run.training.scores()), ("test ", run.test.scores())):
        metric, value = next(iter(scores.items()))
        say(f"{name} {metric} {value:.4f}")
    say(f"model:          {out / MODEL}")
    if history:
        say(f"learning curve: {out / CURVE}")
    say(f"report:         {out / REPORT}")
    return run


def _check_task(settings: Training, table: Table) -> None:
    """Raise a ValueError if something is set that is for the other kind of task."""
    default, kinds = Training(), ("regression", "classification")
    for name in ("loss",) if table.classify else ("class_weight", "label_smoothing"):
        if getattr(settings, name) != getattr(default, name):
            other, this = kinds if table.classify else kinds[::-1]
            minimised = ", which minimises the cross-entropy" if table.classify else ""
            raise ValueError(
                f"--{name.replace('_', '-')} is for a {other}: this is a {this} of"
                f" {table.target}{minimised}"
            )


def _scales_target(settings: Training, table: Table) -> bool:
    """Whether the target is scaled: it is a number that the loss takes as the output itself."""
    if table.classify or not settings.scaling:
        return False
    loss = LOSSES[settings.loss or MLPRegressor().loss]
    return loss.link_name == "identity" and not loss.nonnegative


def _fit(
    settings: Training,
    table: Table,
    numbers: NDArray[Any],
    resume: bool,
    say: Callable[[str], None],
) -> tuple[Any, list[Epoch], bool]:
    """The model, its history, and whether it was interrupted."""
    y, scaler = table.y, None
    if _scales_target(settings, table):
        scaler = StandardScaler()
        y = scaler.fit_transform(y.reshape(-1, 1).astype(np.float64))[:, 0]
        if settings.dtype == "float32" and abs(scaler.mean_[0]) > 1e5 * scaler.scale_[0]:
            say(f"{table.target} varies little around {scaler.mean_[0]:.5g}: use --dtype float64")
    checkpoint = settings.out / _CHECKPOINT
    if resume and checkpoint.exists():
        _check_same(settings, table, checkpoint)
        model = load(checkpoint)
    else:
        checkpoint.unlink(missing_ok=True)  # another run's is none of this
        model = _new_model(settings, table)
    history = _History(model._state.history if hasattr(model, "_state") else ())
    watching: list[Callback] = [history, Progress(full=True)]
    if settings.checkpoint_every is not None:
        _write(settings.out / SETTINGS, to_toml(settings))  # for --resume
        notes = {"settings": settings_table(settings), "digests": table.digests}
        watching.append(Checkpoint(checkpoint, settings.checkpoint_every, notes=notes))
    model.set_params(
        callbacks=watching,
        max_iter=settings.epochs,
        device=settings.where.device,
        backend=settings.where.backend,
        scoring=_log_score if table.classify and _stops_early(settings) else None,
    )
    with _named_shortage(settings, len(y)), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.filterwarnings("ignore", "Training interrupted")
        if settings.optimizer == "lbfgs":
            # The other solvers see to interrupts themselves
            with deferred_interrupt() as event:
                watching.append(_StopWhen(event))
                model.fit(numbers, y)
                interrupted = event.is_set()
        else:
            model.continue_fit(numbers, y)  # on a new model, it begins
            interrupted = model.stop_reason_ == "interrupted"
    model.set_params(callbacks=None, scoring=None)
    if scaler is not None:
        # y = mean + scale · ŷ is linear: the output layer can do it itself
        real = model.coefs_[-1].dtype.type
        model.coefs_[-1] *= real(scaler.scale_[0])
        model.intercepts_[-1] *= real(scaler.scale_[0])
        model.intercepts_[-1] += real(scaler.mean_[0])
    return model, history.epochs, interrupted


def _new_model(settings: Training, table: Table) -> Any:
    estimator: Any = MLPRegressor
    own: dict[str, Any] = {} if settings.loss is None else {"loss": settings.loss}
    if table.classify:
        estimator = MLPClassifier
        own["label_smoothing"] = settings.label_smoothing
        own["class_weight"] = None if settings.class_weight == "none" else settings.class_weight
    return estimator(
        **own,
        hidden_layer_sizes=settings.hidden,
        activation=settings.activation,
        solver=settings.optimizer,
        learning_rate=settings.schedule,
        learning_rate_init=settings.learning_rate,
        momentum=settings.momentum,
        clip_norm=settings.clip_norm,
        alpha=settings.alpha,
        weight_decay=settings.weight_decay,
        batch_size=_batch_size(settings, len(table.y)),
        dropout=settings.dropout,
        early_stopping=_stops_early(settings),
        n_iter_no_change=settings.patience,
        random_state=settings.seed,
        dtype=settings.dtype,
    )


def _stops_early(settings: Training) -> bool:
    return settings.early_stopping and settings.optimizer != "lbfgs"


def _log_score(model: Any, X: Any, y: NDArray[Any], sample_weight: Any = None) -> float:
    """Mean log-likelihood of labels, weighted as in training.

    On few held-out rows accuracy changes too rarely to stop by, and scikit-learn's
    "neg_log_loss" wants every class among them.
    """
    logs = model.predict_log_proba(X)
    found = logs[np.arange(len(y)), np.searchsorted(model.classes_, y)]
    return float(np.average(found, weights=sample_weight))


def _batch_size(settings: Training, n_rows: int) -> int:
    used = n_rows - ceil(0.1 * n_rows) if _stops_early(settings) else n_rows
    return min(settings.batch_size or min(max(n_rows // 100, 32), 1024), used)


def _check_writable(folder: Path) -> None:
    # Before training, not after it
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def _check_same(settings: Training, table: Table, checkpoint: Path) -> None:
    """Raise a ValueError if a checkpoint is not of these settings, or of other data."""
    notes = read_metadata(checkpoint)["notes"]
    # A run begun before an option was there had its default
    then = settings_table(Training()) | notes["settings"]
    now = json.loads(json.dumps(settings_table(settings)))
    changed = {name for name in then.keys() | now.keys() if then.get(name) != now.get(name)}
    if changed - _MAY_CHANGE:
        raise ValueError(
            f"a run that goes on cannot change {', '.join(sorted(changed - _MAY_CHANGE))}"
        )
    other = [path for path, digest in table.digests.items() if notes["digests"].get(path) != digest]
    if other:
        raise ValueError(f"{', '.join(other)}: not the rows that the run began with")


def _write(path: Path, text: str) -> None:
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


def _write_history(path: Path, history: Sequence[Epoch]) -> None:
    with replacing(path) as beside, open(beside, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(Epoch._fields)
        writer.writerows(history)


# ------------------------------------------------------------------ while it runs


class _History(Callback):
    """All epochs, those before a checkpoint included."""

    def __init__(self, before: Sequence[Epoch]) -> None:
        self.epochs = list(before)

    def on_epoch_end(self, epoch: Epoch, params: Callable[[], list[Array]]) -> None:
        self.epochs.append(epoch)


class _StopWhen(Callback):
    """Stops after the epoch in which an event is set."""

    def __init__(self, event: Event) -> None:
        self._event = event

    def on_epoch_end(self, epoch: Epoch, params: Callable[[], list[Array]]) -> bool:
        return self._event.is_set()


@contextmanager
def _named_shortage(settings: Training, n_rows: int) -> Iterator[None]:
    """When memory runs out, say what to lower."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryError(
            f"out of memory in training: lower --batch-size (now {_batch_size(settings, n_rows)})"
            f" or --hidden (now {','.join(map(str, settings.hidden))}), or use --device cpu"
        ) from error
