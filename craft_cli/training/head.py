"""The last layer of the head: where it starts (a linear probe, LP-FT, arXiv 2202.10054), and in which units it is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from craft_cli.config import AUTO, RunConfig
from craft_cli.data.batches import length_sorted_batches
from craft_cli.errors import ModelError
from craft_cli.tasks.inference import in_order, not_finite, predict_batches
from craft_cli.training.preparation import Prepared

MOST_ROWS = 10_000
"""More are not worth their time: the training sees all of them."""
MOST_LABELS = 1_000
"""Fitting more takes hours and gigabytes, with hardly a row of each among `MOST_ROWS`."""
FEW_ROWS = 100
"""Enough to see that it works."""


KEPT, PROBE, RANDOM = "kept", "probe", "random"
"""Where a last layer starts."""

WHY_NOT_FINITE = "check its weights, or leave out --fp16, --load-in-4bit and --load-in-8bit"
"""What to do about a model that computes no finite numbers before anything was trained."""

SOFT = 0.3
"""A training begins with this much of a probe's weights: a head of large norm keeps the features from moving (arXiv 2405.16747),
and one of small norm has far to go back."""


class Probe(NamedTuple):
    """A fitted last layer.

    Attributes:
        weight: (outputs, features).
        bias: (outputs,).
        mean: (outputs,), what it gives for the rows it was fitted on, on average.
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor

    def softened(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of outputs that differ from their mean by `SOFT` of what they did."""
        return SOFT * self.weight, self.mean + SOFT * (self.bias - self.mean)


class LastLayer:
    """The linear layer whose outputs are the model's.

    Args:
        model: with a task's head.
        head: names of the parameters that are trained in full.
        fresh: names of those that no checkpoint holds.

    Attributes:
        name: path of the layer; None where there is none.
        start: one of `KEPT`, `PROBE` and `RANDOM`; see `settle`.
    """

    def __init__(self, model: Any, head: Sequence[str], fresh: Sequence[str] = ()) -> None:
        self._model, self._fresh = model, fresh
        self._probe: Probe | None = None
        self.name: str | None = None
        self.start = RANDOM
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and f"{name}.weight" in head:
                self.name = name if module.out_features == model.config.num_labels else self.name

    def settle(self, config: RunConfig, prepared: Prepared) -> None:
        """Find out where it is to start.

        A checkpoint's head that answers the task's question already is where a training goes on. It does not fit what
        another run's adapter makes of the base. Of very many labels no probe is fitted.
        """
        if not prepared.task.trains_head:
            self.start = KEPT
            return
        answers = not self._fresh and not config.init_from and prepared.task.continues(prepared.checkpoint.config())
        if config.head_start == AUTO and answers:
            self.start = KEPT
        elif config.head_start != RANDOM and self.name is not None and self.layer.out_features <= MOST_LABELS:
            self.start = PROBE

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

    @torch.no_grad()
    def load(self, weight: Tensor, bias: Tensor) -> None:
        """Take these on; the bias only where the layer has one."""
        self.layer.weight.copy_(weight)
        if self.layer.bias is not None:
            self.layer.bias.copy_(bias)

    def start_from(self, probe: Probe) -> None:
        """Take on a probe, as it is until `begin`."""
        self._probe = probe
        self.load(probe.weight, probe.bias)

    def begin(self) -> None:
        """Before the first update: what is left of a probe's size."""
        if self._probe is not None:
            self.load(*self._probe.softened())
            self._probe = None

    @torch.no_grad()
    def draw(self, seed: int) -> None:
        """Start at random where a checkpoint's layer was loaded, as transformers starts those that none holds."""
        if self.name is None or f"{self.name}.weight" in self._fresh:
            return
        spread = getattr(self._model.config, "initializer_range", 0.02)
        weight = torch.randn(self.layer.weight.shape, generator=torch.Generator().manual_seed(seed)) * spread
        self.load(weight, torch.zeros(len(weight)))

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
) -> Probe:
    """The last layer, fitted on what the rest of the model makes of the training rows.

    Args:
        prepared: rows and task.
        last: the layer.
        batch_size: rows at once.
        device: where it computes.
        progress: called with (what, done, total).
        most: rows.

    Raises:
        ModelError: the model computes what is not finite.
    """
    gold = prepared.train.labels or []
    rows = share_of_rows(gold, most)
    features = last.features(prepared, rows, batch_size, device, progress)
    inputs = _inputs(features, prepared.checkpoint.name)

    def told(done: int, total: int) -> None:
        progress("fitting the head", done, total)

    told(0, 1)
    targets, with_bias = [gold[row] for row in rows], last.layer.bias is not None
    weight, bias = prepared.task.fit_head(features, targets, bias=with_bias, progress=told)
    told(1, 1)
    mean = bias  # (outputs,)
    if len(inputs):
        mean = weight @ inputs.to(weight.dtype).mean(dim=0) + bias
    return Probe(weight.float(), bias.float(), mean.float())


def _inputs(features: Sequence[Tensor], name: str) -> Tensor:
    """What goes into the layer (rows, features), or of all words that have a token; `features` of the others are -inf.

    Raises:
        ModelError: some are not finite.
    """
    if odd := len(not_finite(features)):
        raise ModelError(
            f"{name} gives numbers that are not finite for {odd:,} of {len(features):,} training rows, so no head can be fitted: "
            f"{WHY_NOT_FINITE}"
        )
    return torch.cat([row[~row.isneginf().all(dim=-1)] if row.ndim > 1 else row[None] for row in features])


def share_of_rows(gold: Sequence[Any], most: int) -> list[int]:
    """So many rows at most, of every label (or of low and high numbers) as many as its share; always the same ones."""
    if len(gold) <= most:
        return list(range(len(gold)))
    order = torch.randperm(len(gold), generator=torch.Generator().manual_seed(0)).tolist()
    order.sort(key=lambda row: gold[row])
    return sorted(order[int((number + 0.5) * len(gold) / most)] for number in range(most))
