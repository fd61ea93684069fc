"""The commands of the command line; their docstrings are its help texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, ArgumentCollection, Parameter
from cyclopts.config import Toml
from cyclopts.validators import Number

from portable_mlp import __version__
from portable_mlp.app.settings import Common, Settings, Where, whole

_MANY = Parameter(consume_multiple=1, negative="")


def _from_files(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Read options not given on the command line from the files of --config and --resume."""
    for argument in arguments:
        if argument.name in ("--config", "--resume") and argument.tokens:
            path = Path(argument.tokens[0].value)
            if argument.name == "--resume":
                path /= "config.toml"
            if not path.is_file():
                raise FileNotFoundError(f"{argument.name}: there is no file {path}")
            given = Toml(path, use_commands_as_keys=False)
            for name, value in given.config.items():
                if isinstance(value, dict):  # it would be ignored silently
                    raise ValueError(
                        f"{path} has a table [{name}]: options stand outside of tables"
                    )
            given(app, commands, arguments)


app = App(
    name="portable-mlp",
    help="Train a neural network on a table, look at it, and use it.",
    version=__version__,
    config=_from_files,
    suppress_keyboard_interrupt=False,
)


@app.command
def train(
    *,
    settings: Settings = Settings(),
    config: Path | None = None,
    resume: Path | None = None,
    common: Common = Common(),
) -> int:
    """Train a network to predict one column of a table from the others.

    Writes a folder with the model, the training history, the settings and a report to
    open in a browser.

    Parameters
    ----------
    config
        A TOML file with these options, such as a run's config.toml; options on the command
        line override it.
    resume
        The folder of a run that was started with --checkpoint-every: continue that run.
    """
    from portable_mlp.app.train import train

    if resume is not None:
        settings = replace(settings, out=resume)
    run = train(settings, resume=resume is not None)
    return 130 if run.trained.interrupted else 0


@app.command
def predict(
    model: Path,
    data: Annotated[tuple[Path, ...], _MANY],
    *,
    out: Path = Path("predictions.csv"),
    chunk_rows: Annotated[int | None, Parameter(validator=Number(gte=1), converter=whole)] = None,
    where: Where = Where(),
    common: Common = Common(),
) -> None:
    """Predict the rows of a table of any length.

    Parameters
    ----------
    model
        The model.safetensors of a run.
    data
        Files such as those of the training; they need not contain the target.
    out
        File for the predictions, .csv or .parquet.
    chunk_rows
        Rows in memory at a time [default: as many as hold a quarter of a million numbers].
    """
    from portable_mlp.app.streaming import load_stored, predict_file

    stored = load_stored(model, where.device, where.backend)
    predict_file(stored, data, out, chunk_rows=chunk_rows)
    print(f"predictions: {out}")


@app.command
def evaluate(
    model: Path,
    data: Annotated[tuple[Path, ...], _MANY],
    *,
    where: Where = Where(),
    common: Common = Common(),
) -> None:
    """Score a model's predictions on a table that contains the target.

    Parameters
    ----------
    model
        The model.safetensors of a run.
    data
        Files such as those of the training; the target is one of their columns.
    """
    from portable_mlp.app.streaming import evaluate_file, load_stored

    evaluation = evaluate_file(load_stored(model, where.device, where.backend), data)
    print(f"{len(evaluation.y)} rows")
    for name, value in evaluation.scores().items():
        print(f"{name} {value:.6g}")
    if evaluation.classes is not None:
        _print_table(evaluation.by_class())


@app.command
def export(model: Path, out: Path, *, common: Common = Common()) -> None:
    """Export a model with its preprocessing as ONNX, for other programs.

    Parameters
    ----------
    model
        The model.safetensors of a run.
    out
        File to write, such as model.onnx; overwritten if it exists.
    """
    from portable_mlp.app.export import export_onnx

    for column, name in export_onnx(model, out).items():
        print(f"column {column!r} is the input {name!r}: an output is called {column!r}")
    print(f"ONNX: {out}")


@app.command
def info(model: Path, *, common: Common = Common()) -> None:
    """Describe the contents of a model file.

    Parameters
    ----------
    model
        A model file or a checkpoint.
    """
    from portable_mlp.persistence import read_metadata

    told = read_metadata(model)
    notes, classes = told["notes"], told["classes"]
    print(f"{told['estimator']} of portable_mlp {told['library_version']}, {told['format']}")
    what, epochs = "checkpoint" if told["checkpoint"] else "model", told["fitted"].get("n_iter_")
    print(f"a {what} after {epochs} epochs")
    if classes is not None:
        print(f"classes: {', '.join(map(str, classes))}")
    shapes = [shape for name, shape in told["shapes"].items() if name.startswith("coefs.")]
    before = (f"Linear {n}x{m}" for n, m in shapes)  # files of the previous format store no layers
    print(f"layers: {', '.join([*map(_layer, told['network']), *before])}")
    if "reading" in notes:
        described = notes.pop("reading")["columns"]
        notes["columns"] = {
            name: "; ".join(filter(None, (column["kind"], column.get("note"))))
            for name, column in described.items()
        }
    for name, value in notes.items():
        print(f"{name}: {_shown(value)}")


def _layer(layer: dict[str, Any]) -> str:
    words = [layer["class"]]
    if "n_in" in layer and "n_out" in layer:
        words.append(f"{layer['n_in']}x{layer['n_out']}")
    if layer.get("members"):
        words.append(f"for {layer['members']} members")
    return " ".join(words)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "".join(f"\n  {name}: {_shown(of)}" for name, of in value.items())
    return ", ".join(map(_shown, value)) if isinstance(value, list) else str(value)


def _print_table(rows: Sequence[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name, value in rows[0].items():
        justify: Any = "left" if isinstance(value, str) else "right"
        table.add_column(name, justify=justify, overflow="fold")
    for row in rows:
        table.add_row(*(f"{v:.4f}" if isinstance(v, float) else str(v) for v in row.values()))
    Console(markup=False, emoji=False).print(table)
