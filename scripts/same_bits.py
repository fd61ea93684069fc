"""Compare fits of this tree with those of an earlier commit, to the last bit.

    python scripts/same_bits.py HEAD~3

For changes that are to change no result.  Both trees train the same 60 models, in processes of
their own: every engine that is installed (CUDA's on an emulated GPU), with solvers, losses,
dropout, weights, clipping and schedules in turn.  Prints the models whose parameters or loss
curves differ; the exit status is 1 if one does.
"""

from __future__ import annotations

import argparse
import os
import pickle
import subprocess
import sys
import tempfile
import warnings
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

SOLVERS: list[dict[str, Any]] = [
    {}, {"solver": "sgd"}, {"solver": "sgd", "momentum": 0.0, "learning_rate": "invscaling"},
    {"solver": "adamw", "weight_decay": 0.1}, {"solver": "rmsprop"},
    {"solver": "sgd", "nesterovs_momentum": False, "learning_rate": "adaptive", "tol": 0.05},
    {"solver": "lbfgs", "alpha": 1.0},
]  # fmt: skip
OTHERS: list[dict[str, Any]] = [
    {}, {"dropout": 0.2}, {"clip_norm": 0.1}, {"alpha": 0.0}, {"activation": "tanh"},
    {"early_stopping": True}, {"batch_size": 200}, {"dropout": 0.5, "activation": "gelu"},
]  # fmt: skip
ENGINES = ("eager", "replay", "loops", "cuda", "torch", "jax")
N_FITS = 60


def cases() -> list[dict[str, Any]]:
    """Return what to fit, and by which engine."""
    found = []
    for i in range(N_FITS):
        found.append({
            "engine": ENGINES[i % len(ENGINES)],
            "task": ("classes", "several", "real", "counts", "huber", "smooth")[(i // 6 + i) % 6],
            "dtype": ("float64", "float32")[(i // 7) % 2],
            "weighted": i % 3 == 1,
            "params": {**SOLVERS[i % len(SOLVERS)], **OTHERS[(i // 3) % len(OTHERS)]},
        })  # fmt: skip
        if found[-1]["params"].get("solver") == "lbfgs":  # it has no steps
            for name in ("dropout", "clip_norm", "early_stopping", "batch_size"):
                found[-1]["params"].pop(name, None)
    return found


def fit(case: dict[str, Any]) -> list[bytes]:
    """Parameters and losses of a fit, as bytes."""
    import numpy as np

    from portable_mlp import MLPClassifier, MLPRegressor
    from portable_mlp.backends import NumPyBackend
    from portable_mlp.engines.base import RecordedEngine
    from portable_mlp.losses import Huber, SoftmaxCrossEntropy

    rng = np.random.RandomState(0)
    X = rng.standard_normal((120, 6)).astype(case["dtype"])
    labels = np.argmax(X[:, :3] + 0.5 * rng.standard_normal((120, 3)), axis=1)
    weights = rng.uniform(0.1, 2.0, 120) if case["weighted"] else None
    kind, y, loss = {
        "classes": (MLPClassifier, labels, None),
        "several": (MLPClassifier, np.eye(3, dtype=int)[labels], None),
        "real": (MLPRegressor, X[:, 0] * X[:, 1], None),
        "counts": (MLPRegressor, rng.poisson(2.0, 120).astype(float), "poisson"),
        "huber": (MLPRegressor, X[:, :2] ** 2, Huber(0.5)),
        "smooth": (MLPClassifier, labels, SoftmaxCrossEntropy(0.1)),
    }[case["task"]]
    RecordedEngine.EAGER = 0
    NumPyBackend.engine = "eager" if case["engine"] == "eager" else "replay"
    os.environ["PORTABLE_MLP_COMPILE"] = "now" if case["engine"] == "loops" else "never"
    params = {"hidden_layer_sizes": (8, 5), "max_iter": 12, "random_state": 0, "batch_size": 50,
              "n_iter_no_change": 3, **case["params"]}  # fmt: skip
    if loss is not None:
        params["loss"] = loss
    if case["engine"] in ("torch", "jax"):
        params["backend"] = case["engine"]
    machine: Any = nullcontext()
    if case["engine"] == "cuda":
        params["device"] = "gpu"
        import fake_cuda

        machine = fake_cuda.install(fake_cuda.Driver())
    with machine, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", category=RuntimeWarning)  # a fallback is another engine
        model = kind(**params).fit(X, y, sample_weight=weights)
    arrays = [*model.coefs_, *model.intercepts_, np.asarray(getattr(model, "loss_curve_", ()))]
    return [np.ascontiguousarray(a).tobytes() for a in arrays]


def fits(tree: Path) -> dict[int, Any]:
    """Return the fits of a tree, in a process of its own; texts are reasons why there is none."""
    code = "import sys; sys.path[:0] = sys.argv[1:4]; import same_bits; same_bits.main_of_a_tree()"
    with tempfile.NamedTemporaryFile() as file:
        paths = [str(tree), str(tree / "tests"), str(Path(__file__).parent)]
        subprocess.run([sys.executable, "-c", code, *paths, file.name], check=True, cwd="/")
        found: dict[int, Any] = pickle.loads(Path(file.name).read_bytes())
    return found


def main_of_a_tree() -> None:
    """Fit all, and leave what came out in a file."""
    import portable_mlp

    assert Path(portable_mlp.__file__).parents[1] == Path(sys.argv[1])
    found: dict[int, Any] = {}
    for i, case in enumerate(cases()):
        library = case["engine"]
        if library in ("torch", "jax") and not find_spec(library):
            found[i] = f"{library} is not installed"
            continue
        try:
            found[i] = fit(case)
        except Exception as error:
            found[i] = f"{type(error).__name__}: {error}"
    Path(sys.argv[4]).write_bytes(pickle.dumps(found))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("commit", help="the earlier one")
    commit = parser.parse_args().commit
    with tempfile.TemporaryDirectory() as folder:
        before = Path(folder) / "before"
        command = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*command, "add", "-q", "--detach", str(before), commit], check=True)
        try:
            wanted, found = fits(before.resolve()), fits(ROOT)
        finally:
            subprocess.run([*command, "remove", "--force", str(before)], check=True)
    differ = {i for i in found if found[i] != wanted[i]}
    failed = {i for i in found if isinstance(found[i], str)} | {
        i for i in wanted if isinstance(wanted[i], str)
    }
    for i in sorted(differ | failed):
        print(i, cases()[i], wanted[i] if isinstance(wanted[i], str) else "fitted",
              found[i] if isinstance(found[i], str) else "fitted", sep="; ")  # fmt: skip
    print(f"{len(found) - len(differ | failed)} of {len(found)} fits are equal to the last bit")
    return int(bool(differ))


if __name__ == "__main__":
    sys.exit(main())
