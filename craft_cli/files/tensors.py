"""craft's tensor files.

Each is a safetensors file with one metadata entry, `craft`: a JSON object with the kind of file, the format version and a
checksum of the contents.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from craft_cli.errors import FileError, OtherVersion
from craft_cli.files.reading import cannot_read, quoted, read_unchanged, reason_of, stamp_or_none
from craft_cli.files.writing import write_bytes

FORMAT_VERSION = 3


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """The sha256 of all names, dtypes, shapes and values."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(raw_bytes(tensor))
    return digest.hexdigest()


def raw_bytes(tensor: Tensor) -> memoryview:
    """The raw bytes of a tensor in row-major order."""
    flat = tensor.detach().cpu().contiguous().flatten()
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]


def write_tensors(path: Path, kind: str, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write a tensor file atomically.

    Raises:
        FileError: the file cannot be written.
    """
    from safetensors.torch import save

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    full = {**header, "kind": kind, "format_version": FORMAT_VERSION, "checksum": checksum(tensors)}
    write_bytes(path, save(tensors, metadata={"craft": json.dumps(full)}))


def read_header(path: Path, kind: str) -> dict[str, Any]:
    """Read the header of a tensor file, without its tensors.

    Raises:
        FileError: the file does not exist, is damaged, or is of another kind.
    """
    return read_unchanged(path, lambda: stamp_or_none(path), lambda: _header(path, kind))


def _header(path: Path, kind: str) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with (
            open(path, "rb"),
            safe_open(path, framework="pt") as file,
        ):  # safetensors reports an unreadable file as missing
            header = json.loads((file.metadata() or {}).get("craft", "null"))
    except FileNotFoundError:
        raise FileError(f"{path}: no such file") from None
    except PermissionError as error:
        raise cannot_read(path, error) from error
    except (OSError, RuntimeError, SafetensorError, ValueError) as error:
        raise FileError(f"{path} is damaged or truncated ({reason_of(error)})") from error
    if not isinstance(header, dict) or header.get("kind") != kind:
        raise FileError(f"{path} is not a craft file with {kind}")
    check_version(header, path)
    return header


def check_version(header: Mapping[str, Any], path: Path) -> None:
    """Refuse a file with another format version.

    Raises:
        OtherVersion: the version differs or is missing.
    """
    version = header.get("format_version")
    if version != FORMAT_VERSION:
        earlier = isinstance(version, int) and version < FORMAT_VERSION
        way_out = "an earlier craft wrote it, create it again" if earlier else "upgrade craft"
        raise OtherVersion(
            f"{path} has format version {quoted(version)}, but this craft reads version {FORMAT_VERSION}: {way_out}"
        )


def read_tensors(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors and the header of a tensor file.

    Raises:
        FileError: the file does not exist, is damaged, or is of another kind.
    """
    return read_unchanged(path, lambda: stamp_or_none(path), lambda: _tensors(path, kind))


def _tensors(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    header = _header(path, kind)
    try:
        tensors = load_file(path)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise FileError(f"{path} is damaged or truncated ({reason_of(error)})") from error
    if checksum(tensors) != header.get("checksum"):
        raise FileError(f"{path} is damaged: its contents do not match the checksum")
    return tensors, header
