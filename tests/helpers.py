"""What tests of several rooms share: settings and listeners, runs cut on purpose, damaged files, data files."""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
import pty
import random
import re
import resource
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    WORDS,
    classifier,
    opinions,
    shake,
    token_batch,
    write_rows,
)
from loopback_hub import LoopbackHub
from rich.cells import cell_len
from safetensors.torch import load_file

import craft_cli as craft
from craft_cli.cli import console
from craft_cli.config import RunConfig
from craft_cli.data.sources import DataSource, Split
from craft_cli.errors import DataError
from craft_cli.sweeps.table import Results
from craft_cli.tasks.sequence_classification import SequenceClassification as Task
from craft_cli.tasks.splits import load_splits
from craft_cli.training.checkpoint import read_checkpoint
from craft_cli.training.progress import Listener, Plan
from craft_cli.training.run import Run, checkpoints


def config(base: Path, data: Path, **settings: Any) -> RunConfig:
    given = {
        "model": str(base), "task": "sst2", "data_dir": str(data), "ranks": "6,5,2", "use_cpu": True, "output_dir": "out",
        "per_device_train_batch_size": 8, "num_train_epochs": 2, "logging_steps": 1, "head_learning_rate": 3e-2,
        "learning_rate": 3e-2, "head_start": "random",
    }  # fmt: skip
    if settings.get("method", "craft") != "craft":
        del given["ranks"]
    return RunConfig.build(given | settings)


def numbers(path: Path, count: int, seed: int, *, times: float = 1.0, plus: float = 0.0) -> Path:
    """Rows with a number that follows from one word."""
    rows = opinions(count, seed)
    values = [times * (row["label"] + 0.25 * (number % 3)) + plus for number, row in enumerate(rows)]
    return write_rows(path, [{"text": row["sentence"], "score": v} for row, v in zip(rows, values, strict=True)])


def own_config(base: Path, folder: Path, **changed: Any) -> RunConfig:
    """The settings of `config` for rows of one's own."""
    given = {
        "model": str(base), "data_dir": str(folder), "ranks": "6,5,2", "use_cpu": True, "output_dir": "out",
        "per_device_train_batch_size": 8, "num_train_epochs": 2, "logging_steps": 1, "learning_rate": 3e-2,
    }  # fmt: skip
    return RunConfig.build(given | changed)


def lines(run: str = "out") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]


def tensors(run: str = "out") -> dict[str, torch.Tensor]:
    return load_file(Path(run) / "adapter" / "adapter_model.safetensors")


def mostly_slow(values: Iterable[Any], *quick: Any) -> list[Any]:
    """Parameters of a test, all slow but these."""
    return [pytest.param(value, marks=() if value in quick else pytest.mark.slow) for value in values]


def craft_command(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "craft_cli", *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        **options,
    )


def on_a_terminal(command: Sequence[str], columns: int, **settings: str) -> str:
    """What a command shows on a terminal so wide, without its control sequences; it must end well.

    Args:
        command: whose stderr, and stdout, are the terminal.
        columns: of it; it has 40 lines.
        settings: of the environment.
    """
    main, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": str(columns)} | settings
    process = subprocess.Popen(command, stdout=terminal, stderr=terminal, env=environment)
    os.close(terminal)
    shown = b""
    while True:
        try:
            part = os.read(main, 65536)
        except OSError:  # its end has closed
            break
        if not part:
            break
        shown += part
    os.close(main)
    assert process.wait(60) == 0
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode(errors="replace"))


class Screen(io.StringIO):
    """A terminal."""

    def isatty(self) -> bool:
        return True


def at(width: int | None, shown: Callable[[], None]) -> str:
    """What it shows on a terminal so wide, or in a file."""
    stream = Screen() if width else io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        for it in (console.out, console.err):
            patch.setattr(it, "_file", stream)
            patch.setattr(it, "_width", width or 10_000)
            patch.setattr(it, "_color_system", None)
        shown()
    return stream.getvalue()


def words_of(text: str) -> set[str]:
    """Its words without lines and frames, and without what was shortened."""
    words = text.replace("│", " ").split()
    return {word for word in words if not set(word) <= set("─╭╮╰╯") and not word.endswith("…")}


def whole_at_any_width(shown: Callable[[], None]) -> None:
    """At every width: whole words, no line too long unless it is one word, and a table says which columns it left out."""
    whole = at(None, shown)
    words, first = words_of(whole), set(whole.split("\n", 1)[0].split())
    for width in (40, 60, 80, 120):
        text = at(width, shown)
        table, left_out, _ = text.partition("too narrow for: ")
        assert words_of(table) <= words, (width, text)
        if not left_out and "…" not in text:  # rows in lines do without the first heading
            assert words - words_of(table) <= first, (width, text)
        for line in [line for line in table.splitlines() if not line.startswith("note: ")]:  # these can be copied
            assert cell_len(line.rstrip()) <= width or max(map(cell_len, line.split())) > width - 2, (width, text)


class Remember(Listener):
    """Keeps what it hears."""

    def __init__(self) -> None:
        self.plan: Plan | None = None
        self.evaluations: list[dict[str, float]] = []

    def started(self, plan: Plan) -> None:
        self.plan = plan

    def evaluated(self, step: int, epoch: float, metrics: Any, *, best: bool) -> None:
        self.evaluations.append(dict(metrics) | {"best": best})


DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}


class Cut(Listener):
    """Sends a signal to this process once: after an update, or inside an evaluation that follows it."""

    def __init__(self, after: int, number: int = signal.SIGINT, *, in_evaluation: bool = False) -> None:
        self.after, self.number, self.in_evaluation, self.step = after, number, in_evaluation, 0
        self.told: list[tuple[int, Path | None, bool]] = []
        self.plan: Plan | None = None

    def started(self, plan: Plan) -> None:
        self.plan, self.step = plan, plan.done

    def updated(self, step: int, loss: float, rate: float, examples: int) -> None:
        self.step = step
        if step == self.after - 1 and not self.in_evaluation:  # heard of after the next one
            os.kill(os.getpid(), self.number)

    def evaluating(self, done: int, total: int) -> None:
        if self.step == self.after and self.in_evaluation and done < total:
            os.kill(os.getpid(), self.number)

    def interrupted(self, step: int, run: Path | None, *, resumable: bool) -> None:
        self.told.append((step, run, resumable))


def cut(settings: Any, listener: Cut) -> None:
    """Train until the signal; 6 updates an epoch."""
    ending: type[BaseException] = KeyboardInterrupt if listener.number == signal.SIGINT else SystemExit
    with pytest.raises(ending) as ended:
        craft.train(settings, listener)
    if listener.number == signal.SIGTERM:
        assert isinstance(ended.value, SystemExit)
        assert ended.value.code == 143


def same(run: str, other: str) -> None:
    """Two runs ended alike, to the bit."""
    assert lines(run) == lines(other)
    first, second = tensors(run), tensors(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    newest = [checkpoints(Run(Path(name))) for name in (run, other)]
    if all(newest):
        last, expected = (read_checkpoint(paths[0]) for paths in newest)
        assert (last.step, last.metrics) == (expected.step, expected.metrics)
        for name in ("journal", "rng", "update_size", "data"):
            assert last.record[name] == expected.record[name], name
    results, others = Run(Path(run)).results(), Run(Path(other)).results()
    of_its_own = ("seconds", "output", "remarks")  # they name the folder
    assert {n: v for n, v in results.items() if n not in of_its_own} == {
        n: v for n, v in others.items() if n not in of_its_own
    }


def flags(base: Path, data: Path, **settings: Any) -> list[str]:
    """The settings of `config` for the command line."""
    given = {
        "model": base, "task": "sst2", "data_dir": data, "ranks": "6,5,2", "output_dir": "out", "logging_steps": 1,
        "per_device_train_batch_size": 8, "num_train_epochs": 2, "head_learning_rate": 3e-2, "learning_rate": 3e-2,
        "head_start": "random",
    } | settings  # fmt: skip
    if settings.get("method", "craft") != "craft":
        del given["ranks"]
    return ["--use-cpu", *[word for name, value in given.items() for word in (f"--{name}", str(value))]]


def saved_adapter(base: Path, targets: tuple[str, ...] = ("query", "value"), **options: Any) -> Path:
    """An adapter with random transforms and another head than a fresh model has."""
    model = classifier(base, id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1})
    model.config.pad_token_id = 0
    adapter = craft.attach(model, craft.decompose(str(base), targets, (6, 5, 2)), **options)
    shake(adapter)
    with torch.no_grad():
        for tensor in adapter.head_state().values():
            tensor.add_(torch.linspace(-0.1, 0.1, tensor.numel()).view_as(tensor))
    adapter.save("adapter")
    return Path("adapter")


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(**token_batch()).logits.float()


@contextmanager
def endpoint(hub: LoopbackHub) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        yield


def write(name: str, content: str | bytes) -> str:
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return name


def write_as(suffix: str, rows: list[dict[str, Any]]) -> Path:
    """Rows as a file of this kind, by another library than the one which reads them."""
    path = Path(f"rows{suffix}")
    if suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif suffix in (".jsonl", ".json"):
        lines = [json.dumps(row) for row in rows]
        path.write_text("\n".join(lines) + "\n" if suffix == ".jsonl" else f"[{','.join(lines)}]")
    elif suffix == ".tsv":
        lines = ["\t".join(map(str, row.values())) for row in [dict.fromkeys(rows[0]), *rows]]
        lines[0] = "\t".join(rows[0])
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    else:
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return path


def own(train: str, validation: str | None = None, **settings: Any) -> tuple[Task, list[Split]]:
    """The splits of files, as `craft train --train-file` reads them."""
    parts = ["train", "validation"] if validation else ["train"]
    loaded = load_splits(DataSource(train_file=train, validation_file=validation, **settings), parts)
    assert isinstance(loaded.task, Task)
    return loaded.task, list(loaded.splits.values())


def problem(function: Callable[..., Any], *arguments: Any, **settings: Any) -> str:
    with pytest.raises(DataError) as raised:
        function(*arguments, **settings)
    message = str(raised.value)
    assert "\n" not in message
    return message


def flip(path: Path) -> None:
    """Change one bit of the last tensor."""
    content = path.read_bytes()
    path.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])


@contextmanager
def full_disk(size: int = 2000) -> Iterator[None]:
    """No file can grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def leftovers() -> list[Path]:
    return [path for path in Path().rglob("*") if path.name.endswith((".part", ".old"))]


def conll(sentences: Sequence[tuple[Sequence[str], Sequence[str]]], separator: str = "\t", end: str = "\n") -> str:
    return end.join(
        "".join(f"{word}{separator}{tag}{end}" for word, tag in zip(words, tags, strict=True))
        for words, tags in sentences
    )


def sentences(count: int, seed: int) -> list[tuple[list[str], list[str]]]:
    """Sentences of very different numbers of words, whose entities can be learned from their words."""
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        words: list[str] = []
        tags: list[str] = []
        for _ in range(draw.choice((1, 2, 3, 12))):
            kind, word, more = draw.choice(
                (("O", WORDS[draw.randrange(9)], ""), ("plus", "great", "good"), ("minus", "awful", "bad"))
            )
            words, tags = [*words, word], [*tags, "O" if kind == "O" else f"B-{kind}"]
            if more and draw.random() < 0.5:
                words, tags = [*words, more], [*tags, f"I-{kind}"]
        made.append((words, tags))
    return made


def starts() -> list[list[str]]:
    """Of the pretended trainings of a sweep: run, update it went on from and GPUs of every process started."""
    return [line.split(" ") for line in Path("starts").read_text().splitlines()] if Path("starts").exists() else []


def table_of(results: Results) -> list[Any]:
    """What must be the same, however often a sweep was cut."""
    return [
        (row.trial, row.state, row.setting, row.numbers, row.mean, row.std, row.n, row.chosen) for row in results.rows
    ]


def real_runs(pico: Callable[..., Path], **settings: Any) -> dict[str, Any]:
    """Settings of a sweep's runs that take a moment."""
    few = {"per_device_train_batch_size": 8, "logging_steps": 1, "head_start": "random", "max_steps": 4}
    return {"model": str(pico()), **few, **settings}
