"""scikit-learn's own tests of its MLP, unmodified, pass against ours."""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ET

import pytest
from helpers.paths import TESTS
from helpers.targets import SKLEARN
from sklearn import neural_network

pytestmark = pytest.mark.slow


def test_scikit_learns_own_tests(tmp_path, record_property):
    report = tmp_path / "report.xml"
    command = [
        sys.executable, "-m", "pytest", "-q",
        "-p", "helpers.sklearn_plugin", "-p", "no:cacheprovider",
        f"--junitxml={report}", "--pyargs", "sklearn.neural_network.tests.test_mlp",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    # Away from this project's own settings
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    cases = list(ET.parse(report).iter("testcase"))
    others = [case.get("name") for case in cases if len(case)]  # failed, skipped, in error
    assert not others, done.stdout
    assert done.returncode == 0, done.stdout
    assert "deselected" not in done.stdout
    assert len(cases) >= (59 if SKLEARN >= (1, 9) else 58)
    record_property("scikit-learn's own tests", f"{len(cases)} passed, 0 skipped")


def test_the_peers_tests_would_see_a_wrong_gradient(tmp_path):
    """The planted twin: they do run against our code."""
    (tmp_path / "planted.py").write_text(
        "from portable_mlp.layers import Linear\n"
        "right = Linear.gradients\n"
        "Linear.gradients = lambda *args: tuple(1.01 * g for g in right(*args))\n"
    )
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "helpers.sklearn_plugin", "-p", "planted",
        "-p", "no:cacheprovider",
        "--pyargs", "sklearn.neural_network.tests.test_mlp", "-k", "test_gradient",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(tmp_path)])}
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert "1 failed" in done.stdout


@pytest.mark.parametrize("name", ["MLPClassifier", "MLPRegressor"])
def test_the_peers_tests_would_not_run_against_the_peer(name, tmp_path):
    (tmp_path / "planted.py").write_text(
        "import sklearn.neural_network._multilayer_perceptron as private\n"
        f"import portable_mlp\nportable_mlp.{name} = private.{name}\n"
        "def pytest_collection(session):\n"
        f"    from portable_mlp.estimators import {name}\n    portable_mlp.{name} = {name}\n"
    )
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "planted", "-p", "helpers.sklearn_plugin",
        "-p", "no:cacheprovider", "--pyargs", "sklearn.neural_network.tests.test_mlp",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(tmp_path)])}
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == pytest.ExitCode.INTERNAL_ERROR
    assert f"'sklearn.neural_network._multilayer_perceptron.{name}'> = getattr" in done.stdout


def test_here_the_peer_is_the_peer():
    """What compares with scikit-learn would otherwise compare with itself."""
    for name in ("MLPClassifier", "MLPRegressor"):
        assert getattr(neural_network, name).__module__.startswith("sklearn.")
