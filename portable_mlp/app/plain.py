"""The plain network of the command line: its options, and its training in a run."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from math import ceil
from threading import Event
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.preprocessing import StandardScaler

from portable_mlp import Checkpoint, MLPClassifier, MLPRegressor, load
from portable_mlp.app import folder
from portable_mlp.app.dataset import Dataset
from portable_mlp.app.run import History, Trained, named_shortage, scales_target
from portable_mlp.app.settings import Settings, changed, settings_table
from portable_mlp.callbacks import Callback, Epoch, Progress
from portable_mlp.preprocessing import make_preprocessing, model_input
from portable_mlp.training.pauses import deferred_interrupt
from portable_mlp.typing import Array

# Settings that the estimators reject or ignore with L-BFGS.  Here all of them are rejected, with
# the name of the option: silently ignoring a setting would hide mistakes
_OF_STEPS = (
    "learning_rate", "schedule", "batch_size", "clip_norm", "weight_decay", "dropout",
    "checkpoint_every",
)  # fmt: skip


def check_settings(settings: Settings, resume: bool) -> None:
    """Raise a ValueError if options do not go together."""
    if resume and settings.checkpoint_every is None:
        raise ValueError(f"{settings.out} was begun without --checkpoint-every: begin anew")
    if settings.optimizer == "lbfgs":
        for option in changed(settings, _OF_STEPS):
            raise ValueError(f"{option} is for the other optimizers: lbfgs takes all rows at once")
    if settings.optimizer != "sgd":
        for option in changed(settings, ["momentum"]):
            raise ValueError(f"{option} is for --optimizer sgd, not for {settings.optimizer}")


def check_rows(settings: Settings, data: Dataset) -> None:
    """Raise a ValueError if there are too few rows."""
    if settings.stops_early and len(data.y) <= 10:  # a tenth, rounded up, has to be two
        raise ValueError(f"{len(data.y)} rows are too few to hold some out: --no-early-stopping")


def fit(settings: Settings, data: Dataset, resume: bool, say: Callable[[str], None]) -> Trained:
    """Train a plain network on a table.

    Parameters are those of `portable_mlp.app.train.train`.
    """
    preprocessing = make_preprocessing(
        data.X,
        data.used,
        scale=settings.scaling,
        by_name=data.by_name,
        n_classes=len(np.unique(data.y)) if data.classify else None,
        seed=settings.seed,
    )
    numbers = preprocessing.fit_transform(model_input(data.X, data.by_name), data.y)
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
    history = History(model._state.history if hasattr(model, "_state") else ())
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
    shortage = (
        f"lower --batch-size (now {_batch_size(settings, len(y))}) or --hidden (now"
        f" {','.join(map(str, settings.hidden))}), or use --device cpu"
    )
    with named_shortage(shortage), warnings.catch_warnings():
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
    kept = None
    if settings.stops_early and history.epochs:
        scores = [epoch.validation_score for epoch in history.epochs]
        kept = history.epochs[int(np.nanargmax(scores))].epoch
    return Trained(preprocessing, model, history.epochs, kept, interrupted)


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


class _StopWhen(Callback):
    """Callback that stops training after the epoch in which an event is set."""

    def __init__(self, event: Event) -> None:
        self._event = event

    def on_epoch_end(self, epoch: Epoch, params: Callable[[], list[Array]]) -> bool:
        return self._event.is_set()
