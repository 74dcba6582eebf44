"""Generate answers to some validation rows at an evaluation, and compare them with the reference answers."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate.utils import gather_object

from craft_cli.files import read_content, write_bytes
from craft_cli.tasks.generation import MAX_NEW_TOKENS, Answer, Generation, write_answers

if TYPE_CHECKING:
    from craft_cli.training.setup import Training


def write_samples(training: Training) -> list[Answer]:
    """Generate an answer to each selected row, on every process.

    Each process generates its share. With a sharded base, all processes generate all answers, because every forward needs
    all of them.
    """
    accelerator, config, prepared = training.accelerator, training.config, training.prepared
    alone = training.sharded or accelerator.num_processes == 1
    mine = prepared.asked if alone else prepared.asked[accelerator.process_index :: accelerator.num_processes]
    with accelerator.autocast():
        written = write_answers(
            accelerator.unwrap_model(training.model),
            prepared.tokenizer,
            mine,
            prepared.task.ends(prepared.tokenizer),
            Generation(config.max_new_tokens or MAX_NEW_TOKENS),
            batch_size=prepared.eval_batch,
            progress=lambda done, total: training.listener.preparing("generating answers", done, total),
        )
    if alone:
        return written
    shares = gather_object([written])
    return [shares[number % len(shares)][number // len(shares)] for number in range(len(prepared.asked))]


def forget_samples(file: Path, step: int) -> None:
    """Remove the samples of evaluations after this update, and damaged lines."""
    if not file.is_file():
        return
    kept = []
    for line in read_content(file).splitlines(keepends=True):
        with suppress(KeyError, RecursionError, TypeError, ValueError):
            if line.endswith(b"\n") and json.loads(line)["step"] <= step:
                kept.append(line)
    write_bytes(file, b"".join(kept))
