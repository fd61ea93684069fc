"""The command line: what it leaves, what it prints, and what it says when things go wrong."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from helpers.paths import DATA
from sklearn.model_selection import train_test_split

from portable_mlp import MLPClassifier, MLPRegressor, load, save
from portable_mlp.app.table import PENGUINS, read_csv, read_table
from portable_mlp.cli import main
from portable_mlp.losses import LOSSES
from portable_mlp.persistence import read_metadata
from portable_mlp.schedules import SCHEDULES

pl = pytest.importorskip("polars")
pytest.importorskip("sklearn", minversion="1.9")
for library in ("cyclopts", "skops", "matplotlib", "jinja2", "tomli_w"):
    pytest.importorskip(library)

PROGRAM = [sys.executable, "-c", "import sys; from portable_mlp.cli import main; sys.exit(main())"]


def run(*args, code=0):
    assert main([str(arg) for arg in args]) == code


def train(out, *args, code=0):
    run(
        "train",
        "--data",
        PENGUINS,
        "--target",
        "sex",
        "--epochs",
        8,
        "--out",
        out,
        *args,
        code=code,
    )


@pytest.fixture(scope="module")
def penguins(tmp_path_factory):
    """A run's folder."""
    out = tmp_path_factory.mktemp("runs") / "penguins"
    train(out)
    return out


@pytest.fixture(scope="module")
def masses(tmp_path_factory):
    """A regression's."""
    out = tmp_path_factory.mktemp("runs") / "masses"
    run("train", "--data", PENGUINS, "--target", "body_mass_g", "--epochs", 8, "--out", out)
    return out


def weights(folder):
    model = load(folder / "model.safetensors")[-1]
    return [*model.coefs_, *model.intercepts_]


def assert_same_model(a, b):
    for left, right in zip(weights(a), weights(b), strict=True):
        np.testing.assert_array_equal(left, right)


# ------------------------------------------------------------------ train


def test_train_leaves_a_whole_folder(penguins):
    left = {path.name for path in penguins.iterdir()}
    assert left == {
        "model.safetensors", "history.csv", "config.toml", "learning_curve.png", "report.html",
    }  # fmt: skip
    history = pl.read_csv(penguins / "history.csv")
    model = load(penguins / "model.safetensors")[-1]
    assert history["epoch"].to_list() == list(range(1, 9))
    assert history["loss"].to_list() == model.loss_curve_
    assert history["validation_score"].to_list() == model.validation_scores_


def test_train_says_what_it_drops_and_a_line_an_epoch(tmp_path, capsys):
    train(tmp_path, "--no-early-stopping")
    out = capsys.readouterr().out
    assert "classification of sex: 266 rows to train on, 67 to test, 10 columns" in out
    assert re.search("region +dropped +Anvers +constant", out)
    epoch = r"^epoch (\d)/8 loss \S+ lr 0.001 \S+/s \d:\d\d:\d\d left$"
    assert re.findall(epoch, out, re.MULTILINE) == list("12345678")


def test_preprocessing_saw_the_training_rows_alone(penguins):
    X, y = read_csv(PENGUINS, "sex")
    rows, _ = train_test_split(np.arange(len(y)), test_size=0.2, random_state=0, stratify=y)
    numbers = load(penguins / "model.safetensors")[0].named_transformers_["numbers"]
    scaled = [name for name, dtype in X.schema.items() if dtype.is_numeric() or dtype == pl.Boolean]
    medians = X[rows].select(pl.col(scaled).cast(pl.Float64).median()).row(0)
    np.testing.assert_allclose(numbers[0].statistics_, medians)
    assert medians != X.select(pl.col(scaled).cast(pl.Float64).median()).row(0)
    means = X[rows].select(pl.col(scaled).cast(pl.Float64).fill_null(strategy="mean").mean()).row(0)
    gap = abs(numbers[1].mean_[: len(scaled)] - means) / np.abs(means)
    assert gap.max() < 0.01  # missing ones are the median, not the mean


def test_regression_is_in_the_units_of_the_target(masses):
    X, y = read_csv(PENGUINS, "body_mass_g")
    predicted = load(masses / "model.safetensors").predict(X)
    assert abs(predicted.mean() - y.mean()) < 0.1 * y.mean()


@pytest.mark.slow
def test_settings_come_from_a_file_and_options_override_it(penguins, tmp_path):
    stored = tomllib.loads((penguins / "config.toml").read_text())
    assert stored["target"] == "sex"
    assert stored["data"] == [str(PENGUINS)]
    run("train", "--config", penguins / "config.toml", "--out", tmp_path / "again")
    assert_same_model(penguins, tmp_path / "again")
    run("train", "--config", penguins / "config.toml", "--epochs", 2, "--out", tmp_path / "short")
    assert len(load(tmp_path / "short/model.safetensors")[-1].loss_curve_) == 2


@pytest.mark.slow
def test_the_command_in_the_report_repeats_the_run(tmp_path):
    options = ["--hidden", "7,5", "--no-early-stopping", "--seed", "3", "--dtype", "float64"]
    train(tmp_path / "a", *options, "--device", "cpu")
    page = (tmp_path / "a/report.html").read_text(encoding="utf-8")
    program, *words = shlex.split(re.search("<pre>(.*?)</pre>", page)[1])
    assert program == "portable-mlp"
    run(*[str(tmp_path / "b") if word == str(tmp_path / "a") else word for word in words])
    assert_same_model(tmp_path / "a", tmp_path / "b")


OPTIONS = {
    "--optimizer": ("solver", "sgd"),
    "--momentum": ("momentum", 0.5),
    "--schedule": ("learning_rate", "one_cycle"),
    "--alpha": ("alpha", 0.01),
    "--weight-decay": ("weight_decay", 0.1),
    "--clip-norm": ("clip_norm", 0.5),
}
OF_A_TASK = {
    "sex": {
        "--class-weight": ("class_weight", "balanced"),
        "--label-smoothing": ("label_smoothing", 0.1),
    },
    "body_mass_g": {"--loss": ("loss", "huber")},
}


@pytest.mark.slow
@pytest.mark.parametrize("target", OF_A_TASK)
def test_options_of_training_reach_the_model(target, tmp_path):
    options = {**OPTIONS, **OF_A_TASK[target]}
    words = [str(word) for option, (_, value) in options.items() for word in (option, value)]
    run(
        "train",
        "--data",
        PENGUINS,
        "--target",
        target,
        "--epochs",
        8,
        "--out",
        tmp_path / "a",
        *words,
    )
    params = load(tmp_path / "a/model.safetensors")[-1].get_params()
    assert {name: params[name] for name, _ in options.values()} == dict(options.values())
    page = (tmp_path / "a/report.html").read_text(encoding="utf-8")
    _, *command = shlex.split(re.search("<pre>(.*?)</pre>", page)[1])
    assert set(words) <= set(command)
    for option, (_, value) in options.items():
        assert f"<td>{option[2:].replace('-', '_')}</td><td>{value}</td>" in page
    run("train", "--config", tmp_path / "a/config.toml", "--out", tmp_path / "b")
    assert_same_model(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize(("folder", "cls"), [("penguins", MLPClassifier), ("masses", MLPRegressor)])
def test_options_default_to_those_of_the_estimators(folder, cls, request):
    params = load(request.getfixturevalue(folder) / "model.safetensors")[-1].get_params()
    names = {name for name, _ in [*OPTIONS.values(), *OF_A_TASK["sex"].values(), ("loss", None)]}
    wanted = {name: value for name, value in cls().get_params().items() if name in names}
    assert {name: params[name] for name in wanted} == wanted


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_by_name(schedule, tmp_path, capsys):
    run("train", "--dataset", "iris", "--epochs", 60, "--patience", 60, "--optimizer", "sgd",
        "--schedule", schedule, "--out", tmp_path)  # fmt: skip
    assert "warning" not in capsys.readouterr().err
    rates = pl.read_csv(tmp_path / "history.csv")["learning_rate"]
    changes = schedule not in ("constant", "adaptive", "reduce_on_plateau")  # these may wait
    assert (rates.n_unique() > 1) == changes


@pytest.mark.slow
def test_class_weights_count_in_the_score_that_is_watched(tmp_path):
    train(tmp_path, "--class-weight", "balanced", "--dtype", "float64")
    history = pl.read_csv(tmp_path / "history.csv")
    np.testing.assert_allclose(history["validation_score"], -history["validation_loss"], rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("loss", [name for name, loss in LOSSES.items() if not loss.for_labels])
def test_every_loss_predicts_in_the_units_of_the_target(loss, tmp_path, rng, capsys):
    x = rng.standard_normal((600, 2))
    np.savez(tmp_path / "t.npz", x=x, y=rng.poisson(20.0 * np.exp(0.5 * x[:, 0])))
    run("train", "--data", tmp_path / "t.npz", "--target", "y", "--task", "regression",
        "--loss", loss, "--learning-rate", 0.01, "--out", tmp_path / "run")  # fmt: skip
    score = re.search(r"test  R² (\S+)", capsys.readouterr().out)[1]
    assert float(score) > 0.6
    page = (tmp_path / "run/report.html").read_text(encoding="utf-8")
    assert ("target scaled to unit variance" in page) == (loss != "poisson")


def test_help_names_every_command(capsys):
    run("--help")
    out = capsys.readouterr().out
    assert all(name in out for name in ("train", "predict", "evaluate", "export", "info"))
    run("train", "--help")
    out = capsys.readouterr().out
    assert all(name in out for name in ("--target", "--device", "--resume", "--checkpoint-every"))


def test_import_stays_light():
    code = (
        "import sys, portable_mlp.cli; print({'cyclopts', 'polars', 'sklearn'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


# ------------------------------------------------------------------ predict, evaluate, info


@pytest.mark.slow
@pytest.mark.parametrize("name", ["p.csv", "p.parquet"])
@pytest.mark.parametrize("rows", [None, 7])
def test_predict_writes_what_the_model_says(name, rows, penguins, tmp_path):
    X, _ = read_csv(PENGUINS, "sex")
    X.write_parquet(tmp_path / "new.parquet")
    more = [] if rows is None else ["--chunk-rows", rows]
    model = penguins / "model.safetensors"
    run("predict", model, tmp_path / "new.parquet", PENGUINS, "--out", tmp_path / name, *more)
    read = pl.read_csv if name.endswith("csv") else pl.read_parquet
    got = read(tmp_path / name)
    twice = pl.concat([X, X])
    assert got["prediction"].to_list() == load(model).predict(twice).tolist()
    p = got.select("probability of female", "probability of male").to_numpy()
    np.testing.assert_allclose(p, load(model).predict_proba(twice), rtol=1e-5)


def test_predict_regression(masses, tmp_path):
    X, _ = read_csv(PENGUINS, "body_mass_g")
    model = masses / "model.safetensors"
    run("predict", model, PENGUINS, "--out", tmp_path / "p.parquet")
    got = pl.read_parquet(tmp_path / "p.parquet")
    assert got.columns == ["prediction"]
    np.testing.assert_allclose(got["prediction"], load(model).predict(X), rtol=1e-6)


@pytest.mark.slow
def test_evaluation_of_the_training_files_is_that_of_training(tmp_path, rng, capsys):
    """Of files whose columns alone would be read in different ways."""
    towns = [" Oslo", "Bergen ", "None", "NA", "7"]
    days = [f"{1 + i % 12:02}/{1 + i % 28:02}/2021" for i in range(400)]
    rows = [
        f'{x:.2f},{towns[i % 5]},{days[i]},"${1000 + 37 * i:,}",{x > 0}\n'
        for i, x in enumerate(rng.standard_normal(400))
    ]
    rows[3] = rows[3].replace("Oslo", "7").replace("/2021", "/2021 10:00 PM")
    parts = [
        rows[:3],
        [row for row in rows if ",7," in row],
        [r for r in rows[3:] if ",7," not in r],
    ]
    files = []
    for i, part in enumerate(parts):
        files.append(tmp_path / f"{i}.csv")
        files[-1].write_text("x,town,day,paid,y\n" + "".join(part))
    model = tmp_path / "run/model.safetensors"
    run("train", "--data", *files, "--epochs", 10, "--out", model.parent)
    shown = capsys.readouterr().out
    n_train, n_test = map(
        int, re.search(r": (\d+) rows to train on, (\d+) to test", shown).groups()
    )
    scores = [float(score) for score in re.findall(r"accuracy (\S+)", shown)]
    run("evaluate", model, *files)
    accuracy = float(re.search(r"^accuracy (\S+)", capsys.readouterr().out, re.MULTILINE)[1])
    n = n_train + n_test
    assert accuracy == pytest.approx(np.dot(scores, [n_train, n_test]) / n, abs=1e-4)
    predicted = []
    for i, file in enumerate(files):
        run("predict", model, file, "--out", tmp_path / f"{i}.parquet", "--chunk-rows", 1 + i)
        predicted += pl.read_parquet(tmp_path / f"{i}.parquet")["prediction"].to_list()
    frame = read_table(files, "y").frame
    assert predicted == load(model).predict(frame.drop("y")).tolist()
    assert np.mean(frame["y"].to_numpy() == predicted) == pytest.approx(accuracy, abs=1e-6)


def test_arrays_go_through_every_command(tmp_path, rng, capsys):
    X = rng.standard_normal((200, 4))
    X[:, 2] = 1.0
    y = (X[:, 0] > 0).astype(int)
    np.savez(tmp_path / "t.npz", X=X, y=y)
    np.savez(tmp_path / "new.npz", X=X)
    run("train", "--data", tmp_path / "t.npz", "--target", "y", "--out", tmp_path / "run")
    assert re.search("X_2 +dropped .* constant", capsys.readouterr().out)
    model = tmp_path / "run/model.safetensors"
    run("predict", model, tmp_path / "new.npz", "--out", tmp_path / "p.csv")
    got = pl.read_csv(tmp_path / "p.csv")["prediction"].to_numpy()
    np.testing.assert_array_equal(got, load(model).predict(X))  # arrays in Python, too
    run("evaluate", model, tmp_path / "t.npz")
    assert f"accuracy {np.mean(got == y):.6g}\n" in capsys.readouterr().out


def test_evaluate_and_info(penguins, capsys):
    X, y = read_csv(PENGUINS, "sex")
    model = penguins / "model.safetensors"
    run("evaluate", model, PENGUINS)
    out = capsys.readouterr().out
    assert "333 rows" in out
    assert f"accuracy {load(model).score(X, y):.6g}\n" in out
    run("info", model)
    out = capsys.readouterr().out
    assert "target: sex" in out
    assert "egg_date: date" in out
    assert "classes: female, male" in out
    layers = [x for x in load(model)[-1].network_.layers if hasattr(x, "n_in")]
    shapes = [f"Linear {x.n_in}x{x.n_out}" for x in layers]
    assert f"layers: {', ReLU, '.join(shapes)}\n" in out


def test_info_of_a_file_from_before_there_were_networks(capsys):
    run("info", DATA / "format_2.safetensors")
    assert "layers: Linear 3x5, Linear 5x4, Linear 4x3\n" in capsys.readouterr().out


def test_a_run_of_version_0_2_predicts_the_same(tmp_path, capsys):
    """Its model file has the kinds of the columns alone, and its preprocessing is skops's."""
    model = DATA / "run_0.2.safetensors"
    run("predict", model, PENGUINS, "--out", tmp_path / "p.csv")
    got, wanted = pl.read_csv(tmp_path / "p.csv"), pl.read_csv(DATA / "run_0.2_predictions.csv")
    assert got["prediction"].equals(wanted["prediction"])
    np.testing.assert_allclose(got[:, 1:], wanted[:, 1:], rtol=1e-5)
    run("evaluate", model, PENGUINS)
    assert "accuracy 0.927928\n" in capsys.readouterr().out


@pytest.mark.slow
def test_evaluate_takes_labels_as_they_are(tmp_path, rng, capsys):
    x = rng.standard_normal(100)
    names = np.where(x > 0, "a [/b] c " * 20, "<i>")
    for name, y in {"whole": 3 + (x > 0), "half": 3.5 + (x > 0), "names": names}.items():
        pl.DataFrame({"x": x, "y": y}).write_csv(tmp_path / f"{name}.csv")
    for name in ("whole", "names"):
        data = tmp_path / f"{name}.csv"
        run("train", "--data", data, "--epochs", 1, "--out", tmp_path / name)
        run("evaluate", tmp_path / name / "model.safetensors", data)
    evaluated = capsys.readouterr().out.split("100 rows\n")[-1]
    assert evaluated.count("[/b]") == 20  # it is no markup of rich's
    run("evaluate", tmp_path / "whole/model.safetensors", tmp_path / "half.csv", code=2)
    assert "does not know: 3.5, 4.5" in capsys.readouterr().err


def test_arrays_of_text_and_dates(tmp_path, rng, capsys):
    x = rng.standard_normal(90)
    days = np.datetime64("2024-01-01") + np.arange(90)
    np.savez(tmp_path / "t.npz", d=days, x=x, s=np.array(["u", "v", "w"] * 30), y=x > 0)
    run("train", "--data", tmp_path / "t.npz", "--epochs", 1, "--out", tmp_path / "run")
    model = tmp_path / "run/model.safetensors"
    assert read_metadata(model)["notes"]["columns"] == {"d": "date", "x": "number", "s": "category"}
    run("evaluate", model, tmp_path / "t.npz")
    assert "90 rows" in capsys.readouterr().out


@pytest.mark.slow
def test_a_target_too_fine_for_float32_is_named(tmp_path, rng, capsys):
    pl.DataFrame({"x": [*range(50)], "y": 1e9 + rng.standard_normal(50)}).write_csv(
        tmp_path / "t.csv"
    )
    command = ["train", "--data", tmp_path / "t.csv", "--epochs", 1, "--out", tmp_path / "run"]
    run(*command)
    said = "y varies little around 1e+09: use --dtype float64\n"
    assert said in capsys.readouterr().out
    run(*command, "--dtype", "float64")
    assert said not in capsys.readouterr().out


def as_onnx_takes_it(column, kind):
    if kind == "tensor(string)":
        return column.fill_null("").to_numpy().astype(object)
    assert kind == "tensor(double)"
    if column.dtype == pl.Datetime:
        return (np.asarray(column) - np.datetime64(0, "D")) / np.timedelta64(1, "D")
    return column.cast(pl.Float64).to_numpy()


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sex", "body_mass_g"])
def test_export_agrees_with_the_model(target, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("skl2onnx")
    X = read_table([PENGUINS]).frame.drop("region")
    holes = np.arange(X.height)[:, None] % np.arange(7, 7 + X.width) == 0  # elsewhere in each
    X = X.with_columns(
        pl.when(pl.Series(~holes[:, i])).then(pl.col(name))
        for i, name in enumerate(X.columns)
        if name != target
    )
    X.write_parquet(tmp_path / "t.parquet")
    model = tmp_path / "run/model.safetensors"
    data = ["--data", tmp_path / "t.parquet", "--target", target]
    run("train", *data, "--epochs", 20, "--out", model.parent)
    run("export", model, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    unknown = X.with_columns(species=pl.lit("Emperor"))
    for rows in (X, unknown):
        feed = {
            i.name: as_onnx_takes_it(rows[i.name], i.type)[:, None] for i in session.get_inputs()
        }
        got = session.run(None, feed)
        if target == "sex":
            assert got[0].tolist() == load(model).predict(rows).tolist()
            np.testing.assert_allclose(got[1], load(model).predict_proba(rows), atol=1e-5)
        else:
            np.testing.assert_allclose(got[0][:, 0], load(model).predict(rows), rtol=1e-5)


NAMES = [
    ["a.b", "a b", "a_b", "a-b"],
    ["label", "probabilities", "variable", "output_label"],
    ["größe (cm)", "1st", "x/y:0", "café"],
]


@pytest.mark.slow
@pytest.mark.parametrize("names", NAMES)
def test_exported_inputs_have_the_names_of_the_columns(names, tmp_path, rng, capsys):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("skl2onnx")
    columns = {name: rng.standard_normal(60) for name in names}
    columns[names[2]] = rng.choice(["red", "", "blue"], 60)  # a missing text is the empty one
    columns[names[1]] = 1.7e9 + 3600 * rng.random_sample(60)
    frame = pl.DataFrame({**columns, "y": columns[names[0]] + columns[names[3]] > 0})
    frame = frame.with_columns(
        pl.when(pl.int_range(60) % 9 > 0).then(pl.col(names[2])).alias(names[2])
    )
    frame.write_parquet(tmp_path / "t.parquet")
    model = tmp_path / "run/model.safetensors"
    run("train", "--data", tmp_path / "t.parquet", "--epochs", 20, "--out", model.parent)
    run("export", model, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    outputs = {"label", "probabilities"}
    called = {f"{name}_" if name in outputs else name: name for name in names}
    assert sorted(given.name for given in session.get_inputs()) == sorted(called)
    told = "column 'label' is the input 'label_'" in capsys.readouterr().out
    assert told == ("label" in names)
    rows = read_table([tmp_path / "t.parquet"]).frame.select(names)
    feed = {
        i.name: as_onnx_takes_it(rows[called[i.name]], i.type)[:, None]
        for i in session.get_inputs()
    }
    label, probabilities = session.run(None, feed)
    assert label.astype(bool).tolist() == load(model).predict(rows).tolist()
    np.testing.assert_allclose(probabilities, load(model).predict_proba(rows), atol=3e-6)


@pytest.mark.slow
def test_exported_arrays(tmp_path, rng):
    """Seconds since 1970 within an hour, some of them missing."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("skl2onnx")
    X = np.c_[1.7e9 + 3600 * rng.random_sample(300), rng.standard_normal(300)]
    y = np.sin((X[:, 0] - 1.7e9) / 600) > 0
    X[::9, 0] = np.nan
    np.savez(tmp_path / "t.npz", X=X, y=y)
    model = tmp_path / "run/model.safetensors"
    run(
        "train",
        "--data",
        tmp_path / "t.npz",
        "--target",
        "y",
        "--epochs",
        30,
        "--out",
        model.parent,
    )
    run("export", model, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    label, probabilities = session.run(None, {"X": X})
    assert label.astype(bool).tolist() == load(model).predict(X).tolist()
    np.testing.assert_allclose(probabilities, load(model).predict_proba(X), atol=3e-6)


@pytest.mark.slow
def test_missing_booleans_are_marked(tmp_path, rng):
    """Alone, without a missing number beside them."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("skl2onnx")
    truth = rng.choice(["true", "false", ""], 300)
    frame = pl.DataFrame({"b": truth, "x": rng.standard_normal(300), "y": truth == ""})
    frame.write_csv(tmp_path / "t.csv")
    model = tmp_path / "run/model.safetensors"
    run("train", "--data", tmp_path / "t.csv", "--epochs", 30, "--out", model.parent)
    run("predict", model, tmp_path / "t.csv", "--out", tmp_path / "p.csv", "--chunk-rows", 1)
    got = pl.read_csv(tmp_path / "p.csv")
    assert (got["prediction"] == frame["y"]).mean() > 0.95
    run("export", model, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    X = read_table([tmp_path / "t.csv"]).frame
    feed = {i.name: as_onnx_takes_it(X[i.name], i.type)[:, None] for i in session.get_inputs()}
    np.testing.assert_allclose(session.run(None, feed)[1], got[:, 1:], atol=1e-5)


TARGETS = {
    "two classes": lambda level, x: np.where(level % 2 + x > 0.5, "p", "q"),
    "four classes": lambda level, x: (level % 4).astype(str),
    "a number": lambda level, x: 100.0 * (level % 7) + x,
}


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_text_of_many_values_is_encoded_by_the_mean_target(target, tmp_path, rng, capsys):
    """One hundred values of which 64 have a column each: the others would all look alike."""
    level, x = rng.randint(0, 100, 3000), rng.standard_normal(3000)
    y = TARGETS[target](level, x)
    texts = [None if i % 50 == 7 else f"value {n}" for i, n in enumerate(level)]
    frame = pl.DataFrame({"x": x, "text": texts, "y": y})
    frame.write_parquet(tmp_path / "t.parquet")
    model = tmp_path / "run/model.safetensors"
    run("train", "--data", tmp_path / "t.parquet", "--epochs", 30, "--out", model.parent)
    score = float(re.search(r"test  \S+ (\S+)", capsys.readouterr().out)[1])
    assert score > 0.9
    pipeline = load(model)
    X = read_table([tmp_path / "t.parquet"]).frame.drop("y")
    encoded = pipeline[0].transform(X)
    n_means = 4 if target == "four classes" else 1
    assert encoded.shape == (3000, 1 + 64 + n_means)
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("skl2onnx")
    run("export", model, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    X = X.with_columns(
        text=pl.when(pl.int_range(3000) % 9 > 0).then("text").otherwise(pl.lit("?!"))
    )
    feed = {i.name: as_onnx_takes_it(X[i.name], i.type)[:, None] for i in session.get_inputs()}
    got = session.run(None, feed)
    if target == "a number":
        np.testing.assert_allclose(got[0][:, 0], pipeline.predict(X), rtol=1e-5, atol=1e-3)
    else:
        assert got[0].tolist() == pipeline.predict(X).tolist()
        np.testing.assert_allclose(got[1], pipeline.predict_proba(X), atol=1e-5)


# ------------------------------------------------------------------ interrupted, resumed


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adam", "lbfgs"])
def test_interrupt_keeps_what_there_is(optimizer, tmp_path):
    rng = np.random.RandomState(0)
    np.savez(tmp_path / "t.npz", X=rng.standard_normal((400, 10)), y=rng.standard_normal(400))
    out = tmp_path / "run"
    process = subprocess.Popen(
        [*PROGRAM, "train", "--data", tmp_path / "t.npz", "--target", "y", "--optimizer", optimizer,
         "--epochs", "1000000", "--patience", "1000000", "--out", out],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    for line in process.stdout:
        if line.startswith("epoch 3/"):
            process.send_signal(signal.SIGINT)
            break
    rest, errors = process.communicate(timeout=600)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert f"model:          {out / 'model.safetensors'}" in rest
    model = load(out / "model.safetensors")
    history = pl.read_csv(out / "history.csv")
    if optimizer == "adam":
        X, y = (np.load(tmp_path / "t.npz")[name] for name in ("X", "y"))
        best = history["validation_score"].max()
        assert model[-1].best_validation_score_ == best
        assert len(history) == model[-1].n_iter_ < 1000000
        assert np.isfinite(model.score(X, y))
    assert "interrupted" in (out / "report.html").read_text(encoding="utf-8")


def test_interrupt_while_saving_keeps_the_model(tmp_path, monkeypatch, capsys):
    from portable_mlp.app import folder

    def interrupted(*args, **kwargs):
        signal.raise_signal(signal.SIGINT)
        return save(*args, **kwargs)

    monkeypatch.setattr(folder, "save", interrupted)
    train(tmp_path / "run", code=130)
    assert capsys.readouterr().err == "interrupted\n"
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left == {"model.safetensors", "history.csv", "config.toml"}
    assert load(tmp_path / "run/model.safetensors")[-1].n_iter_ == 8


HELD = """
import sys, time
from pathlib import Path
from portable_mlp.app import streaming
from portable_mlp.cli import main

ready, go, *argv = sys.argv[1:]
done = []


def predict(stored, X, original=streaming._predict):
    done.append(None)
    if len(done) == 3:
        Path(ready).touch()
        while not Path(go).exists():
            time.sleep(0.01)
    return original(stored, X)


streaming._predict = predict
sys.exit(main(argv))
"""


def test_the_suffix_of_predictions_may_be_in_capitals(penguins, tmp_path):
    for name in ("p.csv", "P.CSV"):
        run("predict", penguins / "model.safetensors", PENGUINS, "--out", tmp_path / name)
    assert (tmp_path / "P.CSV").read_bytes() == (tmp_path / "p.csv").read_bytes()


@pytest.mark.slow
def test_interrupted_prediction_leaves_nothing(penguins, tmp_path):
    """The signal comes while the third chunk of seven is predicted."""
    ready, go, out = tmp_path / "ready", tmp_path / "go", tmp_path / "p.csv"
    command = [
        sys.executable, "-c", HELD, ready, go,
        "predict", penguins / "model.safetensors", PENGUINS, "--out", out, "--chunk-rows", "50",
    ]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not ready.exists():
        assert process.poll() is None
        time.sleep(0.01)
    assert list(tmp_path.glob(".p.*.csv"))
    process.send_signal(signal.SIGINT)
    go.touch()
    assert process.communicate(timeout=600)[1] == "interrupted\n"
    assert process.returncode == 130
    assert sorted(tmp_path.iterdir()) == [go, ready]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sex", "body_mass_g"])
def test_a_resumed_run_is_the_whole_one(target, tmp_path, capsys):
    common = ["--data", PENGUINS, "--target", target, "--checkpoint-every", 0, "--dropout", 0.1]
    run("train", *common, "--epochs", 6, "--out", tmp_path / "whole")
    run("train", *common, "--epochs", 3, "--out", tmp_path / "parts")
    run("train", "--resume", tmp_path / "parts", "--epochs", 6)
    assert_same_model(tmp_path / "whole", tmp_path / "parts")
    whole, parts = (pl.read_csv(tmp_path / f"{n}/history.csv") for n in ("whole", "parts"))
    assert parts.drop("seconds").equals(whole.drop("seconds"))
    assert json.loads(json.dumps(read_metadata(tmp_path / "parts/model.safetensors")["notes"]))


@pytest.mark.slow
def test_what_a_resumed_run_cannot_change(tmp_path, capsys):
    table = tmp_path / "t.csv"
    table.write_bytes(PENGUINS.read_bytes())
    run("train", "--data", table, "--epochs", 2, "--checkpoint-every", 0, "--out", tmp_path / "run")
    run("train", "--resume", tmp_path / "run", "--hidden", "5", code=2)
    assert "cannot change hidden" in capsys.readouterr().err
    run("train", "--resume", tmp_path / "run", "--alpha", "0.1", "--clip-norm", 0.5, code=2)
    assert "cannot change alpha, clip_norm" in capsys.readouterr().err
    table.write_text(table.read_text().replace("Adelie", "Adélie"), encoding="utf-8")
    run("train", "--resume", tmp_path / "run", code=2)
    assert "not the rows that the run began with" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_from_before_an_option_was_there_goes_on(tmp_path, monkeypatch):
    from portable_mlp.app import folder

    def without_alpha(path):
        told = read_metadata(path)
        del told["notes"]["settings"]["alpha"]
        return told

    train(tmp_path, "--checkpoint-every", 0)
    monkeypatch.setattr(folder, "read_metadata", without_alpha)
    run("train", "--resume", tmp_path, "--epochs", 9)
    run("train", "--resume", tmp_path, "--epochs", 10, "--alpha", 0.1, code=2)


@pytest.mark.slow
def test_a_new_run_does_not_go_on_from_an_old_checkpoint(tmp_path):
    train(tmp_path / "run", "--checkpoint-every", 0, "--seed", 1)
    train(tmp_path / "run")
    assert not (tmp_path / "run/checkpoint.safetensors").exists()


@pytest.mark.slow
def test_a_bar_on_a_terminal(tmp_path):
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*PROGRAM, "train", "--dataset", "iris", "--epochs", "9", "--out", tmp_path / "run"],
        stdout=theirs, stderr=theirs, env={**os.environ, "TERM": "xterm", "COLUMNS": "80"},
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    while True:
        try:
            read = os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
        shown += read
    assert process.wait() == 0
    text = shown.decode()
    last = (
        re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "\n").split("test  accuracy")[0]
    )
    bar = [line for line in last.splitlines() if "9/9" in line][-1]
    for part in ("epoch", "━", "loss", "val", "score", "lr 0.001", "/s", "left"):
        assert part in bar
    assert len(bar.rstrip()) <= 80


# ------------------------------------------------------------------ bad days


@contextmanager
def mounted(folder, options):
    """A small file system of its own in the folder."""
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.fixture
def place(tmp_path, monkeypatch, penguins):
    """A folder with good and bad files, which commands are run in."""
    monkeypatch.chdir(tmp_path)
    lines = PENGUINS.read_text().splitlines()
    good = "\n".join(lines) + "\n"
    frame = pl.read_csv(PENGUINS, try_parse_dates=True)
    files = {
        "good.csv": good,
        "ragged.csv": good + "Adelie,Anvers\n",
        "empty.csv": "",
        "header.csv": lines[0] + "\n",
        "one_class.csv": "\n".join(
            [lines[0], *(line for line in lines[1:] if "female" not in line)]
        ),
        "lonely.csv": good + lines[1].replace(",male", ",unknown") + "\n",
        "text.csv": good + lines[1].replace("39.1", "long") + "\n",
        "tiny.csv": "\n".join([lines[0], *lines[1:12]]) + "\n",
        "model.safetensors": "no model",
        "broken.parquet": "PAR1 but no more",
        "broken.npy": "nothing",
        "bad.toml": "epochs = [",
        "typo.toml": "epoch = 3\n",
        "table.toml": "[train]\nepochs = 3\n",
        "half.toml": "patience = 2.5\n",
        "smooth.toml": "label_smoothing = 1.5\n",
        "signs.csv": "x,body_mass_g\n" + "".join(f"{i},{i - 9.5}\n" for i in range(40)),
        "rare.csv": good + 2 * (lines[1].replace(",male", ",unknown") + "\n"),
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "latin.csv").write_bytes(good.encode() + "Adélie".encode("latin-1"))
    frame.drop("species", "island").with_columns(colour=1).write_csv("other.csv")
    frame.with_columns(pl.lit([1]).alias("lists")).write_parquet("lists.parquet")
    frame.with_columns(mass=pl.lit(float("inf"))).write_parquet("infinite.parquet")
    frame.with_columns(mass=pl.lit(1e300)).write_parquet("huge.parquet")
    (tmp_path / "mac.csv").write_bytes(b"a,b\r1,x\r2,y\r")
    (tmp_path / "text.npy").write_text(good)
    frame.with_columns(sex=pl.lit("unsure")).write_csv("labels.csv")
    np.save("objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    (tmp_path / "penguins").symlink_to(penguins)
    return tmp_path


TRAIN = "train --epochs 2 --out out --target sex --data"
MASS = TRAIN.replace("sex", "body_mass_g")
PREDICT = "predict penguins/model.safetensors --out out.csv --data"
OTHER = "other.csv has other columns than expected; missing: species, island; extra: colour"
ERRORS = [
    ("train --target sexx --data good.csv", "no column 'sexx'; .* species, .* Did you mean 'sex'"),
    ("train --target 12 --data good.csv", "has 12 columns; there is no column 12"),
    (f"{TRAIN} nothing.csv", "there is no file nothing.csv"),
    (f"{TRAIN} ragged.csv", "ragged.csv, line 335: 2 fields, where the first line has 12"),
    (f"{TRAIN} latin.csv", "latin.csv, line 335: byte 0xe9 is not UTF-8 text"),
    (f"{TRAIN} empty.csv", "empty.csv is empty"),
    (f"{TRAIN} header.csv", "header.csv has a header and no rows"),
    (f"{TRAIN} one_class.csv", "'sex' has one class only, male"),
    (f"{TRAIN} lonely.csv", "'sex' has a class of one row, unknown"),
    (f"{TRAIN} tiny.csv", "8 rows are too few to hold some out: --no-early-stopping"),
    (f"{TRAIN} lists.parquet", "column 'lists' holds List"),
    (
        f"{TRAIN} infinite.parquet",
        r"infinite.parquet, row 1, column 'mass': 'inf', beyond ±1e\+150",
    ),
    (f"{TRAIN} huge.parquet", r"huge.parquet, row 1, column 'mass': '1e\+300', beyond ±1e\+150"),
    (f"{TRAIN} mac.csv", "mac.csv has no column 'sex'; it has: a, b"),
    (f"{TRAIN} text.npy", "text.npy cannot be read: it is not one of NumPy's files"),
    ("evaluate penguins/model.safetensors header.csv", "header.csv: there are no rows"),
    (f"{TRAIN} good.csv other.csv", OTHER),
    (f"{TRAIN} broken.parquet", "broken.parquet cannot be read"),
    (f"{TRAIN} broken.npy", "broken.npy cannot be read"),
    (f"{TRAIN} objects.npy", "objects.npy cannot be read"),
    (f"{TRAIN} good.csv --task regression", "the target 'sex' is no number"),
    (f"{TRAIN} good.csv --backend numpy --device gpu", "backend='numpy' computes on the CPU only"),
    (f"{TRAIN} good.csv --activation rleu", 'Did you mean "relu"'),
    (f"{TRAIN} good.csv --epoch 3", "Did you mean --epochs"),
    (f"{TRAIN} good.csv --epochs 0", "--epochs"),
    (f"{TRAIN} good.csv --config half.toml", "patience.*: '2.5' is not a whole number"),
    (f"{TRAIN} good.csv --seed 1.5", "--seed: '1.5' is not a whole number"),
    (f"{TRAIN} good.csv --hidden 8,2.5", "--hidden: '2.5' is not a whole number"),
    (f"{TRAIN} good.csv --learning-rate 1e30 --no-early-stopping", "training diverged"),
    *(
        (
            f"{TRAIN} good.csv --optimizer lbfgs {option}",
            f"{option.split()[0]} is for the other optimizers",
        )
        for option in (
            "--checkpoint-every 1",
            "--schedule cosine",
            "--clip-norm 1",
            "--weight-decay 1",
            "--learning-rate 0.1",
            "--batch-size 9",
            "--dropout 0.1",
        )
    ),
    (f"{TRAIN} good.csv --momentum 0.5", "--momentum is for --optimizer sgd, not for adam"),
    (f"{TRAIN} good.csv --clip-norm inf", "Must be < inf"),
    (f"{TRAIN} good.csv --optimizer adamm", 'Did you mean "adam"'),
    (f"{TRAIN} good.csv --schedule cosin", 'Did you mean "cosine"'),
    (f"{TRAIN} good.csv --alpha -1", "--alpha"),
    (f"{TRAIN} good.csv --alpha nan", "alpha"),
    (f"{TRAIN} good.csv --weight-decay -1", "--weight-decay"),
    (f"{TRAIN} good.csv --clip-norm 0", "--clip-norm"),
    (f"{TRAIN} good.csv --momentum 1.5", "--momentum"),
    (f"{TRAIN} good.csv --label-smoothing 1", "--label-smoothing"),
    (f"{TRAIN} good.csv --class-weight balance", 'Did you mean "balanced"'),
    (f"{TRAIN} good.csv --config smooth.toml", "label_smoothing.* Must be < 1"),
    (f"{TRAIN} good.csv --loss hubert", 'Did you mean "huber"'),
    (
        f"{TRAIN} good.csv --loss huber",
        "--loss is for a regression: this is a classification of sex, .* the cross-entropy",
    ),
    (
        f"{MASS} good.csv --class-weight balanced",
        "--class-weight is for a classification: this is a regression of body_mass_g$",
    ),
    (f"{MASS} good.csv --label-smoothing 0.1", "--label-smoothing is for"),
    (f"{MASS} signs.csv --loss poisson", "y must not be negative for loss='poisson'"),
    (f"{TRAIN} good.csv --config bad.toml", "TOML"),
    (f"{TRAIN} good.csv --config typo.toml", "Did you mean --epochs"),
    (f"{TRAIN} good.csv --config table.toml", r"table.toml has a table \[train\]"),
    (f"{TRAIN}", "--data requires at least 1"),
    (f"{TRAIN} good.csv --seed -1", "--seed"),
    (f"{TRAIN} good.csv --test-fraction 0.001", "--test-fraction 0.001 of 333 rows cannot"),
    (f"{TRAIN} rare.csv --test-fraction 0.9", "leaves none to train on of the class unknown"),
    (f"{TRAIN} good.csv --config nothing.toml", "there is no file nothing.toml"),
    ("train --resume nothing", "there is no file nothing/config.toml"),
    ("train --resume penguins", "penguins was begun without --checkpoint-every"),
    ("trian", 'Did you mean "train"'),
    (f"{PREDICT} other.csv", OTHER),
    (
        f"{PREDICT} text.csv",
        "text.csv, row 334, column 'bill_length_mm': 'long', which is no number",
    ),
    (f"{PREDICT} ragged.csv", "ragged.csv, line 335"),
    (f"{PREDICT} ragged.csv --chunk-rows 10", "ragged.csv, line 335"),
    (f"{PREDICT} good.csv --chunk-rows 0", "--chunk-rows"),
    (f"{PREDICT} good.csv --chunk-rows 9.5", "--chunk-rows: '9.5' is not a whole number"),
    (f"{PREDICT} latin.csv", "latin.csv, line 335"),
    (f"{PREDICT} empty.csv", "empty.csv is empty"),
    (f"{PREDICT} header.csv", "there are no rows"),
    (f"{PREDICT} good.csv --backend numpy --device gpu", "computes on the CPU only"),
    ("predict penguins/model.safetensors good.csv --out p.xlsx", "written as .csv or .parquet"),
    ("predict penguins/model.safetensors good.csv --out no/p.csv", "No such file .*: no/p.csv"),
    ("predict model.safetensors good.csv", "model.safetensors"),
    ("predict nothing good.csv", "nothing"),
    ("evaluate penguins/model.safetensors labels.csv", "the model does not know: unsure"),
    ("evaluate penguins/model.safetensors other.csv", "missing: species, island"),
    ("info good.csv", "good.csv"),
]


@pytest.mark.parametrize(("command", "message"), ERRORS)
def test_errors_are_one_line_and_leave_nothing(command, message, place, capsys):
    before = set(place.rglob("*"))
    assert main(command.split()) == 2
    told = capsys.readouterr()
    (line,) = told.err.splitlines()
    assert line.startswith("error: ")
    assert re.search(message, line), line
    after = {path for path in place.rglob("*") if path.name != "out"}
    assert after == before  # at most, an empty folder


def test_debug_shows_where(place):
    with pytest.raises(ValueError, match="has no column 'sexx'"):
        main(["train", "--debug", "--target", "sexx", "--data", "good.csv"])


def test_errors_of_polars_are_one_line_wherever_they_come_from(place, monkeypatch, capsys):
    def broken(*_, **__):
        raise pl.exceptions.ComputeError("of a kind\nthat nobody thought of")

    for where in ("portable_mlp.app.dataset.useless_columns", "portable_mlp.app.train.evaluate"):
        with monkeypatch.context() as patch:
            patch.setattr(where, broken)
            assert main(f"{TRAIN} good.csv".split()) == 2
        assert capsys.readouterr().err == "error: of a kind that nobody thought of\n"


def test_full_disk(place, capsys):
    with mounted(place / "small", "size=8k"):
        for command in (f"{TRAIN} good.csv", f"{PREDICT} good.csv"):
            assert main(command.replace("--out ", "--out small/").split()) == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert re.match("error: .*No space left", line), line
            assert not [path for path in (place / "small").rglob("*") if path.is_file()]


def test_read_only_folder(place, capsys):
    with mounted(place / "fixed", "ro"):
        for command in (f"{TRAIN} good.csv", f"{PREDICT} good.csv"):
            assert main(command.replace("--out ", "--out fixed/").split()) == 2
            told = capsys.readouterr()
            assert re.match("error: .*Read-only file system: .*fixed", told.err), told.err
            assert "epoch" not in told.out  # before the work, not after it


def out_of_memory(kind):
    """As NumPy and CuPy, torch and JAX have it."""
    if kind == "MemoryError":
        return MemoryError("Unable to allocate 9 GiB")
    if kind == "OutOfMemoryError":
        return type(kind, (RuntimeError,), {})("CUDA out of memory")
    return RuntimeError("RESOURCE_EXHAUSTED: out of memory")


@pytest.mark.parametrize("kind", ["MemoryError", "OutOfMemoryError", "XlaRuntimeError"])
def test_predict_halves_its_chunk_when_memory_runs_out(kind, place, monkeypatch, capsys):
    from portable_mlp import MLPClassifier

    run(*f"{PREDICT} good.csv".split())
    wanted = pl.read_csv("out.csv")
    sizes, predict = [], MLPClassifier.predict

    def limited(self, X):
        sizes.append(len(X))
        if len(X) > 30:
            raise out_of_memory(kind)
        return predict(self, X)

    monkeypatch.setattr(MLPClassifier, "predict", limited)
    run(*f"{PREDICT} good.csv --chunk-rows 100".split())
    assert pl.read_csv("out.csv")["prediction"].equals(wanted["prediction"])
    np.testing.assert_allclose(pl.read_csv("out.csv")[:, 1:], wanted[:, 1:], rtol=1e-5)
    assert sizes[:3] == [100, 50, 25]
    assert max(sizes[3:]) == 25
    assert "out of memory: going on with 25 rows at a time" in capsys.readouterr().out


def test_predict_gives_up_when_one_row_is_too_many(place, monkeypatch, capsys):
    from portable_mlp import MLPClassifier

    def never(self, X):
        raise MemoryError("Unable to allocate 9 GiB")

    monkeypatch.setattr(MLPClassifier, "predict", never)
    run(*f"{PREDICT} good.csv".split(), code=2)
    assert capsys.readouterr().err == "error: Unable to allocate 9 GiB\n"
    assert not (place / "out.csv").exists()


@pytest.mark.parametrize("kind", ["MemoryError", "OutOfMemoryError", "XlaRuntimeError"])
def test_training_out_of_memory_says_what_to_lower(kind, place, monkeypatch, capsys):
    from portable_mlp.training import Trainer

    def full(self, *_, **__):
        raise out_of_memory(kind)

    monkeypatch.setattr(Trainer, "fit", full)
    assert main(f"{TRAIN} good.csv".split()) == 2
    assert capsys.readouterr().err == (
        "error: out of memory in training: lower --batch-size (now 32) or --hidden (now 100),"
        " or use --device cpu\n"
    )


def test_missing_library_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "cyclopts", None)
    assert main(["train"]) == 2
    assert "pip install 'portable_mlp[cli]'" in capsys.readouterr().err


@pytest.mark.slow
def test_memory_of_predict_is_that_of_a_chunk(tmp_path, rng, record_property):
    if not Path("/proc/self/status").exists():
        pytest.skip("the peak of a process's memory is not in /proc")
    peaks = {}
    for rows in (10_000, 1_000_000):
        X = rng.standard_normal((rows, 4)).astype(np.float32)
        frame = pl.DataFrame({f"x{i}": X[:, i] for i in range(4)} | {"y": X[:, 0] > X[:, 1]})
        frame.write_parquet(tmp_path / f"{rows}.parquet")
    run("train", "--data", tmp_path / "10000.parquet", "--epochs", 1, "--out", tmp_path / "run")
    code = (
        "import re, sys; from portable_mlp.cli import main; code = main();"
        r"print(re.search(r'VmHWM:\s+(\d+)', open('/proc/self/status').read())[1]); sys.exit(code)"
    )
    for rows in (10_000, 1_000_000):
        out = tmp_path / "p.parquet"
        done = subprocess.run(
            [sys.executable, "-c", code, "predict", tmp_path / "run/model.safetensors",
             tmp_path / f"{rows}.parquet", "--out", out, "--chunk-rows", "10000"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        peaks[rows] = int(done.stdout.split()[-1]) // 1024
        assert pl.scan_parquet(out).select(pl.len()).collect().item() == rows
    small, large = peaks.values()
    row = f"peak of predict: {small} MB for ten thousand rows, {large} MB for a million"
    record_property("memory", row)
    assert large < small + 50
