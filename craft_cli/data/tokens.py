"""Texts, or sentences in words, to token ids, kept between runs; token ids to padded batches."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from craft_cli.data.sources import Split
from craft_cli.errors import DataError, FileError, ModelError
from craft_cli.files import read_tensors, write_tensors

KIND = "token ids"
_WORDS = "words"
_ROWS_AT_ONCE, _AT_ONCE = 1000, 4_000_000
"""Rows and characters that are tokenised together."""
_FAR = 1000
"""Of a text with more characters than so many for each token, the rest is looked at only where those are too few tokens."""
_ROWS_WORTH_KEEPING = 2000
"""Fewer are tokenised again sooner than a file is found."""


IGNORED = -100
"""The target of a token that has none, as torch's losses take it."""


@dataclass(frozen=True)
class Encoded:
    """Token ids of one split, not padded.

    Attributes:
        features: for each row the tokenizer's lists (`input_ids` and what the model needs beside them).
        labels: gold of each row; None where it is not known.
        cut: how many rows were longer than allowed.
        limit: tokens allowed.
        words: for each row of words the place of every word's first token, -1 where it has none (or it was cut).
        targets: for each row a target for each of its tokens, `IGNORED` where there is none; without, the target of a row
            is its gold.
    """

    features: list[dict[str, list[int]]]
    labels: list[Any] | None
    cut: int = 0
    limit: int = 0
    words: list[list[int]] | None = None
    targets: list[list[int]] | None = None

    def __len__(self) -> int:
        return len(self.features)

    def only(self, rows: Sequence[int]) -> Encoded:
        """These rows alone."""

        def of(column: list[Any] | None) -> list[Any] | None:
            return None if column is None else [column[row] for row in rows]

        return replace(
            self,
            features=[self.features[row] for row in rows],
            labels=of(self.labels),
            words=of(self.words),
            targets=of(self.targets),
        )

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return [len(feature["input_ids"]) for feature in self.features]

    @cached_property
    def weights(self) -> list[float]:
        """How many targets each row has in a loss, 1 where the row itself is one: a loss is divided by their sum."""
        if self.targets is None:
            return [1.0] * len(self)
        return [float(sum(target != IGNORED for target in row)) for row in self.targets]


@dataclass
class Unseen:
    """How much of some rows no model sees: what was cut, words without a token."""

    rows: int = 0
    cut: int = 0
    limit: int = 0
    words: int = 0
    without: int = 0

    def add(self, encoded: Encoded) -> Unseen:
        """Count these rows too; itself."""
        places = [place for row in encoded.words or [] for place in row]
        self.rows, self.cut, self.limit = self.rows + len(encoded), self.cut + encoded.cut, encoded.limit
        self.words, self.without = self.words + len(places), self.without + sum(place < 0 for place in places)
        return self

    def note(self, origin: str, asked: int | None = None) -> str:
        """A line for the user; empty where all is seen.

        Args:
            origin: where the rows come from.
            asked: the length that the user wants; a model may take less.
        """
        why = "--max-seq-length" if asked in (None, self.limit) else "the model takes no more"
        parts = []
        if self.cut:
            share = f"{self.cut:,} of {self.rows:,} rows of {origin}"
            parts.append(f"{share} are longer than {self.limit} tokens and were cut ({why})")
        if self.without:
            share = f"{self.without:,} of {self.words:,} words{'' if parts else f' of {origin}'}"
            parts.append(
                f"{share} {'has' if self.without == 1 else 'have'} no token and count{'s' if self.without == 1 else ''} as O"
            )
        return "; ".join(parts)


def encode(
    split: Split,
    tokenizer: Any,
    max_seq_length: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
    cache: Path | None = None,
    *,
    of_words: bool = False,
) -> Encoded:
    """Tokenise a split in blocks of rows; of a pair the longer text is cut first.

    More than two texts are one, with the tokenizer's separator between them.

    Args:
        split: texts, and gold where it is known.
        tokenizer: of transformers.
        max_seq_length: tokens kept of each row; never more than the tokenizer's own limit.
        progress: called with (rows done, rows in all).
        cache: folder to keep the ids in, found again by texts, tokenizer and length.
        of_words: a row is the words of a sentence, not one text or several.

    Raises:
        DataError: so few tokens leave no room for any text.
        ModelError: the tokenizer cannot tell which tokens a word became.
    """
    limit = min(max_seq_length, tokenizer.model_max_length)
    if not of_words and any(len(row) > 2 for row in split.texts[:1]):
        between = separator(tokenizer)
        split = replace(split, texts=[(between.join(row),) for row in split.texts])
    kept = None
    if (
        cache is not None and len(split) >= _ROWS_WORTH_KEEPING and tokenizer.is_fast
    ):  # of others the rules are not known
        kept = cache / "tokens" / f"{_key(split.texts, tokenizer, limit, of_words)}.safetensors"
        try:
            features, cut = _unpack(read_tensors(kept, KIND)[0])
            return _encoded(features, split, cut, limit, of_words=of_words)
        except (FileError, KeyError, RuntimeError):
            pass  # not there, or damaged: made again
    _check_room(tokenizer, limit, pair=not of_words and any(len(row) > 1 for row in split.texts[:1]))
    features, cut = [], 0
    for block in _blocks(split.texts, tokenizer, limit, of_words=of_words):
        found, longer = _tokenise(block, tokenizer, limit, of_words=of_words)
        features += found
        cut += longer
        progress(len(features), len(split))
    if kept is not None:
        write_tensors(kept, KIND, _pack(features, cut), {"rows": len(features)})
    return _encoded(features, split, cut, limit, of_words=of_words)


def separator(tokenizer: Any) -> str:
    """What stands between more than two texts: the tokenizer's separator, else its end of text, else a line end."""
    return str(tokenizer.sep_token or tokenizer.eos_token or "\n")


def _check_room(tokenizer: Any, limit: int, *, pair: bool) -> None:
    around = tokenizer.num_special_tokens_to_add(pair=pair)
    if limit <= around:
        raise DataError(
            f"--max-seq-length {limit} leaves no room for text: this tokenizer puts {around} tokens of its own into every row"
        )


def _blocks(
    texts: Sequence[tuple[str, ...]], tokenizer: Any, limit: int, *, of_words: bool
) -> Iterator[list[tuple[str, ...]]]:
    """Rows to tokenise at once: some, and never many characters, however long a text is."""
    block: list[tuple[str, ...]] = []
    held = 0
    for row in texts:
        if sum(map(len, row)) > _FAR * limit:
            row = _first_words(row, tokenizer, limit) if of_words else row
            row = tuple(near_end(text, tokenizer, limit) for text in row)
        held += sum(map(len, row))
        block.append(row)
        if len(block) == _ROWS_AT_ONCE or held > _AT_ONCE:
            yield block
            block, held = [], 0
    if block:
        yield block


def near_end(text: str, tokenizer: Any, limit: int) -> str:
    """Of a long text so much that more of it would be cut away."""
    size, left = _FAR * limit, tokenizer.truncation_side == "left"
    while len(text) > size:
        part = _head(text[::-1], size)[::-1] if left else _head(text, size)
        if len(tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]) > limit:
            return part
        size *= 2
    return text


def _head(text: str, size: int) -> str:
    """About so many characters, up to white space where there is any: no token goes on behind it."""
    end = next((end for end in range(size, size // 2, -1) if text[end].isspace()), size)
    return text[:end].rstrip()


def _first_words(words: tuple[str, ...], tokenizer: Any, limit: int) -> tuple[str, ...]:
    """Of a long sentence so many words that more of it would be cut away."""
    count = limit
    while len(words) > count and tokenizer.truncation_side == "right":
        part = list(words[:count])
        ids = tokenizer(part, is_split_into_words=True, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) > limit:
            return words[:count]
        count *= 2
    return words


def _tokenise(
    texts: Sequence[tuple[str, ...]], tokenizer: Any, limit: int, *, of_words: bool
) -> tuple[list[dict[str, list[int]]], int]:
    """Features of some rows, and how many were cut; of rows of words with the number of each token's word."""
    columns: list[list[Any]] = [list(column) for column in zip(*texts, strict=True)] if not of_words else []
    options = {}
    if of_words:
        blank = _blank_before_words(tokenizer)
        columns, options = [[[blank + word for word in row] for row in texts]], {"is_split_into_words": True}
    batch = tokenizer(*columns, truncation="longest_first", max_length=limit, **options)
    if tokenizer.is_fast:
        cut = sum(bool(encoding.overflowing) for encoding in batch.encodings)
    else:  # whether they were longer is seen without a limit
        full = [row for row, ids in enumerate(batch["input_ids"]) if len(ids) >= limit]
        whole = (
            tokenizer(*[[column[row] for row in full] for column in columns], verbose=False)
            if full
            else {"input_ids": []}
        )
        cut = sum(len(ids) > limit for ids in whole["input_ids"])
    features = []
    for row in range(len(batch["input_ids"])):
        feature = {name: batch[name][row] for name in batch if name != "attention_mask"}
        if of_words:
            feature[_WORDS] = [-1 if word is None else word for word in batch.word_ids(row)]
        if not feature["input_ids"]:  # nothing stands around a text, and there is none: a model needs one token
            feature = {name: [0] for name in feature} | {"input_ids": [_blank(tokenizer)]}
            feature |= {_WORDS: [-1]} if of_words else {}
        features.append(feature)
    return features, cut


def _blank(tokenizer: Any) -> int:
    """The one token of a text without tokens, the same for every such text."""
    usual = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return next((token for token in usual if token is not None), 0)


def _encoded(features: list[dict[str, list[int]]], split: Split, cut: int, limit: int, *, of_words: bool) -> Encoded:
    """Of rows of words each word's gold is the target of its first token."""
    if not of_words:
        return Encoded(features, split.labels, cut, limit)
    words = []
    for feature, text in zip(features, split.texts, strict=True):
        places = [-1] * len(text)
        for place, word in enumerate(feature.pop(_WORDS)):
            if word >= 0 and places[word] < 0:
                places[word] = place
        words.append(places)
    targets = None
    if split.labels is not None:
        targets = [[IGNORED] * len(feature["input_ids"]) for feature in features]
        for row, places, labels in zip(targets, words, split.labels, strict=True):
            for place, label in zip(places, labels, strict=True):
                if place >= 0:
                    row[place] = label
    return Encoded(features, split.labels, cut, limit, words, targets)


def _blank_before_words(tokenizer: Any) -> str:
    """What a byte-level tokenizer must be given before each word, so that it sees it as in running text.

    Raises:
        ModelError: the tokenizer cannot tell which tokens a word became.
    """
    if not tokenizer.is_fast:
        raise ModelError(
            f"{tokenizer.name_or_path}: its tokenizer cannot tell which tokens a word became; it needs a tokenizer.json"
        )
    rules = json.loads(tokenizer.backend_tokenizer.to_str()).get("pre_tokenizer") or {}
    steps = [step for step in (rules, *rules.get("pretokenizers", ())) if step.get("type") == "ByteLevel"]
    return " " if steps and not any(step["add_prefix_space"] for step in steps) else ""


def _key(texts: Sequence[tuple[str, ...]], tokenizer: Any, limit: int, of_words: bool) -> str:
    """A checksum of all that decides the ids: the texts, the length, and the tokenizer with every setting of it."""
    import tokenizers
    import transformers

    rules = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}  # of the last call
    settings = {
        name: repr(value)
        for name, value in tokenizer.init_kwargs.items()
        if not name.endswith(("_file", "_path")) and name != "chat_template"
    }
    parts = {
        "versions": [transformers.__version__, tokenizers.__version__],
        "class": type(tokenizer).__name__,
        "rules": rules,
        "settings": settings,
        "special": repr(tokenizer.special_tokens_map),
        "inputs": tokenizer.model_input_names,
        "cut": [limit, tokenizer.truncation_side],
        "words": of_words,
    }
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
    for row in texts:
        digest.update(json.dumps(row).encode())
    return digest.hexdigest()[:32]


def _pack(features: Sequence[dict[str, list[int]]], cut: int) -> dict[str, Tensor]:
    """Every list in one long tensor, with the number of tokens of each row."""
    lengths = torch.tensor([len(feature["input_ids"]) for feature in features])
    packed = {
        name: torch.tensor([token for feature in features for token in feature[name]], dtype=torch.int32)
        for name in features[0]
    }
    return packed | {"lengths": lengths, "cut": torch.tensor([cut])}


def _unpack(packed: dict[str, Tensor]) -> tuple[list[dict[str, list[int]]], int]:
    lengths, cut = packed.pop("lengths").tolist(), int(packed.pop("cut")[0])
    rows = {name: [part.tolist() for part in tensor.split(lengths)] for name, tensor in packed.items()}
    return [dict(zip(rows, parts, strict=True)) for parts in zip(*rows.values(), strict=True)], cut
