"""Groups of parameters: how the update and the penalty treat each.

A layer labels its parameters (`Param.group`); what a label means is said here, by a map from
labels to treatments.  A label that nobody treats is treated as weights are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import inf
from numbers import Real
from typing import Any

from portable_mlp.layers import Param
from portable_mlp.members import each
from portable_mlp.schedules import Schedule, reacts


@dataclass(frozen=True)
class Treatment:
    """How the parameters of a group are treated, relative to the others.

    Parameters
    ----------
    rate : float >= 0, or a tuple of them, default=1
        Factor on the learning rate; 0 leaves the parameters as they are.  A tuple has one for
        each member of an ensemble.
    decay : float >= 0, or a tuple of them, default=1
        Factor on the optimizer's ``weight_decay``; a tuple as of ``rate``.
    penalty : float >= 0, default=1
        Factor on the L2 penalty α.
    schedule : Schedule, optional
        Of the group's learning rate, in place of the common one; it must not react to the loss.

    Raises
    ------
    ValueError
        If a factor is negative or not finite, or the schedule reacts to the loss.
    """

    rate: float | tuple[float, ...] = 1.0
    decay: float | tuple[float, ...] = 1.0
    penalty: float = 1.0
    schedule: Schedule | None = None

    def __post_init__(self) -> None:
        for name in ("rate", "decay", "penalty"):
            value = getattr(self, name)
            several = isinstance(value, tuple) and name != "penalty"
            for number in value if several else (value,):
                real = isinstance(number, Real) and not isinstance(number, bool)
                if not (real and 0.0 <= number < inf):
                    raise ValueError(f"{name} must be at least 0 and finite, got {value!r}")
            # Python's: NumPy's scalars would turn float32 into float64
            own = tuple(map(float, value)) if several else float(value)
            object.__setattr__(self, name, own)
        if self.schedule is not None and reacts(self.schedule):
            raise ValueError(f"a group's schedule must not react to the loss: {self.schedule!r}")

    @cached_property
    def apart(self) -> bool:
        """Whether there is a number for each member."""
        return isinstance(self.rate, tuple) or isinstance(self.decay, tuple)


DEFAULT = Treatment()
TREATMENTS = {"bias": Treatment(penalty=0.0)}
"""By label, where it is not `DEFAULT`."""


def check(given: Mapping[Any, Any]) -> None:
    """Raise a ValueError unless a map is one from labels to treatments."""
    for label, treatment in given.items():
        if not (isinstance(label, str) and isinstance(treatment, Treatment)):
            raise ValueError(
                "treatments: expected labels of groups and instances of Treatment, got"
                f" {label!r}: {treatment!r}"
            )


@dataclass(frozen=True)
class Treatments:
    """The treatments of a network's parameters.

    Attributes
    ----------
    updates : tuple of Treatment
        Those that differ in the update, by rate, decay or schedule, each once.
    kinds : dict
        By label: its place in ``updates``.
    penalties : tuple of float
        Factors on α, each once; without 0.
    penalised : dict
        By label: its place in ``penalties``; None if it is not penalised.
    """

    updates: tuple[Treatment, ...]
    kinds: dict[str, int]
    penalties: tuple[float, ...]
    penalised: dict[str, int | None]

    @classmethod
    def of(
        cls, params: tuple[Param, ...], optimizer: Any, given: Mapping[str, Treatment] | None = None
    ) -> Treatments:
        """Look up the treatment of each parameter's label.

        Parameters
        ----------
        params : tuple of Param
        optimizer : Optimizer
            Whether there is a decay, and whether biases take part in it.
        given : dict, optional
            By label, in place of `TREATMENTS`.

        Raises
        ------
        ValueError
            If a label is given that no parameter has, a treatment has one number for each of
            other members than the parameters have, or `check` finds something.
        TypeError
            If the optimizer decides by itself which parameters decay, as optimizers once did.
        """
        if hasattr(optimizer, "decays"):
            raise TypeError(
                f"{type(optimizer).__name__}.decays: which parameters decay, treatments say"
            )
        given = dict(given or {})
        check(given)
        known = TREATMENTS | given
        if not optimizer.decay_biases and "bias" not in given:
            known["bias"] = replace(known["bias"], decay=0.0)
        labels = {param.group: param.members for param in params}
        if unknown := set(given) - set(labels):
            raise ValueError(
                f"treatments: no parameter is in the groups {sorted(unknown)};"
                f" known: {', '.join(labels)}"
            )
        updates: list[Treatment] = []
        penalties: list[float] = []
        kinds: dict[str, int] = {}
        penalised: dict[str, int | None] = {}
        for label in labels:
            treatment = known.get(label, DEFAULT)
            for name in ("rate", "decay"):
                each(getattr(treatment, name), labels[label], f"treatments, {name} of {label!r}")
            update = replace(treatment, penalty=1.0)
            if not optimizer.weight_decay:
                update = replace(update, decay=1.0)
            if update not in updates:
                updates.append(update)
            if treatment.penalty and treatment.penalty not in penalties:
                penalties.append(treatment.penalty)
            kinds[label] = updates.index(update)
            penalised[label] = penalties.index(treatment.penalty) if treatment.penalty else None
        return cls(tuple(updates), kinds, tuple(penalties), penalised)
