"""Answers of a language model to some validation rows, written at an evaluation and compared with those of the data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate.utils import gather_object

from craft_cli.files import write_bytes
from craft_cli.tasks.generation import MAX_NEW_TOKENS, Answer, Generation, write_answers

if TYPE_CHECKING:
    from craft_cli.training.setup import Training


def write_samples(training: Training) -> list[Answer]:
    """An answer to each of the rows that are asked, on every process.

    Each process writes its share; where the base is sharded, all write all, since none computes without the others.
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
            progress=lambda done, total: training.listener.preparing("writing answers", done, total),
        )
    if alone:
        return written
    shares = gather_object([written])
    return [shares[number % len(shares)][number // len(shares)] for number in range(len(prepared.asked))]


def forget_samples(file: Path, step: int) -> None:
    """Leave out of a file of samples what was written at evaluations after this update."""
    if file.is_file():
        lines = file.read_bytes().splitlines(keepends=True)
        write_bytes(file, b"".join(line for line in lines if line.endswith(b"\n") and json.loads(line)["step"] <= step))
