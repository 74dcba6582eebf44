"""From call to result: craft against the same training with peft's LoRA in the transformers Trainer, on the CPU.

    python benchmarks/end_to_end.py [--data-dir DIR] [--settings quickstart,sst2] [--rank 8] [--seeds 42] [--rounds 1] [--json FILE]

Settings: `quickstart` (the shipped recipe) and `sst2` (8,000 phrases, 2 epochs, ranks 64,64,6), which needs `--data-dir` with
train.jsonl and validation.jsonl in GLUE's columns; without it only `quickstart` is run. Arms, in turn, each in a fresh process:

    craft                          craft.train
    LoRA, Trainer                  LoRA of query and value, dropout 0, alpha 8; random order, DataCollatorWithPadding
    LoRA, Trainer, by length       the same with train_sampling_strategy="group_by_length"

All train the demo model with the same random head (`--head-start random`) on the same rows: same tokens, batch, epochs, clipping, weight decay, linear
schedule with the same warm-up, and the same validation rows and a checkpoint after each epoch. The orders of the rows differ.
craft has two rates (its recipe's or defaults); the Trainer has one, for LoRA and head: `--lora-rate`, 3e-3 without, which
reached more than 1e-3 on the quickstart (seed 42, by length: best 0.764 and 0.732; both were tried on the validation rows).

`training` is the loop with its evaluations and checkpoints; `total` begins before torch is imported and holds data,
tokenising, craft's decomposition (no cache) and the model too. An evaluation before the training, which shows that all start
from the same model, is in neither; the one that craft makes before its first update is in both. Memory is the peak in training above a bare interpreter.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from typing import Any
from unittest import mock

import measure

SETTINGS: dict[str, dict[str, Any]] = {
    "quickstart": {"recipe": "quickstart"},
    "sst2": {
        "model": "demo", "task": "sst2", "ranks": "64,64,6", "max_train_samples": 8000, "num_train_epochs": 2,
    },
}  # fmt: skip
SMALL = {"max_train_samples": 48, "max_eval_samples": 32, "num_train_epochs": 1}
ORDERS = {"LoRA, Trainer": "random", "LoRA, Trainer, by length": "group_by_length"}
ARMS = ("craft", *ORDERS)


class Watch:
    """What a model is given in training, and how good it was before; one for each process.

    Attributes:
        seen: rows, tokens, and tokens with padding of all forward passes in training.
        untrained: accuracy and loss on the validation rows before the training.
        apart: seconds spent on that.
    """

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.seen = {"rows": 0, "tokens": 0, "padded_tokens": 0}
        self.untrained: dict[str, float] = {}
        self.apart = 0.0

    def model(self, model: Any, tokenizer: Any, config: Any) -> None:
        """Evaluate a model that is about to be trained, and watch it from here on."""
        began = time.perf_counter()
        self.untrained = untrained(model, tokenizer, config)
        model.register_forward_pre_hook(self._forward, with_kwargs=True)
        self.apart = time.perf_counter() - began

    def _forward(self, model: Any, _: Any, inputs: dict[str, Any]) -> None:
        if model.training:
            self.seen["rows"] += len(inputs["input_ids"])
            self.seen["tokens"] += int(inputs["attention_mask"].sum())
            self.seen["padded_tokens"] += inputs["input_ids"].numel()

    def result(self, numbers: int, updates: int, training: float, accuracy: Sequence[float]) -> dict[str, Any]:
        """What an arm reports.

        Args:
            numbers: trained, with the head.
            updates: made.
            training: seconds of it.
            accuracy: of each evaluation.
        """
        return {
            "numbers": numbers, "updates": updates, **self.seen, "untrained": self.untrained, "accuracy": list(accuracy),
            "training": training, "total": time.perf_counter() - self.began - self.apart,
        }  # fmt: skip


def main() -> None:
    """Run every arm of every setting and print the table."""
    arguments = measure.arguments(
        __doc__,
        data_dir={}, settings={}, rank={"type": int, "default": 8}, seeds={"default": "42"},
        rounds={"type": int, "default": 1}, lora_rate={"type": float, "default": 3e-3},
    )  # fmt: skip
    results = []
    header = [
        "setting",
        "arm",
        "numbers",
        "tokens with padding",
        "accuracy best",
        "last",
        "training s",
        "total s",
        "MB",
    ]
    lines = []
    if "sst2" in (arguments.settings or "") and not arguments.data_dir:
        raise SystemExit("sst2 needs --data-dir")
    possible = ",".join(name for name in SETTINGS if name != "sst2" or arguments.data_dir)
    for setting in (arguments.settings or possible).split(","):
        settings = SETTINGS[setting] | ({"data_dir": arguments.data_dir} if setting == "sst2" else {})
        settings |= SMALL if arguments.small else {}
        rows = run(settings, arguments)
        results += [{"setting": setting} | row for row in rows]
        lines += [(setting, *summary(arm, rows)) for arm in ARMS]
    measure.table(header, lines)
    measure.write(arguments.json, results)


def run(settings: dict[str, Any], arguments: Any) -> list[dict[str, Any]]:
    """A row for each arm, seed and round; another arm begins each round."""
    rows = []
    for seed in map(int, arguments.seeds.split(",")):
        for turn in range(arguments.rounds):
            first = turn % len(ARMS)
            for arm in ARMS[first:] + ARMS[:first]:
                given = {"seed": seed, "use_cpu": True} | settings
                memory, row = measure.peak_memory(train, arm, given, arguments.rank, arguments.lora_rate)
                rows.append({"arm": arm, "seed": seed, "round": turn} | row | {"memory": memory})
    return rows


def summary(arm: str, rows: Sequence[dict[str, Any]]) -> list[str]:
    """The cells of an arm: means of accuracies, medians of times with craft's share of them where it is another's."""
    mine, craft = ([row for row in rows if row["arm"] == name] for name in (arm, "craft"))

    def seconds(name: str) -> str:
        median = f"{statistics.median(row[name] for row in mine):.1f}"
        if arm == "craft":
            return median
        pairs = [
            [row[name] for row in sorted(part, key=lambda row: (row["seed"], row["round"]))] for part in (craft, mine)
        ]
        return f"{median} (craft {measure.ratio(*pairs):.2f})"

    best, last = (statistics.mean(pick(row["accuracy"]) for row in mine) for pick in (max, lambda all: all[-1]))
    return [
        arm, f"{mine[0]['numbers']:,}", f"{statistics.mean(row['padded_tokens'] for row in mine):,.0f}", f"{best:.3f}",
        f"{last:.3f}", seconds("training"), seconds("total"),
        f"{statistics.median(row['memory'] for row in mine) / 2**20:,.0f}",
    ]  # fmt: skip


# -- in a fresh process -------------------------------------------------------------------------------------------------


def train(arm: str, settings: dict[str, Any], rank: int, rate: float) -> dict[str, Any]:
    """Train one arm; see `Watch.result`."""
    watch = Watch()
    from craft_cli.config import RunConfig, load_recipe
    from craft_cli.tasks.sequence_classification import SequenceClassification

    with tempfile.TemporaryDirectory() as folder:
        given = settings | {"cache_dir": f"{folder}/cache", "output_dir": f"{folder}/run", "head_start": "random"}
        recipe = load_recipe(given.pop("recipe")) if "recipe" in given else None
        config = RunConfig.build(given, recipe)
        config = config.settled(SequenceClassification.defaults)
        return with_craft(watch, config) if arm == "craft" else with_lora(watch, config, ORDERS[arm], rank, rate)


def with_craft(watch: Watch, config: Any) -> dict[str, Any]:
    """Train by `craft.train`."""
    from craft_cli.api.train import train
    from craft_cli.training import setup
    from craft_cli.training.progress import Listener

    class Ears(Listener):
        accuracy: list[float] = []  # noqa: RUF012

        def started(self, plan: Any) -> None:
            watch.seen = dict.fromkeys(watch.seen, 0)  # without the forward passes that estimate the memory
            measure.reset_peak()

        def evaluated(self, step: int, epoch: float, metrics: Any, *, best: bool) -> None:
            if step:  # the Trainer does not evaluate before it
                self.accuracy.append(metrics["accuracy"])

    def build(config: Any, prepared: Any, device: Any) -> Any:
        model, *others = built(config, prepared, device)
        watch.model(model, prepared.tokenizer, config)
        return model, *others

    built, ears = setup.build, Ears()
    with mock.patch.object(setup, "build", build):
        result = train(config, ears)
    return watch.result(sum(result.parameters.values()), result.updates, result.seconds, ears.accuracy)


def with_lora(watch: Watch, config: Any, order: str, rank: int, rate: float) -> dict[str, Any]:
    """Train by peft and the Trainer, as their users would write it."""
    from peft import LoraConfig, get_peft_model
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        PrinterCallback,
        Trainer,
        TrainerCallback,
        TrainingArguments,
        set_seed,
    )
    from transformers.utils import logging

    from craft_cli.models.hub import resolve

    class Start(TrainerCallback):
        at = 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            measure.reset_peak()
            self.at = time.perf_counter()

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    labels, (train_split, validation) = splits(config)
    folder = resolve(config.model).folder
    tokenizer = AutoTokenizer.from_pretrained(folder)
    train_rows, validation_rows = (
        encode(split, tokenizer, config.max_seq_length) for split in (train_split, validation)
    )
    set_seed(config.seed)
    model: Any = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(labels))
    model = get_peft_model(
        model, LoraConfig(task_type="SEQ_CLS", r=rank, target_modules=["query", "value"], lora_dropout=0.0)
    )
    watch.model(model, tokenizer, config)
    updates = math.ceil(config.num_train_epochs * math.ceil(len(train_rows) / config.per_device_train_batch_size))
    start = Start()
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=f"{config.output_dir}", use_cpu=True, seed=config.seed, learning_rate=rate,
            weight_decay=config.weight_decay, warmup_steps=int(config.warmup_ratio * updates),
            max_grad_norm=config.max_grad_norm, num_train_epochs=config.num_train_epochs,
            per_device_train_batch_size=config.per_device_train_batch_size,
            per_device_eval_batch_size=config.per_device_eval_batch_size, train_sampling_strategy=order,
            eval_strategy="epoch", save_strategy="epoch", save_total_limit=config.save_total_limit,
            load_best_model_at_end=True, metric_for_best_model="accuracy", logging_steps=config.logging_steps,
            report_to="none", disable_tqdm=True, dataloader_pin_memory=False,
        ),
        train_dataset=train_rows,
        eval_dataset=validation_rows,
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda outputs: {"accuracy": float((outputs[0].argmax(-1) == outputs[1]).mean())},
        callbacks=[start],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    training = time.perf_counter() - start.at
    numbers = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    accuracy = [line["eval_accuracy"] for line in trainer.state.log_history if "eval_accuracy" in line]
    return watch.result(numbers, trainer.state.global_step, training, accuracy)


def splits(config: Any) -> tuple[Sequence[str], list[Any]]:
    """The names of the labels, and the training and validation texts that craft would take."""
    from craft_cli.data.sources import TRAIN, VALIDATION, DataSource
    from craft_cli.tasks.splits import load_splits

    loaded = load_splits(DataSource.of(config), [TRAIN, VALIDATION])
    train, validation = loaded.splits.values()
    return loaded.task.labels, [
        train.first(config.max_train_samples, by_label=loaded.task.stratified),
        validation.first(config.max_eval_samples),
    ]


def encode(split: Any, tokenizer: Any, limit: int) -> list[dict[str, Any]]:
    """Rows for the Trainer, not padded."""
    columns = [list(column) for column in zip(*split.texts, strict=True)]
    encoded = tokenizer(*columns, truncation=True, max_length=limit)
    return [{name: encoded[name][row] for name in encoded} | {"label": label} for row, label in enumerate(split.labels)]


def untrained(model: Any, tokenizer: Any, config: Any) -> dict[str, float]:
    """Accuracy and loss on the validation rows, as the model is."""
    import torch

    rows = encode(splits(config)[1][1], tokenizer, config.max_seq_length)
    gold = torch.tensor([row.pop("label") for row in rows])
    model.eval()
    with torch.no_grad():
        logits = torch.cat(
            [
                model(**tokenizer.pad(rows[start : start + 64], return_tensors="pt")).logits
                for start in range(0, len(rows), 64)
            ]
        )
    return {
        "accuracy": float((logits.argmax(-1) == gold).float().mean()),
        "loss": float(torch.nn.functional.cross_entropy(logits, gold)),
    }


if __name__ == "__main__":
    main()
