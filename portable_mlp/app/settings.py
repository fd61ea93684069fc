"""The settings of a training run, declared once for command-line options and TOML files."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from datetime import datetime
from difflib import get_close_matches
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tomli_w
from cyclopts import Group, Parameter, Token
from cyclopts.validators import Number

from portable_mlp.activations import ACTIVATIONS
from portable_mlp.app.reading.options import COLUMN_KINDS, DATE_ORDERS, DECIMALS, Options
from portable_mlp.app.table import BUNDLED, PENGUINS
from portable_mlp.backends import BACKENDS, DEVICES, DTYPES
from portable_mlp.losses import LOSSES
from portable_mlp.optimizers import SOLVERS
from portable_mlp.schedules import SCHEDULES

PRESETS = "default", "fast"
"""The presets of the models for tables; importing these would make the help slow."""

if TYPE_CHECKING:
    _Activation = str
    _Backend = str
    _Decimal = str
    _Bundled = str
    _Device = str
    _Dtype = str
    _Loss = str
    _Preset = str
    _Schedule = str
    _Solver = str
else:
    _Activation = Literal[tuple(ACTIVATIONS)]
    _Backend = Literal[tuple(BACKENDS)]
    _Decimal = Literal[DECIMALS]
    _Bundled = Literal[(*BUNDLED, PENGUINS.stem)]
    _Device = Literal[DEVICES]
    _Dtype = Literal[DTYPES]
    _Loss = Literal[tuple(name for name, loss in LOSSES.items() if not loss.for_labels)]
    _Preset = Literal[PRESETS]
    _Schedule = Literal[tuple(SCHEDULES)]
    _Solver = Literal[tuple(SOLVERS)]

_DATA = Group.create_ordered("Data")
_MODEL = Group.create_ordered("Model")
_NETWORK = Group.create_ordered("The plain network and its training")
_WHERE = Group.create_ordered("Where to compute")
_FILES = Group.create_ordered("What is kept")


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a whole number") from None


def whole(type_: Any, tokens: tuple[Token, ...]) -> int:
    """Convert an option to an integer; cyclopts' own converter would round."""
    return _integer(tokens[0].value)


def _widths(type_: Any, tokens: tuple[Token, ...]) -> tuple[int, ...]:
    return tuple(_integer(width) for token in tokens for width in token.value.split(",") if width)


def _character(type_: Any, tokens: tuple[Token, ...]) -> str:
    text = {"tab": "\t", "\\t": "\t"}.get(tokens[0].value, tokens[0].value)
    if len(text.encode()) != 1 or text in '"\r\n':
        raise ValueError(f"{text!r} is not one character of ASCII")
    return text


def _seconds(type_: Any, tokens: tuple[Token, ...]) -> float:
    text = tokens[0].value
    found = re.fullmatch(r"(\d+(?:\.\d*)?) ?([smh]?)", text)
    if found is None or not float(found[1]):
        raise ValueError(f"{text!r} is not a time such as 60s, 10m or 2h")
    return float(found[1]) * _UNITS[found[2]]


_SEVERAL = Parameter(group=_DATA, consume_multiple=1, negative="", show_default=False)
_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}
_POSITIVE, _NOT_NEGATIVE = Number(gt=0, lt=inf), Number(gte=0, lt=inf)
_COUNT = Parameter(group=_NETWORK, validator=Number(gte=1), converter=whole)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Common:
    """Options of every command."""

    debug: Annotated[bool, Parameter(negative="")] = False
    """Show the traceback of an error."""


@Parameter(name="*", group=_WHERE)
@dataclass(frozen=True, kw_only=True)
class Where:
    """Where to compute."""

    device: _Device | None = None
    """cpu: NumPy, gpu: CuPy, auto: the GPU if there is one [default: cpu]."""
    backend: _Backend | None = None
    """The array library to compute with [default: by --device]."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a training run, from its input files to its output folder."""

    data: Annotated[tuple[Path, ...], _SEVERAL] = ()
    """Files with the same columns: CSV, Parquet, Arrow, Excel, .npy or .npz."""
    dataset: Annotated[_Bundled, Parameter(group=_DATA)] = "digits"
    """A bundled table to use if no files are given."""
    target: Annotated[str, Parameter(group=_DATA)] = "-1"
    """The column to predict: its name, or its position from 0 (negative: from the end)."""
    task: Annotated[Literal["auto", "classification", "regression"], Parameter(group=_DATA)] = (
        "auto"
    )
    """auto: classification if the target is text, booleans, or at most 20 different whole
    numbers, each in several rows."""
    column: Annotated[tuple[str, ...], _SEVERAL] = ()
    """NAME=KIND for columns that are read as another kind than meant: number, category, date,
    boolean or drop."""
    drop: Annotated[tuple[str, ...], _SEVERAL] = ()
    """Columns to leave out."""
    missing: Annotated[tuple[str, ...], _SEVERAL] = ()
    """Texts that stand for a missing value, besides the usual ones (NA, ?, NaN, null, ...);
    --missing=-999 if one begins with a hyphen."""
    missing_target: Annotated[Literal["drop", "error"], Parameter(group=_DATA)] = "drop"
    """What to do with rows that have no target: leave them out, or stop."""
    date_format: Annotated[str | None, Parameter(group=_DATA)] = None
    """day-first or month-first for dates such as 03/04/2021, or a format such as %Y%m%d
    [default: as the dates tell]."""
    decimal: Annotated[_Decimal | None, Parameter(group=_DATA)] = None
    """The decimal mark [default: as the numbers tell]."""
    separator: Annotated[str | None, Parameter(group=_DATA, converter=_character)] = None
    """The character between the fields of CSV files, or tab [default: as the first rows tell]."""
    header: Annotated[bool | None, Parameter(group=_DATA)] = None
    """Whether the first row of CSV files names the columns [default: as the first rows tell]."""
    test_fraction: Annotated[float, Parameter(group=_DATA, validator=Number(gt=0, lt=1))] = 0.2
    """Fraction of the rows held out to test the model in the report."""

    model: Annotated[Literal["tabular", "plain"] | None, Parameter(group=_MODEL)] = None
    """tabular: an ensemble of networks made for tables; plain: the multilayer perceptron of the
    options below [default: tabular, or plain if one of these is given]."""
    class_weight: Annotated[Literal["none", "balanced"], Parameter(group=_MODEL)] = "none"
    """Weights of the classes in a classification; balanced: all classes weigh the same."""
    preset: Annotated[_Preset, Parameter(group=_MODEL)] = "default"
    """Settings of the tabular model; fast takes about 0.4 of the time."""
    time_limit: Annotated[float | None, Parameter(group=_MODEL, converter=_seconds)] = None
    """Time that training of the tabular model may take, such as 60s, 10m or 2h."""
    seed: Annotated[
        int, Parameter(group=_MODEL, validator=Number(gte=0, lt=2**32), converter=whole)
    ] = 0
    """Seed of all random numbers."""

    scaling: Annotated[bool, Parameter(group=_NETWORK)] = True
    """Scale inputs to unit variance, and a regression's target if its loss allows it."""
    hidden: Annotated[
        tuple[int, ...],
        Parameter(
            group=_NETWORK,
            converter=_widths,
            n_tokens=1,
            accepts_keys=False,
            negative="",
            show_default=lambda widths: ",".join(map(str, widths)),
        ),
    ] = (100,)
    """Widths of the hidden layers, such as 128,64."""
    activation: Annotated[_Activation, Parameter(group=_NETWORK)] = "relu"
    """Activation of the hidden layers."""
    loss: Annotated[_Loss | None, Parameter(group=_NETWORK)] = None
    """Loss of a regression [default: squared_error]; huber's delta is 1, in units of the scaled
    target (unless --no-scaling)."""
    label_smoothing: Annotated[float, Parameter(group=_NETWORK, validator=Number(gte=0, lt=1))] = (
        0.0
    )
    """Fraction of each label that is spread over all classes, in a classification."""
    optimizer: Annotated[_Solver, Parameter(group=_NETWORK)] = "adam"
    """Method that updates the weights."""
    learning_rate: Annotated[float, Parameter(group=_NETWORK, validator=_POSITIVE)] = 1e-3
    """Initial learning rate."""
    schedule: Annotated[_Schedule, Parameter(group=_NETWORK)] = "constant"
    """How the learning rate changes in training; invscaling and adaptive are for sgd."""
    momentum: Annotated[float, Parameter(group=_NETWORK, validator=Number(gte=0, lte=1))] = 0.9
    """Momentum of sgd."""
    clip_norm: Annotated[float | None, Parameter(group=_NETWORK, validator=_POSITIVE)] = None
    """Largest norm of a step's gradients."""
    alpha: Annotated[float, Parameter(group=_NETWORK, validator=_NOT_NEGATIVE)] = 1e-4
    """L2 penalty on the weights."""
    weight_decay: Annotated[float | None, Parameter(group=_NETWORK, validator=_NOT_NEGATIVE)] = None
    """Each step subtracts this fraction of the parameters, times the learning rate
    [default: 0.01 for adamw, 0 for others]."""
    epochs: Annotated[int, _COUNT] = 200
    """Largest number of passes over the training rows."""
    batch_size: Annotated[int | None, _COUNT] = None
    """Rows per step [default: a hundredth of the training rows, from 32 to 1024]."""
    dropout: Annotated[float, Parameter(group=_NETWORK, validator=Number(gte=0, lt=1))] = 0.0
    """Fraction of hidden units that each step drops at random."""
    early_stopping: Annotated[bool, Parameter(group=_NETWORK)] = True
    """Hold out a tenth of the training rows, and keep the weights that score best on them."""
    patience: Annotated[int, _COUNT] = 20
    """Epochs without improvement before training stops."""
    checkpoint_every: Annotated[
        float | None, Parameter(group=_NETWORK, validator=Number(gte=0))
    ] = None
    """Seconds between checkpoints; --resume continues from the last one."""

    where: Where = Where()
    dtype: Annotated[_Dtype, Parameter(group=_WHERE)] = "float32"
    """Dtype of weights and arithmetic."""

    out: Annotated[Path, Parameter(group=_FILES)] = Path("runs/latest")
    """Folder for the run's model, history, settings and report."""
    importance: Annotated[bool, Parameter(group=_FILES)] = True
    """Measure for the report how much each column matters."""

    @property
    def stops_early(self) -> bool:
        """Whether rows are held out for early stopping; never with L-BFGS, which has no epochs."""
        return self.early_stopping and self.optimizer != "lbfgs"


_OF_PLAIN = (
    "scaling", "hidden", "activation", "loss", "label_smoothing", "optimizer", "learning_rate",
    "schedule", "momentum", "clip_norm", "alpha", "weight_decay", "epochs", "batch_size",
    "dropout", "early_stopping", "patience", "checkpoint_every",
)  # fmt: skip
_OF_TABULAR = ("preset", "time_limit")


def changed(settings: Settings, names: Sequence[str]) -> Iterator[str]:
    """Yield the options, of the settings in ``names``, that differ from their default."""
    default = Settings()
    for name in names:
        if getattr(settings, name) != getattr(default, name):
            yield f"--{name.replace('_', '-')}"


def with_model(settings: Settings) -> Settings:
    """Return the settings with the model that they mean.

    Raises
    ------
    ValueError
        If an option is set that the model does not have.
    """
    of_plain, of_tabular = (list(changed(settings, names)) for names in (_OF_PLAIN, _OF_TABULAR))
    model = settings.model or ("plain" if of_plain else "tabular")
    if model == "plain" and of_tabular:
        because = "" if settings.model else f", which {of_plain[0]} asks for"
        raise ValueError(f"{of_tabular[0]} is for --model tabular, not for a plain one{because}")
    if model == "tabular" and of_plain:
        raise ValueError(f"{of_plain[0]} is for --model plain")
    return replace(settings, model=model)


def settings_table(settings: Settings) -> dict[str, Any]:
    """Return the settings as TOML values, by name.

    Those that are None or empty, and those of the model that is not used, are left out.
    """
    others = {"tabular": _OF_PLAIN, "plain": _OF_TABULAR}.get(settings.model or "", ())
    table: dict[str, Any] = {}
    for field in fields(settings):
        if field.name in others:
            continue
        value = getattr(settings, field.name)
        if isinstance(value, Where):
            table |= {f.name: getattr(value, f.name) for f in fields(value)}
        elif isinstance(value, tuple):
            table[field.name] = [v if isinstance(v, int) else str(v) for v in value]
        else:
            table[field.name] = str(value) if isinstance(value, Path) else value
    return {name: value for name, value in table.items() if value not in (None, [])}


def options_of(settings: Settings) -> Options:
    """Return what the settings say about the table.

    Raises
    ------
    ValueError
        If ``--column`` is not NAME=KIND, or the kind is none.
    """
    columns, kinds = {}, [*COLUMN_KINDS, "drop"]
    for said in settings.column:
        name, equals, kind = said.rpartition("=")
        if not equals or kind not in kinds:
            near = get_close_matches(kind, kinds, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(
                f"--column {said}: it takes NAME=KIND, where KIND is one of"
                f" {', '.join(kinds)}{hint}"
            )
        columns[name] = kind
    if settings.date_format is not None and settings.date_format not in DATE_ORDERS:
        _check_date_format(settings.date_format)
    return Options(
        columns,
        settings.drop,
        settings.missing,
        settings.decimal,
        settings.date_format,
        settings.separator,
        settings.header,
    )


def _check_date_format(text: str) -> None:
    day = datetime(2021, 11, 23)
    try:
        read = datetime.strptime(day.strftime(text), text)
    except ValueError:
        read = None
    if read != day:
        raise ValueError(
            f"--date-format {text} is no format of dates, such as %d/%m/%Y; it can also be"
            f" {' or '.join(DATE_ORDERS)}"
        )


def to_toml(settings: Settings) -> str:
    """Return the settings as the text of a TOML file for ``--config``."""
    return tomli_w.dumps(settings_table(settings))


def to_command(settings: Settings) -> str:
    """Return the command line that repeats a run, with the options that are not defaults."""
    default = settings_table(Settings())
    words = ["portable-mlp", "train"]
    for name, value in settings_table(settings).items():
        if value == default.get(name):
            continue
        option = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        elif name == "hidden":
            words += [f"--{option}", ",".join(map(str, value))]
        else:
            texts = [str(v) for v in value] if isinstance(value, list) else [str(value)]
            if any(text.startswith("-") for text in texts):  # each would be taken for an option
                words += [f"--{option}={text}" for text in texts]
            else:
                words += [f"--{option}", *texts]
    return shlex.join(words)
