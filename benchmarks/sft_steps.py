"""What a training step of a language model costs: craft beside trl's SFTTrainer, the head on targets alone, and packing.

    python benchmarks/sft.py --steps --model DIR --data-dir DIR [--chat FILE] [--rounds 16] [--batch 4] [--json FILE]

Steps: LoRA r=8 of query and value (alpha 16, no dropout, float32) in craft and in trl, and CRAFT 100,100,24. A step of craft is
an update of its loop; one of trl is its collator, `training_step`, clipping, optimizer and schedule, as `train` calls them, without its
data loader and log. trl's default of computing activations again is switched off: craft's is off too. The token ids of all
arms are the same; trl learns one more token of each row, the line break that the template writes behind the end of the turn.
Every round each arm takes one batch, in turn. `trl, same batches` takes craft's batches, of rows of similar length; `trl` takes the
same rows in a random order, as its default is: of that arm only the sum over all rounds means something. Without trl
installed its arms are left out.

The head: forward and backward through the LoRA model on one batch, the loss of the targets alone against the one that transformers computes
of all positions. Packing: rows that share sequences of 1,024 tokens against the same rows in batches of similar length, and the tokens
with padding that the batches of an epoch have.

Seconds are those of the processor: others share this machine, which the seconds on the wall beside them show. Memory is what
tensors needed at most at once above what was there before, as the allocator counts it, on the batch with the most tokens.
"""

from __future__ import annotations

import importlib.util
import json
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import measure
import torch

from craft_cli.config import RunConfig
from craft_cli.data import batches
from craft_cli.data.batches import collate, plan_epoch
from craft_cli.data.packing import best_fit, packed
from craft_cli.data.tokens import Encoded
from craft_cli.tasks.language_loss import summed_loss
from craft_cli.training import loop
from craft_cli.training.progress import Listener
from craft_cli.training.setup import Training, make_accelerator, set_up

LORA, CRAFT, SAME, OWN = "LoRA r=8, craft", "CRAFT 41k", "LoRA r=8, trl, same batches", "LoRA r=8, trl"
METHODS: dict[str, dict[str, Any]] = {
    LORA: {"method": "lora", "rank": 8},
    CRAFT: {"method": "craft", "ranks": "100,100,24"},
}
POOL = 200
"""Rows that the batches are made of."""
LIMIT = 1024
SEQUENCES = 4
"""Packed sequences of a round."""

Step = Callable[[Sequence[int]], float]
"""A step on these rows; the mean loss of a target."""


def run(given: Any) -> None:
    """Measure everything and print the tables; the file has what is measured so far."""
    if given.small:
        given.rounds = 2
    files = {"gsm8k": given.data_dir / "train.jsonl"} | ({"chat": given.chat} if given.chat else {})
    data = {name: draw(file, given) for name, file in files.items()}
    trainings = {name: training(given, data["gsm8k"], options) for name, options in METHODS.items()}
    found: dict[str, Any] = {"steps": steps(given, trainings, data["gsm8k"])}
    print("A training step\n")
    _steps_table(found["steps"])
    others = {name: trainings[LORA] if name == "gsm8k" else training(given, data[name], METHODS[LORA]) for name in data}
    measure.write(given.json, found)
    found["head"] = [head(name, one, given) for name, one in others.items()]
    print("\nForward and backward, the head on targets alone against transformers' loss\n")
    _pairs_table(found["head"], "transformers", "targets alone")
    measure.write(given.json, found)
    found["packing"] = [packing(name, one, given) for name, one in others.items()]
    print("\nThe same rows with --packing and without\n")
    _pairs_table(found["packing"], "without", "packed")
    measure.write(given.json, found)
    found["padding"] = [row for name, one in others.items() for row in padding(name, one, given.batch)]
    print("\nTokens with padding of an epoch, times the tokens\n")
    columns = ("random", "by length", "packed")
    measure.table(
        ("data", "batch", *columns),
        [[row["data"], row["batch"], *(f"{row[name]:.3f}" for name in columns)] for row in found["padding"]],
    )
    measure.write(given.json, found)


def draw(file: Path, given: Any) -> Path:
    """Some rows of a file, as a file of their own."""
    lines = file.read_text(encoding="utf-8").splitlines()
    random.Random(given.seed).shuffle(lines)
    path = Path(given.work) / f"steps-{file.parent.name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines[: 4 * given.rounds * given.batch if given.small else POOL]))
    return path


def training(given: Any, file: Path, options: Mapping[str, Any]) -> Training:
    """A training of craft on these rows, before its first update."""
    from contextlib import ExitStack

    config = RunConfig.build({
        "model": given.model, "train_file": str(file), "max_seq_length": LIMIT, "per_device_train_batch_size": given.batch,
        "use_cpu": True, "dry_run": True, "num_train_epochs": 1, "seed": given.seed, "cache_dir": str(given.work / "cache"), **options,
    })  # fmt: skip
    return set_up(config, make_accelerator(config), Listener(), ExitStack(), Path(given.work))


# -- steps ---------------------------------------------------------------------------------------------------------------


def steps(given: Any, trainings: Mapping[str, Training], file: Path) -> list[dict[str, Any]]:
    """All arms on the same rows."""
    data = trainings[LORA].prepared.train
    planned = plan_epoch(data.lengths, given.batch, seed=given.seed, epoch=0)
    planned = [rows for rows in planned if len(rows) == given.batch][: given.rounds]
    every = [row for rows in planned for row in rows]
    random.Random(given.seed).shuffle(every)
    shuffled = [every[start : start + given.batch] for start in range(0, len(every), given.batch)]
    arms: dict[str, tuple[Step, Sequence[Sequence[int]]]] = {
        name: (craft_step(one), planned) for name, one in trainings.items()
    }
    if importlib.util.find_spec("trl"):
        step = trl_step(given, file, trainings[LORA])
        arms |= {SAME: (step, planned), OWN: (step, shuffled)}
    longest = max(planned, key=lambda rows: max(data.lengths[row] for row in rows))
    losses = {name: step(longest) for name, (step, _) in arms.items()}  # warms up; all begin with the base model
    spent = in_turn(arms)
    memory = {name: measure.most_alive(lambda step=step: step(longest)) for name, (step, _) in arms.items()}  # type: ignore[misc]
    other = SAME if SAME in arms else LORA
    return [
        {
            "arm": name, "batch": given.batch, "rounds": len(planned), "first_loss": losses[name], "memory": memory[name],
            "memory_ratio": memory[name] / memory[other], "cpu": spent[name]["cpu"], "wall": spent[name]["wall"],
            "cpu_ratio": measure.ratio(spent[name]["cpu"], spent[other]["cpu"]),
            "wall_ratio": measure.ratio(spent[name]["wall"], spent[other]["wall"]),
            "cpu_of_sum": sum(spent[name]["cpu"]) / sum(spent[OWN if OWN in arms else other]["cpu"]),
            "tokens": sum(len(rows) * max(data.lengths[row] for row in rows) for rows in arms[name][1]),
        }
        for name in arms
    ]  # fmt: skip


def in_turn(arms: Mapping[str, tuple[Callable[..., Any], Sequence[Any]]]) -> dict[str, dict[str, list[float]]]:
    """Seconds of the processor and on the wall of every arm in each round, each with the round's work; another begins each round."""
    names = list(arms)
    spent: dict[str, dict[str, list[float]]] = {name: {"cpu": [], "wall": []} for name in names}
    for turn in range(len(arms[names[0]][1])):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            work, given = arms[name]
            cpu, wall = time.process_time(), time.perf_counter()
            work(given[turn])
            spent[name]["cpu"].append(time.process_time() - cpu)
            spent[name]["wall"].append(time.perf_counter() - wall)
    return spent


def craft_step(one: Training) -> Step:
    """An update of craft's loop."""
    losses: list[float] = []

    def step(rows: Sequence[int]) -> float:
        with mock.patch.object(one.journal, "update", lambda step, epoch, loss, *_: losses.append(loss)):
            loop.update(one, rows)
        return losses[-1]

    return step


def trl_step(given: Any, file: Path, one: Training) -> Step:
    """A step of trl's trainer on rows of the same file."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    rows = rows[: len(rows)]
    pairs = [
        {
            "prompt": [{"role": "user", "content": row["question"]}],
            "completion": [{"role": "assistant", "content": row["answer"]}],
        }
        for row in rows
    ]
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32),
        args=SFTConfig(
            output_dir=str(given.work / "trl"), use_cpu=True, bf16=False, gradient_checkpointing=False, max_length=LIMIT,
            per_device_train_batch_size=given.batch, completion_only_loss=True, report_to="none", disable_tqdm=True,
            learning_rate=1e-3,
        ),
        train_dataset=Dataset.from_list(pairs),
        processing_class=AutoTokenizer.from_pretrained(given.model),
        peft_config=LoraConfig(
            task_type="CAUSAL_LM", r=8, lora_alpha=16, lora_dropout=0.0, target_modules=["q_proj", "v_proj"]
        ),
    )  # fmt: skip
    trainer.create_optimizer_and_scheduler(1000)
    trainer.current_gradient_accumulation_steps = 1
    encoded: Any = trainer.train_dataset
    known = {tuple(feature["input_ids"]) for feature in one.prepared.train.features}
    place = {tuple(row["input_ids"]): number for number, row in enumerate(encoded)}
    if not known <= set(place):
        raise SystemExit("trl's token ids are not craft's")
    numbers = [place[tuple(feature["input_ids"])] for feature in one.prepared.train.features]

    def step(chosen: Sequence[int]) -> float:
        inputs = trainer.data_collator([encoded[numbers[row]] for row in chosen])
        trainer.model.train()
        count = (inputs["labels"][:, 1:] != -100).sum()
        loss = trainer.training_step(trainer.model, inputs, count)
        trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), trainer.args.max_grad_norm)
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        trainer.model.zero_grad()
        return float(loss.detach())

    return step


# -- the head, packing ---------------------------------------------------------------------------------------------------


def head(name: str, one: Training, given: Any) -> dict[str, Any]:
    """One batch of middling length: the loss of the targets alone against transformers' own."""
    data, model = one.prepared.train, one.model
    planned = sorted(
        plan_epoch(data.lengths, given.batch, seed=given.seed, epoch=0), key=lambda rows: data.lengths[rows[0]]
    )
    rows = planned[len(planned) // 2]
    batch = collate(data, rows, one.prepared.tokenizer)
    assert batch.targets is not None
    count = int((batch.targets[:, 1:] != -100).sum())
    model.train()

    def ours(_: object = None) -> float:
        loss = summed_loss(model, batch.inputs, batch.targets) / count  # type: ignore[arg-type]
        loss.backward()
        model.zero_grad()
        return float(loss.detach())

    def theirs(_: object = None) -> float:
        loss = model(**batch.inputs, labels=batch.targets).loss
        loss.backward()
        model.zero_grad()
        return float(loss.detach())

    losses = theirs(), ours()
    if abs(losses[0] - losses[1]) > 1e-4 * abs(losses[0]):
        raise SystemExit(f"the losses differ: {losses}")
    shape = f"{len(rows)}x{max(data.lengths[row] for row in rows)}, {count} targets"
    return {"data": name, "batch": shape} | _pair(theirs, ours, [None] * max(2, given.rounds // 4))


def packing(name: str, one: Training, given: Any) -> dict[str, Any]:
    """Forward and backward of the rows of some packed sequences, packed and as batches of similar length."""
    data, tokenizer, task = one.prepared.train, one.prepared.tokenizer, one.prepared.task
    together = best_fit(data.lengths, LIMIT)
    groups = [together[start : start + SEQUENCES] for start in range(0, len(together), SEQUENCES)]
    planned = groups[: max(2, given.rounds // 4)]
    one.model.train()

    def work(encoded: Encoded, rows: Sequence[int]) -> None:
        task.loss(one.model, collate(encoded, rows, tokenizer)).backward()

    def plain(group: Sequence[Sequence[int]]) -> None:
        rows = sorted((row for sequence in group for row in sequence), key=lambda row: -data.lengths[row])
        for start in range(0, len(rows), given.batch):
            work(data, rows[start : start + given.batch])
        one.model.zero_grad()

    def packs(group: Sequence[Sequence[int]]) -> None:
        for sequence in group:
            work(packed(data.only(sequence), LIMIT), [0])
        one.model.zero_grad()

    shape = f"{SEQUENCES} sequences of {LIMIT}, {statistics.mean(map(len, together)):.1f} rows each"
    return {"data": name, "batch": shape} | _pair(plain, packs, planned)


def _pair(theirs: Callable[[Any], Any], ours: Callable[[Any], Any], work: Sequence[Any]) -> dict[str, Any]:
    """Both in turn: seconds, memory, and their ratios."""
    theirs(work[0]), ours(work[0])
    spent = in_turn({"theirs": (theirs, work), "ours": (ours, work)})
    memory = [measure.most_alive(lambda arm=arm: arm(work[0])) for arm in (theirs, ours)]  # type: ignore[misc]
    return {
        "cpu": {name: one["cpu"] for name, one in spent.items()}, "wall": {name: one["wall"] for name, one in spent.items()},
        "cpu_ratio": measure.ratio(spent["ours"]["cpu"], spent["theirs"]["cpu"]),
        "wall_ratio": measure.ratio(spent["ours"]["wall"], spent["theirs"]["wall"]),
        "memory": memory, "memory_ratio": memory[1] / memory[0],
    }  # fmt: skip


def padding(name: str, one: Training, batch: int) -> list[dict[str, Any]]:
    """Tokens with padding over tokens: batches in random order, of similar length, and packed sequences."""
    data = one.prepared.train
    tokens = sum(data.lengths)
    packs = len(best_fit(data.lengths, LIMIT)) * LIMIT / tokens
    found = []
    for size in dict.fromkeys((batch, 8, 32)):
        row: dict[str, Any] = {"data": name, "batch": size, "packed": packs}
        for order, bucket in (("by length", batches.BUCKET), ("random", 1)):
            with mock.patch.object(batches, "BUCKET", bucket):
                planned = plan_epoch(data.lengths, size, seed=1, epoch=0)
            row[order] = sum(len(rows) * max(data.lengths[one] for one in rows) for rows in planned) / tokens
        found.append(row)
    return found


# -- tables --------------------------------------------------------------------------------------------------------------


def _steps_table(found: Sequence[dict[str, Any]]) -> None:
    header = (
        "trained",
        "CPU seconds",
        "ratio",
        "wall seconds",
        "ratio",
        "CPU seconds of all rows",
        "tokens with padding",
    )
    measure.table(
        (*header, "peak memory", "ratio", "first loss"),
        [
            (
                row["arm"], f"{statistics.median(row['cpu']):.2f}", _paired(row, "cpu_ratio"),
                f"{statistics.median(row['wall']):.2f}", _paired(row, "wall_ratio"),
                f"{sum(row['cpu']):.0f} ({row['cpu_of_sum']:.3f})", f"{row['tokens']:,}", f"{row['memory'] / 1e6:,.0f} MB",
                f"{row['memory_ratio']:.3f}", "-" if row["arm"] == OWN else f"{row['first_loss']:.4f}",
            )
            for row in found
        ],
    )  # fmt: skip


def _paired(row: dict[str, Any], name: str) -> str:
    """The median of the ratios, where batches are the same."""
    return "-" if row["arm"] == OWN else f"{row[name]:.3f}"


def _pairs_table(found: Sequence[dict[str, Any]], theirs: str, ours: str) -> None:
    header = (
        "data",
        "batch",
        f"CPU seconds, {theirs}",
        ours,
        "ratio",
        "ratio on the wall",
        f"peak memory, {theirs}",
        ours,
    )
    measure.table(
        (*header, "ratio"),
        [
            (
                row["data"], row["batch"], *(f"{statistics.median(row['cpu'][arm]):.2f}" for arm in ("theirs", "ours")),
                f"{row['cpu_ratio']:.3f}", f"{row['wall_ratio']:.3f}", *(f"{one / 1e6:,.0f} MB" for one in row["memory"]),
                f"{row['memory_ratio']:.3f}",
            )
            for row in found
        ],
    )  # fmt: skip
