"""Uploading a folder to the hub, only where the user asked for it."""

from __future__ import annotations

import shlex
from pathlib import Path

from craft_cli.errors import CraftError

_REPLACED = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "adapter_config.json")
"""What an earlier upload may have left, and a loader would take before, or together with, the files of this one."""


def upload(folder: Path, repository: str, *, private: bool = False) -> None:
    """Make a model repository where there is none, and upload the folder as one commit in place of former weights.

    Args:
        folder: what to upload.
        repository: OWNER/NAME.
        private: make it a private one; one that is there stays as it is.

    Raises:
        CraftError: no such name, no right to write there, or no connection; the folder stays where it is.
    """
    import huggingface_hub as hub

    bars = not hub.utils.are_progress_bars_disabled()
    hub.utils.disable_progress_bars()  # craft's own line says that it goes on
    try:
        api = hub.HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message="Upload by craft merge",
            delete_patterns=list(_REPLACED),
        )
    except Exception as error:  # whatever the hub's HTTP client of the day raises
        reasons = [error, *([error.__cause__] if error.__cause__ else [])]
        reason = ": ".join((str(one).strip() or type(one).__name__).splitlines()[0] for one in reasons)
        raise CraftError(
            f"--push-to-hub {repository}: {reason}; {folder} is written and whole: `hf auth login`, then "
            f"`hf upload {repository} {shlex.quote(str(folder))}`"
        ) from error
    finally:
        if bars:
            hub.utils.enable_progress_bars()
