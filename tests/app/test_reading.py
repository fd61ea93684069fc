"""What columns are read as: in any files, in any order, and in every later file too."""

from __future__ import annotations

import bz2
import datetime as dt
import gzip
import lzma
import re
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pl = pytest.importorskip("polars")
pytest.importorskip("sklearn", minversion="1.9")
pytest.importorskip("cyclopts")

from portable_mlp.app import dataset  # noqa: E402
from portable_mlp.app.reading.columns import Reading  # noqa: E402
from portable_mlp.app.reading.options import COLUMN_KINDS, Options  # noqa: E402
from portable_mlp.app.settings import Settings  # noqa: E402
from portable_mlp.app.table import read_chunks, read_table  # noqa: E402
from portable_mlp.preprocessing import KINDS  # noqa: E402


def write(folder, *texts):
    """Write each text or bytes as a file; a pair has a name too."""
    paths = []
    for i, text in enumerate(texts):
        name, content = text if isinstance(text, tuple) else (f"{i}.csv", text)
        path = Path(folder) / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        paths.append(path)
    return paths


def column(folder, values, name="x", **options):
    """Read a column of texts beside a target, and return its values, its kind and its note."""
    frame = pl.DataFrame({name: values, "y": range(len(values))})
    path = Path(folder) / "t.csv"
    frame.write_csv(path)
    table = read_table([path], "y", Options(**options))
    found = table.reading.columns[name]
    return table.frame[name].to_list(), found.kind, found.note


def test_kinds_are_those_of_preprocessing():
    assert set(KINDS) == set(COLUMN_KINDS)


# ------------------------------------------------------------------ the invariant

NUMBERS = st.floats(allow_nan=False, allow_infinity=False, width=32)
DRESSED = st.integers(-(10**9), 10**9).flatmap(
    lambda n: st.sampled_from(
        [f"{n:,}", f"${n:,}" if n >= 0 else f"({-n:,})", f"{n}%", f"+{abs(n)}"]
    )
)
DATES = st.datetimes(dt.datetime(1900, 1, 1), dt.datetime(2100, 1, 1)).flatmap(
    lambda d: st.sampled_from(
        [f"{d:%Y-%m-%d}", f"{d:%m/%d/%Y}", f"{d:%Y-%m-%d %H:%M:%S}", f"{d:%m/%d/%Y %I:%M %p}"]
    )
)
HOLES = st.sampled_from(["", "NA", "?", " ", "n/a", "None", "-", "unknown"])
WORDS = st.sampled_from(["red", "big", "None", "x, y", 'a "b"', "two\nlines", "é", "0x1", "-"])
TRUTHS = st.sampled_from(["true", "False", "TRUE"])
CODES = st.sampled_from(["007", "010", "12345678901234567890", "5"])
VALUES = [NUMBERS.map(repr), st.integers(0, 50).map(str), DRESSED, DATES, WORDS, TRUTHS, CODES]
PADDED = st.sampled_from(["{}", " {}", "{} ", "\u00a0{}"])


@st.composite
def tables(draw):
    """Columns of texts, mostly of one kind each, with holes, spaces and a few strangers."""
    n_rows = draw(st.integers(2, 25))
    columns = []
    for _ in range(draw(st.integers(1, 3))):
        own, strange = draw(st.sampled_from(VALUES)), st.one_of(VALUES)
        share = draw(st.sampled_from([0, 0, 1, 3]))
        cell = st.integers(0, 19).flatmap(
            lambda n, own=own, strange=strange, share=share: (
                HOLES if n == 19 else strange if n < share else own
            )
        )
        pads = draw(st.lists(PADDED, min_size=n_rows, max_size=n_rows))
        texts = draw(st.lists(cell, min_size=n_rows, max_size=n_rows))
        columns.append([pad.format(text) for pad, text in zip(pads, texts, strict=True)])
    return columns


@pytest.mark.slow
@settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
@given(columns=tables(), data=st.data())
def test_files_and_chunks_do_not_matter(columns, data):
    """One reading, whatever the division into files, their order, and the rows at a time."""
    n_rows = len(columns[0])
    frame = pl.DataFrame({f"c{i}": texts for i, texts in enumerate(columns)})
    frame = frame.with_columns(y=pl.int_range(n_rows).cast(pl.String))
    cuts = sorted(data.draw(st.sets(st.integers(1, n_rows - 1), max_size=3)))
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole.csv"
        frame.write_csv(whole)
        parts = []
        for start, stop in zip([0, *cuts], [*cuts, n_rows], strict=True):
            order = data.draw(st.permutations(frame.columns))
            parts.append(Path(folder) / f"{start}.csv")
            frame[start:stop].select(order).write_csv(parts[-1])
        table = read_table([whole], "y")
        shuffled = data.draw(st.permutations(parts))
        again = read_table(shuffled, "y")
        assert again.reading.columns == table.reading.columns
        assert again.frame.select(table.frame.columns).sort("y").equals(table.frame.sort("y"))
        stored = Reading.from_dict(table.reading.to_dict())
        assert stored == table.reading
        rows = data.draw(st.integers(1, n_rows))
        later = [pl.concat(read_chunks([part], stored, rows)) for part in parts]
        assert pl.concat(later).equals(table.frame)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_the_model_does_not_depend_on_the_order_of_files(order, tmp_path):
    rows = [f"{i},{'ab'[i % 2]}\n" for i in range(40)]
    paths = write(tmp_path, "x,y\n" + "".join(rows[:15]), "x,y\n" + "".join(rows[15:]))
    data = dataset.read(Settings(data=tuple(paths[i] for i in order), target="y"))
    wanted = dataset.read(Settings(data=tuple(paths), target="y"))
    assert data.X.equals(wanted.X)
    assert data.y.tolist() == wanted.y.tolist()


# ------------------------------------------------------------------ 1: types of several files


@pytest.mark.parametrize(
    ("first", "second", "wanted"),
    [
        ("1.50 2.50 3.50 4.50", "1.50 2.50 3.50 big", ["1.50", "2.50", "3.50", "4.50"]),
        ("1 2 3 4", "1.5 2 3 4", [1.0, 2.0, 3.0, 4.0]),
        ("true false true true", "yes no no yes", ["true", "false", "true", "true"]),
        ("007 1 2 3", "4 5 6 7", ["007", "1", "2", "3"]),
    ],
)
def test_all_files_decide_what_a_column_is(first, second, wanted, tmp_path):
    texts = ["x,y\n" + "".join(f"{x},p\n" for x in text.split()) for text in (first, second)]
    paths = write(tmp_path, *texts)
    for given_ in (paths, paths[::-1]):
        reading = read_table(given_, "y").reading
        assert pl.concat(read_chunks(paths[:1], reading, None))["x"].to_list() == wanted


def test_texts_and_types_come_together(tmp_path):
    pl.DataFrame({"x": [1.5, 2.0], "b": [True, None]}).write_parquet(tmp_path / "a.parquet")
    write(tmp_path, ("b.csv", 'x,b\n"1,000",false\n?,TRUE\n'))
    frame = read_table([tmp_path / "a.parquet", tmp_path / "b.csv"], "b").frame
    assert frame["x"].to_list() == [1.5, 2.0, 1000.0, None]
    assert frame["b"].to_list() == [True, None, False, True]


# ------------------------------------------------------------------ 2, 3: dates

AMBIGUOUS = ["03/04/2021", "12/01/2021"]


@pytest.mark.parametrize(
    ("values", "options", "wanted", "note"),
    [
        (AMBIGUOUS, {}, (2021, 3, 4), "03/04/2021 is 4 March 2021.*--date-format day-first"),
        (AMBIGUOUS, {"date_format": "day-first"}, (2021, 4, 3), "^$"),
        (AMBIGUOUS, {"date_format": "%d/%m/%Y"}, (2021, 4, 3), "^$"),
        ([*AMBIGUOUS, "07/25/2020"], {}, (2021, 3, 4), "^$"),
        ([*AMBIGUOUS, "25/07/2020"], {}, (2021, 4, 3), "^$"),
        (["03.04.2021", "12.01.2021"], {}, (2021, 4, 3), "^$"),
    ],
)
def test_the_order_of_day_and_month(values, options, wanted, note, tmp_path):
    got, kind, said = column(tmp_path, values, **options)
    assert kind == "date"
    assert got[0] == dt.datetime(*wanted)
    assert re.search(note, said)


def test_another_column_tells_the_order_of_day_and_month(tmp_path):
    (path,) = write(tmp_path, "a,b,y\n03/04/2021,25/12/2020,1\n12/01/2021,03/01/2021,2\n")
    table = read_table([path], "y")
    assert table.frame["a"][0] == dt.datetime(2021, 4, 3)
    assert "another column has it so" in table.reading.columns["a"].note


def test_a_later_file_keeps_the_order_of_day_and_month(tmp_path):
    first, second = write(
        tmp_path, "d,y\n25/07/2020,1\n03/04/2021,2\n", "d,y\n03/04/2021,1\n07/25/2020,2\n"
    )
    reading = read_table([first], "y").reading
    with pytest.raises(ValueError, match=r"1.csv, row 2, column 'd': '07/25/2020', .* no date"):
        list(read_chunks([second], reading, None))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("07/25/2020", (2020, 7, 25)),
        ("06/21/2022 04:13:00 PM", (2022, 6, 21, 16, 13)),
        ("2020-01-02 10:00:00 UTC", (2020, 1, 2, 10)),
        ("2020-01-02T10:00:00.250+02:00", (2020, 1, 2, 8, 0, 0, 250000)),
        ("2020-01-02T10:00Z", (2020, 1, 2, 10)),
        ("2020/1/2", (2020, 1, 2)),
        ("  2020-01-02 ", (2020, 1, 2)),
        ("2 Jan 2020", (2020, 1, 2)),
        ("02-Jan-20", (2020, 1, 2)),
        ("January 2, 2020", (2020, 1, 2)),
        ("Thu, 02 Jan 2020 10:00:00 GMT", (2020, 1, 2, 10)),
        ("2020-01", (2020, 1, 1)),
        ("12/31/1999 12:05 a.m.", (1999, 12, 31, 0, 5)),
    ],
)
def test_forms_of_dates(text, wanted, tmp_path):
    got, kind, _ = column(tmp_path, [text, "unknown", "", text])
    assert kind == "date"
    assert got == [dt.datetime(*wanted), None, None, dt.datetime(*wanted)]


@pytest.mark.parametrize(
    "values",
    [
        ["1.2.3", "10.0.19"],
        ["12:30", "13:45"],
        ["2020-02-30"],
        ["May", "June"],
        ["1001-1", "1002-3"],
        ["1234-05", "1234-11"],
        ["12/31/2020 13:00 PM"],
    ],
)
def test_what_is_no_date(values, tmp_path):
    assert column(tmp_path, values)[1] == "category"


def test_a_few_strangers_among_dates(tmp_path):
    values = [f"2020-01-{i:02}" for i in range(1, 31)] + ["soon"]
    got, kind, note = column(tmp_path, values)
    assert kind == "date"
    assert got[-1] is None
    assert note == "taken as missing: soon (1)"


# ------------------------------------------------------------------ 6, 7, 8: the frame of a table


@pytest.mark.parametrize(
    ("text", "columns", "rows"),
    [
        ("a, b, y\n1, 77516, p\n2, ?, q \n", ["a", "b", "y"], [(1, 77516, "p"), (2, None, "q")]),
        ('a, "b c", y\n1, "x, z", p\n2, w,yes \n', ["a", "b c", "y"],
         [(1, "x, z", "p"), (2, "w", "yes")]),
        ("a\t b \t y\n 1\t\u00a02\t p\n", ["a", "b", "y"], [(1, 2, "p")]),
    ],
)  # fmt: skip
def test_spaces_around_fields(text, columns, rows, tmp_path):
    table = read_table(write(tmp_path, text), "y")
    assert table.frame.columns == columns
    assert table.frame.rows() == rows
    assert pl.concat(read_chunks([tmp_path / "0.csv"], table.reading, 1)).equals(table.frame)


@pytest.mark.parametrize(
    ("text", "header"),
    [
        ("M,0.455,15\nF,0.35,7\nM,0.40,9\n", False),
        ("2020-01-02,red\n2020-01-03,blue\n", False),
        ("red,yes\nblue,no\nred,yes\n", False),
        (",3.5,a\n1.00,2.00,a\n2.00,,b\n", False),
        ("5,1;3,5;1,4;a\n4,9;3,0;1,4;b\n", False),
        ("5.1,3.5,setosa\n4.9,3.0,setosa\n", False),
        ("sex,length,rings\nM,0.455,15\n", True),
        ("country,2019,2020\nFrance,1,2\nItaly,3,4\n", True),
        ("0,1,2,target\n5.5,6.5,7.5,a\n", True),
        ("colour,taste\nred,sweet\nblue,sour\n", True),
        ("name,when\nred,2020-01-02\n", True),
    ],
)
def test_whether_the_first_row_is_a_header(text, header, tmp_path):
    table = read_table(write(tmp_path, text))
    assert len(table.frame) == text.count("\n") - header
    assert bool(table.notes) != header
    width = len(table.frame.columns)
    assert (table.frame.columns == [f"column_{i}" for i in range(width)]) != header
    later = pl.concat(read_chunks([tmp_path / "0.csv"], table.reading, None, table.frame.columns))
    assert later.equals(table.frame)


@pytest.mark.parametrize("header", [True, False])
def test_the_user_knows_whether_there_is_a_header(header, tmp_path):
    paths = write(tmp_path, "red,yes\nblue,no\nred,yes\n")
    table = read_table(paths, options=Options(header=header))
    assert len(table.frame) == 3 - header
    assert pl.concat(read_chunks(paths, table.reading, None)).equals(table.frame)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x,y,y\n1,2,2\n", "several columns 'y', in places 2, 3"),
        ("x, x ,y\n1,2,2\n", "several columns 'x', in places 1, 2"),
        ("a,b,a,a\n1,2,3,p\n", "several columns 'a', in places 1, 3, 4"),
    ],
)
def test_a_name_twice_is_refused(text, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        read_table(write(tmp_path, text), "y" if "y" in text else "b")


def test_columns_without_a_name_are_called_by_their_places(tmp_path):
    assert read_table(write(tmp_path, "column_1,,y\n1,2,p\n"), "y").frame.columns == [
        "column_1", "column_1_", "y"
    ]  # fmt: skip
    pl.DataFrame({"": [1, 2], " y ": ["p", "q"]}).write_parquet(tmp_path / "t.parquet")
    assert read_table([tmp_path / "t.parquet"], "y").frame.columns == ["column_0", "y"]
    table = read_table(write(tmp_path, ",a,,y\n0,5,,p\n1,6,,q\n2,8,,p\n"), "y")
    assert table.frame.columns == ["column_0", "a", "column_2", "y"]


# ------------------------------------------------------------------ 9, 10, 13: numbers and codes


@pytest.mark.parametrize(
    "values",
    [
        [str(10**22 + i) for i in range(30)],
        ["9007199254740993", "9007199254740992"],
        ["007", "010", "5"],
        ["00", "01"],
    ],
)
def test_whole_numbers_that_would_change_are_text(values, tmp_path):
    got, kind, note = column(tmp_path, values)
    assert (got, kind) == (values, "category")
    assert "would change" in note


@pytest.mark.parametrize(
    "codes", [["007", "010"], ["00", "01", "1"], [str(10**20), str(10**20 + 1)]]
)
def test_labels_that_are_codes_stay_as_they_are(codes, tmp_path):
    data = read(tmp_path, {"x": range(60), "y": [codes[i % len(codes)] for i in range(60)]})
    assert data.classify
    assert set(data.y) == set(codes)


@pytest.mark.parametrize("values", [[2**60 + 1, 2**60 + 2], [10**17 + 1, 5]])
def test_whole_numbers_of_typed_files_that_would_change_are_text(values, tmp_path):
    pl.DataFrame({"x": values, "y": [1, 2]}).write_parquet(tmp_path / "t.parquet")
    table = read_table([tmp_path / "t.parquet"])
    assert table.frame["x"].to_list() == list(map(str, values))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("4,743,210", 4743210.0),
        ("$1,234.50", 1234.5),
        ("-$5", -5.0),
        ("12%", 0.12),
        ("(5)", -5.0),
        ("($1,200.25)", -1200.25),
        ("+5", 5.0),
        ("\u22125.5", -5.5),
        ("1 234 567", 1234567.0),
        ("1\u202f234", 1234.0),
        ("1'234.5", 1234.5),
        ("5 €", 5.0),
        ("USD 5", 5.0),
        ("0.1 %", 0.001),
        (" 7 ", 7.0),
        ("1e-3", 0.001),
    ],
)
def test_numbers_as_people_write_them(text, wanted, tmp_path):
    got, kind, _ = column(tmp_path, ["1.5", text, "2.25"])
    assert (got, kind) == ([1.5, wanted, 2.25], "number")


@pytest.mark.parametrize(
    "text", ["1,23,456", "12 34", "1.2.3", "5-", "5 apples", "--5", "1,2345.5"]
)
def test_what_is_no_number(text, tmp_path):
    assert column(tmp_path, [text, text])[1] == "category"


@pytest.mark.parametrize(
    ("values", "separator", "options", "wanted", "said"),
    [
        (["5,125", "6,250"], ",", {}, [5125, 6250], "5,125 is 5125 (--decimal , says otherwise)"),
        (["5,125", "6,250"], ";", {}, [5.125, 6.25], "5,125 is 5.125 (--decimal . says otherwise)"),
        (["5,125", "6,250"], ",", {"decimal": ","}, [5.125, 6.25], "5,125 is 5.125"),
        (["5,1", "6,250"], ",", {}, [5.1, 6.25], "5,1 is 5.1"),
        (["1.234,5", "6.250"], ";", {}, [1234.5, 6250], "1.234,5 is 1234.5"),
        (["5,125", "0.5"], ";", {}, [5125, 0.5], "5,125 is 5125"),
        (["1.234", "2.345"], ",", {}, [1.234, 2.345], ""),
        (["40.100", "-70.200"], ";", {}, [40.1, -70.2], ""),
        (["0.143", "1.234"], ";", {}, [0.143, 1.234], ""),
        (["234.567", "1.234.567"], ",", {}, [234567, 1234567], "234.567 is 234567"),
        (["234,567", "1,234,567"], ";", {}, [234567, 1234567], "1,234,567 is 1234567"),
    ],
)
def test_the_decimal_mark(values, separator, options, wanted, said, tmp_path):
    frame = pl.DataFrame({"x": values, "y": ["p", "q"]})
    frame.write_csv(tmp_path / "t.csv", separator=separator)
    table = read_table([tmp_path / "t.csv"], "y", Options(**options))
    assert table.frame["x"].to_list() == wanted
    assert table.reading.columns["x"].note == said
    assert pl.concat(read_chunks([tmp_path / "t.csv"], table.reading, 1)).equals(table.frame)


def test_a_column_tells_another_the_decimal_mark(tmp_path):
    (path,) = write(tmp_path, 'a;b;y\n"1,500";0,5;p\n"2,500";0,7;q\n')
    assert read_table([path], "y").frame.rows() == [(1.5, 0.5, "p"), (2.5, 0.7, "q")]


@pytest.mark.parametrize("tags", ["1,2", "0,5 or so"])
def test_texts_do_not_tell_numbers_the_decimal_mark(tags, tmp_path):
    (path,) = write(tmp_path, f'tags,x,y\n"{tags}",0.100,p\nred,1.101,q\nblue,2.102,p\n')
    assert read_table([path], "y").frame["x"].to_list() == [0.1, 1.101, 2.102]


def test_a_column_with_another_decimal_mark_is_noted(tmp_path):
    (path,) = write(tmp_path, "a;b;y\n1,5;1.234;p\n2,5;2.345;q\n")
    table = read_table([path], "y")
    assert table.frame["b"].to_list() == [1234.0, 2345.0]
    assert table.reading.columns["b"].note == "1.234 is 1234 (--decimal . says otherwise)"


@pytest.mark.parametrize(
    ("values", "note"),
    [
        (["12%", "15", "0.5"], "12% is 0.12, and numbers without % are as they are"),
        (["12%", "15%"], "12% is 0.12"),
        (["$5", "€5", "5 USD"], "in different currencies: $, USD, €"),
        (["10.04.20", "12.10.18"], "10.04.20 is 10 April 2020"),
    ],
)
def test_what_is_not_obvious_is_noted(values, note, tmp_path):
    assert column(tmp_path, values)[2] == note


# ------------------------------------------------------------------ 11, 12: missing values


HOLE_TEXTS = ["", " ", "NA", "na", "n/a", "N/A", "None", "-", "?", " ? ", "NULL", "#N/A", "nan",
              "unknown", "#DIV/0!", "\u2013"]  # fmt: skip


@pytest.mark.parametrize("hole", HOLE_TEXTS)
def test_holes_among_numbers_dates_and_booleans(hole, tmp_path):
    for values in (["0.1", "0.2"], ["2020-01-02", "2020-01-03"], ["true", "false"]):
        got, kind, note = column(tmp_path, [*values, hole])
        assert kind != "category"
        assert got[2] is None
        word = hole.strip().lower() not in ("", "na", "n/a", "#n/a", "nan", "null", "?")
        assert note == (f"{hole} is missing (1)" if word else "")


def test_words_for_nothing_are_categories_among_texts(tmp_path):
    got, kind, _ = column(tmp_path, ["None", "mild", "-", "NA", ""])
    assert (got, kind) == (["None", "mild", "-", None, None], "category")


def test_codes_are_not_missing_numbers(tmp_path):
    got, kind, _ = column(tmp_path, ["005", "006", "007", "7"], missing=("7",))
    assert (got, kind) == (["005", "006", "007", None], "category")


def test_missing_values_of_one_s_own(tmp_path):
    got, kind, note = column(tmp_path, ["1", "Absent", "-999", "2"], missing=("absent", "-999"))
    assert (got, kind, note) == ([1.0, None, None, 2.0], "number", "")
    got, kind, _ = column(tmp_path, ["red", "Absent"], missing=("absent",))
    assert got == ["red", None]


@pytest.mark.parametrize(
    ("strangers", "kind", "note"),
    [
        (["tbd"] * 3, "number", "taken as missing: tbd (3)"),
        ([f"text {i}" for i in range(4)], "number", "taken as missing: text 0 (1), "),
        ([f"text {i}" for i in range(12)], "category", "text: 12 of 100 values are no numbers, su"),
    ],
)
def test_a_few_strangers_among_numbers(strangers, kind, note, tmp_path):
    values = [*strangers, *(str(i / 2) for i in range(100 - len(strangers)))]
    got, found, said = column(tmp_path, values)
    assert found == kind
    assert said.startswith(note)
    assert (got[0] is None) == (kind == "number")


@pytest.mark.parametrize("junk", ["unknown", "none yet", "?"])
def test_rows_whose_target_is_no_number_are_left_out(junk, tmp_path):
    rows = "".join(f"{i},{i / 7:.3f}\n" for i in range(40))
    (path,) = write(tmp_path, f"x,y\n{rows}40,{junk}\n")
    data = dataset.read(Settings(data=(path,), target="y"))
    assert not data.classify
    assert len(data.y) + len(data.y_test) == 40
    assert "rows without a target, left out: 1" in data.notes
    with pytest.raises(ValueError, match="'y' is missing in some rows .1."):
        dataset.read(Settings(data=(path,), target="y", missing_target="error"))


# ------------------------------------------------------------------ 14: rows that are empty


@pytest.mark.parametrize("tail", [",,\n,,\n", "3,4,NA\n", ",,\n\n\n"])
def test_rows_without_a_target_are_left_out(tail, tmp_path):
    rows = "".join(f"{i},{i % 3},{'pq'[i % 2]}\n" for i in range(20))
    (path,) = write(tmp_path, f"a,b,y\n{rows}{tail}")
    data = dataset.read(Settings(data=(path,), target="y"))
    assert len(data.y) + len(data.y_test) == 20
    assert any("rows without a target, left out: " in note for note in data.notes)


# ------------------------------------------------------------------ 16: files


PLAIN = b"x,y\n1,p\n2,q\n"


def zipped(content):
    with tempfile.NamedTemporaryFile() as file:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("t.csv", content)
        return Path(file.name).read_bytes()


def zstd(content):
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
    return zstd.compress(content)


@pytest.mark.parametrize(
    "content",
    [
        gzip.compress(PLAIN),
        bz2.compress(PLAIN),
        lzma.compress(PLAIN),
        zipped(PLAIN),
        zstd(PLAIN),
        PLAIN.decode().encode("utf-16"),
        PLAIN.decode().encode("utf-8-sig"),
        gzip.compress(PLAIN.decode().encode("utf-16")),
        b"sep=;\nx;y\n1;p\n2;q\n",
        b"SEP=;\nx;y\n1;p\n2;q\n",
        b"# made by hand\n# in 2020\nx,y\n1,p\n2,q\n",
        b"#x,y\n1,p\n2,q\n",
        b"x|y\n1|p\n2|q\n",
        b"x;y\r\n1;p\r\n2;q\r\n\r\n",
        b"x,y\r1,p\r2,q\r",
        b'"x","y"\n"1","p"\n"2","q"',
    ],
    ids=range(16),
)
@pytest.mark.parametrize("name", ["t.csv", "t.txt", "t.gz"])
def test_files_are_what_their_bytes_are(content, name, tmp_path):
    paths = write(tmp_path, (name, content))
    table = read_table(paths)
    assert table.frame.columns == ["x", "y"]
    assert table.frame.rows() == [(1.0, "p"), (2.0, "q")]
    assert pl.concat(read_chunks(paths, table.reading, 1)).equals(table.frame)


@pytest.mark.parametrize(
    ("how", "name"),
    [("write_parquet", "t.parquet"), ("write_parquet", "t.csv"), ("write_ipc", "t.csv")],
)
def test_typed_files_by_their_bytes(how, name, tmp_path):
    frame = pl.DataFrame({"x": [1.0, 2.0], "y": ["p", "q"]})
    getattr(frame, how)(tmp_path / name)
    assert read_table([tmp_path / name]).frame.equals(frame)


@pytest.mark.parametrize("name", ["t.npy", "t.csv"])
def test_arrays_by_their_bytes(name, tmp_path):
    with open(tmp_path / name, "wb") as file:
        np.save(file, np.arange(60.0).reshape(30, 2) % 7)
    data = dataset.read(Settings(data=(tmp_path / name,), task="regression"))
    assert data.X.columns == ["column_0"]
    assert not data.by_name


def test_excel(tmp_path):
    pytest.importorskip("fastexcel")
    pytest.importorskip("xlsxwriter")
    frame = pl.DataFrame(
        {"x": [1.5, None], "d": [dt.date(2020, 1, 2), None], "t": ["12%", "7"], "y": ["p", "q"]}
    )
    frame.write_excel(tmp_path / "t.xlsx")
    got = read_table([tmp_path / "t.xlsx"]).frame
    assert got.rows() == [(1.5, dt.datetime(2020, 1, 2), 0.12, "p"), (None, None, 7.0, "q")]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"SQLite format 3\x00rest", "is a SQLite database"),
        (b"%PDF-1.7 rest", "is a PDF document"),
        (b"\x89HDF\r\n\x1a\n", "is an HDF5 file"),
        (b"<!doctype html><table>", "is a web page"),
        (b'[{"x": 1}]', "is JSON"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "is an Excel file of the old format"),
        (b"\x80\x04\x95rest", "is a pickle"),
        (gzip.compress(PLAIN)[:-9], "it is damaged"),
        (b"x,y\n1,\x00\n", "is no text"),
    ],
)
def test_foreign_files_are_named(content, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        read_table(write(tmp_path, ("t.csv", content)))


@pytest.mark.parametrize("header", ["ORC,apples,y", "PAR1,PAR2,y", "RDX,b,y", "Obj,b,y"])
def test_names_are_no_magic(header, tmp_path):
    assert read_table(write(tmp_path, f"{header}\n1,2,p\n")).frame.columns == header.split(",")


def test_damaged_archives_and_books_are_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "b.xlsx", "w") as archive:
        archive.writestr("[Content_Types].xml", "<x/>")
    pytest.importorskip("fastexcel")
    with pytest.raises(ValueError, match="b.xlsx cannot be read as an Excel file"):
        read_table([tmp_path / "b.xlsx"])
    text = "x,y\n" + "".join(f"{i * 7919 % 1000},{i}\n" for i in range(3000))
    for pack in (zstd, gzip.compress, bz2.compress, lzma.compress):
        content = pack(text.encode())[:-200]
        with pytest.raises(ValueError, match="it is damaged"):
            read_table(write(tmp_path, content))


def test_an_excel_file_without_a_header(tmp_path):
    pytest.importorskip("fastexcel")
    pytest.importorskip("xlsxwriter")
    pl.DataFrame({"a": [1, 2], "b": ["p", "q"]}).write_excel(
        tmp_path / "t.xlsx", include_header=False
    )
    table = read_table([tmp_path / "t.xlsx"], options=Options(header=False))
    assert table.frame.rows() == [(1.0, "p"), (2.0, "q")]
    assert table.frame.columns == ["column_0", "column_1"]


def test_arrays_that_would_share_a_name_are_refused(tmp_path):
    np.savez(tmp_path / "t.npz", X=np.ones((4, 2)), X_0=np.zeros(4))
    with pytest.raises(ValueError, match="several of its columns would be called X_0"):
        read_table([tmp_path / "t.npz"])


def test_separators_of_one_s_own(tmp_path):
    paths = write(tmp_path, "x~y\n1,5~p\n2,5~q\n")
    table = read_table(paths, options=Options(separator="~"))
    assert table.frame.rows() == [(1.5, "p"), (2.5, "q")]
    assert pl.concat(read_chunks(paths, table.reading, 1)).equals(table.frame)


def test_long_fields_and_bare_quotes(tmp_path):
    long = "a" * 200_000
    paths = write(tmp_path, f'x,y\n"{long}\n",1\n5" pipe,2\n')
    table = read_table(paths)
    assert table.frame.rows() == [(long, 1.0), ('5" pipe', 2.0)]
    assert pl.concat(read_chunks(paths, table.reading, 1)).equals(table.frame)


@pytest.mark.slow
def test_odd_quotes_after_the_first_rows(tmp_path, monkeypatch):
    from portable_mlp.app.reading import csvs

    monkeypatch.setattr(csvs, "_BLOCK", 2**10)
    monkeypatch.setattr(csvs, "_LONGEST_ROW", 2**12)
    plain = "".join(f"{i}, red, {'ab'[i % 2]}\n" for i in range(9000))
    for row, wanted in [
        ('5, "u, v", a', "u, v"),
        ('5, "red", a', "red"),
        ('5, 5" pipe, a', '5" pipe'),
    ]:
        paths = write(tmp_path, f"x, z, y\n{plain}{row}\n{plain}")
        frame = read_table(paths, "y").frame
        assert len(frame) == 18001
        assert frame["z"][9000] == wanted
        assert frame["z"].n_unique() == (1 if wanted == "red" else 2)


@pytest.mark.parametrize(("row", "n"), [("1,", 0), ('"1",', 1), ('1, "p"', 1), ('1,5" pipe', 1)])
def test_a_file_is_checked_once(row, n, tmp_path, monkeypatch):
    """Python's reader is slow; training reads a file twice."""
    from portable_mlp.app.reading import csvs

    calls = []

    def counted(*given, original=csvs.check_rows):
        calls.append(given)
        return original(*given)

    monkeypatch.setattr(csvs, "check_rows", counted)
    read_table(write(tmp_path, f"x,y\n1,p\n{row}\n2,q\n"), "x")
    assert len(calls) == n


def test_blocks_end_with_rows(tmp_path, monkeypatch):
    from portable_mlp.app.reading import csvs

    rows = [f'{i},"a ""quoted""\nline, {i}"' for i in range(50)]
    paths = write(tmp_path, "x,t\n" + "\n".join(rows) + "\n")
    wanted = read_table(paths, "x").frame
    assert wanted["t"].to_list() == [f'a "quoted"\nline, {i}' for i in range(50)]
    for size in (1, 7, 64, 500):
        monkeypatch.setattr(csvs, "_BLOCK", size)
        assert read_table(paths, "x").frame.equals(wanted)


# ------------------------------------------------------------------ 17: errors in later files


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("long,a", r"1.csv, row 70, column 'x': 'long', which is no number"),
        ("inf,a", r"1.csv, row 70, column 'x': 'inf', beyond ±1e\+150"),
        ("1,2,3", "1.csv, line 71: 3 fields, where the first line has 2"),
    ],
)
@pytest.mark.parametrize("rows", [1, 16, None])
def test_bad_cells_are_named(bad, said, rows, tmp_path):
    good = "".join(f"{i},{'ab'[i % 2]}\n" for i in range(69))
    first, second = write(tmp_path, f"x,y\n{good}", f"x,y\n{good}{bad}\n5,a\n")
    reading = read_table([first]).reading
    with pytest.raises(ValueError, match=said):
        list(read_chunks([second], reading, rows))


def test_truth_among_zeros_and_ones(tmp_path):
    first, second, third = write(
        tmp_path,
        "x,b,y\n0,true,a\n1,false,b\n",
        "x,b,y\ntrue,1,a\nFalse,no,b\n",
        "x,y\n2,p\ntrue,q\n",
    )
    reading = read_table([first]).reading
    frame = pl.concat(read_chunks([second], reading, None))
    assert frame.rows() == [(1.0, True, "a"), (0.0, False, "b")]
    assert read_table([first, second]).reading.columns["x"].kind == "number"
    assert read_table([third]).reading.columns["x"].kind == "category"  # among other numbers
    (fourth,) = write(tmp_path, "x,b,y\n1,true,p\n20,false,q\n")
    reading = read_table([fourth]).reading
    with pytest.raises(ValueError, match="row 1, column 'x': 'true', which is no number"):
        list(read_chunks([second], reading, None))


def test_a_few_ones_and_zeros_among_truths(tmp_path):
    got, kind, note = column(tmp_path, ["true"] * 20 + ["false"] * 20 + ["0", "1"])
    assert (got[-2:], kind, note) == ([False, True], "boolean", "")


# ------------------------------------------------------------------ 15, 18, 19: the task


def read(tmp_path, columns, **settings):
    frame = pl.DataFrame(columns)
    frame.write_csv(tmp_path / "t.csv")
    return dataset.read(Settings(data=(tmp_path / "t.csv",), target="y", **settings))


@pytest.mark.parametrize(
    ("y", "classify", "note"),
    [
        ([0, 1, 2] * 20, True, "3 different whole numbers: they are taken for classes"),
        ([0.0, 1.0, 2.0] * 20, True, "3 different whole numbers: they are taken for classes"),
        ([*range(10)] * 6 + [40], False, "40 is in one row: they are taken for amounts"),
        ([*range(41)] * 9 + [6], False, "41 different whole numbers: they are taken for amounts"),
        ([0.5, 1.5] * 30, False, None),
        ([i / 7 for i in range(60)], False, None),
        (["a", "b"] * 30, True, None),
    ],
)
def test_the_task_and_why(y, classify, note, tmp_path, rng):
    data = read(tmp_path, {"x": rng.standard_normal(len(y)).tolist(), "y": y})
    assert data.classify == classify
    assert any("taken for" in said for said in data.notes) == (note is not None)
    assert note is None or any(note in said for said in data.notes)
    assert set(data.y) <= set(y)  # labels as they are
    other = "regression" if classify else "classification"
    if note is not None and "one row" not in note:
        assert read(tmp_path, {"x": [*range(len(y))], "y": y}, task=other).classify != classify


def test_a_class_of_one_row_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match=r"one row, odd: .*; --missing odd leaves its row out"):
        read(tmp_path, {"x": range(41), "y": ["a", "b"] * 20 + ["odd"]})
    data = read(tmp_path, {"x": range(41), "y": ["a", "b"] * 20 + ["odd"]}, missing=("odd",))
    assert len(data.y) + len(data.y_test) == 40


@pytest.mark.parametrize(("share", "said"), [(5, True), (9, True), (15, False), (50, False)])
def test_a_small_class_is_noted(share, said, tmp_path):
    columns = {"x": [*range(200)], "y": ["yes" if i % 100 < share else "no" for i in range(200)]}
    notes = " ".join(read(tmp_path, columns).notes)
    assert (f"the smallest class, yes, has {share}.0%" in notes) == said
    assert "smallest" not in " ".join(read(tmp_path, columns, class_weight="balanced").notes)


def test_ten_equal_classes_are_not_small(tmp_path):
    data = read(tmp_path, {"x": [*range(200)], "y": [f"c{i % 11}" for i in range(200)]})
    assert not data.notes


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ([f"C-{1000 + 7 * i}" for i in range(60)], "different in nearly every row"),
        ([f"Smith, {chr(65 + i % 26)}. {i}" for i in range(60)], "different in nearly every row"),
        ([f"C-{i % 20}" for i in range(60)], None),
        ([f"{10**18 + 13 * i}" for i in range(60)], "different in nearly every row"),
    ],
)
def test_columns_that_tell_rows_apart_are_left_out(values, why, tmp_path):
    columns = {"x": [*range(60)], "id": values, "y": ["a", "b"] * 30}
    assert read(tmp_path, columns).dropped.get("id") == why
    assert "id" not in read(tmp_path, columns, column=("id=category",)).dropped


def test_the_index_of_a_data_frame_is_left_out(tmp_path):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"x": np.arange(30) % 7, "y": ["a", "b"] * 15})
    frame.loc[7, "y"] = None
    frame[:12].to_csv(tmp_path / "a.csv")
    frame[12:].sample(frac=1, random_state=0).to_csv(tmp_path / "b.csv")
    frame.to_csv(tmp_path / "t.csv")
    for names in ("ab", "ba", "t"):
        data = dataset.read(Settings(data=tuple(tmp_path / f"{n}.csv" for n in names), target="y"))
        assert data.dropped == {"column_0": "numbers the rows"}


def test_numbers_in_order_are_a_column_like_others_where_none_has_a_name(tmp_path):
    np.save(tmp_path / "t.npy", np.c_[np.arange(40), np.arange(40) / 7])
    assert dataset.read(Settings(data=(tmp_path / "t.npy",))).used == ["column_0"]


def test_a_table_of_identifiers_alone(tmp_path):
    with pytest.raises(
        ValueError, match="nothing to learn from: id .different in nearly every row"
    ):
        read(tmp_path, {"id": [f"C{i}" for i in range(60)], "y": ["a", "b"] * 30})


# ------------------------------------------------------------------ what the user says


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("number", [7.0, 10.0, None]),
        ("category", ["007", "010", "x"]),
        ("boolean", [None, None, None]),
    ],
)
def test_kinds_as_the_user_says(kind, wanted, tmp_path):
    got, found, note = column(tmp_path, ["007", "010", "x"], columns={"x": kind})
    assert (got, found) == (wanted, kind)
    assert "as --column says" in note


def test_numbers_that_are_no_dates_are_named(tmp_path):
    with pytest.raises(ValueError, match="row 1, column 'x': '1', which is no date"):
        column(tmp_path, [str(i) for i in range(1, 40)], columns={"x": "date"})


@pytest.mark.parametrize("n", [5, 60])
@pytest.mark.parametrize("said", [{}, {"columns": {"x": "date"}}])
def test_dates_in_a_format_that_only_the_user_knows(n, said, tmp_path):
    days = [dt.datetime(2020, 1, 1) + dt.timedelta(i) for i in range(n)]
    values = [f"{day:%Y%m%d}" for day in days]
    got, kind, _ = column(tmp_path, values, date_format="%Y%m%d", **said)
    assert (got, kind) == (days, "date")
    assert column(tmp_path, values)[1] == "number"


def test_columns_to_drop(tmp_path):
    (path,) = write(
        tmp_path, "a,b,c,y\n" + "".join(f"{i},{i % 5},{i % 3},{i % 2}\n" for i in range(30))
    )
    said = {"drop": ("a",), "column": ("b=drop",)}
    data = dataset.read(Settings(data=(path,), target="y", **said))
    assert data.used == ["c"]
    assert data.dropped == {"a": "--drop", "b": "--column"}
    np.save(tmp_path / "t.npy", np.arange(90.0).reshape(30, 3) % 7)
    path = tmp_path / "t.npy"
    data = dataset.read(Settings(data=(path,), target="2", task="regression", drop=("column_0",)))
    assert data.used == ["column_1"]
    assert data.X.columns == ["column_0", "column_1"]  # its places stay


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"column": ("x=numbr",)}, "did you mean number"),
        ({"column": ("x",)}, "it takes NAME=KIND"),
        ({"column": ("z=number",)}, "no column 'z'"),
        ({"drop": ("z",)}, "no column 'z'"),
        ({"date_format": "%Q"}, "%Q is no format of dates"),
        ({"date_format": "dmy"}, "dmy is no format of dates"),
        ({"date_format": "%d/%m/%Y"}, "fits the values of no column"),
        ({"drop": ("y",)}, "the target 'y' cannot be dropped"),
    ],
)
def test_what_the_user_cannot_say(said, message, tmp_path):
    (path,) = write(tmp_path, "x,y\n1,p\n2,q\n")
    with pytest.raises(ValueError, match=message):
        dataset.read(Settings(data=(path,), target="y", **said))


def test_columns_to_drop_by_position(tmp_path):
    (path,) = write(tmp_path, "".join(f"{i % 3},{i % 5},{i % 7},{i % 2}\n" for i in range(40)))
    data = dataset.read(Settings(data=(path,), target="0", drop=("3",)))
    assert data.used == ["column_1", "column_2"]
    (later,) = write(tmp_path, ("later.csv", "1,2,0\n3,4,1\n"))  # without the target
    wanted = data.reading.only(data.used)
    known = [*(n for n in data.reading.names if n != data.target), data.target]
    assert pl.concat(read_chunks([later], wanted, 1, known)).rows() == [(1.0, 2.0), (3.0, 4.0)]


@pytest.mark.parametrize("rows", [1, 2, None])
def test_floats_as_categories_do_not_depend_on_the_rows_beside_them(rows, tmp_path):
    pl.DataFrame({"x": [1.0, 2.0, 2.5, None], "y": list("pqpq")}).write_parquet(
        tmp_path / "t.parquet"
    )
    table = read_table([tmp_path / "t.parquet"], options=Options(columns={"x": "category"}))
    assert table.frame["x"].to_list() == ["1", "2", "2.5", None]
    chunks = read_chunks([tmp_path / "t.parquet"], table.reading, rows)
    assert pl.concat(chunks).equals(table.frame)


def test_types_that_clash_are_noted(tmp_path):
    pl.DataFrame({"x": [dt.date(2020, 1, 2)] * 3, "y": [1, 2, 3]}).write_parquet(
        tmp_path / "a.parquet"
    )
    (path,) = write(tmp_path, ("b.csv", "x,y\n1,2\n2,3\n3,4\n"))
    found = read_table([tmp_path / "a.parquet", path], "y").reading.columns["x"]
    assert found.kind == "category"
    assert found.note == "text: some files have it as date"


def test_positions_of_the_target_have_to_agree(tmp_path):
    paths = write(tmp_path, "x,y\n1,2\n", "y,x\n3,4\n")
    with pytest.raises(ValueError, match="--target -1 is 'x' or 'y'.*give its name"):
        read_table(paths, "-1")
    assert sorted(read_table(paths, "y").frame.select("x", "y").rows()) == [(1, 2), (4, 3)]
