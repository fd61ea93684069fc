"""Checkpoints: training that was killed goes on as if it had not been."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from portable_mlp.callbacks import Callback
from portable_mlp.persistence import save_checkpoint
from portable_mlp.warn import warn


class Checkpoint(Callback):
    """Save a fit to a file while it runs, in the middle of an epoch too.

    The file is a model file that also holds where training stands: `portable_mlp.load`
    reads it, and `continue_fit` of what comes back goes on, with the same rows, to the
    weights of a run that was never interrupted: on NumPy to the last bit.  It is
    written as `portable_mlp.save` writes: whatever kills the process leaves the last
    checkpoint whole.  Ctrl-C writes one before training stops.  A disk that is full is a
    RuntimeWarning: training goes on, and the next one is tried when its time comes.

    Parameters
    ----------
    path : path
        One file, replaced each time.
    every : float, default=60
        Seconds between two of them, which is what a kill may cost; on JAX half a second
        more, since steps are compiled in loops.
    preprocessing, notes : optional
        To be kept in the file, see `portable_mlp.save`.

    Examples
    --------
    >>> import tempfile, warnings
    >>> from portable_mlp import Checkpoint, MLPClassifier, load
    >>> from sklearn.datasets import load_iris
    >>> X, y = load_iris(return_X_y=True)
    >>> warnings.simplefilter("ignore")  # it does not converge in 5 epochs
    >>> path = tempfile.mkdtemp() + "/run.checkpoint"
    >>> model = MLPClassifier(max_iter=5, random_state=0, callbacks=[Checkpoint(path, every=0)])
    >>> model = model.fit(X, y)
    >>> again = load(path).continue_fit(X, y)  # as if the process had been killed meanwhile
    >>> bool((again.coefs_[0] == model.coefs_[0]).all())
    True
    """

    def __init__(
        self,
        path: str | Path,
        every: float = 60.0,
        preprocessing: Any = None,
        *,
        notes: dict[str, Any] | None = None,
    ) -> None:
        if not every >= 0.0:
            raise ValueError(f"every: expected seconds, not below 0, got {every!r}")
        self.path = Path(path)
        self.every = every
        self.preprocessing = preprocessing
        self.notes = notes

    def on_fit_begin(self, max_epochs: int) -> None:
        if not self.path.parent.is_dir():  # said before an hour of training, not after
            raise FileNotFoundError(errno.ENOENT, "no folder for the checkpoint", str(self.path))
        self._saved = time.monotonic()

    def wants_pause(self) -> bool:
        return time.monotonic() - self._saved >= self.every

    def on_pause(self, model: Callable[[], Any]) -> None:
        try:
            save_checkpoint(model(), self.path, self.preprocessing, notes=self.notes)
        except OSError as error:
            said = f"{error}: training goes on without a new checkpoint"
            warn(said, RuntimeWarning)
        self._saved = time.monotonic()
