"""Kinds of tasks: GLUE's, and what is found in the user's own data."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import own, problem, write, write_as

from craft_cli.data.holdout import divided, hold_out
from craft_cli.data.sources import DataSource, Split
from craft_cli.errors import ConfigError, DataError
from craft_cli.tasks.glue import TASKS, task_named
from craft_cli.tasks.labelled import align_labels
from craft_cli.tasks.splits import load_splits

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
    with pytest.raises(ConfigError, match=r"--task: unknown task 'ssst2'; did you mean 'sst2'\?"):
        load_splits(DataSource(task="ssst2"), ["train"])


def test_the_sample_task_needs_no_files_and_is_balanced() -> None:
    loaded = load_splits(DataSource(task="opinions"), ["train", "validation"])
    splits = list(loaded.splits.values())
    assert loaded.task == task_named("opinions") == TASKS["opinions"]
    assert all(0.4 < sum(split.labels or []) / len(split) < 0.6 for split in splits)
    assert not set(splits[0].texts) & set(splits[1].texts)


def test_labels_are_aligned_by_name_never_by_position() -> None:
    ours = ("negative", "positive")
    assert align_labels(ours, {0: "POSITIVE", 1: "NEGATIVE"}) == ("positive", "negative")
    assert align_labels(ours, {1: "negative", 0: "positive"}) == ("positive", "negative")
    mnli = ("entailment", "neutral", "contradiction")
    assert align_labels(mnli, {0: "contradiction", 1: "neutral", 2: "entailment"}) == mnli[::-1]
    assert align_labels(ours, {0: "LABEL_0", 1: "LABEL_1"}) == align_labels(ours, None) == ours
    assert align_labels(("US", "us"), {0: "us", 1: "US"}) == ("us", "US")  # which differ in nothing but case
    with pytest.raises(DataError, match="has the labels Us, us, but the data has US, us"):
        align_labels(("US", "us"), {0: "Us", 1: "us"})
    for other in (
        {0: "yes", 1: "no"},
        {0: "negative", 1: "neutral", 2: "positive"},
        {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"},
    ):
        message = problem(align_labels, ours, other)
        assert all(name in message for name in (*ours, *other.values()))


# -- kinds of problems in the user's own data ---------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_real_numbers_are_a_regression(suffix: str) -> None:
    path = str(write_as(suffix, [{"text": "a", "label": 0.5}, {"text": "b", "label": 3.0}]))
    task, (split,) = own(path)
    assert (task.problem_type, task.labels) == ("regression", ("score",))
    assert task.metrics == ("pearson", "spearman", "mae", "rmse", "r2")
    assert TASKS["stsb"].metrics == ("pearson", "spearman")  # as GLUE has it
    assert split.labels == [0.5, 3.0]


def test_whole_numbers_are_a_regression_when_told_so() -> None:
    path = write("t.csv", "text,label\na,1\nb,3\n")
    assert own(path)[0].labels == ("1", "3")
    assert own(path, problem_type="regression")[1][0].labels == [1.0, 3.0]


@pytest.mark.parametrize("value", ["good", "inf", "nan"])
def test_what_is_no_number_in_a_regression_is_told_with_its_line(value: str) -> None:
    path = write("t.csv", f"text,label\na,0.5\nb,{value}\n")
    assert problem(own, path, problem_type="regression") == f"t.csv, line 3: column 'label' has '{value}', not a number"


@pytest.mark.parametrize(
    ("suffix", "cells", "settings"),
    [
        (".jsonl", [["b", "a"], [], ["c"]], {}),
        (".parquet", [["b", "a"], [], ["c"]], {}),
        (".csv", ["b;a", "", "c"], {"label_separator": ";"}),
        (".csv", ["b, a", "", "c"], {"problem_type": "multi_label_classification"}),
    ],
)
def test_lists_and_separated_strings_are_several_labels(
    suffix: str, cells: list[Any], settings: dict[str, Any]
) -> None:
    path = str(write_as(suffix, [{"text": f"t{row}", "label": cell} for row, cell in enumerate(cells)]))
    task, (split,) = own(path, **settings)
    assert (task.problem_type, task.labels) == ("multi_label_classification", ("a", "b", "c"))
    assert task.metrics == ("f1_micro", "f1_macro")
    assert split.labels == [[1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0]]


def test_a_list_among_single_labels_is_told_with_its_line() -> None:
    path = write("t.jsonl", '{"text": "a", "label": "x"}\n{"text": "b", "label": ["x", "y"]}\n')
    assert problem(own, path, problem_type="single_label_classification").startswith("t.jsonl, line 2: ")
    validation = write("v.jsonl", '{"text": "b", "label": ["x", "q"]}\n')
    assert "label 'q' is not a label of the training (x, y)" in problem(own, path, validation)


# -- rows held out ------------------------------------------------------------------------------------------------------


def labelled(count: int, rare: int) -> str:
    rows = [f"text {row},{'rare' if row < rare else 'common'}" for row in range(count)]
    return write("t.csv", "text,label\n" + "\n".join(rows) + "\n")


def test_without_validation_data_a_stratified_share_is_held_out_by_seed() -> None:
    source = DataSource(train_file=labelled(100, 20), validation_share=0.2, seed=1)
    loaded = load_splits(source, ["train", "validation"])
    train, validation = loaded.splits["train"], loaded.splits["validation"]
    assert (len(train), len(validation)) == (80, 20)
    assert (validation.labels or []).count(loaded.task.labels.index("rare")) == 4
    assert not set(train.texts) & set(validation.texts)
    assert loaded.notes == ["20 of 100 rows of t.csv held out for validation (seed 1)"]
    alone = load_splits(source, ["validation"], loaded.task)
    assert alone.splits["validation"] == validation  # evaluated later: the same rows
    assert load_splits(replace(source, seed=2), ["validation"]).splits["validation"].texts != validation.texts


def test_a_tenth_is_held_out_if_nothing_else_is_said(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    Path("data/train.csv").write_text(Path(labelled(50, 10)).read_text())
    loaded = load_splits(DataSource(data_dir="data"), ["train", "validation"])
    assert [len(split) for split in loaded.splits.values()] == [45, 5]


def test_labels_too_rare_to_be_in_both_parts_do_not_stop_it() -> None:
    split = Split([(str(row),) for row in range(9)], [0] * 8 + [1], "here")
    kept, held = divided(split, hold_out(split, 0.3, 0, stratify=True))
    assert sorted(kept + held) == list(range(9))
    assert 8 in kept
    with pytest.raises(DataError, match="cannot be split"):
        hold_out(split.first(1), 0.5, 0, stratify=True)


# -- data sets saved by `datasets` --------------------------------------------------------------------------------------


def test_a_saved_data_set_with_splits_of_other_names_and_class_labels(tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, DatasetDict

    rows = [{"text": f"t{row}", "label": row % 2} for row in range(6)]
    table = Dataset.from_list(rows).cast_column("label", ClassLabel(names=["no", "yes"]))
    DatasetDict({"train": table, "dev": table.select(range(2))}).save_to_disk(tmp_path / "saved")
    source = DataSource(data_dir="saved", validation_split="dev")
    loaded = load_splits(source, ["train", "validation"])
    assert loaded.task.labels == ("no", "yes")
    assert [len(split) for split in loaded.splits.values()] == [6, 2]
    assert "has no split 'test'; it has train, dev" in problem(
        load_splits, replace(source, validation_split="test"), ["validation"]
    )
    table.save_to_disk(tmp_path / "single")
    assert [len(s) for s in load_splits(DataSource(data_dir="single"), ["train", "validation"]).splits.values()] == [
        5,
        1,
    ]


# -- GLUE ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "name"),
    [("sts-b", "stsb"), ("STS-B", "stsb"), ("sst-2", "sst2"), ("CoLA", "cola"), ("mnli-mm", "mnli-mm"),
     ("MNLI_matched", "mnli"), ("AX", "ax")],
)  # fmt: skip
def test_tasks_are_found_by_the_names_people_type(typed: str, name: str) -> None:
    assert task_named(typed).name == name


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.hub])
def test_every_glue_task_reads_its_columns_and_labels(name: str, tmp_path: Path) -> None:
    task = TASKS[name]
    (tmp_path / "data").mkdir()
    gold: list[Any] = [0.0, 2.5, 5.0] if task.labels == ("score",) else list(range(len(task.labels)))
    splits = [*([task.train] if task.train else []), *task.validation]
    for split in splits:
        rows = [{**dict.fromkeys(task.text_columns, split), "label": label, "idx": 0} for label in gold]
        Path(f"data/{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    loaded = load_splits(
        DataSource(task=name, data_dir="data"), ["train", "validation"] if task.train else ["validation"]
    )
    assert list(loaded.splits) == splits
    for split, found in loaded.splits.items():
        assert found.texts == [(split,) * len(task.text_columns)] * len(gold)
        assert found.labels == gold


def test_a_task_for_evaluation_only_is_not_trained() -> None:
    with pytest.raises(ConfigError, match="--task ax is for evaluation only; train on mnli"):
        load_splits(DataSource(task="ax"), ["train", "validation"])


def test_hidden_labels_are_known_as_such(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write("data/test.jsonl", '{"sentence": "a", "label": -1}\n{"sentence": "b", "label": -1}\n')
    assert load_splits(DataSource(task="sst2", data_dir="data"), ["test"]).splits["test"].labels is None
