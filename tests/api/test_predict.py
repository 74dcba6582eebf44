"""Predictions, the tables made of them, and the files the GLUE server takes; for every kind of problem."""

from __future__ import annotations

import csv
import io
import json
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import failure, invoke, opinions, write_rows
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import craft_cli as craft
from craft_cli.api import submit as submission
from craft_cli.api.predict import predict_file
from craft_cli.config import RunConfig
from craft_cli.data.sources import DataSource
from craft_cli.errors import ConfigError, DataError
from craft_cli.tasks.glue import TASKS

Make = Callable[..., Path]
TEXTS = ["the film was great", "a dull book", "", "\U0001f600 the the the", "never good"]


def trained(pico: Make, output: str, **settings: Any) -> Path:
    """A short run on the pico model."""
    defaults = {"model": str(pico()), "ranks": "6,5,2", "use_cpu": True, "num_train_epochs": 1, "output_dir": output}
    craft.train(RunConfig.build(defaults | settings))
    return Path(output)


@pytest.fixture(scope="module")
def runs(pico: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs of several kinds of problems: single, pairs, several, real."""
    folder = tmp_path_factory.mktemp("runs-of-all-kinds")
    rows = opinions(48, 1)
    several = [["good"] if row["label"] else (["bad", "dull"] if number % 4 else []) for number, row in enumerate(rows)]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        write_rows(Path("sst2/train.jsonl"), rows)
        write_rows(Path("sst2/validation.jsonl"), opinions(20, 2))
        write_rows(Path("pairs/train.jsonl"), opinions(24, 1, pair=True))
        write_rows(Path("pairs/validation.jsonl"), opinions(10, 2, pair=True))
        write_rows(
            Path("several.jsonl"), [{"text": r["sentence"], "labels": s} for r, s in zip(rows, several, strict=True)]
        )
        write_rows(Path("real.jsonl"), [{"text": r["sentence"], "score": r["label"] * 2.5 + 0.5} for r in rows])
        trained(pico, "single", task="sst2", data_dir="sst2")
        trained(pico, "pair", task="mrpc", data_dir="pairs")
        trained(pico, "several", train_file="several.jsonl", threshold=0.4)
        trained(pico, "real", train_file="real.jsonl")
    return folder


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def plainly(folder: Path, texts: Sequence[tuple[str, ...]]) -> torch.Tensor:
    """Logits of a merged checkpoint, by transformers alone, a row at a time."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return torch.cat([model(**tokenizer(*text, return_tensors="pt")).logits for text in texts])


# -- craft predict ------------------------------------------------------------------------------------------------------


def predicted(*arguments: str, stdin: str | None = None) -> list[dict[str, Any]]:
    from typer.testing import CliRunner

    from craft_cli.cli import app

    result = CliRunner().invoke(app, ["predict", *arguments, "--use-cpu"], input=stdin)
    assert result.exit_code == 0, result.stderr
    return lines(result.stdout)


def test_a_text_on_standard_input_is_answered_in_a_line(runs: Path) -> None:
    (row,) = predicted(str(runs / "single"), stdin="great film\n")
    assert list(row) == ["row", "prediction", "scores"]
    assert row["prediction"] == max(row["scores"], key=row["scores"].get)
    assert set(row["scores"]) == {"negative", "positive"}
    assert sum(row["scores"].values()) == pytest.approx(1, abs=1e-5)


def test_predictions_are_those_of_the_merged_model_in_plain_transformers(runs: Path) -> None:
    craft.merge(runs / "single", "merged")
    expected = torch.softmax(plainly(Path("merged"), [(text,) for text in TEXTS]), dim=-1)
    for subject in (str(runs / "single"), "merged"):
        rows = predicted(subject, stdin="\n".join(TEXTS) + "\n")
        assert len(rows) == len(TEXTS)
        for row, scores in zip(rows, expected.tolist(), strict=True):
            assert list(row["scores"].values()) == pytest.approx(scores, abs=1e-4)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".tsv", ".parquet"])
def test_every_kind_of_file_gives_the_same_predictions(suffix: str, runs: Path) -> None:
    from datasets import Dataset

    texts = [text for text in TEXTS if text]
    path = f"in{suffix}"
    if suffix == ".txt":
        Path(path).write_text("\r\n".join(texts))
    elif suffix == ".jsonl":
        write_rows(Path(path), [{"sentence": text, "more": 1} for text in texts])
    elif suffix == ".parquet":
        Dataset.from_list([{"sentence": text} for text in texts]).to_parquet(path)
    else:
        Path(path).write_text("\n".join(["sentence", *texts]) + "\n")
    assert predicted(str(runs / "single"), "--input", path) == predicted(
        str(runs / "single"), stdin="\n".join(texts) + "\n"
    )


def test_a_pair_is_two_columns_or_two_texts_with_a_tab_between(runs: Path) -> None:
    write_rows(Path("in.jsonl"), [{"sentence1": "a good film", "sentence2": "the film was", "id": 1}])
    from_file = predicted(str(runs / "pair"), "--input", "in.jsonl")
    assert from_file == predicted(str(runs / "pair"), stdin="a good film\tthe film was\n")
    Path("in.txt").write_text("no tab\n")
    assert "in.txt, line 1: this model takes two texts; put a tab between them" in failure(
        "predict", str(runs / "pair"), "--input", "in.txt"
    )


def test_several_labels_and_real_numbers(runs: Path) -> None:
    (several,) = predicted(str(runs / "several"), stdin="good\n")
    assert list(several["scores"]) == ["bad", "dull", "good"]
    assert several["prediction"] == [name for name, score in several["scores"].items() if score > 0.4]
    (real,) = predicted(str(runs / "real"), stdin="good\n")
    assert real["prediction"] == real["scores"]["score"]


def test_a_file_is_written_in_either_format_and_whole(runs: Path) -> None:
    Path("in.txt").write_text("\n".join(["good", "bad"] * 600) + "\n")
    result = invoke("predict", str(runs / "single"), "-i", "in.txt", "-o", "out.csv", "--use-cpu")
    assert result.exit_code == 0, result.stderr
    rows = list(csv.DictReader(io.StringIO(Path("out.csv").read_text())))
    assert len(rows) == 1200
    assert list(rows[0]) == ["row", "prediction", "score_negative", "score_positive"]
    assert [row["row"] for row in rows] == [str(number) for number in range(1, 1201)]
    invoke("predict", str(runs / "single"), "-i", "in.txt", "-o", "out.jsonl", "--use-cpu")
    assert [row["prediction"] for row in lines(Path("out.jsonl").read_text())] == [row["prediction"] for row in rows]
    with open("in.txt", "ab") as file:
        file.write(b"caf\xe9\n")
    before = Path("out.csv").read_bytes()
    assert "in.txt, line 1201: not UTF-8" in failure("predict", str(runs / "single"), "-i", "in.txt", "-o", "out.csv")
    assert Path("out.csv").read_bytes() == before


def test_rows_are_read_as_they_are_needed(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file larger than memory: no more than some batches of it are ever read ahead."""
    read = []

    class Endless(io.RawIOBase):
        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            read.append(1)
            buffer[:5] = b"good\n"
            return 5

    class Stop(Exception):
        pass

    def written(rows: int) -> None:
        if rows >= 24:
            raise Stop

    stdin = {"buffer": io.BufferedReader(Endless()), "closed": False, "isatty": lambda self: False}
    monkeypatch.setattr(sys, "stdin", type("In", (), stdin)())
    with pytest.raises(Stop):
        predict_file(runs / "single", per_device_eval_batch_size=8, use_cpu=True, progress=written)
    assert len(read) <= 32


def test_at_the_keyboard_every_line_is_answered_before_the_next(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    class Typed(io.RawIOBase):
        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            events.append("typed")
            line = {1: b"good film\n", 2: b"a dull book\n"}.get(events.count("typed"), b"")
            buffer[: len(line)] = line
            return len(line)

    stdin = {"buffer": io.BufferedReader(Typed()), "closed": False, "isatty": lambda self: True}
    monkeypatch.setattr(sys, "stdin", type("In", (), stdin)())
    heard = {"ready": lambda: events.append("ready"), "progress": lambda rows: events.append(f"answer {rows}")}
    predict_file(runs / "single", use_cpu=True, **heard)  # type: ignore[arg-type]
    assert events[:5] == ["ready", "typed", "answer 1", "typed", "answer 2"]


def test_python_gets_the_answers_of_the_command(runs: Path) -> None:
    texts = [*TEXTS[:2], "never good"]
    Path("in.txt").write_text("".join(f"{text}\n" for text in texts))
    for run in ("single", "several", "real"):
        predict_file(runs / run, input="in.txt", output="out.jsonl", use_cpu=True)
        expected = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
        answers = craft.predict(runs / run, texts, use_cpu=True)
        assert [{"row": row} | answer for row, answer in enumerate(answers, 1)] == expected
    columns = craft.predict(runs / "single", [{"sentence": text} for text in texts], use_cpu=True)
    assert columns == craft.predict(runs / "single", texts, use_cpu=True)
    assert craft.predict(runs / "single", [], use_cpu=True) == []
    pairs = craft.predict(runs / "pair", [("good", "the film"), ("dull", "a book")], use_cpu=True)
    assert pairs == craft.predict(runs / "pair", ["good\tthe film", "dull\ta book"], use_cpu=True)
    with pytest.raises(DataError, match="texts: text 2 has 3 parts, but this model expects sentence1 and sentence2"):
        craft.predict(runs / "pair", [("a", "b"), ("a", "b", "c")], use_cpu=True)
    with pytest.raises(TypeError, match="texts: expected a list of texts, not a single string"):
        craft.predict(runs / "single", "great film")
    with pytest.raises(TypeError, match="texts: text 1 is of type int"):
        craft.predict(runs / "single", [3], use_cpu=True)


def test_what_cannot_be_predicted_is_told(runs: Path) -> None:
    single = str(runs / "single")
    assert "nowhere.csv: no such file" in failure("predict", single, "-i", "nowhere.csv")
    Path("in.csv").write_text("words\na\n")
    assert "in.csv has no columns sentence; it has words (choose with --text-columns)" in failure(
        "predict", single, "-i", "in.csv"
    )
    assert len(predicted(single, "-i", "in.csv", "--text-columns", "words")) == 1
    assert "predictions are written as .jsonl or .csv" in failure("predict", single, "-i", "in.csv", "-o", "out.xlsx")
    written = invoke("predict", single, "-i", "in.csv", "--text-columns", "words", "--format", "csv", "--use-cpu")
    assert written.stdout.splitlines()[0] == "row,prediction,score_negative,score_positive"
    write_rows(Path("in.jsonl"), [{"sentence": "good"}, {"sentence": None}])
    assert "in.jsonl, line 2: column 'sentence' has no text" in invoke("predict", single, "-i", "in.jsonl").stderr


# -- craft eval ---------------------------------------------------------------------------------------------------------


def test_a_predictions_file_holds_gold_and_agrees_with_the_metrics(runs: Path) -> None:
    for suffix in (".jsonl", ".csv"):
        found = craft.evaluate(runs / "single", predictions=f"out{suffix}")
        rows: list[Any] = (
            lines(Path("out.jsonl").read_text())
            if suffix == ".jsonl"
            else list(csv.DictReader(io.StringIO(Path("out.csv").read_text())))
        )
        right = sum(row["prediction"] == row["label"] for row in rows)
        assert (len(rows), right / len(rows)) == (20, found.metrics["accuracy"])
    assert "p.csv" in invoke("eval", str(runs / "single"), "--predictions", "p.csv", "--use-cpu").stdout
    assert Path("p.csv").read_bytes() == Path("out.csv").read_bytes()
    several = craft.evaluate(runs / "several", predictions="several.jsonl")
    rows = lines(Path("several.jsonl").read_text())
    assert several.examples == len(rows) == 5  # a tenth of 48
    assert all(isinstance(row["label"], list) and isinstance(row["prediction"], list) for row in rows)


def test_a_regression_is_evaluated_saved_and_merged(runs: Path) -> None:
    found = craft.evaluate(runs / "real")
    assert list(found.metrics) == ["pearson", "spearman", "mae", "rmse", "r2", "loss"]
    craft.merge(runs / "real", "merged")
    config = json.loads(Path("merged/config.json").read_text())
    assert (config["problem_type"], config["id2label"]) == ("regression", {"0": "score"})
    merged = craft.evaluate("merged", source=DataSource(validation_file=str(runs / "real.jsonl")))
    assert list(merged.metrics) == list(found.metrics)


def test_several_labels_survive_the_merge(runs: Path) -> None:
    craft.merge(runs / "several", "merged")
    config = json.loads(Path("merged/config.json").read_text())
    assert config["problem_type"] == "multi_label_classification"
    assert list(config["id2label"].values()) == ["bad", "dull", "good"]


# -- MNLI and AX --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mnli(pico: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mnli")

    def rows(count: int) -> list[dict[str, Any]]:
        return [
            {"premise": r["sentence"], "hypothesis": "good", "label": n % 3} for n, r in enumerate(opinions(count, 1))
        ]

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        for split, count in {"train": 30, "validation_matched": 9, "validation_mismatched": 12}.items():
            write_rows(Path(f"glue/mnli/{split}.jsonl"), rows(count))
        write_rows(Path("glue/ax/test.jsonl"), rows(15))
        for split, count in {"test_matched": 7, "test_mismatched": 8}.items():
            write_rows(Path(f"glue/mnli/{split}.jsonl"), [row | {"label": -1} for row in rows(count)])
        trained(pico, "run", task="mnli", data_dir="glue/mnli")
    return folder


def test_mnli_is_evaluated_on_both_of_its_splits(mnli: Path) -> None:
    found = craft.evaluate(mnli / "run")
    assert set(found.metrics) == {"accuracy", "loss", "accuracy_mismatched", "loss_mismatched"}
    assert found.examples == 21
    saved = json.loads((mnli / "run/all_results.json").read_text())
    assert saved["examples"] == 21
    assert saved["metrics"] == pytest.approx(dict(found.metrics), abs=1e-6)
    alone = craft.evaluate(mnli / "run", source=DataSource(task="mnli-mm", data_dir=str(mnli / "glue/mnli")))
    assert alone.metrics["accuracy"] == found.metrics["accuracy_mismatched"]


def test_ax_is_evaluated_with_a_run_of_mnli(mnli: Path) -> None:
    result = invoke("eval", str(mnli / "run"), "--task", "ax", "--data-dir", str(mnli / "glue/ax"), "--json")
    assert list(json.loads(result.stdout)["metrics"]) == ["matthews_correlation", "accuracy", "loss"]
    hidden = failure("eval", str(mnli / "run"), "--split", "test")
    assert "are hidden; use craft eval" in hidden


# -- the GLUE server ----------------------------------------------------------------------------------------------------

SERVER = {
    "AX": {"entailment", "neutral", "contradiction"}, "CoLA": {"0", "1"}, "MNLI-m": {"entailment", "neutral", "contradiction"},
    "MNLI-mm": {"entailment", "neutral", "contradiction"}, "MRPC": {"0", "1"}, "QNLI": {"entailment", "not_entailment"},
    "QQP": {"0", "1"}, "RTE": {"entailment", "not_entailment"}, "SST-2": {"0", "1"}, "STS-B": None, "WNLI": {"0", "1"},
}  # fmt: skip
ROWS = {
    "AX": 1104, "CoLA": 1063, "MNLI-m": 9796, "MNLI-mm": 9847, "MRPC": 1725, "QNLI": 5463, "QQP": 390965, "RTE": 3000,
    "SST-2": 1821, "STS-B": 1379, "WNLI": 146,
}  # fmt: skip


def check_submission(path: Path, rows: dict[str, int]) -> dict[str, list[str]]:
    """What the server checks: exact files at the top, header, index, answers; gives the answers."""
    answers = {}
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert sorted(archive.namelist()) == sorted(f"{name}.tsv" for name in SERVER)
        for name, allowed in SERVER.items():
            text = io.TextIOWrapper(archive.open(f"{name}.tsv"), encoding="utf-8", newline="").read()
            assert text.endswith("\n")
            header, *lines = text.splitlines()
            assert header == "index\tprediction"
            cells = [line.split("\t") for line in lines]
            assert [index for index, _ in cells] == [str(number) for number in range(rows[name])]
            answers[name] = [answer for _, answer in cells]
            if allowed is None:
                assert all(0 <= float(answer) <= 5 for answer in answers[name])
            else:
                assert set(answers[name]) <= allowed
    return answers


@pytest.fixture
def small_server(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """A server that expects a few rows of each task."""
    rows = {"MNLI-m": 7, "MNLI-mm": 8, "AX": 15, "STS-B": 9}
    small = {
        name: replace(task, server={file: (split, rows.get(file, 4)) for file, (split, _) in (task.server or {}).items()} or None)
        for name, task in TASKS.items()
    }  # fmt: skip
    monkeypatch.setattr("craft_cli.tasks.glue.TASKS", small)
    monkeypatch.setattr(submission, "TASKS", small)
    return dict.fromkeys(SERVER, 4) | rows


def test_the_numbers_of_rows_the_server_expects() -> None:
    assert {file: rows for task in TASKS.values() for file, (_, rows) in (task.server or {}).items()} == ROWS


def test_test_predictions_of_some_runs_with_the_rest_filled(
    mnli: Path, pico: Make, small_server: dict[str, int]
) -> None:
    pairs = [{"sentence1": r["sentence"], "sentence2": "good", "label": r["label"] * 40.0 - 10} for r in opinions(9, 1)]
    for split in ("train", "validation", "test"):
        write_rows(Path(f"stsb/{split}.jsonl"), pairs)
    trained(pico, "stsb-run", task="sts-b", data_dir="stsb", head_learning_rate=2.0, num_train_epochs=4)
    result = invoke(
        "eval",
        str(mnli / "run"),
        "stsb-run",
        "--split",
        "test",
        "--submission",
        "submission.zip",
        "--json",
        "--use-cpu",
    )
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert told["predicted"] == {"MNLI-m": 7, "MNLI-mm": 8, "AX": 15, "STS-B": 9}
    assert set(told["filled"]) == set(SERVER) - set(told["predicted"])
    answers = check_submission(Path("submission.zip"), small_server)
    names = ["entailment", "neutral", "contradiction"]
    texts = [(row["premise"], row["hypothesis"]) for row in lines((mnli / "glue/ax/test.jsonl").read_text())]
    craft.merge(mnli / "run", "merged")
    assert answers["AX"] == [names[number] for number in plainly(Path("merged"), texts).argmax(dim=-1).tolist()]
    raw = [row["prediction"] for row in predicted("stsb-run", "--input", "stsb/test.jsonl")]
    assert [float(answer) for answer in answers["STS-B"]] == pytest.approx([min(max(x, 0), 5) for x in raw], abs=1e-3)
    assert min(raw) < 0 or max(raw) > 5  # clipping was needed


def test_what_cannot_be_submitted_is_told(runs: Path, mnli: Path, small_server: dict[str, int]) -> None:
    assert "--submission requires --split test" in failure("eval", str(runs / "single"), "--submission", "s.zip")
    with pytest.raises(ConfigError, match=r"the file name must end in \.zip"):
        craft.submit([mnli / "run"], "s.tar")
    with pytest.raises(ConfigError, match="MNLI-m is already predicted by an earlier run"):
        craft.submit([mnli / "run", mnli / "run"], "s.zip", use_cpu=True)
    with pytest.raises(ConfigError, match="trained on 'own', which is not a GLUE task"):
        craft.submit([runs / "real"], "s.zip", use_cpu=True)
    write_rows(runs / "sst2/test.jsonl", opinions(3, 1))
    with pytest.raises(DataError, match="has 3 rows, but the GLUE test set SST-2 has 4"):
        craft.submit([runs / "single"], "s.zip", use_cpu=True)
    assert not Path("s.zip").exists()
