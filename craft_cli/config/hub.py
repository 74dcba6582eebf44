"""Offline mode and the timeout for requests to the Hub."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

NOT_ASKED = "offline mode is on (--offline, or HF_HUB_OFFLINE in the environment)"
_COPIES = ("huggingface_hub.constants", "datasets.config")
"""Modules that read HF_HUB_OFFLINE at import."""


def patience() -> int:
    """Timeout in seconds for the Hub: HF_HUB_ETAG_TIMEOUT if set, or 5."""
    timeout = os.environ.get("HF_HUB_ETAG_TIMEOUT", "")
    return int(timeout) if timeout.isdigit() and int(timeout) else 5


@contextmanager
def offline() -> Iterator[None]:
    """Work offline inside the block, including child processes, as with HF_HUB_OFFLINE=1."""
    before = os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    known = [sys.modules[name] for name in _COPIES if name in sys.modules]
    kept = [module.HF_HUB_OFFLINE for module in known]
    for module in known:
        module.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for module, value in zip(known, kept, strict=True):
            module.HF_HUB_OFFLINE = value  # type: ignore[attr-defined]
        os.environ.pop("HF_HUB_OFFLINE")
        if before is not None:
            os.environ["HF_HUB_OFFLINE"] = before


def unanswered(error: BaseException) -> str:
    """Why the Hub did not answer, in a few words."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if "timeout" in type(error).__name__.lower():
        reason = f"no answer in {patience()} s"
    return reason
