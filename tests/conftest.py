"""Pico models and data made on the spot: real files, no download, no data from outside."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads only get in each other's way on models this small

import hypothesis
import pytest
import torch
from loopback_hub import LoopbackHub
from picos import PICO
from typer.testing import CliRunner

import craft_cli as craft
from craft_cli.cli import app
from craft_cli.files import RUN, write_marker

hypothesis.settings.register_profile(
    "few", max_examples=25, deadline=None, derandomize=True, database=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
)  # fmt: skip
hypothesis.settings.register_profile(
    "many", hypothesis.settings.get_profile("few"), max_examples=500, derandomize=False
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "few"))

WORDS = [
    "the",
    "a",
    "this",
    "that",
    "film",
    "book",
    "meal",
    "room",
    "was",
    "is",
    "felt",
    "seems",
    "good",
    "great",
    "lovely",
    "fine",
    "bad",
    "awful",
    "poor",
    "dull",
    "and",
    "but",
    "not",
    "very",
    "rather",
    "never",
    "always",
    "quite",
]


def pytest_configure() -> None:
    """Signals that tests send do what they do on a terminal, also where the tests run in the background."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Every test in a folder of its own, with its own caches, away from the hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "120")
    torch.manual_seed(0)


def save_tokenizer(folder: Path) -> None:
    """A word-level tokenizer over `WORDS`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    vocabulary = {word: number for number, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]",
        model_max_length=40,
    ).save_pretrained(folder)  # fmt: skip


def build_pico(family: str, folder: Path, **changes: Any) -> Path:
    """Save a base model with random weights and a tokenizer; with `kind`, such as AutoModelForCausalLM, and its head."""
    import transformers
    from transformers import AutoConfig

    kind = getattr(transformers, changes.pop("kind", "AutoModel"))
    dtype = changes.pop("dtype", torch.float32)
    shards = changes.pop("max_shard_size", "1GB")
    torch.manual_seed(7)
    model = kind.from_config(AutoConfig.for_model(family, **(PICO[family] | changes)))
    with torch.no_grad():  # larger than the usual start, so that attention matters
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    model.to(dtype).save_pretrained(folder, max_shard_size=shards)
    save_tokenizer(folder)
    return folder


SPOKEN = "<|im_start|>", "<|im_end|>", "<|end|>"
"""Tokens of a pico language model's tokenizer beside the 256 bytes; the last ends a text and is its padding, as SmolLM2's is."""


def save_spoken(folder: Path, template: str | None = None) -> None:
    """A tokenizer of bytes, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from craft_cli.tasks.templates import CHATML

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate([*letters, *SPOKEN])}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    spoken = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=SPOKEN[-1], pad_token=SPOKEN[-1], extra_special_tokens=list(SPOKEN[:2]),
        model_max_length=160,
    )  # fmt: skip
    spoken.chat_template = CHATML if template is None else template or None
    spoken.save_pretrained(folder)


def build_pico_lm(family: str, folder: Path, **changes: Any) -> Path:
    """Save a language model with random weights and a tokenizer of bytes."""
    template = changes.pop("template", None)
    ids = {"vocab_size": 259, "bos_token_id": None, "eos_token_id": 258, "pad_token_id": 258}
    size = {"n_positions": 160} if family == "gpt2" else {"max_position_embeddings": 160}
    build_pico(family, folder, kind="AutoModelForCausalLM", **(ids | size | changes))
    save_spoken(folder, template)
    return folder


def made_once(build: Callable[..., Path], default: str, folders: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function of (family, **changes of the configuration) that builds each model once and gives its folder."""
    made: dict[str, Path] = {}

    def make(family: str = default, **changes: Any) -> Path:
        key = f"{family}-{changes}"
        if key not in made:
            made[key] = build(family, folders.mktemp(family), **changes)
        return made[key]

    return make


@pytest.fixture(scope="session")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Pico base models, see `made_once`."""
    return made_once(build_pico, "bert", tmp_path_factory)


@pytest.fixture(scope="session")
def pico_lm(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Pico language models, see `made_once`."""
    return made_once(build_pico_lm, "llama", tmp_path_factory)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def opinions(count: int, seed: int, *, pair: bool = False) -> list[dict[str, Any]]:
    """Rows in the columns of sst2 (or mrpc) whose label can be learned from one word."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        label = number % 2
        words = [*draw.choices(WORDS[:12], k=draw.randint(2, 12)), draw.choice(WORDS[13:16] if label else WORDS[17:20])]
        draw.shuffle(words)
        text = " ".join(words)
        rows.append(
            {"sentence1": text, "sentence2": "the film was", "label": label}
            if pair
            else {"sentence": text, "label": label}
        )
    return rows


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.jsonl (45 rows) and validation.jsonl (23 rows) in the columns of sst2."""
    folder = tmp_path_factory.mktemp("data")
    write_rows(folder / "train.jsonl", opinions(45, 1))
    write_rows(folder / "validation.jsonl", opinions(23, 2))
    return folder


def classifier(folder: Path, labels: int = 2, **options: Any) -> Any:
    """A classifier with a random head on a base model's folder, as a user of transformers would load it."""
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(3)
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=labels, **options).eval()


def shake(adapter: Any, scale: float = 0.3) -> None:
    """Give every transform a random K."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def token_batch(rows: int = 3, tokens: int = 9) -> dict[str, torch.Tensor]:
    """Token ids of the pico vocabulary with some padding at the end."""
    ids = torch.randint(3, 30, (rows, tokens), generator=torch.Generator().manual_seed(9))
    mask = torch.ones_like(ids)
    ids[:, 1] = 2  # T5's end of a text
    ids[-1, -3:], mask[-1, -3:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def tree() -> dict[str, bytes | None]:
    """Everything in the working folder but the caches."""
    found = [path for path in Path().rglob("*") if path.parts[0] != "cache"]
    return {str(path): path.read_bytes() if path.is_file() else None for path in found}


def failure(*arguments: str, lines: int = 1) -> str:
    """Run a command that must fail as errors do; gives what it says."""
    before = tree()
    result = invoke(*arguments)
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    told = result.stderr.splitlines()
    assert len(told) == lines, result.stderr
    assert all(line.startswith("error: ") for line in told)
    assert "Traceback" not in result.stderr
    assert "unexpected" not in result.stderr
    assert tree() == before
    return result.stderr


@pytest.fixture(scope="session")
def made(pico: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base model, data, and a run whose adapter changes something."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        shutil.copytree(pico(), "base")
        write_rows(Path("data/train.jsonl"), opinions(12, 1))
        write_rows(Path("data/validation.jsonl"), opinions(6, 2))
        adapter = craft.attach(classifier(Path("base")), craft.decompose("base", ranks="6,5,2", cache_dir="factors"))
        shake(adapter)
        adapter.save("run/adapter")
        Path("run/recipe.yaml").write_text("task: sst2\n")
        write_marker(Path("run"), RUN, ["recipe.yaml"])
    return folder


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy of it to damage, in the working folder."""
    for entry in ("base", "data", "run"):
        shutil.copytree(made / entry, tmp_path / entry)
    config = Path("run/adapter/adapter_config.json")
    content = json.loads(config.read_text())
    content["base_model"]["model"] = str(tmp_path / "base")
    config.write_text(json.dumps(content))
    return tmp_path / "run"


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    """A hub on this machine, for the duration of a test."""
    with LoopbackHub() as server:
        yield server


@pytest.fixture
def signed_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token for the hub on this machine, and none of the user's."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "no-token")
    monkeypatch.setenv("HF_TOKEN", "hf_loopback")


@pytest.fixture(scope="session")
def halves(pico: Callable[..., Path], data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run `uncut`, and a run `out` that was cut after 9 of 12 updates; checkpoints every 4."""
    from helpers import DROPOUT, Cut, config, cut

    folder = tmp_path_factory.mktemp("halves")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        craft.train(config(pico(**DROPOUT), data_dir, output_dir="uncut", save_steps=4, cache_dir="factors"))
        cut(config(pico(**DROPOUT), data_dir, save_steps=4, cache_dir="factors"), Cut(9))
    return folder


@pytest.fixture
def half(halves: Path, tmp_path: Path, pico: Callable[..., Path], data_dir: Path) -> Callable[..., Any]:
    """Copies of them in the working folder; a function of changed settings gives those to resume with."""
    from helpers import DROPOUT, config

    for name in ("uncut", "out"):
        shutil.copytree(halves / name, tmp_path / name)
    base = pico(**DROPOUT)
    return lambda **changed: config(base, data_dir, **({"resume": True, "save_steps": 4} | changed))


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The runs of sweeps cost next to nothing, and no pictures are drawn."""
    script = str(Path(__file__).parent / "pretend_training.py")
    monkeypatch.setattr("craft_cli.sweeps.work.TRAIN", (sys.executable, script, "--json"))
    monkeypatch.setattr("craft_cli.api.sweep.draw", lambda folder, results: None)
    monkeypatch.setenv("PRETEND_LOG", str(tmp_path / "starts"))


@pytest.fixture
def asked(data_dir: Path) -> Callable[..., Any]:
    """A function of (what is tried, **options) that asks for a sweep of short runs."""

    def ask(*sets: str, settings: dict[str, Any] | None = None, **options: Any) -> craft.SweepOptions:
        given = {"model": "base", "task": "sst2", "data_dir": str(data_dir), "use_cpu": True, "max_steps": 12}
        return craft.SweepOptions(given | (settings or {}), sets=sets, **{"output_dir": "out", **options})

    return ask
