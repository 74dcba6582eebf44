"""What holds for every registered method, so that a new one is tested by being registered."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import classifier, failure, invoke, shake, token_batch
from helpers import Cut, config, cut, lines, logits, mostly_slow, same, tensors
from picos import LAYOUTS
from transformers import AutoModelForSequenceClassification

import craft_cli as craft
from craft_cli.config import METHOD_OPTIONS, RunConfig, parse_budget
from craft_cli.config.options import LEARNING_RATES, WITH_FACTORS
from craft_cli.errors import ConfigError, CraftError, FileError, ModelError
from craft_cli.methods import METHODS, method_named
from craft_cli.methods.adapter_folder import read_adapter
from craft_cli.methods.base import delta, inner
from craft_cli.models.hub import resolve
from craft_cli.models.loading import load_quantised
from craft_cli.models.stacks import read_weights

pytestmark = [  # peft asks for it
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated"),
]

Make = Callable[..., Path]
OPTIONS: dict[str, dict[str, Any]] = {
    "craft": {"ranks": (6, 5, 2)}, "superlora": {"rank": 3, "superlora_groups": 2}, "lora": {"rank": 3, "alpha": 3.0},
}  # fmt: skip
"""Small ones; rank 3 of the others."""
ALL = ("all-linear",)
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, OPTIONS.get(name, {"rank": 3})) for name in METHODS),
    ("lora", {"rank": 3, "use_rslora": True, "alpha": 3.0}), ("pissa", {"rank": 4, "pissa_niter": 2}),
    ("lotr", {"rank": 3, "lotr_share": "projection"}), ("lotr", {"rank": 3, "lotr_start": "svd"}),
    ("superlora", {"rank": 2, "superlora_order": 3}),
    ("superlora", {"rank": 2, "superlora_splits": 2, "superlora_groups": 3}),
    ("superlora", {"rank": 2, "superlora_projection": 0.3, "superlora_groups": 2, "superlora_order": 4}),
]  # fmt: skip
NAMES = [f"{name}-{'-'.join(map(str, options.values()))}" for name, options in VARIANTS]


SLOW = [name for name in METHODS if name != "pissa"]
"""One takes every step by default, the others behind the marker."""


@pytest.fixture(params=[pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in METHODS])
def method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def options_of(method: str) -> dict[str, Any]:
    return OPTIONS.get(method, {"rank": 3})


def settings(base: Path, data: Path, method: str, **more: Any) -> RunConfig:
    return config(base, data, method=method, **options_of(method), **({"save_steps": 4} | more))


def check(method: str, options: dict[str, Any], base: Path, dtype: torch.dtype = torch.float32) -> None:
    """Start, save, load, merge: invariants 1, 4 and 5 of the design."""
    model = classifier(base, dtype=dtype)
    start = logits(model)
    adapter = craft.attach(model, method=method, targets=ALL, **options)
    assert torch.equal(logits(model), start)
    assert adapter.count_parameters() == adapter.method.count(adapter.frozen.shapes, adapter.options)
    shake(adapter, 0.1)
    adapted = logits(model)
    assert not torch.allclose(adapted, start, rtol=1e-6, atol=1e-6)
    adapter.save("saved")
    other = classifier(base, dtype=dtype)
    craft.load(other, "saved")
    assert torch.equal(logits(other), adapted)
    if dtype == torch.float32:
        assert craft.merge("saved", "dense", overwrite=True).difference <= 1e-5
        plain = AutoModelForSequenceClassification.from_pretrained("dense").eval()
        assert torch.allclose(logits(plain), adapted, atol=1e-4 * float(adapted.abs().max()))


@pytest.mark.parametrize(("method", "options"), VARIANTS, ids=NAMES)
def test_it_starts_at_the_base_is_saved_loaded_and_merged(method: str, options: dict[str, Any], pico: Make) -> None:
    check(method, options, pico())


@pytest.mark.parametrize("layout", ["llama", "gpt2"])
def test_so_do_grouped_query_and_fused_layouts(layout: str, method: str, pico: Make) -> None:
    check(method, options_of(method), pico(layout))


@pytest.mark.slow
@pytest.mark.parametrize("family", LAYOUTS)
@pytest.mark.parametrize(("method", "options"), VARIANTS, ids=NAMES)
def test_so_does_every_variant_on_every_layout(method: str, options: dict[str, Any], family: str, pico: Make) -> None:
    check(method, options, pico(family))


def test_it_works_in_bfloat16(method: str, pico: Make) -> None:
    check(method, options_of(method), pico(dtype=torch.bfloat16), torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_it_is_known_again_on_a_quantised_base(bits: int, method: str, pico: Make) -> None:
    pytest.importorskip("bitsandbytes")
    folder = pico(hidden_size=64, intermediate_size=128)
    adapter = craft.attach(classifier(folder), method=method, **options_of(method))
    adapter.save("saved")
    kind, cpu = "AutoModelForSequenceClassification", torch.device("cpu")
    model, _ = load_quantised(resolve(str(folder)), kind, {"num_labels": 2}, bits, torch.float32, cpu)
    craft.load(model, "saved")
    other = resolve(str(pico(hidden_size=64, intermediate_size=128, initializer_range=0.03)))
    wrong, _ = load_quantised(other, kind, {"num_labels": 2}, bits, torch.float32, cpu)
    with pytest.raises(ModelError, match="the weights of this model"):
        craft.load(wrong, "saved")


def test_only_what_is_named_gets_a_gradient_and_checkpointing_changes_none(method: str, pico: Make) -> None:
    gradients = []
    for recomputed in (False, True):
        model = classifier(pico()).train()
        adapter = craft.attach(model, method=method, **options_of(method))
        shake(adapter)
        if recomputed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(**token_batch()).logits.square().sum().backward()
        assert all(parameter.grad is not None and parameter.grad.any() for parameter in adapter.parameters())
        named = {id(parameter) for parameter in adapter.parameters()} | {
            id(model.get_parameter(name)) for name in adapter.head
        }
        assert all((parameter.grad is None) == (id(parameter) not in named) for parameter in model.parameters())
        gradients.append([parameter.grad for parameter in adapter.parameters()])
    for plain, again in zip(*gradients, strict=True):
        assert torch.allclose(plain, again, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("method", "options"), VARIANTS, ids=NAMES)
def test_norms_and_products_are_those_of_the_dense_changes(method: str, options: dict[str, Any], pico: Make) -> None:
    adapter = craft.attach(classifier(pico()), method=method, **options)
    shake(adapter)
    adapter.save("saved")
    saved = read_adapter(Path("saved"))
    found = craft.inspect("saved").projections
    for row in found:
        chains = list(saved.chains(row["name"]))
        dense = [delta(chain) for chain in chains]
        assert all(matrix.dtype == torch.float64 for matrix in dense)
        assert row["change_by_layer"] == pytest.approx([float(matrix.norm()) for matrix in dense])
        for matrix, directions in zip(dense, row["effective_rank_by_layer"], strict=True):
            shares = torch.linalg.svdvals(matrix)
            shares = shares[shares > 1e-12 * shares[0]] / shares.sum()
            assert directions == pytest.approx(float((-(shares * shares.log()).sum()).exp()), rel=1e-6)
        assert inner(chains[0], chains[1]) == pytest.approx(float((dense[0] * dense[1]).sum()))
        live = adapter.change.chains(row["name"])  # of the model, in float32
        assert all(
            torch.allclose(delta(one).detach().double(), two, atol=1e-5) for one, two in zip(live, dense, strict=True)
        )


@pytest.mark.parametrize("method", [name for name in METHODS if name != "superlora"])
def test_it_is_exported_as_a_lora_that_peft_loads(method: str, pico: Make) -> None:
    base = pico("llama")
    model = classifier(base)
    adapter = craft.attach(model, method=method, targets=ALL, **options_of(method))
    shake(adapter)
    adapted = logits(model)
    adapter.save("saved")
    result = craft.merge("saved", "lora", format="peft")
    assert result.rank == {"craft": 5, "pissa": 6}.get(method, 3)
    assert result.tolerance == 1e-5
    again = peft.PeftModel.from_pretrained(classifier(base), "lora").eval()
    assert torch.allclose(logits(again), adapted, atol=1e-4)


def test_resumed_equals_uninterrupted(method: str, pico: Make, data_dir: Path) -> None:
    base = pico()
    craft.train(settings(base, data_dir, method, output_dir="uncut"))
    cut(settings(base, data_dir, method), Cut(9))
    craft.train(settings(base, data_dir, method, resume=True))
    same("out", "uncut")
    assert any(tensor.any() for name, tensor in tensors("uncut").items() if "sketch" not in name)
    assert len({line["eval_loss"] for line in lines() if "eval_loss" in line}) == 3  # it learns something


def test_another_run_goes_on_from_what_it_trained(method: str, pico: Make, data_dir: Path) -> None:
    craft.train(settings(pico(), data_dir, method, output_dir="first", num_train_epochs=1))
    craft.train(settings(pico(), data_dir, method, output_dir="second", init_from="first", learning_rate=0.0))
    first, second = (read_adapter(Path(run, "adapter")).trained for run in ("first", "second"))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_what_is_trained_and_where_it_comes_from_is_told(method: str, pico: Make, data_dir: Path) -> None:
    result = craft.train(settings(pico(), data_dir, method, num_train_epochs=1))
    chosen = method_named(method)
    card = Path("out/adapter/README.md").read_text()
    assert f"{chosen.title} adapter" in card
    recipe = Path("out/recipe.yaml").read_text()
    assert f"method: {method}" in recipe
    assert f"learning_rate: {3e-2}" in recipe
    shown = invoke("inspect", "out").stdout
    assert f"{chosen.title}, " in shown
    assert f"{result.parameters['adapter']:,}" in shown
    listed = invoke("inspect", ".").stdout
    assert all(part in listed for part in (f" {method} ", f" {result.parameters['adapter']:,} "))
    # the recipe repeats the run
    again = craft.train(RunConfig.build({"output_dir": "again"}, craft_recipe("out")))
    assert again.metrics == result.metrics


def craft_recipe(run: str) -> dict[str, Any]:
    from craft_cli.config import load_recipe

    return load_recipe(f"{run}/recipe.yaml")


@pytest.mark.parametrize("method", mostly_slow(WITH_FACTORS, "craft"))
def test_an_adapter_may_only_refer_to_what_is_frozen(method: str, pico: Make, data_dir: Path) -> None:
    base = pico()
    run = settings(base, data_dir, method, adapter_factors="reference", cache_dir="kept", num_train_epochs=1)
    craft.train(run)
    craft.train(settings(base, data_dir, method, output_dir="whole", cache_dir="kept", num_train_epochs=1))
    small, whole = tensors("out"), tensors("whole")
    assert set(small) < set(whole)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in small.items())
    model, other = classifier(base), classifier(base)
    craft.load(model, "out/adapter", cache_dir="kept")
    craft.load(other, "whole/adapter")
    assert torch.equal(logits(model), logits(other))
    with pytest.raises(FileError, match="only refers to its"):
        read_adapter(Path("out/adapter"), "elsewhere")
    again = classifier(base)
    craft.load(again, "out/adapter", cache_dir="elsewhere")  # made of its base once more
    assert torch.equal(logits(again), logits(other))


@pytest.mark.parametrize("method", [name for name in METHODS if name not in WITH_FACTORS])
def test_one_without_factors_refuses_to_refer(method: str, pico: Make) -> None:
    with pytest.raises(ConfigError, match=f"{method} has no factors; remove it"):
        RunConfig.build({"task": "sst2", "method": method, "adapter_factors": "reference"})
    with pytest.raises(ConfigError, match=f"{method} has no factors to refer to"):
        craft.attach(classifier(pico()), method=method).save("saved", factors="reference")


def test_another_base_is_refused(method: str, pico: Make) -> None:
    craft.attach(classifier(pico()), method=method, **options_of(method)).save("saved")
    with pytest.raises(ModelError, match="the weights of this model"):
        craft.load(classifier(pico(hidden_act="relu", initializer_range=0.5)), "saved")


@pytest.mark.parametrize("budget", [700, 2000, 5000])
def test_a_budget_is_used_as_far_as_it_goes(budget: int, method: str, pico: Make) -> None:
    weights = read_weights(resolve(str(pico()), None), ALL)
    chosen = method_named(method)
    silent = lambda what, done, total: None  # noqa: E731
    if method != "craft" and chosen.count(weights.shapes, chosen.Options(rank=1)) > budget:
        with pytest.raises(ConfigError, match=f"--budget: {budget:,} is below the .* parameters of {method} at rank 1"):
            chosen.within(weights, chosen.Options(), budget, silent)
        return
    found = chosen.within(weights, chosen.Options(), budget, silent)
    numbers = chosen.count(weights.shapes, found)
    assert numbers <= budget
    if method != "craft":
        larger = chosen.count(weights.shapes, chosen.Options(**asdict(found) | {"rank": found.rank + 1}))
        assert larger > budget
    frozen, _ = chosen.prepare(weights, found, None, silent)
    assert sum(p.numel() for p in chosen.build(frozen, found).parameters()) == numbers


@pytest.mark.parametrize("name", METHODS)
def test_a_rank_that_no_weight_has_takes_no_memory(name: str, pico: Make) -> None:
    weights = read_weights(resolve(str(pico("llama")), None), ALL)  # 40, 20 and 24 wide
    chosen = method_named(name)
    silent = lambda what, done, total: None  # noqa: E731
    most = chosen.within(weights, chosen.Options(), parse_budget("1e12"), silent)
    frozen, _ = chosen.prepare(weights, most, None, silent)
    assert sum(p.numel() for p in chosen.build(frozen, most).parameters()) < 200_000
    for given in (10**9, 10**20) if name != "craft" else ():
        try:
            frozen, _ = chosen.prepare(weights, chosen.Options(rank=given), None, silent)
        except ConfigError as error:
            assert str(error) == f"--rank {given}: no adapted weight has a rank above 24"  # noqa: PT017
        else:
            assert sum(p.numel() for p in chosen.build(frozen, chosen.Options(rank=given)).parameters()) < 200_000


@pytest.mark.parametrize(
    "text", ["5kk", "5km", "1e30", "inf", "nan", "0.0001", "0", "-5", "0x10", "2_000_000m", "k", ""]
)
def test_what_is_no_budget_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--budget: expected a number of parameters such as 50000 or 50k"):
        parse_budget(text)


def test_numbers_of_a_budget() -> None:
    found = [parse_budget(it) for it in ("16k", "1.5M", " 700 ", "1e3", "2e3k", "16_500", 5)]
    assert found == [16_000, 1_500_000, 700, 1000, 2_000_000, 16_500, 5]


def test_where_a_run_starts_is_not_what_another_one_goes_on_from(pico: Make, data_dir: Path) -> None:
    base = pico()
    craft.train(settings(base, data_dir, "lotr", output_dir="svd", lotr_start="svd", max_steps=2))
    go_on = ("--init-from", "svd", "--task", "sst2", "--data-dir", str(data_dir), "--use-cpu", "--max-steps", "1")
    assert invoke("train", *go_on, "--output-dir", "on").exit_code == 0
    assert "lotr_start: random" in Path("on/recipe.yaml").read_text()
    told = invoke("train", *go_on, "--lotr-start", "svd", "--output-dir", "not").stderr
    assert told == "error: --init-from and --lotr-start cannot be combined: both initialize the adapter\n"


def test_another_runs_options_are_told_as_flags(pico: Make) -> None:
    frozen = craft.attach(classifier(pico()), method="lora").frozen
    lora, pissa = method_named("lora"), method_named("pissa")
    plain, scaled = lora.Options(), lora.Options(use_rslora=True, lora_dropout=0.1)
    assert lora.unlike(frozen, scaled, plain) == "has use_rslora True; pass --use-rslora"
    assert lora.unlike(frozen, plain, scaled) == "has use_rslora False; pass --no-use-rslora"
    told = pissa.unlike(frozen, pissa.Options(rank=4), pissa.Options(pissa_niter=2))
    assert told == "has rank 4, pissa_niter None; pass --rank 4, omit --pissa-niter"


def test_no_projection_at_all_is_refused(method: str, pico: Make) -> None:
    with pytest.raises(ConfigError, match="targets: name each projection once"):
        craft.attach(classifier(pico()), method=method, targets=())


def test_the_command_chooses_within_the_budget(method: str, pico: Make, data_dir: Path) -> None:
    run = settings(pico(), data_dir, method, num_train_epochs=1)
    named = {name: value for name, value in run.recipe().items() if name not in ("rank", "ranks")}
    result = craft.train(RunConfig.build(named | {"budget": "1.2k", "output_dir": "out"}))
    assert 0 < result.parameters["adapter"] <= 1200
    recipe = craft_recipe("out")
    assert "budget" not in recipe
    assert ("ranks" if method == "craft" else "rank") in recipe


def test_it_learns_at_its_own_rate_unless_told(method: str) -> None:
    given = {"task": "sst2", "method": method}
    assert RunConfig.build(given).recipe()["learning_rate"] == LEARNING_RATES[method]
    assert RunConfig.build(given | {"learning_rate": 0.5}).recipe()["learning_rate"] == 0.5
    other = next(name for name in METHODS if name != method)
    former = {"task": "sst2", "method": other, "learning_rate": 0.5}  # another method's rate says nothing
    assert RunConfig.build({"method": method}, former).recipe()["learning_rate"] == LEARNING_RATES[method]


def test_options_of_others_are_refused_and_its_own_are_in_the_help(method: str) -> None:
    shown = invoke("train", "--help").stdout
    for name in asdict(METHOD_OPTIONS[method]()):
        assert f"--{name.replace('_', '-')}" in shown
    others = {name for kind in METHOD_OPTIONS.values() for name in asdict(kind())} - set(
        asdict(METHOD_OPTIONS[method]())
    )
    for name in others:
        flag = f"--{name.replace('_', '-')}"
        value = {"ranks": "4,4,2", "lotr_share": "all", "lotr_start": "svd", "superlora_projection": 0.5}.get(name, 1)
        value = True if name in ("init_noise", "use_rslora") else 0.5 if name == "lora_dropout" else value
        value = 2 if name == "superlora_order" else value
        with pytest.raises(ConfigError, match=f"{flag} is for --method .*, not {method}"):
            RunConfig.build({"task": "sst2", "method": method, name: value})


def test_the_list_names_it_with_its_paper_and_numbers(method: str, pico: Make) -> None:
    listed = invoke("methods").stdout
    chosen = method_named(method)
    assert chosen.paper in listed
    rows = json.loads(invoke("methods", "--model", str(pico()), "--budget", "900", "--json").stdout)
    row = next(row for row in rows if row["name"] == method)
    adapter = craft.attach(classifier(pico()), method=method)
    assert row["parameters"] == adapter.count_parameters()
    assert row["budget_parameters"] is None or row["budget_parameters"] <= 900
    assert (row["budget_parameters"] is None) == (row["problem"] is not None)
    fewer = json.loads(invoke("methods", "--model", str(pico()), "--targets", "key", "--json").stdout)
    one = craft.attach(classifier(pico()), method=method, targets=["key"])
    assert next(row["parameters"] for row in fewer if row["name"] == method) == one.count_parameters()


def test_a_list_within_a_budget_needs_a_model() -> None:
    assert "--budget requires --model" in failure("methods", "--budget", "1k")


def test_a_damaged_adapter_is_refused(method: str, pico: Make) -> None:
    craft.attach(classifier(pico()), method=method, **options_of(method)).save("saved")
    file = Path("saved/adapter_config.json")
    record = json.loads(file.read_text())
    for name in method_named(method).settings(read_adapter(Path("saved")).frozen, read_adapter(Path("saved")).options):
        wrong: Any
        for wrong in ("x", -1, {}, 10**9):
            file.write_text(json.dumps(record | {name: wrong}))
            if wrong == 10**9 and name in ("alpha", "superlora_seed", "pissa_niter"):
                continue
            with pytest.raises(CraftError, match="damaged"):
                read_adapter(Path("saved"))
        file.write_text(json.dumps({key: value for key, value in record.items() if key != name}))
        with pytest.raises(CraftError, match="damaged"):
            read_adapter(Path("saved"))
