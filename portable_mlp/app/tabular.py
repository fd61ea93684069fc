"""The model for tables of the command line, and its training in a run."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from portable_mlp import TabularClassifier, TabularRegressor
from portable_mlp.app import folder
from portable_mlp.app.dataset import Dataset
from portable_mlp.app.evaluation import Evaluation
from portable_mlp.app.run import History, Trained, named_shortage
from portable_mlp.app.settings import Settings
from portable_mlp.callbacks import Progress
from portable_mlp.preprocessing import model_input


def fit(settings: Settings, data: Dataset, say: Callable[[str], None]) -> Trained:
    """Train a model for tables; parameters are those of `portable_mlp.app.train.train`."""
    history = History()
    given: dict[str, Any] = {
        "preset": settings.preset,
        "time_limit": settings.time_limit,
        "random_state": settings.seed,
        "dtype": settings.dtype,
        "device": settings.where.device,
        "backend": settings.where.backend,
        "callbacks": [history, Progress(full=True, looks_only=True)],
    }
    model: Any = TabularRegressor(**given)
    if data.classify:
        weight = None if settings.class_weight == "none" else settings.class_weight
        model = TabularClassifier(**given, class_weight=weight)
    if data.by_name:
        X = model_input(data.X.select(data.used), by_name=True)
    else:
        X = model_input(data.X, by_name=False).copy()
        # What is missing in all training rows is not used; the other columns keep their places
        X[:, [name in data.dropped for name in data.X.columns]] = np.nan
    with named_shortage("use --device cpu, or --model plain"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Training interrupted")
        model.fit(X, data.y)
    (settings.out / folder.CHECKPOINT).unlink(missing_ok=True)  # left by another run
    model.set_params(callbacks=None)
    if model.unused_columns_:
        names = [data.X.columns[c] if isinstance(c, int) else c for c in model.unused_columns_]
        say(f"of no use, by the held-out rows: {', '.join(names)}")
    interrupted = model.stop_reason_ == "interrupted"
    # If the last fit was interrupted soon, the model is that of the one before
    epochs = next(
        fit
        for fit in reversed(history.fits)
        if np.array_equal([epoch.loss for epoch in fit], model.loss_curve_, equal_nan=True)
    )
    return Trained(None, model, epochs, model.best_epoch_, interrupted)


def out_of_fold(model: Any, y: NDArray[Any]) -> Evaluation:
    """Return the predictions of the training rows by the members that did not see them."""
    p = model.oof_predictions_
    if not hasattr(model, "classes_"):
        return Evaluation(np.asarray(y, np.float64), p, None, None)
    return Evaluation(y, model.classes_[p.argmax(axis=1)], model.classes_, p)
