"""Train, be killed, resume: a script of its own, since the one who is killed is a process.

Children of this process train with checkpoints and send themselves SIGKILL at a given
moment; the parent, which knows nothing of their training, resumes from what they left,
and prints for each moment what it found.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from pathlib import Path

import numpy as np

from portable_mlp import Checkpoint, MLPClassifier, MLPRegressor, ModelFileError, load
from portable_mlp.optimizers import RMSprop
from portable_mlp.persistence import modelfile
from portable_mlp.schedules import Cosine, ReduceOnPlateau

RNG = np.random.RandomState(0)
X = RNG.standard_normal((300, 5))
LABELS = np.where(X[:, 0] * X[:, 1] > 0, "yes", "no")
TARGET = np.sin(2 * X[:, 0]) + X[:, 1]
EVERY = 3  # steps

COMMON = {"hidden_layer_sizes": (12, 6), "batch_size": 32, "random_state": 1}
CASES = {
    "early stopping, dropout, cosine": lambda **more: MLPClassifier(
        **COMMON, max_iter=12, early_stopping=True, n_iter_no_change=2, dropout=0.2,
        learning_rate=Cosine(0.2), learning_rate_init=0.02, **more,
    ).fit(X, LABELS),
    "reduce on plateau, unshuffled": lambda **more: MLPRegressor(
        **COMMON, max_iter=6, solver=RMSprop(), shuffle=False, clip_norm=1.0,
        learning_rate=ReduceOnPlateau(patience=0, threshold=0.1), **more,
    ).fit(X, TARGET),
}  # fmt: skip

# Killed after the n-th step, or in the n-th save: half written, written but not renamed,
# just renamed.  A save follows every third step; nine or ten steps are an epoch.
MOMENTS = [
    ("step", 2), ("write", 1), ("rename", 1), ("renamed", 1), ("step", 4), ("write", 2),
    ("step", 14), ("rename", 5), ("renamed", 7), ("write", 12), ("step", 45),
]  # fmt: skip


class EverySteps(Checkpoint):
    """By steps, not by seconds: the same moments on every machine."""

    def __init__(self, path, moment):
        super().__init__(path)
        self.moment = moment
        self.steps = self.since = 0

    def wants_pause(self):
        if self.since == EVERY:
            return True
        self.steps += 1
        self.since += 1
        if self.moment == ("step", self.steps):
            os.kill(os.getpid(), signal.SIGKILL)
        return self.since == EVERY

    def on_pause(self, model):
        super().on_pause(model)
        self.since = 0


def die_in(moment, path):
    """Let the n-th save be the last thing this process does."""
    what, count = moment
    fsync, replace = os.fsync, os.replace
    saves = 0

    def counted_fsync(descriptor):
        nonlocal saves
        fsync(descriptor)
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            return
        saves += 1
        if (what, count) == ("write", saves):
            os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    def counted_replace(old, new):
        if (what, count) == ("rename", saves):
            os.kill(os.getpid(), signal.SIGKILL)
        replace(old, new)
        if (what, count) == ("renamed", saves):
            os.kill(os.getpid(), signal.SIGKILL)

    os.fsync, os.replace = counted_fsync, counted_replace


def write_in_place(path, parts):
    """The twin: the old file is gone before the new one is there."""
    with open(path, "wb") as file:
        file.writelines(parts)
        file.flush()
        os.fsync(file.fileno())


def main(folder, careless):
    warnings.simplefilter("ignore")
    if careless:
        modelfile.write_whole = write_in_place
    for name, fit in CASES.items():
        whole = fit()
        for i, moment in enumerate(MOMENTS):
            path = Path(folder) / name / str(i) / "checkpoint"
            path.parent.mkdir(parents=True)
            child = os.fork()
            if not child:
                die_in(moment, path)
                fit(callbacks=[EverySteps(path, moment)])
                os._exit(0)
            _, status = os.waitpid(child, 0)
            begun, target = None, LABELS if "stop" in name else TARGET
            if path.exists():
                try:
                    model = load(path)
                except ModelFileError as error:
                    print(json.dumps({"case": name, "moment": moment, "broken": str(error)}))
                    continue
                begun = model._state.epochs, model._state.begun.steps
                model.continue_fit(X, target)
            else:
                model = fit()
            pairs = zip(
                [*model.coefs_, *model.intercepts_, model.loss_curve_],
                [*whole.coefs_, *whole.intercepts_, whole.loss_curve_],
                strict=True,
            )
            found = {
                "case": name,
                "moment": moment,
                "signal": os.WTERMSIG(status),
                "begun": begun,
                "left over": len(list(path.parent.iterdir())) - path.exists(),
                "equal": all(np.array_equal(a, b) for a, b in pairs),
                "epochs": model.n_iter_,
            }
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], careless=sys.argv[2:] == ["careless"])
