"""An adapter's folder, read and checked without any model. It may come from a stranger: nothing in it is believed.

Either it holds the factors its transforms live in, or only their sha256 (`factors: reference`): then they are found in
the cache, or made again from the base and taken only if they are the very same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from craft_cli.errors import CraftError, FileError
from craft_cli.files import FORMAT_VERSION, quoted, read_json, read_tensors
from craft_cli.methods.craft.decomposition import decompose_checkpoint
from craft_cli.methods.craft.factors import DTYPES, FactorCache, Factors, factor_sha256, factor_tensors, from_tensors
from craft_cli.methods.craft.ranks import Ranks
from craft_cli.models.hub import resolve
from craft_cli.tucker import MODES

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
KIND = "an adapter"
INCLUDE, REFERENCE = "include", "reference"
_DTYPES = tuple(getattr(torch, name) for name in DTYPES)


@dataclass(frozen=True, eq=False)
class SavedAdapter:
    """What an adapter's folder holds.

    Attributes:
        path: the folder.
        record: adapter_config.json.
        factors: the frozen factors, of the folder or of the cache.
        transforms: K (r, r) of every projection and mode.
        head: the trained head by the names of the model's parameters.
    """

    path: Path
    record: Mapping[str, Any]
    factors: Factors
    transforms: Mapping[str, Mapping[str, Tensor]]
    head: Mapping[str, Tensor]


def read_adapter(path: Path, cache_dir: str | Path | None = None, *, make: bool = True) -> SavedAdapter:
    """Read and check an adapter's folder.

    Args:
        path: the folder.
        cache_dir: where factors that are only referred to are looked for; `~/.cache/craft` without.
        make: where the cache lacks them, decompose the base that the adapter names; else nothing is fetched or written.

    Raises:
        FileError: it is no adapter, is damaged, or refers to factors that cannot be had.
    """
    record = read_record(path)
    file = path / TENSOR_FILE
    tensors, header = read_tensors(file, KIND)
    head = {name.removeprefix("head."): tensor for name, tensor in tensors.items() if name.startswith("head.")}
    if header.get("sha256") != record["base_model"]["sha256"] or header.get("targets") != record["targets"]:
        raise FileError(f"{path} is damaged: {CONFIG_FILE} and {TENSOR_FILE} speak of other factors")
    if sorted(head) != sorted(record["head"]):
        raise FileError(f"{path} is damaged: {TENSOR_FILE} holds another head than {CONFIG_FILE} names")
    stored = record.get("factors", {}).get("stored", INCLUDE) == INCLUDE
    factors = from_tensors(tensors, header, file) if stored else _referred(path, record, cache_dir, make=make)
    layers = {target: decomposition.shape[0] for target, decomposition in factors.decompositions.items()}
    if len(set(layers.values())) != 1:
        raise FileError(f"{path} is damaged: its projections are of different numbers of layers {layers}")

    expected = {f"transform.{target}.{mode}" for target in factors.targets for mode in MODES}
    expected |= {f"head.{name}" for name in head} | (set(factor_tensors(factors.decompositions)) if stored else set())
    if set(tensors) != expected:
        odd = sorted(set(tensors) ^ expected)[0]
        raise FileError(f"{file} is damaged: {quoted(odd)} is {'too much' if odd in tensors else 'missing'}")
    for target, decomposition in factors.decompositions.items():
        for mode, rank in zip(MODES, decomposition.ranks, strict=True):
            k = tensors[f"transform.{target}.{mode}"]
            if tuple(k.shape) != (rank, rank) or k.dtype != torch.float32:
                raise FileError(
                    f"{file} is damaged: transform.{target}.{mode} is {k.dtype} {tuple(k.shape)}, not {(rank, rank)}"
                )
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES or not torch.isfinite(tensor).all():
            raise FileError(f"{file} is damaged: {quoted(name)} holds values that are not finite numbers")
    transforms = {target: {mode: tensors[f"transform.{target}.{mode}"] for mode in MODES} for target in factors.targets}
    return SavedAdapter(path, record, factors, transforms, head)


def _referred(path: Path, record: Mapping[str, Any], cache_dir: str | Path | None, *, make: bool) -> Factors:
    """The factors with the sha256 in the record: out of the cache, else (with `make`) decomposed again."""
    wanted: str = record["factors"]["sha256"]
    base, targets = record["base_model"], tuple(record["targets"])
    ranks = Ranks(*(max(sizes) for sizes in zip(*record["ranks"].values(), strict=True)))
    for found in FactorCache(cache_dir).all_that_serve(base["sha256"], ranks):
        try:
            factors = found.select(targets, ranks)
        except (KeyError, ValueError):  # it holds less than its header promises
            continue
        if factor_sha256(factors.decompositions) == wanted:
            return factors
    told = f"{path} only refers to its factors (sha256 {wanted[:12]}...): they are not in the cache"
    copy = f"copy the file of factors from where it was trained into {FactorCache(cache_dir).folder}"
    if not make:
        raise FileError(f"{told}; load or merge it once, which makes them out of its base, or {copy}")
    try:
        factors = decompose_checkpoint(
            resolve(base["model"], base["revision"]),
            targets,
            ranks,
            cache_dir=None if cache_dir is None else str(cache_dir),
        ).factors
    except CraftError as error:
        reason = f"its base is not at hand ({error})"
    else:
        if factor_sha256(factors.decompositions) == wanted:
            return factors
        reason = (
            "decomposing its base gives others here"
            if dict(factors.fingerprints) == base["sha256"]
            else "its base has other weights now"
        )
    raise FileError(f"{told}, and {reason}; {copy}, or save it there with factors='include'")


# -- the description ----------------------------------------------------------------------------------------------------


def _one_line(text: str) -> str:
    if not text.isprintable():
        raise ValueError("it holds control characters")
    return text


_Line = Annotated[str, AfterValidator(_one_line), Field(max_length=4096)]
_Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Rank = Annotated[int, Field(gt=0, le=1 << 20)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")  # later formats may say more


class _Base(_Strict):
    model: _Line
    revision: _Line | None
    sha256: dict[_Line, _Sha256]


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


class _Data(_Strict):
    task: _Line | None = None
    data_dir: _Line | None = None
    train_file: _Line | None = None
    validation_file: _Line | None = None
    text_columns: list[str] | None = None
    label_column: str | None = None
    label_separator: str | None = None


class _Training(_Strict):
    """All optional: a user of the Python API may say nothing."""

    task: _Line = ""
    data: _Data = _Data()
    problem_type: _Line | None = None
    labels: list[str] = []
    threshold: float = 0.5
    max_seq_length: Annotated[int, Field(gt=0)] = 1
    epoch: float = 0.0
    metrics: dict[_Line, float] = {}
    recipe: dict[_Line, Any] = {}


class _Record(_Strict):
    base_model: _Base
    targets: list[_Line]
    ranks: dict[_Line, Annotated[list[_Rank], Field(min_length=3, max_length=3)]]
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
    if record.get("method") != "craft":
        raise FileError(f"{path} is not an adapter of craft's (an adapter of peft's is loaded with peft)")
    if record.get("format_version") != FORMAT_VERSION:
        raise FileError(
            f"{path} has format version {quoted(record.get('format_version'))}, this craft reads {FORMAT_VERSION}: upgrade craft"
        )
    try:
        checked = _Record.model_validate(record)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise FileError(f"{path / CONFIG_FILE} is damaged: {quoted(where)}: {' '.join(first['msg'].split())}") from None
    labels = {str(number) for number in range(checked.model.num_labels)}
    targets = set(checked.targets)
    alike = set(checked.ranks) == targets == set(checked.base_model.sha256)
    if set(checked.model.id2label) != labels or not alike or not targets:
        raise FileError(f"{path / CONFIG_FILE} is damaged: its labels or its projections contradict each other")
    return record
