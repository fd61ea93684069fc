"""The estimators: scikit-learn's interface, its names, defaults and conventions.

What is added comes after scikit-learn's parameters, keyword-only, and changes no default.
"""

from portable_mlp.estimators.classifier import MLPClassifier
from portable_mlp.estimators.regressor import MLPRegressor

__all__ = ["MLPClassifier", "MLPRegressor"]
