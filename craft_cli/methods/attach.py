"""An adapter on a transformers model: attach it, save it as a folder, load it again onto the same base.

    factors = craft.decompose("roberta-base")
    adapter = craft.attach(model, factors)      # adapts `model` in place, freezes all but what is trained and the head
    adapter = craft.attach(model, method="lora", rank=8)    # another method
    ...                                         # any training loop, or the Hugging Face Trainer
    adapter.save("my-adapter")
    adapter = craft.load(fresh_model, "my-adapter")
    craft.load(fresh_model, "another", name="other")    # held beside it, and in use now
    adapter.use("default")

`adapter.parameters()` are the numbers that the method trains; `adapter.head` names what is trained of the model itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from craft_cli.config import RunConfig, parse_settings
from craft_cli.config.arguments import wrong_type
from craft_cli.errors import ConfigError, FileError, ModelError, nearest
from craft_cli.methods import method_named
from craft_cli.methods.adapter_folder import CONFIG_FILE, SavedAdapter, adapter_at, read_adapter
from craft_cli.methods.base import Method
from craft_cli.methods.cache import SAME, Kept
from craft_cli.methods.frozen import Frozen, check_base
from craft_cli.methods.model_adapter import DEFAULT_NAME, ModelAdapter
from craft_cli.models.checkpoint import Checkpoint
from craft_cli.models.families import layer_views
from craft_cli.models.identity import Base, base_in, base_of
from craft_cli.models.loading import check_model, class_of, head_names
from craft_cli.models.stacks import read_weights, weights_in
from craft_cli.models.views import View


def attach(
    model: Any,
    factors: Any = None,
    *,
    method: str = "craft",
    targets: str | Sequence[str] | None = None,
    head: Iterable[str] | None = None,
    **options: Any,
) -> ModelAdapter:
    """Adapt a transformers model in place and freeze everything but what the method trains and the head.

    Args:
        model: a supported `PreTrainedModel`; with `factors` loaded from the weights that were decomposed.
        factors: of `craft.decompose`; made from the model's own weights without.
        method: `craft`, or another one that `craft methods` lists.
        targets: the projections to adapt, also with commas between them, or `all-linear`; those of the factors, or query and
            value, without.
        head: names of parameters to train in full; without, all outside the base model, but for a language model, whose head
            was pre-trained too. Name those too that were newly initialised inside it.
        options: of the method, such as `ranks` of craft (OUT,IN,LAYERS, those of the factors or smaller) or `rank` and `alpha`
            of lora; `craft train --help` lists them.

    Raises:
        TypeError: `model` is no loaded transformers model.
        ConfigError: an unknown method or option, an option's value that cannot be, targets that were not decomposed, ranks
            above those of the factors, or factors of another method.
        ModelError: an unsupported family, or other weights than those decomposed.
    """
    check_model(model, "the model comes first: craft.attach(model, factors)")
    if factors is not None and not isinstance(factors, Frozen):
        raise wrong_type("factors", "those of craft.decompose", factors)
    chosen = method_named(method)
    names = [field.name for field in fields(chosen.Options)]
    for name in options:
        if name not in names:
            raise ConfigError(f"--method {method} has no option '{name}'{nearest(name, names)}")
    options = parse_settings({name: value for name, value in options.items() if value is not None})
    if targets is not None:
        targets = parse_settings({"targets": targets})["targets"]
    if factors is None:
        weights = weights_in(model, RunConfig.targets if targets is None else targets)
        factors, _ = chosen.prepare(weights, chosen.Options(**options), None, lambda what, done, total: None)
        targets = None
    elif isinstance(factors, Kept) and not getattr(model, "is_quantized", False):
        weights = weights_in(model, factors.targets)
        if not factors.belong_to(weights, max(SAME, torch.finfo(model.dtype).eps)):
            raise ModelError("this model has other weights than those that the factors were made of")
    frozen, complete = chosen.fit(factors, targets, options)
    return attach_prepared(model, chosen, frozen, complete, head_names(model) if head is None else head)


def attach_prepared(
    model: Any, method: Method, frozen: Frozen, options: Any, head: Iterable[str], base: Base | None = None
) -> ModelAdapter:
    """Adapt a model by what a method has prepared of its weights, and of which base; see `attach`.

    Raises:
        ModelError: an unsupported family, or other weights than those prepared.
    """
    views = layer_views(model.config, frozen.targets)
    check_base(model, frozen, views)
    head = tuple(head)
    base = base or base_in(model, getattr(torch, frozen.dtype), head)
    adapter = ModelAdapter(model, method, frozen, options, head, base)
    _put_on(adapter, views)
    return adapter


def load(
    model: Any,
    path: Any,
    *,
    name: str | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    allow_other_base: bool = False,
    checkpoint: Checkpoint | None = None,
) -> ModelAdapter:
    """Put a saved adapter and its head on a base model.

    Args:
        model: the base, with the right number of labels; it gets the adapter's label names. With `name` it may carry an
            adapter already: those of one base, method and the same factors are held together, and this one is in use then.
        path: the adapter's folder, that of a run, or OWNER/NAME of an adapter on the hub.
        name: what it is called in `adapter.use`; `default` without.
        revision: branch, tag or commit of an adapter on the hub.
        cache_dir: where factors are looked for that the adapter only refers to, and made of the base where they are not
            there; `~/.cache/craft` without.
        allow_other_base: whether the base's weights, configuration or tokenizer may be others than in training. What is saved
            afterwards names this base.
        checkpoint: that the model was loaded from: then its tokenizer is compared too, and weights by its files.

    Raises:
        TypeError: `model` is no loaded transformers model.
        FileError: the folder is no adapter, is damaged, or refers to factors that cannot be had.
        ModelError: the model is not the base it was trained on, has another head, or carries an adapter already.
    """
    check_model(model, "the model comes first: craft.load(model, path)")
    if not isinstance(path, (str, Path)):
        raise wrong_type("path", "str | Path", path)
    folder = adapter_at(path, revision)
    if folder is None:
        raise FileError(f"{path} is no adapter: it holds no {CONFIG_FILE}")
    held: ModelAdapter | None = getattr(model.base_model, ModelAdapter.ATTRIBUTE, None)
    if held is not None and name is None:
        raise ModelError("this model carries an adapter already: detach it first, or give name=... to hold several")
    trusted = checkpoint is not None and checkpoint.trusted
    saved = read_adapter(folder, cache_dir, make=True, trusted=trusted)
    views = layer_views(model.config, saved.frozen.targets)
    base, frozen = saved.base, saved.frozen
    if held is None:
        check_base(model, frozen, views, allow_other=allow_other_base)
        if allow_other_base:
            frozen = _on(model, frozen, views, checkpoint)
        dtype = getattr(torch, frozen.dtype)
        now = base_of(checkpoint, class_of(model), cache_dir) if checkpoint else base_in(model, dtype, saved.head)
        if allow_other_base:
            base = now
        base.check(now, str(path))
    elif not _held_together(held, saved):
        raise ModelError(f"{path} has another method, base or size than the adapter on this model: load it on its own")
    saved.check_head(model)
    adapter = ModelAdapter(model, saved.method, frozen, saved.options, saved.head, base) if held is None else held
    if held is None:
        adapter.active = name or DEFAULT_NAME
        adapter.made_on.append(dict(saved.frozen.fingerprints))
    if set(saved.head) != set(adapter.head):
        raise ModelError(f"{path} trains another head than the adapter on this model: load it on its own")
    adapter.hold(name or DEFAULT_NAME, saved)
    if held is None:
        _put_on(adapter, views)
    return adapter


def _on(model: Any, frozen: Frozen, views: Mapping[str, Sequence[View]], checkpoint: Checkpoint | None) -> Frozen:
    """What was kept of another base, as of this one."""
    if checkpoint is not None:
        return replace(frozen, **read_weights(checkpoint, frozen.targets).origin())
    if getattr(model, "is_quantized", False):  # what its weights were is not known
        return frozen
    here = weights_in(model, frozen.targets).origin()
    with suppress(ModelError):
        check_base(model, frozen, views)  # the same weights: in memory they may be rounded
        here |= {"dtype": frozen.dtype, "fingerprints": frozen.fingerprints}
    return replace(frozen, **here)


def _held_together(held: ModelAdapter, saved: SavedAdapter) -> bool:
    """Whether a saved adapter is of the method, the base, the frozen tensors and the options of the one held."""
    mine, theirs = held.method.settings(held.frozen, held.options), saved.method.settings(saved.frozen, saved.options)
    return (
        (held.method.name, mine, held.frozen.sha256()) == (saved.method.name, theirs, saved.frozen.sha256())
        and dict(saved.frozen.fingerprints) in held.made_on
    )  # fmt: skip


def _put_on(adapter: ModelAdapter, views: Mapping[str, Sequence[View]]) -> None:
    try:
        adapter.attach(adapter.model.base_model, views)
    except ValueError as error:
        raise ModelError(str(error)) from error
    trained = adapter.trained_names()
    for name, parameter in adapter.model.named_parameters():
        parameter.requires_grad_(name in trained)
