"""Uploading a folder to the hub, only where the user asked for it."""

from __future__ import annotations

from pathlib import Path

from craft_cli.errors import CraftError


def upload(folder: Path, repository: str) -> None:
    """Make a model repository where there is none, and upload the folder as one commit.

    Raises:
        CraftError: no such name, no right to write there, or no connection; the folder stays where it is.
    """
    import huggingface_hub as hub

    bars = not hub.utils.are_progress_bars_disabled()
    hub.utils.disable_progress_bars()  # craft's own line says that it goes on
    try:
        api = hub.HfApi()
        api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload by craft merge")
    except Exception as error:  # whatever the hub's HTTP client of the day raises
        reasons = [error, *([error.__cause__] if error.__cause__ else [])]
        reason = ": ".join((str(one).strip() or type(one).__name__).splitlines()[0] for one in reasons)
        raise CraftError(
            f"--push-to-hub {repository}: {reason}; {folder} is written and whole: `hf auth login`, then "
            f"`hf upload {repository} {folder}`"
        ) from error
    finally:
        if bars:
            hub.utils.enable_progress_bars()
