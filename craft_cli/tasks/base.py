"""A kind of work: what a row means, the loss of a batch, the metrics, the answers. Everything else knows this protocol only.

A task begins as a kind alone (or as a row of `glue`), learns columns and labels as it reads tables, and is put on the head
of a model. Tasks are frozen: what they learn is in the copy that is returned.
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
"""The name of a task on the user's own data: columns and labels are found in it."""


class Task(Protocol):
    """One kind of work on one set of data."""

    @property
    def kind(self) -> str:
        """As typed after `--task-type`."""

    @property
    def name(self) -> str:
        """As typed after `--task`; `OWN` for the user's own data."""

    @property
    def auto_model(self) -> str:
        """The class of transformers that loads a model for it."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """What `measure` gives beside `loss`; the first one is what people look at."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of what the model tells apart, in the order of the gold numbers."""

    @property
    def answers(self) -> tuple[str, ...]:
        """What it can answer, for people: labels in the order of the head, or kinds of entities."""

    @property
    def text_columns(self) -> tuple[str, ...]:
        """The columns that it reads; none where the data have not said yet."""

    @property
    def home(self) -> Home:
        """Where its rows lie."""

    @property
    def stratified(self) -> bool:
        """Whether rows that are held out are to be of all labels alike."""

    @property
    def chooser(self) -> str:
        """The metric that chooses the best adapter where none is named."""

    @property
    def units(self) -> tuple[float, float]:
        """The mean of the numbers to learn, and the power of two by which a training divides them; else 0 and 1.

        Outputs in training are in these units, `scores` in those of the data; the mean loss is to be multiplied by the square.
        """

    @property
    def trains_head(self) -> bool:
        """Whether the model gets a head of its own, which is trained in full."""

    @property
    def generates(self) -> bool:
        """Whether its answers are written token by token (`prompts`), not chosen by `scores`."""

    @property
    def defaults(self) -> Mapping[str, Any]:
        """Values of the settings that nobody gave, where kinds of work differ."""

    # -- rows -----------------------------------------------------------------------------------------------------------

    @classmethod
    def recognises(cls, table: Table, source: DataSource) -> bool:
        """Whether a table of the user's own looks like rows of this kind."""

    @classmethod
    def own(cls) -> Self:
        """The task on data of the user's own, of which nothing is known yet."""

    @classmethod
    def of_record(cls, record: Mapping[str, Any], config: Any) -> Self:
        """The task an adapter was trained for (`record` and the data it names), or what a checkpoint looks like.

        Args:
            record: what `record` gave; empty for a checkpoint.
            config: of the model.
        """

    def chosen(self, source: DataSource) -> Self:
        """With the columns and other properties of the data that the user names.

        Raises:
            ConfigError: one that this kind of work does not have.
        """

    def read(self, table: Table, *, labelled: bool) -> tuple[Self, Split]:
        """A table's rows, and the task with what it has learned from them: columns, labels.

        Raises:
            DataError: a column, cell or label that cannot be used.
        """

    def reader(
        self, first: Row, origin: str, *, plain: bool, columns: Sequence[str]
    ) -> Callable[[Sequence[Row]], Split]:
        """How rows to predict for are read, judged by the first of them.

        Args:
            first: the first row.
            origin: what messages call the file.
            plain: whether rows are lines of text.
            columns: wanted by the user; as in training without.

        Raises:
            DataError: the columns are not there.
        """

    def notes(self, rows: Mapping[str, Split]) -> list[str]:
        """What looks wrong in the rows of every split before they are trained and evaluated on, a line each."""

    def for_training(self, config: RunConfig, gold: Sequence[Any]) -> Self:
        """With what a run's settings and the gold of its training rows decide: weights of labels, a threshold."""

    # -- model ----------------------------------------------------------------------------------------------------------

    def on_head(self, config: Any, *, strict: bool = True) -> Self:
        """For a model with this configuration: where its head names the same labels, in their order.

        Raises:
            DataError: it names others (without `strict` the head is to be trained for ours).
        """

    def continues(self, config: Any) -> bool:
        """Whether a trained head of a checkpoint with this configuration answers what this task asks."""

    def model_options(self) -> dict[str, Any]:
        """What `from_pretrained` needs to know for a head of this task, in the order of the head."""

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
        """Where answers are written: the tokens of each row that are to be answered."""

    def in_chat(self, tokenizer: Any) -> tuple[Self, bool]:
        """Where answers are written: as a chat asks for them, and whether they answer conversations; else they continue texts."""

    def ends(self, tokenizer: Any) -> list[int]:
        """Where answers are written: the tokens that end one."""

    def example(self, encoded: Encoded, tokenizer: Any) -> list[tuple[str, bool]]:
        """One row as parts of its text, each with whether it is learned; empty where a row is learned whole."""

    def loss(self, model: Any, batch: Batch) -> Tensor:
        """The loss of a batch, summed over its targets; calls the model once."""

    def scores(self, model: Any, batch: Batch) -> list[Tensor]:
        """For each row what `measure` and `records` need, float32 on the CPU, in the order of `labels`."""

    def in_own_order(self) -> Self:
        """The same for what a model gives in the place of its head's outputs: `scores` leaves its order alone."""

    def fit_head(
        self, features: Sequence[Tensor], gold: Sequence[Any], *, bias: bool, progress: Progress
    ) -> tuple[Tensor, Tensor]:
        """A linear probe for the last layer of the head, in the order of the head.

        Args:
            features: for each row what goes into that layer, as `scores` gives it.
            gold: of each row.
            bias: whether the layer has one.
            progress: called with (fits done, fits in all).

        Returns:
            Its weight (outputs, features) and its bias (outputs,).
        """

    # -- results --------------------------------------------------------------------------------------------------------

    def settled(self, scores: Sequence[Tensor], gold: Sequence[Any]) -> Self:
        """With what is found on the validation rows, such as a threshold."""

    def measure(self, scores: Sequence[Tensor], gold: Sequence[Any]) -> dict[str, float]:
        """The metrics and the mean `loss`; finite numbers but for errors (`tasks.metrics.lower_is_better`) of what is not."""

    def baseline(self, train: Sequence[Any], gold: Sequence[Any]) -> dict[str, float]:
        """The metrics of always giving the same answer, the best one on the training rows."""

    def tables(self, scores: Sequence[Tensor], gold: Sequence[Any]) -> dict[str, Any]:
        """`by_label`, `confusion` and `ece`, as far as they make sense."""

    def calibration(self, scores: Sequence[Tensor], gold: Sequence[Any]) -> float | None:
        """The expected calibration error; None where nothing is given a probability."""

    def temperature(self, scores: Sequence[Tensor], gold: Sequence[Any]) -> float:
        """What the logits are to be divided by to make the mean loss smallest; 1.0 where nothing is given a probability."""

    def mistakes(self, scores: Sequence[Tensor], split: Split) -> Iterator[tuple[float, dict[str, Any]]]:
        """For each row with a wrong answer how sure it was, or how far off, and the row.

        A row has its `place`, `label`, `prediction` and `texts`, whatever else tells of the mistake, and `confidence` or
        `error`.
        """

    def remarks(self, tables: Mapping[str, Any], train: Sequence[Any], *, weighted: bool) -> list[str]:
        """What the user should know of `tables`, and what can be done.

        Args:
            tables: of the validation rows.
            train: gold of the training rows.
            weighted: whether labels are weighed already.
        """

    def records(self, scores: Sequence[Tensor], split: Split) -> Iterator[dict[str, Any]]:
        """For each row its `prediction` and more, and its `label` where the gold is known."""

    # -- on disk --------------------------------------------------------------------------------------------------------

    def record(self) -> dict[str, Any]:
        """What an adapter keeps of the task, as JSON."""

    def columns(self) -> dict[str, Any]:
        """Which columns were read, by the names of the settings."""

    def settings(self) -> dict[str, Any]:
        """The settings that repeat what was found in the user's own data."""
