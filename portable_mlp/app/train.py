"""Training from the command line: from the settings to a run, and the files in its folder."""

from __future__ import annotations

import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import ceil
from threading import Event
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from portable_mlp import Checkpoint, MLPClassifier, MLPRegressor, get_backend, load
from portable_mlp.app import folder
from portable_mlp.app.dataset import Dataset, read
from portable_mlp.app.evaluation import evaluate, importances
from portable_mlp.app.overview import columns_table
from portable_mlp.app.run import Run, scales_target
from portable_mlp.app.settings import Settings, settings_table
from portable_mlp.backends import is_out_of_memory
from portable_mlp.callbacks import Callback, Epoch, Progress
from portable_mlp.preprocessing import make_preprocessing, model_input
from portable_mlp.training.pauses import deferred_interrupt
from portable_mlp.typing import Array

_OF_LABELS = ("class_weight", "label_smoothing")
# Settings that the estimators reject or ignore with L-BFGS.  Here all of them are rejected, with
# the name of the option: silently ignoring a setting would hide mistakes
_OF_STEPS = (
    "learning_rate", "schedule", "batch_size", "clip_norm", "weight_decay", "dropout",
    "checkpoint_every",
)  # fmt: skip


def train(settings: Settings, *, resume: bool = False, say: Callable[[str], None] = print) -> Run:
    """Train a model according to the settings, and write the run's folder.

    Parameters
    ----------
    settings : Settings
    resume : bool, default=False
        Whether to continue from the checkpoint in the folder, if there is one.
    say : callable
        Function that is called with each message on the progress of the run.

    Returns
    -------
    Run

    Raises
    ------
    ValueError
        If the settings or the data are not valid.
    KeyboardInterrupt
        If interrupted before the first epoch has ended, or after training, when the model is
        saved already.  An interrupt in between ends training; the run is written, and its
        ``interrupted`` is True.
    MemoryError
        If memory runs out in training; the message says which options to lower.
    """
    began = time.perf_counter()
    _check_optimizer(settings)
    if resume and settings.checkpoint_every is None:
        raise ValueError(f"{settings.out} was begun without --checkpoint-every: begin anew")
    data = read(settings)
    _check_task(settings, data)
    if settings.stops_early and len(data.y) <= 10:  # a tenth, rounded up, has to be two
        raise ValueError(f"{len(data.y)} rows are too few to hold some out: --no-early-stopping")
    say(
        f"{'classification' if data.classify else 'regression'} of {data.target}:"
        f" {len(data.y)} rows to train on, {len(data.y_test)} to test, {len(data.used)} columns"
    )
    for note in data.notes:
        say(note)
    say(columns_table(data, shutil.get_terminal_size().columns))
    get_backend(settings.where.device, settings.where.backend)
    folder.check_writable(settings.out)
    preprocessing = make_preprocessing(
        data.X,
        data.used,
        scale=settings.scaling,
        by_name=data.by_name,
        n_classes=len(np.unique(data.y)) if data.classify else None,
        seed=settings.seed,
    )
    numbers = preprocessing.fit_transform(model_input(data.X, data.by_name), data.y)
    model, history, interrupted = _fit(settings, data, numbers, resume, say)
    if interrupted and not history:
        raise KeyboardInterrupt

    with deferred_interrupt() as late:  # an interrupt waits until the model is saved
        folder.write_model(settings, data, preprocessing, model, history)
    if late.is_set():
        raise KeyboardInterrupt
    pipeline = make_pipeline(preprocessing, model)
    test = data.X_test, data.y_test
    run = Run(
        settings,
        data,
        pipeline,
        history,
        evaluate(pipeline, data.X, data.y, by_name=data.by_name),
        evaluate(pipeline, *test, by_name=data.by_name),
        importances(pipeline, *test, data.used, by_name=data.by_name, seed=settings.seed, say=say)
        if settings.importance
        else [],
        time.perf_counter() - began,
        interrupted,
    )
    folder.write_results(run)
    for name, scores in (("train", run.training.scores()), ("test ", run.test.scores())):
        metric, value = next(iter(scores.items()))
        say(f"{name} {metric} {value:.4f}")
    say(f"model:          {settings.out / folder.MODEL}")
    if history:
        say(f"learning curve: {settings.out / folder.CURVE}")
    say(f"report:         {settings.out / folder.REPORT}")
    return run


def _changed(settings: Settings, names: Sequence[str]) -> Iterator[str]:
    """Yield the options, of the settings in ``names``, that differ from their default."""
    default = Settings()
    for name in names:
        if getattr(settings, name) != getattr(default, name):
            yield f"--{name.replace('_', '-')}"


def _check_optimizer(settings: Settings) -> None:
    """Raise a ValueError if an option is set that the optimizer does not use."""
    if settings.optimizer == "lbfgs":
        for option in _changed(settings, _OF_STEPS):
            raise ValueError(f"{option} is for the other optimizers: lbfgs takes all rows at once")
    if settings.optimizer != "sgd":
        for option in _changed(settings, ["momentum"]):
            raise ValueError(f"{option} is for --optimizer sgd, not for {settings.optimizer}")


def _check_task(settings: Settings, data: Dataset) -> None:
    """Raise a ValueError if an option is set that only applies to the other kind of task."""
    kinds = "regression", "classification"
    for option in _changed(settings, _OF_LABELS if not data.classify else ["loss"]):
        other, this = kinds if data.classify else kinds[::-1]
        minimised = ", which minimises the cross-entropy" if data.classify else ""
        raise ValueError(f"{option} is for a {other}: this is a {this} of {data.target}{minimised}")


def _fit(
    settings: Settings,
    data: Dataset,
    numbers: NDArray[Any],
    resume: bool,
    say: Callable[[str], None],
) -> tuple[Any, list[Epoch], bool]:
    """Fit a model; return it, its history, and whether training was interrupted."""
    y, scaler = data.y, None
    if scales_target(settings, data):
        scaler = StandardScaler()
        y = scaler.fit_transform(y.reshape(-1, 1).astype(np.float64))[:, 0]
        if settings.dtype == "float32" and abs(scaler.mean_[0]) > 1e5 * scaler.scale_[0]:
            say(f"{data.target} varies little around {scaler.mean_[0]:.5g}: use --dtype float64")
    checkpoint = settings.out / folder.CHECKPOINT
    if resume and checkpoint.exists():
        folder.check_same(settings, data, checkpoint)
        model = load(checkpoint)
    else:
        checkpoint.unlink(missing_ok=True)  # left by another run
        model = _new_model(settings, data)
    history = _History(model._state.history if hasattr(model, "_state") else ())
    watching: list[Callback] = [history, Progress(full=True)]
    if settings.checkpoint_every is not None:
        folder.write_settings(settings)  # for --resume
        notes = {"settings": settings_table(settings), "digests": data.digests}
        watching.append(Checkpoint(checkpoint, settings.checkpoint_every, notes=notes))
    model.set_params(
        callbacks=watching,
        max_iter=settings.epochs,
        device=settings.where.device,
        backend=settings.where.backend,
        scoring=_log_score if data.classify and settings.stops_early else None,
    )
    with _named_shortage(settings, len(y)), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.filterwarnings("ignore", "Training interrupted")
        if settings.optimizer == "lbfgs":
            # The other solvers handle interrupts themselves
            with deferred_interrupt() as event:
                watching.append(_StopWhen(event))
                model.fit(numbers, y)
                interrupted = event.is_set()
        else:
            model.continue_fit(numbers, y)  # a new model starts from the beginning
            interrupted = model.stop_reason_ == "interrupted"
    model.set_params(callbacks=None, scoring=None)
    if scaler is not None:
        # y = mean + scale · ŷ is linear, so it can be folded into the output layer; scalars of
        # the weights' dtype, since a float64 scalar of NumPy's would promote float32
        real = model.coefs_[-1].dtype.type
        model.coefs_[-1] *= real(scaler.scale_[0])
        model.intercepts_[-1] *= real(scaler.scale_[0])
        model.intercepts_[-1] += real(scaler.mean_[0])
    return model, history.epochs, interrupted


def _new_model(settings: Settings, data: Dataset) -> Any:
    estimator: Any = MLPRegressor
    own: dict[str, Any] = {} if settings.loss is None else {"loss": settings.loss}
    if data.classify:
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
        batch_size=_batch_size(settings, len(data.y)),
        dropout=settings.dropout,
        early_stopping=settings.stops_early,
        n_iter_no_change=settings.patience,
        random_state=settings.seed,
        dtype=settings.dtype,
    )


def _log_score(model: Any, X: Any, y: NDArray[Any], sample_weight: Any = None) -> float:
    """Return the mean log-likelihood of the labels, weighted as in training.

    On few held-out rows, accuracy changes too rarely to decide when to stop, and
    scikit-learn's "neg_log_loss" requires every class among them.
    """
    logs = model.predict_log_proba(X)
    found = logs[np.arange(len(y)), np.searchsorted(model.classes_, y)]
    return float(np.average(found, weights=sample_weight))


def _batch_size(settings: Settings, n_rows: int) -> int:
    used = n_rows - ceil(0.1 * n_rows) if settings.stops_early else n_rows
    return min(settings.batch_size or min(max(n_rows // 100, 32), 1024), used)


# ------------------------------------------------------------------ while it runs


class _History(Callback):
    """Callback that collects all epochs, including those before a checkpoint."""

    def __init__(self, before: Sequence[Epoch]) -> None:
        self.epochs = list(before)

    def on_epoch_end(self, epoch: Epoch, params: Callable[[], list[Array]]) -> None:
        self.epochs.append(epoch)


class _StopWhen(Callback):
    """Callback that stops training after the epoch in which an event is set."""

    def __init__(self, event: Event) -> None:
        self._event = event

    def on_epoch_end(self, epoch: Epoch, params: Callable[[], list[Array]]) -> bool:
        return self._event.is_set()


@contextmanager
def _named_shortage(settings: Settings, n_rows: int) -> Iterator[None]:
    """Turn out-of-memory errors into a MemoryError that says which options to lower."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryError(
            f"out of memory in training: lower --batch-size (now {_batch_size(settings, n_rows)})"
            f" or --hidden (now {','.join(map(str, settings.hidden))}), or use --device cpu"
        ) from error
