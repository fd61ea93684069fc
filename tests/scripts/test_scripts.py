"""The scripts as people run them."""

from __future__ import annotations

import csv
import re
import subprocess
import sys

import numpy as np
import pytest
from helpers.paths import SCRIPTS
from helpers.targets import get_target
from sklearn.metrics import log_loss

from portable_mlp import load
from portable_mlp.app.table import read_csv

pytestmark = pytest.mark.slow

pytest.importorskip("polars")
pytest.importorskip("skops")
pytest.importorskip("matplotlib")
pytest.importorskip("cyclopts")


def run(script, *args, code=0, cwd=None):
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / script), *map(str, args)],
        capture_output=True, text=True, cwd=cwd, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def losses(output):
    return [float(x) for x in re.findall(r"loss (\S+)", output)]


@pytest.mark.parametrize("other", ["jax", "torch"])
@pytest.mark.parametrize("script", ["train_binary.py", "train_multiclass.py"])
def test_recipes_on_two_backends_agree(script, other, request):
    get_target(other, request)
    here = run(script, "--device", "cpu").stdout
    there = run(script, "--backend", other).stdout
    if script == "train_binary.py":
        assert "training accuracy 1.0000 on 150 rows" in here
    assert len(losses(here)) == 11
    np.testing.assert_allclose(losses(here), losses(there), rtol=1e-4)
    accuracy = r"training accuracy (\S+)"
    assert re.search(accuracy, here)[1] == re.search(accuracy, there)[1]


def test_better_recipe():
    out = run("train_multiclass.py", "--recipe", "better").stdout
    assert float(re.search(r"training accuracy (\S+)", out)[1]) > 0.99


@pytest.mark.parametrize("header", ["", "a,b,c,d,kind\n"])
def test_recipe_reads_a_csv_with_or_without_a_header(header, tmp_path):
    rng = np.random.RandomState(0)
    X = rng.standard_normal((40, 4))
    lines = [",".join(f"{v:.6f}" for v in x) + (",yes" if x[0] > 0 else ",no") for x in X]
    (tmp_path / "table.csv").write_text(header + "\n".join(lines) + "\n")
    assert "on 40 rows" in run("train_binary.py", "--data", tmp_path / "table.csv").stdout


def test_train_leaves_a_report_and_a_model_that_predicts(tmp_path):
    out = run("train.py", "--device", "cpu", "--epochs", 30, cwd=tmp_path).stdout
    assert float(re.search(r"test  accuracy (\S+)", out)[1]) > 0.9
    assert (tmp_path / "runs/latest/learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "runs/latest/report.html").read_text(encoding="utf-8")
    from sklearn.datasets import load_digits

    X, y = load_digits(return_X_y=True)
    assert load(tmp_path / "runs/latest/model.safetensors").score(X, y) > 0.9


def test_models_for_tables_side_by_side(tmp_path):
    """The peer's figure is what the peer gives by itself on the same rows."""
    pytest.importorskip("pandas")
    out = run(
        "benchmark_tables.py", "--sets", "iris", "diabetes", "--splits", 1, "--rows", 60,
        "--peers", "hist_boosting", "--out", tmp_path,
    ).stdout  # fmt: skip
    assert "| hist_boosting | others |" in out
    from sklearn.datasets import load_diabetes, load_iris
    from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
    from sklearn.model_selection import train_test_split

    with open(tmp_path / "results.csv", encoding="utf-8") as file:
        results = {(row["model"], row["table"]): row for row in csv.DictReader(file)}
    assert len(results) == 4
    assert all(float(row["cpu_seconds"]) > 0 for row in results.values())
    assert all(float(row["peak_mb"]) > 50 for row in results.values())
    X, y = load_iris(return_X_y=True)
    X, X_test, y, y_test = train_test_split(X, y, train_size=60, random_state=0, stratify=y)
    model = HistGradientBoostingClassifier(random_state=0).fit(X, y)
    row = results["hist_boosting", "iris"]
    assert float(row["error"]) == pytest.approx(1 - model.score(X_test, y_test))
    p = model.predict_proba(X_test)
    assert float(row["log_loss"]) == pytest.approx(log_loss(y_test, p), rel=1e-6)
    sure, right = p.max(axis=1), p.argmax(axis=1) == y_test
    gap = sum(
        abs((right - sure)[(sure >= low / 15) & (sure < (low + 1) / 15 + (low == 14))].sum())
        for low in range(15)
    )
    assert float(row["calibration_error"]) == pytest.approx(gap / len(sure), rel=1e-6)
    X, y = load_diabetes(return_X_y=True)
    X, X_test, y, y_test = train_test_split(X, y, train_size=60, random_state=0)
    model = HistGradientBoostingRegressor(random_state=0).fit(X, y)
    wanted = (1 - model.score(X_test, y_test)) ** 0.5
    assert float(results["hist_boosting", "diabetes"]["error"]) == pytest.approx(wanted)
    assert (tmp_path / "tables.png").read_bytes().startswith(b"\x89PNG")


def table(path, n=200):
    """Numbers of very different sizes, a category, holes, and a target far from zero."""
    rng = np.random.RandomState(0)
    a, year, kind = rng.standard_normal(n), rng.randint(1950, 2020, n), rng.choice(["x", "y"], n)
    price = 1e5 + 1e4 * (a + (year - 1985) / 20 + (kind == "x"))
    cells = ["" if i % 17 == 0 else f"{v:.4f}" for i, v in enumerate(a)]
    rows = zip(cells, year, price, kind, strict=True)
    path.write_text(
        "a,year,price,kind\n" + "".join(f"{c},{t},{p:.2f},{k}\n" for c, t, p, k in rows)
    )
    return price


def test_regression_on_a_csv_maps_the_target_back(tmp_path):
    price = table(tmp_path / "houses.csv")
    out = run("train.py", "--data", "houses.csv", "--target", "price", "--hidden", "32,16",
              "--optimizer", "lbfgs", cwd=tmp_path).stdout  # fmt: skip
    assert "regression of price: 160 rows" in out
    assert float(re.search(r"train R² (\S+)", out)[1]) > 0.9
    X, y = read_csv(tmp_path / "houses.csv", "price")
    model = load(tmp_path / "runs/latest/model.safetensors")
    assert np.allclose(y, price, atol=0.01)
    predicted = model.predict(X)
    assert abs(predicted.mean() - price.mean()) < 2000
    run("predict.py", "runs/latest/model.safetensors", "houses.csv", cwd=tmp_path)
    written = np.loadtxt(tmp_path / "predictions.csv", skiprows=1)
    np.testing.assert_allclose(written, predicted, rtol=1e-6)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--target", "prise"], "has no column 'prise'; it has: a, year, price, kind"),
        (["--activation", "rleu"], 'Did you mean "relu"'),
        (["--backend", "numpy", "--device", "gpu"], "backend='numpy' computes on the CPU only"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(args, message, tmp_path):
    table(tmp_path / "houses.csv")
    done = run("train.py", "--data", "houses.csv", *args, code=2, cwd=tmp_path)
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("script", ["train.py", "train_binary.py", "train_multiclass.py"])
def test_missing_file(script, tmp_path):
    done = run(script, "--data", "nothing.csv", code=2 if script == "train.py" else 1, cwd=tmp_path)
    assert "nothing.csv" in done.stderr


def test_empty_and_single_column_files(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("")
    with pytest.raises(ValueError, match="is empty"):
        read_csv(path)
    path.write_text("a\n1\n2\n")
    with pytest.raises(ValueError, match="nothing to learn from"):
        read_csv(path)
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="has 2 columns; there is no column 7"):
        read_csv(path, 7)


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_separators_and_missing_values(separator, tmp_path):
    path = tmp_path / "table.csv"
    lines = ["a,b,kind", "1.5,NA,x", "nan,2,y", ",3,x"]
    path.write_text("\n".join(lines).replace(",", separator) + "\n")
    X, y = read_csv(path)
    assert X.columns == ["a", "b"]
    assert all(kind.is_numeric() for kind in X.dtypes)
    assert X.null_count().row(0) == (2, 1)
    assert y.tolist() == ["x", "y", "x"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b,c\n1,2,3\n1,2,3,4,5\n", "line 3: 5 fields"),
        ("a,b,c\n", "has a header and no rows"),
        ("a,b\n1,NA\n3,NA\n", "target 'b' is missing in all rows"),
    ],
)
@pytest.mark.parametrize("script", ["train.py", "train_binary.py", "train_multiclass.py"])
def test_malformed_files_are_one_line(script, content, message, tmp_path):
    (tmp_path / "table.csv").write_text(content)
    done = run(script, "--data", "table.csv", code=2 if script == "train.py" else 1, cwd=tmp_path)
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
