"""Writing so that nothing is ever half there, and reading so that damage is noticed."""

from craft_cli.files.folders import check_free, delete_folder, holds_something, tidy, whole_folder
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
from craft_cli.files.writing import LOCK_FILE, cache_folder, cannot_write, whole_file, write_bytes, write_json

__all__ = [
    "FORMAT_VERSION",
    "LOCK_FILE",
    "cache_folder",
    "cannot_write",
    "check_free",
    "check_version",
    "checksum",
    "delete_folder",
    "holds_something",
    "quoted",
    "raw_bytes",
    "read_header",
    "read_json",
    "read_tensors",
    "reason_of",
    "stamp",
    "tidy",
    "whole_file",
    "whole_folder",
    "write_bytes",
    "write_json",
    "write_tensors",
]
