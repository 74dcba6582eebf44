"""The last layer of the head: where it starts (as a linear probe, LP-FT, arXiv 2202.10054), and in which units it is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from craft_cli.data.batches import length_sorted_batches
from craft_cli.tasks.base import Task
from craft_cli.tasks.inference import in_order, predict_batches
from craft_cli.training.preparation import Prepared

MOST_ROWS = 10_000
"""More are not worth their time: the training sees all of them."""
FEW_ROWS = 100
"""Enough to see that it works."""


class LastLayer:
    """The linear layer whose outputs are the model's.

    Args:
        model: with a task's head.
        head: names of the parameters that are trained in full.

    Attributes:
        name: path of the layer; None where there is none.
    """

    def __init__(self, model: Any, head: Sequence[str]) -> None:
        self._model = model
        self.name: str | None = None
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and f"{name}.weight" in head:
                self.name = name if module.out_features == model.config.num_labels else self.name

    @property
    def layer(self) -> nn.Linear:
        """The layer itself; there must be one."""
        found = self._model.get_submodule(self.name)
        assert isinstance(found, nn.Linear)
        return found

    def features(
        self,
        prepared: Prepared,
        rows: Sequence[int],
        batch_size: int,
        device: torch.device,
        progress: Callable[[str, int, int], None],
    ) -> list[Tensor]:
        """What goes into the layer, for each of these training rows as the task's `scores` are.

        Args:
            prepared: rows and task.
            rows: of the training rows.
            batch_size: rows at once.
            device: where it computes.
            progress: called with (what, done, total).
        """
        part = prepared.train.only(rows)
        batches = length_sorted_batches(part, batch_size)
        layer = self.layer
        self._model.set_submodule(self.name, nn.Identity())
        try:
            outputs = predict_batches(
                self._model, prepared.task.in_own_order(), part, batches, prepared.tokenizer, device,
                lambda done, total: progress("features of the head", done, total),
            )  # fmt: skip
        finally:
            self._model.set_submodule(self.name, layer)
        return in_order(outputs, batches, len(part))

    def fitted(self, task: Task, features: Sequence[Tensor], gold: Sequence[Any]) -> dict[str, Tensor]:
        """The layer as a linear probe, by the names of its parameters.

        Args:
            task: that fits it.
            features: for each row what goes into the layer.
            gold: of each row.
        """
        weight, bias = task.fit_head(features, gold, bias=self.layer.bias is not None)
        found = {f"{self.name}.weight": weight.float()}
        return found if self.layer.bias is None else found | {f"{self.name}.bias": bias.float()}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Start from these."""
        for name, tensor in tensors.items():
            self._model.get_parameter(name).copy_(tensor)

    @torch.no_grad()
    def start_at(self, mean: float) -> None:
        """Start from outputs around this number, where there is a bias."""
        if mean and self.name is not None and self.layer.bias is not None:
            self.layer.bias.fill_(mean)

    @torch.no_grad()
    def multiply(self, factor: float) -> None:
        """Make the outputs so many times as large; by a power of two exactly."""
        if factor != 1.0:
            for parameter in self.layer.parameters():
                parameter.mul_(factor)

    @contextmanager
    def multiplied(self, factor: float) -> Iterator[None]:
        """Inside, the outputs are so many times as large; behind it they are bit for bit what they were."""
        if factor == 1.0:
            yield
            return
        former = [parameter.detach().clone() for parameter in self.layer.parameters()]
        self.multiply(factor)
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(self.layer.parameters(), former, strict=True):
                    parameter.copy_(value)


def probe(
    prepared: Prepared,
    last: LastLayer,
    batch_size: int,
    device: torch.device,
    progress: Callable[[str, int, int], None],
    most: int = MOST_ROWS,
) -> dict[str, Tensor]:
    """The last layer, fitted on what the rest of the model makes of the training rows, by the names of its parameters."""
    gold = prepared.train.labels or []
    rows = share_of_rows(gold, most)
    features = last.features(prepared, rows, batch_size, device, progress)
    progress("fitting the head", 0, 1)
    found = last.fitted(prepared.task, features, [gold[row] for row in rows])
    progress("fitting the head", 1, 1)
    return found


def share_of_rows(gold: Sequence[Any], most: int) -> list[int]:
    """So many rows at most, of every label (or of low and high numbers) as many as its share; always the same ones."""
    if len(gold) <= most:
        return list(range(len(gold)))
    order = torch.randperm(len(gold), generator=torch.Generator().manual_seed(0)).tolist()
    order.sort(key=lambda row: gold[row])
    return sorted(order[int((number + 0.5) * len(gold) / most)] for number in range(most))
