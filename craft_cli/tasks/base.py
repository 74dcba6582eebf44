"""Tasks: which columns, which labels, which metrics. A GLUE task is a row of the table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

SINGLE, MULTI, REGRESSION = PROBLEM_TYPES = (
    "single_label_classification",
    "multi_label_classification",
    "regression",
)
"""As `transformers` names them in a model's configuration."""

NUMBER = ("score",)
"""The one output of a regression, where classifiers have the names of their labels."""


@dataclass(frozen=True)
class Task:
    """What is to be told of one text or of a pair.

    Attributes:
        name: as typed after `--task`; `own` for the user's own data.
        text_columns: one or two.
        labels: the names, in the order of the label numbers; `NUMBER` for a regression.
        metrics: what is reported; the first one chooses the best adapter.
        problem_type: one of `PROBLEM_TYPES`.
        label_column: the gold label, as number or as name (or several, or a real number).
        label_separator: what stands between the labels of one cell, where several apply.
        hub: data set on the hub, with its configuration.
        sample: folder below `craft_cli/samples`, for data that ships with craft.
        train: split to train on; None for a task that is only evaluated.
        validation: splits to evaluate on; the first one chooses the best adapter.
        server: for each of the GLUE server's files its split and its rows.
        server_numbers: whether the server takes label numbers, not names.
    """

    name: str
    text_columns: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ("accuracy",)
    problem_type: str = SINGLE
    label_column: str = "label"
    label_separator: str | None = None
    hub: tuple[str, str] | None = None
    sample: str | None = None
    train: str | None = "train"
    validation: tuple[str, ...] = ("validation",)
    server: Mapping[str, tuple[str, int]] | None = None
    server_numbers: bool = True


OWN = Task("own", problem_type="")
"""The user's own data: columns, labels and the kind of problem are found in it."""

OWN_METRICS = {SINGLE: ("accuracy", "f1"), MULTI: ("f1_micro", "f1_macro"), REGRESSION: ("pearson", "spearman")}
