"""Model files that are broken, or made to break: one clear error, and nothing is run.

The tests write containers of their own, so that what they break is not what `save` makes.
"""

from __future__ import annotations

import datetime as dt
import errno
import io
import json
import os
import subprocess
import sys
import tracemalloc
import zipfile
from dataclasses import replace
from hashlib import sha256

import numpy as np
import pytest
from safetensors import SafetensorError, safe_open
from sklearn.base import clone
from sklearn.compose import ColumnTransformer
from sklearn.datasets import load_iris, make_multilabel_classification
from sklearn.decomposition import PCA
from sklearn.feature_selection import VarianceThreshold
from sklearn.impute import SimpleImputer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import (
    FunctionTransformer,
    OneHotEncoder,
    OrdinalEncoder,
    QuantileTransformer,
    StandardScaler,
    TargetEncoder,
)

from portable_mlp import (
    Checkpoint,
    MLPClassifier,
    MLPRegressor,
    ModelFileError,
    TabularClassifier,
    TabularRegressor,
    load,
    mlp,
    save,
)
from portable_mlp.losses import Quantile
from portable_mlp.persistence import modelfile, read_metadata
from portable_mlp.persistence.transformers import encode_transformer
from portable_mlp.schedules import ReduceOnPlateau

skops = pytest.importorskip("skops.io")

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")

X, Y = load_iris(return_X_y=True)
TABLE = np.array(
    [
        [x, None if i % 7 == 0 else x * y, "abc"[i % 3], dt.date(2020, 1, 1) + dt.timedelta(i)]
        for i, (x, y, *_) in enumerate(X.tolist())
    ],
    object,
)
SETTINGS = {"hidden_layer_sizes": (3,), "max_iter": 2, "random_state": 0}


# ---------------------------------------------------------------- a container, taken apart


def take_apart(raw):
    """The header, the model's JSON in it, and the bytes of the arrays."""
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    meta = json.loads(header.pop("__metadata__")["portable_mlp"])
    return header, meta, raw[8 + length :]


def put_together(header, meta, payload):
    text = meta if isinstance(meta, str) else json.dumps(meta)
    texts = {"portable_mlp": text, "sha256": "0" * 64}
    head = json.dumps({"__metadata__": texts, **header}, separators=(",", ":")).encode()
    return seal(len(head).to_bytes(8, "little") + head + payload)


def seal(raw):
    """With the checksum of what it is."""
    start = raw.find(b'"sha256":"') + 10
    if start < 10:
        return raw
    raw = raw[:start] + b"0" * 64 + raw[start + 64 :]
    return raw[:start] + sha256(raw).hexdigest().encode() + raw[start + 64 :]


def files():
    """Bytes of a model file of each kind."""
    names = np.array(["setosa", "versicolor", "virginica"])[Y]
    classifier = MLPClassifier(**SETTINGS).fit(X, names)
    scaler = StandardScaler().fit(X)
    several = make_multilabel_classification(40, 4, n_classes=2, random_state=0)
    short = {"members": 2, "epochs": 1, "steps": 1, "hidden_layer_sizes": (3,), "n_frequencies": 2}
    labels = TabularClassifier(replace(TabularClassifier.presets["fast"], **short), random_state=0)
    numbers = TabularRegressor(replace(TabularRegressor.presets["fast"], **short), random_state=0)
    quantiles = clone(numbers).set_params(loss=Quantile((0.1, 0.9)))
    return {
        "classifier": (classifier, None),
        "preprocessing": (classifier, scaler),
        "binary": (MLPClassifier(**SETTINGS, solver="lbfgs").fit(X, Y == 0), None),
        "multilabel": (MLPClassifier(**SETTINGS).fit(*several), None),
        "regressor": (MLPRegressor("huber", **SETTINGS, dtype="float32").fit(X, Y), None),
        "table": (labels.fit(TABLE, names), None),
        "table, regression": (numbers.fit(TABLE, np.cos(Y)), None),
        "table, quantiles": (quantiles.fit(TABLE, np.cos(Y)), None),
    }


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    found = {}
    for name, (model, preprocessing) in files().items():
        found[name] = save(model, folder / name, preprocessing, notes={"a": ["b"]}).read_bytes()
    checkpoint = Checkpoint(folder / "checkpoint", every=0)
    settings = {**SETTINGS, "early_stopping": True, "learning_rate": ReduceOnPlateau()}
    MLPClassifier(**settings, callbacks=[checkpoint]).fit(X, Y)
    found["checkpoint"] = checkpoint.path.read_bytes()
    return found


def refused(path, content, says=None):
    """Loading fails with the one error, of one line that names the file."""
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match=says) as caught:
        load(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    assert len(message) < 500


def test_our_writer_is_the_library_s(raw, tmp_path):
    """Taken apart and put together, it still loads: what the tests break is what they say."""
    for name, content in raw.items():
        (tmp_path / name).write_bytes(put_together(*take_apart(content)))
        load(tmp_path / name)


def test_safetensors_reads_it(raw, tmp_path):
    path = tmp_path / "model"
    path.write_bytes(raw["classifier"])
    model = load(path)
    with safe_open(path, framework="np") as file:
        assert np.array_equal(file.get_tensor("params.0"), model.coefs_[0])
        assert set(file.metadata()) == {"portable_mlp", "sha256"}


def test_metadata_without_a_model(raw, tmp_path):
    path = tmp_path / "model"
    path.write_bytes(raw["preprocessing"])
    found = read_metadata(path)
    assert found["estimator"] == "MLPClassifier"
    assert found["classes"].tolist() == ["setosa", "versicolor", "virginica"]
    assert found["feature_names"] is None
    assert found["notes"] == {"a": ["b"]}
    assert found["preprocessing"] is True
    assert found["checkpoint"] is False
    assert found["params"]["max_iter"] == 2
    assert found["shapes"]["params.0"] == (4, 3)
    path.write_bytes(raw["checkpoint"])
    assert read_metadata(path)["checkpoint"] is True
    path.write_bytes(raw["checkpoint"][:-1])
    with pytest.raises(ModelFileError, match="checksum"):
        read_metadata(path)


# ---------------------------------------------------------------- hostile files


def in_meta(**changes):
    def change(header, meta, payload):
        return put_together(header, meta | changes, payload)

    return change


def in_params(**changes):
    return lambda header, meta, payload: put_together(
        header, meta | {"params": meta["params"] | changes}, payload
    )


def layer(number, **changes):
    """One of the network's layers changed."""

    def change(header, meta, payload):
        meta["network"][number] |= changes
        return put_together(header, meta, payload)

    return change


def in_array(name, **changes):
    return lambda header, meta, payload: put_together(
        header | {name: header[name] | changes}, meta, payload
    )


def without(name):
    def change(header, meta, payload):
        del header[name]
        return put_together(header, meta, payload)

    return change


def renamed(old, new):
    def change(header, meta, payload):
        header[new] = header.pop(old)
        return put_together(header, meta, payload)

    return change


def as_text(old, new):
    """Texts replaced in the model's JSON, which need not be JSON afterwards."""

    def change(header, meta, payload):
        text = json.dumps(meta)
        assert old in text
        return put_together(header, text.replace(old, new), payload)

    return change


def raw_header(text):
    data = text.encode()
    return lambda *_: seal(len(data).to_bytes(8, "little") + data)


OFFSETS = {"data_offsets": [0, 96]}
HOSTILE = {
    "wrong version": (in_meta(format="portable_mlp/9"), "it says 'portable_mlp/9'"),
    "no format": (in_meta(format=None), "it says None"),
    "foreign estimator": (in_meta(estimator="os.system"), "os.system"),
    "private attribute": (in_meta(fitted={"__class__": 1}), "__class__"),
    "count of the wrong type": (in_meta(fitted={"n_iter_": "many"}), "its n_iter_ is 'many'"),
    "metadata is a list": (in_meta(params=[1]), None),
    "metadata is not text": (raw_header('{"__metadata__":{"portable_mlp":5,"sha256":""}}'), None),
    "metadata is an array": (raw_header("[1]"), "no object"),
    "unknown class": (in_params(solver={"class": "Popen", "args": "ls"}), "Popen"),
    "abstract class": (in_params(solver={"class": "Optimizer"}), None),
    "a class that takes functions": (in_params(loss={"class": "CallableLoss"}), None),
    "field of the wrong type": (in_params(activation={"class": "LeakyReLU", "slope": ""}), "slope"),
    "field too many": (in_params(activation={"class": "Tanh", "x": 1}), None),
    "invalid field": (in_params(learning_rate={"class": "Cosine", "warmup": 7, "final": 0}), "7"),
    "unknown parameter": (in_params(exec="ls"), "exec"),
    "negative parameter": (in_params(alpha=-1), "alpha"),
    "parameter of the wrong type": (in_params(batch_size="x"), "batch_size"),
    "unknown activation": (in_params(activation="../relu"), "unknown activation"),
    "activations too many": (in_params(activation=["relu", "relu"]), "activation"),
    "an activation among the layers": (in_meta(network=["relu"]), "its layers are"),
    "no layers": (in_meta(network=[]), None),
    "layers that do not fit": (layer(0, n_out=9), "takes 3 columns"),
    "layers of other weights": (layer(0, n_in=9), "which are not those of its layers"),
    "a layer of negative width": (layer(0, n_in=-4), "at least 1"),
    "a layer of half a width": (layer(0, n_in=4.5), "n_in=4.5"),
    "a layer of many members": (layer(0, members=2**60), "members"),
    "unknown layer": (in_meta(network=[{"class": "os.system", "command": "ls"}]), "os.system"),
    "a loss among the layers": (in_meta(network=[{"class": "Poisson"}]), "its layers are"),
    "initial values of text": (layer(0, weight_init="ls"), "weight_init='ls'"),
    "unknown device": (in_params(device="toaster"), "unknown device"),
    "unknown backend": (in_params(backend="os"), "unknown backend"),
    "loss is none": (in_meta(loss="huber"), None),
    "classes unsaid": (in_meta(labels={}), "classes"),
    "classes of unknown kind": (in_meta(labels={"classes": "pickle"}), None),
    "classes as other type": (in_meta(labels={"classes": "numbers"}), "outputs for the classes"),
    "characters that are none": (in_array("classes", dtype="F32"), "not characters"),
    "array missing": (without("params.3"), None),
    "array of nobody": (renamed("loss_curve_", "../../etc/passwd"), "etc/passwd"),
    "weights missing": (renamed("params.2", "params.7"), "params.2"),
    "transposed weights": (in_array("params.0", shape=[3, 4]), "shapes"),
    "weights as a vector": (in_array("params.0", shape=[12]), None),
    "weights as integers": (in_array("params.0", dtype="I64"), "data types"),
    "huge shape": (in_array("params.0", shape=[2**40, 2**40]), "shape"),
    "huge and empty": (in_array("params.0", shape=[2**62, 0], data_offsets=[0, 0]), None),
    "negative shape": (in_array("params.0", shape=[-4, -3]), "shape"),
    "fractional shape": (in_array("params.0", shape=[4.0, 3]), "shape"),
    "shape is not a number": (in_array("params.0", shape=[float("nan"), 3]), "shape"),
    "shape is true": (in_array("params.0", shape=[True, 12]), "shape"),
    "shape is missing": (in_array("params.0", shape=None), None),
    "unknown data type": (in_array("params.0", dtype="O"), None),
    "overlapping arrays": (in_array("params.2", **OFFSETS), "not where"),
    "offsets beyond the file": (in_array("params.0", data_offsets=[0, 2**70]), "not where"),
    "offsets of text": (in_array("params.0", data_offsets="ab"), None),
    "name twice": (as_text('"params"', '"estimator": "MLPClassifier", "params"'), "a name twice"),
    "name twice, deeper": (as_text('"alpha"', '"tol": 1, "tol": 2, "alpha"'), "a name twice"),
    "array twice": (raw_header('{"a":{},"b":{},"a":{}}'), "a name twice"),
    "deep JSON": (as_text('["b"]', "[" * 100_000 + "]" * 100_000), "RecursionError"),
    "deep header": (raw_header('{"a":' * 100_000 + "1" + "}" * 100_000), "RecursionError"),
    "many values": (as_text('["b"]', "[" + "[]," * 300_000 + "1]"), "at most"),
    "long text": (as_text('["b"]', '"' + "x" * 5_000_000 + '"'), "at most"),
    "number of many digits": (as_text('["b"]', "9" * 10_000), "digits"),
    "not ASCII": (raw_header('{"a":"é"}'), "ASCII"),
    "no JSON": (as_text("{", "<"), None),
    "header beyond the file": (lambda *_: (2**63 - 1).to_bytes(8, "little") + b"{}", "cut off"),
    "header too long": (raw_header("{}" + " " * 5_000_000), "at most"),
    "bytes behind the arrays": (lambda h, m, p: put_together(h, m, p + b"x"), "the file at"),
    "bytes missing": (lambda h, m, p: put_together(h, m, p[:-1]), "the file at"),
    "no checksum": (lambda *all: put_together(*all).replace(b"sha256", b"sha512"), None),
}  # fmt: skip


def in_encoder(**changes):
    def change(header, meta, payload):
        meta["encoder"] |= changes
        return put_together(header, meta, payload)

    return change


def part(number, **changes):
    """How one of the columns becomes numbers, changed."""

    def change(header, meta, payload):
        meta["encoder"]["parts"][number] |= changes
        return put_together(header, meta, payload)

    return change


HOSTILE_TABLE = {
    "no encoder": (in_meta(encoder=None), None),
    "a column too few": (lambda h, m, p: in_encoder(parts=m["encoder"]["parts"][1:])(h, m, p), "8"),
    "a layer for a column": (part(0, **{"class": "Tanh"}), None),
    "levels that are numbers": (part(2, levels=[1, 2, 3]), "its column"),
    "a level too many": (part(2, levels=["a", "b", "c", "d"]), "inconsistent"),
    "periods of text": (part(3, periods=["a"]), "its column"),
    "marked by a number": (part(1, marked=7), "marked=7"),
    "places of text": (in_array("encoder.used", dtype="F64"), "inconsistent"),
    "more ranks than columns": (in_encoder(n_ranked=100), "inconsistent"),
    "ranks below zero": (in_encoder(n_ranked=-1), "inconsistent"),
    "half a rank": (in_encoder(n_embedded=0.5), "inconsistent"),
    "no quantiles": (renamed("encoder.quantiles.0", "encoder.quantiles.9"), None),
    "names of others": (in_meta(names=["a"]), "names"),
    "names that are numbers": (in_meta(names=[1, 2, 3, 4]), "names"),
    "folds of text": (in_array("_fold", dtype="F64"), "the folds"),
    "held-out rows missing": (renamed("nonconformity.0", "nonconformity.9"), None),
    "held-out rows of no order": (in_array("nonconformity.0", dtype="I64"), "not sorted"),
    "a temperature below zero": (
        lambda h, m, p: in_meta(fitted=m["fitted"] | {"temperature_": -1.0})(h, m, p), "outputs",
    ),
    "rows that are not repeated": (layer(0, **{"class": "Tanh"}), None),
    "seed of text": (
        lambda h, m, p: in_meta(fitted=m["fitted"] | {"_seed": "x"})(h, m, p), "_seed",
    ),
    "another preset": (in_params(preset="fastest"), "preset"),
    "a preset of text": (in_params(preset={"class": "Preset", "learning_rate": "x"}), None),
    "folds that are a program": (in_params(cv={"class": "Popen"}), "Popen"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE_TABLE)
def test_hostile_table(case, raw, tmp_path):
    change, says = HOSTILE_TABLE[case]
    refused(tmp_path / "model", change(*take_apart(raw["table"])), says)


@pytest.mark.parametrize("kind", ["table", "table, regression", "table, quantiles"])
def test_a_model_for_tables_comes_back(kind, tmp_path):
    model, _ = files()[kind]
    again = load(save(model, tmp_path / "model"))
    assert vars(again).keys() == vars(model).keys()
    assert again.get_params() == model.get_params()
    assert again.oof_score_ == model.oof_score_
    np.testing.assert_array_equal(again.oof_predictions_, model.oof_predictions_)
    names = {"table": ["predict_proba", "predict_set"], "table, regression": ["predict_interval"]}
    for name in names.get(kind, []):
        np.testing.assert_array_equal(getattr(again, name)(TABLE), getattr(model, name)(TABLE))
    assert np.array_equal(again.predict(TABLE), model.predict(TABLE))


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_file(case, raw, tmp_path):
    change, says = HOSTILE[case]
    refused(tmp_path / "model", change(*take_apart(raw["classifier"])), says)


def in_state(**changes):
    return lambda header, meta, payload: put_together(
        header, meta | {"state": meta["state"] | changes}, payload
    )


HOSTILE_STATE = {
    "generator beyond its words": (in_state(generator=["MT19937", 10**6, 0, 0.0]), "generator"),
    "generator before them": (in_state(generator=["MT19937", -1, 0, 0.0]), "generator"),
    "other generator": (in_state(generator=["os.urandom", 3, 0, 0.0]), None),
    "generator cut short": (in_array("state.generator", dtype="F64", shape=[312]), None),
    "counts backwards": (in_state(steps=-1), "counts"),
    "counts in fractions": (in_state(done=0.5), "counts"),
    "begun backwards": (in_state(begun=[-1, 0, 0.0]), "counts"),
    "begun at a loss of text": (in_state(begun=[0, 0, "x"]), None),
    "remembers text": (in_state(schedule=["x", 1, 1]), "schedule remembers"),
    "remembers too little": (in_state(schedule=7), None),
    "watches something else": (in_state(watched="password"), "watches"),
    "best is text": (in_state(best="x"), None),
    "moments of other shape": (in_array("state.moments.0", shape=[3, 9]), "moments"),
    "moments missing": (renamed("state.moments.1", "params.9"), None),
    "history of other shape": (in_array("state.history", shape=[6, 1]), None),
}


@pytest.mark.parametrize("case", HOSTILE_STATE)
def test_hostile_checkpoint(case, raw, tmp_path):
    change, says = HOSTILE_STATE[case]
    content = change(*take_apart(raw["checkpoint"]))
    refused(tmp_path / "model", content, says)


def test_damage_is_named(raw, tmp_path):
    content = raw["classifier"]
    for end in (0, 3, 8, 100, len(content) // 2, len(content) - 1):
        refused(tmp_path / "model", content[:end])
    for at in (len(content) - 1, len(content) // 2, content.index(b"sha256") + 20):
        flipped = bytearray(content)
        flipped[at] ^= 1
        refused(tmp_path / "model", bytes(flipped))
    refused(tmp_path / "model", content + content, "checksum")


def test_the_twin_without_the_comparison(raw, tmp_path, monkeypatch):
    """A flipped bit of a weight loads, if nobody looks at the checksum."""
    flipped = bytearray(raw["classifier"])
    flipped[-200] ^= 1
    refused(tmp_path / "model", bytes(flipped), "checksum")
    monkeypatch.setattr(modelfile, "_verify", lambda *_: None)
    load(tmp_path / "model")


# ---------------------------------------------------------------- hostile preprocessing


def archive(members, compression=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        for name, content in members:
            file.writestr(name, content)
    return buffer.getvalue()


def members_of(blob):
    with zipfile.ZipFile(io.BytesIO(blob)) as file:
        return [(name, file.read(name)) for name in file.namelist()]


def npy(shape, dtype="<f8"):
    buffer = io.BytesIO()
    header = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue()


def longer_than_told(blob):
    """A directory that says a member is larger than the archive."""
    at = blob.rindex(b"PK\x01\x02") + 20
    return blob[:at] + b"\xff\xff\xff\x7f" * 2 + blob[at + 8 :]


def long_form(blob):
    """A second end, as for archives beyond 4 GB, that could tell other sizes."""
    return blob[:-22] + b"PK\x06\x07" + b"\0" * 16 + blob[-22:]


NAMED = OneHotEncoder().fit(np.array([["a"], ["b"]], dtype=object))
SCALER = skops.dumps(StandardScaler().fit(X))
SCHEMA, *ARRAYS = sorted(members_of(SCALER), key=lambda member: member[0] != "schema.json")


def schema(old, new):
    """The scaler with something else in its schema."""
    name, content = SCHEMA
    assert old in content
    return archive([(name, content.replace(old, new)), *ARRAYS])


BLOBS = {
    "no archive": (b"not a zip", None),
    "empty": (b"", None),
    "untrusted function": (skops.dumps(FunctionTransformer(os.system)), "posix.system|system"),
    "untrusted name": (schema(b'"StandardScaler"', b'"Popen"'), "Popen"),
    "no transformer": (skops.dumps({"a": 1}), "no transformer"),
    "compressed": (archive([ARRAYS[0]], zipfile.ZIP_DEFLATED), "compressed"),
    "zip bomb": (archive([("schema.json", b" " * 10**8)], zipfile.ZIP_DEFLATED), "larger"),
    "longer than told": (longer_than_told(SCALER), "larger"),
    "two ends": (long_form(SCALER), "no zip archive"),
    "directory too long": (archive([(f"{i:020}", b"") for i in range(20_000)]), "too many members"),
    "array of no bytes": (archive([SCHEMA, ("1.npy", npy((10**12,)))]), "longer than its bytes"),
    "array of objects": (archive([SCHEMA, (ARRAYS[0][0], npy((1,), "|O") + b"x" * 8)]), None),
    "path": (archive([SCHEMA, ("../../etc/passwd", b"x")]), "etc/passwd"),
    "path in the schema": (schema(b'"file": "', b'"file": "../'), r"\.\./"),
    "deep schema": (archive([("schema.json", b"[" * 100_000)]), None),
    "no schema": (archive(ARRAYS), "schema.json"),
    "many values": (archive([("schema.json", b"[" + b"[]," * 300_000 + b"1]")]), "at most"),
}  # fmt: skip


def as_json(old=None, new=None, transformer=StandardScaler().fit(X)):
    """The scaler as it is saved, with something else in it."""
    text = encode_transformer(transformer).tobytes().decode()
    assert old is None or old in text
    return (text if old is None else text.replace(old, new)).encode()


BLOBS |= {
    "another module": (as_json("sklearn.preprocessing", "subprocess"), "has a subprocess"),
    "no estimator": (as_json('"StandardScaler"', '"scale"'), "has a sklearn.preprocessing.scale"),
    "no class": (as_json('"StandardScaler"', '"__doc__"'), "__doc__"),
    "no state": (b'{"class": ["sklearn.preprocessing", "StandardScaler"], "state": 1}', "has a"),
    "an array longer than its bytes": (as_json('"shape": [', '"shape": [1000000000, '), None),
    "objects as bytes": (as_json('"dtype": "float64"', '"dtype": "object"'), None),
    "another dtype": (as_json('"dtype": "float64"', '"dtype": "V8"'), "the dtype V8"),
    "long texts": (
        json.dumps(
            {"array": {"shape": [3000], "kind": "U", "items": ["x" * 100_000] + ["a"] * 2999}}
        ).encode(),
        "3000 texts of up to 100000 characters are too many",
    ),
    "something else": (b'{"set": [1, 2]}', "its preprocessing has {'set'"),
    "no object": (b'{"tuple": [1]}', "no transformer"),
    "an estimator that does not transform": (
        as_json('"state": {"dict": [', '"state": {"dict": [["transform", 1], '),
        "no transformer",
    ),
    "deep": (b'{"tuple": ' * 100_000, None),
    "not ASCII": ('{"tuple": ["é"]}'.encode(), "not ASCII"),
    "many": (b'{"tuple": [' + b"[]," * 300_000 + b"1]}", "at most"),
}  # fmt: skip


def with_preprocessing(raw, blob):
    header, meta, payload = take_apart(raw["classifier"])
    header["preprocessing"] = {
        "dtype": "U8",
        "shape": [len(blob)],
        "data_offsets": [len(payload), len(payload) + len(blob)],
    }
    return put_together(header, meta, payload + blob)


@pytest.mark.parametrize("case", BLOBS)
def test_hostile_preprocessing(case, raw, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "system", lambda *_: pytest.fail("it was run"))
    blob, says = BLOBS[case]
    refused(tmp_path / "model", with_preprocessing(raw, blob), says)


@pytest.mark.parametrize("blob", [SCALER, as_json()], ids=["skops", "json"])
def test_good_preprocessing_is_not_refused(blob, raw, tmp_path):
    (tmp_path / "model").write_bytes(with_preprocessing(raw, blob))
    load(tmp_path / "model")


MIXED = np.array([["a", 1.5, None], ["b", None, "x"], ["a", 2.5, "x"]] * 4, dtype=object)
TRANSFORMERS = {
    "scaled numbers": (make_pipeline(SimpleImputer(), StandardScaler()), MIXED[:, [1]]),
    "categories": (OneHotEncoder(handle_unknown="ignore"), MIXED[:, [0, 2]]),
    "given categories": (OneHotEncoder(categories=[["b", "a"]], dtype=np.float32), MIXED[:, [0]]),
    "by columns": (
        ColumnTransformer(
            [("n", SimpleImputer(add_indicator=True), [1]), ("c", OrdinalEncoder(), [0, 2])],
            remainder="drop",
        ),
        MIXED,
    ),
    "ranks": (QuantileTransformer(n_quantiles=5), np.arange(12.0).reshape(12, 1) ** 2),
    "texts of a fixed width": (
        OneHotEncoder(handle_unknown="ignore"),
        np.array([["a"], ["b"]] * 6 + [["a long one"]])[:12],
    ),
    "numbers in the other byte order": (
        OneHotEncoder(),
        np.array([[1.0], [2.0]] * 6, np.dtype(np.float64).newbyteorder()),
    ),
    "components": (PCA(2), np.random.default_rng(0).standard_normal((12, 4))),
    "of targets": (TargetEncoder(cv=2), MIXED[:, [0]]),
}


@pytest.mark.parametrize("case", TRANSFORMERS)
def test_transformers_come_back_without_skops(case, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "skops", None)
    monkeypatch.setitem(sys.modules, "skops.io", None)
    transformer, rows = TRANSFORMERS[case]
    wanted = transformer.fit(rows, np.arange(12) % 2).transform(rows)
    model = MLPClassifier(**SETTINGS).fit(X, Y)
    again = load(save(model, tmp_path / "model", transformer))[0]
    assert again.get_params().keys() == transformer.get_params().keys()
    got = again.transform(rows)
    dense = [a.toarray() if hasattr(a, "toarray") else a for a in (got, wanted)]
    np.testing.assert_array_equal(*dense)
    assert dense[0].dtype == dense[1].dtype


def test_other_transformers_come_back_by_skops(tmp_path):
    transformer = VarianceThreshold(0.5).fit(X)
    model = MLPClassifier(**SETTINGS).fit(X, Y)
    again = load(save(model, tmp_path / "model", transformer))[0]
    np.testing.assert_array_equal(again.transform(X), transformer.transform(X))


def test_preprocessing_that_would_not_load_is_not_saved(tmp_path):
    model = MLPClassifier(**SETTINGS).fit(X, Y)
    with pytest.raises(TypeError, match="system.*cannot be saved"):
        save(model, tmp_path / "model", FunctionTransformer(os.system))
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- memory


def heavy(raw):
    """Files whose reading could take much more memory than they have bytes."""
    header, meta, payload = take_apart(raw["classifier"])

    def notes(text):
        old = '{"a": ["b"]}'
        return put_together(header, json.dumps(meta).replace(old, text), payload)

    weights = np.zeros((200_000, 20))
    X = np.zeros((2, 200_000))
    wide = MLPRegressor(hidden_layer_sizes=(20,), max_iter=1).fit(np.zeros((2, 20)), np.zeros(2))
    wide.network_ = mlp([200_000, 20, 1])
    wide.coefs_[0], wide.n_features_in_ = weights, X.shape[1]
    yield "large weights", wide, None
    yield "large preprocessing", wide, FunctionTransformer(kw_args={"a": np.zeros(5_000_000)})
    yield "lists", notes("[" + "[]," * 130_000 + "1]"), None
    yield "objects", notes("[" + '{"":0},' * 130_000 + "1]"), None
    yield "wide characters", notes('"' + "x" * 4_000_000 + '\\ud83d\\ude00"'), None
    yield "too many values", notes("[" + "[]," * 1_300_000 + "1]"), None
    yield "long header", (50_000_000).to_bytes(8, "little") + b" " * 50_000_000, None
    members = [(f"{i}.npy", npy((0,))) for i in range(14_000)]
    yield "many arrays", with_preprocessing(raw, archive([SCHEMA, *members])), None
    node = '{"__class__":"","__module__":"","__loader__":"JsonNode","content":"1"},'
    schema = '{"__class__":"list","__module__":"builtins","__loader__":"ListNode","content":['
    schema += node * 50_000 + node[:-1] + '],"protocol":2}'
    yield "many nodes", with_preprocessing(raw, archive([("schema.json", schema)])), None
    bomb = archive([("schema.json", b" " * 10**8)], zipfile.ZIP_DEFLATED)
    yield "zip bomb", with_preprocessing(raw, bomb), None


@pytest.mark.slow
def test_memory_is_bounded(raw, tmp_path, record_property):
    path = tmp_path / "model"
    for name, what, preprocessing in heavy(raw):
        if isinstance(what, bytes):
            path.write_bytes(what)
        else:
            save(what, path, preprocessing)
        del what, preprocessing
        size = path.stat().st_size
        tracemalloc.start()
        try:
            outcome = type(load(path)).__name__
        except ModelFileError:
            outcome = "refused"
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        row = f"{name:20} file {size / 1e6:6.1f} MB, peak {peak / 1e6:6.1f} MB, {outcome}"
        record_property("memory of reading a model file, at most 2 x file + 50 MB", row)
        assert peak <= 2 * size + 50e6, row


# ---------------------------------------------------------------- fuzzing

MUTATIONS = 10_000
NASTY = [
    None, True, -1, 0, 1, 2, 3.5, 1e308, -1e308, float("nan"), float("inf"), 2**31, 2**63, 10**30,
    "", "x", "relu", "../x", "\0", "\ud800", [], {}, [[]], [1], [1, 2], {"class": "SGD"},
    {"dict": []}, {"dict": [[[], 1]]}, "numbers", "texts", "objects", "booleans", "F64", "F32",
    "U8", "U32",
    {"class": "ELU", "alpha": 1e308, "scale": 1e308}, {"class": "Huber", "delta": 1e-300},
    {"class": "SoftmaxCrossEntropy", "label_smoothing": 0}, {"class": "Poisson"},
]  # fmt: skip


def mutate_bytes(content, rng):
    content = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        if not content:  # all is deleted
            break
        at = rng.randint(len(content))
        span = slice(at, at + rng.randint(1, 40))
        kind = rng.randint(7)
        if kind == 0:
            content[at] ^= 1 << rng.randint(8)
        elif kind == 1:
            content[at] = rng.randint(256)
        elif kind == 2:
            del content[span]
        elif kind == 3:
            content[at:at] = content[span]
        elif kind == 4:
            content[span] = bytes(rng.randint(0, 256, len(content[span])).tolist())
        elif kind == 5:
            content[span] = b"\0" * len(content[span])
        else:
            del content[at + 1 :]
    return bytes(content)


def places(tree, found):
    """Every place in a tree of JSON as (container, key)."""
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
        found.append((tree, key))
        if isinstance(tree[key], dict | list):
            places(tree[key], found)
    return found


def mutate_json(content, rng):
    header, meta, payload = take_apart(content)
    for _ in range(rng.randint(1, 3)):
        found = places(header if rng.randint(2) else meta, [])
        tree, key = found[rng.randint(len(found))]
        kind = rng.randint(4)
        if kind == 0 and isinstance(tree, dict):
            del tree[key]
        elif kind == 1 and type(tree[key]) is int:
            tree[key] += [-8, -1, 1, 8][rng.randint(4)]
        elif kind == 2:
            other, name = found[rng.randint(len(found))]
            tree[key] = json.loads(json.dumps(other[name]))
        else:
            tree[key] = NASTY[rng.randint(len(NASTY))]
    return put_together(header, meta, payload)


def mutate_payload(content, rng):
    header, meta, payload = take_apart(content)
    return put_together(header, meta, mutate_bytes(payload, rng))


def fuzz(raw, path, mutations):
    """Everything either loads to a model that predicts, or raises the one error."""
    rng = np.random.RandomState(0)
    counts = {"refused": 0, "loaded": 0, "repaired": 0}
    kinds = list(raw)
    ways = [mutate_bytes] * 3 + [lambda *a: seal(mutate_bytes(*a))] + [mutate_payload] * 2
    ways += [mutate_json] * 4
    for i in range(mutations):
        mutate = ways[i % len(ways)]
        counts["repaired"] += mutate is not mutate_bytes
        path.write_bytes(mutate(raw[kinds[i % len(kinds)]], rng))
        try:
            model = load(path)
        except ModelFileError:
            counts["refused"] += 1
            continue
        counts["loaded"] += 1
        if isinstance(model, TabularClassifier | TabularRegressor):
            rows = TABLE[:2, : model.n_features_in_]
            classify = isinstance(model, TabularClassifier)
            if model.network_.n_out == 1:
                assert model.predict_interval(rows).shape == (2, 2)
            elif classify:
                assert len(model.predict_set(rows)) == 2
            assert len(model.predict(rows)) == 2
            continue
        if not isinstance(model, MLPClassifier | MLPRegressor):
            model = model[-1]
        rows = np.linspace(-1.0, 1.0, 2 * model.n_features_in_).reshape(2, -1)
        assert len(model.predict(rows)) == 2
        with safe_open(path, framework="np") as file:  # another reader of the format agrees
            assert np.array_equal(file.get_tensor("params.0"), model.coefs_[0], equal_nan=True)
    return counts


@pytest.mark.slow
def test_fuzz(raw, tmp_path, monkeypatch, record_property):
    verify, verified = modelfile._verify, []
    monkeypatch.setattr(
        modelfile, "_verify", lambda *arguments: verified.append(verify(*arguments))
    )
    found = fuzz(raw, tmp_path / "model", MUTATIONS)
    record_property(
        "mutated model files",
        f"{MUTATIONS} mutations, {found['repaired']} with the checksum repaired, {len(verified)}"
        f" got past it: {found['refused']} refused, {found['loaded']} loaded and predicted",
    )
    assert found["refused"] + found["loaded"] == MUTATIONS >= 10_000
    assert found["repaired"] >= len(verified) >= MUTATIONS / 2
    assert min(found["refused"], found["loaded"]) > 500  # both happen


@pytest.mark.slow
@pytest.mark.parametrize("check", ["persistence.model._check", "persistence.modelfile.check_json"])
def test_the_twin_without_a_check(check, raw, tmp_path, monkeypatch):
    """What is not looked at when a file is read is found by the fuzzing, or by memory."""
    monkeypatch.setattr(f"portable_mlp.{check}", lambda *_: None)
    if check == "persistence.model._check":
        with pytest.raises((AttributeError, ValueError, IndexError, TypeError, AssertionError)):
            fuzz(raw, tmp_path / "model", 3000)
        return
    change, _ = HOSTILE["many values"]
    (tmp_path / "model").write_bytes(change(*take_apart(raw["classifier"])))
    load(tmp_path / "model")


# ---------------------------------------------------------------- bad days


@pytest.fixture
def mounted(tmp_path):
    """A folder on a file system of its own, of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount")
    if done.returncode:
        pytest.skip("mounting a file system is not permitted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def big():
    model = MLPRegressor(hidden_layer_sizes=(100,), max_iter=1).fit(
        np.zeros((2, 2000)), np.zeros(2)
    )
    assert sum(w.nbytes for w in model.coefs_) > 2**20
    return model


def test_full_disk_leaves_the_old_file(mounted):
    small = MLPClassifier(**SETTINGS).fit(X, Y)
    path = save(small, mounted / "model")
    before = path.read_bytes()
    with pytest.raises(OSError, match="cannot save: No space left.*disk/model") as caught:
        save(big(), path)
    assert caught.value.errno == errno.ENOSPC
    assert path.read_bytes() == before
    assert os.listdir(mounted) == ["model"]
    load(path)


def test_full_disk_leaves_nothing_half_written(mounted):
    with pytest.raises(OSError, match="No space left"):
        save(big(), mounted / "model")
    assert os.listdir(mounted) == []


def test_read_only_folder(mounted):
    path = save(MLPClassifier(**SETTINGS).fit(X, Y), mounted / "model")
    before = path.read_bytes()
    subprocess.run(["mount", "-o", "remount,ro", str(mounted)], check=True)
    with pytest.raises(OSError, match="cannot save: Read-only file system.*disk/model"):
        save(MLPClassifier(**SETTINGS).fit(X, Y == 0), path)
    assert path.read_bytes() == before
    load(path)


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_what_fails_late_leaves_the_old_file(moment, tmp_path, monkeypatch):
    """A disk that gives up while the data is flushed, or as the file is renamed."""
    path = save(MLPClassifier(**SETTINGS).fit(X, Y), tmp_path / "model")
    before = path.read_bytes()

    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, moment, fail)
    with pytest.raises(OSError, match="cannot save: Input/output error.*model"):
        save(MLPClassifier(**SETTINGS).fit(X, Y == 0), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["model"]


def test_a_link_stays_a_link_and_modes_are_the_user_s(tmp_path):
    model = MLPClassifier(**SETTINGS).fit(X, Y)
    real = save(model, tmp_path / "real")
    (tmp_path / "plain").write_bytes(b"")
    assert real.stat().st_mode == (tmp_path / "plain").stat().st_mode
    (tmp_path / "link").symlink_to(real)
    assert save(model, tmp_path / "link").is_symlink()


def test_a_missing_file_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="none"):
        load(tmp_path / "none")
    with pytest.raises(IsADirectoryError):
        load(tmp_path)


def test_safetensors_refuses_what_it_should(raw, tmp_path):
    """The oracle of the fuzz test is one: it refuses a header that lies."""
    header, meta, payload = take_apart(raw["classifier"])
    header["params.0"]["shape"] = [9, 9]
    (tmp_path / "model").write_bytes(put_together(header, meta, payload))
    with pytest.raises(SafetensorError):
        safe_open(tmp_path / "model", framework="np")
