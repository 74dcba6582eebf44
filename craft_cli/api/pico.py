"""Create a tiny model and dataset for a trial training."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

_GOOD, _BAD = ("good", "great", "lovely", "fine"), ("bad", "awful", "poor", "dull")


_OTHER = ("a", "is", "not", "opinion", "sentence", "short", "time", "very")


_SPECIAL = ("[PAD]", "[CLS]", "[SEP]", "[UNK]")


def save_pico(folder: Path) -> None:
    """Create a BERT with a few thousand random weights and a tokenizer with a few words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate((*_SPECIAL, *_GOOD, *_BAD, *_OTHER))}
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=64, initializer_range=0.5,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]",
        model_max_length=64,
    ).save_pretrained(folder)  # fmt: skip


def save_rows(path: Path, count: int) -> None:
    """Write short labeled opinions as JSON lines."""
    rows = [
        {"text": f"{words[number % 4]} {words[-number % 3]}", "label": number % 2}
        for number, words in zip(range(count), itertools.cycle((_GOOD, _BAD)))
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
