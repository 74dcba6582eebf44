"""Attach an adapter to a transformers model, save it as a folder, and load it onto the same base.

    factors = craft.decompose("roberta-base")
    adapter = craft.attach(model, factors)      # adapts `model` in place, freezes all but the adapter and the head
    adapter = craft.attach(model, method="lora", rank=8)    # another method
    ...                                         # any training loop, or the Hugging Face Trainer
    adapter.save("my-adapter")
    adapter = craft.load(fresh_model, "my-adapter")
    craft.load(fresh_model, "another", name="other")    # a second adapter, which is active now
    adapter.use("default")

`adapter.parameters()` are the trained parameters of the method; `adapter.head` names those of the model.
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
    """Attach an adapter to a transformers model in place, and freeze everything but the adapter and the head.

    Args:
        model: a supported `PreTrainedModel`; with `factors`, loaded from the decomposed weights.
        factors: result of `craft.decompose`. Default: computed from the model's weights.
        method: `craft`, or another method listed by `craft methods`.
        targets: projections to adapt, as a list or separated by commas, or `all-linear`. Default: those of the factors,
            or query and value.
        head: names of parameters to train in full, including newly initialized ones inside the base model. Default: all
            outside the base model; none for a language model, whose head is pre-trained.
        options: options of the method, such as `ranks` of craft (OUT,IN,LAYERS, at most those of the factors) or `rank`
            and `alpha` of lora; `craft train --help` lists them.

    Raises:
        TypeError: `model` is not a loaded transformers model.
        ConfigError: an unknown method or option, an invalid value, targets that were not decomposed, ranks above those
            of the factors, or factors of another method.
        ModelError: an unsupported family, or weights that differ from the decomposed ones.
    """
    check_model(model, "the model comes first: craft.attach(model, factors)")
    if factors is not None and not isinstance(factors, Frozen):
        raise wrong_type("factors", "the result of craft.decompose", factors)
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
            raise ModelError("the weights of this model differ from those of the factors")
    frozen, complete = chosen.fit(factors, targets, options)
    return attach_prepared(model, chosen, frozen, complete, head_names(model) if head is None else head)


def attach_prepared(
    model: Any, method: Method, frozen: Frozen, options: Any, head: Iterable[str], base: Base | None = None
) -> ModelAdapter:
    """Attach an adapter with the tensors that the method has prepared; see `attach`.

    Raises:
        ModelError: an unsupported family, or weights that differ from the prepared ones.
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
    """Load a saved adapter and its head onto a base model.

    Args:
        model: the base, with the right number of labels; it gets the adapter's label names. With `name`, it may already
            have adapters of the same base, method and factors; the new one becomes active.
        path: an adapter's folder, a run, or OWNER/NAME of an adapter on the Hub.
        name: name for `adapter.use`. Default: `default`.
        revision: branch, tag or commit of an adapter on the Hub.
        cache_dir: cache folder for factors that the adapter only refers to; missing ones are computed from the base.
            Default: `~/.cache/craft`.
        allow_other_base: whether the base's weights, configuration or tokenizer may differ from those in training. A
            saved adapter then names this base.
        checkpoint: the checkpoint of the model, to compare the tokenizer too, and the weights by its files.

    Raises:
        TypeError: `model` is not a loaded transformers model.
        FileError: the folder is not an adapter, is damaged, or refers to factors that are not available.
        ModelError: the model is not the base it was trained on, has another head, or already has an adapter.
    """
    check_model(model, "the model comes first: craft.load(model, path)")
    if not isinstance(path, (str, Path)):
        raise wrong_type("path", "str | Path", path)
    folder = adapter_at(path, revision)
    if folder is None:
        raise FileError(f"{path} is not an adapter: it has no {CONFIG_FILE}")
    held: ModelAdapter | None = getattr(model.base_model, ModelAdapter.ATTRIBUTE, None)
    if held is not None and name is None:
        raise ModelError("this model already has an adapter: detach it first, or pass name=... to load several")
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
        raise ModelError(
            f"{path} differs from the adapter on this model in method, base or size: load it on a fresh model"
        )
    saved.check_head(model)
    adapter = ModelAdapter(model, saved.method, frozen, saved.options, saved.head, base) if held is None else held
    if held is None:
        adapter.active = name or DEFAULT_NAME
        adapter.made_on.append(dict(saved.frozen.fingerprints))
    if set(saved.head) != set(adapter.head):
        raise ModelError(f"{path} trains a different head from the adapter on this model: load it on a fresh model")
    adapter.hold(name or DEFAULT_NAME, saved)
    if held is None:
        _put_on(adapter, views)
    return adapter


def _on(model: Any, frozen: Frozen, views: Mapping[str, Sequence[View]], checkpoint: Checkpoint | None) -> Frozen:
    """The frozen tensors, with this model as their origin."""
    if checkpoint is not None:
        return replace(frozen, **read_weights(checkpoint, frozen.targets).origin())
    if getattr(model, "is_quantized", False):  # its original weights are unknown
        return frozen
    here = weights_in(model, frozen.targets).origin()
    with suppress(ModelError):
        check_base(model, frozen, views)  # the weights are the same, but may be rounded in memory
        here |= {"dtype": frozen.dtype, "fingerprints": frozen.fingerprints}
    return replace(frozen, **here)


def _held_together(held: ModelAdapter, saved: SavedAdapter) -> bool:
    """Whether a saved adapter has the same method, base, frozen tensors and options as the one on the model."""
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
