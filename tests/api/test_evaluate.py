"""What `craft eval` shows beyond the metrics: each label, the matrix, calibration, the surest mistakes and their rows."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import classifier, failure, invoke, opinions, save_tokenizer, write_rows
from helpers import at, conll, sentences
from rich.cells import cell_len

import craft_cli as craft
from craft_cli.cli import console
from craft_cli.config import RunConfig
from craft_cli.data.readers import read_rows
from craft_cli.data.sources import DataSource
from craft_cli.errors import figure
from craft_cli.tasks import metrics, sequence_classification

Make = Callable[..., Path]
ROW = ("place", "label", "prediction", "confidence", "texts")


def saved(base: Path, folder: str, *names: str, **options: Any) -> str:
    """A checkpoint with a head of these labels, as transformers writes it."""
    model = classifier(base, len(names), id2label=dict(enumerate(names)), **options)
    with torch.no_grad():
        model.classifier.weight.mul_(40)  # so that it is sure of something
    model.save_pretrained(folder)
    save_tokenizer(Path(folder))
    return folder


@pytest.fixture(scope="module")
def home(pico: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with checkpoints of every kind and rows for them."""
    from transformers import AutoModelForTokenClassification

    folder = tmp_path_factory.mktemp("evaluated")
    rows = opinions(40, 3)
    draw = random.Random(2)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        saved(pico(), "single", "bad", "good")
        saved(pico(), "pair", "no", "yes")
        saved(pico(), "several", "dull", "fine", "good", problem_type="multi_label_classification")
        saved(pico(), "real", "score", problem_type="regression")
        save_tokenizer(Path("words"))
        names = dict(enumerate(("O", "B-minus", "I-minus", "B-plus", "I-plus")))
        AutoModelForTokenClassification.from_pretrained(pico(), id2label=names).save_pretrained("words")
        texts = [(row["sentence"], ("bad", "good")[row["label"]]) for row in rows]
        lines = "\n".join(f'"{text},\n{text}",{label}' for text, label in texts)  # of two lines each, and empty ones
        Path("single.csv").write_text("text,label\n\n" + lines + "\n")
        write_rows(
            Path("pair.jsonl"),
            [{"sentence1": text, "sentence2": text[::-1], "label": draw.choice(("no", "yes"))} for text, _ in texts],
        )
        write_rows(
            Path("several.jsonl"),
            [
                {"text": text, "labels": draw.choice(([], ["dull"], ["dull", "good"], ["dull", "fine", "good"]))}
                for text, _ in texts
            ],
        )
        write_rows(Path("real.jsonl"), [{"text": text, "score": draw.random() * 5} for text, _ in texts])
        Path("words.conll").write_text(conll(sentences(23, 2)))
    return folder


FILES = {"single": "csv", "pair": "jsonl", "several": "jsonl", "real": "jsonl", "words": "conll"}


def asked(home: Path, kind: str, *flags: str) -> list[str]:
    file = home / f"{kind}.{FILES[kind]}"
    return ["eval", str(home / kind), "--validation-file", str(file), "--use-cpu", *flags]


def told(home: Path, kind: str, *flags: str) -> dict[str, Any]:
    result = invoke(*asked(home, kind, "--json", *flags))
    assert result.exit_code == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def shown(home: Path, kind: str, *flags: str) -> str:
    result = invoke(*asked(home, kind, *flags))
    assert result.exit_code == 0, result.stderr
    return str(result.stdout)


# -- each label, the matrix ---------------------------------------------------------------------------------------------


def test_a_report_shows_each_label_averages_and_calibration(home: Path) -> None:
    found = told(home, "single")
    text = shown(home, "single", "--report")
    for label, row in found["by_label"].items():
        cells = [f"{row[name]:.4f}" for name in ("precision", "recall", "f1")]
        assert re.search(rf"^{label} +{' +'.join(cells)} +{row['support']} *$", text, re.MULTILINE), text
    accuracy = f"{found['metrics']['accuracy']:.4f}"
    assert re.search(rf"^accuracy +{accuracy} +40 *$", text, re.MULTILINE)
    macro = [sum(row[name] for row in found["by_label"].values()) / 2 for name in ("precision", "recall", "f1")]
    assert re.search(rf"^macro avg +{' +'.join(f'{value:.4f}' for value in macro)} +40 *$", text, re.MULTILINE)
    assert re.search(r"^weighted avg( +0\.\d{4}){3} +40 *$", text, re.MULTILINE)
    assert f"expected calibration error  {found['ece']:.4f}" in text
    assert found["ece"] > 0.01
    assert "gold (down)" not in text
    plain = shown(home, "single")
    assert "macro avg" not in plain
    assert "calibration" not in plain


def test_the_confusion_matrix_counts_every_row_and_is_asked_for_by_itself(home: Path) -> None:
    found = told(home, "single")
    assert sum(map(sum, found["confusion"])) == found["examples"] == 40
    text = shown(home, "single", "--confusion")
    for label, counts in zip(found["labels"], found["confusion"], strict=True):
        assert re.search(rf"^{label} +{counts[0]} +{counts[1]} *$", text, re.MULTILINE)
    assert "precision" not in text
    both = shown(home, "single", "--confusion", "--report")
    assert both.index("weighted avg") < both.index("gold (down), predicted")


def test_several_labels_and_words_have_a_report_but_no_matrix(home: Path) -> None:
    for kind, label in (("several", "dull"), ("words", "plus")):
        text = shown(home, kind, "--report")
        assert re.search(rf"^{label}( +\d\.\d{{4}}){{3}} +\d+ *$", text, re.MULTILINE)
        assert "weighted avg" in text
        assert not re.search(r"^accuracy .* \d+ *$", text.partition("support")[2], re.MULTILINE)
        assert f"expected calibration error  {told(home, kind)['ece']:.4f}" in text
        refused = invoke(*asked(home, kind, "--confusion"))
        assert (refused.exit_code, refused.stdout) == (1, "")
        assert "requires a single-label classification task" in refused.stderr


def test_a_matrix_of_too_many_labels_is_a_note_and_the_evaluation_is_kept(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (metrics, sequence_classification):
        monkeypatch.setattr(module, "MOST_CONFUSED", 1)
    found = invoke(*asked(home, "single", "--confusion"))
    assert found.exit_code == 0
    assert "accuracy" in found.stdout
    assert "--confusion: too many labels for a matrix (2, at most 1); use --report" in found.stderr


@pytest.mark.parametrize("flag", ["--report", "--confusion"])
def test_a_regression_has_no_labels_to_report_on(home: Path, flag: str) -> None:
    refused = invoke(*asked(home, "real", flag))
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert f"{flag}: a regression has no labels; remove it" in refused.stderr
    assert not {"by_label", "confusion", "ece", "worst"} & set(told(home, "real"))


# -- the surest mistakes ------------------------------------------------------------------------------------------------


def records(home: Path, kind: str) -> list[dict[str, Any]]:
    invoke(*asked(home, kind, "--predictions", "all.jsonl"))
    return [json.loads(line) for line in Path("all.jsonl").read_text().splitlines()]


def test_the_worst_are_the_surest_wrong_answers_with_their_lines(home: Path) -> None:
    rows = records(home, "single")
    wrong = [n for n, row in enumerate(rows) if row["prediction"] != row["label"]]
    order = sorted(wrong, key=lambda n: -max(rows[n]["scores"].values()))
    assert len(order) > 5
    worst = told(home, "single", "--worst", "5")["worst"]
    assert [tuple(row) for row in worst] == [ROW] * 5
    lines = (home / "single.csv").read_text().splitlines()
    for row, expected in zip(worst, order, strict=False):
        assert row["prediction"] == rows[expected]["prediction"] != row["label"] == rows[expected]["label"]
        assert row["confidence"] == max(rows[expected]["scores"].values()) > 0.5
        file, _, line = row["place"].rpartition(", line ")
        assert file == str(home / "single.csv")
        assert lines[int(line) - 1].startswith(f'"{row["texts"][0].splitlines()[0]}')
    assert len(told(home, "single", "--worst", "99")["worst"]) == len(wrong)
    assert "worst" not in told(home, "single")
    first = told(home, "single", "--worst", "99", "--max-eval-samples", "7")["worst"]
    assert {row["place"] for row in first} == {f"{home / 'single.csv'}, line {2 * n + 3}" for n in wrong if n < 7}


def test_the_worst_of_several_labels_have_the_largest_error_of_any(home: Path) -> None:
    rows = records(home, "several")

    def error(row: dict[str, Any]) -> float:
        pairs = [(score, name in row["label"], name in row["prediction"]) for name, score in row["scores"].items()]
        return max((abs(score - gold) for score, gold, found in pairs if gold != found), default=0.0)

    expected = sorted((error(row) for row in rows if error(row)), reverse=True)
    worst = told(home, "several", "--worst", "40")["worst"]
    assert [row["confidence"] for row in worst] == pytest.approx(expected, abs=2e-6)
    assert 5 < len(worst) < 40  # those that are right are no mistakes
    assert all(set(row["label"]) != set(row["prediction"]) for row in worst)


def test_the_worst_of_a_regression_are_farthest_off(home: Path) -> None:
    rows = records(home, "real")
    worst = told(home, "real", "--worst", "3")["worst"]
    order = sorted(range(40), key=lambda n: -abs(rows[n]["prediction"] - rows[n]["label"]))
    assert [row["place"].rpartition(", ")[2] for row in worst] == [f"line {n + 1}" for n in order[:3]]
    for row in worst:
        assert row["error"] == pytest.approx(abs(row["prediction"] - row["label"]), abs=2e-6)
    text = shown(home, "real", "--worst", "3")
    assert figure(worst[0]["label"]) in text
    assert "error" in text
    assert "confidence" not in text


def test_the_worst_sentences_name_their_word(home: Path) -> None:
    rows = list(read_rows(home / "words.conll"))
    worst = told(home, "words", "--worst", "40")["worst"]
    assert len(worst) > 5
    assert [row["confidence"] for row in worst] == sorted((row["confidence"] for row in worst), reverse=True)
    for row in worst:
        (sentence,) = [it.cells for it in rows if row["place"].endswith(f", {it.place}")]
        assert row["texts"] == [" ".join(sentence["tokens"])]
        tags = [tag for word, tag in zip(sentence["tokens"], sentence["tags"], strict=True) if word == row["word"]]
        assert row["label"] in tags
        assert row["prediction"] != row["label"]
    assert re.search(
        r"^row +word +gold +predicted +confidence +text", shown(home, "words", "--worst", "2"), re.MULTILINE
    )


def test_rows_that_were_held_out_have_their_lines_in_the_whole_file(pico: Make) -> None:
    rows = opinions(60, 4)
    write_rows(
        Path("train.jsonl"), [{"text": f"{row['sentence']} {n}", "label": row["label"]} for n, row in enumerate(rows)]
    )
    settings = {"model": str(pico()), "ranks": "6,5,2", "use_cpu": True, "max_steps": 1, "output_dir": "run"}
    craft.train(RunConfig.build(settings | {"train_file": "train.jsonl", "validation_share": 0.5}))
    found = craft.evaluate("run", worst=30)
    assert found.examples == 30
    assert found.worst
    lines = Path("train.jsonl").read_text().splitlines()
    for row in found.worst:
        number = int(row["place"].removeprefix(f"{Path('train.jsonl').resolve()}, line "))
        assert json.loads(lines[number - 1])["text"] == row["texts"][0]


def test_both_splits_and_both_texts_are_shown(home: Path, pico: Make) -> None:
    saved(pico(), "nli", "entailment", "neutral", "contradiction")
    for split, seed in (("matched", 1), ("mismatched", 2)):
        pairs = [
            {"premise": f"{split} {row['sentence']}", "hypothesis": "good", "label": 1} for row in opinions(9, seed)
        ]
        write_rows(Path(f"mnli/validation_{split}.jsonl"), pairs)
    found = craft.evaluate("nli", source=DataSource(task="mnli", data_dir="mnli"), worst=18)
    assert found.worst
    splits = {row["texts"][0].split()[0]: row["place"].rpartition("/")[2].partition(".")[0] for row in found.worst}
    assert splits == {"matched": "validation_matched", "mismatched": "validation_mismatched"}
    assert all(row["texts"][1] == "good" for row in found.worst)
    text = invoke("eval", "nli", "--task", "mnli", "--data-dir", "mnli", "--worst", "18", "--use-cpu").stdout
    assert re.search(r"^validation_mismatched.jsonl, line \d +neutral +\w+ ", text, re.MULTILINE)
    pair = told(home, "pair", "--worst", "2")["worst"]
    table = shown(home, "pair", "--worst", "2")
    assert re.search(r"^row +gold +predicted +confidence +text +text 2", table, re.MULTILINE)
    assert all(text[:20] in table for row in pair for text in row["texts"])


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_texts_are_cut_to_the_width_of_the_terminal(width: int) -> None:
    rows = [
        {"place": "a, b.csv, line 1234", "label": "good", "prediction": "bad", "confidence": 0.98, "texts": [text]}
        for text in (f"first line\nsecond {'word ' * 90}", "\u6f22\u5b57" * 90, "[bold]brackets[/] \x1b[2J" + "x" * 200, "short")
    ]  # fmt: skip
    text = at(width, lambda: console.mistakes_table(rows))
    assert all(cell_len(line) <= width for line in text.splitlines())
    assert text.count("\u2026") == 3
    assert text.count("line 1234") == 4
    assert "b.csv" not in text
    assert "first line second word" in text
    assert "[bold]brackets[/]" in text
    assert "\x1b" not in text
    assert text.startswith("row ") == (width >= 80)  # else a text has lines of its own


def test_nothing_wrong_is_said(home: Path) -> None:
    for label in ("good", "bad"):
        write_rows(Path(f"{label}.jsonl"), [{"text": "the film was quite good", "label": label}])
    outputs = [
        invoke("eval", str(home / "single"), "--validation-file", f"{label}.jsonl", "--worst", "3", "--use-cpu").stdout
        for label in ("good", "bad")
    ]
    assert sum("no wrong answers" in text for text in outputs) == 1
    assert invoke(*asked(home, "single", "--worst", "0")).exit_code == 2
    assert (
        "--submission requires --split test, and cannot be combined with --predictions, --report, --confusion or --worst"
        in failure("eval", str(home / "single"), "--split", "test", "--submission", "s.zip", "--worst", "3")
    )
