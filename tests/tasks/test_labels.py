"""Labels stay what they are: text as it is written, numbers where all are, lists, vectors of 0 and 1."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import pytest
from conftest import write_rows
from helpers import own, problem, write, write_as

from craft_cli.data.sources import DataSource
from craft_cli.tasks.splits import load_splits

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"


def labelled(cells: list[Any], suffix: str = ".csv") -> str:
    return str(write_as(suffix, [{"text": f"text {row}", "label": cell} for row, cell in enumerate(cells)]))


def names(path: str, **settings: Any) -> list[Any]:
    """The labels of every row by name."""
    task, (split,) = own(path, **settings)
    if task.problem_type == MULTI:
        return [[name for name, one in zip(task.labels, row, strict=True) if one] for row in split.labels or []]
    return [task.labels[number] for number in split.labels or []]


@pytest.mark.parametrize(
    "cells",
    [
        ["007", "7", "08", "8"],
        ["9007199254740993", "9007199254740992", "12345678901234567890"],
        ["1e3", "1000", "2e5", "12"],
        ["1_000", "1000", "5"],
        ["1.0", "1", "2.0"],
        ["1.10", "1.1", "1.2"],
        ["1e10", "10000000000", "ab12"],
        ["nan", "NA", "None", "null", "x"],
        ["us", "US", "Us"],
        [" a", "a", "a "],
        ["-0", "0", "+0"],
        ["true", "True", "x"],
        ["=1+1", "@x", "-1"],
        ["\u0661", "1", "2"],
    ],
    ids=lambda cells: cells[0],
)
@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_text_is_kept_as_it_is_written(cells: list[str], suffix: str) -> None:
    path = labelled(cells, suffix)
    assert own(path)[0].problem_type == SINGLE
    assert names(path) == cells


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_large_whole_numbers_keep_their_digits(suffix: str) -> None:
    cells = [9007199254740993, 9007199254740992, 5]
    assert names(labelled(cells, suffix)) == list(map(str, cells))
    assert own(labelled(cells, suffix))[0].labels == ("5", "9007199254740992", "9007199254740993")


@pytest.mark.parametrize(
    "cells", [["3", "2.5", "4"], ["0.50", "1.25", "3.00"], ["1e-05", "2.5", "3"], ["-1.5", "+2", ".5"]]
)
def test_real_numbers_in_any_notation_are_a_regression(cells: list[str]) -> None:
    task, (split,) = own(labelled(cells))
    assert task.problem_type == REGRESSION
    assert split.labels == list(map(float, cells))


def test_whole_numbers_that_pandas_wrote_with_a_point_are_the_whole_numbers() -> None:
    path = labelled(["1.0", "0.0", "1.0"])
    assert names(path) == ["1", "0", "1"]
    known = own(labelled([1, 0, 1], ".jsonl"))[0]
    again = load_splits(DataSource(train_file=labelled(["1.0", "0.0"])), ["train"], known)
    assert again.splits["train"].labels == [1, 0]


@pytest.mark.parametrize(
    ("trained", "other"), [([True, False, True], ["true", "false"]), (["true", "false", "true"], ["True", "False"])]
)
def test_true_is_true_in_json_and_in_csv(trained: list[Any], other: list[str]) -> None:
    known = own(labelled(trained, ".jsonl"))[0]
    again = load_splits(DataSource(train_file=labelled(other)), ["train"], known)
    assert [known.labels[number].lower() for number in again.splits["train"].labels or []] == ["true", "false"]


def test_another_case_is_another_label() -> None:
    train, other = labelled(["US", "uk", "US", "uk"]), write("v.csv", "text,label\na,us\n")
    assert problem(own, train, other) == "v.csv, line 2: label 'us' is not a label of the training (US, uk)"


def test_the_order_of_labels_is_total() -> None:
    """So that neither the order of a set, which differs between processes, nor that of the rows decides it."""
    cells = ["0", "10", "2", "nan", "NaN", "inf", "unknown", "007", "1e3", "-1", "2.5", "1_0", "-0", "+0", "\u0662"]
    draw = random.Random(1)
    found = set()
    for _ in range(5):
        draw.shuffle(cells)
        found.add(own(labelled(cells * 2))[0].labels)
    (order,) = found
    assert order == ("-1", "0", "2", "10", *sorted(set(cells) - {"-1", "0", "2", "10"}))


# -- several labels -------------------------------------------------------------------------------------------------------


def test_vectors_of_zero_and_one_are_labels_by_position() -> None:
    vectors = [[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
    for path in (
        labelled(vectors, ".jsonl"),
        labelled(vectors, ".parquet"),
        labelled(vectors),
        labelled([[True, False], [False, True]], ".jsonl"),
    ):
        task, (split,) = own(path)
        assert task.problem_type == MULTI
        assert task.labels == tuple(f"LABEL_{number}" for number in range(len((split.labels or [])[0])))
    known, (split,) = own(labelled(vectors, ".jsonl"))
    assert split.labels == vectors
    again = load_splits(DataSource(train_file=labelled([[0, 0, 1]], ".jsonl")), ["train"], known)
    assert again.splits["train"].labels == [[0.0, 0.0, 1.0]]
    lengths = labelled([[1, 0, 0], [0, 1]], ".jsonl")
    assert "vectors of 0 and 1 of different lengths (2 to 3)" in problem(own, lengths)


def test_lists_of_numbers_of_labels_are_still_lists() -> None:
    assert names(labelled([[0], [1], [0, 1]], ".jsonl")) == [["0"], ["1"], ["0", "1"]]
    assert names(labelled([[0, 2], [1, 2]], ".jsonl")) == [["0", "2"], ["1", "2"]]


def test_lists_that_pandas_and_json_wrote_into_a_csv() -> None:
    lists = [["neg"], ["pos", "it's, long"], []]
    for write_list in (str, json.dumps):
        path = labelled([write_list(cell) for cell in lists])
        for settings in ({}, {"problem_type": MULTI}):
            assert names(path, **settings) == [["neg"], ["it's, long", "pos"], []]
    known = own(path)[0]
    again = load_splits(DataSource(train_file=labelled([str(["pos"]), ""])), ["train"], known)
    assert [sum(row) for row in again.splits["train"].labels or []] == [1, 0]


def test_a_list_beside_names_is_a_list_when_labels_are_found_too() -> None:
    path = labelled(["a", "['a', 'b']", "b, c"])
    assert names(path, problem_type=MULTI) == [["a"], ["a", "b"], ["b", "c"]]
    assert own(path, problem_type=MULTI)[0].labels == ("a", "b", "c")


def test_cells_that_are_all_empty_hold_no_label() -> None:
    assert "column 'label' has no label; choose" in problem(own, labelled([[], []], ".jsonl"))


def test_half_a_character_is_refused_where_several_labels_apply_too() -> None:
    Path("t.jsonl").write_text('{"text": "x", "label": "a, \\ud800"}\n{"text": "y", "label": "b"}\n')
    assert "t.jsonl, line 1: column 'label' contains an invalid character" in problem(
        own, "t.jsonl", problem_type=MULTI
    )


@pytest.mark.parametrize("cell", ["['neg' 'pos']", "[0. 1. 0.]", "[neg, pos]"])
def test_lists_that_nothing_can_read_are_refused(cell: str) -> None:
    assert f"looks like lists written as text, but {cell} cannot be parsed: write them as JSON" in problem(
        own, labelled([cell] * 3)
    )


@pytest.mark.parametrize("cells", [["[/pos]", "[neg]"], ["[PAD]", "[very good]", "[PAD]"]])
def test_names_in_brackets_are_names(cells: list[str]) -> None:
    task, _ = own(labelled(cells))
    assert (task.problem_type, task.labels) == (SINGLE, tuple(sorted(set(cells))))


def test_a_name_in_brackets_among_others_is_a_name() -> None:
    assert names(labelled(["[spam]", "ham", "[spam]"])) == ["[spam]", "ham", "[spam]"]


def test_names_with_commas_are_quoted_in_their_cell() -> None:
    path = labelled(['"a, b",c', "c", '"a, b"', 'say ""x""', ""])
    assert names(path, problem_type=MULTI) == [["a, b", "c"], ["c"], ["a, b"], ['say ""x""'], []]
    assert names(labelled(["a;b", '"a;b";c']), label_separator=";") == [["a", "b"], ["a;b", "c"]]


@pytest.mark.parametrize("cell", [[None, "a"], [["a"], "b"], [{"a": 1}]])
def test_lists_with_anything_but_labels_are_refused(cell: list[Any]) -> None:
    path = str(write_rows(Path("t.jsonl"), [{"text": "a", "label": ["x", "y"]}, {"text": "b", "label": cell}]))
    assert problem(own, path).startswith("t.jsonl, line 2: column 'label' has ")


# -- numbers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cell", "told"),
    [
        ("1" + "0" * 400, "has inf, which float32 cannot represent"),
        ("1e300", "has 1e+300, which float32 cannot represent"),
        ("Infinity", "has inf, which float32 cannot represent"),
        ("NaN", "has nothing, not a number"),
        ('"1_000"', "has '1_000', not a number"),
        ("true", "has 'True', not a number"),
        ("[1.5]", "has '[1.5]', not a number"),
    ],
)
def test_a_number_that_is_none_or_too_large_is_refused_by_its_line(cell: str, told: str) -> None:
    path = write("t.jsonl", '{"text": "a", "score": 0.5}\n' + f'{{"text": "b", "score": {cell}}}\n')
    message = problem(own, path, problem_type=REGRESSION)
    assert message.startswith("t.jsonl, line 2: column 'score' ")
    assert told in message
    validation = problem(own, write("u.jsonl", '{"text": "a", "score": 0.5}\n' * 2), path, problem_type=REGRESSION)
    assert validation == message


def test_an_infinite_label_is_refused() -> None:
    path = write("t.jsonl", '{"text": "a", "label": "x"}\n{"text": "b", "label": Infinity}\n')
    assert problem(own, path) == "t.jsonl, line 2: column 'label' has inf, not a label"


def test_words_and_tags_in_a_csv_of_lists() -> None:
    rows = [(["it's", "good, here"], ["O", "B-x"]), (["bad"], ["O"])]
    with open("t.csv", "w", newline="") as file:
        csv.writer(file).writerows([["tokens", "tags"], *[[str(words), json.dumps(tags)] for words, tags in rows]])
    loaded = load_splits(DataSource(train_file="t.csv"), ["train"])
    assert loaded.task.kind == "token-classification"
    assert loaded.splits["train"].texts == [tuple(words) for words, _ in rows]
    assert loaded.splits["train"].labels == [[0, 1], [0]]
