"""Ctrl-C at a given moment of a test."""

import ctypes
import signal


def press_ctrl_c():
    """Send SIGINT to this thread, which has to be the main one, and run its handler.

    CPython only notes a signal, and runs the handler when it looks at its notes.  Another thread
    that asks for the lock meanwhile can delay that, so that two signals in a row become one.
    """
    signal.raise_signal(signal.SIGINT)
    ctypes.pythonapi.PyErr_CheckSignals()
