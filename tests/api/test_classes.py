"""The class that was trained is the class that is loaded, evaluated, merged and exported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from conftest import build_pico, failure, invoke, shake, token_batch
from helpers import conll, sentences

import craft_cli as craft
from craft_cli.data.sources import DataSource
from craft_cli.errors import ModelError

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft asks for it
Make = Callable[..., Path]


def output(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found = model.eval()(**token_batch())
    values: torch.Tensor = found.logits if hasattr(found, "logits") else found.last_hidden_state
    return values


CLASSES = [
    ("bert", "AutoModelForTokenClassification", {"num_labels": 5}, "TOKEN_CLS"),
    ("roberta", "AutoModelForTokenClassification", {"num_labels": 3}, "TOKEN_CLS"),
    ("llama", "AutoModelForCausalLM", {}, "CAUSAL_LM"),
    ("gpt2", "AutoModelForCausalLM", {}, "CAUSAL_LM"),
    ("bert", "AutoModel", {}, None),
]


@pytest.mark.parametrize(("family", "kind", "options", "task_type"), CLASSES)
def test_merged_and_exported_as_the_class_that_was_trained(
    family: str, kind: str, options: dict[str, Any], task_type: str | None, pico: Make
) -> None:
    load = getattr(transformers, kind).from_pretrained
    base = pico(family, kind=kind) if kind == "AutoModelForCausalLM" else pico(family)
    model = load(base, **options)
    adapter = craft.attach(model, craft.decompose(str(base), ranks=(6, 5, 2)))
    shake(adapter)
    with torch.no_grad():
        for tensor in adapter.head_state().values():
            tensor.add_(0.05)
    expected = output(model)
    adapter.save("adapter")
    record = json.loads(Path("adapter/adapter_config.json").read_text())
    assert record["model"]["architecture"] == type(model).__name__
    craft.merge("adapter", "merged")
    merged, report = load("merged", output_loading_info=True)
    assert type(merged) is type(model)
    assert not any(report.values())
    assert torch.allclose(output(merged), expected, atol=1e-4)
    craft.merge("adapter", "lora", format="peft")
    assert json.loads(Path("lora/adapter_config.json").read_text())["task_type"] == task_type
    again = peft.PeftModel.from_pretrained(load(base, **options), "lora")
    assert torch.allclose(output(again), expected, atol=1e-4)


def test_a_tied_output_embedding_is_written_once(tmp_path: Path) -> None:
    base = build_pico("llama", tmp_path / "base", tie_word_embeddings=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    adapter = craft.attach(model, method="lora", rank=2)
    assert adapter.head == ()
    shake(adapter)
    adapter.save("adapter")
    expected = output(model)
    craft.merge("adapter", "merged")
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained("merged", output_loading_info=True)
    merged, report = loaded
    assert not any(report.values())
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert torch.allclose(output(merged), expected, atol=1e-4)


def test_a_language_model_is_not_evaluated_with_another_head(pico_lm: Make) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(pico_lm("llama"))
    adapter = craft.attach(model, method="lora", rank=2)
    shake(adapter)
    adapter.save("adapter")
    assert "adapter is for causal-lm, and opinions is sequence-classification" in failure(
        "eval", "adapter", "--task", "opinions"
    )


def test_entities_are_merged_and_answered_by_the_merged_model(pico: Make) -> None:
    for split, count, seed in (("train", 45, 1), ("validation", 23, 2)):
        Path(f"words/{split}.conll").parent.mkdir(exist_ok=True)
        Path(f"words/{split}.conll").write_text(conll(sentences(count, seed)))
    done = invoke("train", "--model", str(pico()), "--data-dir", "words", "--method", "lora", "--rank", "4", "--use-cpu",
                  "--num-train-epochs", "4", "--learning-rate", "3e-2", "--head-learning-rate", "3e-2",
                  "--per-device-train-batch-size", "8", "--output-dir", "run")  # fmt: skip
    assert done.exit_code == 0, done.stderr
    record = json.loads(Path("run/adapter/adapter_config.json").read_text())
    assert (record["task_type"], record["method"]) == ("token-classification", "lora")
    assert "pipeline_tag: token-classification" in Path("run/adapter/README.md").read_text()
    craft.merge("run")
    for odd in (
        {"task_type": "sequence-classification"},
        {
            "task_type": "sequence-classification",
            "training": record["training"] | {"task_type": "sequence-classification"},
        },
    ):
        Path("run/adapter/adapter_config.json").write_text(json.dumps(record | odd))
        told = failure("predict", "run", "--input", "words/train.conll")
        assert "it names two task types" in told or "the adapter is damaged" in told
    Path("run/adapter/adapter_config.json").write_text(json.dumps(record))
    ours = craft.evaluate("run").metrics
    theirs = craft.evaluate("run/merged", source=DataSource(data_dir="words")).metrics
    assert theirs == pytest.approx(ours, abs=1e-5)
    pipeline = transformers.pipeline("token-classification", "run/merged", aggregation_strategy="simple")
    assert pipeline("the film was good")


def test_an_adapter_with_a_head_is_refused_by_a_model_of_another_class(pico: Make) -> None:
    load = transformers.AutoModelForTokenClassification.from_pretrained
    adapter = craft.attach(load(pico(), num_labels=2), craft.decompose(str(pico()), ranks=(6, 5, 2)))
    adapter.save("adapter")
    other = transformers.AutoModelForSequenceClassification.from_pretrained(pico(), num_labels=2)
    told = (
        "was trained on a BertForTokenClassification, but this is a BertForSequenceClassification: load a BertForToken"
    )
    with pytest.raises(ModelError, match=told):
        craft.load(other, "adapter")
    craft.load(load(pico(), num_labels=2), "adapter")


def test_an_adapter_without_a_head_fits_every_class_of_its_base(pico: Make) -> None:
    """Such as one trained on hidden states; the labels of the other class stay its own."""
    model = transformers.AutoModel.from_pretrained(pico())
    adapter = craft.attach(model, ranks=(6, 5, 2))
    shake(adapter)
    adapter.save("adapter")
    names = {0: "a", 1: "b", 2: "c"}
    other = transformers.AutoModelForSequenceClassification.from_pretrained(
        pico(), num_labels=3, id2label=names, problem_type="regression"
    )
    craft.load(other, "adapter")
    assert torch.equal(output(other.base_model), output(model))
    assert (other.config.id2label, other.config.problem_type) == (names, "regression")


def test_a_class_whose_inputs_are_choices_is_merged(pico: Make) -> None:
    load = transformers.AutoModelForMultipleChoice.from_pretrained
    model = load(pico()).eval()
    adapter = craft.attach(model, ranks=(6, 5, 2))
    shake(adapter)
    adapter.save("adapter")
    craft.merge("adapter", "merged")
    craft.merge("adapter", "lora", format="peft")
    choices = {name: tensor[None] for name, tensor in token_batch().items()}
    with torch.no_grad():
        assert torch.allclose(load("merged").eval()(**choices).logits, model(**choices).logits, atol=1e-5)


def test_inspect_names_the_class_and_the_task_type(pico: Make) -> None:
    model = transformers.AutoModelForTokenClassification.from_pretrained(pico(), num_labels=2)
    adapter = craft.attach(model, craft.decompose(str(pico()), ranks=(6, 5, 2)))
    adapter.training_record = {"task_type": "token-classification"}
    adapter.save("adapter")
    facts = json.loads(invoke("inspect", "adapter", "--json").stdout)
    assert (facts["model_class"], facts["task_type"]) == ("BertForTokenClassification", "token-classification")
