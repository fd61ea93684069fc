"""Each kind of name stands once: one line in its registry, and it is known everywhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import portable_mlp

pytest.importorskip("sklearn", minversion="1.9")
for library in ("cyclopts", "skops", "matplotlib", "jinja2", "tomli_w", "polars"):
    pytest.importorskip(library)

# What somebody would write at the end of a module
ADDED = {
    "activations": """
@dataclass(frozen=True)
class AddedActivation(Tanh):
    pass

ACTIVATIONS["added_activation"] = AddedActivation()
""",
    "optimizers": """
@dataclass(frozen=True, kw_only=True)
class AddedSolver(Adam):
    alpha: float = 0.0

SOLVERS["added_solver"] = AddedSolver
""",
    "losses": """
@dataclass(frozen=True)
class AddedLoss(SquaredError):
    pass

LOSSES["added_loss"] = AddedLoss()
""",
    "schedules": """
@dataclass(frozen=True)
class AddedSchedule(Schedule):
    def factor(self, clock, state):
        return 0.5

SCHEDULES["added_schedule"] = AddedSchedule
""",
    "backends": """
class AddedBackend(NumPyBackend):
    name = "added_backend"
    engine = "eager"

    @classmethod
    def create(cls, device):
        return cls()

BACKENDS["added_backend"] = AddedBackend
""",
}
PROGRAM = """
import warnings
from pathlib import Path

import portable_mlp
from portable_mlp import MLPClassifier, MLPRegressor, load
from portable_mlp.cli import main

assert Path(portable_mlp.__file__).parent == Path("portable_mlp").resolve()
warnings.filterwarnings("error", ".*has no effect")


def check(model):
    made = model._make_optimizer()
    assert type(made).__name__ == "AddedSolver"
    assert (made.alpha, made.beta_1) == (model.alpha, model.beta_1)
    assert type(model._make_schedule()).__name__ == "AddedSchedule"
    assert "AddedActivation" in {type(layer).__name__ for layer in model.network_.layers}
    assert isinstance(model, MLPClassifier) or type(model._loss).__name__ == "AddedLoss"


how = {
    "hidden_layer_sizes": (3,), "activation": "added_activation", "solver": "added_solver",
    "learning_rate": "added_schedule", "backend": "added_backend", "max_iter": 2, "beta_1": 0.8,
}
X, y = [[0.0], [1.0], [2.0], [3.0]], [0.0, 1.0, 1.0, 0.0]
check(MLPClassifier(**how).fit(X, y))
check(MLPRegressor("added_loss", **how).fit(X, y))

assert main(["train", "--help"]) == 0
print("the end of the help")
options = [
    "--activation", "added_activation", "--optimizer", "added_solver", "--loss", "added_loss",
    "--schedule", "added_schedule", "--backend", "added_backend",
]
assert main(["train", "--dataset", "diabetes", "--epochs", "2", "--out", "run", *options]) == 0
check(load("run/model.safetensors")[-1])
history = Path("run/history.csv").read_text().splitlines()
rates = [line.split(",")[history[0].split(",").index("learning_rate")] for line in history[1:]]
assert rates == ["0.0005", "0.0005"]
"""


@pytest.mark.slow
def test_one_line_makes_a_name_known_everywhere(tmp_path):
    package = tmp_path / "portable_mlp"
    ours = Path(portable_mlp.__file__).parent
    shutil.copytree(ours, package, ignore=shutil.ignore_patterns("__pycache__"))
    for module, text in ADDED.items():
        with open(package / f"{module}.py", "a") as file:
            file.write(text)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "COLUMNS": "200"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    told, _ = done.stdout.split("the end of the help")
    for name in ("activation", "solver", "loss", "schedule", "backend"):
        assert f"added_{name}" in told
