"""CRAFT: fine-tune a transformer by a few thousand numbers over frozen Tucker factors (arXiv 2602.17510).

Public names are imported when first used, so that `import craft_cli` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "CraftError": "errors",
    "Factors": "factors",
    "ModelAdapter": "attached",
    "Ranks": "ranks",
    "RunConfig": "config",
    "TuckerTensor": "tucker",
    "advise": "advice",
    "attach": "attached",
    "compare": "comparison",
    "decompose": "decomposition",
    "evaluate": "evaluation",
    "hosvd": "tucker",
    "inspect": "inspection",
    "load": "attached",
    "merge": "merging",
    "predict": "prediction",
    "submit": "submission",
    "train": "training",
}

__all__ = ["__version__", *_HOME]

if TYPE_CHECKING:
    from craft_cli.advice import advise as advise
    from craft_cli.attached import ModelAdapter as ModelAdapter
    from craft_cli.attached import attach as attach
    from craft_cli.attached import load as load
    from craft_cli.comparison import compare as compare
    from craft_cli.config import RunConfig as RunConfig
    from craft_cli.decomposition import decompose as decompose
    from craft_cli.errors import CraftError as CraftError
    from craft_cli.evaluation import evaluate as evaluate
    from craft_cli.factors import Factors as Factors
    from craft_cli.inspection import inspect as inspect
    from craft_cli.merging import merge as merge
    from craft_cli.prediction import predict as predict
    from craft_cli.ranks import Ranks as Ranks
    from craft_cli.submission import submit as submit
    from craft_cli.training import train as train
    from craft_cli.tucker import TuckerTensor as TuckerTensor
    from craft_cli.tucker import hosvd as hosvd


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'craft_cli' has no attribute '{name}'")
    return getattr(import_module(f"craft_cli.{_HOME[name]}"), name)
