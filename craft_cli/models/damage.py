"""One line for whatever a library raises when it reads what a stranger, or a failing disk, has written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from craft_cli.errors import CraftError, ModelError
from craft_cli.files import reason_of


@contextmanager
def told_in_one_line(what: str) -> Iterator[None]:
    """Turn every error inside into a `ModelError` that begins with `what`.

    Readers of damaged files raise errors of any type; what is written in Rust may even panic, which is no `Exception`.

    Raises:
        ModelError: anything but an error of ours.
    """
    try:
        yield
    except CraftError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if "trust_remote_code" in str(error):
            reason = "it needs Python code of its own, which runs only with --trust-remote-code: read it first"
        else:
            reason = reason_of(error)
        raise ModelError(f"{what}: {reason}") from error
