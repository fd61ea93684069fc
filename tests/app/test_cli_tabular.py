"""The command line's model for tables: every command, its options, and its report."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from helpers.penguins import held_back

from portable_mlp import TabularClassifier, TabularRegressor, load
from portable_mlp.app.table import PENGUINS, read_csv
from portable_mlp.callbacks import Epoch, Progress
from portable_mlp.cli import main

pl = pytest.importorskip("polars")
pytest.importorskip("sklearn", minversion="1.9")
for library in ("cyclopts", "matplotlib", "jinja2", "tomli_w"):
    pytest.importorskip(library)

SHORT = {"members": 3, "epochs": 8, "steps": 60, "hidden_layer_sizes": (16,)}


@pytest.fixture(autouse=True)
def short_presets(monkeypatch):
    for estimator in (TabularClassifier, TabularRegressor):
        short = {name: replace(p, **SHORT) for name, p in estimator.presets.items()}
        monkeypatch.setattr(estimator, "presets", short)


def run(*args, code=0):
    assert main([str(arg) for arg in args]) == code


@pytest.fixture(params=["sex", "body_mass_g"])
def trained(request, tmp_path, short_presets, capsys):
    out = tmp_path / "run"
    run("train", "--data", PENGUINS, "--target", request.param, "--out", out)
    return request.param, out, capsys.readouterr().out


def test_every_command(trained, tmp_path, capsys):
    target, out, said = trained
    X_train, y_train, X, y = held_back(target)
    model = load(out / "model.safetensors")
    classify = target == "sex"
    assert type(model) is (TabularClassifier if classify else TabularRegressor)
    metric = "accuracy" if classify else "R²"
    assert f"out of fold {metric} {model.oof_score_:.4f}\n" in said
    assert f"test        {metric} {model.score(X, y):.4f}\n" in said
    again = type(model)(random_state=0).fit(X_train.drop("region"), y_train)
    # Booleans are numbers on the command line: the columns' names are not the reason
    np.testing.assert_array_equal(again.predict(X), model.predict(X))

    run("predict", out / "model.safetensors", PENGUINS, "--out", tmp_path / "p.csv")
    got = pl.read_csv(tmp_path / "p.csv")
    wanted, whole = model.predict(read_csv(PENGUINS, target)[0]), read_csv(PENGUINS, target)[1]
    if classify:
        assert got["prediction"].to_list() == wanted.tolist()
        p = model.predict_proba(read_csv(PENGUINS, target)[0])
        np.testing.assert_allclose(got["probability of male"].to_numpy(), p[:, 1], rtol=1e-12)
    else:
        np.testing.assert_allclose(got["prediction"].to_numpy(), wanted, rtol=1e-12)
    capsys.readouterr()
    run("evaluate", out / "model.safetensors", PENGUINS)
    score = np.mean(wanted == whole) if classify else model.score(*read_csv(PENGUINS, target))
    assert f"{metric} {score:.6g}\n" in capsys.readouterr().out
    run("info", out / "model.safetensors")
    shown = capsys.readouterr().out
    assert f"{type(model).__name__} of portable_mlp" in shown
    assert "PeriodicEmbedding" in shown
    assert "NTKLinear" in shown


@pytest.mark.slow
def test_export(trained, tmp_path, capsys):
    """The table's columns as polars has them; another runtime computes the same."""
    ort = pytest.importorskip("onnxruntime")
    pytest.importorskip("skl2onnx")
    target, out, _ = trained
    run("export", out / "model.safetensors", tmp_path / "m.onnx")
    assert "ONNX: " in capsys.readouterr().out
    model, X = load(out / "model.safetensors"), read_csv(PENGUINS, target)[0]
    day = pl.duration(days=1)
    frame = X.with_columns(
        (pl.col(pl.Datetime) - pl.datetime(1970, 1, 1)) / day, pl.col(pl.Boolean).cast(pl.Float64)
    )
    feeds = {}
    for name in set(model.feature_names_in_) - set(model.unused_columns_):
        if frame[name].dtype == pl.String:
            feeds[name] = frame[name].fill_null("").to_numpy().astype(object)[:, None]
        else:
            feeds[name] = frame[name].cast(pl.Float64).fill_null(np.nan).to_numpy()[:, None]
    *_, found = ort.InferenceSession(tmp_path / "m.onnx").run(None, feeds)
    wanted = model.predict_proba(X) if target == "sex" else model.predict(X)[:, None]
    np.testing.assert_allclose(found, wanted, rtol=2e-6, atol=1e-5)


def test_the_report(trained):
    target, out, _ = trained
    text = (out / "report.html").read_text(encoding="utf-8")
    model = load(out / "model.safetensors")
    assert f"The model is that of epoch {model.best_epoch_} of {model.n_iter_}" in text
    metric = "accuracy" if target == "sex" else "R²"
    assert re.search(rf"<b>[\d.]+</b>{metric}<br><span>{model.oof_score_:.4f} out of fold<", text)
    assert "in training</span>" not in text
    assert "NaN" not in text
    assert ">nan<" not in text
    command = re.search(r"portable-mlp train [^<]*", text)[0]
    assert "--model tabular" in command


def test_the_settings_repeat_the_run(trained, tmp_path):
    _, out, _ = trained
    run("train", "--config", out / "config.toml", "--out", tmp_path / "again")
    one, other = (load(o / "model.safetensors") for o in (out, tmp_path / "again"))
    assert all(np.array_equal(a, b) for a, b in zip(one.params_, other.params_, strict=True))


@pytest.mark.parametrize(
    ("options", "model"),
    [
        ((), "tabular"),
        (("--class-weight", "balanced", "--seed", 3), "tabular"),
        (("--preset", "fast"), "tabular"),
        (("--hidden", 8), "plain"),
        (("--no-scaling", "--epochs", 2), "plain"),
        (("--model", "plain"), "plain"),
    ],
)
def test_the_options_tell_which_model_is_meant(options, model, monkeypatch, tmp_path):
    from portable_mlp.app import train

    chosen = []

    def fit(settings, *_):
        chosen.append(settings)
        raise KeyboardInterrupt

    monkeypatch.setattr(train.plain, "fit", fit)
    monkeypatch.setattr(train.tabular, "fit", fit)
    run("train", "--dataset", "iris", "--out", tmp_path / "run", *options, code=130)
    (settings,) = chosen
    assert settings.model == model
    assert settings.class_weight == ("balanced" if "balanced" in options else "none")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--model", "tabular", "--hidden", "8,8"), "--hidden is for --model plain"),
        (("--model", "plain", "--preset", "fast"), "--preset is for --model tabular"),
        (("--epochs", "3", "--time-limit", "5s"), "plain one, which --epochs asks for"),
        (("--time-limit", "soon"), "'soon' is not a time such as 60s"),
        (("--time-limit", "0s"), "'0s' is not a time"),
        (("--time-limit", "-5"), "'-5' is not a time"),
        (("--preset", "fastest"), "fastest"),
    ],
)
def test_options_that_do_not_go_together(options, says, tmp_path, capsys):
    run("train", "--dataset", "iris", "--out", tmp_path / "run", *options, code=2)
    assert says in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


def test_the_presets_are_those_of_the_estimators():
    """The command line names them itself: its help does not import the estimators."""
    from portable_mlp.app import settings
    from portable_mlp.estimators.tabular import PRESETS

    assert tuple(PRESETS) == settings.PRESETS


def test_the_log_has_the_epochs_with_a_look_alone(capsys):
    progress = Progress(full=True, looks_only=True)
    progress.on_fit_begin(3)
    for i, score in enumerate((np.nan, -0.25, np.nan), 1):
        progress.on_epoch_begin(i)
        progress.on_epoch_end(Epoch(i, 0.5, 0.3, score, 0.1, 1.0), list)
    progress.on_fit_end()
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("epoch 2/3 loss 0.5 val 0.3 score -0.250 ")


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("1.5m", 90), ("2h", 7200), ("7 s", 7)])
def test_times(text, seconds, monkeypatch, tmp_path):
    from portable_mlp.app import tabular

    given = {}

    def refuse(**settings):
        given.update(settings)
        raise KeyboardInterrupt

    monkeypatch.setattr(tabular, "TabularClassifier", refuse)
    monkeypatch.setattr(tabular, "TabularRegressor", refuse)
    out = tmp_path / "run"
    run("train", "--dataset", "diabetes", "--time-limit", text, "--out", out, code=130)
    assert given["time_limit"] == seconds


def test_columns_of_an_array_keep_their_places(tmp_path, rng, capsys):
    X = rng.standard_normal((120, 4))
    X[:, 1] = 3.0
    np.savez(tmp_path / "t.npz", X=X, y=X[:, 0] + X[:, 3])
    run("train", "--data", tmp_path / "t.npz", "--drop", "X_2", "--out", tmp_path / "run")
    model = load(tmp_path / "run/model.safetensors")
    assert model.n_features_in_ == 4
    other = X.copy()
    other[:, [1, 2]] = np.nan
    np.testing.assert_array_equal(model.predict(X), model.predict(other))
    capsys.readouterr()
    run("evaluate", tmp_path / "run/model.safetensors", tmp_path / "t.npz")
    assert f"R² {model.score(X, X[:, 0] + X[:, 3]):.6g}\n" in capsys.readouterr().out


def test_only_a_plain_run_is_resumed(trained, capsys):
    _, out, _ = trained
    run("train", "--resume", out, code=2)
    assert "only a run with --model plain can be resumed" in capsys.readouterr().err
