"""Language models: trained, resumed, on several processes; their answers, and what leaves."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
import textwrap
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import failure, invoke, write_rows
from helpers import Cut, Remember, config, craft_command, cut, lines, same
from picos import DECODERS
from transformers import AutoModelForCausalLM, AutoTokenizer

import craft_cli as craft
from craft_cli.api import predictor
from craft_cli.config import RunConfig
from craft_cli.errors import ConfigError, CraftError, ModelError

Make = Callable[..., Path]
NAMES = ("ann", "bob", "cat", "dan", "eve", "fay", "gus", "hal")


def talks(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Who is greeted is greeted back, and the model says no."""
    rows = []
    for number in range(start, start + count):
        name = NAMES[number % len(NAMES)]
        rows.append(
            {
                "messages": [
                    {"role": "user", "content": f"{name} {number}"},
                    {"role": "assistant", "content": f"no {name}"},
                ]
            }
        )
    return rows


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.jsonl and validation.jsonl."""
    folder = tmp_path_factory.mktemp("chats")
    write_rows(folder / "train.jsonl", talks(40))
    write_rows(folder / "validation.jsonl", talks(11, 50))
    return folder


def settings(base: Path, data: Path, **changed: Any) -> RunConfig:
    given = {
        "model": str(base), "data_dir": str(data), "ranks": "12,12,3", "use_cpu": True, "output_dir": "out",
        "num_train_epochs": 2, "logging_steps": 1, "learning_rate": 3e-2,
    }  # fmt: skip
    return RunConfig.build(given | changed)


@pytest.fixture(scope="module")
def trained(pico_lm: Make, chats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        changed = {"targets": "query,key,value,output", "eval_generate": 4, "max_new_tokens": 12, "num_train_epochs": 6}
        craft.train(settings(pico_lm(), chats, **changed))
    return folder / "out"


def test_training_learns_and_eval_repeats_it(trained: Path) -> None:
    results = json.loads((trained / "all_results.json").read_text())
    before = results["baselines"]["checkpoint"]
    assert results["metrics"]["loss"] < 0.9 * before["loss"]
    assert results["metrics"]["perplexity"] == pytest.approx(math.exp(results["metrics"]["loss"]))
    assert results["parameters"]["head"] == 0
    found = craft.evaluate(trained, eval_generate=4, max_new_tokens=12, predictions="rows.jsonl")
    assert dict(found.metrics) == pytest.approx(results["metrics"], abs=1e-5)
    rows = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]
    assert [len(row) for row in rows] == [10] * 4 + [5] * 7
    assert rows[0]["label"] == rows[0]["wanted"] == "no cat"


def test_the_answers_of_every_evaluation_are_kept(trained: Path) -> None:
    samples = [json.loads(line) for line in (trained / "samples.jsonl").read_text().splitlines()]
    metrics = {
        line["step"]: line
        for line in map(json.loads, (trained / "metrics.jsonl").read_text().splitlines())
        if "eval_loss" in line
    }
    assert [sample["step"] for sample in samples] == [step for step in metrics for _ in range(4)]
    for step, line in metrics.items():
        those = [sample["match"] for sample in samples if sample["step"] == step]
        assert line["eval_exact_match"] == sum(those) / 4
    assert set(samples[0]) == {"step", "prompt", "wanted", "answer", "match", "tokens", "stopped"}
    assert samples[0]["prompt"] == "<|im_start|>user\ncat 50<|im_end|>\n<|im_start|>assistant\n"


def test_page_card_and_inspect_tell_of_answers_and_name_no_labels(trained: Path) -> None:
    told = "every answer of the assistant and the token that ends it"
    found = craft.inspect(trained)
    assert (found.facts["learned"], found.facts["labels"]) == (told, None)
    invoke("inspect", str(trained), "--html", "page.html")
    page = Path("page.html").read_text()
    assert "Confusion" not in page
    last = [json.loads(line) for line in (trained / "samples.jsonl").read_text().splitlines()][-4:]
    assert all(f"<td>{escape(sample[name])}</td>" in page for sample in last for name in ("prompt", "wanted", "answer"))
    craft.merge(trained, "merged")
    for card in (trained / "adapter" / "README.md", Path("merged/README.md")):
        assert f"Task: own. Learned: {told}. Data: " in card.read_text()
        assert "in the head" not in card.read_text()
    snippet = re.search(r"PATH\):\n\n((?:    .*\n|\n)+)", Path("merged/README.md").read_text())
    assert snippet
    code = textwrap.dedent(snippet[1]).replace('"PATH"', '"merged"').replace("max_new_tokens=256", "max_new_tokens=20")
    names: dict[str, Any] = {}
    exec(code.replace("some question", "ann 1"), names)
    written = names["tokenizer"].decode(
        names["output"][0, names["inputs"]["input_ids"].shape[1] :], skip_special_tokens=True
    )
    settings = craft.Generation(max_new_tokens=20)
    assert written == craft.predict(trained, ["ann 1"], generation=settings)[0]["answer"]


@pytest.mark.parametrize("family", DECODERS)
def test_every_family_is_trained_evaluated_and_answers(family: str, pico_lm: Make, chats: Path) -> None:
    """Stored in half precision, which the training keeps; the run answers as the merged model does in float32."""
    base = pico_lm(family, dtype=torch.bfloat16)
    told = craft.train(settings(base, chats, max_steps=2, ranks="6,6,2", targets="query,value", bf16=True))
    assert told.baselines["checkpoint"]["loss"] > told.metrics["loss"]
    assert dict(craft.evaluate("out").metrics) == pytest.approx(dict(told.metrics), rel=1e-2)
    craft.merge("out", "merged", dtype="float32")
    asked = ["ann 1", "bob 70 and a longer one"]
    generation = craft.Generation(max_new_tokens=8)
    answers = [craft.predict(path, asked, generation=generation) for path in ("out", "merged", str(base))]
    assert answers[0] == answers[1]
    assert len(answers[2]) == 2
    assert {row["stopped"] for rows in answers for row in rows} <= {"end", "length"}
    assert craft.Chat("out", generation=generation).ask("ann 1").text == answers[0][0]["answer"]


def test_a_base_stays_in_the_half_precision_that_it_is_stored_and_trained_in(pico_lm: Make, chats: Path) -> None:
    """Nothing of it is trained, so float32 copies would only take memory."""
    held = {}
    for stored, half in itertools.product((torch.float32, torch.bfloat16), (False, True)):
        listener = Remember()
        craft.train(settings(pico_lm(dtype=stored), chats, bf16=half, dry_run=True), listener)
        assert listener.plan
        assert listener.plan.memory
        held[stored, half] = listener.plan.memory.weights
    whole = held[torch.float32, False]
    assert held == {
        (torch.float32, False): whole,
        (torch.float32, True): whole,
        (torch.bfloat16, False): whole,
        (torch.bfloat16, True): whole // 2,
    }


def test_on_a_gpu_a_language_model_answers_in_the_half_precision_that_it_is_stored_in(
    pico_lm: Make, pico: Make, chats: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = predictor._dtype
    monkeypatch.setattr(predictor, "_dtype", lambda base, kind, device: real(base, kind, torch.device("cuda")))
    for stored in (torch.bfloat16, torch.float32):
        base = pico_lm(dtype=stored)
        told = craft.train(settings(base, chats, max_steps=2, bf16=True, overwrite=True))
        assert [predictor.load_predictor(path).model.dtype for path in ("out", base)] == [stored, stored]
        assert dict(craft.evaluate("out").metrics) == pytest.approx(dict(told.metrics), rel=1e-2)
        craft.merge("out", "merged", overwrite=True)
        assert {row["stopped"] for row in craft.predict("merged", ["ann 1", "bob and more"])} <= {"end", "length"}
    craft.train(config(pico(dtype=torch.bfloat16), data_dir, max_steps=1, output_dir="classifier"))
    assert predictor.load_predictor("classifier").model.dtype == torch.float32


def test_predictions_are_what_the_merged_model_generates(trained: Path, pico_lm: Make) -> None:
    found = craft.predict(trained, ["ann 1", [{"role": "user", "content": "bob 70"}]], generation=None)
    craft.merge(trained, "merged")
    model: Any = AutoModelForCausalLM.from_pretrained("merged")
    tokenizer: Any = AutoTokenizer.from_pretrained("merged")
    for said, answer in zip(["ann 1", "bob 70"], found, strict=True):
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": said}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|end|>"])
        out = model.generate(**inputs, do_sample=False, max_new_tokens=100, eos_token_id=ends, pad_token_id=258)
        written = out[0, inputs["input_ids"].shape[1] :]
        assert answer["answer"] == tokenizer.decode(written, skip_special_tokens=True)
        assert answer["tokens"] == len(written)
    again = craft.predict("merged", ["ann 1"])
    assert again == found[:1]


def test_a_text_alone_is_answered_as_in_a_batch(trained: Path) -> None:
    texts = ["ann 1", "bob 12345678", "c", "dan"]
    together = craft.predict(trained, texts, per_device_eval_batch_size=4)
    assert together == [craft.predict(trained, [text])[0] for text in texts]


def test_predict_on_the_command_line(trained: Path) -> None:
    Path("asked.txt").write_text("ann 1\nbob 2\n")
    out = invoke("predict", str(trained), "--input", "asked.txt", "--use-cpu", "--max-new-tokens", "3").stdout
    rows = [json.loads(line) for line in out.splitlines()]
    assert [(row["tokens"], row["stopped"]) for row in rows] == [(3, "length")] * 2
    write_rows(Path("asked.jsonl"), [{"messages": [{"role": "user", "content": "ann 1"}]}])
    out = invoke("predict", str(trained), "--input", "asked.jsonl", "--use-cpu", "--stop", "n").stdout
    assert json.loads(out)["stopped"] in ("stop", "end", "length")
    drawn = [
        craft.predict(trained, ["ann 1"], generation=craft.Generation(temperature=3.0, seed=seed))[0]["answer"]
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(
    ("method", "half"),
    [
        ("craft", False),
        pytest.param("lora", False, marks=pytest.mark.slow),
        pytest.param("craft", True, marks=pytest.mark.slow),
    ],
)
def test_a_training_that_was_cut_goes_on_to_the_same_bits(method: str, half: bool, pico_lm: Make, chats: Path) -> None:
    changed: dict[str, Any] = {
        "method": method,
        "bf16": half,
        "eval_generate": 2,
        "max_new_tokens": 4,
        "packing": True,
        "max_seq_length": 64,
    }
    changed["per_device_train_batch_size"] = 2
    if method != "craft":
        changed["ranks"] = None
    base = pico_lm(dtype=torch.bfloat16 if half else torch.float32)
    craft.train(settings(base, chats, output_dir="whole", **changed))
    cut(settings(base, chats, output_dir="cut", **changed), Cut(7))
    craft.train(settings(base, chats, output_dir="cut", resume=True, **changed))
    assert Path("cut/samples.jsonl").read_bytes() == Path("whole/samples.jsonl").read_bytes()
    same("cut", "whole")


def test_rows_without_a_target_are_left_out_and_counted(pico_lm: Make, chats: Path) -> None:
    rows = [*talks(9), {"messages": [{"role": "user", "content": "x" * 150}, {"role": "assistant", "content": "y"}]}]
    write_rows(Path("data/train.jsonl"), rows)
    write_rows(Path("data/validation.jsonl"), talks(3, 50))
    given = [
        "train",
        "--model",
        str(pico_lm()),
        "--data-dir",
        "data",
        "--ranks",
        "6,5,2",
        "--use-cpu",
        "--max-seq-length",
    ]
    said = invoke(*given, "100", "--dry-run").output
    assert "1 of 10 rows of data/train.jsonl have no target within 100 tokens and are skipped" in " ".join(said.split())
    assert ">no ann<|im_end|><" in said
    said = failure(*given, "9")
    assert "no row has a target within 9 tokens; increase" in said


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"head_start": "probe"}, "head_start: a language model keeps its own head"),
        ({"class_weights": "balanced"}, "class_weights: a language model keeps"),
        ({"train_on": "completion", "chat_template": "chatml2"}, "'chatml2' is neither one of"),
        ({"answer_pattern": "(", "eval_generate": 2}, "answer_pattern: invalid regular expression"),
        ({"answer_pattern": "a"}, "requires --eval-generate"),
        ({"metric_for_best_model": "exact_match"}, "no metric 'exact_match'"),
        (
            {"label_column": "x", "task_type": "causal-lm"},
            "label_column: a language model has no labels",
        ),
    ],
)
def test_settings_of_other_kinds_are_refused(changed: dict[str, Any], told: str, pico_lm: Make, chats: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        craft.train(settings(pico_lm(), chats, **changed))
    assert told in str(refused.value)
    assert not Path("out").exists()


def test_what_is_no_language_model_is_refused(pico: Make, pico_lm: Make, chats: Path, data_dir: Path) -> None:
    with pytest.raises(ModelError, match="a bert model is bidirectional"):
        craft.train(settings(pico(), chats))
    with pytest.raises(ConfigError, match="packing is for language models, but these rows have labels"):
        craft.train(settings(pico_lm(), data_dir, task="sst2", packing=True))
    craft.train(settings(pico_lm(), chats, num_train_epochs=1))
    with pytest.raises(CraftError, match="eval_generate"):
        craft.evaluate("out", answer_pattern="x")


def test_a_template_of_the_users_travels_with_what_was_trained(pico_lm: Make, chats: Path) -> None:
    base = pico_lm("llama", template="")
    craft.train(settings(base, chats, chat_template="zephyr", num_train_epochs=1))
    assert craft.predict("out", ["ann 1"], generation=craft.Generation(max_new_tokens=2))
    craft.merge("out", "merged")
    tokenizer = AutoTokenizer.from_pretrained("merged")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False, add_generation_prompt=True)
    assert text == "<|user|>\na<|end|>\n<|assistant|>\n"


@pytest.mark.parametrize("given", [None, {"eos_token_id": 258}, {"eos_token_id": [257, 258], "temperature": 0.5}])
def test_a_merged_model_ends_its_turns_in_other_tools(given: Any, pico_lm: Make, chats: Path) -> None:
    shutil.copytree(pico_lm(), "base")
    file = Path("base/generation_config.json")
    file.unlink()
    if given:
        file.write_text(json.dumps(given))
    craft.train(settings(Path("base"), chats, num_train_epochs=1))
    craft.merge("out", "merged")
    written = Path("merged/generation_config.json")
    assert sorted(json.loads(written.read_text())["eos_token_id"]) == [257, 258]
    if given and isinstance(given["eos_token_id"], list):
        assert written.read_bytes() == file.read_bytes()


def test_the_same_update_of_packed_rows(pico_lm: Make, chats: Path) -> None:
    base = pico_lm()
    flags = {"num_train_epochs": 3, "learning_rate": 1e-2, "per_device_train_batch_size": 40}  # an epoch is one update
    craft.train(settings(base, chats, output_dir="one", **flags))
    craft.train(settings(base, chats, output_dir="packed", packing=True, max_seq_length=128, **flags))
    assert len(lines("packed")) == len(lines("one")) > 3
    for one, other in zip(lines("one"), lines("packed"), strict=True):
        assert other == pytest.approx(one, rel=2e-4, abs=2e-4)
    given = ["train", "--model", str(base), "--data-dir", str(chats), "--ranks", "6,5,2", "--use-cpu", "--dry-run"]
    said = " ".join(invoke(*given, "--packing", "--max-seq-length", "128").output.replace("│", " ").split())
    assert re.search(r"40 training rows, 11 validation rows", said)
    assert "longest 33; 13 packed sequences of up to 128; padding 13.8% (unpacked 0.2%)" in said
    assert "updates 6 memory" in said  # 2 of an epoch, 3 epochs


@pytest.mark.slow
@pytest.mark.parametrize(
    "changed",
    [
        {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 2},
        {"num_processes": 2, "per_device_train_batch_size": 4},
        {"num_processes": 2, "per_device_train_batch_size": 4, "fsdp": True},
    ],
)
def test_the_same_update_however_it_is_divided(changed: dict[str, Any], pico_lm: Make, chats: Path) -> None:
    base = pico_lm()
    flags = {"eval_generate": 3, "max_new_tokens": 4, "num_train_epochs": 1, "learning_rate": 1e-2}
    craft.train(settings(base, chats, output_dir="one", **flags))
    if "num_processes" in changed:
        Path("recipe.yaml").write_text(
            json.dumps(settings(base, chats, output_dir="other", **flags, **changed).recipe())
        )
        done = craft_command(
            "train", "--recipe", "recipe.yaml", "--output-dir", "other", "--use-cpu", "--logging-steps", "1"
        )
        assert done.returncode == 0, done.stderr
    else:
        craft.train(settings(base, chats, output_dir="other", **flags, **changed))
    for one, other in zip(lines("one"), lines("other"), strict=True):
        assert other == pytest.approx(one, rel=2e-4, abs=2e-4)
