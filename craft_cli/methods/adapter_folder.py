"""An adapter's folder: `adapter_config.json` and `adapter_model.safetensors`, written and read without any model.

A folder may come from a stranger: nothing in it is believed. Either it holds what its method keeps of the base, or only the
sha256 of that (`factors: reference`): then it is looked for in the cache. Reading fetches and computes nothing, unless the
caller asks for what the cache lacks to be made again. Only `adapter_at` asks the hub, where a hub id is given.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from craft_cli.config import THRESHOLD
from craft_cli.errors import FileError, ModelError
from craft_cli.files import (
    check_version,
    quoted,
    read_json,
    read_tensors,
    sha256_of,
    steadily,
    write_bytes,
    write_json,
    write_tensors,
)
from craft_cli.methods import METHODS, method_named
from craft_cli.methods.base import Chain, Method
from craft_cli.methods.frozen import Frozen
from craft_cli.models.hub import fetch_files, is_hub_id, local_path
from craft_cli.models.identity import Base
from craft_cli.models.stacks import DTYPES

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
KIND = "an adapter"
BESIDE = "adapter"
"""An adapter's folder inside that of a run, or beside the merged weights of a saved model."""
INCLUDE, REFERENCE = "include", "reference"
HEAD = "head."
_DTYPES = tuple(getattr(torch, name) for name in DTYPES)


@dataclass(frozen=True, eq=False)
class SavedAdapter:
    """What an adapter's folder holds.

    Attributes:
        path: the folder.
        record: adapter_config.json.
        method: that trained it.
        frozen: what the method kept of the base, of the folder or of the cache.
        trained: what was trained, by the names of the change's parameters.
        head: the trained head by the names of the model's parameters.
        sha256: of the file that it was read from.
    """

    path: Path
    record: Mapping[str, Any]
    method: Method
    frozen: Frozen
    trained: Mapping[str, Tensor]
    head: Mapping[str, Tensor]
    sha256: str

    @property
    def base(self) -> Base:
        """The base that it was trained on."""
        return Base.read(self.record["base_model"])

    @property
    def options(self) -> Any:
        """The method's options."""
        return self.method.options(self.record)

    def chains(self, target: str) -> Iterator[Chain]:
        """The change of every layer of a projection in float64, one at a time."""
        return self.method.chains_in_turn(self.frozen, self.record, self.trained, target)

    def facts(self, target: str) -> dict[str, Any]:
        """What is shown of a projection."""
        return self.method.facts(self.frozen, self.record, self.trained, target)

    def check_head(self, model: Any) -> None:
        """Refuse a model without the place for the adapter's head; an adapter without a head fits any class and labels.

        Raises:
            ModelError: so.
        """
        if not self.head:
            return
        state, told = model.state_dict(), self.record["model"]
        kind = type(model).__name__.removeprefix("FSDP")  # which FSDP puts before it
        if kind != told["architecture"]:
            raise ModelError(
                f"{self.path} was trained on a {told['architecture']}, this is a {kind}: load a "
                f"{told['architecture']} with num_labels={told['num_labels']}"
            )
        if model.config.num_labels != told["num_labels"]:
            raise ModelError(
                f"{self.path} has {told['num_labels']} labels, this model {model.config.num_labels}: load a "
                f"{told['architecture']} with num_labels={told['num_labels']}"
            )
        for parameter, tensor in self.head.items():
            if parameter not in state or state[parameter].shape != tensor.shape:
                found = f"is {tuple(state[parameter].shape)}" if parameter in state else "is missing"
                raise ModelError(
                    f"{self.path}: its head needs {parameter!r} {tuple(tensor.shape)}, which {found} in this model; load a "
                    f"{told['architecture']} with num_labels={told['num_labels']}"
                )


def adapter_at(path: str | Path, revision: str | None = None) -> Path | None:
    """The adapter's folder that a path or a hub id names.

    Args:
        path: the folder; one with an adapter in its folder `adapter`, as a run or a saved model is; or OWNER/NAME of a
            repository on the hub, of which nothing but the two files of an adapter is fetched.
        revision: branch, tag or commit of the repository.

    Returns:
        The folder; None where it is something else.

    Raises:
        ModelError: it is a hub id, and the hub has no such repository or cannot be reached; or it cannot be a path.
    """
    path = local_path(path)
    for folder in (path, path / BESIDE):
        if (folder / CONFIG_FILE).is_file():
            return folder
    if _is_hub_id(path):
        return fetch_files(str(path), (CONFIG_FILE, TENSOR_FILE), revision)
    return None


def _is_hub_id(path: Path) -> bool:
    """Whether a path can only be meant as OWNER/NAME on the hub: it is not here, and there is no folder OWNER either."""
    return is_hub_id(str(path)) and not path.exists() and not path.parent.exists()


def read_adapter(
    path: Path, cache_dir: str | Path | None = None, *, make: bool = False, trusted: bool = False
) -> SavedAdapter:
    """Read and check an adapter's folder.

    Args:
        path: the folder.
        cache_dir: where it is looked for what the adapter only refers to; `~/.cache/craft` without.
        make: where the cache lacks that, have the method prepare it again from the base; else nothing is fetched or written.
        trusted: whether the user lets Python code of that base run.

    Raises:
        FileError: it is no adapter, is damaged, or refers to what cannot be had.
    """
    return steadily(path, lambda: _read(path, cache_dir, make=make, trusted=trusted))


def _read(path: Path, cache_dir: str | Path | None, *, make: bool, trusted: bool) -> SavedAdapter:
    record = read_record(path)
    method = method_named(record["method"])
    file = path / TENSOR_FILE
    tensors, header = read_tensors(file, KIND)
    head = {name.removeprefix(HEAD): tensor for name, tensor in tensors.items() if name.startswith(HEAD)}
    if header.get("sha256") != record["base_model"]["sha256"] or header.get("targets") != record["targets"]:
        raise FileError(f"{path} is damaged: {CONFIG_FILE} and {TENSOR_FILE} speak of other weights")
    if sorted(head) != sorted(record["head"]):
        raise FileError(f"{path} is damaged: {TENSOR_FILE} holds another head than {CONFIG_FILE} names")
    stored = record.get("factors", {}).get("stored", INCLUDE) == INCLUDE
    if stored:
        frozen = method.read(tensors, header, file)
    else:
        folder = None if cache_dir is None else str(cache_dir)
        frozen = method.recall(record, path, folder, make=make, trusted=trusted)
    layers = {target: shape[0] for target, shape in frozen.shapes.items()}
    if len(set(layers.values())) != 1:
        raise FileError(f"{path} is damaged: its projections are of different numbers of layers {layers}")

    try:
        shapes = method.trained_shapes(frozen, method.options(record))
    except (RuntimeError, OverflowError, TypeError) as error:  # of a size that cannot be
        raise FileError(f"{path / CONFIG_FILE} is damaged: {quoted(str(error).splitlines()[0])}") from error
    expected = set(shapes) | {HEAD + name for name in head} | (set(frozen.tensors()) if stored else set())
    if set(tensors) != expected:
        odd = sorted(set(tensors) ^ expected)[0]
        raise FileError(f"{file} is damaged: {quoted(odd)} is {'too much' if odd in tensors else 'missing'}")
    for name, shape in shapes.items():
        found = tensors[name]
        if tuple(found.shape) != shape or found.dtype != torch.float32:
            raise FileError(f"{file} is damaged: {name} is {found.dtype} {tuple(found.shape)}, not {shape}")
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES or not torch.isfinite(tensor).all():
            raise FileError(f"{file} is damaged: {quoted(name)} holds values that are not finite numbers")
    trained = {name: tensors[name] for name in shapes}
    return SavedAdapter(path, record, method, frozen, trained, head, sha256_of(file))


def write_adapter(
    folder: Path, record: Mapping[str, Any], trained: Mapping[str, Tensor], frozen: Frozen, card: str | None = None
) -> None:
    """Write the files of an adapter into a folder that is there, and check them by reading them back.

    Args:
        folder: to write to.
        record: what adapter_config.json says; see `AdapterRecord`.
        trained: parameters of the change, and of the head with `HEAD` before their names.
        frozen: what the method keeps of the base.
        card: text of README.md.

    Raises:
        FileError: one cannot be written, or reads back different; or a number is not finite.
    """
    state = dict(trained)
    if record.get("factors", {}).get("stored", INCLUDE) == INCLUDE:
        state |= frozen.tensors()
    for name, tensor in trained.items():
        if not torch.isfinite(tensor).all():  # it could not be read again
            held = "nan, which is no number" if torch.isnan(tensor).any() else "an infinite number"
            raise FileError(f"{folder}: the adapter is not written, since {name} holds {held}")
    write_tensors(folder / TENSOR_FILE, KIND, state, {"targets": list(frozen.targets)} | frozen.identity())
    write_json(folder / CONFIG_FILE, record)
    if card is not None:
        write_bytes(folder / "README.md", card.encode(errors="backslashreplace"))
    saved, _ = read_tensors(folder / TENSOR_FILE, KIND)
    if any(not torch.equal(saved[name], tensor.detach().cpu()) for name, tensor in state.items()):
        raise FileError(f"{folder}: the adapter reads back different from what was written; the disk may be failing")


# -- the description ----------------------------------------------------------------------------------------------------


def _one_line(text: str) -> str:
    if not text.isprintable():
        raise ValueError("it holds control characters")
    return text


_Line = Annotated[str, AfterValidator(_one_line), Field(max_length=4096)]
_Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")  # later formats may say more


class _Base(_Strict):
    model: _Line
    revision: _Line | None
    sha256: dict[_Line, _Sha256]
    weights: dict[_Line, _Sha256]
    config: dict[_Line, Any]
    tokenizer: dict[_Line, _Sha256] | None


class _Model(_Strict):
    architecture: _Line
    num_labels: Annotated[int, Field(gt=0, le=1 << 20)]
    problem_type: _Line | None
    id2label: dict[_Line, str]
    pad_token_id: int | None


class _Parameters(_Strict):
    adapter: int
    head: int


class _Factors(_Strict):
    stored: Annotated[str, Field(pattern=f"^({INCLUDE}|{REFERENCE})$")]
    sha256: _Sha256
    sketch: dict[_Line, list[float]] = {}


class _Rows(_Strict):
    count: int
    sha256: _Sha256


class _Data(_Strict):
    task: _Line | None = None
    data_dir: _Line | None = None
    train_file: _Line | None = None
    validation_file: _Line | None = None
    text_columns: list[str] | None = None
    label_column: str | None = None
    label_separator: str | None = None
    text_separator: str | None = None
    beside: str | None = None
    rows: dict[_Line, _Rows] = {}
    held_out: dict[_Line, str] = {}


class _Training(_Strict):
    """All optional: a user of the Python API may say nothing."""

    task: _Line = ""
    task_type: _Line | None = None
    data: _Data = _Data()
    problem_type: _Line | None = None
    labels: list[str] = []
    threshold: float = THRESHOLD
    temperature: float = 1.0
    max_seq_length: Annotated[int, Field(gt=0)] | None = None
    form: _Line = ""
    train_on: _Line = ""
    chat_template: str = ""
    epoch: float = 0.0
    metrics: dict[_Line, float] = {}
    baselines: dict[_Line, dict[_Line, float]] = {}
    recipe: dict[_Line, Any] = {}


class _Record(_Strict):
    base_model: _Base
    task_type: _Line | None = None
    targets: list[_Line]
    head: list[_Line]
    parameters: _Parameters
    model: _Model
    factors: _Factors | None = None
    training: _Training = _Training()


def read_record(path: Path) -> dict[str, Any]:
    """What an adapter's folder says of itself.

    Raises:
        FileError: it is no adapter, or is damaged.
    """
    if not (path / CONFIG_FILE).is_file():
        raise FileError(f"{path} is no adapter: it holds no {CONFIG_FILE}")
    record = read_json(path / CONFIG_FILE)
    if str(record.get("method")) not in METHODS:
        raise FileError(f"{path} is not an adapter of craft's (an adapter of peft's is loaded with peft)")
    check_version(record, path)
    try:
        checked = _Record.model_validate(record)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise FileError(f"{path / CONFIG_FILE} is damaged: {quoted(where)}: {' '.join(first['msg'].split())}") from None
    labels = {str(number) for number in range(checked.model.num_labels)}
    targets = set(checked.targets)
    alike = targets == set(checked.base_model.sha256)
    if set(checked.model.id2label) != labels or not alike or not targets:
        raise FileError(f"{path / CONFIG_FILE} is damaged: its labels or its projections contradict each other")
    if checked.task_type not in (None, checked.training.task_type):
        raise FileError(f"{path / CONFIG_FILE} is damaged: it names two task types")
    try:
        method_named(record["method"]).options(record)
    except ValueError as error:
        raise FileError(f"{path / CONFIG_FILE} is damaged: {error}") from None
    return record
