"""SuperLoRA against a dense construction from its formula."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import scipy.linalg
import torch
from conftest import classifier, failure, invoke, shake
from helpers import Remember, config, logits

import craft_cli as craft
from craft_cli.config import SuperloraOptions
from craft_cli.errors import CraftError
from craft_cli.methods.base import delta
from craft_cli.methods.superlora import SuperloraChange, hadamard, near_equal, plan

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft asks for it

Make = Callable[..., Path]
SHAPES = {"query": (3, 10, 6), "value": (3, 5, 6)}
"""N = 270."""
CASES = [
    {"superlora_groups": 1}, {"superlora_groups": 4}, {"superlora_groups": 7}, {"superlora_order": 3},
    {"superlora_order": 4, "superlora_groups": 2}, {"superlora_splits": 2}, {"superlora_splits": 3, "superlora_groups": 2},
    {"superlora_splits": 2, "superlora_order": 3, "superlora_groups": 5}, {"superlora_projection": 0.4},
    {"superlora_projection": 0.1, "superlora_order": 3, "superlora_splits": 2, "superlora_groups": 3, "superlora_seed": 5},
]  # fmt: skip


def dense(change: SuperloraChange, options: SuperloraOptions) -> dict[str, torch.Tensor]:
    """The stacks of all projections, from the formula alone: every group whole, every sum written out."""
    total = sum(math.prod(shape) for shape in SHAPES.values())
    numbers = math.ceil(total / options.superlora_groups)
    vectors = []
    for group in range(options.superlora_groups):
        product = None
        for split in range(options.superlora_splits):
            prefix = f"superlora.{group}.{split}"
            parts = {name: tensor.detach() for name, tensor in change.trained().items()}
            factors = [parts[f"{prefix}.factors.{mode}"] for mode in range(options.superlora_order)]
            letters = "abcdefgh"[: len(factors)]
            if len(factors) == 2:
                tensor = torch.einsum("ai,bi->ab", *factors)
            else:
                sums = ",".join(f"{letter}{letter.upper()}" for letter in letters)
                tensor = torch.einsum(f"{letters.upper()},{sums}->{letters}", parts[f"{prefix}.core"], *factors)
            product = tensor if product is None else torch.from_numpy(np.kron(product.numpy(), tensor.numpy()))
        assert product is not None
        kept = product[tuple(slice(size) for size in change.dimensions)].reshape(-1)
        if options.superlora_projection is None:
            vectors.append(kept[:numbers])
            continue
        size = 1 << math.ceil(math.log2(numbers))
        h = torch.from_numpy(scipy.linalg.hadamard(size)).double() / math.sqrt(size)
        signs, order, gauss = (change.get_buffer(name).double() for name in ("signs", "order", "gauss"))
        permutation = torch.eye(size, dtype=torch.float64)[order.long()]
        f = h @ torch.diag(gauss) @ permutation @ h @ torch.diag(signs)
        kept = kept[:numbers]
        vectors.append((math.sqrt(size / len(kept)) * f[:, : len(kept)] @ kept)[:numbers])
    whole = torch.cat(vectors)[:total]
    stacks, at = {}, 0
    for name, shape in SHAPES.items():
        stacks[name] = whole[at : at + math.prod(shape)].reshape(shape)
        at += math.prod(shape)
    return stacks


@pytest.mark.parametrize("rank", [1, 3, 50])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(f"{k[10:]}{v}" for k, v in case.items()))
def test_the_change_is_the_formula(case: dict[str, Any], rank: int) -> None:
    options = SuperloraOptions(rank=rank, **case)
    change = SuperloraChange(SHAPES, options).double()
    assert not any(delta(chain).any() for name in SHAPES for chain in change.chains(name))  # it starts at zero
    shake(change)
    for name, stack in dense(change, options).items():
        for recorded in (True, False):
            with torch.set_grad_enabled(recorded):
                chains = list(change.chains(name))
            assert len(chains) == len(stack)
            for chain, expected in zip(chains, stack, strict=True):
                assert torch.allclose(delta(chain), expected, atol=1e-12 * max(1, float(expected.abs().max())) * 10)


def test_dimensions_are_as_the_paper_and_the_docstring_have_them() -> None:
    base = {"query": (12, 768, 768), "value": (12, 768, 768)}
    assert plan(base, SuperloraOptions())[:2] == (14_155_776, [3763, 3762])
    assert plan(base, SuperloraOptions(superlora_groups=24))[1] == [768, 768]
    assert plan(base, SuperloraOptions(superlora_order=3))[1] == [242, 242, 242]
    for numbers, parts in ((270, 2), (7, 3), (1, 4), (1000, 3), (17, 2)):
        found = near_equal(numbers, parts)
        assert math.prod(found) >= numbers
        assert max(found) - min(found) <= 1 or numbers < 2**parts


def test_the_transform_is_walsh_and_hadamards() -> None:
    x = torch.randn(128, dtype=torch.float64)
    expected = torch.from_numpy(scipy.linalg.hadamard(128)).double() @ x / math.sqrt(128)
    assert torch.allclose(hadamard(x), expected, atol=1e-12)


def test_one_weight_a_group_is_lora_and_exported_as_one(pico: Make) -> None:
    model = classifier(pico())
    adapter = craft.attach(model, method="superlora", rank=3, superlora_groups=6)
    shake(adapter)
    adapted = logits(model)
    adapter.save("saved")
    result = craft.merge("saved", "lora", format="peft")
    assert result.rank == 3
    again = peft.PeftModel.from_pretrained(classifier(pico()), "lora").eval()
    assert torch.allclose(logits(again), adapted, atol=1e-4)
    trained = adapter.change.trained()
    b, a = trained["superlora.0.0.factors.0"], trained["superlora.0.0.factors.1"]
    assert torch.allclose(delta(adapter.change.chains("query")[0]), b @ a.T, atol=1e-6)


def test_a_dense_change_is_no_lora_unless_an_error_is_allowed(pico: Make) -> None:
    model = classifier(pico())
    adapter = craft.attach(model, method="superlora", rank=2)
    shake(adapter, 0.2)
    adapted = logits(model)
    adapter.save("saved")
    with pytest.raises(CraftError, match=r"the change of \w+ of layer \d is dense: .* or allow the error") as refused:
        craft.merge("saved", "lora", format="peft")
    assert not Path("lora").exists()
    advised = float(str(refused.value).rpartition(" ")[2])  # enough for every layer
    assert craft.merge("saved", "advised", format="peft", tolerance=advised).rank == 12
    result = craft.merge("saved", "lora", format="peft", tolerance=0.9)
    assert result.tolerance == 0.9
    written = peft.PeftModel.from_pretrained(classifier(pico()), "lora").eval()
    assert not torch.allclose(logits(written), adapted, atol=1e-4)
    for layer, chain in enumerate(adapter.change.chains("query")):
        module: Any = written.get_submodule(f"base_model.model.bert.encoder.layer.{layer}.attention.self.query")
        theirs = module.lora_B["default"].weight @ module.lora_A["default"].weight
        assert float(((theirs - delta(chain)).norm() / delta(chain).norm()).detach()) <= 0.9
    shown = invoke("merge", "saved", "-o", "again", "--format", "peft", "--tolerance", "0.9")
    assert f"as a LoRA of rank {result.rank}" in shown.stdout
    assert "(allowed 9e-01)" in shown.stdout
    assert "--tolerance: expected a number above 0 and below 1" in failure(
        "merge", "saved", "--format", "peft", "--tolerance", "1"
    )
    with pytest.raises(CraftError, match="tolerance is for format peft"):
        craft.merge("saved", "dense", tolerance=0.1)


def test_a_change_of_zero_beside_a_trained_head_is_a_lora_of_zeros(pico: Make, data_dir: Path) -> None:
    craft.train(config(pico(), data_dir, method="superlora", learning_rate=0.0, max_steps=1))
    for trim in (False, True):
        result = craft.merge("out", f"lora-{trim}", format="peft", trim=trim)
        assert (result.rank, result.tensors_changed) == (1, 0)


def test_layers_are_made_one_at_a_time_where_no_gradient_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    change = SuperloraChange(SHAPES, SuperloraOptions())
    made: list[int] = []
    layer = SuperloraChange.layer

    def counted(self: SuperloraChange, name: str, number: int) -> torch.Tensor:
        made.append(number)
        return layer(self, name, number)

    monkeypatch.setattr(SuperloraChange, "layer", counted)
    with torch.no_grad():
        chains = change.chains("query")
        assert made == []
        assert len(chains) == 3
        assert not chains[2][0].requires_grad
    assert made == [2]
    assert [chain[0].requires_grad for chain in change.chains("query")] == [True] * 3


def test_what_an_update_holds_is_told(pico: Make, data_dir: Path) -> None:
    heard = Remember()
    craft.train(config(pico(), data_dir, method="superlora", dry_run=True, output_dir=None), heard)
    assert heard.plan
    assert any(
        "an update needs memory for the dense changes of all adapted weights, 0 MB" in note for note in heard.plan.notes
    )
