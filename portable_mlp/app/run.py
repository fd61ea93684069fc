"""What a training run came to."""

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
    """What a run came to, for the report."""

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
        """Whether the network saw the target scaled."""
        return scales_target(self.settings, self.data)


def scales_target(settings: Settings, data: Dataset) -> bool:
    """Whether the target is scaled: it is a number that the loss takes as the output itself."""
    if data.classify or not settings.scaling:
        return False
    loss = LOSSES[settings.loss or MLPRegressor().loss]
    return loss.link_name == "identity" and not loss.nonnegative
