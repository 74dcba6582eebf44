"""Texts to token ids, the cache of them, and batches."""

from __future__ import annotations

import random
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from craft_cli.data import tokens
from craft_cli.data.batches import collate, padding
from craft_cli.data.sources import Split
from craft_cli.data.tokens import Encoded, encode


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
    inputs, labels, *_ = collate(encoded, [1, 0], tokenizer)
    assert inputs["input_ids"].shape == inputs["attention_mask"].shape == (2, 4)
    assert inputs["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert int(inputs["input_ids"][0, 3]) == tokenizer.pad_token_id
    assert labels is not None
    assert torch.equal(labels, torch.tensor([0, 1]))


def test_only_the_first_rows() -> None:
    split = Split([("a",), ("b",), ("c",)], [0, 1, 0], "here")
    assert split.first(2) == Split([("a",), ("b",)], [0, 1], "here")
    assert split.first(None) is split
    assert len(split.first(9)) == 3
    assert Encoded([{"input_ids": [1, 2]}], [0]).lengths == [2]


def rows_to_keep(count: int = 2100) -> Split:
    return Split(
        [("the " * (row % 7 + 1) + "good",) for row in range(count)], [row % 2 for row in range(count)], "here"
    )


class Unused:
    """A tokenizer that must not be asked for ids."""

    def __init__(self, tokenizer: Any) -> None:
        for name in (
            "backend_tokenizer",
            "model_max_length",
            "is_fast",
            "init_kwargs",
            "special_tokens_map",
            "model_input_names",
            "truncation_side",
        ):
            setattr(self, name, getattr(tokenizer, name))

    def num_special_tokens_to_add(self, pair: bool) -> int:
        return 2


Unused.__name__ = "PreTrainedTokenizerFast"


def test_ids_are_kept_between_runs_and_found_by_texts_length_and_tokenizer(tokenizer: Any, tmp_path: Path) -> None:
    split = rows_to_keep()
    first = encode(split, tokenizer, 6, cache=tmp_path)
    unused: Any = type(type(tokenizer).__name__, (Unused,), {})(tokenizer)
    assert encode(split, unused, 6, cache=tmp_path) == first
    assert first.cut > 0
    for other, length in ((split, 5), (rows_to_keep(2101), 6)):
        with pytest.raises(TypeError):
            encode(other, unused, length, cache=tmp_path)
    (kept,) = (tmp_path / "tokens").iterdir()
    kept.write_bytes(kept.read_bytes()[:-5])
    assert encode(split, tokenizer, 6, cache=tmp_path) == first  # damaged: made again


def test_few_rows_are_not_kept(tokenizer: Any, tmp_path: Path) -> None:
    encode(rows_to_keep(50), tokenizer, 6, cache=tmp_path)
    assert not list(tmp_path.iterdir())


def test_rows_cut_are_counted_and_rows_that_just_fit_are_not(tokenizer: Any) -> None:
    texts: list[tuple[str, ...]] = [("the " * 3,), ("the " * 4,), ("the " * 5,), ("the " * 30,)]
    encoded = encode(Split(texts, None, "here"), tokenizer, 6)
    assert (encoded.cut, encoded.limit, encoded.lengths) == (2, 6, [5, 6, 6, 6])
    assert encode(Split([("good", "the " * 30)], None, "here"), tokenizer, 9).cut == 1


@pytest.mark.parametrize("text", ["", "   ", "\x00\x07", "\U0001f600\U0001f468\u200d\U0001f469", "\u202e caf\u00e9"])
def test_odd_texts_have_at_least_their_special_tokens(tokenizer: Any, text: str) -> None:
    encoded = encode(Split([(text,), ("good",)], [0, 1], "here"), tokenizer, 8)
    assert min(encoded.lengths) >= 2
    assert collate(encoded, [0, 1], tokenizer)[0]["input_ids"].shape[0] == 2


def test_padding_is_the_part_of_a_batch_that_is_no_token() -> None:
    assert padding([4, 1, 3], [[0, 1], [2]]) == pytest.approx(3 / 11)
    assert padding([4, 4], [[0, 1]]) == 0


@pytest.mark.parametrize(
    "changed",
    [
        {"truncation_side": "left"},
        {"unk_token": "good"},
        {"model_input_names": ["input_ids"]},
        {"split_special_tokens": True},
    ],
    ids=str,
)
def test_ids_of_another_setting_of_the_tokenizer_are_never_served(changed: Any, pico: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    split = rows_to_keep()
    one, other = AutoTokenizer.from_pretrained(pico()), AutoTokenizer.from_pretrained(pico(), **changed)
    encode(split, one, 4, cache=tmp_path)
    assert encode(split, other, 4, cache=tmp_path) == encode(split, other, 4)
    assert len(list((tmp_path / "tokens").iterdir())) == 2
    encode(split, AutoTokenizer.from_pretrained(pico(), **changed), 4, cache=tmp_path)
    assert len(list((tmp_path / "tokens").iterdir())) == 2  # and the same setting is found again


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_of_a_long_text_only_what_counts_is_read(
    side: str, family: str, pico: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(pico(family), truncation_side=side)
    draw = random.Random(3)
    blanks = (" ", "  ", "\n ", "\u3000", "")
    texts = [
        "".join(draw.choice(("the", "film", "x" * 50, "good,", "\u00e9")) + draw.choice(blanks) for _ in range(400))
        for _ in range(8)
    ]
    texts.append("\x00" * 900 + "good " * 100)  # hardly a token at its beginning
    rows: list[tuple[str, ...]] = [*[(text,) for text in texts]]
    pairs: list[tuple[str, ...]] = [(text, "good") for text in texts]
    for some in (rows, pairs):
        whole = encode(Split(some, None, "here"), tokenizer, 12)
        with monkeypatch.context() as patch:
            patch.setattr("craft_cli.data.tokens._FAR", 8)
            patch.setattr("craft_cli.data.tokens._AT_ONCE", 500)
            assert encode(Split(some, None, "here"), tokenizer, 12) == whole
    assert whole.cut == len(texts)


def test_of_a_sentence_with_many_words_only_the_first_are_read(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sentence = ("\x00", *["the", "film"] * 300)
    split = Split([sentence, ("good",)], [[0] * len(sentence), [0]], "here")
    whole = encode(split, tokenizer, 12, of_words=True)
    monkeypatch.setattr("craft_cli.data.tokens._FAR", 8)
    assert encode(split, tokenizer, 12, of_words=True) == whole
    assert len(whole.words[0] if whole.words else []) == len(sentence)


def test_of_a_long_word_only_the_beginning_is_read(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    split = Split([("good", "good-film-" * 300, "bad")], [[1, 2, 0]], "here")
    whole = encode(split, tokenizer, 12, of_words=True)
    monkeypatch.setattr("craft_cli.data.tokens._FAR", 8)
    (block,) = tokens._blocks(split.texts, tokenizer, 12, of_words=True)
    assert sum(map(len, block[0])) < 300
    assert encode(split, tokenizer, 12, of_words=True) == whole
    assert whole.words == [[1, 2, -1]]


@pytest.mark.slow
def test_a_text_of_a_hundred_megabytes_needs_little_more_than_itself(tokenizer: Any) -> None:
    text = "the film was good " * (100 * 10**6 // 18)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    encoded = encode(Split([(text,)], None, "here"), tokenizer, 128)
    assert (encoded.cut, encoded.lengths) == (
        1,
        [tokenizer.model_max_length if tokenizer.model_max_length < 128 else 128],
    )
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024  # KiB
