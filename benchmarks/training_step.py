"""One training step, and inference, of CRAFT beside LoRA (peft), full fine-tuning and the floor. RoBERTa-base shape.

    python benchmarks/training_step.py [--batches 4x32,16x64,32x128] [--rounds 12] [--methods] [--bf16] [--small] [--json FILE]

The floor is what nobody who trains anything in the lowest adapted layer can go below: forward and backward through the
frozen model down to there, where the bias of query and value is trained. CRAFT has ranks 64,64,8 on query and value, LoRA
rank 8 on the same. Heads are frozen in all arms but the full one. A step is zero_grad, forward, backward, AdamW, in
training mode with the dropout of the configuration; random weights do for speed. `--methods` takes craft's own LoRA and PiSSA
beside peft's, and the other methods at about as many numbers as CRAFT, instead of full fine-tuning.

Memory is what tensors needed at most at once during a step above what was there before it, counted by the allocator.
Operations (kernels, on a GPU) for each adapted module are those of forward and backward beyond the floor's, over the 24
adapted modules; what the optimizer does is not among them. On a GPU, or with `--bf16`, the base is in bf16 and everything
under autocast; batches there are 32x128 and 64x256.
"""

from __future__ import annotations

import copy
import statistics
import warnings
from collections.abc import Callable
from typing import Any

import torch
from measure import arguments, in_turn, most_alive, ratio, table, write
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import RobertaConfig, RobertaForSequenceClassification

from craft_cli.methods.adapter import Adapter
from craft_cli.methods.attach import attach
from craft_cli.methods.craft.change import CraftChange
from craft_cli.methods.craft.ranks import Ranks
from craft_cli.models.families import layer_views
from craft_cli.tucker import hosvd, stack_shape

TARGETS = ("query", "value")
FLOOR, CRAFT, LORA, FULL = "floor", "CRAFT 64,64,8", "LoRA r=8", "full"
SMALL: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "vocab_size": 99}

BASE: dict[str, Any] = {"vocab_size": 50265, "max_position_embeddings": 514}

Model = Any
Step = Callable[[], object]


def base_model(small: bool) -> Model:
    """A classifier of RoBERTa-base's shape, frozen."""
    torch.manual_seed(0)
    config = RobertaConfig(**(SMALL if small else BASE))
    return RobertaForSequenceClassification(config).requires_grad_(False)


def floor(model: Model) -> Model:
    """Trained: the bias of the adapted modules of the lowest layer."""
    for name in TARGETS:
        getattr(model.base_model.encoder.layer[0].attention.self, name).bias.requires_grad_(True)
    return model


def craft(model: Model) -> Model:
    """Trained: the transforms of query and value."""
    views = layer_views(model.config, TARGETS)
    decompositions = {}
    for name, layers in views.items():
        stack = torch.stack([view.read(view.module_of(model.base_model).get_parameter("weight")) for view in layers])
        decompositions[name] = hosvd(stack, Ranks(64, 64, 8).lowered(stack_shape(stack)).by_mode)
    Adapter(CraftChange(decompositions)).attach(model.base_model, views)
    return model


def lora(model: Model) -> Model:
    """Trained: A and B of rank 8."""
    settings = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=list(TARGETS))
    return get_peft_model(model, settings)


def pissa(model: Model) -> Model:
    """Trained: A and B of rank 8, from the leading singular vectors."""
    start: Any = "pissa_niter_4"
    settings = LoraConfig(r=8, lora_alpha=16, target_modules=list(TARGETS), init_lora_weights=start)
    return get_peft_model(model, settings)


def own(method: str, **options: Any) -> Callable[[Model], Model]:
    """Trained: by a method of craft's."""

    def attached(model: Model) -> Model:
        attach(model, method=method, head=[], **options)
        return model

    return attached


def full(model: Model) -> Model:
    """Trained: everything."""
    return model.requires_grad_(True)


ARMS: dict[str, Callable[[Model], Model]] = {FLOOR: floor, CRAFT: craft, LORA: lora, FULL: full}
METHOD_ARMS: dict[str, Callable[[Model], Model]] = {
    FLOOR: floor, CRAFT: craft, "LoRA r=8, peft": lora, "LoRA r=8": own("lora", rank=8), "PiSSA r=8, peft": pissa,
    "PiSSA r=8": own("pissa", rank=8, pissa_niter=4), "LoRA-XS r=26": own("lora-xs", rank=26),
    "LoTR r=9": own("lotr", rank=9), "SuperLoRA r=2": own("superlora", rank=2),
}  # fmt: skip


def gradients_of(model: Model, batch: dict[str, Tensor], bf16: bool) -> Step:
    """Forward and backward on one batch."""
    model.train()

    def gradients() -> None:
        model.zero_grad()
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            loss = model(**batch).loss
        loss.backward()

    return gradients


def step_of(model: Model, gradients: Step) -> Step:
    """A step on one batch, as a training loop does it."""
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-4)

    def step() -> None:
        gradients()
        optimizer.step()

    return step


def answer_of(model: Model, batch: dict[str, Tensor], bf16: bool) -> Step:
    """Inference on one batch."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    model.eval()

    def answer() -> None:
        with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            model(**inputs)

    return answer


def random_batch(rows: int, tokens: int, vocabulary: int, device: torch.device) -> dict[str, Tensor]:
    """Token ids without padding, and labels."""
    generator = torch.Generator().manual_seed(rows)
    ids = torch.randint(5, vocabulary, (rows, tokens), generator=generator)
    labels = torch.randint(2, (rows,), generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return {name: tensor.to(device) for name, tensor in batch.items()}


# -- memory and operations ----------------------------------------------------------------------------------------------


def peak_bytes(step: Step, device: torch.device) -> int:
    """Most bytes of tensors alive at once during a step, above those alive before it."""
    step()  # the state of the optimizer is there before
    if device.type == "cpu":
        return most_alive(step)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


VIEWS = (
    "view", "_unsafe_view", "reshape", "t.", "transpose", "permute", "detach", "expand", "slice", "select", "unbind", "alias",
    "unsqueeze", "_local_scalar_dense",
)  # fmt: skip


class Counted(TorchDispatchMode):
    """Counts operations that compute, not those that only look at a tensor in another way."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.name().removeprefix("aten::")
        self.count += not f"{name}.".startswith(VIEWS)
        return function(*args, **(kwargs or {}))


def operations(step: Step, device: torch.device) -> int:
    """Kernels launched on a GPU; operations that compute, on a CPU."""
    step()
    if device.type == "cuda":
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            step()
            torch.cuda.synchronize()
        return sum(event.count for event in profiler.key_averages() if event.self_device_time_total > 0)
    with Counted() as counted:
        step()
    return counted.count


# -- what is reported ---------------------------------------------------------------------------------------------------


def compare(
    arms: dict[str, Callable[[Model], Model]],
    base: Model,
    rows: int,
    tokens: int,
    rounds: int,
    device: torch.device,
    bf16: bool,
) -> list[dict[str, Any]]:
    """All arms on one batch size."""
    batch = random_batch(rows, tokens, base.config.vocab_size, device)
    models = {name: make(copy.deepcopy(base).to(device)) for name, make in arms.items()}
    gradients = {name: gradients_of(model, batch, bf16) for name, model in models.items()}
    steps = {name: step_of(models[name], gradients[name]) for name in models}
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    seconds = in_turn(steps, rounds, warm=2, wait=wait)
    adapted = len(TARGETS) * base.config.num_hidden_layers
    launched = {name: operations(work, device) for name, work in gradients.items()}
    found = []
    for name, step in steps.items():
        found.append(
            {
                "batch": f"{rows}x{tokens}",
                "arm": name,
                "trained": sum(p.numel() for p in models[name].parameters() if p.requires_grad),
                "seconds": statistics.median(seconds[name]),
                "ratio": ratio(seconds[name], seconds[FLOOR]),
                "peak_bytes": peak_bytes(step, device),
                "operations_per_adapted": (launched[name] - launched[FLOOR]) / adapted,
            }
        )
    for row in found:
        row["peak_ratio"] = row["peak_bytes"] / found[0]["peak_bytes"]
    return found


def inference(
    base: Model, rows: int, tokens: int, rounds: int, device: torch.device, bf16: bool
) -> list[dict[str, Any]]:
    """The base, the adapted and the merged model, without gradients."""
    batch = random_batch(rows, tokens, base.config.vocab_size, device)
    merged = copy.deepcopy(base)
    craft(merged)
    adapter = merged.base_model.get_submodule(Adapter.ATTRIBUTE)
    assert isinstance(adapter, Adapter)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.01)
    adapter.merge(merged.base_model)
    models = {"base": copy.deepcopy(base), "merged": merged, "adapted": craft(copy.deepcopy(base))}
    models["LoRA r=8"] = lora(copy.deepcopy(base))
    answers = {name: answer_of(model.to(device), batch, bf16) for name, model in models.items()}
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    seconds = in_turn(answers, rounds, warm=2, wait=wait)
    return [
        {
            "batch": f"{rows}x{tokens}", "model": name, "seconds": statistics.median(seconds[name]),
            "ratio": ratio(seconds[name], seconds["base"]), "operations": operations(answers[name], device),
        }
        for name in models
    ]  # fmt: skip


def main() -> None:
    """Measure all batch sizes and print the tables."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = "32x128,64x256" if device.type == "cuda" else "4x32,16x64,32x128"
    given = arguments(
        __doc__, batches={"default": None}, rounds={"type": int, "default": None}, bf16={"action": "store_true"},
        methods={"action": "store_true"},
    )  # fmt: skip
    arms = METHOD_ARMS if given.methods else ARMS
    warnings.filterwarnings("ignore", module="peft")
    base, bf16 = base_model(given.small), given.bf16 or device.type == "cuda"
    if bf16:
        base = base.bfloat16()
    batches = [batch.split("x") for batch in (given.batches or ("8x64" if given.small else sizes)).split(",")]
    found, answered = [], []
    for rows, tokens in [(int(rows), int(tokens)) for rows, tokens in batches]:
        rounds = given.rounds or (2 if given.small else max(5, min(50, 16_000 // (rows * tokens))))
        found += compare(arms, base, rows, tokens, rounds, device, bf16)
        answered += [] if given.methods else inference(base, rows, tokens, rounds, device, bf16)
    print("A training step; ratio to the floor within one run\n")
    table(
        ("batch", "trained", "numbers", "seconds", "ratio", "peak memory", "ratio", "operations per adapted module"),
        [
            (
                row["batch"], row["arm"], f"{row['trained']:,}", f"{row['seconds']:.3f}", f"{row['ratio']:.3f}",
                f"{row['peak_bytes'] / 1e6:,.1f} MB", f"{row['peak_ratio']:.3f}", f"{row['operations_per_adapted']:.1f}",
            )
            for row in found
        ],
    )  # fmt: skip
    if answered:
        print("\nInference; ratio to the base\n")
        columns = ("batch", "model", "seconds", "ratio", "operations")
        lines = [(row[name] for name in columns) for row in answered]
        table(columns, [[f"{it:.3f}" if isinstance(it, float) else it for it in line] for line in lines])
    write(given.json, {"steps": found, "inference": answered})


if __name__ == "__main__":
    main()
