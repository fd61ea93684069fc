"""Training: the loop over epochs, its state between two calls, and L-BFGS."""

from portable_mlp.training.loop import Trainer
from portable_mlp.training.state import (
    Begun,
    DivergenceError,
    State,
    StopReason,
    Validate,
    is_kept,
)

__all__ = ["Begun", "DivergenceError", "State", "StopReason", "Trainer", "Validate", "is_kept"]
