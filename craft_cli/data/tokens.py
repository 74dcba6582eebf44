"""Tokenize texts, or sentences split into words, with a cache on disk."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
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
"""Maximum rows and characters to tokenize at once."""
_FAR = 1000
"""Characters per token to tokenize first; the rest of a longer text is tokenized only if these give too few tokens."""
_ROWS_WORTH_KEEPING = 2000
"""Minimum number of rows to cache; fewer are faster to tokenize again."""


IGNORED = -100
"""Target of a token to ignore, as in torch's losses."""


@dataclass(frozen=True)
class Encoded:
    """Token ids of one split, without padding.

    Attributes:
        features: the tokenizer's output for each row (`input_ids` and the other model inputs).
        labels: the gold of each row; None if unknown.
        cut: number of truncated rows.
        limit: maximum tokens per row.
        words: the position of every word's first token, -1 for a word without a token (or truncated).
        targets: a target for each token, `IGNORED` for none. Default: the target of a row is its gold.
        segments: of packed rows, the number of the row within its sequence for each token, see `packing`.
    """

    features: list[dict[str, list[int]]]
    labels: list[Any] | None
    cut: int = 0
    limit: int = 0
    words: list[list[int]] | None = None
    targets: list[list[int]] | None = None
    segments: list[list[int]] | None = None

    def __len__(self) -> int:
        return len(self.features)

    def only(self, rows: Sequence[int]) -> Encoded:
        """A subset of the rows."""

        def of(column: list[Any] | None) -> list[Any] | None:
            return None if column is None else [column[row] for row in rows]

        return replace(
            self,
            features=[self.features[row] for row in rows],
            labels=of(self.labels),
            words=of(self.words),
            targets=of(self.targets),
            segments=of(self.segments),
        )

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row, or of each sequence of packed rows."""
        return [len(feature["input_ids"]) for feature in self.features]

    @property
    def row_lengths(self) -> list[int]:
        """Tokens of each row, packed or not."""
        if self.segments is None:
            return self.lengths
        return [length for segments in self.segments for _, length in sorted(Counter(segments).items())]

    def count(self, sequences: Sequence[int]) -> int:
        """Number of rows in these sequences; without packing, each is one row."""
        if self.segments is None:
            return len(sequences)
        return sum(self.segments[number][-1] + 1 for number in sequences)

    @cached_property
    def weights(self) -> list[float]:
        """Number of loss targets of each row, 1 if the row is the target; a loss is divided by their sum."""
        if self.targets is None:
            return [1.0] * len(self)
        return [float(sum(target != IGNORED for target in row)) for row in self.targets]


@dataclass
class Unseen:
    """Counts what the model does not see: truncated rows and words without a token."""

    rows: int = 0
    cut: int = 0
    limit: int = 0
    words: int = 0
    without: int = 0

    def add(self, encoded: Encoded) -> Unseen:
        """Add the counts of these rows and return self."""
        places = [place for row in encoded.words or [] for place in row]
        self.rows, self.cut, self.limit = self.rows + len(encoded), self.cut + encoded.cut, encoded.limit
        self.words, self.without = self.words + len(places), self.without + sum(place < 0 for place in places)
        return self

    def note(self, origin: str, asked: int | None = None) -> str:
        """One line for the user; empty if nothing was dropped.

        Args:
            origin: source of the rows.
            asked: the requested length; the model's limit may be lower.
        """
        why = "--max-seq-length" if asked in (None, self.limit) else "the model's limit"
        parts = []
        if self.cut:
            share = f"{self.cut:,} of {self.rows:,} rows of {origin}"
            parts.append(f"{share} are longer than {self.limit} tokens and were truncated ({why})")
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
    """Tokenize a split in blocks of rows; for pairs, the longer text is truncated first.

    More than two texts are joined with the tokenizer's separator.

    Args:
        split: texts, with labels if known.
        tokenizer: a transformers tokenizer.
        max_seq_length: maximum tokens per row, capped at the tokenizer's limit.
        progress: called with (rows done, total rows).
        cache: folder to cache the ids in, by texts, tokenizer and length.
        of_words: whether a row is a sentence split into words.

    Raises:
        DataError: `max_seq_length` leaves no room for text.
        ModelError: the tokenizer does not map tokens to words.
    """
    limit = min(max_seq_length, tokenizer.model_max_length)
    if not of_words and any(len(row) > 2 for row in split.texts[:1]):
        between = separator(tokenizer)
        split = replace(split, texts=[(between.join(row),) for row in split.texts])
    kept = None
    if (
        cache is not None and len(split) >= _ROWS_WORTH_KEEPING and tokenizer.is_fast
    ):  # the rules of slow tokenizers cannot be hashed
        kept = cache / "tokens" / f"{_key(split.texts, tokenizer, limit, of_words)}.safetensors"
        try:
            features, cut = _unpack(read_tensors(kept, KIND)[0])
            return _encoded(features, split, cut, limit, of_words=of_words)
        except (FileError, KeyError, RuntimeError):
            pass  # missing or damaged: tokenize again
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
    """Separator for more than two texts: the tokenizer's separator, its end-of-text token, or a newline."""
    return str(tokenizer.sep_token or tokenizer.eos_token or "\n")


def _check_room(tokenizer: Any, limit: int, *, pair: bool) -> None:
    around = tokenizer.num_special_tokens_to_add(pair=pair)
    if limit <= around:
        raise DataError(
            f"--max-seq-length {limit} leaves no room for text: this tokenizer adds {around} special tokens to every row; increase it"
        )


def _blocks(
    texts: Sequence[tuple[str, ...]], tokenizer: Any, limit: int, *, of_words: bool
) -> Iterator[list[tuple[str, ...]]]:
    """Iterate over blocks of rows, limited in rows and characters."""
    block: list[tuple[str, ...]] = []
    held = 0
    for row in texts:
        if sum(map(len, row)) > _FAR * limit:
            row = _first_words(row, tokenizer, limit) if of_words else row
            left = tokenizer.truncation_side == "left"
            row = tuple(near_end(text, tokenizer, limit, far=_FAR, left=left) for text in row)
        held += sum(map(len, row))
        block.append(row)
        if len(block) == _ROWS_AT_ONCE or held > _AT_ONCE:
            yield block
            block, held = [], 0
    if block:
        yield block


def near_end(text: str, tokenizer: Any, limit: int, *, far: int = _FAR, left: bool = False) -> str:
    """The start of a long text, or its end if truncated on the left, long enough that the rest would be truncated."""
    size = far * limit
    while len(text) > size:
        part = _head(text[::-1], size)[::-1] if left else _head(text, size)
        if len(tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]) > limit:
            return part
        size *= 2
    return text


def _head(text: str, size: int) -> str:
    """About this many characters, up to whitespace if possible, so that no token is split."""
    end = next((end for end in range(size, size // 2, -1) if text[end].isspace()), size)
    return text[:end].rstrip()


def _first_words(words: tuple[str, ...], tokenizer: Any, limit: int) -> tuple[str, ...]:
    """The first words of a long sentence, enough that the rest would be truncated."""
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
    """Tokenize some rows. Returns features, the number of truncated rows and, for words, each token's word number."""
    columns: list[list[Any]] = [list(column) for column in zip(*texts, strict=True)] if not of_words else []
    options = {}
    if of_words:
        blank = _blank_before_words(tokenizer)
        columns, options = [[[blank + word for word in row] for row in texts]], {"is_split_into_words": True}
    batch = tokenizer(*columns, truncation="longest_first", max_length=limit, **options)
    if tokenizer.is_fast:
        cut = sum(bool(encoding.overflowing) for encoding in batch.encodings)
    else:  # tokenized without a limit, to count truncated rows
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
        if not feature["input_ids"]:  # an empty text without special tokens; a model needs at least one token
            feature = {name: [0] for name in feature} | {"input_ids": [_blank(tokenizer)]}
            feature |= {_WORDS: [-1]} if of_words else {}
        features.append(feature)
    return features, cut


def _blank(tokenizer: Any) -> int:
    """The single token used for a text without tokens."""
    usual = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return next((token for token in usual if token is not None), 0)


def _encoded(features: list[dict[str, list[int]]], split: Split, cut: int, limit: int, *, of_words: bool) -> Encoded:
    """Make each word's gold label the target of its first token."""
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
    """The prefix that a byte-level tokenizer needs before each word, to tokenize it as in running text.

    Raises:
        ModelError: the tokenizer does not map tokens to words.
    """
    if not tokenizer.is_fast:
        raise ModelError(
            f"{tokenizer.name_or_path}: its tokenizer does not map tokens to words; rows of words require a tokenizer.json"
        )
    rules = json.loads(tokenizer.backend_tokenizer.to_str()).get("pre_tokenizer") or {}
    steps = [step for step in (rules, *rules.get("pretokenizers", ())) if step.get("type") == "ByteLevel"]
    return " " if steps and not any(step["add_prefix_space"] for step in steps) else ""


def _key(texts: Sequence[tuple[str, ...]], tokenizer: Any, limit: int, of_words: bool) -> str:
    """A checksum of everything the ids depend on: texts, length, and the tokenizer with all its settings."""
    import tokenizers
    import transformers

    rules = json.loads(tokenizer.backend_tokenizer.to_str()) | {
        "truncation": None,
        "padding": None,
    }  # left over from the last call
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
    """Concatenate all lists into one tensor, with the number of tokens of each row."""
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
