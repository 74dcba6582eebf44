"""Write and read an adapter's folder, `adapter_config.json` and `adapter_model.safetensors`, without a model.

A folder may come from an untrusted source, so all of it is checked. It holds the frozen tensors of its method, or only
their sha256 (`factors: reference`); these tensors are then read from the cache. Reading downloads and computes nothing,
unless the caller allows missing tensors to be recomputed. Only `adapter_at` contacts the Hub, for a Hub id.
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
"""The adapter's folder in a run, or in the folder of a saved model with merged weights."""
INCLUDE, REFERENCE = "include", "reference"
HEAD = "head."
_DTYPES = tuple(getattr(torch, name) for name in DTYPES)


@dataclass(frozen=True, eq=False)
class SavedAdapter:
    """The contents of an adapter's folder.

    Attributes:
        path: the folder.
        record: adapter_config.json.
        method: the method.
        frozen: the frozen tensors of the method, from the folder or the cache.
        trained: trained parameters of the change, by name.
        head: trained parameters of the head, by their names in the model.
        sha256: sha256 of the tensor file.
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
        """The base it was trained on."""
        return Base.read(self.record["base_model"])

    @property
    def options(self) -> Any:
        """The method's options."""
        return self.method.options(self.record)

    def chains(self, target: str) -> Iterator[Chain]:
        """Iterate over the chains of a projection's layers, in float64."""
        return self.method.chains_in_turn(self.frozen, self.record, self.trained, target)

    def facts(self, target: str) -> dict[str, Any]:
        """Facts about a projection, for display."""
        return self.method.facts(self.frozen, self.record, self.trained, target)

    def check_head(self, model: Any) -> None:
        """Refuse a model that the adapter's head does not fit; an adapter without a head fits every class.

        Raises:
            ModelError: the class, the number of labels or a parameter of the head differs.
        """
        if not self.head:
            return
        state, needed = model.state_dict(), self.record["model"]
        kind = type(model).__name__.removeprefix("FSDP")  # a prefix that FSDP adds
        if kind != needed["architecture"]:
            raise ModelError(
                f"{self.path} was trained on a {needed['architecture']}, but this is a {kind}: load a "
                f"{needed['architecture']} with num_labels={needed['num_labels']}"
            )
        if model.config.num_labels != needed["num_labels"]:
            raise ModelError(
                f"{self.path} has {needed['num_labels']} labels, but this model has {model.config.num_labels}: load a "
                f"{needed['architecture']} with num_labels={needed['num_labels']}"
            )
        for parameter, tensor in self.head.items():
            if parameter not in state or state[parameter].shape != tensor.shape:
                actual = f"is {tuple(state[parameter].shape)}" if parameter in state else "is missing"
                raise ModelError(
                    f"{self.path}: its head needs {parameter!r} {tuple(tensor.shape)}, which {actual} in this model; "
                    f"load a {needed['architecture']} with num_labels={needed['num_labels']}"
                )


def adapter_at(path: str | Path, revision: str | None = None) -> Path | None:
    """Resolve a path or a Hub id to an adapter's folder.

    Args:
        path: the folder; a run or saved model with an `adapter` folder; or OWNER/NAME of a Hub repository, of which
            only the two files of an adapter are downloaded.
        revision: branch, tag or commit of the repository.

    Returns:
        The folder; None if there is no adapter.

    Raises:
        ModelError: the Hub has no such repository or cannot be reached, or the path is invalid.
    """
    path = local_path(path)
    for folder in (path, path / BESIDE):
        if (folder / CONFIG_FILE).is_file():
            return folder
    if _is_hub_id(path):
        return fetch_files(str(path), (CONFIG_FILE, TENSOR_FILE), revision)
    return None


def _is_hub_id(path: Path) -> bool:
    """Whether a path can only be OWNER/NAME on the Hub: neither it nor a folder OWNER exists."""
    return is_hub_id(str(path)) and not path.exists() and not path.parent.exists()


def read_adapter(
    path: Path, cache_dir: str | Path | None = None, *, make: bool = False, trusted: bool = False
) -> SavedAdapter:
    """Read and check an adapter's folder.

    Args:
        path: the folder.
        cache_dir: cache folder for tensors that the adapter only refers to. Default: `~/.cache/craft`.
        make: whether to recompute such tensors from the base if they are not cached; if not, nothing is downloaded or
            written.
        trusted: whether Python code in the base checkpoint may run.

    Raises:
        FileError: there is no adapter, it is damaged, or tensors that it refers to are not available.
    """
    return steadily(path, lambda: _read(path, cache_dir, make=make, trusted=trusted))


def _read(path: Path, cache_dir: str | Path | None, *, make: bool, trusted: bool) -> SavedAdapter:
    record = read_record(path)
    method = method_named(record["method"])
    file = path / TENSOR_FILE
    tensors, header = read_tensors(file, KIND)
    head = {name.removeprefix(HEAD): tensor for name, tensor in tensors.items() if name.startswith(HEAD)}
    if header.get("sha256") != record["base_model"]["sha256"] or header.get("targets") != record["targets"]:
        raise FileError(f"{path} is damaged: {CONFIG_FILE} and {TENSOR_FILE} refer to different weights")
    if sorted(head) != sorted(record["head"]):
        raise FileError(f"{path} is damaged: {TENSOR_FILE} does not have the head that {CONFIG_FILE} names")
    included = record.get("factors", {}).get("stored", INCLUDE) == INCLUDE
    if included:
        frozen = method.read(tensors, header, file)
    else:
        folder = None if cache_dir is None else str(cache_dir)
        frozen = method.recall(record, path, folder, make=make, trusted=trusted)
    layers = {target: shape[0] for target, shape in frozen.shapes.items()}
    if len(set(layers.values())) != 1:
        raise FileError(f"{path} is damaged: its projections have different numbers of layers {layers}")

    try:
        shapes = method.trained_shapes(frozen, method.options(record))
    except (RuntimeError, OverflowError, TypeError) as error:  # impossible sizes
        raise FileError(f"{path / CONFIG_FILE} is damaged: {quoted(str(error).splitlines()[0])}") from error
    expected = set(shapes) | {HEAD + name for name in head} | (set(frozen.tensors()) if included else set())
    if set(tensors) != expected:
        odd = sorted(set(tensors) ^ expected)[0]
        raise FileError(f"{file} is damaged: {quoted(odd)} is {'unexpected' if odd in tensors else 'missing'}")
    for name, shape in shapes.items():
        stored = tensors[name]
        if tuple(stored.shape) != shape or stored.dtype != torch.float32:
            raise FileError(f"{file} is damaged: {name} is {stored.dtype} {tuple(stored.shape)}, not {shape}")
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES or not torch.isfinite(tensor).all():
            raise FileError(f"{file} is damaged: {quoted(name)} has values that are not finite")
    trained = {name: tensors[name] for name in shapes}
    return SavedAdapter(path, record, method, frozen, trained, head, sha256_of(file))


def write_adapter(
    folder: Path, record: Mapping[str, Any], trained: Mapping[str, Tensor], frozen: Frozen, card: str | None = None
) -> None:
    """Write an adapter's files into an existing folder, and verify them by reading them back.

    Args:
        folder: the folder.
        record: the content of adapter_config.json.
        trained: parameters of the change, and of the head with the prefix `HEAD`.
        frozen: the frozen tensors of the method.
        card: text of README.md.

    Raises:
        FileError: a file cannot be written, differs when it is read back, or a parameter is not finite.
    """
    state = dict(trained)
    if record.get("factors", {}).get("stored", INCLUDE) == INCLUDE:
        state |= frozen.tensors()
    for name, tensor in trained.items():
        if not torch.isfinite(tensor).all():  # it could not be loaded
            value = "nan" if torch.isnan(tensor).any() else "an infinite value"
            raise FileError(f"{folder}: the adapter was not written, because {name} has {value}")
    write_tensors(folder / TENSOR_FILE, KIND, state, {"targets": list(frozen.targets)} | frozen.identity())
    write_json(folder / CONFIG_FILE, record)
    if card is not None:
        write_bytes(folder / "README.md", card.encode(errors="backslashreplace"))
    saved, _ = read_tensors(folder / TENSOR_FILE, KIND)
    if any(not torch.equal(saved[name], tensor.detach().cpu()) for name, tensor in state.items()):
        raise FileError(f"{folder}: the adapter differs when it is read back; the disk may be failing")


# -- adapter_config.json -----------------------------------------------------------------------------------------------


def _one_line(text: str) -> str:
    if not text.isprintable():
        raise ValueError("it has control characters")
    return text


_Line = Annotated[str, AfterValidator(_one_line), Field(max_length=4096)]
_Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")  # later formats may have more entries


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
    """All entries are optional, since a user of the Python API may set none."""

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
    """Read and check adapter_config.json.

    Raises:
        FileError: there is no adapter, or it is damaged.
    """
    if not (path / CONFIG_FILE).is_file():
        raise FileError(f"{path} is not an adapter: it has no {CONFIG_FILE}")
    record = read_json(path / CONFIG_FILE)
    if str(record.get("method")) not in METHODS:
        raise FileError(f"{path} is not a craft adapter (load a PEFT adapter with peft)")
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
        raise FileError(f"{path / CONFIG_FILE} is damaged: its labels or projections are inconsistent")
    if checked.task_type not in (None, checked.training.task_type):
        raise FileError(f"{path / CONFIG_FILE} is damaged: it names two task types")
    try:
        method_named(record["method"]).options(record)
    except ValueError as error:
        raise FileError(f"{path / CONFIG_FILE} is damaged: {error}") from None
    return record
