"""An adapter on a transformers model: attach it, save it as a folder, load it again onto the same base.

    factors = craft.decompose("roberta-base")
    adapter = craft.attach(model, factors)      # adapts `model` in place, freezes all but transforms and head
    ...                                         # any training loop, or the Hugging Face Trainer
    adapter.save("my-adapter")
    adapter = craft.load(fresh_model, "my-adapter")
    craft.load(fresh_model, "another", name="other")    # held beside it, and in use now
    adapter.use("default")

The folder holds `adapter_config.json` and `adapter_model.safetensors` (transforms, the factors they live in, the trained
head). Transforms mean nothing without their exact basis, so nothing is ever decomposed again at load.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from craft_cli.errors import ConfigError, FileError, ModelError, nearest
from craft_cli.files import FORMAT_VERSION, read_tensors, whole_folder, write_bytes, write_json, write_tensors
from craft_cli.methods.adapter import Adapter
from craft_cli.methods.adapter_folder import (
    CONFIG_FILE,
    INCLUDE,
    KIND,
    REFERENCE,
    TENSOR_FILE,
    SavedAdapter,
    read_adapter,
)
from craft_cli.methods.craft.change import PAPER_NOISE
from craft_cli.methods.craft.factors import Factors, check_base, factor_sha256, factor_tensors
from craft_cli.methods.craft.ranks import Ranks
from craft_cli.models.families import layer_views
from craft_cli.models.loading import head_names
from craft_cli.models.views import View

DEFAULT_NAME = "default"


@dataclass
class _Held:
    """One of several adapters on a model, while another one may be in use."""

    transforms: dict[str, Tensor]
    head: dict[str, Tensor]
    model: Mapping[str, Any]
    training: dict[str, Any]


class ModelAdapter(Adapter):
    """Transforms on a transformers model, together with the model's task head.

    Attributes:
        model: the adapted `PreTrainedModel`.
        factors: the frozen factors, and which weights they came from.
        head: names of the model's parameters that are trained in full.
        training_record: what the adapter was trained on, for those who find its folder later.
        active: name of the one in use, of those held.
    """

    model: Any

    def __init__(self, model: Any, factors: Factors, head: Iterable[str], init_noise: float = 0.0) -> None:
        super().__init__(factors.decompositions, init_noise)
        object.__setattr__(self, "model", model)  # not a submodule: the adapter is a submodule of the model
        self.factors = factors
        self.architecture = type(model).__name__  # FSDP changes the class in place
        self.head = tuple(head)
        self.training_record: dict[str, Any] = {}
        self.active = DEFAULT_NAME
        self._held: dict[str, _Held] = {}
        self._untrained = {name: tensor.clone() for name, tensor in self.head_state().items()}

    def head_state(self) -> dict[str, Tensor]:
        """The head's parameters by name."""
        return {name: self.model.get_parameter(name).detach() for name in self.head}  # state_dict() disturbs FSDP

    def trained_state(self) -> dict[str, Tensor]:
        """A copy of transforms and head on the CPU, by their names in the adapter's file."""
        self._refuse_disabled()
        return {name: tensor.detach().cpu().clone() for name, tensor in self._trained().items()}

    @torch.no_grad()
    def load_trained_state(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `trained_state` gave, or a part of it.

        Raises:
            ModelError: a tensor has no place here, or not this shape.
        """
        mine = self._trained()
        for name, tensor in state.items():
            if name not in mine or mine[name].shape != tensor.shape:
                found = f"is {tuple(mine[name].shape)}" if name in mine else "is missing"
                raise ModelError(f"{name} {tuple(tensor.shape)} {found} in this model")
            mine[name].copy_(tensor)

    def _trained(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {f"transform.{name}": k for name, k in self._named_transforms().items()}
        return state | {f"head.{name}": tensor for name, tensor in self.head_state().items()}

    def count_head_parameters(self) -> int:
        """How many numbers of the head are trained."""
        return sum(tensor.numel() for tensor in self.head_state().values())

    def detach(self, root: nn.Module | None = None) -> None:
        """Take the adapter off: the model computes what it did before, with the trained head."""
        super().detach(self.model.base_model if root is None else root)

    def merge(self, root: nn.Module | None = None) -> list[str]:
        """Fold the change into the model's weights and take the adapter off.

        Returns:
            Paths of the modules whose weight changed.

        Raises:
            ModelError: the model is quantised.
            ValueError: nothing changes, or the adapter is attached to no model.
        """
        self._refuse_disabled()
        if getattr(self.model, "is_quantized", False):
            raise ModelError("a quantised model cannot be merged into: load the adapter onto the full-precision base")
        return super().merge(self.model.base_model if root is None else root)

    # -- several on one base ----------------------------------------------------------------------------------------

    @property
    def names(self) -> tuple[str, ...]:
        """Of the adapters held, in the order they were loaded."""
        return tuple(self._held) or (self.active,)

    def _refuse_disabled(self) -> None:
        """Inside `disabled` the head is not the trained one: nothing may be kept or changed there."""
        if not self._enabled:
            raise ConfigError("the adapter is disabled here: leave the `disabled()` block first")

    @torch.no_grad()
    def hold(self, name: str, saved: SavedAdapter) -> None:
        """Keep a saved adapter of these very factors under a name, and use it.

        Raises:
            ConfigError: inside `disabled`.
        """
        self._refuse_disabled()
        self._put_away()
        transforms = {f"{target}.{mode}": k for target, modes in saved.transforms.items() for mode, k in modes.items()}
        self._held[name] = _Held(transforms, dict(saved.head), saved.record["model"], saved.record.get("training", {}))
        self._show(name)

    @torch.no_grad()
    def use(self, name: str) -> None:
        """Switch to another of the adapters held: transforms, head and label names; nothing is attached again.

        Raises:
            ConfigError: none is held by this name, or inside `disabled`.
        """
        self._refuse_disabled()
        if name not in self.names:
            raise ConfigError(f"no adapter '{name}' is held here{nearest(name, self.names)}")
        if name != self.active:
            self._put_away()
            self._show(name)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the model is the base model, with the head it had before the adapter came."""
        trained = {name: tensor.clone() for name, tensor in self.head_state().items()}
        self._set_head(self._untrained)
        try:
            with super().disabled():
                yield
        finally:
            self._set_head(trained)

    def _named_transforms(self) -> dict[str, nn.Parameter]:
        return {f"{target}.{mode}": k for target, p in self.items() for mode, k in p.transforms.items()}

    def _put_away(self) -> None:
        """What is in use may have been trained on since it was loaded."""
        self._held[self.active] = _Held(
            {name: k.detach().clone() for name, k in self._named_transforms().items()},
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
        for key, k in self._named_transforms().items():
            k.data.copy_(held.transforms[key])
        self._set_head(held.head)
        self.training_record = held.training
        config = self.model.config
        config.id2label = {int(number): label for number, label in held.model["id2label"].items()}
        config.label2id = {label: number for number, label in config.id2label.items()}
        config.problem_type = held.model["problem_type"]

    @torch.no_grad()
    def _set_head(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in self.head_state().items():
            tensor.copy_(tensors[name])

    # -- on disk ----------------------------------------------------------------------------------------------------

    def describe(self, factors: str = INCLUDE) -> dict[str, Any]:
        """What adapter_config.json says, with the factors included or referred to."""
        return {
            "method": "craft",
            "format_version": FORMAT_VERSION,
            "base_model": self.factors.identity(),
            "targets": list(self.factors.targets),
            "ranks": {name: list(Ranks.of_modes(p.decomposition.ranks)) for name, p in self.items()},
            "head": list(self.head),
            "factors": {
                "stored": factors,
                "sha256": factor_sha256({name: p.decomposition for name, p in self.items()}),
            },
            "parameters": {"adapter": self.count_parameters(), "head": self.count_head_parameters()},
            "model": self._model_record(),
            "training": self.training_record,
        }

    def save(self, path: str | Path, *, card: str | None = None, factors: str = INCLUDE) -> None:
        """Write the adapter as a folder, replacing one that is there, and check it by reading it back.

        Args:
            path: the folder.
            card: text of its README.md.
            factors: `include` makes the folder enough with the base; `reference` writes only the sha256 of the factors,
                which loading then takes from the cache: a few tens of kilobytes for each of many adapters of one base.

        Raises:
            FileError: it cannot be written, or reads back different; a former adapter there is untouched.
        """
        path = Path(path)
        if path.is_dir() and any(path.iterdir()) and not (path / CONFIG_FILE).is_file():
            raise FileError(f"{path} is a folder with something else than an adapter in it; choose another")
        with whole_folder(path, overwrite=True) as folder:
            self.write(folder, card=card, factors=factors)

    def write(self, folder: Path, *, card: str | None = None, factors: str = INCLUDE) -> None:
        """Write the adapter's files into a folder that is there, and check them by reading them back; see `save`.

        Raises:
            FileError: one cannot be written, or reads back different.
        """
        self._refuse_disabled()
        if factors not in (INCLUDE, REFERENCE):
            raise ConfigError(f"factors: expected {INCLUDE} or {REFERENCE}, not '{factors}'")
        state = self._trained()
        if factors == INCLUDE:
            state |= factor_tensors({name: projection.decomposition for name, projection in self.items()})
        write_tensors(
            folder / TENSOR_FILE, KIND, state, {"targets": list(self.factors.targets)} | self.factors.identity()
        )
        write_json(folder / CONFIG_FILE, self.describe(factors))
        if card is not None:
            write_bytes(folder / "README.md", card.encode())
        saved, _ = read_tensors(folder / TENSOR_FILE, KIND)
        if any(not torch.equal(saved[name], tensor.detach().cpu()) for name, tensor in state.items()):
            raise FileError(
                f"{folder}: the adapter reads back different from what was written; the disk may be failing"
            )


def attach(
    model: Any,
    factors: Factors,
    *,
    targets: Sequence[str] | None = None,
    ranks: str | Sequence[int] | None = None,
    init_noise: bool = False,
    head: Iterable[str] | None = None,
) -> ModelAdapter:
    """Adapt a transformers model in place and freeze everything but the transforms and the head.

    Args:
        model: a supported `PreTrainedModel`, loaded from the weights that were decomposed.
        factors: of `craft.decompose`.
        targets: some of the factors' projections; all without.
        ranks: smaller ones than the factors', OUT,IN,LAYERS.
        init_noise: start as the paper does, J = I + 0.01 N(0, 0.02^2), instead of exactly at the base model.
        head: names of parameters to train in full; all outside the base model without. Name those too that were newly
            initialised inside it.

    Raises:
        ConfigError: targets that were not decomposed, or ranks above those of the factors.
        ModelError: an unsupported family, or other weights than those decomposed.
    """
    chosen = tuple(targets) if targets is not None else factors.targets
    views = layer_views(model.config, chosen)
    missing = [target for target in chosen if target not in factors.targets]
    if missing:
        raise ConfigError(
            f"the factors hold {', '.join(factors.targets)}, not {', '.join(missing)}: decompose them too"
        )
    if ranks is not None:
        try:
            factors = factors.select(chosen, Ranks.parse(ranks))
        except ValueError as error:
            raise ConfigError(f"--ranks: {error}; decompose at these ranks first") from error
    elif chosen != factors.targets:
        factors = replace(factors, decompositions={target: factors.decompositions[target] for target in chosen},
                          fingerprints={target: factors.fingerprints[target] for target in chosen})  # fmt: skip
    check_base(model, factors, views)
    adapter = ModelAdapter(model, factors, head_names(model) if head is None else head, PAPER_NOISE * init_noise)
    _put_on(adapter, views)
    return adapter


def load(model: Any, path: str | Path, *, name: str | None = None, cache_dir: str | Path | None = None) -> ModelAdapter:
    """Put a saved adapter and its head on a base model.

    Args:
        model: the base, with the right number of labels; it gets the adapter's label names. With `name` it may carry an
            adapter already: those of one base and the same factors are held together, and this one is in use then.
        path: the adapter's folder.
        name: what it is called in `adapter.use`; `default` without.
        cache_dir: where factors are looked for that the adapter only refers to; `~/.cache/craft` without.

    Raises:
        FileError: the folder is no adapter, is damaged, or refers to factors that cannot be had.
        ModelError: the model is not the base it was trained on, has another head, or carries an adapter already.
    """
    path = Path(path)
    held: ModelAdapter | None = getattr(model.base_model, ModelAdapter.ATTRIBUTE, None)
    if held is not None and name is None:
        raise ModelError("this model carries an adapter already: detach it first, or give name=... to hold several")
    saved = read_adapter(path, cache_dir)
    views = layer_views(model.config, saved.factors.targets)
    if held is None:
        check_base(model, saved.factors, views)
    elif factor_sha256(held.factors.decompositions) != factor_sha256(saved.factors.decompositions):
        raise ModelError(f"{path} was trained over other factors than the adapter on this model: load it on its own")
    state = model.state_dict()
    if model.config.num_labels != saved.record["model"]["num_labels"]:
        raise ModelError(
            f"{path} has {saved.record['model']['num_labels']} labels, this model {model.config.num_labels}: load a "
            f"{saved.record['model']['architecture']} with num_labels={saved.record['model']['num_labels']}"
        )
    for parameter, tensor in saved.head.items():
        if parameter not in state or state[parameter].shape != tensor.shape:
            found = f"is {tuple(state[parameter].shape)}" if parameter in state else "is missing"
            raise ModelError(
                f"{path}: its head needs {parameter!r} {tuple(tensor.shape)}, which {found} in this model; load a "
                f"{saved.record['model']['architecture']} with num_labels={saved.record['model']['num_labels']}"
            )
    adapter = ModelAdapter(model, saved.factors, saved.head) if held is None else held
    if held is None:
        adapter.active = name or DEFAULT_NAME
    if set(saved.head) != set(adapter.head):
        raise ModelError(f"{path} trains another head than the adapter on this model: load it on its own")
    adapter.hold(name or DEFAULT_NAME, saved)
    if held is None:
        _put_on(adapter, views)
    return adapter


def _put_on(adapter: ModelAdapter, views: Mapping[str, Sequence[View]]) -> None:
    try:
        adapter.attach(adapter.model.base_model, views)
    except ValueError as error:
        raise ModelError(str(error)) from error
    head = set(adapter.head)
    transforms = {id(parameter) for parameter in adapter.parameters()}
    for name, parameter in adapter.model.named_parameters():
        parameter.requires_grad_(name in head or id(parameter) in transforms)
