"""A pytest plugin: scikit-learn's tests of its MLP, run against ours."""

import sklearn.neural_network as public
import sklearn.neural_network._multilayer_perceptron as private

import portable_mlp


def pytest_configure(config: object) -> None:
    # Not on import: whoever only collects this file keeps scikit-learn's own
    for module in (public, private):
        for name in ("MLPClassifier", "MLPRegressor"):
            setattr(module, name, getattr(portable_mlp, name))


def pytest_collection_finish(session: object) -> None:
    # What they have imported by then
    for item in session.items:
        for name in ("MLPClassifier", "MLPRegressor"):
            assert getattr(item.module, name) is getattr(portable_mlp, name)
