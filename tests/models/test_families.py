"""Every supported family: exact start, views, merge, save and load (DESIGN properties 1, 4, 5)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import PICO, build_pico, classifier, shake, token_batch
from transformers import AutoModelForSequenceClassification, PreTrainedConfig

import craft_cli as craft
from craft_cli.errors import ConfigError, FileError, ModelError
from craft_cli.files import read_tensors, write_tensors
from craft_cli.models import families as projections
from craft_cli.models.families import FAMILIES, TARGETS, layer_views
from craft_cli.models.loading import head_names
from craft_cli.models.views import Rows, View

Make = Callable[..., Path]


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**token_batch()).logits


def test_the_table_holds_the_families_tested() -> None:
    assert sorted(FAMILIES) == sorted(PICO)


@pytest.mark.parametrize("family", PICO)
def test_starts_at_the_base_merges_to_the_adapted_and_loads_as_saved(family: str, pico: Make) -> None:
    base = pico(family)
    model = classifier(base)
    start = logits(model)
    factors = craft.decompose(str(base), TARGETS, (6, 5, 2))
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
    assert len(changed) == len({view.module for views in layer_views(model.config, TARGETS).values() for view in views})
    assert {name for name, _ in model.named_parameters()} == names
    assert (logits(model) - adapted).abs().max() <= 1e-5 * adapted.abs().max()
    model.save_pretrained("plain")
    plain, report = AutoModelForSequenceClassification.from_pretrained("plain", output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(logits(plain.eval()), logits(model))


@pytest.mark.parametrize("family", PICO)
def test_views_read_the_weights_that_the_family_computes_with(family: str, pico: Make) -> None:
    """Independent of the table: replace one projection by zeros and see its own output vanish."""
    model = classifier(pico(family))
    shapes = {}
    for target, views in layer_views(model.config, TARGETS).items():
        view = views[1]
        module = view.module_of(model.base_model)
        weight = module.get_parameter("weight").data
        matrix = view.read(weight).clone()
        shapes[target] = tuple(matrix.shape)
        x = torch.randn(2, matrix.shape[1])
        before = module(x)
        view.add_to_weight(weight, -matrix)
        difference = before - module(x)
        assert torch.allclose(difference[..., difference.abs().sum(0) > 0], x @ matrix.T, atol=1e-4)
    wide = 20 if family == "llama" else 24
    assert shapes["key"] == shapes["value"] == (wide, 24)
    assert shapes["query"] == ((40, 24) if family == "llama" else (24, 24))
    assert shapes["output"] == ((24, 40) if family == "llama" else (24, 24))


def test_a_later_family_is_a_row_of_the_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """GPT-NeoX interleaves query, key and value head by head; the table alone makes it work."""
    monkeypatch.setitem(PICO, "gpt_neox", {
        "vocab_size": 64, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32,
        "max_position_embeddings": 48, "pad_token_id": 0, "hidden_dropout": 0.0, "attention_dropout": 0.0,
    })  # fmt: skip

    def interleaved(which: int) -> Callable[[PreTrainedConfig], View]:
        def view(config: PreTrainedConfig) -> View:
            size = config.hidden_size // config.num_attention_heads
            return View(
                "layers.{layer}.attention.query_key_value", Rows(which * size, size, config.num_attention_heads)
            )

        return view

    row = {"query": interleaved(0), "key": interleaved(1), "value": interleaved(2)}
    monkeypatch.setitem(projections.FAMILIES, "gpt_neox", row)
    base = build_pico("gpt_neox", tmp_path / "neox")
    model = classifier(base)
    start = logits(model)
    adapter = craft.attach(model, craft.decompose(str(base), ("query", "value"), (6, 5, 2)))
    assert torch.equal(logits(model), start)
    shake(adapter)
    adapted = logits(model)
    assert (adapted - start).abs().max() > 1e-2 * start.abs().max()
    weight = model.base_model.layers[0].attention.query_key_value.weight.detach().clone()
    adapter.merge()
    difference = (model.base_model.layers[0].attention.query_key_value.weight - weight).abs().sum(1).reshape(2, 3, 12)
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
    with pytest.raises(ModelError, match="this model has other weights"):
        craft.attach(classifier(other), factors)
    adapter = craft.attach(classifier(pico()), factors)
    adapter.save("saved")
    with pytest.raises(ModelError, match="this model has other weights"):
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
    with pytest.raises(ModelError, match="other weights"):
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
    factors = craft.decompose(str(pico()), TARGETS, (12, 12, 3))
    model = classifier(pico())
    adapter = craft.attach(model, factors, targets=("key",), ranks="4,2,1")
    assert adapter.count_parameters() == 4**2 + 2**2 + 1
    adapter.detach()
    with pytest.raises(ConfigError, match="ranks: cannot truncate"):
        craft.attach(model, factors, ranks=(20, 12, 3))
    with pytest.raises(ConfigError, match="not output"):
        craft.attach(model, craft.decompose(str(pico()), ("query",), (4, 4, 2)), targets=("output",))
    craft.attach(model, factors)
    with pytest.raises(ModelError, match="carries an adapter already"):
        craft.attach(model, factors)


def test_an_unsupported_family_names_the_supported_ones() -> None:
    with pytest.raises(ModelError, match="'t5'; supported: bert, deberta-v2, distilbert"):
        layer_views(type("Config", (), {"model_type": "t5"})(), ("query",))
    with pytest.raises(ConfigError, match="unknown projection 'quer'; did you mean 'query'"):
        layer_views(type("Config", (), {"model_type": "bert"})(), ("quer",))


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
    with pytest.raises(FileError, match="not an adapter of craft's"):
        craft.load(classifier(pico()), "saved")
