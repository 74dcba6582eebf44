"""The last layer of the head: its initialization (a linear probe, LP-FT, arXiv 2202.10054) and its units."""

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
"""Maximum rows for the probe; more do not improve it enough."""
MOST_LABELS = 1_000
"""Maximum labels for a probe: more take hours and gigabytes, with hardly one row per label among `MOST_ROWS`."""
FEW_ROWS = 100
"""Rows for the probe of a dry run."""


KEPT, PROBE, RANDOM = "kept", "probe", "random"
"""Initializations of the last layer."""

WHY_NOT_FINITE = "check its weights, or remove --fp16, --load-in-4bit and --load-in-8bit"
"""Advice for a model with non-finite outputs before training."""

SOFT = 0.3
"""Scale of a probe's weights at the start of training: a head with a large norm keeps the features from changing
(arXiv 2405.16747), and one with a small norm has to grow back."""


class Probe(NamedTuple):
    """A fitted last layer.

    Attributes:
        weight: (outputs, features).
        bias: (outputs,).
        mean: (outputs,), its mean output on the rows it was fitted on.
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor

    def softened(self) -> tuple[Tensor, Tensor]:
        """Weight and bias with the deviation of the outputs from their mean scaled by `SOFT`."""
        return SOFT * self.weight, self.mean + SOFT * (self.bias - self.mean)


class LastLayer:
    """The linear layer that computes the model's outputs.

    Args:
        model: a model with a task head.
        head: names of the parameters that are trained in full.
        fresh: names of the parameters missing from the base checkpoint.

    Attributes:
        name: path of the layer; None if there is none.
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
        """Choose the initialization.

        A checkpoint's head that already fits the task is kept, unless the adapter is initialized from another run, which it
        would not match. With very many labels, no probe is fitted.
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
        """The layer, which must exist."""
        layer = self._model.get_submodule(self.name)
        assert isinstance(layer, nn.Linear)
        return layer

    def features(
        self,
        prepared: Prepared,
        rows: Sequence[int],
        batch_size: int,
        device: torch.device,
        progress: Callable[[str, int, int], None],
    ) -> list[Tensor]:
        """The inputs of the layer for some training rows, in the form of the task's `scores`.

        Args:
            prepared: rows and task.
            rows: numbers of the training rows.
            batch_size: rows per batch.
            device: device for the computation.
            progress: called with (what, done, total).
        """
        part = prepared.train.only(rows)
        batches = length_sorted_batches(part, batch_size)
        layer = self.layer
        self._model.set_submodule(self.name, nn.Identity())
        try:
            outputs = predict_batches(
                self._model, prepared.task.in_own_order(), part, batches, prepared.tokenizer, device,
                lambda done, total: progress("computing features", done, total),
            )  # fmt: skip
        finally:
            self._model.set_submodule(self.name, layer)
        return in_order(outputs, batches, len(part))

    @torch.no_grad()
    def load(self, weight: Tensor, bias: Tensor) -> None:
        """Set the weights; the bias only if the layer has one."""
        self.layer.weight.copy_(weight)
        if self.layer.bias is not None:
            self.layer.bias.copy_(bias)

    def start_from(self, probe: Probe) -> None:
        """Set the weights of a probe, unscaled until `begin`."""
        self._probe = probe
        self.load(probe.weight, probe.bias)

    def begin(self) -> None:
        """Scale a probe down before the first update."""
        if self._probe is not None:
            self.load(*self._probe.softened())
            self._probe = None

    @torch.no_grad()
    def draw(self, seed: int) -> None:
        """Initialize a loaded layer at random, as transformers does for missing layers."""
        if self.name is None or f"{self.name}.weight" in self._fresh:
            return
        spread = getattr(self._model.config, "initializer_range", 0.02)
        weight = torch.randn(self.layer.weight.shape, generator=torch.Generator().manual_seed(seed)) * spread
        self.load(weight, torch.zeros(len(weight)))

    @torch.no_grad()
    def start_at(self, mean: float) -> None:
        """Initialize the bias, if there is one, to this mean of the outputs."""
        if mean and self.name is not None and self.layer.bias is not None:
            self.layer.bias.fill_(mean)

    @torch.no_grad()
    def multiply(self, factor: float) -> None:
        """Scale the outputs; a power of two is exact."""
        if factor != 1.0:
            for parameter in self.layer.parameters():
                parameter.mul_(factor)

    @contextmanager
    def multiplied(self, factor: float) -> Iterator[None]:
        """Scale the outputs inside the block, and restore them bit for bit afterwards."""
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
    """Fit the last layer on the model's features of the training rows.

    Args:
        prepared: rows and task.
        last: the layer.
        batch_size: rows per batch.
        device: device for the computation.
        progress: called with (what, done, total).
        most: maximum number of rows.

    Raises:
        ModelError: the features are not finite.
    """
    gold = prepared.train.labels or []
    rows = share_of_rows(gold, most)
    features = last.features(prepared, rows, batch_size, device, progress)
    inputs = _inputs(features, prepared.checkpoint.name)

    def report(done: int, total: int) -> None:
        progress("fitting the head", done, total)

    report(0, 1)
    targets, with_bias = [gold[row] for row in rows], last.layer.bias is not None
    weight, bias = prepared.task.fit_head(features, targets, bias=with_bias, progress=report)
    report(1, 1)
    mean = bias  # (outputs,)
    if len(inputs):
        mean = weight @ inputs.to(weight.dtype).mean(dim=0) + bias
    return Probe(weight.float(), bias.float(), mean.float())


def _inputs(features: Sequence[Tensor], name: str) -> Tensor:
    """The inputs of the layer (rows, features), or of all words with a token; words without one have -inf.

    Raises:
        ModelError: some inputs are not finite.
    """
    if odd := len(not_finite(features)):
        raise ModelError(
            f"{name} computes non-finite values for {odd:,} of {len(features):,} training rows, so the head cannot be fitted: "
            f"{WHY_NOT_FINITE}"
        )
    return torch.cat([row[~row.isneginf().all(dim=-1)] if row.ndim > 1 else row[None] for row in features])


def share_of_rows(gold: Sequence[Any], most: int) -> list[int]:
    """At most this many rows, stratified by label (or by the size of the target), always the same ones."""
    if len(gold) <= most:
        return list(range(len(gold)))
    order = torch.randperm(len(gold), generator=torch.Generator().manual_seed(0)).tolist()
    order.sort(key=lambda row: gold[row])
    return sorted(order[int((number + 0.5) * len(gold) / most)] for number in range(most))
