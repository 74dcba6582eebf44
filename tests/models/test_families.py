"""Every supported family: exact start, views, merge, save and load (DESIGN properties 1, 4, 5)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_pico, classifier, shake, token_batch
from picos import PICO, families
from transformers import AutoModel, AutoModelForSequenceClassification

import craft_cli as craft
from craft_cli.config import ALL_LINEAR
from craft_cli.errors import ConfigError, FileError, ModelError
from craft_cli.files import read_tensors, write_tensors
from craft_cli.models import families as projections
from craft_cli.models.families import FAMILIES, layer_views
from craft_cli.models.loading import head_names
from craft_cli.models.views import View

Make = Callable[..., Path]


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**token_batch()).logits


def test_the_table_holds_the_families_tested() -> None:
    assert sorted(FAMILIES) == sorted(PICO)


@pytest.mark.parametrize("family", families("AutoModelForSequenceClassification"))
def test_starts_at_the_base_merges_to_the_adapted_and_loads_as_saved(family: str, pico: Make) -> None:
    base = pico(family)
    model = classifier(base)
    start = logits(model)
    factors = craft.decompose(str(base), ALL_LINEAR, (6, 5, 2))
    adapter = craft.attach(model, factors)
    assert torch.equal(logits(model), start)

    shake(adapter)
    adapted = logits(model)
    assert (adapted - start).abs().max() > 1e-2 * start.abs().max()
    with torch.no_grad():
        for tensor in adapter.head_state().values():
            tensor.add_(0.01)
    adapted = logits(model)
    adapter.save("saved")
    other = classifier(base)
    with torch.no_grad():  # another random head, which loading must replace
        for name in head_names(other):
            other.get_parameter(name).normal_()
    craft.load(other, "saved")
    assert torch.equal(logits(other), adapted)

    names = {name for name, _ in model.named_parameters() if "craft" not in name}
    changed = adapter.merge()
    assert len(changed) == len(
        {view.module for views in layer_views(model.config, (ALL_LINEAR,)).values() for view in views}
    )
    assert {name for name, _ in model.named_parameters()} == names
    assert (logits(model) - adapted).abs().max() <= 1e-5 * adapted.abs().max()
    model.save_pretrained("plain")
    plain, report = AutoModelForSequenceClassification.from_pretrained("plain", output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(logits(plain.eval()), logits(model))


@torch.no_grad()
def reaching(family: str, model: Any, target: str, changed: Callable[[torch.Tensor], None] | None, view: View) -> Any:
    """What goes into a projection, (rows, positions, d_in), where another one's output is changed in place."""
    found: list[torch.Tensor] = []
    to = layer_views(model.config, (target,))[target][1].module_of(model)
    handles = [to.register_forward_pre_hook(lambda module, inputs: found.append(inputs[0].clone()))]

    def change(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
        if changed:
            changed(view.rows.of(output, -1) if view.rows else output)

    handles.append(view.module_of(model).register_forward_hook(change))
    ids = token_batch()["input_ids"][:2]
    model(input_ids=ids, **({"decoder_input_ids": ids} if family == "t5" else {}))
    for handle in handles:
        handle.remove()
    return found[0].reshape(*ids.shape, -1)


def fourth_position(part: torch.Tensor) -> None:
    part[:, 3] += torch.linspace(-2, 3, part[:, 3].numel()).view_as(part[:, 3])


def every_position(part: torch.Tensor) -> None:
    part += torch.linspace(-2, 3, part[0, 0].numel()).view_as(part[0, 0])


def doubled(part: torch.Tensor) -> None:
    part *= 2


@pytest.mark.parametrize("family", families("AutoModel"))
def test_projections_are_what_the_table_calls_them(family: str, pico: Make) -> None:
    """Independent of the table: by what a change of their outputs does to what follows."""
    model = AutoModel.from_pretrained(pico(family)).eval()
    views = {target: layers[1] for target, layers in layer_views(model.config, (ALL_LINEAR,)).items()}

    def moved(target: str, name: str, changed: Callable[[torch.Tensor], None]) -> torch.Tensor:
        before = reaching(family, model, target, None, views[name])
        return (reaching(family, model, target, changed, views[name]) - before).abs()

    query, key = (moved("output", name, fourth_position) for name in ("query", "key"))
    others = torch.arange(9) != 3
    assert query[:, 3].max() > 1e-3  # a query matters to its own position, a key to others
    assert query[:, others].max() < 1e-6
    assert key[:, others].max() > 1e-3
    value = moved("output", "value", every_position)
    assert value.min(-1).values.max() > 1e-3 or value.max() > 1e-1  # shares of it add up to it, at every position alike
    assert (value - value[:, :1]).abs().max() < 1e-4
    assert moved("down", "up", doubled).max() > 1e-3
    if "gate" in views:  # act(gate) * up
        plain = reaching(family, model, "down", None, views["up"]).abs()
        torch.testing.assert_close(moved("down", "up", doubled), plain, rtol=1e-3, atol=1e-5)
        assert not torch.allclose(moved("down", "gate", doubled), plain, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", families("AutoModel"))
def test_views_read_the_weights_that_the_family_computes_with(family: str, pico: Make) -> None:
    """Take one projection off the weight, and its own output vanishes."""
    model = AutoModel.from_pretrained(pico(family)).eval()
    for views in layer_views(model.config, (ALL_LINEAR,)).values():
        view = views[1]
        module = view.module_of(model)
        weight = module.get_parameter("weight").data
        matrix = view.read(weight).clone()
        x = torch.randn(2, matrix.shape[1])
        before = module(x)
        view.add_to_weight(weight, -matrix)
        difference = before - module(x)
        assert torch.allclose(difference[..., difference.abs().sum(0) > 0], x @ matrix.T, atol=1e-4)


def test_shapes_are_those_of_heads_and_widths(pico: Make) -> None:
    model = AutoModel.from_pretrained(pico("llama"))
    shapes = {
        name: views[0].shape(views[0].stored_shape(model))
        for name, views in layer_views(model.config, (ALL_LINEAR,)).items()
    }
    assert shapes == {
        "query": (40, 24), "key": (20, 24), "value": (20, 24), "output": (24, 40), "gate": (32, 24), "up": (32, 24),
        "down": (24, 32),
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("changes", [
    {"multi_query": True, "new_decoder_architecture": False, "bias": True},
    {"multi_query": False, "alibi": True, "new_decoder_architecture": False, "num_kv_heads": 4},
])  # fmt: skip
def test_falcon_has_three_layouts(changes: dict[str, Any], pico: Make) -> None:
    test_projections_are_what_the_table_calls_them("falcon", lambda family: pico(family, **changes))


def test_t5_without_a_gate_has_two_matrices(pico: Make) -> None:
    test_projections_are_what_the_table_calls_them("t5", lambda family: pico(family, feed_forward_proj="relu"))


def test_a_later_family_is_a_row_of_the_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Persimmon has query, key and value head by head; the table alone makes it work."""
    monkeypatch.setitem(PICO, "persimmon", PICO["gpt_neox"])
    monkeypatch.setitem(
        projections.FAMILIES,
        "persimmon",
        projections.fused("layers.{layer}.self_attn.query_key_value", projections.by_head),
    )
    base = build_pico("persimmon", tmp_path / "persimmon")
    model = classifier(base)
    start = logits(model)
    adapter = craft.attach(model, craft.decompose(str(base), ("query", "value"), (6, 5, 2)))
    assert torch.equal(logits(model), start)
    shake(adapter)
    adapted = logits(model)
    assert (adapted - start).abs().max() > 1e-2 * start.abs().max()
    weight = model.base_model.layers[0].self_attn.query_key_value.weight.detach().clone()
    adapter.merge()
    difference = (model.base_model.layers[0].self_attn.query_key_value.weight - weight).abs().sum(1).reshape(2, 3, 12)
    assert (difference[:, [0, 2]] > 0).all()
    assert (difference[:, 1] == 0).all()  # no row of the key has changed
    assert (logits(model) - adapted).abs().max() <= 1e-5 * adapted.abs().max()


def test_only_what_is_trained_is_free(pico: Make) -> None:
    model = classifier(pico("roberta"), labels=3)
    adapter = craft.attach(model, craft.decompose(str(pico("roberta")), ranks=(6, 5, 2)))
    free = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    head = {f"classifier.{part}.{kind}" for part in ("dense", "out_proj") for kind in ("weight", "bias")}
    assert head == {name for name in free if "craft" not in name}
    assert adapter.count_parameters() == 2 * (6**2 + 5**2 + 2**2)
    assert adapter.count_head_parameters() == 24 * 24 + 24 + 3 * 24 + 3


def test_another_base_is_refused(pico: Make, tmp_path: Path) -> None:
    factors = craft.decompose(str(pico()), ranks=(6, 5, 2))
    other = build_pico("bert", tmp_path / "other", initializer_range=0.1)
    with pytest.raises(ModelError, match="the weights of this model"):
        craft.attach(classifier(other), factors)
    adapter = craft.attach(classifier(pico()), factors)
    adapter.save("saved")
    with pytest.raises(ModelError, match="the weights of this model"):
        craft.load(classifier(other), "saved")
    nudged = classifier(pico())
    with torch.no_grad():
        nudged.bert.encoder.layer[2].attention.self.value.weight[3, 4] += 1e-6
    with pytest.raises(ModelError, match="value"):
        craft.load(nudged, "saved")
    with pytest.raises(ModelError, match=r"num_labels=2"):
        craft.load(classifier(pico(), labels=3), "saved")


def test_a_base_in_another_precision_is_still_the_same(pico: Make, tmp_path: Path) -> None:
    half = build_pico("bert", tmp_path / "half", dtype=torch.bfloat16)
    factors = craft.decompose(str(half), ranks=(6, 5, 2))
    assert factors.dtype == "bfloat16"
    craft.attach(classifier(half, dtype=torch.float32), factors)  # wider than the checkpoint
    whole = craft.decompose(str(pico()), ranks=(6, 5, 2))
    model = classifier(pico(), dtype=torch.bfloat16)  # narrower
    start = logits(model)
    adapter = craft.attach(model, whole)
    assert torch.equal(logits(model), start)
    assert all(k.dtype == torch.float32 for k in adapter.parameters())
    shake(adapter)
    assert logits(model).dtype == torch.bfloat16
    with pytest.raises(ModelError, match="the weights of this model"):
        craft.attach(classifier(build_pico("bert", tmp_path / "x", initializer_range=0.1), dtype=torch.bfloat16), whole)


def test_slices_stay_float32_under_autocast(pico: Make) -> None:
    model = classifier(pico())
    adapter = craft.attach(model, craft.decompose(str(pico()), ranks=(6, 5, 2)))
    with torch.autocast("cpu", torch.bfloat16):
        start = logits(model)
        adapter.detach()
        assert torch.equal(logits(model), start)
    adapter = craft.attach(model, craft.decompose(str(pico()), ranks=(6, 5, 2)))
    shake(adapter, 1e-3)  # 1 + K rounds K away in bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        chain = adapter.chain("query", 0, torch.zeros(1, 24))
    assert chain is not None
    assert {matrix.dtype for matrix in chain} == {torch.bfloat16}
    current, exact = chain[1].float().T, adapter.change.chains("query")[0][1].T
    assert (current - exact).norm() <= 0.01 * exact.norm()


def test_targets_and_ranks_of_the_api(pico: Make) -> None:
    factors = craft.decompose(str(pico()), "query,key,value,output", (12, 12, 3))
    model = classifier(pico())
    adapter = craft.attach(model, factors, targets=("key",), ranks="4,2,1")
    assert adapter.count_parameters() == 4**2 + 2**2 + 1
    adapter.detach()
    with pytest.raises(ConfigError, match="ranks: cannot truncate"):
        craft.attach(model, factors, ranks=(20, 12, 3))
    with pytest.raises(ConfigError, match="not for output"):
        craft.attach(model, craft.decompose(str(pico()), ("query",), (4, 4, 2)), targets=("output",))
    craft.attach(model, factors)
    with pytest.raises(ModelError, match="already has an adapter"):
        craft.attach(model, factors)


def test_an_unsupported_family_names_the_supported_ones() -> None:
    def views(kind: str, *targets: str, **more: Any) -> Any:
        return layer_views(type("Config", (), {"model_type": kind, **more})(), targets or ("query",))

    with pytest.raises(ModelError, match="'mamba' cannot be adapted; supported: bert, bloom, camembert"):
        views("mamba")
    with pytest.raises(ModelError, match="'albert' cannot be adapted: all layers of ALBERT are one and the same"):
        views("albert")
    with pytest.raises(ModelError, match="'mixtral' cannot be adapted: its layers are mixtures of experts"):
        views("mixtral", "up", num_local_experts=8)
    with pytest.raises(ConfigError, match="unknown projection 'quer'; did you mean 'query'"):
        views("bert", "quer")
    with pytest.raises(ConfigError, match="unknown projection 'all-liner'; did you mean 'all-linear'"):
        views("bert", "all-liner")
    with pytest.raises(ConfigError, match="all-linear cannot be combined"):
        views("bert", "query", "all-linear")
    with pytest.raises(ConfigError, match="bert has no projection 'gate'; it has query, key, value, output, up, down"):
        views("bert", "query", "gate")


def test_a_damaged_adapter_is_noticed(pico: Make) -> None:
    adapter = craft.attach(classifier(pico()), craft.decompose(str(pico()), ranks=(6, 5, 2)))
    shake(adapter)
    adapter.save("saved")
    tensors, header = read_tensors(Path("saved/adapter_model.safetensors"), "an adapter")
    tensors.pop("transform.value.out")
    write_tensors(Path("saved/adapter_model.safetensors"), "an adapter", tensors, header)
    with pytest.raises(FileError, match=r"damaged.*transform.value.out"):
        craft.load(classifier(pico()), "saved")
    record = json.loads(Path("saved/adapter_config.json").read_text())
    Path("saved/adapter_config.json").write_text(json.dumps(record | {"method": "ia3"}))
    with pytest.raises(FileError, match="not a craft adapter"):
        craft.load(classifier(pico()), "saved")


def test_sizes_that_contradict_the_weights_are_refused(pico: Make) -> None:
    for family, sizes, told in (
        ("falcon", {"num_kv_heads": 5}, "which config.json contradicts"),
        ("falcon", {"num_kv_heads": 0}, "invalid for a model of type 'falcon'"),
        ("phi3", {"intermediate_size": 40}, "which config.json contradicts"),
    ):
        shutil.copytree(pico(family), family, dirs_exist_ok=True)
        config = json.loads(Path(family, "config.json").read_text())
        Path(family, "config.json").write_text(json.dumps(config | sizes))
        with pytest.raises(ModelError, match=told):
            craft.decompose(family, "all-linear", (6, 5, 2))
