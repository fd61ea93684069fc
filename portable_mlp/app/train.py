"""Training from the command line: from the settings to a run, and the files in its folder."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable

from portable_mlp import get_backend
from portable_mlp.app import folder, plain, tabular
from portable_mlp.app.dataset import Dataset, read
from portable_mlp.app.evaluation import evaluate, importances
from portable_mlp.app.overview import columns_table
from portable_mlp.app.run import Run
from portable_mlp.app.settings import Settings, changed, with_model
from portable_mlp.training.pauses import deferred_interrupt

_OF_LABELS = ("class_weight", "label_smoothing")


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
        ``trained.interrupted`` is True.
    MemoryError
        If memory runs out in training; the message says which options to lower.
    """
    began = time.perf_counter()
    settings = with_model(settings)
    is_plain = settings.model == "plain"
    if is_plain:
        plain.check_settings(settings, resume)
    elif resume:
        raise ValueError(f"{settings.out}: only a run with --model plain can be resumed")
    data = read(settings)
    _check_task(settings, data)
    if is_plain:
        plain.check_rows(settings, data)
    say(
        f"{'classification' if data.classify else 'regression'} of {data.target}:"
        f" {len(data.y)} rows to train on, {len(data.y_test)} to test, {len(data.used)} columns"
    )
    for note in data.notes:
        say(note)
    say(columns_table(data, shutil.get_terminal_size().columns))
    get_backend(settings.where.device, settings.where.backend)
    folder.check_writable(settings.out)
    if is_plain:
        trained = plain.fit(settings, data, resume, say)
    else:
        trained = tabular.fit(settings, data, say)
    if trained.interrupted and not trained.history:
        raise KeyboardInterrupt

    with deferred_interrupt() as late:  # an interrupt waits until the model is saved
        folder.write_model(settings, data, trained)
    if late.is_set():
        raise KeyboardInterrupt
    model, by_name, test = trained.model, data.by_name, (data.X_test, data.y_test)
    run = Run(
        settings,
        data,
        trained,
        evaluate(model, data.X, data.y, by_name=by_name)
        if is_plain
        else tabular.out_of_fold(trained.estimator, data.y),
        evaluate(model, *test, by_name=by_name),
        importances(model, *test, data.used, by_name=by_name, seed=settings.seed, say=say)
        if settings.importance
        else [],
        time.perf_counter() - began,
    )
    folder.write_results(run)
    names = ("train", "test ") if is_plain else ("out of fold", "test       ")
    for name, scores in zip(names, (run.training.scores(), run.test.scores()), strict=True):
        metric, value = next(iter(scores.items()))
        say(f"{name} {metric} {value:.4f}")
    say(f"model:          {settings.out / folder.MODEL}")
    if run.history:
        say(f"learning curve: {settings.out / folder.CURVE}")
    say(f"report:         {settings.out / folder.REPORT}")
    return run


def _check_task(settings: Settings, data: Dataset) -> None:
    """Raise a ValueError if an option is set that only applies to the other kind of task."""
    kinds = "regression", "classification"
    for option in changed(settings, _OF_LABELS if not data.classify else ["loss"]):
        other, this = kinds if data.classify else kinds[::-1]
        minimised = ", which minimises the cross-entropy" if data.classify else ""
        raise ValueError(f"{option} is for a {other}: this is a {this} of {data.target}{minimised}")
