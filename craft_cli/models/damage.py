"""One-line errors for exceptions of libraries that read damaged or untrusted files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from craft_cli.errors import CraftError, ModelError
from craft_cli.files import reason_of


@contextmanager
def told_in_one_line(what: str) -> Iterator[None]:
    """Convert every error in the block to a `ModelError` that starts with `what`.

    Readers of damaged files raise errors of any type. Rust code can even panic, which is not an `Exception`.

    Raises:
        ModelError: the block raised anything but a CraftError.
    """
    try:
        yield
    except CraftError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if "trust_remote_code" in str(error):
            reason = "it requires custom Python code, which runs only with --trust-remote-code; read the code first"
        else:
            reason = reason_of(error)
        raise ModelError(f"{what}: {reason}") from error
