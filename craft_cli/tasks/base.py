"""The task protocol: reading rows, the loss of a batch, metrics and answers. All other code uses only this protocol.

A task starts from its type alone (or from a row of `glue`), learns columns and labels when it reads tables, and is then
matched to the head of a model. Tasks are frozen: methods that learn something return a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from craft_cli.data.sources import DataSource, Home, Split

if TYPE_CHECKING:
    from typing import Self

    from craft_cli.config import RunConfig
    from craft_cli.data.batches import Batch
    from craft_cli.data.readers import Row
    from craft_cli.data.tables import Table
    from craft_cli.data.tokens import Encoded
    from craft_cli.tasks.probe import Progress

OWN = "own"
"""Name of a task on the user's own data, where columns and labels are detected."""


class Task(Protocol):
    """A task type on one dataset."""

    @property
    def kind(self) -> str:
        """The value of `--task-type`."""

    @property
    def name(self) -> str:
        """The value of `--task`; `OWN` for the user's own data."""

    @property
    def auto_model(self) -> str:
        """The transformers class that loads a model for the task."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics that `measure` returns besides `loss`, the main metric first."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Label names, in the order of the gold numbers."""

    @property
    def answers(self) -> tuple[str, ...]:
        """Possible answers, for display: labels in the order of the head, or entity types."""

    @property
    def text_columns(self) -> tuple[str, ...]:
        """The columns to read; empty until a table has been read."""

    @property
    def home(self) -> Home:
        """The location of its rows."""

    @property
    def stratified(self) -> bool:
        """Whether to stratify held-out rows by label."""

    @property
    def chooser(self) -> str:
        """The default metric for choosing the best adapter."""

    @property
    def units(self) -> tuple[float, float]:
        """Offset and scale of regression targets: their mean and a power of two; 0 and 1 for other tasks.

        Training outputs are in these units, `scores` in those of the data. Multiply the mean loss by the squared scale.
        """

    @property
    def trains_head(self) -> bool:
        """Whether the model gets a task head, which is trained in full."""

    @property
    def generates(self) -> bool:
        """Whether answers are generated (`prompts`) rather than computed from `scores`."""

    @property
    def defaults(self) -> Mapping[str, Any]:
        """Task-specific defaults of unset settings."""

    # -- rows -----------------------------------------------------------------------------------------------------------

    @classmethod
    def recognises(cls, table: Table, source: DataSource) -> bool:
        """Whether a table of the user's own data matches this task type."""

    @classmethod
    def own(cls) -> Self:
        """The task on the user's own data, before any table is read."""

    @classmethod
    def of_record(cls, record: Mapping[str, Any], config: Any) -> Self:
        """The task of an adapter (from its `record`), or of a base checkpoint (from its configuration).

        Args:
            record: the result of `record`; empty for a base checkpoint.
            config: the model's configuration.
        """

    def chosen(self, source: DataSource) -> Self:
        """A copy with the columns and other data properties that the user gave.

        Raises:
            ConfigError: the task type does not have this property.
        """

    def read(self, table: Table, *, labelled: bool) -> tuple[Self, Split]:
        """Read the rows of a table, and return the task with the columns and labels learned from them.

        Raises:
            DataError: a column, cell or label is invalid.
        """

    def reader(
        self, first: Row, origin: str, *, plain: bool, columns: Sequence[str]
    ) -> Callable[[Sequence[Row]], Split]:
        """Return a reader of rows to predict, chosen from the first row.

        Args:
            first: the first row.
            origin: name of the file in messages.
            plain: whether rows are lines of text.
            columns: columns that the user gave. Default: those of the training.

        Raises:
            DataError: the columns are missing.
        """

    def notes(self, rows: Mapping[str, Split]) -> list[str]:
        """Suspicious findings in the rows of every split, one line per finding, before training."""

    def for_training(self, config: RunConfig, gold: Sequence[Any]) -> Self:
        """A copy with the class weights and threshold that follow from the settings and the training labels."""

    # -- model ----------------------------------------------------------------------------------------------------------

    def on_head(self, config: Any, *, strict: bool = True) -> Self:
        """A copy for a model with this configuration: labels in the order of its head, if the head names them.

        Raises:
            DataError: the head has other labels and `strict` is true. Otherwise a new head is trained.
        """

    def continues(self, config: Any) -> bool:
        """Whether the trained head of a base checkpoint with this configuration fits this task."""

    def model_options(self) -> dict[str, Any]:
        """Arguments of `from_pretrained` for a head of this task, in the order of the head."""

    def encode(
        self,
        split: Split,
        tokenizer: Any,
        limit: int,
        progress: Callable[[int, int], None] = ...,
        cache: Path | None = None,
    ) -> Encoded:
        """Token ids, gold and targets."""

    def prompts(self, split: Split, tokenizer: Any) -> list[list[int]]:
        """For generated answers: the prompt tokens of each row."""

    def in_chat(self, tokenizer: Any) -> tuple[Self, bool]:
        """Where answers are written: as a chat asks for them, and whether they answer conversations; else they continue texts."""

    def ends(self, tokenizer: Any) -> list[int]:
        """For generated answers: the tokens that end an answer."""

    def example(self, encoded: Encoded, tokenizer: Any) -> list[tuple[str, bool]]:
        """One row as parts of its text, each with whether it is trained on; empty if all of it is."""

    def loss(self, model: Any, batch: Batch) -> Tensor:
        """The loss of a batch, summed over its targets; calls the model once."""

    def scores(self, model: Any, batch: Batch) -> list[Tensor]:
        """The scores of each row for `measure` and `records`, float32 on the CPU, in the order of `labels`."""

    def in_own_order(self) -> Self:
        """The same for a model without its head's last layer: `scores` keeps the order of the outputs."""

    def fit_head(
        self, features: Sequence[Tensor], gold: Sequence[Any], *, bias: bool, progress: Progress
    ) -> tuple[Tensor, Tensor]:
        """Fit a linear probe for the last layer of the head, in the order of the head.

        Args:
            features: the inputs of that layer for each row, in the form of `scores`.
            gold: the gold of each row.
            bias: whether the layer has a bias.
            progress: called with (fits done, total fits).

        Returns:
            The weight (outputs, features) and the bias (outputs,).
        """

    # -- results --------------------------------------------------------------------------------------------------------

    def settled(self, scores: Sequence[Tensor], gold: Sequence[Any]) -> Self:
        """A copy with values chosen on the validation rows, such as a threshold."""

    def measure(self, scores: Sequence[Tensor], gold: Sequence[Any]) -> dict[str, float]:
        """The metrics and the mean `loss`. All are finite, except errors (`tasks.metrics.lower_is_better`) of non-finite scores."""

    def baseline(self, train: Sequence[Any], gold: Sequence[Any]) -> dict[str, float]:
        """The metrics of the constant answer that is best on the training rows."""

    def tables(self, scores: Sequence[Tensor], gold: Sequence[Any]) -> dict[str, Any]:
        """`by_label`, `confusion` and `ece`, where they apply."""

    def calibration(self, scores: Sequence[Tensor], gold: Sequence[Any]) -> float | None:
        """The expected calibration error; None for a task without probabilities."""

    def temperature(self, scores: Sequence[Tensor], gold: Sequence[Any]) -> float:
        """The temperature that minimizes the mean loss of logits / temperature; 1.0 for a task without probabilities."""

    def mistakes(self, scores: Sequence[Tensor], split: Split) -> Iterator[tuple[float, dict[str, Any]]]:
        """For each wrong answer, its confidence or error, and the row.

        A row has `place`, `label`, `prediction` and `texts`, `confidence` or `error`, and further details of the mistake.
        """

    def remarks(self, tables: Mapping[str, Any], train: Sequence[Any], *, weighted: bool) -> list[str]:
        """Advice for the user about the results in `tables`.

        Args:
            tables: tables of the validation rows.
            train: gold of the training rows.
            weighted: whether class weights are already in use.
        """

    def records(self, scores: Sequence[Tensor], split: Split) -> Iterator[dict[str, Any]]:
        """For each row its `prediction` and further fields, with its `label` if the gold is known."""

    # -- on disk --------------------------------------------------------------------------------------------------------

    def record(self) -> dict[str, Any]:
        """The JSON record of the task that is saved with an adapter."""

    def columns(self) -> dict[str, Any]:
        """The columns that were read, by setting name."""

    def settings(self) -> dict[str, Any]:
        """The settings that reproduce what was detected in the user's own data."""
