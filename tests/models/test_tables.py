"""What a model looks up: a text alone is the text in a batch, and no index is beyond the model's tables."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import classifier, failure, opinions, save_tokenizer, write_rows
from helpers import config, flags
from picos import families
from transformers import AutoTokenizer, pipeline

import craft_cli as craft
from craft_cli.api.predictor import Predictor, load_predictor
from craft_cli.data.sources import Split
from craft_cli.models.hub import resolve
from craft_cli.models.tables import tables_in

Make = Callable[..., Path]
TEXTS = [
    "a room",
    "",
    "this book was not very good and the meal felt rather poor but great",
    "this this this",
    "the film was good",
]
FEW = [
    pytest.param(*one.values, marks=() if one.values[0] in ("llama", "roberta") else pytest.mark.slow)
    for one in families("AutoModelForSequenceClassification")
    if one.values[0] != "qwen2"  # transformers replaces its tokenizer, and every text is the same unknown word
]
COUNTS_PADDING = ("roberta", "xlm-roberta", "camembert")
POSITIONS = (
    dict.fromkeys(COUNTS_PADDING, 47)
    | {"mpnet": 46}
    | dict.fromkeys(("bert", "electra", "deberta-v2", "distilbert", "gpt2", "opt"), 48)
)
"""Tokens that a family's table of positions has room for; others have no table."""


def change(file: str, **values: Any) -> None:
    content = json.loads(Path(file).read_text())
    content.update(values)
    Path(file).write_text(json.dumps({name: value for name, value in content.items() if value != "gone"}))


def bare(folder: str = "model") -> None:
    """A tokenizer that puts nothing around a text, as that of GPT-2 does."""
    change(f"{folder}/tokenizer.json", post_processor=None)


def trained_elsewhere(base: Path, **settings: Any) -> None:
    """A classifier in the folder `model`, whose configuration was then changed."""
    classifier(base).save_pretrained("model")
    save_tokenizer(Path("model"))
    change("model/config.json", **settings)


def scores(predictor: Predictor, texts: list[str]) -> torch.Tensor:
    encoded = predictor.encode(Split([(text,) for text in texts], None, "texts"), predictor.task)
    return torch.stack(predictor.scores(encoded, predictor.task, len(texts)))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pad", [0, 5, -1, None])
@pytest.mark.parametrize("family", FEW)
def test_a_text_alone_is_the_text_in_a_batch(family: str, pad: int | None, side: str, pico: Make) -> None:
    """Whatever configuration and tokenizer pad with, and on which side; without any token around a text, too."""
    if pad is None and family in COUNTS_PADDING:
        pytest.skip("transformers makes no such model")
    trained_elsewhere(pico(family), pad_token_id=pad)
    change("model/tokenizer_config.json", padding_side=side)
    for tokens_around in (True, False) if family != "t5" else (True,):  # T5's head reads the token at the end
        if not tokens_around:
            bare()
        predictor = load_predictor("model", use_cpu=True)
        together = scores(predictor, TEXTS)
        alone = torch.cat([scores(predictor, [text]) for text in TEXTS])
        assert (together - alone).abs().max() <= 1e-3 * together.std(dim=0).min()  # they are different texts


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_without_a_padding_token_any_other_serves(family: str, pico: Make, data_dir: Path) -> None:
    shutil.copytree(pico(family), "base")
    change("base/config.json", pad_token_id=None)
    change("base/tokenizer_config.json", pad_token="gone")
    craft.train(config(Path("base"), data_dir, max_steps=2))
    predictor = load_predictor("out", use_cpu=True)
    together, alone = scores(predictor, TEXTS), torch.cat([scores(predictor, [text]) for text in TEXTS])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_a_merged_decoder_answers_a_pipeline_as_it_answers_craft(pico: Make, data_dir: Path) -> None:
    shutil.copytree(pico("llama"), "base")
    change("base/config.json", pad_token_id=5)
    craft.train(config(Path("base"), data_dir, max_steps=2))
    craft.merge("out")
    texts = [text for text in TEXTS if text]
    found: Any = pipeline("text-classification", "out/merged", device="cpu")(texts, batch_size=len(texts), top_k=None)
    predictor = load_predictor("out", use_cpu=True)
    expected = torch.softmax(scores(predictor, texts), dim=-1)
    for row, answers in zip(expected, found, strict=True):
        told = {answer["label"]: answer["score"] for answer in answers}
        assert [told[name] for name in predictor.task.labels] == pytest.approx(row.tolist(), abs=1e-5)


def test_tokens_beyond_the_embedding_are_refused_before_training(pico: Make) -> None:
    shutil.copytree(pico(), "base")
    tokenizer = AutoTokenizer.from_pretrained("base")
    tokenizer.add_tokens([f"new{number}" for number in range(40)])
    tokenizer.save_pretrained("base")
    rows = opinions(12, 1)
    write_rows(Path("data/validation.jsonl"), rows)
    rows[7]["sentence"] = "new35 film"
    write_rows(Path("data/train.jsonl"), rows)
    for more in (["--dry-run"], []):
        told = failure("train", *flags(Path("base"), Path("data")), *more)
        assert "data/train.jsonl, line 8: the tokenizer returned token 67 ('new35')" in told
        assert "has 64 tokens" in told


def test_token_types_beyond_the_table_are_refused_before_training(pico: Make) -> None:
    shutil.copytree(pico(type_vocab_size=1), "base")
    change("base/tokenizer_config.json", model_input_names=["input_ids", "token_type_ids", "attention_mask"])
    for split in ("train", "validation"):
        write_rows(Path(f"data/{split}.jsonl"), opinions(12, 1, pair=True))
    told = failure("train", *flags(Path("base"), Path("data"), task="mrpc"), "--dry-run")
    assert "token type 1" in told
    assert "model_input_names" in told


@pytest.mark.parametrize("family", FEW)
def test_a_text_is_cut_at_the_models_positions(family: str, pico: Make) -> None:
    trained_elsewhere(pico(family))
    change("model/tokenizer_config.json", model_max_length="gone")
    positions = tables_in(resolve("model")).positions
    predictor = load_predictor("model", use_cpu=True)
    long = "film " * 300
    encoded = predictor.encode(Split([(long,), ("film",)], None, "texts"), predictor.task, 256)
    assert max(encoded.lengths) == (positions or 256)
    assert positions == POSITIONS.get(family)
    assert torch.stack(predictor.scores(encoded, predictor.task, 2)).isfinite().all()


def test_a_training_cuts_at_the_models_positions_and_says_so(pico: Make, data_dir: Path) -> None:
    from helpers import Remember

    shutil.copytree(pico(), "base")
    change("base/tokenizer_config.json", model_max_length="gone")
    rows = [{"sentence": "film " * 300, "label": number % 2} for number in range(8)]
    for split in ("train", "validation"):
        write_rows(Path(f"data/{split}.jsonl"), rows)
    heard = Remember()
    craft.train(config(Path("base"), Path("data"), max_steps=1, max_seq_length=256), heard)
    assert heard.plan is not None
    assert any("longer than 48 tokens and were truncated (the model's limit)" in note for note in heard.plan.notes)
    craft.merge("out")  # computes with texts of its own, which no tokenizer cuts
