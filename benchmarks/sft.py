"""Language models on GSM8K: how far CRAFT of several sizes follows LoRA r=8, and what a training step costs beside trl's.

    python benchmarks/sft.py --model DIR --data-dir DIR --work FOLDER --json FILE [--targets query,value] [--sizes 41k,r=8]
        [--rows 400] [--held-out 100] [--test 100] [--tokens 160] [--batch 4] [--epochs 1] [--seed 1] [--bf16] [--table]
    python benchmarks/sft.py --steps --model DIR --data-dir DIR --json FILE [--chat FILE] [--rounds 16]   (sft_steps.py)

DIR of the data has GSM8K's train.jsonl and test.jsonl (question, answer). Rows are a seeded draw of those that have at most
`--tokens` tokens in the model's chat template, so that none is cut: training rows and the rows held out of train.jsonl,
test rows of test.jsonl.

A cell is a training: targets, size and rate, one seed, in a fresh process. The rate of a size is the one with the lowest loss
on the rows held out; the adapter of that one is then scored on the test rows, on which nothing is chosen: loss, perplexity,
token accuracy, and exact match of the number behind `####` in greedy answers. `base` is the model without an adapter.
FILE keeps every finished cell at once and FOLDER the runs: called again, only what is missing is run. The table prints what
there is, and at which rates; `of the gain` is the part of LoRA's fall of the test loss that a size has, and CRAFT
follows LoRA from the size on that has 95 % of it.

Seconds are those of the training loop with its two evaluations, on the wall and of the processor; memory is the peak of the
whole process above its imports, the model included.
"""

from __future__ import annotations

import json
import math
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import measure

ATTENTION, ALL = "query,value", "all-linear"
LORA = "r=8"
SIZES: dict[str, dict[str, dict[str, Any]]] = {
    ATTENTION: {
        "41k": {"ranks": "100,100,24"}, LORA: {"rank": 8}, "160k": {"ranks": "200,200,30"}, "640k": {"ranks": "448,448,30"},
        "16k": {"ranks": "64,64,8"},
    },
    ALL: {
        "41k": {"ranks": "54,54,6"}, LORA: {"rank": 8}, "160k": {"ranks": "106,106,20"}, "640k": {"ranks": "216,216,30"},
        "16k": {"ranks": "34,34,6"},
    },
}  # fmt: skip
"""Numbers that CRAFT trains in SmolLM2-135M (30 layers of 576), and LoRA; in the order in which they are run."""
RATES = {
    LORA: (1e-3, 3e-3, 3e-4, 1e-2), "16k": (3e-3, 1e-2, 1e-3, 3e-2), "41k": (3e-3, 1e-2, 1e-3, 3e-2),
    "160k": (1e-3, 3e-4, 3e-3, 1e-2), "640k": (1e-3, 3e-4, 3e-3, 1e-4),
}  # fmt: skip
"""Rates of a size: the larger the ranks of CRAFT, the lower the best one."""
NUMBER = r"####\s*(-?[\d,.]*\d)"
NEW_TOKENS = 160
SETTING = ("rows", "held_out", "test", "tokens", "batch", "epochs", "seed", "bf16")
FOLLOWS = 0.95


def main() -> None:
    """Run the missing cells, or the steps, and print the tables."""
    given = measure.arguments(
        __doc__,
        model={}, data_dir={"type": Path}, work={"type": Path}, targets={"default": f"{ATTENTION};{ALL}"}, sizes={},
        rows={"type": int, "default": 400}, held_out={"type": int, "default": 100}, test={"type": int, "default": 100},
        tokens={"type": int, "default": 160}, batch={"type": int, "default": 4},
        epochs={"type": float, "default": 1.0}, seed={"type": int, "default": 1}, bf16={"action": "store_true"}, table={"action": "store_true"},
        steps={"action": "store_true"}, chat={"type": Path}, rounds={"type": int, "default": 16},
    )  # fmt: skip
    if given.small:
        given.rows, given.held_out, given.test, given.rounds = 12, 4, 2, 2
    with ExitStack() as held:
        if given.work is None:
            given.work = Path(held.enter_context(tempfile.TemporaryDirectory()))
        if given.steps:
            import sft_steps

            sft_steps.run(given)
            return
        study = Study(given)
        if not given.table:
            for targets, size in wanted(given):
                study.need(targets, size)
        table(study)


def wanted(given: Any) -> Iterator[tuple[str, str]]:
    """Targets and sizes that were asked for; the model itself first."""
    yield "", "base"
    for targets in given.targets.split(";"):
        for size in given.sizes.split(",") if given.sizes else SIZES[targets]:
            yield targets, size


class Study:
    """The finished cells, in a file, and how one is run.

    Attributes:
        trained: a training each.
        tested: the best of each size, on the test rows.
    """

    def __init__(self, given: Any) -> None:
        self.given = given
        done = json.loads(given.json.read_text())["results"] if given.json and given.json.exists() else {}
        self.trained: list[dict[str, Any]] = done.get("trained", [])
        self.tested: list[dict[str, Any]] = done.get("tested", [])
        self.setting = {name: getattr(given, name) for name in SETTING}

    def of(self, found: Sequence[dict[str, Any]], targets: str, size: str) -> list[dict[str, Any]]:
        """Cells of a size in this setting."""
        cell = {"targets": targets, "size": size, **self.setting}
        return [row for row in found if all(row[name] == value for name, value in cell.items())]

    def best(self, targets: str, size: str) -> dict[str, Any] | None:
        """The training with the lowest loss on the rows held out, of those that there are."""
        return min(self.of(self.trained, targets, size), key=lambda row: row["validation"]["loss"], default=None)

    def tests(self, targets: str, size: str) -> dict[str, Any] | None:
        """The best training's scores on the test rows, if there are any."""
        best = self.best(targets, size)
        rate = best["rate"] if best else None
        return next((row for row in self.of(self.tested, targets, size) if row["rate"] == rate), None)

    def need(self, targets: str, size: str) -> None:
        """Train at the rates that are missing, and score the best."""
        method = "lora" if size == LORA else "craft"
        rates = () if size == "base" else RATES[size][: 2 if self.given.small else None]
        for rate in rates:
            if not any(row["rate"] == rate for row in self.of(self.trained, targets, size)):
                memory, found = measure.peak_memory(train, self.recipe(targets, size, method, rate))
                self.keep(self.trained, targets, size, {"method": method, "rate": rate, "memory": memory} | found)
        if self.tests(targets, size) is None:
            best = self.best(targets, size)
            _, found = measure.peak_memory(score, self.subject(best), *self.test_rows())
            self.keep(self.tested, targets, size, {"rate": best["rate"] if best else None} | found)

    def recipe(self, targets: str, size: str, method: str, rate: float) -> dict[str, Any]:
        """Settings of a training."""
        given, files = self.given, self.files()
        setting = "-".join(f"{value:g}" for value in self.setting.values())
        name = f"{targets.replace(',', '-')}-{size}-{rate:g}-{setting}"
        return {
            "model": given.model, "train_file": str(files["train"]), "validation_file": str(files["held_out"]),
            "method": method, "targets": targets, "learning_rate": rate, "num_train_epochs": given.epochs,
            "per_device_train_batch_size": given.batch, "bf16": given.bf16, "metric_for_best_model": "loss", "seed": given.seed, "use_cpu": True, "output_dir": str(given.work / name),
            "cache_dir": str(given.work / "cache"), "overwrite": True, "save_strategy": "no", **SIZES[targets][size],
        }  # fmt: skip

    def files(self) -> dict[str, Path]:
        """The rows, as files."""
        given = self.given
        folder = given.work / f"gsm8k-{given.rows}-{given.held_out}-{given.test}-{given.tokens}-{given.seed}"
        files = {part: folder / f"{part}.jsonl" for part in ("train", "held_out", "test")}
        if not folder.exists():
            pool = short(
                given.data_dir / "train.jsonl", given.model, given.tokens, given.rows + given.held_out, given.seed
            )
            rows = {"train": pool[: given.rows], "held_out": pool[given.rows :]}
            rows["test"] = short(given.data_dir / "test.jsonl", given.model, given.tokens, given.test, given.seed)
            folder.mkdir(parents=True)
            for part, lines in rows.items():
                files[part].write_text("".join(json.dumps(line) + "\n" for line in lines))
        return files

    def subject(self, best: dict[str, Any] | None) -> str:
        """What is scored: a run, or the model."""
        return str(self.given.work / best["run"]) if best else self.given.model

    def test_rows(self) -> tuple[str, int]:
        """The file of the test rows, and how many answers are written."""
        return str(self.files()["test"]), self.given.test

    def keep(self, found: list[dict[str, Any]], targets: str, size: str, result: dict[str, Any]) -> None:
        """Add a finished cell."""
        found.append({"targets": targets, "size": size, **self.setting} | result)
        if self.given.json:
            part = self.given.json.with_suffix(".part")
            measure.write(part, {"trained": self.trained, "tested": self.tested})
            part.replace(self.given.json)
        print(time.strftime("%H:%M:%S"), json.dumps(found[-1]), file=sys.stderr, flush=True)


def short(file: Path, model: str, tokens: int, count: int, seed: int) -> list[dict[str, str]]:
    """A seeded draw of the rows that have at most so many tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    random.Random(seed).shuffle(lines)
    found = []
    for line in lines:
        talk = [{"role": "user", "content": line["question"]}, {"role": "assistant", "content": line["answer"]}]
        encoded: Any = tokenizer.apply_chat_template(talk, tokenize=True)
        if len(encoded["input_ids"]) <= tokens:
            found.append({"question": line["question"], "answer": line["answer"]})
            if len(found) == count:
                return found
    raise SystemExit(f"{file} has {len(found)} rows of at most {tokens} tokens, not {count}")


# -- in a fresh process --------------------------------------------------------------------------------------------------


def train(settings: dict[str, Any]) -> dict[str, Any]:
    """One training."""
    import craft_cli as craft

    measure.reset_peak()
    began = time.process_time()
    result = craft.train(**settings)
    return {
        "run": Path(str(result.output)).name, "numbers": sum(result.parameters.values()), "updates": result.updates, "epoch": result.epoch,
        "validation": dict(result.metrics), "untrained": dict(result.baselines.get("checkpoint", {})),
        "seconds": result.seconds, "cpu": time.process_time() - began,
    }  # fmt: skip


def score(path: str, file: str, answers: int) -> dict[str, Any]:
    """The metrics on the test rows."""
    import craft_cli as craft
    from craft_cli.data.sources import DataSource

    found = craft.evaluate(
        path, source=DataSource(validation_file=file, task_type="causal-lm"), eval_generate=answers, answer_pattern=NUMBER,
        max_new_tokens=NEW_TOKENS, per_device_eval_batch_size=16, use_cpu=True,
    )  # fmt: skip
    return {"metrics": dict(found.metrics)}


# -- tables --------------------------------------------------------------------------------------------------------------


def table(study: Study) -> None:
    """A row for each size, and from which one on CRAFT follows LoRA."""
    base = next(iter(study.of(study.tested, "", "base")), None)
    rows: list[list[str]] = []
    verdicts, missing = [], []
    if base:
        rows.append(["-", "base", "0", "-", "-", *_metrics(base), "-", "-", "-", "-"])
    for targets, sizes in SIZES.items():
        lora = study.tests(targets, LORA)
        parts: dict[str, float] = {}
        for size in sorted(sizes, key=lambda size: (size == LORA, int(size.strip("r=k")))):
            best, tested = study.best(targets, size), study.tests(targets, size)
            tried = [row["rate"] for row in study.of(study.trained, targets, size)]
            missing += [f"{targets} {size} {rate:g}" for rate in RATES[size] if rate not in tried]
            if best is None:
                continue
            part = math.nan
            if base and lora and tested:
                part = _gain(base, tested) / _gain(base, lora)
                parts[size] = part
            rows.append([
                targets, f"{'LoRA' if size == LORA else 'CRAFT'} {size}", f"{best['numbers']:,}",
                f"{best['rate']:g} of {len(tried)}", f"{best['validation']['loss']:.4f}", *_metrics(tested),
                "-" if math.isnan(part) else f"{part:.2f}", f"{best['seconds']:.0f}", f"{best['cpu']:.0f}",
                f"{best['memory'] / 1e6:,.0f}",
            ])  # fmt: skip
        verdicts += [_verdict(targets, parts)] if parts.keys() - {LORA} else []
    columns = ("perplexity", "token accuracy", "exact match", "of the gain", "seconds", "CPU seconds", "MB")
    measure.table(("targets", "trained", "numbers", "rate", "held-out loss", "test loss", *columns), rows)
    print("\n" + "\n".join([*verdicts, f"Missing: {', '.join(missing) or 'nothing'}"]))


def _gain(base: dict[str, Any], tested: dict[str, Any]) -> float:
    return float(base["metrics"]["loss"] - tested["metrics"]["loss"])


def _metrics(tested: dict[str, Any] | None) -> list[str]:
    if tested is None:
        return ["-"] * 4
    found = tested["metrics"]
    return [
        f"{found['loss']:.4f}",
        f"{found['perplexity']:.3f}",
        *(f"{100 * found[name]:.1f}" for name in ("token_accuracy", "exact_match")),
    ]


def _verdict(targets: str, parts: dict[str, float]) -> str:
    """From which of the sizes that were tested on CRAFT follows LoRA."""
    craft = sorted((size for size in parts if size != LORA), key=lambda size: int(size.strip("k")))
    first = next((size for size in craft if parts[size] >= FOLLOWS), None)
    if first is None:
        return f"{targets}: CRAFT does not follow LoRA {LORA} up to {craft[-1]} ({parts[craft[-1]]:.2f} of its gain)."
    return f"{targets}: CRAFT follows LoRA {LORA} from {first} on ({parts[first]:.2f} of its gain)."


if __name__ == "__main__":
    main()
