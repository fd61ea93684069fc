"""The benchmark runs, and says what it could not measure."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from portable_mlp import BackendError, get_backend

SCRIPT = Path(__file__).parents[1] / "scripts" / "benchmark.py"


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


def test_what_cannot_be_measured_is_named():
    text = run("--device", "gpu", "--workloads", "1", "--only", "portable_mlp cupy")
    try:
        get_backend("gpu")
    except BackendError:
        assert "- portable_mlp cupy: unavailable: device='gpu'" in text
    else:
        assert "unavailable" not in text


def test_memory_stays_within_what_is_allowed():
    rows = [line.split("|")[2:-1] for line in run("--memory").splitlines() if ", batch" in line]
    assert len(rows) == 4
    for _, peak, allowed in ([float(cell) for cell in row] for row in rows):
        assert peak <= allowed
