"""Texts to token ids, the cache of them, and batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from craft_cli.data.sources import Split
from craft_cli.data.tokens import Encoded, collate, encode, padding


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
    inputs, labels, _ = collate(encoded, [1, 0], tokenizer)
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
        self.backend_tokenizer, self.model_max_length = tokenizer.backend_tokenizer, tokenizer.model_max_length

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
