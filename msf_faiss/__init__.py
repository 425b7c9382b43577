"""Self-supervised pretraining of image encoders by Mean Shift (MSF) with a FAISS memory bank.

Everything public is here: `import msf_faiss` is all that a notebook needs. Names are imported on first use, so that the
import itself is immediate and loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from msf_faiss.bank import create_bank as create_bank
    from msf_faiss.config.load import load_config as load_config
    from msf_faiss.embeddings.embedder import embed as embed
    from msf_faiss.embeddings.encoder import load_encoder as load_encoder
    from msf_faiss.errors import UserError as UserError
    from msf_faiss.run.events import BankAdjusted as BankAdjusted
    from msf_faiss.run.events import CachingImages as CachingImages
    from msf_faiss.run.events import CheckpointSaved as CheckpointSaved
    from msf_faiss.run.events import CollapseDetected as CollapseDetected
    from msf_faiss.run.events import Event as Event
    from msf_faiss.run.events import KnnEvaluated as KnnEvaluated
    from msf_faiss.run.events import RunEnded as RunEnded
    from msf_faiss.run.events import RunStarted as RunStarted
    from msf_faiss.run.events import StepProfiled as StepProfiled
    from msf_faiss.run.events import TimeEstimated as TimeEstimated
    from msf_faiss.run.events import TrainingProgress as TrainingProgress
    from msf_faiss.search.knn import knn as knn
    from msf_faiss.train.trainer import pretrain as pretrain

_EVENTS = """
BankAdjusted CachingImages CheckpointSaved CollapseDetected Event KnnEvaluated RunEnded RunStarted StepProfiled
TimeEstimated TrainingProgress
"""
_MODULES = {
    "UserError": "errors",
    "create_bank": "bank",
    "embed": "embeddings.embedder",
    "knn": "search.knn",
    "load_config": "config.load",
    "load_encoder": "embeddings.encoder",
    "pretrain": "train.trainer",
    **dict.fromkeys(_EVENTS.split(), "run.events"),
}

if not TYPE_CHECKING:  # or type checkers would accept any name

    def __getattr__(name: str) -> object:
        if name not in _MODULES:
            raise AttributeError(f"module 'msf_faiss' has no attribute {name!r}")
        globals()[name] = getattr(importlib.import_module(f"msf_faiss.{_MODULES[name]}"), name)
        return globals()[name]


def __dir__() -> list[str]:
    return sorted([*_MODULES, "__version__"])
