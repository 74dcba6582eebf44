"""Use-case: evaluate a run, an adapter, or any checkpoint with a trained head."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from heapq import nlargest
from itertools import chain, zip_longest
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from craft_cli.api.predictor import Predictor, load_predictor
from craft_cli.config import parse_settings
from craft_cli.data.sources import TRAIN, VALIDATION, DataSource, Split
from craft_cli.data.tokens import Unseen
from craft_cli.data.writers import format_of, open_records
from craft_cli.errors import ConfigError, DataError, nearest
from craft_cli.files import check_inputs
from craft_cli.tasks.generation import MATCHES, MAX_NEW_TOKENS, Generation, judged
from craft_cli.tasks.metrics import renamed
from craft_cli.tasks.splits import Loaded, load_splits

if TYPE_CHECKING:
    from craft_cli.tasks.base import Task


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found.

    Attributes:
        subject: what was evaluated.
        data: on which rows.
        metrics: by scikit-learn's and scipy's names, and `loss`; those of MNLI's second split have its name behind them.
        examples: how many rows were counted, each once.
        labels: names, in the order of the confusion matrix.
        confusion: rows by gold label (down) and predicted label (across); of one label a row only.
        by_label: precision, recall, f1 and support of each label or kind of entity; not of a regression.
        ece: the expected calibration error: how far probabilities are from frequencies; not of a regression.
        worst: the most confident wrong answers, or the largest errors of a regression, as many as were asked for: `place`, `label`,
            `prediction`, `texts`, and `confidence` or `error`.
        predictions: the file written.
        notes: what the user should know of the rows.
    """

    subject: str
    data: str
    metrics: Mapping[str, float]
    examples: int
    labels: tuple[str, ...] = ()
    confusion: Sequence[Sequence[int]] | None = None
    by_label: Mapping[str, Mapping[str, float]] | None = None
    ece: float | None = None
    worst: Sequence[Mapping[str, Any]] | None = None
    predictions: str | None = None
    notes: Sequence[str] | None = None


def evaluate(
    path: str | Path | None = None,
    *,
    source: DataSource | None = None,
    split: str = VALIDATION,
    predictions: str | Path | None = None,
    worst: int = 0,
    max_eval_samples: int | None = None,
    max_seq_length: int | None = None,
    eval_generate: int | None = None,
    answer_pattern: str | None = None,
    max_new_tokens: int | None = None,
    per_device_eval_batch_size: int | None = None,
    use_cpu: bool = False,
    trust_remote_code: bool = False,
    allow_other_base: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
    **data: Any,
) -> Evaluation:
    """Evaluate on validation data.

        craft.evaluate("runs/first", validation_file="new.csv")

    Args:
        path: a run, an adapter, a checkpoint's folder or a hub id; the latest run without.
        source: task or files; what is not given is as in training (runs and adapters know it); or give them by name.
        split: `validation`, or `test` where that is labelled.
        predictions: write a row for each example into this file (.jsonl or .csv), with its number in the data.
        worst: collect so many of the most confident wrong answers.
        max_eval_samples, max_seq_length: only the first rows of each split, and the tokens kept of each; as in training without.
        eval_generate: write answers to so many rows with a language model, and compare them with those of the data.
        answer_pattern, max_new_tokens: what of them is compared, and their length, as in training.
        per_device_eval_batch_size: rows at once; 64 without, of language models 8.
        use_cpu, trust_remote_code, allow_other_base: as in `predict`.
        progress: called with (rows done, rows in all).
        data: in place of `source`: `task`, `data_dir`, `validation_file`, `dataset_name`, `text_columns`, `label_column`, ...

    Raises:
        TypeError: both `source` and data by name are given, or an unknown name.
        CraftError: a checkpoint needs a task or files; the model or the data cannot be used.
    """
    source = _named(data, source) if data else source or DataSource()
    written = Path(predictions).expanduser() if predictions else None
    predictor = load_predictor(
        path, use_cpu=use_cpu, trust_remote_code=trust_remote_code, allow_other_base=allow_other_base
    )
    loaded = load_splits(_checked(predictor.source(source), written), [split], predictor.task)
    task = loaded.task
    asked, size = _asked(task, eval_generate, answer_pattern, max_new_tokens), per_device_eval_batch_size
    metrics, gold, every = dict[str, float](), list[Any](), list[Any]()
    mistakes: list[tuple[float, dict[str, Any]]] = []
    notes = _notes(predictor, source, loaded)
    with open_records(written, format_of(written)) if written else nullcontext() as writer:
        for name, whole in loaded.splits.items():
            part = _labelled(whole.first(max_eval_samples))
            encoded = predictor.encode(part, task, max_seq_length)
            scores = predictor.scores(encoded, task, size, progress, part.place_of)
            matches, answers = asked(predictor, part, size, progress)
            notes += filter(None, [Unseen().add(encoded).note(part.origin, max_seq_length)])
            metrics |= renamed(task.measure(scores, part.labels or []) | matches, name, loaded.splits)
            gold += part.labels or []
            every += scores
            mistakes = nlargest(worst, chain(mistakes, task.mistakes(scores, part)), key=itemgetter(0))
            if writer:
                rows = zip_longest(part.numbers, task.records(scores, part), answers)
                writer.write({"row": number} | record | (answer or {}) for number, record, answer in rows)
    return Evaluation(
        subject=predictor.name,
        data=" and ".join(part.origin for part in loaded.splits.values()),
        metrics=metrics,
        examples=len(gold),
        labels=task.labels,
        worst=[row for _, row in mistakes] if worst else None,
        predictions=str(written) if written else None,
        notes=notes or None,
        **task.tables(every, gold),
    )


def _asked(task: Task, rows: int | None, pattern: str | None, max_new_tokens: int | None) -> Callable[..., Any]:
    """What writes answers to the first rows of a split and gives the share that match, as a metric, and each of them.

    Raises:
        ConfigError: none are written, but one of the settings is given.
    """
    given = {"eval_generate": rows, "answer_pattern": pattern, "max_new_tokens": max_new_tokens}
    for name, value in given.items():
        if value and not task.generates:
            raise ConfigError(f"--{name.replace('_', '-')}: {task.kind} writes no answers; leave it out")
        if value and not rows:
            raise ConfigError(f"--{name.replace('_', '-')} needs --eval-generate")
    settings = Generation(max_new_tokens or MAX_NEW_TOKENS)

    def ask(
        predictor: Predictor, part: Split, size: int | None, progress: Callable[[int, int], None]
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        if not rows:
            return {}, []
        some = part.first(rows)
        share, answers = judged(predictor.write(some, task, settings, size, progress), some.labels or [], pattern)
        return {MATCHES: share}, answers

    return ask


def _labelled(part: Split) -> Split:
    """The rows, if their gold is known.

    Raises:
        DataError: it is not.
    """
    if part.labels is None:
        raise DataError(
            f"{part.origin} keeps its labels hidden: craft eval --split test --submission FILE, or craft predict"
        )
    return part


def _checked(source: DataSource, predictions: Path | None) -> DataSource:
    """The source, unless predictions are to be written over a file that rows may be read from."""
    if predictions is None:
        return source
    named = [Path(file).expanduser() for file in (source.train_file, source.validation_file) if file]
    files = [*named, *(Path(source.data_dir).expanduser().glob("*") if source.data_dir else ())]
    check_inputs("--predictions", predictions, files)
    return source


def _named(data: Mapping[str, Any], source: DataSource | None) -> DataSource:
    """Data by the names of settings."""
    known = [field.name for field in fields(DataSource)]
    for name in data:
        if name not in known:
            raise TypeError(f"evaluate: unknown argument '{name}'{nearest(name, known)}")
    if source is not None:
        raise TypeError(f"evaluate: give either source or data by name ({', '.join(data)}), not both")
    return DataSource(**parse_settings(data))


def _notes(predictor: Predictor, given: DataSource, loaded: Loaded) -> list[str]:
    """Where the rows are not those of the training, or are those that were trained on."""
    trained = predictor.record.get("data", {}).get("rows", {})
    others = bool(given.task or given.data_dir or given.validation_file or given.dataset_name)
    notes = []
    for name, now in loaded.read.items():
        then = trained.get(name)
        origin = loaded.splits[VALIDATION].origin.rpartition(", ")[0] if name == TRAIN else loaded.splits[name].origin
        if name != TRAIN and now["sha256"] == trained.get(TRAIN, {}).get("sha256"):
            notes.append(f"{origin} holds the rows that this was trained on: the metrics will look too good")
        elif then and not others and then["sha256"] != now["sha256"]:
            note = f"{origin} has changed since the training: {now['count']:,} rows, {then['count']:,} then"
            held = "; evaluated are the rows held out then, and new ones like them, none that was trained on"
            notes.append(note + (held if loaded.held_out else ""))
    return notes
