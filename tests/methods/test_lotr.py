"""LoTR against a dense construction from its formula."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import classifier, shake
from helpers import config, logits

import craft_cli as craft
from craft_cli.errors import ConfigError
from craft_cli.methods.base import delta

Make = Callable[..., Path]


@pytest.mark.parametrize("share", ["all", "projection"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_the_change_is_the_formula(family: str, share: str, pico: Make) -> None:
    """dW_l = alpha / r A G_l B, written as a sum over entries."""
    adapter = craft.attach(
        classifier(pico(family)), method="lotr", rank=3, alpha=2.0, lotr_share=share, targets=("query", "value")
    )
    change = adapter.change.double()
    shake(adapter)
    trained = {name: tensor.detach() for name, tensor in change.trained().items()}
    one_pair = share == "all" and family == "bert"
    assert [name for name in trained if name.startswith("lotr_A")] == (
        ["lotr_A.all"] if one_pair else ["lotr_A.query", "lotr_A.value"]
    )
    for projection in ("query", "value"):
        pair = "all" if one_pair else projection
        a, b = trained[f"lotr_A.{pair}"], trained[f"lotr_B.{pair}"]
        expected = 2.0 / 3 * torch.einsum("or,lrs,si->loi", a, trained[f"lotr_G.{projection}"], b)
        for chain, dense in zip(change.chains(projection), expected, strict=True):
            assert torch.allclose(delta(chain), dense, atol=1e-12)


def test_bases_start_at_random_or_at_those_of_the_stacked_weights(pico: Make) -> None:
    model = classifier(pico())
    layers = [layer.attention.self for layer in model.bert.encoder.layer]
    stack = torch.stack([module.weight for layer in layers for module in (layer.query, layer.value)]).detach().double()
    random = craft.attach(classifier(pico()), method="lotr", rank=4).change.trained()
    assert float(random["lotr_A.all"].detach().std()) == pytest.approx(1, abs=0.2)
    start = logits(model)
    adapter = craft.attach(model, method="lotr", rank=4, lotr_start="svd")
    assert torch.equal(logits(model), start)
    trained = adapter.change.trained()
    for mode, basis in ((1, trained["lotr_A.all"]), (2, trained["lotr_B.all"].T)):
        u = torch.linalg.svd(stack.movedim(mode, 0).reshape(24, -1), full_matrices=False).U[:, :4]
        assert torch.allclose(
            u.T @ basis.detach().double(), torch.diag((u.T @ basis.double()).diag().sign()), atol=1e-5
        )


def test_a_rank_above_the_bases_is_refused_and_different_shapes_are_told(pico: Make, data_dir: Path) -> None:
    with pytest.raises(ConfigError, match="rank 30: no adapted weight has a rank above 24"):
        craft.attach(classifier(pico()), method="lotr", rank=30)
    with pytest.raises(ConfigError, match="rank 22: the maximum with lotr_start svd is 20 here"):  # of value
        craft.attach(classifier(pico("llama")), method="lotr", rank=22, lotr_start="svd")
    from helpers import Remember

    heard = Remember()
    craft.train(config(pico("llama"), data_dir, method="lotr", rank=2, dry_run=True, output_dir=None), heard)
    assert heard.plan
    assert any("each has its own A and B (--lotr-share projection)" in note for note in heard.plan.notes)


def test_decay_and_a_new_seed_reach_the_shared_bases(pico: Make) -> None:
    torch.manual_seed(1)
    one = craft.attach(classifier(pico()), method="lotr", rank=2).change.trained()["lotr_A.all"]
    torch.manual_seed(2)
    two = craft.attach(classifier(pico()), method="lotr", rank=2).change.trained()["lotr_A.all"]
    assert one.shape == two.shape == (24, 2)
