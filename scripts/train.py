"""Train a network on a table and keep what came of it.

    python scripts/train.py --device cpu
    python scripts/train.py --data houses.csv --target price --hidden 128,64 --device gpu

Writes learning_curve.png and model.safetensors into the folder --out.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from sklearn.utils.multiclass import type_of_target

from portable_mlp import BackendError, MLPClassifier, MLPRegressor, save
from portable_mlp.data import BUNDLED, load_bundled, make_preprocessing, read_csv
from portable_mlp.plots import plot_learning_curve


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    data = parser.add_argument_group("data")
    data.add_argument("--dataset", choices=BUNDLED, default="digits", help="bundled data to use")
    data.add_argument("--data", type=Path, metavar="CSV", help="a file of your own instead")
    data.add_argument("--target", metavar="NAME", help="its target column (default: the last)")
    data.add_argument("--task", choices=["auto", "classification", "regression"], default="auto")
    data.add_argument("--test-fraction", type=float, default=0.2, help="(default: %(default)s)")
    model = parser.add_argument_group("network and training")
    model.add_argument(
        "--hidden", type=widths, default=(100,), help="such as 128,64 (default: 100)"
    )
    model.add_argument("--activation", default="relu", help="(default: %(default)s)")
    model.add_argument(
        "--optimizer", choices=["adam", "adamw", "rmsprop", "sgd", "lbfgs"], default="adam"
    )
    model.add_argument("--learning-rate", type=float, default=1e-3, help="(default: %(default)s)")
    model.add_argument("--epochs", type=int, default=200, help="at most (default: %(default)s)")
    model.add_argument("--batch-size", type=int, default=200, help="(default: %(default)s)")
    model.add_argument("--dropout", type=float, default=0.0, help="(default: %(default)s)")
    model.add_argument("--early-stopping", action="store_true", help="watch held-out rows")
    model.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    model.add_argument("--no-scaling", action="store_true", help="leave inputs and target as are")
    where = parser.add_argument_group("where to compute")
    where.add_argument("--device", choices=["cpu", "gpu", "auto"], help="NumPy or CuPy")
    where.add_argument("--backend", choices=["numpy", "cupy", "torch", "jax"])
    where.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/latest"), help="(default: %(default)s)"
    )
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")
    return parser.parse_args(argv)


def widths(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part)


def train(args: argparse.Namespace) -> None:
    if args.data:
        X, y = read_csv(args.data, args.target if args.target is not None else -1)
    else:
        X, y = load_bundled(args.dataset)
    task = args.task
    if task == "auto":
        few = y.dtype.kind in "iu" and len(np.unique(y)) <= 20
        labels = y.dtype.kind in "bUO" or few or type_of_target(y) == "binary"
        task = "classification" if labels else "regression"
    classify = task == "classification"
    if classify and len(np.unique(y)) < 2:
        raise ValueError("the target has one class only: there is nothing to learn")
    X_train, X_test, y_train, y_test = train_test_split(
        X, y, test_size=args.test_fraction, random_state=args.seed, stratify=y if classify else None
    )
    print(f"{task}: {len(y_train)} rows to train on, {len(y_test)} to test, {X.shape[1]} columns")

    options = {
        "hidden_layer_sizes": args.hidden,
        "activation": args.activation,
        "solver": args.optimizer,
        "learning_rate_init": args.learning_rate,
        "max_iter": args.epochs,
        "batch_size": min(args.batch_size, len(y_train)),
        "dropout": args.dropout,
        "early_stopping": args.early_stopping,
        "random_state": args.seed,
        "device": args.device,
        "backend": args.backend,
        "dtype": args.dtype,
        "verbose": True,
    }
    preprocessing = None
    if not args.no_scaling or not isinstance(X, np.ndarray):
        preprocessing = make_preprocessing(X, args.dtype).fit(X_train)
        X_train, X_test = preprocessing.transform(X_train), preprocessing.transform(X_test)
    if classify:
        model = MLPClassifier(**options).fit(X_train, y_train)
    else:
        scaler = StandardScaler(with_mean=not args.no_scaling, with_std=not args.no_scaling)
        scaled = scaler.fit_transform(y_train.reshape(-1, 1).astype(np.float64))[:, 0]
        model = MLPRegressor(**options).fit(X_train, scaled)
        if not args.no_scaling:
            # y = mean + scale · ŷ is linear: the output layer can do it itself
            model.coefs_[-1] *= model.coefs_[-1].dtype.type(scaler.scale_[0])
            model.intercepts_[-1] *= model.intercepts_[-1].dtype.type(scaler.scale_[0])
            model.intercepts_[-1] += model.intercepts_[-1].dtype.type(scaler.mean_[0])

    name = "accuracy" if classify else "R²"
    print(f"train {name} {model.score(X_train, y_train):.4f}")
    print(f"test  {name} {model.score(X_test, y_test):.4f}")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.optimizer != "lbfgs":
        print(f"learning curve: {plot_learning_curve(model, args.out / 'learning_curve.png')}")
    print(f"model:          {save(model, args.out / 'model.safetensors', preprocessing)}")


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    warnings.simplefilter("ignore", ConvergenceWarning)
    try:
        train(args)
    except (BackendError, OSError, ValueError, ModuleNotFoundError) as error:
        if args.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
