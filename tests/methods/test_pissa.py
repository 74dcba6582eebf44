"""PiSSA and LoRA-XS against peft and the formula."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import classifier, shake, token_batch
from helpers import logits

import craft_cli as craft
from craft_cli.errors import ConfigError, FileError, ModelError
from craft_cli.files import write_tensors
from craft_cli.methods.base import delta
from craft_cli.methods.singular import SingularVectors, decomposed, singular_vectors
from craft_cli.models.hub import resolve
from craft_cli.models.stacks import read_weights

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft asks for it

Make = Callable[..., Path]
MODULES = {"bert": ["query", "value"], "distilbert": ["q_lin", "v_lin"], "llama": ["q_proj", "v_proj"]}


def with_peft(base: Path, family: str, **options: Any) -> Any:
    return peft.get_peft_model(
        classifier(base),
        peft.LoraConfig(target_modules=MODULES[family], task_type="SEQ_CLS", init_lora_weights="pissa", **options),
    )


def update(model: Any, parameters: list[Any], steps: int) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)
    for step in range(steps):
        batch = token_batch(rows=4, tokens=6 + step)
        loss = torch.nn.functional.cross_entropy(model(**batch).logits, torch.tensor([0, 1, 0, 1]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(("rank", "alpha"), [(3, 5.0), (1, 1.0), (20, 16.0)])
@pytest.mark.parametrize("family", MODULES)
def test_forward_gradients_and_ten_steps_equal_pefts(family: str, rank: int, alpha: float, pico: Make) -> None:
    base = pico(family)
    model, theirs = classifier(base), with_peft(base, family, r=rank, lora_alpha=alpha).eval()
    start = logits(model)
    adapter = craft.attach(model, method="pissa", rank=rank, alpha=alpha)
    assert torch.equal(logits(model), start)  # ours is exactly the base
    assert torch.allclose(logits(theirs), start, atol=1e-5)

    layers = [
        (name, layer, theirs.get_submodule(f"base_model.model.{model.base_model_prefix}.{view.module}"))
        for name, views in adapter._views.items()
        for layer, view in enumerate(views)
    ]
    model(**token_batch()).logits.square().sum().backward()
    theirs(**token_batch()).logits.square().sum().backward()
    for name, layer, module in layers:
        for ours, expected, axis in (("pissa_a", "lora_A", 0), ("pissa_b", "lora_B", 1)):
            mine = adapter.change.trained()[f"{ours}.{name}.{layer}"].grad
            their = getattr(module, expected)["default"].weight.grad
            assert mine is not None
            assert mine.shape == their.shape
            assert torch.allclose(mine.abs(), their.abs(), rtol=1e-3, atol=1e-6), axis  # a vector's sign is free
    update(model.train(), list(adapter.parameters()), 10)
    update(theirs.train(), [p for name, p in theirs.named_parameters() if "lora_" in name], 10)
    merged = theirs.merge_and_unload()
    adapter.merge()
    moved, plain = 0.0, classifier(base)
    for name, parameter in merged.named_parameters():
        assert torch.allclose(model.get_parameter(name), parameter, atol=2e-5), name
        moved = max(moved, float((parameter - plain.get_parameter(name)).detach().abs().max()))
    assert moved > 1e-3


@pytest.mark.parametrize("niter", [1, 4])
def test_the_randomised_start_is_pefts(niter: int) -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(40, 24, bias=False)
    weight = linear.weight.detach().clone()
    u, s, v = decomposed(weight, 5, niter, seed=3)
    options = peft.LoraConfig(r=5, lora_alpha=5)
    theirs: Any = peft.tuners.lora.Linear(linear, "default", options, r=5, lora_alpha=5)
    torch.manual_seed(3)
    theirs.pissa_init("default", f"pissa_niter_{niter}")
    expected = theirs.lora_B["default"].weight @ theirs.lora_A["default"].weight
    assert torch.allclose(u * s @ v.T, expected, atol=1e-5)
    exact_u, exact_s, exact_v = decomposed(weight, 5, None)
    assert not torch.allclose(exact_u * exact_s @ exact_v.T, expected, atol=1e-3)


def test_lora_xs_is_the_authors_formula(pico: Make) -> None:
    """dW = alpha / r U R (S V^T): in their code lora_A is S V^T, lora_B is U, and R stands between."""
    base = pico("llama")
    model = classifier(base)
    weights = {
        name: [view.read(view.module_of(model.base_model).get_parameter("weight").detach()).double() for view in views]
        for name, views in craft.attach(classifier(base), method="lora-xs", rank=4)._views.items()
    }
    adapter = craft.attach(model, method="lora-xs", rank=4, alpha=6.0)
    shake(adapter)
    for name, layers in weights.items():
        r = adapter.change.trained()[f"lora_xs.{name}"].detach().double()
        for weight, r_l, chain in zip(layers, r, adapter.change.chains(name), strict=True):
            u, s, vh = torch.linalg.svd(weight, full_matrices=False)
            u, s, vh = u[:, :4], s[:4], vh[:4]
            signs = u.gather(0, u.abs().argmax(0, keepdim=True)).sign()
            expected = 6.0 / 4 * (u * signs) @ r_l @ torch.diag(s) @ (vh * signs.T)
            assert torch.allclose(delta(chain).double(), expected, atol=1e-4)


def silent(what: str, done: int, total: int) -> None:
    pass


def test_larger_ranks_serve_smaller_ones_and_are_computed_once(pico: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = read_weights(resolve(str(pico()), None), ("query", "value"))
    large, _ = singular_vectors(weights, 9, None, "kept", silent)
    randomised, _ = singular_vectors(weights, 4, 2, "kept", silent)
    monkeypatch.setattr("craft_cli.methods.singular.decomposed", None)  # nothing is computed from here on
    small, _ = singular_vectors(weights, 4, None, "kept", silent)
    assert torch.equal(small.parts["value"][0], large.parts["value"][0][:, :, :4])
    assert not torch.equal(small.parts["value"][0], randomised.parts["value"][0])
    again, _ = singular_vectors(weights, 4, 2, "kept", silent)
    assert again.sha256() == randomised.sha256()
    with pytest.raises(TypeError):  # of another rank a randomised one is another
        singular_vectors(weights, 3, 2, "kept", silent)


def test_a_rank_above_the_dimension_is_lowered_and_told(pico: Make) -> None:
    weights = read_weights(resolve(str(pico("llama")), None), ("query", "value"))
    found, notes = singular_vectors(weights, 30, None, "kept", silent)
    assert [s.shape[1] for _, s, _ in found.parts.values()] == [24, 20]
    assert "query: rank 30 is reduced to 24, the smaller dimension of its weights" in notes
    model = classifier(pico("llama"))
    start = logits(model)
    adapter = craft.attach(model, method="lora-xs", rank=30)
    assert torch.equal(logits(model), start)
    assert adapter.count_parameters() == 3 * (24**2 + 20**2)


def test_weights_that_are_not_finite_and_damaged_files_are_refused(pico: Make) -> None:
    weights = read_weights(resolve(str(pico()), None), ("query",))
    broken = [torch.full((4, 4), float("nan"))]
    object.__setattr__(weights, "stacks", {"query": broken})
    with pytest.raises(ModelError, match="query of layer 0 has values that are not finite"):
        singular_vectors(weights, 2, None, "kept", silent)
    good = read_weights(resolve(str(pico()), None), ("query",))
    first, _ = singular_vectors(good, 2, None, "kept", silent)
    file = next(Path("kept").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-40])
    again, notes = singular_vectors(good, 2, None, "kept", silent)
    assert any("decomposing again" in note for note in notes)
    assert again.sha256() == first.sha256()
    liar = again.identity() | again.contents() | {"ranks": {"query": 9}}
    write_tensors(file, "singular vectors", again.tensors(), liar)
    more, notes = singular_vectors(good, 5, None, "kept", silent)
    assert any("its tensors do not match its header; decomposing again" in note for note in notes)
    assert more.parts["query"][1].shape == (3, 5)
    header = again.identity() | {"targets": ["query"]}
    tensors = again.tensors() | {"query.singular.values": -again.tensors()["query.singular.values"]}
    with pytest.raises(FileError, match="damaged"):
        SingularVectors.read(tensors, header, Path("x"))


def test_what_was_prepared_serves_fewer_projections_at_smaller_ranks_and_no_other_method(pico: Make) -> None:
    kept = craft.attach(classifier(pico()), method="pissa", rank=6).frozen
    adapter = craft.attach(classifier(pico()), kept, method="lora-xs", rank=4, targets=["value"])
    assert adapter.count_parameters() == 3 * 16
    with pytest.raises(ConfigError, match="rank 7: only 6 singular vectors of query were prepared"):
        craft.attach(classifier(pico()), kept, method="pissa", rank=7)
    with pytest.raises(ConfigError, match="lora needs no factors"):
        craft.attach(classifier(pico()), kept, method="lora")
    with pytest.raises(ConfigError, match="pissa needs the singular vectors"):
        craft.attach(classifier(pico()), craft.attach(classifier(pico()), method="lora").frozen, method="pissa")
