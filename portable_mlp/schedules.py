"""Learning-rate schedules: a factor on the learning rate, computed on the host.

``factor(clock, state)`` is called before every step.  A schedule that reacts to the loss
keeps its memory in ``state``: ``init`` creates it, ``observe`` receives the loss (or the
negative validation score) after each epoch, and ``stalled`` is called when the loop would
stop for lack of progress.

To add a schedule, subclass `Schedule` and list it in `SCHEDULES`: estimators and the command
line take their names from there.  If an estimator selects it by name, fields that are not
parameters of the estimator keep their defaults.  An instance can be given without a name.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, inf, log2, pi
from typing import Any, NamedTuple


class Clock(NamedTuple):
    """The position of training before a step.

    Attributes
    ----------
    step : int
        Number of completed steps.
    total_steps : int
        Number of steps of the whole training, unless it stops early.
    epoch : int
        Number of completed epochs.
    rows : int
        Number of rows seen in completed epochs.
    """

    step: int
    total_steps: int
    epoch: int
    rows: int


@dataclass(frozen=True)
class Schedule:
    """The constant schedule, and the base class of all schedules."""

    def init(self) -> Any:
        """Return the memory before the first step."""
        return None

    def factor(self, clock: Clock, state: Any) -> float:
        """Return the factor on the initial learning rate for the next step."""
        return 1.0

    def rate(self, initial: float, clock: Clock, state: Any) -> float:
        """Return the learning rate of the next step."""
        return initial * self.factor(clock, state)

    def observe(self, state: Any, loss: float) -> Any:
        """Return the memory after an epoch that ended with this loss."""
        return state

    def stalled(self, state: Any, rate: float) -> Any | None:
        """Return the memory to continue with when progress has stalled, or None to stop.

        Parameters
        ----------
        state : object
            The schedule's memory.
        rate : float
            Learning rate of the last step.
        """
        return None


def reacts(schedule: Schedule) -> bool:
    """Tell whether a schedule reacts to the loss, by overriding ``observe`` or ``stalled``."""
    kind = type(schedule)
    return kind.observe is not Schedule.observe or kind.stalled is not Schedule.stalled


@dataclass(frozen=True)
class Scheduled:
    """A number that follows a schedule within a fit.

    It can replace a number that training looks up in each step, such as the rate of
    `layers.Dropout` or the ``weight_decay`` of an optimizer.

    Parameters
    ----------
    value : float, or a tuple of them
        Initial value; a tuple has one for each member of an ensemble.
    schedule : Schedule
        Schedule whose factor multiplies the value; it must not react to the loss.

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
    """Return the value of a number before a step; for a tuple, the values of all its items."""
    if isinstance(number, Scheduled):
        schedule, value = number.schedule, number.value
        if isinstance(value, tuple):
            return tuple(float(schedule.rate(v, clock, None)) for v in value)
        return float(schedule.rate(value, clock, None))
    # Python floats: NumPy's float64 scalars would promote float32 arrays to float64
    return tuple(map(float, number)) if isinstance(number, tuple) else float(number)


@dataclass(frozen=True)
class InverseScaling(Schedule):
    """Inverse scaling, 1 / (rows + 1)^power: scikit-learn's "invscaling".

    The factor changes once an epoch; it is 1 in the first.

    Parameters
    ----------
    power : float, default=0.5
        Exponent of the number of rows seen in completed epochs.
    """

    power: float = 0.5

    def factor(self, clock: Clock, state: Any) -> float:
        return self.rate(1.0, clock, state)

    def rate(self, initial: float, clock: Clock, state: Any) -> float:
        # scikit-learn divides too; multiplying by a factor could round the last bit differently
        return initial / (clock.rows + 1.0) ** self.power if clock.epoch else initial


@dataclass(frozen=True)
class Step(Schedule):
    """Step decay, gamma^⌊epoch / every⌋.

    Parameters
    ----------
    every : int >= 1, default=50
        Number of epochs between two changes.
    gamma : float >= 0, default=0.1
        Factor of each change.

    Raises
    ------
    ValueError
        If a parameter is out of its range.
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
    """Return half a cosine wave from start (progress 0) to end (progress 1 and beyond)."""
    progress = min(progress, 1.0)
    return end + (start - end) * (1.0 + cos(pi * progress)) / 2.0


@dataclass(frozen=True)
class Cosine(Schedule):
    """Cosine decay to ``final`` after a linear warm-up from zero.

    The decay is that of Loshchilov and Hutter (2017), eq. 5, without restarts.

    Parameters
    ----------
    warmup : float in [0, 1), default=0
        Fraction of all steps that the warm-up takes.
    final : float, default=0
        Factor reached after the last step.

    Raises
    ------
    ValueError
        If ``warmup`` is not in [0, 1).
    """

    warmup: float = 0.0
    final: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.warmup < 1.0:
            raise ValueError(f"warmup must be in [0, 1), got {self.warmup!r}")

    def factor(self, clock: Clock, state: Any) -> float:
        up = self.warmup * clock.total_steps
        if clock.step < up:
            return (clock.step + 1.0) / (up + 1.0)  # a factor of 0 would waste the first step
        return _cosine(1.0, self.final, (clock.step - up) / (clock.total_steps - up))


@dataclass(frozen=True)
class OneCycle(Schedule):
    """One cycle: up from ``start`` to 1, then down to ``final``, by cosines.

    The schedule is that of Smith and Topin (2018), with the defaults of
    torch.optim.lr_scheduler.OneCycleLR.

    Parameters
    ----------
    peak : float in (0, 1), default=0.3
        Fraction of all steps before the peak.
    start : float, default=1/25
        Factor of the first step.
    final : float, default=1/250000
        Factor of the last step.

    Raises
    ------
    ValueError
        If ``peak`` is not in (0, 1).
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


@dataclass(frozen=True)
class LogCosine(Schedule):
    """Cosine waves that become longer, ½ (1 − cos(2π log₂(1 + (2ᶜ − 1) t))) at progress t.

    It starts and ends at 0.  Each of the c ``cycles`` takes twice the time of the one before it.
    This is "coslog4" of RealMLP (Holzmüller et al., 2024).

    Parameters
    ----------
    cycles : int >= 1, default=4
        Number of waves, c.

    Raises
    ------
    ValueError
        If ``cycles`` is below 1.
    """

    cycles: int = 4

    def __post_init__(self) -> None:
        if self.cycles < 1:
            raise ValueError(f"cycles must be at least 1, got {self.cycles!r}")

    def factor(self, clock: Clock, state: Any) -> float:
        turns = log2(1.0 + (2.0**self.cycles - 1.0) * clock.step / clock.total_steps)
        return 0.5 * (1.0 - cos(2.0 * pi * turns))


@dataclass(frozen=True)
class FlatCosine(Schedule):
    """1 for the first half of all steps, then half a cosine wave down to 0.

    This is "flat_cos" of RealMLP (Holzmüller et al., 2024).
    """

    def factor(self, clock: Clock, state: Any) -> float:
        return _cosine(1.0, 0.0, max(0.0, 2.0 * clock.step / clock.total_steps - 1.0))


class _Plateau(NamedTuple):
    """Memory of `ReduceOnPlateau`: its factor, the best loss, and epochs without improvement."""

    factor: float = 1.0
    best: float = inf
    waited: int = 0


@dataclass(frozen=True)
class ReduceOnPlateau(Schedule):
    """Multiplication by ``gamma`` when the loss has not improved for ``patience`` epochs.

    An improvement is a loss below best · (1 − threshold) for a positive best, as in the
    relative mode of torch.optim.lr_scheduler.ReduceLROnPlateau.

    Parameters
    ----------
    gamma : float in (0, 1), default=0.1
        Factor of each reduction.
    patience : int >= 0, default=10
        Number of epochs without improvement that are tolerated.
    threshold : float >= 0, default=1e-4
        Smallest relative decrease of the loss that counts as an improvement.
    min_factor : float >= 0, default=1e-4
        Lower limit of the factor.  Once it is reached, training may stop for lack of
        progress.

    Raises
    ------
    ValueError
        If a parameter is out of its range.
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
        # abs: with a negative best, such as a negated score, the margin must still lie below it
        if state.best == inf or loss < state.best - self.threshold * abs(state.best):
            return state._replace(best=loss, waited=0)
        if state.waited < self.patience:
            return state._replace(waited=state.waited + 1)
        factor = max(state.factor * self.gamma, self.min_factor)
        return state._replace(factor=factor, waited=0)

    def stalled(self, state: _Plateau, rate: float) -> _Plateau | None:
        # If the rate was lowered in this epoch, training must go on to try it
        lowered = state.waited == 0 and state.factor > self.min_factor
        return state if lowered else None


class _Divided(NamedTuple):
    """Memory of `Adaptive`: the factor, and the rate that follows from it by divisions."""

    factor: float = 1.0
    rate: float | None = None


@dataclass(frozen=True)
class Adaptive(Schedule):
    """Division by 5 whenever training would stop, until the rate is at most 10⁻⁶.

    This is scikit-learn's "adaptive".
    """

    def init(self) -> _Divided:
        return _Divided()

    def factor(self, clock: Clock, state: _Divided) -> float:
        return state.factor

    def stalled(self, state: _Divided, rate: float) -> _Divided | None:
        # The rate is divided each time, as in scikit-learn: a product of factors may round
        # to the other side of 10⁻⁶
        rate = rate if state.rate is None else state.rate
        return None if rate <= 1e-6 else _Divided(state.factor / 5.0, rate / 5.0)


SCHEDULES: dict[str, type[Schedule]] = {
    "constant": Schedule,
    "invscaling": InverseScaling,
    "adaptive": Adaptive,
    "step": Step,
    "cosine": Cosine,
    "one_cycle": OneCycle,
    "log_cosine": LogCosine,
    "flat_cosine": FlatCosine,
    "reduce_on_plateau": ReduceOnPlateau,
}
