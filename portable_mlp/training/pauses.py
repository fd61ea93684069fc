"""Pauses of training between two steps, for callbacks or Ctrl-C."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from portable_mlp.callbacks import Callback, pausing


class Pauses:
    """The conditions under which the loop pauses, and the callbacks to run then.

    Parameters
    ----------
    interrupted : threading.Event
        Event that Ctrl-C sets.
    callbacks : sequence of Callback
        Callbacks of the fit; those that may want a pause are selected.  Without such
        callbacks, a step has no additional cost.
    model : callable
        Argument of `Callback.on_pause`.

    Attributes
    ----------
    due : callable
        Function without arguments that tells whether to pause now.
    """

    def __init__(
        self,
        interrupted: threading.Event,
        callbacks: Sequence[Callback],
        model: Callable[[], Any],
    ) -> None:
        self.interrupted = interrupted
        self._asking = pausing(callbacks)
        self._model = model
        self.due: Callable[[], bool] = self._due if self._asking else interrupted.is_set

    def _due(self) -> bool:
        return self.interrupted.is_set() or any(c.wants_pause() for c in self._asking)

    def hold(self) -> None:
        """Run the callbacks' ``on_pause``."""
        for callback in self._asking:
            callback.on_pause(self._model)


@contextmanager
def deferred_interrupt() -> Iterator[threading.Event]:
    """Turn Ctrl-C into an event that the loop checks between batches.

    A second Ctrl-C raises KeyboardInterrupt at once.  In other threads than the main one the
    event is never set, because Python delivers signals to the main thread only.  It is never
    set either in a process that ignores Ctrl-C, such as a shell's background job, or whose
    handler was not installed from Python.
    """
    event = threading.Event()
    elsewhere = threading.current_thread() is not threading.main_thread()
    if elsewhere or signal.getsignal(signal.SIGINT) in (signal.SIG_IGN, None):
        yield event
        return

    def handle(signum: int, frame: FrameType | None) -> None:
        event.set()
        signal.signal(signal.SIGINT, previous)  # so that a second Ctrl-C interrupts at once

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, previous)
