"""The cache of frozen tensors: a folder of files, found by the hashes of the weights, never by a name."""

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
"""Maximum relative difference that rounding to float32 explains."""


class Kept(Frozen):
    """Frozen tensors that a method caches in their own file."""

    @abstractmethod
    def contents(self) -> dict[str, Any]:
        """The header entries that an entry is chosen by, as JSON: `targets`, `shapes`, `ranks`."""

    @abstractmethod
    def belong_to(self, weights: Weights, tolerance: float = SAME) -> bool:
        """Whether these tensors were computed from the weights, regardless of the header.

        Their bases must be orthonormal, and the weights projected on them must equal the stored tensors within a
        relative tolerance.
        """

    @abstractmethod
    def save(self, path: Path) -> None:
        """Write one file.

        Raises:
            FileError: the file cannot be written.
        """


Entry = TypeVar("Entry", bound=Kept)
Serves = Callable[[Mapping[str, Any]], bool]
"""Whether an entry with this untrusted header serves a request."""


class FrozenCache(Generic[Entry]):
    """The cache entries of one kind.

    Args:
        folder: cache folder. Default: `~/.cache/craft`, or under XDG_CACHE_HOME.
        kind: kind of the files.
        load: reads a file.
    """

    def __init__(self, folder: str | Path | None, kind: str, load: Callable[[Path], Entry]) -> None:
        self.folder, self.kind, self._load = cache_folder(folder), kind, load

    def all_that_serve(self, serves: Serves) -> Iterator[Entry]:
        """Iterate over the undamaged entries that serve a request."""
        for path in sorted(self.folder.glob("*.safetensors")):
            with suppress(FileError):
                header = read_header(path, self.kind)
                if _asked(serves, header):
                    yield self._whole(path, header)

    def find(self, weights: Weights, serves: Serves) -> tuple[Entry | None, list[str]]:
        """Find an entry that serves a request, or None; and one line for each damaged entry of these weights."""
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
                if asked or self._key(weights.fingerprints) in path.name:  # those of other models do not matter here
                    damaged.append(str(error))
        return None, damaged

    def keep(self, entry: Entry, path: Path) -> None:
        """Write a new entry.

        Raises:
            FileError: the file cannot be written.
        """
        entry.save(path)
        _mark(path, entry.targets)

    def _verify(self, path: Path, entry: Entry, weights: Weights) -> None:
        """Compare an entry with the weights, once per file, since it may have been copied from an untrusted source.

        Raises:
            FileError: it was not computed from these weights.
        """
        known: set[str] = set()
        with suppress(FileError):
            content = read_json(_verified(path))
            known = set(map(str, content.get("targets", ()))) if content.get("stamp") == stamp(path) else set()
        if known >= set(weights.targets):
            return
        if not entry.belong_to(weights):
            raise FileError(
                f"{path} does not match the weights of {weights.model}, although its header does: delete it"
            )
        _mark(path, known | set(weights.targets))

    def path_for(self, model: str, fingerprints: Mapping[str, str]) -> Path:
        """The path of the entry for these weights: a readable name and a hash of the weights."""
        slug = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(model).name or "model").strip(".-") or "model"
        return self.folder / f"{slug}-{self._key(fingerprints)}.safetensors"

    @contextmanager
    def lock(self, path: Path) -> Iterator[None]:
        """Hold a lock while an entry is computed, so that a second process waits and then finds it.

        Raises:
            FileError: the cache folder is not writable.
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
        """Load an entry, and check that its tensors match its header."""
        entry = self._load(path)
        if any(header.get(name) != value for name, value in entry.contents().items()):
            raise FileError(f"{path} is damaged: its tensors do not match its header")
        return entry

    def _key(self, fingerprints: Mapping[str, str]) -> str:
        """A hash of the weights and the kind, for the name of an entry."""
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
    """The tensors that an adapter only refers to: from the cache, or with `make` recomputed.

    They must have the recorded sha256 or differ only by rounding, since the last bits differ between machines.

    Args:
        cache: cache of that kind.
        serves: whether an entry may have the tensors.
        select: selects the adapter's part of an entry.
        prepare: computes that part from the weights of the base.
        record: adapter_config.json.
        path: the adapter's folder, for messages.
        make: whether to compute the tensors from the adapter's base; if not, nothing is downloaded or written.
        trusted: whether Python code in the base checkpoint may run.

    Raises:
        FileError: the tensors are not cached, and cannot be computed or `make` is off.
    """
    wanted: str = record["factors"]["sha256"]

    def matches(kept: Entry) -> bool:
        return kept.sha256() == wanted or alike(kept.tensors(), record["factors"].get("sketch", {}))

    for entry in map(select, cache.all_that_serve(serves)):
        if matches(entry):
            return entry
    problem = f"{path} only refers to its {cache.kind} (sha256 {wanted[:12]}...): they are not in the cache"
    copy = f"copy the file of {cache.kind} from the machine it was trained on into {cache.folder}"
    if not make:
        raise FileError(f"{problem}; load or merge the adapter once, which computes them from its base, or {copy}")
    base = record["base_model"]
    try:
        checkpoint = resolve(base["model"], base["revision"], trust_remote_code=trusted)
        weights = read_weights(checkpoint, tuple(record["targets"]))
        same = _are(weights, base)
        if same and matches(made := prepare(weights)):
            return made
        reason = "decomposing its base gives different ones here" if same else "the weights of its base have changed"
    except CraftError as error:
        reason = f"its base is not available ({error})"
    raise FileError(f"{problem}, and {reason}; {copy}, or save it there with factors='include'")


def _are(weights: Weights, base: Mapping[str, Any]) -> bool:
    """Whether the weights are those of a recorded base, which may have been loaded in another dtype."""
    same = dict(weights.fingerprints) == base["sha256"]
    if same or base.get("dtype") not in DTYPES:
        return same
    dtype = getattr(torch, base["dtype"])
    return all(fingerprint(stack, dtype) == base["sha256"].get(name) for name, stack in weights.stacks.items())


def _verified(path: Path) -> Path:
    """The file next to an entry that records its comparison with the weights."""
    return path.with_suffix(".verified")


def _mark(path: Path, targets: Iterable[str]) -> None:
    with suppress(FileError):  # otherwise it is compared again
        write_json(_verified(path), {"stamp": stamp(path), "targets": sorted(targets)})


def _asked(serves: Serves, header: Mapping[str, Any]) -> bool:
    try:
        return serves(header)
    except (AttributeError, KeyError, TypeError, ValueError):
        return False
