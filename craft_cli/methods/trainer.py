"""`craft.CraftCallback`, for an adapted model in the Hugging Face Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from craft_cli.errors import ConfigError
from craft_cli.methods.adapter_folder import BESIDE
from craft_cli.methods.saving import Saving, saving_of

_UPLOADED_AT_ONCE = ("every_save", "checkpoint", "all_checkpoints")
_NO_METRICS = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")


class CraftCallback(TrainerCallback):
    """Small checkpoints for a model with an adapter, and the adapter in `OUTPUT_DIR/adapter` at the end.

        adapter = craft.attach(model)
        trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[craft.CraftCallback()])
        trainer.train()                                 # or trainer.train(resume_from_checkpoint=True)
        craft.load(fresh_model, "OUTPUT_DIR/adapter")

    A checkpoint has only the trained parameters, and is also an adapter's folder. The Trainer resumes from it exactly
    as from its own. The adapter at the end is the best one with `load_best_model_at_end`, otherwise the last.
    `trainer.save_model` still writes a plain checkpoint with merged weights.

    Raises:
        ConfigError: when the Trainer is created: its model has no adapter, or would upload the checkpoints as models.
    """

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
        """Check the arguments, and the model if the Trainer has one already."""
        if args.push_to_hub and args.hub_strategy in _UPLOADED_AT_ONCE:
            raise ConfigError(
                "CraftCallback: a checkpoint has only the trained parameters and cannot be uploaded as a model: "
                'pass hub_strategy="end" to TrainingArguments'
            )
        if model is not None:
            _saving(model)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
        """Turn on small checkpoints."""
        _saving(model).small_checkpoints = True

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
        """Save the adapter."""
        saving = _saving(model)
        saving.small_checkpoints = False
        if state.is_world_process_zero:
            saving.adapter.training_record = saving.adapter.training_record | _training(args, state)
            saving.adapter.save(Path(args.output_dir) / BESIDE)


def _saving(model: Any) -> Saving:
    saving = saving_of(model)
    if saving is None:
        raise ConfigError(
            "CraftCallback: the Trainer's model has no adapter: call craft.attach(model) before you create the Trainer"
        )
    return saving


def _training(args: Any, state: Any) -> dict[str, Any]:
    """Epoch and metrics of the saved adapter's evaluation, if there is one."""
    best = state.best_global_step if args.load_best_model_at_end else None
    evaluations = [entry for entry in state.log_history if any(name.startswith("eval_") for name in entry)]
    chosen = [entry for entry in evaluations if best is None or entry["step"] == best]
    if not chosen:
        return {"epoch": float(state.epoch or 0.0)}
    metrics = {
        name.removeprefix("eval_"): float(value)
        for name, value in chosen[-1].items()
        if name.startswith("eval_")
        and name.removeprefix("eval_") not in _NO_METRICS
        and isinstance(value, (int, float))
    }
    return {"epoch": float(chosen[-1]["epoch"]), "metrics": metrics}
