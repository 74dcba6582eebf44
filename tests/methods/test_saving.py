"""What leaves an adapted model by transformers' own ways: save_pretrained, the Trainer, load_state_dict."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import classifier, shake, token_batch
from helpers import endpoint, logits
from loopback_hub import LoopbackHub
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForSequenceClassification, Trainer, TrainingArguments

import craft_cli as craft
from craft_cli.errors import ConfigError, ModelError

Make = Callable[..., Path]
ROWS = [{"input_ids": [1, 5 + n % 7, 9 + n % 5, 2], "attention_mask": [1, 1, 1, 1], "labels": n % 2} for n in range(16)]


def adapted(base: Path, **options: Any) -> tuple[Any, Any]:
    model = classifier(base, **options)
    adapter = craft.attach(model, craft.decompose(str(base), ranks=(6, 5, 2)))
    return model, adapter


def plain(folder: str | Path) -> Any:
    """As any tool loads it; a missing or surplus tensor fails."""
    model, report = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


# -- save_pretrained ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_a_saved_model_computes_what_the_adapted_one_does(family: str, pico: Make) -> None:
    model, adapter = adapted(pico(family))
    model.config.pad_token_id = 0
    shake(adapter)
    before = logits(model)
    model.save_pretrained("saved")
    torch.testing.assert_close(logits(plain("saved")), before, atol=1e-5, rtol=1e-5)
    assert torch.equal(logits(model), before)
    again = classifier(pico(family))
    again.config.pad_token_id = 0
    craft.load(again, "saved/adapter")  # to go on training
    assert torch.equal(logits(again), before)
    adapter.detach()
    model.save_pretrained("base")
    assert not Path("base/adapter").exists()
    assert type(model).save_pretrained is model.save_pretrained.__func__


def test_the_base_model_alone_is_saved_with_the_change(pico: Make) -> None:
    model, adapter = adapted(pico())
    shake(adapter)
    model.bert.save_pretrained("encoder")
    with torch.no_grad():
        found = AutoModel.from_pretrained("encoder").eval()(**token_batch()).last_hidden_state
        expected = model.bert(**token_batch()).last_hidden_state
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_change_that_is_no_number_is_not_saved(pico: Make) -> None:
    model, adapter = adapted(pico())
    with torch.no_grad():
        next(adapter.parameters()).fill_(float("inf"))
    with pytest.raises(ModelError, match="the change is not finite"):
        model.bert.save_pretrained("encoder")


def test_a_process_that_writes_nothing_may_be_given_nothing(pico: Make) -> None:
    model, adapter = adapted(pico())
    shake(adapter)
    model.save_pretrained("saved", is_main_process=False, state_dict={})  # as Accelerate does with FSDP
    assert not list(Path("saved").glob("*"))


def test_a_copy_saves_itself(pico: Make) -> None:
    model, adapter = adapted(pico())
    twin = copy.deepcopy(model)
    shake(adapter)
    twin.save_pretrained("twin")
    assert torch.equal(logits(plain("twin")), logits(twin))


def test_what_cannot_be_saved_is_refused(pico: Make) -> None:
    model, adapter = adapted(pico())
    with adapter.disabled(), pytest.raises(ConfigError, match="leave the `disabled"):
        model.save_pretrained("saved")
    with pytest.raises(ConfigError, match=r"distributed_checkpoint.*adapter\.save"):
        model.save_pretrained("saved", distributed_checkpoint=True)
    model.is_quantized = True
    with pytest.raises(ModelError, match=r"quantized.*adapter\.save.*craft\.merge"):
        model.save_pretrained("saved")
    assert not Path("saved").exists()


def test_what_is_saved_and_pushed_is_pushed_with_the_adapter(pico: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = adapted(pico())
    pushed: dict[str, Any] = {}

    def push_to_hub(self: Any, repository: str, **options: Any) -> None:
        self.save_pretrained("pushed")
        pushed[repository] = options

    monkeypatch.setattr(type(model), "push_to_hub", push_to_hub)
    model.save_pretrained("saved", push_to_hub=True, repo_id="someone/tuned", private=True)
    assert pushed == {"someone/tuned": {"private": True}}
    for folder in ("saved", "pushed"):
        assert {"config.json", "model.safetensors", "adapter"} <= {path.name for path in Path(folder).iterdir()}


@pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")  # huggingface_hub's own
@pytest.mark.slow
def test_a_model_pushed_to_the_hub_holds_the_change(pico: Make, hub: LoopbackHub, signed_in: None) -> None:
    model, adapter = adapted(pico())
    shake(adapter)
    with endpoint(hub):
        model.push_to_hub("someone/tuned")
    for name in (
        "config.json",
        "model.safetensors",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
    ):
        Path("pushed", name).parent.mkdir(parents=True, exist_ok=True)
        Path("pushed", name).write_bytes(hub.uploads["someone/tuned"][name])
    torch.testing.assert_close(logits(plain("pushed")), logits(model), atol=1e-5, rtol=1e-5)
    again = classifier(pico())
    craft.load(again, "pushed")
    assert torch.equal(logits(again), logits(model))


def test_accelerate_keeps_base_and_adapter_apart(pico: Make) -> None:
    model, adapter = adapted(pico())
    shake(adapter)
    Accelerator(cpu=True).save_model(model, "accelerated")
    fresh, _ = adapted(pico())
    fresh.load_state_dict(load_file("accelerated/model.safetensors"))
    assert torch.equal(logits(fresh), logits(model))


def test_merged_weights_are_not_loaded_under_an_adapter(pico: Make) -> None:
    model, adapter = adapted(pico())
    shake(adapter)
    expected, whole = logits(model), copy.deepcopy(model.state_dict())
    model.save_pretrained("saved")
    with pytest.raises(ModelError, match=r"change again.*CraftCallback"):
        model.load_state_dict(load_file("saved/model.safetensors"), strict=False)
    assert torch.equal(logits(model), expected)
    fresh, _ = adapted(pico())
    fresh.load_state_dict(whole)  # all of it, as torch.save keeps it
    assert torch.equal(logits(fresh), expected)
    fresh.load_state_dict(classifier(pico()).state_dict(), strict=False)  # the base under it is the same


# -- the Trainer --------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def left_behind() -> Iterator[None]:
    yield
    AcceleratorState._reset_state()


def trainer(model: Any, folder: str = "out", **changed: Any) -> Trainer:
    given: dict[str, Any] = {
        "num_train_epochs": 3, "per_device_train_batch_size": 4, "learning_rate": 3e-2, "report_to": "none", "use_cpu": True,
        "save_strategy": "epoch", "eval_strategy": "epoch", "logging_steps": 1, "disable_tqdm": True, "seed": 5,
    }  # fmt: skip
    arguments = TrainingArguments(folder, **given | changed)
    torch.manual_seed(1)
    return Trainer(model, arguments, train_dataset=ROWS, eval_dataset=ROWS[:6], callbacks=[craft.CraftCallback()])


def trained_of(folder: str) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "adapter_model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_trainers_checkpoints_are_small_and_resume_to_the_same_bits(
    pico: Make, caplog: pytest.LogCaptureFixture
) -> None:
    base = pico(hidden_dropout_prob=0.2, vocab_size=4000)
    model, _ = adapted(base)
    trainer(model, "uncut").train()

    model, _ = adapted(base)
    cut = trainer(model)
    cut.train()
    checkpoint = Path("out/checkpoint-8")
    weights = (checkpoint / "model.safetensors").stat().st_size
    assert weights < (base / "model.safetensors").stat().st_size / 10
    assert not (checkpoint / "config.json").exists()  # it is no model
    assert same(trained_of("out/checkpoint-12"), trained_of("uncut/adapter"))

    model, adapter = adapted(base)
    again = trainer(model)
    again.train(resume_from_checkpoint=str(checkpoint))
    assert "missing keys" not in caplog.text
    assert same(trained_of("out/adapter"), trained_of("uncut/adapter"))
    losses = [[entry["loss"] for entry in it.state.log_history if "loss" in entry] for it in (cut, again)]
    assert losses[0] == losses[1]
    loaded = classifier(base)
    craft.load(loaded, "out/adapter")
    assert torch.equal(logits(loaded), logits(model.eval()))
    assert adapter.training_record["epoch"] == 3.0

    again.save_model("final")  # a plain checkpoint
    torch.testing.assert_close(logits(plain("final")), logits(model), atol=1e-5, rtol=1e-5)


def test_the_best_adapter_is_there_at_the_end(pico: Make) -> None:
    model, adapter = adapted(pico())
    run = trainer(model, learning_rate=0.6, load_best_model_at_end=True, save_total_limit=1)
    run.train()
    best = run.state.best_model_checkpoint
    losses = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    assert best is not None
    assert run.state.best_metric == min(losses)
    assert same(trained_of("out/adapter"), trained_of(best))
    assert adapter.training_record["metrics"] == {"loss": min(losses)}
    craft.load(classifier(pico()), best)


def test_a_checkpoint_of_other_factors_is_not_resumed(pico: Make) -> None:
    model, _ = adapted(pico())
    trainer(model, num_train_epochs=1).train()
    other = classifier(pico())
    factors = craft.decompose(str(pico()), ranks=(6, 5, 2))
    query = factors.decompositions["query"]  # of other signs, as another SVD might choose them
    query.factors[0].neg_()
    query.core.neg_()
    craft.attach(other, factors)
    with pytest.raises(ModelError, match="different weights or factors"):
        trainer(other).train(resume_from_checkpoint=True)


def test_without_the_callback_nothing_is_lost_or_mistaken(pico: Make) -> None:
    model, _ = adapted(pico())
    run = trainer(model, num_train_epochs=1)
    run.remove_callback(craft.CraftCallback)
    run.train()
    torch.testing.assert_close(logits(plain("out/checkpoint-4")), logits(model.eval()), atol=1e-5, rtol=1e-5)
    craft.load(classifier(pico()), "out/checkpoint-4/adapter")
    model, _ = adapted(pico())
    with pytest.raises(ModelError, match="CraftCallback"):
        trainer(model).train(resume_from_checkpoint=True)


def test_the_callback_is_refused_where_it_cannot_do_what_it_promises(pico: Make) -> None:
    with pytest.raises(ConfigError, match=r"craft\.attach\(model\) before you create the Trainer"):
        trainer(classifier(pico()))
    arguments = TrainingArguments("out", use_cpu=True, push_to_hub=True)
    with pytest.raises(ConfigError, match='hub_strategy="end"'):
        craft.CraftCallback().on_init_end(arguments, None, None)


# -- several, and what is shown -----------------------------------------------------------------------------------------


def test_an_adapter_held_is_deleted(pico: Make) -> None:
    model, adapter = adapted(pico())
    base = logits(model)
    with pytest.raises(ConfigError, match=r"the only adapter: .*adapter\.detach"):
        adapter.delete("default")
    adapter.save("one")
    craft.load(model, "one", name="other")
    shake(adapter)
    with pytest.raises(ConfigError, match="this model has no adapter 'ather'; did you mean 'other'"):
        adapter.delete("ather")
    adapter.delete("other")
    assert (adapter.names, adapter.active) == (("default",), "default")
    assert torch.equal(logits(model), base)
    craft.load(model, "one", name="other")
    adapter.delete("default")
    assert (adapter.names, adapter.active) == (("other",), "other")


def test_one_line_in_python_and_a_table_in_a_notebook(pico: Make, capsys: pytest.CaptureFixture[str]) -> None:
    model, adapter = adapted(pico())
    assert repr(adapter) == (
        f"<ModelAdapter: CRAFT, ranks 6,5,2 (OUT,IN,LAYERS), on query and value of {pico()}; "
        "trains 130 parameters, and 50 in the head>"
    )
    assert repr(adapter.frozen).startswith(f"<Factors of {pico()}: query 3x24x24 at 6,5,2, value")
    assert "\n" not in repr(adapter.frozen)
    assert repr(model).count("\n") == repr(classifier(pico())).count("\n") + 1
    lora = craft.attach(classifier(pico()), method="lora", rank=2)
    assert "\n" not in repr(lora) + repr(lora.frozen)
    page = adapter._repr_html_()
    assert page.count("<svg") == 6
    for shown in ("3 x 24 x 24", '<td style="text-align: right">65</td>', "130 parameters in the adapter", "5 of 24: "):
        assert shown in page, page
    assert adapter.frozen._repr_html_().count("<svg") == 6
    assert "<svg" not in lora._repr_html_()
    adapter.print_trainable_parameters()
    every = sum(p.numel() for p in model.parameters())
    assert (
        capsys.readouterr().out
        == f"trainable params: 180 || all params: {every:,} || trainable%: {18000 / every:.4f}\n"
    )
