"""What looks wrong in the user's own rows: refused, or pointed out before training in a line with a number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import own, problem, write, write_as

from craft_cli.data.sources import DataSource
from craft_cli.tasks.splits import load_splits

# -- refused ------------------------------------------------------------------------------------------------------------


def numbered(labels: list[Any], suffix: str = ".csv") -> str:
    return str(write_as(suffix, [{"text": f"text {row}", "label": label} for row, label in enumerate(labels)]))


ALL_DIFFERENT = (
    "rows.csv: column 'label' has 12 labels, each in one row only, like an id or a text: "
    "choose another with --label-column"
)


def test_a_column_of_ids_is_refused_with_the_flag() -> None:
    assert problem(own, numbered([f"TCK-{row}" for row in range(12)])) == ALL_DIFFERENT


def test_a_column_of_different_whole_numbers_may_be_amounts() -> None:
    path = numbered([7 * row for row in range(12)])
    assert problem(own, path) == f"{ALL_DIFFERENT}, or --problem-type regression for amounts"
    assert own(path, problem_type="regression")[0].problem_type == "regression"


def test_several_labels_that_never_repeat_are_refused_too() -> None:
    message = problem(own, numbered([[f"a{row}", f"b{row}"] for row in range(6)], ".jsonl"))
    assert message.startswith("rows.jsonl: column 'label' has 12 labels, each in one row only")


def test_an_example_of_each_of_a_few_labels_and_one_label_twice_are_not_refused() -> None:
    assert len(own(numbered([f"label {row}" for row in range(9)]))[0].labels) == 9
    assert len(own(numbered([f"label {max(row, 1)}" for row in range(12)]))[0].labels) == 11


def test_labels_of_a_known_task_or_of_a_model_are_not_judged() -> None:
    known = own(numbered([f"label {row % 12}" for row in range(24)]))[0]
    once = DataSource(train_file=numbered([f"label {row}" for row in range(12)]))
    assert len(load_splits(once, ["train"], known).splits["train"]) == 12


def test_a_label_among_thousands_is_told_in_a_short_line() -> None:
    train = numbered([f"label {row % 1000:03}" for row in range(2000)])
    validation = write("v.csv", "text,label\na,other\n")
    message = problem(own, train, validation)
    assert message.startswith("v.csv, line 2: label 'other' is not a label of the training (label 000, label 001,")
    assert message.endswith("label 019 and 980 more)")


# -- pointed out --------------------------------------------------------------------------------------------------------

Rows = list[tuple[Any, Any]]


def save(name: str, rows: Rows) -> str:
    return write(name, "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows))


def noticed(train: Rows, validation: Rows, **settings: Any) -> list[str]:
    source = DataSource(
        train_file=save("train.jsonl", train), validation_file=save("validation.jsonl", validation), **settings
    )
    loaded = load_splits(source, ["train", "validation"])
    assert not loaded.notes
    return loaded.task.notes(loaded.splits)


def of(labels: list[Any], what: str = "text") -> Rows:
    return [(f"{what} {row}", label) for row, label in enumerate(labels)]


def test_nothing_is_said_of_clean_rows() -> None:
    assert noticed(of(["a", "b", "c"] * 20), of(["a", "b", "c"], "other")) == []
    assert noticed(of([["a"], ["b", "c"], []] * 20), of([["a", "b"], ["c"]], "other")) == []
    assert noticed(of([0.5, 1.0, 2.0]), of([0.1], "other")) == []  # of a regression there are no labels to look at


def test_more_labels_than_a_tenth_of_the_rows() -> None:
    names = [f"label {number}" for number in range(5)]
    assert noticed(of(names * 10), of(names, "other")) == []
    few = of((names * 10)[:49])
    assert noticed(few, of(names, "other")) == ["5 labels for 49 rows: is 'label' the right column? (--label-column)"]
    assert noticed(of([1, 2, 1, 2]), of([1, 2], "other")) == []  # two are never too many
    (note,) = noticed(of([1, 2, -3] * 4), of([1, 2, -3], "other"))
    assert note.endswith("'label' the right column? (--label-column; for amounts --problem-type regression)")
    (note,) = noticed(of([["1", "2"], ["3", "2"], ["3", "1"]] * 3), of([["1", "2", "3"]], "other"))
    assert note == "3 labels for 9 rows: is 'label' the right column? (--label-column)"


def test_labels_that_differ_in_case_or_white_space_only() -> None:
    labels = ["Billing"] * 30 + ["billing "] * 20 + ["other"] * 10
    assert noticed(of(labels), of(["Billing", "billing ", "other"], "other")) == [
        "labels that differ only in case or whitespace count as different labels: 31 x 'Billing', 21 x 'billing '"
    ]
    many = [
        f"{blank}Label {number}" for number in range(5) for blank in ("", "\t", "\u00a0") for _ in range(5 + number)
    ]
    (note,) = noticed(of(many * 2), of(many, "other"))
    assert ": 27 x '" in note  # the most frequent ones first
    assert note.endswith(r"; 21 x '\tLabel 2', 21 x 'Label 2', 21 x '\xa0Label 2'; and 2 more")
    assert note.count(" x ") == 9
    several = of([["us", "x"], ["US"], ["x"]] * 20)
    assert "21 x 'US', 20 x 'us'" in noticed(several, of([["US", "x"], ["x"]], "other"))[0]


def test_such_labels_are_named_shortly_with_the_blanks_at_their_end() -> None:
    long = "a label that somebody wrote for a whole sentence"
    (note,) = noticed(of([long, f"{long} "] * 2), of([long, f"{long} "], "other"))
    assert note.endswith("3 x 'a label that some...r a whole sentence', 3 x 'a label that some... a whole sentence '")


def test_labels_without_enough_rows_to_learn_or_to_measure() -> None:
    labels = ["a"] * 30 + ["b"] * 30 + ["c", "d"]
    assert noticed(of(labels), of(["a", "c"], "other")) == [
        "labels with fewer than 2 training rows: 2 of 4 ('c', 'd'), with no validation row: 2 of 4 ('b', 'd')"
    ]
    names = [f"label {number}" for number in range(6)]
    (note,) = noticed(of(names * 10), of(["label 5"], "other"))
    assert note == "labels with no validation row: 5 of 6 ('label 0', 'label 1', 'label 2' and 2 more)"
    (note,) = noticed(of([["a"], ["a", "b"], *[["c"], ["a"]] * 20]), of([["b"], ["c"], ["a"]], "other"))
    assert note == "labels with fewer than 2 training rows: 1 of 3 ('b')"


def test_texts_that_are_empty_are_counted_with_the_place_of_the_first() -> None:
    """Of a pair both are. They are not counted as repeating each other."""
    rows = [("", 0), *of([0, 1] * 10), (" \t", 1), ("", 1)]
    assert noticed(rows, [*of([0, 1], "other"), ("\n", 0), ("", 1)]) == [
        "5 rows without text; the first is train.jsonl, line 1",
    ]
    assert noticed(of([0, 1] * 10), [*of([0, 1], "other"), ("\n", 0)]) == [
        "1 row without text; the first is validation.jsonl, line 3"
    ]


def test_the_place_of_a_row_that_was_held_out_or_left_is_that_in_the_file() -> None:
    rows = of([0, 1] * 50)
    rows[60] = ("", 0)
    loaded = load_splits(DataSource(train_file=save("t.jsonl", rows), validation_share=0.5), ["train", "validation"])
    assert loaded.task.notes(loaded.splits) == ["1 row without text; the first is t.jsonl, line 61"]
    for split in loaded.splits.values():
        for row, (text,) in enumerate(split.texts):
            assert split.place_of(row) == f"t.jsonl, line {[text for text, _ in rows].index(text) + 1}"
    few = loaded.splits["train"].first(3)
    assert few.place_of(2) == loaded.splits["train"].place_of(2)


def test_texts_that_repeat_with_the_same_and_with_another_label() -> None:
    rows = of([0, 1] * 10)
    assert noticed([*rows, rows[0], rows[0]], of([0, 1], "other")) == [
        "2 of 22 rows of train.jsonl repeat an earlier text"
    ]
    (note,) = noticed([*rows, rows[0], (rows[0][0], 1), (rows[1][0], 0)], of([0, 1], "other"))
    assert note == ("3 of 23 rows of train.jsonl repeat an earlier text, 2 with another label (the first is line 22)")


def test_rows_that_are_trained_and_evaluated_on() -> None:
    rows = of([0, 1] * 10)
    assert noticed(rows, [*of([0, 1], "other"), rows[3], (rows[4][0], 1)]) == [
        "2 of 4 validation rows have a text that is also in the training rows: the metrics will look too good"
    ]


def test_pairs_and_sentences_of_words_are_looked_at_too(tmp_path: Path) -> None:
    pairs = [{"sentence1": "a", "sentence2": f"b{row}", "label": row % 2} for row in range(20)]
    blank = [{"sentence1": "", "sentence2": text, "label": 0} for text in (" ", "no blank")]
    path = str(write_as(".jsonl", [*pairs, *blank, pairs[4]]))
    loaded = load_splits(DataSource(train_file=path, validation_file=path), ["train", "validation"])
    assert [note.split(";")[0].split(":")[0] for note in loaded.task.notes(loaded.splits)] == [
        "2 rows without text",
        "1 of 23 rows of rows.jsonl repeats an earlier text",
        "22 of 23 validation rows have a text that is also in the training rows",
    ]
    words = "Rome\tB-place\n.\tO\n\nRome\tO\n.\tO\n\n"
    source = DataSource(
        train_file=write("t.conll", words), validation_file=write("v.conll", words[: words.index("Rome\tO")])
    )
    loaded = load_splits(source, ["train", "validation"])
    assert loaded.task.notes(loaded.splits) == [
        "1 of 2 rows of t.conll repeats an earlier text, 1 with another label (the first is line 4)",
        "1 of 1 validation rows has a text that is also in the training rows: the metrics will look too good",
    ]


@pytest.mark.parametrize("share", [0.1, 0.4])
def test_no_more_than_six_notes_of_the_worst_rows(share: float) -> None:
    rows = of(["A", "a ", "b", "B", "only once", *(str(number) for number in range(9))] * 3)
    rows = [*rows[:-1], ("", "A"), *rows[:20], (rows[0][0], "b")]
    loaded = load_splits(DataSource(train_file=save("t.jsonl", rows), validation_share=share), ["train", "validation"])
    notes = loaded.task.notes(loaded.splits)
    assert 5 <= len(notes) <= 6
    assert all("\n" not in note and any(map(str.isdigit, note)) for note in notes)
