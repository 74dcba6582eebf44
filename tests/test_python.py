"""The public functions as Python users call them, rightly and wrongly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import classifier

import craft_cli as craft
from craft_cli.config.arguments import in_python
from craft_cli.errors import ConfigError

Make = Callable[..., Path]


def test_every_public_name_is_there_and_the_same_every_time() -> None:
    for name in craft.__all__:
        assert getattr(craft, name) is getattr(craft, name)
    assert (Path(craft.__file__).parent / "py.typed").is_file()
    with pytest.raises(AttributeError, match="has no attribute 'atach'"):
        getattr(craft, "atach")  # noqa: B009


def test_ranks_and_targets_in_every_spelling(pico: Make) -> None:
    model = classifier(pico())
    one = craft.decompose(str(pico()), targets="query,value", ranks="6,5,2")
    two = craft.decompose(pico(), targets=["query", "value"], ranks=(6, 5, 2))
    three = craft.decompose(model, ranks=[6, 5, 2])  # a model in memory
    assert one.sha256() == two.sha256() == three.sha256()
    adapter = craft.attach(model, targets="query, value", ranks="6,5,2")
    assert adapter.frozen.sha256() == one.sha256()
    assert craft.attach(classifier(pico()), one, targets="value").frozen.targets == ("value",)
    config = craft.RunConfig(model="demo", task="sst2", ranks="32,32,4", targets="query,key")  # type: ignore[arg-type]
    assert (config.ranks, config.targets) == ((32, 32, 4), ("query", "key"))
    assert config == craft.RunConfig.build(
        {"model": "demo", "task": "sst2", "ranks": "32,32,4", "targets": "query,key"}
    )


def wrong(pico: Make) -> dict[str, tuple[Callable[[], Any], type[Exception], str]]:
    public: Any = craft  # what mypy would refuse
    model, base = classifier(pico()), str(pico())
    factors = public.decompose(base, ranks="6,5,2")
    return {
        "a name for a model": (
            lambda: public.attach("demo"), TypeError,
            r"model: expected a loaded transformers model, not the name 'demo'; .*checkpoint_folder\('demo'\)",
        ),
        "swapped": (lambda: public.attach(factors, model), TypeError, r"model: .* not Factors; the model comes first"),
        "swapped to load": (lambda: public.load("run", model), TypeError, "the model comes first"),
        "a layer": (lambda: public.attach(torch.nn.Linear(2, 2)), TypeError, "not Linear"),
        "a number for factors": (lambda: public.attach(model, 3), TypeError, "factors: expected the result of craft.decompose, not int 3"),
        "a number for a model": (lambda: public.decompose(3), TypeError, "not int; craft.decompose expects a model, or the name"),
        "two ranks": (lambda: public.decompose(base, ranks="6,5"), ConfigError, "^ranks: expected three"),
        "a number of ranks": (lambda: public.decompose(base, ranks=6), TypeError, "^ranks: expected str .* not int 6"),
        "an unknown projection": (
            lambda: public.decompose(base, targets="query,valeu"), ConfigError,
            "^targets: unknown projection 'valeu'; did you mean 'value'",
        ),
        "a revision in memory": (lambda: public.decompose(model, revision="v1"), ConfigError, "^revision is for"),
        "another's option": (lambda: public.attach(model, rank=3), ConfigError, "^method craft has no option 'rank'"),
        "an option": (lambda: public.attach(model, method="lora", rank=0), ConfigError, "^rank: "),
        "no such method": (lambda: public.attach(model, method="lorra"), ConfigError, "^method: unknown"),
        "a number for a path": (lambda: public.load(model, 3), TypeError, r"^path: expected str \| Path, not int 3"),
        "a setting": (lambda: public.RunConfig(num_train_epochs=-1), ConfigError, "^num_train_epochs: "),
        "two settings": (
            lambda: public.RunConfig(ranks="6", warmup_ratio=2.0), ConfigError, "^ranks: .*\nwarmup_ratio: ",
        ),
        "a mapping": (lambda: public.train({"model": base}), TypeError, r"^config: expected RunConfig \| None, not dict"),
        "a setting of none": (lambda: public.train(modell=base), ConfigError, "unknown key 'modell'; did you mean 'model'"),
        "no data": (lambda: public.train(model=base), ConfigError, "pass task, data_dir or train_file"),
        "contradictions": (
            lambda: public.train(public.RunConfig(task="sst2", bf16=True, fp16=True)), ConfigError, "^bf16 and fp16 cannot be combined",
        ),
        "config and settings": (
            lambda: public.train(public.RunConfig(task="sst2"), task="sst2"), TypeError, "either config or settings",
        ),
        "a format": (lambda: public.merge("x", format="onnx"), ConfigError, "^format: expected checkpoint, peft, gguf or adapter"),
        "a wrong argument": (lambda: public.merge("x", out="y"), TypeError, "merge: .*unexpected keyword argument 'out'"),
        "a text for a switch": (lambda: public.merge("x", trim="yes"), TypeError, "^trim: expected bool, not str 'yes'"),
        "data by a wrong name": (
            lambda: public.evaluate("x", valid_file="y"), TypeError, "unknown argument 'valid_file'; did you mean 'validation_file'",
        ),
        "no list": (lambda: public.predict("x", "great film"), TypeError, "texts: expected a list of texts"),
        "nothing there": (lambda: public.inspect(3), TypeError, r"^path: expected str \| Path \| None, not int 3"),
    }  # fmt: skip


def test_what_is_wrong_is_named_as_python_calls_it(pico: Make) -> None:
    for name, (call, kind, message) in wrong(pico).items():
        with pytest.raises(kind, match=message) as caught:
            call()
        assert "--" not in str(caught.value), name
    assert sorted(path.name for path in Path().iterdir()) == ["cache"]  # nothing was written


def test_commands_in_a_message_stay_commands() -> None:
    kept = "go on with `craft train --resume --output-dir out`, or craft inspect --compare RUN RUN; hf auth login"
    assert in_python(kept) == kept
    assert in_python("--eval-strategy steps requires --eval-steps") == "eval_strategy steps requires eval_steps"
    assert in_python("a--b, well-known, -- and --x") == "a--b, well-known, -- and x"
