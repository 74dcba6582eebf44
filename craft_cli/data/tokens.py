"""Texts to token ids, kept between runs, and token ids to padded batches."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from craft_cli.data.sources import Split
from craft_cli.errors import FileError
from craft_cli.files import read_tensors, write_tensors

KIND = "token ids"
_ROWS_WORTH_KEEPING = 2000
"""Fewer are tokenised again sooner than a file is found."""


@dataclass(frozen=True)
class Encoded:
    """Token ids of one split, not padded.

    Attributes:
        features: for each row the tokenizer's lists (`input_ids` and what the model needs beside them).
        labels: gold of each row; None where it is not known.
        cut: how many rows were longer than allowed.
        limit: tokens allowed.
    """

    features: list[dict[str, list[int]]]
    labels: list[Any] | None
    cut: int = 0
    limit: int = 0

    def __len__(self) -> int:
        return len(self.features)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return [len(feature["input_ids"]) for feature in self.features]


def encode(
    split: Split,
    tokenizer: Any,
    max_seq_length: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
    cache: Path | None = None,
) -> Encoded:
    """Tokenise a split in blocks of rows; of a pair the longer text is cut first.

    Args:
        split: texts, and gold where it is known.
        tokenizer: of transformers.
        max_seq_length: tokens kept of each row; never more than the tokenizer's own limit.
        progress: called with (rows done, rows in all).
        cache: folder to keep the ids in, found again by texts, tokenizer and length.
    """
    limit = min(max_seq_length, tokenizer.model_max_length)
    kept = None
    if cache is not None and len(split) >= _ROWS_WORTH_KEEPING:
        kept = cache / "tokens" / f"{_key(split.texts, tokenizer, limit)}.safetensors"
        try:
            features, cut = _unpack(read_tensors(kept, KIND)[0])
            return Encoded(features, split.labels, cut, limit)
        except (FileError, KeyError, RuntimeError):
            pass  # not there, or damaged: made again
    features, cut = [], 0
    for start in range(0, len(split), 1000):
        columns = [list(column) for column in zip(*split.texts[start : start + 1000], strict=True)]
        batch = tokenizer(*columns, truncation="longest_first", max_length=limit)
        full = [row for row, ids in enumerate(batch["input_ids"]) if len(ids) >= limit]
        if full:  # whether they were longer is seen without a limit
            whole = tokenizer(*[[column[row] for row in full] for column in columns], verbose=False)
            cut += sum(len(ids) > limit for ids in whole["input_ids"])
        for row in range(len(batch["input_ids"])):
            features.append({name: batch[name][row] for name in batch if name != "attention_mask"})
        progress(len(features), len(split))
    if kept is not None:
        write_tensors(kept, KIND, _pack(features, cut), {"rows": len(features)})
    return Encoded(features, split.labels, cut, limit)


def collate(encoded: Encoded, rows: Sequence[int], tokenizer: Any) -> tuple[dict[str, Tensor], Tensor | None]:
    """A batch, padded to its longest row: model inputs (rows, tokens), and gold (rows,) or (rows, labels)."""
    inputs = tokenizer.pad([encoded.features[row] for row in rows], padding="longest", return_tensors="pt")
    labels = None if encoded.labels is None else torch.tensor([encoded.labels[row] for row in rows])
    return dict(inputs), labels


def padding(lengths: Sequence[int], batches: Sequence[Sequence[int]]) -> float:
    """The part of the tokens in these batches (row numbers) that is padding."""
    padded = sum(len(rows) * max(lengths[row] for row in rows) for rows in batches if rows)
    return 1 - sum(lengths[row] for rows in batches for row in rows) / max(padded, 1)


def _key(texts: Sequence[tuple[str, ...]], tokenizer: Any, limit: int) -> str:
    digest = hashlib.sha256(f"{type(tokenizer).__name__} {limit} ".encode())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend else tokenizer.get_vocab()
    digest.update(
        json.dumps(rules | {"truncation": None, "padding": None}, sort_keys=True).encode()
    )  # of the last call
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
