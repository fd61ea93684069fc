"""Backpropagation from first principles: four classes.

A network of layers [64, 8, 32, 8, 4], ReLU hidden, softmax output, trained on the
categorical cross-entropy by plain gradient descent over all rows at once, raw inputs.

    python scripts/train_multiclass.py --device cpu
    python scripts/train_multiclass.py --device cpu --recipe better
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

import numpy as np

from portable_mlp import BackendError, MLPClassifier, get_backend, mlp
from portable_mlp.app.table import load_bundled, read_csv
from portable_mlp.backends import BACKENDS, DEVICES
from portable_mlp.initializers import HeNormal, Zeros
from portable_mlp.losses import SoftmaxCrossEntropy

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("--device", choices=DEVICES, help="NumPy or CuPy (default: cpu)")
parser.add_argument("--backend", choices=BACKENDS)
parser.add_argument("--data", type=Path, help="CSV, last column the label (default: digits 0 to 3)")
parser.add_argument("--recipe", choices=["plain", "better"], default="plain")
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()

HIDDEN, PASSES = [8, 32, 8], 5000

# ------------------------------------------------------------------ the data
# X (n, 64) holds a sample in each row, y (n,) its class as a number from 0
try:
    backend = get_backend(args.device, args.backend)
    if args.data:
        table, labels = read_csv(args.data)
        X = np.asarray(table, dtype=np.float64)
    else:
        X, labels = load_bundled("digits")
        X, labels = X[labels < 4], labels[labels < 4]
except (BackendError, ModuleNotFoundError, OSError, ValueError) as error:
    sys.exit(f"error: {error}")
classes, y = np.unique(labels, return_inverse=True)

if args.recipe == "better":
    # What the library does unless told otherwise: Adam on mini-batches of 200 in a new
    # order each epoch, Glorot weights, a small L2 penalty, stop when the loss does.
    warnings.simplefilter("ignore")
    model = MLPClassifier(
        HIDDEN, max_iter=PASSES, random_state=args.seed, device=args.device, backend=args.backend
    )
    accuracy = model.fit(X, y).score(X, y)
    print(f"{model.n_iter_} of {PASSES} passes, loss {model.loss_:.6f}")
    print(f"training accuracy {accuracy:.4f} on {len(y)} rows ({backend})")
    sys.exit()

# ------------------------------------------------------------------ the network
sizes = [X.shape[1], *HIDDEN, len(classes)]
network = mlp(sizes, "relu", weight_init=HeNormal(), bias_init=Zeros())
loss = SoftmaxCrossEntropy()
learning_rate = 0.005
xp = backend.xp

with backend.scope("float64"):
    X, y = backend.asarray(X), backend.asarray(y, "int32")
    params = [backend.asarray(p) for p in network.init(np.random.RandomState(args.seed))]

    # -------------------------------------------------------------- gradient descent
    def step(params, X, y):
        # Forward:  zᵢ = aᵢ₋₁ Wᵢ + bᵢ,  aᵢ = max(zᵢ, 0),  S = softmax of the last z
        z, residuals = network.forward(params, X, xp)
        # Loss:  L = −mean Σ Y log S with Y the labels one-hot,  dZ = (S − Y) / n
        value, dz = loss(z, y, xp)
        # Backward, last layer first:  dWᵢ = aᵢ₋₁ᵀ dzᵢ,  dbᵢ = Σ dzᵢ,
        # and on to the layer below:  dzᵢ₋₁ = (dzᵢ Wᵢᵀ) · [zᵢ₋₁ > 0]
        grads = network.backward(params, residuals, dz, xp)
        # Update:  against the gradient
        return [p - learning_rate * g for p, g in zip(params, grads, strict=True)], value

    step = backend.compile(step)  # as it is on NumPy and CuPy; XLA on JAX
    for iteration in range(1, PASSES + 1):
        params, value = step(params, X, y)
        if iteration == 1 or iteration % 500 == 0:
            print(f"iteration {iteration:4d}  loss {float(value):.6f}")

    # -------------------------------------------------------------- the result
    predicted = xp.argmax(network(params, X, xp), axis=1)
    accuracy = float(xp.mean(xp.astype(predicted == y, xp.float64)))

print(f"training accuracy {accuracy:.4f} on {len(labels)} rows ({backend})")
