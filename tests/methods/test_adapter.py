"""The adapter's maths and hooks on plain torch modules (DESIGN property 2), without transformers."""

from __future__ import annotations

import copy
import itertools
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from craft_cli.methods.adapter import Adapter
from craft_cli.methods.base import delta
from craft_cli.methods.craft.change import PAPER_NOISE, CraftChange, Transforms
from craft_cli.models.views import Rows, View
from craft_cli.tucker import TuckerTensor, hosvd, multi_mode_product


def decomposed(shape: tuple[int, int, int], ranks: tuple[int, int, int] | None = None) -> TuckerTensor:
    stack = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return hosvd(stack, ranks, dtype=torch.float64)


def shake(module: nn.Module, scale: float = 0.5) -> None:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * scale)


def craft_adapter(decompositions: dict[str, TuckerTensor]) -> Adapter:
    return Adapter(CraftChange(decompositions))


def transforms(adapter: Adapter) -> list[tuple[str, Transforms]]:
    assert isinstance(adapter.change, CraftChange)
    return [(name, adapter.change.of(name)) for name in adapter.change.shapes]


def dense_change(adapter: Transforms) -> torch.Tensor:
    """The formula of the paper, literally: two dense reconstructions and their difference, (L, d_out, d_in)."""
    d = adapter.decomposition
    with_j = [u @ (torch.eye(len(k), dtype=k.dtype) + k) for u, k in zip(d.factors, adapter.k.values(), strict=True)]
    return multi_mode_product(d.core, with_j) - multi_mode_product(d.core, d.factors)


@pytest.mark.parametrize("shape", [(3, 5, 4), (2, 4, 6), (1, 3, 2)])
def test_slices_equal_the_dense_formula_at_every_rank(shape: tuple[int, int, int]) -> None:
    full = decomposed(shape)
    for ranks in itertools.product(range(1, shape[0] + 1), range(1, shape[1] + 1), range(1, shape[2] + 1)):
        change = CraftChange({"p": full.truncated(ranks)})
        adapter = change.of("p")
        shake(adapter)
        expected = dense_change(adapter).detach()
        actual = torch.stack([delta(c) for c in change.chains("p")]).detach()
        assert (actual - expected).norm() <= 1e-12 * max(1.0, float(expected.norm()))
        assert adapter.slices().shape == (shape[0], ranks[1], ranks[2])


def test_at_the_start_the_change_is_exactly_zero_but_its_gradients_are_not() -> None:
    adapter = Transforms(decomposed((3, 5, 4), (2, 3, 2)))
    slices = adapter.slices()
    assert torch.equal(slices, torch.zeros_like(slices))
    (slices * torch.randn(slices.shape, dtype=slices.dtype)).sum().backward()
    assert all(k.grad is not None and k.grad.norm() > 0 for k in adapter.k.values())


def test_the_papers_start_is_near_the_base_but_not_at_it() -> None:
    adapter = Transforms(decomposed((6, 40, 40), (6, 40, 40)), PAPER_NOISE)
    spread = torch.cat([k.detach().flatten() for k in adapter.k.values()]).std()
    assert float(spread) == pytest.approx(0.01 * 0.02, rel=0.1)


class Block(nn.Module):
    """Two layers: a fused transposed weight as in GPT-2, and an interleaved one as in GPT-NeoX."""

    def __init__(self) -> None:
        super().__init__()
        self.fused = nn.ModuleList(Transposed(6, 15) for _ in range(2))
        self.mixed = nn.ModuleList(nn.Linear(5, 12).double() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for fused, mixed in zip(self.fused, self.mixed, strict=True):
            x = torch.tanh(mixed(torch.tanh(fused(x))[..., :5]))[..., :6]
        return x


class Transposed(nn.Module):
    """A linear layer that stores its weight (d_in, d_out)."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(d_in, d_out, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


VIEWS = {
    "middle": [View(f"fused.{n}", Rows(5, 5), transposed=True) for n in range(2)],
    "heads": [View(f"mixed.{n}", Rows(2, 2, count=3)) for n in range(2)],  # rows 2,3 6,7 10,11 of 12
}


def adapted_block() -> tuple[Block, Adapter]:
    torch.manual_seed(0)
    block = Block()
    stacks = {
        name: [v.read(v.module_of(block).get_parameter("weight").detach()) for v in views]
        for name, views in VIEWS.items()
    }
    adapter = craft_adapter({name: hosvd(stack, (2, 2, 3), dtype=torch.float64) for name, stack in stacks.items()})
    adapter.attach(block, VIEWS)
    return block, adapter


def test_a_view_reads_the_rows_it_names() -> None:
    weight = torch.arange(24.0).reshape(12, 2)
    assert VIEWS["heads"][0].read(weight)[:, 0].tolist() == [4, 6, 12, 14, 20, 22]
    assert [list(range(12))[part] for part in Rows(2, 2, 3).ranges(12, 1, 5)] == [[3], [6, 7], [10]]
    assert VIEWS["middle"][0].read(torch.randn(6, 15)).shape == (5, 6)


def test_hooks_compute_what_changed_weights_compute() -> None:
    block, adapter = adapted_block()
    x = torch.randn(4, 3, 6, dtype=torch.float64)
    base = copy.deepcopy(block)
    base.get_submodule("craft").detach(base)  # type: ignore[operator]
    assert torch.equal(block(x), base(x))
    shake(adapter)
    for name, projection in transforms(adapter):
        for view, dense in zip(VIEWS[name], dense_change(projection), strict=True):
            weight = view.module_of(base).get_parameter("weight").data
            target = weight.T if view.transposed else weight
            rows = range(5, 10) if view.rows == Rows(5, 5) else [2, 3, 6, 7, 10, 11]
            for row, change in zip(rows, dense, strict=True):
                target[row] += change
    assert torch.allclose(block(x), base(x), rtol=1e-12, atol=1e-12)
    merged = copy.deepcopy(block)
    changed = merged.get_submodule("craft").merge(merged)  # type: ignore[operator]
    assert changed == ["fused.0", "fused.1", "mixed.0", "mixed.1"]
    assert torch.allclose(merged(x), base(x), rtol=1e-12, atol=1e-12)
    assert not hasattr(merged, "craft")


def test_detached_is_the_base_bit_for_bit() -> None:
    block, adapter = adapted_block()
    before = {name: tensor.clone() for name, tensor in block.state_dict().items() if "craft" not in name}
    x = torch.randn(4, 6, dtype=torch.float64)
    expected = block(x)
    shake(adapter)
    assert not torch.equal(block(x), expected)
    adapter.detach(block)
    assert torch.equal(block(x), expected)
    assert block.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in block.state_dict().items())


def test_gradients_equal_those_through_dense_weights_and_checkpointing_changes_nothing() -> None:
    block, adapter = adapted_block()
    shake(adapter, 0.1)
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    for parameter in block.parameters():
        parameter.requires_grad_(any(parameter is k for k in adapter.parameters()))

    def gradients(run: object) -> list[torch.Tensor]:
        adapter.zero_grad()
        for _ in range(2):  # accumulated: a fresh graph each time
            run(x).square().sum().backward()  # type: ignore[operator]
        return [k.grad.clone() for k in adapter.parameters() if k.grad is not None]

    plain = gradients(block)
    again = gradients(lambda inputs: checkpoint(block, inputs, use_reentrant=False))
    assert len(plain) == 6
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(plain, again, strict=True))

    def dense(inputs: torch.Tensor) -> torch.Tensor:
        deltas = {name: dense_change(p) for name, p in transforms(adapter)}
        for layer in range(2):
            fused = block.fused[layer].get_parameter("weight").detach()
            fused = torch.cat([fused[:, :5], fused[:, 5:10] + deltas["middle"][layer].T, fused[:, 10:]], dim=1)
            change = torch.zeros(12, 5, dtype=torch.float64).index_add(
                0, torch.tensor([2, 3, 6, 7, 10, 11]), deltas["heads"][layer]
            )
            mixed = block.mixed[layer]
            hidden = torch.tanh(inputs @ fused)[..., :5]
            inputs = torch.tanh(nn.functional.linear(hidden, mixed.weight + change, mixed.bias))[..., :6]  # type: ignore[operator,arg-type]
        return inputs

    reference = gradients(dense)
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(plain, reference, strict=True))


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        parts = (nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 6))
        self.layers = nn.Sequential(*parts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layers(x)
        return out


@pytest.mark.parametrize("view", [View(""), View("", Rows(1, 2, 2))])  # whole output; fused, interleaved rows
def test_backward_needs_of_an_adapted_layer_no_more_than_tokens_by_rank(view: View) -> None:
    model = Chain().requires_grad_(False)
    views = [replace(view, module=f"layers.{number}") for number in (0, 4)]
    stack = torch.stack([view.read(view.module_of(model).get_parameter("weight")) for view in views])
    x = torch.randn(2, 11, 7, requires_grad=True)

    def saved() -> Counter[tuple[int, ...]]:
        """Shapes of what autograd keeps from a forward and what grows with the tokens, 2 x 11."""
        shapes: list[tuple[int, ...]] = []

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            shapes.append(tuple(tensor.shape))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(x)
        return Counter(shape for shape in shapes if 11 in shape or 22 in shape)

    frozen = saved()
    craft_adapter({"p": hosvd(stack, (2, 3, 4))}).attach(model, {"p": views})
    assert saved() - frozen == Counter({(22, 4): 2})  # (tokens, r_in), once a layer
    assert frozen - saved() == Counter()


def test_one_row_alone_and_a_wider_output_are_adapted_too() -> None:
    view = View("m")
    output, hidden, basis = torch.randn(2, 3, 6), torch.randn(6, 4), torch.randn(4, 6)
    expected = output + (hidden @ basis).view(2, 3, 6)
    assert torch.allclose(view.add_to_output(output, hidden, basis), expected, atol=1e-6)
    wide = view.add_to_output(output.double(), hidden, basis)  # as a quantised layer may answer
    assert wide.dtype == torch.float64
    assert torch.allclose(wide, expected.double(), atol=1e-6)
    model = Chain()
    views = [View("layers.0"), View("layers.4")]
    stack = torch.stack([view.read(view.module_of(model).get_parameter("weight")) for view in views])
    adapter = craft_adapter({"p": hosvd(stack)})
    adapter.attach(model, {"p": views})
    shake(adapter)
    x = torch.randn(7)
    assert torch.allclose(model(x), model(x[None])[0], atol=1e-6)
    assert model(x[None][:0]).shape == (0, 6)


def test_misuse_is_told() -> None:
    block, adapter = adapted_block()
    with pytest.raises(ValueError, match="already has an adapter"):
        adapter.attach(block, VIEWS)
    with pytest.raises(ValueError, match="merging changes no tensor"):
        adapter.merge(block)
    adapter.detach(block)
    with pytest.raises(ValueError, match="not attached to a model"):
        adapter.merge(block)
    with pytest.raises(ValueError, match=r"the model has 2 layers \(6, 5\), but the change is for \(3, 6, 5\)"):
        craft_adapter({"heads": decomposed((3, 6, 5))}).attach(block, VIEWS)


def test_a_merge_that_rounds_away_fails() -> None:
    linear = nn.ModuleList([nn.Linear(4, 6, bias=False, dtype=torch.bfloat16)])
    adapter = craft_adapter({"p": hosvd(linear[0].weight.detach()[None].float(), (1, 2, 2))})  # type: ignore[operator]
    adapter.attach(linear, {"p": [View("0")]})
    with torch.no_grad():
        for k in adapter.parameters():
            k.fill_(1e-9)
    before = linear[0].weight.clone()  # type: ignore[operator]
    with pytest.raises(ValueError, match="round to"):
        adapter.merge(linear)
    assert torch.equal(linear[0].weight, before)  # type: ignore[arg-type]


def test_the_core_needs_no_transformers() -> None:
    code = "import sys, craft_cli.methods.adapter, craft_cli.methods.craft.change, craft_cli.tucker; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
