"""The report of a run: report.html, one self-contained page."""

from __future__ import annotations

import os
import platform
import warnings
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from io import StringIO
from typing import Any

import numpy as np
import polars as pl
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from portable_mlp import get_backend
from portable_mlp.app.dataset import Dataset
from portable_mlp.app.evaluation import Evaluation
from portable_mlp.app.overview import column_rows
from portable_mlp.app.run import Run
from portable_mlp.app.settings import settings_table, to_command
from portable_mlp.estimators.plots import LossCurveDisplay, figure

_LIBRARIES = ("portable_mlp", "numpy", "scikit-learn", "polars", "matplotlib")
_MOST_CLASSES = 30  # a larger confusion matrix is not legible
_MOST_POINTS = 5000  # in a scatter plot
_LOOK = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a $ in a column's name is no formula
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#667",
    "axes.labelcolor": "#334",
    "xtick.color": "#445",
    "ytick.color": "#445",
}


def report(run: Run) -> str:
    """Return the page as HTML text."""
    environment = Environment(
        loader=PackageLoader("portable_mlp.app", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = _number
    data, test = run.data, run.test
    scores = {name: (run.training.scores()[name], value) for name, value in test.scores().items()}
    return environment.get_template("report.html.jinja").render(
        run=run,
        data=data,
        scores=scores,
        curves=_svg(partial(learning_curves, run), "learning curves") if run.history else None,
        kept=run.trained.kept,
        classes=None if test.classes is None else _classes(test),
        residuals=None if test.classes is not None else _residuals(test, data.target),
        columns=_summary(data),
        notes=data.notes,
        settings=settings_table(run.settings),
        command=to_command(run.settings),
        environment=_environment(run),
        widest=max((i.mean for i in run.importances), default=0.0),
    )


def _number(value: float) -> str:
    if isinstance(value, int):
        return str(value)
    return f"{value:.6g}" if abs(value) >= 100 else f"{value:.4f}"


# ------------------------------------------------------------------ pictures


def _svg(draw: Any, name: str, size: tuple[float, float] = (4.6, 3.2)) -> Markup:
    from matplotlib import rc_context

    with rc_context({**_LOOK, "svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # browsers bring the fonts for text
        picture = figure(figsize=size, layout="constrained")
        draw(picture.subplots())
        text = StringIO()
        picture.savefig(text, format="svg", dpi=150, metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    # Cut the XML declaration before the element: it belongs to stand-alone files
    return Markup(
        svg[svg.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{name}"', 1)
    )


def learning_curves(run: Run, ax: Any) -> None:
    """Draw a run's losses, and a regression's validation score, over the epochs."""
    from matplotlib.ticker import LogLocator

    kept = run.trained.kept
    columns = {name: [getattr(e, name) for e in run.history] for name in run.history[0]._fields}
    validated = not np.isnan(columns["validation_loss"]).all()
    LossCurveDisplay(
        columns["loss"],
        columns["validation_loss"] if validated else None,
        # For a classification the score is the log-likelihood: in essence the negative loss
        columns["validation_score"] if validated and not run.data.classify else None,
    ).plot(ax=ax)
    if validated:
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    if ax.get_yscale() == "log":
        ax.yaxis.set_minor_locator(LogLocator(subs=(2.0, 5.0)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter("{x:g}")
    if kept is not None:
        ax.axvline(kept, color="#889", linestyle=":", linewidth=1)


def _classes(test: Evaluation) -> dict[str, Any]:
    assert test.classes is not None
    counts, bins = test.confusion(), test.calibration()
    names = [str(label) for label in test.classes]
    wrong = [
        (names[i], names[j], int(counts[i, j]))
        for i, j in np.ndindex(*counts.shape)
        if i != j and counts[i, j]
    ]

    def draw(ax: Any) -> None:
        ax.plot([0, 1], [0, 1], color="#aab", linestyle=":", label="perfect")
        ax.plot(*zip(*bins, strict=True), marker="o", markersize=4, label="model")
        ax.set(xlabel="predicted probability", ylabel="share that came true",
               xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))  # fmt: skip
        ax.legend(frameon=False, loc="upper left")
        ax.grid(alpha=0.3)

    return {
        "names": names,
        "by_class": test.by_class(),
        "confusion": counts.tolist() if len(names) <= _MOST_CLASSES else None,
        "confused": sorted(wrong, key=lambda pair: -pair[2])[:_MOST_CLASSES],
        "calibration": _svg(draw, "calibration curve"),
        "bins": bins,
        "of": f"of “{names[1]}”" if len(names) == 2 else "of the predicted class",
    }


def _residuals(test: Evaluation, target: str) -> dict[str, Any]:
    few = slice(None, _MOST_POINTS)
    truth, predicted = test.y[few], test.predicted[few]
    dots = {"s": 8, "alpha": 0.5, "linewidths": 0, "rasterized": True}

    def predictions(ax: Any) -> None:
        ax.scatter(predicted, truth, **dots)
        ends = [min(truth.min(), predicted.min()), max(truth.max(), predicted.max())]
        ax.plot(ends, ends, color="#aab", linestyle=":")
        ax.set(xlabel=f"predicted {target}", ylabel=f"true {target}")
        ax.grid(alpha=0.3)

    def residuals(ax: Any) -> None:
        ax.scatter(predicted, truth - predicted, **dots)
        ax.axhline(0.0, color="#aab", linestyle=":")
        ax.set(xlabel=f"predicted {target}", ylabel="true − predicted")
        ax.grid(alpha=0.3)

    return {
        "predictions": _svg(predictions, "predictions"),
        "residuals": _svg(residuals, "residuals"),
        "shown": len(truth),
    }


# ------------------------------------------------------------------ tables


def _summary(data: Dataset) -> list[dict[str, Any]]:
    """Return the rows of `column_rows` with the values of the training rows."""
    frame = data.X.with_columns(pl.Series(data.target, data.y))
    kinds = {**data.kinds, data.target: data.reading.columns[data.target].kind}
    return [
        {**row, "values": _values(frame[row["name"]].drop_nulls(), kinds[row["name"]])}
        if row["name"] in kinds
        else {**row, "values": ""}
        for row in column_rows(data)
    ]


def _values(values: pl.Series, kind: str) -> str:
    if values.is_empty():
        return ""
    if kind == "number":
        low, mean, high = (f"{v:.5g}" for v in (values.min(), values.mean(), values.max()))
        return f"{low} to {high}, mean {mean}"
    if kind == "date":
        low, high = (str(v).removesuffix(" 00:00:00") for v in (values.min(), values.max()))
        return f"{low} to {high}"
    counts = values.cast(pl.String).value_counts(sort=True, name="rows")
    shown = [f"{name} {n / len(values):.0%}" for name, n in counts.head(4).iter_rows()]
    more = f" and {counts.height - 4} more" if counts.height > 4 else ""
    return ", ".join(shown) + more


def _environment(run: Run) -> dict[str, str]:
    where = run.settings.where
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "computed on": repr(get_backend(where.device, where.backend)),
        "system": f"{platform.platform()}, {os.cpu_count()} CPU cores",
        "Python": platform.python_version(),
        **{name: version(name) for name in _LIBRARIES},
    }
