"""The cache of what methods keep of a base: a folder of files, each found by what the weights are, never by a name."""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from craft_cli.errors import CraftError, FileError
from craft_cli.files import cache_folder, locked, read_header, read_json, stamp, write_json
from craft_cli.methods.frozen import Frozen, alike
from craft_cli.models.checkpoint import fingerprint
from craft_cli.models.hub import resolve
from craft_cli.models.stacks import DTYPES, Weights, read_weights

SAME = 1e-4
"""What rounding to float32 may move, relative to the whole."""


class Kept(Frozen):
    """What a method keeps of a base in a file of its own."""

    @abstractmethod
    def contents(self) -> dict[str, Any]:
        """What the header says of the tensors, by which an entry is chosen: `targets`, `shapes`, `ranks`, as JSON."""

    @abstractmethod
    def belong_to(self, weights: Weights, tolerance: float = SAME) -> bool:
        """Whether these were made of the weights, whatever a header says.

        Their bases are orthonormal, and the weights projected on them are what is stored, to a relative precision.
        """

    @abstractmethod
    def save(self, path: Path) -> None:
        """Write one file.

        Raises:
            FileError: it cannot be written.
        """


Entry = TypeVar("Entry", bound=Kept)
Serves = Callable[[Mapping[str, Any]], bool]
"""Whether an entry with this header serves a request; the header is a stranger's."""


class FrozenCache(Generic[Entry]):
    """The entries of one kind.

    Args:
        folder: `~/.cache/craft` (or below XDG_CACHE_HOME) without.
        kind: of the files.
        load: reads one.
    """

    def __init__(self, folder: str | Path | None, kind: str, load: Callable[[Path], Entry]) -> None:
        self.folder, self.kind, self._load = cache_folder(folder), kind, load

    def all_that_serve(self, serves: Serves) -> Iterator[Entry]:
        """Every whole entry that serves a request."""
        for path in sorted(self.folder.glob("*.safetensors")):
            with suppress(FileError):
                header = read_header(path, self.kind)
                if _asked(serves, header):
                    yield self._whole(path, header)

    def find(self, weights: Weights, serves: Serves) -> tuple[Entry | None, list[str]]:
        """An entry that serves a request, or None; and a line for each damaged entry of these weights passed over."""
        damaged: list[str] = []
        for path in sorted(self.folder.glob("*.safetensors")):
            asked = False
            try:
                header = read_header(path, self.kind)
                asked = _asked(serves, header)
                if asked:
                    entry = self._whole(path, header)
                    self._verify(path, entry, weights)
                    return entry, damaged
            except FileError as error:
                if (
                    asked or self._key(weights.fingerprints) in path.name
                ):  # another model's is made again when asked for
                    damaged.append(str(error))
        return None, damaged

    def keep(self, entry: Entry, path: Path) -> None:
        """Write an entry that was made here.

        Raises:
            FileError: it cannot be written.
        """
        entry.save(path)
        _mark(path, entry.targets)

    def _verify(self, path: Path, entry: Entry, weights: Weights) -> None:
        """Compare an entry with the weights, once for each file: it may have been copied here from anywhere.

        Raises:
            FileError: it was not made of them.
        """
        known: set[str] = set()
        with suppress(FileError):
            content = read_json(_verified(path))
            known = set(map(str, content.get("targets", ()))) if content.get("stamp") == stamp(path) else set()
        if known >= set(weights.targets):
            return
        if not entry.belong_to(weights):
            raise FileError(
                f"{path} holds other {self.kind} than those of {weights.model}, whatever it says: delete it"
            )
        _mark(path, known | set(weights.targets))

    def path_for(self, model: str, fingerprints: Mapping[str, str]) -> Path:
        """Where the entry for these weights is written: readable name, then what the weights are."""
        slug = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(model).name or "model").strip(".-") or "model"
        return self.folder / f"{slug}-{self._key(fingerprints)}.safetensors"

    @contextmanager
    def lock(self, path: Path) -> Iterator[None]:
        """Held while an entry is made, so that a second process waits for it and then finds it.

        Raises:
            FileError: the cache folder cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            held = ExitStack()
            held.enter_context(locked(path.with_suffix(".lock")))
        except OSError as error:
            raise FileError(f"cannot use the cache folder {self.folder}: {error.strerror}; pass --cache-dir") from error
        with held:
            yield

    def _whole(self, path: Path, header: Mapping[str, Any]) -> Entry:
        """An entry that holds what its header promises."""
        entry = self._load(path)
        if any(header.get(name) != value for name, value in entry.contents().items()):
            raise FileError(f"{path} is damaged: it holds other tensors than its header says")
        return entry

    def _key(self, fingerprints: Mapping[str, str]) -> str:
        """What the weights are, and what is kept of them, for the name of an entry."""
        return sha256(json.dumps([self.kind, *sorted(fingerprints.items())]).encode()).hexdigest()[:16]


def recall(
    cache: FrozenCache[Entry],
    serves: Serves,
    select: Callable[[Entry], Entry],
    prepare: Callable[[Weights], Entry],
    record: Mapping[str, Any],
    path: Path,
    *,
    make: bool,
    trusted: bool = False,
) -> Entry:
    """What an adapter only refers to, by its record: out of the cache, else (with `make`) prepared again.

    It has the sha256 recorded, or differs by rounding: on another machine the last bits do.

    Args:
        cache: of that kind.
        serves: whether an entry may hold it.
        select: the part of an entry that the adapter uses.
        prepare: that part, from the weights of the base.
        record: adapter_config.json.
        path: the adapter's folder, for messages.
        make: prepare it from the base that the adapter names; else nothing is fetched or written.
        trusted: whether the user lets Python code of that base run.

    Raises:
        FileError: it is not in the cache, and cannot or may not be made.
    """
    wanted: str = record["factors"]["sha256"]

    def is_it(kept: Entry) -> bool:
        return kept.sha256() == wanted or alike(kept.tensors(), record["factors"].get("sketch", {}))

    for found in map(select, cache.all_that_serve(serves)):
        if is_it(found):
            return found
    told = f"{path} only refers to its {cache.kind} (sha256 {wanted[:12]}...): they are not in the cache"
    copy = f"copy the file of {cache.kind} from where it was trained into {cache.folder}"
    if not make:
        raise FileError(f"{told}; load or merge it once, which makes them out of its base, or {copy}")
    base = record["base_model"]
    try:
        checkpoint = resolve(base["model"], base["revision"], trust_remote_code=trusted)
        weights = read_weights(checkpoint, tuple(record["targets"]))
        same = _are(weights, base)
        if same and is_it(made := prepare(weights)):
            return made
        reason = "decomposing its base gives others here" if same else "its base has other weights now"
    except CraftError as error:
        reason = f"its base is not at hand ({error})"
    raise FileError(f"{told}, and {reason}; {copy}, or save it there with factors='include'")


def _are(weights: Weights, base: Mapping[str, Any]) -> bool:
    """Whether weights are those of the base that a record names, which may have been loaded in another dtype than stored."""
    same = dict(weights.fingerprints) == base["sha256"]
    if same or base.get("dtype") not in DTYPES:
        return same
    dtype = getattr(torch, base["dtype"])
    return all(fingerprint(stack, dtype) == base["sha256"].get(name) for name, stack in weights.stacks.items())


def _verified(path: Path) -> Path:
    """Beside an entry, that it was compared with its weights."""
    return path.with_suffix(".verified")


def _mark(path: Path, targets: Iterable[str]) -> None:
    with suppress(FileError):  # else it is compared again
        write_json(_verified(path), {"stamp": stamp(path), "targets": sorted(targets)})


def _asked(serves: Serves, header: Mapping[str, Any]) -> bool:
    try:
        return serves(header)
    except (AttributeError, KeyError, TypeError, ValueError):
        return False
