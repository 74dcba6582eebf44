"""What changes memory and speed, and never the result: precisions, recomputed activations, compiled and quantised bases."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import classifier, shake, token_batch
from helpers import Remember, config, lines, tensors

import craft_cli as craft
from craft_cli.api import train as training
from craft_cli.errors import ConfigError, CraftError, ModelError
from craft_cli.models.hub import resolve
from craft_cli.models.loading import load_quantised, recompute_activations
from craft_cli.training import compile as compilation
from craft_cli.training import preparation, setup
from craft_cli.training.checkpoint import read_checkpoint

Make = Callable[..., Path]
DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}


def saved_bytes(model: Any) -> int:
    """What autograd keeps for the backward pass, parameters aside."""
    kept: dict[int, int] = {}
    own = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in own:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**token_batch(8, 30)).logits.sum().backward()
    return sum(kept.values())


@pytest.mark.parametrize("family", ["bert", "distilbert", "deberta-v2", "gpt2", "llama"])
def test_recomputed_activations_give_the_same_gradients_for_less(family: str, pico: Make) -> None:
    changes: dict[str, Any] = {
        "n_layer" if family == "gpt2" else "n_layers" if family == "distilbert" else "num_hidden_layers": 6
    }
    if family == "bert":
        changes |= DROPOUT
    model = classifier(pico(family, **changes)).train()
    model.config.use_cache = False
    adapter = craft.attach(model, craft.decompose(str(pico(family, **changes)), ranks=(6, 5, 2)))
    shake(adapter)
    found = []
    for recomputed in (False, True):
        if recomputed:
            recompute_activations(model)
        model.zero_grad()
        torch.manual_seed(1)
        size = saved_bytes(model)
        found.append((size, [p.grad.clone() for p in model.parameters() if p.requires_grad and p.grad is not None]))
    (whole, first), (less, second) = found
    assert less < 0.6 * whole
    assert len(first) == len(second) >= 7
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert any(k.grad is not None and k.grad.any() for k in adapter.parameters())


def test_gradient_checkpointing_changes_nothing_in_a_run(pico: Make, data_dir: Path) -> None:
    base = pico(**DROPOUT)
    calls: list[torch.Size] = []
    craft.train(config(base, data_dir, num_train_epochs=1))

    def spy(model: Any) -> None:
        recompute_activations(model)
        former = model.bert.encoder.layer[0].attention.self.query.forward

        def forward(x: torch.Tensor) -> Any:
            calls.append(x.shape)
            return former(x)

        model.bert.encoder.layer[0].attention.self.query.forward = forward

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparation, "recompute_activations", spy)
        craft.train(config(base, data_dir, num_train_epochs=1, output_dir="less", gradient_checkpointing=True))
    # twice in each update, once in each evaluation, and with one row and with two to see what they take
    assert len(calls) == 2 * 6 + 2 + 2
    assert all(torch.equal(tensor, tensors()[name]) for name, tensor in tensors("less").items())


def test_bf16_computes_in_it_and_keeps_transforms_and_moments_in_float32(pico: Make, data_dir: Path) -> None:
    seen: set[torch.dtype] = set()

    class Spy(Remember):
        def started(self, plan: Any) -> None:
            super().started(plan)
            torch.nn.modules.module.register_module_forward_hook(
                lambda module, inputs, output: seen.add(output.dtype) if isinstance(module, torch.nn.Linear) else None
            )

    heard = Spy()
    craft.train(config(pico(), data_dir, bf16=True, max_steps=3), heard)
    torch.nn.modules.module._global_forward_hooks.clear()
    assert torch.bfloat16 in seen
    assert heard.plan is not None
    assert heard.plan.devices == "1 x CPU, bf16"
    assert {tensor.dtype for tensor in tensors().values()} == {torch.float32}
    state = read_checkpoint(Path("out/checkpoints/step-3"))
    assert {tensor.dtype for tensor in state.optimizer.values()} == {torch.float32}


def test_the_scale_of_fp16_goes_with_a_checkpoint(pico: Make, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fp16 requires a GPU; the gradient scaler itself runs here, and its state is kept."""
    made: list[torch.amp.GradScaler] = []
    former = training.make_accelerator

    def scaled(settings: Any) -> Any:
        accelerator = former(settings)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**9 if not made else 2.0**3, growth_interval=4)
        made.append(accelerator.scaler)
        return accelerator

    monkeypatch.setattr(training, "make_accelerator", scaled)
    craft.train(config(pico(), data_dir, num_train_epochs=1))
    assert made[0].get_scale() == 2.0**10
    assert read_checkpoint(Path("out/checkpoints/step-6")).record["scaler"] == made[0].state_dict()
    craft.train(config(pico(), data_dir, num_train_epochs=1, resume=True))
    assert made[1].state_dict() == made[0].state_dict()
    craft.train(config(pico(), data_dir, num_train_epochs=1, output_dir="uncut"))
    assert [line["step"] for line in lines()] == [line["step"] for line in lines("uncut")]


# -- compiled ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def quick_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traces graphs as inductor does, and runs them without a C++ compiler."""
    former = preparation.compile_blocks
    monkeypatch.setattr(preparation, "compile_blocks", lambda adapter: former(adapter, backend="aot_eager"))


@pytest.mark.slow
def test_a_compiled_run_trains_as_a_plain_one_without_a_graph_break(
    pico: Make, data_dir: Path, quick_backend: None
) -> None:
    """Twelve layers, more than the graphs that dynamo keeps; batches of many lengths; training and evaluation."""
    from torch._dynamo.utils import counters

    base = pico(num_hidden_layers=12)
    craft.train(config(base, data_dir, num_train_epochs=1))
    counters.clear()
    craft.train(config(base, data_dir, num_train_epochs=1, output_dir="compiled", torch_compile=True))
    assert not counters["graph_break"]
    assert 2 <= counters["stats"]["unique_graphs"] <= 12
    for name, tensor in tensors("compiled").items():
        assert torch.allclose(tensor, tensors()[name], atol=1e-5), name
    assert craft.evaluate("compiled").examples == 23


@pytest.mark.slow
def test_layers_share_one_compiled_graph(pico: Make) -> None:
    from torch._dynamo.utils import counters

    model = classifier(pico(num_hidden_layers=12)).train()
    adapter = craft.attach(model, craft.decompose(str(pico(num_hidden_layers=12)), ranks=(6, 5, 2)))
    shake(adapter)
    expected = model(**token_batch()).logits
    counters.clear()
    paths = compilation.compile_blocks(adapter, backend="aot_eager")
    assert paths == [f"encoder.layer.{layer}" for layer in range(12)]
    assert torch.allclose(model(**token_batch()).logits, expected, atol=1e-5)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] <= 2
    adapter.detach()
    with pytest.raises(ModelError, match="attach first, then compile"):
        craft.attach(model, craft.decompose(str(pico(num_hidden_layers=12)), ranks=(6, 5, 2)))


def test_what_does_not_compile_whole_is_refused(
    pico: Make, data_dir: Path, quick_backend: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.bert.modeling_bert import BertLayer

    former = BertLayer.forward

    def breaks(self: Any, *arguments: Any, **options: Any) -> Any:
        torch._dynamo.graph_break()
        return former(self, *arguments, **options)

    monkeypatch.setattr(BertLayer, "forward", breaks)
    with pytest.raises(CraftError, match="torch_compile: this model's layers cannot be compiled as one graph"):
        craft.train(config(pico(), data_dir, torch_compile=True, dry_run=True))


def test_compiling_needs_a_compiler(pico: Make, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match=r"torch_compile on the CPU requires a C\+\+ compiler"):
        craft.train(config(pico(), data_dir, torch_compile=True, dry_run=True))


# -- quantised -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_a_quantised_base_needs_a_gpu(bits: str, pico: Make, data_dir: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ConfigError, match="load_in_4bit and load_in_8bit require a CUDA GPU"):
        craft.train(config(pico(), data_dir, **{bits: True}))
    assert not os.path.exists("out")


@pytest.mark.parametrize(
    ("bits", "kind"),
    [("load_in_4bit", "Params4bit"), pytest.param("load_in_8bit", "Int8Params", marks=pytest.mark.slow)],
)
def test_training_over_a_quantised_base(
    bits: str, kind: str, pico: Make, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bitsandbytes has kernels for the CPU; they are slow, but show the whole way."""
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(setup, "check_available", lambda: None)
    base = pico(hidden_size=64, intermediate_size=128)
    kinds: set[str] = set()

    former = preparation.attach_prepared

    def attach(model: Any, *arguments: Any, **options: Any) -> Any:
        kinds.add(type(model.bert.encoder.layer[0].attention.self.query.weight).__name__)
        kinds.add(type(model.classifier.weight).__name__)
        return former(model, *arguments, **options)

    monkeypatch.setattr(preparation, "attach_prepared", attach)
    heard = Remember()
    settings = {"ranks": "24,24,3", "num_train_epochs": 8, bits: True}
    craft.train(config(base, data_dir, **settings), heard)
    assert kinds == {kind, "Parameter"}
    assert heard.plan is not None
    assert "the base is quantized only in training" in heard.plan.notes[-1]
    losses = [line["loss"] for line in lines() if "loss" in line]
    assert sum(losses[-6:]) < 0.8 * sum(losses[:6])
    assert craft.evaluate("out").metrics["accuracy"] >= 0.7  # the full base is near the quantised one
    assert craft.merge("out").tensors_changed == 6
    factors = craft.decompose(str(base), ranks=(24, 24, 3))
    number = 4 if bits == "load_in_4bit" else 8
    head = "AutoModelForSequenceClassification"
    other, _ = load_quantised(
        resolve(str(pico(hidden_size=64, intermediate_size=128, initializer_range=0.03))),
        head, {"num_labels": 2}, number, torch.float32, torch.device("cpu"),
    )  # fmt: skip
    with pytest.raises(ModelError, match="the weights of this model"):
        craft.attach(other, factors)
    model, _ = load_quantised(resolve(str(base)), head, {"num_labels": 2}, number, torch.float32, torch.device("cpu"))
    adapter = craft.attach(model, factors)
    shake(adapter)
    with pytest.raises(ModelError, match="cannot merge into a quantized model"):
        adapter.merge()
