"""The timetable of a run: the rows of each update, and when to evaluate and save.

It depends only on the settings and the number of updates made, not on the number of processes, so an interrupted training
resumes from that number alone. The rows of an update are fixed by seed and epoch. N processes with batch B share the rows
that one process with batch N B would take, so they compute the same update.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from craft_cli.config import AUTO, RunConfig
from craft_cli.data.batches import plan_epoch

EPOCHS = 3
"""Epochs of a built-in task or a language model, and minimum epochs for the user's own data."""
ENOUGH_UPDATES = 1000
"""Target number of updates for the user's own data, limited by `MOST_EPOCHS`."""
MOST_EPOCHS = 20


def length_settled(config: RunConfig, rows: int, update_size: int, *, by_rows: bool) -> RunConfig:
    """Replace `num_train_epochs: auto` by a number of epochs, with early stopping if the number is an upper bound.

    Args:
        config: settings of the run.
        rows: number of training rows.
        update_size: rows per update.
        by_rows: whether the number of rows decides; a built-in task is trained as in its papers.
    """
    if config.num_train_epochs != AUTO:
        return config
    if not by_rows:
        return replace(config, num_train_epochs=EPOCHS)
    in_epoch = math.ceil(rows / update_size)
    epochs = min(max(math.ceil(ENOUGH_UPDATES / in_epoch), EPOCHS), MOST_EPOCHS)
    patience = config.early_stopping_patience
    if patience is None and config.eval_strategy == "epoch":
        patience = max(epochs // 2, 2)  # evaluations on few rows are noisy, and a scaled-down head starts slowly
    return replace(config, num_train_epochs=float(epochs), early_stopping_patience=patience)


class Timetable:
    """When to evaluate and save, and the rows of each update.

    Args:
        config: settings of the run.
        lengths: tokens of each row.
        update_size: rows of one update, over all processes and accumulated batches.

    Attributes:
        total: updates of the whole run.
    """

    def __init__(self, config: RunConfig, lengths: Sequence[int], update_size: int) -> None:
        self._config, self._lengths, self._update_size = config, lengths, update_size
        self._in_epoch = math.ceil(len(lengths) / update_size)
        assert not isinstance(config.num_train_epochs, str)  # see `length_settled`
        total = math.ceil(config.num_train_epochs * self._in_epoch)
        self.total = 1 if config.dry_run else min(total, config.max_steps or total)

    def epoch(self, step: int) -> float:
        """Passes over the data after this many updates."""
        return step / self._in_epoch

    def updates(self, after: int) -> Iterator[list[int]]:
        """The rows of every update that follows the first `after`."""
        for epoch in range(after // self._in_epoch, math.ceil(self.total / self._in_epoch)):
            plan = plan_epoch(self._lengths, self._update_size, seed=self._config.seed, epoch=epoch)
            done = max(after - epoch * self._in_epoch, 0)
            yield from plan[done : self.total - epoch * self._in_epoch]

    @property
    def evaluations(self) -> int:
        """The number of evaluations after the first update and before the last."""
        return sum(map(self.evaluates, range(1, self.total)))

    def evaluates(self, step: int) -> bool:
        """Whether to evaluate after this update; at update 0 the evaluation shows the starting point."""
        return not self._config.dry_run and self._due(step, self._config.eval_strategy, self._config.eval_steps)

    def saves(self, step: int) -> bool:
        """Whether to save a checkpoint after this update (and its evaluation)."""
        due = step > 0 and self._due(step, self._config.save_strategy, self._config.save_steps)
        return due and not self._config.dry_run

    def _due(self, step: int, strategy: str, steps: int | None) -> bool:
        if strategy == "no":
            return False
        return step == self.total or step % (steps or self._in_epoch) == 0


def move(schedule: Any, step: int) -> None:
    """Set a schedule to its state after this many updates, which alone determine the rate."""
    schedule.last_epoch = step
    for group, base, factor in zip(
        schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True
    ):
        group["lr"] = base * factor(step)
    schedule._last_lr = [group["lr"] for group in schedule.optimizer.param_groups]
