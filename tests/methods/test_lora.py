"""LoRA against peft's own layers, and through everything that an adapter goes through."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import classifier, failure, invoke, shake, token_batch
from helpers import Cut, config, cut, logits, same, tensors
from picos import FUSED, families
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

import craft_cli as craft
from craft_cli.api.predictor import load_adapted
from craft_cli.config import RunConfig
from craft_cli.errors import ConfigError
from craft_cli.methods.adapter_folder import read_adapter
from craft_cli.methods.base import delta, inner

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft asks for it

Make = Callable[..., Path]
MODULES = {"bert": ["query", "value"], "distilbert": ["q_lin", "v_lin"], "llama": ["q_proj", "v_proj"]}


def with_peft(base: Path, family: str, adapter: Any, **options: Any) -> Any:
    """The same LoRA by peft, with the numbers of ours."""
    model: Any = peft.get_peft_model(
        classifier(base), peft.LoraConfig(target_modules=MODULES[family], task_type="SEQ_CLS", **options)
    )
    with torch.no_grad():
        for name, views in adapter._views.items():
            for layer, view in enumerate(views):
                module: Any = model.get_submodule(
                    f"base_model.model.{model.base_model.model.base_model_prefix}.{view.module}"
                )
                module.lora_A["default"].weight.copy_(adapter.change.trained()[f"lora_A.{name}.{layer}"])
                module.lora_B["default"].weight.copy_(adapter.change.trained()[f"lora_B.{name}.{layer}"])
    return model


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("family", MODULES)
def test_forward_gradients_and_merged_weights_equal_pefts(family: str, rslora: bool, pico: Make) -> None:
    base = pico(family)
    model = classifier(base)
    start = logits(model)
    adapter = craft.attach(model, method="lora", rank=3, alpha=5.0, use_rslora=rslora)
    assert torch.equal(logits(model), start)  # B is zero
    shake(adapter)
    theirs = with_peft(base, family, adapter, r=3, lora_alpha=5.0, use_rslora=rslora).eval()
    assert torch.allclose(logits(model), logits(theirs), atol=1e-6)
    assert not torch.allclose(logits(model), start, atol=1e-3)

    model(**token_batch()).logits.square().sum().backward()
    theirs(**token_batch()).logits.square().sum().backward()
    for name, views in adapter._views.items():
        for layer, view in enumerate(views):
            module = theirs.get_submodule(f"base_model.model.{model.base_model_prefix}.{view.module}")
            for part in ("lora_A", "lora_B"):
                ours = adapter.change.trained()[f"{part}.{name}.{layer}"].grad
                expected = getattr(module, part)["default"].weight.grad
                assert ours is not None
                assert torch.allclose(ours, expected, rtol=1e-5, atol=1e-6)

    adapter.merge()
    merged = theirs.merge_and_unload()
    for name, parameter in merged.named_parameters():
        assert torch.allclose(model.get_parameter(name), parameter, atol=1e-6), name


def test_dropout_is_of_what_goes_into_a_and_in_training_only(pico: Make) -> None:
    model = classifier(pico())
    adapter = craft.attach(model, method="lora", rank=2, lora_dropout=0.5)
    shake(adapter)
    batch = token_batch()  # the base's own dropout is off in this pico model
    assert torch.equal(model.eval()(**batch).logits, model(**batch).logits)
    model.train()
    torch.manual_seed(0)
    first = model(**batch).logits
    assert not torch.equal(first, model(**batch).logits)
    torch.manual_seed(0)
    assert torch.equal(first, model(**batch).logits)


def test_the_start_is_pefts(pico: Make) -> None:
    """Kaiming uniform of A: the same spread as peft's, B zero."""
    adapter = craft.attach(classifier(pico()), method="lora", rank=8)
    a = torch.cat([p.detach().flatten() for name, p in adapter.change.trained().items() if "lora_A" in name])
    assert float(a.abs().max()) == pytest.approx((1 / 24) ** 0.5, rel=0.02)
    assert not any(p.any() for name, p in adapter.change.trained().items() if "lora_B" in name)
    assert adapter.count_parameters() == 2 * 3 * 8 * 48


@pytest.mark.parametrize("family", families("AutoModelForSequenceClassification"))
def test_every_family_starts_at_the_base_is_saved_merged_and_exported(family: str, pico: Make) -> None:
    base = pico(family)
    model = classifier(base)
    start = logits(model)
    adapter = craft.attach(model, method="lora", rank=2, targets=("query", "key", "value", "output"))
    assert torch.equal(logits(model), start)
    shake(adapter)
    adapted = logits(model)
    adapter.save("saved")
    other = classifier(base)
    craft.load(other, "saved")
    assert torch.equal(logits(other), adapted)
    assert craft.merge("saved", "dense").difference <= 1e-5
    plain = AutoModelForSequenceClassification.from_pretrained("dense").eval()
    assert torch.allclose(logits(plain), adapted, atol=1e-4)
    result = craft.merge("saved", "lora", format="peft")
    assert result.rank == (6 if family in FUSED else 2)
    again = peft.PeftModel.from_pretrained(classifier(base), "lora").eval()
    assert torch.allclose(logits(again), adapted, atol=1e-4)
    assert json.loads(Path("lora/adapter_config.json").read_text())["task_type"] == "SEQ_CLS"


def lora(base: Path, data: Path, **settings: Any) -> RunConfig:
    """Settings of the other tests' runs, by LoRA."""
    return config(base, data, **({"method": "lora", "rank": 4, "alpha": 8.0, "save_steps": 4} | settings))


def test_the_same_loop_trains_it_and_a_cut_run_ends_equal(pico: Make, data_dir: Path) -> None:
    base = pico(hidden_dropout_prob=0.1)
    result = craft.train(lora(base, data_dir, output_dir="uncut", lora_dropout=0.1))
    assert result.parameters == {"adapter": 2 * 3 * 4 * 48, "head": 50}
    assert any(tensor.any() for name, tensor in tensors("uncut").items() if name.startswith("lora_B"))
    cut(lora(base, data_dir, lora_dropout=0.1), Cut(9))
    craft.train(lora(base, data_dir, lora_dropout=0.1, resume=True))
    same("out", "uncut")


@pytest.mark.slow
def test_run_and_adapter_say_what_they_are(pico: Make, data_dir: Path) -> None:
    craft.train(lora(pico(), data_dir, output_dir="runs/mine", num_train_epochs=1))
    record = json.loads(Path("runs/mine/adapter/adapter_config.json").read_text())
    assert (record["method"], record["rank"], record["alpha"], record["use_rslora"]) == ("lora", 4, 8.0, False)
    recipe = Path("runs/mine/recipe.yaml").read_text()
    assert "method: lora" in recipe
    assert "ranks:" not in recipe
    card = Path("runs/mine/adapter/README.md").read_text()
    assert "LoRA adapter on" in card
    assert "1,152 in A and B of query, value (rank 4, alpha 8)" in card
    shown = invoke("inspect", "runs/mine").stdout
    assert "LoRA, rank 4, alpha 8" in shown
    assert "norm of dW in layer" in shown
    found = craft.inspect("runs/mine")
    saved = read_adapter(Path("runs/mine/adapter"))
    _, adapter, _ = load_adapted(Path("runs/mine/adapter"))
    for row in found.projections:
        dense = [delta(chain).detach() for chain in adapter.change.chains(row["name"])]
        assert row["change_by_layer"] == pytest.approx([float(matrix.norm()) for matrix in dense], rel=1e-4, abs=1e-9)
        assert row["parameters"] == 3 * 4 * 48
        chains = list(saved.chains(row["name"]))
        assert inner(chains[0], chains[1]) == pytest.approx(float((dense[0] * dense[1]).sum()), rel=1e-3, abs=1e-9)
    assert "lora" in invoke("inspect", "runs").stdout
    assert invoke("inspect", "runs/mine", "--html", "page.html").exit_code == 0
    craft.train(config(pico(), data_dir, output_dir="runs/other", num_train_epochs=1))
    compared = invoke("inspect", "--compare", "runs/mine", "runs/other").stdout
    assert "LoRA" in compared
    assert "CRAFT" in compared


def test_another_run_may_start_from_it(pico: Make, data_dir: Path) -> None:
    craft.train(lora(pico(), data_dir, output_dir="first", num_train_epochs=1))
    result = craft.train(lora(pico(), data_dir, output_dir="second", init_from="first", learning_rate=0.0))
    assert result.metrics
    ours = {name: tensor for name, tensor in tensors("second").items() if name.startswith("lora_")}
    assert ours
    assert all(torch.equal(tensor, tensors("first")[name]) for name, tensor in ours.items())
    with pytest.raises(ConfigError, match="first has rank 4; pass rank 4"):
        craft.train(lora(pico(), data_dir, output_dir="third", init_from="first", rank=5))
    with pytest.raises(ConfigError, match="first was trained by lora; pass method lora"):
        craft.train(config(pico(), data_dir, output_dir="third", init_from="first"))


def test_a_base_in_another_precision_is_known_again_and_another_is_not(pico: Make) -> None:
    adapter = craft.attach(classifier(pico()), method="lora", rank=2)
    shake(adapter)
    adapter.save("saved")
    craft.load(classifier(pico(), dtype=torch.bfloat16), "saved")
    with pytest.raises(craft.CraftError, match="the weights of this model"):
        craft.load(classifier(pico(initializer_range=0.1), dtype=torch.bfloat16), "saved")


def test_options_of_another_method_are_refused(pico: Make) -> None:
    assert "--ranks is for --method craft, not lora" in failure(
        "train", "--task", "sst2", "--method", "lora", "--ranks", "4,4,2"
    )
    assert "--rank is for --method lora or pissa or lora-xs or lotr or superlora, not craft" in failure(
        "train", "--task", "sst2", "--rank", "4"
    )
    told = failure("train", "--task", "sst2", "--method", "lora", "--adapter-factors", "reference")
    assert "--method lora has no factors; remove it" in told
    with pytest.raises(ConfigError, match="method lora has no option 'ranks'; did you mean 'rank'"):
        craft.attach(classifier(pico()), method="lora", ranks=(4, 4, 2))
    with pytest.raises(ConfigError, match="method: unknown method 'lorra'; did you mean 'lora'"):
        craft.attach(classifier(pico()), method="lorra")


def test_damaged_numbers_of_it_are_noticed(pico: Make) -> None:
    from craft_cli.files import read_tensors, write_tensors

    adapter = craft.attach(classifier(pico()), method="lora", rank=2)
    adapter.save("saved")
    file = Path("saved/adapter_model.safetensors")
    stored, header = read_tensors(file, "an adapter")
    assert {name.split(".")[0] for name in load_file(file)} == {"lora_A", "lora_B", "query", "value", "head"}
    write_tensors(file, "an adapter", stored | {"lora_A.query.1": torch.zeros(3, 24)}, header)
    with pytest.raises(craft.CraftError, match=r"lora_A.query.1 is torch.float32 \(3, 24\), not \(2, 24\)"):
        craft.load(classifier(pico()), "saved")
    record = json.loads(Path("saved/adapter_config.json").read_text())
    Path("saved/adapter_config.json").write_text(json.dumps(record | {"rank": -1}))
    with pytest.raises(craft.CraftError, match="its rank: Input should be greater than 0"):
        craft.load(classifier(pico()), "saved")
    for odd in (
        {"alpha": 1e308},
        {"rank": "8"},
        {"alpha": None},
        {"use_rslora": 3},
        {"rank": 10**9},
        {"rank": 10**18},
        {"rank": 10**400},
    ):
        Path("saved/adapter_config.json").write_text(json.dumps(record | odd))
        with pytest.raises(craft.CraftError, match="is damaged"):
            craft.load(classifier(pico()), "saved")


def test_a_file_of_more_layers_than_any_model_has_is_refused_at_once(pico: Make) -> None:
    from craft_cli.files import read_tensors, write_tensors

    craft.attach(classifier(pico()), method="lora", rank=2).save("saved")
    file = Path("saved/adapter_model.safetensors")
    stored, header = read_tensors(file, "an adapter")
    stored |= {f"{name}.sketch": torch.zeros(5000, 16) for name in ("query", "value")}
    write_tensors(file, "an adapter", stored, header | {"shapes": {"query": [5000, 24, 24], "value": [5000, 24, 24]}})
    assert "query has 5000 layers, more than 1024" in failure("inspect", "saved")
    write_tensors(file, "an adapter", stored, header | {"shapes": None})
    assert "its header holds a value of the wrong type" in failure("inspect", "saved")
