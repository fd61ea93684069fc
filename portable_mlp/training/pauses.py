"""Pauses: when training halts between two steps, for callbacks or Ctrl-C."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from portable_mlp.callbacks import Callback, pausing


class Pauses:
    """When the loop halts between two steps, and what is done then.

    Parameters
    ----------
    interrupted : Event
    callbacks : sequence of Callback
        Those that ask for pauses are found here: without any, a step costs no more.
    model : callable
        What they are given.

    Attributes
    ----------
    due : callable
        Whether to halt.
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
        """Let the callbacks do what they wanted the pause for."""
        for callback in self._asking:
            callback.on_pause(self._model)


@contextmanager
def deferred_interrupt() -> Iterator[threading.Event]:
    """Turn Ctrl-C into an event that the loop looks at between batches.

    A second Ctrl-C raises KeyboardInterrupt at once.  Only the main thread receives
    signals.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def handle(signum: int, frame: FrameType | None) -> None:
        event.set()
        signal.signal(signal.SIGINT, previous)

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, previous)
