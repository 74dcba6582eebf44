"""CRAFT: fine-tune transformers with a few thousand parameters over frozen Tucker factors (arXiv 2602.17510).

Public names are imported on first use, so that `import craft_cli` is fast.
"""

from __future__ import annotations

from importlib import import_module
from inspect import isfunction
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "Chat": "api.chat",
    "CraftCallback": "methods.trainer",
    "CraftError": "errors",
    "Factors": "methods.craft.factors",
    "Generation": "tasks.generation",
    "Listener": "training.progress",
    "ModelAdapter": "methods.model_adapter",
    "Ranks": "methods.craft.ranks",
    "RunConfig": "config",
    "SweepOptions": "api.sweep",
    "TuckerTensor": "tucker",
    "advise": "api.advise",
    "attach": "methods.attach",
    "checkpoint_folder": "models.hub",
    "compare": "api.compare",
    "decompose": "api.decompose",
    "evaluate": "api.evaluate",
    "hosvd": "tucker",
    "inspect": "api.inspect",
    "load": "methods.attach",
    "merge": "api.merge",
    "predict": "api.predict",
    "submit": "api.submit",
    "sweep": "api.sweep",
    "train": "api.train",
}

__all__ = ["__version__", *_HOME]

if TYPE_CHECKING:
    from craft_cli.api.advise import advise as advise
    from craft_cli.api.chat import Chat as Chat
    from craft_cli.api.compare import compare as compare
    from craft_cli.api.decompose import decompose as decompose
    from craft_cli.api.evaluate import evaluate as evaluate
    from craft_cli.api.inspect import inspect as inspect
    from craft_cli.api.merge import merge as merge
    from craft_cli.api.predict import predict as predict
    from craft_cli.api.submit import submit as submit
    from craft_cli.api.sweep import SweepOptions as SweepOptions
    from craft_cli.api.sweep import sweep as sweep
    from craft_cli.api.train import train as train
    from craft_cli.config import RunConfig as RunConfig
    from craft_cli.errors import CraftError as CraftError
    from craft_cli.methods.attach import attach as attach
    from craft_cli.methods.attach import load as load
    from craft_cli.methods.craft.factors import Factors as Factors
    from craft_cli.methods.craft.ranks import Ranks as Ranks
    from craft_cli.methods.model_adapter import ModelAdapter as ModelAdapter
    from craft_cli.methods.trainer import CraftCallback as CraftCallback
    from craft_cli.models.hub import checkpoint_folder as checkpoint_folder
    from craft_cli.tasks.generation import Generation as Generation
    from craft_cli.training.progress import Listener as Listener
    from craft_cli.tucker import TuckerTensor as TuckerTensor
    from craft_cli.tucker import hosvd as hosvd


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        from craft_cli.installation import OTHERS_NAMES, collision

        if name in OTHERS_NAMES and (reason := collision()):  # the message of an AttributeError would be lost
            raise ImportError(f"craft_cli has no {name!r}: {reason}")
        raise AttributeError(f"module 'craft_cli' has no attribute '{name}'")
    found = getattr(import_module(f"craft_cli.{_HOME[name]}"), name)
    if isfunction(found) and not _HOME[name].startswith("tucker"):
        found = import_module("craft_cli.config.arguments").public(found)
    globals()[name] = found
    return found
