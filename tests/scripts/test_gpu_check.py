"""The acceptance kit: what its verdicts say, and that each of them can be bad.

Its stages run whole, on the emulated machine, in ``.ci/run``.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys

import fake_cuda
import pytest
from helpers.paths import SCRIPTS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        fake_cuda.COMPILER is None, reason="no g++ to compile CUDA's kernels for the host with"
    ),
]


@pytest.fixture
def stages(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    module = importlib.import_module("gpu_stages")
    monkeypatch.setattr(module, "machine", lambda emulated: module.nullcontext())
    return module


def test_the_kit_runs_on_an_emulated_machine(tmp_path):
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / "gpu_check.py"), "--emulate", "--stages", "1,8",
         "--out", str(tmp_path)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "1 seam: pass; 8 timing: not run"
    report = (tmp_path / "report.md").read_text("utf-8")
    assert "emulated on the host, without a GPU" in report
    assert "500 products in float64, captured" in report
    assert "Not emulated: it measures a GPU" in report
    found = json.loads((tmp_path / "report.json").read_text("utf-8"))
    assert {n: r["verdict"] for n, r in found.items()} == {"1": "pass", "8": "not run"}


def test_unknown_stages_are_refused(tmp_path):
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / "gpu_check.py"), "--stages", "1,x", "--out", str(tmp_path)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "unknown stages: x; known: 0, 1" in done.stderr


def ran(stages, tmp_path, function):
    kind = stages.Kind("planted", function, 10, 10)
    stages.STAGES[1], before = kind, stages.STAGES[1]
    try:
        stages.run_stage(1, True, tmp_path / "found.json")
    finally:
        stages.STAGES[1] = before
    return json.loads((tmp_path / "found.json").read_text("utf-8"))


def test_what_does_not_hold_fails_a_stage(stages, tmp_path):
    def stage(s):
        s.check("this", True)
        s.check("that", False, "0.5")
        s.check("and this", True)

    found = ran(stages, tmp_path, stage)
    assert found["verdict"] == "FAIL"
    assert found["paragraphs"] == ["- ok: this", "- **FAIL**: that (0.5)", "- ok: and this"]


def test_an_exception_fails_a_stage_and_is_told(stages, tmp_path):
    def stage(s):
        raise ValueError("planted")

    found = ran(stages, tmp_path, stage)
    assert found["verdict"] == "FAIL"
    assert "ValueError: planted" in found["paragraphs"][-1]


# The time of a stage is up as soon as it has written what it found
CHILD = """
import subprocess, sys, time
from pathlib import Path
sys.path.insert(0, {scripts!r})
import gpu_check, gpu_stages
class Popen(subprocess.Popen):
    def communicate(self, input=None, timeout=None):
        if "--stage" in self.args:
            out = Path(self.args[self.args.index("--out") + 1])
            while self.poll() is None and not (out.exists() and "begun" in out.read_text()):
                time.sleep(0.01)
            timeout = {timeout}
        return super().communicate(input, timeout)
subprocess.Popen = Popen
gpu_stages.machine = lambda emulated: gpu_stages.nullcontext()
def stage(s):
    s.say("begun")
    {does}
gpu_stages.STAGES[1] = gpu_stages.Kind("planted", stage, 1, 1)
gpu_check.__file__ = __file__
sys.exit(gpu_check.main())
"""


@pytest.mark.parametrize(
    ("does", "timeout", "told"),
    [
        ("time.sleep(600)", 0.1, r"Stopped after 16 seconds\."),
        ("import os; os.abort()", None, r"Its process ended with status -?\d+"),
    ],
)
def test_a_stage_that_hangs_or_dies_fails_and_keeps_what_it_found(does, timeout, told, tmp_path):
    script = tmp_path / "child.py"
    script.write_text(CHILD.format(scripts=str(SCRIPTS), does=does, timeout=timeout))
    done = subprocess.run(
        [sys.executable, str(script), "--emulate", "--stages", "1,9", "--out", str(tmp_path)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "1 planted: FAIL; 9 memory: not run"
    assert re.search(f"begun\n\n{told}", (tmp_path / "report.md").read_text("utf-8"))


@pytest.mark.parametrize("planted", ["kernels", "lifetime"])
def test_a_wrong_engine_fails_the_kit(planted, stages, tmp_path, cuda, monkeypatch):
    """Fallbacks and memory that is used after it was freed are no passes."""
    from portable_mlp.engines import CaptureEngine
    from portable_mlp.engines.graph import c_source

    if planted == "kernels":
        monkeypatch.setitem(c_source.FUNCTIONS, "sqrt", "(1.5 * sqrt({0}))")
        found = ran(stages, tmp_path, stages.verdict)
        assert "- **FAIL**: workload 2 runs as a graph" in found["paragraphs"]
    else:

        def check(self, *arguments, original=CaptureEngine._check):
            original(self, *arguments)
            for work in arguments[-1].works:
                work.launch = lambda: None

        monkeypatch.setattr(CaptureEngine, "_check", check)
        found = ran(stages, tmp_path, stages.lifetimes)
        assert cuda.faults
        cuda.faults.clear()
    assert found["verdict"] == "FAIL"
