"""The frozen factors of a model's projections: as an object, as a file, and the cache of those files.

A cache entry is found by what the weights are (sha256 of each stack), never by name. Because HOSVD factors nest, an
entry serves every request for some of its projections at the same or smaller ranks.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from craft_cli.errors import FileError, ModelError
from craft_cli.files import checksum, read_header, read_tensors, write_tensors
from craft_cli.methods.craft.ranks import Ranks
from craft_cli.models.checkpoint import fingerprint
from craft_cli.models.quantization import TOLERANCE, dense_weight, kind_of
from craft_cli.models.views import View
from craft_cli.tucker import MODES, TuckerTensor, mode_product

KIND = "factors"
METHOD = "hosvd"
DTYPES = ("float64", "float32", "float16", "bfloat16")
MOST_LAYERS = 1024
"""No model has as many; what is computed from a stranger's file grows with them."""


@dataclass(frozen=True, eq=False)
class Factors:
    """Decompositions of some projections of one model.

    Attributes:
        model: hub id, folder or `demo`, as decomposed.
        revision: commit of a hub model.
        model_type: its family.
        dtype: of the decomposed weights, such as `float32`.
        fingerprints: sha256 of every projection's stack.
        decompositions: by projection, in canonical order of the request.
        path: the file they came from.
    """

    model: str
    revision: str | None
    model_type: str
    dtype: str
    fingerprints: Mapping[str, str]
    decompositions: Mapping[str, TuckerTensor]
    path: Path | None = field(default=None)

    @property
    def targets(self) -> tuple[str, ...]:
        """The projections decomposed."""
        return tuple(self.decompositions)

    def ranks(self, target: str) -> Ranks:
        """The ranks kept of one projection."""
        return Ranks.of_modes(self.decompositions[target].ranks)

    def select(self, targets: tuple[str, ...], ranks: Ranks) -> Factors:
        """Only these projections, at these ranks (lowered to the dimensions).

        Raises:
            ValueError: a rank above what is kept here.
        """
        chosen = {}
        for target in targets:
            decomposition = self.decompositions[target]
            chosen[target] = decomposition.truncated(ranks.lowered(decomposition.shape).by_mode)
        return replace(
            self, decompositions=chosen, fingerprints={target: self.fingerprints[target] for target in targets}
        )

    def identity(self) -> dict[str, Any]:
        """Which weights these are factors of, for the headers of files."""
        return {
            "model": self.model,
            "revision": self.revision,
            "model_type": self.model_type,
            "dtype": self.dtype,
            "sha256": dict(self.fingerprints),
            "method": METHOD,
        }

    def save(self, path: str | Path) -> None:
        """Write one safetensors file: `TARGET.core`, `TARGET.factor.MODE`, `TARGET.spectrum.MODE`, float32.

        Raises:
            FileError: it cannot be written.
        """
        header = self.identity() | {
            "targets": list(self.targets),
            "shapes": {target: list(d.shape) for target, d in self.decompositions.items()},
            "ranks": {target: list(d.ranks) for target, d in self.decompositions.items()},
        }
        write_tensors(Path(path), KIND, factor_tensors(self.decompositions), header)

    @classmethod
    def load(cls, path: str | Path) -> Factors:
        """Read a file of factors.

        Raises:
            FileError: there is none, it is damaged, or it is something else.
        """
        path = Path(path)
        tensors, header = read_tensors(path, KIND)
        return from_tensors(tensors, header, path)


def factor_tensors(decompositions: Mapping[str, TuckerTensor]) -> dict[str, Tensor]:
    """Every tensor of some decompositions by its name in a file."""
    tensors = {}
    for target, decomposition in decompositions.items():
        tensors[f"{target}.core"] = decomposition.core
        for mode, factor, spectrum in zip(MODES, decomposition.factors, decomposition.spectra, strict=True):
            tensors[f"{target}.factor.{mode}"] = factor
            tensors[f"{target}.spectrum.{mode}"] = spectrum
    return tensors


def from_tensors(tensors: Mapping[str, Tensor], header: Mapping[str, Any], path: Path) -> Factors:
    """The factors that `factor_tensors` and `Factors.identity` describe.

    Raises:
        FileError: a tensor or a header entry is missing or of the wrong shape.
    """
    try:
        _check_header(header)
        decompositions = {
            target: TuckerTensor(
                tensors[f"{target}.core"],
                _by_mode(tensors, f"{target}.factor"),
                _by_mode(tensors, f"{target}.spectrum"),
            )
            for target in header["targets"]
        }
        for target, decomposition in decompositions.items():
            for tensor in (decomposition.core, *decomposition.factors, *decomposition.spectra):
                if tensor.dtype != torch.float32 or not torch.isfinite(tensor).all():
                    raise ValueError(f"{target} holds values that are not finite float32 numbers")
            if decomposition.shape[0] > MOST_LAYERS:
                raise ValueError(f"{target} has {decomposition.shape[0]} layers, more than {MOST_LAYERS}")
        return Factors(
            model=header["model"],
            revision=header["revision"],
            model_type=header["model_type"],
            dtype=header["dtype"],
            fingerprints={target: header["sha256"][target] for target in header["targets"]},
            decompositions=decompositions,
            path=path,
        )
    except (KeyError, TypeError) as error:
        raise FileError(f"{path} is damaged: {error} is missing") from error
    except ValueError as error:
        raise FileError(f"{path} is damaged: {error}") from error


def _check_header(header: Mapping[str, Any]) -> None:
    """Refuse a header of other types than ours, or with names that could mean something elsewhere.

    Raises:
        KeyError: an entry is missing.
        ValueError: an entry cannot be.
    """
    targets, prints = header["targets"], header["sha256"]
    if not (isinstance(targets, list) and targets and all(isinstance(target, str) for target in targets)):
        raise ValueError("its header names no projections")
    if len(set(targets)) != len(targets) or not all(re.fullmatch(r"[a-z_]{1,32}", target) for target in targets):
        raise ValueError("its header names projections that cannot be")
    if not (isinstance(prints, dict) and all(re.fullmatch(r"[0-9a-f]{64}", str(prints[target])) for target in targets)):
        raise ValueError("its header holds no sha256 of the weights")
    for name in ("model", "model_type", "dtype"):
        if not (isinstance(header[name], str) and header[name].isprintable()):
            raise ValueError(f"its header's {name} is no line of text")
    if not (header["revision"] is None or (isinstance(header["revision"], str) and header["revision"].isprintable())):
        raise ValueError("its header's revision is no line of text")
    if header["dtype"] not in DTYPES:
        raise ValueError("its header names no dtype of weights")


def _by_mode(tensors: Mapping[str, Tensor], prefix: str) -> tuple[Tensor, Tensor, Tensor]:
    layer, out, in_ = (tensors[f"{prefix}.{mode}"] for mode in MODES)
    return layer, out, in_


class FactorCache:
    """A folder of factor files.

    Args:
        folder: `~/.cache/craft` (or below XDG_CACHE_HOME) without.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        self.folder = Path(folder).expanduser() if folder else home / "craft"

    def all_that_serve(self, fingerprints: Mapping[str, str], ranks: Ranks) -> Iterator[Factors]:
        """Every whole entry that holds these projections of these very weights at these ranks or larger."""
        for path in sorted(self.folder.glob("*.safetensors")):
            with suppress(FileError):
                if _serves(read_header(path, KIND), fingerprints, ranks):
                    yield Factors.load(path)

    def find(self, fingerprints: Mapping[str, str], ranks: Ranks) -> tuple[Factors | None, list[str]]:
        """An entry that holds these projections of these very weights at these ranks or larger.

        Returns:
            The entry, untruncated, or None; and a line for each damaged entry passed over.
        """
        damaged: list[str] = []
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                if _serves(read_header(path, KIND), fingerprints, ranks):
                    return Factors.load(path), damaged
            except FileError as error:
                if _key(fingerprints) in path.name:  # another model's is made again when that is decomposed
                    damaged.append(str(error))
        return None, damaged

    def ranks_at(self, path: Path, fingerprints: Mapping[str, str]) -> dict[str, Ranks]:
        """The ranks of the entry at `path`, which a larger one is to replace; empty if there is none to keep."""
        try:
            header = read_header(path, KIND)
            if header["sha256"] != dict(fingerprints):
                return {}
            return {target: Ranks.of_modes(tuple(header["ranks"][target])) for target in fingerprints}
        except (FileError, KeyError, TypeError):
            return {}

    def path_for(self, model: str, fingerprints: Mapping[str, str]) -> Path:
        """Where the entry for these projections is written: readable name, then what the weights are."""
        slug = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(model).name or "model").strip(".-") or "model"
        return self.folder / f"{slug}-{_key(fingerprints)}.safetensors"

    @contextmanager
    def lock(self, path: Path) -> Iterator[None]:
        """Held while an entry is made, so that a second process waits for it and then finds it.

        Raises:
            FileError: the cache folder cannot be written.
        """
        from filelock import FileLock

        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(path.with_suffix(".lock"))
            lock.acquire()
        except OSError as error:
            raise FileError(f"cannot use the cache folder {self.folder}: {error.strerror}; give --cache-dir") from error
        try:
            yield
        finally:
            lock.release()


def _key(fingerprints: Mapping[str, str]) -> str:
    """What the weights are, for the name of an entry."""
    return sha256(json.dumps(sorted(fingerprints.items())).encode()).hexdigest()[:16]


def _serves(header: Mapping[str, Any], fingerprints: Mapping[str, str], ranks: Ranks) -> bool:
    """Whether a cache entry's header promises these projections at these ranks."""
    try:
        for target, fingerprint in fingerprints.items():
            if header["sha256"].get(target) != fingerprint:
                return False
            shape, kept = header["shapes"][target], header["ranks"][target]
            if any(need > have for need, have in zip(ranks.lowered(tuple(shape)).by_mode, kept, strict=True)):
                return False
    except (AttributeError, KeyError, TypeError, ValueError):
        return False
    return True


def factor_sha256(decompositions: Mapping[str, TuckerTensor]) -> str:
    """What the factors are: sha256 over names, shapes and values of all their tensors."""
    return checksum(factor_tensors(decompositions))


def check_base(model: Any, factors: Factors, views: Mapping[str, Sequence[View]]) -> None:
    """Refuse a model with other weights than those decomposed.

    The sha256 is compared in the dtype of the checkpoint, which a model loaded in a wider one converts to exactly. A
    model loaded in a narrower dtype or quantised is rounded, so there the core it gives must be the stored one to that
    precision.

    Raises:
        ModelError: other weights.
    """
    checkpoint_dtype = getattr(torch, factors.dtype)
    for target, decomposition in factors.decompositions.items():
        try:
            modules = [view.module_of(model.base_model) for view in views[target]]
            weights = [dense_weight(module) for module in modules]
        except AttributeError as error:
            raise ModelError(f"this model has no projection '{target}' where its family keeps it: {error}") from error
        layers = [view.read(weight) for view, weight in zip(views[target], weights, strict=True)]
        same_shape = (len(layers), *layers[0].shape) == decomposition.shape
        kind = kind_of(modules[0])
        if kind:
            same = same_shape and _same_core(layers, decomposition, TOLERANCE[kind])
        elif same_shape and torch.promote_types(layers[0].dtype, checkpoint_dtype) == layers[0].dtype:
            same = fingerprint(layers, checkpoint_dtype) == factors.fingerprints[target]
        else:
            same = same_shape and _same_core(layers, decomposition, torch.finfo(layers[0].dtype).eps)
        if not same:
            raise ModelError(
                f"the factors are of {factors.model}; this model has other weights ({target}), on which they mean nothing"
            )


def _same_core(layers: Sequence[Tensor], decomposition: TuckerTensor, tolerance: float) -> bool:
    u_layer, u_out, u_in = (factor.to(layers[0].device) for factor in decomposition.factors)
    stack = torch.stack([u_out.T @ layer.float() @ u_in for layer in layers])  # (L, r_out, r_in)
    core = mode_product(stack, u_layer.T, 0)
    expected = decomposition.core.to(core.device)
    return bool((core - expected).norm() <= tolerance * expected.norm())
