"""Data: whether the loader keeps up with the model, tokenising once, and what batches of similar length gain.

    python benchmarks/data.py [DATA_DIR] [--rows 8000] [--epochs 2] [--seeds 42] [--rounds 5] [--small] [--json FILE]

DATA_DIR holds train.jsonl and validation.jsonl in the columns of GLUE's SST-2; the sample task `opinions` without. The
model is the demo; a RoBERTa-base with random weights stands beside it for the loader.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import measure
import torch
from torch import Tensor

import craft_cli as craft
from craft_cli import RunConfig, train
from craft_cli.data import batches
from craft_cli.data.batches import collate, padding
from craft_cli.data.sources import TRAIN, DataSource
from craft_cli.data.tokens import encode
from craft_cli.models.loading import quiet_transformers
from craft_cli.tasks.splits import load_splits
from craft_cli.training.preparation import Prepared, build, prepare
from craft_cli.training.progress import Listener, Plan

Batch = tuple[dict[str, Tensor], Tensor | None]
ARMS = {"similar lengths": batches.BUCKET, "random": 1}
"""Updates sorted by length together. Of one alone its rows are sorted, which does not change which rows it has."""
NEVER = 10**9
"""Updates between two evaluations: the last update is evaluated anyway."""


def main() -> None:
    """Measure all three and print a table of each."""
    given = measure.arguments(
        __doc__,
        "data_dir",
        rows={"type": int, "default": 8000},
        epochs={"type": float, "default": 2},
        seeds={"default": "42"},
        rounds={"type": int, "default": 5},
        steps={"type": int, "default": 20, "help": "training steps in each round"},
    )
    settings: dict[str, Any] = {
        "task": "sst2" if given.data_dir else "opinions", "data_dir": given.data_dir, "model": "demo",
        "max_train_samples": given.rows, "num_train_epochs": given.epochs,
    }  # fmt: skip
    if given.small:
        given.rounds, given.steps = 1, 2
        settings |= {
            "max_train_samples": 40, "num_train_epochs": 1, "per_device_train_batch_size": 8, "max_eval_samples": 20
        }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        settings["cache_dir"] = f"{folder}/factors"
        results = {
            "loader": loader(RunConfig.build(settings), Path(folder), given.rounds, given.steps, small=given.small),
            "tokenising": tokenising(RunConfig.build(settings), Path(folder), given.rounds),
            "batches": bucketing(settings, [int(seed) for seed in given.seeds.split(",")], Path(folder)),
        }
    measure.write(given.json, results)


# -- the loader against the model ---------------------------------------------------------------------------------------


def loader(config: RunConfig, folder: Path, rounds: int, steps: int, *, small: bool) -> dict[str, Any]:
    """Tokens a second that the loader gives, and that a training step takes of the same batches."""
    prepared = prepare(config, lambda what, done, total: None)
    every = load(prepared, config)
    some = every[:steps]
    demo, *_ = build(config, prepared, torch.device("cpu"))
    arms: dict[str, Callable[[], object]] = {"loader": lambda: load(prepared, config)}
    for name, model in {"demo": demo, "RoBERTa-base": roberta(folder, small=small)}.items():
        optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
        arms[name] = partial(steps_of, model.train(), optimizer, some)
    seconds = measure.in_turn(arms, rounds)

    tokens = {name: count(every if name == "loader" else some) for name in arms}
    each = {name: [taken / tokens[name] for taken in times] for name, times in seconds.items()}  # seconds of a token
    results: dict[str, Any] = {
        name: {
            "tokens_per_second": 1 / statistics.median(times),
            "milliseconds_per_batch": 1e3 * statistics.median(seconds[name]) / len(every if name == "loader" else some),
            "times_slower_than_loader": measure.ratio(times, each["loader"]),
            "loader_part_of_step": measure.ratio(each["loader"], times),
        }
        for name, times in each.items()
    }
    rows = [
        [name, f"{row['tokens_per_second']:,.0f}", f"{row['milliseconds_per_batch']:.2f}",
         *(("", "") if name == "loader" else (f"{row['times_slower_than_loader']:,.0f}", f"{row['loader_part_of_step']:.2%}"))]
        for name, row in results.items()
    ]  # fmt: skip
    measure.table(
        ["", "tokens a second", "ms a batch", "times slower than the loader", "loader's part of a step"], rows
    )
    return results | {"batches": len(every), "rows": len(prepared.train), "tokens": tokens["loader"]}


def load(prepared: Prepared, config: RunConfig) -> list[Batch]:
    """The batches of the first epoch, by what the training calls."""
    updates = batches.plan_epoch(prepared.train.lengths, prepared.train_batch, seed=config.seed, epoch=0)
    return [collate(prepared.train, rows, prepared.tokenizer)[:2] for rows in updates]


def count(some: Sequence[Batch]) -> int:
    """Tokens without padding."""
    return sum(int(inputs["attention_mask"].sum()) for inputs, _ in some)


def steps_of(model: Any, optimizer: torch.optim.Optimizer, some: Sequence[Batch]) -> None:
    """A training step of each batch."""
    for inputs, gold in some:
        if model.config.model_type == "roberta":  # it has one kind of token
            inputs = {name: tensor for name, tensor in inputs.items() if name != "token_type_ids"}
        model(**inputs, labels=gold).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def roberta(folder: Path, *, small: bool) -> Any:
    """RoBERTa-base with random weights, adapted at 64,64,8."""
    from transformers import RobertaConfig, RobertaForSequenceClassification

    shape = RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)
    if small:
        shape.update({"hidden_size": 48, "num_hidden_layers": 2, "intermediate_size": 48})
    model = RobertaForSequenceClassification(shape)
    with quiet_transformers():
        model.save_pretrained(folder / "roberta")
    factors = craft.decompose(str(folder / "roberta"), ranks="64,64,8", cache_dir=str(folder / "factors"))
    craft.attach(model, factors)
    return model


# -- tokenising once ----------------------------------------------------------------------------------------------------


def tokenising(config: RunConfig, folder: Path, rounds: int) -> dict[str, Any]:
    """Seconds to encode all training rows, and to have them again from the cache."""
    prepared = prepare(config, lambda what, done, total: None)
    tokenizer = prepared.tokenizer
    split = load_splits(DataSource.of(config), [TRAIN]).splits[TRAIN]
    split = split.select([row % len(split) for row in range(max(len(split), 2000))])  # fewer are not kept
    seconds: dict[str, list[float]] = {"first": [], "again": []}
    for turn in range(rounds):
        encoded = []
        for times in seconds.values():
            began = time.perf_counter()
            encoded.append(encode(split, tokenizer, prepared.train.limit, cache=folder / f"cache{turn}"))
            times.append(time.perf_counter() - began)
        assert encoded[0] == encoded[1]
    results = {name: {"seconds": statistics.median(times)} for name, times in seconds.items()}
    print()
    measure.table(
        [f"tokenising {len(split):,} rows", "seconds", "rows a second"],
        [[name, f"{row['seconds']:.2f}", f"{len(split) / row['seconds']:,.0f}"] for name, row in results.items()],
    )
    return results | {"rows": len(split), "ratio": measure.ratio(seconds["first"], seconds["again"])}


# -- batches of similar length ------------------------------------------------------------------------------------------


class Clock(Listener):
    """When the first update began and the last one ended; the evaluation after it is left out."""

    def started(self, plan: Plan) -> None:
        """The loop begins."""
        self.began = time.perf_counter()

    def updated(self, step: int, loss: float, rate: float, examples: int) -> None:
        """An update was made."""
        self.seconds, self.rows = time.perf_counter() - self.began, getattr(self, "rows", 0) + examples


def bucketing(settings: dict[str, Any], seeds: Sequence[int], folder: Path) -> dict[str, Any]:
    """Trainings alike but for which rows come together, evaluated at the end; both pad to the longest of a batch."""
    results: dict[str, Any] = {name: {"seconds": [], "rows": [], "accuracy": [], "padding": []} for name in ARMS}
    train(RunConfig.build(settings | {"dry_run": True}))  # what only the first training imports and compiles
    for turn, seed in enumerate(seeds):
        names = list(ARMS) if turn % 2 == 0 else list(ARMS)[::-1]
        for name in names:
            config = RunConfig.build(
                settings
                | {"seed": seed, "eval_steps": NEVER, "save_strategy": "no", "output_dir": f"{folder}/{seed}-{name}"}
            )
            clock = Clock()
            with mock.patch.object(batches, "BUCKET", ARMS[name]):
                prepared = prepare(config, lambda what, done, total: None)
                lengths = prepared.train.lengths
                plan = batches.plan_epoch(lengths, prepared.train_batch, seed=seed, epoch=0)
                reached = train(config, clock).metrics
            results[name]["seconds"].append(clock.seconds)
            results[name]["rows"].append(clock.rows)
            results[name]["accuracy"].append(reached["accuracy"])
            results[name]["padding"].append(padding(lengths, plan))
    for row in results.values():
        row["ratio"] = measure.ratio(row["seconds"], results["random"]["seconds"])
    print()
    measure.table(
        ["batches of", "padding", "seconds of updates", "x random", "accuracy, seeds " + ", ".join(map(str, seeds))],
        [
            [name, f"{statistics.mean(row['padding']):.1%}", f"{statistics.median(row['seconds']):.1f}",
             f"{row['ratio']:.2f}", ", ".join(f"{value:.3f}" for value in row["accuracy"])]
            for name, row in results.items()
        ],
    )  # fmt: skip
    return results


if __name__ == "__main__":
    main()
