"""scikit-learn's checks of an estimator, in several configurations, none expected to fail."""

from __future__ import annotations

import pytest
from helpers.targets import SKLEARN
from sklearn.utils.estimator_checks import estimator_checks_generator, parametrize_with_checks

from portable_mlp import MLPClassifier, MLPRegressor
from portable_mlp.backends import BackendError, get_backend

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning"),
    pytest.mark.filterwarnings("ignore:early_stopping has no effect"),
    # scikit-learn's own, and NumPy's on what the checks feed
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:scipy.optimize. The `disp`:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The default 'legacy' tags:DeprecationWarning"),
]

CONFIGURATIONS = [
    {}, {"solver": "sgd"},
    # With little penalty lbfgs drives probabilities to exactly 1, which two checks refuse,
    # and ReLU's kinks part two roundings of the same fit
    {"solver": "lbfgs", "alpha": 10.0, "activation": "tanh"},
    {"dropout": 0.1},
    # The best weights of few epochs have to be good ones
    {"early_stopping": True, "learning_rate_init": 0.02, "validation_fraction": 0.2},
]  # fmt: skip
# Before 1.9 the checks wanted labels, strings among them, in the namespace of X
NEWEST = SKLEARN >= (1, 9)
ESTIMATORS = [cls(**config) for cls in (MLPClassifier, MLPRegressor) for config in CONFIGURATIONS]

# What has to be there for a check to run; a check that lacks anything else is a failure
ELSEWHERE = {
    "dpnp": "dpnp is Intel's, for its GPUs",
    "PyTorch test requires cuda": "no CUDA device",
    "XPU": "no Intel GPU",
    "MPS": "no Apple GPU",
    "decision_function": "probabilities instead of a decision function",
    "PyTorch": "torch is not installed",
    "torch": "torch is not installed",
    "array_api_strict": "older scikit-learn",
    "'classes_' attribute is in wrong namespace": "scikit-learn 1.9 lets classes_ stay NumPy's",
}


def has_gpu() -> bool:
    try:
        get_backend("gpu")
    except BackendError:
        return False
    return True


def draws_rows(estimator) -> bool:
    return bool(estimator.dropout or estimator.early_stopping)


def needs_cupy(check) -> bool:
    return "cupy" in str(getattr(check, "keywords", {}))


@parametrize_with_checks(ESTIMATORS)
def test_estimator_checks(estimator, check, record_property):
    if needs_cupy(check) and not has_gpu():
        pytest.skip("scikit-learn's CuPy checks fail, rather than skip, without a CUDA device")
    if "sample_weight_equivalence" in str(check) and draws_rows(estimator):
        pytest.skip("a weight of two is not a row twice where masks or held-out rows are drawn")
    try:
        check(estimator)
    except BaseException as error:
        before = not NEWEST and "'classes_' attribute" in str(error)
        if type(error).__name__ in ("SkipTest", "Skipped") or before:
            reason = str(error)
            assert any(known in reason for known in ELSEWHERE), reason
            pytest.skip(next(why for known, why in ELSEWHERE.items() if known in reason))
        raise


@pytest.mark.skipif(not NEWEST, reason="scikit-learn 1.9 lets classes_ stay NumPy's")
@pytest.mark.parametrize("cls", [MLPClassifier, MLPRegressor])
def test_array_api_checks_run_rather_than_skip(cls, record_property):
    """By name, so that a check that silently skips is seen."""
    ran = []
    for estimator, check in estimator_checks_generator(cls()):
        given = getattr(check, "keywords", {})
        device = given.get("device_name")
        if given.get("array_namespace") and device in (None, "cpu", "CPU_DEVICE", "device1"):
            namespace = given["array_namespace"]
            if namespace == "torch":
                pytest.importorskip("torch")
            if namespace in ("numpy", "array_api_strict", "torch"):
                check(estimator)
                ran.append(f"{check.func.__name__} {namespace} {device or ''}".strip())
    assert "check_array_api_input numpy" in ran
    for name in (
        "check_array_api_input array_api_strict CPU_DEVICE",
        "check_array_api_input array_api_strict device1",
        "check_array_api_input torch cpu",
        "check_array_api_same_namespace array_api_strict",
    ):
        assert name in ran
    for name in ran:
        record_property("scikit-learn's array checks that ran", f"{cls.__name__}  {name}")
