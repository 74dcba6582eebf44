"""Whatever texts and labels there are, every layout of a file gives them back: properties, with few examples by default."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import write_rows
from helpers import own
from hypothesis import given
from hypothesis import strategies as some

from craft_cli.config.names import join_names, split_names
from craft_cli.data.cells import for_spreadsheets, list_in
from craft_cli.data.readers import rows_of
from craft_cli.data.sources import DataSource
from craft_cli.data.writers import RecordWriter
from craft_cli.errors import DataError
from craft_cli.tasks.splits import load_splits

CHARACTERS = some.characters(exclude_categories=["Cs"])
TEXT = some.text(CHARACTERS, min_size=1, max_size=12)
ODD = some.sampled_from(
    [
        "nan",
        "NA",
        "007",
        "1e3",
        "1_000",
        "True",
        "false",
        "[x]",
        '"',
        "a,b",
        "'",
        ";",
        "=1",
        "-1",
        "\ufeff",
        "1.0",
        "null",
        "#",
    ]
)
CELL = TEXT | ODD
NAME = CELL.filter(lambda name: name.strip() != "")
ROWS = some.lists(some.tuples(CELL, NAME), min_size=2, max_size=8)

Rows = list[dict[str, str]]


def as_csv(rows: Rows, **options: Any) -> str:
    text = io.StringIO()
    writer = csv.writer(text, **options)
    writer.writerow(rows[0])
    writer.writerows(row.values() for row in rows)
    return text.getvalue()


def as_parquet(rows: Rows) -> bytes:
    import pyarrow
    from pyarrow import parquet

    file = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


LAYOUTS: dict[str, Callable[[Rows], str | bytes]] = {
    "a.csv": as_csv,
    "b.csv": lambda rows: as_csv(rows, delimiter=";", quoting=csv.QUOTE_ALL),
    "c.CSV": lambda rows: as_csv(rows, lineterminator="\n", quoting=csv.QUOTE_ALL).encode("utf-16"),
    "d.jsonl": lambda rows: "".join(json.dumps(row) + "\n" for row in rows),
    "e.jsonl": lambda rows: "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows),
    "f.json": lambda rows: json.dumps(rows, indent=2),
    "g.json": lambda rows: json.dumps({name: [row[name] for row in rows] for name in rows[0]}),
    "h.json": lambda rows: json.dumps({"data": rows}),
    "i.json": lambda rows: json.dumps({name: {str(n): row[name] for n, row in enumerate(rows)} for name in rows[0]}),
    "j.parquet": as_parquet,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@given(rows=ROWS)
def test_every_layout_gives_back_every_text(layout: str, rows: list[tuple[str, str]]) -> None:
    table = [{"text": text, "label": name} for text, name in rows]
    content = LAYOUTS[layout](table)
    file = io.BytesIO(content if isinstance(content, bytes) else content.encode())
    read = [row.cells for row in rows_of(file, Path(layout).suffix.lower(), layout)]
    assert read == table


@given(rows=ROWS, seed=some.randoms())
def test_labels_are_the_texts_in_an_order_of_their_own(rows: list[tuple[str, str]], seed: Any) -> None:
    """Unless all are real numbers, lists, or whole numbers with a point."""
    names = sorted({name for _, name in rows} | {"some", "other"})
    table = [{"text": "a", "label": name} for name in [*names, *names[:1]]]
    task, (split,) = own(str(write_rows(Path("t.jsonl"), table)))
    assert [task.labels[number] for number in split.labels or []] == [row["label"] for row in table]
    seed.shuffle(table)
    assert own(str(write_rows(Path("t.jsonl"), table)))[0].labels == task.labels
    again = load_splits(DataSource(train_file="t.jsonl"), ["train"], task).splits["train"]
    assert [task.labels[number] for number in again.labels or []] == [row["label"] for row in table]


@given(names=some.lists(CELL, max_size=5), separator=some.sampled_from([",", ";", "|", " | "]))
def test_names_in_a_cell_come_back(names: list[str], separator: str) -> None:
    assert split_names(join_names(names, separator), separator) == names


@given(text=some.text(max_size=30), separator=some.sampled_from([",", ";", "||"]))
def test_any_cell_is_some_names(text: str, separator: str) -> None:
    for name in split_names(text, separator):
        assert name.strip() == name or '"' in text


@given(values=some.lists(CELL | some.integers() | some.booleans(), max_size=5))
def test_lists_written_by_python_and_by_json_come_back(values: list[Any]) -> None:
    assert list_in(json.dumps(values)) == values
    assert list_in(str(values)) == values or any(isinstance(value, str) for value in values)


@given(text=some.text(CHARACTERS, max_size=30))
def test_any_text_is_a_list_or_none(text: str) -> None:
    assert list_in(f"[{text}]") is None or isinstance(list_in(f"[{text}]"), list)


@given(value=TEXT | ODD)
def test_no_cell_written_is_a_formula(value: str) -> None:
    file = io.StringIO()
    RecordWriter(file, "csv").write([{"prediction": value, "scores": {value: 0.5}}])
    for cell in (cell for row in csv.reader(io.StringIO(file.getvalue(), newline="")) for cell in row):
        assert (
            not cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n"))
            or cell.lstrip("+-").replace(".", "", 1).isdecimal()
        )
    assert for_spreadsheets(value) in (value, f"'{value}")


def refusal(kind: str, content: bytes) -> str:
    """What reading says, if it refuses to."""
    try:
        list(rows_of(io.BytesIO(content), kind, "here"))
    except DataError as error:
        return str(error)
    return "here"


KINDS = (".csv", ".tsv", ".jsonl", ".json", ".conll", ".txt", ".parquet")


@pytest.mark.parametrize(
    "content", [b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"a", b'"', b"{", b"[[", b"\r", b"\n\n", b"PAR1"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_odd_beginnings_are_rows_or_one_line(kind: str, content: bytes) -> None:
    said = refusal(kind, content)
    assert said.startswith("here")
    assert "\n" not in said


@given(content=some.binary(max_size=60), kind=some.sampled_from(KINDS[:-1]))
def test_any_bytes_are_rows_or_one_line(kind: str, content: bytes) -> None:
    said = refusal(kind, content)
    assert said.startswith("here")
    assert "\n" not in said
