"""Use-case: predict for texts without labels, row after row, however many there are."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path

from craft_cli.api.predictor import load_subject
from craft_cli.data.readers import SUFFIXES, TEXT, Row, read_rows, read_stdin
from craft_cli.data.sources import Split
from craft_cli.data.writers import RecordWriter, format_of, open_records
from craft_cli.errors import DataError
from craft_cli.tasks.sequence_classification import records
from craft_cli.tasks.splits import guess_texts, text_of

STDIN = "-"
_BATCHES_AT_ONCE = 16
"""Batches whose rows are sorted by length together; from standard input it is one, so that lines are answered soon."""


def predict(
    path: str | Path | None = None,
    *,
    input: str | Path = STDIN,
    output: str | Path | None = None,
    output_format: str | None = None,
    text_columns: Sequence[str] | None = None,
    max_seq_length: int | None = None,
    per_device_eval_batch_size: int = 64,
    use_cpu: bool = False,
    progress: Callable[[int], None] = lambda rows: None,
) -> int:
    """Predict for the rows of a file or of standard input; neither rows nor predictions are ever held whole.

    Args:
        path: a run, an adapter, a checkpoint's folder or a hub id; the latest run without.
        input: a file (jsonl, csv, tsv, parquet, or txt with a text a line), or `-` for texts a line on standard input. A
            pair in one line is divided by a tab.
        output: the file to write (.jsonl or .csv); standard output without.
        output_format: `jsonl` or `csv`, where the file's name does not say it.
        text_columns: as in training without, or as columns are usually called.
        max_seq_length: tokens kept; as in training without.
        per_device_eval_batch_size: rows at once.
        use_cpu: stay on the CPU.
        progress: called with the number of rows done.

    Returns:
        How many rows there were.

    Raises:
        CraftError: the model or a row cannot be used. What was predicted before is on standard output, but in no file.
    """
    kind = (
        format_of(Path(output), output_format)
        if output
        else format_of(Path("standard output"), output_format or "jsonl")
    )
    origin = "standard input" if str(input) == STDIN else str(input)
    rows = read_stdin(TEXT) if str(input) == STDIN else read_rows(Path(input).expanduser(), (*SUFFIXES, TEXT))
    first = next(rows, None)  # a missing file is told before a model is loaded
    if first is None:
        raise DataError(f"{origin} holds no rows")
    subject = load_subject(path, use_cpu=use_cpu)
    task = subject.task()
    is_text = origin == "standard input" or Path(origin).suffix == TEXT
    columns = _columns(first, origin, text_columns or task.text_columns, is_text=is_text)
    pairs = len(task.text_columns) == 2
    size = per_device_eval_batch_size * (1 if str(input) == STDIN else _BATCHES_AT_ONCE)
    rows, done = chain([first], rows), 0
    with _writer(output, kind) as writer:
        while block := list(islice(rows, size)):
            texts = [_texts(row, columns, origin, divide=is_text and pairs) for row in block]
            encoded = subject.encode(Split(texts, None, origin), max_seq_length)
            logits = subject.logits(encoded, task.labels, per_device_eval_batch_size)
            writer.write(records(logits, task, subject.threshold))
            done += len(block)
            progress(done)
    return done


def _columns(first: Row, origin: str, wanted: Sequence[str], *, is_text: bool) -> tuple[str, ...]:
    if is_text:
        return ("text",)
    if wanted and all(column in first.cells for column in wanted):
        return tuple(wanted)
    found = guess_texts(list(first.cells))
    if not found or (wanted and len(wanted) != len(found)):
        needed = f"no columns {' and '.join(wanted)}" if wanted else "no column that is usually a text"
        raise DataError(f"{origin} has {needed}; it has {', '.join(first.cells)} (choose with --text-columns)")
    return found


def _texts(row: Row, columns: Sequence[str], origin: str, *, divide: bool) -> tuple[str, ...]:
    if divide:
        first, tab, second = row.cells["text"].partition("\t")
        if not tab:
            raise DataError(f"{origin}, {row.place}: this model takes two texts; put a tab between them")
        return first, second
    return tuple(text_of(row.cells.get(column), column, lambda: f"{origin}, {row.place}") for column in columns)


@contextmanager
def _writer(output: str | Path | None, kind: str) -> Iterator[RecordWriter]:
    if output is None:
        yield RecordWriter(sys.stdout, kind)
    else:
        with open_records(Path(output).expanduser(), kind) as writer:
            yield writer
