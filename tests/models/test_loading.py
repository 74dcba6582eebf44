"""Base folders from anywhere: no code of theirs runs, and what is damaged or contradicts itself is one line."""

from __future__ import annotations

import json
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WORDS, build_pico, classifier, failure, invoke, shake
from helpers import flags
from safetensors.torch import load_file, save_file

import craft_cli as craft
from craft_cli.api.predictor import load_predictor
from craft_cli.config import RunConfig
from craft_cli.errors import ConfigError, ModelError
from craft_cli.models.checkpoint import Checkpoint
from craft_cli.models.hub import resolve
from craft_cli.models.loading import load_model, load_tokenizer

CODE = """
from pathlib import Path
Path("PROOF").write_text("ran")
from transformers import BertConfig, PreTrainedTokenizerFast
class Config(BertConfig):
    model_type = "bert"
class Tokenizer(PreTrainedTokenizerFast):
    pass
"""
CLASS = "AutoModelForSequenceClassification"


@pytest.fixture
def base(pico: Callable[..., Path]) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(pico(), "base"))


def edit(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | changes))


def load(folder: Path) -> Any:
    checkpoint = resolve(str(folder))
    load_tokenizer(checkpoint)
    return load_model(checkpoint, CLASS, {"num_labels": 2})[0]


@pytest.mark.parametrize("where", ["config", "tokenizer"])
def test_code_of_a_base_runs_only_where_the_user_says_so(
    base: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(*arguments: Any) -> str:
        raise AssertionError("asked on standard input")

    monkeypatch.setattr("builtins.input", ask)
    (base / "code.py").write_text(CODE)
    if where == "config":
        edit(base / "config.json", model_type="strange", auto_map={"AutoConfig": "code.Config"})
        with pytest.raises(ModelError, match="--trust-remote-code"):
            load(base)
    else:
        code = [None, "code.Tokenizer"]
        edit(base / "tokenizer_config.json", tokenizer_class="Strange", auto_map={"AutoTokenizer": code})
        load(base)  # transformers has one for this family
    assert not Path("PROOF").exists()
    if where == "config":
        assert resolve(str(base), trust_remote_code=True).config().hidden_size == 24
        assert Path("PROOF").exists()


def test_commands_that_look_at_a_model_run_its_code_only_with_the_flag(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        monkeypatch.delitem(sys.modules, name)  # another test may have imported code of this name
    (base / "code.py").write_text(CODE)
    edit(base / "config.json", auto_map={"AutoConfig": "code.Config"})
    commands = (
        ["decompose", "base", "--ranks", "6,5,2", "--cache-dir", "factors"],
        ["inspect", "base", "--ranks", "6,5,2"],
        ["inspect", "base", "--budget", "200"],
        ["methods", "--model", "base"],
    )
    for command in commands:
        assert invoke(*command).exit_code == 0  # transformers has a class for this family
        assert not Path("PROOF").exists()
    edit(base / "config.json", attn_implementation="someone/kernel")
    for command in commands:
        assert "only with --trust-remote-code" in failure(*command)
        done = invoke(*command, "--trust-remote-code")
        assert done.exit_code == 0, done.stderr
    assert Path("PROOF").exists()


def test_the_permission_is_the_users_alone() -> None:
    for name in ("trust_remote_code", "allow_other_base"):
        for recipe, former in (({name: True}, {}), ({}, {name: True})):
            with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')}"):
                RunConfig.build({"task": "sst2"}, recipe, former)
        assert name not in RunConfig.build({"task": "sst2", name: True}).recipe()


def test_kernels_of_the_hub_are_code_too(base: Path) -> None:
    edit(base / "config.json", attn_implementation="someone/kernel")
    with pytest.raises(ModelError, match="attn_implementation refers to code on the Hub"):
        load(base)


BOMBS = {
    "num_hidden_layers": 300_000_000, "num_labels": 900_000_000, "vocab_size": 2_000_000_000,
    "max_position_embeddings": 2_000_000_000, "hidden_size": 1 << 40, "type_vocab_size": 1 << 62,
    "intermediate_size": 33, "num_attention_heads": 0, "hidden_act": "../x", "layer_norm_eps": None, "model_type": 5,
}  # fmt: skip


@pytest.fixture
def little_memory() -> Iterator[None]:
    """At most 3 GB more than now."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmSize")]
    resource.setrlimit(resource.RLIMIT_AS, (int(line.split()[1]) * 1024 + (3 << 30), limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("name", BOMBS)
def test_a_config_that_cannot_be_is_one_line_and_takes_no_memory(base: Path, name: str) -> None:
    edit(base / "config.json", **{name: BOMBS[name]})
    told = []
    for use in (load_tokenizer, lambda checkpoint: load_model(checkpoint, CLASS, {"num_labels": 2})):
        try:
            use(resolve(str(base)))
        except ModelError as error:
            told.append(str(error))
    assert told
    for line in told:
        assert line.isprintable()
        assert len(line) < 500
        assert "emory" not in line


def test_a_pickled_tensor_that_claims_to_be_huge(base: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    huge = torch.zeros(1).as_strided((1_000_000, 1_000_000), (0, 0))
    torch.save({name: huge if "query.weight" in name else tensor for name, tensor in tensors.items()},
               base / "pytorch_model.bin")  # fmt: skip
    with pytest.raises(ModelError, match="is not a tensor in the file"):
        craft.decompose(str(base), ranks="2,2,1")


def test_a_pickle_that_runs_something_is_refused(base: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return Path.touch, (Path("PROOF"),)

    (base / "model.safetensors").unlink()
    torch.save({"x": Evil()}, base / "pytorch_model.bin")
    for use in (load, lambda folder: craft.decompose(str(folder), ranks="2,2,1"), load_predictor):
        with pytest.raises(ModelError):
            use(base)
    assert not Path("PROOF").exists()


def test_a_rust_panic_is_one_line(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        pass

    def panic(*arguments: Any, **options: Any) -> Any:
        raise PanicException("called `Option::unwrap()` on a `None` value")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", panic)
    with pytest.raises(ModelError, match="no tokenizer that transformers can load: called"):
        load_tokenizer(resolve(str(base)))


def test_the_same_file_as_transformers_takes(base: Path, tmp_path: Path) -> None:
    """The index of former shards beside a newer single file, shards there or gone."""
    shards = build_pico("bert", tmp_path / "shards", max_shard_size="8KB")
    for file in shards.glob("model*"):
        shutil.copy(file, base)
    newer = {name: tensor * 1.01 for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(newer, base / "model.safetensors", metadata={"format": "pt"})
    name = "encoder.layer.0.attention.self.query.weight"
    for _ in range(2):
        assert torch.equal(resolve(str(base)).open().read(name), newer[name])
        assert torch.equal(load(base).get_parameter(f"bert.{name}"), newer[name])
        for file in base.glob("model-*"):
            file.unlink()


def test_a_lora_left_in_the_base_folder_is_refused(base: Path) -> None:
    (base / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "someone/else"}))
    with pytest.raises(ModelError, match="move the adapter's files"):
        resolve(str(base))


def test_weights_that_may_not_be_read(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import builtins

    real = builtins.open

    def refusing(path: Any, *arguments: Any, **options: Any) -> Any:
        if str(path).endswith("model.safetensors"):
            raise PermissionError(13, "Permission denied")
        return real(path, *arguments, **options)

    monkeypatch.setattr(builtins, "open", refusing)
    with pytest.raises(ModelError, match=r"cannot read .*model\.safetensors: Permission denied"):
        resolve(str(base)).open()


def test_weights_and_config_that_contradict_each_other(base: Path) -> None:
    """transformers would start the embeddings at random, and they would be trained as part of the head."""
    edit(base / "config.json", vocab_size=65)
    with pytest.raises(ModelError, match=r"word_embeddings.*\(64, 24\) in the weights, but \(65, 24\) by config"):
        load(base)
    edit(base / "config.json", vocab_size=64, num_hidden_layers=4)
    with pytest.raises(ModelError, match=r"lack encoder\.layer\.3"):
        load(base)


def give_phobert_tokenizer(base: Path) -> None:
    """A tokenizer with files of its own, as PhoBERT and BERTweet have: vocab.txt and bpe.codes."""
    for name in ("tokenizer.json", "special_tokens_map.json"):
        (base / name).unlink(missing_ok=True)
    (base / "vocab.txt").write_text("".join(f"{word} 5\n" for word in WORDS))
    (base / "bpe.codes").write_text("t h 100\nth e</w> 90\n")
    (base / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PhobertTokenizer"}))


def test_a_tokenizer_with_files_of_its_own_leaves_whole(base: Path) -> None:
    give_phobert_tokenizer(base)
    (base / "notes.txt").write_text("the user's own")
    names = [path.name for path in Checkpoint("base", None, base).tokenizer_files()]
    assert names == ["bpe.codes", "tokenizer_config.json", "vocab.txt"]


def test_a_merged_model_has_every_file_of_its_tokenizer(base: Path) -> None:
    give_phobert_tokenizer(base)
    adapter = craft.attach(classifier(base), craft.decompose(str(base), ranks="4,4,2"))
    shake(adapter)
    adapter.save("adapter")
    merged = craft.merge("adapter", "merged")
    assert {"bpe.codes", "vocab.txt"} <= set(merged.files)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoint, "tokenizer_files", lambda self: [base / "tokenizer_config.json", base / "vocab.txt"])
        with pytest.raises(ModelError):
            craft.merge("adapter", "again", allow_other_base=True)
    assert not Path("again").exists()


def test_a_base_that_is_replaced_while_it_is_merged(base: Path) -> None:
    """merge.json would name hashes of what was not read."""
    adapter = craft.attach(classifier(base), craft.decompose(str(base), ranks="4,4,2"))
    shake(adapter)
    adapter.save("adapter")

    def replaced(what: str) -> None:
        if what == "verifying":
            save_file(load_file(base / "model.safetensors"), base / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(ModelError, match="was replaced while it was read"):
        craft.merge("adapter", "merged", progress=replaced)
    assert not Path("merged").exists()


@pytest.mark.parametrize("longest", ["save", 0, -3, None, [5]])
def test_a_tokenizer_of_no_length(base: Path, longest: Any) -> None:
    edit(base / "tokenizer_config.json", model_max_length=longest)
    if longest is None:  # transformers then takes any length
        assert load_tokenizer(resolve(str(base))).model_max_length > 1e6
    else:
        with pytest.raises(ModelError, match="its model_max_length is"):
            load_tokenizer(resolve(str(base)))


def test_a_family_without_such_a_class_is_told(pico: Callable[..., Path], data_dir: Path) -> None:
    told = failure("train", *flags(pico("cohere"), data_dir))
    assert told == "error: transformers has no AutoModelForSequenceClassification for models of type 'cohere'\n"
