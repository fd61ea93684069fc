"""Tables: what files are read as, and what their columns become."""

from __future__ import annotations

import datetime as dt

import numpy as np
import pytest

from portable_mlp.app.table import bundled_table, read_chunks, read_csv, read_table, split_target

pl = pytest.importorskip("polars")
pytest.importorskip("sklearn", minversion="1.9")
preprocessing = pytest.importorskip("portable_mlp.preprocessing")
of_kinds = pytest.importorskip("portable_mlp.app.reading.columns").Reading.of_kinds
column_kinds, make_preprocessing = preprocessing.column_kinds, preprocessing.make_preprocessing

MIXED = pl.DataFrame(
    {
        "size": [1.5, None, 3.25, -4.0, 0.5, 2.0],
        "rooms": [1, 2, None, 4, 5, 6],
        "garden": [True, False, None, True, True, False],
        "town": ["Oslo", 'New "York"', None, "Rome, Italy", "Oslo", "two\nlines"],
        "sold": [dt.date(2024, 1, d) if d != 3 else None for d in range(1, 7)],
        "same": ["x"] * 6,
        "price": [10, 20, 30, 40, 50, 60],
    }
)
KINDS = {
    "size": "number", "rooms": "number", "garden": "boolean", "town": "category", "sold": "date",
    "same": "category", "price": "number",
}  # fmt: skip
# As it is read: every number is a float, and every date has a time
WHOLE = MIXED.cast({pl.Int64: pl.Float64, pl.Date: pl.Datetime("us")})


def write(frame, path):
    if path.suffix == ".parquet":
        frame.write_parquet(path)
    else:
        frame.write_csv(path, separator="\t" if path.suffix == ".tsv" else ",")
    return path


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.parquet"])
def test_every_format_gives_the_same_table(name, tmp_path):
    frame = read_table([write(MIXED, tmp_path / name)]).frame
    assert column_kinds(frame) == KINDS
    assert frame.equals(WHOLE)


@pytest.mark.parametrize("rows", [1, 4, 6, 100])
@pytest.mark.parametrize("name", ["t.csv", "t.parquet"])
def test_chunks_are_the_table(name, rows, tmp_path):
    path = write(MIXED, tmp_path / name)
    kinds = {name: KINDS[name] for name in ("town", "size", "sold", "garden", "rooms")}
    chunks = list(read_chunks([path, path], of_kinds(kinds), rows))
    assert max(chunk.height for chunk in chunks) == min(rows, 6)
    wanted = WHOLE.select(*kinds)
    assert pl.concat(chunks).equals(pl.concat([wanted, wanted]))


def test_arrays(tmp_path, rng):
    X, y = rng.standard_normal((7, 3)), np.arange(7)
    X[2, 1] = np.nan
    np.save(tmp_path / "t.npy", np.column_stack([X, y]))
    np.savez(tmp_path / "t.npz", X=X, y=y)
    frame = read_table([tmp_path / "t.npy"]).frame
    assert frame.columns == ["column_0", "column_1", "column_2", "column_3"]
    np.testing.assert_array_equal(frame.drop("column_3").to_numpy(), X)
    frame = read_table([tmp_path / "t.npz"], "y").frame
    assert frame.columns == ["X_0", "X_1", "X_2", "y"]
    assert frame["y"].to_list() == list(range(7))
    chunks = list(read_chunks([tmp_path / "t.npy"], of_kinds({"column_1": "number"}), 3))
    assert [chunk.height for chunk in chunks] == [3, 3, 1]
    np.testing.assert_array_equal(pl.concat(chunks).to_numpy()[:, 0], X[:, 1])


@pytest.mark.parametrize("name", ["T.NPY", "t.npz", "T.NPZ", "t.npy"])
@pytest.mark.parametrize("several", [False, True])
def test_the_content_of_arrays_tells_how_many_there_are(name, several, tmp_path):
    """People rename files, and Windows writes names in capitals."""
    x = np.arange(6.0).reshape(3, 2)
    with open(tmp_path / name, "wb") as file:
        np.savez(file, x=x) if several else np.save(file, x)
    frame = read_table([tmp_path / name]).frame
    assert frame.columns == (["x_0", "x_1"] if several else ["column_0", "column_1"])
    np.testing.assert_array_equal(frame.to_numpy(), x)


@pytest.mark.parametrize("name", ["n", "text", "count"])
def test_a_text_column_may_have_any_name(name):
    frame = pl.DataFrame({name: ["b", "a", None, "b"]})
    encoded = make_preprocessing(frame, [name], scale=False, by_name=True).fit_transform(frame)
    assert encoded.tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 1], [0, 1, 0]]


def test_several_files_are_one_table_whatever_the_order_of_their_columns(tmp_path):
    first = write(MIXED[:3], tmp_path / "a.csv")
    second = write(MIXED[3:].select(reversed(MIXED.columns)), tmp_path / "b.parquet")
    assert read_table([first, second], "price").frame.equals(WHOLE)


@pytest.mark.parametrize(
    ("target", "name"), [("rooms", "rooms"), ("1", "rooms"), ("-1", "price"), ("0", "size")]
)
def test_target_by_name_or_position(target, name):
    _, _, found = split_target(MIXED.drop_nulls(), target, "t")
    assert found == name


def test_first_line_of_numbers_is_no_header(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("1.5,2,yes\n2.5,3,no\n")
    X, y = read_csv(path)
    assert X.columns == ["column_0", "column_1"]
    assert X.rows() == [(1.5, 2), (2.5, 3)]
    assert y.tolist() == ["yes", "no"]
    kinds = dict.fromkeys(X.columns, "number")
    assert pl.concat(list(read_chunks([path], of_kinds(kinds), 1))).rows() == [
        (1.5, 2.0),
        (2.5, 3.0),
    ]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (b"a,b\n1,2\n3,4,5\n", "line 3: 3 fields, where the first line has 2"),
        (b"a,b\n1,2\n3\n4,5\n", "line 3: 1 fields"),
        (b'a,b\n"1\n1",2\n3\n', "line 4: 1 fields"),
        (b"a,b\n1,2\n\n4,5\n", "line 3: 0 fields"),
        (b"a,b\n1,2\n\xe9,4\n", "line 3: byte 0xe9 is not UTF-8"),
    ],
)
@pytest.mark.parametrize("rows", [None, 1])
def test_bad_lines_are_named(text, line, rows, tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=line):
        list(read_chunks([path], of_kinds({"a": "category", "b": "number"}), rows))


def test_byte_order_mark_is_no_part_of_a_name(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes(b"\xef\xbb\xbfa,b\n1,2\n")
    assert read_table([path]).frame.columns == ["a", "b"]
    assert next(read_chunks([path], of_kinds({"a": "number"}), 1)).rows() == [(1.0,)]


def test_useless_columns():
    frame = MIXED.with_columns(pl.lit(None).alias("none"), pl.Series("half", [1, 1, None, 1, 1, 1]))
    assert preprocessing.useless_columns(frame) == {"same": "constant", "none": "all missing"}


def test_a_column_of_lists_is_named():
    with pytest.raises(ValueError, match="column 'b' holds List"):
        column_kinds(pl.DataFrame({"a": [1], "b": [[1, 2]]}))


def test_preprocessing_by_hand():
    X = MIXED.drop("price").with_columns(pl.col("sold").cast(pl.Datetime))
    used = ["size", "garden", "town"]
    transformer = make_preprocessing(X, used, scale=True, by_name=True)
    got = transformer.fit_transform(X)

    def scaled(values):
        return (values - values.mean()) / values.std()

    size = np.array([1.5, 1.5, 3.25, -4.0, 0.5, 2.0])  # the median of the others is 1.5
    garden = np.array([1, 0, 1, 1, 1, 0])
    towns = sorted(set(MIXED["town"]) - {None})
    one_hot = [[t == name for name in [*towns, None]] for t in MIXED["town"]]
    wanted = [scaled(size), scaled(garden), np.arange(6) == 1, np.arange(6) == 2]
    np.testing.assert_allclose(got, np.column_stack([*wanted, one_hot]), atol=1e-12)
    unknown = X.with_columns(town=pl.lit("Paris"))
    assert not transformer.transform(unknown)[:, 4:].any()


def test_preprocessing_of_arrays_goes_by_position(rng):
    frame = pl.DataFrame({f"column_{i}": rng.standard_normal(9) for i in range(3)})
    transformer = make_preprocessing(frame, ["column_0", "column_2"], scale=True, by_name=False)
    got = transformer.fit_transform(preprocessing.model_input(frame, False))
    kept = frame.to_numpy()[:, [0, 2]]
    np.testing.assert_allclose(got, (kept - kept.mean(0)) / kept.std(0), atol=1e-12)


@pytest.mark.parametrize("zone", [None, "Europe/Oslo"])
def test_dates_are_days_and_points_on_circles(zone, tmp_path):
    noon = dt.datetime(1970, 1, 9, 12)  # 8.5 days after the first of January, a Friday
    frame = pl.DataFrame({"d": [noon, None]}, schema={"d": pl.Datetime("ms")})
    if zone is not None:
        frame = frame.with_columns(
            pl.col("d").dt.replace_time_zone("UTC").dt.convert_time_zone(zone)
        )
    frame = read_table([write(frame.with_columns(y=1), tmp_path / "t.parquet")]).frame.drop("y")
    got = preprocessing.DateParts().fit_transform(frame)
    turns = 2 * np.pi * 8.5 / np.array([365.2425, 7.0, 1.0])
    wanted = [8.5, *np.column_stack([np.sin(turns), np.cos(turns)]).ravel(), 0.0]
    np.testing.assert_allclose(got[0], wanted, atol=1e-12)
    np.testing.assert_allclose(got[1], [*wanted[:-1], 1.0], atol=1e-12)  # as the median


def test_dates_without_a_time_have_no_time_of_day():
    frame = pl.DataFrame({"d": [dt.date(2024, 1, d) for d in range(1, 31)]})
    got = preprocessing.DateParts().fit_transform(frame)
    assert np.ptp(got[:, 5:7], axis=0).tolist() == [0.0, 0.0]  # not noise, for a scaler to blow up


def test_rare_categories_share_no_place(rng):
    texts = [f"t{i:03}" for i in range(100)] * 2 + [None, None] + [f"t{i:03}" for i in range(63)]
    X = pl.DataFrame({"a": texts})
    transformer = make_preprocessing(X, ["a"], scale=True, by_name=True)
    got = transformer.fit_transform(X, np.arange(len(texts)) % 7.0)[:, :-1]  # and the mean target
    assert got.shape[1] == 64  # the 63 of three rows, and of those of two the first: missing
    np.testing.assert_array_equal(got.sum(axis=1), [t is None or t < "t063" for t in texts])


def test_bundled_table_has_every_kind():
    frame = bundled_table("penguins").frame
    assert set(column_kinds(frame).values()) == {"number", "boolean", "category", "date"}
    assert frame.null_count().sum_horizontal().item() > 0
    assert preprocessing.useless_columns(frame) == {"region": "constant"}


@pytest.mark.parametrize("rows", [None, 1, 2, 3])
@pytest.mark.parametrize(
    "text",
    [
        "a,b\n1,2\n3,4\n\n",
        "a,b\r\n1,2\r\n3,4\r\n\r\n\r\n",
        '"a";"b"\n"1";"2"\n3;4',
    ],
)
def test_empty_lines_at_the_end_are_no_rows(text, rows, tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes(text.encode())
    chunks = read_chunks([path], of_kinds({"a": "number", "b": "number"}), rows)
    assert pl.concat(list(chunks)).rows() == [(1.0, 2.0), (3.0, 4.0)]
    assert read_table([path]).frame.rows() == [(1, 2), (3, 4)]


@pytest.mark.parametrize(
    ("text", "columns"),
    [
        ('"a,b,c";d\n1;2\n', ["a,b,c", "d"]),
        ('"two\nlines",d\n1,2\n', ["two\nlines", "d"]),
        ('"two;;\nlines",d\n1,2\n', ["two;;\nlines", "d"]),
    ],
)
def test_quotes_in_the_header(text, columns, tmp_path):
    path = tmp_path / "t.csv"
    path.write_text(text)
    frame = read_table([path]).frame
    assert frame.columns == columns
    assert frame.rows() == [(1, 2)]
    (chunk,) = read_chunks([path], of_kinds(dict.fromkeys(columns, "number")), 1)
    assert chunk.rows() == [(1.0, 2.0)]


def test_nan_in_parquet_is_missing(tmp_path):
    pl.DataFrame({"x": [1.0, float("nan")]}).write_parquet(tmp_path / "t.parquet")
    assert read_table([tmp_path / "t.parquet"]).frame["x"].to_list() == [1.0, None]
    (chunk,) = read_chunks([tmp_path / "t.parquet"], of_kinds({"x": "number"}), None)
    assert chunk["x"].to_list() == [1.0, None]


def test_a_column_that_is_empty_in_one_file_has_the_type_of_the_other(tmp_path):
    (tmp_path / "a.csv").write_text("x,d,y\n,,1\n,,2\n")
    (tmp_path / "b.csv").write_text("x,d,y\n1.5,2024-01-02,3\n")
    for order in ("ab", "ba"):
        frame = read_table([tmp_path / f"{name}.csv" for name in order]).frame
        assert column_kinds(frame) == {"x": "number", "d": "date", "y": "number"}


@pytest.mark.parametrize("suffix", ["csv", "npy"])
@pytest.mark.parametrize("target", [0, 2, 4])
def test_positions_are_those_of_the_table_when_the_target_is_not_there(suffix, target, tmp_path):
    names = [f"column_{i}" for i in range(5)]
    known = [name for i, name in enumerate(names) if i != target]
    rows = np.arange(10.0).reshape(2, 5)
    wanted = np.delete(rows, target, axis=1)[:, [0, 2]]
    for table in (rows, np.delete(rows, target, axis=1)):
        if suffix == "npy":
            np.save(tmp_path / "t.npy", table)
        else:
            np.savetxt(tmp_path / "t.csv", table, delimiter=",")
        kinds = dict.fromkeys([known[0], known[2]], "number")
        chunks = read_chunks(
            [tmp_path / f"t.{suffix}"], of_kinds(kinds), 1, [*known, names[target]]
        )
        np.testing.assert_array_equal(pl.concat(list(chunks)).to_numpy(), wanted)
