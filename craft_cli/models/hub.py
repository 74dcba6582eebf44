"""Finding a checkpoint, on this machine or on the hub, and uploading a folder where the user asked for it."""

from __future__ import annotations

import glob
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from craft_cli.config.hub import NOT_ASKED, patience, unanswered
from craft_cli.errors import ConfigError, CraftError, ModelError
from craft_cli.models.checkpoint import (
    ADAPTER,
    CARD,
    CONFIG,
    GENERATION,
    VOCABULARIES,
    WEIGHTS,
    Checkpoint,
    matches,
    tokenizer_patterns,
    weight_map,
)
from craft_cli.models.demo import DEMOS, demo_folder
from craft_cli.models.views import View

_REPLACED = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "adapter_config.json")
"""Files of an earlier upload that a loader would prefer to, or mix with, the new ones."""


def before_upload(repository: str, base: Checkpoint, *, private: bool) -> str | None:
    """A note about the visibility of the upload, for before the work; None if it is unknown.

    Raises:
        ConfigError: `private` is set but the repository exists and is public, or offline mode is on.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise ConfigError(f"--push-to-hub: {NOT_ASKED}; remove one of them")
    there, visible = _is_private(repository), not private
    if there is not None:
        visible = not there
    if private and there is False:
        raise ConfigError(
            f"--private: {repository} already exists and is public; make it private on its settings page, or choose another name"
        )
    if not visible:
        return None if private else f"{repository} is private and stays private; others cannot load it"
    note = f"{repository} {'will be created as' if there is None else 'is'} public: everyone can read the upload"
    if base.revision and _is_private(base.name):
        note += f", and its base {base.name} is private"
    return note + (" (--private creates it as private)" if there is None else "")


def _is_private(repository: str) -> bool | None:
    """Whether a model repository is private; None if it is missing, hidden, or the Hub is unreachable."""
    import huggingface_hub as hub

    try:
        return bool(hub.HfApi().model_info(repository, timeout=patience()).private)
    except Exception:  # any error of the Hub's HTTP client; the upload reports the problem
        return None


def upload(folder: Path, files: Sequence[str], repository: str, *, private: bool = False) -> None:
    """Create a model repository if needed, and upload files in one commit that replaces earlier weights.

    Other files of the repository are kept: all files in subfolders, and at the top everything but `_REPLACED`.

    Args:
        folder: folder of the files.
        files: file names.
        repository: OWNER/NAME.
        private: create the repository as private; an existing one is not changed.

    Raises:
        CraftError: the name is invalid, access is denied, or there is no connection; the folder is kept.
    """
    import huggingface_hub as hub

    bars = not hub.utils.are_progress_bars_disabled()
    hub.utils.disable_progress_bars()  # craft shows its own progress
    try:
        api = hub.HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        stale = [
            name
            for name in api.list_repo_files(repository)
            if "/" not in name and matches(name, _REPLACED) and name not in files
        ]
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message="Upload by craft merge",
            allow_patterns=[glob.escape(name) for name in files],
            delete_patterns=[glob.escape(name) for name in stale] or None,
        )
    except Exception as error:  # any error of the Hub's HTTP client
        reasons = [error, *([error.__cause__] if error.__cause__ else [])]
        reason = ": ".join((str(one).strip() or type(one).__name__).splitlines()[0] for one in reasons)
        raise CraftError(
            f"--push-to-hub {repository}: {reason}; {folder} is complete: run `hf auth login`, then "
            f"`hf upload {repository} {shlex.quote(str(folder))}`"
        ) from error
    finally:
        if bars:
            hub.utils.enable_progress_bars()


def resolve(
    model: str,
    revision: str | None = None,
    *,
    only: Callable[[Any], Iterable[View]] | None = None,
    trust_remote_code: bool = False,
) -> Checkpoint:
    """Resolve a base checkpoint to a local folder, downloading it if needed.

    A checkpoint in the Hub cache is used without contacting the Hub. Otherwise configuration, tokenizer and weights are
    downloaded; with `only`, just the configuration and the shards with these views.

    Args:
        model: hub id, folder, `demo` or `demo-llm`.
        revision: of a hub model.
        only: the views that are needed.
        trust_remote_code: whether the user lets Python code in it run.

    Raises:
        ModelError: the checkpoint does not exist, cannot be downloaded, or is invalid.
    """
    if model in DEMOS:
        return Checkpoint(model, None, demo_folder(model))
    folder = local_path(model)
    if folder.is_dir():
        if not (folder / CONFIG).is_file():
            raise ModelError(f"{model} has no config.json, so it is not a Hugging Face checkpoint")
        if (folder / ADAPTER).is_file():  # which may even refer to another base
            raise ModelError(
                f"{model} has {ADAPTER} next to its weights, so transformers would load that adapter on top: "
                "move the adapter's files to another folder"
            )
        return Checkpoint(str(folder.resolve()), None, folder.resolve(), trust_remote_code)
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise ModelError(f"{model}: no such folder")
    return _from_hub(model, revision, only, trusted=trust_remote_code)


def local_path(given: str | Path) -> Path:
    """The path given by the user, which may or may not exist.

    Raises:
        ModelError: the path is invalid: a name that is too long, an unknown home, or a folder without access.
    """
    try:
        path = Path(given).expanduser()
        (path / CONFIG).is_file()
    except (OSError, RuntimeError) as error:
        reason, name = getattr(error, "strerror", None) or str(error), str(given)
        raise ModelError(f"'{name[:80]}{'...' * (len(name) > 80)}' names no folder ({reason})") from error
    return path


def is_hub_id(name: str) -> bool:
    """Whether a name can be OWNER/NAME of a hub repository."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    with suppress(HFValidationError):
        validate_repo_id(name)
        return name.isascii() and name.count("/") == 1
    return False


def checkpoint_folder(model: str | Path, revision: str | None = None) -> Path:
    """The folder of a checkpoint on this machine, for `from_pretrained`: of a demo model, a folder, or a hub id, then fetched.

    Raises:
        ModelError: the checkpoint does not exist, cannot be downloaded, or is invalid.
    """
    return resolve(str(model), revision).folder


def _needed_shards(index: Path, views: Iterable[View] | None) -> set[str]:
    files = weight_map(index)
    if views is None:
        return set(files.values())
    suffixes = tuple(f"{view.module}.weight" for view in views)
    return {file for name, file in files.items() if name.endswith(suffixes)}


def _from_hub(
    model: str, revision: str | None, only: Callable[[Any], Iterable[View]] | None, *, trusted: bool
) -> Checkpoint:
    import huggingface_hub as hub
    from huggingface_hub import errors

    def views(folder: Path) -> list[View] | None:
        return list(only(Checkpoint(model, None, folder, trusted).config())) if only else None

    try:
        folder = Path(hub.hf_hub_download(model, "config.json", revision=revision, local_files_only=True)).parent
        if _complete(folder, views(folder)) and not (trusted and _lacks_code(folder)):
            return Checkpoint(model, folder.name, folder, trusted)
        revision = folder.name
    except errors.LocalEntryNotFoundError:
        pass
    except errors.HFValidationError as error:
        raise ModelError(f"'{model}' is neither a folder nor a hub id (name or owner/name)") from error

    with _explained(model, revision, "config.json, so transformers cannot load it"):
        info = hub.HfApi().model_info(model, revision=revision, timeout=patience())
        files = {sibling.rfilename for sibling in info.siblings or []}

        def fetch(file: str) -> Path:
            return Path(hub.hf_hub_download(model, file, revision=info.sha, etag_timeout=patience()))

        # by branch name, so that the cache records the commit of the branch
        folder = Path(hub.hf_hub_download(model, "config.json", revision=revision, etag_timeout=patience())).parent
        if folder.name != info.sha:  # the branch was updated in between
            info = hub.HfApi().model_info(model, revision=folder.name, timeout=patience())
            files = {sibling.rfilename for sibling in info.siblings or []}
        needed = views(folder)
        if needed is None:
            for file in {CARD, GENERATION} & files:
                fetch(file)
            if "tokenizer_config.json" in files:
                fetch("tokenizer_config.json")  # names the class, which lists the other files
            names = tokenizer_patterns(folder, trusted=trusted)
            tokenizer = [file for file in files if matches(file, names)]
            for file in sorted(tokenizer, key=lambda file: matches(file, VOCABULARIES)):  # last, see _complete
                fetch(file)
        for name in WEIGHTS:
            if name in files:
                fetch(name)
                break
            if f"{name}.index.json" in files:
                for shard in sorted(_needed_shards(fetch(f"{name}.index.json"), needed)):
                    fetch(shard)
                break
    return Checkpoint(model, info.sha, folder, trusted)


def fetch_files(name: str, files: Sequence[str], revision: str | None = None) -> Path | None:
    """Download only some files of a Hub repository; files in the cache are used without contacting the Hub.

    Args:
        name: OWNER/NAME.
        files: file names; the first one identifies the kind of repository.
        revision: branch, tag or commit.

    Returns:
        The folder; None if the first file is missing.

    Raises:
        ModelError: the repository does not exist, lacks another file, or the Hub cannot be reached.
    """
    import huggingface_hub as hub

    def cached(file: str) -> Path | None:
        found = hub.try_to_load_from_cache(name, file, revision=revision)
        return Path(found) if isinstance(found, str) else None

    here = [cached(file) for file in files]
    if here[0] and all(here):
        return here[0].parent
    if not here[0] and cached("config.json"):  # a checkpoint in the cache
        return None
    with _explained(name, revision, f"{' or '.join(files[1:])}, so the adapter is incomplete"):
        info = hub.HfApi().model_info(
            name, revision=revision, timeout=patience()
        )  # a download would retry for a long time
        if files[0] not in {sibling.rfilename for sibling in info.siblings or []}:
            return None
        # by branch name, so that the cache records the commit of the branch
        folder = Path(hub.hf_hub_download(name, files[0], revision=revision, etag_timeout=patience())).parent
        for file in files[1:]:
            hub.hf_hub_download(name, file, revision=folder.name, etag_timeout=patience())
    return folder


@contextmanager
def _explained(name: str, revision: str | None, lacking: str) -> Iterator[None]:
    """Convert failures of the Hub to one-line errors.

    Args:
        name: repository.
        revision: requested revision.
        lacking: name of the missing file, for the error.

    Raises:
        ModelError: the block raised any error.
    """
    from huggingface_hub import errors

    where = f"'{name}'" + (f" at revision '{revision}'" if revision else "")
    try:
        yield
    except errors.GatedRepoError as error:
        raise ModelError(f"hub model {where} is gated: request access on its page, then run `hf auth login`") from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"there is no folder and no hub model {where} (for a private model, run `hf auth login`)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(f"hub model '{name}' has no revision '{revision}'") from error
    except errors.RemoteEntryNotFoundError as error:
        raise ModelError(f"hub model {where} has no {lacking}") from error
    except ModelError:
        raise
    except Exception as error:  # any error of the Hub's HTTP client
        if isinstance(error, errors.OfflineModeIsEnabled):
            why, way = NOT_ASKED, "turn it off once"
        else:
            why, way = f"the hub cannot be reached ({unanswered(error)})", "connect once"
        raise ModelError(
            f"{where} is neither a folder nor in the hub cache, and {why}; {way}, or pass a local folder"
        ) from error


def _lacks_code(folder: Path) -> bool:
    """Whether a snapshot lacks the Python code that its configuration refers to."""
    names = (folder / "config.json", folder / "tokenizer_config.json")
    return any(path.is_file() and b'"auto_map"' in path.read_bytes() for path in names) and not any(folder.glob("*.py"))


def _complete(folder: Path, views: Sequence[View] | None) -> bool:
    """Whether a snapshot in the Hub cache is complete; vocabularies are downloaded last."""
    if views is None and not any(matches(path.name, VOCABULARIES) for path in folder.iterdir()):
        return False
    for name in WEIGHTS:
        if (folder / name).is_file():
            return True
        if (folder / f"{name}.index.json").is_file():
            return all((folder / shard).is_file() for shard in _needed_shards(folder / f"{name}.index.json", views))
    return False
