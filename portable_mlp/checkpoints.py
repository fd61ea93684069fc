"""Checkpoints: files from which interrupted training resumes."""

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
    """A callback that saves a fit to a file while it runs, also in the middle of an epoch.

    The file is a model file that also holds the state of training.  `portable_mlp.load`
    reads it.  Calling ``continue_fit`` on the loaded model, with the same rows, leads to the
    weights of a run that was never interrupted; on NumPy they are equal to the last bit.
    The file is written as by `portable_mlp.save`: if the process is killed, the last
    checkpoint remains complete.  Ctrl-C writes a checkpoint before training stops.  If
    writing fails, for example on a full disk, a RuntimeWarning is issued, training
    continues, and the next checkpoint is written at its regular time.

    Parameters
    ----------
    path : path
        File to write; it is replaced each time.
    every : float, default=60
        Seconds between two checkpoints, the most work that a kill can cost.  On JAX it is
        half a second more, since steps are compiled in loops.
    preprocessing, notes : optional
        Objects to keep in the file, see `portable_mlp.save`.

    Raises
    ------
    ValueError
        If ``every`` is negative.
    FileNotFoundError
        When a fit begins, if the folder of ``path`` does not exist.

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
        if not self.path.parent.is_dir():  # an early error, before an hour of training
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
