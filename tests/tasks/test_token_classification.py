"""Words with tags: schemes and files, targets, losses and answers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from conftest import write_rows
from helpers import conll, problem, write

from craft_cli.config import RunConfig, TaskType
from craft_cli.data.batches import collate
from craft_cli.data.sources import DataSource, Split
from craft_cli.data.tokens import IGNORED, Encoded, encode
from craft_cli.errors import ConfigError, ModelError
from craft_cli.tasks import KINDS
from craft_cli.tasks.splits import Loaded, load_splits
from craft_cli.tasks.token_classification import TokenClassification

Make = Callable[..., Path]

TOKENS = ["the", "film", "was", "very", "good", "good", "book", "bad"]
IOB2 = ["O", "O", "O", "B-plus", "I-plus", "B-plus", "O", "B-minus"]
SCHEMES = {
    "IOB2": IOB2,
    "IOB1": ["O", "O", "O", "I-plus", "I-plus", "B-plus", "O", "I-minus"],
    "IOBES": ["O", "O", "O", "B-plus", "E-plus", "S-plus", "O", "S-minus"],
    "BILOU": ["O", "O", "O", "B-plus", "L-plus", "U-plus", "O", "U-minus"],
}
LABELS = ("O", "B-minus", "I-minus", "B-plus", "I-plus")
GOLD = [0, 0, 0, 3, 4, 3, 0, 1]


def read(path: str, **settings: Any) -> Loaded:
    return load_splits(DataSource(train_file=path, **settings), ["train"])


def task(**changed: Any) -> TokenClassification:
    return TokenClassification(labels=LABELS, text_columns=("tokens",), label_column="tags", **changed)


# -- reading ------------------------------------------------------------------------------------------------------------


def test_the_kinds_of_work_are_those_of_the_setting() -> None:
    assert set(KINDS) == set(get_args(TaskType))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_is_read_as_the_same_entities(scheme: str) -> None:
    loaded = read(write("t.conll", conll([(TOKENS, SCHEMES[scheme])])))
    assert (loaded.task.labels, loaded.splits["train"].labels) == (LABELS, [GOLD])
    note = [] if scheme == "IOB2" else [f"the tags of t.conll are {scheme}; they are converted to IOB2"]
    assert loaded.notes == note
    assert loaded.task.answers == ("minus", "plus")


def test_other_letters_and_separators_are_read_too() -> None:
    tags = ["B_plus", "M_plus", "E_plus", "S_plus", "O", "O", "O", "O"]
    loaded = read(write("t.conll", conll([(TOKENS, tags)])))
    assert loaded.splits["train"].labels == [[1, 2, 2, 1, 0, 0, 0, 0]]
    assert loaded.notes == ["the tags of t.conll are BMES; they are converted to IOB2"]


def test_tags_without_prefix_are_entities_of_neighbours() -> None:
    loaded = read(write("t.conll", conll([(TOKENS, ["O", "O", "O", "plus", "plus", "plus", "O", "minus"])])))
    assert loaded.splits["train"].labels == [[0, 0, 0, 3, 4, 4, 0, 1]]
    assert "no B- or I-" in loaded.notes[0]


def test_illegal_sequences_are_read_as_conlleval_does() -> None:
    rows = [(["a", "b", "c", "d"], ["I-plus", "I-minus", "O", "I-minus"]), (["a", "b"], ["B-plus", "I-plus"])]
    loaded = read(write("t.conll", conll(rows)))
    assert loaded.splits["train"].labels == [[3, 1, 0, 1], [3, 4]]
    assert "3 tags I-... of t.conll do not follow a tag of their type" in loaded.notes[0]


@pytest.mark.parametrize("form", [".conll", ".txt", "spaces", "crlf", ".jsonl", ".json", ".parquet", "saved", "flags"])
def test_every_form_of_file_gives_the_same_rows(form: str) -> None:
    rows = [(TOKENS, IOB2), (["never", "good"], ["O", "B-plus"])]
    columns = [{"tokens": words, "tags": tags} for words, tags in rows]
    settings: dict[str, Any] = {}
    if form in (".conll", ".txt"):
        path = write(f"t{form}", "-DOCSTART-\t-X-\tO\n\n" + conll(rows, "\tNN\t").replace("\n\n", "\n \t\n\n\n"))
    elif form in ("spaces", "crlf"):
        path = write("t.conll", conll(rows, "  x " if form == "spaces" else " ", "\r\n" if form == "crlf" else "\n"))
    elif form == ".json":
        path = write("t.json", json.dumps(columns))
    elif form == ".jsonl":
        path = str(write_rows(Path("t.jsonl"), [{"id": 1, "tokens": w, "ner_tags": t} for w, t in rows]))
    elif form == "flags":
        path = str(write_rows(Path("t.jsonl"), [{"w": words, "t": tags} for words, tags in rows]))
        settings = {"text_columns": ("w",), "label_column": "t"}
    else:
        from datasets import ClassLabel, Dataset, DatasetDict, Features, Sequence, Value

        names = [*LABELS[::-1]]
        features = Features({"tokens": Sequence(Value("string")), "ner_tags": Sequence(ClassLabel(names=names))})
        numbers = [{"tokens": w, "ner_tags": [names.index(tag) for tag in tags]} for w, tags in rows]
        path = "t.parquet"
        if form == ".parquet":
            Dataset.from_list(columns).to_parquet(path)
        else:
            DatasetDict({"train": Dataset.from_list(numbers, features)}).save_to_disk("saved")
    source = DataSource(data_dir="saved") if form == "saved" else DataSource(train_file=path, **settings)
    loaded = load_splits(source, ["train"])
    split = loaded.splits["train"]
    assert loaded.task.kind == "token-classification"
    assert (loaded.task.labels, split.labels) == (LABELS, [GOLD, [0, 3]])
    assert split.texts == [tuple(TOKENS), ("never", "good")]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("a O\nb\n", "t.conll, line 2: every word needs a tag in the last column, or none; 'b' has none"),
        ("a\nb O\n", "t.conll, line 2: every word needs a tag in the last column, or none; 'b' has one, 'O'"),
        ("a O\n\nb 3\n", "t.conll, line 3: tag 3 is a number without a name"),
        ("a B-x\n\nb O\nc y\n", "t.conll, line 3: tag 'y' has no prefix"),
        ("a O\n", "column 'tags' has no entity"),
        ("a\nb\n", "t.conll has no column 'tags'; it has tokens (choose with --label-column)"),
        ("EU NNP I-NP B-ORG\nrejects VBZ I-VP\n", "t.conll, line 2: 3 columns, but the lines before it have 4"),
        ("a B-x\nb B-\n", "t.conll, line 1: tag 'B-' has no entity type"),
        ("a o\nb b-x\n", "t.conll, line 1: tag 'o': write O, B- and I- in capitals"),
        ("a *\nb (PER*\n", "t.conll, line 1: tag '*' uses the brackets of CoNLL-2005 and CoNLL-2012"),
    ],
)
def test_what_cannot_be_read_is_told_with_its_line(content: str, told: str) -> None:
    assert told in problem(read, write("t.conll", content), task_type="token-classification")


def test_rows_that_cannot_be_used_are_told() -> None:
    good = {"tokens": ["a", "b"], "tags": ["B-x", "O"]}
    for row, told in (
        ({"tokens": ["a"], "tags": ["O", "O"]}, "t.jsonl, line 2: 2 tags for 1 words; every word needs one"),
        ({"tokens": "a b", "tags": ["O", "O"]}, "t.jsonl, line 2: column 'tokens' has no list of words"),
        ({"tokens": ["a"], "tags": None}, "t.jsonl, line 2: column 'tags' has no list of tags"),
        ({"tokens": ["a"], "tags": [1]}, "t.jsonl, line 2: tag 1 is a number without a name"),
    ):
        assert told in problem(read, str(write_rows(Path("t.jsonl"), [good, row])))
    train, other = (write(f"{name}.conll", f"a B-{name}\n") for name in "xy")
    source = DataSource(train_file=train, validation_file=other)
    told = "y.conll, line 1: 'y' is not an entity type of the training (x)"
    assert problem(load_splits, source, ["train", "validation"]) == told
    for source in (
        DataSource(train_file=train, task_type="token-classification", task="sst2"),
        DataSource(train_file=train, problem_type="regression"),
    ):
        with pytest.raises(ConfigError, match=r"remove it"):
            load_splits(source, ["train"])


def test_a_word_may_begin_as_a_comment_does() -> None:
    loaded = read(write("t.conll", "#a=b\tO\nc\tB-x\n\n# text = c\n#a=b B-x\n"))
    assert loaded.splits["train"].texts == [("#a=b", "c"), ("#a=b",)]


def test_a_tag_may_hold_any_character() -> None:
    kinds = ["[/pos]", "a,b", "x\ny", "\x1b[31m", "B-x", "O"]
    path = write_rows(Path("t.jsonl"), [{"tokens": ["a"] * len(kinds), "tags": [f"B-{kind}" for kind in kinds]}])
    task = read(str(path)).task
    assert task.answers == tuple(sorted(kinds))


def test_tags_of_which_none_is_outside_are_pointed_out() -> None:
    loaded = read(write("t.conll", "a -\nb PER\n"))
    assert "; no tag is O, so every word is part of an entity" in loaded.notes[0]
    assert "no tag is O" not in read(write("t.conll", "a O\nb PER\n")).notes[0]


def test_rows_to_evaluate_on_without_an_entity_are_pointed_out() -> None:
    splits = {"train": Split([("a", "b")], [[1, 3]], "here"), "validation": Split([("c",)], [[0]], "there")}
    assert task().notes(splits) == ["there has no entity, so precision, recall and f1 will be 0"]
    splits["validation"] = Split([("c",)], [[3]], "there")
    assert task().notes(splits) == []


def test_text_files_of_texts_are_no_tags() -> None:
    assert problem(read, write("t.txt", "a text\nanother text\n")).startswith("t.txt: unknown file format")
    assert "expected one of train.jsonl" in problem(load_splits, DataSource(data_dir="."), ["train"])
    write("train.txt", "a B-x\n")
    assert load_splits(DataSource(data_dir="."), ["train"]).task.kind == "token-classification"


# -- tokens -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tokenizer(pico: Make) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(pico())


def encoded(tokenizer: Any, limit: int = 40, cache: Path | None = None) -> Encoded:
    """A word of three tokens, a word of none, and a sentence that is longer than 9 tokens."""
    split = Split([("good-film", " ", "bad"), ("the",) * 9], [[3, 4, 1], [0] * 8 + [3]], "here")
    return task().encode(split, tokenizer, limit, cache=cache)


def test_the_tag_of_a_word_is_the_target_of_its_first_token(tokenizer: Any) -> None:
    found = encoded(tokenizer, 9)
    assert found.words == [[1, -1, 4], [1, 2, 3, 4, 5, 6, 7, -1, -1]]
    assert found.targets == [[IGNORED, 3, IGNORED, IGNORED, 1, IGNORED], [IGNORED, *[0] * 7, IGNORED]]
    assert (found.weights, found.cut, found.lengths) == ([2.0, 7.0], 1, [6, 9])
    assert all("words" not in feature for feature in found.features)


def test_padding_has_no_target_on_either_side(tokenizer: Any) -> None:
    found = encoded(tokenizer)
    for side in ("right", "left"):
        tokenizer.padding_side = side
        batch = collate(found, [0, 1], tokenizer)
        assert batch.targets is not None
        assert batch.words is not None
        assert batch.targets.shape == batch.inputs["input_ids"].shape == (2, 11)
        assert (batch.targets[batch.inputs["attention_mask"] == 0] == IGNORED).all()
        assert [int(batch.targets[0, place]) for place in batch.words[0] if place >= 0] == [3, 1]
        assert int((batch.targets != IGNORED).sum()) == sum(found.weights)


def test_words_come_back_from_the_cache(tokenizer: Any, tmp_path: Path) -> None:
    split = Split([("good-film", "bad"), ("the",)] * 1100, [[3, 1], [0]] * 1100, "here")
    first = task().encode(split, tokenizer, 40, cache=tmp_path)
    files = list((tmp_path / "tokens").iterdir())
    assert task().encode(split, tokenizer, 40, cache=tmp_path) == first
    assert first.words == [[1, 4], [1]] * 1100
    encode(split.select([0] * 2000), tokenizer, 40, cache=tmp_path)  # the same words as pairs of texts are others
    assert len(list((tmp_path / "tokens").iterdir())) == len(files) + 1


@pytest.mark.parametrize("form", ["as gpt2", "as llama 3", "with a blank of its own"])
def test_a_byte_level_tokenizer_sees_every_word_after_a_blank(form: str) -> None:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    rules = Tokenizer(models.BPE(letters | {"<pad>": 300}, []))
    rules.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=form.startswith("with"))
    if form == "as llama 3":
        split = pre_tokenizers.Split(Regex(r" ?[^\s']+|'\w"), "isolated")
        rules.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=rules, pad_token="<pad>", model_max_length=40)
    found = task().encode(Split([("ab", "c's")], None, "here"), tokenizer, 40)
    expected = ["\u0120", "a", "b", "\u0120", "c", "'", "s"]
    assert tokenizer.convert_ids_to_tokens(found.features[0]["input_ids"]) == expected == tokenizer(" ab c's").tokens()
    assert (found.words, found.targets, found.weights) == ([[0, 3]], None, [1.0])


def test_a_slow_tokenizer_is_refused() -> None:
    slow = type("Slow", (), {"is_fast": False, "name_or_path": "somewhere", "model_max_length": 9})()
    slow.num_special_tokens_to_add = lambda pair: 2
    with pytest.raises(ModelError, match=r"somewhere: its tokenizer does not map tokens to words; .* tokenizer\.json"):
        task().encode(Split([("a",)], None, "here"), slow, 9)


# -- metrics ------------------------------------------------------------------------------------------------------------


class Fixed(torch.nn.Module):
    """A model that says I-plus of every token."""

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        logits = torch.nn.functional.one_hot(torch.full_like(input_ids, 4), len(LABELS)).float()
        return type("Output", (), {"logits": logits * 3})()


def test_words_without_token_or_beyond_the_length_count_as_outside(tokenizer: Any) -> None:
    rows = encoded(tokenizer, 9)
    scores = task().scores(Fixed(), collate(rows, [0, 1], tokenizer))
    assert [tuple(row.shape) for row in scores] == [(3, 5), (9, 5)]
    assert all(row.dtype == torch.float32 for row in scores)
    split = Split([("good-film", " ", "bad"), ("the",) * 9], [[3, 4, 1], [0] * 8 + [3]], "here")
    first, second = task().records(scores, split)
    spans = [(entity["start"], entity["end"], entity["text"]) for entity in first["prediction"]]
    assert spans == [(0, 9, "good-film"), (12, 15, "bad")]
    assert [entity["text"] for entity in first["label"]] == ["good-film  ", "bad"]
    assert [len(entity["text"].split()) for entity in second["prediction"]] == [7]
    measured = task().measure(scores, rows.labels or [])
    assert measured["accuracy"] == pytest.approx(1 / 12)  # the word beyond the length that is outside
    assert measured["loss"] == pytest.approx(math.log(math.exp(3) + 4))  # of the words that have a token


def test_the_mistake_of_a_sentence_is_its_surest_wrong_word() -> None:
    logits = torch.zeros(4, 5)
    logits[[0, 1, 2], [0, 3, 4]] = torch.tensor([9.0, 2.0, 3.0])
    logits[3] = -torch.inf  # no token: nothing was said of it
    split = Split([("the", "film", "was", "good")] * 2, [[0, 1, 0, 3], [0, 3, 4, 3]], "here")
    ((sure, row),) = task().mistakes([logits, logits], split)
    confidence = math.exp(3) / (math.exp(3) + 4)
    assert sure == pytest.approx(confidence)
    assert row == {
        "place": "here, row 1", "word": "was", "label": "O", "prediction": "I-plus",
        "confidence": pytest.approx(confidence, abs=1e-6), "texts": ["the film was good"],
    }  # fmt: skip
    assert not [*task().mistakes([torch.zeros(0, 5)], Split([()], [[]], "here"))]


def test_the_loss_is_a_sum_over_words(tokenizer: Any) -> None:
    rows = encoded(tokenizer)
    each = math.log(math.exp(3) + 4)
    assert float(task().loss(Fixed(), collate(rows, [0, 1], tokenizer))) == pytest.approx(each * sum(rows.weights))
    config = RunConfig.build({"task": "sst2", "class_weights": "balanced"})
    weighted = task().for_training(config, rows.labels or [])
    expected = [12 / (5 * count) for count in (8, 1, 1, 2, 1)]
    assert weighted.class_weights == pytest.approx(expected)
    total = sum(expected[label] for label in (3, 1, *[0] * 8, 3))
    assert float(weighted.loss(Fixed(), collate(rows, [0, 1], tokenizer))) == pytest.approx(each * total)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"a O\rb O\n", "line 1: the line contains a carriage return; convert the file with: tr"),
        (b"a\tO\n\tO\n", "line 2: a tag without a word"),
        (b"a\tO\nb\t\n", "line 2: a tab without a tag after it"),
    ],
)
def test_lines_that_would_lose_something_are_refused(content: bytes, told: str) -> None:
    Path("t.conll").write_bytes(content)
    assert told in problem(read, "t.conll")


def test_a_line_of_a_tab_alone_divides_sentences() -> None:
    Path("t.conll").write_bytes(b"a\tB-x\n\t\nb\tO\n")
    assert read("t.conll").splits["train"].texts == [("a",), ("b",)]


def test_sentences_without_words_are_measured_too() -> None:
    measured = task().measure([torch.zeros(0, 5)], [[]])
    assert all(math.isfinite(value) for value in measured.values())
    assert task().baseline([[3]], [[3, 0], [0]]) == {"f1": 0.0, "precision": 0.0, "recall": 0.0, "accuracy": 2 / 3}
