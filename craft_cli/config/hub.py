"""Whether the hub is asked at all, and how long it may take to answer."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

NOT_ASKED = "the hub is not asked (--offline, or HF_HUB_OFFLINE in the environment)"
_COPIES = ("huggingface_hub.constants", "datasets.config")
"""Modules that read HF_HUB_OFFLINE when they were imported."""


def patience() -> int:
    """Seconds that the hub may take to answer: HF_HUB_ETAG_TIMEOUT where the user sets it, or 5."""
    told = os.environ.get("HF_HUB_ETAG_TIMEOUT", "")
    return int(told) if told.isdigit() and int(told) else 5


@contextmanager
def offline() -> Iterator[None]:
    """Nothing in here asks the hub, nor do processes that are started in here: as HF_HUB_OFFLINE=1."""
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
    """Why the hub gave no answer, in a few words."""
    told = (str(error).strip() or type(error).__name__).splitlines()[0]
    if "timeout" in type(error).__name__.lower():
        told = f"no answer in {patience()} s"
    return told
