"""What the columns of a table were taken for, for people to look at."""

from __future__ import annotations

from io import StringIO
from typing import Any

import polars as pl

from portable_mlp.app.dataset import Dataset

_MOST_ROWS = 30  # of the table on the terminal
_MOST_CHARACTERS = 16  # of an example


def column_rows(data: Dataset) -> list[dict[str, Any]]:
    """Return a row for each column, the target first: name, kind, examples, missing and a note."""
    rows = []
    for name in (data.target, *data.X.columns):
        column, dropped = data.reading.columns[name], data.dropped.get(name)
        rows.append(
            {
                "name": name,
                "kind": "dropped" if dropped else column.kind,
                "examples": [text.strip() or repr(text) for text in column.examples],
                "missing": 0.0 if name == data.target else _share_missing(data, name),
                "note": "; ".join(filter(None, (dropped, column.note))),
            }
        )
    gone = [name for name in data.dropped if name not in data.X.columns]
    rows += [
        {
            "name": name,
            "kind": "dropped",
            "examples": [],
            "missing": 0.0,
            "note": data.dropped[name],
        }
        for name in gone
    ]
    return rows


def _short(text: str) -> str:
    return text if len(text) <= _MOST_CHARACTERS else text[: _MOST_CHARACTERS - 1] + "…"


def _share_missing(data: Dataset, name: str) -> float:
    parts = data.X[name], data.X_test[name]
    return float(sum(part.null_count() for part in parts) / sum(map(len, parts)))


def columns_table(data: Dataset, width: int) -> str:
    """Return the columns as a table of text.

    Of a table with many columns it shows those with a note first, and counts the others.
    """
    from rich.console import Console
    from rich.table import Table

    rows = column_rows(data)
    shown = sorted(rows[1:], key=lambda row: not row["note"])[: _MOST_ROWS - 1]
    keep = {id(row) for row in (rows[0], *shown)}
    table = Table(box=None, pad_edge=False)
    for title in ("column", "kind", "missing", "examples", "note"):
        one_line = title == "examples"
        table.add_column(
            title,
            justify="right" if title == "missing" else "left",
            no_wrap=one_line,
            overflow="ellipsis" if one_line else "fold",
            max_width=30 if one_line else None,
        )
    for row in rows:
        if id(row) in keep:
            kind = row["kind"] + (", the target" if row is rows[0] else "")
            missing = f"{row['missing']:.1%}" if row["missing"] else ""
            examples = ", ".join(
                text if len(text) <= 16 else text[:15] + "…" for text in row["examples"]
            )
            table.add_row(row["name"], kind, missing, examples, row["note"])
    text = StringIO()
    console = Console(file=text, width=width, markup=False, emoji=False, highlight=False)
    console.print(table)
    lines = [line.rstrip() for line in text.getvalue().splitlines()]
    if len(keep) < len(rows):
        kinds = pl.Series([row["kind"] for row in rows if id(row) not in keep])
        counts = kinds.value_counts(sort=True).rows()
        lines.append(f"and {', '.join(f'{n} of kind {kind}' for kind, n in counts)}")
    return "\n".join(lines)
