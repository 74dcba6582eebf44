"""The change holds whoever calls whatever part of an adapted model, now and after every kind of update."""

from __future__ import annotations

import copy
import io
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate.state import AcceleratorState
from conftest import classifier, shake, token_batch
from picos import families
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import craft_cli as craft
from craft_cli.errors import ModelError
from craft_cli.methods import METHODS as registered

Make = Callable[..., Path]
METHODS: dict[str, dict[str, Any]] = {name: {"rank": 3} for name in registered} | {
    "craft": {"ranks": (6, 5, 2)},
    "superlora": {"rank": 3, "superlora_groups": 2},
}
SLOW = [name for name in METHODS if name != "craft"]


@pytest.fixture(params=[pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in METHODS])
def method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def adapted(base: Path, method: str, **options: Any) -> tuple[Any, Any]:
    model = classifier(base, **options)
    adapter = craft.attach(model, method=method, **METHODS[method])
    shake(adapter)
    return model, adapter


def merged(model: Any) -> Any:
    """A copy with the change in its weights: what every part must compute like."""
    whole = copy.deepcopy(model)
    whole.base_model.craft.model = whole
    whole.base_model.craft.merge()
    return whole


def hidden(model: Any) -> torch.Tensor:
    return model.bert.embeddings(token_batch()["input_ids"])


CALLS: dict[str, Callable[[Any], torch.Tensor]] = {
    "model": lambda model: model(**token_batch()).logits,
    "model.forward": lambda model: model.forward(**token_batch()).logits,
    "base model": lambda model: model.bert(**token_batch()).last_hidden_state,
    "base_model.forward": lambda model: model.bert.forward(**token_batch()).last_hidden_state,
    "encoder": lambda model: model.bert.encoder(hidden(model)).last_hidden_state,
    "encoder.forward": lambda model: model.bert.encoder.forward(hidden(model)).last_hidden_state,
    "last layer": lambda model: model.bert.encoder.layer[2](hidden(model)),
    "middle layer's forward": lambda model: model.bert.encoder.layer[1].forward(hidden(model)),
    "one projection": lambda model: model.bert.encoder.layer[1].attention.self.value(hidden(model)),
    "layers backwards": lambda model: torch.stack(
        [model.bert.encoder.layer[n].attention.self.query(hidden(model)) for n in (2, 0, 1)]
    ),
}


def update_by_data(adapter: Any) -> None:
    for parameter in adapter.parameters():
        parameter.data = parameter.data * -1.5


def update_by_fused_optimizer(adapter: Any) -> None:
    for parameter in adapter.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(adapter.parameters(), lr=0.2, fused=True).step()
    adapter.zero_grad()


@pytest.mark.parametrize("update", [update_by_data, update_by_fused_optimizer])
@pytest.mark.parametrize("call", CALLS)
def test_every_part_is_changed_as_its_weights_would_be(
    call: str, update: Callable[[Any], None], method: str, pico: Make
) -> None:
    model, adapter = adapted(pico(), method)
    run = CALLS[call]
    with torch.no_grad():
        for other in CALLS.values():  # whatever ran before
            other(model)
        first = run(model)
        assert torch.allclose(first, run(merged(model)), atol=1e-5)
        for _ in range(2):
            update(adapter)
            assert torch.allclose(run(model), run(merged(model)), atol=1e-5)
            assert not torch.allclose(run(model), first, atol=1e-4)
        with adapter.disabled():
            off = run(model)
        plain = classifier(pico())
        assert torch.equal(off, run(plain))


CLASSES = [
    pytest.param(name, kind, marks=[pytest.mark.slow] * (name != "bert"))
    for kind in ("Model", "ModelForSequenceClassification", "ModelForTokenClassification")
    for name in (family.values[0] for family in families(f"Auto{kind}"))
    if name != "t5"  # its classes take no embeddings alone
]
"""Families with the classes that transformers has for them."""


def by_swapped_tensors(model: Any, adapter: Any) -> None:
    for parameter in adapter.parameters():
        torch.utils.swap_tensors(parameter, nn.Parameter(parameter.detach() * 0.7))


def by_load_state_dict(model: Any, adapter: Any) -> None:
    state = {name: tensor * 0.9 for name, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def by_casting(model: Any, adapter: Any) -> None:
    model.to(torch.bfloat16)(token_batch()["input_ids"])
    model.to(torch.float64)


def by_modes(model: Any, adapter: Any) -> None:
    for context in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with context():
            model.train()(token_batch()["input_ids"])
            update_by_data(adapter)
        model.requires_grad_(context is torch.no_grad)


@pytest.mark.parametrize("update", [by_swapped_tensors, by_load_state_dict, by_casting, by_modes])
@pytest.mark.parametrize(("family", "kind"), CLASSES)
def test_every_class_sees_its_change_however_it_came(
    family: str, kind: str, update: Callable[[Any, Any], None], pico: Make
) -> None:
    model = getattr(transformers, f"Auto{kind}").from_pretrained(pico(family)).eval()
    model.config.pad_token_id = 0
    adapter = craft.attach(model, ranks=(6, 5, 2))
    shake(adapter)
    update(model, adapter)
    whole = merged(model.eval())
    ids = token_batch()["input_ids"]
    with torch.no_grad():
        for part, other in ((model, whole), (model.base_model, whole.base_model)):
            assert torch.allclose(part(ids)[0], other(ids)[0], atol=2e-5)
            embedded = part.get_input_embeddings()(ids)
            assert torch.allclose(part(inputs_embeds=embedded)[0], other(inputs_embeds=embedded)[0], atol=2e-5)


def test_parts_called_one_after_the_other_see_an_update_in_between(method: str, pico: Make) -> None:
    """Layer by layer, as a pipeline runs them, with the numbers changed between two layers."""
    model, adapter = adapted(pico(), method)
    x = hidden(model)
    with torch.no_grad():
        model.bert.encoder.layer[0](x)
        update_by_data(adapter)
        assert torch.allclose(model.bert.encoder.layer[1](x), merged(model).bert.encoder.layer[1](x), atol=1e-5)


def test_a_forward_that_fails_half_way_leaves_nothing_behind(method: str, pico: Make) -> None:
    model, adapter = adapted(pico(), method)

    def fail(*_: Any) -> None:
        raise RuntimeError("half way")

    handle = model.bert.encoder.layer[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="half way"):
        model(**token_batch())
    handle.remove()
    assert not adapter._ready
    assert not adapter._running
    update_by_data(adapter)
    with torch.no_grad():
        x = hidden(model)
        assert torch.allclose(model.bert.encoder.layer[2](x), merged(model).bert.encoder.layer[2](x), atol=1e-5)


@pytest.mark.parametrize("part", ["model", "encoder", "last layer"])
def test_a_ctrl_c_in_a_forward_leaves_nothing_behind(part: str, method: str, pico: Make) -> None:
    """torch runs no hook when a KeyboardInterrupt passes: the call that it ended must not seem to run for ever."""
    model, adapter = adapted(pico(), method)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    for inside in (model, model.bert.encoder):
        handle = model.bert.encoder.layer[1].register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            inside(**token_batch()) if inside is model else inside(hidden(model))
        handle.remove()
        run = CALLS[part]
        with torch.no_grad():
            for _ in range(2):
                assert torch.allclose(run(model), run(merged(model)), atol=1e-5)
                update_by_data(adapter)
        assert not adapter._ready
        assert not adapter._running
    fresh, other = adapted(pico(), method)
    other.load_trained_state(adapter.trained_state())
    for mine, theirs in zip(gradients(model, adapter), gradients(fresh, other), strict=True):
        assert torch.equal(mine, theirs)


def test_selective_checkpoints_have_the_same_gradients(method: str, pico: Make) -> None:
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    products = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}

    def policy(context: Any, operation: Any, *_: Any, **__: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if operation in products else CheckpointPolicy.PREFER_RECOMPUTE

    model, adapter = adapted(pico(num_hidden_layers=4), method)
    model.train()
    plain = gradients(model, adapter)
    for layer in model.bert.encoder.layer:
        forward = layer.forward
        layer.forward = lambda *a, forward=forward, **k: checkpoint(
            forward, *a, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy), **k
        )
    assert all(torch.allclose(a, b, rtol=1e-5) for a, b in zip(plain, gradients(model, adapter), strict=True))


def test_functional_gradients_and_inputs_by_name(method: str, pico: Make) -> None:
    model, adapter = adapted(pico(), method)
    plain = dict(zip((name for name, _ in adapter.named_parameters()), gradients(model, adapter), strict=True))
    parameters = {name: p.detach() for name, p in model.named_parameters() if ".craft." in name}

    def loss(values: dict[str, torch.Tensor]) -> torch.Tensor:
        out = torch.func.functional_call(model, values, kwargs=token_batch())
        return out.logits.square().sum()

    found = torch.func.grad(loss)(parameters)
    for name, gradient in found.items():
        assert torch.allclose(gradient, plain[name.partition(".craft.")[2]], rtol=1e-4, atol=1e-6), name
    query = model.bert.encoder.layer[0].attention.self.query
    x = hidden(model)
    assert torch.equal(query(input=x), query(x))


def test_gradients_of_parts_under_no_grad_are_those_of_the_rest(method: str, pico: Make) -> None:
    """The first layer without autograd, the others with it: they get gradients all the same."""
    model, adapter = adapted(pico(), method)
    layers = model.bert.encoder.layer

    def mixed(module: nn.Module, inputs: Any) -> Any:
        torch.set_grad_enabled(module is not layers[0])

    handles = [layer.register_forward_pre_hook(mixed) for layer in layers]
    model(**token_batch()).logits.sum().backward()
    assert all(p.grad is not None for name, p in adapter.named_parameters() if not name.endswith(".0"))
    for handle in handles:
        handle.remove()
    torch.set_grad_enabled(True)


def test_generation_reads_the_change_of_the_moment(method: str, pico: Make) -> None:
    model = AutoModelForCausalLM.from_pretrained(pico("llama")).eval()
    adapter = craft.attach(model, method=method, head=[], **METHODS[method])
    shake(adapter, 1.0)
    prompt = token_batch(1, 5)["input_ids"]
    whole = merged(model)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(prompt, **options), whole.generate(prompt, **options))
    ids = torch.tensor([[1, 5, 9]])
    with torch.no_grad():
        assert torch.allclose(model.model(ids).last_hidden_state, whole.model(ids).last_hidden_state, atol=1e-5)


def test_copies_and_pickles_of_a_model_and_of_a_part(method: str, pico: Make) -> None:
    model, adapter = adapted(pico(), method)
    with torch.no_grad():
        expected, x = model(**token_batch()).logits, hidden(model)
        part = model.bert.encoder.layer[1](x)
        for twin in (copy.deepcopy(model), torch.load(pickled(model), weights_only=False)):
            assert torch.equal(twin(**token_batch()).logits, expected)
        encoder = copy.deepcopy(model.bert.encoder)
        update_by_data(adapter)
        assert torch.equal(encoder.layer[1](x), part)  # the copy's own numbers
        assert not torch.allclose(model.bert.encoder.layer[1](x), part, atol=1e-4)


def pickled(model: Any) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


def test_threads_do_not_read_each_others_chains(method: str, pico: Make) -> None:
    model, _ = adapted(pico(num_hidden_layers=6), method)
    with torch.no_grad():
        expected = model(**token_batch()).logits
    wrong: list[int] = []

    def work() -> None:
        with torch.no_grad():
            wrong.extend(1 for _ in range(20) if not torch.equal(model(**token_batch()).logits, expected))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert not model.bert.craft._ready


def gradients(model: Any, adapter: Any) -> list[torch.Tensor]:
    model.zero_grad()
    model(**token_batch()).logits.square().sum().backward()
    return [p.grad.clone() for p in adapter.parameters()]


def test_recomputed_blocks_have_the_same_gradients_bit_for_bit(method: str, pico: Make) -> None:
    model, adapter = adapted(pico(num_hidden_layers=4), method)
    model.train()
    plain = gradients(model, adapter)
    for layer in model.bert.encoder.layer:
        forward = layer.forward
        layer.forward = lambda *a, forward=forward, **k: checkpoint(forward, *a, use_reentrant=False, **k)
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients(model, adapter), strict=True))


@pytest.mark.parametrize("needs_grad", [True, False])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpointing_is_refused(needs_grad: bool, method: str, pico: Make) -> None:
    model, adapter = adapted(pico(), method)
    model.train()
    if needs_grad:
        model.enable_input_require_grads()
    for layer in model.bert.encoder.layer:
        forward = layer.forward
        layer.forward = lambda *a, forward=forward, **k: checkpoint(
            lambda *b, k=k, forward=forward: forward(*b, **k), *a, use_reentrant=True
        )
    with pytest.raises(ModelError, match=r"gradient_checkpointing_kwargs=\{\"use_reentrant\": False\}"):
        gradients(model, adapter)
    assert all(p.grad is None for p in adapter.parameters())


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
def test_the_trainers_checkpointing(reentrant: bool, method: str, pico: Make, tmp_path: Path) -> None:
    model, adapter = adapted(pico(), method)
    before = [p.detach().clone() for p in adapter.parameters()]
    rows = [{"input_ids": [1, 5, 7, 2], "attention_mask": [1, 1, 1, 1], "labels": n % 2} for n in range(8)]
    arguments = TrainingArguments(
        str(tmp_path / "hf"), max_steps=2, use_cpu=True, report_to="none", save_strategy="no", gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant}, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    try:
        if reentrant:
            with pytest.raises(ModelError, match="use_reentrant"):
                trainer.train()
        else:
            trainer.train()
            assert any(not torch.equal(a, b) for a, b in zip(before, adapter.parameters(), strict=True))
    finally:
        AcceleratorState._reset_state()  # the Trainer leaves its own behind


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.slow
def test_a_model_that_somebody_compiles_whole_computes_the_change(method: str, pico: Make) -> None:
    model, adapter = adapted(pico(), method)
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        for _ in range(2):
            assert torch.allclose(compiled(**token_batch()).logits, merged(model)(**token_batch()).logits, atol=1e-5)
            update_by_data(adapter)
        with adapter.disabled():
            assert torch.allclose(
                compiled(**token_batch()).logits, classifier(pico())(**token_batch()).logits, atol=1e-5
            )


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.slow
def test_compiled_blocks_compute_the_change_of_the_moment(method: str, pico: Make) -> None:
    from craft_cli.training.compile import compile_blocks

    model, adapter = adapted(pico(), method)
    plain = gradients(model, adapter)
    compile_blocks(adapter, backend="aot_eager")
    assert all(
        torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(plain, gradients(model, adapter), strict=True)
    )
    with torch.no_grad():
        for _ in range(2):
            whole = classifier(pico())
            craft.attach(whole, method=method, **METHODS[method]).load_trained_state(adapter.trained_state())
            whole.bert.craft.merge()
            assert torch.allclose(model(**token_batch()).logits, whole(**token_batch()).logits, atol=1e-5)
            x = hidden(model)
            one = model.bert.encoder.layer[1]
            assert torch.allclose(
                one.attention.self.query(x), whole.bert.encoder.layer[1].attention.self.query(x), atol=1e-5
            )
            update_by_data(adapter)
        with adapter.disabled():
            assert torch.allclose(model(**token_batch()).logits, classifier(pico())(**token_batch()).logits, atol=1e-5)
