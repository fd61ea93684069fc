"""Backpropagation from first principles: two classes.

A network of layers [4, 16, 1], ReLU hidden, sigmoid output, trained on the binary
cross-entropy by plain gradient descent over all rows at once.

    python scripts/train_binary.py --device cpu
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from portable_mlp import BackendError, get_backend, mlp
from portable_mlp.app.table import load_bundled, read_csv
from portable_mlp.backends import BACKENDS, DEVICES
from portable_mlp.functions import sigmoid
from portable_mlp.initializers import HeNormal, Zeros
from portable_mlp.losses import BinaryCrossEntropy

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("--device", choices=DEVICES, help="NumPy or CuPy (default: cpu)")
parser.add_argument("--backend", choices=BACKENDS)
parser.add_argument("--data", type=Path, help="CSV, last column the label (default: iris)")
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()

# ------------------------------------------------------------------ the data
# X (n, 4) holds a sample in each row, y (n,) is 1 or 0
try:
    backend = get_backend(args.device, args.backend)
    if args.data:
        table, labels = read_csv(args.data)
        X, y = np.asarray(table, dtype=np.float64), labels == np.unique(labels)[-1]
        if len(np.unique(labels)) != 2:
            raise ValueError(f"{args.data}: expected two classes, got {len(np.unique(labels))}")
    else:
        X, labels = load_bundled("iris")
        y = labels == 0  # setosa against the rest
except (BackendError, ModuleNotFoundError, OSError, ValueError) as error:
    sys.exit(f"error: {error}")

# ------------------------------------------------------------------ the network
network = mlp([X.shape[1], 16, 1], "relu", weight_init=HeNormal(), bias_init=Zeros())
loss = BinaryCrossEntropy()
learning_rate = 0.005
xp = backend.xp

with backend.scope("float64"):
    X, y = backend.asarray(X), backend.asarray(y, "float64")
    params = [backend.asarray(p) for p in network.init(np.random.RandomState(args.seed))]

    # -------------------------------------------------------------- gradient descent
    def step(params, X, y):
        # Forward:  z₁ = X W₁ + b₁,  a₁ = max(z₁, 0),  z₂ = a₁ W₂ + b₂
        z, residuals = network.forward(params, X, xp)
        # Loss:  L = −mean[y log σ(z₂) + (1 − y) log(1 − σ(z₂))],  dz₂ = (σ(z₂) − y) / n
        value, dz = loss(z, y, xp)
        # Backward, last layer first:  dWᵢ = aᵢ₋₁ᵀ dzᵢ,  dbᵢ = Σ dzᵢ,
        # and on to the layer below:  dzᵢ₋₁ = (dzᵢ Wᵢᵀ) · [zᵢ₋₁ > 0]
        grads = network.backward(params, residuals, dz, xp)
        # Update:  against the gradient
        return [p - learning_rate * g for p, g in zip(params, grads, strict=True)], value

    step = backend.compile(step)  # as it is on NumPy and CuPy; XLA on JAX
    for iteration in range(1, 5001):
        params, value = step(params, X, y)
        if iteration == 1 or iteration % 500 == 0:
            print(f"iteration {iteration:4d}  loss {float(value):.6f}")

    # -------------------------------------------------------------- the result
    probability = sigmoid(network(params, X, xp), xp)[:, 0]
    correct = (probability > 0.5) == (y == 1.0)
    accuracy = float(xp.mean(xp.astype(correct, xp.float64)))

print(f"training accuracy {accuracy:.4f} on {len(labels)} rows ({backend})")
