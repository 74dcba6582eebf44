"""Writing so that nothing is ever half there, and reading so that damage is noticed.

A file or folder is written beside its place and moved there when whole. Our own tensor files are safetensors with one
header entry `craft`: a JSON object that names the kind of file, the format version and a checksum of the contents.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from craft_cli.errors import FileError, OtherVersion

FORMAT_VERSION = 2
LOCK_FILE = ".lock"
"""In a folder that one process at a time may write."""


def cache_folder(given: str | Path | None = None) -> Path:
    """Where craft keeps what it can make again: `~/.cache/craft` (or below XDG_CACHE_HOME) without."""
    if given:
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "craft"


def write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` by `data` in one step; a failure leaves the former file whole.

    Raises:
        FileError: it cannot be written (disk full, no permission).
    """
    with whole_file(path) as file:
        file.write(data)


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A temporary file beside `path` that replaces it when the block ends well; a failure leaves the former one whole.

    Raises:
        FileError: it cannot be written (disk full, no permission).
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make the names in a folder outlive a power cut, as `fsync` does for the contents of a file."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some file systems cannot; a full disk was noticed when writing
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, content: Any) -> None:
    """Replace `path` by `content` as indented JSON."""
    write_bytes(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        FileError: there is no such file, or it holds no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise FileError(f"{path} is damaged or not JSON ({_reason(error)})") from error
    if not isinstance(content, dict):
        raise FileError(f"{path} is damaged: it holds no JSON object")
    return content


def quoted(value: Any, most: int = 80) -> str:
    """Something out of a file that may come from a stranger, for a message: printable and short."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."


def _reason(error: Exception) -> str:
    """What a reader says, in one short line: it may quote the file."""
    line = "".join(letter if letter.isprintable() else " " for letter in str(error))
    return " ".join(line.split())[:200]


def cannot_write(path: Path, error: Exception) -> FileError:
    """One line for a failed write: the reason, and that nothing was lost."""
    reason = getattr(error, "strerror", None) or str(error)
    return FileError(f"cannot write {path}: {reason}; free space or choose another place (what was there is untouched)")


@contextmanager
def whole_folder(destination: Path, *, overwrite: bool) -> Iterator[Path]:
    """A temporary folder beside `destination`, moved there when the block ends well and removed when it does not.

    Raises:
        FileError: the destination is not empty and may not be overwritten, is a mount point or the working folder, or
            something cannot be written.
    """
    check_free(destination, overwrite=overwrite)
    if destination.exists() and (os.path.ismount(destination) or destination.samefile(Path.cwd())):
        raise FileError(f"{destination} cannot give way to another folder; choose one inside it")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", suffix=".part", dir=destination.parent))
    except OSError as error:
        raise cannot_write(destination, error) from error
    former = None
    try:
        temporary.chmod(0o755)
        yield temporary
        _sync_folder(temporary)
        if destination.exists():
            former = temporary.with_suffix(".old")
            destination.rename(former)
        temporary.rename(destination)
        _sync_folder(destination.parent)
        if former:
            shutil.rmtree(former)
    except OSError as error:
        if former and not destination.exists():
            former.rename(destination)
        raise cannot_write(destination, error) from error
    except FileError as error:  # speak of the place the user knows
        raise FileError(str(error).replace(str(temporary), str(destination))) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def delete_folder(folder: Path) -> None:
    """Delete a folder so that it is never there by halves: first it loses its name."""
    hidden = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    folder.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def tidy(folder: Path, names: Iterable[str]) -> None:
    """Clear away what a killed process left of writing these entries; a folder cut while it was replaced comes back.

    Args:
        folder: where they lie. Nobody else may be writing them.
        names: of files and folders, as `fnmatch` patterns.
    """
    patterns = list(names)
    for entry in list(folder.iterdir()):
        if not (entry.name.startswith(".") and entry.suffix in (".part", ".old")):
            continue
        name = entry.name[1:].rsplit(".", 2)[0]  # .NAME.RANDOM.part
        if not any(fnmatch(name, pattern) for pattern in patterns):
            continue
        if entry.suffix == ".old" and entry.is_dir() and not (folder / name).exists():
            entry.rename(folder / name)
        elif entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


def check_free(destination: Path, *, overwrite: bool) -> None:
    """Refuse a destination that holds something (what `holds_something` overlooks may be there).

    Raises:
        FileError: it is a file, or a folder that is not empty and may not be overwritten.
    """
    if destination.exists() and not destination.is_dir():
        raise FileError(f"{destination} is a file; choose a folder")
    if destination.is_dir() and holds_something(destination) and not overwrite:
        raise FileError(f"{destination} is not empty; choose another --output-dir or give --overwrite")


def holds_something(folder: Path) -> bool:
    """Whether a folder is not empty; a lock and what a killed process left of ours do not count."""
    return any(
        entry.name != LOCK_FILE and not (entry.name.startswith(".") and entry.suffix in (".part", ".old"))
        for entry in folder.iterdir()
    )


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and values."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(raw_bytes(tensor))
    return digest.hexdigest()


def raw_bytes(tensor: Tensor) -> memoryview:
    """The values of a tensor as they lie in memory, in row-major order."""
    flat = tensor.detach().cpu().contiguous().flatten()
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]


def write_tensors(path: Path, kind: str, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write a tensor file of ours in one step.

    Raises:
        FileError: it cannot be written.
    """
    from safetensors.torch import save

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    full = {**header, "kind": kind, "format_version": FORMAT_VERSION, "checksum": checksum(tensors)}
    write_bytes(path, save(tensors, metadata={"craft": json.dumps(full)}))


def read_header(path: Path, kind: str) -> dict[str, Any]:
    """The header of a tensor file of ours, without its tensors.

    Raises:
        FileError: there is no such file, it is damaged, or it is something else.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("craft", "null"))
    except FileNotFoundError:
        raise FileError(f"{path}: no such file") from None
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise FileError(f"{path} is damaged or truncated ({_reason(error)})") from error
    if not isinstance(header, dict) or header.get("kind") != kind:
        raise FileError(f"{path} is not a file of craft's with {kind}")
    check_version(header, path)
    return header


def check_version(header: Mapping[str, Any], path: Path) -> None:
    """Refuse a file of another format version than ours.

    Raises:
        OtherVersion: it has one, or none.
    """
    version = header.get("format_version")
    if version != FORMAT_VERSION:
        earlier = isinstance(version, int) and version < FORMAT_VERSION
        way_out = "it was written by an earlier craft, make it again" if earlier else "upgrade craft"
        raise OtherVersion(f"{path} has format version {quoted(version)}, this craft reads {FORMAT_VERSION}: {way_out}")


def read_tensors(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of a file of ours.

    Raises:
        FileError: there is no such file, it is damaged, or it is something else.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    header = read_header(path, kind)
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise FileError(f"{path} is damaged or truncated ({_reason(error)})") from error
    if checksum(tensors) != header.get("checksum"):
        raise FileError(f"{path} is damaged: its contents do not match their checksum")
    return tensors, header
