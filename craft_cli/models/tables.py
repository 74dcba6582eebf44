"""Limits of a model's embeddings: token ids, positions, token types."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from craft_cli.errors import ModelError
from craft_cli.models.checkpoint import Checkpoint
from craft_cli.models.loading import build_empty

_POSITIONS, _TYPES = ("position_embeddings", "wpe", "embed_positions"), ("token_type_embeddings",)


@dataclass(frozen=True)
class Tables:
    """The sizes of a model's embeddings.

    Attributes:
        model: name of the model, for messages.
        tokens: number of token ids.
        positions: maximum tokens of a row; None if unlimited.
        types: number of token types; None if the model has none.
        counts_padding: whether positions skip padding tokens, as in RoBERTa; the padding token must then not change.
    """

    model: str
    tokens: int
    positions: int | None
    types: int | None
    counts_padding: bool

    def limit(self, tokens: int) -> int:
        """A row length, limited to the number of positions."""
        return tokens if self.positions is None else min(tokens, self.positions)

    def check(
        self, rows: Sequence[Mapping[str, Sequence[int]]], tokenizer: Any, place: Callable[[int], str] = "row {}".format
    ) -> None:
        """Check rows against the model's tables.

        Args:
            rows: `input_ids` of each row, and `token_type_ids` if the tokenizer returns them.
            tokenizer: the tokenizer.
            place: returns the location of a row, for messages.

        Raises:
            ModelError: a token, a token type or a length exceeds the model's tables.
        """
        for row, features in enumerate(rows):
            ids, types = features["input_ids"], features.get("token_type_ids", ())
            highest = max(ids, default=0)
            if highest >= self.tokens:
                token = tokenizer.convert_ids_to_tokens(highest)
                raise ModelError(
                    f"{place(row)}: the tokenizer returned token {highest} ({token!r}), but {self.model} has {self.tokens:,} "
                    "tokens: use the tokenizer it was trained with, or resize its embedding (resize_token_embeddings)"
                )
            if self.types is not None and max(types, default=0) >= self.types:
                raise ModelError(
                    f"{place(row)}: the tokenizer returned token type {max(types)}, but {self.model} has {self.types}: "
                    'remove "token_type_ids" from model_input_names of its tokenizer_config.json'
                )
            if self.positions is not None and len(ids) > self.positions:
                raise ModelError(
                    f"{place(row)}: {len(ids):,} tokens, but {self.model} has {self.positions:,} positions"
                )


def tables_of(model: Any, name: str) -> Tables:
    """The tables of a model, whose parameters may be on the meta device.

    Args:
        model: a transformers model.
        name: name of the model, for messages.
    """
    found = {path.rpartition(".")[2]: part for path, part in model.named_modules() if isinstance(part, nn.Embedding)}
    positions = next((found[leaf] for leaf in _POSITIONS if leaf in found), None)
    types = next((found[leaf] for leaf in _TYPES if leaf in found), None)
    before, counts_padding = getattr(positions, "offset", 0), False  # OPT's table has two more entries
    if positions is not None and positions.padding_idx is not None:
        counts_padding = True
        # the first position follows the padding position; torch counts a padding index of -1 from the end
        before = (positions.padding_idx + 1) % positions.num_embeddings
    return Tables(
        name,
        model.get_input_embeddings().num_embeddings,
        None if positions is None else positions.num_embeddings - before,
        None if types is None else types.num_embeddings,
        counts_padding,
    )


def tables_in(checkpoint: Checkpoint) -> Tables:
    """The tables from a checkpoint's configuration, without reading weights.

    Raises:
        ModelError: transformers cannot build the model.
    """
    with torch.device("meta"):
        return tables_of(build_empty(checkpoint.config(), "AutoModel", trusted=checkpoint.trusted), checkpoint.name)


def settle_padding(tokenizer: Any, tables: Tables) -> int:
    """Make a tokenizer pad with a token that the model has; any token works, because padding is masked.

    Returns:
        The padding token.
    """
    special = (tokenizer.eos_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, 0)
    pad = next(token for token in (tokenizer.pad_token_id, *special) if token is not None and token < tables.tokens)
    if pad != tokenizer.pad_token_id:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    return int(pad)


def agree_on_padding(model: Any, tokenizer: Any) -> None:
    """Set the padding token in a model's configuration to that of its tokenizer.

    The head of a decoder reads the last token that is not padding, by its configuration. With a different token it would
    read padding, and the scores of a text would depend on the other rows of its batch.
    """
    tables = tables_of(model, "")
    pad = settle_padding(tokenizer, tables)
    if not tables.counts_padding:
        model.config.pad_token_id = pad
