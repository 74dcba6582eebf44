"""The loss of a language model: equal to that of transformers, padded or packed, for whatever a family does to its scores."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import shake
from transformers import AutoModelForCausalLM, AutoTokenizer

import craft_cli as craft
from craft_cli.data.batches import collate
from craft_cli.data.packing import packed
from craft_cli.data.tokens import IGNORED, Encoded
from craft_cli.errors import ConfigError
from craft_cli.tasks import language_loss
from craft_cli.tasks.causal_lm import CausalLM

Make = Callable[..., Path]
FINISHED: dict[str, dict[str, Any]] = {
    "llama": {}, "gpt2": {}, "qwen2": {}, "gemma2": {"final_logit_softcapping": 5.0}, "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 3.0}, "opt": {}, "bloom": {"hidden_size": 24},
}  # fmt: skip
"""Families, with what some of them do to the scores of their last layer; of the last two positions come from the mask."""


def rows_of_tokens(lengths: list[int], seed: int = 0) -> Encoded:
    """Random rows; of each the second half is learned, of the first one nothing."""
    draw = torch.Generator().manual_seed(seed)
    ids = [torch.randint(1, 250, (length,), generator=draw).tolist() for length in lengths]
    targets = [[token if 0 < len(row) // 2 <= place else IGNORED for place, token in enumerate(row)] for row in ids]
    targets[0] = [IGNORED] * len(targets[0])
    return Encoded([{"input_ids": row} for row in ids], ["" for _ in ids], targets=targets)


def adapted(folder: Path) -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    adapter = (
        craft.attach(model, ranks="6,5,2", targets="query,value")
        if model.config.model_type in ("llama", "gpt2")
        else None
    )
    if adapter is not None:
        shake(adapter)
    return model, adapter


def gradients(model: Any, adapter: Any, loss: torch.Tensor) -> list[torch.Tensor]:
    parameters = list(adapter.parameters()) if adapter is not None else [model.get_input_embeddings().weight]
    return list(torch.autograd.grad(loss, parameters))


@pytest.mark.parametrize("family", FINISHED)
def test_it_is_the_loss_of_transformers(family: str, pico_lm: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = pico_lm(family, tie_word_embeddings=False, **FINISHED[family])
    model, adapter = adapted(folder)
    model.train()
    monkeypatch.setattr(language_loss, "_AT_ONCE", 259 * 5)  # five positions at a time
    encoded, tokenizer = rows_of_tokens([9, 14, 5]), AutoTokenizer.from_pretrained(folder)
    batch = collate(encoded, [0, 1, 2], tokenizer)
    head = model.get_output_embeddings()
    head.requires_grad_(False)
    loss = CausalLM().loss(model, batch)
    assert "forward" not in vars(head)
    assert batch.targets is not None
    count = int((batch.targets[:, 1:] != IGNORED).sum())
    theirs = model(**batch.inputs, labels=batch.targets).loss * count
    torch.testing.assert_close(loss, theirs, rtol=1e-5, atol=1e-5)
    for ours, other in zip(gradients(model, adapter, loss), gradients(model, adapter, theirs), strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-5)


def test_the_scores_of_each_row(pico_lm: Make) -> None:
    folder = pico_lm()
    model, _ = adapted(folder)
    encoded, tokenizer = rows_of_tokens([9, 14, 5]), AutoTokenizer.from_pretrained(folder)
    batch = collate(encoded, [0, 1, 2], tokenizer)
    scores = CausalLM().scores(model.eval(), batch)
    assert encoded.targets is not None
    assert scores[0].tolist() == [0.0, 0.0, 0.0]
    for row, found in enumerate(scores):
        ids, targets = torch.tensor(encoded.features[row]["input_ids"]), torch.tensor(encoded.targets[row])
        with torch.no_grad():  # a row alone, as transformers computes it
            logits = model(input_ids=ids[None]).logits[0, :-1].float()
        learned = targets[1:] != IGNORED
        losses = torch.nn.functional.cross_entropy(logits[learned], targets[1:][learned], reduction="sum")
        hits = (logits.argmax(dim=-1) == targets[1:])[learned].sum()
        torch.testing.assert_close(
            found, torch.tensor([float(losses), float(hits), float(learned.sum())]), rtol=1e-5, atol=1e-5
        )
    metrics = CausalLM().measure(scores, [])
    total = torch.stack(scores).sum(dim=0)
    assert metrics["loss"] == pytest.approx(float(total[0] / total[2]))
    assert metrics["perplexity"] == pytest.approx(float(torch.exp(total[0] / total[2])))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_packed_equals_unpacked(family: str, attention: str, pico_lm: Make) -> None:
    folder = pico_lm(family, **({"use_sliding_window": False} if family == "qwen2" else {}))
    model, adapter = adapted(folder)
    model.set_attn_implementation(attention)
    encoded, tokenizer = rows_of_tokens([9, 14, 5, 3, 6, 14, 2]), AutoTokenizer.from_pretrained(folder)
    shared = packed(encoded, 17)
    assert sorted(shared.lengths) == [5, 14, 17, 17]
    assert sum(shared.weights) == sum(encoded.weights)
    together, apart = (CausalLM().loss(model, collate(rows, range(len(rows)), tokenizer)) for rows in (shared, encoded))
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)
    for ours, other in zip(gradients(model, adapter, together), gradients(model, adapter, apart), strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-5)


def test_rows_cannot_share_what_a_window_or_distances_tell_apart(pico_lm: Make) -> None:
    folder = pico_lm("mistral", sliding_window=8)
    encoded, tokenizer = rows_of_tokens([9, 14]), AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(ConfigError, match="sliding window of 8 tokens"):
        CausalLM().loss(model, collate(packed(encoded, 23), [0], tokenizer))
    with pytest.raises(ConfigError, match="bloom model uses relative positions"):
        CausalLM(packing=True).on_head(AutoModelForCausalLM.from_pretrained(pico_lm("bloom", hidden_size=24)).config)
