"""Files to rows, rows to token ids, tasks, labels and metrics."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from craft_cli.data import DataSource, Encoded, Split, collate, encode, load_splits, read_file
from craft_cli.errors import ConfigError, DataError
from craft_cli.tasks import TASKS, align_labels, compute_metrics, task_named

ROWS = [
    {"text": "NA", "label": "good"},
    {"text": 'said "no", twice', "label": "bad"},
    {"text": 'a lone " quote', "label": "good"},
    {"text": "caf\u00e9, null, 1e5", "label": "bad"},
    {"text": "007", "label": "good"},
]


def write(name: str, content: str | bytes) -> str:
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return name


def write_as(suffix: str, rows: list[dict[str, Any]]) -> Path:
    """Rows as a file of this kind, by another library than the one which reads them."""
    path = Path(f"rows{suffix}")
    if suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif suffix in (".jsonl", ".json"):
        lines = [json.dumps(row) for row in rows]
        path.write_text("\n".join(lines) + "\n" if suffix == ".jsonl" else f"[{','.join(lines)}]")
    elif suffix == ".tsv":
        lines = ["\t".join(map(str, row.values())) for row in [dict.fromkeys(rows[0]), *rows]]
        lines[0] = "\t".join(rows[0])
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    else:
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return path


def own(train: str, validation: str | None = None, **settings: Any) -> tuple[Any, list[Split]]:
    """The splits of files, as `craft train --train-file` reads them."""
    names = ["train", "validation"] if validation else ["train"]
    return load_splits(DataSource(train_file=train, validation_file=validation, **settings), names)


def problem(function: Callable[..., Any], *arguments: Any, **settings: Any) -> str:
    with pytest.raises(DataError) as raised:
        function(*arguments, **settings)
    message = str(raised.value)
    assert "\n" not in message
    return message


# -- reading ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json", ".parquet"])
def test_every_kind_of_file_gives_the_same_rows(suffix: str) -> None:
    path = str(write_as(suffix, ROWS))
    task, (split,) = own(path)
    assert split.texts == [(row["text"],) for row in ROWS]
    assert task.labels == ("bad", "good")
    assert [task.labels[label] for label in split.labels] == [row["label"] for row in ROWS]
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
    assert read_file(Path(write("t.csv", "\ufefftext,label\na,0\n"))).column_names == ["text", "label"]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json", ".parquet"])
def test_a_missing_or_empty_file_is_named(suffix: str) -> None:
    assert problem(read_file, Path(f"no{suffix}")) == f"no{suffix}: no such file"
    assert problem(read_file, Path(write(f"t{suffix}", ""))) == f"t{suffix} is empty"


@pytest.mark.parametrize(("name", "content"), [("t.csv", "text,label\n"), ("t.jsonl", "\n\n"), ("t.json", "[]")])
def test_a_file_without_rows_says_so(name: str, content: str) -> None:
    assert problem(read_file, Path(write(name, content))) == f"{name} holds no rows"


def test_an_unknown_kind_of_file_lists_the_known_ones() -> None:
    message = problem(read_file, Path(write("t.txt", "text\n")))
    assert message.startswith("t.txt: unknown kind of file")
    assert all(suffix in message for suffix in (".jsonl", ".json", ".csv", ".tsv", ".parquet"))


GOOD = '{"text": "a", "label": 0}\n'


@pytest.mark.parametrize(
    ("name", "content", "line", "told"),
    [
        ("t.jsonl", GOOD + "\n" + '{"text": "b",\n' + GOOD, 3, "not JSON"),
        ("t.jsonl", GOOD + GOOD + "text", 3, "not JSON"),
        ("t.jsonl", GOOD + "[1, 2]\n" + GOOD, 2, "expected a JSON object"),
        ("t.jsonl", GOOD + '"a"\n', 2, "expected a JSON object"),
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
    assert message == f"{name}, line 2: not UTF-8; convert the file with: iconv -f latin1 -t utf8 {name}"


def test_a_damaged_parquet_file_is_named() -> None:
    path = write_as(".parquet", ROWS)
    path.write_bytes(path.read_bytes()[:-20])
    assert problem(read_file, path).startswith("rows.parquet: ")


# -- columns ------------------------------------------------------------------------------------------------------------


def test_a_missing_column_lists_those_there_and_the_flag() -> None:
    path = write("t.csv", "text,mark\na,0\nb,1\n")
    assert problem(own, path) == "t.csv has no column 'label'; it has text, mark (choose with --label-column)"
    assert "no column 'x'; it has text, mark (choose with --text-columns)" in problem(own, path, text_columns=("x",))
    _, (split,) = own(path, label_column="mark")
    assert split.labels == [0, 1]


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
    assert len(load_splits(source, ["train"])[1][0]) == 2
    assert "validation" in problem(load_splits, source, ["train", "validation"])
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
    assert problem(own, write("t.csv", "text,label\na,x\nb\nc,y\n")).startswith("t.csv, line 3: column 'label' has no")


@pytest.mark.parametrize("row", [{"sentence": "b"}, {"sentence": "b", "label": 2}, {"sentence": "b", "label": "fine"}])
def test_a_known_task_refuses_a_row_without_one_of_its_labels(row: dict[str, Any]) -> None:
    path = write("t.jsonl", '{"sentence": "a", "label": 0}\n' + json.dumps(row) + "\n")
    message = problem(own, path, task="sst2")
    assert message.startswith("t.jsonl, line 2: ")
    assert "label" in message


def test_a_label_seen_in_validation_only_is_told_with_its_line() -> None:
    train = write("t.jsonl", '{"text": "a", "label": "x"}\n{"text": "b", "label": "y"}\n')
    validation = write("v.jsonl", '{"text": "a", "label": "x"}\n\n{"text": "b", "label": "z"}\n')
    assert problem(own, train, validation) == "v.jsonl, line 3: label 'z' is not among those trained on (x, y)"


def test_one_label_is_not_enough() -> None:
    assert "one label only (x)" in problem(own, write("t.csv", "text,label\na,x\nb,x\n"))


@pytest.mark.parametrize("values", ["0.5\nb,1", "inf\nb,1", "3.25\nb,4.75"])
def test_real_numbers_are_no_labels(values: str) -> None:
    message = problem(own, write("t.csv", f"text,label\na,{values}\n"))
    assert message.startswith("t.csv: column 'label' holds real numbers")


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
    assert [task.labels[number] for number in split.labels] == expected


def test_known_labels_keep_their_order() -> None:
    path = write("t.csv", "text,label\na,x\nb,y\n")
    task, (split,) = load_splits(DataSource(train_file=path), ["train"], labels=("y", "z", "x"))
    assert (task.labels, split.labels) == (("y", "z", "x"), [2, 0])


# -- tasks --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", [["negative", "positive"], [0, 1], [0.0, 1.0], ["0", "1"]])
def test_a_known_task_takes_numbers_and_names(labels: list[Any]) -> None:
    path = str(write_as(".jsonl", [{"sentence": "a", "label": label} for label in labels]))
    task, (split,) = own(path, task="sst2")
    assert (task.labels, split.labels) == (("negative", "positive"), [0, 1])
    assert (task.text_columns, task.metrics) == (("sentence",), ("accuracy",))


def test_a_pair_task_reads_both_texts() -> None:
    path = str(
        write_as(
            ".tsv", [{"sentence1": "a", "sentence2": "b", "label": 1}, {"sentence1": "c", "sentence2": "d", "label": 0}]
        )
    )
    task, (split,) = own(path, task="mrpc")
    assert split.texts == [("a", "b"), ("c", "d")]
    assert (split.labels, task.metrics) == ([1, 0], ("accuracy", "f1"))


def test_an_unknown_task_names_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match=r"--task: unknown task 'sst-2'; did you mean 'sst2'\?"):
        load_splits(DataSource(task="sst-2"), ["train"])


def test_the_sample_task_needs_no_files_and_is_balanced() -> None:
    task, splits = load_splits(DataSource(task="opinions"), ["train", "validation"])
    assert task == task_named("opinions") == TASKS["opinions"]
    assert all(0.4 < sum(split.labels) / len(split) < 0.6 for split in splits)
    assert not set(splits[0].texts) & set(splits[1].texts)


def test_labels_are_aligned_by_name_never_by_position() -> None:
    ours = ("negative", "positive")
    assert align_labels(ours, {0: "POSITIVE", 1: "NEGATIVE"}) == ("positive", "negative")
    assert align_labels(ours, {1: "negative", 0: "positive"}) == ("positive", "negative")
    mnli = ("entailment", "neutral", "contradiction")
    assert align_labels(mnli, {0: "contradiction", 1: "neutral", 2: "entailment"}) == mnli[::-1]
    assert align_labels(ours, {0: "LABEL_0", 1: "LABEL_1"}) == align_labels(ours, None) == ours
    for other in (
        {0: "yes", 1: "no"},
        {0: "negative", 1: "neutral", 2: "positive"},
        {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"},
    ):
        message = problem(align_labels, ours, other)
        assert all(name in message for name in (*ours, *other.values()))


@pytest.mark.parametrize("classes", [2, 4])
def test_metrics_are_those_of_scikit_learn(classes: int) -> None:
    from sklearn.metrics import accuracy_score, f1_score

    draw = random.Random(classes)
    labels, predictions = (draw.choices(range(classes), k=300) for _ in range(2))
    average = "binary" if classes == 2 else "macro"
    assert compute_metrics(("accuracy", "f1"), labels, predictions) == {
        "accuracy": accuracy_score(labels, predictions),
        "f1": f1_score(labels, predictions, average=average),
    }
    assert list(compute_metrics(("f1",), labels, predictions)) == ["f1"]


@pytest.mark.parametrize(
    ("labels", "predictions", "expected"),
    [
        ([0, 1, 0], [0, 0, 0], {"accuracy": 2 / 3, "f1": 0.0}),  # one label predicted
        ([0, 0, 0], [0, 0, 0], {"accuracy": 1.0, "f1": 0.0}),  # the label f1 is of does not occur
        ([1, 1], [1, 1], {"accuracy": 1.0, "f1": 1.0}),
        ([0, 1, 2], [2, 2, 2], {"accuracy": 1 / 3, "f1": 0.5 / 3}),
        ([1], [0], {"accuracy": 0.0, "f1": 0.0}),
    ],
)
def test_metrics_of_degenerate_predictions_are_numbers(
    labels: list[int], predictions: list[int], expected: dict[str, float]
) -> None:
    assert compute_metrics(("accuracy", "f1"), labels, predictions) == pytest.approx(expected)  # and no warning


# -- token ids ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(pico: Callable[..., Path]) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(pico())


def test_rows_are_encoded_in_order_and_cut(tokenizer: Any) -> None:
    split = Split([("the film is good",), ("bad",), ("the " * 90,)], [1, 0, 1], "here")
    calls: list[tuple[int, int]] = []
    encoded = encode(split, tokenizer, 8, lambda done, total: calls.append((done, total)))
    assert encoded.lengths == [6, 3, 8]
    assert [f["input_ids"] for f in encoded.features[:2]] == [
        tokenizer("the film is good")["input_ids"],
        tokenizer("bad")["input_ids"],
    ]
    assert (encoded.labels, len(encoded), calls) == ([1, 0, 1], 3, [(3, 3)])
    assert encode(split, tokenizer, 10_000).lengths[2] == tokenizer.model_max_length


def test_more_rows_than_a_block_keep_their_order(tokenizer: Any) -> None:
    split = Split([("the " * (row % 7 + 1),) for row in range(2003)], [row % 2 for row in range(2003)], "here")
    encoded = encode(split, tokenizer, 32)
    assert encoded.lengths == [row % 7 + 3 for row in range(2003)]


def test_of_a_pair_the_longer_text_is_cut_first(tokenizer: Any) -> None:
    encoded = encode(Split([("good", "the " * 30)], [0], "here"), tokenizer, 9)
    ids = encoded.features[0]["input_ids"]
    assert len(ids) == 9
    assert ids[:3] == tokenizer("good")["input_ids"]


def test_a_batch_is_padded_to_its_own_longest_row(tokenizer: Any) -> None:
    encoded = encode(Split([("the film",), ("good",), ("the " * 20,)], [1, 0, 1], "here"), tokenizer, 40)
    inputs, labels = collate(encoded, [1, 0], tokenizer)
    assert inputs["input_ids"].shape == inputs["attention_mask"].shape == (2, 4)
    assert inputs["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert int(inputs["input_ids"][0, 3]) == tokenizer.pad_token_id
    assert torch.equal(labels, torch.tensor([0, 1]))


def test_only_the_first_rows() -> None:
    split = Split([("a",), ("b",), ("c",)], [0, 1, 0], "here")
    assert split.first(2) == Split([("a",), ("b",)], [0, 1], "here")
    assert split.first(None) is split
    assert len(split.first(9)) == 3
    assert Encoded([{"input_ids": [1, 2]}], [0]).lengths == [2]
