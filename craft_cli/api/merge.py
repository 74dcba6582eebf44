"""Export a trained adapter: a plain Hugging Face checkpoint, a LoRA for PEFT or llama.cpp, or the adapter to share.

The base is read and written tensor by tensor, so that checkpoints larger than memory can be merged. The output is compared
with the adapted model before it is moved into place, and its `merge.json` records what it was made from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from craft_cli.api.certificate import CERTIFICATE, Difference, certificate, continued, verified, versions
from craft_cli.api.serving import checkpoint_commands, gguf_commands, gguf_hint, lora_commands, lora_hint
from craft_cli.config import THRESHOLD
from craft_cli.errors import ConfigError, CraftError, FileError
from craft_cli.files import (
    MARKER,
    MERGED,
    cannot_write,
    check_inputs,
    read_content,
    read_json,
    read_marker,
    whole_folder,
    write_bytes,
    write_json,
)
from craft_cli.methods.adapter_folder import CONFIG_FILE, HEAD, INCLUDE, SavedAdapter, read_adapter, write_adapter
from craft_cli.methods.as_dense import AdaptedBase, Dense
from craft_cli.methods.as_gguf import GgufWriter, base_gguf, check_known, write_modelfile
from craft_cli.methods.as_lora import EXACT, LoraWriter
from craft_cli.models.cards import HEADLESS, model_card, public_name, without_folders
from craft_cli.models.checkpoint import CHAT_TEMPLATE, GENERATION, Checkpoint
from craft_cli.models.hub import before_upload, upload
from craft_cli.models.loading import load_tokenizer
from craft_cli.models.shards import shard_bytes
from craft_cli.tasks.templates import end_tokens
from craft_cli.training.find import find_run
from craft_cli.training.run import find_adapter

TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Maximum difference between merged and adapted logits, relative to the largest logit. The adapted model is computed in
float32, so the merged one differs by the rounding of its weights."""

CHECKPOINT, PEFT, GGUF, ADAPTER = FORMATS = "checkpoint", "peft", "gguf", "adapter"
LORAS = (PEFT, GGUF)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
Written = Dense | LoraWriter | GgufWriter
Notice = Callable[[str], None]
Announce = Callable[[Checkpoint], None]


@dataclass(frozen=True)
class _Asked:
    """The export options; see `merge`."""

    format: str
    dtype: str | None
    max_shard_size: str | int | None
    trim: bool
    tolerance: float | None
    head: bool


@dataclass(frozen=True)
class Merged:
    """The result of `merge`.

    Attributes:
        output: the output folder.
        format: `checkpoint`, `peft`, `gguf` or `adapter`.
        files: names of its files.
        dtype: dtype of the weights: the base's unless another was requested; for a LoRA float32, or float16 as a GGUF.
        tensors_changed: number of weights that differ from the base's.
        difference: largest difference between merged and adapted logits, relative to the largest logit.
        tolerance: the allowed difference.
        greedy: for a language model, the number of equal tokens in greedy continuations, and the total.
        threshold: threshold of a multi-label task; None for the default of 0.5.
        rank: rank of a LoRA.
        serve: commands to run the output with vLLM, llama.cpp or Ollama, by program.
        hint: further notes about serving it.
        repository: Hub repository of the upload.
    """

    output: str
    format: str
    files: tuple[str, ...]
    dtype: str
    tensors_changed: int
    difference: float
    tolerance: float
    greedy: tuple[int, int] | None = None
    threshold: float | None = None
    rank: int | None = None
    serve: Mapping[str, str] = field(default_factory=dict)
    hint: str | None = None
    repository: str | None = None


def merge(
    path: str | Path | None = None,
    output_dir: str | Path | None = None,
    *,
    overwrite: bool = False,
    format: str = CHECKPOINT,
    dtype: str | None = None,
    max_shard_size: str | int | None = None,
    trim: bool = False,
    tolerance: float | None = None,
    head: bool = True,
    push_to_hub: str | None = None,
    private: bool = False,
    trust_remote_code: bool = False,
    allow_other_base: bool = False,
    progress: Callable[[str], None] = lambda what: None,
    notice: Callable[[str], None] = lambda what: None,
) -> Merged:
    """Merge an adapter into the dense weights of its base, export it as a LoRA, or copy it.

    A checkpoint has the weights in the base's dtype, the trained head, the label names, and byte-identical tokenizer
    files. A LoRA has the same update and head in PEFT's format. Either is read back, and its logits are compared with
    those of the adapted model before it is moved into place. A copy of the adapter includes its factors.

    Args:
        path: a run, an adapter, or the Hub id OWNER/NAME of an adapter. Default: the latest run.
        output_dir: the output folder. Default: `merged` (`peft`, `adapter-copy`) inside the run or next to the adapter,
            `merged-step-N` for a checkpoint of a run, and `NAME-merged` in the working folder for a Hub adapter.
        overwrite: replace the output of an earlier merge.
        format: `checkpoint`, `peft`, `gguf` (a LoRA for llama.cpp and Ollama, of a language model) or `adapter`.
        dtype: dtype of a checkpoint's weights: `float32`, `float16` or `bfloat16`. Default: the base's. For a GGUF
            `float32` (default) or `float16`.
        max_shard_size: maximum size of a weight file. Default: `5GB`.
        trim: for a LoRA, drop directions that are zero to numerical precision.
        tolerance: for a LoRA, the allowed error of a dense update (superlora), relative to its norm. Default: 1e-6. The
            logits may then differ by the same amount.
        head: False omits the trained head of a LoRA, for servers that do not support it.
        push_to_hub: also upload to this Hub repository.
        private: if the repository is created, make it private.
        trust_remote_code: run Python code from the base's repository.
        allow_other_base: accept a base that has changed since the training.
        progress: called with a description of the current step.
        notice: called with notes about an upload.

    Raises:
        ConfigError: options cannot be combined, or have invalid values.
        FileError: there is no adapter, it is damaged, or the output cannot be written.
        ModelError: the base is missing or has changed, or llama.cpp does not support it.
        CraftError: the adapter changes no weight, the output differs from the adapted model, or the upload failed.
    """
    asked = _Asked(format, dtype, max_shard_size, trim, tolerance, head)
    _check_options(asked, push_to_hub, private=private)
    found = find_run(None if path is None else str(path))
    adapter_path = find_adapter(found)
    if adapter_path is None:
        raise FileError(f"{found} is neither a run nor an adapter, so there is nothing to merge")
    destination = _destination(output_dir, found, adapter_path, format)
    check_inputs("--output-dir", destination, [found, adapter_path])
    announce = partial(_announce, push_to_hub, private, notice) if push_to_hub else None
    if format == ADAPTER:
        saved = read_adapter(adapter_path, make=True, trusted=trust_remote_code)
        result = _copy(saved, destination, announce, overwrite=overwrite)
    else:
        permitted = {"trust_remote_code": trust_remote_code, "allow_other_base": allow_other_base}
        result = _merge(adapter_path, destination, asked, permitted, progress, announce, overwrite=overwrite)
    if push_to_hub:
        progress("uploading")
        upload(destination, result.files, push_to_hub, private=private)
        result = replace(result, repository=push_to_hub)
    return result


def _announce(repository: str, private: bool, notice: Notice, base: Checkpoint) -> None:
    """Check before writing that the upload is possible, and report its visibility."""
    if seen_by := before_upload(repository, base, private=private):
        notice(seen_by)


def _merge(
    adapter_path: Path,
    destination: Path,
    asked: _Asked,
    permitted: Mapping[str, bool],
    progress: Callable[[str], None],
    announce: Announce | None,
    *,
    overwrite: bool,
) -> Merged:
    """Write a checkpoint or a LoRA and compare it with the adapted model; `announce` is called if it is uploaded."""
    with whole_folder(destination, MERGED, overwrite=overwrite) as folder:
        progress("reading the adapter")
        saved = read_adapter(adapter_path, make=True, trusted=permitted["trust_remote_code"])
        adapted = AdaptedBase(saved, **permitted)
        check_inputs("--output-dir", destination, [adapted.checkpoint.folder])
        if announce:
            announce(adapted.checkpoint)
        if asked.format == GGUF:
            check_known(adapted)
        progress("computing reference logits")
        probe = continued(adapted)
        progress("writing")
        written = _write(adapted, folder, asked)
        _let_it_speak(adapted, folder, asked.format)
        allowed = max(TOLERANCE[written.dtype], asked.tolerance or 0.0)
        progress("verifying")
        difference = verified(adapted.base.logits(written.read, probe.batch), probe, allowed)
        _add_beside(adapted, folder, asked, shared=announce is not None)
        write_json(folder / CERTIFICATE, certificate(adapted, written, folder, difference, allowed))
    return _told(adapted, written, destination, asked, difference, allowed)


def _copy(saved: SavedAdapter, destination: Path, announce: Announce | None, *, overwrite: bool) -> Merged:
    """Copy the adapter with its factors; a shared copy contains no local paths."""
    base = saved.record["base_model"]
    checkpoint = Checkpoint(base["model"], base["revision"], saved.path)
    local, frozen, record = Path(base["model"]).is_absolute(), saved.frozen, dict(saved.record)
    if "factors" in record:
        record["factors"] = {**record["factors"], "stored": INCLUDE}
    if announce:
        announce(checkpoint)
        record, frozen = without_folders(record), replace(frozen, model=without_folders(frozen.model))
    card = saved.path / "README.md"
    described = saved.method.describe(record)
    text = read_content(card).decode(errors="replace") if card.is_file() else model_card(record, described, checkpoint)
    with whole_folder(destination, MERGED, overwrite=overwrite) as folder:
        trained = dict(saved.trained) | {HEAD + name: tensor for name, tensor in saved.head.items()}
        write_adapter(folder, record, trained, frozen, text)
        copied = {"adapter": {"sha256": saved.sha256}, "versions": versions()}
        write_json(folder / CERTIFICATE, copied)
        files = tuple(sorted(file.name for file in folder.iterdir() if file.name != MARKER))
    return Merged(
        output=str(destination),
        format=ADAPTER,
        files=files,
        dtype="float32",
        tensors_changed=sum(shape[0] for shape in saved.frozen.shapes.values()),
        difference=0.0,
        tolerance=0.0,
        hint="its base is a local folder; others can attach it to their own model with craft.load" if local else None,
    )


def _add_beside(adapted: AdaptedBase, folder: Path, asked: _Asked, *, shared: bool) -> None:
    """Write the model card, and Ollama's Modelfile for a GGUF; a shared LoRA does not contain the local path of its base."""
    record = adapted.saved.record
    form = HEADLESS if adapted.saved.head and not asked.head else asked.format
    card = model_card(record, adapted.saved.method.describe(record), adapted.checkpoint, form=form)
    write_bytes(folder / "README.md", card.encode(errors="backslashreplace"))
    if shared and asked.format == PEFT:
        config = read_json(folder / CONFIG_FILE) | {"base_model_name_or_path": public_name(adapted.checkpoint)}
        write_json(folder / CONFIG_FILE, config)
    if asked.format == GGUF:
        write_modelfile(folder, None if shared else base_gguf(adapted))


def _told(
    adapted: AdaptedBase, written: Written, destination: Path, asked: _Asked, difference: Difference, allowed: float
) -> Merged:
    marker, folder = read_marker(destination), str(destination)
    serve, hint = checkpoint_commands(adapted, folder), None
    if isinstance(written, GgufWriter):
        serve, hint = gguf_commands(adapted, folder), gguf_hint(adapted)
    elif written.rank is not None:
        serve = lora_commands(adapted, written.rank, folder, head=asked.head)
        hint = lora_hint(adapted, written.rank, head=asked.head)
    return Merged(
        output=folder,
        format=asked.format,
        files=tuple(sorted(marker.files)) if marker else (),
        dtype=str(written.dtype).removeprefix("torch."),
        tensors_changed=len(written.changed),
        difference=difference.relative,
        tolerance=allowed,
        greedy=difference.greedy,
        threshold=None if adapted.threshold == THRESHOLD else adapted.threshold,
        rank=written.rank,
        serve=serve,
        hint=hint,
    )


def _destination(output: str | Path | None, found: Path, adapter: Path, format: str) -> Path:
    """The output folder: as given, inside the run, next to the adapter, or in the working folder for a Hub adapter."""
    name = {CHECKPOINT: "merged", PEFT: "peft", GGUF: "gguf", ADAPTER: "adapter-copy"}[format]
    default = adapter.parent / name
    if not found.exists():
        default = Path(f"{found.name}-{name}")
    elif adapter.parent.name == "checkpoints":  # a checkpoint of a run, which has several to merge
        default = adapter.parent.parent / f"{name}-{adapter.name}"
    return Path(output).expanduser() if output else default


def _write(adapted: AdaptedBase, folder: Path, asked: _Asked) -> Written:
    """Write the update in one of the three formats to `folder`.

    Raises:
        CraftError: it cannot be written, or no weight changes.
    """
    dtype, tolerance = DTYPES.get(asked.dtype or ""), EXACT if asked.tolerance is None else asked.tolerance
    try:
        if asked.format == CHECKPOINT:
            written: Written = Dense(adapted, folder, dtype, asked.max_shard_size)
        elif asked.format == GGUF:
            written = GgufWriter(adapted, folder, dtype or torch.float32, trim=asked.trim, tolerance=tolerance)
        else:
            written = LoraWriter(adapted, folder, trim=asked.trim, tolerance=tolerance, head=asked.head)
    except OSError as error:
        raise cannot_write(folder, error) from error
    trained_head = bool(adapted.saved.head and adapted.saved.record.get("training"))
    if not written.changed and trained_head and not asked.head and not adapted.changes_something():
        raise CraftError(
            f"{adapted.saved.path}: --no-head leaves nothing to export, because only the head was trained; remove it"
        )
    if not written.changed and (adapted.changes_something() or not trained_head):
        raise CraftError(
            f"{adapted.saved.path}: merging changes no tensor, because the trained parameters are (or round to) zero"
        )
    return written


def _let_it_speak(adapted: AdaptedBase, folder: Path, format: str) -> None:
    """For a chat model: write the chat template of the training, and make generation end with a turn.

    Other tools end an answer only by generation_config.json. It is kept byte-identical if it already has that token.
    """
    if not adapted.talks:
        return
    if adapted.chat_template:
        write_bytes(folder / CHAT_TEMPLATE, adapted.chat_template.encode())
    if format != CHECKPOINT:
        return
    path = folder / GENERATION
    content = read_json(path) if path.is_file() else {}
    named = content.get("eos_token_id", adapted.base.model.config.eos_token_id)
    known = named if isinstance(named, list) else [] if named is None else [named]
    if missing := [
        token for token in end_tokens(load_tokenizer(adapted.checkpoint), adapted.chat_template) if token not in known
    ]:
        write_json(path, content | {"eos_token_id": [*known, *missing]})


def _check_options(asked: _Asked, push_to_hub: str | None, *, private: bool) -> None:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    format, dtype, max_shard_size, tolerance = asked.format, asked.dtype, asked.max_shard_size, asked.tolerance
    if format not in FORMATS:
        raise ConfigError(f"--format: expected {', '.join(FORMATS[:-1])} or {ADAPTER}, not '{format}'")
    if format == ADAPTER and (dtype or max_shard_size is not None or asked.trim or tolerance is not None):
        raise ConfigError(
            "--dtype, --max-shard-size, --trim and --tolerance do not apply to --format adapter, which copies the adapter unchanged"
        )
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"--dtype: expected {', '.join(DTYPES)}, not '{dtype}'")
    if format == PEFT and dtype:
        raise ConfigError("--dtype is not for --format peft; that LoRA is written in float32")
    if format == GGUF and dtype == "bfloat16":
        raise ConfigError("--dtype: a LoRA for llama.cpp is float32 or float16, not 'bfloat16'")
    if format in LORAS and max_shard_size is not None:
        raise ConfigError("--max-shard-size is for checkpoints; a LoRA is one small file")
    shard_bytes(max_shard_size)
    if format != PEFT and not asked.head:
        raise ConfigError(
            "--no-head is for --format peft; "
            + {CHECKPOINT: "a checkpoint keeps its head", GGUF: "a language model has no trained head"}.get(
                format, "an adapter keeps its head"
            )
        )
    if private and not push_to_hub:
        raise ConfigError("--private requires --push-to-hub")
    if format == CHECKPOINT and asked.trim:
        raise ConfigError("--trim is for --format peft and gguf; a checkpoint has no rank")
    if format == CHECKPOINT and tolerance is not None:
        raise ConfigError("--tolerance is for --format peft and gguf; a checkpoint has the exact update")
    if tolerance is not None and not 0 < tolerance < 1:
        raise ConfigError(f"--tolerance: expected a number above 0 and below 1, not {tolerance:g}")
    if push_to_hub is not None:  # checked before the work
        try:
            validate_repo_id(push_to_hub)
        except HFValidationError as error:
            raise ConfigError(f"--push-to-hub: expected OWNER/NAME, not '{push_to_hub}'") from error
