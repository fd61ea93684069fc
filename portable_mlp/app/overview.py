"""What the columns of a table were taken for, for people to look at."""

from __future__ import annotations

from collections import Counter
from io import StringIO
from typing import Any

from portable_mlp.app.dataset import Dataset

_MOST_ROWS, _MOST_NOTES, _FEW_ROWS = 30, 50, 10  # of the table on the terminal


def column_rows(data: Dataset) -> list[dict[str, Any]]:
    """Return a row for each column, the target first: name, kind, examples, missing and a note."""
    rows = []
    for name in (data.target, *data.X.columns):
        column, dropped = data.reading.columns[name], data.dropped.get(name)
        rows.append(
            {
                "name": name,
                "kind": "dropped" if dropped else column.kind,
                "examples": column.examples,
                "missing": 0.0 if name == data.target else _share_missing(data, name),
                "note": "; ".join(filter(None, (dropped, column.note))),
            }
        )
    gone = [name for name in data.dropped if name not in data.X.columns]
    rows += [
        {
            "name": name,
            "kind": "dropped",
            "examples": (),
            "missing": 0.0,
            "note": data.dropped[name],
        }
        for name in gone
    ]
    return rows


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
    noted = [row for row in rows[1:] if row["note"]]
    plain = [row for row in rows[1:] if not row["note"]]
    shown = noted[:_MOST_NOTES] + (plain if len(rows) <= _MOST_ROWS else plain[:_FEW_ROWS])
    keep = {id(row) for row in (rows[0], *shown)}
    table = Table(box=None, pad_edge=False)
    table.add_column("column", overflow="fold")
    table.add_column("kind")
    table.add_column("missing", justify="right")
    table.add_column("examples", no_wrap=True, overflow="ellipsis", max_width=30)
    table.add_column("note", overflow="fold")
    for row in rows:
        if id(row) in keep:
            kind = row["kind"] + (", the target" if row is rows[0] else "")
            missing = f"{row['missing']:.1%}" if row["missing"] else ""
            table.add_row(row["name"], kind, missing, ", ".join(row["examples"]), row["note"])
    text = StringIO()
    console = Console(file=text, width=width, markup=False, emoji=False, highlight=False)
    console.print(table)
    lines = [line.rstrip() for line in text.getvalue().splitlines()]
    if len(keep) < len(rows):
        left = Counter(row["kind"] for row in rows if id(row) not in keep)
        counts = ", ".join(f"{n} of kind {kind}" for kind, n in left.most_common())
        lines.append(f"and {counts}: the report has all")
    return "\n".join(lines)
