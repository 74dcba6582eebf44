"""An adapter on a transformers model, including the task head: use, switch, merge, save."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from craft_cli.errors import ConfigError, ModelError, in_words, nearest
from craft_cli.files import ADAPTER, FORMAT_VERSION, whole_folder
from craft_cli.methods.adapter import Adapter
from craft_cli.methods.adapter_folder import HEAD, INCLUDE, REFERENCE, SavedAdapter, write_adapter
from craft_cli.methods.base import Method
from craft_cli.methods.frozen import Frozen, sketches
from craft_cli.methods.html import adapter_html
from craft_cli.methods.saving import install, uninstall
from craft_cli.models.cards import Description
from craft_cli.models.identity import Base
from craft_cli.models.views import View

DEFAULT_NAME = "default"


@dataclass
class _Held:
    """One of several adapters on a model, which may be inactive."""

    trained: dict[str, Tensor]
    head: dict[str, Tensor]
    model: Mapping[str, Any]
    training: dict[str, Any]


class ModelAdapter(Adapter):
    """An adapter on a transformers model, including the task head.

    Args:
        model: a `PreTrainedModel`.
        method: the method.
        frozen: frozen tensors of the method, and the origin of the weights.
        options: options of the method.
        head: names of the model's parameters that are trained in full.
        base: identity of the base.

    Attributes:
        model: the adapted `PreTrainedModel`.
        method: the method.
        frozen: frozen tensors of the method, and the origin of the weights.
        head: names of the model's parameters that are trained in full.
        base: identity of the base.
        training_record: data and settings of the training, for adapter_config.json.
        active: name of the active adapter.
        made_on: fingerprints of the bases whose adapters can be loaded next to this one: its own base, and with
            `allow_other_base` that of its training.
    """

    model: Any

    def __init__(
        self, model: Any, method: Method, frozen: Frozen, options: Any, head: Iterable[str], base: Base
    ) -> None:
        super().__init__(method.build(frozen, options))
        object.__setattr__(self, "model", model)  # not a submodule: the adapter is a submodule of the model
        self.method, self.frozen, self.options = method, frozen, options
        self.architecture = type(model).__name__  # FSDP changes the class in place
        self.head, self.base = tuple(head), base
        self.training_record: dict[str, Any] = {}
        self.active = DEFAULT_NAME
        self.made_on = [dict(frozen.fingerprints)]
        self._held: dict[str, _Held] = {}
        self._untrained = {name: tensor.clone() for name, tensor in self.head_state().items()}
        self.register_load_state_dict_post_hook(_loaded)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move or cast, as `to` and `half` do; after `to_empty`, restore the frozen tensors."""
        super()._apply(fn, recurse)
        if _loses_values(fn):
            self.fill_frozen()
        return self

    @torch.no_grad()
    def fill_frozen(self) -> None:
        """Restore the change's frozen tensors, on the device of its parameters; no `state_dict` has them."""
        device = next(self.change.parameters()).device
        with torch.random.fork_rng(devices=[]):
            fresh = self.method.build(self.frozen, self.options)
        for module, other in zip(self.change.modules(), fresh.modules(), strict=True):
            for name, tensor in module.named_buffers(recurse=False):
                value = other.get_buffer(name).to(device, tensor.dtype)
                module.register_buffer(name, value, persistent=False)

    def __repr__(self) -> str:
        """One line with the method, the adapted projections and the number of trained parameters."""
        description, name = self.description, "" if self.active == DEFAULT_NAME else f" '{self.active}'"
        return (
            f"<ModelAdapter{name}: {description.title}, {description.settings}, on {in_words(self.frozen.targets)} of "
            f"{self.frozen.model}; trains {self.count_parameters():,} parameters, "
            f"and {self.count_head_parameters():,} in the head>"
        )

    def _repr_html_(self) -> str:
        """HTML for notebooks, with sizes and spectra."""
        return adapter_html(self)

    @property
    def description(self) -> Description:
        """The description of the method and its size."""
        return self.method.describe(self.method.settings(self.frozen, self.options))

    def head_state(self) -> dict[str, Tensor]:
        """The head's parameters by name."""
        return {
            name: self.model.get_parameter(name).detach() for name in self.head
        }  # state_dict() has side effects with FSDP

    def trained_state(self) -> dict[str, Tensor]:
        """A copy on the CPU of the trained parameters, including the head, by their names in the adapter's file."""
        self.refuse_disabled()
        return {name: tensor.detach().cpu().clone() for name, tensor in self._trained().items()}

    @torch.no_grad()
    def load_trained_state(self, state: Mapping[str, Tensor]) -> None:
        """Load the values that `trained_state` returned, or some of them.

        Raises:
            ModelError: a name is unknown, or a shape differs.
        """
        mine = self._trained()
        for name, tensor in state.items():
            if name not in mine or mine[name].shape != tensor.shape:
                actual = f"is {tuple(mine[name].shape)}" if name in mine else "is missing"
                raise ModelError(f"{name} {tuple(tensor.shape)} {actual} in this model")
            mine[name].copy_(tensor)

    def _trained(self) -> dict[str, Tensor]:
        return self.change_state() | {HEAD + name: tensor for name, tensor in self.head_state().items()}

    def change_state(self) -> dict[str, Tensor]:
        """The parameters of the change, by their names in the adapter's file."""
        return {name: parameter.detach() for name, parameter in self.change.trained().items()}

    def trained_names(self) -> set[str]:
        """Names of the model's trained parameters: those of the attached change and of the head."""
        mine = {id(parameter) for parameter in self.parameters()}
        return {*self.head, *(name for name, parameter in self.model.named_parameters() if id(parameter) in mine)}

    def count_head_parameters(self) -> int:
        """The number of trained parameters in the head."""
        return sum(tensor.numel() for tensor in self.head_state().values())

    def print_trainable_parameters(self) -> None:
        """Print the number of trained parameters, including the head, as peft does."""
        trained = sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)
        every = sum(parameter.numel() for parameter in self.model.parameters())
        print(f"trainable params: {trained:,} || all params: {every:,} || trainable%: {100 * trained / every:.4f}")

    def attach(self, root: nn.Module, views: Mapping[str, Sequence[View]]) -> None:
        """Adapt the base model in place; `save_pretrained` then saves the adapter too, see `saving`."""
        super().attach(root, views)
        self._handles += install(self)

    def detach(self, root: nn.Module | None = None) -> None:
        """Remove the adapter; the model then computes as before, with the trained head."""
        super().detach(self.model.base_model if root is None else root)
        uninstall(self)

    def merge(self, root: nn.Module | None = None) -> list[str]:
        """Merge the change into the model's weights and remove the adapter.

        Returns:
            Paths of the modules whose weight changed; empty if only the head was trained.

        Raises:
            ModelError: the model is quantized.
            ValueError: neither a weight nor the head changes, or the adapter is not attached.
        """
        self.refuse_disabled()
        if getattr(self.model, "is_quantized", False):
            raise ModelError("cannot merge into a quantized model: load the adapter onto the full-precision base")
        trained = any(not torch.equal(tensor, self._untrained[name]) for name, tensor in self.head_state().items())
        if trained and self.modules_adapted() and not self.changes_something():
            self.detach(root)
            return []
        return super().merge(self.model.base_model if root is None else root)

    # -- several on one base ----------------------------------------------------------------------------------------

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the adapters on this model, in the order they were loaded."""
        return tuple(self._held) or (self.active,)

    def refuse_disabled(self) -> None:
        """Refuse to save or change the adapter inside `disabled`, where the head is not the trained one.

        Raises:
            ConfigError: the adapter is disabled.
        """
        if not self._enabled:
            raise ConfigError("the adapter is disabled: leave the `disabled()` block first")

    @torch.no_grad()
    def hold(self, name: str, saved: SavedAdapter) -> None:
        """Add a saved adapter of the same method, base and size under a name, and activate it.

        Raises:
            ConfigError: inside `disabled`.
        """
        self.refuse_disabled()
        self._put_away()
        self._held[name] = _Held(
            dict(saved.trained), dict(saved.head), saved.record["model"], saved.record.get("training", {})
        )
        self._show(name)

    @torch.no_grad()
    def use(self, name: str) -> None:
        """Activate another adapter on this model: its trained parameters, head and label names.

        Raises:
            ConfigError: there is no adapter with this name, or inside `disabled`.
        """
        self.refuse_disabled()
        self._check_held(name)
        if name != self.active:
            self._put_away()
            self._show(name)

    def delete(self, name: str) -> None:
        """Delete one of several adapters; if it is active, the first of the others is activated.

        Raises:
            ConfigError: there is no adapter with this name, it is the only one, or inside `disabled`.
        """
        self.refuse_disabled()
        self._check_held(name)
        others = [other for other in self.names if other != name]
        if not others:
            raise ConfigError(f"'{name}' is the only adapter: remove it from the model with adapter.detach()")
        if name == self.active:
            self.use(others[0])
        del self._held[name]

    def _check_held(self, name: str) -> None:
        if name not in self.names:
            raise ConfigError(f"this model has no adapter '{name}'{nearest(name, self.names)}")

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside the block, the model is the base model, with its head from before the adapter was attached."""
        trained = {name: tensor.clone() for name, tensor in self.head_state().items()}
        self._set_head(self._untrained)
        try:
            with super().disabled():
                yield
        finally:
            self._set_head(trained)

    def _put_away(self) -> None:
        """Store the active adapter, which may have been trained since it was loaded."""
        self._held[self.active] = _Held(
            {name: tensor.clone() for name, tensor in self.change_state().items()},
            {name: tensor.clone() for name, tensor in self.head_state().items()},
            self._model_record(),
            self.training_record,
        )

    def _model_record(self) -> dict[str, Any]:
        config = self.model.config
        return {
            "architecture": self.architecture,
            "num_labels": config.num_labels,
            "problem_type": config.problem_type,
            "id2label": {str(number): label for number, label in config.id2label.items()},
            "pad_token_id": config.pad_token_id,
        }

    def _show(self, name: str) -> None:
        held, self.active = self._held[name], name
        for key, tensor in self.change_state().items():
            tensor.copy_(held.trained[key])
        self._set_head(held.head)
        self.training_record = held.training
        config = self.model.config
        if (held.model["architecture"], held.model["num_labels"]) != (self.architecture, config.num_labels):
            return  # it has no head, and its labels do not apply to this model
        config.id2label = {int(number): label for number, label in held.model["id2label"].items()}
        config.label2id = {label: number for number, label in config.id2label.items()}
        config.problem_type = held.model["problem_type"]

    @torch.no_grad()
    def _set_head(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in self.head_state().items():
            tensor.copy_(tensors[name])

    # -- on disk ----------------------------------------------------------------------------------------------------

    def record(self, factors: str = INCLUDE) -> dict[str, Any]:
        """The content of adapter_config.json, for frozen tensors that are included or referred to."""
        sha256 = self.frozen.sha256()
        known = {"sketch": sketches(self.frozen.tensors())} if factors == REFERENCE else {}
        return {
            "method": self.method.name,
            "format_version": FORMAT_VERSION,
            "task_type": self.training_record.get("task_type"),
            "base_model": self.frozen.identity() | self.base.record(),
            "targets": list(self.frozen.targets),
            **self.method.settings(self.frozen, self.options),
            "head": list(self.head),
            **({"factors": {"stored": factors, "sha256": sha256} | known} if sha256 else {}),
            "parameters": {"adapter": self.count_parameters(), "head": self.count_head_parameters()},
            "labels": [label for _, label in sorted(self.model.config.id2label.items())],  # in the order of the head
            "model": self._model_record(),
            "training": self.training_record,
        }

    def save(self, path: str | Path, *, card: str | None = None, factors: str = INCLUDE) -> None:
        """Save the adapter as a folder, replacing an existing adapter, and verify it by reading it back.

        Args:
            path: the folder.
            card: text of its README.md.
            factors: `include` saves the factors too; `reference` saves only their sha256, and loading reads them from
                the
                cache: a few tens of kilobytes for each of many adapters of one base.

        Raises:
            FileError: the folder cannot be written, or differs when it is read back; an existing adapter is kept.
        """
        with whole_folder(Path(path), ADAPTER, overwrite=True) as folder:
            self.write(folder, card=card, factors=factors)

    def write(self, folder: Path, *, card: str | None = None, factors: str = INCLUDE) -> None:
        """Write the adapter's files into an existing folder, and verify them by reading them back; see `save`.

        Raises:
            FileError: a file cannot be written, or differs when it is read back.
        """
        self.refuse_disabled()
        if factors not in (INCLUDE, REFERENCE):
            raise ConfigError(f"factors: expected {INCLUDE} or {REFERENCE}, not '{factors}'")
        if factors == REFERENCE and self.frozen.sha256() is None:
            raise ConfigError(f"factors: {self.method.name} has no factors to refer to; use '{INCLUDE}'")
        change = {
            name: tensor.float() for name, tensor in self.change_state().items()
        }  # the model may be in half precision
        write_adapter(folder, self.record(factors), self._trained() | change, self.frozen, card)


def _loses_values(fn: Callable[[Tensor], Tensor]) -> bool:
    """Whether a function that is applied to every tensor loses its values, as `to_empty` does."""
    probe = torch.tensor(list(os.urandom(16)), dtype=torch.uint8)  # freed memory may hold any fixed values
    moved = fn(probe)
    return not moved.is_meta and not torch.equal(moved.to("cpu", torch.uint8), probe)


def _loaded(adapter: ModelAdapter, keys: Any) -> None:
    """Restore the frozen tensors, which `load_state_dict` with `assign` leaves on "meta"."""
    here = not next(adapter.change.parameters()).is_meta
    if here and any(tensor.is_meta for tensor in adapter.change.buffers()):
        adapter.fill_frozen()
