"""Files to rows, rows to token ids, tasks, labels and metrics."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import own, problem, write, write_as

from craft_cli.data.sources import DataSource
from craft_cli.data.tables import read_file
from craft_cli.tasks.sequence_classification import SequenceClassification
from craft_cli.tasks.splits import load_splits

ROWS = [
    {"text": "NA", "label": "good"},
    {"text": 'said "no", twice', "label": "bad"},
    {"text": 'a lone " quote', "label": "good"},
    {"text": "caf\u00e9, null, 1e5", "label": "bad"},
    {"text": "007", "label": "good"},
]


# -- reading ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json", ".parquet"])
def test_every_kind_of_file_gives_the_same_rows(suffix: str) -> None:
    path = str(write_as(suffix, ROWS))
    task, (split,) = own(path)
    assert split.texts == [(row["text"],) for row in ROWS]
    assert task.labels == ("bad", "good")
    assert [task.labels[label] for label in split.labels or []] == [row["label"] for row in ROWS]
    assert (split.origin, len(split)) == (path, 5)
    assert (task.text_columns, task.label_column) == (("text",), "label")


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_a_column_of_digits_is_still_text(suffix: str) -> None:
    _, (split,) = own(str(write_as(suffix, [{"text": "007", "label": 0}, {"text": "1.50", "label": 1}])))
    assert split.texts == [("007",), ("1.50",)]


def test_csv_with_quotes_commas_newlines_and_words_that_pandas_takes_for_missing() -> None:
    path = write("t.csv", 'text,label\r\nNA,0\r\n"a, ""b""",1\r\n"two\nlines",0\r\nnull,1\r\nnan,0\r\n')
    _, (split,) = own(path)
    assert split.texts == [("NA",), ('a, "b"',), ("two\nlines",), ("null",), ("nan",)]
    assert split.labels == [0, 1, 0, 1, 0]


def test_a_lone_quote_in_tsv_swallows_nothing() -> None:
    _, (split,) = own(write("t.tsv", 'text\tlabel\n"a lone\t0\nb" c\t1\n"d"\t0\n'))
    assert split.texts == [('"a lone',), ('b" c',), ('"d"',)]


def test_a_byte_order_mark_is_no_part_of_a_name() -> None:
    assert read_file(Path(write("t.csv", "\ufefftext,label\na,0\n"))).columns == ["text", "label"]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json", ".parquet"])
def test_a_missing_or_empty_file_is_named(suffix: str) -> None:
    assert problem(read_file, Path(f"no{suffix}")) == f"no{suffix}: no such file"
    assert problem(read_file, Path(write(f"t{suffix}", ""))) == f"t{suffix} is empty"


@pytest.mark.parametrize(("name", "content"), [("t.csv", "text,label\n"), ("t.jsonl", "\n\n"), ("t.json", "[]")])
def test_a_file_without_rows_says_so(name: str, content: str) -> None:
    assert problem(read_file, Path(write(name, content))) == f"{name} has no rows"


def test_an_unknown_kind_of_file_lists_the_known_ones() -> None:
    message = problem(read_file, Path(write("t.txt", "text\n")))
    assert message.startswith("t.txt: unknown file format")
    assert all(suffix in message for suffix in (".jsonl", ".json", ".csv", ".tsv", ".parquet"))


GOOD = '{"text": "a", "label": 0}\n'


@pytest.mark.parametrize(
    ("name", "content", "line", "told"),
    [
        ("t.jsonl", GOOD + "\n" + '{"text": "b",\n' + GOOD, 3, "not JSON"),
        ("t.jsonl", GOOD + GOOD + "text", 3, "not JSON"),
        ("t.jsonl", GOOD + "[1, 2]\n" + GOOD, 2, "expected one JSON object"),
        ("t.jsonl", GOOD + '"a"\n', 2, "expected one JSON object"),
        ("t.csv", "text,label\na,0\nb,1,2\nc,1\n", 3, ""),
        ("t.csv", 'text,label\n"a\nb",0\nb,1,2\nc,1\n', 4, ""),
        ("t.tsv", "text\tlabel\na\t0\nb\t1\t2\n", 3, ""),
    ],
    ids=["cut", "no-json", "list", "string", "csv-fields", "csv-fields-after-newline", "tsv-fields"],
)
def test_an_unreadable_row_is_told_with_file_and_line(name: str, content: str, line: int, told: str) -> None:
    message = problem(read_file, Path(write(name, content)))
    assert name in message
    assert f"line {line}" in message
    assert told in message


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.csv", "text,label\ncaf\u00e9,0\n"),
        ("t.tsv", "text\tlabel\ncaf\u00e9\t0\n"),
        ("t.jsonl", '{"text": "a", "label": 0}\n{"text": "caf\u00e9", "label": 1}\n'),
    ],
)
def test_another_encoding_is_told_with_its_line_and_the_way_out(name: str, content: str) -> None:
    message = problem(read_file, Path(write(name, content.encode("latin-1"))))
    told = f"{name}, line 2: not UTF-8; convert the file (of Windows: iconv -f cp1252 -t utf-8 {name} > NEW)"
    assert message == told


def test_a_damaged_parquet_file_is_named() -> None:
    path = write_as(".parquet", ROWS)
    path.write_bytes(path.read_bytes()[:-20])
    assert problem(read_file, path).startswith("rows.parquet: ")


# -- columns ------------------------------------------------------------------------------------------------------------


def test_a_missing_column_lists_those_there_and_the_flag() -> None:
    path = write("t.csv", "text,mark\na,0\nb,1\n")
    assert problem(own, path) == "t.csv has no column 'label'; it has text, mark (choose with --label-column)"
    assert "no column 'x'; it has text, mark (choose with --text-columns)" in problem(own, path, text_columns=("x",))
    several = write(
        "several.csv", '"text, whole",label,' + ",".join(f"c{n}" for n in range(99)) + "\na,0" + 99 * ",1" + "\n"
    )
    told = problem(own, several, text_columns=("text",))
    assert 'it has "text, whole", label, c0' in told  # as the flag takes it
    assert "c17 and 81 more (choose with --text-columns)" in told
    _, (split,) = own(path, label_column="mark")
    assert split.labels == [0, 1]


def test_a_label_is_not_read_as_the_text() -> None:
    """It would be learned, and every metric would be perfect."""
    path = write("t.csv", "text,label\na,0\nb,1\n")
    for settings in ({"text_columns": ("label",)}, {"text_columns": ("text", "Text")}, {"label_column": "TEXT"}):
        assert "is used twice; choose different columns with --text-columns and --label-column" in problem(
            own, path, **settings
        )
    tags = write("t.jsonl", '{"tokens": ["O"], "tags": ["O"]}\n')
    named = {"task_type": "token-classification", "text_columns": ("tags",)}
    assert "column 'tags' is used twice" in problem(own, tags, **named)


def test_columns_are_found_by_their_usual_names_or_asked_for() -> None:
    pair = write("p.csv", "premise,hypothesis,label\na,b,0\nc,d,1\n")
    assert own(pair)[1][0].texts == [("a", "b"), ("c", "d")]
    other = write("o.csv", "title,body,label\na,b,0\nc,d,1\n")
    message = problem(own, other)
    assert "title, body, label" in message
    assert "--text-columns" in message
    assert own(other, text_columns=("body", "title"))[1][0].texts == [("b", "a"), ("d", "c")]


def test_the_files_of_a_folder_are_found_by_their_split(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    source = DataSource(data_dir=str(folder))
    assert "expected one of train.jsonl" in problem(load_splits, source, ["train"])
    write("data/train.csv", "text,label\na,0\nb,1\n")
    assert len(load_splits(source, ["train"]).splits["train"]) == 2
    assert "validation" in problem(load_splits, DataSource(data_dir="data", task="opinions"), ["train", "validation"])
    write("data/train.tsv", "text\tlabel\na\t0\nb\t1\n")
    assert "train.csv and train.tsv" in problem(load_splits, source, ["train"])
    assert "no-folder: no such folder" in problem(load_splits, DataSource(data_dir="no-folder"), ["train"])


# -- texts and labels ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "column"), [({"label": 1}, "text"), ({"text": None, "label": 1}, "text"), ({"text": "b"}, "label"), ({"text": "b", "label": ""}, "label")]
)  # fmt: skip
def test_a_row_without_text_or_label_is_told_with_file_and_line(row: dict[str, Any], column: str) -> None:
    label = "x" if row.get("label") == "" else 0
    content = json.dumps({"text": "a", "label": label}) + "\n\n" + json.dumps(row) + "\n"
    message = problem(own, write("t.jsonl", content))
    assert message.startswith("t.jsonl, line 3: ")
    assert f"'{column}' has no {column}" in message


def test_a_csv_row_without_label_is_told_with_its_line() -> None:
    assert problem(own, write("t.csv", 'text,label\n"a\nb",x\n\nc,y\nd,\n')).startswith(
        "t.csv, line 6: column 'label' has no"
    )
    assert problem(own, write("t.csv", "text,label\na,x\nb\nc,y\n")) == (
        "t.csv, line 3: 1 fields, but the header names 2"
    )


@pytest.mark.parametrize("row", [{"sentence": "b"}, {"sentence": "b", "label": 2}, {"sentence": "b", "label": "fine"}])
def test_a_known_task_refuses_a_row_without_one_of_its_labels(row: dict[str, Any]) -> None:
    path = write("t.jsonl", '{"sentence": "a", "label": 0}\n' + json.dumps(row) + "\n")
    message = problem(own, path, task="sst2")
    assert message.startswith("t.jsonl, line 2: ")
    assert "label" in message


def test_a_label_seen_in_validation_only_is_told_with_its_line() -> None:
    train = write("t.jsonl", '{"text": "a", "label": "x"}\n{"text": "b", "label": "y"}\n')
    validation = write("v.jsonl", '{"text": "a", "label": "x"}\n\n{"text": "b", "label": "z"}\n')
    assert problem(own, train, validation) == "v.jsonl, line 3: label 'z' is not a label of the training (x, y)"


def test_one_label_is_not_enough() -> None:
    assert "one label only (x)" in problem(own, write("t.csv", "text,label\na,x\nb,x\n"))


@pytest.mark.parametrize(
    ("suffix", "labels", "names"),
    [
        (".jsonl", [10, 2, 1], ("1", "2", "10")),
        (".csv", [10, 2, 1], ("1", "2", "10")),
        (".csv", [1.0, 0.0, 1.0], ("0", "1")),
        (".jsonl", ["yes", "no", "NA"], ("NA", "no", "yes")),
        (".csv", ["yes", "no", "NA"], ("NA", "no", "yes")),
        (".jsonl", [True, False, True], ("False", "True")),
        (".csv", [True, False, True], ("False", "True")),
        (".parquet", [True, False, True], ("False", "True")),
        (".jsonl", [0, "x", 0], ("0", "x")),
    ],
)
def test_labels_are_numbers_names_or_yes_and_no(suffix: str, labels: list[Any], names: tuple[str, ...]) -> None:
    path = str(write_as(suffix, [{"text": f"t{row}", "label": label} for row, label in enumerate(labels)]))
    task, (split,) = own(path)
    assert task.labels == names
    expected = [str(int(label)) if isinstance(label, float) else str(label) for label in labels]
    assert [task.labels[number] for number in split.labels or []] == expected


def test_nan_among_numbers_is_a_name_at_the_end() -> None:
    """Whatever order the names of a set come in, which differs between processes."""
    path = str(write_as(".csv", [{"text": "a", "label": name} for name in ("2", "nan", "10", "NaN", "x", "0", "inf")]))
    assert own(path)[0].labels == ("0", "2", "10", "NaN", "inf", "nan", "x")


def test_known_labels_keep_their_order() -> None:
    path = write("t.csv", "text,label\na,x\nb,y\n")
    known = replace(SequenceClassification.own(), labels=("y", "z", "x"), problem_type="single_label_classification")
    loaded = load_splits(DataSource(train_file=path), ["train"], known)
    assert (loaded.task.labels, loaded.splits["train"].labels) == (("y", "z", "x"), [2, 0])


# -- odd files ----------------------------------------------------------------------------------------------------------


def test_a_row_longer_than_csv_usually_allows() -> None:
    _, (split,) = own(write("t.csv", f"text,label\n{'x' * 300_000},0\nb,1\n"))
    assert len(split.texts[0][0]) == 300_000


def test_control_characters_emoji_and_windows_line_ends() -> None:
    texts = ["a\x07b", "\U0001f600", "tab\\t", ""]
    _, (split,) = own(
        write("t.jsonl", "".join(json.dumps({"text": t, "label": i % 2}) + "\r\n" for i, t in enumerate(texts)))
    )
    assert split.texts == [(text,) for text in texts]
    _, (split,) = own(write("t.tsv", "text\tlabel\r\na\x1cb\x85c\u2028d\t0\r\nb\t1\r\n"))
    assert split.texts == [("a\x1cb\x85c\u2028d",), ("b",)]


def test_a_quote_that_is_never_closed_is_told_with_the_line_it_opens_on() -> None:
    assert problem(own, write("t.csv", 'text,label\na,0\n"b,1\nc,0\n')) == (
        "t.csv, line 3: a quote is opened and never closed"
    )


def test_a_header_that_names_a_column_twice() -> None:
    assert "line 1: the header names a column twice" in problem(own, write("t.csv", "text,text,label\na,b,0\n"))
