"""Evaluate a run, an adapter, or any base checkpoint with a trained head."""

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
    """The result of `evaluate`.

    Attributes:
        subject: the evaluated run, adapter or checkpoint.
        data: the evaluated data.
        metrics: metrics, named as in scikit-learn and scipy, and `loss`; MNLI's second split has its name as a suffix.
        examples: number of evaluated rows.
        labels: label names, in the order of the confusion matrix.
        confusion: confusion matrix with gold labels as rows; only for single-label tasks.
        by_label: precision, recall, f1 and support of each label or entity type; empty for a regression.
        ece: expected calibration error, the gap between probabilities and frequencies; None for a regression.
        worst: the requested number of most confident mistakes, or largest errors of a regression: `place`, `label`,
            `prediction`, `texts`, and `confidence` or `error`.
        predictions: the predictions file.
        notes: notes about the rows.
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
        path: a run, an adapter, the folder of a base checkpoint or a Hub id. Default: the latest run.
        source: task or files, completed by those of the training; they can also be passed by name.
        split: `validation`, or `test` if it has labels.
        predictions: write one row per example to this file (.jsonl or .csv), with its row number.
        worst: number of most confident mistakes to collect.
        max_eval_samples: maximum rows per split. Default: as in training.
        max_seq_length: maximum tokens per row. Default: as in training.
        eval_generate: number of rows to generate answers to with a language model, for exact match.
        answer_pattern: the part of an answer to compare, as in training.
        max_new_tokens: maximum length of an answer.
        per_device_eval_batch_size: batch size. Default: 64, or 8 for language models.
        use_cpu: as in `predict`.
        trust_remote_code: as in `predict`.
        allow_other_base: as in `predict`.
        progress: called with (rows done, total rows).
        data: instead of `source`: `task`, `data_dir`, `validation_file`, `dataset_name`, `text_columns`, `label_column`, ...

    Raises:
        TypeError: both `source` and data by name are given, or a name is unknown.
        CraftError: a base checkpoint is given without task or files, or the model or the data is invalid.
    """
    source = _named(data, source) if data else source or DataSource()
    written = Path(predictions).expanduser() if predictions else None
    predictor = load_predictor(
        path, use_cpu=use_cpu, trust_remote_code=trust_remote_code, allow_other_base=allow_other_base
    )
    loaded = load_splits(_checked(predictor.source(source), written), [split], predictor.task)
    task = loaded.task
    asked, size = _asked(task, eval_generate, answer_pattern, max_new_tokens), per_device_eval_batch_size
    metrics, gold, every, mistakes = dict[str, float](), list[Any](), list[Any](), list[tuple[float, dict[str, Any]]]()
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
    """Return a function that generates answers to the first rows of a split, with exact match as a metric.

    Raises:
        ConfigError: a generation setting is given, but no answers are generated.
    """
    given = {"eval_generate": rows, "answer_pattern": pattern, "max_new_tokens": max_new_tokens}
    for name, value in given.items():
        if value and not task.generates:
            raise ConfigError(f"--{name.replace('_', '-')}: {task.kind} generates no answers; remove it")
        if value and not rows:
            raise ConfigError(f"--{name.replace('_', '-')} requires --eval-generate")
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
    """The rows, which must have labels.

    Raises:
        DataError: the labels are hidden.
    """
    if part.labels is None:
        raise DataError(
            f"the labels of {part.origin} are hidden; use craft eval --split test --submission FILE, or craft predict"
        )
    return part


def _checked(source: DataSource, predictions: Path | None) -> DataSource:
    """The source, after checking that predictions do not overwrite an input file."""
    if predictions is None:
        return source
    named = [Path(file).expanduser() for file in (source.train_file, source.validation_file) if file]
    files = [*named, *(Path(source.data_dir).expanduser().glob("*") if source.data_dir else ())]
    check_inputs("--predictions", predictions, files)
    return source


def _named(data: Mapping[str, Any], source: DataSource | None) -> DataSource:
    """Build a source from settings by name."""
    known = [field.name for field in fields(DataSource)]
    for name in data:
        if name not in known:
            raise TypeError(f"evaluate: unknown argument '{name}'{nearest(name, known)}")
    if source is not None:
        raise TypeError(f"evaluate: pass either source or data by name ({', '.join(data)}), not both")
    return DataSource(**parse_settings(data))


def _notes(predictor: Predictor, given: DataSource, loaded: Loaded) -> list[str]:
    """Notes if the data has changed since the training, or if training rows are evaluated."""
    trained = predictor.record.get("data", {}).get("rows", {})
    others = bool(given.task or given.data_dir or given.validation_file or given.dataset_name)
    notes = []
    for name, now in loaded.read.items():
        then = trained.get(name)
        origin = loaded.splits[VALIDATION].origin.rpartition(", ")[0] if name == TRAIN else loaded.splits[name].origin
        if name != TRAIN and now["sha256"] == trained.get(TRAIN, {}).get("sha256"):
            notes.append(f"{origin} contains the training rows: the metrics will look too good")
        elif then and not others and then["sha256"] != now["sha256"]:
            note = f"{origin} has changed since the training: {now['count']:,} rows instead of {then['count']:,}"
            held = "; the evaluation uses the original held-out rows and new ones, but no training rows"
            notes.append(note + (held if loaded.held_out else ""))
    return notes
