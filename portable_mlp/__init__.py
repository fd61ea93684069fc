"""portable_mlp: the multilayer perceptron, written once for every array backend.

`MLPClassifier` and `MLPRegressor` are scikit-learn estimators.  `mlp`, the losses and the
optimizers are the functional layer underneath.  Importing this package imports neither
scikit-learn nor any array library except NumPy: submodules are loaded on first use.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from portable_mlp.activations import ACTIVATIONS as ACTIVATIONS
    from portable_mlp.backends import BackendError as BackendError
    from portable_mlp.backends import get_backend as get_backend
    from portable_mlp.callbacks import Callback as Callback
    from portable_mlp.checkpoints import Checkpoint as Checkpoint
    from portable_mlp.checks import GradientError as GradientError
    from portable_mlp.checks import check_layer as check_layer
    from portable_mlp.checks import check_loss as check_loss
    from portable_mlp.estimators import MLPClassifier as MLPClassifier
    from portable_mlp.estimators import MLPRegressor as MLPRegressor
    from portable_mlp.estimators import TabularClassifier as TabularClassifier
    from portable_mlp.estimators import TabularRegressor as TabularRegressor
    from portable_mlp.estimators.plots import LossCurveDisplay as LossCurveDisplay
    from portable_mlp.layers import Layer as Layer
    from portable_mlp.losses import Loss as Loss
    from portable_mlp.network import Network as Network
    from portable_mlp.network import mlp as mlp
    from portable_mlp.persistence import load as load
    from portable_mlp.persistence import register as register
    from portable_mlp.persistence import save as save
    from portable_mlp.persistence.modelfile import ModelFileError as ModelFileError
    from portable_mlp.persistence.onnx import to_onnx as to_onnx
    from portable_mlp.training import DivergenceError as DivergenceError

__version__ = version("portable_mlp")

_HOME = {
    "ACTIVATIONS": "activations",
    "BackendError": "backends",
    "get_backend": "backends",
    "Callback": "callbacks",
    "Checkpoint": "checkpoints",
    "GradientError": "checks",
    "check_layer": "checks",
    "check_loss": "checks",
    "MLPClassifier": "estimators",
    "MLPRegressor": "estimators",
    "TabularClassifier": "estimators",
    "TabularRegressor": "estimators",
    "Layer": "layers",
    "Loss": "losses",
    "ModelFileError": "persistence",
    "Network": "network",
    "mlp": "network",
    "to_onnx": "persistence.onnx",
    "load": "persistence",
    "register": "persistence",
    "save": "persistence",
    "LossCurveDisplay": "estimators.plots",
    "DivergenceError": "training",
}

__all__ = [*_HOME]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    # Loaded on first use: scikit-learn alone takes over a second to import
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
