"""The environment of the tests, one fixture for every array backend, and the summary."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

# Before SciPy is imported: without it scikit-learn's checks with arrays of other
# libraries skip
os.environ.setdefault("SCIPY_ARRAY_API", "1")
# Every program that is recorded is verified
os.environ.setdefault("PORTABLE_MLP_VERIFY", "1")
# Before any thread pool is made: pools of as many workers as there are cores, one for each of
# the processes of pytest-xdist, spend their time waiting for each other
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell's background job ignores Ctrl-C, and so would all processes that the tests start
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import fake_cuda
from helpers.targets import TARGETS, Target, get_target

from portable_mlp.engines.base import RecordedEngine


@pytest.fixture
def cuda(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A machine with two GPUs in the place of CuPy; steps are recorded from the first on.

    Takes the mode of its memory as a parameter.
    """
    if fake_cuda.COMPILER is None:
        pytest.skip("no g++ to compile CUDA's kernels for the host with")
    monkeypatch.setattr(RecordedEngine, "EAGER", 0)
    with fake_cuda.install(fake_cuda.Driver(getattr(request, "param", "poison"))) as machine:
        yield machine


@pytest.fixture(params=list(TARGETS))
def target(request: pytest.FixtureRequest) -> Target:
    return get_target(request.param, request)


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Name bytes by their argument, not by what they are.

    Archives contain the time at which they were made. The processes of pytest-xdist make
    them at different times, and have to collect the same names.
    """
    return argname if isinstance(val, bytes) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow what waits for a compiler, and the pages of documentation.

    Compiled are JAX's steps, loops in C, and the kernels of an emulated GPU.
    """
    compiled = {"jax", "numpy-loops", "cupy-emulated"}
    for item in items:
        parameters = getattr(getattr(item, "callspec", None), "params", {}).values()
        named = any(isinstance(value, str) and value in compiled for value in parameters)
        page = item.path.suffix == ".md"
        if named or page or "cuda" in getattr(item, "fixturenames", ()):
            item.add_marker("slow")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-gpu", action="store_true", help="fail, rather than skip, where no GPU is usable"
    )


@pytest.fixture
def rng() -> np.random.RandomState:
    return np.random.RandomState(0)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the tables that tests recorded, and count what was skipped by reason."""
    tables: dict[str, list[str]] = {}
    for report in terminalreporter.stats.get("passed", []):
        for table, row in report.user_properties:
            tables.setdefault(table, []).append(row)
    for table, rows in tables.items():
        terminalreporter.section(table)
        for row in sorted(rows):
            terminalreporter.write_line(row)
    skipped: dict[str, int] = {}
    for report in terminalreporter.stats.get("skipped", []):
        if isinstance(report.longrepr, tuple):
            reason = report.longrepr[2]
            skipped[reason] = skipped.get(reason, 0) + 1
    terminalreporter.section("skipped, by reason")
    for reason, count in skipped.items():
        terminalreporter.write_line(f"{count:5d}  {reason}")
    if not skipped:
        terminalreporter.write_line("    0  nothing")
