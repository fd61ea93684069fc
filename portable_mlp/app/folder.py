"""The folder of a run: its files, and how they are written."""

from __future__ import annotations

import csv
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from portable_mlp import save
from portable_mlp.app.dataset import Dataset
from portable_mlp.app.report import learning_curves, report
from portable_mlp.app.run import Run, Trained
from portable_mlp.app.settings import Settings, settings_table, to_toml
from portable_mlp.callbacks import Epoch
from portable_mlp.estimators.plots import figure
from portable_mlp.persistence import read_metadata
from portable_mlp.persistence.files import replacing

MODEL, HISTORY, SETTINGS = "model.safetensors", "history.csv", "config.toml"
CURVE, REPORT, CHECKPOINT = "learning_curve.png", "report.html", "checkpoint.safetensors"
_MAY_CHANGE = {"epochs", "device", "backend", "checkpoint_every", "out"}
"""Settings that may differ when a run is resumed."""


def check_writable(folder: Path) -> None:
    """Create a folder and check that it is writable; called before training, to fail early.

    Raises
    ------
    OSError
        If the folder cannot be created or written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def check_same(settings: Settings, data: Dataset, checkpoint: Path) -> None:
    """Raise a ValueError if a checkpoint was made with other settings or other data."""
    notes = read_metadata(checkpoint)["notes"]
    # A checkpoint older than an option does not mention it: its run used the default
    then = settings_table(Settings(model="plain")) | notes["settings"]
    now = json.loads(json.dumps(settings_table(settings)))
    changed = {name for name in then.keys() | now.keys() if then.get(name) != now.get(name)}
    if changed - _MAY_CHANGE:
        raise ValueError(
            f"a run that goes on cannot change {', '.join(sorted(changed - _MAY_CHANGE))}"
        )
    other = [path for path, digest in data.digests.items() if notes["digests"].get(path) != digest]
    if other:
        raise ValueError(f"{', '.join(other)}: not the rows that the run began with")


def write_settings(settings: Settings) -> None:
    """Write the settings as a TOML file, for ``--config`` and ``--resume``."""
    _write(settings.out / SETTINGS, to_toml(settings))


def write_model(settings: Settings, data: Dataset, trained: Trained) -> None:
    """Write the results of training: the model, its history and its settings."""
    notes = {
        "target": data.target,
        "columns": data.kinds,
        "reading": data.reading.without_examples(list(data.dropped)).to_dict(),
        "dropped": data.dropped,
        "by_name": data.by_name,
        "settings": settings_table(settings),
    }
    save(trained.estimator, settings.out / MODEL, trained.preprocessing, notes=notes)
    _write_history(settings.out / HISTORY, trained.history)
    write_settings(settings)


def write_results(run: Run) -> None:
    """Write the results for people to look at: the learning curve and the report."""
    out = run.settings.out
    if run.history:
        picture = figure(figsize=(7.0, 4.0), layout="constrained")
        learning_curves(run, picture.subplots())
        with replacing(out / CURVE) as beside:
            picture.savefig(beside, dpi=150)
    _write(out / REPORT, report(run))


def _write(path: Path, text: str) -> None:
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


def _write_history(path: Path, history: Sequence[Epoch]) -> None:
    with replacing(path) as beside, open(beside, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(Epoch._fields)
        writer.writerows(history)
