"""The estimators, with scikit-learn's interface, names, defaults and conventions.

Additional parameters are keyword-only, follow scikit-learn's, and change none of its defaults.
"""

from portable_mlp.estimators.classifier import MLPClassifier
from portable_mlp.estimators.regressor import MLPRegressor
from portable_mlp.estimators.tabular_classifier import TabularClassifier
from portable_mlp.estimators.tabular_regressor import TabularRegressor

__all__ = ["MLPClassifier", "MLPRegressor", "TabularClassifier", "TabularRegressor"]
