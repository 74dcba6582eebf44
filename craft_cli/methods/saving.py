"""The `save_pretrained` and `load_state_dict` of an adapted model.

A hook is not a weight, so a plain `save_pretrained` would write the base without the change. While a model has an
adapter, it writes merged weights, which any tool loads, and in the subfolder `adapter` the adapter itself, which can be
trained further. `Trainer.save_model`, `push_to_hub`, a pipeline and sentence-transformers all call it. `state_dict`
does not change: it has base, change and head by name, as `torch.save` and Accelerate's `save_state` need it.
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
"""Name of a checkpoint folder of the Hugging Face Trainer."""
_BASIS = "basis"
_OF_THE_HUB = ("repo_id", "commit_message", "create_pr", "private", "token")
"""Arguments of `save_pretrained` that are for `push_to_hub`."""


class Saving:
    """Replaces `save_pretrained` of a model, or of its base model, while it has an adapter.

    Args:
        adapter: the adapter.
        model: the model or base model whose `save_pretrained` this is.

    Attributes:
        small_checkpoints: whether to write only the trained parameters into the Trainer's checkpoint folders.
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
            ModelError: the model is quantized, or the change is not finite.
        """
        self.adapter.refuse_disabled()
        folder, whole = Path(save_directory), self.model is self.adapter.model
        if self.small_checkpoints and whole and _CHECKPOINT.fullmatch(folder.name):
            return self._write_small(folder) if is_main_process else None
        if getattr(self.model, "is_quantized", False):
            raise ModelError(
                "save_pretrained: the adapter cannot be merged into a quantized model: save the adapter with "
                "adapter.save(FOLDER), and merge it into the full-precision base with craft.merge(FOLDER)"
            )
        if options.get("distributed_checkpoint"):
            raise ConfigError(
                "save_pretrained: distributed_checkpoint is not supported for an adapted model: omit it, or save the "
                "adapter with adapter.save(FOLDER)"
            )
        if whole and is_main_process:
            self.adapter.save(folder / BESIDE)
        state = dict(self.model.state_dict() if state_dict is None else state_dict)
        state = {name: tensor for name, tensor in state.items() if not name.startswith(self._own)}
        if state or is_main_process:  # other processes may have no tensors: the main one writes
            self.adapter.merge_into(state, self._prefix)
        push = options.pop("push_to_hub", False)
        asked = {name: options.pop(name) for name in _OF_THE_HUB if name in options}
        type(self.model).save_pretrained(self.model, save_directory, is_main_process, state, **options)
        if push and is_main_process:  # transformers itself would omit the adapter's folder
            self.model.push_to_hub(asked.pop("repo_id", folder.name), **asked)

    @property
    def _own(self) -> str:
        """The prefix of the adapter's parameter names."""
        return f"{self._prefix}{self.adapter.ATTRIBUTE}."

    # -- checkpoints of the Trainer -----------------------------------------------------------------------------------

    def _write_small(self, folder: Path) -> None:
        """Write the adapter, and the trained parameters by their names in the model, which the Trainer resumes from."""
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
        """The hashes of the weights and frozen tensors; the trained parameters are valid only with these."""
        frozen = self.adapter.frozen
        hashes = " ".join([*frozen.fingerprints.values(), frozen.sha256() or ""])
        return torch.frombuffer(bytearray(hashes.encode()), dtype=torch.uint8)

    def before_loading(self, model: Any, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Refuse parameters that were trained with other weights or factors, and merged weights.

        Raises:
            ModelError: the state does not belong to this model.
        """
        own = f"{prefix}{self._own}"
        basis = state.pop(f"{own}{_BASIS}", None)
        self._loads_small = basis is not None
        if basis is not None and not torch.equal(basis.cpu(), self._basis()):
            raise ModelError(
                "this checkpoint was trained with different weights or factors from the adapter on this model: "
                "attach the adapter as in that training"
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
                        f"these are the weights of a merged or a different model ({name} differs), which the adapter "
                        "on this model would change again: load the saved adapter onto the base with craft.load; for "
                        "checkpoints that the Hugging Face Trainer can resume, pass callbacks=[craft.CraftCallback()]"
                    )

    def after_loading(self, model: Any, keys: Any) -> None:
        """Do not report frozen parameters as missing from a small checkpoint."""
        if self._loads_small:
            kept = self.adapter.trained_names()
            keys.missing_keys[:] = [name for name in keys.missing_keys if name in kept]
            self._loads_small = False


def saving_of(model: Any) -> Saving | None:
    """The `Saving` of a model; None if it has no adapter."""
    saving = vars(model).get("save_pretrained")
    return saving if isinstance(saving, Saving) else None


def install(adapter: ModelAdapter) -> list[Any]:
    """Replace `save_pretrained` of the adapter's model and of its base model, and check what is loaded.

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
    """Restore the model's own `save_pretrained`."""
    for part in (adapter.model.base_model, adapter.model):
        if saving_of(part) is not None:
            del part.save_pretrained
