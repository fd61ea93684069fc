"""The report: its numbers against the predictions, and the page in a real browser."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from helpers.penguins import held_back
from sklearn.model_selection import train_test_split

from portable_mlp import load
from portable_mlp.app.table import PENGUINS, read_table
from portable_mlp.cli import main

pytestmark = pytest.mark.slow

pl = pytest.importorskip("polars")
pytest.importorskip("sklearn", minversion="1.9")
for library in ("cyclopts", "skops", "matplotlib", "jinja2", "tomli_w"):
    pytest.importorskip(library)

NASTY = "<script>alert(1)</script> & $x_1$"


class Page(HTMLParser):
    """The tables of each section, and all text."""

    def __init__(self, text):
        super().__init__()
        self.tables: dict[str, list[list[list[str]]]] = {}
        self.text = ""
        self.tags: list[str] = []
        self._section, self._cell = "", None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "section":
            self._section = dict(attrs)["id"]
        elif tag == "table":
            self.tables.setdefault(self._section, []).append([])
        elif tag == "tr":
            self.tables[self._section][-1].append([])
        elif tag in ("td", "th"):
            self._cell = ""

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.tables[self._section][-1][-1].append(self._cell.strip())
            self._cell = None

    def handle_data(self, data):
        self.text += data
        if self._cell is not None:
            self._cell += data


def run(out, *args):
    assert main([str(arg) for arg in ("train", "--out", out, "--epochs", 15, *args)]) == 0
    return out


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of a run of two classes, of three, and of a regression."""
    folder = tmp_path_factory.mktemp("runs")
    return {
        target: run(folder / target, "--data", PENGUINS, "--target", target)
        for target in ("sex", "species", "body_mass_g")
    }


def page(folder):
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def tiles(page):
    """The numbers at the top, by name."""
    found = re.findall(r"(-?[\d.]+)\n?([^\d\n]+?)(-?[\d.]+) in training", page.text)
    return {name: (float(test), float(train)) for test, name, train in found}


@pytest.mark.parametrize("target", ["sex", "species"])
def test_numbers_of_a_classification(target, runs):
    shown = page(runs[target])
    model = load(runs[target] / "model.safetensors")
    X_train, y_train, X, y = held_back(target)
    classes, predicted = model.classes_, model.predict(X)
    p = model.predict_proba(X).astype(float)
    truth = y[:, None] == classes

    top = tiles(shown)
    assert top["accuracy"] == (
        round(np.mean(predicted == y), 4),
        round(np.mean(model.predict(X_train) == y_train), 4),
    )
    assert top["log loss"][0] == pytest.approx(-np.log(p[truth]).mean(), abs=6e-5)
    recall = [np.mean(predicted[y == c] == c) for c in classes]
    assert top["balanced accuracy"][0] == pytest.approx(np.mean(recall), abs=6e-5)
    if target == "sex":
        above = p[y == "male", 1][:, None] - p[y == "female", 1]
        assert top["ROC AUC"][0] == pytest.approx(
            np.mean((above > 0) + 0.5 * (above == 0)), abs=6e-5
        )

    ((header, *rows),) = shown.tables["confusion"]
    assert header[1:] == classes.tolist()
    counts = [[int(cell) for cell in row[1:]] for row in rows]
    assert counts == [[np.sum((y == a) & (predicted == b)) for b in classes] for a in classes]

    ((_, *rows),) = shown.tables["classes"]
    for row, c, sensitivity in zip(rows, classes, recall, strict=True):
        precision = np.mean(y[predicted == c] == c)
        f1 = 2 * precision * sensitivity / (precision + sensitivity)
        np.testing.assert_allclose(
            [float(v) for v in row[1:4]], [precision, sensitivity, f1], atol=6e-5
        )
        assert row[0] == c
        assert int(row[4]) == np.sum(y == c)

    ((_, *rows),) = shown.tables["calibration"]
    confidence = p[:, 1] if target == "sex" else p.max(axis=1)
    came_true = y == classes[1] if target == "sex" else predicted == y
    edges = np.quantile(confidence, np.linspace(0, 1, 11))
    place = np.searchsorted(edges[1:-1], confidence)
    wanted = [
        (confidence[place == i].mean(), came_true[place == i].mean())
        for i in range(10)
        if (place == i).any()
    ]
    np.testing.assert_allclose([[float(v) for v in row] for row in rows], wanted, atol=6e-5)


def test_numbers_of_a_regression(runs):
    shown = page(runs["body_mass_g"])
    model = load(runs["body_mass_g"] / "model.safetensors")
    _, _, X, y = held_back("body_mass_g")
    missed = y - model.predict(X).astype(float)
    top = tiles(shown)
    wanted = {
        "R²": 1 - np.sum(missed**2) / np.sum((y - y.mean()) ** 2),
        "mean absolute error": np.abs(missed).mean(),
        "root mean squared error": np.sqrt(np.mean(missed**2)),
        "median absolute error": np.median(np.abs(missed)),
    }
    assert top.keys() == wanted.keys()
    for name, value in wanted.items():
        assert top[name][0] == pytest.approx(value, rel=2e-5, abs=6e-5)
    assert shown.tags.count("svg") == 3


@pytest.mark.parametrize("target", ["sex", "body_mass_g"])
def test_importance_is_what_shuffling_a_column_costs(target, runs):
    ((_, *rows),) = page(runs[target]).tables["importance"]
    model = load(runs[target] / "model.safetensors")
    _, _, X, y = held_back(target)
    assert {row[0] for row in rows} == set(X.columns) - {"region"}
    means = [float(row[2].split(" ± ")[0]) for row in rows]
    assert means == sorted(means, reverse=True)
    rng = np.random.RandomState(1)
    whole = model.score(X, y)
    for name, _, shown in rows:
        costs = [
            whole - model.score(X.with_columns(X[name].gather(rng.permutation(len(y)))), y)
            for _ in range(60)
        ]
        mean, std = map(float, shown.split(" ± "))
        # Of five shuffles, and of sixty others
        assert mean == pytest.approx(np.mean(costs), abs=4 * np.std(costs) / np.sqrt(5) + 1e-4)
        assert std < 4 * np.std(costs) + 1e-4


def test_many_classes_are_told_by_what_they_are_taken_for(tmp_path, rng):
    X = rng.standard_normal((400, 3))
    y = np.repeat(np.arange(40), 10)
    np.savez(tmp_path / "t.npz", X=X, y=[f"c{i:02}" for i in y])
    shown = page(run(tmp_path / "run", "--data", tmp_path / "t.npz", "--target", "y"))
    ((header, *rows),) = shown.tables["confusion"]
    assert header == ["class", "predicted", "rows"]
    _, test = train_test_split(np.arange(400), test_size=0.2, random_state=0, stratify=y)
    predicted = load(tmp_path / "run/model.safetensors").predict(X[test])
    truth = np.array([f"c{i:02}" for i in y])[test]
    counts = [int(count) for _, _, count in rows]
    assert counts == sorted(counts, reverse=True)
    assert len(rows) == 30
    for a, b, count in rows:
        assert a != b
        assert int(count) == np.sum((truth == a) & (predicted == b)) > 0


def test_names_need_no_font_of_matplotlib(tmp_path):
    rows = "".join(f"{i},{2 * i}.5\n" for i in range(40))
    (tmp_path / "t.csv").write_text("x,日本\n" + rows, encoding="utf-8")
    command = ["train", "--data", tmp_path / "t.csv", "--epochs", "1", "--out", tmp_path / "run"]
    assert main([*map(str, command)]) == 0  # warnings are errors here
    assert "predicted 日本</text>" in (tmp_path / "run/report.html").read_text(encoding="utf-8")


def test_wide_tables_take_no_longer(tmp_path, rng, monkeypatch):
    """When the time is up, the columns that are left are not measured."""
    monkeypatch.setattr("portable_mlp.app.evaluation._NUMBERS", 12 * 40 * 7)  # of seven columns
    monkeypatch.setattr("portable_mlp.app.evaluation._MOST_SECONDS", 0.0)
    np.savez(tmp_path / "t.npz", X=rng.standard_normal((60, 40)), y=np.arange(60) % 2)
    out = tmp_path / "run"
    command = ["train", "--data", tmp_path / "t.npz", "--epochs", "1", "--out", out]
    assert main([*map(str, command)]) == 0
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "The table is wide: of its first 7 columns." in page
    assert page.count(">X_6<") == 2
    assert page.count(">X_7<") == 1  # in the data's table alone


def test_importance_can_be_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr("portable_mlp.app.train.importances", None)  # not called
    shown = page(run(tmp_path / "run", "--data", PENGUINS, "--no-importance"))
    assert "It was not measured (--no-importance)." in shown.text
    assert "--no-importance" in shown.text.split("portable-mlp train --data")[1]


def test_data_and_how_it_was_made(runs):
    shown = page(runs["sex"])
    ((_, *rows),) = shown.tables["data"]
    by_name = {row[0]: row[1:] for row in rows}
    X, y, X_test, y_test = held_back("sex")
    mass = X["body_mass_g"]
    assert by_name["body_mass_g"] == [
        "number", "0.0 %", f"{mass.min():.5g} to {mass.max():.5g}, mean {mass.mean():.5g}", ""
    ]  # fmt: skip
    holes = pl.concat([X, X_test])["delta_15_n"].null_count()
    assert by_name["delta_15_n"][1] == f"{100 * holes / (len(y) + len(y_test)):.1f} %"
    assert by_name["region"] == ["dropped", "0.0 %", "Anvers 100%", "constant"]
    assert by_name["sex"] == [
        "category, the target",
        "0.0 %",
        f"male {np.mean(y == 'male'):.0%}, female {np.mean(y == 'female'):.0%}",
        "",
    ]
    assert "portable-mlp train --data" in shown.text
    assert "266 rows to train on, 67 held back" in shown.text


@pytest.fixture(scope="module")
def nasty(tmp_path_factory):
    """A table whose names and texts are markup and mathematics."""
    folder = tmp_path_factory.mktemp("nasty")
    frame = read_table([PENGUINS]).frame.rename({"bill_length_mm": NASTY, "sex": "<b>sex</b>"})
    frame = frame.with_columns(
        species=pl.col("species") + NASTY, **{"<b>sex</b>": NASTY + pl.col("<b>sex</b>")}
    )
    frame.write_parquet(folder / "<i>.parquet")
    return run(folder / "run", "--data", folder / "<i>.parquet", "--target", "<b>sex</b>")


def test_what_users_wrote_is_text(nasty):
    shown = page(nasty)
    assert "script" not in shown.tags
    assert shown.tags.count("b") == len(tiles(shown))  # of the tiles alone
    assert shown.text.count("<script>alert(1)</script> & $x_1$") >= 5
    assert "Predicting <b>sex</b>" in shown.text


def test_nothing_comes_from_elsewhere(runs):
    for folder in runs.values():
        text = (folder / "report.html").read_text(encoding="utf-8")
        assert "default-src 'none'" in text
        named = re.findall(r"""(?:src|href|url|@import)\W*["'(]?(\w+:[^"')\s]*)""", text)
        assert {address.split(":")[0] for address in named} <= {"data"}
        assert "script" not in page(folder).tags


# ------------------------------------------------------------------ in a browser


def browse(file, width, folder, *more):
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("Chromium is not installed")
    return subprocess.run(
        [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
         "--no-first-run", "--virtual-time-budget=2000",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--hide-scrollbars", f"--user-data-dir={folder / 'profile'}", f"--window-size={width},900",
         "--enable-logging=stderr", *more, f"file://{file}"],
        capture_output=True, text=True, check=True, timeout=600,
    )  # fmt: skip


def complaints(done):
    return re.findall(r"CONSOLE.*", done.stderr)


def test_a_browser_shows_it_without_complaint(runs, nasty, tmp_path):
    for folder in (*runs.values(), nasty):
        done = browse(folder / "report.html", 1400, tmp_path, "--dump-dom")
        assert complaints(done) == []
        assert Page(done.stdout).tables == page(folder).tables


def test_complaints_are_heard(runs, tmp_path):
    text = (runs["sex"] / "report.html").read_text(encoding="utf-8")
    bad = tmp_path / "bad.html"
    bad.write_text(text.replace("</body>", '<img src="http://127.0.0.1:9/x.png"></body>'))
    assert "Content Security Policy" in complaints(browse(bad, 1400, tmp_path, "--dump-dom"))[0]


@pytest.mark.parametrize("spacing", ["0px", "2px"])
@pytest.mark.parametrize("width", [1400, 390])
def test_it_fits_the_window(width, spacing, runs, nasty, tmp_path):
    for folder in (runs["species"], nasty):
        text = (folder / "report.html").read_text(encoding="utf-8")
        text = re.sub("<meta http-equiv=.*?>", "", text)
        # Fonts differ in width from machine to machine
        text = text.replace("</style>", f"* {{ letter-spacing: {spacing}; }}</style>", 1)
        measure = "parent.postMessage([innerWidth, document.body.scrollWidth], '*')"
        (tmp_path / "inner.html").write_text(
            text.replace("</body>", f"<script>onload = () => {measure}</script></body>"),
            encoding="utf-8",
        )
        # In a frame: a window is never narrower than 500
        (tmp_path / "outer.html").write_text(
            "<script>onmessage = event => { document.title = event.data }</script>"
            f'<iframe src="inner.html" style="width: {width}px; border: 0"></iframe>'
        )
        shown = browse(tmp_path / "outer.html", 1500, tmp_path, "--dump-dom").stdout
        inner, wide = map(int, re.search("<title>(.*?)</title>", shown)[1].split(","))
        assert inner == width
        assert wide <= inner


def test_a_picture_can_be_taken(runs, tmp_path):
    picture = tmp_path / "report.png"
    browse(runs["sex"] / "report.html", 1400, tmp_path, f"--screenshot={picture}")
    assert picture.read_bytes().startswith(b"\x89PNG")
