"""Prediction for tables of any length: they are read, predicted and written in chunks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from polars.io.plugins import register_io_source
from sklearn.pipeline import Pipeline

from portable_mlp import load
from portable_mlp.app.evaluation import Evaluation, evaluate
from portable_mlp.app.reading.columns import Reading
from portable_mlp.app.table import read_chunks, split_target
from portable_mlp.backends import is_out_of_memory
from portable_mlp.persistence import read_metadata
from portable_mlp.persistence.files import replacing
from portable_mlp.preprocessing import model_input
from portable_mlp.training.pauses import deferred_interrupt

_NUMBERS = 2**18  # rows × columns in a chunk of the table


class Stored(NamedTuple):
    """Loaded model, and the description of the table that it was trained on.

    Attributes
    ----------
    pipeline : Pipeline
        Preprocessing and network.
    target : str
        Name of the target column.
    reading : Reading
        How the columns are read, the target's too.
    columns : list of str
        Names of the columns without the target.
    used : list of str
        Names of the columns that the model uses.
    by_name : bool
        Whether the model finds its columns by name, rather than by position.
    """

    pipeline: Any
    target: str
    reading: Reading
    columns: list[str]
    used: list[str]
    by_name: bool

    @property
    def known(self) -> list[str]:
        """All columns of the table that the model was trained on, the target last."""
        names = self.reading.names or (*self.columns, self.target)
        return [*(name for name in names if name != self.target), self.target]


def load_stored(path: Path, device: str | None, backend: str | None) -> Stored:
    """Load the model of a training run, and set where it computes.

    Raises
    ------
    ValueError
        If the file is damaged, or is not of a training run and does not say which columns
        the model takes.
    """
    notes = read_metadata(path)["notes"] or {}
    pipeline = load(path)
    if "columns" not in notes:
        raise ValueError(f"{path} does not say which columns it takes: load it from Python")
    model = pipeline[-1] if isinstance(pipeline, Pipeline) else pipeline
    model.set_params(device=device, backend=backend)
    columns, target = list(notes["columns"]), notes["target"]
    if "reading" in notes:
        reading = Reading.from_dict(notes["reading"])
    else:
        reading = Reading.of_kinds({**notes["columns"], target: notes["target_kind"]})
    used = [name for name in columns if name not in notes["dropped"]]
    return Stored(pipeline, target, reading, columns, used, notes["by_name"])


def predict_file(
    stored: Stored,
    data: Sequence[Path],
    out: Path,
    *,
    chunk_rows: int | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Predict the rows of files, and write the predictions in the same order.

    Parameters
    ----------
    stored : Stored
    data : sequence of path
        The files to predict.
    out : path
        The file to write, .csv or .parquet.  It has a column "prediction" and, for a
        classification, a column of probabilities for each class.
    chunk_rows : int, optional
        Rows in memory at a time.  The default is as many as hold a quarter of a million
        numbers.  The number is halved when memory runs out.
    say : callable
        Function that is called with a message when the number is halved.

    Raises
    ------
    ValueError
        If ``out`` has another suffix, or the files have no rows or other columns than the model
        takes.
    OSError
        If a file cannot be read or written.
    """
    suffix = out.suffix.lower()
    if suffix not in (".csv", ".parquet"):
        raise ValueError(f"{out}: predictions are written as .csv or .parquet")
    wanted = stored.used if stored.by_name else stored.columns
    known = stored.known
    rows = chunk_rows or max(1, _NUMBERS // len(wanted))

    def chunks(*_: Any) -> Iterator[pl.DataFrame]:
        predict = _Halving(stored, rows, say)
        for chunk in read_chunks(data, stored.reading.only(wanted), rows, known):
            yield from predict(chunk)

    ahead = chunks()
    first = next(ahead, None)
    if first is None:
        raise ValueError(f"{', '.join(map(str, data))}: there are no rows")

    failures: list[Exception] = []

    def every(*_: Any) -> Iterator[pl.DataFrame]:
        yield first
        try:
            for part in ahead:
                if interrupted.is_set():
                    return
                yield part
        except Exception as error:
            failures.append(error)  # Polars replaces it by an error of its own: keep the cause
            raise

    lazy = register_io_source(every, schema=first.schema)
    with replacing(out) as beside, deferred_interrupt() as interrupted:
        try:
            _sink(lazy.sink_csv if suffix == ".csv" else lazy.sink_parquet, beside)
        except pl.exceptions.PolarsError as error:
            raise (failures[0] if failures else OSError(f"{out}: {error}")) from error
        if interrupted.is_set():  # Polars may have taken it for the end of the rows
            raise KeyboardInterrupt


def _sink(sink: Callable[[Path], Any], path: Path) -> None:
    """Write a lazy frame to a path; raise one KeyboardInterrupt on Ctrl-C."""
    try:
        sink(path)
    except KeyboardInterrupt:
        # Polars raises one, and passes the signal on to Python, which raises a second one.  Let
        # the second arrive here, and not during the clean-up after the first
        try:  # noqa: SIM105  # suppress is a call itself: the second could arrive inside it
            time.sleep(0)
        except KeyboardInterrupt:
            pass
        raise


def evaluate_file(
    stored: Stored, data: Sequence[Path], *, say: Callable[[str], None] = print
) -> Evaluation:
    """Compare predictions with the target in files, which are read into memory as a whole.

    Raises
    ------
    ValueError
        If the files have no target, lack a column, or hold labels that the model does
        not know.
    """
    source, target = ", ".join(map(str, data)), stored.target
    wanted = [*(stored.used if stored.by_name else stored.columns), target]
    chunks = list(read_chunks(data, stored.reading.only(wanted), None, stored.known))
    if not chunks:
        raise ValueError(f"{source}: there are no rows")
    frame = pl.concat(chunks)
    if n_missing := frame[target].null_count():
        say(f"rows without a target, left out: {n_missing}")
    whole = stored.reading.columns[target].whole
    X, y, _ = split_target(frame, target, source, whole=whole)
    classes = getattr(stored.pipeline, "classes_", None)
    if classes is not None:
        unknown = np.setdiff1d(y.astype(str) if classes.dtype.kind == "U" else y, classes)
        if unknown.size:
            raise ValueError(f"labels that the model does not know: {', '.join(map(str, unknown))}")
        y = y.astype(classes.dtype)
    return evaluate(stored.pipeline, X, y, by_name=stored.by_name)


class _Halving:
    """Predictor of a table's rows that halves the rows at a time when memory runs out."""

    def __init__(self, stored: Stored, rows: int, say: Callable[[str], None]) -> None:
        self._stored = stored
        self._rows = rows
        self._say = say

    def __call__(self, X: pl.DataFrame) -> Iterator[pl.DataFrame]:
        done = 0
        while done < X.height:
            part = X.slice(done, self._rows)
            try:
                predicted = _predict(self._stored, part)
            except Exception as error:
                if not is_out_of_memory(error) or self._rows == 1:
                    raise
                self._rows = max(1, min(self._rows, part.height) // 2)
                self._say(f"out of memory: going on with {self._rows} rows at a time")
                continue
            yield predicted
            done += part.height


def _predict(stored: Stored, X: pl.DataFrame) -> pl.DataFrame:
    given = model_input(X, stored.by_name)
    pipeline = stored.pipeline
    if isinstance(pipeline, Pipeline):
        given, pipeline = pipeline[:-1].transform(given), pipeline[-1]
    columns = {"prediction": pl.Series(pipeline.predict(given))}
    if hasattr(pipeline, "predict_proba"):
        for label, p in zip(pipeline.classes_, pipeline.predict_proba(given).T, strict=True):
            columns[f"probability of {label}"] = pl.Series(p)
    return pl.DataFrame(columns)
