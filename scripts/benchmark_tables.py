"""Compare models for tables by their defaults: error, calibration, time and memory.

    python scripts/benchmark_tables.py
    python scripts/benchmark_tables.py --openml adult:2 abalone:1 --splits 3
    python scripts/benchmark_tables.py --data FOLDER --peers catboost lightgbm --out results

Sets are scikit-learn's, those of OpenML as NAME:VERSION (downloaded by scikit-learn), or the
Parquet files of a folder, whose last column, or the one called "target", is the target.  A text, a
boolean, or at most 20 different whole numbers make a classification.

Peers are those of CatBoost, LightGBM, XGBoost, scikit-learn and pytabkit that are installed, with
the defaults of each.  Each fit has one thread and a process of its own.  The script prints
Markdown; with --out it writes results.csv and a picture as well.

The error is the share of wrong classes, or the root mean square divided by the target's standard
deviation.  Ratios are geometric means of (error + 0.01) / (error of the peer + 0.01).
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from importlib.util import find_spec
from math import isnan, nan
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sklearn import datasets
from sklearn.model_selection import train_test_split

USED_TO_CHOOSE = {
    "abalone", "adult", "airfoil", "airfoil_self_noise", "bike", "Bike_Sharing_Demand",
    "california", "california_housing", "houses", "churn_bank", "Churn_Modelling", "covertype",
    "diamonds", "digits", "elevators", "phoneme", "wine_quality", "wine-quality-red",
    "wine-quality-white",
}  # fmt: skip
"""Names of the sets by which the recipe was chosen: figures on these flatter it."""

BUNDLED = ("breast_cancer", "diabetes", "digits", "iris")
BINS = 15  # of the expected calibration error


@dataclass(frozen=True)
class Table:
    """A table with its target; labels are texts."""

    name: str
    X: pd.DataFrame
    y: np.ndarray
    classify: bool


@dataclass(frozen=True)
class Result:
    """What a fit of a model to a split of a table gave."""

    model: str
    table: str
    split: int
    error: float
    log_loss: float = nan
    calibration_error: float = nan
    cpu_seconds: float = nan
    peak_mb: float = nan


# ---------------------------------------------------------------- tables


def tables(given: argparse.Namespace) -> Iterator[Table]:
    if given.data:
        for path in sorted(given.data.glob("*.parquet")):
            frame = pd.read_parquet(path)
            name = "target" if "target" in frame else frame.columns[-1]
            yield make_table(path.stem, frame.drop(columns=name), frame[name])
    for name in given.openml:
        name, _, version = name.partition(":")
        found = datasets.fetch_openml(name, version=int(version or 1), as_frame=True)
        yield make_table(name, found.data, found.target)
    if not (given.data or given.openml):
        for name in given.sets:
            found = getattr(datasets, f"load_{name}")(as_frame=True)
            yield make_table(name, found.data, found.target)


def make_table(name: str, X: pd.DataFrame, y: pd.Series) -> Table:
    known = y.notna().to_numpy()
    X, y = X[known].reset_index(drop=True), y[known]
    numeric = pd.api.types.is_numeric_dtype(y) and not pd.api.types.is_bool_dtype(y)
    classify = not numeric or (y.nunique() <= 20 and (y == y.round()).all())
    if not classify:
        return Table(name, X, y.to_numpy(float), classify)
    # A class of one row cannot be in both halves
    labels = y.astype(str).to_numpy()
    several = pd.Series(labels).duplicated(keep=False).to_numpy()
    return Table(name, X[several].reset_index(drop=True), labels[several], classify)


def halves(table: Table, split: int, rows: int) -> tuple[Any, ...]:
    """Return (X, X_test, y, y_test), with at most this many rows to train on."""
    n = min(rows, round(0.75 * len(table.y)))
    labels = table.y if table.classify else None
    X, X_test, y, y_test = train_test_split(
        table.X, table.y, train_size=n, random_state=split, stratify=labels
    )
    known = np.isin(y_test, y) if table.classify else slice(None)  # of a rare class all may be here
    return X, X_test[known], y, y_test[known]


# ---------------------------------------------------------------- models

Predict = Callable[[pd.DataFrame], np.ndarray]
"""From rows to probabilities of the sorted classes, or to targets."""


def portable_mlp(X: Any, y: Any, classify: bool, seed: int, preset: str = "default") -> Predict:
    from portable_mlp import TabularClassifier, TabularRegressor

    model = (TabularClassifier if classify else TabularRegressor)(preset, random_state=seed)
    return predictor(model.fit(X, y))


def portable_mlp_fast(X: Any, y: Any, classify: bool, seed: int) -> Predict:
    return portable_mlp(X, y, classify, seed, "fast")


def mlp(X: Any, y: Any, classify: bool, seed: int) -> Predict:
    """scikit-learn's, with scaled columns and target."""
    from sklearn.compose import TransformedTargetRegressor, make_column_transformer
    from sklearn.impute import SimpleImputer
    from sklearn.neural_network import MLPClassifier, MLPRegressor
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    texts = categories(X)
    encode = make_column_transformer(
        (make_pipeline(SimpleImputer(), StandardScaler()), [c for c in X if c not in texts]),
        (OneHotEncoder(handle_unknown="ignore", sparse_output=False), texts),
    )
    model: Any = MLPClassifier(random_state=seed)
    if not classify:
        regressor = MLPRegressor(random_state=seed)
        model = TransformedTargetRegressor(regressor, transformer=StandardScaler())
    return predictor(make_pipeline(encode, model).fit(X, y))


def hist_boosting(X: Any, y: Any, classify: bool, seed: int) -> Predict:
    from sklearn import ensemble

    kind = "Classifier" if classify else "Regressor"
    model = getattr(ensemble, f"HistGradientBoosting{kind}")(random_state=seed)
    return of_categories(model, X, y)


def lightgbm(X: Any, y: Any, classify: bool, seed: int) -> Predict:
    from lightgbm import LGBMClassifier, LGBMRegressor

    model = LGBMClassifier if classify else LGBMRegressor
    return of_categories(model(n_jobs=1, verbose=-1, random_state=seed), X, y)


def xgboost(X: Any, y: Any, classify: bool, seed: int) -> Predict:
    from xgboost import XGBClassifier, XGBRegressor

    model = XGBClassifier if classify else XGBRegressor
    codes = np.unique(y, return_inverse=True)[1] if classify else y
    return of_categories(model(n_jobs=1, enable_categorical=True, random_state=seed), X, codes)


def catboost(X: Any, y: Any, classify: bool, seed: int) -> Predict:
    from catboost import CatBoostClassifier, CatBoostRegressor

    texts = categories(X)

    def with_texts(X: pd.DataFrame) -> pd.DataFrame:
        return X.assign(**{name: X[name].astype(object).fillna("").astype(str) for name in texts})

    model = (CatBoostClassifier if classify else CatBoostRegressor)(
        thread_count=1, verbose=0, random_seed=seed, allow_writing_files=False, cat_features=texts
    )
    predict = predictor(model.fit(with_texts(X), y))
    return lambda X: predict(with_texts(X))


def realmlp(X: Any, y: Any, classify: bool, seed: int) -> Predict:
    from pytabkit import RealMLP_TD_Classifier, RealMLP_TD_Regressor

    model = RealMLP_TD_Classifier if classify else RealMLP_TD_Regressor
    one = model(device="cpu", n_threads=1, random_state=seed)
    return predictor(one.fit(X, y, cat_col_names=categories(X)))


MODELS: dict[str, tuple[Callable[..., Predict], str]] = {
    "portable_mlp": (portable_mlp, "portable_mlp"),
    "portable_mlp fast": (portable_mlp_fast, "portable_mlp"),
    "catboost": (catboost, "catboost"),
    "lightgbm": (lightgbm, "lightgbm"),
    "xgboost": (xgboost, "xgboost"),
    "hist_boosting": (hist_boosting, "sklearn"),
    "mlp": (mlp, "sklearn"),
    "realmlp": (realmlp, "pytabkit"),
}
"""Each model's fit, and the library that it needs."""


def predictor(model: Any) -> Predict:
    return getattr(model, "predict_proba", model.predict)  # type: ignore[no-any-return]


def categories(X: pd.DataFrame) -> list[str]:
    return [name for name in X if not pd.api.types.is_numeric_dtype(X[name])]


def of_categories(model: Any, X: pd.DataFrame, y: Any) -> Predict:
    """Fit a model that takes the categories of pandas; those of training are the known ones."""
    known = {name: pd.Categorical(X[name]).categories for name in categories(X)}

    def coded(X: pd.DataFrame) -> pd.DataFrame:
        return X.assign(**{c: pd.Categorical(X[c], categories=own) for c, own in known.items()})

    if hasattr(model, "categorical_features"):
        model.set_params(categorical_features="from_dtype")
    predict = predictor(model.fit(coded(X), y))
    return lambda X: predict(coded(X))


# ---------------------------------------------------------------- a measurement


def measure(name: str, table: Table, split: int, rows: int) -> Result:
    """Fit a model and judge its predictions; the process is this measurement's own."""
    warnings.simplefilter("ignore")
    X, X_test, y, y_test = halves(table, split, rows)
    few = pd.DataFrame({"x": np.arange(40.0)})  # the time of the imports does not count
    MODELS[name][0](
        few, np.array(["a", "b"] * 20) if table.classify else few["x"], table.classify, 0
    )
    before = time.process_time()
    predict = MODELS[name][0](X, y, table.classify, split)
    seconds = time.process_time() - before
    predicted = np.asarray(predict(X_test), np.float64)
    scores = (
        of_classes(predicted, np.searchsorted(np.unique(y), y_test))
        if table.classify
        else {"error": float(np.sqrt(np.mean((predicted - y_test) ** 2)) / y_test.std())}
    )
    return Result(name, table.name, split, **scores, cpu_seconds=seconds, peak_mb=peak())


def of_classes(p: np.ndarray, true: np.ndarray) -> dict[str, float]:
    p = np.clip(p, 1e-7, 1.0)
    p /= p.sum(axis=1, keepdims=True)
    sure, right = p.max(axis=1), p.argmax(axis=1) == true
    bins = np.minimum((sure * BINS).astype(int), BINS - 1)
    gaps = [np.abs(np.sum((right - sure)[bins == i])) for i in range(BINS)]
    return {
        "error": float(np.mean(~right)),
        "log_loss": float(-np.log(p[np.arange(len(p)), true]).mean()),
        "calibration_error": float(np.sum(gaps) / len(p)),
    }


def peak() -> float:
    """Return the largest memory that this process has had, in MB."""
    if sys.platform == "win32":
        return nan
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(used / (2**20 if sys.platform == "darwin" else 2**10))


# ---------------------------------------------------------------- what is told


def ratios(results: list[Result], peer: str, value: str) -> dict[tuple[str, int], float]:
    """Return our value by the peer's, for each split of each table."""
    found: dict[str, dict[tuple[str, int], float]] = defaultdict(dict)
    for result in results:
        found[result.model][result.table, result.split] = getattr(result, value)
    own, other = found["portable_mlp"], found[peer]
    much = 0.01 if value == "error" else 0.0
    return {
        key: (own[key] + much) / (other[key] + much)
        for key in own.keys() & other.keys()
        if not isnan(own[key]) and other[key] + much > 0.0
    }


def geometric(values: list[float]) -> tuple[float, float]:
    """Return the geometric mean and its relative standard error; NaN if there are too few."""
    logs = np.log(np.maximum(values, 1e-9)) if values else np.array([nan])
    error = logs.std(ddof=1) / len(logs) ** 0.5 if len(logs) > 1 else nan
    return float(np.exp(logs.mean())), float(error)


def shown(values: list[float]) -> str:
    mean, error = geometric(values)
    return "" if isnan(mean) else f"{mean:.3f}" + ("" if isnan(error) else f" ± {error:.1%}")


def told(results: list[Result], peers: list[str]) -> Iterator[str]:
    names = sorted({result.table for result in results})
    chosen = [name for name in names if name in USED_TO_CHOOSE]
    yield f"{platform.processor() or platform.machine()}, {time.strftime('%Y-%m-%d')}, one thread"
    if chosen:
        yield f"used to choose the recipe: {', '.join(chosen)}"
    yield "\n| portable_mlp by | sets | error | log-loss | calibration error | CPU time |"
    yield "|---|---|---|---|---|---|"
    for peer in peers:
        for label, own in (("others", set(names) - {*chosen}), ("used to choose", {*chosen})):
            columns = [
                [r for key, r in ratios(results, peer, value).items() if key[0] in own]
                for value in ("error", "log_loss", "calibration_error", "cpu_seconds")
            ]
            if columns[0]:
                yield f"| {peer} | {label} | {' | '.join(map(shown, columns))} |"
    yield "\n| set | model | error | log-loss | calibration error | CPU seconds | peak MB |"
    yield "|---|---|---|---|---|---|---|"
    for name in names:
        for model in ["portable_mlp", *peers]:
            own = [r for r in results if (r.table, r.model) == (name, model)]
            if own:
                means = [np.mean([getattr(r, f.name) for r in own]) for f in fields(Result)[3:]]
                texts = (f"{m:.4f}" if i < 3 else f"{m:.1f}" for i, m in enumerate(means))
                yield f"| {name} | {model} | {' | '.join(texts)} |".replace(" nan ", "  ")


def draw(results: list[Result], peers: list[str], path: Path) -> None:
    """Draw the ratio to each peer by set, and the error against the time."""
    from matplotlib.figure import Figure

    names = sorted({result.table for result in results})
    picture = Figure(figsize=(11.0, 1.2 + 0.35 * max(6, len(names))), layout="constrained")
    left, right = picture.subplots(1, 2)
    for i, peer in enumerate(peers):
        found = ratios(results, peer, "error").items()
        by_set = [[v for k, v in found if k[0] == name] for name in names]
        at = np.arange(len(names)) + 0.6 * ((i + 0.5) / len(peers) - 0.5)
        centre, error = np.array([geometric(own) for own in by_set]).T
        left.errorbar(
            centre,
            at,
            xerr=centre * np.nan_to_num(error),
            fmt="o",
            markersize=4,
            label=f"by {peer}",
        )
    left.axvline(1.0, color="#889", linestyle=":")
    left.set(yticks=range(len(names)), yticklabels=names, xlabel="error of portable_mlp / of peer")
    left.legend(fontsize=8)
    for model in ["portable_mlp", *peers]:
        keys = [(r.table, r.split) for r in results if r.model == "portable_mlp"]
        own = {(r.table, r.split): r for r in results if r.model == model}
        errors = [np.log(own[k].error + 0.01) for k in keys if k in own]
        times = [np.log(max(own[k].cpu_seconds, 1e-3)) for k in keys if k in own]
        x, y = np.exp(np.mean(times)), np.exp(np.mean(errors))
        right.plot(x, y, "o")
        right.annotate(model, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=8)
    right.set(xscale="log", xlabel="CPU seconds (geometric mean)", ylabel="error + 0.01")
    right.grid(alpha=0.3)
    picture.savefig(path, dpi=120)


def main() -> None:
    """Measure, print, and write what --out asks for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sets", nargs="+", default=BUNDLED, help="bundled with scikit-learn")
    parser.add_argument("--openml", nargs="+", default=[], metavar="NAME:VERSION")
    parser.add_argument("--data", type=Path, help="folder of Parquet files")
    parser.add_argument("--peers", nargs="+", choices=list(MODELS)[1:], metavar="NAME")
    parser.add_argument("--splits", type=int, default=2)
    parser.add_argument("--rows", type=int, default=5000, help="rows to train on, at most")
    parser.add_argument("--out", type=Path, help="folder for results.csv and tables.png")
    given = parser.parse_args()
    installed = [name for name, (_, library) in MODELS.items() if find_spec(library)]
    peers = given.peers or installed[1:]
    if missing := set(peers) - set(installed):
        parser.error(f"not installed: {', '.join(MODELS[name][1] for name in sorted(missing))}")
    # Of the processes that this one starts: they import NumPy afterwards
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    results = []
    for table in tables(given):
        for split in range(given.splits):
            for name in ["portable_mlp", *peers]:
                # A fresh process: neither memory nor time is another one's
                with get_context("spawn").Pool(1) as pool:
                    result = pool.apply(measure, (name, table, split, given.rows))
                results.append(result)
                print(f"{table.name} {split} {name}: {result.error:.4f}", file=sys.stderr)
    print("\n".join(told(results, peers)))
    if given.out:
        given.out.mkdir(parents=True, exist_ok=True)
        with open(given.out / "results.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [f.name for f in fields(Result)])
            writer.writeheader()
            writer.writerows(map(asdict, results))
        draw(results, peers, given.out / "tables.png")


if __name__ == "__main__":
    main()
