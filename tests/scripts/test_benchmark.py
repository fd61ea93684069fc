"""The benchmark runs, and says what it could not measure."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from contextlib import closing, nullcontext
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.paths import SCRIPTS

from portable_mlp import BackendError, get_backend
from portable_mlp.engines.cuda.runtime import CaptureError

pytestmark = pytest.mark.slow

SCRIPT = SCRIPTS / "benchmark.py"


def run(*arguments):
    command = [sys.executable, str(SCRIPT), "--rounds", "1", "--seconds", "0.01", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def printed(number):
    return f"{number:.{2 if number < 10 else 1 if number < 100 else 0}f}"


@pytest.mark.parametrize(
    ("suite", "peer"),
    [
        ([], "GEMMs alone"),
        (["--tricks"], "without recording"),
        (["--fit", "--dtype", "float64"], "scikit-learn"),
    ],
)
def test_tables_hold_what_was_measured(suite, peer, tmp_path):
    file = tmp_path / "samples.json"
    number = "4" if suite[:1] == ["--fit"] else "1"
    only = f"portable_mlp numpy,{peer}"
    text = run(*suite, "--workloads", number, "--only", only, "--json", str(file))
    dtype = "float64" if "--fit" in suite else "float32"
    found = json.loads(file.read_text("utf-8"))["results"][dtype]
    (own,), (other,) = (found["samples"][name][number] for name in ("portable_mlp numpy", peer))
    *_, row = (line for line in text.splitlines() if line.startswith(f"| {peer} |"))
    heads = re.search(rf"\| ms \| {number} \|\n.*?\| {peer} \| (\S+) \|", text, re.DOTALL)
    assert (heads is None) == ("--fit" in suite)
    assert heads is None or heads[1] == printed(1e3 * found["heads"][peer][number])
    ratio, mean = (cell.strip() for cell in row.split("|")[2:-1])
    assert ratio == mean == printed(own / other)
    assert not any(found["failures"].values())
    if "--fit" in suite:
        assert "Largest relative difference of the loss curves from scikit-learn's: " in text


def test_what_a_contestant_warns_of_marks_its_numbers(monkeypatch, tmp_path):
    monkeypatch.setenv("CC", "no-such-compiler")
    file = tmp_path / "samples.json"
    only = "portable_mlp numpy,GEMMs alone"
    text = run("--workloads", "1,3", "--only", only, "--json", str(file))
    warnings = json.loads(file.read_text("utf-8"))["results"]["float32"]["warnings"]
    assert warnings["GEMMs alone"] == {"1": [], "3": []}
    ((warning,), again) = warnings["portable_mlp numpy"].values()
    assert again == [warning]
    assert warning.startswith("the step runs without loops in C: ")
    assert text.count(f"\n- [1] portable_mlp numpy: {warning}\n") == 1
    assert "[2]" not in text
    rows = re.findall(r"^\| (?:portable_mlp numpy|GEMMs alone) \| (.*) \|$", text, re.MULTILINE)
    marked = [[cell.endswith(" [1]") for cell in row.split(" | ")] for row in rows]
    # Times and milliseconds of both, and ratios
    assert marked == [[True] * 2, [False] * 2] * 2 + [[True] * 3]


@pytest.mark.parametrize("what", [["--workloads", "1"], ["--memory"]])
def test_what_cannot_be_measured_is_named(what):
    text = run("--device", "gpu", "--only", "portable_mlp cupy", *what)
    try:
        get_backend("gpu")
    except BackendError:
        assert re.search("^- portable_mlp cupy.*: unavailable: device='gpu'", text, re.MULTILINE)
        assert re.search(r"^\| portable_mlp cupy( \| –)+ \|$", text, re.MULTILINE)
    else:
        assert not re.search("^- portable_mlp cupy.*: unavailable", text, re.MULTILINE)


def test_no_contestant_takes_a_gpu_for_itself(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    monkeypatch.delenv("XLA_PYTHON_CLIENT_PREALLOCATE", raising=False)
    benchmark = importlib.import_module("benchmark")
    with closing(benchmark.Worker("steps", "GEMMs alone")) as worker:
        assert worker._ask(partial(os.getenv, "XLA_PYTHON_CLIENT_PREALLOCATE")) == "false"


@pytest.mark.parametrize("refused", [False, True])
def test_products_on_a_gpu_are_captured_or_warned_of(refused, monkeypatch):
    class Cuda:  # NumPy's, with the calls of a graph
        def multiply(self, left, right, out):
            done.append(left.shape)
            np.matmul(left, right, out)

        def capture(self, work):
            if refused:
                raise CaptureError("no graphs here")
            return SimpleNamespace(launch=lambda: replayed.append(work))

    done, replayed = [], []
    stream = SimpleNamespace(synchronize=lambda: None)
    cuda = SimpleNamespace(get_current_stream=lambda: stream)
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(asarray=np.asarray, cuda=cuda))
    monkeypatch.setattr("portable_mlp.engines.cuda.runtime.Cuda", Cuda)
    monkeypatch.syspath_prepend(SCRIPT.parent)
    contestants = importlib.import_module("contestants")
    workload = contestants.Workload((4, 3, 2), 5, 10, "sgd", 0.1)
    with pytest.warns(RuntimeWarning, match="graphs here") if refused else nullcontext():
        products = contestants.CapturedProducts(workload, "float32")
    assert len(done) == 10  # five a step
    products.train(2)
    assert (len(done), len(replayed)) == ((30, 0) if refused else (10, 2))


def test_memory_stays_within_what_is_allowed():
    rows = [line.split("|")[2:-1] for line in run("--memory").splitlines() if ", batch" in line]
    assert len(rows) == 4
    for _, peak, allowed in ([float(cell) for cell in row] for row in rows):
        assert peak <= allowed
