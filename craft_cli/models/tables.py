"""How far the numbers go that a model looks up: token ids, positions, token types."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from craft_cli.errors import ModelError
from craft_cli.models.checkpoint import Checkpoint
from craft_cli.models.loading import build_empty

_POSITIONS, _TYPES = ("position_embeddings", "wpe"), ("token_type_embeddings",)


@dataclass(frozen=True)
class Tables:
    """The sizes of a model's embeddings.

    Attributes:
        model: its name, for messages.
        tokens: token ids below it are known.
        positions: tokens that a row may have; None where any number of them can be told apart.
        types: token types below it are known; None where the model has no table of them.
        counts_padding: whether positions are counted over the tokens that are not padding, as RoBERTa does: its
            configuration's padding token must then stay as it is.
    """

    model: str
    tokens: int
    positions: int | None
    types: int | None
    counts_padding: bool

    def limit(self, tokens: int) -> int:
        """So many tokens of a row, or as many as there are positions."""
        return tokens if self.positions is None else min(tokens, self.positions)

    def check(
        self, rows: Sequence[Mapping[str, Sequence[int]]], tokenizer: Any, place: Callable[[int], str] = "row {}".format
    ) -> None:
        """Refuse rows with a number that the model cannot look up.

        Args:
            rows: of each row `input_ids` and, where the tokenizer gives them, `token_type_ids`.
            tokenizer: that made them.
            place: where a row stands, for messages.

        Raises:
            ModelError: a token, a token type or a length is beyond the model's tables.
        """
        for row, features in enumerate(rows):
            ids, types = features["input_ids"], features.get("token_type_ids", ())
            highest = max(ids, default=0)
            if highest >= self.tokens:
                token = tokenizer.convert_ids_to_tokens(highest)
                raise ModelError(
                    f"{place(row)}: the tokenizer gives token {highest} ({token!r}), {self.model} knows {self.tokens:,} "
                    "tokens: use the tokenizer it was trained with, or resize its embedding (resize_token_embeddings)"
                )
            if self.types is not None and max(types, default=0) >= self.types:
                raise ModelError(
                    f"{place(row)}: the tokenizer gives token type {max(types)}, {self.model} knows {self.types}: "
                    'leave out "token_type_ids" in model_input_names of its tokenizer_config.json'
                )
            if self.positions is not None and len(ids) > self.positions:
                raise ModelError(f"{place(row)}: {len(ids):,} tokens, {self.model} has {self.positions:,} positions")


def tables_of(model: Any, name: str) -> Tables:
    """The tables of a model, whose parameters may be on the meta device.

    Args:
        model: of transformers.
        name: for messages.
    """
    found = {path.rpartition(".")[2]: part for path, part in model.named_modules() if isinstance(part, nn.Embedding)}
    positions = next((found[leaf] for leaf in _POSITIONS if leaf in found), None)
    types = next((found[leaf] for leaf in _TYPES if leaf in found), None)
    before, counts_padding = 0, False
    if positions is not None and positions.padding_idx is not None:
        counts_padding = True
        # the first position follows that of padding; torch counts a padding index of -1 from the end
        before = (positions.padding_idx + 1) % positions.num_embeddings
    return Tables(
        name,
        model.get_input_embeddings().num_embeddings,
        None if positions is None else positions.num_embeddings - before,
        None if types is None else types.num_embeddings,
        counts_padding,
    )


def tables_in(checkpoint: Checkpoint) -> Tables:
    """The tables that a checkpoint's configuration tells of; no weight is read.

    Raises:
        ModelError: transformers cannot make a model of it.
    """
    with torch.device("meta"):
        return tables_of(build_empty(checkpoint.config(), "AutoModel", trusted=checkpoint.trusted), checkpoint.name)


def settle_padding(tokenizer: Any, tables: Tables) -> int:
    """Have a tokenizer pad with a token that the model knows, its own or another: any will do, as padding is masked.

    Returns:
        The token.
    """
    special = (tokenizer.eos_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, 0)
    pad = next(token for token in (tokenizer.pad_token_id, *special) if token is not None and token < tables.tokens)
    if pad != tokenizer.pad_token_id:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    return int(pad)


def agree_on_padding(model: Any, tokenizer: Any) -> None:
    """Have a model's configuration name the token that its tokenizer pads with.

    The head of a decoder reads the last token that is not padding by its configuration. Were that another token, it would
    read padding, and a text's scores would depend on the rows beside it.
    """
    tables = tables_of(model, "")
    pad = settle_padding(tokenizer, tables)
    if not tables.counts_padding:
        model.config.pad_token_id = pad
