"""The rows that a run on the penguins trains and tests on."""

from __future__ import annotations

import numpy as np
from sklearn.model_selection import train_test_split

from portable_mlp.app.table import PENGUINS, read_csv


def held_back(target):
    """Return X and y of the training rows, and those of the test rows, with the default seed."""
    X, y = read_csv(PENGUINS, target)
    classes = y if y.dtype.kind == "U" else None
    train, test = train_test_split(
        np.arange(len(y)), test_size=0.2, random_state=0, stratify=classes
    )
    return X[train], y[train], X[test], y[test]
