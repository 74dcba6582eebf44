"""The order of the data and of the run: which rows make which update, when it evaluates, when it saves.

All of it is a function of the settings and of the number of updates made, whatever the number of processes, so a training
that was cut goes on from that number alone. The rows of one update are fixed by seed and epoch; N processes with batch B
share out what one process with batch N B would take, so they compute the same update.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from craft_cli.config import AUTO, RunConfig
from craft_cli.data.batches import plan_epoch

EPOCHS = 3
"""Of a known task, and the fewest of own data."""
ENOUGH_UPDATES = 1000
"""What own data get, as far as that takes no more epochs than `MOST_EPOCHS`."""
MOST_EPOCHS = 20


def length_settled(config: RunConfig, rows: int, update_size: int, *, own: bool) -> RunConfig:
    """The settings with a number of epochs, and with early stopping where that number is a bound, where it is `auto`.

    Args:
        config: of the run.
        rows: to train on.
        update_size: rows of one update.
        own: whether they are the user's own; a known task is trained as its papers do.
    """
    if config.num_train_epochs != AUTO:
        return config
    if not own:
        return replace(config, num_train_epochs=EPOCHS)
    in_epoch = math.ceil(rows / update_size)
    epochs = min(max(math.ceil(ENOUGH_UPDATES / in_epoch), EPOCHS), MOST_EPOCHS)
    patience = config.early_stopping_patience
    if patience is None and config.eval_strategy == "epoch":
        patience = max(epochs // 2, 2)  # on few rows an evaluation says little, and a softened head starts slowly
    return replace(config, num_train_epochs=float(epochs), early_stopping_patience=patience)


class Timetable:
    """What happens at which update.

    Args:
        config: of the run.
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
        """How many there are after the first update and before the last."""
        return sum(map(self.evaluates, range(1, self.total)))

    def evaluates(self, step: int) -> bool:
        """Whether an evaluation follows this update; before the first one it shows what training begins with."""
        return not self._config.dry_run and self._due(step, self._config.eval_strategy, self._config.eval_steps)

    def saves(self, step: int) -> bool:
        """Whether a checkpoint is written after this update (and its evaluation)."""
        due = step > 0 and self._due(step, self._config.save_strategy, self._config.save_steps)
        return due and not self._config.dry_run

    def _due(self, step: int, strategy: str, steps: int | None) -> bool:
        if strategy == "no":
            return False
        return step == self.total or step % (steps or self._in_epoch) == 0


def move(schedule: Any, step: int) -> None:
    """Set a schedule to where it is after this many updates; the rate is a function of nothing else."""
    schedule.last_epoch = step
    for group, base, factor in zip(
        schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True
    ):
        group["lr"] = base * factor(step)
    schedule._last_lr = [group["lr"] for group in schedule.optimizer.param_groups]
