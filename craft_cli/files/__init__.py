"""Writing so that nothing is half there or lost, and reading so that damage is noticed."""

from craft_cli.files.folders import check_inputs, check_place, delete_folder, steadily, whole_folder, write_marker
from craft_cli.files.locks import Busy, locked, turn
from craft_cli.files.marker import (
    ADAPTER,
    CHECKPOINT,
    LOCK_FILE,
    MARKER,
    MERGED,
    RUN,
    SWEEP,
    foreign,
    holds_something,
    is_kind,
    read_marker,
)
from craft_cli.files.reading import quoted, read_json, reason_of, stamp
from craft_cli.files.tensors import (
    FORMAT_VERSION,
    check_version,
    checksum,
    raw_bytes,
    read_header,
    read_tensors,
    write_tensors,
)
from craft_cli.files.writing import cache_folder, cannot_write, hidden, tidy, whole_file, write_bytes, write_json

__all__ = [
    "ADAPTER",
    "CHECKPOINT",
    "FORMAT_VERSION",
    "LOCK_FILE",
    "MARKER",
    "MERGED",
    "RUN",
    "SWEEP",
    "Busy",
    "cache_folder",
    "cannot_write",
    "check_inputs",
    "check_place",
    "check_version",
    "checksum",
    "delete_folder",
    "foreign",
    "hidden",
    "holds_something",
    "is_kind",
    "locked",
    "quoted",
    "raw_bytes",
    "read_header",
    "read_json",
    "read_marker",
    "read_tensors",
    "reason_of",
    "stamp",
    "steadily",
    "tidy",
    "turn",
    "whole_file",
    "whole_folder",
    "write_bytes",
    "write_json",
    "write_marker",
    "write_tensors",
]
