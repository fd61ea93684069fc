"""Learning-rate schedules: a factor on the learning rate, computed on the host.

``factor(clock, state)`` is asked before every step.  A schedule that reacts to what
happens keeps its memory in ``state``: ``init`` makes it, ``observe`` sees the loss (or
the negative validation score) after each epoch, and ``stalled`` is asked when the loop
would stop for lack of progress.

To add one, subclass `Schedule` and list it in `SCHEDULES`: estimators and command line take
their names from there.  By name, its other fields than an estimator's parameters are as by
default.  An instance needs no name.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, inf, pi
from typing import Any, NamedTuple


class Clock(NamedTuple):
    """Where training stands before a step.

    Attributes
    ----------
    step : int
        Steps done.
    total_steps : int
        Steps that training will do if nothing stops it.
    epoch : int
        Epochs completed.
    rows : int
        Rows seen in completed epochs.
    """

    step: int
    total_steps: int
    epoch: int
    rows: int


@dataclass(frozen=True)
class Schedule:
    """A constant rate; and the base of all schedules."""

    def init(self) -> Any:
        """Memory before the first step."""
        return None

    def factor(self, clock: Clock, state: Any) -> float:
        """Return what to multiply the learning rate by."""
        return 1.0

    def rate(self, initial: float, clock: Clock, state: Any) -> float:
        """Return the learning rate of the next step."""
        return initial * self.factor(clock, state)

    def observe(self, state: Any, loss: float) -> Any:
        """Memory after an epoch that ended with this loss."""
        return state

    def stalled(self, state: Any, rate: float) -> Any | None:
        """Memory to go on with although progress has stalled at this rate; None to stop."""
        return None


def reacts(schedule: Schedule) -> bool:
    """Whether a schedule reacts to the loss: it remembers something, or goes on when stalled."""
    kind = type(schedule)
    return kind.observe is not Schedule.observe or kind.stalled is not Schedule.stalled


@dataclass(frozen=True)
class Scheduled:
    """A number that follows a schedule within a fit.

    Replaces a number that training looks up in each step: the rate of
    `layers.Dropout`, the ``weight_decay`` of an optimizer.

    Parameters
    ----------
    value : float, or a tuple of them
        A tuple has one for each member of an ensemble.
    schedule : Schedule
        Its factor on the value; it must not react to the loss.

    Raises
    ------
    ValueError
        If the schedule reacts to the loss.
    """

    value: float | tuple[float, ...]
    schedule: Schedule

    def __post_init__(self) -> None:
        if reacts(self.schedule):
            raise ValueError(f"a number's schedule must not react to the loss: {self.schedule!r}")


def at(number: float | tuple[float, ...] | Scheduled, clock: Clock) -> Any:
    """Return what a number is before a step; of a tuple, each."""
    if isinstance(number, Scheduled):
        schedule, value = number.schedule, number.value
        if isinstance(value, tuple):
            return tuple(float(schedule.rate(v, clock, None)) for v in value)
        return float(schedule.rate(value, clock, None))
    # Python's: NumPy's scalars would turn float32 into float64
    return tuple(map(float, number)) if isinstance(number, tuple) else float(number)


@dataclass(frozen=True)
class InverseScaling(Schedule):
    """1 / (rows + 1)^power, once an epoch: scikit-learn's "invscaling"."""

    power: float = 0.5

    def factor(self, clock: Clock, state: Any) -> float:
        return self.rate(1.0, clock, state)

    def rate(self, initial: float, clock: Clock, state: Any) -> float:
        # Divided, as there: the last bit is the same
        return initial / (clock.rows + 1.0) ** self.power if clock.epoch else initial


@dataclass(frozen=True)
class Step(Schedule):
    """gamma^⌊epoch / every⌋.

    Parameters
    ----------
    every : int >= 1, default=50
        Epochs.
    gamma : float >= 0, default=0.1
    """

    every: int = 50
    gamma: float = 0.1

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every must be at least 1, got {self.every!r}")
        if not self.gamma >= 0.0:
            raise ValueError(f"gamma must be at least 0, got {self.gamma!r}")

    def factor(self, clock: Clock, state: Any) -> float:
        return float(self.gamma ** (clock.epoch // self.every))


def _cosine(start: float, end: float, progress: float) -> float:
    """Half a cosine wave from start (progress 0) to end (progress 1 and beyond)."""
    progress = min(progress, 1.0)
    return end + (start - end) * (1.0 + cos(pi * progress)) / 2.0


@dataclass(frozen=True)
class Cosine(Schedule):
    """Linear warm-up from nothing, then half a cosine wave down to ``final``.

    Loshchilov and Hutter (2017), eq. 5, without restarts.

    Parameters
    ----------
    warmup : float in [0, 1), default=0
        Share of all steps that the warm-up takes.
    final : float, default=0
        Factor reached after the last step.
    """

    warmup: float = 0.0
    final: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.warmup < 1.0:
            raise ValueError(f"warmup must be in [0, 1), got {self.warmup!r}")

    def factor(self, clock: Clock, state: Any) -> float:
        up = self.warmup * clock.total_steps
        if clock.step < up:
            return (clock.step + 1.0) / (up + 1.0)
        return _cosine(1.0, self.final, (clock.step - up) / (clock.total_steps - up))


@dataclass(frozen=True)
class OneCycle(Schedule):
    """Up from ``start`` to 1 and down to ``final``, by cosines (Smith and Topin, 2018).

    The defaults are those of torch.optim.lr_scheduler.OneCycleLR.

    Parameters
    ----------
    peak : float in (0, 1), default=0.3
        Share of all steps before the peak.
    start : float, default=1/25
    final : float, default=1/250000
    """

    peak: float = 0.3
    start: float = 1.0 / 25.0
    final: float = 1.0 / 250_000.0

    def __post_init__(self) -> None:
        if not 0.0 < self.peak < 1.0:
            raise ValueError(f"peak must be in (0, 1), got {self.peak!r}")

    def factor(self, clock: Clock, state: Any) -> float:
        last = clock.total_steps - 1.0
        top = self.peak * clock.total_steps - 1.0
        if clock.step < top:
            return _cosine(self.start, 1.0, clock.step / top)
        return _cosine(1.0, self.final, (clock.step - top) / (last - top))


class _Plateau(NamedTuple):
    factor: float = 1.0
    best: float = inf
    waited: int = 0


@dataclass(frozen=True)
class ReduceOnPlateau(Schedule):
    """Multiply by ``gamma`` when the loss has not improved for ``patience`` epochs.

    Improved means: below best · (1 − threshold) for a positive best, as
    torch.optim.lr_scheduler.ReduceLROnPlateau counts it in its relative mode.

    Parameters
    ----------
    gamma : float in (0, 1), default=0.1
    patience : int >= 0, default=10
        Epochs without improvement that are let pass.
    threshold : float >= 0, default=1e-4
    min_factor : float >= 0, default=1e-4
        When the factor is there, training may stop for lack of progress.
    """

    gamma: float = 0.1
    patience: int = 10
    threshold: float = 1e-4
    min_factor: float = 1e-4

    def __post_init__(self) -> None:
        if not 0.0 < self.gamma < 1.0:
            raise ValueError(f"gamma must be in (0, 1), got {self.gamma!r}")
        for name in ("patience", "threshold", "min_factor"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)!r}")

    def init(self) -> _Plateau:
        return _Plateau()

    def factor(self, clock: Clock, state: _Plateau) -> float:
        return state.factor

    def observe(self, state: _Plateau, loss: float) -> _Plateau:
        if state.best == inf or loss < state.best - self.threshold * abs(state.best):
            return state._replace(best=loss, waited=0)
        if state.waited < self.patience:
            return state._replace(waited=state.waited + 1)
        factor = max(state.factor * self.gamma, self.min_factor)
        return state._replace(factor=factor, waited=0)

    def stalled(self, state: _Plateau, rate: float) -> _Plateau | None:
        # A rate lowered in this very epoch deserves its chance
        lowered = state.waited == 0 and state.factor > self.min_factor
        return state if lowered else None


class _Divided(NamedTuple):
    factor: float = 1.0
    rate: float | None = None


@dataclass(frozen=True)
class Adaptive(Schedule):
    """Divide by 5 whenever training would stop, until the rate is at most 10⁻⁶.

    scikit-learn's "adaptive".
    """

    def init(self) -> _Divided:
        return _Divided()

    def factor(self, clock: Clock, state: _Divided) -> float:
        return state.factor

    def stalled(self, state: _Divided, rate: float) -> _Divided | None:
        # Divided one by one, as there: a product of factors may round across 10⁻⁶
        rate = rate if state.rate is None else state.rate
        return None if rate <= 1e-6 else _Divided(state.factor / 5.0, rate / 5.0)


SCHEDULES: dict[str, type[Schedule]] = {
    "constant": Schedule,
    "invscaling": InverseScaling,
    "adaptive": Adaptive,
    "step": Step,
    "cosine": Cosine,
    "one_cycle": OneCycle,
    "reduce_on_plateau": ReduceOnPlateau,
}
