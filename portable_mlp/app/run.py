"""The result of a training run."""

from __future__ import annotations

from dataclasses import dataclass

from sklearn.pipeline import Pipeline

from portable_mlp import MLPRegressor
from portable_mlp.app.dataset import Dataset
from portable_mlp.app.evaluation import Evaluation, Importance
from portable_mlp.app.settings import Settings
from portable_mlp.callbacks import Epoch
from portable_mlp.losses import LOSSES


@dataclass(frozen=True)
class Run:
    """Result of a training run, as the report shows it."""

    settings: Settings
    data: Dataset
    model: Pipeline
    history: list[Epoch]
    training: Evaluation
    test: Evaluation
    importances: list[Importance]
    seconds: float
    interrupted: bool

    @property
    def scaled_target(self) -> bool:
        """Whether the network was trained on a scaled target."""
        return scales_target(self.settings, self.data)


def scales_target(settings: Settings, data: Dataset) -> bool:
    """Tell whether the target of a regression is scaled.

    The output layer can undo the scaling only if the loss has the identity as its link.  A loss
    that takes no negative targets cannot take scaled ones.
    """
    if data.classify or not settings.scaling:
        return False
    loss = LOSSES[settings.loss or MLPRegressor().loss]
    return loss.link_name == "identity" and not loss.nonnegative
