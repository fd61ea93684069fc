"""Checkpoints: whatever ends a training run, it goes on as if nothing had happened."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
from helpers.killed import COMMON, LABELS, MOMENTS, TARGET, EverySteps, X
from helpers.paths import TESTS
from helpers.targets import get_target
from sklearn.preprocessing import StandardScaler

from portable_mlp import Callback, Checkpoint, MLPClassifier, MLPRegressor, load, save
from portable_mlp.persistence import read_metadata, save_checkpoint
from portable_mlp.schedules import Cosine, OneCycle, ReduceOnPlateau
from portable_mlp.training import Begun
from portable_mlp.training.pauses import Pauses

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")

SETTINGS = {**COMMON, "max_iter": 6}


class Once(Checkpoint):
    """Saves when it was asked so many times, and never again."""

    def __init__(self, path, asked, **more):
        super().__init__(path, **more)
        self.left = asked

    def wants_pause(self):
        self.left -= self.left > 0
        return self.left == 0

    def on_pause(self, model):
        super().on_pause(model)
        self.left = -1


def parameters(model):
    return [*model.coefs_, *model.intercepts_]


def same(a, b):
    """To the last bit: parameters, curves, counts."""
    arrays = zip(parameters(a), parameters(b), strict=True)
    told = ("loss_curve_", "validation_scores_", "n_iter_", "t_", "best_loss_")
    return all(np.array_equal(x, y) for x, y in arrays) and all(
        getattr(a, name) == getattr(b, name) for name in told
    )


CASES = {
    "adam": {},
    "early stopping, dropout": {
        "early_stopping": True, "dropout": 0.3, "n_iter_no_change": 2, "learning_rate": Cosine(0.1),
        "learning_rate_init": 0.02, "max_iter": 12,
    },
    "one cycle, unshuffled": {"shuffle": False, "learning_rate": OneCycle(), "solver": "adamw"},
    "plateau, one batch": {
        "learning_rate": ReduceOnPlateau(patience=0, threshold=0.2), "batch_size": 300,
    },
    "adaptive, float32": {
        "solver": "sgd", "learning_rate": "adaptive", "tol": 0.1, "n_iter_no_change": 1,
        "dtype": "float32",
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["numpy", "torch", "jax"])
@pytest.mark.parametrize("case", CASES)
def test_goes_on_from_any_step(case, backend, tmp_path, request):
    get_target(backend, request)
    settings = {**SETTINGS, **CASES[case], "backend": backend, "device": "cpu"}
    whole = MLPClassifier(**settings).fit(X, LABELS)
    tolerance = 1e-4 if "float32" in case else 1e-10
    begun = set()
    for asked in (1, 2, 3, 5, 8, 9, 11):
        checkpoint = Once(tmp_path / f"{asked}", asked)
        MLPClassifier(**settings, callbacks=[checkpoint]).fit(X, LABELS)
        if not checkpoint.path.exists():
            continue
        model = load(checkpoint.path)
        begun.add(model._state.begun.steps)
        model.continue_fit(X, LABELS)
        if backend == "numpy":
            assert same(model, whole)
        largest = max(abs(p).max() for p in parameters(whole))
        for got, wanted in zip(parameters(model), parameters(whole), strict=True):
            np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance * largest)
        assert len(model.loss_curve_) == len(whole.loss_curve_)
    assert len(begun) >= (1 if "one batch" in case else 3)


def test_several_outputs_weights_and_sparse_rows(tmp_path):
    from scipy.sparse import csr_array

    two = np.c_[TARGET, -TARGET]
    weights = np.linspace(0.1, 2.0, len(X))
    whole = MLPRegressor(**SETTINGS).fit(csr_array(X), two, weights)
    checkpoint = Once(tmp_path / "checkpoint", 15)
    MLPRegressor(**SETTINGS, callbacks=[checkpoint]).fit(csr_array(X), two, weights)
    model = load(checkpoint.path)
    assert 0 < model._state.begun.steps < 10
    assert same(model.continue_fit(csr_array(X), two, weights), whole)


@pytest.mark.parametrize("forgotten", ["begun", "moments", "generator", "stalled_for"])
def test_the_twin_that_forgets(forgotten, tmp_path):
    """Each part of the state matters: without it the weights are others."""
    settings = {**SETTINGS, "n_iter_no_change": 1, "tol": 0.02, "max_iter": 40}
    whole = MLPClassifier(**settings).fit(X, LABELS)
    checkpoint = Once(tmp_path / "checkpoint", 10 * (whole.n_iter_ - 1) + 4)
    MLPClassifier(**settings, callbacks=[checkpoint]).fit(X, LABELS)
    model = load(checkpoint.path)
    state = model._state
    if forgotten == "begun":
        state.begun = Begun()
    elif forgotten == "moments":
        moments = [tuple(0.0 * m for m in leaf) for leaf in state.arrays.moments]
        state.arrays = state.arrays._replace(moments=moments)
    elif forgotten == "generator":
        state.generator = np.random.RandomState(5).get_state()
    else:
        state.stalled_for = -5
    assert not same(model.continue_fit(X, LABELS), whole)
    assert same(load(checkpoint.path).continue_fit(X, LABELS), whole)


def run_script(*arguments):
    if not hasattr(os, "fork"):
        pytest.skip("there is no fork")
    script = TESTS / "helpers" / "killed.py"
    done = subprocess.run(
        [sys.executable, str(script), *map(str, arguments)],
        capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_kill_9_finds_a_careless_writer(tmp_path):
    """The twin: written in place, the checkpoint is broken when the writing is."""
    broken = [row for row in run_script(tmp_path, "careless") if "broken" in row]
    assert {tuple(row["moment"]) for row in broken} >= {("write", 1), ("write", 2), ("write", 12)}
    assert all("is not a model file, or is damaged" in row["broken"] for row in broken)


@pytest.mark.slow
def test_kill_9(tmp_path, record_property):
    found = run_script(tmp_path)
    for row in found:
        where = (
            "no checkpoint" if row["begun"] is None else "epoch {}, step {}".format(*row["begun"])
        )
        killed = "{} {}".format(*row["moment"])
        record_property(
            "killed with signal 9, and resumed",
            f"{row['case']:32} at {killed:10} from {where:16} equal to the bit: {row['equal']}",
        )
    assert len(found) == 2 * len(MOMENTS) >= 20
    assert all(row["signal"] == signal.SIGKILL for row in found)
    assert all(row["equal"] for row in found)
    existed = [row for row in found if row["begun"] is not None]
    assert len(existed) >= 15
    assert len(found) - len(existed) >= 5  # before and during the first save
    assert len([row for row in existed if row["begun"][1] > 0]) >= 15  # in the middle of an epoch
    assert any(row["left over"] for row in found)  # some were killed while they wrote
    record_property(
        "killed with signal 9, and resumed",
        f"{len(found)} kills, {len(existed)} with a checkpoint",
    )


class Interrupt(Callback):
    def __init__(self, epoch):
        self.epoch = epoch

    def on_epoch_begin(self, epoch):
        if epoch == self.epoch:
            signal.raise_signal(signal.SIGINT)


def test_ctrl_c_leaves_a_checkpoint_and_a_model_that_goes_on(tmp_path):
    whole = MLPClassifier(**SETTINGS).fit(X, LABELS)
    callbacks = [Interrupt(3), Checkpoint(tmp_path / "checkpoint")]
    model = MLPClassifier(**SETTINGS, callbacks=callbacks)
    with pytest.warns(UserWarning, match="interrupted"):
        model.fit(X, LABELS)
    assert model.n_iter_ == 2
    again = load(tmp_path / "checkpoint")
    assert again._state.begun.steps == 1
    assert all(np.array_equal(a, b) for a, b in zip(again.coefs_, model.coefs_, strict=True))
    assert same(again.continue_fit(X, LABELS), whole)
    assert same(model.set_params(callbacks=None).continue_fit(X, LABELS), whole)


def test_a_checkpoint_is_a_model(tmp_path):
    scaler = StandardScaler().fit(X)
    path = tmp_path / "checkpoint"
    checkpoint = Once(path, 25, preprocessing=scaler, notes={"target": "y"})
    MLPClassifier(**SETTINGS, callbacks=[checkpoint]).fit(scaler.transform(X), LABELS)
    assert read_metadata(path)["checkpoint"] is True
    assert read_metadata(path)["notes"] == {"target": "y"}
    pipeline = load(path)
    assert set(pipeline.predict(X)) <= set(LABELS)
    assert pipeline[-1].n_iter_ == 2
    # Saved as a model, it is one and no more
    again = load(save(pipeline[-1], tmp_path / "model"))
    assert not hasattr(again, "_state")
    assert np.array_equal(again.predict(X), pipeline[-1].predict(X))


def test_on_another_backend_the_moments_start_anew(tmp_path, request):
    get_target("torch", request)
    checkpoint = Once(tmp_path / "checkpoint", 25)
    MLPClassifier(**SETTINGS, callbacks=[checkpoint]).fit(X, LABELS)
    model = load(checkpoint.path).set_params(backend="torch")
    with pytest.warns(UserWarning, match="start anew"):
        model.continue_fit(X, LABELS)
    assert model.n_iter_ == 6


@pytest.mark.parametrize("every", [0, 1e9])
def test_every_so_many_seconds(every, tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(
        "portable_mlp.checkpoints.save_checkpoint", lambda *a, **k: written.append(a)
    )
    checkpoint = Checkpoint(tmp_path / "checkpoint", every=every)
    model = MLPClassifier(**SETTINGS, callbacks=[checkpoint]).fit(X, LABELS)
    assert len(written) == (60 if every == 0 else 0)
    assert model.n_iter_ == 6


def test_checkpoints_change_nothing_and_cost_nothing_when_unused(tmp_path):
    whole = MLPClassifier(**SETTINGS).fit(X, LABELS)
    watched = MLPClassifier(**SETTINGS, callbacks=[EverySteps(tmp_path / "checkpoint", None)]).fit(
        X, LABELS
    )
    assert same(watched, whole)
    event = threading.Event()
    assert Pauses(event, [Callback()], lambda: None).due == event.is_set


def test_a_model_without_a_training_state_makes_no_checkpoint(tmp_path):
    models = [MLPClassifier(solver="lbfgs", max_iter=5).fit(X, LABELS)]
    models.append(load(save(models[0], tmp_path / "model")))
    for model in models:
        with pytest.raises(ValueError, match="no training state"):
            save_checkpoint(model, tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()


def test_what_a_checkpoint_cannot_do(tmp_path):
    with pytest.raises(ValueError, match="every: expected seconds"):
        Checkpoint(tmp_path / "checkpoint", every=-1)
    model = MLPClassifier(solver="lbfgs", callbacks=[Checkpoint(tmp_path / "checkpoint")])
    with pytest.raises(ValueError, match="solver='lbfgs' cannot take a checkpoint"):
        model.fit(X, LABELS)
    model = MLPClassifier(max_iter=1, callbacks=[Checkpoint(tmp_path / "none" / "x", every=0)])
    with pytest.raises(FileNotFoundError, match="no folder for the checkpoint.*none/x"):
        model.fit(X, LABELS)


def test_other_rows_in_the_middle_of_an_epoch_are_refused(tmp_path):
    checkpoint = Once(tmp_path / "checkpoint", 18)
    MLPClassifier(**SETTINGS, callbacks=[checkpoint]).fit(X, LABELS)
    model = load(checkpoint.path)
    assert model._state.begun.steps == 7
    with pytest.raises(ValueError, match="224 rows into an epoch, and goes on with the rows"):
        model.continue_fit(X[:100], LABELS[:100])
    with pytest.raises(ValueError, match="the batch size that it had"):
        model.set_params(batch_size=50).continue_fit(X, LABELS)


def test_a_generator_as_seed(tmp_path):
    """Its state is in the checkpoint, so a checkpoint does not warn as a model file does."""
    settings = {**SETTINGS, "random_state": np.random.RandomState(1)}
    checkpoint = Once(tmp_path / "checkpoint", 18)
    whole = MLPClassifier(**settings, callbacks=[checkpoint]).fit(X, LABELS)
    assert same(load(checkpoint.path).continue_fit(X, LABELS), whole)


def test_a_full_disk_does_not_end_training(tmp_path, monkeypatch):
    whole = MLPClassifier(**SETTINGS).fit(X, LABELS)
    checkpoint = EverySteps(tmp_path / "checkpoint", None)
    saved = []
    replace = os.replace

    def full_after_two(old, new):
        if len(saved) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        saved.append(new)
        replace(old, new)

    monkeypatch.setattr(os, "replace", full_after_two)
    with pytest.warns(RuntimeWarning, match="No space left.*checkpoint.*training goes on"):
        model = MLPClassifier(**SETTINGS, callbacks=[checkpoint]).fit(X, LABELS)
    assert same(model, whole)
    assert os.listdir(tmp_path) == ["checkpoint"]
    assert load(checkpoint.path)._state.begun.steps == 6  # the last that fitted
