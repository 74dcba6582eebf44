"""Columns whatever their case, separators, folders, packed files, several texts, and rows of every label."""

from __future__ import annotations

import csv
import gzip
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import failure, invoke, opinions, write_rows
from transformers import AutoTokenizer

import craft_cli as craft
from craft_cli.config import RunConfig
from craft_cli.data import opened
from craft_cli.data.readers import read_rows
from craft_cli.data.sources import DataSource, Split, shares
from craft_cli.data.tokens import encode, separator
from craft_cli.errors import DataError
from craft_cli.tasks.splits import load_splits

Make = Callable[..., Path]


def texts(path: str, **columns: Any) -> list[tuple[tuple[str, ...], int]]:
    loaded = load_splits(DataSource.of({"train_file": path, **columns}), ["train"])
    split = loaded.splits["train"]
    return list(zip(split.texts, split.labels or [], strict=True))


EXPECTED = [(("a film",), 0), (("a book",), 1)]


def test_columns_are_found_whatever_their_case_and_separator() -> None:
    for header in ("Text,Label", "TEXT;LABEL", "Sentence\tClass", '"text"|"label"', 'label,"Text"'):
        mark = next(mark for mark in ",;\t|" if mark in header)
        rows = [["a film", "x"], ["a book", "y"]]
        body = [mark.join(row[::-1] if header.startswith("label") else row) for row in rows]
        Path("in.csv").write_text("\n".join([header, *body]) + "\n")
        assert texts("in.csv") == EXPECTED, header
        assert texts("in.csv", label_column="CLASS" if "Class" in header else "laBel") == EXPECTED
    Path("in.csv").write_text('"Text, whole";Label\na film;x\na book;y\n')
    assert texts("in.csv", text_columns=("text, WHOLE",)) == EXPECTED
    Path("in.csv").write_text("Text,TEXT,label\na film,b,x\na book,b,y\n")
    with pytest.raises(DataError, match=r"which columns hold the text.*Text, TEXT, label"):
        texts("in.csv")


def test_words_with_tags_are_found_whatever_the_case_of_their_columns() -> None:
    write_rows(Path("in.jsonl"), [{"Tokens": ["in", "Bonn"], "NER_Tags": ["O", "B-place"]}] * 2)
    task = load_splits(DataSource(train_file="in.jsonl"), ["train"]).task
    assert task.kind == "token-classification"
    assert task.answers == ("place",)


def test_what_is_no_file_of_rows_is_explained() -> None:
    Path("in.tsv").write_text("text,label\na,x\n")
    with pytest.raises(DataError, match=r"in.tsv.* one column 'text,label'; a .tsv file needs tabs"):
        texts("in.tsv")
    Path("folder").mkdir()
    with pytest.raises(DataError, match=r"^folder is a folder; pass a file in it, or train with --data-dir folder"):
        texts("folder")
    with pytest.raises(DataError, match=r"--data-dir: in.tsv is a file; pass it as --train-file"):
        load_splits(DataSource(data_dir="in.tsv"), ["train"])


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json", "conll", "txt"])
def test_packed_files_hold_the_same_rows(kind: str) -> None:
    rows = [{"text": "a film", "label": "x"}, {"text": "a book", "label": "y"}]
    content = {
        "csv": "text,label\na film,x\na book,y\n",
        "tsv": "text\tlabel\na film\tx\na book\ty\n",
        "jsonl": "".join(json.dumps(row) + "\n" for row in rows),
        "json": json.dumps(rows),
        "conll": "a\tO\nfilm\tB-x\n\na\tO\nbook\tB-y\n",
        "txt": "a O\nfilm B-x\n\na O\nbook B-y\n",
    }[kind]
    Path("plain").mkdir()
    Path("packed").mkdir()
    Path(f"plain/train.{kind}").write_text(content)
    Path(f"packed/train.{kind}.gz").write_bytes(gzip.compress(content.encode("utf-16" if kind == "csv" else "utf-8")))
    plain, packed = (
        load_splits(DataSource(data_dir=folder), ["train"]).splits["train"] for folder in ("plain", "packed")
    )
    assert (packed.texts, packed.labels) == (plain.texts, plain.labels)
    assert packed.place_of(0).startswith(f"packed/train.{kind}.gz, ")


def test_packed_files_that_are_damaged_or_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = gzip.compress(b"text,label\n" + b"a film,x\n" * 9000)
    for content in (b"text,label\n", packed[:-20], packed[:60] + b"?" + packed[61:]):
        Path("in.csv.gz").write_bytes(content)
        with pytest.raises(DataError, match=r"in\.csv\.gz: invalid gzip"):
            list(read_rows(Path("in.csv.gz")))
    Path("in.csv.gz").write_bytes(packed)
    assert len(list(read_rows(Path("in.csv.gz")))) == 9000
    monkeypatch.setattr(opened, "_PLENTY", 10_000)
    with pytest.raises(DataError, match=r"in\.csv\.gz decompresses to more than 100 times its size"):
        list(read_rows(Path("in.csv.gz")))
    Path("in.parquet.gz").write_bytes(packed)
    with pytest.raises(DataError, match=r"in\.parquet\.gz: unknown file format"):
        list(read_rows(Path("in.parquet.gz")))


def test_more_than_two_texts_are_one_with_the_separator_of_the_tokenizer_between(pico: Make) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pico())
    three = encode(Split([("film", "good", "the end"), ("a", "b", "")], [0, 1], "in"), tokenizer, 12)
    one = encode(Split([("film [SEP] good [SEP] the end",), ("a [SEP] b [SEP]",)], [0, 1], "in"), tokenizer, 12)
    assert three == one
    assert three.features[0]["input_ids"].count(tokenizer.sep_token_id) == 3
    for family in ("sep_token", "eos_token"):
        setattr(tokenizer, family, None)
    assert separator(tokenizer) == "\n"


@pytest.mark.slow
def test_a_model_of_three_texts_is_used_as_it_was_trained(pico: Make) -> None:
    rows = [
        {"id": n, "title": "film", "body": row["sentence"], "end": "the end", "label": row["label"]}
        for n, row in enumerate(opinions(30, 1))
    ]
    write_rows(Path("three/train.jsonl"), rows)
    settings = {"model": str(pico()), "ranks": "6,5,2", "use_cpu": True, "max_steps": 2, "cache_dir": "factors"}
    craft.train(
        RunConfig.build(settings | {"data_dir": "three", "output_dir": "out", "text_columns": "title,body,end"})
    )
    record = json.loads(Path("out/adapter/adapter_config.json").read_text())["training"]["data"]
    assert record["text_columns"] == ["title", "body", "end"]
    assert record["text_separator"] == "[SEP]"
    craft.merge("out", "merged")
    assert "title, body, end, with '[SEP]' between them" in Path("merged/README.md").read_text()
    answers = craft.predict("out", [("film", row["body"], "the end") for row in rows], use_cpu=True)
    for subject in ("out", "merged"):
        done = invoke("predict", subject, "-i", "three/train.jsonl", "--keep-columns", "ID,label", "--use-cpu")
        assert done.exit_code == 0, done.stderr
        found = [json.loads(line) for line in done.stdout.splitlines()]
        assert [(row["id"], row["label"]) for row in found] == [(row["id"], row["label"]) for row in rows]
        for mine, answer in zip(found, answers, strict=True):
            assert mine["scores"]["0"] == pytest.approx(answer["scores"]["0"], abs=1e-5)
    Path("in.txt").write_text("one\ttwo\n")
    assert "in.txt, line 1: this model takes 3 texts; put tabs between them" in failure(
        "predict", "out", "-i", "in.txt"
    )


def test_max_train_samples_keeps_the_shares_of_the_labels() -> None:
    labels = [0] * 60 + [1] * 30 + [2] * 9 + [3]
    split = Split([(str(row),) for row in range(100)], labels, "in")
    part = split.first(20, by_label=True)
    assert Counter(part.labels) == {0: 12, 1: 6, 2: 1, 3: 1}
    assert part.rows == sorted(part.rows or [])
    assert split.first(20).labels == [0] * 20
    assert split.first(None, by_label=True) is split
    assert Counter(split.first(3, by_label=True).labels).total() == 3
    for total in range(1, 100):
        assert sum(shares(Counter(labels), total).values()) == total


def test_predictions_are_joined_to_the_data_they_are_of(run: Path) -> None:
    write_rows(Path("in.jsonl"), [{"id": 7, "sentence": "good", "meta": {"a": [1]}}, {"id": None, "sentence": "bad"}])
    done = invoke(
        "predict", "run", "-i", "in.jsonl", "--keep-columns", "id,Sentence,meta", "--format", "csv", "--use-cpu"
    )
    assert done.exit_code == 0, done.stderr
    rows = list(csv.DictReader(done.stdout.splitlines()))
    assert [(row["id"], row["sentence"], row["meta"]) for row in rows] == [("7", "good", '{"a": [1]}'), ("", "bad", "")]
    assert (
        failure("predict", "run", "-i", "in.jsonl", "--keep-columns", "key")
        == "error: --keep-columns: in.jsonl has no column 'key'; it has id, sentence, meta\n"
    )
    write_rows(Path("in.jsonl"), [{"prediction": "x", "sentence": "good"}])
    assert "'prediction' is also a field of the predictions" in failure(
        "predict", "run", "-i", "in.jsonl", "--keep-columns", "prediction", "--use-cpu"
    )
    write_rows(Path("own/train.jsonl"), opinions(30, 1))
    arguments = ["--validation-file", "data/validation.jsonl", "--predictions", "out.csv", "--max-eval-samples", "3"]
    assert invoke("eval", "run", *arguments, "--use-cpu").exit_code == 0
    assert [row["row"] for row in csv.DictReader(Path("out.csv").read_text().splitlines())] == ["1", "2", "3"]
