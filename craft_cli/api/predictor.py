"""Load a trained model for evaluation and prediction."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from craft_cli.config import MERGED_KEY
from craft_cli.data.batches import length_sorted_batches
from craft_cli.data.sources import DataSource, Split
from craft_cli.data.tokens import Encoded
from craft_cli.errors import ConfigError, ModelError
from craft_cli.methods.adapter_folder import read_record
from craft_cli.methods.attach import load
from craft_cli.methods.model_adapter import ModelAdapter
from craft_cli.models.checkpoint import Checkpoint
from craft_cli.models.hub import resolve
from craft_cli.models.loading import load_model, load_tokenizer, stored_in
from craft_cli.models.tables import agree_on_padding, tables_of
from craft_cli.tasks import kind_of_model
from craft_cli.tasks.base import OWN, Task
from craft_cli.tasks.generation import Answer, Generation, write_answers
from craft_cli.tasks.inference import in_order, not_finite, predict_batches
from craft_cli.training.find import find_run
from craft_cli.training.run import find_adapter


@dataclass
class Predictor:
    """A trained model, ready to predict.

    Attributes:
        name: run, adapter or checkpoint, as given.
        model: on its device.
        tokenizer: the base's.
        device: where it computes.
        task: what it was trained for; of a checkpoint, what its head looks like.
        record: what it was trained on, where that is known (runs and adapters).
        adapter: on the model; None where it is a checkpoint.
    """

    name: str
    model: Any
    tokenizer: Any
    device: torch.device
    task: Task
    record: Mapping[str, Any]
    adapter: ModelAdapter | None = None

    def source(self, given: DataSource) -> DataSource:
        """The data source of its training, overridden by the given source."""
        trained = self.record.get("data")
        known = DataSource.of(trained) if trained else DataSource()
        if given.task and given.task != known.task:
            known = DataSource()
        if given.data_dir or given.validation_file or given.dataset_name:
            known = replace(
                known,
                data_dir=None,
                train_file=None,
                validation_file=None,
                dataset_name=None,
                validation_share=None,
                held_out=None,
            )
        source = replace(known, **{name: value for name, value in asdict(given).items() if value is not None})
        if not source.given:
            raise ConfigError(f"{self.name}: no data to evaluate on; pass --task, --data-dir or --validation-file")
        return source

    def encode(self, split: Split, task: Task, max_seq_length: int | None = None) -> Encoded:
        """Tokenize rows; the default length is that of the training.

        Raises:
            ConfigError: the task type differs from that of the training.
        """
        if task.kind != self.task.kind:
            kind = f"and {task.name} is" if task.name != OWN else "not"
            raise ConfigError(f"{self.name} is for {self.task.kind}, {kind} {task.kind}")
        tables = tables_of(self.model, self.name)
        limit = int(max_seq_length or self.record.get("max_seq_length") or task.defaults["max_seq_length"])
        encoded = task.encode(split, self.tokenizer, tables.limit(limit))
        tables.check(encoded.features, self.tokenizer, split.place_of)
        return encoded

    def write(
        self,
        split: Split,
        task: Task,
        settings: Generation,
        batch_size: int | None = None,
        progress: Callable[[int, int], None] = lambda done, total: None,
        streamer: Any = None,
    ) -> list[Answer]:
        """Generate answers to the rows, in order."""
        prompts = task.prompts(split, self.tokenizer)
        tables_of(self.model, self.name).check([{"input_ids": ids} for ids in prompts], self.tokenizer, split.place_of)
        size = batch_size or task.defaults["per_device_eval_batch_size"]
        return write_answers(
            self.model, self.tokenizer, prompts, task.ends(self.tokenizer), settings, batch_size=size, progress=progress,
            streamer=streamer,
        )  # fmt: skip

    def scores(
        self,
        encoded: Encoded,
        task: Task,
        batch_size: int | None,
        progress: Callable[[int, int], None] = lambda done, total: None,
        place: Callable[[int], str] = "row {}".format,
    ) -> list[Tensor]:
        """Compute the scores of all rows, in order, for a task with the same labels.

        Raises:
            ModelError: some scores are not finite.
        """
        fitted = task.on_head(self.model.config)
        batches = length_sorted_batches(encoded, batch_size or task.defaults["per_device_eval_batch_size"])
        outputs = predict_batches(self.model, fitted, encoded, batches, self.tokenizer, self.device, progress)
        scores = in_order(outputs, batches, len(encoded))
        if odd := not_finite(scores):
            raise ModelError(
                f"{place(odd[0])}: {self.name} computes non-finite values for {len(odd):,} of "
                f"{len(scores):,} rows: check the weights of its base, or train it again with a lower --learning-rate"
            )
        return scores


def load_predictor(
    path: str | Path | None = None,
    *,
    use_cpu: bool = False,
    trust_remote_code: bool = False,
    allow_other_base: bool = False,
) -> Predictor:
    """Load a run, an adapter, a base checkpoint or a Hub id.

    Args:
        path: path or Hub id. Default: the latest run.
        use_cpu: use the CPU even if a GPU is available.
        trust_remote_code: run Python code from the model's repository.
        allow_other_base: accept a base that has changed since the training.

    Raises:
        CraftError: the model is missing, damaged, or has no trained head.
    """
    found = find_run(None if path is None else str(path))
    adapter_path = find_adapter(found)
    record: Mapping[str, Any] = {}
    adapter: ModelAdapter | None = None
    device = torch.device("cuda" if torch.cuda.is_available() and not use_cpu else "cpu")
    if adapter_path:
        record = read_record(adapter_path)
        kind = kind_of_model(record.get("training", {}), [record["model"]["architecture"]], strict=True)
        model, adapter, checkpoint = load_adapted(
            adapter_path,
            lambda base: _dtype(base, kind, device),
            trust_remote_code=trust_remote_code,
            allow_other_base=allow_other_base,
        )
        record = adapter.training_record
    else:
        checkpoint = resolve(str(path or found), trust_remote_code=trust_remote_code)
        kind = kind_of_model({}, checkpoint.config().architectures)
        model, fresh = load_model(checkpoint, str(kind.auto_model), dtype=_dtype(checkpoint, kind, device))
        record = merged_record(model.config)
        if fresh:
            raise ConfigError(f"{found} has no trained head ({', '.join(fresh)} would be random); train it first")
    tokenizer = load_tokenizer(checkpoint)
    agree_on_padding(model, tokenizer)
    task = kind.of_record(record, model.config)
    return Predictor(str(path or found), model.to(device), tokenizer, device, task, record, adapter)


def _dtype(checkpoint: Checkpoint, kind: Any, device: torch.device) -> torch.dtype:
    """float32; on a GPU, the half precision that a language model is stored in: float32 needs twice the memory and more time."""
    stored = None if kind.trains_head or device.type == "cpu" else stored_in(checkpoint)
    return stored if stored in (torch.bfloat16, torch.float16) else torch.float32


def merged_record(config: Any) -> dict[str, Any]:
    """The training record in the config.json of a merged model, in the form of an adapter's record; empty if there is none.

    Raises:
        ModelError: a value is not one that `craft merge` writes.
    """
    kept = getattr(config, MERGED_KEY, {})
    kinds: dict[str, Any] = {
        "threshold": (int, float),
        "max_seq_length": int,
        "text_columns": list,
        "text_separator": str,
        "label_column": str,
        "label_separator": str,
        "form": str,
        "train_on": str,
        "beside": str,
    }
    for name, value in kept.items() if isinstance(kept, dict) else [("it", kept)]:
        columns = value if name == "text_columns" else ()
        if (
            isinstance(value, bool)
            or not isinstance(value, kinds.get(name, ()))
            or not all(isinstance(column, str) for column in columns)
        ):
            raise ModelError(
                f"config.json: {name} under {MERGED_KEY} is {value!r}, which is invalid; correct or delete it"
            )
    settings = {name: kept[name] for name in ("threshold", "max_seq_length", "form", "train_on") if name in kept}
    return settings | {"data": {name: value for name, value in kept.items() if name not in settings}}


def load_adapted(
    path: Path,
    dtype: Callable[[Checkpoint], torch.dtype] = lambda base: torch.float32,
    *,
    trust_remote_code: bool = False,
    allow_other_base: bool = False,
) -> tuple[Any, ModelAdapter, Checkpoint]:
    """Load an adapter's base model, in the class of the training, with the adapter and its head attached.

    Args:
        path: the folder of the adapter.
        dtype: gives the dtype of the base's weights. Default: float32.
        trust_remote_code: run Python code from the model's repository.
        allow_other_base: accept a base that has changed since the training.

    Raises:
        FileError: the adapter is missing or damaged.
        ModelError: its base cannot be found, or has changed.
    """
    record = read_record(path)
    named = record["base_model"]
    checkpoint = resolve(named["model"], named["revision"], trust_remote_code=trust_remote_code)
    trained = record["model"]
    names = {int(number): name for number, name in trained["id2label"].items()}
    options = {
        "num_labels": trained["num_labels"],
        "id2label": names,
        "label2id": {name: number for number, name in names.items()},
    }
    model, _ = load_model(checkpoint, trained["architecture"], options, dtype(checkpoint))
    model.config.pad_token_id = trained["pad_token_id"]
    return model, load(model, path, allow_other_base=allow_other_base, checkpoint=checkpoint), checkpoint
