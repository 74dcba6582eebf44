"""llama.cpp itself runs what craft writes; skipped where llama-cpp-python is not installed (it compiles for a long time)."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import shake, write_rows
from pico_gguf import make_package, use_package
from transformers import AutoModelForCausalLM, AutoTokenizer

import craft_cli as craft
from craft_cli.config import RunConfig
from craft_cli.models import demo
from craft_cli.models.demo import INSTALL_LLM
from craft_cli.models.hub import resolve

llama_cpp = pytest.importorskip("llama_cpp", reason="pip install llama-cpp-python")
pytestmark = pytest.mark.slow
THINGS = ("rain", "bread", "cats", "music", "snow", "tea", "books", "trains", "the sea", "apples", "winter", "maps")
OTHERS = ("dogs", "coffee", "the moon", "gardens", "summer", "chess", "bicycles", "rivers", "painting", "stars")


def opened(path: Path, adapter: Path | None = None) -> Any:
    """A GGUF, with an adapter on it."""
    model = llama_cpp.Llama(
        str(path), n_ctx=128, n_batch=128, logits_all=True, lora_path=None if adapter is None else str(adapter), type_k=0,
        type_v=0, verbose=False,
    )  # fmt: skip
    assert adapter is None or model._lora_adapter  # without it, the first evaluation would crash
    return model


def logits(model: Any, tokens: list[int]) -> torch.Tensor:
    model.reset()
    model.eval(tokens)
    return torch.tensor(model.scores[: len(tokens)])


def answer(model: Any, tokens: list[int], end: int) -> list[int]:
    """16 tokens of a greedy answer, or those until its end."""
    written = list(islice(model.generate(tokens, temp=0.0), 16))
    return written[: written.index(end) + 1] if end in written else written


@pytest.mark.parametrize("targets", ["query,value", "all-linear"])
def test_it_computes_what_craft_does(targets: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_package(tmp_path / "site", make_package(tmp_path / "site"), monkeypatch)
    base_file = demo.demo_gguf()
    assert base_file
    model = AutoModelForCausalLM.from_pretrained(resolve("demo-llm").folder).eval()
    tokens = list(range(1, 49))
    with torch.no_grad():
        base = model(torch.tensor([tokens])).logits[0]
        adapter = craft.attach(model, targets=targets, ranks=(12, 12, 2))
        shake(adapter)
        tuned = model(torch.tensor([tokens])).logits[0]
    adapter.save("saved")
    craft.merge("saved", "lora", format="gguf")
    scale = float(tuned.norm())
    assert float((tuned - base).norm()) > 0.02 * scale
    torch.testing.assert_close(logits(opened(base_file), tokens), base, rtol=0, atol=1e-4)
    found = logits(opened(base_file, Path("lora/adapter.gguf")), tokens)
    assert float((found - tuned).norm()) < 1e-4 * scale


def test_answers_over_the_quantised_base(tmp_path: Path) -> None:
    """The demo, trained to answer in one form: llama.cpp answers in that form too, mostly word for word."""
    base = demo.demo_gguf()
    if base is None:
        pytest.skip(INSTALL_LLM)
    rows = [
        {"messages": [
            {"role": "user", "content": f"Tell me about {thing}."},
            {"role": "assistant", "content": f"Aye, captain! I know {thing} well."},
        ]}
        for thing in THINGS
    ]  # fmt: skip
    data = {"train_file": str(write_rows(tmp_path / "train.jsonl", rows)), "eval_strategy": "no", "save_strategy": "no"}
    craft.train(RunConfig.build({
        "model": "demo-llm", "method": "lora", "targets": "query,key,value,output", "learning_rate": 3e-3, "max_steps": 15,
        "per_device_train_batch_size": 4, "max_seq_length": 64, "output_dir": "run", "use_cpu": True, **data,
    }))  # fmt: skip
    craft.merge("run", "lora", format="gguf")
    folder = resolve("demo-llm").folder
    tokenizer, ours = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    craft.load(ours, "run/adapter")
    plain, tuned = opened(base), opened(base, Path("lora/adapter.gguf"))
    changed = alike = 0
    for thing in OTHERS:
        asked = [{"role": "user", "content": f"Tell me about {thing}."}]
        batch: Any = tokenizer.apply_chat_template(
            asked, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        tokens = batch["input_ids"][0].tolist()
        with torch.no_grad():
            written = ours.generate(**batch, max_new_tokens=16, do_sample=False)[0, len(tokens) :].tolist()
        before, after = (answer(one, tokens, tokenizer.eos_token_id) for one in (plain, tuned))
        changed += before != after
        alike += after == written
    print(f"{changed} of {len(OTHERS)} answers differ from the base's, {alike} agree with craft's")
    assert changed >= 0.9 * len(OTHERS)
    assert alike > 0.5 * len(OTHERS)
