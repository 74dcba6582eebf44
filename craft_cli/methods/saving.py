"""What `save_pretrained` writes of an adapted model, and what its `load_state_dict` accepts.

A hook is no weight, so a plain `save_pretrained` would write the base without the change. While an adapter is on a model,
it writes the change merged into the weights, which any tool loads, and the adapter itself in the folder `adapter` beside
them, which goes on training. `Trainer.save_model`, `push_to_hub`, a pipeline and sentence-transformers all call it.
`state_dict` is untouched: base, change and head by their names, as `torch.save` and Accelerate's `save_state` need it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from craft_cli.errors import ConfigError, ModelError
from craft_cli.files import write_bytes
from craft_cli.methods.adapter_folder import BESIDE

if TYPE_CHECKING:
    from craft_cli.methods.model_adapter import ModelAdapter

WEIGHTS_FILE = "model.safetensors"
_CHECKPOINT = re.compile(r"checkpoint-\d+")
"""What the Hugging Face Trainer calls the folder of a checkpoint."""
_BASIS = "basis"
_OF_THE_HUB = ("repo_id", "commit_message", "create_pr", "private", "token")
"""What `save_pretrained` takes for `push_to_hub`."""


class Saving:
    """Stands in for `save_pretrained` of a model, or of its base model, while an adapter is on it.

    Args:
        adapter: on the model.
        model: the model, or the part of it, whose `save_pretrained` this is.

    Attributes:
        small_checkpoints: write only what is trained into the folders that are called as the Trainer's checkpoints.
    """

    def __init__(self, adapter: ModelAdapter, model: Any) -> None:
        self.adapter, self.model, self.small_checkpoints = adapter, model, False
        self._loads_small = False
        base = adapter.model.base_model
        self._prefix = "" if base is model else f"{adapter.model.base_model_prefix}."

    def __call__(
        self,
        save_directory: Any,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        **options: Any,
    ) -> Any:
        """See `PreTrainedModel.save_pretrained`.

        Raises:
            ConfigError: inside `disabled`, or with `distributed_checkpoint`, which cannot be merged.
            ModelError: the model is quantised, or the change is not finite.
        """
        self.adapter.refuse_disabled()
        folder, whole = Path(save_directory), self.model is self.adapter.model
        if self.small_checkpoints and whole and _CHECKPOINT.fullmatch(folder.name):
            return self._write_small(folder) if is_main_process else None
        if getattr(self.model, "is_quantized", False):
            raise ModelError(
                "save_pretrained: the change cannot be merged into a quantised model: save the adapter with "
                "adapter.save(FOLDER), and merge it into the full-precision base with craft.merge(FOLDER)"
            )
        if options.get("distributed_checkpoint"):
            raise ConfigError(
                "save_pretrained: an adapted model has no distributed_checkpoint: leave it out, or save the adapter "
                "with adapter.save(FOLDER)"
            )
        if whole and is_main_process:
            self.adapter.save(folder / BESIDE)
        state = dict(self.model.state_dict() if state_dict is None else state_dict)
        state = {name: tensor for name, tensor in state.items() if not name.startswith(self._own)}
        if state or is_main_process:  # other processes may be given nothing: the main one writes
            self.adapter.merge_into(state, self._prefix)
        push = options.pop("push_to_hub", False)
        asked = {name: options.pop(name) for name in _OF_THE_HUB if name in options}
        type(self.model).save_pretrained(self.model, save_directory, is_main_process, state, **options)
        if push and is_main_process:  # transformers itself would leave out the adapter's folder
            self.model.push_to_hub(asked.pop("repo_id", folder.name), **asked)

    @property
    def _own(self) -> str:
        """What the names of the adapter's parameters begin with."""
        return f"{self._prefix}{self.adapter.ATTRIBUTE}."

    # -- checkpoints of the Trainer -----------------------------------------------------------------------------------

    def _write_small(self, folder: Path) -> None:
        """The adapter, and what is trained by its names in the model, which the Trainer loads when it resumes."""
        from safetensors.torch import save

        folder.mkdir(parents=True, exist_ok=True)
        self.adapter.write(folder)
        trained = self.adapter.trained_names()
        state = {
            name: parameter.detach().cpu().contiguous()
            for name, parameter in self.model.named_parameters()
            if name in trained
        }
        state[f"{self._own}{_BASIS}"] = self._basis()
        write_bytes(folder / WEIGHTS_FILE, save(state, metadata={"format": "pt"}))

    def _basis(self) -> Tensor:
        """Which weights and frozen tensors the trained numbers belong to: they mean nothing with others."""
        frozen = self.adapter.frozen
        told = " ".join([*frozen.fingerprints.values(), frozen.sha256() or ""])
        return torch.frombuffer(bytearray(told.encode()), dtype=torch.uint8)

    def before_loading(self, model: Any, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Refuse numbers of another basis, and weights that hold a change already.

        Raises:
            ModelError: so.
        """
        own = f"{prefix}{self._own}"
        basis = state.pop(f"{own}{_BASIS}", None)
        self._loads_small = basis is not None
        if basis is not None and not torch.equal(basis.cpu(), self._basis()):
            raise ModelError(
                "this checkpoint was trained over other weights or factors than those of the adapter on this model: "
                "attach it as it was attached then"
            )
        if not any(name.startswith(own) for name in state):
            for path in self.adapter.modules_adapted():
                weight = model.base_model.get_submodule(path).get_parameter("weight").detach()
                name = f"{prefix}{self._prefix}{path}.weight"
                given = state.get(name)
                if (
                    isinstance(given, Tensor)
                    and given.shape == weight.shape
                    and not torch.equal(given.to(weight), weight)
                ):
                    raise ModelError(
                        f"these are the weights of a merged or another model ({name} differs), and would be changed twice "
                        "under the adapter on this one: load its adapter onto the base with craft.load; with the Hugging "
                        "Face Trainer give callbacks=[craft.CraftCallback()], whose checkpoints resume"
                    )

    def after_loading(self, model: Any, keys: Any) -> None:
        """What is frozen is not in a small checkpoint, and not missing."""
        if self._loads_small:
            kept = self.adapter.trained_names()
            keys.missing_keys[:] = [name for name in keys.missing_keys if name in kept]
            self._loads_small = False


def saving_of(model: Any) -> Saving | None:
    """What stands in for a model's `save_pretrained`; None where there is no adapter on it."""
    found = vars(model).get("save_pretrained")
    return found if isinstance(found, Saving) else None


def install(adapter: ModelAdapter) -> list[Any]:
    """Stand in for `save_pretrained` of the adapter's model and of its base model, and watch what is loaded.

    Returns:
        The handles of the hooks.
    """
    model = adapter.model
    for part in {id(part): part for part in (model.base_model, model)}.values():
        part.save_pretrained = Saving(adapter, part)
    saving = model.save_pretrained
    return [
        model.register_load_state_dict_pre_hook(saving.before_loading),
        model.register_load_state_dict_post_hook(saving.after_loading),
    ]


def uninstall(adapter: ModelAdapter) -> None:
    """Give the model its own `save_pretrained` back."""
    for part in (adapter.model.base_model, adapter.model):
        if saving_of(part) is not None:
            del part.save_pretrained
