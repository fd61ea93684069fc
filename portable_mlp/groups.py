"""Groups of parameters: how the update and the penalty treat each group.

A layer labels its parameters (`Param.group`).  A map from labels to treatments gives the
labels their meaning.  A label without a treatment is treated like the weights.
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
    """The treatment of a group's parameters, relative to the settings of the fit.

    Parameters
    ----------
    rate : float >= 0, or a tuple of them, default=1
        Factor on the learning rate; 0 freezes the parameters.  A tuple has one for each
        member of an ensemble.
    decay : float >= 0, or a tuple of them, default=1
        Factor on the optimizer's ``weight_decay``; a tuple has one for each member.
    penalty : float >= 0, default=1
        Factor on the L2 penalty α.
    schedule : Schedule, optional
        Schedule of the group's learning rate, in place of the common one.  It must not react
        to the loss.

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
            # Python floats: NumPy's float64 scalars would promote float32 arrays to float64
            own = tuple(map(float, value)) if several else float(value)
            object.__setattr__(self, name, own)
        if self.schedule is not None and reacts(self.schedule):
            raise ValueError(f"a group's schedule must not react to the loss: {self.schedule!r}")

    @cached_property
    def apart(self) -> bool:
        """Whether the rate or the decay has a value for each member."""
        return isinstance(self.rate, tuple) or isinstance(self.decay, tuple)


DEFAULT = Treatment()
TREATMENTS = {"bias": Treatment(penalty=0.0)}
"""Treatments that differ from `DEFAULT`, by label."""


def check(given: Mapping[Any, Any]) -> None:
    """Raise a ValueError unless all keys are labels and all values are treatments."""
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
        Distinct treatments of the update: those that differ in rate, decay or schedule.
    kinds : dict
        Index into ``updates``, by label.
    penalties : tuple of float
        Distinct factors on α, without 0.
    penalised : dict
        Index into ``penalties``, by label; None if the label is not penalised.
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
            Optimizer whose ``weight_decay`` and ``decay_biases`` are used.
        given : dict, optional
            Treatments by label, which take precedence over `TREATMENTS`.

        Returns
        -------
        Treatments

        Raises
        ------
        ValueError
            If no parameter has a given label, a treatment's tuple does not have one number for
            each member, or ``given`` does not map labels to treatments.
        TypeError
            If the optimizer has the outdated method ``decays``.
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
            # Treatments that have the same effect on the update must compare equal
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
