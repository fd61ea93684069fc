"""The estimators for tables: any columns, honest out-of-fold predictions, every backend."""

from __future__ import annotations

import datetime as dt
import pickle
import warnings
from dataclasses import replace
from decimal import Decimal

import numpy as np
import pytest
from helpers.targets import get_target
from scipy.sparse import csr_array
from scipy.stats import norm, ttest_1samp
from sklearn.base import BaseEstimator, clone
from sklearn.datasets import load_diabetes, load_iris
from sklearn.exceptions import NotFittedError
from sklearn.inspection import partial_dependence
from sklearn.metrics import d2_pinball_score, log_loss
from sklearn.model_selection import (
    GridSearchCV,
    GroupKFold,
    LeaveOneOut,
    TimeSeriesSplit,
    cross_val_score,
)
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import RobustScaler, StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from portable_mlp import (
    Checkpoint,
    MLPRegressor,
    TabularClassifier,
    TabularRegressor,
    load,
    save,
)
from portable_mlp.callbacks import Callback, Epoch
from portable_mlp.estimators import tabular
from portable_mlp.estimators.columns import MOST_LEVELS, TableEncoder, read_columns
from portable_mlp.estimators.conformal import adaptive_scores, interval, label_sets
from portable_mlp.estimators.packed import HeldOut, Waves, spread
from portable_mlp.estimators.selection import least_useful, t_statistic
from portable_mlp.estimators.time_limit import Deadline, Length
from portable_mlp.losses import Huber, Quantile, SoftmaxCrossEntropy

pd = pytest.importorskip("pandas")

SMALL = {"members": 4, "epochs": 20, "steps": 120, "batch_size": 32}
CLASSIFY = replace(TabularClassifier.presets["default"], **SMALL)
REGRESS = replace(TabularRegressor.presets["default"], **SMALL)
RNG = np.random.RandomState(0)
X, Y = RNG.standard_normal((90, 4)), RNG.standard_normal(90)
LABELS = (X[:, 0] + 0.3 * Y > 0).astype(int)
ROWS = np.arange(90)


def classifier(**given):
    return TabularClassifier(CLASSIFY, **{"random_state": 0, **given})


def regressor(**given):
    return TabularRegressor(REGRESS, **{"random_state": 0, **given})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:there are .* folds only")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@parametrize_with_checks([
    kind(replace(kind.presets["default"], members=4, epochs=40, steps=200))
    for kind in (TabularClassifier, TabularRegressor)
])  # fmt: skip
def test_estimator_checks(estimator, check):
    if "sample_weight_equivalence" in str(check):
        pytest.skip("a weight of two is not a row twice where folds are drawn")
    if "cupy" in str(getattr(check, "keywords", {})):
        pytest.skip("scikit-learn's CuPy checks fail, rather than skip, without a CUDA device")
    check(estimator)


# ---------------------------------------------------------------- columns


class Anything(BaseEstimator):
    """Stands for an estimator, which keeps the names of columns."""


def encoded(train, test=None):
    estimator, test = Anything(), train if test is None else test
    encoder = TableEncoder.of(read_columns(estimator, train, True))
    return encoder, encoder.transform(read_columns(estimator, test, False))


def smooth_clip(z):
    return z / np.sqrt(1 + (z / 3) ** 2)


def test_numbers_are_scaled_robustly_and_ranked():
    x = np.random.RandomState(1).standard_cauchy((3000, 2)) * [1.0, 1e6]
    encoder, z = encoded(x)
    assert encoder.n_embedded == 4
    np.testing.assert_allclose(z[:, :2], smooth_clip(RobustScaler().fit_transform(x)), rtol=1e-5)
    # The rank is through the inverse of the normal distribution's function, with its quartiles
    # at those of the scaled values
    ranks = 0.67 * norm.ppf((np.argsort(np.argsort(x, axis=0), axis=0) + 0.5) / 3000)
    inside = np.abs(ranks) < 1.0
    np.testing.assert_allclose(z[:, 2:][inside], ranks[inside], atol=0.05)
    assert np.abs(z[:, 2:]).max() < 0.67 * 3.1
    far, given = np.array([[1e300, -1e300]]), Anything()
    read_columns(given, x, True)
    far = encoder.transform(read_columns(given, far, False))
    assert np.isfinite(far).all()


def test_a_column_without_a_spread_between_its_quartiles_is_scaled_by_its_range():
    x = np.r_[np.zeros(80), np.linspace(1, 4, 20)][:, None]
    _, z = encoded(x)
    np.testing.assert_allclose(z[:, 0], smooth_clip(2 * x[:, 0] / 4), rtol=1e-6)


def test_missing_numbers_are_the_median_and_marked():
    x = np.array([[1.0], [2.0], [np.nan], [9.0], [np.nan]])
    _, z = encoded(x)
    assert z.shape == (5, 3)  # scaled, rank, mark
    np.testing.assert_array_equal(z[[2, 4], 0], 0.0)
    np.testing.assert_array_equal(z[[2, 4], 1], 0.0)
    assert len({*z[:, 2]}) == 2
    assert (z[[2, 4], 2] != z[0, 2]).all()
    # New holes in a column that had none: the median
    _, z = encoded(np.arange(5.0)[:, None], np.array([[np.nan], [2.0]]))
    np.testing.assert_array_equal(z[0], z[1])


def test_texts_have_a_column_for_each_frequent_value():
    frame = pd.DataFrame({"t": list("aabbbc") * 5, "two": ["p", "q"] * 15})
    encoder, z = encoded(frame)
    assert encoder.n_embedded == 0
    assert z.shape == (30, 4)
    other = pd.DataFrame({"t": ["a", "new", None], "two": ["p", "q", "r"]})
    encoder, z = encoded(frame, other)
    same = [frozenset(np.flatnonzero(row == row.max())) for row in z[:, :3]]
    assert len(same[0]) == 1
    np.testing.assert_array_equal(z[1, :3], z[2, :3])  # unknown and missing alike
    assert z[0, 3] == -z[1, 3]
    assert z[2, 3] == 0.0
    many = pd.DataFrame({"t": [f"v{min(i, 200)}" for i in range(1000)]})
    encoder, z = encoded(many)
    assert z.shape[1] == MOST_LEVELS


def test_dates_become_days_and_places_in_periods():
    days = pd.date_range("2020-01-01", periods=800)
    encoder, z = encoded(pd.DataFrame({"d": days}))
    # days, year and week, as numbers and as ranks
    assert encoder.n_ranked == 5
    assert z.shape == (800, 10)
    np.testing.assert_allclose(z[0, 3:5], z[7, 3:5], atol=1e-5)  # a week later
    assert (np.abs(z[0, 3:5] - z[3, 3:5]) > 0.1).any()
    hours = pd.date_range("2020-01-01", periods=100, freq="h")
    encoder, _ = encoded(pd.DataFrame({"d": hours}))
    assert encoder.n_ranked == 3  # four days: the time, and the place in the day


def test_useless_columns_are_left_out():
    frame = pd.DataFrame({"x": np.arange(9.0), "c": 1.0, "m": np.nan, "t": "same"})
    _, z = encoded(frame)
    assert z.shape == (9, 2)
    _, z = encoded(frame[["c", "m"]])
    np.testing.assert_array_equal(z, np.zeros((9, 1)))


MIXED = pd.DataFrame({
    "number": np.where(RNG.rand(90) < 0.1, np.nan, X[:, 0]),
    "whole": RNG.randint(0, 9, 90),
    "text": RNG.choice(["a", "b", "c", None], 90),
    "flag": RNG.rand(90) < 0.5,
    "day": pd.to_datetime("2021-03-01") + pd.to_timedelta(RNG.randint(0, 900, 90), unit="D"),
    "span": pd.to_timedelta(RNG.randint(0, 900, 90), unit="s"),
    "kind": pd.Categorical(RNG.choice(["u", "v", "w"], 90)),
})  # fmt: skip


@pytest.mark.slow
def test_every_library_of_frames_gives_the_same_model():
    polars = pytest.importorskip("polars")
    data = {name: [None if v != v else v for v in MIXED[name].tolist()] for name in MIXED}
    data["day"] = [v.to_pydatetime() for v in MIXED["day"]]
    data["span"] = [v.to_pytimedelta() for v in MIXED["span"]]
    other = polars.DataFrame(data)
    a, b = classifier().fit(MIXED, LABELS), classifier().fit(other, polars.Series(LABELS))
    np.testing.assert_array_equal(a.predict_proba(MIXED), b.predict_proba(other))
    np.testing.assert_array_equal(a.predict_proba(other), b.predict_proba(MIXED))
    objects = MIXED.astype(object)[["number", "whole", "text", "flag", "kind"]]
    numbers = MIXED[["number", "whole", "text", "flag", "kind"]]
    a, b = regressor().fit(objects, Y), regressor().fit(numbers, Y)
    np.testing.assert_array_equal(a.predict(objects), b.predict(numbers))


def test_columns_are_found_by_name():
    model = classifier().fit(MIXED, LABELS)
    wanted = model.predict_proba(MIXED)
    np.testing.assert_array_equal(model.predict_proba(MIXED[MIXED.columns[::-1]]), wanted)
    np.testing.assert_array_equal(model.predict_proba(MIXED.assign(more=1)), wanted)
    with pytest.raises(ValueError, match="lacks columns that the model was fitted on: whole, flag"):
        model.predict(MIXED.drop(columns=["whole", "flag"]))


def test_values_that_training_did_not_have():
    model = regressor().fit(MIXED, Y)
    new = MIXED.copy()
    new["text"], new["kind"] = "unknown", None
    new["day"] = pd.NaT
    new["whole"] = np.nan
    new["number"] = 1e30
    assert np.isfinite(model.predict(new)).all()
    low, high = Y.min(), Y.max()
    assert ((model.predict(new) >= low) & (model.predict(new) <= high)).all()
    with pytest.raises(ValueError, match="column 'whole' holds text"):
        model.predict(MIXED.assign(whole="x"))


def test_a_text_is_the_same_whatever_it_comes_as():
    """Texts that are numbers or booleans, given as such; dates have no text of their own."""
    t = RNG.choice(["1", "2", "3.5"], 90)
    flag = np.where(t == "1", "True", "False")
    model = classifier().fit(pd.DataFrame({"t": t, "f": flag}), (t == "1").astype(int))
    wanted = model.predict_proba(pd.DataFrame({"t": t, "f": flag}))
    number, boolean = t.astype(float), flag == "True"
    for column in (number, pd.Categorical(number), number.astype(object), t.astype(object)):
        for truth in (boolean, boolean.astype(object), pd.array(boolean, "boolean")):
            got = model.predict_proba(pd.DataFrame({"t": column, "f": truth}))
            np.testing.assert_array_equal(got, wanted)
    mixed = np.array([1, "2", 3.5, None, True], object)  # row by row, as all together
    frame = pd.DataFrame({"t": mixed, "f": "True"})
    together = model.predict_proba(frame)
    for i in range(5):
        alone = model.predict_proba(frame[i : i + 1])
        np.testing.assert_allclose(alone[0], together[i], rtol=1e-10)
    with pytest.raises(
        ValueError, match="column 't' holds dates, but the model was fitted on text"
    ):
        model.predict(pd.DataFrame({"t": pd.Timestamp("2020-01-01"), "f": flag}))


def test_missing_columns_of_values_and_objects_of_the_standard_library():
    model = regressor().fit(MIXED, Y)
    rows = pd.DataFrame([dict.fromkeys(MIXED, None)] * 2)
    assert np.isfinite(model.predict(rows)).all()
    np.testing.assert_allclose(model.predict(rows)[0], model.predict(rows[:1])[0], rtol=1e-10)
    days = [dt.date(2021, 3, 1 + i % 28) for i in range(90)]
    numbers = [Decimal(i) / 4 for i in range(90)]
    given = pd.DataFrame({"d": days, "n": numbers}, dtype=object)
    same = pd.DataFrame({"d": pd.to_datetime(days), "n": np.arange(90) / 4})
    np.testing.assert_array_equal(
        regressor().fit(given, Y).predict(given), regressor().fit(same, Y).predict(same)
    )
    listed = [[x, t] for x, t in zip(X[:, 0].tolist(), ["u", "v"] * 45, strict=True)]
    np.testing.assert_array_equal(
        regressor().fit(listed, Y).predict(listed),
        regressor().fit(pd.DataFrame(listed), Y).predict(pd.DataFrame(listed)),
    )
    useless = regressor().fit(MIXED.assign(m=None), Y)  # a column without a value in training
    np.testing.assert_array_equal(
        useless.predict(MIXED.assign(m="text")), useless.predict(MIXED.assign(m=None))
    )
    with pytest.raises(ValueError, match="holds dates, but the model was fitted on numbers"):
        model.predict(MIXED.assign(whole=pd.Timestamp("2020-01-01")))


def test_numbers_at_the_ends_of_their_range():
    _, z = encoded(X * 1e307)
    assert z.shape == (90, 8)
    assert np.isfinite(z).all()
    _, z = encoded(X * 1e-312)  # whose factor would be infinite: as good as constant
    assert np.isfinite(z).all()


# ---------------------------------------------------------------- folds


def test_out_of_fold_predictions_are_those_of_the_members_that_hold_the_row_out():
    """By hand: each fold alone, predicted by the members that hold it out."""
    folds = [np.arange(90) % 4 == i for i in range(4)]
    cv = [(np.flatnonzero(~f), np.flatnonzero(f)) for f in folds]
    model = classifier(cv=cv).fit(X, LABELS)
    encoder, network = model._encoder, model.network_
    z = encoder.transform(read_columns(model, X, False))
    logits = network(model.params_, z, np)
    p = np.exp(logits / model.temperature_)
    p /= p.sum(axis=-1, keepdims=True)
    for i, (_, test) in enumerate(cv):
        np.testing.assert_allclose(model.oof_predictions_[test], p[i, test], rtol=1e-4, atol=1e-6)
    assert model.sharpness_ == max(1.0, 1.2 * np.sqrt(model.temperature_))
    pooled = p.mean(axis=0) ** model.sharpness_
    pooled /= pooled.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(model.predict_proba(X), pooled, rtol=1e-4, atol=1e-6)
    assert model.oof_score_ == np.mean(model.oof_predictions_.argmax(axis=1) == LABELS)
    model = regressor(cv=cv).fit(X, Y)
    z = network_output(model, X)
    for i, (_, test) in enumerate(cv):
        np.testing.assert_allclose(model.oof_predictions_[test], z[i, test], rtol=1e-4, atol=1e-5)


def network_output(model, X):
    z = model._encoder.transform(read_columns(model, X, False))
    z = np.asarray(model.network_(model.params_, z, np), np.float64)[..., 0]
    target = (Y - Y.mean()) / Y.std()
    return np.clip(z, target.min(), target.max()) * Y.std() + Y.mean()


@pytest.mark.slow
def test_the_score_of_noise_is_that_of_chance():
    """Members that have learned random labels by heart know nothing of the rows held out."""
    rng = np.random.RandomState(3)
    x, y = rng.standard_normal((300, 20)), rng.randint(2, size=300)
    preset = replace(CLASSIFY, epochs=100, label_smoothing=0.0, slack=10.0)  # the last epoch
    model = TabularClassifier(preset, random_state=0).fit(x, y)
    assert model.score(x, y) > 0.65
    assert 0.4 < model.oof_score_ < 0.6


@pytest.mark.parametrize(
    ("errors", "stops"),
    [
        ({3: 0.5, 9: 0.4, 12: 0.45, 20: 0.41, 28: 0.4}, True),  # nothing new since epoch 12
        ({3: 0.5, 9: 0.4, 12: 0.45, 20: 0.399, 28: 0.5}, True),  # too little
        ({3: 0.5, 9: 0.4, 12: 0.45, 20: 0.39, 28: 0.5}, False),
    ],
)
def test_a_wave_that_brings_nothing_is_the_last(errors, stops):
    """Of 60 epochs the waves end after 4, 12, 28 and 60; in the others nobody looks."""
    waves = Waves(60)
    scores = {epoch: -error for epoch, error in errors.items()}
    asked = [
        waves.on_epoch_end(Epoch(epoch, 1.0, np.nan, scores.get(epoch, np.nan)), list)
        for epoch in range(1, 29)
    ]
    assert asked == [False] * 27 + [stops]


@pytest.mark.slow
def test_a_fit_ends_early_where_there_is_nothing_more_to_learn():
    rng = np.random.RandomState(3)
    x = rng.standard_normal((1500, 6))
    preset = replace(CLASSIFY, epochs=60)
    noisy = (x[:, 0] > 0) ^ (rng.rand(1500) < 0.4)
    assert TabularClassifier(preset, random_state=1).fit(x, noisy).n_iter_ == 28
    wavy = np.sin(3 * x[:, 0]) > x[:, 1]
    assert TabularClassifier(preset, random_state=1).fit(x, wavy).n_iter_ == 60


def test_rows_that_no_fold_holds_out_have_no_prediction():
    model = regressor(cv=TimeSeriesSplit(4)).fit(X, Y)
    held = np.concatenate([test for _, test in TimeSeriesSplit(4).split(X)])
    known = np.isin(np.arange(90), held)
    np.testing.assert_array_equal(np.isnan(model.oof_predictions_), ~known)


def test_groups_stay_together():
    """The target is known by the group alone: held-out groups tell of the score."""
    groups = np.repeat(np.arange(30), 10)
    rng = np.random.RandomState(0)
    y = rng.standard_normal(30)[groups]
    x = np.column_stack([groups, rng.standard_normal(300)])
    frame = pd.DataFrame({"g": groups.astype(str), "x": x[:, 1]})
    mixed, apart = regressor().fit(frame, y), regressor().fit(frame, y, groups=groups)
    split = regressor(cv=GroupKFold(4)).fit(frame, y, groups=groups)
    assert mixed.oof_score_ > 0.5
    assert apart.oof_score_ < 0.1
    assert split.oof_score_ < 0.1


def test_mean_of_held_out_rows():
    held = HeldOut.of([np.array([0, 2]), np.array([2]), np.array([1, 4])], 4)
    # The first and the last member hold out the same rows
    values = np.array([[[1.0], [2.0]], [[4.0], [99.0]], [[7.0], [8.0]], [[3.0], [4.0]]])
    got = held.mean(values, 5)[:, 0]
    np.testing.assert_array_equal(got, [2.0, 7.0, 3.5, np.nan, 8.0])


@pytest.mark.slow
def test_weights_and_classes():
    """Rows of weight zero are as good as absent: labels that are wrong there do no harm."""
    rng = np.random.RandomState(1)
    x = rng.standard_normal((300, 2))
    right = (x[:, 0] > 0).astype(int)
    wrong = rng.rand(300) < 0.45
    y, weights = np.where(wrong, 1 - right, right), (~wrong).astype(float)
    plain, weighted = classifier().fit(x, y), classifier().fit(x, y, weights)
    assert (weighted.predict(x) == right).mean() > 0.95 > (plain.predict(x) == right).mean()
    rare = (x[:, 0] + rng.standard_normal(300) > 2.2).astype(int)
    balanced = classifier(class_weight="balanced").fit(x, rare)
    assert balanced.predict(x).sum() > 1.5 * max(1, classifier().fit(x, rare).predict(x).sum())


def test_the_temperature_calibrates():
    rng = np.random.RandomState(2)
    x = rng.standard_normal((400, 3))
    y = (x[:, 0] + 1.5 * rng.standard_normal(400) > 0).astype(int)
    model = classifier().fit(x, y)
    loss = log_loss(y, model.oof_predictions_)
    for factor in (0.8, 1.25):
        p = model.oof_predictions_**factor
        assert log_loss(y, p / p.sum(axis=1, keepdims=True)) > loss - 1e-4


def test_more_folds_than_members_and_folds_that_look_at_x():
    model = classifier(cv=9).fit(X, LABELS)
    assert not np.isnan(model.oof_predictions_).any()
    assert model.network_.members == 9
    with pytest.raises(ValueError, match="there are 90 folds"):
        classifier(cv=LeaveOneOut()).fit(X, LABELS)

    class ByFirstColumn:
        def get_n_splits(self, *_):
            return 2

        def split(self, X, y=None, groups=None):
            low = np.asarray(X)[:, 0] < 0
            yield ~low, low
            yield low, ~low

    assert not np.isnan(regressor(cv=ByFirstColumn()).fit(X, Y).oof_predictions_).any()
    for cv in ([], [(np.arange(3), [])]):
        with pytest.raises(ValueError, match="folds are needed"):
            regressor(cv=cv).fit(X, Y)
    with pytest.raises(ValueError, match="groups: at least two"):
        regressor().fit(X, Y, groups=np.zeros(90))


def test_rows_of_weight_zero_are_as_good_as_absent():
    wrong = ROWS >= 60
    y, weights = np.where(wrong, 1e6, Y), (~wrong).astype(float)
    model = regressor().fit(X, y, weights)
    assert np.abs(model.predict_interval(X[:5])).max() < 100
    assert model.predict(X).max() <= Y[~wrong].max()
    with pytest.raises(ValueError, match="class_weight must be finite"):
        classifier(class_weight={0: -1, 1: 1}).fit(X, LABELS)
    model = classifier(class_weight={0: 1, 1: 9}).fit(X, LABELS)
    assert model.oof_score_ == np.mean(model.oof_predictions_.argmax(axis=1) == LABELS)


def test_a_fit_that_is_stopped_at_once_is_trained_all_the_same():
    class Stop(Callback):
        def on_epoch_end(self, epoch, params):
            return True

    preset = replace(CLASSIFY, epochs=96, average=0.9)  # a look in every third epoch
    model = TabularClassifier(preset, random_state=0, callbacks=[Stop()]).fit(X, LABELS)
    assert model.n_iter_ == 1
    start = model.network_.init(np.random.RandomState(0))
    assert all((p != q).any() for p, q in zip(model.params_, start, strict=True))
    with pytest.raises(ValueError, match="such as Checkpoint"):
        classifier(callbacks=[Checkpoint("never")]).fit(X, LABELS)


@pytest.mark.parametrize("name", ["members", "batch_size", "epochs", "n_frequencies"])
def test_presets_check_their_numbers(name):
    with pytest.raises(ValueError, match=f"{name} must be at least"):
        replace(CLASSIFY, **{name: 0})


# ---------------------------------------------------------------- losses of a regression


def noisy(n, seed):
    """Rows whose noise grows with the first column, and the true quantiles."""
    rng = np.random.RandomState(seed)
    x = rng.uniform(-2, 2, (n, 2))
    centre, width = np.sin(2 * x[:, 1]), 0.2 + np.abs(x[:, 0])
    levels = np.array([0.1, 0.5, 0.9])
    true = centre[:, None] + width[:, None] * norm.ppf(levels)
    return x, centre + width * rng.standard_normal(n), true


@pytest.mark.slow
def test_quantiles_do_not_cross_and_hold_their_share():
    x, y, _ = noisy(1500, 0)
    new, y_new, true = noisy(20000, 1)
    preset = replace(REGRESS, hidden_layer_sizes=(32, 32), epochs=40, steps=800, batch_size=64)
    model = TabularRegressor(preset, loss=Quantile([0.1, 0.5, 0.9]), random_state=0).fit(x, y)
    predicted = model.predict(new)
    assert predicted.shape == (20000, 3)
    assert np.all(np.diff(predicted, axis=1) >= 0.0)
    shares = (y_new[:, None] <= predicted).mean(axis=0)
    np.testing.assert_allclose(shares, [0.1, 0.5, 0.9], atol=0.04)
    # The noise is far from constant: quantiles that are tell less than half of this
    assert np.corrcoef(predicted[:, 2] - predicted[:, 0], true[:, 2] - true[:, 0])[0, 1] > 0.9
    scores = [
        d2_pinball_score(y_new, predicted[:, i], alpha=q) for i, q in enumerate((0.1, 0.5, 0.9))
    ]
    assert model.score(new, y_new) == pytest.approx(np.mean(scores))
    assert model.oof_score_ == pytest.approx(model.score(new, y_new), abs=0.05)
    assert model.oof_predictions_.shape == (1500, 3)
    with pytest.raises(ValueError, match="predict_interval is for"):
        model.predict_interval(new)


def test_one_quantile_and_huber():
    x, y, _ = noisy(300, 0)
    model = regressor(loss=Quantile(0.9)).fit(x, y)
    assert model.predict(x).shape == (300,)
    assert 0.8 < np.mean(y <= model.predict(x)) < 0.97
    known = d2_pinball_score(y, model.oof_predictions_, alpha=0.9)
    assert model.oof_score_ == pytest.approx(known)
    assert regressor(loss="quantile").fit(x, y).predict_interval(x).shape == (300, 2)
    outliers = np.where(np.arange(300) % 20 == 0, 200.0, y)
    robust, mean = (
        np.median(np.abs(regressor(loss=loss).fit(x, outliers).predict(x) - y))
        for loss in (Huber(0.01), "squared_error")
    )
    assert robust < 0.5 * mean


def test_the_loss_of_the_fit_counts_not_that_of_the_next(tmp_path):
    x, y, _ = noisy(100, 0)
    model = regressor().fit(x, y)
    score = model.score(x, y)
    model.set_params(loss=Quantile((0.1, 0.9)))
    assert model.score(x, y) == load(save(model, tmp_path / "model")).score(x, y) == score


@pytest.mark.parametrize("loss", ["poisson", "softmax_cross_entropy", "mse", SoftmaxCrossEntropy()])
def test_losses_that_a_scaled_target_cannot_have(loss):
    with pytest.raises(ValueError, match="can have squared_error, huber, quantile"):
        regressor(loss=loss).fit(X, np.abs(Y))


def test_several_quantiles_have_one_target():
    with pytest.raises(ValueError, match="a single target, got 2"):
        regressor(loss=Quantile((0.1, 0.9))).fit(X, np.column_stack([Y, Y]))
    with pytest.raises(ValueError, match="use TabularRegressor"):
        MLPRegressor(Quantile((0.1, 0.9))).fit(X, Y)


# ---------------------------------------------------------------- columns of no use


def test_the_statistic_of_a_mean():
    x, w = RNG.standard_normal(50) + 0.2, RNG.uniform(0, 2, 50)
    equal = ttest_1samp(x, 0.0).statistic * np.sqrt(50 / 49)  # of n instead of n − 1
    assert t_statistic(x, np.ones(50)) == pytest.approx(equal)
    # Weights of zero are rows that are not there
    some = w > 1.0
    assert t_statistic(x, 1.0 * some) == pytest.approx(t_statistic(x[some], np.ones(some.sum())))
    assert t_statistic(np.zeros(5), np.ones(5)) == 0.0
    assert t_statistic(np.ones(5), np.ones(5)) == np.inf


@pytest.mark.parametrize(
    ("useful", "together", "wanted"),
    [
        ({0: 9.0, 1: 0.5, 2: -1.0}, {}, [1, 2]),
        ({0: 9.0, 1: 0.5, 2: -1.0}, {(1, 2): 3.0}, [2]),  # 1 matters more of the two
        ({0: 0.1, 1: 0.2}, {(0, 1): 50.0}, [0]),  # they say the same: one stays
        ({0: 5.0, 1: 1.0}, {}, []),  # 1 is no less than the smallest
        ({0: 5.0}, {}, []),
    ],
)
def test_columns_that_can_be_left_out_together(useful, together, wanted):
    def rise(columns):
        return together.get(tuple(sorted(columns)), max(useful[c] for c in columns))

    assert least_useful(range(len(useful)), rise, 1.0) == wanted


def with_noise(n, seed):
    """Three columns that matter, six columns of noise, and a category of noise."""
    rng = np.random.RandomState(seed)
    frame = pd.DataFrame(rng.uniform(-2, 2, (n, 8)), columns=["a", "b", *NOISE[1:]])
    frame["kind"] = rng.choice(["x", "y", "z"], n)
    frame["no kind"] = rng.choice(["u", "v", "w"], n)
    y = np.sin(2 * frame["a"]) * frame["b"] + (frame["kind"] == "x")
    return frame, y.to_numpy() + 0.1 * rng.standard_normal(n)


NOISE = ["no kind", "c", "d", "e", "f", "g", "h"]


@pytest.mark.slow
@pytest.mark.parametrize("weighted", [False, True])
def test_columns_of_noise_are_left_out(weighted):
    X, y = with_noise(500, 0)
    new, y_new = with_noise(2000, 1)
    preset = replace(TabularRegressor.presets["default"], relevance=3.0)
    weights = np.where(np.arange(500) % 5 == 0, 0.0, 1.0) if weighted else None
    model = TabularRegressor(preset, random_state=2).fit(X, y, weights)
    assert set(model.unused_columns_) <= set(NOISE)
    assert len(model.unused_columns_) > 3
    every = TabularRegressor(replace(preset, relevance=0.0), random_state=2).fit(X, y, weights)
    assert every.unused_columns_ == []
    assert 1 - model.score(new, y_new) < 0.9 * (1 - every.score(new, y_new))
    # What is left out has no influence, whatever it is
    other = new.assign(**dict.fromkeys(model.unused_columns_, None))
    np.testing.assert_array_equal(model.predict(other), model.predict(new))
    assert len(model.loss_curve_) == model.n_iter_


class At(Callback):
    """Acts in an epoch of one of the fits."""

    def __init__(self, fit, epoch, act):
        self.fit, self.epoch, self.act, self.n = fit, epoch, act, 0

    def on_fit_begin(self, max_epochs):
        self.n += 1

    def on_epoch_end(self, epoch, params):
        return (self.n, epoch.epoch) == (self.fit, self.epoch) and self.act()


def interrupt():
    raise KeyboardInterrupt


@pytest.mark.slow
def test_who_interrupts_the_second_fit_gets_the_better_model():
    X, y = with_noise(300, 0)
    preset = replace(REGRESS, epochs=30, steps=300, relevance=3.0)
    with pytest.warns(UserWarning, match="interrupted"):
        soon = TabularRegressor(preset, random_state=0, callbacks=[At(2, 1, interrupt)]).fit(X, y)
    whole = TabularRegressor(preset, random_state=0).fit(X, y)
    assert whole.unused_columns_
    assert soon.stop_reason_ == "interrupted"
    assert soon.unused_columns_ == []
    assert soon.n_iter_ == len(soon.loss_curve_) > 1
    assert whole.oof_score_ > soon.oof_score_ > 0.1
    assert soon.predict(X).shape == (300,)
    # A stop that a callback asks for is one, in the epoch of the selection too
    stop = TabularRegressor(
        preset, random_state=0, callbacks=[At(1, soon.n_iter_, lambda: True)]
    ).fit(X, y)
    assert (stop.n_iter_, stop.stop_reason_) == (soon.n_iter_, "stopped")
    assert stop.unused_columns_ == []


@pytest.mark.slow
def test_an_interrupt_in_the_trial_of_a_time_limit_is_one(monkeypatch):
    from portable_mlp.estimators import packed

    monkeypatch.setattr(packed.Trainer, "fit", lambda *_, **__: "interrupted")
    with pytest.raises(KeyboardInterrupt):
        regressor(time_limit=60.0).fit(X, Y)


def test_held_out_rows_of_weight_zero_alone_judge_nothing():
    train, test = np.arange(60), np.arange(60, 90)
    weights = np.where(np.arange(90) < 60, 1.0, 0.0)
    with pytest.raises(ValueError, match="all held-out rows have the weight zero"):
        regressor(cv=[(train, test)]).fit(X, Y, weights)
    assert regressor(cv=[(train, test), (test, train)]).fit(X, Y, weights).oof_score_ <= 1.0


@pytest.mark.slow
def test_nothing_is_left_out_where_nothing_was_learned():
    """A target of pure noise: no column is better than another."""
    X, _ = with_noise(400, 0)
    model = regressor().fit(X, np.random.RandomState(5).standard_normal(400))
    assert model.unused_columns_ == []


@pytest.mark.slow
def test_a_column_that_says_the_same_stays_once():
    X, y = with_noise(600, 0)
    X = X[["a", "b", "kind"]].assign(again=X["a"], **{"a third time": X["a"]})
    model = TabularRegressor(replace(REGRESS, epochs=60, steps=800), random_state=0).fit(X, y)
    assert not {"b", "kind"} & set(model.unused_columns_)
    assert not {"a", "again", "a third time"} <= set(model.unused_columns_)
    assert model.oof_score_ > 0.9


@pytest.mark.parametrize("where", ["torch", "jax", "cupy-emulated"])
def test_the_same_columns_are_left_out_elsewhere(where, request):
    target = get_target(where, request)
    frame, y = with_noise(300, 0)
    x = frame[["a", "b", *NOISE[1:]]].to_numpy()
    preset = replace(REGRESS, epochs=30, steps=200, relevance=3.0)
    here = TabularRegressor(preset, random_state=0, dtype="float64").fit(x, y)
    assert 0 < len(here.unused_columns_) <= 6
    with target.scope():
        there = TabularRegressor(preset, random_state=0, dtype="float64")
        there.fit(target.array(x), target.array(y))
    assert there.unused_columns_ == here.unused_columns_


# ---------------------------------------------------------------- a time limit


def test_how_long_a_fit_may_be():
    length = Length(epochs=100, steps=40)

    def within(seconds):
        return length.within(seconds, step=0.01, looks=lambda epochs: 0.1 * min(epochs, 30))

    assert within(1e9) == length
    # A tenth is left in reserve: of 18 s, an epoch takes 0.4 s, and 30 looks 3 s
    assert within(20.0) == Length(37, 40)
    assert within(10.0) == Length(18, 40)
    assert within(0.6) == Length(1, 40)
    assert within(0.5) == Length(1, 35)
    assert within(-3.0) == Length(1, 1)
    assert Length(9, 3).trial == Length(1, 3)


def test_time_enough_changes_nothing():
    one, other = (regressor(time_limit=t).fit(X, Y) for t in (None, 1e6))
    for a, b in zip(one.params_, other.params_, strict=True):
        np.testing.assert_array_equal(a, b)


def test_too_little_time_leaves_a_model():
    with pytest.warns(UserWarning, match="too short for an epoch of 2 steps: there are 1"):
        model = classifier(time_limit=1e-9).fit(X, LABELS)
    assert model.n_iter_ == 1
    assert model.predict(X).shape == (90,)
    with pytest.raises(ValueError, match="time_limit"):
        classifier(time_limit=0).fit(X, LABELS)


def test_a_fit_ends_soon_after_its_time_is_up(monkeypatch):
    """The clock goes on by itself: what was planned takes longer than it did in the trial."""
    from portable_mlp.estimators import time_limit

    now = [0.0]
    monkeypatch.setattr(time_limit.time, "perf_counter", lambda: now[0])

    class Slow(Callback):
        def on_epoch_end(self, epoch, params):
            now[0] += 10.0

    monkeypatch.setattr(Length, "within", lambda self, *_: self)
    model = regressor(time_limit=35.0, callbacks=[Slow()]).fit(X, Y)
    assert model.n_iter_ == 4
    assert model.stop_reason_ == "stopped"


@pytest.mark.slow
@pytest.mark.parametrize("enough", [True, False])
def test_a_fit_begins_anew_only_if_there_is_time(enough, monkeypatch):
    monkeypatch.setattr(Deadline, "left", property(lambda self: 30.0 if enough else 20.0))
    monkeypatch.setattr(Length, "within", lambda self, *_: self)
    X, y = with_noise(300, 0)
    preset = replace(REGRESS, epochs=30, steps=200, relevance=3.0)
    model = TabularRegressor(preset, random_state=0, time_limit=100.0).fit(X, y)
    assert bool(model.unused_columns_) is enough
    assert model.score(X, y) > 0.5


# ---------------------------------------------------------------- intervals and sets


@pytest.mark.parametrize("coverage", [0.05, 0.5, 0.9, 0.99])
def test_intervals_are_those_of_the_definition(coverage):
    """CV+ by sorting all sums: Barber et al. (2021), equation 11."""
    rng = np.random.RandomState(0)
    centres = rng.standard_normal((3, 50))
    residuals = [np.sort(rng.exponential(size=n)) for n in (7, 11, 2)]
    got = interval(centres, residuals, coverage)
    k = int(np.ceil(coverage * 21))
    for x in range(50):
        pairs = list(zip(centres[:, x], residuals, strict=True))
        above = np.sort(np.concatenate([c + r for c, r in pairs]))
        below = np.sort(np.concatenate([c - r for c, r in pairs]))
        wanted = (-np.inf, np.inf) if k > 20 else (below[20 - k], above[k - 1])
        np.testing.assert_allclose(got[x], wanted, rtol=1e-12)


def test_label_sets_are_those_of_the_definition():
    rng = np.random.RandomState(0)
    p = rng.dirichlet(np.ones(4), (2, 30))
    u = rng.uniform(size=30)
    calibration = [np.sort(rng.uniform(size=n)) for n in (9, 15)]
    got = label_sets(adaptive_scores(p, u), calibration, 0.8)
    for x in range(30):
        for c in range(4):
            below = 0
            for fold in range(2):
                own = p[fold, x]
                score = own[own > own[c]].sum() + u[x] * own[c]
                below += (calibration[fold] < score).sum()
            assert got[x, c] == (below < 0.8 * 25)


@pytest.mark.slow
@pytest.mark.parametrize("coverage", [0.8, 0.95])
def test_intervals_and_sets_cover_new_rows(coverage):
    """Over 2000 new rows the share is the nominal one at least, but for three standard errors.

    It is above where single members, whose errors count, are worse than all together.
    """
    rng = np.random.RandomState(0)
    x = rng.uniform(-2, 2, (2600, 2))
    y = np.sin(2 * x[:, 0]) + (0.2 + 0.3 * np.abs(x[:, 1])) * rng.standard_t(3, 2600)
    error = 3 * np.sqrt(coverage * (1 - coverage) * (1 / 2000 + 1 / 600))
    low, high = regressor().fit(x[:600], y[:600]).predict_interval(x[600:], coverage).T
    covered = np.mean((low <= y[600:]) & (y[600:] <= high))
    assert coverage - error < covered < coverage + 0.5 * (1 - coverage)
    labels = np.digitize(y, [-0.7, 0.0, 0.7])
    model = classifier().fit(x[:600], labels[:600])
    sets = model.predict_set(x[600:], coverage)
    covered = sets[np.arange(2000), labels[600:]].mean()
    assert coverage - error < covered < coverage + 0.5 * (1 - coverage)
    assert sets.sum(axis=1).mean() < 4 * coverage  # than all labels with this probability


def test_intervals_and_sets_of_bad_input():
    model = regressor().fit(X, Y)
    for coverage in (0.0, 1.0, np.nan):
        with pytest.raises(ValueError, match="coverage must be in"):
            model.predict_interval(X, coverage)
    assert np.isinf(model.predict_interval(X, 0.999)).all()
    with pytest.raises(ValueError, match="single target"):
        regressor().fit(X, np.column_stack([Y, Y])).predict_interval(X)
    with pytest.raises(NotFittedError):
        regressor().predict_interval(X)


# ---------------------------------------------------------------- what people give


@pytest.mark.parametrize(
    "labels",
    [
        LABELS,
        LABELS.astype(bool),
        np.where(LABELS, "yes", "no"),
        np.array(["p", "q"], object)[LABELS],
        pd.Series(np.where(LABELS, "yes", "no")),
        pd.Series(pd.Categorical(np.where(LABELS, "yes", "no"))),
        LABELS.astype(float) * 2.0,
        (ROWS % 3) * 10,
    ],
)
def test_labels_of_any_kind(labels):
    model = classifier().fit(X, labels)
    got = model.predict(X)
    assert set(got) <= set(np.asarray(labels))
    assert model.predict_proba(X).shape == (90, len(set(np.asarray(labels))))


@pytest.mark.parametrize(
    ("make", "x", "y", "said"),
    [
        (classifier, X, np.zeros(90), "y has one class only, 0.0"),
        (classifier, X, Y, "Unknown label type"),
        (classifier, X, np.where(Y > 1, np.nan, LABELS), "contains NaN"),
        (regressor, X, np.where(Y > 1, np.nan, Y), "contains NaN"),
        (regressor, np.where(X > 2, np.inf, X), Y, "infinity: column"),
        (regressor, X[:1], Y[:1], "at least 2 rows"),
        (classifier, csr_array(X), LABELS, "dense data is required"),
        (classifier, X, LABELS[:-1], "inconsistent numbers of samples"),
        (classifier, X[:, 0], LABELS, "Expected 2D array"),
        (
            classifier,
            pd.DataFrame(X, columns=[*"aabc"]),
            LABELS,
            "(?s)have to be unique.*'a' 2 times",
        ),
        (classifier, pd.DataFrame({"a": [[1]] * 90}), LABELS, "column 'a': argument must be"),
        (classifier, pd.DataFrame(), LABELS[:0], "nothing to learn from"),
        (regressor, X, [dt.date(2020, 1, 1)] * 90, "number"),
    ],
)
def test_bad_input_is_one_clear_error(make, x, y, said):
    with pytest.raises((ValueError, TypeError), match=said):
        make().fit(x, y)


def test_a_failed_fit_leaves_the_model():
    model = classifier().fit(X, LABELS)
    before = model.predict_proba(X)
    with pytest.raises(ValueError, match="one class"):
        model.fit(MIXED, np.zeros(90))
    np.testing.assert_array_equal(model.predict_proba(X), before)


@pytest.mark.filterwarnings("error")
def test_few_rows_and_few_of_a_class():
    with pytest.warns(UserWarning, match="there are 3 folds only"):
        model = classifier().fit(X[:3], [0, 1, 0])
    assert model.predict(X[:3]).shape == (3,)
    model = classifier().fit(X, np.r_[[5], LABELS[1:]])
    assert model.classes_.tolist() == [0, 1, 5]


@pytest.mark.filterwarnings("error")
def test_constant_columns_give_the_frequencies():
    x = np.ones((90, 2))
    y = (ROWS < 30).astype(int)
    p = classifier().fit(x, y).predict_proba(x[:1])
    assert p[0, 1] == pytest.approx(1 / 3, abs=0.05)
    assert regressor().fit(x, Y).predict(x[:1]) == pytest.approx(Y.mean(), abs=0.3 * Y.std())
    np.testing.assert_allclose(regressor().fit(X, np.full(90, 7.0)).predict(X), 7.0)


def test_predictions_need_a_fit():
    with pytest.raises(NotFittedError):
        classifier().predict(X)


@pytest.mark.slow
def test_as_a_scikit_learn_estimator():
    iris, species = load_iris(return_X_y=True)
    model = classifier().fit(iris, species)
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(again.predict_proba(iris), model.predict_proba(iris))
    same = clone(model).fit(iris, species)
    np.testing.assert_array_equal(same.predict_proba(iris), model.predict_proba(iris))
    other = clone(model).set_params(random_state=1).fit(iris, species)
    assert (other.predict_proba(iris) != model.predict_proba(iris)).any()
    search = GridSearchCV(make_pipeline(StandardScaler(), classifier()),
                          {"tabularclassifier__cv": [2, 4]}, cv=2).fit(iris, species)  # fmt: skip
    assert search.best_score_ > 0.9
    x, y = load_diabetes(return_X_y=True)
    assert cross_val_score(regressor(), x, y, cv=2).mean() > 0.3
    curve = partial_dependence(regressor().fit(x, y), x, [2], grid_resolution=5)["average"]
    assert curve[0, -1] > curve[0, 0]  # the body mass index
    several = regressor().fit(x, np.column_stack([y, -y]))
    assert several.predict(x).shape == several.oof_predictions_.shape == (442, 2)
    assert np.corrcoef(several.predict(x)[:, 0], -several.predict(x)[:, 1])[0, 1] > 0.9


# ---------------------------------------------------------------- backends


@pytest.mark.parametrize("where", ["torch", "jax", "strict", "cupy-emulated"])
def test_every_backend_gives_the_same_model(where, request):
    """In float64, the same epochs and predictions to rounding; arrays in, arrays out."""
    target = get_target(where, request)
    preset = replace(CLASSIFY, epochs=4, steps=12)
    wanted = TabularClassifier(preset, random_state=0, dtype="float64").fit(X, LABELS)
    with target.scope():
        x, y = target.array(X), target.array(LABELS)
        got = TabularClassifier(preset, random_state=0, dtype="float64").fit(x, y)
        p = got.predict_proba(x)
        assert type(p) is type(x)
        assert got.predict_set(x).shape == (90, 2)
        np.testing.assert_allclose(target.backend.to_host(p), wanted.predict_proba(X), rtol=1e-8)
    np.testing.assert_allclose(got.oof_predictions_, wanted.oof_predictions_, rtol=1e-8)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("where", ["torch", "jax", "strict", "cupy-emulated"])
def test_predictions_of_many_rows_stay_where_the_rows_are(where, request, monkeypatch):
    """In several parts, in float32, outside of any scope of the backend's."""
    target = get_target(where, request)
    preset = replace(REGRESS, epochs=2, steps=6)
    with target.scope():
        x = target.backend.asarray(X, "float32")
    for model in (
        TabularRegressor(preset, random_state=0).fit(x, Y),
        TabularClassifier(replace(preset, activation="selu"), random_state=0).fit(x, LABELS),
    ):
        predict = getattr(model, "predict_proba", model.predict)
        whole = predict(x)
        with monkeypatch.context() as patch:
            patch.setattr(tabular, "rows_at_once", lambda network: 7)
            parts = predict(x)
        assert type(parts) is type(x)
        assert parts.shape[0] == 90
        host = target.backend.to_host
        np.testing.assert_allclose(host(parts), host(whole), rtol=1e-4, atol=1e-5)


def test_spread_values():
    values = spread(0.4, 1.6, 8, np.random.RandomState(0), logs=True)
    steps = np.diff(np.log(np.sort(values)))
    np.testing.assert_allclose(steps, np.log(4) / 8)
    assert 0.4 < min(values) < max(values) < 1.6


@pytest.mark.parametrize("make", [TabularClassifier, TabularRegressor])
def test_fits_do_not_warn(make):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        preset = CLASSIFY if make is TabularClassifier else REGRESS
        make(preset, random_state=0).fit(MIXED, LABELS).predict(MIXED)
